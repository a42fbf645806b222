"""`chat_server.py bundle --with-libraries`: one file for a machine that has nothing but Python; with a model, one file that is a chat."""

import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import psutil
import pytest
from packaging.requirements import Requirement

import chat_server
from chatlm.common import bundle, contents, core, elf, gather, libraries, program, unbundle, unpack
from chatlm.common.errors import ConfigError
from limits import files_of_at_most
from nightly import WHOLE, by_day
from packed import CHECKOUT, WITHOUT_BYTECODE, WITH_ITS_BYTECODE, bytecode_in, changed, clean_environment, compiled_once, one_line, run  # noqa: F401
from powerless import powerless
from real_server import ask, events, get, post, server

pytestmark = pytest.mark.skipif(core.decode_core() is None, reason="the compiled core is not installed")
CAPITAL = "generate", "-p", "What is the capital of Japan?", "--temperature", "0", "--max-tokens", "12"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """A Python of this version without any library."""
    venv = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    return venv / "bin/python"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    file = tmp_path_factory.mktemp("packed") / "chat_server.pyz"
    made = run(CHECKOUT / "chat_server.py", "bundle", "--with-libraries", file)
    assert (made.returncode, made.stderr) == (0, "") and f"with the libraries for Python {libraries.THIS_PYTHON} on Linux" in made.stdout
    return file


@pytest.fixture(scope="module")
def talking(packed, tmp_path_factory, default_model_path):
    """The same with the default model and words of the command line, made from the bundle itself. By day it takes over that one's bytecode:
    test_bundle.py compares the bytecode that a process of a bundle makes."""
    file = tmp_path_factory.mktemp("talking") / "chat.pyz"
    command = [packed] if WHOLE else [*WITH_ITS_BYTECODE, packed]
    made = run(*command, "bundle", "--with-libraries", "--with-model", "default", "--args", "--max-batch 3 --prefix /talk", file)
    assert (made.returncode, made.stderr) == (0, "") and "and the model SmolLM2-135M-Instruct.Q4_1" in made.stdout
    return file


@pytest.fixture(scope="module")
def few(packed, tmp_path_factory):
    """A copy of the bundle that has two small libraries only, for what does not depend on which they are."""
    return with_few_libraries(packed, tmp_path_factory.mktemp("few") / "few.pyz")


@pytest.fixture
def places(tmp_path):
    """The variables of a process that finds only these folders: a home, whose cache is empty, and one for temporary files."""
    return only_places(tmp_path)


@pytest.fixture(scope="module")
def unpacked(packed, python, tmp_path_factory):
    """(folder, variables) where a start has unpacked the libraries, for all tests that then only use them."""
    folder = tmp_path_factory.mktemp("unpacked")
    starts(python, packed, only_places(folder))
    return folder, only_places(folder)


def only_places(folder):
    for name in ("home", "temporary"):
        (folder / name).mkdir(exist_ok=True)
    return clean_environment(HOME=folder / "home", TMPDIR=folder / "temporary", XDG_CACHE_HOME="", XDG_RUNTIME_DIR="")


def starts(python, file, environment, **more):
    done = run(file, "--version", python=python, env=environment, **more)
    assert (done.returncode, done.stderr) == (0, "") and "decode_core runs with" in done.stdout and "because" not in done.stdout


def may(*command):
    """Whether this user may run a command, and has it."""
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True).returncode == 0


def trees(cache):
    return sorted(path for path in (cache / "chat_server" / "libraries").iterdir() if path.name != ".lock")


def mapped_files(process):
    return {each.path for each in process.memory_maps() if each.path.startswith("/")}


# running from it


def test_a_server_runs_on_its_packed_libraries(packed, python, unpacked, tmp_path, default_model_path, monkeypatch):
    """It serves with all its processes from its own libraries alone."""
    place, places = unpacked
    monkeypatch.chdir("/")
    folder = tmp_path / "read only"
    folder.mkdir()
    shutil.copy(packed, folder)
    folder.chmod(0o555)
    log = []
    with server(default_model_path, "--tp", 2, script=folder / packed.name, python=python, env=places, log=log) as (process, url):
        said = events(post(url + "/chat/completions", ask("What is the capital of Japan?", ignored="y" * 100_000, max_tokens=12)))
        assert "Tokyo" in "".join(each.get("token", "") for each in said)
        assert "decode_core/" in get(url + "/stats")["kernels"]["linear"] and get(url + "/health")["ready"]
        tree = f"{place}/home/.cache/chat_server/libraries/"
        ours = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        roles = {next((word for word in each.cmdline() if word in ("worker", "rank", "sandbox")), "front"): mapped_files(each) for each in ours}
        assert set(roles) == {"front", "worker", "rank", "sandbox"}
        assert any("/numpy/" in name for name in roles["worker"]) and any("/tokenizers/" in name for name in roles["front"])
        for role, names in roles.items():
            assert [name for name in names if "site-packages" in name or "site/" in name and not name.startswith(tree)] == [], role
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
    assert not list((place / "temporary").iterdir()) and len(trees(place / "home/.cache")) == 1


def test_a_packed_model_chats_without_a_network(talking, python, unpacked, default_model_path):
    """The model is mapped from the bundle's file."""
    place, places = unpacked
    started = talking.read_bytes()
    assert started.startswith(default_model_path.read_bytes()) and len(started) - default_model_path.stat().st_size < 60e6
    alone = ["unshare", "-n"] if may("unshare", "-n", "true") else []
    done = subprocess.run([*alone, python, talking, *CAPITAL], capture_output=True, text=True, timeout=120, cwd="/", env=places)
    assert done.returncode == 0 and "Tokyo" in done.stdout and "Traceback" not in done.stderr
    kept = [path for path in (place / "home").rglob("*") if path.is_file() and path.stat().st_size > 50e6]
    assert kept == []                           # no copy of the model
    from chatlm.worker.weights.formats.gguf.file import read_gguf
    tensors = read_gguf(talking)[1]
    assert tensors and str(talking) in mapped_files(psutil.Process())


@pytest.mark.slow       # by day the two tests below read which words and which model a server has
def test_a_packed_model_is_served_with_its_words(talking, python, unpacked):
    place, places = unpacked
    with server(script=talking, python=python, env=places) as (process, url):
        assert get(url + "/talk/v1/models")["data"][0]["id"] == "SmolLM2-135M-Instruct.Q4_1"
        assert get(url + "/talk/stats")["workers"][0]["max_batch"] == 3
        kept = [path for path in (place / "home").rglob("*") if path.is_file() and path.stat().st_size > 50e6]
        assert kept == []                       # no copy of the model


def test_command_line_words_follow_the_kept_ones(talking, packed, python, places):
    """Words of the command line come after those that a bundle keeps."""
    def settings(file, *lines):
        code = "import json, sys; sys.path.insert(0, sys.argv.pop(1)); from chatlm.cli import with_kept_words; " \
               "from chatlm.commands import COMMANDS; " \
               "print([with_kept_words(words, COMMANDS) for words in json.loads(sys.argv[1])])"
        return eval(run("-c", code, file, json.dumps(lines), python=python, env=places).stdout)
    kept = ["--max-batch", "3", "--prefix", "/talk"]
    others = ["chat"], ["bundle", "--verify"], ["store", "x"]
    assert settings(talking, [], ["--max-batch", "4"], ["serve", "x.gguf"], *others) == [
        ["serve", *kept], ["serve", *kept, "--max-batch", "4"], ["serve", *kept, "x.gguf"], *others]
    assert settings(packed, ["x.gguf"], []) == [["x.gguf"], []]


def test_the_packed_model_is_only_the_default(talking, python, places, nanochat_fixtures):
    """The packed model is the default, and any other can be named."""
    def chosen(*words, **more):
        code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from chatlm.cli import parse_command_line; " \
               "from chatlm.commands import COMMANDS; from chatlm.common.hub.find import resolve_model; " \
               "found = resolve_model(parse_command_line(sys.argv[1:], {}, COMMANDS)); print(found.name, found.path)"
        return run("-c", code, talking, *words, python=python, env=places | more).stdout.strip()
    base = {"NANOCHAT_BASE_DIR": str(nanochat_fixtures / "gen5")}
    assert chosen() == chosen(**base) == f"SmolLM2-135M-Instruct.Q4_1 {talking}"
    assert chosen(talking) == f"chat {talking}"
    checkpoint = chosen(nanochat_fixtures / "gen5")
    assert "gen5" in checkpoint and chosen("-i", "sft", **base) == checkpoint


# unpacking


# What a start does with the libraries of the bundle that is the first argument; prints where one is
USING = "-c", "import sys; sys.path.insert(0, sys.argv[1]); from chatlm.common import libraries; libraries.use_libraries(); import idna; print(idna.__file__)"


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["few", "all"])
def test_starts_at_once_share_one_unpacked_tree(whole, packed, few, python, places, tmp_path):
    """Starts at the same time unpack once and each start uses that."""
    command, said = ([python, packed, "--version"], "decode_core runs with") if whole else ([python, *USING, few], "/home/.cache/chat_server/libraries/")
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=places, cwd="/") for _ in range(2)]
    assert all(said in process.communicate(timeout=120)[0] for process in started)
    (tree,) = trees(tmp_path / "home/.cache")
    inner = (tree / "site/numpy/_core", tree / "site/numpy/__init__.py") if whole else (tree / "site/yaml", tree / "site/yaml/__init__.py")
    assert [each.stat().st_mode & 0o777 for each in (tree.parent, tree, tree / "site", *inner)] == [0o700] * 4 + [0o400]
    first = tree.stat().st_ino, (tree / "site").stat().st_ino
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=places, cwd="/")
    assert (done.returncode, done.stderr) == (0, "") and said in done.stdout and "because" not in done.stdout
    assert trees(tmp_path / "home/.cache") == [tree] and (tree.stat().st_ino, (tree / "site").stat().st_ino) == first
    assert not list((tmp_path / "temporary").iterdir())


@pytest.fixture
def small(tmp_path):
    """A bundle with libraries of two files, and what is said of them."""
    inner = program.archive({"a.py": b"A = 1\n", "b/c/d.so": b"library"})
    said = libraries.Libraries(libraries.THIS_PYTHON, unpack.PLATFORM, "", {"libraries/x.zip": hashlib.sha256(inner).hexdigest()})
    (tmp_path / "small.pyz").write_bytes(program.archive({libraries.ABOUT: json.dumps([said]).encode(), "libraries/x.zip": inner}))
    with zipfile.ZipFile(tmp_path / "small.pyz") as opened:
        yield opened, libraries.fitting(opened)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path / "cache"


def cached_by_another(small):
    """The tree in the cache, made by a process that has ended."""
    code = "import sys, zipfile; sys.path.insert(0, sys.argv[1]); from chatlm.common import libraries; opened = zipfile.ZipFile(sys.argv[2]); " \
           "print(libraries.cached_tree(opened, libraries.fitting(opened)))"
    return Path(run("-c", code, CHECKOUT, small[0].filename, env=os.environ).stdout.strip())


def test_the_next_start_cleans_up_a_killed_one(small, cache, tmp_path, monkeypatch):
    """One that is killed while it writes leaves its files to the next start, in the cache and in a folder of its own."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    # killed where it opens the second file of its tree
    code = "import os, signal, sys, zipfile; sys.path.insert(0, sys.argv[1]); from chatlm.common import libraries; " \
           "sys.addaudithook(lambda event, words: event == 'open' and str(words[0]).endswith('/site/b/c/d.so') and os.kill(0, signal.SIGKILL)); " \
           "opened = zipfile.ZipFile(sys.argv[2]); libraries.usable_tree(opened, libraries.fitting(opened))"

    def killed_while_it_writes(pattern, folder):
        done = subprocess.run([sys.executable, "-c", code, CHECKOUT, small[0].filename], env=os.environ | {"TMPDIR": str(temporary)},
                              start_new_session=True)
        (left,) = folder.glob(pattern)
        assert done.returncode == -signal.SIGKILL and left.name == "a.py"
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    killed_while_it_writes(".part-*/site/*.py", cache / "chat_server/libraries")
    tree = libraries.usable_tree(*small)
    assert trees(cache) == [tree]
    shutil.rmtree(cache)
    cache.write_text("a file")
    killed_while_it_writes("chat_server-*/site/*.py", temporary)
    tree = libraries.usable_tree(*small)
    assert list(temporary.iterdir()) == [tree]
    libraries.remove_own(tree, os.getpid())


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_tree_is_the_user_s_whatever_the_umask(umask, small, cache):
    before = os.umask(umask)
    try:
        tree = libraries.cached_tree(*small)
    finally:
        os.umask(before)
    modes = {str(path.relative_to(tree.parent)): path.stat().st_mode & 0o777 for path in tree.rglob("*") if path.is_dir() or path.parent != tree}
    assert modes == {f"{tree.name}/{name}": 0o400 if "." in name else 0o700 for name in ("site", "site/a.py", "site/b", "site/b/c", "site/b/c/d.so")}
    assert libraries.cached_tree(*small) == tree


NOTES = {"a note of nothing": "{}", "a note that is no JSON": "{", "a deep note": "[" * 100_000 + "]" * 100_000}


@pytest.mark.parametrize("trouble", ["other bytes", "missing", "a link", "a pipe", "no note", "a note of nothing", "a note that is a pipe",
                                     "a note that is no JSON", "no lock", "a pipe as the lock", "others may write", "others may write to a folder",
                                     "a file as the tree", "a link as the tree", "a deep note", "one more module", "one more folder"])
def test_a_changed_tree_is_written_anew(trouble, small, cache, tmp_path):
    tree = cached_by_another(small)
    file, note, first = tree / "site/b/c/d.so", tree / "note.json", tree.stat().st_ino
    times = file.stat()
    if trouble == "other bytes":                # of the same size and age
        file.chmod(0o600)
        file.write_bytes(b"Library")
        file.chmod(0o400)
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif trouble.startswith("others may write"):
        (file.parent if "folder" in trouble else file).chmod(0o777)
    elif "as the tree" in trouble:
        tree.rename(tmp_path / "moved")
        tree.symlink_to(tmp_path / "moved") if "link" in trouble else tree.write_text("")
    elif trouble in NOTES:
        note.chmod(0o600)
        note.write_text(NOTES[trouble])
    elif trouble == "one more module":          # which Python would import in place of its own
        (tree / "site/sqlite3.py").write_text("raise SystemExit('executed')")
    elif trouble == "one more folder":
        (tree / "site/b/__pycache__").mkdir(mode=0o700)
    else:
        place = note if "note" in trouble else tree / "lock" if "lock" in trouble else file
        place.unlink()
        if trouble == "a link":
            file.symlink_to("/etc/hostname")
        elif "pipe" in trouble:
            os.mkfifo(place)
    assert libraries.cached_tree(*small) == tree and tree.stat().st_ino != first and not tree.is_symlink()
    assert file.read_bytes() == b"library" and not file.is_symlink()
    assert trees(cache) == [tree]               # what it was is gone
    assert libraries.cached_tree(*small) == tree


def test_a_rewritten_tree_stays_for_its_server(small, cache):
    """A tree that a server uses while it is written anew stays for it."""
    tree = libraries.cached_tree(*small)        # held by this process
    (tree / "note.json").unlink()
    assert libraries.cached_tree(*small) == tree
    (old,) = [path for path in trees(cache) if path != tree]
    assert (old / "site/a.py").is_file()


def test_a_tree_of_another_user_is_not_used(small, cache, monkeypatch):
    tree = libraries.cached_tree(*small)
    libraries.check_tree(tree)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="belongs to another user"):
        libraries.check_tree(tree)


@pytest.mark.parametrize("trouble", ["others may write", "a link", "a file", "a pipe"])
def test_a_cache_that_others_can_change_is_not_used(trouble, small, cache, tmp_path, monkeypatch):
    place = cache / "chat_server" / "libraries"
    place.parent.mkdir(parents=True)
    if trouble == "a link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    elif trouble == "others may write":
        place.mkdir()
        place.chmod(0o777)
    else:
        place.write_text("") if trouble == "a file" else os.mkfifo(place)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    tree = libraries.usable_tree(*small)
    try:
        assert tree.parent == tmp_path and tree.stat().st_mode & 0o777 == 0o700
        assert not place.is_dir() or list(place.iterdir()) == []
    finally:
        libraries.remove_own(tree, os.getpid())
    assert not tree.exists()


def test_a_tree_in_a_read_only_home_is_used(small, cache):
    tree = libraries.cached_tree(*small)
    places = cache, cache / "chat_server", tree.parent, tree
    for folder in places:
        folder.chmod(0o500)
    try:
        with powerless():
            assert libraries.usable_tree(*small) == tree
    finally:
        for folder in places:
            folder.chmod(0o700)


MOUNTED = {"read-only": "mount -t tmpfs -o ro none {home}", "noexec": "mount -t tmpfs -o noexec none {home}",
           "full": "mount -t tmpfs -o size=20m none {home}"}


@pytest.mark.parametrize("home", by_day(["noexec", "none", "read-only", "full", "of a file", "of a file, for few libraries"], "of a file, for few libraries"))
def test_without_a_home_a_private_folder_is_used(home, packed, few, python, places, tmp_path):
    """Where the home cannot be used, a private folder is, which goes at the end."""
    if home in MOUNTED:
        if not may("unshare", "-m", "true"):
            pytest.skip("this user may not mount")
        words = ["unshare", "-m", "sh", "-ec", f"{MOUNTED[home].format(home=tmp_path / 'home')}; exec \"$@\"", "sh", python]
    else:
        words = [python]
        places |= {"HOME": "" if home == "none" else str(Path(__file__))}
    command, said = ([*USING, few], str(tmp_path / "temporary/chat_server-")) if "few" in home else ([packed, "--version"], "decode_core runs with")
    done = subprocess.run([*words, *command], capture_output=True, text=True, timeout=120, cwd="/", env=places)
    assert done.returncode == 0 and done.stderr == "" and said in done.stdout
    assert list((tmp_path / "temporary").iterdir()) == []
    if home != "none":          # then it is root's own
        assert list((tmp_path / "home").iterdir()) == []


def test_where_nothing_is_writable_one_line_says_why(packed, python, places, tmp_path):
    """One line names all reasons and the remedy."""
    code = f"mount -t tmpfs -o noexec none {tmp_path}/home; mount -t tmpfs -o size=20m none {tmp_path}/temporary; mount -t tmpfs -o noexec none /dev/shm"
    words = ["unshare", "-m", "sh", "-ec", f"{code}; exec \"$@\"", "sh", python, packed, "--version"]
    if not may("unshare", "-m", "true"):
        pytest.skip("this user may not mount")
    line = one_line(subprocess.run(words, capture_output=True, text=True, timeout=120, cwd="/", env=places))
    assert "its libraries can be unpacked nowhere (no program may be run from" in line and "No space left on device" in line
    assert "set TMPDIR or XDG_CACHE_HOME to a folder of yours with 150 MB free" in line


def test_unused_trees_go_after_a_month(tmp_path):
    """Trees that are in use stay, and others go after a month."""
    folder = tmp_path / "libraries"
    for name, days in (("old", 40), ("new", 2), ("mine", 40), ("held", 40), (".part-old", 0), (".part-held", 0)):
        (folder / name).mkdir(parents=True)
        (folder / name / "lock").write_bytes(b"x")
        os.utime(folder / name, (time.time() - days * 86400,) * 2)
    (folder / ".part-bare").mkdir()
    code = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; from chatlm.common.libraries import hold\n" \
           "[hold(Path(name, 'lock')) for name in sys.argv[2:]]; print('held', flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", code, CHECKOUT, folder / "held", folder / ".part-held"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    libraries.remove_leftovers(folder, folder / "mine")
    assert sorted(path.name for path in folder.iterdir()) == [".part-held", "held", "mine", "new"]
    holder.communicate("\n", timeout=20)
    libraries.remove_leftovers(folder, folder / "mine")
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "new"]


# where it cannot run


@pytest.fixture(scope="module")
def hollow(packed, tmp_path_factory):
    """The bundle without what is in the archives of its libraries, for what ends before they are read."""
    with zipfile.ZipFile(packed) as source:
        archives = [name for name in source.namelist() if name.endswith(".zip")]
    return changed(packed, tmp_path_factory.mktemp("hollow") / "hollow.pyz", dict.fromkeys(archives, b""))


def about(file, **changes):
    with zipfile.ZipFile(file) as source:
        return {libraries.ABOUT: json.dumps([each._replace(**changes) for each in libraries.packed_libraries(source)]).encode()}


@pytest.mark.parametrize("changes, words", [
    ({"python": "3.99", "platform": "Linux x86_64 cpython-399-x86_64-linux-gnu"}, "was made for Python 3.99 on Linux x86_64, and this is Python 3."),
    ({"platform": "Linux riscv64 cpython-311-riscv64-linux-gnu"}, "on Linux riscv64, and this is Python"),
    ({"platform": "Linux x86_64 cpython-311-x86_64-linux-musl"}, "on Linux x86_64 with musl, and this is Python"),
    ({"glibc": "2.99"}, "was made for glibc 2.99 or newer, and this is 2.")])
def test_a_wrong_python_or_platform_is_one_line(changes, words, hollow, places, tmp_path):
    """The line says for which it was made."""
    line = one_line(run(changed(hollow, tmp_path / "other.pyz", about(hollow, **changes)), "model.gguf", env=places))
    assert words in line and not list((tmp_path / "home").iterdir())


def test_a_python_that_is_here_and_fits_is_named(hollow, places, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3.99").write_text("#!/bin/sh\n")
    (tmp_path / "bin/python3.99").chmod(0o755)
    other = changed(hollow, tmp_path / "other.pyz", about(hollow, python="3.99", platform=" ".join([*unpack.PLATFORM.split()[:2], "cpython-399"])))
    assert one_line(run(other, env=places | {"PATH": str(tmp_path / "bin")})).endswith("; try python3.99, which is here")


def test_a_wrong_byte_in_libraries_unpacks_nothing(packed, hollow, places, tmp_path):
    """A byte that is wrong in the libraries is one line and nothing is unpacked."""
    data = bytearray(packed.read_bytes())
    with zipfile.ZipFile(packed) as source:
        entry = next(entry for entry in source.infolist() if entry.filename.endswith(".zip"))
        data[entry.header_offset + entry.compress_size // 2] ^= 1
    file = tmp_path / "damaged.pyz"
    file.write_bytes(data)
    assert "is damaged (" in (line := one_line(run(file, "--version", env=places))) and line.endswith("copy it again")
    assert trees(tmp_path / "home/.cache") == [] and not list((tmp_path / "temporary").iterdir())
    sums = {"archives": {entry.filename: "0" * 64}}
    other = changed(hollow, tmp_path / "other.pyz", about(hollow, **sums))
    assert f"is damaged ({entry.filename} is not what was packed); copy it again" in one_line(run(other, "--version", env=places))


@pytest.mark.parametrize("name", ["../outside", "/etc/outside", "a/../../outside"])
def test_a_name_that_leaves_the_tree_is_refused(name, tmp_path):
    inner = program.archive({name: b"x"})
    outer = tmp_path / "x.pyz"
    outer.write_bytes(program.archive({"libraries/x.zip": inner}))
    packed = libraries.Libraries("3.11", "", "", {"libraries/x.zip": hashlib.sha256(inner).hexdigest()})
    with zipfile.ZipFile(outer) as opened, pytest.raises(libraries.DamagedBundle, match="outside of its folder"):
        list(libraries.packed_files(opened, packed))


# making it


@pytest.mark.slow
def test_equal_inputs_make_equal_bytes(packed, tmp_path):
    again = tmp_path / "again.pyz"
    assert run(CHECKOUT / "chat_server.py", "bundle", "--with-libraries", again).returncode == 0
    assert again.read_bytes() == packed.read_bytes()


def remade(file, monkeypatch, target, **wanted):
    """What `bundle` says that makes a file from the bundle `file`."""
    for module in (program, bundle):
        monkeypatch.setattr(module, "program_root", lambda: file)
    return bundle.write_bundle(target, bundle.Wanted(**wanted))


@pytest.mark.slow       # by day the next test, and test_a_bundle_remakes_itself_to_the_byte of test_bundle.py
def test_a_bundle_makes_itself_again(packed, talking, python, unpacked, tmp_path, monkeypatch):
    """A bundle makes the same again, and one without libraries. talking was made by a process of `packed`."""
    again = tmp_path / "again.pyz"
    remade(packed, monkeypatch, again, libraries=True)
    assert again.read_bytes() == packed.read_bytes() and packed.stat().st_size < 60e6
    plain = tmp_path / "plain.pyz"      # without them: the core comes from the tree
    assert "with decode_core for Linux" in run(*WITHOUT_BYTECODE, packed, "bundle", plain, python=python, env=unpacked[1]).stdout


def test_a_bundle_with_a_model_makes_itself_again(talking, packed, tmp_path, monkeypatch):
    if not WHOLE:
        monkeypatch.setattr(bundle, "compiled", lambda files: bytecode_in(packed))
    again = tmp_path / "again.pyz"
    remade(talking, monkeypatch, again, libraries=True, model=talking, words=("--max-batch", "3", "--prefix", "/talk"))
    assert again.read_bytes() == talking.read_bytes()


def test_what_is_installed_is_packed(packed):
    """What is packed is what is installed with the program, and hides nothing of Python."""
    declared = re.search(r"^dependencies = \[\n(.*?)^\]", (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]
    wanted = {Requirement(each).name: Requirement(each).marker for each in re.findall(r'"([^"]+)"', declared)}
    assert wanted == {Requirement(each).name: Requirement(each).marker for each in gather.REQUIRED}
    with zipfile.ZipFile(packed) as source:
        names = {name for name, _ in libraries.packed_files(source, libraries.fitting(source))}
    tops = {name.partition("/")[0].removesuffix(".py") for name in names}
    assert {"aiohttp", "numpy", "decode_core", "numpy.libs"} <= tops and not tops & {*sys.stdlib_module_names, "chatlm", "chat_server"}
    assert "torch" not in tops and "pytest" not in tops
    for distribution in gather.installed(gather.REQUIRED):      # their licences come along
        licences = {str(path) for path in distribution.files if re.search(r"\.dist-info/.*licen[cs]e", str(path), re.IGNORECASE)}
        assert licences <= names


@pytest.mark.parametrize("words, reason", [
    (["--pythons", "3.11"], "--pythons needs --with-libraries"), (["--wheels", "."], "--wheels needs --with-libraries"),
    (["--with-libraries", "--pythons", "3.9"], "'3.9' is not a version of Python such as 3.11; it must be 3.10 or newer"),
    (["--with-libraries", "--pythons", "3.11;3.12"], "'3.11;3.12' is not a version"),
    (["--with-libraries", "--pythons", "3.98"], "the command python3.98 is not here"),
    (["--with-libraries", "--without-core"], "has no torch, which would compute instead"),
    (["--with-libraries", "--wheels", "/missing"], "--wheels /missing: there is no chat_server-*-cp"),
    (["--args", "--no-such-flag"], "unrecognized arguments: --no-such-flag"), (["--args", "--port 'x"], "No closing quotation"),
    (["--args", "--api-key secret"], "everyone who gets the file could read a key"), (["--args", "--help"], "--help and --version run nothing"),
    (["--with-model", "/missing.gguf"], "No such file"), (["--with-model", "/etc/hostname"], "is not a GGUF file"),
    (["--verify", "--unpack", "x"], "are two commands"), (["--verify", "--with-libraries"], "is for making a bundle, not for --verify"),
    (["--verify"], "is for a bundle that runs"), (["--unpack", "x"], "is for a bundle that runs"),
    (["--unpack", "x", "file"], "FILE is for making a bundle"), (["--verify", "/etc/hostname"], "/etc/hostname is damaged (it does not end as a bundle does)"),
    (["--verify", "/missing"], "cannot read /missing: No such file"), (["--unpack", ""], "--unpack: it is empty"), ([""], "FILE: it is empty"),
    (["--with-libraries", "--with-model", ""], "--with-model: it is empty"), (["--with-libraries", "--wheels", ""], "--wheels: it is empty"),
    (["--args", "store x"], "cannot begin with store"), (["--args", "bundle x"], "cannot begin with bundle"),
    (["--with-model", "default", "--args", "x.gguf"], "--args names a MODEL"), (["--with-model", "default", "--args", "a b"], "--args names a MODEL"),
    (["--with-model", "default", "--args", "--port 80 --models x"], "--args names a MODEL")])
def test_words_that_conflict_are_one_line(words, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert chat_server.main(["bundle", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line and "Traceback" not in line and list(tmp_path.iterdir()) == []


def test_a_hugging_face_folder_cannot_be_packed(tmp_path, capsys):
    """A folder of Hugging Face is refused as a model."""
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("{}")
    assert chat_server.main(["bundle", "--with-model", str(tmp_path)]) == 2
    assert "a bundle takes a model of one GGUF file, and this is Hugging Face folder" in capsys.readouterr().err


def test_a_model_too_large_for_the_disk_leaves_nothing(default_model_path, tmp_path, capsys):
    with files_of_at_most(50 << 20):
        assert chat_server.main(["bundle", "--without-core", "--with-model", str(default_model_path), str(tmp_path / "x.pyz")]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == "" and "File too large" in line and list(tmp_path.iterdir()) == []


# checking it, and unpacking it


@pytest.mark.slow       # by day the two tests below, of which one has a bundle with few libraries
def test_verify_reads_a_large_bundle(talking, python, unpacked):
    done = run(talking, "bundle", "--verify", python=python, env=unpacked[1])
    assert done.returncode == 0 and done.stderr == ""
    for words in ("the program is what was packed", "the model SmolLM2-135M-Instruct.Q4_1 is what was packed", "files of the libraries for Python",
                  "its files are what was packed", f"its SHA-256 is {unbundle.sha256_of(talking)}"):
        assert words in done.stdout


def test_verify_reads_each_byte(few, python, places, tmp_path):
    """`--verify` reads each byte of the file and of what was unpacked."""
    assert run(*USING, few, python=python, env=places).returncode == 0
    done = run(few, "bundle", "--verify", python=python, env=places)
    assert done.returncode == 0 and done.stderr == ""
    for words in ("the program is what was packed", "files of the libraries for Python", "its files are what was packed",
                  f"its SHA-256 is {unbundle.sha256_of(few)}"):
        assert words in done.stdout
    (tree,) = trees(tmp_path / "home/.cache")
    (tree / "site/yaml/__init__.py").chmod(0o600)
    (tree / "site/yaml/__init__.py").write_text("")
    (tree / "site/idna/core.py").unlink()
    done = run(few, "bundle", "--verify", python=python, env=places)
    assert done.returncode == 2 and f"{tree}/site has files that are not what was packed: idna/core.py, yaml/__init__.py; remove {tree}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def with_few_libraries(packed, target):
    """A copy of the bundle that has two small libraries only."""
    with zipfile.ZipFile(packed) as source:
        (said,) = libraries.packed_libraries(source)
        files = {name: data for name, data in libraries.packed_files(source, said) if name.startswith(("idna/", "yaml/"))}
    (name,) = said.archives
    few = program.archive(files)
    return changed(packed, target, {name: few} | about(packed, archives={name: hashlib.sha256(few).hexdigest()}))


@pytest.mark.parametrize("part", ["model", "libraries", "program"])
def test_verify_finds_a_single_bit(part, talking, tmp_path, capsys):
    data = bytearray(talking.read_bytes())
    with zipfile.ZipFile(talking) as source:
        entry = source.getinfo("static/chat.js") if part == "program" else next(each for each in source.infolist() if each.filename.endswith(".zip"))
        data[50_000_000 if part == "model" else entry.header_offset + 60 + entry.compress_size // 2] ^= 1
    file = tmp_path / "damaged.pyz"
    file.write_bytes(data)
    assert chat_server.main(["bundle", "--verify", str(file)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{file} is damaged (" in line and "copy it again" in line


def test_an_unpacked_folder_runs_without_a_cache(talking, python, places, tmp_path, default_model_path):
    folder = tmp_path / "shared place"
    done = run(talking, "bundle", "--unpack", folder, python=python, env=places)
    assert f"{folder}: run it with Python {libraries.THIS_PYTHON}: python3 " in done.stdout
    assert done.returncode == 0 and f"--max-batch 3 --prefix /talk '{folder}/SmolLM2-135M-Instruct.Q4_1.gguf'" in done.stdout
    assert not list((tmp_path / "home").iterdir())
    model = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
    starts(python, folder / "chat_server.py", places)
    if WHOLE:       # by day the packed model answers in test_a_packed_model_chats_without_a_network
        said = run(folder / "chat_server.py", CAPITAL[0], model, *CAPITAL[1:], python=python, env=places)
        assert said.returncode == 0 and "Tokyo" in said.stdout
    assert model.stat().st_size == default_model_path.stat().st_size
    assert not (tmp_path / "home/.cache/chat_server").exists() and not list((tmp_path / "temporary").iterdir())
    for place, words in ((folder, "exists and is not an empty folder"), (tmp_path / "missing/x", "No such file"), (model, "is not an empty folder")):
        with pytest.raises(ConfigError, match=words):
            unbundle.unpack_bundle(talking, place)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_nodes_of_ray_get_no_packed_model(talking, default_model_path, monkeypatch, tmp_path):
    """Nodes of Ray get the program without the model."""
    monkeypatch.setattr(program, "program_root", lambda: talking)
    monkeypatch.setattr(contents, "program_root", lambda: talking)
    contents.own_contents.cache_clear()
    try:
        model = contents.own_contents().model
        (tmp_path / "sent.pyz").write_bytes(program.program_bytes(model.size))
    finally:
        contents.own_contents.cache_clear()
    assert model.size == default_model_path.stat().st_size
    with zipfile.ZipFile(tmp_path / "sent.pyz") as sent:
        assert sent.testzip() is None and "chatlm/common/processes/start.py" in sent.namelist()


def write_wheel(path, files):
    with zipfile.ZipFile(path, "w") as wheel:       # not compressed, which takes a second
        for name, data in files.items():
            wheel.writestr(name, data)


def test_pip_fetches_what_wheels_have_the_core_for(tmp_path, monkeypatch):
    """Without pip and without another Python: what becomes of wheels."""
    wheel = tmp_path / f"chat_server-0.1.0-cp399-cp399-manylinux_2_17_{unpack.PLATFORM.split()[1]}.whl"
    files = program.program_sources() | {"decode_core/_core.cpython-399.so": Path(core.decode_core().__file__).read_bytes(), "decode_core/__init__.py": b"",
                                         "chat_server-0.1.0.data/purelib/x.py": b"", "chat_server-0.1.0.data/scripts/y": b""}
    write_wheel(wheel, files)
    found = gather.core_of_wheel(tmp_path, "3.99")
    assert set(found) == {"decode_core/_core.cpython-399.so", "decode_core/__init__.py"}
    assert gather.Gathered("3.99", "", "", found).glibc == ".".join(map(str, elf.glibc_of(found["decode_core/_core.cpython-399.so"])))
    assert "x.py" in gather.files_of_wheel(wheel) and "y" not in "".join(map(str, gather.files_of_wheel(wheel)))[:1]
    write_wheel(wheel, files | {"chatlm/common/interface.py": files["chatlm/common/interface.py"].replace(b"INTERFACE = ", b"INTERFACE = 1")})
    with pytest.raises(ConfigError, match="was made from another version"):
        gather.core_of_wheel(tmp_path, "3.99")


@pytest.mark.skipif(not shutil.which("readelf"), reason="binutils are not here")
def test_needs_of_glibc_are_those_of_readelf():
    """What libraries need of glibc is what readelf says."""
    found = [path for distribution in gather.installed(("numpy", "tokenizers", "llguidance")) for path in map(distribution.locate_file, distribution.files)
             if ".so" in path.name] + [Path(core.decode_core().__file__), Path(shutil.__file__).parent / "lib-dynload/_ctypes.so"]
    compared = set()
    for path in filter(os.path.isfile, found):
        said = subprocess.run(["readelf", "-V", "-W", path], capture_output=True, text=True, check=True).stdout
        strong = re.findall(r"Name: GLIBC_(2[.\d]+)  Flags: (?!.*WEAK)", said)
        assert elf.glibc_of(path.read_bytes()) == max((tuple(map(int, version.split("."))) for version in strong), default=()), path
        compared.add(max(strong, default=""))
    assert len(compared) > 2
    assert elf.glibc_of(b"") == elf.glibc_of(b"\x7fELF\1\1") == ()


def needed_libraries(path):
    said = subprocess.run(["readelf", "-d", "-W", path], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"\(NEEDED\)\s+Shared library: \[(.*?)\]", said))


def test_libraries_need_nothing_newer_than_glibc_2_28(packed, tmp_path):
    """All libraries but the optional ones; and they need nothing else of the system."""
    with zipfile.ZipFile(packed) as source:
        compiled = {name: data for name, data in libraries.packed_files(source, libraries.fitting(source)) if data.startswith(b"\x7fELF")}
    assert len(compiled) > 20 and all(".so" in name for name in compiled)
    ours = {name for name in compiled if name.startswith("decode_core/")}      # compiled here: a release's wheels have their own bound
    newer = {name for name in compiled.keys() - ours if elf.glibc_of(compiled[name]) > (2, 28)}
    assert {name.partition("/")[0] for name in newer} <= {*libraries.OPTIONAL}, newer
    if not shutil.which("readelf"):
        return
    needed = set()
    for number, data in enumerate(compiled.values()):
        (tmp_path / str(number)).write_bytes(data)
        needed |= needed_libraries(tmp_path / str(number))
    of_glibc = {each for each in needed if re.match(r"(ld-linux.*|lib(c|m|dl|rt|pthread|util))\.so\.\d$", each)}
    assert needed - of_glibc - {Path(name).name for name in compiled} == {*libraries.SYSTEM} and of_glibc


def test_a_lacking_system_library_is_one_line(small, cache, tmp_path, monkeypatch):
    """A library that the system lacks is one line and leaves nothing."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setitem(libraries.SYSTEM, "libnone.so.9", "none9, or none")
    with pytest.raises(ConfigError, match=r"^its libraries need libnone.so.9 of this system \(libnone.so.9: .*\); install the package none9, or none$"):
        libraries.usable_tree(*small)
    assert trees(cache) == [] and {path.name for path in tmp_path.iterdir()} == {"cache", "small.pyz"}
    monkeypatch.delitem(libraries.SYSTEM, "libnone.so.9")
    assert libraries.usable_tree(*small).parent.name == "libraries"


def test_an_old_system_does_without_optional_libraries(monkeypatch):
    """An optional library for which the system is too old counts as not installed."""
    needed = {path.partition("/")[0]: elf.glibc_of(data) for path, data in gather.installed_libraries().items() if "llguidance/_lib" in path}
    assert needed and {name: libraries.version_numbers(version) for name, version in libraries.OPTIONAL.items()} == needed
    for version, missing in (("2.29", True), ("2.30", False), ("", False)):
        with monkeypatch.context() as patched:
            patched.setattr(libraries, "glibc", lambda: version)
            patched.setattr(sys, "path", [*sys.path])
            patched.setitem(sys.modules, "llguidance", None)        # so that it is put back
            del sys.modules["llguidance"]
            libraries.use_site("/nowhere")
            assert (importlib.util.find_spec("llguidance") is None) == missing


def test_files_shared_by_pythons_are_packed_once():
    made = [gather.Gathered(python, "", "", files) for python, files in (
        ("3.11", {"a.py": b"1", "b.so": b"2"}), ("3.12", {"a.py": b"1", "b.so": b"3"}), ("3.13", {"a.py": b"1", "b.so": b"3", "c": b""}))]
    assert dict(bundle.shared_files(made)) == {("3.11", "3.12", "3.13"): {"a.py": b"1"}, ("3.11",): {"b.so": b"2"},
                                               ("3.12", "3.13"): {"b.so": b"3"}, ("3.13",): {"c": b""}}
