"""Deep equilibrium models (Bai et al., 2019)."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from longspan.card import Card
from longspan.engines import fixed_point, segment
from longspan.engines.fixed_point import Method, Solved, Solver
from longspan.errors import LongspanError
from longspan.nn import Block, FeedForward
from longspan.nn.auxiliary import report
from longspan.nn.depth import Active
from longspan.registry import build, mechanism
from longspan.shapes import Context, Inputs, Keep, Marks

# z → (f(z; x), the state after it).
Evaluate = Callable[[Tensor], tuple[Tensor, Any]]


class Cell(nn.Module, ABC):
    """f(z; x), and what it carries from segment to segment."""

    @abstractmethod
    def begin(self, x: Inputs, state: Any, *, keep: Active | None) -> Evaluate:
        """f for this x: computes once what does not depend on z."""


class Injected(Cell):
    """f(z; x) = block(z + x): any block of the library; its state is that of the converged z."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def begin(self, x: Inputs, state: Any, *, keep: Active | None) -> Evaluate:
        return lambda z: self.block(z + x, state, keep=keep)


class Past(NamedTuple):
    """Equilibria of past tokens and what was injected there, held constant."""

    z: Float[Tensor, "B M E"]
    x: Float[Tensor, "B M E"]
    keep: Bool[Tensor, "B M"]


class Relative(Cell):
    """f(z; x) = LN(z' + FFN(z')), z' = LN(z + attention W_o), the cell of the DEQ-Transformer:

        [q; k; v] = W z + U x over [memory ; z],  scores relative as in Transformer-XL (Sec. 3.3)

    The memory holds z* of the last M tokens, and their x, for their keys have it injected too. All
    weights of products with z are normalised.
    """

    def __init__(
        self, *, width: int, heads: int, inner: int, memory: int, causal: bool, dropout: float
    ) -> None:
        super().__init__()
        self.heads, self.memory, self.causal = heads, memory, causal
        self.project = weight_norm(nn.Linear(width, 3 * width, bias=False))
        self.inject = nn.Linear(width, 3 * width, bias=False)
        self.output = weight_norm(nn.Linear(width, width, bias=False))
        self.feed_forward = FeedForward(width, inner=inner, activation="relu", dropout=dropout)
        for linear in (self.feed_forward.up, self.feed_forward.down):
            weight_norm(linear)
        self.attention = build("multi-head-attention", causal=causal)
        self.position = build(
            "transformer-xl-relative-position", width=width, heads=heads, head_width=width // heads
        )
        self.norm, self.feed_forward_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def begin(self, x: Inputs, state: Past | None, *, keep: Active | None) -> Evaluate:
        seen = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        past = Past(x[:, :0], x[:, :0], seen[:, :0]) if state is None else state
        mask = torch.cat([past.keep, seen], 1)
        injected, length = self.inject(torch.cat([past.x, x], 1)), x.shape[1]

        def evaluate(z: Tensor) -> tuple[Tensor, Past | None]:
            mixed = self.project(torch.cat([past.z, z], 1)) + injected
            q, k, v = rearrange(mixed, "B S (n H D) -> n B H S D", n=3, H=self.heads)
            q = q[:, :, q.shape[2] - length :]
            o, _ = self.attention(q, k, v, keep=mask, bias=self.position.bias)
            o = self.output(rearrange(o, "B H L D -> B L (H D)"))
            a = self.norm(z + self.dropout(o))
            y = self.feed_forward_norm(a + self.dropout(self.feed_forward(a)))
            return y, self._after(past, z, x, seen)

        return evaluate

    def _after(self, past: Past, z: Tensor, x: Tensor, seen: Tensor) -> Past | None:
        if not self.causal:
            return None
        queues = [
            segment.push(segment.Queue(old, past.keep), new, seen, capacity=self.memory)
            for old, new in ((past.z, z), (past.x, x))
        ]
        return Past(queues[0].items, queues[1].items, queues[0].keep)


class Equilibrium(nn.Module):
    """y = z* = f(z*; x), found from z = 0, as a layer of a model.

    Gradients are those of the implicit function theorem, or a phantom's. Dropout masks are drawn
    once a call and serve every evaluation of f.

    Args:
        forward_solver, backward_solver: the latter of Jᵀ u + g.
        phantom, damping: n and λ of `fixed_point.deq`; 0 for the exact gradient.
        jacobian: γ; in training the loss grows by γ E ‖εᵀ J‖² / d (Bai et al., 2021).

    Attributes:
        unrolled: evaluations of f that are backpropagated through in place of a solver, as while
            warming up; None for the equilibrium.
        solved: how the solver of the last call fared.
    """

    def __init__(
        self,
        cell: Cell,
        *,
        forward_solver: Solver,
        backward_solver: Solver | None = None,
        phantom: int = 0,
        damping: float = 1.0,
        jacobian: float = 0.0,
    ) -> None:
        super().__init__()
        self.cell, self.jacobian = cell, jacobian
        self.forward_solver, self.backward_solver = forward_solver, backward_solver
        self.phantom, self.damping = phantom, damping
        self.unrolled: int | None = None
        self.solved: Solved | None = None

    def forward(
        self,
        x: Inputs,
        state: Any = None,
        *,
        keep: Active | None = None,
        marks: Marks | None = None,
        encoded: Context | None = None,
        encoded_keep: Keep | None = None,
    ) -> tuple[Inputs, Any]:
        if marks is not None or encoded is not None:
            raise LongspanError("an equilibrium mixes one sequence: no marks, no encoder's output.")
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        evaluate = self.cell.begin(x, state, keep=keep)
        seed = int(torch.randint(2**62, ())) if self.training else 0
        devices = [x.device] if x.device.type == "cuda" else []

        def steady(z: Tensor) -> tuple[Tensor, Any]:
            if not self.training:
                y, after = evaluate(z)
            else:
                with torch.random.fork_rng(devices):
                    torch.manual_seed(seed)
                    y, after = evaluate(z)
            return (y if keep is None else y.masked_fill(~keep[..., None], 0)), after

        def f(z: Tensor) -> Tensor:
            return steady(z)[0]

        z = torch.zeros_like(x)
        if self.unrolled is not None:
            for _ in range(self.unrolled):
                z = f(z)
        else:
            z, self.solved = fixed_point.deq(
                f,
                z,
                forward=self.forward_solver,
                backward=self.backward_solver,
                phantom=self.phantom,
                damping=self.damping,
            )
        if self.training and self.jacobian:
            report(self, "jacobian", self.jacobian * fixed_point.jacobian_penalty(f, z))
        with torch.no_grad():
            _, after = steady(z)
        return z, after


@mechanism(
    Card(
        id="deq",
        name="Deep Equilibrium Model (DEQ-Transformer)",
        kind="architecture",
        family="adaptive-depth",
        paper="Deep Equilibrium Models",
        cite="Bai et al., NeurIPS 2019",
        link="https://arxiv.org/abs/1909.01377",
        what="Solves for the point at which one more pass through its block changes nothing, and "
        "backpropagates through that point alone.",
        modes={"bidirectional", "causal", "step"},
        causality="numerical",
        time="L*L*E + L*E*E",
        memory="M*E",
    )
)
def deq(
    *,
    width: int,
    heads: int,
    inner: int | None = None,
    causal: bool = False,
    memory: int = 150,
    block: Block | None = None,
    solver: Method = "broyden",
    most: int = 30,
    tolerance: float = 1e-4,
    backward_most: int | None = None,
    backward_tolerance: float | None = None,
    phantom: int = 0,
    damping: float = 1.0,
    jacobian: float = 0.0,
    dropout: float = 0.0,
) -> Equilibrium:
    """The equilibrium of one transformer block, into which x is injected at every evaluation.

    Solvers stop a whole row at its tolerance, so the causal form sees later tokens by so much; the
    plain one with tolerance 0 sees nothing of them. `longspan.models.EquilibriumForCausalLM` is a
    whole model.

    Args:
        memory: equilibria of past segments that the causal form attends to.
        block: any block, which then gets z + x, in place of the DEQ-Transformer's.
        most, tolerance: evaluations of f and residual, forward; and of products with Jᵀ backward.
    """
    cell: Cell = (
        Relative(
            width=width,
            heads=heads,
            inner=inner or 4 * width,
            memory=memory,
            causal=causal,
            dropout=dropout,
        )
        if block is None
        else Injected(block)
    )
    return Equilibrium(
        cell,
        forward_solver=Solver(solver, most, tolerance),
        backward_solver=Solver(
            solver,
            most if backward_most is None else backward_most,
            tolerance if backward_tolerance is None else backward_tolerance,
        ),
        phantom=phantom,
        damping=damping,
        jacobian=jacobian,
    )
