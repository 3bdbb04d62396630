"""Forward and backward at 2²⁰ tokens, batch 1, 4 heads of 64: time and peak memory of each.

Every mechanism runs in a process of its own, so that the peak is its own. Writes
`results/million.json`.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

LENGTH, HEADS, WIDTH = 2**20, 4, 64
RUNS = {
    "linear-transformer": {"causal": True},
    "longformer": {"causal": True, "window": 256},
    "s4": {"width": HEADS * WIDTH},
    "reformer-lsh-causal": {"window": 64, "buckets": [64, 64], "rounds": 1},
}


def run(id: str) -> None:
    """One mechanism, here; prints a JSON line."""
    import torch

    import longspan
    from longspan.nn import Attention

    torch.manual_seed(0)
    module = longspan.build(id, **RUNS[id])
    if isinstance(module, Attention):
        shape = 1, HEADS, LENGTH, WIDTH
        q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
        inputs = (q, q if module.shared else k, v)
    else:
        inputs = (torch.randn(1, LENGTH, HEADS * WIDTH, requires_grad=True),)
    started = time.perf_counter()
    out, _ = module(*inputs)
    forward = time.perf_counter() - started
    gradient = torch.randn(1).expand_as(out)
    started = time.perf_counter()
    out.backward(gradient)
    backward = time.perf_counter() - started
    finite = all(bool(t.grad.isfinite().all()) for t in inputs if t.grad is not None)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        json.dumps(
            {
                "id": id,
                "arguments": RUNS[id],
                "forward_seconds": round(forward, 2),
                "backward_seconds": round(backward, 2),
                "peak_gib": round(peak, 2),
                "finite": finite,
            }
        )
    )


def main() -> None:
    if len(sys.argv) > 1:
        run(sys.argv[1])
        return
    rows = []
    for id in RUNS:
        done = subprocess.run(
            [sys.executable, __file__, id], capture_output=True, text=True, check=False
        )
        line = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else None
        rows.append(json.loads(line) if line else {"id": id, "error": done.stderr[-300:]})
        print(rows[-1], flush=True)
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    target = Path(__file__).parent / "results" / "million.json"
    target.write_text(json.dumps({"length": LENGTH, "machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
