"""CALM's claim: fewer layers a token at a certified closeness to the texts of full depth.

Trains a byte decoder with a classifier after every block on the standard library's source, finds
each measure's threshold by Learn then Test on prompts drawn from the validation files, and measures
on other prompts, from the test files: loss, layers, FLOPs counted (those of prompts included),
tokens a second. Writes `results/calm.json`.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from longspan.data import corpus, random_windows
from longspan.inference.calm import calibrate, rouge_l_loss
from longspan.inference.exits import traced
from longspan.models.early_exit import EarlyExitConfig, EarlyExitForCausalLM
from longspan.testing.counting import flops

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write

WIDTH, LAYERS, HEADS, LENGTH = 128, 8, 4, 128
PROMPT, NEW, BATCH, RATE = 64, 32, 75, 2e-3
THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)
MEASURES = {
    "softmax": {"measure": "softmax"},
    "saturation": {"measure": "saturation"},
    "classifier": {"measure": "classifier"},
}


def train(model: EarlyExitForCausalLM, data: Any, steps: int, generator: torch.Generator) -> float:
    """The mean loss of the last fifty steps of AdamW."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(wanted, lr=RATE, weight_decay=0.01)
    losses: list[float] = []
    model.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 50) * (1 - step / steps)
        tokens = random_windows(data, batch=8, length=LENGTH, generator=generator)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


def built(options: dict[str, Any], weights: dict[str, Tensor] | None) -> EarlyExitForCausalLM:
    """The decoder under one measure, with the weights that all share."""
    rule = {"id": "calm", "horizon": NEW, **options}
    config = EarlyExitConfig(
        vocab_size=256, width=WIDTH, layers=LAYERS, heads=HEADS, norm="rms", weights="linear",
        exit=rule, trains="exits" if weights else "decoder",
    )  # fmt: skip
    model = EarlyExitForCausalLM(config).eval()
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    return model


def generate(model: EarlyExitForCausalLM, prompts: Tensor) -> Tensor:
    parts = [
        model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=NEW, do_sample=False
        )
        for rows in prompts.split(BATCH)
    ]
    return torch.cat(parts)[:, PROMPT:]


def speed(model: EarlyExitForCausalLM, prompts: Tensor, threshold: float) -> dict[str, float]:
    """Against full depth, a prompt at a time, taking turns; CPU seconds of one thread."""
    ratios, rates = [], []
    for row in prompts.split(1):
        seconds = {}
        for bar in (1.0, threshold):
            model.driver.rule.set_threshold(bar)
            started = time.process_time()
            generate(model, row)
            seconds[bar] = time.process_time() - started
        ratios.append(seconds[1.0] / seconds[threshold])
        rates.append(NEW / seconds[threshold])
    return {"speedup": round(median(ratios), 3), "tokens_per_second": round(median(rates), 1)}


def measured(
    model: EarlyExitForCausalLM, calibration: Tensor, test: Tensor, level: float, error: float
) -> dict[str, Any]:
    done = calibrate(
        model,
        calibration,
        level=level,
        error=error,
        new_tokens=NEW,
        thresholds=THRESHOLDS,
        batch=BATCH,
    )
    rule = model.driver.rule
    rule.set_threshold(1.0)
    full = generate(model, test)
    rule.set_threshold(done.threshold)
    with traced(model) as trace:
        early = generate(model, test)
    exits, projections = (
        torch.cat([torch.cat([t[:, -1:] for t in kept[i : i + NEW]], 1)
                   for i in range(0, len(kept), NEW)])
        for kept in (trace.exits, trace.projections)
    )  # fmt: skip
    work = model.work(exits, projections)
    losses = [rouge_l_loss(a, b) for a, b in zip(early.tolist(), full.tolist(), strict=True)]
    counted = {}
    for bar in (1.0, done.threshold):
        rule.set_threshold(bar)
        counted[bar] = flops(lambda: generate(model, test[:8]))
    timed = speed(model, test[:8], done.threshold)
    rule.set_threshold(done.threshold)
    return {
        "threshold": done.threshold,
        "fell_back": done.fell_back,
        "tests": done.calibration.table(),
        "test_loss": round(sum(losses) / len(losses), 4),
        "mean_depth": round(work.depth, 3),
        "layers_saved": round(1 - work.depth / LAYERS, 3),
        "projections_a_token": round(work.projections / work.tokens, 3),
        "flops_of_full": round(work.flops / work.full_flops, 3),
        "flops_counted_of_full": round(counted[done.threshold] / counted[1.0], 3),
        **timed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1500, help="of training the decoder")
    parser.add_argument("--level", type=float, default=0.25, help="δ, of 1 − ROUGE-L")
    parser.add_argument("--error", type=float, default=0.05, help="ε")
    parser.add_argument("--prompts", type=int, default=150, help="to calibrate on, and to test on")
    given = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    data = corpus("stdlib")
    model = built(MEASURES["softmax"], None)
    loss = train(model, data.train, given.steps, generator)
    print(
        f"decoder: {given.steps} steps, loss {loss:.3f} nats (weighted over the blocks)", flush=True
    )
    weights = {n: t for n, t in model.state_dict().items() if not n.startswith("driver.")}
    calibration = random_windows(
        data.valid, batch=given.prompts, length=PROMPT, generator=generator
    )
    test = random_windows(data.test, batch=given.prompts, length=PROMPT, generator=generator)
    rows = []
    for name, options in MEASURES.items():
        model = built(options, weights)
        if name == "classifier":
            for part, parameter in model.named_parameters():
                parameter.requires_grad_(part.startswith("driver."))
            train(model, data.train, given.steps // 5, generator)
        row = {"measure": name, **measured(model, calibration, test, given.level, given.error)}
        rows.append(row)
        print(
            f"{name}: λ = {row['threshold']}"
            f"{' (full depth: nothing was certified)' * row['fell_back']}, "
            f"P(E[loss] ≤ {given.level}) ≥ {1 - given.error}, "
            f"on test prompts loss {row['test_loss']}, {row['mean_depth']} of {LAYERS} layers, "
            f"FLOPs × {row['flops_counted_of_full']}, "
            f"{row['speedup']} times as fast",
            flush=True,
        )
    write(
        "calm",
        corpus="stdlib",
        model={"width": WIDTH, "layers": LAYERS, "heads": HEADS, "norm": "rms"},
        training={"steps": given.steps, "batch": 8, "length": LENGTH, "loss": round(loss, 4)},
        level=given.level,
        error=given.error,
        prompts=given.prompts,
        prompt_bytes=PROMPT,
        new_bytes=NEW,
        rows=rows,
    )


if __name__ == "__main__":
    main()
