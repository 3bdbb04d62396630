"""Staged training: short segments and windows first, longer ones later."""

from collections.abc import Sequence
from dataclasses import dataclass

from longspan.errors import LongspanError


@dataclass(frozen=True)
class Phase:
    """One stage: the length of its sequences, the window of each layer, its learning rate."""

    length: int
    windows: tuple[int, ...]
    lr: float


def staged(
    *,
    windows: Sequence[int],
    phases: int = 5,
    length: int = 2048,
    longest: int = 23040,
    lr: float = 2.5e-4,
) -> list[Phase]:
    """Windows and length doubled and the learning rate halved at each phase (Beltagy et al., 2020,
    Sec. 4.2.1); the length goes to `longest` at most.

    Args:
        windows: of each layer in the first phase.

    Raises:
        LongspanError: no phase, no layer, or `longest` below the first length.

    >>> [phase.length for phase in staged(windows=[32] * 12)]
    [2048, 4096, 8192, 16384, 23040]
    """
    if phases < 1 or not windows or longest < length:
        raise LongspanError(
            f"a staged schedule needs at least one phase and one layer, and longest ≥ length; got "
            f"phases={phases}, {len(windows)} windows, length={length}, longest={longest}."
        )
    return [
        Phase(min(length << i, longest), tuple(w << i for w in windows), lr / 2**i)
        for i in range(phases)
    ]
