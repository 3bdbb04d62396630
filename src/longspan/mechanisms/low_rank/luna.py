"""Luna, linear unified nested attention (Ma et al., 2021)."""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, scan
from longspan.errors import LongspanError
from longspan.nn import Mixer
from longspan.nn.positions import sinusoid
from longspan.registry import mechanism
from longspan.shapes import Context, Inputs, Keep, Marks

Slots = Float[Tensor, "B M E"]


class LunaState(NamedTuple):
    """Σ k_j A_jᵀ and Σ A_j v_jᵀ over the kept tokens, and their number."""

    k: Float[Tensor, "B H D M"]
    v: Float[Tensor, "B H M D"]
    seen: Int[Tensor, "B"]


class StartingSlots(nn.Module):
    """P of the first layer: learned, N(0, 1/E), plus fixed sinusoids."""

    waves: Tensor

    def __init__(self, slots: int, width: int) -> None:
        super().__init__()
        self.learned = nn.Parameter(torch.randn(slots, width) * width**-0.5)
        place = torch.arange(slots)
        waves = sinusoid(place, width, layout="concatenated", spacing="inclusive")
        self.register_buffer("waves", waves, persistent=False)

    def forward(self, batch: int) -> Slots:
        return (self.learned + self.waves).expand(batch, -1, -1)


@mechanism(
    Card(
        id="luna",
        name="Luna (Linear Unified Nested Attention)",
        kind="mixer",
        family="low-rank",
        paper="Luna: Linear Unified Nested Attention",
        cite="Ma et al., 2021",
        link="https://arxiv.org/abs/2106.01540",
        what="A short second sequence attends to the tokens, and the tokens attend to it.",
        modes={"bidirectional", "causal", "cross", "step"},
        time="L*M*E + L*E*E",
        memory="M*E",
        tiny={"width": 24, "heads": 3, "slots": 5},
    )
)
class Luna(Mixer):
    """Y_P = Attn(P, C), Y_X = Attn(X, Y_P) W_o, C = X or a context (Eqs. 5 and 6).

    Causally, with f(X, Y, Z)_t = (1/t) X_t Σ_{j≤t} Y_jᵀ Z_j (Eq. 7) and e the head's width,

        A_pack = ω(C W_pc (P W_pq)ᵀ / √e),   A_unpack = softmax(f(X W_q / √e, C W_c, A_pack)),
        Y_X = f(A_unpack, A_pack, C W_v) W_o                                       (Eqs. 8 to 10)

    and P is only read. As a mixer, each layer starts from a P of its own; `streams` takes and gives
    P too, for models that pass it on (`longspan.models.luna`). The state is two sums and t.

    Args:
        slots: l; None where P is always given.
        pack_heads: heads of Y_P, by default those of Y_X; causally they are the same.
        tied: one matrix for keys and values in each of the two attentions.
        omega: `log2`, log₂(1 + 2ˣ) as in the released code, or `elu`, elu(x) + 1.
        shorten: where all rows are shorter than l, use the first slots only.

    Raises:
        LongspanError: heads that do not divide the width or differ causally; an unknown omega; no
            P; marks; a context where causal.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 8,
        causal: bool = False,
        slots: int | None = 16,
        pack_heads: int | None = None,
        tied: bool = True,
        omega: Literal["log2", "elu"] = "log2",
        shorten: bool = False,
    ) -> None:
        super().__init__()
        pack_heads = pack_heads or heads
        if width % heads or width % pack_heads or (causal and pack_heads != heads):
            raise LongspanError(
                f"luna got width={width}, heads={heads}, pack_heads={pack_heads}: both must divide "
                "the width, and be equal where causal."
            )
        if omega not in ("log2", "elu"):
            raise LongspanError(f"luna has no omega '{omega}'; expected log2 or elu.")
        if slots is not None and slots < 1:
            raise LongspanError(f"luna got slots={slots}: give at least 1, or None.")
        self.causal, self.heads, self.pack_heads = causal, heads, pack_heads
        self.omega, self.shorten = omega, shorten
        names = ["pack_q", "pack_k", "q", "k"]
        if not tied:
            names += ["v"] if causal else ["pack_v", "v"]
        self.project = nn.ModuleDict({name: nn.Linear(width, width) for name in names})
        self.output = nn.Linear(width, width)
        for linear in (*self.project.values(), self.output):
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight, gain=2**-0.5)
            nn.init.zeros_(linear.bias)
        self.slots = None if slots is None else StartingSlots(slots, width)

    def forward(
        self,
        x: Inputs,
        state: LunaState | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, LunaState | None]:
        if marks is not None:
            raise LongspanError("luna treats all tokens alike: leave the marks out.")
        if self.slots is None:
            raise LongspanError("luna was built without a P of its own: call streams with one.")
        p = self.slots(len(x))
        if self.causal:
            return self.prefix(x, p, state, keep=keep, context=context)
        if state is not None:
            raise LongspanError("luna got a state: build it causal=True to carry one.")
        return self.streams(x, p, keep=keep, context=context)[0], None

    def streams(
        self, x: Inputs, p: Slots, *, keep: Keep | None = None, context: Context | None = None
    ) -> tuple[Inputs, Float[Tensor, "B _ E"]]:
        """(Y_X, Y_P), before residuals and norms; `keep` is of the context, where given.

        Raises:
            LongspanError: a causal luna.
        """
        if self.causal:
            raise LongspanError("a causal luna does not update P: call prefix.")
        source = x if context is None else context
        if keep is not None:
            source = source.masked_fill(~keep[..., None], 0)
            x = source if context is None else x
        if self.shorten:
            longest = source.shape[1] if keep is None else int(keep.sum(1).max())
            p = p[:, : max(longest, 1)]
        packed = dense.attend(
            self._heads("pack_q", p, self.pack_heads),
            self._heads("pack_k", source, self.pack_heads),
            self._heads("pack_v", source, self.pack_heads),
            keep=keep,
        )
        y_p = rearrange(packed, "B H M D -> B M (H D)")
        o = dense.attend(self._heads("q", x), self._heads("k", y_p), self._heads("v", y_p))
        if keep is not None:  # a row that sees nothing gives 0, not the biases
            o = o.masked_fill(~keep.any(1)[:, None, None, None], 0)
        y = self.output(rearrange(o, "B H L D -> B L (H D)"))
        if keep is not None and context is None:
            y = y.masked_fill(~keep[..., None], 0)
        return y, y_p

    def prefix(
        self,
        x: Inputs,
        p: Slots,
        state: LunaState | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
    ) -> tuple[Inputs, LunaState]:
        """Causal Y_X, for a P that is the same in every call of a sequence.

        Raises:
            LongspanError: a bidirectional luna, or a context.
        """
        if context is not None or not self.causal:
            raise LongspanError(
                "a causal luna mixes one sequence: build it causal=True and leave the context out."
            )
        kept = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        if keep is not None:
            x = x.masked_fill(~keep[..., None], 0)
        wide = torch.promote_types(x.dtype, torch.float32)
        old = LunaState(None, None, kept.sum(1) * 0) if state is None else state  # pyright: ignore
        q, k, v = (self._heads(name, x) for name in "qkv")
        scale = q.shape[3] ** -0.5
        pack = self._omega(self._heads("pack_k", x) @ self._heads("pack_q", p).mT * scale)
        pack = pack.to(wide) * kept[:, None, :, None]  # B H L M
        t = (old.seen[:, None] + kept.cumsum(1)).clamp(min=1)[:, None, :, None]
        scores, of_keys = scan.outer(q.to(wide) * scale, k, pack, old.k)
        o, of_values = scan.outer((scores / t).softmax(-1) / t, pack, v, old.v)
        y = self.output(rearrange(o.to(x.dtype), "B H L D -> B L (H D)"))
        if keep is not None:
            y = y.masked_fill(~keep[..., None], 0)
        return y, LunaState(of_keys, of_values, old.seen + kept.sum(1))

    def _omega(self, x: Tensor) -> Tensor:
        if self.omega == "elu":
            return F.elu(x) + 1
        return F.softplus(x * math.log(2)) / math.log(2)

    def _heads(self, name: str, x: Tensor, heads: int | None = None) -> Tensor:
        if name not in self.project:  # tied
            name = name.replace("v", "k")
        return rearrange(self.project[name](x), "B L (H D) -> B H L D", H=heads or self.heads)
