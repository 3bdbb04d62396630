"""The continuous cache: pairs of the past, two ways to join them (Grave et al., 2016)."""

import math
from collections import defaultdict

import pytest
import torch

from longspan.errors import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.models.evaluation import sliding
from longspan.nn.retrieval import Base, Found, Recent, recall
from longspan.nn.state import reset
from longspan.registry import build
from longspan.retrieval import History, gather, reading, score, tune

VOCABULARY, WIDTH, BATCH, LENGTH = 11, 8, 2, 23


def states(length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, the tokens after them, logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, length, WIDTH, generator=generator, dtype=torch.float64)
    following = torch.randint(VOCABULARY, (BATCH, length), generator=generator)
    logits = torch.randn(BATCH, length, VOCABULARY, generator=generator, dtype=torch.float64)
    return hidden, following, logits


def by_hand(size: int, theta: float, share: float | None, offset: float | None) -> torch.Tensor:
    """Dictionaries and loops."""
    hidden, following, logits = states()
    told = torch.zeros_like(logits)
    for b in range(BATCH):
        for t in range(LENGTH):
            cache: dict[int, float] = defaultdict(float)
            for i in range(max(t - size, 0), t):
                similar = float(hidden[b, t] @ hidden[b, i])
                cache[int(following[b, i])] += math.exp(theta * similar + (offset or 0))
            mass = sum(cache.values())
            p = logits[b, t].softmax(-1)
            for w in range(VOCABULARY):
                if share is not None:
                    part = cache[w] / mass if mass else p[w]
                    told[b, t, w] = (1 - share) * p[w] + share * part
                else:
                    told[b, t, w] = logits[b, t, w].exp() + cache[w]
    return told / told.sum(-1, keepdim=True)


@pytest.mark.parametrize("size", [0, 1, 6, 100])
@pytest.mark.parametrize("rule", [{"share": 0.3}, {"offset": -0.5}])
def test_equals_loops_over_dictionaries(size: int, rule: dict[str, float]) -> None:
    hidden, following, logits = states()
    found, _ = recall(hidden, following, None, size=size)
    got = build("neural-cache", sharpness=0.4, **rule)(Base(logits), found).exp()
    want = by_hand(size, 0.4, rule.get("share"), rule.get("offset"))
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.sum(-1), torch.ones(BATCH, LENGTH, dtype=got.dtype))


@pytest.mark.parametrize("sizes", [(1,) * LENGTH, (9, 14)])
def test_segments_and_steps_equal_the_whole(sizes: tuple[int, ...]) -> None:
    hidden, following, logits = states()
    reader = build("neural-cache", sharpness=0.4, share=0.3)
    whole = reader(Base(logits), recall(hidden, following, None, size=6)[0])
    state, outs = None, []
    for h, x, s in zip(*(t.split(sizes, 1) for t in (hidden, following, logits)), strict=True):
        found, state = recall(h, x, state, size=6)
        outs.append(reader(Base(s), found))
        assert state.keys.shape[1] <= 6, "a ring of M"
    torch.testing.assert_close(torch.cat(outs, 1), whole)


def test_the_pair_being_predicted_is_not_in_the_cache() -> None:
    hidden, following, _ = states()
    found, _ = recall(hidden, following, None, size=100)
    for t in range(LENGTH):
        other = following.clone()
        other[:, t:] = (other[:, t:] + 1) % VOCABULARY
        changed, _ = recall(hidden, other, None, size=100)
        assert torch.equal(changed.values[:, : t + 1], found.values[:, : t + 1])
    assert found.values[:, 5, 4].tolist() == following[:, 4].tolist(), "state and NEXT word"


def test_a_row_that_is_reset_starts_anew() -> None:
    hidden, following, _ = states()
    _, state = recall(hidden, following, None, size=50)
    state = reset(state, torch.tensor([True, False]))
    kept, _ = recall(hidden, following, state, size=50)
    fresh, _ = recall(hidden, following, None, size=50)
    assert (kept.values[0, :, :LENGTH] == -1).all()
    assert torch.equal(kept.values[0, :, LENGTH:], fresh.values[0])
    assert (kept.values[1, :, :LENGTH] >= 0).all()


def test_theta_0_is_the_unigram_cache() -> None:
    hidden, following, logits = states()
    found, _ = recall(hidden, following, None, size=7)
    got = build("neural-cache", sharpness=0.0, share=1.0)(Base(logits), found).exp()
    counts = torch.bincount(following[0, LENGTH - 8 : LENGTH - 1], minlength=VOCABULARY)
    torch.testing.assert_close(got[0, -1], counts / counts.sum().double())


def test_share_0_and_offset_minus_infinity_are_the_model() -> None:
    hidden, following, logits = states()
    found, _ = recall(hidden, following, None, size=7)
    for rule in ({"share": 0.0}, {"offset": -math.inf}):
        got = build("neural-cache", sharpness=0.3, **rule)(Base(logits), found)
        torch.testing.assert_close(got, logits.log_softmax(-1))


def test_is_knn_lm_with_a_dot_product_over_the_history() -> None:
    hidden, following, logits = states()
    found, _ = recall(hidden, following, None, size=9)
    cache = build("neural-cache", sharpness=0.5, share=0.3)(Base(logits), found)
    knn = build("knn-lm", temperature=2.0, share=0.3)(Base(logits), found)
    torch.testing.assert_close(cache, knn)


@pytest.mark.parametrize("rule", [{"share": 0.3}, {"offset": 0.0}])
def test_huge_scores_do_not_overflow(rule: dict[str, float]) -> None:
    _, following, logits = states()
    found = Found(
        torch.full((BATCH, LENGTH, 4), 1e6).double(), following[..., None].repeat(1, 1, 4)
    )
    got = build("neural-cache", sharpness=1.0, **rule)(Base(logits), found)
    assert not got.isnan().any()
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(BATCH, LENGTH, dtype=got.dtype))


def test_what_is_not_to_be_remembered_takes_a_slot_only() -> None:
    hidden, following, _ = states()
    following[:, 3] = -100
    found, state = recall(hidden, following, None, size=50)
    assert (found.values[:, 4:, 3] == -1).all()
    assert isinstance(state, Recent)
    assert (state.tokens[:, 3] == 0).all()


def model() -> LongspanForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LongspanConfig(
            vocab_size=VOCABULARY, width=16, layers=1, heads=2, initializer_range=0.3
        )
        return LongspanForCausalLM(config).eval()


def text(length: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(1))


def test_grid_search_runs_the_model_once() -> None:
    lm, tokens, calls = model(), text(20).repeat(4), 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    lm.register_forward_hook(count)
    seen = gather(lm, tokens, [History(40)], window=16, stride=8)
    ran = calls
    grid = [
        [build("neural-cache", sharpness=s, **rule)]
        for s in (0.0, 0.5, 2.0)
        for rule in ({"share": 0.0}, {"share": 0.5}, {"offset": 0.0}, {"offset": 2.0})
    ]
    best, scores = tune(grid, seen)
    assert calls == ran
    assert scores[0].nats == pytest.approx(sliding(lm, tokens, window=16, stride=8).nats, rel=1e-6)
    assert min(s.nats for s in scores) < 0.8 * scores[0].nats
    assert score(best, seen).nats == min(s.nats for s in scores)
    with pytest.raises(LongspanError, match="one by one"):
        gather(lm, tokens, [History(40)], window=16, batch=2)


def test_the_cache_goes_on_until_it_is_restarted() -> None:
    lm, history = model(), History(40)
    first = gather(lm, text(20), [history], window=8)
    second = gather(lm, text(20), [history], window=8)
    assert (second.found[0].values[0, 0] >= 0).any()
    history.restart()
    again = gather(lm, text(20), [history], window=8)
    assert torch.equal(again.found[0].values, first.found[0].values)


def test_one_stream_of_a_history_is_restarted_and_the_others_go_on() -> None:
    (hidden, following, _), history = states(), History(50)
    history.find(hidden, following, None)
    history.restart(torch.tensor([True, False]))
    found = history.find(hidden, following, None)
    assert (found.values[0, :, :LENGTH] == -1).all()
    assert (found.values[1, :, :LENGTH] == following[1]).all()


def test_generation_equals_the_segment_form() -> None:
    lm, prompt = model(), torch.stack([text(9), text(9).flip(0)])
    reader = build("neural-cache", sharpness=0.5, share=0.6)
    with reading(lm, [History(7)], [reader]) as processors:
        got = lm.generate(prompt, max_new_tokens=8, do_sample=False, logits_processor=processors)
    with torch.no_grad():
        hidden = lm.model(got[:, :-1]).last_hidden_state
        found, _ = recall(hidden, got[:, 1:], None, size=7)
        told = reader(Base(lm.lm_head(hidden)), found)
    assert torch.equal(told.argmax(-1)[:, 8:], got[:, 9:])
    plain = lm.generate(prompt, max_new_tokens=8, do_sample=False)
    assert not torch.equal(got, plain)


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({}, {"share": 0.1, "offset": 0.0}, {"share": -0.1}):
        with pytest.raises(LongspanError, match="neural-cache"):
            build("neural-cache", sharpness=1.0, **wrong)
