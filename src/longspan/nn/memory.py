"""Memories of earlier segments, around mixers that attend to a context."""

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.engines import segment
from longspan.errors import LongspanError
from longspan.nn.auxiliary import report
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


class Open(NamedTuple):
    """What a mechanism remembers, and each row's tokens of a segment that is not yet full."""

    memory: Any
    items: Float[Tensor, "B C E"]
    count: Int[Tensor, "B"]


Losses = dict[str, Tensor]


class Segmented(Mixer):
    """Reads segment by segment, each with what is remembered of those before it.

    A row's segments are `segment` of its own kept tokens, wherever calls begin and end and padding
    lies, so that token by token, in pieces and at once are one. A layer says what it remembers:

        fresh   (x: B L E) → memory, of a row that has seen nothing: zeros
        read    (memory, x: B C E, seen: B C, asks: B Q) → (y: B Q E, memory, losses)
        write   (memory, x: B C E, rows: B) → (memory, losses)

    x are a segment's tokens so far, from the left, `seen` those that are there; queries are the
    last Q of them, of which `asks` are new. `write` is called with full segments; rows that are
    not are False in `rows` and keep the memory they have. Losses are reported in training, by
    name, as means over the calls that gave them. A memory is a NamedTuple of tensors.

    Raises:
        LongspanError: a segment below 1; a context or marks, which it cannot pass on.
    """

    def __init__(self, *, segment: int) -> None:
        super().__init__()
        if segment < 1:
            raise LongspanError(f"segments of {segment} tokens were asked for: give 1 or more.")
        self.segment, self.norm = segment, nn.Identity()

    def take_norm(self, norm: nn.Module) -> nn.Module:
        self.norm = norm
        return nn.Identity()

    @abstractmethod
    def fresh(self, x: Inputs) -> Any: ...

    @abstractmethod
    def read(
        self,
        memory: Any,
        x: Float[Tensor, "B C E"],
        seen: Bool[Tensor, "B C"],
        asks: Bool[Tensor, "B Q"],
    ) -> tuple[Float[Tensor, "B Q E"], Any, Losses]: ...

    @abstractmethod
    def write(
        self, memory: Any, x: Float[Tensor, "B C E"], rows: Bool[Tensor, "B"]
    ) -> tuple[Any, Losses]: ...

    def forward(
        self,
        x: Inputs,
        state: Open | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Open]:
        if context is not None or marks is not None:
            raise LongspanError(
                "a layer with a memory attends to its memory: no context, no marks."
            )
        if state is None:
            state = Open(self.fresh(x), x[:, :0], x.new_zeros(x.shape[0], dtype=torch.long))
        return _read_on(self, x, state, keep) if x.numel() else (x, state)

    def run(self, x: Inputs, state: Open, keep: Keep | None) -> tuple[Inputs, Open]:
        """Every segment that x reaches into, one after the other."""
        memory, items, count = state
        kept = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        opened = torch.arange(items.shape[1], device=x.device) < count[:, None]
        rows, counts, places = segment.pack(
            torch.cat([items.to(x.dtype), x.masked_fill(~kept[..., None], 0)], 1),
            torch.cat([opened, kept], 1),
        )
        first, outs, losses = int(count.min()), [], []
        # Split, not sliced: each slice's gradient would be as long as the whole.
        for n, block in enumerate(rows.split(self.segment, 1) if rows.shape[1] else ()):
            start = n * self.segment
            here = torch.arange(start, start + block.shape[1], device=x.device)
            seen = here < counts[:, None]
            asks = (seen & (here >= count[:, None]))[:, 0 if start else first :]
            y, memory, found = self.read(memory, block, seen, asks)
            outs.append(y)
            losses.append(found)
            full = counts >= start + self.segment
            if bool(full.any()):
                new, found = self.write(memory, block, full)
                memory = segment.renew(full, new, memory)
                losses.append(found)
        if self.training:
            self._report(losses)
        ys = torch.cat(outs, 1) if outs else rows
        whole = keep is None and first == items.shape[1]
        y = ys if whole else segment.unpack(ys, places[:, items.shape[1] :] - first, kept)
        return y, Open(memory, *segment.rest(rows, counts, self.segment))

    def _report(self, losses: list[Losses]) -> None:
        for name in dict.fromkeys(name for found in losses for name in found):
            values = [found[name] for found in losses if name in found]
            report(self, name, torch.stack(values).mean())


# Compiled, the loop over segments would be unrolled, anew for every length.
_read_on: Any = torch.compiler.disable(Segmented.run)
