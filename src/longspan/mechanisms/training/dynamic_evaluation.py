"""Dynamic evaluation (Graves, 2013; Krause et al., 2018, 2019)."""

from longspan.card import Card
from longspan.inference.dynamic_evaluation import DynamicEvaluation, Rule
from longspan.registry import mechanism


@mechanism(
    Card(
        id="dynamic-evaluation",
        name="Dynamic evaluation",
        kind="inference",
        family="training",
        paper="Dynamic Evaluation of Neural Sequence Models",
        cite="Graves 2013; Krause et al., ICML 2018; Krause et al., 2019",
        link="https://arxiv.org/abs/1709.07432",
        what="Takes a gradient step on each segment of a text once it is scored, so that the "
        "weights follow the text.",
        modes={"causal", "step"},
        time="L*E*E",
        memory="E*E",
        exact={"rate": 0.0, "decay": 0.0},
    )
)
def dynamic_evaluation(
    *,
    rule: Rule = "rms-decay",
    rate: float = 1e-4,
    decay: float = 0.0,
    segment: int = 64,
    context: int | None = None,
    epsilon: float = 1e-3,
    clip: float | None = None,
) -> DynamicEvaluation:
    """Evaluator: `(model, tokens, statistics)` → nats and tokens; E is the width of the model."""
    return DynamicEvaluation(
        rule=rule,
        rate=rate,
        decay=decay,
        segment=segment,
        context=context,
        epsilon=epsilon,
        clip=clip,
    )
