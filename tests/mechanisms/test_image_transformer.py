"""Image Transformer's claims: local attention in 1D and 2D, and the order of generation."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError, build
from longspan.engines.grid import BlockedRaster
from longspan.nn import state_bytes
from longspan.testing.oracles.image import image_transformer, order

FLAT = [{"block": 6, "memory": 4}, {"block": 1, "memory": 9}, {"block": 5, "memory": 0},
        {"block": 64, "memory": 3}, {"block": 4, "memory": 64}]  # fmt: skip
GRIDS = [
    {"block": (2, 3), "memory": (1, 2), "columns": 9},
    {"block": (2, 4), "memory": (3, 1), "columns": 9},
    {"block": (1, 5), "memory": (2, 0), "columns": 7},
    {"block": (3, 2), "memory": (0, 9), "columns": 6},
    {"block": (2, 6), "memory": (4, 3), "columns": 6},
]


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def inputs(length: int) -> tuple[Tensor, ...]:
    return random(2, 2, length, 4), random(2, 2, length, 4), random(2, 2, length, 6)


@pytest.mark.parametrize("causal", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("form", FLAT + GRIDS, ids=str)
@pytest.mark.parametrize("length", [1, 20, 47])
def test_blocked_equals_masked_dense(form, length: int, causal: bool, monkeypatch) -> None:
    monkeypatch.setattr("longspan.engines.edges.WORKSPACE", 2**12)
    attention = build("image-transformer", causal=causal, **form)
    q, k, v = inputs(length)
    got = attention(q, k, v)[0]
    want = image_transformer(attention, q, k, v, keep=None)
    assert_close(got, want)
    weight = random(*got.shape).detach()
    pairs = zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v)),
        torch.autograd.grad((want * weight).sum(), (q, k, v)),
        strict=True,
    )
    for a, b in pairs:
        assert_close(a, b)


@pytest.mark.parametrize("block", [(2, 3), (2, 4), (1, 5), (3, 1), (2, 9)])
def test_steps_and_cells_are_inverse_and_follow_the_blocked_raster(block) -> None:
    raster = BlockedRaster(9, block)
    steps = torch.arange(6 * 9)
    cells = raster.cells(steps)
    assert [tuple(c) for c in cells.tolist()] == order(6, 9, block)
    assert torch.equal(raster.steps(cells), steps)
    assert [raster.blocks(t) for t in range(54)] == sorted(raster.blocks(t) for t in range(54))


def test_gather_and_scatter_follow_the_order() -> None:
    raster, x = BlockedRaster(5, (2, 2)), random(1, 20, 3).float()
    gathered = raster.gather(x)
    assert torch.equal(gathered[0], torch.stack([x[0, 5 * i + j] for i, j in order(4, 5, (2, 2))]))
    assert torch.equal(raster.scatter(gathered), x)
    with pytest.raises(LongspanError, match="fill the image up to 20"):
        raster.gather(x[:, :15])


@pytest.mark.parametrize("form", [FLAT[0], *GRIDS[:3]], ids=str)
def test_stepwise_equals_whole_and_the_state_stays_small(form) -> None:
    attention = build("image-transformer", causal=True, **form)
    q, k, v = inputs(90)
    whole = attention(q, k, v)[0]
    keep = torch.rand(2, 90, generator=torch.Generator().manual_seed(0)) > 0.3
    masked = attention(q, k, v, keep=keep)[0]
    for hidden, want in ((None, whole), (keep, masked)):
        state, outs, sizes = None, [], []
        for t in range(90):
            at = slice(t, t + 1)
            piece = None if hidden is None else hidden[:, at]
            o, state = attention(q[:, :, at], k[:, :, at], v[:, :, at], state, keep=piece)
            outs.append(o)
            sizes.append(state_bytes(state))
        shown = 1 if hidden is None else hidden[:, None, :, None]
        assert_close(torch.cat(outs, 2) * shown, want * shown)
        if hidden is None:
            (high, wide), (h, _) = attention.memory, attention.block
            columns = attention.raster.columns
            rows = h + -(-high // h) * h if wide or columns > 1 else h + high
            most = (rows + h) * columns * 2 * 2 * (4 + 6) * 8
            assert max(sizes) <= most + 2 * (rows + h) * columns


@pytest.mark.parametrize("form", [FLAT[0], GRIDS[0], GRIDS[2]], ids=str)
def test_gradients_reach_exactly_the_visible_past(form) -> None:
    attention = build("image-transformer", causal=True, **form)
    q, k, v = inputs(36)
    o = attention(q, k, v)[0]
    for i in range(0, 36, 7):
        grad = torch.autograd.grad(o[0, 0, i].sum(), v, retain_graph=True)[0][0, 0]
        assert not grad[i + 1 :].any()
        assert grad[i].any()


def test_right_flank_is_seen_where_it_was_generated() -> None:
    """Row 1 of block (0, 0): its right neighbour's block comes later; below, the one above right
    has been generated."""
    attention = build("image-transformer", causal=True, block=(2, 2), memory=(1, 1), columns=4)
    q, k, v = inputs(16)
    o = attention(q, k, v)[0]
    raster = attention.raster

    def sees(i: tuple[int, int], j: tuple[int, int]) -> bool:
        a, b = (int(raster.steps(torch.tensor(c))) for c in (i, j))
        grad = torch.autograd.grad(o[0, 0, a].sum(), v, retain_graph=True)[0]
        return bool(grad[0, 0, b].any())

    assert not sees((1, 1), (0, 2))  # plain raster order would leak it
    assert sees((2, 1), (1, 2))
    assert sees((0, 2), (1, 1))  # plain raster order would waste it


def test_first_block_attends_to_no_padding() -> None:
    attention = build("image-transformer", causal=True, block=4, memory=8)
    q, k, v = inputs(3)
    assert_close(attention(q, k, v)[0][:, :, 0], v[:, :, 0])


def test_arguments_must_fit() -> None:
    for wrong in ({"block": 4, "memory": (1, 1)}, {"block": (2, 2)}, {"columns": 4},
                  {"block": (2, 5), "columns": 4}, {"block": 4, "memory": -1}):  # fmt: skip
        with pytest.raises(LongspanError):
            build("image-transformer", **wrong)
