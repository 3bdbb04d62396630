"""Attention beside a convolution of its values."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from longspan.engines import lowrank
from longspan.errors import LongspanError
from longspan.nn.protocols import Attention
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class ValueConvolution(Attention):
    """o = attend(q, k, v) + conv(v), a depthwise convolution with a kernel a head; no state.

    Args:
        kernel: its odd width; None for none. heads: needed with one.

    Raises:
        LongspanError: an even kernel or one without heads; other queries than keys, or heads.
    """

    def __init__(self, *, causal: bool, kernel: int | None, heads: int | None) -> None:
        super().__init__(causal=causal)
        self.weight = None
        if kernel is not None:
            if heads is None or kernel % 2 == 0:
                raise LongspanError(
                    f"{type(self).__name__} got kernel={kernel}, heads={heads}: its convolution "
                    "needs an odd kernel and the number of heads."
                )
            self.weight = nn.Parameter(torch.empty(heads, kernel))
            nn.init.uniform_(self.weight, -(kernel**-0.5), kernel**-0.5)  # as nn.Conv2d does

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, keep: Keep | None) -> Tensor:
        """The outputs without the convolution; k and v are 0 where masked."""

    def forward(
        self, q: Queries, k: Keys, v: Values, state: None = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, None]:
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        o = self.attend(q, k, v, keep)
        if self.weight is None:
            return o, None
        if q.shape[2] != k.shape[2] or q.shape[1] != len(self.weight):
            raise LongspanError(
                f"{type(self).__name__}'s convolution adds values to queries, one kernel a head, "
                f"and got {q.shape[2]} queries, {k.shape[2]} keys and {q.shape[1]} heads: build it "
                f"with kernel=None or heads={q.shape[1]}."
            )
        return o + lowrank.depthwise(v, self.weight), None
