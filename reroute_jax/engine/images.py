"""The one place that opens images, whatever form users have them in.

Taken: PIL images, paths (`str`, `os.PathLike`) of files, the bytes of a file (`bytes`, `bytearray`, `memoryview`),
binary files, data URLs, records {"bytes", "path"} as the hub's data sets store them, and numpy arrays `[H, W]`,
`[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]` of uint8 (0 to 255) or uint16 (0 to 65535). Else one RerouteError.

What becomes of the modes of Pillow, and with them of every file it reads (the first frame of an animation):

    RGB, RGBX, L, P, 1, CMYK, YCbCr, HSV, LAB   Pillow's `convert("RGB")`; colour profiles are not applied
    RGBA, LA, PA, and the premultiplied RGBa, La; 1, L, RGB and P with a transparent colour or transparent palette
                                                laid on white, by transformers' arithmetic (see `on_white`)
    I;16, I;16B, I;16L, I;16N; I of PNG, PPM    0 to 65535 becomes 0 to 255, rounded; a transparent grey becomes white
    I of other origin, F                        refused: their numbers have no range of their own

An image is turned upright by its EXIF orientation, as transformers' `load_image` does; EXIF that cannot be read is no
EXIF. Where transformers 5.24 has two answers, this has one: `load_image`, so everything given to it by path, drops
transparency and shows what colours lie beneath; its image processors, given a PIL image, and qwen_vl_utils lay it on
white. White it is, for all families.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from reroute_jax.errors import RerouteError

TAKEN = "a PIL image, a path, the bytes of a file, a data URL, or a numpy array of uint8 or uint16"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION_IN = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")  # keys of `Image.info`
_URL = re.compile(r"https?:/|[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_LONGEST_NAME = 200


def open_image(source: Any, name: str = "") -> Image.Image:
    """The image as upright RGB on white, decoded as a whole, under the name of its file if it has one.

    source: see the module. name: in front of messages, such as the question's. Raises RerouteError, naming the image.
    """
    name = _in_messages(source, name)
    image = _decode(source, name)
    try:
        rgb = on_white(image)
    except (TypeError, ValueError) as problem:
        raise RerouteError(f"{name}: the image cannot be turned into RGB ({_line(problem)})") from None
    rgb.info = {}  # nothing is left for a later reader to apply a second time
    rgb.filename = _file_name(source)
    return rgb


def decode_image(source: Any, name: str = "") -> Image.Image:
    """The image decoded and upright, in its own mode.

    A copy without a `format` where the file has an orientation, as in `datasets`. Otherwise as `open_image`.
    """
    return _decode(source, _in_messages(source, name))


def _decode(source: Any, name: str) -> Image.Image:
    if isinstance(source, Mapping):
        return decode_image(_stored(source, name), name)
    if isinstance(source, Image.Image):
        return _upright(_whole(source, name))
    if isinstance(source, np.ndarray):
        return _whole(_of_array(source, name), name)
    with _file(source, name) as file:
        try:
            image = Image.open(file)
        except UnidentifiedImageError:
            raise RerouteError(
                f"{name}: the image cannot be decoded (no format that Pillow knows), expected an image file"
            ) from None
        except Exception as problem:  # plugins raise anything on a broken file
            raise _undecodable(name, problem) from None
        return _upright(_whole(image, name))


def on_white(image: Image.Image) -> Image.Image:
    """RGB of a decoded image of any mode, by the table above.

    Alpha is composited in 8 bits, as `transformers.image_transforms.convert_to_rgb` of 5.24 does: equal to the pixel.
    Raises ValueError where there is no conversion, and TypeError for a transparent colour that is none.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(
            f"mode {image.mode} has numbers of no known range: scale them to 0 to 255 and convert to mode L"
        )
    if image.mode.startswith("I"):
        return _sixteen_bit_grey(image)
    if image.mode == "La":
        image = image.convert("LA")
    if not _has_transparency(image):
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _has_transparency(image: Image.Image) -> bool:
    if image.mode in ("RGBA", "LA", "PA", "RGBa"):
        return True
    if image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA":
        return True
    return image.mode in ("1", "L", "RGB", "P") and image.info.get("transparency") is not None


def _sixteen_bit_grey(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    grey = _eight_bits(values)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey = np.where(values == transparent, np.uint8(255), grey)
    return Image.fromarray(grey).convert("RGB")


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """0 to 65535 as 0 to 255, to the nearest."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _whole(image: Image.Image, name: str) -> Image.Image:
    """The image with its pixels in memory."""
    width, height = image.size
    if min(image.size) < 1:
        raise RerouteError(f"{name}: the image has {width} x {height} pixels, expected at least one")
    limit = Image.MAX_IMAGE_PIXELS
    # Pillow itself only warns up to twice its limit. What is no file is in memory already.
    if limit is not None and width * height > limit and isinstance(image, ImageFile.ImageFile):
        raise RerouteError(
            f"{name}: the image has {width} x {height} pixels, the limit is {limit} (PIL.Image.MAX_IMAGE_PIXELS): "
            "make it smaller"
        )
    try:
        image.load()
    except Exception as problem:  # plugins raise anything on a broken file
        raise _undecodable(name, problem) from None
    return image


def _undecodable(name: str, problem: Exception) -> RerouteError:
    return RerouteError(
        f"{name}: the image cannot be decoded ({_line(problem)}), expected a complete image file within Pillow's limits"
    )


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
    if orientation is None:
        return image
    turned = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image.copy()
    for key in _ORIENTATION_IN:
        turned.info.pop(key, None)
    return turned


def _orientation(image: Image.Image) -> int | None:
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
        return None if found is None else int(found)
    except Exception:  # EXIF is bytes from anywhere, and readers raise anything on broken ones: the pixels are whole
        return None


def _of_array(values: np.ndarray, name: str) -> Image.Image:
    if values.ndim not in (2, 3) or (values.ndim == 3 and values.shape[2] not in (1, 3, 4)):
        raise RerouteError(
            f"{name}: the array is {list(values.shape)}, expected [H, W] or [H, W, channels] with 1, 3 or 4 channels"
        )
    if values.dtype.kind != "u" or values.dtype.itemsize > 2:
        raise RerouteError(
            f"{name}: the array is {values.dtype}, expected uint8 (0 to 255) or uint16 (0 to 65535): scale and convert "
            "it, other types have no range of their own"
        )
    if 0 in values.shape:
        raise RerouteError(f"{name}: the array is {list(values.shape)}, expected at least one pixel")
    eight = values if values.dtype.itemsize == 1 else _eight_bits(values)
    return Image.fromarray(np.ascontiguousarray(eight[..., 0] if eight.shape[2:] == (1,) else eight))


def _stored(record: Mapping, name: str) -> Any:
    """What a record of the hub holds: the bytes count before the path."""
    for key in ("bytes", "path"):
        if record.get(key) is not None:
            return record[key]
    raise RerouteError(f"{name}: there is no image, expected encoded bytes or the path of a file")


@contextmanager
def _file(source: Any, name: str) -> Iterator[BinaryIO]:
    if source is None:
        raise RerouteError(f"{name}: there is no image, expected {TAKEN}")
    if isinstance(source, bytes | bytearray | memoryview):
        yield io.BytesIO(_some(bytes(source), name))
    elif _is_data_url(source):
        yield io.BytesIO(_some(data_url_bytes(source, name), name))
    elif isinstance(source, str | os.PathLike):
        with _file_at(os.fsdecode(source), name) as file:
            yield file
    elif hasattr(source, "read"):
        yield source
    else:
        raise RerouteError(f"{name}: a {type(source).__name__} is no image, expected {TAKEN}")


def _some(encoded: bytes, name: str) -> bytes:
    if not encoded:
        raise RerouteError(f"{name}: the image cannot be decoded (0 bytes), expected a complete image file")
    return encoded


def _file_at(path: str, name: str) -> BinaryIO:
    if _URL.match(path):
        raise RerouteError(f"{name} is a URL: download it first, and give the path or the bytes of the file")
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise RerouteError(f"{name} is a folder or a device, expected the path of an image file")
        return open(path, "rb")
    except FileNotFoundError:
        raise RerouteError(f"{name} does not exist, check the path") from None
    except (OSError, ValueError) as problem:
        if isinstance(problem, RerouteError):
            raise
        reason = problem.strerror if isinstance(problem, OSError) else _line(problem)
        raise RerouteError(f"{name} cannot be read ({reason}), expected the path of an image file") from None


def data_url_bytes(url: str, name: str) -> bytes:
    """Of data:[TYPE][;PARAMETERS][;base64],DATA (RFC 2397). name: as of `open_image`. Raises RerouteError."""
    head, comma, data = url.partition(",")
    kind, *parameters = head[len("data:") :].split(";")
    if not comma:
        raise RerouteError(f"{name}: a data URL without a comma, expected data:image/png;base64,...")
    if kind and not kind.lower().startswith("image/") and kind.lower() != "application/octet-stream":
        raise RerouteError(f"{name}: a data URL of type {_shown(kind)}, expected data:image/...")
    try:
        decoded = unquote_to_bytes(data)
        if not parameters or parameters[-1].strip().lower() != "base64":
            return decoded
        digits = b"".join(decoded.split()).rstrip(b"=")
        return base64.b64decode(digits + b"=" * (-len(digits) % 4), validate=True)
    except ValueError as problem:
        raise RerouteError(f"{name}: a data URL that is not base64 ({_line(problem)}), encode the file again") from None


def _in_messages(source: Any, name: str) -> str:
    """The given name, with the image's file where it has one."""
    file = _file_name(source)
    if file:
        own = f"image {_shown(file)}"
        return f"{name}, {own}" if name else own
    if name:
        return name
    return "image given as a data URL" if _is_data_url(source) else f"image given as {type(source).__name__}"


def _file_name(source: Any) -> str:
    if _is_data_url(source):
        return ""
    if isinstance(source, str | os.PathLike):
        return os.fsdecode(source)
    name = getattr(source, "filename", "") if isinstance(source, Image.Image) else ""
    return os.fsdecode(name) if name else ""


def _is_data_url(source: Any) -> bool:
    return isinstance(source, str) and source[:5].lower() == "data:"


def _shown(text: Any) -> str:
    """On one line, and short: the source may be anything."""
    line = repr(str(text))[1:-1]
    return line if len(line) <= _LONGEST_NAME else f"{line[: _LONGEST_NAME // 2]}...{line[-_LONGEST_NAME // 2 :]}"


def _line(problem: Exception) -> str:
    return " ".join(str(problem).split()) or type(problem).__name__
