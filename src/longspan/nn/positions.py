"""Position ids and the sinusoids that several positions are made of."""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longspan.errors import LongspanError
from longspan.nn.protocols import Position
from longspan.shapes import Keys, Queries

Layout = Literal["interleaved", "concatenated"]
Spacing = Literal["paper", "inclusive"]


def positions_from(
    keep: Bool[Tensor, "B L"], seen: Int[Tensor, "B"] | None = None
) -> Int[Tensor, "B L"]:
    """Positions that count kept tokens only; padding repeats the count before it, at least 0.

    Args:
        seen: how many kept tokens each row had in earlier calls.

    >>> positions_from(torch.tensor([[False, True, True]]))
    tensor([[0, 0, 1]])
    """
    count = keep.cumsum(-1) if seen is None else keep.cumsum(-1) + seen[:, None]
    return (count - 1).clamp(min=0)


def one_sequence(name: str, q: Queries, k: Keys) -> None:
    """Refuse other keys than those of the queries' own sequence, whose distances mean nothing."""
    if q.shape[2] != k.shape[2]:
        raise LongspanError(
            f"{name} attends within one sequence and got {q.shape[2]} queries for {k.shape[2]} "
            "keys, between which there is no distance: it has no cross form."
        )


class WithinReach(Position):
    """Another position's bias, and −inf from `reach` tokens back on.

    Args:
        reach, reach_eval: in training and in evaluation.
    """

    acts = frozenset({"bias"})

    def __init__(self, position: Position, reach: int, reach_eval: int) -> None:
        super().__init__()
        self.position, self.reach, self.reach_eval = position, reach, reach_eval

    def bias(self, q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        far = pos_q[:, None] - pos_k >= (self.reach if self.training else self.reach_eval)
        return self.position.bias(q, k, pos_q, pos_k).masked_fill(far, -math.inf)


def raster(pos: Int[Tensor, "*shape"], columns: int) -> Int[Tensor, "*shape 2"]:
    """(row, column) of row-major positions in a grid of `columns` columns."""
    return torch.stack([pos // columns, pos % columns], dim=-1)


def at_least_float32(x: Tensor) -> torch.dtype:
    """The dtype to compute angles and scores in for `x`."""
    return torch.promote_types(x.dtype, torch.float32)


def frequencies(
    width: int,
    *,
    base: float = 10000.0,
    spacing: Spacing = "paper",
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, "{width//2}"]:
    """base^(−2c/width), or with both ends included base^(−c/(width/2 − 1)), c = 0 … width//2 − 1.

    The first is that of the papers (Vaswani et al., RoFormer, Transformer-XL), the second that of
    tensor2tensor and fairseq; models trained with one do not run with the other.
    """
    plane = torch.arange(width // 2, dtype=dtype, device=device)
    whole = width / 2 if spacing == "paper" else max(width // 2 - 1, 1)
    return base ** (-plane / whole)


def sinusoid(
    pos: Int[Tensor, "*shape"],
    width: int,
    *,
    layout: Layout = "interleaved",
    spacing: Spacing = "paper",
    base: float = 10000.0,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*shape {width}"]:
    """sin and cos of pos · frequency, side by side or as two halves; an odd last channel is 0.

    Computed in `dtype`, which bfloat16 and float16 are too coarse for: cast the result.

    Raises:
        LongspanError: an unknown layout or spacing.
    """
    if layout not in ("interleaved", "concatenated"):
        raise LongspanError(f"no layout '{layout}'; expected interleaved or concatenated.")
    if spacing not in ("paper", "inclusive"):
        raise LongspanError(f"no frequency spacing '{spacing}'; expected paper or inclusive.")
    frequency = frequencies(width, base=base, spacing=spacing, dtype=dtype, device=pos.device)
    angles = pos[..., None].to(dtype) * frequency
    waves = angles.sin(), angles.cos()
    table = (
        torch.stack(waves, dim=-1).flatten(-2)
        if layout == "interleaved"
        else torch.cat(waves, dim=-1)
    )
    return torch.nn.functional.pad(table, (0, width % 2))
