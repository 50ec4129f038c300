"""Read and write the rows of a vocabulary's matrices in ranges.

A matrix may be whole, or partitioned over ranks (ZeRO-3).

Axes: V rows of the matrix, n rows of a range, H its width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

NOISE_ROWS = 65_536
"""Rows of noise drawn at once for a whole matrix.

Smaller ranges draw the same numbers one after the other, provided that each holds a multiple of 16
of them.
"""


class Rows(Protocol):
    """A matrix (V, H), accessed by ranges of rows.

    In a parallel run every rank calls the same methods with the same ranges.
    """

    step: int | None
    """Largest number of rows of a range; None: no limit."""

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive): (n, H)."""

    def write(self, start: int, rows_nH: Tensor) -> None:
        """Set n rows, the first of them `start`."""


class Matrices(Protocol):
    """How matrices are stored: whole on every rank, or partitioned."""

    def rows(self, parameter: Tensor) -> Rows:
        """The rows of an existing matrix."""

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The shape of the whole matrix."""

    def empty(self, like: nn.Parameter, total: int) -> nn.Parameter:
        """An uninitialised matrix of `total` rows; width, dtype and device as `like`."""


class WholeRows:
    """Rows of a tensor."""

    step: int | None = None

    def __init__(self, matrix_VH: Tensor) -> None:
        self.matrix_VH = matrix_VH

    def read(self, start: int, stop: int) -> Tensor:
        return self.matrix_VH[start:stop]

    @torch.no_grad()
    def write(self, start: int, rows_nH: Tensor) -> None:
        self.matrix_VH[start : start + len(rows_nH)] = rows_nH.to(self.matrix_VH)


class WholeMatrices:
    """Matrices that are whole on every rank."""

    def rows(self, parameter: Tensor) -> Rows:
        return WholeRows(parameter)

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def empty(self, like: nn.Parameter, total: int) -> nn.Parameter:
        return nn.Parameter(like.new_empty((total, like.shape[1])))


@torch.no_grad()
def grow(
    old: Rows, new: Rows, keep: int, total: int, width: int, generator: torch.Generator
) -> None:
    """Fill a new matrix: copy the first rows, draw the others.

    Args:
        keep: rows that are copied from `old`.
        total: rows of `new`. Those from `keep` on are normal, with the mean vector and the standard
            deviation of the copied ones.
        width: H.
        generator: source of the noise.
    """
    sum_H = torch.zeros(())
    for start, stop in ranges(0, keep, old.step):
        sum_H = sum_H + old.read(start, stop).float().sum(0)
    mean_H = sum_H / keep
    squares = torch.zeros(())
    for start, stop in ranges(0, keep, old.step):
        squares = squares + (old.read(start, stop).float() - mean_H).pow(2).sum()
    deviation = (squares / (keep * width)).sqrt()
    for start, stop in ranges(0, keep, old.step):
        new.write(start, old.read(start, stop))
    for start, stop in ranges(keep, total, new.step or NOISE_ROWS):
        noise_nH = torch.randn((stop - start, width), generator=generator).to(mean_H.device)
        new.write(start, mean_H + deviation * noise_nH)


@torch.no_grad()
def root_mean_square(rows: Rows, count: int) -> Tensor:
    """Root mean square of the first `count` rows, 0-d float32; `count` is at least 1."""
    squares = torch.zeros(())
    width = 0
    for start, stop in ranges(0, count, rows.step):
        rows_nH = rows.read(start, stop).float()
        squares = squares + rows_nH.pow(2).sum()
        width = rows_nH.shape[1]
    return (squares / (count * width)).sqrt()


def ranges(start: int, stop: int, step: int | None) -> Iterator[tuple[int, int]]:
    """(start, stop) pairs that cover a range; none for an empty one."""
    step = step or max(1, stop - start)
    return ((at, min(at + step, stop)) for at in range(start, stop, step))
