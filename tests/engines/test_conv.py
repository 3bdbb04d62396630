"""The convolution engine against recurrences and matrix powers written out, and SciPy."""

from typing import Any

import numpy as np
import pytest
import scipy
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import conv
from longspan.engines.conv import shapes

signal: Any = scipy.signal  # its stubs know less than it does
MEASURES: Any = ("legs", "legt", "lagt")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=generator(seed))


def inside(features: int, pairs: int) -> Tensor:
    """Transitions within the unit circle."""
    radius = 0.5 + 0.5 * torch.rand(features, pairs, dtype=torch.float64, generator=generator(1))
    return torch.polar(radius, 3 * normal(features, pairs, seed=2))


def recurrence(
    u: Tensor, a: Tensor, v: Tensor, state: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor]:
    x, outs = torch.view_as_complex(state), []
    for t in range(u.shape[2]):
        x = a * x + u[:, :, t, None]
        outs.append(2 * (v * x).real.sum(-1) + skip * u[:, :, t])
    return torch.stack(outs, -1), torch.view_as_real(x)


def system(measure: Any, size: int, features: int = 2) -> conv.LowRank:
    eigenvalues, p, b, _ = conv.normal_plus_low_rank(measure, size)
    step = torch.tensor([0.01, 0.07, 0.03], dtype=torch.float64)[:features]
    eigenvalues, p, b = (t.expand(features, *t.shape) for t in (eigenvalues, p, b))
    return conv.LowRank(eigenvalues, p, b, step)


def whole(half: Tensor) -> Tensor:
    return torch.cat([half, half.conj()], -1)


@pytest.mark.parametrize("block", [1 << 20, 40])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 61])
def test_diagonal_is_the_recurrence(
    length: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "BLOCK", block)
    a, v = inside(3, 4), torch.complex(normal(3, 4), normal(3, 4, seed=3))
    u, state, skip = normal(2, length, 3).mT, normal(2, 3, 4, 2, seed=4), normal(3, seed=5)
    inputs = [t.requires_grad_() for t in (u, a, v, state, skip)]
    y, last = conv.diagonal(u, a, v, state, skip=skip, chunk=8)
    expected, expected_last = recurrence(u, a, v, state, skip)
    assert y.stride() == u.stride()
    assert_close((y, last), (expected, expected_last))
    cotangents = normal(2, 3, length, seed=6), normal(2, 3, 4, 2, seed=7)
    got = torch.autograd.grad((y, last), inputs, cotangents)
    want = torch.autograd.grad((expected, expected_last), inputs, cotangents)
    assert_close(got, want)


def test_diagonal_passes_gradcheck() -> None:
    pairs = [t.requires_grad_() for t in (normal(2, 3, 2, seed=1) / 2, normal(2, 3, 2, seed=2))]
    u, state = normal(2, 2, 7).requires_grad_(), normal(2, 2, 3, 2, seed=3).requires_grad_()

    def run(u: Tensor, a: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return conv.diagonal(u, torch.view_as_complex(a), torch.view_as_complex(v), state, chunk=3)

    assert torch.autograd.gradcheck(run, (u, *pairs, state))


def test_diagonal_in_pieces_and_by_step() -> None:
    a, v, u = inside(3, 4), torch.complex(normal(3, 4), normal(3, 4, seed=3)), normal(2, 3, 30)
    y, last = conv.diagonal(u, a, v, chunk=8)
    outs, state = [], None
    for piece in (u[..., :11], u[..., 11:12], u[..., 12:]):
        out, state = conv.diagonal(piece, a, v, state, chunk=8)
        outs.append(out)
    assert_close((torch.cat(outs, -1), state), (y, last))
    outs, state = [], None
    for t in range(30):
        out, state = conv.diagonal_step(u[..., t], a, v, state)
        outs.append(out)
    assert_close((torch.stack(outs, -1), state), (y, last))
    empty, same = conv.diagonal(u[..., :0], a, v, last)
    assert empty.shape == (2, 3, 0)
    assert_close(same, last)


def test_diagonal_in_half_precision_computes_in_single() -> None:
    a, v, u = inside(3, 4), torch.complex(normal(3, 4), normal(3, 4, seed=3)), normal(2, 3, 100)
    exact, _ = conv.diagonal(u.bfloat16().double(), a, v)
    y, last = conv.diagonal(u.bfloat16(), a, v)
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert_close(y, exact.bfloat16(), rtol=8e-3, atol=1e-4)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 100])
def test_vandermonde_kernel_is_a_sum_of_powers(length: int) -> None:
    a, v = inside(2, 3), torch.complex(normal(2, 3), normal(2, 3, seed=3))
    powers = a[:, None] ** torch.arange(length)[None, :, None]
    expected = 2 * (v[:, None] * powers).sum(-1).real
    assert_close(conv.diagonal_kernel(a, v, length, torch.float64), expected)


@pytest.mark.parametrize(("length", "taps"), [(1, 1), (33, 33), (40, 7), (5, 20)])
def test_convolve_is_scipys(length: int, taps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "BLOCK", 100)
    u, kernel = normal(2, 3, length), normal(3, taps, seed=1)
    expected = signal.fftconvolve(u.numpy(), kernel.numpy()[None], axes=-1)
    for origin in {0, taps // 2, taps - 1}:
        at = np.zeros((2, 3, length))
        part = expected[..., origin : origin + length]
        at[..., : part.shape[-1]] = part
        assert_close(conv.convolve(u, kernel, origin=origin), torch.from_numpy(at))


def test_convolve_passes_gradcheck() -> None:
    u, kernel = normal(2, 2, 6).requires_grad_(), normal(2, 11, seed=1).requires_grad_()
    for origin in (0, 5):
        assert torch.autograd.gradcheck(
            lambda u, k, origin=origin: conv.convolve(u, k, origin=origin), (u, kernel)
        )


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
def test_discretise_is_scipys(method: Any) -> None:
    eigenvalues, b = (
        torch.tensor([[-0.5 + 3j]], dtype=torch.complex128),
        torch.tensor([[2 - 1j]]).to(torch.complex128),
    )
    a, bar = conv.discretise(eigenvalues, b, torch.tensor([0.05]).double(), method)
    turn = np.array([[-0.5, -3.0], [3.0, -0.5]])
    real = (turn, np.array([[2.0], [-1.0]]), np.eye(2), np.zeros((2, 1)))
    want = signal.cont2discrete(real, 0.05, method)
    assert_close(torch.view_as_real(a[0, 0]), torch.from_numpy(want[0][:, 0]))
    assert_close(torch.view_as_real(bar[0, 0]), torch.from_numpy(want[1][:, 0]))


@pytest.mark.parametrize("measure", MEASURES)
def test_normal_plus_low_rank_reproduces_hippo(measure: Any) -> None:
    size = 64
    eigenvalues, p, b, v = conv.normal_plus_low_rank(measure, size)
    a, input = conv.hippo(measure, size)
    core = torch.diag(whole(eigenvalues)) - whole(p).mT @ whole(p).conj()
    assert p.shape[0] == (2 if measure == "legt" else 1)
    near: Any = {"rtol": 0.0, "atol": 1e-10}
    assert_close(v @ core @ v.mH, a + 0j, **near)
    assert_close(v.mH @ v, torch.eye(size, dtype=v.dtype), **near)
    assert_close(v @ whole(b), input + 0j, **near)
    assert_close(eigenvalues.real, torch.full((32,), -0.5 if measure == "legs" else 0.0).double())


def test_hippo_entries() -> None:
    """The matrices as the HiPPO paper prints them (App. D)."""
    for n in range(5):
        for k in range(5):
            root = ((2 * n + 1) * (2 * k + 1)) ** 0.5
            legs = -root if n > k else -(n + 1) if n == k else 0
            legt = -root * (1 if n >= k else (-1) ** (n - k))
            lagt = -1 if n > k else -0.5 if n == k else 0
            for measure, entry in zip(MEASURES, (legs, legt, lagt), strict=True):
                assert conv.hippo(measure, 5)[0][n, k].item() == pytest.approx(entry)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("length", [1, 2, 33, 128])
def test_low_rank_kernel_is_the_powers_of_hippo(measure: Any, length: int) -> None:
    """C A_d^l B_d of the dense real system, discretised by SciPy."""
    size, sampled = 64, system(measure, 64)
    c = torch.complex(normal(2, 32), normal(2, 32, seed=1))
    transition, _ = conv.dense(sampled)
    truncated = conv.truncated(c, transition, length)
    taps = conv.low_rank_kernel(sampled, truncated, length, torch.float64)
    a, b = conv.hippo(measure, size)
    v = conv.normal_plus_low_rank(measure, size)[3]
    for feature in range(2):
        row = (whole(c[feature]) @ v.mH).real[None]
        step = sampled.step[feature].item()
        real = (a.numpy(), b[:, None].numpy(), row.numpy(), np.zeros((1, 1)))
        # SciPy's own C is for another state (half a step on); the taps want the continuous one.
        ad, bd, *_ = signal.cont2discrete(real, step, "bilinear")
        want = [(row.numpy() @ np.linalg.matrix_power(ad, n) @ bd).item() for n in range(length)]
        want = torch.tensor(want, dtype=torch.float64)
        assert_close(taps[feature], want, rtol=1e-9, atol=1e-10 * want.abs().max().item())
    single = conv.low_rank_kernel(sampled, truncated, length, torch.float32)
    assert_close(single.double(), taps, rtol=0, atol=2e-5 * taps.abs().max().item())


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_low_rank_kernel_of_any_rank_and_its_gradient(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "BLOCK", 20)
    leaves = [normal(2, 4, 2, seed=s) for s in range(3)] + [normal(2, rank, 4, 2, seed=3)]
    leaves = [t.requires_grad_() for t in (*leaves, normal(2, seed=4))]

    def parts(frequencies: Tensor, b: Tensor, c: Tensor, p: Tensor, step: Tensor) -> Any:
        eigenvalues = torch.complex(-frequencies[..., 0].exp(), 5 * frequencies[..., 1])
        p_, b_, c_ = (torch.view_as_complex(t) for t in (p, b, c))
        return conv.LowRank(eigenvalues, p_, b_, step.exp() / 10), c_

    sampled, c = parts(*leaves)
    transition, input = conv.dense(sampled)
    rows = conv.krylov(transition, input, 12)
    want = (rows * conv.readout(c)[:, None]).sum(-1)
    got = conv.low_rank_kernel(sampled, conv.truncated(c, transition, 12), 12, torch.float64)
    assert_close(got, want)
    cotangent = normal(2, 12, seed=9)
    assert_close(
        torch.autograd.grad(got, leaves, cotangent, retain_graph=True),
        torch.autograd.grad(want, leaves, cotangent),
    )


def test_without_its_low_rank_part_the_kernel_is_the_diagonal_one() -> None:
    sampled = system("legs", 16)
    sampled = sampled._replace(p=torch.zeros_like(sampled.p))
    c = torch.complex(normal(2, 8), normal(2, 8, seed=1))
    a, b = conv.discretise(sampled.eigenvalues, sampled.b, sampled.step, "bilinear")
    truncated = c * (1 - a**50)
    assert_close(truncated, conv.truncated(c, conv.dense(sampled)[0], 50))
    assert_close(
        conv.low_rank_kernel(sampled, truncated, 50, torch.float64),
        conv.diagonal_kernel(a, c * b, 50, torch.float64),
    )


def test_truncation_doubles_and_undoes() -> None:
    sampled, c = system("legt", 8), torch.complex(normal(2, 4), normal(2, 4, seed=1))
    transition, _ = conv.dense(sampled)
    short = conv.truncated(c, transition, 10)
    assert_close(conv.untruncated(short, transition, 10), c)
    assert_close(conv.doubled(short, transition, 10), conv.truncated(c, transition, 20))


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("length", [1, 5, 8, 21])
def test_low_rank_step_dense_state_and_response_agree(measure: Any, length: int) -> None:
    sampled, c = system(measure, 8), torch.complex(normal(2, 4), normal(2, 4, seed=1))
    u, state = normal(3, 2, length), normal(3, 2, 4, 2, seed=2)
    outs, x = [], state
    for t in range(length):
        out, x = conv.low_rank_step(u[..., t], sampled, c, x)
        outs.append(out)
    transition, input = conv.dense(sampled)
    last = conv.dense_state(u, transition, input, state.flatten(2), chunk=8)
    assert_close(last.unflatten(2, (4, 2)), x)
    taps = (conv.krylov(transition, input, length) * conv.readout(c)[:, None]).sum(-1)
    carried = conv.dense_response(state.flatten(2), transition, conv.readout(c), length, chunk=8)
    assert_close(conv.convolve(u, taps) + carried, torch.stack(outs, -1))
