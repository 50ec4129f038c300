"""Images drawn from text, judged by two classifiers.

One is trained on real images only, the other is the encoder's zero-shot. The baseline
`reconstructed` is the judge's accuracy on reconstructed held-out images: a drawing passes through
the same decoder, so this is about the most that a perfect language model could reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from smalti.progress import Progress
from smalti.workflows.evaluation.scores.answers import normalise
from smalti.workflows.evaluation.scores.heldout import HeldOut, choose
from smalti.workflows.evaluation.scores.measure_result import MeasureResult, Score, share
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.evaluation.scores.pixels import thumbnail, to_model, to_uint8
from smalti.workflows.evaluation.scores.tables import Drawing
from smalti.workflows.evaluation.scores.zero_shot import ZeroShot, by_class, no_text_tower

MOST_PROMPTS = 256
PROMPTS_WITHOUT_LABELS = 16
SHOWN = 48
DRAWN_AT_ONCE = 64  # fixed: the seeds of a drawing follow from its place among these


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the label that its drawing should show, if known."""

    text: str
    label: str | None


def measure_drawing(data: HeldOut, models: Models) -> MeasureResult:
    """Share of drawings whose label the judges recognise, and a gallery.

    The scores are drawing/accuracy, drawing/zero_shot_accuracy and drawing/judge_accuracy (of the
    judge on real held-out images). Without labels there is only the gallery.
    """
    settings = data.job.evaluate
    if data.job.export is None:
        return MeasureResult(skipped="no exported language model")
    if settings.drawings == 0:
        return MeasureResult(skipped="evaluate.drawings is 0")
    if models.cannot_draw:
        return MeasureResult(skipped=models.cannot_draw)
    prompts = [prompt for prompt in prompts_of(data) for _ in range(settings.drawings)]
    if not prompts:
        return MeasureResult(
            skipped=(
                "no prompt to draw: the corpus has neither labels nor captions, and "
                "evaluate.prompts is not set"
            )
        )
    drawn_BCHW = draw(prompts, data, models)
    result = MeasureResult()
    verdicts = _judge(result, prompts, drawn_BCHW, data, models)
    bhwc = to_uint8(drawn_BCHW)
    lines: list[Drawing] = []
    for index in np.linspace(0, len(prompts) - 1, min(SHOWN, len(prompts))).astype(int):
        name = f"drawing-{len(lines):02d}"
        result.pictures[name] = thumbnail(bhwc[index])
        prompt = prompts[index]
        seen = {judge: labels[index] for judge, labels in verdicts.items()}
        lines.append({"picture": name, "prompt": prompt.text, "label": prompt.label, "seen": seen})
    result.tables["drawings"] = lines
    return result


def prompts_of(data: HeldOut) -> list[Prompt]:
    """Prompts to draw.

    `evaluate.prompts`, each with the label that it names; otherwise the sentence of each label (a
    seeded choice of 256 if there are more); otherwise a few held-out captions.
    """
    if data.job.evaluate.prompts:
        return [Prompt(text, named_label(text, data.labels)) for text in data.job.evaluate.prompts]
    sentences = list(data.captions_of_labels.items())
    if sentences:
        chosen = choose(len(sentences), MOST_PROMPTS, data.job.seed + 4)
        return [Prompt(sentences[index][1], sentences[index][0]) for index in chosen]
    captions = sorted({row.caption for row in data.images if row.caption})
    return [
        Prompt(captions[index], None)
        for index in choose(len(captions), PROMPTS_WITHOUT_LABELS, data.job.seed + 4)
    ]


def named_label(text: str, labels: list[str]) -> str | None:
    """The longest label whose words occur together in the text."""
    padded = f" {normalise(text)} "
    found = [label for label in labels if f" {normalise(label.replace('_', ' '))} " in padded]
    return max(found, key=lambda label: (len(label), label)) if found else None


def draw(prompts: list[Prompt], data: HeldOut, models: Models) -> Tensor:
    """Drawn images: float (n, 3, S, S) in [-1, 1] on the CPU."""
    settings = data.job.evaluate
    drawn = []
    sampling = settings.sampling.model_dump()
    with Progress(len(prompts), "drawings", "evaluate: drawing") as progress:
        for start in range(0, len(prompts), DRAWN_AT_ONCE):
            texts = [prompt.text for prompt in prompts[start : start + DRAWN_AT_ONCE]]
            seed = data.job.seed + start
            codes_BT = models.language.draw_codes(
                texts, **sampling, seed=seed, batch_size=settings.batch_size
            )
            for first in range(0, len(texts), settings.batch_size):
                drawn.append(models.decode(codes_BT[first : first + settings.batch_size]).cpu())
            progress.update(len(texts))
    return torch.cat(drawn)


def _judge(
    result: MeasureResult, prompts: list[Prompt], drawn_BCHW: Tensor, data: HeldOut, models: Models
) -> dict[str, list[str]]:
    """Add the scores; returns the answer of each judge for each drawing."""
    places = [place for place, prompt in enumerate(prompts) if prompt.label is not None]
    if not places:
        return {}
    right = [prompts[place].label or "" for place in places]
    chance = {"chance": 1 / len(data.labels)}
    verdicts = {"judge": models.judge.classify(drawn_BCHW)}
    hits = [verdicts["judge"][place] == label for place, label in zip(places, right, strict=True)]
    real, reconstructed, count = _judge_on_held_out(data, models)
    beside = {} if reconstructed is None else {"reconstructed": reconstructed}
    result.scores["drawing/accuracy"] = Score(share(hits), len(hits), baseline=chance | beside)
    result.tables["drawing_by_label"] = by_class(right, hits)
    if real is not None:
        result.scores["drawing/judge_accuracy"] = Score(real, count, baseline=chance)
    if no_text_tower(models) is None:
        classifier = ZeroShot(models)
        size = data.job.evaluate.batch_size
        seen: list[str] = []
        for start in range(0, len(drawn_BCHW), size):
            seen += classifier.classify(drawn_BCHW[start : start + size].to(data.job.device))
        verdicts["zero_shot"] = seen
        hits = [seen[place] == label for place, label in zip(places, right, strict=True)]
        result.scores["drawing/zero_shot_accuracy"] = Score(share(hits), len(hits), baseline=chance)
    return verdicts


def _judge_on_held_out(data: HeldOut, models: Models) -> tuple[float | None, float | None, int]:
    """The judge's accuracy on held-out images.

    Returns:
        The accuracy on the images, on their reconstructions, and the number of images.
    """
    known = set(data.labels)
    rows = [row for row in data.images if row.label in known]
    if not rows:
        return None, None, 0
    real: list[bool] = []
    rebuilt: list[bool] = []
    for batch, bhwc in data.batches(rows, "judge on held-out images"):
        right = [row.label for row in batch]
        seen = [(real, to_model(bhwc))]
        if models.no_decoder is None:  # a diffusion decoder takes seconds per picture
            seen.append(
                (
                    rebuilt,
                    models.tokenizer.decode(
                        models.to_codes(np.stack([row.codes for row in batch]))
                    ),
                )
            )
        for hits, pixels in seen:
            hits += [
                one == other
                for one, other in zip(models.judge.classify(pixels), right, strict=True)
            ]
    return share(real), share(rebuilt) if rebuilt else None, len(rows)
