"""Which functions of the program the tests of a module call, in every process that they start: `.ci/run record`.

RECORD_EXECUTED names a folder. Each of pytest's processes has a file there, NAME.calls, to which it and what it starts append
"place<TAB>process<TAB>file<TAB>function" when a function is first called, and a page of memory, NAME.place, that says in whose name:
a module of tests, or "fixture NAME" while a fixture of the session is made, which all modules that ask for it have then called.
What an import runs is not counted. A process that is killed has written what it had called.

Processes read this at their start because of a line in a .pth file, which `.ci/run record` makes and removes. Processes without site or
with an environment of their own are not seen: .ci/changed.py has rules for what they test. Nor is what a thread calls after a recursion
without end, before the next test.
"""

import mmap
import os
import struct
import sys
import threading
from contextlib import suppress

FOLDER, NAME = "RECORD_EXECUTED", "RECORD_EXECUTED_NAME"
PLACE_SIZE = 400
NUMBER = struct.Struct("<I")


def program_file(filename):
    """The path in the repository of a file of the program, wherever it was copied to; None for others."""
    filename = filename.replace(os.sep, "/")
    _, found, rest = filename.rpartition("/chatlm/")
    if found and not rest.startswith(("tests/", "bench/")):         # of a checkout with that name
        return f"chatlm/{rest}"
    return "chat_server.py" if filename.endswith("/chat_server.py") else None


class Recorder:
    """Appends the functions that this process calls to the calls of one process of pytest."""

    def __init__(self, folder, name):
        self.calls = f"{folder}/{name}.calls"
        with open(f"{folder}/{name}.place", "a+b") as file:
            file.truncate(PLACE_SIZE)
            self.place = mmap.mmap(file.fileno(), PLACE_SIZE)
        self.entered = self.number = None
        self.called = {}                # place -> the code of functions that are written down already, or are not the program's
        self.known = set()
        self.write("", "")
        os.register_at_fork(after_in_child=lambda: self.write("", ""))

    def write(self, path, function):
        """A line in the name of the present place; without a function it says that this process began."""
        place = self.place[4:].partition(b"\0")[0].decode()
        with suppress(OSError):             # a sandbox may open nothing. Nothing stays open: tests count descriptors, and programs close them
            file = os.open(self.calls, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            os.write(file, f"{place}\t{os.getpid()}\t{path}\t{function}\n".encode())
            os.close(file)

    def enter(self, name):
        """From now on functions are called in the name of this place, here and in the processes started from here.
        Python ends a profile that raises, as it does in a recursion without end: each test begins it again."""
        sys.setprofile(self.profile)
        self.entered, text = name, name.encode()
        self.place[4:4 + len(text) + 1] = text + b"\0"
        self.place[:4] = NUMBER.pack(NUMBER.unpack(self.place[:4])[0] + 1)

    def profile(self, frame, event, argument):
        if event == "call":
            if self.place[:4] != self.number:
                self.number = self.place[:4]
                self.known = self.called.setdefault(self.place[4:].partition(b"\0")[0], set())
            if frame.f_code not in self.known:
                self.add(frame)

    def add(self, frame):
        code, caller = frame.f_code, frame.f_back
        path = program_file(code.co_filename)
        if path:
            while caller:
                if caller.f_code.co_filename.startswith("<frozen importlib"):
                    return
                caller = caller.f_back
            if not code.co_name.startswith("<module"):
                self.write(path, code.co_qualname.partition(".<locals>")[0])
        self.known.add(code)


recorder = None


def start():
    """Record what this process calls from now on."""
    global recorder
    recorder = Recorder(os.environ[FOLDER], os.environ[NAME])
    threading.setprofile(recorder.profile)
    sys.setprofile(recorder.profile)


if os.environ.get(NAME):
    start()
