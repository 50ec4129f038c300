"""Errors that a user can mend. Each message says what was found, what was expected, where, and the mend.

The command line prints the message of a `SmaltiError` without a traceback and exits 1 (`ConfigError`: 2).
All of them take one string, so that they pickle across Ray processes.
"""

from __future__ import annotations


class SmaltiError(Exception):
    """Base of every error that is the user's to mend."""


class ConfigError(SmaltiError):
    """A recipe or an argument is wrong (exit 2)."""


class ArtifactError(SmaltiError):
    """An artifact is missing, half-made, torn, or was made with another config."""


class DataError(SmaltiError):
    """Input data cannot be used as a whole: no usable image, a wrong column, a torn shard."""


class ImageError(SmaltiError):
    """One image cannot be used. `reason` is a short, countable slug such as `truncated`."""

    def __init__(self, message: str, reason: str = "undecodable") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class VocabularyError(SmaltiError):
    """Visual codes, a tokenizer and a language model do not fit together."""


class TrainingError(SmaltiError):
    """A training run failed in a way that the user can mend."""
