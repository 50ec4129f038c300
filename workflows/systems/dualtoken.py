"""DualToken's tokenizer in its one phase, `dual`: the tower that trains, two codebooks and the decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smalti import storage
from smalti.artifact import Artifact
from smalti.errors import ConfigError
from smalti.schema import Recipe
from smalti.tokenizers.encoders import open_encoder
from smalti.workflows.cluster.session import ensure_ray
from smalti.workflows.encoder import result_settings
from smalti.workflows.pipeline.stage import StageRun
from smalti.workflows.systems.phases import Phases, check_loss, placed, refuse_foreign
from smalti.workflows.train.elastic import check_batch


def parents(recipe: Recipe) -> tuple[str, ...]:
    return ("corpus", "encoder")


def check(recipe: Recipe) -> None:
    """ConfigError: keys of other systems, layers that the encoder has not, batches that workers cannot share, losses that
    cannot be computed. ArtifactError: weights that are not there."""
    refuse_foreign(recipe, tokenizer=("dual", "encoder_precision"), sections=("features", "codebook"))
    if recipe.mllm.adapter == "cascade":
        raise ConfigError(
            "mllm.adapter=cascade trains a second codebook of one code a token, and a place of dualtoken has several. Set "
            "mllm.adapter=single (one MLP over both parts of a place) or dual (one for each)."
        )
    stage = recipe.tokenizer.dual
    check_layers(recipe)
    adaptive = stage.loss.gan.adaptive and stage.loss.gan.weight
    together = "the adaptive weight of loss.gan" if adaptive else ""
    check_batch("tokenizer.dual", stage.train, recipe.resources, together=together)
    check_loss("tokenizer.dual", stage, recipe.corpus.image_size)


def check_layers(recipe: Recipe) -> None:
    """ConfigError where `encoder.layer` or the pixel layers do not fit the encoder, as far as it can be known by now."""
    from smalti.tokenizers.dualtoken import semantic_depth
    from smalti.workflows.plan.models import encoder_of

    if recipe.encoder.pretrained or recipe.encoder.train:
        try:
            encoder, _ = encoder_of(recipe)
        except ConfigError as error:
            if "encoder.layer" in str(error):
                raise
            return  # no config of it can be had here: the phase looks again
        semantic_depth(recipe.tokenizer.dual, encoder)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """What the tokenizer depends on, of the recipe."""
    section = recipe.tokenizer.dual.model_dump(mode="json")
    section["train"] = result_settings(section["train"])
    own: dict[str, Any] = {"tokenizer": {"dual": section}, "system": recipe.system, "seed": recipe.seed}
    if recipe.tokenizer.encoder_precision != "auto":
        own["tokenizer"]["encoder_precision"] = recipe.tokenizer.encoder_precision
    return own | {"layer": recipe.encoder.layer, "image_size": recipe.corpus.image_size}


def body(parents: Mapping[str, Artifact]) -> Any:
    def make(run: StageRun) -> dict[str, int]:
        phases = Phases(run, parents)
        with ensure_ray(run.recipe):
            dual = train(phases)
        return assemble(phases, dual)

    return make


def train(phases: Phases) -> Artifact:
    """The phase `dual`."""
    stage = phases.section.dual
    settings = {"stage": stage, "loss": placed(stage.loss)} | phases.images(needs_encoder=True)
    task = "smalti.workflows.train.tasks.dual:DualTask"
    return phases.phase("dual", task, settings, stage, phases.parents, {})


def assemble(phases: Phases, dual: Artifact) -> dict[str, int]:
    """Write the DualToken at the root of the artifact."""
    from smalti.tokenizers.dualtoken import DualModel, DualToken
    from smalti.workflows.train.tasks.dual import WEIGHTS
    from smalti.workflows.train.tasks.semantic import read_tensors

    model = DualModel(phases.section.dual, open_encoder(phases.encoder, phases.recipe.encoder.layer))
    model.load_state_dict(read_tensors(storage.join(dual.path, WEIGHTS)))
    whole = DualToken(model)
    whole.save_pretrained(phases.run.path)
    return {"num_codes": whole.num_codes, "tokens": whole.num_tokens}
