"""The comparison: its rows, its file, and what a kill, a crash or a second run does to them."""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from longspan.bench import compare, records
from longspan.bench.settings import Budget, Settings, Spec, choose, refusal
from longspan.cli import app
from longspan.errors import LongspanError
from longspan.registry import show

# Stands for longspan.bench.row: as long as it should last, and however it should end.
FAKE = """
import json, os, sys, time
from longspan.bench.row import die_with
die_with(int(sys.argv[1]))
job = json.load(sys.stdin)
with open({pids!r}, "a") as file:
    file.write(f"{{os.getpid()}}\\n")
print(json.dumps({{"phase": "training", "done": 0.5}}), flush=True)
time.sleep({seconds})
if job["id"] == "longformer":
    print("before it\\nthe reason", file=sys.stderr)
    sys.exit(3)
if job["id"] == "s4":
    os.kill(os.getpid(), 9)
print(json.dumps({{"record": {{"parameters": job["seed"]}}}}), flush=True)
"""


def fake(folder: Path, seconds: float = 0.0) -> list[str]:
    return [sys.executable, "-c", FAKE.format(pids=str(folder / "pids"), seconds=seconds)]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    text = tmp_path / "text"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    return Settings(
        data=str(text), length=64, budget="512tok", batch=4, width=32, layers=1, heads=2,
        certificate=False,
    )  # fmt: skip


def run(settings: Settings, folder: Path, mechanisms: str, seconds: float = 0.0, **more: int):
    command = fake(folder, seconds)
    return compare.run(settings, choose(mechanisms), folder / "out", command=command, **more)


def test_every_mechanism_and_seed_gets_one_row(settings: Settings, tmp_path: Path) -> None:
    rows = run(settings, tmp_path, "multi-head-attention,linear-transformer", seeds=2)
    assert [(r["id"], r["seed"]) for r in rows] == [
        ("multi-head-attention", 0),
        ("linear-transformer", 0),
        ("multi-head-attention", 1),
        ("linear-transformer", 1),
    ]
    assert all(r["status"] == "done" and r["parameters"] == r["seed"] for r in rows)
    assert rows == records.read(tmp_path / "out")


def test_a_second_run_does_what_is_missing(settings: Settings, tmp_path: Path) -> None:
    run(settings, tmp_path, "linear-transformer")
    before = (tmp_path / "out/records.jsonl").read_bytes()
    rows = run(settings, tmp_path, "multi-head-attention,linear-transformer")
    assert [r["id"] for r in rows] == ["linear-transformer", "multi-head-attention"]
    assert (tmp_path / "out/records.jsonl").read_bytes().startswith(before)
    assert len((tmp_path / "pids").read_text().split()) == 2


def test_other_settings_and_other_data_do_not_mix(settings: Settings, tmp_path: Path) -> None:
    run(settings, tmp_path, "linear-transformer")
    wider = Settings(**{**vars(settings), "width": 64})
    assert len(run(wider, tmp_path, "linear-transformer")) == 1
    Path(settings.data).write_bytes(b"now something else entirely. " * 100)
    assert len(run(settings, tmp_path, "linear-transformer")) == 1
    assert len(records.read(tmp_path / "out")) == 3


def test_arguments_make_another_row(settings: Settings, tmp_path: Path) -> None:
    rows = run(settings, tmp_path, "reformer-lsh-causal(rounds=1),reformer-lsh-causal(rounds=2)")
    assert [r["arguments"] for r in rows] == [{"rounds": 1}, {"rounds": 2}]


def test_a_crash_costs_one_row_and_says_why(settings: Settings, tmp_path: Path) -> None:
    rows = run(settings, tmp_path, "longformer,s4,linear-transformer")
    assert [r["status"] for r in rows] == ["failed", "failed", "done"]
    assert "the reason" in rows[0]["reason"]
    assert "SIGKILL" in rows[1]["reason"]


def test_failed_rows_are_tried_again_only_when_asked(settings: Settings, tmp_path: Path) -> None:
    for retry, starts in ((False, 1), (False, 1), (True, 2)):
        rows = run(settings, tmp_path, "longformer", retry=retry)
        assert [r["status"] for r in rows] == ["failed"]
        assert len((tmp_path / "pids").read_text().split()) == starts


def test_a_refused_row_names_the_strict_variant(settings: Settings, tmp_path: Path) -> None:
    (row,) = run(settings, tmp_path, "reformer-lsh")
    assert row["status"] == "refused"
    assert "'reformer-lsh-causal'" in row["reason"]
    assert "future" in row["reason"]
    allowed = Settings(**{**vars(settings), "allow_leaks": True})
    (row,) = run(allowed, tmp_path, "reformer-lsh")
    assert row["status"] == "done"


def test_what_mixes_no_sequence_is_refused() -> None:
    assert "kind position" in (refusal(show("rope"), allow_leaks=True) or "")
    assert refusal(show("linear-transformer"), allow_leaks=False) is None


def test_a_torn_line_is_dropped_and_its_row_done_again(settings: Settings, tmp_path: Path) -> None:
    run(settings, tmp_path, "linear-transformer,multi-head-attention")
    path = tmp_path / "out/records.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(whole[0] + whole[1][:-20])
    rows = run(settings, tmp_path, "linear-transformer,multi-head-attention")
    assert [r["id"] for r in rows] == ["linear-transformer", "multi-head-attention"]
    assert path.read_bytes().startswith(whole[0])
    assert len(records.read(tmp_path / "out")) == 2


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "records.jsonl").write_text('{"id": 1}\n{"id": \n{"id": 2}\n')
    with pytest.raises(LongspanError, match=r"line 2 .*remove the line"):
        records.read(tmp_path)


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records.append(tmp_path, {"id": "first"})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    with pytest.raises(OSError, match="disk full"):
        records.append(tmp_path, {"id": "second"})
    monkeypatch.undo()
    assert records.read(tmp_path) == [{"id": "first"}]


def test_two_comparisons_do_not_write_one_folder(settings: Settings, tmp_path: Path) -> None:
    with (
        records.locked(tmp_path / "out"),
        pytest.raises(LongspanError, match=rf"another compare \(process {os.getpid()}\)"),
    ):
        run(settings, tmp_path, "linear-transformer")


def _killed(settings: Settings, folder: Path, after: float) -> None:
    """Run in a process of its own, and kill it as an out-of-memory killer does."""
    pid = os.fork()
    if pid == 0:
        run(settings, folder, "linear-transformer,multi-head-attention", seconds=0.05, seeds=3)
        os._exit(0)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _alive(pid: str) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] not in "ZX"


def _kills(settings: Settings, folder: Path, count: int) -> None:
    clock = random.Random(0)
    path = folder / "out/records.jsonl"
    whole = b""
    for _ in range(count):
        _killed(settings, folder, clock.uniform(0.02, 0.5))
        time.sleep(0.1)
        started = (folder / "pids").read_text().split() if (folder / "pids").exists() else []
        assert not any(map(_alive, started)), "a row outlived the comparison"
        now = path.read_bytes() if path.exists() else b""
        assert now.startswith(whole), "a finished row was lost"
        whole = now[: now.rfind(b"\n") + 1]
    rows = run(settings, folder, "linear-transformer,multi-head-attention", seeds=3)
    assert len(rows) == 6
    assert len(set(map(records.key, rows))) == 6
    assert path.read_bytes().startswith(whole)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_row_dies_with_its_comparison(settings: Settings, tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        run(settings, tmp_path, "linear-transformer", seconds=60.0)
        os._exit(0)
    _wait(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().endswith("\n"))
    (row,) = (tmp_path / "pids").read_text().split()
    assert _alive(row)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    _wait(lambda: not _alive(row))


def _wait(until: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not until():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_kill_at_any_moment_loses_and_doubles_no_row(settings: Settings, tmp_path: Path) -> None:
    _kills(settings, tmp_path, 5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("part", range(8))
def test_many_kills(settings: Settings, tmp_path: Path, part: int) -> None:
    for round in range(10):
        folder = tmp_path / str(round)
        folder.mkdir()
        _kills(settings, folder, 5)


def test_ctrl_c_ends_the_row_too(settings: Settings, tmp_path: Path) -> None:
    def stop(at: compare.Progress) -> None:
        if at.phase == "training":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.run(
            settings, choose("linear-transformer"), tmp_path / "out",
            command=fake(tmp_path, 60.0), watch=stop,
        )  # fmt: skip
    (pid,) = (tmp_path / "pids").read_text().split()
    assert not _alive(pid)


def test_too_little_data_is_said_before_any_row(settings: Settings, tmp_path: Path) -> None:
    longer = Settings(**{**vars(settings), "length": 4096})
    with pytest.raises(LongspanError, match="too few for windows of 4096"):
        run(longer, tmp_path, "linear-transformer")


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("30s", Budget(seconds=30.0)),
        ("2m", Budget(seconds=120.0)),
        ("200_000tok", Budget(tokens=200_000)),
    ],
)
def test_budgets_are_read(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "2", "0s", "-1s", "2 weeks", "tok"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(LongspanError, match="is no budget"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"match": "size"}, "expected params, flops, state, time"),
        ({"match": "time", "budget": "9tok"}, "needs a budget in time"),
        ({"width": 30, "heads": 4}, "does not divide"),
        ({"length": 1}, "too small"),
    ],
)
def test_impossible_settings_are_refused(change: dict, message: str) -> None:
    with pytest.raises(LongspanError, match=message):
        Settings(**change)


def test_mechanisms_are_read() -> None:
    chosen = choose("s4, longformer(window=64, hubs=0),s4")
    assert chosen == [Spec("s4", {}), Spec("longformer", {"window": 64, "hubs": 0})]
    assert Spec("s4", {}) in choose("family:state-space")
    assert {show(spec.id).kind for spec in choose("all")} <= {"attention", "mixer", "memory"}
    core = [show(spec.id) for spec in choose("core")]
    assert all(refusal(card, allow_leaks=False) is None for card in core)
    assert len({card.family for card in core}) == len(core)


@pytest.mark.parametrize(
    "text", ["longformr", "longformer(window)", "longformer(64)", "a b", "family:x"]
)
def test_mechanisms_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(LongspanError):
        choose(text)


MATCHED = ["linear-transformer", "longformer", "reformer-lsh-causal", "s4", "transformer-xl"]


@pytest.mark.parametrize("id", MATCHED)
def test_parameters_are_matched_within_two_per_cent(id: str) -> None:
    from longspan.bench.decoder import decoder, parameters
    from longspan.bench.match import match

    settings = Settings(length=64, width=32, layers=1, heads=2)
    dense = parameters(decoder(Spec("multi-head-attention", {}), settings))
    sized = match(Spec(id, {}), settings)
    own = parameters(decoder(Spec(id, sized.arguments), settings, inner=sized.inner))
    assert abs(own - dense) <= 0.02 * dense


def test_flops_and_state_are_matched() -> None:
    from longspan.bench.decoder import carried_bytes, decoder, training_flops
    from longspan.bench.match import match

    dense, linear = Spec("multi-head-attention", {}), Spec("linear-transformer", {})
    settings = Settings(length=64, width=32, layers=1, heads=2, match="flops")
    target = training_flops(decoder(dense, settings), 64)
    sized = match(linear, settings)
    assert abs(training_flops(decoder(linear, settings, inner=sized.inner), 64) / target - 1) < 0.02

    settings = Settings(length=128, width=32, layers=1, heads=2, match="state")
    target = carried_bytes(decoder(dense, settings), 16)
    sized = match(Spec("longformer", {}), settings)
    own = decoder(Spec("longformer", sized.arguments), settings, inner=sized.inner)
    assert abs(carried_bytes(own, 128) / target - 1) <= 0.1
    assert "state not matched" in (match(linear, settings).unmatched or "")


def test_what_cannot_be_matched_says_so() -> None:
    from longspan.bench.match import match

    settings = Settings(length=64, width=32, layers=1, heads=2, match="flops")
    with pytest.raises(LongspanError, match=r"cannot be matched.*--match time"):
        match(Spec("reformer-lsh-causal", {}), settings)


def test_rows_read_the_same_windows_in_the_same_order(settings: Settings) -> None:
    """The same seed gives the same model and data, so the same figures."""
    from longspan.bench import measure
    from longspan.bench.decoder import decoder

    found = []
    for _ in range(2):
        torch.manual_seed(0)
        lm = decoder(Spec("linear-transformer", {}), settings)
        found.append(measure._language(lm, settings, 0, lambda *_: None)[0])
    assert found[0] == found[1]
    assert found[0]["tokens"] == 512
    assert found[0]["steps"] == 2


def test_a_mechanism_built_for_the_length_is_timed_without_a_step_beyond_it() -> None:
    from longspan.bench import measure
    from longspan.bench.decoder import decoder

    settings = Settings(length=16, width=16, heads=2, layers=1, budget="1s")
    spec = Spec("aft", {})
    speed, state, _ = measure._speed(decoder(spec, settings), spec, settings, lambda *_: None)
    assert [row["length"] for row in speed["prefill"]] == [16]
    assert [row["length"] for row in state] == [16]
    assert speed["step"] == []


def test_a_memory_is_read_in_segments_as_whole() -> None:
    """The logits of each segment are those that its state and its tokens give."""
    from longspan.bench.decoder import InSegments, decoder

    settings = Settings(length=64, width=32, layers=2, heads=2)
    torch.manual_seed(0)
    lm = decoder(Spec("transformer-xl", {}), settings).eval()
    assert isinstance(lm, InSegments)
    assert lm.segment == 16
    tokens = torch.randint(256, (2, 64), generator=torch.Generator().manual_seed(0))
    whole = lm(input_ids=tokens, labels=tokens)
    first = lm.model(input_ids=tokens[:, :16], use_cache=True)
    second = lm.model(input_ids=tokens[:, 16:32], past_key_values=first.past_key_values)
    torch.testing.assert_close(whole.logits[:, 16:32], second.logits)
    want = torch.nn.functional.cross_entropy(
        whole.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(whole.loss, want)


def test_positions_and_crossovers() -> None:
    from longspan.bench.measure import by_position, cross

    spans = by_position(torch.arange(255, dtype=torch.float64))
    assert [(s["from"], s["to"]) for s in spans] == [(0, 64), (64, 128), (128, 256)]
    assert spans[0]["bits_per_byte"] == 31.5
    assert cross([(256, 4.0), (1024, 0.25)]) == {"length": 512, "beyond": None}
    assert cross([(256, 0.5), (512, 2.0), (1024, 1.5)]) == {"length": None, "beyond": 1024}
    assert cross([(256, 0.5), (512, 0.2)]) == {"length": 256, "beyond": None}


@pytest.mark.parametrize(
    ("id", "how"),
    [("multi-head-attention", "one-hot values"), ("linear-transformer", "one-hot values"),
     ("s4", "Jacobian norms"), ("transformer-xl", "one-hot values")],
)  # fmt: skip
def test_pictures_show_causal_weights(id: str, how: str) -> None:
    from longspan.bench.decoder import InSegments, decoder
    from longspan.bench.pictures import picture

    torch.manual_seed(0)
    lm = decoder(Spec(id, {}), Settings(length=64, width=32, layers=2, heads=2)).eval()
    lm = lm.model if isinstance(lm, InSegments) else lm
    found = picture(lm, torch.arange(16)[None])
    assert found.how == how
    assert found.weights.shape == (16, 16)
    torch.testing.assert_close(found.weights.triu(1), torch.zeros(16, 16))
    torch.testing.assert_close(found.weights.sum(1), torch.ones(16))


def test_flops_are_counted_as_the_formulas_say() -> None:
    from longspan.testing.counting import flops

    q = torch.randn(1, 2, 64, 8)
    attend = torch.nn.functional.scaled_dot_product_attention
    full = 4 * 2 * 64 * 64 * 8
    assert flops(lambda: attend(q, q, q)) == full
    assert flops(lambda: attend(q, q, q, is_causal=True)) == full // 2
    x = torch.randn(3, 64)
    assert flops(lambda: torch.fft.rfft(x)) == 3 * 2.5 * 64 * 6


@pytest.mark.slow
def test_the_trainer_costs_less_than_five_per_cent_of_a_bare_loop(settings: Settings) -> None:
    from longspan.bench.decoder import decoder
    from longspan.bench.train import Progress, train

    model = decoder(Spec("multi-head-attention", {}), Settings(length=512))
    tokens = torch.randint(256, (2, 512), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def bare(steps: int) -> None:
        for _ in range(steps):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def trained(steps: int) -> None:
        progress = Progress(Budget(tokens=steps * 1024), 1024)
        train(model, lambda: batch, progress, rate=1e-3, seed=0, device="cpu")

    # In turns, and the least of each: a busy machine only ever adds. What setting up costs falls
    # out of the difference between few steps and many.
    least: dict[tuple[str, int], float] = {}
    for _ in range(7):
        for run in (bare, trained):
            for steps in (5, 35):
                start = time.process_time()
                run(steps)
                spent = time.process_time() - start
                least[run.__name__, steps] = min(spent, least.get((run.__name__, steps), spent))
    bare_step, trained_step = (least[n, 35] - least[n, 5] for n in ("bare", "trained"))
    assert trained_step < 1.05 * bare_step


def test_a_row_end_to_end_and_resumed(tmp_path: Path) -> None:
    """Two real rows by the command, then the same command again: nothing is measured twice."""
    text = tmp_path / "text"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 200)
    command = [
        "compare", "--data", str(text), "--length", "64",
        "--budget", "512tok", "--batch", "4", "--width", "32", "--layers", "1", "--heads", "2",
        "--mechanisms", "multi-head-attention,linear-transformer,reformer-lsh",
        "--no-certificate", "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    dense, linear, refused = records.read(tmp_path / "out")
    assert refused["status"] == "refused"
    for row in (dense, linear):
        assert row["status"] == "done"
        assert 4 < row["quality"]["bits_per_byte"] < 8.5
        assert (row["quality"]["steps"], row["quality"]["tokens"]) == (2, 512)
        assert 0 <= row["quality"]["recall"] <= 1
        assert row["speed"]["train_tokens_per_second"] > 0
        assert [p["length"] for p in row["speed"]["prefill"]] == [16, 32, 64, 128, 256]
        assert row["memory"]["peak_bytes"] > row["memory"]["increase_bytes"] > 0
        assert row["settings"]["data"]["sha256"]
        assert row["machine"]["cores"] >= 1
    sizes = {row["id"]: [s["bytes"] for s in row["memory"]["state"]] for row in (dense, linear)}
    assert sizes["multi-head-attention"][-1] > 10 * sizes["multi-head-attention"][0]
    assert len(set(sizes["linear-transformer"])) == 1
    assert linear["parameters"] == pytest.approx(dense["parameters"], rel=0.02)
    assert len(dense["attention"]["weights"]) == 64
    assert "reformer-lsh-causal" in first.stdout
    page = tmp_path / "out/report.html"
    assert str(page) in first.stdout
    assert page.stat().st_size > 1000

    written = (tmp_path / "out/records.jsonl").read_bytes()
    page.unlink()
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out/records.jsonl").read_bytes() == written
    assert page.exists()
    assert json.loads(written.splitlines()[0]) == dense
