"""Efficient attention: both normalisations, two-dimensional maps, masks, the causal averages."""

from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.engines import lowrank
from longspan.mechanisms.kernel.efficient_attention import EfficientAttention2d
from longspan.registry import build
from longspan.testing.oracles import oracle_of


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def example(queries: int, keys: int, value: int = 6) -> list[Tensor]:
    return [
        normal(2, 3, *size, seed=i).requires_grad_()
        for i, size in enumerate(((queries, 4), (keys, 4), (keys, value)))
    ]


def kept(keys: int) -> Tensor:
    return torch.rand(2, keys, generator=torch.Generator().manual_seed(3)) > 0.4


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalisation", ["softmax", "scaling"])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (70, 70), (5, 70)])
def test_is_the_formula(
    queries: int, keys: int, normalisation: Any, causal: bool, masked: bool
) -> None:
    op = build("efficient-attention", normalisation=normalisation, causal=causal)
    inputs, keep = example(queries, keys), kept(keys) if masked else None
    oracle: Any = oracle_of("efficient-attention")
    got, want = op(*inputs, keep=keep)[0], oracle(op, *inputs, keep=keep)
    assert_close(got, want, rtol=1e-12, atol=1e-12)
    toward = normal(*want.shape, seed=9)
    assert_close(*(torch.autograd.grad(t, inputs, toward) for t in (got, want)))


def test_rows_of_the_weights_sum_to_one() -> None:
    q, k, v = example(9, 21)
    for causal in (False, True):
        o, _ = build("efficient-attention", causal=causal)(q, k, torch.ones_like(v))
        assert_close(o, torch.ones_like(o))


def test_scaling_is_the_plain_product_over_n() -> None:
    q, k, v = example(9, 21)
    o, _ = build("efficient-attention", normalisation="scaling")(q, k, v)
    assert_close(o, q @ k.mT @ v / 21)


@pytest.mark.parametrize("normalisation", ["softmax", "scaling"])
def test_causal_is_bidirectional_on_every_prefix(normalisation: Any) -> None:
    q, k, v = example(40, 40)
    whole, last = build("efficient-attention", causal=True, normalisation=normalisation)(q, k, v)
    both = build("efficient-attention", normalisation=normalisation)
    step, state = build("efficient-attention", causal=True, normalisation=normalisation), None
    for t in range(40):
        prefix = both(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])[0]
        assert_close(whole[:, :, t : t + 1], prefix)
        o, state = step(*(x[:, :, t : t + 1] for x in (q, k, v)), state)
        assert_close(o, prefix)
    if normalisation == "softmax":
        assert isinstance(last, lowrank.Slots)
        assert isinstance(state, lowrank.Slots)
        assert_close(state.sums[0] / state.weight[..., None], last.sums[0] / last.weight[..., None])


def test_causal_averages_survive_any_exponents() -> None:
    """Exponents that rise and fall by hundreds within a block, in float32."""
    write = normal(1, 1, 200, 5).float() * 300
    v, r = normal(1, 1, 200, 3, seed=1).float(), torch.eye(5).expand(1, 1, 5, 5)
    for m in range(5):
        o, _ = lowrank.read(r[:, :, m : m + 1].expand(-1, -1, 200, -1), write, v)
        want = [
            write[0, 0, : t + 1, m].double().softmax(0) @ v[0, 0, : t + 1].double()
            for t in range(200)
        ]
        assert_close(o[0, 0].double(), torch.stack(want), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalisation", ["softmax", "scaling"])
def test_feature_maps(normalisation: Any) -> None:
    layer = EfficientAttention2d(width=8, heads=2, normalisation=normalisation).double()
    x = normal(2, 8, 5, 7).requires_grad_()
    y = layer(x)
    tokens, mixer = x.flatten(2).mT, layer.mixer
    q, k, v = (mixer.project[n](tokens).unflatten(-1, (2, 2)).transpose(1, 2) for n in "qkv")
    weights = q @ k.mT / 35
    if normalisation == "softmax":
        weights = q.softmax(-1) @ k.softmax(-2).mT
    o = mixer.output((weights @ v).transpose(1, 2).flatten(2))
    assert_close(y, x + o.mT.view_as(x))
    y.sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    with pytest.raises(LongspanError, match="divide"):
        EfficientAttention2d(width=8, heads=3)


def test_refusals() -> None:
    with pytest.raises((LongspanError, TypeCheckError), match="normalisation"):
        build("efficient-attention", normalisation="layer")
