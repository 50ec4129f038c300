"""Pages that MkDocs generates from the code: the recipe reference and the table of shipped recipes."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

from smalti.cli.recipes import read_head, shipped
from smalti.config import find_recipe, load_recipe
from smalti.schema.reference import reference_markdown

REFERENCE = """# Recipe reference

Every key of a recipe, generated from the schema. `smalti recipes --schema` prints the same as a JSON Schema; an editor
with YAML support checks and completes a recipe whose first line is
`# yaml-language-server: $schema=recipe.schema.json`.

"""
SHIPPED = """# Shipped recipes

Also on the command line: `smalti recipes`, and `smalti recipes NAME` for one of them. A name works wherever a path does:
`smalti run semhitok-256 --smoke`. Copy one, or start a file of your own with `extends: semhitok-256`.
"""

ROOT = Path(__file__).resolve().parents[1]


@event_priority(100)  # before mkdocstrings reads its settings
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Point mkdocstrings at a copy of the code in which `tokenizers` is a package.

    Griffe, which reads the docstrings, skips folders without `__init__.py`, and `tokenizers/` must
    not have one.
    """
    copy = Path(tempfile.mkdtemp(prefix="smalti-docs-"))
    shutil.copytree(ROOT / "smalti", copy / "smalti", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "smalti" / "tokenizers" / "__init__.py").touch()
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(copy)]
    config.extra["api_copy"] = str(copy)
    return config


def on_post_build(config: MkDocsConfig) -> None:
    """Remove the copy."""
    shutil.rmtree(config.extra["api_copy"], ignore_errors=True)


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site."""
    pages = {
        "recipe_reference.md": REFERENCE + reference_markdown(),
        "recipes.md": recipes_markdown(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def recipes_markdown() -> str:
    """A section for each shipped recipe: its title, its system, and the facts of its head."""
    parts = [SHIPPED]
    for name in shipped():
        path = find_recipe(name)
        head = read_head(path)
        rows = "\n".join(
            f"| {label} | {text.replace('|', chr(92) + '|')} |"
            for label, text in head.facts.items()
        )
        parts.append(
            f"## {name}\n\n{head.title}\n\n| System | {load_recipe(path).system} |\n|---|---|\n{rows}\n"
        )
    return "\n".join(parts)
