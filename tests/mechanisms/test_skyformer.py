"""Skyformer: the kernel, the sampled landmarks, the inverse."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.registry import build
from longspan.testing.oracles import oracle_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def example(queries: int, keys: int, width: int = 8) -> list[Tensor]:
    return [normal(2, 3, n, width, seed=i) for i, n in enumerate((queries, keys, keys))]


def kernel(q: Tensor, k: Tensor) -> Tensor:
    """The two-sided normalisation D_Q^(−1/2) exp(Q Kᵀ / √D) D_K^(−1/2)."""
    root = q.shape[-1] ** 0.5
    sides = [(t.square().sum(-1) / root).exp().rsqrt() for t in (q, k)]
    return sides[0][..., None] * (q @ k.mT / root).exp() * sides[1][..., None, :]


def sky(**arguments: Any) -> Any:
    return build("skyformer", **arguments)


@pytest.mark.parametrize("width", [4, 8])
def test_kernelized_attention_is_the_two_sided_normalisation(width: int) -> None:
    """No row normalisation, and the scale of the head's own width."""
    q, k, v = example(9, 21, width)
    c = kernel(q, k)
    assert ((c > 0) & (c <= 1)).all()
    assert_close(sky(landmarks=None)(q, k, v)[0], c @ v)
    assert not torch.allclose(c.sum(-1), torch.ones(9, dtype=c.dtype))
    keep = torch.rand(2, 21, generator=torch.Generator().manual_seed(3)) > 0.4
    masked = k.masked_fill(~keep[:, None, :, None], torch.nan)
    assert_close(sky(landmarks=None)(q, masked, v, keep=keep)[0], (c * keep[:, None, None]) @ v)


@pytest.mark.parametrize("options", [{"steps": None}, {"accumulation": 3}, {"ridge": 0.5}])
@pytest.mark.parametrize(("queries", "keys"), [(33, 33), (9, 21)])
def test_is_the_formula(queries: int, keys: int, options: Any) -> None:
    op, oracle = sky(landmarks=8, **options), oracle_of("skyformer")
    assert oracle is not None
    keep = torch.rand(2, keys, generator=torch.Generator().manual_seed(3)) > 0.4
    q, k, v = (t.requires_grad_() for t in example(queries, keys))
    got, want = op(q, k, v, keep=keep)[0], oracle(op, q, k, v, keep=keep)
    if queries == keys:
        got, want = (t * keep[:, None, :, None] for t in (got, want))
    assert_close(got, want)
    toward = normal(*want.shape, seed=9)
    assert_close(*(torch.autograd.grad(t, (q, k, v), toward) for t in (got, want)))


def test_all_rows_without_a_ridge_are_exact() -> None:
    q, k, v = example(6, 6)
    op = sky(landmarks=12, ridge=0.0, steps=None)
    every = (torch.arange(6) * (1 << 31)) // 6 + 1
    op.draws.copy_(every.expand(2, 1, 6))
    assert_close(op(q, k, v)[0], kernel(q, k) @ v)


def test_error_falls_with_landmarks() -> None:
    q, k, _ = example(64, 64)
    eye = torch.eye(64, dtype=q.dtype).expand(2, 3, -1, -1)
    errors = [
        torch.stack(
            [
                torch.linalg.matrix_norm(
                    sky(landmarks=m, ridge=1e-6, steps=None, seed=s)(q, k, eye)[0] - kernel(q, k), 2
                )
                for s in range(3)
            ]
        )
        .mean()
        .item()
        for m in (8, 32, 128)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_iteration_agrees_with_the_inverse() -> None:
    q, k, v = example(64, 64)
    errors = [
        (sky(landmarks=16, steps=n)(q, k, v)[0] - sky(landmarks=16, steps=None)(q, k, v)[0])
        .abs()
        .max()
        .item()
        for n in (2, 4, 6, 12)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[3] < 1e-10


def test_landmarks_are_seeded_and_redrawn_on_request() -> None:
    q, k, v = example(40, 40)
    op, same, other = sky(landmarks=8), sky(landmarks=8), sky(landmarks=8, seed=1)
    assert_close(op(q, k, v)[0], same(q, k, v)[0])
    assert not torch.allclose(op(q, k, v)[0], other(q, k, v)[0])
    op.redraw(torch.Generator().manual_seed(1))
    assert_close(op(q, k, v)[0], other(q, k, v)[0])


def test_only_kept_rows_are_sampled() -> None:
    q, k, v = example(40, 40)
    keep = torch.zeros(2, 40, dtype=torch.bool)
    keep[:, 7:20] = True
    q, k, v = (t.masked_fill(~keep[:, None, :, None], 1e3) for t in (q, k, v))
    alone = sky(landmarks=8)(*(t[:, :, 7:20] for t in (q, k, v)))[0]
    assert_close(sky(landmarks=8)(q, k, v, keep=keep)[0][:, :, 7:20], alone)


def test_refusals() -> None:
    for wrong in ({"landmarks": 7}, {"landmarks": 0}, {"ridge": -1.0}, {"steps": 0},
                  {"accumulation": 0}, {"causal": True}):  # fmt: skip
        with pytest.raises(LongspanError):
            sky(**wrong)
