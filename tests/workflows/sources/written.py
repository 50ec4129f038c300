"""Images and tars to read, and everything that a source yields."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from smalti.schema import CorpusSection
from smalti.workflows.sources import Sample, Unusable, find_groups

SECTION = CorpusSection()


def picture(number: int, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (number % 256, number // 256, 7)).save(stream, kind)
    return stream.getvalue()


def collect(
    source: str | list[str], section: CorpusSection = SECTION
) -> tuple[list[Sample], list[Unusable]]:
    """Everything a source gives; each sample's bytes are read again by its locator and must be the
    same.
    """
    samples, lost = [], []
    for group in find_groups(source, section, 0):
        group = pickle.loads(pickle.dumps(group))
        found = list(group.samples())
        mine = [one for one in found if isinstance(one, Sample)]
        if mine:
            with group.reader() as read:
                for one in reversed(mine):
                    assert read(one.locator) == one.data
        samples += mine
        lost += [one for one in found if isinstance(one, Unusable)]
    return samples, lost


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
