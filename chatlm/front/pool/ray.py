"""The pool whose workers Ray places on a cluster."""

from __future__ import annotations

import asyncio
import hmac
import itertools
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence as Seq
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from chatlm.common.config import ranks_per_replica
from chatlm.common.errors import ConfigError, named
from chatlm.common.log import log
from chatlm.common.messages.protocol import (
    RAY_PIPE, Gone, Nodes, Place, Placed, RayConfig, Release, Unusable, WorkerConfig)
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.connect import TRANSIT_BYTES, proof, tls_context
from chatlm.common.processes.start import start_child
from chatlm.front.admission.admission import next_message
from chatlm.front.pool.local import LocalPool
from chatlm.front.pool.worker import Worker

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import Node


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
