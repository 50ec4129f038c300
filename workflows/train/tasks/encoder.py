"""Train a SigLIP on the corpus's image-text pairs (sigmoid loss, arXiv 2303.15343).

Axis letters: B images of this worker, H W pixels, L text tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from smalti import storage
from smalti.schema import EncoderTrain
from smalti.tokenizers.encoders import encode_texts
from smalti.tokenizers.siglip import ContrastiveModel, build_siglip
from smalti.workflows.train.data import ImageRows
from smalti.workflows.train.task import Batch, Context, Metrics, Row, Source, Task, Values
from smalti.workflows.train.tasks.images import to_unit
from smalti.workflows.train.throughput import flops_a_token

if TYPE_CHECKING:
    from smalti.workflows.train.deepspeed_compat import Engine

MODEL = "model"
TEXT_TOKENIZER = "text_tokenizer"


def text_of(caption: str | None, label: str | None) -> str:
    """The text of an image: its caption, else its label, else ''."""
    return (caption or "").strip() or (label or "").strip()


def with_text(table: pa.Table) -> np.ndarray:
    """Rows of a corpus table that have a caption or a label: int64 indices."""
    captions = table.column("caption").to_pylist()
    labels = table.column("label").to_pylist()
    found = [bool(text_of(*pair)) for pair in zip(captions, labels, strict=True)]
    return np.flatnonzero(found)


class CaptionedRows(ImageRows):
    """The rows of a corpus that have a text; `sizes` counts only these."""

    def prepare(self, table: pa.Table) -> np.ndarray:
        return with_text(table)

    def rows_in(self, table: pa.Table, prepared: np.ndarray) -> int:
        return len(prepared)

    def read(self, shard: int, row: int) -> tuple[str, Values]:
        """The `row`-th row with a text."""
        return super().read(shard, int(self.table(shard)[1][row]))


def augment(pixels: np.ndarray, shift: int, flip: bool, rng: np.random.Generator) -> np.ndarray:
    """Shift and mirror an image at random.

    Args:
        pixels: (H, W, 3).
        shift: most pixels to shift each way; edges are repeated.
        flip: whether to mirror with probability 1/2.
        rng: source of the draws.
    """
    if shift:
        height, width, _ = pixels.shape
        top, left = rng.integers(0, 2 * shift + 1, size=2)
        padded = np.pad(pixels, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
        pixels = padded[top : top + height, left : left + width]
    if flip and rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    return pixels


class EncoderTask(Task):
    """Trains a SigLIP from random weights.

    The final model is an ordinary Hugging Face SiglipModel folder with its tokenizer.

    Args:
        corpus: folder of the corpus.
        keys: its training shards.
        sizes: their numbers of rows with a text.
        encoder: sizes of the model and augmentation.
        image_size: side of the images in pixels.
        max_pixels: largest image that is decoded.
        path: the stage's folder, with `text_tokenizer/`.
    """

    together = "the contrastive loss"

    def __init__(
        self,
        corpus: str,
        keys: list[str],
        sizes: list[int],
        encoder: EncoderTrain,
        image_size: int,
        max_pixels: int,
        path: str,
    ) -> None:
        self.corpus = corpus
        self.keys = keys
        self.sizes = sizes
        self.encoder = encoder
        self.image_size = image_size
        self.max_pixels = max_pixels
        self.path = path

    def source(self) -> Source:
        return CaptionedRows(
            self.corpus, self.keys, self.sizes, self.image_size, max_pixels=self.max_pixels
        )

    def setup(self, context: Context) -> None:
        super().setup(context)
        with storage.local_copy(storage.join(self.path, TEXT_TOKENIZER)) as folder:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        pad = self.tokenizer.pad_token_id
        eos = self.tokenizer.eos_token_id
        self.build(context, len(self.tokenizer), pad, eos)

    def build(self, context: Context, num_words: int, pad: int, eos: int) -> None:
        """Build the model for a text tokenizer of `num_words` tokens."""
        super().setup(context)
        self.num_words = num_words
        self.siglip = build_siglip(self.encoder, self.image_size, num_words, pad, eos)
        self.ids: dict[str, Tensor] = {}

    def modules(self) -> dict[str, nn.Module]:
        return {"model": ContrastiveModel(self.siglip)}

    def make_batch(self, rows: Sequence[Row]) -> Batch:
        """`pixels` uint8 (B, 3, H, W), augmented; `input_ids` int64 (B, L)."""
        shift = self.encoder.augment_shift
        flip = self.encoder.augment_flip
        seed = self.context.seed
        pixels = [augment(row.values["pixels"], shift, flip, row.random(seed)) for row in rows]
        ids = [self._ids(text_of(row.values["caption"], row.values["label"])) for row in rows]
        return {
            "pixels": torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(),
            "input_ids": torch.stack(ids),
        }

    def planned_batch(self, num: int) -> Batch:
        """A batch whose texts all differ: equal ones would be encoded once."""
        ids = torch.arange(num)[:, None].expand(num, self.encoder.text_length)
        shape = (num, 3, self.image_size, self.image_size)
        pixels = torch.randint(256, shape, dtype=torch.uint8)
        return {"pixels": pixels, "input_ids": ids % self.num_words}

    def _ids(self, text: str) -> Tensor:
        if text not in self.ids:
            if len(self.ids) > 100_000:
                self.ids.clear()
            self.ids[text] = encode_texts(self.tokenizer, [text], self.encoder.text_length)[0]
        return self.ids[text]

    def flops_per_unit(self) -> float:
        """Per image with its text."""
        patches = (self.image_size // self.encoder.patch_size) ** 2
        words = self.siglip.text_model
        text = flops_a_token(words, without=words.embeddings) * self.encoder.text_length
        return flops_a_token(self.siglip.vision_model) * patches + text

    def loss(
        self,
        name: str,
        engines: Mapping[str, Engine],
        batch: Batch,
        step: int,
        share: Tensor | None,
    ) -> tuple[Tensor, Metrics] | None:
        collectives = self.context.collectives
        gather = collectives.all_gather if collectives.world_size > 1 else None
        return engines[name](to_unit(batch["pixels"]), batch["input_ids"], gather)

    def save(self, path: str, weights: dict[str, dict[str, Tensor]]) -> dict[str, float]:
        """Write `<path>/model`: SiglipModel, text tokenizer, preprocessor config."""
        state = {name.removeprefix("model."): tensor for name, tensor in weights["model"].items()}
        with storage.atomic_local_dir(storage.join(path, MODEL)) as folder:
            self.siglip.save_pretrained(folder, state_dict=state)
            self.tokenizer.save_pretrained(folder)
            with open(os.path.join(folder, "preprocessor_config.json"), "w") as file:
                json.dump(preprocessor_config(self.image_size), file, indent=2)
        return {}


def preprocessor_config(image_size: int) -> dict[str, object]:
    """Hugging Face's settings of the pixels: bicubic resize, [0, 255] → [-1, 1]."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": image_size, "width": image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }
