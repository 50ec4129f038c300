"""Train the unified language model on token shards and text (arXiv 2503.06764).

Axes: B sequences of this worker, L positions, M sample vectors, C width of a code vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from smalti import shards, storage
from smalti.mllm.adapters import fitting
from smalti.mllm.build import build_unified, save_unified
from smalti.mllm.depth import DepthModel, PlaceBuilder
from smalti.mllm.lora import merge_lora, without_lora
from smalti.mllm.model import UnifiedModel
from smalti.mllm.row_lr_scaling import plain_rows
from smalti.mllm.sequences import (
    SequenceBuilder,
    SequenceSettings,
    caption_of,
    collate,
    questions_of,
)
from smalti.mllm.token_sequence import TokenSequence
from smalti.mllm.visual_tokenizer import VisualTokenizer
from smalti.schema import Mixture, MllmSection
from smalti.tokenizers.loading import load_tokenizer
from smalti.workflows.train.data import Joined, ShardRows, TokenRows
from smalti.workflows.train.engines import deepspeed_config, forget_moments, set_factors
from smalti.workflows.train.order import Mixed, Order
from smalti.workflows.train.task import (
    Batch,
    Context,
    Metrics,
    Row,
    Source,
    StepReader,
    Task,
    Values,
)
from smalti.workflows.train.throughput import flops_a_token
from smalti.workflows.train.zero3_init import partitioned_loading

if TYPE_CHECKING:
    from smalti.workflows.train.deepspeed_compat import Engine

MODEL = "model"
TEXT_TOKENIZER = "text_tokenizer"
TEXT = "text"
COUNTED = {
    "loss_text": "tokens_text",
    "loss_image": "tokens_image",
    "answer_accuracy": "tokens_answer",
    "loss_pixel": "tokens_image",
    "loss_semantic": "tokens_image",
}
"""Metrics that are means, and the counts that weigh them."""
SAMPLE_IMAGES = 256
"""Images whose tokens the adapter of a `DepthModel` is fitted to."""


def usable_rows(table: pa.Table, mixture: Mixture) -> np.ndarray:
    """Rows of a token shard that the mixture can use: int64 indices.

    Any image can be drawn, even without a caption (unconditionally).

    Args:
        table: has the columns `caption`, `label` and `qa`.
        mixture: weights of the kinds of sequences.
    """
    if mixture.caption_to_image > 0:
        return np.arange(table.num_rows)
    columns = [table.column(name).to_pylist() for name in ("caption", "label", "qa")]
    wanted = []
    for caption, label, qa in zip(*columns, strict=True):
        row = {"caption": caption, "label": label, "qa": qa}
        described = mixture.image_to_caption > 0 and bool(caption_of(row))
        wanted.append(described or (mixture.qa > 0 and bool(questions_of(row))))
    return np.flatnonzero(wanted)


class UsableRows(TokenRows):
    """Rows of token shards that the mixture can use; `sizes` counts only these."""

    mixture: Mixture

    def prepare(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        return super().prepare(table), usable_rows(table, self.mixture)

    def rows_in(self, table: pa.Table, prepared: tuple[np.ndarray, np.ndarray]) -> int:
        return len(prepared[1])

    def read(self, shard: int, row: int) -> tuple[str, Values]:
        table, (codes, usable) = self.table(shard)
        at = int(usable[row])
        values = {
            name: table.column(name)[at].as_py() for name in table.column_names if name != "codes"
        }
        return self.keys[shard], values | {"codes": codes[at]}


class MllmTask(Task):
    """Trains a causal language model with adapter and flat vocabulary.

    Args:
        section: the recipe's `mllm` section.
        tokenizer: folder of the visual tokenizer.
        tokens: folder of the token shards.
        keys: its training shards.
        sizes: their numbers of usable rows.
        path: the stage's folder, with `text_tokenizer/`.
        text: keys and numbers of rows of `<path>/text`; None without text-only data.
    """

    def __init__(
        self,
        section: MllmSection,
        tokenizer: str,
        tokens: str,
        keys: list[str],
        sizes: list[int],
        path: str,
        text: tuple[list[str], list[int]] | None = None,
    ) -> None:
        self.section = section
        self.tokenizer_path = tokenizer
        self.tokens = tokens
        self.keys = keys
        self.sizes = sizes
        self.path = path
        self.text = text

    def setup(self, context: Context) -> None:
        super().setup(context)
        with storage.local_copy(storage.join(self.path, TEXT_TOKENIZER)) as folder:
            self.hf_tokenizer = AutoTokenizer.from_pretrained(folder)
        visual: VisualTokenizer = load_tokenizer(self.tokenizer_path)
        section = with_fitting_adapter(self.section, visual.embed_splits)
        self.build(context, self._build(section, visual, context))
        self.builder = self._builder(section, visual)

    def _builder(self, section: MllmSection, visual: VisualTokenizer) -> SequenceBuilder:
        settings: SequenceSettings = {
            "mixture": section.mixture,
            "uncond_probability": section.uncond_probability,
            "questions_per_image": section.questions_per_image,
            "max_length": section.max_length,
            "dense": section.dense,
            "dense_images": section.dense_images,
            "isolate_questions": section.isolate_questions,
        }
        vocabulary = self.model.vocabulary
        if not isinstance(self.model, DepthModel):
            return SequenceBuilder(self.hf_tokenizer, vocabulary, **settings)
        return PlaceBuilder(
            self.hf_tokenizer,
            vocabulary,
            num_codes=visual.num_codes,
            code_shape=visual.code_shape,
            **settings,
        )

    def build(self, context: Context, model: UnifiedModel) -> None:
        """Set the model, and freeze its parts."""
        super().setup(context)
        self.model = model
        model.freeze(self.section.freeze)
        if self.section.has_part_rates:
            model.split_rates()

    def _build(
        self, section: MllmSection, visual: VisualTokenizer, context: Context
    ) -> UnifiedModel:
        """The model; under ZeRO-3 partitioned from the start."""
        train = context.train
        build = partial(build_unified, section, self.hf_tokenizer, visual, seed=context.seed)
        if visual.code_shape:
            build = partial(build, sample_MC=self._sample(visual))
        if train.zero_stage < 3 or train.offload == "nvme":
            return build()
        config = deepspeed_config(train, context.collectives.world_size)
        with partitioned_loading(config, context.collectives) as matrices:
            return build(matrices=matrices)

    def _sample(self, visual: VisualTokenizer) -> Tensor:
        """Vectors of the tokens of some training images: float32 (M, C)."""
        codes = shards.codes(shards.read_shard(self.tokens, self.keys[0], ["codes"]))
        first = np.ascontiguousarray(codes[:SAMPLE_IMAGES])
        return visual.embed(torch.from_numpy(first).flatten(0, 1))

    def source(self) -> Source:
        rows = UsableRows(self.tokens, self.keys, self.sizes)
        rows.mixture = self.section.whole_mixture
        if not self.text:
            return rows
        return Joined(rows, ShardRows(storage.join(self.path, TEXT), *self.text))

    def order(self, source: Source) -> Order:
        """The order of the rows; texts are mixed in by weight, with epochs of their own."""
        seed = self.context.seed
        train = self.context.train
        rows = Order(self.sizes, seed, train.data_window)
        if not self.text:
            return rows
        texts = Order(self.text[1], seed + 1, train.data_window)
        steps = sorted({0, *(stage.from_step for stage in self.section.stages)})
        mixtures = [self.section.stage_at(step).mixture or self.section.mixture for step in steps]
        shares = [mixture.text / sum(mixture.model_dump().values()) for mixture in mixtures]
        return Mixed(rows, texts, [step * train.batch_size for step in steps], shares)

    def modules(self) -> dict[str, nn.Module]:
        return {"model": self.model}

    def make_batch(self, rows: Sequence[Row]) -> Batch:
        """One sequence per row, as `smalti.mllm.sequences.collate` joins them.

        Mixture and loss weights are those of the stage that the step belongs to.
        """
        stage = self.section.stage_at(rows[0].index // self.section.train.batch_size)
        mixture = stage.mixture or self.section.mixture
        room = self.section.max_length if self.section.packing else None
        batch = collate(
            [self._sequence(row, mixture) for row in rows], self.model.vocabulary.pad, room
        )
        weights = {
            "image_loss_weight": stage.image_loss_weight,
            "answer_loss_weight": stage.answer_loss_weight,
        }
        return batch | {name: torch.tensor(value) for name, value in weights.items()}

    def planned_batch(self, num: int) -> Batch:
        """Rows of `max_length` visual tokens, the most possible, with the masks of packed rows."""
        shape = (num, self.section.max_length)
        ids_BL = torch.full(shape, self.model.vocabulary.first_visual)
        zeros_BL = torch.zeros(shape, dtype=torch.int64)
        batch = {
            "input_ids": ids_BL,
            "labels": ids_BL,
            "attention_mask": torch.ones_like(ids_BL),
            "answer_mask": torch.zeros(shape, dtype=torch.bool),
            "position_ids": torch.arange(shape[1]).repeat(num, 1),
            "document_ids": zeros_BL,
            "segment_ids": zeros_BL,
            "image_loss_weight": torch.tensor(1.0),
            "answer_loss_weight": torch.tensor(1.0),
        }
        if isinstance(self.model, DepthModel):
            code_shape = (ids_BL.numel(), len(self.model.heads), self.model.depth)
            batch["codes"] = torch.zeros(code_shape, dtype=torch.int64)
        return batch

    def _sequence(self, row: Row, mixture: Mixture) -> TokenSequence:
        rng = row.random(self.context.seed)
        rng.random()  # unused: it keeps the sequences of a seed as they were in earlier versions
        if "text" in row.values:
            return self.builder.build("text", row.values, rng)
        kind = self.builder.sample_kind(row.values, rng, mixture)
        if kind is None:  # a row that this stage cannot use, but another one can
            kind = self.builder.sample_kind(row.values, rng, self.section.whole_mixture)
        assert kind is not None, "the source has usable rows only"
        return self.builder.build(kind, row.values, rng)

    def begin_step(self, step: int, engines: Mapping[str, Engine], read: StepReader) -> None:
        """Set the learning rates of the parts in this step.

        Parts of rate 0 are frozen. The optimizer's states of those that are unfrozen are reset.
        """
        if not self.section.has_part_rates:
            return
        rates = self.section.rates_at(step)
        set_factors(engines["model"], rates)
        self.model.set_frozen([part for part, rate in rates.items() if not rate])
        before = self.section.rates_at(step - 1) if step else rates
        unfrozen = [part for part, rate in rates.items() if rate and not before[part]]
        forget_moments(engines["model"], unfrozen)

    def amount(self, batch: Batch) -> tuple[str, float]:
        """The number of tokens, without padding."""
        return "tokens", float(batch["attention_mask"].sum())

    def flops_per_unit(self) -> float:
        """Per token: the language model without its embedding, which is looked up.

        The adapter and the heads of a `DepthModel`, which see only visual places, are not counted.
        """
        embed = self.model.embedding
        tied = embed.weight is self.model.head.weight
        return flops_a_token(self.model.lm, without=None if tied else embed)

    def totals(self, batch: Batch) -> Tensor:
        """Total weight of the labels of a micro batch: float32 (1,)."""
        return self.model.loss_weight(batch)[None]

    def loss(
        self,
        name: str,
        engines: Mapping[str, Engine],
        batch: Batch,
        step: int,
        share: Tensor | None,
    ) -> tuple[Tensor, Metrics] | None:
        assert share is not None
        loss, found = engines[name]({**batch, "loss_weight": share[0]})
        metrics: dict[str, Tensor | float | tuple[Tensor, Tensor]] = {"loss": loss.detach()}
        for key, count in COUNTED.items():
            if key in found:
                metrics[key] = (found[key], found[count])
        return loss, metrics

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """Write `<path>/model`, which `smalti.mllm.build.load_unified` reads."""
        state = plain_rows(self.model, weights["model"])
        if self.section.lora:
            state = merge_lora(self.model, state)
        with (
            without_lora(self.model),
            storage.atomic_local_dir(storage.join(path, MODEL)) as folder,
        ):
            save_unified(folder, self.model, self.hf_tokenizer, state)
        return {}


def with_fitting_adapter(section: MllmSection, splits: Sequence[int]) -> MllmSection:
    """The section with the adapter to build; see `smalti.mllm.adapters.fitting`."""
    return section.model_copy(update={"adapter": fitting(section.adapter, splits)})
