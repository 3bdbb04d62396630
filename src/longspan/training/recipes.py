"""Whole runs as functions: what they return is ready to train."""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.optimization import get_cosine_schedule_with_warmup

from longspan import hub
from longspan.data.streams import Segments, Stream, Windows
from longspan.models import LongspanConfig, LongspanForCausalLM
from longspan.training.groups import parameter_groups
from longspan.training.named import NamedLosses
from longspan.training.segments import SegmentTrainer


def language_model(
    train: Stream,
    *,
    config: LongspanConfig,
    out: str | Path,
    valid: Stream | None = None,
    length: int = 1024,
    batch: int = 8,
    steps: int = 1000,
    lr: float = 3e-4,
    warmup: int = 100,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    accumulate: int = 1,
    segments: bool = False,
    checkpointing: bool = False,
    log_every: int = 50,
    save_every: int | None = None,
    seed: int = 0,
    cpu: bool = False,
) -> Trainer:
    """A causal language model on a stream of bytes or token ids; `.train()` runs it.

    AdamW with betas 0.9 and 0.95 and a cosine from `lr` to 0. The weights depend on `seed` alone.

    Args:
        segments: read the stream in order and carry states from batch to batch.
        checkpointing: recompute layers in the backward pass.
        save_every: steps between checkpoints, by default none but the last.
        cpu: stay on the CPU where there is a GPU.

    Raises:
        LongspanError: a mechanism that a language model refuses; data shorter than a batch.
    """
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=lr,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
        logging_steps=log_every,
        save_strategy="steps",
        save_steps=save_every or steps,
        seed=seed,
        use_cpu=cpu,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not cpu and torch.cuda.is_available(),
        prediction_loss_only=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LongspanForCausalLM(config)
    model.to(device=arguments.device)  # pyright: ignore[reportCallIssue]
    if checkpointing:
        hub.recompute(model)
    optimizer = torch.optim.AdamW(
        parameter_groups(model, lr=lr, weight_decay=weight_decay), betas=(0.9, 0.95)
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, min(warmup, steps), steps)
    data: Any = Windows(train, length=length)
    if segments:
        data = Segments(train, batch=batch * arguments.world_size, length=length).rows()
    kind = SegmentTrainer if segments else NamedLosses
    return kind(
        model=model,
        args=arguments,
        train_dataset=data,
        eval_dataset=None if valid is None else Windows(valid, length=length),
        optimizers=(optimizer, schedule),
    )
