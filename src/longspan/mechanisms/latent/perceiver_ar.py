"""Perceiver AR (Hawthorne et al., 2022)."""

from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Block, MultiHead, MultiHeadState, Position
from longspan.nn.positions import Spacing, at_least_float32, frequencies
from longspan.registry import build, mechanism
from longspan.shapes import Inputs, Keep

Made = Float[Tensor, "B N E"]


class PartlyRotary(Position):
    """Turns the first `channels` of every head, in halves; the others stay as they are."""

    acts = frozenset({"rotate"})

    def __init__(self, *, channels: int, base: float, spacing: Spacing) -> None:
        super().__init__()
        self.channels, self.base = channels, base
        self.spacing: Spacing = spacing

    def rotate(
        self, x: Float[Tensor, "B H L D"], pos: Int[Tensor, "L"] | Int[Tensor, "#B L"]
    ) -> Float[Tensor, "B H L D"]:
        dtype = at_least_float32(x)
        theta = frequencies(
            self.channels, base=self.base, spacing=self.spacing, dtype=dtype, device=x.device
        )
        angles = pos[..., None] * theta
        angles = angles if angles.dim() == 2 else angles[:, None]  # (L | B 1 L) planes
        a, b = x[..., : self.channels].to(dtype).chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
        return torch.cat([turned, x[..., self.channels :]], -1)


class SquaredReLU(nn.Module):
    """relu(x)²."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu().square()


def _feed(width: int, inner: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, inner), SquaredReLU(), nn.Linear(inner, width))


class Crossing(nn.Module):
    """z = X[−n:] + W_o softmax(q Kᵀ / √D) V, q of LN(X[−n:]), K and V of LN(X); z ← z + FFN(LN(z)).

    Query a stands at position S − n + a and sees the keys up to there.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        inner: int,
        position: Position,
        prefix_dropout: float,
        chunk: int | None,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        attention = (
            build("multi-head-attention", causal=True)
            if chunk is None
            else build("rabe-staats", causal=True, key_chunk=chunk)
        )
        self.mixer = MultiHead(attention, width=width, heads=heads)
        self.norm, self.source_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed_norm, self.feed = nn.LayerNorm(width), _feed(width, inner)
        self.position, self.prefix_dropout, self.generator = position, prefix_dropout, generator

    def forward(
        self, x: Inputs, count: int, state: MultiHeadState | None, keep: Keep | None
    ) -> tuple[Made, MultiHeadState]:
        """`count` latents of the new tokens x."""
        first = x.shape[1] - count
        seen = x.new_zeros(len(x), dtype=torch.long) if state is None else state.seen
        here = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        here = seen[:, None] + (here if keep is None else (keep.cumsum(1) - 1).clamp(min=0))
        source, queries = self.source_norm(x), self.norm(x[:, first:])
        q, k, v = (
            rearrange(self.mixer.project[n](t), "B L (H D) -> B H L D", H=self.mixer.heads)
            for n, t in (("q", queries), ("k", source), ("v", source))
        )
        q, k = self.position.rotate(q, here[:, first:]), self.position.rotate(k, here)
        # Positions count what is dropped, so this comes after them.
        open_ = self._open(x, first, keep)
        o, carried = self.mixer.attention(q, k, v, state and state.attention, keep=open_)
        z = x[:, first:] + self.mixer.output(rearrange(o, "B H L V -> B L (H V)"))
        z = z + self.feed(self.feed_norm(z))
        if keep is not None:
            z = z.masked_fill(~keep[:, first:, None], 0)
        new = x.shape[1] if keep is None else keep.sum(1)
        return z, MultiHeadState(carried, seen + new)

    def _open(self, x: Inputs, prefix: int, keep: Keep | None) -> Keep | None:
        """`keep`, and in training without the dropped positions of the prefix."""
        if not (self.training and self.prefix_dropout and prefix):
            return keep
        chance = torch.rand(x.shape[:2], generator=self.generator, device=x.device)
        stays = chance >= self.prefix_dropout
        stays[:, prefix:] = True
        return stays if keep is None else stays & keep


class ARState(NamedTuple):
    """All inputs and which of them count, both attentions' states, and the latents so far (B)."""

    x: Float[Tensor, "B S E"]
    keep: Bool[Tensor, "B S"]
    cross: MultiHeadState
    layers: tuple[Any, ...]
    count: Int[Tensor, "B"]


@mechanism(
    Card(
        id="perceiver-ar",
        name="Perceiver AR",
        kind="architecture",
        family="latent",
        paper="General-purpose, long-context autoregressive modeling with Perceiver AR",
        cite="Hawthorne et al., ICML 2022",
        link="https://arxiv.org/abs/2202.07765",
        what="The last tokens read the whole context once, and only they pass through the layers.",
        modes={"causal", "step"},
        time="S*M*E + S*E*E + M*M*E + M*E*E",
        memory="S*E + M*E",
    )
)
class PerceiverAR(nn.Module):
    """The last m inputs cross-attend causally to all S, then pass N causal layers (Sec. 3).

    Streaming, each new input becomes one more latent. When there are m, the next stride begins with
    `refill` of them, over the same context; refill = m recomputes the last m at every step. What is
    streamed equals `forward` of everything with as many latents. The model: `models.perceiver_ar`.

    Args:
        latents: m. layers: N.
        rotated: share of each head's channels that is rotated; base: the longest wavelength / 2π.
        spacing: of the rotary grid; the official code's has both ends.
        prefix_dropout: share of the inputs before the latents that is hidden in training.
        chunk: keys of the cross-attention met at once, for long contexts; None for all.
        generator: of the dropout.

    Raises:
        LongspanError: numbers out of their range.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 8,
        layers: int = 6,
        latents: int = 1024,
        refill: int | None = None,
        inner: int | None = None,
        rotated: float = 0.25,
        base: float = 8192.0,
        spacing: Spacing = "inclusive",
        prefix_dropout: float = 0.5,
        chunk: int | None = None,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        refill = max(latents // 2, 1) if refill is None else refill
        if not (1 <= refill <= latents and 0 <= rotated <= 1 and 0 <= prefix_dropout <= 1):
            raise LongspanError(
                f"perceiver-ar got latents={latents}, refill={refill}, rotated={rotated}, "
                f"prefix_dropout={prefix_dropout}: expected 1 ≤ refill ≤ latents and shares from "
                "0 to 1."
            )
        if width % heads:
            raise LongspanError(f"width {width} does not divide into {heads} heads.")
        self.latents, self.refill = latents, refill
        channels = int(width // heads * rotated) // 2 * 2
        position = PartlyRotary(channels=channels, base=base, spacing=spacing)
        inner = inner or 4 * width
        self.cross = Crossing(
            width=width,
            heads=heads,
            inner=inner,
            position=position,
            prefix_dropout=prefix_dropout,
            chunk=chunk,
            generator=generator,
        )
        self.layers = nn.ModuleList(
            Block(
                MultiHead(
                    build("multi-head-attention", causal=True),
                    width=width,
                    heads=heads,
                    position=position,
                ),
                _feed(width, inner),
                width=width,
                dropout=dropout,
            )
            for _ in range(layers)
        )

    def forward(
        self,
        x: Inputs,
        state: ARState | None = None,
        *,
        keep: Keep | None = None,
        latents: int | None = None,
    ) -> tuple[Made, ARState]:
        """The last latents' outputs, at most as many as there are new inputs, and the state.

        Args:
            keep: padding has to stand before the kept inputs of a row, or latents are lost to it.
            latents: how many, at most m, in place of m, or after a state in place of `refill`.

        Raises:
            LongspanError: a number of latents that is not within 1 and m.
        """
        if latents is not None and not 1 <= latents <= self.latents:
            raise LongspanError(
                f"{latents} latents were asked for and the model was built for {self.latents}: "
                "give 1 to that many."
            )
        x = x if keep is None else x.masked_fill(~keep[..., None], 0)
        new = x.shape[1]
        seen = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        if state is None:
            count = min(latents or self.latents, new)
            z, cross, layers = self._run(x, count, None, (None,) * len(self.layers), keep)
            return z, ARState(
                x, seen, cross, layers, seen.new_full((len(x),), count, dtype=torch.long)
            )
        whole, kept = torch.cat([state.x, x], 1), torch.cat([state.keep, seen], 1)
        count = int(state.count.max()) + new
        if count <= self.latents:
            z, cross, layers = self._run(x, new, state.cross, state.layers, keep)
        else:
            count = min(max(latents or self.refill, new), self.latents)
            z, cross, layers = self._run(whole, count, None, (None,) * len(self.layers), kept)
        return z[:, -new:], ARState(whole, kept, cross, layers, torch.full_like(state.count, count))

    def _run(
        self,
        x: Inputs,
        count: int,
        cross: MultiHeadState | None,
        states: tuple[Any, ...],
        keep: Keep | None,
    ) -> tuple[Made, MultiHeadState, tuple[Any, ...]]:
        z, after = self.cross(x, count, cross, keep)
        keep = None if keep is None else keep[:, x.shape[1] - count :]
        carried = []
        for layer, state in zip(self.layers, states, strict=True):
            z, state = layer(z, state, keep=keep)
            carried.append(state)
        return z, after, tuple(carried)
