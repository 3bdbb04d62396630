"""`longspan convert`: a folder in, a folder and its health out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from longspan import convert
from longspan.cli import app


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A tiny Llama that reads characters, and a text."""
    words = {letter: i for i, letter in enumerate("abcdefghij?")}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    folder = tmp_path / "model"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    sizes: dict[str, Any] = {"vocab_size": 11, "hidden_size": 12, "intermediate_size": 8}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(folder)
    (tmp_path / "text.txt").write_text("abcdefghij" * 300)
    return tmp_path


def call(stored: Path, *arguments: str) -> Result:
    places = [stored / "model", "--out", stored / "out", "--data", stored / "text.txt"]
    return CliRunner().invoke(app, ["convert", *map(str, places), *arguments])


def test_a_folder_is_converted_and_measured(stored: Path) -> None:
    done = call(
        stored, "--to", "performer(features=8)", "--layers", "-1", "--lengths", "40", "--json"
    )
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["layers"] == {"1": {"id": "performer", "features": 8}}
    assert [at["length"] for at in found["at"]] == [40]
    loaded = convert.load(stored / "out")
    assert loaded(torch.zeros(1, 5, dtype=torch.long)).logits.isfinite().all()
    again = call(stored, "--to", "performer")
    assert again.exit_code == 2
    assert "is not empty" in again.stderr


def test_health_is_a_table_or_left_out(stored: Path) -> None:
    done = call(stored, "--to", "multi-head-attention", "--lengths", "40")
    assert done.exit_code == 0, done.output
    assert "same first choice" in done.stdout
    assert "100.0%" in done.stdout
    (stored / "out" / "config.json").unlink()
    for path in (stored / "out").iterdir():
        path.unlink()
    assert call(stored, "--to", "performer", "--no-health").stdout.startswith("Model: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--to", "perfomer"), "did you mean 'performer'"),
        (("--to", "performer", "--layers", "one"), "--layers is 'one'"),
        (("--to", "performer", "--lengths", "2000"), "2 windows of 2000"),
    ],
)
def test_mistakes_are_told(stored: Path, arguments: tuple[str, ...], told: str) -> None:
    done = call(stored, *arguments)
    assert done.exit_code == 2
    assert told in done.stderr
    (stored / "model" / "config.json").unlink()
    assert "holds no model" in call(stored, "--to", "performer").stderr
