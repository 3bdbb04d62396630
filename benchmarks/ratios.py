"""Seconds and memory of each method beside dense attention, 1k to 64k tokens, with its targets.

B 1, H 4, D 64, one thread, CPU time, alternated runs, medians; each method in a process of its
own. Dense attention takes minutes at 65,536 tokens: it is timed once there, alone, and the ratios
of that length are to that run. `python benchmarks/ratios.py [float32|bfloat16] [NAME …]` writes
`results/ratios-DTYPE.json`; with names, only those methods are measured anew.
"""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F

from longspan.bench import speed
from longspan.bench.settings import Spec
from results import FOLDER, write

LENGTHS, LONGEST = (1024, 2048, 4096, 16384), 65536
# Forward and forward + backward at 4,096, 16,384 and 65,536 tokens.
TARGETS = {
    "window": ((0.33, 0.33), (0.08, 0.09), (0.022, 0.024)),
    "global": ((0.30, 0.30), (0.07, 0.08), (0.018, 0.020)),
    "linear": ((0.12, 0.10), (0.03, 0.027), (0.008, 0.009)),
    "gated": ((0.25, 0.25), (0.07, 0.07), (0.02, 0.02)),
    "features": ((0.60, 0.60), (0.15, 0.15), (0.04, 0.04)),
    "landmarks": ((0.12, 0.12), (0.03, 0.03), (0.008, 0.008)),
    "buckets": ((0.50, 0.50), (0.15, 0.15), (0.05, 0.05)),
    "convolution": ((0.20, 0.20), (0.08, 0.08), (0.02, 0.02)),
}
METHODS = {
    "longformer(window=1024)": "window",
    "longformer(causal=False,window=512,hubs=64)": "global",
    "bigbird": "global",
    "bigbird(causal=False)": "global",
    "linear-transformer": "linear",
    "cosformer": "linear",
    "rwkv": "linear",
    "rfa(gate=True)": "gated",
    "fast-weight-delta-dpfp": "gated",
    "performer": "features",
    "linformer": "landmarks",
    "nystromformer": "landmarks",
    "reformer-lsh-causal": "buckets",
    "routing-transformer-causal": "buckets",
    "sinkhorn-attention": "buckets",
    "smyrf": "buckets",
    "s4": "convolution",
    "lightweight-dynamic-conv": "convolution",
}


def main(dtype: str, names: list[str]) -> None:
    path = FOLDER / f"ratios-{dtype}.json"
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]} if names else {}
    dense = {causal: _dense(getattr(torch, dtype), causal) for causal in (True, False)}
    for method in names or METHODS:
        command = [sys.executable, __file__, "--one", dtype, method]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            row = {"method": method, "error": done.stderr.strip().splitlines()[-1]}
        else:
            row = {"method": method, **_judged(method, json.loads(done.stdout), dense)}
        rows[method] = row
        print(_line(row), flush=True)
        write(path.stem, dense_seconds=dense, rows=list(rows.values()))


def _one(dtype: str, method: str) -> None:
    torch.set_num_threads(1)
    costs = speed.measure(
        Spec.parse(method), lengths=(*LENGTHS, LONGEST), patience=30, dtype=getattr(torch, dtype)
    )
    print(json.dumps([asdict(cost) for cost in costs]))


def _dense(dtype: torch.dtype, causal: bool) -> tuple[float, float]:
    """CPU seconds of one forward, and of forward and backward, at the longest."""
    torch.set_num_threads(1)
    q, k, v = torch.randn(3, 1, speed.HEADS, LONGEST, speed.HEAD_WIDTH).to(dtype).unbind()
    start = time.process_time()
    for t in (q, k, v):
        t.requires_grad_(True)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    forward = time.process_time() - start
    o.backward(torch.ones_like(o))
    return forward, time.process_time() - start


def _judged(method: str, costs: list[dict[str, Any]], dense: Any) -> dict[str, Any]:
    """Ratios at the longest filled in, and whether each target is met."""
    spec = Spec.parse(method)
    targets = dict(zip((4096, 16384, LONGEST), TARGETS[METHODS[method]], strict=True))
    met = []
    for cost in costs:
        if cost["length"] == LONGEST:
            whole = dense[speed.is_causal(spec)]
            cost["forward_ratio"] = cost["forward"] / whole[0]
            cost["training_ratio"] = cost["training"] / whole[1]
        if (target := targets.get(cost["length"])) is not None:
            cost["target"] = target
            met.append(cost["forward_ratio"] <= target[0] and cost["training_ratio"] <= target[1])
    return {"kind": METHODS[method], "met": all(met), "costs": costs}


def _line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{row['method']}: {row['error']}"
    cells = [
        f"{c['length']}: {c['forward_ratio']:.3f}/{c['training_ratio']:.3f}"
        + ("" if "target" not in c else f" ({c['target'][0]}/{c['target'][1]})")
        + ("" if c["memory_ratio"] is None else f" mem {c['memory_ratio']:.1f}")
        for c in row["costs"]
    ]
    return f"{row['method']} {'met' if row['met'] else 'missed'} · " + " · ".join(cells)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--one", dtype, method]:
            _one(dtype, method)
        case []:
            main("float32", [])
        case [dtype, *names]:
            main(dtype, names)
