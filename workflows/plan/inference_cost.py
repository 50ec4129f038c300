"""Cost of the stages that run models over every image once, and train nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from smalti.schema import FeaturesSection, TokensSection
from smalti.workflows.plan.base import Rates, size_text
from smalti.workflows.plan.trace import Autocast, Backward, Step, trace
from smalti.workflows.plan.training import HELD_BACK


class InferenceCost(NamedTuple):
    """Cost of an image, and of a batch.

    Attributes:
        flops: per image, by precision.
        batch: images per batch.
        weights: bytes of the models on the device.
        first: bytes of a batch of one image.
        further: bytes of each further image.
    """

    flops: dict[str, float]
    batch: int
    weights: float
    first: float
    further: float

    @classmethod
    def of(
        cls,
        section: FeaturesSection | TokensSection,
        modules: nn.Module,
        parts: Sequence[Callable[[Tensor], object]],
        kept: Sequence[nn.Module],
        size: int,
    ) -> InferenceCost:
        """Trace functions of images, in the section's precision.

        Args:
            section: the stage's section of the recipe.
            modules: all modules that the functions use, on the meta device.
            parts: functions of images, called one after the other.
            kept: modules that are on the device.
            size: side of the images.
        """

        def step(num: int) -> Step:
            def run(backward: Backward, autocast: Autocast) -> None:
                with torch.no_grad(), autocast():
                    for part in parts:
                        part(torch.empty(num, 3, size, size))

            return run

        one, two = (trace(modules, step(num), bf16=section.precision == "bf16") for num in (1, 2))
        numbers = {
            id(t): t.numel() for module in kept for t in (*module.parameters(), *module.buffers())
        }
        return cls(
            one.flops,
            section.batch_size,
            4.0 * sum(numbers.values()),
            one.peak,
            two.peak - one.peak,
        )

    @property
    def memory(self) -> float:
        """Bytes on a device."""
        return self.weights + self.first + self.further * (self.batch - 1)

    def refusal(self, stage: str, rates: Rates) -> str | None:
        """Why a batch does not fit on a GPU, and the largest that does.

        None: it fits, or there is no GPU.
        """
        room = rates.memory * (1 - HELD_BACK)
        if not rates.peaks or self.memory <= room:
            return None
        most = int((room - self.weights - self.first) / self.further) + 1
        fix = f"Set {stage}.batch_size={most}." if most > 0 else "Not one image fits."
        return (
            f"{stage} needs {size_text(self.memory)} on each {rates.device} for {self.batch} images, "
            f"of {size_text(rates.memory)} ({size_text(room)} to plan with). {fix}"
        )
