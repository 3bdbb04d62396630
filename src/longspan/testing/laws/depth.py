"""Depth: a driver that never halts is the plain stack, and halting is each position's own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longspan.card import Card
from longspan.nn import Block, FeedForward, MultiHead
from longspan.nn.depth import Depth, Went, step_of
from longspan.registry import build
from longspan.testing.laws.comparing import holes, near
from longspan.testing.laws.registry import law
from longspan.testing.subject import BATCH, HEADS, MODEL_WIDTH, parameters

_DEPTH, _LENGTH = 4, 13


def _blocks(*, causal: bool) -> list[Block]:
    """A stack whose last two layers are one block, in the orders that a card of depth may meet."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = [
            Block(
                MultiHead(
                    build("multi-head-attention", causal=causal),
                    width=MODEL_WIDTH,
                    heads=HEADS,
                    position=build("rope"),
                ),
                FeedForward(MODEL_WIDTH),
                width=MODEL_WIDTH,
                order="pre" if n % 2 else "post",
            )
            for n in range(_DEPTH - 1)
        ]
    return [block.double().eval() for block in (*blocks, blocks[-1])]


def _driver(card: Card, arguments: Any) -> Depth:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return build(card.id, **arguments).double().eval()


def _run(
    driver: Depth, blocks: Sequence[Block], x: Tensor, states: Any, keep: Tensor | None
) -> Went:
    return driver([step_of(block, keep=keep) for block in blocks], x, states, keep=keep)


def _example(length: int = _LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, length, MODEL_WIDTH, generator=generator, dtype=torch.float64)


@law(kinds=frozenset({"depth"}), applies=lambda card: card.exact is not None)
def never_halting_is_the_plain_stack(card: Card) -> None:
    """At its `exact` arguments a driver gives what its blocks give one after another."""
    driver = _driver(card, dict(card.exact or {}))
    for causal in (False, True):
        if ("causal" if causal else "bidirectional") not in card.modes:
            continue
        blocks = _blocks(causal=causal)
        for keep in (None, holes(_LENGTH)):
            x = _example().requires_grad_()
            want = x
            for block in blocks:
                want, _ = block(want, keep=keep)
            went = _run(driver, blocks, x, None, keep)
            some = torch.ones(BATCH, _LENGTH, dtype=torch.bool) if keep is None else keep
            where = f"causal {causal}, masked {keep is not None}"
            near(went.y[some], want[some], f"values at {where}")
            assert (went.taken[some] == _DEPTH).all(), f"positions halted at {where}"
            wanted = [x, *parameters(blocks[0])]
            pairs = zip(
                torch.autograd.grad(went.y[some].square().sum(), wanted),
                torch.autograd.grad(want[some].square().sum(), wanted),
                strict=True,
            )
            for got, right in pairs:
                near(got, right, f"gradients at {where}", within=1e-8)


@law(kinds=frozenset({"depth"}), modes={"causal", "step"})
def halting_streams(card: Card) -> None:
    """Over causal blocks, a sequence in pieces halts and comes out as it does whole."""
    driver, blocks = _driver(card, dict(card.tiny)), _blocks(causal=True)
    for keep in (None, holes(_LENGTH)):
        x = _example()
        whole = _run(driver, blocks, x, None, keep)
        for sizes in ((1,) * _LENGTH, (5, 1, 7)):
            outs, taken, states = [], [], None
            for at in torch.arange(_LENGTH).split(sizes):
                went = _run(driver, blocks, x[:, at], states, None if keep is None else keep[:, at])
                outs.append(went.y)
                taken.append(went.taken)
                states = went.states
            some = torch.ones(BATCH, _LENGTH, dtype=torch.bool) if keep is None else keep
            near(torch.cat(outs, 1)[some], whole.y[some], f"pieces of {sizes}")
            assert torch.equal(torch.cat(taken, 1)[some], whole.taken[some]), "other steps taken"


@law(kinds=frozenset({"depth"}), modes={"causal"})
def halting_sees_no_future(card: Card) -> None:
    """Over causal blocks, changing later tokens changes no earlier output and no earlier depth."""
    driver, blocks = _driver(card, dict(card.tiny)), _blocks(causal=True)
    x = _example().requires_grad_()
    whole = _run(driver, blocks, x, None, None)
    for t in (0, 4, 9):
        (gradient,) = torch.autograd.grad(whole.y[:, : t + 1].sum(), x, retain_graph=True)
        assert not gradient[:, t + 1 :].any(), f"outputs up to {t} have gradient in later ones"
        mixed = torch.cat([x[:, : t + 1], 10 * x.flip(1)[:, t + 1 :]], 1)
        other = _run(driver, blocks, mixed, None, None)
        near(other.y[:, : t + 1], whole.y[:, : t + 1], f"outputs up to {t}")
        same = torch.equal(other.taken[:, : t + 1], whole.taken[:, : t + 1])
        assert same, f"later tokens change the depth up to {t}"
