"""Attention along edges against its mask written out."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import dense, edges

LENGTH, KEYS = 23, 31


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def graph() -> Tensor:
    mask = torch.rand(LENGTH, KEYS, generator=torch.Generator().manual_seed(0)) > 0.7
    mask[4] = False
    mask[5] = True
    return mask


def csr(mask: Tensor) -> edges.Columns:
    start = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
    return edges.of_csr(start, mask.nonzero()[:, 1])


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("tile", [1, 5, 1024])
def test_edges_equal_their_mask(holes: bool, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "WORKSPACE", 2**13)
    q, k, v = random(2, 3, LENGTH, 8), random(2, 3, KEYS, 8), random(2, 3, KEYS, 6)
    keep = torch.rand(2, KEYS, generator=torch.Generator().manual_seed(1)) > 0.3 if holes else None
    got, _ = dense.union(q, [(edges.Edges(csr(graph()), keep=keep, tile=tile), k, v)])
    seen = graph()[None, None] if keep is None else graph() & keep[:, None, None]
    scores = (q @ k.mT / 8**0.5).masked_fill(~seen, -1e300)
    want = scores.softmax(-1) * seen.any(-1, keepdim=True) @ v
    assert_close(got, want)
    weight = random(*got.shape).detach()
    pairs = zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((want * weight).sum(), (q, k, v)),
        strict=True,
    )
    for a, b in pairs:
        assert_close(a, b)


def test_edges_share_a_softmax_with_other_layouts() -> None:
    q, k, v = random(1, 2, LENGTH, 8), random(1, 2, KEYS, 8), random(1, 2, KEYS, 8)
    mask = graph()
    mask[:, :4] = False
    parts = [
        (edges.Edges(csr(mask)), k, v),
        (dense.Whole(), k[:, :, :4], v[:, :, :4]),
    ]
    mask[:, :4] = True
    want = (q @ k.mT / 8**0.5).masked_fill(~mask, -torch.inf).softmax(-1) @ v
    assert_close(dense.union(q, parts)[0], want)


def test_no_keys_give_zero() -> None:
    q, none = random(1, 2, 3, 4), random(1, 2, 0, 4)
    listed = edges.Edges(lambda first, last: torch.zeros(last - first, 0, dtype=torch.long))
    o, lse = dense.union(q, [(listed, none, none)])
    assert not o.any()
    assert (lse == -torch.inf).all()
