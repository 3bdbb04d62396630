"""Perceiver AR: masks, prefixes, strides, streaming, padding, the language model."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from longspan import LongspanError
from longspan.mechanisms.latent.perceiver_ar import PartlyRotary
from longspan.models.perceiver_ar import PerceiverARConfig, PerceiverARForCausalLM, random_crop
from longspan.nn import Block, MultiHead
from longspan.registry import build

E, H, S, M = 16, 2, 11, 5


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def reader(**arguments: Any) -> Any:
    given = {"width": E, "heads": H, "layers": 2, "latents": M, "rotated": 0.5}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build("perceiver-ar", **given | arguments).double().eval()
        for p in module.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
    return module


def turned(x: Tensor, pos: Tensor, channels: int, base: float) -> Tensor:
    """One head, S D: complex numbers turned by pos · base^(−linspace(0, 1))."""
    half = channels // 2
    theta = base ** -torch.linspace(0, 1, half, dtype=x.dtype)
    z = torch.complex(x[:, :half], x[:, half:channels])
    z = z * torch.polar(torch.ones_like(theta)[None], pos[:, None] * theta)
    return torch.cat([z.real, z.imag, x[:, channels:]], -1)


def oracle(module: Any, x: Tensor, count: int) -> Tensor:
    """The paper's formula of one row, S E → n E, masks written out."""
    pos = torch.arange(len(x), dtype=x.dtype)

    def attends(mixer: Any, queries: Tensor, source: Tensor, places: Tensor) -> Tensor:
        at = places[len(places) - len(queries) :]
        q, k, v = (
            mixer.project[n](t) for n, t in zip("qkv", (queries, source, source), strict=True)
        )
        outs = []
        for h in range(H):
            part = slice(h * E // H, (h + 1) * E // H)
            scores = turned(q[:, part], at, 4, 8192) @ turned(k[:, part], places, 4, 8192).T
            hidden = places > at[:, None]
            weights = (scores / (E // H) ** 0.5).masked_fill(hidden, -torch.inf).softmax(-1)
            outs.append(weights @ v[:, part])
        return mixer.output(torch.cat(outs, -1))

    def feeds(feed: Any, z: Tensor) -> Tensor:
        return feed[2](feed[0](z).relu() ** 2)

    c, last = module.cross, x[len(x) - count :]
    z = last + attends(c.mixer, c.norm(last), c.source_norm(x), pos)
    z = z + feeds(c.feed, c.feed_norm(z))
    for layer in module.layers:
        u = layer.mixer_norm(z)
        z = z + attends(layer.mixer, u, u, torch.arange(count, dtype=x.dtype))
        z = z + feeds(layer.feed_forward, layer.feed_forward_norm(z))
    return z


@pytest.mark.parametrize(("length", "count"), [(S, M), (S, 2), (M, M), (3, 3), (1, 1)])
def test_it_is_its_formula(length: int, count: int) -> None:
    module, x = reader(), normal(2, length, E)
    got, _ = module(x, latents=count)
    assert_close(got, torch.stack([oracle(module, row, count) for row in x]))


def test_the_rotary_grid_is_an_option_and_so_is_its_share() -> None:
    x, pos = normal(1, 1, 7, 8), torch.arange(7)
    for channels in (0, 4, 8):
        rotary = PartlyRotary(channels=channels, base=8192.0, spacing="inclusive")
        got = rotary.rotate(x, pos)
        if channels:
            assert_close(got[0, 0], turned(x[0, 0], pos.double(), channels, 8192))
        assert_close(got[..., channels:], x[..., channels:])
    paper = PartlyRotary(channels=8, base=10000.0, spacing="paper").rotate(x, pos)
    rope = build("rope", layout="half-split").rotate(x, pos)
    assert_close(paper, rope)


def test_with_all_positions_latent_it_is_a_causal_transformer() -> None:
    module, x = reader(latents=S), normal(2, S, E)
    c = module.cross
    c.source_norm.load_state_dict(c.norm.state_dict())
    mixer = MultiHead(
        build("multi-head-attention", causal=True), width=E, heads=H, position=c.position
    )
    first = Block(mixer, c.feed, width=E).double()
    first.mixer.load_state_dict(c.mixer.state_dict())
    first.mixer_norm.load_state_dict(c.norm.state_dict())
    assert first.feed_forward_norm is not None
    first.feed_forward_norm.load_state_dict(c.feed_norm.state_dict())
    z = first(x)[0]
    for layer in module.layers:
        z = layer(z)[0]
    assert_close(module(x)[0], z)


def test_no_latent_sees_a_later_input() -> None:
    module, x = reader(), normal(1, S, E).requires_grad_()
    z, _ = module(x)
    for a in range(M):
        (g,) = torch.autograd.grad(z[0, a].sum(), x, retain_graph=True)
        seen = g[0].any(-1)
        assert seen[: S - M + a + 1].all()
        assert not seen[S - M + a + 1 :].any()


def test_the_whole_prefix_may_be_dropped_in_training_alone() -> None:
    module, x = reader(prefix_dropout=1.0), normal(2, S, E)
    whole = module(x)[0]
    alone = module(x[:, S - M :])[0]
    dropped = module.train()(x)[0]
    assert_close(dropped, alone)  # dropping keys equals their absence, and distances stay
    assert not torch.allclose(whole, alone)
    kept = reader(prefix_dropout=0.0)
    assert_close(kept.train()(x)[0], kept.eval()(x)[0])


def test_prefix_dropout_spares_latents_and_takes_a_generator() -> None:
    generator = torch.Generator().manual_seed(3)
    module = reader(prefix_dropout=0.5, generator=generator).train()
    x, before = normal(4, 400, E), torch.random.get_rng_state()
    stays = module.cross._open(x, 395, None)
    assert stays[:, 395:].all()
    assert 0.4 < stays[:, :395].double().mean() < 0.6
    module(x)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("refill", [1, 3, M])
@pytest.mark.parametrize("start", [1, 2, M])
@pytest.mark.parametrize("chunk", [None, 2])
def test_streaming_equals_recomputation_in_strides(
    refill: int, start: int, chunk: int | None
) -> None:
    module, x = reader(refill=refill, chunk=chunk), normal(2, S + 9, E)
    _, state = module(x[:, :S], latents=start)
    count = start
    for t in range(S, S + 9):
        z, state = module(x[:, t : t + 1], state)
        count = count + 1 if count < M else refill
        assert int(state.count[0]) == count
        assert_close(z, module(x[:, : t + 1], latents=count)[0][:, -1:])


def test_a_stride_may_begin_with_another_number_of_latents_and_pieces_of_any_size() -> None:
    module, x = reader(), normal(1, S + 4, E)
    _, state = module(x[:, :S])
    z, _ = module(x[:, S : S + 1], state, latents=4)
    assert_close(z, module(x[:, : S + 1], latents=4)[0][:, -1:])
    _, state = module(x[:, :S], latents=1)
    z, state = module(x[:, S:], state)
    assert_close(z, module(x, latents=5)[0][:, 1:])
    z, _ = module(normal(1, 9, E), state)
    assert z.shape == (1, M, E)


def test_chunks_of_the_context_change_nothing() -> None:
    module, chunked, x = reader(), reader(chunk=3), normal(2, S, E)
    keep = torch.ones(2, S, dtype=torch.bool)
    keep[0, :4] = False
    for mask in (None, keep):
        assert_close(chunked(x, keep=mask)[0], module(x, keep=mask)[0])


@pytest.mark.slow
def test_a_context_of_a_hundred_thousand() -> None:
    module = reader(chunk=4096, latents=64).float().train()
    x = normal(1, 100_000, E).float().requires_grad_()
    module(x)[0].square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def model(**arguments: Any) -> Any:
    given: dict[str, Any] = {"vocab_size": 13, "width": E, "heads": H, "layers": 2, "latents": M}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = PerceiverARForCausalLM(PerceiverARConfig(**given | arguments)).double().eval()
        torch.nn.init.normal_(built.lm_head.weight)
    return built


def text(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(13, (rows, length), generator=torch.Generator().manual_seed(seed))


POSITIONS = [None, "sinusoidal-position", "learned-position"]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_at_either_end_changes_nothing(position: Any, side: str) -> None:
    lm, ids = model(position=position, length=64), text(2, S)
    mask = torch.ones(2, S, dtype=torch.long)
    short = 3
    mask[0, slice(0, S - short) if side == "left" else slice(short, S)] = 0
    alone = ids[:1][mask[:1].bool()][None]
    got = lm(ids, mask, labels=ids)
    assert_close(got.logits[0, -short:], lm(alone).logits[0])
    assert_close(got.logits[1], lm(ids[1:]).logits[0])
    parts = [lm(alone, labels=alone), lm(ids[1:], labels=ids[1:])]
    total = (parts[0].loss * (short - 1) + parts[1].loss * (M - 1)) / (short - 1 + M - 1)
    assert_close(got.loss, total)


def test_only_the_last_m_positions_are_scored() -> None:
    lm, ids = model(), text(2, S)
    labels = ids.clone()
    labels[:, : S - M + 1] = -100
    whole = lm(ids, labels=ids)
    assert whole.logits.shape == (2, M, 13)
    assert_close(lm(ids, labels=labels).loss, whole.loss)
    want = torch.nn.functional.cross_entropy(
        whole.logits[:, :-1].flatten(0, 1), ids[:, 1 - M :].flatten()
    )
    assert_close(whole.loss.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("position", POSITIONS)
def test_cached_generation_equals_recomputation_with_every_last_m(position: Any) -> None:
    lm, ids = model(refill=M, position=position, length=64), text(2, S)
    mask = torch.ones(2, S, dtype=torch.long)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = lm.generate(ids, **options)
    assert torch.equal(cached, lm.generate(ids, use_cache=False, **options))
    first = lm(ids, mask, use_cache=True)
    later = lm(cached[:, S : S + 1], past_key_values=first.past_key_values)
    longer = torch.cat([mask, mask[:, -1:]], 1)
    assert_close(later.logits[:, -1], lm(cached[:, : S + 1], longer).logits[:, -1])


def test_generation_in_strides_and_beams_runs() -> None:
    lm, ids = model(refill=2), text(2, S)
    assert lm.generate(ids, max_new_tokens=9, num_beams=2).shape == (2, S + 9)


def test_crops_have_prefixes_of_every_length() -> None:
    ids, generator = torch.arange(20)[None], torch.Generator().manual_seed(0)
    crops = [random_crop(ids, latents=M, generator=generator) for _ in range(300)]
    assert {c.shape[1] for c in crops} == set(range(M, 21))
    assert all(torch.equal(c[0], torch.arange(int(c[0, 0]), int(c[0, -1]) + 1)) for c in crops)
    with pytest.raises(LongspanError, match="give longer ones"):
        random_crop(ids[:, :3], latents=M)


def test_the_model_starts_uniform_learns_from_its_prefix_and_reloads(tmp_path: Any) -> None:
    lm = model(prefix_dropout=0.1, latents=3).float().train()
    torch.nn.init.zeros_(lm.lm_head.weight)
    ids = text(32, 12)
    ids[:, 9:] = ids[:, :3]  # what comes last was said first, outside the latents
    first = lm(ids, labels=ids).loss
    assert_close(first, torch.tensor(13.0).log())
    optimiser = torch.optim.Adam(lm.parameters(), lr=1e-2)
    for _ in range(60):
        loss = lm(ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.5 * first
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())
    lm.eval().save_pretrained(tmp_path)
    again = PerceiverARForCausalLM.from_pretrained(tmp_path)
    assert_close(again(ids).logits, lm(ids).logits)


def test_bad_numbers_are_refused() -> None:
    for wrong in ({"refill": 6}, {"rotated": 1.5}, {"prefix_dropout": -0.1}):
        with pytest.raises(LongspanError, match="1 ≤ refill"):
            reader(**wrong)
    with pytest.raises(LongspanError, match="does not divide"):
        reader(heads=3)
    with pytest.raises(LongspanError, match="give 1 to that many"):
        reader()(normal(1, S, E), latents=6)
    with pytest.raises(LongspanError, match="position is 'rope'"):
        model(position="rope")
