"""`smalti plan`: what a recipe costs on given machines."""

from __future__ import annotations

import argparse
import os
import sys

from smalti.cli.stages import recipe_options
from smalti.config import load_recipe
from smalti.errors import ConfigError, SmaltiError


def options(parser: argparse.ArgumentParser) -> None:
    recipe_options(parser, smoke=False)
    parser.add_argument(
        "--gpus", metavar="N", type=int,
        help="devices that share the work (default: the most of resources.workers that can share "
        "every batch)",
    )  # fmt: skip
    parser.add_argument(
        "--gpu",
        metavar="NAME",
        default="cpu",
        help="a100, h100, h200 or v100 at assumed rates; cpu: cores as fast as this machine's, "
        "measured now (default)",
    )
    parser.add_argument(
        "--images", metavar="N", type=float,
        help="images of the corpus; default: those of an existing corpus, else what the longest "
        "stage reads once",
    )  # fmt: skip
    parser.add_argument(
        "--vectors", metavar="N", type=float,
        help="feature vectors of the codebook; default: those of existing features, else images x "
        "patches",
    )  # fmt: skip
    parser.add_argument(
        "--width", metavar="C", type=int, help="numbers per vector; default: likewise"
    )
    parser.add_argument(
        "--length", metavar="L", type=int,
        help="mean tokens of a sequence of the language model; default: an image and 64 tokens if "
        "sequences are packed, else mllm.max_length",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> None:
    """Print the plan.

    Raises:
        ConfigError: for what cannot be planned (exit 2).
        SmaltiError: for what cannot fit, with the fix (exit 1).
    """
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    wrong = [
        f"--{name}"
        for name in ("gpus", "images", "vectors", "width", "length")
        if _below_one(arguments, name)
    ]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: expected a number of at least 1")
    # nothing is computed, so DeepSpeed need not look for a device
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from smalti.workflows.plan.base import cpu_rates, gpu_rates
    from smalti.workflows.recipe_plan import RecipePlan

    cpu = arguments.gpu.lower() == "cpu"
    rates = cpu_rates(arguments.width or 1152) if cpu else gpu_rates(arguments.gpu)
    vectors = int(arguments.vectors) if arguments.vectors else None
    images = int(arguments.images or 0)
    plan = RecipePlan(
        recipe, rates, arguments.gpus, vectors, arguments.width, arguments.length, images=images
    )
    for line in plan.lines():
        print(line)
    sys.stdout.flush()
    if plan.refusals:
        raise SmaltiError("cannot fit:\n  " + "\n  ".join(plan.refusals))


def _below_one(arguments: argparse.Namespace, name: str) -> bool:
    value = getattr(arguments, name)
    return value is not None and value < 1
