"""The card: what is known of a mechanism, as data that tests, docs, benchmarks and CLI read."""

import ast
import operator
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from longspan.errors import LongspanError

Kind = Literal[
    "attention",
    "mixer",
    "position",
    "memory",
    "residual",
    "depth",
    "length",
    "retrieval",
    "training",
    "inference",
    "analysis",
    "architecture",
]
Family = Literal[
    "dense",
    "position",
    "kernel",
    "low-rank",
    "sparse-pattern",
    "sparse-content",
    "global-local",
    "state-space",
    "convolution",
    "recurrent-memory",
    "compressed-memory",
    "hierarchical",
    "latent",
    "adaptive-span",
    "adaptive-depth",
    "retrieval",
    "conversion",
    "training",
    "rl",
    "benchmark",
    "analysis",
]
Mode = Literal["bidirectional", "causal", "cross", "step"]
Causality = Literal["strict", "selection", "numerical"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """The facts of one mechanism.

    Args:
        id: kebab-case name, as the paper names itself.
        what: one plain sentence.
        modes: the forms it has; `step` says that a carried state gives the same as the whole.
        time, memory: cost of one head and size of the carried state, as sums of products of the
            letters L, S (tokens), D, V (widths), E (model width), C (chunk or window), M (slots);
            the laws measure both.
        causality: `strict`, or how the causal form can see the future (`selection`: later tokens
            change whom earlier ones attend to; `numerical`: only through rounding).
        tiny: arguments that build it small, for the laws.
        exact: arguments at which it must equal softmax attention; None where it never does.
        grain: streaming in pieces of multiples of this many tokens equals the whole.
        skips: law name → why it cannot hold; the law then has to fail, or the skip is stale.
    """

    id: str
    name: str
    kind: Kind
    family: Family
    paper: str
    cite: str
    link: str
    what: str
    modes: Set[Mode]
    time: str
    memory: str
    causality: Causality = "strict"
    tiny: Mapping[str, Any] = field(default_factory=dict)
    exact: Mapping[str, Any] | None = None
    grain: int = 1
    skips: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", {self.kind}, Kind),
            ("family", {self.family}, Family),
            ("modes", self.modes, Mode),
            ("causality", {self.causality}, Causality),
        ):
            if unknown := set(value) - set(get_args(known)):
                raise LongspanError(
                    f"card '{self.id}': {name} has no value {sorted(unknown)}; "
                    f"expected {', '.join(get_args(known))}."
                )
        object.__setattr__(self, "modes", frozenset(self.modes))

    def cost(self, which: Literal["time", "memory"], **letters: int) -> float:
        """The value of `time` or `memory` for given letters.

        >>> Card(..., time="L*S*D").cost("time", L=4, S=4, D=2)
        32.0
        """
        return float(_evaluate(ast.parse(getattr(self, which), mode="eval").body, letters))

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready facts, modes sorted."""
        return {
            **asdict(self),
            "modes": sorted(self.modes),
            "tiny": dict(self.tiny),
            "exact": None if self.exact is None else dict(self.exact),
            "skips": dict(self.skips),
        }


_ARITHMETIC = {ast.Add: operator.add, ast.Mult: operator.mul}


def _evaluate(node: ast.expr, letters: Mapping[str, int]) -> float:
    match node:
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_evaluate(left, letters), _evaluate(right, letters))
        case ast.Name(id=letter) if letter in letters:
            return float(letters[letter])
        case ast.Constant(value=int(value)):
            return float(value)
        case _:
            raise LongspanError(
                f"a cost holds {ast.unparse(node)!r}; expected sums and products of "
                f"{', '.join(sorted(letters))} and whole numbers."
            )
