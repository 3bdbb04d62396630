"""Fixed points z* = f(z*) by plain iteration, Anderson or Broyden, and gradients through them.

By the implicit function theorem, with J = ∂f/∂z at z* and g the gradient of what follows,

    u = Jᵀ u + g,    dL/dθ = uᵀ ∂f/∂θ,

so that backward solves a second fixed point, of u, and keeps no trajectory of the first. Batch
rows are problems of their own: each is judged by its own residual and keeps its own best.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from longspan.errors import LongspanError

Map = Callable[[Tensor], Tensor]
Method = Literal["plain", "anderson", "broyden"]


class Solved(NamedTuple):
    """The best point each row met, its residual ‖f(z) − z‖ / ‖f(z)‖, and when it met it."""

    z: Tensor
    residual: Float[Tensor, "B"]
    steps: Int[Tensor, "B"]
    calls: int


@dataclass(frozen=True)
class Solver:
    """How to look for a fixed point.

    Attributes:
        most: calls of f. tolerance: residual at which a row is done.
        memory: earlier points (Anderson) or updates (Broyden) that count, by default 6 and all.
        mixing: Anderson's β.

    Raises:
        LongspanError: an unknown method; no calls; a tolerance below 0.
    """

    method: Method = "anderson"
    most: int = 30
    tolerance: float = 1e-4
    memory: int | None = None
    mixing: float = 1.0

    def __post_init__(self) -> None:
        if self.method not in ("plain", "anderson", "broyden"):
            raise LongspanError(f"no solver '{self.method}'; expected plain, anderson or broyden.")
        if self.most < 1 or self.tolerance < 0 or self.memory == 0:
            raise LongspanError(
                f"a solver got most={self.most}, tolerance={self.tolerance}, memory={self.memory}: "
                "expected at least 1 call, a tolerance of at least 0 and a memory of at least 1."
            )

    @torch.no_grad()
    def __call__(self, f: Map, z: Tensor) -> Solved:
        """A fixed point from z on: f maps tensors of z's shape, rows independent of each other."""
        shape = z.shape

        def flat(z: Tensor) -> Tensor:
            return f(z.view(shape)).reshape(shape[0], -1)

        if not z.numel():
            none = z.new_zeros(shape[0])
            return Solved(z, none, none.long(), 0)
        best = _Best(z.reshape(shape[0], -1), self.tolerance)
        {"plain": _plain, "anderson": _anderson, "broyden": _broyden}[self.method](flat, best, self)
        return Solved(best.z.view(shape), best.residual, best.steps, best.calls)


class _Best:
    """What each row has met: a row that is done is left alone, whatever the others do."""

    def __init__(self, z: Tensor, tolerance: float) -> None:
        self.z, self.tolerance, self.calls = z, tolerance, 0
        self.residual = z.new_full(z.shape[:1], torch.inf)
        self.steps = torch.zeros(z.shape[0], dtype=torch.long, device=z.device)

    def take(self, z: Tensor, value: Tensor) -> Bool[Tensor, "B"]:
        """Record f(z) = value; returns the rows that still look for a better point."""
        self.calls += 1
        residual = (value - z).norm(dim=1) / value.norm(dim=1).clamp(min=1e-12)
        better = (residual < self.residual) & (self.residual > self.tolerance)
        # f(z) is nearer than z where f contracts, and costs nothing more.
        self.z = torch.where(better[:, None], value, self.z)
        self.residual = torch.where(better, residual, self.residual)
        self.steps = torch.where(better, self.calls, self.steps)
        return self.residual > self.tolerance


def _plain(f: Map, best: _Best, solver: Solver) -> None:
    z = best.z
    for _ in range(solver.most):
        value = f(z)
        if not bool(best.take(z, value).any()):
            return
        z = value


def _anderson(f: Map, best: _Best, solver: Solver) -> None:
    """z ← Σ_i α_i ((1 − β) z_i + β f(z_i)), Σ α = 1, that make ‖Σ_i α_i (f(z_i) − z_i)‖ least."""
    z, points, values, kept = best.z, [], [], solver.memory or 6
    for _ in range(solver.most):
        value = f(z)
        if not bool(best.take(z, value).any()):
            return
        points, values = [*points, z][-kept:], [*values, value][-kept:]
        past, images = torch.stack(points, 1), torch.stack(values, 1)  # B m D
        errors = images - past
        products = errors @ errors.mT
        # Scaled to a unit trace, the ridge is as strong however small the residuals are.
        trace = products.diagonal(dim1=1, dim2=2).sum(1).clamp(min=1e-30)
        eye = torch.eye(len(points), dtype=z.dtype, device=z.device)
        ridge = torch.finfo(z.dtype).eps
        system = products / trace[:, None, None] + ridge * eye
        share, _ = torch.linalg.solve_ex(
            system, torch.ones_like(trace)[:, None].expand(-1, len(eye))
        )
        share = share / share.sum(1, keepdim=True)
        mixed = (1 - solver.mixing) * past + solver.mixing * images
        new = (share[:, None] @ mixed)[:, 0]
        z = torch.where(new.isfinite().all(1, keepdim=True), new, value)


def _broyden(f: Map, best: _Best, solver: Solver) -> None:
    """Good Broyden steps on g(z) = f(z) − z from the inverse Jacobian −I, kept as −I + Σ u vᵀ."""
    z = best.z
    value = f(z)
    g = value - z
    going = best.take(z, value)
    us: list[Tensor] = []
    vs: list[Tensor] = []

    def apply(x: Tensor, left: list[Tensor], right: list[Tensor]) -> Tensor:
        """(−I + Σ left rightᵀ) x."""
        total = -x
        for a, b in zip(left, right, strict=True):
            total = total + a * (b * x).sum(1, keepdim=True)
        return total

    step = -apply(g, us, vs)
    for _ in range(solver.most - 1):
        if not bool(going.any()):
            return
        z = z + step
        value = f(z)
        before, g = g, value - z
        going = best.take(z, value)
        change = g - before
        # H ← H + (s − H y) sᵀH / sᵀH y (Sherman–Morrison).
        row = apply(step, vs, us)
        below = (row * change).sum(1, keepdim=True)
        u = (step - apply(change, us, vs)) / below.masked_fill(below.abs() < 1e-30, 1)
        fine = u.isfinite().all(1, keepdim=True) & (below.abs() >= 1e-30)
        if len(us) == solver.memory:
            us, vs = us[1:], vs[1:]
        us, vs = [*us, torch.where(fine, u, 0)], [*vs, torch.where(fine, row, 0)]
        step = -apply(g, us, vs)
        step = torch.where(step.isfinite().all(1, keepdim=True), step, g)


def deq(
    f: Map,
    z: Tensor,
    *,
    forward: Solver,
    backward: Solver | None = None,
    phantom: int = 0,
    damping: float = 1.0,
    gradient: bool = True,
) -> tuple[Tensor, Solved]:
    """(z*, how the solver fared), z* with gradients to whatever f depends on but not to z.

    The exact gradient solves u = Jᵀ u + g by `backward` when it is asked for. With `phantom`
    steps n it is instead that of n damped steps z ← (1 − λ) z + λ f(z) from the z* found, of which
    one is dL/dθ = gᵀ ∂f/∂θ (Geng et al., 2021).

    Args:
        forward, backward: solvers; the latter by default the former.
        phantom: n, 0 for the exact gradient. damping: λ.
        gradient: whether any is wanted.

    Raises:
        LongspanError: a negative number of steps, or a damping outside (0, 1].
    """
    if phantom < 0 or not 0 < damping <= 1:
        raise LongspanError(
            f"a phantom gradient of {phantom} steps damped by {damping} was asked for: expected "
            "at least 0 steps and a damping in (0, 1]."
        )
    solved = forward(f, z.detach())
    if not (gradient and torch.is_grad_enabled()):
        return solved.z, solved
    if phantom:
        z = solved.z
        for _ in range(phantom):
            z = (1 - damping) * z + damping * f(z)
        return z, solved
    # One more evaluation ties z* to the parameters; its own z is a leaf, for products with Jᵀ.
    leaf = solved.z.detach().requires_grad_()
    value = f(leaf)
    if not value.requires_grad:
        return value, solved
    solver = backward or forward

    def implicit(g: Tensor | None) -> Tensor | None:
        if g is None:
            return None

        # Not f's own graph: the hook runs inside its backward pass, which frees it.
        def pull(u: Tensor) -> Tensor:
            with torch.enable_grad():
                (product,) = torch.autograd.grad(again, inner, u, retain_graph=True)
            return product + g

        with torch.enable_grad():
            inner = leaf.detach().requires_grad_()
            again = f(inner)
        return solver(pull, g).z

    z = value.view_as(value)
    z.register_hook(implicit)
    return z, solved


def jacobian_penalty(
    f: Map, z: Tensor, *, samples: int = 1, generator: torch.Generator | None = None
) -> Float[Tensor, ""]:
    """E ‖εᵀ J‖² / d by Hutchinson's estimate, d numbers in a row of z, with gradients (Bai et al.,
    2021, Eq. 7)."""
    z = z.detach().requires_grad_()
    value, total = f(z), z.new_zeros(())
    for _ in range(samples):
        noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        (product,) = torch.autograd.grad(value, z, noise, create_graph=True)
        total = total + product.square().sum() / max(z.numel(), 1)
    return total / samples
