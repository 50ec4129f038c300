"""Sections of the language model, what is made of it, and how it is measured."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from smalti.schema.base import Fraction, NonNegative, Positive, Rate, Section, Train, Weight


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


Part = Literal["new_rows", "adapter", "backbone"]
"""Parts of the unified model: the embedding and the head (which hold the new rows), the adapter, and all else."""


PARTS: tuple[Part, ...] = get_args(Part)


class PartRates(Section):
    """Factors on train.lr for each part of the model; 0 rests it."""

    new_rows: Weight = 1.0
    adapter: Weight = 1.0
    backbone: Weight = 1.0


class Lora(Section):
    """Low-rank updates in place of a trained backbone (peft); merged when the model is saved."""

    rank: Positive = 16
    alpha: Positive = Field(32, description="updates are scaled by alpha / rank")
    dropout: Fraction = 0.0
    targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        description="names of the linear layers that get one",
    )


class DepthHeads(Section):
    """The two heads of a model whose visual places hold several codes (DualToken): a small causal transformer over the
    codes of a place, with a classifier for each depth."""

    layers: Positive = 3
    heads: Positive = Field(16, description="attention heads; the width is the language model's")
    mlp_ratio: Positive = 4


class MllmStage(Section):
    """From a step on, another mixture, weights of the loss, or trained parts; what is not named stays as `mllm` has it."""

    from_step: NonNegative
    mixture: Mixture | None = None
    image_loss_weight: Weight | None = None
    answer_loss_weight: Weight | None = None
    freeze: list[Part] | None = Field(None, description="parts that rest from this step on; [] wakes all")
    lr: PartRates | None = None


class MllmSection(Section):
    """The unified language model."""

    late = ("depth_heads",)

    pretrained: str | None = None
    config: LanguageModel | None = None
    adapter: Literal["dual", "single", "cascade"] = Field(
        "dual",
        description="from code vectors to inputs: an MLP a part, one MLP, or one on a trained codebook that begins as the "
        "tokenizer's (default for unicode2)",
    )
    adapter_hidden: Positive | None = Field(None, description="hidden width of each adapter MLP; default: the model's")
    uncond_probability: Fraction = Field(0.1, description="share of prompts replaced by the unconditional text")
    mixture: Mixture = Mixture()
    questions_per_image: Positive = Field(1, description="question-answer pairs chained in one sequence")
    max_length: Positive = 2048
    dense: bool = Field(True, description="predict captions, questions and codes too, not only what is asked for")
    dense_images: bool = Field(True, description="with dense: predict the codes of images to be understood as well")
    isolate_questions: bool = Field(True, description="chained questions do not see each other, only the image")
    packing: bool = Field(False, description="fill rows of about max_length with a micro batch's sequences (best fit)")
    attention: Literal["sdpa", "flash"] = Field(
        "sdpa",
        description="flash: flash-attention on a GPU, which skips what packed sequences do not see of each other",
    )
    loss_chunk: Positive = Field(4096, description="positions whose logits are held at once")
    image_loss_weight: Weight = Field(1.0, description="weight of the loss on visual tokens")
    answer_loss_weight: Weight = Field(1.0, description="weight of the loss on the tokens of answers")
    text_source: str | None = Field(
        None, description="text-only data: a .txt (one a line), .jsonl or .parquet with `text`"
    )
    stages: list[MllmStage] = Field([], description="what changes on the way, by from_step")
    lr: PartRates = PartRates()
    old_rows: Rate = Field(
        1.0, description="factor on lr.new_rows for the text's own rows of embedding and head, over the whole training"
    )
    freeze: list[Part] = Field([], description="parts that are not trained at all (a stage cannot wake them)")
    lora: Lora | None = None
    depth_heads: DepthHeads = DepthHeads()
    train: Train = Train()

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
        """What holds in a step (from 0): that of the last stage that has begun, else the section's own."""
        begun = [stage for stage in self.stages if stage.from_step <= step]
        stage = begun[-1] if begun else MllmStage(from_step=0)
        own = {"mixture": self.mixture, "lr": self.lr, "freeze": []}
        own |= {name: getattr(self, name) for name in ("image_loss_weight", "answer_loss_weight")}
        return stage.model_copy(update={name: v for name, v in own.items() if getattr(stage, name) is None})

    def rates_at(self, step: int) -> dict[Part, float]:
        """Factor on the learning rate of each part in a step; 0 for one that rests."""
        stage = self.stage_at(step)
        resting = {*self.freeze, *(stage.freeze or ())}
        rates = stage.lr or self.lr
        return {part: 0.0 if part in resting else getattr(rates, part) for part in PARTS}

    @property
    def has_part_rates(self) -> bool:
        """Whether any part ever has a rate of its own."""
        starts = [0, *(stage.from_step for stage in self.stages)]
        return any(
            rate != 1.0 for step in starts for part, rate in self.rates_at(step).items() if part not in self.freeze
        )

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
