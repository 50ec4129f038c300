"""The keys of a pydantic model, and errors about them in words."""

from __future__ import annotations

import difflib
import types
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails


class Schema:
    """The keys of `model`, dotted."""

    def __init__(self, model: type[BaseModel]) -> None:
        self.model = model
        self.keys = list(_walk(model))

    def unknown(self, dotted: str) -> str | None:
        """An error text if `dotted` is no key; None if it is.

        A section and what lies in a free mapping are keys.
        """
        model: type[BaseModel] | None = self.model
        parts = dotted.split(".")
        for index, name in enumerate(parts):
            if model is None or name not in model.model_fields:
                return self.complaint(dotted, ".".join(parts[:index]))
            annotation = model.model_fields[name].annotation
            if _has(annotation, dict):
                return None
            model = section_of(annotation)
        return None

    def complaint(self, dotted: str, section: str = "") -> str:
        """`unknown key 'a.b'; did you mean 'a.c'?`: `section` is the part of `dotted` that exists."""
        near = self._nearest(dotted, section)
        if near:
            return f"unknown key '{dotted}'; did you mean {' or '.join(repr(key) for key in near)}?"
        names = ", ".join(key.rsplit(".", 1)[-1] for key in self._neighbours(section))
        if not names:
            return f"unknown key '{dotted}'; '{section}' is a plain value and has no keys under it"
        return (
            f"unknown key '{dotted}'; {f'{section!r} has' if section else 'a recipe has'}: {names}"
        )

    def _neighbours(self, section: str) -> list[str]:
        prefix = f"{section}." if section else ""
        return [
            key for key in self.keys if key.startswith(prefix) and "." not in key[len(prefix) :]
        ]

    def _nearest(self, dotted: str, section: str) -> list[str]:
        """The most similar keys.

        The wrong part corrected, the key in another section, or the most similar of all.
        """
        prefix = f"{section}." if section else ""
        wrong, _, rest = dotted[len(prefix) :].partition(".")
        names = [key[len(prefix) :] for key in self._neighbours(section)]
        for name in difflib.get_close_matches(wrong, names, 3, 0.6):
            corrected = f"{prefix}{name}.{rest}" if rest else prefix + name
            if corrected in self.keys:
                return [corrected]
        elsewhere = [key for key in self.keys if key.endswith(f".{dotted}")]
        if elsewhere or not names:
            return elsewhere[:3]
        leaf = dotted.rsplit(".", 1)[-1]
        similar = difflib.get_close_matches(dotted, self.keys, 3, 0.75)
        similar = [
            key
            for key in similar
            if difflib.SequenceMatcher(None, key.rsplit(".", 1)[-1], leaf).ratio() >= 0.6
        ]
        return similar[:1] or [key for key in self.keys if key.rsplit(".", 1)[-1] == leaf][:3]

    def takes_raw_text(self, dotted: str) -> bool:
        """Whether the key takes text and neither numbers nor switches.

        `name=007` means the text `007`.
        """
        field = self._field(dotted)
        if field is None:
            return False
        kinds = {_base(branch) for branch in _branches(field.annotation)} - {type(None), list}
        texts = [
            b
            for b in _branches(field.annotation)
            if get_origin(b) is Literal and all(isinstance(v, str) for v in get_args(b))
        ]
        return (
            bool(kinds)
            and all(kind is str for kind in kinds - {Literal})
            and (Literal not in kinds or bool(texts))
        )

    def takes(self, dotted: str, kind: object) -> bool:
        """Whether the key may be of a kind, such as `list` or null (`NoneType`)."""
        field = self._field(dotted)
        return field is not None and _has(field.annotation, kind)

    def explain(self, error: ErrorDetails) -> tuple[str, str]:
        """(dotted key, text) of a pydantic error, without the tags of unions."""
        key, section, annotation, metadata = self._resolve(error["loc"])
        if error["type"] == "extra_forbidden":
            return key, self.complaint(key, section)
        if error["type"] in ("value_error", "assertion_error"):
            return key, f"{key}: {error['ctx']['error']}" if key else str(error["ctx"]["error"])
        if error["type"] == "missing" and not key.endswith("]"):
            return key, f"{key}: this key must be set"
        expected = describe(annotation, metadata) if annotation is not None else error["msg"]
        whole, bracket, index = key.partition("[")
        place = f" at [{index}" if bracket else ""
        if error["type"] == "missing" and bracket:
            return whole, f"{whole}: expected {expected}, and nothing is at [{index}"
        return whole, f"{whole}: expected {expected}, found {_found(error['input'])}{place}"

    def _resolve(self, loc: tuple[int | str, ...]) -> tuple[str, str, object, list[object]]:
        """Dotted key, section, annotation and constraints of a pydantic location."""
        model: type[BaseModel] | None = self.model
        key = ""
        section = ""
        annotation = None
        metadata = []
        free = False
        for part in loc:
            name = str(part)
            if model is not None and name in model.model_fields:
                field = model.model_fields[name]
                key = f"{key}.{name}" if key else name
                annotation = field.annotation
                metadata = list(field.metadata)
                section = key
                model = section_of(annotation)
                free = _has(annotation, dict)
            elif isinstance(part, int):
                key += f"[{part}]"
            elif model is not None and part == loc[-1]:
                section = key
                key = f"{key}.{name}" if key else name
            elif free:
                key += f".{name}"
        return key, section if section != key else key.rpartition(".")[0], annotation, metadata

    def _field(self, dotted: str) -> FieldInfo | None:
        model: type[BaseModel] | None = self.model
        field = None
        for name in dotted.split("."):
            if model is None or name not in model.model_fields:
                return None
            field = model.model_fields[name]
            model = section_of(field.annotation)
        return field


def describe(annotation: object, metadata: list[object] | None = None) -> str:
    """What an annotation takes, in words: `an integer > 0, or null`."""
    parts: list[str] = []
    for branch in _branches(annotation):
        bounds = list(metadata or [])
        if get_origin(branch) is Annotated:
            bounds += list(get_args(branch)[1:])
            branch = get_args(branch)[0]
        parts.append(
            _describe_one(branch) + ("" if branch is type(None) else _describe_bounds(bounds))
        )
    return " or ".join(dict.fromkeys(parts))


_WORDS: dict[object, str] = {
    int: "an integer", float: "a number", str: "text", bool: "true or false", type(None): "null", Any: "any value",
}  # fmt: skip


def _describe_one(kind: object) -> str:
    if kind in _WORDS:
        return _WORDS[kind]
    origin = get_origin(kind)
    if origin is Literal:
        values = [repr(value) for value in get_args(kind)]
        return values[0] if len(values) == 1 else f"one of {', '.join(values)}"
    if origin is list:
        return f"a list of {describe(get_args(kind)[0]).removeprefix('a ').removeprefix('an ')}"
    if origin is tuple:
        return (
            f"a list of {len(get_args(kind))} "
            f"({', '.join(describe(item) for item in get_args(kind))})"
        )
    if origin is dict:
        return "keys with values"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a section with keys such as {', '.join(list(kind.model_fields)[:4])}"
    return str(kind)


def _describe_bounds(metadata: list[object]) -> str:
    signs = {
        annotated_types.Ge: "ge",
        annotated_types.Gt: "gt",
        annotated_types.Le: "le",
        annotated_types.Lt: "lt",
    }
    words = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    found = []
    for item in metadata:
        items = item.metadata if isinstance(item, FieldInfo) else [item]
        found += [
            f"{words[signs[type(b)]]} {getattr(b, signs[type(b)]):g}"
            for b in items
            if type(b) in signs
        ]
    return f" {' and '.join(found)}" if found else ""


def _found(value: object) -> str:
    if isinstance(value, Mapping):
        return "keys with values"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    kinds = {str: "text", list: "a list", tuple: "a list", int: "an integer", float: "a number"}
    text = repr(value)
    return (
        f"{text if len(text) <= 60 else text[:57] + '…'} "
        f"({kinds.get(type(value), type(value).__name__)})"
    )


def _walk(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(f"{prefix}{name}")
        below = section_of(field.annotation)
        if below is not None:
            keys += _walk(below, f"{prefix}{name}.")
    return keys


def _branches(annotation: object) -> list[object]:
    """The members of a union (nested ones too), or the annotation itself."""
    if get_origin(annotation) in (Union, types.UnionType):
        return [branch for item in get_args(annotation) for branch in _branches(item)]
    return [annotation]


def _base(annotation: object) -> object:
    if get_origin(annotation) is Annotated:
        return _base(get_args(annotation)[0])
    return get_origin(annotation) or annotation


def section_of(annotation: object) -> type[BaseModel] | None:
    """The section that an annotation takes, if any."""
    for branch in _branches(annotation):
        kind = _base(branch)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _has(annotation: object, kind: object) -> bool:
    return any(_base(branch) is kind for branch in _branches(annotation))
