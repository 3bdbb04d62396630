"""A mechanism under test: built small, fed and called the same way whatever its kind."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longspan.card import Card
from longspan.nn import Attention, Mixer
from longspan.nn.state import State
from longspan.registry import build, options

BATCH, HEADS, WIDTH = 2, 3, 8
MODEL_WIDTH = HEADS * WIDTH


@dataclass
class Subject:
    """A built mechanism with the shape of its inputs.

    Attentions take (q, k, v), B H L D each; mixers take x, B L E.
    """

    card: Card
    module: Attention | Mixer
    causal: bool
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        card: Card,
        *,
        causal: bool,
        dtype: torch.dtype = torch.float64,
        arguments: dict[str, Any] | None = None,
    ) -> "Subject":
        """Built with the card's `tiny` arguments, or those given, in evaluation mode."""
        chosen = dict(card.tiny if arguments is None else arguments)
        if "causal" in options(card.id):
            chosen["causal"] = causal
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = build(card.id, **chosen)
        return cls(card, module.to(dtype).eval(), causal, dtype)

    @property
    def attends(self) -> bool:
        """Takes q, k, v rather than x."""
        return isinstance(self.module, Attention)

    @property
    def axis(self) -> int:
        """The axis of tokens."""
        return 2 if self.attends else 1

    def example(
        self,
        length: int,
        *,
        keys: int | None = None,
        batch: int = BATCH,
        seed: int = 0,
        scale: float = 1.0,
        gradient: bool = False,
    ) -> tuple[Tensor, ...]:
        """Random inputs; a shared attention's k is its q."""
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            t = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
            return t.to(self.dtype).requires_grad_(gradient)

        if not self.attends:
            return (random(batch, length, MODEL_WIDTH),)
        keys = length if keys is None else keys
        q, k, v = (random(batch, HEADS, n, WIDTH) for n in (length, keys, keys))
        return (q, q if self.shared else k, v)

    @property
    def shared(self) -> bool:
        """Queries are the keys."""
        return isinstance(self.module, Attention) and self.module.shared

    def __call__(
        self, inputs: tuple[Tensor, ...], state: State = None, *, keep: Tensor | None = None
    ) -> tuple[Tensor, State]:
        return self.module(*inputs, state, keep=keep)

    def cut(self, inputs: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
        """Tokens start … stop of every input; a shared k stays the q."""
        cut = tuple(t.narrow(self.axis, start, stop - start) for t in inputs)
        return (cut[0], cut[0], cut[2]) if self.shared else cut

    def change(self, inputs: tuple[Tensor, ...], change: Any) -> tuple[Tensor, ...]:
        """`change` applied to every input, once where two are the same."""
        if self.shared:
            q, _, v = inputs
            q = change(q)
            return q, q, change(v)
        return tuple(change(t) for t in inputs)

    def distinct(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        """Inputs to take gradients of."""
        return [inputs[0], inputs[2]] if self.shared else list(inputs)


def parameters(module: nn.Module) -> list[Tensor]:
    """Its trainable parameters."""
    return [p for p in module.parameters() if p.requires_grad]
