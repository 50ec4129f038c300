"""The page: head, styles and the sections in reading order.

It loads nothing: styles, charts and pictures are inside.
"""

from __future__ import annotations

from pathlib import Path

import smalti
from smalti.workflows.report.facts import Facts
from smalti.workflows.report.markup import Pictures, escape
from smalti.workflows.report.names import duration
from smalti.workflows.report.pictures import codes, drawings, gallery, reconstructions
from smalti.workflows.report.questions import questions, zero_shot
from smalti.workflows.report.run import corpus, curves, fingerprints, mlflow, recipe, stages
from smalti.workflows.report.scores import headlines, scores

TITLES = {
    "scores": "Scores",
    "run": "What ran",
    "reconstructions": "Reconstructions",
    "gallery": "Shared codes",
    "codes": "Code usage",
    "drawings": "Drawings",
    "questions": "Questions",
    "zero-shot": "Classes",
    "curves": "Training",
    "corpus": "Corpus",
    "recipe": "Recipe",
    "artifacts": "Artifacts",
    "mlflow": "MLflow",
}


def page(facts: Facts) -> str:
    """The whole report as one HTML document."""
    pictures = Pictures(facts.evaluation)
    parts = [
        scores(facts),
        stages(facts),
        reconstructions(facts, pictures),
        gallery(facts, pictures),
        codes(facts),
        drawings(facts, pictures),
        questions(facts, pictures),
        zero_shot(facts),
        curves(facts),
        corpus(facts),
        recipe(facts),
        fingerprints(facts),
        mlflow(facts),
    ]
    body = "".join(parts)
    links = "".join(
        f'<a href="#{key}">{title}</a>'
        for key, title in TITLES.items()
        if f'<section id="{key}">' in body
    )
    css = Path(__file__).with_name("style.css").read_text()
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(facts.name)} · smalti</title><style>{css}</style></head><body>"
        f"{_header(facts)}<nav "
        f'aria-label="Sections"><div>{links}</div></nav><main>{headlines(facts)}{body}</main>'
        f"<footer>Made by smalti {escape(smalti.__version__)}. This page loads nothing from "
        "elsewhere; <code>report.json</code> beside it holds the same "
        "figures.</footer></body></html>\n"
    )


def _header(facts: Facts) -> str:
    """Name, machine and time."""
    found = facts.machine
    gpus = f", {len(found['gpus'])} × {found['gpus'][0]}" if found["gpus"] else ", no GPU"
    where = f"{found['cpu']}, {found['cores']} cores, {found['memory_bytes'] / 2**30:.0f} GiB{gpus}"
    tiles = "".join(f'<i style="--d:{index}"></i>' for index in range(12))
    return (
        f'<header><div class="wrap"><div class="mark" aria-hidden="true">{tiles}</div>'
        f'<p class="kind">{escape(str(facts.recipe.get("system", "")))} · smalti '
        f"{escape(smalti.__version__)}</p>"
        f"<h1>{escape(facts.name)}</h1>"
        f"<p>{escape(facts.started.replace('T', ' ').replace('+00:00', ' UTC'))} · "
        f"{duration(facts.seconds)}"
        f" · {escape(where)}</p></div></header>"
    )
