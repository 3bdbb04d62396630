"""Forward and backward at 2²⁰ tokens, batch 1, 4 heads of 64: time and peak memory of each.

Every mechanism whose card claims linear time, and those whose claim has a logarithm, in a process
of its own, so that the peak is its own. `python benchmarks/million.py [METHOD …]` writes
`results/million.json`; with names, only these are run anew.
"""

import json
import resource
import subprocess
import sys
import time

import torch

from longspan import find, show
from longspan.bench import speed
from longspan.bench.settings import MIXING, Spec
from results import FOLDER, write

LENGTH = 2**20
# What differs from the defaults, and mechanisms whose cost has a logarithm, which no card holds.
ARGUMENTS = {
    "longformer": "(window=256)",
    "reformer-lsh-causal": "(window=64,buckets=[64,64],rounds=1)",
    "cosformer": f"(length={LENGTH})",
    "rfa": "(gate=True)",
}
BESIDE = ("kernelized-attention-rpe", "logsparse-transformer", "informer-causal", "lssl")


def methods() -> list[str]:
    """Every mechanism that claims at most linear time, with arguments."""
    letters = dict.fromkeys("DVHECM", 1)
    cards = [card for card in find() if card.kind in MIXING]
    linear = [
        card.id
        for card in cards
        if card.cost("time", L=2000, S=2000, **letters)
        <= 2.001 * card.cost("time", L=1000, S=1000, **letters)
    ]
    return [id_ + ARGUMENTS.get(id_, "") for id_ in sorted({*linear, *BESIDE})]


def main(names: list[str]) -> None:
    path = FOLDER / "million.json"
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]} if names else {}
    for method in names or methods():
        command = [sys.executable, __file__, "--one", method]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
        if done.returncode:
            row = {"error": lines[-1] if lines else f"ended by signal {-done.returncode}"}
        else:
            row = json.loads(lines[-1])
        rows[method] = {"method": method, **row}
        print(rows[method], flush=True)
        write("million", length=LENGTH, rows=list(rows.values()))


def _one(method: str) -> None:
    spec = Spec.parse(method)
    module, inputs, more = speed.bare(spec, LENGTH)
    for t in (*inputs, *more.values()):
        t.requires_grad_()
    started = time.perf_counter()
    out, _ = module(*inputs, **more)
    forward = time.perf_counter() - started
    gradient = torch.randn(1).expand_as(out)
    started = time.perf_counter()
    out.backward(gradient)
    backward = time.perf_counter() - started
    finite = all(bool(t.grad.isfinite().all()) for t in inputs if t.grad is not None)
    print(
        json.dumps(
            {
                "time": show(spec.id).time,
                "causal": speed.is_causal(spec),
                "forward_seconds": round(forward, 2),
                "backward_seconds": round(backward, 2),
                "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
                "finite": finite,
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        _one(sys.argv[2])
    else:
        main(sys.argv[1:])
