"""Swapped: a mechanism in the place of a pretrained attention, between that one's projections."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Set
from typing import Any, ClassVar, Literal, NamedTuple

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.hub.swapped import StateLayer, state_layer
from longspan.models.stack import padding
from longspan.nn import Attention
from longspan.shapes import Inputs

Origin = Literal["q", "k", "v"]


class Sizes(NamedTuple):
    """E, H, key-value heads and D of a pretrained attention."""

    width: int
    heads: int
    kv_heads: int
    head_width: int


class Swapped(nn.Module, ABC):
    """y = W_o [o_1; …; o_H], o = mechanism(q, k, v), q, k and v as the original makes them.

    The original's parts stay the same modules under the same names, so that state-dict keys are
    its own; beside them stand those of `mechanism` and of the `extra` projections it wants, which
    start as copies. Subclasses are the name maps of architectures.

    Attributes:
        types: model types they serve. place: path of layer i's attention in the base model.
        known: fields of the configuration that are honoured or do not concern the attention.
        neutral: further fields, and the one value at which they change nothing.
        drops: the field that says how many attention weights are dropped.
        original: what stood here, in a tuple, so that it is neither saved nor trained twice.
    """

    types: ClassVar[Set[str]]
    place: ClassVar[str]
    known: ClassVar[Set[str]]
    neutral: ClassVar[Mapping[str, Any]] = {}
    drops: ClassVar[str]

    def __init__(self, original: Any, mechanism: Attention, *, id_: str, undropped: float) -> None:
        super().__init__()
        for name, part in original.named_children():
            self.add_module(name, part)
        self.id, self.layer, self.sizes = id_, original.layer_idx, self.measure(original)
        self.original: tuple[nn.Module] = (original,)
        # Mechanisms divide scores by √D themselves.
        self.scale = original.scaling * self.sizes.head_width**0.5
        # How many weights the original drops that the mechanism has no way to.
        self.undropped = undropped
        like = next(original.parameters())
        self.mechanism = mechanism.to(like.device, like.dtype)
        self.extra = nn.ModuleDict(
            {name: self.copied(origin) for name, origin in mechanism.extra.items()}
        )
        self.train(original.training)

    @classmethod
    @abstractmethod
    def measure(cls, original: Any) -> Sizes: ...

    @abstractmethod
    def project(self, x: Inputs) -> dict[Origin, Tensor]:
        """B L (H D) each."""

    @abstractmethod
    def copied(self, origin: Origin) -> nn.Linear:
        """A copy of the projection, of its own parameters."""

    def normed(self, t: Tensor, origin: Origin) -> Tensor:
        """Heads of queries or keys, B H L D, as they are before positions."""
        return t

    def turned(self, t: Tensor, positions: Any) -> Tensor:
        """Heads of queries or keys by the positions that the model hands to its attentions."""
        return t

    def output(self, o: Float[Tensor, "B L HD"]) -> Inputs:
        return o

    def forward(
        self,
        hidden_states: Inputs,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: Any = None,
        global_attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        **_: Any,  # transformers hands every layer what any layer may want
    ) -> tuple[Inputs, None]:
        """(y, None), and the state into `past_key_values`, in place.

        Args:
            global_attention_mask: B L, nonzero where a token is global, for longformer's.

        Raises:
            LongspanError: attention weights asked for, or dropped out where they are not formed; a
                mask that is not one of padding; a state where there is none.
        """
        mechanism, x = self.mechanism, hidden_states
        self._check(output_attentions, global_attention_mask)
        keep = padding(attention_mask, x.shape[1])
        cached = self._cached(past_key_values, x.shape[0])
        if keep is not None:
            # Padding may hold anything: it must reach neither the products nor their gradients.
            x = x.masked_fill(~keep[..., None], 0)

        def heads(t: Tensor, origin: Origin) -> Tensor:
            t = rearrange(t, "B L (H D) -> B H L D", D=self.sizes.head_width)
            if origin != "v":
                t = self.normed(t, origin)
                t = t if mechanism.takes_turns else self.turned(t, position_embeddings)
            copies = 1 if mechanism.grouped or origin == "q" else self.sizes.heads // t.shape[1]
            return t.repeat_interleave(copies, dim=1) if copies > 1 else t

        parts = {origin: heads(t, origin) for origin, t in self.project(x).items()}
        hooks: dict[str, Any] = {
            name: heads(self.extra[name](x), origin) for name, origin in mechanism.extra.items()
        }
        if mechanism.takes_turns:
            hooks["turns"] = (lambda t: self.turned(t, position_embeddings),) * 2
        if global_attention_mask is not None:
            hooks["marks"] = global_attention_mask.bool()
        q = parts["q"] if self.scale == 1 else parts["q"] * self.scale
        k = q if mechanism.shared else parts["k"]
        before = None if cached is None else cached.state
        o, state = mechanism(q, k, parts["v"], before, keep=keep, **hooks)
        if cached is not None:
            cached.take(state, x.shape[1])
        y = self.output(rearrange(o, "B H L D -> B L (H D)"))
        return y if keep is None else y.masked_fill(~keep[..., None], 0), None

    def _check(self, output_attentions: bool | None, marks: Tensor | None) -> None:
        if output_attentions:
            raise LongspanError(
                f"attention weights are not kept: '{self.id}' does not hand them over. Leave "
                "output_attentions out, or convert.undo(model)."
            )
        if marks is not None and not self.mechanism.takes_marks:
            raise LongspanError(
                f"'{self.id}' treats all tokens alike and got a global_attention_mask: leave it "
                "out, or swap in a mechanism with global tokens (longformer)."
            )
        if self.training and self.undropped:
            raise LongspanError(
                f"this checkpoint trains with {self.drops}={self.undropped} and '{self.id}' has "
                f"no dropout of its weights: set model.config.{self.drops} = 0 before swapping."
            )

    def _cached(self, cache: Any, rows: int) -> StateLayer | None:
        if cache is None or not self.mechanism.causal:
            return None
        layer = state_layer(cache, self.layer, rows=rows)
        if layer.length and layer.state is None:
            raise LongspanError(
                f"'{self.id}' carries no state from which to go on: generate with use_cache=False."
            )
        return layer
