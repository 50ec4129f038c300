"""`smalti recipes`: the recipes that come with smalti, from the comments at their heads."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from dataclasses import dataclass

from smalti import storage
from smalti.config import find_recipe, load_recipe, recipes_folder
from smalti.errors import ConfigError

LABELS = ("Size", "Hardware", "Time", "Figures")
MAX_WIDTH = 110
_LABELLED = re.compile(rf"({'|'.join(LABELS)})\s+(\S.*)")


@dataclass(frozen=True)
class Head:
    """The comment at the head of a recipe.

    Attributes:
        title: its first paragraph, in one line.
        facts: what it says of size, hardware, time and figures, by label.
        text: the whole comment, without `#`.
    """

    title: str
    facts: dict[str, str]
    text: str


def options(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `smalti recipes`."""
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="show this recipe: its path, and its whole head"
    )
    parser.add_argument(
        "--schema",
        action="store_true",
        help="print the JSON Schema of recipes for editors: completion and checks while writing YAML",
    )


def run(arguments: argparse.Namespace) -> None:
    """List the recipes, or show one, or print the schema."""
    if arguments.schema:
        from smalti.schema.reference import schema_text

        print(schema_text(), end="")
    elif arguments.recipe:
        path = find_recipe(arguments.recipe)
        print(f"{path}\n\n{read_head(path).text}")
    else:
        for name in shipped():
            print(_summary(name) + "\n")
        print("Show one with `smalti recipes NAME`; run one with `smalti run NAME`.")


def shipped() -> list[str]:
    """Names of the recipes that come with smalti, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def read_head(path: str) -> Head:
    """The head of a recipe file: its comment lines before the first key."""
    lines = []
    for line in storage.read_bytes(path).decode("utf-8-sig").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# yaml-language-server:"):
            lines.append(line.removeprefix("#").removeprefix(" ").rstrip())
    return parse_head("\n".join(lines))


def parse_head(text: str) -> Head:
    """Title and facts of a head. A fact is a line `Label  text`; indented lines below continue it."""
    paragraph = text.strip().partition("\n\n")[0]
    facts: dict[str, str] = {}
    label = None
    for line in text.splitlines():
        found = _LABELLED.match(line)
        if found:
            label = found[1]
            facts[label] = found[2].strip()
        elif label and line.startswith(" "):
            facts[label] += f" {line.strip()}"
        else:
            label = None
    return Head(" ".join(paragraph.split()), facts, text.strip("\n"))


def _summary(name: str) -> str:
    """A recipe of smalti in a few lines: name, system, title and facts."""
    path = find_recipe(name)
    try:
        system = load_recipe(path).system
    except ConfigError as error:
        raise ConfigError(
            f"{path} comes with smalti, but it is not a valid recipe: {error}"
        ) from error
    head = read_head(path)
    width = min(MAX_WIDTH, shutil.get_terminal_size((MAX_WIDTH, 24)).columns)
    lines = [name, *textwrap.wrap(head.title, width, initial_indent="  ", subsequent_indent="  ")]
    for label, text in {"System": system, **head.facts}.items():
        lines += textwrap.wrap(
            text, width, initial_indent=f"  {label.lower():<10}", subsequent_indent=" " * 12
        )
    return "\n".join(lines)
