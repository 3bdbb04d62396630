# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false
"""`scan.outer` in Triton: segments side by side, each from the state before it.

1. Every segment sums its own outer products; 2. one pass over these sums gives the state before
each segment; 3. every segment computes its outputs, chunk by chunk, its state in registers.
The gradients are three more such scans, two of them from the right: dq_t is a scan of (do, v, k),
dk_t of (v, do, q) and dv_t of (k, q, do), whose decay is that of the token behind.

Checked by Triton's interpreter in float32 and float16 (its bfloat16 products are wrong), compiled
for sm_90, without spilling at D = 64 in bfloat16; not yet run on a GPU, and not tuned.
"""

from typing import Any, no_type_check

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens of a chunk; and how many programs, at most about, share the work: a few a multiprocessor.
CHUNK, PROGRAMS = 64, 512


@triton.jit
@no_type_check
def _tile(base, at, length, width, WIDE: tl.constexpr):
    col = tl.arange(0, WIDE)
    inside = ((at >= 0) & (at < length))[:, None] & (col < width)[None, :]
    return tl.load(base + at[:, None] * width + col[None, :], mask=inside, other=0.0)


@triton.jit
@no_type_check
def _fade(decay, at, length):
    """Sums of a chunk's logarithms of decay, up to each token, and over all."""
    fade = tl.load(decay + at, mask=(at >= 0) & (at < length), other=0.0)
    return tl.cumsum(fade, 0), tl.sum(fade, 0)


@triton.jit
@no_type_check
def _sums(
    k, v, decay, states, fades, length, segment, width, value,
    CHUNK: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DECAYS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    row, n, count = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    state = tl.zeros((D, V), dtype=tl.float32)
    total = 0.0
    for start in range(n * segment, tl.minimum(n * segment + segment, length), CHUNK):
        at = start + tl.arange(0, CHUNK)
        if REVERSE:
            at = length - 1 - at
        ks = _tile(k + row * length * width, at, length, width, D)
        vs = _tile(v + row * length * value, at, length, value, V)
        if DECAYS:
            sums, end = _fade(decay + row * length, at, length)
            ks = (ks * tl.exp(end - sums)[:, None]).to(k.dtype.element_ty)
            state *= tl.exp(end)
            total += end
        state += tl.dot(tl.trans(ks), vs, input_precision="tf32x3")
    if DECAYS:
        tl.store(fades + row * count + n, total)
    i, j = tl.arange(0, D)[:, None], tl.arange(0, V)[None, :]
    # Slot 0 is that of the state before all.
    slot = states + (row * (count + 1) + n + 1) * width * value
    tl.store(slot + i * value + j, state, mask=(i < width) & (j < value))


@triton.jit
@no_type_check
def _pass(states, fades, count, size, BLOCK: tl.constexpr, DECAYS: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = states + row * (count + 1) * size + at
    running = tl.load(slot, mask=at < size, other=0.0)
    for n in range(count):
        if DECAYS:
            running *= tl.exp(tl.load(fades + row * count + n))
        slot += size
        running += tl.load(slot, mask=at < size, other=0.0)
        tl.store(slot, running, mask=at < size)


@triton.jit
@no_type_check
def _outputs(
    q, k, v, decay, states, o, length, segment, width, value, step_d, step_v,
    CHUNK: tl.constexpr, D: tl.constexpr, V: tl.constexpr,
    DECAYS: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    row, n, count = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    i, j = tl.arange(0, D)[:, None], tl.arange(0, V)[None, :]
    slot = states + (row * (count + 1) + n) * width * value + i * step_d + j * step_v
    state = tl.load(slot, mask=(i < width) & (j < value), other=0.0)
    turn = tl.arange(0, CHUNK)
    earlier = turn[:, None] >= turn[None, :]
    kind = k.dtype.element_ty
    for start in range(n * segment, tl.minimum(n * segment + segment, length), CHUNK):
        at = start + turn
        if REVERSE:
            at = length - 1 - at
        qs = _tile(q + row * length * width, at, length, width, D)
        ks = _tile(k + row * length * width, at, length, width, D)
        vs = _tile(v + row * length * value, at, length, value, V)
        scores = tl.dot(qs, tl.trans(ks), input_precision="tf32x3")
        out = tl.dot(qs, state.to(kind), input_precision="tf32x3")
        if DECAYS:
            sums, end = _fade(decay + row * length, at, length)
            pairs = tl.where(earlier, sums[:, None] - sums[None, :], float("-inf"))
            scores *= tl.exp(pairs)
            out *= tl.exp(sums)[:, None]
            ks = (ks * tl.exp(end - sums)[:, None]).to(kind)
            state *= tl.exp(end)
        else:
            scores = tl.where(earlier, scores, 0.0)
        out += tl.dot(scores.to(kind), vs, input_precision="tf32x3")
        state += tl.dot(tl.trans(ks), vs, input_precision="tf32x3")
        inside = ((at >= 0) & (at < length))[:, None] & (j < value)
        tl.store(o + row * length * value + at[:, None] * value + j, out, mask=inside)


def _sizes(k: Tensor, v: Tensor) -> tuple[int, int, int, int]:
    """Tokens of a segment and of a chunk, and the widths rounded up.

    A segment is whole chunks, so many that about `PROGRAMS` programs have work. Wide or float32
    chunks of 64 would spill registers.
    """
    (rows, length, width), value = k.shape, v.shape[2]
    d, e = (max(16, triton.next_power_of_2(n)) for n in (width, value))
    chunk = CHUNK if max(d, e) <= 64 and k.element_size() == 2 else CHUNK // 2
    return max(1, -(-length // chunk) * rows // PROGRAMS) * chunk, chunk, d, e


def _states(k: Tensor, v: Tensor, decay: Tensor | None, start: Tensor, reverse: bool) -> Tensor:
    """The state before each segment and after the last: X N+1 D V."""
    (rows, length, width), value = k.shape, v.shape[2]
    segment, *sizes = _sizes(k, v)
    count = -(-length // segment)
    states = start.new_empty(rows, count + 1, width, value)
    states[:, 0] = start
    fades = start.new_empty(rows, count)
    _sums[(rows, count)](
        k, v, k if decay is None else decay, states, fades, length, segment, width, value,
        *sizes, decay is not None, reverse, num_warps=4 if max(sizes) <= 64 else 8,
    )  # fmt: skip
    size = width * value
    _pass[(rows, -(-size // 1024))](
        states, fades, count, size, 1024, decay is not None, num_warps=4
    )
    return states


def _read(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    states: Tensor,
    reverse: bool,
    dtype: torch.dtype,
) -> Tensor:
    """What the queries read; `states` may be a transposed view."""
    (rows, length, width), value = k.shape, v.shape[2]
    segment, *sizes = _sizes(k, v)
    o = torch.empty_like(v, dtype=dtype)
    _outputs[(rows, -(-length // segment))](
        q, k, v, k if decay is None else decay, states, o, length, segment, width, value,
        states.stride(2), states.stride(3), *sizes, decay is not None, reverse,
        num_warps=4 if max(sizes) <= 64 else 8,
    )  # fmt: skip
    return o


class _Outer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, start: Tensor, decay: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        flat = [t.flatten(0, 1).contiguous() for t in (q, k, v)]
        fade = None if decay is None else decay.flatten(0, 1).contiguous()
        states = _states(flat[1], flat[2], fade, start.flatten(0, 1), False)
        o = _read(*flat, fade, states, False, dtype)
        ctx.save_for_backward(*flat, states, fade)
        ctx.heads = q.shape[:2]
        return o.view_as(v), states[:, -1].reshape(start.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        *flat, states, fade = ctx.saved_tensors
        do, dlast = do.flatten(0, 1).contiguous(), dlast.flatten(0, 1)
        # A quotient's gradient cancels: where its output is wide, so is all that meets it.
        q, k, v = (t.to(do.dtype) for t in flat)
        kind = flat[0].dtype
        # The sums behind a decay's gradient cancel: its terms must not be rounded first.
        dtype = torch.float32 if ctx.needs_input_grad[4] else kind
        behind = None if fade is None else F.pad(fade[:, 1:], (0, 1))
        dstates = _states(q, do, behind, dlast, True)
        dq = _read(do, v, k, fade, states.mT, False, dtype)
        dk = _read(v, do, q, behind, dstates.mT, True, dtype)
        dv = _read(k, q, do, behind, dstates, True, kind)
        dstart, dfade = dstates[:, -1], None
        if fade is not None:
            dstart = dstart * fade[:, :1, None].exp()
        if ctx.needs_input_grad[4]:
            # A decay scales all that later tokens take from earlier ones, and the end.
            taken = (q * dq - k * dk).sum(-1)
            end = (states[:, -1] * dlast).sum((1, 2))[:, None]
            dfade = taken.flip(1).cumsum(1, dtype=torch.float64).flip(1).float() + end
            dfade = dfade.unflatten(0, ctx.heads)
        grads = (dq.to(kind), dk.to(kind), dv, dstart)
        return (*(t.unflatten(0, ctx.heads) for t in grads), dfade, None)


@torch.compiler.disable
def outer(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """o_t = q_tᵀ S_t in `dtype`, with S_t = exp(decay_t) S_{t−1} + k_t v_tᵀ, and the last S.

    q, k: B H L D, v: B H L V, state: B H D V in float32, decay: B H L in float32 or None.
    """
    kind = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    return _Outer.apply(q.to(kind), k.to(kind), v.to(kind), state, decay, dtype)
