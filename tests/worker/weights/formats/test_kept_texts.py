"""Tokenizers that are kept in the user's cache: an attack on them changes no token and stops no start."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatlm.common.messages.requests import ModelSource
from chatlm.worker.weights.formats.gguf import description, kept_texts
from chatlm.worker.weights.formats.gguf.file import read_gguf
from chatlm.worker.weights.formats.gguf.header import Metadata
from chatlm.worker.weights.formats.gguf.kept_texts import MOST_KEPT
from patching import patch

ROOT = Path(__file__).resolve().parents[4]
OTHER_USER = 12345


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of kept texts, which is not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/chat_server/texts"


@pytest.fixture
def metadata(default_model_path) -> Metadata:
    return read_gguf(default_model_path)[0]


@pytest.fixture
def made(monkeypatch) -> list:
    """The paths for which a text was made, one each time."""
    calls = []

    def noted(path, metadata, make=description.made_text):
        calls.append(path)
        return make(path, metadata)

    patch(monkeypatch, description, "made_text", noted)
    return calls


def texts_of(metadata, path=Path("model.gguf")):
    return description.kept_texts(path, metadata)


def the_file(cache: Path) -> Path:
    [path] = cache.iterdir()
    return path


def test_a_text_is_made_once(cache, metadata, made):
    """It is the one that is made without the cache, to the byte, and only its user may read it."""
    expected = description.gguf_texts(Path("model.gguf"), metadata)
    made.clear()
    first, again = texts_of(metadata), texts_of(metadata)
    assert first == again == expected and len(made) == 1
    assert (cache.stat().st_mode & 0o777, the_file(cache).stat().st_mode & 0o777) == (0o700, 0o600)


def test_the_vocabulary_is_in_the_order_of_its_texts(cache, metadata):
    """`tokenizers` reads it faster so."""
    vocabulary = json.loads(texts_of(metadata)[0].payload)["model"]["vocab"]
    assert [*vocabulary] == sorted(vocabulary) and sorted(vocabulary.values()) == [*range(49_152)]


def test_the_name_of_the_default_model_still_decides_its_system_prompt(cache, metadata, default_model_path):
    texts_of(metadata)
    assert texts_of(metadata, default_model_path)[0].system and texts_of(metadata)[0].system is None


def test_the_log_says_again_what_is_unusual(cache, metadata, made, monkeypatch, caplog):
    def unusual(path, metadata, make=description.made_text):
        return make(path, metadata)._replace(misnamed=["<odd>"], templates=["rag"])

    patch(monkeypatch, description, "made_text", unusual)
    for _ in range(2):
        caplog.clear()
        texts_of(metadata)
        assert "<odd>" in caplog.text and "rag" in caplog.text
    assert len(made) == 1


@pytest.mark.parametrize("attack", [
    lambda data: b"", lambda data: data[:20], lambda data: data[:-1], lambda data: data + b"\0",
    lambda data: data[:32], lambda data: bytes(len(data)), lambda data: data[:1000] + b"\1" + data[1001:],
    lambda data: data[:-1] + bytes([data[-1] ^ 1])],
    ids=["empty", "cut in its digest", "a byte less", "a byte more", "no content", "zeros", "a byte of the text",
         "a bit of the table"])
def test_a_damaged_file_is_made_again(cache, metadata, made, attack):
    expected = texts_of(metadata)
    path = the_file(cache)
    whole = path.read_bytes()
    path.write_bytes(attack(whole))
    assert texts_of(metadata) == expected and len(made) == 2
    assert the_file(cache).read_bytes() == whole


def as_link(path):
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def as_pipe(path):
    path.unlink()
    os.mkfifo(path)


def as_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("attack", [
    as_link, as_pipe, as_folder, lambda path: path.chmod(0o666), lambda path: path.parent.chmod(0o777),
    lambda path: os.chown(path, OTHER_USER, -1), lambda path: os.chown(path.parent, OTHER_USER, -1),
    lambda path: as_link(path.parent)],
    ids=["a link", "a pipe", "a folder", "others may write it", "others may write the folder",
         "another's file", "another's folder", "a linked folder"])
def test_what_others_could_have_written_is_not_read(cache, metadata, made, attack):
    expected = texts_of(metadata)
    try:
        attack(the_file(cache))
    except PermissionError:
        pytest.skip("only root gives files away")
    assert texts_of(metadata) == expected and len(made) == 2


def looks(path: Path) -> tuple[int, int, int]:
    """What the system says of a file: its time, inode and size."""
    found = os.stat(path)
    return found.st_mtime_ns, found.st_ino, found.st_size


def test_any_other_byte_of_the_metadata_has_a_text_of_its_own(cache, default_model_path, tmp_path, made):
    """Edited in place, with the size, the inode and the times that it had."""
    model = tmp_path / "model.gguf"
    shutil.copyfile(default_model_path, model)
    before = looks(model)
    texts = texts_of(read_gguf(model)[0], model)
    with open(model, "r+b") as file:
        at = file.read(1 << 20).index(b"\x04\0\0\0\0\0\0\0word") + 8
        file.seek(at)
        file.write(b"WXYZ")
    os.utime(model, ns=(before[0], before[0]))
    assert looks(model) == before
    edited = texts_of(read_gguf(model)[0], model)
    assert b'"WXYZ"' in edited[0].payload and b'"WXYZ"' not in texts[0].payload and len(made) == 2
    assert edited == description.gguf_texts(model, read_gguf(model)[0])


def test_another_version_of_the_program_makes_its_own(cache, metadata, made, monkeypatch):
    texts_of(metadata)
    monkeypatch.setattr(kept_texts, "program_sources", lambda folder: {"chatlm/new.py": b"x = 1"})
    texts_of(metadata)
    assert len(made) == 2
    monkeypatch.setattr(kept_texts, "program_sources", lambda folder: {})
    texts_of(metadata)
    texts_of(metadata)
    assert len(made) == 4 and len([*cache.iterdir()]) == 2


def test_changed_metadata_are_never_looked_for(cache, metadata, made):
    """Only what a file itself says is kept."""
    texts_of(metadata | {"tokenizer.ggml.eos_token_id": 5})
    texts_of(dict(metadata))
    assert len(made) == 2 and not cache.exists()


@pytest.mark.parametrize("place", ["/proc/self", "/dev/null", "file"])
def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch, metadata, made, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / place))
    expected = description.gguf_texts(Path("model.gguf"), metadata)
    assert texts_of(metadata) == texts_of(metadata) == expected


def test_a_full_disk_stops_nothing_and_leaves_nothing(cache, metadata, made, monkeypatch):
    class Full:
        def __init__(self, path, mode):
            path.write_bytes(b"some of it")

        def __enter__(self):
            return self

        def __exit__(self, *_):
            raise OSError(errno.ENOSPC, "no space left on the device")

        def write(self, data):
            return len(data)

    monkeypatch.setattr(kept_texts, "create", Full)
    assert texts_of(metadata) == texts_of(metadata)
    assert len(made) == 2 and [*cache.iterdir()] == []


def test_those_that_were_used_longest_ago_go(cache, metadata, made):
    cache.mkdir(mode=0o700, parents=True)
    texts_of(metadata)
    ours = the_file(cache)
    for age in range(1, 2 * MOST_KEPT):
        (cache / f"{age:064}").write_bytes(b"other")
        os.utime(cache / f"{age:064}", times=(time.time() - 60 * age,) * 2)
    os.utime(ours, times=(time.time() - 10**6,) * 2)
    texts_of(metadata)         # it is used
    ours_at_s = ours.stat().st_mtime
    assert time.time() - ours_at_s < 10**5
    kept_texts.remove_oldest(cache)
    left = {path.name for path in cache.iterdir()}
    assert ours.name in left and left - {ours.name} == {f"{age:064}" for age in range(1, MOST_KEPT)}


OPEN = """
import sys
from pathlib import Path
from chatlm.worker.weights.formats.gguf.description import kept_texts
from chatlm.worker.weights.formats.gguf.file import read_gguf
path = Path(sys.argv[1])
sys.stdin.read(1)
text, vocabulary = kept_texts(path, read_gguf(path)[0])
import hashlib
print(hashlib.sha256(text.payload + vocabulary.texts + vocabulary.ends.tobytes()).hexdigest())
"""


def test_two_servers_at_once_write_one_file(cache, default_model_path):
    command = [sys.executable, "-c", OPEN, default_model_path]
    started = [subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for _ in range(3)]
    for process in started:
        process.stdin.write("x")
        process.stdin.flush()
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert len({*outputs}) == 1 and outputs[0].strip()
    assert len([*cache.iterdir()]) == 1


def test_a_model_is_opened_with_the_kept_text(cache, default_model_path, made):
    from chatlm.common.config import Settings
    from chatlm.worker.arrays.kinds import Device
    from chatlm.worker.weights.load import open_model
    source = ModelSource("gguf", Path(default_model_path), "model", "")
    models = [open_model(source, Settings(), Device("cpu")) for _ in range(2)]
    assert len(made) == 1
    assert models[0].text == models[1].text and models[0].vocabulary == models[1].vocabulary
