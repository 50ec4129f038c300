"""Questions and answers as text: normalisation, kinds, and the baseline that never looks at the
picture.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from smalti.workflows.evaluation.scores.tables import ClassRow

ARTICLES = {"a", "an", "the"}
YES_NO = {"yes", "no"}


def normalise(text: str) -> str:
    """A text as exact match compares it.

    Lower case, single spaces, no articles, no punctuation at the edges of words: `A teal  Circle.`
    becomes `teal circle`. Signs inside a word are kept (`3.5`, `t-shirt`). If only articles or
    punctuation are left, the stripped lower-case text is returned, so that different answers stay
    different.
    """
    words = [re.sub(r"^[^\w+\-]+|[^\w%]+$", "", word) for word in text.lower().split()]
    kept = [word for word in words if word and word not in ARTICLES]
    return " ".join(kept) or text.lower().strip()


def same_answer(given: str, right: str) -> bool:
    """Exact match of the normalised texts."""
    return normalise(given) == normalise(right)


def answer_kind(answer: str) -> str:
    """`yes / no`, `number` or `other`, from a right answer."""
    text = normalise(answer)
    if text in YES_NO:
        return "yes / no"
    return "number" if re.fullmatch(r"[+-]?\d+(\.\d+)?%?", text) else "other"


def opening(question: str) -> str:
    """The first two words of a question, lower case: `what color`, `is there`."""
    return " ".join(re.findall(r"[\w'-]+", question.lower())[:2])


@dataclass
class QuestionOnly:
    """Answers a question with its most frequent training answer.

    Texts that training lacks get the most frequent answer of all. Texts are compared after
    `normalise`; ties take the first answer in alphabetical order.
    """

    by_question: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    overall: Counter[str] = field(default_factory=Counter)

    def learn(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Count (question, answer) pairs of the training split."""
        for question, answer in pairs:
            right = normalise(answer)
            self.by_question[normalise(question)][right] += 1
            self.overall[right] += 1

    def answer(self, question: str) -> str | None:
        """The guess; None when nothing was learned."""
        counts = self.by_question.get(normalise(question)) or self.overall
        if not counts:
            return None
        return min(counts, key=lambda text: (-counts[text], text))


def breakdown(
    keys: Sequence[str], hits: Sequence[bool], guesses: Sequence[bool] | None, most: int = 16
) -> list[ClassRow]:
    """Accuracy by key, the most frequent first.

    With `guesses`, the rows also hold `question_only`. Keys beyond the `most` frequent ones are
    summed up in a last row `all others`.
    """
    frequent = [
        key for key, _ in sorted(Counter(keys).items(), key=lambda item: (-item[1], item[0]))
    ]
    named = set(frequent[:most]) if len(frequent) > most + 1 else set(frequent)
    rows: dict[str, list[int]] = defaultdict(list)
    for index, key in enumerate(keys):
        rows[key if key in named else "all others"].append(index)
    order = [key for key in frequent if key in named] + (
        ["all others"] if len(named) < len(frequent) else []
    )
    table = []
    for key in order:
        chosen = rows[key]
        row: ClassRow = {
            "key": key,
            "n": len(chosen),
            "accuracy": sum(hits[i] for i in chosen) / len(chosen),
        }
        if guesses is not None:
            row["question_only"] = sum(guesses[i] for i in chosen) / len(chosen)
        table.append(row)
    return table
