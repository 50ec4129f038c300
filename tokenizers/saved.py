"""What every system's tokenizer shares: its folder on disk (config.json, model.safetensors, encoder/) and what opens it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from typing import Any, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from smalti import storage
from smalti.errors import ArtifactError, VocabularyError
from smalti.tokenizers.encoders import VisionEncoder

CONFIG_NAME, WEIGHTS_NAME, ENCODER_NAME = "config.json", "model.safetensors", "encoder"


class SavedTokenizer(nn.Module):
    """Base of a whole tokenizer, in eval mode for good: its parts are trained before they are put together.

    A system sets `system` and `format`, has a `grid`, and gives `config_dict` and `_load`.
    """

    system, format = "", 1
    has_decoder = True
    encoder: Any

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        """T, tokens an image."""
        return self.grid[0] * self.grid[1]

    def config_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        raise NotImplementedError

    def _saved(self) -> tuple[Mapping[str, Tensor], VisionEncoder | None]:
        """The state that is saved, and the encoder, which gets a folder of its own."""
        return self.state_dict(), self.encoder

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors and encoder/ into a folder or URL; it then stands on its own."""
        write_folder(os.fspath(path), self.config_dict(), *self._saved())

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """Load what `save_pretrained` wrote, in float32 on the CPU. ArtifactError: missing, torn or another system."""
        source = os.fspath(path)
        config = read_config(source)
        check_format(config, source, cls.system, cls.format)
        with storage.local_copy(source) as folder:
            return cls._load(config, os.fspath(folder), source)

    @classmethod
    def _load(cls, config: Mapping[str, Any], folder: str, source: str) -> Self:
        """From a local folder. `source`: its name for errors (ArtifactError)."""
        raise NotImplementedError


def write_folder(
    target: str, config: Mapping[str, Any], state: Mapping[str, Tensor], encoder: VisionEncoder | None
) -> None:
    """Write a tokenizer into a folder or URL. `state`: its state dict, of which `encoder.…` goes to encoder/.

    config.json comes last: a folder without one was not finished.
    """
    tensors = {n: t.detach().cpu().contiguous() for n, t in state.items() if not n.startswith("encoder.")}
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
                storage.put_file(source, storage.join(target, *parts))  # never read whole: a codebook may be gigabytes
    storage.write_json(storage.join(target, CONFIG_NAME), dict(config))


def read_config(source: str) -> dict[str, Any]:
    """config.json of a saved tokenizer. ArtifactError: none there, or no JSON object."""
    path = storage.join(source, CONFIG_NAME)
    if not storage.exists(path):
        raise ArtifactError(
            f"{source} holds no tokenizer: {CONFIG_NAME} is missing. Expected a folder written by save_pretrained, "
            "such as <out>/tokenizer; if the run stopped before that stage was done, run it again."
        )
    try:
        config = storage.read_json(path)
    except ValueError as error:
        raise ArtifactError(f"{path} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path} holds a {type(config).__name__}, expected a tokenizer's config.")
    return config


def check_format(config: Mapping[str, Any], source: str, system: str, number: int) -> None:
    """ArtifactError unless a config is of this system and format."""
    if config.get("system") != system or config.get("format") != number:
        raise ArtifactError(
            f"{source} holds a {config.get('system')!r} tokenizer of format {config.get('format')!r}, expected "
            f"{system!r} of format {number}."
        )


def checked_codes(codes: Tensor, num_codes: int, grid: tuple[int, int] | None, inner: tuple[int, ...] = ()) -> Tensor:
    """The codes, or VocabularyError: no integer tensor, with a grid not (B, T, *inner), without one not (…, *inner), codes
    outside [0, num_codes)."""
    found = f"{tuple(codes.shape)} {codes.dtype}" if isinstance(codes, Tensor) else type(codes).__name__
    num_tokens = "T" if grid is None else grid[0] * grid[1]
    wanted = ", ".join(map(str, ("B", num_tokens, *inner)))
    if not isinstance(codes, Tensor) or codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise VocabularyError(f"Codes are {found}, expected an integer tensor ({wanted}).")
    if grid is not None and (codes.ndim != 2 + len(inner) or codes.shape[1:] != (num_tokens, *inner)):
        raise VocabularyError(f"Codes are {found}, expected ({wanted}): {grid[0]}x{grid[1]} tokens an image.")
    if inner and tuple(codes.shape[-len(inner) :]) != inner:
        raise VocabularyError(f"Codes are {found}, expected ({wanted}): the last axes are those of one token.")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= num_codes):
        raise VocabularyError(
            f"Codes lie in [{int(codes.min())}, {int(codes.max())}], but this tokenizer has {num_codes}, "
            "from 0 on. Subtract the vocabulary's first visual id, or take the tokenizer that made them."
        )
    return codes


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with the prefix, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
