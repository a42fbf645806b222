"""`chat_server.py bundle`: one file that runs alone, and what it says where it cannot."""

import ast
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest

import chat_server
from chatlm.common import bundle, core, program, unpack
from chatlm.common.errors import ConfigError
from limits import files_of_at_most
from nightly import WHOLE, by_day
from packed import BARE, CHECKOUT, KERNELS, WITHOUT_BYTECODE, bundled, changed, clean_environment, kernels, one_line, run  # noqa: F401
from real_server import get, post, server

needs_core = pytest.mark.skipif(core.decode_core() is None, reason="the compiled core is not installed")


def version(file, **more):
    """What --version says of the kernels, from a bundle."""
    done = run(file, "--version", env=clean_environment(**more))
    (line,) = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    return line.partition("; ")[2]


@pytest.fixture(autouse=True)
def without_bytecode(monkeypatch):
    """Bundles that this process makes: a Python of its own makes the bytecode, which is compared where a bundle's own process makes another."""
    monkeypatch.setattr(bundle, "compiled", lambda files: {})


@pytest.fixture
def cache(tmp_path):
    """An empty cache for compiled cores."""
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def cache_of_a_start(bundled, tmp_path_factory):
    cache = tmp_path_factory.mktemp("unpacked") / "cache"
    kernels(bundled, XDG_CACHE_HOME=cache)
    return cache


@pytest.fixture
def filled_cache(cache_of_a_start, cache):
    """The cache after a start."""
    return shutil.copytree(cache_of_a_start, cache)


def about(file, **changes):
    """What the bundle says of its core, changed, as a file of it."""
    with zipfile.ZipFile(file) as source:
        return {unpack.ABOUT: json.dumps(unpack.about_core(source)._replace(**changes)).encode()}


# running from it


@pytest.fixture
def alone(bundled, tmp_path):
    """The bundle in a read-only folder with nothing beside it."""
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(bundled, folder)
    folder.chmod(0o555)
    yield folder / bundled.name
    assert [path.name for path in folder.iterdir()] == [bundled.name]


def test_a_bundle_alone_serves_everything(alone, cache, default_model_path, monkeypatch):
    """The page and the APIs, with ranks and its core; it ends on Ctrl-C."""
    monkeypatch.chdir("/")
    log = []
    with server("--tp", 2, "--verbose", script=alone, env=clean_environment(XDG_CACHE_HOME=cache), log=log) as (process, url):
        answer = json.load(post(url + "/v1/chat/completions", {
            "messages": [{"role": "user", "content": "What is the capital of Japan?"}], "max_tokens": 4, "temperature": 0}))
        assert "The capital of Japan" in answer["choices"][0]["message"]["content"]
        large = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "stop": [], "metadata": {"x": "y" * 100_000}}
        assert post(url + "/v1/chat/completions", large).status == 200      # a sandbox reads it
        assert get(url + "/health")["ready"]
        for path, words in (("/", b'<base href="static/">'), ("/static/chat.js", (CHECKOUT / "static/chat.js").read_bytes()),
                            ("/static/vendor/LICENSE.katex", (CHECKOUT / "static/vendor/LICENSE.katex").read_bytes())):
            with urllib.request.urlopen(url + path, timeout=20) as response:
                assert words in response.read()
        if core.decode_core():
            assert "decode_core runs with" in "".join(log) and "decode_core/" in get(url + "/stats")["kernels"]["linear"]
            kept = {path.parent.name: path.name for path in cache.rglob("*") if path.is_file()}
            kept.pop("texts")       # the model's tokenizer
            assert [*kept.values()] == [Path(core.decode_core().__file__).name]
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0


@needs_core
def test_check_runs_from_a_bundle(alone):
    """Its report begins with which core runs; test_check.py reads the rest."""
    process = subprocess.Popen([sys.executable, alone, "check"], stdout=subprocess.PIPE, text=True, cwd="/", env=clean_environment(),
                               start_new_session=True)
    try:
        assert "decode_core runs with" in process.stdout.readline()
        assert "torch " in process.stdout.readline()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


@pytest.mark.slow
def test_check_and_terminal_run_from_a_bundle(alone, default_model_path):
    """`check` and both commands of the terminal run from a bundle."""
    assert "no op is wrong" in run(alone, "check").stdout or core.decode_core() is None
    for command in ("generate", "chat"):
        done = run(alone, command, "--prompt", "What is the capital of Japan?", "--temperature", "0", "--max-tokens", "12")
        assert done.returncode == 0 and "capital of Japan" in done.stdout and "Traceback" not in done.stderr


# making it


def test_a_bundle_remakes_itself_to_the_byte(bundled, tmp_path, monkeypatch):
    """Equal inputs make equal bytes, from a checkout and from a bundle itself."""
    again, less = tmp_path / "again.pyz", tmp_path / "less.pyz"
    # no library is needed to pass the core on
    made = run("-S", bundled, "bundle", again, env=clean_environment(PYTHONHASHSEED=7, PYTHONOPTIMIZE=2))
    assert made.returncode == 0 and again.read_bytes() == bundled.read_bytes() and again.stat().st_mode & 0o700 == 0o700
    bundle.write_bundle(again, bundle.Wanted(without_core=True))                # in this process, with all that it has loaded
    monkeypatch.setattr(program, "program_root", lambda: bundled)
    monkeypatch.setattr(bundle, "program_root", lambda: bundled)
    assert "without decode_core, as you asked" in bundle.write_bundle(less, bundle.Wanted(without_core=True))
    assert not any(name.startswith("core/") for name in zipfile.ZipFile(less).namelist())
    assert again.read_bytes() == less.read_bytes()


def test_a_bare_python_makes_and_runs_a_bundle(tmp_path):
    """A Python without any library makes a bundle without the core and runs it."""
    file = tmp_path / "new.pyz"
    made = run(*BARE, *WITHOUT_BYTECODE, CHECKOUT, "bundle", file)
    (line,) = made.stdout.splitlines()
    assert made.returncode == 0 and "without decode_core, which is not installed" in line
    assert "there is no torch to compute instead" in run(*BARE, file, "--version").stdout


def test_a_core_of_another_interface_is_not_bundled(monkeypatch):
    class Core:
        INTERFACE = 3
    monkeypatch.setattr(bundle, "find_core", lambda: (Core, ""))
    assert bundle.core_files() == ({}, f"because the installed one has another version (interface 3 instead of {core.INTERFACE})")


@pytest.mark.parametrize("target, words", [
    ("missing/x.pyz", "there is no folder"), ("/proc/x.pyz", "No such file"), ("model.gguf", "exists and is not a bundle"),
    ("folder", "exists and is not a bundle"), ("/dev/null", "exists and is not a bundle"), ("x" * 300, "name too long")])
def test_an_unwritable_bundle_is_one_line(target, words, tmp_path):
    """A file that cannot be written or is something else is one line."""
    (tmp_path / "model.gguf").write_text("GGUF")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=f"^cannot write .*{words}"):
        bundle.write_bundle(tmp_path / target, bundle.Wanted(without_core=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "model.gguf"]
    assert (tmp_path / "model.gguf").read_text() == "GGUF"


def test_a_replaced_bundle_is_whole_at_all_times(tmp_path, capsys):
    file, link = tmp_path / "x.pyz", tmp_path / "link.pyz"
    bundle.write_bundle(file, bundle.Wanted(without_core=True))
    link.symlink_to(file)
    before = file.read_bytes()
    with files_of_at_most(len(before) // 2):
        assert chat_server.main(["bundle", "--without-core", str(link)]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == "" and f"cannot write {link}: File too large" in line
    assert file.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    file.write_bytes(program.archive({"__main__.py": b"", "chat_server.py": b"older"}))
    bundle.write_bundle(link, bundle.Wanted(without_core=True))
    assert file.read_bytes() == before and link.is_symlink() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("words", [["--with-core"], ["a.pyz", "b.pyz"], ["--port", "80"]])
def test_wrong_words_are_one_line(words, capsys):
    assert chat_server.main(["bundle", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("chat_server: ")


def test_a_mistyped_command_is_told_its_name(capsys):
    assert chat_server.main(["bundel", "--port", "0"]) == 2     # 8000 may be taken
    assert "did you mean the command bundle?" in capsys.readouterr().err


# what it says where it cannot run


def test_a_script_copied_alone_names_bundle(tmp_path):
    """The script copied alone names the command that makes a bundle."""
    shutil.copy(CHECKOUT / "chat_server.py", tmp_path)
    assert "`python chat_server.py bundle`" in one_line(run(*BARE, tmp_path / "chat_server.py"))


@pytest.mark.parametrize("models", by_day([[], ["a"], ["a", "b"]], [], ["a", "b"]))
def test_missing_libraries_are_named_in_one_line(models):
    """With several models a sandbox is being started when the server gives up."""
    line = one_line(run(*BARE, CHECKOUT / "chat_server.py", *models, "--port", "0"))
    assert "needs the Python packages aiohttp, numpy" in line or "a: No such file" in line or "no model at 'a'" in line


def test_old_pythons_read_a_bundle_s_first_code():
    tree = ast.parse(bundle.MAIN, feature_version=(3, 4))
    assert not any(isinstance(node, (ast.JoinedStr, ast.NamedExpr, ast.AnnAssign)) for node in ast.walk(tree))
    test, stop = tree.body[4].test, tree.body[4].body[0]
    assert ast.unparse(test) == "sys.version_info < (3, 10)" and "needs Python 3.10" in ast.unparse(stop)
    script = ast.parse((CHECKOUT / "chat_server.py").read_text())
    imports = [number for number, node in enumerate(script.body) if isinstance(node, (ast.Import, ast.ImportFrom))]
    guards = [number for number, node in enumerate(script.body) if isinstance(node, ast.If)][:3]
    assert [ast.unparse(script.body[number]) for number in imports[1:4]] == ["import signal", "import sys", "import importlib.util"]
    assert imports[2] < guards[0] < imports[3] < guards[1] < guards[2] < imports[4]


@pytest.mark.parametrize("part", ["end", "half", "module", "bytecode", "page", "directory"])
def test_a_damaged_bundle_is_one_line(part, bundled, tmp_path):
    data = bytearray(bundled.read_bytes())
    with zipfile.ZipFile(bundled) as source:
        names = {"module": "chatlm/common/errors.py", "bytecode": "chatlm/front/pool/local_devices.pyc", "page": "static/chat.js"}
        if part in names:
            entry = source.getinfo(names[part])
            data[entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2] ^= 4
        elif part == "directory":
            data[data.index(b"chatlm/cli.py", source.start_dir)] ^= 4
    file = tmp_path / "damaged.pyz"
    file.write_bytes(data[:-1] if part == "end" else data[:len(data) // 2] if part == "half" else data)
    done = run(file, "--version")
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and "damaged" in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 1


# its core


@needs_core
@pytest.mark.parametrize("changes, words", [
    ({"platform": "Linux riscv64 cpython-311-riscv64-linux-gnu"}, "is for Linux riscv64 cpython-311-riscv64-linux-gnu, not for Linux"),
    ({"interface": 3}, f"has another version (interface 3 instead of {core.INTERFACE})"),
    ({"sha256": "0" * 64}, "is damaged; copy the bundle again")])
def test_a_core_that_does_not_fit_is_one_line(changes, words, bundled, tmp_path, cache):
    """A core for another platform or interface, or a damaged one: the line says what is missing."""
    other = changed(bundled, tmp_path / "other.pyz", about(bundled, **changes))
    line = kernels(other, *BARE, XDG_CACHE_HOME=cache)
    assert line.startswith(f"the bundle's decode_core {words}")
    assert f"and there is no torch to compute instead ({sys.executable} -m pip install torch)" in line
    assert not [path for path in cache.rglob("*") if path.is_file()]
    if "sha256" in changes or WHOLE:        # where a fitting one is installed, that runs; it is here
        assert f"it is the installed one, because the bundle's decode_core {words}" in kernels(other, XDG_CACHE_HOME=cache)


@needs_core
def test_a_library_the_system_refuses_is_one_line(bundled, tmp_path, cache):
    with zipfile.ZipFile(bundled) as source:
        name = unpack.about_core(source).library
    sums = {"sha256": hashlib.sha256(b"no library").hexdigest()}
    other = changed(bundled, tmp_path / "other.pyz", {name: b"no library"} | about(bundled, **sums))
    assert kernels(other, *BARE, XDG_CACHE_HOME=cache).startswith("the bundle's decode_core cannot run here (")


@needs_core
def test_a_wrong_byte_in_the_library_is_noticed(bundled, tmp_path, cache):
    data = bytearray(bundled.read_bytes())
    with zipfile.ZipFile(bundled) as source:
        entry = source.getinfo(unpack.about_core(source).library)
        data[entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2] ^= 255
    file = tmp_path / "damaged.pyz"
    file.write_bytes(data)
    line = kernels(file, *BARE, XDG_CACHE_HOME=cache)
    assert line.startswith("the bundle's decode_core cannot be read (") and "copy the bundle again" in line


@needs_core
def test_starts_at_once_unpack_one_checked_core(bundled, cache):
    """Processes that start together unpack one core, and it is checked each time."""
    environment = clean_environment(XDG_CACHE_HOME=cache)
    started = [subprocess.Popen([sys.executable, *KERNELS, bundled], stdout=subprocess.PIPE, text=True, env=environment, cwd="/") for _ in range(2)]
    lines = [process.communicate(timeout=60)[0] for process in started]
    assert all("decode_core runs with" in line and "because" not in line for line in lines)
    (library,) = [path for path in cache.rglob("*") if path.is_file()]
    folder = library.parent
    assert [each.stat().st_mode & 0o777 for each in (folder, folder.parent, library)] == [0o700, 0o700, 0o500]
    first, good = library.stat().st_ino, library.read_bytes()
    assert "decode_core runs with" in version(bundled, XDG_CACHE_HOME=cache) and library.stat().st_ino == first
    library.chmod(0o700)
    library.write_bytes(good[:-1] + b"x")
    assert "decode_core runs with" in kernels(bundled, XDG_CACHE_HOME=cache)
    assert library.read_bytes() == good and list(folder.iterdir()) == [library]


@needs_core
@pytest.mark.parametrize("trouble", ["no folder", "others may write there", "a link"])
def test_an_untrusted_cache_gives_way_to_a_folder(trouble, bundled, tmp_path, cache):
    """A cache that cannot be used or trusted is replaced by a private folder that goes at once."""
    private, place = tmp_path / "private", cache / "chat_server" / "core"
    private.mkdir()
    if trouble == "no folder":
        cache.write_text("a file")
    elif trouble == "a link":
        place.parent.mkdir(parents=True)
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir(parents=True)
        place.chmod(0o777)
    line = kernels(bundled, XDG_CACHE_HOME=cache, TMPDIR=private)
    assert "decode_core runs with" in line and "because" not in line         # the installed one would say why
    assert list(private.iterdir()) == [] and not [path for path in tmp_path.rglob("*.so")]


@needs_core
@pytest.mark.parametrize("trouble", ["a pipe", "a pipe as the folder", "a folder"])
def test_a_pipe_as_the_library_holds_nothing_up(trouble, bundled, tmp_path, filled_cache):
    """A pipe or a folder in the place of the unpacked library holds nothing up."""
    (library,) = filled_cache.rglob("*.so")
    place = library.parent if "the folder" in trouble else library
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.mkdir() if trouble == "a folder" else os.mkfifo(place)
    line = kernels(bundled, XDG_CACHE_HOME=filled_cache, TMPDIR=tmp_path)
    assert "decode_core runs with" in line and "because" not in line
    assert library.is_file() == (trouble == "a pipe")      # a pipe is replaced; beside the others the core runs from a private folder


@needs_core
def test_without_a_writable_folder_references_run(bundled, tmp_path, monkeypatch):
    monkeypatch.setattr(unpack, "cache_folder", lambda: tmp_path / "file" / "core")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(unpack, "program_root", lambda: bundled)
    with pytest.raises(unpack.UnfitCore, match=r"^cannot run here \(.*Not a directory.*; .*No such file"):
        unpack.load_bundled_core(core.INTERFACE)


@needs_core
def test_the_core_of_another_user_is_not_loaded(bundled, filled_cache, monkeypatch):
    with zipfile.ZipFile(bundled) as source:
        found = unpack.about_core(source)
        (library,) = filled_cache.rglob("*.so")
        unpack.check_library(library, found)
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(PermissionError, match="belongs to another user"):
            unpack.check_library(library, found)


def test_unused_libraries_of_other_versions_go(tmp_path):
    """Libraries of other versions go when they have not been used."""
    for name, days in (("old", 40), ("new", 2), ("mine", 40)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "library.so").write_text("")
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    unpack.remove_unused(tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new"]


def test_ray_s_nodes_get_the_bundle_that_runs(bundled, monkeypatch):
    sent = zipfile.ZipFile(io.BytesIO(program.program_bytes()))
    assert set(sent.namelist()) == set(program.program_sources())
    monkeypatch.setattr(program, "program_root", lambda: bundled)
    assert program.program_bytes() == bundled.read_bytes()
    assert program.program_sources() == program.program_sources(CHECKOUT)
    assert program.program_digest(bundled) == program.program_digest(CHECKOUT)
