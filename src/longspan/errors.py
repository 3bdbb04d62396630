"""The one error type for a user's mistake; the CLI prints it without a traceback."""

import difflib
from collections.abc import Iterable


class LongspanError(ValueError):
    """A call that cannot be served: what happened, what was expected, what to do."""


def nearest(name: str, names: Iterable[str]) -> str:
    """A "did you mean" clause for `name`, or the empty string when nothing is close.

    >>> nearest("longfomer", ["longformer", "s4"])
    "; did you mean 'longformer'?"
    """
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
