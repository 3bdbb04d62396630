"""Softmax attention: whole, in tiles, and over a union of key sets that share one softmax.

A `Layout` says how queries meet one set of keys. `union` runs any number of them under a single
softmax: each layout gives (o_p, z_p) with z the logsumexp of its scores, merged as

    z = logsumexp_p z_p,   o = Σ_p exp(z_p − z) o_p.

Backward, each layout's own kernel is exact when handed the merged (o, z), because the softmax
gradient P ∘ (dP − rowsum(dO ∘ O)) needs of the other keys only their part in z and o. Memory is
O(L) both ways: weights are recomputed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from longspan.engines import backends
from longspan.shapes import Keep

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tile_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(o, logsumexp) of small attentions side by side: q X Y L D, k X Y S D, v X Y S V.

    `mask` is added to the scores, broadcast from (X|1) (Y|1) (L|1) S, in q's dtype. Rows that see
    nothing give o = 0 and logsumexp = −inf.
    """
    if q.numel() == 0 or k.shape[2] == 0:  # the kernel divides by the number of keys
        return q.new_zeros(*q.shape[:3], v.shape[3]), _sums(q, q.shape[:3]).fill_(-math.inf)
    if q.device.type == "cpu":
        q, k, v, width = _even(q, k, v)
        o, lse = _flash(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
        o = o[..., :width]
        if mask is not None:
            # The kernel gives such rows logsumexp 0, which a merge would take for a weight of 1.
            dead = mask.amax(-1) == -math.inf
            lse = lse.masked_fill(dead, -math.inf)
        return o, lse
    scores = _scores(q, k, mask, scale)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0)[..., None]).exp()
    return (weights @ v.to(weights.dtype)).to(q.dtype), lse


def tile_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `tile_forward` under a softmax whose full output is `o`, its logsumexp `lse`."""
    if q.numel() == 0 or k.shape[2] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if q.device.type == "cpu":
        return _flash_gradients(do, q, k, v, o, lse, False, mask, scale)
    weights = (_scores(q, k, mask, scale) - lse[..., None]).exp()
    wide = weights.dtype
    do, o, v = do.to(wide), o.to(wide), v.to(wide)
    dscores = weights * (do @ v.mT - (do * o).sum(-1, keepdim=True)) * scale
    dq, dk, dv = dscores @ k.to(wide), dscores.mT @ q.to(wide), weights.mT @ do
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _flash_gradients(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The CPU kernel's backward pass, widths made equal for it."""
    widths = q.shape[3], v.shape[3]
    q, k, v, _ = _even(q, k, v)
    if short := q.shape[3] - widths[1]:
        do, o = F.pad(do, (0, short)), F.pad(o, (0, short))
    dq, dk, dv = _flash_backward(do, q, k, v, o, lse, 0.0, causal, attn_mask=mask, scale=scale)
    return dq[..., : widths[0]], dk[..., : widths[0]], dv[..., : widths[1]]


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide) @ k.to(wide).mT * scale
    return scores if mask is None else scores + mask


def _sums(q: Tensor, shape: Sequence[int]) -> Tensor:
    return q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))


def _even(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """What the CPU kernel takes for granted: unit last strides, and equal widths (zeros beside)."""
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    width = v.shape[3]
    if (short := q.shape[3] - width) > 0:
        v = F.pad(v, (0, short))
    elif short < 0:
        q, k = F.pad(q, (0, -short)), F.pad(k, (0, -short))
    return q, k, v, width


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where `seen`, −inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)


class Layout(ABC):
    """How a set of queries (B H L D) meets a set of keys and values (B H S D, B H S V)."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(o: B H L V, logsumexp: B H L), the latter −inf where nothing is seen."""

    @abstractmethod
    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(dq, dk, dv), given the output and logsumexp of the whole union."""


class Whole(Layout):
    """Every query meets every key, or every earlier one, the last query aligned with the last key.

    Masks are built for `tile` queries at a time, so memory stays O(tile · S).
    """

    def __init__(self, *, causal: bool = False, keep: Keep | None = None, tile: int = 512) -> None:
        self.causal, self.keep, self.tile = causal, keep, tile

    def _tiles(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, int, Tensor | None]]:
        length, keys = q.shape[2], k.shape[2]
        seen = None if self.keep is None else self.keep[:, None, None]  # B 1 1 S
        if not self.causal:
            yield slice(0, length), keys, None if seen is None else additive(seen, q.dtype)
            return
        for start in range(0, length, self.tile):
            stop = min(start + self.tile, length)
            limit = max(keys - length + stop, 0)
            rows = torch.arange(keys - length + start, keys - length + stop, device=q.device)
            mask = torch.arange(limit, device=q.device) <= rows[:, None]
            mask = mask if seen is None else mask & seen[..., :limit]
            yield (
                slice(start, stop),
                limit,
                additive(
                    mask.expand(-1, -1, *mask.shape[-2:]) if mask.dim() == 4 else mask[None, None],
                    q.dtype,
                ),
            )

    def _square(self, q: Tensor, k: Tensor) -> bool:
        """The kernel's own causal form serves: aligned at the top left, no masks."""
        return (
            self.causal
            and self.keep is None
            and q.shape[2] == k.shape[2] > 1
            and q.device.type == "cpu"
            and q.numel() > 0
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        if self._square(q, k):
            q, k, v, width = _even(q, k, v)
            o, lse = _flash(q, k, v, 0.0, True, scale=scale)
            return o[..., :width], lse
        if fused := backends.for_device("tiles", q, v):
            return fused(causal=self.causal, keep=self.keep).forward(q, k, v, scale)
        o = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = _sums(q, q.shape[:3])
        for rows, limit, mask in self._tiles(q, k):
            o[:, :, rows], lse[:, :, rows] = tile_forward(
                q[:, :, rows], k[:, :, :limit], v[:, :, :limit], mask, scale
            )
        return o, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self._square(q, k):
            return _flash_gradients(do, q, k, v, o, lse, True, None, scale)
        if fused := backends.for_device("tiles", q, v):
            whole = fused(causal=self.causal, keep=self.keep)
            return whole.backward(do, q, k, v, o, lse, scale)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, limit, mask in self._tiles(q, k):
            dq[:, :, rows], k_part, v_part = tile_backward(
                do[:, :, rows],
                q[:, :, rows],
                k[:, :, :limit],
                v[:, :, :limit],
                o[:, :, rows],
                lse[:, :, rows],
                mask,
                scale,
            )
            dk[:, :, :limit] += k_part
            dv[:, :, :limit] += v_part
        return dq, dk, dv


class _Union(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, layouts: tuple[Layout, ...], scale: float, q: Tensor, *kv: Tensor
    ) -> tuple[Tensor, Tensor]:
        parts = [
            layout.forward(q, kv[2 * i], kv[2 * i + 1], scale) for i, layout in enumerate(layouts)
        ]
        o, lse = merge(parts)
        o = o.to(q.dtype)
        ctx.layouts, ctx.scale = layouts, scale
        ctx.save_for_backward(q, o, lse, *kv)
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, _: Tensor) -> tuple[Any, ...]:
        q, o, lse, *kv = ctx.saved_tensors
        lse = lse.masked_fill(lse == -math.inf, 0)  # dead rows: exp(−inf − 0) = 0 everywhere
        do = do.contiguous()
        dq = None
        grads: list[Tensor] = []
        for i, layout in enumerate(ctx.layouts):
            part, dk, dv = layout.backward(do, q, kv[2 * i], kv[2 * i + 1], o, lse, ctx.scale)
            dq = part if dq is None else dq + part
            grads += [dk, dv]
        return None, None, dq, *grads


# Loops over tiles and kernels without a meta form: eager under torch.compile.
_union: Any = torch.compiler.disable(_Union.apply)


def union(
    q: Tensor, parts: Sequence[tuple[Layout, Tensor, Tensor]], *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """One softmax over several key sets: (o: B H L V, logsumexp: B H L).

    Args:
        parts: (layout, k: B H S D, v: B H S V) each; a key in two parts counts twice.
        scale: of the scores, by default D^(−1/2).

    The logsumexp carries no gradient.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    flat = [t for _, k, v in parts for t in (k, v)]
    return _union(tuple(layout for layout, _, _ in parts), scale, q, *flat)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Joins (o, logsumexp) pairs over disjoint key sets into those of all keys."""
    if len(parts) == 1:
        return parts[0]
    top = torch.stack([z.detach() for _, z in parts]).amax(0)  # cancels: no gradient
    top = top.masked_fill(top == -math.inf, 0)
    shares = [(z - top).exp() for _, z in parts]
    whole = torch.stack(shares).sum(0)
    dead = whole == 0
    total = sum(o * share[..., None] for (o, _), share in zip(parts, shares, strict=True))
    o = total / whole.masked_fill(dead, 1)[..., None]
    return o, (whole.masked_fill(dead, 1).log() + top).masked_fill(dead, -math.inf)


def explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    seen: Tensor | None = None,
    bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    gate: Tensor | None = None,
    spread: Callable[[Tensor], Tensor] | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(o, weights: B H L S, logsumexp: B H L) with the weight matrix written out.

        scores = activation(q kᵀ · scale) ∘ multiplier + bias,
        weights = dropout(softmax(scores) ∘ gate),   o = weights v + spread(weights)

    `seen`, `bias`, `multiplier` and `gate` broadcast to B H L S; computed in at least float32.
    The gate does not renormalise: append a column of ones to v where its sum is wanted.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        scores = einsum(q.to(wide) * factor, k.to(wide), "B H L D, B H S D -> B H L S")
    if activation is not None:
        scores = activation(scores)
    if multiplier is not None:
        scores = scores * multiplier
    if bias is not None:
        scores = scores + bias
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.ops.aten._safe_softmax(scores, -1)  # rows that see nothing give 0, not NaN
    if k.shape[2]:
        # log Σ exp s = max s − log max softmax(s): no second pass of exponentials.
        lse = scores.amax(-1) - weights.amax(-1).log().nan_to_num(neginf=0)
    else:
        lse = scores.new_full(scores.shape[:3], -math.inf)
    if gate is not None:
        weights = weights * gate
    weights = F.dropout(weights, dropout)
    with torch.autocast(q.device.type, enabled=False):
        o = einsum(weights, v.to(wide), "B H L S, B H S V -> B H L V")
        o = o if spread is None else o + spread(weights)
    return o.to(q.dtype), weights, lse


def tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    keep: Keep | None = None,
    bias: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    multiplier: Callable[[Tensor, Tensor], Tensor] | None = None,
    gate: Callable[[Tensor, Tensor], Tensor] | None = None,
    spread: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
    tile: int = 256,
) -> tuple[Tensor, Tensor]:
    """(o, logsumexp) by `tile` queries at a time, for hooks that need gradients of their own.

    Args:
        bias: (q, k, pos_q, pos_k) → addend to the scaled scores.
        multiplier, gate: (pos_q, pos_k) → factor before, and after, the softmax.
        spread: (weights, pos_q, pos_k) → addend to the outputs.
        activation: of the scaled scores, before the multiplier.

    Each tile is recomputed in the backward pass, so memory is O(tile · S) both ways (Rabe & Staats,
    2021, Sec. 3).
    """
    length, keys = q.shape[2], k.shape[2]
    pos_q = torch.arange(keys - length, keys, device=q.device)
    pos_k = torch.arange(keys, device=q.device)

    def rows(q_tile: Tensor, at: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        def spread_here(weights: Tensor) -> Tensor:
            assert spread is not None
            return spread(weights, at, at_k)

        seen = None if keep is None else keep[:, None, None, : k.shape[2]]
        if causal:
            order = pos_k[: k.shape[2]] <= at[:, None]
            seen = order if seen is None else seen & order
        at_k = pos_k[: k.shape[2]]
        o, _, lse = explicit(
            q_tile,
            k,
            v,
            seen=seen,
            bias=bias and bias(q_tile, k, at, at_k),
            multiplier=multiplier and multiplier(at, at_k),
            gate=gate and gate(at, at_k),
            spread=spread and spread_here,
            activation=activation,
            dropout=dropout,
            scale=scale,
        )
        return o, lse

    outs = []
    for start in range(0, length, tile) or [0]:
        stop = min(start + tile, length)
        limit = max(keys - length + stop, 0) if causal else keys
        inputs = q[:, :, start:stop], pos_q[start:stop], k[:, :, :limit], v[:, :, :limit]
        recompute = torch.is_grad_enabled() and length > tile
        outs.append(checkpoint(rows, *inputs, use_reentrant=False) if recompute else rows(*inputs))
    return torch.cat([o for o, _ in outs], 2), torch.cat([z for _, z in outs], 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    keep: Keep | None = None,
    bias: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    spread: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    """Exact softmax attention by the cheapest way that serves the arguments.

    q: B H L D, k: B H S D, v: B H S V → B H L V; causally the last query meets the last key.
    """
    length, keys = q.shape[2], k.shape[2]
    masked = keep is not None or (causal and length != keys)
    if bias is not None or spread is not None or (dropout and masked):
        return tiled(
            q,
            k,
            v,
            causal=causal,
            keep=keep,
            bias=bias,
            spread=spread,
            dropout=dropout,
            scale=scale,
        )[0]
    if keep is None and keys and (not causal or length in (1, keys)):
        square = causal and length > 1
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=square, dropout_p=dropout, scale=scale
        )
    return union(q, [(Whole(causal=causal, keep=keep), k, v)], scale=scale)[0]
