"""Softmax attention by tiles of its score matrix, exact, in memory that grows with the tokens.

Of one tile, three statistics suffice for each query: m = max s_j, Σ_j exp(s_j − m) and
Σ_j exp(s_j − m) v_j. Two sets of keys join when both are rescaled to the larger m. `flash` keeps
the output and its logsumexp and has its backward written out; `recomputed` keeps nothing and lets
autograd through each tile again, so that a hook that biases the scores may have gradients.

Which tiles are visited is a pattern's to say: what no query of a tile sees costs nothing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from longspan.engines import pattern
from longspan.engines.pattern import History, Pattern, PerHead
from longspan.errors import LongspanError
from longspan.shapes import Keep, Keys, Values

Hook = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Tiles = list[tuple[slice, bool]]  # keys, and whether every query of the block sees them all


class _Summary(NamedTuple):
    """Of some keys, for each query: Σ exp(s − top) v (X R V), Σ exp(s − top), top (X R 1)."""

    values: Tensor
    weights: Tensor
    top: Tensor


def _summarise(scores: Tensor, v: Tensor, kept: Tensor | None) -> _Summary:
    # The maximum cancels: it is a constant to the gradient (Rabe & Staats, 2021, Sec. 3).
    top = scores.detach().amax(-1, keepdim=True)
    weights = scores.sub_(_finite(top)).exp_()
    seen = weights if kept is None else weights * kept
    return _Summary(seen @ v.to(scores.dtype), weights.sum(-1, keepdim=True), top)


def _join(a: _Summary, b: _Summary) -> _Summary:
    top = torch.maximum(a.top, b.top)
    shares = [(part.top - _finite(top)).exp() for part in (a, b)]
    return _Summary(
        a.values * shares[0] + b.values * shares[1],
        a.weights * shares[0] + b.weights * shares[1],
        top,
    )


def _finish(found: _Summary) -> tuple[Tensor, Tensor]:
    """(o: X R V, logsumexp: X R)."""
    dead = found.weights == 0
    weights = found.weights.masked_fill(dead, 1)
    lse = (weights.log() + _finite(found.top)).masked_fill(dead, -math.inf)
    return found.values / weights, lse[..., 0]


def _finite(top: Tensor) -> Tensor:
    """0 where nothing was seen: −∞ less −∞ is no number."""
    return top.masked_fill(top == -math.inf, 0)


class _Spread:
    """A tensor that broadcasts to (…, L, S), by flat index of the leading axes."""

    def __init__(self, t: Tensor, lead: Sequence[int]) -> None:
        t = t[(None,) * (len(lead) + 2 - t.dim())]
        own = torch.arange(math.prod(t.shape[:-2]), device=t.device).view(t.shape[:-2])
        self.flat, self.at = t.reshape(own.numel(), *t.shape[-2:]), own.expand(*lead).reshape(-1)

    def _cut(self, flat: Tensor, i: slice, j: slice) -> Tensor:
        rows, cols = (
            s if size > 1 else slice(None) for s, size in zip((i, j), flat.shape[1:], strict=True)
        )
        return flat[:, rows, cols]

    def tile(self, x: slice, i: slice, j: slice) -> Tensor:
        """(X|1) (R|1) (C|1)."""
        found = self._cut(self.flat, i, j)
        return found if len(found) == 1 else found.index_select(0, self.at[x])

    def add(self, total: Tensor, x: slice, i: slice, j: slice, grad: Tensor) -> None:
        """Adds a tile's gradient (X R C) to `total`, of the shape of `flat`."""
        target = self._cut(total, i, j)
        single = [a for a in (1, 2) if target.shape[a] == 1]
        grad = grad.sum(single, keepdim=True) if single else grad
        target.index_add_(0, self.at[x], grad.to(total.dtype))


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is known of a softmax before any of its tiles is computed."""

    lead: tuple[int, ...]
    queries: int
    keys: int
    width: int
    offset: int
    shape: Pattern | PerHead
    seen: _Spread | None
    bias: _Spread | Hook | None
    dropout: float
    seed: int
    scale: float
    rows: int
    cols: int

    def ranges(self) -> list[tuple[slice, Pattern]]:
        """Leading indices that one tile takes together, and the pattern that they follow."""
        heads, count = self.lead[-1] if self.lead else 1, math.prod(self.lead)
        most = max(1, pattern.WORKSPACE // (self.rows * self.cols * 4))
        if callable(self.bias):
            most = -(-most // heads) * heads  # a hook may know each head by its place
        found, start = [], 0
        for shape, run in groupby(range(count), lambda x: self.shape.head(x % heads)):
            stop = start + len(list(run))
            found += [(slice(s, min(s + most, stop)), shape) for s in range(start, stop, most)]
            start = stop
        return found

    def visits(self, shape: Pattern) -> Iterator[tuple[slice, Tiles]]:
        """Each block of queries with the key tiles that any of them sees.

        Blocks are counted by position: a query shares its block with the same ones, however many
        come along.
        """
        starts = torch.arange(0, self.keys, self.cols)
        cols = starts, (starts + self.cols - 1).clamp(max=self.keys - 1)
        for start in range(-(self.offset % self.rows), self.queries, self.rows):
            i = slice(max(start, 0), min(start + self.rows, self.queries))
            rows = tuple(torch.tensor([at + self.offset]) for at in (i.start, i.stop - 1))
            met = shape.meets((rows[0], rows[1]), cols, self.keys)
            some, whole = (t.expand(len(starts)) for t in met)
            at = some.nonzero()[:, 0]
            low, high, full = (t[at].tolist() for t in (*cols, whole))
            yield i, [(slice(a, b + 1), w) for a, b, w in zip(low, high, full, strict=True)]

    def places(self, i: slice, j: slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Positions of queries and keys."""
        return (
            torch.arange(i.start, i.stop, device=device) + self.offset,
            torch.arange(j.start, j.stop, device=device),
        )

    def scores(
        self, q: Tensor, k: Tensor, shape: Pattern | None, x: slice, i: slice, j: slice
    ) -> Tensor:
        """X R C of one tile, in at least float32, −∞ where `shape` or `seen` hides."""
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = (q.to(wide) * self.scale) @ k.to(wide).mT
        if isinstance(self.bias, _Spread):
            scores += self.bias.tile(x, i, j)
        elif self.bias is not None:
            q, k = (t.unflatten(0, (-1, self.lead[-1])) for t in (q, k))
            added = self.bias(q, k, *self.places(i, j, q.device))
            scores += added.expand(*q.shape[:2], *scores.shape[1:]).flatten(0, 1)
        if shape is not None:
            at, of = self.places(i, j, torch.device("cpu"))
            hidden = ~shape.sees(at[:, None], of, self.keys)
            scores.masked_fill_(hidden.to(scores.device), -math.inf)
        if self.seen is not None:
            scores.masked_fill_(~self.seen.tile(x, i, j), -math.inf)
        return scores

    def kept(self, like: Tensor, x: slice, i: slice, j: slice) -> Tensor | None:
        """0 with probability `dropout`, else 1 / (1 − dropout), from (seed, x, i, j) alone."""
        if not self.dropout:
            return None
        row, col = (t.int() for t in self.places(i, j, like.device))
        key = _mixed(torch.tensor(self.seed, dtype=torch.int32, device=like.device))
        key = _mixed(key ^ torch.arange(x.start, x.stop, dtype=torch.int32, device=like.device))
        key = _mixed(key[:, None] ^ row)
        drawn = _mixed(key[:, :, None] ^ _mixed(~col))
        fine = drawn >= int(self.dropout * 2**32) - 2**31
        return fine.to(like.dtype).div_(1 - self.dropout)

    def again(self, run: Callable[..., Any], *inputs: Tensor) -> Any:
        """`run`, computed again in a backward pass; only a hook may be random."""
        if not torch.is_grad_enabled():
            return run(*inputs)
        hooked = callable(self.bias)
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=hooked)


def _mixed(x: Tensor) -> Tensor:
    """32-bit words, hashed in place one to one (the finaliser of MurmurHash3)."""
    for shift, below, factor in ((16, 0xFFFF, -2048144789), (13, 0x7FFFF, -1028477387)):
        x ^= (x >> shift) & below
        x *= factor
    x ^= (x >> 16) & 0xFFFF
    return x


def _row(
    plan: _Plan, shape: Pattern, x: slice, i: slice, tiles: Tiles, q: Tensor, *kv: Tensor
) -> tuple[Tensor, Tensor]:
    """(o, logsumexp) of one block of queries, from the key tiles that it sees: k, v, k, v, …"""

    def summarise(j: slice, whole: bool, q: Tensor, k: Tensor, v: Tensor) -> _Summary:
        scores = plan.scores(q, k, None if whole else shape, x, i, j)
        return _summarise(scores, v, plan.kept(scores, x, i, j))

    found = None
    for n, (j, whole) in enumerate(tiles):
        part = plan.again(partial(summarise, j, whole), q, kv[2 * n], kv[2 * n + 1])
        found = part if found is None else _join(found, part)
    if found is None:
        wide = torch.promote_types(q.dtype, torch.float32)
        none = q.new_zeros(*q.shape[:2], plan.width, dtype=wide)
        return none, none.new_full(q.shape[:2], -math.inf)
    return _finish(found)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        o = v.new_empty(*q.shape[:2], v.shape[2])
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_empty(q.shape[:2], dtype=wide)
        for x, shape in plan.ranges():
            for i, tiles in plan.visits(shape):
                kv = [t[x, j] for j, _ in tiles for t in (k, v)]
                o[x, i], lse[x, i] = _row(plan, shape, x, i, tiles, q[x, i], *kv)
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, o, lse, bias)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        q, k, v, o, lse, bias = ctx.saved_tensors
        dead, wide = lse == -math.inf, lse.dtype
        lse, dlse = lse.masked_fill(dead, 0), dlse.masked_fill(dead, 0)
        dq, dk, dv = (torch.zeros_like(t, dtype=wide) for t in (q, k, v))
        dbias = torch.zeros_like(bias) if ctx.needs_input_grad[4] else None
        with torch.autocast(q.device.type, enabled=False):
            for x, shape in plan.ranges():
                for i, tiles in plan.visits(shape):
                    of, do_i = lse[x, i, None], do[x, i].to(wide)
                    # Rows sum to Σ_j P_ij dP_ij = do_i · o_i, dropped weights included.
                    common = (do_i * o[x, i]).sum(-1, keepdim=True) - dlse[x, i, None]
                    for j, whole in tiles:
                        scores = plan.scores(q[x, i], k[x, j], None if whole else shape, x, i, j)
                        weights = scores.sub_(of).exp_()
                        kept = plan.kept(weights, x, i, j)
                        given = do_i @ v[x, j].to(wide).mT
                        if kept is None:
                            dv[x, j] += weights.mT @ do_i
                        else:
                            dv[x, j] += (weights * kept).mT @ do_i
                            given *= kept
                        dscores = given.sub_(common).mul_(weights)
                        if dbias is not None and isinstance(plan.bias, _Spread):
                            plan.bias.add(dbias, x, i, j, dscores)
                        dq[x, i] += dscores @ k[x, j].to(wide) * plan.scale
                        dk[x, j] += dscores.mT @ q[x, i].to(wide) * plan.scale
        return None, dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


# Loops over tiles: eager under torch.compile.
_flash: Any = torch.compiler.disable(_Flash.apply)


def _through(plan: _Plan, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """As `_Flash`, by autograd: of each row of tiles only its inputs outlive the forward pass."""
    ranges, outs = plan.ranges(), []
    pieces = (t.split([x.stop - x.start for x, _ in ranges]) for t in (q, k, v))
    for (x, shape), q_x, k_x, v_x in zip(ranges, *pieces, strict=True):
        visits, rows = list(plan.visits(shape)), []
        keys, values = k_x.split(plan.cols, 1), v_x.split(plan.cols, 1)
        blocks = q_x.split([i.stop - i.start for i, _ in visits], 1)
        for (i, tiles), q_i in zip(visits, blocks, strict=True):
            kv = [t[j.start // plan.cols] for j, _ in tiles for t in (keys, values)]
            run = partial(_row, plan, shape, x, i, tiles)
            rows.append(plan.again(run, q_i, *kv) if len(tiles) > 1 else run(q_i, *kv))
        outs.append([torch.cat(parts, 1) for parts in zip(*rows, strict=True)])
    o, lse = (torch.cat(parts) for parts in zip(*outs, strict=True))
    return o.to(q.dtype), lse


_recomputed: Any = torch.compiler.disable(_through)


def attend(
    q: Float[Tensor, "*X L D"],
    k: Float[Tensor, "*X S D"],
    v: Float[Tensor, "*X S V"],
    *,
    shape: Pattern | PerHead = pattern.everything,
    offset: int | None = None,
    seen: Bool[Tensor, "..."] | None = None,
    bias: Float[Tensor, "..."] | Hook | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    scale: float | None = None,
    rows: int = 64,
    cols: int = 256,
    recompute: bool = False,
) -> tuple[Float[Tensor, "*X L V"], Float[Tensor, "*X L"]]:
    """(o, logsumexp) of softmax attention by tiles, with memory O(L + S) both ways.

    Both results carry gradients. A row that sees nothing gives 0 and −∞.

    Args:
        shape: who may see whom; `PerHead` counts along the last leading axis.
        offset: position of the first query, by default S − L.
        seen, bias: broadcast to X L S; where False nothing is seen, and added to the scores. A
            bias may be a hook, (q, k, pos_q, pos_k) → addend to the scaled scores of one tile.
        dropout: of the weights, drawn from (seed, x, i, j) alone: whatever the tiles, in forward,
            in backward and in any call with that seed.
        generator: draws the seed where none is given, by default torch's global one.
        rows, cols: queries and keys of a tile.
        recompute: differentiate each tile anew by autograd rather than by the formula that needs
            only (q, k, v, o, logsumexp). Always so with a hook, whose own gradients it finds.

    Raises:
        LongspanError: tiles of no size, a dropout outside 0 ≤ p < 1, a hook with heads that follow
            patterns of their own.
    """
    lead, queries, keys = q.shape[:-2], q.shape[-2], k.shape[-2]
    if rows < 1 or cols < 1 or not 0 <= dropout < 1:
        raise LongspanError(
            f"attention by tiles of {rows} × {cols} with dropout {dropout}: tiles need at least "
            "1 × 1, and a dropout is at least 0 and below 1."
        )
    placed = _Spread(bias, lead) if isinstance(bias, Tensor) else bias
    if callable(placed) and len({shape.head(h) for h in range(lead[-1])}) > 1:
        raise LongspanError(
            "a bias that is computed sees all heads at once, and here they follow patterns of "
            "their own: give one pattern for all, or the bias as a tensor."
        )
    if seed is None:
        seed = int(torch.randint(2**31, (), generator=generator)) if dropout else 0
    plan = _Plan(
        lead=tuple(lead),
        queries=queries,
        keys=keys,
        width=v.shape[-1],
        shape=shape,
        offset=keys - queries if offset is None else offset,
        seen=None if seen is None else _Spread(seen, lead),
        bias=placed,
        dropout=dropout,
        seed=seed,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        rows=rows,
        cols=cols,
    )
    flat = [t.reshape(math.prod(lead), *t.shape[-2:]) for t in (q, k, v)]
    with torch.autocast(q.device.type, enabled=False):
        if (callable(placed) or recompute) and q.numel() and keys:
            o, lse = _recomputed(plan, *flat)
        else:
            o, lse = _flash(plan, *flat, placed.flat if isinstance(placed, _Spread) else None)
    return o.view(*lead, *o.shape[1:]), lse.view(*lead, queries)


def carry(
    k: Keys, v: Values, state: History | None, keep: Keep | None, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor | None, History | None]:
    """(k, v, keep) with what the state holds before them, and the state after them if `causal`.

    Keys and values that may not be seen are 0.
    """
    seen = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
    if keep is not None:
        k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
    if state is not None:
        k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
        keep = seen = torch.cat([state.keep, seen], 1)
    return k, v, keep, History(k, v, seen) if causal else None
