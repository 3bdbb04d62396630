"""The bucket engine against lists of tokens sorted by hand."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import bucket, dense, pattern
from longspan.errors import LongspanError


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


def inputs(length: int, *, value: int = 5, batch: int = 2) -> Any:
    sizes = enumerate((4, 4, value))
    return [normal(batch, 2, length, size, seed=s).requires_grad_() for s, size in sizes]


def codes(length: int, *, rounds: int = 2, count: int = 4, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(count, (batch, 2, rounds, length), generator=generator)


def kept(length: int) -> Tensor:
    """A mask with holes; the second row keeps few."""
    keep = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) > 0.3
    keep[1, length // 3 :] = False
    keep[:, 0] = True
    return keep


def meetings(lists: Any, reach: tuple[int, int], ring: bool, buckets: Tensor, rule: Any) -> Tensor:
    """times[i, j] over one row: how often i meets j in its lists of chunks, as `rule` lets it.

    `lists` holds (round, chunk) pairs in order; a chunk looks at those `reach` around it.
    """
    length = buckets.shape[-1]
    times = torch.zeros(length, length, dtype=torch.float64)
    for c, (r, chunk) in enumerate(lists):
        for offset in range(-reach[0], reach[1] + 1):
            at = c + offset
            if not ring and not 0 <= at < len(lists):
                continue
            other, keys = lists[at % len(lists)]
            for i in chunk:
                for j in keys:
                    times[i, j] += rule(i, j, r, other)
    return times


def weighted(q: Tensor, k: Tensor, v: Tensor, times: Tensor) -> Tensor:
    raised = times * (q @ k.mT).exp()
    total = raised.sum(-1, keepdim=True)
    return raised @ v / total.masked_fill(total == 0, 1)


def check(layout: bucket.Sorted, times: Tensor, keep: Tensor | None, length: int) -> None:
    """Values and gradients; what masked queries give is left open."""
    q, k, v = inputs(length)
    rows = torch.ones(2, 1, length, 1) if keep is None else keep[:, None, :, None]
    got = dense.union(q, [(layout, k, v)], scale=1.0)[0] * rows
    want = weighted(q, k, v, times) * rows
    assert_close(got, want)
    toward = normal(*want.shape, seed=9)
    found, wanted = (torch.autograd.grad(t, (q, k, v), toward) for t in (got, want))
    assert_close(found, wanted)


def chunks(row: Tensor, keep: Tensor, size: int) -> list[tuple[int, list[int]]]:
    """(round, tokens) of the kept tokens sorted by (bucket, position), round after round."""
    found = []
    for r, code in enumerate(row.tolist()):
        order = sorted(keep.nonzero()[:, 0].tolist(), key=lambda i: (code[i], i))
        found += [(r, order[at : at + size]) for at in range(0, len(order), size)]
    return found


RULES = [
    {"causal": causal, "same": same, "apart": causal != same}
    for causal in (False, True)
    for same in (False, True)
]


def rule_of(options: dict[str, bool], row: Tensor) -> Any:
    def rule(i: int, j: int, r: int, other: int) -> bool:
        far = options["same"] and (r != other or row[r, i] != row[r, j])
        return not (far or (options["causal"] and j > i) or (options["apart"] and i == j))

    return rule


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reach", [(0, 0), (1, 0), (1, 1), (0, 2), (3, 0)])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 33])
def test_packed_chunks_meet_their_neighbours_on_a_ring(
    length: int, reach: tuple[int, int], masked: bool
) -> None:
    keep = kept(length) if masked else torch.ones(2, length, dtype=torch.bool)
    buckets = codes(length).masked_fill(~keep[:, None, None], 4)
    order = bucket.packed_order(buckets, keep, 8)
    for options in RULES:
        layout = bucket.Sorted(
            order, buckets, before=8 * reach[0], after=8 * reach[1], keep=keep, **options
        )
        times = torch.zeros(2, 2, length, length, dtype=torch.float64)
        for b, h in itertools.product(range(2), range(2)):
            row = buckets[b, h]
            times[b, h] = meetings(chunks(row, keep[b], 8), reach, True, row, rule_of(options, row))
        check(layout, times, keep, length)


def strict(buckets: Tensor, window: int, keep: Tensor) -> Tensor:
    """Each token and the last `window` of its bucket before it, round by round."""
    length = buckets.shape[-1]
    times = torch.zeros(*buckets.shape[:2], length, length, dtype=torch.float64)
    for b, h, r in itertools.product(range(2), range(2), range(buckets.shape[2])):
        code = buckets[b, h, r].tolist()
        for i in range(length):
            mine = [j for j in range(i + 1) if code[j] == code[i]][-window - 1 :]
            times[b, h, i, mine] += keep[b, mine].double()
    return times


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("window", [1, 3, 4, 5, 50])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 33])
def test_sliding_looks_back_in_the_own_bucket(length: int, window: int, unique: bool) -> None:
    for keep in (torch.ones(2, length, dtype=torch.bool), kept(length)):
        buckets = codes(length, rounds=3).masked_fill(~keep[:, None, None], 4)
        layout = bucket.Sorted(
            bucket.aligned_order(buckets, 5, 4),
            buckets,
            before=window,
            sliding=True,
            causal=True,
            same=True,
            unique=unique,
            keep=keep,
        )
        times = strict(buckets, window, keep)
        check(layout, times.clamp(max=1) if unique else times, keep, length)


def on_a_ring(reach: tuple[int, int], same: bool, length: int, rounds: int) -> None:
    for keep in (torch.ones(2, length, dtype=torch.bool), kept(length)):
        buckets = codes(length, rounds=rounds).masked_fill(~keep[:, None, None], 4)
        options = {"causal": False, "same": same, "apart": True}
        layout = bucket.Sorted(
            bucket.packed_order(buckets, keep, 8),
            buckets,
            before=8 * reach[0],
            after=8 * reach[1],
            unique=True,
            keep=keep,
            **options,
        )
        times = torch.zeros(2, 2, length, length, dtype=torch.float64)
        for b, h in itertools.product(range(2), range(2)):
            row = buckets[b, h]
            rule = rule_of(options, row)
            times[b, h] = meetings(chunks(row, keep[b], 8), reach, True, row, rule)
        check(layout, times.clamp(max=1), keep, length)


@pytest.mark.parametrize("length", [7, 8, 9, 33])
@pytest.mark.parametrize("reach", [(0, 0), (1, 0), (1, 1), (0, 2)])
def test_unique_counts_a_pair_once_on_a_ring(reach: tuple[int, int], length: int) -> None:
    on_a_ring(reach, True, length, 3)


@pytest.mark.parametrize("length", [9, 16])
def test_unique_counts_a_pair_once_on_a_short_ring(length: int) -> None:
    on_a_ring((1, 1), True, length, 1)


@pytest.mark.parametrize("reach", [(1, 0), (1, 1), (0, 2)])
def test_unique_counts_a_pair_once_across_rounds(reach: tuple[int, int]) -> None:
    on_a_ring(reach, False, 33, 3)


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("reach", [(0, 0), (1, 0), (1, 1)])
def test_unique_counts_a_pair_once(reach: tuple[int, int], same: bool) -> None:
    """Where no chunk meets another twice and nothing is seen round the ends of the lists."""
    length, keep = 33, torch.ones(2, 33, dtype=torch.bool)
    buckets = codes(length, rounds=3)
    aligned = bucket.aligned_order(buckets, 4, 8)
    options = {"causal": False, "same": same, "apart": False}
    layout = bucket.Sorted(
        aligned, buckets, before=8 * reach[0], after=8 * reach[1], same=same, unique=True
    )
    times = torch.zeros(2, 2, length, length, dtype=torch.float64)
    for b, h in itertools.product(range(2), range(2)):
        blocks: list[tuple[int, list[int]]] = [(0, []) for _ in range(aligned.size // 8)]
        for r, slots in enumerate(aligned.slot[b, h].tolist()):
            for i, slot in enumerate(slots):
                blocks[slot // 8] = (r, [*blocks[slot // 8][1], i])
        rule = rule_of(options, buckets[b, h])
        times[b, h] = meetings(blocks, reach, False, buckets[b, h], rule)
    check(layout, times.clamp(max=1), keep, length)


def test_pieces_of_the_workspace_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(33)
    buckets, keep = codes(33), kept(33)
    buckets = buckets.masked_fill(~keep[:, None, None], 4)

    def run() -> Any:
        order = bucket.packed_order(buckets, keep, 8)
        layout = bucket.Sorted(order, buckets, before=8, after=8, unique=True, keep=keep)
        o, _ = dense.union(q, [(layout, k, v)], scale=1.0)
        return o, *torch.autograd.grad(o.sum(), (q, k, v))

    whole, directions = run(), normal(2, 2, 4, 2)
    hashed = bucket.hash_angles(q, directions, (4,))
    monkeypatch.setattr(pattern, "WORKSPACE", 1)
    assert_close(run(), whole)
    assert torch.equal(bucket.hash_angles(q, directions, (4,)), hashed)


def test_passes_gradcheck() -> None:
    q, k, v = inputs(5, value=4, batch=1)
    buckets, keep = codes(5, batch=1), torch.ones(1, 5, dtype=torch.bool)
    order = bucket.packed_order(buckets, keep, 4)
    layout = bucket.Sorted(order, buckets, before=4, causal=True, apart=True, unique=True)
    itself = bucket.Itself(-1.0, keep)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dense.union(q, [(layout, k, v), (itself, k, v)], scale=0.7)[0]

    assert torch.autograd.gradcheck(run, (q, k, v))


def test_hashes_are_the_nearest_direction() -> None:
    x, directions = normal(2, 3, 9, 4), normal(3, 2, 4, 3 + 2, seed=1)
    found = bucket.hash_angles(x, directions, (6, 4))
    for b, h, r, t in itertools.product(range(2), range(3), range(2), range(9)):
        turned = x[b, h, t] @ directions[h, r]
        first, second = turned[:3].tolist(), turned[3:].tolist()
        one = [*first, *(-f for f in first)]
        two = [*second, *(-f for f in second)]
        assert found[b, h, r, t] == one.index(max(one)) + 6 * two.index(max(two))


def test_two_buckets_collide_by_the_angle() -> None:
    """P(h(x) = h(y)) = 1 − θ/π over random directions, within three standard errors."""
    rounds = 20000
    generator = torch.Generator().manual_seed(0)
    directions = bucket.rotations(1, rounds, 8, (2,), generator=generator)
    x = torch.zeros(1, 1, 5, 8)
    angles = torch.tensor([0.0, 0.3, 1.0, math.pi / 2, 2.5])
    x[0, 0, :, 0], x[0, 0, :, 1] = angles.cos(), angles.sin()
    hashes = bucket.hash_angles(x, directions, (2,))[0, 0]
    share = (hashes == hashes[:, :1]).double().mean(0)
    want = 1 - angles.double() / math.pi
    assert ((share - want).abs() <= 3 * (want * (1 - want) / rounds).sqrt() + 1e-9).all()


def test_rotations_follow_the_generator_and_differ_by_head_and_round() -> None:
    def draw(seed: int) -> Tensor:
        return bucket.rotations(2, 3, 4, (6, 4), generator=torch.Generator().manual_seed(seed))

    assert draw(0).shape == (2, 3, 4, 5)
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert len({tuple(t) for t in draw(0).flatten(2).flatten(0, 1).tolist()}) == 6


@pytest.mark.parametrize(
    ("given", "want"), [(2, (2,)), (64, (64,)), (256, (256,)), (512, (32, 16)), ([6, 4], (6, 4))]
)
def test_many_buckets_are_factored(given: Any, want: tuple[int, ...]) -> None:
    assert bucket.factor(given) == want
    assert all(f % 2 == 0 for f in want)


@pytest.mark.parametrize("given", [0, 1, 3, -2, [4, 3], [4, 0]])
def test_odd_buckets_are_refused(given: Any) -> None:
    with pytest.raises(LongspanError, match="every factor must be even"):
        bucket.factor(given)


def test_sort_keys_are_no_float() -> None:
    """At 2²⁴ + 1 tokens a float32 key would tie; slots are int64 whatever the length."""
    order = bucket.packed_order(codes(33), torch.ones(2, 33, dtype=torch.bool), 8)
    assert order.slot.dtype == torch.int64
    assert bucket.aligned_order(codes(33), 4, 8).slot.dtype == torch.int64


def test_a_stable_sort_keeps_positions_in_order() -> None:
    buckets = torch.zeros(2, 2, 2, 300, dtype=torch.long)
    order = bucket.packed_order(buckets, torch.ones(2, 300, dtype=torch.bool), 4)
    assert torch.equal(order.slot[0, 0, 0], torch.arange(300))
    assert torch.equal(bucket.aligned_order(buckets, 1, 4).slot[0, 0, 0], torch.arange(300))


def test_later_tokens_move_no_aligned_slot() -> None:
    """A token's place in its bucket depends on earlier tokens alone."""
    buckets = codes(40)
    whole = bucket.aligned_order(buckets, 4, 8).slot
    short = bucket.aligned_order(buckets[..., :25], 4, 8).slot
    for code in range(4):
        chosen = buckets[0, 0, 0, :25] == code
        places = [slot[0, 0, 0, :25][chosen] for slot in (whole, short)]
        assert torch.equal(places[0] - places[0][:1], places[1] - places[1][:1])
        assert not (places[0][:1] % 8).any()


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize(("before", "recent"), [(None, 0), (2, 0), (None, 3)])
def test_a_step_meets_its_buckets_and_the_latest(
    before: int | None, recent: int, unique: bool
) -> None:
    length, keep = 17, kept(17)
    keep[:, -1] = True
    buckets = codes(length, rounds=3).masked_fill(~keep[:, None, None], 4)
    q, k, v = (t.detach() for t in inputs(length))
    got = bucket.step(
        q[:, :, -1:],
        bucket.Hashed(k, v, keep, buckets),
        own=-1e5,
        before=before,
        recent=recent,
        unique=unique,
    )
    times = torch.zeros(2, 2, 1, length, dtype=torch.float64)
    for b, h in itertools.product(range(2), range(2)):
        for r in range(3):
            code = buckets[b, h, r].tolist()
            mine = [j for j in range(length) if code[j] == code[-1] and keep[b, j]]
            mine = mine if before is None else mine[-before - 1 :]
            times[b, h, 0, mine] += 1
        late = keep[b].nonzero()[:, 0][max(0, int(keep[b].sum()) - recent) :]
        times[b, h, 0, late] = times[b, h, 0, late].clamp(min=1)
    times[..., -1] = 0
    if unique:
        times.clamp_(max=1)
    assert times.sum(-1).all()
    assert_close(got, weighted(q[:, :, -1:], k, v, times))


def test_bfloat16_keeps_its_buckets() -> None:
    """The hash of a bfloat16 vector is that of the same vector in float64."""
    x, directions = normal(2, 2, 300, 8, dtype=torch.bfloat16), normal(2, 4, 8, 8).float()
    exact = bucket.hash_angles(x.double(), directions, (16,))
    assert (bucket.hash_angles(x, directions, (16,)) == exact).double().mean() > 0.9999


def test_empty_batches_and_lists() -> None:
    for batch, length in ((0, 5), (2, 0)):
        q, k, v = inputs(length, batch=batch)
        keep = torch.ones(batch, length, dtype=torch.bool)
        buckets = codes(length, batch=batch)
        for order in (bucket.packed_order(buckets, keep, 4), bucket.aligned_order(buckets, 4, 4)):
            layout = bucket.Sorted(order, buckets, before=4, keep=keep)
            assert dense.union(q, [(layout, k, v)])[0].shape == (batch, 2, length, 5)


def test_keys_that_are_not_the_queries_are_refused() -> None:
    q, k, _ = inputs(4)
    bucket.check_shared("x", q, q.view_as(q))
    with pytest.raises(LongspanError, match="x uses its queries as keys"):
        bucket.check_shared("x", q, k)


def test_autocast_moves_no_token_to_another_bucket() -> None:
    x, directions = normal(2, 2, 900, 8).float(), normal(2, 4, 8, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = bucket.hash_angles(x, directions, (16,))
    assert torch.equal(inside, bucket.hash_angles(x, directions, (16,)))
