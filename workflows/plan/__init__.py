"""What a recipe would cost at another size and on other machines, before it runs; its formulas printed."""

from __future__ import annotations

from smalti.workflows.plan.base import Phase, Plan, Rates
from smalti.workflows.plan.codebook import plan_codebook

__all__ = ["Phase", "Plan", "Rates", "plan_codebook"]
