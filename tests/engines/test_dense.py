"""The dense engine against the softmax written out: values and gradients, both kinds of tile."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.engines import dense

SHAPES = [(1, 1), (5, 5), (7, 19), (1, 6), (19, 7), (6, 1), (513, 513), (3, 515)]
FORMS = ("fused", "union", "tiled", "explicit")
Three = tuple[Tensor, Tensor, Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def inputs(length: int, keys: int, *, width: int = 4, value: int = 6, heads: int = 2) -> Three:
    q, k = normal(2, heads, length, width), normal(2, heads, keys, width, seed=1)
    v = normal(2, heads, keys, value, seed=2)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def kept(keys: int) -> Tensor:
    """A mask with holes, whose second row sees nothing."""
    keep = torch.rand(2, keys, generator=torch.Generator().manual_seed(3)) > 0.3
    keep[1] = False
    return keep


def allowed(length: int, keys: int, causal: bool, keep: Tensor | None) -> Tensor:
    seen = torch.ones(2, 1, length, keys, dtype=torch.bool)
    seen = seen.tril(keys - length) if causal else seen
    return seen if keep is None else seen & keep[:, None, None]


def softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, bias: Any = 0.0) -> tuple:
    """(o, logsumexp), row by row sums; a row that sees nothing gives 0 and −inf."""
    raised = (q @ k.mT / q.shape[-1] ** 0.5 + bias).exp() * seen
    total = raised.sum(-1, keepdim=True)
    return raised @ v / total.masked_fill(total == 0, 1), total[..., 0].log()


def same(got: Tensor, want: Tensor, wrt: list[Tensor]) -> None:
    """Equal values, and equal gradients of a random projection of them."""
    assert_close(got, want)
    toward = normal(*want.shape, seed=9)
    found, wanted = (
        torch.autograd.grad(t, wrt, toward, retain_graph=True, materialize_grads=True)
        for t in (got, want)
    )
    assert_close(found, wanted)


class Elsewhere(TorchFunctionMode):
    """Lets a tile believe that it is not on a CPU, so that it takes the plain formula."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return torch.device("meta")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), SHAPES)
def test_every_form_is_the_softmax(
    length: int, keys: int, causal: bool, masked: bool, form: str
) -> None:
    """With S > L the last query sees the last key, with L > S the first queries see nothing."""
    q, k, v = inputs(length, keys)
    keep = kept(keys) if masked else None
    if form == "fused":
        got = dense.attend(q, k, v, causal=causal, keep=keep)
    elif form == "union":
        got, _ = dense.union(q, [(dense.Whole(causal=causal, keep=keep, tile=3), k, v)])
    elif form == "tiled":
        got, _ = dense.tiled(q, k, v, causal=causal, keep=keep, tile=3 if length < 99 else 256)
    else:
        got = dense.explicit(q, k, v, seen=allowed(length, keys, causal, keep))[0]
    same(got, softmax(q, k, v, allowed(length, keys, causal, keep))[0], [q, k, v])


@pytest.mark.parametrize(("width", "value"), [(4, 9), (9, 4), (3, 1), (1, 3), (8, 8)])
@pytest.mark.parametrize("causal", [False, True])
def test_values_may_be_wider_or_narrower(causal: bool, width: int, value: int) -> None:
    for length, keys in ((9, 9), (4, 9)):
        q, k, v = inputs(length, keys, width=width, value=value)
        want = softmax(q, k, v, allowed(length, keys, causal, None))[0]
        same(dense.attend(q, k, v, causal=causal), want, [q, k, v])
        got, _ = dense.union(q, [(dense.Whole(causal=causal), k, v)])
        same(got, want, [q, k, v])


@pytest.mark.parametrize("causal", [False, True])
def test_logsumexp_is_that_of_the_scores(causal: bool) -> None:
    q, k, v = inputs(7, 11)
    keep = kept(11)
    _, want = softmax(q, k, v, allowed(7, 11, causal, keep))
    for lse in (
        dense.union(q, [(dense.Whole(causal=causal, keep=keep), k, v)])[1],
        dense.tiled(q, k, v, causal=causal, keep=keep, tile=3)[1],
        dense.explicit(q, k, v, seen=allowed(7, 11, causal, keep))[2],
    ):
        assert_close(lse, want)


@pytest.mark.parametrize("length", [255, 256, 257])
def test_tiles_end_where_they_may(length: int) -> None:
    q, k, v = inputs(length, length + 2, heads=1)
    want = softmax(q, k, v, allowed(length, length + 2, True, None))[0]
    same(dense.tiled(q, k, v, causal=True)[0], want, [q, k, v])
    got, _ = dense.union(q, [(dense.Whole(causal=True, tile=128), k, v)])
    same(got, want, [q, k, v])


def test_a_union_shares_one_softmax() -> None:
    """Three key sets, one of them seen by no one and one of them causal."""
    q, k, v = inputs(7, 7)
    more = [normal(2, 2, 5, 4, seed=5), normal(2, 2, 5, 6, seed=6)]
    k2, v2 = (t.requires_grad_() for t in more)
    nobody = torch.zeros(2, 7, dtype=torch.bool)
    k3, v3 = (
        normal(2, 2, 7, 4, seed=7).requires_grad_(),
        normal(2, 2, 7, 6, seed=8).requires_grad_(),
    )
    got, lse = dense.union(
        q,
        [
            (dense.Whole(causal=True), k, v),
            (dense.Whole(keep=kept(5)), k2, v2),
            (dense.Whole(keep=nobody), k3, v3),
        ],
    )
    seen = torch.cat(
        [
            allowed(7, 7, True, None),
            allowed(7, 5, False, kept(5)),
            allowed(7, 7, False, nobody),
        ],
        -1,
    )
    want, want_lse = softmax(q, torch.cat([k, k2, k3], 2), torch.cat([v, v2, v3], 2), seen)
    assert_close(lse, want_lse)
    same(got, want, [q, k, v, k2, v2, k3, v3])


@pytest.mark.parametrize("causal", [False, True])
def test_empty_keys_and_batches_give_zero(causal: bool) -> None:
    for length in (0, 1, 3):
        q, k, v = inputs(length, 0)
        for form in (
            dense.attend(q, k, v, causal=causal),
            dense.tiled(q, k, v, causal=causal)[0],
            dense.union(q, [(dense.Whole(causal=causal), k, v)])[0],
            dense.explicit(q, k, v)[0],
        ):
            assert form.shape == (2, 2, length, 6)
            assert not form.any()
            grads = torch.autograd.grad(form.sum(), [q, k, v], materialize_grads=True)
            assert not any(g.any() for g in grads)
    q, k, v = (t[:0] for t in inputs(5, 5))
    assert dense.attend(q, k, v, causal=causal).shape == (0, 2, 5, 6)
    assert dense.union(q, [(dense.Whole(causal=causal), k, v)])[0].shape == (0, 2, 5, 6)
    assert dense.tiled(q, k, v, causal=causal)[0].shape == (0, 2, 5, 6)


@pytest.mark.parametrize("causal", [False, True])
def test_union_passes_gradcheck(causal: bool) -> None:
    q, k, v = inputs(3, 5, width=2, value=2)
    layout = dense.Whole(causal=causal, keep=kept(5), tile=2)
    square = dense.Whole(causal=causal)

    def run(*t: Tensor) -> Tensor:
        return dense.union(t[0], [(layout, t[1], t[2]), (square, t[0], t[0])])[0]

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_hooks_and_scale_agree_between_tiles_and_matrix() -> None:
    q, k, v = inputs(7, 11)
    slope = torch.tensor([0.3, -0.2], dtype=torch.float64).requires_grad_()
    span = torch.tensor(4.0, dtype=torch.float64).requires_grad_()

    def bias(q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return slope[:, None, None] * (i[:, None] - j)

    def multiplier(i: Tensor, j: Tensor) -> Tensor:
        return 1 / (1 + (i[:, None] - j).abs() / span)

    def gate(i: Tensor, j: Tensor) -> Tensor:
        return ((span - (i[:, None] - j)) / 2 + 1).clamp(0, 1)

    i, j = torch.arange(4, 11), torch.arange(11)
    scores = (q @ k.mT * 0.7) * multiplier(i, j) + bias(q, k, i, j)
    scores = scores.masked_fill(~allowed(7, 11, True, None), -math.inf)
    want = scores.softmax(-1) * gate(i, j) @ v
    hooks: Any = {"bias": bias, "multiplier": multiplier, "gate": gate}
    got, _ = dense.tiled(q, k, v, causal=True, scale=0.7, tile=3, **hooks)
    same(got, want, [q, k, v, slope, span])
    whole, weights, _ = dense.explicit(
        q,
        k,
        v,
        seen=allowed(7, 11, True, None),
        bias=bias(q, k, i, j),
        multiplier=multiplier(i, j),
        gate=gate(i, j),
        scale=0.7,
    )
    same(whole, want, [q, k, v, slope, span])
    assert_close(weights @ v, want)


def test_a_tile_is_recomputed_rather_than_kept() -> None:
    """The scores of 512 × 512 pairs are saved by the matrix and not by the tiles."""
    q, k, v = inputs(512, 512, heads=1)

    def saved(run: Any) -> int:
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run()
        return sum(found.values())

    matrix = 2 * 512 * 512 * 8
    assert saved(lambda: dense.explicit(q, k, v)) >= matrix
    assert saved(lambda: dense.tiled(q, k, v, tile=64)) < matrix / 8
    assert saved(lambda: dense.union(q, [(dense.Whole(causal=True), k, v)])) < matrix / 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype: torch.dtype) -> None:
    q, k, v = (t.detach() for t in inputs(9, 300))
    q, k, v = (t.to(dtype) for t in (q, k, v))
    want, _ = softmax(q.double(), k.double(), v.double(), allowed(9, 300, True, None))
    eps = torch.finfo(dtype).eps
    for got, lse in (
        dense.tiled(q, k, v, causal=True),
        dense.explicit(q, k, v, seen=allowed(9, 300, True, None))[::2],
        dense.union(q, [(dense.Whole(causal=True), k, v)]),
    ):
        assert (got.dtype, lse.dtype) == (dtype, torch.float32)
        assert_close(got.double(), want, atol=2 * eps, rtol=2 * eps)


def test_dropout_falls_on_the_weights() -> None:
    """Each output is a sum over kept weights divided by 1 − p: p of them vanish."""
    q, k = (torch.zeros(1, 1, 200, 4) for _ in range(2))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, weights, _ = dense.explicit(q, k, torch.eye(200)[None, None], dropout=0.25)
        assert weights.mul(200).unique().tolist() == pytest.approx([0, 4 / 3])
        for keep in (None, torch.ones(1, 200, dtype=torch.bool)):
            o = dense.attend(q, k, torch.eye(200)[None, None], dropout=0.25, keep=keep)
            assert abs((o == 0).double().mean() - 0.25) < 0.01
            assert abs(o.sum(-1).mean() - 1) < 0.01


@pytest.mark.parametrize(("length", "keys"), [(1, 1), (5, 5), (3, 7)])
@pytest.mark.parametrize("masked", [False, True])
def test_plain_tiles_equal_the_kernels(length: int, keys: int, masked: bool) -> None:
    """What other devices compute with, one row of the mask seeing nothing."""
    q, k, v = (t.detach() for t in inputs(length, keys))
    mask = None
    if masked:
        seen = torch.rand(2, 1, length, keys, generator=torch.Generator().manual_seed(4)) > 0.4
        seen[..., 0], seen[1, :, 0] = True, False
        mask = dense.additive(seen, q.dtype)
    o, lse = dense.tile_forward(q, k, v, mask, 0.7)
    with Elsewhere():
        plain_o, plain_lse = dense.tile_forward(q, k, v, mask, 0.7)
    assert_close((plain_o, plain_lse), (o, lse))
    do, lse = normal(*o.shape, seed=5), lse.masked_fill(lse == -math.inf, 0)
    grads = dense.tile_backward(do, q, k, v, o, lse, mask, 0.7)
    with Elsewhere():
        plain = dense.tile_backward(do, q, k, v, o, lse, mask, 0.7)
    assert_close(plain, grads)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    scores = q @ k.mT * 0.7 + (0 if mask is None else mask)
    want = scores.softmax(-1).nan_to_num(0) @ v
    if not masked:
        assert_close(grads, torch.autograd.grad(want, (q, k, v), do))


def test_plain_tiles_are_another_formula() -> None:
    """The mode above does take the other branch: it accepts what the CPU kernel would not."""
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            called.append(func.name())
            return func(*args, **(kwargs or {}))

    q, k, v = (t.detach() for t in inputs(3, 3))
    with Watch(), Elsewhere():
        dense.tile_forward(q, k, v, None, 1.0)
    assert not any("flash" in name for name in called)
    assert any("softmax" in name or "logsumexp" in name for name in called)


@pytest.mark.parametrize("form", ["explicit", "tiled"])
def test_autocast_leaves_scores_in_float32(form: str) -> None:
    q, k, v = (3 * t.detach().float() for t in inputs(9, 9))
    run = getattr(dense, form)
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(q, k, v)[0]
    assert_close(inside, run(q, k, v)[0])
