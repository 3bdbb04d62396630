"""Models: forms agree, load as they were saved, generate, and refuse what they cannot do."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from longspan import Card, LongspanError, cards, mechanism
from longspan.hub import StateCache
from longspan.models import (
    LongspanConfig,
    LongspanForCausalLM,
    LongspanForMaskedLM,
    LongspanForSeq2SeqLM,
    LongspanForSequenceClassification,
    LongspanModel,
    evaluation,
    mixer,
)
from longspan.models.losses import cross_entropy
from longspan.nn import Attention, Mixer, MultiHead

FACTS = {
    "family": "dense",
    "paper": "",
    "cite": "",
    "link": "",
    "what": "",
    "time": "L",
    "memory": "D",
}


@mechanism(
    Card(id="x-leaky", name="", kind="attention", modes={"causal"}, **FACTS, causality="selection")
)
@mechanism(Card(id="x-leaky-causal", name="", kind="attention", modes={"causal"}, **FACTS))
class Nothing(Attention):
    """Gives zeros and carries no state."""

    def forward(self, q, k, v, state=None, *, keep=None):
        return torch.zeros_like(q), None


@mechanism(Card(id="x-mean", name="", kind="mixer", modes={"causal", "bidirectional"}, **FACTS))
class Mean(Mixer):
    """A running mean of x, with what is hard to load: a special init, a buffer, a frozen part."""

    def __init__(self, *, width: int, length: int, causal: bool = False, start: float = 0.5):
        super().__init__()
        self.causal, self.length = causal, length
        self.scale = torch.nn.Parameter(torch.full((width,), start))
        self.scale._optim = {"lr": 1e-3, "weight_decay": 0.0}
        self.frozen = torch.nn.Parameter(torch.rand(width), requires_grad=False)
        self.register_buffer("decay", torch.linspace(0.5, 1, width), persistent=False)

    def forward(self, x, state=None, *, keep=None, context=None, marks=None):
        x = x if keep is None else x * keep[..., None]
        y = x.cumsum(1) if self.causal else x.sum(1, keepdim=True).expand_as(x)
        return y * self.decay * self.scale + self.frozen, None


def config(**changes) -> LongspanConfig:
    sizes = {"vocab_size": 32, "width": 24, "layers": 2, "heads": 2, "length": 64}
    return LongspanConfig(**(sizes | changes))


def build(kind, seed: int = 0, **changes):
    torch.manual_seed(seed)
    model = kind(config(**changes)).eval()
    # The initial 0.02 would leave every mixing far below the embeddings and tests blind to it.
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(seed))


POSITIONS = ("rope", "learned-position", "alibi", None)
STEPPING = [
    *({"position": p} for p in POSITIONS),
    {"mixers": ["linear-transformer"], "position": "sinusoidal-position"},
    {"mixers": ["linear-transformer"], "position": "rope"},
    {"mixers": ["multi-head-attention", "linear-transformer"], "kv_heads": 1, "position": None},
    {"norm": "rms", "norm_order": "post", "gated": True, "activation": "silu"},
    {"tie_word_embeddings": False},
]


def named(changes: dict) -> str:
    return "-".join(str(v) for v in changes.values())


@pytest.mark.parametrize("changes", STEPPING, ids=named)
def test_pieces_with_a_cache_give_the_whole(changes):
    model, x = build(LongspanForCausalLM, **changes), tokens(2, 11)
    whole, cache = model(x).logits, StateCache()
    pieces = [model(p, past_key_values=cache).logits for p in x.split([4, 1, 5, 1], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert cache.get_seq_length() == 11
    assert cache.seen.tolist() == [11, 11]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("changes", STEPPING, ids=named)
def test_padding_changes_nothing(changes, side):
    model, x, pad = build(LongspanForCausalLM, **changes), tokens(2, 7), tokens(2, 3, seed=5)
    mask = torch.ones(2, 7, dtype=torch.long)
    parts = [(pad, torch.zeros_like(pad)), (x, mask)][:: 1 if side == "left" else -1]
    padded, mask = (torch.cat(p, 1) for p in zip(*parts, strict=True))
    real = slice(3, None) if side == "left" else slice(0, 7)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, real], model(x).logits)


def greedy_by_hand(model, x, mask, new: int):
    for _ in range(new):
        logits = model(x, attention_mask=mask, use_cache=False).logits[:, -1]
        x = torch.cat([x, logits.argmax(-1, keepdim=True)], 1)
        mask = F.pad(mask, (0, 1), value=1)
    return x


@pytest.mark.parametrize("changes", STEPPING, ids=named)
def test_greedy_is_the_argmax_of_the_whole_prefix(changes):
    model, x = build(LongspanForCausalLM, **changes), tokens(3, 6)
    mask = torch.ones_like(x)
    mask[0, :3] = mask[1, :1] = 0
    out = model.generate(x, attention_mask=mask, max_new_tokens=7, do_sample=False)
    assert torch.equal(out, greedy_by_hand(model, x, mask, 7))
    alone = model.generate(x[:1, 3:], max_new_tokens=7, do_sample=False)
    assert torch.equal(out[:1, 3:], alone)


def test_a_long_prompt_may_be_fed_in_chunks():
    model, x = build(LongspanForCausalLM), tokens(2, 9)
    said = {"max_new_tokens": 5, "do_sample": False}
    chunked = model.generate(x, prefill_chunk_size=4, **said)
    assert torch.equal(chunked, model.generate(x, **said))


def test_generate_goes_on_from_a_cache():
    model, x = build(LongspanForCausalLM), tokens(2, 9)
    said = {"do_sample": False, "return_dict_in_generate": True}
    first = model.generate(x, max_new_tokens=4, **said)
    assert isinstance(first.past_key_values, StateCache)
    more = torch.cat([first.sequences, tokens(2, 3, seed=8)], 1)
    kept = first.past_key_values
    on = model.generate(more, past_key_values=kept, max_new_tokens=4, **said).sequences
    assert torch.equal(on, model.generate(more, max_new_tokens=4, **said).sequences)


def test_sampling_follows_the_seed():
    model, x = build(LongspanForCausalLM), tokens(2, 5)
    outs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outs.append(
            model.generate(x, max_new_tokens=12, do_sample=True, top_p=0.9, temperature=0.8)
        )
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("mixers", [["multi-head-attention"], ["linear-transformer"]])
def test_beams_with_a_cache_equal_beams_without(mixers):
    model, x = build(LongspanForCausalLM, mixers=mixers), tokens(2, 5)
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    said = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False, "num_return_sequences": 2}
    cached = model.generate(x, attention_mask=mask, **said)
    assert torch.equal(cached, model.generate(x, attention_mask=mask, use_cache=False, **said))


def test_a_constant_state_stays_constant():
    model, cache = build(LongspanForCausalLM, mixers=["linear-transformer"]), StateCache()
    sizes = set()
    for piece in tokens(2, 40).split(8, 1):
        model(piece, past_key_values=cache)
        sizes.add(cache.nbytes)
    assert len(sizes) == 1


def test_a_mechanism_without_steps_generates_from_the_whole_prefix():
    model, x = build(LongspanForCausalLM, mixers=["x-mean"], position=None), tokens(2, 5)
    out = model.generate(x, max_new_tokens=4, do_sample=False)
    assert torch.equal(out, greedy_by_hand(model, x, torch.ones_like(x), 4))
    with pytest.raises(LongspanError, match=r"x-mean.*no state to carry"):
        model(x, use_cache=True)


HEADED = [
    (LongspanForCausalLM, AutoModelForCausalLM),
    (LongspanForMaskedLM, AutoModelForMaskedLM),
    (LongspanForSequenceClassification, AutoModelForSequenceClassification),
    (LongspanForSeq2SeqLM, AutoModelForSeq2SeqLM),
    (LongspanModel, AutoModel),
]


@pytest.mark.parametrize(("kind", "auto"), HEADED, ids=lambda c: c.__name__)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_and_loaded_is_bit_equal(kind, auto, tied, tmp_path, monkeypatch):
    specs = ["x-mean", {"id": "multi-head-attention", "backend": "tiled"}]
    model = build(kind, mixers=specs, position="learned-position", tie_word_embeddings=tied)
    inputs = {"input_ids": tokens(2, 9)}
    if kind is LongspanForSeq2SeqLM:
        inputs["decoder_input_ids"] = tokens(2, 4)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    # Memory that nothing writes to would often hold the right values by accident.
    monkeypatch.setattr(
        torch, "empty_like", lambda t, **said: torch.full_like(t, torch.nan, **said)
    )
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is kind
    assert not loaded.training
    ours, theirs = (m(**inputs, return_dict=False) for m in (model, loaded))
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    theirs = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name])
        assert parameter.requires_grad == theirs[name].requires_grad
        assert getattr(parameter, "_optim", None) == getattr(theirs[name], "_optim", None)
    read = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(read, LongspanConfig)
    assert read.mixers == specs
    assert read.hidden_size == read.width == 24
    assert read.num_hidden_layers == 2
    assert read.max_position_embeddings == 64


IN_MODELS = [
    card
    for card in cards().values()
    if card.kind in ("attention", "mixer", "memory") and not card.id.startswith("x-")
]


@pytest.mark.parametrize("card", IN_MODELS, ids=lambda card: card.id)
def test_every_mechanism_serves_in_a_model(card, tmp_path):
    sizes = {"width", "heads", "head_width", "kv_heads", "length", "causal"}
    spec = {"id": card.id, **{k: v for k, v in card.tiny.items() if k not in sizes}}
    causal = "causal" in card.modes
    kind = LongspanForCausalLM if causal else LongspanForMaskedLM
    model = build(kind, mixers=[spec], heads=3, position=None, allow_leaks=True)
    model.save_pretrained(tmp_path)
    x = tokens(2, 24)
    assert torch.equal(kind.from_pretrained(tmp_path)(x).logits, model(x).logits)
    if causal:
        mask = torch.ones_like(x)
        mask[0, :5] = 0
        said = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        cached = model.generate(x, **said)
        assert cached.shape == (2, 30)
        if "streaming_equals_whole" not in card.skips:
            assert torch.equal(cached, model.generate(x, use_cache=False, **said))


def test_what_a_checkpoint_lacks_starts_as_built(tmp_path):
    model = build(LongspanForCausalLM, mixers=["linear-transformer"])
    model.save_pretrained(tmp_path)
    mixers = ["x-mean", "linear-transformer"]
    loaded = LongspanForSequenceClassification.from_pretrained(
        tmp_path, mixers=mixers, num_labels=3
    )
    assert loaded.config.causal
    new = loaded.model.layers[0].mixer
    assert torch.equal(new.scale, torch.full((24,), 0.5))
    assert torch.equal(new.decay, torch.linspace(0.5, 1, 24))
    assert 0 < loaded.score.weight.std() < 0.1
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_mechanisms_keep_their_own_start():
    torch.manual_seed(0)
    model = LongspanForCausalLM(config(mixers=["x-mean", "multi-head-attention"], width=64))
    mean, heads = (layer.mixer for layer in model.model.layers)
    assert torch.equal(mean.scale, torch.full((64,), 0.5))
    assert isinstance(heads, MultiHead)
    xavier = math.sqrt(2 / 128)
    assert heads.project["q"].weight.std().item() == pytest.approx(xavier, rel=0.1)
    assert heads.output.weight.std().item() == pytest.approx(xavier / 2, rel=0.1)
    feed = model.model.layers[0].feed_forward
    assert feed.up.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert feed.down.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_mechanisms_tile_and_take_what_they_name():
    c = config(layers=5, mixers=["x-mean", {"id": "x-mean", "start": 2.0}], position=None)
    layers = LongspanModel(c).layers
    assert [layer.mixer.scale[0].item() for layer in layers] == [0.5, 2.0, 0.5, 2.0, 0.5]
    assert mixer("x-mean", config=c, causal=True).length == 64
    assert not mixer("x-mean", config=c, causal=False).causal


def test_loss_is_the_shifted_cross_entropy():
    model, x = build(LongspanForCausalLM), tokens(2, 9)
    labels = x.clone()
    labels[0, 3:6] = -100
    output = model(x, labels=labels)
    nats = -output.logits.log_softmax(-1)[:, :-1].gather(-1, x[:, 1:, None])[..., 0]
    counted = labels[:, 1:] != -100
    torch.testing.assert_close(output.loss, nats[counted].mean())
    summed = model(x, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    torch.testing.assert_close(summed, nats[counted].sum() / 7)


def test_loss_in_chunks_has_the_same_value_and_gradient():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 9, 5, requires_grad=True), torch.randint(0, 5, (2, 9))
    labels[0, 2] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    given = cross_entropy(logits, labels, chunk=20)
    torch.testing.assert_close(given, expected)
    for a, b in zip(*(torch.autograd.grad(v, logits) for v in (given, expected)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("position", ["rope", "learned-position"])
@pytest.mark.parametrize("kind", [LongspanForCausalLM, LongspanForMaskedLM])
def test_packed_documents_equal_separate_ones(kind, position):
    model = build(kind, position=position)
    lengths = [[4, 5], [1, 6, 2]]
    x = tokens(2, 9)
    documents = torch.tensor([[0] * 4 + [1] * 5, [7] + [8] * 6 + [7] * 2])
    labels = x.clone()
    packed = model(x, documents=documents, labels=labels)
    nats, count = 0.0, 0
    for row, parts in enumerate(lengths):
        for logits, ids in zip(packed.logits[row].split(parts), x[row].split(parts), strict=True):
            alone = model(ids[None], labels=ids[None])
            torch.testing.assert_close(logits, alone.logits[0])
            scored = len(ids) - (kind is LongspanForCausalLM)
            nats, count = nats + alone.loss * scored, count + scored
    torch.testing.assert_close(packed.loss, nats / count)


def test_packed_documents_with_padding():
    model, x = build(LongspanForCausalLM), tokens(1, 8)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0]])
    given = model(x, documents=documents, attention_mask=mask).logits
    torch.testing.assert_close(given[:, 3:6], model(x[:, 3:6]).logits)


@pytest.mark.parametrize("mixers", [["multi-head-attention"], ["linear-transformer", "x-mean"]])
def test_gradient_checkpointing_gives_equal_gradients(mixers):
    x = tokens(2, 9)
    gradients = []
    for again in (False, True):
        model = build(LongspanForCausalLM, mixers=mixers).train()
        if again:
            model.activation_checkpointing_enable()
        assert all(layer.gradient_checkpointing == again for layer in model.model.layers)
        model(x, labels=x).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(g is not None for g in gradients[0])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_masked_lm_sees_both_sides_and_scores_chosen_tokens():
    model, x = build(LongspanForMaskedLM), tokens(2, 9)
    labels = torch.full_like(x, -100)
    labels[0, 4] = 3
    output = model(x, labels=labels)
    torch.testing.assert_close(output.loss, -output.logits[0, 4].log_softmax(-1)[3])
    changed = x.clone()
    changed[:, -1] = 31 - changed[:, -1]
    assert not torch.equal(model(changed).logits[:, 0], output.logits[:, 0])
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_classification_pools_kept_tokens_only(pooling, side):
    model = build(LongspanForSequenceClassification, pooling=pooling, num_labels=3)
    x, pad = tokens(2, 6), tokens(2, 2, seed=4)
    parts = [(pad, torch.zeros_like(pad)), (x, torch.ones_like(x))]
    ids, mask = (torch.cat(p[:: 1 if side == "left" else -1], 1) for p in zip(*parts, strict=True))
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, model(x).logits)


def test_classification_losses():
    x = tokens(4, 6)
    one = build(LongspanForSequenceClassification, num_labels=1)
    y = torch.randn(4)
    torch.testing.assert_close(one(x, labels=y).loss, F.mse_loss(one(x).logits[:, 0], y))
    assert one.config.problem_type == "regression"
    classes = build(LongspanForSequenceClassification, num_labels=3)
    y = torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(classes(x, labels=y).loss, F.cross_entropy(classes(x).logits, y))
    several = build(LongspanForSequenceClassification, num_labels=3)
    y = torch.eye(4)[:, :3]
    torch.testing.assert_close(
        several(x, labels=y).loss, F.binary_cross_entropy_with_logits(several(x).logits, y)
    )
    assert several.config.problem_type == "multi_label_classification"


LED = {
    "mixers": ["multi-head-attention"],
    "encoder_mixers": ["x-mean"],
    "encoder_layers": 1,
    "decoder_start_token_id": 0,
    "position": "learned-position",
}


def test_seq2seq_loss_feeds_the_delayed_labels():
    model, x, y = build(LongspanForSeq2SeqLM, **LED), tokens(2, 7), tokens(2, 5, seed=2)
    given = model(x, labels=y)
    delayed = torch.cat([torch.zeros(2, 1, dtype=torch.long), y[:, :-1]], 1)
    assert torch.equal(given.logits, model(x, decoder_input_ids=delayed).logits)
    torch.testing.assert_close(given.loss, F.cross_entropy(given.logits.flatten(0, 1), y.flatten()))
    assert len(model.encoder.layers) == 1
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    given.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("side", ["left", "right"])
def test_seq2seq_ignores_padding_on_both_sides(side):
    model, x, pad = build(LongspanForSeq2SeqLM, **LED), tokens(2, 7), tokens(2, 3, seed=5)
    y = tokens(2, 5, seed=2)
    parts = [(pad, torch.zeros_like(pad)), (x, torch.ones_like(x))]
    ids, mask = (torch.cat(p[:: 1 if side == "left" else -1], 1) for p in zip(*parts, strict=True))
    given = model(ids, attention_mask=mask, decoder_input_ids=y).logits
    torch.testing.assert_close(given, model(x, decoder_input_ids=y).logits)


@pytest.mark.parametrize("beams", [1, 3])
def test_seq2seq_generates(beams):
    model, x = build(LongspanForSeq2SeqLM, **LED), tokens(2, 7)
    mask = torch.ones_like(x)
    mask[1, 4:] = 0
    said = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    out = model.generate(x, attention_mask=mask, **said)
    assert torch.equal(out, model.generate(x, attention_mask=mask, use_cache=False, **said))
    assert torch.equal(out[1:], model.generate(x[1:, :4], **said))
    if beams == 1:
        y = torch.zeros(2, 1, dtype=torch.long)
        for _ in range(6):
            logits = model(x, mask, decoder_input_ids=y, use_cache=False).logits[:, -1]
            y = torch.cat([y, logits.argmax(-1, keepdim=True)], 1)
        assert torch.equal(out, y)


def test_led_takes_global_tokens():
    sizes = LED | {"encoder_mixers": [{"id": "longformer", "window": 4}]}
    model, x = build(LongspanForSeq2SeqLM, **sizes), tokens(2, 17)
    first = torch.zeros_like(x, dtype=torch.bool)
    first[:, 0] = True
    y = tokens(2, 5, seed=2)
    assert not torch.equal(model(x, labels=y, marks=first).logits, model(x, labels=y).logits)
    said = {"marks": first, "max_new_tokens": 4, "do_sample": False, "num_beams": 2}
    out = model.generate(x, **said)
    assert torch.equal(out, model.generate(x, use_cache=False, **said))


def test_no_token_sees_a_later_one():
    model, x = build(LongspanForCausalLM), tokens(1, 8)
    embeds = model.model.embed_tokens(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits[0, 4].sum(), embeds)
    assert gradient[0, 5:].abs().max() == 0
    assert gradient[0, :5].abs().amax(-1).min() > 0


def test_hidden_states_and_tuples():
    model, x = build(LongspanForCausalLM), tokens(1, 4)
    states = model(x, output_hidden_states=True).hidden_states
    assert [tuple(s.shape) for s in states] == [(1, 4, 24)] * 3
    logits, cache = model(x, return_dict=False)
    torch.testing.assert_close(logits, model.lm_head(states[-1]))
    assert isinstance(cache, StateCache)
    assert model(x, logits_to_keep=2).logits.shape == (1, 2, 32)


def test_a_cache_can_be_copied_selected_and_forked():
    model, x = build(LongspanForCausalLM), tokens(2, 6)
    cache = model(x[:, :4]).past_key_values
    copied = copy.copy(cache)
    again = StateCache.of(cache.carried())
    expected = model(x[:, 4:], past_key_values=cache).logits
    assert copied.get_seq_length() == 4
    assert torch.equal(model(x[:, 4:], past_key_values=again).logits, expected)
    copied.batch_repeat_interleave(2)
    assert copied.batch_size == 4
    copied.batch_select_indices(torch.tensor([3]))
    torch.testing.assert_close(model(x[1:, 4:], past_key_values=copied).logits, expected[1:])
    assert not cache.is_croppable
    with pytest.raises(LongspanError, match="cannot forget"):
        cache.crop(-1)
    cache.reset()
    assert torch.equal(model(x, past_key_values=cache).logits, model(x).logits)


def test_evaluation_protocols():
    model = build(LongspanForCausalLM)
    stream = tokens(23)
    whole = evaluation.carried(model, stream, segment=22)
    assert whole.tokens == 22
    logits = model(stream[None, :-1]).logits[0]
    nats = F.cross_entropy(logits, stream[1:], reduction="sum").item()
    assert whole.nats == pytest.approx(nats, rel=1e-6)
    assert whole.bits_per_byte() == pytest.approx(nats / math.log(2) / 22)
    assert whole.bits_per_byte(44) == pytest.approx(nats / math.log(2) / 44)
    assert whole.perplexity() == pytest.approx(math.exp(nats / 22))
    for segment in (1, 5):
        assert evaluation.carried(model, stream, segment=segment).nats == pytest.approx(nats)
    assert evaluation.token_by_token(model, stream).nats == pytest.approx(nats)
    apart = evaluation.non_overlapping(model, stream, window=6)
    by_hand = sum(
        F.cross_entropy(model(p[None, :-1]).logits[0], p[1:], reduction="sum").item()
        for p in (stream[0:7], stream[6:13], stream[12:19], stream[18:23])
    )
    assert apart.nats == pytest.approx(by_hand)
    assert apart.tokens == 22
    batched = evaluation.sliding(model, stream, window=6, stride=6, batch=3)
    assert batched.nats == pytest.approx(apart.nats)
    every = evaluation.sliding(model, stream, window=6, stride=1, batch=4)
    by_hand = sum(
        F.cross_entropy(model(stream[None, max(i - 6, 0) : i]).logits[0, -1], stream[i]).item()
        for i in range(1, 23)
    )
    assert every.nats == pytest.approx(by_hand)
    assert every.tokens == 22
    rows = torch.stack([stream, stream])
    assert evaluation.carried(model, rows, segment=5).nats == pytest.approx(2 * nats)


def test_evaluation_refuses_what_leaves_nothing_to_score():
    model = build(LongspanForCausalLM)
    with pytest.raises(LongspanError, match="1 tokens leave nothing"):
        evaluation.token_by_token(model, tokens(1))
    with pytest.raises(LongspanError, match="stride is 9"):
        evaluation.sliding(model, tokens(20), window=8, stride=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": ["multi-head-atention"]}, "did you mean 'multi-head-attention'"),
        ({"mixers": [{"id": "linear-transformer", "windw": 2}]}, "no argument 'windw'"),
        ({"mixers": []}, "mixers is empty"),
        ({"mixers": [{"window": 2}]}, "expected an id, or a dict"),
        ({"mixers": ["rope"]}, "of kind position and cannot stand in mixers"),
        ({"position": "multi-head-attention"}, "cannot stand in position"),
        ({"norm": "batch"}, "norm is 'batch'"),
        ({"pooling": "max"}, "pooling is 'max'"),
    ],
)
def test_configs_refuse(changes, message):
    with pytest.raises(LongspanError, match=message):
        config(**changes)


def test_models_refuse():
    x = tokens(2, 5)
    with pytest.raises(LongspanError, match=r"see the future.*use 'x-leaky-causal'.*allow_leaks"):
        LongspanForCausalLM(config(mixers=["x-leaky"]))
    LongspanForCausalLM(config(mixers=["x-leaky"], allow_leaks=True))
    with pytest.raises(LongspanError, match="'x-leaky' has no bidirectional form"):
        LongspanForMaskedLM(config(mixers=["x-leaky"]))
    with pytest.raises(LongspanError, match="cannot honour ALiBi"):
        LongspanForCausalLM(config(mixers=["linear-transformer"], position="alibi"))
    with pytest.raises(LongspanError, match="config is of a causal model"):
        LongspanForMaskedLM(config(causal=True))
    model = build(LongspanForCausalLM)
    for inputs, message in (
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": x, "attention_mask": torch.ones(2, 3)}, "attention_mask is"),
        ({"input_ids": x, "output_attentions": True}, "weights are not kept"),
        ({"input_ids": x, "past_key_values": object()}, "expected a longspan.hub.StateCache"),
        ({"input_ids": x, "labels": x, "logits_to_keep": 1}, "a loss needs all logits"),
        ({"input_ids": x, "past_key_values": StateCache(), "use_cache": False}, "one of the two"),
        ({"input_ids": x, "documents": x, "use_cache": True}, "carry no state"),
        ({"input_ids": x, "position_ids": torch.tensor([[0, 1, 0, 1, 2]] * 2)}, "give documents"),
        ({"input_ids": x, "marks": x > 3}, "treats all tokens alike"),
    ):
        with pytest.raises(LongspanError, match=message):
            model(**inputs)
    cache = model(x).past_key_values
    with pytest.raises(LongspanError, match="holds 2 rows and the input has 1"):
        model(x[:1], past_key_values=cache)
    with pytest.raises(LongspanError, match="is bidirectional"):
        build(LongspanModel)(x, use_cache=True)
    with pytest.raises(LongspanError, match="decoder_start_token_id"):
        build(LongspanForSeq2SeqLM)(x, labels=x)


def test_packing_documents_leaves_an_odd_shape_alone():
    model, x = build(LongspanForCausalLM), tokens(2, 5)
    with pytest.raises(LongspanError, match="expected a number per token"):
        model(x, documents=x[:, :3])
