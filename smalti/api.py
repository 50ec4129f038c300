"""Functions that `import smalti` offers.

Rooms above the base are imported on first use.
"""

from __future__ import annotations

from typing import Any


def load_tokenizer(path: str) -> Any:
    """Load the tokenizer in a folder or URL, on CPU, in eval mode.

    It offers `encode(pixels)`, `decode(codes)`, `embed(codes)`, `num_codes`, `grid` and
    `save_pretrained(path)`.

    Raises:
        ArtifactError: if there is no tokenizer.
    """
    from smalti.tokenizers.loading import load_tokenizer as load

    return load(path)


def load_codebook(path: str) -> Any:
    """Load the codes of a codebook artifact, on CPU, as a `CodeIndex`.

    `nearest(x)` searches as much of the tree as `codebook.recall` needs (`probes`), `exact(x)` all
    codes. Both return the codes of vectors (N, C), int64 (N,), and their squared distances.

    Raises:
        ArtifactError: if there is no codebook.
    """
    from smalti.artifact import Artifact
    from smalti.tokenizers.codebook import load_index

    return load_index(Artifact.load(path).path)
