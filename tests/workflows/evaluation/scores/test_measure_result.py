"""Results of a measure on disk, refused scores, and baselines.

Covers: workflows/evaluation/scores/tables.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from smalti.errors import DataError
from smalti.workflows.evaluation.scores.measure_result import (
    MeasureResult,
    Score,
    load_result,
    merge_baselines,
    png,
    save_result,
)


def test_part_is_read_back_as_it_was_written(tmp_path) -> None:
    part = MeasureResult(
        {"a/b": Score(0.5, 10, baseline={"chance": 0.1})},
        {"t": [1]},
        {"p": np.zeros((4, 4, 3), np.uint8)},
    )
    assert load_result(str(tmp_path), "x") is None
    written = save_result(str(tmp_path), "x", part)
    assert load_result(str(tmp_path), "x") == written
    assert written["scores"]["a/b"] == {
        "value": 0.5, "n": 10, "split": "val", "higher_is_better": True, "baseline": {"chance": 0.1},
    }  # fmt: skip
    assert (tmp_path / "pictures" / "p.png").read_bytes() == png(np.zeros((4, 4, 3), np.uint8))


@pytest.mark.parametrize("bad", [Score(math.inf, 1), Score(0.5, 1, baseline={"x": math.nan})])
def test_a_score_that_is_not_finite_is_refused(bad: Score) -> None:
    with pytest.raises(DataError, match="finite"):
        bad.as_json()


def test_baselines_are_filled_where_both_were_measured() -> None:
    scores = {
        "qa/accuracy": Score(0.9, 5, baseline={"question_only": 0.6}).as_json(),
        "codes/vrr": Score(0.3, 5).as_json(),
    }
    merged = merge_baselines(
        scores, {"pixel_codes": {"qa/accuracy": {"value": 0.7}, "other": {"value": 1.0}}}
    )
    assert merged["qa/accuracy"]["baseline"] == {"question_only": 0.6, "pixel_codes": 0.7}
    assert merged["codes/vrr"]["baseline"] == {}
    assert "other" not in merged
    same = merge_baselines(
        {"zero_shot/accuracy": Score(0.9, 5).as_json()},
        {"x": {"zero_shot/accuracy": {"value": 0.9}}},
    )
    assert same["zero_shot/accuracy"]["baseline"] == {}  # the run shares the encoder
    # the record itself is left alone
    assert scores["qa/accuracy"]["baseline"] == {"question_only": 0.6}
