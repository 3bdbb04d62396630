"""Longformer's claims: linear cost, schedules over layers and phases, conversion, LED."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
    RobertaModel,
)

import longspan
from longspan import LongspanError, convert
from longspan.hub import StateCache, recompute
from longspan.models import LongspanConfig, LongspanForCausalLM, LongspanForSeq2SeqLM
from longspan.nn import MultiHead
from longspan.testing import count
from longspan.training import staged

PAD = 1


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(2, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


# The operation


@pytest.mark.parametrize("causal", [False, True])
def test_cost_is_length_times_window(causal):
    def flops(length: int, window: int) -> float:
        attend = longspan.build("longformer", causal=causal, window=window, hubs=2)
        q, k, v = (random(1, 2, length, 8, seed=s).float().requires_grad_() for s in range(3))
        return count(lambda: attend(q, k, v)[0].sum().backward()).flops

    base = flops(1024, 64)
    assert flops(2048, 64) == pytest.approx(2 * base, rel=0.05)
    assert flops(1024, 128) == pytest.approx(2 * base, rel=0.15)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("left", [0, 3])
def test_padding_is_neither_seen_nor_filled(causal, left):
    """NaN in the padding reaches no output and no gradient; padded rows are 0."""
    attention = longspan.build("longformer", causal=causal, window=4, dilation=[1, 2, 1], hubs=2)
    mixer = MultiHead(attention, width=12, heads=3).double()
    x = random(2, 11, 12)
    marks = torch.zeros(2, 11, dtype=torch.bool)
    marks[0, 7] = True
    alone = {} if causal else {"marks": marks}
    want, _ = mixer(x, **alone)
    padded = torch.full((2, left + 11 + 4, 12), torch.nan, dtype=torch.float64)
    inside = slice(left, left + 11)
    padded[:, inside] = x
    keep = ~padded.isnan().any(-1)
    named = {} if causal else {"marks": torch.ones_like(keep).index_put_((keep,), marks.flatten())}
    padded.requires_grad_()
    y, _ = mixer(padded, keep=keep, **named)
    assert_close(y[:, inside], want)
    assert not y[~keep].any()
    y.square().sum().backward()
    assert padded.grad is not None
    assert padded.grad.isfinite().all()
    assert not padded.grad[~keep].any()


def test_marks_without_any_token_are_no_marks():
    attend = longspan.build("longformer", window=4)
    q, k, v = (random(2, 3, 9, 4, seed=s) for s in range(3))
    none = torch.zeros(2, 9, dtype=torch.bool)
    assert_close(attend(q, k, v, marks=none)[0], attend(q, k, v)[0])


@pytest.mark.parametrize("case", ["rotated", "grouped"])
def test_global_rows_have_positions_and_groups_too(case):
    """With copied projections and a window over all, a model with rope or fewer keys is dense."""
    rope = longspan.build("rope", channels=4)
    parts: dict[str, Any] = {"position": rope} if case == "rotated" else {"kv_heads": 1}
    wide = longspan.build("longformer", window=38, hubs=2)
    wide = MultiHead(wide, width=12, heads=3, **parts).double()
    dense = longspan.build("multi-head-attention")
    dense = MultiHead(dense, width=12, heads=3, **parts).double()
    dense.load_state_dict({n: t for n, t in wide.state_dict().items() if "_global" not in n})
    x = random(2, 19, 12)
    assert_close(wide(x)[0], dense(x)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5}, "must be even"),
        ({"window": 0}, "must be even"),
        ({"window": []}, "must be even"),
        ({"window": [4, 4], "dilation": [1, 2, 3]}, "2 windows and 3 dilations"),
        ({"dilation": 0}, "dilation ≥ 1"),
        ({"hubs": -1}, "hubs=-1"),
    ],
)
def test_arguments_that_cannot_be(options, message):
    with pytest.raises(LongspanError, match=message):
        longspan.build("longformer", **options)


@pytest.mark.parametrize("length", [1, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_calls_that_cannot_be(causal, length):
    q = random(2, 3, length, 4)
    with pytest.raises(LongspanError, match="2 windows and got 3 heads"):
        longspan.build("longformer", causal=causal, window=[4, 6])(q, q, q)
    if causal:
        with pytest.raises(LongspanError, match="leave marks out"):
            longspan.build("longformer", causal=True)(q, q, q, marks=q[:, 0, :, 0] > 0)
    else:
        k = random(2, 3, length + 1, 4)
        with pytest.raises(LongspanError, match="no cross form"):
            longspan.build("longformer")(q, k, k)


# The language model


def scheduled(**changes: Any) -> Any:
    """Windows that grow with depth, and dilation on two heads of the upper layers (Sec. 4.1)."""
    torch.manual_seed(0)
    mixers = [
        {"id": "longformer", "window": 4},
        {"id": "longformer", "window": 6, "dilation": [1, 1, 2, 2]},
        {"id": "longformer", "window": [6, 6, 8, 8], "dilation": [1, 1, 3, 3]},
    ]
    settings = {"vocab_size": 40, "width": 16, "layers": 3, "heads": 4, "mixers": mixers}
    return LongspanForCausalLM(LongspanConfig(**(settings | changes))).double().eval()


REACH = 2 * 1 + 3 * 2 + 4 * 3


def test_a_schedule_over_layers_reaches_as_far_as_it_says():
    model = scheduled()
    x = random(1, REACH + 8, 16).requires_grad_()
    model(inputs_embeds=x, use_cache=False).logits[0, -1].square().sum().backward()
    assert x.grad is not None
    seen = x.grad[0].abs().sum(-1) > 0
    assert seen[-1 - REACH], "the farthest token in reach is not seen"
    assert not seen[: -1 - REACH].any(), "tokens out of reach are seen"


@torch.no_grad()
@pytest.mark.parametrize("prompt", [1, 5, 24])
def test_steps_with_a_rolling_window_equal_the_whole(prompt):
    model, ids = scheduled(), tokens(2, 60)
    whole = model(ids, use_cache=False).logits
    cache, sizes = StateCache(), []
    logits = [model(ids[:, :prompt], past_key_values=cache).logits]
    for at in range(prompt, ids.shape[1]):
        logits.append(model(ids[:, at : at + 1], past_key_values=cache).logits)
        sizes.append(cache.nbytes)
    assert_close(torch.cat(logits, 1), whole)
    assert len(set(sizes[REACH:])) == 1, "the cache grows beyond the window"


def test_the_state_is_the_reach_of_each_layer():
    model, ids = scheduled(), tokens(2, 60)
    with torch.no_grad():
        states = model(ids, use_cache=True).past_key_values.states
    for state, reach in zip(states, (2, 6, 12), strict=True):
        k, v, keep = state.attention
        assert k.shape == v.shape == (2, 4, reach, 4)
        assert keep.shape == (2, reach)


def test_generates_with_padding_and_survives_saving(tmp_path: Path):
    model = scheduled(pad_token_id=0)
    ids = tokens(2, 30)
    ids[1, :9] = 0
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"max_new_tokens": 8, "do_sample": False}
    out = model.generate(ids, attention_mask=mask, **options)
    alone = model.generate(ids[1:, 9:], attention_mask=mask[1:, 9:], **options)
    assert torch.equal(out[1:, 9:], alone)
    model.save_pretrained(tmp_path)
    loaded: Any = LongspanForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(loaded.generate(ids, attention_mask=mask, **options), out)


def test_the_papers_five_phases():
    """App. A: lengths 2,048 … 23,040, lowest window 32 … 512, rate 2.5e-4 … 1.5625e-5."""
    phases = staged(windows=[32, 64, 128])
    assert [p.length for p in phases] == [2048, 4096, 8192, 16384, 23040]
    assert [p.windows[0] for p in phases] == [32, 64, 128, 256, 512]
    assert phases[-1].lr == 1.5625e-5
    for before, after in pairwise(phases):
        assert after.windows == tuple(2 * w for w in before.windows)
        assert after.lr == before.lr / 2
        assert after.length == min(2 * before.length, 23040)


def test_weights_go_on_from_phase_to_phase():
    losses, weights = [], None
    for phase in staged(windows=[4, 6], length=16, longest=40, phases=3, lr=1e-2):
        mixers = [{"id": "longformer", "window": w} for w in phase.windows]
        model = scheduled(mixers=mixers, layers=2, length=phase.length).train()
        if weights is not None:
            model.load_state_dict(weights, strict=True)
        optimiser = torch.optim.Adam(model.parameters(), lr=phase.lr)
        ids = torch.arange(phase.length).expand(2, -1) % 7 + 2
        for _ in range(10):
            loss = model(ids, labels=ids).loss
            losses.append(loss.item())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        weights = model.state_dict()
    assert losses[10] < 0.8 * losses[0]
    assert losses[20] < 0.8 * losses[10]


# Conversion


def original(kind: type[PreTrainedModel], positions: int = 16, **changes: Any) -> Any:
    """Random weights, large enough that attention is far from even."""
    config = RobertaConfig if kind.__name__.startswith("Roberta") else BertConfig
    rows = positions + (PAD + 1 if config is RobertaConfig else 0)
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
        "max_position_embeddings": rows,
        "pad_token_id": PAD,
    }
    model: Any = kind(config(**(sizes | changes)))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return model.eval()


ENCODERS: list[Any] = [
    BertModel,
    BertForMaskedLM,
    BertForSequenceClassification,
    RobertaModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
]


@pytest.mark.parametrize("hubs", [0, 1])
@pytest.mark.parametrize("kind", ENCODERS)
def test_conversion_changes_nothing_within_the_window(kind, hubs):
    model = original(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    random_state = torch.get_rng_state()
    long = convert.longformer(model, window=32, length=48, hubs=hubs)
    assert torch.equal(torch.get_rng_state(), random_state)
    ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
    ids[1, 11:], mask[1, 11:] = PAD, 0
    want, out = model(ids, attention_mask=mask)[0], long(ids, attention_mask=mask)[0]
    kept = mask.bool() if out.dim() == 3 else torch.ones(2, dtype=torch.bool)
    assert_close(out[kept], want[kept], rtol=1e-5, atol=1e-5)
    assert type(long) is kind
    assert model.config.max_position_embeddings in (16, 18)
    assert model.config._attn_implementation != long.config._attn_implementation
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("kind", [BertModel, RobertaModel])
def test_global_projections_start_as_copies_of_their_own(kind):
    model = original(kind)
    long = convert.longformer(model, window=4, length=32)
    for layer, old in zip(long.encoder.layer, model.encoder.layer, strict=True):
        project = layer.attention.self.mixer.project
        for name, linear in (("q", "query"), ("k", "key"), ("v", "value")):
            source = getattr(old.attention.self, linear)
            for mine in (project[name], project[f"{name}_global"]):
                assert torch.equal(mine.weight, source.weight)
                assert torch.equal(mine.bias, source.bias)
            assert project[name].weight is not project[f"{name}_global"].weight
        assert layer.attention.output.dense.weight.shape == (12, 12)


@pytest.mark.parametrize("length", [16, 50, 64])
def test_tables_are_tiled_after_the_special_rows(length):
    """RoBERTa's positions start at padding_idx + 1 = 2; BERT's at 0."""
    for kind, first in ((RobertaModel, 2), (BertModel, 0)):
        model = original(kind)
        long = convert.longformer(model, window=4, length=length)
        old, new = (m.embeddings.position_embeddings for m in (model, long))
        assert new.weight.shape == (first + length, 12)
        assert new.padding_idx == old.padding_idx
        assert torch.equal(new.weight[:first], old.weight[:first])
        for pos in range(length):
            assert torch.equal(new.weight[first + pos], old.weight[first + pos % 16])
        assert long.config.max_position_embeddings == first + length
        assert long.embeddings.position_ids.shape == (1, first + length)
        assert long.embeddings.token_type_ids.shape == (1, first + length)


@pytest.mark.parametrize("kind", [BertModel, RobertaModel])
def test_longer_inputs_pad_and_cost_no_square(kind):
    long = convert.longformer(original(kind), window=4, length=1024)
    ids, mask = tokens(2, 1024), torch.ones(2, 1024, dtype=torch.long)
    ids[1, 700:], mask[1, 700:] = PAD, 0
    with torch.no_grad():
        with Largest() as made:
            out = long(ids, attention_mask=mask).last_hidden_state
        alone = long(ids[1:, :700]).last_hidden_state
    assert made.elements < 1024 * 1024 / 4
    assert_close(out[1:, :700], alone, rtol=1e-5, atol=1e-5)


def test_global_tokens_by_mask_or_by_count():
    model = original(RobertaModel)
    ids, first = tokens(2, 40), torch.zeros(2, 40, dtype=torch.long)
    first[:, 0] = 1
    by_count = convert.longformer(model, window=4, length=40, hubs=1)
    by_mask = convert.longformer(model, window=4, length=40, hubs=0)
    far = ids.clone()
    far[:, 30] = 2 + (far[:, 30] - 1) % 38

    def start(of: Callable[..., Any], ids: Tensor, **named: Any) -> Tensor:
        return of(ids, **named).last_hidden_state[:, 0]

    out = start(by_count, ids)
    assert_close(start(by_mask, ids, global_attention_mask=first), out)
    assert torch.equal(start(by_mask, ids), start(by_mask, far)), "a local token sees far away"
    moved = start(by_mask, far, global_attention_mask=first) - out
    assert moved.abs().amax(-1).gt(1e-4).all(), "a global token does not see far away"
    with pytest.raises(LongspanError, match="marks of shape"):
        by_mask(ids, global_attention_mask=first[:, 1:])


def test_a_converted_model_trains_every_weight():
    long = convert.longformer(original(RobertaForMaskedLM), window=4, length=64).train()
    recompute(long)
    ids = tokens(2, 50)
    long(ids, labels=ids).loss.backward()
    lazy = {n for n, p in long.named_parameters() if p.grad is None or not p.grad.any()}
    assert not lazy


def test_a_converted_model_saves_and_loads(tmp_path: Path):
    long = convert.longformer(original(RobertaForMaskedLM), window=4, length=40)
    ids = tokens(2, 40)
    long.save_pretrained(tmp_path)
    config = RobertaConfig.from_pretrained(tmp_path)
    again = convert.longformer(RobertaForMaskedLM(config), window=4, length=40).eval()
    missing, unexpected = again.load_state_dict(load_file(tmp_path / "model.safetensors"), False)
    assert not unexpected
    assert set(missing) <= set(long.all_tied_weights_keys)
    assert torch.equal(again(ids).logits, long(ids).logits)


def test_models_that_cannot_be_converted():
    config = DistilBertConfig(vocab_size=40, dim=12, n_layers=1, n_heads=3, hidden_dim=20)
    with pytest.raises(LongspanError, match="got a distilbert"):
        convert.longformer(DistilBertModel(config))
    with pytest.raises(LongspanError, match="is_decoder"):
        convert.longformer(original(BertLMHeadModel, is_decoder=True))
    model = original(BertModel)
    with pytest.raises(LongspanError, match="knows 16 positions"):
        convert.longformer(model, length=15)
    with pytest.raises(LongspanError, match="must be even"):
        convert.longformer(model, window=7)
    long = convert.longformer(model, window=4, length=32)
    with pytest.raises(LongspanError, match="convert the original"):
        convert.longformer(long, window=4, length=32)


def test_calls_a_converted_model_refuses():
    long = convert.longformer(original(BertModel), window=4, length=32)
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    with pytest.raises(LongspanError, match="output_attentions"):
        long(ids, output_attentions=True)
    with pytest.raises(LongspanError, match="one number per row and token"):
        long(ids, attention_mask=torch.ones(2, 1, 20, 20))
    mask[0, 15:] = 0
    long.config._attn_implementation = "sdpa"
    with pytest.raises(LongspanError, match="longspan_padding"):
        long(ids, attention_mask=mask)


# LED


def led(**changes: Any) -> Any:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 40,
        "width": 16,
        "layers": 2,
        "heads": 4,
        "mixers": ["multi-head-attention"],
        "encoder_mixers": [{"id": "longformer", "window": 4, "hubs": 1}],
        "position": "learned-position",
        "norm_order": "post",
        "length": 48,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 1,
    }
    return LongspanForSeq2SeqLM(LongspanConfig(**(settings | changes)))


def test_led_trains_and_generates():
    """Learns to repeat the start of a long input; padding changes nothing."""
    model = led()
    ids = tokens(4, 40)
    mask = torch.ones_like(ids)
    ids[1, 31:], mask[1, 31:] = 0, 0
    labels = ids[:, 1:6]
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(ids, attention_mask=mask, labels=labels).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        if len(losses) == 1:
            idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
            assert not idle
        optimiser.step()
    assert losses[-1] < losses[0] / 4
    model.eval()
    options = {"max_new_tokens": 5, "do_sample": False}
    out = model.generate(ids, attention_mask=mask, **options)
    assert (out[:, 1:6] == labels).float().mean() > 0.8
    assert torch.equal(model.generate(ids[1:2, :31], **options), out[1:2])


def test_leds_first_token_sees_and_is_seen_by_all():
    ids = tokens(1, 40)
    far = ids.clone()
    far[:, 30] = 2 + (far[:, 30] - 1) % 38
    for hubs in (0, 1):
        model = led(encoder_mixers=[{"id": "longformer", "window": 4, "hubs": hubs}]).eval()
        with torch.no_grad():
            a, b = (model.encoder(t).last_hidden_state[0] for t in (ids, far))
        changed = (a - b).abs().amax(-1) > 0
        near = torch.arange(40).sub(30).abs() <= 4  # two layers of two tokens to a side
        assert torch.equal(changed, near if hubs == 0 else torch.ones_like(near))


def test_led_positions_are_the_barts_sixteen_times():
    short = longspan.build("learned-position", width=4, length=1024)
    long = short.resize(16384, how="tile")
    assert torch.equal(long.table, short.table.repeat(16, 1))
    model, ids = led().eval(), tokens(1, 48)
    with torch.no_grad():
        want = model.encoder(ids).last_hidden_state
        model.encoder.position = model.encoder.position.resize(16 * 48, how="tile")
        assert_close(model.encoder(ids).last_hidden_state, want)
        assert model.generate(tokens(1, 16 * 48), max_new_tokens=3).shape[0] == 1
