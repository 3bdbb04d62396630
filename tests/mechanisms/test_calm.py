"""CALM: its measures, its falling threshold, its calibration and the guarantee."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError, build
from longspan.inference.calm import agreement, calibrate, rouge_l_loss
from longspan.inference.exits import Asked, EarlyExit
from longspan.models.early_exit import EarlyExitConfig, EarlyExitForCausalLM


def rule(measure: str = "softmax", threshold: float = 0.5, **options: Any) -> Any:
    driver = build("calm", width=4, layers=5, measure=measure, threshold=threshold, **options)
    assert isinstance(driver, EarlyExit)
    return driver.rule


def asked(states: list[Tensor], logits: Tensor | None = None, place: int = 0) -> Asked:
    rows = len(states[0])
    return Asked(
        len(states) - 1,
        5,
        states.__getitem__,
        torch.nn.Identity(),
        lambda: torch.zeros(rows, 3) if logits is None else logits,
        torch.full((rows,), place),
        None,
    )


def states(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(6, 4, generator=generator) for _ in range(count)]


def model(**options: Any) -> EarlyExitForCausalLM:
    exit = {"id": "calm", "decay": None, "horizon": 8, **options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = EarlyExitConfig(
            vocab_size=11, width=16, layers=4, heads=2, initializer_range=0.5, exit=exit,
            trains="exits",
        )  # fmt: skip
        return EarlyExitForCausalLM(config).double().eval()


def tokens(rows: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(11, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_softmax_response_is_the_margin() -> None:
    logits = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.5, 0.0], [0.1, 0.1, 0.8]]).log()
    got = rule().confidence(asked([s[:3] for s in states(2)], logits))
    assert_close(got, torch.tensor([0.3, 0.0, 0.7]))


def test_saturation_is_the_cosine_with_the_block_before() -> None:
    h = states(3)
    want = (h[2] * h[1]).sum(1) / h[2].norm(dim=1) / h[1].norm(dim=1)
    assert_close(rule("saturation").confidence(asked(h)), want)
    # Before the first block stands the embedding.
    first = rule("saturation").confidence(asked(h[:2]))
    assert_close(first, torch.cosine_similarity(h[1], h[0]))


def test_classifier_is_one_linear_for_all_blocks() -> None:
    of = rule("classifier")
    for n in (1, 3):
        h = states(n + 1)
        want = torch.sigmoid(h[n] @ of.score.weight[0] + of.score.bias)
        assert_close(of.confidence(asked(h)), want)


def test_threshold_falls_as_in_the_paper() -> None:
    of = rule(threshold=0.6, decay=4.0, horizon=10)
    for t in range(10):
        bar = min(max(0.9 * 0.6 + 0.1 * math.exp(-4 * t / 10), 0), 1)
        for c, leaves in ((bar + 1e-4, True), (bar - 1e-4, False)):
            # Two classes with margin c.
            logits = torch.tensor([[(1 + c) / 2, (1 - c) / 2]]).log()
            assert bool(of(asked([s[:1] for s in states(2)], logits, place=t))) is leaves
    # Not the port's form, in which λ also stands before the exponential.
    port = 0.6 * math.exp(0) / 10 + 0.54
    logits = torch.tensor([[(1 + port) / 2 + 0.01, (1 - port) / 2 - 0.01]]).log()
    assert not bool(of(asked([s[:1] for s in states(2)], logits)))


@pytest.mark.parametrize("measure", ["softmax", "saturation", "classifier"])
@torch.no_grad()
def test_lambda_one_is_full_depth_and_zero_is_the_first_block(measure: str) -> None:
    ids = tokens()
    of, full = model(measure=measure, threshold=1.0), model()
    assert of(ids).exits.eq(4).all()
    greedy = of.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(greedy, full.generate(ids, max_new_tokens=5, do_sample=False))
    of.driver.rule.set_threshold(-1.0 if measure == "saturation" else 0.0)
    assert of(ids).exits.eq(1).all()
    of.driver.minimum = 3
    assert of(ids).exits.eq(3).all()
    # Even where the confidence rounds to 1.
    sure = torch.tensor([[100.0, -100.0]])
    assert not bool(rule(threshold=1.0)(asked([s[:1] for s in states(2)], sure)))


@torch.no_grad()
def test_place_counts_generated_tokens() -> None:
    """The bar falls from the prompt's end on, whatever the prompt's length and padding."""
    of, seen = model(threshold=0.99, decay=4.0, measure="saturation"), []
    confidence = of.driver.rule.confidence
    of.driver.rule.confidence = lambda a: (seen.append(a.place.tolist()), confidence(a))[1]
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    of.generate(tokens(2, 6), attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [x for n, x in enumerate(seen) if x != (seen[n - 1] if n else None)] == [
        [0, 0], [1, 1], [2, 2],
    ]  # fmt: skip


def test_classifier_learns_agreement_with_the_last_block() -> None:
    of, ids = model(measure="classifier").train(), tokens(4, 20)
    graded = of.grade(ids)
    with torch.no_grad():
        x, losses = of.model.embed_tokens(ids), []
        for n, layer in enumerate(of.model.layers, 1):
            x, _ = layer(x)
            if n < 4:
                score = of.driver.rule.score(of.model.norm(x))[..., 0]
                label = graded.agrees[n - 1].double()
                each = torch.nn.functional.binary_cross_entropy_with_logits(
                    score[:, :-1], label[:, :-1], reduction="none"
                )
                losses.append(each.mean())
    assert_close(of(ids, labels=ids).loss, torch.stack(losses).mean(), check_dtype=False)
    frozen = {n: p.clone() for n, p in of.named_parameters() if not n.startswith("driver")}
    optimiser = torch.optim.Adam(of.parameters(), lr=0.05)
    found = []
    for _ in range(40):
        loss = of(ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    assert found[-1] < found[0]
    assert all(torch.equal(p, frozen[n]) for n, p in of.named_parameters() if n in frozen)


def test_classifier_s_loss_reaches_no_weight_of_the_model() -> None:
    of, ids = model(measure="classifier"), tokens(2, 7)
    loss = of.driver.rule.loss(of.grade(ids))
    named = [(n, p) for n, p in of.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True)
    reached = {n for (n, _), g in zip(named, found, strict=True) if g is not None}
    assert reached == {"driver.rule.score.weight", "driver.rule.score.bias"}


@torch.no_grad()
def test_oracle_leaves_at_the_first_agreement() -> None:
    of, ids = model(), tokens()
    graded = of.grade(ids)
    oracle = agreement(graded)
    for b in range(3):
        for t in range(9):
            own = [n for n in range(1, 5) if graded.agrees[n - 1, b, t]]
            assert oracle[b, t] == own[0]
    assert torch.equal(of(ids, exits=oracle).exits, oracle)


@pytest.mark.parametrize(
    ("text", "reference", "subsequence"),
    [([1, 2, 3, 4], [1, 3, 4], 3), ([1, 2], [2, 1], 1), ([5], [6], 0), ([7, 8, 7], [7, 7], 2)],
)
def test_rouge_l_is_the_longest_common_subsequence(
    text: list[int], reference: list[int], subsequence: int
) -> None:
    p, r = subsequence / len(text), subsequence / len(reference)
    want = 1 - (2 * p * r / (p + r) if subsequence else 0)
    assert rouge_l_loss(text, reference) == pytest.approx(want)
    assert rouge_l_loss(reference, text) == pytest.approx(want)


def test_rouge_l_of_empty_texts() -> None:
    assert (rouge_l_loss([], []), rouge_l_loss([], [1]), rouge_l_loss([1], [])) == (0, 1, 1)


def test_calibration_to_the_texts_of_full_depth() -> None:
    of, prompts = model(), tokens(60, 4)
    done = calibrate(of, prompts, level=0.6, error=0.1, new_tokens=5, thresholds=[0.9, 0.6, 0.2])
    tests = done.calibration.tests
    assert done.threshold == min((t.knob for t in tests if t.accepted), default=1.0)
    assert of.driver.rule.thresholds.tolist() == pytest.approx([done.threshold] * 3)
    # The table's risks are those of the texts.
    first = tests[0].knob
    texts = {}
    for bar in (1.0, first):
        of.driver.rule.set_threshold(bar)
        out = of.generate(prompts, max_new_tokens=5, do_sample=False)
        texts[bar] = out[:, 4:].tolist()
    losses = [rouge_l_loss(a, b) for a, b in zip(texts[first], texts[1.0], strict=True)]
    assert tests[0].risks == pytest.approx((sum(losses) / 60,))


def test_calibration_to_references_clips_each_difference() -> None:
    of, prompts = model(), tokens(40, 4)
    references = [[n % 11] * 5 for n in range(40)]

    def missing(text: list[int], reference: list[int]) -> float:
        return float(reference[0] not in text)

    done = calibrate(
        of, prompts, level=0.5, new_tokens=5, thresholds=[0.3], loss=missing, references=references
    )
    texts = {}
    for bar in (1.0, 0.3):
        of.driver.rule.set_threshold(bar)
        texts[bar] = of.generate(prompts, max_new_tokens=5, do_sample=False)[:, 4:].tolist()
    want = [
        max(0.0, missing(a, r) - missing(b, r))
        for a, b, r in zip(texts[0.3], texts[1.0], references, strict=True)
    ]
    assert done.calibration.tests[0].risks == pytest.approx((sum(want) / 40,))


def test_nothing_accepted_is_full_depth() -> None:
    of = model()
    done = calibrate(of, tokens(10, 4), level=0.01, new_tokens=4, thresholds=[0.5, 0.0])
    assert done.fell_back
    assert done.threshold == 1.0
    with torch.no_grad():
        assert of(tokens()).exits.eq(4).all()


def test_the_guarantee_holds_over_draws_of_the_calibration_set() -> None:
    """Losses that grow as λ falls: the chosen λ is too low in at most a share ε of the draws."""
    knobs = [n / 10 for n in range(9, -1, -1)]
    risk = torch.tensor([0.02 + 0.25 * (0.9 - knob) for knob in knobs], dtype=torch.float64)
    level, error, draws, n = 0.1, 0.1, 500, 200
    generator, violations, moved = torch.Generator().manual_seed(0), 0, 0
    for _ in range(draws):
        # A prompt is hard or easy for all thresholds alike; its loss is a fraction.
        hard = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        size = torch.rand(n, 1, generator=generator, dtype=torch.float64)
        losses = (hard < risk * 2).double() * size  # the mean is `risk`
        done = build("learn-then-test", error=error)(losses, knobs, level)
        if done.accepted:
            moved += 1
            violations += float(risk[knobs.index(done.choose())]) > level
    assert violations / draws <= error
    assert moved > 0.9 * draws


def test_mistakes_are_loud() -> None:
    of = model()
    with pytest.raises(LongspanError, match="give them falling"):
        calibrate(of, tokens(), level=0.1, new_tokens=2, thresholds=[0.1, 0.5])
    with pytest.raises(LongspanError, match="1 references were given for 3 prompts"):
        calibrate(of, tokens(), level=0.1, new_tokens=2, references=[[1]])
    with pytest.raises(LongspanError, match="between 0 and 1"):
        calibrate(of, tokens(), level=0.1, new_tokens=2, loss=lambda a, b: 2.0)
    assert of.driver.rule.thresholds.eq(1).all()
