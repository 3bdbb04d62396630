"""Who attends to whom in a trained model: the effective weights of one layer's mixing."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from longspan.errors import LongspanError
from longspan.nn import Attention, Block, Mixer

_PROBES = 8


class Picture(NamedTuple):
    """weights[i, j]: how much position j enters the output at position i."""

    weights: Float[Tensor, "L L"]
    how: Literal["one-hot values", "Jacobian norms"]


def picture(model: nn.Module, tokens: Int[Tensor, "1 L"], *, layer: int = -1) -> Picture:
    """The effective weights of one layer's mixer on real tokens.

    An attention is linear in its values: given the q and k of this forward pass and one-hot
    values v_j = e_j, its output at i is its row of weights, softmax or not, averaged over the
    heads. For any other mixer, and for an attention whose values cannot be replaced, ‖∂y_i/∂x_j‖
    (Frobenius), estimated from eight random directions of y_i; each row is scaled to sum to 1.

    Raises:
        LongspanError: the model has no block with a mixer.
    """
    mixers = [
        m.mixer for m in model.modules() if isinstance(m, Block) and isinstance(m.mixer, Mixer)
    ]
    if not mixers:
        raise LongspanError(
            f"{type(model).__name__} has no longspan Block; expected a model of longspan.models."
        )
    mixer = mixers[layer]
    attention = next((m for m in mixer.modules() if isinstance(m, Attention)), None)
    calls = _record(model, tokens, [mixer] if attention is None else [mixer, attention])
    if attention is not None and attention in calls:
        weights = _one_hot(attention, *calls[attention])
        if weights is not None:
            return Picture(weights, "one-hot values")
    return Picture(_jacobian(mixer, *calls[mixer]), "Jacobian norms")


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _record(model: nn.Module, tokens: Tensor, modules: list[nn.Module]) -> dict[nn.Module, Call]:
    """The arguments each module is called with in a forward pass."""
    calls: dict[nn.Module, Call] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[module] = (args, kwargs)

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        with torch.no_grad():
            model(tokens, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _one_hot(attention: Attention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    q, k, v, *rest = args
    ones = torch.eye(v.shape[2], dtype=v.dtype, device=v.device).expand(*v.shape[:3], -1)
    extra = {name: ones for name, of in attention.extra.items() if of == "v" and name in kwargs}
    try:
        with torch.no_grad():
            o, _ = attention(q, k, ones, *rest, **{**kwargs, **extra})
    except (LongspanError, RuntimeError, TypeError):
        return None  # its values must be as wide as its keys, or more than values
    square = o.shape[2] == o.shape[3] == q.shape[2]
    return o[0].mean(0) if square and bool(o.isfinite().all()) else None


def _jacobian(mixer: Mixer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    x, *rest = args
    length, generator = x.shape[1], torch.Generator().manual_seed(0)
    # One copy of x for each output position: a single backward pass serves all rows.
    copies = x.detach().expand(length, -1, -1).clone().requires_grad_(True)
    with torch.enable_grad():
        y, _ = mixer(copies, *rest, **kwargs)
        own = y.diagonal(dim1=0, dim2=1).mT  # L E
        total = torch.zeros(length, length, device=x.device)
        for _ in range(_PROBES):
            probe = torch.randn(own.shape, generator=generator).to(own)
            (gradient,) = torch.autograd.grad((own * probe).sum(), copies, retain_graph=True)
            total += gradient.pow(2).sum(-1).float()
    norms = (total / _PROBES).sqrt()
    return norms / norms.sum(-1, keepdim=True).clamp_min(1e-30)
