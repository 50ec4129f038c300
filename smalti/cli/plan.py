"""`smalti plan`: what the stages of a recipe would cost at another size, on other machines."""

from __future__ import annotations

import argparse
import os

from smalti.artifact import Artifact
from smalti.cli.stages import recipe_options
from smalti.config import load_recipe
from smalti.errors import ConfigError

VECTORS, WIDTH = 150_000_000, 1152  # UniCode2: 558K images through SigLIP-so400m


def options(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, smoke=False)
    parser.add_argument("--gpus", metavar="N", type=int, help="devices that share the work (default: 1, or all cores)")
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        default="cpu",
        help="a100, h100 or h200 at assumed rates; cpu: cores as fast as this machine's, measured now (default)",
    )
    parser.add_argument(
        "--vectors", metavar="N", type=float,
        help=f"feature vectors; default: those of the recipe's features where they stand, else {VECTORS:,}",
    )  # fmt: skip
    parser.add_argument("--width", metavar="C", type=int, help=f"numbers a vector; default: likewise, else {WIDTH}")


def run(arguments: argparse.Namespace) -> None:
    """Print the plan; ConfigError where something cannot fit."""
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    if (
        (arguments.gpus is not None and arguments.gpus < 1)
        or (arguments.vectors or 1) < 1
        or (arguments.width or 1) < 1
    ):
        raise ConfigError("--gpus, --vectors and --width take numbers of at least 1")
    from smalti.workflows.plan import plan_codebook
    from smalti.workflows.plan.base import cpu_rates, gpu_rates
    from smalti.workflows.stage import stage_path

    features = Artifact.find(stage_path(recipe, "features"))
    vectors = int(arguments.vectors or (features.counts.get("train", VECTORS) if features else VECTORS))
    width = arguments.width or (features.counts.get("dim", WIDTH) if features else WIDTH)
    cpu = arguments.gpu == "cpu"
    rates = cpu_rates(width) if cpu else gpu_rates(arguments.gpu)
    plan = plan_codebook(recipe.codebook, vectors, width, rates, arguments.gpus or (os.cpu_count() if cpu else 1) or 1)
    print("\n".join(plan.lines()))
    plan.check()
