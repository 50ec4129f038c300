"""What `import smalti` offers to other people's Python.

Rooms above the base are imported on use only.
"""

from __future__ import annotations

from typing import Any


def load_tokenizer(path: str) -> Any:
    """The visual tokenizer saved at `path` (a folder or URL; any system), on CPU, in eval mode.

    It offers `encode(pixels)`, `decode(codes)`, `embed(codes)`, `num_codes`, `grid` and
    `save_pretrained(path)`. Raises `ArtifactError` when no tokenizer stands there.
    """
    from smalti.tokenizers.loading import load_tokenizer as load

    return load(path)


def load_codebook(path: str) -> Any:
    """The codes of the codebook artifact at `path` (a folder or URL), on CPU, as a `CodeIndex` with
    its tree.

    `nearest(x)` searches as much of the tree as the stage found to reach `codebook.recall`
    (`probes`), `exact(x)` all codes: both give the codes of vectors (N, C), int64 (N,), and their
    squared distances. Raises `ArtifactError` when no codebook stands there.
    """
    from smalti.artifact import Artifact
    from smalti.tokenizers.codebook import load_index

    return load_index(Artifact.load(path).path)
