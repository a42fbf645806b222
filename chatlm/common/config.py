"""Flags, limits, `Settings`, and API keys."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from chatlm.common.errors import ConfigError, shown


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


def with_own_sampling(settings: Settings, pool) -> Settings:
    own, origin = pool.own_sampling
    return replace(settings, own_sampling=own, own_origin=origin)


PING_S = 10.0   # a silent stream carries a comment this often
