"""A memory that is read, processed and written token by token, for one row at a time."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.blockwise import row_by_row, softmax


@oracle("token-turing-machine")
def token_turing_machine(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """TokenLearner reads and writes, a pre-norm Transformer between them."""
    return row_by_row(_row, module, x, keep)


def summary(learner, tokens: Tensor) -> Tensor:
    weights = softmax(learner.scores(learner.norm(tokens)).T)  # k × tokens
    return weights @ tokens


def encoded(layer, z: Tensor) -> Tensor:
    block, mixer = layer.block, layer.block.mixer
    h = block.mixer_norm(z)
    q, k, v = (mixer.project[n](h).unflatten(1, (mixer.heads, -1)) for n in "qkv")
    weights = softmax(torch.einsum("ihd,jhd->hij", q, k) / q.shape[2] ** 0.5)
    z = z + mixer.output(torch.einsum("hij,jhd->ihd", weights, v).flatten(1))
    ff = block.feed_forward
    hidden = ff.up(block.feed_forward_norm(z))
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    return z + ff.down(hidden)


def _row(module, x: Tensor) -> Tensor:
    *layers, norm = module.process
    memory, out = x.new_zeros(module.memory, x.shape[1]), []
    for token in x:
        z = summary(module.read, torch.cat([memory, token[None]]))
        for layer in layers:
            z = encoded(layer, z)
        o = norm(z)
        memory = summary(module.writes, torch.cat([memory, token[None], o]))
        out.append(o.mean(0))
    return torch.stack(out) if out else x
