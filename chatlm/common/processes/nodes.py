"""NUMA nodes: which CPUs lie beside which memory, and binding the processes that compute to them.

Memory lies on the node of the thread that touches it first, so a process that binds itself before it loads
its weights has them, its KV pages and its activations on its node, or on the next one once that is full."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence as Seq
from contextlib import suppress
from pathlib import Path

from chatlm.common.processes.start import physical_cores

SYS = Path("/sys")
Nodes = Mapping[int, frozenset[int]]  # the CPUs of each, by its number


def parse_cpu_list(text: str) -> set[int]:
    """The numbers in a list of Linux's, such as "0-3,8,10-11". Raises ValueError for anything else."""
    numbers: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


def numa_nodes(cpus: Iterable[int], root: Path = SYS) -> Nodes:
    """The NUMA nodes of these CPUs, without nodes that have only memory. `cpus`: those that may run this
    process. {} if the system does not say."""
    ours = frozenset(cpus)
    folder = root / "devices/system/node"
    try:
        nodes = {node: ours & parse_cpu_list((folder / f"node{node}/cpulist").read_text())
                 for node in sorted(parse_cpu_list((folder / "online").read_text()))}
    except (OSError, ValueError):
        return {}
    return {node: theirs for node, theirs in nodes.items() if theirs}


def own_nodes(root: Path = SYS) -> Nodes:
    """The nodes of the CPUs that may run this process, which its affinity and a cpuset decide."""
    return numa_nodes(os.sched_getaffinity(0), root) if hasattr(os, "sched_getaffinity") else {}


def shares_of_nodes(count: int, nodes: Seq[int]) -> list[Seq[int]]:
    """The nodes of each of `count` processes: one that it may share with others, or several."""
    most = len(nodes)
    return [nodes[each * most // count:max((each + 1) * most // count, each * most // count + 1)]
            for each in range(count)]


def place(index: int, count: int, threads: int, root: Path = SYS) -> str:
    """Bind this process and all its threads to its share of the nodes. `count` processes compute on this
    machine, each with so many threads.

    Binds nothing if nodes have too few cores, or if the system refuses. Returns a line for the log; "" if
    there is one node or one process only."""
    nodes = own_nodes(root)
    if count < 2 or len(nodes) < 2:
        return ""
    shares = shares_of_nodes(count, [*nodes])
    for share in shares:
        cpus = frozenset[int]().union(*map(nodes.__getitem__, share))
        cores = physical_cores(cpus, root / "devices/system/cpu")
        needed = threads * shares.count(share)
        if cores < needed:
            return (f"NUMA: {named(share)} has {cores} core(s) for {needed} threads, so no process is bound "
                    "to a node")
    own = shares[index]
    try:
        bind(frozenset[int]().union(*map(nodes.__getitem__, own)))
    except OSError as error:
        return f"NUMA: processes are not bound to nodes: {error.strerror}"
    return f"NUMA: {count} processes are bound to {named([*nodes])}, this one to {named(own)}"


def bind(cpus: frozenset[int]):
    """Let only these CPUs run this process. OSError if the system refuses it."""
    os.sched_setaffinity(0, cpus)
    with suppress(OSError):  # no /proc: then the threads that libraries have started stay where they are
        for thread in os.listdir("/proc/self/task"):
            with suppress(ProcessLookupError):  # it has ended
                os.sched_setaffinity(int(thread), cpus)


def named(nodes: Seq[int]) -> str:
    return f"node{'s' * (len(nodes) > 1)} {', '.join(map(str, nodes))}"


def advice(processes: int, root: Path = SYS) -> str:
    """A line for the log where one process computes on several nodes; else ""."""
    nodes = own_nodes(root)
    if processes > 1 or len(nodes) < 2:
        return ""
    return (f"NUMA: one process computes on {len(nodes)} nodes, so many of its threads read the memory of "
            f"others; --tp {len(nodes)} divides the model among them, each part in its node's memory "
            "(not measured yet)")
