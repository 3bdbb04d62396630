"""The laws: what anyone may rely on of every mechanism whose card claims the mode.

A law takes a card and raises AssertionError where it does not hold. `certificate` runs those that
apply; a card may skip one with a reason, and then the law must fail, or the skip is stale.
"""

from longspan.testing.laws import (
    right,
    one_form,
    robust,
    cost,
    loud,
    memory,
    depth,
    length,
    position,
    retrieval,
)  # noqa: F401, I001  (their order is the certificate's)
from longspan.testing.laws.registry import LAWS, Verdict, certificate, check, law, laws_for

__all__ = ["LAWS", "Verdict", "certificate", "check", "law", "laws_for"]
