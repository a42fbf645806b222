"""The Ray process: starts workers on a cluster and reports their state to the front."""

from __future__ import annotations

import importlib
import logging
import os
import time
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Any, TYPE_CHECKING

from chatlm.common.contents import own_contents
from chatlm.common.errors import error_text, require_library
from chatlm.common.messages.protocol import (
    RAY_PIPE, ActorAddress, ActorEnded, EndActor, Node, Nodes, StartActor, Unusable)
from chatlm.common.messages.wire import BadMessage
from chatlm.common.processes.child import join_parent
from chatlm.common.processes.start import CALM_THREADS, PROCESS_CODE, exit_in_words
from chatlm.common.program import program_bytes

if TYPE_CHECKING:
    from chatlm.common.messages.wire import Channel


def replica_actor() -> type:
    """The actors' class. Ray sends it by value, so that a node needs Ray and the model's libraries, but no
    copy of the program: hence the imports inside."""
    calm = dict(CALM_THREADS)

    class Replica:
        def __init__(self, program: bytes, code: str, tls: str):
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
            import ray  # pyright: ignore[reportMissingImports]  on nodes of Ray
            self.host = getattr(ray, "util").get_node_ip_address()
            home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
            # one folder per version, reused: a killed actor could not remove its own
            folders = pathlib.Path(home, "chat_server", "ray").expanduser()
            folder = folders / hashlib.sha256(program).hexdigest()[:16]
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(OSError):  # another actor may be removing it
                for old in folders.iterdir():
                    if old != folder and old.stat().st_mtime < time.time() - 7 * 86400:
                        shutil.rmtree(old, ignore_errors=True)
            path = folder / "chatlm.pyz"
            part = folder / str(os.getpid())
            part.write_bytes(program)
            part.replace(path)
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, str(path), "worker", f"{self.host},{tls}", str(os.getpid())],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, env=calm | os.environ,
                start_new_session=True)
            assert self.process.stdout
            self.port, self.secret = json.loads(self.process.stdout.readline())

            def end():  # nothing else ends a detached actor
                self.process.wait()
                time.sleep(5)
                os._exit(0)
            threading.Thread(target=end, daemon=True).start()

        def address(self) -> list:
            return [self.host, self.port, self.secret]

        def wait(self) -> int:
            return self.process.wait()
    return Replica


def ray_main(arguments: Seq[str]) -> int:
    """The role `ray FD PARENT`: start workers on a Ray cluster and report their state to the front.

    It is a process of its own because Ray ends processes that have lost the cluster's head; the front and its
    connections must outlive that. The actors are detached for the same reason, and end with their workers."""
    channel = join_parent(arguments, RAY_PIPE)
    [config] = channel.receive(wait=True, most=1)
    try:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray = require_library("ray", "--ray-address")
        ray.init(config.address, namespace="chat_server", log_to_driver=False, logging_level=logging.ERROR)
        RayCluster(ray, channel, config.tls).run()
    except Exception as error:
        with suppress(OSError):  # the front itself may be gone
            reason = str(error).strip() or error_text(error)
            channel.send(Unusable(f"--ray-address {config.address}: {reason}"))
    return 1


class RayCluster:
    """In the Ray process: carries out the front's requests to the cluster."""

    def __init__(self, ray, channel: Channel, tls: str):
        self.ray = ray
        self.channel = channel
        self.tls = tls
        self.listed_s = 0.0
        self.strategies = importlib.import_module("ray.util.scheduling_strategies")
        model = own_contents().model
        start = model.size if model else 0
        self.actor = ray.remote(replica_actor())
        self.program = ray.put(program_bytes(start))
        self.awaited: dict[Any, tuple[str, Any]] = {}  # reference -> name, the actor if it is the address

    def run(self):
        while True:
            for message in self.channel.receive(wait=False):
                self.obey(message)
            if time.monotonic() - self.listed_s > 1:
                self.list_nodes()
            if not self.awaited:
                self.channel.poll.poll(500)
                continue
            done, _ = self.ray.wait(list(self.awaited), timeout=0.2)
            for reference in done:
                self.report(reference, *self.awaited.pop(reference))

    def obey(self, message):
        match message:
            case StartActor(name, node, cpus, gpus):
                strategy = self.strategies.NodeAffinitySchedulingStrategy(node, soft=False)
                actor = self.actor.options(
                    num_cpus=cpus, num_gpus=gpus, scheduling_strategy=strategy, lifetime="detached",
                    name=name).remote(self.program, PROCESS_CODE, self.tls)
                self.awaited[actor.address.remote()] = name, actor
            case EndActor(name):
                self.awaited = {key: value for key, value in self.awaited.items() if value[0] != name}
                with suppress(Exception):  # it may have ended by itself
                    self.ray.kill(self.ray.get_actor(name))
            case _:
                raise BadMessage(f"unexpected message from the front: {type(message).__name__}")

    def report(self, reference, name: str, actor):
        try:
            value = self.ray.get(reference)
        except Exception as error:  # the actor has ended, with its node or by itself
            self.channel.send(ActorEnded(name, (str(error).strip() or error_text(error)).splitlines()[0]))
            return
        if actor:
            self.channel.send(ActorAddress(name, *value))
            self.awaited[actor.wait.remote()] = name, None
        else:
            self.channel.send(ActorEnded(name, exit_in_words(value)))

    def list_nodes(self):
        self.listed_s = time.monotonic()
        self.channel.send(Nodes([
            Node(node["NodeID"], node["NodeName"], node["Resources"].get("CPU", 0.0),
                 int(node["Resources"].get("GPU", 0))) for node in self.ray.nodes() if node["Alive"]]))
