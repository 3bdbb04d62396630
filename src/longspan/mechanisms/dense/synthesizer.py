"""Synthesizer (Tay et al., 2020)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense, given
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.nn.positions import positions_from
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

FORMS = ("dense", "random", "random-fixed", "factorized-dense", "factorized-random", "vanilla")
TILE = 256  # queries that a bias is made for at a time


@mechanism(
    Card(
        id="synthesizer",
        name="Synthesizer (dense, random, factorized, mixtures)",
        kind="attention",
        family="dense",
        paper="Synthesizer: Rethinking Self-Attention in Transformer Models",
        cite="Tay et al., 2020",
        link="https://arxiv.org/abs/2005.00743",
        what="Every token predicts its own row of attention scores, or the scores are parameters; "
        "no keys are compared.",
        modes={"bidirectional", "causal", "step"},
        time="L*S*D + L*S*V",
        memory="S*V",
        tiny={"heads": 3, "head_width": 8, "length": 2048},
        exact={"forms": ["vanilla"], "heads": 3, "head_width": 8},
    )
)
class Synthesizer(Attention):
    """softmax(Σ_n α_n B_n) V, α a softmax of learned numbers (Sec. 3.4), where row i of B_n is

        dense:              W_2 relu(q_i) + b_2                                        (Eq. 1)
        random:             R_i, a parameter, or a constant (`random-fixed`)           (Eq. 3)
        factorized-dense:   tile(W_a relu(q_i) + b_a) ∘ repeat(W_c relu(q_i) + b_c)    (Eq. 4)
        factorized-random:  R1_i R2ᵀ                                                   (Eq. 6)
        vanilla:            q_i Kᵀ / √D

    q_i = W_1 x_i + b_1 is MultiHead's query; keys are projected for `vanilla` alone. Dense,
    factorized-random and vanilla scores are inner products, so any mixture of them is one fused
    attention over the features side by side; the other forms come as a bias, a tile at a time.
    Positions count kept tokens. The state is the values, and the keys where needed.

    Args:
        forms: one form, or those of a mixture.
        heads, head_width, length: H, D and N, the most tokens; shorter inputs use the first rows
            and columns.
        rank: k of the random factors.
        factors: a and c of the dense factors, by default about √N each; a · c ≥ N.
        std: of the random scores at the start; the official code has 1.

    Raises:
        LongspanError: unknown, repeated or no forms; factors that make less than `length`; other
            heads or widths, or more tokens, than built for; other keys than the queries' tokens.
    """

    fixed: Tensor

    def __init__(
        self,
        *,
        causal: bool = False,
        forms: Sequence[str] = ("dense",),
        heads: int = 1,
        head_width: int = 64,
        length: int = 512,
        rank: int = 8,
        factors: Sequence[int] | None = None,
        std: float = 1.0,
    ) -> None:
        super().__init__(causal=causal)
        if not forms or len(set(forms)) < len(forms) or not set(forms) <= set(FORMS):
            raise LongspanError(
                f"synthesizer got forms={list(forms)}: expected one or several different of "
                f"{', '.join(FORMS)}."
            )
        root = max(1, round(length**0.5))
        a, c = factors or (root, -(-length // root))
        if a * c < length:
            raise LongspanError(
                f"synthesizer's factors {a} and {c} make {a * c} columns for length={length}: "
                "give two whose product is at least that."
            )
        self.forms, self.heads, self.head_width, self.length = forms, heads, head_width, length
        # MultiHead then projects no keys.
        self.shared = "vanilla" not in forms  # pyright: ignore[reportAttributeAccessIssue]
        self.alpha = nn.Parameter(torch.zeros(len(forms))) if len(forms) > 1 else None

        def normal(*shape: int, std: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(heads, *shape) * std)

        if "dense" in forms:
            self.w2 = normal(length, head_width, std=head_width**-0.5)
            self.b2 = normal(length, 1, std=0.0)
        if "random" in forms:
            self.r = normal(length, length, std=std)
        if "random-fixed" in forms:
            self.register_buffer("fixed", torch.randn(heads, length, length) * std)
        if "factorized-dense" in forms:
            self.wa, self.wc = (normal(n, head_width, std=head_width**-0.5) for n in (a, c))
            self.ba, self.bc = (normal(n, 1, std=0.0) for n in (a, c))
        if "factorized-random" in forms:
            self.r1, self.r2 = (normal(length, rank, std=(std**2 / rank) ** 0.25) for _ in range(2))

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: given.Past | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Outputs, given.Past | None]:
        if q.shape[2] > k.shape[2] or not (self.causal or q.shape[2] == k.shape[2]):
            raise LongspanError(
                f"synthesizer got {q.shape[2]} queries for {k.shape[2]} keys: its scores belong to "
                "one sequence, it has no cross form (longspan.find(mode='cross'))."
            )
        if q.shape[1] != self.heads or q.shape[3] != self.head_width:
            raise LongspanError(
                f"synthesizer was built for {self.heads} heads of width {self.head_width} and got "
                f"{q.shape[1]} of {q.shape[3]}: build it with heads= and head_width= as they are."
            )
        whole = state is None and keep is None
        past = given.extended(state, k[..., :0] if self.shared else k, v, keep)
        if self.shared and keep is not None:
            q = q.masked_fill(~keep[:, None, k.shape[2] - q.shape[2] :, None], 0)
        keys = past.v.shape[2]
        tokens = keys if whole or not past.keep.numel() else int(past.keep.sum(1).max())
        if tokens > self.length:
            raise LongspanError(
                f"synthesizer was built for at most {self.length} tokens and got {tokens}: build "
                f"it with length={tokens}, or shorten the input."
            )
        pos = None if whole else positions_from(past.keep)
        if pos is not None and keys <= self.length:
            slots = torch.arange(keys, device=q.device)
            # Without holes before a token, as under padding on the right, slots are positions.
            pos = pos if bool((pos != slots)[past.keep].any()) else None
        left, right, biases = self._scores(q, past.k, pos, keys)
        if not biases:
            layout = dense.Whole(causal=self.causal, keep=None if whole else past.keep)
            o = dense.union(left, [(layout, right, past.v)], scale=1.0)[0]
        else:
            o = dense.tiled(
                left,
                right,
                past.v,
                causal=self.causal,
                keep=None if whole else past.keep,
                bias=lambda _q, _k, at, at_k: sum(
                    (bias(at, at_k) for bias in biases[1:]), start=biases[0](at, at_k)
                ),
                scale=1.0,
                tile=TILE,
            )[0]
        return o, past if self.causal else None

    def _scores(
        self, q: Tensor, k: Tensor, pos: Tensor | None, keys: int
    ) -> tuple[Tensor, Tensor, list[Callable[[Tensor, Tensor], Tensor]]]:
        """Features whose inner products are scores, and biases for the forms without such."""
        start = keys - q.shape[2]
        here = torch.arange(keys, device=q.device)[None] if pos is None else pos
        hidden = F.relu(q)

        def rows(table: Tensor, first: int = 0) -> Tensor:
            found = table[:, first:keys, None] if pos is None else table[:, pos[:, first:].mT]
            return rearrange(found, "H S B D -> B H S D").to(q.dtype).expand(len(q), -1, -1, -1)

        def given_by(r: Tensor, alpha: Tensor | float) -> Callable[[Tensor, Tensor], Tensor]:
            # Cut once: the gradient of a cut made for each tile would be as large as R.
            tiles = r[:, start:keys].split(TILE, 1)

            def bias(at: Tensor, at_k: Tensor) -> Tensor:
                if pos is None:
                    return tiles[int(at[0] - start) // TILE][None, ..., : len(at_k)] * alpha
                return r[:, pos[:, at, None], pos[:, None, at_k]].transpose(0, 1) * alpha

            return bias

        def outer(a: Tensor, c: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
            def bias(at: Tensor, at_k: Tensor) -> Tensor:
                tile = a[:, :, at - start, None] * c[:, :, at - start, :, None]  # B H T c a
                columns = here[:, None, None, at_k].expand(len(q), self.heads, len(at), -1)
                return tile.flatten(3).take_along_dim(columns, 3)

            return bias

        left, right = [q[..., :0]], [q.new_zeros(*k.shape[:3], 0)]
        biases: list[Callable[[Tensor, Tensor], Tensor]] = []
        shares = [1.0] if self.alpha is None else self.alpha.softmax(0)
        for form, alpha in zip(self.forms, shares, strict=True):
            match form:
                case "dense":
                    left += [hidden * alpha, torch.ones_like(q[..., :1]) * alpha]
                    right += [rows(self.w2), rows(self.b2)]
                case "factorized-random":
                    left.append(rows(self.r1, start) * alpha)
                    right.append(rows(self.r2))
                case "vanilla":
                    left.append(q * (alpha * self.head_width**-0.5))
                    right.append(k)
                case "factorized-dense":
                    a, c = (
                        hidden @ w.mT + b.mT for w, b in ((self.wa, self.ba), (self.wc, self.bc))
                    )
                    biases.append(outer(a * alpha, c))
                case _:
                    biases.append(given_by(self.r if form == "random" else self.fixed, alpha))
        return torch.cat(left, 3), torch.cat(right, 3), biases
