"""A memory carries from one segment to the next, and does nothing else.

A mechanism of kind memory is a Mixer, (x, state) → (y, state): x holds one segment or more, the
state what earlier ones left, None or a row of zeros where there were none. Its card's `exact`
holds the arguments that build it like `tiny` but with room for nothing; where it cuts segments of
its own, both give their length as `segment`.
"""

from longspan.card import Card, Kind
from longspan.testing.laws.comparing import gradients, near
from longspan.testing.laws.registry import law
from longspan.testing.subject import Subject

_MEMORY: frozenset[Kind] = frozenset({"memory"})


@law(modes={"causal", "step"}, kinds=_MEMORY, applies=lambda card: card.exact is not None)
def no_capacity_leaves_segments_alone(card: Card) -> None:
    """At its `exact` arguments, a segment gives what it gives without those before it."""
    subject, state = _neutral(card), None
    length = (card.exact or {}).get("segment", 24)
    for seed in range(4):
        x = subject.example(length, seed=seed)
        got, state = subject(x, state)
        near(got, subject(x)[0], f"segment {seed}")


@law(modes={"causal"}, kinds=_MEMORY, applies=lambda card: card.exact is not None)
def a_first_segment_has_no_memory(card: Card) -> None:
    """At its `tiny` arguments, one segment alone gives what it gives at the `exact` ones."""
    subject, neutral = Subject.of(card, causal=True), _neutral(card)
    keys = neutral.module.load_state_dict(subject.module.state_dict(), strict=False)
    assert not keys.missing_keys, f"without memory there is more: {keys.missing_keys}"
    for length in (card.tiny.get("segment", 24), 1):
        x = subject.example(length, gradient=True)
        got, want = subject(x)[0], neutral(x)[0]
        near(got, want, f"a segment of {length}")
        pairs = zip(
            gradients(subject, x, got, to_parameters=False),
            gradients(neutral, x, want, to_parameters=False),
            strict=True,
        )
        for a, b in pairs:
            near(a, b, f"the gradient of a segment of {length}", within=1e-8)


def _neutral(card: Card) -> Subject:
    return Subject.of(card, causal=True, arguments=dict(card.exact or {}))
