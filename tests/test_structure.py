"""The shape of the code: imports point one way, generated pages are fresh, nothing runs on load."""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "longspan"

# A layer may import itself, the layers before it, and what serves all.
LAYERS = [
    {"engines"},
    {"nn"},
    {"inference"},
    {"mechanisms"},
    {"testing"},
    {"models", "hub"},
    {"retrieval"},
    {"training", "convert", "data", "bench"},
    {"report", "cli", "__main__"},
]
SERVES_ALL = {"card", "registry", "shapes", "errors", "__init__"}
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
MODULES = sorted(SOURCE.rglob("*.py"))
MECHANISMS = sorted((SOURCE / "mechanisms").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Second components of `longspan.x…` imports at any depth."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = node.module.split(".")
            if parts[0] == "longspan":
                found |= {parts[1]} if len(parts) > 1 else {a.name for a in node.names}
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "longspan" and len(parts) > 1:
                    found.add(parts[1])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    layer = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if layer in SERVES_ALL:
        return
    later = {name for name in imports(path) if RANK.get(name, -1) > RANK[layer]}
    assert not later, f"{layer} imports {sorted(later)}, which come after it"


@pytest.mark.parametrize("path", MECHANISMS, ids=lambda p: p.stem)
def test_a_mechanism_imports_no_other(path: Path) -> None:
    assert "mechanisms" not in imports(path)


def test_the_median_mechanism_is_under_a_hundred_lines() -> None:
    lengths = {p.stem: len(p.read_text(encoding="utf-8").splitlines()) for p in MECHANISMS}
    least = sorted((n, name) for name, n in lengths.items() if n > 99)
    assert statistics.median(lengths.values()) < 100, f"the next to shorten: {least[:5]}"


def logic(path: Path) -> list[str]:
    """Lines of code without what a protocol or a paper's own arguments dictate.

    Left out are imports, cards, docstrings, comments, signatures, arguments handed on under their
    own name, and lines of brackets alone.
    """
    text = path.read_text(encoding="utf-8")
    gone: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        spans: list[tuple[int, int]] = []
        if isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            spans.append((node.lineno, node.end_lineno or node.lineno))
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            spans += [(d.lineno, d.end_lineno or d.lineno) for d in node.decorator_list]
            if isinstance(node, ast.FunctionDef):
                spans.append((node.lineno, node.body[0].lineno - 1))
        gone |= {line for first, last in spans for line in range(first, last + 1)}
    own_name = re.compile(r"(\w+)=(self\.)?\1,")
    lines = ((n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if n not in gone)
    return [
        line
        for _, line in lines
        if re.search(r"\w", line) and not line.startswith("#") and not own_name.fullmatch(line)
    ]


def test_no_six_lines_of_logic_stand_in_two_mechanisms() -> None:
    first: dict[tuple[str, ...], str] = {}
    twice: dict[tuple[str, str], str] = {}
    for path in MECHANISMS:
        lines = logic(path)
        for run in zip(*(lines[n:] for n in range(6)), strict=False):
            other = first.setdefault(run, path.stem)
            if other != path.stem:
                twice.setdefault((other, path.stem), run[0])
    assert not twice, f"move what they share to nn or an engine: {twice}"


def test_nothing_unpickles() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert "import pickle" not in text, path
        assert "torch.load(" not in text, path


def test_generated_pages_are_fresh() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_import_is_light() -> None:
    code = (
        "import sys, longspan; longspan.find(); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'numpy', 'plotly')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
