"""cosFormer: its limits, its places, and the fixed length that decoding needs."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from longspan.errors import LongspanError
from longspan.registry import build


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(queries: int, keys: int) -> list[Tensor]:
    return [normal(2, 3, n, 8, seed=i) for i, n in enumerate((queries, keys, keys))]


def ratio(weights: Tensor, v: Tensor) -> Tensor:
    return weights @ v / weights.sum(-1, keepdim=True).clamp(min=1e-6)


@pytest.mark.parametrize("activation", [F.relu, lambda x: F.elu(x) + 1])
@pytest.mark.parametrize(
    ("queries", "keys", "causal"), [(9, 9, 0), (9, 9, 1), (5, 12, 0), (12, 5, 0)]
)
def test_by_default_the_longer_side_is_the_length(
    queries: int, keys: int, causal: int, activation: Any
) -> None:
    q, k, v = qkv(queries, keys)
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    cosine = (distance.double() * (math.pi / 2 / max(queries, keys))).cos()
    weights = activation(q) @ activation(k).mT * cosine
    weights = weights.tril() if causal else weights
    op = build("cosformer", causal=bool(causal), activation=activation)
    assert_close(op(q, k, v)[0], ratio(weights, v))
    assert (cosine > 0).all()


def test_a_long_length_is_relu_attention() -> None:
    q, k, v = qkv(30, 30)
    want = ratio(q.relu() @ k.relu().mT, v)
    assert_close(build("cosformer", reweigh=False)(q, k, v)[0], want)
    assert_close(build("cosformer", length=10**7)(q, k, v)[0], want)
    q, k, v = qkv(30, 30)
    off = build("cosformer", causal=True, reweigh=False)
    o, state = off(q[:, :, :20], k[:, :, :20], v[:, :, :20])
    rest, _ = off(q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], state)
    assert_close(torch.cat([o, rest], 2), off(q, k, v)[0])


def test_queries_that_relu_kills_give_zero() -> None:
    q, k, v = qkv(9, 9)
    q[:, :, 3] = -1.0
    q.requires_grad_()
    o, _ = build("cosformer")(q, k, v)
    assert not o[:, :, 3].any()
    assert torch.autograd.grad(o.sum(), q)[0].isfinite().all()


def test_the_length_is_fixed_for_decoding() -> None:
    q, k, v = qkv(9, 9)
    free = build("cosformer", causal=True)
    _, state = free(q, k, v)
    with pytest.raises(LongspanError, match="length="):
        free(q, k, v, state)
    fixed = build("cosformer", causal=True, length=16)
    _, state = fixed(q, k, v)
    with pytest.raises(LongspanError, match="at most 16 tokens and got 18"):
        fixed(q, k, v, state)
