"""What LongT5 claims beyond the laws: its model, its conversions, its pre-training task."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertModel,
    LongT5EncoderModel,
    LongT5ForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)
from transformers import LongT5Config as TheirConfig

from longspan import build
from longspan.convert.longt5 import longt5
from longspan.data.gap_sentences import gap_sentences, principal_sentences
from longspan.engines import pattern
from longspan.errors import LongspanError
from longspan.models.longt5 import LongT5Config, LongT5ForSeq2SeqLM, LongT5Stack

SIZES: dict[str, Any] = {
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 20,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 3,
    "vocab_size": 30,
    "decoder_start_token_id": 0,
    "attn_implementation": "eager",
}
# transformers computes its norms and its softmax in float32, whatever the dtype.
NEAR: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def settle(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.4
    model.tie_weights()
    return model.double().eval()


def theirs(kind: str, *, encoder: bool = False, old: bool = False) -> Any:
    sizes: dict[str, Any] = SIZES | {"feed_forward_proj": "relu" if old else "gated-gelu"}
    sizes |= {"tie_word_embeddings": old}
    if kind == "t5":
        config: Any = T5Config(**sizes)
        return settle((T5EncoderModel if encoder else T5ForConditionalGeneration)(config))
    config = TheirConfig(**sizes, local_radius=5, global_block_size=4, encoder_attention_type=kind)
    return settle((LongT5EncoderModel if encoder else LongT5ForConditionalGeneration)(config))


def tokens(length: int, *, lengths: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
    ids = torch.randint(2, 30, (2, length), generator=torch.Generator().manual_seed(1))
    at = torch.arange(length)
    return ids, (at < torch.tensor(lengths or (length, length))[:, None]).long()


KINDS = ["local", "transient-global"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "lengths", [(27, 27), (27, 18), (24, 3), (23, 1)], ids=str
)  # orphans, whole blocks, fewer tokens than a block
def test_the_encoder_is_that_of_transformers(kind: str, lengths: tuple[int, int]) -> None:
    """Exact borders, sums and their norm, orphans, padding; gradients too."""
    original: Any = theirs(kind, encoder=True)
    ours: Any = longt5(original)
    assert isinstance(ours, LongT5Stack)
    ids, mask = tokens(lengths[0], lengths=lengths)
    want = original(ids, mask).last_hidden_state
    got = ours(ids, mask).last_hidden_state
    keep = mask[..., None]
    assert_close(got * keep, want * keep, **NEAR)
    (got * keep).square().sum().backward()
    (want * keep).square().sum().backward()
    first = original.encoder.block[0].layer[0]
    inner = getattr(first, "LocalSelfAttention", None) or first.TransientGlobalSelfAttention
    mixer: Any = ours.layers[0].mixer
    pairs = [
        (mixer.near.table, inner.relative_attention_bias),
        (mixer.project["k"], inner.k),
        (ours.embed_tokens, original.shared),
    ]
    if kind != "local":
        pairs += [
            (mixer.far.table, inner.global_relative_attention_bias),
            (mixer.norm, inner.global_input_layer_norm),
        ]
    for a, b in pairs:
        assert_close(a.weight.grad, b.weight.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("old", [False, True], ids=["v1.1", "v1.0"])
@pytest.mark.parametrize("kind", [*KINDS, "t5"])
def test_the_whole_model_is_that_of_transformers(kind: str, old: bool) -> None:
    """T5 weights load; with r ≥ L and no globals LongT5 is T5."""
    original = theirs(kind, old=old)
    ours: Any = longt5(original)
    ids, mask = tokens(27, lengths=(27, 18))
    decoder_ids, _ = tokens(7)
    want = original(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits
    assert_close(ours(ids, mask, decoder_ids).logits, want, **NEAR)
    asked: Any = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(ours.generate(ids, **asked), original.generate(ids, **asked))
    beams = ours.generate(ids, **asked, num_beams=3)
    assert torch.equal(beams, original.generate(ids, **asked, num_beams=3))


def test_r_beyond_the_length_without_globals_is_t5s_encoder() -> None:
    original: Any = theirs("t5", encoder=True)
    ids, mask = tokens(33)
    ours: Any = longt5(original, radius=40)
    got = ours(ids, mask).last_hidden_state
    assert_close(got, original(ids, mask).last_hidden_state, **NEAR)


def test_globals_of_one_token_are_a_second_set_of_keys() -> None:
    """k = 1: dense attention over [x ; RMSNorm(x)]."""
    mixer: Any = build("longt5", width=12, heads=1, radius=50, block=1).double()
    x = torch.randn(1, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    keys = torch.cat([x, mixer.norm(x)], 1)
    i = torch.arange(9)
    bias = torch.cat([mixer.near.of(i - i[:, None]), mixer.far.of(i - i[:, None])], 2)
    scores = mixer.project["q"](x) @ mixer.project["k"](keys).mT + bias
    want = mixer.output(scores.softmax(-1) @ mixer.project["v"](keys))
    assert_close(mixer(x)[0], want)


def test_local_and_transient_global_convert_into_each_other() -> None:
    ids, mask = tokens(27, lengths=(27, 18))
    decoder_ids, _ = tokens(5)
    local: Any = longt5(theirs("local"))
    wide: Any = longt5(local, attention="transient-global", block=4)
    assert (wide.encoder.layers[2].mixer.norm.weight == 1).all()
    assert not torch.equal(wide(ids, mask, decoder_ids)[0], local(ids, mask, decoder_ids)[0])
    back: Any = longt5(wide, attention="local")
    got = back(ids, mask, decoder_ids).logits
    assert_close(got, local(ids, mask, decoder_ids).logits)
    encoder: Any = longt5(local.encoder)
    want = local.encoder(ids, mask).last_hidden_state
    assert_close(encoder(ids, mask).last_hidden_state, want)


def test_the_decoder_steps_and_computes_the_encoders_keys_once() -> None:
    model: Any = longt5(theirs("transient-global"))
    ids, mask = tokens(19, lengths=(19, 12))
    decoder_ids, _ = tokens(9)
    whole = model(ids, mask, decoder_ids).logits
    encoded = model.encoder(ids, mask, return_dict=True)
    calls = []
    model.decoder.layers[0].cross.project["k"].register_forward_hook(lambda *_: calls.append(1))
    past, outs = None, []
    for piece in decoder_ids.split([4, 1, 1, 3], dim=1):
        out = model(
            attention_mask=mask,
            decoder_input_ids=piece,
            encoder_outputs=encoded,
            past_key_values=past,
            use_cache=True,
        )
        past = out.past_key_values
        outs.append(out.logits)
    assert_close(torch.cat(outs, 1), whole)
    assert len(calls) == 1


def test_biases_are_shared_and_the_model_reloads(tmp_path: Path) -> None:
    model: Any = longt5(theirs("transient-global"))
    mixers: list[Any] = [layer.mixer for layer in model.encoder.layers]
    assert all(m.near is mixers[0].near and m.far is mixers[0].far for m in mixers)
    assert all(m.norm is not mixers[0].norm for m in mixers[1:])
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert isinstance(again, LongT5ForSeq2SeqLM)
    mixers = [layer.mixer for layer in again.encoder.layers]
    assert all(m.near.table.weight is mixers[0].near.table.weight for m in mixers)
    ids, mask = tokens(27)
    assert_close(again(ids, mask, ids).logits, model(ids, mask, ids).logits)


def test_it_trains_from_labels() -> None:
    config = LongT5Config(
        vocab_size=30, width=16, layers=2, heads=2, head_width=8, inner=24, radius=5, block=4
    )
    torch.manual_seed(0)
    model = LongT5ForSeq2SeqLM(config).train()
    ids, mask = tokens(21)
    optim = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(25):
        optim.zero_grad()
        loss: Any = model(ids, mask, labels=ids[:, :6]).loss
        loss.backward()
        losses.append(loss.item())
        optim.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters())


def test_principal_sentences_by_rouge_1_and_unique_words() -> None:
    """Ind-Uniq: each alone, against all others, repeated words counted once."""
    text = [["a", "a", "b"], ["c", "d"], ["a", "b", "c", "e"], ["f"], []]

    def rouge(i: int) -> float:
        own, rest = set(text[i]), {w for j, s in enumerate(text) if j != i for w in s}
        common = len(own & rest)
        return 0.0 if not common else 2 * common / (len(own) + len(rest))

    order = sorted(range(5), key=lambda i: -rouge(i))
    for count in range(6):
        assert principal_sentences(text, count) == sorted(order[:count])


def test_masked_sentences_are_the_target() -> None:
    text = [[5, 6], [7], [5, 6, 7], [9]]
    assert gap_sentences(text, mask=1, ratio=0.5) == ([1, 7, 1, 9], [5, 6, 5, 6, 7])
    assert gap_sentences(text, mask=1, ratio=0.01)[1] == [5, 6, 7]
    assert gap_sentences(text, mask=1, length=3, target_length=2) == ([5, 6, 7], [5, 6])


def test_pieces_of_the_workspace_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer: Any = build("longt5", width=24, heads=3, radius=5, block=4).double()
    x = torch.randn(2, 50, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def run() -> list[Tensor]:
        y = mixer(x)[0]
        return [y, *torch.autograd.grad(y.square().sum(), list(mixer.parameters()))]

    want = run()
    monkeypatch.setattr(pattern, "WORKSPACE", 1)
    assert_close(run(), want)


def test_refusals() -> None:
    with pytest.raises(LongspanError, match="radius of 0 or more"):
        build("longt5", width=8, heads=2, radius=-1)
    with pytest.raises(LongspanError, match="no attention 'global'"):
        LongT5Config(attention="global")  # pyright: ignore[reportArgumentType]
    with pytest.raises(LongspanError, match="converts t5 and longt5"):
        longt5(build_other())
    with pytest.raises(LongspanError, match="5 of 1 sentences"):
        principal_sentences([["a"]], 5)
    with pytest.raises(LongspanError, match="at least one sentence"):
        gap_sentences([], mask=1)


def build_other() -> Any:
    return BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
