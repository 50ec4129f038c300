"""The table of scores in the terminal."""

from __future__ import annotations

from smalti.workflows import report
from smalti.workflows.evaluation.scores.measure_result import Score


def test_table_is_aligned_and_tells_of_goals() -> None:
    scores = {
        "zzz/own": Score(1234.5, 3).as_json(),
        "reconstruction/psnr": Score(23.456, 1000).as_json(),
        "qa/accuracy": Score(
            0.9134, 2000, baseline={"question_only": 0.67, "pixel_codes": 0.7}
        ).as_json()
        | {"goal": 0.9},
    }
    lines = report.table(scores, {"reconstruction/psnr": 24.0}).splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "qa/accuracy",
        "reconstruction/psnr",
        "zzz/own",
    ]
    assert "91.3 %" in lines[2]
    assert "question only 67.0 %, pixel codes 70.0 %" in lines[2]
    assert lines[2].endswith("90.0 % reached")
    assert lines[3].endswith("24.00 dB NOT reached")
    assert "1,234" in lines[4]
    ends = {
        line.index(mark) + len(mark)
        for line, mark in zip(lines[2:], ("2,000", "1,000", "    3"), strict=True)
    }
    assert len(ends) == 1
    assert report.table({}) == "no scores: nothing was measured"


def test_table_leaves_out_columns_that_are_empty() -> None:
    text = report.table({"codes/vrr": Score(0.1, 5).as_json()})
    assert "goal" not in text
    assert "beside" not in text
