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
        slots = {"k": [], "v": []}
        for end in ends:
            first = end - size + 1 if module.causal else end
            for name, x in tokens.items():
                window = [
                    x[first + t] if 0 <= first + t < len(at) else 0 * x[0] for t in range(size)
                ]
                slots[name].append(
                    (module.compress[name].weight @ torch.cat(window)).view(heads, -1)
                )
        if module.causal and len(at):
            for name, null in zip("kv", module.null[:, :, 0], strict=True):
                slots[name].insert(0, null)
        if not len(at):
            outs.append(torch.zeros_like(q[b]))
            continue
        k_c, v_c = (torch.stack(slots[name], 1) for name in "kv")
        scores = q[b] @ k_c.mT / width**0.5
        if module.causal:
            places = torch.arange(keys) if keep is None else (keep[b].cumsum(0) - 1).clamp(min=0)
            mine = places[keys - q.shape[2] :]
            last = torch.tensor([-1, *ends])
            scores = scores.masked_fill(last > mine[:, None], -torch.inf)
        outs.append(scores.softmax(-1) @ v_c)
    return torch.stack(outs) if outs else q


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
