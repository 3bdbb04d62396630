"""Kernelized attention with relative biases: SciPy's Toeplitz products, limits, grids, switches."""

from typing import Any

import pytest
import scipy
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from longspan import LongspanError
from longspan.engines import conv
from longspan.engines.conv import shapes
from longspan.registry import build
from longspan.testing import oracle_of

linalg: Any = scipy.linalg
FORMS = pytest.mark.parametrize("causal", [True, False])


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def attention(*, bias: Tensor | None = None, **arguments: Any) -> Any:
    sizes = {"heads": 2, "head_width": 4, "length": 60, "directions": 6}
    built = build("kernelized-attention-rpe", **(sizes | arguments)).double()
    if built.bias is not None:
        with torch.no_grad():
            # Asymmetric: a flipped index would show.
            built.bias.copy_(normal(*built.bias.shape, seed=9) if bias is None else bias)
    return built


def inputs(length: int, keys: int | None = None, heads: int = 2) -> tuple[Tensor, ...]:
    sizes = (length, keys or length, keys or length)
    return tuple(normal(2, heads, n, 4, seed=s) for s, n in enumerate(sizes))


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (40, 40), (9, 33), (70, 70)])
@pytest.mark.parametrize("base", [0, 40, 10**9])
@FORMS
def test_engine_is_the_matrix(queries: int, keys: int, base: int, causal: bool) -> None:
    q, k = normal(2, 3, queries, 4), normal(2, 3, keys, 4, seed=1)
    v, lags = normal(2, 3, keys, 5, seed=2), normal(3, queries + keys - 1, seed=3)
    leaves = [t.requires_grad_() for t in (q, k, v, lags)]
    at = torch.arange(queries)[:, None] - torch.arange(keys)
    weights = lags[:, at + keys - 1]
    if causal:
        weights = weights.masked_fill(at + keys - queries < 0, 0)
    want = (q @ k.mT * weights) @ v
    got = conv.toeplitz(q, k, v, lags, causal=causal, base=base)
    assert_close(got, want)
    cotangent = normal(*want.shape, seed=4)
    assert_close(
        torch.autograd.grad(got, leaves, cotangent), torch.autograd.grad(want, leaves, cotangent)
    )


@pytest.mark.parametrize("base", [0, 10**9])
def test_engine_is_scipys_matmul_toeplitz(base: int) -> None:
    lags, v, ones = normal(1, 59), normal(1, 1, 30, 3, seed=1), torch.ones(1, 1, 30, 1).double()
    column, row = lags[0, 29:].numpy(), lags[0, :30].flip(0).numpy()
    want = linalg.matmul_toeplitz((column, row), v[0, 0].numpy())
    got = conv.toeplitz(ones, ones, v, lags, causal=False, base=base)
    assert_close(got[0, 0], torch.from_numpy(want))


def test_engine_in_small_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(50)
    lags = normal(2, 99, seed=5)
    whole = conv.toeplitz(q, k, v, lags, causal=False, base=0)
    monkeypatch.setattr(shapes, "BLOCK", 128 * 3)  # not all value channels at once
    assert_close(conv.toeplitz(q, k, v, lags, causal=False, base=0), whole)


@FORMS
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("features", ["prf", "trf", "elu", "relu"])
def test_every_combination_equals_the_formula(
    causal: bool, normalise: bool, relative: bool, features: Any
) -> None:
    """Both paths, and fewer tokens than were built for."""
    formula: Any = oracle_of("kernelized-attention-rpe")
    switches = {"normalise": normalise, "relative": relative, "features": features}
    q, k, v = inputs(41)
    for path in ("fft", "dense", "auto"):
        attend = attention(causal=causal, path=path, **switches)
        want = formula(attend, q, k, v, keep=None)
        assert_close(attend(q, k, v)[0], want, rtol=1e-6, atol=1e-7)
    if not causal:
        attend, (q, k, v) = attention(**switches), inputs(9, 33)
        assert_close(attend(q, k, v)[0], formula(attend, q, k, v, keep=None))


@FORMS
def test_without_bias_it_is_linear_attention(causal: bool) -> None:
    """b starts at 0, where it is plain linear attention with the same features."""
    zero = build(
        "kernelized-attention-rpe",
        heads=2,
        head_width=4,
        length=60,
        features="elu",
        normalise=False,
        causal=causal,
    ).double()
    assert not zero.bias.any()
    linear = build("linear-transformer", causal=causal, eps=0.0)
    q, k, v = inputs(33)
    scale = 4**-0.25
    assert_close(zero(q, k, v)[0], linear(q * scale, k * scale, v)[0])


@pytest.mark.parametrize("path", ["fft", "dense"])
def test_a_steep_bias_leaves_the_token_itself(path: Any) -> None:
    bias = -40.0 * (torch.arange(119) - 59).abs().expand(2, -1)
    q, k, v = inputs(50)
    assert_close(attention(bias=bias, path=path)(q, k, v)[0], v, rtol=1e-8, atol=1e-8)


def test_biases_cannot_overflow() -> None:
    q, k, v = inputs(50)
    low, high = (attention(bias=normal(2, 119, seed=9) + shift) for shift in (0, 5000))
    assert_close(high(q, k, v)[0], low(q, k, v)[0])


@FORMS
def test_many_normalised_features_are_softmax_of_unit_vectors(causal: bool) -> None:
    q, k, v = inputs(20)
    attend = attention(causal=causal, directions=20000)
    scores = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT
    distance = torch.arange(20) - torch.arange(20)[:, None]
    scores = scores + attend.bias[:, 59 + distance]
    scores = scores.masked_fill(distance > 0, -torch.inf) if causal else scores
    assert_close(attend(q, k, v)[0], scores.softmax(-1) @ v, rtol=0, atol=0.03)


@FORMS
@pytest.mark.parametrize("path", ["fft", "dense"])
def test_a_grid_is_biased_by_rows_and_columns(causal: bool, path: Any) -> None:
    rows, columns = 5, 7
    attend = attention(grid=(rows, columns), causal=causal, path=path, features="elu")
    assert attend.bias.shape == (2, (2 * rows - 1) * (2 * columns - 1))
    table = attend.bias.unflatten(1, (2 * rows - 1, 2 * columns - 1))
    for length in (35, 16):  # a picture, and the first rows of one
        q, k, v = inputs(length)
        y, x = torch.arange(length) // columns, torch.arange(length) % columns
        b = table[:, y - y[:, None] + rows - 1, x - x[:, None] + columns - 1]
        phi = [
            torch.nn.functional.elu(torch.nn.functional.normalize(t, dim=-1)) + 1 for t in (q, k)
        ]
        weights = phi[0] @ phi[1].mT * b.exp()
        weights = weights.tril() if causal else weights
        assert_close(attend(q, k, v)[0], weights / weights.sum(-1, keepdim=True) @ v)


@FORMS
def test_memory_is_bounded(causal: bool) -> None:
    """No temporary of tokens × features × values: 20 MiB here."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.numel() and 0 not in out.stride():
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    attend = build(
        "kernelized-attention-rpe",
        heads=1,
        head_width=32,
        length=2500,
        causal=causal,
        directions=64,
        path="fft",
    )
    q, k, v = (torch.randn(1, 1, 2500, 32, requires_grad=True) for _ in range(3))
    with Watch():
        attend(q, k, v)[0].sum().backward()
    assert largest <= 10 * 2**20


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(LongspanError, match="at most 60"):
        attention()(*inputs(61))
    with pytest.raises(LongspanError, match="2 heads"):
        attention()(*inputs(10, heads=3))
    with pytest.raises(LongspanError, match="causal grid"):
        attention(grid=(5, 7), causal=True)(*inputs(7, 14))
    with pytest.raises(LongspanError, match="no state"):
        attention(causal=True)(*inputs(4), torch.zeros(2, 1))
