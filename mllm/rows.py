"""The rows of a vocabulary's matrices, read and written in ranges, so that a matrix may lie in one
piece or in many.

Axes: V rows of the matrix, n rows of a range, H its width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

NOISE_ROWS = 65_536
"""Rows of noise drawn at once for a whole matrix.

Smaller ranges draw the same numbers one after the other, as long as each holds a multiple of 16 of
them.
"""


class Rows(Protocol):
    """A matrix (V, H) by ranges of rows.

    In a parallel run every rank calls the same methods with the same ranges.
    """

    step: int | None
    """Rows of a range at most; None: any."""

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (exclusive): (n, H)."""

    def write(self, start: int, rows_nH: Tensor) -> None:
        """Set the rows from `start` on."""


class Matrices(Protocol):
    """How matrices lie: whole on every rank, or in parts."""

    def rows(self, parameter: Tensor) -> Rows:
        """The rows of a matrix that there is."""

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Its whole shape."""

    def empty(self, like: nn.Parameter, total: int) -> nn.Parameter:
        """A matrix of the same width, dtype and place with `total` rows that are still to be
        written.
        """


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


class Whole:
    """Matrices in one piece."""

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
    """Fill a new matrix of `total` rows: the first `keep` as they are, the others normal with their
    mean vector and deviation.
    """
    sum_H, squares = torch.zeros(()), torch.zeros(())
    for start, stop in ranges(0, keep, old.step):
        sum_H = sum_H + old.read(start, stop).float().sum(0)
    mean_H = sum_H / keep
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
    """Over all elements of the first `count` rows, in float32."""
    squares: Any = 0.0
    width = 0
    for start, stop in ranges(0, count, rows.step):
        part_nH = rows.read(start, stop).float()
        squares, width = squares + part_nH.pow(2).sum(), part_nH.shape[1]
    return (squares / (count * width)).sqrt()


def ranges(start: int, stop: int, step: int | None) -> Iterator[tuple[int, int]]:
    """(start, stop) pairs that cover a range; nothing for an empty one."""
    step = step or max(1, stop - start)
    return ((at, min(at + step, stop)) for at in range(start, stop, step))
