"""Softmax attention against torch's own and those of transformers, with their weights copied."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from jaxtyping import TypeCheckError
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BertConfig, GPT2Config
from transformers.models.bart.modeling_bart import BartAttention
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from longspan import LongspanError
from longspan.engines import dense
from longspan.nn import MultiHead
from longspan.registry import build

WIDTH, HEADS = 12, 3
BACKENDS = ("fused", "tiled", "explicit")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(length: int, keys: int, *, width: int = 4, value: int = 4, groups: int = HEADS) -> Any:
    q, k = normal(2, HEADS, length, width), normal(2, groups, keys, width, seed=1)
    return [t.requires_grad_() for t in (q, k, normal(2, groups, keys, value, seed=2))]


def kept(keys: int) -> Tensor:
    keep = torch.rand(2, keys, generator=torch.Generator().manual_seed(3)) > 0.3
    keep[:, 0] = True
    return keep


def attention(**arguments: Any) -> Any:
    return build("multi-head-attention", **arguments)


def layer(*, causal: bool = False, **arguments: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = attention(causal=causal, backend=arguments.pop("backend", "fused"))
        return MultiHead(inner, width=WIDTH, heads=HEADS, **arguments).double()


def copy(layer: Any, weights: dict[str, Tensor]) -> Any:
    """Weights and biases by name: q, k, v, output."""
    linears: dict[str, Any] = {**layer.project, "output": layer.output}
    with torch.no_grad():
        for name, linear in linears.items():
            linear.weight.copy_(weights[name])
            linear.bias.copy_(weights[f"{name}_bias"])
    return layer


def perturbed(theirs: nn.Module) -> Any:
    """In float64, every parameter random, biases too."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in theirs.double().parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)
    return theirs.eval()


def eager(config: Any) -> Any:
    config._attn_implementation = "eager"
    return config


def same(got: Tensor, want: Tensor, wrt: Any) -> None:
    assert_close(got, want)
    toward = normal(*want.shape, seed=9)
    found, wanted = (torch.autograd.grad(t, wrt, toward, retain_graph=True) for t in (got, want))
    assert_close(found, wanted)


def additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)


def triangle(length: int, keys: int) -> Tensor:
    return torch.ones(length, keys, dtype=torch.bool).tril(keys - length)


# -- against others --------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (7, 7), (1, 9), (5, 9)])
def test_is_torchs_sdpa(length: int, keys: int, causal: bool, backend: str) -> None:
    """Causally with S > L the last query sees the last key: torch needs a mask for that."""
    for keep in (None, kept(keys)):
        q, k, v = inputs(length, keys, value=6)
        mask = triangle(length, keys) if causal else torch.ones(length, keys, dtype=torch.bool)
        mask = mask if keep is None else mask & keep[:, None, None]
        got, _ = attention(causal=causal, backend=backend)(q, k, v, keep=keep)
        same(got, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), (q, k, v))


@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_are_torchs_gqa(backend: str) -> None:
    for groups in (1, HEADS):
        for causal in (False, True):
            q, k, v = inputs(7, 7, groups=groups)
            want = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
            same(attention(causal=causal, backend=backend)(q, k, v)[0], want, (q, k, v))


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_torchs_multihead(backend: str, cross: bool) -> None:
    """Its masks say True for what is dropped; weights come back per head."""
    theirs = perturbed(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    parts, biases = theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3)
    names = dict(zip(("q", "k", "v"), parts, strict=True))
    names |= {f"{n}_bias": b for n, b in zip(("q", "k", "v"), biases, strict=True)}
    names |= {"output": theirs.out_proj.weight, "output_bias": theirs.out_proj.bias}
    ours = copy(layer(backend=backend), names)
    x = normal(2, 7, WIDTH).requires_grad_()
    other = normal(2, 9, WIDTH, seed=1).requires_grad_() if cross else x
    keep = kept(other.shape[1])
    want, weights = theirs(x, other, other, key_padding_mask=~keep, average_attn_weights=False)
    got, _ = ours(x, keep=keep, context=other if cross else None)
    rows = torch.ones(2, 7, 1) if cross else keep[..., None]
    same(got * rows, want * rows, (x,))
    heads = [
        ours.project[n](t).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for n, t in (("q", x), ("k", other))
    ]
    assert_close(ours.attention.weights(*heads, keep=keep), weights)


@pytest.mark.parametrize("causal", [False, True])
def test_is_torchs_multihead_with_a_bias_per_head(causal: bool) -> None:
    theirs = perturbed(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True))
    x, extra = normal(2, 7, WIDTH), normal(2, HEADS, 7, 7, seed=5)
    mask = extra + (additive(triangle(7, 7)) if causal else 0)
    want, _ = theirs(x, x, x, attn_mask=mask.flatten(0, 1))
    q, k, v = (
        t.unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for t in F.linear(x, theirs.in_proj_weight, theirs.in_proj_bias).chunk(3, -1)
    )
    for backend in BACKENDS:
        o, _ = attention(causal=causal, backend=backend)(
            q, k, v, bias=lambda q, k, i, j: extra[:, :, i[:, None], j]
        )
        assert_close(theirs.out_proj(o.transpose(1, 2).flatten(2)), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_bert(backend: str) -> None:
    config = eager(BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS))
    theirs = perturbed(BertSelfAttention(config))
    names = {"q": theirs.query, "k": theirs.key, "v": theirs.value}
    weights = {n: t.weight for n, t in names.items()}
    weights |= {f"{n}_bias": t.bias for n, t in names.items()}
    eye = torch.eye(WIDTH, dtype=torch.float64)  # Bert's output projection is another module
    ours = copy(layer(backend=backend), weights | {"output": eye, "output_bias": eye[0] * 0})
    x, keep = normal(2, 7, WIDTH).requires_grad_(), kept(7)
    want, _ = theirs(x, additive(keep[:, None, None]))
    same(ours(x, keep=keep)[0] * keep[..., None], want * keep[..., None], (x,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_gpt2(backend: str) -> None:
    """Its Conv1D weights are transposed."""
    config = eager(GPT2Config(n_embd=WIDTH, n_head=HEADS))
    theirs = perturbed(GPT2Attention(config, layer_idx=0))
    weights: dict[str, Tensor] = {"output": theirs.c_proj.weight.T}
    weights["output_bias"] = theirs.c_proj.bias
    for i, name in enumerate(("q", "k", "v")):
        weights[name] = theirs.c_attn.weight.chunk(3, 1)[i].T
        weights[f"{name}_bias"] = theirs.c_attn.bias.chunk(3)[i]
    ours = copy(layer(causal=True, backend=backend), weights)
    x = normal(2, 7, WIDTH).requires_grad_()
    want, _ = theirs(x, attention_mask=additive(triangle(7, 7))[None, None])
    same(ours(x)[0], want, (x,))
    state, outs = None, []
    for t in x.split(1, 1):
        y, state = ours(t, state)
        outs.append(y)
    assert_close(torch.cat(outs, 1), want)


@pytest.mark.parametrize("cross", [False, True])
def test_is_bart(cross: bool) -> None:
    config = eager(BartConfig())
    theirs = perturbed(BartAttention(WIDTH, HEADS, config=config))
    names = {n: getattr(theirs, f"{n}_proj") for n in ("q", "k", "v")} | {"output": theirs.out_proj}
    weights = {n: t.weight for n, t in names.items()}
    ours = copy(layer(), weights | {f"{n}_bias": t.bias for n, t in names.items()})
    x, other = normal(2, 7, WIDTH).requires_grad_(), normal(2, 9, WIDTH, seed=1).requires_grad_()
    keep = kept(9 if cross else 7)
    want, _ = theirs(
        x,
        key_value_states=other if cross else None,
        attention_mask=additive(keep[:, None, None]).expand(2, 1, 7, -1),
    )
    got, _ = ours(x, keep=keep, context=other if cross else None)
    rows = torch.ones(2, 7, 1) if cross else keep[..., None]
    same(got * rows, want * rows, (x, other) if cross else (x,))


# -- one op, three backends ------------------------------------------------------------------


class Hooks(nn.Module):
    """A bias, a multiplier and a gate with parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
        self.span = nn.Parameter(torch.tensor(4.3, dtype=torch.float64))

    def bias(self, q: Tensor, k: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return self.slope[:, None, None] * (i[:, None] - j).abs()

    def multiplier(self, i: Tensor, j: Tensor) -> Tensor:
        return 1 / (1 + (i[:, None] - j).abs() / self.span)

    def gate(self, i: Tensor, j: Tensor) -> Tensor:
        """Adaptive span's ramp."""
        return ((self.span - (i[:, None] - j).abs()) / 2 + 1).clamp(0, 1)


@pytest.mark.parametrize("named", ["", "bias", "multiplier", "gate", "bias multiplier gate"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(7, 7), (4, 9), (300, 300)])
def test_backends_agree(length: int, keys: int, causal: bool, named: str) -> None:
    """In values and gradients, with every hook, beyond one tile too."""
    hooks = Hooks()
    q, k, v = inputs(length, keys, value=5)
    keep, i, j = kept(keys), torch.arange(keys - length, keys), torch.arange(keys)
    chosen = {n: getattr(hooks, n) for n in named.split()}
    bias = chosen.pop("bias", None)
    scores = q @ k.mT / 2
    if "multiplier" in chosen:
        scores = scores * hooks.multiplier(i, j)
    if bias is not None:
        scores = scores + bias(q, k, i, j)
    seen = keep[:, None, None] & (triangle(length, keys) if causal else True)
    weights = (scores + additive(seen)).softmax(-1)
    weights = weights * hooks.gate(i, j) if "gate" in chosen else weights
    wrt = [q, k, v]
    wrt += [hooks.slope] * (bias is not None) + [hooks.span] * bool(chosen)
    for backend in BACKENDS[1 if chosen else 0 :]:
        op = attention(causal=causal, backend=backend, **chosen)
        same(op(q, k, v, keep=keep, bias=bias)[0], weights @ v, wrt)
    op = attention(causal=causal, backend="explicit", **chosen)
    assert_close(op.weights(q, k, keep=keep, bias=bias), weights)


def test_the_fused_backend_refuses_hooks_that_it_lacks() -> None:
    for name in ("multiplier", "gate"):
        with pytest.raises(LongspanError, match="backend='tiled'"):
            attention(**{name: Hooks().gate})
    # Under the shape checks of the tests, the type checker is first to refuse.
    with pytest.raises((LongspanError, TypeCheckError), match="flash"):
        attention(backend="flash")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bounded_backend_never_forms_the_matrix(backend: str) -> None:
    """For 4096 keys, no tensor of L × S scores outlives the call or is made in it."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return out

    q, k, v = (torch.zeros(1, 1, 4096, 2, requires_grad=True) for _ in range(3))
    with Watch():
        o, _ = attention(backend=backend)(q, k, v)
        o.sum().backward()
    assert (largest >= 4096 * 4096) == (backend == "explicit")


# -- the layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_widths_of_values_and_keys_may_differ_from_the_models(backend: str) -> None:
    for causal in (False, True):
        ours = layer(causal=causal, backend=backend, head_width=5, value_width=7)
        assert ours.project["q"].weight.shape == (15, WIDTH)
        assert ours.project["v"].weight.shape == (21, WIDTH)
        assert ours.output.weight.shape == (WIDTH, 21)
        x = normal(2, 6, WIDTH)
        q, k, v = (
            ours.project[n](x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in ("q", "k", "v")
        )
        mask = triangle(6, 6) if causal else None
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # scale 1/√5: of the head
        assert_close(ours(x)[0], ours.output(o.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("kv_heads", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_grouped_heads_equal_copied_ones(kv_heads: int, backend: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = attention(causal=True, backend=backend)
        grouped: Any = MultiHead(
            inner, width=WIDTH, heads=6, head_width=2, kv_heads=kv_heads
        ).double()
        full: Any = MultiHead(inner, width=WIDTH, heads=6, head_width=2).double()
    weights = {**{n: t.weight for n, t in grouped.project.items()}, "output": grouped.output.weight}
    for name in ("k", "v"):
        heads = weights[name].unflatten(0, (kv_heads, 2))
        weights[name] = heads.repeat_interleave(6 // kv_heads, 0).flatten(0, 1)
    zero = {"q_bias": 0, "k_bias": 0, "v_bias": 0, "output_bias": 0}
    copy(full, weights | {n: torch.zeros(()) for n in zero})
    x = normal(2, 7, WIDTH)
    got, state = grouped(x)
    assert_close(got, full(x)[0])
    assert state.attention.k.shape == (2, kv_heads, 7, 2)


def test_projections_start_xavier_uniform_block_by_block() -> None:
    """q, k and v are treated as separate E × E blocks; biases are zero."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ours: Any = MultiHead(attention(), width=96, heads=3)
    bound = math.sqrt(6 / (96 + 96))
    for linear in (*ours.project.values(), ours.output):
        assert 0.98 * bound < linear.weight.abs().max() <= bound
        assert abs(linear.weight.std().item() / bound * math.sqrt(3) - 1) < 0.03
        assert not linear.bias.any()


def test_wrong_heads_are_refused() -> None:
    with pytest.raises(LongspanError, match="does not divide"):
        MultiHead(attention(), width=WIDTH, heads=5)
    with pytest.raises(LongspanError, match="kv_heads must divide heads"):
        MultiHead(attention(), width=WIDTH, heads=3, kv_heads=2)


# -- identities ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_keys_the_output_is_the_mean_of_what_may_be_seen(backend: str) -> None:
    x, keep = normal(2, 7, WIDTH), kept(7)
    for causal in (False, True):
        ours = layer(causal=causal, backend=backend)
        with torch.no_grad():
            ours.project["k"].weight.zero_()
        seen = (triangle(7, 7) if causal else torch.ones(7, 7)) * keep[:, None].double()
        mean = seen / seen.sum(-1, keepdim=True) @ ours.project["v"](x)
        want = ours.output(mean) * keep[..., None]
        assert_close(ours(x, keep=keep)[0], want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_with_values_may_be_permuted_and_queries_permute_outputs(backend: str) -> None:
    q, k, v = inputs(7, 9)
    op, keep, order = attention(backend=backend), kept(9), torch.randperm(9)
    want, _ = op(q, k, v, keep=keep)
    assert_close(op(q, k[:, :, order], v[:, :, order], keep=keep[:, order])[0], want)
    turn = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    assert_close(op(q[:, :, turn], k, v, keep=keep)[0], want[:, :, turn])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_nothing_give_zero_with_zero_gradient(causal: bool, backend: str) -> None:
    q, k, v = inputs(5, 5)
    keep = torch.tensor([[False] * 5, [False, False, True, True, False]])
    with torch.no_grad():
        k[0], v[0] = torch.nan, torch.inf  # masked: may hold anything
    o, _ = attention(causal=causal, backend=backend)(q, k, v, keep=keep)
    dead = torch.zeros(2, 5, dtype=torch.bool)
    dead[0] = True
    if causal:
        dead[1, :2] = True
    assert not o.transpose(1, 2)[dead].any()
    assert o.transpose(1, 2)[~dead].all()
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    assert not dq.transpose(1, 2)[dead].any()
    for grad in (dk, dv):
        assert grad.isfinite().all()
        assert not grad.transpose(1, 2)[~keep].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_queries_than_keys_leave_the_first_blind(backend: str) -> None:
    q, k, v = inputs(9, 4)
    o, _ = attention(causal=True, backend=backend)(q, k, v)
    assert not o[:, :, :5].any()
    assert_close(o[:, :, 5], v[:, :, 0])
    assert torch.autograd.grad(o.sum(), q)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_by_token_with_a_cache_is_one_causal_pass(backend: str) -> None:
    op, state, outs = attention(causal=True, backend=backend), None, []
    q, k, v = inputs(9, 9, value=5, groups=1)
    whole, last = op(q, k, v)
    for piece in zip(*(t.split([1, 1, 1, 4, 2], 2) for t in (q, k, v)), strict=True):
        o, state = op(*piece, state)
        outs.append(o)
    assert_close(torch.cat(outs, 2), whole)
    assert state is not None
    assert_close(tuple(state), tuple(last))


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_stays_within_its_range(backend: str) -> None:
    """Two masks on a pair, and scores of ±3e4, overflow nothing in float16."""
    q, k, v = (t.detach().half().requires_grad_() for t in inputs(7, 7))
    keep = kept(7)
    keep[0, :3] = False
    o, _ = attention(causal=True, backend=backend)(100 * q, 100 * k, v, keep=keep)
    assert not o[0, :, :3].any()
    assert all(t.isfinite().all() for t in (o, *torch.autograd.grad(o.sum(), (q, k, v))))


def test_online_softmax_over_chunked_keys_is_exact_in_float32() -> None:
    """Joined over key sets of any size by their logsumexps, to 1e-5."""
    q, k, v = (t.detach().float() for t in inputs(9, 300))
    whole = dense.explicit(q, k, v)[0]
    for size in (1, 7, 128):
        parts = [
            dense.explicit(q, a, b)[::2]
            for a, b in zip(k.split(size, 2), v.split(size, 2), strict=True)
        ]
        assert_close(dense.merge([(o, z) for o, z in parts])[0], whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_falls_on_the_weights_in_training_alone(backend: str, causal: bool) -> None:
    """With values that are unit vectors the output is the weights: p of them vanish, and the rest
    grow by 1 / (1 − p), so that rows keep their sum on average."""
    q, k, v = torch.zeros(1, 1, 300, 4), torch.zeros(1, 1, 300, 4), torch.eye(300)[None, None]
    op = attention(backend=backend, dropout=0.2, causal=causal)
    seen = triangle(300, 300) if causal else torch.ones(300, 300, dtype=torch.bool)
    exact = seen / seen.sum(-1, keepdim=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = op.train()(q, k, v)[0][0, 0]
    gone = (dropped == 0) & seen
    assert abs(gone.sum() / seen.sum() - 0.2) < 0.01
    assert_close(dropped[~gone], exact[~gone] / 0.8)
    assert_close(op.eval()(q, k, v)[0][0, 0], exact)
    assert_close(op.train().weights(q, k)[0, 0], exact)  # before dropout


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_reads_the_context(causal: bool) -> None:
    """Causally the context ends where x does."""
    ours = layer(causal=causal)
    x, context = normal(2, 4, WIDTH), normal(2, 9, WIDTH, seed=1)
    q = ours.project["q"](x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
    k, v = (ours.project[n](context).unflatten(-1, (HEADS, -1)).transpose(1, 2) for n in "kv")
    mask = triangle(4, 9) if causal else None
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    assert_close(ours(x, context=context)[0], ours.output(o.transpose(1, 2).flatten(2)))
