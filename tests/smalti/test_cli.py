"""The command line: arguments, exit codes, messages.

Covers: smalti/__main__.py, smalti/cli/failures.py, smalti/cli/models.py, smalti/cli/parser.py,
smalti/cli/show.py, smalti/cli/stages.py, smalti/errors.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import smalti
from smalti.artifact import Workspace, begin
from smalti.cli import main
from smalti.cli.failures import message_of
from smalti.cli.parser import COMMANDS, GROUPS, parse
from smalti.config import load_recipe
from smalti.errors import ArtifactError, ConfigError, DataError

CHAIN = [
    "corpus",
    "encoder",
    "features",
    "codebook",
    "tokenizer",
    "tokens",
    "mllm",
    "export",
    "evaluate",
]


def test_help_lists_every_command_in_the_order_of_the_chain(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    shown = [line.split()[0] for line in lines if line.split()[0] in COMMANDS]
    assert shown == list(COMMANDS)
    assert [name for name in shown if name in CHAIN] == CHAIN
    for group in GROUPS:
        assert f"{group}:" in text
    for command in COMMANDS.values():
        assert command.line in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"usage: smalti {name}" in text
    import shlex

    for example in COMMANDS[name].examples:
        assert example in text
        words = shlex.split(example)
        assert words[:2] == ["smalti", name]
        arguments = parse(words[1:])
        assert arguments.command == name
        if getattr(arguments, "recipe", None):
            recipe = load_recipe(arguments.recipe, getattr(arguments, "overrides", ()))
            assert name != "bridge" or recipe.bridge is not None


@pytest.mark.parametrize("name", ["run", *CHAIN])
def test_a_stage_runs_the_chain_with_its_own_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: dict[str, Any] = {}

    def run_recipe(recipe: Any, *, only: str | None = None) -> list[Any]:
        seen.update(recipe=recipe, only=only)
        return []

    from smalti.workflows import chain

    assert name == "run" or name in chain.STAGES
    monkeypatch.setattr(chain, "run_recipe", run_recipe)
    assert main([name, "semhitok-256", "seed=5", "name=x"]) == 0
    assert seen["only"] == (None if name == "run" else name)
    assert (seen["recipe"].seed, seen["recipe"].name) == (5, "x")


def test_options_may_stand_anywhere() -> None:
    for words in (
        ["--smoke", "r", "a=1", "b=2"],
        ["r", "--smoke", "a=1", "b=2"],
        ["r", "a=1", "--smoke", "b=2"],
        ["r", "a=1", "b=2", "--smoke"],
    ):
        arguments = parse(["run", *words])
        assert (arguments.recipe, arguments.overrides, arguments.smoke) == (
            "r",
            ["a=1", "b=2"],
            True,
        )


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nope"],
        ["run"],
        ["run", "semhitok-256", "--unknown"],
        ["generate", "m", "p"],
        ["generate", "m", "p", "--out", "x.png", "-n", "0"],
        ["generate", "m", "p", "--out", "x.png", "--top-p", "1.5"],
        ["generate", "m", "p", "--out", "x.png", "--cfg", "-1"],
        ["show"],
        ["show", "a", "b"],
    ],
)
def test_bad_arguments_exit_2_and_point_to_the_help(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err
    assert told.startswith("smalti: error: ")
    assert "--help`" in told


def test_a_bad_recipe_exits_2_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "semhitok-256", "tokenizer.pixle.codes=3"]) == 2
    assert capsys.readouterr().err == (
        "smalti: error: override 'tokenizer.pixle.codes=3': unknown key 'tokenizer.pixle.codes'; did you mean 'tokenizer.pixel.codes'?\n"
    )
    assert main(["run", "gone.yaml"]) == 2
    assert main(["quickstart", "out=x"]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"smalti {smalti.__version__}\n"


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("seed: wrong"), 2, "smalti: error: seed: wrong"),
        (DataError("no usable image"), 1, "smalti: error: no usable image"),
        (KeyboardInterrupt(), 130, "smalti: interrupted; run the same command again to resume"),
    ],
)
def test_exit_codes(
    error: BaseException,
    code: int,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: str) -> bool:
        raise error

    from smalti import storage

    monkeypatch.setattr(storage, "exists", fail)
    assert main(["show", "x"]) == code
    assert capsys.readouterr().err.strip() == told


def test_an_unknown_error_leaves_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(_: str) -> bool:
        raise ZeroDivisionError("one\ntwo")

    import tempfile

    from smalti import storage

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(storage, "exists", fail)
    assert main(["show", "x"]) == 1
    told = capsys.readouterr().err
    assert "smalti: error: ZeroDivisionError: two" in told
    (file,) = tmp_path.iterdir()
    assert str(file) in told
    assert "in fail" in file.read_text()


def test_what_ray_wraps_is_unwrapped() -> None:
    from ray.exceptions import RayTaskError
    from ray.train import WorkerGroupError  # the real classes, filled as Ray fills them
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    ours = ArtifactError("the tokenizer is torn")
    task = RayTaskError("f", "Traceback …", ours)
    dual = task.as_instanceof_cause()
    assert isinstance(dual, ArtifactError)
    for wrapped in (task, dual, RayTaskError("g", "Traceback …", dual)):
        assert message_of(wrapped) == "the tokenizer is torn"
    group = WorkerGroupError("rank 1 failed", {1: UserExceptionWithTraceback(ours, "Traceback …")})
    assert message_of(group) == "the tokenizer is torn"
    outer = RuntimeError("outer")
    outer.__cause__ = group
    assert message_of(outer) == "the tokenizer is torn"
    assert message_of(RuntimeError("nothing of ours")) is None


def artifact(path: str) -> None:
    place = begin(path, "corpus", {"image_size": 64, "source": "x"}, {})
    assert isinstance(place, Workspace)
    place.finish({"train": 1234}, 61.0, {"psnr": 21.5})


def test_show_an_artifact_and_a_whole_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact(str(tmp_path / "out" / "corpus"))
    begin(str(tmp_path / "out" / "tokens"), "tokens", {}, {})
    assert main(["show", str(tmp_path / "out" / "corpus")]) == 0
    text = capsys.readouterr().out
    for part in ("corpus: ", "1 min 01 s", "1,234", "image_size", "psnr", "21.5", "torch"):
        assert part in text
    assert main(["show", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "1,234 train" in lines[0]
    assert "incomplete" in lines[1]
    assert main(["show", str(tmp_path / "out" / "tokens")]) == 0
    assert "incomplete" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "out" / "corpus"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["counts"] == {"train": 1234}
    assert main(["show", str(tmp_path / "out"), "--json"]) == 0
    assert [record["finished"] for record in json.loads(capsys.readouterr().out)] == [True, False]


def test_show_what_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(tmp_path / "gone")]) == 1
    assert main(["show", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert "nothing exists at" in told
    assert "holds no artifact" in told


class FakeModel:
    """In the place of a trained model: draws grey of a brightness that tells the seed and the
    number in the batch.
    """

    def generate(
        self,
        prompts: list[str],
        *,
        seed: int,
        cfg: float,
        temperature: float,
        top_k: int,
        top_p: float,
    ) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8), (10 * seed + i,) * 3) for i, _ in enumerate(prompts)]

    def ask(
        self, images: list[Image.Image], questions: list[str], max_new_tokens: int
    ) -> list[str]:
        return [
            f"{question} {image.size[0]}" for image, question in zip(images, questions, strict=True)
        ]


@pytest.fixture
def fake_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from smalti.mllm.inference import VisualModel

    monkeypatch.setattr(VisualModel, "from_pretrained", lambda path: FakeModel())


@pytest.mark.usefixtures("fake_model")
def test_generate_writes_one_image_or_a_grid_and_its_parts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "x.png"
    assert main(["generate", "m", "a red circle", "--out", str(out), "--seed", "3"]) == 0
    assert capsys.readouterr().out.split() == [str(out)]
    assert np.asarray(Image.open(out)).max() == 30
    assert main(["generate", "m", "a red circle", "--out", str(out), "-n", "3"]) == 0
    assert sorted(path.name for path in out.parent.iterdir()) == [
        "x-1.png",
        "x-2.png",
        "x-3.png",
        "x.png",
    ]
    assert Image.open(out).size == (18, 18)
    assert np.asarray(Image.open(out.with_name("x-3.png"))).max() == 2
    assert main(["generate", "m", "p", "--out", str(tmp_path / "x.doc")]) == 2
    assert "give the file such an ending" in capsys.readouterr().err


@pytest.mark.usefixtures("fake_model")
def test_ask_prints_an_answer_a_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (9, 9)).save(path)
    assert main(["ask", "m", str(path), "what?", "why?"]) == 0
    assert capsys.readouterr().out.splitlines() == ["what? 9", "why? 9"]
    (tmp_path / "bad.png").write_bytes(path.read_bytes()[:40])
    assert main(["ask", "m", str(tmp_path / "bad.png"), "what?"]) == 1
    assert "bad.png" in capsys.readouterr().err
    assert main(["ask", "m", str(tmp_path / "gone.png"), "what?"]) == 1


def test_reconstruct_puts_images_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    class Identity:
        image_size = 16
        has_semantic_only = True

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            self.seen = pixels
            return torch.tensor([[1, 1, 2]])

        def decode(self, codes: torch.Tensor) -> torch.Tensor:
            return self.seen

        def decode_semantic_only(self, codes: torch.Tensor) -> torch.Tensor:
            return -self.seen

    from smalti.tokenizers import loading

    monkeypatch.setattr(loading, "load_tokenizer", lambda path: Identity())
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (32, 32), (200, 100, 50)).save(tmp_path / folder / "x.png")
    paths = [str(tmp_path / folder / "x.png") for folder in ("a", "b")]
    assert main(["reconstruct", "t", paths[0], "--out", str(tmp_path / "out"), paths[1]]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x-2.png", "x.png"]
    sheet = np.asarray(Image.open(tmp_path / "out" / "x.png"))
    assert sheet.shape == (16, 52, 3)
    assert sheet[0, 0].tolist() == sheet[0, 18].tolist() == [200, 100, 50]
    assert sheet[0, 36].tolist() == [55, 155, 205]
    assert "3 codes, 2 of them different" in capsys.readouterr().err


def test_the_module_is_the_command(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "smalti", "show", "nowhere"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "smalti: error: nothing exists at nowhere: check the path\n"


def test_ctrl_c_ends_with_130(root: Path, tmp_path: Path) -> None:
    """A process stopped by SIGINT in the middle of reading a pipe that never ends."""
    fifo = tmp_path / "x.yaml"
    os.mkfifo(fifo)
    process = subprocess.Popen(
        [sys.executable, "-m", "smalti", "run", str(fifo)],
        cwd=root,
        stderr=subprocess.PIPE,
        text=True,
    )
    writer = os.open(fifo, os.O_WRONLY)  # waits until the process has opened it to read
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    os.close(writer)
    assert process.returncode == 130
    assert told.strip().endswith("interrupted; run the same command again to resume")


def test_a_closed_pipe_is_no_error(root: Path, tmp_path: Path) -> None:
    for i in range(3):
        artifact(str(tmp_path / str(i)))
    command = f"{sys.executable} -m smalti show {tmp_path} --json | head -1"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=root, capture_output=True, text=True
    )
    assert done.stderr == ""


def test_help_on_a_terminal_without_unicode(root: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "smalti", "--help"], cwd=root, env=environment, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"smalti COMMAND ?" in done.stdout
