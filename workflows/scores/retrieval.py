"""Retrieval with the encoder's pooled embeddings: image → caption and caption → image, recall at 1."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from smalti.workflows.scores.heldout import HeldOut
from smalti.workflows.scores.models import Models
from smalti.workflows.scores.part import Part, Score
from smalti.workflows.scores.pixels import to_model
from smalti.workflows.scores.zero_shot import embed_texts, fit, no_text_tower

LEAST_DISTINCT = 0.9  # share of captions that stand with one image only


@torch.no_grad()
def measure_retrieval(data: HeldOut, models: Models) -> Part:
    """R@1 both ways over the sample's captioned images, chance beside it.

    Taken only where nine in ten captions are distinct: with a handful of sentences for a thousand images a caption has
    no image of its own to find, and the figure would say nothing. Equal captions count as right for each other.
    """
    rows = [row for row in data.images if row.caption]
    captions = [row.caption or "" for row in rows]
    texts = sorted(set(captions))
    if len(rows) < 2 or len(texts) < LEAST_DISTINCT * len(rows):
        return Part(skipped=f"{len(texts)} distinct captions for {len(rows)} captioned images: no image has its own")
    why = no_text_tower(models)
    if why:
        return Part(skipped=why)
    texts_CE = embed_texts(models, texts)
    chunks = [
        F.normalize(models.encoder.pooled(fit(to_model(bhwc).to(data.job.device), models.encoder.image_size)), dim=-1)
        for _, bhwc in data.batches(rows, "retrieval")
    ]
    owner_B = torch.tensor([texts.index(caption) for caption in captions])
    scores_BC = (torch.cat(chunks) @ texts_CE.T).cpu()
    i2t = (scores_BC.argmax(1) == owner_B).float().mean()
    t2i = (owner_B[scores_BC.argmax(0)] == torch.arange(len(texts))).float().mean()
    return Part(
        {
            "retrieval/i2t_r1": Score(float(i2t), len(rows), baseline={"chance": 1 / len(texts)}),
            "retrieval/t2i_r1": Score(float(t2i), len(texts), baseline={"chance": 1 / len(rows)}),
        }
    )
