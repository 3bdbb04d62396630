"""LongspanModel: an embedding and a stack of blocks, whatever they mix with."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from longspan import hub, registry
from longspan.engines.given import Lent
from longspan.errors import LongspanError
from longspan.models.axes import AxisPosition
from longspan.models.building import (
    build_among,
    ids,
    position_of,
    remembering,
    require_form,
    sizes_of,
    steps_on,
)
from longspan.models.config import LongspanConfig, Spec, split
from longspan.models.packing import packing, places, refuse_restarts
from longspan.nn import FeedForward, Mixer, MultiHead, Position, Remember, norm
from longspan.nn.depth import Depth, step_of
from longspan.nn.residual import Residual, Reversible
from longspan.shapes import Inputs, Keep, Marks, Tokens

Part = TypeVar("Part", bound=nn.Module)


def padding(mask: Tensor | None, length: int) -> Keep | None:
    """The bool mask of the last `length` positions; None where nothing is known to be padded.

    Raises:
        LongspanError: a mask that is not B × (at least length).
    """
    if mask is None:
        return None
    if mask.dim() != 2 or mask.shape[1] < length:
        raise LongspanError(
            f"attention_mask is {tuple(mask.shape)} for {length} tokens; expected one number per "
            "row and token, 1 for real tokens and 0 for padding."
        )
    keep = mask[:, -length:].bool() if length else mask[:, :0].bool()
    # Asking would make a GPU wait; on a CPU it is cheap and opens the unmasked, faster ways.
    return None if keep.device.type == "cpu" and bool(keep.all()) else keep


class LongspanModel(hub.Pretrained):
    """Token embedding, blocks and a final norm; the base of the models with heads.

    `config.causal` decides the form; where None, it is bidirectional.

    Args:
        cross: give every block a second mixer, which attends to an encoder's output.
    """

    config: LongspanConfig

    def __init__(self, config: LongspanConfig, *, cross: bool = False) -> None:
        super().__init__(config)
        self.causal = bool(config.causal)
        width, kind = config.width, config.norm
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.position = self._embedding_position()
        self.dropout = nn.Dropout(config.dropout)
        residual = self._residual()
        self.streams = self._streams(residual)
        self.layers = nn.ModuleList(
            hub.Layer(
                self._mixer(spec),
                self._feed_forward(),
                width=width,
                order=config.norm_order,
                norms=kind,
                dropout=config.dropout,
                cross=self._cross() if cross else None,
                residual=residual if self.streams is None else None,
            )
            for spec in config.tiled()
        )
        self.depth = self._depth()
        self.norm = norm(kind, width) if config.norm_order == "pre" else nn.Identity()
        self.gradient_checkpointing = False
        if all(registry.show(id_).causality != "selection" for id_ in ids(config)):
            # The others select by the pieces they are fed in, and would not come back the same.
            hub.replaying(self)
        self.post_init()

    def _embedding_position(self) -> Position | None:
        config, position = self.config, position_of(self.config, causal=self.causal)
        if position is not None and not position.acts & {"embed", "enter"}:
            position = None
        if config.axes is not None:
            if position is not None:
                raise LongspanError(
                    "axes and a position that embeds both add to the embeddings: give position="
                    "None, or one that rotates or biases."
                )
            position = AxisPosition(
                config.axes,
                width=config.width,
                std=deviation(config, len(config.axes) * config.width),
            )
        return None if position is None else hub.settled(position)

    def _residual(self) -> Callable[[], Residual] | None:
        if self.config.residual is None:
            return None
        id_, options = split(self.config.residual)
        return lambda: hub.settled(build_among(id_, {"width": self.config.width}, options))

    def _streams(self, residual: Callable[[], Residual] | None) -> Reversible | None:
        """What gives the stack two streams, where its residual is reversible."""
        streams = None if residual is None else residual()
        if not isinstance(streams, Reversible):
            return None
        if (streams.enters, streams.leaves) != ("duplicate", "mean"):
            raise LongspanError(
                f"residual enters by {streams.enters} and leaves by {streams.leaves}, which "
                "changes the width: a model takes enter='duplicate', leave='mean'."
            )
        enters = self.position is not None and "enter" in self.position.acts
        if self.config.norm_order == "post" or self.config.sharing is not None or enters:
            raise LongspanError(
                "reversible layers need what can be undone: norm_order='pre', sharing=None and a "
                "position that adds nothing between layers."
            )
        return streams

    def _mixer(self, spec: Spec) -> Mixer:
        built = self._settled(remembering(spec, config=self.config, causal=self.causal))
        memory, _ = self.config.wrapping
        return Remember(built, memory=memory) if isinstance(memory, int) else built

    def _depth(self) -> Depth | None:
        """What drives the layers, where they do not simply follow each other."""
        config, (_, depth) = self.config, self.config.wrapping
        if depth is None:
            return None
        enters = self.position is not None and "enter" in self.position.acts
        if config.residual is not None or config.sharing is not None or enters:
            raise LongspanError(
                "layers that positions leave one by one need residual=None, sharing=None and a "
                "position that adds nothing between layers."
            )
        id_, options = split(depth)
        require_form(id_, causal=self.causal)
        offered = sizes_of(config) | {"layers": config.layers}
        return hub.settled(build_among(id_, offered, options))

    def _feed_forward(self) -> FeedForward:
        config = self.config
        built = FeedForward(
            config.width,
            inner=config.inner,
            activation=config.activation,
            gated=config.gated,
            dropout=config.dropout,
        )
        return self._settled(built.apply(self._init_weights))

    def _cross(self) -> Mixer:
        config = self.config
        return self._settled(
            MultiHead(
                registry.build("multi-head-attention"),
                width=config.width,
                heads=config.heads,
                head_width=config.head_width,
                kv_heads=config.kv_heads,
            )
        )

    def _settled(self, part: Part) -> Part:
        """Keeps the part's own weights; scales what goes from it into the residual (GPT-2)."""
        if isinstance(part, MultiHead) and self.config.initialisation == "scaled":
            for linear in (*part.project.values(), part.output):
                self._init_weights(linear)
        output = None
        if isinstance(part, MultiHead | FeedForward):
            output = part.output if isinstance(part, MultiHead) else part.down
        if output is not None and self.config.norm_order == "pre":
            with torch.no_grad():
                output.weight.div_((2 * self.config.layers) ** 0.5)
        return hub.settled(part)

    def _init_weights(self, module: nn.Module) -> None:
        initialise(module, self.config)

    @property
    def steps(self) -> bool:
        return self.causal and steps_on(self.config)

    @hub.can_return_tuple
    def forward(
        self,
        input_ids: Tokens | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Inputs | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        marks: Marks | None = None,
        documents: Int[Tensor, "..."] | None = None,
        encoded: Tensor | None = None,
        encoded_mask: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPast:
        """Hidden states B L E, and the carried state.

        Args:
            attention_mask: B L, or B (past + L); 1 for real tokens, padding on either side.
            position_ids: B L, for positions that embed; the others count for themselves.
            past_key_values: a `StateCache`, filled in place.
            marks: tokens that the mechanism treats apart (Longformer's global tokens).
            documents: B L; runs of equal numbers are documents, which do not see each other.
            encoded, encoded_mask: an encoder's output and its padding.

        Raises:
            LongspanError: inputs that contradict each other or the mechanisms.
        """
        if output_attentions:
            raise LongspanError(
                "attention weights are not kept: most mechanisms never form them. "
                "Leave output_attentions out."
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise LongspanError("give either input_ids or inputs_embeds, and not both.")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        keep = padding(attention_mask, length)
        if documents is not None:
            if past_key_values is not None or use_cache:
                raise LongspanError(
                    "packed documents carry no state from call to call: leave out past_key_values "
                    "and use_cache, or give each document a row of its own."
                )
            return self._packed(
                x, documents, keep, position_ids, marks, encoded, output_hidden_states
            )
        use_cache = self._caches(past_key_values, use_cache)
        cache = hub.cache_of(past_key_values, batch) if use_cache else hub.StateCache()
        seen = x.new_zeros(batch, dtype=torch.long) if cache.seen is None else cache.seen
        if position_ids is not None and cache.seen is None:
            refuse_restarts(position_ids, keep)
        position = self.position
        pos = places(seen, keep, length) if position_ids is None else position_ids
        pos = pos.expand(batch, length)
        if position is not None and "embed" in position.acts:
            x = position.embed(x, pos)
        x = self.dropout(x)
        encoded_keep = None if encoded is None else padding(encoded_mask, encoded.shape[1])
        states = cache.states or (None,) * len(self.layers)
        carried, hidden = [], [x]
        lends, weights = self.config.sharing is not None, None
        if self.streams is not None:
            around = keep, marks, encoded, encoded_keep
            x, between = self._reversible(
                self.streams,
                x,
                states,
                carried if use_cache else None,
                output_hidden_states,
                around,
            )
            hidden += between
        elif self.depth is not None:
            if output_hidden_states:
                raise LongspanError(
                    "positions leave after layers of their own, and what is between layers is not "
                    "kept: leave output_hidden_states out."
                )
            steps = [
                step_of(
                    layer,  # pyright: ignore[reportArgumentType]
                    keep=keep,
                    marks=marks,
                    encoded=encoded,
                    encoded_keep=encoded_keep,
                )
                for layer in self.layers
            ]
            x, carried, _ = self.depth(steps, x, cache.states, keep=keep)
        else:
            for n, (layer, state) in enumerate(zip(self.layers, states, strict=True)):
                if position is not None and "enter" in position.acts:
                    x = position.enter(x, pos, n)
                state = Lent(weights, state) if lends else state
                # The input goes by position: recomputation tracks the gradients of those alone.
                x, state = layer(
                    x, state, keep=keep, marks=marks, encoded=encoded, encoded_keep=encoded_keep
                )
                weights, state = state if lends else (None, state)
                carried.append(state if use_cache else None)
                if output_hidden_states:
                    hidden.append(x)
        x = self.norm(x)
        if use_cache:
            new = length if keep is None else keep.sum(1)
            cache.update_states(tuple(carried), seen + new, length)
        return BaseModelOutputWithPast(
            last_hidden_state=x,  # pyright: ignore[reportArgumentType]
            past_key_values=cache if use_cache else None,
            hidden_states=(*hidden[:-1], x) if output_hidden_states else None,
        )

    def _reversible(
        self,
        streams: Reversible,
        x: Tensor,
        states: Any,
        carried: list[Any] | None,
        between: bool | None,
        around: tuple[Keep | None, Marks | None, Tensor | None, Keep | None],
    ) -> tuple[Tensor, list[Tensor]]:
        """x after all layers, and after each where asked for; new states go to `carried`."""
        keep, marks, encoded, encoded_keep = around
        layers = [
            layer.steps(  # pyright: ignore[reportCallIssue]
                state,
                carry=None if carried is None else carried.append,
                keep=keep,
                marks=marks,
                encoded=encoded,
                encoded_keep=encoded_keep,
            )
            for layer, state in zip(self.layers, states, strict=True)
        ]
        # A run keeps nothing between its layers: what is asked for ends a run.
        runs = layers if between else [[step for steps in layers for step in steps]]
        first, second = streams.enter(x)
        after = []
        for steps in runs:
            first, second = streams.through(steps, first, second)
            after.append(streams.leave(first, second))
        return after[-1] if after else x, after

    def _packed(
        self,
        x: Tensor,
        documents: Tensor,
        keep: Keep | None,
        position_ids: Tensor | None,
        marks: Marks | None,
        encoded: Tensor | None,
        output_hidden_states: bool | None,
    ) -> BaseModelOutputWithPast:
        if encoded is not None:
            raise LongspanError("packed documents cannot attend to an encoder: give rows instead.")
        if documents.shape != x.shape[:2]:
            raise LongspanError(
                f"documents is {tuple(documents.shape)} for input of {tuple(x.shape[:2])}; "
                "expected a number per token."
            )
        plan = packing(documents, keep)
        output = self(
            inputs_embeds=plan.unpack(x),
            attention_mask=plan.keep,
            position_ids=None if position_ids is None else plan.unpack(position_ids),
            use_cache=False,
            marks=None if marks is None else plan.unpack(marks),
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden = output.hidden_states
        return BaseModelOutputWithPast(
            last_hidden_state=plan.repack(output.last_hidden_state),  # pyright: ignore[reportArgumentType]
            hidden_states=hidden and tuple(plan.repack(h) for h in hidden),
        )

    def _caches(self, past: Any, wanted: bool | None) -> bool:
        """Whether to carry a state, given what was asked for."""
        if wanted is None:
            wanted = past is not None or (
                self.steps and self.config.use_cache and not self.training
            )
        if (wanted or past is not None) and not self.steps:
            form = "has no state to carry" if self.causal else "is bidirectional"
            raise LongspanError(
                f"this model ({', '.join(dict.fromkeys(ids(self.config)))}) {form}: "
                "use_cache=False, and no past_key_values."
            )
        if past is not None and not wanted:
            raise LongspanError(
                "past_key_values came with use_cache=False: the state would be neither used nor "
                "kept. Leave one of the two out."
            )
        return wanted


def initialise(module: nn.Module, config: LongspanConfig) -> None:
    """Normal weights and zero biases (Radford et al., 2018)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=deviation(config, module.weight.shape[1]))
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def deviation(config: LongspanConfig, inputs: int) -> float:
    """The standard deviation of weights that start for so many inputs, or of tables so wide."""
    return 0.125 / inputs**0.5 if config.initialisation == "scaled" else config.initializer_range
