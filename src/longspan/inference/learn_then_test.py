"""Learn then Test (Angelopoulos et al., 2021): knobs whose risks stay below levels, certified.

Each candidate j is tested against H_j: "its risk, the mean of losses in [0, 1], is above δ". With
valid p-values and the family-wise error held at ε, all rejected candidates have risk ≤ δ at once
with probability ≥ 1 − ε over the calibration samples, whatever their distribution.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.errors import LongspanError

Losses = Float[Tensor, "*runs n"]
PValues = Float[Tensor, "*runs"]
Bound = Literal["hoeffding-bentkus", "hoeffding", "binomial", "central-limit"]
Correction = Literal["fixed-sequence", "bonferroni"]


def hoeffding(losses: Losses, level: float) -> PValues:
    """p = exp(−2 n max(0, δ − R̂)²)."""
    losses = _checked(losses, level)
    return torch.exp(-2 * losses.shape[-1] * (level - losses.mean(-1)).clamp(min=0) ** 2)


def hoeffding_bentkus(losses: Losses, level: float) -> PValues:
    """p = min(exp(−n h(min(R̂, δ), δ)), e P(Bin(n, δ) ≤ ⌈n R̂⌉)), at most 1 (Prop. 3).

    h(a, b) = a log(a / b) + (1 − a) log((1 − a) / (1 − b)).
    """
    losses = _checked(losses, level)
    n, total = losses.shape[-1], losses.sum(-1)
    a = (total / n).clamp(max=level)
    divergence = torch.xlogy(a, a / level) + torch.xlogy(1 - a, (1 - a) / (1 - level))
    bentkus = math.e * _binomial_tail(total.ceil().long(), n, level)
    return torch.minimum(torch.exp(-n * divergence), bentkus).clamp(max=1)


def binomial(losses: Losses, level: float) -> PValues:
    """p = P(Bin(n, δ) ≤ n R̂), exact for losses that are 0 or 1.

    Raises:
        LongspanError: a loss between 0 and 1.
    """
    losses = _checked(losses, level)
    if not bool(((losses == 0) | (losses == 1)).all()):
        raise LongspanError(
            "the binomial p-value is for losses of 0 or 1: use hoeffding-bentkus for others."
        )
    return _binomial_tail(losses.sum(-1).long(), losses.shape[-1], level)


def central_limit(losses: Losses, level: float) -> PValues:
    """p = 1 − Φ((δ − R̂) √n / s), valid only as n → ∞; 1 where the samples do not differ."""
    losses = _checked(losses, level)
    n, spread = losses.shape[-1], losses.std(-1)
    score = (level - losses.mean(-1)) * math.sqrt(n) / spread
    # Without spread (or with one sample) the normal limit says nothing: no false certainty.
    return torch.where(spread > 0, torch.special.ndtr(-score), 1.0)


BOUNDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "hoeffding-bentkus": hoeffding_bentkus,
    "hoeffding": hoeffding,
    "binomial": binomial,
    "central-limit": central_limit,
}


def bonferroni(p: Sequence[float], error: float) -> list[bool]:
    """Reject H_j where p_j ≤ ε / k."""
    return [x <= error / len(p) for x in p]


def fixed_sequence(p: Sequence[float], error: float, starts: Sequence[int] = (0,)) -> list[bool]:
    """From each start on, reject while p_j ≤ ε / |starts|, and stop at the first failure (Alg. 1).

    The order of the candidates and the starts must not come from the calibration samples.

    Raises:
        LongspanError: a start that is given twice or is no candidate.
    """
    return _in_order(p.__getitem__, len(p), error, starts)


def _in_order(
    p: Callable[[int], float], candidates: int, error: float, starts: Sequence[int]
) -> list[bool]:
    """`fixed_sequence` of p-values that are worked out when asked for: none behind a failure is."""
    if not starts or len(set(starts)) < len(starts) or not set(starts) <= set(range(candidates)):
        raise LongspanError(
            f"starts={list(starts)} for {candidates} candidates: give different numbers from 0 to "
            f"{candidates - 1}, at least one."
        )
    rejected = [False] * candidates
    for start in starts:
        for j in range(start, candidates):
            if p(j) > error / len(starts):
                break
            rejected[j] = True
    return rejected


@dataclass(frozen=True)
class Tested:
    """One candidate: its empirical risks and p-value (None where no test was needed)."""

    knob: Any
    risks: tuple[float, ...] | None
    p: float | None
    accepted: bool


@dataclass(frozen=True)
class Calibration:
    """What was tested: each accepted knob has all its risks ≤ `levels`, with probability ≥ 1 − ε.

    The probability is over the samples, and holds for all accepted knobs at once, so that one may
    choose among them by anything, costs measured on the same samples included.
    """

    tests: tuple[Tested, ...]
    levels: tuple[float, ...]
    error: float
    samples: int

    @property
    def accepted(self) -> tuple[Any, ...]:
        """The knobs that passed, in the order of testing."""
        return tuple(test.knob for test in self.tests if test.accepted)

    def choose(self, cost: Callable[[Any], float] = float) -> Any:
        """The accepted knob of least cost; by default the smallest.

        Raises:
            LongspanError: none was accepted.

        >>> calibration.choose(cost=lambda knob: seconds[knob])
        """
        if self.accepted:
            return min(self.accepted, key=cost)
        tried = [(test.p, n) for n, test in enumerate(self.tests) if test.p is not None]
        best = self.tests[min(tried)[1]]
        needed = math.ceil(max(math.log(self.error) / math.log1p(-x) for x in self.levels))
        raise LongspanError(
            f"no candidate was certified: the best of {len(tried)} tested, {best.knob}, has risks "
            f"{[round(risk, 4) for risk in best.risks or ()]} on {self.samples} samples, with "
            f"p = {min(tried)[0]:.3g}, for levels {list(self.levels)} and error {self.error}. Give "
            f"safer candidates, larger levels or more samples (at no loss at all, about {needed})."
        )

    def table(self) -> list[dict[str, Any]]:
        """A JSON-ready row for each candidate."""
        return [asdict(test) for test in self.tests]


class LearnThenTest:
    """Calibrates any knob: exit threshold, span, number of hashes, k of a retrieval.

    Args:
        error: ε. bound: the p-value. correction: how the family-wise error is held.
        starts: of fixed sequences, places among the knobs; ε is split between them.

    Raises:
        LongspanError: an unknown bound or correction, or an ε outside (0, 1).
    """

    def __init__(
        self,
        *,
        error: float = 0.05,
        bound: Bound = "hoeffding-bentkus",
        correction: Correction = "fixed-sequence",
        starts: Sequence[int] = (0,),
    ) -> None:
        if bound not in BOUNDS or correction not in ("fixed-sequence", "bonferroni"):
            raise LongspanError(
                f"no test '{bound}' with '{correction}'; expected a bound of {', '.join(BOUNDS)}, "
                "and fixed-sequence or bonferroni."
            )
        if not 0 < error < 1:
            raise LongspanError(f"error is {error}; expected a probability between 0 and 1.")
        self.error, self.bound, self.correction = error, bound, correction
        self.starts = tuple(starts)

    def __call__(
        self,
        losses: Callable[[Any], Tensor] | Tensor,
        knobs: Sequence[Any],
        levels: float | Sequence[float],
    ) -> Calibration:
        """Test the knobs in the order given, the safest first, which must be fixed beforehand.

        Args:
            losses: knob → losses in [0, 1] of the samples, n or n × risks, called only for knobs
                that are tested; or all of them, n × knobs or n × knobs × risks.
            levels: δ, one for each risk.
        """
        levels = (float(levels),) if isinstance(levels, int | float) else tuple(levels)
        if not len(knobs):
            raise LongspanError("there is no candidate to test: give at least one knob.")
        if isinstance(losses, Tensor) and (losses.dim() < 2 or losses.shape[1] != len(knobs)):
            raise LongspanError(
                f"losses are {tuple(losses.shape)} for {len(knobs)} knobs; expected samples × "
                "knobs, or samples × knobs × risks."
            )
        found: dict[int, tuple[tuple[float, ...], float]] = {}
        samples = 0

        def p(j: int) -> float:
            nonlocal samples
            if j not in found:
                own = losses[:, j] if isinstance(losses, Tensor) else losses(knobs[j])
                columns = _by_risk(own, len(levels), knobs[j])
                samples = columns.shape[1]
                # The null is a union, "any of the risks is too high": its p-value is the largest.
                pairs = zip(columns, levels, strict=True)
                largest = max(float(BOUNDS[self.bound](own, level)) for own, level in pairs)
                found[j] = tuple(columns.double().mean(1).tolist()), largest
            return found[j][1]

        if self.correction == "bonferroni":
            rejected = bonferroni([p(j) for j in range(len(knobs))], self.error)
        else:
            rejected = _in_order(p, len(knobs), self.error, self.starts)
        tests = (
            Tested(knob, *found.get(j, (None, None)), rejected[j]) for j, knob in enumerate(knobs)
        )
        return Calibration(tuple(tests), levels, self.error, samples)


def _by_risk(losses: Tensor, risks: int, knob: Any) -> Float[Tensor, "risks n"]:
    rows = losses[None] if losses.dim() == 1 else losses.mT
    if rows.dim() != 2 or len(rows) != risks:
        raise LongspanError(
            f"losses of knob {knob} are {tuple(losses.shape)}; expected samples × {risks} risks, "
            "one for each level."
        )
    return rows


def _checked(losses: Tensor, level: float) -> Tensor:
    if not 0 < level < 1:
        raise LongspanError(f"a level of {level} was given; expected one between 0 and 1.")
    losses = losses.double()
    if not losses.shape[-1] or not bool(((losses >= 0) & (losses <= 1)).all()):
        raise LongspanError(
            "losses must be numbers between 0 and 1, at least one: scale what is not "
            "(differences of risks are clipped at 0 first)."
        )
    return losses


def _binomial_tail(count: Tensor, n: int, level: float) -> Tensor:
    """P(Bin(n, δ) ≤ count)."""
    i = torch.arange(n + 1, dtype=torch.float64, device=count.device)
    ways = math.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    logs = ways + i * math.log(level) + (n - i) * math.log1p(-level)
    return logs.logcumsumexp(0).exp().clamp(max=1)[count]
