"""Print what every stage of some recipes is fingerprinted by: a digest by case and stage, as JSON.

Run as a script, so that `test_stage_settings.py` can run it on a copy of the source too.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from types import SimpleNamespace
from typing import Any

from smalti.config import load_recipe
from smalti.schema import Recipe
from smalti.workflows import chain
from smalti.workflows.systems import dualtoken, phases, semhitok

CASES = {
    "semhitok-quickstart": [
        [],
        ["tokenizer.guidance=false", "tokenizer.pixel.semantic_only_decoder=false"],
        [
            "features.precision=bf16",
            "tokens.compile=true",
            "mllm.old_rows=0.5",
            "mllm.freeze=[backbone]",
            "tokenizer.encoder_precision=bf16",
            "codebook.recall=0.9",
            "mllm.train.micro_batch_size=4",
            "tokenizer.pixel.train.micro_batch_size=8",
            "evaluate.goals={}",
            "tokenizer.pixel.loss.gan.adaptive_range=[0.0,10.0]",
        ],
    ],
    "semhitok-256": [[], ["mllm.lora.rank=8", "corpus.source=/data/x", "encoder.train=null"]],
    "dualtoken-384": [[], ["tokenizer.encoder_precision=fp32"]],
    "unicode2-500k": [
        [],
        ["features.source=/data/y", "bridge.decoder=/x/sd", "codebook.spherical=true"],
    ],
}


class CapturedError(Exception):
    """Ends a stage once it has said what it is fingerprinted by."""


def artifact(recipe: Recipe, name: str) -> Any:
    """A parent that nothing looks into."""
    return SimpleNamespace(
        path=f"/x/{name}", config={"pretrained": "/x/siglip"}, counts={"codes": 10}
    )


def settings(recipe: Recipe) -> dict[str, str]:
    """Digest of kind, config and names of the parents, by stage."""
    found: dict[str, str] = {}

    def capture(
        recipe: Recipe, name: str, kind: str, config: Any, parents: Any, body: Any, **more: Any
    ) -> Any:
        text = json.dumps({"config": config, "parents": sorted(parents)}, sort_keys=True)
        found[name if name.startswith("tokenizer/") else stage] = hashlib.sha256(
            text.encode()
        ).hexdigest()[:16]
        if name.startswith("tokenizer/"):
            return artifact(recipe, name)
        raise CapturedError

    stage = ""
    for stage in chain.stages_of(recipe):
        module: Any = importlib.import_module(chain.MODULES[stage])
        module.run_stage, module.find_artifact = capture, artifact
        if hasattr(module, "check"):
            module.check = lambda recipe: None
        try:
            module.run(recipe)
        except CapturedError:
            continue
    phases.run_stage = capture
    _phases(recipe)
    return found


def _phases(recipe: Recipe) -> None:
    """The phases of a tokenizer, each an artifact of its own."""
    if recipe.system == "unicode2":
        return
    kind: Any = semhitok.SemHiTokPhases if recipe.system == "semhitok" else phases.Phases
    made: Any = kind.__new__(kind)  # without the encoder and the corpus that __init__ opens
    made.run, made.recipe, made.section = SimpleNamespace(tracker=None), recipe, recipe.tokenizer
    made.parents = {name: artifact(recipe, name) for name in ("corpus", "encoder", "codebook")}
    made.encoder, made.grid, made.dim, made.keys, made.sizes = (
        "/x/siglip",
        (4, 4),
        16,
        ["train/0"],
        [5],
    )
    made.semantic_codes = made.num_codes = recipe.codebook.size
    if recipe.system == "dualtoken":
        dualtoken.train(made)
        return
    semantic = made.semantic() if recipe.tokenizer.guidance else None
    pixel = made.pixel(semantic)
    if recipe.tokenizer.decoder:
        made.decoder(semantic, pixel)


if __name__ == "__main__":
    cases = {
        " ".join([name, *more]): load_recipe(name, more)
        for name, lists in CASES.items()
        for more in lists
    }
    print(
        json.dumps(
            {name: settings(recipe) for name, recipe in cases.items()}, indent=1, sort_keys=True
        )
    )
