"""One prompt, many continuations; several beams; and the same after a night on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import LongspanError
from longspan.hub import StateCache, prefix
from longspan.models import LongspanConfig, LongspanForCausalLM, LongspanForSeq2SeqLM
from longspan.nn import load_state, save_state

SIZES: dict[str, Any] = {"vocab_size": 32, "width": 24, "layers": 2, "heads": 2, "length": 64}
MIXERS = ["linear-transformer", "rwkv", "s4", "multi-head-attention"]
NEW = 6


def model(*mixers: str) -> LongspanForCausalLM:
    torch.manual_seed(0)
    config = LongspanConfig(mixers=mixers, tie_word_embeddings=False, **SIZES)
    built = LongspanForCausalLM(config).double().eval()
    # The initial 0.02 would leave every mixing far below the embeddings and tests blind to it.
    with torch.no_grad():
        for weight in (p for p in built.model.layers.parameters() if p.dim() > 1):
            weight.mul_(4)
    return built


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=None,
        )
    ).eval()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(seed))


def said(mask: Tensor, **more: Any) -> dict[str, Any]:
    return {
        "attention_mask": mask,
        "max_new_tokens": NEW,
        "do_sample": False,
        "no_repeat_ngram_size": 1,  # untrained models else say one token over and over
    } | more


@pytest.mark.parametrize("kind", [*MIXERS, "llama"])
@pytest.mark.parametrize("piece", [None, 3])
def test_continuations_of_a_prefix_are_those_of_the_whole(kind: str, piece: int | None) -> None:
    one: Any = llama() if kind == "llama" else model(kind)
    book, questions = tokens(1, 11), tokens(3, 5, seed=2)
    cache = prefix(one, book, piece=piece)
    assert cache.get_seq_length() == 11
    whole = torch.cat([book.expand(3, -1), questions], 1)
    asked = said(torch.ones_like(whole))
    expected = one.generate(whole, **asked)
    fed: list[int] = []
    hook = one.register_forward_pre_hook(
        lambda _, __, named: fed.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    assert torch.equal(one.generate(whole, past_key_values=cache.fork(3), **asked), expected)
    assert fed[0] == 5, "the prefix was read again"
    hook.remove()
    for n in range(3):
        asked = said(torch.ones_like(whole[n : n + 1]), past_key_values=cache.snapshot())
        assert torch.equal(one.generate(whole[n : n + 1], **asked), expected[n : n + 1])
    assert cache.get_seq_length() == 11


def test_continuations_of_several_lengths_are_padded_behind_the_prefix() -> None:
    one, book, questions = model("linear-transformer"), tokens(1, 8), tokens(2, 5, seed=2)
    whole = torch.cat([book.expand(2, -1), questions], 1)
    mask = torch.ones_like(whole)
    mask[0, 8:10] = 0
    cache = prefix(one, book).fork(2)
    got = one.generate(whole, **said(mask, past_key_values=cache, no_repeat_ngram_size=0))
    short = torch.cat([book, questions[:1, 2:]], 1)
    alone = one.generate(short, **said(torch.ones_like(short), no_repeat_ngram_size=0))
    assert torch.equal(got[0, -NEW:], alone[0, -NEW:])


def test_a_padded_prefix() -> None:
    one, x = model("rwkv"), tokens(2, 12)
    mask = torch.ones_like(x)
    mask[0, :4] = 0
    expected = one.generate(x, **said(mask))
    cache = prefix(one, x[:, :9], mask[:, :9], piece=4)
    assert torch.equal(one.generate(x, **said(mask, past_key_values=cache)), expected)


def test_a_prefix_is_kept_on_disk(tmp_path: Path) -> None:
    one, x = model("s4", "multi-head-attention"), tokens(2, 12)
    cache = prefix(one, x[:, :9])
    assert isinstance(cache, StateCache)
    save_state(cache.carried(), tmp_path / "prefix.safetensors")
    again = StateCache.of(load_state(tmp_path / "prefix.safetensors"))
    mask = torch.ones_like(x)
    assert torch.equal(
        one.generate(x, **said(mask, past_key_values=again)), one.generate(x, **said(mask))
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_beams_with_a_state_are_those_without(mixer: str) -> None:
    one, x = model(mixer), tokens(2, 9)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    asked = said(mask, num_beams=3, num_return_sequences=2)
    expected = one.generate(x, use_cache=False, **asked)
    assert not torch.equal(expected, one.generate(x, **said(mask)).repeat_interleave(2, 0))
    assert torch.equal(one.generate(x, **asked), expected)
    beams = prefix(one, x[:, :7], mask[:, :7]).fork(3)
    assert torch.equal(one.generate(x, past_key_values=beams, **asked), expected)


def test_what_has_no_prefix_says_so() -> None:
    with pytest.raises(LongspanError, match="what an encoder read is kept"):
        prefix(LongspanForSeq2SeqLM(LongspanConfig(**SIZES)), tokens(1, 4))
    with pytest.raises(LongspanError, match="piece is 0; expected at least one token"):
        prefix(model("rwkv"), tokens(1, 4), piece=0)
    with pytest.raises(LongspanError, match=r"sinkhorn-attention\) has no state to carry"):
        prefix(model("sinkhorn-attention"), tokens(1, 4))
