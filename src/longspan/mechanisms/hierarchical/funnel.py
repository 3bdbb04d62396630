"""Funnel-Transformer (Dai et al., 2020): strided pooling with the first token kept apart."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn.lengths import Length, Shorter, ShorterKeep
from longspan.nn.pooled import Pooling, pooled
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep


class Plan(NamedTuple):
    """Which groups, and which tokens, may be seen."""

    groups: Keep | None
    keep: Keep | None


@mechanism(
    Card(
        id="funnel",
        name="Funnel-Transformer",
        kind="length",
        family="hierarchical",
        paper="Funnel-Transformer: Filtering out Sequential Redundancy for Efficient Language "
        "Processing",
        cite="Dai et al., 2020",
        link="https://arxiv.org/abs/2006.03236",
        what="Blocks of layers halve the sequence by pooling their queries; a decoder repeats the "
        "result to full length.",
        modes={"bidirectional"},
        time="L*S*E + L*E*E",
        memory="L*E",
        tiny={"factor": 2},
        exact={"factor": 1},
        grain=2,
    )
)
class Funnel(Length):
    """h' = Pool(h) in windows of s tokens, s apart; lengthening repeats s times (Sec. 2.2 and 2.3).

    With `apart`, [CLS] stands s times in front, so that it pools to itself, and, with `truncate`,
    s − 1 tokens at the end are dropped for it. A group may be seen only if all its tokens may be.
    What is masked comes out as 0 (the official code pools padding like content, and its decoder
    repeats states of groups that end in padding); padding changes nothing where a row's tokens are
    a multiple of s at every pooling. The model, with its attention: `models.funnel`.

    Args:
        factor: s, for a decoder 2^{M − 1} at once.

    Raises:
        LongspanError: a factor below 1, an unknown pooling.
    """

    def __init__(
        self,
        *,
        factor: int = 2,
        pooling: Pooling = "mean",
        apart: bool = True,
        truncate: bool = True,
    ) -> None:
        super().__init__(factor=factor, causal=False)
        if pooling not in ("mean", "max"):
            raise LongspanError(f"no pooling '{pooling}'; expected mean or max.")
        self.pooling: Pooling = pooling
        self.apart, self.truncate = apart, truncate

    def shorten(
        self, x: Inputs, state: None = None, *, keep: Keep | None = None
    ) -> tuple[Shorter, ShorterKeep | None, Plan]:
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        y, has = pooled(x, self.picks(x.shape[1], x.device), keep, how=self.pooling)
        return y, has, Plan(has, keep)

    def picks(self, length: int, device: torch.device) -> Int[Tensor, "N C"]:
        """The tokens of each group; those of the last may lie behind the end."""
        factor = self.factor
        twice = factor - 1 if self.apart else 0
        whole = length + twice - (min(factor, length) - 1 if self.apart and self.truncate else 0)
        count = -(-whole // factor)
        index = (torch.arange(count * factor, device=device) - twice).clamp(min=0)
        index[whole:] = length
        return index.view(count, factor)

    def lengthen(self, y: Shorter, x: Inputs, plan: Plan) -> tuple[Inputs, None]:
        if plan.groups is not None:
            y = y.masked_fill(~plan.groups[..., None], 0)
        head = min(int(self.apart), y.shape[1])
        u = torch.cat([y[:, :head], y[:, head:].repeat_interleave(self.factor, 1)], 1)
        u = F.pad(u, (0, 0, 0, x.shape[1] - u.shape[1]))  # or cuts
        return u if plan.keep is None else u.masked_fill(~plan.keep[..., None], 0), None
