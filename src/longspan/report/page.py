"""The report: one HTML file that needs no network, and is readable before its script runs."""

import html
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from longspan.report import summary
from longspan.report.attention import Picture, pictures
from longspan.report.plots import INK, Figure, Look, figures, looks
from longspan.report.recommendation import Recommendation, advise
from longspan.report.summary import Comparison, Row, columns, gather, part

_SHAPES = {
    "circle": "M6 1.5a4.5 4.5 0 1 0 .01 0z",
    "square": "M2 2h8v8H2z",
    "triangle-up": "M6 1l5 9H1z",
    "diamond": "M6 .5L11 6l-5 5.5L1 6z",
    "triangle-down": "M6 11L1 2h10z",
    "cross": "M4.2 1h3.6v3.2H11v3.6H7.8V11H4.2V7.8H1V4.2h3.2z",
    "x": "M3.2 1L6 3.8 8.8 1 11 3.2 8.2 6 11 8.8 8.8 11 6 8.2 3.2 11 1 8.8 3.8 6 1 3.2z",
    "star": "M6 .5l1.6 3.6 3.9.4-2.9 2.6.8 3.9L6 9l-3.4 2 .8-3.9L.5 4.5l3.9-.4z",
    "hexagon": "M3.3 1.3h5.4L11.4 6l-2.7 4.7H3.3L.6 6z",
}
_STROKES = {
    "solid": "",
    "dash": "7 4",
    "dot": "2 3",
    "dashdot": "7 3 2 3",
    "longdash": "11 4",
    "longdashdot": "11 3 2 3",
}
_RESULTS = {"pass": ("✓", "passes"), "fail": ("✕", "fails"), "skip": ("–", "skipped")}

_escape = html.escape


def write(records: list[dict[str, Any]], path: Path) -> Path:
    """Write the report of a comparison to `path`, whole or not at all.

    >>> write(records.read("runs/first"), Path("runs/first/report.html"))
    """
    path = Path(path)
    text = _page(gather(records))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _asset(name: str) -> str:
    return resources.files("longspan.report").joinpath("assets", name).read_text(encoding="utf-8")


def _page(comparison: Comparison) -> str:
    # 5 MB of script that nothing but a written report needs.
    from plotly.offline import get_plotlyjs

    advice = advise(comparison)
    key = looks(comparison)
    drawn = figures(comparison, advice.choice)
    shown = pictures(comparison)
    sections = [
        ("Summary", _summary(comparison, key, advice)),
        *([("Plots", _plots(key, drawn))] if drawn else []),
        *([("Attention", _attention(shown))] if shown else []),
        ("Certificates", _certificates(comparison)),
        ("Settings", _settings(comparison)),
    ]
    data = {
        "looks": [asdict(look) for look in key],
        "figures": [{"id": f.id, **f.drawing} for found in drawn.values() for f in found],
    }
    return Template(_asset("report.html")).substitute(
        title=_escape(_title(comparison)),
        nav="".join(f'<a href="#{name.lower()}">{name}</a>' for name, _ in sections),
        answer=_answer(advice),
        sections="\n".join(
            f'<section id="{name.lower()}">\n{body}\n</section>' for name, body in sections
        ),
        css=_asset("report.css"),
        data=_json(data),
        plotly=get_plotlyjs() if drawn else "",
        script=_asset("report.js"),
    )


def _json(data: object) -> str:
    """JSON that cannot close the script element it stands in."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=True)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _title(comparison: Comparison) -> str:
    many = len(comparison.rows)
    where = f" at {summary.count(comparison.length)} tokens" if comparison.length else ""
    return f"{many} mechanism{'' if many == 1 else 's'}{where}"


def _answer(advice: Recommendation) -> str:
    def block(title: str, lines: Sequence[str]) -> str:
        items = "".join(f"<li>{_escape(line)}</li>" for line in lines)
        return f"<div><h2>{title}</h2><ul>{items}</ul></div>" if lines else ""

    return (
        f'<p class="answer">{_escape(advice.text)}</p>\n<div class="because">'
        f"{block('Why', advice.reasons)}{block('Doubts', advice.doubts)}</div>"
    )


def _mark(look: Look | None, *, line: bool = False) -> str:
    """The symbol of a mechanism as it is in the plots, its dash behind it in the key."""
    if look is None:
        return '<span class="mark" aria-hidden="true"></span>'
    colour = "ink" if look.colour == INK else f"c{look.colour}"
    shape = f'<path d="{_SHAPES[look.symbol]}" fill="currentColor"/>'
    if not line:
        box, body = "0 0 12 12", shape
    else:
        stroke = _STROKES[look.dash]
        box = "0 0 36 12"
        body = (
            f'<path d="M0 6h36" stroke="currentColor" stroke-width="2" '
            f'stroke-dasharray="{stroke}"/><g transform="translate(12)">{shape}</g>'
        )
    return f'<svg class="mark {colour}" viewBox="{box}" aria-hidden="true">{body}</svg>'


def _table(header: Sequence[str], body: Iterable[Sequence[str]], name: str) -> str:
    """A plain table of escaped text in a box that scrolls by itself."""
    head = "".join(f'<th scope="col">{_escape(cell)}</th>' for cell in header)
    lines = "".join(
        f'<tr><th scope="row">{_escape(first)}</th>'
        + "".join(f"<td>{_escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in body
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_escape(name)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def _summary(comparison: Comparison, key: Sequence[Look], advice: Recommendation) -> str:
    if not comparison.finished:
        return f"<h2>Summary</h2><p>No mechanism finished.</p>{_unfinished(comparison)}"
    shown = columns(comparison)
    look_of = {label: look for look in key for label in look.members}
    quality = any(column.title == "Quality" for column in shown)

    def heading(title: str, unit: str, first: str, sort: str) -> str:
        return (
            f'<th scope="col"{sort}><button type="button" data-first="{first}">'
            f"<span>{_escape(title)}</span><small>{_escape(unit)}</small></button></th>"
        )

    head = heading("Mechanism", "family", "ascending", "")
    for column in shown:
        first = "descending" if column.better == "high" else "ascending"
        sorted_ = ' aria-sort="ascending"' if quality and column.title == "Quality" else ""
        head += heading(column.title, column.unit, first, sorted_)
    head += heading("Laws", "passed", "descending", "")

    lines = []
    for row in comparison.ranked:
        if not row.done:
            continue
        cells = [_name(row, look_of.get(row.label), chosen=row.label == advice.choice)]
        for column in shown:
            value = column.values.get(row.label)
            best = ' class="best"' if column.is_best(row) else ""
            data = "" if value is None else f' data-value="{value!r}"'
            text = f"<span>{_escape(column.text(row))}</span>"
            if column.title == "Quality" and row.spread:
                text += f"<small>spread {summary.bits(row.spread)}</small>"
            cells.append(f"<td{best}{data}>{text}</td>")
        cells.append(_laws(row))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    note = "Sort by any heading. The best of each column is underlined."
    seeds = {len(row.done) for row in comparison.finished}
    if max(seeds) > 1:
        note += " Figures are means over the seeds; spread is the largest less the smallest."
    return (
        f'<h2>Summary</h2><p class="note">{note}</p>'
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Summary">'
        f'<table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{_unfinished(comparison)}"
    )


def _name(row: Row, look: Look | None, *, chosen: bool) -> str:
    name = _escape(str(row.card.get("name") or row.label))
    label = _escape(row.label)
    link = str(row.card.get("link") or "")
    # What a record calls a link is followed only where it is one.
    if link.startswith(("https://", "http://")):
        label = f'<a href="{_escape(link)}" title="{name}" rel="noreferrer">{label}</a>'
    recommended = ' · <b class="chosen">recommended</b>' if chosen else ""
    return (
        f'<th scope="row" data-value="{_escape(row.label)}"><div>{_mark(look)}<span>{label}'
        f"<small>{_escape(row.family)}{recommended}</small></span></div></th>"
    )


def _laws(row: Row) -> str:
    if not row.laws:
        return "<td><span>–</span></td>"
    passed, failed = len(row.laws_with("pass")), len(row.laws_with("fail"))
    bad = f'<small class="bad">✕ {failed} failed</small>' if failed else ""
    leak = "" if row.causality in (None, "strict") else '<small class="bad">sees ahead</small>'
    value = passed / len(row.laws)
    return f'<td data-value="{value!r}"><span>{passed}/{len(row.laws)}</span>{bad}{leak}</td>'


def _unfinished(comparison: Comparison) -> str:
    rows = [row for row in comparison.rows if not row.done]
    if not rows:
        return ""
    items = "".join(
        f"<dt>{_escape(row.label)} <span>{row.status}</span></dt><dd>{_escape(row.reason)}</dd>"
        for row in rows
    )
    return f'<h3>Not measured</h3><dl class="unfinished">{items}</dl>'


def _plots(key: Sequence[Look], drawn: Mapping[str, Sequence[Figure]]) -> str:
    chips = "".join(
        f'<button type="button" aria-pressed="false" data-look="{i}">{_mark(look, line=True)}'
        f"<span>{_escape(look.label)}"
        + (f"<small>{len(look.members)}</small>" if len(look.members) > 1 else "")
        + "</span></button>"
        for i, look in enumerate(key)
    )
    groups = "".join(
        f'<h3>{_escape(title)}</h3><div class="grid">{"".join(map(_figure, found))}</div>'
        for title, found in drawn.items()
    )
    return (
        '<h2>Plots</h2><p class="note">Press a name to bring it out in every plot; press it again '
        "to see all.</p>"
        f'<div class="key" role="group" aria-label="Key: bring out a mechanism">{chips}</div>'
        f"{groups}"
    )


def _figure(figure: Figure) -> str:
    label = f"{figure.title}. {figure.takeaway} The figures are in the table below."
    return (
        f"<figure{' class=wide' if figure.wide else ''}><figcaption><b>{_escape(figure.title)}</b>"
        f"<span>{_escape(figure.takeaway)}</span></figcaption>"
        f'<div class="plot" id="plot-{figure.id}" role="img" aria-label="{_escape(label)}"></div>'
        f"<details><summary>Figures of this plot</summary>"
        f"{_table(figure.header, figure.body, figure.title)}</details></figure>"
    )


def _attention(shown: Sequence[Picture]) -> str:
    def picture(p: Picture) -> str:
        return (
            f'<figure><canvas role="img" aria-label="{_escape(p.describe())}" width="{p.columns}" '
            f'height="{p.rows}" data-cells="{p.cells}"></canvas>'
            f"<figcaption><b>{_escape(p.label)}</b><span>{_escape(p.how)}</span></figcaption>"
            "</figure>"
        )

    widest = max(shown, key=lambda p: p.distance / p.length)
    signed = any(p.negative for p in shown)
    body = [
        [
            p.label,
            p.how,
            str(p.length),
            summary.figures(p.distance),
            summary.share(p.near),
            summary.share(p.first),
            summary.share(p.negative),
            summary.figures(p.scale),
        ]
        for p in shown
    ]
    header = [
        "Mechanism",
        "How",
        "Tokens",
        "Mean distance",
        "Nearest eighth",
        "First token",
        "Negative",
        "Darkest cell",
    ]
    return (
        "<h2>Who attends to whom</h2>"
        f'<p class="takeaway">{_escape(widest.label)} looks furthest: '
        f"{summary.figures(widest.distance)} tokens back on average, over {widest.length}.</p>"
        '<p class="note">Effective weights, softmax or not: how much of each token (column) '
        "reaches each output (row), the first at the top left. Each picture has a scale of its "
        "own, by square root."
        + (" Negative weights are in the second colour." if signed else "")
        + f'</p><div class="pictures">{"".join(map(picture, shown))}</div>'
        "<details><summary>Figures of these pictures</summary>"
        f"{_table(header, body, 'Attention')}</details>"
    )


def _certificates(comparison: Comparison) -> str:
    rows = [row for row in comparison.ranked if row.laws]
    if not rows:
        return "<h2>Certificates</h2><p>No law was checked: nothing here shows them right.</p>"
    laws = list(dict.fromkeys(law for row in rows for law in row.laws))
    head = "".join(f'<th scope="col"><span>{_escape(_words(law))}</span></th>' for law in laws)
    lines = "".join(
        f'<tr><th scope="row">{_escape(row.label)}</th>'
        + "".join(_verdict(row.laws.get(law)) for law in laws)
        + "</tr>"
        for row in rows
    )
    failed = [row.label for row in rows if row.laws_with("fail")]
    takeaway = (
        f"{summary.listing(failed)} {'fails' if len(failed) == 1 else 'fail'} a law: "
        "do not trust the figures of those rows."
        if failed
        else f"No law fails for any of the {len(rows)} mechanisms that were checked."
        if len(rows) > 1
        else "No law fails for the one mechanism that was checked."
    )
    reasons = "".join(
        f"<dt>{_escape(row.label)} <span>{_RESULTS[result][1]} {_escape(_words(law))}</span></dt>"
        f"<dd>{_escape(reason or 'no reason was recorded')}</dd>"
        for row in rows
        for law, (result, reason) in row.laws.items()
        if result != "pass"
    )
    why = f"<h3>What failed or was skipped</h3><dl class=unfinished>{reasons}</dl>"
    return (
        f'<h2>Certificates</h2><p class="takeaway">{_escape(takeaway)}</p>'
        '<p class="note">✓ passes &#8195; ✕ fails &#8195; – skipped, with its reason below</p>'
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Certificates">'
        f'<table class="laws"><thead><tr><th scope="col">Mechanism</th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>{why if reasons else ''}"
    )


def _words(law: str) -> str:
    return law.replace("_", " ")


def _verdict(found: tuple[str, str] | None) -> str:
    if found is None:
        return '<td><span class="unseen">does not apply</span></td>'
    sign, word = _RESULTS[found[0]]
    shown = f'<span aria-hidden="true">{sign}</span><span class="unseen">{word}</span>'
    return f'<td class="{found[0]}">{shown}</td>'


def _settings(comparison: Comparison) -> str:
    data = [d for d in comparison.distinct("settings", "data") if isinstance(d, Mapping)]
    corpora = [
        "; ".join(
            _escape(str(value))
            for value in (
                d.get("name"),
                d.get("source"),
                _bytes(d.get("bytes"), "train", "to train on"),
                _bytes(d.get("bytes"), "valid", "held out"),
            )
            if value
        )
        for d in data
    ]
    hashes = [f"<code>{_escape(str(d['sha256']))}</code>" for d in data if d.get("sha256")]
    machines = [
        "; ".join(
            _escape(f"{word}{m[name]}{after}")
            for name, word, after in (
                ("name", "", ""),
                ("cpu", "", ""),
                ("cores", "", " cores"),
                ("device", "on ", ""),
                ("torch", "torch ", ""),
            )
            if m.get(name) is not None
        )
        for m in comparison.distinct("machine")
        if isinstance(m, Mapping)
    ]

    def plain(*path: str) -> list[str]:
        return [_escape(str(value)) for value in comparison.distinct(*path)]

    lengths = summary.numbers(comparison.distinct("settings", "length"))
    spent = sum(summary.numbers(part(r, "seconds") for r in comparison.records))
    entries = [
        ("Length", [f"{summary.count(n)} tokens" for n in lengths]),
        ("Matched by", plain("settings", "match")),
        ("Parameters", [_range(comparison)]),
        ("Budget a run", plain("settings", "budget")),
        ("Batch", plain("settings", "batch")),
        ("Seeds", [", ".join(plain("seed"))] if plain("seed") else []),
        ("Data", corpora),
        ("Data SHA-256", hashes),
        ("Machine", machines),
        ("longspan", plain("version")),
        ("Commit", [f"<code>{c}</code>" for c in plain("commit")]),
        ("Runs", [f"{len(comparison.records)}, {summary.seconds(spent)} in all"] if spent else []),
        ("To run it again", [f"<code>{_escape(_command(comparison))}</code>"]),
    ]
    items = "".join(
        f"<div><dt>{title}</dt>{''.join(f'<dd>{value}</dd>' for value in values)}</div>"
        for title, values in entries
        if any(values)
    )
    return f'<h2>Settings and provenance</h2><dl class="settings">{items}</dl>'


def _bytes(splits: Any, name: str, what: str) -> str:
    value = summary.number(splits.get(name)) if isinstance(splits, Mapping) else None
    return "" if value is None else f"{summary.size(value)} {what}"


def _range(comparison: Comparison) -> str:
    counts = summary.numbers(comparison.distinct("parameters"))
    if not counts:
        return ""
    low, high = (summary.count(end(counts)) for end in (min, max))
    return low if low == high else f"{low} to {high}"


def _command(comparison: Comparison) -> str:
    """The call of `longspan compare` that the records' settings describe."""
    words = ["longspan", "compare"]
    for option, path in (
        ("--data", ("settings", "data", "name")),
        ("--length", ("settings", "length")),
        ("--match", ("settings", "match")),
        ("--budget", ("settings", "budget")),
    ):
        if found := comparison.distinct(*path):
            words += [option, str(found[0])]
    if comparison.rows:
        words += ["--mechanisms", ",".join(row.label for row in comparison.rows)]
    if seeds := comparison.distinct("seed"):
        words += ["--seeds", str(len(seeds))]
    return shlex.join(words)
