"""Base class of saved tokenizers, and their folder: config.json, model.safetensors, encoder/."""

from __future__ import annotations

import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smalti import storage
from smalti.errors import ArtifactError, VocabularyError
from smalti.tokenizers.encoders import VisionEncoder

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
ENCODER_NAME = "encoder"


class SavedTokenizer(nn.Module, ABC):
    """Base of a trained tokenizer, always in eval mode.

    A system sets `system` and `format` and implements `grid`, `config_dict` and `_load`.
    """

    system = ""
    format = 1
    has_decoder = True
    encoder: VisionEncoder | None

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    @property
    @abstractmethod
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""

    @property
    def num_tokens(self) -> int:
        """T, tokens per image."""
        return self.grid[0] * self.grid[1]

    @abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""

    def _saved(self) -> tuple[Mapping[str, Tensor], VisionEncoder | None]:
        """The state dict to save, and the encoder, which has its own folder."""
        return self.state_dict(), self.encoder

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors and encoder/ to a folder or URL."""
        write_folder(os.fspath(path), self.config_dict(), *self._saved())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """Load what `save_pretrained` wrote, in float32 on the CPU.

        Raises:
            ArtifactError: if it is missing, damaged or of another system.
        """
        source = os.fspath(path)
        config = read_config(source)
        check_format(config, source, cls.system, cls.format)
        with storage.local_copy(source) as folder:
            return cls._load(config, os.fspath(folder), source)

    @classmethod
    @abstractmethod
    def _load(cls, config: Mapping[str, Any], folder: str, source: str) -> Self:
        """Load from a local folder; `source` is its name in errors (ArtifactError)."""


def write_folder(
    target: str,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    encoder: VisionEncoder | None,
) -> None:
    """Write a tokenizer to a folder or URL.

    config.json is written last: a folder without it is incomplete.

    Args:
        state: its state dict; names `encoder.…` are left to `encoder`.
    """
    tensors = {
        n: t.detach().cpu().contiguous() for n, t in state.items() if not n.startswith("encoder.")
    }
    storage.make_dirs(target)
    with tempfile.TemporaryDirectory(prefix="smalti-") as folder:
        save_file(tensors, os.path.join(folder, WEIGHTS_NAME), metadata={"format": "pt"})
        if encoder is not None:
            encoder.save_tower(os.path.join(folder, ENCODER_NAME))
            storage.make_dirs(storage.join(target, ENCODER_NAME))
        for base, _, names in os.walk(folder):
            for name in sorted(names):
                source = os.path.join(base, name)
                parts = os.path.relpath(source, folder).split(os.sep)
                # streamed: a codebook may have gigabytes
                storage.put_file(source, storage.join(target, *parts))
    storage.write_json(storage.join(target, CONFIG_NAME), dict(config))


def read_config(source: str) -> dict[str, Any]:
    """config.json of a saved tokenizer.

    Raises:
        ArtifactError: if it is missing, or not a JSON object.
    """
    path = storage.join(source, CONFIG_NAME)
    if not storage.exists(path):
        raise ArtifactError(
            f"{source} holds no tokenizer: {CONFIG_NAME} is missing. Expected a folder written by save_pretrained, "
            "such as <out>/tokenizer. If the run stopped before that stage finished, run the same command to resume."
        )
    try:
        config = storage.read_json(path)
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ArtifactError(
            f"{path} holds a {type(config).__name__}, expected a tokenizer's config."
        )
    return config


def check_format(config: Mapping[str, Any], source: str, system: str, number: int) -> None:
    """Check the system and the format of a config; ArtifactError for another."""
    if config.get("system") != system or config.get("format") != number:
        raise ArtifactError(
            f"{source} holds a {config.get('system')!r} tokenizer of format {config.get('format')!r}, expected "
            f"{system!r} of format {number}."
        )


def checked_codes(
    codes: Tensor, num_codes: int, grid: tuple[int, int] | None, inner: tuple[int, ...] = ()
) -> Tensor:
    """Check that codes belong to a tokenizer, and return them.

    Args:
        grid: rows and columns; codes are then (B, T, *inner), else (…, *inner).
        inner: shape of a token's codes.

    Raises:
        VocabularyError: for another shape, no integers, or codes outside [0, num_codes).
    """
    found = (
        f"{tuple(codes.shape)} {codes.dtype}" if isinstance(codes, Tensor) else type(codes).__name__
    )
    num_tokens = "T" if grid is None else grid[0] * grid[1]
    wanted = ", ".join(map(str, ("B", num_tokens, *inner)))
    if (
        not isinstance(codes, Tensor)
        or codes.is_floating_point()
        or codes.is_complex()
        or codes.dtype == torch.bool
    ):
        raise VocabularyError(f"Codes are {found}, expected an integer tensor ({wanted}).")
    if grid is not None and (
        codes.ndim != 2 + len(inner) or codes.shape[1:] != (num_tokens, *inner)
    ):
        raise VocabularyError(
            f"Codes are {found}, expected ({wanted}): {grid[0]}x{grid[1]} tokens per image."
        )
    if inner and tuple(codes.shape[-len(inner) :]) != inner:
        raise VocabularyError(
            f"Codes are {found}, expected ({wanted}): the last axes are those of one token."
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= num_codes):
        raise VocabularyError(
            f"Codes lie in [{int(codes.min())}, {int(codes.max())}], but this tokenizer has {num_codes}, from 0 on. "
            "Subtract the first visual id of the vocabulary, or use the tokenizer that made the codes."
        )
    return codes


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names start with `prefix`, which is removed."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
