"""SMYRF: the transforms, balanced clusters, rounds, and its use in a trained attention."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError, build
from longspan.engines import bucket
from longspan.nn import MultiHead


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(length: int, keys: int | None = None) -> Any:
    sizes = enumerate((length, keys or length, keys or length))
    return [normal(2, 2, n, 8, seed=s) for s, n in sizes]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


def test_the_transform_turns_inner_products_into_distances() -> None:
    """‖F(q) − G(k)‖² = 2 (M_Q² + M_K² − q·k), and all lifted norms agree."""
    q, k, _ = qkv(20, 30)
    x, y = bucket.asymmetric(q, k, None, None)
    top_q, top_k = (t.norm(dim=-1).amax(-1).square()[..., None, None] for t in (q, k))
    radius = top_q + top_k
    assert_close(torch.cdist(x, y).square(), 2 * radius - 2 * q @ k.mT, atol=1e-9, rtol=1e-9)
    for t in (x, y):
        assert_close(t.square().sum(-1, keepdim=True), radius.expand(*t.shape[:3], 1))


def test_padding_moves_no_norm() -> None:
    q, k, _ = qkv(20)
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[:, 15:] = False
    far = k.clone()
    far[:, :, 15:] *= 1000
    x, _ = bucket.asymmetric(q, far, keep, keep)
    want, _ = bucket.asymmetric(q[:, :, :15], k[:, :, :15], None, None)
    assert_close(x[:, :, :15], want)


@pytest.mark.parametrize("transform", ["xbox", "l2lsh"])
def test_the_other_transforms_rank_keys_by_inner_product(transform: Any) -> None:
    """Both make the nearest lifted key that of the largest inner product (l2lsh nearly)."""
    q, k, v = qkv(20, 30)
    x, y = bucket.asymmetric(q, k, None, None, transform)
    agree = torch.cdist(x, y).argmin(-1) == (q @ k.mT).argmax(-1)
    assert agree.double().mean() > (0.999 if transform == "xbox" else 0.9)
    assert build("smyrf", cluster=8, transform=transform)(q, k, v)[0].isfinite().all()


@pytest.mark.parametrize("keys", [24, 37, 5])
def test_one_cluster_is_dense_attention(keys: int) -> None:
    q, k, v = qkv(24, keys)
    assert_close(build("smyrf", cluster=24, rounds=1)(q, k, v)[0], dense(q, k, v))
    assert_close(build("smyrf", cluster=24, rounds=3)(q, k, v)[0], dense(q, k, v))


def test_both_sides_have_as_many_clusters_of_equal_size() -> None:
    q, k, _ = qkv(50, 77)
    keep = torch.ones(2, 77, dtype=torch.bool)
    keep[1, 40:] = False
    for queries, keys in build("smyrf", cluster=16).clusters(q, k, keep=keep):
        assert queries.shape[2] == keys.shape[2] == 4
        for index, total, kept in ((queries, 50, (50, 50)), (keys, 77, (77, 40))):
            sizes = (index < total).sum(-1)
            assert (sizes.amax(-1) - sizes.amin(-1)).max() <= 1
            for b in range(2):
                assert (sizes[b].sum(-1) == kept[b]).all()
                for h in range(2):
                    met = index[b, h][index[b, h] < total]
                    assert len(met.unique()) == kept[b]
        assert (keys[1][keys[1] < 77] < 40).all()


def test_clusters_one_by_one_with_rounds_joined_by_their_logsumexps() -> None:
    q, k, v = qkv(40, 60)
    op = build("smyrf", cluster=8, rounds=3)
    outs, sums = torch.zeros(3, 2, 2, 40, 8).double(), torch.zeros(3, 2, 2, 40).double()
    for r, (queries, keys) in enumerate(op.clusters(q, k)):
        for b, h, c in torch.cartesian_prod(*(torch.arange(n) for n in (2, 2, 5))).tolist():
            i, j = queries[b, h, c], keys[b, h, c]
            i, j = i[i < 40], j[j < 60]
            scores = q[b, h, i] @ k[b, h, j].mT / 8**0.5
            outs[r, b, h, i] = scores.softmax(-1) @ v[b, h, j]
            sums[r, b, h, i] = scores.logsumexp(-1)
    assert_close(op(q, k, v)[0], (sums.softmax(0)[..., None] * outs).sum(0))


def test_more_rounds_come_nearer_to_dense_attention() -> None:
    q, k, v = qkv(256)
    errors = []
    for rounds in (1, 4, 16):
        found = [build("smyrf", cluster=32, rounds=rounds, seed=s)(q, k, v)[0] for s in range(4)]
        errors.append(torch.stack([(o - dense(q, k, v)).norm() for o in found]).mean())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 2


def test_it_takes_the_place_of_a_trained_attention() -> None:
    """No parameters: the projections of a softmax layer load as they are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = MultiHead(build("multi-head-attention"), width=16, heads=2).double()
        swapped: Any = MultiHead(build("smyrf", cluster=64, rounds=1), width=16, heads=2).double()
    swapped.load_state_dict(trained.state_dict(), strict=True)
    x, keep = normal(2, 40, 16), torch.ones(2, 40, dtype=torch.bool)
    keep[0, 30:] = False
    assert_close(swapped(x, keep=keep)[0], trained(x, keep=keep)[0])
    swapped.attention.cluster, swapped.attention.rounds = 10, 4
    assert (swapped(x)[0] - trained(x)[0]).norm() < trained(x)[0].norm() / 2


def test_the_hash_reacts_to_the_seed_and_to_redraw() -> None:
    q, k, v = qkv(64)
    op = build("smyrf", cluster=8, seed=1, redraw=True).eval()
    assert torch.equal(op(q, k, v)[0], build("smyrf", cluster=8, seed=1)(q, k, v)[0])
    assert not torch.equal(op(q, k, v)[0], build("smyrf", cluster=8, seed=2)(q, k, v)[0])
    with torch.random.fork_rng():
        op.train()
        assert not torch.equal(op(q, k, v)[0], op(q, k, v)[0])


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(LongspanError, match="xbox"):
        build("smyrf", transform="none")
    with pytest.raises(LongspanError, match="at least 1"):
        build("smyrf", cluster=0)
