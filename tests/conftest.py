"""Every test runs with shapes and types checked at each call."""

import os
from collections.abc import Callable
from typing import Any

import pytest

# Several workers share two cores: idle threads must not spin.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from jaxtyping import install_import_hook

_hook = install_import_hook("longspan", "beartype.beartype")


@pytest.fixture
def declare(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Registers a builder under a card of the facts in the test module's `CARD`."""
    from longspan import registry
    from longspan.card import Card

    def put(builder: type) -> Card:
        card = Card(
            id=f"liar-{builder.__name__.lower()}",
            name=builder.__name__,
            paper="None",
            cite="None",
            link="https://example.org",
            what="A liar.",
            **request.module.CARD,
        )
        monkeypatch.setitem(registry._registered, card.id, (card, builder))
        return card

    return put
