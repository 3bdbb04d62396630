"""Learn then Test: p-values against scipy, and its guarantees by simulation."""

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from longspan import LongspanError, build
from longspan.inference import learn_then_test as ltt

BOUNDS = list(ltt.BOUNDS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def binary(risk: float, *shape: int, seed: int = 0) -> Tensor:
    return (torch.rand(*shape, generator=generator(seed), dtype=torch.float64) < risk).double()


def formula(losses: Tensor, level: float) -> float:
    """Hoeffding–Bentkus as the catalogue writes it, by scipy."""
    n, mean = len(losses), float(losses.mean())
    a = min(mean, level)
    h = (a * math.log(a / level) if a else 0.0) + (1 - a) * math.log((1 - a) / (1 - level))
    bentkus = math.e * stats.binom.cdf(math.ceil(float(losses.sum())), n, level)
    return min(math.exp(-n * h), bentkus, 1.0)


@pytest.mark.parametrize("level", [0.01, 0.1, 0.5, 0.93])
@pytest.mark.parametrize("n", [1, 7, 100, 3000])
def test_hoeffding_bentkus_is_the_formula(n: int, level: float) -> None:
    for risk in (0.0, 0.05, 0.4, 1.0):
        losses = binary(risk, n) * torch.rand(n, generator=generator(n), dtype=torch.float64)
        got = float(ltt.hoeffding_bentkus(losses, level))
        assert got == pytest.approx(formula(losses, level), rel=1e-9, abs=1e-300)


def test_hoeffding_bentkus_rounds_the_count_up() -> None:
    losses = torch.tensor([0.5] + [0.0] * 19, dtype=torch.float64)
    down = math.e * stats.binom.cdf(0, 20, 0.5)
    up = math.e * stats.binom.cdf(1, 20, 0.5)
    h = 0.025 * math.log(0.05) + 0.975 * math.log(0.975 / 0.5)
    assert float(ltt.hoeffding_bentkus(losses, 0.5)) == pytest.approx(min(up, math.exp(-20 * h)))
    assert down < up


def test_other_p_values_are_scipys() -> None:
    losses = binary(0.1, 200)
    count, mean = int(losses.sum()), float(losses.mean())
    assert float(ltt.binomial(losses, 0.15)) == pytest.approx(stats.binom.cdf(count, 200, 0.15))
    assert float(ltt.hoeffding(losses, 0.15)) == pytest.approx(
        math.exp(-400 * max(0.15 - mean, 0) ** 2)
    )
    z = (0.15 - mean) * math.sqrt(200) / float(losses.std())
    assert float(ltt.central_limit(losses, 0.15)) == pytest.approx(stats.norm.sf(z))
    assert float(ltt.hoeffding(losses, mean / 2)) == 1.0
    assert float(ltt.central_limit(torch.zeros(9), 0.15)) == 1.0


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("level", [0.05, 0.3])
def test_p_values_are_super_uniform_under_the_null(bound: str, level: float) -> None:
    # The central limit is approximate, and errs by some points until n δ is large.
    runs, n = (2000, 4000) if bound == "central-limit" else (20_000, 150)
    p = ltt.BOUNDS[bound](binary(level, runs, n), level)
    for u in (0.01, 0.05, 0.1, 0.3, 0.5):
        slack = 3 * math.sqrt(u * (1 - u) / runs) + 0.01 * (bound == "central-limit")
        assert float((p <= u).double().mean()) <= u + slack


def test_hoeffding_bentkus_is_super_uniform_for_losses_between() -> None:
    losses = torch.rand(20_000, 60, generator=generator(), dtype=torch.float64) ** 3  # mean 1/4
    p = ltt.hoeffding_bentkus(losses, 0.25)
    for u in (0.01, 0.1, 0.5):
        assert float((p <= u).double().mean()) <= u + 0.01


def calibrated(losses: Tensor, level: float, **options: Any) -> ltt.Calibration:
    return build("learn-then-test", **options)(losses, list(range(losses.shape[1])), level)


@pytest.mark.parametrize(
    "options",
    [
        {"correction": "bonferroni"},
        {},
        {"starts": (0, 3)},
        {"bound": "binomial"},
        {"bound": "hoeffding", "starts": (2, 0, 5)},
    ],
    ids=str,
)
def test_family_wise_error_is_held(options: dict[str, Any]) -> None:
    # Risks that are not monotone, and just too high from the fourth on, the worst case.
    risks = torch.tensor([0.02, 0.05, 0.03, 0.1001, 0.101, 0.04, 0.11, 0.12], dtype=torch.float64)
    runs, n, error = 400, 300, 0.1
    bad = 0
    for seed in range(runs):
        losses = binary(1.0, n, 8) * (
            torch.rand(n, 8, generator=generator(seed), dtype=torch.float64) < risks
        )
        accepted = calibrated(losses, 0.1, error=error, **options).accepted
        bad += any(risks[j] > 0.1 for j in accepted)
    assert bad / runs <= error + 3 * math.sqrt(error * (1 - error) / runs)


def test_the_sequence_has_power_and_its_error_is_not_far_below() -> None:
    """A first candidate exactly at the null is accepted about as often as ε allows."""
    runs = 3000
    p = ltt.binomial(binary(0.1, runs, 400), 0.1)
    share = sum(ltt.fixed_sequence([x], 0.1)[0] for x in p.tolist()) / runs
    assert 0.06 < share < 0.12


def test_fixed_sequence_stops_at_the_first_failure() -> None:
    p = [0.01, 0.02, 0.2, 0.001, 0.03, 0.3]
    assert ltt.fixed_sequence(p, 0.05) == [True, True, False, False, False, False]
    # Two starts, each at ε / 2.
    assert ltt.fixed_sequence(p, 0.05, (0, 3)) == [True, True, False, True, False, False]
    assert ltt.bonferroni(p, 0.06) == [True, False, False, True, False, False]


def test_only_what_is_tested_is_measured() -> None:
    seen = []

    def losses(knob: float) -> Tensor:
        seen.append(knob)
        return torch.full((500,), 1 - knob)

    done = build("learn-then-test")(losses, [1.0, 0.95, 0.9, 0.5, 0.2], 0.1)
    assert seen == [1.0, 0.95, 0.9]
    assert done.accepted == (1.0, 0.95)
    assert [test.p is None for test in done.tests] == [False, False, False, True, True]
    assert done.table()[0] == {"knob": 1.0, "risks": (0.0,), "p": done.tests[0].p, "accepted": True}


def test_selection_takes_the_smallest_or_the_cheapest() -> None:
    done = calibrated(binary(0.01, 500, 4), 0.1)
    assert done.accepted == (0, 1, 2, 3)
    assert done.choose() == 0
    assert done.choose(cost={0: 4.0, 1: 2.0, 2: 1.0, 3: 9.0}.__getitem__) == 2


def test_an_empty_answer_says_what_to_do() -> None:
    done = calibrated(binary(0.5, 50, 3), 0.1)
    assert done.accepted == ()
    with pytest.raises(LongspanError, match=r"no candidate was certified.*more samples"):
        done.choose()


def test_the_samples_that_an_empty_answer_asks_for_are_as_few_as_can_do() -> None:
    calibrate = build("learn-then-test", error=0.05)
    with pytest.raises(LongspanError, match="about") as raised:
        calibrate(torch.ones(9, 1), [1], 0.1).choose()
    needed = int(str(raised.value).rpartition("about ")[2].rstrip(")."))
    assert calibrate(torch.zeros(needed, 1), [1], 0.1).accepted == (1,)
    assert calibrate(torch.zeros(needed - 1, 1), [1], 0.1).accepted == ()


def test_several_risks_are_held_at_once() -> None:
    first, second = binary(0.02, 400, 3), binary(0.02, 400, 3, seed=1)
    second[:, 2] = binary(0.3, 400)
    done = build("learn-then-test")(torch.stack([first, second], -1), [3, 2, 1], (0.1, 0.2))
    assert done.accepted == (3, 2)
    p = [float(ltt.hoeffding_bentkus(t[:, 0], x)) for t, x in ((first, 0.1), (second, 0.2))]
    assert done.tests[0].p == max(p)
    assert done.tests[2].risks == pytest.approx(
        (float(first[:, 2].mean()), float(second[:, 2].mean()))
    )


def test_any_scalar_knob_of_the_library() -> None:
    """The span of a local attention, so that it strays little from full attention."""
    q, k, v = (torch.randn(40, 1, 32, 4, generator=generator(s)) for s in range(3))
    k = k * 0.1
    full, _ = build("multi-head-attention", causal=True)(q, k, v)

    def losses(window: int) -> Tensor:
        o, _ = build("longformer", causal=True, window=window)(q, k, v)
        far = (o - full).flatten(1).norm(dim=1) / full.flatten(1).norm(dim=1)
        return far.clamp(max=1)

    done = build("learn-then-test", error=0.1)(losses, [64, 32, 16, 8, 4, 2], 0.5)
    assert 1 < len(done.accepted) < 6
    assert done.choose() == min(done.accepted)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ltt.hoeffding(torch.tensor([1.5]), 0.1), "between 0 and 1"),
        (lambda: ltt.hoeffding(torch.tensor([torch.nan]), 0.1), "between 0 and 1"),
        (lambda: ltt.hoeffding(torch.zeros(0), 0.1), "at least one"),
        (lambda: ltt.hoeffding(torch.zeros(3), 1.0), "level of 1.0"),
        (lambda: ltt.binomial(torch.tensor([0.5]), 0.1), "hoeffding-bentkus"),
        (lambda: ltt.fixed_sequence([0.1], 0.1, (1,)), "starts="),
        (lambda: ltt.fixed_sequence([0.1, 0.2], 0.1, (1, 1)), "starts="),
        (lambda: build("learn-then-test", error=2.0), "error is 2.0"),
        (lambda: build("learn-then-test")(torch.zeros(3, 2), [1], 0.1), "for 1 knobs"),
        (lambda: build("learn-then-test")(torch.zeros(3, 2), [], 0.1), "no candidate"),
        (lambda: build("learn-then-test")(torch.zeros(3, 2), [1, 2], (0.1, 0.2)), "2 risks"),
    ],
)
def test_mistakes_are_loud(call: Any, says: str) -> None:
    with pytest.raises(LongspanError, match=says):
        call()
