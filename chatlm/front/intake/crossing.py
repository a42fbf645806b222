"""Packs what a sandbox has read, so that it crosses to the front quickly."""

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
    """The sizes and digests of pictures, for a sandbox: it needs no pixels."""
    return [[each.width, each.height, base64.b64encode(each.digest).decode()] for each in pictures]


def unpacked_sizes(values: Seq) -> list[Picture]:
    """Reverse packed_sizes."""
    return [Picture(width, height, b"", base64.b64decode(digest)) for width, height, digest in values]


def packed_body(parsed: ParsedBody, prompt_ids: Seq[Seq[int]]) -> list:
    """A body and the token ids of its prompts, for the front. The ids are bytes: millions of JSON numbers
    would stop the front's event loop while it reads them.

    A prompt that a client sent as ids is sent once, not twice."""
    both = zip(parsed.request.prompts, prompt_ids)
    prompts = tuple(() if prompt == ids else prompt for prompt, ids in both)
    return [replace(parsed, request=replace(parsed.request, prompts=prompts, prompt_ids=None)),
            [array("I", ids).tobytes() for ids in prompt_ids]]


def unpacked_body(values: Seq, vocab_size: int) -> ParsedBody:
    """Reverse packed_body.

    Equal ids become one shared int object, so each costs 8 bytes. Rows of pictures have ids beyond the
    vocabulary, so ids beside pictures are not shared. The ids are converted in small pieces, because other
    threads cannot run during a single C call."""
    parsed = object_restorer(ParsedBody)(values[0])
    if values[1] is None:  # its prompts are not made yet
        return parsed
    object_of = int if parsed.request.pictures else shared_integers(vocab_size).__getitem__
    all_ids = []
    for data in map(base64.b64decode, values[1]):
        ids = []
        for begin in range(0, len(data), WRITE_BYTES):
            ids.extend(map(object_of, array("I", data[begin:begin + WRITE_BYTES])))
        all_ids.append(tuple(ids))
    prompts = tuple(ids if prompt == () else prompt for prompt, ids in zip(parsed.request.prompts, all_ids))
    return replace(parsed, request=replace(parsed.request, prompts=prompts, prompt_ids=tuple(all_ids)))


@functools.cache
def shared_integers(end: int) -> list[int]:
    return list(range(end))
