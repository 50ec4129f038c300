"""Errors of loading engines and of universal checkpoints."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from smalti.errors import TrainingError
from smalti.workflows.train import reshard


def test_an_engine_that_does_not_load_is_one_error_and_a_lost_connection_stays_what_it_is(
    monkeypatch,
) -> None:
    def engine(error: Exception) -> SimpleNamespace:
        return SimpleNamespace(load_checkpoint=lambda folder, tag: (_ for _ in ()).throw(error))

    with pytest.raises(
        TrainingError, match=r"the checkpoint s3://x/step-5/model \(AssertionError: no files\)"
    ):
        reshard.load_engine(
            engine(AssertionError("no files")), "here", "tag", shown="s3://x/step-5/model"
        )
    with pytest.raises(TrainingError, match="it does not exist"):
        reshard.load_engine(
            SimpleNamespace(load_checkpoint=lambda *a, **k: (None, {})), "here", "tag", shown="x"
        )
    with pytest.raises(RuntimeError, match="Connection closed"):
        reshard.load_engine(
            engine(RuntimeError("Connection closed by peer")), "here", "tag", shown="x"
        )

    for error in (
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:5] x"),
    ):
        full = SimpleNamespace(main=lambda asked, error=error: (_ for _ in ()).throw(error))
        monkeypatch.setitem(
            sys.modules, "deepspeed.checkpoint", SimpleNamespace(ds_to_universal=full)
        )
        with pytest.raises(TrainingError, match=r"room there for all weights .* set TMPDIR"):
            reshard._convert("here", "there", "x")
