"""Reversible residuals: undone, differentiated as autograd would, and no deeper in memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan import LongspanError, build
from longspan.engines import reversible
from longspan.engines.reversible import Step
from longspan.models import LongspanConfig, LongspanForCausalLM, LongspanForSeq2SeqLM, LongspanModel
from longspan.nn import FeedForward, MultiHead
from longspan.nn.auxiliary import report
from longspan.nn.hashed import HashedAttention
from longspan.testing.counting import held

WIDTH, TOKENS = 12, 7
EXACT = {torch.float32: 1e-5, torch.float64: 1e-12}


class Attend(nn.Module):
    """attention(LN(x)) with a projection of what it may read beside x."""

    def __init__(self, *, dropout: float = 0.0, mixer: str = "multi-head-attention") -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(dropout)
        self.mixer = MultiHead(build(mixer), width=WIDTH, heads=3)

    def forward(self, x: Tensor, context: Tensor | None = None, *_: Any) -> Tensor:
        return self.dropout(self.mixer(self.norm(x), context=context)[0])


class Feed(nn.Sequential):
    """feed_forward(LN(x)), whatever else is given."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__(nn.LayerNorm(WIDTH), FeedForward(WIDTH, inner=16, dropout=dropout))

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return super().forward(x)


def branches(depth: int = 3, *, seed: int = 0, **options: Any) -> nn.ModuleList:
    torch.manual_seed(seed)
    return nn.ModuleList(
        Attend(**options) if n % 2 == 0 else Feed(dropout=options.get("dropout", 0.0))
        for n in range(2 * depth)
    ).double()


def inputs(*shape: int, seed: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (2, TOKENS, WIDTH)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def written_out(parts: Any, x_1: Tensor, x_2: Tensor, *reads: Any) -> tuple[Tensor, Tensor]:
    """Gomez et al., Eq. 6, by autograd."""
    for f, g in zip(parts[::2], parts[1::2], strict=True):
        y_1 = x_1 + f(x_2, *reads)
        y_2 = x_2 + g(y_1, *reads)
        x_1, x_2 = y_1, y_2
    return x_1, x_2


def mean(pair: tuple[Tensor, Tensor]) -> Tensor:
    return (pair[0] + pair[1]) / 2


def compare(
    run: Callable[[], Tensor], want: Callable[[], Tensor], of: Any, *, within: float = 1e-10
) -> None:
    """Values and gradients agree, both started from one seed, which both leave alike."""
    of, outs = list(of), []
    for call in (run, want):
        torch.manual_seed(11)
        out = call()
        drawn = torch.rand(1)
        grads = torch.autograd.grad(out.sin().sum(), of, allow_unused=True)
        outs.append((out, drawn, *(torch.zeros(()) if g is None else g for g in grads)))
    for got, right in zip(*outs, strict=True):
        torch.testing.assert_close(got, right, rtol=within, atol=within)
    assert any(bool(g.any()) for g in outs[0][2:])


@pytest.mark.parametrize("dtype", EXACT)
def test_the_explicit_inverse_gives_back_the_inputs(dtype: torch.dtype) -> None:
    parts, residual = branches(6).to(dtype).eval(), build("reversible-residual")
    a, b = inputs(dtype=dtype), inputs(seed=6, dtype=dtype)
    back = residual.undo(parts, *residual.through(parts, a, b))
    for got, want in zip(back, (a, b), strict=True):
        torch.testing.assert_close(got, want, rtol=EXACT[dtype], atol=EXACT[dtype])


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_gradients_are_those_of_autograd_for_any_list_of_branches(count: int) -> None:
    parts, residual, x = branches()[:count], build("reversible-residual", leave="concat"), inputs()

    def want() -> Tensor:
        steps = [Step(part, [part]) for part in parts]
        return torch.cat(reversible.kept(steps, x, x), -1)

    compare(lambda: residual(parts, x), want, [x, *parts.parameters()])


def test_a_pair_is_the_papers_block() -> None:
    parts, x = branches(), inputs(2, TOKENS, 2 * WIDTH)
    split = build("reversible-residual", enter="split", leave="concat")
    want = lambda: torch.cat(written_out(parts, *x.chunk(2, -1)), -1)  # noqa: E731
    compare(lambda: split(parts, x), want, [x, *parts.parameters()])


def test_dropout_is_replayed() -> None:
    parts, x = branches(dropout=0.3), inputs()
    residual = build("reversible-residual")
    want = lambda: mean(written_out(parts, x, x))  # noqa: E731
    compare(lambda: residual(parts, x), want, [x, *parts.parameters()])


def test_bucket_choices_are_replayed() -> None:
    torch.manual_seed(0)
    attention = build("reformer-lsh", chunk=4, rounds=2, redraw=True)
    mixer = MultiHead(attention, width=WIDTH, heads=3).double()
    parts = nn.ModuleList([_Alone(mixer), Feed().double()])
    residual, x = build("reversible-residual"), inputs(1, 24, WIDTH)
    want = lambda: mean(written_out(parts, x, x))  # noqa: E731
    compare(lambda: residual(parts, x), want, [x, *parts.parameters()])


class _Alone(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x)[0]


def test_autocast_is_replayed() -> None:
    parts, x = branches(1).float(), inputs(dtype=torch.float32)
    residual = build("reversible-residual")

    def under(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return call()

        return run

    want = under(lambda: mean(written_out(parts, x, x)))
    compare(under(lambda: residual(parts, x)), want, [x, *parts.parameters()], within=2e-2)
    got = []
    for inside in (False, True):  # the backward pass in and out of autocast
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = residual(parts, x).sum()
            if inside:
                got.append(torch.autograd.grad(out, list(parts.parameters()), allow_unused=True))
        if not inside:
            got.append(torch.autograd.grad(out, list(parts.parameters()), allow_unused=True))
    for a, b in zip(*got, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def test_side_inputs_get_gradients_and_masks_do_not() -> None:
    parts = nn.ModuleList([Attend(), Attend(), Feed()]).double()
    residual, x, memory = build("reversible-residual"), inputs(), inputs(2, 5, WIDTH, seed=7)
    mask = torch.ones(2, 5, dtype=torch.bool)
    encoded = memory.sin()  # not a leaf: its own graph goes on

    def want() -> Tensor:
        steps = [Step(lambda x, part=part: part(x, encoded, mask)) for part in parts]
        return mean(reversible.kept(steps, x, x))

    of = [x, memory, *parts.parameters()]
    compare(lambda: residual(parts, x, (memory.sin(), mask)), want, of)


def test_buffers_change_once_and_are_recomputed_as_they_were() -> None:
    class Centred(nn.Module):
        """Subtracts a running mean that it then moves."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)
            self.register_buffer("mean", torch.zeros(WIDTH, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x - self.mean).tanh()
            self.mean = self.mean.lerp(x.detach().mean((0, 1)), 0.5)
            return y

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.mT).mT

    torch.manual_seed(0)
    first = nn.ModuleList([Centred(), Normed(), Centred(), Normed()]).double()
    second, x = copy.deepcopy(first), inputs()
    residual = build("reversible-residual")
    residual(first, x).sin().sum().backward()
    got, x.grad = x.grad, None
    mean(written_out(second, x, x)).sin().sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-10, atol=1e-10)
    for (name, a), (_, b) in zip(first.named_buffers(), second.named_buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_activations_do_not_grow_with_depth() -> None:
    def most(depth: int, *, recompute: bool) -> int:
        parts = branches(depth, dropout=0.1).requires_grad_(False)
        steps, x = [Step(part, [part]) for part in parts], inputs(2, 64, WIDTH)
        run = reversible.run if recompute else reversible.kept
        return held(lambda: torch.autograd.grad(mean(run(steps, x, x)).sum(), x))

    assert most(12, recompute=True) == most(2, recompute=True)
    assert most(12, recompute=False) > 4 * most(2, recompute=False)


def test_half_precision_streams_are_summed_in_float32() -> None:
    parts, x = branches(4).to(torch.bfloat16), inputs(dtype=torch.float32).bfloat16().detach()
    x.requires_grad_()
    steps = [Step(part, [part]) for part in parts]
    kept, run = (
        torch.autograd.grad(mean(f(steps, x, x)).float().sum(), x)[0]
        for f in (reversible.kept, reversible.run)
    )
    assert run.dtype == torch.bfloat16
    torch.testing.assert_close(run, kept, rtol=0.05, atol=0.05)


def test_shared_branches_add_up_their_gradients() -> None:
    part, x = Feed().double(), inputs()
    residual = build("reversible-residual")
    want = lambda: mean(written_out([part] * 4, x, x))  # noqa: E731
    compare(lambda: residual([part] * 4, x), want, [x, *part.parameters()])


def test_changed_weights_are_refused() -> None:
    part, x = Attend().double(), inputs()
    out = build("reversible-residual")([part], x).sum()
    with torch.no_grad():
        part.norm.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        out.backward()


@pytest.mark.slow
def test_works_with_ddp() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts, self.residual = branches(2, dropout=0.2), build("reversible-residual")

        def forward(self, x: Tensor) -> Tensor:
            return self.residual(self.parts, x)

    net, x = Net(), inputs()
    store = torch.distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        apart = nn.parallel.DistributedDataParallel(copy.deepcopy(net))
        for model in (net, apart):
            torch.manual_seed(3)
            model(x).sin().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    for a, b in zip(net.parameters(), apart.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad)


def test_revnet_splits_channels_and_down_samples_between() -> None:
    def unit(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1)
        )

    torch.manual_seed(0)
    stages = nn.ModuleList(nn.ModuleList(unit(c) for _ in range(4)) for c in (2, 4)).double()
    down = nn.Conv2d(4, 8, 3, stride=2, padding=1).double()
    residual = build("reversible-residual", enter="split", leave="concat", axis=1)
    image = inputs(2, 4, 6, 6)

    def want() -> Tensor:
        x = torch.cat(written_out(stages[0], *image.chunk(2, 1)), 1)
        return torch.cat(written_out(stages[1], *down(x).chunk(2, 1)), 1)

    of = [image, *stages.parameters(), *down.parameters()]
    compare(lambda: residual(stages[1], down(residual(stages[0], image))), want, of)
    assert residual(stages[0], image).shape == (2, 4, 6, 6)


def test_adapters_enter_and_leave() -> None:
    x = inputs()
    first, second = build("reversible-residual").enter(x)
    assert first is x
    assert second is x
    halves = build("reversible-residual", enter="split", leave="concat")
    assert torch.equal(halves.leave(*halves.enter(x)), x)
    assert torch.equal(build("reversible-residual").leave(x, 3 * x), 2 * x)
    normed = build("reversible-residual", leave="concat-norm", width=WIDTH).double()
    want = torch.nn.functional.layer_norm(torch.cat([x, 2 * x], -1), (2 * WIDTH,))
    torch.testing.assert_close(normed.leave(x, 2 * x), want)
    with pytest.raises(LongspanError, match="width"):
        build("reversible-residual", leave="concat-norm")
    with pytest.raises(LongspanError, match="do not split"):
        halves.enter(torch.zeros(1, 2, 3))


def test_equals_the_reformer_encoder_of_transformers() -> None:
    from transformers import ReformerConfig
    from transformers.models.reformer.modeling_reformer import ReformerEncoder

    config = ReformerConfig(
        attn_layers=["local", "local", "local"], num_attention_heads=3, attention_head_size=4,
        hidden_size=WIDTH, feed_forward_size=16, local_attn_chunk_length=4, is_decoder=False,
        local_attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = ReformerEncoder(config).double().train()

    class Their(nn.Module):
        def __init__(self, part: nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, x: Tensor) -> Tensor:
            out = self.part(x)
            return getattr(out, "hidden_states", out)

    halves = [(layer.attention, layer.feed_forward) for layer in theirs.layers]
    parts = [Their(half) for pair in halves for half in pair]  # pyright: ignore[reportArgumentType]
    residual = build("reversible-residual", leave="concat-norm", width=WIDTH).double()
    residual.norm.load_state_dict(theirs.layer_norm.state_dict())
    residual.norm.eps = theirs.layer_norm.eps
    x, grads = inputs(2, 8, WIDTH), []
    outs = [residual(parts, x), theirs(x).hidden_states]
    for out in outs:
        theirs.zero_grad()
        x.grad = None
        out.sin().sum().backward()
        grads.append([x.grad, *(p.grad for p in theirs.layers.parameters())])
    torch.testing.assert_close(*outs, rtol=1e-10, atol=1e-10)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def model(kind: type = LongspanModel, **options: Any) -> Any:
    config = LongspanConfig(
        vocab_size=11, width=WIDTH, heads=3, layers=3, residual="reversible-residual", **options
    )
    torch.manual_seed(0)
    return kind(config).double()


def test_a_model_trains_streams_and_saves(tmp_path: Any) -> None:
    net = model(LongspanForCausalLM, dropout=0.0)
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1))
    net.train()(input_ids=tokens, labels=tokens).loss.backward()
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
        changed = tokens.clone()
        changed[:, 5:] = 0
        assert torch.equal(net(input_ids=changed).logits[:, :5], whole[:, :5])
        padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
        mask = torch.arange(12).expand(2, -1) >= 3
        got = net(input_ids=padded, attention_mask=mask.long()).logits[:, 3:]
        torch.testing.assert_close(got, whole)
        net.save_pretrained(tmp_path)
        again = LongspanForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
        torch.testing.assert_close(again(input_ids=tokens).logits, whole)


def test_a_reformer_draws_its_buckets_and_dropout_again_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Strictly causal LSH, with directions drawn anew at each call: gradients are those of the
    same layers with everything kept."""
    lsh = {"id": "reformer-lsh-causal", "window": 3, "buckets": 4, "rounds": 2, "redraw": True}
    net = model(LongspanForCausalLM, mixers=[lsh], dropout=0.2, position="sinusoidal-position")
    tokens = torch.randint(11, (2, 40), generator=torch.Generator().manual_seed(1))
    drawn: list[Tensor] = []
    directions = HashedAttention.directions

    def recorded(self: HashedAttention, q: Tensor) -> Tensor:
        drawn.append(directions(self, q))
        return drawn[-1]

    monkeypatch.setattr(HashedAttention, "directions", recorded)

    def gradients() -> tuple[Tensor, list[Tensor | None]]:
        torch.manual_seed(7)
        net.zero_grad()
        loss = net.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        return loss.detach(), [p.grad for p in net.parameters()]

    again = gradients()
    assert len(drawn) == 6
    assert all(torch.equal(a, b) for a, b in zip(drawn[:3], drawn[:2:-1], strict=True))
    assert not torch.equal(drawn[0], drawn[1])
    monkeypatch.setattr(reversible, "run", reversible.kept)
    kept = gradients()
    assert len(drawn) == 9
    torch.testing.assert_close(again, kept, rtol=1e-9, atol=1e-12)


def test_a_reformer_of_strictly_causal_layers_trains() -> None:
    lsh = {"id": "reformer-lsh-causal", "window": 4, "buckets": 4, "rounds": 2, "redraw": True}
    net = model(LongspanForCausalLM, mixers=[lsh], dropout=0.1).float().train()
    tokens = torch.arange(48)[None] % 5 + 1
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-2), []
    for _ in range(30):
        optimizer.zero_grad()
        loss = net(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    net.eval()
    whole, past, outs = net(input_ids=tokens).logits, None, []
    for piece in tokens.split([40, 1, 7], 1):
        out = net(input_ids=piece, past_key_values=past, use_cache=True)
        past = out.past_key_values
        outs.append(out.logits)
    torch.testing.assert_close(torch.cat(outs, 1), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(LongspanError, match="hashed by other directions"):
        net.train()(input_ids=tokens[:, :4], past_key_values=past)


def test_a_model_gives_its_hidden_states() -> None:
    net, tokens = model().eval(), torch.arange(8)[None]
    out = net(input_ids=tokens, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    assert torch.equal(out.hidden_states[-1], net(input_ids=tokens).last_hidden_state)
    assert torch.equal(out.last_hidden_state, net(input_ids=tokens).last_hidden_state)


def test_an_encoder_decoder_is_reversible_through_its_cross_attention() -> None:
    net = model(LongspanForSeq2SeqLM, is_encoder_decoder=True).train()
    source, target = torch.randint(11, (2, 6)), torch.randint(11, (2, 5))
    given = {"input_ids": source, "decoder_input_ids": target, "labels": target}
    grads = []
    for plain in (False, True):
        net.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if plain:
                patch.setattr(reversible, "run", reversible.kept)
            net(**given).loss.backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_order": "post"},
        {"residual": {"id": "reversible-residual", "leave": "concat"}},
        {"sharing": [3]},
        {"position": "per-layer-position"},
    ],
)
def test_what_cannot_be_undone_is_refused(options: dict[str, Any]) -> None:
    settings = {"residual": "reversible-residual", **options}
    with pytest.raises(LongspanError):
        LongspanModel(LongspanConfig(vocab_size=11, width=WIDTH, heads=3, layers=3, **settings))


def test_a_branch_with_a_loss_of_its_own_is_refused() -> None:
    class Reports(Feed):
        def forward(self, x: Tensor, *_: Any) -> Tensor:
            report(self, "balance", x.sum())
            return super().forward(x)

    with pytest.raises(LongspanError, match="balance"):
        build("reversible-residual")([Reports().double()], inputs())


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_dropout_and_autocast_are_replayed_on_cuda(autocast: bool) -> None:
    parts, x = branches(dropout=0.3).float().cuda(), inputs(dtype=torch.float32).cuda()
    x, residual = x.detach().requires_grad_(), build("reversible-residual")

    def under(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
                return call()

        return run

    want = under(lambda: mean(written_out(parts, x, x)))
    within = 5e-2 if autocast else 1e-4
    compare(under(lambda: residual(parts, x)), want, [x, *parts.parameters()], within=within)


@pytest.mark.gpu
def test_activations_do_not_grow_with_depth_on_cuda() -> None:
    def most(depth: int) -> int:
        parts = branches(depth, dropout=0.1).cuda().requires_grad_(False)
        x = inputs(2, 64, WIDTH).detach().cuda().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        torch.autograd.grad(build("reversible-residual")(parts, x).sum(), x)
        return torch.cuda.max_memory_allocated() - start

    most(2)
    assert most(12) == most(2)
