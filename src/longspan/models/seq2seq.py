"""LongspanForSeq2SeqLM: an encoder, and a decoder that attends to its output."""

import copy
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.generation.utils import GenerationMixin

from longspan import hub
from longspan.errors import LongspanError
from longspan.models.building import refuse_leaks
from longspan.models.config import LongspanConfig
from longspan.models.losses import IGNORED, Seq2SeqOutput, cross_entropy, with_auxiliary
from longspan.models.stack import LongspanModel, initialise
from longspan.shapes import Inputs, Marks, Tokens

Targets = Int[Tensor, "B T"]


class LongspanForSeq2SeqLM(hub.Pretrained, GenerationMixin):
    """The encoder is tiled from `encoder_mixers`, the decoder from `mixers`, with dense
    cross-attention after each (Vaswani et al., 2017; LED: longformer in the encoder).

    Raises:
        LongspanError: a decoder mechanism without a strictly causal form, as in a causal LM.
    """

    _is_stateful = False  # as LongspanForCausalLM
    _tied_weights_keys = {  # noqa: RUF012
        "decoder.embed_tokens.weight": "encoder.embed_tokens.weight",
        "lm_head.weight": "encoder.embed_tokens.weight",
    }
    config: LongspanConfig

    def __init__(self, config: LongspanConfig) -> None:
        config = copy.deepcopy(config)
        config.is_encoder_decoder = True
        super().__init__(config)
        refuse_leaks(config)
        self.encoder = LongspanModel(config.side("encoder"))
        self.decoder = LongspanModel(config.side("decoder"), cross=True)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)

    @property
    def steps(self) -> bool:
        return self.decoder.steps

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.encoder.embed_tokens = value
        if self.config.tie_word_embeddings:
            self.decoder.embed_tokens = value

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Targets | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        inputs_embeds: Inputs | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Targets | None = None,
        marks: Marks | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> Seq2SeqOutput:
        """Logits of the decoder's positions, and the loss where labels are given.

        Args:
            decoder_input_ids: by default the labels, one place later, after
                `config.decoder_start_token_id`.
            encoder_outputs: an encoder's output, in place of its inputs.
            labels: B L, the targets themselves; −100 is ignored.
            marks: of the encoder's tokens.
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids,
                attention_mask,
                inputs_embeds=inputs_embeds,
                marks=marks,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                return_dict=True,
            )
        if decoder_input_ids is None:
            decoder_input_ids = delayed(labels, self.config)
        output = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            past_key_values=past_key_values,
            use_cache=use_cache,
            encoded=encoder_outputs[0],
            encoded_mask=attention_mask,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            return_dict=True,
        )
        logits = self.lm_head(output.last_hidden_state)
        loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        return Seq2SeqOutput(
            **with_auxiliary(self, loss, labels, num_items_in_batch),
            logits=logits,
            past_key_values=output.past_key_values,
            decoder_hidden_states=output.hidden_states,
            encoder_last_hidden_state=encoder_outputs[0],
            encoder_hidden_states=getattr(encoder_outputs, "hidden_states", None),
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Targets) -> Targets:
        """The decoder's input for these labels, as data collators ask for it."""
        return delayed(labels, self.config)


def delayed(labels: Targets | None, config: PreTrainedConfig) -> Targets:
    """A decoder's inputs for these labels: the same one place later, after the start token.

    Raises:
        LongspanError: no labels, or a config without `decoder_start_token_id`.
    """
    start = config.decoder_start_token_id
    if labels is None or start is None:
        lacks = "labels" if labels is None else "decoder_start_token_id in the config"
        raise LongspanError(f"the decoder has no input: give decoder_input_ids, or {lacks}.")
    # What stands at an ignored label is only ever seen by later, ignored ones.
    filler = start if config.pad_token_id is None else config.pad_token_id
    inputs = labels.masked_fill(labels == IGNORED, filler).roll(1, dims=1)
    inputs[:, 0] = start
    return inputs
