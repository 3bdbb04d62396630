"""Hourglass: nested levels, no peeking at any length, the same in steps, and its sampling ways."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import longspan
from longspan import LongspanError
from longspan.engines import pool, relative
from longspan.hub import StateCache
from longspan.hub import recompute as recompute_layers
from longspan.models.hourglass import HourglassConfig, HourglassForCausalLM, HourglassModel
from longspan.nn import MultiHead, reset, select
from longspan.nn.relative import RelativeAttention, Source, numbers


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def ids(rows: int, length: int) -> Tensor:
    return torch.randint(1, 11, (rows, length), generator=torch.Generator().manual_seed(1))


def config(**fields: Any) -> HourglassConfig:
    chosen = {"vocab_size": 11, "width": 8, "heads": 2, "inner": 12, "hierarchy": "1@1 1@2 1@1"}
    return HourglassConfig(**(chosen | fields))


def model(**fields: Any) -> HourglassForCausalLM:
    torch.manual_seed(0)
    built = HourglassForCausalLM(config(**fields)).double().eval()
    for p in built.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return built


WAYS = [("average", "repeat"), ("linear", "linear"), ("attention", "attention")]
NESTED = "1@1 1@2 1@6 0@2 1@1"


@pytest.mark.parametrize(("shorten", "lengthen"), WAYS)
def test_logits_see_no_later_token_at_any_length(shorten: str, lengthen: str) -> None:
    """Perturbation at every position and every L mod s, bit for bit, at two nested levels."""
    built = model(hierarchy=NESTED, shorten=shorten, lengthen=lengthen)
    for length in range(1, 14):
        tokens = ids(1, length).expand(length, -1)
        changed = torch.where(torch.eye(length).bool(), tokens % 10 + 1, tokens)
        moved = (built(changed).logits != built(tokens).logits).any(-1)
        assert torch.equal(moved, torch.ones(length, length).triu().bool()), f"{length} tokens"


@pytest.mark.parametrize(("shorten", "lengthen"), WAYS)
def test_the_jacobian_is_lower_triangular(shorten: str, lengthen: str) -> None:
    built = model(hierarchy=NESTED, shorten=shorten, lengthen=lengthen)
    x = random(1, 13, 8)
    jacobian: Any = torch.autograd.functional.jacobian(
        lambda x: built(inputs_embeds=x).logits[0].sum(-1), x
    )
    reached = jacobian[:, 0].abs().sum(-1) > 0
    assert torch.equal(reached, torch.ones(13, 13).tril().bool())


@pytest.mark.parametrize(("shorten", "lengthen"), WAYS)
@pytest.mark.parametrize("padded", [False, True])
def test_steps_equal_the_whole(shorten: str, lengthen: str, padded: bool) -> None:
    """Rows at different places of their groups; pieces of any size."""
    built = model(hierarchy=NESTED, shorten=shorten, lengthen=lengthen)
    tokens, mask = ids(3, 20), torch.ones(3, 20, dtype=torch.long)
    if padded:
        mask[0, :5], mask[1, 17:], mask[2, [3, 4, 9]] = 0, 0, 0
    whole = built(tokens, mask).logits
    for sizes in ([1] * 20, [7, 1, 5, 7], [2, 18]):
        cache, outs = StateCache(), []
        for piece, kept in zip(tokens.split(sizes, 1), mask.split(sizes, 1), strict=True):
            out = built(piece, kept, past_key_values=cache)
            outs.append(out.logits)
        got = torch.cat(outs, 1)
        assert_close(got * mask[..., None], whole * mask[..., None])


@pytest.mark.parametrize("columns", [None, 4])
def test_padding_changes_nothing(columns: int | None) -> None:
    for causal in (True, False):
        torch.manual_seed(0)
        fields = {"hierarchy": NESTED, "columns": columns, "causal": causal}
        built = HourglassModel(config(**fields)).double().eval()
        tokens = ids(2, 11)
        alone = built(tokens).last_hidden_state
        for left, right in ((0, 4), (5, 0), (3, 3)):
            longer = torch.nn.functional.pad(tokens, (left, right), value=3)
            mask = torch.nn.functional.pad(torch.ones(2, 11), (left, right)).long()
            got = built(longer, mask).last_hidden_state[:, left : left + 11]
            assert_close(got, alone)


def test_a_batch_of_prompts_generates_as_each_alone() -> None:
    built: Any = model(hierarchy=NESTED)
    tokens, mask = ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options: Any = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    got = built.generate(tokens, attention_mask=mask, **options)
    for row, start in ((0, 3), (1, 0)):
        alone = built.generate(tokens[row : row + 1, start:], **options)
        assert torch.equal(got[row, start:], alone[0])
    slow = built.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(got, slow)
    beams = built.generate(tokens, attention_mask=mask, num_beams=2, **options)
    slow = built.generate(tokens, attention_mask=mask, num_beams=2, use_cache=False, **options)
    assert torch.equal(beams, slow)


def test_rows_of_the_state_are_independent() -> None:
    built = model(hierarchy=NESTED)
    tokens, more = ids(2, 9), ids(2, 4).flip(1)
    out = built(tokens, use_cache=True)
    carried = out.past_key_values.carried()
    after = built(more, past_key_values=StateCache.of(carried)).logits
    swapped = StateCache.of(select(carried, torch.tensor([1, 0])))
    assert_close(built(more.flip(0), past_key_values=swapped).logits.flip(0), after)
    cleared = StateCache.of(reset(carried, torch.tensor([True, False])))
    got = built(more, past_key_values=cleared).logits
    assert_close(got[0], built(more).logits[0])
    assert_close(got[1], after[1])


def test_factor_one_is_a_plain_transformer_with_the_level_s_residual() -> None:
    built = model(hierarchy="1@1 1@2 1@1", shorten="average", lengthen="repeat")
    level: Any = built.model.layers[0].level
    level.length = longspan.build(
        "hourglass", width=8, heads=2, factor=1, shorten="average", lengthen="repeat", causal=True
    )
    tokens = ids(2, 9)
    x, at = built.model.embed_tokens(tokens), range(9)
    for layer in level.before.layers:
        x, _ = layer(x, at)
    x = level.before.norm(x)
    y = x
    for layer in level.inner.before.layers:
        y, _ = layer(y, at)
    x = x + level.norm(level.inner.before.norm(y))
    for layer in level.after.layers:
        x, _ = layer(x, at)
    assert_close(built(tokens).logits, built.lm_head(built.model.norm(x)))


def test_average_and_repeat_by_the_paper_s_definition() -> None:
    """Group g is the mean of x_{gs−s+1} … x_{gs}, zeros before the first, and goes to gs on."""
    length = longspan.build(
        "hourglass", width=8, factor=3, causal=True, shorten="average", lengthen="repeat"
    )
    x = random(2, 8, 8)
    padded = torch.cat([torch.zeros(2, 2, 8, dtype=torch.float64), x], 1)
    want = torch.stack([padded[:, 3 * g : 3 * g + 3].mean(1) for g in range(3)], 1)
    y, _, plan = length.shorten(x)
    assert_close(y, want)
    u, _ = length.lengthen(y, x, plan)
    assert_close(u, want.repeat_interleave(3, 1)[:, :8])


def test_attention_resampling_by_the_written_out_matrix() -> None:
    """Zero vectors shifted in are content; queries of either resolution see no later token."""
    torch.manual_seed(0)
    length = longspan.build("hourglass", width=8, heads=2, factor=3, causal=True, unit=2).double()
    x = random(2, 8, 8)
    padded = torch.cat([torch.zeros(2, 2, 8, dtype=torch.float64), x], 1)
    pooled = torch.stack([padded[:, 3 * g : 3 * g + 3].mean(1) for g in range(3)], 1)
    tokens, groups = torch.arange(-2, 8) * 2, torch.arange(3) * 6
    y, _, plan = length.shorten(x)
    assert_close(y, written(length.down, pooled, groups, padded, tokens))
    up = x + length.unpool(y).unflatten(2, (3, 8)).flatten(1, 2)[:, :8]
    assert_close(length.lengthen(y, x, plan)[0], written(length.up, up, tokens[2:], y, groups))


def written(block: Any, x: Tensor, at: Tensor, source: Tensor, of_keys: Tensor) -> Tensor:
    attention, out = block.attention, []
    h, s = block.norm(x), block.source_norm(source)
    q, k, v = (attention.project[n](t) for n, t in (("q", h), ("k", s), ("v", s)))
    away = at[:, None] - of_keys
    angle = away[..., None] / 10000 ** (torch.arange(0, 8, 2) / 8)
    r = torch.cat([angle.sin(), angle.cos()], -1).double()
    for n in range(2):
        i = slice(4 * n, 4 * n + 4)
        by = torch.einsum(
            "bld,de,lse->bls", q[..., i] + attention.biases.v[n], attention.distance[n], r
        )
        scores = ((q[..., i] + attention.biases.u[n]) @ k[..., i].mT + by) / 2
        out.append(scores.masked_fill(away < 0, -torch.inf).softmax(-1) @ v[..., i])
    x = x + attention.output(torch.cat(out, -1))
    return x + block.feed_forward(block.feed_forward_norm(x))


GRID = {"columns": 5, "hierarchy": "1@1 1@2x3 1@4x3 0@2x3 1@1"}


@pytest.mark.parametrize(("shorten", "lengthen"), WAYS)
def test_images_see_no_later_token_of_the_raster(shorten: str, lengthen: str) -> None:
    """Rows and columns that the groups do not divide, at two nested levels, bit for bit."""
    built = model(shorten=shorten, lengthen=lengthen, **GRID)
    for length in (1, 4, 5, 6, 11, 23, 26):
        tokens = ids(1, length).expand(length, -1)
        changed = torch.where(torch.eye(length).bool(), tokens % 10 + 1, tokens)
        moved = (built(changed).logits != built(tokens).logits).any(-1)
        assert torch.equal(moved, torch.ones(length, length).triu().bool()), f"{length} tokens"


@pytest.mark.parametrize(("shorten", "lengthen"), WAYS)
def test_images_in_steps_equal_the_whole(shorten: str, lengthen: str) -> None:
    """Rows of the batch at different places of their images; pieces that cross rows."""
    built = model(shorten=shorten, lengthen=lengthen, **GRID)
    tokens, mask = ids(3, 27), torch.ones(3, 27, dtype=torch.long)
    mask[0, :5], mask[1, 22:], mask[2, [3, 4, 9]] = 0, 0, 0
    whole = built(tokens, mask).logits
    assert_close(built(tokens[:1, 5:]).logits, whole[:1, 5:])
    for sizes in ([1] * 27, [7, 1, 12, 7], [2, 25]):
        cache, outs = StateCache(), []
        for piece, kept in zip(tokens.split(sizes, 1), mask.split(sizes, 1), strict=True):
            outs.append(built(piece, kept, past_key_values=cache).logits)
        assert_close(torch.cat(outs, 1) * mask[..., None], whole * mask[..., None])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("linear", [True, False])
def test_images_by_a_loop_over_their_cells(causal: bool, linear: bool) -> None:
    """Group (I, J) has the rows 2I − 1, 2I and the columns 3J − 2 … 3J, unshifted where
    bidirectional; what was made of it goes to the rows 2I, 2I + 1 and the columns 3J … 3J + 2."""
    torch.manual_seed(0)
    ways = ("linear", "linear") if linear else ("average", "repeat")
    length = longspan.build(
        "hourglass", width=8, factor=(2, 3), columns=7, causal=causal, shorten=ways[0],
        lengthen=ways[1],
    ).double()  # fmt: skip
    x = random(2, 33, 8).requires_grad_()
    image = torch.cat([x, torch.zeros(2, 2, 8)], 1).view(2, 5, 7, 8)
    groups = []
    for i in range(3):
        for j in range(3):
            held = []
            for r in range(2 * i - causal, 2 * i - causal + 2):
                for c in range(3 * j - 2 * causal, 3 * j - 2 * causal + 3):
                    there = 0 <= r < 5 and 0 <= c < 7
                    held.append(image[:, r, c] if there else torch.zeros_like(image[:, 0, 0]))
            held = torch.stack(held, 1)
            groups.append(length.pool(held.flatten(1)) if linear else held.mean(1))
    want = torch.stack(groups, 1)
    if causal:  # (2, 2) ends at row 4, column 6, which is not there
        want = want[:, :8]
    y, has, plan = length.shorten(x)
    assert has is None
    assert_close(y, want)
    parts = []
    for r, c in (divmod(n, 7) for n in range(33)):
        part = want[:, r // 2 * 3 + c // 3]
        parts.append(length.unpool(part).view(2, 2, 3, 8)[:, r % 2, c % 3] if linear else part)
    u, _ = length.lengthen(y, x, plan)
    assert_close(u, torch.stack(parts, 1))
    weights, inputs = random(2, 33, 8, seed=3), [x, *length.parameters()]
    by_hand = torch.autograd.grad(
        (torch.stack(parts, 1) * weights).sum(), inputs, retain_graph=True
    )
    assert_close(torch.autograd.grad((u * weights).sum(), inputs), by_hand)


def test_attention_between_grids_by_the_written_out_matrix() -> None:
    """Keys are all tokens, or groups, that end no later in the raster; distances are its own."""
    torch.manual_seed(0)
    length = longspan.build("hourglass", width=8, heads=2, factor=2, columns=4, causal=True)
    length, x = length.double(), random(2, 12, 8)
    image = torch.nn.functional.pad(x.view(2, 3, 4, 8), (0, 0, 1, 0, 1, 0))
    pooled = torch.stack(
        [image[:, i : i + 2, j : j + 2].flatten(1, 2).mean(1) for i in (0, 2) for j in (0, 2)], 1
    )
    tokens, groups = torch.arange(12), torch.tensor([0, 2, 8, 10])
    y, _, plan = length.shorten(x)
    assert_close(y, written(length.down, pooled, groups, x, tokens))
    made = length.unpool(y).view(2, 2, 2, 2, 2, 8)
    made = made.permute(0, 1, 3, 2, 4, 5).reshape(2, 16, 8)[:, :12]
    assert_close(length.lengthen(y, x, plan)[0], written(length.up, x + made, tokens, y, groups))


def test_one_row_is_one_dimension() -> None:
    """A grid wider than the sequence, whose rows are not shortened."""
    both = [
        model(hierarchy="1@1 1@1x3 1@1", columns=40, shorten="linear", lengthen="linear"),
        model(hierarchy="1@1 1@3 1@1", shorten="linear", lengthen="linear"),
    ]
    both[0].load_state_dict(both[1].state_dict())
    assert_close(*(built(ids(2, 14)).logits for built in both))


def test_full_length_layers_of_another_mechanism() -> None:
    built = model(full=[{"id": "longformer", "window": 4}], position="rope")
    whole: Any = built.model.layers[0]
    assert isinstance(whole.level.before.layers[0].mixer, MultiHead)
    tokens = ids(1, 9)
    cache = StateCache()
    steps = [built(t, past_key_values=cache).logits for t in tokens.split(1, 1)]
    assert_close(torch.cat(steps, 1), built(tokens).logits)
    with pytest.raises(LongspanError, match="can see the future"):
        model(full=["reformer-lsh"])


def test_learns_saves_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    built = HourglassForCausalLM(config())
    tokens = torch.arange(24).view(1, -1) % 5 + 1
    optimizer, losses = torch.optim.Adam(built.parameters(), 1e-2), []
    for _ in range(30):
        loss = built(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    for name, p in built.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
    built.eval().save_pretrained(tmp_path)
    again = HourglassForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens).logits, built(tokens).logits)
    shared = [m.biases.u for m in again.modules() if isinstance(m, RelativeAttention)]
    assert len({u.data_ptr() for u in shared}) == 1


def test_recomputed_layers_give_the_same_gradients() -> None:
    built, grads = model(hierarchy=NESTED), []
    for recompute in (False, True):
        if recompute:
            recompute_layers(built)
        built.train().zero_grad()
        built(ids(1, 9), labels=ids(1, 9)).loss.backward()
        grads.append([p.grad.clone() for p in built.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        assert_close(a, b)


def test_both_forms_of_relative_scores_agree() -> None:
    q, weight = random(2, 3, 5, 4), random(3, 4, 6)
    for at_q, at_k in (
        (range(0, 5), range(-4, 5)),
        (range(0, 15, 3), range(-2, 13)),
        (range(0, 5), range(0, 8, 4)),
        (range(0, 10, 2), range(0, 9, 3)),
    ):
        i, j = (numbers(r, q) for r in (at_q, at_k))
        got = relative.shifted(q, weight, at_q, at_k)
        assert_close(got, relative.factorised(q, weight, i, j))


def test_relative_attention_is_the_same_by_tiles() -> None:
    torch.manual_seed(0)
    attention = RelativeAttention(width=8, heads=2, causal=True).double()
    x, source = random(1, 600, 8), random(1, 200, 8)
    at = range(0, 600, 3)
    got, _ = attention(x, range(600), Source(source, at))
    want, _ = attention(x, numbers(range(600), x), Source(source, at))
    assert_close(got, want)


def test_places_of_rows_in_their_groups() -> None:
    place = pool.place(torch.tensor([0, 1, 4]), torch.tensor([5, 1, 0]), 3)
    assert place.groups.tolist() == [2, 0, 0]
    assert place.first.tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    "hierarchy",
    [
        "",
        "2@1 8@3",
        "1@1 1@2x2 1@1",
        "1@0 1@2 1@0",
        "2@1 8@3 2@2",
        "1@2",
        "1@1 1@3 1@4 1@3 1@1",
        "a@1",
        "1",
    ],
)
def test_refuses_a_hierarchy_that_does_not_nest(hierarchy: str) -> None:
    with pytest.raises(LongspanError, match="hierarchy is"):
        config(hierarchy=hierarchy)


@pytest.mark.parametrize(
    "hierarchy", ["1@1 1@2x2x2 1@1", "1@1 1@2x0 1@1", "1@1 1@2x3 1@4x4 1@2x3 1@1", "1@1 1@1x1 1@1"]
)
def test_refuses_a_hierarchy_of_images_that_does_not_nest(hierarchy: str) -> None:
    with pytest.raises(LongspanError, match="or with columns"):
        config(hierarchy=hierarchy, columns=6)


def test_refuses() -> None:
    with pytest.raises(LongspanError, match="with columns one number or two"):
        longspan.build("hourglass", width=8, factor=(2, 3))
    with pytest.raises(LongspanError, match="at least 1"):
        longspan.build("hourglass", width=8, factor=0)
    with pytest.raises(LongspanError, match="even width"):
        longspan.build("hourglass", width=9, heads=3)
