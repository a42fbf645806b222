"""Processes started by torchrun: how they connect. `launch` says whether this is one."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import ConfigError
from chatlm.common.log import log
from chatlm.common.messages.wire import Channel, Pipe, wire_message
from chatlm.common.processes.connect import Listener, address_towards, dial, listen
from chatlm.common.processes.start import (
    PROCESS_COMMAND, PROGRAM, exit_in_words, process_environment, threads_per_worker)
from chatlm.common.program import program_digest

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.processes.launch import Torchrun


@wire_message(1 << 10)
class RankArrival:
    """The first message from a rank started by torchrun to rank 0: its location."""

    rank: int
    host: str
    local_rank: int
    threads: int
    before: int | None = None  # see RankConfig
    after: int | None = None

    def __post_init__(self):
        if {*map(type, (self.rank, self.local_rank, self.threads))} != {int}:
            raise TypeError("not all of rank, local_rank and threads are integers")


ARRIVAL_PIPE = Pipe(RankArrival)  # until the RankConfig; then it is a RANK_PIPE


class RankStore:
    """torchrun's store, where the ranks of a replica find each other. `life` counts the workers so far: each
    has its own keys and a new secret."""

    def __init__(self):
        distributed = importlib.import_module("torch.distributed")
        host = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
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
        return json.loads(self.store.get(key) if self.store.check([key]) else "null")

    def wait(self, life: int, look: Callable[[], Any], say: Callable[[], Any] = lambda: None):
        """The first result of `look`, which may wait a moment, that is not None. EOFError if another life
        has begun."""
        while (result := look()) is None:
            if self.life != life:
                raise EOFError("rank 0 has ended")
            say()
            time.sleep(0.05)  # a store cannot wait for one of two keys
        return result


def same_on_all_nodes(settings: Settings) -> str:
    version = program_digest()[:8]
    return (f"--tp {settings.tensor_parallel_size} --pp {settings.pipeline_parallel_size} and "
            f"version {version} of chat_server")


def serve_rank(settings: Settings, start: Torchrun) -> int:
    """Run one rank (not rank 0) in a process that torchrun started: compute for one worker after another,
    each time in a new process, until the front ends. Returns the front's exit status."""
    life = 0
    problem = None
    if os.environ.get("GROUP_RANK") == "0":  # torchrun also signals the front, which ends after its answers
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, signal.SIG_IGN)
    try:
        store = RankStore()
        again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        over = store.look("over") if again else None  # the previous front's, which may have ended
        while (ended := store.look("over")) == over:
            coming = store.life
            if coming != life and store.look(f"{coming}/0"):
                try:
                    live_as_rank(settings, start, store, coming)
                    life = coming
                    problem = None
                except (EOFError, OSError) as error:  # rank 0 may have ended: wait for the next one
                    if problem != str(error):
                        problem = str(error)
                        log.warning("rank %d cannot reach the others: %s", start.rank, problem)
            time.sleep(0.2)
        return ended[1]
    except RuntimeError as error:
        log.error("torchrun's store on %s:%d is gone, so the node of rank 0 is too: %s", start.master_addr,
                  start.master_port, str(error).splitlines()[0])
        return 1


def live_as_rank(settings: Settings, start: Torchrun, store: RankStore, life: int):
    """Connect to rank 0 and the stages before and after, and compute in another process until it ends."""
    rank = start.rank
    host, port, secret, theirs = store.look(f"{life}/0")
    own = same_on_all_nodes(settings)
    if theirs != own:
        raise ConfigError(f"rank 0 has {theirs}, but rank {rank} has {own}: all nodes need the same")
    secret = bytes.fromhex(secret)
    next_rank = rank + settings.tensor_parallel_size
    before = None
    after = None
    with contextlib.ExitStack() as stack:
        if rank >= settings.tensor_parallel_size:
            with listen(address_towards(host, port)) as server, Listener(server, secret) as listener:
                store.put(f"{life}/{rank}", server.getsockname()[:2])
                before, _ = store.wait(life, lambda: listener.accept(0.2))
                stack.enter_context(before)
        if next_rank < start.world_size:
            address = store.wait(life, lambda: store.look(f"{life}/{next_rank}"))
            after = stack.enter_context(dial(address[0], address[1], secret))
        connection = stack.enter_context(dial(host, port, secret))
        stages = [link and link.fileno() for link in (before, after)]
        threads = threads_per_worker(start.local_world_size)
        arrival = RankArrival(rank, socket.gethostname(), start.local_rank, threads, *stages)
        Channel(connection, ARRIVAL_PIPE).send(arrival)
        process = subprocess.Popen(
            [*PROCESS_COMMAND, "rank", str(connection.fileno()), str(os.getpid())], stdin=subprocess.DEVNULL,
            pass_fds=[connection.fileno(), *(end for end in stages if end is not None), *PROGRAM],
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
