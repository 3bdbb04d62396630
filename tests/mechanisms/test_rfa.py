"""RFA: its estimate, gate, pool and cached cross-attention."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from longspan.errors import LongspanError
from longspan.nn import MultiHead
from longspan.registry import build
from longspan.testing.oracles import oracle_of
from longspan.testing.oracles.features import held


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(queries: int = 40, keys: int = 40) -> list[Tensor]:
    return [
        normal(2, 3, n, 8, seed=i).requires_grad_() for i, n in enumerate((queries, keys, keys))
    ]


def rfa(**arguments: Any) -> Any:
    arguments = {"heads": 3, "head_width": 8, "features": 16} | arguments
    return build("rfa", **arguments).double().eval()


@pytest.mark.parametrize("temperature", [0.8, 1.0])
def test_estimates_softmax_over_unit_queries_and_keys(temperature: float) -> None:
    """The error falls with the root of the features."""
    q, k, v = (t.detach() for t in qkv(20, 20))
    x, y = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    truth = (x @ y.mT / temperature**2).softmax(-1) @ v

    def error(count: int) -> float:
        ops = [rfa(features=count, seed=s, pool=1, temperature=temperature) for s in range(6)]
        return torch.stack([(op(q, k, v)[0] - truth).square().mean() for op in ops]).mean().item()

    assert 25 < error(64) / error(4096) < 160  # 64 in expectation


def test_products_average_to_the_gaussian_kernel() -> None:
    x, y = (F.normalize(normal(1, 3, 1, 8, seed=s), dim=-1) for s in (1, 2))
    op = rfa(features=50000, pool=1)
    phi = op.map(op.draw(1))
    found = (phi(x, None)[0] * phi(y, None)[0]).sum(-1)
    assert_close(found, (-(x - y).square().sum(-1) / 2).exp(), atol=0.02, rtol=0)


def test_arccos() -> None:
    op, (q, k, v) = rfa(kernel="arccos"), qkv()
    w = op.pool[0]
    a, b = (F.relu(F.normalize(t, dim=-1) @ w.mT) / 4 for t in (q, k))
    assert_close(op(q, k, v)[0], held(a @ b.mT, v, op.eps))


def test_a_gate_is_its_decay_matrix() -> None:
    """Values and gradients, the gate's parameters among them; masked too."""
    op, (q, k, v) = rfa(causal=True, gate=True), qkv(100, 100)
    formula: Any = oracle_of("rfa")
    keep = torch.rand(2, 100, generator=torch.Generator().manual_seed(3)) > 0.3
    wrt = (q, k, v, *op.parameters())
    for mask in (None, keep):
        rows = 1 if mask is None else mask[:, None, :, None]
        got, want = op(q, k, v, keep=mask)[0] * rows, formula(op, q, k, v, keep=mask) * rows
        assert_close(got, want)
        found = torch.autograd.grad((got * got).sum(), wrt)
        assert_close(found, torch.autograd.grad((want * want).sum(), wrt))


def test_a_gate_of_a_half_is_geometric() -> None:
    op, (q, k, v) = rfa(causal=True, gate=True), qkv()
    with torch.no_grad():
        op.gate.zero_()
    phi = op.map(op.draw(2))
    i = torch.arange(40)
    weights = phi(q, None)[0] @ phi(k, None)[0].mT * 0.5 ** (i[:, None] - i + 1).double()
    assert_close(op(q, k, v)[0], held(weights.tril(), v, op.eps))


def test_a_gated_state_is_stepped_on() -> None:
    op, (q, k, v) = rfa(causal=True, gate=True), qkv()
    outs, state = [], None
    for piece in zip(*(t.split([25, 1, 14], 2) for t in (q, k, v)), strict=True):
        o, state = op(*piece, state)
        outs.append(o)
    assert_close(torch.cat(outs, 2), op(q, k, v)[0])


def test_the_gate_has_a_projection_of_its_own() -> None:
    layer: Any = MultiHead(rfa(causal=True, gate=True), width=24, heads=3).double()
    x = normal(2, 9, 24)
    before = layer(x)[0]
    layer(x)[0].sum().backward()
    assert layer.project["gated"].weight.grad.any()
    with torch.no_grad():
        layer.project["gated"].weight.neg_()
    assert not torch.allclose(layer(x)[0], before)


def test_a_cross_attention_keeps_the_encoders_sums() -> None:
    op, (q, k, v) = rfa(), qkv(7, 40)
    keep = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) > 0.3
    memory = op.remember(k, v, keep=keep)
    steps = [op.recall(t, memory) for t in q.split(1, 2)]
    assert_close(torch.cat(steps, 2), op(q, k, v, keep=keep)[0])


def test_training_draws_from_the_pool_and_evaluation_does_not() -> None:
    op, (q, k, v) = rfa(causal=True, pool=8).train(), qkv()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        outs = [op(q, k, v)[0] for _ in range(4)]
        assert not all(torch.allclose(outs[0], o) for o in outs)
        # A carried state goes on with the matrices it was summed with.
        o, state = op(q[:, :, :20], k[:, :, :20], v[:, :, :20])
        rest, after = op(q[:, :, 20:], k[:, :, 20:], v[:, :, 20:], state)
    assert torch.equal(after.draw, state.draw)
    op.eval()
    assert torch.equal(op(q, k, v)[0], op(q, k, v)[0])
    other = rfa(causal=True, pool=8, seed=1)
    other.load_state_dict(op.state_dict())
    assert torch.equal(other(q, k, v)[0], op(q, k, v)[0])
    with torch.no_grad():
        other.pool.copy_(op.pool[state.draw[0, 0]].expand_as(op.pool))
    chosen = torch.cat([o, rest], 2)[:, :1]
    assert_close(other(q, k, v)[0][:, :1], chosen)


def test_denominators_are_held_away_from_zero() -> None:
    op, (q, k, v) = rfa(features=1, pool=1, causal=True), qkv(300, 300)
    o, _ = op(q, k, v)
    assert o.isfinite().all()
    assert o.abs().max() <= 300 * v.abs().max() / op.eps


def test_refusals() -> None:
    with pytest.raises(LongspanError, match="causal=True"):
        rfa(gate=True)
    with pytest.raises(LongspanError, match="pool=0"):
        rfa(pool=0)
