"""Stage `tokenizer`: SemHiTok in its phases, semantic → pixel → decoder, each an artifact of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smalti import storage
from smalti.artifact import Artifact
from smalti.errors import ArtifactError, ConfigError
from smalti.schema import Loss, Recipe
from smalti.tracking import Tracker
from smalti.workflows.encoder import check_batch, encoder_path, result_settings
from smalti.workflows.features import open_encoder
from smalti.workflows.ray_session import ensure_ray
from smalti.workflows.stage import StageRun, find_artifact, run_stage

PHASES = "tokenizer/phases"
CENTROIDS = "centroids.safetensors"


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The tokenizer artifact: a `save_pretrained` folder, its phases under `phases/`.

    Parents: corpus, encoder, codebook; without guidance the corpus alone, and the encoder for the patch grid (and a
    perceptual loss). Counts: num_codes, tokens an image.
    """
    check(recipe)
    names = ("corpus", "encoder", "codebook") if recipe.tokenizer.guidance else ("corpus", "encoder")
    parents = {name: find_artifact(recipe, name) for name in names}
    config = settings_of(recipe)
    return run_stage(recipe, "tokenizer", "tokenizer", config, parents, _body(parents), tracker=tracker)


def check(recipe: Recipe) -> None:
    """Raises for what would only show after hours: batches that workers cannot share, losses that cannot be computed.

    ConfigError names the key; ArtifactError: weights that are not there.
    """
    section = recipe.tokenizer
    phases: dict[str, Any] = {"pixel": section.pixel}
    phases |= {"semantic": section.semantic} if section.guidance else {}
    phases |= {"decoder": section.decoder} if section.decoder else {}
    for name, phase in phases.items():
        adaptive = name != "semantic" and phase.loss.gan.adaptive and phase.loss.gan.weight
        together = "the adaptive weight of loss.gan" if adaptive else ""
        check_batch(f"tokenizer.{name}", phase.train, recipe, together=together)
        if name != "semantic":
            _check_loss(f"tokenizer.{name}", phase, recipe.corpus.image_size)


def _check_loss(key: str, phase: Any, image_size: int) -> None:
    from smalti.tokenizers.lpips import MIN_SIZE
    from smalti.tokenizers.patchgan import smallest_image

    perceptual, gan = phase.loss.perceptual, phase.loss.gan
    if perceptual.kind == "lpips" and perceptual.weight:
        where = f"{key}.loss.perceptual.weights"
        if not perceptual.weights:
            raise ConfigError(f"{key}.loss.perceptual.kind=lpips needs {where}, a file made by lpips.convert.")
        if not storage.exists(perceptual.weights):
            raise ArtifactError(
                f"{where}={perceptual.weights} does not exist. `make setup` fetches LPIPS-VGG16 weights into .data/, which "
                "a Ray job does not carry along: on a cluster set a URL or a path that all machines see."
            )
        if image_size < MIN_SIZE:
            raise ConfigError(
                f"{key}.loss.perceptual.kind=lpips needs images of at least {MIN_SIZE} px, but corpus.image_size={image_size}."
            )
    if gan.weight and image_size < smallest_image(gan.layers):
        raise ConfigError(
            f"{key}.loss.gan.layers={gan.layers} needs images of at least {smallest_image(gan.layers)} px, but "
            f"corpus.image_size={image_size}. Set fewer layers."
        )
    if gan.weight and gan.adaptive and phase.train.zero_stage == 3:
        raise ConfigError(
            f"{key}.loss.gan.adaptive reads the decoder's last weight whole: set {key}.train.zero_stage below 3."
        )


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What the tokenizer depends on, of the recipe."""
    section = recipe.tokenizer.model_dump(mode="json")
    for phase in ("semantic", "pixel", "decoder"):
        if section[phase] is not None:
            section[phase]["train"] = result_settings(section[phase]["train"])
    if not recipe.tokenizer.guidance:
        section.pop("semantic")
    if recipe.tokenizer.encoder_precision == "auto":
        section.pop("encoder_precision")
    size = {"size": recipe.codebook.size, "layer": recipe.encoder.layer, "image_size": recipe.corpus.image_size}
    return {"tokenizer": section, "system": recipe.system, "seed": recipe.seed} | size


def _body(parents: Mapping[str, Artifact]) -> Any:
    def body(run: StageRun) -> dict[str, int]:
        phases = Phases(run, parents)
        with ensure_ray(run.recipe):
            semantic = phases.semantic() if run.recipe.tokenizer.guidance else None
            pixel = phases.pixel(semantic)
            decoder = phases.decoder(semantic, pixel) if run.recipe.tokenizer.decoder is not None else None
        return phases.assemble(semantic, pixel, decoder)

    return body


def placed(loss: Loss) -> Loss:
    """The loss as workers can use it: they stand in other folders, so local LPIPS weights go by their absolute path."""
    perceptual = loss.perceptual
    if not perceptual.weights:
        return loss
    found = perceptual.model_copy(update={"weights": storage.absolute(perceptual.weights)})
    return loss.model_copy(update={"perceptual": found})


class Phases:
    """The phases of one tokenizer; each returns its artifact, found or made."""

    def __init__(self, run: StageRun, parents: Mapping[str, Artifact]) -> None:
        from smalti.workflows.train.data import shard_index

        self.run, self.recipe, self.parents = run, run.recipe, dict(parents)
        self.section = run.recipe.tokenizer
        self.encoder = encoder_path(parents["encoder"])
        encoder = open_encoder(self.encoder, self.recipe.encoder.layer)
        if encoder.image_size != self.recipe.corpus.image_size:
            raise ConfigError(
                f"corpus.image_size={self.recipe.corpus.image_size}, but the encoder {self.encoder} reads "
                f"{encoder.image_size} px. Set corpus.image_size={encoder.image_size}."
            )
        self.grid, self.dim = encoder.grid, encoder.dim
        self.keys, self.sizes = shard_index(parents["corpus"].path, "train")
        # with codebook.duplicates=drop it may hold fewer codes than the recipe asks for
        guided = parents.get("codebook")
        self.semantic_codes = self.recipe.codebook.size if guided is None else guided.counts["codes"]
        self.num_codes = self.semantic_codes * self.section.pixel.codes

    def images(self, needs_encoder: bool) -> dict[str, Any]:
        """Settings that every phase's task shares."""
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

    def semantic(self) -> Artifact:
        """Stage S: the semantic codebook."""
        stage = self.section.semantic
        settings = {
            "stage": stage,
            "num_codes": self.semantic_codes,
            "grid": self.grid,
            "dim": self.dim,
            "centroids": storage.join(self.parents["codebook"].path, CENTROIDS),
        } | self.images(needs_encoder=True)
        task = "smalti.workflows.train.tasks_semantic:SemanticTask"
        return self._phase("semantic", task, settings, stage, self.parents)

    def pixel(self, semantic: Artifact | None) -> Artifact:
        """Stage P: pixel encoder, codebooks and decoder."""
        stage = self.section.pixel
        settings = self._pixel_settings(semantic, stage.loss)
        parents = {"corpus": self.parents["corpus"], "encoder": self.parents["encoder"]}
        parents |= {} if semantic is None else {"semantic": semantic}
        return self._phase("pixel", "smalti.workflows.train.tasks_pixel:PixelTask", settings, stage, parents)

    def decoder(self, semantic: Artifact | None, pixel: Artifact) -> Artifact:
        """Stage D: a larger decoder, all else frozen."""
        stage = self.section.decoder
        assert stage is not None
        settings = self._pixel_settings(semantic, stage.loss)
        settings |= {"decoder": stage.decoder, "start": storage.join(pixel.path, "pixel.safetensors")}
        parents = {"corpus": self.parents["corpus"], "encoder": self.parents["encoder"], "pixel": pixel}
        return self._phase("decoder", "smalti.workflows.train.tasks_pixel:PixelTask", settings, stage, parents)

    def _pixel_settings(self, semantic: Artifact | None, loss: Any) -> dict[str, Any]:
        needs_encoder = semantic is not None or loss.perceptual.kind == "encoder"
        given = None
        if semantic is not None:
            weights = storage.join(semantic.path, "semantic.safetensors")
            given = (self.section.semantic, self.semantic_codes, self.dim, weights)
        own = {
            "stage": self.section.pixel,
            "loss": placed(loss),
            "grid": self.grid,
            "num_codes": self.num_codes,
            "semantic": given,
        }
        return own | self.images(needs_encoder)

    def _phase(
        self, name: str, task: str, settings: dict[str, Any], stage: Any, parents: Mapping[str, Artifact]
    ) -> Artifact:
        """Train one phase as a stage of its own under `tokenizer/phases/<name>`."""
        from smalti.workflows.train.launch import fit

        def body(run: StageRun) -> dict[str, int]:
            run.scores |= fit(task, settings, stage.train, run, seed=self.recipe.seed)
            return {"steps": stage.train.steps, "images": sum(self.sizes)}

        config = stage.model_dump(mode="json")
        config["train"] = result_settings(config["train"])
        config |= {"seed": self.recipe.seed, "size": self.recipe.codebook.size, "layer": self.recipe.encoder.layer}
        if name == "decoder":
            config["pixel"] = self.section.pixel.model_dump(mode="json", exclude={"train", "loss"})
        config["image_size"] = self.recipe.corpus.image_size
        if self.section.encoder_precision != "auto":
            config["encoder_precision"] = self.section.encoder_precision
        return run_stage(self.recipe, f"{PHASES}/{name}", name, config, parents, body, tracker=self.run.tracker)

    def assemble(self, semantic: Artifact | None, pixel: Artifact, decoder: Artifact | None) -> dict[str, int]:
        """Put the phases together as one SemHiTok and write it at the root of the artifact."""
        from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer, SemHiTok
        from smalti.workflows.train.tasks_semantic import read_tensors

        encoder = None if semantic is None else open_encoder(self.encoder, self.recipe.encoder.layer)
        codes = model = None
        if semantic is not None:
            model = SemanticTokenizer(self.dim, self.section.semantic, self.semantic_codes, self.grid)
            model.load_state_dict(read_tensors(storage.join(semantic.path, "semantic.safetensors")))
            codes = model.codes
        size = None if self.section.decoder is None else self.section.decoder.decoder
        pixels = PixelTokenizer(
            self.section.pixel, codes, self.recipe.corpus.image_size, self.grid, self.num_codes, decoder_size=size
        )
        last = pixel if decoder is None else decoder
        pixels.load_state_dict(read_tensors(storage.join(last.path, "pixel.safetensors")))
        whole = SemHiTok(self.section, pixels, model, encoder)
        whole.save_pretrained(self.run.path)
        return {"num_codes": whole.num_codes, "tokens": whole.num_tokens}
