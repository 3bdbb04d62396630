"""Attention along edges: queries name their keys, one by one, by diagonals or in groups."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from longspan.engines.dense import Layout, additive, tile_backward, tile_forward
from longspan.engines.pattern import WORKSPACE
from longspan.shapes import Keep

# (first, last) → the keys of queries first … last − 1, R K, with −1 where a row has fewer.
Columns = Callable[[int, int], Int[Tensor, "R K"]]

# Numbers of one tile of queries: it and the keys it meets stay in a core's own cache.
_CACHED = 2**16


def of_csr(start: Int[Tensor, "borders"], keys: Int[Tensor, "edges"]) -> Columns:
    """The keys of query i are keys[start[i] : start[i + 1]]."""

    def columns(first: int, last: int) -> Tensor:
        low, high = start[first:last, None], start[first + 1 : last + 1, None]
        at = low + torch.arange(int((high - low).max()), device=keys.device)
        return keys[at.clamp(max=len(keys) - 1)].masked_fill(at >= high, -1)

    return columns


class Edges(Layout):
    """Query i meets the keys that `columns` names for it, the same in every row and head.

    Keys are gathered a workspace at a time; `tile` queries are listed at once, so rows of very
    different lengths should not share one. O(edges) time, O(L) memory beside the workspace.
    """

    def __init__(self, columns: Columns, *, keep: Keep | None = None, tile: int = 1024) -> None:
        self.columns, self.keep, self.tile = columns, keep, tile

    def _parts(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """(rows of batch × heads, queries, flat key indices x R K, seen (x|1) R K)."""
        rows, keys = q.shape[0] * q.shape[1], k.shape[2]
        for start in range(0, q.shape[2], self.tile):
            listed = self.columns(start, min(start + self.tile, q.shape[2])).to(q.device)
            width = max(listed.shape[1], 1)
            each = WORKSPACE // (2 * q.element_size() * width * max(k.shape[3], 1))
            some = max(1, min(len(listed), each))
            together = max(1, each // some)
            for first in range(0, len(listed), some):
                index = listed[first : first + some]
                present, index = (index >= 0)[None], index.clamp(min=0)
                queries = slice(start + first, start + first + len(index))
                for x in range(0, rows, together):
                    of = torch.arange(x, min(x + together, rows), device=q.device)
                    seen = present
                    if self.keep is not None:
                        seen = seen & self.keep[of // q.shape[1]][:, index]
                    yield slice(x, x + len(of)), queries, index + of[:, None, None] * keys, seen

    @staticmethod
    def _taken(t: Tensor, index: Tensor, wide: torch.dtype) -> Tensor:
        flat = t.flatten(0, 2).index_select(0, index.flatten())
        return flat.view(*index.shape, t.shape[3]).to(wide)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        k, v = k.contiguous(), v.contiguous()
        wide = torch.promote_types(q.dtype, torch.float32)
        o = v.new_zeros(*q.shape[:3], v.shape[3])
        lse = q.new_full(q.shape[:3], -math.inf, dtype=wide)
        if k.shape[2] == 0:
            return o, lse
        rows_q, rows_o, rows_z = q.flatten(0, 1), o.flatten(0, 1), lse.flatten(0, 1)
        for rows, queries, index, seen in self._parts(q, k):
            part = rows_q[rows, queries].to(wide)[..., None]
            scores = (self._taken(k, index, wide) @ part)[..., 0] * scale
            scores = scores.masked_fill(~seen, -math.inf)
            z = scores.logsumexp(-1)
            weights = (scores - z.masked_fill(z == -math.inf, 0)[..., None]).exp()
            found = weights[..., None, :] @ self._taken(v, index, wide)
            rows_o[rows, queries] = found[..., 0, :].to(o.dtype)
            rows_z[rows, queries] = z
        return o, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        k, v = k.contiguous(), v.contiguous()
        wide = lse.dtype
        dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
        rows_do, rows_q, rows_o, rows_z, rows_dq = (t.flatten(0, 1) for t in (do, q, o, lse, dq))
        if k.shape[2]:
            for rows, queries, index, seen in self._parts(q, k):
                d, part, out = (
                    t[rows, queries].to(wide)[..., None] for t in (rows_do, rows_q, rows_o)
                )
                near = self._taken(k, index, wide)
                scores = ((near @ part)[..., 0] * scale).masked_fill(~seen, -math.inf)
                weights = (scores - rows_z[rows, queries, None]).exp()
                wanted = (self._taken(v, index, wide) @ d)[..., 0] - (d * out).sum((-2, -1))[
                    ..., None
                ]
                dscores = weights * wanted * scale
                rows_dq[rows, queries] = (dscores[..., None, :] @ near)[..., 0, :]
                flat = index.flatten()
                for grad, share, side in ((dk, dscores, part), (dv, weights, d)):
                    each = share[..., None] * side[..., None, :, 0]
                    grad.view(-1, grad.shape[3]).index_add_(0, flat, each.flatten(0, 2))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class Diagonal(NamedTuple):
    """Query i meets key i − offset, for first ≤ i < last (queries are the last of the keys)."""

    offset: int
    first: int = 0
    last: int = 2**40


class _Run(NamedTuple):
    queries: slice
    keys: slice


class Diagonals(Layout):
    """The union of some diagonals, none of which overlap.

    Keys are read where they lie, shifted: no gathering forward, no scattering backward. O(edges)
    time in tiles that stay in cache, O(L) memory.
    """

    def __init__(self, diagonals: Sequence[Diagonal]) -> None:
        self.diagonals = tuple(diagonals)

    def _tiles(self, q: Tensor, k: Tensor) -> Iterator[tuple[slice, int, int, list[_Run]]]:
        """(rows of batch × heads, first and last query, what of each diagonal lies between)."""
        count, length, past = q.shape[0] * q.shape[1], q.shape[2], k.shape[2] - q.shape[2]
        tokens = _CACHED // max(q.shape[3], 1)
        size = min(max(tokens // count, 256), length)
        together = max(1, tokens // size)
        for start in range(0, length, size):
            stop = min(start + size, length)
            runs = []
            for offset, first, last in self.diagonals:
                low = max(start, max(first, offset) - past)
                high = min(stop, last - past)
                if low < high:
                    keys = slice(low + past - offset, high + past - offset)
                    runs.append(_Run(slice(low - start, high - start), keys))
            for x in range(0, count, together):
                yield slice(x, x + together), start, stop, runs

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        o = v.new_zeros(*q.shape[:3], v.shape[3])
        lse = q.new_full(q.shape[:3], -math.inf, dtype=wide)
        if q.numel() == 0:
            return o, lse
        rows_q, rows_k, rows_v, rows_o, rows_z = (t.flatten(0, 1) for t in (q, k, v, o, lse))
        for x, start, stop, runs in self._tiles(q, k):
            if not runs:
                continue
            part = rows_q[x, start:stop].to(wide) * scale
            scores = part.new_full((len(runs), *part.shape[:2]), -math.inf)
            for row, (queries, keys) in zip(scores, runs, strict=True):
                row[:, queries] = (part[:, queries] * rows_k[x, keys]).sum(-1)
            z = scores.logsumexp(0)
            weights = scores.sub_(z.masked_fill(z == -math.inf, 0)).exp_()
            found = part.new_zeros(*part.shape[:2], v.shape[3])
            for row, (queries, keys) in zip(weights, runs, strict=True):
                found[:, queries].addcmul_(row[:, queries, None], rows_v[x, keys].to(wide))
            rows_o[x, start:stop] = found.to(o.dtype)
            rows_z[x, start:stop] = z
        return o, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = lse.dtype
        dq, dk, dv = (torch.zeros(t.shape, dtype=wide, device=t.device) for t in (q, k, v))
        given = [t.flatten(0, 1) for t in (do, q, o, lse, k, v)]
        rows_dq, rows_dk, rows_dv = (t.flatten(0, 1) for t in (dq, dk, dv))
        if q.numel() == 0:
            return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
        for x, start, stop, runs in self._tiles(q, k):
            d, part, out, z = (t[x, start:stop].to(wide) for t in given[:4])
            part = part * scale
            inner = (d * out).sum(-1)
            for queries, keys in runs:
                near, value = (t[x, keys].to(wide) for t in given[4:])
                mine, wanted = part[:, queries], d[:, queries]
                weights = ((mine * near).sum(-1) - z[:, queries]).exp_()
                dscores = (wanted * value).sum(-1).sub_(inner[:, queries]).mul_(weights)[..., None]
                rows_dq[x, start:stop][:, queries].addcmul_(dscores, near)
                rows_dk[x, keys].addcmul_(dscores, mine)
                rows_dv[x, keys].addcmul_(weights[..., None], wanted)
        return dq.mul_(scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


# (first, last) → of groups first … last − 1 the queries (n t) and the keys they list (n T), both as
# indices of keys, with −1 to fill up.
Members = Callable[[int, int], tuple[Int[Tensor, "n t"], Int[Tensor, "n T"]]]


class _Group(NamedTuple):
    """Flat rows of queries (x n t) and keys (x n T), which queries are real, the mask (1 n t T)."""

    queries: Tensor
    keys: Tensor
    valid: Tensor
    mask: Tensor


class Groups(Layout):
    """Queries of a group meet all keys that it lists, or with `causal` those up to themselves.

    Every query is in one group. O(group sizes) time, O(L) memory beside a fixed workspace.

    Args:
        first, last: groups that hold the queries, which are the last of the keys.
    """

    def __init__(self, members: Members, first: int, last: int, *, causal: bool) -> None:
        self.members, self.first, self.last, self.causal = members, first, last, causal

    def _tasks(self, q: Tensor, k: Tensor) -> Iterator[_Group]:
        """Some groups for some rows of batch × heads."""
        count, past = q.shape[0] * q.shape[1], k.shape[2] - q.shape[2]
        one = self.members(self.first, self.first + 1)
        size = 2 * q.element_size() * one[1].shape[1] * max(q.shape[3], one[0].shape[1])
        together = max(1, min(count, WORKSPACE // size))
        each = max(1, WORKSPACE // (size * together))
        for start in range(self.first, self.last, each):
            queries, keys = self.members(start, min(start + each, self.last))
            queries = queries[:, (queries >= past).any(0)]
            # What fills up repeats some query, whose logsumexp its scores would not fit.
            seen = (keys >= 0)[:, None] & (queries >= past)[:, :, None]
            if self.causal:
                seen = seen & (keys[:, None] <= queries[:, :, None])
            mask = additive(seen, q.dtype)[None].to(q.device)
            at_q, valid = (queries - past).clamp(min=0), queries >= past
            for x in range(0, count, together):
                rows = torch.arange(x, min(x + together, count))[:, None, None]
                yield _Group(
                    (at_q + rows * q.shape[2]).to(q.device),
                    (keys.clamp(min=0) + rows * k.shape[2]).to(q.device),
                    valid.expand(len(rows), -1, -1).to(q.device),
                    mask,
                )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        o = v.new_zeros(*q.shape[:3], v.shape[3])
        lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        if q.numel():
            for at_q, at_k, valid, mask in self._tasks(q, k):
                mine, near, value = (
                    Edges._taken(t, at, t.dtype) for t, at in ((q, at_q), (k, at_k), (v, at_k))
                )
                part, sums = tile_forward(mine, near, value, mask, scale)
                o.view(-1, o.shape[3]).index_copy_(0, at_q[valid], part[valid])
                lse.view(-1).index_copy_(0, at_q[valid], sums[valid])
        return o, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        grads = [torch.zeros_like(t, dtype=lse.dtype) for t in (q, k, v)]
        if q.numel():
            for at_q, at_k, _, mask in self._tasks(q, k):
                d, mine, out = (Edges._taken(t, at_q, t.dtype) for t in (do, q, o))
                near, value = (Edges._taken(t, at_k, t.dtype) for t in (k, v))
                sums = lse.view(-1).index_select(0, at_q.flatten()).view(at_q.shape)
                parts = tile_backward(d, mine, near, value, out, sums, mask, scale)
                for grad, at, part in zip(grads, (at_q, at_k, at_k), parts, strict=True):
                    part = part.flatten(0, 2).to(grad.dtype)
                    grad.view(-1, grad.shape[3]).index_add_(0, at.flatten(), part)
        return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


class Graph(NamedTuple):
    """Edges in compressed rows: node i sees keys[start[i] : start[i + 1]], of these kinds.

    leaves: rows that are tokens, in order. nodes: how many keys there are.
    """

    start: Int[Tensor, "rows+1"]
    keys: Int[Tensor, "edges"]
    kinds: Int[Tensor, "edges"]
    leaves: Int[Tensor, "tokens"]
    nodes: int


def edge_kinds(near: int, clip: int) -> int:
    """How many kinds of edges there are: 2 near + 1 a level, levels from `clip` on alike.

    (2 near + 1) min(level, clip) + 0 for a token's own edges (to itself, to its span of that
    level), 1 … near for the nodes to the left, near + 1 … 2 near to the right.
    """
    return (2 * near + 1) * (clip + 1)


def completed(tokens: int) -> int:
    """Nodes of the causal tree over so many tokens: they and all spans that are full."""
    return 2 * tokens - tokens.bit_count()


def _ids(level: int, m: Tensor, tokens: int, causal: bool) -> Tensor:
    """Numbers of nodes of a tree: level by level, or causally in the order of completion."""
    if not causal:
        return m + sum(-(-tokens // 2**j) for j in range(level))
    last = ((m + 1) << level) - 1
    ones = sum((last >> bit) & 1 for bit in range(max(tokens, 1).bit_length()))
    return 2 * last - ones + level


def _side(
    at: Tensor, tokens: int, near: int, clip: int, *, right: bool, causal: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """(node or −1, kind) of one side of the tokens `at`, one of each at a time."""
    step = 1 if right else -1
    pointer, fine, level = at + step, at + step, 0
    while bool(((fine >= 0) & (fine < -(-tokens // 2 ** max(level - 1, 0)))).any()):
        count = -(-tokens // 2**level)
        base = (2 * near + 1) * min(level, clip) + (near if right else 0)
        taken = torch.zeros_like(pointer)
        if level:
            # The parent of the next unread node would span one that was read: that node instead.
            child = fine
            odd = (child % 2 == (1 if right else 0)) & (child >= 0)
            below = -(-tokens // 2 ** (level - 1))
            valid = odd & (child < below)
            yield (
                _ids(level - 1, child.clamp(min=0), tokens, causal).masked_fill(~valid, -1),
                torch.full_like(child, base + 1),
            )
            taken = odd.long()
        for order in range(near):
            used = order >= taken
            node = pointer + step * (order - taken)
            valid = used & (node >= 0) & (node < count)
            yield (
                _ids(level, node.clamp(min=0), tokens, causal).masked_fill(~valid, -1),
                torch.full_like(node, base + 1 + order),
            )
        fine = pointer + step * (near - taken)
        odd = fine % 2 == (1 if right else 0)
        pointer = torch.where(odd, fine + step, fine) >> 1
        level += 1


def _rows(at: Tensor, own: Tensor, tokens: int, near: int, clip: int, causal: bool) -> Any:
    """(row, key, kind) of the tokens at `at`, rows counted from 0."""
    found = [(own, torch.zeros_like(own))]
    for right in (False,) if causal else (False, True):
        found += _side(at, tokens, near, clip, right=right, causal=causal)
    keys, names = (torch.stack(t, 1) for t in zip(*found, strict=True))
    seen = keys >= 0
    return seen.nonzero()[:, 0], keys[seen], names[seen]


@lru_cache(maxsize=256)
def tree(tokens: int, near: int, clip: int, *, causal: bool, past: int = 0) -> Graph:
    """The binary tree over `tokens`; causally of those after `past`, which see the others too.

    Level 0 are the tokens; node m of level j spans the tokens m 2^j … (m + 1) 2^j − 1, the last of
    a level maybe fewer. A span sees its tokens; a token sees itself and, to either side, `near`
    nodes a level, fine near and coarse far, that cover the rest without overlap.

    Causally only full spans take part, rows and keys are numbered as they are completed, a token
    before its spans; else level by level.
    """
    at = torch.arange(past, tokens)
    first = completed(past) if causal else 0
    own = _ids(0, at, tokens, causal)
    row, keys, names = _rows(at, own, tokens, near, clip, causal)
    parts = [(own[row], keys, names)]
    level = 1
    while (2**level <= tokens) if causal else (2 ** (level - 1) < tokens):
        size = 2**level
        stop = tokens // size if causal else -(-tokens // size)
        token = torch.arange(past // size * size if causal else 0, min(stop * size, tokens))
        span = token // size
        parts.append(
            (
                _ids(level, span, tokens, causal),
                _ids(0, token, tokens, causal),
                torch.full_like(token, (2 * near + 1) * min(level, clip)),
            )
        )
        level += 1
    to, keys, names = (torch.cat(t) for t in zip(*parts, strict=True))
    nodes = completed(tokens) if causal else int(to.max()) + 1 if len(to) else 0
    return _compressed(to - first, keys, names, own - first, nodes - first, nodes)


@lru_cache(maxsize=64)
def across(queries: int, tokens: int, near: int, clip: int, past: int = 0) -> Graph:
    """Queries past … queries − 1 of another sequence, each at its own place in this tree (or at
    the last): it sees the token there and what that token sees."""
    at = torch.arange(past, queries).clamp(max=tokens - 1)
    row, keys, names = _rows(at, at, tokens, near, clip, causal=False)
    nodes = tree(tokens, near, clip, causal=False).nodes
    return _compressed(row, keys, names, torch.arange(len(at)), len(at), nodes)


def _compressed(
    to: Tensor, keys: Tensor, names: Tensor, leaves: Tensor, rows: int, nodes: int
) -> Graph:
    order = to.argsort(stable=True)
    start = torch.zeros(rows + 1, dtype=torch.long)
    start[1:] = torch.bincount(to, minlength=rows).cumsum(0)
    return Graph(start, keys[order], names[order], leaves, nodes)


def together(graphs: list[Graph]) -> Graph:
    """One graph of several that do not meet, rows and keys one graph after the other."""
    rows = edges = nodes = 0
    starts, keys, leaves = [torch.zeros(1, dtype=torch.long)], [], []
    for one in graphs:
        starts.append(one.start[1:] + edges)
        keys.append(one.keys + nodes)
        leaves.append(one.leaves + rows)
        rows, edges, nodes = rows + len(one.start) - 1, edges + len(one.keys), nodes + one.nodes
    names = [one.kinds for one in graphs]
    none = [torch.zeros(0, dtype=torch.long)]
    keys, names, leaves = (torch.cat(t or none) for t in (keys, names, leaves))
    return Graph(torch.cat(starts), keys, names, leaves, nodes)


class _Along(torch.autograd.Function):
    """q H N D, k H S D, v H S V, table R D."""

    @staticmethod
    def tiles(q: Tensor, k: Tensor, edges: Graph) -> Iterator[tuple[Tensor, ...]]:
        """(rows, keys R K, kinds R K, hidden R K), rows of about as many keys together."""
        degree = edges.start.diff()
        order = degree.argsort(descending=True, stable=True)
        sizes, first = degree[order].tolist(), 0
        each = 2 * q.element_size() * len(q) * max(k.shape[2], 1)
        while first < len(sizes) and sizes[first]:
            width, last = sizes[first], first + 1
            most = max(1, WORKSPACE // (each * width))
            while last < len(sizes) and last - first < most and 2 * sizes[last] >= width:
                last += 1
            rows = order[first:last]
            step = torch.arange(width)
            hidden = step >= degree[rows][:, None]
            at = (edges.start[rows][:, None] + step).masked_fill(hidden, 0)
            yield tuple(t.to(q.device) for t in (rows, edges.keys[at], edges.kinds[at], hidden))
            first = last

    @staticmethod
    def taken(t: Tensor, at: Tensor, dtype: torch.dtype) -> Tensor:
        return t.index_select(1, at.flatten()).view(len(t), *at.shape, t.shape[2]).to(dtype)

    @staticmethod
    def weights(
        mine: Tensor, near: Tensor, table: Tensor, names: Tensor, hidden: Tensor, scale: float
    ) -> Tensor:
        kind = (mine @ table.mT).gather(2, names.expand(len(mine), -1, -1))
        scores = ((near @ mine[..., None])[..., 0] + kind) * scale
        return scores.masked_fill(hidden, -math.inf).softmax(-1)

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor, edges: Graph) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        o, scale = q.new_zeros(*q.shape[:2], v.shape[2]), q.shape[2] ** -0.5
        for rows, keys, names, hidden in _Along.tiles(q, k, edges):
            mine, near = q[:, rows].to(wide), _Along.taken(k, keys, wide)
            weights = _Along.weights(mine, near, table.to(wide), names, hidden, scale)
            found = weights[:, :, None] @ _Along.taken(v, keys, wide)
            o[:, rows] = found[:, :, 0].to(o.dtype)
        ctx.save_for_backward(q, k, v, table)
        ctx.edges, ctx.scale = edges, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Any, ...]:
        given = ctx.saved_tensors
        q, k, v, table = given
        wide = torch.promote_types(q.dtype, torch.float32)
        grads = [torch.zeros_like(t, dtype=wide) for t in given]
        for rows, keys, names, hidden in _Along.tiles(q, k, ctx.edges):
            mine, d = q[:, rows].to(wide), do[:, rows].to(wide)
            near, value = (_Along.taken(t, keys, wide) for t in (k, v))
            weights = _Along.weights(mine, near, table.to(wide), names, hidden, ctx.scale)
            wanted = (value @ d[..., None])[..., 0]
            inner = (weights * wanted).sum(-1, keepdim=True)
            dscores = weights * (wanted - inner) * ctx.scale
            dkind = mine.new_zeros(*mine.shape[:2], len(table))
            dkind.scatter_add_(2, names.expand(len(mine), -1, -1), dscores)
            grads[0][:, rows] = (dscores[:, :, None] @ near)[:, :, 0] + dkind @ table.to(wide)
            for grad, share, side in ((grads[1], dscores, mine), (grads[2], weights, d)):
                each = share[..., None] * side[:, :, None]
                grad.index_add_(1, keys.flatten(), each.flatten(1, 2))
            grads[3] += dkind.flatten(0, 1).mT @ mine.flatten(0, 1)
        return *(g.to(t.dtype) for g, t in zip(grads, given, strict=True)), None


_along: Any = torch.compiler.disable(_Along.apply)  # loops over tiles: eager under compile


def along(
    q: Float[Tensor, "H N D"],
    k: Float[Tensor, "H S D"],
    v: Float[Tensor, "H S V"],
    table: Float[Tensor, "kinds D"],
    edges: Graph,
) -> Float[Tensor, "H N V"]:
    """o_i = Σ_j softmax_j(q_i·(k_j + table[kind_ij]) / √D) v_j along the edges; 0 without any.

    Rows with about as many keys are gathered together. O(edges) time, memory of the inputs.
    """
    with torch.autocast(q.device.type, enabled=False):
        return _along(q, k, v, table, edges)
