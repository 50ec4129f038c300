"""The phases of a tokenizer: their encoder, their images, and a stage each."""

from __future__ import annotations

from collections.abc import Mapping

from smalti import storage
from smalti.artifact import Artifact
from smalti.errors import ArtifactError, ConfigError
from smalti.schema import (
    DecoderStage,
    DualStage,
    Loss,
    PixelStage,
    Recipe,
    SemanticStage,
    result_settings,
)
from smalti.tokenizers.encoders import open_encoder
from smalti.workflows.encoder import encoder_path
from smalti.workflows.pipeline.stage import StageRun, run_stage
from smalti.workflows.train.elastic import check_batch
from smalti.workflows.train.task import Task

PHASES = "tokenizer/phases"
Phase = SemanticStage | PixelStage | DecoderStage | DualStage


def check_loss(key: str, phase: PixelStage | DecoderStage | DualStage, image_size: int) -> None:
    """Check that LPIPS and the GAN can work on images of this size.

    Args:
        key: the phase's section, for errors.

    Raises:
        ConfigError: if they cannot.
        ArtifactError: if the LPIPS weights are missing.
    """
    from smalti.tokenizers.lpips import MIN_SIZE
    from smalti.tokenizers.patchgan import smallest_image

    perceptual = phase.loss.perceptual
    gan = phase.loss.gan
    if perceptual.kind == "lpips" and perceptual.weight:
        where = f"{key}.loss.perceptual.weights"
        if not perceptual.weights:
            raise ConfigError(
                f"{key}.loss.perceptual.kind=lpips needs {where}, a file made by lpips.convert."
            )
        if not storage.exists(perceptual.weights):
            raise ArtifactError(
                f"{where}={perceptual.weights} does not exist. `make setup` fetches LPIPS-VGG16 "
                "weights into .data/, which a Ray job does not include: on a cluster set a "
                "URL or a path that all machines see."
            )
        if image_size < MIN_SIZE:
            raise ConfigError(
                f"{key}.loss.perceptual.kind=lpips needs images of at least {MIN_SIZE} px, but "
                f"corpus.image_size={image_size}."
            )
    if gan.weight and image_size < smallest_image(gan.layers):
        raise ConfigError(
            f"{key}.loss.gan.layers={gan.layers} needs images of at least "
            f"{smallest_image(gan.layers)} px, but corpus.image_size={image_size}. Set fewer "
            "layers."
        )
    if gan.weight and gan.adaptive and phase.train.zero_stage == 3:
        raise ConfigError(
            f"{key}.loss.gan.adaptive reads the decoder's whole last weight: set "
            f"{key}.train.zero_stage below 3."
        )


def check_pixel_phase(
    key: str, phase: PixelStage | DecoderStage | DualStage, recipe: Recipe
) -> None:
    """Check batch and losses of a phase that reconstructs pixels.

    Args:
        key: the phase's section, for errors.
    """
    gan = phase.loss.gan
    together = "the adaptive weight of loss.gan" if gan.adaptive and gan.weight else ""
    check_batch(key, phase.train, recipe.resources, together=together)
    check_loss(key, phase, recipe.corpus.image_size)


def placed(loss: Loss) -> Loss:
    """The loss with the absolute path of local LPIPS weights.

    Workers run in other folders.
    """
    perceptual = loss.perceptual
    if not perceptual.weights:
        return loss
    found = perceptual.model_copy(update={"weights": storage.absolute(perceptual.weights)})
    return loss.model_copy(update={"perceptual": found})


class Phases:
    """The phases of one tokenizer.

    Attributes:
        grid, dim: patches and width of the encoder.
        keys, sizes: training shards and their rows.
    """

    def __init__(self, run: StageRun, parents: Mapping[str, Artifact]) -> None:
        from smalti.workflows.train.data import shard_index

        self.run = run
        self.recipe = run.recipe
        self.parents = dict(parents)
        self.section = run.recipe.tokenizer
        self.encoder = encoder_path(parents["encoder"])
        encoder = open_encoder(self.encoder, self.recipe.encoder.layer)
        if encoder.image_size != self.recipe.corpus.image_size:
            raise ConfigError(
                f"corpus.image_size={self.recipe.corpus.image_size}, but the encoder "
                f"{self.encoder} reads {encoder.image_size} px. Set "
                f"corpus.image_size={encoder.image_size}."
            )
        self.grid = encoder.grid
        self.dim = encoder.dim
        self.keys, self.sizes = shard_index(parents["corpus"].path, "train")

    def images(self, needs_encoder: bool) -> dict[str, object]:
        """Settings that the tasks of all phases share."""
        return {
            "corpus": self.parents["corpus"].path,
            "keys": self.keys,
            "sizes": self.sizes,
            "image_size": self.recipe.corpus.image_size,
            "max_pixels": self.recipe.corpus.max_pixels,
            "encoder": self.encoder if needs_encoder else None,
            "layer": self.recipe.encoder.layer,
            "encoder_precision": self.section.encoder_precision,
        }

    def phase(
        self,
        name: str,
        task: type[Task],
        settings: dict[str, object],
        stage: Phase,
        parents: Mapping[str, Artifact],
        more: Mapping[str, object],
    ) -> Artifact:
        """Train one phase as the stage `tokenizer/phases/<name>`, or find it finished.

        Args:
            settings: of the task.
            stage: the phase's section.
            more: what the result depends on beside section, parents, seed, layer and image size.
        """
        from smalti.workflows.train.launch import fit

        def body(run: StageRun) -> dict[str, int]:
            run.scores |= fit(task, settings, stage.train, run, seed=self.recipe.seed)
            return {"steps": stage.train.steps, "images": sum(self.sizes)}

        config = result_settings(stage)
        config |= {"seed": self.recipe.seed, "layer": self.recipe.encoder.layer}
        config |= {"image_size": self.recipe.corpus.image_size, **more}
        if self.section.encoder_precision != "auto":
            config["encoder_precision"] = self.section.encoder_precision
        return run_stage(
            self.recipe, f"{PHASES}/{name}", name, config, parents, body, tracker=self.run.tracker
        )
