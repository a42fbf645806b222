"""NUMA: ranks and workers are bound to nodes. No machine with several was at hand: the topology is a folder that stands for /sys."""

import os
import subprocess
import sys
from contextlib import contextmanager

import psutil
import pytest

from chatlm.common.processes import nodes
from chatlm.common.processes.nodes import advice, numa_nodes, place, shares_of_nodes
from real_server import SCRIPT, ask, get, post, server

ROOT = SCRIPT.parent
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
pytestmark = pytest.mark.skipif(not CPUS, reason="Linux binds processes to CPUs")


def topology(root, online, cpus, siblings=()):
    """Files as in /sys: nodes online, the CPUs of each as Linux lists them, and CPUs that are hyper-threads of one core."""
    folder = root / "devices/system/node"
    for node, listed in cpus.items():
        (folder / f"node{node}").mkdir(parents=True)
        (folder / f"node{node}/cpulist").write_text(listed + "\n")
    (folder / "online").write_text(online + "\n")
    for together in siblings:
        for cpu in together.split(","):
            core = root / f"devices/system/cpu/cpu{cpu}/topology"
            core.mkdir(parents=True)
            (core / "thread_siblings_list").write_text(together + "\n")
    return root


@pytest.fixture
def bound(monkeypatch):
    """What `place` binds this process to; `cpus` are those that may run it."""
    found = []

    @contextmanager
    def on(cpus):
        with monkeypatch.context() as patched:
            patched.setattr(nodes.os, "sched_getaffinity", lambda pid: set(cpus))
            patched.setattr(nodes, "bind", lambda cpus: found.append(sorted(cpus)))
            yield found
        found.clear()
    return on


def test_nodes_are_those_of_the_allowed_cpus(tmp_path):
    """Nodes are those of the CPUs that may run this process."""
    root = topology(tmp_path, "0-2,4", {0: "0-3,8-11", 1: "4-7,12-15", 2: "", 4: "16"})      # 2 has memory only, as CXL's
    assert numa_nodes(range(17), root) == {0: {0, 1, 2, 3, 8, 9, 10, 11}, 1: {4, 5, 6, 7, 12, 13, 14, 15}, 4: {16}}
    assert numa_nodes([1, 9, 6], root) == {0: {1, 9}, 1: {6}}       # by an affinity, a cpuset, or because others are offline
    assert numa_nodes([1], root) == {0: {1}}
    assert numa_nodes([0], tmp_path / "elsewhere") == {}
    (root / "devices/system/node/node1/cpulist").write_text("what?\n")
    assert numa_nodes(range(17), root) == {}


def test_processes_are_divided_among_nodes_in_order():
    assert shares_of_nodes(2, [0, 1]) == [[0], [1]]
    assert shares_of_nodes(4, [0, 1]) == [[0], [0], [1], [1]]
    assert shares_of_nodes(2, [0, 1, 2, 3]) == [[0, 1], [2, 3]]
    assert shares_of_nodes(3, [0, 1]) == [[0], [0], [1]]


def test_each_rank_is_bound_to_the_cpus_of_its_node(tmp_path, bound):
    root = topology(tmp_path, "0-1", {0: "0-1,4-5", 1: "2-3,6-7"}, ("0,4", "1,5", "2,6", "3,7"))
    with bound(range(8)) as cpus:
        lines = [place(rank, 2, 2, root) for rank in (0, 1)]
        assert cpus == [[0, 1, 4, 5], [2, 3, 6, 7]] and lines[1] == "NUMA: 2 processes are bound to nodes 0, 1, this one to node 1"
    with bound(range(8)) as cpus:           # a quota has left one thread for each of four
        assert all(place(rank, 4, 1, root) for rank in range(4)) and cpus == [[0, 1, 4, 5]] * 2 + [[2, 3, 6, 7]] * 2
    with bound([0, 4, 1, 2, 3]) as cpus:
        assert place(1, 2, 2, root) and cpus == [[2, 3]]


def test_nothing_is_bound_where_cores_would_idle(tmp_path, bound):
    """Nothing is bound where that would leave cores idle or there is one node or process."""
    root = topology(tmp_path, "0-1", {0: "0-1,4-5", 1: "2-3,6-7"}, ("0,4", "1,5", "2,6", "3,7"))
    with bound(range(8)) as cpus:
        assert place(0, 3, 2, root) == "NUMA: node 0 has 2 core(s) for 4 threads, so no process is bound to a node"
        assert place(2, 3, 2, root) == place(0, 3, 2, root)         # all ranks agree
        assert place(0, 1, 4, root) == place(0, 2, 1, tmp_path / "elsewhere") == "" and cpus == []
    with bound([0, 1, 2]) as cpus:          # a cpuset has taken a core of node 1
        assert place(0, 2, 2, root).startswith("NUMA: node 1 has 1 core(s) for 2 threads") and cpus == []
    with bound([0, 1, 4, 5]) as cpus:       # or all of it
        assert place(0, 2, 1, root) == "" == advice(1, root) and cpus == []


def test_one_process_on_several_nodes_is_told_of_tp(tmp_path, bound):
    root = topology(tmp_path, "0-1", {0: "0", 1: "1"})
    with bound([0, 1]):
        assert advice(1, root).startswith("NUMA: one process computes on 2 nodes") and "--tp 2 divides" in advice(1, root)
        assert advice(2, root) == ""


def test_a_system_that_refuses_is_only_a_line(tmp_path, monkeypatch):
    root = topology(tmp_path, "0-1", {0: "0", 1: "1"})
    monkeypatch.setattr(nodes.os, "sched_getaffinity", lambda pid: {0, 1})

    def refuse(pid, cpus):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(nodes.os, "sched_setaffinity", refuse)
    assert place(0, 2, 1, root) == "NUMA: processes are not bound to nodes: Operation not permitted"


@pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")
def test_all_threads_of_a_process_are_bound(tmp_path):
    """All threads of a process are bound and those that it starts."""
    root = topology(tmp_path, "0-1", {0: str(CPUS[0]), 1: str(CPUS[1])})
    code = f"""
import os, pathlib, threading
from chatlm.common.processes.nodes import place
go, found = threading.Event(), []
def note():
    go.wait()
    found.append(os.sched_getaffinity(0))
threads = [threading.Thread(target=note, daemon=True)]
threads[0].start()
print(place(1, 2, 1, pathlib.Path({str(root)!r})))
threads.append(threading.Thread(target=note, daemon=True))
threads[1].start()
go.set()
[thread.join() for thread in threads]
assert found + [os.sched_getaffinity(0)] == [{{{CPUS[1]}}}] * 3, found
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "this one to node 1" in done.stdout, done.stderr


# In each process of the server the files under /sys/devices/system/node are those of a folder
FAKE_SYS = """
import os, pathlib
real = pathlib.Path.read_text
def read_text(path, *arguments, **options):
    if str(path).startswith("/sys/devices/system/node"):
        path = pathlib.Path(os.environ["FAKE_SYS"] + str(path)[4:])
    return real(path, *arguments, **options)
pathlib.Path.read_text = read_text
"""


@pytest.fixture
def two_nodes(tmp_path):
    """The environment of a server on a machine of two nodes, with a CPU each."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(FAKE_SYS)
    root = topology(tmp_path / "sys", "0-1", {0: str(CPUS[0]), 1: str(CPUS[1])})
    path = os.pathsep.join(filter(None, [str(tmp_path / "site"), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "FAKE_SYS": str(root)}


def where(process):
    """The CPUs of each worker and each rank of a server, without those that may use all."""
    children = psutil.Process(process.pid).children(recursive=True)
    return sorted(tuple(child.cpu_affinity()) for child in children if len(child.cpu_affinity()) < len(CPUS))


@pytest.mark.skipif(len(CPUS) != 2, reason="needs two CPUs")
@pytest.mark.parametrize("flags, line", [
    (("--tp", "2"), "2 processes are bound to nodes 0, 1, this one to node 0"), (("--num-workers", "2"), "2 processes are bound"), ((), "--tp 2 divides")],
    ids=["two ranks", "two workers", "one process"])
def test_a_server_binds_its_ranks_and_workers(nanochat_fixtures, two_nodes, flags, line):
    """A server binds its ranks and its workers and advises where there is one."""
    log = []
    with server(nanochat_fixtures / "gen5", *flags, env=two_nodes, log=log) as (process, url):
        assert [text for text in log if "NUMA" in text and line in text], log
        while any(worker["state"] != "ready" for worker in get(url + "/stats")["workers"]):
            pass        # the second worker may still load
        assert post(url + "/chat/completions", ask("hello", max_tokens=8)).read()
        assert where(process) == ([(CPUS[0],), (CPUS[1],)] if flags else [])
