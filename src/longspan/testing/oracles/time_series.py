"""LogSparse attention, its row masks written out."""

import math

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.block_sparse import alone


def paper_row(index: int, local: int, restart: int | None) -> set[int]:
    """I_l of Sec. 4.2 with the local window and restarts, 0-based."""
    seen, cell = set(), index
    while cell >= 0:
        edge = cell - local + 1
        near = {*range(edge, cell + 1), *(edge - 2**i for i in range(40))}
        seen |= {j for j in near if j >= 0 and (restart is None or cell - j < restart)}
        cell = -1 if restart is None else cell - restart
    return seen


def released_row(index: int, sub_len: int, win_len: int) -> set[int]:
    """The row mask of the released code."""
    log_l, p = math.ceil(math.log2(sub_len)), index
    if win_len // sub_len * 2 * log_l > index:
        return set(range(index + 1))
    seen: set[int] = set()
    while p >= 0:
        if p - log_l + 1 < 0:
            return seen | set(range(p))
        seen |= set(range(p - log_l + 1, p + 1))
        steps = (p - log_l + 1 - 2**i for i in range(log_l))
        seen |= {j for j in steps if j >= 0 and p - j <= sub_len}
        p -= sub_len
    return seen


def mask(module, length: int) -> Tensor:
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        row = (
            released_row(i, module.restart, module.window)
            if module.released
            else paper_row(i, module.local, module.restart)
        )
        seen[i, sorted(row)] = True
    return seen


@oracle("logsparse-transformer")
def logsparse(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    return alone(q, k, v, keep, lambda _, length: mask(module, length))
