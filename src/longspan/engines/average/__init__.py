"""Averages with exponential weights, o = Σ exp(k) v / Σ exp(k), channel by channel.

Every sum is kept relative to its largest exponent so far, its peak, as total · exp(peak): nothing
overflows, and causally the peak looks at no later token. The quotient does not depend on the
peaks, so they are constants to every gradient.

A causal sum is a recurrence in each channel, F ← f·F + x. A segment of it is worked on as N chunks
of C tokens side by side: sums over chunks, a recurrence over N chunks, then one over C tokens. What
a segment computes is computed again in the backward pass, so that memory beyond inputs and outputs
is one state a segment.

`sums` runs over tokens, in the segments of `chunks`; `biased` adds weights that depend on the place
of the query too; `tokens` picks and moves tokens.
"""

from longspan.engines.average.biased import biases, corrected, positioned
from longspan.engines.average.chunks import Sums
from longspan.engines.average.sums import pooled, prefix, quotient, running
from longspan.engines.average.tokens import latest, refuse_others, reordered, shifted

__all__ = [
    "Sums",
    "biases",
    "corrected",
    "latest",
    "pooled",
    "positioned",
    "prefix",
    "quotient",
    "refuse_others",
    "reordered",
    "running",
    "shifted",
]
