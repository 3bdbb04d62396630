"""Attention to the neighbourhoods of a grid, with a learned bias for every offset."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from longspan.engines import grid
from longspan.errors import LongspanError
from longspan.nn.protocols import Attention
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class Reach(NamedTuple):
    """The last keys and values that a later query can see, and which of them may be seen."""

    k: Float[Tensor, "B H C D"]
    v: Float[Tensor, "B H C V"]
    keep: Bool[Tensor, "B C"]


class NeighbourhoodAttention(Attention):
    """o_i = Σ_{j ∈ N(i)} softmax_j(q_i·k_j / √D + B[(j − i) / dilation]) v_j.

    N(i) is the product over axes of `window` keys i's residue class (`engines.grid.Axis`), shifted
    inward at borders. Tokens are the grid's cells in raster order. With one axis and no causality,
    masked tokens are taken out and the others stand as a sequence of their own; with more axes
    they stay where they are and are not seen. One causal axis streams: the state is the last
    (window − 1) · dilation keys and values.

    Args:
        window, dilation, causal: one for all axes, or one an axis. dilation `max` is
            ⌊length / window⌋, the largest at which a window fits.
        shape: of the grid, with at most one −1; needed from two axes on, here or in the call.
        heads: how many learn a bias; None for no bias.
        short: what to do with an axis shorter than window · dilation: see residue classes that
            are too short `whole` (as padding with masked cells would), or `refuse`.

    Raises:
        LongspanError: windows, dilations and shapes of different numbers of axes; what
            `grid.Axis` refuses; tokens that do not fill the shape; an axis too short to `refuse`.
    """

    def __init__(
        self,
        *,
        causal: bool | Sequence[bool] = False,
        window: int | Sequence[int] = 7,
        dilation: int | Literal["max"] | Sequence[int | Literal["max"]] = 1,
        shape: Sequence[int] | None = None,
        heads: int | None = None,
        short: Literal["whole", "refuse"] = "whole",
    ) -> None:
        def listed(value: object) -> list:
            return list(value) if isinstance(value, list | tuple) else [value]

        given = {"window": window, "dilation": dilation, "causal": causal}
        lists = {name: listed(value) for name, value in given.items()}
        counts = {len(each) for each in lists.values() if len(each) > 1}
        counts |= {len(shape)} if shape is not None else set()
        if len(counts) > 1:
            raise LongspanError(
                f"a neighbourhood got {', '.join(f'{n}={v}' for n, v in lists.items())} and "
                f"shape={shape}: give one of each, or one an axis."
            )
        axes = counts.pop() if counts else 1
        self.windows, dilations, causals = (
            each * (axes // len(each)) for each in (lists[n] for n in given)
        )
        super().__init__(causal=all(causals))
        self.causals: list[bool] = causals
        self.dilations: list[int | Literal["max"]] = dilations
        if short not in ("whole", "refuse"):
            raise LongspanError(f"short is {short!r}; expected whole or refuse.")
        if "max" in dilations and axes == 1 and self.causal:
            raise LongspanError(
                "a causal sequence grows, so it has no largest dilation: give a number."
            )
        self.shape, self.short = None if shape is None else tuple(shape), short
        for w, d, c in zip(self.windows, dilations, causals, strict=True):
            grid.Axis(w, 1 if d == "max" else d, c)  # refuses what no axis can have
        self.table = None
        if heads is not None:
            self.table = nn.Parameter(torch.empty(heads, *(2 * w - 1 for w in self.windows)))
            nn.init.trunc_normal_(self.table, std=0.02)

    def _axes(self, lengths: Sequence[int]) -> list[grid.Axis]:
        axes = []
        for w, d, c, n in zip(self.windows, self.dilations, self.causals, lengths, strict=True):
            step = grid.widest(w, n) if d == "max" else d
            if self.short == "refuse" and n < w * step:
                raise LongspanError(
                    f"an axis of {n} cells is shorter than window {w} × dilation {step}: use a "
                    "smaller window or dilation, or short='whole'."
                )
            axes.append(grid.Axis(w, step, c))
        return axes

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: Reach | None = None,
        *,
        keep: Keep | None = None,
        shape: Sequence[int] | None = None,
    ) -> tuple[Outputs, Reach | None]:
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        if len(self.windows) > 1:
            return self._grid(q, k, v, keep, shape), None
        if self.causal:
            return self._stream(q, k, v, state, keep)
        if q.shape[2] != k.shape[2]:
            raise LongspanError(
                f"a neighbourhood got {q.shape[2]} queries for {k.shape[2]} keys: it has no cross "
                "form."
            )
        if keep is None:
            return self._line(q, k, v, None), None
        return grid.alone(lambda q, k, v: self._line(q, k, v, None), q, k, v, keep), None

    def _line(self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None) -> Tensor:
        return grid.neighbours(q, k, v, self._axes([k.shape[2]]), table=self.table, keep=keep)

    def _stream(
        self, q: Tensor, k: Tensor, v: Tensor, state: Reach | None, keep: Keep | None
    ) -> tuple[Tensor, Reach]:
        seen = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            keep = seen = torch.cat([state.keep, seen], 1)
        o = self._line(q, k, v, keep)
        axis = self._axes([k.shape[2]])[0]
        start = max(k.shape[2] - axis.before * axis.dilation, 0)
        return o, Reach(k[:, :, start:], v[:, :, start:], seen[:, start:])

    def _grid(
        self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None, shape: Sequence[int] | None
    ) -> Tensor:
        shape = filled(self.shape if shape is None else shape, q.shape[2], len(self.windows))
        if q.shape[2] != k.shape[2]:
            raise LongspanError(
                f"a grid got {q.shape[2]} queries for {k.shape[2]} keys: give all of its cells."
            )
        q, k, v = (t.unflatten(2, shape) for t in (q, k, v))
        o = grid.neighbours(
            q,
            k,
            v,
            self._axes(shape),
            table=self.table,
            keep=None if keep is None else keep.unflatten(1, shape),
        )
        return o.flatten(2, -2)


def filled(shape: Sequence[int] | None, tokens: int, axes: int) -> tuple[int, ...]:
    """`shape` with its −1, if any, replaced so that it holds `tokens` cells.

    Raises:
        LongspanError: no shape, one of another number of axes, or one that cannot hold them.
    """
    if shape is None or len(shape) != axes:
        raise LongspanError(
            f"a grid of {axes} axes got shape={shape}: give {axes} lengths, one of them −1 if open."
        )
    known = math.prod(n for n in shape if n != -1)
    opened = sum(n == -1 for n in shape)
    if opened > 1 or known < 1 or tokens % known or (not opened and tokens != known):
        raise LongspanError(
            f"{tokens} tokens do not fill a grid of {tuple(shape)}: give its shape in the call."
        )
    return tuple(tokens // known if n == -1 else n for n in shape)
