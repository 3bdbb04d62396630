"""Fast weight programmers: rules, features, normalisations and the paper's capacity."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from longspan.errors import LongspanError
from longspan.nn import MultiHead, detach
from longspan.registry import build
from longspan.testing.oracles import oracle_of

KERNELS: list[Any] = ["dpfp", "elu", "favor", torch.exp]
IDS = ["dpfp", "elu", "favor", "exp"]
FORMS = [(k, n) for k in KERNELS for n in ("sum", "attention") if (k, n) != ("favor", "attention")]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def qkv(length: int = 40) -> list[Tensor]:
    return [normal(2, 3, length, 8, seed=i).requires_grad_() for i in range(3)]


def weights(**arguments: Any) -> Any:
    arguments = {"heads": 3, "head_width": 8, "nu": 2} | arguments
    return build("fast-weight-delta-dpfp", **arguments).double().eval()


def sequential(op: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """App. A.2's equations, one token after another; z·φ of sparse features may be 0."""
    rows = None if op.directions is None else op.directions.rows
    fq, fk = op.features(q, rows), op.features(k, rows)
    w, z, ys = q.new_zeros(2, 3, 8, fk.shape[-1]), torch.zeros_like(fk[:, :, 0]), []
    for i in range(q.shape[2]):
        a, b, new = fk[:, :, i], fq[:, :, i], v[:, :, i]
        if op.rule == "delta":
            read = (w @ a[..., None])[..., 0]
            if op.normalise == "attention":
                read = read / ((z * a).sum(-1, keepdim=True).clamp(min=op.eps) if i else 1)
            beta = torch.sigmoid((k[:, :, i] * op.rate).sum(-1, keepdim=True))
            new = beta * (new - read)
        w, z = w + new[..., None] * a[..., None, :], z + a
        y = (w @ b[..., None])[..., 0]
        below = (z * b).sum(-1, keepdim=True).clamp(min=op.eps)
        ys.append(y / below if op.normalise == "attention" else y)
    return torch.stack(ys, 2)


@pytest.mark.parametrize("rule", ["delta", "sum"])
@pytest.mark.parametrize(("kernel", "normalise"), FORMS)
def test_every_form_is_the_recurrence(kernel: Any, normalise: str, rule: str) -> None:
    """Chunked against sequential in values and gradients; then in pieces and by token."""
    op, (q, k, v) = weights(kernel=kernel, normalise=normalise, rule=rule), qkv(70)
    got, want = op(q, k, v)[0], sequential(op, q, k, v)
    assert_close(got, want, rtol=1e-6, atol=1e-8)
    wrt = (q, k, v, *op.parameters())
    toward = normal(*want.shape, seed=9)
    found, wanted = (torch.autograd.grad(t, wrt, toward) for t in (got, want))
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for sizes in ([1] * 70, [30, 1, 39]):
        outs, state = [], None
        for piece in zip(*(t.split(sizes, 2) for t in (q, k, v)), strict=True):
            o, state = op(*piece, state)
            outs.append(o)
        assert_close(torch.cat(outs, 2), got)


def test_the_sum_rule_under_attention_normalisation_is_linear_attention() -> None:
    q, k, v = qkv()
    op = weights(kernel="elu", normalise="attention", rule="sum")
    want, _ = build("linear-transformer", causal=True, eps=0.0)(q, k, v)
    assert_close(op(q, k, v)[0], want)


def test_features_sum_to_one() -> None:
    op, (q, _, _) = weights(), qkv()
    assert_close(op.features(q, None).sum(-1), torch.ones(2, 3, 40).double(), atol=1e-5, rtol=0)
    assert not op.features(torch.zeros(1, 1, 1, 8).double(), None).any()  # 0 / eps, not 0 / 0


def test_the_released_scale() -> None:
    q, k, v = qkv()
    assert_close(weights(scale=8**-0.5)(q, k, v)[0], weights()(q, k, v)[0] * 8**-0.5)


def test_fast_weights_are_carried_between_segments_without_history() -> None:
    op, (q, k, v) = weights(), qkv(60)
    whole, _ = op(q, k, v)
    o, state = op(q[:, :, :30], k[:, :, :30], v[:, :, :30])
    assert state.weights.requires_grad
    rest, _ = op(q[:, :, 30:], k[:, :, 30:], v[:, :, 30:], detach(state))
    assert_close(torch.cat([o, rest], 2), whole)
    grad = torch.autograd.grad(rest.sum(), k)[0]
    assert grad[:, :, 30:].any()
    assert not grad[:, :, :30].any()


@pytest.mark.parametrize(
    ("kernel", "nu", "features"), [("elu", 1, 8), ("dpfp", 1, 16), ("dpfp", 3, 48)]
)
def test_capacity(kernel: str, nu: int, features: int) -> None:
    """Sec. 6.1: M features hold M keys; with more, (n − M) / n is lost however keys are learned."""
    count = 24
    op = weights(heads=1, rule="sum", kernel=kernel, nu=nu, normalise=None)
    keys = normal(1, 1, count, 8, seed=4).requires_grad_()
    values = torch.eye(count, dtype=torch.float64)[None, None]
    optimiser = torch.optim.Adam([keys], 0.1)
    for _ in range(150):
        phi = op.features(keys, None)
        optimiser.zero_grad()
        (phi @ phi.mT - values).square().sum().backward()
        optimiser.step()
    _, state = op(keys, keys, values)
    lost = (op.features(keys, None) @ state.weights - values).square().sum().item() / count
    assert lost >= max(count - features, 0) / count
    assert (lost < (count - 16) / count) == (features == 48)


def test_orthogonal_keys_up_to_the_width_are_held_exactly() -> None:
    keys = torch.eye(8, dtype=torch.float64)[None, None]
    values = normal(1, 1, 8, 8, seed=2)
    op = weights(heads=1, kernel=F.relu, rule="sum", eps=0.0)
    _, state = op(keys, keys, values)
    assert_close(state.weights, values)


def test_the_delta_rule_updates_where_the_sum_rule_piles_up() -> None:
    """Sec. 6.2: keys written again with other values; the delta rule reads the last one."""
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(4, (1, 1, 60), generator=generator)
    keys = torch.eye(8, dtype=torch.float64)[which]
    values = normal(1, 1, 60, 8, seed=2)
    last = torch.stack([values[0, 0, (which[0, 0] == i).nonzero()[-1, 0]] for i in range(4)])
    errors = {}
    for rule in ("delta", "sum"):
        op = weights(heads=1, kernel=F.relu, rule=rule)
        if rule == "delta":
            with torch.no_grad():
                op.rate.fill_(30.0)  # β = 1
        _, state = op(keys, keys, values)
        errors[rule] = (state.weights[0, 0, :4] - last).abs().max().item()
    assert errors["delta"] < 1e-3
    assert errors["sum"] > 1


def test_trains_as_a_layer_with_a_rate_of_its_own() -> None:
    """A causal layer learns to repeat the value of a key seen before; later tokens stay unseen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer: Any = MultiHead(weights(nu=1).float(), width=24, heads=3, biases=False)
        x = torch.randn(8, 12, 24)
        target = x.roll(1, 1)
        target[:, 0] = 0
        optimiser = torch.optim.Adam(layer.parameters(), 1e-2)
        losses = []
        for _ in range(30):
            loss = F.mse_loss(layer(x)[0], target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert layer.project["rate"].weight.grad.any()


def test_later_tokens_of_any_size_change_nothing() -> None:
    op, (q, k, v) = weights(normalise="attention"), qkv()
    longer = torch.cat([k[:, :, :30], k[:, :, 30:] * 1e4], 2)
    assert torch.equal(op(q, longer, v)[0][:, :, :30], op(q, k, v)[0][:, :, :30])


def test_masked_tokens_write_nothing() -> None:
    op, (q, k, v) = weights(normalise="attention"), qkv()
    keep = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) > 0.3
    formula: Any = oracle_of("fast-weight-delta-dpfp")
    assert formula is not None
    rows = keep[0].nonzero()[:, 0]
    alone = op(q[:1, :, rows], k[:1, :, rows], v[:1, :, rows])[0]
    assert_close(op(q, k, v, keep=keep)[0][:1, :, rows], alone)


def test_refusals() -> None:
    with pytest.raises(LongspanError, match="causal=True"):
        weights(causal=False)
    with pytest.raises(LongspanError, match="normalise='sum'"):
        weights(kernel="favor", normalise="attention")
