"""The whole recipe: sections in the order of the chain, and what holds between them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from smalti.schema.base import Positive, Section, Weight
from smalti.schema.bridge import BridgeSection
from smalti.schema.data import (
    CodebookSection,
    CorpusSection,
    EncoderSection,
    FeaturesSection,
    TokensSection,
)
from smalti.schema.model import EvaluateSection, ExportSection, MllmSection
from smalti.schema.systems import SYSTEMS
from smalti.schema.tokenizer import TokenizerSection


class Resources(Section):
    """What a stage may take from the cluster; never part of a fingerprint."""

    workers: Positive | Annotated[tuple[Positive, Positive], Field(strict=False)] = Field(
        1, description="training workers; [min, max]: as many as fit, changing during the run"
    )
    gpus_per_worker: Weight = Field(
        0, description="GPUs per training worker and per model actor; 0: CPU only"
    )
    cpus_per_worker: Positive = Field(
        1, description="CPU cores per training worker and per model actor"
    )
    actors: Positive = Field(1, description="actors with a model, in features and tokens")
    readers: Positive = Field(1, description="parallel CPU tasks that read and decode images")
    device: Literal["auto", "cpu"] = Field(
        "auto",
        description="device of features and tokens; cpu: even if gpus_per_worker is set, to try a layout without GPUs",
    )

    @field_validator("workers")
    @classmethod
    def _least_first(cls, workers: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(workers, tuple) and workers[0] > workers[1]:
            raise ValueError(f"workers: [min, max] with min above max: {list(workers)}")
        return workers

    @property
    def min_workers(self) -> int:
        """The fewest workers that train."""
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        """The most workers that train."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class Tracking(Section):
    """MLflow tracking."""

    uri: str | None = Field(
        None,
        description="MLflow tracking URI; default: SQLite in <out>/mlflow.db; off: no tracking",
    )
    experiment: str = Field("smalti", description="name of the MLflow experiment")


class Recipe(Section):
    """A whole recipe."""

    name: str = Field("smalti", description="name of the run in logs, reports and MLflow")
    system: str = Field(
        "semhitok",
        description=f"{', '.join(SYSTEMS)}: SemHiTok (arXiv 2503.06764), DualToken (arXiv 2503.14324), UniCode² (2025)",
        json_schema_extra={"enum": [*SYSTEMS]},
    )
    out: str = Field("out", description="output folder or URL; each stage writes <out>/<stage>")
    seed: int = Field(0, description="seed of all random numbers, 0 or above")
    share: list[str] = Field(
        [], description="other output folders whose stages are used if their fingerprints are equal"
    )
    corpus: CorpusSection = Field(CorpusSection(), description="images, and how they become shards")
    encoder: EncoderSection = Field(EncoderSection(), description="the frozen vision encoder")
    features: FeaturesSection = Field(
        FeaturesSection(), description="patch features for the codebook"
    )
    codebook: CodebookSection = Field(
        CodebookSection(), description="k-means codebook of the features"
    )
    tokenizer: TokenizerSection = Field(
        TokenizerSection(), description="the visual tokenizer and its training"
    )
    tokens: TokensSection = Field(TokensSection(), description="visual tokens of the corpus")
    mllm: MllmSection = Field(
        MllmSection(), description="the unified language model and its training"
    )
    bridge: BridgeSection | None = Field(
        None, description="unicode2: diffusion decoder that draws images from codes; null: none"
    )
    export: ExportSection = Field(ExportSection(), description="the exported Hugging Face model")
    evaluate: EvaluateSection = Field(EvaluateSection(), description="scores on held-out images")
    baselines: dict[str, dict[str, Any]] = Field(
        {}, description="name → overrides: variants that run beside the recipe, evaluation included"
    )
    resources: Resources = Field(
        Resources(), description="workers, CPUs and GPUs; changes no result"
    )
    tracking: Tracking = Field(Tracking(), description="MLflow tracking; changes no result")

    @property
    def clusters(self) -> bool:
        """Whether a codebook is clustered from the encoder's features."""
        return SYSTEMS[self.system].clusters(self.tokenizer)

    @model_validator(mode="before")
    @classmethod
    def _adapter_of_system(cls, data: Any) -> Any:
        """Set the adapter of the system where the recipe names none."""
        keys = SYSTEMS.get(str(data.get("system"))) if isinstance(data, dict) else None
        if keys is None or keys.adapter is None:
            return data
        mllm = data.get("mllm") or {}
        return data | {"mllm": {"adapter": keys.adapter} | mllm} if isinstance(mllm, dict) else data

    @field_validator("system")
    @classmethod
    def _known_system(cls, system: str) -> str:
        if system not in SYSTEMS:
            raise ValueError(f"expected one of {', '.join(SYSTEMS)}, found {system!r}")
        return system

    @field_validator("out")
    @classmethod
    def _some_folder(cls, out: str) -> str:
        if not out.strip():
            raise ValueError("expected the path of a folder, found empty text")
        return out

    @model_validator(mode="after")
    def _one_encoder(self) -> Recipe:
        if self.encoder.pretrained and self.encoder.train:
            raise ValueError("encoder.pretrained and encoder.train are both set; keep one")
        return self

    @model_validator(mode="after")
    def _guided_parts(self) -> Recipe:
        if self.tokenizer.pixel.semantic_only_decoder and not self.tokenizer.guidance:
            raise ValueError(
                "tokenizer.pixel.semantic_only_decoder needs tokenizer.guidance: true; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _seed_counts(self) -> Recipe:
        if self.seed < 0:
            raise ValueError(
                f"seed={self.seed}, expected 0 or above: NumPy's generators take no negative seed"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Recipe:
        tokenizer = self.tokenizer
        siglip = self.encoder.train
        qwen2 = self.mllm.config
        semantic = tokenizer.semantic
        pixel = tokenizer.pixel
        decoder = tokenizer.decoder
        sizes = {
            "tokenizer.semantic": (
                semantic.decoder_dim,
                semantic.decoder_heads,
                "decoder_dim",
                "decoder_heads",
            )
        }
        vits = {"pixel.encoder": pixel.encoder, "pixel.decoder": pixel.decoder}
        vits |= {"decoder.decoder": decoder.decoder} if decoder else {}
        vits |= {"dual.decoder": tokenizer.dual.decoder}
        sizes |= {
            f"tokenizer.{name}": (vit.dim, vit.heads, "dim", "heads") for name, vit in vits.items()
        }
        if siglip:
            sizes["encoder.train"] = (siglip.hidden_size, siglip.heads, "hidden_size", "heads")
        if qwen2:
            sizes["mllm.config"] = (qwen2.hidden_size, qwen2.heads, "hidden_size", "heads")
        if self.bridge:
            sizes["bridge"] = (self.bridge.width, self.bridge.heads, "width", "heads")
        for section, (width, heads, key, by) in sizes.items():
            if width % heads:
                raise ValueError(
                    f"{section}.{key}={width} does not split over {section}.{by}={heads}; set a multiple"
                )
        return self
