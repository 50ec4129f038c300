"""Tensors in safetensors files, written and read without a second copy of them in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from smalti import storage
from smalti.errors import DataError

DTYPES = {"F64": torch.float64, "I64": torch.int64, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNED = 8  # bytes that the header's length is a multiple of
_READ = 1 << 24  # bytes read at once: a store's client holds as many beside


def write(path: str, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of float64, int64 and float32 tensors on the CPU, whole or absent,
    streamed from where they lie.

    Errors: DataError, as `storage.atomic_file`.
    """
    flat = {key: _bytes_of(value.contiguous()) for key, value in tensors.items()}
    # each aligned to its numbers
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))
    header = {}
    end = 0
    for key in order:
        start = end
        end = end + len(flat[key])
        shape = list(tensors[key].shape)
        header[key] = {
            "dtype": _NAMES[tensors[key].dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with storage.atomic_file(path) as temp, open(temp, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            file.write(flat[key])


def read(path: str) -> dict[str, Tensor]:
    """The tensors of such a file.

    Not mapped: the file may be removed, on any file system, while they are held.

    Raises:
        DataError: if the file is missing or truncated, or holds another dtype.
    """
    found: dict[str, Tensor] = {}
    try:
        with storage.open_read(path) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _READ:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
            header.pop("__metadata__", None)
            for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                found[key] = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
                left = _bytes_of(found[key])
                while len(left):
                    got = file.readinto(left[:_READ])  # type: ignore[attr-defined]
                    if not got:
                        raise ValueError(f"it ends within {key}")
                    left = left[got:]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(
            f"{path} is not a complete file of float64, int64 and float32 tensors ({error!r}): remove it and run the stage again"
        ) from error
    return found


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.flatten().view(torch.uint8).numpy().data
