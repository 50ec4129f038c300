"""The interface of a system; `registry.SYSTEMS` holds one object of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import ClassVar

from smalti.artifact import Artifact
from smalti.errors import ConfigError
from smalti.schema import DepthHeads, Recipe, TokenizerSection
from smalti.tokenizers.encoders import VisionEncoder
from smalti.workflows.pipeline.stage import StageRun
from smalti.workflows.plan.image_tasks import bridge_model, encoder_model
from smalti.workflows.plan.inference_cost import InferenceCost
from smalti.workflows.plan.language_tasks import language_model
from smalti.workflows.plan.models import Model, encoder_of


class System(ABC):
    """A way from images to codes.

    Everything that depends on the system is a method here; no other code asks which system it is.

    Attributes:
        name: `system` in a recipe.
        reads: keys of the section `tokenizer` that it reads; a recipe that sets another is refused.
        ignores: sections of a recipe that it does not read.
        smoke_layers: blocks of the tiny encoder of `--smoke`; None is the default of
            `workflows/smoke.py`.
        bridges: whether its language model has trained codes of its own, which a diffusion decoder
            can draw from.
        unmeasured: measures that do not apply to its tokenizers, with the reason.
    """

    name: ClassVar[str]
    reads: ClassVar[Sequence[str]]
    ignores: ClassVar[Sequence[str]] = ()
    smoke_layers: ClassVar[int | None] = None
    bridges: ClassVar[bool] = False
    unmeasured: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def parents(self, recipe: Recipe) -> tuple[str, ...]:
        """Stages whose artifacts the tokenizer is built from."""

    @abstractmethod
    def settings(self, recipe: Recipe) -> dict[str, object]:
        """The settings of the tokenizer's fingerprint, as JSON."""

    @abstractmethod
    def build(self, run: StageRun, parents: Mapping[str, Artifact]) -> Mapping[str, int]:
        """Write the tokenizer to `run.path`.

        Returns:
            The counts `num_codes` and `tokens` (per image).
        """

    @abstractmethod
    def smoke(self, recipe: Recipe) -> dict[str, object]:
        """Overrides, by dotted key, that shrink the tokenizer to seconds."""

    @abstractmethod
    def code_vectors(self, recipe: Recipe, encoder: VisionEncoder) -> tuple[int, tuple[int, ...]]:
        """Size of the visual vocabulary, and the widths of a code's vector.

        A vector may have several parts, such as a semantic and a pixel part.
        """

    @abstractmethod
    def tokenizer_models(self, recipe: Recipe, *, gpu: bool) -> Iterator[Model]:
        """The models of the stage `tokenizer`, in order, on the meta device."""

    @abstractmethod
    def inference_costs(
        self, recipe: Recipe, encoder: VisionEncoder, trained: Mapping[str, Model]
    ) -> dict[str, InferenceCost]:
        """Cost per image of the stages `features` (if any) and `tokens`.

        Args:
            trained: the planned models by name.
        """

    def check(self, recipe: Recipe) -> None:
        """Check the recipe alone, before the first stage.

        Raises:
            ConfigError: for keys that this system does not read, or settings that cannot work.
            ArtifactError: for weights that are missing.
        """
        self.refuse_foreign(recipe)
        if self.codes_per_token(recipe) == 1 and recipe.mllm.depth_heads != DepthHeads():
            raise ConfigError(
                f"The recipe sets mllm.depth_heads, which system: {self.name} does not read: its "
                "visual tokens have one code each. Remove it."
            )

    def codes_per_token(self, recipe: Recipe) -> int:
        """Number of codes per visual token."""
        return 1

    def language_model(self, recipe: Recipe, encoder: VisionEncoder) -> Model:
        """The planned language model."""
        return language_model(recipe.mllm, *self.code_vectors(recipe, encoder))

    def planned_models(self, recipe: Recipe, *, gpu: bool = False) -> Iterator[Model]:
        """Every model that the recipe trains, in order, on the meta device.

        Args:
            gpu: whether they train on GPUs.

        Raises:
            ConfigError: for an encoder or language model whose sizes are unknown.
        """
        encoder, _ = encoder_of(recipe)
        if recipe.encoder.train is not None:
            yield encoder_model(recipe)
        yield from self.tokenizer_models(recipe, gpu=gpu)
        if recipe.mllm.pretrained or recipe.mllm.config:
            yield self.language_model(recipe, encoder)
        if recipe.bridge:
            yield bridge_model(recipe, encoder)

    def refuse_foreign(self, recipe: Recipe) -> None:
        """Refuse keys that are set and that this system does not read.

        Raises:
            ConfigError: naming the key.
        """
        plain = Recipe()
        unread = [
            f"tokenizer.{name}" for name in TokenizerSection.model_fields if name not in self.reads
        ]
        for key in [*unread, *self.ignores]:
            if attrgetter(key)(recipe) != attrgetter(key)(plain):
                read = ", ".join(f"tokenizer.{name}" for name in self.reads) or "nothing"
                raise ConfigError(
                    f"The recipe sets {key}, which system: {self.name} does not read; of the "
                    f"tokenizer it reads {read}. Remove {key}, or set the system that it belongs "
                    "to."
                )
