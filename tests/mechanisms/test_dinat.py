"""Dilated neighborhood attention's claims: residue classes, schedules, DiNAT_s."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import longspan
from longspan import LongspanError
from longspan.models import LongspanConfig, LongspanModel
from longspan.models.neighborhood import (
    NeighborhoodConfig,
    NeighborhoodForImageClassification,
    alternating,
    neighborhood_config,
)
from longspan.testing.oracles.grid import neighbourhood


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(
    ("window", "dilation", "shape", "causal"),
    [
        (5, 3, (20,), False),
        (3, (2, 4), (8, 13), False),
        ((3, 5), "max", (10, 17), False),
        (3, (2, 1, 2), (7, 3, 6), False),
        (3, (2, 3), (7, 11), (True, False)),
    ],
)
def test_grids_equal_the_gathered_formula(window, dilation, shape, causal) -> None:
    attend = longspan.build(
        "dinat", window=window, dilation=dilation, shape=shape, causal=causal, heads=3
    ).double()
    q, k, v = (random(2, 3, torch.Size(shape).numel(), 8) for _ in range(3))
    got, _ = attend(q, k, v)
    for b in range(2):
        assert_close(got[b], neighbourhood(attend, q[b], k[b], v[b], shape))


def test_is_neighborhood_attention_on_interleaved_grids() -> None:
    dinat = longspan.build("dinat", window=3, dilation=(3, 2), heads=2, shape=(10, 9)).double()
    nat = longspan.build("nat", window=(3, 3), heads=2).double()
    nat.load_state_dict(dinat.state_dict())
    q, k, v = (random(1, 2, 90, 4) for _ in range(3))
    whole = dinat(q, k, v)[0].unflatten(2, (10, 9))
    for r in range(3):
        for c in range(2):
            part = [t.unflatten(2, (10, 9))[:, :, r::3, c::2] for t in (q, k, v)]
            shape = part[0].shape[2:4]
            o, _ = nat(*(t.flatten(2, 3) for t in part), shape=shape)
            assert_close(whole[:, :, r::3, c::2], o.unflatten(2, shape))


def test_dilation_1_is_nat() -> None:
    dinat, nat = longspan.build("dinat", window=5, dilation=1), longspan.build("nat", window=5)
    q, k, v = (random(1, 2, 21, 4) for _ in range(3))
    assert torch.equal(dinat(q, k, v)[0], nat(q, k, v)[0])


def test_the_largest_dilation_follows_the_length() -> None:
    attend = longspan.build("dinat", window=3, dilation="max")
    for length in (9, 11, 30):
        fixed = longspan.build("dinat", window=3, dilation=length // 3, short="refuse")
        q = random(1, 1, length, 4)
        assert torch.equal(attend(q, q, q)[0], fixed(q, q, q)[0])
    with pytest.raises(LongspanError, match="shorter than window 3 × dilation 4"):
        longspan.build("dinat", window=3, dilation=4, short="refuse")(*(random(1, 1, 11, 4),) * 3)
    with pytest.raises(LongspanError, match="no largest dilation"):
        longspan.build("dinat", dilation="max", causal=True)


def test_receptive_field_grows_exponentially() -> None:
    """Dilations 1, k, k² reach k³ tokens in three layers (Sec. 3.2)."""
    x = random(1, 1, 27, 4).requires_grad_()
    y = x
    for dilation in (1, 3, 9):
        y = longspan.build("dinat", window=3, dilation=dilation)(y, y, y)[0]
    (g,) = torch.autograd.grad(y[0, 0, 13].sum(), x)
    assert g.abs().sum(-1).gt(0).all()


def test_schedules() -> None:
    assert alternating((3, 2), (8, 4)) == [[1, 8, 1], [1, 4]]
    config = LongspanConfig(
        layers=4, width=12, heads=3, position=None, causal=False,
        mixers=["nat", {"id": "dinat", "dilation": 4}],
    )  # fmt: skip
    layers: Any = LongspanModel(config).layers
    assert [layer.mixer.attention.dilations for layer in layers] == [[1], [4], [1], [4]]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("dinat-tiny", 28), ("dinat-large", 200), ("dinat_s-tiny", 28), ("dinat_s-small", 50),
     ("dinat_s-base", 88), ("dinat_s-large", 197)],
)  # fmt: skip
def test_published_sizes(name: str, millions: int) -> None:
    with torch.device("meta"):
        model = NeighborhoodForImageClassification(neighborhood_config(name, num_labels=1000))
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) < 1


def test_dinat_s_runs_on_odd_images_with_the_largest_dilation() -> None:
    config = NeighborhoodConfig(
        embed_dim=8, depths=[2, 2], num_heads=[2, 4], dilations=alternating((2, 2), ("max", "max")),
        kernel_size=3, tokenizer="patch",
    )  # fmt: skip
    model = NeighborhoodForImageClassification(config)
    out = model(torch.randn(2, 3, 37, 50), torch.tensor([0, 1]))
    out.loss.backward()
    assert out.logits.shape == (2, 2)
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
