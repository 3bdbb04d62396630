"""Funnel-Transformer against transformers' own with copied weights, and its identities."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.testing import assert_close

import longspan
from longspan import LongspanError
from longspan.models.funnel import (
    FunnelConfig,
    FunnelForMaskedLM,
    FunnelForSequenceClassification,
    FunnelModel,
    renamed,
)

SIZES: dict[str, Any] = {"vocab_size": 13, "width": 12, "heads": 2, "head_width": 4, "inner": 16}
THEIRS: dict[str, Any] = {
    "vocab_size": 13, "d_model": 12, "n_head": 2, "d_head": 4, "d_inner": 16,
    "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "block_sizes": [1, 2, 1], "block_repeats": [1, 1, 2], "num_decoder_layers": 1,
}  # fmt: skip


def config(**fields: Any) -> FunnelConfig:
    chosen: Any = SIZES | {"blocks": "1-2-1x2", "decoder_layers": 1, "dropout": 0.0}
    chosen |= {"attention_dropout": 0.0} | fields
    return FunnelConfig(**chosen)


def pair(kind: str, ours: Any, fields: dict[str, Any] | None = None, **own: Any) -> tuple[Any, Any]:
    """transformers' model and ours with the same weights, in float64."""
    torch.manual_seed(0)
    theirs = getattr(transformers, kind)(transformers.FunnelConfig(**(THEIRS | (fields or {}))))
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.4)
    built = ours(config(**own))
    missing, unexpected = built.load_state_dict(renamed(theirs.state_dict()), strict=False)
    assert not missing, missing
    assert not [n for n in unexpected if not n.startswith("decoder")], unexpected
    return theirs.double().eval(), built.double().eval()


def example(length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 13, (2, length), generator=generator)
    segments = torch.randint(0, 2, (2, length), generator=generator)
    segments[:, 0] = 2
    return ids, segments


VARIANTS = [
    ({}, {}),
    ({"attention_type": "factorized"}, {"attention": "factorised"}),
    ({"pooling_type": "max"}, {"pooling": "max"}),
    ({"pool_q_only": False}, {"pool_query_only": False}),
    ({"separate_cls": False}, {"separate_cls": False}),
    ({"truncate_seq": False}, {"truncate": False}),
    ({"attention_type": "factorized", "pool_q_only": False}, {"pool_query_only": False}),
]


@pytest.mark.parametrize(("fields", "own"), VARIANTS)
def test_equals_transformers_with_its_decoder(fields: Any, own: Any) -> None:
    theirs, ours = pair("FunnelModel", FunnelModel, fields, **own)
    for length in (8, 13, 16, 22):
        ids, segments = example(length)
        want = theirs(ids, token_type_ids=segments).last_hidden_state
        assert_close(ours(ids, token_type_ids=segments).last_hidden_state, want)


def encoder(config: FunnelConfig) -> FunnelModel:
    return FunnelModel(config, decode=False)


def test_equals_transformers_encoder() -> None:
    theirs, ours = pair("FunnelBaseModel", encoder)
    ids, segments = example(16)
    want = theirs(ids, token_type_ids=segments).last_hidden_state
    assert_close(ours(ids, token_type_ids=segments).last_hidden_state, want)
    assert want.shape[1] == 4


@pytest.mark.parametrize("query_only", [True, False])
def test_masks_are_pooled_at_the_right_moment(query_only: bool) -> None:
    """Equal to transformers with padding, where no group is half padding."""
    fields = {"pool_q_only": query_only}
    theirs, ours = pair("FunnelModel", FunnelModel, fields, pool_query_only=query_only)
    ids, segments = example(24)
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 13:], mask[1, 17:] = 0, 0
    want = theirs(ids, attention_mask=mask, token_type_ids=segments).last_hidden_state
    got = ours(ids, mask, segments).last_hidden_state
    assert_close(got * mask[..., None], want * mask[..., None])


def test_masked_lm_equals_transformers() -> None:
    theirs, ours = pair("FunnelForMaskedLM", FunnelForMaskedLM)
    ids, segments = example(16)
    labels = ids.masked_fill(torch.arange(16) % 3 > 0, -100)
    want = theirs(ids, token_type_ids=segments, labels=labels)
    got = ours(ids, token_type_ids=segments, labels=labels)
    assert_close(got.logits, want.logits)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)


def test_classifier_equals_transformers() -> None:
    theirs, ours = pair("FunnelForSequenceClassification", FunnelForSequenceClassification)
    ids, segments = example(16)
    labels = torch.tensor([0, 1])
    want = theirs(ids, token_type_ids=segments, labels=labels)
    got = ours(ids, token_type_ids=segments, labels=labels)
    assert_close(got.logits, want.logits)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)


def drawn(**fields: Any) -> FunnelModel:
    torch.manual_seed(0)
    return FunnelModel(config(**fields)).double().eval()


def test_shift_and_factorised_attention_agree() -> None:
    ids, segments = example(16)
    outs = [
        drawn(attention=form)(ids, token_type_ids=segments).last_hidden_state
        for form in ("shift", "factorised")
    ]
    assert_close(*outs)


@pytest.mark.parametrize("decode", [True, False])
def test_padding_changes_nothing(decode: bool) -> None:
    torch.manual_seed(0)
    built = FunnelModel(config(), decode=decode).double().eval()
    ids, segments = example(12)
    alone = built(ids, token_type_ids=segments).last_hidden_state
    for left, right in ((0, 4), (4, 0), (3, 9)):
        longer, kinds = (nn.functional.pad(t, (left, right), value=1) for t in (ids, segments))
        mask = nn.functional.pad(torch.ones(2, 12), (left, right)).long()
        got = built(longer, mask, kinds).last_hidden_state
        start = left if decode else 0
        assert_close(got[:, start : start + alone.shape[1]], alone)


def test_without_decoder_layers_it_is_repeated_states_and_the_first_block() -> None:
    built = drawn(decoder_layers=0)
    ids, segments = example(16)
    short = drawn(decoder_layers=0)
    short.load_state_dict(built.state_dict())
    short.decode = False
    coarse = short(ids, token_type_ids=segments).last_hidden_state
    up = torch.cat([coarse[:, :1], coarse[:, 1:].repeat_interleave(4, 1)], 1)
    one = drawn(decoder_layers=0, blocks="1")
    one.load_state_dict(built.state_dict(), strict=False)
    one.decode = False
    first = one(ids, token_type_ids=segments).last_hidden_state
    want = first + nn.functional.pad(up, (0, 0, 0, 3))
    assert_close(built(ids, token_type_ids=segments).last_hidden_state, want)


def test_repeated_layers_share_their_weights() -> None:
    count = [sum(p.numel() for p in drawn(blocks=b).parameters()) for b in ("2-1x2", "2-1")]
    assert count[0] == count[1]


def test_long_sequences_go_by_tiles() -> None:
    built = drawn(blocks="1-1")
    ids, segments = example(600)
    whole = built(ids, token_type_ids=segments).last_hidden_state
    assert whole.shape[1] == 600
    other = drawn(blocks="1-1", attention="factorised")
    assert_close(other(ids, token_type_ids=segments).last_hidden_state, whole)


def test_learns_saves_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    built = FunnelForMaskedLM(config(initializer_std=0.1))
    ids, segments = example(16)
    optimizer, losses = torch.optim.Adam(built.parameters(), 1e-2), []
    for _ in range(30):
        loss = built(ids, token_type_ids=segments, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    for name, p in built.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
    built.eval().save_pretrained(tmp_path)
    again = FunnelForMaskedLM.from_pretrained(tmp_path).eval()
    assert_close(again(ids).logits, built(ids).logits)


def test_pools_by_hand() -> None:
    x = torch.arange(1.0, 8.0).view(1, 7, 1)
    for options, want in (
        ({}, [1.0, 2.5, 4.5, 6.0]),
        ({"pooling": "max"}, [1.0, 3.0, 5.0, 6.0]),
        ({"truncate": False}, [1.0, 2.5, 4.5, 6.5]),
        ({"apart": False}, [1.5, 3.5, 5.5, 7.0]),
    ):
        got, _, _ = longspan.build("funnel", **options).shorten(x)
        assert got.flatten().tolist() == want


def test_refuses() -> None:
    with pytest.raises(LongspanError, match="at least 1"):
        longspan.build("funnel", factor=0)
    with pytest.raises(LongspanError, match="blocks is"):
        config(blocks="4-0")
    with pytest.raises(LongspanError, match="no attention"):
        config(attention="banded")
    with pytest.raises(LongspanError, match="not both"):
        drawn()()
