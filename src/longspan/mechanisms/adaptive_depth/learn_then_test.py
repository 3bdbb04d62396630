"""Learn then Test (Angelopoulos et al., 2021)."""

from collections.abc import Sequence

from longspan.card import Card
from longspan.inference.learn_then_test import Bound, Correction, LearnThenTest
from longspan.registry import mechanism


@mechanism(
    Card(
        id="learn-then-test",
        name="Learn then Test (LTT) calibration",
        kind="inference",
        family="adaptive-depth",
        paper="Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control",
        cite="Angelopoulos et al., 2021",
        link="https://arxiv.org/abs/2110.01052",
        what="Chooses a knob by tests on held-out samples, so that its risk stays below a level "
        "with a stated probability.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*M",
        memory="L*M",
    )
)
def learn_then_test(
    *,
    error: float = 0.05,
    bound: Bound = "hoeffding-bentkus",
    correction: Correction = "fixed-sequence",
    starts: Sequence[int] = (0,),
) -> LearnThenTest:
    """Calibrator: `(losses, knobs, levels)` → `Calibration`; L samples, M candidates."""
    return LearnThenTest(error=error, bound=bound, correction=correction, starts=starts)
