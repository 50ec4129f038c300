"""Errors that a user can fix.

Each message says what was found, what was expected, where, and how to fix it. The command line
prints it without a traceback and exits 1 (`ConfigError`: 2). All pickle, so that they cross Ray
processes.
"""

from __future__ import annotations


class SmaltiError(Exception):
    """Base of all errors that a user can fix."""


class ConfigError(SmaltiError):
    """A recipe or an argument is wrong (exit 2)."""


class ArtifactError(SmaltiError):
    """An artifact is missing, incomplete, damaged, or of another config."""


class DataError(SmaltiError):
    """Input data cannot be used: no usable image, a wrong column, a damaged shard."""


class ImageError(SmaltiError):
    """One image cannot be used; `reason` is a short name, such as `truncated`."""

    def __init__(self, message: str, reason: str = "undecodable") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class VocabularyError(SmaltiError):
    """Visual codes, a tokenizer and a language model do not fit together."""


class TrainingError(SmaltiError):
    """A training run failed in a way that the user can fix."""
