"""A decoded picture, as bytes for the pipe, and the ids that stand for its rows in a prompt."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence as Seq

from chatlm.common.messages.protocol import NewPicture
from chatlm.common.messages.requests import Picture, Vision

HEAD = struct.Struct("<16sII")  # digest, width, height
MOST_IDS = 1 << 31              # ids are signed integers of 32 bits in the lookup of drafts


def picture(width: int, height: int, pixels: bytes) -> Picture:
    """A picture with its digest. pixels: width * height * 3 bytes: red, green, blue, row by row."""
    if width < 1 or height < 1 or len(pixels) != 3 * width * height:
        raise ValueError(f"{len(pixels):,} bytes are no picture of {width} * {height} pixels")
    digest = hashlib.blake2b(struct.pack("<II", width, height), digest_size=16)
    digest.update(pixels)
    return Picture(width, height, bytes(pixels), digest.digest())


def of_picture(picture: Picture) -> NewPicture:
    return NewPicture(HEAD.pack(picture.digest, picture.width, picture.height) + picture.pixels)


def picture_of(message: NewPicture) -> Picture:
    """ValueError if it is none."""
    try:
        digest, width, height = HEAD.unpack_from(message.data)
    except struct.error:
        raise ValueError(f"{len(message.data)} bytes are no picture") from None
    if width < 1 or height < 1 or len(message.data) != HEAD.size + 3 * width * height:
        raise ValueError(f"{len(message.data):,} bytes are no picture of {width} * {height} pixels")
    return Picture(width, height, bytes(message.data[HEAD.size:]), digest)


def row_ids(vision: Vision, digest: bytes, count: int) -> list[int]:
    """The ids that stand for a picture's rows: hashes of its pixels, the settings and the row's number.

    So equal ids mean equal rows, wherever tokens are compared: in the prefix cache, the store, and drafts."""
    seed = digest + repr(vision).encode()
    room = MOST_IDS - vision.first_id
    numbers = struct.unpack(f"<{count}I", hashlib.shake_128(seed).digest(4 * count))
    return [vision.first_id + number % room for number in numbers]


def rows_in(vision: Vision, ids: Seq[int]) -> list[int]:
    """The indexes of the ids that stand for rows of pictures."""
    return [index for index, token in enumerate(ids) if token >= vision.first_id]


def row_places(vision: Vision, ids: Seq[int], pictures: Seq[tuple[bytes, int]]) -> list[tuple[int, int]]:
    """Where the rows of pictures, (digest, rows) of each in order, stand in a prompt: (its number, the row)
    of each of `rows_in`. ValueError if the ids are those of other pictures."""
    wanted = []
    for digest, count in pictures:
        wanted += row_ids(vision, digest, count)
    if wanted != [token for token in ids if token >= vision.first_id]:
        raise ValueError("the ids of the prompt are not those of its pictures")
    rows = []
    for number, (_, count) in enumerate(pictures):
        rows += [(number, row) for row in range(count)]
    return rows
