"""Retrieval: a reader that reads nothing is the base model, and what it gives is a distribution."""

from typing import Any

import torch
from torch import Tensor

from longspan.card import Card, Kind
from longspan.nn.retrieval import Base, Found, Reader
from longspan.registry import build
from longspan.testing.laws.comparing import near
from longspan.testing.laws.registry import law
from longspan.testing.subject import BATCH, MODEL_WIDTH

_KINDS = frozenset[Kind]({"retrieval", "inference"})
_LENGTH, _FOUND, _VOCABULARY = 7, 5, 11


def _reads(card: Card) -> bool:
    return card.family == "retrieval" and card.exact is not None


def _reader(card: Card, arguments: Any) -> Reader:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build(card.id, **arguments).double().eval()


def _base() -> Base:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(BATCH, _LENGTH, MODEL_WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(_VOCABULARY, MODEL_WIDTH, generator=generator, dtype=torch.float64)
    return Base(hidden @ weight.mT, hidden, weight)


def _found() -> Found:
    """Neighbours for every position, some slots of which are empty."""
    generator = torch.Generator().manual_seed(4)
    shape = BATCH, _LENGTH, _FOUND
    scores = torch.randn(shape, generator=generator, dtype=torch.float64)
    scores = scores.sort(-1, descending=True).values
    values = torch.randint(_VOCABULARY, shape, generator=generator)
    values[0, :, 3:] = -1
    return Found(scores.masked_fill(values < 0, -torch.inf), values)


def _alone(base: Base) -> Tensor:
    return base.logits.log_softmax(-1)


@law(kinds=_KINDS, applies=_reads)
def neutral_is_the_base_model(card: Card) -> None:
    """At its `exact` arguments a reader gives what the base model gives, whatever was found."""
    reader, base = _reader(card, dict(card.exact or {})), _base()
    near(reader(base, _found()), _alone(base), "log-probabilities")


@law(kinds=_KINDS, applies=_reads)
def finding_nothing_is_the_base_model(card: Card) -> None:
    """With k = 0, or where all slots are empty, a position keeps what the base model says."""
    reader, base, found = _reader(card, dict(card.tiny)), _base(), _found()
    near(reader(base, found.nearest(0)), _alone(base), "log-probabilities at k = 0")
    values = found.values.clone()
    values[:, ::2] = -1
    scores = found.scores.masked_fill(values < 0, -torch.inf)
    some = reader(base, Found(scores, values))
    near(some[:, ::2], _alone(base)[:, ::2], "positions that found nothing")
    near(some[:, 1::2], reader(base, found)[:, 1::2], "positions beside them")
    assert not torch.allclose(some[:, 1::2], _alone(base)[:, 1::2]), "nothing is read at all"


@law(kinds=_KINDS, applies=_reads)
def reading_gives_a_distribution(card: Card) -> None:
    """Probabilities sum to 1, in the order of the neighbours and with empty slots alike."""
    reader, base, found = _reader(card, dict(card.tiny)), _base(), _found()
    got = reader(base, found)
    near(got.exp().sum(-1), torch.ones(BATCH, _LENGTH, dtype=got.dtype), "sums")
    turned = reader(base, Found(found.scores.flip(-1), found.values.flip(-1)))
    near(turned, got, "neighbours in another order")
    more = torch.full((BATCH, _LENGTH, 3), -1)
    padded = Found(
        torch.cat([found.scores, more * torch.inf], -1), torch.cat([found.values, more], -1)
    )
    near(reader(base, padded), got, "more slots, all empty")


@law(kinds=_KINDS, modes={"causal"}, applies=_reads)
def a_position_reads_its_own(card: Card) -> None:
    """Other neighbours of later positions, and other logits there, change nothing before them."""
    reader, base, found = _reader(card, dict(card.tiny)), _base(), _found()
    whole = reader(base, found)
    for t in (1, 4):
        assert base.hidden is not None
        later = Base(_mixed(base.logits, t), _mixed(base.hidden, t), base.weight)
        other = reader(later, Found(_mixed(found.scores, t), _mixed(found.values, t)))
        assert torch.equal(other[:, :t], whole[:, :t]), f"later positions are read before {t}"


def _mixed(part: Tensor, t: int) -> Tensor:
    return torch.cat([part[:, :t], part[:, t:].flip(1)], 1)
