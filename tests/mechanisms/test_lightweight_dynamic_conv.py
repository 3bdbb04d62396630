"""Lightweight and dynamic convolutions against PyTorch's own convolutions and written-out bands."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.engines import conv
from longspan.engines.conv import shapes
from longspan.mechanisms.convolution.lightweight_dynamic_conv import LightweightDynamicConv
from longspan.models import LongspanConfig, LongspanForSeq2SeqLM
from longspan.nn import Block, state_bytes
from longspan.registry import build
from longspan.testing import oracle_of

FORMS = pytest.mark.parametrize("form", ["light", "dynamic"])


def layer(**arguments: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        mixer = build("lightweight-dynamic-conv", **({"width": 12, "heads": 3} | arguments))
    return mixer.double()


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def gated(mixer: Any, x: Tensor) -> Tensor:
    a, b = mixer.input(x).chunk(2, -1)
    return a * b.sigmoid()


@pytest.mark.parametrize("block", [1 << 20, 500])
@pytest.mark.parametrize("length", [1, 5, 16, 17, 100])
@pytest.mark.parametrize("taps", [1, 3, 20, 50])
def test_engine_is_its_sum(
    length: int, taps: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "BLOCK", block)
    x, cotangent = normal(3, length + taps - 1, 12).requires_grad_(), normal(3, length, 12, seed=2)
    windows = x.unfold(1, taps, 1).unflatten(2, (4, 3))  # B L H D K
    for shape, formula in (
        ((4, taps), "blhdk,hk->blhd"),
        ((3, length, 4, taps), "blhdk,blhk->blhd"),
    ):
        weights = normal(*shape, seed=1).requires_grad_()
        want, got = torch.einsum(formula, windows, weights).flatten(2), conv.short(x, weights)
        assert_close(got, want)
        inputs = x, weights
        assert_close(
            torch.autograd.grad(got, inputs, cotangent),
            torch.autograd.grad(want, inputs, cotangent, retain_graph=True),
        )


@pytest.mark.parametrize("window", [3, 7])
@pytest.mark.parametrize("causal", [True, False])
def test_light_is_a_grouped_conv1d(window: int, causal: bool) -> None:
    """Softmaxed taps repeated over the adjacent channels of a head."""
    mixer, x = layer(form="light", window=window, causal=causal), normal(2, 29, 12)
    kernel = mixer.taps.softmax(-1).repeat_interleave(4, 0)[:, None]
    u = F.pad(gated(mixer, x).mT, (window - 1, 0) if causal else (window // 2, window // 2))
    assert_close(mixer(x)[0], mixer.output(F.conv1d(u, kernel, groups=12).mT))


def test_one_head_a_channel_without_softmax_is_a_depthwise_convolution() -> None:
    mixer, x = (
        layer(form="light", heads=12, window=5, normalise=False, bias=True),
        normal(2, 29, 12),
    )
    with torch.no_grad():
        mixer.bias.copy_(normal(12, seed=4))
    own = F.conv1d(gated(mixer, x).mT, mixer.taps[:, None], mixer.bias, padding=2, groups=12)
    assert_close(mixer(x)[0], mixer.output(own.mT))


@pytest.mark.parametrize("causal", [True, False])
def test_dynamic_without_predictions_is_a_moving_average(causal: bool) -> None:
    mixer, x = layer(window=5, causal=causal), normal(2, 40, 12)
    with torch.no_grad():
        mixer.predict.weight.zero_()
    u = F.pad(gated(mixer, x), (0, 0, 4, 0) if causal else (0, 0, 2, 2))
    assert_close(mixer(x)[0], mixer.output(u.unfold(1, 5, 1).mean(-1)))


@FORMS
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "more",
    [{"window": 4}, {"window": 1}, {"renormalise": True}, {"normalise": False}, {"bias": True}],
    ids=str,
)
def test_options_equal_the_formula(form: str, causal: bool, more: dict) -> None:
    mixer, x = layer(form=form, causal=causal, **({"window": 5} | more)), normal(2, 13, 12)
    if mixer.bias is not None:
        with torch.no_grad():
            mixer.bias.copy_(normal(12, seed=4))
    formula: Any = oracle_of("lightweight-dynamic-conv")
    keep = torch.rand(2, 13, generator=torch.Generator().manual_seed(1)) > 0.3
    for mask in (None, keep):
        assert_close(mixer(x, keep=mask)[0], formula(mixer, x, keep=mask))


@FORMS
@pytest.mark.parametrize("renormalise", [True, False])
def test_steps_equal_the_whole(form: str, renormalise: bool) -> None:
    mixer, x = layer(form=form, causal=True, renormalise=renormalise, window=6), normal(2, 20, 12)
    whole, last = mixer(x)
    outs, state = [], None
    for token in x.split(1, 1):
        out, state = mixer(token, state)
        outs.append(out)
        assert state_bytes(state) == 2 * 5 * 12 * 8 + 2 * 5
    assert_close((torch.cat(outs, 1), state), (whole, last))


def test_borders_keep_or_share_their_mass() -> None:
    """On a constant input a border loses what falls outside, unless renormalised."""
    for renormalise in (False, True):
        mixer = layer(form="light", window=3, renormalise=renormalise)
        u, seen = torch.ones(1, 6, 12).double(), torch.tensor([[False, *[True] * 4, False]])
        y = conv.short(u * seen[..., None], mixer._weights(mixer.taps, seen))[0, :, 0].detach()
        first = 1.0 if renormalise else 1 - mixer.taps.softmax(-1)[0, 0].item()
        assert_close(y[0].item(), first)
        assert_close(y[1].item(), 1.0)


@FORMS
def test_drop_connect_drops_taps_in_training_only(form: str) -> None:
    mixer, x = layer(form=form, drop_connect=0.5), normal(2, 20, 12)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = mixer._weights(
            torch.zeros(9, mixer.window).double()
            if form == "light"
            else torch.zeros(2, 9, 3 * mixer.window).double(),
            torch.ones(2, 39, dtype=torch.bool),
        )
        assert 0.3 < (dropped == 0).double().mean() < 0.7
        assert_close(dropped.max().item(), 2 / mixer.window)
        assert not torch.equal(mixer(x)[0], mixer(x)[0])
    mixer.eval()
    assert torch.equal(mixer(x)[0], mixer(x)[0])


def test_encoder_and_decoder_widen_with_depth() -> None:
    """Sec. 5: a kernel size per layer, ordinary cross-attention, and it learns."""

    def mixers(*windows: int) -> list[Any]:
        return [{"id": "lightweight-dynamic-conv", "window": n} for n in windows]

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LongspanConfig(
            vocab_size=11,
            width=32,
            heads=4,
            layers=2,
            encoder_layers=3,
            mixers=mixers(3, 7),
            encoder_mixers=mixers(3, 7, 15),
            length=32,
            position="sinusoidal-position",
            decoder_start_token_id=0,
        )
        model = LongspanForSeq2SeqLM(config)
    found = [int(m.window) for m in model.modules() if isinstance(m, LightweightDynamicConv)]
    assert sorted(found) == [3, 3, 7, 7, 15]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    tokens = torch.randint(3, 11, (16, 8), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(40):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_residual_block_takes_it() -> None:
    block = Block(layer(), None, width=12, order="post").double()
    x = normal(1, 9, 12)
    assert_close(block(x)[0], block.mixer_norm(x + block.mixer(x)[0]))


def test_refuses_what_it_cannot_do() -> None:
    for arguments, message in (
        ({"heads": 5}, "heads must divide"),
        ({"window": 0}, "at least 1"),
        ({"normalise": False, "renormalise": True}, "no softmax"),
    ):
        with pytest.raises(LongspanError, match=message):
            layer(**arguments)
    x = normal(1, 4, 12)
    with pytest.raises(LongspanError, match="context or marks"):
        layer()(x, context=x)
    with pytest.raises(LongspanError, match="causal=True"):
        layer()(x, layer(causal=True)(x)[1])


@pytest.mark.slow
@FORMS
def test_runs_at_a_million_tokens(form: str) -> None:
    mixer = build("lightweight-dynamic-conv", width=8, heads=2, form=form, causal=True)
    x = torch.randn(1, 1 << 20, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y, _ = mixer(x)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert_close(y[:, :1000], mixer(x[:, :1000])[0], rtol=1e-4, atol=1e-5)
