"""Finished shards of an interrupted or repeated run."""

from __future__ import annotations

from collections.abc import Sequence

from smalti import storage
from smalti.errors import DataError
from smalti.shards import Receipt, list_shards, read_shard, shard_path, shard_rows
from smalti.workflows.pipeline.timings import PROCESS_TALLY


def finished_receipt(artifact_path: str, key: str, columns: Sequence[str] = ()) -> Receipt | None:
    """Receipt of a finished shard, if it exists.

    Writes are atomic, so that a shard can only be damaged later; a damaged one is removed.

    Returns:
        None if the shard is missing, damaged or lacks `columns`.
    """
    path = shard_path(artifact_path, key)
    if not storage.exists(path):
        return None
    try:
        if columns:
            read_shard(artifact_path, key, columns)
        return Receipt(key, shard_rows(artifact_path, key), storage.size_bytes(path))
    except DataError:
        storage.remove(path)
        PROCESS_TALLY.count("remade")
        return None


def matching_receipt(artifact_path: str, corpus_path: str, key: str) -> Receipt | None:
    """Receipt of a finished shard with exactly the images of a corpus shard.

    A shard of other images (a corpus recreated from changed files has the same fingerprint) or
    without readable ids is removed, so that it is computed again.

    Raises:
        DataError: if the corpus shard cannot be read.
    """
    receipt = finished_receipt(artifact_path, key)
    if receipt is None:
        return None
    wanted = read_shard(corpus_path, key, ["image_id"]).column("image_id").to_pylist()
    try:
        found = read_shard(artifact_path, key, ["image_id"]).column("image_id").unique().to_pylist()
    except DataError:
        found = None
    if found == wanted:
        PROCESS_TALLY.count("kept")
        return receipt
    storage.remove(shard_path(artifact_path, key))
    PROCESS_TALLY.count("remade")
    return None


def refuse_foreign(
    artifact_path: str, keys: Sequence[str], whose: str = "are not in the corpus"
) -> None:
    """Refuse an artifact that holds shards other than `keys`.

    Raises:
        DataError: naming the first of them; the next stage would read them too.
    """
    foreign = sorted(set(list_shards(artifact_path)) - set(keys))
    if foreign:
        raise DataError(
            f"{artifact_path} holds {len(foreign):,} shards that {whose}; the first is "
            f"{shard_path(artifact_path, foreign[0])}. They are from another run: move them away, "
            "then run the same command to resume."
        )
