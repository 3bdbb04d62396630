"""Positions against their papers' formulas in loops, against transformers, and in MultiHead."""

import cmath
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import longspan
from longspan.engines import distance
from longspan.engines.distance import shift
from longspan.errors import LongspanError
from longspan.mechanisms.position.alibi import published
from longspan.nn import Attention, MultiHead, Position
from longspan.nn.positions import positions_from, raster
from longspan.nn.rotation import relayout
from longspan.testing.subject import Subject

BATCH, HEADS, WIDTH = 2, 3, 8
MODEL = HEADS * WIDTH


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def relative(id: str, **options: Any) -> Any:
    needed = longspan.registry.options(id)
    sizes = {"width": MODEL, "heads": HEADS, "head_width": WIDTH}
    position = longspan.build(id, **{n: s for n, s in sizes.items() if n in needed}, **options)
    for number, parameter in enumerate(position.parameters()):
        parameter.data = random(*parameter.shape, seed=number) / 2
    return position.double()


def multihead(position: Position | None, *, causal: bool = True, **options: Any) -> MultiHead:
    attention = longspan.build("multi-head-attention", causal=causal, **options)
    torch.manual_seed(0)
    return MultiHead(attention, width=MODEL, heads=HEADS, position=position).double()


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


# Sinusoidal


@pytest.mark.parametrize("width", [8, 7, 2])
@pytest.mark.parametrize("layout", ["interleaved", "concatenated"])
@pytest.mark.parametrize("spacing", ["paper", "inclusive"])
@pytest.mark.parametrize("base", [10000.0, 50.0])
def test_sinusoids_are_the_written_out_ones(width, layout, spacing, base):
    position = longspan.build("sinusoidal-position", layout=layout, spacing=spacing, base=base)
    pos = torch.tensor([[0, 5, 1, 900], [7, 7, 123456, 2]])
    want = torch.zeros(2, 4, width, dtype=torch.float64)
    half = width // 2
    for b in range(2):
        for i in range(4):
            for c in range(half):
                exponent = 2 * c / width if spacing == "paper" else c / max(half - 1, 1)
                angle = pos[b, i].item() / base**exponent
                at = (2 * c, 2 * c + 1) if layout == "interleaved" else (c, half + c)
                want[b, i, at[0]], want[b, i, at[1]] = math.sin(angle), math.cos(angle)
    x = random(2, 4, width)
    assert_close(position.embed(x, pos), x + want)


def test_sinusoids_have_relative_products_and_rotate_with_a_shift():
    position = longspan.build("sinusoidal-position")
    table = position.table(torch.arange(40), WIDTH, torch.float64)
    products = table @ table.T
    assert_close(products[:-3, :-3], products[3:, 3:])
    for c in range(WIDTH // 2):
        angle = 9 * 10000 ** (-2 * c / WIDTH)
        turn = torch.tensor(
            [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        )
        plane = table[:, 2 * c : 2 * c + 2]
        assert_close(plane[9:], plane[:-9] @ turn.double().T)


@pytest.mark.parametrize("name", ["Marian", "RoFormer"])
def test_sinusoids_are_those_of_transformers(name):
    from transformers.models.marian import modeling_marian
    from transformers.models.roformer import modeling_roformer

    module = {"Marian": modeling_marian, "RoFormer": modeling_roformer}[name]
    theirs = getattr(module, f"{name}SinusoidalPositionalEmbedding")(20, WIDTH).create_weight()
    position = longspan.build("sinusoidal-position", layout="concatenated")
    assert_close(position.embed(torch.zeros(1, 20, WIDTH), torch.arange(20)[None])[0], theirs)


def test_sinusoid_angles_are_not_rounded_to_the_dtype_of_the_model():
    position, pos = longspan.build("sinusoidal-position"), torch.tensor([[4099, 100003]])
    coarse = position.embed(torch.zeros(1, 2, WIDTH, dtype=torch.bfloat16), pos)
    fine = position.embed(torch.zeros(1, 2, WIDTH, dtype=torch.float64), pos)
    assert coarse.dtype == torch.bfloat16
    assert (coarse.double() - fine).abs().max() < 0.01


def test_sinusoids_in_two_dimensions_give_half_the_channels_to_each_axis():
    x, grid = random(1, 6, WIDTH), raster(torch.arange(6), 3)
    one = longspan.build("sinusoidal-position")
    want = torch.cat([one.table(grid[:, a], WIDTH // 2, torch.float64) for a in (0, 1)], -1)
    axial = longspan.build("sinusoidal-position", axial=True)
    assert_close(axial.embed(x, grid[None]), x + want)
    flat = longspan.build("sinusoidal-position", axial=True, columns=3)
    assert_close(flat.embed(x, torch.arange(6)[None]), x + want)
    with pytest.raises(LongspanError, match="columns="):
        axial.embed(x, torch.arange(6)[None])
    with pytest.raises(LongspanError, match="axial=True"):
        longspan.build("sinusoidal-position", columns=3)


@pytest.mark.parametrize("bad", [{"layout": "pairs"}, {"spacing": "even"}])
def test_sinusoids_refuse_unknown_forms(bad):
    with pytest.raises((LongspanError, TypeError)):
        longspan.build("sinusoidal-position", **bad)


# Both embeddings


@pytest.mark.parametrize("id", ["sinusoidal-position", "learned-position"])
def test_a_cached_step_adds_the_row_of_its_own_position(id):
    table = {"width": WIDTH, "length": 9} if id == "learned-position" else {}
    position = longspan.build(id, offset=2, **table).double()
    x = random(BATCH, 9, WIDTH)
    whole = position.embed(x)
    assert_close(position.embed(x, torch.arange(9).expand(BATCH, 9)), whole)
    assert_close(position.embed(x[:, 6:], 6), whole[:, 6:])
    steps = [position.embed(x[:, i : i + 1], torch.full((BATCH, 1), i)) for i in range(9)]
    assert_close(torch.cat(steps, 1), whole)
    assert position.embed(x[:, :0]).shape == (BATCH, 0, WIDTH)


def test_padding_is_not_counted():
    keep = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]]).bool()
    pos = positions_from(keep)
    assert pos.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2], [0, 0, 1, 1, 2]]
    assert_close(
        positions_from(keep[:, 2:], keep[:, :2].sum(1))[keep[:, 2:]], pos[:, 2:][keep[:, 2:]]
    )
    position, x = (
        longspan.build("learned-position", width=WIDTH, length=3).double(),
        random(1, 5, WIDTH),
    )
    padded = position.embed(x, pos[:1])
    assert_close(padded[:, 2:], position.embed(x[:, 2:]))


# Learned


def test_learned_positions_are_rows_of_the_table_with_gradients():
    position = longspan.build("learned-position", width=WIDTH, length=5, offset=2).double()
    pos, x, weight = (
        torch.tensor([[4, 0, 4], [1, 2, 3]]),
        random(2, 3, WIDTH),
        random(2, 3, WIDTH, seed=1),
    )
    (position.embed(x, pos) * weight).sum().backward()
    want = torch.zeros(7, WIDTH, dtype=torch.float64)
    for b in range(2):
        for i in range(3):
            assert_close(position.embed(x, pos)[b, i], x[b, i] + position.table[pos[b, i] + 2])
            want[pos[b, i] + 2] += weight[b, i]
    assert_close(position.table.grad, want)


def test_learned_positions_are_those_of_gpt2_and_bert():
    from transformers import BertConfig, GPT2Config, GPT2Model
    from transformers.models.bert.modeling_bert import BertEmbeddings

    ids = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])
    gpt2 = GPT2Model(
        GPT2Config(vocab_size=11, n_embd=WIDTH, n_layer=1, n_head=2, n_positions=6)
    ).eval()
    position = longspan.build("learned-position", width=WIDTH, length=6)
    position.load_state_dict({"table": gpt2.wpe.weight})
    pos = torch.tensor([[2, 3, 4, 5], [0, 1, 2, 3]])
    states = gpt2(ids, position_ids=pos, output_hidden_states=True).hidden_states
    assert_close(position.embed(gpt2.wte(ids), pos), states[0])

    config = BertConfig(vocab_size=11, hidden_size=WIDTH, max_position_embeddings=6)
    bert = BertEmbeddings(config).eval()
    position.load_state_dict({"table": bert.position_embeddings.weight})
    words = bert.word_embeddings(ids) + bert.token_type_embeddings(torch.zeros_like(ids))
    assert_close(bert.LayerNorm(position.embed(words)), bert(ids))


def test_learned_positions_refuse_what_they_do_not_know():
    position, x = (
        longspan.build("learned-position", width=WIDTH, length=4).double(),
        random(1, 3, WIDTH),
    )
    with pytest.raises(LongspanError, match=r"built for 4 positions and got position 4.*length=5"):
        position.embed(x, torch.tensor([[2, 3, 4]]))
    with pytest.raises(LongspanError, match="got position 4"):
        position.embed(x, 2)
    with pytest.raises(LongspanError, match="got -1"):
        position.embed(x, torch.tensor([[-1, 0, 1]]))


def test_resizing_by_each_way():
    position = longspan.build("learned-position", width=WIDTH, length=4, offset=2).double().eval()
    special, rows = position.table.data[:2], position.table.data[2:]
    for how, length in (("truncate", 3), ("tile", 11), ("interpolate", 7), ("tile", 3)):
        resized = position.resize(length, how)
        assert type(resized) is type(position)
        assert not resized.training
        assert resized.table.requires_grad
        assert resized.table.shape == (2 + length, WIDTH)
        assert_close(resized.table.data[:2], special)
        assert resized.embed(random(1, length, WIDTH)).shape == (1, length, WIDTH)
        with pytest.raises(LongspanError, match=f"built for {length} positions"):
            resized.embed(random(1, 1, WIDTH), length)
    tiled = position.resize(12).table.data[2:]
    for i in range(12):
        assert_close(tiled[i], rows[i % 4])
    line = position.resize(7, "interpolate").table.data[2:]
    assert_close(line[::2], rows)
    assert_close(line[1::2], (rows[1:] + rows[:-1]) / 2)
    assert_close(position.resize(4, "interpolate").table.data, position.table.data)
    assert_close(position.table.data[2:], rows)
    assert position.length == 4
    for length, how in ((5, "truncate"), (0, "tile")):
        with pytest.raises(LongspanError, match="cannot"):
            position.resize(length, how)
    with pytest.raises((LongspanError, TypeError)):
        position.resize(5, "stretch")


# RoPE

ROPES = {
    "interleaved": {},
    "half-split": {"layout": "half-split"},
    "partial": {"channels": 4, "base": 100.0},
    "partial-half": {"channels": 6, "layout": "half-split"},
    "scaled": {"scaling": 4.0},
}


def turned(x: Tensor, at: float, channels: int, layout: str, base: float = 10000.0) -> Tensor:
    """One vector as complex planes times exp(i · at · θ_c)."""
    out = list(x)
    for c in range(channels // 2):
        a, b = (2 * c, 2 * c + 1) if layout == "interleaved" else (c, c + channels // 2)
        turn = cmath.exp(1j * at * base ** (-2 * c / channels))
        out[a] = x[a] * turn.real - x[b] * turn.imag
        out[b] = x[b] * turn.real + x[a] * turn.imag
    return torch.stack(out)


@pytest.mark.parametrize("options", ROPES.values(), ids=ROPES)
def test_rope_turns_complex_planes(options):
    position = longspan.build("rope", **options)
    x, weight = (
        random(BATCH, HEADS, 5, WIDTH).requires_grad_(),
        random(BATCH, HEADS, 5, WIDTH, seed=1),
    )
    pos = torch.tensor([[0, 3, 4, 100, 1], [9, 8, 7, 6, 5]])
    channels, layout = options.get("channels", WIDTH), options.get("layout", "interleaved")
    want = torch.stack(
        [
            turned(
                x[b, h, i],
                pos[b, i].item() / options.get("scaling", 1),
                channels,
                layout,
                options.get("base", 10000.0),
            )
            for b in range(BATCH)
            for h in range(HEADS)
            for i in range(5)
        ]
    ).view_as(x)
    got = position.rotate(x, pos)
    assert_close(got, want)
    assert_close(*(torch.autograd.grad((y * weight).sum(), x)[0] for y in (got, want)))
    assert_close(got.norm(dim=-1), x.norm(dim=-1))
    assert_close(got[0, :, 0], x[0, :, 0])
    assert_close(position.rotate(x, pos[1]), position.rotate(x, pos[1:].expand(BATCH, 5)))
    strided = x.detach().transpose(2, 3).contiguous().transpose(2, 3)
    assert_close(position.rotate(strided, pos), got)
    assert position.rotate(x[:, :, :0], pos[:, :0]).shape == (BATCH, HEADS, 0, WIDTH)


def test_rope_of_no_channels_changes_nothing():
    x = random(1, 1, 4, WIDTH)
    assert torch.equal(longspan.build("rope", channels=0).rotate(x, torch.arange(4)), x)


@pytest.mark.parametrize("channels", [WIDTH, 4])
def test_converted_weights_give_the_scores_of_the_other_layout(channels):
    x, pos = random(1, 6, MODEL), torch.arange(6)
    weights = {n: random(MODEL, MODEL, seed=s) for s, n in enumerate("qk", 1)}
    scores = {}
    for layout in ("interleaved", "half-split"):
        rope = longspan.build("rope", layout=layout, channels=channels)
        q, k = (
            rope.rotate(rearrange(x @ w.T, "B L (H D) -> B H L D", H=HEADS), pos)
            for w in (
                weights.values()
                if layout == "interleaved"
                else (
                    relayout(w, heads=HEADS, to=layout, channels=channels) for w in weights.values()
                )
            )
        )
        scores[layout] = q @ k.mT
    assert_close(scores["interleaved"], scores["half-split"])
    there = relayout(weights["q"], heads=HEADS, to="half-split", channels=channels)
    assert not torch.equal(there, weights["q"])
    assert torch.equal(
        relayout(there, heads=HEADS, to="interleaved", channels=channels), weights["q"]
    )
    bias = relayout(weights["q"][:, 0], heads=HEADS, to="half-split", channels=channels)
    assert torch.equal(bias, there[:, 0])


@pytest.mark.parametrize("layout", ["interleaved", "half-split"])
def test_axial_rope_gives_half_of_the_planes_to_each_axis(layout):
    position, x = longspan.build("rope", axial=True, layout=layout), random(1, 1, 6, WIDTH)
    grid = raster(torch.arange(6), 3)
    got = position.rotate(x, grid)
    for i in range(6):
        want = x[0, 0, i].clone()
        for c in range(WIDTH // 2):
            axis, plane = divmod(c, WIDTH // 4)
            a, b = (2 * c, 2 * c + 1) if layout == "interleaved" else (c, c + WIDTH // 2)
            turn = cmath.exp(1j * int(grid[i, axis]) * 10000 ** (-2 * plane / (WIDTH // 2)))
            value = torch.complex(x[0, 0, i, a], x[0, 0, i, b]) * turn
            want[a], want[b] = value.real, value.imag
        assert_close(got[0, 0, i], want)
    flat = longspan.build("rope", axial=True, layout=layout, columns=3)
    assert_close(flat.rotate(x, torch.arange(6)), got)
    assert_close(flat.rotate(x, torch.arange(6)[None]), got)
    assert_close(position.rotate(x, grid[None]), got)
    scores, moved = (a @ a.mT for a in (got, position.rotate(x, grid + torch.tensor([5, 2]))))
    assert_close(scores, moved)
    with pytest.raises(LongspanError, match="columns="):
        position.rotate(x, torch.arange(6))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_rope_in_linear_attention_turns_the_numerator_alone(causal, masked):
    length = 6
    keep = torch.tensor([[0, 1, 1, 0, 1, 1]]).bool() if masked else torch.ones(1, 6).bool()
    torch.manual_seed(0)
    attention = longspan.build("linear-transformer", causal=causal, rotated=True, eps=0.0)
    heads = MultiHead(attention, width=WIDTH, heads=1, position=longspan.build("rope")).double()
    x = random(1, length, WIDTH)
    got, _ = heads(x, keep=keep if masked else None)
    q, k = (nn.functional.elu(heads.project[n](x))[0] + 1 for n in "qk")
    v, at = heads.project["v"](x)[0], (keep[0].long().cumsum(0) - 1).tolist()
    for i in range(length):
        if not keep[0, i]:
            continue
        above, below = torch.zeros(WIDTH, dtype=torch.float64), 0.0
        for j in range(i + 1 if causal else length):
            if not keep[0, j]:
                continue
            weight = 0.0
            for c in range(WIDTH // 2):
                one, other = (
                    torch.complex(t[n, 2 * c], t[n, 2 * c + 1]) for t, n in ((q, i), (k, j))
                )
                turn = cmath.exp(1j * (at[i] - at[j]) * 10000 ** (-2 * c / WIDTH))
                weight += (one * other.conj() * turn).real
            above, below = above + weight * v[j], below + q[i] @ k[j]
        assert_close(got[0, i], heads.output(above / below))


def test_rotated_features_stream_and_differ_from_rotated_queries():
    x, outs, state = random(BATCH, 9, MODEL), [], None
    found = {}
    for rotated in (True, False):
        attention = longspan.build("linear-transformer", causal=True, rotated=rotated)
        torch.manual_seed(0)
        heads = MultiHead(
            attention, width=MODEL, heads=HEADS, position=longspan.build("rope")
        ).double()
        found[rotated], _ = heads(x)
        if rotated:
            for piece in x.split([4, 1, 4], 1):
                y, state = heads(piece, state)
                outs.append(y)
    assert_close(torch.cat(outs, 1), found[True])
    assert not torch.allclose(found[True], found[False])


def test_rope_computes_its_tables_in_float32_and_keeps_none():
    rope, x = longspan.build("rope").bfloat16(), random(1, 1, 3, WIDTH).bfloat16()
    pos = torch.tensor([4099, 65537, 100003])
    assert torch.equal(rope.rotate(x, pos), rope.rotate(x.float(), pos).bfloat16())
    assert not rope.state_dict()
    assert not list(rope.buffers())
    assert not any(isinstance(t, Tensor) for t in vars(rope).values())


@pytest.mark.parametrize(
    ("options", "width"),
    [
        ({}, 7),
        ({"channels": 10}, 8),
        ({"channels": 3}, 8),
        ({"channels": -2}, 8),
        ({"axial": True}, 6),
    ],
)
def test_rope_refuses_channels_that_do_not_pair(options, width):
    with pytest.raises(LongspanError, match="cannot rotate"):
        longspan.build("rope", **options).rotate(random(1, 1, 6, width), torch.arange(6))


def test_rope_refuses_unknown_options():
    with pytest.raises((LongspanError, TypeError)):
        longspan.build("rope", layout="pairs")
    with pytest.raises(LongspanError, match="axial=True"):
        longspan.build("rope", columns=3)
    with pytest.raises(LongspanError, match="5 heads"):
        relayout(random(MODEL, 2), heads=5, to="half-split")


# ALiBi


def test_alibi_slopes_are_the_published_ones():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    assert published(8) == [1 / 2**n for n in range(1, 9)]
    assert published(12)[8:] == [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    for heads in range(1, 34):
        slopes = torch.tensor(published(heads))
        bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
        assert_close(bloom[:, 0, 1], slopes)
        assert_close(-build_mpt_alibi_tensor(heads, 2)[:, 0, 0], slopes)


@pytest.mark.parametrize("form", ["causal", "symmetric", "asymmetric"])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(5, 5), (3, 7), (1, 4), (6, 2)])
def test_alibi_is_the_distance_times_the_slope(form, learnable, length, keys):
    options = {"future": [3.0, 0.5, 0.0]} if form == "asymmetric" else {}
    position = longspan.build("alibi", heads=HEADS, form=form, learnable=learnable, **options)
    q, k = random(BATCH, HEADS, length, WIDTH), random(BATCH, HEADS, keys, WIDTH)
    pos_q, pos_k = torch.arange(keys, keys + length) - 2, torch.arange(keys)
    got = position.bias(q, k, pos_q, pos_k)
    want = torch.zeros(1, HEADS, length, keys, dtype=torch.float64)
    for h, (past, ahead) in enumerate(zip(published(HEADS), [3.0, 0.5, 0.0], strict=True)):
        for i in range(length):
            for j in range(keys):
                far = int(pos_q[i] - pos_k[j])
                future = {"causal": -math.inf, "symmetric": past * far, "asymmetric": ahead * far}
                want[0, h, i, j] = -past * far if far >= 0 else future[form]
    assert_close(got.detach(), want, atol=1e-6, rtol=1e-6)
    assert bool((got <= 0).all())
    assert len(list(position.parameters())) == learnable * (2 if form == "asymmetric" else 1)
    if learnable:
        got.masked_fill(got.isinf(), 0).sum().backward()
        far = pos_q[:, None] - pos_k
        far = (far.abs() if form == "symmetric" else far.clamp(min=0)).sum()
        assert_close(position.past.grad, -far.float().expand(HEADS))


def test_alibi_looks_shortly_ahead_where_it_looks_far_back():
    position = longspan.build("alibi", heads=2, form="asymmetric")
    assert position.future == position.past[::-1]


def test_alibi_with_plain_and_extreme_slopes():
    x = random(BATCH, 7, MODEL)
    plain = multihead(None)
    none = multihead(relative("alibi", slopes=[0.0] * HEADS))
    assert_close(none(x)[0], plain(x)[0])
    alone = multihead(relative("alibi", slopes=[1e9] * HEADS))
    assert_close(alone(x)[0], alone.output(alone.project["v"](x)))


def test_alibi_by_distance_is_the_key_position_form_under_a_causal_mask():
    q, k = random(1, HEADS, 6, WIDTH), random(1, HEADS, 6, WIDTH, seed=1)
    pos = torch.arange(6)
    slopes = torch.tensor(published(HEADS), dtype=torch.float64)[:, None, None]
    hidden = torch.ones(6, 6).triu(1).bool()
    weights = [
        (q @ k.mT + bias).masked_fill(hidden, -math.inf).softmax(-1)
        for bias in (
            slopes * pos,
            *(relative("alibi", form=f).bias(q, k, pos, pos) for f in ("causal", "symmetric")),
        )
    ]
    assert_close(weights[0], weights[1])
    assert_close(weights[0], weights[2])


def test_alibi_resolves_far_neighbours_in_bfloat16():
    q = k = torch.zeros(1, HEADS, 2, WIDTH, dtype=torch.bfloat16)
    position = longspan.build("alibi", heads=HEADS).bfloat16()
    bias = position.bias(q, k, torch.tensor([100000, 100001]), torch.tensor([0, 1]))
    slopes = torch.tensor(published(HEADS))
    assert bias.dtype == torch.float32
    assert_close(bias[0, :, 0, 1] - bias[0, :, 0, 0], slopes, rtol=0.1, atol=0)


def test_alibi_refuses_what_does_not_fit():
    with pytest.raises((LongspanError, TypeError)):
        longspan.build("alibi", heads=2, form="both")
    with pytest.raises(LongspanError, match="one per head"):
        longspan.build("alibi", heads=2, slopes=[1.0])
    with pytest.raises(LongspanError, match="asymmetric"):
        longspan.build("alibi", heads=2, future=[1.0, 1.0])


# Transformer-XL

SHAPES = [(4, 7), (5, 5), (1, 6), (1, 1), (3, 4), (6, 2)]


def xl_by_loop(position: Any, q: Tensor, k: Tensor, pos_q: Tensor, pos_k: Tensor) -> Tensor:
    project = position.project.weight.view(HEADS, WIDTH, MODEL)
    bias = []
    for i in range(len(pos_q)):
        for j in range(len(pos_k)):
            far = int(pos_q[i] - pos_k[j])
            if position.clamp_len is not None:
                far = max(min(far, position.clamp_len), -position.clamp_len)
            angles = [far / 10000 ** (2 * c / MODEL) for c in range(MODEL // 2)]
            waves = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            for h in range(HEADS):
                r = project[h] @ torch.tensor(waves, dtype=torch.float64)
                score = k[:, h, j] @ position.u[h] + (q[:, h, i] + position.v[h]) @ r
                bias.append(score / math.sqrt(WIDTH))
    return torch.stack(bias).view(len(pos_q), len(pos_k), HEADS, -1).permute(3, 2, 0, 1)


@pytest.mark.parametrize(("length", "keys"), SHAPES)
@pytest.mark.parametrize("clamp_len", [None, 2])
@pytest.mark.parametrize("offset", [0, 5])
def test_xl_is_the_double_loop_with_gradients(length, keys, clamp_len, offset):
    position = relative("transformer-xl-relative-position", clamp_len=clamp_len)
    q = random(BATCH, HEADS, length, WIDTH).requires_grad_()
    k = random(BATCH, HEADS, keys, WIDTH, seed=1).requires_grad_()
    weight = random(BATCH, HEADS, length, keys, seed=2)
    # The last query at the last key plus `offset`: the two-sided range, and one beyond the keys.
    pos_q, pos_k = torch.arange(length) + keys - length + offset, torch.arange(keys)
    inputs = [q, k, *position.parameters()]
    got = position.bias(q, k, pos_q, pos_k)
    want = xl_by_loop(position, q, k, pos_q, pos_k)
    assert_close(got, want)
    assert_close(*(torch.autograd.grad((bias * weight).sum(), inputs) for bias in (got, want)))
    assert_close(position.bias(q, k, pos_q + 1000, pos_k + 1000), got)


@pytest.mark.parametrize(("length", "keys"), SHAPES)
def test_xl_shift_is_a_gather_by_distance(length, keys):
    x = random(BATCH, HEADS, length, length + keys - 1)
    index = (length - 1 - torch.arange(length)[:, None]) + torch.arange(keys)
    want = x.gather(3, index.expand(BATCH, HEADS, length, keys))
    assert torch.equal(shift(x)[..., :keys], want)


def test_xl_with_no_keys_is_empty():
    position = relative("transformer-xl-relative-position")
    q, k = random(BATCH, HEADS, 4, WIDTH), random(BATCH, HEADS, 0, WIDTH)
    assert position.bias(q, k, torch.arange(4), torch.arange(0)).shape == (BATCH, HEADS, 4, 0)


def test_xl_shares_u_and_v_but_not_the_projection():
    first, second = (relative("transformer-xl-relative-position") for _ in range(2))
    layers = nn.ModuleList([multihead(first), multihead(second.share(first))])
    shared = [p for p in first.parameters() if any(p is other for other in second.parameters())]
    assert {id(p) for p in shared} == {id(first.u), id(first.v)}
    x = random(BATCH, 5, MODEL)
    for layer in layers:
        x = layer(x)[0]
    x.square().sum().backward()
    assert all(
        p.grad is not None and bool(p.grad.abs().sum())
        for p in (*first.parameters(), *second.parameters())
    )
    other = longspan.build("transformer-xl-relative-position", width=MODEL, heads=2, head_width=4)
    with pytest.raises(LongspanError, match="equal heads"):
        second.share(other)


def test_xl_starts_from_small_weights_and_refuses_a_negative_clamp():
    position = longspan.build("transformer-xl-relative-position", width=64, heads=8, head_width=8)
    for parameter in position.parameters():
        assert 0.01 < parameter.std() < 0.03
    assert position.project.bias is None
    with pytest.raises(LongspanError, match="clamp_len"):
        longspan.build(
            "transformer-xl-relative-position", width=8, heads=1, head_width=8, clamp_len=-1
        )


@pytest.mark.parametrize("attn_type", ["uni", "bi"])
@pytest.mark.parametrize(("memory", "clamp_len"), [(0, -1), (4, -1), (4, 3)])
def test_xl_is_the_encoding_of_xlnet(attn_type, memory, clamp_len):
    from transformers import XLNetConfig, XLNetModel

    torch.manual_seed(0)
    xlnet: Any = XLNetModel(
        XLNetConfig(
            vocab_size=11, d_model=MODEL, n_layer=2, n_head=HEADS, d_inner=16, dropout=0.0,
            attn_type=attn_type, clamp_len=clamp_len, mem_len=9, initializer_range=0.3,
        )
    ).eval()  # fmt: skip
    ids, past = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]), torch.randn(2, memory, MODEL)
    mems = [past.transpose(0, 1), past.transpose(0, 1).flip(0)] if memory else None
    want = xlnet(ids, mems=mems, use_mems=True).last_hidden_state

    x = xlnet.word_embedding(ids)
    for layer, before in zip(xlnet.layer, (past, past.flip(1)), strict=True):
        theirs = layer.rel_attn
        position = longspan.build(
            "transformer-xl-relative-position",
            width=MODEL,
            heads=HEADS,
            head_width=WIDTH,
            clamp_len=None if clamp_len < 0 else clamp_len,
        )
        position.u.data, position.v.data = theirs.r_w_bias.data, theirs.r_r_bias.data
        position.project.weight.data = theirs.r.data.flatten(1).T
        attention = longspan.build("multi-head-attention", causal=attn_type == "uni")
        ours = MultiHead(attention, width=MODEL, heads=HEADS, position=position, biases=False)
        for name in "qkv":
            ours.project[name].weight.data = getattr(theirs, name).data.flatten(1).T
        ours.output.weight.data = theirs.o.data.flatten(1)
        y, _ = ours(x, context=torch.cat([before, x], 1))
        x = layer.ff(theirs.layer_norm(x + y))
    assert_close(x, want, atol=2e-5, rtol=1e-4)


# Whole models of transformers, one attention layer at a time


def recorded(model: nn.Module, attention: nn.Module) -> tuple[Tensor, Tensor]:
    """What an attention layer got, and what it gave (without its residual)."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, args: tuple, kwargs: dict, out: tuple) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        residual = args[1] if type(attention).__name__ == "BloomAttention" else 0
        calls.append((x.detach(), out[0].detach() - residual))

    attention.register_forward_hook(record, with_kwargs=True)
    model.eval()(torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]]))
    return calls[0]


def agrees(
    position: Position, causal: bool, model: nn.Module, attention: nn.Module, weights: Callable
) -> None:
    x, want = recorded(model, attention)
    linears = {n: tuple(t.detach() for t in pair) for n, pair in weights(attention).items()}
    ours = MultiHead(
        longspan.build("multi-head-attention", causal=causal),
        width=MODEL,
        heads=HEADS,
        kv_heads=len(linears["k"][0]) // WIDTH,
        position=position,
    )
    if "o" not in linears:
        linears["o"] = torch.eye(MODEL), torch.zeros(MODEL)
    for name, (weight, *bias) in linears.items():
        linear = ours.output if name == "o" else ours.project[name]
        linear.load_state_dict(
            {"weight": weight, "bias": bias[0] if bias else torch.zeros(len(weight))}
        )
    assert_close(ours(x)[0], want, atol=1e-5, rtol=1e-4)


def fused(linear: nn.Linear, order: str) -> dict[str, tuple[Tensor, ...]]:
    parts = (
        rearrange(p, f"({order} D) ... -> three (H D) ...", three=3, D=WIDTH)
        for p in linear.parameters()
    )
    return dict(zip("qkv", zip(*parts, strict=True), strict=True))


def separate(*names: str) -> Callable[[nn.Module], dict[str, tuple[Tensor, ...]]]:
    return lambda a: {
        short: tuple(getattr(a, name).parameters())
        for short, name in zip("qkvo", names, strict=False)
    }


def test_rope_is_that_of_llama():
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=MODEL, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=1, initializer_range=0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    model: Any = LlamaModel(config)
    rope = longspan.build("rope", layout="half-split", base=500.0)
    weights = separate("q_proj", "k_proj", "v_proj", "o_proj")
    agrees(rope, True, model, model.layers[0].self_attn, weights)


def test_rope_is_that_of_gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXModel

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=11, hidden_size=MODEL, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=HEADS, initializer_range=0.5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )  # fmt: skip
    model: Any = GPTNeoXModel(config)
    rope = longspan.build("rope", layout="half-split", channels=4)

    def weights(a: Any) -> dict[str, tuple[Tensor, ...]]:
        return {**fused(a.query_key_value, "H three"), "o": tuple(a.dense.parameters())}

    agrees(rope, True, model, model.layers[0].attention, weights)


def test_rope_is_that_of_gptj():
    from transformers import GPTJConfig, GPTJModel

    torch.manual_seed(0)
    config = GPTJConfig(
        vocab_size=11, n_embd=MODEL, n_layer=1, n_head=HEADS, rotary_dim=4, n_positions=16,
        initializer_range=0.5,
    )  # fmt: skip
    model: Any = GPTJModel(config)
    rope = longspan.build("rope", channels=4)
    agrees(rope, True, model, model.h[0].attn, separate("q_proj", "k_proj", "v_proj", "out_proj"))


def test_rope_is_that_of_roformer():
    from transformers import RoFormerConfig, RoFormerModel

    torch.manual_seed(0)
    config = RoFormerConfig(
        vocab_size=11, hidden_size=MODEL, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=HEADS, max_position_embeddings=16, initializer_range=0.5,
    )  # fmt: skip
    model: Any = RoFormerModel(config)
    model.encoder.embed_positions.weight.data = model.encoder.embed_positions.create_weight()
    attention = model.encoder.layer[0].attention.self
    agrees(longspan.build("rope"), False, model, attention, separate("query", "key", "value"))


def test_axial_rope_is_that_of_qwen2_vl():
    from transformers.models.qwen2_vl import modeling_qwen2_vl as qwen
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig

    config = Qwen2VLVisionConfig(embed_dim=MODEL, num_heads=HEADS)
    grid, x = raster(torch.arange(6), 3), random(1, HEADS, 6, WIDTH).float()
    cos, sin = qwen.Qwen2VLVisionRotaryEmbedding(config)(x, grid)
    want, _ = qwen.apply_rotary_pos_emb_vision(x[0].transpose(0, 1), x[0].transpose(0, 1), cos, sin)
    rope = longspan.build("rope", axial=True, layout="half-split")
    assert_close(rope.rotate(x, grid)[0], want.transpose(0, 1))


def test_alibi_is_that_of_bloom():
    from transformers import BloomConfig, BloomModel

    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=11, hidden_size=MODEL, n_layer=1, n_head=HEADS, initializer_range=0.5
    )
    model: Any = BloomModel(config)

    def weights(a: Any) -> dict[str, tuple[Tensor, ...]]:
        return {**fused(a.query_key_value, "H three"), "o": tuple(a.dense.parameters())}

    position = longspan.build("alibi", heads=HEADS)
    agrees(position, True, model, model.h[0].self_attention, weights)


@pytest.mark.parametrize("form", ["causal", "symmetric"])
def test_alibi_is_that_of_mpt(form):
    from transformers import MptConfig, MptModel

    torch.manual_seed(0)
    model: Any = MptModel(
        MptConfig(vocab_size=11, d_model=MODEL, n_layers=1, n_heads=HEADS, initializer_range=0.5)
    )

    def weights(a: Any) -> dict[str, tuple[Tensor, ...]]:
        return {**fused(a.Wqkv, "three H"), "o": tuple(a.out_proj.parameters())}

    position = longspan.build("alibi", heads=HEADS, form=form)
    agrees(position, True, model, model.blocks[0].attn, weights)


# Within MultiHead

RELATIVE = {
    "rope": ("rope", {}),
    "rope-half": ("rope", {"layout": "half-split", "channels": 4}),
    "rope-axial": ("rope", {"axial": True, "columns": 4}),
    "alibi": ("alibi", {}),
    "alibi-causal": ("alibi", {"form": "causal"}),
    "alibi-learnable": ("alibi", {"form": "asymmetric", "learnable": True}),
    "xl": ("transformer-xl-relative-position", {}),
    "xl-clamped": ("transformer-xl-relative-position", {"clamp_len": 3}),
    "shaw": ("shaw-relative-position", {"reach": 4}),
    "shaw-keys": ("shaw-relative-position", {"reach": 3, "values": False, "shared": True}),
    "shaw-values": ("shaw-relative-position", {"reach": 20, "keys": False}),
    "infused": ("sinusoidal-position", {"into": "queries-and-keys"}),
}
relatives = pytest.mark.parametrize("choice", RELATIVE.values(), ids=RELATIVE)


@relatives
@pytest.mark.parametrize("sizes", [(5, 1, 7), (1,) * 13, (13,)])
def test_streaming_equals_the_whole(choice, sizes):
    id, options = choice
    heads, x = multihead(relative(id, **options)), random(BATCH, 13, MODEL)
    whole, _ = heads(x)
    outs, state = [], None
    for piece in x.split(sizes, dim=1):
        y, state = heads(piece, state)
        outs.append(y)
    assert_close(torch.cat(outs, 1), whole)
    assert not torch.allclose(whole, multihead(None)(x)[0])


@relatives
def test_later_queries_may_see_a_memory(choice):
    id, options = choice
    heads, x = multihead(relative(id, **options)), random(BATCH, 9, MODEL)
    assert_close(heads(x[:, 5:], context=x)[0], heads(x)[0][:, 5:])


@relatives
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_change_nothing_and_gradients_reach_every_parameter(choice, causal):
    id, options = choice
    x, grads, outs = random(1, 300, MODEL), [], []
    for backend in ("tiled", "explicit"):
        heads = multihead(relative(id, **options), causal=causal, backend=backend)
        y, _ = heads(x)
        (y * random(*y.shape, seed=3)).sum().backward()
        outs.append(y)
        # The asymmetric form has no use for the future's slopes under a causal mask.
        unused = {"position.future"} if causal else set()
        grads.append([p.grad for n, p in heads.named_parameters() if n not in unused])
    assert_close(*outs)
    assert_close(*grads)
    assert all(g is not None and bool(g.abs().sum()) for g in grads[0])


@pytest.mark.parametrize(
    "choice", [c for n, c in RELATIVE.items() if n not in ("rope-axial", "infused")]
)
def test_shifting_all_positions_changes_no_score(choice):
    id, options = choice
    position = relative(id, **options)
    q, k = random(1, HEADS, 5, WIDTH), random(1, HEADS, 5, WIDTH, seed=1)

    def scores(pos: Tensor) -> Tensor:
        if "rotate" in position.acts:
            return position.rotate(q, pos) @ position.rotate(k, pos).mT
        if position.acts == {"spread"}:
            return position.spread((q @ k.mT).softmax(-1), pos, pos)
        return q @ k.mT + position.bias(q, k, pos, pos)

    assert_close(scores(torch.arange(5) + 321), scores(torch.arange(5)))


@pytest.mark.parametrize(
    "id", ["alibi", "transformer-xl-relative-position", "shaw-relative-position"]
)
def test_a_bias_holds_no_more_than_heads_queries_keys(id):
    length, keys = 48, 96
    position = relative(id)
    q, k = random(1, HEADS, length, WIDTH), random(1, HEADS, keys, WIDTH)
    with Largest() as mode, torch.no_grad():
        position.bias(q, k, torch.arange(length) + keys - length, torch.arange(keys))
    factor = 1 if id == "alibi" else (length + keys) / keys
    assert mode.elements <= factor * HEADS * length * keys


@pytest.mark.parametrize(
    "id", ["alibi", "transformer-xl-relative-position", "shaw-relative-position"]
)
def test_an_attention_without_bias_is_refused(id):
    class Plain(Attention):
        def forward(self, q, k, v, state=None, *, keep=None):
            return v, None

    position = relative(id)
    with pytest.raises(LongspanError, match="which biases scores"):
        MultiHead(Plain(), width=MODEL, heads=HEADS, position=position)


def test_padding_on_the_left_moves_no_score():
    keep = torch.ones(1, 9, dtype=torch.bool)
    keep[:, :3] = False
    x = random(1, 9, MODEL)
    for id, options in RELATIVE.values():
        if options.get("axial"):
            continue
        heads = multihead(relative(id, **options))
        assert_close(heads(x, keep=keep)[0][:, 3:], heads(x[:, 3:])[0])


POSITIONS = [card.id for card in longspan.find(kind="position")]
T = torch.zeros(1)
HOOKS: dict[str, tuple] = {
    "embed": (T, T), "enter": (T, T, 0), "infuse": (T, T), "rotate": (T, T), "bias": (T,) * 4,
    "spread": (T,) * 3,
}  # fmt: skip


@pytest.mark.parametrize("id", POSITIONS)
def test_a_hook_that_a_position_lacks_says_so(id):
    position = longspan.build(id, **longspan.show(id).tiny)
    assert isinstance(position, Position)
    for hook in set(HOOKS) - position.acts:
        if hook == "infuse" and position.acts == {"embed"}:
            continue  # the same sum, in another place
        with pytest.raises(NotImplementedError, match="acts by"):
            getattr(position, hook)(*HOOKS[hook])


@pytest.mark.parametrize("id", POSITIONS)
def test_every_attention_honours_a_position_or_refuses_it_by_name(id):
    position = longspan.build(id, **longspan.show(id).tiny).double()
    for card in longspan.find(kind="attention", mode="causal"):
        attention: Any = Subject.of(card, causal=True).module
        torch.manual_seed(0)
        lacks = not position.acts - {"embed", "enter"}
        lacks |= "bias" in position.acts and not attention.takes_bias
        lacks |= "spread" in position.acts and not attention.takes_spread
        if lacks:
            with pytest.raises(LongspanError, match=type(position).__name__):
                MultiHead(attention, width=MODEL, heads=HEADS, position=position)
            continue
        heads = MultiHead(attention, width=MODEL, heads=HEADS, position=position).double()
        x = random(1, 8, MODEL)
        with torch.random.fork_rng():
            got, _ = heads.eval()(x)
            heads.position = None
            without, _ = heads(x)
        if position.acts & {"bias", "spread"}:
            assert not torch.allclose(got, without, atol=1e-12), card.id
        assert got.isfinite().all()


# Added in every layer to queries and keys alone


@pytest.mark.parametrize("id", ["sinusoidal-position", "learned-position"])
def test_infused_positions_reach_queries_and_keys_but_not_values(id):
    table = {"width": MODEL, "length": 9} if id == "learned-position" else {}
    position = longspan.build(id, into="queries-and-keys", **table).double()
    x = random(BATCH, 7, MODEL)
    heads = multihead(position)
    pos = torch.arange(7).expand(BATCH, 7)
    q, k, v = (
        rearrange(heads.project[n](of), "B L (H D) -> B H L D", H=HEADS)
        for n, of in zip("qkv", (position.infuse(x, pos),) * 2 + (x,), strict=True)
    )
    scores = (q @ k.mT / WIDTH**0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -math.inf)
    want = heads.output(rearrange(scores.softmax(-1) @ v, "B H L D -> B L (H D)"))
    assert_close(heads(x)[0], want)
    with pytest.raises((LongspanError, TypeError)):
        longspan.build(id, into="values", **table)


def test_multihead_refuses_a_position_that_is_the_stacks():
    for id in ("sinusoidal-position", "per-layer-position"):
        position = longspan.build(id, **longspan.show(id).tiny)
        with pytest.raises(LongspanError, match="inputs of layers"):
            multihead(position)


# Shaw

SHAWS = {
    "both": {"reach": 3},
    "keys": {"reach": 2, "values": False},
    "values": {"reach": 2, "keys": False},
    "shared": {"reach": 3, "shared": True},
    "zero": {"reach": 0},
    "far": {"reach": 40},
}


def shaw_by_gathering(
    heads: MultiHead, position: Any, x: Tensor, causal: bool, keep: Tensor | None = None
) -> Tensor:
    """Every a_ij looked up: the L × S × D tensors that the mechanism never makes."""
    q, k, v = (
        rearrange(heads.project[n](x), "B L (H D) -> B H L D", H=HEADS).unbind(0) for n in "qkv"
    )
    far = torch.arange(x.shape[1]) - torch.arange(x.shape[1])[:, None]  # j − i
    rows = far.clamp(-position.reach, 0 if position.causal else position.reach) + position.reach
    seen = far <= 0 if causal else far <= x.shape[1]
    outs = []
    for b in range(len(x)):
        a_k, a_v = (
            torch.zeros(HEADS, *rows.shape, WIDTH, dtype=x.dtype) if t is None
            else t.expand(HEADS, -1, -1)[:, rows]
            for t in (position.keys, position.values)
        )  # fmt: skip
        mine = seen if keep is None else seen & keep[b]
        e = torch.einsum("hid,hijd->hij", q[b], k[b][:, None] + a_k) / WIDTH**0.5
        alpha = e.masked_fill(~mine, -math.inf).softmax(-1)
        outs.append(torch.einsum("hij,hijd->hid", alpha, v[b][:, None] + a_v))
    return heads.output(rearrange(torch.stack(outs), "B H L D -> B L (H D)"))


@pytest.mark.parametrize("options", SHAWS.values(), ids=SHAWS)
@pytest.mark.parametrize("form", ["bidirectional", "causal", "causal-range"])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_shaw_without_tensors_of_pairs_is_the_direct_form_with_gradients(options, form, length):
    causal = form != "bidirectional"
    position = relative("shaw-relative-position", causal=form == "causal-range", **options)
    heads, x = multihead(position, causal=causal), random(BATCH, length, MODEL).requires_grad_()
    got, want = heads(x)[0], shaw_by_gathering(heads, position, x, causal)
    assert_close(got, want)
    wanted, weight = [x, *position.parameters()], random(*got.shape, seed=3)
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), wanted) for y in (got, want)), strict=True
    ):
        assert_close(a, b)


def test_shaw_under_padding_sums_the_weights_that_are_there():
    position = relative("shaw-relative-position", reach=3)
    heads, x = multihead(position, causal=False), random(BATCH, 9, MODEL)
    keep = torch.tensor([[1] * 9, [1, 1, 0, 1, 1, 0, 1, 0, 0]]).bool()
    want = shaw_by_gathering(heads, position, x.masked_fill(~keep[..., None], 0), False, keep)
    assert_close(heads(x, keep=keep)[0][keep], want[keep])


def test_shaw_sign_is_key_minus_query():
    position = relative("shaw-relative-position", reach=1, values=False)
    position.keys.data = torch.zeros_like(position.keys)
    position.keys.data[:, 0] = 1  # the key before
    q = torch.ones(1, HEADS, 4, WIDTH, dtype=torch.float64)
    bias = position.bias(q, q, torch.arange(4), torch.arange(4))
    assert_close(bias[0, 0], torch.ones(4, 4).double().tril(-1) * WIDTH**0.5)


def test_shaw_of_reach_zero_biases_no_key_and_moves_every_output_alike():
    x = random(BATCH, 7, MODEL)
    position = relative("shaw-relative-position", reach=0)
    heads = multihead(position, causal=False)
    moved = heads.output(position.values.flatten()) - heads.output(torch.zeros(MODEL).double())
    plain = multihead(None, causal=False)
    assert_close(heads(x)[0], plain(x)[0] + moved)


def test_shaw_of_great_reach_is_any_toeplitz_term():
    position = relative("shaw-relative-position", reach=6, values=False)
    q = random(1, HEADS, 7, WIDTH)
    bias = position.bias(q, q, torch.arange(7), torch.arange(7))
    for i in range(7):
        for j in range(7):
            want = (q[0, :, i] * position.keys[:, j - i + 6]).sum(-1) / WIDTH**0.5
            assert_close(bias[0, :, i, j], want)


def test_shaw_makes_no_tensor_of_pairs_and_channels():
    length, width = 64, 32
    position = longspan.build("shaw-relative-position", heads=1, head_width=width, reach=16)
    q = torch.randn(1, 1, length, width)
    at = torch.arange(length)
    with Largest() as mode, torch.no_grad():
        position.spread(position.bias(q, q, at, at).softmax(-1), at, at)
    assert mode.elements <= 2.1 * length * length


def test_shaw_refuses_later_keys_where_its_range_has_none():
    position = relative("shaw-relative-position", causal=True)
    with pytest.raises(LongspanError, match="causal=False"):
        multihead(position, causal=False)
    with pytest.raises(LongspanError, match="one table or both"):
        relative("shaw-relative-position", keys=False, values=False)
    with pytest.raises(LongspanError, match="reach=-1"):
        relative("shaw-relative-position", reach=-1)


def test_shaw_values_are_refused_by_an_attention_that_does_not_spread():
    keys = relative("shaw-relative-position", values=False)
    flash = longspan.build("flashattention", causal=True)
    MultiHead(flash, width=MODEL, heads=HEADS, position=keys)
    with pytest.raises(LongspanError, match="build it without values"):
        MultiHead(flash, width=MODEL, heads=HEADS, position=relative("shaw-relative-position"))


def test_shaw_keys_are_those_of_wav2vec2_bert():
    from transformers import Wav2Vec2BertConfig
    from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

    torch.manual_seed(0)
    config = Wav2Vec2BertConfig(
        hidden_size=MODEL, num_attention_heads=HEADS, position_embeddings_type="relative_key",
        left_max_position_embeddings=3, right_max_position_embeddings=3,
    )  # fmt: skip
    config._attn_implementation = "eager"
    theirs = Wav2Vec2BertSelfAttention(config).double().eval()
    position = relative("shaw-relative-position", reach=3, values=False, shared=True)
    position.keys.data = theirs.distance_embedding.weight.data[None]
    ours = multihead(position, causal=False)
    for name in "qkv":
        ours.project[name].load_state_dict(getattr(theirs, f"linear_{name}").state_dict())
    ours.output.load_state_dict(theirs.linear_out.state_dict())
    x = random(BATCH, 11, MODEL)
    assert_close(ours(x)[0], theirs(x)[0])


@pytest.mark.parametrize(("length", "keys"), [(1, 1), (1, 5), (4, 4), (3, 8), (6, 2)])
def test_moving_rows_there_and_back(length, keys):
    y = random(2, 1, length, keys)
    assert torch.equal(shift(distance.unshift(y))[..., :keys], y)
    assert distance.unshift(y).shape[-1] == length + keys - 1
    by = random(2, length + keys - 1)
    got = distance.toeplitz(by, length, keys)
    for i in range(length):
        assert torch.equal(got[:, i], by[:, length - 1 - i : length - 1 - i + keys])
