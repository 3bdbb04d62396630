"""Transformer-XL, Compressive and Memorizing Transformers whose states hold as many bytes.

The text is generated: passages of random tokens, half of them new and half of them an earlier one
again, 1 to 32 passages back. What can be told of a repeated passage after its first tokens is what
the state still holds of the first time. All three read segment by segment, are trained alike and
are scored on streams they have not seen. `python benchmarks/claims/memory_at_equal_state.py`
writes `results/memory_at_equal_state.json`.
"""

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from longspan.hub import StateCache
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn.auxiliary import collect

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write

VOCABULARY, PASSAGE, FARTHEST = 64, 16, 32
WIDTH, LAYERS, HEADS, SEGMENT, BATCH = 64, 2, 4, 32, 16
VECTORS = 96  # a layer's state: so many of width E; a pair of a key and a value is two
BANDS = ((1, 4), (5, 8), (9, 16), (17, 32))

XL = {"id": "transformer-xl", "memory": VECTORS}
COMPRESSIVE = {
    "id": "compressive-transformer",
    "segment": SEGMENT,
    "memory": VECTORS // 2,
    "compressed": VECTORS // 2,
    "rate": 4,
}
# All that the layers need for their windows, 16 pairs each, leaves the rest to the second's store.
LOCAL = {"id": "memorizing-transformer", "window": 17, "segment": SEGMENT, "memory": 0}
STORING = {**LOCAL, "memory": LAYERS * VECTORS // 2 - LAYERS * 16, "top": 16, "scale": 20.0}
MODELS: dict[str, list[dict[str, Any]]] = {
    "transformer-xl": [XL],
    "compressive-transformer": [COMPRESSIVE],
    "memorizing-transformer": [LOCAL, STORING],
}


def text(rows: int, passages: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Tokens, rows × N, and for each how many passages back it was copied from; 0 where new."""
    made = torch.randint(VOCABULARY, (rows, passages, PASSAGE), generator=generator)
    back = torch.randint(1, FARTHEST + 1, (rows, passages), generator=generator)
    again = torch.rand(rows, passages, generator=generator) < 0.5
    back = torch.where(again & (back <= torch.arange(passages)), back, 0)
    every = torch.arange(rows)
    for n in range(passages):
        made[:, n] = made[every, n - back[:, n]]
    return made.flatten(1), back.repeat_interleave(PASSAGE, 1)


def run(name: str, steps: int, seed: int) -> dict[str, Any]:
    """Train on streams, then score others."""
    torch.manual_seed(seed)
    config = LongspanConfig(
        vocab_size=VOCABULARY,
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        mixers=MODELS[name],
        position=None,
    )
    model = LongspanForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    generator = Generator().manual_seed(seed)
    tokens, _ = text(BATCH, steps * SEGMENT // PASSAGE + 1, generator)
    cache, began = StateCache(), time.process_time()
    model.train()
    for step in range(steps):
        part = tokens[:, step * SEGMENT : (step + 1) * SEGMENT + 1]
        output = model(part[:, :-1], past_key_values=cache, use_cache=True)
        nats = F.cross_entropy(output.logits.flatten(0, 1), part[:, 1:].flatten())
        # What the parts have left: the loss that trains a compression.
        sum(collect(model).values(), nats).backward()
        optimiser.step()
        optimiser.zero_grad()
        schedule.step()
        cache = cache.detach()
    trained = time.process_time() - began
    return {"model": name, **scored(model), "seed": seed, "cpu_seconds": round(trained, 1)}


@torch.no_grad()
def scored(model: LongspanForCausalLM) -> dict[str, Any]:
    """Bits per token of new passages and, from their fifth token on, of repeated ones."""
    tokens, back = text(BATCH, 130, Generator().manual_seed(10**6))
    model.eval()
    cache, bits = StateCache(), []
    for start in range(0, 128 * PASSAGE, SEGMENT):
        part = tokens[:, start : start + SEGMENT + 1]
        output = model(part[:, :-1], past_key_values=cache, use_cache=True)
        bits.append(F.cross_entropy(output.logits.mT, part[:, 1:], reduction="none") / math.log(2))
    told, source = torch.cat(bits, 1), back[:, 1 : 128 * PASSAGE + 1]
    late = (torch.arange(1, 128 * PASSAGE + 1) % PASSAGE >= 4).expand_as(told)
    bands = {
        f"{a} to {b} passages back": told[late & (source >= a) & (source <= b)] for a, b in BANDS
    }
    return {
        "state_bytes": cache.nbytes // BATCH,
        "bits": {
            "new": round(told[source == 0].mean().item(), 3),
            **{name: round(values.mean().item(), 3) for name, values in bands.items()},
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    rows = []
    for name in MODELS:
        for seed in range(arguments.seeds):
            rows.append(run(name, arguments.steps, seed))
            print(rows[-1], flush=True)
    settings = {"steps": arguments.steps, "batch": BATCH, "segment": SEGMENT, "passage": PASSAGE}
    write("memory_at_equal_state", settings=settings, mixers=MODELS, rows=rows)


if __name__ == "__main__":
    main()
