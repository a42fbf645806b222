"""Checks a charsmap: sentencepiece's table of which characters become others, before `tokenizers` reads it.

The library trusts it. It makes room for as many numbers as the first four bytes say, of which 64 bytes can
ask for 4 GiB, and looks up places that lie outside, at which it panics with the request that met one.

The table is the size of a trie in bytes, the trie (a double array of darts-clone: one number for each node),
and the texts that characters become, each before a NUL."""

from __future__ import annotations

import base64
import binascii
import json
import re
import sys
from array import array

from chatlm.common.errors import ConfigError

LONGEST = 256        # bytes that one character may become; Unicode's own forms need 33
MOST_BYTES = 4 << 20  # nmt_nfkc's has 0.3 MB
LEAF = 1 << 31       # of a node: its other bits are the place of a text
HAS_TEXT = 1 << 8    # of another node: its child for the byte 0 is a leaf
BLOCK = 256          # a node's children lie in one block, at all values of a byte


def check_charsmaps(payload: bytes):
    """ConfigError if a charsmap in a tokenizer.json is broken."""
    if b"recompiled" not in payload and not re.search(rb"\\u00[4-7]", payload):  # letters may be escaped
        return

    def check(pairs: list[tuple]):  # duplicate keys included
        for key, value in pairs:
            if key == "precompiled_charsmap" and isinstance(value, str):
                try:
                    check_charsmap(base64.b64decode(value))
                except binascii.Error:
                    raise ConfigError("its precompiled_charsmap is not in base64") from None

    try:
        json.loads(payload, object_pairs_hook=check)
    except (ValueError, RecursionError):  # the library reports what is wrong
        pass


def check_charsmap(data: bytes):
    """ConfigError if a charsmap is broken, or is no table of characters."""
    if not data:
        return
    size = int.from_bytes(data[:4], "little")
    texts = data[4 + size:]
    if len(data) > MOST_BYTES or len(data) < 4 + size or size % (4 * BLOCK) or not size:
        raise ConfigError(f"its precompiled_charsmap has {len(data):,} bytes, of which a trie would take "
                          f"{size:,}; it must be a whole table of sentencepiece's of at most {MOST_BYTES:,}")
    nodes = array("I", data[4:4 + size])
    if sys.byteorder == "big":
        nodes.byteswap()
    begins = beginnings(texts)
    for place, node in enumerate(nodes):
        if node & LEAF:
            is_sound = node - LEAF in begins
        else:
            child = place ^ (node >> 10) << ((node & 0x200) >> 6)
            is_sound = child < len(nodes) and (not node & HAS_TEXT or nodes[child] & LEAF)
        if not is_sound:
            raise ConfigError("its precompiled_charsmap leads to places outside of it")


def beginnings(texts: bytes) -> set[int]:
    """Where a text of at most LONGEST bytes may begin: at a whole character. ConfigError if they are no
    texts."""
    try:
        texts.decode()
    except UnicodeDecodeError:
        raise ConfigError("the texts of its precompiled_charsmap are not UTF-8") from None
    begins = {len(texts)}
    end = len(texts)
    for place in range(len(texts) - 1, -1, -1):
        if not texts[place]:
            end = place
        if texts[place] & 0xC0 != 0x80 and end - place <= LONGEST:
            begins.add(place)
    return begins
