"""Makes stdin, stdout and stderr usable, whatever the program was started with."""

from __future__ import annotations

import errno
import io
import os
import sys
from contextlib import suppress

from chatlm.common.errors import ConfigError


class Unfailing(io.TextIOWrapper):
    """A stream whose output may be lost: on a full disk, or without a reader, it is dropped."""

    def write(self, text: str, /) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self, /):
        with suppress(OSError):
            super().flush()


def repair_streams():
    """Open closed streams on /dev/null, so that no file opened later gets their number; make characters that
    the encoding lacks `?`, and writing to stderr never fail."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)  # the lowest free number
            os.set_inheritable(opened, True)         # our processes need it as well
            setattr(sys, name, None)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", encoding="utf-8", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    never_fail("stderr")


def never_fail(name: str):
    """Make writing to sys.stdout or sys.stderr never fail: what cannot be written is lost."""
    stream = getattr(sys, name)
    if isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):  # not replaced
        encoding = stream.encoding
        setattr(sys, name, Unfailing(stream.detach(), encoding, "replace", line_buffering=True))


def lack_of_space(error: BaseException) -> ConfigError | None:
    """The operator's message if stdout could not be written; None for other errors. The rest of the output
    is lost."""
    number = getattr(error, "errno", None)
    if number not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return None
    never_fail("stdout")
    return ConfigError(f"cannot write the answer: {os.strerror(number)}")
