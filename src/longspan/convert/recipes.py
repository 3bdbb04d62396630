"""Training what a swap brought in."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from longspan.convert.swap import original
from longspan.convert.swapped import Swapped
from longspan.errors import LongspanError
from longspan.models.stack import padding
from longspan.shapes import Inputs, Tokens


def distil(
    model: PreTrainedModel,
    train: Dataset[dict[str, Tensor]],
    *,
    out: str | Path,
    batch: int = 1,
    steps: int = 100,
    lr: float = 1e-2,
    log_every: int = 10,
    seed: int = 0,
    cpu: bool = False,
) -> Trainer:
    """Teach each swapped layer alone what the attention it replaced puts out; `.train()` runs it.

        loss = mean over swapped layers of ‖y − ŷ‖² / ‖y‖²,  y of the original, ŷ of the swapped

    Both read what the layer gets in the model before the swap, so that no layer learns from the
    errors of another, and only what the swap brought in is trained (attention transfer: Zhang et
    al., LoLCATs, 2024, Sec. 3.1; there y is a head's output before W_o and the error absolute).
    AdamW at a constant rate; nothing is dropped out.

    Args:
        train: examples with input_ids, and attention_mask where they are padded, as
            `longspan.data.Windows` of token ids.
        out: Trainer's folder; weights are saved by model.save_pretrained.

    Raises:
        LongspanError: nothing swapped, or nothing in it to train; several devices or processes.

    >>> swap(model, "t2r", layers=slice(0, 4))
    >>> distil(model, Windows(ids, length=512), out="runs/t2r", steps=200).train()
    """
    parameters = [p for part in _swapped(model).values() for p in _brought(part)]
    if not parameters:
        raise LongspanError(
            "what was swapped in has no parameters to learn by: swap in a mechanism that has "
            "(t2r, rfa), or train the whole model by transformers' Trainer."
        )
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=lr,
        lr_scheduler_type="constant",
        per_device_train_batch_size=batch,
        logging_steps=log_every,
        save_strategy="no",
        seed=seed,
        use_cpu=cpu,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=not cpu and torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1 or arguments.world_size > 1:
        raise LongspanError(
            f"distillation runs on one device and found {max(arguments.n_gpu, 1)} in "
            f"{arguments.world_size} processes: set CUDA_VISIBLE_DEVICES to one, in one process."
        )
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    return _Distilling(
        model=model, args=arguments, train_dataset=train, optimizers=(optimizer, None)
    )


class _Distilling(Trainer):
    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        assert isinstance(model, PreTrainedModel)
        trained, ids, mask = model.training, inputs["input_ids"], inputs.get("attention_mask")
        model.eval()
        try:
            calls, keep = _calls(model, ids, mask), padding(mask, ids.shape[1])
            errors = []
            for path, part in _swapped(model).items():
                call = calls[path]
                with _alone(part):
                    found, _ = part(call.x, **{**call.named, "attention_mask": mask})
                real = slice(None) if keep is None else keep
                found, want = found[real].float(), call.y[real].float()
                errors.append((found - want).square().sum() / want.square().sum())
            loss = torch.stack(errors).mean()
        finally:
            model.train(trained)
        return (loss, {"errors": torch.stack(errors)}) if return_outputs else loss


class _Enough(Exception):
    """Ends a forward pass when every attention that was swapped has been heard."""


class _Call(NamedTuple):
    """What an attention was given, and what it put out."""

    x: Inputs
    named: dict[str, Any]
    y: Inputs


@torch.no_grad()
def _calls(model: PreTrainedModel, ids: Tokens, mask: Tensor | None) -> dict[str, _Call]:
    """Of each attention that was swapped, in the model as it was before."""
    paths = list(_swapped(model))
    calls: dict[str, _Call] = {}

    def listen(path: str) -> Any:
        def hear(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], given: Any) -> None:
            named = {**named, "past_key_values": None}
            x = args[0] if args else named.pop("hidden_states")
            calls[path] = _Call(x, named, given[0])
            if len(calls) == len(paths):
                raise _Enough

        return hear

    base: Any = model.base_model
    with original(model):
        hooks = [
            base.get_submodule(path).register_forward_hook(listen(path), with_kwargs=True)
            for path in paths
        ]
        try:
            base(input_ids=ids, attention_mask=mask)
        except _Enough:
            pass
        finally:
            for hook in hooks:
                hook.remove()
    return calls


def _swapped(model: PreTrainedModel) -> dict[str, Swapped]:
    parts = model.base_model.named_modules()
    found = {path: part for path, part in parts if isinstance(part, Swapped)}
    if not found:
        raise LongspanError("nothing in this model was swapped: convert.swap(model, …) first.")
    return found


def _brought(part: Swapped) -> list[nn.Parameter]:
    """The parameters that the swap brought in and that learn."""
    parameters = (*part.mechanism.parameters(), *part.extra.parameters())
    return [p for p in parameters if p.requires_grad]


@contextmanager
def _alone(part: Swapped) -> Iterator[None]:
    """Gradients of what the swap brought in, and none of the original's projections."""
    own = {id(p) for p in _brought(part)}
    others = [p for p in part.parameters() if p.requires_grad and id(p) not in own]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)
