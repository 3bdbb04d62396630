"""Perceiver IO: transformers' weights, queries of every recipe, subsets, masks, bytes."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PerceiverConfig as TheirConfig
from transformers import PerceiverForMaskedLM as TheirMaskedLM
from transformers import PerceiverModel as TheirModel
from transformers import PerceiverTokenizer
from transformers.models.perceiver.modeling_perceiver import PerceiverBasicDecoder

from longspan import LongspanError
from longspan.mechanisms.latent.perceiver_io import PerceiverIO
from longspan.models.perceiver import (
    ByteTokenizer,
    PerceiverBytesConfig,
    PerceiverForMaskedLM,
    PerceiverIOConfig,
    PerceiverIOModel,
)
from longspan.nn.reading import Modalities, Places
from longspan.registry import build

NAMES = {
    "norm": "attention.self.layernorm1",
    "source_norm": "attention.self.layernorm2",
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.output": "attention.output.dense",
    "feed_norm": "layernorm",
    "feed.up": "mlp.dense1",
    "feed.down": "mlp.dense2",
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def copied(ours: Any, theirs: Any) -> None:
    """Give a reading the weights of one of transformers' layers."""
    found = {}
    for name in ours.state_dict():
        part, kind = name.rsplit(".", 1)
        found[name] = theirs.state_dict()[f"{NAMES[part]}.{kind}"]
    ours.load_state_dict(found)


def all_copied(ours: PerceiverIO, theirs: Any) -> None:
    """Give a model the weights of transformers' encoder and decoder."""
    ours.encoder.start.vectors.data.copy_(theirs.embeddings.latents)
    copied(ours.encoder.read, theirs.encoder.cross_attention)
    for one, other in zip(ours.processor.layers, theirs.encoder.self_attends, strict=True):
        copied(one, other)
    copied(ours.decoder, theirs.decoder.decoding_cross_attention)


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def noisy(model: torch.nn.Module) -> None:
    """Weights large enough for every part to matter."""
    for p in model.parameters():
        p.data.add_(0.2 * torch.randn_like(p))


@pytest.mark.parametrize("residual", [True, False])
def test_it_is_transformers_perceiver(residual: bool) -> None:
    config = TheirConfig(
        num_latents=5,
        d_latents=12,
        d_model=7,
        num_blocks=3,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=2,
        qk_channels=8,
        v_channels=12,
        cross_attention_widening_factor=2,
        self_attention_widening_factor=2,
        attention_probs_dropout_prob=0.0,
    )
    decoder = PerceiverBasicDecoder(
        config,
        output_num_channels=3,
        output_index_dims=6,
        num_channels=10,
        qk_channels=4,
        v_channels=6,
        num_heads=2,
        widening_factor=2,
        use_query_residual=residual,
        trainable_position_encoding_kwargs={"num_channels": 10, "index_dims": 6},
    )
    theirs = TheirModel(config, decoder=decoder).double().eval()
    noisy(theirs)
    ours = build(
        "perceiver-io",
        width=12,
        source_width=7,
        query_width=10,
        latents=5,
        layers=2,
        blocks=3,
        heads=4,
        cross_heads=2,
        write_heads=2,
        inner=8,
        value_width=12,
        write_inner=4,
        write_value_width=6,
        widening=2,
        residual=residual,
        chunk=4,
    ).double()
    all_copied(ours, theirs)
    x, mask = normal(2, 9, 7), torch.ones(2, 9)
    mask[1, 5:] = 0
    queries = decoder.output_position_encodings(2)  # pyright: ignore[reportOptionalCall]
    want = theirs(inputs=x, attention_mask=mask)
    got = ours(x, queries, keep=mask.bool())
    assert_close(decoder.final_layer(got), want.logits, rtol=0, atol=1e-12)
    assert_close(ours.latents(x, keep=mask.bool()), want.last_hidden_state, rtol=0, atol=1e-12)


def test_the_byte_model_is_transformers_masked_lm() -> None:
    config = TheirConfig(
        num_latents=5,
        d_latents=16,
        d_model=24,
        vocab_size=20,
        max_position_embeddings=11,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=8,
        num_cross_attention_heads=8,
        qk_channels=256,
        v_channels=16,
        attention_probs_dropout_prob=0.0,
    )
    theirs = TheirMaskedLM(config).double().eval()
    noisy(theirs)
    ours = bytes_model(vocab_size=20, length=11, embedding_width=24, width=16, inner=256).double()
    all_copied(ours.model, theirs.perceiver)
    text = theirs.perceiver.input_preprocessor
    ours.embed.weight.data.copy_(text.embeddings.weight)
    ours.places.learned.data.copy_(text.position_embeddings.weight)  # pyright: ignore
    asked: Any = theirs.perceiver.decoder
    asked = asked.output_position_encodings
    ours.queries.learned.data.copy_(asked.position_embeddings)  # pyright: ignore
    ours.bias.data.copy_(theirs.embedding_decoder.bias)
    ids, mask = torch.arange(22).view(2, 11) % 20, torch.ones(2, 11)
    mask[1, 7:] = 0
    want = theirs(inputs=ids, attention_mask=mask, labels=ids)
    got = ours(ids, mask, labels=ids)
    assert_close(got.logits, want.logits, rtol=0, atol=1e-11)
    assert_close(got.loss.double(), want.loss, rtol=1e-6, atol=0)
    at = torch.tensor([8, 2])
    assert_close(ours(ids, mask, at=at).logits, got.logits[:, at])


def bytes_model(**arguments: Any) -> PerceiverForMaskedLM:
    given: dict[str, Any] = {"length": 24, "embedding_width": 16, "latents": 5, "width": 16}
    given |= {"layers": 2, "heads": 8, "inner": 16}
    return PerceiverForMaskedLM(PerceiverBytesConfig(**given | arguments)).eval()


def test_the_byte_tokenizer_is_transformers() -> None:
    theirs, ours = PerceiverTokenizer(), ByteTokenizer()
    for text in ("hello", "naïve ☃", ""):
        assert ours(text) == theirs(text)["input_ids"]
        assert ours.decode(ours(text)) == text
    assert ours.special["[MASK]"] == theirs.mask_token_id
    ids, mask = ours.batch(["ab", "c"])
    assert ids.tolist() == [[4, 103, 104, 5], [4, 105, 5, 0]]
    assert mask.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]


def test_the_byte_model_learns_padded_text_and_reloads(tmp_path: Any) -> None:
    model, tokenizer = bytes_model(), ByteTokenizer()
    ids, mask = tokenizer.batch(["latents read", "and write"])
    hidden = ids.clone()
    hidden[:, 3:5] = tokenizer.special["[MASK]"]
    labels = torch.where(hidden == ids, -100, ids)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        loss = model(hidden, mask, labels=labels).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.2 * losses[0]
    assert all(p.grad is not None for p in model.parameters())
    other = torch.where(mask.bool(), hidden, 77)
    want = model(hidden, mask).logits
    assert_close(model(other, mask).logits, want)
    model.save_pretrained(tmp_path)
    assert_close(PerceiverForMaskedLM.from_pretrained(tmp_path)(hidden, mask).logits, want)


def arrays(**arguments: Any) -> PerceiverIOModel:
    sizes: dict[str, Any] = {
        "channels": 3,
        "shape": [4, 5],
        "bands": 2,
        "latents": 5,
        "width": 12,
        "heads": 3,
    }
    given: dict[str, Any] = {
        "layers": 2,
        "blocks": 2,
        "query_width": 8,
        "output_shape": [2, 3],
        "output_width": 2,
    }
    return PerceiverIOModel(PerceiverIOConfig(**sizes | given | arguments)).double().eval()


@pytest.mark.parametrize(
    ("recipe", "outputs"),
    [
        ({"queries": "learned"}, 6),
        ({"queries": "positions"}, 6),
        ({"queries": "positions", "positions": "learned", "place_channels": 4}, 6),
        ({"queries": "inputs", "residual": True}, 20),
        ({"queries": "given"}, 7),
    ],
    ids=str,
)
def test_queries_of_every_recipe_and_any_subset_of_outputs(
    recipe: dict, outputs: int, tmp_path: Any
) -> None:
    model, x = arrays(**recipe), normal(2, 20, 3)
    given = {"queries": normal(2, outputs, 8)} if recipe["queries"] == "given" else {}
    whole = model(x, **given).last_hidden_state
    assert whole.shape == (2, outputs, 2)
    for at in (torch.tensor([4, 0]), torch.tensor([[5, 1], [2, 2]])):
        rows = at.expand(2, -1)
        want = torch.stack([whole[b, rows[b]] for b in range(2)])
        assert_close(model(x, at=at, **given).last_hidden_state, want)
    mask = torch.ones(2, outputs)
    mask[0, 2:] = 0
    masked = model(x, query_mask=mask, **given).last_hidden_state
    assert_close(masked[0, :2], whole[0, :2])
    assert_close(masked[0, 2:], model.score.bias.expand(outputs - 2, -1))
    at = torch.tensor([1, 2])
    assert_close(model(x, query_mask=mask, at=at, **given).last_hidden_state, masked[:, at])
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.dim() > 1)
    model.save_pretrained(tmp_path)
    again = PerceiverIOModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert_close(again(x, **given).last_hidden_state, whole)


def test_queries_of_several_modalities() -> None:
    asked = Modalities({"sound": 4, "label": 6}, padding=2).double()
    places = Places([3], channels=4).double(), Places([1], channels=6).double()
    empty = normal(2, 3, 1), normal(2, 1, 1)
    queries, _ = asked({"sound": places[0](empty[0]), "label": places[1](empty[1])})
    model, x = arrays(queries="given", query_width=8), normal(2, 20, 3)
    whole = model(x, queries=queries).last_hidden_state
    assert whole.shape == (2, 4, 2)
    alone, _ = asked({"label": places[1](empty[1])})
    assert_close(model(x, queries=alone).last_hidden_state, whole[:, 3:])


def test_decoding_in_chunks_equals_decoding_at_once() -> None:
    model, x = arrays(queries="inputs"), normal(2, 20, 3)
    whole = model(x).last_hidden_state
    model.model.chunk = 7
    assert_close(model(x).last_hidden_state, whole)


def test_masked_inputs_do_not_reach_the_latents() -> None:
    model, x = arrays(positions="none"), normal(2, 9, 3)
    padded = torch.cat([x.new_full((2, 3, 3), torch.nan), x, x.new_full((2, 2, 3), torch.nan)], 1)
    mask = (~padded[..., 0].isnan()).long()
    assert_close(model(padded, mask).last_hidden_state, model(x).last_hidden_state)


def test_encoder_processor_and_decoder_are_separate() -> None:
    sizes = {"width": 12, "source_width": 3, "query_width": 12, "latents": 4, "residual": True}
    model = build("perceiver-io", layers=1, heads=2, cross_heads=1, write_heads=3, **sizes).double()
    x = normal(2, 9, 3)
    z = model.processor(model.encoder(x))
    assert_close(model.latents(x), z)
    assert_close(model(x, z), model.decoder(z, z))  # one more reading, between latents


def test_bad_recipes_are_refused() -> None:
    with pytest.raises(LongspanError, match="positions that are not none"):
        arrays(queries="positions", positions="none")
    with pytest.raises(LongspanError, match="sizes of the grid"):
        arrays(shape=None)
    with pytest.raises(LongspanError, match="exactly where"):
        arrays(queries="given")(normal(2, 20, 3))
