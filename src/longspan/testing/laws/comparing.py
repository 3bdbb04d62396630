"""What laws compare with: forms, masks, gradients, refusals."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.testing.subject import BATCH, Subject, parameters


def forms(card: Card, *, dtype: torch.dtype = torch.float64) -> Iterator[Subject]:
    """The mechanism in each masking form it has."""
    for form in ("bidirectional", "causal"):
        if form in card.modes:
            yield Subject.of(card, causal=form == "causal", dtype=dtype)


def near(got: Tensor, want: Tensor, what: str, *, within: float = 1e-9) -> None:
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    assert got.isfinite().all(), f"{what}: not finite"
    if want.numel():
        scale = max(want.abs().max().item(), 1.0)
        error = (got - want).abs().max().item() / scale
        assert error <= within, f"{what}: error {error:.1e} > {within:.0e}"


def gradients(
    subject: Subject, inputs: tuple[Tensor, ...], out: Tensor, *, to_parameters: bool = True
) -> list[Tensor]:
    """Gradients of a fixed random projection of `out`, zeros where nothing depends."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    wanted = subject.distinct(inputs) + (parameters(subject.module) if to_parameters else [])
    found = torch.autograd.grad((out * weight).sum(), wanted, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def holes(length: int, *, batch: int = BATCH) -> Tensor:
    """A mask with holes; the first token of every row may be seen."""
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(batch, length, generator=generator) > 0.3
    keep[:, 0] = True
    return keep


def whole_or_cross(card: Card) -> Iterator[tuple[Subject, int, int]]:
    """(subject, queries, keys) over odd lengths and the card's forms."""
    for subject in forms(card):
        for length in (1, 7, 33, 130):
            yield subject, length, length
    if "cross" in card.modes and "bidirectional" in card.modes:
        subject = Subject.of(card, causal=False)
        if subject.attends:
            yield subject, 9, 21


def refused(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except LongspanError:
        return
    except Exception as error:
        raise AssertionError(f"{what} raised {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what} was accepted")
