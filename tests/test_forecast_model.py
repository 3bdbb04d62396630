"""The probabilistic forecaster: its likelihood, samples, metrics, and that it learns."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.models.forecast import (
    ForecastConfig,
    ForecastModel,
    quantile_risk,
    scale_of,
    windows,
)


def model(**fields) -> ForecastModel:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {
        "width": 8, "layers": 2, "heads": 2, "length": 64, "taps": 3, "vocab_size": 4
    }  # fmt: skip
    return ForecastModel(ForecastConfig(**(chosen | fields))).eval()


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_gaussian_nll_in_the_units_of_the_values() -> None:
    built, z = model(covariates=2).double(), random(3, 12).double() * 5
    out = built(z, random(3, 12, 2).double(), torch.tensor([0, 1, 3]))
    want = torch.distributions.Normal(out.mean, out.deviation).log_prob(z)
    assert_close(out.loss, -want.mean())
    assert_close(out.scale, 1 + z.abs().mean(1))


def test_a_value_is_forecast_from_earlier_ones_only() -> None:
    built, z = model().double(), random(1, 20).double().requires_grad_()
    mean = built(z, history=1).mean  # a scale that does not look ahead
    for t in (1, 7, 19):
        grad = torch.autograd.grad(mean[0, t], z, retain_graph=True)[0]
        assert not grad[0, t:].any()
        assert grad[0, t - 1] != 0


def test_deviation_has_a_floor_and_heads_are_as_wide_as_the_model() -> None:
    built = model(floor=0.5)
    built.head.bias.data[1] = -100.0
    out = built(random(2, 6))
    assert_close(out.deviation / out.scale[:, None], torch.full((2, 6), 0.5))
    for wide, want in ((built, 8), (model(head_width=4), 4)):
        layer: Any = wide.model.layers[0]
        assert layer.mixer.heads.head_width == want


def test_sampling_by_steps_equals_sampling_by_whole_passes() -> None:
    built = model(covariates=1)
    z, x, series = random(2, 10).abs(), random(2, 15, 1), torch.tensor([1, 2])
    generator = torch.Generator().manual_seed(3)
    paths = built.sample(z, x, series, horizon=5, count=3, generator=generator)
    assert paths.shape == (3, 2, 5)
    generator = torch.Generator().manual_seed(3)
    long = z.repeat_interleave(3, 0)
    for t in range(5):
        filled = torch.cat([long, torch.zeros(6, 1)], 1)
        out = built(filled, x[:, : 11 + t].repeat_interleave(3, 0), series.repeat_interleave(3, 0),
                    history=10)  # fmt: skip
        drawn = out.mean[:, -1] + out.deviation[:, -1] * torch.randn(6, generator=generator)
        long = torch.cat([long, drawn[:, None]], 1)
    assert_close(paths, long[:, 10:].unflatten(0, (2, 3)).transpose(0, 1), atol=1e-4, rtol=1e-4)


def test_series_that_start_late_are_padded_left() -> None:
    built, z = model(), random(1, 9)
    padded = torch.cat([torch.full((1, 4), torch.nan), z], 1)
    seen = torch.arange(13)[None] >= 4
    out, alone = built(padded, seen=seen), built(z)
    assert_close(out.loss, alone.loss)
    assert_close(out.mean[:, 4:], alone.mean)
    draws = [
        built.sample(v, seen=s, horizon=3, count=2, generator=torch.Generator().manual_seed(0))
        for v, s in ((padded, seen), (z, None))
    ]
    assert_close(draws[0], draws[1], atol=1e-5, rtol=1e-5)


def test_quantile_risk_equals_its_definition() -> None:
    z, paths = torch.tensor([[3.0, -1.0]]), torch.arange(11.0).view(11, 1, 1).expand(-1, 1, 2)
    want = 0.0
    for value in (3.0, -1.0):
        want += 2 * max(0.9 * (value - 9), 0.1 * (9 - value))
    assert quantile_risk(z, paths, 0.9) == pytest.approx(want / 4)
    assert quantile_risk(z, z.expand(5, 1, 2), 0.5) == 0
    with pytest.raises(LongspanError, match="between"):
        quantile_risk(z, paths, 1.5)


def test_windows_are_drawn_by_their_scale() -> None:
    values = torch.stack([torch.ones(10), torch.full((10,), 19.0)])
    drawn = windows(values, 4, 4000, generator=torch.Generator().manual_seed(0))
    share = (drawn.series == 1).double().mean().item()
    assert share == pytest.approx(20 / 22, abs=0.02)
    assert torch.equal(drawn.values, torch.stack(
        [values[s, t : t + 4] for s, t in zip(drawn.series, drawn.start, strict=True)]
    ))  # fmt: skip
    assert_close(scale_of(values), torch.tensor([2.0, 20.0]))
    with pytest.raises(LongspanError, match="shorten"):
        windows(values, 11, 1)


def test_learns_a_wave_and_reloads(tmp_path: Path) -> None:
    built = model(width=16).train()
    t = torch.arange(200.0)
    series = torch.stack([5 + 4 * (t * 2 * math.pi / p).sin() for p in (8, 12)])
    optimizer = torch.optim.Adam(built.parameters(), 5e-3)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(80):
        batch = windows(series, 32, 8, generator=generator)
        loss = built(batch.values, series=batch.series, history=24).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1
    for name, p in built.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
    built.eval()
    paths = built.sample(series[:, 96:120], series=torch.arange(2), horizon=8, count=20,
                         generator=generator)  # fmt: skip
    naive = quantile_risk(series[:, 120:128], series[:, 119:120].expand(2, 8).expand(20, 2, 8), 0.5)
    assert quantile_risk(series[:, 120:128], paths, 0.5) < 0.5 * naive
    built.save_pretrained(tmp_path)
    again = ForecastModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(series[:, :64]).mean, built(series[:, :64]).mean)


def test_covariates_must_fit() -> None:
    with pytest.raises(LongspanError, match="covariates are None"):
        model(covariates=2)(random(1, 5))
    with pytest.raises(LongspanError, match="expected"):
        model()(random(1, 5), random(1, 5, 1))
