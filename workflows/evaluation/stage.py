"""Stage `evaluate`: measures the held-out split and writes scores, tables and pictures.

Each measure has a result file of its own: an interrupted evaluation resumes with the missing
measures, and a finished one takes those that were added since. Without GPUs it runs in this
process; with `resources.gpus_per_worker` in one Ray actor that holds a GPU.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from smalti import storage
from smalti.artifact import Artifact
from smalti.errors import SmaltiError
from smalti.schema import Recipe, result_settings
from smalti.tokenizers.encoders import quiet
from smalti.tracking import Tracker
from smalti.workflows.evaluation.scores.codes import measure_codes
from smalti.workflows.evaluation.scores.drawing import measure_drawing
from smalti.workflows.evaluation.scores.heldout import EvaluationJob, HeldOut
from smalti.workflows.evaluation.scores.measure_result import (
    MeasureResult,
    ResultRecord,
    ScoreRecord,
    load_result,
    merge_baselines,
    save_result,
)
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.evaluation.scores.questions import measure_questions
from smalti.workflows.evaluation.scores.reconstruction import measure_reconstruction
from smalti.workflows.evaluation.scores.retrieval import measure_retrieval
from smalti.workflows.evaluation.scores.zero_shot import measure_zero_shot
from smalti.workflows.evaluation.tracking import track
from smalti.workflows.pipeline.lock import holding
from smalti.workflows.pipeline.stage import StageRun, find_artifact, run_stage, stage_path
from smalti.workflows.systems.registry import system_of
from smalti.workflows.tracking.mlflow import open_tracker

STAGE = "evaluate"
OLD_STAGE = "evaluation"  # the folder of earlier versions
PARENTS = ("corpus", "encoder", "tokenizer", "tokens", "export")
FORMAT = 2  # increase when every measure changes: finished evaluations are then not reused


@dataclass(frozen=True)
class Measure:
    """A measure of `MEASURES`.

    If it does not apply, its result is `skipped` with the reason.

    Attributes:
        compute: takes it on the held-out rows with the models.
        version: increase when its meaning changes: finished evaluations then take it again.
    """

    compute: Callable[[HeldOut, Models], MeasureResult]
    version: int = 1


MEASURES = {
    "reconstruction": Measure(measure_reconstruction),
    "codes": Measure(measure_codes),
    "zero_shot": Measure(measure_zero_shot),
    "retrieval": Measure(measure_retrieval),
    "questions": Measure(measure_questions),
    "drawing": Measure(measure_drawing),
}
"""All measures by name. To add one: a file in `scores/`, and an entry here."""


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """Evaluate a finished chain: `scores.json`, `tables.json`, `pictures/`.

    A finished evaluation that lacks a measure takes only that one.

    Returns:
        The artifact. Its `scores` hold, for each measure taken, `value`, `n`, `split`,
        `higher_is_better` and `baseline`, with the present scores of the recipe's baselines added,
        and `goal` where the recipe has one.

    Raises:
        ArtifactError: if a stage before it is missing.
        DataError: if nothing is held out.
    """
    parents = {name: find_artifact(recipe, name) for name in PARENTS}
    artifact = run_stage(
        recipe,
        STAGE,
        STAGE,
        stage_config(recipe),
        parents,
        lambda stage: _body(stage, parents),
        tracker=tracker,
    )
    if missing_measures(artifact):
        with holding(artifact.path):
            artifact = add_missing(recipe, Artifact.load(artifact.path), parents, tracker)
    return complete(recipe, artifact)


def missing_measures(artifact: Artifact) -> list[str]:
    """Measures that the evaluation lacks or has in another version."""
    missing = []
    for name, measure in MEASURES.items():
        result = load_result(artifact.path, name)
        if (
            result is None
            or result["version"] != measure.version
            or not result["scores"].keys() <= artifact.scores.keys()
        ):
            missing.append(name)
    return missing


def add_missing(
    recipe: Recipe, artifact: Artifact, parents: dict[str, Artifact], tracker: Tracker | None = None
) -> Artifact:
    """Take the measures that a finished evaluation lacks, and update its record."""
    parent = open_tracker(recipe) if tracker is None else tracker
    child = parent.child(STAGE)
    started = time.monotonic()
    try:
        run = StageRun(STAGE, artifact.path, recipe, child, True, artifact.fingerprint)
        counts = _body(run, parents)
        seconds = round(artifact.seconds + time.monotonic() - started, 3)
        updated = dataclasses.replace(artifact, scores=run.scores, counts=counts, seconds=seconds)
        updated.save()
    except BaseException:
        child.finish("FAILED")
        if tracker is None:
            parent.finish("FAILED")
        raise
    child.finish()
    if tracker is None:
        parent.finish()
    return updated


def stage_config(recipe: Recipe) -> dict[str, object]:
    """Settings that the scores depend on."""
    section = result_settings(recipe.evaluate)
    return section | {
        "seed": recipe.seed,
        "encoder_layer": recipe.encoder.layer,
        "format": FORMAT,
    }


def complete(recipe: Recipe, artifact: Artifact) -> Artifact:
    """The evaluation with the scores of baseline runs, and the recipe's goals."""
    scores = merge_baselines(artifact.scores, baseline_scores(recipe))
    for name, goal in recipe.evaluate.goals.items():
        if name in scores:
            scores[name]["goal"] = goal
    return dataclasses.replace(artifact, scores=scores)


def baseline_scores(recipe: Recipe) -> dict[str, dict[str, ScoreRecord]]:
    """Scores of the evaluated baselines, from `<out>/baselines/<name>/evaluate`."""
    found = {}
    for name in recipe.baselines:
        for folder in (STAGE, OLD_STAGE):
            artifact = Artifact.find(stage_path(recipe, f"baselines/{name}/{folder}"))
            if artifact is not None:
                found[name] = artifact.scores
                break
    return found


def job_of(recipe: Recipe, parents: dict[str, Artifact], path: str) -> EvaluationJob:
    """The inputs of a recipe's evaluation."""
    from smalti.tokenizers.saved import read_config
    from smalti.workflows.encoder import encoder_path

    return EvaluationJob(
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
    """Cores that this process may use.

    Not OMP_NUM_THREADS: Ray sets that to 1 for the driver of a job.
    """
    return (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    )


class Evaluator:
    """Takes measures in turn, with shared models and rows.

    It also runs as a Ray actor.
    """

    def __init__(self, job: EvaluationJob, threads: int) -> None:
        self.job = job
        self.threads = threads
        self.data = HeldOut(job)
        self.models = Models(self.data)

    def measure(self, name: str, measure: Measure) -> ResultRecord:
        """Take one measure and write its result."""
        with _torch_threads(self.threads), quiet():
            result = measure.compute(self.data, self.models)
            return save_result(self.job.path, name, result, measure.version)


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measurer(recipe: Recipe, job: EvaluationJob) -> Callable[[str, Measure], ResultRecord]:
    """A function that takes measures here, or in an actor with a GPU."""
    resources = recipe.resources
    if not resources.gpus_per_worker:
        return Evaluator(job, cores()).measure
    import ray

    gpus = min(1, resources.gpus_per_worker)
    actor_class = ray.remote(num_cpus=resources.cpus_per_worker, num_gpus=gpus)(Evaluator)
    actor: Any = actor_class.remote(job, resources.cpus_per_worker)

    def take(name: str, measure: Measure) -> ResultRecord:
        try:
            return ray.get(actor.measure.remote(name, measure))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SmaltiError):
                raise error.cause from error
            raise

    return take


def _body(run: StageRun, parents: dict[str, Artifact]) -> dict[str, int]:
    """Take the missing measures, then write the scores and tables of all."""
    results = _take_missing(run, job_of(run.recipe, parents, run.path))
    scores = {key: score for result in results.values() for key, score in result["scores"].items()}
    tables = {key: table for result in results.values() for key, table in result["tables"].items()}
    tables["skipped"] = {
        name: result["skipped"] for name, result in results.items() if result["skipped"]
    }
    storage.write_json(storage.join(run.path, "scores.json"), scores)
    storage.write_json(storage.join(run.path, "tables.json"), tables)
    run.scores |= scores
    track(run, merge_baselines(scores, baseline_scores(run.recipe)), tables)
    return {
        "scores": len(scores),
        "pictures": sum(len(result["pictures"]) for result in results.values()),
    }


def _take_missing(run: StageRun, job: EvaluationJob) -> dict[str, ResultRecord]:
    """Every result, in the order of `MEASURES`; finished ones are reused."""
    results: dict[str, ResultRecord] = {}
    for name, measure in MEASURES.items():
        result = load_result(run.path, name)
        if result is not None and result["version"] == measure.version:
            results[name] = result
    if results:
        run.log(f"reusing finished measures: {', '.join(results)}")
    missing = [name for name in MEASURES if name not in results]
    for name, reason in system_of(run.recipe).unmeasured.items():
        if name in missing:
            missing.remove(name)
            skipped = MeasureResult(skipped=reason)
            results[name] = save_result(run.path, name, skipped, MEASURES[name].version)
            run.log(f"{name}: {_summary(results[name])}")
    take = _measurer(run.recipe, job) if missing else None
    for name in missing:
        assert take is not None
        started = time.monotonic()
        results[name] = take(name, MEASURES[name])
        run.log(f"{name} ({time.monotonic() - started:.1f} s): {_summary(results[name])}")
    return {name: results[name] for name in MEASURES}


def _summary(result: ResultRecord) -> str:
    """One line for the terminal."""
    if result["skipped"]:
        return f"not measured: {result['skipped']}"
    return (
        ", ".join(f"{key} {score['value']:.4g}" for key, score in result["scores"].items())
        or "pictures only"
    )
