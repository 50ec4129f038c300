"""Recipes: YAML files and `a.b=c` overrides, checked as one `Recipe`.

A `ConfigError` names every wrong key. The order, later over earlier: `base`, the files of the
`extends:` chain, the recipe itself, the overrides. Sections merge key by key; lists and plain
values replace.
"""

from __future__ import annotations

import copy
import os
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import smalti
from smalti import recipe_yaml, storage
from smalti.errors import ConfigError, DataError
from smalti.keys import Schema
from smalti.schema import Recipe

_SCHEMA = Schema(Recipe)
Origins = dict[str, str]


def load_recipe(
    path: str | None, overrides: Sequence[str] = (), *, base: Mapping[str, object] | None = None
) -> Recipe:
    """Load a YAML recipe with `a.b=c` overrides.

    Values of overrides are YAML (`null`, `[1, 2]`, `1e-4`); where a key takes text, they are text
    as typed. A section that is null is created.

    Args:
        path: a file, a URL, or the name of a shipped recipe (`semhitok-quickstart`); None for the
            defaults.

    Raises:
        ConfigError: naming every wrong key.
    """
    data: dict[str, object] = copy.deepcopy(dict(base or {}))
    origins: Origins = {}
    if path is not None:
        merged, found = _read_chain(path)
        data = merge(data, merged)
        origins.update(found)
    for text in overrides:
        key, value = parse_override(text)
        _set(data, key, value, where=f"override {text!r}")
        origins[key] = f"override {text!r}"
    return _validated(data, origins, path or "recipe")


def with_overrides(
    recipe: Recipe, overrides: Mapping[str, object], *, where: str = "override"
) -> Recipe:
    """A copy of `recipe` with dotted keys set.

    A mapping given for a section is merged into it; `{}` empties it.
    """
    data = dump(recipe)
    origins: Origins = {}
    for key, value in overrides.items():
        _set(data, key, value, where=where)
        origins[key] = where
    return _validated(data, origins, where)


def dump(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-able data; loading it again gives an equal recipe."""
    return recipe.model_dump(mode="json")


def merge(under: Mapping[str, object], over: Mapping[str, object]) -> dict[str, object]:
    """`over` upon `under`: mappings merge key by key, everything else replaces."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def parse_override(text: str) -> tuple[str, object]:
    """`a.b=c` as (dotted key, value)."""
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key or any(not part for part in key.split(".")):
        raise ConfigError(f"override {text!r}: expected key=value, such as tokenizer.pixel.codes=8")
    if _SCHEMA.takes_raw_text(key):
        bare = raw.strip()
        listed = bare.startswith("[") and bare.endswith("]") and _SCHEMA.takes(key, list)
        value = (
            recipe_yaml.parse(raw, f"override {text!r}")
            if listed or bare[:1] in ("'", '"')
            else raw
        )
        return key, None if raw in ("null", "~", "") and _SCHEMA.takes(key, type(None)) else value
    return key, recipe_yaml.parse(raw, f"override {text!r}")


def recipes_folder() -> Path:
    """Folder of the shipped recipes, in the checkout or the installed package."""
    package = Path(smalti.__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def find_recipe(path: str) -> str:
    """`path` if it exists, else the shipped recipe of that name.

    Raises:
        ConfigError: if there is neither.
    """
    if storage.exists(path):
        if storage.is_dir(path):
            raise ConfigError(f"{path} is a folder; a recipe is a YAML file")
        return path
    folder = recipes_folder()
    shipped = sorted(file.stem for file in folder.glob("*.yaml"))
    stem = posixpath.basename(path).removesuffix(".yaml").removesuffix(".yml")
    if (
        storage.is_local(path)
        and stem in shipped
        and posixpath.dirname(path) in ("", ".", "recipes", "./recipes")
    ):
        return str(folder / f"{stem}.yaml")
    hint = f"recipes that come with smalti: {', '.join(shipped)}" if shipped else "check the path"
    raise ConfigError(f"no recipe exists at {path} ({hint})")


def _read_chain(path: str) -> tuple[dict[str, object], Origins]:
    """A file merged with those it extends, and the file of each dotted key."""
    chain: list[tuple[str, dict[str, object]]] = []
    seen: list[str] = []
    current: str | None = path
    while current is not None:
        found = find_recipe(current)
        name = storage.absolute(found)
        if name in seen:
            loop = " → ".join(
                [
                    *(os.path.basename(item) for item in seen[seen.index(name) :]),
                    os.path.basename(name),
                ]
            )
            raise ConfigError(f"{path}: `extends` forms a circle: {loop}")
        seen.append(name)
        data = _read(found)
        above = data.pop("extends", None)
        chain.append((current if found == current else found, data))
        if above is not None and not isinstance(above, str):
            raise ConfigError(
                f"{current}: extends: expected the path of one recipe, found {above!r}"
            )
        current = None if above is None else _beside(found, above)
    merged: dict[str, object] = {}
    origins: Origins = {}
    for name, data in reversed(chain):
        merged = merge(merged, data)
        origins.update(dict.fromkeys(_dotted(data), name))
    return merged, origins


def _read(path: str) -> dict[str, object]:
    try:
        raw = storage.read_bytes(path)
    except DataError as error:
        raise ConfigError(str(error)) from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: a recipe is UTF-8 text, and this file is not ({error.reason} at byte "
            f"{error.start})"
        ) from error
    data = recipe_yaml.parse(text, path)
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys with values, found {type(data).__name__}")
    return data


def _beside(path: str, above: str) -> str:
    """`above` relative to the file `path` that extends it.

    An absolute path, a URL or the name of a shipped recipe is returned unchanged.
    """
    if not storage.is_local(above) or os.path.isabs(storage.local_path(above)):
        return above
    beside = storage.join(storage.parent(path), above) if storage.parent(path) else above
    if storage.is_local(beside):
        beside = os.path.normpath(beside)
    return (
        beside
        if storage.exists(beside) or "/" in above or above.endswith((".yaml", ".yml"))
        else above
    )


def _dotted(data: Mapping[str, object], prefix: str = "") -> list[str]:
    keys = []
    for key, value in data.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            keys += _dotted(value, f"{prefix}{key}.")
    return keys


def _set(data: dict[str, object], dotted: str, value: object, *, where: str) -> None:
    """Set a dotted key in nested data; missing sections are created.

    A mapping merges into the existing value, an empty one replaces it: `baselines={}` removes all
    baselines.
    """
    problem = _SCHEMA.unknown(dotted)
    if problem is not None:
        raise ConfigError(f"{where}: {problem}")
    *sections, last = dotted.split(".")
    node = data
    for name in sections:
        below = node.get(name)
        if not isinstance(below, dict):
            below = node[name] = {}
        node = below
    current = node.get(last)
    if isinstance(current, dict) and isinstance(value, Mapping) and value:
        node[last] = merge(current, value)
    else:
        node[last] = copy.deepcopy(value)


def _validated(data: dict[str, object], origins: Origins, where: str) -> Recipe:
    """`data` as a Recipe; `ConfigError` with a line per wrong key."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, origins, where))) from error
    for name, overrides in recipe.baselines.items():
        key = f"baselines.{name}"
        _check_baseline(data, key, overrides, _origin(key, origins, where))
    return recipe


def _check_baseline(
    data: Mapping[str, object], key: str, overrides: Mapping[str, object], where: str
) -> None:
    variant = copy.deepcopy({name: value for name, value in data.items() if name != "baselines"})
    for dotted, value in overrides.items():
        _set(variant, dotted, value, where=f"{where}: {key}")
    try:
        Recipe.model_validate(variant)
    except ValidationError as error:
        raise ConfigError("\n".join(_problems(error, {}, f"{where}: {key}"))) from error


def _problems(error: ValidationError, origins: Origins, where: str) -> list[str]:
    """One line per wrong key, in order (a union reports each of its branches)."""
    lines: dict[str, str] = {}
    for item in error.errors(include_url=False):
        key, text = _SCHEMA.explain(item)
        prefix = _origin(key, origins, where)
        lines.setdefault(key, f"{prefix}: {text}")
    return list(lines.values())


def _origin(key: str, origins: Origins, where: str) -> str:
    """The file or override that set `key`, or the nearest section above it."""
    parts = key.replace("[", ".[").split(".")
    for length in range(len(parts), 0, -1):
        found = origins.get(".".join(parts[:length]))
        if found is not None:
            return found
    return where
