"""Sections of the language model, what is made of it, and how it is measured."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from smalti.schema.base import (
    IF_SET,
    LATE,
    RUN_ONLY,
    Fraction,
    NonNegative,
    Positive,
    Rate,
    Section,
    Train,
    Weight,
    run_only_below,
)

Adapter = Literal["dual", "single", "cascade"]
"""How code vectors become inputs of the language model."""


class LanguageModel(Section):
    """Sizes of a Qwen2 trained from random weights."""

    hidden_size: Positive = Field(256, description="width; a multiple of heads")
    layers: Positive = Field(4, description="transformer blocks")
    heads: Positive = Field(4, description="attention heads")
    kv_heads: Positive = Field(
        4, description="key and value heads (grouped-query attention); divides heads"
    )
    intermediate_size: Positive = Field(1024, description="width of the MLP")
    text_vocab_size: Positive = Field(1024, description="BPE tokens trained on the corpus's text")


class Mixture(Section):
    """Weights of the kinds of sequence in a batch."""

    caption_to_image: Weight = Field(1.0, description="weight of text → image sequences")
    image_to_caption: Weight = Field(1.0, description="weight of image → caption sequences")
    qa: Weight = Field(1.0, description="weight of image, question → answer sequences")
    text: Weight = Field(0.0, description="weight of text-only sequences, from text_source")


ModelPart = Literal["new_rows", "adapter", "backbone"]
"""Parts of the unified model: the embedding and the head (which hold the new rows), the adapter,
and all else.
"""


MODEL_PARTS: tuple[ModelPart, ...] = get_args(ModelPart)


class PartRates(Section):
    """Factors on train.lr for each part of the model; 0 freezes it."""

    new_rows: Weight = Field(1.0, description="embedding and head")
    adapter: Weight = Field(1.0, description="the adapter of visual tokens")
    backbone: Weight = Field(1.0, description="all other weights")


class Lora(Section):
    """Low-rank updates of the backbone (peft); merged when the model is saved."""

    rank: Positive = Field(16, description="rank of the updates")
    alpha: Positive = Field(32, description="updates are scaled by alpha / rank")
    dropout: Fraction = Field(0.0, description="dropout on the input of the updates")
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="names of the linear layers with updates",
    )


class DepthHeads(Section):
    """DualToken's two heads: a causal transformer over the codes of a patch, classifiers."""

    layers: Positive = Field(3, description="transformer blocks")
    heads: Positive = Field(
        16, description="attention heads; must divide the language model's width"
    )
    mlp_ratio: Positive = Field(
        4, description="MLP width as a multiple of the language model's width"
    )


class MllmStage(Section):
    """Settings that change at a step; what is not set stays as in `mllm`."""

    from_step: NonNegative = Field(description="first step of this stage, counted from 0")
    mixture: Mixture | None = Field(
        None, description="mixture from this step on; null: mllm.mixture"
    )
    image_loss_weight: Weight | None = Field(
        None, description="weight of the loss on visual tokens from this step on; null: mllm's"
    )
    answer_loss_weight: Weight | None = Field(
        None, description="weight of the loss on answers from this step on; null: mllm's"
    )
    freeze: list[ModelPart] | None = Field(
        None,
        description="parts frozen from this step on; []: none beyond mllm.freeze",
        json_schema_extra=IF_SET,
    )
    lr: PartRates | None = Field(
        None,
        description="factors on train.lr from this step on; null: mllm.lr",
        json_schema_extra=IF_SET,
    )


class MllmSection(Section):
    """The unified language model."""

    pretrained: str | None = Field(
        None, description="folder or hub name of a pretrained language model; excludes config"
    )
    config: LanguageModel | None = Field(
        None, description="sizes of a small Qwen2 trained from random weights; excludes pretrained"
    )
    adapter: Adapter = Field(
        "dual",
        description="from code vectors to inputs: an MLP per part (dual), one MLP (single), or one MLP on a trained codebook "
        "initialized from the tokenizer's (cascade; default for unicode2)",
    )
    adapter_hidden: Positive | None = Field(
        None, description="hidden width of each adapter MLP; default: the model's"
    )
    uncond_probability: Fraction = Field(
        0.1,
        description="share of prompts replaced by the unconditional text, for classifier-free guidance",
    )
    mixture: Mixture = Field(Mixture(), description="weights of the kinds of sequence")
    questions_per_image: Positive = Field(
        1, description="question-answer pairs chained in one sequence"
    )
    max_length: Positive = Field(2048, description="longest sequence in tokens")
    dense: bool = Field(
        True,
        description="train on captions, questions and codes too, not only on what is asked for",
    )
    dense_images: bool = Field(
        True, description="with dense: train on the codes of images in questions and captioning too"
    )
    isolate_questions: bool = Field(
        True, description="chained questions attend to the image, not to each other"
    )
    packing: bool = Field(
        False,
        description="pack the sequences of a micro batch into rows of about max_length (best fit)",
        json_schema_extra=RUN_ONLY,
    )
    attention: Literal["sdpa", "flash"] = Field(
        "sdpa",
        description="sdpa, or flash: flash-attention on a GPU, which skips attention between packed sequences",
        json_schema_extra=RUN_ONLY,
    )
    loss_chunk: Positive = Field(4096, description="positions whose logits are in memory at once")
    image_loss_weight: Weight = Field(1.0, description="weight of the loss on visual tokens")
    answer_loss_weight: Weight = Field(
        1.0, description="weight of the loss on the tokens of answers"
    )
    text_source: str | None = Field(
        None, description="text-only data: a .txt (one a line), .jsonl or .parquet with `text`"
    )
    stages: list[MllmStage] = Field(
        [], description="settings that change during training, in the order of from_step"
    )
    lr: PartRates = Field(
        PartRates(),
        description="factors on train.lr for each part of the model",
        json_schema_extra=IF_SET,
    )
    old_rows: Rate = Field(
        1.0,
        description="factor on lr.new_rows for the text rows of embedding and head, during the whole training",
        json_schema_extra=IF_SET,
    )
    freeze: list[ModelPart] = Field(
        [],
        description="parts frozen during the whole training, whatever the stages set",
        json_schema_extra=IF_SET,
    )
    lora: Lora | None = Field(
        None,
        description="train low-rank updates of the backbone instead of its weights (arXiv 2106.09685)",
        json_schema_extra=IF_SET,
    )
    depth_heads: DepthHeads = Field(
        DepthHeads(),
        description="dualtoken: heads that predict the codes of a patch",
        json_schema_extra=LATE,
    )
    train: Train = Field(
        Train(),
        description="training of the language model",
        json_schema_extra=run_only_below("micro_batch_size"),
    )

    @model_validator(mode="after")
    def _flash_sees_sequences_only(self) -> MllmSection:
        if self.attention == "flash" and self.isolate_questions and self.questions_per_image > 1:
            raise ValueError(
                f"attention: flash cannot keep the questions of one image apart (questions_per_image: "
                f"{self.questions_per_image}, isolate_questions: true); set attention: sdpa, or one of the two others"
            )
        return self

    @model_validator(mode="after")
    def _stages_in_order(self) -> MllmSection:
        steps = [stage.from_step for stage in self.stages]
        if steps != sorted(set(steps)) or any(step >= self.train.steps for step in steps):
            raise ValueError(
                f"stages start at steps {steps}; expected rising steps below train.steps={self.train.steps}"
            )
        return self

    def stage_at(self, step: int) -> MllmStage:
        """What holds in a step (from 0): that of the last stage that has begun, else the section's
        own.
        """
        begun = [stage for stage in self.stages if stage.from_step <= step]
        stage = begun[-1] if begun else MllmStage(from_step=0)
        own = {"mixture": self.mixture, "lr": self.lr, "freeze": []}
        own |= {name: getattr(self, name) for name in ("image_loss_weight", "answer_loss_weight")}
        return stage.model_copy(
            update={name: v for name, v in own.items() if getattr(stage, name) is None}
        )

    def rates_at(self, step: int) -> dict[ModelPart, float]:
        """Factor on each part's learning rate in a step; 0 for a frozen part."""
        stage = self.stage_at(step)
        frozen = {*self.freeze, *(stage.freeze or ())}
        rates = stage.lr or self.lr
        return {part: 0.0 if part in frozen else getattr(rates, part) for part in MODEL_PARTS}

    @property
    def has_part_rates(self) -> bool:
        """Whether any part ever has a rate of its own."""
        starts = [0, *(stage.from_step for stage in self.stages)]
        return any(
            rate != 1.0
            for step in starts
            for part, rate in self.rates_at(step).items()
            if part not in self.freeze
        )

    @property
    def whole_mixture(self) -> Mixture:
        """Of each kind the largest weight that it has at any step."""
        every = [self.mixture, *(stage.mixture for stage in self.stages if stage.mixture)]
        return Mixture(
            **{kind: max(getattr(one, kind) for one in every) for kind in Mixture.model_fields}
        )


class ExportSection(Section):
    """The exported Hugging Face model."""

    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="dtype of the exported weights: float32 or bfloat16"
    )


class Sampling(Section):
    """How images are drawn."""

    cfg: Weight = Field(
        3.0,
        description="classifier-free guidance scale s: logits l = l_u + s (l_c - l_u); 1 is off",
    )
    temperature: Weight = Field(1.0, description="sampling temperature; 0: greedy")
    top_k: NonNegative = Field(0, description="draw from the k likeliest codes; 0 is off")
    top_p: Fraction = Field(
        1.0, description="draw from the likeliest codes whose probabilities sum to this; 1 is off"
    )


class EvaluateSection(Section):
    """What is measured on the held-out split."""

    images: Positive = Field(1000, description="largest number of held-out images")
    questions: Positive = Field(
        2000, description="largest number of held-out questions (seeded sample)"
    )
    drawings: NonNegative = Field(1, description="drawn images per prompt")
    prompts: list[str] | None = Field(
        None, description="prompts to draw; default: a caption of each class"
    )
    sampling: Sampling = Field(
        Sampling(), description="how images are drawn for the drawing scores"
    )
    vrr_images: Positive = Field(
        500, description="held-out images, at most, whose codes `codes/vrr` is measured on"
    )
    goals: dict[str, float] = Field(
        {},
        description="score → value to reach, shown beside it; changes no result",
        json_schema_extra=RUN_ONLY,
    )
    batch_size: Positive = Field(
        64, description="images, questions or drawings per forward pass", json_schema_extra=RUN_ONLY
    )
