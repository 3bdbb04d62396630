"""Length: factor 1 changes nothing, nothing looks ahead, pieces and padding make no difference."""

from typing import Any

import torch
from torch import Tensor

from longspan.card import Card, Kind
from longspan.nn.lengths import Length
from longspan.registry import build, options
from longspan.testing.laws.comparing import near
from longspan.testing.laws.registry import law
from longspan.testing.subject import BATCH, MODEL_WIDTH

_KIND: frozenset[Kind] = frozenset({"length"})


def _built(card: Card, arguments: Any, *, causal: bool) -> Length:
    chosen = dict(arguments)
    if "causal" in options(card.id):
        chosen["causal"] = causal
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build(card.id, **chosen).double().eval()


def _example(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(BATCH, length, MODEL_WIDTH, generator=generator, dtype=torch.float64)


def _there_and_back(
    length: Length, x: Tensor, state: Any = None, *, keep: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Each shortened vector squared, so that lengthening has something of its own to carry."""
    y, _, plan = length.shorten(x, state, keep=keep)
    return length.lengthen(y + y.square(), x, plan)


@law(kinds=_KIND, applies=lambda card: card.exact is not None)
def factor_one_changes_nothing(card: Card) -> None:
    """At its `exact` arguments both directions are the identity."""
    for form in ("bidirectional", "causal"):
        if form in card.modes:
            length = _built(card, card.exact or {}, causal=form == "causal")
            for tokens in (1, 2, 9):
                x = _example(tokens)
                y, _, plan = length.shorten(x)
                near(y, x, f"{tokens} tokens shortened, {form}")
                near(length.lengthen(y, x, plan)[0], x, f"{tokens} tokens lengthened, {form}")


@law(kinds=_KIND)
def shortens_and_lengthens(card: Card) -> None:
    """Fewer vectors come out, and as many as there were come back, whatever the length."""
    for form in ("bidirectional", "causal"):
        if form in card.modes:
            length = _built(card, card.tiny, causal=form == "causal")
            assert length.factor > 1, "built with `tiny`, it has factor 1"
            for tokens in range(1, 3 * length.factor + 2):
                x = _example(tokens)
                y, _, plan = length.shorten(x)
                most = -(-tokens // length.factor) + 1
                assert y.shape[1] <= most, f"{tokens} tokens became {y.shape[1]}, {form}"
                back, _ = length.lengthen(y, x, plan)
                assert back.shape == x.shape, f"{tokens} tokens came back as {back.shape[1]}"
                assert back.isfinite().all(), f"not finite at {tokens} tokens"


@law(kinds=_KIND, modes={"causal"})
def lengthens_without_peeking(card: Card) -> None:
    """Later tokens have gradient exactly 0, and changing them changes no bit before them."""
    length = _built(card, card.tiny, causal=True)
    for tokens in range(2, 2 * length.factor + 3):
        x = _example(tokens).requires_grad_()
        out, _ = _there_and_back(length, x)
        for t in range(tokens - 1):
            (gradient,) = torch.autograd.grad(out[:, : t + 1].sum(), x, retain_graph=True)
            assert not gradient[:, t + 1 :].any(), f"outputs up to {t} of {tokens} look ahead"
            mixed = torch.cat([x[:, : t + 1], 10 * x.flip(1)[:, t + 1 :]], 1)
            other, _ = _there_and_back(length, mixed)
            same = torch.equal(other[:, : t + 1], out[:, : t + 1])
            assert same, f"later tokens change outputs up to {t} of {tokens}"


@law(kinds=_KIND, modes={"causal", "step"})
def lengthens_in_pieces(card: Card) -> None:
    """In pieces of any size, rows at different places, it gives what it gives at once."""
    length = _built(card, card.tiny, causal=True)
    x = _example(13)
    whole = [_there_and_back(length, row)[0] for row in (x[:1], x[1:, 2:])]
    for sizes in ((1,) * 13, (5, 1, 7), (2, 11)):
        outs, state = [], None
        for at in torch.arange(13).split(sizes):
            # The second row starts at token 2: its kept tokens come first in the first piece.
            piece, keep = x[:, at].clone(), torch.ones(BATCH, len(at), dtype=torch.bool)
            skipped = int((at < 2).sum())
            piece[1] = piece[1].roll(-skipped, 0)
            keep[1, len(at) - skipped :] = False
            out, state = _there_and_back(length, piece, state, keep=keep)
            outs.append((out[:1], out[1:, : len(at) - skipped]))
        for row, want in enumerate(whole):
            near(torch.cat([out[row] for out in outs], 1), want, f"row {row}, pieces of {sizes}")


@law(kinds=_KIND)
def lengthens_padded_as_alone(card: Card) -> None:
    """Padding behind a row changes nothing, may be NaN, and comes back as 0."""
    for form in ("bidirectional", "causal"):
        if form not in card.modes:
            continue
        length = _built(card, card.tiny, causal=form == "causal")
        for tokens in (4 * card.grain, 7 * card.grain):
            x = _example(tokens)
            alone, _ = _there_and_back(length, x)
            longer = torch.cat([x, torch.full_like(x, torch.nan)], 1).requires_grad_()
            keep = torch.arange(2 * tokens).expand(BATCH, -1) < tokens
            out, _ = _there_and_back(length, longer, keep=keep)
            near(out[:, :tokens], alone, f"{tokens} tokens padded, {form}")
            assert not out[:, tokens:].any(), "padding does not come back as 0"
            (gradient,) = torch.autograd.grad(out.sum(), longer)
            assert gradient.isfinite().all(), "gradients beside padding are not finite"
            assert not gradient[:, tokens:].any(), "padding gets gradient"
