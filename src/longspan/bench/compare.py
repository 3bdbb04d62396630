"""The same decoder with only its mixer changed, a process a row, on the same data and budget."""

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import longspan
from longspan.bench import records
from longspan.bench.records import Record
from longspan.bench.settings import Budget, Settings, Spec, refusal
from longspan.data import corpus
from longspan.errors import LongspanError
from longspan.registry import show

ROW = (sys.executable, "-m", "longspan.bench.row")


@dataclass(frozen=True)
class Progress:
    """Where a comparison stands: row `row` of `rows`, in `phase`, `done` of it (0 to 1)."""

    row: int
    rows: int
    label: str
    phase: str
    done: float


def run(
    settings: Settings,
    mechanisms: Sequence[Spec],
    out: str | Path,
    *,
    seeds: int = 1,
    retry: bool = False,
    watch: Callable[[Progress], None] = lambda _: None,
    command: Sequence[str] = ROW,
) -> list[Record]:
    """Measure every mechanism with every seed, and return all rows of these settings in `out`.

    Each row is a process of its own, so that its peak memory is its own and a crash costs one
    row. Rows that `out` holds already are not measured again, failed ones only with `retry`; rows
    of other settings or data stay in the file and are not returned. A killed comparison takes
    its running row with it and loses no finished one.

    Args:
        command: what measures a row: it reads the job from its input and prints the record.

    Raises:
        LongspanError: data that cannot be read, or `out` is being written by another compare.
    """
    data = corpus(settings.data)
    if min(len(data.train), len(data.valid)) < settings.length:
        raise LongspanError(
            f"'{settings.data}' has {len(data.train)} bytes to train on and {len(data.valid)} to "
            f"validate on, too few for windows of {settings.length}: lower --length, or give "
            "more data."
        )
    described = settings.describe(data.describe())
    facts = {"commit": _commit(), "machine": _machine(settings), "version": longspan.__version__}
    plan = [
        {
            "id": spec.id,
            "seed": seed,
            "status": "refused",
            "reason": refusal(show(spec.id), allow_leaks=settings.allow_leaks),
            "card": show(spec.id).as_dict(),
            "arguments": spec.arguments,
            "parameters": None,
            "flops_per_token": None,
            "settings": described,
            **facts,
            "seconds": 0.0,
            "quality": None,
            "speed": None,
            "memory": None,
            "crossover": {"length": None, "beyond": None},
            "attention": None,
            "certificate": [],
        }
        for seed in range(seeds)
        for spec in mechanisms
    ]
    wanted = {records.key(row): row for row in plan}

    def stands(record: Record) -> bool:
        row = wanted.get(records.key(record))
        if row is None or record["status"] == "done":
            return True
        if record["status"] == "refused":
            return record["reason"] == row["reason"]
        return not retry and row["reason"] is None

    with records.locked(out):
        held = {records.key(record) for record in records.repair(out, stands)}
        for number, (key, row) in enumerate(wanted.items()):
            if key in held:
                continue
            if row["reason"] is None:

                def tell(phase: str, done: float, number: int = number, row: Record = row) -> None:
                    watch(Progress(number, len(wanted), _label(row, seeds), phase, done))

                row = _measure(row, settings, command, tell)
            records.append(out, row)
        watch(Progress(len(wanted), len(wanted), "", "done", 0.0))
        digest = described["digest"]
        return [r for r in records.read(out) if r["settings"]["digest"] == digest]


def _measure(
    row: Record, settings: Settings, command: Sequence[str], tell: Callable[[str, float], None]
) -> Record:
    """The row with what its process found, or with the reason why that failed."""
    started = time.monotonic()
    tell("starting", 0.0)
    found: dict[str, Any] | None = None
    late = threading.Event()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            [*command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            # Ctrl-C is for this process, which ends the row itself.
            start_new_session=True,
            # Threads that spin while they wait take the time of the one that works.
            env={**os.environ, "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
        )

        def give_up() -> None:
            late.set()
            process.kill()

        assert process.stdin is not None
        assert process.stdout is not None
        limit = _limit(Budget.parse(settings.budget))
        timer = None if limit is None else threading.Timer(limit, give_up)
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            # Where it ended before it read, its exit status and errors tell why.
            with suppress(BrokenPipeError), process.stdin as job:
                job.write(json.dumps({**row, "corpus": settings.data}))
            for line in process.stdout:
                message = json.loads(line)
                found = message.get("record", found)
                if "phase" in message:
                    tell(message["phase"], message["done"])
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            if timer is not None:
                timer.cancel()
        reason = None
        if late.is_set():
            reason = f"took longer than {limit:.0f} s, and was ended."
        elif status or found is None:
            reason = _reason(status, errors)
    seconds = round(time.monotonic() - started, 2)
    if reason is not None or found is None:
        return {**row, "status": "failed", "reason": reason, "seconds": seconds}
    return {**row, "status": "done", "seconds": seconds, **found}


def _limit(budget: Budget) -> float | None:
    """Seconds after which a row counts as hung: ten times its budget, and time to measure."""
    return None if budget.seconds is None else 10 * budget.seconds + 900


def _reason(status: int, errors: TextIO) -> str:
    errors.seek(0)
    lines = (line.rstrip() for line in errors.read().splitlines())
    last = [line for line in lines if line.strip(" ^~")][-3:]
    if status < 0:
        name = signal.Signals(-status).name
        last.append(
            f"killed by {name}" + (" (out of memory?)" if -status == signal.SIGKILL else "")
        )
    return "\n".join(last) or f"ended with status {status} and no record"


def _label(row: Record, seeds: int) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in row["arguments"].items())
    return (
        row["id"]
        + (f"({arguments})" if arguments else "")
        + (f" seed {row['seed']}" if seeds > 1 else "")
    )


def _commit() -> str | None:
    """The commit of the source tree this runs from, `+` when changed; None outside of one."""
    here = Path(__file__).parent
    git = ("git", "-C", str(here))
    try:
        commit, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout
            for command in (
                ("rev-parse", "HEAD"),
                ("status", "--porcelain", "--", str(here.parent)),
            )
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")


def _machine(settings: Settings) -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": platform.node(),
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores,
        "torch": version("torch"),
        "device": settings.device,
    }
