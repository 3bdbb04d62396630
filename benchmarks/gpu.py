"""Scan and banded pattern on a GPU: time over the least that memory or matrix units allow.

`python benchmarks/gpu.py` on a machine with CUDA, Triton and longspan on its path; beside the
kernels of `longspan.engines.backends` it times bare flex_attention, SDPA, and fla where installed.
Writes `results/<GPU>.json`. Run nowhere yet.
"""

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.engines import backends, pattern, scan

BATCH, HEADS, WIDTH, WINDOW, ROUNDS = 1, 8, 64, 512, 20
LENGTHS = (4096, 16384, 65536, 262144)


def seconds(call: Callable[[], Any]) -> float:
    """The median of event-timed runs, after warming up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes and FLOPs a second of a large copy, and of a large matrix product."""
    big = torch.randn(2**30, device="cuda", dtype=dtype)
    target = torch.empty_like(big)
    moved = 2 * big.numel() * big.element_size() / seconds(lambda: target.copy_(big))
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    return moved, 2 * n**3 / seconds(lambda: a @ b)


def work(task: str, length: int, size: int) -> dict[str, tuple[float, float]]:
    """The fewest bytes, and the FLOPs, of forward and of forward with backward."""
    tokens = BATCH * HEADS * length
    flops = 4 * WIDTH * (WIDTH + 64) if task == "scan" else 4 * WIDTH * min(WINDOW, length)
    token = WIDTH * size * tokens  # one tensor read or written once
    return {"forward": (4 * token, flops * tokens), "both": (11 * token, 3.5 * flops * tokens)}


def opponents(task: str, length: int) -> dict[str, Callable[..., Tensor]]:
    """Each computes o from q, k, v."""
    if task == "scan":
        found: dict[str, Callable[..., Tensor]] = {
            "longspan": lambda q, k, v: scan.outer(q, k, v)[0]
        }
        if importlib.util.find_spec("fla") is not None:
            from longspan.engines.backends import fla

            def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                state = q.new_zeros(BATCH, HEADS, WIDTH, WIDTH, dtype=torch.float32)
                return fla.outer(q, k, v, state, None, q.dtype)[0]

            found["fla"] = theirs
        return found
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    window = pattern.Window(WINDOW - 1)
    found = {"longspan": lambda q, k, v: pattern.attend(q, k, v, window)}
    if length <= 65536:  # its mask is built from a matrix of all pairs
        mask = create_block_mask(
            lambda b, h, i, j: (i >= j) & (i - j < WINDOW), None, None, length, length, "cuda"
        )
        fused = torch.compile(flex_attention)
        found["flex_attention"] = lambda q, k, v: fused(q, k, v, block_mask=mask)
        found["SDPA, causal"] = lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, is_causal=True
        )
    return found


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device, and this machine has none.")
    name = torch.cuda.get_device_name().replace(" ", "-").lower()
    records = []
    for dtype in (torch.bfloat16, torch.float32):
        bandwidth, rate = ceilings(dtype)
        print(f"{name} {dtype}: {bandwidth / 1e12:.2f} TB/s, {rate / 1e12:.0f} TFLOP/s")
        for task in ("scan", "pattern"):
            for length in LENGTHS:
                shape = BATCH, HEADS, length, WIDTH
                inputs = [
                    torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)
                    for _ in range(3)
                ]
                kernel = backends.for_device(task, inputs[0], inputs[2])
                chosen = "plain" if kernel is None else kernel.__module__.rpartition(".")[2]
                toward = torch.randn(shape, device="cuda", dtype=dtype)
                for who, call in opponents(task, length).items():

                    def whole(call: Any = call, inputs: Any = inputs, do: Any = toward) -> None:
                        torch.autograd.grad(call(*inputs), inputs, do)

                    def forward(call: Any = call, inputs: Any = inputs) -> None:
                        with torch.no_grad():
                            call(*inputs)

                    for part, run in (("forward", forward), ("both", whole)):
                        moved, flops = work(task, length, dtype.itemsize)[part]
                        least, took = max(moved / bandwidth, flops / rate), seconds(run)
                        record = {
                            "task": task, "who": who, "kernel": chosen, "part": part,
                            "length": length, "dtype": str(dtype), "seconds": took,
                            "roofline": least / took,
                        }  # fmt: skip
                        records.append(record)
                        print(
                            f"{task:8} {who:15} {part:8} {length:7} "
                            f"{took * 1e3:9.3f} ms, {least / took:5.2f} of the ceiling"
                        )
    shape = {"batch": BATCH, "heads": HEADS, "width": WIDTH, "window": WINDOW}
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda}
    target = Path(__file__).parent / "results" / f"{name}.json"
    target.write_text(
        json.dumps({"machine": name, **versions, "shape": shape, "records": records}, indent=1)
        + "\n"
    )


if __name__ == "__main__":
    main()
