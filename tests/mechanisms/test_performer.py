"""Performer and its first version: the papers' claims, and what the laws do not reach."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.errors import LongspanError
from longspan.nn import MultiHead
from longspan.registry import build
from longspan.testing.oracles.dense import allowed, softmax
from longspan.testing.oracles.features import held

KERNELS: list[Any] = ["positive", "hyperbolic", "trigonometric", "relu", torch.exp]
IDS = ["positive", "hyperbolic", "trigonometric", "relu", "exp"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(length: int = 70, scale: float = 1.0) -> list[Tensor]:
    return [(normal(2, 3, length, 8, seed=i) * scale).requires_grad_() for i in range(3)]


def performer(**arguments: Any) -> Any:
    arguments = {"heads": 3, "head_width": 8, "features": 16} | arguments
    return build("performer", **arguments).double().eval()


def favor(**arguments: Any) -> Any:
    arguments = {"head_width": 8, "features": 16} | arguments
    return build("performer-favor", **arguments).double().eval()


def written_out(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """D⁻¹ Q′ K′ᵀ V with the same W, the matrix whole."""
    rows = None if attention.directions is None else attention.directions.rows
    (a, _), (b, log) = attention.features(q, rows), attention.features(k, rows)
    seen = allowed(q.shape[2], k.shape[2], attention.causal, None)
    if log is None:
        return held(a @ b.mT * seen, v, attention.eps)
    log = log[..., None, :].masked_fill(~seen, -torch.inf)
    return held(a @ b.mT * (log - log.detach().amax(-1, keepdim=True)).exp(), v, attention.eps)


def same(got: Tensor, want: Tensor, wrt: Any, *, within: float = 1e-7) -> None:
    assert_close(got, want)
    toward = normal(*want.shape, seed=9)
    found, wanted = (torch.autograd.grad(t, wrt, toward) for t in (got, want))
    assert_close(found, wanted, atol=within, rtol=within)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_every_kernel_is_its_matrix(kernel: Any, causal: bool) -> None:
    for more in ({}, {"per_head": True, "norms": "fixed", "directions": "iid"}):
        op = performer(kernel=kernel, causal=causal, **more)
        q, k, v = qkv()
        same(op(q, k, v)[0], written_out(op, q, k, v), (q, k, v))


@pytest.mark.parametrize("kernel", KERNELS, ids=IDS)
def test_every_kernel_steps(kernel: Any) -> None:
    op, (q, k, v) = performer(kernel=kernel, causal=True), qkv(20)
    outs, state = [], None
    for token in zip(*(t.split(1, 2) for t in (q, k, v)), strict=True):
        o, state = op(*token, state)
        outs.append(o)
    assert_close(torch.cat(outs, 2), op(q, k, v)[0])


def test_without_directions() -> None:
    op, (q, k, v) = performer(kernel="relu", projected=False), qkv()
    a, b = (t.relu() * 8**-0.5 + 1e-3 for t in (q, k))
    assert_close(op(q, k, v)[0], held(a @ b.mT, v, 1e-12))


@pytest.mark.parametrize("kernel", ["positive", "hyperbolic", "trigonometric"])
def test_errors_fall_like_one_over_the_root_of_the_features(kernel: str) -> None:
    """Against softmax attention, 64 times the features: about an eighth of the error.

    At small norms: where single features outweigh the rest, few of them are bounded by the values.
    """
    q, k, v = qkv(30)
    q, k, v = q.detach() * 0.4, k.detach() * 0.4, v.detach()
    truth = softmax(q @ k.mT / 8**0.5, torch.ones(30, 30, dtype=torch.bool)) @ v

    def error(count: int) -> float:
        draws = [
            performer(kernel=kernel, features=count, seed=s, directions="iid")(q, k, v)[0]
            for s in range(6)
        ]
        return torch.stack([(d - truth).square().mean() for d in draws]).mean().sqrt().item()

    assert 5 < error(64) / error(4096) < 12


def test_large_norms_neither_overflow_nor_vanish() -> None:
    """Rows of a hundred times the norm, in float32: every row still is a mean of values."""
    op = performer(causal=True).float()
    q, k, v = (t.detach().float() for t in qkv(60))
    ones = torch.ones_like(v)
    assert_close(op(q, k * 100, ones)[0][:, :, :1], ones[:, :, :1])
    assert op(q * 100, k * 100, v)[0].isfinite().all()
    assert_close(op(q, k * 6, ones)[0], ones)


def test_a_trained_softmax_layer_is_converted_by_copying() -> None:
    """q, k, v and o weights fit as they are; with many features the outputs are near."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dense: Any = MultiHead(build("multi-head-attention"), width=24, heads=3).double()
    op = performer(features=8192)
    swapped: Any = MultiHead(op, width=24, heads=3).double()
    missing, unexpected = swapped.load_state_dict(dense.state_dict(), strict=False)
    assert not unexpected
    assert all(name.startswith("attention.") for name in missing)
    x = normal(2, 40, 24) * 0.4  # the variance is exp(|x + y|²) / M
    assert_close(swapped(x)[0], dense(x)[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("causal", [False, True])
def test_features_are_float32_under_autocast(causal: bool) -> None:
    op = performer(causal=causal).float()
    q, k, v = (t.detach().float() for t in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        inside = op(q, k, v)[0]
    assert_close(inside, op(q, k, v)[0], atol=0, rtol=0)


def test_directions_are_in_the_state_dict() -> None:
    one, two = performer(seed=1, per_head=True), performer(seed=2, per_head=True)
    q, k, v = qkv()
    assert not torch.allclose(one(q, k, v)[0], two(q, k, v)[0])
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(q, k, v)[0], two(q, k, v)[0])
    assert one.directions.rows.shape == (3, 16, 8)


def test_redrawing_while_it_trains() -> None:
    op, (q, k, v) = performer(redraw_every=2).train(), qkv()
    outs = [op(q, k, v)[0] for _ in range(4)]
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[1], outs[2])
    outs[0].sum().backward()  # the old graph holds the old draw
    op.eval()
    assert all(torch.equal(op(q, k, v)[0], op(q, k, v)[0]) for _ in range(3))


def test_memory_is_linear() -> None:
    """What autograd keeps grows as fast from 4k to 8k tokens as from 2k to 4k."""

    def kept(length: int) -> int:
        found: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        op = performer(causal=True)
        q, k, v = (t[:1] for t in qkv(length))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            o = op(q, k, v)
        del o
        return sum(found.values())

    small, middle, large = kept(2048), kept(4096), kept(8192)
    assert (large - middle) < 1.1 * 2 * (middle - small)


def test_refusals() -> None:
    with pytest.raises(LongspanError, match="projected=True"):
        performer(projected=False)
    with pytest.raises(LongspanError, match="did you mean 'sigmoid'"):
        favor(activation="sigmod")
    with pytest.raises(LongspanError, match="give an activation"):
        favor(projected=False)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("directions", ["orthogonal", "hadamard", "givens", "iid"])
@pytest.mark.parametrize("norms", ["chi", "fixed"])
def test_favor_with_all_directions(directions: str, norms: str, causal: bool) -> None:
    for phase in (False, True):
        op = favor(directions=directions, norms=norms, causal=causal, phase=phase)
        q, k, v = qkv(30)
        # Denominators of both signs come as near to 0 as 1e-3, and enter squared.
        same(op(q, k, v)[0], written_out(op, q, k, v), (q, k, v), within=1e-5)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(
    "name", ["sigmoid", "exp", "relu", "abs", "gelu", "cos", "tanh", "identity"]
)
def test_generalised_attention(name: str, projected: bool) -> None:
    functions: dict[str, Any] = {
        "exp": torch.exp,
        "sigmoid": torch.sigmoid,
        "relu": torch.relu,
        "abs": torch.abs,
        "gelu": torch.nn.functional.gelu,
        "cos": torch.cos,
        "tanh": torch.tanh,
        "identity": lambda x: x,
    }
    op, (q, k, v) = favor(activation=name, projected=projected), qkv(30)
    a, b = (t @ op.directions.rows.mT if projected else t for t in (q, k))
    a, b = (functions[name](t) * t.shape[-1] ** -0.5 + 1e-3 for t in (a, b))
    same(op(q, k, v)[0], held(a @ b.mT, v, 1e-3), (q, k, v))


def test_weights_can_be_read() -> None:
    """One-hot values give the matrix; it has the rows of a mean and weighs the values."""
    op, (q, k, v) = favor(causal=True, features=512, eps=1e-9), qkv(20)
    weights = op.weights(q, k)
    assert_close(weights @ v, op(q, k, v)[0])
    assert not weights.triu(1).any()
    assert_close(weights.sum(-1), torch.ones(2, 3, 20, dtype=torch.float64))


def test_favor_redraws_from_a_seed() -> None:
    one, two = favor(seed=1), favor(seed=2)
    q, k, v = qkv(20)
    for op in (one, two):
        op.directions.redraw(seed=5)
    assert torch.equal(one(q, k, v)[0], two(q, k, v)[0])
