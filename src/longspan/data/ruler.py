"""RULER's synthetic tasks (Hsieh et al., COLM 2024, Sec. 3), generated without a network.

The sizes (keys, values, hops, frequencies, tokens of an answer) are those of the paper's code, and
so is the score, `matched`. Departures, because of which figures compare with each other but not
with published ones: the prompts are worded anew; the essay is the prose of Python's language
reference, not Paul Graham's; keys, values and variables are distinct, and so are the words of a
list; words of lists have at most seven letters; every sample is filled to the length by itself. The
two question-answering tasks are left out: they need SQuAD and HotpotQA.
"""

import math
import re
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from random import Random
from typing import Literal, NamedTuple, Protocol

from longspan.data.prose import essay, plain_words, short_words
from longspan.errors import LongspanError, nearest

_NOISE = "Rain falls on the roof. A door stands open. The road is long. Nothing more is said."
# Below this many tokens RULER's lists of common words, and the example before them, are shorter.
_SHORT = 4096
_DEPTHS = 40


class Sample(NamedTuple):
    """A prompt that ends where the answer begins, and what the answer must contain.

    `tokens` are those of the prompt, `room` those that are left for the answer.
    """

    prompt: str
    answers: tuple[str, ...]
    tokens: int
    room: int


class Task(Protocol):
    """A prompt of any size: `write` is a function of the generator's state and its arguments.

    `room` is how many tokens the answer may take, `least` the smallest size of the haystack, and
    `length` the number of tokens that is asked for, on which some definitions depend.
    """

    @property
    def room(self) -> int: ...

    @property
    def least(self) -> int: ...

    def write(self, rng: Random, size: int, *, length: int) -> tuple[str, tuple[str, ...]]: ...


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Sentences that give keys their values, hidden in a haystack; some keys are asked for.

    A haystack is `size` repetitions of noise, words of an essay, or further needles.
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Literal["word", "uuid"] = "word"
    value: Literal["number", "uuid"] = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1
    room: int = 128

    @property
    def least(self) -> int:
        return self.keys * self.values

    def write(self, rng: Random, size: int, *, length: int) -> tuple[str, tuple[str, ...]]:
        others = size if self.haystack == "needle" else 0
        keys = _distinct(self.keys + others, lambda: _draw(rng, self.key))
        hidden = self.keys * self.values
        values = _distinct(hidden + others, lambda: _draw(rng, self.value))
        owners = [key for key in keys[: self.keys] for _ in range(self.values)] + keys[self.keys :]
        lines = [
            f"One secret {self.value} of {key} is {value}."
            for key, value in zip(owners, values, strict=True)
        ]
        needles = lines[:hidden]
        rng.shuffle(needles)
        match self.haystack:
            case "essay":
                context = _within_essay(rng, size, needles)
            case "noise":
                context = _between(rng, [_NOISE] * size, needles)
            case "needle":
                context = _between(rng, lines[hidden:], needles)
        asked = rng.sample(range(self.keys), self.queries)
        answers = [value for i in asked for value in values[i * self.values :][: self.values]]
        return self._prompt(context, [keys[i] for i in asked], len(answers)), tuple(answers)

    def _prompt(self, context: str, keys: Sequence[str], answers: int) -> str:
        *before, last = keys
        query = f"{', '.join(before)} and {last}" if before else last
        ending, verb = ("", "is") if answers == 1 else ("s", "are")
        what = f"secret {self.value}{ending}"
        return (
            f"The text below hides a {what}. Remember it.\n"
            if answers == 1
            else f"The text below hides {what}. Remember them.\n"
        ) + (
            f"{context}\n"
            f"Question: according to the text, what {verb} the {what} of {query}?\n"
            f"Answer: according to the text, the {what} of {query} {verb}"
        )


@dataclass(frozen=True, kw_only=True)
class Variables:
    """Chains of assignments in noise: which variables have the first chain's value, and how come.

    VAR A = 12345, then VAR B = VAR A, …, `hops` times; a small example comes first.
    """

    chains: int = 1
    hops: int = 4
    room: int = 30

    @property
    def least(self) -> int:
        return self.hops + 1

    def write(self, rng: Random, size: int, *, length: int) -> tuple[str, tuple[str, ...]]:
        example, shown = self._one(rng, self.least, letters=3)
        prompt, answers = self._one(rng, size, letters=5)
        return f"{example} {' '.join(shown)}\n\n{prompt}", answers

    def _one(self, rng: Random, size: int, *, letters: int) -> tuple[str, tuple[str, ...]]:
        links = self.hops + 1
        names = _distinct(
            self.chains * links,
            lambda: "".join(rng.choices(string.ascii_uppercase, k=letters)),
        )
        values = _distinct(self.chains, lambda: str(rng.randrange(10_000, 100_000)))
        lines = [_NOISE] * size
        for first, value in zip(range(0, len(names), links), values, strict=True):
            chain = names[first : first + links]
            given = [value, *(f"VAR {name}" for name in chain)]
            places = sorted(rng.sample(range(len(lines)), links))
            for i, (place, name, source) in enumerate(zip(places, chain, given, strict=False)):
                lines.insert(place + i, f"VAR {name} = {source}")
        context = "\n".join(lines)
        prompt = (
            f"The text below assigns variables to one another. Follow the assignments.\n"
            f"{context}\n"
            f"Question: which variables of the text have the value {values[0]}?\n"
            f"Answer: the {links} variables that have the value {values[0]} are"
        )
        return prompt, tuple(names[:links])


@dataclass(frozen=True, kw_only=True)
class CommonWords:
    """A numbered list in which ten words come more often than all others; which are they?

    `size` counts the distinct words. A small example comes first.
    """

    common: int = 10
    room: int = 120

    @property
    def least(self) -> int:
        return self.common + 1

    def write(self, rng: Random, size: int, *, length: int) -> tuple[str, tuple[str, ...]]:
        # (distinct words of the example, how often its common and its other words come), the list's
        example, often = ((20, 3, 1), (6, 1)) if length < _SHORT else ((40, 10, 3), (30, 3))
        shown, words = self._one(rng, *example)
        prompt, answers = self._one(rng, size, *often)
        return f"{shown} {_numbered(words)}\n\n{prompt}", answers

    def _one(self, rng: Random, size: int, often: int, seldom: int) -> tuple[str, tuple[str, ...]]:
        words = _list(rng, size)
        common = words[: self.common]
        written = common * often + words[self.common :] * seldom
        rng.shuffle(written)
        prompt = (
            "Some words of the numbered list below come more often than the others.\n"
            f"{_numbered(written)}\n"
            f"Question: which {self.common} words of the list come most often?\n"
            f"Answer: the {self.common} words that come most often are"
        )
        return prompt, tuple(common)


@dataclass(frozen=True, kw_only=True)
class FrequentWords:
    """Coded words whose counts fall off as 1 / rank²; which three come most often?

    Of `size` words, rank k comes ⌊size · k⁻² / ζ(2)⌋ times. The first rank is
    noise, "...", which does not count; the vocabulary is a fiftieth of the length.
    """

    room: int = 50
    # From here on the fourth rank comes more often than the fifth.
    least: int = 53

    def write(self, rng: Random, size: int, *, length: int) -> tuple[str, tuple[str, ...]]:
        letters = string.ascii_lowercase
        coded = _distinct(length // 50, lambda: "".join(rng.choices(letters, k=6)))
        ranked = ["...", *coded[1:]]
        zeta = math.pi**2 / 6
        text = [word for k, word in enumerate(ranked, 1) for _ in range(int(size / k**2 / zeta))]
        rng.shuffle(text)
        prompt = (
            "Count how often each coded word comes in the text below; the dots are no words.\n"
            f"{' '.join(text)}\n"
            "Question: which three coded words come most often?\n"
            "Answer: the three coded words that come most often are"
        )
        return prompt, tuple(ranked[1:4])


TASKS: dict[str, Task] = {
    "needle-single-1": Needle(haystack="noise"),
    "needle-single-2": Needle(haystack="essay"),
    "needle-single-3": Needle(haystack="essay", value="uuid"),
    "needle-multikey-1": Needle(haystack="essay", keys=4),
    "needle-multikey-2": Needle(haystack="needle"),
    "needle-multikey-3": Needle(haystack="needle", key="uuid", value="uuid"),
    "needle-multivalue": Needle(haystack="essay", values=4),
    "needle-multiquery": Needle(haystack="essay", keys=4, queries=4),
    "variable-tracking": Variables(),
    "common-words": CommonWords(),
    "frequent-words": FrequentWords(),
}


def choose(names: Sequence[str]) -> list[str]:
    """Tasks by name or by the first words of it, in the order of `TASKS`; `all` is every one.

    Raises:
        LongspanError: a name that fits no task.

    >>> choose(["needle-single", "common-words"])
    ['needle-single-1', 'needle-single-2', 'needle-single-3', 'common-words']
    """
    found = {
        name: [task for task in TASKS if name == "all" or f"{task}-".startswith(f"{name}-")]
        for name in names
    }
    for name, tasks in found.items():
        if not tasks:
            raise _unknown(name)
    return [task for task in TASKS if any(task in tasks for tasks in found.values())]


def samples(
    name: str, *, length: int, count: int, tokens: Callable[[str], int], seed: int = 0
) -> list[Sample]:
    """`count` samples of a task, each with the largest haystack that `length` has room for.

    The prompt and the room for the answer together take at most `length` tokens.

    Args:
        name: one of `TASKS`.
        tokens: counts the tokens of a text.

    Raises:
        LongspanError: no such task, too short a length, or no sources to write from.

    >>> samples("needle-single-1", length=1024, count=1, tokens=lambda t: len(t.encode()))[0].room
    128
    """
    if name not in TASKS:
        raise _unknown(name)
    if count < 1:
        raise LongspanError(f"samples got count={count}; expected at least 1.")
    task = TASKS[name]

    def written(index: int, size: int, scale: int) -> Sample:
        prompt, answers = task.write(Random(f"{seed}/{name}/{length}/{index}"), size, length=scale)
        return Sample(prompt, answers, tokens(prompt), task.room)

    def over(sample: Sample) -> int:
        return sample.tokens + sample.room - length

    # A length may be of few words, where a token is a byte: then lists are as short as they go.
    for scale in (length, min(length, _SHORT - 1)):
        most = max(over(written(index, task.least, scale)) for index in range(count))
        if most <= 0:
            break
    else:
        raise LongspanError(
            f"'{name}' takes at least {length + most} tokens with this tokenizer and was given "
            f"{length}: ask for more, or leave this task out."
        )
    made, size = [], task.least
    for index in range(count):
        size = _largest(
            lambda size, at=index: over(written(at, size, scale)) <= 0, least=task.least, guess=size
        )
        made.append(written(index, size, scale))
    return made


def matched(answers: Sequence[str], text: str) -> float:
    """The share of the answers that stand in the text, in whatever case (`string_match_all`).

    >>> matched(["123", "abc"], "It is ABC.")
    0.5
    """
    return sum(answer.lower() in text.lower() for answer in answers) / len(answers)


def _unknown(name: str) -> LongspanError:
    several = ("needle", "needle-single", "needle-multikey", "all")
    return LongspanError(
        f"no task '{name}'{nearest(name, (*TASKS, *several))} Known: {', '.join(TASKS)}; for "
        f"several at a time, {', '.join(several)}."
    )


def _largest(fits: Callable[[int], bool], *, least: int, guess: int) -> int:
    """The largest size that fits, where `least` does: doubling steps from `guess`, then halves."""
    step = 1
    if guess == least or fits(guess):
        low = guess
        while fits(low + step):
            low, step = low + step, 2 * step
        high = low + step
    else:
        low, high = guess, guess
        while not (low == least or (low < high and fits(low))):
            high, low, step = low, max(least, low - step), 2 * step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _distinct(count: int, draw: Callable[[], str]) -> list[str]:
    """`count` different draws, in the order in which they came."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return list(found)


def _draw(rng: Random, kind: Literal["word", "number", "uuid"]) -> str:
    match kind:
        case "word":
            return "-".join(rng.choice(plain_words(part)) for part in ("adjective", "noun"))
        case "number":
            return str(rng.randrange(10**6, 10**7))
        case "uuid":
            return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _between(rng: Random, lines: list[str], needles: list[str]) -> str:
    """The needles before lines of their own, one a line."""
    places = sorted(rng.sample(range(len(lines)), len(needles)))
    for i, (place, needle) in enumerate(zip(places, needles, strict=True)):
        lines.insert(place + i, needle)
    return "\n".join(lines)


def _within_essay(rng: Random, size: int, needles: list[str]) -> str:
    """The needles between sentences, at different ones of forty depths from first to last."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(islice(cycle(essay()), size)))
    count = len(sentences)
    depths = sorted(rng.sample(range(_DEPTHS), len(needles)))
    for i, (depth, needle) in enumerate(zip(depths, needles, strict=True)):
        sentences.insert(count * depth // (_DEPTHS - 1) + i, needle)
    return " ".join(sentences)


def _list(rng: Random, count: int) -> list[str]:
    """Different words; where there are too few, of pairs of them."""
    if count <= len(short_words()):
        return rng.sample(short_words(), count)
    return _distinct(count, lambda: _draw(rng, "word"))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
