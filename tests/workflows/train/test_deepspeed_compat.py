"""The internals of DeepSpeed that training depends on are those of the installed version."""

from __future__ import annotations

import importlib.metadata
import inspect

import pytest

from smalti.errors import ConfigError
from smalti.workflows.train.deepspeed_compat import check_version


def test_the_installed_version_is_known() -> None:
    check_version(importlib.metadata.version("deepspeed"))


@pytest.mark.parametrize("version", ["0.18.9", "0.20.0", "1.19.1", "main"])
def test_another_version_is_refused_with_what_to_install(version: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"DeepSpeed {version} is installed.*0\.19\.x.*pip install"
    ):
        check_version(version)


def test_the_optimizers_have_what_is_patched() -> None:
    from deepspeed.runtime.utils import combine_grad_norm_groups
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    for name in ("scaled_global_norm", "check_overflow", "_wait_for_offload_copies"):
        assert callable(getattr(DeepSpeedZeroOptimizer, name)), name
    for name in ("_get_norm_groups", "step"):
        assert callable(getattr(DeepSpeedZeroOptimizer_Stage3, name)), name
    # The source of the class: `step` of stage 3 is decorated, and getsource of it shows the
    # wrapper.
    for name in ("self.check_grad_overflow", "self.check_overflow(", "self.scaled_global_norm()"):
        assert name in inspect.getsource(DeepSpeedZeroOptimizer.step), name
    assert "norm_groups = self._get_norm_groups()" in inspect.getsource(
        DeepSpeedZeroOptimizer_Stage3
    )
    assert callable(combine_grad_norm_groups)
