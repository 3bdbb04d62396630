"""The recipe of docs/pretrained.md for a sliding window with attention sinks (StreamingLLM)."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from longspan import convert

NEAR: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}
LENGTH, SINKS = 41, 4


def made() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def by_tokens(i: Tensor, j: Tensor) -> Tensor:
    return i - j <= 10


def by_blocks(i: Tensor, j: Tensor) -> Tensor:
    return i // 4 - j // 4 <= 2


@pytest.mark.parametrize(
    ("block", "sparsity", "near"),
    [
        pytest.param(1, {"near": 21, "hubs": [0, 1, 2, 3]}, by_tokens, id="by tokens"),
        pytest.param(4, {"near": 5, "hubs": [0]}, by_blocks, id="by blocks"),
    ],
)
def test_window_and_sinks_are_the_model_under_that_mask(
    block: int, sparsity: dict[str, Any], near: Any
) -> None:
    """Logits and gradients of the original, which transformers masks; and token by token."""
    model = made()
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    seen = (j <= i) & ((j < SINKS) | near(i, j))
    ids = torch.randint(50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    x = model.model.embed_tokens(ids).detach().requires_grad_()
    added = torch.where(seen, 0.0, torch.finfo(x.dtype).min).expand(2, 1, -1, -1)
    weights = torch.randn(2, LENGTH, 50, generator=torch.Generator().manual_seed(2))

    def run(**mask: Any) -> tuple[Tensor, Tensor]:
        logits = model(inputs_embeds=x, use_cache=False, **mask).logits
        return logits, torch.autograd.grad((logits * weights).sum(), x)[0]

    want = run(attention_mask=added)
    options = {"block": block, "sparsity": {"form": "bslongformer", **sparsity}}
    convert.swap(model, "deepspeed-sparse-attention", **options)
    assert_close(run(), want, **NEAR)
    cache, pieces = convert.SwappedCache(), []
    for token in ids.split([20, *[1] * (LENGTH - 20)], dim=1):
        pieces.append(model(token, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(pieces, 1), want[0], **NEAR)
