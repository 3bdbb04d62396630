"""Axial Attention (Ho et al., 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.card import Card
from longspan.engines import given, grid
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

State = given.Past | None


@mechanism(
    Card(
        id="axial-attention",
        name="Axial Attention",
        kind="attention",
        family="sparse-pattern",
        paper="Axial Attention in Multidimensional Transformers",
        cite="Ho et al., 2019",
        link="https://arxiv.org/abs/1912.12180",
        what="A sequence is folded into rows, and every token sees its own row or its own column.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*D + L*S*D",
        memory="S*D + S*V",
        tiny={"columns": 6},
        exact={"columns": 1000000, "axis": 1},
    )
)
class AxialAttention(Attention):
    """o = Σ_axis softmax(q kᵀ / √D) v within the lines of each axis (Sec. 3.1).

    Tokens fill rows of `columns` in raster order; the last row may be short. Both axes summed cost
    O(L (columns + L / columns)); layers of one axis each, in turn, are the paper's stack
    (mixers=[{"id": "axial-attention", "axis": 1}, {"id": "axial-attention", "axis": 0}]). Causally
    earlier tokens of the row and of the column are seen. The state is every key and value; masked
    tokens are taken out before folding. Images, video and their model: `models.axial`.

    Args:
        axis: 0 for columns, 1 for rows, None for the sum of both.

    Raises:
        LongspanError: fewer than 1 column; an axis other than 0, 1 or None; more queries than keys.
    """

    def __init__(self, *, causal: bool = False, columns: int = 64, axis: int | None = None) -> None:
        super().__init__(causal=causal)
        if columns < 1 or axis not in (None, 0, 1):
            raise LongspanError(
                f"axial-attention got columns={columns}, axis={axis}: expected at least 1 column, "
                "and axis 0 (columns), 1 (rows) or None (both)."
            )
        self.columns, self.axes = columns, (0, 1) if axis is None else (axis,)

    def forward(
        self, q: Queries, k: Keys, v: Values, state: State = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, State]:
        carried = given.extended(state, k, v, keep) if self.causal else None
        if carried is not None and state is not None:
            k, v, keep = carried
        if q.shape[2] > k.shape[2] or (not self.causal and q.shape[2] != k.shape[2]):
            raise LongspanError(
                f"axial-attention got {q.shape[2]} queries for {k.shape[2]} keys: it folds one "
                "sequence and has no cross form."
            )
        if keep is None or bool(keep.all()):
            return self._fold(q, k, v), carried
        return grid.alone(self._fold, q, k, v, keep), carried

    def _fold(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        length, keys = q.shape[2], k.shape[2]
        if q.numel() == 0:
            return q.new_zeros(*q.shape[:3], v.shape[3])
        columns = min(self.columns, keys)
        row, lead = divmod(keys - length, columns)  # of the first query
        after = -keys % columns
        q = F.pad(q, (0, 0, lead, after)).unflatten(2, (-1, columns))
        k, v = (F.pad(t, (0, 0, 0, after)).unflatten(2, (-1, columns)) for t in (k, v))
        real = None
        if after and not self.causal:  # causally no real query sees what comes after the end
            real = (torch.arange(keys + after, device=q.device) < keys).unflatten(0, (-1, columns))
            real = real.expand(len(q), -1, -1)
        o = sum(
            grid.lines(
                q,
                k[:, :, row:] if axis else k,
                v[:, :, row:] if axis else v,
                axis,
                causal=self.causal,
                keep=real,
            )
            for axis in self.axes
        )
        assert isinstance(o, Tensor)
        return o.flatten(2, 3)[:, :, lead : lead + length]
