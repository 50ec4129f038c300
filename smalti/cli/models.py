"""`generate`, `ask` and `reconstruct`: a trained model or tokenizer at work on single images."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from smalti import images, storage
from smalti.errors import ConfigError, DataError, ImageError
from smalti.progress import log

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 2
MAX_PIXELS = 300_000_000


def generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="folder or URL of an exported model (OUT/export)"
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what to draw")
    parser.add_argument(
        "--out",
        metavar="FILE",
        required=True,
        help="image file; with -n above 1 a grid, and FILE-1, FILE-2, …",
    )
    parser.add_argument(
        "-n", metavar="N", type=_at_least(1, int), default=1, help="images to draw (default: 1)"
    )
    parser.add_argument(
        "--cfg",
        metavar="S",
        type=_at_least(0.0, float),
        default=3.0,
        help="guidance scale; 1 is off (default: 3)",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=0,
        help="the same seed draws the same images (default: 0)",
    )
    parser.add_argument(
        "--temperature",
        metavar="T",
        type=_at_least(0.0, float),
        default=1.0,
        help="0 is greedy (default: 1)",
    )
    parser.add_argument(
        "--top-k",
        metavar="K",
        type=_at_least(0, int),
        default=0,
        help="draw from the K likeliest codes; 0 is off",
    )
    parser.add_argument(
        "--top-p",
        metavar="P",
        type=_fraction,
        default=1.0,
        help="draw from the likeliest codes that sum to P; 1 is off",
    )


def generate(arguments: argparse.Namespace) -> None:
    _image_format(arguments.out)
    from smalti.mllm.inference import VisualModel

    model = VisualModel.from_pretrained(arguments.model)
    drawn = model.generate(
        [arguments.prompt] * arguments.n,
        cfg=arguments.cfg,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    if len(drawn) == 1:
        _save(drawn[0], arguments.out)
        return
    columns = max(1, round(len(drawn) ** 0.5))
    _save(_grid([drawn[i : i + columns] for i in range(0, len(drawn), columns)]), arguments.out)
    stem, suffix = os.path.splitext(arguments.out)
    for number, image in enumerate(drawn, start=1):
        _save(image, f"{stem}-{number}{suffix}")


def ask_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="folder or URL of an exported model (OUT/export)"
    )
    parser.add_argument("image", metavar="IMAGE", help="image file or URL")
    parser.add_argument(
        "question", metavar="QUESTION", nargs="+", help="one or more questions, each in quotes"
    )
    parser.add_argument(
        "--max-new-tokens",
        metavar="N",
        type=_at_least(1, int),
        default=64,
        help="longest answer (default: 64)",
    )


def ask(arguments: argparse.Namespace) -> None:
    image = _read(arguments.image)
    from smalti.mllm.inference import VisualModel

    model = VisualModel.from_pretrained(arguments.model)
    questions = arguments.question
    answers = model.ask(
        [image] * len(questions), questions, max_new_tokens=arguments.max_new_tokens
    )
    for answer in answers:
        print(answer)


def reconstruct_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "tokenizer", metavar="TOKENIZER", help="folder or URL of a tokenizer (OUT/tokenizer)"
    )
    parser.add_argument("images", metavar="IMAGE", nargs="+", help="image files or URLs")
    parser.add_argument(
        "--out", metavar="DIR", required=True, help="folder for the pictures, one PNG an image"
    )


def reconstruct(arguments: argparse.Namespace) -> None:
    """A PNG an image: input, reconstruction, and the semantic codes alone where the tokenizer can
    decode them.
    """
    import torch

    from smalti.api import load_tokenizer

    tokenizer = load_tokenizer(arguments.tokenizer)
    size = tokenizer.image_size
    names = _unique_names(arguments.images)
    for path, name in zip(arguments.images, names, strict=True):
        try:
            pixels = images.to_pixels(storage.read_bytes(path), size, max_pixels=MAX_PIXELS)
        except ImageError as error:
            raise DataError(f"{path}: {error}") from error
        with torch.inference_mode():
            batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
            codes = tokenizer.encode(batch)
            row = [batch, tokenizer.decode(codes)]
            if getattr(tokenizer, "has_semantic_only", False):
                row.append(tokenizer.decode_semantic_only(codes))
        _save(_grid([[_picture(part) for part in row]]), storage.join(arguments.out, name))
        distinct = int(codes.unique().numel())
        log(f"{path}: {codes[0].numel()} codes, {distinct} of them different")


def _picture(pixels: Any) -> Image:
    """The first of a (B, 3, H, W) batch in [-1, 1]."""
    from PIL import Image

    array = (
        ((pixels[0].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy()
    )
    return Image.fromarray(array)


def _read(path: str) -> Image:
    try:
        return images.decode(storage.read_bytes(path), max_pixels=MAX_PIXELS)
    except ImageError as error:
        raise DataError(f"{path}: {error}") from error


def _grid(rows: list[list[Image]]) -> Image:
    """Images of one size in rows, white between them."""
    from PIL import Image

    width, height = rows[0][0].size
    columns = max(len(row) for row in rows)
    sheet = Image.new(
        "RGB", (columns * (width + GAP) - GAP, len(rows) * (height + GAP) - GAP), "white"
    )
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (width + GAP), y * (height + GAP)))
    return sheet


def _image_format(path: str) -> str:
    """Pillow's name of the format that the file's ending asks for."""
    from PIL import Image

    suffix = PurePosixPath(path).suffix.lower()
    Image.init()
    name = Image.registered_extensions().get(suffix)
    if name is None or name not in Image.SAVE:
        raise ConfigError(
            f"--out {path}: pictures are written as .png, .jpg or .webp; give the file such an ending"
        )
    return name


def _save(image: Image, path: str) -> None:
    buffer = io.BytesIO()
    image.save(buffer, format=_image_format(path))
    storage.write_atomic(path, buffer.getbuffer())
    print(path)


def _unique_names(paths: list[str]) -> list[str]:
    """A PNG name an image; equal stems from different folders get a number."""
    names: list[str] = []
    for path in paths:
        stem = PurePosixPath(path).stem or "image"
        name = f"{stem}.png"
        number = 1
        while name in names:
            number += 1
            name = f"{stem}-{number}.png"
        names.append(name)
    return names


def _at_least(low: float, kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= low or value == float("inf"):
            raise argparse.ArgumentTypeError(f"expected a number of at least {low}, found {text}")
        return value

    parse.__name__ = kind.__name__
    return parse


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and up to 1, found {text}")
    return value
