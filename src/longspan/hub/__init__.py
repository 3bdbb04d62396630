"""The one place that touches transformers' moving parts: caches, loading, registries, attention.

Written against transformers 5.6 to 5.23; what is overridden here is named there with an underscore
or has changed between minor versions.
"""

from transformers.utils.generic import can_return_tuple

from longspan.hub import attention
from longspan.hub.cache import Carried, StateCache, cache_of
from longspan.hub.prefixes import prefix
from longspan.hub.pretrained import Layer, Pretrained, recompute, settled
from longspan.hub.registries import register
from longspan.hub.rewinding import Rewinding, replaying

__all__ = [
    "Carried",
    "Layer",
    "Pretrained",
    "Rewinding",
    "StateCache",
    "attention",
    "cache_of",
    "can_return_tuple",
    "prefix",
    "recompute",
    "register",
    "replaying",
    "settled",
]
