"""Measuring, limiting and releasing memory."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
import re
import resource
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path


def available_memory() -> int:
    """Bytes this process may still allocate: the machine's free memory (all of it if not on Linux), within
    the limits of its cgroup, the enclosing cgroups, and the process (ulimit -v)."""
    page = os.sysconf("SC_PAGE_SIZE")
    free = os.sysconf("SC_PHYS_PAGES") * page
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(OSError):  # not Linux
        free = int(re.findall(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) * 1024
        if limit != resource.RLIM_INFINITY:
            free = min(free, limit - int(Path("/proc/self/statm").read_text().split()[0]) * page)
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)  # v2 has no kinds
            if kinds in ("", "memory"):
                folder = Path("/sys/fs/cgroup", kinds, path[1:])
                free = min(free, *map(cgroup_memory, (folder, *folder.parents[:path.count("/")])))
    return max(int(free), 0)


def cgroup_memory(folder: Path) -> float:
    """Bytes a cgroup (v2, v1) may still use, counting its file cache as free; infinity without a limit."""
    for limit, used, prefix in (("max", "current", ""), ("limit_in_bytes", "usage_in_bytes", "total_")):
        with suppress(OSError, ValueError):
            most, now, stat = ((folder / f"memory.{name}").read_text() for name in (limit, used, "stat"))
            files = re.findall(rf"^{prefix}(?:in)?active_file (\d+)", stat, re.MULTILINE)
            return int(most) - int(now) + sum(map(int, files))
    return math.inf


def read_bandwidth(threads: int, size: int = 64 << 20, rounds: int = 3) -> float:
    """Bytes per second that this many threads read of this machine's memory, the best of some rounds; 0 if
    that cannot be measured. Takes 0.1 s, and twice `size` bytes of memory meanwhile."""
    with suppress(OSError, AttributeError, MemoryError):
        compare = ctypes.CDLL(None).memcmp
        compare.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        # as weights lie: in pages of 4 KB a virtual machine may read half as fast
        with mmap.mmap(-1, 2 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel without them
                    area.madvise(mmap.MADV_HUGEPAGE)
            place = ctypes.addressof(ctypes.c_char.from_buffer(area))
            ctypes.memset(place, 1, 2 * size)  # else all of it is one page of zeros
            part = size // threads
            best_s = math.inf
            for _ in range(rounds):
                readers = [threading.Thread(target=compare, args=(
                    place + index * part, place + size + index * part, part)) for index in range(threads)]
                began_s = time.perf_counter()
                for reader in readers:
                    reader.start()
                for reader in readers:
                    reader.join()
                best_s = min(best_s, time.perf_counter() - began_s)
            return 2 * part * threads / best_s
    return 0.0


def heap_bytes() -> int:
    """Bytes of heap this process uses (mallinfo2(3)); 0 if the C library is not glibc."""
    with suppress(OSError, AttributeError):
        mallinfo = ctypes.CDLL(None).mallinfo2
        mallinfo.restype = type("mallinfo2", (ctypes.Structure,),
                                {"_fields_": [(f"n{i}", ctypes.c_size_t) for i in range(10)]})
        found = mallinfo()
        return found.n4 + found.n7  # hblkhd (large blocks) and uordblks (the rest)
    return 0


def give_memory_back():
    """Return memory freed after loading to the system: file metadata, tokenizer parts, copies of weights."""
    frozen = gc.get_freeze_count() > 0  # in a process of ours: it has left out what it had imported
    gc.unfreeze()
    gc.collect()
    if frozen:  # the process keeps what is left, so later collections leave it out again
        gc.freeze()
    trim_heap()


def trim_heap():
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)


def empty_pages(address: int, size: int) -> bool:
    """Return the memory of a private anonymous mapping to the system. Pointers into it stay valid: it reads
    as zeros, and uses memory again once written. False if the system cannot do this."""
    if sys.platform != "linux":  # elsewhere MADV_DONTNEED may keep what was written
        return False
    return ctypes.CDLL(None).madvise(
        ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.MADV_DONTNEED) == 0


def populate(address: int, size: int):
    """Have the system provide the memory of a mapping, faster than by writing to it. The content stays. Does
    nothing where the system cannot (Linux before 5.14)."""
    MADV_POPULATE_WRITE = 23
    if sys.platform == "linux":
        begin = address // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(address + size - begin), MADV_POPULATE_WRITE)


def share_heap():
    """Have all threads of this process allocate in one heap: each would keep 1 MB or more of its own
    (mallopt(3)). Call it before the first thread starts."""
    M_ARENA_MAX = -8
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def tune_gc():
    """Make full garbage collections rare: with 1,000 streams, each stops the event loop for 80 ms.

    bench/load_front.py, p99 of the added delay, alternating runs: 101-129 ms with Python's thresholds,
    41-49 ms with these."""
    gc.set_threshold(20_000, 20, 100)


def own_bytes(process: int) -> int:
    """The bytes of memory that a process has, without what it maps from files; 0 if that cannot be seen."""
    with suppress(OSError, ValueError):
        _, resident, of_files, *_ = map(int, Path(f"/proc/{process}/statm").read_text().split())
        return (resident - of_files) * os.sysconf("SC_PAGE_SIZE")
    return 0


def limit_memory(more: int):
    """Limit this process to `more` bytes of address space beyond its current size; Linux only."""
    with suppress(OSError, ValueError):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + more, hard))
