"""`attn_implementation="longspan:…"`: as sdpa where exact, cached as whole, refused by name."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LongformerConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
    __version__,
)
from transformers.masking_utils import create_bidirectional_mask

import longspan
from longspan import LongspanError, find, registry
from longspan.hub.attention import attention

EXACT = "longspan:multi-head-attention"
TOKENS = 11
VOCABULARY = 40
NONE = {"bos_token_id": None, "eos_token_id": None}

BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.5,
}
GROUPED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    **NONE,
}
MODELS = {
    "bert": (BertForMaskedLM, BertConfig(**BERT)),
    "roberta": (RobertaForMaskedLM, RobertaConfig(**BERT | {"pad_token_id": 1})),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=24,
            n_head=3,
            n_layer=2,
            n_positions=64,
            initializer_range=0.3,
            attn_pdrop=0.0,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            pad_token_id=0,
            scale_attn_by_inverse_layer_idx=True,
            **NONE,
        ),
    ),
    "llama": (LlamaForCausalLM, LlamaConfig(**GROUPED)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**GROUPED, head_dim=8)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(
            vocab_size=VOCABULARY,
            d_model=24,
            d_kv=8,
            num_heads=3,
            num_layers=2,
            d_ff=32,
            dropout_rate=0.0,
            relative_attention_max_distance=8,
            relative_attention_num_buckets=8,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=None,
        ),
    ),
    "vit": (
        ViTForImageClassification,
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=32,
            image_size=12,
            patch_size=4,
            hidden_dropout_prob=0.0,
            initializer_range=0.5,
        ),
    ),
    "whisper": (
        WhisperForConditionalGeneration,
        WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=24,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_mel_bins=6,
            max_source_positions=9,
            max_target_positions=64,
            dropout=0.0,
            init_std=0.3,
            decoder_start_token_id=1,
            pad_token_id=0,
            suppress_tokens=None,
            begin_suppress_tokens=None,
            **NONE,
        ),
    ),
}
DECODERS = ("gpt2", "llama", "qwen3")


def build(name: str, attn_implementation: str) -> PreTrainedModel:
    """A model of random weights, the same whatever its attention."""
    kind, config = MODELS[name]
    if not kind._can_set_attn_implementation():
        pytest.skip(f"{name} looks up no attention function in transformers {__version__}")
    torch.manual_seed(0)
    return kind._from_config(
        copy.deepcopy(config), attn_implementation=attn_implementation, dtype=torch.float64
    ).eval()


def tokens(length: int = TOKENS, *, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (2, length), generator=generator)


def padded(left: int, right: int) -> torch.Tensor:
    """An attention mask whose second row has padding."""
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :left] = 0
    mask[1, TOKENS - right :] = 0
    return mask


def inputs(name: str, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 12, 12, generator=generator).double()}
    if name == "whisper":
        features = torch.randn(2, 6, 18, generator=generator).double()
        return {
            "input_features": features,
            "decoder_input_ids": tokens(),
            "decoder_attention_mask": mask,
        }
    if name == "t5":
        return {"input_ids": tokens(), "attention_mask": mask, "decoder_input_ids": tokens(7)}
    return {"input_ids": tokens(), "attention_mask": mask}


def outputs(model: PreTrainedModel, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, 0 where a token is padding."""
    logits = model(**given).logits
    mask = given.get("decoder_attention_mask", given.get("attention_mask"))
    if mask is None or mask.shape[1] != logits.shape[1]:
        return logits
    return logits * mask[..., None]


@pytest.mark.parametrize(
    ("name", "left", "right", "id_"),
    [
        *(
            (name, left, right, "multi-head-attention")
            for name in MODELS
            for left, right in ((0, 0), (4, 0), (0, 3))
        ),
        ("t5", 4, 0, "rabe-staats?query_chunk=3&key_chunk=4"),
        ("llama", 4, 0, "rabe-staats?query_chunk=3&key_chunk=4"),
    ],
)
def test_exact_mechanisms_equal_sdpa(name: str, left: int, right: int, id_: str) -> None:
    given = inputs(name, padded(left, right))
    gradients = []
    for implementation in ("sdpa", attention(id_)):
        model = build(name, implementation)
        logits = outputs(model, given)
        (logits**2).sum().backward()
        gradients.append((logits, {n: p.grad for n, p in model.named_parameters()}))
    (wanted, wanted_by), (got, got_by) = gradients
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(got_by, wanted_by)


def generate(model: PreTrainedModel, given: dict[str, torch.Tensor], **options: object) -> list:
    """Greedy tokens, and the scores they were chosen by."""
    given = {n: t for n, t in given.items() if not n.startswith("decoder")}
    done = model.generate(
        **given,
        max_new_tokens=6,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    return [done.sequences, torch.stack(done.scores)]


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        *((name, "multi-head-attention") for name in (*DECODERS, "t5", "whisper")),
        ("t5", "rabe-staats?key_chunk=3"),
        *((name, "linear-transformer") for name in (*DECODERS, "whisper")),
        *((name, "performer?features=16") for name in (*DECODERS, "whisper")),
        *((name, "longformer?window=6") for name in DECODERS),
        *((name, "nat?window=4") for name in DECODERS),
    ],
)
def test_generating_with_a_cache_equals_without(name: str, id_: str) -> None:
    model = build(name, attention(id_))
    given = inputs(name, padded(4, 0))
    wanted = generate(model, given, use_cache=False)
    torch.testing.assert_close(generate(model, given, use_cache=True), wanted)


def test_beams_with_a_cache_equal_those_without() -> None:
    model = build("llama", attention("linear-transformer"))
    given = inputs("llama", padded(4, 0))
    wanted = generate(model, given, use_cache=False, num_beams=3)
    torch.testing.assert_close(generate(model, given, num_beams=3), wanted)


@pytest.mark.parametrize("left", [0, 4])
@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_static_caches_equal_dynamic_ones(name: str, left: int) -> None:
    model = build(name, EXACT)
    given = inputs(name, padded(left, 0))
    wanted = generate(model, given)
    static = generate(model, given, cache_implementation="static", disable_compile=True)
    torch.testing.assert_close(static, wanted)


def test_a_static_cache_without_a_mask_hides_its_empty_places() -> None:
    from transformers import StaticCache

    model = build("llama", EXACT)
    ids = tokens()
    cache = StaticCache(config=model.config, max_cache_len=32)
    first = model(ids[:, :5], past_key_values=cache).logits
    second = model(ids[:, 5:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, second], 1), model(ids).logits)


REFUSED = {
    "abc": "needs heads",
    "adaptive-attention-span": "parameters of its own",
    "aft": "parameters of its own",
    "da-transformer": "parameters of its own",
    "fast-weight-delta-dpfp": "parameters of its own",
    "flashattention": "'flash' in it",
    "informer-causal": "takes keys before its queries in a state alone",
    "kernelized-attention-rpe": "needs length",
    "linformer": "needs length",
    "memory-compressed-attention": "parameters of its own",
    "music-transformer": "needs length",
    "reformer-lsh": "queries as keys",
    "reformer-lsh-causal": "queries as keys",
    "rfa": "parameters of its own",
    "routing-transformer": "changes from call to call",
    "routing-transformer-causal": "changes from call to call",
    "sinkhorn-attention": "expected mlp with a length",
    "synthesizer": "parameters of its own",
}


def refusal_of(id_: str) -> str:
    """Why a mechanism is refused; empty where it is not."""
    try:
        attention(id_)
    except LongspanError as refusal:
        return str(refusal)
    return ""


@pytest.mark.parametrize("id_", [card.id for card in find(kind="attention")])
def test_every_attention_serves_in_its_forms_or_is_refused(id_: str) -> None:
    """Serving causally means: strictly so, and the same in pieces with a cache as at once."""
    refusal = refusal_of(id_)
    assert (REFUSED.get(id_, "parameters of its own") in refusal) if refusal else id_ not in REFUSED
    if refusal:
        return
    card = registry.show(id_)
    small = {n: v for n, v in card.tiny.items() if n not in ("heads", "head_width")}
    key = attention(f"{id_}({', '.join(f'{n}={v!r}' for n, v in small.items())})")
    ids = tokens(40)
    for name, form in (("bert", "bidirectional"), ("gpt2", "causal")):
        model = build(name, key)
        if form not in card.modes:
            with pytest.raises(LongspanError, match=f"attends in the {form} form"):
                model(ids)
        elif form == "causal" and card.causality != "strict":
            with pytest.raises(LongspanError, match="can see the future"):
                model(ids)
        elif id_ == "longformer" and form == "bidirectional":
            with pytest.raises(LongspanError, match=r"projections of its own \(q_global"):
                model(ids)
        else:
            whole = model(ids).logits
            assert whole.isfinite().all()
            if form == "causal":
                cache, pieces = DynamicCache(config=model.config), []
                for piece in ids.split([17, 1, 1, 21], dim=1):
                    pieces.append(model(piece, past_key_values=cache).logits)
                torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
                changed = torch.cat([ids[:, :23], tokens(17, seed=9)], 1)
                torch.testing.assert_close(
                    model(changed).logits[:, :23], whole[:, :23], rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        ("gpt2", "longformer?window=4"),
        ("llama", "linear-transformer"),
        ("qwen3", "performer?features=8"),
        ("bert", "nat?window=3"),
        ("vit", "nystromformer?landmarks=2"),
        ("whisper", "efficient-attention"),
    ],
)
def test_efficient_mechanisms_differ_from_dense(name: str, id_: str) -> None:
    given = inputs(name, padded(0, 0))
    dense, efficient = (outputs(build(name, key), given) for key in ("sdpa", attention(id_)))
    assert efficient.isfinite().all()
    assert (dense - efficient).abs().max() > 1e-3


def test_padding_is_honoured_by_an_efficient_mechanism() -> None:
    """What stands at masked places changes nothing."""
    model = build("bert", attention("linear-transformer"))
    mask = padded(0, 3)
    ids = tokens()
    other = torch.where(mask.bool(), ids, 5)
    wanted = outputs(model, {"input_ids": ids, "attention_mask": mask})
    got = outputs(model, {"input_ids": other, "attention_mask": mask})
    torch.testing.assert_close(got, wanted)


def test_names_are_accepted_wherever_transformers_takes_one(tmp_path) -> None:
    key = longspan.attention("performer(features=8, seed=3)")
    assert key == attention("longspan:performer?features=8&seed=3")
    ids = tokens()
    wanted = build("llama", key).float()
    wanted.save_pretrained(tmp_path)
    assert wanted.config._attn_implementation == key
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=key)
    torch.testing.assert_close(loaded(ids).logits, wanted(ids).logits)
    changed = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.allclose(changed(ids).logits, wanted(ids).logits)
    changed.set_attn_implementation(key)
    torch.testing.assert_close(changed(ids).logits, wanted(ids).logits)
    changed.set_attn_implementation("longspan:linear-transformer")
    assert changed(ids).logits.isfinite().all()
    AutoModelForCausalLM.from_config(loaded.config, attn_implementation=key)


def test_dropout_is_honoured_in_training() -> None:
    model = build("gpt2", EXACT)
    for layer in model.transformer.h:
        layer.attn.attn_dropout.p = 0.5
    ids = tokens()
    torch.testing.assert_close(model(ids).logits, build("gpt2", "sdpa")(ids).logits)
    model.train()
    torch.manual_seed(0)
    first = model(ids).logits
    torch.manual_seed(0)
    again, other = model(ids).logits, model(ids).logits
    torch.testing.assert_close(first, again)
    assert not torch.allclose(again, other)


def test_building_leaves_the_callers_draws_alone() -> None:
    ids = tokens()
    for key in (attention("performer?features=8&seed=5"), attention("yoso?rounds=2&seed=5")):
        model = build("bert", key).float()
        before = torch.get_rng_state()
        with torch.inference_mode():
            model(ids)
        assert torch.equal(torch.get_rng_state(), before)
        model(ids).logits.sum().backward()  # no inference tensors were kept


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("longfomer", "no mechanism 'longfomer'; did you mean 'longformer'"),
        ("longspan:performer?feature=8", "has no argument 'feature'; did you mean 'features'"),
        ("performer?features", "cannot be read: write name=literal"),
        ("s4", "of kind mixer and attn_implementation takes attentions: longspan.find"),
        ("performer?redraw_every=9", "changes from call to call in training, and all layers"),
        ("performer?causal=True", "causal=True, which is the model's to say"),
        ("longformer?window=3", "must be even"),
        ("linformer?length=64&slots=8", "parameters of its own .*longspan.convert.swap"),
    ],
)
def test_what_cannot_serve_is_refused_when_it_is_named(text: str, message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        attention(text)


def test_unregistered_names_are_refused_by_transformers() -> None:
    with pytest.raises(ValueError, match="longspan:longfomer"):
        build("llama", "longspan:longfomer")


def test_an_id_registered_unchecked_is_refused_when_called() -> None:
    with pytest.raises(LongspanError, match="'aft' has parameters of its own"):
        build("gpt2", "longspan:aft")(tokens())


def test_an_unfixed_length_is_refused_causally() -> None:
    with pytest.raises(LongspanError, match=r"another output when more .*length="):
        build("gpt2", attention("cosformer"))(tokens())
    assert build("bert", attention("cosformer"))(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("length", [7, TOKENS])
def test_a_cross_attention_needs_the_cross_form(length: int) -> None:
    """Also where there happen to be as many queries as keys."""
    model = build("whisper", attention("longformer?window=4"))
    with pytest.raises(LongspanError, match=r"projections of its own \(q_global"):
        model(**inputs("whisper", padded(0, 0)))
    decoder = build("whisper", attention("local-block-attention?block=4")).model.decoder
    memory = torch.zeros(2, TOKENS, 24, dtype=torch.float64)
    with pytest.raises(LongspanError, match="in the cross form, which 'local-block-attention'"):
        decoder(tokens(length), encoder_hidden_states=memory)


def test_a_bias_that_cannot_be_added_is_refused() -> None:
    model = build("t5", attention("linear-transformer"))
    with pytest.raises(LongspanError, match="T5Attention adds a bias to its scores"):
        model(**inputs("t5", padded(0, 0)))


def test_dropout_that_cannot_be_honoured_is_refused() -> None:
    model = build("gpt2", attention("linear-transformer"))
    model.transformer.h[0].attn.attn_dropout.p = 0.1
    assert model(tokens()).logits.isfinite().all()
    with pytest.raises(LongspanError, match="no dropout of its weights: set the attention dropout"):
        model.train()(tokens())


def test_masks_beyond_padding_are_refused() -> None:
    model = build("llama", EXACT)
    ids = tokens()
    square = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    with pytest.raises(LongspanError, match=r"LlamaAttention got a mask of shape \(2, 1, 11, 11\)"):
        model(ids, attention_mask=square)
    packed = torch.cat([torch.arange(5), torch.arange(6)]).expand(2, -1)
    with pytest.raises(LongspanError, match="packed sequences, or a mask of its own"):
        model(ids, position_ids=packed, use_cache=False)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    with pytest.raises(LongspanError, match="attention_mask has 6 tokens for 11 keys"):
        model(ids[:, 5:], attention_mask=torch.ones(2, 6), past_key_values=cache)


def test_a_models_own_window_is_refused() -> None:
    config = MistralConfig(**GROUPED, sliding_window=4)
    model = MistralForCausalLM._from_config(config, attn_implementation=EXACT)
    with pytest.raises(LongspanError, match="a window or chunks of 4 tokens"):
        model(tokens())
    config.sliding_window = None
    plain = MistralForCausalLM._from_config(config, attn_implementation=EXACT)
    assert plain(tokens()).logits.isfinite().all()


def test_a_model_that_looks_no_attention_up_is_refused() -> None:
    """Its masks would change and its attention would not."""
    config = LongformerConfig(**BERT, attn_implementation=EXACT)
    with pytest.raises(LongspanError, match="LongformerConfig looks up no attention function"):
        create_bidirectional_mask(
            config=config, inputs_embeds=torch.zeros(2, TOKENS, 24), attention_mask=None
        )


@pytest.mark.parametrize(
    ("argument", "value", "what"),
    [
        ("sliding_window", 4, "a sliding window"),
        ("softcap", 30.0, "scores that are capped"),
        ("s_aux", torch.zeros(3), "attention sinks"),
        ("cu_seq_lens_q", torch.tensor([0, 3]), "sequences packed in a row"),
        ("output_attentions", True, "attention weights"),
    ],
)
def test_what_a_module_asks_for_beyond_is_refused(argument, value, what) -> None:
    layer = build("bert", EXACT).bert.encoder.layer[0].attention.self
    x = torch.zeros(1, 4, 24, dtype=torch.float64)
    with pytest.raises(LongspanError, match=f"BertSelfAttention asks for {what}.* .{argument}"):
        layer(x, **{argument: value})
