"""The kernel that suits a pattern, padding packed away, and what a causal form carries."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longspan.engines import backends, dense
from longspan.engines.dense import Layout, Whole
from longspan.engines.pattern.banded import Banded
from longspan.engines.pattern.biased import ByPair, biased
from longspan.engines.pattern.fold import Fold
from longspan.engines.pattern.listed import Listed
from longspan.engines.pattern.values import (
    Both,
    Coarse,
    Pattern,
    PerHead,
    Prefixed,
    Sum,
    UnlessShort,
    Window,
    causal,
)
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


def layouts(
    shape: Pattern, queries: int, keys: int, *, block: tuple[int, int] = (64, 64)
) -> list[Layout]:
    """The kernels of a pattern; their key sets share one softmax."""
    if isinstance(shape, UnlessShort):
        return layouts(shape.at(keys), queries, keys, block=block)
    if isinstance(shape, Sum):
        found = [layouts(part, queries, keys, block=block) for part in shape.parts]
        return [layout for part in found for layout in part]
    if isinstance(shape, Window):
        ahead = shape.after * shape.dilation >= keys
        if shape.before * shape.dilation >= keys and (ahead or shape.after == 0):
            whole = Whole(causal=not ahead)
            if shape.dilation == 1:
                return [whole]
            if queries == keys:
                return [Fold(whole, shape.dilation, across=True)]
        elif shape.dilation == 1 or queries == keys:
            return [Banded((shape,))]
    if queries == keys:
        own = shape.parts if isinstance(shape, Both) else (shape,)
        cell, order = own[0], own[1:]
        if isinstance(cell, Coarse) and cell.inner == Window(0) and order in ((), (causal,)):
            return [Fold(Whole(causal=bool(order)), cell.size, across=False)]
    return [Listed(shape, *block)]


def attend(
    q: Queries,
    k: Keys,
    v: Values,
    shape: Pattern | PerHead,
    *,
    keep: Keep | None = None,
    block: tuple[int, int] = (64, 64),
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Outputs:
    """Softmax attention under a pattern.

    Positions count kept tokens: what `keep` hides is taken out, the rest attends as if alone, and
    hidden queries give 0.

    Args:
        block: queries and keys of one block where blocks are gathered.
        bias: (B|1, H|1, L|1, S), added to the scores; positions then count slots, and of what
            `keep` hides only the keys are left out.
    """
    if keep is not None and not bool(keep.all()):
        if bias is None:
            return _packed(q, k, v, shape, keep, block, scale)
        bias = bias + dense.additive(keep, q.dtype)[:, None, None]
    groups: dict[Pattern, list[int]] = {}
    for h in range(q.shape[1]):
        groups.setdefault(shape.head(h), []).append(h)
    if len(groups) == 1:
        return _attend(q, k, v, next(iter(groups)), block, scale, bias)
    outs, order = [], [h for heads in groups.values() for h in heads]
    for one, heads in groups.items():
        at = torch.tensor(heads, device=q.device)
        mine = [t.index_select(1, at) for t in (q, k, v)]
        own = bias if bias is None or bias.shape[1] == 1 else bias.index_select(1, at)
        outs.append(_attend(mine[0], mine[1], mine[2], one, block, scale, own))
    back = torch.tensor(order, device=q.device).argsort()
    return torch.cat(outs, 1).index_select(1, back)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Pattern,
    block: tuple[int, int],
    scale: float | None,
    bias: Tensor | None,
) -> Tensor:
    queries, keys = q.shape[2], k.shape[2]
    if bias is not None:
        return biased(q, [(ByPair(shape, *block), k, v, bias)], scale=scale)
    if queries == 1 and keys:
        seen = shape.sees(torch.tensor(keys - 1), torch.arange(keys), keys).expand(keys)
        if not bool(seen.all()):
            at = seen.nonzero()[:, 0].to(k.device)
            k, v = k.index_select(2, at), v.index_select(2, at)
        return dense.explicit(q, k, v, scale=scale)[0]
    if fused := backends.for_device("pattern", q, v):
        return fused(q, k, v, shape, scale=scale)[0]
    if isinstance(shape, Prefixed) and queries == keys:
        size = min(shape.size, keys)
        first = dense.attend(q[:, :, :size], k, v, scale=scale)
        rest = layouts(shape.rest, queries - size, keys - size, block=block)
        parts = [(layout, k[:, :, size:], v[:, :, size:]) for layout in rest]
        parts.append((Whole(), k[:, :, :size], v[:, :, :size]))
        return torch.cat([first, dense.union(q[:, :, size:], parts, scale=scale)[0]], 2)
    parts = [(layout, k, v) for layout in layouts(shape, queries, keys, block=block)]
    return dense.union(q, parts, scale=scale)[0]


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: Pattern | PerHead,
    keep: Tensor,
    block: tuple[int, int],
    scale: float | None,
) -> Tensor:
    """Rows with as many kept tokens, and kept queries, attend together, all else left out."""
    batch, heads, queries = q.shape[:3]
    keys = k.shape[2]
    of_queries = keep[:, keys - queries :]
    counts = torch.stack([keep.sum(1), of_queries.sum(1)], 1)
    rows, outs = [], []
    for pair in counts.unique(dim=0):
        some = (counts == pair).all(1).nonzero()[:, 0]
        if not int(pair[1]):
            continue
        at_q, at_k = (_places(m, some, heads) for m in (of_queries, keep))
        out = attend(
            _flat(q).index_select(0, at_q.flatten()).view(*at_q.shape, -1),
            _flat(k).index_select(0, at_k.flatten()).view(*at_k.shape, -1),
            _flat(v).index_select(0, at_k.flatten()).view(*at_k.shape, -1),
            shape,
            block=block,
            scale=scale,
        )
        rows.append(at_q.flatten())
        outs.append(out.reshape(-1, out.shape[-1]))
    o = v.new_zeros(batch * heads * queries, v.shape[3])
    if rows:
        o = o.index_copy(0, torch.cat(rows), torch.cat(outs))
    return o.view(batch, heads, queries, -1)


def _flat(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _places(keep: Tensor, some: Tensor, heads: int) -> Tensor:
    """Of the kept tokens of some rows, the places in B H T flattened: (rows, heads, tokens)."""
    at = keep[some].nonzero()[:, 1].view(len(some), 1, -1)
    head = torch.arange(heads, device=keep.device)[:, None]
    return (some[:, None, None] * heads + head) * keep.shape[1] + at


class History(NamedTuple):
    """Keys and values that later queries may see, and which of them are tokens at all."""

    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S V"]
    keep: Bool[Tensor, "B S"]


def stream(
    q: Queries,
    k: Keys,
    v: Values,
    shape: Pattern | PerHead,
    state: History | None,
    *,
    keep: Keep | None = None,
    block: tuple[int, int] = (64, 64),
    reach: int | None = None,
    period: int = 1,
    bias: Tensor | None = None,
) -> tuple[Outputs, History]:
    """`attend` for a causal pattern, after what the state holds.

    Args:
        reach: no query sees a key that far behind it; None where any may be seen.
        period: the pattern is the same when all positions move by so many.
        bias: as of `attend`, over all keys, those of the state too.
    """
    seen = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
    if keep is not None:
        k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
    if state is not None:
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        keep = seen = torch.cat([state.keep, seen], 1)
    o = attend(q, k, v, shape, keep=keep, block=block, bias=bias)
    return o, _held(History(k, v, seen), reach, period)


def _held(history: History, reach: int | None, period: int) -> History:
    """Without the whole periods that lie out of reach, so that positions still count from 0."""
    if reach is None:
        return history
    k, v, keep = history
    count = keep.sum(1)
    drop = (count - reach).clamp(min=0) // period * period
    least = int(drop.min()) if len(drop) else 0
    if bool(keep.all()):
        return History(k[:, :, least:], v[:, :, least:], keep[:, least:])
    keep = keep & (keep.cumsum(1) > drop[:, None])
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : int((count - drop).max())]
    return History(_take(k, order), _take(v, order), keep.gather(1, order))


def _take(t: Tensor, at: Tensor) -> Tensor:
    """Tokens of t (B H S D) by index (B T)."""
    batch, heads, length, _ = t.shape
    row = torch.arange(batch * heads, device=t.device).view(batch, heads, 1)
    flat = _flat(t).index_select(0, (row * length + at[:, None]).flatten())
    return flat.view(batch, heads, at.shape[1], -1)
