"""One-token steps of the mechanisms with a constant state, beside the least work they need.

H 4, D 64, one thread, CPU time. The least work reads the state and the parameters once, writes the
state once and does the counted products, at the rates that a large copy and a large matrix product
reach in the same process. At batch 1 the state lies in cache, and PyTorch's own microseconds an
operation rule; at batch 64 the bytes do. `later` is the time of a step after 4,096 tokens over that
after 512, and `bytes` the state's then. `python benchmarks/steps.py [METHOD …]` writes
`results/steps.json`.
"""

import sys

import torch

from longspan.bench import speed
from longspan.bench.settings import Spec
from longspan.nn.state import state_bytes
from longspan.testing.counting import flops
from results import write

METHODS = (
    "linear-transformer",
    "performer",
    "cosformer(length=4096)",
    "rfa(gate=True)",
    "fast-weight-delta-dpfp",
    "aft(form='simple')",
    "rwkv",
    "s4",
    "lightweight-dynamic-conv",
    "longformer",
)
BATCHES, SHORT, LONG, AT_ONCE = (1, 64), 512, 4096, 200


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    best = speed.ceilings()
    rows = []
    for text in names or METHODS:
        for batch in BATCHES:
            rows.append(
                {"method": text, "batch": batch, **_measured(Spec.parse(text), batch, best)}
            )
            print(rows[-1], flush=True)
    write("steps", rows=rows)


@torch.no_grad()
def _measured(spec: Spec, batch: int, best: speed.Ceilings) -> dict[str, float]:
    module, inputs, more = speed.bare(spec, LONG, batch=batch)

    def pieces(start: int, end: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        axis = inputs[0].dim() - 2
        cut = [t.narrow(axis, start, end - start).contiguous() for t in inputs]
        return cut, {name: t.narrow(2, start, end - start) for name, t in more.items()}

    steps, states = [], []
    for length in (SHORT, LONG):
        before, named = pieces(0, length - 1)
        _, state = module(*before, **named)
        token, named_token = pieces(length - 1, length)
        states.append(state)

        def step(token=token, named=named_token, state=state) -> object:
            for _ in range(AT_ONCE // batch + 1):
                module(*token, state, **named)

        steps.append(step)
    pair = speed.paired(steps[1], steps[0])
    parameters = sum(p.numel() * p.element_size() for p in module.parameters())
    count = AT_ONCE // batch + 1
    moved = 2 * state_bytes(states[1]) + parameters
    least = best.least(flops(steps[1]) // count, moved)
    return {
        "microseconds": pair.first / count * 1e6,
        "least_microseconds": least * 1e6,
        "over_least": pair.first / count / least,
        "later": pair.ratio,
        "bytes": state_bytes(states[1]) / batch,
        "bytes_growth": state_bytes(states[1]) / state_bytes(states[0]),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
