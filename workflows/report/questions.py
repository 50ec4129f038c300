"""Sections about answers: question answering by kind with examples, and zero-shot classes."""

from __future__ import annotations

from smalti.workflows.evaluation.scores.tables import ClassRow, Example
from smalti.workflows.report.facts import Facts
from smalti.workflows.report.markup import Pictures, clip, escape, figure, section, table
from smalti.workflows.report.names import written

HEADS = {
    "by_kind": "kind of answer",
    "by_opening": "question begins with",
    "by_answer": "right answer",
}


def questions(facts: Facts, pictures: Pictures) -> str:
    """Accuracy by kind of question, and examples with their images."""
    found = facts.tables.get("questions")
    if not found:
        return ""
    tables = "".join(_breakdown(found.get(key, []), head) for key, head in HEADS.items())
    examples = facts.tables.get("examples", [])
    wrong = "".join(_example(line, pictures) for line in examples if not line["right"])
    right = "".join(_example(line, pictures) for line in examples if line["right"])
    body = f'<div class="grid third tables">{tables}</div>'
    body += (
        f'<h3>Wrong answers</h3><div class="grid tight">{wrong}</div>'
        if wrong
        else "<p>No wrong answer in the sample.</p>"
    )
    body += (
        f'<h3>Right answers</h3><div class="grid tight">{right}</div>'
        if right
        else "<p>No right answer in the sample.</p>"
    )
    lead = (
        "Held-out questions, answered by the exported model; right means the same words (case, "
        "punctuation and articles are ignored). <i>Question only</i> gives the most frequent "
        "training "
        "answer to the same question, without the image."
    )
    return section("questions", "Questions and answers", lead, body)


def _breakdown(rows: list[ClassRow], head: str) -> str:
    columns = [head, "n", "accuracy"] + (
        ["question only"] if rows and "question_only" in rows[0] else []
    )
    lines = []
    for row in rows:
        line = [
            escape(clip(str(row["key"]), 40)),
            f"{row['n']:,}",
            written(row["accuracy"], "share"),
        ]
        lines.append(
            line + ([written(row["question_only"], "share")] if "question_only" in row else [])
        )
    return table(columns, lines, range(1, len(columns)), "plain")


def _example(line: Example, pictures: Pictures) -> str:
    css, mark = ("right", "✓") if line["right"] else ("wrong", "✗")
    image = pictures.img(line["picture"], f"question: {line['question']}", "pixels")
    caption = (
        f'{escape(clip(line["question"]))}<span class="verdict {css}">{mark} '
        f"{escape(clip(line['given'], 60)) or '(nothing)'}</span>"
    )
    if not line["right"]:
        caption += f'<span class="note">right: {escape(clip(line["answer"], 60))}</span>'
    return figure(image, caption, "card small")


def zero_shot(facts: Facts) -> str:
    """Accuracy by label: the encoder's classes and the drawings, the worst first."""
    encoder = facts.tables.get("zero_shot", {}).get("classes", [])
    drawn = facts.tables.get("drawing_by_label", [])
    body = ""
    for rows, head in ((encoder, "encoder, held-out images"), (drawn, "drawings, by the judge")):
        lines = [
            [escape(clip(row["key"], 40)), f"{row['n']:,}", written(row["accuracy"], "share")]
            for row in rows
        ]
        body += table([head, "n", "accuracy"], lines, (1, 2), "plain")
    sentences = facts.tables.get("zero_shot", {}).get("sentences", {})
    lead = "Accuracy of each label, the worst first."
    if sentences:
        label, sentence = next(iter(sentences.items()))
        lead += (
            " The encoder compares an image with a sentence for each label, such as "
            f"“{escape(sentence)}” for {escape(label)}."
        )
    if not body:
        return ""
    return section(
        "zero-shot", "Class by class", lead, f'<div class="grid third tables">{body}</div>'
    )
