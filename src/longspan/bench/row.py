"""One row of a comparison, as a process: a job comes in on stdin, a record goes out on stdout.

`python -m longspan.bench.row PARENT`; it dies with the process PARENT that started it.
"""

import ctypes
import json
import os
import signal
import sys
import threading
import time
from typing import Any

from longspan.errors import LongspanError

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End this process when `parent` ends, however it ends.

    By the kernel on Linux; and by asking every second, which also serves where the parent was
    gone before the kernel was told, and other systems.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    die_with(int(sys.argv[1]))
    # Whatever a library prints goes to stderr; the line to the parent is this process's own.
    line = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.load(sys.stdin)

    def tell(phase: str, done: float) -> None:
        print(json.dumps({"phase": phase, "done": done}), file=line)

    tell("loading", 0.0)
    from longspan.bench import measure  # torch is loaded only now, when this dies with its parent

    try:
        record: dict[str, Any] = measure.row(job, tell)
    except LongspanError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps({"record": record}, allow_nan=False), file=line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
