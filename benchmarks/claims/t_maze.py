"""GTrXL's agent in a T-maze (Bakker, 2001): what is seen at the start tells where to turn.

A corridor shows at its start, and there only, which arm of its end holds the reward; an agent that
does not remember finds it half of the time. `python benchmarks/claims/t_maze.py` trains agents that
differ in one thing and writes `results/t_maze.json`. It shows what the memory does. What the gates
do for deep agents, which is the paper's claim, it is too small to show: all orders of norms learn.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import Categorical

from longspan.models.policy import PolicyConfig, PolicyModel, actor_critic_loss

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write

FORWARD, LEFT, RIGHT = range(3)


class TMaze:
    """Many mazes side by side, each begun anew when its episode ends.

    Observations are Bakker's three bits: 011 or 110 at the start, 101 on the way, 010 at the end.
    There, turning to the arm that was shown brings 4; turning to the other one, or standing still
    anywhere, −0.1. Unlike in Bakker's maze there is no way back, and corridors differ in length, so
    that no clock helps.

    Args:
        shortest, longest: steps from the start to the end.
    """

    def __init__(self, mazes: int, shortest: int, longest: int, *, generator: Generator) -> None:
        self.generator, self.lengths = generator, (shortest, longest + 1)
        self.side, self.length, self.walked = torch.zeros(3, mazes, dtype=torch.long)
        self._begin(torch.ones(mazes, dtype=torch.bool))

    def _begin(self, rows: Tensor) -> None:
        sides = torch.randint(LEFT, RIGHT + 1, rows.shape, generator=self.generator)
        lengths = torch.randint(*self.lengths, rows.shape, generator=self.generator)
        self.side = torch.where(rows, sides, self.side)
        self.length = torch.where(rows, lengths, self.length)
        self.walked = self.walked.masked_fill(rows, 0)

    def observe(self) -> Tensor:
        """mazes × 3."""
        ahead, right = self.walked < self.length, self.side == RIGHT
        here = torch.stack([ahead, ~ahead, ahead], 1)
        cue = torch.stack([right, torch.ones_like(right), ~right], 1)
        return torch.where(self.walked[:, None] == 0, cue, here).float()

    def act(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(rewards, which episodes ended, which of these with the reward)."""
        turned, at_end = actions != FORWARD, self.walked == self.length
        ends, won = turned & at_end, at_end & (actions == self.side)
        rewards = torch.where(won, 4.0, torch.where(turned | at_end, -0.1, 0.0))
        self.walked = self.walked + (~turned & ~at_end)
        self._begin(ends)
        return rewards, ends, won


def agent(*, memory: int = 16, seed: int = 0, **fields: Any) -> PolicyModel:
    """A small one of the paper's form; with a memory of 1 it sees the present alone."""
    torch.manual_seed(seed)
    mixer = {"id": "transformer-xl", "memory": memory, "same_length": True}
    size: dict[str, Any] = {"width": 32, "layers": 2, "heads": 2, "head_width": 16, "inner": 64}
    return PolicyModel(PolicyConfig(channels=3, actions=3, mixers=[mixer], **(size | fields)))


def train(
    policy: PolicyModel,
    mazes: TMaze,
    *,
    updates: int,
    unroll: int = 16,
    rate: float = 5e-3,
    discount: float = 0.95,
) -> list[float]:
    """Advantage actor-critic; the share of rewarded episodes in each update's unroll."""
    optimizer = torch.optim.Adam(policy.parameters(), rate)
    run, shares = Run(policy, mazes), []
    for _ in range(updates):
        start = run.state
        observations, resets, actions, rewards, ends, won = run.act(unroll)
        loss = actor_critic_loss(
            policy.unroll(observations, start, resets),
            actions,
            rewards,
            ends,
            run.value(),
            discount=discount,
        )
        optimizer.zero_grad()
        loss.total.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        shares.append((won.sum() / ends.sum().clamp(min=1)).item())
    return shares


class Run:
    """A policy in its mazes, going on from call to call.

    Args:
        forgetful: at every step an episode is said to begin.
    """

    def __init__(self, policy: PolicyModel, mazes: TMaze, *, forgetful: bool = False) -> None:
        self.policy, self.mazes, self.forgetful = policy, mazes, forgetful
        self.state, self.observation = None, mazes.observe()
        self.resets = torch.ones(len(self.observation), dtype=torch.bool)

    @torch.no_grad()
    def act(self, steps: int) -> list[Tensor]:
        """Observations, resets, actions, rewards, ends and rewarded ends, mazes × steps each."""
        taken = []
        for _ in range(steps):
            out = self.policy.step(self.observation, self.state, self.resets)
            actions = Categorical(logits=out.logits).sample()
            rewards, ends, won = self.mazes.act(actions)
            taken.append((self.observation, self.resets, actions, rewards, ends, won))
            self.state, self.observation = out.state, self.mazes.observe()
            self.resets = torch.ones_like(ends) if self.forgetful else ends
        return [torch.stack(part, 1) for part in zip(*taken, strict=True)]

    @torch.no_grad()
    def value(self) -> Tensor:
        """Of the observation to act on next."""
        return self.policy.step(self.observation, self.state, self.resets).values


AGENTS: dict[str, dict[str, Any]] = {
    "gtrxl": {},
    "gtrxl without memory": {"memory": 1},
    "TrXL-I": {"residual": {"id": "gtrxl", "gate": "none"}},
    "TrXL": {"residual": None, "norm_order": "post"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=80)
    parser.add_argument("--mazes", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--corridor", type=int, nargs=2, default=(2, 6))
    given = parser.parse_args()
    rows = []
    for name, fields in AGENTS.items():
        for seed in range(given.seeds):
            start = time.process_time()
            generator = torch.Generator().manual_seed(seed)
            mazes = TMaze(given.mazes, *given.corridor, generator=generator)
            shares = train(agent(seed=seed, **fields), mazes, updates=given.updates)
            spent = round(time.process_time() - start, 1)
            last = round(sum(shares[-10:]) / len(shares[-10:]), 3)
            rows.append({"agent": name, "seed": seed, "rewarded": last, "cpu_seconds": spent})
            print(rows[-1], flush=True)
    write("t_maze", **vars(given), rows=rows)


if __name__ == "__main__":
    main()
