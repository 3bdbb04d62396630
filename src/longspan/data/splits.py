"""A corpus of bytes, and the two rules that cut one into train, valid and test."""

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from longspan.errors import LongspanError

Bytes = UInt8[np.ndarray, "_"]
Starts = Int64[np.ndarray, "_"]

SPLITS = ("train", "valid", "test")
SEPARATOR = b"\0"
_VALID, _TEST = 0.90, 0.95


@dataclass(frozen=True, eq=False, kw_only=True)
class Corpus:
    """Bytes in three splits, and what must be recorded of them.

    Args:
        documents: split → offsets in it at which a document starts. Documents of a split are
            joined by one zero byte; a split cut by bytes may start inside a document, and
            counts it as one.
        sha256: of all documents in canonical order, joined by one zero byte; of a single file,
            what `sha256sum` prints.
        source: one line saying where the bytes came from.
    """

    name: str
    train: Bytes
    valid: Bytes
    test: Bytes
    documents: Mapping[str, Starts]
    sha256: str
    licence: str
    source: str

    def describe(self) -> dict[str, Any]:
        """The facts without the bytes, JSON-ready.

        >>> corpus("stdlib").describe()["licence"]
        'PSF-2.0'
        """
        return {
            "name": self.name,
            "source": self.source,
            "licence": self.licence,
            "sha256": self.sha256,
            "bytes": {split: len(getattr(self, split)) for split in SPLITS},
            "documents": {split: len(self.documents[split]) for split in SPLITS},
        }


def by_bytes(
    name: str,
    data: Bytes,
    *,
    licence: str,
    source: str,
    starts: Sequence[int] = (),
) -> Corpus:
    """The first 90 % of `data`, the next 5 and the last 5; `starts` are where documents begin.

    Raises:
        LongspanError: fewer than 20 bytes, of which 5 % is no byte.
    """
    if len(data) < 20:
        raise LongspanError(
            f"'{name}' holds {len(data)} bytes; a corpus needs at least 20, of which 90 % are "
            "for training, 5 % for validation and 5 % for testing."
        )
    edges = [0, round(len(data) * _VALID), round(len(data) * _TEST), len(data)]
    parts, documents = {}, {}
    for split, first, end in zip(SPLITS, edges, edges[1:], strict=False):
        inside = [start - first for start in starts if first < start < end]
        parts[split] = data[first:end]
        documents[split] = np.array([0, *inside], dtype=np.int64)
    return Corpus(
        name=name,
        train=parts["train"],
        valid=parts["valid"],
        test=parts["test"],
        documents=documents,
        sha256=hashlib.sha256(data.data).hexdigest(),
        licence=licence,
        source=source,
    )


def by_document(
    name: str,
    documents: Mapping[str, bytes],
    *,
    licence: str,
    source: str,
    fixed: Mapping[str, str] | None = None,
) -> Corpus:
    """Whole documents, each in the split that the hash of its key gives (`assign`).

    Fewer documents than splits to fill are joined and cut by `by_bytes` instead.

    Args:
        documents: key → bytes, in canonical order; none empty.
        fixed: key → split, for the documents that arrive with one.

    Raises:
        LongspanError: too few documents beside those that arrive with a split.
    """
    fixed = fixed or {}
    free = [key for key in documents if key not in fixed]
    wanted = [split for split in SPLITS if split not in fixed.values()]
    if len(free) < len(wanted):
        if fixed:
            raise LongspanError(
                f"'{name}' has {len(free)} training documents and needs at least {len(wanted)}, "
                f"to fill {' and '.join(wanted)}: give it more, or three splits of its own."
            )
        data, starts = _join(list(documents.values()))
        return by_bytes(name, data, licence=licence, source=source, starts=starts.tolist())
    split_of = {**assign(free, wanted), **fixed}
    joined = {
        split: _join([data for key, data in documents.items() if split_of[key] == split])
        for split in SPLITS
    }
    return Corpus(
        name=name,
        train=joined["train"][0],
        valid=joined["valid"][0],
        test=joined["test"][0],
        documents={split: starts for split, (_, starts) in joined.items()},
        sha256=hashlib.sha256(SEPARATOR.join(documents.values())).hexdigest(),
        licence=licence,
        source=source,
    )


def assign(keys: Sequence[str], wanted: Sequence[str] = SPLITS) -> dict[str, str]:
    """Key → split, by the SHA-256 of the key: top 5 % test, the 5 % below valid, the rest train.

    A key's split does not depend on the other keys, but for one case: a wanted split that no key
    falls in takes the highest key of a split that can spare it.
    """
    drawn = {key: _fraction(key) for key in keys}
    split_of = {}
    for key, u in drawn.items():
        split = "test" if u >= _TEST else "valid" if u >= _VALID else "train"
        split_of[key] = split if split in wanted else "train"
    for split in reversed(wanted):
        held = Counter(split_of.values())
        if not held[split]:
            spare = [key for key in keys if held[split_of[key]] > 1]
            split_of[max(spare, key=drawn.__getitem__)] = split
    return split_of


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8]) / 2**64


def _join(documents: Sequence[bytes]) -> tuple[Bytes, Starts]:
    sizes = np.array([len(document) for document in documents], dtype=np.int64)
    # A bytearray gives an array that may be written to, as torch.from_numpy asks.
    data = np.frombuffer(bytearray(SEPARATOR.join(documents)), dtype=np.uint8)
    return data, np.cumsum(sizes + len(SEPARATOR)) - sizes - len(SEPARATOR)
