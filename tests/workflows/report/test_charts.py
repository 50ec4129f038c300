"""Charts: axes, and data that is hard to draw."""

from __future__ import annotations

from smalti.workflows.report.charts import YRange, line_chart, rank_chart, thin, y_range


def test_a_first_point_far_from_the_others_does_not_flatten_the_curve() -> None:
    falling = [5.0 + 0.01 * step for step in range(50)]
    assert y_range(falling) == YRange(min(falling), max(falling))
    decades = y_range([1000.0, *(100 / step for step in range(1, 50))])
    assert decades.log and decades.note == "log scale" and decades.high == 1000
    cut = y_range([1000.0, *falling])
    assert not cut.log and cut.high < 6 and cut.note == "1 point outside, to 1k"
    assert "1 point outside, to 1k" in line_chart(
        [(float(x), y) for x, y in enumerate([1000.0, *falling])], "loss"
    )
    assert y_range([-900.0, *falling]).low > 4
    assert y_range([0.0, 5.0, 5.0]) == YRange(0.0, 5.0)


def test_charts_of_odd_data() -> None:
    assert line_chart([], "nothing") == ""
    assert line_chart([(1, float("nan"))], "nothing") == ""
    assert "polyline" in line_chart([(3, 2.0)], "one point")
    assert "polyline" in line_chart([(1, 5.0), (2, 5.0)], "constant")
    assert "&lt;b&gt;" in line_chart([(1, 1.0), (2, 2.0)], "<b>")
    assert rank_chart([(1, 0)], "unused") == ""
    assert "polygon" in rank_chart([(1, 1)], "one code used once")
    assert len(thin([(float(i), 1.0) for i in range(10_001)])) <= 400
