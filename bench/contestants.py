"""The programs that bench/compare.py compares: how each is started, and what it costs while it serves.

A contestant is a frozen description. `Server` is one that runs, started by bench/servers.py; OthersServer is one
that somebody else has started.
"""

import argparse
import contextlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

import servers

ROOT = Path(__file__).resolve().parent.parent
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
        raise argparse.ArgumentTypeError(f"it must be NAME=http://127.0.0.1:PORT[,MODEL], not {text!r}")
    return name, url.rstrip("/"), served_name


def with_values(flags):
    """llama-bench needs a value after each flag that a server takes without one."""
    following = [*flags[1:], "-"]
    return [word for flag, after in zip(flags, following)
            for word in ((flag, "1") if flag.startswith("-") and after.startswith("-") else (flag,))]


class Server(servers.Server):
    """One contestant that this program starts."""

    def __init__(self, contestant, model, layout, environment, extra=()):
        port = servers.free_port()
        command = [*contestant.command(model, port, layout), *(extra if contestant.ours else ())]
        super().__init__(command, contestant.name, port=port, env=environment | contestant.environment())
        self.contestant = contestant
        self.model = model

    def kv_capacity(self):
        """How many tokens its key-value cache holds, as it reports."""
        if self.contestant.ours:
            return 16 * sum(worker["kv_pages_total"] for worker in self.get("/stats")["workers"])
        said = self.get("/props")
        return said["default_generation_settings"]["n_ctx"] * said["total_slots"]

    def proportional_set_size(self):
        """MB (10**6 bytes) of its processes; shared memory is divided among the sharers."""
        if sys.platform != "linux":         # there it is what no other process shares
            return sum(process.memory_full_info().uss for process in self.processes()) / 1e6
        texts = [Path(f"/proc/{process.pid}/smaps_rollup").read_text() for process in self.processes()]
        return sum(int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1]) for text in texts) * 1024 / 1e6

    def terminate(self):
        self.process.terminate()


class OthersServer:
    """A contestant that runs already and goes on running."""

    def __init__(self, contestant, model):
        self.contestant = contestant
        self.model = model
        self.url = contestant.url
        port = urlsplit(self.url).port
        listeners = [connection.pid for connection in psutil.net_connections("tcp")
                     if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port]
        self.pid = listeners[0] if listeners else None

    def wait_until_ready(self, limit_s):
        if self.pid is None:
            raise servers.NotReady(f"{self.contestant.name}: nothing that this user may see listens at {self.url}")

    def processor_s(self):
        """Processor seconds of the process that listens and of those that it started, so far."""
        process = psutil.Process(self.pid)
        total_s = 0.0
        for each in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total_s += sum(each.cpu_times()[:4])
        return total_s

    def terminate(self):
        pass

    def stop(self, limit_s=0.0):
        pass


def server_of(contestant, model, layout, environment, extra=()):
    if isinstance(contestant, Running):
        return OthersServer(contestant, model)
    return Server(contestant, model, layout, environment, extra)
