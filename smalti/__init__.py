"""smalti: visual vocabularies for unified multimodal models, and those models, on Ray.

The folders `tokenizers/`, `mllm/`, `workflows/` and `tune/` lie at the root of the checkout and are
imported as `smalti.tokenizers`, `smalti.mllm`, …: `smalti/` holds a relative link to each of them,
and a wheel the folders themselves. `tokenizers/` has no `__init__.py`: with one, it would hide
Hugging Face's package of that name from every process started at the root.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["__version__", "load_codebook", "load_tokenizer"]

if TYPE_CHECKING:
    from smalti.api import load_codebook, load_tokenizer


def __getattr__(name: str) -> object:
    """Load `smalti.load_tokenizer` and `load_codebook` on first use: they need torch."""
    if name in ("load_codebook", "load_tokenizer"):
        from smalti import api

        return getattr(api, name)
    raise AttributeError(f"module 'smalti' has no attribute {name!r}")
