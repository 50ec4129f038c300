"""Language models born in parts under ZeRO-3: no rank ever holds all rows of the vocabulary's
matrices.

A published model is read by transformers' own ZeRO-3 loading (rank 0 reads, each rank keeps its
part). Its embedding and head are then grown to the flat vocabulary range by range: every rank makes
the same rows, from the same seeds, and keeps what falls into its part, so the rows do not depend on
the number of workers.

Axes: V rows, n rows of a range, H width; P numbers of this rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smalti.mllm.rows import Rows, WholeRows
from smalti.workflows.train.collectives import Collectives

STEP = 4096
"""Rows of a range: what a rank holds at once beside its part."""


@contextmanager
def partitioned_loading(config: dict[str, Any], collectives: Collectives) -> Iterator[Partitioned]:
    """Within, `from_pretrained` gives models in parts; what it yields makes and fills further
    matrices in parts.

    config: DeepSpeed's, of stage 3. torch.distributed must be initialised.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(), dist_init_required=False
    )
    kept = HfDeepSpeedConfig(config)  # transformers looks at it as long as it is held
    try:
        yield Partitioned(
            deepspeed.zero.Init(config_dict_or_path=config, enabled=False), collectives
        )
    finally:
        del kept
        unset_hf_deepspeed_config()


class PartRows:
    """Rows of a parameter of which each rank holds a part: a run of its numbers, row after row."""

    step: int | None = STEP

    def __init__(self, parameter: Any, collectives: Collectives, device: torch.device) -> None:
        self.parameter, self.collectives, self.device = parameter, collectives, device
        self.width = parameter.ds_shape[1]
        self.part_P = parameter.ds_tensor
        self.first = collectives.rank * self.part_P.ds_numel

    def _overlap(self, start: int, stop: int) -> tuple[slice, slice]:
        """Of rows start to stop, what this rank holds: places in its part, and in the range's
        numbers.
        """
        low = max(start * self.width, self.first)
        high = max(low, min(stop * self.width, self.first + self.part_P.ds_numel))
        return slice(low - self.first, high - self.first), slice(
            low - start * self.width, high - start * self.width
        )

    @torch.no_grad()
    def read(self, start: int, stop: int) -> Tensor:
        """Gathered from all ranks."""
        own, there = self._overlap(start, stop)
        rows = torch.zeros((stop - start) * self.width, dtype=self.part_P.dtype, device=self.device)
        rows[there] = self.part_P[own].to(self.device)
        return self.collectives.all_reduce(rows).view(stop - start, self.width)

    @torch.no_grad()
    def write(self, start: int, rows_nH: Tensor) -> None:
        own, there = self._overlap(start, start + len(rows_nH))
        self.part_P[own] = rows_nH.reshape(-1)[there].to(self.part_P)


class Partitioned:
    """Matrices in parts; see `smalti.mllm.rows.Matrices`.

    One that is still whole is read as it is.
    """

    def __init__(self, init: Any, collectives: Collectives) -> None:
        self.init, self.collectives = init, collectives

    def rows(self, parameter: Any) -> Rows:
        if not hasattr(parameter, "ds_tensor"):
            return WholeRows(parameter)
        return PartRows(parameter, self.collectives, self.init.local_device)

    def shape(self, parameter: Any) -> tuple[int, ...]:
        return tuple(getattr(parameter, "ds_shape", parameter.shape))

    def empty(self, like: nn.Parameter, total: int) -> nn.Parameter:
        """This rank's part of a new matrix (zeros), as `zero.Init` would leave it, but the whole is
        never laid out.
        """
        from deepspeed.runtime.zero.partition_parameters import (
            PartitionedParamStatus,
            ZeroParamStatus,
        )

        nothing = torch.zeros(1, dtype=like.dtype, device=self.init.local_device)
        new: Any = nn.Parameter(
            nothing.expand(total, self.shape(like)[1])
        )  # a shape without storage
        self.init._convert_to_deepspeed_param(new)
        size, device = self.init._aligned_size(new), self.init.local_device
        held = "cpu" if self.init.remote_device == "cpu" else device
        part_P: Any = torch.zeros(
            size // self.collectives.world_size, dtype=like.dtype, device=held
        )
        part_P.ds_numel, part_P.final_location, part_P.status = (
            len(part_P),
            None,
            PartitionedParamStatus.AVAILABLE,
        )
        new.ds_tensor, new.ds_numel_aligned = part_P, size
        new.data = torch.empty(0, dtype=like.dtype, device=device)
        new.ds_status = ZeroParamStatus.NOT_AVAILABLE
        return new
