"""Reference of the recipe, generated from the schema: a JSON Schema for editors, and Markdown for
the manual.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import get_args

from pydantic.fields import FieldInfo

from smalti.keys import describe
from smalti.schema.base import Section
from smalti.schema.recipe import Recipe

MODELINE = "# yaml-language-server: $schema="
EXTENDS = (
    "path or name of the recipe that this one extends; its keys apply unless they are set here"
)


def json_schema() -> dict[str, object]:
    """JSON Schema (draft 2020-12) of a recipe file.

    No key is required: a recipe may take it from the recipe that it extends.
    """
    schema: dict[str, object] = Recipe.model_json_schema()
    _clean(schema)
    properties = schema["properties"]
    assert isinstance(properties, dict)
    extends = {"type": "string", "description": EXTENDS}
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "smalti recipe"}
    return about | schema | {"properties": {"extends": extends, **properties}}


def schema_text() -> str:
    """The text of `recipes/recipe.schema.json`."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _clean(node: object) -> None:
    """Remove titles, defaults of whole sections, and `required` from a JSON Schema, in place."""
    if isinstance(node, list):
        for item in node:
            _clean(item)
        return
    if not isinstance(node, dict):
        return
    if isinstance(node.get("title"), str):
        del node["title"]
    if isinstance(node.get("required"), list):
        del node["required"]
    if isinstance(node.get("default"), dict):
        del node["default"]
    for name, value in node.items():
        if name == "properties":
            for below in value.values():
                _clean(below)
        else:
            _clean(value)


def reference_markdown() -> str:
    """Every key of a recipe in Markdown: a heading and a table for each section."""
    places = _places()
    headings = {section: _heading(section, found) for section, found in places.items()}
    parts = []
    for section, found in places.items():
        lines = [f"## {headings[section]}", "", " ".join((section.__doc__ or "").split()), ""]
        if len(found) > 1:
            lines += [f"The keys of {', '.join(f'`{place}`' for place in found)}.", ""]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        lines += [_row(name, field, headings) for name, field in section.model_fields.items()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def sections_of(annotation: object) -> list[type[Section]]:
    """The sections that an annotation takes, alone, in a union or in a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def _places() -> dict[type[Section], list[str]]:
    """Every section, in the order of the recipe, and the dotted keys that take it."""
    places: dict[type[Section], list[str]] = {Recipe: [""]}
    for dotted, field in walk(Recipe):
        for section in sections_of(field.annotation):
            places.setdefault(section, []).append(dotted)
    return places


def walk(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted key, field) of every key below a section; keys of lists are marked `name[]`."""
    for name, field in section.model_fields.items():
        dotted = f"{prefix}{name}"
        yield dotted, field
        for below in sections_of(field.annotation):
            listed = "[]" if isinstance(field.default, list) else ""
            yield from walk(below, f"{dotted}{listed}.")


def _heading(section: type[Section], places: list[str]) -> str:
    if section is Recipe:
        return "The recipe"
    return places[0] if len(places) == 1 else section.__name__


def _row(name: str, field: FieldInfo, headings: dict[type[Section], str]) -> str:
    below = sections_of(field.annotation)
    value = (
        f"section [{headings[below[0]]}](#{_anchor(headings[below[0]])})"
        if below
        else _value(field)
    )
    meaning = (field.description or "").replace("<", "&lt;")
    cells = (f"`{name}`", value, _default(field), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(field: FieldInfo) -> str:
    return describe(field.annotation, list(field.metadata)).replace("'", "`")


def _default(field: FieldInfo) -> str:
    """The default as YAML; of a section only what differs from its own defaults."""
    if field.is_required():
        return "must be set"
    value = field.get_default(call_default_factory=True)
    if not isinstance(value, Section):
        return f"`{json.dumps(value, ensure_ascii=False)}`"
    plain = type(value)().model_dump(mode="json")
    own = {
        key: item for key, item in value.model_dump(mode="json").items() if item != plain.get(key)
    }
    return f"`{json.dumps(own).replace(chr(34), '')}`" if own else ""


def _anchor(heading: str) -> str:
    """The anchor that MkDocs and GitHub give to a heading."""
    return re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")
