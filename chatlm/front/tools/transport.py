"""What carries JSON-RPC messages between this server and a tool server, and the errors of doing so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol

MESSAGE_BYTES = 4 << 20  # of one message of a tool server
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


class Refusal(ToolError):
    """The tool server answered with a JSON-RPC error."""

    def __init__(self, code: int, text: str, data: Any = None):
        super().__init__(text)
        self.code = code
        self.data = data

    @classmethod
    def of(cls, error: Any) -> Refusal:
        """The `error` member of a response, which may be anything."""
        if not isinstance(error, dict):
            return cls(0, "an error that is not an object")
        code = error.get("code")
        text = error.get("message")
        if not isinstance(text, str):
            text = "an error without a text"
        return cls(code if type(code) is int else 0, text, error.get("data"))


class Transport(Protocol):
    """A connection to one tool server."""

    async def request(self, message: Message, headers: Mapping[str, str]) -> Any:
        """Send a request and return the `result` of its response. Raises Refusal for an error in its place,
        ServerGone, or ToolError. If the caller is cancelled, the transport forgets the request.

        headers: more headers of a request over HTTP."""

    async def send(self, message: Message):
        """Send a notification, or the response to a request of the tool server."""

    def speak(self, version: str, is_modern: bool):
        """From now on messages are of this revision of the protocol."""

    async def ended(self) -> str:
        """Return once the connection can't be used any more, with the reason."""
        ...

    async def close(self):
        """End the connection, and the program if there is one."""


def messages_in(data: bytes) -> list[Message]:
    """The messages of a JSON text: one, or a list, as revision 2025-03-26 has it; none if it is anything
    else."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return []
    values = value if isinstance(value, list) else [value]
    return [message for message in values if isinstance(message, dict)]


def result_of(response: Message) -> Any:
    """The result in a response. Raises Refusal if it is an error."""
    if "error" in response:
        raise Refusal.of(response["error"])
    return response.get("result")
