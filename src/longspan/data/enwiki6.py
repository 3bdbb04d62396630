"""enwiki6: six megabytes of a Wikipedia dump, shipped as test data inside the gensim wheel."""

import bz2
import contextlib
import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from longspan.data.splits import Corpus, by_bytes
from longspan.errors import LongspanError

_MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
_SHA256 = "34c1c63050c87cc8477b9ae36b1cb0edf372612c92938b742e579a7109c20fa4"
_CACHED = "enwiki6.xml"


def cache() -> Path:
    """Where corpora are looked for and kept: $LONGSPAN_DATA, or ~/.cache/longspan."""
    return Path(os.environ.get("LONGSPAN_DATA") or "~/.cache/longspan").expanduser()


def load() -> Corpus:
    """The dump, split 90/5/5 by bytes; a document is a page.

    It is read from the cache, else from an installed gensim, else from a gensim wheel in the
    cache's folder, and then cached.

    Raises:
        LongspanError: it is nowhere, cannot be read, or is not the text it should be.
    """
    data = _cached() or _unpacked()
    return by_bytes(
        "enwiki6",
        np.frombuffer(bytearray(data), dtype=np.uint8),
        licence="CC-BY-SA (text of Wikipedia); shipped in gensim (LGPL-2.1)",
        source="first pages of an English Wikipedia XML dump in the gensim wheel, split by bytes",
        starts=[match.start() for match in re.finditer(rb"  <page>\n", data)],
    )


def _cached() -> bytes | None:
    path = cache() / _CACHED
    if path.is_file() and hashlib.sha256(data := path.read_bytes()).hexdigest() == _SHA256:
        return data
    return None


def _unpacked() -> bytes:
    for origin, read in _holders():
        try:
            data = bz2.decompress(read())
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise LongspanError(
                f"{origin} holds no readable enwiki6 ({error}): remove it and get it again, by\n"
                f"{_command()}"
            ) from error
        if (sha256 := hashlib.sha256(data).hexdigest()) != _SHA256:
            raise LongspanError(
                f"enwiki6 in {origin} has SHA-256 {sha256}, expected {_SHA256}: "
                f"use the release that was checked, by\n{_command()}"
            )
        # The cache only saves time: a home that cannot be written to is no reason to fail.
        with contextlib.suppress(OSError):
            _write(cache() / _CACHED, data)
        return data
    raise LongspanError(
        f"enwiki6 is not on this machine: it ships in the gensim wheel (28 MB; the library itself "
        f"is not needed). Get it by\n{_command()}"
    )


def _holders() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """What may hold the dump, and how to read it there."""
    spec = find_spec("gensim")
    for place in (spec and spec.submodule_search_locations) or []:
        path = Path(place).parent / _MEMBER
        if path.is_file():
            yield str(path), path.read_bytes
    for wheel in sorted(cache().glob("gensim-*.whl")):
        yield str(wheel), lambda wheel=wheel: _member(wheel)


def _member(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(_MEMBER)


def _write(path: Path, data: bytes) -> None:
    """All or nothing: a reader beside us, or after a crash, sees no half-written file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _command() -> str:
    return f"    pip download --no-deps --only-binary=:all: gensim==4.4.0 -d {cache()}"
