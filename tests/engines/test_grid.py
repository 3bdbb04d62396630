"""Neighbourhoods and lines of grids against their masks written out."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.engines import grid
from longspan.engines.grid import Axis


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def masked(
    q: Tensor, k: Tensor, v: Tensor, axes: Sequence[Axis], table: Tensor | None, keep: Tensor | None
) -> Tensor:
    """Σ_j softmax(q k / √D + table) v under the product of the axes' masks."""
    seen = torch.ones(1, 1, dtype=torch.bool)
    entry = torch.zeros(1, 1, dtype=torch.long)
    for a, n, s in zip(axes, q.shape[2:-1], k.shape[2:-1], strict=True):
        step = torch.arange(s) - torch.arange(s - n, s)[:, None]
        place = (step // a.dilation + a.window - 1).clamp(0, 2 * a.window - 2)
        seen, entry = torch.kron(seen, a.mask(n, s)), torch.kron(
            entry * (2 * a.window - 1), torch.ones_like(place)
        ) + torch.kron(torch.ones_like(entry), place)  # fmt: skip
    scores = q.flatten(2, -2) @ k.flatten(2, -2).mT / q.shape[-1] ** 0.5
    if table is not None:
        scores = scores + table.flatten(1)[:, entry]
    seen = seen.bool()[None, None]
    if keep is not None:
        seen = seen & keep.flatten(1)[:, None, None]
    scores = scores.masked_fill(~seen, -1e300)
    o = scores.softmax(-1) * seen.any(-1, keepdim=True) @ v.flatten(2, -2)
    return o.view(*q.shape[:-1], v.shape[-1])


GRIDS = [
    ((37,), (37,), [Axis(5)]),
    ((20,), (20,), [Axis(5, 3)]),
    ((3,), (3,), [Axis(5, 3)]),
    ((200,), (200,), [Axis(31, 2)]),
    ((9,), (20,), [Axis(5, 3, True)]),
    ((11, 14), (11, 14), [Axis(3, 2), Axis(5)]),
    ((20, 23), (20, 23), [Axis(7, 2), Axis(3, 7)]),
    ((6, 7, 5), (6, 7, 5), [Axis(3), Axis(3, 2), Axis(4, 1, True)]),
]


@pytest.mark.parametrize(("queries", "keys", "axes"), GRIDS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("holes", [False, True])
def test_neighbours_equal_their_mask(queries, keys, axes, biased: bool, holes: bool) -> None:
    q, k, v = random(2, 3, *queries, 8), random(2, 3, *keys, 8), random(2, 3, *keys, 6)
    table = random(3, *(2 * a.window - 1 for a in axes)) if biased else None
    keep = torch.rand(2, *keys, generator=torch.Generator().manual_seed(1)) > 0.4 if holes else None
    got = grid.neighbours(q, k, v, axes, table=table, keep=keep)
    want = masked(q, k, v, axes, table, keep)
    assert_close(got, want)
    inputs = [t for t in (q, k, v, table) if t is not None]
    weight = random(*got.shape).detach()
    pairs = zip(
        torch.autograd.grad((got * weight).sum(), inputs),
        torch.autograd.grad((want * weight).sum(), inputs),
        strict=True,
    )
    for a, b in pairs:
        assert_close(a, b)


def test_small_workspaces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = [Axis(5, 2), Axis(3)]
    q, k, v = (random(2, 3, 17, 19, 8) for _ in range(3))
    table = random(3, 9, 5)
    whole = grid.neighbours(q, k, v, axes, table=table)
    gradients = torch.autograd.grad(whole.square().sum(), (q, k, v, table))
    monkeypatch.setattr(grid, "WORKSPACE", 2**15)
    parts = grid.neighbours(q, k, v, axes, table=table)
    assert_close(parts, whole)
    again = torch.autograd.grad(parts.square().sum(), (q, k, v, table))
    for a, b in zip(again, gradients, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("axis", [Axis(5), Axis(5, 3), Axis(4, 2, True), Axis(9, 2)])
def test_edges_are_those_of_the_mask(axis: Axis) -> None:
    for length in (1, 6, 17, 30):
        assert axis.edges(length, length) == axis.mask(length, length).sum()


def test_every_query_has_a_whole_window() -> None:
    assert (Axis(7).mask(40, 40).sum(1) == 7).all()
    assert (Axis(5, 4).mask(22, 22).sum(1) == 5).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_lines_equal_a_loop_over_lines(axis: int, causal: bool) -> None:
    q, k, v = (random(2, 3, 4, 5, 6, 8) for _ in range(3))
    got = grid.lines(q, k, v, axis, causal=causal)
    moved = [t.movedim(2 + axis % 3, -2).flatten(2, 3).unbind(2) for t in (q, k, v)]
    lines = []
    for a, b, c in zip(*moved, strict=True):
        scores = a @ b.mT / 8**0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        lines.append(scores.softmax(-1) @ c)
    others = [n for i, n in enumerate((4, 5, 6)) if i != axis % 3]
    want = torch.stack(lines, 2).unflatten(2, others).movedim(-2, 2 + axis % 3)
    assert_close(got, want)


@pytest.mark.parametrize(("window", "dilation"), [(4, 1), (0, 1), (3, 0)])
def test_axes_refuse(window: int, dilation: int) -> None:
    with pytest.raises(LongspanError, match="neighbourhood"):
        Axis(window, dilation)


def test_wrong_grids_are_refused() -> None:
    q = random(1, 3, 4, 5, 8)
    with pytest.raises(LongspanError, match="1 axes met a grid of 2"):
        grid.neighbours(q, q, q, [Axis(3)])
    with pytest.raises(LongspanError, match="table"):
        grid.neighbours(q, q, q, [Axis(3)] * 2, table=random(3, 5, 4))
    with pytest.raises(LongspanError, match="no axis 2"):
        grid.lines(q, q, q, 2)
