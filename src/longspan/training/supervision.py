"""Losses at the layers between and of tokens further ahead (Al-Rfou et al., 2018)."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import TrainerCallback

from longspan.errors import LongspanError
from longspan.models.heads import LongspanForCausalLM
from longspan.models.losses import IGNORED, CausalLMOutput, cross_entropy, shifted
from longspan.shapes import Tokens


def supervised(layers: int, progress: float) -> list[int]:
    """The layers, from 1, that have a loss of their own at a fraction of training.

    Layer l of n until l / 2n, the last to the end (Al-Rfou et al., 2018, Sec. 3.2).

    >>> supervised(4, progress=0.3)
    [3, 4]
    """
    between = [layer for layer in range(1, layers) if progress < layer / (2 * layers)]
    return [*between, layers]


class DeepSupervision(nn.Module):
    """A causal language model that is trained to predict from every layer, and further ahead.

        loss = Σ_l (NLL(x_{t+1} | h_l) + Σ_c weight_c NLL(x_{t+1+c} | h_l))

    over the layers of `supervised`, which share the model's norm and softmax; each further token c
    has a head of its own (Secs. 3.1 to 3.3). In evaluation it is the model. What is added to the
    model's loss stands in the output's `auxiliary`, by name. Train it with `Progressing`, which
    sets `progress`, and save `.model`.

    Args:
        between: losses at the layers between.
        ahead: the weight of each token further ahead: the paper's is one, of 0.5.

    Raises:
        LongspanError: a negative weight.
    """

    def __init__(
        self, model: LongspanForCausalLM, *, between: bool = True, ahead: Sequence[float] = (0.5,)
    ) -> None:
        super().__init__()
        if min(ahead, default=0.0) < 0:
            raise LongspanError(f"ahead={tuple(ahead)}: expected weights of at least 0.")
        self.model, self.between, self.ahead = model, between, tuple(ahead)
        width, vocabulary = model.config.width, model.config.vocab_size
        self.heads = nn.ModuleList(nn.Linear(width, vocabulary, bias=False) for _ in ahead)
        for weight in self.heads.parameters():
            nn.init.normal_(weight, std=model.config.initializer_range)
        self.progress = 0.0

    def forward(
        self,
        input_ids: Tokens,
        attention_mask: Tensor | None = None,
        labels: Tokens | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> CausalLMOutput:
        output = self.model(
            input_ids,
            attention_mask,
            use_cache=False,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
            output_hidden_states=True,
            return_dict=True,
        )
        if labels is None or not self.training:
            return output
        assert output.loss is not None
        last = len(output.hidden_states) - 1  # the first is the embedding
        named: dict[str, Tensor] = {}
        for layer in supervised(last, self.progress) if self.between else [last]:
            x = output.hidden_states[layer]
            x = x if layer == last else self.model.model.norm(x)
            if layer < last:
                logits = self.model.lm_head(x)
                named[f"layer {layer}"] = cross_entropy(logits, shifted(labels), num_items_in_batch)
            for c, (weight, head) in enumerate(zip(self.ahead, self.heads, strict=True), 1):
                target = F.pad(labels[:, c + 1 :], (0, min(c + 1, labels.shape[1])), value=IGNORED)
                loss = weight * cross_entropy(head(x), target, num_items_in_batch)
                name = f"{c + 1} ahead"
                named[name] = named[name] + loss if name in named else loss
        output.loss = sum(named.values(), start=output.loss)
        parts = {name: value.detach() for name, value in named.items()}
        output.auxiliary = {**(output.auxiliary or {}), **parts}
        return output


class Progressing(TrainerCallback):
    """Tells `DeepSupervision` before each step how much of training is done."""

    def on_step_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any
    ) -> None:
        for module in model.modules():
            if isinstance(module, DeepSupervision):
                module.progress = state.global_step / max(state.max_steps, 1)
