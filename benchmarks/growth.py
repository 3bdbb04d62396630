"""How time and memory of forward + backward grow from 8k to 256k tokens, and with two threads.

B 1, H 4, D 64; every mechanism in a process of its own. The exponents are fitted in log-log over
the lengths that fit in `PATIENCE`. Threads: wall-clock at 16,384 tokens with one and with two.
`python benchmarks/growth.py [ID …]` writes `results/growth.json`.
"""

import json
import subprocess
import sys

import torch

from longspan.bench import speed
from longspan.bench.settings import Spec, choose
from results import write

LENGTHS, PATIENCE = (8192, 16384, 32768, 65536, 131072, 262144), 60.0
THREADS_AT = 16384


def main(names: list[str]) -> None:
    specs = names or [spec.id for spec in choose("all")]
    rows = []
    for text in specs:
        command = [sys.executable, __file__, "--one", text]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            rows.append({"method": text, "error": done.stderr.strip().splitlines()[-1]})
        else:
            rows.append({"method": text, **json.loads(done.stdout)})
        print(rows[-1], flush=True)
        write("growth", lengths=LENGTHS, rows=rows)


def _one(text: str) -> None:
    spec = Spec.parse(text)
    torch.set_num_threads(1)
    costs = speed.measure(
        spec, lengths=LENGTHS, seconds=0.0, patience=PATIENCE, dense_patience=PATIENCE / 6
    )
    module, inputs, more = speed.bare(spec, THREADS_AT)
    _, training = speed.both(lambda: module(*inputs, **more)[0], inputs, module)

    def with_threads(count: int) -> None:
        torch.set_num_threads(count)
        training()

    one_over_two = speed.paired(lambda: with_threads(1), lambda: with_threads(2)).ratio
    last = costs[-1]
    print(
        json.dumps(
            {
                "longest": last.length,
                "time_exponent": last.exponent,
                "memory_exponent": last.memory_exponent,
                "memory_ratio": {c.length: c.memory_ratio for c in costs if c.memory_ratio},
                "seconds": {c.length: c.training for c in costs},
                "mebibytes": {c.length: c.memory / 2**20 for c in costs},
                "two_threads": one_over_two,
            }
        )
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        _one(sys.argv[2])
    else:
        main(sys.argv[1:])
