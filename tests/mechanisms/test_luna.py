"""Luna: both attentions, the causal form as a loop, both streams through stacks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError, build
from longspan.hub import StateCache
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.models.luna import (
    LunaConfig,
    LunaForSeq2SeqLM,
    LunaForSequenceClassification,
    LunaModel,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def luna(**arguments: Any) -> Any:
    return build("luna", **({"width": 12, "heads": 2, "slots": 5} | arguments)).double().eval()


def heads(t: Tensor, count: int) -> Tensor:
    return t.unflatten(-1, (count, -1)).transpose(1, 2)


def joined(t: Tensor) -> Tensor:
    return t.transpose(1, 2).flatten(2)


def attended(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    q, k, v = (heads(t, count) for t in (q, k, v))
    return joined(F.scaled_dot_product_attention(q, k, v))


# -- bidirectional ------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pack_heads", [2, 3])
@pytest.mark.parametrize("cross", [False, True])
def test_both_streams_are_two_attentions(tied: bool, pack_heads: int, cross: bool) -> None:
    op = luna(tied=tied, pack_heads=pack_heads)
    x, context, p = normal(2, 9, 12), normal(2, 14, 12, seed=1), normal(2, 5, 12, seed=2)
    project, source = op.project, context if cross else x
    assert len(project) == (4 if tied else 6)
    k, v = (project["pack_k" if tied else n](source) for n in ("pack_k", "pack_v"))
    q = project["pack_q"](p)
    want_p = attended(q, k, v, pack_heads)
    k, v = (project["k" if tied else n](want_p) for n in ("k", "v"))
    want_x = op.output(attended(project["q"](x), k, v, 2))
    got = op.streams(x, p, context=context if cross else None)
    assert_close(got, (want_x, want_p))


def test_permuted_slots_permute_their_stream_alone() -> None:
    op, x, p = luna(), normal(2, 9, 12), normal(2, 5, 12, seed=2)
    order = torch.tensor([3, 0, 4, 1, 2])
    y, packed = op.streams(x, p)
    again, permuted = op.streams(x, p[:, order])
    assert_close((again, permuted), (y, packed[:, order]))


def test_padding_is_hidden_on_the_context_side() -> None:
    op, x, p = luna(), normal(2, 9, 12), normal(2, 5, 12, seed=2)
    context = normal(2, 14, 12, seed=1)
    keep = torch.arange(14).expand(2, -1) < torch.tensor([[14], [6]])
    got = op.streams(x, p, keep=keep, context=context.masked_fill(~keep[..., None], torch.nan))
    alone = op.streams(x[1:], p[1:], context=context[1:, :6])
    assert_close([t[1:] for t in got], list(alone))


def test_starting_slots_are_learned_plus_sinusoids() -> None:
    op = luna(slots=64, width=512, heads=8)
    assert op.slots.learned.std().item() == pytest.approx(512**-0.5, rel=0.05)
    place, channel = torch.arange(64)[:, None], torch.arange(256)
    angles = place * 10000 ** (-channel / 255)
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    assert_close(op.slots(3)[1] - op.slots.learned, waves.double(), atol=1e-5, rtol=0)


def test_short_inputs_shorten_the_slots() -> None:
    op, p = luna(shorten=True, slots=9), normal(2, 9, 12, seed=2)
    x = normal(2, 4, 12)
    assert_close(op.streams(x, p), luna_like(op).streams(x, p[:, :4]))
    keep = torch.arange(4).expand(2, -1) < torch.tensor([[2], [3]])
    assert op.streams(x, p, keep=keep)[1].shape[1] == 3
    assert op.streams(normal(2, 30, 12), p)[1].shape[1] == 9


def luna_like(op: Any) -> Any:
    twin = luna(slots=9)
    twin.load_state_dict(op.state_dict())
    return twin


# -- causal -------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("omega", ["log2", "elu"])
def test_causal_form_is_the_sequential_loop(omega: str, tied: bool) -> None:
    op, x = luna(causal=True, omega=omega, tied=tied), normal(2, 40, 12)
    p = op.slots(2)
    pq = heads(op.project["pack_q"](p), 2) / 6**0.5
    sums = [torch.zeros(2, 2, 6, 5).double(), torch.zeros(2, 2, 5, 6).double()]
    want = []
    for t in range(1, 41):
        now = x[:, t - 1 : t]
        names = ("pack_k", "q", "k", "k" if tied else "v")
        pk, q, k, v = (heads(op.project[n](now), 2) for n in names)
        a = pk @ pq.mT
        a = F.elu(a) + 1 if omega == "elu" else torch.log2(1 + 2**a)
        sums = [sums[0] + k.mT @ a, sums[1] + a.mT @ v]
        unpack = (q / 6**0.5 @ sums[0] / t).softmax(-1)
        want.append(op.output(joined(unpack @ sums[1] / t)))
    assert_close(op(x)[0], torch.cat(want, 1))


def test_step_needs_two_sums_and_a_count() -> None:
    op, x, state, outs = luna(causal=True), normal(2, 20, 12), None, []
    for token in x.split(1, 1):
        y, state = op(token, state)
        outs.append(y)
    assert_close(torch.cat(outs, 1), op(x)[0])
    assert state is not None
    assert [tuple(t.shape) for t in state] == [(2, 2, 6, 5), (2, 2, 5, 6), (2,)]
    assert state.seen.tolist() == [20, 20]


def test_outputs_do_not_grow_with_position() -> None:
    """Without the division by t in both sums they would."""
    op = luna(causal=True)
    y, _ = op(normal(1, 1, 12).expand(1, 3000, 12))
    assert_close(y[:, 2999], y[:, 0])


# -- stacks -------------------------------------------------------------------------------------


def luna_config(**fields: Any) -> LunaConfig:
    sizes: dict[str, Any] = {"vocab_size": 13, "width": 12, "layers": 2, "heads": 2, "slots": 5}
    return LunaConfig(**(sizes | fields))


def encoder(**fields: Any) -> LunaModel:
    torch.manual_seed(0)
    return LunaModel(luna_config(pack_heads=3, **fields)).eval()


IDS = torch.arange(14).view(2, 7) % 13


def test_encoder_threads_both_streams() -> None:
    model: Any = encoder()
    x = model.embed(IDS) * 12**0.5
    place, channel = torch.arange(7)[:, None], torch.arange(6)
    angles = place * 10000 ** (-channel / 5)
    x, p = x + torch.cat([angles.sin(), angles.cos()], 1), model.slots(2)
    for layer in model.layers:
        y_x, y_p = layer.luna.streams(x, p)
        x, p = layer.x_norm(x + y_x), layer.p_norm(p + y_p)
        x = layer.norm(x + layer.feed_forward(x))
    out = model(IDS)
    assert_close((out.last_hidden_state, out.packed), (x, p))
    torch.cat([t.flatten().square() + t.flatten() for t in out.values()]).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("shorten", [False, True])
def test_encoder_ignores_padding(shorten: bool) -> None:
    model = encoder(shorten=shorten)
    padded = F.pad(IDS, (3, 0))
    out, alone = model(padded, torch.arange(10).expand(2, -1) >= 3), model(IDS)
    assert_close(out.last_hidden_state[:, 3:], alone.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert_close(out.packed, alone.packed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", ["x", "p", "both"])
def test_classification_from_either_stream(source: Any) -> None:
    model: Any = LunaForSequenceClassification(luna_config(source=source, num_labels=3)).eval()
    keep, labels = torch.arange(7).expand(2, -1) < 5, torch.tensor([2, 0])
    x, p = model.model(IDS, keep, return_dict=False)
    pooled = {"x": x[:, :5].mean(1), "p": p.mean(1)}
    pooled["both"] = torch.cat([pooled["x"], pooled["p"]], 1)
    out = model(IDS, keep, labels=labels)
    assert_close(out.logits, model.score(pooled[source]))
    assert_close(out.loss, F.cross_entropy(out.logits, labels))


def seq2seq() -> Any:
    torch.manual_seed(0)
    return LunaForSeq2SeqLM(luna_config(decoder_start_token_id=0, pad_token_id=0)).eval()


def test_encoder_decoder_steps_and_sees_no_later_token() -> None:
    model, target = seq2seq(), torch.arange(18).view(2, 9) % 11
    mask = (torch.arange(7).expand(2, -1) < torch.tensor([[7], [4]])).long()
    whole = model(IDS, mask, target).logits
    changed = model(IDS, mask, torch.cat([target[:, :5], target[:, 5:] + 1], 1)).logits
    assert torch.equal(changed[:, :5], whole[:, :5])
    encoded, cache, outs = model.encoder(IDS, mask), StateCache(), []
    for token in target.split([1, 1, 4, 1, 2], 1):
        out = model(None, mask, token, encoder_outputs=encoded, past_key_values=cache)
        outs.append(out.logits)
    assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(IDS.flip(1), mask, target).logits, whole)


def test_encoder_decoder_ignores_the_decoder_s_padding() -> None:
    model, target = seq2seq(), torch.arange(8).view(2, 4) + 1
    mask = (torch.arange(7).expand(2, -1) >= 3).long()
    got = model(IDS, None, F.pad(target, (3, 0)), mask).logits[:, 3:]
    assert_close(got, model(IDS, None, target).logits, atol=1e-5, rtol=1e-5)


def test_encoder_decoder_trains_on_targets_one_place_later() -> None:
    model, target = seq2seq(), torch.arange(18).view(2, 9) % 11
    target[1, 6:] = -100
    out = model(IDS, labels=target)
    given = F.pad(target.masked_fill(target < 0, 0)[:, :-1], (1, 0))
    assert torch.equal(out.logits, model(IDS, None, given).logits)
    assert_close(out.loss, F.cross_entropy(out.logits.flatten(0, 1), target.flatten()))
    out.loss.backward()
    idle = {n for n, p in model.named_parameters() if p.grad is None}  # the last P is unread
    ends = ("layers.1.p_norm.weight", "layers.1.p_norm.bias")
    assert idle == {side + end for side in ("", "encoder.") for end in ends}
    with pytest.raises(LongspanError, match="give decoder_input_ids, or labels"):
        model(IDS)


@pytest.mark.parametrize("beams", [1, 2])
def test_encoder_decoder_generates(beams: int) -> None:
    model = seq2seq()
    mask = (torch.arange(7).expand(2, -1) < torch.tensor([[7], [4]])).long()
    options: Any = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    got = model.generate(IDS, attention_mask=mask, **options)
    assert got.shape == (2, 7)
    slow = model.generate(IDS, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(got, slow)


def test_language_model_with_slots_in_every_layer() -> None:
    mixers: Any = [{"id": "luna", "slots": 4}]
    config = LongspanConfig(
        vocab_size=13, width=12, heads=2, layers=2, mixers=mixers, position="sinusoidal-position"
    )
    model: Any = LongspanForCausalLM(config).eval()
    ids = torch.arange(14).view(2, 7) % 13
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    slow = ids
    for _ in range(4):
        slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(out, slow)


def test_refusals() -> None:
    x, p = normal(1, 4, 12), normal(1, 5, 12)
    calls: list[tuple[str, Any]] = [
        ("divide the width", lambda: luna(heads=5)),
        ("equal where causal", lambda: luna(causal=True, pack_heads=3)),
        ("slots=0", lambda: luna(slots=0)),
        ("call streams", lambda: luna(slots=None)(x)),
        ("carry one", lambda: luna()(x, luna(causal=True)(x)[1])),
        ("call prefix", lambda: luna(causal=True).streams(x, p)),
        ("causal=True", lambda: luna().prefix(x, p)),
        ("leave the context out", lambda: luna(causal=True)(x, context=x)),
        ("of the last layer are kept", lambda: seq2seq()(IDS, labels=IDS, output_attentions=True)),
        ("expected x, p or both", lambda: luna_config(source="y")),
        ("leave the marks out", lambda: luna()(x, marks=torch.ones(1, 4, dtype=torch.bool))),
    ]
    for match, call in calls:
        with pytest.raises(LongspanError, match=match):
            call()
