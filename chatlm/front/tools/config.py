"""The file of --mcp-config: the tool servers that may run, as Claude, Cursor and others write them."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence as Seq
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, urlsplit

from chatlm.common.errors import ConfigError, did_you_mean, shown
from chatlm.front.tools.rules import name_begin

FILE_BYTES = 1 << 20
SECRET_NAMES = r"key|token|secret|passw|auth|credential"
LEAST_SECRET = 6     # characters; what is shorter would be found in any text
SECRET_OF_PATH = 16  # of a part of a URL's path, where some servers have a token
LABEL_CHARACTERS = 64
MOST_SERVERS = 64
# What each field does, for the error that names a field which is not known
FIELDS = ("command", "args", "env", "cwd", "type", "transport", "url", "headers", "timeout_ms", "disabled",
          "alwaysAllow", "autoApprove", "trustReadOnly", "disabledTools", "description")
REFUSED_FIELDS = {
    "timeout": "programs read it as seconds or as milliseconds; write timeout_ms",
    "envFile": "put the variables into env",
    "sandbox": "this server has no sandbox for tools",
    "oauth": "this server does not sign in; put a token into headers",
}
STDIO_TYPES = ("stdio",)
HTTP_TYPES = ("http", "streamable-http", "streamableHttp")
# ${NAME}, ${NAME:-default}, ${env:NAME}, and any other word in braces, which is refused
A_VARIABLE = re.compile(r"\$\{([^{}]*)(\}?)")


@dataclass(frozen=True)
class ServerConfig:
    """One tool server: a program that is started here, or a URL that speaks streamable HTTP."""

    label: str
    command: tuple[str, ...] = ()  # the program and its arguments; () for a URL
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    timeout_s: float | None = None  # of a call; None: --tool-timeout
    allowed: frozenset[str] = frozenset()  # tools that run without asking; "*" stands for all
    trusts_read_only: bool = False  # so do those that say of themselves that they only read
    hidden: frozenset[str] = frozenset()  # tools that are not offered

    def without_secrets(self, text: str) -> str:
        """What is said of a failure, without what the file has as secrets: servers repeat URLs and headers
        in their errors, and programs their variables."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    @cached_property
    def secrets(self) -> Seq[str]:
        """Values of headers, the query and long parts of the path of the URL, and variables that are named
        like secrets. The longest first."""
        parts = urlsplit(self.url)
        found = [value for _, value in parse_qsl(parts.query)]
        found += [value for value in parts.path.split("/") if len(value) >= SECRET_OF_PATH]
        found += [word for value in self.headers.values() for word in (value, *value.split())]
        found += [value for name, value in self.env.items() if re.search(SECRET_NAMES, name, re.IGNORECASE)]
        spellings = {spelt for value in found for spelt in (value, quote(value), quote_plus(value))}
        return sorted((one for one in spellings if len(one) >= LEAST_SECRET), key=len, reverse=True)

    @property
    def warning(self) -> str:
        """What an operator should know about this server; "" if nothing."""
        program = Path(self.command[0]).name if self.command else ""
        if program in ("npx", "uvx", "pipx", "bunx"):
            return f"{program} runs whatever version the package's registry has today; pin a version"
        return ""


def read_mcp_config(path: str, environment: Mapping[str, str] = os.environ) -> tuple[ServerConfig, ...]:
    """Read the file of --mcp-config, without the servers that it has disabled.

    path: a JSON file with `mcpServers` or `servers`, which may have // comments. environment: the variables
    that ${NAME} reads. Raises ConfigError that names what is wrong, and never a value of env or headers."""
    place = f"--mcp-config {path}"
    try:
        with open(Path(path).expanduser(), "rb") as file:
            data = file.read(FILE_BYTES + 1)
        if len(data) > FILE_BYTES:
            raise ValueError(f"it has more than {FILE_BYTES:,} bytes")
        config = json.loads(without_comments(data.decode("utf-8-sig")), object_pairs_hook=unique_keys)
    except OSError as error:
        raise ConfigError(f"{place}: {error.strerror or error}") from None
    except (ValueError, RuntimeError, RecursionError) as error:
        raise ConfigError(f"{place}: not a JSON file: {error}") from None
    return tuple(configs_in(config, place, environment))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object. Raises ValueError for a key that it has twice."""
    members = dict(pairs)
    if len(members) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} is there twice")
    return members


def without_comments(text: str) -> str:
    """JSON text without its // comments; a // in a string stays."""
    return re.sub(r'("(?:[^"\\\n]|\\.)*")|//[^\n]*', lambda found: found[1] or "", text)


def configs_in(config: Any, place: str, environment: Mapping[str, str]) -> list[ServerConfig]:
    """The servers of a file's JSON value that are not disabled."""
    if not isinstance(config, dict):
        raise ConfigError(f'{place}: it must be an object such as {{"mcpServers": {{"NAME": {{..}}}}}}')
    other = [name for name in config if name not in ("mcpServers", "servers", "inputs", "$schema")]
    if other:
        raise ConfigError(f"{place}: there is no field {shown(other[0])}; the servers are in mcpServers "
                          "(or, as VS Code writes it, in servers)")
    tables = [config[name] for name in ("mcpServers", "servers") if name in config]
    if len(tables) != 1 or not isinstance(tables[0], dict):
        raise ConfigError(f"{place}: it must have mcpServers, an object with a member for each server")
    [table] = tables
    if len(table) > MOST_SERVERS:
        raise ConfigError(f"{place}: it has {len(table)} servers, at most {MOST_SERVERS} are allowed")
    configs = [ConfigReader(f"{place}: server {shown(label)}", environment).read(label, fields)
               for label, fields in table.items()]
    found = [one for one in configs if one is not None]
    check_names([one.label for one in found], place)
    return found


def check_names(labels: Seq[str], place: str):
    """Raise ConfigError if tools of two servers could have one name, for a model or in tools= of a key."""
    for first, second in combinations(labels, 2):
        for begin, what in ((name_begin, "for a model"), (pattern_begin, "in tools= of a key")):
            one, other = begin(first), begin(second)
            if one.startswith(other) or other.startswith(one):
                raise ConfigError(f"{place}: servers {shown(first)} and {shown(second)}: a tool of one could "
                                  f"have the same name {what} as a tool of the other; name one otherwise")


def pattern_begin(label: str) -> str:
    """What the names of all its tools begin with in --api-key-file."""
    return f"{label}."


class ConfigReader:
    """Reads one server of the file. Every error begins with `place`."""

    def __init__(self, place: str, environment: Mapping[str, str]):
        self.place = place
        self.environment = environment

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{self.place}: {text}")

    def read(self, label: str, fields: Any) -> ServerConfig | None:
        """The server with these fields; None if it is disabled."""
        if not label or len(label) > LABEL_CHARACTERS or not label.isprintable():
            raise self.error(f"a name has 1 to {LABEL_CHARACTERS} characters that can be shown")
        if not isinstance(fields, dict):
            raise self.error("it must be an object")
        self._check_names(fields)
        if self._truth(fields, "disabled"):
            return None
        kind = self._kind(fields)
        always = self._texts(fields, "alwaysAllow")
        approved = self._texts(fields, "autoApprove")
        common = {
            "label": label,
            "timeout_s": self._timeout(fields),
            "allowed": frozenset((*always, *approved)),
            "trusts_read_only": self._truth(fields, "trustReadOnly"),
            "hidden": frozenset(self._texts(fields, "disabledTools")),
        }
        if kind == "http":
            return ServerConfig(url=self._url(fields), headers=self._headers(fields), **common)
        command = self._filled("command", self._text(fields, "command"))
        if not command.strip():
            raise self.error("command is empty; it must be a program")
        arguments = [self._filled("args", text) for text in self._texts(fields, "args")]
        cwd = self._filled("cwd", self._text(fields, "cwd")) if "cwd" in fields else None
        return ServerConfig(command=(command, *arguments), env=self._variables(fields), cwd=cwd, **common)

    def _check_names(self, fields: Mapping[str, Any]):
        for name in fields:
            if name in REFUSED_FIELDS:
                raise self.error(f"{name} is not supported: {REFUSED_FIELDS[name]}")
            if name not in FIELDS:
                raise self.error(f"there is no field {shown(name)}{did_you_mean(name, FIELDS)} (there are "
                                 f"{', '.join(FIELDS)})")

    def _kind(self, fields: Mapping[str, Any]) -> str:
        """"stdio" or "http", from type or from the fields that are there."""
        kind = fields.get("type", fields.get("transport"))
        if kind == "sse":
            raise self.error("type sse is the transport of 2024, which MCP has given up; use the server's "
                             "URL for streamable HTTP, with type http")
        if kind is not None and kind not in (*STDIO_TYPES, *HTTP_TYPES):
            raise self.error(f"type is {shown(kind)}; it must be stdio or http")
        has_command = "command" in fields
        if has_command == ("url" in fields):
            raise self.error("it must have either command or url")
        if kind is not None and (kind in STDIO_TYPES) != has_command:
            raise self.error(f"type {kind} does not go with {'command' if has_command else 'url'}")
        unused = ("headers",) if has_command else ("args", "env", "cwd")
        for name in unused:
            if name in fields:
                raise self.error(f"{name} does not go with {'command' if has_command else 'url'}")
        return "stdio" if has_command else "http"

    def _url(self, fields: Mapping[str, Any]) -> str:
        url = self._filled("url", self._text(fields, "url"))
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise self.error("url must begin with http:// or https:// and name a host")
        if parts.username or parts.password:
            raise self.error("url must not have a password; put it into headers")
        return url

    def _headers(self, fields: Mapping[str, Any]) -> dict[str, str]:
        headers = self._pairs(fields, "headers")
        for name, value in headers.items():
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name):
                raise self.error(f"headers has a name that no header can have: {shown(name)}")
            if not value.isprintable():
                raise self.error(f"headers: the value of {name} has characters that no header can have")
        return headers

    def _variables(self, fields: Mapping[str, Any]) -> dict[str, str]:
        variables = self._pairs(fields, "env")
        for name, value in variables.items():
            if not name or "=" in name or "\0" in name + value:
                raise self.error(f"env: {shown(name)} can't be set: a name has no =, and nothing has a NUL")
        return variables

    def _timeout(self, fields: Mapping[str, Any]) -> float | None:
        if "timeout_ms" not in fields:
            return None
        number = fields["timeout_ms"]
        if type(number) not in (int, float) or not 1 <= number <= 3_600_000:
            raise self.error("timeout_ms must be a number from 1 to 3600000")
        return number / 1000

    def _truth(self, fields: Mapping[str, Any], name: str) -> bool:
        value = fields.get(name, False)
        if type(value) is not bool:
            raise self.error(f"{name} must be true or false")
        return value

    def _text(self, fields: Mapping[str, Any], name: str) -> str:
        value = fields[name]
        if not isinstance(value, str) or "\0" in value:
            raise self.error(f"{name} must be a text")
        return value

    def _texts(self, fields: Mapping[str, Any], name: str) -> list[str]:
        values = fields.get(name, [])
        if not isinstance(values, list) or not all(
                isinstance(value, str) and "\0" not in value for value in values):
            raise self.error(f"{name} must be a list of texts")
        return values

    def _pairs(self, fields: Mapping[str, Any], name: str) -> dict[str, str]:
        pairs = fields.get(name, {})
        if not isinstance(pairs, dict) or not all(isinstance(value, str) for value in pairs.values()):
            raise self.error(f"{name} must be an object whose values are texts")
        return {key: self._filled(f"{name} {key}", value) for key, value in pairs.items()}

    def _filled(self, name: str, text: str) -> str:
        """The text with its variables. An error names the variable, never the text."""
        def value(found: re.Match) -> str:
            if not found[2]:
                raise self.error(f"{name} has ${{{found[1][:60]}, without the }} that ends it; a default can "
                                 "have no braces")
            word = found[1].removeprefix("env:")
            variable, has_default, default = word.partition(":-")
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
                raise self.error(f"{name} has ${{{word[:60]}}}, which this server can't fill in; ${{NAME}} "
                                 "is an environment variable")
            if variable in self.environment:
                return self.environment[variable]
            if not has_default:
                raise self.error(f"{name} needs the environment variable {variable}, which is not set")
            return default

        return A_VARIABLE.sub(value, text)
