"""What carries JSON-RPC messages between this server and a tool server, and the errors of doing so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as Seq
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from chatlm.common.jsontext import dump

MESSAGE_BYTES = 4 << 20  # of one message of a tool server
MOST_SCALARS = 1_000       # of a call
HEADER_CHARACTERS = 1_000  # of an argument that is also sent as a header
Message = dict[str, Any]
Hear = Callable[[Message], None]  # gets each message that is not the response to a request


class ToolError(Exception):
    """A tool server did not do what was asked. The text is for the operator and for the model.

    unknown_outcome: the call may have been carried out."""

    def __init__(self, text: str, *, unknown_outcome: bool = False):
        super().__init__(text)
        self.unknown_outcome = unknown_outcome


class ServerGone(ToolError):
    """The tool server can't be reached any more: it has ended, or the connection has."""


class JsonRpcError(ToolError):
    """The tool server answered with a JSON-RPC error."""

    def __init__(self, code: int, text: str, supported: Seq[str] = ()):
        """supported: the revisions that it speaks, if that is what the error is about."""
        super().__init__(text)
        self.code = code
        self.supported = supported


class Transport(Protocol):
    """A connection to one tool server."""

    async def request(self, message: Message, headers: Mapping[str, str]) -> Any:
        """Send a request and return the `result` of its response. Raises JsonRpcError for an error in its
        place, ServerGone, or ToolError. If the caller is cancelled, the transport forgets the request.

        headers: more headers of a request over HTTP."""

    async def send(self, message: Message):
        """Send a notification, or the response to a request of the tool server."""

    @property
    def leaving_cancels(self) -> bool:
        """Whether a request whose caller has left is cancelled by that alone, without a notification."""
        ...

    def speak(self, version: str, is_modern: bool):
        """From now on messages are of this revision of the protocol."""

    async def ended(self) -> str:
        """Return once the connection can't be used any more, with the reason."""
        ...

    async def close(self):
        """End the connection, and the program if there is one."""


@dataclass(frozen=True)
class CallArguments:
    """The arguments of a call: JSON text, which nobody here reads again, and those that a header can have."""

    text: bytes
    scalars: Mapping[str, str | int | float | bool]

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> CallArguments:
        scalars = ((name, value) for name, value in arguments.items()
                   if isinstance(value, (str, int, float)) and len(str(value)) <= HEADER_CHARACTERS)
        return cls(dump(arguments), dict(islice(scalars, MOST_SCALARS)))


def packed(message: Message) -> bytes:
    """A message as JSON on one line."""
    params = message.get("params")
    arguments = params.get("arguments") if isinstance(params, dict) else None
    if params is None or not isinstance(arguments, CallArguments):
        return dump(message)
    head = dump({name: value for name, value in message.items() if name != "params"})
    others = dump({name: value for name, value in params.items() if name != "arguments"})
    return b'%s, "params": %s, "arguments": %s}}' % (head[:-1], others[:-1], arguments.text)


def result_of(response: Message) -> Any:
    """The result in a response, as `foreign.condensed` makes one. Raises JsonRpcError if it is an error, and
    ToolError if it can't be used."""
    if "failed" in response:
        raise ToolError(response["failed"], unknown_outcome=response["unknown_outcome"])
    if "error" in response:
        error = response["error"]
        raise JsonRpcError(error["code"], error["message"], error["supported"])
    return response["result"]
