"""A planted world: the tokenizer is a palette, the language model an oracle with known faults."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor

from smalti import shards
from smalti.workflows.evaluation import stage as evaluate
from smalti.workflows.evaluation.scores.heldout import HeldOut
from smalti.workflows.evaluation.scores.measure_result import MeasureResult
from smalti.workflows.evaluation.scores.models import Models

COLORS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}


PALETTE = np.array([(128, 128, 128), *COLORS.values()], dtype=np.uint8)


SIZE, GRID, TOKENS = 32, (4, 4), 16


OFFSET = 0.25  # planted error of the semantic-only decoder, in [-1, 1]


@dataclasses.dataclass
class Item:
    """An image of the world: a block of 2 x 2 patches in the colour of its label on grey."""

    image_id: str
    label: str
    codes: np.ndarray

    @property
    def pixels(self) -> np.ndarray:
        return PALETTE[self.codes.reshape(GRID)].repeat(8, 0).repeat(8, 1)

    @property
    def png(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.pixels).save(buffer, "PNG")
        return buffer.getvalue()

    @property
    def qa(self) -> list[dict[str, str]]:
        return [
            {"question": "What color is it?", "answer": self.label},
            {"question": "Is it red?", "answer": "yes" if self.label == "red" else "no"},
        ]


def items(count: int, seed: int, split: str) -> list[Item]:
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        label = list(COLORS)[number % 3]
        codes = np.zeros(GRID, dtype=np.int32)
        y, x = rng.integers(0, 3, size=2)
        codes[y : y + 2, x : x + 2] = 1 + number % 3
        made.append(Item(f"{split}-{number}", label, codes.reshape(-1)))
    return made


def write_split(
    corpus: str, tokens: str, split: str, found: list[Item], codes: np.ndarray, per_shard: int = 20
) -> None:
    """Corpus and token shards of a split; captions stand for labels."""
    for index, start in enumerate(range(0, len(found), per_shard)):
        some, key = found[start : start + per_shard], shards.shard_key(split, index)
        text: dict[str, Any] = {
            "image_id": [item.image_id for item in some],
            "caption": [f"a {item.label} block" for item in some],
            "label": [item.label for item in some],
            "qa": [item.qa for item in some],
        }
        size: list[int] = [SIZE] * len(some)
        rows = text | {
            "image": [item.png for item in some],
            "width": size,
            "height": size,
            "source": ["x"] * len(some),
        }
        shards.write_shard(
            corpus, key, pa.table({n: rows[n] for n in shards.CORPUS.names}, schema=shards.CORPUS)
        )
        schema = shards.token_schema((TOKENS,))
        arrays = {
            "codes": shards.list_column(codes[start : start + per_shard].astype(np.int32)),
            **{name: pa.array(text[name], schema.field(name).type) for name in text},
        }
        shards.write_shard(
            tokens, key, pa.table([arrays[name] for name in schema.names], schema=schema)
        )


TRAIN, VAL = items(90, 0, "train"), items(45, 1, "val")


class PaletteTokenizer:
    """One code a colour; decodes exactly, and with a known error from the semantic codes alone."""

    grid, num_codes, num_sub, num_semantic, image_size, has_semantic_only = (
        GRID,
        4,
        1,
        4,
        SIZE,
        True,
    )
    code_shape = ()  # one code per token

    def decode(self, codes_BT: Tensor) -> Tensor:
        bhwc = PALETTE[codes_BT.numpy().reshape(-1, *GRID)].repeat(8, 1).repeat(8, 2)
        return torch.from_numpy(bhwc).permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode_semantic_only(self, codes_BT: Tensor) -> Tensor:
        exact = self.decode(codes_BT)
        return torch.where(exact > 0, exact - OFFSET, exact + OFFSET)


class EmbeddingTokenizer(PaletteTokenizer):
    """One that keeps the colour of an image among its codes, but takes blue for green."""

    def pooled(self, codes_BT: Tensor) -> Tensor:
        names = [list(COLORS)[int(codes.max()) - 1].replace("blue", "green") for codes in codes_BT]
        return ColorEncoder().prompt_embeddings(names)


class Oracle:
    """Names the colour rightly and says `yes` to everything else; draws blue for green."""

    def ask_codes(self, codes_BT: Tensor, questions: list[str], *_: Any) -> list[str]:
        colors = list(COLORS)
        return [
            f" {colors[int(codes.max()) - 1].upper()}. " if "color" in question else "yes"
            for codes, question in zip(codes_BT, questions, strict=True)
        ]

    def draw_codes(self, prompts: list[str], **_: Any) -> Tensor:
        drawn = []
        for prompt in prompts:
            color = next(color for color in COLORS if color in prompt)
            drawn.append(
                next(
                    item.codes
                    for item in TRAIN
                    if item.label == ("blue" if color == "green" else color)
                )
            )
        return torch.from_numpy(np.stack(drawn)).long()


class ColorEncoder:
    """An encoder whose embedding of an image is its mean colour, and of a sentence the colour that
    it names.
    """

    image_size = SIZE

    def pooled(self, pixels_BCHW: Tensor) -> Tensor:
        return pixels_BCHW.mean((2, 3)) - pixels_BCHW.mean((1, 2, 3))[:, None]

    def prompt_embeddings(self, texts: list[str]) -> Tensor:
        found = [
            next(
                (np.array(rgb, float) for color, rgb in COLORS.items() if color in text), np.ones(3)
            )
            for text in texts
        ]
        centred = torch.tensor(np.stack([rgb - rgb.mean() for rgb in found]))
        return torch.nn.functional.normalize(centred.float(), dim=-1)


def take(name: str, planted: tuple[HeldOut, Models]) -> MeasureResult:
    return evaluate.MEASURES[name].compute(*planted)
