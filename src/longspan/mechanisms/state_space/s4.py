"""S4 (Gu, Goel & Ré, 2022) and S4D (Gu et al., 2022)."""

import math
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import conv
from longspan.errors import LongspanError
from longspan.nn.within import Within
from longspan.registry import mechanism
from longspan.shapes import Inputs, Keep

Form = Literal["diagonal", "dplr"]
Measure = Literal["legs", "legt", "lagt"]
Init = Literal["lin", "inv", "legs", "real"]
Discretisation = Literal["zoh", "bilinear"]


class S4State(NamedTuple):
    """x of every feature's system, one of each conjugate pair as (re, im)."""

    x: Float[Tensor, "B E M 2"]


@mechanism(
    Card(
        id="s4",
        name="S4 (DPLR) and S4D (diagonal)",
        kind="mixer",
        family="state-space",
        paper="Efficiently Modeling Long Sequences with Structured State Spaces",
        cite="Gu, Goel & Ré, ICLR 2022; S4D: Gu et al., NeurIPS 2022",
        link="https://arxiv.org/abs/2111.00396",
        what="Each feature drives a linear dynamical system that remembers its history.",
        modes={"bidirectional", "causal", "step"},
        time="L*E*C + L*E*M + L*E*E",
        memory="E*M",
        tiny={"width": 24, "state": 8},
    )
)
class S4(Within):
    """y = GLU(W gelu(K * u + D u)), K_l = C A_d^l B_d for E systems x' = A x + B u of N states.

    `diagonal` (S4D): A = Λ = −exp(log decay) + i·frequency, K_l = 2 Re Σ_n C_n B̄_n exp(l Δ Λ_n).
    `dplr` (S4): A = Λ − p p*, its kernel by the Cauchy sums of S4's Algorithm 1, for any rank. What
    is trained there is C̃ = C (I − A_d^length); C is recovered from it where a state is read out.

    The state is x. A masked token is an input of 0: it gives 0, and time passes, so that padding
    at the left leaves a fresh state fresh and padding at the right lets the carried one fade.
    Bidirectionally, a second C reads a second kernel, applied to the reversed axis (which sees u_t
    too; the official code starts it at u_{t+1}).

    Args:
        state: N, the real numbers a feature's state holds (N/2 conjugate pairs).
        measure: what A remembers (`dplr`), legs by default; legt has rank 2, the others 1.
        init: of Λ (`diagonal`), lin by default.
        discretisation: zoh by default, for `dplr` bilinear, its only one.
        length: of the kernel that `dplr` trains; longer inputs double it for the call, `grow` for
            good.
        rate: how much time passes between samples, in units of training's. An attribute: set it
            to 0.5 to run on data sampled twice as densely.

    Δ, A and B want a learning rate of at most 10⁻³ and no weight decay: they say so in `_optim`,
    which `longspan.training.parameter_groups` heeds.

    Raises:
        LongspanError: an option that does not exist or belongs to the other form, an odd state, a
            context or marks, a state where there is none to carry.
    """

    length: Tensor

    def __init__(
        self,
        *,
        width: int,
        causal: bool = True,
        state: int = 64,
        form: Form = "diagonal",
        measure: Measure | None = None,
        init: Init | None = None,
        discretisation: Discretisation | None = None,
        step_min: float = 0.001,
        step_max: float = 0.1,
        length: int = 1024,
        rate: float = 1.0,
    ) -> None:
        super().__init__()
        diagonal = form == "diagonal"
        for name, value, known in (
            ("form", form, Form),
            ("measure", measure, Measure),
            ("init", init, Init),
            ("discretisation", discretisation, Discretisation),
        ):
            if value is not None and value not in get_args(known):
                raise LongspanError(
                    f"s4 has no {name} '{value}'; expected {', '.join(get_args(known))}."
                )
        if diagonal and measure is not None:
            raise LongspanError("s4's diagonal form takes an init, not a measure: give init.")
        if not diagonal and init is not None:
            raise LongspanError("s4's dplr form takes a measure, not an init: give measure.")
        if not diagonal and discretisation == "zoh":
            raise LongspanError("s4's dplr form is bilinear only: use form='diagonal' for zoh.")
        if state < 2 or state % 2:
            raise LongspanError(
                f"s4 keeps conjugate pairs and got state={state}: give an even number."
            )
        if not 0 < step_min <= step_max or length < 1:
            raise LongspanError(
                f"s4 got step_min={step_min}, step_max={step_max}, length={length}; expected "
                "0 < step_min <= step_max and length >= 1."
            )
        self.causal, self.form, self.rate = causal, form, rate
        self.discretisation: Discretisation = discretisation or ("zoh" if diagonal else "bilinear")
        low = None
        if diagonal:
            eigenvalues, b = conv.spectrum(init or "lin", state)
        else:
            eigenvalues, low, b, _ = conv.normal_plus_low_rank(measure or "legs", state)
        span = math.log(step_max / step_min)
        self.log_step = nn.Parameter(torch.rand(width) * span + math.log(step_min))
        # LegT and LagT lie on the imaginary axis, which no logarithm reaches.
        decay = (-eigenvalues.real).clamp(min=1e-4)
        self.log_decay = nn.Parameter(_copies(decay.log(), width))
        self.frequency = nn.Parameter(_copies(eigenvalues.imag, width))
        self.b = nn.Parameter(_copies(torch.view_as_real(b.resolve_conj()), width))
        self.c = nn.Parameter(torch.randn(1 if causal else 2, width, state // 2, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(width))
        self.output = nn.Linear(width, 2 * width)
        self.p = None
        self._readouts: tuple[Any, Tensor] | None = None
        if low is not None:
            self.p = nn.Parameter(_copies(torch.view_as_real(low.resolve_conj()), width))
            self.register_buffer("length", torch.tensor(length))
            with torch.no_grad():
                transition, _ = conv.dense(self._system())
                for c in self.c:
                    c.copy_(_pairs(conv.truncated(_complex(c), transition, length)))
        for parameter in (self.log_step, self.log_decay, self.frequency, self.b, self.p):
            if parameter is not None:
                parameter._optim = {"lr": 1e-3, "weight_decay": 0.0}  # pyright: ignore

    def mix(
        self, x: Inputs, state: S4State | None, keep: Keep | None
    ) -> tuple[Inputs, S4State | None]:
        u = x.transpose(1, 2)  # B E L
        with torch.autocast(x.device.type, enabled=False):
            y, last = self._causal(u, state and state.x) if self.causal else self._both_ways(u)
        y = F.glu(self.output(F.gelu(y.transpose(1, 2))), dim=-1)
        return y, None if last is None else S4State(last)

    def _causal(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        length = u.shape[2]
        if u.numel() == 0:
            return u, u.new_zeros(*u.shape[:2], *self.b.shape[1:]) if state is None else state
        if self.form == "diagonal":
            a, v = self._diagonal(0)
            if length > 1:
                return conv.diagonal(u, a, v, state, skip=self.skip)
            y, state = conv.diagonal_step(u[..., 0], a, v, state)
        elif length > 1:
            return self._low_rank(u, state)
        else:
            system, c = self._system(self.rate), self._readout()[0]
            y, state = conv.low_rank_step(u[..., 0], system, c, state)
        return (y + self.skip * u[..., 0])[..., None], state

    def _low_rank(self, u: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        length = u.shape[2]
        kernel = self._taps(length, resumed=state is not None)[0]
        y = conv.convolve(u, kernel + F.pad(self.skip[:, None], (0, length - 1)))
        transition, input = conv.dense(self._system(self.rate))
        before = None if state is None else state.flatten(2)
        if before is not None:
            row = conv.readout(self._readout()[0])
            y = y + conv.dense_response(before, transition, row, length).to(y.dtype)
        last = conv.dense_state(u, transition, input, before)
        return y, last.unflatten(2, (-1, 2))

    def _both_ways(self, u: Tensor) -> tuple[Tensor, None]:
        length = u.shape[2]
        if u.numel() == 0:
            return u, None
        if self.form == "diagonal":
            forth, _ = conv.diagonal(u, *self._diagonal(0), skip=self.skip)
            back, _ = conv.diagonal(u.flip(2), *self._diagonal(1))
            return forth + back.flip(2), None
        forth, back = self._taps(length)
        kernel = F.pad(forth, (length - 1, 0)) + F.pad(back.flip(1), (0, length - 1))
        kernel = kernel + F.pad(self.skip[:, None], (length - 1, length - 1))
        return conv.convolve(u, kernel, origin=length - 1), None

    def _eigenvalues(self) -> Tensor:
        return torch.complex(-_wide(self.log_decay).exp(), _wide(self.frequency))

    def _diagonal(self, direction: int) -> tuple[Tensor, Tensor]:
        step = _wide(self.log_step).exp() * self.rate
        b = _complex(self.b)
        a, b = conv.discretise(self._eigenvalues(), b, step, self.discretisation)
        return a, _complex(self.c[direction]) * b

    def _system(self, rate: float = 1.0) -> conv.LowRank:
        assert self.p is not None
        step = _wide(self.log_step).exp() * rate
        return conv.LowRank(self._eigenvalues(), _complex(self.p), _complex(self.b), step)

    def _readout(self) -> Tensor:
        """C of every direction, from C̃; kept while no gradient is wanted and nothing changed."""
        parameters = (self.log_step, self.log_decay, self.frequency, self.p, self.b, self.c)
        key = [(t.data_ptr(), t._version, t.dtype) for t in parameters if t is not None]
        if not torch.is_grad_enabled() and self._readouts and self._readouts[0] == key:
            return self._readouts[1]
        transition, _ = conv.dense(self._system())
        c = torch.stack(
            [conv.untruncated(_complex(c), transition, int(self.length)) for c in self.c]
        )
        if not torch.is_grad_enabled():
            self._readouts = key, c
        return c

    def _taps(self, length: int, *, resumed: bool = False) -> list[Tensor]:
        """The kernel of every direction, E L each."""
        system, nodes = self._system(self.rate), int(self.length)
        if resumed or self.rate != 1:
            transition, _ = conv.dense(system)
            cs = [conv.truncated(c, transition, length) for c in self._readout()]
            nodes = length
        else:
            cs, nodes = self._lengthened(length)
        dtype = torch.promote_types(self.c.dtype, torch.float32)
        return [conv.low_rank_kernel(system, c, nodes, dtype)[:, :length] for c in cs]

    def _lengthened(self, length: int) -> tuple[list[Tensor], int]:
        """C̃ of every direction for at least `length` taps, and for how many."""
        nodes = int(self.length)
        cs = [_complex(c) for c in self.c]
        if nodes < length:
            transition, _ = conv.dense(self._system())
            while nodes < length:
                cs = [conv.doubled(c, transition, nodes) for c in cs]
                nodes *= 2
        return cs, nodes

    @torch.no_grad()
    def grow(self, length: int) -> None:
        """Double the trained kernel until it holds `length` taps: C̃ ← C̃ (I + A_d^L) (dplr)."""
        if self.form == "diagonal":
            return
        cs, nodes = self._lengthened(length)
        for parameter, c in zip(self.c, cs, strict=True):
            parameter.copy_(_pairs(c))
        self.length.fill_(nodes)


def _copies(of: Tensor, width: int) -> Tensor:
    return of.to(torch.get_default_dtype()).expand(width, *of.shape).clone()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(_wide(pairs))


def _pairs(values: Tensor) -> Tensor:
    return torch.view_as_real(values.resolve_conj())
