"""SmolLM2-135M with other attentions swapped in and nothing trained: what it keeps and costs.

`python benchmarks/claims/converted.py health`: logits under mechanisms at the options at which they
are softmax attention, then `convert.health` on one window of held-out text (the standard library's
source) for mechanisms in half of the layers or in all.
`python benchmarks/claims/converted.py decoding`: a step's CPU time and the bytes of the cache at
512 to 4,096 tokens, of the original and of models with a state of constant size, in turns.
They write `results/converted_health.json` and `results/converted_decoding.json`.
"""

import argparse
import copy
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan import convert, registry
from longspan.data import corpus, smollm2
from longspan.hub.swapped import cache_bytes

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write

WINDOW, STEPS = 256, 4
EXACT = (
    "multi-head-attention",
    "rabe-staats",
    "longformer",
    "bigbird",
    "nat",
    "sparse-transformer",
    "logsparse-transformer",
    "deepspeed-sparse-attention",
)
# 64 tokens back; and the same with the first four besides, whatever the distance.
NEAR = ("longformer", {"window": 128})
SINKS = (
    "deepspeed-sparse-attention",
    {"block": 4, "sparsity": {"form": "bslongformer", "near": 33, "hubs": [0]}},
)
EVERY: tuple[Any, ...] = (("multi-head-attention", {}), NEAR, SINKS)
HALF: tuple[Any, ...] = (
    NEAR,
    SINKS,
    ("local-block-attention", {"block": 64}),
    ("bigbird", {"block": 16}),
    ("sparse-transformer", {"stride": 16}),
    ("logsparse-transformer", {}),
    ("informer-causal", {}),
    ("performer", {"features": 256}),
    ("linear-transformer", {}),
    ("cosformer", {}),
    ("fast-weight-delta-dpfp", {}),
)
POSITIONS, CHUNK, ROUNDS = (512, 1024, 2048, 4096), 512, 32
CONSTANT: tuple[Any, ...] = (("linear-transformer", {}), ("longformer", {"window": 256}))


def text(tokenizer: Any, count: int) -> Tensor:
    """So many tokens of held-out text, 1 L."""
    # A token is seldom more than 16 bytes.
    source = bytes(corpus("stdlib").valid[: 16 * count]).decode(errors="replace")
    return tokenizer(source, return_tensors="pt").input_ids[:, :count]


def health() -> None:
    model, tokenizer = smollm2.load()
    window = text(tokenizer, WINDOW)
    with torch.no_grad():
        want = model(window, use_cache=False).logits
    largest = want.abs().max().item()
    exact = []
    for id_ in EXACT:
        options = registry.show(id_).exact
        convert.swap(model, (id_, options or {}))
        with torch.no_grad():
            gap = model(window, use_cache=False).logits - want
        convert.undo(model)
        exact.append({"id": id_, "options": options, "logits_differ_by": gap.abs().max().item()})
        print(exact[-1], flush=True)
    rows = []
    plans = [("all", slice(None), spec) for spec in EVERY]
    plans += [("every second", slice(None, None, 2), spec) for spec in HALF]
    for name, layers, (id_, options) in plans:
        began = time.process_time()
        convert.swap(model, (id_, options), layers=layers)
        found = convert.health(model, window, lengths=(WINDOW,), steps=STEPS)
        convert.undo(model)
        figures = found.as_dict()
        del figures["layers"]
        seconds = round(time.process_time() - began, 1)
        rows.append({"id": id_, "options": options, "layers": name, **figures, "cpu_s": seconds})
        print(rows[-1], flush=True)
        # After each row: an interrupted run keeps what it has.
        write("converted_health", window=WINDOW, largest_logit=largest, exact=exact, rows=rows)


@torch.no_grad()
def decoding() -> None:
    found, tokenizer = smollm2.load()
    models = {"original": found}
    for id_, options in CONSTANT:
        models[id_] = convert.swap(smollm2.load().model, (id_, options))
    tokens = text(tokenizer, POSITIONS[-1] + ROUNDS + 1)
    caches = {name: filled(model, tokens) for name, model in models.items()}
    sizes = {
        name: {at: cache_bytes(cache) for at, cache in held.items()}
        for name, held in caches.items()
    }
    times: dict[str, dict[int, list[float]]] = {
        name: {at: [] for at in POSITIONS} for name in models
    }
    # Every round takes one step of each model at each position: what else the machine does meets
    # all of them. The first is not counted.
    for n in range(ROUNDS + 1):
        for at in POSITIONS:
            for name, model in models.items():
                token = tokens[:, at + n : at + n + 1]
                began = time.process_time()
                model(token, past_key_values=caches[name][at], use_cache=True)
                if n:
                    times[name][at].append(time.process_time() - began)
    rows = []
    for name, options in (("original", {}), *CONSTANT):
        medians = [statistics.median(times[name][at]) for at in POSITIONS]
        rows.append(
            {
                "model": name,
                "options": options,
                "step_ms": dict(zip(POSITIONS, (round(1000 * t, 2) for t in medians), strict=True)),
                "growth": round(growth(medians), 4),
                "cache_bytes": sizes[name],
            }
        )
        print(rows[-1], flush=True)
    write("converted_decoding", chunk=CHUNK, rounds=ROUNDS, rows=rows)


def filled(model: Any, tokens: Tensor) -> dict[int, Any]:
    """The cache at each position, fed in chunks."""
    cache, held = None, {}
    for start in range(0, POSITIONS[-1], CHUNK):
        part = tokens[:, start : start + CHUNK]
        cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        if start + CHUNK in POSITIONS:
            held[start + CHUNK] = copy.deepcopy(cache)
    return held


def growth(medians: list[float]) -> float:
    """By how much a step takes longer at the last position than at the first, by a fitted line."""
    slope, intercept = statistics.linear_regression(POSITIONS, medians)
    first, last = (intercept + slope * at for at in (POSITIONS[0], POSITIONS[-1]))
    return last / first - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("health", "decoding"))
    torch.set_num_threads(1)
    {"health": health, "decoding": decoding}[parser.parse_args().part]()


if __name__ == "__main__":
    main()
