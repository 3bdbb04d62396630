"""LogSparse Transformer's attention (Li et al., 2019)."""

from collections.abc import Iterator

from longspan.card import Card
from longspan.engines.edges import Diagonal
from longspan.errors import LongspanError
from longspan.nn.diagonal import DiagonalAttention
from longspan.registry import mechanism


@mechanism(
    Card(
        id="logsparse-transformer",
        name="LogSparse Transformer",
        kind="attention",
        family="sparse-pattern",
        paper="Enhancing the Locality and Breaking the Memory Bottleneck of Transformer on Time "
        "Series Forecasting",
        cite="Li et al., NeurIPS 2019",
        link="https://arxiv.org/abs/1907.00235",
        what="Every cell sees the last few cells, and earlier ones at distances that double.",
        modes={"causal", "step"},
        time="L*C*D + L*C*V",
        memory="S*D + S*V",
        tiny={"local": 3},
        exact={"local": 1000000},
    )
)
class LogSparseTransformer(DiagonalAttention):
    """softmax(q_l K_Iᵀ / √D) V_I over the keys I of cell l (Sec. 4.2, 0-based):

        I = {l − r : r < w} ∪ {l − (w − 1) − 2^i : i ≥ 0}

    With `restart`, only what lies less than L_sub back, and the same again from l − n L_sub for
    every n. w = 1 is the paper's log-sparse set. C = O(log L) keys a cell, with restarts
    O(L / L_sub · log L_sub). The state is every key and value; places count kept tokens. Convolved
    queries and keys: `nn.convolved`; the forecaster: `models.forecast`.

    Args:
        local: w; by default ⌈log2 L_sub⌉ with restarts, else 1.
        restart: L_sub.
        released: the mask of the released code: steps back of i < w only, up to L_sub included;
            the cells before `window // restart` · 2 w see all earlier ones; a restart with fewer
            than w cells before it leaves out the cell it starts from. `window`: win_len.

    Raises:
        LongspanError: a reach below 1; a released mask without restart and window, or with local;
            more queries than keys.
    """

    def __init__(
        self,
        *,
        local: int | None = None,
        restart: int | None = None,
        released: bool = False,
        window: int | None = None,
    ) -> None:
        super().__init__()
        if any(n is not None and n < 1 for n in (local, restart, window)):
            raise LongspanError(
                f"logsparse-transformer got local={local}, restart={restart}, window={window}: "
                "expected at least 1 of each that is given."
            )
        if released and (restart is None or window is None or local is not None):
            raise LongspanError(
                "the released mask derives its local window from restart, and its full rows from "
                "window: give these two and no local."
            )
        self.local = local or max(1, ((restart or 1) - 1).bit_length())
        self.restart, self.released, self.window = restart, released, window

    def diagonals(self, keys: int) -> list[Diagonal]:
        early = 0
        if self.released and self.restart and self.window:
            early = self.window // self.restart * 2 * self.local
        since: dict[int, int] = {}
        for start in range(0, keys, self.restart or max(keys, 1)):
            for step in self._steps(keys):
                first = start + self.local - 1 if self.released and not step else start + step
                since[start + step] = min(first, since.get(start + step, first))
        full = [Diagonal(offset, offset, early) for offset in range(min(early, keys))]
        far = [Diagonal(o, max(first, early)) for o, first in since.items() if o < keys]
        return full + sorted(far)

    def _steps(self, keys: int) -> Iterator[int]:
        limit = keys if self.restart is None else self.restart - 1 + self.released
        yield from range(min(self.local, limit + 1))
        powers = self.local if self.released else limit.bit_length()
        yield from (s for i in range(powers) if (s := self.local - 1 + 2**i) <= limit)
