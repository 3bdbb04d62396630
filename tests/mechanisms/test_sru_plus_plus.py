"""SRU++: the recurrence, attention in a small width, the language model."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.engines import elementwise, segment
from longspan.models.sru import SruConfig, SruForCausalLM
from longspan.nn import state_bytes
from longspan.registry import build

E = 12


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(**arguments: Any) -> Any:
    given = {"width": E, "heads": 2, "inner": 8, "causal": True, "alpha": 0.7}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build("sru-plus-plus", **given | arguments).double().eval()


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 100, 1100])
def test_the_linear_scan_is_the_loop(length: int) -> None:
    f = normal(2, length, 3).sigmoid().requires_grad_()
    u, start = normal(2, length, 3, seed=1).requires_grad_(), normal(2, 3, seed=2).requires_grad_()
    h, out = start, []
    for t in range(length):
        h = f[:, t] * h + u[:, t]
        out.append(h)
    want, got = torch.stack(out, 1), elementwise.linear(f, u, start)
    assert_close(got, want)
    toward = normal(2, length, 3, seed=3)
    for a, b in zip(
        *(torch.autograd.grad(t, (f, u, start), toward) for t in (got, want)), strict=True
    ):
        assert_close(a, b)


def test_decays_that_vanish_stay_finite() -> None:
    f, u = torch.full((1, 300, 2), 1e-30), torch.ones(1, 300, 2)
    f.requires_grad_()
    h = elementwise.linear(f, u, torch.zeros(1, 2))
    assert_close(h, torch.ones(1, 300, 2))
    h.sum().backward()
    assert f.grad is not None
    assert f.grad.isfinite().all()


@pytest.mark.parametrize("weighted", [True, False])
def test_the_gated_scan_is_the_loop(weighted: bool) -> None:
    candidate, forget = (normal(2, 70, 3, seed=n).requires_grad_() for n in (0, 1))
    start, weight = normal(2, 3, seed=2).requires_grad_(), normal(3, seed=3).requires_grad_()
    c, out = start, []
    for t in range(70):
        f = (forget[:, t] + (weight * c if weighted else 0)).sigmoid()
        c = f * c + (1 - f) * candidate[:, t]
        out.append(c)
    want = torch.stack(out, 1)
    got = elementwise.gated(candidate, forget, weight if weighted else None, start)
    assert_close(got, want)
    wanted = (candidate, forget, start, *((weight,) if weighted else ()))
    toward = normal(2, 70, 3, seed=5)
    for a, b in zip(*(torch.autograd.grad(t, wanted, toward) for t in (got, want)), strict=True):
        assert_close(a, b)


def test_without_v_c_is_a_cumulative_closed_form() -> None:
    """c_t = Σ_s (1 − f_s) U_s Π_{s<j≤t} f_j."""
    module, x = layer(linear=True), normal(1, 9, E)
    cell = module.recurrences[0]
    assert cell.forget_weight is None
    q = module.q(x)
    a = module._attended(q, segment.empty(q), None)
    candidate, forget, reset = module.output(module.inner_norm(a)).chunk(3, -1)
    f = (forget + cell.forget_bias).sigmoid()
    c = torch.zeros_like(candidate)
    for t in range(9):
        for s in range(t + 1):
            c[:, t] += (1 - f[:, s]) * candidate[:, s] * f[:, s + 1 : t + 1].prod(1)
    r = (reset + cell.reset_bias).sigmoid()
    assert_close(module(x)[0], r * c + (1 - r) * x)


def test_alpha_of_zero_is_an_sru_of_a_two_step_projection() -> None:
    """As it starts, and the same as a layer without attention."""
    fresh, plain, x = layer(alpha=0.0), layer(attends=False), normal(2, 9, E)
    assert build("sru-plus-plus", width=8).alpha == 0
    plain.load_state_dict(
        {n: t for n, t in fresh.state_dict().items() if n in plain.state_dict()}, strict=True
    )
    assert_close(plain(x)[0], fresh(x)[0])
    assert not torch.allclose(layer()(x)[0], fresh(x)[0])


OPTIONS = [
    {}, {"linear": True}, {"attends": False}, {"order": "pre"}, {"order": "post"}, {"heads": 4},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_streams_pads_learns_and_never_peeks(options: dict) -> None:
    module, x = layer(**options), normal(2, 11, E).requires_grad_()
    whole, _ = module(x)
    for sizes in ([1] * 11, [4, 6, 1]):
        outs, state = [], None
        for piece in x.split(sizes, 1):
            y, state = module(piece, state)
            outs.append(y)
        assert_close(torch.cat(outs, 1), whole)
    padded = torch.cat([torch.full((2, 3, E), torch.nan).double(), x], 1)
    assert_close(module(padded, keep=~padded.isnan().any(-1))[0][:, 3:], whole)
    (g,) = torch.autograd.grad(whole[:, :5].sum(), x, retain_graph=True)
    assert not g[:, 5:].any()
    whole.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


def test_memory_is_cut_and_detached() -> None:
    module, x = layer(memory=3), normal(1, 10, E).requires_grad_()
    _, state = module(x[:, :6])
    assert state.queue.items.shape == (1, 3, 8)
    assert not state.queue.items.requires_grad
    other = x.detach().clone()
    other[:, :3] += 1
    far, near = (module.k(module.q(t)) for t in (x, other))
    assert not torch.equal(far[:, :3], near[:, :3])
    changed = module(other[:, :6])[1]
    y, _ = module(x[:, 6:], state._replace(queue=changed.queue))
    assert_close(y, module(x[:, 6:], state)[0])
    assert state_bytes(module(x[:, 6:], state)[1]) == state_bytes(state)


def test_two_directions_share_the_attention() -> None:
    module, x = layer(causal=False), normal(2, 9, E)
    y, state = module(x)
    assert state is None
    turned = layer(causal=False)
    turned.load_state_dict(module.state_dict())
    with torch.no_grad():
        turned.output.weight.copy_(torch.cat(module.output.weight.chunk(2)[::-1]))
    turned.recurrences = turned.recurrences[::-1]
    back, _ = turned(x.flip(1))
    assert_close(torch.cat(back.flip(1).chunk(2, -1)[::-1], -1), y)


def test_dropout_of_c_is_one_mask_for_all_of_time() -> None:
    module, x = layer(dropout=0.5).train(), normal(2, 9, E)
    with torch.no_grad():
        module.recurrences[0].reset_bias.fill_(1e3)  # h = c
        with torch.random.fork_rng():
            torch.manual_seed(0)
            y, _ = module(x)
        whole, _ = module.eval()(x)
    ratio = y / whole
    assert_close(ratio, ratio[:, :1].expand_as(ratio))
    assert set(ratio[:, 0].round(decimals=6).flatten().tolist()) == {0.0, 2.0}


def language_model(**arguments: Any) -> Any:
    given = {"vocab_size": 7, "width": E, "inner": 8, "heads": 2, "layers": 4, "attends_every": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SruForCausalLM(SruConfig(**given | arguments))


def test_the_language_model_attends_in_every_kth_layer_steps_and_reloads(tmp_path: Any) -> None:
    model: Any = language_model(alpha=0.5).eval()
    stack = model.model.layers[0].mixer
    assert [each.alpha is not None for each in stack.layers] == [False, True, False, True]
    tokens = torch.randint(7, (2, 11), generator=torch.Generator().manual_seed(0))
    whole = model(tokens).logits
    cache, outs = None, []
    for token in tokens.split(1, 1):
        out = model(token, past_key_values=cache, use_cache=True)
        cache, outs = out.past_key_values, [*outs, out.logits]
    assert_close(torch.cat(outs, 1), whole)
    padded, mask = (
        torch.nn.functional.pad(t, (4, 0)) for t in (tokens, torch.ones_like(tokens))
    )  # fmt: skip
    assert_close(model(padded, attention_mask=mask).logits[:, 4:], whole)
    given = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    got, want = (model.generate(tokens, use_cache=c, **given) for c in (True, False))
    assert torch.equal(got, want)
    model.save_pretrained(tmp_path)
    assert_close(SruForCausalLM.from_pretrained(tmp_path).eval()(tokens).logits, whole)


def test_the_language_model_trains() -> None:
    model = language_model().train()
    tokens = torch.arange(20)[None].repeat(2, 1) % 5
    optimiser, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(30):
        loss = model(tokens, labels=tokens).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]


def test_bad_arguments_are_refused() -> None:
    for wrong in ({"inner": 7}, {"memory": -1}, {"causal": False, "width": 13}):
        with pytest.raises(LongspanError, match="expected an inner width"):
            layer(**wrong)
