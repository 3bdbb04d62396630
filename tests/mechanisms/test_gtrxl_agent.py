"""GTrXL's agent learns a task of memory: the T-maze of `benchmarks/claims/t_maze.py`."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch

PATH = Path(__file__).resolve().parents[2] / "benchmarks" / "claims" / "t_maze.py"


@pytest.fixture(scope="module")
def maze() -> Any:
    spec, found = spec_from_file_location("t_maze", PATH), sys.path[:]
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = found
    return module


def mazes(maze: Any, count: int = 16, shortest: int = 2, longest: int = 5) -> Any:
    return maze.TMaze(count, shortest, longest, generator=torch.Generator().manual_seed(0))


def test_the_maze_shows_its_cue_once_and_pays_for_the_arm_shown(maze: Any) -> None:
    built = mazes(maze, count=4, shortest=2, longest=2)
    built.side = torch.tensor([maze.LEFT, maze.LEFT, maze.RIGHT, maze.RIGHT])
    go = torch.full((4,), maze.FORWARD)
    assert built.observe().tolist() == [[0, 1, 1], [0, 1, 1], [1, 1, 0], [1, 1, 0]]
    for rewards in (built.act(go + 1)[0], built.act(go + 2)[0]):
        assert torch.equal(rewards, torch.full((4,), -0.1))
    built.act(go)
    assert built.observe().tolist() == [[1, 0, 1]] * 4
    built.act(go)
    assert built.observe().tolist() == [[0, 1, 0]] * 4
    actions = torch.tensor([maze.LEFT, maze.RIGHT, maze.RIGHT, maze.FORWARD])
    rewards, ends, won = built.act(actions)
    assert torch.equal(rewards, torch.tensor([4.0, -0.1, 4.0, -0.1]))
    assert ends.tolist() == [True, True, True, False]
    assert won.tolist() == [True, False, True, False]
    assert built.observe()[:, 1].tolist() == [1.0] * 4
    assert built.walked.tolist() == [0, 0, 0, 2]


def test_an_agent_learns_to_turn_by_what_it_saw(maze: Any) -> None:
    """And turns at random where it is made to forget: the cue is nowhere but in its memory."""
    policy = maze.agent(layers=1)
    shares = maze.train(policy, mazes(maze, count=24), updates=45, unroll=8, rate=1e-2)
    assert sum(shares[:5]) / 5 < 0.75
    assert sum(shares[-10:]) / 10 > 0.9
    run = maze.Run(policy, mazes(maze, count=64), forgetful=True)
    *_, ends, won = run.act(20)
    assert ends.sum() > 100
    assert won.sum() / ends.sum() < 0.65


@pytest.mark.slow
def test_of_two_agents_only_the_one_with_a_memory_learns(maze: Any) -> None:
    last = {}
    for memory in (16, 1):
        shares = maze.train(maze.agent(memory=memory), mazes(maze), updates=60)
        last[memory] = sum(shares[-10:]) / 10
    assert last[16] > 0.9
    assert last[1] < 0.65
