"""How what was read crosses from a sandbox to the front."""

from __future__ import annotations

import base64
import functools
from array import array
from collections.abc import Sequence as Seq
from dataclasses import replace

from chatlm.common.messages.protocol import ParsedBody
from chatlm.common.messages.requests import Picture
from chatlm.common.messages.wire import object_restorer
from chatlm.front.admission.sandbox import WRITE_BYTES


def packed_sizes(pictures: Seq[Picture]) -> list:
    """All of pictures but their pixels, for a sandbox."""
    return [[each.width, each.height, base64.b64encode(each.digest).decode()] for each in pictures]


def unpacked_sizes(values: Seq) -> list[Picture]:
    """What packed_sizes packed."""
    return [Picture(width, height, b"", base64.b64decode(digest)) for width, height, digest in values]


def packed_body(parsed: ParsedBody, prompt_ids: Seq[Seq[int]]) -> list:
    """For the front: millions of ids as JSON numbers would stop its event loop while they are read.

    Prompts that are ids are sent once."""
    both = zip(parsed.request.prompts, prompt_ids)
    prompts = tuple(() if prompt == ids else prompt for prompt, ids in both)
    return [replace(parsed, request=replace(parsed.request, prompts=prompts, prompt_ids=None)),
            [array("I", ids).tobytes() for ids in prompt_ids]]


def unpacked_body(values: Seq, vocab_size: int) -> ParsedBody:
    """What packed_body packed. Equal ids are one object, so that each takes 8 bytes; where there are
    pictures, whose rows have ids beyond the vocabulary, each is its own. Made piece by piece: other threads
    get no turn within one call of C."""
    parsed = object_restorer(ParsedBody)(values[0])
    prompts = []
    object_of = int if parsed.request.pictures else integers(vocab_size).__getitem__
    for data in map(base64.b64decode, values[1]):
        prompts.append(prompt := [])
        for begin in range(0, len(data), WRITE_BYTES):
            prompt.extend(map(object_of, array("I", data[begin:begin + WRITE_BYTES])))
    ids = tuple(map(tuple, prompts))
    prompts = tuple(own if prompt == () else prompt for prompt, own in zip(parsed.request.prompts, ids))
    return replace(parsed, request=replace(parsed.request, prompts=prompts, prompt_ids=ids))


@functools.cache
def integers(end: int) -> list[int]:
    return list(range(end))
