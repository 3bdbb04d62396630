"""Positions of each layer's own, and the losses that train with them."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import longspan
from longspan.errors import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.models.losses import cross_entropy
from longspan.training.supervision import DeepSupervision, Progressing, supervised

SIZES = {"vocab_size": 16, "width": 24, "heads": 3, "layers": 3, "length": 16}


def model(position, **changes) -> Any:
    torch.manual_seed(0)
    config = LongspanConfig(**{**SIZES, **changes}, position=position)
    return LongspanForCausalLM(config).double().eval()


def tokens() -> torch.Tensor:
    return torch.randint(16, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mixers", [["multi-head-attention"], ["linear-transformer"]])
def test_with_all_tables_but_the_first_zero_it_is_learned_positions_at_the_input(mixers):
    own, plain = (
        model("per-layer-position", mixers=mixers),
        model("learned-position", mixers=mixers),
    )
    weights = {n: t for n, t in own.state_dict().items() if "model.position" not in n}
    tables = own.model.position.tables
    plain.load_state_dict({**weights, "model.position.table": tables[0].table})
    assert not torch.allclose(own(tokens()).logits, plain(tokens()).logits)
    for table in tables[1:]:
        table.table.data.zero_()
    assert_close(own(tokens()).logits, plain(tokens()).logits)


def test_each_layer_adds_its_own_to_the_stream():
    built = longspan.build("per-layer-position", width=24, layers=3, length=16).double()
    x, pos = torch.zeros(1, 4, 24, dtype=torch.float64), torch.arange(4)[None]
    for n in range(3):
        assert_close(built.enter(x, pos, n)[0], built.tables[n].table[:4])
    assert sum(p.numel() for p in built.parameters()) == 3 * 16 * 24
    with pytest.raises(LongspanError, match="got layer 3"):
        built.enter(x, pos, 3)
    waves = longspan.build("per-layer-position", width=24, layers=2, table="sinusoidal").double()
    want = longspan.build("sinusoidal-position").embed(x, pos)
    assert_close(waves.enter(x, pos, 1), want)
    assert not list(waves.parameters())


@pytest.mark.parametrize("table", ["learned", "sinusoidal"])
def test_a_stack_steps_pads_and_trains_with_them(table):
    own = model({"id": "per-layer-position", "table": table})
    ids, cache, outs = tokens(), None, []
    whole = own(ids, use_cache=False).logits
    for piece in ids.split([5, 1, 6], 1):
        output = own(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        outs.append(output.logits)
    assert_close(torch.cat(outs, 1), whole)
    mask = torch.ones(2, 15, dtype=torch.long)
    mask[:, :3] = 0
    padded = own(torch.nn.functional.pad(ids, (3, 0)), attention_mask=mask).logits
    assert_close(padded[:, 3:], whole)
    own(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in own.model.position.parameters())


def test_layers_between_lose_their_loss_one_by_one():
    assert supervised(4, 0.0) == [1, 2, 3, 4]
    assert supervised(4, 0.124) == [1, 2, 3, 4]
    assert supervised(4, 0.125) == [2, 3, 4]
    assert supervised(4, 0.49) == [4]
    assert supervised(4, 0.5) == supervised(4, 1.0) == [4]
    assert supervised(64, 0.499) == [64]


@pytest.mark.parametrize("progress", [0.0, 0.2, 0.5])
def test_the_loss_sums_layers_and_tokens_ahead(progress):
    own = model("per-layer-position")
    deep, ids = DeepSupervision(own).double(), tokens()
    deep.progress = progress
    output = deep.train()(ids, labels=ids)
    hidden = own(ids, output_hidden_states=True, use_cache=False).hidden_states
    want = 0.0
    for layer in supervised(3, progress):
        x = hidden[layer] if layer == 3 else own.model.norm(hidden[layer])
        next_one = cross_entropy(own.lm_head(x)[:, :-1], ids[:, 1:])
        want = want + next_one + 0.5 * cross_entropy(deep.heads[0](x)[:, :-2], ids[:, 2:])
    assert_close(output.loss, want, check_dtype=False)
    assert set(output.auxiliary) == {f"layer {n}" for n in supervised(3, progress)[:-1]} | {
        "2 ahead"
    }
    plain = DeepSupervision(own, between=False, ahead=()).double().train()(ids, labels=ids)
    assert_close(plain.loss, own(ids, labels=ids).loss)
    assert_close(deep.eval()(ids, labels=ids).loss, plain.loss)


def test_the_trainer_tells_how_much_is_done(tmp_path):
    from transformers import Trainer, TrainingArguments

    deep, seen = DeepSupervision(model("per-layer-position").float()), []
    deep.register_forward_pre_hook(lambda *_: seen.append(deep.progress))
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    data: Any = [{"input_ids": row, "labels": row} for row in tokens()] * 4
    Trainer(
        model=deep,
        args=arguments,
        train_dataset=data,
        callbacks=[Progressing()],  # pyright: ignore
    ).train()
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_a_negative_weight_is_refused():
    with pytest.raises(LongspanError, match="weights of at least 0"):
        DeepSupervision(model(None), ahead=(-1.0,))
