"""DualToken's tokenizer, trained in one phase, `dual`.

The phase trains the tower, two codebooks and the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from smalti import storage
from smalti.artifact import Artifact
from smalti.errors import ConfigError
from smalti.schema import Recipe, result_settings
from smalti.tokenizers.dualtoken import BOOKS, DualModel, DualToken, semantic_depth
from smalti.tokenizers.encoders import VisionEncoder, open_encoder
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.pipeline.stage import StageRun
from smalti.workflows.plan.image_tasks import dual_model
from smalti.workflows.plan.inference_cost import InferenceCost
from smalti.workflows.plan.language_tasks import places_model
from smalti.workflows.plan.models import Model, encoder_of
from smalti.workflows.systems import smoke_sizes
from smalti.workflows.systems.base import System
from smalti.workflows.systems.phases import Phases, check_pixel_phase, placed
from smalti.workflows.train.tasks.dual import WEIGHTS, DualTask
from smalti.workflows.train.tasks.semantic import read_tensors


class DualTokenSystem(System):
    """DualToken: residual codes of shallow and deep layers of one trained tower."""

    name = "dualtoken"
    reads = ("dual", "encoder_precision")
    ignores = ("features", "codebook")
    smoke_layers = 3

    def parents(self, recipe: Recipe) -> tuple[str, ...]:
        """The corpus, and the encoder that the tower starts from."""
        return ("corpus", "encoder")

    def check(self, recipe: Recipe) -> None:
        """Also check the layers, the batches of workers, and the losses."""
        super().check(recipe)
        if recipe.mllm.adapter == "cascade":
            raise ConfigError(
                "mllm.adapter=cascade trains a second codebook of one code per token, but a token "
                "of dualtoken has several. Set mllm.adapter=single (one MLP over both parts of a "
                "token) or dual (one for each)."
            )
        size = recipe.mllm.config
        if size and size.hidden_size % recipe.mllm.depth_heads.heads:
            raise ConfigError(
                f"mllm.config.hidden_size={size.hidden_size} does not split over "
                f"mllm.depth_heads.heads={recipe.mllm.depth_heads.heads}; set a multiple."
            )
        check_layers(recipe)
        check_pixel_phase("tokenizer.dual", recipe.tokenizer.dual, recipe)

    def settings(self, recipe: Recipe) -> dict[str, object]:
        """The section `tokenizer.dual`, seed, layer and image size."""
        read = result_settings(recipe.tokenizer)
        section = {name: read[name] for name in ("encoder_precision",) if name in read}
        section["dual"] = result_settings(recipe.tokenizer.dual)
        own: dict[str, object] = {
            "tokenizer": section,
            "system": recipe.system,
            "seed": recipe.seed,
        }
        return own | {"layer": recipe.encoder.layer, "image_size": recipe.corpus.image_size}

    def build(self, run: StageRun, parents: Mapping[str, Artifact]) -> Mapping[str, int]:
        """Train the phase `dual` and write the DualToken."""
        phases = Phases(run, parents)
        with ensure_ray(run.recipe):
            dual = train(phases)
        return assemble(phases, dual)

    def smoke(self, recipe: Recipe) -> dict[str, object]:
        """Tiny codebooks and decoder, few steps."""
        dual = recipe.tokenizer.dual
        values: dict[str, object] = {
            "encoder.layer": -2,
            "tokenizer.dual.codes": 16,
            "tokenizer.dual.dim": 8,
            "tokenizer.dual.depth": min(dual.depth, 2),
            "tokenizer.dual.pixel_layers": [2, 1],
            "tokenizer.dual.pixel_weights": [1.0, 0.6],
            "tokenizer.dual.init_steps": min(dual.init_steps, 1),
            "mllm.depth_heads.layers": 1,
            "mllm.depth_heads.heads": 2,
        }
        values |= smoke_sizes.vit("tokenizer.dual.decoder")
        values |= smoke_sizes.train("tokenizer.dual.train", dual.train)
        return values | smoke_sizes.loss("tokenizer.dual.loss", dual.loss)

    def codes_per_token(self, recipe: Recipe) -> int:
        """The codes of all depths of both codebooks."""
        return len(BOOKS) * recipe.tokenizer.dual.depth

    def code_vectors(self, recipe: Recipe, encoder: VisionEncoder) -> tuple[int, tuple[int, ...]]:
        """One visual token; vectors of a pixel and a semantic part."""
        return 1, (recipe.tokenizer.dual.dim,) * len(BOOKS)

    def language_model(self, recipe: Recipe, encoder: VisionEncoder) -> Model:
        """The planned language model, with its depth heads."""
        return places_model(recipe)

    def tokenizer_models(self, recipe: Recipe, *, gpu: bool) -> Iterator[Model]:
        """The phase `dual`."""
        yield dual_model(recipe, gpu=gpu)

    def inference_costs(
        self, recipe: Recipe, encoder: VisionEncoder, trained: Mapping[str, Model]
    ) -> dict[str, InferenceCost]:
        """Tokens by the trained tower."""
        task = trained["dual"].task
        assert isinstance(task, DualTask)
        dual = task.model
        return {
            "tokens": InferenceCost.of(
                recipe.tokens, dual, [dual.vectors], [dual], encoder.image_size
            )
        }


def check_layers(recipe: Recipe) -> None:
    """Check `encoder.layer` and the pixel layers against the encoder.

    An encoder that cannot be read yet is checked by the phase.

    Raises:
        ConfigError: for a layer that the encoder lacks.
    """
    if recipe.encoder.pretrained or recipe.encoder.train:
        try:
            encoder, _ = encoder_of(recipe)
        except ConfigError as error:
            if "encoder.layer" in str(error):
                raise
            return  # its config cannot be read yet: the phase checks again
        semantic_depth(recipe.tokenizer.dual, encoder)


def train(phases: Phases) -> Artifact:
    """The phase `dual`."""
    stage = phases.section.dual
    settings = {"stage": stage, "loss": placed(stage.loss)} | phases.images(needs_encoder=True)
    return phases.phase("dual", DualTask, settings, stage, phases.parents, {})


def assemble(phases: Phases, dual: Artifact) -> dict[str, int]:
    """Write the DualToken at the root of the artifact."""
    model = DualModel(
        phases.section.dual, open_encoder(phases.encoder, phases.recipe.encoder.layer)
    )
    model.load_state_dict(read_tensors(storage.join(dual.path, WEIGHTS)))
    whole = DualToken(model)
    whole.save_pretrained(phases.run.path)
    return {"num_codes": whole.num_codes, "tokens": whole.num_tokens}
