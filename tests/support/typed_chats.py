"""The command `chat` on a terminal of its own: what is typed into it, and what it shows."""

import contextlib
import fcntl
import os
import re
import struct
import termios
import time

from forked import fork_front
from real_server import SCRIPT


class Pty:
    """chat_server.py on a terminal of its own: what is typed into it, and what it has shown."""

    def __init__(self, *words, columns=80, rows=40, **environment):
        self.master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        variables = {**os.environ, "TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        for name in {"NO_COLOR", "COLUMNS", "LINES"} - environment.keys():      # xdist sets the last two
            variables.pop(name, None)
        self.process = fork_front(SCRIPT, words, variables, slave, slave, stdin=slave, imported=("prompt_toolkit", "rich.markdown", "rich.live"))
        os.close(slave)
        self.raw, self.seen = "", 0

    def type(self, keys):
        os.write(self.master, keys.encode())

    def expect(self, pattern):
        """Wait until something new matches; what came up to its end, without control sequences."""
        deadline = time.monotonic() + 60
        while not (found := re.compile(pattern, re.DOTALL).search(self.text, self.seen)):
            assert time.monotonic() < deadline, f"{pattern} did not come: {self.text[self.seen:]!r}"
            try:
                self.raw += os.read(self.master, 1 << 16).decode("utf-8", "replace")
            except OSError:         # it has ended
                assert re.search(pattern, self.text[self.seen:], re.DOTALL), self.text[self.seen:]
        begin, self.seen = self.seen, found.end()
        return self.text[begin:found.end()]

    @property
    def text(self):
        shown = self.raw.replace("\b\x1b[2C", " ")         # prompt_toolkit steps over the space of its prompt
        return re.sub(r"\x1b(\[[0-9;?]*[a-zA-Z]|[=>]|\][^\x07]*\x07|[\[0-9;?]*$)|\r", "", shown)

    def leave(self):
        """The exit status; what was shown last is read."""
        with contextlib.suppress(OSError):
            while data := os.read(self.master, 1 << 16):
                self.raw += data.decode("utf-8", "replace")
        os.close(self.master)
        return self.process.wait(60)


@contextlib.contextmanager
def chatting(url, *words, tmp_path, **options):
    pty = Pty("chat", "--url", url, *words, XDG_STATE_HOME=str(tmp_path), **options)
    try:
        pty.expect("/help lists the commands")
        pty.expect("> ")
        yield pty
    finally:
        if pty.process.poll() is None:
            pty.process.kill()
            pty.process.wait()
