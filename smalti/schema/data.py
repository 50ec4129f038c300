"""Sections of the data plane: corpus, encoder, features, codebook, tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from smalti.schema.base import IF_SET, RUN_ONLY, Fraction, NonNegative, Positive, Section, Train


class CorpusSection(Section):
    """Where images come from and how they become shards."""

    source: str | list[str] | None = Field(
        None,
        description="images to train on: a folder, file, glob pattern or URL, or a list of them",
    )
    val_source: str | list[str] | None = Field(
        None,
        description="held-out images, as source (a published split); default: val_fraction of source",
    )
    format: Literal[
        "auto", "folder", "webdataset", "parquet", "arrow", "jsonl", "easy-vqa", "generated"
    ] = Field("auto", description="layout of the source; auto: detected from its files")
    image_size: Positive = Field(
        256, description="pixels per side after resize and centre crop (when read)"
    )
    val_fraction: Fraction = Field(
        0.02, description="share of images held out by a hash of image_id; unused with val_source"
    )
    shard_images: Positive = Field(
        1000, description="images per shard, the unit of work and of retries"
    )
    min_size: Positive = Field(
        8, description="shorter side in pixels below which an image is quarantined"
    )
    max_pixels: Positive = Field(
        64_000_000, description="pixels above which an image is quarantined as a decompression bomb"
    )
    max_bytes: Positive = Field(
        200_000_000,
        description="bytes above which an image file is quarantined, without reading it where possible",
    )
    max_aspect: float | None = Field(
        None,
        ge=1,
        description="ratio of longer to shorter side above which an image is quarantined; default: no limit",
    )
    require_caption: bool = Field(False, description="quarantine images without a caption")
    caption_column: str = Field(
        "caption", description="column or field of the source that holds captions"
    )
    label_column: str = Field(
        "label", description="column or field of the source that holds class labels"
    )
    image_column: str = Field(
        "image", description="column or field of the source that holds images"
    )
    limit: Positive | None = Field(
        None, description="largest number of images per split; default: all"
    )


class EncoderTrain(Section):
    """A SigLIP trained on the corpus (sigmoid loss, arXiv 2303.15343)."""

    patch_size: Positive = Field(8, description="pixels per side of a patch")
    hidden_size: Annotated[int, Field(ge=4)] = Field(
        128, description="width of both towers; a multiple of heads"
    )
    layers: Positive = Field(4, description="transformer blocks of the vision tower")
    heads: Positive = Field(4, description="attention heads of both towers")
    mlp_ratio: Positive = Field(4, description="MLP width as a multiple of hidden_size")
    text_layers: Positive = Field(2, description="transformer blocks of the text tower")
    text_length: Positive = Field(
        16, description="tokens per text; longer texts are cut, shorter ones padded"
    )
    text_vocab_size: Positive = Field(
        512, description="BPE tokens, trained on the corpus's captions and labels"
    )
    augment_shift: NonNegative = Field(
        0, description="largest random shift in pixels (edge padded)"
    )
    augment_flip: bool = Field(False, description="random horizontal flips")
    dropout: Fraction = Field(0.0, description="attention dropout of both towers")
    train: Train = Field(Train(), description="training of the encoder")


class EncoderSection(Section):
    """The frozen text-aligned vision encoder."""

    pretrained: str | None = Field(None, description="SigLIP directory or hub name; excludes train")
    train: EncoderTrain | None = Field(
        None, description="train a SigLIP on the corpus instead; excludes pretrained"
    )
    layer: int = Field(
        -1,
        description="index of the hidden state used as patch features; -1: the last, after the final norm",
    )


class FeaturesSection(Section):
    """Patch features of the training and held-out images."""

    source: str | list[str] | None = Field(
        None,
        description="images to read instead of the corpus, as corpus.source; split by corpus.val_fraction",
    )
    patches: Literal["all"] | Positive = Field(
        "all", description="patches per image: all, or n drawn by image_id"
    )
    batch_size: Positive = Field(
        64, description="images per forward pass of the encoder", json_schema_extra=RUN_ONLY
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of the model; bf16: bfloat16 autocast, for GPUs",
        json_schema_extra=IF_SET,
    )
    compile: bool = Field(
        False,
        description="torch.compile the model: a minute to start, then faster on GPUs",
        json_schema_extra=IF_SET,
    )


class CodebookSection(Section):
    """Two-level k-means of the features."""

    size: Positive = Field(16_384, description="K, number of codes")
    coarse: Positive = Field(1, description="K1, cells of the first level; 1: flat k-means")
    split: Literal["proportional", "equal"] = Field(
        "proportional", description="codes per cell: proportional to its vectors, or equal"
    )
    iterations: Positive = Field(10, description="Lloyd iterations at each level")
    polish: NonNegative = Field(
        0,
        description="Lloyd passes over all vectors after both levels, restricted to the tree; 0 is off",
    )
    sample: Positive | None = Field(
        None,
        description="vectors the coarse level is trained on; default: 256 per cell, at least 65,536",
    )
    cell_vectors: Positive = Field(
        500_000,
        description="most vectors that the k-means of a cell is trained on; a seeded sample if the cell has more",
    )
    seeding: Literal["auto", "plusplus", "random"] = Field(
        "auto",
        description="k-means initialization: plusplus: k-means++; random; auto: k-means++ up to 512 centroids, else random",
    )
    spherical: bool = Field(
        False, description="normalize vectors and codes: cosine similarity instead of distance"
    )
    recall: Annotated[float, Field(gt=0, le=1)] = Field(
        0.99,
        description="share of held-out vectors for which a search of the tree must find the nearest code",
    )
    duplicates: Literal["replace", "drop"] = Field(
        "replace",
        description="codes that equal another or are not finite: replace by other vectors, or drop",
    )


class TokensSection(Section):
    """Visual tokens of the corpus."""

    batch_size: Positive = Field(
        64, description="images per forward pass of the tokenizer", json_schema_extra=RUN_ONLY
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of the model; bf16: bfloat16 autocast, for GPUs",
        json_schema_extra=IF_SET,
    )
    compile: bool = Field(
        False,
        description="torch.compile the model: a minute to start, then faster on GPUs",
        json_schema_extra=IF_SET,
    )
