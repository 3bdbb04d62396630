"""Content-chosen sparsity: give tokens buckets, sort by them, attend near by, undo the sort.

Buckets carry no gradient. A token stands in one slot of each round's sorted list; the rounds are
joined under one softmax, so a pair that meets in several rounds counts as often unless `unique`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longspan.engines import dense, pattern
from longspan.engines.dense import Layout, merge
from longspan.engines.pattern import Blocks
from longspan.errors import LongspanError
from longspan.shapes import Keep

Buckets = Int[Tensor, "B H R L"]


def rotations(
    heads: int,
    rounds: int,
    width: int,
    factors: Sequence[int],
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "H R D F"]:
    """Fresh Gaussian directions for `hash_angles`, F = Σ factors / 2; on the CPU, float32."""
    return torch.randn(heads, rounds, width, sum(factors) // 2, generator=generator)


@torch.no_grad()
def hash_angles(
    x: Float[Tensor, "B H L D"], directions: Float[Tensor, "H R D F"], factors: Sequence[int]
) -> Buckets:
    """h(x) = argmax [x R ; −x R] for each round, several factors in mixed radix.

    Two vectors at angle θ share one of two buckets with probability 1 − θ/π (Andoni et al., 2015).
    Works in pieces of the sequence, so memory does not hold L × F products.
    """
    # In at least float32, or rounding would move tokens between buckets.
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    directions = directions.to(x.device, x.dtype)
    found = x.new_empty(*x.shape[:2], directions.shape[1], x.shape[2], dtype=torch.long)
    step = max(
        1,
        pattern.WORKSPACE // max(1, x.shape[0] * directions[..., 0, :].numel() * x.element_size()),
    )
    for start in range(0, x.shape[2], step):
        with torch.autocast(x.device.type, enabled=False):
            piece = x[:, :, None, start : start + step] @ directions
        base, at, code = 1, 0, piece.new_zeros(piece.shape[:-1], dtype=torch.long)
        for factor in factors:
            part = piece[..., at : at + factor // 2]
            code += base * torch.cat([part, -part], -1).argmax(-1)
            base, at = base * factor, at + factor // 2
        found[..., start : start + step] = code
    return found


def factor(buckets: int | Sequence[int]) -> tuple[int, ...]:
    """The even factors of a bucket count; many buckets hash in two factors of about the root.

    Raises:
        LongspanError: an odd or non-positive factor.
    """
    if isinstance(buckets, int):
        root = 1 << (buckets.bit_length() // 2)
        split = buckets > 256 and buckets % root == 0 and buckets // root % 2 == 0
        buckets = (root, buckets // root) if split else (buckets,)
    if any(b < 2 or b % 2 for b in buckets):
        raise LongspanError(
            f"buckets {tuple(buckets)} do not hash by signs: every factor must be even and ≥ 2."
        )
    return tuple(buckets)


@dataclass(frozen=True)
class Order:
    """Where tokens stand in a list of `size` slots, that of all rounds, cut in blocks.

    Args:
        slot: B H R L, a slot for each token and round.
        ring: B H, the filled slots when the list closes to a ring: what lies before its first
            block is its last. None: nothing lies beyond the ends.
    """

    slot: Int[Tensor, "B H R L"]
    size: int
    block: int
    ring: Int[Tensor, "B H"] | None = None


@torch.no_grad()
def packed_order(buckets: Buckets, keep: Keep, block: int) -> Order:
    """Sorted by (bucket, position) without gaps, round after round, as a ring.

    Kept tokens must have the lower buckets; they fill whole blocks, so that masked ones, which
    stand behind all rounds, move nothing. Later tokens move the borders of blocks.
    """
    rounds, length = buckets.shape[2:]
    rank = buckets.argsort(dim=-1, stable=True).argsort(dim=-1)
    kept = keep.sum(1).view(-1, 1, 1, 1)
    filled = (-(-kept // block)).clamp(min=1) * block  # slots of one round
    turn = torch.arange(rounds, device=rank.device)[:, None]
    behind = rounds * filled + turn * (length - kept) + rank - kept
    slot = torch.where(rank < kept, turn * filled + rank, behind)
    size = int(slot.max()) // block * block + block if slot.numel() else block
    ring = (rounds * filled)[..., 0, 0].expand(-1, rank.shape[1])
    return Order(slot, size, block, ring)


@torch.no_grad()
def aligned_order(buckets: Buckets, count: int, block: int) -> Order:
    """Sorted by (bucket, position), every bucket starting a new block.

    A token's slot within its bucket depends on earlier tokens only, and so does what its block
    holds before it: strictly causal, bit for bit.
    """
    length = buckets.shape[-1]
    order = buckets.argsort(dim=-1, stable=True)
    ids = buckets.gather(-1, order)
    sizes = torch.zeros(*buckets.shape[:-1], count, dtype=torch.long, device=buckets.device)
    sizes.scatter_add_(-1, buckets, torch.ones_like(buckets))
    roomy = -(-sizes // block) * block
    start, padded = sizes.cumsum(-1) - sizes, roomy.cumsum(-1) - roomy
    slots = padded.gather(-1, ids) + torch.arange(length, device=ids.device) - start.gather(-1, ids)
    slot = torch.empty_like(slots).scatter_(-1, order, slots)
    size = int(roomy.sum(-1).max()) if roomy.numel() else 0
    turn = torch.arange(buckets.shape[2], device=buckets.device)[:, None]
    return Order(slot + turn * size, size * buckets.shape[2], block)


class Sorted(Layout):
    """Each token meets tokens near it in the sorted lists of all rounds.

    Args:
        order: where tokens stand. buckets: B H R L, for `same`.
        before, after: reach in slots: of whole blocks, or with `sliding` of the token itself.
        causal: only keys at earlier or equal positions.
        same: only keys of the same bucket.
        apart: a token does not meet itself.
        unique: subtract the log of the number of rounds in which a pair meets.
        keep: keys that may be seen.
    """

    def __init__(
        self,
        order: Order,
        buckets: Buckets,
        *,
        before: int,
        after: int = 0,
        sliding: bool = False,
        causal: bool = False,
        same: bool = False,
        apart: bool = False,
        unique: bool = False,
        keep: Keep | None = None,
    ) -> None:
        self.order, self.buckets, self.keep = order, buckets, keep
        self.before, self.after, self.sliding = before, after, sliding
        self.causal, self.same, self.apart, self.unique = causal, same, apart, unique
        block = order.block
        self.reach = tuple(-(-r // block) * block for r in (before, after))

    def _parts(self, q: Tensor) -> Iterator["_Part"]:
        rows = q.shape[0] * q.shape[1]
        each = self.order.size * q.shape[3] * q.element_size()
        together = max(1, 2 * pattern.WORKSPACE // max(each, 1))
        for start in range(0, rows, together):
            yield _Part(self, slice(start, min(start + together, rows)), q.shape[1])

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(q.dtype, torch.float32)
        o, lse = v.new_empty(*q.shape[:3], v.shape[3]), v.new_empty(q.shape[:3], dtype=wide)
        flat, flat_o, flat_lse = (q, k, v), o.flatten(0, 1), lse.flatten(0, 1)
        q, k, v = (t.flatten(0, 1) for t in flat)
        for part in self._parts(flat[0]) if q.numel() else ():
            rows = part.rows
            out, sums = part.blocks(q.dtype).forward(
                part.sort(q[rows]), part.sort_keys(k[rows]), part.sort_keys(v[rows]), scale
            )
            outs, all_sums = part.unsort(out), part.unsort(sums[..., None])[..., 0]
            joined = merge(list(zip(outs.unbind(1), all_sums.unbind(1), strict=True)))
            flat_o[rows], flat_lse[rows] = joined
        return o, lse

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dq, dk, dv = (t.view(-1, *t.shape[2:]) for t in grads)
        shape = q
        do, q, k, v, o, lse = (t.flatten(0, 1) for t in (do, q, k, v, o, lse))
        for part in self._parts(shape) if q.numel() else ():
            rows = part.rows
            query, key, value = part.blocks(q.dtype).backward(
                part.sort(do[rows]),
                part.sort(q[rows]),
                part.sort_keys(k[rows]),
                part.sort_keys(v[rows]),
                part.sort(o[rows]),
                part.sort(lse[rows][..., None])[..., 0],
                scale,
            )
            dq[rows] = part.unsort(query).sum(1)
            dk[rows] = part.unsort(part.fold(key)).sum(1)
            dv[rows] = part.unsort(part.fold(value)).sum(1)
        return grads


class _Part:
    """Some rows (batch × heads) of a `Sorted`: their permutation and masks."""

    def __init__(self, layout: Sorted, rows: slice, heads: int) -> None:
        self.layout, self.rows = layout, rows
        order = layout.order
        slot = order.slot.flatten(0, 1)[rows]  # X R L
        (self.count, rounds, self.length), self.total = slot.shape, order.size
        self.row_slots, self.slots = slot, slot.flatten(1)
        device = slot.device
        where = torch.arange(self.length, device=device).expand(self.count, rounds, -1)
        self.tokens = self._placed(where, -1)  # −1 and, among keys, L: no token stands there
        before, after = layout.reach
        near = torch.arange(-before, self.total + after, device=device).expand(self.count, -1)
        self.ring: Tensor | None = None
        if order.ring is None:
            self.outside = (near < 0) | (near >= self.total)
        else:
            ring = order.ring.flatten(0, 1)[rows][:, None]
            self.ring = ring
            near = torch.where(near < ring + after, near % ring, near)
            self.outside = near >= self.total
        self.near = near.clamp(0, self.total - 1)  # the slot that each place of the key list shows
        self.row_buckets = layout.buckets.flatten(0, 1)[rows]
        keys = self.tokens.gather(1, self.near)
        hidden = self.outside | (keys < 0)
        if layout.keep is not None:
            batch = torch.arange(rows.start, rows.stop, device=device) // heads
            hidden |= ~layout.keep[batch].gather(1, keys.clamp(min=0))
        self.keys = keys.masked_fill(hidden, self.length)
        # One number for round and bucket: equal only where both are.
        turn = torch.arange(rounds, device=device)[:, None]
        codes = self._placed(self.row_buckets * rounds + turn, -1)
        self.codes, self.key_codes = codes, codes.gather(1, self.near)

    def _placed(self, t: Tensor, empty: int) -> Tensor:
        """X R L → X slots."""
        slots = t.new_full((self.count, self.total), empty)
        return slots.scatter_(1, self.slots, t.flatten(1))

    def _rows(self, t: Tensor, index: Tensor) -> Tensor:
        """Rows of t (X, T, D) by index (X, n); index_select is ten times faster than gather."""
        base = torch.arange(t.shape[0], device=t.device)[:, None] * t.shape[1]
        flat = t.reshape(-1, t.shape[-1]).index_select(0, (index + base).flatten())
        return flat.view(*index.shape, t.shape[-1])

    def sort(self, t: Tensor) -> Tensor:
        """X L D → X (R T) D; an empty slot holds zeros."""
        rows = self._rows(t, self.tokens.clamp(min=0))
        return rows.masked_fill_((self.tokens < 0)[..., None], 0)

    def sort_keys(self, t: Tensor) -> Tensor:
        """The same with what lies before and after; empty slots hold any token, masked."""
        return self._rows(t, self.keys.clamp(max=self.length - 1))

    def unsort(self, t: Tensor) -> Tensor:
        """X (R T) D → X R L D."""
        rounds = self.row_slots.shape[1]
        return rearrange(self._rows(t, self.slots), "X (R L) D -> X R L D", R=rounds)

    def fold(self, t: Tensor) -> Tensor:
        """Gradients of `sort_keys`' list returned to the slots that it shows."""
        before, _ = self.layout.reach
        inside = t[:, before : before + self.total]
        if self.layout.order.ring is None:
            return inside
        base = torch.arange(self.count, device=t.device)[:, None] * self.total
        t = t.masked_fill(self.outside[..., None], 0).flatten(0, 1)
        folded = torch.zeros_like(inside).flatten(0, 1)
        return folded.index_add_(0, (self.near + base).flatten(), t).view_as(inside)

    def blocks(self, dtype: torch.dtype) -> Blocks:
        layout, order = self.layout, self.layout.order
        size, (before, after) = order.block, layout.reach
        span = before + size + after
        steps = torch.arange(size, device=self.tokens.device)[:, None] + before
        steps = steps - torch.arange(span, device=steps.device)
        band = (steps <= layout.before) & (steps >= -layout.after)

        def mask(first: int, last: int) -> Tensor:
            queries = slice(first * size, last * size)
            places = slice(first * size, (last - 1) * size + span)

            def pairs(of_slots: Tensor, of_places: Tensor) -> tuple[Tensor, Tensor]:
                own = of_slots[:, queries].unflatten(1, (-1, size))[..., None]
                return own, of_places[:, places].unfold(1, span, size)[:, :, None]

            i, j = pairs(self.tokens, self.keys)  # X n Q 1, X n 1 K
            if layout.causal:  # empty queries are −1, empty keys L: neither is seen
                seen = i > j if layout.apart else i >= j
            else:
                seen = (i >= 0) & (j < self.length)
                seen = seen & (i != j) if layout.apart else seen
            if layout.sliding:
                seen &= band
            if layout.same:
                seen &= torch.eq(*pairs(self.codes, self.key_codes))
            added = torch.where(seen, 0.0, -math.inf).to(dtype)
            if layout.unique:
                i, j = i.clamp(min=0), j.clamp(max=self.length - 1)
                added -= self._meetings(i, j).clamp(min=1).to(dtype).log()
            return added

        return Blocks(size, before, after, mask)

    def _meetings(self, i: Tensor, j: Tensor) -> Tensor:
        """How often i sees j, over all places where both stand."""
        layout, size = self.layout, self.layout.order.block
        total = torch.zeros((), dtype=torch.long, device=i.device)
        rounds = self.row_slots.unbind(1)
        for r, slots in enumerate(rounds):
            own = _at(slots, i)
            for s, others in enumerate(rounds):
                if layout.same and r != s:
                    continue
                met = self._sights(own, _at(others, j), size)
                if layout.same:
                    codes = self.row_buckets[:, r]
                    met = met * (_at(codes, i) == _at(codes, j))
                total = total + met
        return total

    def _sights(self, i: Tensor, j: Tensor, size: int) -> Tensor:
        """How often slot j lies within reach of slot i; on a short ring more than once."""
        before, after = self.layout.before, self.layout.after
        if self.layout.sliding:
            steps = i - j
            return ((steps <= before) & (steps >= -after)).long()
        steps, before, after = j // size - i // size, before // size, after // size
        if self.ring is None:
            return ((steps >= -before) & (steps <= after)).long()
        # The whole numbers m with −before ≤ steps + m · ring ≤ after.
        ring = (self.ring // size)[:, :, None, None]
        return (after - steps) // ring - (-before - 1 - steps) // ring


class Itself(Layout):
    """Every query meets its own key, with `addend` on the score."""

    def __init__(self, addend: float, keep: Keep) -> None:
        self.addend, self.keep = addend, keep

    def _scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) * k.to(wide)).sum(-1) * scale + self.addend
        return scores.masked_fill(~self.keep[:, None], -math.inf)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        return v, self._scores(q, k, scale)

    def backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = (self._scores(q, k, scale) - lse).exp()[..., None]
        rise = (do * (v - o)).sum(-1, keepdim=True)
        dscores = (weights * rise * scale).to(q.dtype)
        return dscores * k, dscores * q, (weights * do).to(v.dtype)


def _at(values: Tensor, token: Tensor) -> Tensor:
    """values (X, L) at tokens (X, n, a, b)."""
    return values.gather(1, token.flatten(1)).view(token.shape)


class Hashed(NamedTuple):
    """Every key and value seen, which of them may be seen, and their buckets in each round."""

    k: Float[Tensor, "B H S D"]
    v: Float[Tensor, "B H S V"]
    keep: Bool[Tensor, "B S"]
    buckets: Int[Tensor, "B H R S"]


def grow(
    table: Hashed | None,
    q: Float[Tensor, "B H L D"],
    v: Float[Tensor, "B H L V"],
    keep: Bool[Tensor, "B L"] | None,
    directions: Float[Tensor, "H R D F"],
    factors: Sequence[int],
) -> Hashed:
    """The table with L tokens more, whose keys are their queries at unit length.

    Masked tokens fall into a bucket of their own, behind all others.
    """
    seen = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if keep is None else keep
    q, v = (t.masked_fill(~seen[:, None, :, None], 0) for t in (q, v))
    unit = F.normalize(q.to(torch.promote_types(q.dtype, torch.float32)), dim=-1, eps=1e-6)
    buckets = hash_angles(unit, directions, factors)
    grown = Hashed(unit.to(q.dtype), v, seen, buckets)
    if table is not None:
        if table.buckets.shape[2] != buckets.shape[2]:
            raise LongspanError(
                f"the state was hashed in {table.buckets.shape[2]} rounds and this call in "
                f"{buckets.shape[2]}: change rounds only where a sequence begins."
            )
        pairs = zip(table, grown, (2, 2, 1, 3), strict=True)
        grown = Hashed(*(torch.cat([old, new], axis) for old, new, axis in pairs))
    hidden = ~grown.keep[:, None, None]  # tokens of rows that were reset too
    return grown._replace(buckets=grown.buckets.masked_fill(hidden, math.prod(factors)))


def attend(
    q: Float[Tensor, "B H L D"], table: Hashed, layout: Sorted, *, own: float
) -> Float[Tensor, "B H L V"]:
    """The last L tokens of the table attend under `layout`, and to themselves at `own` more.

    Scores are not scaled. The token itself is a part of its own: an addend as large as −1e5 among
    the others' scores would cost their low bits.
    """
    length, keys = q.shape[2], table.k.shape[2]
    q = q.masked_fill(~table.keep[:, None, keys - length :, None], 0)
    parts = [(part, table.k, table.v) for part in (layout, Itself(own, table.keep))]
    o, _ = dense.union(F.pad(q, (0, 0, keys - length, 0)), parts, scale=1.0)
    return o[:, :, keys - length :]


def step(
    q: Float[Tensor, "B H 1 D"],
    table: Hashed,
    *,
    own: float,
    before: int | None = None,
    recent: int = 0,
    unique: bool = False,
) -> Float[Tensor, "B H 1 V"]:
    """The last token attends to the table's tokens of its buckets, without sorting anything.

    Args:
        own: addend where it meets itself.
        before: only so many earlier tokens of its bucket; None for all.
        recent: the last tokens, met whatever their bucket.
        unique: a key that it meets in several rounds counts once.
    """
    seen = table.keep[:, None, None]
    met = (table.buckets == table.buckets[..., -1:]) & seen
    if before is not None:
        met &= met.flip(-1).cumsum(-1).flip(-1) <= before + 1
    times = met.sum(2, keepdim=True)
    late = table.keep & (table.keep.flip(-1).cumsum(-1).flip(-1) <= recent)
    times = torch.where(late[:, None, None], times.clamp(min=1), times)
    weight = times.clamp(min=1).to(q.dtype).log() if not unique else torch.zeros_like(q[..., :1])
    bias = F.pad(weight.expand(*q.shape[:2], 1, seen.shape[-1])[..., :-1], (0, 1), value=own)
    return dense.explicit(q, table.k, table.v, seen=times > 0, bias=bias, scale=1.0)[0]


def check_shared(name: str, q: Tensor, k: Tensor) -> None:
    """Refuse keys that are not the queries (by storage, which fake tensors do not have)."""
    if q is not k and not torch.compiler.is_compiling() and q.data_ptr() != k.data_ptr():
        raise LongspanError(f"{name} uses its queries as keys: pass the same tensor as q and k.")
