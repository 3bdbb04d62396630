"""What stands around a mixer: norms, feed-forwards, the residual block."""

from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from longspan.engines.reversible import Step
from longspan.errors import LongspanError
from longspan.nn.protocols import Mixer
from longspan.nn.residual import Residual, joined
from longspan.nn.state import tensors
from longspan.shapes import Context, Inputs, Keep, Marks

NORMS: dict[str, type[nn.Module]] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def norm(kind: Literal["layer", "rms"], width: int) -> nn.Module:
    """LayerNorm or RMSNorm over the last axis."""
    if kind not in NORMS:
        raise LongspanError(f"no norm '{kind}'; expected {', '.join(NORMS)}.")
    return NORMS[kind](width)


class FeedForward(nn.Module):
    """y = f(x W_1) W_2, or gated, y = (f(x W_1) ∘ x W_3) W_2 (Shazeer, 2020).

    Args:
        inner: the hidden width, by default 4 E.
    """

    def __init__(
        self,
        width: int,
        *,
        inner: int | None = None,
        activation: Literal["relu", "gelu", "silu"] = "gelu",
        gated: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise LongspanError(f"no activation '{activation}'; expected {', '.join(ACTIVATIONS)}.")
        inner = inner or 4 * width
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(width, inner)
        self.gate = nn.Linear(width, inner) if gated else None
        self.down = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.up(x))
        if self.gate is not None:
            hidden = hidden * self.gate(x)
        return self.down(self.dropout(hidden))


class Block(nn.Module):
    """x ← x + mixer(norm(x)), x ← x + feed_forward(norm(x)); `post`: x ← norm(x + …).

    Args:
        cross: a second mixer between the two, which attends to an encoder's output.
        residual: makes what stands in place of each sum, one for each branch.
    """

    def __init__(
        self,
        mixer: Mixer,
        feed_forward: nn.Module | None,
        *,
        width: int,
        order: Literal["pre", "post"] = "pre",
        norms: Literal["layer", "rms"] = "layer",
        dropout: float = 0.0,
        cross: Mixer | None = None,
        residual: Callable[[], Residual] | None = None,
    ) -> None:
        super().__init__()
        if order not in ("pre", "post"):
            raise LongspanError(f"no norm order '{order}'; expected pre or post.")
        self.order = order
        self.mixer, self.cross, self.feed_forward = mixer, cross, feed_forward
        mixer_norm = norm(norms, width)
        self.mixer_norm = mixer.take_norm(mixer_norm) if order == "pre" else mixer_norm
        self.cross_norm = None if cross is None else norm(norms, width)
        self.feed_forward_norm = None if feed_forward is None else norm(norms, width)
        self.dropout = nn.Dropout(dropout)
        self.mixer_residual, self.cross_residual, self.feed_forward_residual = (
            None if residual is None or part is None else residual()
            for part in (mixer, cross, feed_forward)
        )

    def forward(
        self,
        x: Inputs,
        state: Any = None,
        *,
        keep: Keep | None = None,
        marks: Marks | None = None,
        context: Context | None = None,
        encoded: Context | None = None,
        encoded_keep: Keep | None = None,
    ) -> tuple[Inputs, Any]:
        """`context` is what the mixer attends to in place of x, as it is; `keep` is then of it."""
        pre = self.order == "pre"
        hooks = {"keep": keep, "context": context, "marks": marks}
        y, state = self.mixer(self.mixer_norm(x) if pre else x, state, **hooks)
        x = joined(self.mixer_residual, x, self.dropout(y))
        x = x if pre else self.mixer_norm(x)
        if self.cross is not None and self.cross_norm is not None:
            y, _ = self.cross(self.cross_norm(x) if pre else x, context=encoded, keep=encoded_keep)
            x = joined(self.cross_residual, x, self.dropout(y))
            x = x if pre else self.cross_norm(x)
        if self.feed_forward is not None and self.feed_forward_norm is not None:
            y = self.feed_forward(self.feed_forward_norm(x) if pre else x)
            x = joined(self.feed_forward_residual, x, self.dropout(y))
            x = x if pre else self.feed_forward_norm(x)
        return x, state

    def steps(
        self,
        state: Any = None,
        *,
        carry: Callable[[Any], None] | None = None,
        keep: Keep | None = None,
        marks: Marks | None = None,
        encoded: Context | None = None,
        encoded_keep: Keep | None = None,
    ) -> list[Step]:
        """The branches one by one, of a pre-norm block in a reversible stack.

        Args:
            carry: is given the mixer's new state.
        """
        norms = self.mixer_norm, self.cross_norm, self.feed_forward_norm
        mixer, cross, feed_forward = self.mixer, self.cross, self.feed_forward

        def mix(x: Tensor) -> Tensor:
            y, new = mixer(norms[0](x), state, keep=keep, marks=marks)
            if carry is not None:
                carry(new)
            return self.dropout(y)

        steps = [Step(mix, [norms[0], mixer], tensors(state))]
        if cross is not None and norms[1] is not None:
            at = norms[1]

            def attend(x: Tensor) -> Tensor:
                return self.dropout(cross(at(x), context=encoded, keep=encoded_keep)[0])

            steps.append(Step(attend, [at, cross], [] if encoded is None else [encoded]))
        if feed_forward is not None and norms[2] is not None:
            before = norms[2]

            def feed(x: Tensor) -> Tensor:
                return self.dropout(feed_forward(before(x)))

            steps.append(Step(feed, [before, feed_forward]))
        return steps
