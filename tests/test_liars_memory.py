"""The laws of memories catch the mechanisms that break them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.engines import segment
from longspan.nn import Mixer
from longspan.testing import LAWS, check


class Honest(Mixer):
    """y_t = x_t + the mean of the last `memory` vectors before the segment; liars change a line."""

    def __init__(self, *, memory: int = 8) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, x, state=None, *, keep=None, context=None, marks=None):
        queue = segment.empty(x) if state is None else state
        seen = x.new_ones(x.shape[:2], dtype=torch.bool)
        pushed = segment.push(queue, x, seen, capacity=self.capacity())
        return x + self.read(queue, x), pushed

    def capacity(self) -> int:
        return self.memory

    def read(self, queue: segment.Queue, x: Tensor) -> Tensor:
        if not queue.items.shape[1]:
            return torch.zeros_like(x)
        return queue.items.mean(1, keepdim=True).expand_as(x)


class KeepsOne(Honest):
    """Has room for a vector where it was given none."""

    def capacity(self) -> int:
        return max(self.memory, 1)


class StartsFull(Honest):
    """Reads an empty memory as ones."""

    def read(self, queue, x):
        if self.memory and not queue.items.shape[1]:
            return torch.ones_like(x)
        return super().read(queue, x)


class LosesGradient(Honest):
    """Gives the right values without their gradient."""

    def read(self, queue, x):
        return super().read(queue, x) + (x.detach() - x if self.memory else 0)


LIARS = {
    "no_capacity_leaves_segments_alone": [KeepsOne],
    "a_first_segment_has_no_memory": [StartsFull, LosesGradient],
}


CARD = {
    "kind": "memory",
    "family": "recurrent-memory",
    "modes": {"causal", "step"},
    "time": "L*E",
    "memory": "M*E",
    "exact": {"memory": 0},
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


def test_every_law_of_memory_alone_has_a_liar() -> None:
    assert set(LIARS) == {name for name, entry in LAWS.items() if entry.kinds == {"memory"}}
