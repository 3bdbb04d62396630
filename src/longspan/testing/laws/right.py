"""The values and gradients are those of the paper."""

import torch

from longspan.card import Card
from longspan.testing.laws.comparing import gradients, holes, near, whole_or_cross
from longspan.testing.laws.registry import law
from longspan.testing.oracles import oracle_of
from longspan.testing.subject import Subject


@law(applies=lambda card: oracle_of(card.id) is not None)
def equals_its_oracle(card: Card) -> None:
    """Values and gradients equal the paper's formula written out, in float64."""
    oracle = oracle_of(card.id)
    assert oracle is not None
    for subject, length, keys in whole_or_cross(card):
        for keep in (None, holes(keys)):
            inputs = subject.example(length, keys=keys, gradient=True)
            got, _ = subject(inputs, keep=keep)
            want = oracle(subject.module, *inputs, keep=keep)
            if keep is not None and length == keys:  # padded queries may give anything
                rows = keep[:, None, :, None] if subject.attends else keep[..., None]
                got, want = got * rows, want * rows
            where = f"L {length}, S {keys}, causal {subject.causal}, masked {keep is not None}"
            near(got, want, f"values at {where}")
            pairs = zip(
                gradients(subject, inputs, got), gradients(subject, inputs, want), strict=True
            )
            for i, (a, b) in enumerate(pairs):
                near(a, b, f"gradient {i} at {where}", within=1e-8)


@law(kinds=frozenset({"attention"}), applies=lambda card: card.exact is not None)
def equals_softmax_at_full_budget(card: Card) -> None:
    """At its `exact` arguments it is softmax attention."""
    for form in ("bidirectional", "causal"):
        if form not in card.modes:
            continue
        causal = form == "causal"
        subject = Subject.of(card, causal=causal, arguments=dict(card.exact or {}))
        q, k, v = subject.example(37)
        scores = q @ k.mT / q.shape[-1] ** 0.5
        if causal:
            scores = scores + torch.full((37, 37), -torch.inf, dtype=q.dtype).triu(1)
        near(subject((q, k, v))[0], scores.softmax(-1) @ v, f"{form} values")


@law(modes={"causal"})
def no_peeking(card: Card) -> None:
    """Later tokens have gradient exactly 0, and changing them changes no bit of earlier outputs."""
    subject = Subject.of(card, causal=True)
    for length, at in ((37, (0, 5, 18, 35)), (97, (64,))):
        inputs = subject.example(length, gradient=True)
        out, _ = subject(inputs)
        for t in at:
            early = out.narrow(subject.axis, 0, t + 1)
            for g in gradients(subject, inputs, early, to_parameters=False):
                late = g.narrow(subject.axis, t + 1, length - t - 1)
                assert not late.any(), f"outputs up to {t} of {length} have gradient in later ones"
            for seed, scale in ((7, 1.0), (8, 100.0)):
                other = subject.example(length, seed=seed, scale=scale)
                mixed = [
                    torch.cat(
                        [
                            a.narrow(subject.axis, 0, t + 1),
                            b.narrow(subject.axis, t + 1, length - t - 1),
                        ],
                        subject.axis,
                    )
                    for a, b in zip(subject.distinct(inputs), subject.distinct(other), strict=True)
                ]
                if subject.shared:
                    mixed = [mixed[0], mixed[0], mixed[1]]
                changed, _ = subject(tuple(mixed))
                same = torch.equal(changed.narrow(subject.axis, 0, t + 1), early)
                assert same, f"outputs up to {t} of {length} change with later tokens"
