"""The linear state-space layer, one recurrence step after another."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.testing.oracles import oracle


@oracle("lssl")
def lssl(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """x_t = (I − Δ/2 A)⁻¹ [(I + Δ/2 A) x_{t−1} + Δ B u_t], y_t = C x_t + D u_t."""
    if module.method != "bilinear":
        raise NotImplementedError("this oracle writes out the bilinear transform")
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    wide = torch.promote_types(x.dtype, torch.float32)
    u = x.masked_fill(~kept[..., None], 0).to(wide)
    p, d, t, q, b = (getattr(module, n).double() for n in "pdtqb")
    tridiagonal = torch.diag(t[0, 1:], -1) + torch.diag(t[1]) + torch.diag(t[2, :-1], 1)
    a = torch.diag(p) @ (torch.diag(d) + torch.linalg.inv(tridiagonal)) @ torch.diag(q)
    half = (module.log_step.double().exp() * module.rate)[:, None, None] / 2 * a
    unit = torch.eye(len(a), dtype=a.dtype)
    taken = torch.linalg.solve(unit - half, unit + half).to(wide)
    step = module.log_step.double().exp()[:, None] * module.rate * b
    given = torch.linalg.solve(unit - half, step[..., None])[..., 0].to(wide)
    state, outs = u.new_zeros(len(x), *given.shape), []
    for token in u.unbind(1):
        state = (taken @ state[..., None])[..., 0] + given * token[..., None]
        read = (module.c.to(wide) @ state[..., None])[..., 0]
        outs.append(read + module.skip.to(wide) * token[..., None])
    y = torch.stack(outs, 1).flatten(2).to(x.dtype) if outs else x
    return module.output(F.gelu(y)).masked_fill(~kept[..., None], 0)
