"""The code under test and the models every module may use."""

import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest

gc.disable()            # until all is collected: a quarter of the time that collecting the tests takes
# before torch is imported: its threads must not spin while others work
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# the share of the random cases that the kernels' tests draw; `.ci/run nightly` draws all
os.environ.setdefault("DECODE_CORE_TEST_SHARE", "0.1")
# A shell's background jobs ignore Ctrl-C, and so would every server that a test interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
# What the tests share, and the code under test: a private build, or this checkout
sys.path[:0] = [os.environ.get("CHAT_SERVER_DIR") or str(REPOSITORY), str(TESTS / "support")]

from browsing import browser, end_browser, held_front, one_stand_in, opened_page, page, server_url, stand_in, theme  # noqa: E402, F401  of the page's tests
from lasting_timeouts import pytest_timeout_set_timer  # noqa: E402, F401
import nightly  # noqa: E402
from made_once import made_once  # noqa: E402
from pools import start_pool, started  # noqa: E402, F401
from quick_plugin import Quick  # noqa: E402
from shared_servers import (  # noqa: E402, F401
    default_server, default_url, float_url, keeping_server, knowing_server, short_url, tiny_url, tools_server,
    two_keys_server)


shown = []      # the reports that the summary asks about again


def pytest_report_teststatus(report, config):
    """Show a failure at once: a run that a time limit cuts short never comes to its summary."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if report.failed and terminal and report not in shown:
        shown.append(report)
        terminal.write_line(f"\n{report.nodeid} failed in {report.when}:\n{report.longreprtext[-3000:]}")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """xdist says that one of its processes died, but not of what."""
    if error:
        with open("/proc/meminfo") as memory:
            available = next(line for line in memory if line.startswith("MemAvailable"))
        ended = node.gateway._io.popen.wait(10)         # below 0: by that signal; -9 with little memory: the system may have killed it
        print(f"\n{node.gateway.id} ended with {ended}; {available}", flush=True)


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="the spine, and what needs no other process: some cases of each function of tests")


def pytest_configure(config):
    config.option.loadscopereorder = False          # of xdist: it would start the modules with most tests first
    if getattr(config.option, "maxworkerrestart", None) is None:
        config.option.maxworkerrestart = "0"        # of xdist 3.8: it may wait for ever once it has started another process for one that died
    if config.option.quick:
        config.pluginmanager.register(Quick(REPOSITORY))


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session):
    """Each process of xdist imports another part of the modules first: whoever imports one first rewrites its asserts for all, which takes
    two thirds of the time that collecting takes."""
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if count == 1:
        return
    places = [Path(session.config.invocation_params.dir, word.partition("::")[0]) for word in session.config.args]
    paths = [path for place in places for path in (sorted(place.rglob("test_*.py")) if place.is_dir() else [place])]
    first = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw")) * len(paths) // count
    for path in paths[first:] + paths[:first]:
        sys.path.insert(0, str(path.parent))
        with suppress(Exception, pytest.skip.Exception):        # which collecting says
            import_module(path.stem)
        sys.path.remove(str(path.parent))


def pytest_collection_modifyitems(config, items):
    if nightly.WHOLE and config.option.markexpr == "slow":      # what a module has at night alone need not be a case of its own
        for item in items:
            if hasattr(item.module, "WHOLE") or hasattr(item.module, "nightly"):
                item.add_marker("slow")
    if "chatlm.worker.engine.engine" in sys.modules:        # some test makes engines in this process
        import checked      # noqa: F401


@pytest.fixture(autouse=True)
def integrity():
    """After each test, everything that its engines count is owned once, and no statement of its store has
    read a whole table."""
    yield
    if explained := sys.modules.get("explained"):
        assert explained.take_faults() == []
    if checked := sys.modules.get("checked"):
        assert checked.take_faults() == []


@pytest.fixture(scope="session", autouse=True)
def explained_statements():
    """SQLite explains what the stores of this process have it do."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        from explained import explain_all
        explain_all(monkeypatch)
        yield


@pytest.fixture(scope="session")
def state_folders(tmp_path_factory):
    """A folder, and numbers for tests."""
    return tmp_path_factory.mktemp("states"), itertools.count()


@pytest.fixture(autouse=True)
def state_home(state_folders, monkeypatch):
    """Each test has a state of its own: servers that score checkpoints keep the results, and find them again."""
    folder, numbers = state_folders
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / str(next(numbers))))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is None or "page" not in nextitem.path.parts:
        end_browser()
    if nextitem is None or nextitem.path != item.path:
        gc.collect()        # engines refer to themselves: those of a module had 2 GB long after it


def pytest_collection_finish():
    gc.enable()
    gc.freeze()         # what collecting the tests has made stays; workers that run in this process collect garbage often
    gc.collect()        # without it, Python would wait for a quarter as many new objects: descriptors are among them


@pytest.fixture(scope="session")
def default_model_path():
    """The embedded default model, fetched once by the server's own code into its normal cache."""
    from chatlm.common.hub.default_model import fetch_default_model
    return fetch_default_model()


@pytest.fixture(scope="session")
def default_embedder_path():
    """The folder of the real all-MiniLM-L6-v2, fetched likewise."""
    from chatlm.common.hub.default_model import fetch_default_embedder
    return fetch_default_embedder()


@pytest.fixture(scope="session", autouse=True)
def forked_processes():
    """Workers and sandboxes of the pools that a test starts in this process are forked."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if sys.platform == "linux":
            from chatlm.common.processes import start
            from patching import patch
            import forked
            patch(monkeypatch, start, "start_child", forked.start_child)
        yield


@pytest.fixture
async def client():
    """An HTTP client."""
    import aiohttp
    async with aiohttp.ClientSession() as session:
        yield session


@pytest.fixture(scope="session")
def nanochat_fixtures():
    """gen1 .. gen6: a tiny checkpoint of each nanochat generation in upstream's layout, with oracle.json. gen6 is not
    upstream's own: see tests/fixtures/generation_6.py."""
    return TESTS / "fixtures" / "nanochat"


@pytest.fixture(scope="session")
def base_checkpoint(nanochat_fixtures, tmp_path_factory):
    """A nanochat base folder whose only checkpoint is of the source `base`: the tiny one of generation 5."""
    folder = tmp_path_factory.mktemp("base_checkpoint")
    shutil.copytree(nanochat_fixtures / "gen5" / "tokenizer", folder / "tokenizer")
    shutil.copytree(nanochat_fixtures / "gen5" / "chatsft_checkpoints", folder / "base_checkpoints")
    return folder


@pytest.fixture(scope="session")
def emulation_library(tmp_path_factory):
    """The CUDA sources compiled by g++ against csrc/cuda/emulation.h: a library with the functions of
    launch.h."""
    if made := os.environ.get("DECODE_CORE_EMULATION_LIBRARY"):         # by the run that this one is a part of
        return Path(made)
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    return made_once(tmp_path_factory, "emulation.so", compile_emulation)


def compile_emulation(library):
    built = library.with_suffix(".new")
    # For example, with libasan preloaded: -fsanitize=address,undefined -fno-sanitize-recover=undefined --param=asan-stack=0
    more = os.environ.get("DECODE_CORE_EMULATION_FLAGS", "").split()
    csrc = REPOSITORY / "csrc"
    # -O2 compiles twice as long, and the tests take the same time with it: they spend it in changing fibres
    subprocess.run(["g++", "-std=c++17", "-O1", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra",
                    "-Werror", *more, f"-I{csrc}", str(csrc / "cuda" / "emulation.cpp"), "-o", str(built)], check=True, timeout=170)
    built.rename(library)
