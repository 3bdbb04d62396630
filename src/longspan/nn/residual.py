"""What joins a branch to the stream it left, in place of x + y."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from longspan.engines import reversible
from longspan.engines.reversible import Step
from longspan.errors import LongspanError
from longspan.nn.auxiliary import collect

Stream = Float[Tensor, "..."]
Enter = Literal["duplicate", "split"]
Leave = Literal["mean", "concat", "concat-norm"]


class Residual(nn.Module, ABC):
    """(x, y) → x', a token at a time: the stream x after a branch gave y.

    A sub-layer has one of its own. At its neutral setting, which a card's `exact` holds, x' is
    x + y.
    """

    @abstractmethod
    def combine(self, x: Stream, y: Stream) -> Stream:
        """x: … E, y: … E → … E."""


class Reversible(Residual):
    """Two streams, each the sum of what branches gave it, read from by turns.

    As one step of a stack it is x + y; the stack goes through `forward`, which gives it two
    streams and computes activations again in the backward pass.

    Args:
        enter: both streams are x (`duplicate`), or halves of it (`split`).
        leave: their mean, both beside each other, or these normed.
        axis: of channels, which `split` and `concat` work on. `concat-norm` takes the last.
        width: of each stream, for the norm.

    Raises:
        LongspanError: unknown ways to enter or leave; a norm without its width, or on another axis.
    """

    def __init__(
        self,
        *,
        enter: Enter = "duplicate",
        leave: Leave = "mean",
        axis: int = -1,
        width: int | None = None,
    ) -> None:
        super().__init__()
        for name, way, known in (
            ("enter", enter, ("duplicate", "split")),
            ("leave", leave, ("mean", "concat", "concat-norm")),
        ):
            if way not in known:
                raise LongspanError(f"no way '{way}' to {name}; expected {', '.join(known)}.")
        if leave == "concat-norm" and (width is None or axis != -1):
            raise LongspanError(
                f"leave='concat-norm' norms the last axis and got width={width}, axis={axis}: give "
                "the width of one stream and axis=-1."
            )
        self.enters, self.leaves, self.axis = enter, leave, axis
        self.norm = nn.LayerNorm(2 * width) if leave == "concat-norm" and width else None

    def combine(self, x: Stream, y: Stream) -> Stream:
        return x + y

    def enter(self, x: Stream) -> tuple[Stream, Stream]:
        """The two streams of x."""
        if self.enters == "duplicate":
            return x, x
        if x.shape[self.axis] % 2:
            raise LongspanError(
                f"{x.shape[self.axis]} channels do not split in two: give an even number."
            )
        first, second = x.chunk(2, self.axis)
        return first, second

    def leave(self, first: Stream, second: Stream) -> Stream:
        """One stream of the two."""
        if self.leaves == "mean":
            return (first + second) / 2
        y = torch.cat([first, second], self.axis)
        return y if self.norm is None else self.norm(y)

    def forward(
        self, branches: Iterable[nn.Module | Step], x: Stream, reads: Sequence[Any] = ()
    ) -> Stream:
        """x through branches f: (a, b) → (b, a + f(b, *reads)), entered and left.

        Two branches, F and G, are a block: y_1 = x_1 + F(x_2), y_2 = x_2 + G(y_1).

        Args:
            reads: what modules among the branches are called with beside their stream; tensors
                get gradients. A step holds its own.
        """
        return self.leave(*self.through(branches, *self.enter(x), reads))

    def through(
        self,
        branches: Iterable[nn.Module | Step],
        first: Stream,
        second: Stream,
        reads: Sequence[Any] = (),
    ) -> tuple[Stream, Stream]:
        """Both streams after the branches, the one read last first.

        Raises:
            LongspanError: a branch reports a loss of its own, which would have no gradient.
        """
        steps = [_step(branch, reads) for branch in branches]
        first, second = reversible.run(steps, first, second)
        if torch.is_grad_enabled():
            lost = sorted({n for s in steps for part in s.parts for n in collect(part)})
            if lost:
                raise LongspanError(
                    f"reversible branches report {', '.join(lost)}, which would have no gradient, "
                    "as they run without one: take mechanisms that add no loss, or a plain "
                    "residual."
                )
        return first, second

    def undo(
        self,
        branches: Iterable[nn.Module | Step],
        first: Stream,
        second: Stream,
        reads: Sequence[Any] = (),
    ) -> tuple[Stream, Stream]:
        """The streams that the branches, drawing nothing, made `first` and `second` of."""
        return reversible.undo([_step(branch, reads) for branch in branches], first, second)


def joined(residual: Residual | None, x: Stream, y: Stream) -> Stream:
    """x + y, or what the combiner makes of them."""
    return x + y if residual is None else residual.combine(x, y)


def _step(branch: nn.Module | Step, reads: Sequence[Any]) -> Step:
    if isinstance(branch, Step):
        return branch
    tensors = [t for t in reads if isinstance(t, Tensor)]
    call: Callable[[Tensor], Tensor] = lambda x: branch(x, *reads)  # noqa: E731
    return Step(call, [branch], tensors)
