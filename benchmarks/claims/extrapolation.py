"""Trained at 256 bytes, read at up to 4,096: which positions hold beyond the trained length.

Press et al. (2022, Fig. 1) on a small scale: one tiny decoder for each position method, the same
steps on the default corpus, and held-out bits per byte in windows side by side. What a longer
window gives is context; where the curve rises, the positions did not extrapolate. Tables of
learned positions end at the trained length; they are tiled to the window's.
`python benchmarks/claims/extrapolation.py [METHOD …]` writes `results/extrapolation.json`, and the
figure to `runs/extrapolation.html`.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from longspan.bench.settings import Budget
from longspan.bench.train import Progress, train
from longspan.data import corpus, random_windows
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.models.evaluation import non_overlapping
from longspan.nn import Position
from longspan.report import plots

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write

TRAINED, LENGTHS = 256, (256, 512, 1024, 2048, 4096)
WIDTH, LAYERS, HEADS, BATCH, STEPS, RATE, HELD_OUT = 64, 2, 4, 8, 600, 3e-3, 32769

SOFTMAX = "multi-head-attention"
METHODS: dict[str, tuple[str, Any]] = {
    "none": (SOFTMAX, None),
    "sinusoidal-position": (SOFTMAX, "sinusoidal-position"),
    "learned-position": (SOFTMAX, "learned-position"),
    "per-layer-position": (SOFTMAX, "per-layer-position"),
    "shaw-relative-position": (SOFTMAX, "shaw-relative-position"),
    "transformer-xl-relative-position": (SOFTMAX, "transformer-xl-relative-position"),
    "rope": (SOFTMAX, "rope"),
    "alibi": (SOFTMAX, "alibi"),
    "da-transformer": ("da-transformer", None),
    "music-transformer": ("music-transformer", "sinusoidal-position"),
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in names or list(METHODS):
        rows.append({"method": name, **_measured(*METHODS[name])})
        print(rows[-1], flush=True)
        write(
            "extrapolation",
            trained=TRAINED,
            steps=STEPS,
            batch=BATCH,
            lengths=LENGTHS,
            held_out=HELD_OUT - 1,
            rows=rows,
        )
    target = Path("runs/extrapolation.html")
    target.parent.mkdir(exist_ok=True)
    _figure(rows).write_html(target)


def _measured(mixer: str, position: Any) -> dict[str, Any]:
    data = corpus()
    torch.manual_seed(0)
    config = LongspanConfig(
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        length=TRAINED,
        initializer_range=WIDTH**-0.5,  # embeddings as strong as sinusoids
        mixers=[mixer],
        position=position,
    )
    model = LongspanForCausalLM(config)
    parameters = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, torch.Tensor]:
        rows = random_windows(data.train, batch=BATCH, length=TRAINED, generator=generator)
        return {"input_ids": rows, "labels": rows}

    progress = Progress(Budget(tokens=STEPS * BATCH * TRAINED), BATCH * TRAINED)
    train(model, draw, progress, rate=RATE, seed=0, device="cpu")
    held_out = torch.from_numpy(data.valid[:HELD_OUT].astype(np.int64))
    bits = {}
    for length in LENGTHS:
        _lengthen(model, length)
        bits[length] = non_overlapping(model, held_out, window=length).bits_per_byte()
    return {"parameters": parameters, "seconds": progress.spent, "bits_per_byte": bits}


def _lengthen(model: torch.nn.Module, length: int) -> None:
    """Tile tables of learned positions that are shorter."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Position) and getattr(child, "length", length) < length:
                resize = getattr(child, "resize", None)
                if resize is not None:
                    setattr(module, name, resize(length))


def _figure(rows: list[dict[str, Any]]) -> go.Figure:
    figure = go.Figure(
        layout={
            "title": f"Trained at {TRAINED} bytes, read at up to {LENGTHS[-1]:,}",
            "xaxis": {"title": "bytes in the window", "type": "log", "tickvals": LENGTHS},
            "yaxis": {"title": "held-out bits per byte", "type": "log"},
            "template": "plotly_white",
        }
    )
    for i, row in enumerate(rows):
        figure.add_scatter(
            x=list(row["bits_per_byte"]),
            y=list(row["bits_per_byte"].values()),
            name=row["method"],
            mode="lines+markers",
            marker={"symbol": plots.SYMBOLS[i % len(plots.SYMBOLS)], "size": 8},
            line={"dash": plots.DASHES[i % len(plots.DASHES)]},
        )
    figure.add_vline(x=TRAINED, line={"dash": "dot", "width": 1})
    return figure


if __name__ == "__main__":
    main(sys.argv[1:])
