"""Attention by content and distance between sequences of any resolution."""

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.engines import dense, relative
from longspan.errors import LongspanError
from longspan.nn.blocks import FeedForward
from longspan.shapes import Inputs, Keep

# Places of tokens: in even steps for all rows, or B L of any kind.
Places = range | Tensor


class Source(NamedTuple):
    """What is attended to: tokens, their places and mask, and what always stands before them."""

    x: Float[Tensor, "B S E"]
    at: Places
    keep: Bool[Tensor, "B S"] | None = None
    lead: Float[Tensor, "B P E"] | None = None
    at_lead: range = range(0)


class RelativeState(NamedTuple):
    """Every key and value so far, where they stand, and which of them may be seen."""

    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S D"]
    at: Int[Tensor, "B S"]
    keep: Bool[Tensor, "B S"]


class GlobalBiases(nn.Module):
    """u and v: what every query adds to itself before it meets content, and distance."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        self.u, self.v = (nn.Parameter(torch.empty(heads, head_width)) for _ in range(2))
        for weight in (self.u, self.v):
            nn.init.normal_(weight, std=0.02)


class RelativeAttention(nn.Module):
    """softmax(((q_i + u)·k_j + (q_i + v)·W R(p_i − p_j)) / √D) v_j (Dai et al., 2019, Sec. 3.3).

    Causally p_j ≤ p_i. Places are the caller's, so that queries and keys may stand at different
    steps. The state is every key and value, with its place. Layers may share `biases`, u and v.

    Raises:
        LongspanError: heads that do not divide the width.
    """

    def __init__(self, *, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        if width % heads or width % 2:
            raise LongspanError(
                f"width {width} with {heads} heads: expected an even width that they divide."
            )
        self.heads, self.causal = heads, causal
        linears = {n: nn.Linear(width, width, bias=False) for n in "qkv"}
        self.project = nn.ModuleDict(linears)
        self.output = nn.Linear(width, width, bias=False)
        self.distance = nn.Parameter(torch.empty(heads, width // heads, width))
        self.biases = GlobalBiases(heads, width // heads)
        for linear in (*linears.values(), self.output):
            nn.init.xavier_uniform_(linear.weight)
        nn.init.normal_(self.distance, std=0.02)

    def forward(
        self, x: Inputs, at: Places, source: Source, state: RelativeState | None = None
    ) -> tuple[Inputs, RelativeState | None]:
        """`at` are the places of x."""
        q, (k, v), keep = self._heads("q", x), self._pair(source.x), source.keep
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        of_keys, carried = source.at, None
        if self.causal:
            seen = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
            carried = RelativeState(k, v, numbers(of_keys, k), seen)
            if state is not None:
                pairs = zip(state, carried, (2, 2, 1, 1), strict=True)
                carried = RelativeState(*(torch.cat([a, b], axis) for a, b, axis in pairs))
                k, v, of_keys, keep = carried
        if source.lead is not None and len(source.at_lead):
            k_0, v_0 = self._pair(source.lead)
            k, v = torch.cat([k_0, k], 2), torch.cat([v_0, v], 2)
            if keep is not None:
                keep = torch.cat([keep.new_ones(len(keep), k_0.shape[2]), keep], 1)
            if isinstance(of_keys, range):
                of_keys = range(source.at_lead.start, of_keys.stop, of_keys.step)
            else:
                of_keys = torch.cat([numbers(source.at_lead, k), of_keys], 1)
        if isinstance(at, range) and isinstance(of_keys, range):
            o = self._even(q, k, v, at, of_keys, keep)
        else:
            o = self._any(q, k, v, numbers(at, q), numbers(of_keys, k), keep)
        return self.output(rearrange(o, "B H L D -> B L (H D)")), carried

    def _heads(self, name: str, x: Tensor) -> Tensor:
        return rearrange(self.project[name](x), "B L (H D) -> B H L D", H=self.heads)

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads("k", x), self._heads("v", x)

    def _content(self, k: Tensor) -> Tensor:
        return self.biases.u.to(k.dtype)[:, None] @ k.mT

    def _even(
        self, q: Tensor, k: Tensor, v: Tensor, at: range, of_keys: range, keep: Keep | None
    ) -> Tensor:
        own, offset = at == of_keys, len(of_keys) - len(at)

        def bias(q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
            start = int(pos_q[0]) - offset
            i, j = at[start : start + q.shape[2]], of_keys[: k.shape[2]]
            v_bias, weight = self.biases.v.to(q.dtype)[:, None], self.distance.to(q.dtype)
            scores = relative.shifted(q + v_bias, weight, i, j) + self._content(k)
            if self.causal and not own:
                p_q, p_k = (numbers(r, q)[0] for r in (i, j))
                scores = scores.masked_fill(p_k > p_q[:, None], -torch.inf)
            return scores * q.shape[3] ** -0.5

        if not len(at):
            return q
        return dense.tiled(q, k, v, causal=self.causal and own, keep=keep, bias=bias)[0]

    def _any(
        self, q: Tensor, k: Tensor, v: Tensor, at: Tensor, of_keys: Tensor, keep: Keep | None
    ) -> Tensor:
        v_bias = self.biases.v.to(q.dtype)[:, None]
        scores = relative.factorised(q + v_bias, self.distance, at, of_keys)
        bias = (scores + self._content(k)) * q.shape[3] ** -0.5
        seen = None if keep is None else keep[:, None, None]
        if self.causal:
            order = (of_keys[:, None] <= at[..., None])[:, None]
            seen = order if seen is None else seen & order
        return dense.explicit(q, k, v, seen=seen, bias=bias)[0]


class RelativeBlock(nn.Module):
    """x ← x + attention(norm(x), norm(source or x)), x ← x + feed_forward(norm(x)).

    Args:
        across: it attends to another sequence, which gets a norm of its own.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        inner: int | None = None,
        causal: bool = False,
        across: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.source_norm = nn.LayerNorm(width) if across else None
        self.attention = RelativeAttention(width=width, heads=heads, causal=causal)
        self.feed_forward = FeedForward(width, inner=inner, dropout=dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Inputs,
        at: Places,
        state: RelativeState | None = None,
        *,
        keep: Keep | None = None,
        source: Source | None = None,
    ) -> tuple[Inputs, RelativeState | None]:
        """`keep` is of x, where it attends to itself."""
        h = self.norm(x)
        if source is None or self.source_norm is None:
            of = Source(h, at, keep)
        else:
            lead = None if source.lead is None else self.source_norm(source.lead)
            of = source._replace(x=self.source_norm(source.x), lead=lead)
        y, state = self.attention(h, at, of, state)
        x = x + self.dropout(y)
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x))), state


def numbers(at: Places, like: Float[Tensor, "B ..."]) -> Int[Tensor, "B L"]:
    """Places as numbers, a row each."""
    if isinstance(at, range):
        steps = torch.arange(len(at), device=like.device)
        at = (at.start + at.step * steps)[None]
    return at.expand(len(like), -1)
