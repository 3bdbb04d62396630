"""A text that the model has not seen: kNN-LM, the neural cache and dynamic evaluation on SmolLM2.

The text is longspan's own source code, which began in 2026; SmolLM2-135M-Instruct was published in
November 2024 and was trained on code of earlier date. Files are split by a hash of their path: a
datastore and the statistics of gradients are made from some, settings chosen on others, and the
figures taken on the rest. `python benchmarks/claims/retrieval.py` writes `results/retrieval.json`;
with `--only retrieval` or `--only dynamic`, only these are run anew.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.data import smollm2
from longspan.inference import dynamic_evaluation
from longspan.models.evaluation import Score
from longspan.registry import build
from longspan.retrieval import Datastore, History, Stored, gather, score, tune

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import FOLDER, write

SOURCE = Path(__file__).parents[2] / "src" / "longspan"
WINDOW, STRIDE, NEIGHBOURS, HISTORY = 384, 192, 1024, 2000
SHARES, TEMPERATURES = (0.1, 0.2, 0.3, 0.4, 0.5), (1.0, 3.0, 10.0, 30.0, 100.0)
SHARPNESS, OFFSETS = (0.001, 0.003, 0.01, 0.03, 0.1), (-24.0, -20.0, -16.0, -12.0, -8.0, -4.0, 0.0)
NAMES = ("share", "temperature", "sharpness", "offset")
SEGMENT, CONTEXT = 128, 256
# Krause's code steps by r + ε; rates are for gradients that were divided by it.
RATES, DECAYS = (3e-5, 1e-4), (0.0, 1e-2)


def texts(tokenizer: Any, sizes: dict[str, int]) -> dict[str, Tensor]:
    """Tokens of each part, from files that no other part has."""
    paths = sorted(SOURCE.rglob("*.py"), key=lambda p: digest(str(p.relative_to(SOURCE)).encode()))
    found, waiting = {}, iter(paths)
    for name, size in sizes.items():
        ids: list[int] = []
        while len(ids) < size:
            ids += tokenizer(next(waiting).read_text()).input_ids
        found[name] = torch.tensor(ids[:size])
    return found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def row(method: str, told: Score, base: Score, **settings: Any) -> dict[str, Any]:
    figures = {"perplexity": told.perplexity(), "base": base.perplexity()}
    line = {"method": method, **{n: round(x, 3) for n, x in figures.items()}, **settings}
    print(line, flush=True)
    return line


def retrieval(model: Any, parts: dict[str, Tensor], folder: str) -> list[dict[str, Any]]:
    """Neighbours from the datastore, from the history, and from both."""
    how = {"window": WINDOW, "stride": STRIDE}
    store = Datastore.create(folder, width=model.config.hidden_size)
    store.read(model, parts["train"], shard=4096, **how)
    seen = {
        name: gather(model, parts[name], [Stored(store, NEIGHBOURS), History(HISTORY)], **how)
        for name in ("valid", "test")
    }
    knn = [build("knn-lm", share=0.0)] + [
        build("knn-lm", share=share, temperature=t) for share, t in product(SHARES, TEMPERATURES)
    ]
    linear = [build("neural-cache", sharpness=0.0, share=0.0)] + [
        build("neural-cache", sharpness=s, share=share) for s, share in product(SHARPNESS, SHARES)
    ]
    joint = [build("neural-cache", sharpness=s, offset=o) for s, o in product(SHARPNESS, OFFSETS)]
    base = score([knn[0], linear[0]], seen["test"])
    rows = []
    chosen = {}
    for name, grid in (
        ("knn-lm", [(reader, linear[0]) for reader in knn]),
        ("neural-cache (linear)", [(knn[0], reader) for reader in linear]),
        ("neural-cache (global)", [(knn[0], reader) for reader in joint]),
    ):
        best = tune(grid, seen["valid"]).readers
        chosen[name] = best
        settings = {n: v for n, v in vars(best[name != "knn-lm"]).items() if n in NAMES}
        rows.append(row(name, score(best, seen["test"]), base, **settings))
    both = [(chosen["knn-lm"][0], reader) for reader in linear]
    best = tune(both, seen["valid"]).readers
    settings = {n: v for n, v in vars(best[1]).items() if n in NAMES}
    rows.append(row("knn-lm and neural-cache", score(best, seen["test"]), base, **settings))
    return rows


def dynamic(model: Any, parts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Weights that follow the text, all of them, with statistics from the first part."""
    how = {"segment": SEGMENT, "context": CONTEXT}
    grid = [
        build("dynamic-evaluation", rate=rate, decay=decay, **how)
        for rate, decay in product(RATES, DECAYS)
    ]
    r = grid[0].statistics(model, parts["statistics"])
    tuned = dynamic_evaluation.tune(model, parts["valid"][:1025], grid, r)
    plain = build("dynamic-evaluation", rule="sgd", rate=0.0, **how)(model, parts["test"])
    told = tuned.best(model, parts["test"], r)
    return [
        row(
            "dynamic-evaluation",
            Score(told.nats, told.tokens),
            Score(plain.nats, plain.tokens),
            rule=tuned.best.rule,
            rate=tuned.best.rate,
            decay=tuned.best.decay,
        )
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=int, default=12289)
    parser.add_argument("--valid", type=int, default=2049)
    parser.add_argument("--test", type=int, default=4097)
    parser.add_argument("--only", choices=("retrieval", "dynamic"))
    sizes = vars(parser.parse_args())
    only = sizes.pop("only")
    start = time.time()
    model, tokenizer = smollm2.load()
    parts = texts(tokenizer, {"test": sizes["test"], "valid": sizes["valid"], **sizes})
    parts["statistics"] = parts["train"][:4097]
    about = {
        "model": "SmolLM2-135M-Instruct, Q4_1 dequantised to float32",
        "text": "longspan's own source, begun in 2026, after the model was published (2024)",
        "sha256": digest(parts["test"].numpy().tobytes()),
        "tokens": {name: len(part) for name, part in parts.items()},
        "window": WINDOW,
        "stride": STRIDE,
        "neighbours": NEIGHBOURS,
        "history": HISTORY,
        "segment": SEGMENT,
        "context": CONTEXT,
    }
    rows: list[dict[str, Any]] = []
    path = FOLDER / "retrieval.json"
    if (
        only
        and path.is_file()
        and (old := json.loads(path.read_text()))["sha256"] == about["sha256"]
    ):
        kept = "dynamic" if only == "retrieval" else "knn neural"
        rows = [line for line in old["rows"] if line["method"].split("-")[0] in kept.split()]
    if only != "dynamic":
        with tempfile.TemporaryDirectory() as folder:
            rows += retrieval(model, parts, folder)
        write("retrieval", **about, rows=rows, seconds=round(time.time() - start))
    if only != "retrieval":
        rows += dynamic(model, parts)
        write("retrieval", **about, rows=rows, seconds=round(time.time() - start))


if __name__ == "__main__":
    main()
