"""Feedback Transformer: one memory for all layers, step by step."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.engines.append import Growing
from longspan.models.feedback import FeedbackConfig, FeedbackForCausalLM
from longspan.nn import state_bytes
from longspan.nn.state import reset

E, L, M = 12, 11, 4
TOKENS = torch.randint(7, (2, L), generator=torch.Generator().manual_seed(0))


def language_model(**arguments: Any) -> Any:
    given = {"vocab_size": 7, "width": E, "layers": 2, "heads": 3, "inner": 16, "memory": M}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FeedbackForCausalLM(FeedbackConfig(**given | arguments)).double().eval()
        with torch.no_grad():
            for p in model.model.layers.parameters():
                p.add_(torch.randn_like(p) / 5)
    return model


def stack(**arguments: Any) -> Any:
    return language_model(**arguments).model.layers[0].mixer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(module: Any, x: Tensor) -> Tensor:
    """Step by step, the memory concatenated."""
    config, shared = module, module.shared
    memory = [x.new_zeros(len(x), E)] * (config.memory if config.start == "zeros" else 0)
    out = []
    for t in range(x.shape[1]):
        states = [x[:, t]]
        recent = torch.stack(memory[-config.memory :], 1) if memory else x[:, :0]
        for n, layer in enumerate(module.layers):
            norm, project = (m[0 if shared else n] for m in (module.norms, module.project))
            k, v = (s.unflatten(2, (3, -1)) for s in project(norm(recent)).chunk(2, -1))
            q = layer.query(layer.norm(states[-1])).unflatten(1, (3, -1))
            o = torch.zeros_like(q)
            if memory:
                far = torch.arange(recent.shape[1] - 1, -1, -1)
                scores = torch.einsum("bhd,bshd->bhs", q, k + layer.place[far][:, None])
                weights = (scores / q.shape[2] ** 0.5).softmax(-1)
                if layer.reach is not None:
                    reach = layer.reach[:, None] * config.memory
                    soft = ((config.span + reach - far - 1) / config.span).clamp(0, 1)
                    weights = weights * soft
                    weights = weights / weights.sum(-1, keepdim=True)
                o = torch.einsum("bhs,bshd->bhd", weights, v)
            h = states[-1] + layer.output(o.flatten(1))
            states.append(h + layer.feed_forward(layer.feed_forward_norm(h)))
        if config.source == "mix":
            m = sum(w * s for w, s in zip(module.mix.softmax(0), states, strict=True))
        else:
            m = states[-1 if config.source == "last" else config.source]
        memory.append(m)
        out.append(states[-1])
    return torch.stack(out, 1)


OPTIONS = [
    {}, {"shared": False}, {"start": "zeros"}, {"source": "last"}, {"source": 0}, {"source": 1},
    {"span": 2}, {"memory": 30}, {"start": "zeros", "shared": False, "memory": 2},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_is_the_recurrence_written_out_in_values_and_gradients(options: dict) -> None:
    """Appending in place has the gradient that concatenating has."""
    module, x = stack(**options), normal(2, L, E).requires_grad_()
    got, want = module(x)[0], written_out(module, x)
    assert_close(got, want)
    wanted = [x, *(p for p in module.parameters())]
    toward = normal(2, L, E, seed=3)
    pairs = zip(
        torch.autograd.grad(got, wanted, toward, allow_unused=True, retain_graph=True),
        torch.autograd.grad(want, wanted, toward, allow_unused=True),
        strict=True,
    )
    for a, b in pairs:
        assert (a is None) == (b is None)
        if a is not None:
            assert_close(a, b)
    again = torch.autograd.grad(got, x, toward)[0]
    assert_close(again, torch.autograd.grad(written_out(module, x), x, toward)[0])


def test_appending_is_concatenating() -> None:
    start, new = normal(2, 3, 4).requires_grad_(), normal(2, 5, 4, seed=1).requires_grad_()

    def run(reads: Any) -> Tensor:
        return sum((r * (n + 1)).sin().sum() for n, r in enumerate(reads))  # pyright: ignore

    growing, reads = Growing(start, 5), []
    for t in range(5):
        growing.append(new[:, t].tanh())
        reads.append(growing.read(t, t + 4))
    whole = torch.cat([start, new.tanh()], 1)
    got = torch.autograd.grad(run(reads), (start, new))
    want = torch.autograd.grad(run([whole[:, t : t + 4] for t in range(5)]), (start, new))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_are_the_whole_and_never_peek(options: dict) -> None:
    model = language_model(**options)
    whole = model(TOKENS).logits
    for sizes in ([1] * L, [3, 7, 1], [5, 6]):
        cache, outs = None, []
        for piece in TOKENS.split(sizes, 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache, outs = out.past_key_values, [*outs, out.logits]
        assert_close(torch.cat(outs, 1), whole)
    x = normal(2, L, E).requires_grad_()
    (g,) = torch.autograd.grad(model.model.layers[0](x)[0][:, :5].sum(), x)
    assert not g[:, 5:].any()


@pytest.mark.parametrize("start", ["empty", "zeros"])
def test_padding_changes_nothing(start: str) -> None:
    model = language_model(start=start)
    want = model(TOKENS).logits
    for left, right in ((3, 0), (0, 4), (9, 2)):
        padded = torch.nn.functional.pad(TOKENS, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(TOKENS), (left, right))
        got = model(padded, attention_mask=mask, use_cache=True)
        assert_close(got.logits[:, left : left + L], want)
        more = model(TOKENS[:, :2], past_key_values=got.past_key_values)
        whole = model(torch.cat([TOKENS, TOKENS[:, :2]], 1))
        assert_close(more.logits, whole.logits[:, -2:])


def test_the_first_step_has_no_key_or_zeros() -> None:
    empty, zeros, x = stack(), stack(start="zeros"), normal(2, 1, E)
    assert empty(x)[0].isfinite().all()
    assert not torch.allclose(empty(x)[0], zeros(x)[0])


def test_one_layer_on_the_embedding_is_attention_to_strictly_past_embeddings() -> None:
    module, x = stack(layers=1, memory=30), normal(2, L, E)
    with torch.no_grad():
        module.mix.copy_(torch.tensor([60.0, 0.0]))
    layer = module.layers[0]
    k, v = (t.unflatten(2, (3, -1)) for t in module.project[0](module.norms[0](x)).chunk(2, -1))
    q = layer.query(layer.norm(x)).unflatten(2, (3, -1))
    far = torch.arange(L)[:, None] - torch.arange(L)
    p = layer.place[(far - 1).clamp(min=0)]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) + torch.einsum("bihd,ijd->bhij", q, p)
    scores = (scores / 2).masked_fill(far < 1, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    h = x + layer.output(torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2))
    assert_close(module(x)[0], h + layer.feed_forward(layer.feed_forward_norm(h)))


def test_the_mix_starts_even_and_memory_is_one_of_all_layers() -> None:
    with torch.random.fork_rng():
        model = FeedbackForCausalLM(FeedbackConfig(width=E, layers=2, heads=3, memory=M))
    module: Any = model.model.layers[0].mixer
    assert_close(module.mix.softmax(0), torch.full((3,), 1 / 3))
    states = [normal(2, E, seed=n).float() for n in range(3)]
    assert_close(module.mixed(states), sum(states) / 3)
    sizes = {s: state_bytes(stack(shared=s)(normal(2, 3, E))[1]) for s in (True, False)}
    assert sizes == {True: 2 * (M * 2 * E * 8 + 8), False: 2 * (M * 4 * E * 8 + 8)}


def test_memory_carries_over_segments_without_gradient_and_resets_by_row() -> None:
    module, x = stack(), normal(2, 6, E).requires_grad_()
    _, state = module(x)
    assert not state.pairs.requires_grad
    more = normal(2, 5, E, seed=1)
    got = module(more, reset(state, torch.tensor([True, False])))[0]
    assert_close(got[0], module(more)[0][0])
    assert_close(got[1], module(more, state)[0][1])


def test_it_learns_to_copy_saves_and_reloads(tmp_path: Any) -> None:
    model = language_model(span=2, span_loss=0.01).float().train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    tokens = torch.arange(L)[None].repeat(2, 1) % 3
    losses = []
    for _ in range(25):
        out = model(tokens, labels=tokens)
        assert set(out.auxiliary) == {"feedback_span"}
        losses.append(out.loss.item())
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in model.parameters())
    model.eval().save_pretrained(tmp_path)
    again = FeedbackForCausalLM.from_pretrained(tmp_path)
    assert_close(again(tokens).logits, model(tokens).logits)
    given = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    got, want = (model.generate(tokens, use_cache=c, **given) for c in (True, False))
    assert torch.equal(got, want)


def test_bad_arguments_are_refused() -> None:
    for wrong in ({"memory": 0}, {"source": 3}, {"heads": 5}):
        with pytest.raises(LongspanError, match="expected 1 or more"):
            language_model(**wrong)
