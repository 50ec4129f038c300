"""smalti: visual vocabularies for unified multimodal models, and those models, on Ray.

The rooms of the house stand at the root of the checkout (`tokenizers/`, `mllm/`, `workflows/`, `tune/`), and are
imported as `smalti.tokenizers`, `smalti.mllm`, …: this package's `__path__` also names the root. A wheel holds them
inside the package, and there the root is `site-packages`: it must stay off the path, because Hugging Face's
`tokenizers` there is a regular package and would win over our folder, which has no `__init__.py` (with one, it would
hide Hugging Face's from every process started at the root).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load_codebook", "load_tokenizer"]

_PACKAGE = Path(__file__).resolve().parent
ROOMS = ("tokenizers", "mllm", "workflows", "tune")


def _is_checkout(package: Path) -> bool:
    """True when the rooms stand beside `package` (a checkout, or one that Ray unpacked), not inside it (a wheel)."""
    root = package.parent
    return not (package / "tokenizers").is_dir() and (root / "tokenizers" / "loading.py").is_file()


if _is_checkout(_PACKAGE) and str(_PACKAGE.parent) not in __path__:
    __path__.append(str(_PACKAGE.parent))

if TYPE_CHECKING:
    from smalti.api import load_codebook, load_tokenizer


def __getattr__(name: str) -> Any:
    """`smalti.load_tokenizer` and `load_codebook`, loaded on first use: they need torch, and most of the base does not."""
    if name in ("load_codebook", "load_tokenizer"):
        from smalti import api

        return getattr(api, name)
    raise AttributeError(f"module 'smalti' has no attribute {name!r}")
