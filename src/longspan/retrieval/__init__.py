"""Retrieval at the output: datastores on disk, histories, and what readers make of them."""

from longspan.retrieval.datastore import Datastore
from longspan.retrieval.evidence import (
    Evidence,
    History,
    Source,
    Stored,
    Tuned,
    gather,
    neighbours,
    score,
    tune,
)
from longspan.retrieval.generating import reading
from longspan.retrieval.reading import key_layer, tapped, windows

__all__ = [
    "Datastore",
    "Evidence",
    "History",
    "Source",
    "Stored",
    "Tuned",
    "gather",
    "key_layer",
    "neighbours",
    "reading",
    "score",
    "tapped",
    "tune",
    "windows",
]
