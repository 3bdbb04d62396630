"""longspan beside the packages that offer the same mechanism on a CPU, at equal settings.

Batch 1, 4 heads of 64, float32, one thread, CPU time, alternated runs in one process, medians:
seconds of ours over theirs, forward and forward + backward. Where the peer has its projections
inside, so has ours. transformers' modules need no installing; the others are in `peers.txt`, whose
first line says how. `python benchmarks/peers.py [NAME …]` writes `results/peers.json`.
"""

import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longspan.bench import speed
from longspan.bench.settings import Spec
from longspan.nn import Attention, MultiHead
from results import write

LENGTHS = (1024, 4096, 16384)
HEADS, WIDTH = 4, 64
FOLDER = Path(__file__).parents[1] / ".peers"


def _local(length: int) -> Callable[..., Tensor]:
    from local_attention import LocalAttention

    return LocalAttention(
        512, causal=True, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True
    )


def _performer(length: int) -> Callable[..., Tensor]:
    from performer_pytorch.performer_pytorch import FastAttention

    return FastAttention(WIDTH, 256)


def _performer_causal(length: int) -> Callable[..., Tensor]:
    from performer_pytorch.performer_pytorch import FastAttention

    return FastAttention(WIDTH, 256, causal=True)


def _efficient(length: int) -> Callable[..., Tensor]:
    from linear_attention_transformer.linear_attention_transformer import linear_attn

    return linear_attn


def _efficient_causal(length: int) -> Callable[..., Tensor]:
    from linear_attention_transformer.linear_attention_transformer import causal_linear_attn

    return causal_linear_attn


def _lsh(length: int) -> Callable[..., Tensor]:
    from reformer_pytorch.reformer_pytorch import LSHAttention

    attention = LSHAttention(bucket_size=64, n_hashes=4, causal=True)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q.flatten(0, 1), v.flatten(0, 1))[0].unflatten(0, q.shape[:2])

    return attend


def _routing(length: int) -> Callable[..., Tensor]:
    from routing_transformer.routing_transformer import KmeansAttention

    attention = KmeansAttention(length // 64, 64, HEADS, WIDTH).eval()
    attention.kmeans.initted.fill_(True)
    return lambda q, k, v: attention(q, k, v)[0]


def _sinkhorn(length: int) -> Callable[..., Tensor]:
    from sinkhorn_transformer.sinkhorn_transformer import SinkhornAttention

    return SinkhornAttention(64, HEADS * WIDTH, WIDTH, HEADS, length)


def _sinkhorn_causal(length: int) -> Callable[..., Tensor]:
    from sinkhorn_transformer.sinkhorn_transformer import SinkhornCausalAttention

    return SinkhornCausalAttention(64, HEADS * WIDTH, WIDTH, HEADS, length)


def _linformer(length: int) -> nn.Module:
    from linformer import LinformerSelfAttention

    return LinformerSelfAttention(HEADS * WIDTH, length, k=128, heads=HEADS)


def _nystrom(length: int) -> nn.Module:
    from nystrom_attention import NystromAttention

    return NystromAttention(HEADS * WIDTH, WIDTH, HEADS, num_landmarks=64)


def _aft_full(length: int) -> nn.Module:
    from aft_pytorch import AFTFull

    return AFTFull(length, HEADS * WIDTH, HEADS * WIDTH)


def _longformer(length: int) -> nn.Module:
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, attention_window=[512],
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    attention = LongformerSelfAttention(config, 0).eval()
    free = torch.zeros(1, length)
    no = torch.zeros(1, length, dtype=torch.bool)

    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.output = attention, nn.Linear(HEADS * WIDTH, HEADS * WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            mixed = self.inner(
                x, attention_mask=free, is_index_masked=no, is_index_global_attn=no,
                is_global_attn=False,
            )  # fmt: skip
            return self.output(mixed[0])

    return Alone()


# Ours (with {length} and its {blocks} of 64), theirs, whether theirs projects inside.
PEERS: dict[str, tuple[str, Callable[[int], Any], bool]] = {
    "local-attention": ("longformer(window=1024)", _local, False),
    "performer-pytorch": ("performer(causal=False)", _performer, False),
    "performer-pytorch, causal": ("performer", _performer_causal, False),
    "linear-attention-transformer": ("efficient-attention(causal=False)", _efficient, False),
    "linear-attention-transformer, causal": ("efficient-attention", _efficient_causal, False),
    "reformer-pytorch": ("reformer-lsh-causal", _lsh, False),
    "routing-transformer": (
        "routing-transformer(causal=False,clusters={blocks},window=64,local=0)",
        _routing,
        False,
    ),
    "sinkhorn-transformer": ("sinkhorn-attention(causal=False,net='attention')", _sinkhorn, False),
    "sinkhorn-transformer, causal": ("sinkhorn-attention(net='bilinear')", _sinkhorn_causal, False),
    "linformer": ("linformer", _linformer, True),
    "nystrom-attention": ("nystromformer(kernel=33,heads=4)", _nystrom, True),
    "aft-pytorch, full": ("aft(form='full',causal=False,length={length})", _aft_full, True),
    "transformers Longformer": ("longformer(causal=False,window=512)", _longformer, True),
}


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    if FOLDER.exists():
        sys.path.append(str(FOLDER))
    rows: list[dict[str, Any]] = []
    for name in names or PEERS:
        rows += [_row(name, length) for length in LENGTHS]
        write("peers", rows=rows)
    ratios = [r[part] for r in rows if "error" not in r for part in ("forward", "training")]
    if ratios:
        mean = math.exp(statistics.fmean(math.log(r) for r in ratios))
        print(f"geometric mean of {len(ratios)} ratios: {mean:.3f}")
        write("peers", geometric_mean=mean, rows=rows)


def _row(name: str, length: int) -> dict[str, Any]:
    ours, theirs, whole = PEERS[name]
    ours = ours.format(length=length, blocks=length // 64)
    row: dict[str, Any] = {"peer": name, "ours": ours, "length": length}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row |= _ratios(Spec.parse(ours), theirs(length), length, whole)
    except (ImportError, RuntimeError, ValueError, AssertionError, MemoryError) as error:
        row["error"] = f"{type(error).__name__}: {error}"
    print(row, flush=True)
    return row


def _ratios(spec: Spec, theirs: Any, length: int, whole: bool) -> dict[str, float]:
    module, inputs, more = speed.bare(spec, length)
    if whole:
        attention = module
        assert isinstance(attention, Attention)
        module = MultiHead(attention, width=HEADS * WIDTH, heads=HEADS).eval()
        inputs, more = [torch.randn(1, length, HEADS * WIDTH)], {}
    learnt = theirs if isinstance(theirs, nn.Module) else None
    own = speed.both(lambda: module(*inputs, **more)[0], inputs, module)
    others = inputs if whole or len({id(t) for t in inputs}) == 3 else [t.clone() for t in inputs]
    other = speed.both(lambda: theirs(*others), others, learnt)
    forward, training = (
        speed.paired(mine, peer, seconds=1.0, clock=time.process_time).ratio
        for mine, peer in zip(own, other, strict=True)
    )
    return {"forward": forward, "training": training}


if __name__ == "__main__":
    main(sys.argv[1:])
