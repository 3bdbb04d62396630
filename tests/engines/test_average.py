"""Averages with exponential weights, and of slots, against sums written out."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import average, lowrank
from longspan.engines.average import chunks


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def prefixes(k: Tensor) -> Tensor:
    """exp(k_s) / Σ_{s≤t} exp(k_s): B H T S D."""
    later = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool).triu(1)[..., None]
    return k[:, :, None].masked_fill(later, -torch.inf).softmax(3)


@pytest.mark.parametrize("length", [1, 5, 70])
def test_running_averages_and_their_gradients(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "SEGMENT", 32)
    k, v = (normal(2, 3, length, 4, seed=s).requires_grad_() for s in (0, 1))
    got, last = average.running(k * 50, v)
    want = torch.einsum("bhtsd,bhsd->bhtd", prefixes(k * 50), v)
    assert_close(got, want)
    assert_close(average.quotient(last), want[:, :, -1])
    toward = normal(*got.shape, seed=2)
    found = torch.autograd.grad(got, (k, v), toward)
    assert_close(found, torch.autograd.grad(want, (k, v), toward), atol=1e-8, rtol=1e-8)


def test_prefix_and_pooled_sums_end_alike() -> None:
    k, v = normal(2, 3, 40, 4), normal(2, 3, 40, 4, seed=1)
    every, last = average.prefix(k, v)
    assert_close(average.quotient(every), average.running(k, v)[0])
    assert_close(average.quotient(average.pooled(k, v))[:, :, 0], average.quotient(last))


def test_a_row_of_zeros_has_seen_nothing() -> None:
    k, v = normal(2, 3, 9, 4), normal(2, 3, 9, 4, seed=1)
    zeros = average.Sums(*(torch.zeros(2, 3, 4).double() for _ in range(3)))
    assert_close(average.running(k, v, zeros), average.running(k, v))
    nothing, _ = average.running(torch.full_like(k, -torch.inf), v)
    assert not nothing.any()


@pytest.mark.parametrize("steep", [1, 50])
@pytest.mark.parametrize("length", [1, 33, 100, 200])
def test_slots_score_and_read_every_prefix(
    length: int, steep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With exponents that rise by more than a block may hold, and without."""
    monkeypatch.setattr(lowrank, "SPAN", 64 if steep > 1 else 128)
    if steep == 1:
        monkeypatch.delattr(lowrank, "_Halved")
    q, k, v = (normal(2, 3, length, 4, seed=s).requires_grad_() for s in range(3))
    write, r = (normal(2, 3, length, 5, seed=s).requires_grad_() for s in (3, 4))
    phi = prefixes(write * steep)
    want = [
        torch.einsum("bhtsm,bhsd,bhtd->bhtm", phi, k, q),
        torch.einsum("bhtsm,bhsd,bhtm->bhtd", phi, v, r),
    ]
    got = [lowrank.scores(q, write * steep, k)[0], lowrank.read(r, write * steep, v)[0]]
    assert_close(got, want)
    for mine, theirs, inputs in zip(got, want, ((q, write, k), (r, write, v)), strict=True):
        toward = normal(*mine.shape, seed=5)
        found = torch.autograd.grad(mine, inputs, toward, retain_graph=True)
        wanted = torch.autograd.grad(theirs, inputs, toward, retain_graph=True)
        assert_close(found, wanted, atol=1e-8, rtol=1e-8)


def test_slots_that_hold_nothing_are_told_apart() -> None:
    q, k = normal(1, 1, 6, 4), normal(1, 1, 6, 4, seed=1)
    write = torch.full((1, 1, 6, 2), -torch.inf).double()
    write[..., 3, 0] = 0
    scores, state = lowrank.scores(q, write, k)
    assert scores[0, 0, :, 1].eq(-torch.inf).all()
    assert scores[0, 0, :3].eq(-torch.inf).all()
    assert_close(scores[0, 0, 3:, 0], q[0, 0, 3:] @ k[0, 0, 3])
    assert state.weight.tolist() == [[[1, 0]]]
