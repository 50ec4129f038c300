"""Tensors in safetensors files, written and read without a second copy of them in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import Tensor

from smalti import storage

_NAMES = {torch.float64: "F64", torch.int64: "I64", torch.float32: "F32"}
_ALIGNED = 8  # bytes that the header's length is a multiple of


def write(path: str, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of float64, int64 and float32 tensors on the CPU, whole or absent, streamed from where they lie.

    Errors: DataError, as `storage.write_atomic`.
    """
    flat = {key: value.contiguous().flatten().view(torch.uint8) for key, value in tensors.items()}
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))  # each aligned to its numbers
    header, end = {}, 0
    for key in order:
        start, end = end, end + len(flat[key])
        shape = list(tensors[key].shape)
        header[key] = {"dtype": _NAMES[tensors[key].dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with storage.atomic_file(path) as temp, open(temp, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(flat[key].numpy().data)


def read(path: str) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory: pages come when they are looked at, and writes to them stay here.

    Errors: DataError, no such file.
    """
    with storage.local_copy(path) as local:
        return load_file(local)
