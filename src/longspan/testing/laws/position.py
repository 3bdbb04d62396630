"""A position tells tokens apart by where they stand, whole, in pieces and padded alike.

It is tried around softmax attention: what embeds or enters is added to the input of the one layer
there is, the rest works inside. A card's `exact` holds the arguments at which it changes nothing.
"""

from typing import Any

import torch
from torch import Tensor

from longspan.card import Card, Kind
from longspan.nn import MultiHead, Position
from longspan.nn.positions import positions_from
from longspan.registry import build
from longspan.testing.laws.comparing import near
from longspan.testing.laws.registry import law
from longspan.testing.subject import BATCH, HEADS, MODEL_WIDTH, WIDTH

_POSITION: frozenset[Kind] = frozenset({"position"})
_STREAM = frozenset({"embed", "enter", "infuse"})


def _position(card: Card, arguments: Any = None) -> Position:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(card.id, **dict(card.tiny if arguments is None else arguments)).double()


def _layer(position: Position | None, *, causal: bool) -> MultiHead:
    inside = position if position and position.acts - {"embed", "enter"} else None
    attention = build("multi-head-attention", causal=causal)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = MultiHead(attention, width=MODEL_WIDTH, heads=HEADS).double()
    layer.position = inside
    return layer


def _run(
    layer: MultiHead,
    position: Position | None,
    x: Tensor,
    state: Any = None,
    keep: Tensor | None = None,
) -> tuple[Tensor, Any]:
    acts = position.acts if position else frozenset()
    if position and acts & {"embed", "enter"}:
        seen = torch.zeros(len(x), dtype=torch.long) if state is None else state.seen
        every = torch.ones(x.shape[:2], dtype=torch.bool)
        pos = positions_from(every if keep is None else keep, seen)
        x = position.embed(x, pos) if "embed" in acts else x
        x = position.enter(x, pos, 0) if "enter" in acts else x
    return layer(x, state, keep=keep)


def _example(length: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, length, MODEL_WIDTH, dtype=torch.float64, generator=generator)


def _relative(card: Card) -> bool:
    return not _position(card).acts & _STREAM


@law(kinds=_POSITION, applies=lambda card: card.exact is not None)
def neutral_positions_change_nothing(card: Card) -> None:
    """At its `exact` arguments, outputs are those of attention without positions."""
    position, x = _position(card, card.exact), _example(23)
    for causal in (False, True):
        got, _ = _run(_layer(position, causal=causal), position, x)
        near(got, _run(_layer(None, causal=causal), None, x)[0], f"causal {causal}")


@law(kinds=_POSITION)
def order_matters(card: Card) -> None:
    """Exchanging two earlier tokens changes the last output, and every parameter has its part."""
    position, x = _position(card), _example(9)
    layer = _layer(position, causal=True)
    turned = x.clone()
    turned[:, [2, 5]] = x[:, [5, 2]]
    out, _ = _run(layer, position, x)
    other, _ = _run(layer, position, turned)
    assert (out[:, -1] - other[:, -1]).abs().max() > 1e-9, "the order of tokens does not matter"
    outs = [_run(_layer(position, causal=c), position, x)[0] for c in (False, True)]
    if "enter" in position.acts:
        pos = torch.arange(9)[None]
        outs += [position.enter(x, pos, n) for n in range(1, card.tiny.get("layers", 1))]
    sum(o.square().sum() for o in outs).backward() if list(position.parameters()) else None  # pyright: ignore
    for name, parameter in position.named_parameters():
        assert parameter.grad is not None, f"{name} is not reached"
        assert parameter.grad.any(), f"{name} gets no gradient"


@law(kinds=_POSITION, applies=_relative)
def only_distances_count(card: Card) -> None:
    """Moving all positions by the same number changes no score and no output."""
    position = _position(card)
    generator = torch.Generator().manual_seed(0)
    q, k = (
        torch.randn(BATCH, HEADS, n, WIDTH, dtype=torch.float64, generator=generator)
        for n in (5, 11)
    )

    def acting(shift: int) -> list[Tensor]:
        pos_q, pos_k = torch.arange(6, 11) + shift, torch.arange(11) + shift
        found = []
        if "rotate" in position.acts:
            found.append(position.rotate(q, pos_q) @ position.rotate(k, pos_k).mT)
        if "bias" in position.acts:
            found.append(position.bias(q, k, pos_q, pos_k))
        if "spread" in position.acts:
            found.append(position.spread((q @ k.mT).softmax(-1), pos_q, pos_k))
        return found

    for here, there in zip(acting(0), acting(1000), strict=True):
        near(there.nan_to_num(neginf=-1e3), here.nan_to_num(neginf=-1e3), "1,000 places on")


@law(modes={"causal", "step"}, kinds=_POSITION)
def pieces_stand_where_the_whole_does(card: Card) -> None:
    """In pieces, with the state carried, every token has the position that it has in the whole."""
    position, x = _position(card), _example(24)
    layer = _layer(position, causal=True)
    whole, _ = _run(layer, position, x)
    for sizes in ([1] * 24, [7, 1, 16], [24]):
        state, outs = None, []
        for piece in x.split(sizes, 1):
            out, state = _run(layer, position, piece, state)
            outs.append(out)
        near(torch.cat(outs, 1), whole, f"pieces {sizes[:4]}")


@law(kinds=_POSITION)
def padding_takes_no_position(card: Card) -> None:
    """Left- or right-padded equals unpadded."""
    position, x = _position(card), _example(13)
    for causal in (False, True):
        layer = _layer(position, causal=causal)
        alone, _ = _run(layer, position, x)
        for left, right in ((9, 0), (0, 6), (3, 2)):
            blank = torch.full((BATCH, 1, MODEL_WIDTH), 7.0, dtype=x.dtype)
            padded = torch.cat([blank.expand(-1, left, -1), x, blank.expand(-1, right, -1)], 1)
            keep = torch.zeros(padded.shape[:2], dtype=torch.bool)
            keep[:, left : left + 13] = True
            got, _ = _run(layer, position, padded, keep=keep)
            near(got[:, left : left + 13], alone, f"{left} tokens left, {right} right")
