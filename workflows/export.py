"""Stage `export`: the unified model as a plain Hugging Face folder (embedding swap)."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from smalti import storage
from smalti.artifact import Artifact
from smalti.schema import Recipe, result_settings
from smalti.tracking import Tracker
from smalti.workflows.bridge import copy_into
from smalti.workflows.pipeline.stage import Body, StageRun, find_artifact, run_stage


def run(recipe: Recipe, tracker: Tracker | None = None) -> Artifact:
    """The export artifact, which loads where smalti is not installed.

    It loads with AutoModelForCausalLM and AutoTokenizer.

    Counts: parameters, embedding rows, codes.
    """
    names = ("tokenizer", "mllm", *(["bridge"] if recipe.bridge else []))
    parents = {name: find_artifact(recipe, name) for name in names}
    config = result_settings(recipe.export)
    return run_stage(recipe, "export", "export", config, parents, _body(parents), tracker=tracker)


def _body(parents: dict[str, Artifact]) -> Body:
    def body(run: StageRun) -> dict[str, int]:
        from smalti.mllm.build import load_unified
        from smalti.mllm.export import export

        with storage.local_copy(storage.join(parents["mllm"].path, "model")) as folder:
            model, hf_tokenizer = load_unified(folder)
        with local_dir(run.path) as out:
            if "bridge" in parents:
                copy_into(parents["bridge"].path, out)
            return export(
                model, hf_tokenizer, parents["tokenizer"].path, out, run.recipe.export.dtype
            )

    return body


@contextmanager
def local_dir(path: str) -> Iterator[str]:
    """A local folder to fill, whose files end in `path`.

    That folder itself, or a temporary one that is uploaded at the end.
    """
    if storage.is_local(path):
        yield storage.local_path(path)
        return
    with tempfile.TemporaryDirectory(prefix="smalti-export-") as folder:
        yield folder
        for base, _, names in os.walk(folder):
            for name in sorted(names):
                source = os.path.join(base, name)
                with open(source, "rb") as file:
                    target = storage.join(path, *os.path.relpath(source, folder).split(os.sep))
                    storage.make_dirs(storage.parent(target))
                    storage.write_atomic(target, file.read())
