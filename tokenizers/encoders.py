"""The frozen text-aligned vision encoder: SigLIP and SigLIP 2 towers through transformers.

Axis letters: B batch, N patches (row-major), C hidden width, E embedding width, T texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, SiglipModel, SiglipVisionModel
from transformers.utils import logging as hf_logging

from smalti import storage
from smalti.errors import ArtifactError, ConfigError, DataError

TOWERS = ("siglip", "siglip_vision_model")
"""Supported `model_type`s.

SigLIP 2 at a fixed resolution is published as `siglip`; NaFlex (`siglip2`) has no grid.
"""
RANGE_SLACK = 1e-3


def check_pixels(pixels: Tensor, image_size: int) -> None:
    """Check that `pixels` is a finite float tensor (B, 3, image_size, image_size) in [-1, 1].

    Raises:
        DataError: if it is not.
    """
    wanted = f"a float tensor (B, 3, {image_size}, {image_size}) in [-1, 1]"
    if not isinstance(pixels, Tensor):
        raise DataError(f"Pixels are a {type(pixels).__name__}, expected {wanted}.")
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, image_size, image_size):
        raise DataError(
            f"Pixels have the shape {tuple(pixels.shape)}, expected {wanted}. Resize and crop the images."
        )
    if not pixels.is_floating_point():
        raise DataError(
            f"Pixels are {pixels.dtype}, expected {wanted}. For uint8 use `x.float() / 127.5 - 1`."
        )
    if pixels.numel():
        low, high = pixels.aminmax()
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise DataError(f"Pixels hold NaN or Inf, expected {wanted}.")
        if low < -1 - RANGE_SLACK or high > 1 + RANGE_SLACK:
            raise DataError(
                f"Pixels lie in [{float(low):.4g}, {float(high):.4g}], expected {wanted}."
            )


def batches(pixels: np.ndarray, size: int, device: torch.device | str) -> Iterator[Tensor]:
    """Batches of uint8 images (N, H, W, 3): float32 (B, 3, H, W) in [-1, 1] on `device`.

    Copies to a GPU overlap with its computation.

    Args:
        size: images per batch.
    """
    pinned = torch.device(device).type == "cuda"
    for start in range(0, len(pixels), size):
        block = pixels[start : start + size]
        part = torch.from_numpy(block if block.flags.writeable else block.copy())
        part = (part.pin_memory() if pinned else part).to(device, non_blocking=True)
        yield part.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def on_host(results: Iterable[Tensor]) -> Iterator[Tensor]:
    """Copy results to the CPU, in order.

    Results of a GPU are yielded one late, so that the copy overlaps with the next computation.
    """
    waiting: tuple[Tensor, torch.cuda.Event] | None = None
    for result in results:
        if result.device.type != "cuda":
            yield result.cpu()
            continue
        host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True).copy_(
            result, non_blocking=True
        )
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(result.device))
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = host, copied
    if waiting is not None:
        waiting[1].synchronize()
        yield waiting[0]


def as_set(
    function: Callable[[Tensor], Tensor], device: torch.device, precision: str, compile: bool
) -> Callable[[Tensor], Tensor]:
    """`function`, compiled if `compile`, and under bf16 autocast if `precision` is bf16."""
    call = torch.compile(function) if compile else function

    def run(pixels_BCHW: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return call(pixels_BCHW)

    return run


class VisionEncoder(nn.Module):
    """A frozen SigLIP vision tower that returns float32 patch features.

    Attributes:
        layer: −1 is the output of the last block after the final norm. Otherwise an index into the
            hidden states as
            transformers counts them, without the final norm: 0 is the embeddings, k the output of
                block k.
        bf16: compute patch features under bf16 autocast; they are returned as float32.
    """

    bf16 = False

    def __init__(
        self, tower: SiglipVisionModel, layer: int = -1, source: str | None = None
    ) -> None:
        super().__init__()
        config = tower.config
        self.tower = tower.eval().requires_grad_(False)
        self.image_size = _side(config.image_size, "image_size")
        self.patch_size = _side(config.patch_size, "patch_size")
        self.grid = (self.image_size // self.patch_size,) * 2
        self.dim = int(config.hidden_size)
        self.source = source
        self.num_layers = int(config.num_hidden_layers)
        if not -self.num_layers - 1 <= layer <= self.num_layers:
            raise ConfigError(
                f"encoder.layer={layer}, but the encoder has {self.num_layers} blocks: hidden states 0 to "
                f"{self.num_layers}, or -1 (after the final norm) to {-self.num_layers - 1}."
            )
        self.layer = layer
        self._texts: dict[str, Any] = {}

    @classmethod
    def from_pretrained(cls, path_or_name: str, layer: int = -1) -> VisionEncoder:
        """Load the vision tower of a SigLIP folder or hub name: float32, frozen, eval mode.

        Raises:
            ArtifactError: if there is no SigLIP.
            ConfigError: if `layer` is out of range.
        """
        config = load_config(path_or_name)
        if config.model_type not in TOWERS:
            raise ArtifactError(
                f"{path_or_name} is a {config.model_type!r} model, expected SigLIP or SigLIP 2 at a fixed resolution "
                f"(model_type {' or '.join(TOWERS)}). NaFlex variants have no fixed patch grid: use, for example, "
                "google/siglip2-base-patch16-256."
            )
        return cls(load_model(SiglipVisionModel, path_or_name), layer, path_or_name)

    def train(self, mode: bool = True) -> VisionEncoder:
        """Stay in eval mode: the encoder is frozen."""
        return super().train(False)

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Patch features of images (B, 3, S, S) in [-1, 1]: float32 (B, N, C).

        Gradients reach the pixels only.

        Raises:
            DataError: for images of another size.
        """
        if tuple(pixels_BCHW.shape[1:]) != (3, self.image_size, self.image_size):
            raise DataError(
                f"Pixels have the shape {tuple(pixels_BCHW.shape)}, but this encoder reads (B, 3, {self.image_size}, "
                f"{self.image_size}). Set corpus.image_size={self.image_size}."
            )
        last = self.layer == -1
        depth = self.layer if self.layer >= 0 else self.num_layers + 1 + self.layer
        with (
            torch.autocast(pixels_BCHW.device.type, torch.bfloat16) if self.bf16 else nullcontext()
        ):
            x_BNC = self.tower.embeddings(pixels_BCHW)
            for block in self.tower.encoder.layers[:depth]:
                x_BNC = block(x_BNC, None)
            return (self.tower.post_layernorm(x_BNC) if last else x_BNC).float()

    @torch.no_grad()
    def pooled(self, pixels_BCHW: Tensor) -> Tensor:
        """Attention-pooled image embeddings, as zero-shot uses them: float32 (B, E), not
        normalized.
        """
        pooled = self.tower(pixel_values=pixels_BCHW).pooler_output
        if pooled is None:
            raise ArtifactError(
                f"{self.source} has no pooling head (vision_use_head is false): no image embedding."
            )
        return pooled.float()

    def _text_side(self) -> dict[str, Any]:
        """Text tower, logit scale and bias, and text tokenizer; loaded on first use."""
        if not self._texts:
            if self.source is None or load_config(self.source).model_type != "siglip":
                raise ArtifactError(
                    f"{self.source or 'This encoder'} holds only a vision tower; prompts need the full SigLIP model "
                    "with its text tower and tokenizer."
                )
            model = load_model(SiglipModel, self.source).eval().requires_grad_(False)
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.source)
            except (OSError, ValueError) as error:
                raise ArtifactError(
                    f"{self.source} has no tokenizer beside the model: {error}"
                ) from error
            self._texts = {
                "tower": model.text_model,
                "tokenizer": tokenizer,
                "scale": float(model.logit_scale.exp()),
                "bias": float(model.logit_bias),
            }
        return self._texts

    @torch.no_grad()
    def prompt_embeddings(self, texts: Sequence[str]) -> Tensor:
        """Unit text embeddings on the encoder's device: float32 (T, E).

        Raises:
            ArtifactError: if there is no text tower or tokenizer.
        """
        side = self._text_side()
        tower = side["tower"].to(self.tower.device)
        length = tower.config.max_position_embeddings
        ids = encode_texts(side["tokenizer"], texts, length).to(self.tower.device)
        return F.normalize(tower(input_ids=ids).pooler_output.float(), dim=-1)

    @torch.no_grad()
    def logits(self, pixels_BCHW: Tensor, texts: Sequence[str]) -> Tensor:
        """Sigmoid logits of every image with every text: float32 (B, T)."""
        texts_TE = self.prompt_embeddings(texts)
        images_BE = F.normalize(self.pooled(pixels_BCHW), dim=-1)
        return images_BE @ texts_TE.T * self._texts["scale"] + self._texts["bias"]

    def save_tower(self, path: str | Path) -> None:
        """Write the vision tower as a transformers folder, without the text side."""
        with quiet():
            self.tower.save_pretrained(path)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its report of unused weights."""
    verbosity = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def load_model(kind: type[Any], path_or_name: str) -> Any:
    """Load a transformers model of this class in float32.

    Raises:
        ArtifactError: for missing, damaged or incomplete weights.
    """
    try:
        with quiet():
            model, report = kind.from_pretrained(
                path_or_name, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ArtifactError(
            f"{path_or_name} does not load as {kind.__name__}: {_first_line(error)}."
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ArtifactError(
            f"{path_or_name} lacks {len(missing)} weights of {kind.__name__}, the first is {missing[0]}. Expected a complete "
            "SigLIP checkpoint: copy or train it again."
        )
    return model


def load_config(path_or_name: str) -> Any:
    """The transformers config of a folder or hub name.

    Raises:
        ArtifactError: if there is none.
    """
    try:
        with quiet():
            return AutoConfig.from_pretrained(path_or_name)
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path_or_name} is not a vision encoder that transformers can load ({_first_line(error)}). Expected a "
            "directory with config.json and weights, or a hub name such as google/siglip-base-patch16-256."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0].rstrip(".")


def encode_texts(tokenizer: Any, texts: Sequence[str], length: int) -> Tensor:
    """Token ids padded to SigLIP's full length: int64 (T, length).

    SigLIP pools the last position, so that padding is required.
    """
    if tokenizer.pad_token_id is None:
        raise ArtifactError(
            "The text tokenizer beside the encoder has no padding token, which SigLIP needs."
        )
    coded = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    return coded["input_ids"]


def _side(value: Any, what: str) -> int:
    sides = {int(v) for v in value} if isinstance(value, (list, tuple)) else {int(value)}
    if len(sides) != 1:
        raise ArtifactError(
            f"the encoder's {what} is {value}; only square images and patches are supported."
        )
    return sides.pop()


def open_encoder(path_or_name: str, layer: int) -> VisionEncoder:
    """The frozen vision encoder of a local folder, a URL or a hub name.

    A URL is copied first. The text side, if any, is then loaded at once, because the copy is
    removed.
    """
    if storage.is_local(path_or_name):
        return VisionEncoder.from_pretrained(storage.local_path(path_or_name), layer)
    with storage.local_copy(path_or_name) as folder:
        encoder = VisionEncoder.from_pretrained(folder, layer)
        with suppress(ArtifactError):
            encoder.prompt_embeddings(["a"])
        return encoder
