"""A front's child process that takes a stand-in for Ray: `python tests/support/fake_ray.py ray|sandbox FD PARENT`.

The cluster is a file of JSON, $FAKE_RAY: a list of [node, CPUs], read again at each question. An actor is a process of this
machine on 127.0.0.1. When its node leaves the file, it is killed. Where the file is missing, Ray does not answer: this process ends.
"""

import json
import multiprocessing
import os
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parents[2]))

from chatlm.common.processes.child import run_role      # noqa: E402

actors = {}     # name -> Actor


def cluster():
    return [tuple(each) for each in json.loads(Path(os.environ["FAKE_RAY"]).read_text())]


def nodes():
    alive = cluster()
    for actor in list(actors.values()):
        if actor.node not in dict(alive):
            actor.kill()
    return [{"NodeID": name, "NodeName": f"host of {name}", "Resources": {"CPU": cpus}, "Alive": True} for name, cpus in alive]


class Actor:
    """A process with the object; its methods run there, one after another."""

    def __init__(self, kind, arguments, node, name):
        self.node, self.name = node, name
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self.live, args=(kind, arguments, theirs))
        self.process.start()
        theirs.close()
        self.address, self.wait = (SimpleNamespace(remote=lambda method=method: Reference(self, method)) for method in ("address", "wait"))
        actors[name] = self

    def live(self, kind, arguments, pipe):
        self.pipe.close()
        it = kind(*arguments)
        with suppress(EOFError, OSError):       # a detached actor outlives the process that made it
            while True:
                pipe.send(getattr(it, pipe.recv())())
        threading.Event().wait()

    def kill(self):
        actors.pop(self.name, None)
        self.process.kill()


class Reference:
    """What a call will return."""

    def __init__(self, actor, method):
        self.value, self.error = None, None
        self.done = threading.Event()
        threading.Thread(target=self.call, args=(actor, method), daemon=True).start()

    def call(self, actor, method):
        try:
            actor.pipe.send(method)
            self.value = actor.pipe.recv()
        except (EOFError, OSError):
            self.error = RuntimeError("The actor died unexpectedly\nand more")
        self.done.set()


def get(reference):
    if reference.error:
        raise reference.error
    return reference.value


def wait(references, timeout):
    references[0].done.wait(timeout)
    done = [each for each in references if each.done.is_set()]
    return done[:1], []


def remote(kind):
    def options(scheduling_strategy, name, **how):
        return SimpleNamespace(remote=lambda *arguments: Actor(kind, arguments, scheduling_strategy, name))
    return SimpleNamespace(options=options)


def init(address, **how):
    if not Path(os.environ["FAKE_RAY"]).exists():
        raise ConnectionError("Could not find any running Ray instance.")


if __name__ == "__main__":
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: node)
    util = SimpleNamespace(get_node_ip_address=lambda: "127.0.0.1", scheduling_strategies=strategies)
    sys.modules |= {"ray": SimpleNamespace(init=init, nodes=nodes, remote=remote, put=lambda value: value, get=get, wait=wait, util=util,
                                           kill=Actor.kill, get_actor=actors.__getitem__),
                    "ray.util": util, "ray.util.scheduling_strategies": strategies}
    os._exit(run_role(*sys.argv[1:]))        # without waiting for the actors
