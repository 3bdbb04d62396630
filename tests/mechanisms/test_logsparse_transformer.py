"""LogSparse Transformer's claims: its patterns, their cost, convolved queries and keys."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import longspan
from longspan import LongspanError, build
from longspan.engines import dense
from longspan.engines.edges import Diagonal, Diagonals
from longspan.nn import MultiHead, tensors
from longspan.nn.convolved import Convolved
from longspan.testing import counting
from longspan.testing.oracles.time_series import logsparse, mask, released_row

FORMS = [
    {}, {"local": 4}, {"restart": 8}, {"restart": 12, "local": 1}, {"restart": 5, "local": 9},
    {"restart": 1}, {"restart": 8, "released": True, "window": 16},
    {"restart": 16, "released": True, "window": 16}, {"restart": 12, "released": True, "window": 9},
]  # fmt: skip


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def matrix(attention, length: int) -> Tensor:
    seen = torch.zeros(length, length, dtype=torch.long)
    for offset, first, last in attention.diagonals(length):
        rows = torch.arange(max(first, offset), max(min(last, length), max(first, offset)))
        seen[rows, rows - offset] += 1
    assert seen.max() <= 1, "a pair is listed twice"
    return seen.bool()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 65])
def test_pattern_generator_equals_the_row_masks(form, length: int) -> None:
    attention = build("logsparse-transformer", **form)
    assert torch.equal(matrix(attention, length), mask(attention, length))


@pytest.mark.parametrize("form", [f for f in FORMS if f != {"restart": 1}], ids=str)
def test_gather_form_equals_dense_softmax_with_the_mask(form, monkeypatch) -> None:
    monkeypatch.setattr("longspan.engines.edges._CACHED", 256 * 8 * 2)
    attention = build("logsparse-transformer", **form)
    q, k, v = random(2, 2, 270, 8), random(2, 2, 270, 8), random(2, 2, 270, 6)
    keep = torch.rand(2, 270, generator=torch.Generator().manual_seed(1)) > 0.2
    for hidden in (None, keep):
        got = attention(q, k, v, keep=hidden)[0]
        want = logsparse(attention, q, k, v, keep=hidden)
        if hidden is not None:
            got, want = (t * hidden[:, None, :, None] for t in (got, want))
        weight = random(*got.shape).detach()
        assert_close(got, want)
        pairs = zip(
            torch.autograd.grad((got * weight).sum(), (q, k, v)),
            torch.autograd.grad((want * weight).sum(), (q, k, v)),
            strict=True,
        )
        for a, b in pairs:
            assert_close(a, b)


def test_the_set_is_the_papers_for_one_based_cells() -> None:
    """I_l = {l, l − 1, l − 2, l − 4, …, l − 2^⌊log2 l⌋}, cells from 1."""
    attention = build("logsparse-transformer")
    seen = matrix(attention, 64)
    for cell in range(1, 65):
        steps = [0, *(2**i for i in range(cell.bit_length()))]
        want = {cell - s for s in steps if cell - s >= 1}
        assert {j + 1 for j in seen[cell - 1].nonzero()[:, 0].tolist()} == want


def test_log_depth_reaches_every_earlier_cell() -> None:
    for length in (2, 7, 64, 100):
        step = mask(build("logsparse-transformer"), length).double()
        reached = torch.linalg.matrix_power(step, length.bit_length()) > 0
        assert torch.equal(reached, torch.ones_like(reached).tril())


def test_a_window_of_everything_is_causal_attention() -> None:
    q, k, v = random(1, 2, 40, 8), random(1, 2, 40, 8), random(1, 2, 40, 8)
    attention = build("logsparse-transformer", restart=50, local=40)
    assert_close(attention(q, k, v)[0], dense.attend(q, k, v, causal=True))


def test_released_mask_starts_with_full_rows_and_leaves_the_last_start_out() -> None:
    attention = build("logsparse-transformer", restart=8, released=True, window=16)
    seen = matrix(attention, 40)
    assert seen[:12].sum() == 12 * 13 // 2  # 16 // 8 · 2 · 3 rows
    assert not seen[17, 1]  # p = 1 < w − 1: cells 0 … p − 1
    assert seen[17, 0]
    assert set(seen[17].nonzero()[:, 0].tolist()) == released_row(17, 8, 16)


@pytest.mark.parametrize("form", [{}, {"local": 11}])
def test_costs_l_log_l(form) -> None:
    attention = build("logsparse-transformer", **form)

    def cost(length: int) -> tuple[int, int]:
        q, k, v = (torch.randn(1, 1, length, 16, requires_grad=True) for _ in range(3))
        pairs = sum(length - d.offset for d in attention.diagonals(length))
        found = counting.count(lambda: attention(q, k, v)[0].sum().backward())
        assert found.flops <= 8 * pairs * 16
        return pairs, found.bytes

    (few, less), (many, more) = cost(1024), cost(8192)
    assert many <= 8 * 13 / 10 * few
    assert more <= 1.1 * 8 * 13 / 10 * less


def test_a_step_reads_only_the_cells_it_sees() -> None:
    attention = build("logsparse-transformer").double()
    q, k, v = random(1, 1, 4096, 4), random(1, 1, 4096, 4), random(1, 1, 4096, 4)
    _, state = attention(q[:, :, :-1], k[:, :, :-1], v[:, :, :-1])
    with torch.no_grad():
        o, _ = attention(q[:, :, -1:], k[:, :, -1:], v[:, :, -1:], state)
    assert_close(o, attention(q, k, v)[0][:, :, -1:])
    assert len(attention.diagonals(4096)) == 13


def test_diagonals_share_a_softmax_with_other_layouts_and_skip_dead_rows() -> None:
    q, k, v = random(1, 2, 9, 4), random(1, 2, 12, 4), random(1, 2, 12, 4)
    layout = Diagonals([Diagonal(0, 5), Diagonal(2, 0, 6)])
    o, lse = dense.union(q, [(layout, k, v)])
    assert (lse[:, :, 3:] > -torch.inf).all()
    seen = torch.zeros(9, 12, dtype=torch.bool)
    for i in range(9):
        seen[i, i + 3] = i + 3 >= 5
        seen[i, i + 1] |= i + 3 < 6
    want = (q @ k.mT / 2).masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0) @ v
    assert_close(o, want)
    assert (dense.union(q, [(Diagonals([]), k, v)])[1] == -torch.inf).all()


@pytest.mark.parametrize("taps", [1, 3, 6])
def test_convolved_queries_and_keys_equal_conv1d_padded_left(taps: int) -> None:
    torch.manual_seed(0)
    heads: Any = MultiHead(build("multi-head-attention", causal=True), width=12, heads=3)
    mixer = Convolved(heads, taps=taps).double()
    x = random(2, 10, 12)

    def convolved(name: str) -> Tensor:
        linear = heads.project[name]
        kernel = linear.weight.unflatten(1, (taps, 12)).transpose(1, 2)
        padded = nn.functional.pad(x.mT, (taps - 1, 0))
        y = nn.functional.conv1d(padded, kernel, linear.bias)
        return y.unflatten(1, (3, 4)).mT

    v = heads.project["v"].linear(x).unflatten(2, (3, 4)).transpose(1, 2)
    o = dense.attend(convolved("q"), convolved("k"), v, causal=True)
    assert_close(mixer(x)[0], heads.output.linear(o.transpose(1, 2).flatten(2)))


def test_one_tap_is_ordinary_attention() -> None:
    torch.manual_seed(0)
    heads = MultiHead(build("logsparse-transformer"), width=12, heads=3).double()
    x = random(2, 10, 12)
    want = heads(x)[0]
    assert_close(Convolved(heads, taps=1)(x)[0], want)


@pytest.mark.parametrize(
    "id",
    [
        "multi-head-attention",
        "logsparse-transformer",
        "linear-transformer",
        "reformer-lsh-causal",
    ],
)
def test_convolution_serves_any_attention_and_steps_with_cached_inputs(id: str) -> None:
    torch.manual_seed(0)
    causal = {"causal": True} if "causal" in longspan.registry.options(id) else {}
    attention = build(id, **dict(longspan.show(id).tiny) | causal)
    mixer = Convolved(MultiHead(attention, width=12, heads=3), taps=4).double().eval()
    x = random(2, 24, 12)
    keep = torch.ones(2, 24, dtype=torch.bool)
    keep[0, :5] = keep[1, 20:] = False
    state: Any = None
    for hidden in (None, keep):
        whole = mixer(x, keep=hidden)[0]
        outs, state = [], None
        for t in range(24):
            now = None if hidden is None else hidden[:, t : t + 1]
            y, state = mixer(x[:, t : t + 1], state, keep=now)
            outs.append(y)
            assert state.inputs.shape == (2, 3, 12)
        assert_close(torch.cat(outs, 1), whole)
    assert all(len(t) == 2 for t in tensors(state))
    early = mixer(x)[0][:, :9].sum()
    assert not torch.autograd.grad(early, x)[0][:, 9:].any()


def test_refusals_say_what_to_do() -> None:
    for wrong in ({"local": 0}, {"restart": 4, "released": True}, {"restart": 0}):
        with pytest.raises(LongspanError):
            build("logsparse-transformer", **wrong)
    heads = MultiHead(build("logsparse-transformer"), width=12, heads=3)
    with pytest.raises(LongspanError, match="at least 1"):
        Convolved(heads, taps=0)
    with pytest.raises(LongspanError, match="context"):
        Convolved(heads, taps=2).double()(random(1, 4, 12), context=random(1, 4, 12))
    with pytest.raises(LongspanError, match="no cross form"):
        build("logsparse-transformer")(random(1, 1, 4, 4), random(1, 1, 3, 4), random(1, 1, 3, 4))
