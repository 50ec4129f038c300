"""The command smalti recipes, and the heads of the shipped recipes.

Covers: smalti/cli/recipes.py.
"""

from __future__ import annotations

import json

import pytest

from smalti.cli import main
from smalti.cli.recipes import LABELS, parse_head, read_head, shipped
from smalti.config import find_recipe, load_recipe

HEAD = """\
A small recipe, of two
lines.

  smalti run small

Size       64 px
Hardware   two cores,
           no GPU
The goals: below.
"""


def test_a_head_has_a_title_and_facts() -> None:
    head = parse_head(HEAD)
    assert head.title == "A small recipe, of two lines."
    assert head.facts == {"Size": "64 px", "Hardware": "two cores, no GPU"}
    assert head.text == HEAD.strip("\n")


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_states_its_facts(name: str) -> None:
    head = read_head(find_recipe(name))
    assert head.title
    assert tuple(head.facts) == LABELS
    assert f"smalti run recipes/{name}.yaml" in head.text


def test_the_list_shows_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    words = " ".join(text.split())
    for name in shipped():
        path = find_recipe(name)
        assert f"\n{name}\n" in f"\n{text}"
        assert f"system {load_recipe(path).system}" in words
        for label, fact in read_head(path).facts.items():
            assert f"{label.lower()} {fact}" in words


def test_one_recipe_shows_its_path_and_head(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "semhitok-256"]) == 0
    path, _, text = capsys.readouterr().out.partition("\n\n")
    assert path == find_recipe("semhitok-256")
    assert text.strip() == read_head(path).text


def test_a_recipe_that_does_not_exist_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "nothing"]) == 2
    assert "semhitok-256" in capsys.readouterr().err


def test_the_schema_is_printed_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--schema"]) == 0
    assert "tokenizer" in json.loads(capsys.readouterr().out)["properties"]
