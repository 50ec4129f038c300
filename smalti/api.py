"""What `import smalti` offers to other people's Python. Rooms above the base are imported on use only."""

from __future__ import annotations

from typing import Any


def load_tokenizer(path: str) -> Any:
    """The visual tokenizer saved at `path` (a folder or URL; any system), on CPU, in eval mode.

    It offers `encode(pixels)`, `decode(codes)`, `embed(codes)`, `num_codes`, `grid` and `save_pretrained(path)`.
    Raises `ArtifactError` when no tokenizer stands there.
    """
    from smalti.tokenizers.loading import load_tokenizer as load

    return load(path)
