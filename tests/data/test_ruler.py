"""RULER's tasks: what each prompt holds, by parsing it anew, and how long it is."""

import builtins
import itertools
import math
import re
from collections import Counter
from random import Random
from typing import Any

import pytest

from longspan.data import prose, ruler
from longspan.errors import LongspanError

NEEDLES = [name for name in ruler.TASKS if name.startswith("needle")]


def words(text: str) -> int:
    return len(text.split())


def octets(text: str) -> int:
    return len(text.encode())


def one(name: str, length: int = 1024, **named: Any) -> ruler.Sample:
    return ruler.samples(name, length=length, count=1, tokens=words, **named)[0]


def parts(sample: ruler.Sample) -> tuple[str, str]:
    """The last text and the question after it."""
    context, _, question = sample.prompt.rpartition("\nQuestion: ")
    return context, question


@pytest.mark.parametrize("name", ruler.TASKS)
@pytest.mark.parametrize("length", [1024, 16384])
def test_a_prompt_fills_the_length(name: str, length: int) -> None:
    sample = one(name, length)
    assert sample.tokens == words(sample.prompt)
    # One more line of noise, the coarsest unit, would be 17 words.
    assert length - 17 < sample.tokens + sample.room <= length


@pytest.mark.parametrize("name", ruler.TASKS)
@pytest.mark.parametrize("length", [2048, 4096, 65536])
def test_where_a_token_is_a_byte(name: str, length: int) -> None:
    for sample in ruler.samples(name, length=length, count=2, tokens=octets):
        assert length - 130 < sample.tokens + sample.room <= length
        said = [f"{i}. {answer}" for i, answer in enumerate(sample.answers, 1)]
        right = said if name == "common-words" else sample.answers
        assert octets(" " + " ".join(right)) <= sample.room


@pytest.mark.parametrize("name", ruler.TASKS)
def test_a_seed_decides_everything(name: str) -> None:
    def draw(seed: int) -> list[ruler.Sample]:
        return ruler.samples(name, length=1024, count=3, tokens=words, seed=seed)

    first = draw(0)
    assert first == draw(0)
    assert len({sample.answers for sample in [*first, *draw(1)]}) == 6


def needles(text: str) -> list[tuple[str, str]]:
    return re.findall(r"One secret \w+ of (\S+) is (\S+)\.", text)


@pytest.mark.parametrize(
    "task",
    [*(ruler.TASKS[name] for name in NEEDLES), ruler.Needle(haystack="noise", keys=3, values=2)],
    ids=[*NEEDLES, "some-of-each"],
)
@pytest.mark.parametrize("size", [40, 1000])
def test_needles(task: ruler.Needle, size: int) -> None:
    prompt, answers = task.write(Random(1), size, length=8192)
    context, _, question = prompt.rpartition("\nQuestion: ")
    found = needles(context)
    keys = Counter(key for key, _ in found)
    others = size if task.haystack == "needle" else 0
    assert len(found) == others + task.keys * task.values
    assert len(keys) == others + task.keys
    assert set(keys.values()) == {task.values}
    assert len({value for _, value in found}) == len(found)
    asked = [key for key in keys if re.search(rf"\b{key}(?![\w-])", question)]
    assert len(asked) == task.queries
    assert Counter(answers) == Counter(value for key, value in found if key in asked)
    assert len(answers) == task.queries * task.values
    assert not any(answer in question for answer in answers)
    # What will be asked for is not said before the text.
    assert not any(key in context.partition("\n")[0] for key in keys)


def test_sizes_and_forms_are_the_paper_s() -> None:
    drawn = {name: ruler.TASKS[name] for name in NEEDLES}
    shapes = {
        name: (t.haystack, t.key, t.value, t.keys, t.values, t.queries)
        for name, t in drawn.items()
        if isinstance(t, ruler.Needle)
    }
    assert shapes == {
        "needle-single-1": ("noise", "word", "number", 1, 1, 1),
        "needle-single-2": ("essay", "word", "number", 1, 1, 1),
        "needle-single-3": ("essay", "word", "uuid", 1, 1, 1),
        "needle-multikey-1": ("essay", "word", "number", 4, 1, 1),
        "needle-multikey-2": ("needle", "word", "number", 1, 1, 1),
        "needle-multikey-3": ("needle", "uuid", "uuid", 1, 1, 1),
        "needle-multivalue": ("essay", "word", "number", 1, 4, 1),
        "needle-multiquery": ("essay", "word", "number", 4, 1, 4),
    }
    rooms = [t.room for n, t in ruler.TASKS.items() if n not in NEEDLES]
    assert rooms == [30, 120, 50]
    assert all(t.room == 128 for t in drawn.values())
    (key, value), *_ = needles(one("needle-multikey-1").prompt)
    assert re.fullmatch(r"[a-z]+-[a-z]+", key)
    assert re.fullmatch(r"[1-9]\d{6}", value)
    (key, value), *_ = needles(one("needle-multikey-3").prompt)
    for text in (key, value):
        assert re.fullmatch(r"[\da-f]{8}-[\da-f]{4}-4[\da-f]{3}-[89ab][\da-f]{3}-[\da-f]{12}", text)


@pytest.mark.parametrize("name", ["needle-single-1", "needle-single-2", "needle-multikey-2"])
def test_needles_lie_at_all_depths(name: str) -> None:
    depths = [
        sample.prompt.index(f"is {sample.answers[0]}.") / len(sample.prompt)
        for sample in ruler.samples(name, length=1024, count=40, tokens=words)
    ]
    assert min(depths) < 0.2
    assert max(depths) > 0.8


@pytest.mark.parametrize("chains", [1, 3])
def test_variables_follow_their_chain(chains: int) -> None:
    task = ruler.Variables(chains=chains)
    prompt, answers = task.write(Random(0), 40, length=1024)
    example, main = prompt.split("\n\n")
    for text in (example, main):
        context, _, question = text.rpartition("\nQuestion: ")
        values: dict[str, str] = {}
        # Read from above: a variable is assigned before another takes its value.
        for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", context):
            assert name not in values
            values[name] = number or values[other]
        asked = re.search(r"value (\d{5})\?", question)
        assert asked
        right = {name for name, value in values.items() if value == asked[1]}
        assert len(values) == 5 * chains
        assert len(right) == 5
        said = set(question.split()[-5:]) if text is example else set(answers)
        assert said == right
    assert {len(name) for name in answers} == {5}


@pytest.mark.parametrize(("length", "often", "seldom"), [(1024, 6, 1), (4096, 30, 3)])
def test_common_words_are_the_most_common(length: int, often: int, seldom: int) -> None:
    sample = one("common-words", length)
    context, _ = parts(sample)
    numbers, listed = zip(*re.findall(r"(\d+)\. (\S+)", context.rpartition("\n\n")[2]), strict=True)
    assert [int(number) for number in numbers] == list(range(1, len(numbers) + 1))
    counts = Counter(listed)
    assert {counts.pop(answer) for answer in sample.answers} == {often}
    assert set(counts.values()) == {seldom}
    assert len(sample.answers) == 10


def test_a_list_longer_than_the_words_there_are() -> None:
    prompt, _ = ruler.TASKS["common-words"].write(Random(0), 12_000, length=65536)
    listed = Counter(re.findall(r"\d+\. (\S+)", parts_of(prompt)))
    assert len(listed) == 12_000


def parts_of(prompt: str) -> str:
    return prompt.rpartition("\n\n")[2].rpartition("\nQuestion")[0]


@pytest.mark.parametrize("length", [1024, 8192])
def test_frequent_words_fall_off_as_a_square(length: int) -> None:
    sample = one("frequent-words", length)
    context, _ = parts(sample)
    _, *coded = context.split("\n")
    counts = Counter(" ".join(coded).split())
    dots = counts.pop("...")
    (a, b, c, fourth), answers = (
        [count for _, count in counts.most_common(4)],
        [word for word, _ in counts.most_common(3)],
    )
    assert sorted(answers) == sorted(sample.answers)
    assert c > fourth
    assert set(map(len, counts)) == {6}
    for rank, count in enumerate((a, b, c, fourth), 2):
        assert abs(count - dots / rank**2) <= 1
    assert dots / sum([dots, *counts.values()]) == pytest.approx(6 / math.pi**2, rel=0.2)


def test_score_is_the_share_of_answers_in_the_text() -> None:
    assert ruler.matched(["ab", "12"], "12, then AB.") == 1.0
    assert ruler.matched(["ab", "12", "x", "y"], "it is 12") == 0.25
    assert ruler.matched(["ab"], "") == 0.0


def test_the_essay_is_prose() -> None:
    text = " ".join(prose.essay())
    assert len(prose.essay()) > 10_000
    assert "::=" not in text
    assert not needles(text)


def test_the_largest_size_from_any_guess() -> None:
    for most, least, guess in itertools.product((3, 4, 7, 20), (1, 3), (1, 3, 5, 30)):
        found = ruler._largest(lambda n, most=most: n <= most, least=least, guess=max(guess, least))
        assert found == most


def test_tasks_by_name_and_by_beginning() -> None:
    assert ruler.choose(["all"]) == list(ruler.TASKS)
    assert ruler.choose(["needle"]) == NEEDLES
    # In the order of the table, each once.
    assert ruler.choose(["common-words", "needle-multikey", "needle-multikey-2"]) == [
        "needle-multikey-1",
        "needle-multikey-2",
        "needle-multikey-3",
        "common-words",
    ]


def test_refusals() -> None:
    with pytest.raises(
        LongspanError, match=r"no task 'needel'; did you mean 'needle'.*Known: needle-s"
    ):
        ruler.choose(["needel"])
    with pytest.raises(LongspanError, match="no task 'needle'"):
        one("needle")
    with pytest.raises(LongspanError, match="count=0"):
        ruler.samples("needle-single-1", length=1024, count=0, tokens=words)
    with pytest.raises(
        LongspanError, match=r"'common-words' takes at least \d+ tokens .* was given 1024: ask for"
    ):
        ruler.samples("common-words", length=1024, count=1, tokens=octets)


@pytest.mark.parametrize(
    ("missing", "source", "message"),
    [
        ("wonderwords", "plain_words", r"package wonderwords: pip install 'longspan\[eval\]'"),
        ("pydoc_data", "essay", "ships without pydoc_data"),
    ],
)
def test_missing_sources(
    missing: str, source: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == missing:
            raise ImportError(name)
        return there(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    getattr(prose, source).cache_clear()
    with pytest.raises(LongspanError, match=message):
        one("needle-single-2")
