"""Sinkhorn attention: the balancing, hard permutations, sorting nets, SortCut and mixture."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError, build
from longspan.engines import bucket


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(length: int, keys: int | None = None) -> Any:
    sizes = enumerate((length, keys or length, keys or length))
    return [normal(2, 2, n, 8, seed=s).requires_grad_() for s, n in sizes]


def attention(**options) -> Any:
    sizes = {"heads": 2, "head_width": 8, "length": 64, "block": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build("sinkhorn-attention", **(sizes | options)).double().eval()


def dense(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def test_rows_and_columns_sum_to_one() -> None:
    mix = bucket.sinkhorn(normal(3, 9, 9), iterations=100)
    assert_close(mix.sum(-1), torch.ones(3, 9).double())
    assert_close(mix.sum(-2), torch.ones(3, 9).double(), atol=1e-3, rtol=0)
    few = bucket.sinkhorn(normal(3, 9, 9), iterations=2)
    assert_close(few.sum(-1), torch.ones(3, 9).double())


def test_at_low_temperature_it_is_the_best_assignment() -> None:
    """The permutation of the largest trace, found by trying all of 5!."""
    scores = normal(6, 5, 5)
    mix = bucket.sinkhorn(scores / 0.002, iterations=3000)
    for matrix, found in zip(scores, mix, strict=True):
        best = max(
            itertools.permutations(range(5)),
            key=lambda p: sum(matrix[i, j].item() for i, j in enumerate(p)),
        )
        assert found.argmax(-1).tolist() == list(best)
        assert found.amax(-1).min() > 0.9


def test_masks_and_gradients_of_the_balancing() -> None:
    scores = normal(6, 6).requires_grad_()
    allowed = torch.ones(6, 6, dtype=torch.bool).tril(-1)
    for causal in (False, True):
        mix = bucket.sinkhorn(scores, allowed, iterations=5, causal=causal)
        assert not mix[~allowed].any()
        assert_close(mix.sum(-1), torch.tensor([0.0, 1, 1, 1, 1, 1]).double())

        def run(s: Tensor, causal: bool = causal) -> Tensor:
            return bucket.sinkhorn(s, allowed, iterations=5, causal=causal)

        assert torch.autograd.gradcheck(run, (scores,))
    for row in range(6):
        mix = bucket.sinkhorn(scores, allowed, iterations=5, causal=True)
        grad = torch.autograd.grad(mix[row].square().sum(), scores)[0]
        assert not grad[row + 1 :].any(), "a row depends on later ones"


@pytest.mark.parametrize("length", [32, 29])
def test_a_hard_permutation_gives_dense_attention_over_two_blocks(length: int) -> None:
    q, k, v = qkv(length)
    op = attention()
    turn = [2, 0, 3, 1]
    hard = torch.zeros(4, 4).double()
    hard[range(4), turn] = 1
    op.permutation = lambda *_: hard.expand(2, 2, 4, 4)
    block = torch.arange(length) // 8
    own = block[:, None] == block
    other = torch.tensor(turn)[block][:, None] == block
    scores = (q @ k.mT / 8**0.5).masked_fill(~(own | other), -torch.inf)
    assert_close(op(q, k, v)[0], scores.softmax(-1) @ v)


@pytest.mark.parametrize("net", ["mlp", "bilinear", "attention"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_net_sorts_and_learns(net: str, causal: bool) -> None:
    q, k, v = qkv(61)
    op = attention(net=net, causal=causal)
    o = op(q, k, v)[0]
    o.square().sum().backward()
    for p in op.parameters():
        assert p.grad is not None
        assert p.grad.abs().max() > 1e-9
    assert len(list(op.parameters())) == {"mlp": 2, "bilinear": 1, "attention": 0}[net]
    if causal:
        for t in range(0, 61, 7):
            grads = torch.autograd.grad(op(q, k, v)[0][:, :, t].sum(), (q, k, v))
            assert not any(g[:, :, t + 1 :].any() for g in grads), t


def test_the_causal_first_block_sees_itself_alone() -> None:
    q, k, v = qkv(40)
    o = attention(causal=True)(q, k, v)[0][:, :, :8]
    q, k, v = (t[:, :, :8] for t in (q, k, v))
    assert_close(o, dense(q, k, v, torch.ones(8, 8, dtype=torch.bool).tril()))


def test_sortcut_attends_to_the_first_sorted_blocks() -> None:
    q, k, v = qkv(40)
    op = attention(cut=2)
    q5, k5 = (bucket.blocks_of(t, 8) for t in (q, k))
    mix = op.permutation(q5, k5, torch.ones(2, 1, 5, 8).double(), True)[:, :, :2]
    kept = [
        (mix @ bucket.blocks_of(t, 8).flatten(3)).unflatten(3, (8, 8)).flatten(2, 3) for t in (k, v)
    ]
    assert_close(op(q, k, v)[0], dense(q, *kept))
    assert_close(attention(cut=5)(q, k, v)[0], attention(cut=64)(q, k, v)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_the_mixture_adds_dense_attention(causal: bool) -> None:
    q, k, v = qkv(40)
    seen = torch.ones(40, 40, dtype=torch.bool)
    want = dense(q, k, v, seen.tril() if causal else seen)
    both = attention(causal=causal, mixture=True)(q, k, v)[0]
    assert_close(both - attention(causal=causal)(q, k, v)[0], want)


def test_cross_attention_sorts_other_counts_of_blocks() -> None:
    q, k, v = qkv(21, 40)
    op = attention()
    blocks = [bucket.blocks_of(t, 8) for t in (q, k)]
    mix = op.permutation(blocks[0], blocks[1], torch.ones(2, 1, 5, 8).double(), False)
    assert mix.shape == (2, 2, 3, 5)
    keys, values = ((mix @ bucket.blocks_of(t, 8).flatten(3)).unflatten(3, (8, 8)) for t in (k, v))
    assert_close(op(q, k, v)[0], dense(blocks[0], keys, values).flatten(2, 3)[:, :, :21])
    keep = torch.ones(2, 40, dtype=torch.bool)
    keep[:, 25:] = False
    short = [t[:, :, :25] for t in (k, v)]
    assert_close(op(q, k, v, keep=keep)[0], op(q, *short)[0])


def test_noise_is_for_training_only() -> None:
    q, k, v = qkv(40)
    op = attention()
    assert torch.equal(op(q, k, v)[0], op(q, k, v)[0])
    with torch.random.fork_rng():
        op.train()
        assert not torch.equal(op(q, k, v)[0], op(q, k, v)[0])


def test_what_cannot_be_built_or_fed_is_refused() -> None:
    for wrong in ({"net": "none"}, {"length": None}, {"block": 0}, {"causal": True, "cut": 1}):
        with pytest.raises(LongspanError, match="sinkhorn-attention"):
            attention(**wrong)
    with pytest.raises(LongspanError, match="built for 8 blocks"):
        attention()(*qkv(65))
    with pytest.raises(LongspanError, match="give as many"):
        attention(causal=True)(*qkv(3, 5))
