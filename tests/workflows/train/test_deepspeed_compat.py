"""The internals of DeepSpeed that training depends on are those of the installed version."""

from __future__ import annotations

import importlib.metadata
import inspect

import pytest
import torch

from smalti.errors import ConfigError
from smalti.workflows.train.deepspeed_compat import (
    check_version,
    full_numel,
    full_shape,
    import_deepspeed,
    is_replicated,
    partition_of,
)


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


def test_partitioned_parameters_have_what_is_used() -> None:
    from deepspeed.runtime.zero import partition_parameters as found

    assert found.PartitionedParamStatus.AVAILABLE and found.ZeroParamStatus.NOT_AVAILABLE
    for name in ("_convert_to_deepspeed_param", "_aligned_size"):
        assert callable(getattr(found.Init, name)), name
    source = inspect.getsource(found)
    assert "self.local_device =" in source and "self.remote_device =" in source
    for name in (
        "ds_shape",
        "ds_numel",
        "ds_persist",
        "ds_tensor",
        "ds_numel_aligned",
        "ds_status",
    ):
        assert f"param.{name} =" in source, name
    for name in ("ds_numel", "status", "final_location"):
        assert f"ds_tensor.{name} =" in source, name


def test_the_optimizers_have_the_states_that_are_reset() -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    assert callable(DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state)
    source = inspect.getsource(DeepSpeedZeroOptimizer_Stage3)
    for name in ("optimizer", "sub_group_to_group_id", "fp32_partitioned_groups_flat"):
        assert f"self.{name} =" in source, name
    assert "self.optimizer =" in inspect.getsource(DeepSpeedZeroOptimizer)


def test_engines_load_universal_checkpoints_by_a_setting() -> None:
    from deepspeed import DeepSpeedEngine
    from deepspeed.checkpoint import ds_to_universal

    source = inspect.getsource(DeepSpeedEngine.load_universal_checkpoint)
    assert "self._config.load_universal_checkpoint" in source
    assert callable(ds_to_universal.main)
    source = inspect.getsource(ds_to_universal)
    names = ("input_folder", "output_folder", "num_extract_workers", "num_merge_workers")
    for name in (*names, "keep_temp_folder", "strict", "inject_missing_state"):
        assert f"args.{name}" in source, name


def test_the_probe_of_ops_is_an_attribute_that_can_be_set() -> None:
    import_deepspeed()
    import deepspeed.ops

    assert not deepspeed.ops.__compatible_ops__["ShmCommBuilder"]
    assert '"__compatible_ops__"' in inspect.getsource(deepspeed.ops.__getattr__)


def test_a_parameter_that_is_not_partitioned_is_its_own_whole() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    assert full_shape(parameter) == (3, 4)
    assert full_numel(parameter) == 12
    assert is_replicated(parameter)
    assert partition_of(parameter) is None
