"""BP-Transformer's claims: the tree, its edges, what may be seen, spans made when full."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError, build
from longspan.engines import edges as along
from longspan.testing.oracles.tree import edges


def random(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


def spans(tokens: int, causal: bool) -> list[range]:
    """What each node of the engine's numbering spans."""
    if not causal:
        levels = [1]
        while levels[-1] < tokens:
            levels.append(2 * levels[-1])
        return [range(a, min(a + s, tokens)) for s in levels for a in range(0, tokens, s)]
    found = []
    for i in range(tokens):
        found.append(range(i, i + 1))
        size = 2
        while (i + 1) % size == 0:
            found.append(range(i + 1 - size, i + 1))
            size *= 2
    return found


def rows(graph: along.Graph) -> list[list[tuple[int, int]]]:
    start = graph.start.tolist()
    pairs = list(zip(graph.keys.tolist(), graph.kinds.tolist(), strict=True))
    return [pairs[a:b] for a, b in pairwise(start)]


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("near", [1, 2, 4])
def test_contexts_cover_the_sequence_without_overlap(near: int, causal: bool) -> None:
    for n in range(1, 65):
        graph, of = along.tree(n, near, 10, causal=causal), spans(n, causal)
        assert graph.nodes == len(of)
        for i, at in enumerate(graph.leaves.tolist()):
            covered = sorted(t for key, _ in rows(graph)[at] for t in of[key])
            assert covered == list(range(i + 1 if causal else n))
            assert [key for key, _ in rows(graph)[at] if i in of[key]] == [at]
        for at, span in enumerate(of):
            if len(span) > 1:
                assert sorted(t for key, _ in rows(graph)[at] for t in of[key]) == list(span)


@pytest.mark.parametrize("causal", [False, True])
def test_edge_kinds_are_those_of_the_walk(causal: bool) -> None:
    for n, near, clip in ((1, 2, 3), (13, 2, 2), (40, 1, 3), (33, 4, 10)):
        graph, of = along.tree(n, near, clip, causal=causal), spans(n, causal)
        nodes, walked = edges(n, near, clip, causal)

        number = list(range(len(nodes)))
        if causal:  # full spans, none of which there is twice
            number = [of.index(range(m * 2**j, (m + 1) * 2**j)) for j, m in nodes]
        want = sorted((number[a], number[b], kind) for a, b, kind in walked)
        got = sorted((a, b, k) for a, row in enumerate(rows(graph)) for b, k in row)
        assert got == want
        assert max(k for *_, k in got) < along.edge_kinds(near, clip)


def test_keys_a_token_grow_with_the_logarithm() -> None:
    leaf = []
    for n in (256, 4096):
        graph = along.tree(n, 4, 10, causal=True)
        leaf.append(int(graph.start.diff()[graph.leaves[-1]]))
    assert leaf[1] - leaf[0] <= 4 * 4
    assert leaf[1] < 50


def test_edge_attention_equals_dense_with_mask_and_kind_logits(monkeypatch) -> None:
    monkeypatch.setattr(along, "WORKSPACE", 2**12)
    graph = along.together([along.tree(n, 2, 3, causal=False) for n in (13, 1, 0, 6)])
    q, k, v = random(2, graph.nodes, 4), random(2, graph.nodes, 4), random(2, graph.nodes, 3)
    table = random(along.edge_kinds(2, 3), 4)
    got = along.along(q, k, v, table, graph)
    scores = torch.full((2, graph.nodes, graph.nodes), -torch.inf, dtype=torch.float64)
    for i, row in enumerate(rows(graph)):
        for key, kind in row:
            scores[:, i, key] = (q[:, i] * (k[:, key] + table[kind])).sum(-1) / 2
    want = scores.softmax(-1) @ v
    assert_close(got, want)
    weight = random(*got.shape).detach()
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (q, k, v, table)),
        torch.autograd.grad((want * weight).sum(), (q, k, v, table)),
        strict=True,
    ):
        assert_close(a, b)


def test_enough_neighbours_are_dense_attention_on_tokens() -> None:
    torch.manual_seed(0)
    mixer: Any = build("bp-transformer", width=8, heads=2, near=20, layers=1).double()
    mixer.layers[0].own.kinds.data.zero_()
    x = random(1, 12, 8)
    own = mixer.layers[0].own
    q, k, v = (own.split(p(x[0])) for p in (own.query, own.key, own.value))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)
    h = own.norm(x[0] + own.output(o))
    want = mixer.layers[0].norm(h + mixer.layers[0].feed_forward(h))
    assert_close(mixer(x)[0][0], want)


def test_the_causal_jacobian_is_lower_triangular_through_several_layers() -> None:
    torch.manual_seed(0)
    mixer: Any = build("bp-transformer", width=8, heads=2, near=1, layers=4, causal=True).double()
    x = random(1, 19, 8)
    y = mixer(x)[0]
    for i in range(19):
        grad = torch.autograd.grad(y[0, i].sum() + y[0, i, 0], x, retain_graph=True)[0][0]
        assert not grad[i + 1 :].any()
        assert grad[: i + 1].abs().sum(1).gt(0).all()


def test_steps_create_spans_when_they_are_full() -> None:
    torch.manual_seed(0)
    mixer: Any = build("bp-transformer", width=8, heads=2, near=1, causal=True).double().eval()
    x, state, outs = random(2, 16, 8), None, []
    for t in range(16):
        y, state = mixer(x[:, t : t + 1], state)
        outs.append(y)
        assert state.k.shape[3] == along.completed(t + 1) == len(spans(t + 1, True))
    assert_close(torch.cat(outs, 1), mixer(x)[0])


def test_rows_of_different_lengths_are_one_graph() -> None:
    torch.manual_seed(0)
    mixer: Any = build("bp-transformer", width=8, heads=2, near=2).double()
    x, keep = random(3, 11, 8), torch.arange(11) < torch.tensor([[11], [4], [7]])
    y, nodes, _ = mixer.nodes(x, keep=keep)
    assert nodes.tokens == [11, 4, 7]
    for b, n in enumerate(nodes.tokens):
        assert_close(y[b, :n], mixer(x[b : b + 1, :n])[0][0])


def test_refusals() -> None:
    for wrong in ({"near": 0}, {"layers": 0}, {"heads": 3}):
        with pytest.raises(LongspanError):
            build("bp-transformer", **({"width": 8} | wrong))
