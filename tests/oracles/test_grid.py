"""Neighborhood models against transformers' Dinat, with natten's two functions written out here."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DinatConfig
from transformers.models.dinat import modeling_dinat

from longspan.models.neighborhood import (
    NeighborhoodBackbone,
    NeighborhoodConfig,
    NeighborhoodForImageClassification,
)
from longspan.testing.oracles.grid import neighbours

FIELDS: dict[str, Any] = {
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "kernel_size": 3,
    "dilations": [[1, 3], [1, 2]],
    "layer_scale_init_value": 0.5,
    "num_labels": 5,
    "drop_path_rate": 0.1,
}


def windows(length: int, k: int, delta: int) -> Tensor:
    return torch.tensor([neighbours(i, length, k, delta, False) for i in range(length)])


def offsets(length: int, k: int, delta: int) -> Tensor:
    return (windows(length, k, delta) - torch.arange(length)[:, None]) // delta + k - 1


def heads_first(t: Tensor) -> Tensor:
    # transformers 5.23 hands over B columns rows H D, where natten's old functions took heads first
    return t.permute(0, 3, 2, 1, 4)


def scores(q: Tensor, k: Tensor, rpb: Tensor, window: int, delta: int) -> Tensor:
    q, k = heads_first(q), heads_first(k)
    rows, columns = (windows(n, window, delta) for n in q.shape[2:4])
    near = k[:, :, rows][:, :, :, :, columns]  # B H r x c y D
    at_r, at_c = (offsets(n, window, delta) for n in q.shape[2:4])
    bias = rpb[:, at_r][:, :, :, at_c]  # H r x c y
    found = torch.einsum("bhrcd,bhrxcyd->bhrcxy", q, near) + bias.permute(0, 1, 3, 2, 4)
    return found.flatten(-2)


def values(weights: Tensor, v: Tensor, window: int, delta: int) -> Tensor:
    v = heads_first(v)
    rows, columns = (windows(n, window, delta) for n in v.shape[2:4])
    near = v[:, :, rows][:, :, :, :, columns]
    weights = weights.unflatten(-1, (window, window))
    return torch.einsum("bhrcxy,bhrxcyd->bhrcd", weights, near)


@pytest.fixture
def natten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_dinat, "requires_backends", lambda *_: None)
    monkeypatch.setattr(modeling_dinat, "natten2dqkrpb", scores)
    monkeypatch.setattr(modeling_dinat, "natten2dav", values)


def scramble(module: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=p.dtype) / 3


# 36 × 52 pixels are maps of 9 × 13 and 5 × 7: the second level is smaller than window × dilation,
# and its official padding is seen.
@pytest.mark.usefixtures("natten")
@pytest.mark.parametrize("size", [(36, 52), (40, 40)])
def test_classifier_equals_transformers(size: tuple[int, int]) -> None:
    theirs = modeling_dinat.DinatForImageClassification(DinatConfig(**FIELDS)).double().eval()
    scramble(theirs)
    ours = NeighborhoodForImageClassification(NeighborhoodConfig(**FIELDS)).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    labels = torch.tensor([1, 4])
    wanted, got = theirs(images, labels=labels), ours(images, labels=labels)
    assert_close(got.logits, wanted.logits)
    assert_close(got.loss, wanted.loss)
    wanted.loss.backward()
    got.loss.backward()
    for name, parameter in theirs.named_parameters():
        assert_close(ours.get_parameter(name).grad, parameter.grad)


@pytest.mark.usefixtures("natten")
def test_feature_pyramid_equals_transformers() -> None:
    fields: dict[str, Any] = FIELDS | {"out_features": ["stage1", "stage2"]}
    theirs = modeling_dinat.DinatBackbone(DinatConfig(**fields)).double().eval()
    scramble(theirs)
    ours = NeighborhoodBackbone(NeighborhoodConfig(**fields)).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 36, 52, dtype=torch.float64)
    for a, b in zip(ours(images).feature_maps, theirs(images).feature_maps, strict=True):
        assert_close(a, b)
