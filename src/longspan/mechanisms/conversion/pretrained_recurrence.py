"""Recurrence added to a pretrained Transformer (Yoshida et al., 2020)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longspan.card import Card
from longspan.errors import LongspanError
from longspan.nn import Block, MultiHead
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep, Tokens

Pooling = Literal["mean", "last", "attention"]
Carried = Float[Tensor, "B E"]
Has = Bool[Tensor, "B"]

# Of models of transformers: their layers, and in one the norm before attention, and attention.
LLAMA = ("layers", "input_layernorm", "self_attn")
PLACES = {"gpt2": ("h", "ln_1", "attn"), "llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA}


class WindowState(NamedTuple):
    """r, which rows have one, and the tokens of the window begun with those of them that count."""

    r: Carried
    has: Has
    tokens: Tokens
    keep: Bool[Tensor, "B L"]


@mechanism(
    Card(
        id="pretrained-recurrence",
        name="Recurrence added to pretrained Transformers",
        kind="training",
        family="conversion",
        paper="Adding Recurrence to Pretrained Transformers for Improved Efficiency and Context "
        "Size",
        cite="Yoshida et al., 2020",
        link="https://arxiv.org/abs/2008.07027",
        what="Reads a text in short windows with a pretrained model and lets each attend to one "
        "vector made of the window before.",
        modes={"causal", "step"},
        time="L*C*E + L*E*E",
        memory="C + E",
        tiny={"width": 24, "window": 8},
    )
)
class PretrainedRecurrence(nn.Module):
    """Windows of n tokens of a causal language model, and between them one vector.

        r = f(pool(H)),   H (n E) the last window's hidden states,   f: E → inner → E with gelu

    One layer's keys and values become [r W_k; X W_k] and [r W_v; X W_v], with its own W_k and W_v:
    all tokens of the window may attend to r, and r to nothing. Positions start anew in each
    window; rotated keys of Llamas have r where the window's first token is. Under a gradient each
    window is computed again on the way back, so that only one is held at a time.

    `(model, tokens, state=None, keep=None)` → (logits B L vocabulary, state); between calls, a
    window begun is kept as its tokens and read again. The model is one of longspan's or a GPT-2,
    Llama, Mistral or Qwen2; it is trained together with this module. Which layers are read and
    inserted at, and the widths of f, are not those of the paper, which the official code would
    tell if there were any.

    Args:
        window: n. overlap: tokens of a window that the next one reads again, unscored.
        read: the hidden states pooled, 0 being the embeddings and −1 the last.
        insert: the layer with the extra key; None for plain windows.
        normed: r passes the norm before that layer's attention, as its tokens do.
        inner: hidden widths of f, by default E.
        start: the first window attends to a learned r_0.
        backprop: windows that gradients of the model go back through; beyond them, f alone gets
            any. States that come in are the caller's to detach.

    Raises:
        LongspanError: sizes that make no windows; a model, layer or attention it cannot reach.
    """

    def __init__(
        self,
        *,
        width: int,
        window: int = 300,
        overlap: int = 0,
        pooling: Pooling = "mean",
        read: int = -1,
        insert: int | None = 0,
        normed: bool = True,
        inner: Sequence[int] | None = None,
        start: bool = False,
        backprop: int = 2,
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise LongspanError(f"no pooling '{pooling}'; expected mean, last or attention.")
        if not 0 <= overlap < window or backprop < 1:
            raise LongspanError(
                f"pretrained-recurrence got window={window}, overlap={overlap}, backprop="
                f"{backprop}: expected an overlap below the window, and 1 window or more."
            )
        self.width, self.window, self.overlap, self.backprop = width, window, overlap, backprop
        self.read, self.insert, self.normed = read, insert, normed
        self.pooling: Pooling = pooling
        self.query = nn.Parameter(torch.zeros(width)) if pooling == "attention" else None
        self.start = nn.Parameter(torch.zeros(width)) if start else None
        widths = (width, *((width,) if inner is None else inner), width)
        parts = chain.from_iterable((nn.GELU(), nn.Linear(a, b)) for a, b in pairwise(widths))
        self.f = nn.Sequential(*list(parts)[1:])

    def pool(self, hidden: Inputs, keep: Keep) -> Carried:
        """One vector of each row's kept tokens, 0 of none."""
        if self.pooling == "last":
            at = keep * torch.arange(1, keep.shape[1] + 1, device=keep.device)
            weights = F.one_hot(at.argmax(1), keep.shape[1]).to(hidden) * keep
        elif self.query is not None:
            scores = (hidden @ self.query).masked_fill(~keep, torch.finfo(hidden.dtype).min)
            weights = scores.softmax(1) * keep
        else:
            weights = keep / keep.sum(1, keepdim=True).clamp(min=1)
        return (weights.to(hidden)[:, None] @ hidden)[:, 0]

    def forward(
        self,
        model: Any,
        tokens: Tokens,
        state: WindowState | None = None,
        *,
        keep: Keep | None = None,
    ) -> tuple[Float[Tensor, "B L _"], WindowState]:
        keep = torch.ones_like(tokens, dtype=torch.bool) if keep is None else keep
        if keep.shape != tokens.shape or not tokens.shape[1]:
            raise LongspanError(
                f"pretrained-recurrence got tokens {tuple(tokens.shape)} and keep "
                f"{tuple(keep.shape)}: expected one bool a token, and at least one token."
            )
        _refuse(model)
        if state is None:
            r = next(self.f.parameters()).new_zeros(len(tokens), self.width)
            state = WindowState(r, torch.zeros_like(keep[:, 0]), tokens[:, :0], keep[:, :0])
        r, has, begun, begun_keep = state
        ids, real = torch.cat([begun, tokens], 1), torch.cat([begun_keep, keep], 1)
        found, at, scored, windows = [], 0, begun.shape[1], 0
        while ids.shape[1] - at > scored:
            here = slice(at, at + self.window)
            logits, hidden = self._through(model, ids[:, here], real[:, here], r, has)
            found.append(logits[:, scored:])
            if ids.shape[1] - at < self.window:
                break
            windows += 1
            pooled, seen = self.pool(hidden, real[:, here]), real[:, here].any(1)
            if windows % self.backprop == 0:
                pooled, r = pooled.detach(), r.detach()
            r, has = torch.where(seen[:, None], self.f(pooled), r), has | seen
            at, scored = at + self.window - self.overlap, self.overlap
        return torch.cat(found, 1), WindowState(r, has, ids[:, at:], real[:, at:])

    def _through(
        self, model: Any, tokens: Tokens, keep: Keep, r: Carried, has: Has
    ) -> tuple[Tensor, Tensor]:
        """Logits and hidden states of one window."""
        if self.start is not None:
            r, has = torch.where(has[:, None], r, self.start), torch.ones_like(has)
        extra = self.insert is not None and bool(has.any())

        def run(r: Tensor) -> tuple[Tensor, Tensor]:
            named: dict[str, Any] = {} if keep.all() else {"attention_mask": keep.long()}
            if named and not _ours(model):
                named["position_ids"] = (keep.cumsum(1) - 1).clamp(min=0)
            with self._attended(model, r, has) if extra else nullcontext():
                output = model(tokens, use_cache=False, output_hidden_states=True, **named)
            return output.logits, output.hidden_states[self.read]

        if torch.is_grad_enabled():
            return checkpoint(run, r, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return run(r)

    @contextmanager
    def _attended(self, model: Any, r: Carried, has: Has) -> Iterator[None]:
        """Inside, the layer `insert` attends to r too, in the rows that have one."""
        assert self.insert is not None
        norm, attention = _place(model, self.insert)
        extra = (norm(r) if self.normed else r)[:, None]

        def beside(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
            if isinstance(attention, MultiHead):
                keep = named.get("keep")
                keep = torch.ones(args[0].shape[:2], dtype=torch.bool) if keep is None else keep
                keep = torch.cat([has[:, None], keep.to(has.device)], 1)
                return args, {**named, "context": torch.cat([extra, args[0]], 1), "keep": keep}
            x = args[0] if args else named["hidden_states"]
            mask = _wider(named.get("attention_mask"), has, x)
            return args, {**named, "past_key_values": _First(attention, extra, named), **mask}

        hook = attention.register_forward_pre_hook(beside, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()


class _First:
    """In the place of a cache: what an attention makes of r, before its own keys and values."""

    def __init__(self, attention: nn.Module, extra: Tensor, named: dict[str, Any]) -> None:
        self.pair: tuple[Tensor, ...] = ()
        turned = named.get("position_embeddings")
        if turned is not None:
            turned = tuple(t[:, :1] for t in turned)
        # By `forward`, which no hook hears: the attention projects r and hands it to `update`.
        attention.forward(
            extra, past_key_values=self, attention_mask=None, position_embeddings=turned
        )

    def update(self, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        if not self.pair:
            self.pair = k, v
            return k, v
        return tuple(torch.cat(pair, 2) for pair in zip(self.pair, (k, v), strict=True))


def _wider(mask: Tensor | None, has: Has, x: Tensor) -> dict[str, Tensor]:
    """The mask with a column for r: no row, for nothing is asked there."""
    length = x.shape[1]
    if mask is None:
        mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=x.device).tril()
    if mask.dim() != 4:
        raise LongspanError(
            f"attention_mask came as {tuple(mask.shape)}, of an attention that pretrained-"
            "recurrence cannot widen: model.set_attn_implementation('sdpa') or 'eager'."
        )
    column = has[:, None, None, None].expand(-1, mask.shape[1], length, 1)
    if mask.dtype != torch.bool:
        column = torch.zeros_like(column, dtype=mask.dtype).masked_fill(
            ~column, torch.finfo(mask.dtype).min
        )
    return {"attention_mask": torch.cat([column, mask.expand(len(has), -1, -1, -1)], -1)}


def _ours(model: Any) -> bool:
    return isinstance(next(iter(getattr(model.base_model, "layers", [])), None), Block)


def _place(model: Any, layer: int) -> tuple[nn.Module, nn.Module]:
    """The norm that r passes, and the attention that sees it."""
    kind = model.config.model_type
    if not _ours(model) and kind not in PLACES:
        raise LongspanError(
            f"pretrained-recurrence knows longspan's models, {', '.join(PLACES)} and got a "
            f"{kind}: give one of these."
        )
    layers, norm, attention = ("layers", "mixer_norm", "mixer") if _ours(model) else PLACES[kind]
    blocks = getattr(model.base_model, layers)
    if not -len(blocks) <= layer < len(blocks):
        raise LongspanError(f"there is no layer {layer}: the model has 0 … {len(blocks) - 1}.")
    block = blocks[layer]
    found = getattr(block, attention)
    if not (isinstance(found, MultiHead) or type(found).__module__.startswith("transformers.")):
        raise LongspanError(
            f"layer {layer} mixes by a {type(found).__name__}, which takes no further key: insert "
            "at another layer, or convert.undo(model)."
        )
    post = isinstance(block, Block) and block.order == "post"
    return nn.Identity() if post else getattr(block, norm), found


def _refuse(model: Any) -> None:
    if any(getattr(part, "gradient_checkpointing", False) for part in model.modules()):
        raise LongspanError(
            "the model recomputes its layers, and pretrained-recurrence already does whole "
            "windows: turn its gradient checkpointing off."
        )
