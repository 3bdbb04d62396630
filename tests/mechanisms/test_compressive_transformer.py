"""Compressive Transformer: two queues, five compressions, and losses that reach f_c alone."""

from typing import Any

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.testing import assert_close

from longspan import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import Block, FeedForward, detach, reset, state_bytes, to
from longspan.nn.auxiliary import collect
from longspan.registry import build

WIDTH, HEADS = 12, 3
COMPRESSIONS = ["mean", "max", "conv", "dilated-conv", "most-used"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(id: str = "compressive-transformer", **arguments: Any) -> Any:
    """In float64 and evaluation, every parameter large enough to matter."""
    if id == "compressive-transformer":
        arguments = {"segment": 4, "memory": 4, "compressed": 3, "rate": 2} | arguments
    module, generator = build(id, width=WIDTH, heads=HEADS, **arguments).double(), None
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 3)
    return module.eval()


def in_pieces(module: Any, x: Tensor, sizes: int | list[int]) -> tuple[Tensor, Any]:
    outs, state = [], None
    for piece in x.split(sizes, 1):
        y, state = module(piece, state)
        outs.append(y)
    return torch.cat(outs, 1), state


# -- compression ------------------------------------------------------------------------------


class Third(nn.Module):
    """A compression of one's own: every rate-th vector, scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2] * self.scale


@pytest.mark.parametrize("compression", [*COMPRESSIONS, Third()], ids=str)
@pytest.mark.parametrize("sizes", [1, 4, [3, 1, 9, 14, 3]], ids=str)
def test_token_by_token_is_segment_by_segment(compression: Any, sizes: Any) -> None:
    """Compression happens at every n_s-th token, wherever calls begin and end."""
    module, x = layer(compression=compression, memory=6), normal(2, 30, WIDTH)
    assert_close(in_pieces(module, x, sizes)[0], module(x)[0])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_compressions_by_name(compression: str) -> None:
    """Of the four vectors that leave a memory of one segment when the second is full."""
    module, x = layer(compression=compression, compressed=2), normal(1, 8, WIDTH)
    got = module(x)[1].memory.compressed.items[0]
    old = x[0, :4]
    if compression == "mean":
        want = (old[::2] + old[1::2]) / 2
    elif compression == "max":
        want = torch.maximum(old[::2], old[1::2])
    elif compression == "conv":
        last = module.compress.last
        want = old[::2] @ last.weight[..., 0].T + old[1::2] @ last.weight[..., 1].T + last.bias
    elif compression == "dilated-conv":
        padded = old
        for dilation, part in zip((1, 2, 4), module.compress.layers, strict=True):
            rows = [
                sum(
                    part.weight[..., tap] @ padded[i + (tap - 1) * dilation]
                    for tap in range(3)
                    if 0 <= i + (tap - 1) * dilation < 4
                )
                + part.bias
                for i in range(4)
            ]
            padded = torch.stack(rows).relu()  # pyright: ignore[reportArgumentType]
        last = module.compress.last
        want = padded[::2] @ last.weight[..., 0].T + padded[1::2] @ last.weight[..., 1].T
        want = want + last.bias
    else:
        whole = torch.cat([torch.zeros(5, WIDTH), x[0]])[None].double()
        q, k = (
            module.mixer.project[n](t).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for n, t in (("q", x[:, 4:]), ("k", whole[:, -8:]))
        )
        weights = module.mixer.attention.weights(q, k, bias=module.mixer.position.bias)
        received = weights[0, :, :, :4].mean((0, 1))
        want = old[received.topk(2).indices.sort().values]
    assert_close(got, want)


def test_dilations_are_exposed() -> None:
    module = layer(compression="dilated-conv", dilations=(1, 3))
    assert [part.dilation for part in module.compress.layers] == [(1,), (3,)]
    assert module.compress(normal(2, 4, WIDTH)).shape == (2, 2, WIDTH)


def test_a_compression_of_the_wrong_rate_is_refused() -> None:
    module = layer(compression=nn.Identity())
    with pytest.raises(LongspanError, match="a vector for each 2"):
        module(normal(1, 8, WIDTH))


# -- the queues -------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [2, 4, 6, 10], ids="n_m={}".format)
@pytest.mark.parametrize("compressed", [0, 1, 3, 8], ids="n_cm={}".format)
def test_two_queues_over_ten_segments(memory: int, compressed: int) -> None:
    """Against a simulation in NumPy: what leaves m, n_s at a time, is pooled behind cm."""
    module = layer(compression="mean", memory=memory, compressed=compressed)
    x = normal(2, 40, WIDTH)
    m, cm = np.zeros((2, memory, WIDTH)), np.zeros((2, compressed, WIDTH))
    state = None
    for h in x.split(4, 1):
        _, state = module(h, state)
        joint = np.concatenate([m, h.numpy()], 1)
        old, m = joint[:, :4], joint[:, 4:]
        pooled = old.reshape(2, 2, 2, WIDTH).mean(2)
        cm = np.concatenate([cm, pooled], 1)[:, 2:]
        assert_close(state.memory.recent.items, torch.from_numpy(m))
        assert_close(state.memory.compressed.items, torch.from_numpy(cm))
    assert bool(state.memory.recent.keep.all() and state.memory.compressed.keep.all())
    assert state_bytes(module(x, state)[1]) == state_bytes(state)


def test_keys_are_compressed_memory_then_memory_then_segment() -> None:
    module, seen = layer(compression="mean"), []
    module.mixer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["context"]), with_kwargs=True
    )
    _, state = module(x := normal(1, 12, WIDTH))
    seen.clear()
    module(more := normal(1, 4, WIDTH, seed=1), state)
    pooled = (x[:, :8:2] + x[:, 1:8:2]) / 2
    assert_close(seen[0], torch.cat([pooled[:, -3:], x[:, 8:], more], 1))


def test_without_compressed_memory_it_is_transformer_xl() -> None:
    module = layer(compressed=0, memory=6, loss="none", compression="mean")
    xl = layer("transformer-xl", memory=6)
    xl.load_state_dict(module.state_dict())
    x = normal(2, 22, WIDTH)
    assert_close(in_pieces(module, x, 4)[0], in_pieces(xl, x, 4)[0])


@pytest.mark.parametrize("compression", ["mean", "conv"])
def test_at_rate_one_it_is_transformer_xl_with_both_memories(compression: str) -> None:
    module = layer(rate=1, memory=5, compressed=3, compression=compression)
    if compression == "conv":
        with torch.no_grad():
            module.compress.last.weight.copy_(torch.eye(WIDTH)[..., None])
            module.compress.last.bias.zero_()
    xl = layer("transformer-xl", memory=8)
    xl.mixer.load_state_dict(module.mixer.state_dict())
    x = normal(2, 22, WIDTH)
    assert_close(in_pieces(module, x, 4)[0], in_pieces(xl, x, 4)[0])


def test_memories_that_start_as_zeros_are_attended_to() -> None:
    """As in the paper; by default they start empty, which equals a shorter context."""
    paper, ours = layer(start="zeros", compression="mean"), layer(compression="mean")
    x = normal(1, 4, WIDTH)
    zeros = paper.mixer(x, context=torch.cat([torch.zeros(1, 7, WIDTH).double(), x], 1))[0]
    assert_close(paper(x)[0], zeros)
    assert_close(ours(x)[0], ours.mixer(x, context=x)[0])


# -- the losses -------------------------------------------------------------------------------


def trained(module: Any, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The losses after a call in training, and the output."""
    y = module.train()(x)[0]
    return collect(module), y


def reached(value: Tensor, module: Any, names: str) -> list[bool]:
    """Whether each parameter of these parts has a gradient that is not 0."""
    chosen = [p for n, p in module.named_parameters() if n.split(".")[0] in names.split()]
    found = torch.autograd.grad(value, chosen, allow_unused=True, retain_graph=True)
    return [g is not None and bool(g.any()) for g in found]


@pytest.mark.parametrize("compression", ["conv", "dilated-conv", Third()], ids=str)
@pytest.mark.parametrize("loss", ["attention-reconstruction", "auto-encoding"])
def test_auxiliary_losses_reach_the_compression_alone(loss: str, compression: Any) -> None:
    module = layer(loss=loss, compression=compression)
    module.take_norm(nn.LayerNorm(WIDTH).double())
    x = normal(2, 16, WIDTH).requires_grad_()
    losses, y = trained(module, x)
    (value,) = losses.values()
    assert all(reached(value, module, "compress restore"))
    assert not any(reached(value, module, "mixer norm"))
    assert torch.autograd.grad(value, x, allow_unused=True, retain_graph=True)[0] is None
    assert not any(reached(y.sum(), module, "compress restore"))
    assert all(reached(y.square().sum(), module, "mixer norm"))
    value.backward()  # nothing was frozen in place
    assert all(p.requires_grad for p in module.parameters())


def test_by_bptt_the_models_loss_trains_the_compression() -> None:
    module = layer(loss="bptt")
    x = normal(2, 16, WIDTH).requires_grad_()
    losses, y = trained(module, x)
    assert not losses
    assert all(reached(y.square().sum(), module, "compress mixer"))
    assert torch.autograd.grad(y[:, 12:].sum(), x)[0][:, :4].any()


def test_without_a_loss_the_compression_stays() -> None:
    module = layer(loss="none")
    x = normal(2, 16, WIDTH).requires_grad_()
    losses, y = trained(module, x)
    assert not losses
    assert not any(reached(y.sum(), module, "compress"))
    assert not torch.autograd.grad(y[:, 4:].sum(), x)[0][:, :4].any()


@pytest.mark.parametrize("error", ["norm", "square"])
def test_auxiliary_losses_are_their_formulas(error: str) -> None:
    """One segment of 4 leaves a memory of 4 as the second ends: one loss."""
    x = normal(1, 8, WIDTH)
    old, h = x[:, :4], x[:, 4:]

    def size(t: Tensor) -> Tensor:
        return t.norm() if error == "norm" else t.square().mean()

    module = layer(loss="auto-encoding", error=error)
    new = module.compress(old)
    want = size(old - module.restore(new.mT).mT)
    assert_close(trained(module, x)[0]["auto_encoding"], want)

    module = layer(error=error)
    new, project = module.compress(old), module.mixer.project

    def attn(m: Tensor) -> Tensor:
        q, k, v = (
            project[n](t).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for n, t in (("q", h), ("k", m), ("v", m))
        )
        return (q @ k.mT / 2).softmax(-1) @ v

    want = size(attn(old) - attn(new))
    assert_close(trained(module, x)[0]["attention_reconstruction"], want)


def test_what_leaves_an_unfilled_memory_is_no_loss() -> None:
    module = layer()
    assert not trained(module, normal(2, 7, WIDTH))[0]
    assert trained(module, normal(2, 8, WIDTH))[0]


# -- the state --------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_row_is_reset_detached_and_moved(compression: str) -> None:
    """And rows may be at different places of their segments."""
    module, x = layer(compression=compression), normal(2, 17, WIDTH)
    _, state = module(x.requires_grad_())
    state = detach(state)
    assert not any(t.requires_grad for t in (state.memory.recent.items, state.items))
    more = normal(2, 11, WIDTH, seed=1)
    turned = reset(state, torch.tensor([True, False]))
    got, after = module(more, turned)
    assert_close(got[0], module(more)[0][0])
    assert_close(got[1], module(more, state)[0][1])
    again = module(more, after)[0]
    assert_close(again[0], module(more, module(more)[1])[0][0])
    assert to(state, dtype=torch.float32).memory.recent.items.dtype == torch.float32


def test_a_call_of_padding_alone_changes_nothing() -> None:
    module, x = layer(), normal(2, 7, WIDTH)
    _, state = module(x)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for before in (None, state):
        y, after = module(normal(2, 3, WIDTH) * torch.nan, before, keep=nothing)
        assert not y.any()
        assert_close(module(x, after)[0], module(x, before)[0])


def test_trained_with_a_small_and_run_with_a_larger_memory() -> None:
    module = layer(compression="most-used", memory_eval=8, compressed_eval=5)
    x = normal(2, 40, WIDTH)
    _, state = module.train()(x)
    assert state.memory.recent.items.shape[1] == 4
    y, larger = module.eval()(x, state)
    assert (larger.memory.recent.items.shape[1], larger.memory.compressed.items.shape[1]) == (8, 5)
    assert y.isfinite().all()
    alike = layer(compression="most-used", memory=8, compressed=5)
    assert_close(module(x)[0], alike(x)[0])


def test_it_reaches_rate_times_further_than_transformer_xl() -> None:
    """One layer: n_m + c n_cm before the segment, against n_m."""
    module, x = layer(compression="mean"), normal(1, 24, WIDTH)
    changed = [x.clone() for _ in range(20)]
    for t, other in enumerate(changed):
        other[:, t] += 1
    base = module(x)[0][:, -4:]
    moved = [not torch.allclose(module(other)[0][:, -4:], base) for other in changed]
    assert moved == [t >= 20 - 4 - 2 * 3 for t in range(20)]


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"compression": "median"}, "compression"),
        ({"loss": "all"}, "loss"),
        ({"error": "max"}, "error"),
        ({"start": "ones"}, "start"),
        ({"rate": 3}, "a divisor"),
        ({"memory": -1}, "memories of"),
        ({"segment": 0}, "segments of 0"),
        ({"compression": "most-used", "memory": 2}, "too short"),
    ],
)
def test_what_cannot_work_is_refused(wrong: dict, match: str) -> None:
    with pytest.raises((LongspanError, TypeCheckError), match=match):
        layer(**wrong)


def test_it_takes_no_context() -> None:
    with pytest.raises(LongspanError, match="no context"):
        layer()(normal(1, 4, WIDTH), context=normal(1, 4, WIDTH))


# -- in a stack and a language model ------------------------------------------------------------


@pytest.mark.parametrize("order", ["pre", "post"])
def test_a_layer_of_ones_own_stack(order: Any) -> None:
    """Under pre-norm memories hold what comes before the norm."""
    block = Block(layer(), FeedForward(WIDTH), width=WIDTH, order=order).double().eval()
    x = normal(2, 11, WIDTH)
    y, state = block(x)
    assert_close(state.memory.recent.items, x[:, 4:8])
    assert_close(in_pieces(block, x, [2, 5, 4])[0], y)


def test_the_language_model_trains_and_decodes() -> None:
    options = {"segment": 4, "memory": 4, "compressed": 3, "rate": 2}
    config = LongspanConfig(
        vocab_size=11,
        width=WIDTH,
        layers=2,
        heads=HEADS,
        mixers=[{"id": "compressive-transformer", **options}],
        position=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LongspanForCausalLM(config)
    tokens = torch.randint(11, (2, 18), generator=torch.Generator().manual_seed(0))
    out = model.train()(tokens, labels=tokens)
    assert set(out.auxiliary) == {"attention_reconstruction"}
    out.loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    model.eval()
    whole, cache, outs = model(tokens).logits, None, []
    for token in tokens.split(1, 1):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        outs.append(output.logits)
    assert_close(torch.cat(outs, 1), whole, atol=1e-5, rtol=1e-4)
