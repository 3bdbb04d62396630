"""Luna (Ma et al., 2021): stacks that pass P from layer to layer beside the tokens."""

from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.mechanisms.low_rank.luna import Luna, Slots, StartingSlots
from longspan.models.heads import pool
from longspan.nn import FeedForward
from longspan.nn.positions import sinusoid
from longspan.shapes import Context, Inputs, Keep, Tokens

Source = Literal["x", "p", "both"]


class LunaLayer(nn.Module):
    """X_A = LN(Y_X + X), P_A = LN(Y_P + P), X' = LN(FFN(X_A) + X_A); P gets no feed-forward.

    Args:
        luna: attends to X, or in a decoder to the encoder's output.
        prefix: of a decoder, a causal Luna before it, which only reads P.
    """

    def __init__(
        self, luna: Luna, prefix: Luna | None = None, *, width: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.luna, self.prefix = luna, prefix
        self.prefix_norm = None if prefix is None else nn.LayerNorm(width)
        self.x_norm, self.p_norm, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.feed_forward = FeedForward(width, activation="relu", dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Inputs,
        p: Slots,
        state: Any = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        own_keep: Keep | None = None,
    ) -> tuple[Inputs, Float[Tensor, "B _ E"], Any]:
        """`keep` is of the context, where given, and `own_keep` then of x."""
        if self.prefix is not None and self.prefix_norm is not None:
            y, state = self.prefix.prefix(x, p, state, keep=own_keep)
            x = self.prefix_norm(x + self.dropout(y))
        y_x, y_p = self.luna.streams(x, p, keep=keep, context=context)
        x = self.x_norm(x + self.dropout(y_x))
        p = self.p_norm(p[:, : y_p.shape[1]] + self.dropout(y_p))
        return self.norm(x + self.dropout(self.feed_forward(x))), p, state


class LunaEncoder(nn.Module):
    """Embedded tokens and P through the layers.

    Args:
        slots: l. luna: further options of the mechanism.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        layers: int,
        slots: int = 16,
        dropout: float = 0.0,
        luna: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        self.slots = StartingSlots(slots, width)
        self.layers = nn.ModuleList(
            LunaLayer(Luna(width=width, slots=None, **(luna or {})), width=width, dropout=dropout)
            for _ in range(layers)
        )

    def forward(self, tokens: Tokens, *, keep: Keep | None = None) -> tuple[Inputs, Slots]:
        x, p = _placed(self.embed(tokens), keep), self.slots(len(tokens))
        for layer in self.layers:
            x, p, _ = layer(x, p, keep=keep)
        return x, p


class LunaForClassification(nn.Module):
    """Logits from the mean of X, of P, or of both side by side."""

    def __init__(self, encoder: LunaEncoder, *, classes: int, source: Source = "x") -> None:
        super().__init__()
        if source not in get_args(Source):
            raise LongspanError(f"luna classifies no '{source}'; expected x, p or both.")
        self.encoder, self.source = encoder, source
        width = encoder.embed.embedding_dim * (2 if source == "both" else 1)
        self.score = nn.Linear(width, classes)

    def forward(self, tokens: Tokens, *, keep: Keep | None = None) -> Float[Tensor, "B _"]:
        x, p = self.encoder(tokens, keep=keep)
        pooled = {"x": pool(x, keep, "mean"), "p": p.mean(1)}
        kinds = ("x", "p") if self.source == "both" else (self.source,)
        return self.score(torch.cat([pooled[kind] for kind in kinds], -1))


class LunaSeq2Seq(nn.Module):
    """An encoder, and a decoder whose P starts anew and is updated from the encoder's output.

    The decoder's layer reads P in its causal Luna, then updates X and P by a cross-attention.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        layers: int,
        slots: int = 16,
        dropout: float = 0.0,
        luna: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        own = luna or {}
        self.encoder = LunaEncoder(
            vocab_size=vocab_size, width=width, layers=layers, slots=slots, dropout=dropout,
            luna=own,
        )  # fmt: skip
        self.slots = StartingSlots(slots, width)
        self.layers = nn.ModuleList(
            LunaLayer(
                Luna(width=width, slots=None, **own),
                Luna(width=width, slots=None, causal=True, **own),
                width=width,
                dropout=dropout,
            )
            for _ in range(layers)
        )

    def forward(
        self, source: Tokens, target: Tensor, *, keep: Keep | None = None
    ) -> Float[Tensor, "B T _"]:
        """Logits of the token after each of `target`, B T; `keep` is of the source."""
        return self.decode(target, self.encoder(source, keep=keep)[0], keep=keep)[0]

    def decode(
        self, target: Tensor, encoded: Context, state: Any = None, *, keep: Keep | None = None
    ) -> tuple[Float[Tensor, "B T _"], Any]:
        """Logits, and the state with which the next tokens continue."""
        states, seen = state or ((None,) * len(self.layers), 0)
        x = _placed(self.encoder.embed(target), None, seen)
        p, carried = self.slots(len(target)), []
        for layer, old in zip(self.layers, states, strict=True):
            x, p, new = layer(x, p, old, context=encoded, keep=keep)
            carried.append(new)
        return F.linear(x, self.encoder.embed.weight), (tuple(carried), seen + target.shape[1])


def _placed(x: Tensor, keep: Tensor | None, seen: int = 0) -> Tensor:
    """√E x + PE, counting kept tokens."""
    place = seen + torch.arange(x.shape[1], device=x.device)[None]
    if keep is not None:
        place = (keep.cumsum(1) - 1).clamp(min=0)
    width = x.shape[-1]
    waves = sinusoid(place, width, layout="concatenated", spacing="inclusive")
    return x * width**0.5 + waves.to(x.dtype)
