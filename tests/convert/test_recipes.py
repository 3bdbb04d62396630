"""Distillation: its loss by hand, what it trains, and that it mends a swap."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from longspan import LongspanError, convert
from longspan.convert.recipes import distil
from longspan.data import Windows

SIZES: dict[str, Any] = {
    **{"vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3},
    **{"num_attention_heads": 3, "max_position_embeddings": 64},
}
QUIET: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
MAKES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1, **QUIET)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_embd=24, n_layer=3, n_head=3, n_positions=64, **QUIET)
    ),
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, attention_probs_dropout_prob=0.0)),
}


def model(name: str = "llama") -> Any:
    """Random weights large enough that attention matters."""
    torch.manual_seed(0)
    made = MAKES[name]().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    if name == "gpt2":
        made.config.attn_pdrop = 0.0  # the others of GPT-2's dropouts stay
    return made


def windows() -> Windows:
    return Windows(np.random.default_rng(0).integers(2, 50, 640), length=16)


def attention(made: Any, name: str, layer: int) -> Any:
    base = made.base_model
    return {
        "llama": lambda: base.layers[layer].self_attn,
        "gpt2": lambda: base.h[layer].attn,
        "bert": lambda: base.encoder.layer[layer].attention.self,
    }[name]()


def heard(made: Any, name: str, layer: int, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What a layer's attention was given and put out."""
    found: list[tuple[Tensor, Tensor]] = []

    def hear(_: Any, args: Any, named: dict[str, Any], out: Any) -> None:
        found.append((args[0] if args else named["hidden_states"], out[0]))

    hook = attention(made, name, layer).register_forward_hook(hear, with_kwargs=True)
    made(**batch)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("name", MAKES)
def test_the_loss_is_the_error_of_each_layer_alone(name: str, tmp_path: Path) -> None:
    """Layer 0 against a forward pass by hand; layer 2 with its inputs from before the swap."""
    made = model(name)
    ids = windows()[0]["input_ids"][None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    wants = {layer: heard(made, name, layer, batch) for layer in (0, 2)}
    assert not torch.equal(*(wants[i][0] for i in (0, 2)))
    convert.swap(made, {0: "t2r", 2: "t2r"})
    trainer: Any = distil(made, windows(), out=tmp_path, cpu=True)
    loss, found = trainer.compute_loss(made.train(), batch, return_outputs=True)
    assert made.training
    seen, errors = mask.bool(), found["errors"]
    got = heard(made.eval(), name, 0, batch)[1]
    first = (got - wants[0][1])[seen].square().sum() / wants[0][1][seen].square().sum()
    assert errors[0].item() == pytest.approx(first.item(), rel=1e-4)
    attention(made, name, 0).forward = lambda *_, **__: (wants[0][1], None)
    got = heard(made, name, 2, batch)[1]
    last = (got - wants[2][1])[seen].square().sum() / wants[2][1][seen].square().sum()
    assert errors[1].item() == pytest.approx(last.item(), rel=1e-4)
    assert loss.item() == pytest.approx((first + last).item() / 2, rel=1e-4)


@pytest.mark.parametrize("name", MAKES)
def test_it_trains_what_was_swapped_in_and_nothing_else(name: str, tmp_path: Path) -> None:
    """The error falls in each layer that can learn; an exact one beside them has none."""
    made = convert.swap(model(name), {0: "t2r", 1: "multi-head-attention", 2: ("rfa", {})})
    before = copy.deepcopy(made.state_dict())
    trainer: Any = distil(made, windows(), out=tmp_path, steps=30, batch=4, log_every=1, cpu=True)
    batch = {"input_ids": windows()[0]["input_ids"][None]}
    errors = [trainer.compute_loss(made, batch, return_outputs=True)[1]["errors"].tolist()]
    trainer.train()
    errors.append(trainer.compute_loss(made, batch, return_outputs=True)[1]["errors"].tolist())
    assert errors[0][1] < 1e-8
    assert errors[1][0] < 0.8 * errors[0][0]
    assert errors[1][2] < errors[0][2]
    now = made.state_dict()
    moved = {name for name in now if not torch.equal(now[name], before[name])}
    own = {name for name, _ in made.named_parameters() if ".mechanism." in name}
    assert moved == own
    assert all(p.requires_grad for p in made.parameters())
    assert sum("loss" in entry for entry in trainer.state.log_history) == 30


def test_extra_projections_learn_too(tmp_path: Path) -> None:
    made = convert.swap(model(), "rfa", layers=[1], gate=True)
    before = copy.deepcopy(made.state_dict())
    distil(made, windows(), out=tmp_path, steps=2, cpu=True).train()
    now = made.state_dict()
    assert any(".extra.gated" in n and not torch.equal(now[n], before[n]) for n in now)


def test_a_distilled_model_is_nearer_to_what_it_was_and_is_saved(tmp_path: Path) -> None:
    made = convert.swap(model(), "t2r", layers=[0, 1])
    held = torch.randint(2, 50, (2, 40), generator=torch.Generator().manual_seed(4))
    before = convert.health(made, held, lengths=(40,), steps=2)
    distil(made, windows(), out=tmp_path / "run", steps=60, batch=4, cpu=True).train()
    after = convert.health(made, held, lengths=(40,), steps=2)
    assert after.divergence < 0.9 * before.divergence
    assert after.loss.before == before.loss.before
    made.save_pretrained(tmp_path / "made")
    assert torch.equal(convert.load(tmp_path / "made")(held).logits, made.eval()(held).logits)


def test_what_cannot_be_distilled_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match="nothing in this model was swapped"):
        distil(model(), windows(), out=tmp_path)
    made = convert.swap(model(), "linear-transformer")
    with pytest.raises(LongspanError, match="no parameters to learn by: swap in a mechanism that"):
        distil(made, windows(), out=tmp_path)
