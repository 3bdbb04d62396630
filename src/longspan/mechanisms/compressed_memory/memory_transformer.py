"""Memory Transformer: MemTransformer, MemCtrl, MemBottleneck (Burtsev & Sapunov, 2020)."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Block, FeedForward, MultiHead
from longspan.registry import build, mechanism
from longspan.shapes import Inputs, Keep

Variant = Literal["transformer", "control", "bottleneck"]
Slots = Float[Tensor, "B M E"]


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
    """m learned vectors M and the sequence X through post-norm layers: (X, M), apart (Fig. 1).

    transformer: both read [M ; X] through the same sub-layers. control: through sub-layers of
    their own. bottleneck: M reads [M ; X], then X reads the updated M alone, which costs
    O((L m + m²) E) and needs a slot. Positions are the caller's, added to x alone. Masked outputs
    are 0.

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
        self.variant = variant
        self.slots = nn.Parameter(torch.randn(slots, width) * 0.02) if slots else None

        def block() -> Block:
            mixer = MultiHead(build("multi-head-attention"), width=width, heads=heads)
            feed = {"inner": inner, "activation": "relu", "dropout": dropout}
            feed_forward = FeedForward(width, **feed) if feeds else None
            return Block(mixer, feed_forward, width=width, order="post", dropout=dropout)

        names = ("of_tokens",) if variant == "transformer" else ("of_tokens", "of_memory")
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: block() for n in names}) for _ in range(layers)
        )

    def forward(self, x: Inputs, *, keep: Keep | None = None) -> tuple[Inputs, Slots]:
        memory = x[:, :0] if self.slots is None else self.slots.expand(len(x), -1, -1)
        count, hidden = memory.shape[1], None if keep is None else ~keep[..., None]
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
            keep = torch.cat([keep.new_ones(len(keep), count), keep], 1)
        for layer in self.layers:
            whole = torch.cat([memory, x], 1)
            if self.variant == "transformer":
                whole, _ = layer.get_submodule("of_tokens")(whole, context=whole, keep=keep)
                memory, x = whole[:, :count], whole[:, count:]
                continue
            if count:
                memory, _ = layer.get_submodule("of_memory")(memory, context=whole, keep=keep)
            read = (memory, None) if self.variant == "bottleneck" else (whole, keep)
            x, _ = layer.get_submodule("of_tokens")(x, context=read[0], keep=read[1])
        return x if hidden is None else x.masked_fill(hidden, 0), memory
