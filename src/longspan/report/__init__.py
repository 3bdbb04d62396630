"""What a comparison found: one HTML file, one table for the terminal, one recommendation."""

from longspan.report.page import write
from longspan.report.recommendation import Recommendation, recommend
from longspan.report.terminal import table

__all__ = ["Recommendation", "recommend", "table", "write"]
