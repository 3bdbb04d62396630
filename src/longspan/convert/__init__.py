"""Changing the mechanism inside a pretrained model."""

from longspan.convert.bigbird import bigbird
from longspan.convert.health import Health, health
from longspan.convert.longformer import longformer
from longspan.convert.nystromformer import nystromformer
from longspan.convert.smyrf import smyrf
from longspan.convert.swap import load, original, swap, undo
from longspan.hub.swapped import SwappedCache

__all__ = [
    "Health",
    "SwappedCache",
    "bigbird",
    "health",
    "load",
    "longformer",
    "nystromformer",
    "original",
    "smyrf",
    "swap",
    "undo",
]
