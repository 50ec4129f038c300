"""Retrieval between images and captions by the encoder: recall at 1."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smalti.workflows.evaluation.scores.heldout import HeldOut
from smalti.workflows.evaluation.scores.measure_result import MeasureResult, Score
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.evaluation.scores.pixels import to_model
from smalti.workflows.evaluation.scores.zero_shot import embed_texts, fit, no_text_tower

LEAST_DISTINCT = 0.9  # share of captions that are of one image only


@torch.no_grad()
def measure_retrieval(data: HeldOut, models: Models) -> MeasureResult:
    """R@1 both ways over the sample's captioned images, with chance as baseline.

    Taken only if nine in ten captions are distinct: with a few sentences for a thousand images, a
    caption has no image of its own. Equal captions count as right for each other. With DualToken
    also through its semantic codes.
    """
    rows = [row for row in data.images if row.caption]
    captions = [row.caption or "" for row in rows]
    texts = sorted(set(captions))
    if len(rows) < 2 or len(texts) < LEAST_DISTINCT * len(rows):
        return MeasureResult(
            skipped=(
                f"{len(texts)} distinct captions for {len(rows)} captioned images: no image has "
                "its own"
            )
        )
    why = no_text_tower(models)
    if why:
        return MeasureResult(skipped=why)
    texts_CE = embed_texts(models, texts)
    owner_B = torch.tensor([texts.index(caption) for caption in captions])
    chunks = []
    coded = []
    for batch, bhwc in data.batches(rows, "retrieval"):
        chunks.append(
            models.encoder.pooled(
                fit(to_model(bhwc).to(data.job.device), models.encoder.image_size)
            )
        )
        if models.code_embedder is not None:
            coded.append(
                models.code_embedder(models.to_codes(np.stack([row.codes for row in batch])))
            )
    result = MeasureResult()
    plain = recalls(torch.cat(chunks), texts_CE, owner_B)
    counts = {"i2t": len(rows), "t2i": len(texts)}
    chances = {"i2t": 1 / len(texts), "t2i": 1 / len(rows)}
    for way, value in plain.items():
        result.scores[f"retrieval/{way}_r1"] = Score(
            value, counts[way], baseline={"chance": chances[way]}
        )
    for way, value in recalls(torch.cat(coded), texts_CE, owner_B).items() if coded else ():
        baseline = {"chance": chances[way], "encoder": plain[way]}
        result.scores[f"retrieval/{way}_r1_through_codes"] = Score(
            value, counts[way], baseline=baseline
        )
    return result


def recalls(images_BE: Tensor, texts_CE: Tensor, owner_B: Tensor) -> dict[str, float]:
    """Recall at 1 of each direction.

    Images whose nearest text is theirs, and texts whose nearest image is one of theirs.
    """
    scores_BC = (F.normalize(images_BE, dim=-1) @ texts_CE.T).cpu()
    i2t = (scores_BC.argmax(1) == owner_B).float().mean()
    t2i = (owner_B[scores_BC.argmax(0)] == torch.arange(len(texts_CE))).float().mean()
    return {"i2t": float(i2t), "t2i": float(t2i)}
