"""The report of a run: an HTML page, a JSON file, and a table for the terminal."""

from __future__ import annotations

from smalti.workflows.report.build import build
from smalti.workflows.report.terminal import table

__all__ = ["build", "table"]
