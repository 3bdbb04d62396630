"""Reading a stream through a model, window by window, and listening at one of its layers."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Integer
from torch import Tensor, nn

from longspan.errors import LongspanError, nearest
from longspan.shapes import Tokens

# What feed-forward layers are called in transformers and here.
_FEED_FORWARD = ("feed_forward", "mlp", "ffn", "feedforward", "ff")

Stream = Integer[Tensor, "N"]


class Window(NamedTuple):
    """Rows of inputs with the token after each; only the last `new` positions are new.

    `first` is the place in the stream of each row's first new position.
    """

    tokens: Tokens
    new: int
    first: tuple[int, ...]


def windows(
    tokens: Stream, *, window: int, stride: int | None = None, batch: int = 1, start: int = 0
) -> Iterator[Window]:
    """Windows moved on by `stride`, of which the first reads all its positions as new ones.

    Every position but the last, which nothing follows, is new exactly once: the windows are those
    of `models.evaluation.sliding`. They lie where they lie: a `start`, at the end of one of them,
    only leaves out those before it.

    Raises:
        LongspanError: a stride that is not of 1 … window, or fewer than two tokens.
    """
    stride = window if stride is None else stride
    if not 1 <= stride <= window or batch < 1:
        raise LongspanError(
            f"window is {window}, stride {stride}, batch {batch}: expected a stride of 1 to the "
            "window, and a batch of 1 or more."
        )
    targets = len(tokens) - 1
    if targets < 1:
        raise LongspanError(f"{len(tokens)} tokens leave nothing to read; give at least 2.")
    group: list[tuple[int, int, int]] = []
    done = 0
    for first in range(0, targets, stride):
        if done == targets:
            break
        last = min(first + window, targets)
        span = (first, done, last)
        alike = not group or (span[1] - span[0], span[2] - span[1]) == (
            group[0][1] - group[0][0],
            group[0][2] - group[0][1],
        )
        if len(group) == batch or not alike:
            yield from _rows(tokens, group, start)
            group = []
        group.append(span)
        done = last
    yield from _rows(tokens, group, start)


def _rows(tokens: Stream, group: list[tuple[int, int, int]], start: int) -> Iterator[Window]:
    if group[-1][2] > start:
        rows = torch.stack([tokens[first : last + 1].long() for first, _, last in group])
        yield Window(rows, group[0][2] - group[0][1], tuple(done for _, done, _ in group))


class Taps:
    """The last inputs of some modules of a model, filled whenever it runs."""

    def __init__(self, inputs: dict[str, Tensor], only_body: bool) -> None:
        self._inputs, self.only_body = inputs, only_body

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._inputs:
            raise LongspanError(f"'{name}' did not run in the model's last call.")
        return self._inputs[name]


@contextmanager
def tapped(model: nn.Module, *names: str) -> Iterator[Taps]:
    """Listens at the inputs of modules, by name; the hooks are gone afterwards."""
    inputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:

            def hear(
                module: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any], name=name
            ) -> None:
                inputs[name] = (given or tuple(named.values()))[0].detach()

            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(hear, with_kwargs=True).remove)
        inner = {id(part) for part in body(model).modules()}
        yield Taps(inputs, all(id(model.get_submodule(name)) in inner for name in names))


def body(model: nn.Module) -> nn.Module:
    """The model without its head, where it is told apart."""
    inner = getattr(model, "base_model", model)
    return inner if isinstance(inner, nn.Module) else model


def key_layer(model: nn.Module, layer: str | None = None) -> str:
    """The module whose input is the key: the last feed-forward layer (Khandelwal et al., Sec. 4).

    Args:
        layer: a module's name, in place of it; "output" is the output embedding, whose input is
            the state after the final norm.

    Raises:
        LongspanError: no such module, or none that is known to be a feed-forward layer.
    """
    names = {name: module for name, module in model.named_modules() if name}
    if layer == "output":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        found = [name for name, module in names.items() if module is head]
    elif layer is None:
        found = [name for name in names if name.rpartition(".")[2] in _FEED_FORWARD]
    else:
        found = [name for name in names if name == layer]
    if not found:
        wanted = {None: "a feed-forward layer", "output": "an output embedding"}.get(layer, layer)
        raise LongspanError(
            f"{type(model).__name__} has no module that is known as {wanted}"
            f"{nearest(str(layer), names)} Name one of model.named_modules() by layer=."
        )
    return found[-1]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the mode is put back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
