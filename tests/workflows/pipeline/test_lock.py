"""Two runs on one place: the second is told; a run that died holds nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from smalti.errors import ArtifactError
from smalti.workflows.pipeline.lock import holding, lock_path

HOLD = "import sys, time\nfrom smalti.workflows.pipeline.lock import holding\nwith holding(sys.argv[1]): print('held', flush=True); time.sleep(60)"


def test_a_second_run_is_told_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    place = str(tmp_path / "out" / "corpus")
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, place], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(
                ArtifactError, match=rf'Another run is writing {place} .*"pid": {other.pid}'
            ),
            holding(place),
        ):
            pass
        with holding(place + "2"):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with (
        holding(place),
        pytest.raises(ArtifactError, match=f'"pid": {os.getpid()}'),
        holding(place),
    ):
        pass
    assert not Path(lock_path(place)).exists()
    with holding("memory://smalti-test/out"):
        pass
