"""The programs that bench/compare.py compares: how each is started, and what it costs while it serves.

A contestant is a frozen description. `Server` is one that runs: it knows its URL, its processes and the CPU
time and memory that they have taken.
"""

import asyncio
import contextlib
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import aiohttp
import psutil

ROOT = Path(__file__).resolve().parent.parent
START_LIMIT_S = 300      # vLLM compiles its model at its first start
STOP_LIMIT_S = 15
OURS = (sys.executable, str(ROOT / "chat_server.py"))


class Layout(NamedTuple):
    """Concurrent answers and tokens of context for each, which most rivals need to know at startup."""

    slots: int
    context: int
    bounded: bool = False       # ours gets the same limits; else its defaults, which are larger


@dataclass(frozen=True)
class Contestant:
    """A program that serves one model. `rival`: ratios are to the best of these."""

    name: str
    program: tuple[str, ...] = ()
    rival: bool = True

    ours = False
    serves = True       # else it is a llama-bench
    model_name = None   # what requests call the model; None: they don't name it

    def command(self, model, port, layout):
        raise NotImplementedError

    def environment(self):
        """Variables that it needs beside this process's."""
        return {}


@dataclass(frozen=True)
class ChatServer(Contestant):
    """This server, or an older version of it."""

    program: tuple[str, ...] = OURS
    rival: bool = False

    ours = True

    def command(self, model, port, layout):
        limits = ["--max-batch", str(layout.slots), "--context-length", str(layout.context)] if layout.bounded else []
        return [*self.program, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *limits]


@dataclass(frozen=True)
class LlamaServer(Contestant):
    """llama-server, also ik_llama.cpp's. Its cache of prompts is as large as our pages; its default of 8 GiB
    would fill the machine."""

    spin_count: str = ""

    def command(self, model, port, layout):
        return [*self.program, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-np", str(layout.slots),
                "-c", str(layout.slots * layout.context), "--cache-ram", "1024"]

    def environment(self):
        return {"GOMP_SPINCOUNT": self.spin_count} if self.spin_count else {}


@dataclass(frozen=True)
class LlamaBench(Contestant):
    """llama-bench, which computes without HTTP, template and sampling."""

    serves = False


@dataclass(frozen=True)
class Vllm(Contestant):
    """vLLM on the CPU, on a folder of its own, with all cores."""

    folder: str = ""

    model_name = "model"

    def command(self, model, port, layout):
        return [*self.program, "serve", self.folder, "--served-model-name", self.model_name, "--host", "127.0.0.1",
                "--port", str(port), "--max-num-seqs", str(layout.slots), "--max-model-len", str(layout.context)]

    def environment(self):
        return {"VLLM_TARGET_DEVICE": "cpu", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class OpenVino(Contestant):
    """OpenVINO GenAI, which is a library: bench/openvino_server.py serves it."""

    folder: str = ""

    def command(self, model, port, layout):
        return [*self.program, str(ROOT / "bench/openvino_server.py"), self.folder, "--port", str(port), "--slots", str(layout.slots)]


@dataclass(frozen=True)
class Running(Contestant):
    """A server that somebody else has started on this machine, with the model and limits that he chose."""

    url: str = ""
    served_name: str = ""

    @property
    def model_name(self):
        return self.served_name or None


def contestants(arguments):
    """The contestants that a command line names, ours first."""
    threads = arguments.threads
    found: list[Contestant] = [ChatServer("ours")]
    if arguments.before:
        found.append(ChatServer("before", tuple(arguments.before), rival=True))
    if binary := arguments.llama_server:
        found += [LlamaServer(f"llama-server -t {n}", (binary, "-t", str(n))) for n in threads]
        if len(threads) > 1:
            found.append(LlamaServer("llama-server, GOMP_SPINCOUNT=1000", (binary,), spin_count="1000"))
    if binary := arguments.ik_llama_server:
        found += [LlamaServer(f"ik_llama-server -t {n}", (binary, "-t", str(n), *arguments.ik_args)) for n in threads]
    if binary := arguments.ik_llama_bench:
        flags = with_values(arguments.ik_args)
        found += [LlamaBench(f"ik_llama-bench -t {n}", (binary, "-t", str(n), *flags)) for n in threads]
    if arguments.vllm:
        program, folder = arguments.vllm
        found.append(Vllm("vllm-cpu", (program,), folder=folder))
    if arguments.openvino:
        python, folder = arguments.openvino
        found.append(OpenVino("OpenVINO GenAI", (python,), folder=folder))
    for name, url, served_name in arguments.url:
        found.append(Running(name, url=url, served_name=served_name))
    return found


def running_server(text):
    """NAME=URL or NAME=URL,MODEL of a command line -> name, URL, name of the model."""
    name, equals, rest = text.partition("=")
    url, _, served_name = rest.partition(",")
    parts = urlsplit(url)
    if not (name and equals and parts.scheme == "http" and parts.hostname in ("127.0.0.1", "localhost") and parts.port):
        raise ValueError(f"NAME=http://127.0.0.1:PORT[,MODEL], not {text!r}")
    return name, url.rstrip("/"), served_name


def with_values(flags):
    """llama-bench needs a value after each flag that a server takes without one."""
    following = [*flags[1:], "-"]
    return [word for flag, after in zip(flags, following)
            for word in ((flag, "1") if flag.startswith("-") and after.startswith("-") else (flag,))]


def family(pid):
    """A process and its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_seconds(pid):
    """User and system time of a process and its descendants so far, with that of children that have ended."""
    seconds = 0.0
    for process in family(pid):
        with contextlib.suppress(psutil.NoSuchProcess):
            seconds += sum(process.cpu_times()[:4])
    return seconds


def proportional_set_size(pid):
    """MB (10**6 bytes) of a process and its descendants; shared memory is divided among the sharers."""
    if sys.platform != "linux":         # there it is what no other process shares
        return sum(process.memory_full_info().uss for process in family(pid)) / 1e6
    texts = [Path(f"/proc/{process.pid}/smaps_rollup").read_text() for process in family(pid)]
    return sum(int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1]) for text in texts) * 1024 / 1e6


def listener(port):
    """The process that listens on a port of this machine, or None."""
    found = [connection.pid for connection in psutil.net_connections("tcp")
             if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port]
    return found[0] if found else None


class Server:
    """One contestant that serves; `ready_s` counts from its command."""

    def __init__(self, contestant, model, layout, environment, extra=()):
        self.contestant = contestant
        self.model = model
        self.ready_s = None
        self.started = time.perf_counter()
        self.process = None
        self.log = tempfile.TemporaryFile()
        if isinstance(contestant, Running):
            self.command = [contestant.url]
            self.url = contestant.url
            self.pid = listener(urlsplit(self.url).port)
            return
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.command = [*contestant.command(model, port, layout), *(extra if contestant.ours else ())]
        self.process = subprocess.Popen(self.command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
                                        env=environment | contestant.environment())
        self.pid = self.process.pid

    @property
    def ended(self):
        return self.process is not None and self.process.poll() is not None

    async def ready(self, session):
        elapsed = 0.0
        while elapsed < START_LIMIT_S and not self.ended:
            elapsed = time.perf_counter() - self.started
            with contextlib.suppress(aiohttp.ClientError):
                async with session.get(f"{self.url}/health") as response:
                    if response.status in (200, 404):   # a server without the route has come up, too
                        self.ready_s = time.perf_counter() - self.started
                        return
            await asyncio.sleep(0.005)
        raise RuntimeError(f"not ready after {elapsed:.0f} s: {shlex.join(self.command)}\n{self.last_words()}")

    def last_words(self):
        self.log.seek(0)
        return self.log.read().decode("utf-8", "replace")[-3000:]

    def cpu_seconds(self):
        """What its processes have taken so far, or None where they are unknown."""
        return cpu_seconds(self.pid) if self.pid else None

    async def kv_capacity(self, session):
        """How many tokens its key-value cache holds, as it reports."""
        route = "/stats" if self.contestant.ours else "/props"
        async with session.get(self.url + route) as response:
            said = await response.json()
        if self.contestant.ours:
            return 16 * sum(worker["kv_pages_total"] for worker in said["workers"])
        return said["default_generation_settings"]["n_ctx"] * said["total_slots"]

    def terminate(self):
        if self.process is not None:
            self.process.terminate()

    def stop(self):
        self._stop_process()
        self.log.close()

    def _stop_process(self):
        if self.process is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            children = family(self.process.pid)[1:]
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_LIMIT_S)
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
