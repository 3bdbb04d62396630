"""Expire-Span: spans, the ramp, the loss that shortens them, and memory that is freed."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from longspan import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import Block, FeedForward, MultiHead, reset, state_bytes
from longspan.nn.auxiliary import collect
from longspan.registry import build

WIDTH, HEADS, D = 12, 3, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(*, random: bool = True, **arguments: Any) -> Any:
    """In float64 and evaluation; `random` makes spans differ from token to token."""
    arguments = {"span": 12, "ramp": 3, "segment": 4, "start": 0.3} | arguments
    module = build("expire-span", width=WIDTH, heads=HEADS, **arguments).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if random or "predict" not in name:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return module.eval()


def in_pieces(module: Any, x: Tensor, sizes: Any) -> tuple[Tensor, Any]:
    outs, state = [], None
    for piece in x.split(sizes, 1):
        y, state = module(piece, state)
        outs.append(y)
    return torch.cat(outs, 1), state


def written_out(module: Any, x: Tensor, m: Tensor) -> Tensor:
    """Dense attention under the masks m: B L L, 0 above the diagonal."""
    length = x.shape[1]
    q, k, v = (module.mixer.project[n](x).unflatten(-1, (HEADS, D)).transpose(1, 2) for n in "qkv")
    far = (torch.arange(length)[:, None] - torch.arange(length)).clamp(min=0)
    count = len(module.places)
    placed = torch.zeros(length, length, D).double()
    if count:
        placed = module.places[far.clamp(max=count - 1)] * (far < count)[..., None]
    scores = (q @ k.mT + torch.einsum("bhid,ijd->bhij", q, placed)) / D**0.5
    weights = scores.masked_fill(m[:, None] <= 0, -torch.inf).softmax(-1).nan_to_num() * m[:, None]
    o = weights / (weights.sum(-1, keepdim=True) + 1e-8) @ v
    return module.mixer.output(o.transpose(1, 2).flatten(2))


def masks(spans: Tensor, ramp: int) -> Tensor:
    far = torch.arange(spans.shape[1])[:, None] - torch.arange(spans.shape[1])
    return (1 + (spans[:, None] - far) / ramp).clamp(0, 1) * (far >= 0)


# -- spans and the ramp -------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.1, 0.5])
def test_spans_start_at_their_share_of_the_longest(start: float) -> None:
    module = build("expire-span", width=WIDTH, heads=HEADS, span=200, start=start)
    assert not module.predict.weight.any()
    assert module.predict.bias.item() == pytest.approx(-math.log(1 / start - 1))
    spans = module.spans(normal(2, 5, WIDTH).float())
    assert_close(spans, torch.full((2, 5), 200 * start))


def test_a_span_is_a_sigmoid_of_the_token() -> None:
    module, x = layer(div=3.0), normal(2, 5, WIDTH)
    w, b = module.predict.weight[0], module.predict.bias
    assert_close(module.spans(x), 12 / (1 + (-(x @ w / 3 + b)).exp()))


@pytest.mark.parametrize("positions", [0, 3, 4])
def test_endless_spans_give_dense_causal_attention(positions: int) -> None:
    """With the same position term."""
    module, x = layer(span=1000, positions=positions), normal(2, 30, WIDTH)
    with torch.no_grad():
        module.predict.bias.fill_(1e4)
    assert_close(module(x)[0], written_out(module, x, torch.ones(2, 30, 30).double().tril()))


@pytest.mark.parametrize("start", [0.1, 0.5, 0.9])
def test_equal_spans_are_a_fixed_ramp(start: float) -> None:
    module, x = layer(random=False, start=start), normal(2, 30, WIDTH)
    spans = module.spans(x)
    assert_close(spans, torch.full((2, 30), 12 * start).double(), atol=1e-5, rtol=1e-5)
    assert_close(module(x)[0], written_out(module, x, masks(spans, 3)))


def test_masks_are_renormalised_after_the_softmax() -> None:
    """The written-out reference would differ if m only multiplied, or entered as log m."""
    module, x = layer(), normal(2, 30, WIDTH)
    m = masks(module.spans(x), 3)
    assert bool(((m > 0) & (m < 1)).any())
    assert_close(module(x)[0], written_out(module, x, m))


def test_a_token_can_be_hidden_from_itself() -> None:
    """As in the released code: the first token then sees nothing."""
    module, x = layer(itself=False), normal(2, 30, WIDTH)
    y, _ = module(x)
    assert not y[:, 0].any()
    m = masks(module.spans(x), 3) * torch.ones(30, 30).tril(-1)
    assert_close(y[:, 1:], written_out(module, x, m)[:, 1:])


# -- the loss -----------------------------------------------------------------------------------


def loss_of(module: Any, x: Tensor) -> Tensor:
    module.train()(x)
    return collect(module)["span"]


def test_the_loss_is_what_is_left_within_the_ramp() -> None:
    module, x = layer(penalty=0.7), normal(3, 4, WIDTH)
    spans = module.spans(x) / 4
    with torch.no_grad():
        module.predict.weight.zero_()
        module.predict.bias.fill_(math.log(1 / 11))  # a span of 1: distance 2 and 3 in the ramp
    want = 0.7 / (3 * 4) * (2 * -1 + 1 * -2)
    assert spans.shape == (3, 4)
    assert loss_of(module, x).item() == pytest.approx(want)


def test_the_losss_gradient_is_that_of_differences() -> None:
    module, x = layer(penalty=0.7), normal(2, 12, WIDTH)
    value = loss_of(module, x)
    (found,) = torch.autograd.grad(value, module.predict.bias)
    with torch.no_grad():
        module.predict.bias += 1e-6
        more = loss_of(module, x)
        module.predict.bias -= 2e-6
        less = loss_of(module, x)
    assert found.item() == pytest.approx(((more - less) / 2e-6).item(), rel=1e-4)


def test_only_what_is_in_the_ramp_has_a_gradient_of_the_loss() -> None:
    """Token by token of one segment: a span of e at distance d is in it if e < d < e + R."""
    module = layer(penalty=1.0, segment=8)
    x = normal(1, 8, WIDTH).requires_grad_()
    spans = module.spans(x)[0]
    (grad,) = torch.autograd.grad(loss_of(module, x), x)
    inside = [any(e < d < e + 3 for d in range(8 - i)) for i, e in enumerate(spans.tolist())]
    assert any(inside)
    assert not all(inside)
    assert grad[0].any(-1).tolist() == inside


def test_a_penalty_crosses_the_whole_ramp() -> None:
    """Each memory crosses R positions: in all α Σ e_i / M, up to the ends of the row."""
    module = layer(random=False, penalty=1.0, segment=40, span=10, start=0.25, ramp=4)
    (grad,) = torch.autograd.grad(loss_of(module, normal(1, 40, WIDTH)), module.predict.bias)
    slope = 10 * 0.25 * 0.75  # de / db
    assert grad.item() == pytest.approx((40 - 4) * slope / 40, rel=0.1)


# -- eviction -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [1, 4, [5, 1, 20, 34]], ids=str)
def test_dropping_changes_nothing(sizes: Any) -> None:
    module, x = layer(), normal(3, 60, WIDTH)
    kept = layer(evict=False)
    kept.load_state_dict(module.state_dict())
    got, state = in_pieces(module, x, sizes)
    want, all_of_it = in_pieces(kept, x, sizes)
    assert_close(got, want)
    assert_close(got, written_out(module, x, masks(module.spans(x), 3)))
    assert all_of_it.memory.items.shape[1] == 60
    assert state.memory.items.shape[1] < 30
    assert state_bytes(state) < state_bytes(all_of_it) / 2


def test_as_many_are_dropped_in_every_row_in_multiples_of_a_segment() -> None:
    """The row that can drop least decides; none that a later query could see is gone."""
    module, x = layer(), normal(3, 60, WIDTH)
    state, before = None, 0
    for n, piece in enumerate(x.split(4, 1), 1):
        _, state = module(piece, state)
        items, age, keep = state.memory
        gone = before + 4 - items.shape[1]
        assert gone % 4 == 0
        before = items.shape[1]
        last = 4 * n - 1
        spans = module.spans(x[:, : last + 1])
        visible = spans + 3 > last + 1 - torch.arange(last + 1)
        for b in range(3):
            assert_close(items[b][keep[b]], x[b, : last + 1][visible[b]])
            assert_close(age[b][keep[b]], (last + 1 - torch.arange(last + 1))[visible[b]])
        assert (~keep).sum(1).min() < 4


def test_rows_of_a_batch_do_not_decide_what_another_sees() -> None:
    module, x = layer(), normal(2, 60, WIDTH)
    x[0] = 0  # every span alike
    whole, _ = in_pieces(module, x, 4)
    alone, _ = in_pieces(module, x[1:], 4)
    assert_close(whole[1:], alone)


def test_a_memory_is_bounded_by_the_longest_span_and_the_ramp() -> None:
    module = layer(random=False, start=0.999999)
    _, state = module(normal(1, 100, WIDTH))
    assert 12 + 3 - 1 <= state.memory.items.shape[1] <= 12 + 3 + 4
    shorter = layer(random=False, start=0.999999, memory=5)
    _, state = shorter(normal(1, 100, WIDTH))
    assert int(state.memory.keep.sum()) == 5


def test_a_row_is_reset() -> None:
    module, x, more = layer(), normal(2, 21, WIDTH), normal(2, 9, WIDTH, seed=1)
    state = module(x)[1]
    got, _ = module(more, reset(state, torch.tensor([True, False])))
    assert_close(got[0], module(more)[0][0])
    assert_close(got[1], module(more, state)[0][1])


def test_statistics_of_what_is_remembered() -> None:
    module, x = layer(random=False), normal(2, 20, WIDTH)
    state = module(x)[1]
    mean, longest, slots = module.statistics(state)
    assert (mean, longest) == (pytest.approx(3.6), pytest.approx(3.6))
    assert slots == state.memory.items.shape[1]
    assert module.statistics(module(x[:, :2])[1]) == (0, 0, 0)


# -- in training --------------------------------------------------------------------------------


def test_noise_shortens_all_layers_spans_alike() -> None:
    """One u a pass, the same in every layer and when a pass is recomputed; none in evaluation."""
    first, second = layer(noise=True), layer(noise=True)
    x = normal(1, 20, WIDTH).requires_grad_()
    before, limits = torch.get_rng_state(), []
    for _ in range(5):
        first.train()(x)
        second.train()(x)
        assert first.limit == second.limit
        limits.append(first.limit)
    assert len(set(limits)) == 5
    assert torch.equal(before, torch.get_rng_state())
    plain = layer()
    plain.span = 12
    got = first(x)[0]
    spans = plain.spans(x).clamp(max=first.limit * 12)
    assert_close(got, written_out(plain, x, masks(spans, 3)))
    again = checkpoint(lambda t: first(t)[0], x, use_reentrant=False)
    limit = first.limit
    again.sum().backward()
    assert first.limit == limit
    assert_close(first.eval()(x)[0], plain(x)[0])


def test_what_is_remembered_has_no_gradient() -> None:
    module, x = layer(), normal(2, 8, WIDTH).requires_grad_()
    y, state = module(x)
    assert not state.memory.items.requires_grad
    assert not torch.autograd.grad(y[:, 4:].sum(), x)[0][:, :4].any()


def test_it_wraps_a_layer_of_ones_own() -> None:
    attention = build("multi-head-attention", causal=True)
    old = MultiHead(attention, width=WIDTH, heads=HEADS).double()
    module = layer(around=old, span=1000, positions=0)
    with torch.no_grad():
        module.predict.bias.fill_(1e4)
    x = normal(2, 22, WIDTH)
    assert_close(module(x)[0], old(x)[0])
    grouped = MultiHead(attention, width=WIDTH, heads=HEADS, kv_heads=1)
    with pytest.raises(LongspanError, match="without kv_heads"):
        layer(around=grouped)


def test_a_block_normalises_memory_and_segment_alike() -> None:
    block = Block(layer(), FeedForward(WIDTH), width=WIDTH).double().eval()
    x = normal(2, 22, WIDTH)
    assert_close(in_pieces(block, x, [2, 5, 15])[0], block(x)[0])


def test_the_language_model_trains_and_decodes() -> None:
    config = LongspanConfig(
        vocab_size=11,
        width=WIDTH,
        layers=2,
        heads=HEADS,
        mixers=[{"id": "expire-span", "span": 8, "ramp": 4, "segment": 4, "start": 0.5}],
        position=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LongspanForCausalLM(config)
    tokens = torch.randint(11, (2, 18), generator=torch.Generator().manual_seed(0))
    out = model.train()(tokens, labels=tokens)
    assert set(out.auxiliary) == {"span"}
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval()
    whole, cache, outs = model(tokens).logits, None, []
    for token in tokens.split(1, 1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        outs.append(output.logits)
    assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [({"span": 0}, "span=0"), ({"start": 1.0}, "start=1.0"), ({"memory": -1}, "memory=-1")],
)
def test_what_cannot_work_is_refused(wrong: dict, match: str) -> None:
    with pytest.raises(LongspanError, match=match):
        layer(**wrong)
