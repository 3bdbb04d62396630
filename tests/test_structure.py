"""The shape of the code: imports point one way, generated pages are fresh, nothing runs on load."""

import ast
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


@pytest.mark.parametrize(
    "path", sorted((SOURCE / "mechanisms").rglob("*.py")), ids=lambda p: p.stem
)
def test_a_mechanism_imports_no_other(path: Path) -> None:
    assert "mechanisms" not in imports(path)


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
