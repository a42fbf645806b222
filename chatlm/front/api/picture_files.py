"""Decodes picture files with Pillow (the extra `images`): PNG, JPEG, WebP and GIF. Runs only in a
sandbox."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from chatlm.common.client_words import DAMAGED_IMAGE
from chatlm.common.config import LIMITS
from chatlm.common.errors import ConfigError, RequestError, error_text, require_library
from chatlm.common.messages.protocol import Body
from chatlm.common.vision.pictures import of_picture, picture

# format -> does a file have it, by its first bytes? and Pillow's module and class for it
PLUGINS: dict[str, tuple[Callable[[bytes], bool], str, str]] = {
    "PNG": (lambda data: data.startswith(b"\x89PNG\r\n\x1a\n"), "PngImagePlugin", "PngImageFile"),
    "JPEG": (lambda data: data.startswith(b"\xff\xd8\xff"), "JpegImagePlugin", "JpegImageFile"),
    "WebP": (lambda data: data[:4] == b"RIFF" and data[8:12] == b"WEBP", "WebPImagePlugin", "WebPImageFile"),
    "GIF": (lambda data: data.startswith((b"GIF87a", b"GIF89a")), "GifImagePlugin", "GifImageFile"),
}
OTHERS = {b"%PDF-": "a PDF", b"II*\0": "a TIFF", b"MM\0*": "a TIFF", b"BM": "a BMP", b"\0\0\1\0": "an icon",
          b"<svg": "an SVG", b"<?xml": "an SVG or other XML"}


def refusal(message: str, code: str = "unreadable_image") -> RequestError:
    return RequestError(message, code=code)


def detect_format(data: bytes) -> str:
    """A picture file's format, one of PLUGINS, whatever its name or media type says. Raises RequestError for
    other formats."""
    for name, (is_it, *_) in PLUGINS.items():
        if is_it(data):
            return name
    begin = data[:64].lstrip().lower()
    other = next((what for mark, what in OTHERS.items() if begin.startswith(mark.lower())),
                 "of another format")
    if data[4:8] == b"ftyp":
        other = "a HEIC, AVIF or video"
    raise refusal(f"{DAMAGED_IMAGE}: it is {other}, allowed are {', '.join(PLUGINS)}", "unknown_format")


def open_picture(data: bytes) -> tuple[Any, str]:
    """A picture file, not decoded yet, and its format."""
    name = detect_format(data)
    _, module, kind = PLUGINS[name]
    try:
        plugin = require_library(f"PIL.{module}", "looking at images")
    except ConfigError as error:
        raise RequestError(str(error).replace("install PIL", "install Pillow"), status=501,
                           code="not_installed") from None
    try:
        return getattr(plugin, kind)(io.BytesIO(data)), name
    except MemoryError:
        raise
    except Exception as error:  # each format stumbles in its own ways over a broken file
        raise damaged(name, error) from None


def damaged(name: str, error: Exception) -> RequestError:
    return refusal(f"{DAMAGED_IMAGE}: it is a damaged {name}: {error_text(error)[:200]}")


def check_size(width: int, height: int):
    if width * height > LIMITS.picture_pixels:
        raise refusal(f"the image has {width:,} times {height:,} pixels; at most "
                      f"{LIMITS.picture_pixels // 10**6} million are allowed", "too_complex")
    if max(width, height) > LIMITS.picture_side * min(width, height):
        raise refusal(f"the image has {width:,} times {height:,} pixels: one side may be at most "
                      f"{LIMITS.picture_side} times the other", "too_complex")


def decode_file(data: bytes) -> tuple[int, int, bytes]:
    """(width, height, RGB bytes row by row) of a picture file's first frame. The frame is turned as its EXIF
    data says, on white where it is transparent, and made smaller if it has more than LIMITS.kept_pixels."""
    image, name = open_picture(data)
    check_size(*image.size)
    try:
        return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:
        raise damaged(name, error) from None


def to_rgb(image: Any) -> tuple[int, int, bytes]:
    from PIL import Image, ImageOps
    width, height = image.size
    factor = math.sqrt(min(LIMITS.kept_pixels / (width * height), 1.0))
    smaller = max(int(width * factor), 1), max(int(height * factor), 1)
    orientation = image.getexif().get(ImageOps.ExifTags.Base.Orientation, 1)
    if factor < 1:
        image.draft("RGB", smaller)  # decodes a JPEG at a half, a quarter or an eighth, which costs much less
    image.load()
    if image.mode.startswith(("I", "F")):  # 16 bits of grey: Pillow would clip them to 8
        image = image.point(lambda value: value / 257 if image.mode != "F" else value).convert("L")
    clear = image.mode in ("PA", "LA", "La", "RGBa") or "transparency" in image.info
    if clear or image.mode not in ("RGB", "RGBA", "L"):
        image = image.convert("RGBA" if clear else "RGB")
    if factor < 1:
        image = image.resize(smaller, Image.Resampling.LANCZOS, reducing_gap=3.0)
    if image.mode == "RGBA":
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    image = image.convert("RGB")
    turn = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_270",
            7: "TRANSVERSE", 8: "ROTATE_90"}.get(orientation)
    if turn:
        image = image.transpose(getattr(Image.Transpose, turn))
    return *image.size, image.tobytes()


class PictureTasks:
    """The sandbox's task for pictures."""

    def prepare(self, name: str, arguments: Sequence):
        """Nothing is shared between pictures."""

    def decode_picture(self, body: bytes) -> Body:
        return Body(of_picture(picture(*decode_file(bytes(body)))).data)
