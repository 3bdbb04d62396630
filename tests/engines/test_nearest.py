"""Nearest neighbours against sorting every score, and faiss against the exact index."""

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.engines import dense, nearest

METRICS: tuple[Literal["inner", "l2"], ...] = ("inner", "l2")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def all_scores(q: Tensor, k: Tensor, metric: str) -> Tensor:
    if metric == "inner":
        return q @ k.mT
    return -(q[..., :, None, :] - k[..., None, :, :]).square().sum(-1)


def brute(scores: Tensor, seen: Tensor, count: int) -> Tensor:
    scores = scores.masked_fill(~seen, -torch.inf)
    at = scores.argsort(dim=-1, descending=True)[..., :count]
    at = at.masked_fill(scores.gather(-1, at) == -torch.inf, -1)
    return torch.nn.functional.pad(at, (0, count - at.shape[-1]), value=-1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "WORKSPACE", 2048)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [1, 5, 40])
def test_search_is_brute_force_under_masks_limits_and_exclusions(
    metric: Literal["inner", "l2"], count: int
) -> None:
    q, k = normal(2, 3, 11, 4), normal(2, 3, 29, 4, seed=1)
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(2, 29, generator=generator) > 0.3
    places = torch.stack([torch.randperm(29, generator=generator) for _ in range(2)])
    before = torch.randint(0, 30, (2, 11), generator=generator)
    apart = torch.randint(0, 29, (2, 11), generator=generator)
    scores = all_scores(q, k, metric)
    every = torch.ones(2, 1, 11, 29, dtype=torch.bool)
    cases: list[tuple[dict[str, Any], Tensor]] = [
        ({}, every),
        ({"keep": keep}, every & keep[:, None, None]),
        ({"before": before}, torch.arange(29) < before[:, None, :, None]),
        (
            {"keep": keep, "places": places, "before": before, "apart": apart},
            keep[:, None, None]
            & (places[:, None, None] < before[:, None, :, None])
            & (places[:, None, None] != apart[:, None, :, None]),
        ),
    ]
    for options, seen in cases:
        got = nearest.search(q, k, count, metric=metric, **options)
        assert torch.equal(got, brute(scores, seen, count)), sorted(options)


@pytest.mark.usefixtures("small_blocks")
def test_rows_filled_to_different_degrees_and_masked_nan() -> None:
    q, k = normal(3, 2, 4, 4), normal(3, 2, 20, 4, seed=1)
    keep = torch.arange(20) < torch.tensor([0, 3, 20])[:, None]
    spoilt = k.masked_fill(~keep[:, None, :, None], torch.nan)
    at = nearest.search(q, spoilt, 5, keep=keep)
    assert (at[0] == -1).all()
    assert (at[1, ..., 3:] == -1).all()
    assert torch.equal(at, brute(q @ k.mT, keep[:, None, None].expand(-1, 1, 4, -1), 5))
    o, total = nearest.attend(q, spoilt, spoilt, at)
    assert (o[0] == 0).all()
    assert (total[0] == -torch.inf).all()
    assert o.isfinite().all()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shared", [(2, 3), (1, 3), (2, 1), (1, 1)])
def test_scores_and_mixtures_have_the_gradients_of_gathered_rows(
    metric: Literal["inner", "l2"], shared: tuple[int, int]
) -> None:
    q = normal(2, 3, 7, 4).requires_grad_()
    k, v = (normal(*shared, 13, n, seed=n).requires_grad_() for n in (4, 5))
    at = nearest.search(q, k, 6, metric=metric, before=torch.arange(7)[None])
    scores = nearest.score(q, k, at, metric=metric)
    index = at.clamp(min=0)
    none = at < 0
    want = all_scores(q, k, metric).gather(-1, index).masked_fill(none, -torch.inf)
    assert_close(scores, want)
    weights = [s.masked_fill(none, 0).tanh() for s in (scores, want)]
    o = nearest.mix(weights[0], v, at)
    rows = v.expand(2, 3, -1, -1).gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, 5))
    expected = (weights[1][..., None] * rows.view(*index.shape, 5)).sum(-2)
    assert_close(o, expected)
    toward = normal(*o.shape, seed=9)
    for got, ref in zip(
        torch.autograd.grad(o, (q, k, v), toward),
        torch.autograd.grad(expected, (q, k, v), toward),
        strict=True,
    ):
        assert_close(got, ref)


def test_all_keys_found_is_dense_attention_and_joins_others_by_logsumexp() -> None:
    q, k, v = (normal(2, 2, 9, 4, seed=n).requires_grad_() for n in range(3))
    want = (q @ k.mT / 2).softmax(-1) @ v
    o, total = nearest.attend(q, k, v, nearest.search(q, k, 9))
    assert_close(o, want)
    assert_close(total, (q @ k.mT / 2).logsumexp(-1))
    parts = [
        nearest.attend(q, t, u, nearest.search(q, t, 5))
        for t, u in ((k[:, :, :4], v[:, :, :4]), (k[:, :, 4:], v[:, :, 4:]))
    ]
    joined = dense.merge(parts)[0]
    assert_close(joined, want)
    toward = normal(*want.shape, seed=9)
    grads = [torch.autograd.grad(y, (q, k, v), toward, retain_graph=True) for y in (joined, want)]
    assert_close(grads[0], grads[1])


def test_stored_keys_without_gradients_get_none() -> None:
    q, k = normal(1, 1, 3, 4).requires_grad_(), normal(1, 1, 5, 4)
    nearest.score(q, k, nearest.search(q, k, 2)).sum().backward()
    assert q.grad is not None
    assert k.grad is None


def test_near_neighbours_keep_their_digits_far_from_the_origin() -> None:
    k = (1000 + 0.01 * normal(1, 1, 50, 8)).float()
    q = k + 1e-3
    got = nearest.score(q, k, torch.arange(50).view(1, 1, 50, 1), metric="l2")
    assert_close(got[..., 0], -(q.double() - k.double()).square().sum(-1).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_keys_do_not_overflow_in_squares(dtype: torch.dtype) -> None:
    k = (300 * normal(1, 1, 40, 8)).to(dtype)
    q = k[:, :, :5].float()
    at = nearest.search(q, k, 3, metric="l2")
    assert at[0, 0, :, 0].tolist() == [0, 1, 2, 3, 4]
    assert nearest.score(q, k, at, metric="l2").isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 1, 3, 5), (1, 2, 0, 5), (1, 2, 3, 0)])
def test_empty_inputs(sizes: tuple[int, int, int, int]) -> None:
    batch, heads, length, keys = sizes
    q, k = normal(batch, heads, length, 4), normal(batch, heads, keys, 4)
    o, total = nearest.attend(q, k, k, nearest.search(q, k, 2))
    assert o.shape == (batch, heads, length, 4)
    assert total.shape == (batch, heads, length)
    assert (o == 0).all()


def test_temporaries_fit_the_workspace() -> None:
    q, k = torch.randn(1, 4, 512, 64), torch.randn(1, 4, 16384, 64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, Tensor) and not t._is_view():
                    largest = max(largest, t.numel() * t.element_size())
            return out

    with Watch():
        at = nearest.search(q, k, 32)
        assert largest <= nearest.WORKSPACE
        nearest.attend(q, k, k, at)
    assert largest <= nearest.WORKSPACE


def pair(kind: str = "Flat", **options: Any) -> tuple[nearest.Exact, nearest.Faiss]:
    pytest.importorskip("faiss")
    return nearest.Exact(8, **options), nearest.Faiss(8, kind=kind, probes=64, **options)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["Flat", "IVF4,Flat"])
def test_faiss_agrees_with_exact_through_additions_removals_and_reloading(
    metric: Literal["inner", "l2"], kind: str, tmp_path: Path
) -> None:
    both = pair(kind, metric=metric)
    keys, q = normal(200, 8).float(), normal(9, 8, seed=1).float()
    before, apart = torch.arange(0, 180, 20), torch.arange(9) * 3
    if kind != "Flat":
        both[1].train(keys)
    indices: list[nearest.Index] = list(both)

    def agree() -> None:
        for options in (
            {},
            {"before": before},
            {"apart": apart},
            {"before": before, "apart": apart},
        ):
            exact, faiss = (i.search(q, 7, **options) for i in indices)
            assert torch.equal(exact.ids, faiss.ids), options
            assert_close(exact.scores, faiss.scores)

    for index in indices:
        assert index.add(keys[:50]).tolist() == list(range(50))
        assert index.add(keys[50:150]).tolist() == list(range(50, 150))
    agree()
    for index in indices:
        index.remove(torch.tensor([0, 3, 149, 1000]))
        assert len(index) == 147
    agree()
    for n, index in enumerate(indices):
        index.save(tmp_path / f"{n}")
        indices[n] = nearest.load(tmp_path / f"{n}")
        assert len(indices[n]) == 147
        assert indices[n].add(keys[150:]).tolist() == list(range(150, 200))
    agree()
    wanted = torch.tensor([199, 1])
    for index in indices:
        assert_close(index.vectors(wanted), keys[wanted])
        with pytest.raises(LongspanError, match="does not hold"):
            index.vectors(torch.tensor([3]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize("metric", METRICS)
def test_an_index_is_brute_force_with_gradients_for_queries(
    metric: Literal["inner", "l2"],
) -> None:
    index = nearest.Exact(4, metric=metric, dtype=torch.float16)
    keys, q = normal(30, 4), normal(5, 4, seed=1).requires_grad_()
    index.add(keys)
    scores = all_scores(q, keys.half().double(), metric)
    found = index.search(q, 4)
    assert torch.equal(found.ids, brute(scores, torch.ones(5, 30, dtype=torch.bool), 4))
    toward = normal(5, 4, seed=2)
    got = torch.autograd.grad(found.scores, q, toward)[0]
    assert_close(got, torch.autograd.grad(scores.gather(1, found.ids), q, toward)[0])


def test_ids_survive_removal_and_are_not_given_twice() -> None:
    index = nearest.Exact(2)
    index.add(torch.eye(2))
    index.remove(torch.tensor([1]))
    assert index.add(torch.eye(2)).tolist() == [2, 3]
    assert index.search(torch.tensor([[0.1, 1.0]]), 4).ids.tolist()[0][::3] == [3, -1]


def test_an_empty_index_finds_nothing() -> None:
    found = nearest.Exact(2).search(torch.ones(3, 2), 2)
    assert (found.ids == -1).all()
    assert (found.scores == -torch.inf).all()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = nearest.Exact(2)
    index.add(torch.eye(2))
    index.save(tmp_path / "index")

    def fail(*arguments: Any, **named: Any) -> None:
        Path(arguments[1]).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(nearest, "save_file", fail)
    index.add(torch.eye(2))
    with pytest.raises(OSError, match="disk full"):
        index.save(tmp_path / "index")
    assert len(nearest.load(tmp_path / "index")) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_faiss_is_missed_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    nearest.Exact(2).add(torch.eye(2))
    with pytest.raises(LongspanError, match="pip install faiss-cpu"):
        nearest.Faiss(2)


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    q = normal(1, 1, 2, 4)
    with pytest.raises(LongspanError, match="no metric 'cosine'"):
        nearest._check("cosine", 2)  # the type hook stands before the public ways in
    with pytest.raises(LongspanError, match="0 neighbours"):
        nearest.search(q, q, 0)
    with pytest.raises(LongspanError, match="width 2 and got 4"):
        nearest.Exact(2).add(q[0, 0])
    (tmp_path / "text").write_text("no index")
    for name in ("text", "nothing"):
        with pytest.raises(LongspanError, match="cannot be read"):
            nearest.load(tmp_path / name)
    pytest.importorskip("faiss")
    with pytest.raises(LongspanError, match="faiss cannot"):
        nearest.Faiss(8, kind="Nonsense7")
    with pytest.raises(LongspanError, match="call train"):
        nearest.Faiss(8, kind="IVF4,Flat").add(normal(9, 8).float())
