"""Oracles: each paper's formula with its matrix written out, found by being here.

An oracle takes the built module, its inputs and `keep`, and returns the output; no engine, loops
welcome, any dtype. Name the file after the family; register with `@oracle(id)`.
"""

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache

from torch import Tensor

Oracle = Callable[..., Tensor]

_oracles: dict[str, Oracle] = {}


def oracle(id: str) -> Callable[[Oracle], Oracle]:
    """Declare the oracle of one mechanism."""

    def declare(formula: Oracle) -> Oracle:
        _oracles[id] = formula
        return formula

    return declare


def oracle_of(id: str) -> Oracle | None:
    """The oracle of a mechanism, or None."""
    _load()
    return _oracles.get(id)


@cache
def _load() -> None:
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
