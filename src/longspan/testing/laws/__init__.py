"""The laws: what anyone may rely on of every mechanism whose card claims the mode.

A law takes a card and raises AssertionError where it does not hold. `certificate` runs those that
apply; a card may skip one with a reason, and then the law must fail, or the skip is stale.
"""

from importlib import import_module

from longspan.testing.laws.registry import LAWS, Verdict, certificate, check, law, laws_for

__all__ = ["LAWS", "Verdict", "certificate", "check", "law", "laws_for"]

# Each declares its laws; their order is the certificate's.
for _name in (
    "right",
    "one_form",
    "robust",
    "cost",
    "loud",
    "memory",
    "depth",
    "length",
    "position",
    "retrieval",
    "residual",
):
    import_module(f"{__name__}.{_name}")
