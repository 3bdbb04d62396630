"""AFT, the Attention Free Transformer (Zhai et al., 2021)."""

from itertools import product
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import average
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

Form = Literal["full", "simple", "local", "conv"]


class AFTState(NamedTuple):
    """The sums over all tokens, the last keys and values within reach, and the tokens seen."""

    sums: average.Sums
    k: Float[Tensor, "B H C D"]
    v: Float[Tensor, "B H C D"]
    seen: Int[Tensor, "B"]


State = AFTState | None


@mechanism(
    Card(
        id="aft",
        name="AFT (Attention Free Transformer): full, simple, local, conv",
        kind="attention",
        family="kernel",
        paper="An Attention Free Transformer",
        cite="Zhai et al., 2021",
        link="https://arxiv.org/abs/2105.14103",
        what="Every channel averages the values with weights exp(key + position bias), gated by "
        "the query.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*D",
        memory="C*D",
        tiny={"window": 4, "length": 2048},
    )
)
class AFT(Attention):
    """y_t = σ(q_t) ∘ Σ_t' exp(k_t' + w_tt') ∘ v_t' / Σ_t' exp(k_t' + w_tt'), per channel (Eq. 2).

    `full`: w is a learned length × length matrix, or u vᵀ of `rank`. `local`: w_tt' is learned
    where |t − t'| < window and 0, not −∞, elsewhere (Eq. 4). `simple`: w = 0 (Eq. 5). `conv`: w
    depends on t' − t and on the head alone, over `kernel` places (Eq. 6), and is
    γ (w − mean w) / std w + β with γ and β from 0 (Eq. 7) unless `reparameterised=False`. Local and
    conv add (exp(w) − 1) exp(k) v over the window to the sums over all tokens. Positions count
    kept tokens. The state of `full` is all keys and values; the others' does not grow.

    Args:
        columns: of the grid that the tokens fill row by row: windows and kernels are then squares.
        length: the most tokens that full and local are built for.
        heads: of conv, one kernel each.
        rank: of full's w; None for a full matrix.

    Raises:
        LongspanError: an unknown form; sizes below 1; conv without heads; more tokens than
            `length`; values of another width than the keys; queries and keys of two sequences.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        form: Form = "local",
        window: int = 32,
        kernel: int = 11,
        columns: int | None = None,
        length: int = 2048,
        heads: int | None = None,
        rank: int | None = 128,
        reparameterised: bool = True,
    ) -> None:
        super().__init__(causal=causal)
        if form not in get_args(Form):
            raise LongspanError(f"aft has no form '{form}'; expected {', '.join(get_args(Form))}.")
        sizes = {"window": window, "kernel": kernel, "columns": columns, "length": length}
        for name, size in (sizes | {"heads": heads, "rank": rank}).items():
            if size is not None and size < 1:
                raise LongspanError(f"aft got {name}={size}: expected at least 1.")
        if form == "conv" and heads is None:
            raise LongspanError("aft's conv form has a kernel a head: give heads.")
        self.form, self.columns, self.length = form, columns, length
        self.reparameterised = reparameterised and form == "conv"
        near: list[tuple[int, int]] = []  # (rows, columns) from a token to the biased ones
        if form == "local":
            near = _places(range(1 - window, window), columns, causal)
        elif form == "conv":
            before = kernel - 1 if causal and columns is None else kernel // 2
            near = _places(range(-before, kernel - before), columns, causal)
        self.near = near
        self.offsets = [row * (columns or 0) + column for row, column in near]
        self.reach = -min(self.offsets, default=0) if causal else 0
        self.w = self.u = self.v = None
        if form == "full" and rank is not None:
            self.u, self.v = (nn.Parameter(torch.randn(length, rank) * 0.01) for _ in range(2))
        elif form != "simple":
            shape = {"full": (length, length), "local": (length, len(near))}
            w = torch.randn(shape.get(form, (heads or 1, len(near)))) * 0.01
            self.w = nn.Parameter(w)
        if self.reparameterised:
            self.gamma, self.beta = (nn.Parameter(torch.zeros(heads or 1, 1)) for _ in range(2))

    def forward(
        self, q: Queries, k: Keys, v: Values, state: State = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, State]:
        self._check(q, k, v)
        if keep is not None:
            k = k.masked_fill(~keep[:, None, :, None], -torch.inf)
            v = v.masked_fill(~keep[:, None, :, None], 0)
        order = None
        if keep is not None and self.form != "simple":
            order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)  # kept tokens first
            k, v = average.reordered(k, order), average.reordered(v, order)
        o, state = self._average(k, v, state, keep)
        if order is not None:
            o = average.reordered(o, order.argsort(dim=1))
        o = o[:, :, o.shape[2] - q.shape[2] :] if self.causal else o
        return torch.sigmoid(q) * o.to(q.dtype), state

    def _average(
        self, k: Tensor, v: Tensor, state: AFTState | None, keep: Keep | None
    ) -> tuple[Tensor, AFTState | None]:
        batch, _, length, _ = k.shape
        new = k.new_full((batch,), length, dtype=torch.long) if keep is None else keep.sum(1)
        seen = torch.zeros_like(new) if state is None else state.seen
        pos = torch.arange(length, device=k.device)[None]
        pos = pos if state is None else pos + seen[:, None]
        if self.form in ("full", "local"):
            self._check_length(length if state is None and keep is None else seen + new)
        if self.form == "simple":
            if not self.causal:
                return average.quotient(average.pooled(k, v)), None
            o, sums = average.running(k, v, state and state.sums)
            return o, AFTState(sums, k[:, :, :0], v[:, :, :0], seen + new)
        before, every = 0, None
        if state is not None:
            before = state.k.shape[2]
            unseen = torch.arange(before, 0, -1, device=k.device) > seen[:, None]  # B C
            old = state.k.masked_fill(unseen[:, None, :, None], -torch.inf)
            k, v = torch.cat([old, k], 2), torch.cat([state.v, v], 2)
        own = slice(before, None)
        if self.form == "full":
            o = average.positioned(k, v, self._matrix(pos, before), causal=self.causal)
            if self.causal:
                every = average.Sums(*(torch.zeros_like(k[:, :, 0]),) * 3)
        elif self.causal:
            sums, every = average.prefix(k[:, :, own], v[:, :, own], state and state.sums)
            biases = self._biases(pos)
            o = average.corrected(k, v, sums, *biases, self.offsets, queries=length)
        else:
            sums = average.pooled(k, v)
            o = average.corrected(k, v, sums, *self._biases(pos), self.offsets)
        if every is None:
            return o, None
        reach = before + length if self.form == "full" else self.reach
        unused = None if keep is None else length - new
        k = k.masked_fill(k == -torch.inf, 0)
        k, v = average.latest(k, reach, unused), average.latest(v, reach, unused)
        return o, AFTState(every, k, v, seen + new)

    def _biases(self, pos: Int[Tensor, "#B L"]) -> tuple[Tensor, Tensor]:
        """exp(w) − 1 of the places around each token, #B #H #L J, and its scale."""
        assert self.w is not None
        if self.form == "local":
            factors, scale = average.biases(self.w[pos.clamp(max=self.length - 1)])
            factors, scale = factors[:, None], scale[:, None]
        else:
            w = self.w
            if self.reparameterised:
                spread = w.var(1, keepdim=True, correction=0).add(1e-12).sqrt()
                w = self.gamma * (w - w.mean(1, keepdim=True)) / spread + self.beta
            factors, scale = average.biases(w)
            factors, scale = factors[None, :, None], scale[None, :, None]
        if self.columns is not None:
            across = torch.tensor([column for _, column in self.near], device=pos.device)
            column = (pos % self.columns)[..., None] + across  # #B L J
            inside = (column >= 0) & (column < self.columns)
            factors = factors.masked_fill(~inside[:, None], 0)
        return factors, scale

    def _matrix(self, pos: Int[Tensor, "#B L"], before: int) -> Float[Tensor, "#B L S"]:
        pos = pos.clamp(max=self.length - 1)
        earlier = (pos[:, :1] - torch.arange(before, 0, -1, device=pos.device)).clamp(min=0)
        keys = torch.cat([earlier, pos], 1)
        if self.u is not None and self.v is not None:
            return self.u[pos] @ self.v[keys].mT
        assert self.w is not None
        return self.w[pos[:, :, None], keys[:, None]]

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        if v.shape[3] != k.shape[3]:
            raise LongspanError(
                f"aft weighs values channel by channel and got keys of width {k.shape[3]} and "
                f"values of width {v.shape[3]}: give both the same width."
            )
        if q.shape[2] > k.shape[2] or (not self.causal and q.shape[2] != k.shape[2]):
            raise LongspanError(
                f"aft mixes one sequence and got {q.shape[2]} queries for {k.shape[2]} keys: it "
                "has no cross form (longspan.find(mode='cross'))."
            )
        if self.form == "conv" and self.w is not None and len(self.w) not in (1, k.shape[1]):
            raise LongspanError(
                f"aft was built with {len(self.w)} kernels and got {k.shape[1]} heads: give 1 or "
                "one a head."
            )

    def _check_length(self, tokens: Int[Tensor, "B"] | int) -> None:
        most = int(tokens.max()) if isinstance(tokens, Tensor) and len(tokens) else tokens
        if isinstance(most, int) and most > self.length:
            raise LongspanError(
                f"aft was built for at most {self.length} tokens and got {most}: build it with "
                f"length={most}, use form='conv' or 'simple', or shorten the input."
            )


def _places(span: range, columns: int | None, causal: bool) -> list[tuple[int, int]]:
    """(rows, columns) from a token to those around it; causally to those not after it."""
    around = product([0] if columns is None else span, span)
    return [place for place in around if not causal or place <= (0, 0)]
