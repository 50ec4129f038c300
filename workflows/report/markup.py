"""Small pieces of HTML.

All text from data passes `escape`: captions and labels are untrusted.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from smalti import storage

__all__ = ["Pictures", "clip", "escape", "figure", "section", "table"]


class Pictures:
    """The pictures of an evaluation as `<img>` with the bytes inside."""

    def __init__(self, evaluation: str | None) -> None:
        self.folder = storage.join(evaluation, "pictures") if evaluation else None

    def img(self, name: str, alt: str, css: str = "") -> str:
        """The picture as a data URI; an empty string if its file is missing."""
        place = storage.join(self.folder, f"{name}.png") if self.folder else ""
        if not place or not storage.exists(place):
            return ""
        data = base64.b64encode(storage.read_bytes(place)).decode()
        return (
            f'<img class="{css}" alt="{escape(alt)}" src="data:image/png;base64,{data}" '
            'loading="lazy">'
        )


def clip(text: str, most: int = 120) -> str:
    """The text, cut to `most` characters."""
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def section(key: str, title: str, lead: str, body: str) -> str:
    """A section with an anchor, a heading and a lead sentence; empty without a body."""
    if not body:
        return ""
    return f'<section id="{key}"><h2>{escape(title)}</h2><p class="lead">{lead}</p>{body}</section>'


def figure(inner: str, caption: str, css: str = "") -> str:
    """Pictures (HTML) with a caption (HTML) below."""
    return f'<figure class="{css}">{inner}<figcaption>{caption}</figcaption></figure>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Sequence[int] = (), css: str = ""
) -> str:
    """A table of HTML cells, which scrolls on a narrow screen.

    Args:
        numeric: columns that are aligned to the right.
    """

    def cell(tag: str, column: int, text: str) -> str:
        return f"<{tag}{' class=num' if column in numeric else ''}>{text}</{tag}>"

    lines = [
        "<tr>" + "".join(cell("td", i, text) for i, text in enumerate(row)) + "</tr>"
        for row in rows
    ]
    if not lines:
        return ""
    header = "<tr>" + "".join(cell("th", i, text) for i, text in enumerate(head)) + "</tr>"
    return (
        '<div class="scroll"><table '
        f'class="{css}"><thead>{header}</thead><tbody>{"".join(lines)}</tbody></table></div>'
    )
