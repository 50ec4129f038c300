from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smalti import images
from smalti.errors import ImageError


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def gradient(width: int = 40, height: int = 30) -> Image.Image:
    """Red grows to the right, green downwards: every turn and flip shows."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 60)], -1).astype(np.uint8))


def noise(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def reason_of(data: bytes, **options: Any) -> str:
    """The one reason that decode, probe and to_pixels agree on."""
    reasons = set()
    for read in (images.decode, images.probe, lambda d, **o: images.to_pixels(d, 16, **o)):
        with pytest.raises(ImageError) as caught:
            read(data, **options)
        assert str(caught.value)
        reasons.add(caught.value.reason)
    assert len(reasons) == 1
    return reasons.pop()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_of(width: int, height: int, idat: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", head)
        + png_chunk(b"IDAT", idat)
        + png_chunk(b"IEND", b"")
    )


def palette_png(transparencies: int) -> bytes:
    """A 1 x 1 PNG with a palette of two colours and so many bytes of transparency."""
    head = struct.pack(">IIBBBBB", 1, 1, 8, 3, 0, 0, 0)
    chunks = [
        (b"IHDR", head),
        (b"PLTE", bytes(6)),
        (b"tRNS", bytes(transparencies)),
        (b"IDAT", zlib.compress(b"\0\0")),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in [*chunks, (b"IEND", b"")])


def icon(inner: bytes) -> bytes:
    """An icon whose header tells of 16 x 16 pixels, around a PNG or a bitmap."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(inner), 22) + inner


def damaged(data: bytes, at: float, length: int = 40) -> bytes:
    start = int(len(data) * at)
    return data[:start] + bytes(length) + data[start + length :]


BROKEN: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "empty": (lambda: b"", {"empty"}),
    "text": (lambda: b"this is no image, only a name that ends with .jpg", {"undecodable"}),
    "html": (lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>", {"undecodable"}),
    "svg": (
        lambda: b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        {"undecodable"},
    ),
    "postscript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", {"undecodable"}),
    "zeros": (lambda: bytes(1000), {"undecodable"}),
    "jpeg cut": (lambda: encoded(noise(), "JPEG")[:-700], {"truncated"}),
    "jpeg head alone": (lambda: encoded(noise(), "JPEG")[:100], {"truncated", "undecodable"}),
    "png cut": (lambda: encoded(noise(), "PNG")[:-3000], {"truncated"}),
    "png damaged": (lambda: damaged(encoded(noise(), "PNG"), 0.5), {"undecodable", "truncated"}),
    "gif cut": (lambda: encoded(noise(), "GIF")[:-2000], {"truncated"}),
    "webp cut": (lambda: encoded(noise(), "WEBP")[:-500], {"truncated", "undecodable"}),
    "bmp cut": (lambda: encoded(noise(), "BMP")[:-500], {"truncated"}),
    "tiff cut": (
        lambda: encoded(noise(), "TIFF", compression="tiff_lzw")[:-9000],
        {"truncated", "undecodable"},
    ),
    "png of no size": (lambda: png_of(0, 10, b""), {"undecodable", "too_small"}),
    "png whose pixels are no zlib": (
        lambda: png_of(64, 64, b"not zlib"),
        {"undecodable", "truncated"},
    ),
    "palette with too many transparencies": (lambda: palette_png(300), {"undecodable"}),
    "bomb in an icon": (lambda: icon(png_of(9_000, 9_000, zlib.compress(bytes(1000)))), {"bomb"}),
    "bitmap bomb in an icon": (
        lambda: icon(struct.pack("<IiiHH", 40, 9_000, 18_000, 1, 24) + bytes(24)),
        {"bomb"},
    ),
    "bomb": (lambda: png_of(30_000, 30_000, zlib.compress(bytes(1000))), {"bomb"}),
    "small bomb": (lambda: png_of(9_000, 9_000, zlib.compress(bytes(1000))), {"bomb"}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_images_have_a_reason(kind: str) -> None:
    make, reasons = BROKEN[kind]
    assert reason_of(make()) in reasons <= set(images.REASONS)


def test_small_images() -> None:
    data = encoded(gradient(40, 7), "PNG")
    assert reason_of(data, min_size=8) == "too_small"
    assert images.probe(data, min_size=7) == (40, 7)


def test_the_bound_on_pixels_is_exact_and_ours_alone() -> None:
    data = encoded(gradient(40, 30), "PNG")
    assert images.probe(data, max_pixels=1200) == (40, 30)
    assert reason_of(data, max_pixels=1199) == "bomb"
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 10  # the caller's own bound does not reach in
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert images.to_pixels(data, 16).shape == (16, 16, 3)
    finally:
        Image.MAX_IMAGE_PIXELS = before


@given(
    st.integers(min_value=0, max_value=2**32 - 1),
    st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"]),
)
@settings(max_examples=60, deadline=None)
def test_random_damage_never_raises_anything_else(seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    reasons: list[str] = []
    data = bytearray(encoded(noise(24, 24), kind))
    for _ in range(int(rng.integers(1, 6))):
        data[int(rng.integers(0, len(data)))] = int(rng.integers(0, 256))
    if rng.random() < 0.3:
        data = data[: int(rng.integers(0, len(data)))]
    for read in (images.decode, images.probe, lambda d: images.to_pixels(d, 16)):
        try:
            read(bytes(data))
        except ImageError as error:
            reasons.append(error.reason)
    assert set(reasons) <= set(images.REASONS)


@given(st.binary(max_size=400))
@settings(max_examples=60, deadline=None)
def test_random_bytes_are_no_image(data: bytes) -> None:
    with pytest.raises(ImageError):
        images.decode(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO", "AVIF"])
def test_exif_turns(orientation: int, kind: str) -> None:
    upright = gradient(48, 32)
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    stored = images._turn(upright, inverse)
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossy: dict[str, Any] = {"quality": 95, "subsampling": "4:4:4"}
    options = {"WEBP": {"lossless": True}, "JPEG": lossy, "MPO": lossy, "AVIF": lossy}.get(kind, {})
    data = encoded(stored, kind, exif=exif, **options)
    seen = np.asarray(images.decode(data)).astype(int)
    assert images.probe(data) == (48, 32)
    assert np.abs(seen - np.asarray(upright).astype(int)).max() <= (
        12 if kind in ("JPEG", "MPO", "AVIF") else 0
    )
    square = images.to_pixels(data, 16).astype(int)
    assert np.abs(square - images.to_pixels(encoded(upright, "PNG"), 16).astype(int)).max() <= 8


def test_a_damaged_exif_block_does_not_cost_the_image() -> None:
    data = encoded(gradient(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert images.probe(data) == (40, 30)


def test_a_jpeg_that_is_all_exif_is_refused_at_once() -> None:
    """Pillow would join 3,000 segments in time that grows with their square."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    segment = b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)
    few, many = (
        stream.getvalue()[:2] + segment * num + stream.getvalue()[2:] for num in (3, 3_000)
    )
    assert images.probe(few) == (16, 16)
    with pytest.raises(ImageError, match="64 EXIF segments"):
        images.probe(many)


def test_alpha_lies_on_white() -> None:
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 0] = 200
    rgba[:4, :, 3] = 255
    rgba[4:, :, 3] = 128
    half = round(200 * 128 / 255 + 255 * 127 / 255)
    image = Image.fromarray(rgba)
    for data in (
        encoded(image, "PNG"),
        encoded(image, "WEBP", lossless=True),
        encoded(image, "TIFF"),
    ):
        seen = np.asarray(images.decode(data))
        assert seen[0, 0].tolist() == [200, 0, 0]
        assert np.abs(seen[7, 0].astype(int) - [half, 127, 127]).max() <= 1


def test_every_kind_of_transparency() -> None:
    la = np.stack([np.full((8, 8), 100, np.uint8), np.zeros((8, 8), np.uint8)], -1)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    grey = Image.new("L", (8, 8), 77)
    rgb = Image.new("RGB", (8, 8), (1, 2, 3))
    clear = {
        "LA": encoded(Image.fromarray(la, "LA"), "PNG"),
        "P": encoded(palette, "PNG", transparency=1),
        "P with a table": encoded(palette, "PNG", transparency=bytes([255, 0])),
        "L": encoded(grey, "PNG", transparency=77),
        "RGB": encoded(rgb, "PNG", transparency=(1, 2, 3)),
        "GIF": encoded(palette, "GIF", transparency=1),
    }
    for kind, data in clear.items():
        assert (np.asarray(images.decode(data)) == 255).all(), kind
    assert np.asarray(images.decode(encoded(palette, "PNG", transparency=0)))[0, 0].tolist() == [
        0,
        0,
        255,
    ]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = np.linspace(0, 65_535, 64 * 4).astype(np.uint16).reshape(4, 64)
    wanted = np.rint(deep / 257).astype(int)
    for kind in ("PNG", "TIFF", "PPM"):
        seen = np.asarray(images.decode(encoded(Image.fromarray(deep), kind)))
        assert np.abs(seen - wanted[..., None]).max() <= 1, kind
    dark = np.full((4, 4), 200, np.uint16)  # 200 of 65,535 is black, not grey
    assert np.asarray(images.decode(encoded(Image.fromarray(dark), "PNG"))).max() == 1


def test_integers_and_floats_of_tiff() -> None:
    unit = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    for values in (unit, unit * 255, unit * 65_535, unit * 1e6 - 5e5):
        seen = np.asarray(
            images.decode(encoded(Image.fromarray(values.astype(np.float32)), "TIFF"))
        )
        assert np.abs(seen[..., 0] - unit * 255).max() <= 1
    for top in (255, 65_535, 2**30):
        seen = np.asarray(
            images.decode(encoded(Image.fromarray((unit * top).astype(np.int32)), "TIFF"))
        )
        assert np.abs(seen[..., 0] - unit * 255).max() <= 1.5
    unit[0, 0] = np.nan
    assert reason_of(encoded(Image.fromarray(unit), "TIFF")) == "undecodable"


def test_cmyk_with_and_without_adobes_inversion() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encoded(red, "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(np.asarray(images.decode(data)).astype(int)[8, 8] - [255, 0, 0]).max() <= 6
    start = data.index(b"\xff\xee")
    length = struct.unpack(">H", data[start + 2 : start + 4])[0]
    plain = data[:start] + data[start + 2 + length :]
    assert b"Adobe" not in plain
    # the same numbers, read without inversion
    inverted = np.asarray(images.decode(plain)).astype(int)[8, 8]
    assert np.abs(inverted - [0, 0, 0]).max() <= 6


def test_other_modes_become_rgb() -> None:
    base = gradient()
    for mode, kind in (
        ("1", "PNG"),
        ("L", "PNG"),
        ("P", "PNG"),
        ("YCbCr", "JPEG"),
        ("LAB", "TIFF"),
        ("CMYK", "TIFF"),
        ("L", "JPEG"),
    ):
        image = base.convert("RGB") if mode == "LAB" else base.convert(mode)
        if mode == "LAB":
            from PIL import ImageCms

            image = ImageCms.profileToProfile(
                image,
                ImageCms.createProfile("sRGB"),
                ImageCms.createProfile("LAB"),
                outputMode="LAB",
            )
        seen = images.decode(encoded(image, kind))
        assert (seen.mode, seen.size) == ("RGB", (40, 30)), mode
        if mode in ("LAB", "YCbCr"):
            assert np.abs(np.asarray(seen).astype(int) - np.asarray(base).astype(int)).mean() < 6, (
                mode
            )


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [
        Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    ]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert np.asarray(images.decode(data))[8, 8].tolist() == [255, 0, 0]


def test_the_first_picture_of_a_stereo_pair() -> None:
    data = encoded(
        Image.new("RGB", (16, 16), (255, 0, 0)),
        "MPO",
        save_all=True,
        append_images=[Image.new("RGB", (16, 16))],
    )
    assert np.abs(np.asarray(images.decode(data)).astype(int)[8, 8] - [255, 0, 0]).max() <= 3


def test_to_pixels_is_resize_and_centre_crop() -> None:
    image = gradient(96, 64)
    pixels = images.to_pixels(encoded(image, "PNG"), 32)
    reference = image.resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    assert pixels.dtype == np.uint8
    assert pixels.shape == (32, 32, 3)
    assert pixels.flags.writeable
    assert np.abs(pixels.astype(int) - np.asarray(reference)).max() <= 3


@pytest.mark.parametrize("shape", [(1000, 1), (1, 1000), (5000, 3), (7, 7)])
def test_to_pixels_of_any_shape(shape: tuple[int, int]) -> None:
    assert images.to_pixels(encoded(gradient(*shape), "PNG"), 32).shape == (32, 32, 3)


def test_scaled_jpeg_decoding_is_close_to_full_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.meshgrid(np.arange(512), np.arange(512))
    wave = (127 + 100 * np.sin(x / 40) * np.cos(y / 30)).astype(np.uint8)
    data = encoded(Image.fromarray(wave).convert("RGB"), "JPEG", quality=92)
    fast = images.to_pixels(data, 64).astype(int)
    monkeypatch.setattr(Image.Image, "draft", lambda *_: None)
    from PIL import JpegImagePlugin

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "draft", lambda *_: None)
    slow = images.to_pixels(data, 64).astype(int)
    assert np.abs(fast - slow).mean() < 1.5


def test_a_cut_jpeg_is_refused_when_decoded_at_a_smaller_scale() -> None:
    data = encoded(noise(512, 512), "JPEG")
    with pytest.raises(ImageError) as caught:
        images.to_pixels(data[: len(data) // 2], 64)
    assert caught.value.reason == "truncated"


def test_many_threads_see_the_same_pixels() -> None:
    data = [encoded(gradient(40 + i, 30), "PNG" if i % 2 else "JPEG") for i in range(8)]
    alone = [images.to_pixels(item, 24) for item in data]
    wrong: list[int] = []

    def work() -> None:
        for index, item in enumerate(data * 5):
            if not np.array_equal(images.to_pixels(item, 24), alone[index % 8]):
                wrong.append(index)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
