"""Bodies that clients compress, inflated as their parts arrive."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator
from typing import TYPE_CHECKING

from chatlm.common.errors import RequestError, shown

if TYPE_CHECKING:
    from aiohttp import web


SLICE_BYTES = 1 << 18  # inflated in one go: this takes about a millisecond, in which nobody gets a turn
# zlib's wbits: what is around the data
GZIP = 31
ZLIB = 15
RAW = -15
READ = "gzip, deflate"


def encoding_of(http: web.Request) -> str:
    """How a body is compressed: gzip, deflate, or "" for one that is not. RequestError 415 for all else."""
    named = ",".join(http.headers.getall("Content-Encoding", ())).lower().split(",")
    encodings = [name.strip().removeprefix("x-") for name in named if name.strip() not in ("", "identity")]
    if not encodings:
        return ""
    if encodings not in (["gzip"], ["deflate"]):
        raise RequestError(f"a body with Content-Encoding {shown(', '.join(encodings))} cannot be read: send "
                           "it with gzip or deflate, or as it is", status=415, code="unsupported_encoding")
    return encodings[0]


def format_of(encoding: str, data: bytes) -> int:
    """zlib's wbits for data that begins so. "deflate" means zlib's format, but some clients send it bare."""
    if encoding == "gzip":
        return GZIP
    return ZLIB if data[0] & 15 == 8 else RAW


async def inflated(parts: AsyncIterator[bytes], encoding: str) -> AsyncGenerator[bytes, None]:
    """The content of compressed data, in slices between which other tasks get a turn: who reads it can stop
    before it is too large. RequestError if the data is broken, is cut off, or has something behind it."""
    stream = None
    try:
        async for data in parts:
            stream = stream or zlib.decompressobj(format_of(encoding, data))
            more = True
            while more:
                if stream.eof:
                    raise RequestError(f"the body has more after the end of its {encoding} data")
                content = stream.decompress(data, SLICE_BYTES)
                data = stream.unconsumed_tail or stream.unused_data
                yield content
                await asyncio.sleep(0)
                more = bool(data) or len(content) == SLICE_BYTES and not stream.eof
    except zlib.error:
        raise RequestError(f"the body is not valid {encoding} data") from None
    if stream is None or not stream.eof:
        raise RequestError(f"the body ends before its {encoding} data does")
