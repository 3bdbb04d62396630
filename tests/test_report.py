"""The report: what it recommends, what it says of itself, and that a browser opens it."""

import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from longspan import report
from longspan.report import page
from longspan.report.attention import pictures
from longspan.report.plots import figures, looks
from longspan.report.summary import columns, fit, gather

Records = list[dict[str, Any]]
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DENSE = "multi-head-attention"
CHROMIUM = Path("/usr/bin/chromium")


def record(
    id: str,
    *,
    seed: int = 0,
    family: str = "kernel",
    bits: float = 2.4,
    speed: float = 20_000.0,
    exponent: float = 1.0,
    state: int = 40_000,
    recall: float = 0.9,
    causality: str = "strict",
    fails: tuple[str, ...] = (),
    signed: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A whole record, of the form that `longspan compare` appends."""
    grows = id == DENSE
    span = 256
    rate = random.Random(id)
    weights = [
        [
            0.0 if j > i else (math.cos(j) if signed else 1.0) / (1 + abs(i - j)) ** (0.5 + bits % 1)
            for j in range(48)
        ]
        for i in range(48)
    ]
    laws = ("streaming_equals_whole", "no_peeking", "gradients_reach_all", "padding_changes_nothing")
    return {
        "id": id,
        "seed": seed,
        "status": "done",
        "reason": None,
        "card": {
            "id": id,
            "name": id.replace("-", " ").title(),
            "family": family,
            "link": "https://arxiv.org/abs/1706.03762",
            "causality": causality,
        },
        "arguments": {},
        "parameters": 1_200_000,
        "flops_per_token": 7e6,
        "settings": {
            "length": 2048,
            "match": "params",
            "budget": "2m",
            "batch": 2,
            "digest": "a1",
            "data": {
                "name": "stdlib",
                "sha256": "9f" * 32,
                "source": "the Python standard library",
                "train_bytes": 12_000_000,
                "valid_bytes": 600_000,
            },
        },
        "commit": "96490f3",
        "machine": {
            "name": "bench-1",
            "cpu": "AMD EPYC 9B14",
            "cores": 2,
            "torch": "2.13.0",
            "device": "cpu",
        },
        "version": "0.1.0",
        "seconds": 184.0,
        "quality": {
            "bits_per_byte": bits,
            "by_position": [
                {"from": a, "to": a + span, "bits_per_byte": bits + 0.8 / (1 + a / 200)}
                for a in range(0, 2048, span)
            ],
            "recall": recall,
            "steps": 700,
            "tokens": 2_800_000,
            "curve": [
                {"tokens": n * 280_000, "bits_per_byte": bits + 2.5 / n**1.2} for n in range(1, 11)
            ],
        },
        "speed": {
            "train_tokens_per_second": speed,
            "prefill": [
                {
                    "length": n,
                    "seconds": 0.4 / speed * n**exponent * 2048 ** (1 - exponent)
                    * rate.uniform(0.98, 1.02),
                    "tokens_per_second": 1.0,
                }
                for n in LENGTHS
            ],
            "step": [{"length": n, "seconds": 1e-3 * (1 + grows * n / 2000)} for n in LENGTHS],
        },
        "memory": {
            "peak_bytes": int(6e8 + 4e4 * bits * state**0.6),
            "state": [{"length": n, "bytes": n * 2048 if grows else state} for n in LENGTHS],
        },
        "crossover": {"length": None, "beyond": None} if grows else {"length": 1240, "beyond": None},
        "attention": {"weights": weights, "how": "Jacobian norms" if signed else "one-hot values"},
        "certificate": [
            {
                "law": law,
                "result": "fail" if law in fails else "pass",
                "reason": "differs by 0.31" if law in fails else None,
            }
            for law in laws
        ],
        **more,
    }  # fmt: skip


def stopped(id: str, status: str, reason: str) -> dict[str, Any]:
    """A row that has no figures, with only what is known before it starts."""
    whole = record(id)
    known = {name: whole[name] for name in ("id", "seed", "card", "arguments", "settings")}
    return {**known, "status": status, "reason": reason}


def six() -> Records:
    return [
        record(DENSE, family="dense", bits=2.301, speed=14_000.0, exponent=1.97),
        record("longformer", family="sparse-pattern", bits=2.318, speed=19_500.0, exponent=1.04),
        record(
            "linear-transformer", bits=2.512, speed=31_000.0, state=66_000, recall=0.35, signed=True
        ),
        record("s4", family="state-space", bits=2.44, speed=24_000.0, state=16_000, recall=0.2),
        stopped("reformer", "refused", "'reformer' can see the future: pass --allow-leaks."),
        stopped("luna", "failed", "out of memory <script>alert(1)</script> at 16,384 tokens"),
    ]


def fifty() -> Records:
    chance = random.Random(0)
    families = ("kernel", "low-rank", "sparse-pattern", "sparse-content", "state-space",
                "convolution", "recurrent-memory", "hierarchical", "latent")  # fmt: skip
    made = [record(DENSE, family="dense", bits=2.3, speed=14_000.0, exponent=1.97)]
    for i in range(49):
        made.append(
            record(
                f"mechanism-{i:02}",
                family=families[i % len(families)],
                bits=2.3 + abs(chance.gauss(0, 0.2)),
                speed=chance.uniform(6_000, 40_000),
                exponent=chance.uniform(0.95, 1.4),
                state=int(10 ** chance.uniform(3, 6.3)),
                recall=chance.random(),
                fails=("no_peeking",) if i % 17 == 4 else (),
            )
        )
    return made
