"""`quickstart`, `run`, and one command per stage."""

from __future__ import annotations

import argparse

from smalti.config import load_recipe
from smalti.errors import ConfigError


def recipe_options(parser: argparse.ArgumentParser, smoke: bool = True) -> None:
    parser.add_argument(
        "recipe",
        metavar="RECIPE",
        help="a YAML file or URL, or the name of a recipe that comes with smalti",
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],
        help="keys of the recipe to override, such as seed=1 or mllm.train.steps=500",
    )
    if smoke:
        parser.add_argument(
            "--smoke",
            action="store_true",
            help="run the same code in minutes: all sizes shrunk, on generated images",
        )


def quickstart_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        metavar="DIR",
        default="out/quickstart",
        help="output folder (default: %(default)s)",
    )
    parser.add_argument(
        "--images", metavar="DIR", help="a folder of your own images instead of easy-vqa"
    )
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="keys of recipes/semhitok-quickstart.yaml to override, such as seed=1",
    )


def run(arguments: argparse.Namespace) -> None:
    """Run all stages of a recipe, or only the stage `arguments.only`."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from smalti.workflows.chain import run_recipe

    if arguments.smoke:
        from smalti.workflows.smoke import shrink

        recipe = shrink(recipe)
    artifacts = run_recipe(recipe, only=arguments.only)
    for artifact in artifacts:
        print(artifact.path)


def quickstart(arguments: argparse.Namespace) -> None:
    if any(text.startswith("out=") for text in arguments.overrides):
        raise ConfigError("quickstart takes its folder as --out DIR, not as out=DIR")
    from smalti.workflows import quickstart as chain

    chain.run(arguments.out, arguments.images, arguments.overrides)
