"""Residual steps that can be undone, so that the backward pass computes activations again.

Two streams of one shape. A step adds to one what it reads from the other, and they swap:

    (a, b) → (b, a + f(b)),    undone by    (p, q) → (q − f(p), p)

Two steps, F and G, are a block: y_1 = x_1 + F(x_2), y_2 = x_2 + G(y_1) (Gomez et al., 2017, Eqs. 6
and 7). Nothing is kept of any step but the outputs of the last; what a step drew from torch's
global generators, the buffers it changed and autocast are as they were when it is computed again.
Streams are float32 at least: in less, undoing loses what adding rounded away.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Stream = Float[Tensor, "..."]


@dataclass(frozen=True)
class Step:
    """y = f(x), of the shape of x, which f leaves as it is.

    Args:
        parts: modules whose parameters and buffers f reads.
        reads: what else f reads that is to have a gradient: a memory, an encoder's output.
    """

    f: Callable[[Tensor], Tensor]
    parts: Sequence[nn.Module] = ()
    reads: Sequence[Tensor] = ()

    def __call__(self, x: Stream) -> Stream:
        return self.f(x)

    def differentiated(self) -> list[Tensor]:
        """All beside x that gets a gradient."""
        parameters = [p for part in self.parts for p in part.parameters()]
        return [t for t in (*parameters, *self.reads) if t.requires_grad]


def run(steps: Sequence[Step], a: Stream, b: Stream) -> tuple[Stream, Stream]:
    """The streams after all steps, the one read last first."""
    dtype, wide = b.dtype, torch.promote_types(a.dtype, torch.float32)
    unique = {id(t): t for step in steps for t in step.differentiated()}
    differentiates = unique or a.requires_grad or b.requires_grad
    if not (steps and differentiates and torch.is_grad_enabled()):
        return kept(steps, a, b)
    p, q = _recomputed(steps, dtype, a.to(wide), b.to(wide), *unique.values())
    return p.to(dtype), q.to(dtype)


def kept(steps: Sequence[Step], a: Stream, b: Stream) -> tuple[Stream, Stream]:
    """What `run` gives, with activations kept for the backward pass."""
    dtype, wide = b.dtype, torch.promote_types(a.dtype, torch.float32)
    a, b = a.to(wide), b.to(wide)
    for step in steps:
        a, b = b, a + step(b.to(dtype)).to(wide)
    return a.to(dtype), b.to(dtype)


def undo(steps: Sequence[Step], p: Stream, q: Stream) -> tuple[Stream, Stream]:
    """The streams from which `run` gave p and q, where steps draw nothing."""
    dtype, wide = p.dtype, torch.promote_types(p.dtype, torch.float32)
    p, q = p.to(wide), q.to(wide)
    for step in reversed(steps):
        p, q = q - step(p.to(dtype)).to(wide), p
    return p.to(dtype), q.to(dtype)


# A buffer, by the module that owns it.
_At = tuple[nn.Module, str]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, steps: Sequence[Step], dtype: torch.dtype, a: Tensor, b: Tensor, *read: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.steps, ctx.dtype, ctx.order = steps, dtype, [id(t) for t in read]
        ctx.autocast, ctx.before = _autocast(a.device), []
        random = _random(a.device)
        with ctx.autocast():
            for step in steps:
                old = {at: (t, t._version, t.clone()) for at, t in _buffers(step)}
                a, b = b, a + step(b.to(dtype)).to(a.dtype)
                now = dict(_buffers(step))
                changed = {
                    at: copy
                    for at, (t, version, copy) in old.items()
                    if now[at] is not t or t._version != version
                }
                ctx.before.append((random, changed))
                # One copy serves all steps that draw nothing.
                after = _random(a.device)
                same = all(torch.equal(x, y) for x, y in zip(random, after, strict=True))
                random = random if same else after
        ctx.save_for_backward(a, b, *read)
        return a, b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp: Tensor, dq: Tensor) -> tuple[Tensor | None, ...]:
        p, q = ctx.saved_tensors[:2]
        found: dict[int, Tensor] = {}
        gpus = [] if p.device.type == "cpu" else [p.device]
        with torch.random.fork_rng(gpus), ctx.autocast():
            for step, (random, buffers) in zip(
                reversed(ctx.steps), reversed(ctx.before), strict=True
            ):
                p, wanted = p.detach().requires_grad_(), step.differentiated()
                _draw_as(random, p.device)
                with _holding(step, buffers), torch.enable_grad():
                    y = step(p.to(ctx.dtype)).to(q.dtype)
                    grads = _grads(y, [p, *wanted], dq)
                q, p = p.detach(), q - y.detach()
                del y
                dp, dq = dq, dp if grads[0] is None else dp + grads[0]
                for t, grad in zip(wanted, grads[1:], strict=True):
                    if grad is not None:
                        found[id(t)] = found[id(t)] + grad if id(t) in found else grad
        return None, None, dp, dq, *(found.get(at) for at in ctx.order)


# Its backward runs the steps, which dynamo would want in the graph of the forward.
_recomputed: Any = torch.compiler.disable(_Reversible.apply)


def _grads(y: Tensor, of: list[Tensor], dy: Tensor) -> Sequence[Tensor | None]:
    if not y.requires_grad:
        return [None] * len(of)
    return torch.autograd.grad(y, of, dy, allow_unused=True)


def _autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast as it is now; uncached, as a weight cast without gradient would have none later."""
    return partial(
        torch.autocast,
        device.type,
        dtype=torch.get_autocast_dtype(device.type),
        enabled=torch.is_autocast_enabled(device.type),
        cache_enabled=False,
    )


def _random(device: torch.device) -> list[Tensor]:
    """States of the generators that a step on this device may draw from."""
    states = [torch.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.cuda.get_rng_state(device)]


def _draw_as(random: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(random[0])
    if device.type != "cpu":
        torch.cuda.set_rng_state(random[1], device)


def _buffers(step: Step) -> Iterator[tuple[_At, Tensor]]:
    """Those that a training pass may change."""
    for module in (m for part in step.parts for m in part.modules() if m.training):
        for name, t in module._buffers.items():
            if t is not None:
                yield (module, name), t


@contextmanager
def _holding(step: Step, old: dict[_At, Tensor]) -> Iterator[None]:
    """With these buffers and copies of the others, so that the module's own stay untouched.

    Batch norm changes its statistics unseen by their version; it does not read them.
    """
    own = dict(_buffers(step))
    for (module, name), t in own.items():
        module._buffers[name] = old[module, name] if (module, name) in old else t.clone()
    try:
        yield
    finally:
        for (module, name), t in own.items():
            module._buffers[name] = t
