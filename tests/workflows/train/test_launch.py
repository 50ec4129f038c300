"""What the driver hands to Ray Train. Runs of it are in test_loop.py."""

from __future__ import annotations

from pathlib import Path

import cloudpickle
import pytest

from smalti.schema import Resources, Train
from smalti.workflows.train import launch
from smalti.workflows.train.job import TrainingJob
from smalti.workflows.train.tasks.encoder import EncoderTask


@pytest.mark.parametrize("workers", [1, (1, 2)])
def test_the_controller_does_not_import_the_task(
    workers: int | tuple[int, int], tmp_path: Path
) -> None:
    """It would import transformers and DeepSpeed for nothing: four seconds for each training."""
    job = TrainingJob(
        task=EncoderTask,
        settings={},
        train=Train(steps=1, batch_size=2),
        seed=0,
        path=str(tmp_path),
        cpus=1,
        gpus=0,
        channel="a handle",
        preemptible=False,
        elastic=workers != 1,
    )
    trainer = launch._trainer(job, Resources(workers=workers))
    for_controller = trainer.train_run_context, trainer._create_default_callbacks()
    assert b"smalti.workflows.train.tasks" not in cloudpickle.dumps(for_controller)
    assert b"smalti.workflows.train.tasks" in cloudpickle.dumps(trainer._get_train_func())
