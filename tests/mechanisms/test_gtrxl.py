"""GTrXL's gates: the paper's formulas, near the identity at the start, and in a model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longspan import LongspanError, build
from longspan.mechanisms.rl.gtrxl import Gate
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import Block, FeedForward, MultiHead

WIDTH = 12
GATES: list[Gate] = ["none", "input", "output", "highway", "sigtanh", "gru"]


def gate_of(gate: Gate, **options: Any) -> Any:
    torch.manual_seed(0)
    return build("gtrxl", width=WIDTH, gate=gate, **options).double()


def pair() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 2, 5, WIDTH, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), y.requires_grad_()


def written_out(gate: Any, x: Tensor, y: Tensor) -> Tensor:
    """Parisotto et al., Sec. 3.2, token by token; σ(a) as 1 / (1 + exp(−a))."""
    at = {name: linear.weight for name, linear in gate.maps.items()}
    b, rows = gate.bias, []

    def sigma(a: Tensor) -> Tensor:
        return 1 / (1 + (-a).exp())

    for x_t, y_t in zip(x.reshape(-1, WIDTH), y.reshape(-1, WIDTH), strict=True):
        y_t = y_t.clamp(min=0)
        match gate.gate:
            case "none":
                g = x_t + y_t
            case "input":
                g = sigma(at["w"] @ x_t) * x_t + y_t
            case "output":
                g = x_t + sigma(at["w"] @ x_t - b) * y_t
            case "highway":
                s = sigma(at["w"] @ x_t + b)
                g = s * x_t + (1 - s) * y_t
            case "sigtanh":
                g = x_t + sigma(at["w"] @ y_t - b) * torch.tanh(at["u"] @ y_t)
            case _:
                r = sigma(at["w_r"] @ y_t + at["u_r"] @ x_t)
                z = sigma(at["w_z"] @ y_t + at["u_z"] @ x_t - b)
                h = torch.tanh(at["w_g"] @ y_t + at["u_g"] @ (r * x_t))
                g = (1 - z) * x_t + z * h
        rows.append(g)
    return torch.stack(rows).view(x.shape)


@pytest.mark.parametrize("gate", GATES)
def test_each_gate_is_its_formula(gate: Gate) -> None:
    built, (x, y) = gate_of(gate, bias=0.7), pair()
    of = [x, y, *built.parameters()]
    got, want = built.combine(x, y), written_out(built, x, y)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), of),
        torch.autograd.grad(want.sin().sum(), of),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gate", ["output", "highway", "sigtanh", "gru"])
def test_a_great_b_lets_the_stream_pass_alone(gate: Gate) -> None:
    x, y = pair()
    torch.testing.assert_close(gate_of(gate, bias=1e3).combine(x, y), x, rtol=0, atol=1e-12)
    near, far = ((gate_of(gate, bias=b).combine(x, y) - x).norm().item() for b in (4.0, 0.0))
    assert near < far / 4


@pytest.mark.parametrize("gate", GATES)
def test_b_is_an_argument_and_learned_where_the_gate_has_one(gate: Gate) -> None:
    built = gate_of(gate)
    if gate in ("none", "input"):
        assert built.bias is None
    else:
        assert torch.equal(built.bias, torch.full((WIDTH,), 2.0, dtype=torch.float64))
        assert built.bias.requires_grad
    assert sum(p.numel() for p in built.parameters()) == (
        len(built.maps) * WIDTH**2 + (0 if built.bias is None else WIDTH)
    )


def test_the_branch_is_rectified_before_the_gate() -> None:
    x, y = pair()
    torch.testing.assert_close(gate_of("none").combine(x, y), x + F.relu(y))
    torch.testing.assert_close(gate_of("none", relu=False).combine(x, y), x + y)


def test_a_layer_is_the_papers() -> None:
    """Y = g_att(E, relu(MHA(LN E))), E' = g_mlp(Y, relu(MLP(LN Y))), each with its own gate."""
    torch.manual_seed(0)
    block = Block(
        MultiHead(build("multi-head-attention", causal=True), width=WIDTH, heads=3),
        FeedForward(WIDTH),
        width=WIDTH,
        residual=lambda: build("gtrxl", width=WIDTH),
    ).double()
    first, second = block.mixer_residual, block.feed_forward_residual
    assert first is not None
    assert second is not None
    assert first is not second
    assert block.feed_forward is not None
    assert block.feed_forward_norm is not None
    x, _ = pair()
    y = written_out(first, x, block.mixer(block.mixer_norm(x))[0])
    want = written_out(second, y, block.feed_forward(block.feed_forward_norm(y)))
    torch.testing.assert_close(block(x)[0], want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("gate", GATES)
def test_a_model_of_memory_and_gates_trains_streams_and_saves(gate: Gate, tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = LongspanConfig(
        vocab_size=7,
        width=WIDTH,
        heads=3,
        layers=2,
        mixers=[{"id": "transformer-xl", "memory": 32}],
        position=None,
        residual={"id": "gtrxl", "gate": gate},
    )
    net = LongspanForCausalLM(config).double().train()
    tokens = torch.randint(7, (2, 9), generator=torch.Generator().manual_seed(1))
    net(input_ids=tokens, labels=tokens).loss.backward()
    for name, p in net.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
    net.eval()
    with torch.no_grad():
        whole = net(input_ids=tokens).logits
        past, outs = None, []
        for t in range(9):
            out = net(input_ids=tokens[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            outs.append(out.logits)
        torch.testing.assert_close(torch.cat(outs, 1), whole)
        net.save_pretrained(tmp_path)
        again = LongspanForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
        torch.testing.assert_close(again(input_ids=tokens).logits, whole)


def test_a_gate_fits_under_autocast_and_in_a_post_norm_model() -> None:
    for gate in GATES:
        built, (x, y) = gate_of(gate).float(), pair()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = built.combine(x.float(), y.bfloat16())
        torch.testing.assert_close(out.double(), gate_of(gate).combine(x, y), rtol=0.1, atol=0.1)
    config = LongspanConfig(
        vocab_size=7, width=WIDTH, heads=3, layers=1, norm_order="post", residual="gtrxl"
    )
    LongspanForCausalLM(config)(input_ids=torch.arange(5)[None]).logits.sum().backward()


def test_a_residual_of_another_kind_is_refused() -> None:
    with pytest.raises(LongspanError, match="kind position"):
        LongspanConfig(residual="rope")
    with pytest.raises(LongspanError, match="no argument 'gates'"):
        LongspanConfig(residual={"id": "gtrxl", "gates": "gru"})
