"""Title, meaning and number format of each score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from smalti.workflows.evaluation.scores.measure_result import ScoreRecord

Kind = Literal["share", "dB", "plain", "nats"]


@dataclass(frozen=True)
class Name:
    """A score for people: a short title, one sentence, and the kind of its number."""

    title: str
    meaning: str
    kind: Kind = "share"


NAMES: dict[str, Name] = {
    "qa/accuracy": Name(
        "Question answering", "Held-out questions about held-out images, answered exactly right."
    ),
    "drawing/accuracy": Name(
        "Drawing",
        "Drawn images whose whole label the judge recognises; it is a classifier trained on real "
        "images only.",
    ),
    "drawing/zero_shot_accuracy": Name(
        "Drawing, by the encoder",
        "Drawn images whose whole label the encoder's zero-shot classes recognise.",
    ),
    "drawing/judge_accuracy": Name("Judge", "Accuracy of the judge on real held-out images."),
    "zero_shot/accuracy": Name(
        "Encoder, zero-shot", "Held-out images whose label's sentence is nearest in the encoder."
    ),
    "zero_shot/through_codes": Name(
        "Zero-shot through codes",
        "The same through the tokenizer's semantic codes, by the trained tower.",
    ),
    "reconstruction/psnr": Name(
        "Reconstruction PSNR", "Held-out images decoded from their codes; mean over images.", "dB"
    ),
    "reconstruction/psnr_semantic_only": Name(
        "PSNR, semantic codes only", "The same decoder trained on the semantic codes alone.", "dB"
    ),
    "reconstruction/psnr_over_semantic_only": Name(
        "Gain by the pixel codes",
        "PSNR of the full codes minus that of the semantic codes alone.",
        "dB",
    ),
    "reconstruction/ssim": Name(
        "Reconstruction SSIM",
        "Structural similarity, Gaussian window 11, mean over images.",
        "plain",
    ),
    "reconstruction/ssim_semantic_only": Name(
        "SSIM, semantic codes only", "The same for semantic codes alone.", "plain"
    ),
    "codes/usage": Name(
        "Code usage", "Codes that occur at least once; n is the number of tokens counted."
    ),
    "codes/perplexity": Name(
        "Code perplexity", "Number of evenly used codes with the same entropy.", "plain"
    ),
    "codes/entropy": Name("Code entropy", "Entropy of the codes over held-out tokens.", "nats"),
    "codes/vrr": Name(
        "Variance explained (VRR)",
        "Variance of the patches that their codes explain; unbiased, with shuffled codes as "
        "baseline.",
    ),
    "codes/semantic_usage": Name("Semantic code usage", "Semantic codes that occur at least once."),
    "codes/semantic_perplexity": Name(
        "Semantic perplexity", "The same for the semantic codes.", "plain"
    ),
    "codes/semantic_entropy": Name("Semantic entropy", "Entropy of the semantic codes.", "nats"),
    "codes/semantic_vrr": Name(
        "Variance explained, semantic", "The same for patches that share a semantic code."
    ),
    "retrieval/t2i_r1": Name(
        "Caption → image", "Captions whose nearest image is their own (recall at 1)."
    ),
    "retrieval/i2t_r1": Name(
        "Image → caption", "Images whose nearest caption is their own (recall at 1)."
    ),
    "retrieval/t2i_r1_through_codes": Name(
        "Caption → codes", "The same through the tokenizer's semantic codes."
    ),
    "retrieval/i2t_r1_through_codes": Name(
        "Codes → caption", "The same through the tokenizer's semantic codes."
    ),
}
ORDER = list(NAMES)
HEADLINES = (
    "qa/accuracy",
    "drawing/accuracy",
    "reconstruction/psnr",
    "reconstruction/psnr_over_semantic_only",
)
BASELINES = {
    "question_only": "question only",
    "pixel_codes": "pixel codes",
    "shuffled": "shuffled codes",
    "chance": "chance",
    "most_frequent": "most frequent label",
    "reconstructed": "reconstructed images",
    "encoder": "the encoder itself",
}


def name_of(key: str) -> Name:
    """The name of a score; its key if `NAMES` has none."""
    return NAMES.get(key) or Name(key, "", "plain")


def ordered(scores: Iterable[str]) -> list[str]:
    """The keys in the order of the report.

    Those of `NAMES` in its order, then the others in alphabetical order.
    """
    return sorted(scores, key=lambda key: (ORDER.index(key) if key in NAMES else len(ORDER), key))


def written(value: float, kind: Kind) -> str:
    """A number for people: `91.3 %`, `24.51 dB`, `3.21 nats`, `0.874`, `1,024`."""
    if kind == "share":
        return f"{100 * value:.1f} %"
    if kind in ("dB", "nats"):
        return f"{value:.2f} {kind}"
    return (
        f"{value:,.0f}"
        if abs(value) >= 100
        else f"{value:.3g}"
        if abs(value) >= 10
        else f"{value:.3f}"
    )


def baseline_name(key: str) -> str:
    """A baseline for people."""
    return BASELINES.get(key, key.replace("_", " "))


def goal_met(score: ScoreRecord) -> bool | None:
    """Whether the score reaches its goal; None without one."""
    if "goal" not in score:
        return None
    difference = score["value"] - score["goal"]
    return bool(difference >= 0 if score.get("higher_is_better", True) else difference <= 0)


def duration(seconds: float) -> str:
    """`8.3 s`, `4 min 05 s`, `3 h 12 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return (
        f"{minutes} min {round(seconds) % 60:02d} s"
        if minutes < 60
        else f"{minutes // 60} h {minutes % 60:02d} min"
    )
