"""BERT and RoBERTa with BigBird and SMYRF; BigBird with a decoder, against BigBirdPegasus."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    BigBirdPegasusConfig,
    BigBirdPegasusForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
)

from longspan import LongspanError, build, convert
from longspan.convert.bert import SelfAttention, lengthen
from longspan.models import LongspanConfig, LongspanForSeq2SeqLM

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
NEAR: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def settle(model: Any, size: float = 0.4) -> Any:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator) * size
    return model.eval()


def original(kind: Any, known: int = 24) -> Any:
    roberta = kind.__name__.startswith("Roberta")
    rows = known + 2 * roberta
    config = RobertaConfig if roberta else BertConfig
    return settle(kind(config(**SMALL, max_position_embeddings=rows)))


def tokens(length: int, *, seed: int = 1) -> Tensor:
    return torch.randint(2, 50, (2, length), generator=torch.Generator().manual_seed(seed))


def padded(length: int, kept: int) -> tuple[Tensor, Tensor]:
    ids, mask = tokens(length), torch.ones(2, length, dtype=torch.long)
    ids[1, kept:], mask[1, kept:] = 1, 0
    return ids, mask


EXACT: list[Any] = [
    pytest.param(convert.bigbird, {"block": 8, "length": 64}, id="bigbird"),
    pytest.param(convert.smyrf, {"cluster": 64, "rounds": 1}, id="smyrf"),
]


@pytest.mark.parametrize("kind", [BertModel, RobertaModel])
@pytest.mark.parametrize(("swap", "options"), EXACT)
def test_pretrained_weights_give_the_models_own_outputs(
    kind: Any, swap: Any, options: dict[str, Any]
) -> None:
    """BigBird where it falls back to whole attention, SMYRF with one cluster; padding too."""
    model = original(kind)
    ids, mask = padded(24, 17)
    want = model(ids, mask).last_hidden_state * mask[..., None]
    swapped = swap(model, **options)
    got = swapped(ids, mask).last_hidden_state * mask[..., None]
    assert_close(got, want, **NEAR)
    with pytest.raises(LongspanError, match="convert the original"):
        swap(swapped, **options)
    with pytest.raises(LongspanError, match="output_attentions"):
        swapped(ids, mask, output_attentions=True)


@pytest.mark.parametrize("kind", [BertModel, RobertaModel])
def test_bigbird_tiles_positions_and_sees_by_its_pattern(kind: Any) -> None:
    model = original(kind)
    long = convert.bigbird(model, length=96, block=4, chance=1)
    first = 2 if kind is RobertaModel else 0
    table, old = (m.embeddings.position_embeddings.weight for m in (long, model))
    assert long.config.max_position_embeddings == len(table) == 96 + first
    assert_close(table[first : first + 96], old[first:].repeat(4, 1))
    ids, mask = padded(93, 70)
    out = long(ids, mask).last_hidden_state
    assert_close(out[1:, :70], long(ids[1:, :70]).last_hidden_state, **NEAR)
    seeds = [layer.attention.self.mixer.attention.random.seed for layer in long.encoder.layer]
    assert seeds == [0, 1], "every layer draws its own random blocks"
    one = long.encoder.layer[0].attention.self
    hidden = torch.randn(1, 80, 12, generator=torch.Generator().manual_seed(2)).requires_grad_()
    (grad,) = torch.autograd.grad(one(hidden)[0][0, 41].sum(), hidden)
    blocks = grad[0].abs().sum(-1).view(-1, 4).sum(1) > 0
    assert blocks[[0, 9, 10, 11, 19]].all()
    assert int(blocks.sum()) <= 5 + 3, "near, global, and one random block a head"


def test_a_converted_bigbird_trains_every_weight() -> None:
    long = convert.bigbird(original(BertForMaskedLM), length=80, block=4, chance=1).train()
    ids = tokens(80)
    long(ids, labels=ids).loss.backward()
    idle = {n for n, p in long.named_parameters() if p.grad is None or not p.grad.any()}
    # A softmax cancels what is added to all keys alike.
    assert not {n for n in idle if not n.endswith("project.k.bias")}


def test_smyrf_comes_nearer_with_more_rounds() -> None:
    model, ids = original(BertModel, known=64), tokens(64)
    want = model(ids).last_hidden_state
    errors = []
    for rounds in (1, 16):
        quick = convert.smyrf(model, cluster=8, rounds=rounds, seed=3)
        errors.append((quick(ids).last_hidden_state - want).square().mean().item())
    assert 0 < errors[1] < errors[0]


def test_smyrf_swaps_into_one_attention_module() -> None:
    """BertSelfAttention alone, with its weights."""
    module = original(BertModel).encoder.layer[0].attention.self
    hidden = torch.randn(2, 20, 12, generator=torch.Generator().manual_seed(2))
    mine = SelfAttention(module, build("smyrf", cluster=64, rounds=1))
    assert mine.mixer.project["q"] is module.query
    assert_close(mine(hidden)[0], module(hidden)[0], **NEAR)


def test_smyrf_lengthens_where_asked() -> None:
    model = original(BertModel)
    ids = tokens(60)
    assert convert.smyrf(model, cluster=8, length=64)(ids).last_hidden_state.isfinite().all()
    with pytest.raises(LongspanError, match="knows 24 positions"):
        lengthen(model.embeddings, 20)


@pytest.mark.parametrize("swap", [convert.bigbird, convert.smyrf])
def test_decoders_and_others_are_refused(swap: Any) -> None:
    decoder = BertModel(BertConfig(**SMALL, is_decoder=True))
    with pytest.raises(LongspanError, match="encoders and got a bert decoder"):
        swap(decoder)


PEGASUS: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 12,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 3,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 96,
    "block_size": 4,
    "num_random_blocks": 1,
    "attention_type": "block_sparse",
    "activation_function": "gelu",
    "scale_embedding": False,
    "use_bias": True,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}


def of_pegasus(model: Any) -> Any:
    """A LongspanForSeq2SeqLM with a sparse encoder, a full decoder and Pegasus' weights."""
    config = LongspanConfig(
        vocab_size=50,
        width=12,
        layers=2,
        heads=3,
        inner=20,
        mixers=["multi-head-attention"],
        encoder_mixers=[{"id": "bigbird", "block": 4, "chance": 1, "seed": i} for i in (0, 1)],
        position="learned-position",
        length=96,
    )
    ours: Any = LongspanForSeq2SeqLM(config)
    for mine, theirs in ((ours.encoder, model.model.encoder), (ours.decoder, model.model.decoder)):
        mine.position.table.data = theirs.embed_positions.weight.data
        mine.norm.load_state_dict(theirs.layernorm_embedding.state_dict())
        for layer, source in zip(mine.layers, theirs.layers, strict=True):
            inner = getattr(source.self_attn, "self", source.self_attn)
            pairs = [(layer.mixer.project[n[0]], inner, n) for n in ("query", "key", "value")]
            if mine is ours.decoder:
                pairs = [
                    (mixer.project[n], their, f"{n}_proj")
                    for mixer, their in (
                        (layer.mixer, source.self_attn),
                        (layer.cross, source.encoder_attn),
                    )
                    for n in "qkv"
                ]
                pairs += [
                    (layer.mixer.output, source.self_attn, "out_proj"),
                    (layer.cross.output, source.encoder_attn, "out_proj"),
                    (layer.cross_norm, source, "encoder_attn_layer_norm"),
                ]
            else:
                pairs += [(layer.mixer.output, source.self_attn, "output")]
            pairs += [
                (layer.mixer_norm, source, "self_attn_layer_norm"),
                (layer.feed_forward_norm, source, "final_layer_norm"),
                (layer.feed_forward.up, source, "fc1"),
                (layer.feed_forward.down, source, "fc2"),
            ]
            for own, holder, name in pairs:
                own.load_state_dict(getattr(holder, name).state_dict())
    ours.encoder.embed_tokens.weight.data = model.model.shared.weight.data
    ours.tie_weights()
    return ours


def test_a_sparse_encoder_and_a_full_decoder_are_bigbird_pegasus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In train mode, where transformers' random blocks are random, with our plan of them."""
    model = settle(BigBirdPegasusForConditionalGeneration(BigBirdPegasusConfig(**PEGASUS)))
    model.tie_weights()
    ours = of_pegasus(model).double().train()
    model = model.double().train()
    length = 64
    blocks = length // 4
    for layer, source in zip(ours.encoder.layers, model.model.encoder.layers, strict=True):
        random = layer.mixer.attention.random
        plans = torch.stack(
            [random.head(h).draw(torch.arange(1, blocks - 1), blocks) for h in range(3)]
        )
        monkeypatch.setattr(
            source.self_attn.self,
            "_bigbird_block_rand_mask_with_head",
            lambda plans=plans, **_: list(plans.numpy()),
        )
    ids, mask = padded(length, 51)
    answer = tokens(9, seed=2)
    want = model(input_ids=ids, attention_mask=mask, decoder_input_ids=answer)
    got = ours(ids, mask, answer)
    assert model.model.encoder.attention_type == "block_sparse"
    # Of the padded row theirs takes the last block, all padding, for the global one; ours does not.
    assert_close(got.logits[:1], want.logits[:1], atol=1e-9, rtol=1e-9)
