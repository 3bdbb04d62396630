"""Content-chosen attention, each token's keys listed one by one."""

import torch
from torch import Tensor

from longspan.engines import bucket
from longspan.testing.oracles import oracle


def _hashes(module, k: Tensor, kept: Tensor) -> Tensor:
    """argmax [xR ; −xR] with the module's own seeded directions, one factor."""
    (count,) = module.factors
    generator = torch.Generator().manual_seed(module.seed)
    heads, width = k.shape[1], k.shape[3]
    directions = bucket.rotations(heads, module.rounds, width, (count,), generator=generator)
    wide = torch.promote_types(k.dtype, torch.float32)
    turned = torch.einsum("bhld,hrdf->bhrlf", k.to(wide), directions.to(wide))
    found = torch.cat([turned, -turned], -1).argmax(-1)
    return found.masked_fill(~kept[:, None, None], count)


def _attend(q: Tensor, k: Tensor, v: Tensor, times: Tensor) -> Tensor:
    """Softmax of q·k with −1e5 on the diagonal, pair (i, j) counted times[i, j] times."""
    own = torch.eye(q.shape[2], dtype=torch.bool)
    scores = (q @ k.mT).masked_fill(times == 0, -torch.inf)
    scores = torch.where(own, scores - 1e5, scores)
    top = scores.amax(-1, keepdim=True).nan_to_num(neginf=0)
    weights = times * (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    return weights / total.masked_fill(total == 0, 1) @ v


def _prepare(module, q: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    kept = torch.ones(q.shape[0], q.shape[2], dtype=torch.bool) if keep is None else keep
    wide = torch.promote_types(q.dtype, torch.float32)
    unit = q.to(wide) / q.to(wide).norm(dim=-1, keepdim=True).clamp(min=1e-6)
    return kept, unit.to(q.dtype), _hashes(module, unit.detach(), kept)


@oracle("reformer-lsh")
def chunked(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    kept, unit, hashes = _prepare(module, q, keep)
    batch, heads, rounds, length = hashes.shape
    times = torch.zeros(batch, heads, length, length, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            # One list of all rounds, in a ring: round r's first chunk follows round r − 1's last.
            ring: list[list[int]] = []
            for r in range(rounds):
                order = sorted(range(length), key=lambda i: (int(hashes[b, h, r, i]), i))
                order = [i for i in order if kept[b, i]] or [0]
                ring += [order[at : at + module.chunk] for at in range(0, len(order), module.chunk)]
            for c, members in enumerate(ring):
                for off in range(-module.before, module.after + 1):
                    for i in members:
                        for j in ring[(c + off) % len(ring)]:
                            times[b, h, i, j] += j <= i or not module.causal
    return _attend(q, unit, v, times)


@oracle("reformer-lsh-causal")
def strict(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    kept, unit, hashes = _prepare(module, q, keep)
    batch, heads, rounds, length = hashes.shape
    times = torch.zeros(batch, heads, length, length, dtype=q.dtype)
    for b in range(batch):
        for h in range(heads):
            for r in range(rounds):
                seen: dict[int, list[int]] = {}
                for i, code in enumerate(hashes[b, h, r].tolist()):
                    mine = seen.setdefault(code, [])
                    mine.append(i)
                    for j in mine[-module.window - 1 :]:
                        times[b, h, i, j] += bool(kept[b, j])
    return _attend(q, unit, v, times)
