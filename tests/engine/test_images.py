"""One loader for every way in: transformers' pixels where it is the truth, written-out ones where it is not."""

import base64
import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile, PngImagePlugin
from transformers import CLIPImageProcessorPil, Qwen2VLImageProcessorPil
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from reroute_jax.engine.images import decode_image, open_image
from reroute_jax.errors import RerouteError
from reroute_jax.models import FAMILIES

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 4)).astype(np.uint8)
PICTURE = Image.fromarray(COLOURS[..., :3])


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def pixels(source: Any) -> np.ndarray:
    image = open_image(source)
    assert image.mode == "RGB" and not image.info
    return np.asarray(image)


def refusal(source: Any, name: str = "") -> str:
    with pytest.raises(RerouteError) as caught:
        open_image(source, name)
    message = str(caught.value)
    assert "\n" not in message and "0x" not in message and len(message) < 500, message
    return message


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png: bytes, kind: bytes, data: bytes, late: bool = False) -> bytes:
    """A PNG with one chunk more, behind its header or behind its pixels."""
    at = len(png) - 12 if late else 33
    return png[:at] + chunk(kind, data) + png[at:]


# The ways in


def ways_in(stored: bytes, folder: Path) -> dict[str, Any]:
    file = folder / "a picture.png"
    file.write_bytes(stored)
    text = base64.b64encode(stored).decode()
    return {
        "path": file,
        "text path": str(file),
        "bytes": stored,
        "bytearray": bytearray(stored),
        "memoryview": memoryview(stored),
        "strided memoryview": memoryview(bytes(x for byte in stored for x in (byte, 0)))[::2],
        "open file": io.BytesIO(stored),
        "PIL image": Image.open(io.BytesIO(stored)),
        "base64": f"data:image/png;base64,{text}",
        "base64 in capitals": f"DATA:IMAGE/PNG;charset=x;BASE64,{text}",
        "base64 in lines": f"data:image/png;base64,{text[:20]}\n{text[20:]}",
        "base64 without padding": f"data:image/png;base64,{text.rstrip('=')}",
        "base64, quoted": f"data:image/png;base64,{quote(text, safe='')}",
        "percent": f"data:image/png,{quote(stored)}",
        "no type": f"data:;base64,{text}",
        "record of bytes": {"bytes": stored, "path": "elsewhere.png"},
        "record of a path": {"bytes": None, "path": str(file)},
    }


WAYS = (
    "path",
    "text path",
    "bytes",
    "bytearray",
    "memoryview",
    "strided memoryview",
    "open file",
    "PIL image",
    "base64",
    "base64 in capitals",
    "base64 in lines",
    "base64 without padding",
    "base64, quoted",
    "percent",
    "no type",
    "record of bytes",
    "record of a path",
)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("orientation", [None, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9])
def test_every_way_in_is_upright_as_in_transformers(way: str, orientation: int | None, tmp_path: Path) -> None:
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    stored = encoded(PICTURE, exif=exif)
    ways = ways_in(stored, tmp_path)
    assert tuple(ways) == WAYS
    expected = np.asarray(load_image(Image.open(io.BytesIO(stored))))
    np.testing.assert_array_equal(pixels(ways[way]), expected)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
def test_orientation_in_every_format(form: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    stored = encoded(PICTURE.resize((40, 24)), form, exif=exif)
    expected = np.asarray(load_image(Image.open(io.BytesIO(stored))))
    assert expected.shape == (40, 24, 3)
    np.testing.assert_array_equal(pixels(stored), expected)
    np.testing.assert_array_equal(pixels(open_image(stored)), expected)  # turned once, however often it is opened


def test_the_file_keeps_its_name(tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").filename == str(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert open_image(opened).filename == str(tmp_path / "a.png")
    assert open_image(PICTURE).filename == ""


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation_is_taken(form: str) -> None:
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    stored = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(stored)), "n_frames", 1) == 2
    assert (pixels(stored) == (255, 0, 0)).all()


# Arrays


def test_arrays_are_taken_by_the_range_of_their_type() -> None:
    eight, grey = COLOURS, COLOURS[..., 0]
    np.testing.assert_array_equal(pixels(eight[..., :3]), eight[..., :3])
    np.testing.assert_array_equal(pixels(grey), np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(pixels(grey[..., None]), np.repeat(grey[..., None], 3, -1))
    np.testing.assert_array_equal(pixels(eight), pixels(Image.fromarray(eight)))
    np.testing.assert_array_equal(pixels(eight[::-1, ::2, :3]), eight[::-1, ::2, :3])
    for wide in (eight.astype(np.uint16) * 257, eight.astype(">u2") * 257):
        np.testing.assert_array_equal(pixels(wide), pixels(eight))
        np.testing.assert_array_equal(pixels(wide[..., :3]), eight[..., :3])
        np.testing.assert_array_equal(pixels(wide[..., 0]), pixels(grey))


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((4, 4), np.float32), "the array is float32, expected uint8 (0 to 255) or uint16 (0 to 65535)"),
        (np.zeros((4, 4, 3), np.float64), "the array is float64"),
        (np.zeros((4, 4), np.float16), "the array is float16"),
        (np.zeros((4, 4), np.int16), "the array is int16"),
        (np.zeros((4, 4), bool), "the array is bool"),
        (np.zeros((4, 4), np.int8), "the array is int8"),
        (np.zeros((4, 4), np.int64), "the array is int64"),
        (np.zeros((4, 4), np.uint32), "the array is uint32"),
        (np.zeros((4, 4), object), "the array is object"),
        (np.zeros((3, 4, 4), np.uint8), None),
        (np.zeros((3, 4, 5), np.uint8), "the array is [3, 4, 5], expected [H, W] or [H, W, channels] with 1, 3 or 4"),
        (np.zeros((4, 4, 2), np.uint8), "the array is [4, 4, 2]"),
        (np.zeros((1, 4, 4, 3), np.uint8), "the array is [1, 4, 4, 3]"),
        (np.zeros(4, np.uint8), "the array is [4]"),
        (np.zeros((), np.uint8), "the array is []"),
        (np.zeros((0, 4, 3), np.uint8), "the array is [0, 4, 3], expected at least one pixel"),
        (np.zeros((4, 0), np.uint16), "the array is [4, 0], expected at least one pixel"),
    ],
)
def test_other_arrays_are_refused(array: np.ndarray, expected: str | None) -> None:
    if expected is None:  # [3, 4, 4] cannot be told from an RGBA picture of 3 rows
        assert pixels(array).shape == (3, 4, 3)
    else:
        assert refusal(array).startswith(f"image given as ndarray: {expected}")


# Modes


def transparent(mode: str) -> Image.Image:
    """A picture of every degree of transparency."""
    image = Image.fromarray(COLOURS)
    if mode == "La":
        return image.convert("LA").convert("La")
    if mode == "P, a transparent index":
        found = PICTURE.convert("P")
        found.info["transparency"] = found.getpixel((2, 2))
        return found
    if mode == "P, alpha by index":
        found = PICTURE.convert("P")
        found.info["transparency"] = bytes(range(256))
        return found
    if mode == "P, palette of RGBA":
        found = Image.fromarray(COLOURS[..., 0] % 16, "L").convert("P")
        found.putpalette(RNG.integers(0, 256, 64).astype(np.uint8).tobytes(), "RGBA")
        return found
    if mode in ("L, a transparent grey", "RGB, a transparent colour"):
        found = PICTURE.convert(mode.split(",")[0])
        found.info["transparency"] = found.getpixel((2, 2))
        return found
    return image.convert(mode)


TRANSPARENT_IN_TRANSFORMERS = (
    "RGBA",
    "LA",
    "PA",
    "P, a transparent index",
    "P, alpha by index",
    "L, a transparent grey",
    "RGB, a transparent colour",
)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", TRANSPARENT_IN_TRANSFORMERS)
def test_transparency_is_laid_on_white_as_transformers_processors_do(mode: str) -> None:
    image = transparent(mode)
    found = pixels(image)
    np.testing.assert_array_equal(found, convert_to_rgb(image, return_numpy=True))
    assert (found != np.asarray(image.convert("RGB"))).any()
    if mode != "PA":  # no file format holds it
        form = "TIFF" if mode == "LA" else "PNG"
        options = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
        np.testing.assert_array_equal(pixels(encoded(image, form, **options)), found)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P, alpha by index"])
def test_both_families_see_what_their_processor_makes_of_a_transparent_image(mode: str) -> None:
    image = transparent(mode).resize((60, 80), Image.Resampling.NEAREST)
    clip, qwen = CLIPImageProcessorPil(), Qwen2VLImageProcessorPil()
    found, _ = FAMILIES["llava"].preprocess([open_image(image)], clip)
    np.testing.assert_array_equal(found, clip(images=image, return_tensors="np")["pixel_values"])
    fits = image.resize((84, 112), Image.Resampling.NEAREST)  # whole visual tokens: no resize blurs the comparison
    found, grid = FAMILIES["qwen2_5_vl"].preprocess([open_image(fits)], qwen)
    theirs = qwen(images=fits, return_tensors="np")
    np.testing.assert_array_equal(found, theirs["pixel_values"])
    np.testing.assert_array_equal(grid, theirs["image_grid_thw"])


@pytest.mark.parametrize("mode", ["RGBa", "La", "P, palette of RGBA"])
def test_transparency_that_transformers_overlooks_is_laid_on_white_too(mode: str) -> None:
    image = transparent(mode)
    plain = image.convert("LA" if mode == "La" else "RGBA").convert("RGBA")
    np.testing.assert_array_equal(pixels(image), convert_to_rgb(plain, return_numpy=True))
    assert np.asarray(plain)[..., 3].min() < 128


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P"])
@pytest.mark.parametrize("junk", ["x", (1, 2, 3, 4)])
def test_a_transparent_colour_that_is_none_is_refused(mode: str, junk: Any) -> None:
    image = PICTURE.convert(mode)
    image.info["transparency"] = junk
    assert "the image cannot be turned into RGB" in refusal(image)


def test_black_ink_on_nothing_is_black_on_white() -> None:
    ink = np.zeros((4, 4, 4), np.uint8)
    ink[1, 1:3, 3] = 255
    for source in (ink, Image.fromarray(ink), encoded(Image.fromarray(ink)), Image.fromarray(ink).convert("LA")):
        expected = np.full((4, 4, 3), 255)
        expected[1, 1:3] = 0
        np.testing.assert_array_equal(pixels(source), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_are_converted_as_in_transformers(mode: str) -> None:
    image = PICTURE.convert(mode)
    np.testing.assert_array_equal(pixels(image), convert_to_rgb(image, return_numpy=True))
    np.testing.assert_array_equal(pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_a_cmyk_file(form: str) -> None:
    stored = encoded(PICTURE.convert("CMYK"), form)
    np.testing.assert_array_equal(pixels(stored), np.asarray(load_image(Image.open(io.BytesIO(stored)))))


WIDE = np.array([[0, 128, 129, 255], [257, 32767, 32768, 65535]], np.uint16)
NARROW = [[0, 0, 1, 1], [1, 127, 128, 255]]


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L", "I;16N"])
def test_sixteen_bit_grey_is_scaled_by_its_range(mode: str) -> None:
    order = {"I;16B": ">u2", "I;16N": "=u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, (4, 2), WIDE.astype(order).tobytes())
    assert pixels(image)[..., 0].tolist() == pixels(image)[..., 2].tolist() == NARROW
    image.getexif()[ExifTags.Base.Orientation] = 3
    assert pixels(image)[..., 1].tolist() == [row[::-1] for row in NARROW[::-1]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_files(form: str) -> None:
    assert pixels(encoded(Image.fromarray(WIDE), form))[..., 0].tolist() == NARROW


def test_the_transparent_grey_of_a_sixteen_bit_png_is_white() -> None:
    stored = with_chunk(encoded(Image.fromarray(WIDE)), b"tRNS", struct.pack(">H", 32767))
    assert pixels(stored)[..., 0].tolist() == [NARROW[0], [1, 255, 128, 255]]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_numbers_without_a_range_are_refused(mode: str) -> None:
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).convert(mode)
    for source in (image, encoded(image, "TIFF")):
        assert (
            f"cannot be turned into RGB (mode {mode} has numbers of no known range: scale them to 0 to 255"
            in refusal(source)
        )


# What is refused


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (None, "image given as NoneType: there is no image"),
        ({"bytes": None, "path": None}, "there is no image"),
        ({}, "there is no image"),
        ({"bytes": b""}, "0 bytes"),
        ({"bytes": 3}, "a int is no image"),
        ({"path": "/nowhere/a.png"}, "image /nowhere/a.png does not exist"),
        (b"", "the image cannot be decoded (0 bytes)"),
        (bytearray(), "0 bytes"),
        (memoryview(b""), "0 bytes"),
        (b"no image at all", "no format that Pillow knows"),
        (io.BytesIO(), "no format that Pillow knows"),
        (io.StringIO("text"), "the image cannot be decoded"),
        ("", "does not exist"),
        ("/nowhere/a.png", "image /nowhere/a.png does not exist, check the path"),
        ("/", "image / is a folder or a device, expected the path of an image file"),
        (Path(), "image . is a folder"),
        ("a\0b", "cannot be read (embedded null byte)"),
        ("a\nb.png", r"image a\nb.png does not exist"),
        ("x" * 5000, "cannot be read (File name too long)"),
        ("\ud800.png", r"image \ud800.png"),
        ("http://host/a.png", "image http://host/a.png is a URL: download it first"),
        ("HTTPS://host/a.png", "is a URL: download it first"),
        (Path("https://host/a.png"), "is a URL: download it first"),
        ("s3://bucket/a.png", "is a URL: download it first"),
        ("file:///a.png", "is a URL: download it first"),
        ("data:image/png;base64", "a data URL without a comma"),
        ("data:image/png;base64,", "0 bytes"),
        ("data:image/png;base64,%%%", "a data URL that is not base64"),
        ("data:image/png;base64,AAAAA", "a data URL that is not base64"),
        ("data:image/png;base64,é", "a data URL that is not base64"),
        ("data:image/png;base64,\ud800", "a data URL that is not base64"),
        ("data:image/png;base64,aGVsbG8=", "no format that Pillow knows"),
        ("data:image/png,hello", "no format that Pillow knows"),
        ("data:text/html,hello", "a data URL of type text/html, expected data:image/..."),
        (3, "a int is no image, expected a PIL image, a path, the bytes of a file, a data URL, or a numpy array"),
        ([PICTURE], "a list is no image"),
        (Image.new("RGB", (0, 5)), "the image has 0 x 5 pixels, expected at least one"),
        (Image.new("L", (5, 0)), "the image has 5 x 0 pixels"),
    ],
)
def test_what_is_no_image_is_one_line(source: Any, expected: str) -> None:
    assert expected in refusal(source)


def test_a_given_name_stands_in_front() -> None:
    assert refusal(b"", "row 3, image 2").startswith("row 3, image 2: the image cannot be decoded (0 bytes)")
    assert refusal("/nowhere/a.png", "row 3").startswith("row 3, image /nowhere/a.png does not exist")
    assert refusal(np.zeros(3), "row 3").startswith("row 3: the array is [3]")
    assert refusal(Image.new("F", (2, 2)), "row 3").startswith("row 3: the image cannot be turned into RGB (mode F")


def test_a_folder_and_a_closed_image_are_refused(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path)
    PICTURE.save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as closed:
        pass
    assert "cannot be decoded" in refusal(closed)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "TGA", "AVIF"])
def test_a_truncated_file_is_refused(form: str, tmp_path: Path) -> None:
    noise = Image.fromarray(RNG.integers(0, 256, (90, 70, 3)).astype(np.uint8))
    stored = encoded(noise, form)
    assert pixels(stored).shape == (90, 70, 3)
    for part in (0.7, 0.3, 0.02):
        cut = tmp_path / "cut"
        cut.write_bytes(stored[: int(len(stored) * part)])
        assert f"image {cut}: the image cannot be decoded" in refusal(cut)


def test_garbled_files_are_refused_or_opened() -> None:
    """Whatever a decoder raises."""
    forms = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "ICNS", "AVIF")
    files = [encoded(PICTURE.resize((32, 32)), form) for form in forms]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for stored in files:
            for _ in range(40):
                garbled = bytearray(stored)
                for at in RNG.integers(0, min(len(garbled), 300), 5):
                    garbled[at] = RNG.integers(0, 256)
                try:
                    assert open_image(garbled).mode == "RGB"
                except RerouteError as error:
                    assert "\n" not in str(error)


@pytest.mark.parametrize("limit", [34, 20, 10])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_refused_with_its_size_and_the_limit(limit: int, monkeypatch, tmp_path: Path) -> None:
    """Pillow warns of 35 pixels over limits from 18 on, and raises below."""
    stored = encoded(PICTURE)
    lazy = Image.open(io.BytesIO(stored))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    ways = ways_in(stored, tmp_path) if limit * 2 >= 35 else {"bytes": stored}
    for way in ways.values():
        message = refusal(way)
        expected = (
            ("7 x 5 pixels", f"the limit is {limit}") if limit * 2 >= 35 else ("35 pixels", f"limit of {limit * 2}")
        )
        assert all(one in message for one in expected), message
    assert "7 x 5 pixels" in refusal(lazy)
    assert pixels(PICTURE).shape == pixels(COLOURS).shape == (5, 7, 3)  # in memory already
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert pixels(stored).shape == (5, 7, 3)


# What stands beside the pixels


@pytest.mark.parametrize("exif", [b"broken", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"])
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_is_no_exif(form: str, exif: bytes) -> None:
    plain = encoded(PICTURE, form)
    stored = with_chunk(plain, b"eXIf", exif) if form == "PNG" else encoded(PICTURE, form, exif=exif)
    assert stored != plain or (form, exif) == ("WEBP", b"Exif\0\0")  # which Pillow writes as nothing
    np.testing.assert_array_equal(pixels(stored), np.asarray(Image.open(io.BytesIO(plain)).convert("RGB")))


@pytest.mark.parametrize("info", [{"exif": "text"}, {"exif": 3}, {"Raw profile type exif": "\n\n\nno hex"}, {"xmp": 7}])
def test_broken_exif_of_a_pil_image_is_no_exif(info: dict) -> None:
    image = PICTURE.copy()
    image.info.update(info)
    np.testing.assert_array_equal(pixels(image), COLOURS[..., :3])


@pytest.mark.parametrize("value", ["6", "left", (6, 6), 77])
def test_an_orientation_that_is_none_turns_nothing(value: Any) -> None:
    image = PICTURE.copy()
    image.getexif()[ExifTags.Base.Orientation] = value
    assert pixels(image).shape == ((7, 5, 3) if value == "6" else (5, 7, 3))


def test_an_orientation_beside_broken_tags_still_counts() -> None:
    """Where re-writing EXIF fails, as transformers' `exif_transpose` tries to."""
    image = PICTURE.copy()
    image.getexif()[ExifTags.Base.Orientation] = 6
    image.getexif()[ExifTags.Base.ImageWidth] = object()
    assert pixels(image).shape == (7, 5, 3)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
def test_a_png_with_a_huge_text_chunk_is_refused_in_one_line(kind: str, late: bool) -> None:
    text = zlib.compress(b"x" * 2 * PngImagePlugin.MAX_TEXT_CHUNK)
    data = b"key\0\0" + text if kind == "zTXt" else b"key\0\1\0\0\0" + text
    assert "cannot be decoded (Decompressed data too large" in refusal(
        with_chunk(encoded(PICTURE), kind.encode(), data, late)
    )
    plain = with_chunk(encoded(PICTURE), b"tEXt", b"key\0" + b"x" * 2 * PngImagePlugin.MAX_TEXT_CHUNK, late)
    np.testing.assert_array_equal(pixels(plain), COLOURS[..., :3])


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "WEBP"])
def test_a_broken_colour_profile_is_ignored(form: str) -> None:
    plain = encoded(PICTURE, form)
    stored = encoded(PICTURE, form, icc_profile=b"no profile")
    assert stored != plain
    np.testing.assert_array_equal(pixels(stored), np.asarray(Image.open(io.BytesIO(plain)).convert("RGB")))
    broken = with_chunk(encoded(PICTURE), b"iCCP", b"name\0\0not compressed")
    np.testing.assert_array_equal(pixels(broken), COLOURS[..., :3])


def test_decoded_images_keep_their_mode_and_their_format_unless_turned() -> None:
    """What the evaluation saves again as JPEG, as `datasets` does."""
    exif = Image.Exif()
    grey = PICTURE.convert("L")
    assert (decode_image(encoded(grey, "JPEG")).mode, decode_image(encoded(grey, "JPEG")).format) == ("L", "JPEG")
    for orientation in (1, 6):
        exif[ExifTags.Base.Orientation] = orientation
        assert decode_image(encoded(grey, "JPEG", exif=exif)).format is None


def test_opening_leaves_the_settings_of_pillow_alone() -> None:
    limit = Image.MAX_IMAGE_PIXELS
    refusal(encoded(PICTURE)[:60])
    assert limit == Image.MAX_IMAGE_PIXELS and not ImageFile.LOAD_TRUNCATED_IMAGES


def test_an_opened_image_is_not_the_given_one() -> None:
    given = PICTURE.copy()
    open_image(given).putpixel((0, 0), (1, 2, 3))
    assert given.getpixel((0, 0)) == PICTURE.getpixel((0, 0))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_an_image_waits_in_the_size_that_the_model_sees(family: str) -> None:
    """`pixels` of `fit` are those of the processor, and what is held is small."""
    brought = FAMILIES[family]
    processor = CLIPImageProcessorPil() if family == "llava" else Qwen2VLImageProcessorPil()
    sizes = [(500, 375), (300, 2000), (90, 9), (1000, 1000)]
    images = [Image.fromarray(RNG.integers(0, 256, (height, width, 3)).astype(np.uint8)) for width, height in sizes]
    fitted = [brought.fit(image, processor) for image in images]
    assert [one.shape[1::-1] for one in fitted] == [brought.model_size(image.size, processor) for image in images]
    assert all(one.dtype == np.uint8 and one.shape[2] == 3 for one in fitted)
    found, grids = brought.pixels(fitted, processor)
    whole, whole_grids = brought.preprocess(images, processor)
    np.testing.assert_array_equal(found, whole)
    np.testing.assert_array_equal(grids, whole_grids)
    if family == "llava":
        np.testing.assert_array_equal(found, processor(images=images, return_tensors="np")["pixel_values"])
