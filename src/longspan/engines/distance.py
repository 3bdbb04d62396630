"""What depends on the distance from query to key: scores by it, and weights summed by it.

Everything is O(L S + N D) for N distances, never an L × S × D tensor: products with the rows of
all distances are formed once, and each query's row is moved into place by a change of view.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from longspan.engines import dense
from longspan.shapes import Keys, Outputs, Queries, Values

# Scores of local attention held at once.
ELEMENTS = 1 << 21

Table = Float[Tensor, "_ N D"]


def shift(x: Float[Tensor, "B H L N"]) -> Float[Tensor, "B H L N"]:
    """y_ij = x_{i, j + L − 1 − i}, for j ≤ N − L: row i moved left by L − 1 − i.

    One zero column on the left turns the move into a change of view (Dai et al., 2019, App. B;
    Huang et al., 2018, Sec. 3.4.1); what lies right of N − L wraps round and is for the caller to
    cut.
    """
    batch, heads, length, wide = x.shape
    padded = F.pad(x, (1, 0)).view(batch, heads, wide + 1, length)
    return padded[:, :, 1:].reshape(batch, heads, length, wide)


def unshift(y: Float[Tensor, "B H L S"]) -> Float[Tensor, "B H L _"]:
    """x_{i, j + L − 1 − i} = y_ij, and 0 elsewhere: L + S − 1 columns, one for each distance."""
    batch, heads, length, keys = y.shape
    flat = F.pad(y, (0, length - 1)).flatten(2)
    return F.pad(flat, (length - 1, 1)).view(batch, heads, length, length + keys)[..., :-1]


def toeplitz(
    by_distance: Float[Tensor, "H _"], length: int, keys: int
) -> Float[Tensor, "H {length} {keys}"]:
    """y_ij = by_distance[j + L − 1 − i]: of L + S − 1 numbers, by ascending distance j − i."""
    return by_distance.unfold(-1, keys, 1).flip(-2)


def scores(
    q: Queries, table: Table, pos_q: Int[Tensor, "L"], pos_k: Int[Tensor, "S"], *, before: int
) -> Float[Tensor, "B H L S"]:
    """q_i · r_{j−i}, r_d = table[clip(d, −before, after) + before].

    Args:
        table: (H|1) N D, a row for each distance −before … after = N − 1 − before.
        pos_q, pos_k: consecutive and ascending.
    """
    length, keys = q.shape[2], pos_k.shape[0]
    if not length or not keys:
        return q.new_zeros(*q.shape[:3], keys)
    rows, left, right = _within(table, pos_q, pos_k, before)
    x = q @ rows.mT
    ends = x[..., :1].expand(*x.shape[:3], left), x[..., -1:].expand(*x.shape[:3], right)
    return shift(torch.cat([ends[0], x, ends[1]], -1))[..., :keys]


def spread(
    weights: Float[Tensor, "B H L S"],
    table: Table,
    pos_q: Int[Tensor, "L"],
    pos_k: Int[Tensor, "S"],
    *,
    before: int,
) -> Float[Tensor, "B H L D"]:
    """Σ_j weights_ij r_{j−i}: weights are summed by distance first; r as in `scores`."""
    length, keys = weights.shape[2:]
    if not length or not keys:
        return weights.new_zeros(*weights.shape[:3], table.shape[2])
    rows, left, right = _within(table, pos_q, pos_k, before)
    count = rows.shape[1]
    below, x, above = unshift(weights).split([left, count, right], -1)
    # Beyond the ends all positions count as the last distance.
    x = x + F.pad(below.sum(-1, keepdim=True), (0, count - 1))
    x = x + F.pad(above.sum(-1, keepdim=True), (count - 1, 0))
    return x @ rows


def by_index(q: Queries, table: Table, index: Int[Tensor, "B L S"]) -> Float[Tensor, "B H L S"]:
    """q_i · table[index_ij]: relations that no distance tells."""
    x = q @ table.mT
    return x.gather(-1, index[:, None].expand(-1, q.shape[1], -1, -1))


def local(
    q: Queries,
    k: Keys,
    v: Values,
    table: Table,
    *,
    block: int,
    keep: Bool[Tensor, "B S"],
    before: int,
) -> Outputs:
    """Softmax attention of each block of queries to itself, causally, and to the block before it.

    Blocks count from the first key, and the last query meets the last key; scores are
    q_i·(k_j + r_{j−i}) / √D with r as in `scores`. What a group of blocks computes is computed
    again in the backward pass.
    """
    batch, heads, length, width = q.shape
    keys = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    start = (keys - length) // block  # the first block with a query
    count, first = -(-keys // block) - start, keys - length - start * block
    # Before the first block stands one that may not be seen.
    end = -keys % block
    k, v = (F.pad(t, (0, 0, block, end))[:, :, start * block :] for t in (k, v))
    keep = F.pad(keep, (block, end))[:, start * block :].unflatten(1, (-1, block))
    q = F.pad(q, (0, 0, first, end))
    q, k, v = (t.unflatten(2, (-1, block)) for t in (q, k, v))
    rows = table.to(wide) / width**0.5

    def bias(q: Tensor, _: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
        return scores(q.to(wide), rows, pos_q, pos_k, before=before)

    def work(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        k, v = (torch.cat([t[:, :, :-1], t[:, :, 1:]], 3) for t in (k, v))
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        seen = torch.cat([keep[:, :-1], keep[:, 1:]], 2).flatten(0, 1)
        o, _ = dense.tiled(q, k, v, causal=True, keep=seen, bias=bias)
        return o.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)

    together = max(1, ELEMENTS // max(1, 2 * batch * heads * block * block))
    again = torch.is_grad_enabled() and count > together
    outs = []
    for at in range(0, count, together):
        blocks, two = slice(at, at + together), slice(at, at + together + 1)
        given = q[:, :, blocks], k[:, :, two], v[:, :, two], keep[:, two]
        outs.append(checkpoint(work, *given, use_reentrant=False) if again else work(*given))
    return torch.cat(outs, 2)[:, :, first : first + length]


def _within(table: Tensor, pos_q: Tensor, pos_k: Tensor, before: int) -> tuple[Tensor, int, int]:
    """The rows of distances that occur, and how many distances lie below and above all rows."""
    after, total = table.shape[1] - 1 - before, len(pos_q) + len(pos_k) - 1
    lowest = int(pos_k[0]) - int(pos_q[-1])
    highest = lowest + total - 1
    first, last = (min(max(d, -before), after) for d in (lowest, highest))
    left, right = (min(max(n, 0), total - 1) for n in (first - lowest, highest - last))
    return table[:, first + before : last + before + 1], left, right
