"""Laws by name: which apply to a card, and how they come out."""

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from longspan.card import Card, Kind, Mode
from longspan.errors import LongspanError
from longspan.registry import show

Law = Callable[[Card], None]


@dataclass(frozen=True)
class Verdict:
    """How a law came out for one mechanism."""

    law: str
    result: Literal["pass", "fail", "skip"]
    reason: str | None = None


@dataclass(frozen=True)
class _Entry:
    check: Law
    modes: frozenset[Mode]
    kinds: frozenset[Kind]
    applies: Callable[[Card], bool]


LAWS: dict[str, _Entry] = {}
_SEQUENCE: frozenset[Kind] = frozenset({"attention", "mixer", "memory"})
PLACED: frozenset[Kind] = frozenset({"attention", "mixer", "memory", "position"})


def law(
    *,
    modes: set[Mode] | None = None,
    kinds: frozenset[Kind] = _SEQUENCE,
    applies: Callable[[Card], bool] = lambda card: True,
) -> Callable[[Law], Law]:
    """Declare a law for cards of these kinds that have all of these modes."""

    def declare(check: Law) -> Law:
        name = getattr(check, "__name__", "law")
        LAWS[name] = _Entry(check, frozenset(modes or ()), kinds, applies)
        return check

    return declare


def laws_for(card: Card) -> list[str]:
    """Names of the laws that apply to a card, skipped ones included."""
    return [
        name
        for name, entry in LAWS.items()
        if card.kind in entry.kinds and entry.modes <= card.modes and entry.applies(card)
    ]


def check(name: str, card: Card) -> Verdict:
    """Run one law.

    Raises:
        LongspanError: no such law.
    """
    if name not in LAWS:
        raise LongspanError(f"no law '{name}'; known: {', '.join(LAWS)}.")
    excuse = card.skips.get(name)
    try:
        LAWS[name].check(card)
    except Exception as error:  # a law may fail in any way
        if excuse:
            return Verdict(name, "skip", excuse)
        last = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(last.filename).name}:{last.lineno}"
        return Verdict(name, "fail", f"{type(error).__name__} at {at}: {error}".strip())
    if excuse:
        return Verdict(name, "fail", f"the card skips this law, but it holds: remove '{excuse}'.")
    return Verdict(name, "pass")


def certificate(id: str) -> list[Verdict]:
    """Every law that applies to a mechanism, checked now.

    >>> all(verdict.result != "fail" for verdict in certificate("linear-transformer"))
    True
    """
    card = show(id)
    return [check(name, card) for name in laws_for(card)]
