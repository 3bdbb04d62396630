"""Pretrained models with another mechanism inside: taken back, forked and speculated on."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import convert
from longspan.hub.swapped import SwappedCache

MIXES: list[dict[int, str]] = [{0: "linear-transformer"}, {0: "rfa", 1: "efficient-attention"}]


def llama(seed: int = 0, layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, num_attention_heads=2, eos_token_id=None
    )
    model = LlamaForCausalLM(config).double().eval()
    # As initialised, embeddings hide all mixing.
    with torch.no_grad():
        for weight in (p for p in model.model.layers.parameters() if p.dim() > 1):
            weight.mul_(20)
    model.generation_config.update(assistant_confidence_threshold=0.0, num_assistant_tokens=4)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mix", MIXES, ids=str)
@torch.no_grad()
def test_rolled_back_tokens_have_never_been_seen(mix: dict[int, str]) -> None:
    model, x, wrong = convert.swap(llama(), mix), tokens(2, 16), tokens(2, 6, seed=7)
    mask = torch.ones_like(x)
    mask[0, :3] = 0
    expected = model(x, attention_mask=mask).logits

    def feed(cache: SwappedCache, piece: Tensor) -> Tensor:
        stop = cache.get_seq_length() + piece.shape[1]
        return model(piece, attention_mask=mask[:, :stop], past_key_values=cache).logits

    cache = SwappedCache()
    feed(cache, x[:, :6])
    held = cache.snapshot()
    cache.record()
    feed(cache, torch.cat([x[:, 6:8], wrong[:, :3]], 1))
    feed(cache, wrong[:, 3:4])
    cache.rollback(4)
    assert cache.get_seq_length() == 8
    torch.testing.assert_close(feed(cache, x[:, 8:12]), expected[:, 8:12])
    cache.rollback(2)
    forked = cache.fork(2)
    torch.testing.assert_close(feed(cache, x[:, 10:]), expected[:, 10:])
    mask, x = mask.repeat_interleave(2, 0), x.repeat_interleave(2, 0)
    torch.testing.assert_close(feed(forked, x[:, 10:]), expected[:, 10:].repeat_interleave(2, 0))
    mask, x = mask[::2], x[::2]
    torch.testing.assert_close(feed(held, x[:, 6:]), expected[:, 6:])


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_speculation_is_greedy(mix: dict[int, str]) -> None:
    model = convert.swap(llama(), mix)
    said: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "no_repeat_ngram_size": 1}
    for seed in range(2):
        x = tokens(1, 5 + seed, seed=seed)
        said["attention_mask"] = torch.ones_like(x)
        greedy = model.generate(x, **said)
        for draft in (llama(), llama(3, layers=1)):
            more = {"assistant_model": draft, "past_key_values": SwappedCache()}
            assert torch.equal(model.generate(x, **said, **more), greedy)
