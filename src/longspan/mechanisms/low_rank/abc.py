"""ABC, attention with bounded-memory control (Peng et al., 2022)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, lowrank, scan
from longspan.errors import LongspanError
from longspan.nn import Attention, MultiHead, controls
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values


class Memory(NamedTuple):
    """The slots of a whole sequence, and which of them hold something."""

    k: Float[Tensor, "B H M D"]
    v: Float[Tensor, "B H M V"]
    keep: Bool[Tensor, "B H M"]


class ABCState(NamedTuple):
    """The slots of each control so far, for keys and for values, and the tokens seen."""

    k: tuple[lowrank.Slots | Tensor, ...]
    v: tuple[lowrank.Slots | Tensor, ...]
    seen: Int[Tensor, "B"]


@mechanism(
    Card(
        id="abc",
        name="ABC (Attention with Bounded-memory Control)",
        kind="attention",
        family="low-rank",
        paper="ABC: Attention with Bounded-memory Control",
        cite="Peng et al., 2022",
        link="https://arxiv.org/abs/2110.02488",
        what="Writes every token into a few slots, where a control says, and attends to the slots.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*M*D + S*M*D",
        memory="M*D + M*V",
        tiny={"heads": 3, "head_width": 8, "slots": 4},
        exact={"control": "prefix", "slots": 64},
    )
)
class ABC(Attention):
    """o_t = softmax(q_t K̃_tᵀ / √D) Ṽ_t, K̃_t = Σ_{s≤t} φ_s k_sᵀ, Ṽ_t = Σ_{s≤t} φ_s v_sᵀ (Eq. 5).

    The control `mlp` has φ_s = exp(W c_s) / Σ_{s≤t} exp(W c_s), slot by slot, with the sum over all
    tokens where not causal (Eqs. 11 and 12). c is a projection of the layer's input that starts
    as that of v, and v itself where none is given: for M ≤ D, W c is any W_φ x. Slots that nothing
    was written to are not seen. The state is K̃ and Ṽ, with denominators and largest exponents.

    Args:
        control: one of `mlp`, `linformer` (a learned column a position), `random`, `cluster`,
            `window` (first in, first out), `compressive` (a window of half the slots, and means of
            `rate` tokens), `prefix` (the first tokens), or a `Control`; several are one memory,
            and a window passes over the tokens of a prefix.
        slots: M, one number or one a control.
        heads, head_width: needed by `mlp` and `cluster`.
        length: of `linformer`, the most tokens there may be; of `random`, the places drawn.

    Raises:
        LongspanError: an unknown control; one without what it needs; a recurrent one where not
            causal.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        control: str | controls.Control | Sequence[str | controls.Control] = "mlp",
        slots: int | Sequence[int] = 32,
        heads: int | None = None,
        head_width: int | None = None,
        length: int = 2048,
        dilation: int = 1,
        rate: int = 4,
        seed: int = 0,
    ) -> None:
        super().__init__(causal=causal)
        given = [control] if isinstance(control, str | controls.Control) else list(control)
        counts = [slots] * len(given) if isinstance(slots, int) else list(slots)
        if not given or len(counts) != len(given):
            raise LongspanError(
                f"abc got {len(given)} controls and {len(counts)} numbers of slots: give a control "
                "at least, and one number for all or one each."
            )
        options: Any = {"causal": causal, "heads": heads, "width": head_width, "length": length}
        options |= {"dilation": dilation, "rate": rate, "seed": seed}
        start, built = 0, []
        for part, count in zip(given, counts, strict=True):
            if isinstance(part, str):
                part = controls.named(part, count, start=start, **options)
            if part.recurrent and not causal:
                raise LongspanError(
                    f"abc's {type(part).__name__} memory changes from query to query: build it "
                    "causal=True, or take another control."
                )
            start += count if isinstance(part, controls.First) else 0
            built.append(part)
        self.controls: Any = nn.ModuleList(built)
        if any(isinstance(part, controls.Learned) for part in built):
            self.extra = {"c": "v"}

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: ABCState | None = None,
        *,
        keep: Keep | None = None,
        c: Float[Tensor, "B H S _"] | None = None,
    ) -> tuple[Outputs, ABCState | None]:
        if not self.causal:
            return self.recall(q, self.remember(k, v, keep=keep, c=c)), None
        wide = torch.promote_types(q.dtype, torch.float32)
        kept = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
        seen = kept.new_zeros(len(kept), dtype=torch.long) if state is None else state.seen
        place = (seen[:, None] + kept.cumsum(1) - 1).clamp(min=0)
        k, v, writes = self._writes(k, v, c, place, keep)
        scaled, dtype, at = q.to(wide) * q.shape[3] ** -0.5, q.dtype, place[:, -q.shape[2] :]
        found, of_keys = [], []
        for i, (control, write) in enumerate(zip(self.controls, writes, strict=True)):
            old: Any = None if state is None else state.k[i]
            if control.averages:
                scores, new = lowrank.scores(scaled, write, k, old)
            else:
                scores, new = scan.outer(scaled, k, write, old)
            seen_at = control.visible(at)
            found.append(scores if seen_at is None else scores.masked_fill(~seen_at, -torch.inf))
            of_keys.append(new)
        weights = torch.ops.aten._safe_softmax(torch.cat(found, -1), -1)
        parts = weights.split([control.slots for control in self.controls], -1)
        outs, of_values = [], []
        for i, (control, write) in enumerate(zip(self.controls, writes, strict=True)):
            old = None if state is None else state.v[i]
            sum_up = lowrank.read if control.averages else scan.outer
            o, new = sum_up(parts[i], write, v, old)
            outs.append(o)
            of_values.append(new)
        new = ABCState(tuple(of_keys), tuple(of_values), seen + kept.sum(1))
        return torch.stack(outs).sum(0).to(dtype), new

    def remember(
        self,
        k: Keys,
        v: Values,
        *,
        keep: Keep | None = None,
        c: Float[Tensor, "B H S _"] | None = None,
    ) -> Memory:
        """K̃ and Ṽ of a whole sequence, as of an encoder: made once for any number of queries."""
        kept = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
        k, v, writes = self._writes(k, v, c, (kept.cumsum(1) - 1).clamp(min=0), keep)
        slots = []
        for control, write in zip(self.controls, writes, strict=True):
            full = torch.ones_like(write[:, :, 0], dtype=torch.bool)
            if control.averages:
                full = (write > -torch.inf).any(2)
                write = torch.ops.aten._safe_softmax(write, 2)
            slots.append((lowrank.pooled(write, k), lowrank.pooled(write, v), full))
        return Memory(*(torch.cat(parts, 2) for parts in zip(*slots, strict=True)))

    def recall(self, q: Queries, memory: Memory) -> Outputs:
        """softmax(q K̃ᵀ / √D) Ṽ."""
        return dense.explicit(q, memory.k, memory.v, seen=memory.keep[:, :, None])[0]

    def _writes(
        self, k: Tensor, v: Tensor, c: Tensor | None, place: Tensor, keep: Keep | None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """k and v, zeros where masked, and the writes of every control, which are then none."""
        c = v if c is None else c
        if keep is not None:
            k, v, c = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v, c))
        wide, writes = torch.promote_types(k.dtype, torch.float32), []
        for control in self.controls:
            write = control(k, c, place, keep=keep).to(wide)
            if keep is not None:
                nothing = -torch.inf if control.averages else 0.0
                write = write.masked_fill(~keep[:, None, :, None], nothing)
            writes.append(write.expand(*k.shape[:3], -1))
        return k.to(wide), v.to(wide), writes


def share(model: nn.Module) -> nn.Module:
    """Make all layers with learned controls use the first one's W_φ; returns the model.

    Raises:
        LongspanError: no such layer, or layers of other sizes.
    """
    layers = [
        (m.attention, m)
        for m in model.modules()
        if isinstance(m, MultiHead) and isinstance(m.attention, ABC) and m.attention.extra
    ]
    if not layers:
        raise LongspanError("the model has no abc layer with the control mlp: build it with some.")
    first, around = layers[0]
    for layer, holder in layers:
        sizes = [[tuple(p.shape) for p in a.controls.parameters()] for a in (first, layer)]
        if sizes[0] != sizes[1]:
            raise LongspanError(f"layers cannot share controls of sizes {sizes}: build all alike.")
        layer.controls, holder.project["c"] = first.controls, around.project["c"]
    return model
