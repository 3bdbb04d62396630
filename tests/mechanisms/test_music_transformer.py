"""Music Transformer: global and local forms, tables, relations, a model of events."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import longspan
from longspan.errors import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import MultiHead
from longspan.testing.oracles import oracle_of

NEEDED = {"heads": 3, "head_width": 8}


def example(length: int, *, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(3, 2, 3, length, 8, dtype=torch.float64, generator=generator)
    return tuple(t.requires_grad_() for t in drawn)


def built(**options):
    torch.manual_seed(0)
    return longspan.build("music-transformer", **NEEDED, **{"length": 64, **options}).double()


def agrees(attend, length: int, keep: Tensor | None = None) -> None:
    oracle = oracle_of("music-transformer")
    assert oracle is not None
    qkv = example(length)
    got, want = attend(*qkv, keep=keep)[0], oracle(attend, *qkv, keep=keep)
    weight = example(length, seed=1)[0].detach()
    if keep is not None:
        weight = weight * keep[:, None, :, None]
    assert_close(got * (weight != 0), want * (weight != 0))
    wanted = [*qkv, attend.table]
    grads = [torch.autograd.grad((o * weight).sum(), wanted) for o in (got, want)]
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(("length", "rows"), [(1, 5), (9, 4), (9, 9), (9, 1), (270, 8)])
def test_skewing_is_the_gathered_form_with_gradients_and_clipping(causal, shared, length, rows):
    agrees(built(causal=causal, shared=shared, length=rows), length)


@pytest.mark.parametrize("block", [1, 3, 4, 16])
@pytest.mark.parametrize("masked", [True, False])
def test_the_local_form_sees_its_block_and_the_one_before(block, masked):
    keep = None
    if masked:
        keep = torch.rand(2, 14, generator=torch.Generator().manual_seed(0)) > 0.3
        keep[:, 0] = True
    attend = built(causal=True, block=block, length=5)
    if not masked:
        agrees(attend, 14)
        return
    assert keep is not None
    q, k, v = example(14)
    got, _ = attend(q, k, v, keep=keep)
    for b in range(2):  # blocks and distances count kept tokens
        at = keep[b].nonzero()[:, 0]
        want, _ = attend(*(t[b : b + 1, :, at] for t in (q, k, v)))
        assert_close(got[b : b + 1, :, at], want)


def test_a_local_block_of_the_whole_length_is_the_global_form():
    qkv, whole = example(12), built(causal=True)
    local = built(causal=True, block=12)
    local.load_state_dict(whole.state_dict())
    assert_close(local(*qkv)[0], whole(*qkv)[0])


@pytest.mark.parametrize("options", [{}, {"block": 3}, {"block": 5, "length": 4}])
@pytest.mark.parametrize("masked", [True, False])
def test_steps_from_cached_keys_are_the_parallel_form(options, masked):
    attend, qkv = built(causal=True, **options), example(17)
    keep = torch.ones(2, 17, dtype=torch.bool)
    if masked:
        keep[0, 3:9], keep[1, :4] = False, False
    whole, _ = attend(*qkv, keep=keep if masked else None)
    state, outs, at = None, [], 0
    for size in (4, 1, 1, 6, 1, 4):
        piece, at = slice(at, at + size), at + size
        mask = keep[:, piece] if masked else None
        o, state = attend(*(t[:, :, piece] for t in qkv), state, keep=mask)
        outs.append(o)
        if "block" in options:
            assert state.k.shape[2] < 2 * options["block"]
    rows = keep[:, None, :, None]
    assert_close(torch.cat(outs, 2) * rows, whole * rows)


def test_no_embedding_is_plain_attention():
    q, k, v = example(9)
    scores = (q @ k.mT / 8**0.5).masked_fill(torch.ones(9, 9).triu(1).bool(), -math.inf)
    assert_close(built(causal=True, std=0.0)(q, k, v)[0], scores.softmax(-1) @ v)


def test_it_is_shaw_with_a_far_reach_and_no_values():
    attend, x = built(length=9), torch.randn(2, 9, 24, dtype=torch.float64)
    shaw = longspan.build("shaw-relative-position", **NEEDED, reach=8, values=False).double()
    shaw.keys.data = attend.table.data
    torch.manual_seed(0)
    ours = MultiHead(attend, width=24, heads=3).double()
    plain = longspan.build("multi-head-attention")
    theirs = MultiHead(plain, width=24, heads=3, position=shaw).double()
    theirs.project, theirs.output = ours.project, ours.output
    assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize("causal", [True, False])
def test_relations_of_pairs_are_read_from_an_index(causal):
    attend, (q, k, v) = built(causal=causal, relations=(5, 3)), example(7)
    generator = torch.Generator().manual_seed(2)
    pitch, time = (torch.randint(n, (2, 7, 7), generator=generator) for n in (5, 3))
    got, _ = attend(q, k, v, related=(pitch, time))
    far = torch.arange(7) - torch.arange(7)[:, None] + 63
    scores = torch.zeros(2, 3, 7, 7, dtype=torch.float64)
    for b in range(2):
        for i in range(7):
            for j in range(i + 1 if causal else 7):
                rows = attend.table[:, far[i, j]] + attend.related[0][:, pitch[b, i, j]]
                rows = rows + attend.related[1][:, time[b, i, j]]
                scores[b, :, i, j] = (q[b, :, i] * (k[b, :, j] + rows)).sum(-1) / 8**0.5
    if causal:
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    assert_close(got, scores.softmax(-1) @ v)
    if causal:
        before, state = attend(*(t[:, :, :4] for t in (q, k, v)),
                               related=(pitch[:, :4, :4], time[:, :4, :4]))  # fmt: skip
        after, _ = attend(*(t[:, :, 4:] for t in (q, k, v)), state,
                          related=(pitch[:, 4:], time[:, 4:]))  # fmt: skip
        assert_close(torch.cat([before, after], 2), got)
    with pytest.raises(LongspanError, match="2 relations"):
        attend(q, k, v)


class Largest(TorchDispatchMode):
    """The most numbers that any tensor made within holds; views hold none of their own."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        sizes = [t.untyped_storage().nbytes() // t.element_size() for t in made]
        self.numbers = max(self.numbers, *sizes, 0)
        return out


def gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The naive form: for each pair the vector of its distance, L × L × D."""
    length = q.shape[2]
    far = torch.arange(length) - torch.arange(length)[:, None]
    rows = table[:, far.clamp(max=0) + table.shape[1] - 1]
    scores = (q @ k.mT + (q[..., None, :] * rows).sum(-1)) / 8**0.5
    return scores.masked_fill(far > 0, -math.inf).softmax(-1) @ v


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 2),
        ({"causal": False}, 2),
        ({"relations": (5,)}, 2),
        ({"block": 32}, 0.6),
    ],
)
def test_no_tensor_is_as_large_as_a_vector_for_each_pair(options, most):
    """Beside the pairs' scores (`most` of them for a pair) nothing grows as L × L, there or in the
    backward pass; the gathered form has D numbers for a pair."""
    length, rows, pairs = 160, 160, 2 * 3 * 160 * 160
    attend, qkv = built(**({"causal": True, "length": rows} | options)), example(length)
    related = [torch.zeros(2, length, length, dtype=torch.long)] * len(attend.related)
    with Largest() as ours:
        attend(*qkv, related=related)[0].sum().backward()
    assert pairs / 4 < ours.numbers <= most * pairs
    with Largest() as naive:
        gathered(*qkv, attend.table[:, :length]).sum().backward()
    assert naive.numbers == 8 * pairs


def test_the_gathered_form_is_what_it_is_compared_with():
    attend, qkv = built(causal=True, length=9), example(9)
    assert_close(attend(*qkv)[0], gathered(*qkv, attend.table))


def test_a_model_of_events_steps_as_it_reads():
    torch.manual_seed(0)
    model: Any = LongspanForCausalLM(
        LongspanConfig(
            vocab_size=16, width=24, heads=3, layers=2, length=8, mixers=["music-transformer"],
            position="sinusoidal-position",
        )
    ).eval()  # fmt: skip
    events = torch.randint(16, (2, 12), generator=torch.Generator().manual_seed(0))
    whole = model(events, use_cache=False).logits
    cache, outs = None, []
    for piece in events.split([5, 1, 1, 5], 1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        outs.append(output.logits)
    assert_close(torch.cat(outs, 1), whole)
    assert model.generate(events, max_new_tokens=3, do_sample=False).shape == (2, 15)


@pytest.mark.parametrize(
    "options", [{"length": 0}, {"block": 4}, {"block": 0, "causal": True},
                {"block": 4, "causal": True, "relations": (2,)}]
)  # fmt: skip
def test_what_does_not_fit_is_refused(options):
    with pytest.raises(LongspanError, match="music-transformer"):
        built(**options)
    (q, k, v), attend = example(6), built()
    with pytest.raises(LongspanError, match="within one sequence"):
        attend(q[:, :, :4], k, v)
