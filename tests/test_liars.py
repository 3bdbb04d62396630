"""Each law catches the mechanism that breaks it: liars are built on purpose."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan import registry
from longspan.card import Card
from longspan.nn import Attention
from longspan.testing import LAWS, check, oracles


class Cache(NamedTuple):
    k: Tensor
    v: Tensor
    keep: Tensor


class Honest(Attention):
    """Softmax attention in the plainest form; every liar changes one line of it."""

    def forward(self, q, k, v, state=None, *, keep=None):
        seen = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
        k, v = (t.masked_fill(~seen[:, None, :, None], 0) for t in (k, v))
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            seen = torch.cat([state.keep, seen], 1)
        carried = Cache(k, v, seen) if self.causal else None
        return self.attend(q, k, v, seen), carried

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
        return self.weights(q, k, seen) @ v

    def weights(self, q: Tensor, k: Tensor, seen: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).mT / q.shape[-1] ** 0.5
        mask = self.mask(q.shape[2], k.shape[2]) & seen[:, None, None]
        scores = scores.masked_fill(~mask, -torch.inf)
        dead = ~mask.any(-1, keepdim=True)
        return scores.masked_fill(dead, 0).softmax(-1).masked_fill(dead, 0).to(q.dtype)

    def mask(self, queries: int, keys: int) -> Tensor:
        whole = torch.ones(queries, keys, dtype=torch.bool)
        return whole.tril(keys - queries) if self.causal else whole


class PeeksByWeight(Honest):
    """Sees one token ahead."""

    def mask(self, queries, keys):
        whole = torch.ones(queries, keys, dtype=torch.bool)
        return whole.tril(keys - queries + 1) if self.causal else whole


class PeeksBySelection(Honest):
    """Scales by the largest key of the whole sequence: no gradient, but later tokens matter."""

    def attend(self, q, k, v, seen):
        return super().attend(q, k / k.detach().abs().amax((2, 3), keepdim=True).clamp(1), v, seen)


class IgnoresKeep(Honest):
    """Attends to padding."""

    def forward(self, q, k, v, state=None, *, keep=None):
        return super().forward(q, k.nan_to_num(), v.nan_to_num(), state)


class MultipliesNaN(Honest):
    """Masks the scores but lets NaN values through the weighted sum."""

    def forward(self, q, k, v, state=None, *, keep=None):
        seen = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
        carried = Cache(k, v, seen) if self.causal else None
        return self.attend(q, k.nan_to_num(), v, seen), carried


class StepDiffers(Honest):
    """Forgets the oldest key when it has a state."""

    def forward(self, q, k, v, state=None, *, keep=None):
        if state is not None:
            state = Cache(*(t[:, :, 1:] for t in state[:2]), state.keep[:, 1:])
        return super().forward(q, k, v, state, keep=keep)


class MixesRows(Honest):
    """Subtracts the batch's mean key."""

    def attend(self, q, k, v, seen):
        return super().attend(q, k - k.mean(0, keepdim=True) if k.shape[0] else k, v, seen)


class EmptyIsMean(Honest):
    """A row that sees nothing gives the mean of all values."""

    def weights(self, q, k, seen):
        scores = q @ k.mT / q.shape[-1] ** 0.5
        mask = self.mask(q.shape[2], k.shape[2]) & seen[:, None, None]
        weights = scores.masked_fill(~mask, -1e9).softmax(-1)
        return weights

    def attend(self, q, k, v, seen):
        return self.weights(q, k, seen) @ (v + 1)


class NeedsMany(Honest):
    """Cannot do one token."""

    def attend(self, q, k, v, seen):
        return super().attend(q, k, v, seen) if q.shape[2] > 1 else q * torch.nan


class RoundsBadly(Honest):
    """Sums its values in bfloat16."""

    def attend(self, q, k, v, seen):
        weights = self.weights(q, k, seen)
        return (weights.bfloat16() @ v.bfloat16()).to(v.dtype)


class Overflows(Honest):
    """exp without subtracting the maximum."""

    def weights(self, q, k, seen):
        mask = self.mask(q.shape[2], k.shape[2]) & seen[:, None, None]
        raised = (q @ k.mT / q.shape[-1] ** 0.5).exp() * mask
        return raised / raised.sum(-1, keepdim=True).clamp(min=1e-30)


class Random(Honest):
    """Drops keys at random in evaluation too."""

    def attend(self, q, k, v, seen):
        return super().attend(q, k, F.dropout(v, 0.5), seen)


class Unreached(Honest):
    """Owns a parameter that nothing uses."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__(causal=causal)
        self.idle = nn.Parameter(torch.zeros(3))


class LosesWeights(Honest):
    """Keeps a weight outside its state_dict."""

    made = 0

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__(causal=causal)
        type(self).made += 1
        self.factor = 1.0 + self.made

    def attend(self, q, k, v, seen):
        return self.factor * super().attend(q, k, v, seen)


class Counts(Honest):
    """Gives another result at every other call: recomputation differs."""

    calls = 0

    def attend(self, q, k, v, seen):
        type(self).calls += 1
        return super().attend(q, k, v, seen) * (2 if self.calls % 2 else 1)


class Traced(Honest):
    """Behaves otherwise while compiled."""

    def attend(self, q, k, v, seen):
        o = super().attend(q, k, v, seen)
        return o * 2 if torch.compiler.is_compiling() else o


class Torchy(Honest):
    """Lets torch's own errors through."""

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__(causal=causal)
        self._forward_pre_hooks.clear()


class SharesRows(Honest):
    """Keeps its state with the batch as the second axis."""

    def forward(self, q, k, v, state=None, *, keep=None):
        o, carried = super().forward(
            q, k, v, state and Cache(*(t.transpose(0, 1) for t in state)), keep=keep
        )
        return o, carried and Cache(*(t.transpose(0, 1) for t in carried))


# Law → the liar that it must catch.
LIARS: dict[str, list[type[Attention]]] = {
    "equals_its_oracle": [PeeksByWeight, IgnoresKeep, MixesRows],
    "equals_softmax_at_full_budget": [PeeksBySelection],
    "no_peeking": [PeeksByWeight, PeeksBySelection],
    "streaming_equals_whole": [StepDiffers],
    "state_rows_are_independent": [SharesRows],
    "padding_changes_nothing": [IgnoresKeep, MultipliesNaN],
    "rows_do_not_meet": [MixesRows],
    "nothing_to_see_gives_zero": [EmptyIsMean],
    "any_shape_and_layout": [NeedsMany],
    "rounds_as_well_as_the_formula": [RoundsBadly],
    "large_scores_stay_finite": [Overflows],
    "deterministic_and_quiet": [Random],
    "every_parameter_learns": [Unreached],
    "copies_and_reloads": [LosesWeights],
    "recomputes_alike": [Counts],
    "compiles": [Traced],
    "costs_what_it_says": [Honest],  # quadratic, but its card below says linear
    "carries_what_it_says": [Honest],  # a growing cache, but its card says constant
    "refuses_bad_arguments": [Torchy],
}


def card_of(builder: type, **facts: Any) -> Card:
    """A card that claims everything."""
    claims = {
        "time": "L*S*D",
        "memory": "S*D",
        "modes": {"bidirectional", "causal", "step"},
        "exact": {},
    }
    return Card(
        id=f"liar-{builder.__name__.lower()}",
        name=builder.__name__,
        kind="attention",
        family="dense",
        paper="None",
        cite="None",
        link="https://example.org",
        what="A liar.",
        **(claims | facts),
    )


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def put(builder: type, **facts: Any) -> Card:
        card = card_of(builder, **facts)
        monkeypatch.setitem(registry._registered, card.id, (card, builder))
        oracles._load()
        monkeypatch.setitem(oracles._oracles, card.id, oracles._oracles["multi-head-attention"])
        return card

    return put


@pytest.mark.parametrize(
    ("law", "liar"), [(law, liar) for law, liars in LIARS.items() for liar in liars]
)
def test_law_catches_its_liar(law: str, liar: type, declare: Any) -> None:
    cheap = law in ("costs_what_it_says", "carries_what_it_says")
    card = declare(liar, **({"time": "L*D*V", "memory": "D*V"} if cheap else {}))
    assert check(law, card).result == "fail"


@pytest.mark.parametrize("law", [law for law in LIARS if law in LAWS])
def test_the_honest_one_passes(law: str, declare: Any) -> None:
    verdict = check(law, declare(Honest))
    assert verdict.result == "pass", verdict.reason


def test_every_law_of_attention_has_a_liar() -> None:
    assert set(LIARS) == {name for name, entry in LAWS.items() if "attention" in entry.kinds}


def test_a_stale_skip_fails(declare: Any) -> None:
    card = declare(Honest, skips={"rows_do_not_meet": "no reason"})
    verdict = check("rows_do_not_meet", card)
    assert verdict.result == "fail"
    assert "remove" in (verdict.reason or "")
