"""Convolutions and the systems behind them, one token after another."""

import math

import torch
from torch import Tensor

from longspan.testing.oracles import oracle


@oracle("lightweight-dynamic-conv")
def lightweight_dynamic_conv(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """O_ic = Σ_{j=1…k} W_j X_{i + j − ⌈(k+1)/2⌉, c} with each token's row of an L × L matrix."""
    k, heads = module.window, module.heads
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    a, b = module.input(x.masked_fill(~kept[..., None], 0)).chunk(2, -1)
    u = (a * b.sigmoid()).masked_fill(~kept[..., None], 0)
    length, size = x.shape[1], x.shape[2] // heads
    outs = []
    for row in range(len(x)):
        own = []
        for h in range(heads):
            matrix = []
            for i in range(length):
                if module.predict is None:
                    w = module.taps[h]
                else:
                    w = module.predict.weight[h * k : (h + 1) * k] @ u[row, i]
                at = [
                    i + j - (k if module.causal else math.ceil((k + 1) / 2))
                    for j in range(1, k + 1)
                ]
                inside = [0 <= t < length for t in at]
                if module.renormalise:
                    met = torch.tensor(
                        [ok and bool(kept[row, t]) for ok, t in zip(inside, at, strict=True)]
                    )
                    w = w.masked_fill(~met, -torch.inf) if met.any() else w
                w = w.softmax(-1) if module.normalise else w
                line = torch.zeros(length, dtype=w.dtype)
                places = torch.tensor([t for ok, t in zip(inside, at, strict=True) if ok])
                matrix.append(line.index_add(0, places, w[torch.tensor(inside)]))
            own.append(torch.stack(matrix).to(u.dtype) @ u[row, :, h * size : (h + 1) * size])
        outs.append(torch.cat(own, -1))
    y = torch.stack(outs) if outs else torch.zeros_like(u)
    y = module.output(y if module.bias is None else y + module.bias)
    return y.masked_fill(~kept[..., None], 0)


@oracle("hippo")
def hippo(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """LegS, bilinear: c_k = (I − A/2k)⁻¹ [(I + A/2k) c_{k−1} + (B/k) f_k], a row at a time."""
    if not module.scaled or module.method != "bilinear":
        raise NotImplementedError("this oracle writes out legs under the bilinear transform")
    n_size, features = module.size, x.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = torch.zeros(n_size, n_size, dtype=wide), torch.zeros(n_size, dtype=wide)
    for n in range(n_size):
        b[n] = (2 * n + 1) ** 0.5
        for k in range(n):
            a[n, k] = -(((2 * n + 1) * (2 * k + 1)) ** 0.5)
        a[n, n] = -(n + 1)
    unit, weight = torch.eye(n_size, dtype=wide), module.cell.weight.to(wide)
    rows = []
    for row in range(len(x)):
        h = torch.zeros(features, dtype=wide)
        c, count, outs = torch.zeros(module.channels, n_size, dtype=wide), 0, []
        for t in range(x.shape[1]):
            if keep is not None and not keep[row, t]:
                outs.append(torch.zeros_like(h))
                continue
            count += 1
            both = weight @ torch.cat([h, c.flatten(), x[row, t].to(wide)]) + module.cell.bias.to(
                wide
            )
            g = both[features:].sigmoid()
            h = (1 - g) * h + g * both[:features].tanh()
            f = module.read.weight.to(wide) @ h + module.read.bias.to(wide)
            right = c @ (unit + a / (2 * count)).mT + f[:, None] * b / count
            c = torch.linalg.solve(unit - a / (2 * count), right.mT).mT
            outs.append(h)
        rows.append(torch.stack(outs))
    return torch.stack(rows).to(x.dtype)
