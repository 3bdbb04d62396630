"""Memory Transformers (Burtsev & Sapunov, 2020) for masked tokens and from sequence to sequence."""

import copy
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from longspan import hub, registry
from longspan.errors import LongspanError
from longspan.models.building import refuse_leaks
from longspan.models.config import LongspanConfig, Spec
from longspan.models.losses import MaskedOutput, Seq2SeqOutput, cross_entropy
from longspan.models.seq2seq import LongspanForSeq2SeqLM, Targets
from longspan.models.stack import LongspanModel, initialise, padding
from longspan.shapes import Inputs, Tokens


class MemoryConfig(LongspanConfig):
    """An encoder with memory, and for sequence to sequence a decoder as of any LongspanConfig.

    Args:
        slots: m. variant: `transformer`, `control` or `bottleneck`.
    """

    model_type = "longspan-memory-transformer"
    __no_type_check__ = True

    position: Spec | None = "sinusoidal-position"
    norm_order: Literal["pre", "post"] = "post"
    slots: int = 10
    variant: Literal["transformer", "control", "bottleneck"] = "transformer"


@dataclass
class MemoryOutput(BaseModelOutput):
    """The sequence's outputs; the memory's; and both, memory first, with their mask."""

    memory: Tensor | None = None
    whole: Tensor | None = None
    whole_mask: Tensor | None = None


class MemoryModel(hub.Pretrained):
    """Embedded tokens with their positions, and memory without, through the encoder."""

    config: MemoryConfig
    config_class = MemoryConfig
    _is_stateful = False
    supports_gradient_checkpointing = False

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        plain = copy.deepcopy(config)
        plain.layers, plain.causal, plain.is_encoder_decoder = 0, False, False
        self.embedding = LongspanModel(plain)  # of no layers: tokens and positions
        self.encoder = hub.settled(
            registry.build(
                "memory-transformer",
                width=config.width,
                heads=config.heads,
                layers=config.layers,
                slots=config.slots,
                variant=config.variant,
                inner=config.inner,
                dropout=config.dropout,
            )
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.embedding.embed_tokens = value

    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Inputs | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> MemoryOutput:
        """The mask is of the sequence alone; memory is always seen.

        Raises:
            LongspanError: hidden states or weights are asked for, which are not kept.
        """
        if output_hidden_states or output_attentions or return_dict is False:
            raise LongspanError("only outputs of the last layer are kept: leave the others out.")
        given = {"inputs_embeds": inputs_embeds, "use_cache": False, "return_dict": True}
        x = self.embedding(input_ids, attention_mask, **given).last_hidden_state
        keep = padding(attention_mask, x.shape[1])
        y, memory = self.encoder(x, keep=keep)
        mask = x.new_ones(len(x), memory.shape[1] + x.shape[1], dtype=torch.long)
        if keep is not None:
            mask[:, memory.shape[1] :] = keep
        whole = torch.cat([memory, y], 1)
        return MemoryOutput(y, memory=memory, whole=whole, whole_mask=mask)  # pyright: ignore


class MemoryForMaskedLM(hub.Pretrained):
    """The encoder with a masked-token head on the sequence; memory is cut off before it."""

    config: MemoryConfig
    config_class = MemoryConfig
    _is_stateful = False
    supports_gradient_checkpointing = False
    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.weight": "model.embedding.embed_tokens.weight"
    }

    def __init__(self, config: MemoryConfig) -> None:
        super().__init__(config)
        self.model = MemoryModel(config)
        self.lm_head = nn.Linear(config.width, config.vocab_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)

    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> MaskedOutput:
        logits = self.lm_head(self.model(input_ids, attention_mask).last_hidden_state)
        loss = None if labels is None else cross_entropy(logits, labels)
        return MaskedOutput(loss=loss, logits=logits)  # pyright: ignore[reportArgumentType]


class MemoryForSeq2SeqLM(LongspanForSeq2SeqLM):
    """The encoder, and a decoder that attends to all of memory and sequence (Sec. 3.1)."""

    config: MemoryConfig
    config_class = MemoryConfig
    _tied_weights_keys = {  # noqa: RUF012
        "decoder.embed_tokens.weight": "encoder.embedding.embed_tokens.weight",
        "lm_head.weight": "encoder.embedding.embed_tokens.weight",
    }
    supports_gradient_checkpointing = False

    def __init__(self, config: MemoryConfig) -> None:
        config = copy.deepcopy(config)
        config.is_encoder_decoder = True
        super(LongspanForSeq2SeqLM, self).__init__(config)
        refuse_leaks(config)
        self.encoder = MemoryModel(config)
        self.decoder = LongspanModel(config.side("decoder"), cross=True)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.set_input_embeddings(value)
        if self.config.tie_word_embeddings:
            self.decoder.embed_tokens = value

    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Targets | None = None,
        encoder_outputs: MemoryOutput | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Targets | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
    ) -> Seq2SeqOutput:
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask)
        assert encoder_outputs is not None
        return super().forward(
            attention_mask=encoder_outputs.whole_mask,
            decoder_input_ids=decoder_input_ids,
            encoder_outputs=(encoder_outputs.whole,),
            past_key_values=past_key_values,
            use_cache=use_cache,
            labels=labels,
            num_items_in_batch=num_items_in_batch,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=return_dict,  # pyright: ignore[reportCallIssue]
        )


class WithMemory(nn.Module):
    """A pretrained encoder of transformers with m tokens [mem] added to its vocabulary and put
    before every sequence, to be fine-tuned (Sec. 4.3): (sequence outputs, memory outputs).

    Where the encoder takes position_ids, tokens keep those they had and memory has the first.

    Raises:
        LongspanError: no tokens to add.

    >>> encoder = WithMemory(AutoModel.from_pretrained("bert-base-uncased"), slots=10)
    """

    def __init__(self, encoder: PreTrainedModel, *, slots: int) -> None:
        super().__init__()
        if slots < 1:
            raise LongspanError(f"{slots} memory tokens were asked for: give 1 or more.")
        table = encoder.get_input_embeddings()
        assert isinstance(table, nn.Embedding)
        size = table.num_embeddings
        encoder.resize_token_embeddings(size + slots, mean_resizing=False)
        self.encoder, self.slots = encoder, slots
        self.register_buffer("ids", torch.arange(size, size + slots), persistent=False)
        self.places = "position_ids" in inspect.signature(encoder.forward).parameters

    def forward(
        self, input_ids: Tokens, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        batch, length = input_ids.shape
        ids: Any = self.ids
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        given: dict[str, Tensor] = {
            "input_ids": torch.cat([ids.expand(batch, -1), input_ids], 1),
            "attention_mask": torch.cat([mask.new_ones(batch, self.slots), mask], 1),
        }
        if self.places:
            own = torch.arange(length, device=input_ids.device).expand(batch, -1)
            given["position_ids"] = torch.cat([own.new_zeros(batch, self.slots), own], 1)
        out = self.encoder(**given).last_hidden_state
        return out[:, self.slots :], out[:, : self.slots]


hub.register(
    MemoryConfig,
    {
        "AutoModel": MemoryModel,
        "AutoModelForMaskedLM": MemoryForMaskedLM,
        "AutoModelForSeq2SeqLM": MemoryForSeq2SeqLM,
    },
)
