"""Decoders whose tokens leave early: against brute force, whole and in steps, trained and saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from longspan import LongspanError, build
from longspan.inference.exits import Graded, curve, traced
from longspan.models import LongspanConfig, LongspanForCausalLM, LongspanForSeq2SeqLM
from longspan.models.early_exit import (
    EarlyExitConfig,
    EarlyExitForCausalLM,
    EarlyExitForSeq2SeqLM,
)
from longspan.nn import tensors
from longspan.testing.counting import flops

DAT = "depth-adaptive-transformer"
CALM: dict[str, Any] = {"id": "calm", "decay": None}
RULES: list[Any] = [
    2,
    CALM | {"threshold": 0.3},
    {"id": "calm", "measure": "saturation", "threshold": 0.7, "horizon": 20},
    {"id": "calm", "measure": "classifier", "threshold": 0.5, "minimum": 2},
    {"id": DAT},
    {"id": DAT, "classifier": "multinomial"},
    {"id": DAT, "classifier": "confidence", "threshold": [0.2, 0.3, 0.4]},
]
SIZES: dict[str, Any] = {
    "vocab_size": 11, "width": 16, "layers": 4, "heads": 2, "initializer_range": 0.5,
}  # fmt: skip


def model(exit: Any = None, **options: Any) -> EarlyExitForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EarlyExitForCausalLM(EarlyExitConfig(exit=exit, **SIZES | options)).double().eval()


def seq2seq(exit: Any = None, **options: Any) -> EarlyExitForSeq2SeqLM:
    sizes = SIZES | {"decoder_start_token_id": 1, "pad_token_id": 0} | options
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EarlyExitForSeq2SeqLM(EarlyExitConfig(exit=exit, **sizes)).double().eval()


def tokens(length: int = 9, rows: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 11, (rows, length), generator=generator)


def brute(of: Any, ids: Tensor, exits: Tensor) -> Tensor:
    """Logits of one row, token by token: every block's input is written out, copies and all."""
    stack = of.model
    inputs = [[] for _ in stack.layers]
    out = []
    for token, leaves in zip(ids.tolist(), exits.tolist(), strict=True):
        x = stack.embed_tokens(torch.tensor([token]))
        for n, layer in enumerate(stack.layers, 1):
            inputs[n - 1].append(x)
            if n <= leaves:
                x = layer(torch.stack(inputs[n - 1], 1))[0][:, -1]
        out.append(of.lm_head(stack.norm(x)))
    return torch.cat(out)


@torch.no_grad()
def stepped(of: Any, ids: Tensor, sizes: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    past, logits, exits = None, [], []
    for piece in ids.split(sizes, 1):
        output = of(piece, past_key_values=past, use_cache=True, **options)
        past = output.past_key_values
        logits.append(output.logits)
        exits.append(output.exits)
    return torch.cat(logits, 1), torch.cat(exits, 1)


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("exit", RULES, ids=str)
@torch.no_grad()
def test_brute_force_whole_and_steps_agree(exit: Any, order: str) -> None:
    of, ids = model(exit, norm_order=order), tokens()
    whole = of(ids, use_cache=False)
    for sizes in ([1] * 9, [4, 1, 1, 3]):
        logits, exits = stepped(of, ids, sizes)
        assert torch.equal(exits, whole.exits)
        assert_close(logits, whole.logits)
    for row in range(3):
        assert_close(brute(of, ids[row], whole.exits[row]), whole.logits[row])


@torch.no_grad()
def test_rules_do_leave_at_different_blocks() -> None:
    for exit in (RULES[1], RULES[3], RULES[4]):
        assert len(model(exit)(tokens(20)).exits.unique()) > 1, exit


@torch.no_grad()
def test_exit_at_n_is_the_base_decoder_or_its_first_n_blocks() -> None:
    ids = tokens()
    for n in (1, 3, 4):
        of = model(n)
        config = LongspanConfig(**SIZES | {"layers": n})
        base = LongspanForCausalLM(config).double().eval()
        state = {k: v for k, v in of.state_dict().items() if k in base.state_dict()}
        base.load_state_dict(state)
        assert_close(of(ids, use_cache=False).logits, base(ids, use_cache=False).logits)
        got = of.generate(ids, max_new_tokens=6, do_sample=False)
        assert torch.equal(got, base.generate(ids, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@torch.no_grad()
def test_fixed_exit_reads_its_own_classifier(share: bool) -> None:
    of, ids = model(2, share_heads=share), tokens()
    head = of.lm_head if share else of.exit_heads[1]
    x = of.model.embed_tokens(ids)
    for layer in of.model.layers[:2]:
        x, _ = layer(x)
    assert_close(of(ids, use_cache=False).logits, head(of.model.norm(x)))


def test_steps_really_skip_and_are_counted() -> None:
    of, ids = model(1), tokens(rows=1)
    calls = {"feed-forward": 0, "queries": 0, "keys": 0}

    def note(name: str) -> Any:
        def hook(_: Any, args: Any, __: Any) -> None:
            calls[name] += args[0].numel() > 0

        return hook

    for layer in of.model.layers:
        layer.feed_forward.register_forward_hook(note("feed-forward"))
        layer.mixer.project["q"].register_forward_hook(note("queries"))
        layer.mixer.project["k"].register_forward_hook(note("keys"))
    with torch.no_grad():
        past = of(ids, use_cache=True).past_key_values
        before = dict(calls)
        output = of(ids[:, :1], past_key_values=past)
    done = {name: calls[name] - before[name] for name in calls}
    assert done == {"feed-forward": 1, "queries": 1, "keys": 4}
    assert output.exits.tolist() == [[1]]
    work = of.work(output.exits, output.projections)
    assert (work.blocks, work.copies, work.projections, work.depth) == (1, 3, 1, 1.0)


@torch.no_grad()
def test_accounting_is_what_is_counted() -> None:
    """All but attention's own products, which weights know nothing of."""
    for exit in (None, 1, CALM | {"threshold": 0.3}):
        of, ids = model(exit), tokens(1, rows=1)
        output = of(ids, use_cache=True)
        counted = flops(lambda of=of, ids=ids: of(ids, use_cache=True))
        work = of.work(output.exits, output.projections)
        attention = work.blocks * 2 * 2 * 16  # one query meets one key and one value
        assert counted == work.flops + attention


@torch.no_grad()
def test_every_probe_of_the_softmax_measure_is_charged() -> None:
    of = model(CALM | {"threshold": 0.3})
    calls = 0

    def note(_: Any, args: Any, __: Any) -> None:
        nonlocal calls
        calls += args[0].numel() // 16

    of.lm_head.register_forward_hook(note)
    output = of(tokens(20), use_cache=False)
    assert calls == int(output.projections.sum())
    # One for each block passed: the logits of the exit are those it was judged by.
    assert torch.equal(output.projections, output.exits)
    cheap = model(CALM | {"measure": "saturation", "threshold": 0.6})(tokens(20))
    assert cheap.projections.eq(1).all()


@torch.no_grad()
def test_rows_leave_by_themselves() -> None:
    of, ids = model(CALM | {"threshold": 0.3}), tokens(12, rows=5)
    together, exits = stepped(of, ids, [1] * 12)
    assert any(len(set(column)) > 1 for column in exits.T.tolist())
    for row in range(5):
        alone, own = stepped(of, ids[row : row + 1], [1] * 12)
        assert_close(together[row], alone[0])
        assert torch.equal(exits[row], own[0])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(side: str) -> None:
    of, ids = model(CALM | {"threshold": 0.3, "decay": 4.0, "horizon": 10}), tokens()
    want = of(ids, use_cache=False)
    pad = torch.zeros(3, 2, dtype=torch.long)
    parts = [pad, ids] if side == "left" else [ids, pad]
    mask = torch.cat([torch.zeros_like(p) if p is pad else torch.ones_like(p) for p in parts], 1)
    got = of(torch.cat(parts, 1), attention_mask=mask, use_cache=False)
    some = mask.bool()
    assert_close(got.logits[some].view_as(want.logits), want.logits)
    assert torch.equal(got.exits[some].view_as(want.exits), want.exits)
    assert not got.exits[~some].any()


@torch.no_grad()
def test_no_token_sees_a_later_one() -> None:
    of, ids = model(CALM | {"threshold": 0.3}), tokens()
    other = torch.cat([ids[:, :5], tokens(4, seed=9)], 1)
    a, b = of(ids, use_cache=False), of(other, use_cache=False)
    assert_close(a.logits[:, :5], b.logits[:, :5])
    assert torch.equal(a.exits[:, :5], b.exits[:, :5])


def test_generate_greedy_sampled_beams_and_padded() -> None:
    of, ids = model(CALM | {"threshold": 0.3}), tokens(4)
    with traced(of) as trace:
        greedy = of.generate(ids, max_new_tokens=6, do_sample=False)
    exits, projections = trace.generated()
    assert exits.shape == (3, 6)
    assert len(exits.unique()) > 1
    assert of.work(exits, projections).tokens == 18
    # The prompt runs at full depth, all but its last token.
    assert (trace.exits[0][:, :-1] == 4).all()
    # The steps that chose a token are the prompt's last and all behind it.
    assert torch.equal(exits, torch.cat(trace.exits, 1)[:, 3:])
    assert torch.equal(projections, torch.cat(trace.projections, 1)[:, 3:])
    assert not torch.equal(exits[:, 0], trace.exits[0][:, 0])
    # By hand: the prompt's exits given, the rule for the rest.
    row, leaves = ids.clone(), trace.exits[0]
    for n in range(6):
        logits = torch.stack([brute(of, row[r], leaves[r])[-1] for r in range(3)])
        assert torch.equal(logits.argmax(-1), greedy[:, 4 + n])
        row = greedy[:, : 5 + n]
        if n < 5:
            leaves = torch.cat([leaves, trace.exits[n + 1]], 1)
    torch.manual_seed(0)
    assert of.generate(ids, max_new_tokens=4, do_sample=True).shape == (3, 8)
    assert of.generate(ids, max_new_tokens=4, num_beams=2, do_sample=False).shape == (3, 8)
    mask = torch.ones(3, 6, dtype=torch.long)
    mask[:, :2] = 0
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), ids], 1)
    again = of.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert torch.equal(again[:, 6:], greedy[:, 4:])


def test_prompts_may_leave_early_too() -> None:
    of = model(1, exits_in_prompt=True)
    with traced(of) as trace:
        of.generate(tokens(4), max_new_tokens=2, do_sample=False)
    assert trace.exits[0].eq(1).all()


@torch.no_grad()
def test_encoder_decoder_generates_with_exits() -> None:
    source = tokens(7)
    for exit in (CALM | {"threshold": 0.3}, {"id": DAT, "classifier": "sequence"}, {"id": DAT}):
        of = seq2seq(exit)
        with traced(of) as trace:
            out = of.generate(source, max_new_tokens=6, do_sample=False, min_new_tokens=6)
        exits, _ = trace.generated()
        whole = of(source, decoder_input_ids=out[:, :-1], use_cache=False)
        assert torch.equal(whole.exits, exits)
        if exit["id"] == DAT and "classifier" in exit:
            assert exits.eq(exits[:, :1]).all()
    of = seq2seq(None)
    base = LongspanForSeq2SeqLM(LongspanConfig(**SIZES, decoder_start_token_id=1, pad_token_id=0))
    base = base.double().eval()
    base.load_state_dict({k: v for k, v in of.state_dict().items() if k in base.state_dict()})
    want = base.generate(source, max_new_tokens=6, do_sample=False)
    assert torch.equal(of.generate(source, max_new_tokens=6, do_sample=False), want)


@pytest.mark.parametrize(
    "mixers",
    [
        ["linear-transformer"],
        [{"id": "longformer", "window": 4}],
        ["informer-causal"],
        ["performer", "multi-head-attention"],
        ["cosformer"],
        ["rwkv"],
    ],
    ids=str,
)
@torch.no_grad()
def test_decoders_of_other_mixers_leave_early(mixers: list[Any]) -> None:
    of, ids = model(CALM | {"threshold": 0.3}, mixers=mixers, position=None), tokens()
    whole = of(ids, use_cache=False)
    logits, exits = stepped(of, ids, [1] * 9)
    assert torch.equal(exits, whole.exits)
    assert_close(logits, whole.logits)
    # Where all have left, as if every token were pushed through by hand.
    first = model(1, mixers=mixers, position=None)
    assert_close(stepped(first, ids, [1] * 9)[0], first(ids, use_cache=False).logits)


def nats_by_hand(of: Any, ids: Tensor) -> Tensor:
    """Mean −log p of the next token at each block."""
    x, found = of.model.embed_tokens(ids), []
    for n, layer in enumerate(of.model.layers, 1):
        x, _ = layer(x)
        shared = of.config.share_heads or n == 4
        logits = (of.lm_head if shared else of.exit_heads[n - 1])(of.model.norm(x))
        found.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    return torch.stack(found)


@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize(
    ("weights", "want"),
    [
        ("uniform", [0.25] * 4),
        ("linear", [0.1, 0.2, 0.3, 0.4]),
        ([0.0, 1.0, 0.0, 3.0], [0.0, 0.25, 0.0, 0.75]),
    ],
    ids=str,
)
def test_aligned_training_is_the_weighted_loss(
    weights: Any, want: list[float], share: bool
) -> None:
    of, ids = model(None, weights=weights, share_heads=share).train(), tokens()
    loss = of(ids, labels=ids).loss
    by_hand = (torch.tensor(want, dtype=torch.float64) * nats_by_hand(of, ids)).sum()
    assert_close(loss, by_hand)
    loss.backward()
    got = {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}
    of.zero_grad()
    by_hand.backward()
    assert_close(got, {n: p.grad for n, p in of.named_parameters() if n in got})


def test_gradient_scaling_touches_one_block_each() -> None:
    ids = tokens()
    plain = model().train()
    plain(ids, labels=ids).loss.backward()
    scaled = model(gradient_scaling=[1.0, 2.0, 1.0, 5.0]).train()
    scaled(ids, labels=ids).loss.backward()
    for n, factor in enumerate([1.0, 2.0, 1.0, 5.0]):
        pairs = zip(
            scaled.model.layers[n].parameters(), plain.model.layers[n].parameters(), strict=True
        )
        for got, want in pairs:
            assert_close(got.grad, want.grad * factor, atol=1e-12, rtol=1e-9)
    assert_close(scaled.model.norm.weight.grad, plain.model.norm.weight.grad)


def test_mixed_training_with_all_exits_at_the_top_is_the_usual_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of, ids = model(None, samples=2).train(), tokens()
    monkeypatch.setattr(torch, "randint_like", lambda t, low, high: torch.full_like(t, high - 1))
    assert_close(of(ids, labels=ids).loss, nats_by_hand(of, ids)[-1])


def test_mixed_training_copies_states() -> None:
    of, ids = model(None, samples=3).train(), tokens()
    torch.manual_seed(5)
    loss = of(ids, labels=ids).loss
    torch.manual_seed(5)
    exits = torch.randint_like(ids.repeat_interleave(3, 0), 1, 5)
    logits = torch.stack([brute(of, ids[r // 3], exits[r]) for r in range(9)])
    want = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids.repeat_interleave(3, 0)[:, 1:].flatten()
    )
    assert_close(loss, want)
    loss.backward()
    assert all(p.grad is not None for p in of.parameters())


def test_training_the_rule_leaves_the_frozen_decoder_alone() -> None:
    for exit in (CALM | {"measure": "classifier"}, {"id": DAT}):
        of, ids = model(exit, trains="exits").train(), tokens()
        of(ids, labels=ids).loss.backward()
        trained = {n for n, p in of.named_parameters() if p.grad is not None and p.grad.any()}
        assert trained == {"driver.rule.score.weight", "driver.rule.score.bias"}
    with pytest.raises(LongspanError, match="nothing to learn"):
        model(2, trains="exits").train()(tokens(), labels=tokens())


def test_rule_and_decoder_train_together() -> None:
    of, ids = model({"id": DAT, "penalty": 0.1}, exit_weight=0.5).train(), tokens()
    optimiser = torch.optim.Adam(of.parameters(), lr=0.01)
    losses = []
    for _ in range(25):
        output = of(ids, labels=ids)
        output.loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(output.loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert set(output.auxiliary) == {"exit"}


def test_saved_models_keep_rule_and_thresholds(tmp_path: Path) -> None:
    of, ids = model(CALM | {"measure": "classifier"}), tokens()
    of.driver.rule.set_threshold(0.45)
    of.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert isinstance(again, EarlyExitForCausalLM)
    with torch.no_grad():
        a, b = of(ids), again(ids)
    assert torch.equal(a.exits, b.exits)
    assert_close(a.logits, b.logits)


def test_weights_of_a_plain_decoder_load(tmp_path: Path) -> None:
    base = LongspanForCausalLM(LongspanConfig(**SIZES)).double().eval()
    base.save_pretrained(tmp_path)
    of = EarlyExitForCausalLM.from_pretrained(
        tmp_path, config=EarlyExitConfig(**SIZES), dtype=torch.float64
    ).eval()
    with torch.no_grad():
        assert_close(of(tokens()).logits, base(tokens()).logits)


@torch.no_grad()
def test_the_cache_is_that_of_the_base_model() -> None:
    of = model(1)
    past = of(tokens(), use_cache=True).past_key_values
    assert past.length == 9
    keys = [t for t in tensors(past.states) if t.dim() == 4]
    assert [tuple(t.shape) for t in keys] == [(3, 2, 9, 8)] * 8
    again = of(tokens(2, seed=3), past_key_values=past).past_key_values
    assert again.length == 11


@torch.no_grad()
def test_calibration_curve_of_quality_against_depth() -> None:
    of, ids = model({"id": DAT}), tokens(12)
    points = curve(of, ids, [0.0, 0.5, 1.0])
    assert [p.depth for p in points] == sorted(p.depth for p in points)
    assert points[0].depth == 1.0
    assert points[-1].depth == 4.0
    for point, n in ((points[0], 1), (points[-1], 4)):
        want = nats_by_hand(of, ids)[n - 1]
        assert point.nats == pytest.approx(float(want), rel=1e-5)
    assert of.driver.rule.thresholds.eq(0.5).all()
    per_block = curve(of, ids, [[1.0, 0.0, 1.0]])
    assert per_block[0].depth == 2.0


def test_calibration_curve_leaves_padding_out() -> None:
    of, ids = model({"id": DAT}), tokens(12, rows=1)
    mask = torch.arange(16)[None] < 12
    padded = F.pad(ids, (0, 4), value=3)
    for threshold in (0.4, 0.5, 0.6):
        (want,), (got,) = curve(of, ids, [threshold]), curve(of, padded, [threshold], mask=mask)
        assert (got.nats, got.accuracy) == pytest.approx((want.nats, want.accuracy), rel=1e-5)
        exits = of(ids).exits[:, :-1].double() if threshold == 0.5 else None
        assert exits is None or want.depth == pytest.approx(float(exits.mean()))
        assert got.depth == pytest.approx(want.depth)


def test_graded_states_and_choices() -> None:
    of, ids = model(CALM), tokens()
    with torch.no_grad():
        graded = of.grade(ids)
    assert isinstance(graded, Graded)
    assert_close(graded.nats.sum((1, 2)) / 24, nats_by_hand(of, ids).detach())
    assert graded.agrees[-1].all()
    assert not graded.counted[:, -1].any()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"exit": "linear-transformer"}, "does not say when a token leaves|needs|no argument"),
        ({"exit": 9}, "no exit 9"),
        ({"weights": [1.0]}, "1 numbers for 4 layers"),
        ({"weights": "square"}, "weights is 'square'"),
        ({"trains": "all"}, "trains is 'all'"),
        ({"samples": 2, "gradient_scaling": [1.0] * 4}, "aligned training"),
        ({"exit": {"id": DAT}, "samples": 2}, "trains='decoder'"),
        ({"sharing": [2, 2]}, "sharing"),
        ({"exit": {"id": "calm", "measure": "guess"}}, "no measure"),
        ({"exit": {"id": DAT, "classifier": "guess"}}, "no classifier"),
        ({"exit": {"id": DAT, "sigma": -1.0}}, "sigma"),
        ({"exit": {"id": DAT, "classifier": "confidence", "threshold": [0.1]}}, "1 thresholds"),
    ],
    ids=str,
)
def test_mistakes_are_loud(options: dict[str, Any], says: str) -> None:
    with pytest.raises(LongspanError, match=says):
        model(options.pop("exit", None), **options)


def test_wrong_calls_are_loud() -> None:
    of = model({"id": DAT, "classifier": "sequence"})
    with pytest.raises(LongspanError, match="has none"):
        of(tokens())
    with pytest.raises(LongspanError, match="from 1 to 4"):
        of(tokens(), exits=torch.full((3, 9), 5))
    with pytest.raises(LongspanError, match="no output classifier"):
        build("calm", width=4, layers=2, threshold=0.5)(
            [lambda x, s, a: (x, s)] * 2, torch.ones(1, 1, 4)
        )
