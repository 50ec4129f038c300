"""What the schema knows of each system.

What the chain asks of a system is a `System` object in `workflows/systems/`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from smalti.schema.model import Adapter
from smalti.schema.tokenizer import TokenizerSection


@dataclass(frozen=True)
class SystemKeys:
    """How a system reads a recipe.

    Attributes:
        clusters: whether a codebook is clustered from the encoder's features (stages `features` and
            `codebook`).
        adapter: `mllm.adapter` of recipes that do not set it; None keeps the default of the schema.
    """

    clusters: Callable[[TokenizerSection], bool]
    adapter: Adapter | None = None


SYSTEMS: dict[str, SystemKeys] = {
    "semhitok": SystemKeys(clusters=lambda tokenizer: tokenizer.guidance),
    "dualtoken": SystemKeys(clusters=lambda tokenizer: False),
    "unicode2": SystemKeys(clusters=lambda tokenizer: True, adapter="cascade"),
}
