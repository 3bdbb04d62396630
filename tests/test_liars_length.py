"""Each law of length catches the mechanism that breaks it: liars are built on purpose."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.nn.lengths import Length
from longspan.testing import LAWS, check


class Seen(NamedTuple):
    """Every token so far, and what was made of every group."""

    x: Tensor
    y: Tensor
    tokens: Tensor


class Honest(Length):
    """Every s-th token, repeated; keeps the whole past and recomputes nothing by halves."""

    def __init__(self, *, factor: int = 3, causal: bool = False) -> None:
        super().__init__(factor=factor, causal=causal)

    def shorten(self, x, state=None, *, keep=None):
        new = torch.full((len(x),), x.shape[1]) if keep is None else keep.sum(1)
        x = x if keep is None else x.masked_fill(~keep[..., None], 0)
        seen = torch.zeros_like(new) if state is None else state.tokens
        first = -seen % self.factor
        count = max(int((-(-(new - first) // self.factor)).max()), 0)
        at = first[:, None] + torch.arange(count) * self.factor
        has = at < new[:, None]
        y = self.taken(x, at.clamp(max=x.shape[1] - 1))
        return y.masked_fill(~has[..., None], 0), has, (state, keep, seen, new, has)

    def taken(self, x: Tensor, at: Tensor) -> Tensor:
        return x.take_along_dim(at[..., None], 1)

    def lengthen(self, y, x, plan):
        state, keep, seen, new, has = plan
        before = seen * 0 if state is None else -(-seen // self.factor)
        held = y.new_zeros(len(y), 0, y.shape[2]) if state is None else state.y
        width = int((before + has.sum(1)).max())
        table = F.pad(held, (0, 0, 0, max(width - held.shape[1], 0)))
        for row in range(len(y)):
            start = int(before[row])
            mine = y[row, has[row]]
            table = table.clone()
            table[row, start : start + len(mine)] = mine
        at = self.groups(seen[:, None] + torch.arange(x.shape[1])).clamp(max=table.shape[1] - 1)
        u = table.take_along_dim(at[..., None], 1)
        u = u if keep is None else u.masked_fill(~keep[..., None], 0)
        return u, Seen(x, table, seen + new) if self.causal else None

    def groups(self, at: Tensor) -> Tensor:
        return at // self.factor


class Doubles(Honest):
    """Scales what it shortens."""

    def taken(self, x, at):
        return 2 * super().taken(x, at)


class CannotEnd(Honest):
    """Drops the tokens that fill no group."""

    def lengthen(self, y, x, plan):
        u, state = super().lengthen(y, x, plan)
        return u[:, : x.shape[1] // self.factor * self.factor], state


class PeeksWithinTheGroup(Honest):
    """Takes the last token of each group in place of the first: no shift."""

    def taken(self, x, at):
        return super().taken(x, (at + self.factor - 1).clamp(max=x.shape[1] - 1))


class PeeksWithoutGradient(Honest):
    """Scales by the largest value of the whole call."""

    def taken(self, x, at):
        return super().taken(x, at) / x.detach().abs().amax((1, 2), keepdim=True).clamp(min=1)


class Restarts(Honest):
    """Starts a group with every call."""

    def shorten(self, x, state=None, *, keep=None):
        return super().shorten(x, None, keep=keep)


class PoolsPadding(Honest):
    """Adds the mean of all tokens, masked ones counted."""

    def taken(self, x, at):
        return super().taken(x, at) + x.sum(1, keepdim=True) / x.shape[1]


LIARS: dict[str, list[type[Length]]] = {
    "factor_one_changes_nothing": [Doubles],
    "shortens_and_lengthens": [CannotEnd],
    "lengthens_without_peeking": [PeeksWithinTheGroup, PeeksWithoutGradient],
    "lengthens_in_pieces": [Restarts],
    "lengthens_padded_as_alone": [PoolsPadding],
}


CARD = {
    "kind": "length",
    "family": "hierarchical",
    "modes": {"bidirectional", "causal", "step"},
    "time": "L*E",
    "memory": "L*E",
    "exact": {"factor": 1},
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


def test_every_law_of_length_has_a_liar() -> None:
    assert set(LIARS) == {name for name, entry in LAWS.items() if "length" in entry.kinds}
