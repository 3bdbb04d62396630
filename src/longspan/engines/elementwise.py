"""Recurrences that act on each channel alone: h_t = f_t h_{t−1} + u_t, and one gated by itself."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Sequence = Float[Tensor, "B L E"]
Start = Float[Tensor, "B E"]
CHUNK = 32


def linear(f: Sequence, u: Sequence, start: Start) -> Sequence:
    """h_t = f_t ∘ h_{t−1} + u_t, h_{−1} = start, without a loop over tokens.

    Chunks of 32 tokens are doubled up, log₂ 32 passes of products and sums, and so are their ends
    in turn: nothing is divided by a product of decays, which would underflow.
    """
    wide = torch.promote_types(u.dtype, torch.float32)
    return _linear(f.to(wide), u.to(wide), start.to(wide)).to(u.dtype)


def gated(
    candidate: Sequence, forget: Sequence, weight: Float[Tensor, "E"] | None, start: Start
) -> Sequence:
    """c_t = f_t ∘ c_{t−1} + (1 − f_t) ∘ candidate_t,  f_t = σ(forget_t + weight ∘ c_{t−1}).

    With a weight c_t is no linear function of c_{t−1}, and forward is token by token; backward is
    linear along the sequence, and without one so is forward. Where `forget` is infinite, c stays.
    """
    if weight is None:
        f = forget.sigmoid()
        return linear(f, (1 - f) * candidate, start)
    wide = torch.promote_types(candidate.dtype, torch.float32)
    given = (t.to(wide) for t in (candidate, forget, weight, start))
    return _gated(*given).to(candidate.dtype)


def _scan(f: Tensor, u: Tensor, start: Tensor) -> Tensor:
    length = f.shape[1]
    if length == 1:
        return f * start[:, None] + u
    short = -length % CHUNK if length > CHUNK else 0
    if short:
        f, u = (torch.nn.functional.pad(t, (0, 0, 0, short)) for t in (f, u))
    size = min(CHUNK, length)
    f, u = (t.unflatten(1, (-1, size)).clone() for t in (f, u))  # B N C E
    step = 1
    while step < size:
        # h over `step` tokens becomes h over twice as many.
        more = f[:, :, step:] * u[:, :, :-step]
        u[:, :, step:] += more
        f[:, :, step:] *= f[:, :, :-step].clone()
        step *= 2
    before = start[:, None]
    if u.shape[1] > 1:
        ends = _scan(f[:, :-1, -1], u[:, :-1, -1], start)
        before = torch.cat([before, ends], 1)
    return (u + f * before[:, :, None]).flatten(1, 2)[:, :length]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor, u: Tensor, start: Tensor) -> Tensor:
        h = _scan(f, u, start) if f.shape[1] else u
        ctx.save_for_backward(f, h, start)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f, h, start = ctx.saved_tensors
        du = _adjoint(f, dh)
        return du * _before(h, start), du, _first(f * du, start)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, candidate: Tensor, forget: Tensor, weight: Tensor, start: Tensor
    ) -> Tensor:
        c, out = start, torch.empty_like(candidate)
        for t in range(candidate.shape[1]):
            f = torch.addcmul(forget[:, t], c, weight).sigmoid_()
            c = torch.lerp(candidate[:, t], c, f)
            out[:, t] = c
        ctx.save_for_backward(candidate, forget, weight, start, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dc: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        candidate, forget, weight, start, c = ctx.saved_tensors
        before = _before(c, start)
        f = (forget + weight * before).sigmoid()
        slope = f * (1 - f) * (before - candidate)  # ∂c_t / ∂forget_t
        along = f + weight * slope  # ∂c_t / ∂c_{t−1}
        total = _adjoint(along, dc)
        dforget = total * slope
        dweight = (dforget * before).sum((0, 1))
        return total * (1 - f), dforget, dweight, _first(along * total, start)


def _adjoint(f: Tensor, dh: Tensor) -> Tensor:
    """a_t = dh_t + f_{t+1} a_{t+1}."""
    if not dh.shape[1]:
        return dh
    later = torch.cat([f[:, 1:], torch.zeros_like(f[:, :1])], 1)
    return _scan(later.flip(1), dh.flip(1), torch.zeros_like(dh[:, 0])).flip(1)


def _before(h: Tensor, start: Tensor) -> Tensor:
    return torch.cat([start[:, None], h[:, :-1]], 1)[:, : h.shape[1]]


def _first(t: Tensor, start: Tensor) -> Tensor:
    return t[:, 0] if t.shape[1] else torch.zeros_like(start)


# Loops of unknown length: eager under torch.compile.
_linear: Any = torch.compiler.disable(_Linear.apply)
_gated: Any = torch.compiler.disable(_Gated.apply)
