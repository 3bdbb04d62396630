"""Block-Recurrent Transformer: gates, layouts, feedback, and what a block may know."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers.models.t5.modeling_t5 import T5Attention

from longspan import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.models.block_recurrent import BlockRecurrentConfig, BlockRecurrentForCausalLM
from longspan.nn import reset, state_bytes
from longspan.nn.distances import DistanceBias
from longspan.registry import build

W, E = 4, 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(**arguments: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = {"width": E, "heads": 3, "window": W, "states": 5, "distance": 8, "buckets": 4}
        return build("block-recurrent-transformer", **given | arguments).double().eval()


def in_pieces(call: Any, x: Tensor, sizes: list[int]) -> tuple[Tensor, Any]:
    outs, state = [], None
    for piece in x.split(sizes, 1):
        y, state = call(piece, state)
        outs.append(y)
    return torch.cat(outs, 1), state


FORMS = [(g, lay) for g in ("fixed", "lstm", "full") for lay in ("dual", "single", "skip")]


@pytest.mark.parametrize(("gate", "layout"), FORMS)
def test_gates_and_layouts_stream_learn_and_never_peek(gate: str, layout: str) -> None:
    module, x = layer(gate=gate, layout=layout), normal(2, 14, E).requires_grad_()
    whole, _ = module(x)
    for sizes in ([1] * 14, [4, 4, 4, 2], [3, 10, 1]):
        assert_close(in_pieces(module, x, sizes)[0], whole)
    for t in (2, 3, 7, 8):
        (g,) = torch.autograd.grad(whole[:, : t + 1].sum(), x, retain_graph=True)
        assert not g[:, t + 1 :].any()
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def update(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first block's (state before, attention of the state, state after), written out."""

    def heads(t: Tensor, *, unit: bool) -> Tensor:
        t = t.unflatten(-1, (3, -1))
        return t / t.norm(dim=-1, keepdim=True) if unit else t

    s = module.start
    h = module.slots_norm(s) + module.identity
    of_s, of_x, scale = module.of_slots, module.project, module.slots_scale[:, 0]
    pairs = []
    for q, source, of in (("q", h, of_s), ("q_cross", x, of_x)):
        k, v = heads(of["k"](source), unit=True), heads(of["v"](source), unit=False)
        scores = torch.einsum("ihd,jhd->hij", heads(of_s[q](h), unit=True) * scale, k)
        pairs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1))
    _, state = module(x[None])
    return s, torch.cat(pairs, -1), state.slots[0] + s


def gated(gate: Any, s: Tensor, z: Tensor, y: Tensor) -> Tensor:
    """The three gates as the paper has them."""
    if gate.kind == "fixed":
        g = 1 / (1 + (-gate.bias).exp())
        return s * g + z * (1 - g)
    maps = [torch.nn.functional.linear(y, w.weight, w.bias) for w in gate.weights]
    if gate.kind == "full":
        g = maps[0].sigmoid()
        return s * g + z.tanh() * (1 - g)
    return s * (maps[0] + 1).sigmoid() + z.tanh() * (maps[1] - 1).sigmoid()


@pytest.mark.parametrize(("gate", "layout"), FORMS)
def test_the_state_is_updated_by_its_formula(gate: str, layout: str) -> None:
    module, x = layer(gate=gate, layout=layout), normal(W, E)
    s, y, after = update(module, x)
    if layout != "single":
        s = gated(module.gate, s, module.slots_output(y), y)
    if layout != "skip":
        source = module.inner_norm(s) if layout == "dual" else y
        hidden = module.up(source).relu()
        z = module.down(hidden)
        s = gated(module.last_gate, s, z.tanh() if layout == "single" else z, hidden)
    assert_close(after, s)


def test_a_gate_of_one_keeps_the_state() -> None:
    module = layer()
    with torch.no_grad():
        module.gate.bias.fill_(1e3)
    assert_close(module(normal(2, 14, E))[1].slots, torch.zeros(2, 5, E, dtype=torch.float64))


def test_without_cross_heads_it_is_sliding_window_attention() -> None:
    module, plain, x = layer(), layer(states=0), normal(2, 14, E)
    with torch.no_grad():
        module.output.weight[:, E:] = 0
        plain.output.weight.copy_(module.output.weight[:, :E])
    plain.load_state_dict(
        {n: t for n, t in module.state_dict().items() if n in plain.state_dict() and n[0] != "o"},
        strict=False,
    )
    assert_close(plain(x)[0], module(x)[0])
    (g,) = torch.autograd.grad(plain(x := x.requires_grad_())[0][0, 9].sum(), x)
    assert g[0].any(-1).nonzero()[:, 0].tolist() == [6, 7, 8, 9]


def test_gradient_flows_between_blocks_of_a_segment_and_stops_between_segments() -> None:
    module, x = layer(), normal(1, 3 * W, E).requires_grad_()
    (g,) = torch.autograd.grad(module(x)[0][:, -1].sum(), x)
    assert g[:, :W].any()  # two blocks back: through the state alone
    y, state = module(x[:, :W])
    y, _ = module(x[:, W:], state)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert not g[:, :W].any()
    assert g[:, W:].any()


def test_a_block_reads_no_state_made_of_itself() -> None:
    """Before the first block ends, the state is what it was; it changes once it is full."""
    module, x = layer(), normal(1, W + 1, E)
    _, state = module(x[:, : W - 1])
    assert not state.slots.any()
    _, state = module(x[:, W - 1 : W], state)
    assert state.slots.any()
    changed = x.clone()
    changed[:, 0] += 1
    far = layer(states=0)
    with torch.no_grad():
        assert_close(far(x)[0][:, W:], far(changed)[0][:, W:])
        assert not torch.allclose(module(x)[0][:, W:], module(changed)[0][:, W:])


def test_the_state_is_of_constant_size_and_resets_by_row() -> None:
    module, x = layer(), normal(2, 30, E)
    sizes = {state_bytes(module(x[:, :n])[1]) for n in (1, 7, 30)}
    assert len(sizes) == 1
    _, state = module(x[:, :9])
    more = x[:, 9:15]
    got = module(more, reset(state, torch.tensor([True, False])))[0]
    assert_close(got[0], module(more)[0][0])
    assert_close(got[1], module(more, state)[0][1])


def test_long_calls_recompute_their_blocks() -> None:
    module, x = layer(), normal(1, 20 * W, E).requires_grad_()
    (got,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    loss, slots_and_frame = torch.zeros((), dtype=torch.float64), module.begin(x)
    from longspan.nn import blockwise

    keep = torch.ones(1, 20 * W, dtype=torch.bool)
    cut = blockwise.plan(slots_and_frame.frame.seen, keep, W)
    slots, frame = slots_and_frame
    for new, visit in zip(cut.split(x), cut.visits, strict=True):
        y, slots, frame = module.visit(new, slots, frame, visit)
        loss = loss + y.square().sum()
    assert_close(got, torch.autograd.grad(loss, x)[0])


@pytest.mark.parametrize("buckets", [8, 32])
def test_the_bias_has_t5s_buckets(buckets: int) -> None:
    far = torch.arange(600)
    bias = DistanceBias(1, buckets=buckets, distance=128)
    with torch.no_grad():
        bias.table.weight.copy_(torch.arange(buckets)[:, None])
    got = bias(far[None, None])[0, 0, 0]
    want = T5Attention._relative_position_bucket(
        -far, bidirectional=False, num_buckets=buckets, max_distance=128
    )
    assert_close(got, want.float())


def test_bad_arguments_are_refused() -> None:
    for wrong in ({"window": 0}, {"states": -1}, {"heads": 5}):
        with pytest.raises(LongspanError, match="expected"):
            layer(**wrong)


# -- models -----------------------------------------------------------------------------------


def language_model(kind: Any = None, **arguments: Any) -> Any:
    sizes = {"vocab_size": 11, "width": E, "layers": 3, "heads": 3, "inner": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind is not None:
            config = LongspanConfig(**sizes, mixers=kind, position=None)
            return LongspanForCausalLM(config).double().eval()
        config = BlockRecurrentConfig(**sizes, window=W, states=5, **arguments)
        return BlockRecurrentForCausalLM(config).double().eval()


TOKENS = torch.randint(11, (2, 15), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_it_stands_at_any_depth_of_a_window_stack(depth: int) -> None:
    mixers: list = [{"id": "longformer", "window": 2 * W}] * 3
    mixers[depth] = {"id": "block-recurrent-transformer", "window": W, "states": 5}
    check_model(language_model(mixers))


@pytest.mark.parametrize("feedback", [True, False])
def test_feedback_streams_pads_and_never_peeks(feedback: bool, tmp_path: Any) -> None:
    model = language_model(feedback=feedback, recurrent=1)
    check_model(model)
    model.save_pretrained(tmp_path)
    again = BlockRecurrentForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(again(TOKENS).logits, model(TOKENS).logits)


def check_model(model: Any) -> None:
    whole = model(TOKENS).logits
    for sizes in ([1] * 15, [4, 4, 7]):
        cache, outs = None, []
        for piece in TOKENS.split(sizes, 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache, outs = out.past_key_values, [*outs, out.logits]
        assert_close(torch.cat(outs, 1), whole)
    other = TOKENS.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 11
    assert torch.equal(model(other).logits[:, :9], whole[:, :9])
    padded = torch.cat([TOKENS[:, :3], TOKENS], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    assert_close(model(padded, attention_mask=mask).logits[:, 3:], whole)
    out = model.train()(TOKENS, labels=TOKENS)
    out.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval().zero_grad()


def test_all_layers_read_the_state_under_feedback() -> None:
    """The lowest layer's window ends long before, yet the first token moves it."""
    model, base = (language_model(feedback=f, recurrent=2) for f in (True, False))
    model, base = model.model.layers, base.model.layers
    x = normal(1, 2 * W + 1, E)
    changed = x.clone()
    changed[:, 0] += 1
    for layers, moved in ((model, True), (base, False)):
        lowest = layers[0].layers[0] if moved else layers[0]
        seen: list[Tensor] = []
        hook = lowest.feed_forward.register_forward_hook(lambda m, a, out, s=seen: s.append(out))
        for given in (x, changed):
            y = given
            for each in layers:
                y, _ = each(y)
        hook.remove()
        half = len(seen) // 2
        assert torch.equal(seen[half - 1][:, -1], seen[-1][:, -1]) is not moved
