"""Windows and their banded layout against the boolean mask written out."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import dense, pattern
from longspan.engines.pattern import Banded, Window
from longspan.errors import LongspanError

WINDOWS = [
    (Window(3),),
    (Window(8, 8),),
    (Window(0),),
    (Window(0, 4),),
    (Window(20, 5, 3),),
    (Window(2, 1, 50),),
    (Window(10**4, 10**4),),
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
    for arguments in ({"before": -1}, {"before": 1, "after": -1}, {"before": 1, "dilation": 0}):
        with pytest.raises(LongspanError, match="reaches ≥ 0 and a dilation ≥ 1"):
            Window(**arguments)
    q, k, v = inputs(4, 4)
    with pytest.raises(LongspanError, match="2 windows were given for 3 heads"):
        dense.union(q, [(Banded((Window(1), Window(2))), k, v)])
