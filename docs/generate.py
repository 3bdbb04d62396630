"""Writes what the cards know into the README's table and the mechanism pages.

`make docs` writes; `--check` says what is stale and exits with 1.
"""

import sys
from inspect import cleandoc
from pathlib import Path

from longspan.card import Card
from longspan.registry import builder, cards, options
from longspan.testing import laws_for

ROOT = Path(__file__).resolve().parent.parent
START, END = "<!-- mechanisms: made by `make docs` -->", "<!-- end of mechanisms -->"


def table() -> str:
    """The README's table of mechanisms."""
    rows = [
        "| id | kind | family | modes | time | state | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in cards().values():
        page = f"[`{card.id}`](docs/mechanisms/{card.id}.md)"
        modes = ", ".join(sorted(card.modes))
        cost = f"`{card.time}` | `{card.memory}`"
        rows.append(
            f"| {page} | {card.kind} | {card.family} | {modes} | {cost} "
            f"| [{card.cite}]({card.link}) |"
        )
    return "\n".join(rows)


def page(card: Card) -> str:
    """One mechanism's page."""
    lines = [
        f"# {card.name}",
        "",
        card.what,
        "",
        f"*{card.paper}*, [{card.cite}]({card.link}).",
        "",
        f"- id `{card.id}`, kind {card.kind}, family {card.family}",
        f"- modes: {', '.join(sorted(card.modes))}; causality: {card.causality}",
        f"- time `{card.time}`, state `{card.memory}`",
        "",
        "## What it computes",
        "",
        "```text",
        cleandoc(builder(card.id).__doc__ or ""),
        "```",
        "",
        "## Arguments",
        "",
    ]
    for name, parameter in options(card.id).items():
        default = "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"
        if callable(parameter.default) and parameter.default is not parameter.empty:
            default = f"`{parameter.default.__name__}`"
        lines.append(f"- `{name}`: {default}")
    lines += ["", "## Laws", "", f"`longspan check {card.id}` checks them now.", ""]
    for law in laws_for(card):
        reason = card.skips.get(law)
        lines.append(f"- `{law}`" + (f": does not hold, {reason}" if reason else ""))
    return "\n".join(lines) + "\n"


def generated() -> dict[Path, str]:
    """Every generated file with its content."""
    readme = ROOT / "README.md"
    before, rest = readme.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    pages = {ROOT / "docs" / "mechanisms" / f"{c.id}.md": page(c) for c in cards().values()}
    return {readme: f"{before}{START}\n{table()}\n{END}{after}", **pages}


def main() -> None:
    stale = []
    for path, content in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != content:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.parent.mkdir(exist_ok=True)
                path.write_text(content, encoding="utf-8")
    if stale and "--check" in sys.argv:
        sys.exit(f"stale, run `make docs`: {', '.join(map(str, stale))}")


if __name__ == "__main__":
    main()
