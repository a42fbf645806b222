"""How messages cross a pipe: packed, each pipe with its own types of message.

A packed message is one byte for the type's place in its `Pipe`, four bytes for the length, then a JSON list
of its fields: plain data alone, so reading one cannot run code. The NamedTuples of a union end with a field
`type` that tells them apart."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import math
import select
import socket
import struct
import time
import types
import typing
from collections.abc import Callable, Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from typing_extensions import dataclass_transform  # in typing from Python 3.11 on
else:
    dataclass_transform = lambda **_: lambda function: function


T = TypeVar("T")


@dataclass_transform(frozen_default=True)
def wire_message(max_bytes: int) -> Callable[[type[T]], type[T]]:
    """Makes a class a message: a frozen dataclass, which has at most `max_bytes` bytes when packed."""
    def register(message_type: type[T]) -> type[T]:
        setattr(message_type, "MAX_BYTES", max_bytes)
        return dataclass(frozen=True)(message_type)
    return register


HEADER = struct.Struct("<BI")  # number of the message's type in its pipe, length of the body in bytes


class BadMessage(Exception):
    """The bytes from a pipe are not one of our messages."""


def plain(value):
    """Convert what JSON cannot encode into something it can; NamedTuples already encode as lists."""
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return sorted(value) if isinstance(value, frozenset) else str(value)  # a Path


@functools.cache
def restorer(annotation) -> Callable[[Any], Any] | None:
    """A function that undoes `plain` and JSON for a value of this type; None where nothing needs undoing."""
    kind = typing.get_origin(annotation)
    inside = typing.get_args(annotation)
    if kind is types.UnionType and all(hasattr(member, "type") for member in inside):
        by_type = {member._field_defaults["type"]: object_restorer(member) for member in inside}
        return lambda values: by_type[values[-1]](values)
    if kind in (typing.Union, types.UnionType):  # at most one of its types needs restoring
        restore = next(filter(None, map(restorer, inside)), None)
        as_it_is = tuple(member for member in inside if member in (type(None), str, int, float))
        return restore and (lambda value: value if isinstance(value, as_it_is) else restore(value))
    if kind is tuple and inside[-1] is not ...:
        return fields_restorer(inside, tuple)
    if kind in (tuple, list, frozenset):
        restore = restorer(inside[0])
        if restore:
            return lambda values: kind(map(restore, values)) if values else kind()
        return None if kind is list else kind
    if isinstance(annotation, type) and (
            dataclasses.is_dataclass(annotation) or hasattr(annotation, "_fields")):
        return object_restorer(annotation)
    return {bytes: partial(base64.b64decode, validate=True), Path: Path}.get(annotation)


@functools.cache
def object_restorer(kind: type) -> Callable[[list], Any]:
    hints = typing.get_type_hints(kind)
    if hasattr(kind, "_fields"):  # a NamedTuple
        return fields_restorer([hints[name] for name in kind._fields], partial(tuple.__new__, kind))
    names = [field.name for field in dataclasses.fields(kind)]

    def make(values: list):
        return kind(**dict(zip(names, values)))

    return fields_restorer([hints[name] for name in names], make)


def fields_restorer(annotations: Seq, make: Callable[[list], Any]) -> Callable[[list], Any]:
    """A function that restores the fields which need it, then makes an object of all."""
    restorers = []
    for index, annotation in enumerate(annotations):
        restore = restorer(annotation)
        if restore:
            restorers.append((index, restore))

    def make_plain(values: list):
        if len(values) != len(annotations):
            raise ValueError(f"{len(annotations)} fields expected, not {len(values)}")
        return make(values)

    def restore_fields(values: list):
        if len(values) != len(annotations):
            raise ValueError(f"{len(annotations)} fields expected, not {len(values)}")
        for index, restore in restorers:
            values[index] = restore(values[index])
        return make(values)

    return restore_fields if restorers else make_plain


as_plain_json = json.JSONEncoder(default=plain, check_circular=False, separators=(",", ":")).encode


class Pipe:
    """The types of message that one sort of pipe carries, in either direction; no other is read from it.

    The first is what the parent of a child process sends first. A type's number in a message is its place
    here, so it is the same in every process, whichever modules the process has imported, in any order."""

    def __init__(self, *kinds: type):
        self.kinds = kinds
        self.numbers = {kind: number for number, kind in enumerate(kinds)}

    def packed(self, message) -> bytes:
        """A RAW message has one field, whose bytes are the body."""
        body = message.data if hasattr(message, "RAW") else as_plain_json(message).encode()
        return HEADER.pack(self.numbers[type(message)], len(body)) + body

    def kind_and_size(self, header: bytes) -> tuple[type, int]:
        """Decode a message's header. BadMessage for an unknown type, or a size above that type's limit."""
        number, size = HEADER.unpack(header)
        if number >= len(self.kinds) or size > self.kinds[number].MAX_BYTES:
            raise BadMessage(f"unknown or too large: message type {number}, {size:,} bytes")
        return self.kinds[number], size


def unpacked(kind: type, body: bytes):
    try:
        return kind(body) if hasattr(kind, "RAW") else object_restorer(kind)(json.loads(body))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise BadMessage(f"{kind.__name__}: {error}") from None


def receive_into(connection: socket.socket, data, deadline_s: float | None = None):
    """Fill all of a writable buffer; EOFError if the other end closes first, TimeoutError if it is late."""
    view = memoryview(data).cast("B")
    while len(view):
        if deadline_s is not None:  # a socket's own timeout begins anew with each byte
            connection.settimeout(max(deadline_s - time.monotonic(), 0.001))
        if not (count := connection.recv_into(view)):
            raise EOFError("the other end has closed the connection")
        view = view[count:]


class Channel:
    """A child process's end of its pipe: sends block, receives wait only on request."""

    def __init__(self, connection: socket.socket, pipe: Pipe):
        self.connection = connection
        self.pipe = pipe
        self.poll = select.poll()
        self.poll.register(connection, select.POLLIN)

    def send(self, message):
        self.connection.sendall(self.pipe.packed(message))

    def receive(self, wait: bool, most: float = math.inf, patience_s: float | None = None) -> list[Any]:
        """The messages that have arrived, at most `most`. wait: wait for one if there is none, for at most
        `patience_s`. Raises EOFError if the front has ended."""
        messages = []
        patience_ms = None if patience_s is None else 1e3 * patience_s
        unread = getattr(self.connection, "pending", lambda: 0)  # bytes that TLS has decrypted already
        while len(messages) < most:
            pause_ms = patience_ms if wait and not messages else 0
            if not unread() and not self.poll.poll(pause_ms):
                break
            kind, size = self.pipe.kind_and_size(self._read(HEADER.size))
            messages.append(unpacked(kind, self._read(size)))
        return messages

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        receive_into(self.connection, data)
        return bytes(data)
