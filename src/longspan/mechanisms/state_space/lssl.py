"""LSSL, the linear state-space layer (Gu et al., 2021)."""

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import conv
from longspan.engines.conv.projection import Measure
from longspan.errors import LongspanError
from longspan.nn.within import Within
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep

Method = Literal["euler", "backward", "bilinear", "zoh"]


@mechanism(
    Card(
        id="lssl",
        name="LSSL (linear state-space layer)",
        kind="mixer",
        family="state-space",
        paper="Combining Recurrent, Convolutional, and Continuous-time Models with Linear "
        "State-Space Layers",
        cite="Gu et al., NeurIPS 2021",
        link="https://arxiv.org/abs/2110.13985",
        what="Each feature drives a linear dynamical system whose matrix, HiPPO's at the start, is "
        "trained.",
        modes={"causal", "step"},
        time="L*E*M + L*E*E",
        memory="E*M",
        tiny={"width": 24, "state": 8, "channels": 2},
    )
)
class LSSL(Within):
    """y = W gelu(K * u + D u), K_l = C A_d^l B_d, for E systems x' = A x + B u of N states.

        A_d = (I − αΔA)⁻¹ (I + (1−α)ΔA),   B_d = (I − αΔA)⁻¹ ΔB                  (Eqs. 3 to 5)

    A and B are shared by the features; Δ, C and D are each feature's own. A keeps the structure of
    HiPPO's under training, A = P (diag + T⁻¹) Q with T tridiagonal (Sec. 4, Theorem 2), and is
    formed densely: a step is O(N²). The Krylov matrix is never whole, unlike the official code's:
    its factors are, and they are kept while A, B, Δ, `rate` (and for `fft` the length) stay the
    same and want no gradient. The state is x. A masked token is an input of 0.

    Args:
        state: N. channels: M outputs a feature, which W joins.
        measure: what A remembers at the start. method: of sampling, a name or α.
        form: `strides`, chunks with states between them, strictly causal; `fft`, the paper's one
            convolution, in which rounding lets later tokens touch earlier outputs.
        learn_matrix, learn_step: train A and B, and Δ; LSSL-fixed trains neither.
        rate: how much time passes between samples, in units of training's. An attribute: set it
            to 0.5 to run on data sampled twice as densely.

    A and B want a learning rate of 10⁻⁴, Δ of 10⁻³, none weight decay: they say so in `_optim`.

    Raises:
        LongspanError: a measure or form that does not exist, sizes that are not positive, a
            context or marks.
    """

    causal = True

    def __init__(
        self,
        *,
        width: int,
        state: int = 64,
        channels: int = 1,
        measure: Measure = "legs",
        method: Method | float = "bilinear",
        form: Literal["strides", "fft"] = "strides",
        step_min: float = 0.001,
        step_max: float = 0.1,
        learn_matrix: bool = True,
        learn_step: bool = True,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        if measure not in get_args(Measure) or form not in ("strides", "fft"):
            raise LongspanError(
                f"lssl got measure='{measure}', form='{form}'; expected one of "
                f"{', '.join(get_args(Measure))}, and strides or fft."
            )
        if min(state, channels) < 1 or not 0 < step_min <= step_max:
            raise LongspanError(
                f"lssl got state={state}, channels={channels}, step_min={step_min}, "
                f"step_max={step_max}; expected positive numbers, step_min <= step_max."
            )
        self.method: Method | float = method
        self.rate, self.form = rate, form
        parts = conv.decompose(measure, state)
        span = math.log(step_max / step_min)
        log_step = torch.rand(width) * span + math.log(step_min)
        for name, values, rate_of, trains in (
            ("b", conv.measure(measure, state)[1], 1e-4, learn_matrix),
            *((n, t, 1e-4, learn_matrix) for n, t in zip(parts._fields, parts, strict=True)),
            ("log_step", log_step, 1e-3, learn_step),
        ):
            held = values.to(torch.get_default_dtype())
            if trains:
                setattr(self, name, nn.Parameter(held))
                getattr(self, name)._optim = {"lr": rate_of, "weight_decay": 0.0}
            else:
                self.register_buffer(name, held)
        self.c = nn.Parameter(torch.randn(width, channels, state))
        self.skip = nn.Parameter(torch.randn(width, channels))
        self.output = nn.Linear(width * channels, width)
        self._kept: tuple[Any, tuple[Tensor, Tensor], dict[int, conv.Stride]] | None = None

    def mix(
        self, x: Inputs, state: Float[Tensor, "B E M"] | None, keep: Keep | None
    ) -> tuple[Inputs, Float[Tensor, "B E M"] | None]:
        if not x.numel():
            wide = torch.promote_types(x.dtype, torch.float32)
            room = x.new_zeros(len(x), x.shape[2], self.c.shape[2], dtype=wide)
            return x, room if state is None else state
        with torch.autocast(x.device.type, enabled=False):
            y, state = _eager(self, x.transpose(1, 2), state)
        return self.output(F.gelu(y.flatten(1, 2).transpose(1, 2).to(x.dtype))), state

    def kernel(self, length: int) -> Float[Tensor, "E M K"]:
        """The taps C A_d^l B_d, l < length."""
        size = 1 << math.ceil(math.log2(max(length, 1)) / 2)
        return conv.strided_kernel(self.c, self.strides(size), length)

    def strides(self, size: int) -> conv.Stride:
        """The factors of the Krylov matrix for strides of so many tokens."""
        (transition, input), kept = self.system()
        if size not in kept:
            kept.clear()
            kept[size] = conv.stride(transition, input, size)
        return kept[size]

    def system(self) -> tuple[tuple[Tensor, Tensor], dict[int, conv.Stride]]:
        """(A_d, B_d) of every feature, in double, and the factors kept of their powers."""
        held: list[Tensor] = [getattr(self, n) for n in ("p", "d", "t", "q", "b", "log_step")]
        key = self.rate, self.method, [(t.data_ptr(), t._version, t.dtype) for t in held]
        if torch.is_grad_enabled() and any(t.requires_grad for t in held):
            return self._sample(held), {}
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._sample(held), {}
        return self._kept[1:]

    def _sample(self, held: list[Tensor]) -> tuple[Tensor, Tensor]:
        a = conv.assemble(conv.Quasiseparable(*held[:4]))
        step = held[5].to(a).exp() * self.rate
        shape = len(step), *a.shape
        return conv.sample(a.expand(shape), held[4].to(a).expand(shape[:2]), step, self.method)


def _run(module: LSSL, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """y: B E M L and the last state; one token by recurrence."""
    wide = torch.promote_types(u.dtype, torch.float32)
    u, length = u.to(wide), u.shape[2]
    c, skip = module.c.to(wide), module.skip.to(wide)[..., None]
    (transition, input), _ = module.system()
    before = None if state is None else state.to(wide)
    if length == 1:
        x = u * input.to(wide)
        if before is not None:
            x = x + torch.einsum("bex,eyx->bey", before, transition.to(wide))
        return torch.einsum("bex,emx->bem", x, c)[..., None] + skip * u[:, :, None], x
    if module.form == "strides":
        return conv.strided(u, module.strides(64), c, module.skip.to(wide), before)
    kernel = module.kernel(length).to(wide) + F.pad(skip, (0, length - 1))
    channels = kernel.shape[1]
    y = conv.convolve(u.repeat_interleave(channels, 1), kernel.flatten(0, 1))
    y = y.unflatten(1, (-1, channels))
    if before is not None:
        rows = [conv.dense_response(before, transition, row, length) for row in c.unbind(1)]
        y = y + torch.stack(rows, 2)
    return y, conv.dense_state(u, transition, input, before)


_eager: Any = torch.compiler.disable(_run)  # which would trace what is kept
