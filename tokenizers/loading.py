"""Load a saved tokenizer of any system."""

from __future__ import annotations

import os
from typing import Any

from smalti.errors import ArtifactError
from smalti.tokenizers import dualtoken, semhitok, unicode2
from smalti.tokenizers.saved import SavedTokenizer, read_config

SYSTEMS: dict[str, type[SavedTokenizer]] = {
    semhitok.SYSTEM: semhitok.SemHiTok,
    dualtoken.SYSTEM: dualtoken.DualToken,
    unicode2.SYSTEM: unicode2.Unicode2,
}


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Load the tokenizer in a folder or URL: float32, on the CPU, in eval mode.

    Raises:
        ArtifactError: if it is missing, damaged, or of a system that this version does not know.
    """
    source = os.fspath(path)
    system = read_config(source).get("system")
    if system not in SYSTEMS:
        raise ArtifactError(
            f"{source} holds a tokenizer of the system {system!r}; this version knows {', '.join(sorted(SYSTEMS))}. "
            "Is it a tokenizer's folder (such as <out>/tokenizer), or written by a newer version?"
        )
    return SYSTEMS[system].from_pretrained(source)
