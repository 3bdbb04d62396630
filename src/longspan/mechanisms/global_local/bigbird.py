"""BigBird (Zaheer et al., 2020)."""

from collections.abc import Sequence

from longspan.card import Card
from longspan.engines.pattern import Chance, Hubs, Prefixed, UnlessShort, Window
from longspan.engines.pattern import causal as earlier
from longspan.errors import LongspanError
from longspan.nn.patterned import PatternAttention
from longspan.registry import mechanism


@mechanism(
    Card(
        id="bigbird",
        name="BigBird",
        kind="attention",
        family="global-local",
        paper="Big Bird: Transformers for Longer Sequences",
        cite="Zaheer et al., NeurIPS 2020",
        link="https://arxiv.org/abs/2007.14062",
        what="Every block of tokens sees its neighbours, a few global blocks and a few random "
        "ones.",
        modes={"bidirectional", "causal", "step"},
        time="L*C*D + L*C*V",
        memory="S*D + S*V",
        tiny={"block": 4, "chance": 1},
        exact={"near": 1000001},
    )
)
class BigBird(PatternAttention):
    """Block i sees the blocks i − ⌊w/2⌋ … i + ⌊w/2⌋, g global blocks and r random ones (Sec. 2).

    All in one softmax, no block twice; global blocks see all (BigBird-ITC). With `external`, that
    many tokens before the sequence are global instead (BigBird-ETC, App. E). At most (5 + 2r)
    blocks see each other whole, as in the released code. The causal form, where blocks see
    earlier ones and global ones are not last, is an extension: the paper has none.

    Args:
        block: tokens of a block, b. near: w, odd. hubs: which blocks are global, from the end
            below 0. chance: r.
        seed: of the random blocks, drawn for each head, row and number of blocks, the same in
            training and evaluation. Give each layer its own.
        external: global tokens that the caller puts before the sequence; `hubs` then are unused.

    Raises:
        LongspanError: an even or negative `near`; `external` in the causal form.
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        block: int = 64,
        near: int = 3,
        hubs: Sequence[int] = (0, -1),
        chance: int = 3,
        seed: int = 0,
        external: int = 0,
    ) -> None:
        if near < 1 or near % 2 == 0:
            raise LongspanError(
                f"bigbird got near={near}: its window is an odd number of blocks, the own one "
                "in the middle."
            )
        if causal and external:
            raise LongspanError(
                "bigbird's external tokens see the whole sequence and have no causal form: "
                "leave external out."
            )
        side = near // 2
        self.hubs = () if external else tuple(h for h in hubs if h >= 0 or not causal)
        # Causally a global block is no wide row: it sees what is earlier.
        fixed = Window(side, 0 if causal else side) | Hubs(self.hubs, rows=not causal)
        self.random = Chance(chance, fixed, seed, causal)
        sees = (fixed | self.random).blocks(block)
        sees = sees & earlier if causal else UnlessShort(sees, (5 + 2 * chance) * block)
        super().__init__(Prefixed(external, sees) if external else sees, causal=causal, block=block)
        self.near, self.external = near, external
