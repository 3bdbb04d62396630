"""Models with heads: next token, masked token, class of a sequence."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin

from longspan import hub
from longspan.errors import LongspanError
from longspan.models.building import refuse_leaks
from longspan.models.config import LongspanConfig
from longspan.models.losses import (
    IGNORED,
    CausalLMOutput,
    ClassifierOutput,
    MaskedOutput,
    cross_entropy,
    shifted,
    with_auxiliary,
)
from longspan.models.packing import document_starts
from longspan.models.stack import LongspanModel, initialise, padding
from longspan.nn import norm
from longspan.shapes import Inputs, Keep, Marks, Tokens


class _Headed(hub.Pretrained):
    config: LongspanConfig
    model: LongspanModel

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)
        if self.config.initialisation == "scaled" and module is self.get_output_embeddings():
            assert isinstance(module, nn.Linear)
            nn.init.zeros_(module.weight)

    @property
    def steps(self) -> bool:
        return self.model.steps


class _Scored(_Headed):
    """A head on the hidden states of whole sequences; the last two methods say which."""

    gives: ClassVar[type[MaskedOutput | ClassifierOutput]]

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Inputs | None = None,
        labels: Tensor | None = None,
        marks: Marks | None = None,
        documents: Int[Tensor, "..."] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Any:
        """Logits, and the loss where labels are given, with what parts of the model add to it.

        −100 is ignored among tokens' labels.

        Raises:
            LongspanError: inputs that contradict each other, the mechanisms or the head.
        """
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            use_cache=False,
            marks=marks,
            documents=documents,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        x = output.last_hidden_state
        logits = self._logits(x, padding(attention_mask, x.shape[1]), documents)
        loss = None if labels is None else self._loss(logits, labels, num_items_in_batch)
        return self.gives(
            **with_auxiliary(self, loss, labels, num_items_in_batch),
            logits=logits,
            hidden_states=output.hidden_states,
        )

    @abstractmethod
    def _logits(self, x: Inputs, keep: Keep | None, documents: Tensor | None) -> Tensor: ...

    @abstractmethod
    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor: ...


class LongspanForCausalLM(_Headed, GenerationMixin):
    """A decoder with a next-token head (Radford et al., 2018).

    Raises:
        LongspanError: a mechanism without a causal form, or whose causal form sees the future
            while the config does not say allow_leaks=True.

    >>> model = LongspanForCausalLM(LongspanConfig(mixers=["linear-transformer"]))
    >>> model.generate(prompt, max_new_tokens=100, do_sample=True)
    """

    _is_stateful = False  # its cache takes tokens back, which is all that transformers asks
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongspanConfig) -> None:
        config = config.alone(causal=True)
        super().__init__(config)
        refuse_leaks(config)
        self.model = LongspanModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Inputs | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tokens | None = None,
        marks: Marks | None = None,
        documents: Int[Tensor, "..."] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> CausalLMOutput:
        """Logits B L vocabulary, the loss where labels are given, and the carried state.

        What parts of the model add to the loss stands in `auxiliary` by name.

        Args:
            labels: B L, the inputs themselves; −100 is ignored, and so is with `documents` the
                first token of each.
            num_items_in_batch: divides the summed loss in place of the number of labels.
            logits_to_keep: the last so many positions get logits; 0 for all.
        """
        if logits_to_keep and labels is not None:
            raise LongspanError("a loss needs all logits: leave logits_to_keep out.")
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            past_key_values,
            use_cache,
            marks,
            documents,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            if documents is not None:
                labels = labels.masked_fill(document_starts(documents), IGNORED)
            loss = cross_entropy(logits, shifted(labels), num_items_in_batch)
        return CausalLMOutput(
            **with_auxiliary(self, loss, labels, num_items_in_batch),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )


class LongspanForMaskedLM(_Scored):
    """A bidirectional encoder with a masked-token head: linear, gelu, norm, tied embedding, bias
    (Devlin et al., 2019)."""

    gives = MaskedOutput
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: LongspanConfig) -> None:
        config = config.alone(causal=False)
        super().__init__(config)
        self.model = LongspanModel(config)
        self.transform = nn.Sequential(
            nn.Linear(config.width, config.width), nn.GELU(), norm(config.norm, config.width)
        )
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def _logits(self, x: Inputs, keep: Keep | None, documents: Tensor | None) -> Tensor:
        return self.lm_head(self.transform(x))

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        return cross_entropy(logits, labels, items)


class LongspanForSequenceClassification(_Scored):
    """One label, several labels or a number for a whole sequence, from its pooled tokens.

    Bidirectional unless `config.causal`; `config.pooling` says how tokens are pooled, and
    `config.problem_type` the loss: where None, one label is a number (mean square), whole-numbered
    labels are classes (cross-entropy), and others are several labels each 0 or 1 (one for each).
    """

    gives = ClassifierOutput
    accepts_loss_kwargs = False

    def __init__(self, config: LongspanConfig) -> None:
        config = config.alone(causal=bool(config.causal))
        super().__init__(config)
        self.model = LongspanModel(config)
        self.pooling = config.pooling or ("last" if config.causal else "mean")
        self.dropout = nn.Dropout(config.dropout)
        self.score = nn.Linear(config.width, config.num_labels or 1)
        self.post_init()

    def _logits(self, x: Inputs, keep: Keep | None, documents: Tensor | None) -> Tensor:
        if documents is not None:
            raise LongspanError(
                "a row gets one label, and packed documents would be pooled together: give each "
                "document a row of its own."
            )
        return self.score(self.dropout(pool(x, keep, self.pooling)))

    def _loss(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Tensor:
        config, logits = self.config, logits.float()
        if config.problem_type is None:
            whole = not (labels.is_floating_point() or labels.dtype == torch.bool)
            single = "single_label_classification" if whole else "multi_label_classification"
            config.problem_type = "regression" if config.num_labels == 1 else single
        match config.problem_type:
            case "regression":
                return F.mse_loss(logits, labels.float().view_as(logits))
            case "single_label_classification":
                return F.cross_entropy(logits, labels.view(-1))
            case _:
                return F.binary_cross_entropy_with_logits(logits, labels.float())


def pool(x: Inputs, keep: Keep | None, how: str) -> Float[Tensor, "B E"]:
    """The mean, the first or the last of the kept tokens of each row; zeros where there is none."""
    if keep is None:
        keep = x.new_ones(x.shape[:2], dtype=torch.bool)
    if how == "mean":
        count = keep.sum(1, keepdim=True).clamp(min=1)
        return x.masked_fill(~keep[..., None], 0).sum(1) / count
    place = torch.arange(x.shape[1], device=x.device).expand_as(keep)
    if how == "first":
        at = place.masked_fill(~keep, x.shape[1] - 1).amin(1)
    else:
        at = place.masked_fill(~keep, 0).amax(1)
    picked = x[torch.arange(len(x), device=x.device), at]
    return picked.masked_fill(~keep.any(1, keepdim=True), 0)
