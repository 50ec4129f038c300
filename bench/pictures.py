"""Pictures, an encoder and a tokenizer for the benchmarks: seeded, the same on every machine, no
file and no network.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw


def photo(seed: int, width: int, height: int) -> Image.Image:
    """RGB picture with the spectrum of photographs (amplitude 1/f) in the luminance, softer colour,
    and hard edges.
    """
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0

    def field(power: float) -> np.ndarray:
        shape = frequency.shape
        noise = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
        plane = np.fft.irfft2(noise / frequency**power, (height, width))
        return np.asarray((plane - plane.mean()) / plane.std())

    luminance, warm, green = field(1.0), field(1.5), field(1.5)
    channels = [luminance * 50 + 128 + shift * 22 for shift in (warm, green, -warm)]
    image = Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(12):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        w, h = rng.uniform(0.03, 0.2, 2) * height
        box = (x, y, x + w, y + h)
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        pen.ellipse(box, fill=color) if rng.random() < 0.5 else pen.rectangle(box, fill=color)
    return image


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    """The picture as a JPEG (4:2:0, as cameras and the web have them)."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def save_encoder(
    folder: str | Path, image_size: int, patch_size: int, hidden_size: int, layers: int
) -> str:
    """A SigLIP vision tower with seeded random weights in `folder`; returns what it is, in words."""
    # transformers loads DeepSpeed, which warns where it must guess
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden_size // 32),
    )
    model = SiglipVisionModel(config)
    model.save_pretrained(folder)
    millions = sum(weight.numel() for weight in model.parameters()) / 1e6
    return f"SigLIP, random weights, {image_size} px, patch {patch_size}, width {hidden_size}, {layers} blocks, {millions:.1f} M"


def save_tokenizer(out: str, encoder: str, image_size: int) -> None:
    """A small SemHiTok with seeded random weights as the artifact `tokenizer` in `out`, for the
    encoder of a folder.
    """
    import torch

    from smalti.schema import PixelStage, Recipe, SemanticStage, TokenizerSection, VitSize
    from smalti.tokenizers.encoders import VisionEncoder
    from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer, SemHiTok
    from smalti.workflows.pipeline.stage import StageRun, run_stage

    def body(run: StageRun) -> dict[str, int]:
        torch.manual_seed(3)
        tiny = VitSize(dim=16, layers=1, heads=2, mlp_ratio=2)
        semantic = SemanticStage(dim=6, decoder_dim=16, decoder_heads=2, decoder_layers=1)
        section = TokenizerSection(
            semantic=semantic, pixel=PixelStage(codes=3, dim=4, encoder=tiny, decoder=tiny)
        )
        vision = VisionEncoder.from_pretrained(encoder)
        meaning = SemanticTokenizer(vision.dim, section.semantic, 10, vision.grid)
        pixel = PixelTokenizer(section.pixel, meaning.codes, image_size, vision.grid)
        SemHiTok(section, pixel, meaning, vision).save_pretrained(run.path)
        return {}

    recipe = Recipe.model_validate({"out": out, "tracking": {"uri": "off"}})
    run_stage(recipe, "tokenizer", "tokenizer", {}, {}, body)
