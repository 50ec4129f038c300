"""Visual question answering by exact match, with an answer without the image."""

from __future__ import annotations

import numpy as np

from smalti.progress import Progress
from smalti.workflows.evaluation.scores.answers import (
    QuestionOnly,
    answer_kind,
    breakdown,
    opening,
    same_answer,
)
from smalti.workflows.evaluation.scores.heldout import HeldOut, Question
from smalti.workflows.evaluation.scores.measure_result import MeasureResult, Score, share
from smalti.workflows.evaluation.scores.models import Models
from smalti.workflows.evaluation.scores.pixels import thumbnail
from smalti.workflows.evaluation.scores.tables import Example

SHOWN_EACH = 12
ANSWER_TOKENS = 16


def measure_questions(data: HeldOut, models: Models) -> MeasureResult:
    """Share of held-out questions answered exactly right.

    With tables by kind of answer, first words of the question, and answer.
    """
    if data.job.export is None:
        return MeasureResult(skipped="no exported language model")
    questions = data.questions
    if not questions:
        return MeasureResult(skipped="the held-out split has no questions")
    guesser = QuestionOnly()
    for text in data.training_texts:
        guesser.learn((pair["question"], pair["answer"]) for pair in text["qa"])
    given = ask(questions, models)
    hits = [
        same_answer(answer, question.answer)
        for answer, question in zip(given, questions, strict=True)
    ]
    guesses = (
        [same_answer(guesser.answer(one.question) or "", one.answer) for one in questions]
        if guesser.overall
        else None
    )
    baseline = {"question_only": share(guesses)} if guesses is not None else {}
    result = MeasureResult({"qa/accuracy": Score(share(hits), len(hits), baseline=baseline)})
    result.tables["questions"] = {
        "by_kind": breakdown([answer_kind(one.answer) for one in questions], hits, guesses),
        "by_opening": breakdown([opening(one.question) for one in questions], hits, guesses),
        "by_answer": breakdown([one.answer for one in questions], hits, guesses, most=24),
    }
    result.tables["examples"] = _examples(data, result, given, hits)
    return result


def ask(questions: list[Question], models: Models) -> list[str]:
    """The model's answers, in the order of the questions.

    Questions of similar length form a batch.
    """
    size = models.job.evaluate.batch_size
    order = sorted(range(len(questions)), key=lambda index: (len(questions[index].question), index))
    answers = [""] * len(questions)
    with Progress(len(questions), "questions", "evaluate: questions") as progress:
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            codes_BT = models.to_codes(np.stack([questions[index].row.codes for index in chosen]))
            texts = [questions[index].question for index in chosen]
            found = models.language.ask_codes(codes_BT, texts, ANSWER_TOKENS, size)
            for index, answer in zip(chosen, found, strict=True):
                answers[index] = answer
            progress.update(len(chosen))
    return answers


def _examples(
    data: HeldOut, result: MeasureResult, given: list[str], hits: list[bool]
) -> list[Example]:
    """Up to a dozen wrong and a dozen right answers.

    Evenly over the sample, each about another image.
    """
    chosen: list[int] = []
    for wanted in (False, True):
        places = []
        seen = set()
        for index, hit in enumerate(hits):
            if hit == wanted and data.questions[index].row.image_id not in seen:
                seen.add(data.questions[index].row.image_id)
                places.append(index)
        chosen += [
            places[int(place)]
            for place in np.linspace(0, len(places) - 1, min(SHOWN_EACH, len(places)))
        ]
    pixels = data.pixels([data.questions[index].row for index in chosen])
    lines: list[Example] = []
    for number, (index, hwc) in enumerate(zip(chosen, pixels, strict=True)):
        name = f"question-{number:02d}"
        result.pictures[name] = thumbnail(hwc, 256)
        one = data.questions[index]
        line: Example = {
            "picture": name,
            "question": one.question,
            "answer": one.answer,
            "given": given[index],
            "right": hits[index],
        }
        lines.append(line)
    return lines
