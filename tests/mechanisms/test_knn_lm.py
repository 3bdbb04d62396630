"""kNN-LM: the datastore, its search, and what is read from it (Khandelwal et al., 2020)."""

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.errors import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.models.evaluation import sliding
from longspan.nn.retrieval import Base, Found, recall
from longspan.registry import build
from longspan.retrieval import (
    Datastore,
    History,
    Stored,
    gather,
    key_layer,
    neighbours,
    reading,
    score,
    tapped,
    tune,
)

VOCABULARY, WIDTH = 19, 16
needs_faiss = pytest.mark.skipif(
    importlib.util.find_spec("faiss") is None, reason="faiss is not installed (extra `retrieval`)"
)


def model(seed: int = 0) -> LongspanForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = LongspanForCausalLM(
            LongspanConfig(
                vocab_size=VOCABULARY, width=WIDTH, layers=2, heads=2, initializer_range=0.4
            )
        )
    return made.eval()


def stream(length: int = 150, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(folder: Path, tokens: torch.Tensor | None = None, **how: int) -> Datastore:
    store = Datastore.create(folder, width=WIDTH, dtype=torch.float32)
    store.read(model(), stream() if tokens is None else tokens, window=32, **how)
    return store


def test_all_entries_equal_kernel_density_in_numpy() -> None:
    keys, queries = numbers(40, 6).double(), numbers(3, 6, seed=1).double()
    values = stream(40)
    logits = numbers(1, 3, VOCABULARY, seed=2).double()
    distances = torch.cdist(queries, keys).square()
    found = Found(-distances[None], values.expand(1, 3, 40))
    got = build("knn-lm", share=0.3, temperature=2.0)(Base(logits), found).exp()
    want = np.zeros((3, VOCABULARY))
    for row in range(3):
        for key, value in zip(keys.numpy(), values.tolist(), strict=True):
            want[row, value] += np.exp(-((key - queries[row].numpy()) ** 2).sum() / 2.0)
        want[row] /= want[row].sum()
    base = logits.softmax(-1)[0].numpy()
    np.testing.assert_allclose(got[0].numpy(), 0.3 * want + 0.7 * base, rtol=1e-10)


def test_search_over_shards_equals_search_over_one(tmp_path: Path) -> None:
    keys, q = numbers(60, WIDTH), numbers(7, WIDTH, seed=1)
    store = Datastore.create(tmp_path, width=WIDTH, dtype=torch.float32)
    for part, values in zip(keys.split([1, 20, 39]), stream(60).split([1, 20, 39]), strict=True):
        store.add(part, values)
    distances, ids = torch.cdist(q, keys).square().topk(9, largest=False)
    got = store.search(q, 9)
    assert torch.equal(got.ids, ids)
    torch.testing.assert_close(-got.scores, distances, rtol=1e-4, atol=1e-4)
    apart = store.search(q, 9, apart=ids[:, 0])
    assert torch.equal(apart.ids[:, :8], ids[:, 1:])
    assert torch.equal(store.find(q[None], 9).values[0], stream(60)[ids])
    few = store.search(q, 61)
    assert few.ids.shape[1] >= 60
    assert few.ids[:, 59].ge(0).all()


def test_half_precision_keys_of_large_norm_do_not_overflow(tmp_path: Path) -> None:
    keys = 300 * numbers(50, 64).sign() + numbers(50, 64)
    store = Datastore.create(tmp_path, width=64)
    store.add(keys, stream(50))
    got = store.search(keys, 1)
    assert torch.equal(got.ids[:, 0], torch.arange(50))
    assert got.scores.isfinite().all()
    with pytest.raises(LongspanError, match="float32"):
        store.add(keys * 1e6, stream(50))


def test_keys_are_the_last_feed_forwards_inputs_and_values_the_next_tokens(tmp_path: Path) -> None:
    tokens, lm = stream(20), model()
    store = stored(tmp_path, tokens)
    assert key_layer(lm) == "model.layers.1.feed_forward"
    hidden = lm.model(tokens[None, :-1], output_hidden_states=True).hidden_states[1]
    block = lm.model.layers[1]
    attended = hidden + block.mixer(block.mixer_norm(hidden))[0]
    want = block.feed_forward_norm(attended)[0]
    torch.testing.assert_close(store.keys(torch.arange(19)), want.detach())
    assert torch.equal(store.values(torch.arange(19)), tokens[1:])


def test_any_causal_model_of_transformers(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    llama = LlamaForCausalLM(config).eval()
    assert key_layer(llama) == "model.layers.1.mlp"
    assert key_layer(llama, "output") == "lm_head"
    store = Datastore.create(tmp_path, width=WIDTH)
    assert store.read(llama, stream(), window=16, batch=3) == range(149)
    seen = gather(llama, stream(60, seed=2), [Stored(store, 5)], window=16)
    assert len(seen.logits) == 59
    with pytest.raises(LongspanError, match="did you mean"):
        key_layer(llama, "model.layers.1.mpl")


def test_a_killed_build_resumes_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = {"stride": 16, "batch": 2, "shard": 30}
    whole = stored(tmp_path / "whole", **how)
    keep, calls = Datastore._append, 0

    def killed(self: Datastore, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls in (3, 4):
            raise KeyboardInterrupt
        keep(self, *arguments)

    monkeypatch.setattr(Datastore, "_append", killed)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stored(tmp_path / "cut", **how)
    assert 0 < len(Datastore(tmp_path / "cut")) < len(whole)
    (tmp_path / "cut" / "000002.keys.npy").write_bytes(b"half a shard")  # of the killed process
    with pytest.raises(LongspanError, match="interrupted"):
        stored(tmp_path / "cut", stream(seed=5), **how)
    with pytest.raises(LongspanError, match="amid a stream"):
        Datastore(tmp_path / "cut").add(numbers(1, WIDTH), stream(1))
    resumed = stored(tmp_path / "cut", **how)
    assert len(resumed) == len(whole) == 149
    every = torch.arange(149)
    assert torch.equal(resumed.keys(every), whole.keys(every))
    assert torch.equal(resumed.values(every), whole.values(every))
    assert stored(tmp_path / "cut", **how).about == resumed.about, "it was read twice"


def test_appending_a_second_corpus(tmp_path: Path) -> None:
    store = stored(tmp_path)
    assert store.read(model(), stream(40, seed=3), window=32) == range(149, 188)
    assert torch.equal(store.values(torch.arange(149, 188)), stream(40, seed=3)[1:])
    assert len(Datastore(tmp_path)) == 188


def test_keys_of_other_weights_are_read_anew(tmp_path: Path) -> None:
    store = stored(tmp_path)
    store.read(model(1), stream(), window=32)
    assert len(store) == 2 * 149


@pytest.mark.parametrize("name", ["000000.keys.npy", "000000.values.npy"])
def test_damaged_files_are_refused(tmp_path: Path, name: str) -> None:
    stored(tmp_path)
    path = tmp_path / name
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(LongspanError, match="SHA-256"):
        Datastore(tmp_path)
    assert len(Datastore(tmp_path, check=False)) == 149
    path.write_bytes(data[:-8])
    with pytest.raises(LongspanError, match="expected"):
        Datastore(tmp_path, check=False)
    path.unlink()
    with pytest.raises(LongspanError, match="gone"):
        Datastore(tmp_path)


def test_what_is_no_datastore_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match=r"Datastore\.create"):
        Datastore(tmp_path)
    Datastore.create(tmp_path, width=3)
    with pytest.raises(LongspanError, match="width"):
        Datastore.create(tmp_path, width=4)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(LongspanError, match="cannot be read"):
        Datastore(tmp_path)


def test_the_store_is_mapped_and_never_written_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, load, loaded = Datastore.create(tmp_path, width=WIDTH), np.load, []

    def recorded(*args: Any, **named: Any) -> Any:
        loaded.append(load(*args, **named))
        return loaded[-1]

    monkeypatch.setattr(np, "load", recorded)
    store.add(numbers(9, WIDTH), stream(9))
    assert len(store.search(numbers(2, WIDTH), 3).ids) == 2
    assert [array.dtype for array in loaded] == [np.float16, np.int32]
    assert all(isinstance(array, np.memmap) for array in loaded)
    before = (tmp_path / "000000.keys.npy").read_bytes()
    store._shards[0][0].zero_()
    assert (tmp_path / "000000.keys.npy").read_bytes() == before


def test_share_0_gives_the_model_exactly(tmp_path: Path) -> None:
    store, lm, tokens = stored(tmp_path), model(), stream(80, seed=4)
    seen = gather(lm, tokens, [Stored(store, 10)], window=16, stride=5)
    plain = sliding(lm, tokens, window=16, stride=5)
    assert score([build("knn-lm", share=0.0)], seen).nats == pytest.approx(plain.nats, rel=1e-6)
    assert score([build("knn-lm", neighbours=0)], seen).nats == pytest.approx(plain.nats, rel=1e-6)


def test_two_logits_a_token_score_as_all_of_them_do(tmp_path: Path) -> None:
    store, lm, tokens = stored(tmp_path), model(), stream(32, seed=4)
    for reader in (
        build("knn-lm", share=0.4, temperature=3.0, neighbours=7),
        build("neural-cache", sharpness=0.1, offset=1.0),
    ):
        seen = gather(lm, tokens, [Stored(store, 10)], window=32)
        with torch.no_grad(), tapped(lm, key_layer(lm)) as taps:
            logits = lm(tokens[None, :-1]).logits
            found = store.find(taps[key_layer(lm)], 10)
        told = reader(Base(logits), found)
        want = -told.gather(-1, tokens[None, 1:, None]).sum()
        assert score([reader], seen).nats == pytest.approx(float(want), rel=1e-5)


def test_own_position_is_excluded_on_stored_text(tmp_path: Path) -> None:
    store, lm = Datastore.create(tmp_path, width=WIDTH, dtype=torch.float32), model()
    store.read(lm, stream(), window=149)
    source = Stored(store, 3, own=0)
    kept = neighbours(lm, stream(), source, window=149)
    free = neighbours(lm, stream(), Stored(store, 3), window=149)
    assert (free.scores[0, :, 0] > -1e-6).all(), "stored text finds itself"
    assert (kept.scores[0, :, 0] < -1e-4).all()
    assert torch.equal(kept.values[..., :2], free.values[..., 1:])


def test_tuning_finds_the_best_of_a_grid(tmp_path: Path) -> None:
    tokens = stream(40).repeat(4)
    store = stored(tmp_path, tokens)
    seen = gather(model(), tokens, [Stored(store, 8)], window=32)
    grid = [[build("knn-lm", share=x, temperature=t)] for x in (0.0, 0.3, 0.6) for t in (0.1, 1.0)]
    best, scores = tune(grid, seen)
    assert scores[grid.index(list(best))].nats == min(s.nats for s in scores)
    assert best[0].share == 0.6
    assert scores[-2].nats < 0.8 * scores[0].nats


def test_a_stored_key_at_temperature_0_gives_probability_1_to_its_value() -> None:
    keys = numbers(30, 8)
    found = Found(-torch.cdist(keys[None], keys[None]).square(), stream(30).expand(1, 30, 30))
    base = Base(torch.zeros(1, 30, VOCABULARY))
    told = build("knn-lm", share=1.0, temperature=1e-6)(base, found).exp()
    assert (told[0, torch.arange(30), stream(30)] > 1 - 1e-6).all()


def test_a_third_mixture_over_the_history() -> None:
    logits, hidden, tokens = numbers(1, 12, VOCABULARY), numbers(1, 12, 8, seed=1), stream(12)[None]
    near = Found(-numbers(1, 12, 5, seed=2).square(), stream(60, seed=3).view(1, 12, 5))
    recent = recall(hidden, tokens, None, size=6)[0]
    first, second = build("knn-lm", share=0.4), build("neural-cache", sharpness=0.5, share=0.2)
    got = second(Base(first(Base(logits), near)), recent)[:, 1:].exp()
    votes = build("knn-lm", share=1.0)(Base(logits), near).exp()
    cache = build("neural-cache", sharpness=0.5, share=1.0)(Base(logits), recent).exp()
    want = 0.8 * (0.4 * votes + 0.6 * logits.softmax(-1)) + 0.2 * cache
    torch.testing.assert_close(got, want[:, 1:])


def test_generation_equals_reading_step_by_step(tmp_path: Path) -> None:
    store, lm, prompt = stored(tmp_path), model(), stream(9, seed=6)[None]
    reader = build("knn-lm", share=0.6, temperature=2.0)
    with reading(lm, [Stored(store, 12)], [reader]) as processors:
        got = lm.generate(prompt, max_new_tokens=8, do_sample=False, logits_processor=processors)
    tokens = prompt
    for _ in range(8):
        with torch.no_grad(), tapped(lm, key_layer(lm)) as taps:
            logits = lm(tokens).logits
            found = store.find(taps[key_layer(lm)], 12)
        tokens = torch.cat([tokens, reader(Base(logits), found)[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, tokens)
    plain = lm.generate(prompt, max_new_tokens=8, do_sample=False)
    assert not torch.equal(got, plain)
    with reading(lm, [Stored(store, 12)], [build("knn-lm", share=0.0)]) as processors:
        alone = lm.generate(prompt, max_new_tokens=8, do_sample=False, logits_processor=processors)
    assert torch.equal(alone, plain)


@pytest.mark.parametrize("seed", [6, 7, 8])
def test_beams_keep_their_own_history(seed: int) -> None:
    """Beams change places as they go, and all that are left score as read on their own."""
    lm, prompt = model(), stream(9, seed=seed)[None]
    cache = build("neural-cache", sharpness=0.5, share=0.5)
    with reading(lm, [History(50)], [cache]) as processors:
        beams = lm.generate(
            prompt,
            max_new_tokens=8,
            num_beams=4,
            num_return_sequences=4,
            logits_processor=processors,
            return_dict_in_generate=True,
            output_scores=True,
            length_penalty=0.0,
        )
    assert (beams.beam_indices[:, :8] != torch.arange(4)[:, None]).any(), "no beam changed places"
    texts = beams.sequences
    with torch.no_grad(), tapped(lm, "lm_head") as taps:
        logits = lm(texts[:, :-1]).logits
        found = recall(taps["lm_head"], texts[:, 1:], None, size=50)[0]
    told = cache(Base(logits), found).gather(-1, texts[:, 1:, None])[:, -8:, 0].sum(1)
    torch.testing.assert_close(beams.sequences_scores, told, rtol=1e-4, atol=1e-5)


@needs_faiss
def test_faiss_flat_finds_what_exact_search_finds(tmp_path: Path) -> None:
    import faiss

    keys, q = numbers(200, WIDTH), numbers(9, WIDTH, seed=1)
    store = Datastore.create(tmp_path, width=WIDTH, dtype=torch.float32)
    store.add(keys[:150], stream(150))
    store.build_index("Flat")
    store.add(keys[150:], stream(50))
    index = faiss.IndexFlatL2(WIDTH)
    index.add(keys.numpy())
    distances, ids = index.search(q.numpy(), 12)
    for one in (store, Datastore(tmp_path)):
        assert one.index is not None
        got = one.search(q, 12)
        assert got.ids.tolist() == ids.tolist(), "an index and what was appended after it"
        np.testing.assert_allclose(-got.scores.numpy(), distances, rtol=1e-4, atol=1e-4)
        assert torch.equal(one.search(q, 12, exact=True).ids, got.ids)


@needs_faiss
def test_quantised_neighbours_get_their_full_distances(tmp_path: Path) -> None:
    keys = numbers(600, WIDTH)
    store = Datastore.create(tmp_path, width=WIDTH, dtype=torch.float32)
    store.add(keys, stream(600))
    store.build_index("IVF4,PQ4x4", probes=4)
    got = store.search(keys[:5], 20)
    want = -(keys[:5, None] - keys[got.ids]).square().sum(-1)
    torch.testing.assert_close(got.scores, want)
    assert (got.scores.diff(dim=1) <= 0).all()


def test_without_faiss_an_index_gives_way_to_exact_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longspan.engines import nearest
    from longspan.retrieval import datastore

    store = stored(tmp_path)
    index = nearest.Exact(WIDTH, metric="l2")
    index.add(store.keys(torch.arange(149)))
    index.save(tmp_path / "index.safetensors")
    fact = datastore._fact(tmp_path / "index.safetensors")
    about = json.loads((tmp_path / "store.json").read_text())
    about["index"] = {"entries": 149, "kind": "Flat", **fact}
    (tmp_path / "store.json").write_text(json.dumps(about))
    q = numbers(4, WIDTH)
    assert torch.equal(Datastore(tmp_path).search(q, 3).ids, store.search(q, 3).ids)

    def absent(path: object) -> None:
        raise LongspanError("faiss is not installed") from ImportError()

    monkeypatch.setattr(nearest, "load", absent)
    bare = Datastore(tmp_path)
    with pytest.warns(UserWarning, match="searching exactly"):
        got = bare.search(q, 3)
    assert torch.equal(got.ids, store.search(q, 3).ids)


def test_gradients_through_empty_votes_are_finite() -> None:
    logits = numbers(1, 3, VOCABULARY).requires_grad_()
    scores = numbers(1, 3, 4, seed=1).requires_grad_()
    found = Found(scores, torch.tensor([[[1, 1, 2, -1], [-1] * 4, [0, 0, 0, 0]]]))
    build("knn-lm", share=0.3)(Base(logits), found)[..., 1].sum().backward()
    assert logits.grad is not None
    assert scores.grad is not None
    assert logits.grad.isfinite().all()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("wrong", [{"share": 1.5}, {"temperature": 0.0}, {"neighbours": -1}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(LongspanError, match="knn-lm"):
        build("knn-lm", **wrong)
    assert math.isfinite(build("knn-lm").share)
