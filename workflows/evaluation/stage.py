"""Stage `evaluation`: every measure on the held-out split, its scores, tables and pictures for the report.

Each measure is a part with files of its own, so an evaluation that was broken off goes on with the next one. Without
GPUs it runs in this process; with `resources.gpus_per_worker` in one Ray actor that holds a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from smalti import storage
from smalti.artifact import Artifact
from smalti.errors import SmaltiError
from smalti.schema import Recipe, result_settings
from smalti.tokenizers.encoders import quiet
from smalti.tracking import Tracker
from smalti.workflows.evaluation.scores.codes import measure_codes
from smalti.workflows.evaluation.scores.contact_sheet import contact_sheet
from smalti.workflows.evaluation.scores.drawing import measure_drawing
from smalti.workflows.evaluation.scores.heldout import HeldOut, Job
from smalti.workflows.evaluation.scores.measure_result import PICTURES, Part, load_part, merge_baselines, save_part
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.evaluation.scores.questions import measure_questions
from smalti.workflows.evaluation.scores.reconstruction import measure_reconstruction
from smalti.workflows.evaluation.scores.retrieval import measure_retrieval
from smalti.workflows.evaluation.scores.zero_shot import measure_zero_shot
from smalti.workflows.pipeline.stage import StageRun, find_artifact, run_stage, stage_path

STAGE = "evaluation"
PARENTS = ("corpus", "encoder", "tokenizer", "tokens", "export")
FORMAT = 2  # raise when a measure changes its meaning: finished evaluations are then not taken for new ones

MEASURES: dict[str, Callable[[HeldOut, Models], Part]] = {
    "reconstruction": measure_reconstruction,
    "codes": measure_codes,
    "zero_shot": measure_zero_shot,
    "retrieval": measure_retrieval,
    "questions": measure_questions,
    "drawing": measure_drawing,
}


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The evaluation of a finished chain: `scores.json`, `tables.json`, `pictures/`.

    The returned artifact's `scores` hold, for each measure taken, `value`, `n`, `split`, `higher_is_better` and
    `baseline`; the values that the recipe's baseline runs reached are added as they stand now, and `goal` where the
    recipe names one. Errors: ArtifactError when a stage before it is missing; DataError when nothing is held out.
    """
    parents = {name: find_artifact(recipe, name) for name in PARENTS}
    artifact = run_stage(
        recipe, STAGE, STAGE, stage_config(recipe), parents, lambda stage: _body(stage, parents), tracker=tracker
    )
    return complete(recipe, artifact)


def stage_config(recipe: Recipe) -> dict[str, Any]:
    """What the scores depend on, beside the parents."""
    section = result_settings(recipe.evaluate)
    return section | {
        "seed": recipe.seed,
        "encoder_layer": recipe.encoder.layer,
        "format": FORMAT,
    }


def complete(recipe: Recipe, artifact: Artifact) -> Artifact:
    """The evaluation with what other places know: `baseline.<name>` of the baseline runs, and the recipe's goals."""
    scores = merge_baselines(artifact.scores, baseline_scores(recipe))
    for name, goal in recipe.evaluate.goals.items():
        if name in scores:
            scores[name] = scores[name] | {"goal": goal}
    return dataclasses.replace(artifact, scores=scores)


def baseline_scores(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Scores of each of the recipe's baselines that was evaluated, from `<out>/baselines/<name>/evaluation`."""
    found = {}
    for name in recipe.baselines:
        artifact = Artifact.find(stage_path(recipe, f"baselines/{name}/{STAGE}"))
        if artifact is not None:
            found[name] = artifact.scores
    return found


def job_of(recipe: Recipe, parents: dict[str, Artifact], path: str) -> Job:
    """The job of a recipe: places, sizes and the device."""
    from smalti.tokenizers.saved import read_config
    from smalti.workflows.encoder import encoder_path

    return Job(
        path=path,
        corpus=parents["corpus"].path,
        tokens=parents["tokens"].path,
        tokenizer=parents["tokenizer"].path,
        encoder=encoder_path(parents["encoder"]),
        encoder_layer=recipe.encoder.layer,
        export=parents["export"].path,
        image_size=int(read_config(parents["tokenizer"].path)["image_size"]),
        max_pixels=recipe.corpus.max_pixels,
        seed=recipe.seed,
        evaluate=recipe.evaluate,
        device="cuda" if recipe.resources.gpus_per_worker else "cpu",
        own_encoder=not parents["encoder"].config.get("pretrained"),
    )


def cores() -> int:
    """Cores that this process may use. Not OMP_NUM_THREADS: Ray sets that to 1 for the driver of a job."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


class Evaluator:
    """Measures one part after the other, with the models and rows that they share. Also the Ray actor's body."""

    def __init__(self, job: Job, threads: int) -> None:
        self.job, self.threads = job, threads
        self.data = HeldOut(job)
        self.models = Models(self.data)

    def measure(self, name: str) -> dict[str, Any]:
        """Take one measure, write its part, return the part's JSON."""
        with _torch_threads(self.threads), quiet():
            return save_part(self.job.path, name, MEASURES[name](self.data, self.models))


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measurer(recipe: Recipe, job: Job) -> Callable[[str], dict[str, Any]]:
    """Where measures are taken: here, or in an actor with a GPU."""
    resources = recipe.resources
    if not resources.gpus_per_worker:
        return Evaluator(job, cores()).measure
    import ray

    actor_class: Any = ray.remote(Evaluator)
    options = {"num_cpus": resources.cpus_per_worker, "num_gpus": min(1, resources.gpus_per_worker)}
    actor = actor_class.options(**options).remote(job, resources.cpus_per_worker)

    def measure(name: str) -> dict[str, Any]:
        try:
            return ray.get(actor.measure.remote(name))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SmaltiError):
                raise error.cause from error
            raise

    return measure


def _body(run: StageRun, parents: dict[str, Artifact]) -> dict[str, int]:
    job = job_of(run.recipe, parents, run.path)
    parts: dict[str, dict[str, Any]] = {}
    measure = _measurer(run.recipe, job)
    for name in MEASURES:
        part = load_part(run.path, name)
        if part is None:
            started = time.monotonic()
            part = measure(name)
            run.log(f"{name} ({time.monotonic() - started:.1f} s): {_told(part)}")
        parts[name] = part
    scores = {key: score for part in parts.values() for key, score in part["scores"].items()}
    tables = {key: table for part in parts.values() for key, table in part["tables"].items()}
    tables["skipped"] = {name: part["skipped"] for name, part in parts.items() if part["skipped"]}
    storage.write_json(storage.join(run.path, "scores.json"), scores)
    storage.write_json(storage.join(run.path, "tables.json"), tables)
    run.scores |= scores
    _track(run, tables)
    return {"scores": len(scores), "pictures": sum(len(part["pictures"]) for part in parts.values())}


def _told(part: dict[str, Any]) -> str:
    """One line about a part for the terminal."""
    if part["skipped"]:
        return f"not measured: {part['skipped']}"
    return ", ".join(f"{key} {score['value']:.4g}" for key, score in part["scores"].items()) or "pictures only"


def _track(run: StageRun, tables: dict[str, Any]) -> None:
    """Scores with their baselines as metrics, and three sheets of pictures, in the stage's MLflow run."""
    scores = merge_baselines(run.scores, baseline_scores(run.recipe))
    metrics = {key: score["value"] for key, score in scores.items()}
    metrics |= {f"{key}/baseline/{name}": v for key, score in scores.items() for name, v in score["baseline"].items()}
    run.tracker.metrics(metrics)
    grid = tables.get("grid", [])
    rows = {
        "reconstructions": [[line[kind] for kind in ("input", "semantic", "decoded") if kind in line] for line in grid],
        "drawings": _in_rows([line["picture"] for line in tables.get("drawings", [])], 8),
        "gallery": [line["pictures"] for line in tables.get("gallery", [])],
    }
    for key, names in rows.items():
        if names:
            run.tracker.image(key, contact_sheet([[_picture(run.path, name) for name in row] for row in names]))


def _in_rows(names: list[str], width: int) -> list[list[str]]:
    return [names[start : start + width] for start in range(0, len(names), width)]


def _picture(path: str, name: str) -> np.ndarray:
    """A picture of the evaluation, uint8 (H, W, 3)."""
    from PIL import Image

    with storage.open_read(storage.join(path, PICTURES, f"{name}.png")) as file:
        return np.asarray(Image.open(file).convert("RGB"))
