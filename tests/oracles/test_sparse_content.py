"""LSH attention against transformers' Reformer, lists of tokens sorted by hand, and identities."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from longspan import LongspanError
from longspan.engines import bucket
from longspan.nn import MultiHead, reset
from longspan.registry import build
from longspan.testing import oracle_of

HEADS, WIDTH = 2, 8


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(length: int, *, batch: int = 2, value: int = WIDTH) -> tuple[Tensor, Tensor]:
    q = normal(batch, HEADS, length, WIDTH).requires_grad_()
    return q, normal(batch, HEADS, length, value, seed=1).requires_grad_()


def kept(length: int) -> Tensor:
    keep = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) > 0.3
    keep[:, 0] = True
    return keep


def lsh(**arguments: Any) -> Any:
    return build("reformer-lsh", **({"chunk": 8, "buckets": 4, "rounds": 2} | arguments)).eval()


def strict(**arguments: Any) -> Any:
    defaults = {"window": 8, "buckets": 4, "rounds": 2}
    return build("reformer-lsh-causal", **(defaults | arguments)).eval()


def unit(q: Tensor) -> Tensor:
    return q / q.norm(dim=-1, keepdim=True)


def hashes(op: Any, q: Tensor) -> Tensor:
    """B H R L, one argmax a factor."""
    generator = torch.Generator().manual_seed(op.seed)
    directions = bucket.rotations(q.shape[1], op.rounds, WIDTH, op.factors, generator=generator)
    turned = torch.einsum("bhld,hrdf->bhrlf", q.detach(), directions.to(q.dtype))
    code, base = torch.zeros_like(turned[..., 0], dtype=torch.long), 1
    for part, factor in zip(
        turned.split([f // 2 for f in op.factors], -1), op.factors, strict=True
    ):
        code = code + base * torch.cat([part, -part], -1).argmax(-1)
        base *= factor
    return code


def dense(q: Tensor, v: Tensor, times: Tensor | Any, own: float = -1e5) -> Tensor:
    """Softmax of q·k/‖k‖, pair (i, j) counted times[i, j] times, `own` more on the diagonal."""
    scores = q @ unit(q).mT + own * torch.eye(q.shape[2], dtype=q.dtype)
    return (scores + torch.as_tensor(times, dtype=q.dtype).log()).softmax(-1) @ v


def same(got: Tensor, want: Tensor, wrt: Any) -> None:
    assert_close(got, want, atol=1e-8, rtol=1e-7)
    toward = normal(*want.shape, seed=9)
    found, wanted = (torch.autograd.grad(t, wrt, toward, retain_graph=True) for t in (got, want))
    assert_close(found, wanted, atol=1e-8, rtol=1e-7)


# -- against transformers --------------------------------------------------------------------


def reformers(
    *, causal: bool, buckets: Any = 4, rounds: int = 2, before: int = 1, after: int = 0
) -> Any:
    """Their layer, and ours with its weights and directions."""
    config = ReformerConfig(
        hidden_size=12,
        num_attention_heads=HEADS,
        attention_head_size=WIDTH,
        attn_layers=["lsh"],
        lsh_attn_chunk_length=8,
        num_buckets=buckets,
        num_hashes=rounds,
        lsh_num_chunks_before=before,
        lsh_num_chunks_after=after,
        lsh_attention_probs_dropout_prob=0.0,
        is_decoder=causal,
        hash_seed=5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = LSHSelfAttention(config, layer_idx=0).double().eval()
        for linear in (theirs.query_key, theirs.value):
            torch.nn.init.normal_(linear.weight)
        op = lsh(causal=causal, buckets=buckets, rounds=rounds, before=before, after=after)
        torch.manual_seed(5)
        drawn = torch.randn(HEADS, WIDTH, rounds, sum(op.factors) // 2, dtype=torch.float64)
    op.directions = lambda q: drawn.transpose(1, 2)  # H R D F
    layer: Any = MultiHead(op, width=12, heads=HEADS, head_width=WIDTH, biases=False).double()
    with torch.no_grad():
        layer.project["q"].weight.copy_(theirs.query_key.weight)
        layer.project["v"].weight.copy_(theirs.value.weight)
        layer.output.weight.zero_()
    return theirs, op, layer


def run(theirs: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.random.fork_rng():
        return theirs(x, attention_mask=mask).hidden_states


def heads(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, v = (layer.project[n](x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2) for n in "qv")
    return q, v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("buckets", [2, 6, [4, 2]])
@pytest.mark.parametrize("reach", [(1, 0), (1, 1), (0, 0), (2, 1)])
@pytest.mark.parametrize("length", [16, 40])
def test_is_transformers_reformer(
    length: int, reach: tuple[int, int], buckets: Any, rounds: int, causal: bool
) -> None:
    """Their keys divide by √(mean q² + 1e−6) · √D, ours by ‖q‖: hence 1e−5."""
    before, after = reach
    theirs, op, layer = reformers(
        causal=causal, buckets=buckets, rounds=rounds, before=before, after=after
    )
    x = normal(2, length, 12).requires_grad_()
    q, v = heads(layer, x)
    got = op(q, q, v)[0].transpose(1, 2).flatten(2)
    assert_close(got, run(theirs, x), atol=1e-5, rtol=1e-5)
    toward = normal(*got.shape, seed=9)
    found, wanted = (
        torch.autograd.grad(t, (x, w), toward)
        for t, w in ((got, layer.project["q"].weight), (run(theirs, x), theirs.query_key.weight))
    )
    assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_masks_padding_as_transformers_reformer_does(causal: bool) -> None:
    """Their padding fills the end of each round's list in a bucket of its own, ours stands behind
    all rounds: equal where chunks look at themselves, else save at the lists' ends."""
    theirs, op, layer = reformers(causal=causal, before=0, after=0, rounds=3)
    x, keep = normal(2, 40, 12), kept(40)
    q, v = heads(layer, x)
    got = op(q, q, v, keep=keep)[0].transpose(1, 2).flatten(2)
    assert_close(got[keep], run(theirs, x, keep.long())[keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_one_chunk_is_transformers_standard_attention(causal: bool) -> None:
    theirs, op, layer = reformers(causal=causal, rounds=1, before=0)
    x = normal(2, 8, 12)
    q, v = heads(layer, x)
    got = op(q, q, v)[0].transpose(1, 2).flatten(2)
    assert_close(got, run(theirs, x), atol=1e-5, rtol=1e-5)


# -- identities ------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 7, 32])
@pytest.mark.parametrize("rounds", [1, 3])
def test_one_chunk_is_dense_attention_with_shared_keys(
    rounds: int, length: int, causal: bool
) -> None:
    """With m ≥ L all rounds meet all pairs, and alone a token meets itself."""
    q, v = inputs(length, value=5)
    op = lsh(causal=causal, chunk=32, rounds=rounds)
    all_pairs = torch.ones(length, length)
    same(op(q, q, v)[0], dense(q, v, all_pairs.tril() if causal else all_pairs), (q, v))
    keep = kept(length)
    seen = (all_pairs.tril() if causal else all_pairs) * keep[:, None, None]
    want = dense(q, v, seen + 1e-300 * torch.eye(length)) * keep[:, None, :, None]
    got = op(q, q, v, keep=keep)[0] * keep[:, None, :, None]
    assert_close(got, want)


@pytest.mark.parametrize("causal", [False, True])
def test_unique_same_buckets_are_dense_over_their_union(causal: bool) -> None:
    """Chunks no smaller than the largest bucket: no pair of a bucket is cut apart."""
    q, v = inputs(33)
    op = lsh(causal=causal, chunk=33, rounds=3, buckets=8, same=True, unique=True)
    code = hashes(op, q)
    together = (code[..., :, None] == code[..., None, :]).any(2)
    together = together & torch.ones(33, 33, dtype=torch.bool).tril() if causal else together
    same(op(q, q, v)[0], dense(q, v, together), (q, v))
    repeated = lsh(causal=causal, chunk=33, rounds=3, buckets=8, same=True)
    times = (code[..., :, None] == code[..., None, :]).double().sum(2)
    same(repeated(q, q, v)[0], dense(q, v, times.tril() if causal else times), (q, v))
    assert not torch.allclose(op(q, q, v)[0], repeated(q, q, v)[0])


@pytest.mark.parametrize("causal", [False, True])
def test_keys_have_unit_length_and_scores_no_further_scale(causal: bool) -> None:
    """Two tokens: each can only see the other (or, at first causally, itself)."""
    q, v = inputs(3)
    op = lsh(causal=causal, chunk=4, rounds=1)
    scores = q @ unit(q).mT
    first = v[:, :, :1] if causal else scores[:, :, :1, 1:].softmax(-1) @ v[:, :, 1:]
    assert_close(op(q, q, v)[0][:, :, :1], first)
    last = scores[:, :, 2:, :2].softmax(-1) @ v[:, :, :2]
    assert_close(op(q, q, v)[0][:, :, 2:], last)


def test_a_token_meets_itself_only_where_nothing_else_is_left() -> None:
    """The mask is soft: alone in its bucket, a token gives its own value."""
    q, v = inputs(9)
    op = lsh(chunk=16, rounds=1, buckets=8, same=True, before=0, after=0)
    code = hashes(op, q)[:, :, 0]
    alone = (code[..., :, None] == code[..., None, :]).sum(-1) == 1
    o = op(q, q, v)[0]
    assert alone.any()
    assert_close(o[alone], v[alone])
    crowd = ~alone & ((code[..., :, None] == code[..., None, :]).sum(-1) > 1)
    assert (o[crowd] - v[crowd]).abs().amax(-1).min() > 1e-3


def test_rounds_are_joined_by_their_logsumexps() -> None:
    """o = Σ_r exp(z_r − logsumexp z) o_r, each round alone with the directions of its own."""
    q, v = inputs(40)
    op = lsh(rounds=3, before=0, after=0)
    drawn = op.directions(q)
    one = lsh(rounds=1, before=0, after=0)
    outs, sums = [], []
    for r in range(3):
        one.directions = lambda q, r=r: drawn[:, r : r + 1]
        outs.append(one(q, q, v)[0])
        code = bucket.hash_angles(q, drawn[:, r : r + 1], op.factors)[:, :, 0]
        order = code.argsort(dim=-1, stable=True).argsort(-1) // 8
        met = order[..., :, None] == order[..., None, :]
        scores = (q @ unit(q).mT - 1e5 * torch.eye(40)).masked_fill(~met, -torch.inf)
        sums.append(scores.logsumexp(-1, keepdim=True))
    shares = torch.stack(sums).softmax(0)
    assert_close(op(q, q, v)[0], (shares * torch.stack(outs)).sum(0))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 15, 41])
@pytest.mark.parametrize(
    "options",
    [
        {"before": 1, "after": 0},
        {"before": 0, "after": 2},
        {"chunk": 3, "rounds": 3},
        {"chunk": 4, "buckets": 2, "rounds": 1},
    ],
    ids=str,
)
def test_any_length_is_cut_into_chunks(length: int, causal: bool, options: dict) -> None:
    """No multiple of the chunk is asked for: the last one is shorter."""
    oracle: Any = oracle_of("reformer-lsh")
    q, v = inputs(length)
    op = lsh(causal=causal, **options)
    for keep in (None, kept(length)):
        rows = torch.ones(2, 1, length, 1) if keep is None else keep[:, None, :, None]
        got = op(q, q, v, keep=keep)[0] * rows
        same(got, oracle(op, q, q, v, keep=keep) * rows, (q, v))


# -- hashing ---------------------------------------------------------------------------------


def test_recall_of_the_best_key_rises_with_rounds() -> None:
    """The share of tokens that meet the key of their largest score."""
    q = normal(2, HEADS, 300, WIDTH, seed=4)
    scores = q @ unit(q).mT - 1e9 * torch.eye(300)
    best = scores.argmax(-1, keepdim=True)
    found = []
    for rounds in (1, 2, 4, 8, 16):
        code = hashes(lsh(buckets=16, rounds=rounds), q)
        found.append((code == code.gather(-1, best.mT.expand_as(code))).any(2).double().mean())
    assert found == sorted(found)
    assert found[0] < 0.5
    assert found[-1] > 0.9


def test_two_buckets_collide_by_the_angle() -> None:
    """With one direction, P(h(x) = h(y)) = 1 − θ/π."""
    op = lsh(buckets=2, rounds=8000)
    x = normal(1, 1, 12, WIDTH)
    code = bucket.hash_angles(x, op.directions(x), op.factors)[0, 0]
    share = (code[:, :, None] == code[:, None]).double().mean(0)
    angle = (unit(x) @ unit(x).mT)[0, 0].clamp(-1, 1).acos()
    assert_close(share, 1 - angle / torch.pi, atol=0.025, rtol=0)


def test_buckets_factorise_and_heads_and_rounds_are_hashed_apart() -> None:
    q, _ = inputs(200)
    op = lsh(buckets=[4, 6], rounds=3)
    code = bucket.hash_angles(q, op.directions(q), op.factors)
    assert torch.equal(code, hashes(op, q))
    assert len(code.unique()) > 20
    assert int(code.max()) < 24
    copied = q[:, :1].expand(-1, HEADS, -1, -1)
    code = bucket.hash_angles(copied, op.directions(copied), op.factors)
    assert not torch.equal(code[:, 0], code[:, 1])
    assert not torch.equal(code[:, :, 0], code[:, :, 1])
    assert lsh(buckets=1024).factors == (32, 32)


def test_the_seed_decides() -> None:
    q, v = inputs(40)
    first = lsh(seed=1)(q, q, v)[0]
    assert torch.equal(lsh(seed=1)(q, q, v)[0], first)
    assert not torch.equal(lsh(seed=2)(q, q, v)[0], first)


@pytest.mark.parametrize("make", [lsh, strict])
def test_rounds_change_on_the_built_module(make: Callable[..., Any]) -> None:
    """Trained with few, evaluated with more; a state of other rounds is of no use to it."""
    q, v = inputs(40)
    op = make(rounds=2)
    op.rounds = 6
    assert torch.equal(op(q, q, v)[0], make(rounds=6)(q, q, v)[0])


def test_redrawn_directions_are_the_same_when_recomputed() -> None:
    """Recomputation restores the global generator, so backward meets the buckets of forward."""
    q, v = inputs(40)
    op = lsh(redraw=True).train()

    def grads(call: Callable[[], Tensor]) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            o = call()
            torch.manual_seed(8)  # what another layer might draw in between
            return o, *torch.autograd.grad((o * normal(*o.shape, seed=9)).sum(), (q, v))

    plain = grads(lambda: op(q, q, v)[0])
    again = grads(lambda: checkpoint(lambda q, v: op(q, q, v)[0], q, v, use_reentrant=False))
    assert_close(again, plain, rtol=0, atol=0)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        assert not torch.equal(op(q, q, v)[0], plain[0])
        assert torch.equal(op.eval()(q, q, v)[0], lsh()(q, q, v)[0])


def test_hashing_carries_no_gradient_and_keeps_one_set_of_buckets() -> None:
    """The backward pass asks for no directions: it has the buckets of the forward pass."""
    q, v = inputs(40)
    drawn = lsh().directions(q).double().requires_grad_()
    calls = []

    def directions(q: Tensor) -> Tensor:
        calls.append(0)
        return drawn

    op = lsh(redraw=True).train()
    op.directions = directions
    o, _ = op(q, q, v)
    _, grad = torch.autograd.grad(o.sum(), (q, drawn), allow_unused=True)
    assert grad is None
    assert len(calls) == 1


# -- decoding --------------------------------------------------------------------------------


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("length", [2, 9, 30])
def test_a_step_meets_the_cached_tokens_of_its_buckets_and_the_last_chunk(
    length: int, unique: bool
) -> None:
    q, v = inputs(length)
    op = lsh(causal=True, chunk=4, rounds=3, unique=unique)
    keep = kept(length)
    keep[:, -1] = True
    first = [t[:, :, :-1] for t in (q, q, v)]
    _, state = op(first[0], first[0], first[2], keep=keep[:, :-1])
    last = [t[:, :, -1:] for t in (q, v)]
    got, state = op(last[0], last[0], last[1], state)
    code = hashes(op, q)
    times = (code == code[..., -1:]).double().sum(2) * keep[:, None]
    recent = keep & (keep.flip(1).cumsum(1).flip(1) <= 4)
    times = torch.where(recent[:, None], times.clamp(min=1), times)
    times = times.clamp(max=1) if unique else times
    times[..., -1] = 0
    scores = (q[:, :, -1:] @ unit(q).mT) + times.log()[:, :, None]
    scores[..., -1] = (q[:, :, -1] * unit(q)[:, :, -1]).sum(-1, keepdim=True) - 1e5
    assert_close(got, scores.softmax(-1) @ v, atol=1e-8, rtol=1e-7)
    assert state.k.shape == (2, HEADS, length, WIDTH)
    assert state.buckets.shape == (2, HEADS, 3, length)
    assert_close(state.k, unit(q) * keep[:, None, :, None])
    hidden = ~keep[:, None, None].expand_as(code)
    assert torch.equal(state.buckets, code.masked_fill(hidden, 4))  # a bucket of its own


def test_steps_from_an_empty_state_equal_steps_from_a_prefix() -> None:
    """The first token sees itself; a reset row starts anew."""
    q, v = inputs(12)
    op, state, outs = lsh(causal=True, chunk=4), None, []
    for t in range(12):
        o, state = op(q[:, :, t : t + 1], q[:, :, t : t + 1], v[:, :, t : t + 1], state)
        outs.append(o)
    assert_close(outs[0], v[:, :, :1])
    _, prefix = op(q[:, :, :11], q[:, :, :11], v[:, :, :11])
    o, _ = op(q[:, :, 11:], q[:, :, 11:], v[:, :, 11:], prefix)
    assert_close(o, outs[-1])
    cleared = reset(prefix, torch.tensor([True, False]))
    o, _ = op(q[:, :, 11:], q[:, :, 11:], v[:, :, 11:], cleared)
    assert_close(o[0], v[0, :, 11:])
    assert_close(o[1], outs[-1][1])


def test_with_one_chunk_a_step_is_the_whole() -> None:
    """Where the last chunk is everything, chunk borders play no part, and steps equal the whole
    when pairs count once."""
    q, v = inputs(20)
    op = lsh(causal=True, chunk=32, rounds=2, unique=True)
    whole, _ = op(q, q, v)
    state, outs = None, []
    for t in range(20):
        piece = q[:, :, t : t + 1]
        o, state = op(piece, piece, v[:, :, t : t + 1], state)
        outs.append(o)
    assert_close(torch.cat(outs, 2), whole)


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lsh, strict])
def test_refusals(make: Callable[..., Any]) -> None:
    q, v = inputs(9)
    with pytest.raises(LongspanError, match="uses its queries as keys"):
        make()(q, q.clone(), v)
    with pytest.raises(LongspanError, match="every factor must be even"):
        make(buckets=5)
    with pytest.raises(LongspanError, match="rounds=0"):
        make(rounds=0)
    if make is strict:
        with pytest.raises(LongspanError, match="build reformer-lsh instead"):
            make(causal=False)
        with pytest.raises(LongspanError, match="window=0"):
            make(window=0)
    else:
        for wrong in ({"chunk": 0}, {"before": -1}, {"after": -1}):
            with pytest.raises(LongspanError, match="reformer-lsh got chunk="):
                make(**wrong)


# -- the strictly causal form ----------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 3, "rounds": 1},
        {"window": 5, "rounds": 3, "unique": True},
        {"window": 8, "buckets": [2, 4]},
        {"window": 100, "buckets": 2, "unique": True},
        {"window": 13, "buckets": 16, "rounds": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 41])
def test_strict_is_the_last_entries_of_each_bucket(length: int, options: dict) -> None:
    """Whole and token by token, in values and gradients, masked too."""
    q, v = inputs(length)
    op = strict(**options)
    for keep in (None, kept(length)):
        code = hashes(op, q)
        if keep is not None:
            code = code.masked_fill(~keep[:, None, None], -1)
        earlier = torch.ones(length, length, dtype=torch.bool).tril()
        together = (code[..., :, None] == code[..., None, :]) & earlier
        back = together.flip(-1).cumsum(-1).flip(-1)  # the token itself is number 1
        times = (together & (back <= op.window + 1)).double().sum(2)
        if op.unique:
            times = times.clamp(max=1)
        rows = torch.ones(2, 1, length, 1) if keep is None else keep[:, None, :, None]
        got, want = op(q, q, v, keep=keep)[0] * rows, dense(q, v, times) * rows
        same(got, want, (q, v))
        state, outs = None, []
        for t in range(length):
            piece = q[:, :, t : t + 1]
            seen = None if keep is None else keep[:, t : t + 1]
            o, state = op(piece, piece, v[:, :, t : t + 1], state, keep=seen)
            outs.append(o)
        assert_close(torch.cat(outs, 2) * rows, want)


def test_strict_meets_whom_lsh_meets_where_windows_and_chunks_hold_all() -> None:
    q, v = inputs(30)
    theirs = lsh(causal=True, chunk=30, same=True)(q, q, v)[0]
    assert_close(strict(window=30)(q, q, v)[0], theirs)


def test_later_tokens_move_the_chunks_of_lsh_and_not_of_the_strict_form() -> None:
    q, v = inputs(40)
    other = torch.cat([q[:, :, :30], normal(2, HEADS, 10, WIDTH, seed=8)], 2)
    for op, moves in ((lsh(causal=True), True), (strict(), False)):
        before, after = (op(t, t, v)[0][:, :, :30] for t in (q, other))
        assert torch.equal(before, after) != moves


@pytest.mark.parametrize("id", ["reformer-lsh", "reformer-lsh-causal"])
def test_rounds_changed_within_a_sequence_are_refused(id: str) -> None:
    attend = build(id, causal=True, rounds=2, buckets=4)
    q, v = torch.randn(2, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind()
    _, state = attend(q, q, v)
    attend.rounds = 3
    with pytest.raises(LongspanError, match="hashed in 2 rounds"):
        attend(q, q, v, state)
