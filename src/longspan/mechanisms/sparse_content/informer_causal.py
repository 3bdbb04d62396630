"""ProbSparse attention without the paper's view of the future."""

import torch
from jaxtyping import Float
from torch import Tensor

from longspan.card import Card
from longspan.engines import bucket
from longspan.errors import LongspanError
from longspan.nn.spiking import Running, SpikingAttention
from longspan.registry import mechanism
from longspan.shapes import Keep, Keys, Outputs, Queries, Values

State = Running | None


@mechanism(
    Card(
        id="informer-causal",
        name="Strictly causal ProbSparse attention",
        kind="attention",
        family="sparse-content",
        paper="Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
        cite="Zhou et al., AAAI 2021; strict form: longspan",
        link="https://arxiv.org/abs/2012.07436",
        what="A query attends where its scores look less uniform than those of almost all before "
        "it; the others take the sum of past values.",
        modes={"causal", "step"},
        time="L*M*D + S*M*D",
        memory="S*D + S*V",
        tiny={"factor": 3},
        exact={"factor": 1000000},
        skips={"costs_what_it_says": "u ln L queries attend, u ~ ln L: time is O(L ln² L)"},
    )
)
class InformerCausal(SpikingAttention):
    """Full attention for queries that are among the u_t foremost up to themselves.

    Query t is measured on U_t = u_t of the keys up to t, as in informer, and attends if fewer than
    u_t = min(t, factor · ⌈ln t⌉) earlier queries measure as much: the paper's choice, made anew for
    every prefix. Where measures do not drift that comes to u ln L queries, as with records; those
    that would raise the count above 2 u_t ⌈ln t⌉ stay lazy, so that time is O(L ln² L) at worst.
    Lazy rows give the sum of v_1 … v_t, as released, or with `mean` their mean. Nothing depends on
    later tokens. M stands for the attending queries in the cost.

    Args: those of informer.

    Raises:
        LongspanError: a causal=False, a factor below 0, keys before the queries.
    """

    name = "informer-causal"
    one_form = (True, "build informer instead")

    def forward(
        self, q: Queries, k: Keys, v: Values, state: State = None, *, keep: Keep | None = None
    ) -> tuple[Outputs, Running]:
        length = q.shape[2]
        if length != k.shape[2]:
            raise LongspanError(
                f"informer-causal got {length} queries for {k.shape[2]} keys: carry earlier tokens "
                "in the state."
            )
        seen = q.new_ones(q.shape[0], length, dtype=torch.bool) if keep is None else keep
        k, v = (t.masked_fill(~seen[:, None, :, None], 0) for t in (k, v))
        sums = v.to(torch.promote_types(v.dtype, torch.float32)).cumsum(2)
        awake = seen.new_zeros(q.shape[:2], dtype=torch.long)
        measures = None
        if state is not None:
            k, v = torch.cat([state.k, k], 2), torch.cat([state.v, v], 2)
            seen = torch.cat([state.keep, seen], 1)
            sums, awake, measures = sums + state.total[:, :, None], state.awake, state.measures
        count = seen.cumsum(1)[:, seen.shape[1] - length :]  # t
        if not q.numel():
            empty = sums.new_zeros(*q.shape[:2], k.shape[2])
            total = sums.new_zeros(*q.shape[:2], v.shape[3])
            return v[:, :, :length], state or Running(k, v, seen, empty, total, awake)
        budget = bucket.budget(count, self.factor)  # u_t
        new = self.measure(q, k, seen, count, budget)
        measures = new if measures is None else torch.cat([measures, new], 2)
        wish = bucket.leading(measures, seen, budget)
        wish, awake = bucket.capped(wish, 2 * budget * bucket.ceil_log(count), awake)
        lazy = sums / count.clamp(min=1)[:, None, :, None] if self.mean else sums
        o = bucket.awoken(lazy.to(q.dtype), q, k, v, bucket.placed(wish), seen, causal=True)
        return o, Running(k, v, seen, measures, sums[:, :, -1], awake)

    @torch.no_grad()
    def measure(
        self, q: Queries, k: Keys, keep: Keep, count: Tensor, budget: Tensor
    ) -> Float[Tensor, "B H L"]:
        """M(q_t) over keys up to t, without the scores' scale; 0 for what is masked."""
        if self.exact:
            found = bucket.spikes(q, k, keep, first=count)
        else:
            draw = self.sample_once, self.generator()
            found = bucket.running_spikes(q, k, keep, count, budget, *draw)
        return found.nan_to_num(neginf=0).masked_fill(~keep[:, None, -q.shape[2] :], 0)
