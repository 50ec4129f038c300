"""SemHiTok's tokenizer in its phases, semantic → pixel → decoder, each an artifact of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smalti import storage
from smalti.artifact import Artifact
from smalti.schema import Recipe
from smalti.tokenizers.codebook import CENTROIDS
from smalti.tokenizers.encoders import open_encoder
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.encoder import result_settings
from smalti.workflows.pipeline.stage import StageRun
from smalti.workflows.systems.phases import Phases, check_loss, placed, refuse_foreign
from smalti.workflows.train.elastic import check_batch


def parents(recipe: Recipe) -> tuple[str, ...]:
    """Without guidance the corpus alone, and the encoder for the patch grid (and a perceptual loss)."""
    return ("corpus", "encoder", "codebook") if recipe.tokenizer.guidance else ("corpus", "encoder")


def check(recipe: Recipe) -> None:
    """ConfigError: batches that workers cannot share, losses that cannot be computed. ArtifactError: weights that are
    not there."""
    section = recipe.tokenizer
    refuse_foreign(recipe, tokenizer=("guidance", "encoder_precision", "semantic", "pixel", "decoder"))
    phases: dict[str, Any] = {"pixel": section.pixel}
    phases |= {"semantic": section.semantic} if section.guidance else {}
    phases |= {"decoder": section.decoder} if section.decoder else {}
    for name, phase in phases.items():
        adaptive = name != "semantic" and phase.loss.gan.adaptive and phase.loss.gan.weight
        together = "the adaptive weight of loss.gan" if adaptive else ""
        check_batch(f"tokenizer.{name}", phase.train, recipe.resources, together=together)
        if name != "semantic":
            check_loss(f"tokenizer.{name}", phase, recipe.corpus.image_size)


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


def body(parents: Mapping[str, Artifact]) -> Any:
    def make(run: StageRun) -> dict[str, int]:
        phases = SemHiTokPhases(run, parents)
        with ensure_ray(run.recipe):
            semantic = phases.semantic() if run.recipe.tokenizer.guidance else None
            pixel = phases.pixel(semantic)
            decoder = phases.decoder(semantic, pixel) if run.recipe.tokenizer.decoder is not None else None
        return phases.assemble(semantic, pixel, decoder)

    return make


class SemHiTokPhases(Phases):
    """The phases of one SemHiTok; each returns its artifact, found or made."""

    def __init__(self, run: StageRun, parents: Mapping[str, Artifact]) -> None:
        super().__init__(run, parents)
        # with codebook.duplicates=drop it may hold fewer codes than the recipe asks for
        guided = parents.get("codebook")
        self.semantic_codes = self.recipe.codebook.size if guided is None else guided.counts["codes"]
        self.num_codes = self.semantic_codes * self.section.pixel.codes

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
        task = "smalti.workflows.train.tasks.semantic:SemanticTask"
        return self._sized("semantic", task, settings, stage, self.parents)

    def pixel(self, semantic: Artifact | None) -> Artifact:
        """Stage P: pixel encoder, codebooks and decoder."""
        stage = self.section.pixel
        settings = self._pixel_settings(semantic, stage.loss)
        parents = {"corpus": self.parents["corpus"], "encoder": self.parents["encoder"]}
        parents |= {} if semantic is None else {"semantic": semantic}
        return self._sized("pixel", "smalti.workflows.train.tasks.pixel:PixelTask", settings, stage, parents)

    def decoder(self, semantic: Artifact | None, pixel: Artifact) -> Artifact:
        """Stage D: a larger decoder, all else frozen."""
        stage = self.section.decoder
        assert stage is not None
        settings = self._pixel_settings(semantic, stage.loss)
        settings |= {"decoder": stage.decoder, "start": storage.join(pixel.path, "pixel.safetensors")}
        parents = {"corpus": self.parents["corpus"], "encoder": self.parents["encoder"], "pixel": pixel}
        return self._sized("decoder", "smalti.workflows.train.tasks.pixel:PixelTask", settings, stage, parents)

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

    def _sized(
        self, name: str, task: str, settings: dict[str, Any], stage: Any, parents: Mapping[str, Artifact]
    ) -> Artifact:
        more: dict[str, Any] = {"size": self.recipe.codebook.size}
        if name == "decoder":
            more["pixel"] = self.section.pixel.model_dump(mode="json", exclude={"train", "loss"})
        return self.phase(name, task, settings, stage, parents, more)

    def assemble(self, semantic: Artifact | None, pixel: Artifact, decoder: Artifact | None) -> dict[str, int]:
        """Put the phases together as one SemHiTok and write it at the root of the artifact."""
        from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer, SemHiTok
        from smalti.workflows.train.tasks.semantic import read_tensors

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
