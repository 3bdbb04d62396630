"""What cannot work is refused."""

import torch

from longspan.card import Card
from longspan.registry import build, options
from longspan.testing.laws.comparing import forms, refused
from longspan.testing.laws.registry import PLACED, law
from longspan.testing.subject import BATCH


@law(kinds=PLACED)
def refuses_bad_arguments(card: Card) -> None:
    """Wrong arguments and inputs raise LongspanError, never a torch error or a silent result."""
    refused(lambda: build(card.id, no_such_argument=1), "an unknown argument")
    if "causal" in options(card.id):
        for form, causal in (("causal", True), ("bidirectional", False)):
            if form not in card.modes:
                refused(lambda c=causal: build(card.id, **card.tiny, causal=c), f"no {form} form")
    if card.kind == "position":
        return
    for subject in forms(card):
        inputs = subject.example(8)
        wrong = {
            "a mask of another length": torch.ones(BATCH, 9, dtype=torch.bool),
            "a mask of floats": torch.ones(BATCH, 8),
        }
        for what, keep in wrong.items():
            refused(lambda k=keep: subject(inputs, keep=k), what)  # noqa: B023
        refused(lambda: subject(subject.change(inputs, lambda t: t[0])), "a missing axis")  # noqa: B023
        if subject.attends:
            q, k, v = inputs
            refused(lambda: subject((q, k[:1], v)), "keys of another batch")  # noqa: B023
            refused(lambda: subject((q, k[..., :-1], v)), "keys of another width")  # noqa: B023
            if not subject.causal:
                state = (torch.zeros(BATCH, 1),)
                refused(lambda: subject(inputs, state), "a state without causality")  # noqa: B023
