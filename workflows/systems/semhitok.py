"""SemHiTok's tokenizer, trained in the phases semantic, pixel and decoder.

Each phase has an artifact of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from smalti import storage
from smalti.artifact import Artifact
from smalti.schema import DecoderStage, Loss, PixelStage, Recipe, result_settings
from smalti.tokenizers.codebook import CENTROIDS
from smalti.tokenizers.encoders import VisionEncoder, open_encoder
from smalti.tokenizers.semhitok import PixelTokenizer, SemanticTokenizer, SemHiTok
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.pipeline.stage import StageRun
from smalti.workflows.plan.image_tasks import pixel_model, semantic_model
from smalti.workflows.plan.inference_cost import InferenceCost
from smalti.workflows.plan.models import Model
from smalti.workflows.systems import smoke_sizes
from smalti.workflows.systems.base import System
from smalti.workflows.systems.phases import Phase, Phases, check_pixel_phase, placed
from smalti.workflows.train.elastic import check_batch
from smalti.workflows.train.task import Task
from smalti.workflows.train.tasks.pixel import PixelTask
from smalti.workflows.train.tasks.semantic import SemanticTask, read_tensors


class SemHiTokSystem(System):
    """SemHiTok: a semantic codebook and pixel sub-codebooks, trained in up to three phases."""

    name = "semhitok"
    reads = ("guidance", "encoder_precision", "semantic", "pixel", "decoder")

    def parents(self, recipe: Recipe) -> tuple[str, ...]:
        """The corpus and the encoder, and with guidance the codebook.

        Without guidance only the encoder's grid is used.
        """
        return (
            ("corpus", "encoder", "codebook")
            if recipe.tokenizer.guidance
            else ("corpus", "encoder")
        )

    def check(self, recipe: Recipe) -> None:
        """Also check the batches of workers and the losses."""
        super().check(recipe)
        section = recipe.tokenizer
        trained: dict[str, PixelStage | DecoderStage] = {"pixel": section.pixel}
        if section.decoder:
            trained["decoder"] = section.decoder
        for name, phase in trained.items():
            check_pixel_phase(f"tokenizer.{name}", phase, recipe)
        if section.guidance:
            check_batch("tokenizer.semantic", section.semantic.train, recipe.resources)

    def settings(self, recipe: Recipe) -> dict[str, object]:
        """The section `tokenizer`, seed, codebook size, layer and image size."""
        section = result_settings(
            recipe.tokenizer, () if recipe.tokenizer.guidance else ("semantic",)
        )
        size = {
            "size": recipe.codebook.size,
            "layer": recipe.encoder.layer,
            "image_size": recipe.corpus.image_size,
        }
        return {"tokenizer": section, "system": recipe.system, "seed": recipe.seed} | size

    def build(self, run: StageRun, parents: Mapping[str, Artifact]) -> Mapping[str, int]:
        """Train the phases and write the SemHiTok."""
        phases = SemHiTokPhases(run, parents)
        with ensure_ray(run.recipe):
            semantic = phases.semantic() if run.recipe.tokenizer.guidance else None
            pixel = phases.pixel(semantic)
            decoder = (
                phases.decoder(semantic, pixel)
                if run.recipe.tokenizer.decoder is not None
                else None
            )
        return phases.assemble(semantic, pixel, decoder)

    def smoke(self, recipe: Recipe) -> dict[str, object]:
        """Tiny codebooks and vision transformers, few steps."""
        tokenizer = recipe.tokenizer
        values: dict[str, object] = {
            "tokenizer.semantic.dim": 8,
            "tokenizer.semantic.decoder_dim": 16,
            "tokenizer.semantic.decoder_heads": 2,
            "tokenizer.pixel.codes": min(tokenizer.pixel.codes, 4),
            "tokenizer.pixel.dim": 4,
            "tokenizer.pixel.init_steps": min(tokenizer.pixel.init_steps, 1),
        }
        for part in ("encoder", "decoder"):
            values |= smoke_sizes.vit(f"tokenizer.pixel.{part}")
        values |= smoke_sizes.train("tokenizer.semantic.train", tokenizer.semantic.train)
        values |= smoke_sizes.train("tokenizer.pixel.train", tokenizer.pixel.train)
        values |= smoke_sizes.loss("tokenizer.pixel.loss", tokenizer.pixel.loss)
        if tokenizer.decoder:
            values |= smoke_sizes.vit("tokenizer.decoder.decoder")
            values |= smoke_sizes.train("tokenizer.decoder.train", tokenizer.decoder.train)
            values |= smoke_sizes.loss("tokenizer.decoder.loss", tokenizer.decoder.loss)
        return values

    def code_vectors(self, recipe: Recipe, encoder: VisionEncoder) -> tuple[int, tuple[int, ...]]:
        """K·m codes of a semantic and a pixel part.

        Without guidance, the pixel part alone.
        """
        tokenizer = recipe.tokenizer
        semantic = (tokenizer.semantic.dim,) if tokenizer.guidance else ()
        return recipe.codebook.size * tokenizer.pixel.codes, (*semantic, tokenizer.pixel.dim)

    def tokenizer_models(self, recipe: Recipe, *, gpu: bool) -> Iterator[Model]:
        """The phases `semantic` (with guidance), `pixel` and `decoder` (if set)."""
        if recipe.tokenizer.guidance:
            yield semantic_model(recipe, gpu=gpu)
        yield pixel_model(recipe, decoder=False, gpu=gpu)
        if recipe.tokenizer.decoder is not None:
            yield pixel_model(recipe, decoder=True, gpu=gpu)

    def inference_costs(
        self, recipe: Recipe, encoder: VisionEncoder, trained: Mapping[str, Model]
    ) -> dict[str, InferenceCost]:
        """Features by the encoder, tokens by encoder and pixel encoder.

        Without guidance there are no features, and the pixel encoder works alone.
        """
        task = trained["pixel"].task
        assert isinstance(task, PixelTask)
        pixel = task.tokenizer
        guided: list[VisionEncoder] = [encoder] if recipe.tokenizer.guidance else []
        modules = nn.ModuleDict({"encoder": encoder, "pixel": pixel})
        kept = [
            trained[name].modules["model"]
            for name in ("semantic", "pixel", "decoder")
            if name in trained
        ]
        size = encoder.image_size
        found = {}
        if guided:
            found["features"] = InferenceCost.of(recipe.features, modules, guided, guided, size)
        parts: list[Callable[[Tensor], Tensor]] = [*guided, pixel.encode_vectors]
        return found | {
            "tokens": InferenceCost.of(recipe.tokens, modules, parts, [*guided, *kept], size)
        }


class SemHiTokPhases(Phases):
    """The phases of one SemHiTok; each returns its artifact."""

    def __init__(self, run: StageRun, parents: Mapping[str, Artifact]) -> None:
        super().__init__(run, parents)
        # with codebook.duplicates=drop it may hold fewer codes than the recipe asks for
        guided = parents.get("codebook")
        self.semantic_codes = (
            self.recipe.codebook.size if guided is None else guided.counts["codes"]
        )
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
        return self._sized("semantic", SemanticTask, settings, stage, self.parents)

    def pixel(self, semantic: Artifact | None) -> Artifact:
        """Stage P: pixel encoder, codebooks and decoder."""
        stage = self.section.pixel
        settings = self._pixel_settings(semantic, stage.loss)
        parents = {"corpus": self.parents["corpus"], "encoder": self.parents["encoder"]}
        parents |= {} if semantic is None else {"semantic": semantic}
        return self._sized("pixel", PixelTask, settings, stage, parents)

    def decoder(self, semantic: Artifact | None, pixel: Artifact) -> Artifact:
        """Stage D: a larger decoder, all else frozen."""
        stage = self.section.decoder
        assert stage is not None
        settings = self._pixel_settings(semantic, stage.loss)
        settings |= {
            "decoder": stage.decoder,
            "start": storage.join(pixel.path, "pixel.safetensors"),
        }
        parents = {
            "corpus": self.parents["corpus"],
            "encoder": self.parents["encoder"],
            "pixel": pixel,
        }
        return self._sized("decoder", PixelTask, settings, stage, parents)

    def _pixel_settings(self, semantic: Artifact | None, loss: Loss) -> dict[str, object]:
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
        self,
        name: str,
        task: type[Task],
        settings: dict[str, object],
        stage: Phase,
        parents: Mapping[str, Artifact],
    ) -> Artifact:
        more: dict[str, object] = {"size": self.recipe.codebook.size}
        if name == "decoder":
            more["pixel"] = result_settings(self.section.pixel, ("train", "loss"))
        return self.phase(name, task, settings, stage, parents, more)

    def assemble(
        self, semantic: Artifact | None, pixel: Artifact, decoder: Artifact | None
    ) -> dict[str, int]:
        """Write the SemHiTok made of the phases to the root of the artifact."""

        encoder = (
            None if semantic is None else open_encoder(self.encoder, self.recipe.encoder.layer)
        )
        codes = model = None
        if semantic is not None:
            model = SemanticTokenizer(
                self.dim, self.section.semantic, self.semantic_codes, self.grid
            )
            model.load_state_dict(read_tensors(storage.join(semantic.path, "semantic.safetensors")))
            codes = model.codes
        size = None if self.section.decoder is None else self.section.decoder.decoder
        pixels = PixelTokenizer(
            self.section.pixel,
            codes,
            self.recipe.corpus.image_size,
            self.grid,
            self.num_codes,
            decoder_size=size,
        )
        last = pixel if decoder is None else decoder
        pixels.load_state_dict(read_tensors(storage.join(last.path, "pixel.safetensors")))
        whole = SemHiTok(self.section, pixels, model, encoder)
        whole.save_pretrained(self.run.path)
        return {"num_codes": whole.num_codes, "tokens": whole.num_tokens}
