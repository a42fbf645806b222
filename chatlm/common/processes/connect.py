"""TCP between our processes on several machines: both ends prove that they know a secret."""

from __future__ import annotations

import hmac
import json
import secrets
import selectors
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.log import CalmLog, log
from chatlm.common.messages.wire import HEADER, BadMessage, receive_into, unpacked

if TYPE_CHECKING:
    from chatlm.common.messages.wire import Pipe


def tls_context(folder: str | None, server: bool) -> ssl.SSLContext | None:
    """--ray-tls: each side must present a certificate issued by the folder's authority."""
    if not folder:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    # nodes have no names
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if server:
        context.num_tickets = 0  # otherwise the worker could read bytes that are not a message
    try:
        context.load_verify_locations(Path(folder, "ca.pem"))
        context.load_cert_chain(Path(folder, "cert.pem"), Path(folder, "key.pem"))
    except OSError as error:
        raise ConfigError(f"--ray-tls {folder}: no usable ca.pem, cert.pem and key.pem ({error})") from None
    return context


TRANSIT_BYTES = 1 << 17  # of a worker's messages in each socket; megabytes could queue there by default


def proof(secret: bytes, side: str, nonces: bytes | bytearray) -> bytes:
    """Proves that a side of a connection knows the secret, for these nonces (32 bytes from each side)."""
    return hmac.digest(secret, side.encode() + nonces, "sha256")


def admit_front(where: str) -> socket.socket:
    """In a worker on another machine: listen, print port and secret to stdout, and return the first
    connection that knows the secret."""
    host, _, folder = where.partition(",")
    secret = secrets.token_bytes(32)
    context = tls_context(folder, True)
    calm = CalmLog()
    log.addHandler(calm)  # while anybody can connect: the front's settings have not arrived yet
    try:
        with listen(host) as server, Listener(server, secret, context) as listener:
            print(json.dumps([server.getsockname()[1], secret.hex()]), flush=True)
            if came := listener.accept(60):
                came[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, TRANSIT_BYTES)
                return came[0]
    finally:
        log.removeHandler(calm)
        calm.close()
    raise SystemExit("the front did not connect within a minute")


def listen(host: str) -> socket.socket:
    """A listening socket on any free port."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


class Handshake(NamedTuple):
    """A peer that has connected but not yet proven that it knows the secret."""

    steps_left: Generator[None, None, Any]  # continues when bytes arrive; returns the first message
    host: str
    deadline_s: float


class Listener:
    """Accepts processes that know a secret: a listening socket, and the peers still proving it.

    They prove it concurrently, each with one deadline for the whole proof, so that no peer delays others by
    sending nothing, or a byte now and then. If there are too many, the address with the most loses its
    oldest. Nothing from peers that are not admitted is decoded."""

    PROOF_S = 5.0
    MOST = 256

    def __init__(self, server: socket.socket, secret: bytes, context: ssl.SSLContext | None = None,
                 first: Pipe | None = None):
        self.socket = server
        self.secret = secret
        self.context = context
        self.first = first  # a message of this pipe must follow the proof, within the same time
        self.handshakes: dict[socket.socket, Handshake] = {}  # the oldest first
        self.selector = selectors.DefaultSelector()
        server.setblocking(False)
        self.selector.register(server, selectors.EVENT_READ)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *error):
        for connection in self.handshakes:
            connection.close()
        self.selector.close()

    def accept(self, wait_s: float) -> tuple[socket.socket, Any] | None:
        """The next peer to prove it, with its first message; None if none does within `wait_s`."""
        end_s = time.monotonic() + wait_s
        while (now_s := time.monotonic()) < end_s:
            until_s = min([end_s, *(handshake.deadline_s for handshake in self.handshakes.values())])
            for key, _ in self.selector.select(max(until_s - now_s, 0)):
                connection = key.data or self._accept_socket()
                if connection in self.handshakes and (came := self._continue(connection)):
                    return came
            now_s = time.monotonic()
            late = [peer for peer, handshake in self.handshakes.items() if handshake.deadline_s <= now_s]
            for peer in late:
                self._refuse(peer, f"no proof within {self.PROOF_S:g} s")
        return None

    def _accept_socket(self) -> socket.socket | None:
        try:
            connection, (host, *_) = self.socket.accept()
        except OSError:  # it has already left
            return None
        if len(self.handshakes) >= self.MOST:
            [(crowd, _)] = Counter(handshake.host for handshake in self.handshakes.values()).most_common(1)
            oldest = next(peer for peer, handshake in self.handshakes.items() if handshake.host == crowd)
            self._refuse(oldest, "too many connections")
        try:
            watch_peer(connection)
            connection.setblocking(False)
            if self.context:
                connection = self.context.wrap_socket(connection, server_side=True,
                                                      do_handshake_on_connect=False)
        except OSError:
            connection.close()
            return None
        deadline_s = time.monotonic() + self.PROOF_S
        self.handshakes[connection] = Handshake(self._handshake(connection), host, deadline_s)
        self.selector.register(connection, selectors.EVENT_READ, connection)
        return connection

    def _continue(self, connection: socket.socket) -> tuple[socket.socket, Any] | None:
        """Continue a peer's proof; returns the result of `accept` once it is complete."""
        try:
            next(self.handshakes[connection].steps_left)
        except StopIteration as end:
            self._forget(connection)
            connection.setblocking(True)
            return connection, end.value
        except (OSError, EOFError, BadMessage) as error:
            self._refuse(connection, error)
        return None

    def _handshake(self, connection: socket.socket) -> Generator[None, None, Any]:
        if isinstance(connection, ssl.SSLSocket):
            yield from patiently(connection.do_handshake)
        nonce = secrets.token_bytes(32)
        connection.sendall(nonce)  # a new connection has room for it
        theirs = yield from receive_patiently(connection, 64)
        nonces = nonce + theirs[:32]
        if not hmac.compare_digest(theirs[32:], proof(self.secret, "front", nonces)):
            raise ConnectionError("it does not know the secret")
        connection.sendall(proof(self.secret, "worker", nonces))
        if self.first is None:
            return None
        kind, size = self.first.kind_and_size((yield from receive_patiently(connection, HEADER.size)))
        return unpacked(kind, (yield from receive_patiently(connection, size)))

    def _refuse(self, connection: socket.socket, why):
        log.warning("a connection was refused: %s", why)
        self._forget(connection)
        connection.close()

    def _forget(self, connection: socket.socket):
        self.selector.unregister(connection)
        del self.handshakes[connection]


def patiently(read: Callable[[], Any]) -> Generator[None, None, Any]:
    """Returns the result of `read` once all the bytes that it needs have arrived; yields until then."""
    while True:
        try:
            return read()
        except (BlockingIOError, ssl.SSLWantReadError):
            yield


def receive_patiently(connection: socket.socket, size: int) -> Generator[None, None, bytes]:
    data = b""
    while len(data) < size:
        if not (part := (yield from patiently(partial(connection.recv, size - len(data))))):
            raise EOFError("the other end has closed the connection")
        data += part
    return data


def dial(host: str, port: int, secret: bytes) -> socket.socket:
    """A connection to the Listener of a process that also knows the secret."""
    deadline_s = time.monotonic() + 20
    connection = socket.create_connection((host, port), timeout=20)
    try:
        watch_peer(connection)
        theirs = bytearray(32)
        nonce = secrets.token_bytes(32)
        proven = bytearray(32)
        receive_into(connection, theirs, deadline_s)
        connection.sendall(nonce + proof(secret, "front", theirs + nonce))
        receive_into(connection, proven, deadline_s)
        if not hmac.compare_digest(proven, proof(secret, "worker", theirs + nonce)):
            raise ConnectionError(f"{host}:{port} does not know the secret")
    except BaseException:
        connection.close()
        raise
    connection.settimeout(None)
    return connection


def watch_peer(connection: socket.socket):
    """Send small messages at once, and detect that the other machine is gone: within 30 s, or within minutes
    while sent data is unacknowledged, as it also is by a slow reader."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4),
                        ("TCP_USER_TIMEOUT", 300_000)):
        if hasattr(socket, name):  # some systems lack some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def has_hung_up(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def address_towards(host: str, port: int) -> str:
    """The address that this machine uses to reach another."""
    with socket.socket(socket.getaddrinfo(host, port)[0][0], socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]
