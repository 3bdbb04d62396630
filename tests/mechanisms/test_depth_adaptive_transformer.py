"""Depth-Adaptive Transformer: oracles, classifiers, and what they choose."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import build
from longspan.inference.exits import Asked, EarlyExit, Graded
from longspan.inference.oracles import best_exit, log_geometric, smoothed

N, B, L, E = 4, 2, 7, 6


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rule(**options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        driver = build("depth-adaptive-transformer", width=E, layers=N, **options)
    assert isinstance(driver, EarlyExit)
    return driver.rule.double()


def graded(counted: Tensor | None = None) -> Graded:
    nats = randn(N, B, L).abs().requires_grad_()
    every = torch.ones(B, L, dtype=torch.bool) if counted is None else counted
    return Graded(
        [randn(B, L, E, seed=n) for n in range(N + 1)],
        torch.nn.Identity(),
        nats,
        randn(N, B, L, seed=1) > 0,
        randn(N, B, L, seed=2) > 0,
        every,
        randn(B, E, seed=3),
    )


def asked(n: int, states: list[Tensor], encoded: Tensor | None = None) -> Asked:
    rows = len(states[0])
    return Asked(
        n, N, states.__getitem__, torch.nn.Identity(), lambda: states[n],
        torch.zeros(rows, dtype=torch.long), encoded,
    )  # fmt: skip


def chosen(of: Any, states: list[Tensor], encoded: Tensor | None = None) -> Tensor:
    exits = torch.full((len(states[0]),), N)
    for n in range(N - 1, 0, -1):
        exits = torch.where(of(asked(n, states, encoded)), n, exits)
    return exits


@pytest.mark.parametrize("sigma", [0.3, 2.0, 500.0])
def test_smoothing_is_the_kernel_with_its_minus(sigma: float) -> None:
    scores = randn(N, B, L)
    t = torch.arange(L, dtype=torch.float64)
    kernel = torch.exp(-((t[:, None] - t) ** 2) / sigma)
    assert_close(smoothed(scores, sigma), scores @ kernel.T, atol=1e-9, rtol=1e-9)


def test_sigma_to_zero_leaves_scores_alone() -> None:
    scores = randn(N, B, L)
    assert torch.equal(smoothed(scores, 0.0), scores)
    assert_close(smoothed(scores, 1e-3), scores)


def test_best_exit_penalises_depth_and_breaks_ties_downwards() -> None:
    scores = torch.tensor([[1.0, 2.0], [3.0, 2.0], [3.5, 2.0]])
    assert best_exit(scores, 0.0).tolist() == [3, 1]
    assert best_exit(scores, 1.0).tolist() == [2, 1]
    assert best_exit(scores, 1e6).tolist() == [1, 1]


@pytest.mark.parametrize("oracle", ["likelihood", "correctness"])
@pytest.mark.parametrize("sigma", [0.0, 1.5])
def test_token_oracles(oracle: str, sigma: float) -> None:
    counted = torch.ones(B, L, dtype=torch.bool)
    counted[0, 3] = False
    seen = graded(counted)
    got = rule(oracle=oracle, sigma=sigma, penalty=0.2).targets(seen)
    score = -seen.nats.detach() if oracle == "likelihood" else seen.correct.double()
    for b in range(B):
        for t in range(L):
            total = [
                sum(
                    (math.exp(-((t - s) ** 2) / sigma) if sigma else float(t == s))
                    * float(score[n, b, s])
                    for s in range(L)
                    if counted[b, s]
                )
                - 0.2 * (n + 1)
                for n in range(N)
            ]
            assert int(got[b, t]) == total.index(max(total)) + 1


@pytest.mark.parametrize("oracle", ["likelihood", "correctness"])
def test_sequence_oracles(oracle: str) -> None:
    seen = graded()
    of = rule(classifier="sequence", oracle=oracle, penalty=0.3)
    score = -seen.nats.detach() if oracle == "likelihood" else seen.correct.double()
    want = [
        max(range(N), key=lambda n: float(score[n, b].sum()) - 0.3 * (n + 1)) + 1 for b in range(B)
    ]
    assert of.targets(seen).tolist() == want
    assert seen.encoded is not None
    log_q = of.score(seen.encoded).log_softmax(-1)
    assert_close(of.loss(seen), -sum(log_q[b, want[b] - 1] for b in range(B)) / B)


def test_geometric_sums_to_one_and_is_the_product() -> None:
    x = randn(5, N - 1) * 3
    q = log_geometric(x).exp()
    assert_close(q.sum(-1), torch.ones(5, dtype=torch.float64))
    p = x.sigmoid()
    want = [p[:, 0], (1 - p[:, 0]) * p[:, 1], (1 - p[:, 0]) * (1 - p[:, 1]) * p[:, 2]]
    want.append((1 - p).prod(-1))
    assert_close(q, torch.stack(want, -1))
    far = log_geometric(torch.tensor([[800.0, -800.0, 0.0]]))
    assert far.isfinite().all()


def test_classifier_losses_are_the_cross_entropy_to_the_oracle() -> None:
    counted = torch.ones(B, L, dtype=torch.bool)
    counted[1, 4:] = False
    seen = graded(counted)
    for classifier in ("multinomial", "geometric"):
        of = rule(classifier=classifier).requires_grad_(False)
        target, total = of.targets(seen), 0.0
        for b, t in counted.nonzero().tolist():
            if classifier == "multinomial":
                q = of.score(seen.states[1][b, t]).softmax(-1)
            else:
                h = [seen.states[n][b, t] for n in range(1, N)]
                x = [(h[n] @ of.score.weight[n] + of.score.bias[n]).sigmoid() for n in range(N - 1)]
                q = [x[n] * math.prod(1 - float(y) for y in x[:n]) for n in range(N - 1)]
                q.append(torch.tensor(math.prod(1 - float(y) for y in x)))
            total -= math.log(float(q[int(target[b, t]) - 1]))
        assert float(of.loss(seen)) == pytest.approx(total / int(counted.sum()))


@pytest.mark.parametrize("classifier", ["sequence", "multinomial", "geometric"])
def test_oracles_are_detached(classifier: str) -> None:
    seen = graded()
    rule(classifier=classifier).loss(seen).backward()
    assert seen.nats.grad is None


def test_classifiers_choose_as_in_the_paper() -> None:
    h, encoded = [randn(30, E, seed=n) for n in range(N + 1)], randn(30, E, seed=9)
    of = rule(classifier="sequence")
    assert torch.equal(chosen(of, h, encoded), of.score(encoded).argmax(-1) + 1)
    of = rule(classifier="multinomial")
    assert torch.equal(chosen(of, h), of.score(h[1]).argmax(-1) + 1)
    of = rule(classifier="geometric", threshold=[0.4, 0.5, 0.6])
    x = torch.stack([of.score(h[n])[:, n - 1] for n in range(1, N)], 1).sigmoid()
    over = x > torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)
    first = [row.index(True) + 1 if True in row else N for row in over.tolist()]
    assert chosen(of, h).tolist() == first
    of = rule(classifier="confidence", threshold=[0.3, 0.35, 0.4])
    most = torch.stack([h[n].softmax(-1).amax(-1) for n in range(1, N)], 1)
    over = most > torch.tensor([0.3, 0.35, 0.4], dtype=torch.float64)
    first = [row.index(True) + 1 if True in row else N for row in over.tolist()]
    assert chosen(of, h).tolist() == first


@pytest.mark.parametrize("classifier", ["multinomial", "geometric"])
def test_a_classifier_learns_what_the_oracle_says(classifier: str) -> None:
    """States that show the best exit: after training, tokens leave there."""
    best = torch.arange(B * L).view(B, L) % N
    nats = torch.ones(N, B, L).scatter(0, best[None], 0.0)
    shown = torch.nn.functional.one_hot(best, E).float()
    off = torch.zeros(N, B, L, dtype=torch.bool)
    seen = Graded(
        [shown] * (N + 1), torch.nn.Identity(), nats, off, off,
        torch.ones(B, L, dtype=torch.bool), None,
    )  # fmt: skip
    of = rule(classifier=classifier).float()
    optimiser = torch.optim.Adam(of.parameters(), lr=0.1)
    for _ in range(150):
        of.loss(seen).backward()
        optimiser.step()
        optimiser.zero_grad()
    assert torch.equal(chosen(of, [shown.flatten(0, 1)] * (N + 1)), best.flatten() + 1)
