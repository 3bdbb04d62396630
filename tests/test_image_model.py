"""The Image Transformer: embeddings, losses, samples, conditions."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.models.image import (
    ImageConfig,
    ImageTransformerModel,
    draw,
    mixture_log_likelihood,
    scaled,
)

ORDINAL = {"colours": "ordinal", "mixtures": 3}


def grid(columns: int) -> dict[str, Any]:
    return {"id": "image-transformer", "block": (2, 3), "memory": (1, 2), "columns": columns}


def model(**fields) -> ImageTransformerModel:
    torch.manual_seed(0)
    chosen: dict[str, Any] = {
        "width": 8, "layers": 2, "heads": 2, "rows": 4, "columns": 3, "inner": 8,
        "mixers": ({"id": "image-transformer", "block": 6, "memory": 4},),
    } | fields  # fmt: skip
    return ImageTransformerModel(ImageConfig(**chosen)).eval()


def pixels(*shape: int) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("colours", [{}, ORDINAL], ids=["categorical", "ordinal"])
@pytest.mark.parametrize("two", [False, True], ids=["1d", "2d"])
def test_sampling_by_steps_equals_whole_passes(colours, two: bool) -> None:
    mixers = {"mixers": (grid(3 if colours else 9),)} if two else {}
    built = model(**colours, **mixers)
    fast, slow = (
        built.sample(2, generator=torch.Generator().manual_seed(1), fast=f) for f in (True, False)
    )
    assert fast.shape == (2, 3, 4, 3)
    assert torch.equal(fast, slow)


@pytest.mark.parametrize("colours", [{}, ORDINAL], ids=["categorical", "ordinal"])
def test_predictions_depend_on_what_was_generated_before(colours) -> None:
    built = model(**colours, mixers=(grid(3 if colours else 9),), layers=3)
    image = pixels(1, 3, 4, 3)
    values, base = built.sequence(image), built(image).logits
    assert torch.equal(built.image(values), image)
    for t in range(0, values.shape[1], 5):
        other = values.clone()
        other[:, t] = (other[:, t] + 90) % 256
        changed = (built(built.image(other)).logits != base).any(-1)[0]
        assert not changed[: t + 1].any()
        if t + 1 < len(changed):
            assert changed[t + 1]


def test_categorical_embeds_each_channel_from_its_own_table() -> None:
    built = model()
    embed: Any = built.decoder.embed_tokens
    cells = torch.tensor([[0, 0], [0, 1], [0, 5]])
    found = embed.values(torch.full((1, 3, 1), 7), cells)[0]
    assert torch.equal(found, embed.value.weight[[7, 256 + 7, 512 + 7]])


def test_ordinal_embeds_a_pixel_by_a_strided_convolution_over_its_channels() -> None:
    built = model(**ORDINAL)
    embed: Any = built.decoder.embed_tokens
    values = pixels(1, 5, 3)
    flat = scaled(values).flatten(1)[:, None]
    want = torch.nn.functional.conv1d(flat, embed.value.weight[:, None], embed.value.bias, stride=3)
    assert_close(embed.values(values, torch.zeros(5, 2, dtype=torch.long)), want.mT)


def test_positions_give_half_the_width_to_rows_and_half_to_columns_and_channels() -> None:
    embed: Any = model().decoder.embed_tokens
    found = embed.places(torch.tensor([[2, 5], [2, 6], [3, 5]]))
    assert torch.equal(found[0, :4], found[1, :4])
    assert torch.equal(found[0, 4:], found[2, 4:])
    assert found[0, 0].item() == pytest.approx(math.sin(2))
    assert found[0, 4].item() == pytest.approx(math.sin(5))
    learned: Any = model(places="learned").decoder.embed_tokens
    assert learned.columns.num_embeddings == 9


@pytest.mark.parametrize("scale", [-7.0, -3.0, 0.0, 2.0])
def test_the_mixture_sums_to_one_over_all_values(scale: float) -> None:
    outputs = torch.randn(1, 1, 9, generator=torch.Generator().manual_seed(0)).double()
    outputs[..., 6:] = scale
    values = torch.arange(256).view(1, 256, 1)
    total = mixture_log_likelihood(outputs.expand(1, 256, 9), values).exp().sum()
    assert total.item() == pytest.approx(1, abs=2e-2 if scale < -6 else 1e-6)


def test_the_mixture_equals_its_formula_with_channels_in_turn() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(1, 4, 20, generator=generator).double()  # two logistics, ten numbers each
    values = torch.tensor([[[0, 255, 100], [255, 0, 0], [3, 4, 5], [128, 127, 255]]])
    got = mixture_log_likelihood(outputs, values)[0]
    for t, row in enumerate(values[0].tolist()):
        p = outputs[0, t].view(10, 2)
        x = [v / 127.5 - 1 for v in row]
        weight = p[0].softmax(0)
        total = 0.0
        for k in range(2):
            a, b, c = p[7:10, k].tanh().tolist()
            mu = p[1:4, k].tolist()
            mu = [mu[0], mu[1] + a * x[0], mu[2] + b * x[0] + c * x[1]]
            product = weight[k].item()
            for d in range(3):
                s = math.exp(p[4 + d, k].item())
                up = 1 if row[d] == 255 else 1 / (1 + math.exp(-(x[d] + 1 / 255 - mu[d]) / s))
                down = 0 if row[d] == 0 else 1 / (1 + math.exp(-(x[d] - 1 / 255 - mu[d]) / s))
                product *= up - down
            total += product
        assert got[t].item() == pytest.approx(math.log(total), rel=1e-6)


def test_draws_follow_the_mixture() -> None:
    outputs = torch.tensor([[1.0, 0.0, -0.5, 0.4, -3.0, -2.0]]).double()  # one channel, two parts
    drawn = draw(outputs.expand(20000, 6), 1, generator=torch.Generator().manual_seed(0),
                 mixture=True)  # fmt: skip
    share = torch.bincount(drawn[:, 0], minlength=256).double() / 20000
    values = torch.arange(256).view(1, 256, 1)
    want = mixture_log_likelihood(outputs[None].expand(1, 256, 6), values)[0].exp()
    assert (share.cumsum(0) - want.cumsum(0)).abs().max() < 0.015


def test_mixture_gradients_are_finite_at_the_edges() -> None:
    outputs = (torch.randn(2, 8, 10) * 30).requires_grad_()
    values = torch.tensor([0, 255, 1, 254, 0, 255, 128, 7]).view(1, 8, 1).expand(2, -1, -1)
    mixture_log_likelihood(outputs[..., :6], values).sum().backward()
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


def test_super_resolution_attends_to_the_small_image() -> None:
    built = model(small=(2, 2), encoder_layers=1)
    image, small = pixels(2, 3, 4, 3), pixels(2, 3, 2, 2)
    base = built(image, small).logits
    other = small.clone()
    other[0, 1, 1, 1] = (other[0, 1, 1, 1] + 128) % 256
    changed = built(image, other).logits != base
    assert changed[0].any(-1).all()
    assert not changed[1].any()
    drawn = [
        built.sample(2, small=small, generator=torch.Generator().manual_seed(0), fast=f)
        for f in (True, False)
    ]
    assert torch.equal(*drawn)
    with pytest.raises(LongspanError, match="give it"):
        built(image)
    with pytest.raises(LongspanError, match="built for"):
        built(image, image)


def test_class_conditioning_adds_an_embedding() -> None:
    built, image = model(classes=4), pixels(1, 3, 4, 3)
    one, two = (built(image, classes=torch.tensor([c])).logits for c in (1, 2))
    assert (one != two).any(-1).all()
    with pytest.raises(LongspanError, match="classes"):
        built(image)


@pytest.mark.parametrize("colours", [{}, ORDINAL], ids=["categorical", "ordinal"])
def test_learns_an_image_and_reloads(colours, tmp_path: Path) -> None:
    built = model(**colours, width=16, classes=2).train()
    images = pixels(2, 3, 4, 3) // 64 * 64
    kinds = torch.tensor([0, 1])
    optimizer = torch.optim.Adam(built.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = built(images, classes=kinds).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.7
    for name, p in built.named_parameters():
        assert p.grad is not None, name
    built.eval().save_pretrained(tmp_path)
    again = ImageTransformerModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(images, classes=kinds).logits, built(images, classes=kinds).logits)


def test_refusals() -> None:
    for wrong in (
        {"mixers": (grid(3),)},
        {"mixers": (grid(9), "image-transformer")},
        {"mixers": (grid(9),), "rows": 3},
        {"colours": "grey"},
    ):
        with pytest.raises(LongspanError):
            model(**wrong)
    for shape in itertools.permutations((3, 4, 5)):
        with pytest.raises(LongspanError, match="built for"):
            model()(pixels(1, *shape))
