"""Pack sequences into the rows of a batch.

Best fit into rows of about one length, which are then made as narrow as possible. The sequences of
a row do not see each other (`visible_mask`), and each starts at position 0: so packing changes the
cost of a batch and nothing else. Which samples a step has is up to the training order.

Axes: B rows of the batch, L positions of a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

WIDEST = 1.5
"""Widest row allowed, as a multiple of `room`.

Positions restart with each sequence, so a wide row is no longer context.
"""


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack sequences into rows of about `room` places, with the least area.

    A batch is as wide as its fullest row. For each number of rows, the narrowest width is searched
    at which best fit needs no more rows. Among the widths of up to `WIDEST` times `room` (or the
    longest sequence), the least area wins, then the narrowest: what would be a half-empty last row
    is spread over all rows. The result is deterministic.

    Args:
        lengths: length of each sequence.
        room: intended width of a row.

    Returns:
        The indices of the sequences in each row; no rows for no lengths.
    """
    if not lengths:
        return []
    total = sum(lengths)
    widest = max(int(WIDEST * room), *lengths)
    within = best_fit(lengths, max(room, *lengths))
    found = [(within, width_of(within, lengths))]
    fewest = max(1, -(-total // widest))
    most = round(total / room) + 1
    found += [narrowest(lengths, num) for num in range(fewest, most + 1)]
    areas = [(len(rows) * width, width, rows) for rows, width in found if width <= widest]
    return min(areas, key=lambda one: one[:2])[2]


def narrowest(lengths: Sequence[int], num: int) -> tuple[list[list[int]], int]:
    """At most `num` rows by best fit, and the least width that allows it.

    The width is found by bisection.
    """
    low = max(max(lengths), -(-sum(lengths) // num))
    high = sum(lengths)
    rows = [list(range(len(lengths)))]
    while low < high:
        middle = (low + high) // 2
        narrower = best_fit(lengths, middle)
        if len(narrower) <= num:
            rows = narrower
            high = middle
        else:
            low = middle + 1
    return rows, width_of(rows, lengths)


def width_of(rows: Sequence[Sequence[int]], lengths: Sequence[int]) -> int:
    """Number of places of the fullest row."""
    return max(sum(lengths[index] for index in row) for row in rows)


def best_fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack sequences into rows of `room` places by best fit.

    The longest sequence comes first; each goes into the fullest row that has room for it. A
    sequence longer than `room` gets a row of its own. The result is deterministic.

    Returns:
        The indices of the sequences in each row; every index is in exactly one row.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (places left, row), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(open_rows, (lengths[index], -1))
        if at < len(open_rows):
            left, row = open_rows.pop(at)
            rows[row].append(index)
        else:
            left = room
            row = len(rows)
            rows.append([index])
        insort(open_rows, (left - lengths[index], row))
    return rows


def visible_mask(documents_BL: Tensor, segments_BL: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive attention mask of packed rows: (B, 1, L, L).

    Attention is causal and stays within a document. There, segment k > 0 sees itself and the shared
    segment 0, not the other segments. Document −1 is padding, which sees only itself: a row without
    any key would be NaN.
    """
    length = segments_BL.shape[1]
    device = segments_BL.device
    queries_BL1 = segments_BL[:, :, None]
    keys_B1L = segments_BL[:, None, :]
    seen_BLL = documents_BL[:, :, None] == documents_BL[:, None, :]
    seen_BLL &= (documents_BL >= 0)[:, :, None]
    seen_BLL &= (keys_B1L == queries_BL1) | (keys_B1L == 0)
    seen_BLL &= torch.ones(length, length, dtype=torch.bool, device=device).tril()
    seen_BLL |= torch.eye(length, dtype=torch.bool, device=device)
    mask_BLL = torch.zeros(seen_BLL.shape, dtype=dtype, device=device)
    return mask_BLL.masked_fill_(~seen_BLL, torch.finfo(dtype).min)[:, None]
