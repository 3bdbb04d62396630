"""The scan engine against one outer product a token."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import scan
from longspan.engines.scan import plan

LENGTHS = [1, 2, 63, 64, 65, 127, 193]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def inputs(length: int, keys: int, *, width: int = 3, value: int = 5, batch: int = 2) -> Any:
    q, k = normal(batch, 2, length, width), normal(batch, 2, keys, width, seed=1)
    v, state = normal(batch, 2, keys, value, seed=2), normal(batch, 2, width, value, seed=3)
    return [t.requires_grad_() for t in (q, k, v, state)]


def recurrence(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """S ← S + k vᵀ and o = qᵀ S, the last query beside the last key."""
    s = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3]) if state is None else state
    outs, earlier = [], k.shape[2] - q.shape[2]
    for t in range(k.shape[2]):
        s = s + k[:, :, t, :, None] * v[:, :, t, None, :]
        if t >= earlier:
            outs.append((q[:, :, t - earlier, :, None] * s).sum(2))
    return torch.stack(outs, 2) if outs else q.new_zeros(*q.shape[:3], v.shape[3]), s


def check(q: Tensor, k: Tensor, v: Tensor, state: Tensor | None) -> None:
    """Values and gradients, of the output and of the state that comes out."""
    got, want = scan.outer(q, k, v, state), recurrence(q, k, v, state)
    assert_close(got, want)
    wrt = [t for t in (q, k, v, state) if t is not None]
    toward = [normal(*t.shape, seed=5 + i) for i, t in enumerate(want)]
    found, wanted = (
        torch.autograd.grad(outs, wrt, toward, materialize_grads=True) for outs in (got, want)
    )
    assert_close(found, wanted)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_outer_is_the_recurrence(length: int, started: bool) -> None:
    q, k, v, state = inputs(length, length)
    check(q, k, v, state if started else None)


@pytest.mark.parametrize(("width", "value"), [(1, 7), (7, 1), (4, 4)])
def test_values_may_be_wider_or_narrower(width: int, value: int) -> None:
    check(*inputs(70, 70, width=width, value=value))


@pytest.mark.parametrize(("length", "keys"), [(1, 9), (5, 80), (66, 67)])
def test_earlier_keys_come_before_all_queries(length: int, keys: int) -> None:
    check(*inputs(length, keys))


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_rows_and_groups_of_chunks_split_anywhere(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "CHUNK", 4)
    monkeypatch.setattr(plan, "GROUP", 3)
    for length in (2, 4, 12, 13, 30):
        check(*inputs(length, length, batch=batch))


def test_passes_gradcheck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "CHUNK", 3)
    monkeypatch.setattr(plan, "GROUP", 2)
    tensors = inputs(8, 8, width=2, value=2, batch=1)
    assert torch.autograd.gradcheck(scan.outer, tuple(tensors))


@pytest.mark.parametrize("pieces", [[65, 1, 64], [1, 129], [100, 30]])
def test_any_pieces_give_the_whole(pieces: list[int]) -> None:
    q, k, v, state = inputs(130, 130)
    whole, last = scan.outer(q, k, v, state)
    outs, carried = [], state
    for one in zip(*(t.split(pieces, 2) for t in (q, k, v)), strict=True):
        o, carried = scan.outer(one[0], one[1], one[2], carried)
        outs.append(o)
    assert_close((torch.cat(outs, 2), carried), (whole, last))


def test_total_is_all_keys_for_every_query() -> None:
    q, k, v, _ = inputs(4, 9)
    assert_close(scan.total(q, k, v), q @ (k.mT @ v))
    assert torch.autograd.gradcheck(scan.total, (q, k, v))


def test_empty_batches_keys_and_queries() -> None:
    q, k, v, state = inputs(5, 5)
    o, last = scan.outer(q[:0], k[:0], v[:0], state[:0])
    assert (o.shape, last.shape) == ((0, 2, 5, 5), (0, 2, 3, 5))
    assert scan.total(q[:0], k[:0], v[:0]).shape == (0, 2, 5, 5)
    o, last = scan.outer(q[:, :, :0], k[:, :, :0], v[:, :, :0], state)
    assert o.shape == (2, 2, 0, 5)
    assert_close(last, state)
    assert not scan.total(q, k[:, :, :0], v[:, :, :0]).any()


@pytest.mark.parametrize("length", [1, 300])
def test_low_precision_keeps_a_float32_state(length: int) -> None:
    """In bfloat16 a running sum of ones stops at 256; here it goes on."""
    ones = torch.ones(1, 1, length, 2, dtype=torch.bfloat16)
    o, state = scan.outer(ones, ones, ones)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close(state, torch.full((1, 1, 2, 2), float(length)))
    more, state = scan.outer(ones, ones, ones, state)
    assert (more.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close(state, torch.full((1, 1, 2, 2), 2.0 * length))


def test_autocast_leaves_the_sums_alone() -> None:
    q, k, v, state = (t.detach().float() for t in inputs(130, 130))

    def sums() -> Any:
        return scan.outer(q, k, v, state), scan.outer(q[:, :, :1], k, v), scan.total(q, k, v)

    with torch.autocast("cpu", torch.bfloat16):
        inside = sums()
    assert_close(inside, sums(), rtol=0, atol=0)


def test_backward_under_autocast_is_that_without() -> None:
    q, k, v, state = (t.detach().float().requires_grad_() for t in inputs(70, 70))

    def grads() -> Any:
        return torch.autograd.grad(scan.outer(q, k, v, state)[0].sum(), (q, k, v, state))

    with torch.autocast("cpu", torch.bfloat16):
        inside = grads()
    assert_close(inside, grads(), rtol=0, atol=0)


def test_saved_memory_does_not_hold_a_state_per_token_or_chunk() -> None:
    """Beside the inputs, one D × V state for every GROUP chunks."""
    length, width = 4096, 16
    q, k, v = (normal(1, 1, length, width, seed=i).requires_grad_() for i in range(3))
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        scan.outer(q, k, v)
    groups = length // (plan.CHUNK * plan.GROUP)
    assert sum(found.values()) == 3 * length * width + groups * width * width
