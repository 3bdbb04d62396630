"""The exits that a depth-adaptive decoder learns to predict (Elbayad et al., 2019, Sec. 4)."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

# exp(−r² / σ) below this is left out of a smoothing kernel.
_NOTHING = 1e-12


def smoothed(scores: Float[Tensor, "N B L"], sigma: float) -> Float[Tensor, "N B L"]:
    """Σ_{t'} κ(t, t') scores_{t'} with κ(t, t') = exp(−|t − t'|² / σ); σ = 0 leaves them alone."""
    if sigma == 0 or not scores.shape[2]:
        return scores
    radius = min(math.ceil(math.sqrt(-sigma * math.log(_NOTHING))), scores.shape[2] - 1)
    away = torch.arange(-radius, radius + 1, dtype=scores.dtype, device=scores.device)
    kernel = torch.exp(-(away**2) / sigma)[None, None]
    return F.conv1d(scores.flatten(0, 1)[:, None], kernel, padding=radius).view_as(scores)


def best_exit(scores: Float[Tensor, "N *rest"], penalty: float) -> Int[Tensor, "*rest"]:
    """argmax_n scores_n − λ n over n = 1 … N; of equal ones the lowest."""
    n = torch.arange(1, len(scores) + 1, device=scores.device).view(-1, *(1,) * (scores.dim() - 1))
    scores = scores - penalty * n
    return torch.where(scores == scores.amax(0), n, len(scores)).amin(0)


def log_geometric(x: Float[Tensor, "*rest M"]) -> Float[Tensor, "*rest N"]:
    """log q(n) of the logits of X^1 … X^{N−1}: q(n) = X^n Π_{m<n} (1 − X^m), and what is left to N.

    N is M + 1.
    """
    stays = F.pad(F.logsigmoid(-x).cumsum(-1), (1, 0))
    return torch.cat([F.logsigmoid(x) + stays[..., :-1], stays[..., -1:]], -1)
