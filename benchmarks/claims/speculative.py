"""Speculative decoding on models with states: the same text, in fewer calls.

Trains byte models of six layers and a draft of one on the standard library's source, then continues
prompts from its test files greedily and with the draft (`generate(assistant_model=…)`), in turns.
Writes `results/speculative.json`.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from longspan.data import corpus, random_windows
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.training.recipes import language_model

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write

TARGETS = ("linear-transformer", "rwkv", "multi-head-attention")
DRAFT = "linear-transformer"
WIDTH, LAYERS, HEADS = 128, 6, 4
LENGTH, PROMPT, NEW, DRAFTED = 128, 64, 128, 5


def trained(mixer: str, layers: int, train: Any, steps: int) -> LongspanForCausalLM:
    config = LongspanConfig(width=WIDTH, layers=layers, heads=HEADS, mixers=[mixer])
    with tempfile.TemporaryDirectory() as out:
        run = language_model(
            train,
            config=config,
            out=out,
            length=LENGTH,
            batch=8,
            steps=steps,
            lr=2e-3,
            warmup=50,
            log_every=steps,
            cpu=True,
        )
        run.train()
    assert isinstance(run.model, LongspanForCausalLM)
    return run.model.eval()


def generate(model: LongspanForCausalLM, prompt: Tensor, draft: Any) -> tuple[Tensor, float, int]:
    """The text, CPU seconds of one thread, and the model's calls."""
    calls: list[int] = []
    handle = model.model.register_forward_hook(lambda *_: calls.append(1))
    began = time.process_time()
    text = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW,
        do_sample=False,
        assistant_model=draft,
    )
    seconds = time.process_time() - began
    handle.remove()
    return text, seconds, len(calls)


def measured(target: LongspanForCausalLM, draft: Any, prompts: Tensor) -> dict[str, Any]:
    ratios, rates, calls, same = [], [], 0, 0
    for prompt in prompts.split(1):
        greedy, alone, _ = generate(target, prompt, None)
        text, together, count = generate(target, prompt, draft)
        same += int(torch.equal(text, greedy))
        calls += count
        ratios.append(alone / together)
        rates.append((NEW / alone, NEW / together))
    return {
        "identical": f"{same} of {len(prompts)}",
        "tokens_a_call": round(NEW * len(prompts) / calls, 2),
        "greedy_tokens_per_second": round(median(rate for rate, _ in rates), 1),
        "speculative_tokens_per_second": round(median(rate for _, rate in rates), 1),
        "speedup": round(median(ratios), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400, help="of training each model")
    parser.add_argument("--prompts", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    data = corpus("stdlib")
    generator = torch.Generator().manual_seed(0)
    prompts = random_windows(data.test, batch=given.prompts, length=PROMPT, generator=generator)
    draft = trained(DRAFT, 1, data.train, given.steps)
    draft.generation_config.num_assistant_tokens = DRAFTED
    # The confidence at which a draft ends is made for trained models of a large vocabulary.
    draft.generation_config.assistant_confidence_threshold = 0.0
    rows = []
    for mixer in TARGETS:
        target = trained(mixer, LAYERS, data.train, given.steps)
        rows.append({"target": mixer, **measured(target, draft, prompts)})
        print(rows[-1], flush=True)
    write(
        "speculative",
        corpus="stdlib",
        model={"width": WIDTH, "layers": LAYERS, "heads": HEADS},
        draft={"mixer": DRAFT, "layers": 1, "tokens": DRAFTED},
        training={"steps": given.steps, "batch": 8, "length": LENGTH},
        prompt_bytes=PROMPT,
        new_bytes=NEW,
        prompts=given.prompts,
        rows=rows,
    )


if __name__ == "__main__":
    main()
