"""The recipe: every key that a YAML file or a `key=value` override may set, with its type, default
and meaning.

Models are frozen and strict: an unknown key or a wrong type fails (`smalti.config` turns that into
one clear `ConfigError`). Sections stand in the order of the chain. Paths may be local or any fsspec
URL.
"""

from smalti.schema.base import Section, Train, result_settings
from smalti.schema.bridge import BridgeSection
from smalti.schema.data import (
    CodebookSection,
    CorpusSection,
    EncoderSection,
    EncoderTrain,
    FeaturesSection,
    TokensSection,
)
from smalti.schema.model import (
    MODEL_PARTS,
    DepthHeads,
    EvaluateSection,
    ExportSection,
    LanguageModel,
    Lora,
    Mixture,
    MllmSection,
    MllmStage,
    ModelPart,
    PartRates,
    Sampling,
)
from smalti.schema.recipe import Recipe, Resources, Tracking
from smalti.schema.tokenizer import (
    DecoderStage,
    DualStage,
    Gan,
    Loss,
    Perceptual,
    PixelStage,
    SemanticStage,
    TokenizerSection,
    VitSize,
)

__all__ = [
    "MODEL_PARTS",
    "BridgeSection",
    "CodebookSection",
    "CorpusSection",
    "DecoderStage",
    "DepthHeads",
    "DualStage",
    "EncoderSection",
    "EncoderTrain",
    "EvaluateSection",
    "ExportSection",
    "FeaturesSection",
    "Gan",
    "LanguageModel",
    "Lora",
    "Loss",
    "Mixture",
    "MllmSection",
    "MllmStage",
    "ModelPart",
    "PartRates",
    "Perceptual",
    "PixelStage",
    "Recipe",
    "Resources",
    "Sampling",
    "Section",
    "SemanticStage",
    "TokenizerSection",
    "TokensSection",
    "Tracking",
    "Train",
    "VitSize",
    "result_settings",
]
