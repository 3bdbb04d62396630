"""MultiHead: the projections, grouped heads and positions around an attention."""

from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.nn.protocols import Attention, Mixer, Position
from longspan.shapes import Context, Inputs, Keep, Marks


class MultiHeadState(NamedTuple):
    """The attention's own state, and how many tokens each row has seen (B)."""

    attention: Any
    seen: Tensor


class MultiHead(Mixer):
    """y = [o_1; …; o_H] W_o, o_h = attention(x W_q, x W_k, x W_v)_h (Vaswani et al., Sec. 3.2.2).

    Args:
        width: E. heads: H. head_width: D, by default E / H. value_width: V, by default D.
        kv_heads: grouped-query heads; each serves H / kv_heads query heads.
        position: infuses or rotates queries and keys, and biases scores or spreads weights where
            the attention lets it; one that embeds or enters is the stack's.

    Raises:
        LongspanError: widths or heads that do not divide, a position the attention cannot honour.
    """

    def __init__(
        self,
        attention: Attention,
        *,
        width: int,
        heads: int,
        head_width: int | None = None,
        value_width: int | None = None,
        kv_heads: int | None = None,
        position: Position | None = None,
        biases: bool = True,
    ) -> None:
        super().__init__()
        if head_width is None and width % heads:
            raise LongspanError(
                f"width {width} does not divide into {heads} heads: "
                "choose a multiple, or give head_width."
            )
        kv_heads = kv_heads or heads
        if heads % kv_heads:
            raise LongspanError(
                f"{heads} heads cannot share {kv_heads} key-value heads: "
                "kv_heads must divide heads."
            )
        if attention.shared and kv_heads != heads:
            raise LongspanError(
                f"{type(attention).__name__} uses its queries as keys: kv_heads must equal heads."
            )
        if position is not None:
            _check_position(position, attention)
        self.attention, self.position = attention, position
        self.width, self.heads, self.kv_heads = width, heads, kv_heads
        self.head_width = head_width or width // heads
        self.value_width = value_width or self.head_width
        sizes = {
            "q": heads * self.head_width,
            "k": kv_heads * self.head_width,
            "v": kv_heads * self.value_width,
        }
        if attention.shared:
            del sizes["k"]
        linears = {n: nn.Linear(width, size, biases) for n, size in sizes.items()}
        self.output = nn.Linear(heads * self.value_width, width, biases)
        for linear in (*linears.values(), self.output):
            nn.init.xavier_uniform_(linear.weight)
            if biases:
                nn.init.zeros_(linear.bias)
        for name, origin in attention.extra.items():
            copy = nn.Linear(width, sizes[origin], biases)
            copy.load_state_dict(linears[origin].state_dict())
            linears[name] = copy
        self.project = nn.ModuleDict(linears)

    def forward(
        self,
        x: Inputs,
        state: MultiHeadState | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, MultiHeadState | None]:
        attention = self.attention
        if attention.shared and context is not None:
            raise LongspanError(
                f"{type(attention).__name__} uses its queries as keys and has no cross form."
            )
        source = x if context is None else context
        if marks is not None and not attention.takes_marks:
            raise LongspanError(
                f"{type(attention).__name__} treats all tokens alike and got marked ones: "
                "leave the marks out, or use a mechanism with global tokens (longformer)."
            )
        if keep is not None:
            # Padding may hold anything: it must reach neither the products nor their gradients.
            source = source.masked_fill(~keep[..., None], 0)
            x = source if context is None else x

        position = self.position
        acts = frozenset() if position is None else position.acts
        seen = x.new_zeros(x.shape[0], dtype=torch.long) if state is None else state.seen
        here = of_queries = seen
        if acts & {"infuse", "rotate"}:
            # Kept tokens count: left padding moves no position, which only differences forgive.
            here = torch.arange(source.shape[1], device=x.device).expand(source.shape[:2])
            here = seen[:, None] + (here if keep is None else (keep.cumsum(1) - 1).clamp(min=0))
            # Causally the last query meets the last key; a cross-attention starts both at 0.
            of_queries = here[:, here.shape[1] - x.shape[1] :]
            if context is not None and not attention.causal:
                of_queries = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        of = {"q": x, "k": source, "v": source}
        if position is not None and "infuse" in acts:
            of["q"], of["k"] = position.infuse(x, of_queries), position.infuse(source, here)

        def heads(name: str, origin: str) -> Tensor:
            count = self.heads if name.startswith("q") else self.kv_heads
            return rearrange(self.project[name](of[origin]), "B L (H D) -> B H L D", H=count)

        q, v = heads("q", "q"), heads("v", "v")
        k = q if attention.shared else heads("k", "k")
        hooks: dict[str, Any] = {} if marks is None else {"marks": marks}
        for name, origin in attention.extra.items():
            hooks[name] = heads(name, origin)
        if position is not None and "rotate" in acts:
            if attention.takes_turns:
                hooks["turns"] = tuple(
                    partial(position.rotate, pos=pos) for pos in (of_queries, here)
                )
            else:
                q = position.rotate(q, of_queries)
                k = q if attention.shared else position.rotate(k, here)
                for name, origin in attention.extra.items():
                    if origin != "v":
                        at = of_queries if origin == "q" else here
                        hooks[name] = position.rotate(hooks[name], at)
        if not attention.grouped and self.kv_heads != self.heads:
            copies = self.heads // self.kv_heads
            k, v = (t.repeat_interleave(copies, dim=1) for t in (k, v))
            for name, origin in attention.extra.items():
                if origin != "q":
                    hooks[name] = hooks[name].repeat_interleave(copies, dim=1)
        if position is not None:
            hooks |= {hook: getattr(position, hook) for hook in ("bias", "spread") if hook in acts}
        o, carried = attention(q, k, v, state and state.attention, keep=keep, **hooks)
        y = self.output(rearrange(o, "B H L V -> B L (H V)"))
        if keep is not None and context is None:
            y = y.masked_fill(~keep[..., None], 0)
        if carried is None:
            return y, None
        new = source.shape[1] if keep is None else keep.sum(1)
        return y, MultiHeadState(carried, seen + new)


def _check_position(position: Position, attention: Attention) -> None:
    """Refuse a position that the attention cannot honour in full."""
    name, by = type(attention).__name__, type(position).__name__
    if position.acts <= {"embed", "enter"}:
        raise LongspanError(
            f"{by} adds to the inputs of layers, which MultiHead does not see: call it on them, or "
            "name it as the position of a LongspanConfig."
        )
    if "bias" in position.acts and not attention.takes_bias:
        raise LongspanError(
            f"{name} cannot honour {by}, which biases scores: use a position that embeds or "
            "rotates, or an attention that takes a bias."
        )
    if "spread" in position.acts and not attention.takes_spread:
        raise LongspanError(
            f"{name} cannot honour {by}, which adds positions to values by the weights: build it "
            "without values, or use an attention that spreads (multi-head-attention)."
        )
    if position.causal and not attention.causal:
        raise LongspanError(
            f"{by} was built for keys up to the query (causal=True) and {name} also sees later "
            "ones: build the position with causal=False."
        )
