"""Residual: neutral is the sum, both sides count, and tokens are joined one by one."""

from typing import Any

import torch
from torch import Tensor

from longspan.card import Card, Kind
from longspan.nn.residual import Residual, Reversible
from longspan.registry import build
from longspan.testing.laws.comparing import near
from longspan.testing.laws.registry import law
from longspan.testing.subject import BATCH, MODEL_WIDTH

_KIND: frozenset[Kind] = frozenset({"residual"})
_LENGTH = 7


def _built(card: Card, arguments: Any) -> Residual:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(card.id, **arguments).double().eval()


def _pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = 2, BATCH, _LENGTH, MODEL_WIDTH
    x, y = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), y.requires_grad_()


@law(kinds=_KIND, applies=lambda card: card.exact is not None)
def neutral_is_the_sum(card: Card) -> None:
    """At its `exact` arguments it gives x + y, and passes the gradient to both unchanged."""
    x, y = _pair()
    joined = _built(card, dict(card.exact or {})).combine(x, y)
    near(joined, x + y, "values")
    weight = x.detach().flip(1)
    for grad in torch.autograd.grad(joined, [x, y], weight, allow_unused=True):
        assert grad is not None, "no gradient to one side"
        near(grad, weight, "gradients")


@law(kinds=_KIND)
def stream_and_branch_both_count(card: Card) -> None:
    """Both have gradients, and so has every parameter that combining uses."""
    x, y = _pair()
    residual = _built(card, dict(card.tiny))
    wanted = [x, y, *(p for p in residual.parameters() if p.requires_grad)]
    names = ["the stream", "the branch", *(n for n, _ in residual.named_parameters())]
    out = residual.combine(x, y)
    for name, grad in zip(
        names, torch.autograd.grad(out.square().sum(), wanted, allow_unused=True), strict=True
    ):
        assert grad is not None, f"{name} has no gradient"
        assert grad.any(), f"{name} has a gradient of zeros"
        assert grad.isfinite().all(), f"{name} has a gradient that is not finite"


@law(kinds=_KIND)
def tokens_are_joined_one_by_one(card: Card) -> None:
    """A token's stream is of its own x and y: no other token's gradient or value is in it."""
    x, y = _pair()
    residual = _built(card, dict(card.tiny))
    out = residual.combine(x, y)
    for t in (0, 3):
        for grad in torch.autograd.grad(out[:, t].sum(), [x, y], retain_graph=True):
            grad[:, t] = 0
            assert not grad.any(), f"token {t} has gradient in others"
        near(residual.combine(x[:, t : t + 1], y[:, t : t + 1]), out[:, t : t + 1], f"token {t}")


@law(kinds=_KIND, applies=lambda card: isinstance(_built(card, dict(card.tiny)), Reversible))
def undone_as_it_was_done(card: Card) -> None:
    """From its two outputs, a stack of branches gives back its two inputs."""
    residual = _built(card, dict(card.tiny))
    assert isinstance(residual, Reversible)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        branches = [torch.nn.Linear(MODEL_WIDTH, MODEL_WIDTH).double() for _ in range(5)]
    x, y = _pair()
    for count in (0, 1, 4, 5):
        some = branches[:count]
        back = residual.undo(some, *residual.through(some, x, y))
        for got, want in zip(back, (x, y), strict=True):
            near(got, want, f"{count} branches")
