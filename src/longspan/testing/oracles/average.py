"""Exponential averages, every exponent written out."""

import torch
from torch import Tensor

from longspan.testing.oracles import oracle
from longspan.testing.oracles.dense import allowed


@oracle("aft")
def aft(module, q: Tensor, k: Tensor, v: Tensor, *, keep: Tensor | None) -> Tensor:
    """σ(q_t) Σ exp(k_s + w_ts) v_s / Σ exp(k_s + w_ts), each channel a softmax of its own."""
    batch, heads, length, _ = k.shape
    kept = torch.ones(batch, length, dtype=torch.bool) if keep is None else keep
    place = (kept.cumsum(1) - 1).clamp(min=0)
    w = _position_bias(module, k, int(place.max()) + 1)  # H T T
    w = w.transpose(0, 1)[place].transpose(1, 2)  # B H S T
    w = w.gather(3, place[:, None, None].expand(batch, heads, length, length))
    scores = k[:, :, None] + w[..., None]  # B H S S D
    seen = allowed(length, length, module.causal, keep).expand(batch, heads, length, length)
    scores = scores.masked_fill(~seen[..., None].bool(), -torch.inf)
    weights = scores.softmax(3)
    return torch.sigmoid(q) * torch.einsum("bhtsd,bhsd->bhtd", weights, v)


def _position_bias(module, like: Tensor, length: int) -> Tensor:
    heads = like.shape[1]
    if module.form == "simple":
        return like.new_zeros(heads, length, length)
    if module.form == "full":
        w = module.w if module.u is None else module.u @ module.v.T
        return w[:length, :length].expand(heads, -1, -1)
    w = module.w
    if module.reparameterised:
        w = w - w.mean(1, keepdim=True)
        spread = (w.square().mean(1, keepdim=True) + 1e-12).sqrt()
        w = module.gamma * w / spread + module.beta
    columns = module.columns or length
    token = torch.arange(length)
    rows = token // columns - (token // columns)[:, None]
    across = token % columns - (token % columns)[:, None]
    bias = w.new_zeros(heads, length, length)
    for j, (row, column) in enumerate(module.near):
        here = w[:length, j, None] if module.form == "local" else w[:, j, None, None]
        bias = torch.where((rows == row) & (across == column), here, bias)
    return bias


def _before(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


@oracle("rwkv")
def rwkv(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """wkv with all its exponents, L L for every channel (Eq. 16)."""
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    x = x.masked_fill(~kept[..., None], 0)
    z = {n: mu * x + (1 - mu) * _before(x) for n, mu in module.mix.items()}
    r, k, v = (module.project[n](z[n]) for n in "rkv")
    token = torch.arange(x.shape[1])
    age = (token[:, None] - 1 - token).clamp(min=0)[None, :, :, None]
    exponents = k[:, None] - age * module.log_decay.exp()
    now = torch.eye(x.shape[1], dtype=torch.bool)[None, :, :, None]
    exponents = torch.where(now, k[:, None] + module.bonus, exponents)
    seen = (token[:, None] >= token)[None, :, :, None] & kept[:, None, :, None]
    weights = exponents.masked_fill(~seen, -torch.inf).softmax(2)
    y = module.output(torch.sigmoid(r) * (weights * v[:, None]).sum(2))
    return y.masked_fill(~kept[..., None], 0)


@oracle("rwkv-channel-mix")
def rwkv_channel_mix(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    x = x.masked_fill(~kept[..., None], 0)
    z = {n: mu * x + (1 - mu) * _before(x) for n, mu in module.mix.items()}
    hidden = torch.relu(module.project["k"](z["k"])) ** 2
    y = torch.sigmoid(module.project["r"](z["r"])) * module.project["v"](hidden)
    return y.masked_fill(~kept[..., None], 0)
