"""Fixed sparsity: patterns are values, each with its mask, its edges and its kernel.

`values` holds what may be said, `banded`, `listed` and `fold` the ways to compute it, `biased`
those with a learned bias, `attending` the choice between them, and what a causal form carries.
"""

# Bytes of one temporary: larger arrays go back to the kernel at every free and page-fault anew.
WORKSPACE = 16 * 2**20
# Bytes of gathered or overlapping keys taken at a time: with their gradients they stay in cache.
CACHED = 4 * 2**20

from longspan.engines.pattern.attending import History, attend, layouts, stream  # noqa: E402
from longspan.engines.pattern.banded import Banded, Blocks  # noqa: E402
from longspan.engines.pattern.biased import Biased, ByDistance, ByPair, ByRun, biased  # noqa: E402
from longspan.engines.pattern.fold import Fold  # noqa: E402
from longspan.engines.pattern.listed import Listed  # noqa: E402
from longspan.engines.pattern.recent import Far, Near, recent  # noqa: E402
from longspan.engines.pattern.values import (  # noqa: E402
    ALL,
    Both,
    Cells,
    Chance,
    Coarse,
    Hubs,
    Listing,
    Pattern,
    PerHead,
    Prefixed,
    Stripes,
    Sum,
    Table,
    Union,
    UnlessShort,
    Window,
    causal,
    everything,
    listing,
    per_head,
    tables,
)
from longspan.engines.pattern.windows import ByPlace, Windows  # noqa: E402

__all__ = [
    "ALL",
    "CACHED",
    "WORKSPACE",
    "Banded",
    "Biased",
    "Blocks",
    "Both",
    "ByDistance",
    "ByPair",
    "ByPlace",
    "ByRun",
    "Cells",
    "Chance",
    "Coarse",
    "Far",
    "Fold",
    "History",
    "Hubs",
    "Listed",
    "Listing",
    "Near",
    "Pattern",
    "PerHead",
    "Prefixed",
    "Stripes",
    "Sum",
    "Table",
    "Union",
    "UnlessShort",
    "Window",
    "Windows",
    "attend",
    "biased",
    "causal",
    "everything",
    "layouts",
    "listing",
    "per_head",
    "recent",
    "stream",
    "tables",
]
