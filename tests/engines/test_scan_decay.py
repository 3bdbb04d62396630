"""Decays and the delta rule of the scan engine, against one token after another."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import scan
from longspan.engines.scan import plan

LENGTHS = [1, 2, 8, 9, 24, 53]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK", 8)
    monkeypatch.setattr(plan, "GROUP", 3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(length: int, keys: int, *, batch: int = 2) -> Any:
    """q, k, v, state, log decays, rates and erasing keys."""
    q, k, e = (normal(batch, 3, n, 4, seed=i) for i, n in enumerate((length, keys, keys)))
    v, state = normal(batch, 3, keys, 5, seed=3), normal(batch, 3, 4, 5, seed=4)
    decay, rate = -normal(batch, 3, keys, seed=5).square(), normal(batch, 3, keys, seed=6).sigmoid()
    return [t.requires_grad_() for t in (q, k, v, state, decay, rate, e)]


def recurrence(q: Any, k: Any, v: Any, s: Any, decay: Any, rate: Any, erase: Any) -> Any:
    outs, earlier = [], k.shape[2] - q.shape[2]
    for t in range(k.shape[2]):
        if decay is not None:
            s = s * decay[:, :, t, None, None].exp()
        new = v[:, :, t]
        if rate is not None:
            new = rate[:, :, t, None] * (new - (erase[:, :, t, :, None] * s).sum(2))
        s = s + k[:, :, t, :, None] * new[:, :, None]
        if t >= earlier:
            outs.append((q[:, :, t - earlier, :, None] * s).sum(2))
    return torch.stack(outs, 2), s


def same(got: Any, want: Any, wrt: Any) -> None:
    assert_close(got, want)
    toward = [normal(*t.shape, seed=9 + i) for i, t in enumerate(want)]
    assert_close(torch.autograd.grad(got, wrt, toward), torch.autograd.grad(want, wrt, toward))


@pytest.mark.parametrize(("length", "keys"), [*((n, n) for n in LENGTHS), (1, 9), (20, 31)])
def test_decays_of_a_head_and_token(length: int, keys: int) -> None:
    """Values, and gradients to the decays and the state that comes in and goes out."""
    q, k, v, s, decay, _, _ = inputs(length, keys)
    got = scan.outer(q, k, v, s, decay=decay)
    same(got, recurrence(q, k, v, s, decay, None, None), (q, k, v, s, decay))


@pytest.mark.parametrize("length", [1, 30])
def test_one_decay_a_head(length: int) -> None:
    q, k, v, s, decay, _, _ = inputs(length, length)
    heads = decay[0, :, 0].detach().requires_grad_()
    every = heads[None, :, None].expand(k.shape[:3])
    got = scan.outer(q, k, v, s, decay=heads)
    same(got, recurrence(q, k, v, s, every, None, None), (q, k, v, s, heads))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(("length", "keys"), [*((n, n) for n in LENGTHS), (1, 9), (20, 31)])
def test_the_delta_rule(length: int, keys: int, own: bool) -> None:
    """The chunked WY form is the recurrence, in gradients too."""
    q, k, v, s, _, rate, erase = inputs(length, keys)
    got = scan.delta(q, k, v, rate, s, erase=None if own else erase)
    wrt = (q, k, v, s, rate) if own else (q, k, v, s, rate, erase)
    same(got, recurrence(q, k, v, s, None, rate, k if own else erase), wrt)


def test_both_pass_gradcheck() -> None:
    q, k, v, s, decay, rate, erase = (t[:1, :1].detach().requires_grad_() for t in inputs(19, 19))

    def faded(q: Tensor, k: Tensor, v: Tensor, s: Tensor, decay: Tensor) -> Any:
        return scan.outer(q, k, v, s, decay=decay)

    def erased(q: Tensor, k: Tensor, v: Tensor, rate: Tensor, s: Tensor, erase: Tensor) -> Any:
        return scan.delta(q, k, v, rate, s, erase=erase)

    assert torch.autograd.gradcheck(faded, (q, k, v, s, decay), fast_mode=True)
    assert torch.autograd.gradcheck(erased, (q, k, v, rate, s, erase), fast_mode=True)


@pytest.mark.parametrize("pieces", [[1] * 40, [17, 1, 22], [39, 1]])
def test_pieces_and_single_tokens_give_the_whole(pieces: list[int]) -> None:
    q, k, v, s, decay, rate, erase = inputs(40, 40)
    faded, erased, last, carried = [], [], s, s
    for a in zip(*(t.split(pieces, 2) for t in (q, k, v, decay, rate, erase)), strict=True):
        o, last = scan.outer(*a[:3], last, decay=a[3])
        faded.append(o)
        o, carried = scan.delta(*a[:3], a[4], carried, erase=a[5])
        erased.append(o)
    assert_close((torch.cat(faded, 2), last), scan.outer(q, k, v, s, decay=decay))
    assert_close((torch.cat(erased, 2), carried), scan.delta(q, k, v, rate, s, erase=erase))


def test_no_decay_overflows_and_none_is_free() -> None:
    """exp(−1e4) between two chunks' ends is 0, not 0·∞; decays of 0 change no bit."""
    q, k, v, s, decay, _, _ = inputs(40, 40)
    wrt = (q, k, v, s, decay)
    o, last = scan.outer(q, k, v, s, decay=decay * 1e4)
    grads = torch.autograd.grad(o.sum() + last.sum(), wrt)
    assert all(t.isfinite().all() for t in (o, last, *grads))
    zero = torch.zeros_like(decay)
    assert_close(scan.outer(q, k, v, s, decay=zero), scan.outer(q, k, v, s), rtol=0, atol=0)
    mixed = zero.clone()
    mixed[:, :, 30] = -1.0  # looked at span by span: earlier bits must not depend on later decays
    early = scan.outer(q, k, v, s, decay=mixed)[0][:, :, :30]
    assert torch.equal(early, scan.outer(q, k, v, s)[0][:, :, :30])


def test_states_are_float32_under_bfloat16() -> None:
    q, k, v, _, decay, rate, _ = (t.detach().bfloat16() for t in inputs(30, 30))
    for o, s in (scan.outer(q, k, v, decay=decay), scan.delta(q, k, v, rate)):
        assert (o.dtype, s.dtype) == (torch.bfloat16, torch.float32)


def test_a_rewritten_key_returns_its_last_value() -> None:
    """Orthonormal keys and rate 1: the delta rule replaces, the sum rule adds (Sec. 4.2)."""
    keys = torch.linalg.qr(normal(4, 4)).Q
    order = [0, 1, 0, 2, 1, 3, 0]
    k, v = keys[order][None, None], normal(1, 1, 7, 5)
    ones = torch.ones(1, 1, 7, dtype=torch.float64)
    final = scan.delta(k, k, v, ones)[1][0, 0]
    last = [6, 4, 3, 5]
    assert_close(keys @ final, v[0, 0, last])
    added = keys @ scan.outer(k, k, v)[1][0, 0]
    assert_close(added[0], v[0, 0, [0, 2, 6]].sum(0))


def test_what_is_written_is_read_at_once() -> None:
    """Unit keys and rate 1: W_i k_i = v_i after every write."""
    k, v = torch.nn.functional.normalize(normal(1, 2, 30, 4), dim=-1), normal(1, 2, 30, 5)
    o, _ = scan.delta(k, k, v, torch.ones(1, 2, 30, dtype=torch.float64))
    assert_close(o, v)


def test_empty_batches() -> None:
    q, k, v, s, decay, rate, _ = (t[:0] for t in inputs(9, 9))
    assert scan.outer(q, k, v, s, decay=decay)[0].shape == (0, 3, 9, 5)
    assert scan.delta(q, k, v, rate, s)[0].shape == (0, 3, 9, 5)
