"""Axial attention's claims: any axes, both orders, and the Axial Transformer."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import longspan
from longspan import LongspanError
from longspan.models.axial import AxialConfig, AxialLayer, AxialTransformer


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def model(**fields) -> AxialTransformer:
    chosen: dict[str, Any] = {
        "vocab_size": 7, "rows": 3, "columns": 4, "width": 8, "heads": 2,
        "upper_layers": 2, "row_layers": 2, "exterior_layers": 2,
    } | fields  # fmt: skip
    torch.manual_seed(0)
    built = AxialTransformer(AxialConfig(**chosen)).double().eval()
    torch.nn.init.normal_(built.logits.weight)
    return built


@pytest.mark.parametrize("causal", [False, (False, True, False)])
def test_sequential_axes_equal_a_loop_over_lines(causal) -> None:
    layer = AxialLayer(width=6, heads=2, axes=3, causal=causal).double()
    x = random(2, 3, 4, 5, 6)
    want = x
    for axis, attention in enumerate(layer.attentions):
        done = torch.empty_like(want)
        moved, into = want.movedim(1 + axis, 1), done.movedim(1 + axis, 1)
        for a in range(moved.shape[2]):
            for b in range(moved.shape[3]):
                into[:, :, a, b] = attention(moved[:, :, a, b])[0]
        want = done
    assert_close(layer(x), want)


def test_summed_axes_and_channels_first() -> None:
    layer = AxialLayer(width=6, heads=2, order="summed").double()
    x = random(2, 4, 5, 6)
    rows = torch.stack([layer.attentions[1](x[:, i])[0] for i in range(4)], 1)
    columns = torch.stack([layer.attentions[0](x[:, :, j])[0] for j in range(5)], 2)
    assert_close(layer(x), rows + columns)
    first = AxialLayer(width=6, heads=2, order="summed", channels="first").double()
    first.load_state_dict(layer.state_dict())
    assert_close(first(x.movedim(-1, 1)), layer(x).movedim(-1, 1))


def test_rows_and_columns_reach_everything_earlier_above_and_left() -> None:
    x = random(1, 1, 24, 4).requires_grad_()
    y = x
    for axis in (1, 0):
        y = longspan.build("axial-attention", columns=6, axis=axis, causal=True)(y, y, y)[0]
    (g,) = torch.autograd.grad(y[0, 0, 15].sum(), x)  # row 2, column 3
    reached = g[0, 0].abs().sum(-1).gt(0).view(4, 6)
    want = torch.zeros(4, 6, dtype=torch.bool)
    want[:3, :4] = True
    assert torch.equal(reached, want)


@pytest.mark.parametrize("slices", [1, 2])
def test_every_logit_depends_on_all_earlier_pixels_and_no_others(slices: int) -> None:
    axial = model(slices=slices)
    pixels = torch.randint(7, (1, slices, 3, 4), generator=torch.Generator().manual_seed(0))
    base = axial(pixels).logits.flatten(1, 3)[0]
    for at in range(pixels.numel()):
        changed = pixels.clone().flatten()
        changed[at] = (changed[at] + 3) % 7
        moved = axial(changed.view_as(pixels)).logits.flatten(1, 3)[0] != base
        moved = moved.any(-1)
        assert not moved[: at + 1].any(), f"pixel {at} is seen too early"
        assert moved[at + 1 :].all(), f"pixel {at} is not seen by all later ones"


@pytest.mark.parametrize("slices", [1, 2])
def test_fast_sampling_equals_naive_sampling(slices: int) -> None:
    axial = model(slices=slices)
    fast = axial.sample(2, generator=torch.Generator().manual_seed(3))
    slow = axial.sample(2, generator=torch.Generator().manual_seed(3), fast=False)
    assert torch.equal(fast, slow)
    assert len(fast.unique()) > 3


def test_starts_at_log_vocabulary_and_learns(tmp_path: Path) -> None:
    torch.manual_seed(0)
    axial = AxialTransformer(
        AxialConfig(vocab_size=5, rows=4, columns=4, slices=3, width=16, heads=2, upper_layers=2,
                    row_layers=1, exterior_layers=2)
    )  # fmt: skip
    pixels = torch.arange(48).view(1, 3, 4, 4).expand(4, -1, -1, -1) % 5
    losses = []
    optimizer = torch.optim.Adam(axial.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        loss = axial(pixels, torch.randint(3, (4,), generator=generator)).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(5), abs=1e-5)
    assert losses[-1] < 0.5
    for name, p in axial.named_parameters():
        assert p.grad is not None, name
    axial.eval().save_pretrained(tmp_path)
    again = AxialTransformer.from_pretrained(tmp_path).eval()
    assert torch.equal(again(pixels).logits, axial(pixels).logits)


def test_positions_are_sums_of_rows_and_columns() -> None:
    axial = model()
    x = axial.places(torch.zeros(1, 3, 4, 8, dtype=torch.float64))
    assert_close(x[0, 2, 1], axial.places.row[2] + axial.places.column[1])


def test_refuses() -> None:
    with pytest.raises(LongspanError, match="at least 1 column"):
        longspan.build("axial-attention", columns=0)
    with pytest.raises(LongspanError, match="even numbers"):
        model(upper_layers=3)
    with pytest.raises(LongspanError, match="built for"):
        model()(torch.zeros(1, 1, 4, 4, dtype=torch.long))
    with pytest.raises(LongspanError, match="causalities"):
        AxialLayer(width=6, heads=2, axes=3, causal=(True, False))
    with pytest.raises(LongspanError, match="axial layer of 2 axes"):
        AxialLayer(width=6, heads=2)(random(1, 4, 6))
