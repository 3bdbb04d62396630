"""Depth-Adaptive Transformer (Elbayad et al., 2019)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.inference.exits import Asked, EarlyExit, Exit, Graded
from longspan.inference.oracles import best_exit, log_geometric, smoothed
from longspan.registry import mechanism


class _Taught(Exit):
    """A rule trained by cross-entropy to the exit of an oracle, in nats a token (or sequence)."""

    def __init__(
        self, *, blocks: int, width: int, outputs: int, oracle: str, penalty: float,
        sigma: float, threshold: float | Sequence[float],
    ) -> None:  # fmt: skip
        super().__init__(blocks=blocks, threshold=threshold)
        self.oracle, self.penalty, self.sigma = oracle, penalty, sigma
        self.score = nn.Linear(width, outputs)

    def scores(self, graded: Graded) -> Float[Tensor, "N B L"]:
        """LL^n_t, or C^n_t; 0 where nothing is to be predicted."""
        likelihood = self.oracle == "likelihood"
        scores = -graded.nats if likelihood else graded.correct.to(graded.nats.dtype)
        return scores.detach().masked_fill(~graded.counted, 0)

    def targets(self, graded: Graded) -> Int[Tensor, "B L"]:
        """The oracle's exit of each token, 1 … N."""
        return best_exit(smoothed(self.scores(graded), self.sigma), self.penalty)


class SequenceExit(_Taught):
    """One exit for a sequence: argmax_n of softmax(W x̄ + b), x̄ the mean of the encoder's output."""

    def forward(self, asked: Asked) -> Bool[Tensor, "R"]:
        return self._log_q(asked.encoded).argmax(-1) + 1 <= asked.n

    def targets(self, graded: Graded) -> Int[Tensor, "B"]:
        return best_exit(self.scores(graded).sum(2), self.penalty)

    def loss(self, graded: Graded) -> Float[Tensor, ""]:
        return F.nll_loss(self._log_q(graded.encoded), self.targets(graded) - 1)

    def _log_q(self, encoded: Tensor | None) -> Tensor:
        if encoded is None:
            raise LongspanError(
                "a sequence's exit is read off its encoder, and this model has none: use the "
                "classifier 'multinomial' or 'geometric'."
            )
        return self.score(encoded).log_softmax(-1)


class MultinomialExit(_Taught):
    """argmax_n of q_t = softmax(W h_t^1 + b), known after the first block."""

    def forward(self, asked: Asked) -> Bool[Tensor, "R"]:
        return self.score(asked.read(asked.state(1))).argmax(-1) + 1 <= asked.n

    def loss(self, graded: Graded) -> Float[Tensor, ""]:
        log_q = self.score(graded.read(graded.states[1])).log_softmax(-1)
        return F.nll_loss(log_q[graded.counted], self.targets(graded)[graded.counted] - 1)


class GeometricExit(_Taught):
    """Leaves after the first n with X_t^n = sigmoid(w_n·h_t^n + b_n) above its threshold."""

    def forward(self, asked: Asked) -> Bool[Tensor, "R"]:
        weight, bias = self.score.weight[asked.n - 1], self.score.bias[asked.n - 1]
        x = (asked.read(asked.state(asked.n)) @ weight + bias).sigmoid()
        return x > self.thresholds[asked.n - 1]

    def loss(self, graded: Graded) -> Float[Tensor, ""]:
        h = torch.stack([graded.read(state) for state in graded.states[1:-1]])
        x = einsum(h, self.score.weight, "N B L E, N E -> B L N") + self.score.bias
        log_q = log_geometric(x)
        return F.nll_loss(log_q[graded.counted], self.targets(graded)[graded.counted] - 1)


class ConfidenceExit(Exit):
    """Leaves after the first n with max_y p(y | h_t^n) above τ_n; nothing is learned."""

    def forward(self, asked: Asked) -> Bool[Tensor, "R"]:
        most = asked.logits().float().softmax(-1).amax(-1)
        return most > self.thresholds[asked.n - 1]


@mechanism(
    Card(
        id="depth-adaptive-transformer",
        name="Depth-Adaptive Transformer",
        kind="depth",
        family="adaptive-depth",
        paper="Depth-Adaptive Transformer",
        cite="Elbayad et al., ICLR 2020",
        link="https://arxiv.org/abs/1910.10073",
        what="A token leaves the decoder after the block that a small classifier names, and its "
        "state is copied to the blocks above.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*S*D + L*S*V",
        memory="S*D + S*V",
        tiny={"width": 24, "layers": 4},
        exact={"width": 24, "layers": 4, "minimum": 4},
    )
)
def depth_adaptive_transformer(
    *,
    width: int,
    layers: int,
    classifier: str = "geometric",
    oracle: str = "likelihood",
    penalty: float = 0.0,
    sigma: float = 0.0,
    threshold: float | Sequence[float] = 0.5,
    minimum: int = 1,
) -> EarlyExit:
    """Driver of `layers` blocks by one of the paper's classifiers (Sec. 4).

    Args:
        classifier: `sequence` (reads an encoder), `multinomial`, `geometric`, or `confidence`,
            which thresholds the output's own probabilities.
        oracle: the exit to imitate has the best likelihood, or the most right tokens.
        penalty: λ, of each block in the oracle. sigma: σ of its smoothing over tokens; 0 for none.
        threshold: of `geometric` and `confidence`, one or one for each block but the last.

    Raises:
        LongspanError: an unknown classifier or oracle, a σ below 0.
    """
    if oracle not in ("likelihood", "correctness") or sigma < 0:
        raise LongspanError(
            f"no oracle '{oracle}' smoothed by sigma={sigma}; expected likelihood or correctness, "
            "and a number from 0."
        )
    if classifier == "confidence":
        return EarlyExit(ConfidenceExit(blocks=layers, threshold=threshold), minimum=minimum)
    kinds = {
        "sequence": (SequenceExit, layers),
        "multinomial": (MultinomialExit, layers),
        "geometric": (GeometricExit, layers - 1),
    }
    if classifier not in kinds:
        raise LongspanError(
            f"no classifier '{classifier}'; expected {', '.join(kinds)} or confidence."
        )
    kind, outputs = kinds[classifier]
    rule = kind(
        blocks=layers,
        width=width,
        outputs=outputs,
        oracle=oracle,
        penalty=penalty,
        sigma=sigma,
        threshold=threshold,
    )
    return EarlyExit(rule, minimum=minimum)
