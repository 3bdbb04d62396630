"""BP-Transformer's models: language model, root classifier, encoder–decoder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.models.tree import (
    TreeConfig,
    TreeForCausalLM,
    TreeForSeq2SeqLM,
    TreeForSequenceClassification,
)


def config(**fields) -> TreeConfig:
    chosen: dict[str, Any] = {
        "vocab_size": 11,
        "width": 16,
        "layers": 2,
        "heads": 2,
        "near": 2,
        "inner": 16,
    }
    return TreeConfig(**(chosen | fields))


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 11, shape, generator=torch.Generator().manual_seed(sum(shape)))


def learn(model: Any, batch, steps: int = 40) -> tuple[float, float]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for name, p in model.named_parameters():
        assert p.grad is not None, name
    return losses[0], losses[-1]


def test_language_model_learns_generates_by_steps_and_reloads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = TreeForCausalLM(config())
    ids = tokens(2, 13)
    first, last = learn(model, {"input_ids": ids, "labels": ids})
    assert last < 0.5 * first
    model.eval()
    fast = model.generate(ids[:, :5], max_new_tokens=8, do_sample=False)
    slow = model.generate(ids[:, :5], max_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(fast, slow)
    assert torch.equal(fast, ids)
    model.save_pretrained(tmp_path)
    again = TreeForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_classifier_reads_the_root_whatever_the_length() -> None:
    torch.manual_seed(0)
    model, ids = TreeForSequenceClassification(config(num_labels=3)), tokens(3, 9)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    logits = model.eval()(ids, mask).logits
    for b, n in enumerate((9, 4, 1)):
        assert_close(logits[b : b + 1], model(ids[b : b + 1, :n]).logits)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}
    first, last = learn(model.train(), batch)
    assert last < 0.2 * first
    with pytest.raises(LongspanError, match="no root"):
        model(ids, mask * torch.tensor([[1], [1], [0]]))


def test_encoder_decoder_attends_to_the_source_and_translates_by_steps() -> None:
    torch.manual_seed(0)
    model = TreeForSeq2SeqLM(config(decoder_start_token_id=0))
    ids, labels = tokens(2, 9), tokens(2, 12)
    mask = (torch.arange(9) < torch.tensor([[9], [6]])).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    base = model.eval()(**batch).logits
    other = ids.clone()
    other[0, 8] = other[0, 8] % 10 + 1
    changed = (model(other, mask, labels).logits != base).any(-1)
    assert changed[0].all()
    assert not changed[1].any()
    first, last = learn(model.train(), batch, 60)
    assert last < 0.5 * first
    model.eval()
    found = model.translate(ids, mask, most=12)
    delayed = torch.cat([torch.zeros(2, 1, dtype=torch.long), found[:, :-1]], 1)
    again = model(ids, mask, decoder_input_ids=delayed).logits.argmax(-1)
    assert torch.equal(again, found)
