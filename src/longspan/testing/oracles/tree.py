"""BP-Transformer: the tree walked node by node, its adjacency matrix written out."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import softmax

Node = tuple[int, int]  # (level, index)


def context(i: int, n: int, k: int, right: bool) -> list[tuple[Node, int, int]]:
    """(node, level that is read, 1 … k) to one side of token i."""
    found, level, at = [], 0, i + 1 if right else i - 1

    def exists(level: int, m: int) -> bool:
        return 0 <= m < -(-n // 2**level)

    while exists(max(level - 1, 0), at):
        order = 0
        if level:
            # `at` is the next unread node of the level below.
            if at % 2 == (1 if right else 0):
                order = 1
                found.append(((level - 1, at), level, 1))
                at += 1 if right else -1
            at >>= 1
        while order < k:
            order += 1
            if exists(level, at):
                found.append(((level, at), level, order))
            at += 1 if right else -1
        level += 1
    return found


def edges(n: int, k: int, clip: int, causal: bool) -> tuple[list[Node], list[tuple[int, int, int]]]:
    """Nodes, and (to, from, kind)."""
    nodes, level = [], 0
    while True:
        count = n // 2**level if causal else -(-n // 2**level)
        nodes += [(level, m) for m in range(count)]
        level += 1
        if count <= 1:
            break
    place = {node: at for at, node in enumerate(nodes)}
    found = []
    for (level, m), to in place.items():
        if level:
            inside = range(m * 2**level, min((m + 1) * 2**level, n))
            found += [(to, place[0, t], (2 * k + 1) * min(level, clip)) for t in inside]
            continue
        found.append((to, to, 0))
        for right in (False,) if causal else (False, True):
            for node, at, order in context(m, n, k, right):
                kind = (2 * k + 1) * min(at, clip) + order + (k if right else 0)
                found.append((to, place[node], kind))
    return nodes, found


@oracle("bp-transformer")
def bp_transformer(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    outs = []
    for b in range(len(x)):
        kept = torch.ones(x.shape[1], dtype=torch.bool) if keep is None else keep[b]
        n = int(kept.sum())
        nodes, found = edges(n, module.near, module.clip, module.causal)
        h = torch.cat([x[b, kept], x.new_zeros(len(nodes) - n, x.shape[2])])
        seen = torch.zeros(len(nodes), len(nodes), dtype=torch.bool)
        kind = torch.zeros(len(nodes), len(nodes), dtype=torch.long)
        for to, of, name in found:
            seen[to, of], kind[to, of] = True, name
        for layer in module.layers:
            own = layer.own
            q, key, v = (
                (h @ p.weight.mT).unflatten(1, (own.heads, -1)).transpose(0, 1)
                for p in (own.query, own.key, own.value)
            )
            bias = (q @ own.kinds.mT).gather(2, kind.expand(len(q), -1, -1))
            o = softmax((q @ key.mT + bias) / q.shape[-1] ** 0.5, seen) @ v
            y = o.transpose(0, 1).flatten(1) @ own.output.weight.mT
            h = own.norm(h + y)
            f = layer.feed_forward
            h = layer.norm(h + f.down(F.relu(f.up(h))))
        outs.append(torch.zeros_like(x[b]).masked_scatter(kept[:, None], h[:n]))
    return torch.stack(outs)
