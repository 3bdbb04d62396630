"""ProbSparse attention against transformers' Informer, brute-force ranks, and its edges."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import InformerConfig
from transformers.models.informer.modeling_informer import InformerProbSparseAttention

from longspan import LongspanError, build
from longspan.nn import MultiHead


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(length: int, keys: int | None = None) -> Any:
    sizes = enumerate((length, keys or length, keys or length))
    return [normal(2, 2, n, 8, seed=s).requires_grad_() for s, n in sizes]


def prob(**options) -> Any:
    return build("informer", **options).eval()


def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf).double().triu(1)
    return scores.softmax(-1) @ v


def test_with_all_queries_chosen_it_is_transformers_prob_sparse() -> None:
    config = InformerConfig(prediction_length=4, d_model=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = InformerProbSparseAttention(16, 2, sampling_factor=50).double().eval()
        ours: Any = MultiHead(prob(factor=50), width=16, heads=2).double().eval()
    assert config.attention_type == "prob"
    pairs = zip("qkv", (theirs.q_proj, theirs.k_proj, theirs.v_proj), strict=True)
    for name, linear in pairs:
        ours.project[name].load_state_dict(linear.state_dict())
    ours.output.load_state_dict(theirs.out_proj.state_dict())
    x = normal(2, 20, 16).requires_grad_()
    with torch.random.fork_rng():
        want = theirs(x)[0]
    got = ours(x)[0]
    assert_close(got, want)
    toward = normal(2, 20, 16, seed=2)
    assert_close(*(torch.autograd.grad(o, x, toward)[0] for o in (got, want)))


@pytest.mark.parametrize("causal", [False, True])
def test_all_chosen_is_dense_and_none_chosen_is_lazy(causal: bool) -> None:
    q, k, v = qkv(30)
    assert_close(prob(factor=100, causal=causal)(q, k, v)[0], dense(q, k, v, causal))
    total = v.cumsum(2) if causal else v.mean(2, keepdim=True).expand_as(v)
    assert_close(prob(factor=0, causal=causal)(q, k, v)[0], total)
    if causal:
        want = total / torch.arange(1, 31)[:, None]
        assert_close(prob(factor=0, causal=True, mean=True)(q, k, v)[0], want)


@pytest.mark.parametrize("causal", [False, True])
def test_exact_measures_choose_the_brute_force_ranks(causal: bool) -> None:
    q, k, v = qkv(60)
    scores = q @ k.mT
    rank = scores.amax(-1) - scores.mean(-1)
    u = 2 * math.ceil(math.log(60))
    active = rank >= rank.topk(u).values[..., -1:]
    lazy = v.cumsum(2) if causal else v.mean(2, keepdim=True)
    want = torch.where(active[..., None], dense(q, k, v, causal), lazy)
    assert_close(prob(factor=2, exact=True, causal=causal)(q, k, v)[0], want)


@pytest.mark.parametrize("shared", [False, True])
def test_samples_choose_mostly_what_the_exact_measure_does(shared: bool) -> None:
    q, k, v = (3 * t for t in qkv(400))
    lazy = v.mean(2, keepdim=True)

    def active(**options) -> Tensor:
        return (prob(**options)(q, k, v)[0] - lazy).abs().amax(-1) > 1e-12

    exact = active(factor=5, exact=True)
    sampled = active(factor=5, shared=shared)
    assert exact.sum() == sampled.sum() == 4 * 30
    assert (exact & sampled).sum() / exact.sum() > 3 * 30 / 400


def test_the_sample_follows_the_seed_and_is_fresh_in_training() -> None:
    q, k, v = qkv(200)
    op = prob(seed=1)
    assert torch.equal(op(q, k, v)[0], prob(seed=1)(q, k, v)[0])
    assert not torch.equal(op(q, k, v)[0], prob(seed=2)(q, k, v)[0])
    with torch.random.fork_rng():
        op.train()
        assert not torch.equal(op(q, k, v)[0], op(q, k, v)[0])


@pytest.mark.parametrize("length", [1, 2, 3, 10])
@pytest.mark.parametrize("factor", [1, 5, 100])
def test_short_sequences_clip_both_counts(length: int, factor: int) -> None:
    q, k, v = qkv(length, 7)
    assert prob(factor=factor)(q, k, v)[0].isfinite().all()
    if factor * max(1, math.ceil(math.log(length))) >= length:
        assert_close(prob(factor=factor)(q, k, v)[0], dense(q, k, v))


def test_what_cannot_be_built_or_fed_is_refused() -> None:
    with pytest.raises(LongspanError, match="factor=-1"):
        prob(factor=-1)
    with pytest.raises(LongspanError, match="give as many"):
        prob(causal=True)(*qkv(3, 5))
