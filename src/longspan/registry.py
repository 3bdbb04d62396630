"""Finding mechanisms: a file under `mechanisms/` is found by being there.

Cards are read from the source without importing it, so that listing needs no torch; the module
is imported when something is built.
"""

import ast
import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args

from longspan.card import Card, Family, Kind, Mode
from longspan.errors import LongspanError, nearest

Builder = TypeVar("Builder", bound=Callable[..., Any])

_registered: dict[str, tuple[Card, Callable[..., Any]]] = {}


@dataclass(frozen=True)
class _Declared:
    card: Card
    module: str
    name: str


def mechanism(card: Card) -> Callable[[Builder], Builder]:
    """Declare the builder below as the mechanism described by `card`.

    The card's expression may use literals only: `longspan list` evaluates it without importing
    the file. Outside the package, decorating at import time is all that is needed.
    """

    def declare(builder: Builder) -> Builder:
        _registered[card.id] = (card, builder)
        builder.card = card  # pyright: ignore[reportFunctionMemberAccess]
        return builder

    return declare


@cache
def _declared() -> dict[str, _Declared]:
    root = Path(__file__).parent / "mechanisms"
    found: dict[str, _Declared] = {}
    for path in sorted(root.rglob("*.py")):
        module = ".".join(("longspan.mechanisms", *path.relative_to(root).with_suffix("").parts))
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                for call in (d for d in node.decorator_list if isinstance(d, ast.Call)):
                    if ast.unparse(call.func) == "mechanism":
                        source = ast.Expression(call.args[0])
                        card = eval(compile(source, str(path), "eval"), {"Card": Card})
                        found[card.id] = _Declared(card, module, node.name)
    return found


def cards() -> dict[str, Card]:
    """Every card by id, sorted."""
    own = {id_: entry.card for id_, entry in _declared().items()}
    return dict(sorted((own | {id_: card for id_, (card, _) in _registered.items()}).items()))


def show(id: str) -> Card:
    """The card of one mechanism.

    Raises:
        LongspanError: no such mechanism; the nearest name is suggested.

    >>> show("linear-transformer").time
    'L*D*V'
    """
    known = cards()
    if id not in known:
        raise LongspanError(
            f"no mechanism '{id}'{nearest(id, known) or ' (longspan.find() lists them all).'}"
        )
    return known[id]


def find(
    *, family: str | None = None, mode: str | None = None, kind: str | None = None
) -> list[Card]:
    """The cards that match every condition given.

    Raises:
        LongspanError: a family, mode or kind that does not exist.

    >>> [card.id for card in find(family="state-space")]
    ['s4']
    """
    for name, value, known in (
        ("family", family, Family),
        ("mode", mode, Mode),
        ("kind", kind, Kind),
    ):
        if value is not None and value not in get_args(known):
            raise LongspanError(
                f"no {name} '{value}'{nearest(value, get_args(known))} "
                f"Known: {', '.join(get_args(known))}."
            )
    return [
        card
        for card in cards().values()
        if (family is None or card.family == family)
        and (mode is None or mode in card.modes)
        and (kind is None or card.kind == kind)
    ]


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """(id, arguments) of `id` or `id(name=literal, …)`.

    Raises:
        LongspanError: no such mechanism, or arguments that are no literals.

    >>> parse("longformer(window=256)")
    ('longformer', {'window': 256})
    """
    found = re.fullmatch(r"([^\s()]+)(?:\((.*)\))?", text.strip())
    if found is None:
        raise LongspanError(
            f"'{text}' names no mechanism: write an id, or an id with arguments, as in "
            "longformer(window=256)."
        )
    try:
        call = ast.parse(f"f({found[2] or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(k.arg is None for k in call.keywords):
            raise ValueError(text)
        arguments = {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError):
        raise LongspanError(
            f"the arguments of '{text}' cannot be read: write name=literal, separated by "
            "commas, as in longformer(window=256)."
        ) from None
    return show(found[1]).id, arguments


def builder(id: str) -> Callable[..., Any]:
    """The class or function that builds `id`, imported now."""
    show(id)
    if id not in _registered:
        importlib.import_module(_declared()[id].module)
    return _registered[id][1]


def options(id: str) -> dict[str, inspect.Parameter]:
    """The arguments `id` is built with."""
    return dict(inspect.signature(builder(id)).parameters)


def build(id: str, **arguments: Any) -> Any:
    """Build a mechanism.

    Raises:
        LongspanError: no such mechanism, an argument it does not have, one it needs and did not
            get, or `causal=True` where no causal form exists.

    >>> attend = build("linear-transformer", causal=True)
    """
    card, known = show(id), options(id)
    for name in arguments:
        if name not in known:
            raise LongspanError(
                f"'{id}' has no argument '{name}'{nearest(name, known)} "
                f"It takes: {', '.join(known) or 'none'}."
            )
    missing = [n for n, p in known.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise LongspanError(f"'{id}' needs {', '.join(missing)}: give what is missing.")
    if arguments.get("causal") and "causal" not in card.modes:
        raise LongspanError(
            f"'{id}' has no causal form (modes: {', '.join(sorted(card.modes))}); "
            'longspan.find(mode="causal") lists those that have.'
        )
    return builder(id)(**arguments)
