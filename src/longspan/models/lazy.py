"""Models that spend on width what sharing attention weights saves (Ying et al., 2021)."""

from collections.abc import Sequence

from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig


def multiplications(config: LongspanConfig, tokens: int) -> int:
    """Products a token costs in all layers, attending to so many tokens."""
    width, heads = config.width, config.heads
    head_width = config.head_width or width // heads
    inner = (config.inner or 4 * width) * (3 if config.gated else 2)
    queries, values = heads * head_width, (config.kv_heads or heads) * head_width
    firsts = config.layers if config.sharing is None else len(config.sharing)
    first = width * (queries + values) + tokens * queries  # W_q, W_k and the scores
    each = width * (values + queries) + tokens * queries + width * inner
    return firsts * first + config.layers * each


def widened(config: LongspanConfig, sharing: Sequence[int], *, tokens: int) -> LongspanConfig:
    """The widest layers, in runs of these lengths, that cost no more than `config` (Sec. 4).

    Heads keep their number; their width and that of the feed-forward grow alike.

    Args:
        tokens: the length at which costs are matched.

    Raises:
        LongspanError: a config whose head width is fixed, or whatever the config refuses.

    >>> widened(LongspanConfig(width=768, layers=12, heads=12), [6, 6], tokens=512).width
    840
    """
    if config.head_width is not None:
        raise LongspanError("heads cannot grow with the layers: leave head_width out.")

    def at(width: int) -> LongspanConfig:
        inner = config.inner and round(config.inner * width / config.width)
        changes = {"width": width, "inner": inner, "sharing": list(sharing)}
        return type(config).from_dict(config.to_dict() | changes)

    budget, width = multiplications(config, tokens), config.width
    while multiplications(at(width + 2 * config.heads), tokens) <= budget:
        width += 2 * config.heads
    return at(width)
