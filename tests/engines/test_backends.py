"""Kernels for accelerators against the engines' plain forms, by Triton's interpreter on a CPU."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan.engines import backends, dense, pattern, scan
from longspan.engines.backends import choice
from longspan.errors import LongspanError

TRITON = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = TRITON and (DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1")
needs_triton = pytest.mark.skipif(
    not RUNS, reason="needs triton, and a GPU or TRITON_INTERPRET=1 (set before any import)"
)
ALL = {"triton", "fla"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and tiles of 16, so that short sequences have several."""
    from longspan.engines.backends import triton_scan, triton_tiles

    monkeypatch.setattr(triton_scan, "CHUNK", 32)
    monkeypatch.setattr(triton_scan, "PROGRAMS", 4)
    monkeypatch.setattr(triton_tiles, "TILE", 32)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """dynamo, which flex_attention traces with, cannot pass through the checks of shapes."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE)


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(task, kernel) of every call that a kernel took over from an engine."""
    calls: list[tuple[str, str]] = []
    load = choice._loaded

    def loaded(task: Any, name: str) -> Any:
        calls.append((task, name))
        return load(task, name)

    monkeypatch.setattr(choice, "_loaded", loaded)
    return calls


def both(name: str, call: Any, *inputs: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients under a kernel, and under the plain form."""
    found = []
    for used in (name, "plain"):
        with backends.use(used):
            leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
            outs = call(*leaves)
            outs = [outs] if isinstance(outs, Tensor) else list(outs)
            toward = [normal(*t.shape, seed=9 + i).to(t.dtype) for i, t in enumerate(outs)]
            real = [t for t in leaves if t is not None]
            live = [(t, g) for t, g in zip(outs, toward, strict=True) if t.requires_grad]
            torch.autograd.backward([t for t, _ in live], [g for _, g in live])
            found.append([*(t.detach() for t in outs), *(t.grad for t in real)])
    return found[0], found[1]


@pytest.mark.parametrize(
    ("task", "given", "name"),
    [
        ("scan", {}, "triton"),
        ("scan", {"widths": (256, 64)}, "fla"),
        ("scan", {"widths": (512, 64)}, "plain"),
        ("scan", {"asked": "fla"}, "fla"),
        ("scan", {"asked": "flex"}, "triton"),
        ("scan", {"asked": "plain"}, "plain"),
        ("scan", {"installed": ()}, "plain"),
        ("scan", {"device": "cpu"}, "plain"),
        ("scan", {"device": "cpu", "asked": "triton"}, "plain"),
        (
            "scan",
            {"device": "cpu", "asked": "triton", "installed": {*ALL, "interpreter"}},
            "triton",
        ),
        ("scan", {"device": "cpu", "asked": "fla", "installed": {*ALL, "interpreter"}}, "plain"),
        ("scan", {"device": "mps"}, "plain"),
        ("scan", {"dtype": torch.float64}, "plain"),
        ("scan", {"dtype": torch.float32, "widths": (128, 64), "installed": {"triton"}}, "plain"),
        ("pattern", {}, "flex"),
        ("pattern", {"widths": (8, 8)}, "plain"),
        ("pattern", {"device": "cpu", "asked": "flex", "installed": ()}, "plain"),
        ("pattern", {"device": "cpu", "asked": "flex", "widths": (16, 32)}, "flex"),
        ("tiles", {}, "triton"),
        ("tiles", {"widths": (192, 128)}, "plain"),
    ],
)
def test_the_rule_of_choice(task: Any, given: dict[str, Any], name: str) -> None:
    usual = {"device": "cuda", "dtype": torch.bfloat16, "widths": (64, 64), "installed": ALL}
    if given.get("asked") == "flex" and given.get("installed") == ():
        usual["widths"] = (8, 8)
    assert backends.choose(task, **(usual | given)) == name


def test_a_cpu_uses_the_plain_form_unless_asked() -> None:
    q = torch.zeros(1, 1, 4, 16)
    assert backends.for_device("scan", q, q) is None
    with backends.use("plain"):
        assert backends.for_device("pattern", q, q) is None
    with backends.use("flex"):
        assert backends.for_device("pattern", q, q) is not None
        assert backends.for_device("pattern", q.double(), q) is None
    assert backends.for_device("pattern", q, q) is None


def test_unknown_and_missing_kernels_are_refused() -> None:
    with pytest.raises(LongspanError, match="did you mean 'triton'"), backends.use("tritn"):
        pass
    if importlib.util.find_spec("fla") is None:
        with pytest.raises(LongspanError, match="needs fla"), backends.use("fla"):
            pass
    if not TRITON:
        with pytest.raises(LongspanError, match="needs triton"), backends.use("triton"):
            pass


def test_engines_import_no_kernel() -> None:
    code = (
        "import sys, longspan.engines.backends, longspan.engines.pattern, longspan.engines.scan; "
        "here = [m for m in sys.modules if m.startswith('longspan.engines.backends.')]; "
        "sys.exit(here != ['longspan.engines.backends.choice'])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


BLOCKS = torch.eye(5, dtype=torch.bool) | (torch.arange(5) == 2)
PATTERNS = {
    "window": pattern.Window(5, 3),
    "causal": pattern.causal,
    "dilated": pattern.Window(4, 2, 3),
    "nothing": pattern.Window(5, -2),  # the first two rows see nothing
    "hubs": pattern.Window(3) | pattern.Hubs((0, -1)),
    "stripes": pattern.Stripes(16, 0, 2) & pattern.causal,
    "prefixed": pattern.Prefixed(4, pattern.Window(3, 3)),
    "table": pattern.Table(BLOCKS).blocks(32),
    "chance": (pattern.Window(1, 1) | pattern.Chance(1, pattern.Window(1, 1))).blocks(32),
    "sum": pattern.Window(40) + pattern.Window(-60, 63),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:.*without torch.compile:UserWarning")
@pytest.mark.parametrize("name", PATTERNS)
def test_flex_shows_what_the_pattern_shows(name: str) -> None:
    from longspan.engines.backends import flex

    shape, keys = PATTERNS[name], 150
    for queries in (150, 130, 21):
        q, k, v = (normal(2, 1, n, 16, seed=i) for i, n in enumerate((queries, keys, keys)))
        o, sums = flex.attend(q, k, v, shape, scale=0.3)
        want, _, wanted = dense.explicit(
            q, k, v, seen=shape.mask(queries, keys).to(DEVICE), scale=0.3
        )
        assert_close(o, want)
        assert_close(sums, wanted)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:.*without torch.compile:UserWarning")
def test_flex_attends_for_the_engine_under_keep_and_by_head(
    served: list[tuple[str, str]],
) -> None:
    q, k, v = (normal(2, 2, 40, 16, seed=i) for i in range(3))
    shape = pattern.per_head([pattern.Window(6), pattern.Window(3, 3)])
    keep = torch.arange(40, device=DEVICE) < torch.tensor([[40], [29]], device=DEVICE)
    with backends.use("flex"):
        got = pattern.attend(q, k, v, shape, keep=keep)
    assert served == [("pattern", "flex")] * 4  # two patterns, two lengths
    with backends.use("plain"):
        assert_close(got, pattern.attend(q, k, v, shape, keep=keep))


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has gradients")
def test_flex_refuses_gradients_on_a_cpu() -> None:
    q = normal(1, 1, 20, 16).requires_grad_()
    with backends.use("flex"), pytest.raises(LongspanError, match="no gradients on a CPU"):
        pattern.attend(q, q, q, pattern.Window(3))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.filterwarnings("ignore:.*without torch.compile:UserWarning")
def test_one_graph_serves_a_window_at_many_lengths() -> None:
    from torch._dynamo.testing import CompileCounter

    from longspan.engines.backends import flex

    shape = PATTERNS["window"]
    flex._mask.cache_clear()
    counter = CompileCounter()
    call = torch.compile(flex._kernel(shape, "cpu"), backend=counter, fullgraph=True)
    for length in (20, 31, 32, 45, 50, 61):
        q = torch.randn(1, 1, length, 16)
        mask = flex._mask(shape, length, length, q.device)
        o, _ = call(q, q, q, mask, None)
        assert_close(o, dense.explicit(q, q, q, seen=shape.mask(length, length))[0])
    assert counter.frame_count <= 3


DECAYS = {"none": None, "head": (2,), "token": (2, 2, 0)}


@needs_triton
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("fades", DECAYS)
@pytest.mark.parametrize(("length", "keys"), [(2, 2), (33, 33), (70, 75)])
def test_scan_in_triton(length: int, keys: int, fades: str, served: list[tuple[str, str]]) -> None:
    q, k, v = (
        normal(2, 2, n, w, seed=i) for i, (n, w) in enumerate([(length, 8), (keys, 8), (keys, 5)])
    )
    shape = DECAYS[fades]
    decay = None if shape is None else -normal(*(n or keys for n in shape), seed=4).abs()

    def call(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None) -> Any:
        return scan.outer(q, k, v, state, decay=decay)

    got, want = both("triton", call, q, k, v, normal(2, 2, 8, 5, seed=3), decay)
    assert served == [("scan", "triton")]
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


@needs_triton
@pytest.mark.usefixtures("tiny")
def test_scan_in_triton_divides_and_keeps_a_wide_state_under_float16(
    served: list[tuple[str, str]],
) -> None:
    q, k, v = (normal(1, 2, 70, 8, seed=i).abs().half() for i in range(3))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return scan.outer(q, k, v, normalise=1e-3)

    got, want = both("triton", call, q, k, v)
    assert served == [("scan", "triton")]
    assert [t.dtype for t in got] == [t.dtype for t in want]
    assert got[1].dtype == torch.float32
    for a, b in zip(got, want, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error < 1e-2, error


@needs_triton
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("hides", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("length", "keys"), [(1, 1), (33, 33), (20, 50), (40, 20)])
def test_tiles_in_triton(length: int, keys: int, causal: bool, hides: bool) -> None:
    from longspan.engines.backends.triton_tiles import Tiles

    keep = torch.ones(2, keys, dtype=torch.bool, device=DEVICE)
    keep[0, : keys // 2], keep[1] = False, False  # row 1 sees nothing
    seen = keep if hides else None
    q, k, v = (
        normal(2, 2, n, w, seed=i) for i, (n, w) in enumerate([(length, 8), (keys, 8), (keys, 20)])
    )
    plain, tiles = dense.Whole(causal=causal, keep=seen), Tiles(causal=causal, keep=seen)
    with backends.use("plain"):
        o, lse = plain.forward(q, k, v, 0.3)
        got = tiles.forward(q, k, v, 0.3)
        assert_close(got, (o, lse), rtol=1e-5, atol=1e-5)
        rest = (normal(*o.shape, seed=5), q, k, v, o, lse.masked_fill(lse == -torch.inf, 0), 0.3)
        assert_close(tiles.backward(*rest), plain.backward(*rest), rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.usefixtures("tiny")
def test_a_union_with_tiles_in_triton_is_one_softmax(served: list[tuple[str, str]]) -> None:
    q, k, v = (normal(1, 2, 40, 8, seed=i) for i in range(3))
    far = torch.arange(40, device=DEVICE)[None] < 4

    def call(q: Tensor, k: Tensor, v: Tensor) -> Any:
        near = pattern.Banded([pattern.Window(3)], ~far)
        return dense.union(q, [(dense.Whole(keep=far), k, v), (near, k, v)])

    got, want = both("triton", call, q, k, v)
    assert served == [("tiles", "triton")] * 2  # forward, backward
    assert_close(got, want, rtol=1e-5, atol=1e-5)
