"""Workers on the nodes of a Ray cluster."""

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
from typing import Any, NamedTuple, TYPE_CHECKING

from chatlm.common.config import ranks_per_replica
from chatlm.common.errors import ConfigError, public_text
from chatlm.common.log import log
from chatlm.common.messages.protocol import (
    RAY_PIPE, ActorAddress, ActorEnded, EndActor, Node, Nodes, RayConfig, StartActor, Unusable, WorkerConfig)
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.connect import TRANSIT_BYTES, proof, tls_context
from chatlm.common.processes.start import start_child
from chatlm.front.admission.sandbox import next_message
from chatlm.front.pool.local_devices import draft_terms
from chatlm.front.pool.worker import Worker, WorkerState

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import ModelSource
    from chatlm.front.pool.supervisor import Supervisor


MANY_THREADS = 1 << 10  # more than any node has: the worker uses all its cores


class NodeShare(NamedTuple):
    """A worker's share of a node."""

    node: Node
    cpus: float
    gpus: int
    threads: int  # at most


def node_shares(settings: Settings, nodes: Seq[Node]) -> tuple[int, list[NodeShare]]:
    """How many replicas are wanted, and the shares that the nodes offer, spread evenly over the nodes."""
    ranks = ranks_per_replica(settings)
    if settings.device_type in ("auto", "cuda") and any(node.gpus for node in nodes):
        wanted = 0 if settings.num_gpus in (None, "auto") else int(settings.num_gpus)
        by_node = [[NodeShare(node, 0.0, ranks, MANY_THREADS)] * (node.gpus // ranks) for node in nodes]
    else:
        nodes = [node for node in nodes if node.cpus >= ranks]
        wanted = settings.num_workers
        count = max(-(-wanted // max(len(nodes), 1)), 1)  # replicas per node
        by_node = []
        for node in nodes:
            threads = max(int(node.cpus) // (count * ranks), 1)
            by_node.append([NodeShare(node, node.cpus // count, 0, threads)] * count)
    shares = []
    for one_of_each_node in itertools.zip_longest(*by_node):
        shares += filter(None, one_of_each_node)
    return wanted or len(shares), shares


class RayActor:
    """A worker's process on a node, which is a Ray actor.

    The front talks to it over TCP, in the same messages that local workers get through a pipe. Before that,
    both sides prove that they know the actor's secret."""

    pid = None

    def __init__(self, share: NodeShare, tell: Callable[[Any], None]):
        """tell: sends a message to the Ray process."""
        self.request = StartActor(secrets.token_hex(16), share.node.id, share.cpus, share.gpus)
        self.tell = tell
        self.reason = ""  # why it ended; "": it has not
        self.address: asyncio.Future[ActorAddress] = asyncio.get_running_loop().create_future()
        self.writer: asyncio.StreamWriter | None = None

    async def connect(self, address: ActorAddress, tls: str | None) -> asyncio.StreamReader:
        context = tls_context(tls, False)
        reader, self.writer = await asyncio.open_connection(address.host, address.port, ssl=context)
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TRANSIT_BYTES)
        secret = bytes.fromhex(address.secret)
        nonce = secrets.token_bytes(32)
        nonces = await reader.readexactly(32) + nonce
        self.writer.write(nonce + proof(secret, "front", nonces))
        if not hmac.compare_digest(await reader.readexactly(32), proof(secret, "worker", nonces)):
            raise ConnectionError("it does not know the secret")
        return reader

    def poll(self) -> int | None:
        """None until it has ended, like `Popen.poll`."""
        return 1 if self.reason else None

    def kill(self):
        self.tell(EndActor(self.request.actor))
        self.note_end("its connection ended")

    def note_end(self, reason: str):
        """The actor has ended, or could not be started."""
        self.reason = self.reason or reason
        if not self.address.done():
            self.address.set_exception(ConnectionError(reason))
        elif self.writer:
            self.writer.transport.abort()

    def wait(self, timeout: float | None = None):
        """There is nothing to reap here."""


class RayNodes:
    """The placement on a Ray cluster: a worker for each share of a node. Workers come and go with the nodes.

    Ray runs in a separate process (`ray_main`). If that process ends, running workers continue, and workers
    without an actor wait until it is back."""

    CONNECT_S = 20.0
    RETRY_S = 5.0
    SILENT_S = 10.0
    source: ModelSource | None = None  # the nodes find the model
    renews = True

    def __init__(self, settings: Settings, command: Seq[str]):
        self.settings = settings
        self.command = command
        self.workers: list[Worker] = []
        self.shares: dict[Worker, NodeShare] = {}
        self.numbers = itertools.count()
        self.nodes: Seq[Node] | None = None  # None until Ray has listed them
        self.writer: asyncio.StreamWriter | None = None  # to the Ray process
        self.problem = ""   # with the Ray process
        self.heard_s = 0.0  # when it last listed the nodes

    async def start(self, supervisor: Supervisor):
        supervisor.run("talking to Ray", partial(self._follow, supervisor))

    async def open(self, worker: Worker) -> tuple[asyncio.StreamReader, WorkerConfig]:
        share = self.shares[worker]
        worker.become(WorkerState.AWAITING_NODE)
        worker.process = actor = RayActor(share, self.tell)
        worker.writer = None  # belonged to its previous process
        self.tell(actor.request)
        address = await actor.address
        worker.become(WorkerState.LOADING)
        try:
            reader = await asyncio.wait_for(actor.connect(address, self.settings.ray_tls), self.CONNECT_S)
        except (asyncio.IncompleteReadError, OSError, asyncio.TimeoutError) as error:
            actor.reason = f"no connection to {address.host}:{address.port}: {public_text(error)}"
            raise ConnectionError(actor.reason) from None
        worker.writer = actor.writer
        settings = replace(self.settings, keys=(), api_key=(), num_workers=1)
        return reader, WorkerConfig(settings, None, worker.device, share.threads,
                                    drafts=draft_terms(worker, self.renews, self.workers))

    def changed_source(self) -> None:
        """None: the nodes have the files (see `Supervisor.handle`)."""

    def is_gone(self) -> bool:
        return False

    def end_in_words(self, worker: Worker) -> str:
        return getattr(worker.process, "reason", "")

    def stats(self) -> dict:
        return {"ray": {"state": self.state, "nodes": [node.name for node in self.nodes or ()]}}

    @property
    def state(self) -> str:
        if self.heard_s and time.monotonic() - self.heard_s < self.SILENT_S and not self.problem:
            return "connected"
        return self.problem or ("its head does not answer" if self.heard_s else "connecting")

    def tell(self, message):
        """Send a message to the Ray process, if it runs. If not, the next one gets what still matters."""
        if self.writer:
            self.writer.write(RAY_PIPE.packed(message))

    def _actors(self) -> list[tuple[Worker, RayActor]]:
        return [(worker, worker.process) for worker in self.workers if isinstance(worker.process, RayActor)]

    async def _follow(self, supervisor: Supervisor):
        """Start one Ray process after another, and handle the messages of each until it ends."""
        while not supervisor.closing:
            process, ours = start_child(self.command, "ray", os.environ)
            try:
                reader, self.writer = await asyncio.open_connection(sock=ours)
                self.tell(RayConfig(self.settings.ray_address or "", self.settings.ray_tls or ""))
                for worker, actor in self._actors():
                    if worker.state is WorkerState.AWAITING_NODE:
                        self.tell(actor.request)
                with suppress(asyncio.IncompleteReadError, ConnectionError):
                    while True:
                        self._handle(await next_message(reader, RAY_PIPE), supervisor)
            finally:
                self.problem = self.problem or "its head does not answer"
                if self.writer:
                    self.writer.close()
                self.writer = None
                process.kill()
                await asyncio.to_thread(process.wait)
            log.error("Ray: %s; running replicas continue, new ones wait", self.problem)
            await asyncio.sleep(self.RETRY_S)

    def _handle(self, message, supervisor: Supervisor):
        """Handle a message from the Ray process."""
        actors = {actor.request.actor: actor for _, actor in self._actors()}
        match message:
            case Nodes(nodes):
                self.problem = ""
                self.heard_s = time.monotonic()
                if nodes != self.nodes:
                    self.nodes = nodes
                    self._match_nodes(nodes, supervisor)
            case ActorAddress(name):
                if name in actors and not actors[name].address.done():
                    actors[name].address.set_result(message)
                else:
                    self.tell(EndActor(name))
            case ActorEnded(name, reason):
                if name in actors:
                    actors[name].note_end(reason)
            case Unusable(text):
                self.problem = text
                if not self.heard_s:
                    supervisor.give_up(ConfigError(text))
                raise ConnectionError(text)
            case _:
                raise BadMessage(f"unexpected message from Ray's process: {type(message).__name__}")

    def _match_nodes(self, nodes: Seq[Node], supervisor: Supervisor):
        """Add a worker for each new share of a node, and drop the workers of nodes that have left."""
        alive = {node.id for node in nodes}
        for worker, share in list(self.shares.items()):
            if share.node.id not in alive:
                self.workers.remove(worker)
                del self.shares[worker]
                if isinstance(worker.process, RayActor):
                    worker.process.note_end("its node has left")
        taken = Counter(share.node.id for share in self.shares.values())
        wanted, shares = node_shares(self.settings, nodes)
        for share in shares:
            if len(self.workers) == wanted:
                break
            if taken[share.node.id]:
                taken[share.node.id] -= 1
                continue
            worker = Worker(self.settings, self, next(self.numbers), "cuda:0" if share.gpus else "cpu",
                            share.node.name)
            self.workers.append(worker)
            self.shares[worker] = share
            supervisor.run(f"running {worker.where}", partial(supervisor.keep_alive, worker))
        if not self.workers:
            supervisor.progress("waiting for a node of Ray's cluster", 0.0)
