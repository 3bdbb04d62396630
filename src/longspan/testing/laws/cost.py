"""Time and state grow no faster than the card says."""

import torch
from torch import Tensor

from longspan.card import Card
from longspan.nn import state_bytes
from longspan.testing import counting
from longspan.testing.laws.comparing import forms
from longspan.testing.laws.registry import law
from longspan.testing.subject import HEADS, MODEL_WIDTH, WIDTH, Subject

_SHORT, _LONG = 512, 2048


def _letters(length: int) -> dict[str, int]:
    return {
        "L": length,
        "S": length,
        "D": WIDTH,
        "V": WIDTH,
        "H": HEADS,
        "E": MODEL_WIDTH,
        "C": 16,
        "M": 16,
    }


@law()
def costs_what_it_says(card: Card) -> None:
    """FLOPs and bytes, forward and backward, grow from L to 4 L no faster than `time` says."""
    claimed = card.cost("time", **_letters(_LONG)) / card.cost("time", **_letters(_SHORT))
    for subject in forms(card, dtype=torch.float32):
        costs = []
        for length in (_SHORT, _LONG):
            inputs = subject.example(length, batch=1, gradient=True)

            def call(inputs: tuple[Tensor, ...] = inputs, subject: Subject = subject) -> None:
                out, _ = subject(inputs)
                out.sum().backward()

            costs.append(counting.count(call))
        for name in ("flops", "bytes"):
            less, more = getattr(costs[0], name), getattr(costs[1], name)
            assert more <= 1.15 * claimed * max(less, 1), (
                f"{name} grow {more / max(less, 1):.1f}× from L {_SHORT} to {_LONG}; "
                f"'{card.time}' allows {claimed:.1f}×"
            )


@law(modes={"causal", "step"})
def carries_what_it_says(card: Card) -> None:
    """The state's bytes grow from L to 4 L no faster than `memory` says."""
    subject = Subject.of(card, causal=True, dtype=torch.float32)
    lengths = (_SHORT, _LONG)
    with torch.no_grad():
        less, more = (state_bytes(subject(subject.example(n, batch=1))[1]) for n in lengths)
    claimed = card.cost("memory", **_letters(_LONG)) / card.cost("memory", **_letters(_SHORT))
    assert more <= 1.05 * claimed * less, (
        f"the state grows {more / less:.2f}× from L {_SHORT} to {_LONG}; "
        f"'{card.memory}' allows {claimed:.2f}×"
    )
