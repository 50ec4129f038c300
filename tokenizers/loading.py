"""Opening a saved tokenizer without knowing which system it is."""

from __future__ import annotations

import os
from typing import Any

from smalti.errors import ArtifactError
from smalti.tokenizers import dualtoken, semhitok, unicode2
from smalti.tokenizers.saved import read_config

SYSTEMS: dict[str, Any] = {
    semhitok.SYSTEM: semhitok.SemHiTok,
    dualtoken.SYSTEM: dualtoken.DualToken,
    unicode2.SYSTEM: unicode2.Unicode2,
}


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer saved in a folder or URL, in float32 on the CPU, in eval mode.

    ArtifactError: no tokenizer there, a torn one, or a system that this version does not know.
    """
    source = os.fspath(path)
    system = read_config(source).get("system")
    if system not in SYSTEMS:
        raise ArtifactError(
            f"{source} holds a tokenizer of the system {system!r}; this version knows {', '.join(sorted(SYSTEMS))}. "
            "Is it a tokenizer's folder (such as <out>/tokenizer), or made by a newer version?"
        )
    return SYSTEMS[system].from_pretrained(source)
