"""The report: what it recommends, what it says of itself, and that a browser opens it."""

import io
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from longspan import report
from longspan.report import page
from longspan.report.attention import pictures
from longspan.report.plots import figures, looks
from longspan.report.summary import columns, fit, gather

Records = list[dict[str, Any]]
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
DENSE = "multi-head-attention"
CHROMIUM = Path("/usr/bin/chromium")


def record(
    id: str,
    *,
    seed: int = 0,
    family: str = "kernel",
    bits: float = 2.4,
    speed: float = 20_000.0,
    exponent: float = 1.0,
    state: int = 40_000,
    recall: float = 0.9,
    causality: str = "strict",
    fails: tuple[str, ...] = (),
    signed: bool = False,
    **more: Any,
) -> dict[str, Any]:
    """A whole record, of the form that `longspan compare` appends."""
    grows = id == DENSE
    span = 256
    rate = random.Random(id)
    weights = [
        [
            0.0
            if j > i
            else (math.cos(j) if signed else 1.0) / (1 + abs(i - j)) ** (0.5 + bits % 1)
            for j in range(48)
        ]
        for i in range(48)
    ]
    laws = (
        "streaming_equals_whole",
        "no_peeking",
        "gradients_reach_all",
        "padding_changes_nothing",
    )
    return {
        "id": id,
        "seed": seed,
        "status": "done",
        "reason": None,
        "card": {
            "id": id,
            "name": id.replace("-", " ").title(),
            "family": family,
            "link": "https://arxiv.org/abs/1706.03762",
            "causality": causality,
        },
        "arguments": {},
        "parameters": 1_200_000,
        "flops_per_token": 7e6,
        "settings": {
            "length": 2048,
            "match": "params",
            "budget": "2m",
            "batch": 2,
            "digest": "a1",
            "data": {
                "name": "stdlib",
                "sha256": "9f" * 32,
                "source": "the Python standard library",
                "bytes": {"train": 12_000_000, "valid": 600_000},
            },
        },
        "commit": "96490f3",
        "machine": {
            "name": "bench-1",
            "cpu": "AMD EPYC 9B14",
            "cores": 2,
            "torch": "2.13.0",
            "device": "cpu",
        },
        "version": "0.1.0",
        "seconds": 184.0,
        "quality": {
            "bits_per_byte": bits,
            "by_position": [
                {"from": a, "to": a + span, "bits_per_byte": bits + 0.8 / (1 + a / 200)}
                for a in range(0, 2048, span)
            ],
            "recall": recall,
            "steps": 700,
            "tokens": 2_800_000,
            "curve": [
                {"tokens": n * 280_000, "bits_per_byte": bits + 2.5 / n**1.2} for n in range(1, 11)
            ],
        },
        "speed": {
            "train_tokens_per_second": speed,
            "prefill": [
                {
                    "length": n,
                    "seconds": 0.4 / speed * n**exponent * 2048 ** (1 - exponent)
                    * rate.uniform(0.98, 1.02),
                    "tokens_per_second": 1.0,
                }
                for n in LENGTHS
            ],
            "step": [{"length": n, "seconds": 1e-3 * (1 + grows * n / 2000)} for n in LENGTHS],
        },
        "memory": {
            "peak_bytes": int(6e8 + 4e4 * bits * state**0.6),
            "state": [{"length": n, "bytes": n * 2048 if grows else state} for n in LENGTHS],
        },
        "crossover": {"length": None if grows else 1240, "beyond": None},
        "attention": {"weights": weights, "how": "Jacobian norms" if signed else "one-hot values"},
        "certificate": [
            {
                "law": law,
                "result": "fail" if law in fails else "pass",
                "reason": "differs by 0.31" if law in fails else None,
            }
            for law in laws
        ],
        **more,
    }  # fmt: skip


def stopped(id: str, status: str, reason: str) -> dict[str, Any]:
    """A row that has no figures, with only what is known before it starts."""
    whole = record(id)
    known = {name: whole[name] for name in ("id", "seed", "card", "arguments", "settings")}
    return {**known, "status": status, "reason": reason}


def six() -> Records:
    return [
        record(DENSE, family="dense", bits=2.301, speed=14_000.0, exponent=1.97),
        record("longformer", family="sparse-pattern", bits=2.318, speed=19_500.0, exponent=1.04),
        record(
            "linear-transformer", bits=2.512, speed=31_000.0, state=66_000, recall=0.35, signed=True
        ),
        record("s4", family="state-space", bits=2.44, speed=24_000.0, state=16_000, recall=0.2),
        stopped("reformer", "refused", "'reformer' can see the future: pass --allow-leaks."),
        stopped("luna", "failed", "out of memory <script>alert(1)</script> at 16,384 tokens"),
    ]


def fifty() -> Records:
    chance = random.Random(0)
    families = ("kernel", "low-rank", "sparse-pattern", "sparse-content", "state-space",
                "convolution", "recurrent-memory", "hierarchical", "latent")  # fmt: skip
    made = [record(DENSE, family="dense", bits=2.3, speed=14_000.0, exponent=1.97)]
    for i in range(49):
        made.append(
            record(
                f"mechanism-{i:02}",
                family=families[i % len(families)],
                bits=2.3 + abs(chance.gauss(0, 0.2)),
                speed=chance.uniform(6_000, 40_000),
                exponent=chance.uniform(0.95, 1.4),
                state=int(10 ** chance.uniform(3, 6.3)),
                recall=chance.random(),
                fails=("no_peeking",) if i % 17 == 4 else (),
            )
        )
    return made


def test_recommends_the_cheapest_of_those_that_tie() -> None:
    advice = report.recommend(six())
    assert advice.choice == "longformer"
    assert "2.318 bits per byte" in advice.text
    assert "1.4× as fast as dense" in advice.text
    assert "839× less state after 16k tokens" in advice.text
    assert any("L^1.97" in reason for reason in advice.reasons)


def doubts(records: Records) -> str:
    return " ".join(report.recommend(records).doubts)


def test_doubts_name_what_limits_the_comparison() -> None:
    said = doubts(six())
    for expected in (
        "cannot be told from longformer",
        "One seed",
        "Small budget (2m a run): the least trained saw 2.33 tokens a parameter",
        "reformer was refused",
        "luna failed",
        "CPU only (AMD EPYC 9B14) and at 2,048 tokens",
    ):
        assert expected in said


def test_a_wide_spread_makes_a_tie_of_a_difference() -> None:
    def runs(spread: float) -> Records:
        return [
            record(name, seed=seed, bits=bits + spread * seed, speed=speed)
            for name, bits, speed in (("better", 2.0, 9_000.0), ("faster", 2.2, 30_000.0))
            for seed in (0, 1)
        ]

    assert report.recommend(runs(0.0)).choice == "better"
    assert report.recommend(runs(0.3)).choice == "faster"
    assert "Two seeds" in doubts(runs(0.3))


@pytest.mark.parametrize(
    ("flaw", "said"),
    [
        ({"fails": ("no_peeking",)}, "it fails no_peeking"),
        ({"causality": "selection"}, "its causality is selection"),
    ],
)
def test_the_unsound_is_passed_over_aloud(flaw: dict[str, Any], said: str) -> None:
    records = [record("sound", bits=2.4), record("flawed", bits=2.0, speed=90_000.0, **flaw)]
    advice = report.recommend(records)
    assert advice.choice == "sound"
    assert f"flawed scored better (2.000) and was passed over: {said}." in advice.doubts


def test_the_unsound_is_recommended_only_with_a_warning() -> None:
    records = [record("a", bits=2.0, fails=("no_peeking",)), record("b", causality="selection")]
    advice = report.recommend(records)
    assert advice.choice == "a"
    assert "is not: see below" in advice.text
    assert any(doubt.startswith("a fails no_peeking") for doubt in advice.doubts)
    late = [record("a", causality="selection"), record("b", causality="selection", bits=2.6)]
    assert "can see the future" in doubts(late)


def test_recall_context_and_learning_are_doubted() -> None:
    poor = record("poor", bits=2.0, recall=0.1)
    flat = [{"from": a, "to": a + 9, "bits_per_byte": 2.0} for a in range(0, 90, 9)]
    falling = [{"tokens": n, "bits_per_byte": 5.0 - n / 5} for n in range(1, 9)]
    poor["quality"] |= {"by_position": flat, "curve": falling}
    said = doubts([poor, record("good", recall=0.9)])
    assert "Recall: poor finds 10 %" in said
    assert "good 90 %" in said
    assert "little use of a long context" in said
    assert "still improving when its budget ended" in said


def test_unlike_runs_are_not_compared_in_silence() -> None:
    other = record("other", commit="0000000")
    other["settings"] = {**other["settings"], "length": 4096, "budget": "9m"}
    other["machine"] = {**other["machine"], "cpu": "another"}
    said = doubts([record("one"), other])
    for what in ("training lengths", "budgets", "versions of the code", "different machines"):
        assert what in said


def test_too_few_rows_are_no_recommendation() -> None:
    assert report.recommend([]).text.startswith("There are no records")
    alone = report.recommend([record("longformer", bits=2.318)])
    assert alone.choice is None
    assert "Only longformer finished, at 2.318" in alone.text
    none = report.recommend(six()[4:])
    assert none.choice is None
    assert "none of 2 rows finished" in none.text
    assert any("out of memory" in reason for reason in none.reasons)


def test_dense_wins_where_nothing_comes_near() -> None:
    records = [record(DENSE, bits=2.0), record("s4", bits=2.6)]
    assert report.recommend(records).text.startswith("Stay with dense attention at 2,048 tokens")


def test_the_exponent_is_fitted_to_the_longer_half() -> None:
    points = [(float(n), 5.0) for n in (1, 2, 4, 8)] + [
        (float(n), n**2.0) for n in (16, 32, 64, 128)
    ]
    found = fit(points)
    assert found is not None
    assert found.exponent == pytest.approx(2.0)
    assert found.points == 4
    assert str(found) == "L^2.00 (R² 1.000, 4 points)"
    assert str(fit(points[-2:])) == "L^2.00 (2 points only)"
    assert fit(points[:1]) is None
    assert fit([(1.0, 5.0), (2.0, 9.0), (4.0, 2.0), (8.0, 6.0), (16.0, 5.5)]) is None  # noise


def test_seeds_are_averaged_and_reruns_replace() -> None:
    runs = [
        record("a", seed=0, bits=9.0),
        record("a", seed=0, bits=2.0),
        record("a", seed=1, bits=3.0),
    ]
    (row,) = gather(runs).rows
    assert row.bits == 2.5
    assert row.spread == 1.0
    variants = [record("a", arguments={"window": w}) for w in (64, 128)]
    assert [row.label for row in gather(variants).rows] == ["a(window=64)", "a(window=128)"]


def test_the_frontier_holds_what_nothing_dominates() -> None:
    comparison = gather(six())
    drawn = {f.id: f for group in figures(comparison, None).values() for f in group}
    on = {line[0]: line[-1] for line in drawn["quality-state"].body}
    assert on == {DENSE: "yes", "longformer": "yes", "s4": "yes", "linear-transformer": "no"}
    curve = drawn["quality-state"].drawing["frontier"]
    assert curve["x"] == sorted(curve["x"])
    assert curve["y"] == sorted(curve["y"], reverse=True)
    assert curve["shape"] == "hv"
    assert drawn["quality-training"].drawing["frontier"]["shape"] == "vh"


@pytest.mark.parametrize("records", [six(), fifty()], ids=["six", "fifty"])
def test_no_two_looks_are_alike(records: Records) -> None:
    key = looks(gather(records))
    assert len({(look.colour, look.symbol) for look in key}) == len(key)
    members = [label for look in key for label in look.members]
    assert sorted(members) == sorted(row.label for row in gather(records).finished)
    assert len(key) < 12
    assert len(members) <= 12 or any(len(k.members) > 1 for k in key)


def test_pictures_take_any_sign_and_size() -> None:
    wide = record("wide")
    wide["attention"]["weights"] = [[-1.0] * 300 for _ in range(300)]
    broken = record("broken", attention={"weights": [[1.0], [1.0, 2.0]], "how": None})
    (picture,) = pictures(gather([wide, broken, record("none", attention=None)]))
    assert (picture.rows, picture.columns, picture.length) == (96, 96, 300)
    assert picture.negative == 1.0
    assert picture.scale == 1.0


def without(record: dict[str, Any], name: str, value: object) -> dict[str, Any]:
    left = {key: part for key, part in record.items() if key != name}
    return left if value == "absent" else {**left, name: value}


@pytest.mark.parametrize("value", [None, "absent", float("nan")], ids=repr)
def test_any_part_may_be_missing(tmp_path: Path, value: object) -> None:
    """A row lacks its figures in as many ways as there are ways to fail."""
    whole = record("b")
    parts = [without(whole, name, value) for name in whole if name not in ("id", "status")]
    for name in ("card", "settings", "quality", "speed", "memory", "crossover", "attention"):
        parts += [{**whole, name: without(whole[name], key, value)} for key in whole[name]]
    for lacking in parts:
        records = [record("a"), lacking, record(DENSE, bits=2.2)]
        assert report.recommend(records).doubts
        assert report.table(records).row_count == 3
    # All at once, each under a name of its own: one report holds them all.
    records = [{**lacking, "id": f"row-{i}"} for i, lacking in enumerate(parts)]
    text = report.write(records, tmp_path / "report.html").read_text()
    assert "NaN" not in data_of(text)
    report.write(
        [{"id": "a", "status": "done"}, {"id": "b", "status": "failed"}], tmp_path / "b.html"
    )


def data_of(text: str) -> str:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    return found[1]


def test_nothing_in_a_record_becomes_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&\"'"
    whole = record(evil, family=evil, commit=evil, version=evil, reason=evil)
    whole["card"] |= {"name": evil, "link": "javascript:alert(3)", "cite": evil}
    whole["settings"]["data"] = dict.fromkeys(("name", "sha256", "source"), evil)
    whole["machine"] = dict.fromkeys(("name", "cpu", "torch", "device"), evil)
    whole["attention"]["how"] = evil
    whole["certificate"] = [{"law": evil, "result": "fail", "reason": evil}]
    records = [whole, record("b"), stopped(evil + "c", "failed", evil)]
    text = report.write(records, tmp_path / "report.html").read_text()
    assert len(re.findall("<script[ >]", without_plotly(text))) == 3
    assert "<img" not in without_plotly(text)
    assert "javascript:" not in without_plotly(text)
    assert evil in {s["of"] for s in json.loads(data_of(text))["figures"][0]["series"]}
    Console(file=io.StringIO(), width=300).print(report.table(records))


def without_plotly(text: str) -> str:
    script = text.index("<script>/**")
    return text[: script + 8] + text[text.index("</script>", script) :]


def test_the_report_is_whole_and_needs_no_network(tmp_path: Path) -> None:
    path = report.write(six(), tmp_path / "new" / "report.html")
    text = path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert text.count("plotly.js v") == 1
    assert "default-src 'none'" in text
    assert not re.search(r'<(?:script|img|iframe)[^>]*\bsrc=|<link[^>]*href="(?!data:)', text)
    assert text.index('class="answer"') < text.index('id="summary"') < text.index('id="plots"')
    assert text.index('id="plots"') < text.index('id="certificates"') < text.index('id="settings"')
    for figure in re.findall(r"<figure.*?</figure>", without_plotly(text), re.S):
        assert 'role="img" aria-label="' in figure
    for shown in ("9f" * 32, "96490f3", "AMD EPYC 9B14", "--budget 2m"):
        assert shown in text


def test_a_failed_write_leaves_the_old_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(page.Path, "replace", full)
    with pytest.raises(OSError, match="full"):
        report.write([], path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_table_says_what_the_report_says(capsys: pytest.CaptureFixture[str]) -> None:
    Console(width=200).print(report.table(six()))
    shown = capsys.readouterr().out
    for column in columns(gather(six())):
        assert column.title in shown
    assert shown.index(DENSE) < shown.index("longformer") < shown.index("linear-transformer")
    assert "luna failed: out of memory <script>" in shown


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2.2."""

    def luminance(colour: str) -> float:
        channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_every_colour_is_legible_on_its_paper() -> None:
    css = (Path(page.__file__).parent / "assets" / "report.css").read_text()
    pairs = {
        name: (light, dark)
        for name, light, dark in re.findall(r"--([\w]+): light-dark\((#\w{6}), (#\w{6})\)", css)
    }
    names = ("ink", "muted", "accent", "bad", *(f"c{i}" for i in range(7)))
    for mode in (0, 1):
        for name in names:
            assert contrast(pairs[name][mode], pairs["paper"][mode]) >= 4.5, (name, mode)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"no Chromium at {CHROMIUM}")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=flags)
        yield opened
        opened.close()


def visit(browser: Any, path: Path, **context: Any) -> tuple[Any, list[str]]:
    """The page, and whatever it complained of or asked the network for."""
    tab = browser.new_context(**context).new_page()
    heard: list[str] = []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    local = ("file:", "data:", "blob:")
    tab.on("request", lambda r: None if r.url.startswith(local) else heard.append(r.url))
    tab.goto(path.as_uri())
    return tab, heard


@pytest.mark.parametrize(
    ("records", "width"),
    [(fifty(), 390), (fifty(), 1280), (six()[:4], 390), ([], 390)],
    ids=["fifty, phone", "fifty, desktop", "four, phone", "none, phone"],
)
def test_a_browser_opens_it(browser: Any, tmp_path: Path, records: Records, width: int) -> None:
    path = report.write(records, tmp_path / "report.html")
    tab, heard = visit(browser, path, viewport={"width": width, "height": 850})
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    plots = tab.locator(".plot").count()
    assert tab.locator(".plot.js-plotly-plot").count() == plots == (8 if records else 0)
    assert heard == []
    tab.context.close()


def test_a_browser_sorts_picks_out_and_darkens(browser: Any, tmp_path: Path) -> None:
    path = report.write(six(), tmp_path / "report.html")
    viewport = {"width": 1280, "height": 850}
    tab, heard = visit(browser, path, viewport=viewport, color_scheme="light")

    def order() -> list[str]:
        return tab.locator("table.sortable tbody th").evaluate_all(
            "h => h.map(x => x.dataset.value)"
        )

    assert order()[0] == DENSE
    heading = tab.locator("table.sortable thead th", has_text="Training")
    heading.locator("button").focus()
    tab.keyboard.press("Enter")
    assert order()[0] == "linear-transformer"
    assert heading.get_attribute("aria-sort") == "descending"
    tab.keyboard.press("Space")
    assert order()[0] == DENSE
    assert heading.get_attribute("aria-sort") == "ascending"
    tab.locator("table.sortable thead th", has_text="Beats").locator("button").click()
    assert order()[-1] == DENSE, "what has no figure comes last"

    faint = "document.querySelectorAll('#plot-prefill .trace[style*=\"opacity: 0.12\"]').length"
    assert tab.evaluate(faint) == 0
    tab.locator(".key button", has_text="s4").press("Enter")
    assert tab.evaluate(faint) == 3
    assert tab.locator(".key button[aria-pressed=true]").inner_text() == "s4"

    ink = "getComputedStyle(document.querySelector('#plot-prefill .annotation-text')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    light = tab.evaluate(f"[{ink}, {paper}]")
    tab.locator("#theme").press("Enter")
    dark = tab.evaluate(f"[{ink}, {paper}]")
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    tab.locator("#theme").press("Enter")
    assert tab.evaluate(f"[{ink}, {paper}]") == light
    assert heard == []
    tab.context.close()
