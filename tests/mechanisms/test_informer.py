"""Informer, the forecaster: its parts against transformers', its replicas, one pass, training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.testing import assert_close
from transformers.models.informer import modeling_informer as theirs

from longspan import LongspanError, build
from longspan.models.informer import (
    Distil,
    Encoder,
    InformerConfig,
    InformerForForecasting,
)

FULL = "multi-head-attention"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def config(**options: Any) -> InformerConfig:
    small = {"channels": 3, "width": 16, "heads": 2, "inner": 24, "start": 6, "horizon": 4}
    return InformerConfig(**(small | {"time_features": (13, 7), "dropout": 0.0} | options))


def batch(length: int = 20, horizon: int = 4, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    times = [torch.randint(0, 7, (2, n, 2), generator=draw) for n in (length, horizon)]
    return {
        "past_values": normal(2, length, 3, seed=seed),
        "past_time": times[0],
        "future_time": times[1],
    }


def model(**options: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return InformerForForecasting(config(**options)).eval()


def settings(kind: str) -> Any:
    return transformers.InformerConfig(
        prediction_length=4, context_length=20, d_model=16, encoder_layers=3, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
        attention_type=kind, sampling_factor=50, lags_sequence=[1], num_time_features=1,
    )  # fmt: skip


def name(key: str) -> str:
    """Their names in ours."""
    for old, new in {
        "self_attn_layer_norm": "mixer_norm", "encoder_attn_layer_norm": "cross_norm",
        "final_layer_norm": "feed_forward_norm", "self_attn": "mixer", "encoder_attn": "cross",
        "fc1": "feed_forward.up", "fc2": "feed_forward.down", "q_proj": "project.q",
        "k_proj": "project.k", "v_proj": "project.v", "out_proj": "output", "downConv": "conv",
    }.items():  # fmt: skip
        key = key.replace(old, new)
    return key


def copied(part: Any) -> dict[str, Tensor]:
    return {name(key): value for key, value in part.state_dict().items()}


def test_distilling_is_transformers() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        want = theirs.InformerConvLayer(16).double()
    ours = Distil(16).double()
    ours.load_state_dict(copied(want))
    for length in (1, 2, 9, 20):
        x = normal(3, length, 16, seed=length).double()
        got, ref = ours(x), want(x)  # with the batch's own statistics
        assert got.shape[1] == (length + 1) // 2
        assert_close(got, ref)
    assert_close(ours.norm.running_mean, want.norm.running_mean)


@pytest.mark.parametrize("kind", ["full", "prob"])
def test_encoder_and_decoder_are_transformers(kind: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = theirs.InformerModel(settings(kind)).double().eval()
    spec = FULL if kind == "full" else {"id": "informer", "factor": 50}
    ours = model(mixers=[spec], layers=2, encoder_layers=3).double()
    ours.encoder.norm = torch.nn.Identity()  # transformers' has none behind its layers
    for block, layer in zip(ours.encoder.stacks[0], whole.encoder.layers, strict=True):
        block.load_state_dict(copied(layer))
    for distil, layer in zip(ours.encoder.distils[0], whole.encoder.conv_layers, strict=False):
        distil.load_state_dict(copied(layer))
    for block, layer in zip(ours.decoder, whole.decoder.layers, strict=True):
        block.load_state_dict(copied(layer))
    sides = [whole.encoder, whole.decoder]
    values = [normal(2, n, whole.config.feature_size, seed=n).double() for n in (20, 4)]
    places = [side.embed_positions.weight.double() for side in sides]
    x, y = (
        side.layernorm_embedding(side.value_embedding(v) + p[at : at + v.shape[1]])
        for side, v, p, at in zip(sides, values, places, (0, 20), strict=True)
    )
    encoded = whole.encoder(inputs_embeds=values[0]).last_hidden_state
    got = ours.encoder(x)
    assert_close(got, encoded)
    want = whole.decoder(inputs_embeds=values[1], encoder_hidden_states=encoded)
    for block in ours.decoder:
        y, _ = block(y, encoded=encoded)
    assert_close(y, want.last_hidden_state)


def test_replicas_are_shorter_stacks_on_the_end_of_the_input() -> None:
    encoder = model(encoder_layers=3, replicas=3, mixers=[FULL]).encoder
    x = normal(2, 41, 16)
    got = encoder(x)
    assert [len(stack) for stack in encoder.stacks] == [3, 2, 1]
    assert [len(stack) for stack in encoder.distils] == [2, 1, 0]
    parts = []
    for less, length in enumerate((41, 20, 10)):
        alone = Encoder(config(encoder_layers=3 - less, mixers=[FULL])).eval()
        alone.stacks[0].load_state_dict(encoder.stacks[less].state_dict())
        alone.distils[0].load_state_dict(encoder.distils[less].state_dict())
        alone.norm.load_state_dict(encoder.norm.state_dict())
        parts.append(alone(x[:, -length:]))
    assert [part.shape[1] for part in parts] == [11, 10, 10]
    assert_close(got, torch.cat(parts, 1))


def test_without_distilling_lengths_stay() -> None:
    encoder = model(distil=False, encoder_layers=3).encoder
    assert encoder(normal(2, 20, 16)).shape == (2, 20, 16)


def test_the_decoder_reads_all_steps_off_one_pass_from_a_start_token() -> None:
    forecaster = model(targets=1)
    seen = []
    forecaster.ahead.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    inputs = batch()
    prediction = forecaster(**inputs).prediction
    assert prediction.shape == (2, 4, 1)
    ((values, times),) = seen
    assert torch.equal(values[:, :6], inputs["past_values"][:, -6:])
    assert not values[:, 6:].any()
    assert torch.equal(times, torch.cat([inputs["past_time"][:, -6:], inputs["future_time"]], 1))


def test_time_features_count_as_tables_or_as_numbers() -> None:
    inputs = batch()
    for forecaster in (model(), model(calendar="linear", time_features=2)):
        want = forecaster(**inputs).prediction
        for part in ("past_time", "future_time"):
            other = forecaster(**inputs | {part: (inputs[part] + 1) % 7}).prediction
            assert not torch.allclose(other, want)


def test_mix_swaps_heads_and_steps_before_the_projection() -> None:
    plain, mixed = model(mixers=[FULL]), model(mixers=[FULL], mix=True)
    inner, outer = plain.decoder[0].mixer, mixed.decoder[0].mixer
    q, k, v = (normal(2, 2, 10, 8, seed=n) for n in range(3))
    o, _ = inner.attention(q, k, v)
    got, _ = outer.attention(q, k, v)
    # As released: B H L D in memory, viewed as B L (H D).
    want = o.contiguous().view(2, 10, 16)
    assert_close(got.transpose(1, 2).flatten(2), want)


def test_it_trains_by_square_error_and_reloads(tmp_path: Path) -> None:
    forecaster = model(replicas=2).train()
    inputs = batch()
    labels = inputs["past_values"][:, -4:] * 0.5
    output = forecaster(**inputs, labels=labels)
    assert_close(output.loss, (output.prediction - labels).square().mean())
    optimizer = torch.optim.Adam(forecaster.parameters(), lr=0.01)
    with torch.random.fork_rng():
        for _ in range(30):
            loss = forecaster(**inputs, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert loss < 0.2 * output.loss
    assert all(p.grad is not None for p in forecaster.parameters())
    forecaster.eval().save_pretrained(tmp_path)
    again: Any = InformerForForecasting.from_pretrained(tmp_path)
    assert_close(again(**inputs).prediction, forecaster(**inputs).prediction)


def test_the_trainer_takes_it_as_it_is(tmp_path: Path) -> None:
    inputs = batch()
    rows = [
        {key: value[n] for key, value in inputs.items()} | {"labels": torch.zeros(4, 3)}
        for n in range(2)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        trainer = transformers.Trainer(model(), arguments, train_dataset=rows)  # pyright: ignore
        assert trainer.train().training_loss > 0
        assert trainer.evaluate(rows)["eval_loss"] > 0  # pyright: ignore[reportArgumentType]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(LongspanError, match="replicas=3 with 2"):
        model(replicas=3)
    with pytest.raises(LongspanError, match="tables need one size"):
        model(time_features=4)
    with pytest.raises(LongspanError, match="5 past and 4 future"):
        model()(**batch(5))
    with pytest.raises(LongspanError, match="20 past and 3 future"):
        model()(**batch(20, 3))


def qkv(length: int) -> list[Tensor]:
    return [normal(1, 2, length, 8, seed=n).double() for n in range(3)]


def strict(**options: Any) -> Any:
    return build("informer-causal", **options).eval()


@pytest.mark.parametrize("mean", [False, True])
def test_strictly_causal_exact_measures_lead_every_prefix(mean: bool) -> None:
    q, k, v = qkv(80)
    o, _ = strict(factor=2, exact=True, mean=mean)(q, k, v)
    lazy = v.cumsum(2) / (torch.arange(1, 81)[:, None] if mean else 1)
    for head in range(2):
        measures, awake = [], 0
        for n in range(1, 81):
            scores = k[0, head, :n] @ q[0, head, n - 1]
            measures.append(scores.amax() - scores.mean())
            logs = max(1, math.ceil(math.log(n)))
            u = min(n, 2 * logs)
            want = lazy[0, head, n - 1]
            if sum(m >= measures[-1] for m in measures[:-1]) < u and awake < 2 * u * logs:
                awake += 1
                want = (scores / 8**0.5).softmax(0) @ v[0, head, :n]
            assert_close(o[0, head, n - 1], want)


def test_strictly_causal_without_a_budget_is_lazy() -> None:
    q, k, v = qkv(20)
    assert_close(strict(factor=0)(q, k, v)[0], v.cumsum(2))


@pytest.mark.parametrize("shared", [False, True])
def test_strictly_causal_samples_follow_the_seed(shared: bool) -> None:
    inputs = qkv(300)
    first, again, other = (strict(shared=shared, factor=2, seed=s)(*inputs)[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_however_measures_grow_few_queries_attend() -> None:
    q, k, v = qkv(2000)
    rising = q * torch.arange(1, 2001)[:, None]
    cap = 2 * 2 * math.ceil(math.log(2000)) ** 2
    _, usual = strict(factor=2)(q, k, v)
    _, most = strict(factor=2)(rising, k, v)
    assert usual.awake.max() <= cap
    assert most.awake.min() > usual.awake.max()
    assert most.awake.max() <= cap


def test_strictly_causal_refusals() -> None:
    with pytest.raises(LongspanError, match="causal only"):
        strict(causal=False)
    with pytest.raises(LongspanError, match="factor=-1"):
        strict(factor=-1)
    with pytest.raises(LongspanError, match="carry earlier tokens"):
        strict()(qkv(3)[0], *qkv(5)[1:])
