from __future__ import annotations

from collections.abc import Iterator

from pydantic.fields import FieldInfo

from smalti.keys import section_of
from smalti.schema import Recipe, Section


def fields(section: type[Section], seen: set[type[Section]]) -> Iterator[tuple[str, FieldInfo]]:
    """(Section.key, field) of every section below, each section once."""
    seen.add(section)
    for name, field in section.model_fields.items():
        yield f"{section.__name__}.{name}", field
        below = section_of(field.annotation)
        if below is not None and issubclass(below, Section) and below not in seen:
            yield from fields(below, seen)


def test_every_key_has_a_description() -> None:
    found = dict(fields(Recipe, set()))
    assert len(found) > 200
    bare = [name for name, field in found.items() if not (field.description or "").strip()]
    assert not bare, f"keys of smalti/schema without a description: {', '.join(bare)}"


def test_every_section_has_a_docstring_of_one_line() -> None:
    sections: set[type[Section]] = set()
    list(fields(Recipe, sections))
    for section in sections:
        first = (section.__doc__ or "").strip().splitlines()[0]
        assert first.endswith("."), f"{section.__name__}: {first!r}"
