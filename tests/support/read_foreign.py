"""Reads a folder of models in every way that the program has: `read_foreign.py FOLDER`, with little memory.

stdin has a JSON list of [path of a model, the file to replace or "", what to put there]. For each, the file
is replaced, everything is read, and the file put back. The last line printed is a JSON list: for each case,
the reading that ended otherwise than with a ConfigError ("" if none did). Before, there is a line
`opened PATH` for each file below the folder that was opened in another way than ours."""

import json
import os
import resource
import signal
import socket
import sys
import traceback
from pathlib import Path

sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parents[2]))

from chatlm.common.config import Settings    # noqa: E402
from chatlm.common.errors import ConfigError, lack_of_memory    # noqa: E402
from chatlm.common.hub.adapter_folders import adapters_below, base_of, is_other_base    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.hub.folder import find_models    # noqa: E402
from chatlm.common.hub.stamps import model_stamp    # noqa: E402
from chatlm.common.hub.run_checkpoints import find_steps    # noqa: E402
from chatlm.common.hub.trainers import foreign_in# noqa: E402
from chatlm.common.hub.val_bpb import evaluation_of    # noqa: E402
from chatlm.common.hub.recorded_metrics import Logs, written_beside    # noqa: E402
from chatlm.common.messages.protocol import SurveyConfig    # noqa: E402
from chatlm.worker.engine.adapter_slots import adapter_digest    # noqa: E402
from chatlm.worker.survey import surveyed    # noqa: E402
from chatlm.worker.weights.loaded.digest import digest_of, files_of    # noqa: E402

MEMORY = 2 << 30        # bytes of address space beyond the libraries'
SECONDS = 30            # of a case

folder = Path(sys.argv[1])


class TooSlow(BaseException):
    """Not an Exception, which a reader may catch."""


def ring(*_):
    raise TooSlow


def note_opened(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        path = os.fsdecode(arguments[0])
        if path.startswith(str(folder)) and not arguments[2] & (os.O_NONBLOCK | os.O_CREAT):
            print("opened", path, flush=True)


def put(path, what):
    """Put something else in place of a file."""
    path.unlink(missing_ok=True)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(os.path.relpath(path))
    elif what == "folder":
        path.mkdir()
    elif what == "sparse":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        path.symlink_to(what)       # such as /dev/zero


def put_back(path, data):
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    path.write_bytes(data)


def readings(model):
    """The names of all readings, and functions that do them."""
    def resolved(**changes):
        return Settings(model=str(model), kv_cache_memory=1 << 20, **changes)

    def survey(**changes):
        settings = resolved(**changes)
        return surveyed(SurveyConfig(settings, resolve_model(settings), "cpu", 1 << 30))

    def hash_all():
        source = resolve_model(resolved())
        digest_of(path for path in files_of(source, resolved()) if path.stat().st_size < 1 << 30)

    def adapters():
        return [path for path in (model.parent if model.is_file() else model, *folder.rglob("*"))
                if (path / "adapter_config.json").exists() or (path / "adapter_config.json").is_symlink()]

    def check_base():
        for path in adapters():
            is_other_base(base_of(path), ["llama-3.2-1b"])

    def survey_adapted():
        for path in adapters():
            survey(lora=(str(path),))

    def digest_adapters():
        for path in adapters():
            if (path / "adapter_model.safetensors").stat().st_size < 1 << 30:  # else there is no room
                adapter_digest(path)

    yield "find_models", lambda: find_models(folder)
    yield "find_steps", lambda: find_steps(folder)
    yield "adapters_below", lambda: adapters_below(folder)
    yield "base_of", check_base
    yield "foreign_in", lambda: foreign_in(folder)
    yield "written_beside", lambda: written_beside(model)
    yield "evaluation_of", lambda: evaluation_of(model)
    yield "metrics_of", lambda: Logs().metrics_of(model)
    yield "model_stamp", lambda: model_stamp(model, resolved())
    yield "survey", survey
    yield "files' digest", hash_all
    yield "survey with an adapter", survey_adapted
    yield "an adapter's digest", digest_adapters


def fault_of(model, good):
    """The first reading that raises anything else than a ConfigError; of a good model, anything."""
    for name, read in readings(model):
        signal.alarm(SECONDS)
        try:
            read()
        except (ConfigError, FileNotFoundError) as error:
            if good:
                return f"{name}: {error}"
        except TooSlow:
            return f"{name} takes more than {SECONDS} s"
        except BaseException as error:
            if lack_of_memory(error):       # a survey says it in a line
                continue
            return f"{name}: {traceback.format_exc()[-2000:]}"
        finally:
            signal.alarm(0)
    return ""


def main():
    signal.signal(signal.SIGALRM, ring)
    os.chdir(folder)        # names of sockets must be short
    cases = json.load(sys.stdin)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY,) * 2)
    sys.addaudithook(note_opened)
    faults = []
    for model, name, what in cases:
        path = Path(name)
        data = path.read_bytes() if name else b""
        if name:
            put(path, what)
        try:
            faults.append(fault_of(Path(model), not name))
        finally:
            if name:
                put_back(path, data)
    print(json.dumps(faults), flush=True)


if __name__ == "__main__":
    main()
