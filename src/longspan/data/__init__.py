"""Byte streams from real corpora, the orders they are read in, and generated tasks."""

from longspan.data.catalogue import corpora, corpus
from longspan.data.splits import Corpus
from longspan.data.streams import Rows, Segments, Windows, random_windows
from longspan.data.tasks import recall, recall_accuracy

__all__ = [
    "Corpus",
    "Rows",
    "Segments",
    "Windows",
    "corpora",
    "corpus",
    "random_windows",
    "recall",
    "recall_accuracy",
]
