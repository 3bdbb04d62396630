"""The health of a swap: figures by hand, and what cannot be measured."""

import json
from io import StringIO
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from longspan import LongspanError, convert
from longspan.convert.health import DEPTHS, HALF, Pair, needles
from longspan.hub.swapped import SwappedCache, cache_bytes

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 80,
}


def model() -> Any:
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return made


def windows(length: int = 30) -> Tensor:
    return torch.randint(3, 50, (3, length), generator=torch.Generator().manual_seed(1))


def test_figures_are_those_of_the_formulas() -> None:
    made, tokens = model(), windows()
    before = made(tokens).logits.detach()
    convert.swap(made, "linear-transformer", layers=[1])
    after = made(tokens).logits.detach()
    found = convert.health(made.train(), tokens, lengths=(40, 60), steps=3)
    assert made.training
    p, q = (logits[:, :-1].softmax(-1).double() for logits in (before, after))
    losses = [
        float(F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:])) for logits in (before, after)
    ]
    assert found.loss.before == pytest.approx(losses[0], abs=1e-5)
    assert found.loss.after == pytest.approx(losses[1], abs=1e-5)
    assert found.divergence == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), abs=1e-5)
    assert found.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert found.tokens == 3 * 29
    assert found.layers == {"1": {"id": "linear-transformer"}}
    assert found.divergence > 0
    assert found.agreement < 1
    for at in found.at:
        keys = 2 * at.length * 8 * 4  # K and V of one head of 8 numbers of 4 bytes, a layer
        assert at.state_bytes.before == 2 * keys
        assert at.state_bytes.after == keys + 3 * 8 * 9 * 4, "S and z of three heads"
        assert min(at.prefill.before, at.prefill.after, at.decode.before, at.decode.after) > 0


def test_an_exact_swap_is_in_perfect_health() -> None:
    found = convert.health(convert.swap(model(), "multi-head-attention"), windows(), lengths=(40,))
    assert found.loss.before == pytest.approx(found.loss.after, abs=1e-6)
    assert found.divergence == pytest.approx(0, abs=1e-6)
    assert found.agreement == 1
    assert found.at[0].recall.before == found.at[0].recall.after


def test_needles_are_hidden_once_and_asked_for_at_the_end() -> None:
    stream, length = windows(200).flatten(), 120
    rows = needles(stream, length, seed=2)
    assert rows.shape == (len(DEPTHS), length)
    needle, hay = rows[:, -2 * HALF :], length - 4 * HALF
    assert torch.isin(rows, stream).all()
    for row, own, depth in zip(rows, needle, DEPTHS, strict=True):
        places = [i for i in range(length) if torch.equal(row[i : i + 2 * HALF], own)]
        assert places == [round(depth * hay), length - 2 * HALF]
        rest = torch.cat([row[: places[0]], row[places[0] + 2 * HALF : -2 * HALF]])
        assert torch.equal(rest, stream[:hay])
    assert not torch.equal(needles(stream, length, seed=3), rows)


class Copier(torch.nn.Module):
    """Predicts after each token what followed its last occurrence before."""

    def forward(self, ids: Tensor, *, logits_to_keep: int, **_: Any) -> Any:
        logits = torch.zeros(*ids.shape, 50)
        for row, seen in enumerate(ids.tolist()):
            for i, token in enumerate(seen):
                if token in seen[:i]:
                    last = i - 1 - seen[:i][::-1].index(token)
                    logits[row, i, seen[last + 1]] = 1
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})


def test_recall_is_the_share_of_the_answer_that_comes_first() -> None:
    from longspan.convert.health import _recall

    hay = torch.full((1, 20), 1)
    asked, answer = torch.arange(10, 18)[None], torch.arange(20, 28)[None]
    row = torch.cat([asked, answer, hay, asked, answer], 1)
    assert _recall(Copier(), row) == 1
    broken = row.clone()
    broken[:, 9:11] = 1  # the answer's second and third token are lost
    assert _recall(Copier(), broken) == pytest.approx(5 / 8)


def test_what_carries_no_state_is_measured_without_it() -> None:
    made = convert.swap(model(), "sinkhorn-attention", block=8)
    found = convert.health(made, windows(), lengths=(40,))
    at = found.at[0]
    assert at.state_bytes.before
    assert at.state_bytes.after is at.decode.after is None
    assert at.prefill.after
    out = StringIO()
    Console(file=out, width=100).print(found)
    assert "state at 40" in out.getvalue()
    assert "–" in out.getvalue()
    assert json.loads(json.dumps(found.as_dict()))["loss"] == vars(found.loss)


def test_bytes_count_states_keys_and_values() -> None:
    made, cache = convert.swap(model(), "linear-transformer", layers=[0]), SwappedCache()
    assert cache_bytes(cache) == 0
    made(windows(10), past_key_values=cache)
    assert cache_bytes(cache) == 3 * (3 * 8 * 9 * 4 + 2 * 10 * 8 * 4)


def test_what_cannot_be_measured_is_refused() -> None:
    made, tokens = convert.swap(model(), "linear-transformer"), windows()
    with pytest.raises(LongspanError, match="cannot measure at 32, 81 tokens: give lengths above"):
        convert.health(made, tokens, lengths=(32, 40, 81))
    with pytest.raises(LongspanError, match=r"up to 60 .of the text 60, of the model 80"):
        convert.health(made, tokens[:2], lengths=(61,))
    with pytest.raises(LongspanError, match="steps=0"):
        convert.health(made, tokens, steps=0)
    with pytest.raises(LongspanError, match="nothing in this model was swapped"):
        convert.health(convert.undo(made), tokens, lengths=(40,))
    with pytest.raises(LongspanError, match="got a BertModel"):
        convert.health(BertModel(BertConfig(**SIZES)), tokens)
    assert Pair(None, 1.0).before is None
