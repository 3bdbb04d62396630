"""Pictures of who attends to whom, for weights of any sign."""

import base64
from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.report.summary import Comparison, Row, figures, part, share

MOST_CELLS = 96


@dataclass(frozen=True)
class Picture:
    """Effective weights as signed bytes, row by row, and what they say in numbers."""

    label: str
    how: str
    rows: int
    columns: int
    cells: str
    length: int
    scale: float
    distance: float
    near: float
    first: float
    negative: float

    def describe(self) -> str:
        """What a reader who cannot see the picture needs of it."""
        signed = f" {share(self.negative)} of it is negative." if self.negative else ""
        return (
            f"Effective attention of {self.label} over {self.length} tokens ({self.how}): the mean "
            f"distance is {figures(self.distance)} tokens, {share(self.near)} of the weight lies "
            f"within the nearest eighth, {share(self.first)} on the first token.{signed}"
        )


def pictures(comparison: Comparison) -> list[Picture]:
    """One picture a mechanism that has weights, in the order of the summary."""
    found = (_picture(row) for row in comparison.ranked)
    return [picture for picture in found if picture is not None]


def _picture(row: Row) -> Picture | None:
    for record in row.done:
        weights = _matrix(part(record, "attention", "weights"))
        if weights is not None:
            how = str(part(record, "attention", "how") or "how is not recorded")
            return _draw(row.label, how, weights)
    return None


def _matrix(weights: Any) -> np.ndarray | None:
    if not isinstance(weights, list) or not weights or not isinstance(weights[0], list):
        return None
    if not weights[0] or any(len(line) != len(weights[0]) for line in weights):
        return None
    return np.nan_to_num(np.asarray(weights, dtype=np.float64), posinf=0.0, neginf=0.0)


def _draw(label: str, how: str, weights: np.ndarray) -> Picture:
    length, keys = weights.shape
    size = np.abs(weights)
    total = size.sum() or 1.0
    far = np.abs(np.arange(length)[:, None] + (keys - length) - np.arange(keys))
    small = _shrink(_shrink(weights, 0), 1)
    scale = float(np.abs(small).max())
    # The square root keeps weak, wide attention visible beside a strong diagonal.
    drawn = np.sign(small) * np.sqrt(np.abs(small) / (scale or 1.0))
    return Picture(
        label=label,
        how=how,
        rows=small.shape[0],
        columns=small.shape[1],
        cells=base64.b64encode(np.rint(127 * drawn).astype(np.int8).tobytes()).decode(),
        length=length,
        scale=scale,
        distance=float((size * far).sum() / total),
        near=float(size[far <= keys / 8].sum() / total),
        first=float(size[:, 0].sum() / total),
        negative=float(size[weights < 0].sum() / total),
    )


def _shrink(weights: np.ndarray, axis: int) -> np.ndarray:
    """At most `MOST_CELLS` cells along an axis, each the mean of those it stands for."""
    cells = min(MOST_CELLS, weights.shape[axis])
    return np.stack([p.mean(axis) for p in np.array_split(weights, cells, axis)], axis)
