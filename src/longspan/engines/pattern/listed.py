"""Any pattern: each block of queries against a gathered list of key blocks."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.engines import pattern
from longspan.engines.dense import Layout, additive, tile_backward, tile_forward
from longspan.engines.pattern.banded import cut
from longspan.engines.pattern.values import Listing, Pattern, listing


class _Group(NamedTuple):
    """Query blocks with about as many key blocks each.

    blocks: n. table: n m, their key blocks. wide: all keys are seen.
    seen: rows m·cols, what each of these blocks sees, where they see alike, or None.
    hidden: n m, entries that only fill up, or None. partial: n m, blocks of which only some pairs
    are seen, or None; both None where `seen` says it.
    """

    blocks: Tensor
    table: Tensor
    wide: bool = False
    seen: Tensor | None = None
    hidden: Tensor | None = None
    partial: Tensor | None = None


class _Tiles(NamedTuple):
    """What a pattern sees of the blocks it lists.

    kinds: of each listed block, 0 where all is seen, else 1 + its place in `seen` (n rows cols).
    """

    kinds: Tensor
    seen: Tensor


def _tiles(shape: Pattern, found: Listing, keys: int, rows: int, cols: int) -> _Tiles | None:
    """The few kinds of partly seen blocks that a regular pattern has; None where they are many."""
    kinds, some = torch.zeros_like(found.rows), (~found.full).nonzero()[:, 0]
    if not len(some):
        return _Tiles(kinds, torch.zeros(0, rows, cols, dtype=torch.bool))
    # Equal sums of random 64-bit weights: equal blocks, but for one chance in 2⁶⁴ a pair.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (rows * cols,), generator=generator)
    codes = torch.zeros(len(some), dtype=torch.int64)

    def seen(at: Tensor) -> Tensor:
        i = (found.rows[at] * rows)[:, None] + torch.arange(rows)
        j = (found.cols[at] * cols)[:, None] + torch.arange(cols)
        pairs = shape.sees(i[:, :, None].clamp(max=keys - 1), j[:, None], keys)
        return pairs & (j < keys)[:, None]

    for part in torch.arange(len(some)).split(256):
        tiles = seen(some[part]).expand(len(part), rows, cols).flatten(1)
        codes[part] = (tiles * weights).sum(1)
        if len(codes[: part[-1] + 1].unique()) > KINDS:
            return None
    different, kind = codes.unique(return_inverse=True)
    kinds[some] = kind + 1
    last = torch.zeros_like(different).scatter_(0, kind, torch.arange(len(some)))
    return _Tiles(kinds, seen(some[last]).expand(-1, rows, cols).clone())


# Most kinds of partly seen blocks, and of query blocks by what they see; where these are more, only
# those that make up such a share of all are grouped.
KINDS = 16


@lru_cache(maxsize=64)
def _groups(shape: Pattern, queries: int, keys: int, rows: int, cols: int) -> tuple[_Group, ...]:
    found = listing(shape, queries, keys, rows, cols)
    blocks, counts = found.rows.unique_consecutive(return_counts=True)
    starts, full = counts.cumsum(0) - counts, found.full
    # The last key block may be cut short: it is seen whole, once what lies beyond is cut off.
    all_keys, tail = counts == -(-keys // cols), keys % cols
    if tail and len(full):
        low, high = blocks * rows, blocks * rows + rows - 1
        i = low.clamp(min=keys - queries), high.clamp(max=keys - 1)
        ends = torch.full_like(blocks, keys - tail), torch.full_like(blocks, keys - 1)
        last = shape.meets(i, ends, keys)[1].expand(len(blocks))
        full = full.clone()
        full[(starts + counts - 1)[all_keys & last]] = True
    seen = torch.zeros_like(blocks).index_add_(
        0, torch.arange(len(blocks)).repeat_interleave(counts), full.long()
    )
    wide = all_keys & (seen == counts) & (counts > 1)
    groups = []
    if wide.any():
        groups.append(_Group(blocks[wide], blocks.new_zeros(0, 0), wide=True))
    order = (~wide).nonzero()[:, 0]
    tiles = _tiles(shape, found, keys, rows, cols)
    if tiles is not None and len(order):
        alike, order = _alike(tiles, found, (blocks, starts, counts), order)
        groups += alike
    order = order[counts[order].argsort(descending=True, stable=True)]
    while len(order):
        most = int(counts[order[0]])
        some = order[: int((counts[order] > 0.8 * most - 1).sum())]
        order = order[len(some) :]
        some = some.sort().values
        entry = torch.arange(most)
        hidden = entry >= counts[some][:, None]
        at = (starts[some][:, None] + entry).masked_fill(hidden, 0)
        partial = ~found.full[at] & ~hidden
        groups.append(
            _Group(
                blocks[some],
                found.cols[at].masked_fill(hidden, 0),
                hidden=hidden if hidden.any() else None,
                partial=partial if partial.any() else None,
            )
        )
    return tuple(groups)


def _alike(
    tiles: _Tiles, found: Listing, listed: tuple[Tensor, Tensor, Tensor], order: Tensor
) -> tuple[list[_Group], Tensor]:
    """Groups of query blocks that see alike, and the query blocks that are left over.

    listed: query blocks, and where the key blocks of each start, and how many they are. One mask
    serves a whole group, in which key blocks partly seen come first.
    """
    blocks, starts, counts = listed
    entry = torch.arange(int(counts[order].max()))
    hidden = entry >= counts[order][:, None]
    at = (starts[order][:, None] + entry).masked_fill(hidden, 0)
    kinds = tiles.kinds[at].masked_fill(hidden, -1)
    kinds, by_kind = kinds.sort(dim=1, descending=True, stable=True)
    at = at.gather(1, by_kind)
    rows, which, many = kinds.unique(dim=0, return_inverse=True, return_counts=True)
    groups, left = [], torch.ones_like(order, dtype=torch.bool)
    worth = many * KINDS >= (len(order) if len(many) > KINDS else 0)
    for kind in worth.nonzero()[:, 0].tolist():
        mine = (which == kind).nonzero()[:, 0]
        most = int((rows[kind] >= 0).sum())
        partly = rows[kind][:most]
        seen = None
        if int(partly[0]) > 0:
            full = torch.ones(1, *tiles.seen.shape[1:], dtype=torch.bool)
            seen = torch.cat([full, tiles.seen])[partly].transpose(0, 1).flatten(1)
        groups.append(_Group(blocks[order[mine]], found.cols[at[mine, :most]], seen=seen))
        left[mine] = False
    return groups, order[left]


# (rows of X, query blocks, key blocks n m or None for all, mask) → what is added to the scores.
Added = Callable[[slice, Tensor, Tensor | None, Tensor | None], Tensor | None]


def _as_it_is(x: slice, at: Tensor, table: Tensor | None, mask: Tensor | None) -> Tensor | None:
    del x, at, table
    return mask


class Listed(Layout):
    """Blocks of `rows` queries meet the blocks of `cols` keys in which they may see anything.

    Cost and memory follow the listed blocks. Blocks are counted from the first key, so that
    the same pairs share a block whatever the number of queries.
    """

    def __init__(self, shape: Pattern, rows: int = 64, cols: int = 64) -> None:
        self.shape, self.rows, self.cols = shape, rows, cols

    def _chunks(
        self, q: Tensor, k: Tensor, scored: bool
    ) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]:
        """(rows of X, query blocks, key blocks n m or None for all, mask or None).

        Args:
            scored: scores are written out, so that chunks must keep these small too.
        """
        count, (queries, keys) = q.shape[0] * q.shape[1], (q.shape[2], k.shape[2])
        groups = _groups(self.shape, queries, keys, self.rows, self.cols)
        first = (keys - queries) // self.rows
        width = max(k.shape[3], self.rows if scored else 0) * k.element_size()
        for group in groups:
            if group.wide:
                each = max(1, pattern.WORKSPACE // (keys * width)) if scored else len(group.blocks)
                for x in range(count):
                    for blocks in group.blocks.split(each):
                        yield slice(x, x + 1), blocks - first, None, None
                continue
            most = group.table.shape[1] * self.cols
            masked = 0 if group.partial is None else 2 * self.rows * q.element_size()
            together = max(1, min(count, pattern.CACHED // max(most * width, 1)))
            each = max(1, pattern.CACHED // max(most * max(together * width, masked), 1))
            for start in range(0, len(group.blocks), each):
                part = slice(start, start + each)
                mask = self._mask(group, part, q, keys)
                for x in range(0, count, together):
                    yield (
                        slice(x, x + together),
                        group.blocks[part] - first,
                        group.table[part],
                        mask,
                    )

    def _mask(self, group: _Group, part: slice, q: Tensor, keys: int) -> Tensor | None:
        """(1, n | 1, rows | 1, m · cols), added to the scores."""
        if group.seen is not None:
            return additive(group.seen, q.dtype)[None, None].to(q.device)
        table = group.table[part]
        hidden = group.hidden
        partial = None if group.partial is None else group.partial[part]
        if partial is not None and not partial.any():
            partial = None
        if hidden is not None:
            hidden = hidden[part] if hidden[part].any() else None
        if hidden is None and partial is None:
            return None
        shown = table >= 0 if hidden is None else ~hidden
        base = additive(shown, q.dtype)[:, None, :, None]
        if partial is None:
            return base.expand(-1, -1, -1, self.cols).flatten(2)[None].to(q.device)
        mask = base.repeat(1, self.rows, 1, self.cols)
        n, m = partial.nonzero().unbind(1)
        i = (group.blocks[part][n] * self.rows)[:, None] + torch.arange(self.rows)
        j = (table[n, m] * self.cols)[:, None] + torch.arange(self.cols)
        seen = self.shape.sees(i[:, :, None].clamp(max=keys - 1), j[:, None], keys)
        mask[n, :, m] = additive(seen & (j < keys)[:, None], q.dtype)
        return mask.flatten(2)[None].to(q.device)

    def _rows(self, t: Tensor, queries: int, keys: int) -> Tensor:
        """X, blocks, rows · D, aligned with the blocks of keys."""
        front = (keys - queries) % self.rows
        length = -(-(front + queries) // self.rows) * self.rows
        return cut(t, -front, length).unflatten(1, (-1, self.rows)).flatten(2)

    def _keys(self, t: Tensor) -> Tensor:
        """X T D with zeros to whole blocks."""
        return cut(t, 0, -(-t.shape[2] // self.cols) * self.cols)

    def _take(self, t: Tensor, x: slice, at: Tensor, size: int) -> Tensor:
        """Blocks of t (X, N, size · D) by index (n, m): x n (m size) D."""
        found = t[x].index_select(1, at.flatten().to(t.device))
        return found.view(found.shape[0], at.shape[0], at.shape[1] * size, -1)

    def _back(self, t: Tensor, like: Tensor, keys: int) -> Tensor:
        """X, blocks, rows · D → the shape of the queries."""
        front = (keys - like.shape[2]) % self.rows
        rows = t.unflatten(2, (self.rows, -1)).flatten(1, 2)[:, front : front + like.shape[2]]
        return rows.unflatten(0, like.shape[:2])

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, added: Added = _as_it_is
    ) -> tuple[Tensor, Tensor]:
        queries, keys = q.shape[2], k.shape[2]
        wide = torch.promote_types(q.dtype, torch.float32)
        if not q.numel() or not keys:
            return v.new_zeros(*q.shape[:3], v.shape[3]), q.new_full(
                q.shape[:3], -torch.inf, dtype=wide
            )
        rows, key_rows, value_rows = self._rows(q, queries, keys), self._keys(k), self._keys(v)
        blocks = [t.unflatten(1, (-1, self.cols)).flatten(2) for t in (key_rows, value_rows)]
        o = v.new_zeros(*rows.shape[:2], self.rows * v.shape[3])
        lse = rows.new_full((*rows.shape[:2], self.rows), -torch.inf, dtype=wide)
        for x, at, table, mask in self._chunks(q, k, added is not _as_it_is):
            if table is None:
                query = self._take(rows, x, at[None], self.rows)
                key, value = key_rows[x, None, :keys], value_rows[x, None, :keys]
            else:
                query = self._take(rows, x, at[:, None], self.rows)
                key, value = (self._take(t, x, table, self.cols) for t in blocks)
            part, sums = tile_forward(query, key, value, added(x, at, table, mask), scale)
            at = at.to(o.device)
            o[x].index_copy_(1, at, part.reshape(part.shape[0], len(at), -1))
            lse[x].index_copy_(1, at, sums.reshape(part.shape[0], len(at), -1))
        return self._back(o, q, keys), self._back(lse, q, keys)[..., 0]

    def backward(
        self,
        do: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        o: Tensor,
        lse: Tensor,
        scale: float,
        added: Added = _as_it_is,
        tile: Callable[..., tuple[Tensor, Tensor, Tensor]] = tile_backward,
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys = q.shape[2], k.shape[2]
        if not q.numel() or not keys:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        given = [self._rows(t, queries, keys) for t in (do, q, o, lse[..., None])]
        key_rows, value_rows = self._keys(k), self._keys(v)
        blocks = [t.unflatten(1, (-1, self.cols)).flatten(2) for t in (key_rows, value_rows)]
        dq = torch.zeros_like(given[1])
        grads = torch.zeros_like(key_rows), torch.zeros_like(value_rows)
        folded = [t.unflatten(1, (-1, self.cols)).flatten(2) for t in grads]
        for x, at, table, mask in self._chunks(q, k, added is not _as_it_is):
            of = at[None] if table is None else at[:, None]
            do_, q_, o_, lse_ = (self._take(t, x, of, self.rows) for t in given)
            if table is None:
                key, value = key_rows[x, None, :keys], value_rows[x, None, :keys]
            else:
                key, value = (self._take(t, x, table, self.cols) for t in blocks)
            mask = added(x, at, table, mask)
            part, *key_parts = tile(do_, q_, key, value, o_, lse_[..., 0].contiguous(), mask, scale)
            dq[x].index_copy_(1, at.to(dq.device), part.reshape(part.shape[0], len(at), -1))
            for grad, target, each in zip(grads, folded, key_parts, strict=True):
                if table is None:
                    grad[x, :keys] += each[:, 0]
                else:
                    each = each.reshape(each.shape[0], table.numel(), -1)
                    target[x].index_add_(1, table.flatten().to(dq.device), each)
        dk, dv = (
            grad[:, :keys].unflatten(0, t.shape[:2]) for grad, t in zip(grads, (k, v), strict=True)
        )
        return self._back(dq, q, keys), dk, dv
