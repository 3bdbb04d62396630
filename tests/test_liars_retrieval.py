"""Each law of retrieval catches the reader that breaks it: liars are built on purpose."""

from typing import Any

import pytest
import torch

from longspan.nn.retrieval import Found, Reader, by_value, interpolate
from longspan.testing import LAWS, check


class Honest(Reader):
    """Neighbours vote with their scores; liars change one line."""

    def __init__(self, *, share: float = 0.3) -> None:
        super().__init__()
        self.share = share

    def forward(self, base, found):
        votes = by_value(*self.seen(found), base.logits.shape[-1])
        return interpolate(base.logits, votes, self.share)

    def seen(self, found):
        return found


class ReadsRegardless(Honest):
    """Mixes although told not to."""

    def __init__(self, *, share: float = 0.3) -> None:
        super().__init__(share=0.3)


class NeverReads(Honest):
    """Is always the base model."""

    def __init__(self, *, share: float = 0.3) -> None:
        super().__init__(share=0.0)


class LosesMass(Honest):
    """Takes λ away where nothing was found."""

    def forward(self, base, found):
        votes = by_value(*found, base.logits.shape[-1]).softmax(-1).nan_to_num(0)
        mixed = (1 - self.share) * base.logits.softmax(-1) + self.share * votes
        return base.logits.log_softmax(-1) if self.share == 0 else mixed.log()


class Ranks(Honest):
    """Weighs a neighbour by its rank."""

    def seen(self, found):
        return Found(found.scores - torch.arange(found.scores.shape[-1]), found.values)


class CountsEmpty(Honest):
    """Takes an empty slot for token 0."""

    def seen(self, found):
        scores = found.scores.masked_fill(found.values < 0, -1.0)
        return Found(scores, found.values.clamp(min=0))


class Doubles(Honest):
    """Gives no distribution."""

    def forward(self, base, found):
        whole = super().forward(base, found)
        found_some = (found.values >= 0).any(-1, keepdim=True)
        return torch.where(found_some & (self.share > 0), 2 * whole, whole)


class ReadsAhead(Honest):
    """Adds the next position's neighbours."""

    def forward(self, base, found):
        ahead = Found(*(torch.cat([t, t.roll(-1, 1)], -1) for t in found))
        some = (found.values >= 0).any(-1, keepdim=True)
        ahead = Found(ahead.scores, ahead.values.masked_fill(~some, -1))
        return super().forward(base, ahead)


LIARS: dict[str, list[type[Reader]]] = {
    "neutral_is_the_base_model": [ReadsRegardless],
    "finding_nothing_is_the_base_model": [LosesMass, CountsEmpty, NeverReads],
    "reading_gives_a_distribution": [Ranks, Doubles, CountsEmpty],
    "a_position_reads_its_own": [ReadsAhead],
}


CARD = {
    "kind": "retrieval",
    "family": "retrieval",
    "modes": {"causal", "step"},
    "time": "L*S*D",
    "memory": "S*D",
    "exact": {"share": 0.0},
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


def test_every_law_of_retrieval_has_a_liar() -> None:
    assert set(LIARS) == {name for name, entry in LAWS.items() if "retrieval" in entry.kinds}
