"""How much of an image survives its codes: PSNR and SSIM of decoded held-out images.

B images, T tokens.
"""

from __future__ import annotations

import numpy as np
import torch

from smalti.tokenizers.metrics import psnr, ssim
from smalti.workflows.evaluation.scores.heldout import HeldOut, HeldOutRow
from smalti.workflows.evaluation.scores.measure_result import MeasureResult, Score
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.evaluation.scores.pixels import thumbnail, to_model, to_uint8

SHOWN = 16
MOST_DB = 100.0  # per image: an exact copy would be infinite, and so would the mean


@torch.inference_mode()
def measure_reconstruction(data: HeldOut, models: Models) -> MeasureResult:
    """PSNR (dB) and SSIM of decoded images, mean over images.

    If a decoder for the semantic codes alone was trained, also of that one, and the difference as
    `reconstruction/psnr_over_semantic_only`.
    """
    tokenizer = models.tokenizer
    semantic = tokenizer.has_semantic_only
    found: dict[str, list[float]] = {
        "psnr": [],
        "ssim": [],
        "psnr_semantic_only": [],
        "ssim_semantic_only": [],
    }
    shown = {row.image_id for row in _spread_rows(data.images, SHOWN)}
    result = MeasureResult()
    grid: list[dict[str, object]] = []
    for rows, bhwc in data.batches(data.images, "reconstruction"):
        truth_BCHW = to_model(bhwc).to(data.job.device)
        codes_BT = models.to_codes(np.stack([row.codes for row in rows]))
        pictures = {"input": bhwc}
        decoded_BCHW = tokenizer.decode(codes_BT)
        _measure(found, "", decoded_BCHW, truth_BCHW)
        pictures["decoded"] = to_uint8(decoded_BCHW)
        if semantic:
            plain_BCHW = tokenizer.decode_semantic_only(codes_BT)
            _measure(found, "_semantic_only", plain_BCHW, truth_BCHW)
            pictures["semantic"] = to_uint8(plain_BCHW)
        for place, row in enumerate(rows):
            if row.image_id in shown:
                grid.append(_keep(result, len(grid), row, place, pictures, found, len(rows)))
    result.tables["grid"] = grid
    result.tables["psnr"] = _spread_of(found["psnr"])
    for name, values in found.items():
        if values:
            result.scores[f"reconstruction/{name}"] = Score(float(np.mean(values)), len(values))
    if semantic:
        gain = np.mean(found["psnr"]) - np.mean(found["psnr_semantic_only"])
        result.scores["reconstruction/psnr_over_semantic_only"] = Score(
            float(gain), len(found["psnr"])
        )
    return result


def _measure(
    found: dict[str, list[float]], ending: str, decoded: torch.Tensor, truth: torch.Tensor
) -> None:
    found[f"psnr{ending}"] += psnr(decoded, truth).clamp_max(MOST_DB).tolist()
    found[f"ssim{ending}"] += ssim(decoded, truth).tolist()


def _keep(
    result: MeasureResult,
    number: int,
    row: HeldOutRow,
    place: int,
    pictures: dict[str, np.ndarray],
    found: dict[str, list[float]],
    size: int,
) -> dict[str, object]:
    """Keep an image's pictures for the report; returns its row of the table."""
    line: dict[str, object] = {"image_id": row.image_id, "caption": row.caption or row.label}
    for kind, bhwc in pictures.items():
        name = f"reconstruction-{number:02d}-{kind}"
        result.pictures[name] = thumbnail(bhwc[place])
        line[kind] = name
    line["psnr"] = found["psnr"][place - size]
    if found["psnr_semantic_only"]:
        line["psnr_semantic_only"] = found["psnr_semantic_only"][place - size]
    return line


def _spread_rows(rows: list[HeldOutRow], most: int) -> list[HeldOutRow]:
    """Rows evenly over the sample, to show more than one source or class."""
    return [rows[int(place)] for place in np.linspace(0, len(rows) - 1, min(most, len(rows)))]


def _spread_of(values: list[float]) -> dict[str, float]:
    return {
        name: float(np.quantile(values, share))
        for name, share in (("p05", 0.05), ("p50", 0.5), ("p95", 0.95))
    }
