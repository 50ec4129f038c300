"""Commands with their options and help, in the order of the chain; help imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import smalti
from smalti.cli import doctor, models, plan, recipes, show, stages

BRIDGE = "recipes/unicode2-quickstart.yaml bridge.decoder=stabilityai/stable-diffusion-xl-base-1.0"
"""`smalti run` of that recipe comes before: the bridge reads its tokens and its language model."""

Adder = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Command:
    """One command: its line in the list, examples, options, and function."""

    name: str
    line: str
    examples: tuple[str, ...]
    run: Callable[[argparse.Namespace], None]
    options: Adder
    defaults: dict[str, Any] = field(default_factory=dict)


def _stage(
    name: str, line: str, words: str = "recipes/semhitok-quickstart.yaml out=out/mine"
) -> Command:
    example = f"smalti {name} {words}"
    return Command(
        name,
        line,
        (example,),
        stages.run,
        stages.recipe_options,
        {"only": name, "rest": "overrides"},
    )


GROUPS: dict[str, tuple[Command, ...]] = {
    "the whole chain": (
        Command(
            "quickstart",
            "the whole chain, small, on this machine; ends with a table of scores and a report",
            (
                "smalti quickstart --out out/quickstart",
                "smalti quickstart --images ~/pictures --out out/pictures",
            ),
            stages.quickstart,
            stages.quickstart_options,
            {"rest": "overrides"},
        ),
        Command(
            "run",
            "every stage of a recipe in order; finished stages are skipped",
            (
                "smalti run recipes/semhitok-256.yaml corpus.source=/data/images mllm.mixture.text=0 out=/data/semhitok",
                "smalti run recipes/semhitok-256.yaml --smoke",
            ),
            stages.run,
            stages.recipe_options,
            {"only": None, "rest": "overrides"},
        ),
    ),
    "one stage, in the order of the chain": (
        _stage("corpus", "images → shards, with captions, labels and questions"),
        _stage(
            "encoder", "the vision encoder: trained on the corpus, or a pretrained one recorded"
        ),
        _stage("features", "shards → patch features of the encoder"),
        _stage("codebook", "features → k-means centroids"),
        _stage("tokenizer", "train the visual tokenizer"),
        _stage("tokens", "shards → visual tokens"),
        _stage("mllm", "train the language model on text and visual tokens"),
        _stage("bridge", "unicode2: from codes to the conditioning of a diffusion decoder", BRIDGE),
        _stage("export", "a plain Hugging Face model that needs no smalti"),
        _stage("evaluate", "scores on held-out images, and the report"),
    ),
    "use what was trained": (
        Command(
            "generate",
            "text → images",
            (
                'smalti generate out/quickstart/export "a red circle" --out red.png --cfg 3 --seed 0 -n 4',
            ),
            models.generate,
            models.generate_options,
        ),
        Command(
            "ask",
            "image + text → text",
            ('smalti ask out/quickstart/export picture.png "is there a circle?"',),
            models.ask,
            models.ask_options,
            {"rest": "question"},
        ),
        Command(
            "reconstruct",
            "image → codes → image, side by side",
            ("smalti reconstruct out/quickstart/tokenizer a.jpg b.png --out pairs/",),
            models.reconstruct,
            models.reconstruct_options,
            {"rest": "images"},
        ),
    ),
    "look around": (
        Command(
            "recipes",
            "recipes that come with smalti: size, hardware, time and figures",
            ("smalti recipes", "smalti recipes semhitok-256", "smalti recipes --schema"),
            recipes.run,
            recipes.options,
        ),
        Command(
            "plan",
            "memory, traffic, hours and storage of a recipe on N GPUs; refuses what cannot fit",
            (
                "smalti plan recipes/semhitok-256.yaml --gpus 32 --gpu h100",
                "smalti plan recipes/semhitok-quickstart.yaml",
            ),
            plan.run,
            plan.options,
            {"rest": "overrides"},
        ),
        Command(
            "show",
            "the record of an artifact: counts, scores, parents, settings",
            ("smalti show out/quickstart/tokenizer", "smalti show out/quickstart"),
            show.run,
            show.options,
        ),
        Command(
            "doctor",
            "what this machine and cluster have, what is missing, how to fix it",
            ("smalti doctor", "smalti doctor recipes/semhitok-256.yaml out=s3://bucket/semhitok"),
            doctor.run,
            doctor.options,
            {"rest": "overrides"},
        ),
    ),
}
COMMANDS = {command.name: command for group in GROUPS.values() for command in group}


class _Parser(argparse.ArgumentParser):
    """argparse whose errors name the help."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"smalti: error: {message}\nsee `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; `arguments.run(arguments)` runs the parsed one."""
    parser = _Parser(
        prog="smalti", usage="smalti COMMAND …", description=_overview(), add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    about = parser.add_argument_group("options")
    about.add_argument(
        "-h", "--help", action="help", help="this text; `smalti COMMAND --help` for one command"
    )
    about.add_argument(
        "-V",
        "--version",
        action="version",
        version=f"smalti {smalti.__version__}",
        help="the version",
    )
    commands = parser.add_subparsers(
        dest="command",
        metavar="COMMAND",
        required=True,
        prog="smalti",
        help=argparse.SUPPRESS,
        parser_class=_Parser,
    )
    for command in COMMANDS.values():
        examples = "\n".join(f"  {example}" for example in command.examples)
        sub = commands.add_parser(
            command.name,
            help=command.line,
            description=command.line,
            epilog=f"example{'s' if len(command.examples) > 1 else ''}:\n{examples}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.options(sub)
        sub.set_defaults(run=command.run, **command.defaults)
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the arguments of the command line.

    Options may be between positionals (`run RECIPE --smoke seed=1`), which argparse refuses once a
    list has begun: what is left over goes to the list that the command names as `rest`.
    """
    parser = build_parser()
    arguments, left = parser.parse_known_args(argv)
    rest = getattr(arguments, "rest", None)
    wrong = [text for text in left if text.startswith("-") or rest is None]
    if wrong:
        parser.exit(
            2,
            f"smalti: error: unknown argument {wrong[0]!r}\nsee `smalti {arguments.command} --help`\n",
        )
    if left and rest is not None:
        setattr(arguments, rest, [*getattr(arguments, rest), *left])
    return arguments


def _overview() -> str:
    """What smalti is, and a line per command, by group."""
    lines = [
        "From a folder of images to a visual tokenizer, token shards, a model that sees and draws, and its scores.",
        "",
    ]
    for title, group in GROUPS.items():
        lines.append(f"{title}:")
        lines += [f"  {command.name:<12} {command.line}" for command in group]
        lines.append("")
    lines.append("example:\n  smalti quickstart --out out/quickstart")
    return "\n".join(lines)
