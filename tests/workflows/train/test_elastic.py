"""The numbers of workers that can share a batch."""

from __future__ import annotations

import pytest

from smalti.errors import ConfigError
from smalti.schema import (
    Resources,
    Train,
)
from smalti.workflows.train.elastic import fitting_workers, unused_workers


@pytest.mark.parametrize(
    ("workers", "changes", "fitting", "line"),
    [
        (2, {}, [2], ""),
        ((1, 4), {}, [1, 2, 4], "among 3 workers"),
        ((3, 8), {"batch_size": 24}, [3, 4, 6, 8], "among 5, 7 workers"),
        ((1, 4), {"micro_batch_size": 4}, [1, 2, 4], "among 3 workers"),
        ((1, 4), {"batch_size": 12, "micro_batch_size": 4}, [1, 3, 4], "among 2 workers"),
    ],
)
def test_the_numbers_of_workers_that_divide_a_batch(workers, changes, fitting, line) -> None:
    train, resources = Train(**{"batch_size": 8} | changes), Resources(workers=workers)
    assert fitting_workers(train, resources) == fitting
    assert (
        line in unused_workers(train, resources) if line else unused_workers(train, resources) == ""
    )


def test_a_range_of_workers_that_divides_no_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=7 .* resources.workers=\[2, 4\] allows"):
        fitting_workers(Train(batch_size=7), Resources(workers=(2, 4)))
    with pytest.raises(ValueError, match="min above max"):
        Resources(workers=(3, 2))
