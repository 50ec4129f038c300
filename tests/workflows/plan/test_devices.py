"""How many devices can share the work."""

from __future__ import annotations

import pytest

from smalti.errors import ConfigError
from smalti.schema import Resources
from smalti.workflows.plan.devices import shared_among
from smalti.workflows.plan.trial import Trial


def test_a_number_of_devices_that_a_batch_does_not_divide_among_names_the_option(
    trials: dict[str, Trial],
) -> None:
    """Batches of 32, 64, 32 and 16."""
    models = [trial.model for trial in trials.values()]
    told = (
        r"--gpus=3: encoder\.train\.train\.batch_size=32, .*mllm\.train\.batch_size=16 cannot be shared evenly by 3 devices\. "
        r"Set --gpus to 2 or 4, or each of these batch sizes to a multiple of 3\."
    )
    with pytest.raises(ConfigError, match=told):
        shared_among(models, Resources(), 3)
    with pytest.raises(
        ConfigError, match=r"--gpus=32: mllm\.train\.batch_size=16 .*Set --gpus to 16, or mllm"
    ):
        shared_among(models, Resources(), 32)
    with pytest.raises(
        ConfigError, match=r"resources\.workers=3: .* Set resources\.workers to 2 or 4"
    ):
        shared_among(models, Resources(workers=3), None)
    assert shared_among(models, Resources(workers=(1, 3)), None) == 2, (
        "as many as can share a batch"
    )
    assert shared_among(models, Resources(workers=(1, 3)), 8) == 8
