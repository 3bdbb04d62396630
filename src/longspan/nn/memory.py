"""Remember: a memory of earlier inputs before any mixer that attends to a context."""

import torch
from torch import nn

from longspan.engines import segment
from longspan.errors import LongspanError
from longspan.nn.protocols import Mixer
from longspan.shapes import Context, Inputs, Keep, Marks


class Remember(Mixer):
    """y = mixer(norm(x), context = norm([SG(memory) ; x])), then memory ← [memory ; x][−M:].

    The memory holds the layer's inputs before its norm (Transformer-XL's h^{n−1}), so memory and
    segment are normalised alike. It starts empty. Works around any causal mixer that takes a
    context; the state is a queue of at most M vectors.

    Args:
        memory: M in training. memory_eval: M in evaluation, by default the same.
        gradient: let gradients flow into the memory.

    Raises:
        LongspanError: a negative memory; a context or marks, which it cannot pass on.
    """

    def __init__(
        self,
        mixer: Mixer,
        *,
        memory: int,
        memory_eval: int | None = None,
        gradient: bool = False,
    ) -> None:
        super().__init__()
        memory_eval = memory if memory_eval is None else memory_eval
        if memory < 0 or memory_eval < 0:
            raise LongspanError(
                f"a memory of {min(memory, memory_eval)} vectors was asked for: give 0 or more."
            )
        self.mixer, self.norm = mixer, nn.Identity()
        self.memory, self.memory_eval, self.gradient = memory, memory_eval, gradient

    def take_norm(self, norm: nn.Module) -> nn.Module:
        self.norm = norm
        return nn.Identity()

    def forward(
        self,
        x: Inputs,
        state: segment.Queue | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, segment.Queue]:
        if context is not None or marks is not None:
            raise LongspanError(
                "a layer with a memory attends to its memory: no context, no marks."
            )
        seen = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        queue = segment.empty(x) if state is None else state
        whole = self.norm(torch.cat([queue.items, x], 1))
        mask = torch.cat([queue.keep, seen], 1) if state is not None or keep is not None else None
        length = x.shape[1]
        y, _ = self.mixer(whole[:, whole.shape[1] - length :], context=whole, keep=mask)
        if keep is not None:
            y = y.masked_fill(~keep[..., None], 0)
        capacity = self.memory if self.training else self.memory_eval
        return y, segment.push(queue, x, seen, capacity=capacity, gradient=self.gradient)
