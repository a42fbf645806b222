"""The errors that users see, the wording they share, and libraries that may be missing."""

from __future__ import annotations

import difflib
import errno
import importlib
import importlib.util
import json
import os
import re
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

from chatlm.common.invocation import install_advice
from chatlm.common.memory import available_memory


class ChatServerError(Exception):
    """Base of the four errors below; `status` is the HTTP status of the response."""

    status = 500
    type = "server_error"
    code: str | None = None
    param: str | None = None
    words: Mapping[str, str] = {}  # API -> its text as clients of that API look for it

    def said_to(self, api: str) -> str:
        """The text for clients of an API, see chatlm/common/client_words.py."""
        return self.words.get(api, str(self))


class RequestError(ChatServerError):
    """The client's fault: a 4xx status, a machine-readable code, and the name of the invalid parameter."""

    type = "invalid_request_error"

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None,
                 words: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.words = words or {}


# Characters that move a terminal's cursor, change its colours, the text direction or the line breaks, and
# surrogates: bytes of file names that are not UTF-8
UNSEEN = (r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069"
          r"\ufeff\ud800-\udfff]")


def visible(text: str) -> str:
    """Text that may be partly untrusted, such as a file name, for a terminal or a log: control characters are
    shown as escapes, except tabs and line ends."""
    return re.sub(UNSEEN, lambda found: ascii(found[0])[1:-1], text)


def printable(text: str) -> str:
    """Text from a file or a library, on one line that a terminal can show; very long names are cut."""
    if len(text) > 1 << 16:  # the reason follows the long name
        text = text[:1 << 15] + text[-1 << 15:]
    line = visible(re.sub(r"[\t-\r\x1c-\x1f\x85]+", " ", text))
    return re.sub(r"([^\s/]{200})[^\s/]+", r"\1...", line)[:4000]


class ConfigError(ChatServerError):
    """The operator's fault: one clear line on stderr, exit status 2, no traceback."""

    type = "config_error"

    def __init__(self, message: str):
        super().__init__(printable(message))


class Overloaded(ChatServerError):
    """No capacity now: 503, or 429 for one client's own limits, with Retry-After."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1, status: int = 503,
                 words: Mapping[str, str] | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.status = status
        self.words = words or {}
        if status == 429:
            self.type = "rate_limit_error"
            self.code = "rate_limit_exceeded"


class EngineFailure(ChatServerError):
    """Our fault: a worker died or broke, and the answer could not continue."""

    code = "engine_failure"


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The words "; did you mean X?", or nothing if no known word is close."""
    near = nearest(word, known)
    return "" if near is None else f"; did you mean {prefix}{near}?"


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is closest to this one; None if no word is close."""
    return next(iter(difflib.get_close_matches(word, list(known), 1)), None)


def error_text(error: BaseException) -> str:
    """An exception in words, with its type where the text alone is unclear, as for a KeyError."""
    says_enough = type(error) in (Exception, ValueError, RuntimeError)
    return f"{'' if says_enough else type(error).__name__}: {error}".strip(": ")


def public_text(error: BaseException) -> str:
    """What a client may be told of an exception: the text of one of ours, else only its kind.

    Texts of libraries have URLs with tokens in them, names of this machine, or what others have sent. They
    are for the log, and for `error_text` where only the operator reads."""
    if isinstance(error, ChatServerError):
        return str(error)
    if isinstance(error, OSError) and isinstance(error.errno, int) and error.errno > 0:
        return os.strerror(error.errno)
    return f"{type(error).__name__}; the server's log has the details"


def line_of(error: BaseException) -> str:
    """The file and line that raised the error."""
    *_, frame = traceback.extract_tb(error.__traceback__)
    return f"{os.path.basename(frame.filename)}:{frame.lineno}"


# what may follow a host in a URL: a query, which may have a token in it. The first group stays
SECRET_OF_URL = r"(\b[A-Za-z][A-Za-z0-9+.-]{0,30}://)[^\s/@'\"<>]*@|(?<=[\w/])\?[\w.~%-]+=[^\s'\"<>)]*"


def without_folders(text: str) -> str:
    """Text for clients: paths of this machine are shortened to their last part, and URLs lose passwords and
    queries."""
    text = re.sub(SECRET_OF_URL, lambda found: found[1] or "", text)
    return re.sub(r"(?<![\w:/])~?(?:/[^/\s:;,'\"()]+)*/([^/\s:;,'\"()]+)", r"\1", text)


def require_folder(flag: str, folder: Path):
    """ConfigError unless a flag names a folder."""
    if not folder.is_dir():
        what = "not a folder" if folder.exists() else "there is no such folder"
        raise ConfigError(f"{flag}: {what}")


def shown(value) -> str:
    """A value from a client or a file, for an error text: short and on one line."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


PACKAGES = ("aiohttp", "numpy", "gguf", "jinja2", "tokenizers")  # a GGUF file may need these


def require_library(name: str, purpose: str):
    """Import `name`, or raise a ConfigError whose pip line lists everything that is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = str(error).rpartition("Original error was:")[2].strip()  # after numpy's page of advice
        raise lack_of_memory(error) or lack_of_library(name.split(".")[0], purpose, reason) from None


def check_library(name: str, purpose: str):
    """As `require_library`, without importing it: what takes long must not come before this error."""
    if importlib.util.find_spec(name) is None:
        raise lack_of_library(name, purpose, f"No module named {name!r}")


def lack_of_library(name: str, purpose: str, reason: str) -> ConfigError:
    missing = [name]
    if name in (*PACKAGES, "tiktoken") and not purpose.startswith("--"):
        missing += [package for package in PACKAGES
                    if package not in missing and importlib.util.find_spec(package) is None]
    noun = "package" if len(missing) == 1 else "packages"
    return ConfigError(f"{purpose} needs the Python {noun} {', '.join(missing)} ({reason}); "
                       f"{install_advice(*missing)}")


def cannot_read(path: Path | str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or str(error).replace(str(path), "").strip(" :'\"")
    return lack_of_memory(error) or ConfigError(f"cannot read {path}: {reason}")


def lack_of_memory(error: BaseException) -> ConfigError | None:
    """The operator's message for an exception that means "out of memory"; None for any other.

    Python (a SystemError if it cannot even say that), the system, torch, C++ and the dynamic loader each word
    it differently."""
    words = r"(allocate|out of|enough) memory|bad_alloc|map segment|start new thread|temporarily unavailable"
    if isinstance(error, ChatServerError) or not (
            isinstance(error, (MemoryError, SystemError)) or getattr(error, "errno", None) == errno.ENOMEM
            or re.search(words, str(error), re.IGNORECASE)):
        return None
    reason = error_text(error).splitlines()[0]
    free = available_memory() >> 20
    return ConfigError(f"not enough memory ({reason}): {free:,} MiB are free within this process's limits "
                       "(ulimit -v, cgroup). Raise them, or choose a smaller model, --context-length, "
                       "--kv-cache-memory or, on a GPU, --gpu-memory-utilization")


class RanksFailed(Exception):
    """The ranks of this replica can no longer work together."""


def invalid(name: str, message: str) -> RequestError:
    return RequestError(message, code="invalid_value", param=name)


def bad_value(name: str, value, allowed: str) -> RequestError:
    return invalid(name, f"{name} must be {allowed}, not {shown(value)}")
