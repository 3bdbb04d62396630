"""HiPPO's matrices, bases, sampling and updates against SciPy and quadrature; the RNN around it."""

from typing import Any

import pytest
import scipy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from longspan import LongspanError
from longspan.engines import conv
from longspan.registry import build

signal: Any = scipy.signal
special: Any = scipy.special
MEASURES: Any = ("legs", "legt", "lmu", "lagt")


def wave(t: Tensor) -> Tensor:
    return (3 * t).sin() + 0.5 * (7 * t + 1).cos()


def times(count: int, stop: float = 1.0) -> Tensor:
    return (torch.arange(count, dtype=torch.float64) + 1) * stop / count


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("method", ["euler", "backward", "bilinear", "zoh", 0.3])
def test_sampling_is_scipys(name: Any, method: Any) -> None:
    a, b = conv.measure(name, 6, theta=2.0)
    known = {"euler": ("euler", None), "backward": ("backward_diff", None), 0.3: ("gbt", 0.3)}
    how, share = known.get(method, (method, None))
    system = (a.numpy(), b[:, None].numpy(), a.numpy() * 0, b[:, None].numpy() * 0)
    want = signal.cont2discrete(system, 0.05, how, alpha=share)
    got = conv.sample(a, b, 0.05, method)
    assert_close(got[0], torch.from_numpy(want[0]))
    assert_close(got[1], torch.from_numpy(want[1][:, 0]))


def test_bases_are_scipys_polynomials() -> None:
    ages = torch.linspace(0.01, 2, 20, dtype=torch.float64)
    bases = {name: conv.basis(name, 5, ages, theta=2.0) for name in ("legt", "lmu")}
    tilted = conv.basis("lagt", 5, ages, alpha=0.5, beta=0.2)
    for n in range(5):
        x = 1 - ages.numpy()
        legendre = torch.from_numpy(special.eval_legendre(n, x))
        assert_close(bases["legt"][:, n], legendre * (2 * n + 1) ** 0.5)
        assert_close(bases["lmu"][:, n], legendre * (-1) ** n)
        laguerre = torch.from_numpy(special.eval_genlaguerre(n, 0.5, ages.numpy()))
        norm = (special.gamma(n + 1.5) / special.gamma(n + 1)) ** 0.5
        assert_close(tilted[:, n], laguerre * ages**0.5 * (-0.4 * ages).exp() / norm)


def test_laguerre_matrices_of_the_paper_and_of_the_code() -> None:
    paper, _ = conv.measure("lagt", 5)
    assert_close(paper, -torch.ones(5, 5).double().tril())
    assert_close(conv.measure("lagt", 5, beta=0.0)[0], conv.hippo("lagt", 5)[0])
    for name in ("legs", "legt"):
        assert_close(conv.measure(name, 5), conv.hippo(name, 5))


@pytest.mark.parametrize("name", ["legt", "lmu"])
def test_a_window_is_reconstructed(name: Any) -> None:
    f = wave(times(4000, 4.0))
    a, b = conv.sample(*conv.measure(name, 24, theta=1.0), 1e-3, "bilinear")
    c = conv.project(f, a, b, parallel=False)[-1]
    ages = torch.linspace(0, 1, 50, dtype=torch.float64)
    got = conv.reconstruct(c, conv.basis(name, 24, ages))
    assert_close(got, wave(4.0 - ages), rtol=0, atol=0.02)
    root = (2 * torch.arange(24, dtype=torch.float64) + 1).sqrt()
    signs = (-1.0) ** torch.arange(24)
    if name == "legt":  # the newest and the oldest value
        assert_close((root * c).sum(), got[0])
        assert_close((root * signs * c).sum(), got[-1])


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 1.0), (0.0, 0.2), (0.5, 0.5)])
def test_laguerre_coefficients_are_their_integrals(alpha: float, beta: float) -> None:
    """c_n = ∫ f(t − τ) L_n^α(τ) e^{−(1+β)τ/2} dτ / norm."""
    t = times(8000, 20.0)
    options = {"alpha": alpha, "beta": beta}
    a, b = conv.sample(*conv.measure("lagt", 5, **options), 20 / 8000, "bilinear")
    c = conv.project(wave(t), a, b, parallel=False)[-1]
    ages = 20.0 - t
    for n in range(5):
        laguerre = torch.from_numpy(special.eval_genlaguerre(n, alpha, ages.numpy()))
        norm = (special.gamma(n + alpha + 1) / special.gamma(n + 1)) ** 0.5
        kernel = laguerre * (-(1 + beta) / 2 * ages).exp() / norm
        assert_close(c[n], torch.trapezoid(wave(t) * kernel, t), rtol=0, atol=0.01)


def test_legs_is_the_projection_of_all_of_the_past() -> None:
    f, size = wave(times(3000)), 12
    c = conv.project(f, *conv.scaled(size, 3000, "bilinear"), parallel=False)
    nodes, weights = special.roots_legendre(40)
    nodes, weights = torch.from_numpy(nodes), torch.from_numpy(weights)
    ages = (1 - nodes) / 2
    want = (conv.basis("legs", size, ages).mT * wave(1 - ages) * weights / 2).sum(-1)
    assert_close(c[-1], want, rtol=0, atol=5e-3)
    newest = conv.reconstruct(c[-1], conv.basis("legs", size, torch.zeros(1).double()))
    assert_close(newest, f[-1:], rtol=0, atol=0.03)
    mean = (f.cumsum(0)) / torch.arange(1, 3001)
    assert_close(c[1000:, 0], mean[1000:], rtol=0, atol=2e-3)


def test_legs_forgets_no_timescale() -> None:
    """The same function sampled twice as densely ends in the same coefficients."""
    ends = []
    for count in (1500, 3000):
        system = conv.scaled(8, count, "bilinear")
        ends.append(conv.project(wave(times(count)), *system, parallel=False)[-1])
    assert_close(*ends, rtol=0, atol=5e-3)


@pytest.mark.parametrize("parallel", [True, False])
def test_updates_agree(parallel: bool) -> None:
    """Parallel, dense and O(N) updates of several channels, from a state too."""
    f = torch.randn(2, 3, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = conv.scaled(7, 21, "bilinear")
    whole = conv.project(f, a, b, parallel=parallel)
    later = conv.project(f[..., 9:], a[9:], b[9:], whole[..., 8, :], parallel=parallel)
    assert_close(later, whole[..., 9:, :])
    legs = conv.measure("legs", 7)
    fast = dense = torch.zeros(2, 3, 7, dtype=torch.float64)
    for t in range(21):
        fast = conv.legs_step(fast, f[..., t], torch.full((2, 3), t + 1))
        dense = conv.legs_update(*legs, dense, f[..., t], torch.full((2,), t + 1), "bilinear")
        assert_close(fast, whole[..., t, :])
        assert_close(dense, whole[..., t, :])


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("method", ["bilinear", "zoh"])
def test_the_rnn_carries_its_state(name: Any, method: Any) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer = build("hippo", width=6, state=5, channels=2, measure=name, method=method, theta=9.0)
    x = torch.randn(2, 17, 6, generator=torch.Generator().manual_seed(1)).double()
    whole, last = mixer.double()(x)
    first, state = mixer(x[:, :7])
    second, state = mixer(x[:, 7:], state)
    assert_close((torch.cat([first, second], 1), state), (whole, last))
    assert last.seen.tolist() == [17, 17]
    # Its memory is the projection of what the hidden state says.
    f = mixer.read(whole).mT
    if name == "legs":
        a, b = conv.scaled(5, 17, method)
    else:
        a, b = mixer.system
    assert_close(conv.project(f, a, b)[:, :, -1], last.memory)


def test_the_rnn_learns_to_remember() -> None:
    """The first of 12 inputs, asked for at the end."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mixer, read = build("hippo", width=8, state=8), nn.Linear(8, 1)
    names = {n.partition(".")[0] for n, _ in mixer.named_parameters()}
    assert names == {"cell", "read"}  # A and B are fixed
    x = torch.randn(32, 12, 8, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam([*mixer.parameters(), *read.parameters()], lr=1e-2)
    losses = []
    for _ in range(80):
        loss = F.mse_loss(read(mixer(x)[0][:, -1])[:, 0], x[:, 0, 0].sign())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(LongspanError, match="positive"):
        build("hippo", width=4, state=0)
    x, mixer = torch.zeros(1, 2, 4), build("hippo", width=4)
    with pytest.raises(LongspanError, match="one sequence"):
        mixer(x, context=x)
