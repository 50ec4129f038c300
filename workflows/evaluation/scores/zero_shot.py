"""Zero-shot classes of the encoder: the label with the nearest sentence.

B images, L labels, E embedding width.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.errors import ArtifactError
from smalti.workflows.evaluation.scores.heldout import HeldOut, HeldOutRow
from smalti.workflows.evaluation.scores.measure_result import MeasureResult, Score, share
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.evaluation.scores.pixels import to_model
from smalti.workflows.evaluation.scores.tables import ClassRow, ZeroShotTable

MOST_TEXTS_A_BATCH = 256


class ZeroShot:
    """The encoder as a classifier of the corpus's labels.

    Raises:
        ArtifactError: if the encoder has no text tower.
    """

    def __init__(self, models: Models) -> None:
        self.encoder = models.encoder
        sentences = models.data.zero_shot_sentences
        self.labels = list(sentences)
        self.texts_LE = embed_texts(models, list(sentences.values()))

    @torch.no_grad()
    def classify(self, pixels_BCHW: Tensor) -> list[str]:
        """The label with the nearest sentence, of float (B, 3, S, S) in [-1, 1]."""
        return self.nearest(self.encoder.pooled(fit(pixels_BCHW, self.encoder.image_size)))

    def nearest(self, images_BE: Tensor) -> list[str]:
        """The same for image embeddings, float (B, E)."""
        return [
            self.labels[index]
            for index in (F.normalize(images_BE, dim=-1) @ self.texts_LE.T).argmax(1).tolist()
        ]


def embed_texts(models: Models, texts: list[str]) -> Tensor:
    """Unit text embeddings (n, E), in batches."""
    chunks = range(0, len(texts), MOST_TEXTS_A_BATCH)
    return torch.cat(
        [
            models.encoder.prompt_embeddings(texts[start : start + MOST_TEXTS_A_BATCH])
            for start in chunks
        ]
    )


def fit(pixels_BCHW: Tensor, size: int) -> Tensor:
    """The images at the encoder's size (bicubic, antialiased), within [-1, 1]."""
    if pixels_BCHW.shape[-1] == size:
        return pixels_BCHW
    resized = F.interpolate(
        pixels_BCHW, (size, size), mode="bicubic", antialias=True, align_corners=False
    )
    return resized.clamp(-1, 1)


def no_text_tower(models: Models) -> str | None:
    """Why the encoder cannot read text; None if it can."""
    try:
        models.encoder.prompt_embeddings(["a"])
    except ArtifactError as error:
        return str(error)
    return None


def measure_zero_shot(data: HeldOut, models: Models) -> MeasureResult:
    """Share of labelled held-out images whose nearest sentence is their label's.

    With DualToken also through its semantic codes, by the trained tower's last layers and the
    encoder's texts.
    """
    if not data.labels:
        return MeasureResult(skipped="the corpus has fewer than two labels")
    why = no_text_tower(models)
    if why:
        return MeasureResult(skipped=why)
    known = set(data.labels)
    rows = [row for row in data.images if row.label in known]
    if not rows:
        return MeasureResult(skipped="no held-out image has one of the training labels")
    classifier = ZeroShot(models)
    given: list[str] = []
    coded: list[str] = []
    embed = models.code_embedder
    for batch, bhwc in data.batches(rows, "zero-shot"):
        given += classifier.classify(to_model(bhwc).to(data.job.device))
        if embed is not None:
            coded += classifier.nearest(
                embed(models.to_codes(np.stack([row.codes for row in batch])))
            )
    right = [row.label or "" for row in rows]
    hits = [one == other for one, other in zip(given, right, strict=True)]
    score = Score(
        share(hits), len(rows), baseline={"most_frequent": most_frequent_share(data, rows)}
    )
    table: ZeroShotTable = {
        "classes": by_class(right, hits),
        "sentences": dict(list(data.zero_shot_sentences.items())[:200]),
    }
    result = MeasureResult({"zero_shot/accuracy": score}, {"zero_shot": table})
    if coded:
        hits = [one == other for one, other in zip(coded, right, strict=True)]
        result.scores["zero_shot/through_codes"] = Score(
            share(hits), len(rows), baseline={"encoder": score.value}
        )
    return result


def most_frequent_share(data: HeldOut, rows: list[HeldOutRow]) -> float:
    """Accuracy of the most frequent training label on the rows."""
    labels = [text["label"] for text in data.training_texts if text["label"]]
    names, counts = np.unique(labels, return_counts=True)
    best = names[counts.argmax()]
    return share([row.label == best for row in rows])


def by_class(right: list[str], hits: list[bool]) -> list[ClassRow]:
    """Accuracy of each class, the worst first; at most 200 rows."""
    rows: list[ClassRow] = []
    for label in sorted(set(right)):
        chosen = [hit for hit, name in zip(hits, right, strict=True) if name == label]
        rows.append({"key": label, "n": len(chosen), "accuracy": share(chosen)})
    return sorted(rows, key=lambda row: (row["accuracy"], row["key"]))[:200]
