"""Token Turing Machines (Ryoo et al., 2022)."""

from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from longspan.card import Card
from longspan.engines import dense
from longspan.errors import LongspanError
from longspan.nn import Block, FeedForward, Mixer, MultiHead, blockwise
from longspan.registry import build, mechanism
from longspan.shapes import Context, Inputs, Keep, Marks

Bag = Float[Tensor, "B _ E"]
Frames = Float[Tensor, "B T n E"]
Summariser = Literal["learner", "attention"]
Write = Literal["summary", "erase"]
Processor = Literal["transformer", "mixer", "mlp"]


class Learner(nn.Module):
    """S_k(V) = W V, W = softmax over tokens of MLP(LN(V))ᵀ (TokenLearner 1.1, Eq. 3)."""

    def __init__(self, width: int, tokens: int, inner: int = 64) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, tokens))

    def forward(self, v: Bag) -> Bag:
        # Weights are made of LN(V) and applied to V itself.
        return self.scores(self.norm(v)).softmax(1).mT @ v


class Pooling(nn.Module):
    """S_k(V) = MultiHead(queries, V, V), of k learned queries."""

    def __init__(self, width: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(tokens, width) * 0.02)
        self.heads = heads
        self.project = nn.ModuleDict({n: nn.Linear(width, width) for n in "qkv"})
        self.output = nn.Linear(width, width)

    def forward(self, v: Bag) -> Bag:
        given = self.queries.expand(v.shape[0], -1, -1), v, v
        q, k, v = (
            rearrange(self.project[n](t), "B L (H D) -> B H L D", H=self.heads)
            for n, t in zip("qkv", given, strict=True)
        )
        return self.output(rearrange(dense.explicit(q, k, v)[0], "B H L D -> B L (H D)"))


class AddErase(nn.Module):
    """M' = M ∘ Π_i (1 − s_i e_i) + Σ_i s_i a_i, s = softmax over slots of MLP(LN(M)).

    e (within 0 and 1) and a are of the outputs, mixed along tokens, then along channels.

    Args:
        released: add the mean of 1 − s_i a_i instead, as the official code does.
    """

    def __init__(self, width: int, reads: int, *, released: bool, inner: int = 64) -> None:
        super().__init__()
        self.released = released
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, reads))
        self.tokens = nn.ModuleDict({n: nn.Linear(reads, reads) for n in ("erase", "add")})
        self.channels = nn.ModuleDict({n: FeedForward(width) for n in ("erase", "add")})

    def forward(self, m: Bag, o: Bag) -> Bag:
        s = self.scores(self.norm(m)).softmax(1).mT[..., None]  # B k M 1
        e, a = (self.channels[n](self.tokens[n](o.mT).mT) for n in ("erase", "add"))
        kept = (1 - s * e.sigmoid()[:, :, None]).prod(1)
        added = s * a[:, :, None]
        return m * kept + ((1 - added).mean(1) if self.released else added.sum(1))


class Mixing(nn.Module):
    """x + MLP along tokens of LN(x), then + MLP along channels (MLP-Mixer); or the latter alone."""

    def __init__(self, width: int, tokens: int | None) -> None:
        super().__init__()
        self.along = None if tokens is None else FeedForward(tokens, inner=4 * width)
        self.channels = FeedForward(width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(1 + (tokens is not None)))

    def forward(self, x: Bag) -> Bag:
        if self.along is not None:
            x = x + self.along(self.norms[1](x).mT).mT
        return x + self.channels(self.norms[0](x))


class Encoding(nn.Module):
    """A pre-norm Transformer layer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        mixer = MultiHead(build("multi-head-attention"), width=width, heads=heads)
        self.block = Block(mixer, FeedForward(width), width=width)

    def forward(self, x: Bag) -> Bag:
        return self.block(x)[0]


@mechanism(
    Card(
        id="token-turing-machine",
        name="Token Turing Machines",
        kind="memory",
        family="recurrent-memory",
        paper="Token Turing Machines",
        cite="Ryoo et al., CVPR 2023",
        link="https://arxiv.org/abs/2211.09119",
        what="Reads a few tokens from a memory and the input, processes them, and writes memory, "
        "input and output back as a memory of fixed size.",
        modes={"causal", "step"},
        time="L*M*E + L*E*E",
        memory="M*E",
        tiny={"width": 24, "heads": 3, "memory": 5, "reads": 3, "layers": 1},
        exact={"width": 24, "heads": 3, "memory": 0, "reads": 3, "layers": 1},
        skips={
            "a_first_segment_has_no_memory": "an empty memory is zeros, which the softmax over "
            "tokens counts",
        },
    )
)
class TokenTuring(Mixer):
    """One step a token, or a frame of n tokens (Sec. 3):

        Z = S_r([M ; I]),   O = P(Z),   M' = S_m([M ; I ; O])

    The state is M, zeros at first. `forward` gives the mean of O for each token; `sequence` gives
    O of each frame.

    Args:
        memory: m. reads: r. inputs: n, needed for positions.
        summariser: of reads and writes. write: `erase` erases and adds instead of summarising.
        released: of `erase`, the official code's sum.
        processor, layers: P.
        simplified: I' = S_r(I), [M' ; O] = P([M ; I']): memory first, outputs last.
        positions: learned ones added before a read and before a write.
        truncate: gradients pass through so many steps of the memory; None for all of a call.

    Raises:
        LongspanError: sizes that do not fit, or an unknown part.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int = 8,
        memory: int = 96,
        reads: int = 16,
        inputs: int = 1,
        summariser: Summariser = "learner",
        write: Write = "summary",
        released: bool = False,
        processor: Processor = "transformer",
        layers: int = 4,
        simplified: bool = False,
        positions: bool = False,
        truncate: int | None = None,
    ) -> None:
        super().__init__()
        if min(reads, inputs, 1 if truncate is None else truncate) < 1 or memory < 0:
            raise LongspanError(
                f"token-turing-machine got memory={memory}, reads={reads}, inputs={inputs}, "
                f"truncate={truncate}: expected 0 or more, and 1 or more."
            )
        for given, known in ((summariser, Summariser), (write, Write), (processor, Processor)):
            if given not in get_args(known):
                raise LongspanError(
                    f"token-turing-machine has no {given!r}; expected {', '.join(get_args(known))}."
                )
        self.width, self.memory, self.reads, self.inputs = width, memory, reads, inputs
        self.simplified, self.truncate = simplified, truncate

        def summary(tokens: int) -> nn.Module:
            if summariser == "learner":
                return Learner(width, tokens)
            return Pooling(width, tokens, heads)

        self.read = summary(reads)
        self.writes = None
        if memory and not simplified:
            erases = write == "erase"
            self.writes = AddErase(width, reads, released=released) if erases else summary(memory)
        tokens = reads + memory if simplified else reads
        layer = {
            "transformer": lambda: Encoding(width, heads),
            "mixer": lambda: Mixing(width, tokens),
            "mlp": lambda: Mixing(width, None),
        }[processor]
        self.process = nn.Sequential(*(layer() for _ in range(layers)), nn.LayerNorm(width))
        self.before_read = self.before_write = None
        if positions:
            sizes = memory + inputs, memory + inputs + reads
            self.before_read = nn.Parameter(torch.randn(sizes[0], width) * 0.02)
            if isinstance(self.writes, Learner | Pooling):
                self.before_write = nn.Parameter(torch.randn(sizes[1], width) * 0.02)

    @torch.compiler.disable  # a loop over tokens, unrolled, compiles for minutes
    def forward(
        self,
        x: Inputs,
        state: Float[Tensor, "B M E"] | None = None,
        *,
        keep: Keep | None = None,
        context: Context | None = None,
        marks: Marks | None = None,
    ) -> tuple[Inputs, Float[Tensor, "B M E"]]:
        x, _ = blockwise.alone(self, x, keep, context, marks)
        o, m = self.sequence(x[:, :, None], state, keep=keep)
        return o.mean(2), m

    def sequence(
        self, x: Frames, state: Float[Tensor, "B M E"] | None = None, *, keep: Keep | None = None
    ) -> tuple[Float[Tensor, "B T r E"], Float[Tensor, "B M E"]]:
        """The outputs of frame after frame, and the memory; masked frames are passed over.

        Raises:
            LongspanError: frames of another number of tokens than positions were learned for.
        """
        if self.before_read is not None and x.shape[2] != self.inputs:
            raise LongspanError(
                f"frames have {x.shape[2]} tokens and positions are of {self.inputs}: build it "
                f"with inputs={x.shape[2]}, or without positions."
            )
        m = x.new_zeros(x.shape[0], self.memory, self.width) if state is None else state
        outs = []
        for t, frame in enumerate(x.unbind(1)):
            if self.truncate is not None and t % self.truncate == 0:
                m = m.detach()
            o, later = self.step(frame, m)
            if keep is not None:
                here = keep[:, t, None, None]
                o, later = o.masked_fill(~here, 0), torch.where(here, later, m)
            outs.append(o)
            m = later
        if not outs:
            return x.new_zeros(x.shape[0], 0, self.reads, self.width), m
        return torch.stack(outs, 1), m

    def step(self, x: Bag, m: Bag) -> tuple[Bag, Bag]:
        """(O_t, M_{t+1})."""
        if self.simplified:
            o = self.process(torch.cat([m, self.read(self._placed(m, x)[:, self.memory :])], 1))
            return o[:, self.memory :], o[:, : self.memory]
        o = self.process(self.read(self._placed(m, x)))
        if self.writes is None:
            return o, m
        if isinstance(self.writes, AddErase):
            return o, self.writes(m, o)
        whole = torch.cat([m, x, o], 1)  # the memory of before, with what came of it
        return o, self.writes(whole if self.before_write is None else whole + self.before_write)

    def _placed(self, m: Bag, x: Bag) -> Bag:
        whole = torch.cat([m, x], 1)
        return whole if self.before_read is None else whole + self.before_read
