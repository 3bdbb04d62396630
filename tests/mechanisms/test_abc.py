"""ABC: every control against its memory kept token by token, one form, and the paper's claims."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError, build
from longspan.mechanisms.low_rank.abc import share
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.nn import MultiHead, controls


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def example(length: int = 37, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    q, *kv = (normal(2, 3, n, 8, seed=i) for i, n in enumerate((length, *(keys or length,) * 2)))
    return q, kv[0], kv[1]


def abc(**arguments: Any) -> Any:
    return build("abc", **({"heads": 3, "head_width": 8, "slots": 5} | arguments)).double().eval()


def softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
    return torch.ops.aten._safe_softmax(scores, -1) @ v


def token_by_token(q: Tensor, k: Tensor, v: Tensor, memory: Any) -> Tensor:
    """softmax(q_t K̃_tᵀ) Ṽ_t; memory(keys so far) gives the weights of each slot's sum."""
    outs = []
    for t in range(q.shape[2]):
        phi = memory(t).to(q.dtype)  # M t+1
        slots = phi @ k[:, :, : t + 1], phi @ v[:, :, : t + 1]
        outs.append(softmax(q[:, :, t : t + 1], *slots, phi.any(-1)[..., None, :]))
    return torch.cat(outs, 2)


def streamed(op: Any, inputs: tuple[Tensor, ...], keep: Tensor | None = None) -> Tensor:
    outs, state, at = [], None, 0
    for size in (1, 4, 1, 1, 12, inputs[0].shape[2] - 19):
        part = [t[:, :, at : at + size] for t in inputs]
        mask = None if keep is None else keep[:, at : at + size]
        o, state = op(*part, state, keep=mask)
        outs.append(o)
        at += size
    return torch.cat(outs, 2)


# -- general attention taking any control -----------------------------------------------------


def test_identity_control_is_dense_softmax_attention() -> None:
    q, k, v = example(20)
    dense = controls.Positional(20, length=20)
    with torch.no_grad():
        dense.weight.copy_(torch.eye(20))
    everything = torch.ones(20, 20, dtype=torch.bool)
    assert_close(abc(control=dense)(q, k, v)[0], softmax(q, k, v, everything))
    one_hot = controls.Assigned(20, table=torch.arange(20))
    got, _ = abc(control=one_hot, causal=True)(q, k, v)
    assert_close(got, softmax(q, k, v, everything.tril()))


def test_dense_phi_sums_over_the_prefix() -> None:
    q, k, v = example(20)
    dense = controls.Positional(6, length=20, heads=3).double()
    got, _ = abc(control=dense, causal=True)(q, k, v)
    phi = dense.weight.detach()
    assert_close(got, token_by_token(q, k, v, lambda t: phi[:, :, : t + 1]))
    assert_close(streamed(abc(control=dense, causal=True), (q, k, v)), got)
    with pytest.raises(LongspanError, match="length=37"):
        abc(control=dense, causal=True)(*example(37))


def test_one_hot_assignments_hold_means() -> None:
    table = torch.tensor([0, 2, 2, 1, 0, 3])
    q, k, v = example(15)
    member = torch.nn.functional.one_hot(table[torch.arange(15) % 6], 4).T.double()

    def means(t: int) -> Tensor:
        return member[:, : t + 1] / member[:, : t + 1].sum(1, keepdim=True).clamp(min=1)

    op = abc(control=controls.Assigned(4, table=table), causal=True)
    assert_close(op(q, k, v)[0], token_by_token(q, k, v, means))
    whole = abc(control=controls.Assigned(4, table=table))(q, k, v)[0]
    slots = means(14) @ k, means(14) @ v
    assert_close(whole, softmax(q, *slots, torch.ones(15, 4, dtype=torch.bool)))
    with pytest.raises(LongspanError, match="0 to 3"):
        controls.Assigned(4, table=torch.tensor([4]))


def test_a_recurrent_control_of_ones_own() -> None:
    class Newest(controls.Control):
        recurrent = True

        def forward(self, k: Any, c: Any, place: Any, *, keep: Any = None) -> Any:
            return place[:, None, :, None] * 1000.0

    q, k, v = example(12)
    assert_close(abc(control=Newest(1), causal=True)(q, k, v)[0], v)
    with pytest.raises(LongspanError, match="causal=True"):
        abc(control=Newest(1))


# -- controls ---------------------------------------------------------------------------------


def test_linformer_control_is_linformer() -> None:
    q, k, v = example(24)
    op, linformer = abc(control="linformer", length=30), build("linformer", length=30, slots=5)
    linformer = linformer.double()
    with torch.no_grad():
        for side in (linformer.keys[0], linformer.values[0]):
            side.weight.copy_(op.controls[0].weight)
    keep = torch.rand(2, 24, generator=torch.Generator().manual_seed(1)) > 0.3
    for mask in (None, keep):
        assert_close(op(q, k, v, keep=mask), linformer(q, k, v, keep=mask))


def test_random_control_holds_means_of_drawn_tokens() -> None:
    q, k, v = example(30)
    op = abc(control="random", causal=True, length=64, seed=3)
    member = torch.nn.functional.one_hot(op.controls[0].table[:30], 5).T.double()
    want = token_by_token(
        q, k, v, lambda t: member[:, : t + 1] / member[:, : t + 1].sum(1, True).clamp(min=1)
    )
    assert_close(op(q, k, v)[0], want)
    other = abc(control="random", causal=True, length=64, seed=4)
    assert not torch.equal(op.controls[0].table, other.controls[0].table)


def test_cluster_control_holds_centroids() -> None:
    """Keys around 3 directions: each slot is the mean of those around one of them."""
    centres = 20 * torch.nn.functional.one_hot(torch.arange(30) // 10, 8).double()
    q, _, v = example(30)
    k = centres + 0.01 * normal(2, 3, 30, 8, seed=5)
    memory = abc(control="cluster", slots=3).remember(k, v)
    assert_close(memory.k, k.unflatten(2, (3, 10)).mean(3))
    assert_close(memory.v, v.unflatten(2, (3, 10)).mean(3))
    online = abc(control="cluster", slots=3, causal=True)
    online.controls[0].means.centroids.copy_(centres[None, ::10])
    got, _ = online(q, k, v)
    member = torch.nn.functional.one_hot(torch.arange(30) // 10, 3).T.double()
    want = token_by_token(
        q, k, v, lambda t: member[:, : t + 1] / member[:, : t + 1].sum(1, True).clamp(min=1)
    )
    assert_close(got, want)
    assert_close(streamed(online, (q, k, v)), got)


def test_cluster_centroids_follow_the_keys_in_training_only() -> None:
    op = abc(control="cluster", causal=True)
    before = op.controls[0].means.centroids.clone()
    op(*example())
    assert torch.equal(op.controls[0].means.centroids, before)
    op.train()(*example())
    assert not torch.equal(op.controls[0].means.centroids, before)


@pytest.mark.parametrize("dilation", [1, 3])
def test_window_control_is_a_masked_dense_window(dilation: int) -> None:
    q, k, v = example()
    age = torch.arange(37)[:, None] - torch.arange(37)
    seen = (age >= 0) & (age < 5 * dilation) & (age % dilation == 0)
    op = abc(control="window", causal=True, dilation=dilation)
    assert_close(op(q, k, v)[0], softmax(q, k, v, seen))
    assert_close(streamed(op, (q, k, v)), softmax(q, k, v, seen))


def test_compressive_control_averages_what_leaves_the_window() -> None:
    recent, pooled, rate = 4, 3, 3

    def memory(t: int) -> Tensor:
        window, means = list(range(t + 1)), []
        while len(window) - rate >= recent:
            means, window = [*means, window[:rate]][-pooled:], window[rate:]
        rows = torch.zeros(len(means) + len(window), t + 1)
        for row, tokens in enumerate([*means, *([i] for i in window)]):
            rows[row, tokens] = 1 / len(tokens)
        return rows

    def by_mass(t: int) -> Tensor:
        left = max(t + 1 - recent, 0) // rate * rate
        groups = [list(range(i, i + rate)) for i in range(0, left, rate)][-pooled:]
        rows = torch.zeros(len(groups) + t + 1 - left, t + 1)
        for row, tokens in enumerate([*groups, *([i] for i in range(left, t + 1))]):
            rows[row, tokens] = 1 / len(tokens)
        return rows

    assert all(torch.equal(memory(t), by_mass(t)) for t in range(37))
    q, k, v = example()
    op = abc(control=controls.Compressed(recent, pooled, rate=rate), causal=True)
    assert_close(op(q, k, v)[0], token_by_token(q, k, v, memory))
    assert_close(streamed(op, (q, k, v)), op(q, k, v)[0])
    named = abc(control="compressive", slots=7, rate=rate, causal=True)
    assert_close(named(q, k, v), op(q, k, v))


def test_union_of_prefix_and_window_is_global_and_local() -> None:
    q, k, v = example()
    i = torch.arange(37)
    seen = ((i < 3) | (i[:, None] - i < 4)) & (i <= i[:, None])
    op = abc(control=("prefix", "window"), slots=(3, 4), causal=True)
    assert_close(op(q, k, v)[0], softmax(q, k, v, seen))
    assert_close(streamed(op, (q, k, v)), op(q, k, v)[0])


@pytest.mark.parametrize(
    "control", ["linformer", "random", "cluster", "prefix", ("mlp", "linformer", "prefix")]
)
@pytest.mark.parametrize("causal", [False, True])
def test_controls_look_at_kept_tokens_alone(control: Any, causal: bool) -> None:
    op, (q, k, v) = abc(control=control, causal=causal), example()
    keep = torch.rand(2, 37, generator=torch.Generator().manual_seed(2)) > 0.4
    k, v = (t.masked_fill(~keep[:, None, :, None], torch.nan) for t in (k, v))
    got, _ = op(q, k, v, keep=keep)
    for b in range(2):
        rows = [t[b : b + 1, :, keep[b]] for t in (q, k, v)]
        assert_close(got[b : b + 1, :, keep[b]], op(*rows)[0])
    if causal:
        assert_close(streamed(op, (q, k, v), keep), got)


# -- the learned control ------------------------------------------------------------------------


def test_forms_of_the_learned_control_agree() -> None:
    """The last causal output is the bidirectional one of the whole prefix, and so is a step's."""
    whole, causal = abc(), abc(causal=True)
    causal.load_state_dict(whole.state_dict())
    q, k, v = example()
    assert_close(causal(q, k, v)[0][:, :, -1:], whole(q[:, :, -1:], k, v)[0])
    _, state = causal(*(t[:, :, :-1] for t in (q, k, v)))
    last, _ = causal(*(t[:, :, -1:] for t in (q, k, v)), state)
    assert_close(last, whole(q[:, :, -1:], k, v)[0])


def test_zero_weights_give_the_mean_of_the_prefix() -> None:
    op, (q, k, v) = abc(causal=True), example()
    torch.nn.init.zeros_(op.controls[0].weight)
    means = v.cumsum(2) / torch.arange(1, 38)[:, None]
    assert_close(op(q, k, v)[0], means)


def test_layers_share_the_learned_control() -> None:
    mixers: Any = [{"id": "abc", "slots": 3}]
    config = LongspanConfig(vocab_size=11, width=12, heads=2, layers=2, mixers=mixers)
    model: Any = LongspanForCausalLM(config)
    before = sum(p.numel() for p in model.parameters())
    share(model)
    first, second = (layer.mixer for layer in model.model.layers)
    assert first.attention.controls is second.attention.controls
    assert first.project["c"] is second.project["c"]
    saved = 2 * 3 * 6 + 12 * 12 + 12
    assert sum(p.numel() for p in model.parameters()) == before - saved
    model(torch.randint(11, (2, 9)), labels=torch.randint(11, (2, 9))).loss.backward()
    with pytest.raises(LongspanError, match="no abc layer"):
        share(MultiHead(abc(control="window", causal=True), width=24, heads=3))


def test_exponents_of_any_size_stay_finite_and_causal() -> None:
    op = abc(causal=True)
    q, k, v = example(100)
    with torch.no_grad():
        op.controls[0].weight.mul_(1e4)
    v = v.requires_grad_()
    out, _ = op(q, k, v)
    alpha = (v.detach() @ op.controls[0].weight.mT)[:, :, None].expand(-1, -1, 100, -1, -1)
    future = torch.ones(100, 100, dtype=torch.bool).triu(1)[..., None]
    phi = alpha.masked_fill(future, -torch.inf).softmax(3)
    k, held = (torch.einsum("bhtsm,bhsd->bhtmd", phi, t) for t in (k, v.detach()))
    assert_close(out, softmax(q[..., None, :], k, held, torch.ones(1, 5).bool())[..., 0, :])
    (gradient,) = torch.autograd.grad(out.sum(), v)
    assert gradient.isfinite().all()


def test_encoder_memory_is_made_once() -> None:
    op, (q, k, v) = abc(), example(9, 40)
    keep = torch.rand(2, 40, generator=torch.Generator().manual_seed(3)) > 0.3
    memory = op.remember(k, v, keep=keep)
    steps = [op.recall(q[:, :, t : t + 1], memory) for t in range(9)]
    assert_close(torch.cat(steps, 2), op(q, k, v, keep=keep)[0])


def test_state_does_not_grow() -> None:
    op = abc(causal=True)
    _, state = op(*example(20))
    _, later = op(*example(37), state)
    assert [t.sums.shape for t in (*later.k, *later.v)] == [(2, 3, 5, 8)] * 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"control": "nearest"}, "no control 'nearest'"),
        ({"control": "mlp", "heads": None}, "needs heads"),
        ({"control": "window"}, "causal=True"),
        ({"control": ("mlp", "prefix"), "slots": (3,)}, "2 controls and 1"),
        ({"slots": 0}, "0 slots"),
        ({"control": "compressive", "slots": 1, "causal": True}, "pooled=0"),
    ],
)
def test_refusals(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(LongspanError, match=match):
        abc(**arguments)


def test_values_of_another_width_need_their_own_projection() -> None:
    q, k, _ = example()
    with pytest.raises(LongspanError, match="width"):
        abc()(q, k, normal(2, 3, 37, 6))
    assert abc(control="prefix")(q, k, normal(2, 3, 37, 6))[0].shape == (2, 3, 37, 6)
