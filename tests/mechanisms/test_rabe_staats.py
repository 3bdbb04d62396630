"""Rabe and Staats: chunks of any size, memory by the square root, dropout, biases."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close

from longspan.errors import LongspanError
from longspan.registry import build
from longspan.testing.counting import held


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def example(queries: int, keys: int, value: int = 8) -> list[Tensor]:
    shapes = (2, 3, queries, 8), (2, 3, keys, 8), (2, 3, keys, value)
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def rabe(**arguments: Any) -> Any:
    return build("rabe-staats", **arguments)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunks", [(1, 1), (3, 7), (8, 8), (8, None), (1024, 4096)])
def test_equals_sdpa_in_values_and_gradients(chunks: Any, causal: bool) -> None:
    """Chunks of 1, that divide no length, of √S keys and longer than all; the math backend."""
    q, k, v = example(37, 37, 5)
    got, _ = rabe(causal=causal, query_chunk=chunks[0], key_chunk=chunks[1])(q, k, v)
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert_close(got, want)
    toward = normal(*want.shape, seed=9)
    assert_close(*(torch.autograd.grad(t, (q, k, v), toward) for t in (got, want)))


def test_mask_bias_cross_and_scale() -> None:
    """Masked keys may hold NaN; a bias is computed chunk by chunk and learns."""
    q, k, v = example(9, 21, 5)
    slope = normal(3, seed=5).requires_grad_()

    def bias(q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return slope[:, None, None] * (i[:, None] - j).abs()

    keep = torch.rand(2, 21, generator=torch.Generator().manual_seed(3)) > 0.4
    masked = k.masked_fill(~keep[:, None, :, None], torch.nan)
    got, _ = rabe(query_chunk=4, key_chunk=5, scale=0.7)(q, masked, v, keep=keep, bias=bias)
    added = bias(q, k, torch.arange(12, 21), torch.arange(21)).masked_fill(
        ~keep[:, None, None], -torch.inf
    )
    with sdpa_kernel(SDPBackend.MATH):
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=added, scale=0.7)
    assert_close(got, want)
    toward = normal(*want.shape, seed=9)
    wrt = (q, k, v, slope)
    assert_close(*(torch.autograd.grad(t, wrt, toward) for t in (got, want)))


def test_dropout_is_replayed_and_knows_no_chunks() -> None:
    """The same generator gives the same weights whatever the chunks, and in the backward pass."""
    q, k, v = example(11, 11)
    found = []
    for chunks in ((4, 5), (64, 64)):
        generator = torch.Generator().manual_seed(1)
        op = rabe(
            query_chunk=chunks[0], key_chunk=chunks[1], dropout=0.3, generator=generator
        ).train()
        o, _ = op(q, k, v)
        found.append((o, *torch.autograd.grad(o.sum(), (q, k, v))))
        again, _ = op(q, k, v)
        assert not torch.allclose(again, o)
        assert_close(op.eval()(q, k, v)[0], rabe()(q, k, v)[0])
    assert_close(*found)
    # o is linear in v: its gradient toward v gives o back only if the weights are the same.
    assert_close((found[0][3] * v).sum(), found[0][0].sum())


def _held(id: str, **options: Any) -> int:
    op = build(id, **options)
    q, k, v = (torch.randn(1, 1, 2048, 16).requires_grad_() for _ in range(3))
    return held(lambda: op(q, k, v)[0].sum().backward())


def test_peak_memory_is_a_fraction_of_the_matrix() -> None:
    """Forward and backward: 2048² weights of 4 bytes take 16 MiB, a few at a time."""
    explicit = _held("multi-head-attention", backend="explicit")
    assert explicit > 2 * 2**24
    assert _held("rabe-staats", query_chunk=128, key_chunk=128) < explicit / 8


@pytest.mark.parametrize(
    "options", [{"query_chunk": 0}, {"key_chunk": 0}, {"dropout": 1.0}, {"dropout": -0.5}]
)
def test_impossible_arguments_are_refused(options: Any) -> None:
    with pytest.raises(LongspanError, match="rabe-staats"):
        rabe(**options)
