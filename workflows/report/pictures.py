"""Sections that show images: reconstructions, patches that share a code, code usage, drawings."""

from __future__ import annotations

from smalti.workflows.report.charts import rank_chart
from smalti.workflows.report.facts import Facts
from smalti.workflows.report.markup import Pictures, clip, escape, figure, section
from smalti.workflows.report.names import written

COLUMNS = {"input": "input", "semantic": "semantic only", "decoded": "all codes"}
JUDGES = {"judge": "judge", "zero_shot": "encoder"}


def reconstructions(facts: Facts, pictures: Pictures) -> str:
    """Input, semantic-only and full decoding, side by side."""
    figures = []
    for line in facts.tables.get("grid", []):
        kinds = [kind for kind in COLUMNS if kind in line]
        images = "".join(
            f"<span>{pictures.img(line[kind], COLUMNS[kind], 'pixels')}"
            f"<small>{COLUMNS[kind]}</small></span>"
            for kind in kinds
        )
        caption = f"PSNR {written(line['psnr'], 'dB')}"
        if "psnr_semantic_only" in line:
            caption += f", semantic only {written(line['psnr_semantic_only'], 'dB')}"
        title = f"<b>{escape(clip(line['caption'], 80))}</b> · " if line.get("caption") else ""
        figures.append(
            figure(f'<div class="triple n{len(kinds)}">{images}</div>', title + caption, "card")
        )
    spread = facts.tables.get("psnr")
    lead = "Held-out images, encoded to codes and decoded."
    if spread:
        lead += (
            f" Over the whole sample, PSNR is {written(spread['p05'], 'dB')} at the 5th "
            f"percentile, {written(spread['p50'], 'dB')} at the median and "
            f"{written(spread['p95'], 'dB')} at the 95th."
        )
    return section(
        "reconstructions",
        "Reconstructions",
        lead,
        f'<div class="grid wide">{"".join(figures)}</div>' if figures else "",
    )


def gallery(facts: Facts, pictures: Pictures) -> str:
    """Rows of patches that share a code."""
    rows = []
    for line in facts.tables.get("gallery", []):
        images = "".join(
            pictures.img(name, f"a patch of code {line['code']}", "pixels patch")
            for name in line["pictures"]
        )
        caption = (
            f"<b>code {line['code']}</b> · {line['patches']:,} patches in {line['images']:,} images"
        )
        rows.append(figure(f'<div class="strip">{images}</div>', caption, "row"))
    what = "semantic code" if facts.tables.get("gallery_of") == "semantic" else "code"
    lead = (
        f"Each row is one {what}: the bright square is the patch, the dimmed rim its "
        "surroundings; every patch comes from another held-out image. Half of the rows are the "
        "codes with the most detail, half are spread from the most used to the least used."
    )
    return section(
        "gallery",
        "Patches that share a code",
        lead,
        f'<div class="grid rows">{"".join(rows)}</div>' if rows else "",
    )


def codes(facts: Facts) -> str:
    """How often each code is used, by rank."""
    figures = []
    histograms = {
        "semantic codes": facts.tables.get("semantic_histogram"),
        "all codes": facts.tables.get("histogram"),
    }
    for title, found in histograms.items():
        if not found:
            continue
        chart = rank_chart(
            [(int(rank), int(count)) for rank, count in found["points"]], f"{title}: uses by rank"
        )
        caption = (
            f"<b>{title}</b> · {found['used']:,} of {found['codes']:,} used at least once in "
            f"{found['tokens']:,} held-out tokens; across: rank, up: uses (both logarithmic)"
        )
        if found["tokens"] < found["codes"]:
            caption += ". There are fewer tokens than codes, so not all of them could occur"
        figures.append(figure(chart, caption, "card chart"))
    lead = (
        "Codes sorted by how often they occur. A line that ends early means that many codes are "
        "not used."
    )
    return section(
        "codes",
        "Code usage",
        lead,
        f'<div class="grid half">{"".join(figures)}</div>' if figures else "",
    )


def drawings(facts: Facts, pictures: Pictures) -> str:
    """Drawn images with their prompts and what each judge saw."""
    figures = []
    for line in facts.tables.get("drawings", []):
        verdicts = ""
        for judge, seen in line["seen"].items():
            if line["label"] is None:
                continue
            right = seen == line["label"]
            name = JUDGES.get(judge, judge)
            mark = "✓" if right else f"✗ {escape(clip(seen, 40))}"
            verdicts += (
                f'<span class="verdict {"right" if right else "wrong"}">{name} {mark}</span>'
            )
        image = pictures.img(line["picture"], f"drawn from: {line['prompt']}", "pixels")
        figures.append(
            figure(image, f"<b>“{escape(clip(line['prompt'], 90))}”</b>{verdicts}", "card small")
        )
    lead = (
        "Drawn by the exported language model from the prompt under each image, not "
        "selected. ✓: the judge recognises the label that the prompt names; ✗: its answer. "
        "<i>judge</i> is a classifier trained on real images only, <i>encoder</i> the frozen "
        "encoder's zero-shot classes."
    )
    return section(
        "drawings",
        "Drawn images",
        lead,
        f'<div class="grid tight">{"".join(figures)}</div>' if figures else "",
    )
