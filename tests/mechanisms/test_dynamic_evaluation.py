"""Dynamic evaluation: score, then step (Krause et al., 2018, 2019)."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from longspan.errors import LongspanError
from longspan.inference.dynamic_evaluation import DynamicEvaluation, tune
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.models.evaluation import carried
from longspan.registry import build

VOCABULARY = 11


def model(**options: object) -> LongspanForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"vocab_size": VOCABULARY, "width": 16, "layers": 1, "heads": 2, **options}
        return LongspanForCausalLM(LongspanConfig(**settings))


def text(length: int = 46, seed: int = 0) -> Tensor:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def values(of: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in of.parameters()]


@pytest.mark.parametrize("rule", ["sgd", "rms", "rms-decay"])
@pytest.mark.parametrize("mixer", ["linear-transformer", "multi-head-attention"])
def test_rate_0_is_plain_evaluation_exactly(rule: str, mixer: str) -> None:
    lm = model(mixers=[mixer])
    evaluate = build("dynamic-evaluation", rule=rule, rate=0.0, segment=8)
    told = evaluate(lm, text(), evaluate.statistics(lm, text(seed=1)))
    plain = carried(lm, text(), segment=8)
    assert told.tokens == plain.tokens == 45
    assert told.nats == pytest.approx(plain.nats, rel=1e-6)


def test_weights_and_flags_are_restored_bit_by_bit() -> None:
    lm = model(dropout=0.2).train()
    lm.model.embed_tokens.weight.requires_grad_(False)
    before, flags = values(lm), [p.requires_grad for p in lm.parameters()]
    evaluate = DynamicEvaluation(rule="sgd", rate=0.5, segment=8)
    evaluate(lm, text())
    assert all(torch.equal(a, b) for a, b in zip(values(lm), before, strict=True))
    assert [p.requires_grad for p in lm.parameters()] == flags
    assert lm.training
    assert all(p.grad is None for p in lm.parameters())
    with pytest.raises(LongspanError, match="rms"):
        DynamicEvaluation(rule="rms", rate=0.5)(lm, text(), {})
    assert all(torch.equal(a, b) for a, b in zip(values(lm), before, strict=True))


def test_restored_after_an_interruption() -> None:
    lm = model()
    before = values(lm)
    calls = 0

    def stop(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    lm.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        DynamicEvaluation(rule="sgd", rate=0.5, segment=8)(lm, text())
    assert all(torch.equal(a, b) for a, b in zip(values(lm), before, strict=True))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_sgd_equals_torch_interleaved_with_scoring(clip: float | None) -> None:
    lm, tokens = model(mixers=["linear-transformer"]), text()
    told = DynamicEvaluation(rule="sgd", rate=0.3, segment=8, clip=clip)(lm, tokens)
    lm.eval()
    optimiser = torch.optim.SGD(lm.parameters(), lr=0.3)
    cache, nats = None, []
    for first in range(0, 45, 8):
        last = min(first + 8, 45)
        output = lm(tokens[None, first:last], past_key_values=cache, use_cache=True)
        cache = output.past_key_values.detach()
        loss = F.cross_entropy(output.logits[0], tokens[first + 1 : last + 1])
        nats.append(float(loss.detach()) * (last - first))
        optimiser.zero_grad()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(lm.parameters(), clip)
        optimiser.step()
    assert [part for part, _ in told.segments] == pytest.approx(nats, rel=1e-5)
    assert [count for _, count in told.segments] == [8, 8, 8, 8, 8, 5], "a short last segment"
    assert told.nats == pytest.approx(sum(nats), rel=1e-5)


class Slope(nn.Module):
    """Logits (a·b, 0) for every token, with two parameters: losses that can be done by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        rise = (self.a * self.b).expand(*input_ids.shape)
        return SimpleNamespace(logits=torch.stack([rise, torch.zeros_like(rise)], -1))


def test_rms_with_decay_by_hand() -> None:
    slope, eta, lam, eps = Slope(), 0.1, 0.3, 1e-3
    evaluate = DynamicEvaluation(
        rate=eta, decay=lam, segment=2, context=0, epsilon=eps, rule="rms-decay"
    )
    train, test = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 0, 1, 0, 0, 1, 1])

    def gradients(a: float, b: float, pair: list[int]) -> tuple[float, float]:
        p = 1 / (1 + math.exp(-a * b))
        rise = sum(p - (1 - x) for x in pair) / len(pair)
        return rise * b, rise * a

    squares = [[g * g for g in gradients(0.5, 2.0, pair)] for pair in ([0, 1], [1, 1])]
    r = [math.sqrt((x + y) / 2) for x, y in zip(*squares, strict=True)]
    found = evaluate.statistics(slope, train)
    assert [float(found[n]) for n in "ab"] == pytest.approx(r)
    pull = [min(lam * part / (sum(r) / 2), 1) for part in r]
    assert max(pull) < 1
    theta, nats = [0.5, 2.0], 0.0
    for pair in ([0, 1], [0, 0], [1, 1]):
        rise = theta[0] * theta[1]
        nats += sum(math.log1p(math.exp(-rise if x == 0 else rise)) for x in pair)
        steps = gradients(*theta, pair)
        theta = [
            t + d * (t0 - t) - eta * g / (s + eps)
            for t, t0, g, s, d in zip(theta, (0.5, 2.0), steps, r, pull, strict=True)
        ]
    told = evaluate(slope, test, found, restore=False)
    assert told.nats == pytest.approx(nats, rel=1e-6)
    assert [float(p.detach()) for p in (slope.a, slope.b)] == pytest.approx(theta, rel=1e-6)


def test_the_pull_never_overshoots() -> None:
    slope = Slope()
    evaluate = DynamicEvaluation(rate=0.0, decay=50.0, segment=2, context=0)
    found = evaluate.statistics(slope, torch.tensor([0, 0, 1]))
    assert all(float(pull) == 1.0 for _, pull in evaluate._scales(["a", "b"], found) or [])


def test_later_segments_do_not_change_earlier_scores() -> None:
    lm, tokens = model(), text()
    evaluate = DynamicEvaluation(rule="sgd", rate=0.5, segment=8)
    other = tokens.clone()
    other[25:] = other[25:].flip(0)
    one, two = evaluate(lm, tokens), evaluate(lm, other)
    assert one.segments[:3] == two.segments[:3]
    assert one.segments[3:] != two.segments[3:]
    changed = tokens.clone()
    changed[18:25] = (changed[18:25] + 1) % VOCABULARY
    assert evaluate(lm, changed).segments[:2] == one.segments[:2], "scored before the update"


def test_a_subset_adapts_and_tied_weights_once() -> None:
    lm = model()
    lm.tie_weights()
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    evaluate = DynamicEvaluation(rule="sgd", rate=0.5, segment=8)
    before = dict(zip([n for n, _ in lm.named_parameters()], values(lm), strict=True))
    evaluate(lm, text(), chosen=lambda name: "feed_forward" in name, restore=False)
    moved = {n for n, p in lm.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("feed_forward" in name for name in moved)
    assert sum("embed_tokens" in n or "lm_head" in n for n in evaluate.statistics(lm, text())) == 1
    with pytest.raises(LongspanError, match="no parameter"):
        evaluate(lm, text(), chosen=lambda name: False)


def test_streams_have_weights_of_their_own() -> None:
    lm = model()
    evaluate = DynamicEvaluation(rule="sgd", rate=0.5, segment=8)
    rows = torch.stack([text(), text(seed=2)])
    both = evaluate(lm, rows)
    alone = [evaluate(lm, row) for row in rows]
    assert both.segments == alone[0].segments + alone[1].segments
    with pytest.raises(LongspanError, match="copies"):
        evaluate(lm, rows, restore=False)


def test_dropout_is_off_while_adapting() -> None:
    lm = model(dropout=0.5).train()
    evaluate = DynamicEvaluation(rule="sgd", rate=0.5, segment=8)
    assert evaluate(lm, text()) == evaluate(lm, text())


def test_repetition_is_learned_and_a_grid_finds_how() -> None:
    lm, tokens = model(), text(12).repeat(12)
    grid = [DynamicEvaluation(rate=r, decay=d, segment=6) for r in (0.0, 3e-3) for d in (0.0, 1e-2)]
    statistics = grid[0].statistics(lm, text(60, seed=3))
    best, losses = tune(lm, tokens, grid, statistics)
    assert best.rate == 3e-3
    assert min(losses[2:]) < 0.9 * losses[0]


def test_a_model_of_transformers_carries_its_cache_or_reads_again() -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    llama = LlamaForCausalLM(config)
    carried_ = DynamicEvaluation(rule="sgd", rate=0.0, segment=8)(llama, text())
    again = DynamicEvaluation(rule="sgd", rate=0.0, segment=8, context=100)(llama, text())
    assert carried_.nats == pytest.approx(again.nats, rel=1e-5)
    moved = DynamicEvaluation(rule="sgd", rate=0.1, segment=8, context=8)(llama, text())
    assert math.isfinite(moved.loss)


def test_settings_that_cannot_be_are_refused() -> None:
    for wrong in ({"rule": "sgd", "decay": 0.1}, {"segment": 0}, {"rate": -1.0}):
        with pytest.raises(LongspanError):
            build("dynamic-evaluation", **wrong)
    with pytest.raises(LongspanError, match="nothing to score"):
        DynamicEvaluation(rule="sgd")(model(), text(1))
