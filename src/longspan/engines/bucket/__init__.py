"""Content-chosen sparsity: give tokens buckets, sort by them, attend near by, undo the sort.

`order` sorts tokens into lists in which they meet near by; `cells` lets given sets of queries and
keys meet; `balance` makes soft permutations; `collide` weighs by hash collisions; `spikes` finds
the queries that stand out.
"""

from longspan.engines.bucket.balance import blocks_of, leftmost, sinkhorn, turned
from longspan.engines.bucket.cells import (
    Cells,
    Gathered,
    Index,
    Tiles,
    asymmetric,
    attend_cells,
    balanced,
    members,
    rows_of,
    spread,
)
from longspan.engines.bucket.collide import expected, sampled
from longspan.engines.bucket.order import (
    Buckets,
    Hashed,
    Itself,
    Order,
    Sorted,
    aligned_order,
    attend,
    check_shared,
    factor,
    grow,
    hash_angles,
    packed_order,
    rotations,
    step,
)
from longspan.engines.bucket.spikes import (
    UpTo,
    awoken,
    capped,
    foremost,
    leading,
    placed,
    replaced,
    running_spikes,
    sampled_spikes,
    spikes,
)
from longspan.engines.pattern import WORKSPACE

__all__ = [
    "WORKSPACE",
    "Buckets",
    "Cells",
    "Gathered",
    "Hashed",
    "Index",
    "Itself",
    "Order",
    "Sorted",
    "Tiles",
    "UpTo",
    "aligned_order",
    "asymmetric",
    "attend",
    "attend_cells",
    "awoken",
    "balanced",
    "blocks_of",
    "capped",
    "check_shared",
    "expected",
    "factor",
    "foremost",
    "grow",
    "hash_angles",
    "leading",
    "leftmost",
    "members",
    "packed_order",
    "placed",
    "replaced",
    "rotations",
    "rows_of",
    "running_spikes",
    "sampled",
    "sampled_spikes",
    "sinkhorn",
    "spikes",
    "spread",
    "step",
    "turned",
]
