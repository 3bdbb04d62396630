"""Losses that parts of a model add to its own, by name."""

from torch import Tensor, nn

_KEPT = "_auxiliary"


def report(module: nn.Module, name: str, value: Tensor) -> None:
    """Leave a loss with its module until the model takes it; a second of the name replaces it.

    A part calls this in training forward passes, with whatever weight the loss is to have. A pass
    recomputed under activation checkpointing leaves it again, unseen.
    """
    module.__dict__.setdefault(_KEPT, {})[name] = value


def collect(model: nn.Module) -> dict[str, Tensor]:
    """Take what parts have left since the last call, the values of one name summed over parts."""
    found: dict[str, Tensor] = {}
    for module in model.modules():
        for name, value in module.__dict__.pop(_KEPT, {}).items():
            found[name] = found[name] + value if name in found else value
    return found
