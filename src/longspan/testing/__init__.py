"""The laws and what they stand on, public, to check a mechanism of one's own."""

from longspan.testing.counting import Cost, count
from longspan.testing.laws import LAWS, Verdict, certificate, check, law, laws_for
from longspan.testing.oracles import oracle, oracle_of
from longspan.testing.subject import Subject

__all__ = [
    "LAWS",
    "Cost",
    "Subject",
    "Verdict",
    "certificate",
    "check",
    "count",
    "law",
    "laws_for",
    "oracle",
    "oracle_of",
]
