"""Where benchmarks put their figures: JSON with the machine and the versions, written whole."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import longspan

FOLDER = Path(__file__).parent / "results"


def write(name: str, **content: Any) -> Path:
    """`results/NAME.json`, replaced in one step."""
    target = FOLDER / f"{name}.json"
    text = json.dumps({"machine": machine(), **content}, indent=1)
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(text + "\n")
    unfinished.replace(target)
    return target


def machine() -> dict[str, Any]:
    """What the figures were taken on, and how busy it was."""
    return {
        "cpu": _model(),
        "cores": os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "torch": torch.__version__,
        "longspan": longspan.__version__,
    }


def _model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
