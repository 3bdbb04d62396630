"""What a scan works on together: some rows of batch × heads, and along them groups of chunks."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

# 64 rows keep a chunk's products square at D = 64; 16 chunks keep a group within the L2 cache.
CHUNK, GROUP = 64, 16


class Span(NamedTuple):
    """Chunks of one length that follow each other, and where the state before them is kept."""

    tokens: slice
    chunks: int
    kept: slice


class Work(NamedTuple):
    """Rows of the inputs and of the states, which differ where sequences lie in one row."""

    rows: slice
    states: slice
    spans: list[Span]


def works(rows: int, length: int, offsets: list[int] | None) -> Iterator[Work]:
    """All of `rows` sequences side by side, or between `offsets` one after the other."""
    kept = 0
    borders = [0, length] if offsets is None else offsets
    for sequence, (first, last) in enumerate(pairwise(borders)):
        whole, rest = divmod(last - first, CHUNK)
        cuts = [(g * CHUNK, min(GROUP, whole - g), CHUNK) for g in range(0, whole, GROUP)]
        if rest:
            cuts.append((whole * CHUNK, 1, rest))
        together = max(1, GROUP // max(whole, 1))
        for row in range(0, rows, together):
            count = min(together, rows - row)
            spans: list[Span] = []
            for start, chunks, size in cuts:
                tokens = slice(first + start, first + start + chunks * size)
                spans.append(Span(tokens, chunks, slice(kept, kept + count)))
                kept += count
            state = sequence * rows + row
            yield Work(slice(row, row + count), slice(state, state + count), spans)


def kept_states(plan: list[Work], state: Tensor) -> Tensor:
    """Room for the state before every span."""
    count = max((span.kept.stop for work in plan for span in work.spans), default=0)
    return state.new_empty(count, *state.shape[1:])
