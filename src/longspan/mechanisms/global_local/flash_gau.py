"""FLASH: gated attention units over mixed chunks (Hua et al., 2022)."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import average, chunked, scan
from longspan.errors import LongspanError
from longspan.nn import Mixer, Position
from longspan.nn.positions import frequencies
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks

Form = Literal["mixed", "quadratic"]
Activation = Literal["relu2", "softmax", "laplace"]
Bias = Literal["t5", "rotary"]


@mechanism(
    Card(
        id="flash-gau",
        name="FLASH (gated attention unit, mixed chunk attention)",
        kind="mixer",
        family="global-local",
        paper="Transformer Quality in Linear Time",
        cite="Hua et al., 2022",
        link="https://arxiv.org/abs/2202.10447",
        what="One unit in place of attention and feed-forward: gated values, mixed by squared ReLU "
        "scores within a chunk and linear attention beyond it.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*E + L*M*E + L*E*E",
        memory="C*M + C*E + M*E",
        tiny={"width": 24, "chunk": 4, "shared": 8},
    )
)
class FlashGau(Mixer):
    """y = (U ∘ (A V)) W_o, U = silu(x W_u), V = silu(x W_v), Z = silu(x W_z) (Eqs. 3 to 5).

    `quadratic`: A = relu²(Q Kᵀ / T + b), Q and K = Z ∘ γ + β (FLASH-Quad). `mixed`: that within
    chunks of C tokens, divided by C, and beyond them Q' K'ᵀ / T over all tokens, or causally
    Q' K'ᵀ / C over the chunks before the token's own (Eqs. 7 to 9). T is `length`, or the tokens
    there are; causally then those so far. Chunks count kept tokens. The state is the unfinished
    chunk's K, K' and V and the sum over the others; of `quadratic`, all K and V.

    Args:
        expansion: e / E. shared: s, the width of Z.
        activation: of scores; `softmax` divides them by √s.
        bias: b of the distance: T5's buckets, or a product of learned vectors turned by it.
        position: rotates Q, K, Q' and K'.
        norm: the unit's own, in place of the block's: `layer`, or `scale`, x √E / ‖x‖ · g.
        divide: what divides the part beyond the chunk; by default as above.

    Raises:
        LongspanError: unknown options, sizes below 1, a context or marks.
    """

    def __init__(
        self,
        *,
        width: int,
        causal: bool = False,
        form: Form = "mixed",
        chunk: int = 256,
        expansion: int = 2,
        shared: int = 128,
        activation: Activation = "relu2",
        bias: Bias | None = "t5",
        position: Position | None = None,
        norm: Literal["layer", "scale"] | None = None,
        length: int | None = None,
        divide: Literal["length", "chunk"] | None = None,
    ) -> None:
        super().__init__()
        options = {"form": (form, Form), "activation": (activation, Activation)}
        for name, (value, known) in (options | {"bias": (bias or "t5", Bias)}).items():
            if value not in get_args(known):
                expected = ", ".join(get_args(known))
                raise LongspanError(f"flash-gau has no {name} '{value}'; expected {expected}.")
        if min(chunk, expansion, shared, length or 1) < 1 or shared % 2:
            raise LongspanError(
                f"flash-gau got chunk={chunk}, expansion={expansion}, shared={shared}, "
                f"length={length}: expected at least 1, and shared even."
            )
        if norm not in (None, "layer", "scale") or divide not in (None, "length", "chunk"):
            raise LongspanError(
                f"flash-gau got norm={norm!r}, divide={divide!r}: expected layer, scale or None, "
                "and length, chunk or None."
            )
        self.causal, self.length, self.position = causal, length, position
        self.chunk = chunk if form == "mixed" else None
        self.divide = divide or ("chunk" if causal else "length")
        self.shared, self.inner, self.activation = shared, expansion * width, activation
        self.own_norm = norm
        norms = {None: nn.Identity, "layer": nn.LayerNorm, "scale": ScaleNorm}
        self.norm = norms[norm](width)
        self.up = nn.Linear(width, 2 * self.inner + shared)
        self.output = nn.Linear(self.inner, width)
        views = 4 if form == "mixed" else 2
        self.gamma = nn.Parameter(torch.randn(views, shared) * 0.02)
        self.beta = nn.Parameter(torch.zeros(views, shared))
        biases = {"t5": Buckets(causal), "rotary": Turned(shared)}
        self.bias = None if bias is None else biases[bias]

    def take_norm(self, norm: nn.Module) -> nn.Module:
        return norm if self.own_norm is None else nn.Identity()

    def forward(
        self,
        x: Inputs,
        state: chunked.Unfinished | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, chunked.Unfinished | None]:
        average.refuse_others("flash-gau", context, marks)
        if state is not None and not self.causal:
            raise LongspanError("flash-gau got a state: build it causal=True to carry one.")
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        sizes = self.inner, self.inner, self.shared
        u, v, z = F.silu(self.up(self.norm(x))).split(sizes, -1)
        kept = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        seen = kept.new_zeros(len(x), dtype=torch.long) if state is None else state.seen
        place = (seen[:, None] + kept.cumsum(1) - 1).clamp(min=0)
        views = (z[:, None] * self.gamma[:, None] + self.beta[:, None]).to(x.dtype)  # B 4 L s
        if self.position is not None:
            views = self.position.rotate(views, place)
        views = self._divided(views, place, kept)
        tokens = torch.cat([views.transpose(1, 2).flatten(2), v], -1)
        if state is None and keep is None:
            mixed, state = self._mix(tokens, None, None, seen + x.shape[1])
        else:
            mixed, state = self._aligned(tokens, kept, state)
        y = self.output(u * mixed)
        return (y if keep is None else y.masked_fill(~keep[..., None], 0)), state

    def _divided(
        self,
        views: Float[Tensor, "B W L D"],
        place: Int[Tensor, "B L"],
        kept: Bool[Tensor, "B L"],
    ) -> Float[Tensor, "B W L D"]:
        """The views, Q, Q', K and K' or Q and K, with what divides the scores taken into Q, Q'."""
        count = place + 1 if self.causal else kept.sum(1, keepdim=True).clamp(min=1)
        tokens: Tensor | int = self.length or count[..., None]
        near = self.chunk or tokens
        q = views[:, 0] / (self.shared**0.5 if self.activation == "softmax" else near)
        if self.chunk is None:
            return torch.stack([q, views[:, 1]], 1)
        far = views[:, 1] / (self.chunk if self.divide == "chunk" else tokens)
        return torch.cat([torch.stack([q, far], 1), views[:, 2:]], 1)

    def _aligned(
        self, tokens: Tensor, kept: Tensor, state: chunked.Unfinished | None
    ) -> tuple[Tensor, chunked.Unfinished | None]:
        """Each row's unfinished chunk, its new tokens that are kept, and those that are not."""
        length, queries = tokens.shape[1], self.gamma.numel() // 2
        total = new = kept.sum(1)
        if state is not None:
            held = state.seen % self.chunk if self.chunk else state.seen
            there = torch.arange(state.tokens.shape[1], device=held.device) < held[:, None]
            tokens = torch.cat([F.pad(state.tokens, (queries, 0)), tokens], 1)
            kept, total = torch.cat([there, kept], 1), state.seen + new
        order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)
        inside = torch.arange(tokens.shape[1], device=order.device) < kept.sum(1)[:, None]
        aligned = average.reordered(tokens[:, None], order)[:, 0].masked_fill(~inside[..., None], 0)
        if state is not None and length == 1:
            return self._step(tokens[:, -1:, :queries], aligned, inside, state, total)
        mixed, after = self._mix(aligned, inside, state and state.sums, total)
        back = order.argsort(dim=1)[:, tokens.shape[1] - length :]
        return average.reordered(mixed[:, None], back)[:, 0], after

    def _mix(
        self, tokens: Tensor, inside: Tensor | None, sums: Tensor | None, total: Tensor
    ) -> tuple[Tensor, chunked.Unfinished | None]:
        """A V of tokens that start with a chunk; `total` are seen, earlier calls' included."""
        parts, v = self._split(tokens)
        chunk, half = self.chunk or max(tokens.shape[1], 1), len(parts) // 2
        o = chunked.within(
            parts[0], parts[half], v, inside, self._bias(chunk, tokens), self._weigh,
            chunk=chunk, causal=self.causal,
        )  # fmt: skip
        rest = total if inside is None else inside.sum(1)
        finished = rest // chunk * chunk if self.chunk else torch.zeros_like(rest)
        if self.chunk and self.causal:
            # No later chunk of this call sees the unfinished one, and the next call must not.
            done = torch.arange(tokens.shape[1], device=v.device) < finished[:, None]
            far = parts[3].masked_fill(~done[..., None], 0)
            beyond, sums = chunked.before(parts[1], far, v, sums, chunk=chunk)
            o = o + beyond
        elif self.chunk:
            o = o + scan.total(*(t[:, None] for t in (parts[1], parts[3], v)))[:, 0]
        if not self.causal:
            return o, None
        if sums is None:
            sums = v.new_zeros(len(v), 0, 0)
        reach = chunk - 1 if self.chunk else tokens.shape[1]
        return o, chunked.Unfinished(self._held(tokens, finished, rest, reach), sums, total)

    def _step(
        self,
        q: Tensor,
        tokens: Tensor,
        inside: Tensor,
        state: chunked.Unfinished,
        total: Tensor,
    ) -> tuple[Tensor, chunked.Unfinished]:
        """`_mix` for one new token."""
        parts, v = self._split(tokens)
        queries, half = q.unflatten(-1, (-1, self.shared)).unbind(2), len(parts) // 2
        rest, bias = inside.sum(1), self._bias(self.chunk or tokens.shape[1], tokens)
        o = chunked.newest(
            queries[0], parts[half], v, inside, bias, self._weigh, (rest - 1).clamp(min=0)
        )
        sums, finished = state.sums, torch.zeros_like(rest)
        if self.chunk:
            o = o + (queries[1].to(sums.dtype) @ sums).to(o.dtype)
            full = rest == self.chunk
            finished = rest * full
            if full.any():
                chunk_sums = parts[3].to(sums.dtype).mT @ v.to(sums.dtype)
                sums = torch.where(full[:, None, None], sums + chunk_sums, sums)
        reach = self.chunk - 1 if self.chunk else tokens.shape[1]
        return o, chunked.Unfinished(self._held(tokens, finished, rest, reach), sums, total)

    def _split(self, tokens: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        views, v = tokens.split([self.gamma.numel(), self.inner], -1)
        return views.unflatten(-1, (-1, self.shared)).unbind(2), v

    def _held(self, tokens: Tensor, first: Tensor, last: Tensor, reach: int) -> Tensor:
        """K, K' and V of the tokens first … last, and zeros behind them."""
        places = first[:, None] + torch.arange(reach, device=first.device)
        found = average.reordered(F.pad(tokens, (0, 0, 0, reach))[:, None], places)[:, 0]
        found = found[..., self.gamma.numel() // 2 :]
        return found.masked_fill((places >= last[:, None])[..., None], 0)

    def _bias(self, chunk: int, like: Tensor) -> Tensor:
        """b of j − i = 1 − C … C − 1."""
        apart = torch.arange(1 - chunk, chunk, device=like.device)
        return self.gamma.new_zeros(len(apart)) if self.bias is None else self.bias(apart)

    def _weigh(self, scores: Tensor, seen: Tensor) -> Tensor:
        if self.activation == "softmax":
            return torch.ops.aten._safe_softmax(scores.masked_fill(~seen, -torch.inf), -1)
        if self.activation == "relu2":
            return F.relu(scores).square().masked_fill(~seen, 0)
        # Laplace (Ma et al., 2022): the distribution with mean √½ and variance 1 / (4 π).
        return ((1 + torch.erf((scores - 0.5**0.5) * (2 * math.pi) ** 0.5)) / 2) * seen


class ScaleNorm(nn.Module):
    """x √E / ‖x‖ · g, one g for all channels (Nguyen & Salazar, 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Float[Tensor, "*shape E"]) -> Float[Tensor, "*shape E"]:
        return F.rms_norm(x, x.shape[-1:], eps=1e-10) * self.gain


class Buckets(nn.Module):
    """T5's bias: one value for each near distance, one for each of ever wider spans farther off.

    Where not causal, half of them are of later tokens.
    """

    def __init__(self, causal: bool, *, buckets: int = 32, farthest: int = 128) -> None:
        super().__init__()
        self.causal, self.buckets, self.farthest = causal, buckets, farthest
        self.values = nn.Parameter(torch.randn(buckets) * 0.02)

    def forward(self, apart: Int[Tensor, " J"]) -> Float[Tensor, " J"]:
        """b of j − i."""
        sides = self.buckets if self.causal else self.buckets // 2
        near = sides // 2
        away = (-apart).clamp(min=0) if self.causal else apart.abs()
        share = (away.clamp(min=near).float() / near).log() / math.log(self.farthest / near)
        bucket = torch.where(
            away < near, away, (near + (share * (sides - near)).long()).clamp(max=sides - 1)
        )
        return self.values[bucket if self.causal else bucket + sides * (apart > 0)]


class Turned(nn.Module):
    """b = (R_i a)·(R_j c) for learned a and c, R_i turning plane p by i 10000^(−2p/s)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.c = (nn.Parameter(torch.randn(width) * 0.02) for _ in range(2))

    def forward(self, apart: Int[Tensor, " J"]) -> Float[Tensor, " J"]:
        wide = torch.promote_types(self.a.dtype, torch.float32)
        angles = apart[:, None] * frequencies(len(self.a), dtype=wide, device=apart.device)
        (a, b), (c, d) = (t.to(wide).chunk(2) for t in (self.a, self.c))
        return angles.cos() @ (a * c + b * d) + angles.sin() @ (b * c - a * d)
