"""Caches are held on to, multiplied and taken back, whatever the mechanism carries."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan import LongspanError, cards
from longspan.hub import StateCache, rewinding
from longspan.models import LongspanConfig, LongspanModel

SIZES = {"width", "heads", "head_width", "kv_heads", "length", "causal"}
STEPPING = [card for card in cards().values() if {"causal", "step"} <= card.modes]
# The others stand in models of their own, or beside one.
SPECS: dict[str, dict[str, Any]] = {
    card.id: (
        {"mixers": [{"id": card.id, **{n: v for n, v in card.tiny.items() if n not in SIZES}}]}
        if card.kind != "position"
        else {"position": {"id": card.id}}
    )
    for card in STEPPING
    if card.kind in ("attention", "mixer", "memory", "position") and card.causality == "strict"
}
LENGTH = 24


def stack(changes: dict[str, Any]) -> LongspanModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "width": 24, "layers": 2, "heads": 3, "length": 64}
    settings = sizes | {"position": None, "allow_leaks": True, "causal": True} | changes
    model = LongspanModel(LongspanConfig(**settings)).double().eval()
    # The initial 0.02 would leave every mixing far below the embeddings and tests blind to it.
    with torch.no_grad():
        model.embed_tokens.weight.mul_(20)
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(seed))


def feeder(changes: dict[str, Any], mask: Tensor | None = None) -> Callable[..., Tensor]:
    """feed(cache, *pieces): the hidden states of the last piece, each with its part of `mask`."""
    model = stack(changes)

    @torch.no_grad()
    def feed(cache: StateCache, *pieces: Tensor) -> Tensor:
        out = torch.empty(0)
        for piece in pieces:
            start = cache.get_seq_length()
            seen = None if mask is None else mask[:, start : start + piece.shape[1]]
            out = model(piece, seen, past_key_values=cache).last_hidden_state
        return out

    return feed


def padded() -> Tensor:
    """Two rows: one padded left, one with a hole."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    mask[1, 9:11] = 0
    return mask


@pytest.mark.parametrize("id", SPECS)
@pytest.mark.parametrize("mask", [None, padded()], ids=["whole", "padded"])
def test_rolled_back_tokens_have_never_been_seen(id: str, mask: Tensor | None) -> None:
    feed, x, wrong = feeder(SPECS[id], mask), tokens(2, LENGTH), tokens(2, LENGTH, seed=7)
    kept = slice(None) if mask is None else mask[:, 14:].bool()
    cache, wanted = StateCache(), StateCache()
    feed(wanted, x[:, :9], x[:, 9:14])
    expected = feed(wanted, x[:, 14:])
    cache.record()
    # Between calls, into the midst of one, twice in a row, and with single tokens behind.
    feed(cache, x[:, :9], wrong[:, :2])
    cache.rollback(2)
    feed(cache, torch.cat([x[:, 9:12], wrong[:, :3]], 1), *wrong[:, 3:6].split(1, 1))
    cache.rollback(2)
    cache.rollback(4)
    assert cache.get_seq_length() == 12
    feed(cache, torch.cat([x[:, 12:14], wrong[:, :1]], 1))
    cache.rollback(1)
    got = feed(cache, x[:, 14:])
    assert got.shape == expected.shape
    torch.testing.assert_close(got[kept], expected[kept])
    assert cache.get_seq_length() == LENGTH


@pytest.mark.parametrize("id", SPECS)
def test_snapshots_and_forks_go_on_alone(id: str) -> None:
    feed, x = feeder(SPECS[id]), tokens(2, LENGTH)
    cache = StateCache()
    feed(cache, x[:, :11])
    held, forked = cache.snapshot(), cache.fork(3)
    assert (cache.batch_size, forked.batch_size) == (2, 6)
    more = tokens(6, 5, seed=3)
    expected = [feed(held.snapshot(), more[n::3]) for n in range(3)]
    feed(cache, x[:, 11:])
    assert held.get_seq_length() == 11
    for n in range(3):
        assert torch.equal(feed(held.snapshot(), more[n::3]), expected[n])
    got = feed(forked, more)
    for n in range(3):
        torch.testing.assert_close(got[n::3], expected[n])


def test_marks_grow_with_the_logarithm_of_what_is_recorded() -> None:
    feed, x = feeder(SPECS["linear-transformer"]), tokens(1, 100)
    cache = StateCache()
    cache.record(depth=32)
    wanted = StateCache()
    for token in x.split(1, 1):
        feed(cache, token)
        assert len(cache._marks) <= 2 * 5 + 2
        assert sum(fed.stop - fed.start for fed in cache._fed) < 3 * 32
    feed(wanted, x[:, :68])
    cache.rollback(32)
    assert 0 < cache.waiting < 32
    torch.testing.assert_close(feed(cache, x[:, 68:]), feed(wanted, x[:, 68:]))
    with pytest.raises(LongspanError, match=r"rollback\(200\): the last \d+ columns are recorded"):
        cache.rollback(200)


@pytest.mark.parametrize("columns", [1, rewinding.AGAIN, rewinding.AGAIN + 1])
def test_few_columns_go_again_with_the_next_call(columns: int) -> None:
    model, x, fed = stack(SPECS["rwkv"]), tokens(2, 50), []
    whole = model(x).last_hidden_state
    cache = StateCache()
    cache.record()
    model(x[:, : columns + 3], past_key_values=cache)
    model.layers[0].register_forward_hook(lambda _, __, out: fed.append(out[0].shape[1]))
    cache.rollback(3)
    got = model(x[:, columns : columns + 2], past_key_values=cache).last_hidden_state
    torch.testing.assert_close(got, whole[:, columns : columns + 2])
    assert fed == ([columns + 2] if columns <= rewinding.AGAIN else [columns, 2])
    cache.rollback(2)
    got = model(x[:, columns:], past_key_values=cache, output_hidden_states=True).hidden_states
    torch.testing.assert_close(got[-1], whole[:, columns:])


def test_a_recording_cache_changes_its_rows_with_its_record() -> None:
    feed, x = feeder(SPECS["s4"]), tokens(2, LENGTH)
    cache, rows = StateCache(), torch.tensor([1, 0])
    whole = feed(StateCache(), x)
    feed(cache, x[:, :7])
    cache.record()
    feed(cache, x[:, 7:12])
    cache.rollback(2)
    held, forked = cache.snapshot(), cache.fork(2)
    forked.reorder_cache(torch.tensor([3, 0]))
    torch.testing.assert_close(feed(forked, x[rows, 10:]), whole[rows, 10:])
    forked.rollback(LENGTH - 8)
    torch.testing.assert_close(feed(forked, x[rows, 8:]), whole[rows, 8:])
    feed(cache, x[:, 10:])
    feed(held, x[:, 10:12])
    held.rollback(3)
    torch.testing.assert_close(feed(held, x[:, 9:]), whole[:, 9:])


def test_a_failed_call_leaves_what_waits() -> None:
    model, x = stack(SPECS["linear-transformer"]), tokens(1, 50)
    for size in (6, 45):
        cache = StateCache()
        cache.record()
        model(x[:, :size], past_key_values=cache)
        cache.rollback(2)
        hook = model.norm.register_forward_pre_hook(fail)
        with pytest.raises(MemoryError):
            model(x[:, size - 2 :], past_key_values=cache)
        hook.remove()
        assert (cache.get_seq_length(), cache.waiting) == (size - 2, size - 2)
        got = model(x[:, size - 2 :], past_key_values=cache).last_hidden_state
        torch.testing.assert_close(got, model(x).last_hidden_state[:, size - 2 :])


def fail(*_: Any) -> None:
    raise MemoryError


def test_cropping_takes_either_of_transformers_numbers() -> None:
    feed, x = feeder(SPECS["rwkv"]), tokens(1, 9)
    cache = StateCache()
    assert not cache.is_croppable
    cache.activate_past_recording()
    assert cache.is_croppable
    for wanted, asked in ((9, 0), (9, 9), (9, 12), (7, -2), (5, 5)):
        feed(cache, x[:, cache.get_seq_length() :])
        cache.crop(asked)
        assert cache.get_seq_length() == wanted
    cache.reset()
    torch.testing.assert_close(feed(cache, x), feed(StateCache(), x))
    cache.rollback(9)
    assert cache.get_seq_length() == 0


def test_what_cannot_go_back_says_so() -> None:
    feed, x = feeder(SPECS["rwkv"]), tokens(1, 9)
    cache = StateCache()
    feed(cache, x)
    with pytest.raises(LongspanError, match=r"call record\(\) before feeding them"):
        cache.rollback(1)
    with pytest.raises(LongspanError, match="expected how many columns to forget"):
        cache.rollback(-1)
    with pytest.raises(LongspanError, match="expected at least one copy"):
        cache.fork(0)
    with pytest.raises(LongspanError, match="expected at least one column"):
        cache.record(0)
    cache.record()
    with pytest.raises(LongspanError, match="the last 0 columns are recorded"):
        cache.rollback(1)
    feed(cache, x)
    cache.rollback(2)
    for change in (cache.carried, cache.detach, cache.record, cache.forget_record):
        with pytest.raises(
            LongspanError, match="between rollback and the next call, which feeds 7"
        ):
            change()
    feed(cache, x)
    assert cache.carried() is not None
    with pytest.raises(LongspanError, match=r"one number per row and token; got \(1, 1, 9, 9\)"):
        stack(SPECS["rwkv"])(x, torch.ones(1, 1, 9, 9), past_key_values=cache)
    cache.forget_record()
    with pytest.raises(LongspanError, match="cannot forget its last tokens"):
        cache.rollback(1)


@pytest.mark.parametrize("id", ["reformer-lsh", "routing-transformer"])
def test_what_selects_by_the_pieces_it_is_fed_cannot_be_fed_again(id: str) -> None:
    tiny = {n: v for n, v in cards()[id].tiny.items() if n not in SIZES}
    feed, cache = feeder({"mixers": [{"id": id, **tiny}]}), StateCache()
    cache.record()
    feed(cache, tokens(1, 9))
    with pytest.raises(LongspanError, match="a model that cannot feed tokens again"):
        cache.rollback(1)
