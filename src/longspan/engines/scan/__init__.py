"""Running sums of outer products, S_t = a_t S_{t−1} + k_t v_tᵀ: at once, by chunk, or by token.

Within a chunk of C tokens the causal part is a masked C × C product; between chunks one D × V
state passes. Groups of chunks are worked on together, so that every temporary stays in cache and
memory beyond inputs and outputs is one state a group, forward and backward. Decays enter as
factors that are at most 1, so that none overflows. The delta rule, whose states pass through a
D × D matrix a chunk, has the same form after its triangular solve (WY).
"""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from longspan.engines import backends
from longspan.engines.scan.plan import CHUNK
from longspan.engines.scan.rule import Delta
from longspan.engines.scan.sums import Entrywise, Outer, featured
from longspan.errors import LongspanError
from longspan.shapes import Keys, Outputs, Queries, Values

__all__ = ["CHUNK", "Entrywise", "delta", "outer", "total"]

State = Float[Tensor, "N H D W"]
Decay = (
    Float[Tensor, " H"] | Float[Tensor, "H D"] | Float[Tensor, "B H S"] | Float[Tensor, "B H S D"]
)
Offsets = Int[Tensor, " _"]


def total(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    feature: Entrywise | None = None,
    normalise: float | None = None,
) -> Outputs:
    """o_i = q_iᵀ Σ_s k_s v_sᵀ over all keys: bidirectional and cross; options as in `outer`."""
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = (t.to(wide) for t in (q, k, v))
        queries, keys, values = featured(queries, keys, values, feature, normalise)
        return _quotient(queries @ (keys.mT @ values), normalise).to(q.dtype)


def outer(
    q: Queries,
    k: Keys,
    v: Values,
    state: State | None = None,
    *,
    decay: Decay | None = None,
    feature: Entrywise | None = None,
    normalise: float | None = None,
    offsets: Offsets | None = None,
) -> tuple[Outputs, State]:
    """o_t = q_tᵀ S_t with S_t = exp(decay_t) S_{t−1} + k_t v_tᵀ, and the last S.

    With S > L, the first S − L keys come before all queries. The state is at least float32
    whatever the inputs, under autocast too; `state=None` is zero.

    Args:
        decay: a finite logarithm, at most 0, of a head (H), of its channels of k (H D), or of
            either and a token (B H S, B H S D); None is no decay.
        feature: a map of q and k, applied a few tokens at a time instead of at full length.
        normalise: divides by q_tᵀ z_t + normalise with z_t = exp(decay_t) z_{t−1} + k_t, which is
            then the last column of S.
        offsets: 0, …, L: borders of sequences that follow each other in the one row of a batch.
            Each is as if alone, with a state of its own, going in and coming out.

    Raises:
        LongspanError: offsets that are no borders, several rows or earlier keys beside offsets.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        columns = v.shape[3] + (normalise is not None)
        borders = _borders(offsets, q, k)
        state = _fresh(state, q, columns, wide, borders)
        if (earlier := k.shape[2] - q.shape[2]) > 0:
            past = decay
            if decay is not None and decay.dim() > 2:
                past, decay = decay[:, :, :earlier], decay[:, :, earlier:]
            keys, values = (t[:, :, :earlier].to(wide) for t in (k, v))
            keys, _, values = featured(keys, keys[:, :, :0], values, feature, normalise)
            state = _absorb(keys, values, state, past)
            k, v = k[:, :, earlier:], v[:, :, earlier:]
        if q.shape[2] == 1 and borders is None:
            queries, keys, values = (t.to(wide) for t in (q, k, v))
            queries, keys, values = featured(queries, keys, values, feature, normalise)
            state = _faded(state, decay) + keys.mT * values
            return _quotient(queries @ state, normalise).to(q.dtype), state
        fades = _fades(decay, k)
        simple = borders is None and (fades is None or fades.dim() == 2)
        if simple and (fused := backends.for_device("scan", q, state)):
            fades = None if fades is None else fades.to(wide).unflatten(0, q.shape[:2])
            mapped = featured(q.to(wide), k.to(wide), v.to(wide), feature, normalise)
            dtype = q.dtype if normalise is None else wide
            o, last = fused(*(t.to(q.dtype) for t in mapped), state, fades, dtype)
            return _quotient(o, normalise).to(q.dtype), last
        return _outer(q, k, v, state, fades, feature, normalise, borders)


def delta(
    q: Queries,
    k: Keys,
    v: Values,
    rate: Float[Tensor, "B H S"],
    state: State | None = None,
    *,
    erase: Keys | None = None,
    decay: Decay | None = None,
    offsets: Offsets | None = None,
) -> tuple[Outputs, State]:
    """o_t = q_tᵀ S_t with S_t = S' + rate_t k_t (v_t − S'ᵀ e_t)ᵀ, S' = exp(decay_t) S_{t−1}.

    e is `erase`, by default k: the delta rule, which replaces what k_t retrieves by v_t; with
    decays the gated one. With S > L, the first S − L keys come before all queries. The state is at
    least float32. `decay` and `offsets` as in `outer`. Within a chunk without decay,
    (I + A) U = diag(rate) (V − E S) with A the strict lower triangle of diag(rate) E Kᵀ.

    Raises:
        LongspanError: offsets that are no borders, several rows or earlier keys beside offsets.
    """
    with torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(q.dtype, torch.float32)
        borders = _borders(offsets, q, k)
        state = _fresh(state, q, v.shape[3], wide, borders)
        erase = k if erase is None else erase
        if k.shape[2] == q.shape[2] == 1 and borders is None:
            state = _faded(state, decay)
            error = rate.to(wide)[..., None] * (v.to(wide) - erase.to(wide) @ state)
            state = state + k.to(wide).mT * error
            return (q.to(wide) @ state).to(q.dtype), state
        earlier = k.shape[2] - q.shape[2]
        padded = F.pad(q, (0, 0, earlier, 0))
        o, last = _delta(padded, k, v, erase, rate, state, _fades(decay, k), borders)
        return o[:, :, earlier:], last


def _borders(offsets: Tensor | None, q: Tensor, k: Tensor) -> list[int] | None:
    if offsets is None:
        return None
    borders = offsets.tolist()
    length = k.shape[2]
    rising = all(a <= b for a, b in pairwise(borders))
    if not borders or (borders[0], borders[-1]) != (0, length) or not rising:
        raise LongspanError(
            f"offsets of packed sequences rise from 0 to the length {length} and got {borders}."
        )
    if len(q) != 1 or q.shape[2] != length:
        raise LongspanError(
            f"offsets are borders within one row of as many queries as keys and got {len(q)} rows, "
            f"{q.shape[2]} queries, {length} keys: lay the sequences one after the other."
        )
    return borders


def _fresh(
    state: Tensor | None, q: Tensor, columns: int, wide: torch.dtype, borders: list[int] | None
) -> Tensor:
    sequences = len(q) if borders is None else len(borders) - 1
    if state is None:
        return q.new_zeros(sequences, q.shape[1], q.shape[3], columns, dtype=wide)
    if len(state) != sequences:
        raise LongspanError(f"{sequences} sequences need as many states and got {len(state)}.")
    return state.to(wide)


def _aligned(decay: Tensor) -> Tensor:
    """Any form of decays as B|1 H S|1 D|1."""
    decay = decay if decay.dim() > 2 else decay[None, :, None]
    return decay if decay.dim() == 4 else decay[..., None]


def _fades(decay: Tensor | None, k: Tensor) -> Tensor | None:
    """Decays of rows, tokens and where they differ channels: B·H S (D), a view where it can be."""
    if decay is None:
        return None
    if decay.dim() > 2:
        return decay.flatten(0, 1)
    rows = decay.repeat(len(k), *(1,) * (decay.dim() - 1))[:, None]
    return rows.expand(-1, k.shape[2], *decay.shape[1:])


def _faded(state: Tensor, decay: Tensor | None) -> Tensor:
    """The state after the decay of one token."""
    return state if decay is None else state * _aligned(decay).to(state.dtype).exp().mT


def _absorb(k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None) -> Tensor:
    """The state after some tokens, at once."""
    if decay is None:
        return state + k.mT @ v
    sums = _aligned(decay).to(state.dtype).expand(-1, -1, k.shape[2], -1).cumsum(2)
    end = sums[:, :, -1:]
    return state * end.exp().mT + (k * (end - sums).exp()).mT @ v


def _quotient(o: Tensor, normalise: float | None) -> Tensor:
    return o if normalise is None else o[..., :-1] / (o[..., -1:] + normalise)


# Python loops over groups that dynamo would unroll: eager under torch.compile.
_outer: Any = torch.compiler.disable(Outer.apply)
_delta: Any = torch.compiler.disable(Delta.apply)
