"""Each law of residuals catches the mechanism that breaks it: liars are built on purpose."""

from typing import Any

import pytest
import torch
from torch import nn

from longspan.nn.residual import Residual, Reversible
from longspan.testing import LAWS, check


class Honest(Reversible):
    """x + y, scaled where it is not neutral."""

    def __init__(self, *, neutral: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(24)) if not neutral else None

    def combine(self, x, y):
        return x + (y if self.scale is None else y * self.scale)


class Halves(Honest):
    """Takes the mean."""

    def combine(self, x, y):
        return super().combine(x, y) / 2


class HidesFromTheBranch(Honest):
    """Gives the branch no gradient."""

    def combine(self, x, y):
        return super().combine(x, y.detach())


class Forgets(Honest):
    """Leaves the stream out."""

    def combine(self, x, y):
        return super().combine(0 * x, y)


class IdleScale(Honest):
    """Has a parameter that does nothing."""

    def combine(self, x, y):
        return x + y


class Blends(Honest):
    """Adds the mean of all tokens."""

    def combine(self, x, y):
        return super().combine(x, y) + (x - x.detach()).mean(1, keepdim=True)


class NormsTogether(Honest):
    """Scales by the largest value of the whole call."""

    def combine(self, x, y):
        return super().combine(x, y) / x.detach().abs().max()


class Rounds(Honest):
    """Keeps its streams in too few bits to come back from."""

    def through(self, branches, first, second, reads=()):
        outs = super().through(branches, first, second, reads)
        return tuple(t.bfloat16().double() for t in outs)


LIARS: dict[str, list[type[Residual]]] = {
    "neutral_is_the_sum": [Halves, HidesFromTheBranch],
    "stream_and_branch_both_count": [HidesFromTheBranch, Forgets, IdleScale],
    "tokens_are_joined_one_by_one": [Blends, NormsTogether],
    "undone_as_it_was_done": [Rounds],
}


CARD = {
    "kind": "residual",
    "family": "training",
    "modes": {"bidirectional", "causal"},
    "time": "L*E",
    "memory": "L*E",
    "exact": {"neutral": True},
}


@pytest.mark.parametrize(
    ("law", "liar"), [(law, liar) for law, liars in LIARS.items() for liar in liars]
)
def test_law_catches_its_liar(law: str, liar: type, declare: Any) -> None:
    verdict = check(law, declare(liar))
    assert verdict.result == "fail"
    assert "AssertionError" in (verdict.reason or ""), verdict.reason


@pytest.mark.parametrize("law", LIARS)
def test_the_honest_one_passes(law: str, declare: Any) -> None:
    verdict = check(law, declare(Honest))
    assert verdict.result == "pass", verdict.reason


def test_every_law_of_residuals_has_a_liar() -> None:
    assert set(LIARS) == {name for name, entry in LAWS.items() if "residual" in entry.kinds}
