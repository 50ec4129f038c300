"""Paths, patterns and globs."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from smalti.errors import DataError
from smalti.workflows.sources import find_groups
from smalti.workflows.sources.listing import expand
from tests.workflows.sources.written import SECTION, collect, picture, write_tar


def test_brace_patterns_and_globs(tmp_path: Path) -> None:
    for number in range(3):
        write_tar(tmp_path / f"part-{number:05d}.tar", [(f"{number}.png", picture(number))])
    assert len(collect(str(tmp_path / "part-{00000..00002}.tar"))[0]) == 3
    assert len(collect(str(tmp_path / "part-*.tar"))[0]) == 3
    assert len(collect(str(tmp_path))[0]) == 3, "a folder of tars"
    assert expand(str(tmp_path / "part-0000{2,0}.tar")) == [
        str(tmp_path / f"part-0000{n}.tar") for n in (2, 0)
    ]
    assert len(expand(str(tmp_path / "part-0000{{0,2},{1..1}}.tar"))) == 3
    with pytest.raises(DataError, match="part-00003"):
        collect(str(tmp_path / "part-{00000..00003}.tar"))


def test_paths_that_look_like_patterns(tmp_path: Path) -> None:
    for folder in ("[x] y", "{z}"):
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / "t.tar", [("a.png", picture(1))])
        (tmp_path / folder / "._t.tar").write_bytes(b"litter")
        assert [one.key for one in collect(str(tmp_path / folder / "t.tar"))[0]] == ["a"]
        samples, lost = collect(str(tmp_path / folder))
        assert ([one.key for one in samples], lost) == (["a"], [])


def test_relative_sources_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor of a cluster stands in another folder than the command."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(picture(0))
    write_tar(tmp_path / "x.tar", [("a.png", picture(1))])
    pq.write_table(pa.table({"image": [picture(2)]}), tmp_path / "x.parquet")
    monkeypatch.chdir(tmp_path)
    groups = list(find_groups(["in", "./*.tar", "x.parquet"], SECTION, 0))
    monkeypatch.chdir("/")
    assert [one.key for group in groups for one in group.samples()] == ["0.png", "a", "0:0"]
