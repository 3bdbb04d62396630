"""Neighborhood attention's claims: axes, borders, biases, backbones."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import longspan
from longspan import LongspanError
from longspan.models.neighborhood import (
    NeighborhoodConfig,
    NeighborhoodForImageClassification,
    NeighborhoodModel,
    neighborhood_config,
)
from longspan.testing.oracles.grid import neighbourhood


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("window", "shape", "causal"),
    [
        (3, (7, 9), False),
        ((3, 5), (4, 11), (False, True)),
        ((4, 3), (6, 7), True),
        (3, (4, 5, 6), False),
        ((3, 5, 2), (3, 6, 4), (False, False, True)),
        (7, (5, 9), False),
    ],
)
def test_grids_equal_the_gathered_formula(window, shape, causal) -> None:
    attend = longspan.build("nat", window=window, shape=shape, causal=causal, heads=3).double()
    q, k, v = (random(2, 3, torch.Size(shape).numel(), 8) for _ in range(3))
    got, state = attend(q, k, v)
    assert state is None
    for b in range(2):
        assert_close(got[b], neighbourhood(attend, q[b], k[b], v[b], shape))
    assert_close(attend(q, k, v, shape=[*shape[:-1], -1])[0], got)


def test_a_window_of_the_length_is_self_attention_with_relative_bias() -> None:
    attend = longspan.build("nat", window=9, heads=2).double()
    q, k, v = (random(1, 2, 9, 4) for _ in range(3))
    i = torch.arange(9)
    scores = q @ k.mT / 2 + attend.table[:, i - i[:, None] + 8]
    assert_close(attend(q, k, v)[0], scores.softmax(-1) @ v)


def test_moves_with_its_input_away_from_borders() -> None:
    attend = longspan.build("nat", window=5, heads=2).double()
    q, k, v = (random(1, 2, 30, 4) for _ in range(3))
    o, _ = attend(q, k, v)
    moved, _ = attend(*(t.roll(4, 2) for t in (q, k, v)))
    assert_close(moved[:, :, 8:26], o[:, :, 4:22])


def test_borders_shift_instead_of_shrinking() -> None:
    attend = longspan.build("nat", window=5)
    k = torch.zeros(1, 1, 12, 4)
    o, _ = attend(k, k, torch.eye(12)[None, None])
    assert ((o[0, 0] > 0).sum(1) == 5).all()
    assert (o[0, 0, 0, :5] > 0).all()
    assert (o[0, 0, 11, 7:] > 0).all()


def test_hidden_cells_of_a_grid_stay_in_place() -> None:
    attend = longspan.build("nat", window=3, shape=(-1, 6), heads=3).double()
    q, k, v = (random(2, 3, 30, 8) for _ in range(3))
    keep = torch.ones(2, 30, dtype=torch.bool)
    keep[1, 20:] = False
    o, _ = attend(q, k, v.masked_fill(~keep[:, None, :, None], torch.nan), keep=keep)
    assert_close(o[0], attend(q, k, v)[0][0])
    assert o.isfinite().all()


def test_short_axes() -> None:
    whole, refuses = (longspan.build("nat", window=7, short=s) for s in ("whole", "refuse"))
    q = random(1, 2, 5, 4).float()
    assert_close(whole(q, q, q)[0], torch.nn.functional.scaled_dot_product_attention(q, q, q))
    with pytest.raises(LongspanError, match="axis of 5 cells is shorter than window 7"):
        refuses(q, q, q)


@pytest.mark.parametrize("options", [{"window": (3, 5), "shape": (2, 3, 4)}, {"window": 6}])
def test_refuses(options: dict) -> None:
    with pytest.raises(LongspanError):
        longspan.build("nat", **options)


def test_refuses_tokens_that_do_not_fill_the_grid() -> None:
    q = random(1, 2, 10, 4)
    with pytest.raises(LongspanError, match="do not fill"):
        longspan.build("nat", window=3, shape=(3, -1))(q, q, q)
    with pytest.raises(LongspanError, match="2 axes got shape=None"):
        longspan.build("nat", window=(3, 3))(q, q, q)


@pytest.mark.parametrize(
    ("size", "millions"), [("mini", 20), ("tiny", 28), ("small", 51), ("base", 90)]
)
def test_published_sizes(size: str, millions: int) -> None:
    with torch.device("meta"):
        model = NeighborhoodForImageClassification(
            neighborhood_config(f"nat-{size}", num_labels=1000)
        )
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def small(**fields) -> NeighborhoodConfig:
    return NeighborhoodConfig(
        embed_dim=8, depths=[1, 2], num_heads=[2, 4], dilations=[[1], [1, 1]], kernel_size=3,
        **fields,
    )  # fmt: skip


def test_a_pyramid_halves_and_doubles() -> None:
    model = NeighborhoodModel(small()).eval()
    maps = model(torch.randn(2, 3, 48, 40)).hidden_states
    assert [tuple(m.shape) for m in maps] == [(2, 8, 12, 10), (2, 8, 12, 10), (2, 16, 6, 5)]


def test_a_classifier_trains_and_reloads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = NeighborhoodForImageClassification(small())
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 2
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(25):
        loss = model(images, labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 2
    model.eval().save_pretrained(tmp_path)
    again = NeighborhoodForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(images).logits, model(images).logits)


def test_refuses_an_unknown_size() -> None:
    with pytest.raises(LongspanError, match="nat-large"):
        neighborhood_config("nat-large")
