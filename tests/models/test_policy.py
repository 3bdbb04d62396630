"""The policy: unrolls, steps and episodes agree; V-trace and its loss are their formulas."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from longspan import LongspanError
from longspan.models.policy import (
    PolicyConfig,
    PolicyModel,
    PolicyOutput,
    actor_critic_loss,
    vtrace,
)
from longspan.nn import load_state, save_state
from longspan.testing.oracles.dense import softmax

ROWS, STEPS, CHANNELS, ACTIONS = 3, 11, 2, 3
XL = {"id": "transformer-xl", "memory": 4, "same_length": True}


def agent(mixer: Any = XL, encoder: nn.Module | None = None, **fields: Any) -> PolicyModel:
    """In float64, every parameter large enough to matter."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"width": 12, "layers": 2, "heads": 3, "head_width": 4}
    size |= {"channels": CHANNELS, "actions": ACTIONS, "mixers": [mixer]}
    policy = PolicyModel(PolicyConfig(**(size | fields)), encoder).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in policy.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)
    return policy


def seen(steps: int = STEPS, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, steps, CHANNELS, generator=generator, dtype=torch.float64)


def beginnings(*rows: list[int], steps: int = STEPS) -> Tensor:
    resets = torch.zeros(len(rows), steps, dtype=torch.bool)
    for row, at in enumerate(rows):
        resets[row, at] = True
    return resets


# At the first step and not, twice in a row, at the last step, and never.
RESETS = beginnings([0, 4, 5], [3, 10], [])
MIXERS = [
    XL,
    {"id": "transformer-xl", "memory": 64},
    "linear-transformer",
    "multi-head-attention",
    {"id": "compressive-transformer", "segment": 3, "memory": 3, "compressed": 2, "rate": 1},
]


@pytest.mark.parametrize(
    ("mixer", "resets"),
    [(mixer, RESETS) for mixer in MIXERS] + [(XL, beginnings([2, 5], [6], [1, 4, 9])), (XL, None)],
    ids=[*map(str, MIXERS), "every row", "no row"],
)
def test_unrolls_are_steps_wherever_episodes_begin(mixer: Any, resets: Tensor | None) -> None:
    position = "rope" if mixer == "multi-head-attention" else None
    policy, later = agent(mixer, position=position), RESETS.roll(1, 0)
    state, outs = None, []
    for x, begins in ((seen(), resets), (seen(seed=3), later)):
        for t in range(STEPS):
            out = policy.step(x[:, t], state, None if begins is None else begins[:, t])
            state = out.state
            outs.append(out)
    first = policy.unroll(seen(), None, resets)
    second = policy.unroll(seen(seed=3), first.state, later)
    for name in ("logits", "values"):
        want = torch.stack([getattr(out, name) for out in outs], 1)
        assert_close(torch.cat([getattr(first, name), getattr(second, name)], 1), want)
    assert second.state is not None
    assert state is not None
    assert torch.equal(second.state.seen, state.seen)
    again = [policy.unroll(seen(seed=4), carried).values for carried in (second.state, state)]
    assert_close(*again)


def written_out(policy: Any, x: Tensor, resets: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """GTrXL over whole rows, a query seeing the last `reach` keys of its own episode."""
    times, episode = torch.arange(x.shape[1]), resets.cumsum(1)
    distance = times[:, None] - times
    visible = (distance >= 0) & (distance < reach) & (episode[:, :, None] == episode[:, None])
    stream = policy.model.embed_tokens(x)
    for layer in policy.model.layers:
        attend, h = layer.mixer.mixer, layer.mixer.norm(stream)
        position, heads, width = attend.position.position, attend.heads, attend.head_width
        q, k, v = (attend.project[n](h).unflatten(-1, (heads, width)) for n in ("q", "k", "v"))
        rate = 10000 ** (-torch.arange(0, position.width, 2, dtype=torch.float64) / position.width)
        angle = distance[..., None] * rate
        r = position.project(torch.cat([angle.sin(), angle.cos()], -1))
        r = r.unflatten(-1, (heads, width))  # L L H D
        scores = torch.einsum("bihd,bjhd->bhij", q + position.u, k)
        scores = scores + torch.einsum("bihd,ijhd->bhij", q + position.v, r)
        weights = softmax(scores / width**0.5, visible[:, None])
        o = attend.output(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
        stream = layer.mixer_residual.combine(stream, o)
        y = layer.feed_forward(layer.feed_forward_norm(stream))
        stream = layer.feed_forward_residual.combine(stream, y)
    stream = policy.model.norm(stream)
    return policy.policy_head(stream), policy.value_head(stream)[..., 0]


def test_an_unroll_is_attention_within_episodes_written_out() -> None:
    policy, x = agent(), seen().requires_grad_()
    of = [x, *policy.parameters()]
    got, want = policy.unroll(x, None, RESETS), written_out(policy, x, RESETS, reach=4)
    found = got.logits, got.values
    assert_close(found, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(sum(t.sin().sum() for t in found), of),
        torch.autograd.grad(sum(t.sin().sum() for t in want), of),
        strict=True,
    ):
        assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_nothing_of_an_earlier_episode_is_seen() -> None:
    policy, x = agent(MIXERS[1]), seen().requires_grad_()
    before = policy.unroll(seen(seed=3)).state
    for row, (start, stop) in ((0, (0, 4)), (0, (5, 11)), (1, (3, 10)), (2, (0, 11))):
        out = policy.unroll(x, before, RESETS)
        assert out.logits is not None
        (grad,) = torch.autograd.grad(out.logits[row, stop - 1].sum(), x)
        assert grad[row, start:stop].any(-1).all()
        grad[row, start:stop] = 0
        assert not grad.any()
    poisoned = x.detach().clone()
    poisoned[0, :5], poisoned[1, :10] = torch.nan, torch.nan
    got, want = (policy.unroll(t, before, RESETS).values for t in (poisoned, x))
    assert got is not None
    assert want is not None
    assert torch.equal(got[0, 5:], want[0, 5:])
    assert torch.equal(got[1, 10:], want[1, 10:])


def test_a_state_is_saved_and_an_encoder_given(tmp_path: Path) -> None:
    def encoder() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 5 * 5, 12)).double()

    policy, frames = agent(encoder=encoder()).eval(), torch.rand(2, 4, 3, 5, 5).double()
    out = policy.unroll(frames)
    policy.save_pretrained(tmp_path)
    save_state(out.state, tmp_path / "state.safetensors")
    again = PolicyModel.from_pretrained(tmp_path, encoder=encoder(), dtype=torch.float64)
    state = load_state(tmp_path / "state.safetensors")
    got, want = (net.unroll(frames, s).logits for net, s in ((again, state), (policy, out.state)))
    assert_close(got, want, rtol=0, atol=0)


def test_every_parameter_of_an_agent_learns() -> None:
    policy, generator = agent(), torch.Generator().manual_seed(0)
    output = policy.unroll(seen(), None, RESETS)
    actions = torch.randint(ACTIONS, (ROWS, STEPS), generator=generator)
    rewards = torch.randn(ROWS, STEPS, generator=generator).double()
    actor_critic_loss(output, actions, rewards, RESETS, torch.zeros(ROWS).double()).total.backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_the_papers_agent_is_the_default() -> None:
    config = PolicyConfig()
    assert (config.layers, config.width, config.heads, config.head_width) == (12, 256, 8, 64)
    assert config.residual == "gtrxl"
    assert config.norm_order == "pre"
    assert config.tiled()[0] == {"id": "transformer-xl", "memory": 512, "same_length": True}


def trajectory() -> tuple[Tensor, ...]:
    """values, bootstrap, rewards, ends and log(π/μ) of 3 rows of 7 steps."""
    generator = torch.Generator().manual_seed(5)
    values, rewards, logs = torch.randn(3, ROWS, 7, generator=generator, dtype=torch.float64)
    ends = beginnings([2, 3], [6], [], steps=7)
    return values, torch.tensor([0.3, -0.7, 1.1]).double(), rewards, ends, logs


def test_vtrace_is_its_sum_written_out() -> None:
    """v_s = V_s + Σ_t (Π_{i<t} γ_i c_i) δ_t (Espeholt et al., 2018, Eq. 1), γ_i 0 at an end."""
    values, bootstrap, rewards, ends, logs = trajectory()
    got = vtrace(values, bootstrap, rewards, ends, logs.exp(), discount=0.9, trace=0.8)
    for row in range(ROWS):
        v = [*values[row].tolist(), bootstrap[row].item()]
        rho = [min(1.0, x) for x in logs[row].exp().tolist()]
        gamma = [0.0 if end else 0.9 for end in ends[row].tolist()]
        delta = [rho[t] * (rewards[row, t].item() + gamma[t] * v[t + 1] - v[t]) for t in range(7)]
        target = [0.0] * 7 + [v[7]]
        for s in range(7):
            target[s], weight = v[s], 1.0
            for t in range(s, 7):
                target[s] += weight * delta[t]
                weight *= gamma[t] * 0.8 * rho[t]
        assert got.values[row].tolist() == pytest.approx(target[:7])
        want = [
            rho[t] * (rewards[row, t].item() + gamma[t] * target[t + 1] - v[t]) for t in range(7)
        ]
        assert got.advantages[row].tolist() == pytest.approx(want)


def test_on_policy_targets_are_discounted_returns() -> None:
    values, bootstrap, rewards, ends, _ = trajectory()
    got = vtrace(values, bootstrap, rewards, ends, torch.ones_like(values), discount=0.9)
    for row in range(ROWS):
        back = bootstrap[row].item()
        for t in reversed(range(7)):
            back = rewards[row, t].item() + (0.0 if ends[row, t] else 0.9 * back)
            assert got.values[row, t].item() == pytest.approx(back)
    assert_close(got.advantages, got.values - values)


@pytest.mark.parametrize("off_policy", [False, True])
def test_the_loss_and_its_gradients_are_the_formula(off_policy: bool) -> None:
    values, bootstrap, rewards, ends, logs = trajectory()
    generator = torch.Generator().manual_seed(6)
    logits = torch.randn(ROWS, 7, ACTIONS, generator=generator, dtype=torch.float64)
    actions = torch.randint(ACTIONS, (ROWS, 7), generator=generator)
    logits, values = logits.requires_grad_(), values.requires_grad_()
    log_pi = logits - logits.exp().sum(-1, keepdim=True).log()
    taken = log_pi.gather(-1, actions[..., None])[..., 0]
    # μ such that π/μ is the trajectory's.
    behaviour = (taken - logs).detach() if off_policy else None
    got = actor_critic_loss(
        PolicyOutput(logits=logits, values=values), actions, rewards, ends, bootstrap,
        behaviour=behaviour, discount=0.9, trace=0.8, value_weight=0.7, entropy_weight=0.2,
    )  # fmt: skip
    ratios = logs.exp() if off_policy else torch.ones_like(logs)
    to, advantage = vtrace(
        values.detach(), bootstrap, rewards, ends, ratios, discount=0.9, trace=0.8
    )
    want = (
        -(advantage * taken).mean()
        + 0.7 * 0.5 * ((to - values) ** 2).mean()
        + 0.2 * (log_pi.exp() * log_pi).sum(-1).mean()
    )
    assert_close(got.total, want)
    for a, b in zip(
        torch.autograd.grad(got.total, [logits, values]),
        torch.autograd.grad(want, [logits, values]),
        strict=True,
    ):
        assert_close(a, b)


def test_what_does_not_fit_is_refused() -> None:
    policy, x = agent(), seen()
    out = policy.unroll(x)
    with pytest.raises(LongspanError, match="rows × steps × 2 channels"):
        policy.unroll(x[..., :1])
    with pytest.raises(LongspanError, match="a row and a step at least"):
        policy.unroll(x[:, :0])
    with pytest.raises(LongspanError, match="state is of 3 rows and the observations of 2"):
        policy.unroll(x[:2], out.state)
    with pytest.raises(LongspanError, match=r"expected torch.bool of \(3, 11\)"):
        policy.unroll(x, None, RESETS[:, 1:])
    with pytest.raises(LongspanError, match="carries no state"):
        agent("kernelized-attention-rpe")
    flat = torch.zeros(ROWS, STEPS)
    with pytest.raises(LongspanError, match=r"rewards are .* one for each step"):
        actor_critic_loss(out, flat.long(), flat[:, 1:], RESETS, flat[:, 0])
