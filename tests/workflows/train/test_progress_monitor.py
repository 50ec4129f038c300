"""The throughput as the progress line shows it."""

from __future__ import annotations

from smalti.workflows.train.progress_monitor import rates


def test_the_progress_line_shows_rates_with_their_units() -> None:
    found = {"samples_per_s": 1.6, "data_wait": 0.25, "tokens_per_s": 15.0, "mfu": 0.375}
    shown = rates(found | {"memory_gb": 1.25})
    assert shown == {
        "samples/s": "2",
        "tokens/s": "15",
        "MFU": "37.5%",
        "waiting": "25%",
        "memory": "1.2 GB",
    }
