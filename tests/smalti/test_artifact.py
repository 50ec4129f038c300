from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smalti import storage
from smalti.artifact import (
    PARTIAL,
    RECORD,
    Artifact,
    Workspace,
    begin,
    code_version,
    fingerprint,
    package_versions,
)
from smalti.errors import ArtifactError

CONFIG = {"image_size": 64, "train": {"lr": 1e-4, "betas": (0.9, 0.95)}}


def make(path: str, kind: str = "corpus", config: Any = None, parents: Any = None) -> Artifact:
    place = begin(path, kind, CONFIG if config is None else config, parents or {})
    assert isinstance(place, Workspace)
    return place.finish({"images": 3}, 1.5, {"psnr": 20.0})


def test_an_artifact_is_found_as_it_was_finished(place: str) -> None:
    assert Artifact.find(place) is None
    made = make(place)
    found = Artifact.load(place)
    assert found == made
    assert (found.kind, found.counts, found.seconds, found.scores) == (
        "corpus",
        {"images": 3},
        1.5,
        {"psnr": 20.0},
    )
    assert found.config["train"]["betas"] == [0.9, 0.95]
    assert found.code_version.startswith("0.")
    assert found.versions["python"] == sys.version.split()[0]
    assert found.created
    assert storage.list_names(place) == [RECORD]
    assert begin(place, "corpus", CONFIG, {}) == made
    assert pickle.loads(pickle.dumps(found)) == found


def test_parents_are_kept_and_change_the_fingerprint(place: str) -> None:
    corpus = make(f"{place}/a")
    other = make(f"{place}/b", config={"image_size": 32})
    child = make(f"{place}/c", "features", {}, {"corpus": corpus})
    assert child.parents == {"corpus": corpus.fingerprint}
    prints = {
        fingerprint("features", {}, parents)
        for parents in ({}, {"corpus": corpus}, {"corpus": other}, {"encoder": corpus})
    }
    assert len(prints) == 4
    assert fingerprint("features", {}, {"corpus": corpus}) == child.fingerprint


def test_a_moved_artifact_is_the_same_one(tmp_path: Any) -> None:
    made = make(str(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    found = Artifact.load(str(tmp_path / "b"))
    assert found.fingerprint == made.fingerprint
    assert found.path == str(tmp_path / "b")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats(-1, 1) | st.text(max_size=3),
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=3), below, max_size=3)
    ),
    max_leaves=6,
)
configs = st.dictionaries(st.text(max_size=3), json_values, max_size=4)


@given(configs, configs)
def test_fingerprints_are_equal_exactly_when_the_settings_are(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    import json

    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (fingerprint("k", one, {}) == fingerprint("k", other, {})) == same
    assert fingerprint("k", one, {}) == fingerprint("k", dict(reversed(one.items())), {})
    assert fingerprint("k", one, {}) != fingerprint("l", one, {})
    assert len(fingerprint("k", one, {})) == 16


def test_fingerprints_do_not_depend_on_the_process() -> None:
    code = "from smalti.artifact import fingerprint; print(fingerprint('k', {'b': 1, 'a': [1.5, None]}, {}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("0", "1")
    }
    assert seen == {fingerprint("k", {"a": [1.5, None], "b": 1}, {}) + "\n"}


def test_a_half_made_artifact_goes_on_with_its_time(place: str) -> None:
    first = begin(place, "corpus", CONFIG, {})
    assert isinstance(first, Workspace)
    assert not first.resumed
    storage.write_atomic(f"{place}/train/00000.parquet", b"x")
    first.beat(10.0)  # and then it is killed
    with pytest.raises(ArtifactError, match="incomplete artifact"):
        Artifact.load(place)
    second = begin(place, "corpus", CONFIG, {})
    assert isinstance(second, Workspace)
    assert second.resumed
    assert storage.exists(f"{place}/train/00000.parquet")
    second.beat(1.0)
    third = begin(place, "corpus", CONFIG, {})
    assert isinstance(third, Workspace)
    assert third.finish({}, 4.0).seconds == 15.0


def test_other_settings_in_the_same_place_are_refused_by_name(place: str) -> None:
    make(place)
    with pytest.raises(ArtifactError) as caught:
        begin(place, "corpus", {"image_size": 32, "train": {"lr": 1e-4}, "new": 1}, {})
    told = str(caught.value)
    assert f"{place} holds a finished artifact" in told
    assert "image_size: 64 there, 32 here" in told
    assert "train.betas: [0.9, 0.95] there, absent here" in told
    assert "new: absent there, 1 here" in told
    assert "train.lr" not in told
    assert "Set another `out`" in told
    with pytest.raises(ArtifactError, match=r'kind: "?corpus"? there, "?features"? here'):
        begin(place, "features", CONFIG, {})


def test_other_settings_in_a_half_made_place_are_refused(place: str) -> None:
    parent = make(f"{place}/parent")
    begin(f"{place}/x", "features", CONFIG, {"corpus": parent})
    with pytest.raises(
        ArtifactError, match=r"incomplete artifact(.|\n)*parent corpus: .*there, absent here"
    ):
        begin(f"{place}/x", "features", CONFIG, {})


def test_somebodys_files_are_not_written_into(place: str) -> None:
    storage.write_atomic(f"{place}/holiday.jpg", b"x")
    with pytest.raises(ArtifactError, match=r"no artifact \(holiday\.jpg\)"):
        begin(place, "corpus", CONFIG, {})
    assert storage.list_names(place) == ["holiday.jpg"]
    with pytest.raises(ArtifactError, match="is a file"):
        begin(f"{place}/holiday.jpg", "corpus", CONFIG, {})


@pytest.mark.parametrize("text", ["", '{"kind": "corp', "[]", "{}", '{"kind": "corpus"}'])
def test_a_torn_record_is_told(place: str, text: str) -> None:
    storage.write_atomic(f"{place}/{RECORD}", text.encode())
    with pytest.raises(ArtifactError, match=RECORD):
        Artifact.load(place)


@pytest.mark.parametrize("text", ["", "[]"])
def test_a_torn_partial_record_is_told(place: str, text: str) -> None:
    storage.write_atomic(f"{place}/{PARTIAL}", text.encode())
    with pytest.raises(ArtifactError, match=PARTIAL):
        begin(place, "corpus", CONFIG, {})


def test_no_artifact_says_what_to_do(place: str) -> None:
    with pytest.raises(ArtifactError, match="run the stage that writes it, or check the path"):
        Artifact.load(place)


def test_nan_is_no_setting() -> None:
    with pytest.raises(ValueError, match="JSON"):
        fingerprint("k", {"lr": float("nan")}, {})


def test_versions_name_the_code_and_its_packages() -> None:
    assert package_versions().keys() >= {
        "python",
        "torch",
        "ray",
        "transformers",
        "numpy",
        "pyarrow",
    }
    assert code_version().startswith("0.1.0")
