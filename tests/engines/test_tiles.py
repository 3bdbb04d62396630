"""Attention by tiles against the softmax written out: values, gradients, dropout, cost."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import dense, pattern, tiles
from longspan.engines.pattern import Window
from longspan.errors import LongspanError
from longspan.testing import counting

SHAPES = [(1, 1), (7, 7), (7, 19), (19, 7), (33, 70)]
TILES = [(1, 1), (3, 5), (16, 4), (100, 100)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(length: int, keys: int, *lead: int, width: int = 4, value: int = 6) -> list[Tensor]:
    lead = lead or (2, 3)
    shapes = (*lead, length, width), (*lead, keys, width), (*lead, keys, value)
    return [normal(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def formula(q: Tensor, k: Tensor, v: Tensor, seen: Any = True, bias: Any = 0.0, kept: Any = 1.0):
    """(o, logsumexp), sums of exponentials as they are; a row that sees nothing: 0 and −inf."""
    raised = (q @ k.mT / q.shape[-1] ** 0.5 + bias).exp() * seen
    total = raised.sum(-1, keepdim=True)
    dead = total == 0
    total = total.masked_fill(dead, 1)
    return (raised * kept) @ v / total, total.log().masked_fill(dead, -math.inf)[..., 0]


def same(got: Any, want: Any, wrt: list[Tensor]) -> None:
    """Equal (o, logsumexp), and equal gradients of a random projection of both."""
    assert_close(got, want)
    live = want[1].detach() > -math.inf
    grads = []
    for o, lse in (got, want):
        total = (o * normal(*o.shape, seed=9)).sum()
        total = total + (lse[live] * normal(*lse.shape, seed=8)[live]).sum()
        grads.append(torch.autograd.grad(total, wrt, retain_graph=True))
    assert_close(*grads)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("length", "keys"), SHAPES)
def test_any_tiles_are_the_softmax_and_its_logsumexp(
    length: int, keys: int, tile: tuple[int, int], causal: bool, recompute: bool
) -> None:
    """Lengths that the tiles do not divide, S ≠ L, values of another width, a bias."""
    q, k, v = inputs(length, keys)
    bias = normal(3, length, keys, seed=5).requires_grad_()
    shape = pattern.causal if causal else pattern.everything
    got = tiles.attend(
        q, k, v, shape=shape, bias=bias, rows=tile[0], cols=tile[1], recompute=recompute
    )
    seen = torch.ones(length, keys, dtype=torch.bool).tril(keys - length if causal else keys)
    same(got, formula(q, k, v, seen, bias), [q, k, v, bias])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lead", [(1,), (4,), (2, 1, 3)])
def test_any_leading_axes(lead: tuple[int, ...], recompute: bool) -> None:
    q, k, v = inputs(9, 11, *lead)
    seen = torch.rand(lead[-1], 1, 11, generator=torch.Generator().manual_seed(3)) > 0.4
    got = tiles.attend(q, k, v, seen=seen, rows=4, cols=4, recompute=recompute)
    same(got, formula(q, k, v, seen), [q, k, v])


@pytest.mark.parametrize("recompute", [False, True])
def test_a_row_that_sees_nothing_gives_zero_and_minus_infinity(recompute: bool) -> None:
    """Whole tiles, whole rows of tiles and single queries without keys: no NaN anywhere."""
    q, k, v = inputs(9, 12)
    seen = torch.rand(2, 1, 9, 12, generator=torch.Generator().manual_seed(3)) > 0.4
    seen[0, :, :, 4:8], seen[1], seen[0, :, 5] = False, False, False
    o, lse = tiles.attend(q, k, v, seen=seen, rows=4, cols=4, recompute=recompute)
    same((o, lse), formula(q, k, v, seen), [q, k, v])
    assert not o[1].any()
    assert not o[0, :, 5].any()
    assert (lse[1] == -math.inf).all()


@pytest.mark.parametrize("shape", [(7, 11), (1, 11), (7, 1), (3, 7, 11), (2, 1, 1, 11), (1, 1)])
def test_gradient_of_a_bias_of_any_shape(shape: tuple[int, ...]) -> None:
    q, k, v = inputs(7, 11)
    bias = normal(*shape, seed=5).requires_grad_()
    got = tiles.attend(q, k, v, bias=bias, rows=3, cols=4)
    same(got, formula(q, k, v, bias=bias), [q, k, v, bias])


def test_a_hook_that_biases_gets_its_own_gradients() -> None:
    """From queries, keys, positions and parameters, each tile apart, as in `dense.tiled`."""
    q, k, v = inputs(7, 11)
    slope = normal(3, seed=5).requires_grad_()

    def hook(q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        far = slope[:, None, None] * (i[:, None] - j).abs()
        return far + q[:, :, :, :1] * k[:, :, None, :, 0]

    got = tiles.attend(q, k, v, shape=pattern.causal, bias=hook, rows=3, cols=4)
    want = formula(
        q, k, v, torch.ones(7, 11).tril(4), hook(q, k, torch.arange(4, 11), torch.arange(11))
    )
    same(got, want, [q, k, v, slope])
    assert_close(got, dense.tiled(q, k, v, causal=True, bias=hook, tile=3))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_constant_added_to_all_scores_changes_only_the_logsumexp(recompute: bool) -> None:
    q, k, v = inputs(5, 9)
    run = {"rows": 2, "cols": 4, "recompute": recompute}
    o, lse = tiles.attend(q, k, v, **run)
    high = torch.full((1, 1), 1e4, dtype=q.dtype)
    shifted, raised = tiles.attend(q, k, v, bias=high, **run)
    assert_close(shifted, o, rtol=0, atol=1e-11)
    assert_close(raised, lse + 1e4)
    toward = normal(*o.shape, seed=4)
    grads = [torch.autograd.grad(t, [q, k, v], toward) for t in (o, shifted)]
    assert_close(*grads, rtol=0, atol=1e-10)


def weights_of(length: int, heads: int = 2, **options: Any) -> Tensor:
    """Dropped weights themselves: with q = 0 and v the identity, o is (kept / (1 − p)) / S."""
    zero = torch.zeros(1, heads, length, 4)
    o, _ = tiles.attend(zero, zero, torch.eye(length).expand(1, heads, -1, -1), **options)
    return o * length


def test_dropout_is_the_same_whatever_the_tiles() -> None:
    drawn = [
        weights_of(40, dropout=0.3, seed=7, rows=r, cols=c, recompute=again)
        for r, c in ((1, 1), (7, 11), (64, 64))
        for again in (False, True)
    ]
    for other in drawn[1:]:
        assert_close(other, drawn[0])
    assert not torch.equal(drawn[0], weights_of(40, dropout=0.3, seed=8))
    assert not torch.equal(drawn[0][:, 0], drawn[0][:, 1])


def test_dropout_falls_on_weights_and_not_on_their_sum() -> None:
    """A share p of the weights vanishes, the rest are divided by 1 − p, lse stays."""
    drawn = weights_of(300, dropout=0.25, seed=1)
    assert drawn.unique().tolist() == pytest.approx([0, 4 / 3], abs=1e-5)
    share = (drawn == 0).double()
    assert abs(share.mean() - 0.25) < 0.005
    for axis in (-1, -2):  # rows and columns alike, each within five deviations
        assert (share.mean(axis) - 0.25).abs().max() < 5 * (0.25 * 0.75 / 300) ** 0.5
    q, k, v = inputs(7, 11)
    lse = tiles.attend(q, k, v, dropout=0.5, seed=1)[1]
    assert_close(lse, tiles.attend(q, k, v)[1])


@pytest.mark.parametrize("recompute", [False, True])
def test_dropout_is_replayed_in_the_backward_pass(recompute: bool) -> None:
    q, k, v = inputs(6, 6)
    kept = weights_of(6, 6, dropout=0.4, seed=3).double().view(2, 3, 6, 6)
    options: Any = {"dropout": 0.4, "seed": 3, "rows": 4, "cols": 3, "recompute": recompute}
    seen = torch.ones(6, 6).tril()
    got = tiles.attend(q, k, v, shape=pattern.causal, **options)
    same(got, formula(q, k, v, seen, kept=kept), [q, k, v])


def test_a_generator_draws_the_seed() -> None:
    first, second = (
        weights_of(20, dropout=0.5, generator=torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, second)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before = torch.get_rng_state()
        assert not torch.equal(weights_of(20, dropout=0.5), weights_of(20, dropout=0.5))
        torch.set_rng_state(before)
        weights_of(20)
        assert torch.equal(before, torch.get_rng_state())


def test_heads_follow_patterns_of_their_own() -> None:
    q, k, v = inputs(20, 20)
    shape = pattern.per_head([Window(3), Window(2, 5), pattern.causal])
    for recompute in (False, True):
        got = tiles.attend(q, k, v, shape=shape, rows=4, cols=6, recompute=recompute)
        same(got, formula(q, k, v, shape.mask(3, 20, 20)), [q, k, v])


def test_queries_may_start_at_any_position() -> None:
    q, k, v = inputs(5, 20)
    got = tiles.attend(q, k, v, shape=Window(2, 1), offset=6, rows=4, cols=4)
    want = Window(2, 1).mask(20, 20)[6:11]
    same(got, formula(q, k, v, want), [q, k, v])


def test_work_follows_the_tiles_that_are_seen() -> None:
    """An eighth of the tiles: an eighth of the FLOPs, forward and backward."""
    table = torch.eye(8, dtype=torch.bool)
    q, k, v = inputs(64, 64, 1, 1, width=8, value=8)

    def flops(shape: Any, **options: Any) -> tuple[int, int]:
        def forward() -> Any:
            return tiles.attend(q, k, v, shape=shape, rows=8, cols=8, **options)[0]

        total = counting.flops(lambda: forward().sum().backward())
        with torch.no_grad():
            return counting.flops(forward), total

    for options in ({}, {"recompute": True}):
        whole = flops(pattern.everything, **options)
        some = flops(pattern.tables(table[None]).choices[0].blocks(8), **options)
        early = flops(pattern.causal, **options)
        assert whole[0] == 8 * some[0]
        assert whole[0] * 36 == early[0] * 64
        if not options:
            assert whole[1] == 8 * some[1]
            assert whole[1] * 36 == early[1] * 64
        else:  # one tile a row is not computed a third time
            assert whole[1] >= 8 * some[1]


def test_workspace_splits_heads_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(9, 11)
    bias = normal(3, 9, 11, seed=5).requires_grad_()
    want = formula(q, k, v, bias=bias)
    monkeypatch.setattr(pattern, "WORKSPACE", 4 * 4 * 4 * 2)
    for recompute in (False, True):
        got = tiles.attend(q, k, v, bias=bias, rows=4, cols=4, recompute=recompute)
        same(got, want, [q, k, v, bias])

    def hook(q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return bias[:, i + (9 - 11)][:, :, j]

    same(tiles.attend(q, k, v, bias=hook, rows=4, cols=4), want, [q, k, v, bias])


@pytest.mark.parametrize("recompute", [False, True])
def test_only_inputs_output_and_logsumexp_are_kept(recompute: bool) -> None:
    q, k, v = inputs(512, 512, 1, 1)
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        tiles.attend(q, k, v, rows=64, cols=64, recompute=recompute)
    one = 512 * 8
    assert sum(found.values()) <= one * (4 + 4 + 6 + 6 + 1)


def test_partial_results_merge_by_their_logsumexp() -> None:
    """Halves of the keys, one of them hidden from some: values and gradients of the whole."""
    q, k, v = inputs(7, 12)
    seen = torch.rand(2, 1, 7, 12, generator=torch.Generator().manual_seed(3)) > 0.3
    seen[:, :, 2, :5], seen[0, :, 4] = False, False
    parts = [
        tiles.attend(q, k[..., at, :], v[..., at, :], seen=seen[..., at], rows=3, cols=2)
        for at in (slice(0, 5), slice(5, 12))
    ]
    same(dense.merge(parts), formula(q, k, v, seen), [q, k, v])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype: torch.dtype, recompute: bool) -> None:
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in inputs(9, 300))
    o, lse = tiles.attend(q, k, v, rows=4, cols=16, recompute=recompute)
    assert (o.dtype, lse.dtype) == (dtype, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want, want_lse = formula(*exact)
    eps = torch.finfo(dtype).eps
    assert_close(o.double(), want, atol=eps, rtol=eps)
    assert_close(lse.double(), want_lse, atol=1e-5, rtol=1e-6)
    toward = normal(*o.shape, seed=4).to(dtype)
    found = torch.autograd.grad(o, (q, k, v), toward)
    for g, w in zip(found, torch.autograd.grad(want, exact, toward.double()), strict=True):
        assert g.dtype == dtype
        assert_close(g.double(), w, atol=4 * eps, rtol=4 * eps)


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_leaves_scores_in_float32(recompute: bool) -> None:
    three = [t.detach().float().requires_grad_() for t in inputs(9, 9)]

    def run() -> tuple[Tensor, Tensor]:
        return tiles.attend(*three, rows=4, cols=4, recompute=recompute)

    with torch.autocast("cpu", torch.bfloat16):
        inside = run()
    outside = run()
    assert_close(inside, outside)
    assert_close(*(torch.autograd.grad(o.square().sum(), three) for o, _ in (inside, outside)))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("lead", "length", "keys"), [((0, 3), 5, 5), ((2,), 0, 4), ((2,), 3, 0)])
def test_nothing_at_all(lead: tuple[int, ...], length: int, keys: int, recompute: bool) -> None:
    q, k, v = inputs(length, keys, *lead)
    o, lse = tiles.attend(q, k, v, recompute=recompute)
    assert o.shape == (*lead, length, 6)
    assert lse.shape == (*lead, length)
    assert not o.any()
    assert (lse == -math.inf).all()
    assert not any(g.any() for g in torch.autograd.grad(o.sum(), [q, k, v]))


@pytest.mark.parametrize("options", [{"rows": 0}, {"cols": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_sizes_that_make_no_tiles_are_refused(options: Any) -> None:
    with pytest.raises(LongspanError, match="tiles"):
        tiles.attend(*inputs(3, 3), **options)


def test_a_hook_with_patterns_by_head_is_refused() -> None:
    shape = pattern.per_head([Window(1), Window(2)])
    with pytest.raises(LongspanError, match="one pattern for all"):
        tiles.attend(*inputs(3, 3), shape=shape, bias=lambda q, k, i, j: q.new_zeros(1, 1, 1, 1))
