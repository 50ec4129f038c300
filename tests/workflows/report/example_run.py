"""A run with every part of a report, its texts as nasty as a stranger's may be."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from smalti import artifact
from smalti.artifact import Artifact
from smalti.workflows.evaluation.scores.answers import breakdown
from smalti.workflows.evaluation.scores.measure_result import MeasureResult, Score, save_result

NASTY = '<script>alert("x")</script> & "quoted" \' </style>'


EMPTY_ELEMENTS = {"meta", "img", "line", "br", "circle", "polyline", "polygon"}


class Page(HTMLParser):
    """Attributes of every element, the text, and whether the elements close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in EMPTY_ELEMENTS:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack, f"</{tag}> closes nothing"
        assert self.stack.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def finish(
    out: Path,
    name: str,
    counts: dict[str, int],
    seconds: float = 1.0,
    scores: dict[str, Any] | None = None,
) -> Artifact:
    place = artifact.begin(str(out / name), name.rsplit("/", 1)[-1], {"source": NASTY}, {})
    assert isinstance(place, artifact.Workspace)
    return place.finish(counts, seconds, scores=scores)


def write_history(folder: Path, rows: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def evaluation(out: Path, folder: str = "evaluate") -> Artifact:
    """An evaluation with every table, its texts as nasty as a stranger's captions may be."""
    picture = np.zeros((8, 8, 3), np.uint8)
    names = [
        "reconstruction-00-input",
        "reconstruction-00-semantic",
        "reconstruction-00-decoded",
        "code-00-0",
        "drawing-00",
        "question-00",
    ]
    part = MeasureResult(
        scores={
            "qa/accuracy": Score(0.92, 2000, baseline={"question_only": 0.67}),
            "reconstruction/psnr": Score(23.0, 100),
            "own/measure": Score(3.0, 7, higher_is_better=False),
        },
        pictures=dict.fromkeys(names, picture),
    )
    place = artifact.begin(str(out / folder), folder, {}, {})
    assert isinstance(place, artifact.Workspace)
    record = save_result(place.path, "all", part)
    grid = {
        "image_id": "1",
        "caption": NASTY,
        "input": names[0],
        "semantic": names[1],
        "decoded": names[2],
        "psnr": 23.0,
    }
    hits = [True, False, True]
    tables = {
        "grid": [grid | {"psnr_semantic_only": 20.0}],
        "psnr": {"p05": 20.0, "p50": 23.0, "p95": 27.0},
        "gallery": [{"code": 5, "patches": 12, "images": 9, "pictures": ["code-00-0"]}],
        "gallery_of": "semantic",
        "histogram": {"points": [[1, 50], [2, 3], [3, 0]], "codes": 3000, "used": 2, "tokens": 53},
        "drawings": [
            {
                "picture": "drawing-00",
                "prompt": NASTY,
                "label": "red",
                "seen": {"judge": NASTY, "zero_shot": "red"},
            }
        ],
        "questions": {"by_kind": breakdown([NASTY, "b", "b"], hits, hits)},
        "examples": [
            {
                "picture": "question-00",
                "question": NASTY,
                "answer": NASTY,
                "given": NASTY,
                "right": False,
            }
        ],
        "zero_shot": {
            "classes": [{"key": NASTY, "n": 3, "accuracy": 0.5}],
            "sentences": {NASTY: NASTY},
        },
        "skipped": {"retrieval": NASTY},
    }
    (out / folder / "tables.json").write_text(json.dumps(tables))
    made = place.finish({"scores": 3}, 9.0, scores=record["scores"])
    scores = {key: dict(score) for key, score in made.scores.items()}
    scores["qa/accuracy"]["goal"], scores["reconstruction/psnr"]["goal"] = 0.9, 24.0
    return Artifact(**{**vars(made), "scores": scores})
