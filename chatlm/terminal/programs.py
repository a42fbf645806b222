"""Runs programs that a model wrote, for HumanEval: in processes with limits, which are no sandbox.

Such a program may read what this user may read and use the network: `--confirm-run-unsafe-code` says so, and
no server has this module. What is bounded is accidents: time, memory, files, processes, output."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from asyncio.subprocess import DEVNULL
from contextlib import suppress
from pathlib import Path

SECONDS = 5.0                # upstream's limits: 5 s, and 256 MB of addresses
MEMORY_BYTES = 256 << 20
FILE_BYTES, OPEN_FILES = 16 << 20, 64
AT_ONCE = max((os.cpu_count() or 2) // 2, 1)

# The limits are set by the new process itself: code between fork and exec is unsafe beside threads. What is
# taken away keeps a program from deleting files or ending processes by mistake.
GUARD = f"""
import os, shutil, subprocess, sys
if sys.platform != "darwin":
    import resource
    for name, most in (("AS", {MEMORY_BYTES}), ("DATA", {MEMORY_BYTES}), ("CPU", {int(SECONDS) + 1}),
                       ("FSIZE", {FILE_BYTES}), ("NOFILE", {OPEN_FILES}), ("CORE", 0)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
program = open(sys.argv[1], encoding="utf-8", errors="surrogatepass").read()
for owner, names in ((os, "kill killpg system fork forkpty remove unlink rmdir removedirs rename renames "
                          "replace truncate chmod chown fchmod fchown chroot setuid putenv "
                          "popen posix_spawn"),
                     (shutil, "rmtree move chown"), (subprocess, "Popen")):
    for name in names.split():
        if hasattr(owner, name):
            setattr(owner, name, None)
exec(compile(program, "<model>", "exec"), {{"__name__": "__main__"}})
"""


class Programs:
    """Runs one program a process, a few at a time."""

    def __init__(self):
        self.free = asyncio.Semaphore(AT_ONCE)

    async def __call__(self, program: str) -> bool:
        """Does it end in time and without an error?"""
        async with self.free:
            with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
                path = Path(folder, "program.py")
                path.write_text(program, encoding="utf-8", errors="surrogatepass")
                return await self._run(path)

    async def _run(self, path: Path) -> bool:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-I", "-c", GUARD, str(path), cwd=path.parent, start_new_session=True,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}, stdin=DEVNULL, stdout=DEVNULL,
            stderr=DEVNULL)
        try:
            return await asyncio.wait_for(child.wait(), SECONDS) == 0
        except asyncio.TimeoutError:
            return False
        finally:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)  # and what it may have started
            await child.wait()
