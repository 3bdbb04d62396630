"""Block-sparse patterns against transformers' BigBird and masks written out."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import BigBirdConfig, BigBirdModel

import longspan
from longspan.errors import LongspanError
from longspan.nn import Block, FeedForward, MultiHead

HEADS, WIDTH, BLOCK = 2, 4, 4
MODEL = HEADS * WIDTH


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    raised = (q @ k.mT / q.shape[-1] ** 0.5).exp() * seen
    return raised @ v / raised.sum(-1, keepdim=True).clamp(min=1e-300)


@pytest.mark.parametrize("length", [48, 80])
def test_bigbird_is_transformers(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of BigBirdModel in train mode, with our plan of random blocks: last states.

    Theirs is replaced because it may name window blocks again, which then count twice.
    """
    config = BigBirdConfig(
        vocab_size=30,
        hidden_size=MODEL,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=12,
        max_position_embeddings=128,
        attention_type="block_sparse",
        block_size=BLOCK,
        num_random_blocks=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        hidden_act="gelu",
    )
    hf: Any = BigBirdModel(config, add_pooling_layer=False).double().train()
    for seed, parameter in enumerate(hf.parameters()):
        parameter.data = random(*parameter.shape, seed=seed) / 2
    blocks, layers = length // BLOCK, []
    for i, layer in enumerate(hf.encoder.layer):
        attention = longspan.build("bigbird", block=BLOCK, chance=2, seed=i)
        plans = torch.stack(
            [attention.random.head(h).draw(torch.arange(1, blocks - 1), blocks) for h in (0, 1)]
        )
        assert (plans >= 0).all()
        theirs = layer.attention.self
        monkeypatch.setattr(
            theirs,
            "_bigbird_block_rand_mask_with_head",
            lambda plans=plans, **_: list(plans.numpy()),
        )
        mixer = MultiHead(attention, width=MODEL, heads=HEADS)
        for name, linear in (("q", theirs.query), ("k", theirs.key), ("v", theirs.value)):
            mixer.project[name].load_state_dict(linear.state_dict())
        mixer.output.load_state_dict(layer.attention.output.dense.state_dict())
        feed_forward = FeedForward(MODEL, inner=12)
        block = Block(mixer, feed_forward, width=MODEL, order="post").double()
        feed_forward.up.load_state_dict(layer.intermediate.dense.state_dict())
        feed_forward.down.load_state_dict(layer.output.dense.state_dict())
        for norm, of in (
            (block.mixer_norm, layer.attention.output.LayerNorm),
            (block.feed_forward_norm, layer.output.LayerNorm),
        ):
            assert isinstance(norm, torch.nn.LayerNorm)
            norm.load_state_dict(of.state_dict())
            norm.eps = of.eps
        layers.append(block)
    ids = torch.randint(1, 30, (2, length), generator=torch.Generator().manual_seed(0))
    want = hf(ids).last_hidden_state
    assert hf.attention_type == "block_sparse"
    y = hf.embeddings(input_ids=ids)
    for block in layers:
        y, _ = block(y)
    assert_close(y, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("options", [{}, {"near": 5, "hubs": (0, 3, -1), "chance": 0}])
@pytest.mark.parametrize("length", [40, 61])
def test_bigbird_external_is_the_union_mask(length: int, options: dict[str, Any]) -> None:
    """ETC: tokens before the sequence see and are seen by all, blocks count behind them."""
    attend = longspan.build("bigbird", block=BLOCK, **{"chance": 1, **options}, external=5)
    q, k, v = (random(2, HEADS, length + 5, WIDTH, seed=s).requires_grad_() for s in range(3))
    seen = torch.ones(HEADS, length + 5, length + 5, dtype=torch.bool)
    blocks = -(-length // BLOCK)
    at = torch.arange(length) // BLOCK
    for h in range(HEADS):
        plan = attend.random.head(h).draw(torch.arange(blocks), blocks)
        near = (at[:, None] - at).abs() <= attend.near // 2
        seen[h, 5:, 5:] = near | (plan[at][:, None] == at[None, :, None]).any(-1)
    got, want = attend(q, k, v)[0], softmax(q, k, v, seen)
    assert_close(got, want)
    toward = random(*want.shape, seed=9)
    found, wanted = (torch.autograd.grad(t, (q, k, v), toward) for t in (got, want))
    assert_close(found, wanted)


def test_bigbird_refuses() -> None:
    with pytest.raises(LongspanError, match="odd number of blocks"):
        longspan.build("bigbird", near=2)
    with pytest.raises(LongspanError, match="no causal form"):
        longspan.build("bigbird", causal=True, external=2)
