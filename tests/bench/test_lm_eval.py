"""lm-eval on longspan's models: likelihoods and answers beside ones computed by hand."""

import builtins
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from typer.testing import CliRunner

from longspan.bench import lm_eval
from longspan.cli import app
from longspan.data import ruler
from longspan.data.byte_tokenizer import byte_tokenizer
from longspan.errors import LongspanError
from longspan.models import LongspanConfig, LongspanForCausalLM, LongspanForSeq2SeqLM

MIXERS = ["multi-head-attention", "linear-transformer", "s4"]
TEXTS = ("a short one", "A text of another length, é", "and the third")


def tiny(mixer: str = "linear-transformer", **named: Any) -> LongspanForCausalLM:
    torch.manual_seed(0)
    config = LongspanConfig(
        **{"width": 16, "layers": 2, "heads": 2, "mixers": [mixer], "length": 512, **named}
    )
    model = LongspanForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Larger than at the start, so that predictions differ from place to place.
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def ask(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mixer", MIXERS)
def test_likelihood_is_the_model_s(mixer: str, batch: int) -> None:
    model = tiny(mixer)
    pairs = [(text, f" {continued}") for text in TEXTS for continued in ("no", "é, longer")]
    lm = lm_eval.harness(model, byte_tokenizer(), batch=batch)
    for (text, continued), (nats, greedy) in zip(
        pairs, lm.loglikelihood(ask("loglikelihood", pairs)), strict=True
    ):
        ids = torch.tensor([[*text.encode(), *continued.encode()]])
        logits = model(input_ids=ids, use_cache=False).logits.detach()[0]
        first = len(text.encode())
        want = sum(
            float(logits[i - 1].log_softmax(0)[ids[0, i]]) for i in range(first, ids.shape[1])
        )
        assert nats == pytest.approx(want, abs=1e-3)
        assert greedy == bool((logits[first - 1 : -1].argmax(-1) == ids[0, first:]).all())


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("mixer", MIXERS)
def test_answers_are_greedy_and_come_of_states(mixer: str, batch: int) -> None:
    model = tiny(mixer)
    lengths: list[int] = []
    watch = model.register_forward_pre_hook(
        lambda _, given, named: (
            lengths.append((given[0] if given else named["input_ids"]).shape[1]) or None
        ),
        with_kwargs=True,
    )
    lm = lm_eval.harness(model, byte_tokenizer(), batch=batch)
    settings = {"until": [], "do_sample": False, "max_gen_toks": 12}
    made = lm.generate_until(ask("generate_until", [(text, settings) for text in TEXTS]))
    # Each batch reads its prompts once, then a token at a time.
    assert len([length for length in lengths if length > 1]) == -(-len(TEXTS) // batch)
    watch.remove()
    for text, answer in zip(TEXTS, made, strict=True):
        ids = list(text.encode())
        for _ in range(12):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
        said = bytes(ids[len(text.encode()) :]).partition(b"\0")[0]
        assert answer == said.decode(errors="replace")


class Fake(LM):
    """Answers each prompt by the function given."""

    def __init__(self, answer: Callable[[dict[str, Any]], str]) -> None:
        super().__init__()
        self.answer = answer

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self.answer(request.doc) for request in requests]

    loglikelihood = loglikelihood_rolling = generate_until  # pyright: ignore


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        (lambda row: f"They are {', '.join(row['answers'])}.", lambda _: 1.0),
        (lambda row: "", lambda _: 0.0),
        (lambda row: row["answers"][0], lambda row: 1 / len(row["answers"])),
    ],
    ids=["right", "silent", "first"],
)
def test_scores_of_known_answers(
    answer: Callable[[dict[str, Any]], str], wanted: Callable[[dict[str, Any]], float]
) -> None:
    tasks = lm_eval.ruler_tasks(
        list(ruler.TASKS), lengths=[1024, 2048], samples=1, tokens=lambda text: len(text.split())
    )
    results = lm_eval.run(Fake(answer), tasks)
    found = lm_eval.scores(results)
    assert set(found) == set(ruler.TASKS)
    for name, given in found.items():
        rows = [sample["doc"] for sample in results["samples"][name]]
        assert sorted(row["length"] for row in rows) == [1024, 2048]
        assert given == dict.fromkeys((1024, 2048), pytest.approx(wanted(rows[0])))


def test_a_model_is_evaluated(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny()
    before = torch.random.get_rng_state()
    with caplog.at_level(logging.WARNING):
        results = lm_eval.evaluate(
            model,
            byte_tokenizer(),
            tasks=["frequent-words"],
            lengths=[500, 512],
            samples=2,
            batch=2,
        )
    found = lm_eval.scores(results)
    assert found.keys() == {"frequent-words"}
    assert found["frequent-words"].keys() == {500, 512}
    assert len(results["samples"]["frequent-words"]) == 4
    assert "truncat" not in caplog.text.lower()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_an_encoder_decoder_answers() -> None:
    torch.manual_seed(0)
    config = LongspanConfig(
        width=16, layers=2, heads=2, is_encoder_decoder=True, decoder_start_token_id=0
    )
    lm = lm_eval.harness(LongspanForSeq2SeqLM(config).eval(), byte_tokenizer(), batch=2)
    settings = {"until": [], "do_sample": False, "max_gen_toks": 4}
    made = lm.generate_until(ask("generate_until", [(text, settings) for text in TEXTS]))
    assert len(made) == len(TEXTS)


def test_a_longer_input_is_cut_aloud_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    lm = lm_eval.harness(tiny(), byte_tokenizer(), max_length=16)
    with caplog.at_level(logging.WARNING):
        lm.loglikelihood(ask("loglikelihood", [("a context of more than sixteen", " x")]))
    assert "exceeds model's maximum length (16)" in caplog.text
    with pytest.raises(
        LongspanError, match=r"takes 512 tokens and the lengths ask for 1024: .*max_length=1024"
    ):
        lm_eval.evaluate(tiny(), byte_tokenizer(), lengths=[512, 1024])
    beyond = lm_eval.evaluate(
        tiny(length=64),
        byte_tokenizer(),
        tasks=["frequent-words"],
        lengths=[512],
        samples=1,
        max_length=512,
    )
    assert lm_eval.scores(beyond)["frequent-words"].keys() == {512}


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(LongspanError, match="nothing to evaluate at lengths=\\[\\]"):
        lm_eval.evaluate(tiny(), tokenizer, lengths=[])
    with pytest.raises(LongspanError, match="no task 'squad'"):
        lm_eval.evaluate(tiny(), tokenizer, tasks=["squad"])
    with pytest.raises(LongspanError, match="the tokenizer has 256 tokens and the model 100"):
        lm_eval.harness(tiny(vocab_size=100), tokenizer)
    leaky = tiny("reformer-lsh", allow_leaks=True)
    with pytest.raises(LongspanError, match="see the padding after shorter texts: give batch=1"):
        lm_eval.harness(leaky, tokenizer, batch=2)
    tokenizer.eos_token = None
    with pytest.raises(LongspanError, match="no eos_token"):
        lm_eval.harness(tiny(), tokenizer)
    there = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name == "lm_eval":
            raise ImportError(name)
        return there(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(LongspanError, match=r"pip install 'longspan\[eval\]'"):
        lm_eval.harness(tiny(), byte_tokenizer())


def test_a_folder_is_loaded_and_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny().save_pretrained(tmp_path / "bytes")
    assert lm_eval.load(tmp_path / "bytes").tokenizer("é").input_ids == [195, 169]
    arguments = ["evaluate", str(tmp_path / "bytes"), "--tasks", "frequent-words", "--samples", "1"]
    done = CliRunner().invoke(app, [*arguments, "--lengths", "256"])
    assert done.exit_code == 2
    assert "takes at least" in done.output
    done = CliRunner().invoke(app, [*arguments, "--lengths", "512,500", "--json"])
    assert json.loads(done.stdout) == {"frequent-words": {"512": 0.0, "500": 0.0}}
    known = {"frequent-words": {500: 0.25, 512: 1.0}}
    monkeypatch.setattr(lm_eval, "evaluate", lambda *_, **__: {})
    monkeypatch.setattr(lm_eval, "scores", lambda _: known)
    done = CliRunner().invoke(app, [*arguments, "--lengths", "500,512"])
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["%", "of", "the", "answers", "500", "512"],
        ["frequent-words", "25.0", "100.0"],
    ]


def test_folders_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LongspanError, match=r"holds no model \(no config.json\)"):
        lm_eval.load(tmp_path)
    tiny(vocab_size=300).save_pretrained(tmp_path)
    with pytest.raises(LongspanError, match="has 300 tokens and no tokenizer beside it"):
        lm_eval.load(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(lm_eval.load(tmp_path).tokenizer) == 256


def test_bytes_are_tokens() -> None:
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(0x500))) + "é Ā\u3000\U0001f600 \n\n  x"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    assert len(tokenizer) == tokenizer.vocab_size == 256
    ends = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert ends == (0, 0, 0)
    assert tokenizer.decode([65, 0, 66], skip_special_tokens=True) == "AB"
    assert tokenizer.decode([65, 200, 66]) == "A\ufffdB"
