"""Corpora made of files: the Python standard library, a folder, one file."""

import os
import platform
import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np

from longspan.data.splits import Corpus, by_bytes, by_document
from longspan.errors import LongspanError

# Left out of the standard library: what is installed beside it; its tests, which repeat each
# other and which some distributions leave out; code pages, near copies of one another that would
# reach across the splits; the generated documentation; and what differs from build to build.
_FOREIGN = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
_GENERATED = {"encodings", "pydoc_data", "sitecustomize.py", "usercustomize.py"}
_BUILD = ("config-", "_sysconfigdata")


def stdlib() -> Corpus:
    """The source text of the running Python's standard library, split by file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = _FOREIGN | _TESTS | _GENERATED
    documents = _documents(root, lambda name: name in skipped or name.startswith(_BUILD), ".py")
    if not documents:
        raise LongspanError(
            f"this Python ships no source text in {root}: give a folder or a file of your own."
        )
    return by_document(
        "stdlib",
        documents,
        licence="PSF-2.0",
        source=f"standard library of {platform.python_implementation()} "
        f"{platform.python_version()}, {len(documents)} source files, split by file",
    )


def folder(path: Path) -> Corpus:
    """The text files below `path`, split by file; text is what holds no zero byte.

    Hidden files and folders are left out, and so is every further copy of a file.

    Raises:
        LongspanError: no text in it, or a folder that `datasets` has saved.
    """
    if any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        raise LongspanError(f"{path} was saved by datasets: name it 'hf:{path}' to read its rows.")
    documents = _documents(path, lambda name: name.startswith(".") or name == "__pycache__")
    if not documents:
        raise LongspanError(
            f"{path} holds no text: expected files that are not empty and hold no zero byte."
        )
    return by_document(
        str(path),
        documents,
        licence="unknown",
        source=f"folder {path}, {len(documents)} text files, split by file",
    )


def file(path: Path) -> Corpus:
    """The bytes of one file, whatever they are, split 90/5/5.

    Raises:
        LongspanError: an empty file.
    """
    data = np.fromfile(path, dtype=np.uint8)
    if not len(data):
        raise LongspanError(f"{path} is empty: expected a file with something to learn from.")
    return by_bytes(str(path), data, licence="unknown", source=f"file {path}, split by bytes")


def _documents(root: Path, skipped: Callable[[str], bool], suffix: str = "") -> dict[str, bytes]:
    """Relative path → bytes, sorted by path; one of each content, so that no copy is held out."""
    paths = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not skipped(name)]
        paths += [
            Path(parent, name) for name in names if name.endswith(suffix) and not skipped(name)
        ]
    found: dict[bytes, str] = {}
    for key, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        if path.is_file() and (data := path.read_bytes()) and b"\0" not in data:
            found.setdefault(data, key)
    return {key: data for data, key in found.items()}
