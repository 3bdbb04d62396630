"""What a comparison is made of: one dataclass, whose fields the CLI sets."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.registry import cards, find, parse

Match = Literal["params", "flops", "state", "time"]
BASELINE = "multi-head-attention"
# One of each way past the bottleneck, and dense attention: minutes, where all take hours.
CORE = (
    BASELINE,
    "linear-transformer",
    "longformer",
    "reformer-lsh-causal",
    "s4",
    "transformer-xl",
)
MIXING = ("attention", "mixer", "memory")
_UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Budget:
    """How long a row trains: seconds or tokens, one of the two."""

    seconds: float | None = None
    tokens: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `30s`, `2m`, `1h` or `200000tok`.

        >>> Budget.parse("2m").seconds
        120.0
        """
        found = re.fullmatch(r"([\d_]+(?:\.\d+)?)\s*(s|m|h|tok)", text.strip())
        amount = float(found[1]) if found else 0.0
        if found is None or amount <= 0:
            raise LongspanError(
                f"'{text}' is no budget: give seconds, minutes, hours or tokens, as in "
                "30s, 2m, 1h, 200000tok."
            )
        if found[2] == "tok":
            return cls(tokens=int(amount))
        return cls(seconds=amount * _UNITS[found[2]])


@dataclass(frozen=True)
class Spec:
    """A mechanism and the arguments it is built with, as in `longformer(window=256)`."""

    id: str
    arguments: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Spec":
        """Read `id` or `id(name=literal, …)`."""
        return cls(*parse(text))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One comparison: what every row has in common.

    Args:
        data: name of a corpus, or a path.
        match: what is made equal to dense attention's model. `params`: the number of parameters,
            within 2 %; `flops`: counted training FLOPs a token at `length`, within 2 %; both by
            the inner width of the feed-forward layers. `state`: bytes carried when decoding, by
            the mechanism's own size option (its window, memory, slots), set to what dense
            attention holds after an eighth of `length` tokens (at `length` itself the only match
            of a window would be dense attention), and then parameters as before. `time`:
            wall-clock alone: the same widths, whatever parameters come of it, and a budget in
            time. (A budget in time gives every row the same seconds under any match.)
        budget: of training, a row: `2m`, `30s`, `1h` or `200000tok`. The recall task trains for a
            quarter of it more.
        batch: windows a step; by default 4096 tokens' worth.
        rate: the peak learning rate; every row has the same.
        certificate: whether each row also checks the laws of its mechanism.
        allow_leaks: train mechanisms whose causal form can see the future.
    """

    data: str = "stdlib"
    length: int = 4096
    match: str = "params"
    budget: str = "2m"
    width: int = 128
    layers: int = 2
    heads: int = 4
    batch: int | None = None
    rate: float = 2e-3
    device: str = "cpu"
    certificate: bool = True
    allow_leaks: bool = False

    def __post_init__(self) -> None:
        budget = Budget.parse(self.budget)
        if self.match not in get_args(Match):
            raise LongspanError(f"no match '{self.match}'; expected {', '.join(get_args(Match))}.")
        if self.match == "time" and budget.seconds is None:
            raise LongspanError(
                f"--match time needs a budget in time and got '{self.budget}': give 30s, 2m or 1h."
            )
        for name, least in (("length", 16), ("width", 8), ("layers", 1), ("heads", 1)):
            if getattr(self, name) < least:
                raise LongspanError(
                    f"{name} {getattr(self, name)} is too small: give at least {least}."
                )
        if self.width % self.heads:
            raise LongspanError(
                f"width {self.width} does not divide into {self.heads} heads: choose a multiple."
            )
        if self.batch is None:
            object.__setattr__(self, "batch", max(1, 4096 // self.length))

    def describe(self, data: dict[str, Any]) -> dict[str, Any]:
        """The `settings` of a record: these, the corpus in full, and a digest of both.

        Rows with another digest stay in their file and are not mixed with these. What a row may
        do (`allow_leaks`) is no part of what it does.
        """
        settings = {**asdict(self), "data": data}
        counted = {name: settings[name] for name in settings if name != "allow_leaks"}
        text = json.dumps(counted, sort_keys=True, default=str)
        return {**settings, "digest": hashlib.sha256(text.encode()).hexdigest()[:16]}


def choose(text: str) -> list[Spec]:
    """The mechanisms of `a,b(window=64),c`, `family:NAME`, `core` or `all`; each once.

    Raises:
        LongspanError: an unknown id or family, arguments that cannot be read, nothing chosen.
    """
    chosen: list[Spec] = []
    for part in re.split(r",(?![^(]*\))", text):
        part = part.strip()
        if part == "core":
            specs = [Spec(id_, {}) for id_ in CORE]
        elif part == "all":
            specs = [Spec(c.id, {}) for c in cards().values() if c.kind in MIXING]
        elif part.startswith("family:"):
            family = find(family=part.removeprefix("family:"))
            specs = [Spec(c.id, {}) for c in family if c.kind in MIXING]
        else:
            specs = [Spec.parse(part)]
        chosen += [spec for spec in specs if spec not in chosen]
    if not chosen:
        raise LongspanError(
            f"'{text}' chooses no mechanism that mixes a sequence; see longspan list."
        )
    return chosen


def refusal(card: Card, *, allow_leaks: bool) -> str | None:
    """Why a mechanism cannot be trained as a language model here, or None."""
    if card.kind not in MIXING:
        return (
            f"'{card.id}' is of kind {card.kind}, which mixes no sequence by itself: "
            f"compare takes the kinds {', '.join(MIXING)}."
        )
    strict = _strict(card)
    instead = f"compare '{strict}', which is" if strict else "no strict variant is registered"
    if "causal" not in card.modes:
        return f"'{card.id}' has no causal form (modes: {', '.join(sorted(card.modes))})" + (
            f": {instead} causal." if strict else "; a language model needs one."
        )
    if card.causality != "strict" and not allow_leaks:
        how = (
            "later tokens choose whom earlier ones attend to"
            if card.causality == "selection"
            else "later tokens reach earlier ones through rounding"
        )
        return f"'{card.id}' can see the future ({how}): {instead}" + (
            " strict, or pass --allow-leaks."
            if strict
            else "; --allow-leaks trains it all the same."
        )
    return None


def _strict(card: Card) -> str | None:
    variant = cards().get(f"{card.id}-causal")
    return variant.id if variant and variant.causality == "strict" else None
