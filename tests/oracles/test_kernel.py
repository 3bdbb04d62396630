"""Kernel attention against its weights written out, and fla's recurrence where it is at hand."""

import importlib.util
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from longspan.nn import MultiHead, state_bytes
from longspan.registry import build

LENGTHS = [1, 7, 64, 65, 130]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs(length: int, keys: int, *, width: int = 4, value: int = 6) -> Any:
    q, k = normal(2, 3, length, width), normal(2, 3, keys, width, seed=1)
    return [t.requires_grad_() for t in (q, k, normal(2, 3, keys, value, seed=2))]


def kept(keys: int) -> Tensor:
    keep = torch.rand(2, keys, generator=torch.Generator().manual_seed(3)) > 0.3
    keep[:, 0] = True
    return keep


def linear(**arguments: Any) -> Any:
    return build("linear-transformer", **arguments)


def constant(x: Tensor) -> Tensor:
    return torch.ones_like(x[..., :1])


def squares(x: Tensor) -> Tensor:
    """A φ to another width: 1, x and all products, so that φ(q)·φ(k) = 1 + q·k + (q·k)²."""
    products = (x[..., :, None] * x[..., None, :]).flatten(-2)
    return torch.cat([torch.ones_like(x[..., :1]), x, products], -1)


def elu(q: Tensor, k: Tensor) -> Tensor:
    return (F.elu(q) + 1) @ (F.elu(k) + 1).mT


MAPS: list[Any] = [
    (None, elu),
    (squares, lambda q, k: 1 + q @ k.mT + (q @ k.mT) ** 2),
    (torch.exp, lambda q, k: q.exp() @ k.exp().mT),
    (F.relu, lambda q, k: q.relu() @ k.relu().mT),
]


def same(got: Tensor, want: Tensor, wrt: Any) -> None:
    assert_close(got, want)
    toward = normal(*want.shape, seed=9)
    found, wanted = (torch.autograd.grad(t, wrt, toward, retain_graph=True) for t in (got, want))
    assert_close(found, wanted)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("features", MAPS, ids=["elu+1", "squares", "exp", "relu"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), [*((n, n) for n in LENGTHS), (5, 70), (66, 70)])
def test_is_the_weights_written_out(
    length: int, keys: int, causal: bool, features: Any, masked: bool
) -> None:
    """Whole and cross, with any φ, in values and gradients."""
    phi, weigh = features
    q, k, v = inputs(length, keys)
    op = linear(causal=causal) if phi is None else linear(causal=causal, features=phi)
    keep = kept(keys) if masked else None
    weights = weigh(q, k)
    weights = weights.tril(keys - length) if causal else weights
    weights = weights if keep is None else weights * keep[:, None, None]
    want = weights @ v / (weights.sum(-1, keepdim=True) + op.eps)
    same(op(q, k, v, keep=keep)[0], want, (q, k, v))


@pytest.mark.parametrize("causal", [False, True])
def test_cross_attention_through_multihead(causal: bool) -> None:
    """The encoder–decoder form; causally the context ends where x does."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer: Any = MultiHead(linear(causal=causal), width=12, heads=3).double()
    x, context, keep = normal(2, 5, 12), normal(2, 9, 12, seed=1), kept(9)
    q = layer.project["q"](x).unflatten(-1, (3, 4)).transpose(1, 2)
    clean = context.masked_fill(~keep[..., None], 0)
    k, v = (layer.project[n](clean).unflatten(-1, (3, 4)).transpose(1, 2) for n in "kv")
    weights = elu(q, k) * keep[:, None, None]
    weights = weights.tril(4) if causal else weights
    o = weights @ v / (weights.sum(-1, keepdim=True) + layer.attention.eps)
    got, _ = layer(x, context=context, keep=keep)
    assert_close(got, layer.output(o.transpose(1, 2).flatten(2)))


def test_the_gradients_are_the_papers_two_scans() -> None:
    """dφ(q_i) = S_i G_i, dφ(k_i) = R_i v_i, dv_i = R_iᵀ φ(k_i), with R_i = Σ_{j≥i} φ(q_j) G_jᵀ
    (Eqs. 13 to 15), where the features are given as they are."""
    q, k, v = (t.detach().abs().requires_grad_() for t in inputs(9, 9))
    op = linear(causal=True, features=lambda x: x, eps=0.0)
    o, _ = op(q, k, v)
    do = normal(*o.shape, seed=5)
    found = torch.autograd.grad(o, (q, k, v), do)
    ones = torch.ones_like(v[..., :1])
    wide = torch.cat([v, ones], -1).detach()
    total = (q @ k.mT).tril().sum(-1, keepdim=True).detach()
    g = torch.cat([do, -(do * o.detach()).sum(-1, keepdim=True)], -1) / total
    s = (k[..., :, None] * wide[..., None, :]).cumsum(2).detach()
    r = (q[..., :, None] * g[..., None, :]).flip(2).cumsum(2).flip(2).detach()
    dq = (s * g[..., None, :]).sum(-1)
    dk = (r * wide[..., None, :]).sum(-1)
    dv = (r * k[..., :, None]).sum(-2)[..., :-1]
    assert_close(found, (dq, dk, dv))


def test_passes_gradcheck() -> None:
    q, k, v = (t[:1, :1].detach().requires_grad_() for t in inputs(7, 7, width=2, value=2))
    state = normal(1, 1, 2, 3, seed=4).abs().requires_grad_()

    def run(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return linear(causal=True)(q, k, v, state)

    assert torch.autograd.gradcheck(run, (q, k, v, state))


def test_a_constant_map_gives_the_mean() -> None:
    """Of all values, of those so far, of those that are kept."""
    q, k, v = inputs(70, 70)
    keep = kept(70)
    mean = linear(features=constant, eps=0.0)
    assert_close(mean(q, k, v)[0], v.mean(2, keepdim=True).expand_as(v))
    seen = keep[:, None, :, None]
    kept_mean = (v * seen).sum(2, keepdim=True) / seen.sum(2, keepdim=True)
    assert_close(mean(q, k, v, keep=keep)[0], kept_mean.expand_as(v))
    running = linear(features=constant, eps=0.0, causal=True)
    count = torch.arange(1, 71)[:, None]
    assert_close(running(q, k, v)[0], v.cumsum(2) / count)
    assert_close(running(q, k, v, keep=keep)[0], (v * seen).cumsum(2) / seen.cumsum(2))


@pytest.mark.parametrize("prefix", [1, 40, 64, 100])
def test_a_state_filled_by_a_prefix_is_stepped_on(prefix: int) -> None:
    op = linear(causal=True)
    q, k, v = inputs(110, 110)
    whole, last = op(q, k, v)
    o, state = op(*(t[:, :, :prefix] for t in (q, k, v)))
    outs = [o]
    for piece in zip(*(t[:, :, prefix:].split(1, 2) for t in (q, k, v)), strict=True):
        o, state = op(*piece, state)
        outs.append(o)
    assert_close(torch.cat(outs, 2), whole)
    assert_close(state, last)
    sums = (F.elu(k) + 1).mT @ torch.cat([v, torch.ones_like(v[..., :1])], -1)
    assert_close(last, sums)  # S, with z as its last column
    assert state_bytes(state) == state_bytes(op(q[:, :, :1], k[:, :, :1], v[:, :, :1])[1])


def test_padding_is_zeroed_after_the_map() -> None:
    """elu(0) + 1 = 1: a key of zeros would count as one."""
    q, k, v = inputs(9, 9)
    keep = kept(9)
    holes = ~keep[:, None, :, None]
    masked, _ = linear()(q, k, v, keep=keep)
    zeros, _ = linear()(q, k.masked_fill(holes, 0), v.masked_fill(holes, 0))
    assert not torch.allclose(masked, zeros)
    rows = keep[0].nonzero()[:, 0]
    assert_close(masked[:1], linear()(q[:1], k[:1, :, rows], v[:1, :, rows])[0])


def test_eps_keeps_the_quotient_finite() -> None:
    """Where φ(q) and φ(k) do not meet, numerator and denominator are 0."""
    q, k = torch.tensor([1.0, -1.0]).view(1, 1, 1, 2), torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2)
    q, k, v = (t.clone().requires_grad_() for t in (q, k, torch.ones(1, 1, 1, 3)))
    for causal in (False, True):
        o, _ = linear(causal=causal, features=F.relu)(q, k, v)
        assert not o.any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(o.sum(), (q, k, v)))
    bigger, _ = linear(eps=2.0)(q, q, v)
    weight = ((F.elu(q) + 1) ** 2).sum()
    assert_close(bigger, (weight / (weight + 2)).expand_as(bigger))


@pytest.mark.parametrize("causal", [False, True])
def test_autocast_sums_in_float32(causal: bool) -> None:
    """The error is that of rounding the inputs, not of 4096 sums in bfloat16."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = MultiHead(linear(causal=causal), width=8, heads=2)
    exact = MultiHead(linear(causal=causal), width=8, heads=2).double()
    exact.load_state_dict(layer.state_dict())
    x = normal(1, 4096, 8)
    want = exact(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got, state = layer(x.float())
    assert got.dtype == torch.bfloat16
    assert_close(got.double(), want, atol=0.02, rtol=0.02)
    if causal:
        assert state is not None
        assert state.attention.dtype == torch.float32
        # A sum of 4096 positive terms in bfloat16 would stop near 512.
        assert_close(state.attention.double(), exact(x)[1].attention, rtol=0.02, atol=4.0)


def saved(run: Any) -> int:
    """Elements that autograd keeps for the backward pass, each storage counted once."""
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes() // t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    del kept
    return sum(found.values())


def test_the_backward_pass_keeps_no_state_per_token() -> None:
    """Kept elements grow by a few L (D + V), not by L·D·V, of which the naive form keeps all."""
    width = 32

    def elements(length: int) -> int:
        q, k, v = (normal(1, 1, length, width, seed=i).requires_grad_() for i in range(3))
        return saved(lambda: linear(causal=True)(q, k, v))

    growth = (elements(4096) - elements(2048)) / 2048
    assert growth < 16 * width
    assert growth < width * (width + 1) / 2

    def naive(length: int) -> int:
        q, k, v = (normal(1, 1, length, width, seed=i).requires_grad_() for i in range(3))
        return saved(lambda: q[..., None, :] @ (k[..., None] * v[..., None, :]).cumsum(2))

    assert (naive(512) - naive(256)) / 256 > width * width


def fla() -> ModuleType:
    """fla-core's naive file, loaded by its path: the package itself wants a GPU."""
    spec = PathFinder.find_spec("fla")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder) / "ops" / "linear_attn" / "naive.py"
        if path.exists():
            loader = importlib.util.spec_from_file_location("fla_naive", path)
            assert loader is not None
            assert loader.loader is not None
            module = importlib.util.module_from_spec(loader)
            loader.loader.exec_module(module)
            return module
    pytest.skip("fla-core is not installed: pip install --no-deps fla-core")


@pytest.mark.parametrize("started", [False, True])
def test_is_flas_naive_recurrence(started: bool) -> None:
    """Tokens first there, and with normalisation its scale cancels; it computes in float32."""
    theirs = fla()
    q, k, v = (t.detach().float() for t in inputs(70, 70))
    op = linear(causal=True)
    state = None
    if started:
        _, state = op(*(t.detach().float() for t in inputs(9, 9)))
    phi = [(F.elu(t) + 1).transpose(1, 2) for t in (q, k)]
    before = None if state is None else (state[..., :-1], state[..., -1][:, None])
    want, (sums, z) = theirs.naive_recurrent_linear_attn(
        *phi, v.transpose(1, 2), initial_state=before, output_final_state=True, normalize=True
    )
    got, last = op(q, k, v, state)
    assert_close(got, want.transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert_close(last[..., :-1], sums, atol=1e-4, rtol=1e-5)
    assert_close(last[..., -1], z[:, 0], atol=1e-4, rtol=1e-5)
