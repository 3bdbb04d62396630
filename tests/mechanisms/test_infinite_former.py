"""∞-former: the fit, its closed forms, what is sampled, and what is carried."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.engines import continuous
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import MultiHead, reset, state_bytes
from longspan.nn.auxiliary import collect
from longspan.registry import build

E = 12
DENSITIES = ("softmax", "sparsemax")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(**arguments: Any) -> Any:
    given = {"width": E, "heads": 3, "segment": 6, "basis": 8, "widths": [0.1, 0.3], "samples": 10}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build("infinite-former", **given | arguments).double().eval()


def density(t: Tensor, mean: Tensor, variance: Tensor, kind: str) -> Tensor:
    if kind == "softmax":
        return torch.exp(-((t - mean) ** 2) / (2 * variance)) / (2 * math.pi * variance).sqrt()
    top = (3 / (2 * variance.sqrt())) ** (2 / 3) / 2
    return (top - (t - mean) ** 2 / (2 * variance)).clamp(min=0)


MEANS = torch.tensor([0.2, 0.5, 0.95], dtype=torch.float64)
VARIANCES = torch.tensor([0.01, 0.3, 1.5], dtype=torch.float64)
LINE = torch.linspace(-12, 13, 2_000_001, dtype=torch.float64)


@pytest.mark.parametrize("kind", DENSITIES)
def test_expectations_are_those_of_quadrature(kind: Any) -> None:
    centres, deviations = continuous.bases(6, (0.05, 0.2))
    got = continuous.expected(MEANS, VARIANCES, centres, deviations, kind)
    for i in range(3):
        p = density(LINE, MEANS[i], VARIANCES[i], kind)
        assert_close(torch.trapezoid(p, LINE).item(), 1.0, atol=1e-6, rtol=0)
        for j in range(6):
            psi = density(LINE, centres[j], deviations[j] ** 2, "softmax")
            want = torch.trapezoid(p * psi, LINE)
            assert_close(got[i, j], want, atol=1e-6, rtol=0)
        below = continuous.below(
            torch.tensor([0.3]).double(), MEANS[i : i + 1], VARIANCES[i : i + 1], kind
        )
        want = torch.trapezoid(p * (LINE <= 0.3), LINE)
        assert_close(below[0, 0], want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", DENSITIES)
def test_gradients_of_the_closed_forms_are_exact(kind: Any) -> None:
    centres, deviations = continuous.bases(6, (0.05, 0.2))
    given = [t.clone().requires_grad_() for t in (MEANS, VARIANCES)]
    assert torch.autograd.gradcheck(
        lambda m, v: continuous.expected(m, v, centres, deviations, kind), given
    )


def test_a_fit_with_many_bases_and_no_penalty_reproduces_its_points() -> None:
    x = normal(8, 3)
    g = continuous.regression(40, (0.05, 0.1), old=0, new=8, share=0.5, penalty=1e-10)
    centres, deviations = continuous.bases(40, (0.05, 0.1))
    t = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
    psi = density(t[:, None], centres, deviations**2, "softmax")
    assert_close(psi @ g.mT @ x, x, atol=1e-6, rtol=0)
    assert continuous.regression(40, (0.05, 0.1), old=0, new=8, share=0.5, penalty=1e-10) is g


def test_constant_rows_are_read_as_nearly_constant() -> None:
    module = layer(segment=32, basis=32, widths=[0.05], penalty=0.01)
    x = torch.ones(1, 33, E, dtype=torch.float64)
    _, state = module(x)
    centres, deviations = continuous.bases(32, (0.05,))
    t = torch.linspace(0.15, 0.85, 20, dtype=torch.float64)
    psi = density(t[:, None], centres, deviations**2, "softmax")
    assert_close(psi @ state.coefficients[0], torch.ones(20, E).double(), atol=0.05, rtol=0)


def test_the_update_contracts_the_old_signal_and_appends_the_new() -> None:
    """With bases to spare the new signal is x(t / τ) up to τ, and the segment from there on."""
    fine = {"basis": 80, "widths": [0.02, 0.04], "penalty": 1e-6, "samples": 24, "segment": 24}
    module = layer(**fine, sticky=False, tau=0.75)
    t = torch.linspace(0, 1, 24, dtype=torch.float64)
    x = torch.sin(6 * t[:, None] + torch.arange(E)).repeat(2, 1)[None]
    _, one = module(x[:, :24])
    _, two = module(x[:, 24:], one)
    centres, deviations = continuous.bases(80, (0.02, 0.04))

    def at(state: Any, t: Tensor) -> Tensor:
        return density(t[:, None], centres, deviations**2, "softmax") @ state.coefficients[0]

    m = torch.arange(3, 22, dtype=torch.float64) / 24
    assert_close(at(two, 0.75 * m), at(one, m), atol=0.02, rtol=0)
    assert_close(at(two, 0.75 + 0.25 * (m + 1 / 24)), x[0, 27:46], atol=0.07, rtol=0)


def test_sticky_samples_follow_the_histogram_within_its_bins() -> None:
    mass = torch.tensor([[0.0, 3.0, 1.0, 0.0]], dtype=torch.float64)
    u = (torch.arange(40_000, dtype=torch.float64) + 0.5)[None] / 40_000
    t = continuous.quantiles(mass, u)[0]
    counts = torch.histc(t, 8, 0, 1)
    assert_close(
        counts, torch.tensor([0, 0, 15000, 15000, 5000, 5000, 0, 0]).double(), atol=2, rtol=0
    )
    assert bool((t.diff() >= 0).all())


def test_after_even_attention_sticky_samples_are_uniform() -> None:
    """χ² of 20 bins over draws of many segments: below its 99.9 % quantile."""
    module = layer(bins=16, samples=400)
    mass = torch.ones(60, 16, dtype=torch.float64)
    t = module._samples(mass, torch.arange(1, 61))
    assert bool((t.diff(dim=1) >= 0).all())
    counts = torch.histc(t, 20, 0, 1)
    expected = t.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def test_samples_depend_on_the_seed_and_the_segment_alone() -> None:
    mass, blocks = torch.ones(2, 128, dtype=torch.float64), torch.tensor([3, 4])
    first, again, other = (layer(seed=s)._samples(mass, blocks) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[1:], layer()._samples(mass[1:], blocks[1:]))
    even = layer(sticky=False)._samples(mass, blocks)
    assert_close(even[0], torch.arange(1, 11).double() / 10)


@pytest.mark.parametrize("kind", DENSITIES)
@pytest.mark.parametrize("sticky", [True, False])
def test_streams_learns_and_never_peeks(kind: str, sticky: bool) -> None:
    module = layer(density=kind, sticky=sticky)
    x = normal(2, 21, E).requires_grad_()
    whole, _ = module(x)
    for sizes in ([1] * 21, [6, 6, 6, 3], [4, 13, 4]):
        outs, state = [], None
        for piece in x.split(sizes, 1):
            y, state = module(piece, state)
            outs.append(y)
        assert_close(torch.cat(outs, 1), whole)
    (g,) = torch.autograd.grad(whole[:, :13].sum(), x, retain_graph=True)
    assert not g[:, 13:].any()
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_memory_is_detached_constant_and_reset_by_row() -> None:
    module, x = layer(), normal(2, 60, E).requires_grad_()
    (g,) = torch.autograd.grad(module(x)[0][:, 54:].sum(), x)
    assert not g[:, :54].any()
    sizes = {state_bytes(module(x[:, :n])[1]) for n in (1, 13, 60)}
    assert len(sizes) == 1
    _, state = module(x[:, :20])
    assert not state.coefficients.requires_grad
    more = x[:, 20:30]
    got = module(more, reset(state, torch.tensor([True, False])))[0]
    assert_close(got[0], module(more)[0][0])
    assert_close(got[1], module(more, state)[0][1])


@pytest.mark.parametrize("centre", [None, 0.5])
def test_the_divergence_is_an_auxiliary_loss(centre: float | None) -> None:
    module = layer(kl=0.1, centre=centre, spread=0.2)
    x = normal(1, 6 + 5, E)
    module(x)
    assert not collect(module)  # not in evaluation
    module.train()
    module(x)
    (got,) = collect(module).values()
    _, state = module(x[:, :6])
    q, k = (
        module.project[n](t).unflatten(-1, (3, -1)).transpose(1, 2)
        for n, t in (("q", x[:, 6:]), ("k", state.coefficients))
    )
    mean, raw = module.place(q @ k.mT / 2).unbind(-1)
    mean, variance = mean.sigmoid(), torch.log1p(raw.exp())
    one = torch.distributions.Normal(mean, variance.sqrt())
    other = torch.distributions.Normal(mean if centre is None else centre, 0.2)
    want = torch.distributions.kl_divergence(one, other).mean((0, 1)).sum() / 11
    assert_close(got, 0.1 * want)


def test_it_is_added_to_an_existing_decoder_layer() -> None:
    attention = build("longformer", window=8, causal=True)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        local = MultiHead(attention, width=E, heads=3).double()
    module, x = layer(local=local), normal(2, 20, E)
    alone, _ = local(x)
    with torch.no_grad():
        assert_close(module(x)[0][:, :6], alone[:, :6])
        assert not torch.allclose(module(x)[0][:, 6:], alone[:, 6:])
        module.output.weight.zero_()
    assert_close(module(x)[0], alone)


def test_a_language_model_reports_the_divergence() -> None:
    spec = {"id": "infinite-former", "segment": 6, "basis": 8, "kl": 0.1, "samples": 4}
    config = LongspanConfig(
        vocab_size=11, width=E, layers=2, heads=3, mixers=[spec], position="sinusoidal-position"
    )
    tokens = torch.arange(20)[None] % 11
    with torch.random.fork_rng():
        model = LongspanForCausalLM(config)
    out = model.train()(tokens, labels=tokens)
    assert set(out.auxiliary) == {"infinite_former_kl"}
    out.loss.backward()


def test_bad_arguments_are_refused() -> None:
    for wrong in ({"segment": 0}, {"basis": 7}, {"tau": 1.0}, {"penalty": 0.0}, {"heads": 5}):
        with pytest.raises(LongspanError, match="expected"):
            layer(**wrong)
