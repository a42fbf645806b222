"""Files become pixels: what Pillow itself says is the reference; lies, bombs and broken files are refused by name."""

import io
import random
import struct
import zlib

import pytest

Image = pytest.importorskip("PIL.Image")
from chatlm.common.config import LIMITS    # noqa: E402
from chatlm.common.errors import RequestError    # noqa: E402
from chatlm.common.messages.protocol import NewPicture    # noqa: E402
from chatlm.common.vision.pictures import picture, picture_of    # noqa: E402
from chatlm.front.api.picture_files import PictureTasks, decode_file    # noqa: E402


def noise(mode="RGB", size=(37, 23), seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, random.Random(seed).randbytes(size[0] * size[1] * bands))


def file_of(image, kind="PNG", **options):
    target = io.BytesIO()
    image.save(target, kind, **options)
    return target.getvalue()


@pytest.mark.parametrize("kind, options", [("PNG", {}), ("WEBP", {"lossless": True}), ("JPEG", {"quality": 90}), ("GIF", {})])
def test_pixels_are_those_that_pillow_reads(kind, options):
    data = file_of(noise(), kind, **options)
    width, height, pixels = decode_file(data)
    assert (width, height) == (37, 23) and pixels == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_photo_is_turned_as_its_camera_says(orientation, kind):
    from PIL import ImageOps
    exif = Image.Exif()
    exif[0x112] = orientation
    data = file_of(noise(), kind, exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode_file(data) == (*turned.size, turned.convert("RGB").tobytes())


def test_transparent_pixels_are_white():
    """They are in palettes and grey too."""
    clear = noise("RGBA")
    clear.putalpha(0)
    assert set(decode_file(file_of(clear))[2]) == {255}
    palette = noise("L").convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    shown = decode_file(file_of(palette, transparency=palette.getpixel((0, 0))))[2]
    assert shown[:3] == b"\xff\xff\xff" and set(shown) != {255}
    grey = noise("LA")
    half = Image.new("RGBA", grey.size, "white")
    half.alpha_composite(grey.convert("RGBA"))
    assert decode_file(file_of(grey))[2] == half.convert("RGB").tobytes()


def test_grey_of_16_bits_keeps_its_upper_bits():
    """Inks become light."""
    grey = Image.frombytes("I;16", (256, 2), 2 * struct.pack("<256H", *(value * 257 for value in range(256))))
    assert decode_file(file_of(grey))[2] == 2 * bytes(value for value in range(256) for _ in range(3))
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode_file(file_of(inks, "JPEG"))[2]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    assert decode_file(file_of(Image.new("1", (9, 3), 1)))[2] == b"\xff" * 81


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_is_the_picture(kind):
    first, second = Image.new("RGB", (20, 20), "red"), Image.new("RGB", (20, 20), "blue")
    width, height, pixels = decode_file(file_of(first, kind, save_all=True, append_images=[second], lossless=True))
    assert (width, height) == (20, 20) and pixels[0] > 240 and pixels[2] < 15


@pytest.mark.parametrize("kind, mode", [("JPEG", "RGB"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "L")])
def test_a_large_picture_shrinks_and_keeps_its_shape(kind, mode):
    image = Image.linear_gradient("L").resize((4000, 3000)).convert(mode)
    width, height, pixels = decode_file(file_of(image, kind))
    assert LIMITS.kept_pixels * 0.99 < width * height <= LIMITS.kept_pixels and abs(width / height - 4 / 3) < 0.002
    rows = [pixels[row * width * 3] for row in range(0, height, height // 7)]
    assert rows == sorted(rows) and rows[-1] - rows[0] > 200 and len(pixels) == width * height * 3


def png(width, height, rows=b"", kind=2):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    header = struct.pack(">IIBBBBB", width, height, 8, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("data, said", [
    (b"", "of another format"), (b"hello", "of another format"), (b"<svg xmlns='x'/>", "an SVG"), (b"  <?xml version='1.0'?><svg/>", "an SVG"),
    (b"II*\0" + bytes(40), "a TIFF"), (b"%PDF-1.7", "a PDF"), (b"BM" + bytes(60), "a BMP"), (b"\0\0\0\x18ftypheic", "HEIC"),
    (png(60_000, 60_000), "60,000 times 60,000"), (png(40_000, 100), "one side"), (png(20, 20), "damaged"), (png(0, 5), "damaged"),
    (b"\x89PNG\r\n\x1a\n", "damaged"), (b"\xff\xd8\xff\xe0", "damaged"), (b"GIF89a", "damaged"), (b"RIFF\x10\0\0\0WEBPVP8 ", "damaged"),
], ids=str)
def test_other_formats_and_broken_files_are_refused(data, said):
    """Files that lie about their format are too."""
    with pytest.raises(RequestError, match=said) as refused:
        decode_file(data)
    assert refused.value.status == 400 and len(str(refused.value)) < 400


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_broken_file_gives_its_size_or_an_error(kind):
    """It may be cut anywhere or have wrong bytes; its pixels are of its size."""
    whole, generator = file_of(noise(size=(64, 48)), kind), random.Random(kind)
    for _ in range(150):
        data = bytearray(whole[:generator.randrange(len(whole))] if generator.random() < 0.5 else whole)
        for _ in range(generator.randrange(4)):
            if data:
                data[generator.randrange(len(data))] = generator.randrange(256)
        try:
            width, height, pixels = decode_file(bytes(data))
        except RequestError as error:
            assert error.status == 400
        else:
            assert len(pixels) == width * height * 3 <= LIMITS.kept_pixels * 3
    with pytest.raises(RequestError, match="damaged"):
        decode_file(whole[:len(whole) // 2])


def test_the_task_returns_what_a_worker_gets():
    data = file_of(noise())
    assert picture_of(NewPicture(PictureTasks().decode_picture(data).data)) == picture(*decode_file(data))
    assert len({picture(*size, bytes(some)).digest for size, some in (((37, 23), noise().tobytes()), ((23, 37), noise().tobytes()), ((37, 23), 37 * 23 * 3))}) == 3
