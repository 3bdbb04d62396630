"""Each law of depth catches the driver that breaks it: liars are built on purpose."""

from typing import Any

import pytest
import torch
from torch import nn

from longspan.nn.depth import Depth, Went, onward
from longspan.testing import LAWS, check


class Honest(Depth):
    """Halts a position once a learned score of its state is positive; liars change one line."""

    def __init__(self, *, halts: bool = True) -> None:
        super().__init__()
        self.halts = halts
        self.score = nn.Linear(24, 1)

    def forward(self, steps, x, states=None, *, keep=None):
        active = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        taken, carried, carries = torch.zeros(x.shape[:2], dtype=torch.long), [], True
        for n, step in enumerate(self.chosen(steps)):
            taken = taken + active
            x, state = onward(step, x, self.before(states, n), active, carries=carries)
            carries = state is not None
            carried.append(state)
            if self.halts:
                active = active & ~self.done(x, active)
        return Went(x, tuple(carried), taken)

    def chosen(self, steps):
        return steps

    def before(self, states, n):
        return states and states[n]

    def done(self, x, active):
        return self.score(x)[..., 0] > 0


class StopsEarly(Honest):
    """Never runs the last block."""

    def chosen(self, steps):
        return steps[:-1]


class HaltsRegardless(Honest):
    """Halts although told not to."""

    def __init__(self, *, halts: bool = True) -> None:
        super().__init__()


class Forgets(Honest):
    """Gives the last step no state."""

    def before(self, states, n):
        return None if n == 3 else super().before(states, n)


class HaltsTogether(Honest):
    """Halts all positions by their mean score."""

    def done(self, x, active):
        return super().done(x, active) | (self.score(x).mean(1) > 0)


class SkipsStates(Honest):
    """Runs no step that nothing is active in, so that later tokens miss the halted ones."""

    def forward(self, steps, x, states=None, *, keep=None):
        def skipping(step):
            def run(x, state, active):
                if active is not None and not active.any():
                    return x, state
                return step(x, state, active)

            return run

        return super().forward([skipping(s) for s in steps], x, states, keep=keep)


LIARS: dict[str, list[type[Depth]]] = {
    "never_halting_is_the_plain_stack": [StopsEarly, HaltsRegardless],
    "halting_streams": [Forgets, HaltsTogether, SkipsStates],
    "halting_sees_no_future": [HaltsTogether],
}


CARD = {
    "kind": "depth",
    "family": "adaptive-depth",
    "modes": {"bidirectional", "causal", "step"},
    "time": "L*E*E",
    "memory": "L*E",
    "exact": {"halts": False},
}


@pytest.mark.parametrize(
    ("law", "liar"), [(law, liar) for law, liars in LIARS.items() for liar in liars]
)
def test_law_catches_its_liar(law: str, liar: type, declare: Any) -> None:
    assert check(law, declare(liar)).result == "fail"


@pytest.mark.parametrize("law", LIARS)
def test_the_honest_one_passes(law: str, declare: Any) -> None:
    verdict = check(law, declare(Honest))
    assert verdict.result == "pass", verdict.reason


def test_every_law_of_depth_has_a_liar() -> None:
    assert set(LIARS) == {name for name, entry in LAWS.items() if "depth" in entry.kinds}
