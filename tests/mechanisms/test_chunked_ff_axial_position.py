"""Axial positions are a table's rows; chunks of tokens give what all tokens give."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan import LongspanError, build
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import FeedForward
from longspan.nn.chunked import Chunked, cross_entropy
from longspan.testing.counting import held

WIDTH = 12


def axial(**options: Any) -> Any:
    torch.manual_seed(0)
    return build("chunked-ff-axial-position", width=WIDTH, **options).double()


def example(length: int, *, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, WIDTH, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def table(position: Any) -> Tensor:
    """The L × E table that the axes stand for, built place by place, the first axis slowest."""
    rows = []
    for place in torch.cartesian_prod(*(torch.arange(n) for n in position.axes)).view(
        -1, len(position.axes)
    ):
        parts = [t[int(c)] for c, t in zip(place, position.tables, strict=True)]
        rows.append(torch.cat(parts) if position.form == "concat" else sum(parts))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options",
    [
        {"axes": (3, 5)},
        {"axes": (3, 5), "widths": (2, 10)},
        {"axes": (2, 3, 4)},
        {"axes": (7,)},
        {"axes": (3, 5), "form": "sum"},
        {"axes": (2, 3, 4), "form": "sum"},
    ],
)
def test_any_axes_and_position_ids_are_rows_of_the_table(options: dict[str, Any]) -> None:
    position = axial(**options)
    whole = table(position)
    x = example(5)
    pos = torch.randint(len(whole), (2, 5), generator=torch.Generator().manual_seed(2))
    got, want = position.embed(x, pos), x + whole[pos]
    assert torch.equal(got, want)
    of = [x, *position.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), of),
        torch.autograd.grad(want.sin().sum(), of),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_a_sequence_may_be_shorter_than_the_grid_even_in_training() -> None:
    position = axial(axes=(4, 8)).train()
    for length in (1, 9, 32):
        got = position.embed(example(length), torch.arange(length)[None])
        assert torch.equal(got, example(length) + table(position)[:length])
    with pytest.raises(LongspanError, match="32"):
        position.embed(example(33), torch.arange(33)[None])
    with pytest.raises(LongspanError, match="-1"):
        position.embed(example(1), torch.tensor([[-1]]))


def test_a_length_gives_a_square() -> None:
    assert axial(length=1000).axes == (32, 32)
    assert axial(length=17).axes == (5, 4)
    assert sum(p.numel() for p in axial(length=10**6).parameters()) == 1000 * WIDTH


def test_unfit_grids_are_refused() -> None:
    for options in (
        {},
        {"axes": (0, 3)},
        {"axes": (3, 3), "widths": (3, 3)},
        {"axes": (3, 3), "widths": (3, 9), "form": "sum"},
        {"axes": (3, 3), "dropped": 2},
    ):
        with pytest.raises(LongspanError):
            axial(**options)


@pytest.mark.parametrize("dropped", [0, 1])
def test_dropout_takes_whole_lines_of_one_axis(dropped: int) -> None:
    position = axial(axes=(40, 30), std=1.0, dropout=0.25, dropped=dropped).train()
    x = torch.zeros(2, 1200, WIDTH, dtype=torch.float64)
    torch.manual_seed(3)
    ratio = (position.embed(x, torch.arange(1200)[None]) / table(position)).view(2, 40, 30, WIDTH)
    lines = ratio.movedim(dropped + 1, 1).flatten(2)  # B N and all that shares a line
    torch.testing.assert_close(lines, lines[..., :1].expand_as(lines))
    values = lines[..., 0]
    assert ((values.abs() < 1e-9) | ((values - 4 / 3).abs() < 1e-9)).all()
    assert 0.05 < (values.abs() < 1e-9).double().mean() < 0.5
    assert not torch.equal(values[0], values[1])
    still = position.eval().embed(x, torch.arange(1200)[None])
    assert torch.equal(still[0], table(position))


def test_equals_axial_position_embeddings_of_transformers() -> None:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import AxialPositionEmbeddings

    config = ReformerConfig(
        axial_pos_shape=[4, 6], axial_pos_embds_dim=[5, 7], hidden_size=WIDTH,
        hidden_dropout_prob=0.0, attn_layers=["local"], local_attn_chunk_length=4,
    )  # fmt: skip
    theirs = AxialPositionEmbeddings(config).double().eval()
    position = axial(axes=(4, 6), widths=(5, 7)).eval()
    with torch.no_grad():
        for weight, own in zip(theirs.weights, position.tables, strict=True):
            weight.normal_()
            own.copy_(weight.view_as(own))
        for length in (24, 9):
            ids = torch.arange(length).expand(2, -1)
            x = example(length)
            torch.testing.assert_close(position.embed(x, ids), x + theirs(ids))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize(("length", "chunk"), [(12, 4), (13, 4), (3, 8), (1, 1), (7, 1)])
def test_chunks_give_what_the_whole_gives(length: int, chunk: int, recompute: bool) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.LayerNorm(WIDTH), FeedForward(WIDTH), nn.Linear(WIDTH, 5)).double()
    chunked, x = Chunked(module, chunk=chunk, recompute=recompute), example(length)
    of = [x, *module.parameters()]
    got, want = chunked(x), module(x)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), of),
        torch.autograd.grad(want.sin().sum(), of),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_dropout_is_replayed_within_a_chunk() -> None:
    torch.manual_seed(0)
    module = FeedForward(WIDTH, dropout=0.5).double().train()
    x, grads = example(12), []
    for recompute in (True, False):
        torch.manual_seed(4)
        out = Chunked(module, chunk=5, recompute=recompute)(x)
        grads.append(torch.autograd.grad(out.sin().sum(), [x, *module.parameters()]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_recomputed_chunks_save_memory_in_training() -> None:
    module, x = FeedForward(WIDTH, inner=32 * WIDTH).double(), example(512, batch=1)

    def most(f: nn.Module) -> int:
        return held(lambda: f(x).sum().backward())

    whole = most(module)
    assert most(Chunked(module, chunk=32)) < whole / 4
    assert most(Chunked(module, chunk=32, recompute=False)) > whole / 2


def test_chunked_feed_forward_equals_that_of_transformers() -> None:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import ChunkReformerFeedForward

    config = ReformerConfig(
        hidden_size=WIDTH, feed_forward_size=20, chunk_size_feed_forward=4, hidden_act="relu",
        hidden_dropout_prob=0.0, attn_layers=["local"],
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = ChunkReformerFeedForward(config).double()
    ours = FeedForward(WIDTH, inner=20, activation="relu").double()
    ours.up.load_state_dict(theirs.dense.dense.state_dict())
    ours.down.load_state_dict(theirs.output.dense.state_dict())
    norm = nn.LayerNorm(WIDTH, eps=config.layer_norm_eps).double()
    x = example(16)
    got = Chunked(nn.Sequential(norm, ours), chunk=4)(x)
    torch.testing.assert_close(got, theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_chunked_loss_is_exact(chunk: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(17, WIDTH, dtype=torch.float64).requires_grad_()
    bias, x = torch.randn(17, dtype=torch.float64).requires_grad_(), example(7)
    labels = torch.randint(17, (2, 7))
    labels[0, :3] = -100
    got = cross_entropy(x, weight, labels, bias, chunk=chunk)
    want = F.cross_entropy(F.linear(x, weight, bias).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, [x, weight, bias]),
        torch.autograd.grad(want, [x, weight, bias]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert cross_entropy(x, weight, torch.full_like(labels, -100)).item() == 0


def test_the_chunked_loss_never_holds_all_logits() -> None:
    vocabulary, length = 500, 512
    weight = torch.randn(vocabulary, WIDTH, dtype=torch.float64).requires_grad_()
    x, labels = example(length, batch=1), torch.randint(vocabulary, (1, length))
    most = held(lambda: cross_entropy(x, weight, labels, chunk=16).backward())
    assert most < length * vocabulary * 8 / 4


def test_a_reversible_model_with_both_trains_streams_and_saves(tmp_path: Any) -> None:
    torch.manual_seed(0)
    config = LongspanConfig(
        vocab_size=7,
        width=WIDTH,
        heads=3,
        layers=2,
        position={"id": "chunked-ff-axial-position", "axes": [4, 8]},
        residual="reversible-residual",
    )
    net = LongspanForCausalLM(config).double()
    tokens = torch.randint(7, (2, 9), generator=torch.Generator().manual_seed(1))
    before = net(input_ids=tokens, labels=tokens).loss
    net.save_pretrained(tmp_path)
    for layer in net.model.layers:
        layer.feed_forward = Chunked(layer.feed_forward, chunk=4)  # pyright: ignore[reportArgumentType]
    after = net(input_ids=tokens, labels=tokens).loss
    torch.testing.assert_close(after, before)
    after.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    net.eval()
    with torch.no_grad():
        whole = net(input_ids=tokens).logits
        past, outs = None, []
        for t in range(9):
            out = net(input_ids=tokens[:, t : t + 1], past_key_values=past, use_cache=True)
            past = out.past_key_values
            outs.append(out.logits)
        torch.testing.assert_close(torch.cat(outs, 1), whole)
        again = LongspanForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
        torch.testing.assert_close(again(input_ids=tokens).logits, whole)
