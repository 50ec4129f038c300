"""UniCode²'s stages over images: they train nothing, and search a large codebook."""

from __future__ import annotations

import math

from torch import nn

from smalti.schema import CodebookSection, Recipe
from smalti.tokenizers.encoders import VisionEncoder
from smalti.tokenizers.unicode2 import EXACT_CODES
from smalti.workflows.plan.codebook import cells_seen
from smalti.workflows.plan.inference_cost import InferenceCost

SINGLE = 4  # bytes


def search_costs(recipe: Recipe, encoder: VisionEncoder) -> dict[str, InferenceCost]:
    """Cost of the encoder, and of the encoder with the search of the codes.

    The codes are on the device in float32.
    """
    modules = nn.ModuleDict({"encoder": encoder})
    found = {
        name: InferenceCost.of(section, modules, [encoder], [encoder], encoder.image_size)
        for name, section in (("features", recipe.features), ("tokens", recipe.tokens))
    }
    tokens = found["tokens"]
    book = recipe.codebook
    search = 2.0 * math.prod(encoder.grid) * compared(book) * encoder.dim
    flops = tokens.flops | {"fp32": tokens.flops["fp32"] + search}
    codes = float(SINGLE * (book.size + book.coarse) * encoder.dim)
    return found | {"tokens": tokens._replace(flops=flops, weights=tokens.weights + codes)}


def compared(book: CodebookSection) -> float:
    """Cells and codes that a patch is compared with."""
    if book.size <= EXACT_CODES or book.coarse == 1:
        return book.size
    return book.coarse + cells_seen(book) * book.size / book.coarse
