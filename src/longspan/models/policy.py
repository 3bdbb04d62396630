"""Agents that remember: a recurrent policy, and the loss that trains it by its rewards."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.distributions import Categorical
from transformers.utils.generic import ModelOutput

from longspan import hub
from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig, Spec
from longspan.models.packing import Packing, packing
from longspan.models.stack import LongspanModel, initialise
from longspan.nn import reset, select


class PolicyConfig(LongspanConfig):
    """A LongspanConfig of an agent, by default GTrXL's of Parisotto et al. (2019).

    A query sees the last 512 steps (`same_length`), so that an agent acts as it was trained to,
    whatever the length of its unrolls.

    Args:
        channels: numbers an observation. actions: how many there are to choose from.
    """

    model_type = "longspan-policy"
    __no_type_check__ = True

    channels: int = 1
    actions: int = 2
    width: int = 256
    layers: int = 12
    heads: int = 8
    head_width: int | None = 64
    mixers: Sequence[Spec] = ({"id": "transformer-xl", "memory": 512, "same_length": True},)
    position: Spec | None = None
    residual: Spec | None = "gtrxl"
    activation: Literal["relu", "gelu", "silu"] = "relu"
    tie_word_embeddings: bool = False


@dataclass
class PolicyOutput(ModelOutput):
    """Scores of actions (… A), the values of observations (…), and what the agent remembers."""

    logits: Tensor | None = None
    values: Tensor | None = None
    state: hub.Carried | None = None


class PolicyModel(hub.Pretrained):
    """π(a_t | o_≤t) and V(o_≤t) of the observations since the episode's start (Sec. 3 and 4).

    An encoder, a causal stack and a linear head for each. Whole unrolls and single steps give the
    same, wherever in them episodes begin: each episode runs on a row of its own, so that nothing of
    an earlier one is seen, and any mixer that carries a state will do. An unroll costs as much as a
    batch of its episodes' parts, each as long as the longest.

    Args:
        encoder: any module (N, …) → (N, width) in place of a linear map; it is saved with the
            model, and given again to `from_pretrained`.

    Raises:
        LongspanError: a mechanism that is not causal or carries no state.

    >>> out = model.step(observation, state, resets)  # to act; B …, and on with out.state
    >>> out = model(observations, state, resets)  # to learn; B T …
    """

    config: PolicyConfig
    config_class = PolicyConfig

    def __init__(self, config: PolicyConfig, encoder: nn.Module | None = None) -> None:
        config = config.alone(causal=True)  # pyright: ignore[reportAssignmentType]
        super().__init__(config)
        self.model = LongspanModel(config)
        if not self.model.steps:
            raise LongspanError(
                f"an agent acts step by step, and a mechanism among {config.mixers} carries no "
                'state: longspan.find(mode="step") lists those that do.'
            )
        self.linear = encoder is None
        self.model.embed_tokens = hub.settled(  # pyright: ignore[reportAttributeAccessIssue]
            nn.Linear(config.channels, config.width) if encoder is None else encoder
        )
        self.policy_head = nn.Linear(config.width, config.actions)
        self.value_head = nn.Linear(config.width, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)

    @property
    def steps(self) -> bool:
        return True

    def forward(
        self,
        observations: Shaped[Tensor, "B T *observation"],
        state: hub.Carried | None = None,
        resets: Shaped[Tensor, "..."] | None = None,
    ) -> PolicyOutput:
        """Logits B T A, values B T, and the state after the last step.

        Args:
            state: what an earlier call returned; None where all episodes begin.
            resets: True at the first observation of an episode, which is the step after the one
                that the environment said was done.

        Raises:
            LongspanError: observations, resets or a state that do not fit each other.
        """
        self._check(observations, state, resets)
        shape = observations.shape[:2]
        if resets is None:
            resets = torch.zeros(shape, dtype=torch.bool, device=observations.device)
        plan = _episodes(resets)
        x = self.model.embed_tokens(observations.flatten(0, 1)).unflatten(0, shape)
        output = self.model(
            inputs_embeds=plan.unpack(x),
            attention_mask=plan.keep,
            past_key_values=_continued(state, plan, resets),
            use_cache=True,
            return_dict=True,
        )
        x = plan.repack(output.last_hidden_state)
        return PolicyOutput(
            logits=self.policy_head(x),
            values=self.value_head(x)[..., 0],
            state=select(output.past_key_values.carried(), plan.row[:, -1]),
        )

    def unroll(
        self,
        observations: Shaped[Tensor, "B T *observation"],
        state: hub.Carried | None = None,
        resets: Shaped[Tensor, "..."] | None = None,
    ) -> PolicyOutput:
        """The model itself, under the learner's name for it."""
        return self(observations, state, resets)

    def step(
        self,
        observation: Shaped[Tensor, "B *observation"],
        state: hub.Carried | None = None,
        resets: Shaped[Tensor, "..."] | None = None,
    ) -> PolicyOutput:
        """An unroll of one step: logits B A and values B."""
        out = self(observation[:, None], state, None if resets is None else resets[:, None])
        return PolicyOutput(logits=out.logits[:, 0], values=out.values[:, 0], state=out.state)

    def _check(
        self, observations: Tensor, state: hub.Carried | None, resets: Tensor | None
    ) -> None:
        batch, length = observations.shape[:2]
        if not batch * length:
            raise LongspanError(
                f"observations are {tuple(observations.shape)}; expected a row and a step at least."
            )
        if self.linear and observations.shape[2:] != (self.config.channels,):
            raise LongspanError(
                f"observations are {tuple(observations.shape)}; expected rows × steps × "
                f"{self.config.channels} channels: set config.channels, or give an encoder."
            )
        if resets is not None and (resets.shape != (batch, length) or resets.dtype != torch.bool):
            raise LongspanError(
                f"resets are {resets.dtype} of {tuple(resets.shape)}; expected torch.bool of "
                f"{(batch, length)}, True where an episode begins."
            )
        if state is not None and len(state.seen) != batch:
            raise LongspanError(
                f"the state is of {len(state.seen)} rows and the observations of {batch}: carry a "
                "state with the environments that it came from."
            )


def _episodes(resets: Bool[Tensor, "B T"]) -> Packing:
    """Each episode on a row of its own, as long as the longest.

    Those that go on after the unroll end with their row, the others begin with it: so there is no
    gap between a state and what follows, which a relative position would count.
    """
    plan = packing(resets.cumsum(1), None)
    last = plan.row[:, -1]
    shift = torch.zeros_like(plan.keep[:, 0], dtype=torch.long)
    shift[last] = (~plan.keep[last]).sum(1)
    at = plan.at + shift[plan.row]
    keep = torch.zeros_like(plan.keep)
    keep[plan.row, at] = True
    return Packing(plan.row, at, keep)


def _continued(
    state: hub.Carried | None, plan: Packing, resets: Bool[Tensor, "B T"]
) -> hub.StateCache | None:
    """For each episode the state that it goes on from, or one that has seen nothing."""
    if state is None:
        return None
    rows = len(plan.keep)
    owner = plan.row.new_empty(rows)
    owner[plan.row] = torch.arange(len(resets), device=owner.device)[:, None].expand_as(plan.row)
    begins = torch.ones(rows, dtype=torch.bool, device=resets.device)
    begins[plan.row[:, 0]] = resets[:, 0]
    return hub.StateCache.of(reset(select(state, owner), begins))


class Targets(NamedTuple):
    """What values are drawn to, and the advantages by which actions are weighed."""

    values: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]


@torch.no_grad()
def vtrace(
    values: Float[Tensor, "B T"],
    bootstrap: Float[Tensor, "B"],
    rewards: Float[Tensor, "B T"],
    ends: Bool[Tensor, "B T"],
    ratios: Float[Tensor, "B T"],
    *,
    discount: float = 0.99,
    trace: float = 1.0,
) -> Targets:
    """V-trace (Espeholt et al., 2018, Sec. 4), with ρ = min(1, π/μ) and c = λ ρ.

        δ_t = ρ_t (r_t + γ_t V_{t+1} − V_t)
        v_t = V_t + δ_t + γ_t c_t (v_{t+1} − V_{t+1})                            (Rem. 1 and 2)
        A_t = ρ_t (r_t + γ_t v_{t+1} − V_t)

    γ_t is 0 where the episode ends. Where π = μ and λ = 1, v_t are the n-step returns of A2C.

    Args:
        bootstrap: V of the observation after the last.
        rewards, ends: what the action of each step brought.
        ratios: π/μ of the actions taken. trace: λ.
    """
    rho, gamma = ratios.clamp(max=1), discount * (~ends).to(values.dtype)
    following = torch.cat([values[:, 1:], bootstrap[:, None]], 1)
    delta = rho * (rewards + gamma * following - values)
    above, gain = [], torch.zeros_like(bootstrap)  # v_t − V_t, from the last step back
    for t in reversed(range(values.shape[1])):
        gain = delta[:, t] + gamma[:, t] * trace * rho[:, t] * gain
        above.append(gain)
    target = values + torch.stack(above[::-1], 1)
    after = torch.cat([target[:, 1:], bootstrap[:, None]], 1)
    return Targets(target, rho * (rewards + gamma * after - values))


class ActorCriticLoss(NamedTuple):
    """The sum to minimise and, without their weights, its parts; entropy in nats."""

    total: Float[Tensor, ""]
    policy: Float[Tensor, ""]
    value: Float[Tensor, ""]
    entropy: Float[Tensor, ""]


def actor_critic_loss(
    output: PolicyOutput,
    actions: Int[Tensor, "..."],
    rewards: Float[Tensor, "..."],
    ends: Bool[Tensor, "..."],
    bootstrap: Float[Tensor, "B"],
    *,
    behaviour: Float[Tensor, "..."] | None = None,
    discount: float = 0.99,
    trace: float = 1.0,
    value_weight: float = 0.5,
    entropy_weight: float = 0.01,
) -> ActorCriticLoss:
    """−A log π(a) + w_V (v − V)² / 2 − w_H H(π), means over steps, A and v by `vtrace`.

    Args:
        output: of an unroll over the observations that the actions answered.
        behaviour: log-probabilities of the actions when they were drawn; by default the policy's
            own, which makes it advantage actor-critic.

    Raises:
        LongspanError: actions, rewards or ends of other steps than the unroll's.
    """
    logits, values = output.logits, output.values
    assert logits is not None
    assert values is not None
    for name, given in (("actions", actions), ("rewards", rewards), ("ends", ends)):
        if given.shape != values.shape:
            raise LongspanError(
                f"{name} are {tuple(given.shape)} for an unroll of {tuple(values.shape)}; expected "
                "one for each step."
            )
    chosen = Categorical(logits=logits)
    taken = chosen.log_prob(actions)
    ratios = (taken.detach() - (taken.detach() if behaviour is None else behaviour)).exp()
    target = vtrace(
        values.detach(), bootstrap, rewards, ends, ratios, discount=discount, trace=trace
    )
    policy = -(target.advantages * taken).mean()
    value = (target.values - values).square().mean() / 2
    entropy = chosen.entropy().mean()
    total = policy + value_weight * value - entropy_weight * entropy
    return ActorCriticLoss(total, policy, value, entropy)


hub.register(PolicyConfig, {"AutoModel": PolicyModel})
