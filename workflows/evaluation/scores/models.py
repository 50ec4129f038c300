"""The models of an evaluation, each loaded on first use.

B images, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from smalti.workflows.evaluation.scores.heldout import HeldOut
from smalti.workflows.evaluation.scores.judge import Judge, train_judge
from smalti.workflows.evaluation.scores.pixels import to_model

if TYPE_CHECKING:
    from smalti.mllm.inference import VisualModel
    from smalti.tokenizers.encoders import VisionEncoder

JUDGE_IMAGES = 20_000
JUDGE_SIZE = 64


class Models:
    """Lazily loaded models on the job's device."""

    def __init__(self, data: HeldOut) -> None:
        self.data = data
        self.job = data.job

    @cached_property
    def tokenizer(self) -> Any:
        """The trained visual tokenizer."""
        from smalti.tokenizers.loading import load_tokenizer

        return load_tokenizer(self.job.tokenizer).to(self.job.device).eval()

    @property
    def code_embedder(self) -> Callable[[Tensor], Tensor] | None:
        """Function from codes to image embeddings (B, E), if the tokenizer has one.

        DualToken has: through its semantic codes.
        """
        return getattr(self.tokenizer, "pooled", None)

    @cached_property
    def encoder(self) -> VisionEncoder:
        """The frozen encoder with its text tower, where it has one."""
        from smalti.tokenizers.encoders import open_encoder

        return open_encoder(self.job.encoder, self.job.encoder_layer).to(self.job.device)

    @cached_property
    def language(self) -> VisualModel:
        """The exported language model."""
        from smalti.mllm.inference import VisualModel

        if self.job.export is None:
            raise ValueError("no exported model in this job")
        return VisualModel.from_pretrained(self.job.export, device=self.job.device)

    @cached_property
    def judge(self) -> Judge:
        """A classifier of the corpus's labels, trained here on real training images."""
        size = min(JUDGE_SIZE, self.job.image_size)
        pixels, labels = self.data.labelled_training_pixels(JUDGE_IMAGES, size)
        return train_judge(pixels, labels, seed=self.job.seed, device=self.job.device)

    @property
    def no_decoder(self) -> str | None:
        """Why codes cannot be decoded to pixels; None if they can."""
        return None if getattr(self.tokenizer, "has_decoder", True) else self.tokenizer.no_decoder

    @property
    def cannot_draw(self) -> str | None:
        """Why codes cannot become pictures; None if they can.

        They can if the tokenizer has a decoder, or the export a diffusion decoder.
        """
        return self.no_decoder and self.language.cannot_draw

    def decode(self, codes_BT: Tensor) -> Tensor:
        """Pixels of codes: float (B, 3, S, S) in [-1, 1].

        By the tokenizer, or else by the export's diffusion decoder.
        """
        if self.no_decoder is None:
            return self.tokenizer.decode(codes_BT)
        return to_model(
            np.stack(
                [np.asarray(picture.convert("RGB")) for picture in self.language.decode(codes_BT)]
            )
        )

    def to_codes(self, codes: object) -> Tensor:
        """int32 rows (B, T, …) as int64 on the device."""
        return torch.as_tensor(codes, dtype=torch.int64, device=self.job.device)
