"""Every mechanism keeps every law that its card lets anyone rely on."""

import pytest

from longspan.registry import cards, show
from longspan.testing import check, laws_for, oracle_of

PAIRS = [(id, law) for id, card in cards().items() for law in laws_for(card)]


@pytest.mark.parametrize(("id", "law"), PAIRS, ids=[f"{id}-{law}" for id, law in PAIRS])
def test_law(id: str, law: str) -> None:
    verdict = check(law, show(id))
    if verdict.result == "skip":
        pytest.skip(verdict.reason or "")
    assert verdict.result == "pass", verdict.reason


MIXING = [id for id, c in cards().items() if c.kind in ("attention", "mixer", "memory")]


@pytest.mark.parametrize("id", MIXING)
def test_has_an_oracle(id: str) -> None:
    assert oracle_of(id) is not None, f"write one in src/longspan/testing/oracles/ for '{id}'"
