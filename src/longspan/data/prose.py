"""Words and prose out of packages, for texts that are generated."""

import re
from functools import cache
from typing import Literal

from longspan.errors import LongspanError


@cache
def plain_words(kind: Literal["adjective", "noun", "verb"]) -> list[str]:
    """Plain words of one kind, in order, from the package that RULER takes them from."""
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise LongspanError(
            "RULER's tasks draw words from the package wonderwords: pip install 'longspan[eval]'."
        ) from error
    words = RandomWord().filter(include_categories=[kind])
    return sorted({word for word in words if re.fullmatch("[a-z]+", word)})


@cache
def short_words() -> list[str]:
    """Ten of these, numbered, fit RULER's 120 tokens even where a byte is a token."""
    words = {word for kind in ("adjective", "noun", "verb") for word in plain_words(kind)}
    return sorted(word for word in words if len(word) <= 7)


@cache
def essay() -> list[str]:
    """The words of Python's language reference, code left out: about 20 thousand.

    Raises:
        LongspanError: this Python ships without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise LongspanError(
            "this Python ships without pydoc_data, whose prose is the essay that needles are "
            "hidden in: use another build of Python, or needle-single-1 and needle-multikey-2, "
            "-3, which need none."
        ) from error
    paragraphs = dict.fromkeys(
        " ".join(part.split()) for topic in topics.values() for part in topic.split("\n\n")
    )
    prose = (part for part in paragraphs if re.match("[A-Z]", part) and part.endswith("."))
    return " ".join(part for part in prose if "::=" not in part).split()
