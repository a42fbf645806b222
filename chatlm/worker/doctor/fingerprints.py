"""Recognizes a published tokenizer, and finds where a model's tokenizer differs from it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence as Seq
from typing import NamedTuple

from chatlm.worker.doctor.hard_texts import FINGERPRINTED
from chatlm.worker.doctor.known_tokenizers import KNOWN

HASH_BYTES = 3
LEAST_ALIKE = 0.5  # of the texts: two vocabularies hardly ever agree on one


class Likeness(NamedTuple):
    """The published tokenizer that is most like a given one."""

    name: str
    compared: int              # texts
    different: tuple[str, ...]  # those among them that it encodes otherwise


def hash_of(ids: Seq[int]) -> bytes:
    return hashlib.sha256(" ".join(map(str, ids)).encode()).digest()[:HASH_BYTES]


def fingerprint(encode: Callable[[str], Seq[int]]) -> list[bytes]:
    """A hash of the ids of each text of FINGERPRINTED; b"" for a text that cannot be encoded."""
    def hashed(text: str) -> bytes:
        try:
            return hash_of(encode(text))
        except Exception:  # a vocabulary without these characters
            return b""

    return [hashed(text) for text in FINGERPRINTED]


def packed(hashes: Seq[bytes]) -> str:
    return base64.urlsafe_b64encode(b"".join(hashes)).decode()


def unpacked(text: str) -> list[bytes]:
    data = base64.urlsafe_b64decode(text)
    return [data[begin:begin + HASH_BYTES] for begin in range(0, len(data), HASH_BYTES)]


def likeness(hashes: Seq[bytes], skipped: Callable[[str], bool],
             known: Mapping[str, str] = KNOWN) -> Likeness | None:
    """The known tokenizer that agrees on the most texts, if it agrees on half of them. skipped: texts not to
    compare."""
    best: Likeness | None = None
    places = [place for place, text in enumerate(FINGERPRINTED) if not skipped(text)]
    for name, spelled in known.items():
        theirs = unpacked(spelled)
        different = tuple(FINGERPRINTED[place] for place in places if hashes[place] != theirs[place])
        if best is None or len(different) < len(best.different):
            best = Likeness(name, len(places), different)
    if best is None or len(best.different) > (1 - LEAST_ALIKE) * best.compared:
        return None
    return best
