"""Memory Transformer: three variants, an encoder, an encoder-decoder, a helper."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import BertConfig, BertModel

from longspan import LongspanError
from longspan.models.memory_transformer import (
    MemoryConfig,
    MemoryForMaskedLM,
    MemoryForSeq2SeqLM,
    WithMemory,
)
from longspan.registry import build

E, L, VARIANTS = 12, 7, ("transformer", "control", "bottleneck")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def encoder(**arguments: Any) -> Any:
    given = {"width": E, "heads": 3, "layers": 2, "slots": 4, "inner": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build("memory-transformer", **given | arguments).double().eval()
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p) / 5)
    return module


def torch_encoder(module: Any) -> nn.TransformerEncoder:
    """torch's own encoder with the weights of ours."""
    layer = nn.TransformerEncoderLayer(E, 3, 16, 0.0, batch_first=True, dtype=torch.float64)
    theirs = nn.TransformerEncoder(layer, len(module.layers), enable_nested_tensor=False).eval()
    with torch.no_grad():
        for a, b in zip(theirs.layers, module.layers, strict=True):
            part: Any = b.of_tokens
            project = part.mixer.project
            a.self_attn.in_proj_weight.copy_(torch.cat([project[n].weight for n in "qkv"]))
            a.self_attn.in_proj_bias.copy_(torch.cat([project[n].bias for n in "qkv"]))
            a.self_attn.out_proj.load_state_dict(part.mixer.output.state_dict())
            a.norm1.load_state_dict(part.mixer_norm.state_dict())
            a.norm2.load_state_dict(part.feed_forward_norm.state_dict())
            a.linear1.load_state_dict(part.feed_forward.up.state_dict())
            a.linear2.load_state_dict(part.feed_forward.down.state_dict())
    return theirs


@pytest.mark.parametrize("slots", [0, 4])
def test_mem_transformer_is_torchs_encoder_on_memory_and_sequence(slots: int) -> None:
    module, x = encoder(slots=slots), normal(2, L, E)
    y, memory = module(x)
    start = x[:, :0] if slots == 0 else module.slots.expand(2, -1, -1)
    want = torch_encoder(module)(torch.cat([start, x], 1))
    assert_close(y, want[:, slots:])
    assert_close(memory, want[:, :slots])


def test_mem_control_without_memory_is_the_plain_encoder() -> None:
    module, x = encoder(slots=0, variant="control"), normal(2, L, E)
    assert_close(module(x)[0], torch_encoder(module)(x))


def test_mem_control_with_tied_sub_layers_is_mem_transformer() -> None:
    module, plain, x = encoder(variant="control"), encoder(), normal(2, L, E)
    assert not torch.allclose(module(x)[0], plain(x)[0])
    plain.slots = module.slots
    for a, b in zip(module.layers, plain.layers, strict=True):
        a.of_memory.load_state_dict(a.of_tokens.state_dict())
        b.of_tokens.load_state_dict(a.of_tokens.state_dict())
    for got, want in zip(module(x), plain(x), strict=True):
        assert_close(got, want)


def test_in_the_bottleneck_tokens_meet_through_memory_alone() -> None:
    module, x = encoder(variant="bottleneck", layers=1), normal(1, L, E).requires_grad_()
    of_tokens, (y, updated) = module.layers[0].of_tokens, module(x)
    assert_close(y, of_tokens(x, context=updated)[0])  # it reads the updated memory
    fixed = of_tokens(x, context=updated.detach())[0]
    for i in range(L):
        (g,) = torch.autograd.grad(fixed[:, i].sum(), x, retain_graph=True)
        assert g[0].any(-1).nonzero()[:, 0].tolist() == [i]
    (g,) = torch.autograd.grad(y[:, 0].sum(), x)
    assert g[0].any(-1).all()


def test_the_bottleneck_without_feed_forwards_is_induced_point_attention() -> None:
    """MAB(X, MAB(I, [I ; X])) of the Set Transformer, by torch's own attention."""
    module, x = encoder(variant="bottleneck", feeds=False, layers=1), normal(2, L, E)
    layer = module.layers[0]

    def block(part: Any, query: Tensor, keys: Tensor) -> Tensor:
        theirs = nn.MultiheadAttention(E, 3, batch_first=True, dtype=torch.float64)
        with torch.no_grad():
            project = part.mixer.project
            theirs.in_proj_weight.copy_(torch.cat([project[n].weight for n in "qkv"]))
            theirs.in_proj_bias.copy_(torch.cat([project[n].bias for n in "qkv"]))
            theirs.out_proj.load_state_dict(part.mixer.output.state_dict())
        return part.mixer_norm(query + theirs(query, keys, keys)[0])

    induced = module.slots.expand(2, -1, -1)
    induced = block(layer.of_memory, induced, torch.cat([induced, x], 1))
    y, memory = module(x)
    assert_close(memory, induced)
    assert_close(y, block(layer.of_tokens, x, induced))


@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_masks_the_sequence_and_never_memory(variant: Any) -> None:
    module, x = encoder(variant=variant), normal(2, L, E).requires_grad_()
    y, memory = module(x)
    nothing = torch.full((2, 5, E), torch.nan, dtype=torch.float64)
    for left in (True, False):
        padded = torch.cat([nothing, x] if left else [x, nothing], 1)
        keep = ~padded.isnan().any(-1)
        got, slots = module(padded, keep=keep)
        assert_close(got[keep].view_as(y), y)
        assert_close(slots, memory)
        assert not got[~keep].any()
    empty, slots = module(nothing, keep=torch.zeros(2, 5, dtype=torch.bool))
    assert not empty.any()
    assert slots.isfinite().all()
    (y.square().sum() + memory.square().sum()).backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_only_the_bottleneck_is_linear_in_length() -> None:
    from longspan.testing import count

    def flops(variant: Any, length: int) -> int:
        module = encoder(variant=variant, layers=1).float()
        return count(lambda: module(torch.zeros(1, length, E))[0].sum().backward()).flops

    growth = {v: flops(v, 1024) / flops(v, 256) for v in VARIANTS}
    assert growth["bottleneck"] < 4.1
    assert growth["transformer"] > 6
    assert growth["control"] > 6


SIZES = {"vocab_size": 11, "width": E, "layers": 2, "heads": 3, "inner": 16, "slots": 3}
TOKENS = torch.randint(1, 11, (2, L), generator=torch.Generator().manual_seed(0))


def model(kind: Any, **arguments: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = kind(MemoryConfig(**SIZES, **arguments))
        with torch.no_grad():
            for p in built.parameters():
                p.add_(torch.randn_like(p) / 10)
    return built.double().eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_encoder_decoder_attends_to_memory_trains_and_reloads(
    variant: Any, tmp_path: Any
) -> None:  # fmt: skip
    seq2seq = model(MemoryForSeq2SeqLM, variant=variant, decoder_start_token_id=0)
    want = seq2seq(TOKENS, labels=TOKENS)
    want.loss.backward()
    assert seq2seq.encoder.encoder.slots.grad.any()
    assert all(p.grad is not None for p in seq2seq.parameters())
    padded, mask = (nn.functional.pad(t, (4, 0)) for t in (TOKENS, torch.ones_like(TOKENS)))
    assert_close(seq2seq(padded, mask, labels=TOKENS).logits, want.logits)
    seq2seq.save_pretrained(tmp_path)
    again = MemoryForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert_close(again(TOKENS, labels=TOKENS).logits, want.logits)
    given = {"max_new_tokens": 4, "attention_mask": mask, "num_beams": 2}
    assert torch.equal(
        seq2seq.generate(padded, use_cache=True, **given),
        seq2seq.generate(padded, use_cache=False, **given),
    )


def test_memory_is_cut_off_before_the_head_and_kept_for_the_decoder() -> None:
    masked = model(MemoryForMaskedLM)
    out = masked.model(TOKENS)
    assert masked(TOKENS, labels=TOKENS).logits.shape == (2, L, 11)
    assert out.last_hidden_state.shape == (2, L, E)
    assert out.memory.shape == (2, 3, E)
    assert_close(out.whole, torch.cat([out.memory, out.last_hidden_state], 1))


def test_tokens_keep_the_positions_they_have_without_memory() -> None:
    with torch.random.fork_rng():
        few, more = (MemoryForMaskedLM(MemoryConfig(**SIZES | {"slots": s})).eval() for s in (1, 9))
    more.model.embedding.load_state_dict(few.model.embedding.state_dict())
    given = [m.model.embedding(TOKENS, use_cache=False).last_hidden_state for m in (few, more)]
    assert_close(*given)


def test_memory_tokens_are_added_to_a_pretrained_encoder() -> None:
    config = BertConfig(
        vocab_size=11, hidden_size=E, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=16, max_position_embeddings=L,
    )  # fmt: skip
    with torch.random.fork_rng():
        bert = BertModel(config, add_pooling_layer=False).eval()
        before = bert.get_input_embeddings().weight.detach().clone()
        module = WithMemory(bert, slots=3)
    weight: Any = bert.get_input_embeddings().weight
    assert weight.shape == (14, E)
    assert torch.equal(weight[:11], before)
    y, memory = module(TOKENS)  # as long as the encoder can: memory takes no positions
    assert (y.shape, memory.shape) == ((2, L, E), (2, 3, E))
    padded, mask = (nn.functional.pad(t[:, :4], (0, 3)) for t in (TOKENS, torch.ones_like(TOKENS)))
    assert_close(module(padded, mask)[0][:, :4], module(TOKENS[:, :4])[0])
    memory.sum().backward()
    assert weight.grad[11:].any(-1).all()
    with pytest.raises(LongspanError, match="1 or more"):
        WithMemory(bert, slots=0)


def test_bad_arguments_are_refused() -> None:
    for wrong in ({"slots": -1}, {"slots": 0, "variant": "bottleneck"}):
        with pytest.raises(LongspanError, match="1 or more in a bottleneck"):
            encoder(**wrong)
