"""The recipe: every key that a YAML file or a `key=value` override may set, with its type, default and meaning.

Models are frozen and strict: an unknown key or a wrong type fails (`smalti.config` turns that into one clear
`ConfigError`). Sections stand in the order of the chain. Paths may be local or any fsspec URL.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0.0)]
Weight = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """Base of every section: frozen, no unknown keys, no silent conversion (an int may stand for a float)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Train(Section):
    """How one model is trained; the same keys for every training stage."""

    steps: Positive = Field(1000, description="optimizer steps")
    batch_size: Positive = Field(64, description="samples a step over all workers and accumulation steps")
    micro_batch_size: Positive | None = Field(
        None, description="samples a worker and forward; default: no accumulation"
    )
    lr: Rate = Field(1e-4, description="peak learning rate")
    optimizer: Literal["adamw", "muon"] = Field("adamw", description="muon: for linear layers; AdamW for the rest")
    betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), strict=False)
    weight_decay: Weight = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Weight = Field(0.03, description="warmup: below 1 a fraction of the steps, else steps")
    min_lr: Fraction = Field(0.0, description="end of the cosine as a fraction of lr")
    clip: Weight = Field(1.0, description="gradient norm bound; 0 is off")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpoint_every: Positive = Field(500, description="steps between checkpoints")
    keep: Positive = Field(2, description="newest checkpoints kept")
    log_every: Positive = Field(20, description="steps between logged metrics")
    image_every: NonNegative = Field(0, description="steps between logged pictures; 0: only at the end")
    max_failures: NonNegative = Field(3, description="worker failures survived before the run fails")
    data_window: Positive = Field(16, description="shards within which rows are shuffled")

    @model_validator(mode="after")
    def _muon_sees_matrices(self) -> Train:
        if self.optimizer == "muon" and self.zero_stage:
            raise ValueError(
                f"optimizer: muon needs whole matrices, which zero_stage={self.zero_stage} cuts up; "
                "set zero_stage: 0, or optimizer: adamw"
            )
        return self


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
    duplicates: Literal["replace", "drop"] = Field(
        "replace", description="codes that repeat another or are not finite: put on other vectors, or left out"
    )


class SemanticStage(Section):
    """SemHiTok stage S: VQ-KD on the encoder's features."""

    dim: Positive = Field(48, description="width of a semantic code")
    vq: Literal["ema", "vanilla", "norm"] = "ema"
    decay: Fraction = 0.99
    eps: Rate = 1e-5
    restart_below: Weight = Field(1.0, description="EMA count under which a code restarts; 0 is off")
    beta: Weight = Field(0.25, description="commitment weight")
    distill: Literal["cosine", "l2"] = "cosine"
    decoder_layers: Positive = 3
    decoder_dim: Positive = 768
    decoder_heads: Positive = 12
    train: Train = Train()


class VitSize(Section):
    """Sizes of a vision transformer."""

    dim: Positive = 768
    layers: Positive = 12
    heads: Positive = 12
    mlp_ratio: Positive = 4
    skip: bool = Field(False, description="add a linear map from input to output patches: small models learn faster")


class Perceptual(Section):
    """Perceptual part of the reconstruction loss."""

    kind: Literal["off", "lpips", "encoder"] = "off"
    weight: Weight = 1.0
    weights: str | None = Field(None, description="LPIPS-VGG16 weights file (kind: lpips)")


class Gan(Section):
    """Adversarial part of the reconstruction loss: hinge loss, PatchGAN."""

    weight: Weight = Field(0.0, description="0 is off")
    start_step: NonNegative = 20_000
    adaptive: bool = Field(False, description="scale by the ratio of gradient norms on the decoder's last layer")
    channels: Positive = 64
    layers: Positive = 3
    lr: Rate = 1e-4


class Loss(Section):
    """Weights of the pixel losses."""

    l1: Weight = 0.0
    l2: Weight = 1.0
    perceptual: Perceptual = Perceptual()
    gan: Gan = Gan()


class PixelStage(Section):
    """SemHiTok stage P: a pixel sub-codebook for each semantic code (SGHC)."""

    codes: Positive = Field(12, description="m, sub-codes of each semantic code")
    dim: Positive = Field(8, description="width of a pixel code")
    concat: Literal["dim", "length", "none"] = "dim"
    encoder: VitSize = VitSize()
    decoder: VitSize = VitSize()
    beta: Weight = 0.25
    vq_weight: Weight = 1.0
    init_steps: NonNegative = Field(
        0, description="steps before quantisation starts; the sub-codebooks are then k-means of what was seen"
    )
    semantic_only_decoder: bool = Field(
        False, description="also train the same decoder on semantic codes alone, for comparison"
    )
    loss: Loss = Loss()
    train: Train = Train()


class DecoderStage(Section):
    """SemHiTok stage D: a larger pixel decoder, everything else frozen."""

    decoder: VitSize = VitSize(dim=1024, layers=24, heads=16)
    loss: Loss = Loss()
    train: Train = Train()


class TokenizerSection(Section):
    """The three phases of SemHiTok."""

    guidance: bool = Field(
        True, description="false: one flat pixel codebook of codebook.size x pixel.codes, no semantic codes"
    )
    semantic: SemanticStage = SemanticStage()
    pixel: PixelStage = PixelStage()
    decoder: DecoderStage | None = None


class TokensSection(Section):
    """Corpus to token shards."""

    batch_size: Positive = 64
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the model; bf16: autocast, for GPUs")
    compile: bool = Field(False, description="torch.compile the model: a minute's start, then faster on GPUs")


class LanguageModel(Section):
    """A Qwen2 made from numbers, for a model trained from nothing."""

    hidden_size: Positive = 256
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 4
    intermediate_size: Positive = 1024
    text_vocab_size: Positive = Field(1024, description="BPE tokens trained on the corpus's text")


class Mixture(Section):
    """Weights of the kinds of sequence in a batch."""

    caption_to_image: Weight = 1.0
    image_to_caption: Weight = 1.0
    qa: Weight = 1.0
    text: Weight = 0.0


class MllmStage(Section):
    """From a step on, another mixture or other weights of the loss; what is not named stays as `mllm` has it."""

    from_step: Positive
    mixture: Mixture | None = None
    image_loss_weight: Weight | None = None
    answer_loss_weight: Weight | None = None


class MllmSection(Section):
    """The unified language model."""

    pretrained: str | None = None
    config: LanguageModel | None = None
    adapter: Literal["dual", "single"] = "dual"
    adapter_hidden: Positive | None = Field(None, description="hidden width of each adapter MLP; default: the model's")
    uncond_probability: Fraction = Field(0.1, description="share of prompts replaced by the unconditional text")
    mixture: Mixture = Mixture()
    questions_per_image: Positive = Field(1, description="question-answer pairs chained in one sequence")
    max_length: Positive = 2048
    dense: bool = Field(True, description="predict captions, questions and codes too, not only what is asked for")
    dense_images: bool = Field(True, description="with dense: predict the codes of images to be understood as well")
    isolate_questions: bool = Field(True, description="chained questions do not see each other, only the image")
    loss_chunk: Positive = Field(4096, description="positions whose logits are held at once")
    image_loss_weight: Weight = Field(1.0, description="weight of the loss on visual tokens")
    answer_loss_weight: Weight = Field(1.0, description="weight of the loss on the tokens of answers")
    text_source: str | None = Field(
        None, description="text-only data: a .txt (one a line), .jsonl or .parquet with `text`"
    )
    stages: list[MllmStage] = Field([], description="what changes on the way, by from_step")
    train: Train = Train()

    @model_validator(mode="after")
    def _stages_in_order(self) -> MllmSection:
        steps = [stage.from_step for stage in self.stages]
        if steps != sorted(set(steps)) or any(step >= self.train.steps for step in steps):
            raise ValueError(
                f"stages start at steps {steps}; expected rising steps below train.steps={self.train.steps}"
            )
        return self

    def stage_at(self, step: int) -> MllmStage:
        """Mixture and weights of a step (from 0): those of the last stage that has begun, else the section's own."""
        begun = [stage for stage in self.stages if stage.from_step <= step]
        own = {name: getattr(self, name) for name in ("mixture", "image_loss_weight", "answer_loss_weight")}
        named = begun[-1].model_dump(exclude_none=True, exclude={"mixture"}) if begun else {"from_step": 1}
        mixture = {"mixture": begun[-1].mixture} if begun and begun[-1].mixture else {}
        return MllmStage(**(own | named | mixture))

    @property
    def whole_mixture(self) -> Mixture:
        """Of each kind the largest weight that it has at any step."""
        every = [self.mixture, *(stage.mixture for stage in self.stages if stage.mixture)]
        return Mixture(**{kind: max(getattr(one, kind) for one in every) for kind in Mixture.model_fields})


class ExportSection(Section):
    """The plain Hugging Face model."""

    dtype: Literal["fp32", "bf16"] = "fp32"


class Sampling(Section):
    """How images are drawn."""

    cfg: Weight = Field(3.0, description="guidance scale s: l = l_u + s (l_c - l_u); 1 is off")
    temperature: Weight = Field(1.0, description="0 is greedy")
    top_k: NonNegative = Field(0, description="0 is off")
    top_p: Fraction = 1.0


class EvaluateSection(Section):
    """What is measured on the held-out split."""

    images: Positive = Field(1000, description="held-out images at most")
    questions: Positive = Field(2000, description="held-out questions at most (seeded sample)")
    drawings: NonNegative = Field(1, description="drawings a prompt")
    prompts: list[str] | None = Field(None, description="prompts to draw; default: a caption of each class")
    sampling: Sampling = Sampling()
    vrr_images: Positive = 500
    goals: dict[str, float] = Field({}, description="score -> value to reach, shown beside it; changes no result")
    batch_size: Positive = 64


class Resources(Section):
    """What a stage may take from the cluster. Never part of a fingerprint: results do not depend on it."""

    workers: Positive = Field(1, description="training workers")
    gpus_per_worker: Weight = 0
    cpus_per_worker: Positive = 1
    actors: Positive = Field(1, description="model actors of features and tokens")
    readers: Positive = Field(1, description="CPU tasks that read and decode")


class Tracking(Section):
    """MLflow."""

    uri: str | None = Field(None, description="tracking URI; default: sqlite in <out>/mlflow.db; `off`: no tracking")
    experiment: str = "smalti"


class Recipe(Section):
    """A whole recipe."""

    name: str = "smalti"
    system: Literal["semhitok"] = "semhitok"
    out: str = "out"
    seed: int = Field(0, description="0 or above")
    share: list[str] = Field([], description="other outputs whose stages are used where their fingerprint is the same")
    corpus: CorpusSection = CorpusSection()
    encoder: EncoderSection = EncoderSection()
    features: FeaturesSection = FeaturesSection()
    codebook: CodebookSection = CodebookSection()
    tokenizer: TokenizerSection = TokenizerSection()
    tokens: TokensSection = TokensSection()
    mllm: MllmSection = MllmSection()
    export: ExportSection = ExportSection()
    evaluate: EvaluateSection = EvaluateSection()
    baselines: dict[str, dict[str, Any]] = Field(
        {}, description="name -> overrides: variants run beside it, up to evaluation"
    )
    resources: Resources = Resources()
    tracking: Tracking = Tracking()

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
            raise ValueError("tokenizer.pixel.semantic_only_decoder needs tokenizer.guidance: true; set it to false")
        return self

    @model_validator(mode="after")
    def _seed_counts(self) -> Recipe:
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}, expected 0 or above: NumPy's generators take no negative seed")
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> Recipe:
        tokenizer, siglip, qwen2 = self.tokenizer, self.encoder.train, self.mllm.config
        semantic, pixel, decoder = tokenizer.semantic, tokenizer.pixel, tokenizer.decoder
        sizes = {"tokenizer.semantic": (semantic.decoder_dim, semantic.decoder_heads, "decoder_dim", "decoder_heads")}
        vits = {"pixel.encoder": pixel.encoder, "pixel.decoder": pixel.decoder}
        vits |= {"decoder.decoder": decoder.decoder} if decoder else {}
        sizes |= {f"tokenizer.{name}": (vit.dim, vit.heads, "dim", "heads") for name, vit in vits.items()}
        if siglip:
            sizes["encoder.train"] = (siglip.hidden_size, siglip.heads, "hidden_size", "heads")
        if qwen2:
            sizes["mllm.config"] = (qwen2.hidden_size, qwen2.heads, "hidden_size", "heads")
        for section, (width, heads, key, by) in sizes.items():
            if width % heads:
                raise ValueError(f"{section}.{key}={width} does not split over {section}.{by}={heads}; set a multiple")
        return self
