"""Strict decoding of images: complete and upright, or an `ImageError` with a reason.

No global setting of Pillow is changed or relied on: the size is checked against `max_pixels` before
any pixel is decoded (Pillow only warns), and truncated files are refused.
"""

from __future__ import annotations

import io
import math
import struct
import zlib

import numpy as np
from PIL import Image, ImageChops, ImageCms

from smalti.errors import ImageError

MAX_PIXELS = 64_000_000
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "ICO",
    "PCX",
    "SGI",
    "QOI",
)
REASONS = ("empty", "undecodable", "truncated", "bomb", "too_small")

_PLAIN = ("RGB", "L", "CMYK")  # modes that always come to RGB
_ORIENTATION = 0x0112
_EXIF_SEGMENTS = 64
_SEGMENTS = 4096
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_DECODER_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError, NotImplementedError,
    RuntimeError, EOFError, struct.error, zlib.error, AssertionError, ZeroDivisionError, Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)  # fmt: skip


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, min_size: int = 1) -> Image.Image:
    """Decode an image to 8-bit RGB.

    It is rotated as its EXIF says, alpha is blended on white, and of an animation the first frame
    is taken.

    Raises:
        ImageError: with a reason: `empty`, `undecodable`, `truncated`, `bomb` (more than
            `max_pixels`) or `too_small` (a
            side below `min_size`).
    """
    image = _open(data, max_pixels, min_size)
    _load(image)
    return _turn(_to_rgb(image), _orientation(image))


def probe(data: bytes, *, max_pixels: int = MAX_PIXELS, min_size: int = 1) -> tuple[int, int]:
    """(width, height) after the EXIF rotation; decodes all pixels, raises as `decode`."""
    image = _open(data, max_pixels, min_size)
    _load(image)
    if image.mode not in _PLAIN or "transparency" in image.info:
        _to_rgb(image)  # not every such image can be
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def to_pixels(
    data: bytes, size: int, *, max_pixels: int = MAX_PIXELS, min_size: int = 1
) -> np.ndarray:
    """Decode, resize the shorter side (bicubic, antialiased), and crop the centre.

    A JPEG is decoded at the smallest scale (1/2, 1/4, 1/8) that still covers `size`. Raises as
    `decode`.

    Returns:
        uint8 (size, size, 3).
    """
    image = _open(data, max_pixels, min_size)
    image.draft(None, (size, size))
    _load(image)
    orientation = _orientation(image)
    image = _to_rgb(image)
    width, height = image.size
    side = min(width, height)
    left = (width - side) / 2
    top = (height - side) / 2
    box = (left, top, left + side, top + side)
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)
    return np.array(_turn(image, orientation))


def _open(data: bytes, max_pixels: int, min_size: int) -> Image.Image:
    """Read the header and check the size; decode no pixel."""
    if not len(data):
        raise ImageError("the file is empty", "empty")
    _check_segments(data)
    _check_icon(data, max_pixels)
    image = _identify(bytes(data))
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{width} x {height} pixels, more than max_pixels = {max_pixels:,}", "bomb"
        )
    if min(width, height) < max(1, min_size):
        raise ImageError(
            f"{width} x {height} pixels, expected sides of at least {min_size}", "too_small"
        )
    return image


def _check_segments(data: bytes) -> None:
    """Refuse a JPEG with too many header segments: Pillow joins EXIF segments in quadratic time."""
    place = 2
    num = 0
    every = 0
    while (
        data[:2] == b"\xff\xd8"
        and data[place : place + 1] == b"\xff"
        and data[place + 1 : place + 2] != b"\xda"
    ):
        num += (
            data[place + 1 : place + 2] == b"\xe1" and data[place + 4 : place + 10] == b"Exif\0\0"
        )
        every += 1
        if num > _EXIF_SEGMENTS or every > _SEGMENTS:
            raise ImageError(
                f"more than {_EXIF_SEGMENTS} EXIF segments, or {_SEGMENTS:,} of any kind"
            )
        place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")


def _check_icon(data: bytes, max_pixels: int) -> None:
    """Refuse an icon with an image larger than `max_pixels`.

    The header of an icon cannot state more than 256 x 256, and Pillow decodes the image when it
    opens the icon.
    """
    if data[:4] != b"\0\0\1\0":
        return
    for entry in range(6, 6 + 16 * int.from_bytes(data[4:6], "little"), 16):
        start = int.from_bytes(data[entry + 12 : entry + 16], "little")
        inner = data[start : start + 24]
        if inner[:8] == b"\x89PNG\r\n\x1a\n":
            width = int.from_bytes(inner[16:20], "big")
            height = int.from_bytes(inner[20:24], "big")
        else:  # a bitmap, its mask below it; the oldest headers, of 12 bytes, have numbers of two bytes
            step = 2 if inner[:4] == b"\x0c\0\0\0" else 4
            sides = (inner[4 : 4 + step], inner[4 + step : 4 + 2 * step])
            width, height = (
                abs(int.from_bytes(side, "little", signed=step == 4)) for side in sides
            )
            height //= 2
        if width * height > max_pixels:
            raise ImageError(
                f"{width} x {height} pixels in an icon, more than max_pixels = {max_pixels:,}",
                "bomb",
            )


def _identify(data: bytes) -> Image.Image:
    """`Image.open` without its size check, which depends on a process-wide limit."""
    Image.init()
    prefix = data[:16]
    problem: Exception | None = None
    for name in FORMATS:
        if name not in Image.OPEN:
            continue
        factory, accept = Image.OPEN[name]
        try:
            accepted = accept is None or accept(prefix)
            if not accepted or isinstance(accepted, str):
                continue
            image = factory(io.BytesIO(data), "")
        except _DECODER_ERRORS as error:
            problem = problem or error
            continue
        return image
    kind = "truncated" if problem is not None and _is_truncation(problem) else "undecodable"
    raise ImageError(f"no decoder accepts it{_because(problem)}", kind)


def _load(image: Image.Image) -> None:
    """Decode every pixel; `ImageError` if that fails."""
    try:
        image.load()
    except _DECODER_ERRORS as error:
        reason = "truncated" if _is_truncation(error) else "undecodable"
        raise ImageError(
            f"the {image.format} file cannot be decoded{_because(error)}", reason
        ) from error
    except MemoryError as error:
        raise ImageError(
            f"{image.width} x {image.height} pixels do not fit into memory", "bomb"
        ) from error


def _is_truncation(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, EOFError) or any(
        word in text for word in ("truncated", "not enough", "end of file", "unexpected end")
    )


def _because(error: Exception | None) -> str:
    return f" ({error or type(error).__name__})" if error is not None else ""


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or the EXIF block is damaged.

    Only after `_load`: Pillow decodes a PNG to find its EXIF, and rotates a TIFF itself when it
    decodes.
    """
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    turn = _TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow to RGB."""
    try:
        if image.mode.startswith("I;16") or image.mode in ("I", "F"):
            return _deep_to_rgb(image)
        if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
            image = ImageChops.invert(image)
        if image.mode == "LAB":
            lab = ImageCms.createProfile("LAB")
            srgb = ImageCms.createProfile("sRGB")
            turned = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
            if turned is None:
                raise ValueError("LAB colours cannot be converted")
            return turned
        if image.has_transparency_data or image.mode in ("La", "RGBa", "PA"):
            layer = image.convert("RGBA")
            white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
            return Image.alpha_composite(white, layer).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")
    except _DECODER_ERRORS as error:
        raise ImageError(
            f"mode {image.mode} of a {image.format} file cannot be converted to "
            f"RGB{_because(error)}"
        ) from error


def _deep_to_rgb(image: Image.Image) -> Image.Image:
    """Scale grey of more than 8 bits from the range of its type to 0 to 255.

    The range is that of 16 bits, or [0, 1] for floats. Where the type does not say (32-bit
    integers, floats beyond 1), it is the smallest of 8 bits, 16 bits and the range of the values
    that holds all values.
    """
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("some pixels are NaN or Inf")
    low = float(values.min())
    high = float(values.max())
    sixteen_bits = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    if image.mode == "F" and low >= 0 and high <= 1:
        scaled = values * 255
    elif sixteen_bits or (low >= 0 and 255 < high <= 65_535):
        scaled = values / 257
    elif low >= 0 and high <= 255:
        scaled = values
    else:
        scaled = (values - low) * (255 / max(high - low, math.ulp(1.0)))
    return Image.fromarray(np.clip(np.rint(scaled), 0, 255).astype(np.uint8)).convert("RGB")
