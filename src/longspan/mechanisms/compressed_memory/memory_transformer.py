"""Memory Transformer: MemTransformer, MemCtrl, MemBottleneck (Burtsev & Sapunov, 2020)."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import FeedForward, MultiHead
from longspan.registry import build, mechanism
from longspan.shapes import Inputs, Keep

Variant = Literal["transformer", "control", "bottleneck"]
Slots = Float[Tensor, "B M E"]
FEED_FORWARD: Literal["relu"] = "relu"


class SubLayers(nn.Module):
    """H = LN(X + MultiHead(X, context)), X' = LN(H + FFN(H))."""

    def __init__(
        self, *, width: int, heads: int, inner: int | None, dropout: float, feeds: bool
    ) -> None:
        super().__init__()
        self.mixer = MultiHead(build("multi-head-attention"), width=width, heads=heads)
        self.mixer_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.feed_forward = self.feed_forward_norm = None
        if feeds:
            self.feed_forward = FeedForward(
                width, inner=inner, activation=FEED_FORWARD, dropout=dropout
            )
            self.feed_forward_norm = nn.LayerNorm(width)

    def forward(self, x: Inputs, context: Float[Tensor, "B S E"], keep: Keep | None) -> Inputs:
        x = self.mixer_norm(x + self.dropout(self.mixer(x, context=context, keep=keep)[0]))
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))


class MemoryLayer(nn.Module):
    """One layer of memory and sequence, each with what its variant lets it read (Fig. 1).

    transformer: both read [M ; X] through the same sub-layers. control: through sub-layers of
    their own. bottleneck: M reads [M ; X], then X reads the updated M alone.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        variant: Variant = "transformer",
        inner: int | None = None,
        dropout: float = 0.0,
        feeds: bool = True,
    ) -> None:
        super().__init__()
        self.variant = variant
        sizes = {"width": width, "heads": heads, "inner": inner, "dropout": dropout, "feeds": feeds}
        self.of_tokens = SubLayers(**sizes)
        self.of_memory = None if variant == "transformer" else SubLayers(**sizes)

    def forward(
        self, x: Inputs, memory: Slots, *, keep: Keep | None = None
    ) -> tuple[Inputs, Slots]:
        """`keep` is of x; memory is never masked."""
        slots = memory.shape[1]
        whole = torch.cat([memory, x], 1)
        if keep is not None:
            keep = torch.cat([keep.new_ones(len(keep), slots), keep], 1)
        if self.of_memory is None:
            whole = self.of_tokens(whole, whole, keep)
            return whole[:, slots:], whole[:, :slots]
        updated = self.of_memory(memory, whole, keep) if slots else memory
        if self.variant == "control":
            return self.of_tokens(x, whole, keep), updated
        return self.of_tokens(x, updated, None), updated


@mechanism(
    Card(
        id="memory-transformer",
        name="Memory Transformer",
        kind="architecture",
        family="compressed-memory",
        paper="Memory Transformer",
        cite="Burtsev & Sapunov, 2020",
        link="https://arxiv.org/abs/2006.11527",
        what="Gives an encoder a few learned memory tokens before the sequence, as a global "
        "scratch pad or as its only way from token to token.",
        modes={"bidirectional"},
        time="L*S*E + L*M*E + L*E*E",
        memory="M*E",
    )
)
class MemoryEncoder(nn.Module):
    """m learned vectors and the sequence through the layers: (X, M), apart (Sec. 3).

    Positions are the caller's, added to x alone. Masked outputs are 0. The bottleneck costs
    O((L m + m²) E) and needs a slot.

    Args:
        slots: m. variant: `transformer`, `control` or `bottleneck`.
        feeds: False leaves the feed-forwards out.

    Raises:
        LongspanError: a negative m, a bottleneck of none, or an unknown variant.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        layers: int = 4,
        slots: int = 10,
        variant: Variant = "transformer",
        inner: int | None = None,
        dropout: float = 0.0,
        feeds: bool = True,
    ) -> None:
        super().__init__()
        if variant not in get_args(Variant) or slots < (variant == "bottleneck"):
            raise LongspanError(
                f"memory-transformer got variant={variant!r}, slots={slots}: expected one of "
                f"{', '.join(get_args(Variant))}, and 0 slots or more, 1 or more in a bottleneck."
            )
        self.slots = nn.Parameter(torch.randn(slots, width) * 0.02) if slots else None
        self.layers = nn.ModuleList(
            MemoryLayer(
                width=width, heads=heads, variant=variant, inner=inner, dropout=dropout, feeds=feeds
            )
            for _ in range(layers)
        )

    def forward(self, x: Inputs, *, keep: Keep | None = None) -> tuple[Inputs, Slots]:
        memory = x[:, :0] if self.slots is None else self.slots.expand(len(x), -1, -1)
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        for layer in self.layers:
            x, memory = layer(x, memory, keep=keep)
        return x if keep is None else x.masked_fill(~keep[..., None], 0), memory
