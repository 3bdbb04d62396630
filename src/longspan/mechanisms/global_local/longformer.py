"""Longformer (Beltagy et al., 2020)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from longspan.card import Card
from longspan.engines import dense, pattern
from longspan.errors import LongspanError
from longspan.nn import Attention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Marks, Outputs, Queries, Values


class Recent(NamedTuple):
    """The last keys and values a later query may reach, and which of them may be seen."""

    k: Float[Tensor, "B H C D"]
    v: Float[Tensor, "B H C V"]
    keep: Bool[Tensor, "B C"]


@mechanism(
    Card(
        id="longformer",
        name="Longformer",
        kind="attention",
        family="global-local",
        paper="Longformer: The Long-Document Transformer",
        cite="Beltagy et al., 2020",
        link="https://arxiv.org/abs/2004.05150",
        what="Every token sees a window around itself, and a few global tokens see and are seen "
        "by all.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*D + L*C*V",
        memory="C*D + C*V",
        tiny={"window": 12, "hubs": 2},
        exact={"window": 1000000, "hubs": 0},
    )
)
class Longformer(Attention):
    """Window attention with global tokens in one softmax (Sec. 3.1).

    Token i sees |i − j| ≤ window / 2, in steps of `dilation`; causally the same to the left. With
    global tokens G (bidirectional only; the paper's language model has none), a local row is

        o_i = softmax(q_i · [K_G ; K_window∖G]) [V_G ; V_window∖G]

    and a global row attends to all with projections of its own, q_global, k_global, v_global. The
    state is the last window's keys and values.

    Args:
        window: the total, even window w of the paper, for all heads or one a head.
        dilation: gaps in the window, for all heads or one a head.
        hubs: the first so many tokens of each row are global, beside those that `marks` names;
            the causal form has none and takes no notice.

    Raises:
        LongspanError: an odd window; windows and dilations of different counts, or not one a head;
            fewer than 0 hubs; marks in the causal form.
    """

    takes_marks = True

    def __init__(
        self,
        *,
        causal: bool = False,
        window: int | Sequence[int] = 512,
        dilation: int | Sequence[int] = 1,
        hubs: int = 0,
    ) -> None:
        super().__init__(causal=causal)
        windows = [window] if isinstance(window, int) else list(window)
        dilations = [dilation] if isinstance(dilation, int) else list(dilation)
        if len(windows) != len(dilations) and 1 not in (len(windows), len(dilations)):
            raise LongspanError(
                f"longformer got {len(windows)} windows and {len(dilations)} dilations: "
                "give one of each, or one a head."
            )
        if hubs < 0:
            raise LongspanError(f"longformer got hubs={hubs}: expected 0 or more global tokens.")
        if not windows or any(w % 2 or w < 2 for w in windows):
            raise LongspanError(
                f"longformer's window is the total width and must be even and positive, got "
                f"{windows}: round to the next even number."
            )
        heads = max(len(windows), len(dilations))
        self.windows = [
            pattern.Window(w // 2, 0 if causal else w // 2, d)
            for w, d in zip(
                windows * (heads // len(windows)),
                dilations * (heads // len(dilations)),
                strict=True,
            )
        ]
        self.reach = max(w.before * w.dilation for w in self.windows)
        # The causal form has no global tokens (Sec. 4.1), so neither their projections.
        self.hubs = 0 if causal else hubs
        self.extra = {} if causal else {"q_global": "q", "k_global": "k", "v_global": "v"}

    def forward(
        self,
        q: Queries,
        k: Keys,
        v: Values,
        state: Recent | None = None,
        *,
        keep: Keep | None = None,
        marks: Marks | None = None,
        q_global: Queries | None = None,
        k_global: Keys | None = None,
        v_global: Values | None = None,
    ) -> tuple[Outputs, Recent | None]:
        if len(self.windows) not in (1, q.shape[1]):
            raise LongspanError(
                f"longformer was built with {len(self.windows)} windows and got {q.shape[1]} "
                "heads: give 1 or one a head."
            )
        if self.causal:
            if marks is not None:
                raise LongspanError(
                    "longformer's causal form has no global tokens (Sec. 4.1): leave marks out."
                )
            return self._stream(q, k, v, state, keep)
        if q.shape[2] != k.shape[2]:
            raise LongspanError(
                f"longformer attends within one sequence and got {q.shape[2]} queries for "
                f"{k.shape[2]} keys: it has no cross form."
            )
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        hubs = self._hubs(q, keep, marks)
        if hubs is None:
            return dense.union(q, [(pattern.Banded(self.windows, keep), k, v)])[0], None
        rows, present = _gather(hubs)
        local = ~hubs if keep is None else keep & ~hubs
        o, _ = dense.union(
            q,
            [
                (dense.Whole(keep=present), _take(k, rows), _take(v, rows)),
                (pattern.Banded(self.windows, local), k, v),
            ],
        )
        k_all = k if k_global is None else k_global
        v_all = v if v_global is None else v_global
        if keep is not None:
            k_all, v_all = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k_all, v_all))
        wide = dense.attend(
            _take(q if q_global is None else q_global, rows), k_all, v_all, keep=keep
        )
        placed = torch.zeros_like(o).scatter(2, _spread(rows, wide), wide)
        return torch.where(hubs[:, None, :, None], placed, o), None

    def _stream(
        self, q: Tensor, k: Tensor, v: Tensor, state: Recent | None, keep: Keep | None
    ) -> tuple[Tensor, Recent]:
        seen = k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
        if keep is not None:
            k, v = (t.masked_fill(~keep[:, None, :, None], 0) for t in (k, v))
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            keep = seen = torch.cat([state.keep, seen], 1)
        length, keys = q.shape[2], k.shape[2]
        if length == 1:  # one row meets one window: no blocks to fill
            mask = torch.stack([w.mask(1, keys) for w in self.windows]).to(k.device)
            o = dense.explicit(q, k, v, seen=mask & seen[:, None, None])[0]
        else:
            o = dense.union(q, [(pattern.Banded(self.windows, keep), k, v)])[0]
        start = max(keys - self.reach, 0)
        return o, Recent(k[:, :, start:], v[:, :, start:], seen[:, start:])

    def _hubs(self, q: Tensor, keep: Keep | None, marks: Marks | None) -> Tensor | None:
        """Which tokens are global, or None when none can be."""
        if not self.hubs and marks is None:
            return None
        seen = q.new_ones(q.shape[0], q.shape[2], dtype=torch.bool) if keep is None else keep
        # Counted over kept tokens, so that left padding does not become global.
        hubs = seen & (seen.cumsum(1) <= self.hubs)
        return hubs if marks is None else hubs | (marks & seen)


def _gather(hubs: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the marked tokens, B G, and which are real where rows have fewer than G."""
    count = int(hubs.sum(1).max()) if hubs.numel() else 0
    rows = (~hubs).to(torch.uint8).argsort(dim=1, stable=True)[:, :count]
    return rows, hubs.gather(1, rows)


def _spread(rows: Tensor, like: Tensor) -> Tensor:
    return rows[:, None, :, None].expand(-1, like.shape[1], -1, like.shape[3])


def _take(t: Tensor, rows: Tensor) -> Tensor:
    return t.gather(2, _spread(rows, t))
