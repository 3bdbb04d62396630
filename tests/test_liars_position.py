"""The laws of positions catch the positions that break them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan.nn import Position
from longspan.testing import LAWS, check


class Honest(Position):
    """bias_ij = slope (j − i); every liar changes one line of it."""

    acts = frozenset({"bias"})

    def __init__(self, *, slope: float = 0.3) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(slope))

    def bias(self, q, k, pos_q, pos_k):
        return self.slope * self.distance(q, pos_q, pos_k)[None, None]

    def distance(self, q: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        return (pos_k - pos_q[:, None]).to(q.dtype)


class NeverNeutral(Honest):
    """Biases the first key whatever its slope."""

    def bias(self, q, k, pos_q, pos_k):
        return super().bias(q, k, pos_q, pos_k) + (pos_k == pos_k[0])


class SeesNoOrder(Honest):
    """Gives all keys the same bias."""

    def distance(self, q, pos_q, pos_k):
        return super().distance(q, pos_q, pos_k) * 0 + 1


class Idle(Honest):
    """Owns a parameter that nothing uses."""

    def __init__(self, *, slope: float = 0.3) -> None:
        super().__init__(slope=slope)
        self.idle = nn.Parameter(torch.zeros(2))


class Absolute(Honest):
    """Counts from the first token of all."""

    def distance(self, q, pos_q, pos_k):
        return super().distance(q, pos_q, pos_k) * (1 + pos_k)


class CountsItsOwn(Honest):
    """Takes the first query to be the first token."""

    def distance(self, q, pos_q, pos_k):
        return super().distance(q, torch.arange(len(pos_q)), pos_k).abs()


class CountsPadding(Honest):
    """Adds the slot's number, padding or not, to what queries and keys are made from."""

    acts = frozenset({"infuse"})

    def infuse(self, x, pos):
        return x + self.slope * torch.arange(x.shape[1]).to(x.dtype)[:, None].cos()


LIARS = {
    "neutral_positions_change_nothing": [NeverNeutral],
    "order_matters": [SeesNoOrder, Idle],
    "only_distances_count": [Absolute],
    "pieces_stand_where_the_whole_does": [CountsItsOwn, CountsPadding],
    "padding_takes_no_position": [CountsPadding],
}


CARD = {
    "kind": "position",
    "family": "position",
    "modes": {"bidirectional", "causal", "step"},
    "time": "L*S",
    "memory": "L*S",
    "exact": {"slope": 0.0},
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


def test_every_law_of_position_alone_has_a_liar() -> None:
    assert set(LIARS) == {name for name, entry in LAWS.items() if entry.kinds == {"position"}}
