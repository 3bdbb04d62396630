"""Longformer against its formula written out, and against transformers' Longformer and LED."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import LEDConfig, LEDModel, LongformerConfig, LongformerModel, RobertaConfig
from transformers import RobertaModel as Roberta
from transformers.models.led.modeling_led import LEDEncoderAttention
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

import longspan
from longspan import convert
from longspan.nn import Block, FeedForward, MultiHead

HEADS, WIDTH = 3, 4
MODEL = HEADS * WIDTH
# transformers computes the softmax in float32, whatever came in.
THEIRS: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6}
NAMES = {"q": "query", "k": "key", "v": "value"} | {
    f"{short}_global": f"{long}_global"
    for short, long in (("q", "query"), ("k", "key"), ("v", "value"))
}


def random(*shape: int, seed: int = 0, gradient: bool = True) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(gradient)


def scramble(module: nn.Module) -> None:
    """Weights that differ between all the projections, and large enough for sharp attention."""
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = random(*parameter.shape, seed=seed, gradient=False) / 2


def gradients(out: Tensor, of: Iterable[Tensor], seed: int = 99) -> list[Tensor]:
    toward = random(*out.shape, seed=seed, gradient=False).to(out.dtype)
    return list(torch.autograd.grad(out, list(of), toward, materialize_grads=True))


def rows_of(lengths: Iterable[int], length: int) -> Tensor:
    return torch.arange(length) < torch.tensor(list(lengths))[:, None]


def marked(places: Iterable[Iterable[int]], length: int) -> Tensor:
    marks = torch.zeros(len(list(places)), length, dtype=torch.bool)
    for row, at in enumerate(places):
        marks[row, list(at)] = True
    return marks


def softmax(scores: Tensor, seen: Tensor) -> Tensor:
    raised = (scores - scores.max()).exp() * seen
    return raised / raised.sum(-1, keepdim=True).clamp(min=1e-300)


def written_out(
    local: Sequence[Tensor],
    wide: Sequence[Tensor],
    *,
    windows: list[int],
    dilations: list[int],
    causal: bool = False,
    hubs: Tensor,
    keep: Tensor,
) -> Tensor:
    """Row by row: what token i of head h may see, and with which projections it looks."""
    batch, heads, length, width = local[0].shape
    out = torch.zeros(batch, heads, length, width, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                w, d = windows[h % len(windows)], dilations[h % len(dilations)]
                near = {i + d * t for t in range(-(w // 2), 1 if causal else w // 2 + 1)}
                seen = torch.tensor(
                    [
                        bool(keep[b, j] & (hubs[b, i] | hubs[b, j] | (j in near)))
                        for j in range(length)
                    ]
                )
                q, k, v = (t[b, h] for t in (wide if hubs[b, i] else local))
                out[b, h, i] = softmax(k @ q[i] / width**0.5, seen) @ v
    return out


@pytest.mark.parametrize("length", [1, 7, 26])
@pytest.mark.parametrize(
    ("windows", "dilations"),
    [([4], [1]), ([6], [1, 1, 3]), ([2, 4, 6], [1]), ([4, 2, 8], [2, 3, 1]), ([2], [30])],
)
@pytest.mark.parametrize("causal", [False, True])
def test_each_row_sees_the_union_of_window_and_hubs(length, windows, dilations, causal):
    attend = longspan.build("longformer", causal=causal, window=windows, dilation=dilations)
    inputs = [random(2, HEADS, length, WIDTH, seed=s) for s in range(3 if causal else 6)]
    keep = torch.rand(2, length, generator=torch.Generator().manual_seed(1)) > 0.2
    keep[1] = True
    marks = torch.zeros(2, length, dtype=torch.bool)
    if not causal:
        marks[0, length // 2 :: 3] = marks[1, :1] = True
    want = written_out(
        inputs[:3],
        inputs[-3:],
        windows=windows,
        dilations=dilations,
        causal=causal,
        hubs=marks & keep,
        keep=keep,
    )
    extra = {} if causal else dict(zip(attend.extra, inputs[3:], strict=True)) | {"marks": marks}
    out, _ = attend(*inputs[:3], keep=keep, **extra)
    assert_close(out, want)
    for mine, theirs in zip(gradients(out, inputs), gradients(want, inputs), strict=True):
        assert_close(mine, theirs)


@pytest.mark.parametrize("causal", [False, True])
def test_a_window_over_everything_is_dense(causal):
    inputs = q, k, v = [random(2, HEADS, 19, WIDTH, seed=s) for s in range(3)]
    out, _ = longspan.build("longformer", causal=causal, window=38)(q, k, v)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert_close(out, want)
    for mine, theirs in zip(gradients(out, inputs), gradients(want, inputs), strict=True):
        assert_close(mine, theirs)


def test_hubs_with_copied_projections_change_nothing_of_dense():
    torch.manual_seed(0)
    wide = MultiHead(longspan.build("longformer", window=38, hubs=2), width=MODEL, heads=HEADS)
    dense = MultiHead(longspan.build("multi-head-attention"), width=MODEL, heads=HEADS)
    dense.load_state_dict({n: t for n, t in wide.state_dict().items() if "_global" not in n})
    x = random(2, 19, MODEL)
    assert_close(wide.double()(x)[0], dense.double()(x)[0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [2, 3, 5])
def test_dilation_is_as_many_interleaved_problems(dilation, causal):
    inputs = [random(2, HEADS, 23, WIDTH, seed=s) for s in range(3)]
    keep = rows_of([23, 16], 23)
    dilated = longspan.build("longformer", causal=causal, window=4, dilation=dilation)
    plain = longspan.build("longformer", causal=causal, window=4)
    out, _ = dilated(*inputs, keep=keep)
    want = torch.empty_like(out)
    for first in range(dilation):
        each = slice(first, None, dilation)
        want[:, :, each], _ = plain(*(t[:, :, each] for t in inputs), keep=keep[:, each])
    assert_close(out, want)
    for mine, theirs in zip(gradients(out, inputs), gradients(want, inputs), strict=True):
        assert_close(mine, theirs)


def longformer_attention(config: dict[str, Any]) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": MODEL,
        "num_attention_heads": HEADS,
        "intermediate_size": 8,
    }
    return LongformerSelfAttention(LongformerConfig(**sizes, **config), layer_id=0)


def led_attention(config: dict[str, Any]) -> Any:
    sizes: dict[str, Any] = {"d_model": MODEL, "encoder_attention_heads": HEADS}
    return LEDEncoderAttention(LEDConfig(**sizes, **config), layer_id=0)


@pytest.mark.parametrize("build", [longformer_attention, led_attention])
@pytest.mark.parametrize(
    "places",
    [[[], [], [], []], [[0], [0], [0], [0]], [[0, 1, 5, 16], [], [3], [8, 0]]],
    ids=["none", "first", "varied"],
)
@pytest.mark.parametrize("window", [4, 6, 12])
def test_as_transformers(build: Callable[[dict[str, Any]], Any], places, window):
    """Copied weights, other numbers of global tokens in each row, right padding.

    In float32: in float64 theirs has NaN gradients where a row has fewer global tokens than others.
    """
    length = 24
    hf: Any = build({"attention_window": [window]}).double().eval()
    scramble(hf)
    hf.float()
    ours: Any = MultiHead(longspan.build("longformer", window=window), width=MODEL, heads=HEADS)
    theirs: Any = getattr(hf, "longformer_self_attn", hf)
    for mine, name in NAMES.items():
        ours.project[mine].load_state_dict(getattr(theirs, name).state_dict())
    if hf is theirs:
        ours.output.load_state_dict({"weight": torch.eye(MODEL), "bias": torch.zeros(MODEL)})
    else:
        ours.output.load_state_dict(hf.output.state_dict())
    keep, marks = rows_of([24, 17, 20, 9], length), marked(places, length)
    x = random(4, length, MODEL, gradient=False).float().requires_grad_()
    want = hf(
        x,
        attention_mask=torch.where(marks, 1e4, torch.where(keep, 0.0, -1e4)),
        is_index_masked=~keep,
        is_index_global_attn=marks,
        is_global_attn=bool(marks.any()),
    )[0]
    out, _ = ours(x, keep=keep, marks=marks)
    assert not out[~keep].any()
    assert_close(out[keep], want[keep], rtol=1e-4, atol=1e-5)
    pairs = [(x, x)]
    for mine, name in NAMES.items():
        if marks.any() or "_global" not in mine:
            linears = ours.project[mine], getattr(theirs, name)
            # Scores ignore what is added to all keys: the biases of keys have gradients of noise.
            pairs += [(linears[0].weight, linears[1].weight)]
            pairs += [(linears[0].bias, linears[1].bias)] * (mine[0] != "k")
    mine = gradients(out[keep], [a for a, _ in pairs])
    want = gradients(want[keep], [b for _, b in pairs])
    for a, b in zip(mine, want, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [16, 21])
def test_converted_roberta_as_transformers_longformer(length):
    """The whole LongformerModel, with the weights of a converted and further trained RoBERTa."""
    sizes: dict[str, Any] = {
        "vocab_size": 40,
        "hidden_size": MODEL,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": 20,
        "pad_token_id": 1,
        "type_vocab_size": 1,
    }
    ours = convert.longformer(
        Roberta(RobertaConfig(max_position_embeddings=18, **sizes)), window=4, length=32, hubs=0
    )
    scramble(ours)
    ours.double().eval()
    config = LongformerConfig(max_position_embeddings=34, attention_window=4, **sizes)
    hf = LongformerModel(config).double().eval()
    weights = {}
    for name, tensor in ours.state_dict().items():
        for mine, theirs in NAMES.items():
            name = name.replace(f"self.mixer.project.{mine}.", f"self.{theirs}.")
        weights[name] = tensor
    hf.load_state_dict(weights, strict=True)
    keep, marks = rows_of([length, 13], length), marked([[0, 7], [2]], length)
    ids = torch.randint(2, 40, (2, length), generator=torch.Generator().manual_seed(0))
    ids[~keep] = 1
    masks = {"attention_mask": keep.long(), "global_attention_mask": marks.long()}
    want, out = hf(ids, **masks), ours(ids, **masks)
    assert_close(out.last_hidden_state[keep], want.last_hidden_state[keep], **THEIRS)
    assert_close(out.pooler_output, want.pooler_output, **THEIRS)


def attention_of(hf: Any, ours: Any) -> None:
    """Give `ours` the weights of LED's attention of either kind."""
    if hasattr(hf, "longformer_self_attn"):
        pairs = {m: getattr(hf.longformer_self_attn, name) for m, name in NAMES.items()}
        output = hf.output
    else:
        pairs, output = {"q": hf.q_proj, "k": hf.k_proj, "v": hf.v_proj}, hf.out_proj
    for mine, linear in pairs.items():
        ours.project[mine].load_state_dict(linear.state_dict())
    ours.output.load_state_dict(output.state_dict())


def block_of(hf: Any, mixer: MultiHead, cross: MultiHead | None) -> Block:
    """A post-norm block with the weights of LED's layer."""
    feed_forward = FeedForward(MODEL, inner=20)
    block = Block(mixer, feed_forward, width=MODEL, order="post", cross=cross)
    attention_of(hf.self_attn, mixer)
    pairs = [
        (block.mixer_norm, hf.self_attn_layer_norm),
        (block.feed_forward_norm, hf.final_layer_norm),
        (feed_forward.up, hf.fc1),
        (feed_forward.down, hf.fc2),
    ]
    if cross is not None:
        attention_of(hf.encoder_attn, cross)
        pairs.append((block.cross_norm, hf.encoder_attn_layer_norm))
    for mine, theirs in pairs:
        assert mine is not None
        mine.load_state_dict(theirs.state_dict())
    return block.double()


def embedded(hf: Any, ids: Tensor) -> Tensor:
    pos = torch.arange(ids.shape[1])
    return hf.layernorm_embedding(hf.embed_tokens(ids) + hf.embed_positions.weight[pos])


def test_led_is_longformer_blocks_and_dense_ones():
    """LEDModel from our blocks: its encoder, its causal decoder with cross-attention."""
    config = LEDConfig(
        vocab_size=40,
        d_model=MODEL,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=20,
        decoder_ffn_dim=20,
        attention_window=4,
        max_encoder_position_embeddings=32,
        max_decoder_position_embeddings=32,
    )
    hf: Any = LEDModel(config).double().eval()
    scramble(hf)

    def attention(id: str, **options: Any) -> MultiHead:
        return MultiHead(longspan.build(id, **options), width=MODEL, heads=HEADS)

    encoder = [
        block_of(each, attention("longformer", window=4, hubs=1), None)
        for each in hf.encoder.layers
    ]
    decoder = [
        block_of(
            each,
            attention("multi-head-attention", causal=True),
            attention("multi-head-attention"),
        )
        for each in hf.decoder.layers
    ]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 40, (2, 21), generator=generator)
    targets = torch.randint(2, 40, (2, 9), generator=generator)
    keep = rows_of([21, 14], 21)
    want = hf(
        ids,
        attention_mask=keep.long(),
        global_attention_mask=marked([[0], [0]], 21).long(),
        decoder_input_ids=targets,
        use_cache=False,
    )
    x, y = embedded(hf.encoder, ids), embedded(hf.decoder, targets)
    for block in encoder:
        x, _ = block(x, keep=keep)
    assert_close(x[keep], want.encoder_last_hidden_state[keep], **THEIRS)
    for block in decoder:
        y, _ = block(y, encoded=x, encoded_keep=keep)
    assert_close(y, want.last_hidden_state, **THEIRS)
