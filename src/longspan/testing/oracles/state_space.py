"""State spaces, one recurrence step after another."""

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.testing.oracles import oracle


@oracle("s4")
def s4(module, x: Tensor, *, keep: Tensor | None) -> Tensor:
    """x_t = Ā x_{t−1} + B̄ u_t, y_t = 2 Re C x_t + D u_t, zero-order hold, diagonal A."""
    if module.form != "diagonal" or module.discretisation != "zoh":
        raise NotImplementedError("this oracle writes out the diagonal form under zoh")
    kept = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    u = x.masked_fill(~kept[..., None], 0)
    wide = torch.promote_types(x.dtype, torch.float32)
    a = torch.complex(-module.log_decay.to(wide).exp(), module.frequency.to(wide))
    step = (module.log_step.to(wide).exp() * module.rate)[:, None]
    b, *cs = (torch.view_as_complex(t.to(wide)) for t in (module.b, *module.c))
    grown = (step * a).exp()
    taken = (grown - 1) / a * b
    y = module.skip * u
    for c, back in zip(cs, (False, True), strict=False):
        state = torch.zeros(x.shape[0], *a.shape, dtype=a.dtype)
        outs = []
        for token in (u.flip(1) if back else u).unbind(1):
            state = grown * state + taken * token[..., None]
            outs.append(2 * (c * state).sum(-1).real)
        out = torch.stack(outs, 1)
        y = y + (out.flip(1) if back else out).to(x.dtype)
    y = F.glu(module.output(F.gelu(y)), dim=-1)
    return y.masked_fill(~kept[..., None], 0)
