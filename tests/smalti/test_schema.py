"""The schema: descriptions, its JSON Schema and its reference.

Covers: smalti/schema/base.py, smalti/schema/bridge.py, smalti/schema/data.py,
smalti/schema/recipe.py, smalti/schema/reference.py,
smalti/schema/systems.py, smalti/schema/tokenizer.py.
"""

from __future__ import annotations

import jsonschema
import pytest

from smalti import recipe_yaml
from smalti.config import recipes_folder
from smalti.schema import Recipe, Section
from smalti.schema.reference import (
    MODELINE,
    json_schema,
    reference_markdown,
    schema_text,
    sections_of,
    walk,
)

SHIPPED = sorted(recipes_folder().glob("*.yaml"))


def test_every_key_has_a_description() -> None:
    found = dict(walk(Recipe))
    assert "mllm.stages[].from_step" in found
    assert "tokenizer.pixel.loss.gan.adaptive_range" in found
    bare = [name for name, field in found.items() if not (field.description or "").strip()]
    assert not bare, f"keys of smalti/schema without a description: {', '.join(bare)}"


def test_every_section_has_a_docstring_of_one_line() -> None:
    sections: list[type[Section]] = [Recipe]
    for _, field in walk(Recipe):
        sections += sections_of(field.annotation)
    for section in sections:
        first = (section.__doc__ or "").strip().splitlines()[0]
        assert first.endswith("."), f"{section.__name__}: {first!r}"


def test_the_schema_for_editors_is_current() -> None:
    found = (recipes_folder() / "recipe.schema.json").read_text()
    assert found == schema_text(), "run `smalti recipes --schema > recipes/recipe.schema.json`"
    jsonschema.Draft202012Validator.check_schema(json_schema())


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_editors_accept_every_shipped_recipe(path) -> None:
    text = path.read_text()
    assert text.startswith(f"{MODELINE}recipe.schema.json\n")
    jsonschema.validate(recipe_yaml.parse(text, path.name), json_schema())


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"corpus": {"image_sise": 64}}, "image_sise"),
        ({"corpus": {"image_size": "large"}}, "large"),
        ({"tokenizer": {"pixel": {"train": {"steps": 0}}}}, "0"),
        ({"mllm": {"stages": [{"from_step": 1, "wrong": 1}]}}, "wrong"),
    ],
)
def test_editors_see_wrong_keys_and_values(data, complaint: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=complaint):
        jsonschema.validate(data, json_schema())


def test_editors_accept_part_of_a_section_where_a_recipe_extends_another() -> None:
    jsonschema.validate({"extends": "semhitok-256", "bridge": {"width": 64}}, json_schema())


def test_the_reference_names_every_key_once_per_section() -> None:
    text = reference_markdown()
    sections: dict[type[Section], None] = {Recipe: None}
    for _, field in walk(Recipe):
        sections |= dict.fromkeys(sections_of(field.annotation))
    expected = sum(len(section.model_fields) for section in sections)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) == expected
    assert all(line.count(" | ") == 3 and not line.endswith("|  |") for line in rows)
    anchors = {
        line[3:].replace(".", "").lower() for line in text.splitlines() if line.startswith("## ")
    }
    linked = {part.partition(")")[0] for part in text.split("](#")[1:]}
    assert linked
    assert linked <= anchors


def test_the_reference_shows_values_and_defaults() -> None:
    text = reference_markdown()
    assert "| `val_fraction` | a number ≥ 0 and ≤ 1 | `0.02` |" in text
    assert (
        "| `decoder` | section [VitSize](#vitsize) | `{dim: 1024, layers: 24, heads: 16}` |" in text
    )
    assert "| `from_step` | an integer ≥ 0 | must be set |" in text
    assert "The keys of `encoder.train.train`, `tokenizer.semantic.train`" in text
