"""The store: a database of SQLite in a thread of its own, which commits what the event loop asks for."""

from __future__ import annotations

import asyncio
import fcntl
import os
import queue
import signal
import stat
import struct
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence as Seq
from concurrent.futures import Future
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from shutil import disk_usage
from types import MappingProxyType
from typing import Any, BinaryIO, TYPE_CHECKING, TypeVar, overload
from urllib.parse import quote

from chatlm.common.config import DATABASE
from chatlm.common.errors import ConfigError, EngineFailure, Overloaded, RequestError
from chatlm.common.lanes import Lanes
from chatlm.common.log import log
from chatlm.front.held import HOLDS
from chatlm.front.store.schema import STEPS, Step

if TYPE_CHECKING:
    import sqlite3
    from chatlm.common.config import Settings


T = TypeVar("T")
Parts = Generator[None, None, T]  # work in parts, with its result
APPLICATION_ID = 0x63687376  # "chsv", in the header of the file
SLICE_S = 0.02               # after which a transaction takes no further work, and long work pauses
BUSY_S = 5.0                 # how long another program may hold the database
BESIDE = "-wal", "-shm"      # what SQLite has beside the file while it is open
REPLACED = "its file was removed or replaced: put it back, or restart the server"
UPSERT_VERSION = ("INSERT INTO versions (annex, version) VALUES (?, ?) "
                  "ON CONFLICT DO UPDATE SET version = excluded.version")
NO_TABLES: Mapping[str, Seq[Step]] = MappingProxyType({})
PRIVATE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # with mode 0600
CHECKED_BYTES = 512 << 20    # that are checked before the start, within about a second; more beside the work


# What clients store leaves this much of the disk free, so that texts can always be deleted, the ledger can be
# written, and the server can start.
RESERVE_BYTES = 64 << 20


class Submitted:
    """Work that waits for its turn, or in parts for its next one."""

    def __init__(self, work: Callable[[Any], Any], client: str, adds_bytes: int):
        self.work = work
        self.client = client
        self.adds_bytes = adds_bytes  # of clients' texts
        self.result: Future[Any] = Future()
        self.parts: Generator[None, None, Any] | None = None  # of long work that has begun
        self.has_paused = False   # parts of it are committed
        self.is_unwanted = False  # whoever waited for it has left

    def takes_turn(self) -> bool:
        """Begin, or go on, unless nobody wants it any more."""
        if self.parts is None:
            return self.result.set_running_or_notify_cancel()
        if self.is_unwanted:
            self.parts.close()
        return not self.is_unwanted

    def advance(self, connection: sqlite3.Connection, until_s: float) -> bool:
        """Do the work, or parts of it until that time. True: it is done, with `value`."""
        try:
            if self.parts is None:
                self.value = self.work(connection)
                if not isinstance(self.value, Generator):
                    return True
                self.parts = self.value
            next(self.parts)
            while time.monotonic() < until_s:
                next(self.parts)
        except StopIteration as end:
            self.value = end.value
            return True
        return False


class Store:
    """The database: one file, in WAL mode with synchronous=FULL. When `run` returns, its work survives kill
    -9 and power cuts.

    One thread does all work. Clients take turns, and a client's work begins in the order in which it comes.
    Work that waits together is committed together, for up to SLICE_S. Long work pauses after so long: what it
    has done is committed, and all others that wait have their turns before it goes on.

    Other programs may read the file, and copy it with SQLite's .backup, at any time. Only one server at a
    time can use it.

    Work that adds texts of clients says how many bytes, and is refused if it would not leave RESERVE_BYTES of
    the disk. All other work (deletions, the ledger, the state of batches) may use these bytes."""

    def __init__(self, path: Path, tables: Mapping[str, Seq[Step]] = NO_TABLES):
        """tables: those of annexes by their names, as steps."""
        self.path = path
        self.tables = tables
        self.absolute = path.absolute()
        self.waiting: queue.SimpleQueue[Submitted | None] = queue.SimpleQueue()
        self.lanes = Lanes()  # of the thread: what it has taken from `waiting`, by client
        self.ends = False     # of the thread: nothing more comes
        self.thread = threading.Thread(target=self._serve, name="store", daemon=True)
        self.closed = False
        self.damaged = False  # a check after the start has found damage
        self.added_bytes = 0  # of clients' texts, in the transaction that runs

    def open(self):
        """Open or create the file. Raises ConfigError if it cannot be used. Then nothing in it has changed,
        except that it may have been brought closer to the current version."""
        try:
            import sqlite3
        except ImportError as error:
            raise ConfigError(f"--database needs Python's module sqlite3 ({error})") from None
        self.library = sqlite3
        try:
            self._prepare_files()
        except OSError as error:
            raise self._unusable(error.strerror or str(error)) from None
        try:
            self._connect()
        except Exception as error:
            self._close()
            if isinstance(error, sqlite3.Error):
                raise self._unusable(str(error)) from None
            raise
        self.thread.start()
        if self.unchecked:
            threading.Thread(target=self._check_on, name="store check", daemon=True).start()

    def _unusable(self, reason: str) -> ConfigError:
        return ConfigError(f"--database {self.path}: {reason}")

    def _prepare_files(self):
        """Lock the file against other servers, and let only this user read it."""
        if not self.path.parent.is_dir():
            self.path.parent.mkdir(parents=True, mode=0o700)
        if link := self._link_beside():
            raise self._unusable(f"its {link} is a link, so all was left as it is")
        self.lock = self._open_lock()
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # SQLite gives its -wal and -shm the mode of the file
            with open(os.open(self.path, PRIVATE, 0o600), "rb") as file:
                self._check_header(file)
            for ending in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    self.path.with_name(self.path.name + ending).chmod(0o600)
        except BlockingIOError:
            self.lock.close()
            raise self._unusable("another server uses it") from None
        except BaseException:
            self.lock.close()
            raise

    def _open_lock(self) -> BinaryIO:
        return open(os.open(self._beside("-lock"), PRIVATE | os.O_NOFOLLOW, 0o600), "r+b")

    def _check_header(self, file: BinaryIO):
        """Raise ConfigError unless the file is empty or one of ours. We look before SQLite opens it, because
        SQLite would change another program's file: it removes the journal of one that has crashed."""
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            raise self._unusable("it must be a regular file")
        header = file.read(100)
        if header and not header.startswith(b"SQLite format 3\0"):
            raise self._unusable("it is not a database, so it was left as it is")
        if len(header) == 100 and struct.unpack(">I", header[68:72])[0] != APPLICATION_ID:
            raise self._unusable("it is the database of another program, so it was left as it is")

    def _connect(self):
        journal = self.path.with_name(f"{self.path.name}-journal")
        size = self.path.stat().st_size
        self.unchecked = size > CHECKED_BYTES
        if size and not journal.exists():  # with a journal, a start was killed, and SQLite undoes it
            with closing(self._reader()) as reader:
                self._check_version(reader)
                if not self.unchecked:
                    self._check(reader)
        self.connection = self._writer()
        while self._take_step(self.connection):
            if size:
                log.info("--database %s: it is brought to the form of this version", self.path)
                size = 0
        if self.connection.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise self._unusable("this file system cannot hold a database in WAL mode")
        self._note_places()

    def _writer(self) -> sqlite3.Connection:
        connection = self.library.connect(self.absolute, timeout=BUSY_S, isolation_level=None,
                                          check_same_thread=False)
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # counts for a new file only
        connection.execute("PRAGMA secure_delete = ON")         # overwrites deleted texts
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _note_places(self):
        """Note which files have our names now."""
        self.connection.execute("BEGIN IMMEDIATE")  # makes the files of BESIDE
        self.connection.execute("COMMIT")
        self.places = {ending: self._place(ending) for ending in ("", "-lock", *BESIDE)}

    def _take_step(self, connection: sqlite3.Connection) -> bool:
        """Take the next step to the current version of the tables, or a part of it, and commit it. Returns
        False if there was none."""
        connection.execute("BEGIN EXCLUSIVE")
        try:
            pending = self._pending(connection)
            if pending is None:
                return False
            annex, version, step = pending
            more = False
            if callable(step):
                more = step(connection)
            else:
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                for statement in self._statements(step):
                    connection.execute(statement)
            if not more and annex:
                connection.execute(UPSERT_VERSION, (annex, version + 1))
            elif not more:
                connection.execute(f"PRAGMA user_version = {version + 1}")
            connection.execute("COMMIT")
            return True
        finally:
            if connection.in_transaction:
                connection.execute("ROLLBACK")

    def _pending(self, connection: sqlite3.Connection) -> tuple[str, int, Step] | None:
        """The next step to take: the annex whose tables it is about ("" for our own), how many of its steps
        were taken, and itself. None: all were."""
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version < len(STEPS):
            return "", version, STEPS[version]
        for annex, steps in self.tables.items():
            row = connection.execute("SELECT version FROM versions WHERE annex = ?", (annex,)).fetchone()
            version = row[0] if row else 0
            if version < len(steps):
                return annex, version, steps[version]
        return None

    def _statements(self, script: str) -> Iterator[str]:
        """The statements of a script. A statement, such as a trigger, may have others inside."""
        statement = ""
        for part in script.split(";")[:-1]:
            statement += part + ";"
            if self.library.complete_statement(statement):
                yield statement
                statement = ""

    def _beside(self, ending: str) -> Path:
        return self.absolute.with_name(self.absolute.name + ending)

    def _link_beside(self) -> str | None:
        """Which of the files beside the database is a link: it would lock, change or write another file."""
        return next((ending for ending in ("-lock", *BESIDE) if self._beside(ending).is_symlink()), None)

    def _place(self, ending: str) -> tuple[int, int] | None:
        """Which file has a name now."""
        with suppress(OSError):
            found = self._beside(ending).stat()
            return found.st_dev, found.st_ino
        return None

    def _check_places(self):
        """Check that the open files still have their names, and repair what can be repaired. Raises
        OperationalError if what is committed now would be lost."""
        if self._place("") != self.places[""]:
            raise self.library.OperationalError(REPLACED)
        if link := self._link_beside():
            raise self.library.OperationalError(f"its {link} was replaced by a link: remove it")
        try:
            if self._place("-lock") != self.places["-lock"]:
                self._lock_again()
            if any(self._place(ending) != self.places[ending] for ending in BESIDE):
                self._open_again()
        except OSError as error:
            reason = f"its files were changed ({error.strerror or error})"
            raise self.library.OperationalError(reason) from None

    def _lock_again(self):
        lock = self._open_lock()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            reason = "its -lock was removed, and another server uses it now"
            raise self.library.OperationalError(reason) from None
        self.lock.close()
        self.lock = lock
        self.places["-lock"] = self._place("-lock")
        log.warning("--database %s: its -lock was removed; it is locked again", self.path)

    def _open_again(self):
        """Open the database again after its -wal or -shm was removed. SQLite would go on with the nameless
        file, and a crash would lose what was committed since. So move all of it to the main file first."""
        with suppress(self.library.ProgrammingError):  # an earlier attempt has closed it and got no further
            (busy, _, _) = self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            if busy:
                raise self.library.OperationalError("its -wal was removed while another program reads it")
            self.connection.close()
        # files that have these names now belong to no database of ours, and SQLite would replay them
        for ending in BESIDE:
            if self._place(ending) not in (None, self.places[ending]):
                self._beside(ending).unlink(missing_ok=True)
        self.connection = self._writer()
        self._note_places()
        log.warning("--database %s: its -wal or -shm was removed or replaced; nothing that was committed is "
                    "lost", self.path)

    def _reader(self) -> sqlite3.Connection:
        """A connection that only reads."""
        uri = f"file:{quote(str(self.absolute))}?mode=ro"
        return self.library.connect(uri, uri=True, timeout=BUSY_S)

    def _check_version(self, reader: sqlite3.Connection):
        (version,) = reader.execute("PRAGMA user_version").fetchone()
        if version > len(STEPS):
            raise self._unusable(f"a newer chat_server has made it (version {version} of its tables, this "
                                 f"one knows {len(STEPS)}), so it was left as it is")
        if version < len(STEPS):
            return
        for annex, version in reader.execute("SELECT annex, version FROM versions"):
            known = len(self.tables.get(annex, ()))
            if version > known:
                raise self._unusable(f"a newer chat_server has made its tables of {annex} (version {version},"
                                     f" this one knows {known}), so it was left as it is")

    def _check(self, reader: sqlite3.Connection):
        result = reader.execute("PRAGMA quick_check(1)").fetchone()[0]
        if result != "ok":
            raise self._unusable(f"it is damaged ({result}): restore a backup")

    def _check_on(self):
        """Check a large database while the server runs, and end the server if the database is damaged."""
        try:
            with closing(self._reader()) as reader:
                self._check(reader)
        except Exception as error:
            if not self.closed:
                self.damaged = type(error) in (ConfigError, self.library.DatabaseError)
                log.error("%s", error)
            if self.damaged:
                os.kill(os.getpid(), signal.SIGTERM)  # running answers may finish

    @overload
    async def run(self, work: Callable[[Any], Parts[T]], adds_bytes: int = 0, client: str = "") -> T: ...

    @overload
    async def run(self, work: Callable[[Any], T], adds_bytes: int = 0, client: str = "") -> T: ...

    async def run(self, work: Callable[[Any], Any], adds_bytes: int = 0, client: str = "") -> Any:
        """Do `work`, a function of the connection, in the store's thread and within a transaction, and return
        its result. Its changes are on the disk when this returns. If it raises, they are rolled back. If this
        is cancelled, they may be done or not.

        Work that may take more than a few milliseconds is a generator, which yields wherever it may pause. A
        commit is made where it does pause, so there the database must be whole: what it did before stays,
        even if it raises later. If this is cancelled, it does not go on after that.

        adds_bytes: bytes of clients' texts that it adds. client: whose turn it takes; "" is the server.
        Raises Overloaded if the database cannot be written now, as on a full disk, or if RESERVE_BYTES of the
        disk would not be left; EngineFailure if the database is damaged; RequestError for a text that it
        cannot hold."""
        if self.closed:
            raise Overloaded("the server is stopping")
        submitted = Submitted(work, client, adds_bytes)
        self.waiting.put(submitted)
        try:
            return await asyncio.wrap_future(submitted.result)
        except self.library.Error as error:
            raise self._failure(error) from error
        except UnicodeEncodeError:
            raise RequestError("a text has half of a character (a lone surrogate)",
                               code="invalid_value") from None
        finally:
            submitted.is_unwanted = True

    async def run_patiently(self, work: Callable[[Any], Any], adds_bytes: int = 0, client: str = "") -> Any:
        """What `run` does, for work of the server that nobody waits for: it tries again while the database
        cannot be written, as on a full disk. Raises Overloaded once the server stops."""
        while True:
            try:
                return await self.run(work, adds_bytes, client)
            except Overloaded as error:
                if self.closed:
                    raise
                await asyncio.sleep(error.retry_after_s)

    def _failure(self, error: Exception) -> Exception:
        """The error that a client sees for one of SQLite's. Wrong use of SQLite is our own bug, and stays."""
        if isinstance(error, self.library.OperationalError):
            log.error("--database %s: %s", self.path, error)
            return Overloaded("the server's database cannot be used now; its log says why", retry_after_s=10)
        if type(error) is self.library.DatabaseError:
            log.error("--database %s: %s", self.path, error)
            return EngineFailure("the server's database is damaged")
        return error

    def _serve(self):
        """Run as the store's thread, until None comes and all work is done."""
        while self._receive():
            with HOLDS.by("store"):
                self._transact()

    def _receive(self) -> bool:
        """Take what has come into the lanes; wait if there is nothing to do. False at the end."""
        while not self.ends and (not self.lanes or not self.waiting.empty()):
            submitted = self.waiting.get()
            if submitted is None:
                self.ends = True
            else:
                self.lanes.append(submitted.client, submitted)
        return bool(self.lanes)

    def _transact(self):
        """Commit what clients have waiting, in turns, as much as SLICE_S allows. If the transaction breaks,
        do each work again in its own.

        If no transaction can begin, for example while another program writes, all that waits fails at once:
        each would wait as long again."""
        until_s = time.monotonic() + SLICE_S
        begun: list[Submitted] = []
        settled: list[Callable[[], None]] = []
        try:
            self._begin()
        except Exception as error:
            while self.lanes:
                submitted = self.lanes.pop()
                if submitted.takes_turn():
                    submitted.result.set_exception(error)
            return
        try:
            while self.lanes and (not begun or time.monotonic() < until_s):
                submitted = self.lanes.pop()
                if submitted.takes_turn():
                    begun.append(submitted)
                    settled.append(self._advance(submitted, until_s))
            self.connection.execute("COMMIT")
        except Exception as error:
            self._undo()
            settled = [self._again(submitted, error) for submitted in begun]
        for settle in settled:
            settle()

    def _begin(self):
        self.added_bytes = 0
        self._check_places()
        self.connection.execute("BEGIN IMMEDIATE")

    def _undo(self):
        with suppress(self.library.Error):
            self.connection.execute("ROLLBACK")

    def _again(self, submitted: Submitted, error: Exception) -> Callable[[], None]:
        """Do a work whose transaction broke in one of its own, unless it cannot be begun again."""
        if submitted.has_paused:
            return partial(submitted.result.set_exception, error)
        submitted.parts = None
        try:
            self._begin()
            settle = self._advance(submitted, 0.0)
            self.connection.execute("COMMIT")
            return settle
        except Exception as own_error:
            self._undo()
            return partial(submitted.result.set_exception, own_error)

    def _advance(self, submitted: Submitted, until_s: float) -> Callable[[], None]:
        """Do a work within the transaction, or a part of it. Returns what follows the commit: its result is
        set, or it waits for its next turn. Raises an error that has ended the whole transaction."""
        if submitted.adds_bytes and not submitted.parts and not self._leaves_reserve(submitted.adds_bytes):
            full = Overloaded("the disk with the server's database is almost full", retry_after_s=60)
            return partial(submitted.result.set_exception, full)
        self.connection.execute("SAVEPOINT work")
        try:
            is_done = submitted.advance(self.connection, until_s)
        except Exception as error:
            if not self.connection.in_transaction:
                raise
            self.connection.execute("ROLLBACK TO work")
            self.connection.execute("RELEASE work")
            return partial(submitted.result.set_exception, error)
        self.connection.execute("RELEASE work")
        if is_done:
            return partial(submitted.result.set_result, submitted.value)
        return partial(self._pause, submitted)

    def _pause(self, submitted: Submitted):
        submitted.has_paused = True
        self.lanes.append(submitted.client, submitted)

    def _leaves_reserve(self, adds_bytes: int) -> bool:
        """Whether RESERVE_BYTES of the disk are left after so many more bytes. They are written twice: to the
        -wal, and then to the file."""
        added_bytes = self.added_bytes + adds_bytes
        if disk_usage(self.absolute.parent).free - 2 * added_bytes < RESERVE_BYTES:
            return False
        self.added_bytes = added_bytes
        return True

    async def clear_log(self):
        """Leave nothing in the -wal of what was deleted: SQLite overwrites deleted texts in the pages, but
        older ones stay there until it is used anew. They also stay while another program reads them."""
        def checkpoint():
            if self._place("") == self.places[""]:
                with closing(self._writer()) as connection:
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with suppress(self.library.Error):
            await asyncio.to_thread(checkpoint)

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """A connection for what reads long, in a thread of the caller: the store's goes on meanwhile."""
        with closing(self._reader()) as connection:
            yield connection

    async def close(self):
        """Finish all work that waits, and close the file."""
        if not self.closed:
            self.closed = True
            self.waiting.put(None)
            await asyncio.to_thread(self.thread.join)
            self._close()

    def _close(self):
        with suppress(AttributeError, self.library.Error):
            self.connection.close()
        self.lock.close()  # after the connection


def store_path(named: str) -> Path:
    """The file of --database. Raises ConfigError if the user's home is unknown."""
    state = os.environ.get("XDG_STATE_HOME")
    if named == DATABASE and state:
        return Path(state) / "chat_server" / "store.db"
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"--database {named}: {error}") from None


async def open_store(settings: Settings, tables: Mapping[str, Seq[Step]] = NO_TABLES) -> Store | None:
    """The store of --database, or None without the flag. ConfigError if it cannot be used. tables: those of
    annexes."""
    if settings.database is None:
        return None
    store = Store(store_path(settings.database), tables)
    await asyncio.to_thread(store.open)
    return store
