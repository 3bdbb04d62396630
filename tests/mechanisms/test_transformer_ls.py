"""What Transformer-LS claims beyond the laws: its images, global tokens, special cases, memory."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from longspan import build
from longspan.engines import lowrank, pattern
from longspan.errors import LongspanError
from longspan.nn import state_bytes
from longspan.testing.oracles import oracle_of

SIZES: dict[str, Any] = {"width": 12, "heads": 3, "window": 4, "rank": 2}
CAUSAL: dict[str, Any] = {"causal": True, "chunk": 4}
FORMULA: Any = oracle_of("transformer-ls")


def built(**options: Any) -> Any:
    """With every parameter away from where it starts."""
    module = build("transformer-ls", **(SIZES | options)).double().eval()
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return module


def tokens(length: int, *, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, length, 12, generator=generator, dtype=torch.float64)


def masked(length: int, *, kept: tuple[int, ...] = ()) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    keep = torch.rand(2, length, generator=generator) > 0.3
    keep[:, list(kept)] = True
    return keep


BIDIRECTIONAL: list[tuple[str, dict[str, Any], int]] = [
    ("an odd window", {"window": 5}, 23),
    ("one longer than the sequence", {"window": 64}, 9),
    ("the window alone", {"rank": 0}, 23),
    ("the projection alone", {"window": 0}, 23),
    ("without DualLN", {"dual_norm": False}, 23),
    ("a global token", {"hubs": 1}, 22),
    ("global tokens and a convolution", {"hubs": 2, "kernel": 3}, 23),
    ("global tokens alone", {"hubs": 3}, 2),
    ("an image", {"columns": 8}, 32),
    ("an image that windows do not fill", {"columns": 7, "window": 3}, 35),
    ("an image with global tokens", {"columns": 6, "hubs": 2}, 38),
    ("an image by windows alone", {"columns": 6, "rank": 0}, 36),
    ("an image by the projection alone", {"columns": 6, "window": 0, "hubs": 1}, 37),
]
STREAMED: list[tuple[str, dict[str, Any], int]] = [
    ("the window alone", {"rank": 0}, 23),
    ("the projection alone", {"window": 0}, 23),
    ("without DualLN", {"dual_norm": False, "biases": False}, 23),
    ("a window beyond the chunk", {"window": 11, "rank": 1}, 37),
    ("a memory", {"memory": 8}, 41),
    ("segments", {"segment": 8}, 41),
    ("segments and a memory", {"segment": 8, "memory": 12, "rank": 1}, 45),
]


def forms() -> list[Any]:
    whole = [pytest.param(options, n, id=name) for name, options, n in BIDIRECTIONAL]
    return whole + [
        pytest.param(CAUSAL | options, n, id=f"causal, {name}") for name, options, n in STREAMED
    ]


@pytest.mark.parametrize(("options", "length"), forms())
@pytest.mark.parametrize("holes", [False, True], ids=["all", "masked"])
def test_every_form_is_the_formula(options: dict[str, Any], length: int, holes: bool) -> None:
    module, x = built(**options), tokens(length).requires_grad_()
    first = range(options.get("hubs", 0)) if "columns" in options else ()
    keep = masked(length, kept=tuple(first)) if holes else None
    weights = torch.randn(2, length, 12, generator=torch.Generator().manual_seed(3)).double()
    given = [x, *module.parameters()]
    found = []
    for y in (module(x, keep=keep)[0], FORMULA(module, x, keep=keep)):
        # P of a sequence with global tokens alone is never asked.
        grads = torch.autograd.grad((y * weights).sum(), given, allow_unused=True)
        found.append([y, *(0 * t if g is None else g for t, g in zip(given, grads, strict=True))])
    for got, want in zip(*found, strict=True):
        assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_beyond_the_length_without_a_rank_is_dense_attention(causal: bool) -> None:
    module, x = built(rank=0, window=64, **(CAUSAL if causal else {})), tokens(19)
    if causal:
        for p in (module.content, module.place, module.by_distance.weight):
            p.data.zero_()
    q, k, v = (module.project[n](x) for n in "qkv")
    heads = (module.split(t) for t in (q, module.near_norm(k), module.near_norm(v)))
    o = F.scaled_dot_product_attention(*heads, is_causal=causal)
    assert_close(module(x)[0], module.output(o.transpose(1, 2).flatten(2)))


def test_one_hot_projections_are_attention_to_the_tokens_they_choose() -> None:
    """Rows of Pᵀ sum to 1 over positions, not over the rank."""
    module, x = built(window=0, dual_norm=False), tokens(9)
    scores = module.compress(x)
    assert_close(module.summaries(scores, torch.ones_like(x)), torch.ones(2, 2, 12).double())
    chosen = scores.argmax(1)  # B (H M)
    module.compress.weight.data *= 1e6
    heads = [module.split(module.project[n](x)) for n in "qkv"]
    at = chosen.view(2, 3, 2, 1).expand(-1, -1, -1, 4)
    o = F.scaled_dot_product_attention(heads[0], *(t.gather(2, at) for t in heads[1:]))
    assert_close(module(x)[0], module.output(o.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("options", [{}, {"columns": 4}], ids=["sequence", "image"])
def test_padding_has_no_part_in_the_projection(options: dict[str, Any]) -> None:
    module, x = built(window=0, **options), tokens(16)
    keep = torch.arange(16) < 12
    y, _ = module(x.masked_fill(~keep[:, None], torch.nan), keep=keep.expand(2, -1))
    assert_close(y[:, :12], module(x[:, :12])[0])


@pytest.mark.parametrize("options", [o for _, o, _ in STREAMED], ids=[n for n, _, _ in STREAMED])
def test_any_pieces_are_the_whole(options: dict[str, Any]) -> None:
    """Rolling window, closed chunks, an open one; chunks count each row's own kept tokens."""
    module, x, keep = built(**CAUSAL, **options), tokens(41), masked(41)
    for mask in (None, keep):
        whole, _ = module(x, keep=mask)
        for sizes in ([1] * 41, [3, 1, 17, 20], [16, 25]):
            state, outs, at = None, [], 0
            for size in sizes:
                here = slice(at, at + size)
                own = None if mask is None else mask[:, here]
                y, state = module(x[:, here], state, keep=own)
                outs.append(y)
                at += size
            assert_close(torch.cat(outs, 1), whole, atol=1e-10, rtol=1e-10)


def test_a_memory_bounds_the_state() -> None:
    module, sizes = built(**CAUSAL, memory=8, segment=8), []
    for length in (200, 400):
        _, state = module(tokens(length))
        sizes.append(state_bytes(state))
    assert sizes[0] == sizes[1]


def test_the_open_chunk_is_never_seen_as_a_summary() -> None:
    """What a chunk's tokens see without a window lies before the chunk."""
    module, x = built(window=0, **CAUSAL), tokens(12)
    assert not module(x)[0][:, :4].sub(module.output.bias).any()
    jacobian: Any = torch.autograd.functional.jacobian(lambda k: module(k)[0][0].sum(-1), x[:1])
    strength = jacobian[:, 0].abs().sum(-1)  # of token (row) from token (column)
    own = torch.arange(12)[:, None] // 4 == torch.arange(12) // 4
    assert not strength[own & ~torch.eye(12, dtype=torch.bool)].any()
    assert (strength[8:, :8] > 0).all()


def test_segments_are_one_pass_where_one_projection_serves_all_heads() -> None:
    """Compressed before W_K or after: the same with one head, whose P weighs whole inputs."""
    x = tokens(32)
    for heads in (1, 3):
        whole, parts = (built(**CAUSAL, heads=heads, segment=s) for s in (None, 8))
        parts.load_state_dict(whole.state_dict())
        got, want = parts(x)[0], whole(x)[0]
        assert torch.allclose(got, want) is (heads == 1)
        assert_close(got[:, :8], want[:, :8])


def test_windows_of_an_image_have_the_released_size() -> None:
    """(w + 2 ⌊w / 2⌋)² keys, those beyond the border left out."""
    for w in (2, 3):
        queries, keys = pattern.Windows((6, 6), (w, w), (w // 2, w // 2))(0, 1)
        assert queries.shape == (1, w * w)
        assert keys.shape == (1, (w + 2 * (w // 2)) ** 2)
        assert int((keys >= 0).sum()) == (w + w // 2) ** 2


def test_the_convolution_starts_as_nothing() -> None:
    module = build("transformer-ls", **SIZES, kernel=3).double()
    plain = build("transformer-ls", **SIZES).double()
    plain.load_state_dict(module.state_dict(), strict=False)
    assert torch.equal(module(tokens(11))[0], plain(tokens(11))[0])
    assert lowrank.depthwise(torch.ones(1, 3, 4, 1), torch.ones(3, 3))[0, 0, :, 0].tolist() == [
        2,
        3,
        3,
        2,
    ]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": 0, "rank": 0}, "a window, a rank or both"),
        ({"heads": 5}, "divide the width"),
        ({"kernel": 4}, "odd kernel"),
        ({"kernel": 3, "columns": 4}, "of sequences only"),
        ({"segment": 8}, "only where causal"),
        (CAUSAL | {"hubs": 1}, "only without causality"),
        (CAUSAL | {"segment": 6}, "whole chunks"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(LongspanError, match=said):
        build("transformer-ls", **(SIZES | options))


def test_images_come_whole() -> None:
    with pytest.raises(LongspanError, match="whole images"):
        built(columns=4)(tokens(10))
