"""Language models that are partitioned from the start (ZeRO-3).

No rank ever has all rows of the vocabulary's matrices. transformers' own ZeRO-3 loading reads a
published model: rank 0 reads, and each rank keeps its part. The embedding and the head are then
extended to the flat vocabulary in ranges of rows: every rank draws the same rows from the same
seeds and keeps those in its part, so the rows do not depend on the number of workers.

Axes: V rows, n rows of a range, H width; P numbers of this rank's part.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from smalti.mllm.rows import Rows, WholeRows
from smalti.workflows.train.collectives import Collectives
from smalti.workflows.train.deepspeed_compat import (
    empty_partitioned,
    full_numel,
    full_shape,
    partition_of,
)

if TYPE_CHECKING:
    from deepspeed.runtime.zero.partition_parameters import Init

    from smalti.workflows.train.engines import DeepSpeedConfig

STEP = 4096
"""Rows of a range: what a rank holds at once beside its part."""


@contextmanager
def partitioned_loading(
    config: DeepSpeedConfig, collectives: Collectives
) -> Iterator[PartitionedMatrices]:
    """Within, `from_pretrained` returns partitioned models.

    torch.distributed must be initialised.

    Args:
        config: DeepSpeed's, of stage 3.
        collectives: of the ranks that share the model.

    Yields:
        What creates and fills further partitioned matrices.
    """
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    deepspeed.init_distributed(
        dist_backend=torch.distributed.get_backend(), dist_init_required=False
    )
    active = HfDeepSpeedConfig(config)  # transformers uses it for as long as it is referenced
    try:
        init = deepspeed.zero.Init(config_dict_or_path=config, enabled=False)
        yield PartitionedMatrices(init, collectives)
    finally:
        del active
        unset_hf_deepspeed_config()


class PartitionedRows:
    """Rows of a partitioned matrix.

    Each rank's part is a contiguous run of its numbers, in the order of the rows.
    """

    step: int | None = STEP

    def __init__(
        self, parameter: Tensor, part_P: Tensor, collectives: Collectives, device: torch.device
    ) -> None:
        self.collectives = collectives
        self.device = device
        self.width = full_shape(parameter)[1]
        self.part_P = part_P
        self.size = full_numel(part_P)
        self.first = collectives.rank * self.size

    def _overlap(self, start: int, stop: int) -> tuple[slice, slice]:
        """Numbers of rows start to stop that this rank has.

        Returns:
            Their places in its part, and in the range.
        """
        low = max(start * self.width, self.first)
        high = max(low, min(stop * self.width, self.first + self.size))
        own = slice(low - self.first, high - self.first)
        there = slice(low - start * self.width, high - start * self.width)
        return own, there

    @torch.no_grad()
    def read(self, start: int, stop: int) -> Tensor:
        """Rows gathered from all ranks: (n, H)."""
        own, there = self._overlap(start, stop)
        rows = torch.zeros((stop - start) * self.width, dtype=self.part_P.dtype, device=self.device)
        rows[there] = self.part_P[own].to(self.device)
        return self.collectives.all_reduce(rows).view(stop - start, self.width)

    @torch.no_grad()
    def write(self, start: int, rows_nH: Tensor) -> None:
        own, there = self._overlap(start, start + len(rows_nH))
        self.part_P[own] = rows_nH.reshape(-1)[there].to(self.part_P)


class PartitionedMatrices:
    """Partitioned matrices; see `smalti.mllm.rows.Matrices`. Those that are whole stay so."""

    def __init__(self, init: Init, collectives: Collectives) -> None:
        self.init = init
        self.collectives = collectives

    def rows(self, parameter: Tensor) -> Rows:
        part_P = partition_of(parameter)
        if part_P is None:
            return WholeRows(parameter)
        return PartitionedRows(parameter, part_P, self.collectives, self.init.local_device)

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        return full_shape(parameter)

    def empty(self, like: nn.Parameter, total: int) -> nn.Parameter:
        """This rank's part of a new matrix of zeros; the whole is never allocated."""
        shape = (total, full_shape(like)[1])
        return empty_partitioned(self.init, like.dtype, shape, self.collectives.world_size)
