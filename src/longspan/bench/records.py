"""records.jsonl: one line a row, appended whole or not at all, written by one process at a time."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longspan.errors import LongspanError

Record = dict[str, Any]
NAME = "records.jsonl"


def key(record: Record) -> tuple[str, str, int, str]:
    """What makes two rows the same row: id, arguments, seed, and the digest of the settings."""
    arguments = json.dumps(record["arguments"], sort_keys=True)
    return record["id"], arguments, record["seed"], record["settings"]["digest"]


def read(folder: str | Path) -> list[Record]:
    """The records of a folder, in the order they were written; a torn last line is passed over.

    Raises:
        LongspanError: a whole line that is no JSON.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return []
    # A line counts from its newline on: what a kill cut short has none.
    *lines, _ = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise LongspanError(
                f"{path}, line {number} is no JSON ({error}): remove the line, or choose "
                "another --out."
            ) from None
    return records


def append(folder: str | Path, record: Record) -> None:
    """Add one record by a single write, on the disk when this returns."""
    line = json.dumps(record, allow_nan=False).encode() + b"\n"
    descriptor = os.open(Path(folder) / NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        written = os.write(descriptor, line)
        if written < len(line):
            os.ftruncate(descriptor, before)
            raise OSError(f"only {written} of {len(line)} bytes fitted: is the disk full?")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def repair(folder: str | Path, keep: Callable[[Record], bool] = lambda _: True) -> list[Record]:
    """Drop a torn last line and the records that are not to be kept; return those that are.

    The file is replaced by a whole new one, and only where something is dropped.
    """
    folder = Path(folder)
    path = folder / NAME
    found = read(folder)
    kept = [record for record in found if keep(record)]
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    if torn or len(kept) < len(found):
        temporary = path.with_name(f".{NAME}.tmp")
        with temporary.open("wb") as file:
            file.writelines(json.dumps(record).encode() + b"\n" for record in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return kept


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it however the process ends.

    Raises:
        LongspanError: another process holds it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise LongspanError(
                f"{folder} is being written by another compare (process {file.read() or '?'}): "
                "wait for it, or choose another --out."
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
