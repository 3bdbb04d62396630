"""LSSL against SciPy's linear systems, in its three views; its caches; a deep model of it."""

from pathlib import Path
from typing import Any

import pytest
import scipy
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError, build
from longspan.engines import conv
from longspan.models.signals import SignalClassifier, SignalConfig
from longspan.training import parameter_groups

signal: Any = scipy.signal
FORMS = ("strides", "fft")


def layer(**options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build("lssl", **({"width": 3, "state": 6} | options)).double().eval()


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def raw(module: Any, u: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """K * u + D u, before the non-linearity: B E M L."""
    from longspan.mechanisms.state_space.lssl import _run

    return _run(module, u, state)


@pytest.mark.parametrize("name", ["legs", "legt", "lmu", "lagt"])
@pytest.mark.parametrize("size", [1, 2, 5, 64])
def test_hippo_is_quasiseparable_and_assembles_to_itself(name: Any, size: int) -> None:
    parts = conv.decompose(name, size)
    assert_close(conv.assemble(parts), conv.measure(name, size)[0])
    assert parts.t.shape == (3, size)


@pytest.mark.parametrize("measure", ["legs", "legt"])
@pytest.mark.parametrize("method", ["bilinear", "backward", 0.3])
@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_taps_are_scipys(measure: str, method: Any, form: str) -> None:
    module = layer(measure=measure, method=method, form=form, channels=2, learn_matrix=False)
    a = conv.assemble(conv.Quasiseparable(*(getattr(module, n) for n in "pdtq"))).numpy()
    known = {"backward": ("backward_diff", None), 0.3: ("gbt", 0.3)}
    how, share = known.get(method, (method, None))
    u, b = normal(1, 3, 150), module.b.numpy()[:, None]
    y, kernel = raw(module, u)[0].detach(), module.kernel(150).detach()
    for e in range(3):
        step = float(module.log_step[e].detach().exp())
        down, taken, *_ = signal.cont2discrete((a, b, a, b), step, how, alpha=share)
        for m in range(2):
            # SciPy reads x before u_t enters it, so that C A, C B is what reads it after.
            c = module.c[e, m].detach().numpy()[None]
            system = down, taken, c @ down, c @ taken, step
            _, (taps,) = signal.dimpulse(system, n=150)
            assert_close(kernel[e, m], torch.from_numpy(taps[:, 0]))
            _, want, _ = signal.dlsim(system, u[0, e].numpy())
            own = module.skip[e, m].detach() * u[0, e]
            assert_close(y[0, e, m], torch.from_numpy(want[:, 0]) + own)


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
def test_convolution_strides_and_recurrence_agree(length: int) -> None:
    modules = [layer(form=form, channels=2) for form in FORMS]
    x = normal(2, length, 3)
    start = normal(2, 3, 6, seed=1)
    (y, state), (z, other) = (module(x, start) for module in modules)
    assert_close(y, z)
    assert_close(state, other)
    outs, state = [], start
    for token in x.split(1, dim=1):
        out, state = modules[0](token, state)
        outs.append(out)
    assert_close(torch.cat(outs, 1), y)
    assert_close(state, other)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_both_forms_agree(form: str) -> None:
    grads = []
    for each in ("strides", form):
        module = layer(form=each, channels=2)
        x = normal(2, 90, 3).requires_grad_()
        y, state = module(x, normal(2, 3, 6, seed=1))
        (y.square().sum() + state.square().sum()).backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    assert_close(*grads, rtol=1e-7, atol=1e-9)


def test_one_state_is_an_exponential_moving_average() -> None:
    module = layer(width=1, state=1)  # LegS of one state: x' = −x + u
    half = module.log_step.exp() / 2
    decay, gain = (1 - half) / (1 + half), 2 * half / (1 + half)
    u = normal(1, 1, 40)
    y, _ = raw(module, u)
    weights = (gain * decay ** (torch.arange(40)[:, None] - torch.arange(40))).tril()
    assert_close(y[0, 0], module.c[0] * (weights @ u[0, 0]) + module.skip[0, :, None] * u[0, 0])


@pytest.mark.parametrize("measure", ["legs", "legt"])
def test_half_the_step_on_twice_the_samples_gives_nearly_the_same(measure: str) -> None:
    module = layer(measure=measure)
    t = torch.arange(0, 800, dtype=torch.float64) / 800
    u = ((9 * t).sin() + (23 * t).cos())[None, None].expand(1, 3, -1)
    module.rate = 0.5
    fine, _ = raw(module, u)
    module.rate = 1.0
    coarse, _ = raw(module, u[..., ::2])
    apart = (fine[..., ::2] - coarse)[..., 20:].norm() / coarse[..., 20:].norm()
    assert apart < 0.03


@pytest.mark.parametrize("form", FORMS)
def test_the_fixed_variant_keeps_its_factors_until_step_or_length_change(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = layer(form=form, learn_matrix=False, learn_step=False).train()
    made = []
    stride = conv.stride
    monkeypatch.setattr(conv, "stride", lambda *a: made.append(a[2]) or stride(*a))

    def call(length: int) -> Tensor:
        y, _ = module(normal(1, length, 3))
        y.sum().backward()
        return y

    first = call(100)
    for _ in range(3):
        assert torch.equal(call(100), first)
    assert len(made) == 1
    longer = call(1000)
    assert len(made) == (1 if form == "strides" else 2)
    module.rate = 0.5
    assert not torch.allclose(call(1000), longer)
    module.rate = 1.0
    with torch.no_grad():
        module.log_step.add_(0.1)
    fresh = layer(form=form)
    fresh.load_state_dict(module.state_dict())
    assert_close(call(1000), fresh(normal(1, 1000, 3))[0])
    module.load_state_dict(layer().state_dict())
    assert_close(call(100), first)


def test_what_is_trained_and_what_is_fixed() -> None:
    x = normal(1, 20, 3)
    names = {"p", "d", "t", "q", "b"}
    for matrix in (True, False):
        for step in (True, False):
            module = layer(learn_matrix=matrix, learn_step=step)
            trained = {n for n, _ in module.named_parameters()}
            assert (names <= trained) == matrix
            assert names.isdisjoint(trained) != matrix
            assert ("log_step" in trained) == step
            module(x)[0].sum().backward()
            assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_a_and_step_learn_slowly_without_decay() -> None:
    module = layer()
    groups = parameter_groups(module, lr=1e-2, weight_decay=0.1)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert {found[id(getattr(module, n))] for n in "pdtqb"} == {(1e-4, 0.0)}
    assert found[id(module.log_step)] == (1e-3, 0.0)
    assert found[id(module.c)] == (1e-2, 0.1)


def test_powers_stay_finite_at_long_steps_and_lengths() -> None:
    for measure in ("legs", "legt"):
        module = build("lssl", width=2, state=64, measure=measure, step_min=0.5, step_max=1.0)
        assert module.kernel(20000).isfinite().all()
        assert module.kernel(20000).abs().max() < 1e4


def waves(count: int, length: int, every: int = 1) -> tuple[Tensor, Tensor]:
    """Slow and fast sines at random phases, sampled `every` as many times as densely."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    phase = torch.rand(count, 1, generator=generator) * 6.28
    t = torch.arange(length * every) / every
    return ((0.1 + 0.3 * labels[:, None]) * t + phase).sin()[..., None], labels


def test_the_deep_classifier_learns_and_takes_another_sampling_rate(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = SignalConfig(layers=2, width=12, mixers=[{"id": "lssl", "state": 8}], num_labels=2)
        model = SignalClassifier(config)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=0.01, weight_decay=0.01))
    values, labels = waves(32, 64)
    for _ in range(30):
        loss: Any = model(values, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    def right(every: int) -> float:
        values, labels = waves(32, 64, every)
        return float((model(values).logits.argmax(-1) == labels).float().mean())

    with torch.no_grad():
        assert right(1) == 1
        model.resample(0.5)
        assert right(2) == 1
        model.save_pretrained(tmp_path)
        again = SignalClassifier.from_pretrained(tmp_path)
        assert again.config.rate == 0.5
        assert_close(again(waves(3, 64, 2)[0]).logits, model(waves(3, 64, 2)[0]).logits)
        # Padding changes nothing.
        values = waves(3, 64, 2)[0]
        padded = torch.cat([values, torch.full((3, 7, 1), 9.0)], 1)
        mask = torch.ones(3, 135).index_fill(1, torch.arange(128, 135), 0)
        assert_close(model(padded, attention_mask=mask).logits, model(values).logits)


def test_the_deep_regressor_has_a_square_loss() -> None:
    model = SignalClassifier(SignalConfig(layers=1, width=6, channels=2, num_labels=1))
    output = model(torch.randn(3, 20, 2), labels=torch.ones(3))
    assert_close(output.loss, (output.logits - 1).square().mean())


def test_what_cannot_be_built_is_refused() -> None:
    for bad in ({"state": 0}, {"channels": 0}, {"step_min": 0.2}):
        with pytest.raises(LongspanError, match="step_min <= step_max"):
            layer(**bad)
    model = SignalClassifier(SignalConfig(layers=1, width=8, mixers=["multi-head-attention"]))
    with pytest.raises(LongspanError, match="MultiHead"):
        model.resample(0.5)
