"""Scratch folders that killed processes left."""

from __future__ import annotations

import os

from smalti.workflows.train.scratch import Scratch, sweep


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    held = Scratch("checkpoint")
    for name in (
        "smalti-scratch-resume-left",
        "smalti-scratch-universal-left/zero",
        "smalti-other",
        "not-ours",
    ):
        (tmp_path / name).mkdir(parents=True)
    sweep()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["not-ours", "smalti-other", os.path.basename(held.path)]
    held.remove()
    assert not os.path.exists(held.path)
