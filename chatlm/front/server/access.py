"""Who may use the server, where it listens, and its access log."""

from __future__ import annotations

import errno
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import time
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from typing import TYPE_CHECKING

from aiohttp import web

from chatlm.common.client_words import key_needed, key_unknown
from chatlm.common.config import FOLDER, FOLDERS_CLIENT, SPACE, ApiKey
from chatlm.common.errors import ConfigError, RequestError, shown
from chatlm.common.log import log
from chatlm.common.request_ids import id_of_client, is_unguessable
from chatlm.front.server.host_names import is_loopback, is_own_name, is_public_name, split_address
from chatlm.front.server.page import POLICY
from chatlm.front.server.responses import REQUEST_LOG, SECURITY_HEADERS, RequestLog

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.front.server.metrics import Metrics
    from chatlm.front.server.routes import RouteTable


BACKLOG = 1024         # connections the system queues until they are accepted


def space_of(header: str) -> str:
    """The owner that X-Chat-Space names, "" without it: whoever knows the header has all that is in its
    space. Raises RequestError 400 if it could be guessed."""
    if header and not re.fullmatch("[A-Za-z0-9_-]{22,64}", header):
        raise RequestError("X-Chat-Space must be 22 to 64 letters, digits and - _ that nobody can guess: 128 "
                           "random bits", code="invalid_value", param="X-Chat-Space")
    digest = hashlib.blake2b(header.encode(), digest_size=16, person=b"space").hexdigest()
    return f"{SPACE}{digest}" if header else ""


class Access:
    """Decides who may use the server, by API keys, by the Host header, and by the origin of pages."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def client_of(self, http: web.Request) -> str:
        """The client's name: its key's name, else its address. Raises RequestError 401 if a key is required
        and missing or unknown."""
        scheme, _, bearer = http.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            key = bearer.strip()
        else:
            key = http.headers.get("X-Api-Key", http.headers.get("Api-Key", ""))
        digest = ApiKey.hashed(key, "").digest
        # compare all keys, even after a match: the time must not tell which one it is
        keys = [known for known in self.settings.keys if hmac.compare_digest(known.digest, digest)]
        record = REQUEST_LOG.get()
        if keys:
            record.bound = keys[0].models
            record.role = keys[0].role
            record.tools = keys[0].tools
            return keys[0].name
        if self.settings.keys and not record.route.open:
            raise key_unknown() if key else key_needed()
        record.bound = ()
        record.role = ""
        if not self.settings.keys:
            record.space = space_of(http.headers.get("X-Chat-Space", ""))
        return client_at(http.remote)

    def check_operator(self, http: web.Request, act: str):
        """Refuse clients that may not load, unload, download, delete and export models. `act` says what they
        may not do.

        If a key has a role, keys with role=admin may. If none has, keys that are not limited to some models
        may. Without keys only this machine may. No page of another origin may, unless --cors-origin admits
        it, not even with a GET."""
        self.check_origin(http, works=True)
        if any(key.role for key in self.settings.keys) and REQUEST_LOG.get().role != "admin":
            raise RequestError(f"only an API key with role=admin may {act}", status=403, code="not_admin")
        if self.settings.keys and REQUEST_LOG.get().bound:
            raise RequestError(f"an API key that is limited to some models may not {act}",
                               status=403, code="key_bound_to_models")
        if not self.settings.keys:
            self.check_local(http, act)

    def usable_tools(self, http: web.Request) -> Seq[str]:
        """The tools that this client may use: names of tool servers, SERVER.TOOL, or "*" for all.

        A key has those of its field tools=. Without keys, only this machine may use tools, and of pages only
        the server's own: --cors-origin does not count, since tools act on this machine."""
        if self.settings.keys:
            return REQUEST_LOG.get().tools
        if self.is_of_another_page(http, works=True):
            raise RequestError("pages of another origin may not use tools of a server without API keys",
                               status=403, code="origin_not_allowed")
        self.check_local(http, "use tools")
        return ("*",)

    def check_local(self, http: web.Request, act: str):
        """Refuse all but programs of this machine, and pages that it opened under a name of its own.

        A page can make its own name resolve to this machine. Then the browser takes the server for a part of
        that page, and asks it from here: only the Host header tells."""
        if not is_from_here(http):
            raise RequestError(f"without API keys, only this machine may {act} (--api-key-file)", status=403,
                               code="not_local")
        name, _ = split_address(http.headers.get("Host", "localhost"))
        if name not in self.settings.allowed_host and not is_own_name(name):
            raise RequestError(f"without API keys, only this machine may {act}, under localhost, its own "
                               f"name or its own address: {shown(name)} is none of them (--allowed-host adds "
                               "names)", status=403, code="host_not_allowed")

    def check_host(self, http: web.Request):
        """Check the Host header, because a foreign page can make its own name resolve to this server's
        address.

        A server on loopback accepts only names of this machine. One with --allowed-host accepts no other
        public names."""
        name, _ = split_address(http.headers.get("Host", "localhost"))
        if is_loopback(name) or name in self.settings.allowed_host:
            return
        if is_loopback(self.settings.host) or self.settings.allowed_host and is_public_name(name):
            raise RequestError(f"this server does not answer to the name {shown(name)} (--allowed-host)",
                               status=403, code="host_not_allowed")

    def cors_headers(self, http: web.Request) -> dict[str, str]:
        """Headers that let a page of another origin read the response, if --cors-origin names that origin."""
        allowed = self.settings.cors_origin
        origin = http.headers.get("Origin")
        if origin is None or not origin.isascii() or not {origin, "*"} & set(allowed):
            return {"Vary": "Origin"} if allowed else {}
        return {"Access-Control-Allow-Origin": origin, "Vary": "Origin",
                "Access-Control-Expose-Headers": ", ".join((
                    "X-Request-Id", "Retry-After", "X-Ignored-Tools", "X-Ignored-Fields", "X-Over-Budget"))}

    def is_own(self, http: web.Request, origin: str) -> bool:
        """Whether this Origin is the server's own: the address in the Host header, or an --allowed-host.

        Ignores the scheme, because a proxy may have terminated TLS."""
        scheme, _, address = origin.partition("://")
        if scheme not in ("http", "https"):
            return False
        name, port = split_address(address)
        if name in self.settings.allowed_host and not port:
            return True
        return (name, port) == split_address(http.headers.get("Host", ""))

    def is_of_another_page(self, http: web.Request, works: bool) -> bool:
        """Whether a page of another origin sends this request. works: it makes the server work; a browser
        that sends no Origin with it may still say that it comes from elsewhere."""
        origin = http.headers.get("Origin")
        site = http.headers.get("Sec-Fetch-Site", "none")
        is_foreign = origin is not None and not self.is_own(http, origin)
        return is_foreign or works and site not in ("none", "same-origin")

    def check_origin(self, http: web.Request, works: bool = False):
        """Refuse pages of other origins. A page that cannot read a response can still post a request, and so
        make the server work. works: this GET makes the server work too.

        Browsers send Origin with every post, but Sec-Fetch-Site only to addresses that they trust."""
        if self.is_of_another_page(http, works or http.method not in ("GET", "HEAD")):
            self.check_admitted(http)

    def check_admitted(self, http: web.Request):
        if "Access-Control-Allow-Origin" not in self.cors_headers(http):
            raise RequestError("pages of this origin may not use the server (--cors-origin allows them; "
                               "if it is the server's own, a proxy is not passing on the Host header)",
                               status=403, code="origin_not_allowed")

    def preflight(self, http: web.Request) -> web.Response:
        """Tell a browser whether a page may send its request. A preflight carries no key and needs none."""
        self.check_admitted(http)
        wanted = http.headers.get("Access-Control-Request-Headers", "Authorization, Content-Type")
        return web.Response(status=204, headers={
            "Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Max-Age": "600",
            "Access-Control-Allow-Headers": re.sub(r"[^A-Za-z0-9_, -]", "", wanted),
            "Access-Control-Allow-Private-Network": "true"})

    async def guard(self, http: web.Request, handler: Callable) -> web.StreamResponse:
        self.check_host(http)
        if http.method == "OPTIONS" and "Access-Control-Request-Method" in http.headers:
            return self.preflight(http)
        self.check_origin(http)
        record = REQUEST_LOG.get()
        record.client = self.client_of(http)
        if record.route.operator_act:
            self.check_operator(http, record.route.operator_act)
        return await handler(http)

    async def set_headers(self, http: web.Request, response: web.StreamResponse):
        policy = response.headers.get(POLICY, SECURITY_HEADERS[POLICY])  # a file may have its own
        response.headers.update(SECURITY_HEADERS | {POLICY: policy} | self.cors_headers(http)
                                | REQUEST_LOG.get().headers)
        if "Cache-Control" not in response.headers:
            is_read = http.method in ("GET", "HEAD")  # no-cache: browsers ask again, cheaply, by the ETag
            response.headers["Cache-Control"] = "no-cache" if is_read else "no-store"


class Owners:
    """Names the owners of what requests leave in the server: answers, texts in the store, and KV pages."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def of_answer(self, request_id: str, client: str) -> str:
        """The owner of an answer: the client's key, or the owner= of several keys.

        Without keys, an answer whose id cannot be guessed belongs to whoever knows the id (""). Any other
        belongs to the client's address, although a phone's address changes with the network."""
        if not self.settings.keys:
            return "" if is_unguessable(request_id) else client
        named = self.named(client)
        return f"owner {named}" if named else f"key {client}"

    def named(self, client: str) -> str:
        """The owner= of a client's key, "" without it."""
        return next((key.owner for key in self.settings.keys if key.name == client), "")

    def of_texts(self, client: str, space: str = "") -> str:
        """The owner of what a client leaves in the store: its key's owner=, else a hash of its key; without
        keys its space, else its address after an @."""
        if not self.settings.keys:
            return space or f"@{client}"
        named = self.named(client)
        return f"owner {named}" if named else self.of_key(client)

    def of_key(self, client: str) -> str:
        """The owner of what a key leaves in the store while it has no owner=."""
        return f"key {self._digest(client, b'texts')}"

    def client_of(self, owner: str, maker: str = "") -> str | None:
        """The client whose texts have this owner: `maker`, if that is one of them; None if the server has no
        such key any more."""
        if owner.startswith(FOLDER):
            return FOLDERS_CLIENT
        if not self.settings.keys:
            if owner.startswith(SPACE):
                return maker
            return owner[1:] if owner[:1] == "@" else None
        names = [key.name for key in self.settings.keys if self.of_texts(key.name) == owner]
        return maker if maker in names else next(iter(names), None)

    @property
    def renamed(self) -> list[tuple[str, str]]:
        """Of each key with owner=: the owner that its texts had before, and the one that they have now."""
        names = {key.name for key in self.settings.keys if key.owner}
        return [(self.of_key(name), self.of_texts(name)) for name in sorted(names)]

    def of_pages(self, client: str) -> str:
        """The owner of a client's KV pages and checked grammars. Clients with the same owner share them; with
        --share-prefixes all keys have the same.

        It is a hash of the key, not its name: pages may live longer than a name belongs to one key."""
        if not self.settings.keys or self.settings.share_prefixes:
            return ""
        return self._digest(client, b"pages")

    def _digest(self, client: str, purpose: bytes) -> str:
        keys = sorted(key.digest for key in self.settings.keys if key.name == client)
        return hashlib.blake2b(b"".join(keys), digest_size=16, person=purpose).hexdigest()


class AccessLog:
    """A middleware that logs one line per request."""

    def __init__(self, routes: RouteTable, is_id_in_use: Callable[[str], bool], metrics: Metrics):
        self.routes = routes
        self.is_id_in_use = is_id_in_use
        self.metrics = metrics

    async def log(self, http: web.Request, handler: Callable) -> web.StreamResponse:
        """Log one line per request; polls and the page's files only at level debug."""
        began_s = time.monotonic()
        status = 499  # the client left before the response
        request_id = id_of_client(http.headers.get("X-Request-Id", ""))
        if not request_id or self.is_id_in_use(request_id):
            request_id = secrets.token_hex(16)
        route = self.routes.row_of(http)
        record = RequestLog(request_id, client_at(http.remote), route, route.api_for(http.headers))
        REQUEST_LOG.set(record)
        try:
            response = await handler(http)
            status = response.status
            if not response.prepared:
                response.headers["X-Request-Id"] = record.id
            return response
        finally:
            ms = 1000 * (time.monotonic() - began_s)
            path = http.rel_url.raw_path[:200]  # without the query, which may hold secrets
            quiet = route.polled and status not in (401, 403) or route.quiet and status < 400
            log.log(logging.DEBUG if quiet else logging.INFO, "%s %s %d %.0f ms %s [%s %s]",
                    http.method, path, status, ms, record.note, record.client or "-", record.id,
                    extra={"fields": {"method": http.method, "path": path, "status": status,
                                      "ms": round(ms, 1), "client": record.client, "id": record.id,
                                      **record.counts}})
            self.metrics.responses[route.pattern, status] += 1


def network_of(address: str) -> str:
    """The network whose connections are counted together: an IPv4 address, or the IPv6 /64 that a client has.

    "" for this machine, since a local proxy forwards everyone's connections."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip  # an IPv4 client of a listener on ::
    if ip.is_loopback:
        return ""
    return str(ip if ip.version == 4 else ipaddress.ip_network((ip, 64), strict=False))


def is_from_here(http: web.Request) -> bool:
    """Whether a program of this machine asks, and not as a proxy for others."""
    forwarded = any(name in http.headers for name in ("X-Forwarded-For", "Forwarded", "X-Real-IP"))
    return not forwarded and not network_of(http.remote or "::1")


def client_at(address: str | None) -> str:
    """The name of a client without a key: its network, so that requests are counted as connections are."""
    if not address:
        return ""
    return network_of(address) or address


def listen_on(host: str, port: int) -> socket.socket:
    """A listening socket, opened before any model loads; ConfigError if the address is unavailable."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} on {host} is already in use; choose another with --port, "
                              "or stop the program that uses it") from None
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror or error}") from None
    except (TypeError, ValueError) as error:  # a name that IDNA cannot encode, or with a NUL
        raise ConfigError(f"cannot listen on {host}: {error}") from None


def server_urls(host: str, port: int) -> list[str]:
    """The server's URLs; if it listens on all interfaces, the local one and the one on the network."""
    if host not in ("", "0.0.0.0", "::"):
        return [f"http://{f'[{host}]' if ':' in host else host}:{port}"]
    urls = [f"http://127.0.0.1:{port}"]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing, only picks the interface
        urls.append(f"http://{probe.getsockname()[0]}:{port}")
    return urls
