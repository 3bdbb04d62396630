"""longspan: every published way past the quadratic attention bottleneck, behind one interface."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.registry import build, cards, find, mechanism, show

if TYPE_CHECKING:
    from longspan import convert
    from longspan.hub.attention import attention
    from longspan.models import (
        LongspanConfig,
        LongspanForCausalLM,
        LongspanForMaskedLM,
        LongspanForSeq2SeqLM,
        LongspanForSequenceClassification,
    )

__version__ = "0.1.0"

# Models need torch and transformers; they are imported on first use (PEP 562).
_LAZY = {
    "attention": "longspan.hub.attention",
    "LongspanConfig": "longspan.models",
    "LongspanForCausalLM": "longspan.models",
    "LongspanForMaskedLM": "longspan.models",
    "LongspanForSeq2SeqLM": "longspan.models",
    "LongspanForSequenceClassification": "longspan.models",
}

__all__ = [
    "Card",
    "LongspanConfig",
    "LongspanError",
    "LongspanForCausalLM",
    "LongspanForMaskedLM",
    "LongspanForSeq2SeqLM",
    "LongspanForSequenceClassification",
    "attention",
    "build",
    "cards",
    "convert",
    "find",
    "mechanism",
    "show",
]


def __getattr__(name: str) -> Any:
    if name == "convert":
        return import_module("longspan.convert")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'longspan' has no attribute '{name}'")
