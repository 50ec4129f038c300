"""Training the unified language model on token shards and text (arXiv 2503.06764).

Axes: B sequences of this worker, L positions, T codes of an image, V visual codes, C width of a
code vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

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
from smalti.mllm.sequences import SequenceBuilder, TokenSequence, caption_of, collate, questions_of
from smalti.schema import Mixture, MllmSection
from smalti.tokenizers.loading import load_tokenizer
from smalti.workflows.train.data import Joined, ShardRows, TokenRows
from smalti.workflows.train.engines import deepspeed_config, forget_moments, set_factors
from smalti.workflows.train.order import Mixed, Order
from smalti.workflows.train.task import Batch, Context, Metrics, Row, Source, StepReader, Task
from smalti.workflows.train.throughput import flops_a_token
from smalti.workflows.train.zero3_init import partitioned_loading

MODEL = "model"
TEXT_TOKENIZER = "text_tokenizer"
TEXT = "text"
COUNTED = {
    "loss_text": "tokens_text",
    "loss_image": "tokens_image",
    "answer_accuracy": "tokens_answer",
}
COUNTED |= {"loss_pixel": "tokens_image", "loss_semantic": "tokens_image"}
SAMPLE_IMAGES = 256


def usable_rows(table: pa.Table, mixture: Mixture) -> np.ndarray:
    """Rows of a token shard that the mixture makes an image sequence of: int64 indices.

    `codes` are not looked at.

    Any image can be drawn, without a caption too (unconditionally).
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
    """Rows of token shards that the mixture can use; `sizes` counts these alone."""

    mixture: Mixture

    def prepare(self, table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        return super().prepare(table), usable_rows(table, self.mixture)

    def rows_in(self, table: pa.Table, prepared: Any) -> int:
        return len(prepared[1])

    def read(self, shard: int, row: int) -> tuple[str, Mapping[str, Any]]:
        table, (codes, usable) = self.table(shard)
        at = int(usable[row])
        values = {
            name: table.column(name)[at].as_py() for name in table.column_names if name != "codes"
        }
        return self.keys[shard], values | {"codes": codes[at]}


class MllmTask(Task):
    """A causal language model from a directory, a hub name or numbers, with adapter and flat
    vocabulary.

    tokens, keys, sizes: the token shards and their usable rows. text: (keys, sizes) of
    `<path>/text`, None without text-only data. path: the stage's folder, where the driver put
    `text_tokenizer/`. tokenizer: the visual one's folder.
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
        self.section, self.tokenizer_path, self.path = section, tokenizer, path
        self.tokens, self.keys, self.sizes, self.text = tokens, keys, sizes, text

    def setup(self, context: Context) -> None:
        super().setup(context)
        with storage.local_copy(storage.join(self.path, TEXT_TOKENIZER)) as folder:
            self.hf_tokenizer = AutoTokenizer.from_pretrained(folder)
        visual = load_tokenizer(self.tokenizer_path)
        section = with_fitting_adapter(self.section, visual.embed_splits)
        self.build(context, self._build(section, visual, context))
        kind: Any = SequenceBuilder
        if isinstance(self.model, DepthModel):
            kind = partial(PlaceBuilder, num_codes=visual.num_codes, code_shape=visual.code_shape)
        self.builder: SequenceBuilder = kind(
            self.hf_tokenizer,
            self.model.vocabulary,
            mixture=section.mixture,
            uncond_probability=section.uncond_probability,
            questions_per_image=section.questions_per_image,
            max_length=section.max_length,
            dense=section.dense,
            dense_images=section.dense_images,
            isolate_questions=section.isolate_questions,
        )

    def build(self, context: Context, model: UnifiedModel) -> None:
        """Take the model, and freeze its parts."""
        super().setup(context)
        self.model = model
        model.freeze(self.section.freeze)
        if self.section.has_part_rates:
            model.split_rates()

    def _build(self, section: MllmSection, visual: Any, context: Context) -> UnifiedModel:
        """The model, under ZeRO-3 in parts from the start."""
        train = context.train
        build = partial(build_unified, section, self.hf_tokenizer, visual, seed=context.seed)
        if visual.code_shape:
            build = partial(build, sample_MC=self._sample(visual))
        if train.zero_stage < 3 or train.offload == "nvme":
            return build()
        config = deepspeed_config(train, context.collectives.world_size)
        with partitioned_loading(config, context.collectives) as matrices:
            return build(matrices=matrices)

    def _sample(self, visual: Any) -> Tensor:
        """Vectors of the tokens of some training images: float32 (M, C)."""
        codes = shards.codes(shards.read_shard(self.tokens, self.keys[0], ["codes"]))[
            :SAMPLE_IMAGES
        ]
        return visual.embed(torch.from_numpy(np.ascontiguousarray(codes)).flatten(0, 1))

    def source(self) -> Source:
        rows = UsableRows(self.tokens, self.keys, self.sizes)
        rows.mixture = self.section.whole_mixture
        return (
            Joined(rows, ShardRows(storage.join(self.path, TEXT), *self.text))
            if self.text
            else rows
        )

    def order(self, source: Source) -> Order:
        """Texts come by the mixture's weight, each once in an epoch of their own."""
        seed, train = self.context.seed, self.context.train
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
        """`smalti.mllm.sequences.collate` of a sequence a row, by mixture and weights of the stage
        that the step lies in.
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
        """Rows of `max_length` visual tokens, the most that can be, with masks as packed rows have."""
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
        rng.random()  # of no use any more: drawn so that a seed goes on giving the same sequences
        if "text" in row.values:
            return self.builder.build("text", row.values, rng)
        kind = self.builder.sample_kind(row.values, rng, mixture)
        if kind is None:  # a row that this stage has no use for, but another one has
            kind = self.builder.sample_kind(row.values, rng, self.section.whole_mixture)
        assert kind is not None, "rows that no kind wants are left out of the source"
        return self.builder.build(kind, row.values, rng)

    def begin_step(self, step: int, engines: Mapping[str, Any], read: StepReader) -> None:
        """Rates of the parts in this step; those that rest get no gradient either, those that wake
        begin anew.
        """
        if self.section.has_part_rates:
            rates = self.section.rates_at(step)
            set_factors(engines["model"], rates)
            self.model.set_frozen([part for part, rate in rates.items() if not rate])
            before = self.section.rates_at(step - 1) if step else rates
            forget_moments(
                engines["model"],
                [part for part, rate in rates.items() if rate and not before[part]],
            )

    def amount(self, batch: Batch) -> tuple[str, float]:
        """Tokens, without padding."""
        return "tokens", float(batch["attention_mask"].sum())

    def flops_per_unit(self) -> float:
        """Of a token: the language model without its embedding, which is looked up; the adapter and
        the heads of a `DepthModel`, which see places alone, are left out.
        """
        lm = self.model.lm
        table, head = lm.get_input_embeddings(), lm.get_output_embeddings()
        return flops_a_token(lm, without=None if table.weight is head.weight else table)

    def totals(self, batch: Batch) -> Tensor:
        """Summed weight of the labels of a micro batch: float32 (1,)."""
        return self.model.loss_weight(batch)[None]

    def loss(
        self, name: str, engines: Mapping[str, Any], batch: Batch, step: int, share: Tensor | None
    ) -> tuple[Tensor, Metrics] | None:
        assert share is not None
        loss, found = engines[name]({**batch, "loss_weight": share[0]})
        metrics: dict[str, Tensor | float | tuple[Tensor, Tensor]] = {"loss": loss.detach()}
        metrics |= {
            key: (found[key], found[count]) for key, count in COUNTED.items() if key in found
        }
        return loss, metrics

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """`<path>/model`, as `smalti.mllm.build.load_unified` reads it."""
        state = plain_rows(self.model, weights["model"])
        state = merge_lora(self.model, state) if self.section.lora else state
        with (
            without_lora(self.model),
            storage.atomic_local_dir(storage.join(path, MODEL)) as folder,
        ):
            save_unified(folder, self.model, self.hf_tokenizer, state)
        return {}


def with_fitting_adapter(section: MllmSection, splits: Sequence[int]) -> MllmSection:
    """The section with the adapter it means; see `smalti.mllm.adapters.fitting`."""
    return section.model_copy(update={"adapter": fitting(section.adapter, splits)})
