"""Sections of the data plane: corpus, encoder, features, codebook, tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smalti.schema.base import Fraction, NonNegative, Positive, Section, Train


class CorpusSection(Section):
    """Where images come from and how they become shards."""

    source: str | list[str] | None = Field(None, description="folder, file, pattern or URL; or several")
    val_source: str | list[str] | None = Field(
        None, description="held-out images (a published split); else val_fraction"
    )
    format: Literal["auto", "folder", "webdataset", "parquet", "arrow", "jsonl", "easy-vqa", "generated"] = "auto"
    image_size: Positive = Field(256, description="pixels a side after resize and centre crop (on reading)")
    val_fraction: Fraction = Field(0.02, description="share held out by a hash of image_id; unused with val_source")
    shard_images: Positive = 1000
    min_size: Positive = Field(8, description="images with a shorter side below this are quarantined")
    max_pixels: Positive = Field(64_000_000, description="larger images are refused as decompression bombs")
    max_bytes: Positive = Field(200_000_000, description="longer image files are quarantined, unread where that can be")
    max_aspect: float | None = Field(
        None, ge=1, description="images with a longer side above this many times the shorter are quarantined"
    )
    require_caption: bool = Field(False, description="quarantine images without a caption")
    caption_column: str = "caption"
    label_column: str = "label"
    image_column: str = "image"
    limit: Positive | None = Field(None, description="at most this many images a split")


class EncoderTrain(Section):
    """A SigLIP pretrained on the corpus's image-text pairs (sigmoid loss, arXiv 2303.15343)."""

    patch_size: Positive = 8
    hidden_size: Annotated[int, Field(ge=4)] = 128
    layers: Positive = 4
    heads: Positive = 4
    mlp_ratio: Positive = 4
    text_layers: Positive = 2
    text_length: Positive = 16
    text_vocab_size: Positive = 512
    augment_shift: NonNegative = Field(0, description="pixels of random shift (edge padded)")
    augment_flip: bool = Field(False, description="random horizontal flips")
    dropout: Fraction = 0.0
    train: Train = Train()


class EncoderSection(Section):
    """The frozen text-aligned vision encoder: a SigLIP directory or hub name, or one trained here."""

    pretrained: str | None = None
    train: EncoderTrain | None = None
    layer: int = Field(-1, description="hidden state used as patch features; -1 is the last, after the final norm")


class FeaturesSection(Section):
    """Patch features of the training and held-out images."""

    source: str | list[str] | None = Field(
        None, description="images read without a corpus, as corpus.source; split by corpus.val_fraction"
    )
    patches: Literal["all"] | Positive = Field("all", description="all, or n patches an image, drawn by image_id")
    batch_size: Positive = 64
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the model; bf16: autocast, for GPUs")
    compile: bool = Field(False, description="torch.compile the model: a minute's start, then faster on GPUs")


class CodebookSection(Section):
    """Two-level k-means over the features."""

    size: Positive = Field(16_384, description="K, codes")
    coarse: Positive = Field(1, description="K1, cells of the first level; 1 is flat k-means")
    split: Literal["proportional", "equal"] = Field("proportional", description="how the cells share K")
    iterations: Positive = Field(10, description="Lloyd iterations at each level")
    polish: NonNegative = Field(0, description="tree-restricted Lloyd passes over all vectors")
    sample: Positive | None = Field(
        None, description="vectors the coarse level sees; default 256 a coarse cell, at least 65,536"
    )
    cell_vectors: Positive = Field(500_000, description="vectors of a cell that its k-means sees, drawn if it has more")
    seeding: Literal["auto", "plusplus", "random"] = Field("auto", description="auto: k-means++ up to 512 centroids")
    spherical: bool = Field(False, description="vectors and codes on the unit sphere: cosine instead of distance")
    recall: Annotated[float, Field(gt=0, le=1)] = Field(
        0.99, description="share of held-out vectors whose nearest code a search of the tree must find"
    )
    duplicates: Literal["replace", "drop"] = Field(
        "replace", description="codes that repeat another or are not finite: put on other vectors, or left out"
    )


class TokensSection(Section):
    """Corpus to token shards."""

    batch_size: Positive = 64
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the model; bf16: autocast, for GPUs")
    compile: bool = Field(False, description="torch.compile the model: a minute's start, then faster on GPUs")
