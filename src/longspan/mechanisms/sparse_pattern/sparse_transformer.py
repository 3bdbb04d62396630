"""Sparse Transformer's factorised attention (Child et al., 2019)."""

from typing import Literal

from longspan.card import Card
from longspan.engines.pattern import ALL, Pattern, Stripes, Window
from longspan.engines.pattern import causal as earlier
from longspan.errors import LongspanError
from longspan.nn.patterned import PatternAttention, factorised
from longspan.registry import mechanism


@mechanism(
    Card(
        id="sparse-transformer",
        name="Sparse Transformer",
        kind="attention",
        family="sparse-pattern",
        paper="Generating Long Sequences with Sparse Transformers",
        cite="Child et al., 2019",
        link="https://arxiv.org/abs/1904.10509",
        what="Splits attention into two sparse patterns, near tokens and regularly spaced ones, "
        "so that two steps reach any earlier token.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*D + L*S*V",
        memory="S*D + S*V",
        tiny={"stride": 6, "summary": 2},
        exact={"stride": 1000000},
    )
)
class SparseTransformer(PatternAttention):
    """softmax(q_i K_Sᵀ / √D) V_S with S one of, or the union of, two sets (Sec. 4.2, Eq. 2).

        strided: A1 = {i − l + 1 … i},              A2 = {j ≤ i : (i − j) mod l = 0}
        fixed:   A1 = {j ≤ i : ⌊j/l⌋ = ⌊i/l⌋},      A2 = {j ≤ i : j mod l ∈ {l − c … l − 1}}

    With l ≈ √L both cost O(L √L). The bidirectional form has the same sets on both sides.

    Args:
        form: `strided` for data with a period, `fixed` for text.
        stride: l. summary: c, columns of A2 in the fixed form.
        stripes: head h takes the c columns that end r·c before the stride's end, r = h mod
            `stripes` (the released code's vertical stripes).
        use: `merged` attends to A1 ∪ A2, each key once (Eq. 7); `heads` gives head h the set
            h mod 2 (Eq. 8); `interleaved` gives `layer` n the set n mod 2 (Eq. 6).
        inclusive: A1 of the strided form has l + 1 tokens, as printed; the released kernels have l.

    Raises:
        LongspanError: a stride below 1; summaries that do not fit into one.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        form: Literal["strided", "fixed"] = "strided",
        stride: int = 128,
        summary: int = 8,
        stripes: int = 1,
        use: Literal["merged", "heads", "interleaved"] = "merged",
        layer: int = 0,
        inclusive: bool = False,
    ) -> None:
        if form not in ("strided", "fixed") or use not in ("merged", "heads", "interleaved"):
            raise LongspanError(
                f"sparse-transformer got form={form!r}, use={use!r}: expected 'strided' or "
                "'fixed', and 'merged', 'heads' or 'interleaved'."
            )
        if stride < 1 or (form == "fixed" and not 0 < summary * stripes <= stride):
            raise LongspanError(
                f"sparse-transformer got {stripes} stripes of {summary} columns in a stride of "
                f"{stride}: all must be positive and fit."
            )
        reach = stride - 1 + inclusive
        if form == "strided":
            near: list[Pattern] = [Window(reach, 0 if causal else reach)]
            far: list[Pattern] = [Window(ALL, 0 if causal else ALL, stride)]
            # The own token, and those a whole stride away, are counted with the far ones.
            both = far
            if stride > 1:
                side = Window(stride - 1, -1)
                both = [(side if causal else side + Window(-1, stride - 1)) + far[0]]
        else:
            cell = Window(0).blocks(stride)
            starts = [stride - summary * (r + 1) for r in range(stripes)]
            columns: list[Pattern] = [Stripes(stride, start, start + summary) for start in starts]
            outside = Window(ALL, -1) if causal else Window(ALL, -1) | Window(-1, ALL)
            near = [cell & earlier if causal else cell]
            others = [c & outside.blocks(stride) for c in columns]
            both = [near[0] + other for other in others]
            own = [c & cell & earlier for c in columns]
            far = [a + b for a, b in zip(own, others, strict=True)] if causal else columns
        self.form, self.stride, self.summary, self.stripes = form, stride, summary, stripes
        self.use, self.layer, self.window = use, layer, reach
        sees = factorised(near, far, both, use=use, layer=layer, heads=2 * stripes)
        block = min(stride, 128), summary if form == "fixed" else 64
        super().__init__(sees, causal=causal, block=block)
