"""Windows and their banded layout against the boolean mask written out."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import dense, pattern
from longspan.engines.pattern import Banded, Chance, Hubs, Pattern, Stripes, Window, causal
from longspan.errors import LongspanError

WINDOWS = [
    (Window(3),),
    (Window(8, 8),),
    (Window(0),),
    (Window(0, 4),),
    (Window(20, 5, 3),),
    (Window(2, 1, 50),),
    (Window(10**4, 10**4),),
    (Window(5, -1),),
    (Window(-2, 6, 2),),
    (Window(4), Window(8, 8, 2), Window(4)),
]
SHAPES = [(1, 1), (7, 7), (15, 15), (16, 16), (17, 17), (40, 53), (3, 70), (9, 5), (1, 33)]
Three = tuple[Tensor, Tensor, Tensor]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(length: int, keys: int, *, width: int = 4, value: int = 4, heads: int = 3) -> Three:
    q, k = normal(2, heads, length, width), normal(2, heads, keys, width, seed=1)
    v = normal(2, heads, keys, value, seed=2)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def kept(keys: int) -> Tensor:
    keep = torch.rand(2, keys, generator=torch.Generator().manual_seed(3)) > 0.3
    keep[1, : keys // 2] = False
    return keep


def mask(windows: tuple[Window, ...], length: int, keys: int, heads: int = 3) -> Tensor:
    """Key by key, from the definition: j = i + S − L − t·dilation with −after ≤ t ≤ before."""
    seen = torch.zeros(heads, length, keys, dtype=torch.bool)
    for h in range(heads):
        w = windows[h % len(windows)]
        for i in range(length):
            for j in range(keys):
                t, rest = divmod(i + keys - length - j, w.dilation)
                seen[h, i, j] = rest == 0 and -w.after <= t <= w.before
    return seen


def check(q: Tensor, k: Tensor, v: Tensor, layout: Banded, seen: Tensor) -> None:
    got, lse = dense.union(q, [(layout, k, v)])
    raised = (q @ k.mT / q.shape[-1] ** 0.5).exp() * seen
    total = raised.sum(-1, keepdim=True)
    want = raised @ v / total.masked_fill(total == 0, 1)
    assert_close((got, lse), (want, total[..., 0].log()))
    toward = normal(*want.shape, seed=9)
    found, wanted = (
        torch.autograd.grad(t, (q, k, v), toward, materialize_grads=True) for t in (got, want)
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize(("length", "keys"), SHAPES)
def test_mask_and_edges_are_the_definition(
    length: int, keys: int, windows: tuple[Window, ...]
) -> None:
    for window in windows:
        want = mask((window,), length, keys, heads=1)[0]
        assert torch.equal(window.mask(length, keys), want)
        assert window.edges(length, keys) == int(want.sum())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize(("length", "keys"), SHAPES)
def test_banded_is_the_masked_softmax(
    length: int, keys: int, windows: tuple[Window, ...], masked: bool
) -> None:
    """Also where S ≠ L, where queries see no key at all, and with padding."""
    keep = kept(keys) if masked else None
    seen = mask(windows, length, keys)[None]
    seen = seen if keep is None else seen & keep[:, None, None]
    check(*inputs(length, keys), Banded(windows, keep), seen)


@pytest.mark.parametrize(("length", "reach"), [(127, 300), (128, 300), (129, 300), (257, 64)])
def test_at_the_borders_of_large_blocks(length: int, reach: int) -> None:
    window = Window(reach, reach // 2)
    seen = window.mask(length, length).expand(2, 1, -1, -1)
    check(*inputs(length, length, heads=1), Banded((window,)), seen)


@pytest.mark.parametrize(("width", "value"), [(1, 5), (5, 1), (4, 6)])
def test_values_may_be_wider_or_narrower(width: int, value: int) -> None:
    for windows in WINDOWS[:-1]:
        seen = mask(windows, 21, 21)[None]
        check(*inputs(21, 21, width=width, value=value), Banded(windows), seen)


def test_values_may_be_wider_under_interleaved_windows() -> None:
    seen = mask(WINDOWS[-1], 21, 21)[None]
    check(*inputs(21, 21, value=6), Banded(WINDOWS[-1]), seen)


def test_pieces_of_the_workspace_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks and blocks are cut to fit a cache; the smallest cut is one of each."""
    monkeypatch.setattr(pattern, "WORKSPACE", 1)
    for windows in WINDOWS:
        for keep in (None, kept(53)):
            seen = mask(windows, 40, 53)[None]
            seen = seen if keep is None else seen & keep[:, None, None]
            check(*inputs(40, 53), Banded(windows, keep), seen)


def test_passes_gradcheck() -> None:
    q, k, v = inputs(5, 6, width=2, value=2, heads=1)
    layout = Banded((Window(2, 1),), kept(6))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense.union(q, [(layout, k, v)])[0]

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_strided_inputs_and_gradients() -> None:
    """As `rearrange` leaves them: B L H D in memory, B H L D in shape."""
    windows = (Window(4, 2, 2), Window(3), Window(4, 2, 2))
    seen = mask(windows, 21, 21)[None]
    loose = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in inputs(21, 21)]
    q, k, v = (t.requires_grad_() for t in loose)
    check(q, k, v, Banded(windows), seen)


def test_empty_keys_and_batches_give_zero() -> None:
    layout = Banded((Window(3, 1, 2),))
    for length, keys in ((4, 0), (0, 0), (0, 3)):
        q, k, v = inputs(length, keys)
        o, lse = dense.union(q, [(layout, k, v)])
        assert o.shape == (2, 3, length, 4)
        assert not o.any()
        assert (lse == -torch.inf).all()
        grads = torch.autograd.grad(o.sum(), (q, k, v), materialize_grads=True)
        assert not any(g.any() for g in grads)
    q, k, v = (t[:0] for t in inputs(5, 5))
    assert dense.union(q, [(layout, k, v)])[0].shape == (0, 3, 5, 4)


def test_bfloat16_sums_in_float32() -> None:
    q, k, v = (t.detach().bfloat16() for t in inputs(40, 53))
    windows = (Window(8, 2),)
    o, lse = dense.union(q, [(Banded(windows), k, v)])
    assert (o.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    exact = [t.double() for t in (q, k, v)]
    want, want_lse = dense.union(exact[0], [(Banded(windows), exact[1], exact[2])])
    assert_close(o.double(), want, atol=0.02, rtol=0.02)
    assert_close(lse.double(), want_lse, atol=1e-4, rtol=1e-4)


def test_refusals() -> None:
    for arguments in ({"before": -1}, {"before": 1, "after": -2}, {"before": 1, "dilation": 0}):
        with pytest.raises(LongspanError, match="reaches ≥ 0 and a dilation ≥ 1"):
            Window(**arguments)
    q, k, v = inputs(4, 4)
    with pytest.raises(LongspanError, match="2 windows were given for 3 heads"):
        dense.union(q, [(Banded((Window(1), Window(2))), k, v)])


FAR = pattern.ALL
SHAPED: list[Pattern] = [
    Hubs((0, -1, 3)),
    Hubs((1, 40), rows=False),
    Hubs((5,), columns=False) & causal,
    Stripes(7, 5, 7) & causal,
    Stripes(8, 6, 9),
    Window(0).blocks(6) & causal,
    Window(0).blocks(6),
    Window(FAR, 0, 5),
    Window(FAR, FAR, 5),
    Window(4, -2),
    Window(-1, 3),
    Window(4, -1) + Window(FAR, 0, 5),
    (Window(0).blocks(8) & causal) + (Stripes(8, 6, 8) & Window(FAR, -1).blocks(8)),
    (Window(1, 1) | Hubs((0, -1)) | Chance(2, Window(1, 1) | Hubs((0, -1)))).blocks(4),
    (Window(1) | Hubs((0,)) | Chance(1, Window(1) | Hubs((0,)), causal=True)).blocks(4) & causal,
    pattern.Table(torch.rand(9, 12, generator=torch.Generator().manual_seed(4)) > 0.6).blocks(5),
    pattern.Prefixed(5, (Window(1, 1) | Hubs((2,))).blocks(4)),
    pattern.UnlessShort(Window(2, 2), 40),
    (Window(3, 1) | Window(0, 9, 2)) & (Stripes(5, 0, 2) | causal),
    pattern.Cells((5, 2, 11)),
    (Stripes(6, 4, 6, rows=True) | Window(1)) & pattern.Cells((3, 9)).blocks(2),
]


def defined(shape: Pattern, length: int, keys: int) -> Tensor:
    """Pair by pair."""
    at = torch.arange(keys)
    return torch.stack([shape.sees(i, at, keys) for i in at[keys - length :]])


@pytest.mark.parametrize("block", [(4, 4), (16, 5), (8, 64)])
@pytest.mark.parametrize("shape", SHAPED, ids=range(len(SHAPED)))
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (40, 40), (53, 53), (21, 34), (1, 30)])
def test_a_pattern_is_the_masked_softmax(
    length: int, keys: int, shape: Pattern, block: tuple[int, int]
) -> None:
    """By its own kernel, and by listed blocks; its edges are those of its mask."""
    seen = defined(shape, length, keys)
    assert torch.equal(shape.mask(length, keys), seen)
    assert shape.edges(length, keys, block=block[0]) == int(seen.sum())
    q, k, v = inputs(length, keys, value=6)
    layout = [(pattern.Listed(shape, *block), k, v)]
    each = torch.stack([defined(shape.head(h), length, keys) for h in range(3)])
    for got, of in (
        (pattern.attend(q, k, v, shape, block=block), each),
        (dense.union(q, layout)[0], seen),
    ):
        want = masked(q, k, v, of)
        assert_close(got, want)
        toward = normal(*want.shape, seed=9)
        wanted, found = (
            torch.autograd.grad(t, (q, k, v), toward, materialize_grads=True) for t in (want, got)
        )
        assert_close(found, wanted)


def masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    raised = (q @ k.mT / q.shape[-1] ** 0.5).exp() * seen
    total = raised.sum(-1, keepdim=True)
    return raised @ v / total.masked_fill(total == 0, 1)


def test_the_kernels_are_those_that_suit() -> None:
    def kinds(shape: Pattern, length: int = 40) -> list[str]:
        return [type(layout).__name__ for layout in pattern.layouts(shape, length, 40)]

    assert kinds(causal) == ["Whole"]
    assert kinds(Window(3)) == kinds(Window(4, -1)) == ["Banded"]
    assert kinds(Window(FAR, 0, 5)) == kinds(Window(0).blocks(6) & causal) == ["Fold"]
    assert kinds(Window(FAR, 0, 5), 7) == ["Listed"]
    assert kinds(Window(4, -1) + Window(FAR, 0, 5)) == ["Banded", "Fold"]
    assert kinds(Window(1).blocks(4) | Hubs((0,))) == ["Listed"]


def test_heads_choose_and_padding_is_packed_away() -> None:
    """Positions count kept tokens; hidden queries give 0, hidden tokens get no gradient."""
    shape = pattern.per_head([Window(2, 2), Window(0).blocks(3) | Hubs((-1,))])
    q, k, v = inputs(30, 30)
    keep = kept(30)
    keep[0] = True
    got = pattern.attend(q, k, v, shape, keep=keep, block=(4, 4))
    for row in range(2):
        at = keep[row].nonzero()[:, 0]
        seen = shape.mask(3, len(at), len(at))
        alone = masked(q[row][:, at], k[row][:, at], v[row][:, at], seen)
        assert_close(got[row][:, at], alone)
        assert not got[row][:, ~keep[row]].any()
    for grad in torch.autograd.grad(got.square().sum(), (q, k, v)):
        assert not grad[1][:, ~keep[1]].any()
        assert grad[1][:, keep[1]].any()


def test_listed_pieces_of_the_workspace_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pattern, "WORKSPACE", 1)
    for shape in SHAPED:
        q, k, v = inputs(45, 45)
        seen = torch.stack([shape.head(h).mask(45, 45) for h in range(3)])
        assert_close(pattern.attend(q, k, v, shape, block=(8, 8)), masked(q, k, v, seen))


BIASES: list[tuple[Any, ...]] = [
    (2, 3, "L", "S"),
    (1, 3, "L", "S"),
    (2, 1, 1, "S"),
    (1, 1, "L", "S"),
    (2, 3, 1, "S"),
]


def biased_alike(got: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, full: Tensor) -> None:
    """`full` is `bias` laid out over B H L S, −inf where nothing is seen."""
    scores = q @ k.mT / q.shape[-1] ** 0.5 + full
    raised = scores.exp()
    total = raised.sum(-1, keepdim=True)
    want = raised @ v / total.masked_fill(total == 0, 1)
    assert_close(got, want)
    toward = normal(*want.shape, seed=9)
    wrt = [t for t in (q, k, v, bias) if t.is_leaf]
    found, wanted = (
        torch.autograd.grad(t, wrt, toward, materialize_grads=True, retain_graph=True)
        for t in (got, want)
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("shape", [*SHAPED[::3], pattern.everything], ids=str)
def test_a_bias_of_every_pair(
    shape: Pattern, workspace: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it broadcasts, −inf among it, in listed blocks of any size."""
    monkeypatch.setattr(pattern, "WORKSPACE", workspace or pattern.WORKSPACE)
    for length, keys in ((1, 1), (37, 37), (21, 34), (1, 30)):
        for sizes in BIASES:
            q, k, v = inputs(length, keys, value=6)
            of: dict[Any, Any] = {"L": length, "S": keys}
            bias = normal(*(of.get(n, n) for n in sizes), seed=5)
            bias = bias.masked_fill(bias > 1.5, -torch.inf).requires_grad_()
            layout = pattern.ByPair(shape, 4, 8)
            full = bias.masked_fill(~shape.mask(length, keys), -torch.inf)
            got = pattern.biased(q, [(layout, k, v, bias)])
            biased_alike(got, q, k, v, bias, full)


@pytest.mark.parametrize("workspace", [None, 1])
@pytest.mark.parametrize("masked_keys", [False, True])
@pytest.mark.parametrize(("before", "after"), [(5, 5), (0, 0), (3, 9), (40, 70)])
def test_a_bias_by_distance(
    before: int,
    after: int,
    masked_keys: bool,
    workspace: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pattern, "WORKSPACE", workspace or pattern.WORKSPACE)
    for length in (1, 16, 53):
        q, k, v = inputs(length, length, value=6)
        keep = kept(length) if masked_keys else None
        bias = normal(3, before + 1 + after, seed=5).requires_grad_()
        step = torch.arange(length) - torch.arange(length)[:, None]
        full = bias[:, (step + before).clamp(0, before + after)]
        seen = Window(before, after).mask(length, length)
        seen = seen if keep is None else seen & keep[:, None, None]
        layout = pattern.ByDistance(Window(before, after), keep)
        got = pattern.biased(q, [(layout, k, v, bias)])
        biased_alike(got, q, k, v, bias, full.masked_fill(~seen, -torch.inf))


@pytest.mark.parametrize("workspace", [None, 1])
def test_a_bias_by_run(workspace: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside other keys in one softmax; rows with fewer runs, and with none."""
    monkeypatch.setattr(pattern, "WORKSPACE", workspace or pattern.WORKSPACE)
    for length, size, counts in ((27, 4, (6, 3)), (8, 4, (2, 0)), (5, 1, (5, 1))):
        q, k, v = inputs(length, length, value=6)
        most = max(counts)
        key, value = normal(2, 3, most, 4, seed=6), normal(2, 3, most, 6, seed=7)
        near, far = normal(3, 3, seed=4).requires_grad_(), normal(3, 2 * most - 1, seed=5)
        far.requires_grad_()
        m = torch.arange(most)
        run = torch.arange(length) // size
        rows = [
            far[
                :, (m - run.clamp(max=max(n - 1, 0))[:, None] + most - 1).clamp(0, 2 * most - 2)
            ].masked_fill(m >= n, -torch.inf)
            for n in counts
        ]
        step = torch.arange(length) - torch.arange(length)[:, None]
        band = near[:, (step + 1).clamp(0, 2)].masked_fill(step.abs() > 1, -torch.inf)
        full = torch.cat([band.expand(2, -1, -1, -1), torch.stack(rows)], 3)
        parts = [
            (pattern.ByDistance(Window(1, 1)), k, v, near),
            (pattern.ByRun(size, counts), key, value, far),
        ]
        got = pattern.biased(q, parts)
        every = torch.cat([k, key], 2), torch.cat([v, value], 2)
        biased_alike(got, q, *every, far, full)
        biased_alike(pattern.biased(q, parts), q, *every, near, full)


def test_chance_is_distinct_apart_and_extendable() -> None:
    near = Window(1, 1) | Hubs((0, -1))
    for keys in (1, 4, 8, 60, 700):
        rows = torch.arange(keys)
        plan = Chance(3, near, seed=5).draw(rows, keys)
        allowed = ~near.sees(rows[:, None], rows, keys)
        assert torch.equal((plan >= 0).sum(1), allowed.sum(1).clamp(max=3))
        hit = torch.zeros_like(allowed, dtype=torch.long)
        hit.scatter_add_(1, plan.clamp(min=0), (plan >= 0).long())
        assert not hit[~allowed].any()
        assert hit.max() <= 1
    other = Chance(3, near, seed=6).draw(rows, keys)
    assert not torch.equal(plan, other)
    assert not torch.equal(plan, Chance(3, near, seed=5, of=1).draw(rows, keys))
    past = Chance(3, Window(2) | Hubs((0,), rows=False), causal=True)
    assert torch.equal(past.draw(torch.arange(50), 50), past.draw(torch.arange(50), 700))
    assert (past.draw(torch.arange(700), 700).amax(1) <= torch.arange(700)).all()
    counts = torch.bincount(Chance(3, near).draw(torch.arange(1, 1999), 2000).flatten()).double()
    assert counts[1:-1].mean().item() == pytest.approx(3, rel=0.01)
    assert counts[1:-1].var().item() == pytest.approx(3, rel=0.15)  # as Poisson's


def test_a_sum_has_no_pair_twice() -> None:
    for shape in SHAPED:
        if isinstance(shape, pattern.Sum):
            first, second = shape.parts
            assert not (first & second).edges(60, 60)
