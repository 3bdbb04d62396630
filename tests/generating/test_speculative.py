"""Drafted, checked and taken back: `generate(assistant_model=…)` says what greedy decoding says."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longspan import models
from longspan.models import LongspanConfig, LongspanForCausalLM

NEW = 10


def model(seed: int = 0, **changes: Any) -> LongspanForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "width": 24, "layers": 2, "heads": 2, "length": 64}
    sizes |= {"position": None, "tie_word_embeddings": False}
    built = LongspanForCausalLM(LongspanConfig(**(sizes | changes))).double().eval()
    # As initialised, embeddings hide all mixing.
    with torch.no_grad():
        for weight in (p for p in built.model.layers.parameters() if p.dim() > 1):
            weight.mul_(4)
    # A draft of unsure models would end at once.
    built.generation_config.assistant_confidence_threshold = 0.0
    built.generation_config.num_assistant_tokens = 5
    return built


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(1, 32, shape, generator=torch.Generator().manual_seed(seed))


def said(x: Tensor, **more: Any) -> dict[str, Any]:
    return {
        "inputs": x,
        "attention_mask": torch.ones_like(x),
        "max_new_tokens": NEW,
        "do_sample": False,
        "no_repeat_ngram_size": 1,  # untrained models else say one token over and over
    } | more


@contextmanager
def calls(module: nn.Module) -> Iterator[list[int]]:
    """The tokens of each of its calls."""
    counted: list[int] = []

    def count(_: Any, given: Any, named: dict[str, Any]) -> None:
        counted.append(named["input_ids"].shape[1])

    handle = module.register_forward_pre_hook(count, with_kwargs=True)
    yield counted
    handle.remove()


class Wrong(nn.Module):
    """A head after which the least likely token is the first choice."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return -self.head(x)


def near(target: LongspanForCausalLM) -> LongspanForCausalLM:
    """One that often, and not always, says the same."""
    other = copy.deepcopy(target)
    torch.manual_seed(5)
    with torch.no_grad():
        other.lm_head.weight.add_(0.006 * torch.randn_like(other.lm_head.weight))
    return other


MIXERS = ["linear-transformer", "rwkv", "s4", "multi-head-attention"]


@pytest.mark.parametrize("mixers", [*([id] for id in MIXERS), MIXERS[::3]], ids="-".join)
def test_speculation_is_greedy(mixers: list[str]) -> None:
    target, cost = model(mixers=mixers), []
    for seed in range(2):
        x = tokens(1, 3 + 5 * seed, seed=seed)
        greedy = target.generate(**said(x))
        for draft in (near(target), model(seed, layers=1, mixers=["rwkv"])):
            with calls(target) as fed:
                assert torch.equal(target.generate(**said(x, assistant_model=draft)), greedy)
            cost.append(len(fed))
    assert any(3 < calls < NEW for calls in cost), "no draft was accepted in part"


@pytest.mark.parametrize("id", ["linear-transformer", "s4", "multi-head-attention"])
def test_a_draft_costs_calls_and_changes_no_token(id: str) -> None:
    target, x = model(mixers=[id]), tokens(1, 9)
    greedy = target.generate(**said(x))
    wrong = model(mixers=[id])
    wrong.lm_head = Wrong(wrong.lm_head)
    same = model(mixers=[id])
    with calls(target) as none:
        assert torch.equal(target.generate(**said(x, assistant_model=wrong)), greedy)
    with calls(target) as all_:
        assert torch.equal(target.generate(**said(x, assistant_model=same)), greedy)
    assert len(none) == NEW, "each call gives the one token that no draft can spoil"
    assert len(all_) < NEW / 2, "each call gives its draft's tokens"


SMALL: dict[str, Any] = {"vocab_size": 32, "width": 16, "heads": 2, "layers": 2, "length": 64}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "BlockRecurrentForCausalLM": SMALL | {"window": 4, "states": 4},
    "DmcaForCausalLM": SMALL,
    "FeedbackForCausalLM": SMALL,
    "FlashForCausalLM": SMALL,
    "HourglassForCausalLM": SMALL | {"hierarchy": "1@1 1@2 1@1"},
    "LongspanForSeq2SeqLM": SMALL | {"decoder_start_token_id": 1},
    "RwkvForCausalLM": SMALL,
    "UniversalForCausalLM": SMALL,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_drafts_from_the_prompt_are_taken_back(name: str) -> None:
    kind = getattr(models, name)
    torch.manual_seed(0)
    built = kind(kind.config_class(**ARCHITECTURES[name])).double().eval()
    with torch.no_grad():
        for weight in (p for p in built.parameters() if p.dim() > 1):
            weight.mul_(3)
    x = tokens(1, 5).repeat(1, 3)
    asked = said(x, no_repeat_ngram_size=0)
    greedy = built.generate(**asked)
    assert torch.equal(built.generate(**asked, prompt_lookup_num_tokens=3), greedy)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("EarlyExitForCausalLM", {}),
        ("EquilibriumForCausalLM", {"layers": 1, "memory": 4, "allow_leaks": True}),
        ("PerceiverARForCausalLM", {"latents": 4}),
    ],
)
def test_what_depends_on_a_calls_tokens_refuses_drafts(name: str, changes: dict[str, Any]) -> None:
    kind = getattr(models, name)
    built = kind(kind.config_class(**(SMALL | changes))).eval()
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        built.generate(**said(tokens(1, 6)), prompt_lookup_num_tokens=3)


def test_drafts_are_for_one_row() -> None:
    with pytest.raises(ValueError, match="only supported for batch_size = 1"):
        model().generate(**said(tokens(2, 6)), prompt_lookup_num_tokens=3)
