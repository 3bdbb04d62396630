"""Attention whose weights are products of features, φ(q)·φ(k): directions, maps, quotients.

A map gives its features in units of exp(log), one log a token, so that no exponential overflows.
A query's unit cancels in the quotient; the keys' running sums are kept in the largest unit *so
far*, and rescaled where it grows: a decay of `scan.outer`, never a maximum over later keys.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from longspan.engines import scan
from longspan.errors import LongspanError
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

# (x: B H L D, pos: B L or None) → (φ: B H L M, log: B H L or None): features φ·exp(log).
# Where log is chosen for the sake of range, it carries no gradient: it cancels.
Map = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
Kind = Literal["orthogonal", "hadamard", "givens", "iid"]
Norms = Literal["chi", "fixed"]

# Entrywise maps by name, for `generalised`.
ENTRYWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "relu": F.relu,
    "abs": torch.abs,
    "gelu": F.gelu,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "identity": torch.clone,
}

# The units of running sums are powers of exp(STEP), so that they seldom change.
STEP = 8.0

# Features of one piece of tokens, recomputed in the backward pass: 8 MiB in float32.
PIECE = 2**21


class Sums(NamedTuple):
    """Σ φ(k) [v, 1]ᵀ over the keys seen (B H M V+1), and their largest logarithm (B H) or None.

    The sums are in units of the exponential of that logarithm, rounded up to a multiple of STEP.
    """

    sums: Tensor
    top: Tensor | None


def directions(
    count: int,
    width: int,
    *,
    heads: int = 1,
    kind: Kind = "orthogonal",
    norms: Norms = "chi",
    generator: torch.Generator,
) -> Float[Tensor, "{heads} {count} {width}"]:
    """Random rows w, orthogonal within every block of `width` unless iid.

    `orthogonal` rows are Haar: the Q of a Gaussian block's QR with R's diagonal made positive, as
    LAPACK's own signs would bias the kernel. `hadamard` is (H D₁)(H D₂)(H D₃) with random signs
    D, `givens` are rounds of rotations in random disjoint planes. Norms are those of Gaussian
    rows (`chi`) or √width (`fixed`).

    Raises:
        LongspanError: an unknown kind or norm; `hadamard` with a width that is no power of two.
    """
    for what, value, known in (("kind of directions", kind, Kind), ("norm", norms, Norms)):
        if value not in get_args(known):
            raise LongspanError(f"no {what} '{value}'; expected {', '.join(get_args(known))}.")
    blocks = heads * -(-count // width)
    draw = partial(torch.randn, generator=generator)
    if kind == "iid":
        rows = draw(heads, count, width)
        units = rows / rows.norm(dim=-1, keepdim=True)
    else:
        build = {"orthogonal": _haar, "hadamard": _hadamard, "givens": _givens}[kind]
        units = build(blocks, width, generator).reshape(heads, -1, width)[:, :count]
        rows = units * draw(heads, count, width).norm(dim=-1, keepdim=True)
    return units * width**0.5 if norms == "fixed" else rows


def _haar(blocks: int, width: int, generator: torch.Generator) -> Tensor:
    q, r = torch.linalg.qr(torch.randn(blocks, width, width, generator=generator))
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT


def _hadamard(blocks: int, width: int, generator: torch.Generator) -> Tensor:
    if width & (width - 1):
        raise LongspanError(
            f"hadamard directions need a width that is a power of two and got {width}: "
            "choose another kind or head_width."
        )
    h = torch.ones(1, 1)
    while h.shape[0] < width:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)]) / 2**0.5
    rows = torch.eye(width).expand(blocks, width, width)
    for _ in range(3):
        signs = torch.randint(2, (blocks, 1, width), generator=generator) * 2.0 - 1
        rows = (rows @ h) * signs
    return rows


def _givens(blocks: int, width: int, generator: torch.Generator) -> Tensor:
    rows = torch.eye(width).repeat(blocks, 1, 1)
    half = width // 2
    # Twice log2(width) rounds of width / 2 planes mix every coordinate with every other.
    for _ in range(2 * max(width - 1, 1).bit_length()):
        order = torch.rand(blocks, width, generator=generator).argsort(-1)[:, None]
        at = [order[..., i * half : (i + 1) * half].expand(-1, width, -1) for i in (0, 1)]
        angle = torch.rand(blocks, 1, half, generator=generator) * (2 * math.pi)
        a, b = (rows.gather(-1, i) for i in at)
        rows = rows.scatter(-1, at[0], a * angle.cos() - b * angle.sin())
        rows = rows.scatter(-1, at[1], a * angle.sin() + b * angle.cos())
    return rows


class Directions(nn.Module):
    """Drawn rows as a buffer, (H|1 M D), so that a checkpoint reproduces them.

    Args:
        per_head: rows of each head's own, else shared by all.
        redraw_every: calls in training mode after which rows are drawn anew; None never. Not in
            evaluation, and not while a backward pass recomputes its forward pass. Where several
            forward passes precede their backward passes, call `redraw` between steps instead.
    """

    rows: Tensor
    draws: Tensor
    calls: Tensor

    def __init__(
        self,
        count: int,
        width: int,
        *,
        heads: int = 1,
        per_head: bool = False,
        kind: Kind = "orthogonal",
        norms: Norms = "chi",
        seed: int = 0,
        redraw_every: int | None = None,
    ) -> None:
        super().__init__()
        if min(count, width, heads) < 1 or (redraw_every is not None and redraw_every < 1):
            raise LongspanError(
                f"random directions got count={count}, width={width}, heads={heads}, "
                f"redraw_every={redraw_every}: expected 1 or more of each."
            )
        self.shape = count, width, heads if per_head else 1
        self.kind: Kind = kind
        self.norms: Norms = norms
        self.seed, self.redraw_every = seed, redraw_every
        self.register_buffer("rows", self._draw(seed))
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def _draw(self, seed: int) -> Tensor:
        count, width, heads = self.shape
        generator = torch.Generator().manual_seed(seed)
        return directions(
            count, width, heads=heads, kind=self.kind, norms=self.norms, generator=generator
        )

    def redraw(self, seed: int | None = None) -> None:
        """Draw anew, from `seed` or from the next of this module's own sequence of seeds."""
        self.draws += 1
        with torch.no_grad():
            drawn = self._draw(self.seed + int(self.draws) if seed is None else seed)
            # A new tensor: a graph may still hold the old one.
            self.rows = drawn.to(self.rows)

    def forward(self) -> Float[Tensor, "_ M D"]:
        recomputing = torch._C._current_graph_task_id() != -1
        if self.training and self.redraw_every is not None and not recomputing:
            if int(self.calls) == self.redraw_every:
                self.redraw()
                self.calls.zero_()
            self.calls += 1
        return self.rows


# -- maps ------------------------------------------------------------------------------------


def positive(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """exp(w·x − |x|²/2) / √M: positive, and E φ(x)·φ(y) = exp(x·y)."""
    return _exponential(x @ rows.to(x).mT, x)


def hyperbolic(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """[exp(w·x), exp(−w·x)] exp(−|x|²/2) / √(2M): less variance, twice the features."""
    scores = x @ rows.to(x).mT
    return _exponential(torch.cat([scores, -scores], -1), x)


def _exponential(scores: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    top = scores.detach().amax(-1, keepdim=True)
    log = top[..., 0] - x.square().sum(-1) / 2 - math.log(scores.shape[-1]) / 2
    return scores.sub_(top).exp_(), log


def trigonometric(x: Tensor, rows: Tensor, *, growing: bool = True) -> tuple[Tensor, Tensor | None]:
    """[cos(w·x), sin(w·x)] / √M, E φ(x)·φ(y) = exp(−|x − y|²/2); `growing`: times exp(|x|²/2)."""
    waves = _waves(x @ rows.to(x).mT)
    return waves, x.square().sum(-1) / 2 if growing else None


def phased(x: Tensor, rows: Tensor, phase: Tensor) -> tuple[Tensor, Tensor]:
    """√(2/M) cos(w·x + b) exp(|x|²/2) with b uniform on [0, 2π): one feature a direction."""
    scores = x @ rows.to(x).mT + phase.to(x)
    return scores.cos() * (2 / rows.shape[-2]) ** 0.5, x.square().sum(-1) / 2


class _Waves(torch.autograd.Function):
    """[cos, sin] / √M, each of which is the other's derivative: computed once."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        waves = torch.cat([scores.cos(), scores.sin()], -1).mul_(scores.shape[-1] ** -0.5)
        ctx.save_for_backward(waves)
        return waves

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dwaves: Tensor) -> Tensor:
        (cos, sin), (dcos, dsin) = (t.chunk(2, -1) for t in (*ctx.saved_tensors, dwaves))
        return (dsin * cos).addcmul_(dcos, sin, value=-1)


_waves: Any = _Waves.apply


def generalised(
    x: Tensor, rows: Tensor | None, f: Callable[[Tensor], Tensor], eps: float
) -> tuple[Tensor, None]:
    """f(W x) / √M + eps; without rows f(x) / √D + eps."""
    scores = x if rows is None else x @ rows.to(x).mT
    return f(scores) * scores.shape[-1] ** -0.5 + eps, None


def dpfp(x: Float[Tensor, "*rows D"], nu: int) -> Float[Tensor, "*rows 2*D*{nu}"]:
    """concat_s r ∘ roll(r, s), s = 1 … nu, r = relu([x; −x]): sparse, without parameters."""
    r = torch.cat([x, -x], -1).relu()
    around = torch.cat([r[..., -nu:], r], -1)  # roll(r, s) is a window of it
    return torch.cat([r * around.narrow(-1, nu - s, r.shape[-1]) for s in range(1, nu + 1)], -1)


# The maps that estimate exp(x·y), by name.
SOFTMAX: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "positive": positive,
    "hyperbolic": hyperbolic,
    "trigonometric": trigonometric,
}


# -- attention -------------------------------------------------------------------------------


def attend(
    phi: Map,
    q: Queries,
    k: Keys,
    v: Values,
    state: Sums | None = None,
    *,
    causal: bool,
    size: int,
    eps: float,
    keep: Keep | None = None,
    decay: Float[Tensor, "B H S"] | None = None,
    weight: Float[Tensor, "B H S"] | None = None,
    pos: Tensor | None = None,
    pos_q: Tensor | None = None,
) -> tuple[Outputs, Sums | None]:
    """o_i = φ(q_i)ᵀ Σ_s c_s φ(k_s) v_s / φ(q_i)ᵀ Σ_s c_s φ(k_s), features of `size` in pieces.

    Causally with c_s = weight_s Π_{s<r≤i} exp(decay_r). `pos` and `pos_q` are handed to φ with the
    keys and the queries; causal queries are at the last keys.
    """
    if not causal:
        sums = collect(phi, k, v, size=size, keep=keep, weight=weight, pos=pos)
        return read(phi, q, sums, size=size, eps=eps, pos=pos_q), None
    earlier = k.shape[2] - q.shape[2]
    q = F.pad(q, (0, 0, earlier, 0)) if earlier else q
    outs: list[Tensor] = []
    run = partial(_causal, phi, eps)
    tokens = (q, k, v, decay, weight, keep, pos)
    for piece, again in pieces(tokens, size):
        o, state = again(run, *piece, state)
        outs.append(o)
    return (outs[0] if len(outs) == 1 else torch.cat(outs, 2))[:, :, earlier:], state


def collect(
    phi: Map,
    k: Keys,
    v: Values,
    *,
    size: int,
    keep: Keep | None = None,
    weight: Float[Tensor, "B H S"] | None = None,
    pos: Tensor | None = None,
) -> Sums:
    """The sums over all keys: what a cross-attention computes once."""
    state: Sums | None = None
    for piece, again in pieces((k, v, weight, keep, pos), size):
        state = again(partial(_absorb, phi), *piece, state)
    assert state is not None
    return state


def read(
    phi: Map, q: Queries, state: Sums, *, size: int, eps: float, pos: Tensor | None = None
) -> Outputs:
    """The quotients of all queries over the same sums."""
    run = partial(_read, phi, eps)
    outs = [again(run, *piece, state) for piece, again in pieces((q, pos), size)]
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def turned(
    phi: Callable[[Tensor], Tensor],
    q: Queries,
    k: Keys,
    v: Values,
    state: Float[Tensor, "B H M W"] | None,
    turns: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
    *,
    causal: bool,
    eps: float,
    keep: Keep | None = None,
) -> tuple[Outputs, Float[Tensor, "B H M W"] | None]:
    """Σ_s (turns_0 φ(q))·(turns_1 φ(k_s)) v_s / (Σ_s φ(q)·φ(k_s) + eps): the numerator is turned.

    The state is the turned sum of φ(k) vᵀ and, as its last column, the plain sum of φ(k).
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        phi_q, phi_k = phi(q.to(wide)), phi(k.to(wide))
        if keep is not None:
            phi_k = phi_k.masked_fill(~keep[:, None, :, None], 0)
        above_of = turns[0](phi_q), turns[1](phi_k), v.to(wide)
        below_of = phi_q, phi_k, torch.ones_like(phi_k[..., :1])
        carried = None
        if causal:
            before = (None, None) if state is None else state.split([v.shape[3], 1], -1)
            above, s = scan.outer(*above_of, before[0])
            below, z = scan.outer(*below_of, before[1])
            carried = torch.cat([s, z], -1)
        else:
            above, below = scan.total(*above_of), scan.total(*below_of)
        return (above / (below + eps)).to(q.dtype), carried


def averaged(
    q: Queries,
    k: Keys,
    v: Values,
    state: tuple[Tensor, Tensor] | None,
    *,
    causal: bool,
    keep: Keep | None = None,
) -> tuple[Outputs, tuple[Tensor, Tensor] | None]:
    """q (Σ_s k_s v_sᵀ) / n over n kept keys, causally those so far; keys not kept are 0.

    The state is the sum (B H D V) and n (B).
    """
    kept = torch.ones_like(k[:, 0, :, 0]) if keep is None else keep.to(k.dtype)
    kept = kept.to(torch.promote_types(k.dtype, torch.float32))

    def share(o: Tensor, n: Tensor) -> Tensor:
        return o / n.clamp(min=1)[:, None, :, None].to(v.dtype)

    if not causal:
        return share(scan.total(q, k, v), kept.sum(1)[:, None]), None
    sums, seen = (None, kept.new_zeros(len(kept))) if state is None else state
    o, sums = scan.outer(q, k, v, sums)
    count = (seen[:, None] + kept.cumsum(1))[:, -q.shape[2] :]
    return share(o, count), (sums, seen + kept.sum(1))


def quotient(o: Float[Tensor, "B H L W"], floor: float | Tensor) -> Float[Tensor, "B H L _"]:
    """All columns but the last over the last, which is held at least `floor` away from 0."""
    below = o[..., -1:]
    held = torch.where(below < 0, -floor, floor).to(o)
    return o[..., :-1] / torch.where(below.abs() < floor, held, below)


def pieces(
    tensors: Sequence[Tensor | None], size: int
) -> list[tuple[tuple[Tensor | None, ...], Callable[..., Any]]]:
    """Tensors cut along their tokens, each cut with how to run a function on it.

    A piece holds about PIECE features, `size` a token and head. One piece runs as it is; of
    several, the backward pass recomputes what is inside.

    Tokens are axis 2 with heads, else axis 1. `split` gives back one gradient, where slices would
    give one of full length each.
    """
    first = tensors[0]
    assert first is not None
    length = max(PIECE // max(size * first.shape[0] * first.shape[1], 1), 4 * scan.CHUNK)
    length -= length % scan.CHUNK
    if first.shape[2] <= length:
        return [(tuple(tensors), _plainly)]
    again: Callable[..., Any] = _again
    cut = [None if t is None else t.split(length, 1 if t.dim() == 2 else 2) for t in tensors]
    count = -(-first.shape[2] // length)
    return [(tuple(None if c is None else c[i] for c in cut), again) for i in range(count)]


def matrix(attention: Callable[..., Any], q: Queries, k: Keys, keep: Keep | None = None) -> Tensor:
    """The weights (B H L S) an attention gives its values: what it returns for one-hot ones."""
    one = torch.eye(k.shape[2], dtype=q.dtype, device=q.device)
    return attention(q, k, one.expand(*k.shape[:2], -1, -1), keep=keep)[0]


def _plainly(run: Callable[..., Any], *arguments: Any) -> Any:
    return run(*arguments)


@torch.compiler.disable
def _again(run: Callable[..., Any], *arguments: Any) -> Any:
    """Run now, and once more in the backward pass instead of keeping the features."""
    if not torch.is_grad_enabled():
        return run(*arguments)
    return checkpoint(run, *arguments, use_reentrant=False, preserve_rng_state=False)


def _causal(
    phi: Map,
    eps: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    weight: Tensor | None,
    keep: Tensor | None,
    pos: Tensor | None,
    state: Sums | None,
) -> tuple[Tensor, Sums]:
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        keys, values, log = _keys(phi, k, v, weight, keep, pos)
        if decay is not None:
            decay = decay.to(wide)
            decay = decay if keep is None else decay.masked_fill(~keep[:, None], 0)
        last, floor = None, eps
        if log is not None:
            tops = torch.cat([_top(state, log)[..., None], log.detach()], -1).cummax(-1).values
            units = _unit(tops)
            before, after = units[..., :-1], units[..., 1:].nan_to_num(neginf=0)
            # Sums of nothing may fade by anything.
            fade = torch.where(before == -torch.inf, 0, before - after)
            decay = fade if decay is None else decay + fade
            values = values * (log - after).exp()[..., None]
            tops = tops[..., 1:].nan_to_num(neginf=0)
            last, floor = tops[..., -1], eps * (tops - after).exp()[..., None]
        queries, _ = phi(q.to(wide), pos)
        o, sums = scan.outer(queries, keys, values, state and state.sums, decay=decay)
        return quotient(o, floor).to(q.dtype), Sums(sums, last)


def _absorb(
    phi: Map,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    keep: Tensor | None,
    pos: Tensor | None,
    state: Sums | None,
) -> Sums:
    with torch.autocast(k.device.type, enabled=False):
        keys, values, log = _keys(phi, k, v, weight, keep, pos)
        top, before = None, None if state is None else state.sums
        if log is not None:
            old = _top(state, log)
            top = torch.maximum(old, log.detach().amax(-1)).nan_to_num(neginf=0)
            values = values * (log - _unit(top)[..., None]).exp()[..., None]
            if before is not None:
                before = before * (_unit(old) - _unit(top)).exp()[..., None, None]
        sums = keys.mT @ values
        return Sums(sums if before is None else sums + before, top)


def _read(phi: Map, eps: float, q: Tensor, pos: Tensor | None, state: Sums) -> Tensor:
    with torch.autocast(q.device.type, enabled=False):
        queries, _ = phi(q.to(torch.promote_types(q.dtype, torch.float32)), pos)
        floor = eps
        if (top := state.top) is not None:
            floor = eps * (top - _unit(top)).exp()[..., None, None]
        return quotient(queries @ state.sums, floor).to(q.dtype)


def _keys(
    phi: Map,
    k: Tensor,
    v: Tensor,
    weight: Tensor | None,
    keep: Tensor | None,
    pos: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """φ(k), weight · [v, 1] and φ's logarithm; keys that may not be seen weigh 0."""
    wide = torch.promote_types(k.dtype, torch.float32)
    unseen = None if keep is None else ~keep[:, None, :, None]
    if unseen is not None:
        k, v = k.masked_fill(unseen, 0), v.masked_fill(unseen, 0)
    features, log = phi(k.to(wide), pos)
    # With a column of ones beside v, one sum gives the numerator and the denominator.
    values = F.pad(v.to(wide), (0, 1), value=1.0)
    if weight is not None:
        values = values * weight.to(wide)[..., None]
    if unseen is not None:
        values = values.masked_fill(unseen, 0)
        log = None if log is None else log.masked_fill(unseen[..., 0], -torch.inf)
    return features, values, log


def _unit(top: Tensor) -> Tensor:
    return (top / STEP).ceil() * STEP


def _top(state: Sums | None, log: Tensor) -> Tensor:
    """The largest logarithm so far; −∞ where nothing was seen."""
    if state is None or state.top is None:
        return torch.full_like(log[..., 0], -torch.inf)
    seen = (state.sums[..., -1] != 0).any(-1)
    return state.top.detach().masked_fill(~seen, -torch.inf)
