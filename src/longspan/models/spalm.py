"""SPALM whole: a Transformer-XL and the tokens that followed similar contexts, joined by a gate."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from longspan import hub, registry
from longspan.errors import LongspanError
from longspan.models.config import LongspanConfig
from longspan.models.heads import LongspanForCausalLM
from longspan.models.losses import CausalLMOutput, cross_entropy, shifted, with_auxiliary
from longspan.nn.retrieval import Base, Found
from longspan.shapes import Tokens


class SpalmConfig(LongspanConfig):
    """A `LongspanConfig` whose layers are by default a Transformer-XL's, and the reader's gate.

    Args:
        gate: a fixed one in place of the learned; 1 is the backbone alone.

    Raises:
        LongspanError: an output embedding that is not the input's.
    """

    model_type = "longspan-spalm"
    __no_type_check__ = True

    gate: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if tuple(self.mixers) == ("multi-head-attention",):
            self.mixers, self.position = ("transformer-xl",), None
        super().__post_init__(**kwargs)
        if not self.tie_word_embeddings:
            raise LongspanError(
                "SPALM reads neighbours through the output embedding, which is to be the input's: "
                "leave tie_word_embeddings=True."
            )


class SpalmForCausalLM(LongspanForCausalLM):
    """A language model that is told neighbours' tokens at each position (Yogatama et al., 2021).

    They come from another, frozen model's keys: `retrieval.neighbours` finds them for a stream,
    once, `own=` excluding each position itself where the stream is the stored one. Segments carry
    the Transformer-XL's memory as in every model here.

    >>> store.read(encoder, tokens)
    >>> found = neighbours(encoder, tokens, Stored(store, 4, own=0)).values
    >>> model(tokens[None, :-1], neighbours=found, labels=tokens[None, :-1]).loss
    """

    config_class = SpalmConfig

    def __init__(self, config: SpalmConfig) -> None:
        super().__init__(config)
        self.reader = registry.build("spalm", width=config.width, gate=config.gate)
        self.post_init()

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        neighbours: Int[Tensor, "B _ K"] | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        labels: Tokens | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
    ) -> CausalLMOutput:
        """Log-probabilities of next tokens as logits, the loss where labels are given, the state.

        Args:
            neighbours: tokens found for each position, −1 where there is none; None for none.
            labels: as in `LongspanForCausalLM`.

        Raises:
            LongspanError: neighbours of other positions than the inputs'.
        """
        output = self.model(
            input_ids,
            attention_mask,
            None,
            None,
            past_key_values,
            use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        x = output.last_hidden_state
        logits = self.reader(self.base(x), self.found(x, neighbours))
        loss = None
        if labels is not None:
            loss = cross_entropy(logits, shifted(labels), num_items_in_batch)
        return CausalLMOutput(
            **with_auxiliary(self, loss, labels, num_items_in_batch),
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )

    def base(self, x: Tensor) -> Base:
        """What the backbone gives the reader, from its last hidden states."""
        return Base(self.lm_head(x), x, self.lm_head.weight)

    def found(self, x: Tensor, neighbours: Tensor | None) -> Found:
        """Tokens as a reader takes them; SPALM asks for no scores."""
        if neighbours is None:
            neighbours = torch.full((*x.shape[:2], 0), -1, device=x.device)
        if neighbours.shape[:2] != x.shape[:2]:
            raise LongspanError(
                f"neighbours of {tuple(neighbours.shape[:2])} positions were given for inputs of "
                f"{tuple(x.shape[:2])}: give K for each."
            )
        return Found(x.new_zeros(neighbours.shape), neighbours)


hub.register(SpalmConfig, {"AutoModelForCausalLM": SpalmForCausalLM})
