"""The command line: what it prints, where, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import longspan
from longspan.cli import app

TEXT = b"the quick brown fox jumps over the lazy dog. " * 200


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "longspan", *arguments], capture_output=True, text=True
    )


def test_listing_imports_nothing_heavy() -> None:
    code = (
        "import sys; from longspan.cli import app\n"
        "try: app(['list'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'plotly'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads a child's CPU time")
def test_listing_takes_less_than_half_a_second_of_cpu() -> None:
    import resource

    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process("list")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


def test_list_prints_every_mechanism_plainly() -> None:
    done = call("list")
    assert done.exit_code == 0
    header, *lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(longspan.cards())
    assert "\x1b" not in done.stdout
    # Aligned: each column starts where its header does.
    start = header.index("family")
    assert all(line[start - 1] == " " != line[start] for line in lines)


def test_list_selects_and_prints_json() -> None:
    found = json.loads(call("list", "--family", "kernel", "--mode", "causal", "--json").stdout)
    assert "linear-transformer" in [card["id"] for card in found]
    assert {card["family"] for card in found} == {"kernel"}


def test_show_tells_arguments_and_defaults() -> None:
    shown = json.loads(call("show", "longformer", "--json").stdout)
    arguments = {a["name"]: a for a in shown["arguments"]}
    assert arguments["window"]["default"] == 512
    assert not arguments["window"]["required"]
    assert "window" in shown["doc"]
    text = call("show", "longformer").stdout
    assert "512" in text
    assert "arxiv.org" in text


def test_version() -> None:
    assert call("--version").stdout.strip() == f"longspan {longspan.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "longfomer"], "did you mean 'longformer'?"),
        (["list", "--family", "kernels"], "did you mean 'kernel'?"),
        (["check", "nothing-like-it"], "no mechanism"),
        (["compare", "--budget", "long"], "is no budget"),
        (["compare", "--mechanisms", "s5x9"], "no mechanism"),
        (["bench", "--lengths", "1k"], "whole numbers"),
        (["generate", "/nowhere", "--prompt", "a"], "no model"),
        (["generate", "/nowhere", "--prompt", ""], "prompt is empty"),
        (["train", "--mixers", "rope", "--out", "/tmp/none"], "mixes no sequence"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(arguments: list[str], message: str) -> None:
    done = call(*arguments)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout


def test_a_mistake_has_no_traceback_and_a_bug_has() -> None:
    done = process("show", "longfomer")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("longspan: no mechanism 'longfomer'")
    assert "Traceback" not in done.stderr
    code = (
        "import longspan.cli as cli\n"
        "def broken(id): raise RuntimeError('a bug')\n"
        "cli.longspan.show = broken\n"
        "cli.app(['show', 's4'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


@pytest.mark.parametrize(
    "command", ["list", "show", "check", "compare", "bench", "train", "generate"]
)
def test_help_has_examples(command: str) -> None:
    done = call(command, "--help")
    assert done.exit_code == 0
    assert f"longspan {command}" in done.stdout
    assert "Examples" in done.stdout


def test_check_fails_where_a_law_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan import testing

    verdicts = [
        testing.Verdict("no_peeking", "pass"),
        testing.Verdict("compiles", "skip", "not yet"),
    ]
    monkeypatch.setattr(testing, "certificate", lambda id: verdicts)
    done = call("check", "s4", "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {
        "id": "s4",
        "laws": [
            {"law": "no_peeking", "result": "pass", "reason": None},
            {"law": "compiles", "result": "skip", "reason": "not yet"},
        ],
    }
    verdicts.append(testing.Verdict("streaming_equals_whole", "fail", "0.3 apart"))
    done = call("check", "s4", "longformer")
    assert done.exit_code == 1
    assert done.stdout.count("0.3 apart") == 2


def test_compare_ends_with_1_where_no_row_finished(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(TEXT)
    done = call(
        "compare", "--data", tmp_path / "text", "--length", 64, "--mechanisms", "reformer-lsh",
        "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 1, done.output
    assert "reformer-lsh-causal" in done.stdout
    assert (tmp_path / "out/report.html").is_file()


def test_compare_says_how_to_go_on_after_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longspan.bench import compare

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run", interrupted)
    done = call("compare", "--mechanisms", "s4", "--out", tmp_path / "out")
    assert done.exit_code == 130
    assert "the same command goes on" in done.stderr


def test_bench_measures_beside_dense_attention() -> None:
    done = call(
        "bench", "--mechanisms", "linear-transformer,transformer-xl", "--lengths", "64,128",
        "--seconds", "0", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [(r["id"], r["length"]) for r in rows] == [
        (id, length) for id in ("linear-transformer", "transformer-xl") for length in (64, 128)
    ]
    for row in rows:
        assert 0 < row["forward"] < row["training"]
        assert row["forward_ratio"] > 0
    assert rows[1]["flops"] == pytest.approx(2 * rows[0]["flops"], rel=0.1)


def test_bench_goes_on_after_a_mechanism_it_cannot_build() -> None:
    done = call(
        "bench", "--mechanisms", "linear-transformer(windw=3),linear-transformer",
        "--lengths", "32", "--seconds", "0",
    )  # fmt: skip
    assert done.exit_code == 1
    assert "no argument 'windw'" in done.stderr
    assert "linear-transformer" in done.stdout


def test_train_resume_generate(tmp_path: Path) -> None:
    text, out = tmp_path / "text", tmp_path / "lm"
    text.write_bytes(TEXT)

    def train(*more: object) -> Any:
        return call(
            "train", "--data", text, "--out", out, "--mixers", "linear-transformer", "--length", 32,
            "--batch", 2, "--width", 16, "--layers", 1, "--heads", 2, *more,
        )  # fmt: skip

    first = train("--steps", 2)
    assert first.exit_code == 0, first.output
    assert "bits per byte" in first.stdout
    assert (out / "model.safetensors").is_file()

    again = train("--steps", 4)
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    resumed = train("--steps", 4, "--resume")
    assert resumed.exit_code == 0, resumed.output
    state = json.loads((out / "checkpoint-4/trainer_state.json").read_text())
    assert state["global_step"] == 4
    other = train("--steps", 6, "--resume", "--heads", 1)
    assert other.exit_code == 2
    assert "heads=2" in other.stderr

    made = [
        call("generate", out, "--prompt", "the ", "--tokens", 8, "--temperature", t, "--seed", 3)
        for t in (0, 0, 1, 1)
    ]
    assert all(m.exit_code == 0 and m.stdout.startswith("the ") for m in made), made[0].output
    assert made[0].stdout == made[1].stdout
    assert made[2].stdout == made[3].stdout
