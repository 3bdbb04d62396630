"""Keys and values shortened by strided convolutions, and blocks, the matrices written out."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import allowed, softmax


@oracle("memory-compressed-attention")
def memory_compressed_attention(
    module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None
) -> Tensor:
    """Slot by slot over each row's kept tokens; zeros outside the sequence."""
    stride, size = module.factor, module.kernel
    heads, keys, width = k.shape[1:]
    outs = []
    for b in range(len(q)):
        at = torch.arange(keys) if keep is None else keep[b].nonzero()[:, 0]
        tokens = {name: t[b, :, at].movedim(0, 1).flatten(1) for name, t in (("k", k), ("v", v))}
        ends = range(stride - 1, len(at), stride) if module.causal else range(0, len(at), stride)
        k_c, v_c = (
            strided(x, [end - (size - 1) * module.causal for end in ends], size)
            @ module.compress[name].weight.mT
            for name, x in tokens.items()
        )
        k_c, v_c = (t.view(-1, heads, width).movedim(0, 1) for t in (k_c, v_c))
        if module.causal:
            k_c, v_c = (torch.cat(t, 1) for t in zip(module.null, (k_c, v_c), strict=True))
        if not len(at):
            outs.append(torch.zeros_like(q[b]))
            continue
        scores = q[b] @ k_c.mT / width**0.5
        if module.causal:
            places = torch.arange(keys) if keep is None else (keep[b].cumsum(0) - 1).clamp(min=0)
            mine = places[keys - q.shape[2] :]
            last = torch.tensor([-1, *ends])
            scores = scores.masked_fill(last > mine[:, None], -torch.inf)
        outs.append(scores.softmax(-1) @ v_c)
    return torch.stack(outs) if outs else q


def strided(x: Tensor, starts: list[int], size: int) -> Tensor:
    """The windows from each start on, side by side, zeros outside."""
    zero = x.new_zeros(x.shape[1])
    windows = [
        torch.cat([x[p] if 0 <= p < len(x) else zero for p in range(start, start + size)])
        for start in starts
    ]
    return torch.stack(windows) if windows else x.new_zeros(0, size * x.shape[1])


@oracle("local-block-attention")
def local_block_attention(
    module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None
) -> Tensor:
    """Softmax under a block-diagonal mask; blocks count kept tokens."""
    seen = allowed(q.shape[2], k.shape[2], module.causal, keep)
    kept = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool) if keep is None else keep
    # The pattern's own block size, where it is causal inside an intersection.
    size = next(p.size for p in parts(module.sees) if hasattr(p, "size"))
    block = (kept.cumsum(1) - 1).clamp(min=0) // size
    same = block[:, -q.shape[2] :, None] == block[:, None]
    return softmax(q @ k.mT / q.shape[-1] ** 0.5, seen & same[:, None]) @ v


def parts(sees) -> list:
    """A pattern and what it is made of."""
    found = [sees]
    for value in vars(sees).values():
        for one in value if isinstance(value, tuple) else (value,):
            if hasattr(one, "sees"):
                found += parts(one)
    return found
