"""Corpora, the orders they are read in, and associative recall."""

import bz2
import hashlib
import json
import os
import re
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, SequentialSampler

from longspan.data import (
    Corpus,
    Segments,
    Windows,
    corpora,
    corpus,
    enwiki6,
    huggingface,
    random_windows,
    recall,
    recall_accuracy,
)
from longspan.data.splits import SPLITS, assign
from longspan.errors import LongspanError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def documents(data: Corpus, split: str) -> list[bytes]:
    """The documents of a split, cut at the recorded starts."""
    ends = [*(data.documents[split][1:] - 1), None]
    bytes_ = getattr(data, split)
    return [
        bytes_[start:end].tobytes() for start, end in zip(data.documents[split], ends, strict=True)
    ]


def everything(data: Corpus) -> list[bytes]:
    return [document for split in SPLITS for document in documents(data, split)]


def folder(root: Path, count: int) -> Path:
    for n in range(count):
        path = root / f"part{n % 3}" / f"{n}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"document {n} " * (n + 1))
    return root


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return corpus()


def test_stdlib_is_the_same_twice_and_fast(stdlib: Corpus) -> None:
    start = time.process_time()
    again = corpus("stdlib")
    assert time.process_time() - start < 2
    assert again.sha256 == stdlib.sha256
    for split in SPLITS:
        assert np.array_equal(getattr(again, split), getattr(stdlib, split))


def test_stdlib_is_split_by_file_and_covers_them(stdlib: Corpus) -> None:
    parts = [set(documents(stdlib, split)) for split in SPLITS]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(everything(stdlib))
    root = Path(sysconfig.get_paths()["stdlib"])
    for module in ("ast.py", "asyncio/tasks.py", "json/decoder.py"):
        assert sum((root / module).read_bytes() in part for part in parts) == 1
    assert not any(
        b"class TestJSONTestSuite" in data or b"\0" in data for data in set.union(*parts)
    )
    shares = np.array([len(part) for part in parts]) / len(everything(stdlib))
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=0.03)


def test_describe_is_json_and_names_the_python(stdlib: Corpus) -> None:
    facts = json.loads(json.dumps(stdlib.describe()))
    assert "{}.{}.{}".format(*sys.version_info) in facts["source"]
    assert facts["sha256"] == stdlib.sha256
    assert facts["bytes"]["train"] == len(stdlib.train) > 5_000_000


def test_corpora_lists_what_corpus_takes() -> None:
    assert list(corpora()) == ["stdlib", "enwiki6"]
    assert all(line and "\n" not in line for line in corpora().values())


def test_folder_joins_documents_with_a_zero_byte(tmp_path: Path) -> None:
    data = corpus(str(folder(tmp_path, 40)))
    paths = sorted(tmp_path.rglob("*.txt"), key=lambda path: path.relative_to(tmp_path).as_posix())
    texts = [path.read_bytes() for path in paths]
    assert sorted(everything(data)) == sorted(texts)
    assert data.sha256 == hashlib.sha256(b"\0".join(texts)).hexdigest()
    for split in SPLITS:
        assert getattr(data, split).tobytes() == b"\0".join(documents(data, split))
        assert documents(data, split) == [text for text in texts if text in documents(data, split)]


def test_folder_leaves_out_binary_hidden_empty_and_copies(tmp_path: Path) -> None:
    folder(tmp_path, 5)
    before = corpus(tmp_path)
    (tmp_path / "image.bin").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "zz_copy.txt").write_bytes((tmp_path / "part0" / "0.txt").read_bytes())
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD").write_text("ref")
    assert corpus(tmp_path).sha256 == before.sha256


@pytest.mark.parametrize("count", [3, 4, 10])
def test_a_handful_of_files_fills_every_split(tmp_path: Path, count: int) -> None:
    data = corpus(folder(tmp_path, count))
    assert len(everything(data)) == count
    assert all(documents(data, split) for split in SPLITS)


def test_two_files_are_split_by_bytes(tmp_path: Path) -> None:
    data = corpus(folder(tmp_path, 2))
    assert len(data.train) == round(0.9 * len("document 0 \0document 1 document 1 "))
    assert data.documents["train"].tolist() == [0, len("document 0 \0")]


def test_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    folder(tmp_path, 3)
    try:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_bytes(b"text")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    assert b"text" in everything(corpus(tmp_path))


def test_a_file_keeps_its_split_when_others_come() -> None:
    keys = [f"{n}.txt" for n in range(400)]
    few, many = assign(keys[:200]), assign(keys)
    assert all(many[key] == split for key, split in few.items())
    assert {"train", "valid", "test"} == set(few.values())


@pytest.mark.parametrize("wanted", [("train",), ("train", "test"), SPLITS])
@pytest.mark.parametrize("count", [3, 4, 5])
def test_assignment_fills_just_the_wanted_splits(wanted: tuple[str, ...], count: int) -> None:
    for trial in range(300):
        split_of = assign([f"{trial}/{n}" for n in range(count)], wanted)
        assert set(split_of.values()) == set(wanted)


def test_file_is_split_90_5_5_by_bytes(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    raw = np.random.default_rng(0).integers(0, 256, 1001, dtype=np.uint8).tobytes()
    path.write_bytes(raw)
    data = corpus(path)
    assert b"".join(getattr(data, split).tobytes() for split in SPLITS) == raw
    assert [len(getattr(data, split)) for split in SPLITS] == [901, 50, 50]
    assert data.sha256 == hashlib.sha256(raw).hexdigest()


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "void").touch()
    (tmp_path / "tiny").write_bytes(b"abc")
    (tmp_path / "bare").mkdir()
    for name, message in {
        "enwik6": r"no corpus and no file 'enwik6'; did you mean 'enwiki6'\? Known: stdlib",
        str(tmp_path / "absent"): r"no corpus and no file .*absent",
        str(tmp_path / "void"): r"void is empty: expected a file",
        str(tmp_path / "tiny"): r"tiny' holds 3 bytes; a corpus needs at least 20",
        str(tmp_path / "bare"): r"bare holds no text: expected files",
    }.items():
        with pytest.raises(LongspanError, match=message):
            corpus(name)


# enwiki6


def wheel(root: Path, text: bytes) -> Path:
    path = root / "gensim-4.4.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(enwiki6._MEMBER, bz2.compress(text))
    return path


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache on a machine without gensim."""
    monkeypatch.setenv("LONGSPAN_DATA", str(tmp_path))
    monkeypatch.setattr(enwiki6, "find_spec", lambda name: None)
    return tmp_path


PAGES = b"<mediawiki>\n" + b"".join(b"  <page>\n%d\n  </page>\n" % 9**n for n in range(60))


def test_enwiki6_absent_says_how_to_get_it(shelf: Path) -> None:
    with pytest.raises(LongspanError, match=r"(?s)not on this machine.*pip download .*gensim==4"):
        corpus("enwiki6")


def test_enwiki6_is_unpacked_once_and_mended(shelf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enwiki6, "_SHA256", hashlib.sha256(PAGES).hexdigest())
    archive, cached = wheel(shelf, PAGES), shelf / "enwiki6.xml"
    data = corpus("enwiki6")
    assert cached.read_bytes() == PAGES
    assert sorted(path.name for path in shelf.iterdir()) == sorted([archive.name, cached.name])
    cached.write_bytes(PAGES[:-1])
    assert corpus("enwiki6").sha256 == data.sha256
    assert cached.read_bytes() == PAGES
    archive.unlink()
    assert corpus("enwiki6").sha256 == data.sha256 == hashlib.sha256(PAGES).hexdigest()
    edges = np.cumsum([0, *(len(getattr(data, split)) for split in SPLITS)])
    starts = [data.documents[split] + edges[n] for n, split in enumerate(SPLITS)]
    pages = [match.start() for match in re.finditer(b"  <page>", PAGES)]
    assert np.concatenate(starts).tolist() == sorted({*pages, *edges[:3].tolist()})


def test_enwiki6_is_read_from_an_installed_gensim(
    shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spec:
        submodule_search_locations = (str(shelf / "site" / "gensim"),)

    monkeypatch.setattr(enwiki6, "_SHA256", hashlib.sha256(PAGES).hexdigest())
    monkeypatch.setattr(enwiki6, "find_spec", lambda name: Spec)
    member = shelf / "site" / enwiki6._MEMBER
    member.parent.mkdir(parents=True)
    member.write_bytes(bz2.compress(PAGES))
    assert corpus("enwiki6").sha256 == hashlib.sha256(PAGES).hexdigest()


def test_enwiki6_refuses_other_text_and_broken_wheels(shelf: Path) -> None:
    path = wheel(shelf, PAGES)
    with pytest.raises(LongspanError, match=r"has SHA-256 [0-9a-f]{64}, expected 34c1c6"):
        corpus("enwiki6")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LongspanError, match=r"(?s)holds no readable enwiki6.*get it again, by"):
        corpus("enwiki6")
    assert not (shelf / "enwiki6.xml").exists()


def test_enwiki6_itself() -> None:
    try:
        data = corpus("enwiki6")
    except LongspanError as error:
        pytest.skip(str(error))
    assert data.sha256 == enwiki6._SHA256
    assert data.train[:10].tobytes() == b"<mediawiki"
    assert sum(data.describe()["bytes"].values()) == 6_089_746
    assert sum(map(len, data.documents.values())) == 206 + 3


# Hugging Face datasets


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    rows = [f"row {n} ä" for n in range(50)]
    whole = datasets.Dataset.from_dict({"text": [*rows, "", None], "label": list(range(52))})
    whole.save_to_disk(str(tmp_path / "whole"))
    three = {
        "train": datasets.Dataset.from_dict({"a": ["one", "two"], "b": ["1", "2"]}),
        "validation": datasets.Dataset.from_dict({"a": ["three"], "b": ["3"]}),
        "test": datasets.Dataset.from_dict({"a": ["four"], "b": ["4"]}),
    }
    datasets.DatasetDict(three).save_to_disk(str(tmp_path / "three"))
    two = {"train": whole.select([0]), "validation": whole.select([1])}
    datasets.DatasetDict(two).save_to_disk(str(tmp_path / "two"))
    two = {"train": whole, "validation": whole.select([0, 1])}
    datasets.DatasetDict(two).save_to_disk(str(tmp_path / "cut"))
    return tmp_path


def test_hf_rows_are_documents(saved: Path) -> None:
    data = corpus(f"hf:{saved}/whole")
    assert sorted(everything(data)) == sorted(f"row {n} ä".encode() for n in range(50))
    assert corpus(f"hf:{saved}/whole#text").sha256 == data.sha256
    assert "column 'text', 50 rows" in data.source


def test_hf_keeps_its_own_splits(saved: Path) -> None:
    data = corpus(f"hf:{saved}/three#b")
    assert [documents(data, split) for split in SPLITS] == [[b"1", b"2"], [b"3"], [b"4"]]
    data = corpus(f"hf:{saved}/cut")
    assert documents(data, "valid") == ["row 0 ä".encode(), "row 1 ä".encode()]
    held_out = documents(data, "test")
    assert held_out
    assert len(held_out) + len(documents(data, "train")) == 50


def test_hf_errors(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, message in {
        f"hf:{saved}/three": r"does not say which column to read; its text columns: a, b",
        f"hf:{saved}/whole#label": r"has no text column 'label'; its text columns: text",
        f"hf:{saved}/two": r"has 1 training documents and needs at least 2, to fill train and test",
        f"hf:{saved}/absent": r"cannot be loaded: no such folder",
        f"hf:{saved}": r"cannot be loaded: .* Expected a folder written by save_to_disk",
        f"{saved}/whole": r"was saved by datasets: name it 'hf:",
    }.items():
        with pytest.raises(LongspanError, match=message):
            corpus(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LongspanError, match=r"pip install 'longspan\[data\]'"):
        corpus(f"hf:{saved}/whole")


def test_hf_names_are_tried_as_the_hub_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(*call: str) -> None:
        calls.append(call)
        raise datasets.exceptions.DatasetNotFoundError(f"no {call}")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("a", "a/b", "a/b/c"):
        with pytest.raises(LongspanError, match=r"cannot be loaded: no \("):
            huggingface.load(name)
    assert calls == [("a",), ("a/b",), ("a", "b"), ("a/b", "c")]


# Windows, crops, segments


DATA = np.arange(103) % 251


def test_windows_step_through_the_stream() -> None:
    windows = Windows(DATA.astype(np.uint8), length=10)
    assert len(windows) == 10
    assert torch.equal(torch.cat([w["input_ids"] for w in windows]), torch.arange(100))
    assert windows[-1]["labels"].tolist() == list(range(90, 100))
    assert windows[0]["input_ids"].dtype == torch.int64
    with pytest.raises(IndexError):
        windows[10]


@pytest.mark.parametrize(("length", "stride"), [(10, 3), (103, 1), (1, 1), (10, 200)])
def test_windows_with_a_stride(length: int, stride: int) -> None:
    windows = Windows(DATA, length=length, stride=stride)
    expected = [DATA[s : s + length].tolist() for s in range(0, 103 - length + 1, stride)]
    assert [windows[n]["input_ids"].tolist() for n in range(len(windows))] == expected


def test_random_windows_are_uniform_crops() -> None:
    crops = random_windows(DATA, batch=4000, length=100, generator=generator())
    assert torch.equal(crops, crops[:, :1] + torch.arange(100))
    assert crops[:, 0].bincount(minlength=4).tolist() == pytest.approx([1000] * 4, abs=120)
    before = torch.get_rng_state()
    assert torch.equal(crops, random_windows(DATA, batch=4000, length=100, generator=generator()))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Windows(DATA, length=104), "hold 103 bytes, too few for a window of 104"),
        (lambda: Windows(DATA, length=4, stride=0), "stride is 0; expected at least 1"),
        (lambda: Segments(DATA, batch=4, length=26), "too few for 4 rows of 26: lower the batch"),
        (lambda: Segments(DATA, batch=0, length=26), "batch is 0"),
        (
            lambda: random_windows(DATA, batch=1, length=500, generator=generator()),
            "too few for a window of 500",
        ),
    ],
)
def test_streams_refuse_what_does_not_fit(make, message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        make()


def test_segments_continue_every_row() -> None:
    segments = Segments(DATA, batch=4, length=5)
    assert len(segments) == 5
    whole = torch.cat([segment["input_ids"] for segment in segments], dim=1)
    # The rows laid end to end are the data: each row, and so each step along it, is contiguous.
    assert torch.equal(whole.flatten(), torch.arange(100))
    for t in range(4):
        now, then = segments[t]["input_ids"], segments[t + 1]["input_ids"]
        assert torch.equal(then[:, 0], now[:, -1] + 1)
    assert torch.equal(segments[-1]["labels"], segments[4]["input_ids"])


def test_segments_resume_where_they_stopped() -> None:
    segments = Segments(DATA, batch=4, length=5)
    order = iter(segments)
    next(order)
    next(order)
    resumed = Segments(DATA, batch=4, length=5)
    resumed.load_state_dict(json.loads(json.dumps(segments.state_dict())))
    rest = list(resumed)
    assert len(rest) == 3
    assert torch.equal(rest[0]["input_ids"], segments[2]["input_ids"])
    assert len(list(resumed)) == 5, "after the last segment the next pass is whole"


@pytest.mark.parametrize(("batch", "length", "size"), [(2, 5, 103), (4, 4, 103), (4, 5, 102)])
def test_segments_refuse_a_place_of_another_layout(batch: int, length: int, size: int) -> None:
    state = Segments(DATA, batch=4, length=5).state_dict()
    with pytest.raises(LongspanError, match="this place was saved with"):
        Segments(DATA[:size], batch=batch, length=length).load_state_dict(state)


def test_rows_in_order_make_the_segments() -> None:
    segments = Segments(DATA, batch=4, length=5)
    rows = segments.rows()
    single = DataLoader(rows, batch_size=4, sampler=SequentialSampler(rows))
    whole = DataLoader(segments, batch_size=None)
    assert len(single) == len(whole) == len(segments)
    for one, other, segment in zip(single, whole, segments, strict=True):
        assert torch.equal(one["input_ids"], segment["input_ids"])
        assert torch.equal(other["labels"], segment["labels"])


@pytest.mark.slow
def test_trainer_reads_windows_and_segments(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    class Recorder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.seen: list[torch.Tensor] = []

        def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict:
            self.seen.append(input_ids.clone())
            return {"loss": self.scale * (input_ids == labels).float().mean()}

    segments = Segments(DATA, batch=4, length=5)
    for name, data in {"rows": segments.rows(), "windows": Windows(DATA, length=5)}.items():
        model = Recorder()
        Trainer(
            model,
            TrainingArguments(
                str(tmp_path / name),
                per_device_train_batch_size=4,
                max_steps=5,
                train_sampling_strategy="sequential",
                report_to=[],
                save_strategy="no",
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=data,
        ).train()
        dim = 1 if name == "rows" else 0
        assert torch.equal(torch.cat(model.seen, dim).flatten(), torch.arange(100))


# Associative recall


def looked_up(input_ids: torch.Tensor, pairs: int, vocabulary: int) -> torch.Tensor:
    """Logits of a reader that keeps the pairs in a dictionary and looks each token up."""
    logits = torch.zeros(*input_ids.shape, vocabulary)
    for b, row in enumerate(input_ids.tolist()):
        known = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        for t, token in enumerate(row):
            logits[b, t, known.get(token, 0)] = 1
    return logits


@pytest.mark.parametrize(
    ("length", "pairs", "vocabulary"),
    [(64, 4, 256), (64, 16, 34), (65, 16, 8192), (4, 1, 4), (101, 9, 33)],
)
def test_recall_is_solved_by_a_dictionary(length: int, pairs: int, vocabulary: int) -> None:
    input_ids, labels = recall(
        batch=8, length=length, pairs=pairs, vocabulary=vocabulary, generator=generator()
    )
    assert input_ids.shape == labels.shape == (8, length)
    assert recall_accuracy(looked_up(input_ids, pairs, vocabulary), labels) == 1
    assert ((labels != -100).sum(1) == pairs).all()
    assert (labels[:, : 2 * pairs + 1] == -100).all(), "nothing is asked before the last pair"
    assert 0 <= input_ids.min() <= input_ids.max() < vocabulary
    keys, values = input_ids[:, 0 : 2 * pairs : 2], input_ids[:, 1 : 2 * pairs : 2]
    assert all(len(set(row)) == pairs for row in [*keys.tolist(), *values.tolist()])
    assert keys.max() < vocabulary // 2 <= values.min()


def test_recall_asks_every_key_once_and_hides_the_answer() -> None:
    input_ids, labels = recall(batch=64, length=64, pairs=8, vocabulary=512, generator=generator())
    asked = labels[:, 1:] != -100
    queries = input_ids[:, :-1][asked].view(64, 8)
    assert torch.equal(queries.sort(1).values, input_ids[:, 0:16:2].sort(1).values)
    # In the place of the answer stands filler, which is the answer one time in 512.
    assert (input_ids == labels).sum() <= 8


def test_recall_is_what_a_causal_lm_of_transformers_is_scored_on() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    input_ids, labels = recall(batch=4, length=32, pairs=4, vocabulary=64, generator=generator())
    logits = 50 * looked_up(input_ids, 4, 64)
    assert ForCausalLMLoss(logits, labels, 64).item() == pytest.approx(0, abs=1e-6)
    assert ForCausalLMLoss(logits.roll(1, dims=1), labels, 64).item() > 10


def test_recall_is_made_of_its_generator_alone() -> None:
    before = torch.get_rng_state()
    arguments = {"batch": 4, "length": 32, "pairs": 4, "vocabulary": 64}
    one, two, other = (recall(**arguments, generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], other[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_recall_accuracy_counts_only_what_is_asked() -> None:
    labels = torch.tensor([[-100, -100, 2, -100, 1]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 2, 0, 0, 1]]), 3).float()
    assert recall_accuracy(logits, labels) == 0.5
    with pytest.raises(LongspanError, match="every label is -100"):
        recall_accuracy(logits, torch.full_like(labels, -100))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"length": 31}, "8 pairs need a length of at least 32 and got 31: use at most 7"),
        ({"vocabulary": 17}, "8 pairs need a vocabulary of at least 18 and got 17: use at most 7"),
        ({"vocabulary": 1}, "use at most 0 pairs"),
        ({"pairs": 0}, "pairs=0; expected at least 1"),
    ],
)
def test_recall_refuses_what_does_not_fit(changed: dict[str, int], message: str) -> None:
    fitting = {"batch": 2, "length": 32, "pairs": 8, "vocabulary": 18}
    recall(**fitting, generator=generator())
    with pytest.raises(LongspanError, match=message):
        recall(**(fitting | changed), generator=generator())
