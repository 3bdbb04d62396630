"""CALM, Confident Adaptive Language Modeling (Schuster et al., 2022)."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.inference.exits import Asked, EarlyExit, Exit, Graded
from longspan.registry import mechanism


class Confident(Exit):
    """Leaves after the first n with c_t^n ≥ λ_t; λ = 1 is full depth.

    λ_t = clip(0.9 λ + 0.1 exp(−τ t / T), 0, 1), T the horizon and τ the decay: errors of early
    tokens reach all later ones. (The port in fast_robust_early_exit has λ before the exponential
    too; this is the paper's Eq. 5.)
    """

    def __init__(self, *, blocks: int, threshold: float, decay: float | None, horizon: int) -> None:
        super().__init__(blocks=blocks, threshold=threshold)
        self.decay, self.horizon = decay, horizon

    def forward(self, asked: Asked) -> Bool[Tensor, "R"]:
        base = self.thresholds[asked.n - 1]
        bar = base.expand(asked.place.shape)
        if self.decay is not None:
            fade = torch.exp(-self.decay * asked.place / self.horizon)
            bar = (0.9 * base + 0.1 * fade).clamp(0, 1)
        return (self.confidence(asked) >= bar) & (base < 1)

    def confidence(self, asked: Asked) -> Float[Tensor, "R"]:
        raise NotImplementedError


class SoftmaxResponse(Confident):
    """c = p(1st) − p(2nd) of softmax(W d_t^n): an output projection a block."""

    def confidence(self, asked: Asked) -> Float[Tensor, "R"]:
        first, second = asked.logits().float().softmax(-1).topk(2).values.unbind(-1)
        return first - second


class Saturation(Confident):
    """c = cos(d_t^n, d_t^{n−1}), of the embedding before the first block."""

    def confidence(self, asked: Asked) -> Float[Tensor, "R"]:
        return F.cosine_similarity(asked.state(asked.n), asked.state(asked.n - 1), dim=-1)


class Learned(Confident):
    """c = sigmoid(w·d_t^n + b), one linear shared by all blocks, trained with the model frozen.

    The loss is the mean over n < N of the cross-entropy to 1[the block's choice is the last's].
    """

    def __init__(
        self, *, blocks: int, threshold: float, decay: float | None, horizon: int, width: int
    ) -> None:
        super().__init__(blocks=blocks, threshold=threshold, decay=decay, horizon=horizon)
        self.score = nn.Linear(width, 1)

    def confidence(self, asked: Asked) -> Float[Tensor, "R"]:
        return self._logit(asked.read(asked.state(asked.n))).sigmoid()

    def loss(self, graded: Graded) -> Float[Tensor, ""]:
        states = [
            graded.read(state).detach() for state in graded.states[1:-1]
        ]  # the model is frozen
        score = self._logit(torch.stack(states))
        agrees = graded.agrees[:-1].to(score.dtype)
        return F.binary_cross_entropy_with_logits(
            score[:, graded.counted], agrees[:, graded.counted]
        )

    def _logit(self, x: Float[Tensor, "*rest E"]) -> Float[Tensor, "*rest"]:
        return self.score(x)[..., 0].float()


@mechanism(
    Card(
        id="calm",
        name="CALM (Confident Adaptive Language Modeling)",
        kind="inference",
        family="adaptive-depth",
        paper="Confident Adaptive Language Modeling",
        cite="Schuster et al., NeurIPS 2022",
        link="https://arxiv.org/abs/2207.07061",
        what="A token leaves the decoder after the first block that is sure of it, sure enough to "
        "keep a calibrated bound on the quality of the whole text.",
        modes={"causal", "cross", "step"},
        time="L*S*D + L*S*V",
        memory="S*D + S*V",
    )
)
def calm(
    *,
    width: int,
    layers: int,
    measure: str = "softmax",
    threshold: float = 1.0,
    decay: float | None = 4.0,
    horizon: int = 512,
    minimum: int = 1,
) -> EarlyExit:
    """Driver of `layers` blocks by confidence; `longspan.inference.calm.calibrate` finds λ.

    Args:
        measure: `softmax` (the paper's best), `saturation` of states, or a learned `classifier`.
        threshold: λ; 1 is full depth. decay: τ; None holds λ constant.
        horizon: T, the most tokens that will be generated.
        minimum: no token leaves before this block.

    Raises:
        LongspanError: an unknown measure.
    """
    if measure == "classifier":
        rule = Learned(
            blocks=layers, threshold=threshold, decay=decay, horizon=horizon, width=width
        )
        return EarlyExit(rule, minimum=minimum)
    kinds = {"softmax": SoftmaxResponse, "saturation": Saturation}
    if measure not in kinds:
        raise LongspanError(f"no measure '{measure}'; expected softmax, saturation or classifier.")
    rule = kinds[measure](blocks=layers, threshold=threshold, decay=decay, horizon=horizon)
    return EarlyExit(rule, minimum=minimum)
