"""What the library costs over plain PyTorch, in alternated runs of one process.

1. The harness: `compare`'s training (transformers' Trainer and callbacks) against a bare loop over
   the same model and batches.
2. The model: `LongspanForCausalLM` with softmax attention against a decoder of the same shape
   written out in plain PyTorch, same weights, same batches: loss curves and tokens a second.

Writes `results/harness.json`.
"""

import copy
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.bench.settings import Budget
from longspan.bench.train import Progress, train
from longspan.data import corpus, random_windows
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.training import parameter_groups

WIDTH, LAYERS, HEADS, LENGTH, BATCH, STEPS, ROUNDS = 128, 2, 4, 512, 8, 20, 5
RATE = 2e-3


class PlainBlock(nn.Module):
    """Pre-norm attention with RoPE and a feed-forward, as anyone would write it."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.qkv = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (p(h).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for p in self.qkv)
        q, k = (t * cos + torch.cat([-t[..., 16:], t[..., :16]], -1) * sin for t in (q, k))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(o.transpose(1, 2).reshape_as(x))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Plain(nn.Module):
    """The decoder in plain PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList([PlainBlock() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        half = WIDTH // HEADS // 2
        rate = 10000 ** (-torch.arange(half) / half)
        angle = torch.arange(input_ids.shape[1])[:, None] * rate
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    def load(self, model: LongspanForCausalLM) -> "Plain":
        """The library model's weights."""
        source: Any = model.model
        pairs = [(self.embed, source.embed_tokens), (self.norm, source.norm)]
        for mine, theirs in zip(self.blocks, source.layers, strict=True):
            heads = theirs.mixer
            pairs += [
                (mine.norms[0], theirs.mixer_norm),
                (mine.norms[1], theirs.feed_forward_norm),
                *zip(mine.qkv, (heads.project[n] for n in "qkv"), strict=True),
                (mine.out, heads.output),
                (mine.up, theirs.feed_forward.up),
                (mine.down, theirs.feed_forward.down),
            ]
        for mine, theirs in pairs:
            mine.load_state_dict(theirs.state_dict())
        return self


def bare(model: nn.Module, draw: Any, steps: int) -> tuple[list[float], list[float]]:
    """Seconds and losses of a loop with nothing around it."""
    groups = parameter_groups(model, lr=RATE, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    model.train()
    seconds, losses = [], []
    for _ in range(steps):
        since = time.perf_counter()
        out = model(**draw())
        loss = out if isinstance(out, Tensor) else out.loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - since)
        losses.append(loss.item())
    return seconds, losses


def main() -> None:
    text = corpus("stdlib").train

    def drawer() -> Any:
        generator = torch.Generator().manual_seed(0)

        def draw() -> dict[str, Tensor]:
            tokens = random_windows(text, batch=BATCH, length=LENGTH, generator=generator)
            return {"input_ids": tokens, "labels": tokens}

        return draw

    torch.manual_seed(0)
    config = LongspanConfig(
        width=WIDTH,
        layers=LAYERS,
        heads=HEADS,
        length=LENGTH,
        position={"id": "rope", "layout": "half-split"},
    )
    model = LongspanForCausalLM(config)
    plain = Plain().load(model)
    harness, loop, ours, theirs = [], [], [], []
    curves: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        progress = Progress(Budget(tokens=STEPS * BATCH * LENGTH), BATCH * LENGTH)
        train(copy.deepcopy(model), drawer(), progress, rate=RATE, seed=0, device="cpu")
        harness.append(statistics.median(progress.seconds[2:]))
        seconds, curves["longspan"] = bare(copy.deepcopy(model), drawer(), STEPS)
        loop.append(statistics.median(seconds[2:]))
        ours.append(loop[-1])
        seconds, curves["plain"] = bare(copy.deepcopy(plain), drawer(), STEPS)
        theirs.append(statistics.median(seconds[2:]))
    ratio = [a / b for a, b in zip(harness, loop, strict=True)]
    speed = [b / a for a, b in zip(ours, theirs, strict=True)]
    gap = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "shape": {"width": WIDTH, "layers": LAYERS, "length": LENGTH, "batch": BATCH},
        "harness_over_bare_loop": statistics.median(ratio),
        "tokens_per_second_over_plain": statistics.median(speed),
        "largest_loss_difference_over_steps": gap,
        "last_losses": {name: losses[-1] for name, losses in curves.items()},
    }
    print(json.dumps(result, indent=1))
    target = Path(__file__).parent / "results" / "harness.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
