"""Routing attention: identities, the online k-means, steps, and what the paper's form peeks at."""

import pytest
import torch
import torch.distributed
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from longspan import LongspanError, build
from longspan.engines import bucket
from longspan.nn import kmeans

HEADS, WIDTH = 2, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(length: int, keys: int | None = None) -> list[Tensor]:
    sizes = enumerate((length, keys or length, keys or length))
    return [normal(2, HEADS, n, WIDTH, seed=s).requires_grad_() for s, n in sizes]


def routing(id_: str = "routing-transformer", **options):
    sizes = {"heads": HEADS, "head_width": WIDTH, "clusters": 4, "local": 0}
    return build(id_, **(sizes | options)).double().eval()


def sphere(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


@pytest.mark.parametrize("causal", [False, True])
def test_one_cluster_of_all_is_dense_attention_on_the_sphere(causal: bool) -> None:
    q, k, v = qkv(19)
    got = routing(clusters=1, window=19, causal=causal)(q, k, v)[0]
    x, y = sphere(q), sphere(q if causal else k)
    scores = x @ y.mT / WIDTH**0.5
    if causal:
        scores = scores + torch.full((19, 19), -torch.inf, dtype=torch.float64).triu(1)
    want = scores.softmax(-1) @ v / 1.01
    assert_close(got, want, atol=1e-10, rtol=1e-10)
    wrt = (q, v) if causal else (q, k, v)
    for a, b in zip(
        torch.autograd.grad(got.sum(), wrt), torch.autograd.grad(want.sum(), wrt), strict=True
    ):
        assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_clusters_are_of_equal_size_and_sorted_by_position() -> None:
    x, keep = sphere(normal(2, HEADS, 40, WIDTH)), torch.ones(2, 40, dtype=torch.bool)
    keep[1, 25:] = False
    centroids = normal(HEADS, 4, WIDTH, seed=3)
    size = torch.tensor([10, 7])
    index = bucket.members(x, centroids, size, keep)
    assert index.shape == (2, HEADS, 4, 10)
    assert torch.equal(index, index.sort(-1).values)
    for b in range(2):
        filled = index[b] < 40
        assert (filled.sum(-1) == size[b]).all()
        assert keep[b][index[b][filled]].all(), "padding joined a cluster"


def test_tokens_of_no_cluster_give_zero_and_those_of_many_the_mean() -> None:
    q, k, v = qkv(40)
    op = routing(window=6, causal=True)
    o = op(q, k, v)[0]
    x = sphere(q)
    index = bucket.members(x, op.means.centroids, torch.tensor([6, 6]), None)
    count = torch.zeros(2, HEADS, 40).scatter_add_(2, index.flatten(2), torch.ones(2, HEADS, 24))
    assert (count == 0).any()
    assert (count > 1).any()
    assert not o[count == 0].any()
    assert o[count > 0].abs().amax(-1).min() > 0


def test_the_causal_form_sees_no_later_values_though_it_selects_by_them() -> None:
    """Values have gradient only at earlier positions; the choice of members is what leaks."""
    q, k, v = qkv(24)
    op = routing(window=6, causal=True)
    for t in (0, 9, 20):
        grad = torch.autograd.grad(op(q, k, v)[0][:, :, t].sum(), v)[0]
        assert not grad[:, :, t + 1 :].any()
    other = q.detach().clone()
    other[:, :, -1] = op.means.centroids[:, 0] * 3  # ousts the last member of a full cluster
    assert not torch.equal(op(other, k, v)[0][:, :, :-1], op(q, k, v)[0][:, :, :-1])


def test_the_cluster_loop_written_out() -> None:
    """Σ_c softmax over members, averaged: the masked dense reference, cross lengths."""
    q, k, v = qkv(18, 30)
    op = routing(window=7)
    x, y = sphere(q), sphere(k)
    want, count = torch.zeros_like(q), torch.zeros(2, HEADS, 18, 1)
    for c in range(4):
        centre = op.means.centroids[:, c, :, None]
        a, b = ((t @ centre)[..., 0] for t in (x, y))
        chosen = a >= a.topk(7).values[..., -1:]
        theirs = b >= b.topk(7).values[..., -1:]
        scores = (x @ y.mT / WIDTH**0.5).masked_fill(~theirs[:, :, None], -torch.inf)
        want = want + (scores.softmax(-1) @ v) * chosen[..., None]
        count = count + chosen[..., None]
    got = op(q, k, v)[0]
    assert_close(got, want / (count.double() + 1e-2).clamp(min=1), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("id_", ["routing-transformer", "routing-transformer-causal"])
def test_local_and_routed_heads_stand_side_by_side(id_: str) -> None:
    q, k, v = qkv(30)
    op = routing(id_, local=1, reach=5, window=8, causal=True)
    got = op(q, k, v)[0]
    steps = torch.arange(30)[:, None] - torch.arange(30)
    scores = (q @ k.mT / WIDTH**0.5).masked_fill((steps < 0) | (steps > 5), -torch.inf)
    assert_close(got[:, :1], (scores.softmax(-1) @ v)[:, :1])
    changed = op(q, k + 1000 * (torch.arange(HEADS) == 1).view(1, HEADS, 1, 1), v)[0]
    assert_close(changed, got)  # a routed head's keys are its queries
    assert build(id_, heads=8, head_width=4, causal=True).local == 4


@pytest.mark.parametrize("sums", [False, True])
def test_centroids_move_by_the_formula(sums: bool) -> None:
    means = kmeans.Centroids(HEADS, 3, WIDTH, decay=0.9, sums=sums).double()
    x, y = sphere(normal(2, HEADS, 20, WIDTH)), sphere(normal(2, HEADS, 15, WIDTH, seed=1))
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[0, 12:] = False
    means([x, y], [keep, None])  # takes its start from x
    before = means.centroids.clone()
    used = means([x, y], [keep, None])
    assert torch.equal(used, before)
    for h in range(HEADS):
        for c in range(3):
            aims = []
            for t, kept in ((x, keep), (y, torch.ones(2, 15, dtype=torch.bool))):
                rows = t[:, h][kept]
                near = rows[(rows @ before[h].mT).argmax(-1) == c]
                if sums:
                    aims.append(near.sum(0))
                else:
                    aims.append(near.mean(0) if len(near) else before[h, c])
            want = 0.9 * before[h, c] + 0.1 * (aims[0] + aims[1]) / 2
            want = want if sums else torch.nn.functional.layer_norm(want, (WIDTH,))
            assert_close(means.centroids[h, c], want)


def test_centroids_start_from_data_and_find_clusters() -> None:
    centres = sphere(normal(1, 4, WIDTH, seed=5))
    x = sphere(centres.repeat(1, 50, 1)[None] + 0.05 * normal(1, 1, 200, WIDTH))
    means = kmeans.Centroids(1, 16, WIDTH, decay=0.5).double()
    assert not means.fitted
    for _ in range(30):
        means([x], [None])
    assert means.fitted
    assert_close(
        means.centroids.norm(dim=-1), torch.full((1, 16), WIDTH**0.5).double(), rtol=1e-3, atol=0
    )
    error = kmeans.commitment(x, means.centroids)
    assert error < 0.02
    means.eval()
    rest = means.centroids.clone()
    means([x + 1], [None])
    assert torch.equal(means.centroids, rest)


def test_recomputation_neither_moves_nor_changes_the_centroids() -> None:
    q, k, v = qkv(32)
    plain, again = (routing(window=8, causal=True, decay=0.1).train() for _ in range(2))
    for _ in range(3):
        wanted = torch.autograd.grad(plain(q, k, v)[0].square().sum(), (q, v))
        out = checkpoint(lambda *t: again(*t)[0], q, k, v, use_reentrant=False)
        found = torch.autograd.grad(out.square().sum(), (q, v))
        assert_close(found, wanted)
        assert_close(again.means.centroids, plain.means.centroids)


def test_centroids_keep_their_precision_in_half_precision_modules() -> None:
    op = routing().to(torch.bfloat16)
    assert op.means.centroids.dtype in (torch.float32, torch.float64)
    assert build("routing-transformer", heads=2, head_width=8).bfloat16().means.centroids.dtype == (
        torch.float32
    )


def test_the_commitment_loss_reaches_the_queries() -> None:
    q, k, v = qkv(32)
    without, loss = (routing(window=8, commitment=beta).train() for beta in (0.0, 1e-2))
    plain = torch.autograd.grad(without(q, k, v)[0].sum(), (q, k))
    found = torch.autograd.grad(loss(q, k, v)[0].sum(), (q, k))
    for t, a, b in zip((q, k), plain, found, strict=True):
        term = 1e-2 * kmeans.commitment(sphere(t), loss.means.used)
        assert_close(b - a, torch.autograd.grad(term, t)[0])
    x = sphere(q)
    near = (x @ loss.means.used.mT).argmax(-1)
    want = torch.stack([loss.means.used[h][near[:, h]] for h in range(HEADS)], 1)
    assert_close(kmeans.commitment(x, loss.means.used), (x - want).square().mean())


def test_a_step_meets_the_cached_members_of_its_centroid() -> None:
    q, k, v = (t.detach() for t in qkv(30))
    op = routing(window=8, causal=True)
    _, state = op(q[:, :, :29], k[:, :, :29], v[:, :, :29])
    got, state = op(q[:, :, 29:], k[:, :, 29:], v[:, :, 29:], state)
    x = sphere(q)
    code = (x @ op.means.centroids.mT).argmax(-1)
    seen = code == code[..., -1:]
    scores = (x[:, :, -1:] @ x.mT / WIDTH**0.5).masked_fill(~seen[:, :, None], -torch.inf)
    assert_close(got, scores.softmax(-1) @ v / 1.01, atol=1e-10, rtol=1e-10)
    assert state.k.shape[2] == 30


def _train(rank: int, path: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{path}/meet", rank=rank, world_size=2)
    means = kmeans.Centroids(1, 3, WIDTH, decay=0.5).double()
    means.fitted.fill_(True)
    means([normal(1, 1, 20, WIDTH, seed=rank)], [None])
    torch.save(means.centroids, f"{path}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_share_their_statistics(tmp_path) -> None:
    multiprocessing.spawn(_train, args=(str(tmp_path),), nprocs=2)  # pyright: ignore[reportPrivateImportUsage]
    found = [torch.load(tmp_path / str(rank)) for rank in range(2)]
    means = kmeans.Centroids(1, 3, WIDTH, decay=0.5).double()
    means.fitted.fill_(True)
    means([torch.cat([normal(1, 1, 20, WIDTH, seed=r) for r in range(2)], 2)], [None])
    assert_close(found[0], means.centroids)
    assert_close(found[1], means.centroids)


def test_what_cannot_be_built_or_fed_is_refused() -> None:
    with pytest.raises(LongspanError, match="0 ≤ local ≤ heads"):
        routing(local=3)
    with pytest.raises(LongspanError, match="built for 2 heads"):
        routing()(*(normal(1, 3, 4, WIDTH) for _ in range(3)))
    with pytest.raises(LongspanError, match="carry earlier tokens in the state"):
        routing(causal=True)(*qkv(3, 5))
    with pytest.raises(LongspanError, match="causal only"):
        routing("routing-transformer-causal", causal=False)
