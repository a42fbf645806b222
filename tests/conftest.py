"""The code under test and the models every module may use."""

import gc
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

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

from browsing import browser, held_front, opened_page, page, server_url, stand_in  # noqa: E402, F401  fixtures of the page's tests
from pools import start_pool, started  # noqa: E402, F401


shown = []      # the reports that the summary asks about again


def pytest_report_teststatus(report, config):
    """Show a failure at once: a run that a time limit cuts short never comes to its summary."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if report.failed and terminal and report not in shown:
        shown.append(report)
        terminal.write_line(f"\n{report.nodeid} failed in {report.when}:\n{report.longreprtext[-3000:]}")


# The modules that take longest, the longest first: two processes then end together.
LONGEST = [f"tests/{name}.py" for name in (
    "front/server/test_batch_routes", "worker/weights/test_families", "front/pool/test_failover", "common/test_bundle_alone",
    "worker/engine/test_same_bits", "worker/test_doctor_weights", "worker/weights/test_encoders", "page/test_page_run_lineages",
    "common/test_bundle", "page/test_page", "worker/weights/test_served_adapters", "core/test_core_tiles", "test_types",
    "worker/test_doctor", "worker/weights/test_bad_models", "terminal/test_programs", "worker/weights/test_tied_heads",
    "worker/weights/test_weights", "page/test_page_get", "front/pool/test_watch", "worker/weights/test_strange_files",
    "worker/engine/test_draft_model", "front/evals/test_run_results", "worker/weights/test_packed_folders",
    "core/test_cuda_steps", "page/test_page_shell", "worker/engine/test_repetition", "front/tools/test_tool_servers",
    "front/api/test_calculator", "front/server/test_server", "worker/engine/test_grammar", "test_every_route_and_command",
    "core/test_core_attention", "page/test_page_chats", "worker/engine/test_engine", "front/evals/test_chat_suite",
    "terminal/test_quantize", "page/test_page_look", "worker/weights/test_sight_families", "front/server/test_kept_responses",
    "front/pool/test_changed_files", "worker/weights/test_adapters", "page/test_page_run", "front/server/test_extract",
    "page/test_page_markdown", "worker/weights/test_packed_default_model", "worker/weights/test_sight_qwen", "worker/test_bits",
    "front/server/test_picture_routes", "worker/engine/test_kept", "front/server/test_arithmetic")]


def pytest_configure(config):
    config.option.loadscopereorder = False          # of xdist: it would start the modules with most tests first


def pytest_collection_modifyitems(items):
    order = {module: number for number, module in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.split("::")[0], len(LONGEST)))
    if "chatlm.worker.engine.engine" in sys.modules:        # some test makes engines in this process
        import checked      # noqa: F401


@pytest.fixture(autouse=True)
def integrity():
    """After each test, everything that its engines count is owned once."""
    yield
    if checked := sys.modules.get("checked"):
        assert checked.take_faults() == []


@pytest.fixture(scope="session")
def state_folders(tmp_path_factory):
    """A folder, and numbers for tests."""
    return tmp_path_factory.mktemp("states"), itertools.count()


@pytest.fixture(autouse=True)
def state_home(state_folders, monkeypatch):
    """Each test has a state of its own: servers that score checkpoints keep the results, and find them again."""
    folder, numbers = state_folders
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / str(next(numbers))))


def pytest_collection_finish():
    gc.freeze()         # what collecting the tests has made stays; workers that run in this process collect garbage often
    gc.collect()        # without it, Python would wait for a quarter as many new objects: descriptors are among them


@pytest.fixture(scope="session")
def default_model_path():
    """The embedded default model, fetched once by the server's own code into its normal cache."""
    from chatlm.common.hub.default_model import fetch_default_model
    return fetch_default_model()


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
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder      # of all processes of this run
    library = folder / "emulation.so"
    with FileLock(folder / "emulation.lock"):
        if not library.exists():
            compile_emulation(library)
    return library


def compile_emulation(library):
    built = library.with_suffix(".new")
    # For example, with libasan preloaded: -fsanitize=address,undefined -fno-sanitize-recover=undefined --param=asan-stack=0
    more = os.environ.get("DECODE_CORE_EMULATION_FLAGS", "").split()
    csrc = REPOSITORY / "csrc"
    subprocess.run(["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra",
                    "-Werror", *more, f"-I{csrc}", str(csrc / "cuda" / "emulation.cpp"), "-o", str(built)], check=True, timeout=170)
    built.rename(library)
