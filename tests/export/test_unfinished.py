"""An export is there as a whole or not at all, and the source stays as it was."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import chat_server
import pytest
from chatlm.common.errors import ConfigError
from chatlm.export.unfinished import unfinished
from exported import export, refused
from families import make_model, save
from patching import patch

SCRIPT = chat_server.__file__


@contextmanager
def mounted(place, size):
    """A small disk of its own."""
    disk = place / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("only root mounts a disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def digest(folder):
    return {path.relative_to(folder): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
            for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_source_is_never_changed(nanochat_fixtures, tmp_path):
    before = digest(nanochat_fixtures / "gen5")
    export(nanochat_fixtures / "gen5", "-o", tmp_path / "made")
    assert digest(nanochat_fixtures / "gen5") == before and names(tmp_path) == ["made"]


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "broken link"])
def test_what_has_the_name_already_stays(kind, nanochat_fixtures, tmp_path, capfd):
    made = tmp_path / "made"
    if kind == "file":
        made.write_text("mine")
    elif kind == "broken link":
        made.symlink_to("nowhere")
    else:
        made.mkdir()
        if kind == "folder":
            (made / "mine").touch()
    assert f"{made} exists" in refused(capfd, nanochat_fixtures / "gen1", "-o", made)
    assert names(tmp_path) == ["made"]


def test_a_name_that_is_taken_meanwhile_stays(tmp_path):
    """By another program, while the weights are written."""
    with pytest.raises(ConfigError, match="exists"), unfinished(tmp_path / "made") as part:
        (part / "a").touch()
        (tmp_path / "made").mkdir()
    assert names(tmp_path) == ["made"] and names(tmp_path / "made") == []


def test_two_exports_to_one_place_do_not_meet(tmp_path):
    with unfinished(tmp_path / "made") as part:
        (part / "a").touch()
        with pytest.raises(ConfigError, match="another process is writing"), unfinished(tmp_path / "made"):
            pass
        assert names(part) == [".chat_server", "a"]
    assert names(tmp_path) == ["made"]


HELD = """
import os, signal, sys
sys.path.insert(0, {root!r})
import chat_server
from chatlm.export import hub_folder
def hang(*_):
    print("writing", flush=True)
    signal.pause()
hub_folder.write_weights = hang
sys.exit(chat_server.main(["export", {source!r}, "-o", {target!r}]))
"""


def held_export(source, target):
    """An export that has written all but the weights, and waits."""
    code = HELD.format(root=os.path.dirname(SCRIPT), source=str(source), target=str(target))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_killed_export_leaves_no_name_and_the_next_begins_anew(nanochat_fixtures, tmp_path):
    target = tmp_path / "made"
    process = held_export(nanochat_fixtures / "gen3", target)
    process.kill()
    process.wait()
    assert not target.exists() and names(tmp_path) == [".made.unfinished"]
    (tmp_path / ".made.unfinished" / "rubbish").touch()
    export(nanochat_fixtures / "gen3", "-o", target)
    assert names(tmp_path) == ["made"] and "rubbish" not in names(target)


def test_an_interrupted_export_leaves_nothing(nanochat_fixtures, tmp_path):
    process = held_export(nanochat_fixtures / "gen3", tmp_path / "made")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130 and names(tmp_path) == []


INTERRUPTED = """
import os, shutil, signal, sys
sys.path.insert(0, {root!r})
import chat_server
from chatlm.export import unfinished
calls = []
def interrupted(real):
    def call(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        calls.append(real.__name__)
        return real(*arguments, **options)
    return call
for name in {names!r}:
    place = shutil if hasattr(shutil, name) else unfinished
    setattr(place, name, interrupted(getattr(place, name)))
status = chat_server.main(["export", {source!r}, "-o", {target!r}])
print(status, *calls)
"""


@pytest.mark.parametrize("functions", [["make"], ["locked"], ["refuse_others"], ["empty", "rmtree"], ["keep"], ["keep", "rmtree"]])
def test_an_export_that_is_interrupted_at_any_moment_leaves_nothing(functions, nanochat_fixtures, tmp_path):
    """While its folder is made, and again while that is removed."""
    code = INTERRUPTED.format(root=os.path.dirname(SCRIPT), source=str(nanochat_fixtures / "gen3"), target=str(tmp_path / "made"),
                                 names=functions)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[0] == "130" and {*done.stdout.split()[1:]} <= {*functions} and "Traceback" not in done.stderr, done
    assert names(tmp_path) == []


def test_a_second_export_says_that_another_process_writes(nanochat_fixtures, tmp_path, capfd):
    process = held_export(nanochat_fixtures / "gen3", tmp_path / "made")
    assert "another process is writing" in refused(capfd, nanochat_fixtures / "gen1", "-o", tmp_path / "made")
    process.kill()
    process.wait()


def test_a_full_disk_is_one_line(nanochat_fixtures, tmp_path, capfd):
    with mounted(tmp_path, "200k") as disk:
        line = refused(capfd, nanochat_fixtures / "gen5", "-o", disk / "made")
        assert "no room for" in line and "bytes, and" in line and names(disk) == []


def test_a_disk_that_fills_up_meanwhile_is_one_line(nanochat_fixtures, tmp_path, capfd, monkeypatch):
    """Another program fills it while the weights are written."""
    from chatlm.export import unfinished as module
    patch(monkeypatch, module, "has_room", lambda *_: True)
    with mounted(tmp_path, "200k") as disk:
        line = refused(capfd, nanochat_fixtures / "gen5", "-o", disk / "made")
        assert "no room for" in line and os.strerror(errno.ENOSPC) in line and names(disk) == []


@pytest.mark.parametrize(("output", "says"), [("no/where/made", "No such file"), ("file/made", "Not a directory"), ("", "empty")])
def test_a_place_that_cannot_be_is_one_line(output, says, nanochat_fixtures, tmp_path, capfd, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    assert says in refused(capfd, nanochat_fixtures / "gen1", "-o", output)


def test_a_link_in_the_unfinished_folder_s_place_is_not_followed(nanochat_fixtures, tmp_path, capfd):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (tmp_path / ".made.unfinished").symlink_to("elsewhere")
    assert "cannot write" in refused(capfd, nanochat_fixtures / "gen1", "-o", tmp_path / "made")
    assert names(tmp_path / "elsewhere") == ["mine"]


def test_a_folder_that_no_export_has_left_is_not_emptied(nanochat_fixtures, tmp_path, capfd):
    """It has the unfinished folder's name by chance; an empty one loses nothing."""
    (tmp_path / ".made.unfinished").mkdir()
    export(nanochat_fixtures / "gen1", "-o", tmp_path / "made")
    (tmp_path / ".other.unfinished").mkdir()
    (tmp_path / ".other.unfinished" / "mine").touch()
    line = refused(capfd, nanochat_fixtures / "gen1", "-o", tmp_path / "other")
    assert "has files that no export has left" in line
    assert names(tmp_path / ".other.unfinished") == ["mine"]
    assert names(tmp_path) == [".other.unfinished", "made"]
    assert ".chat_server" not in names(tmp_path / "made")


def test_a_source_that_changes_meanwhile_is_not_exported(tmp_path, capfd, monkeypatch):
    """Half of the weights would be another model's."""
    from chatlm.export import hub_folder
    save(make_model("llama2"), tmp_path / "source")
    write = hub_folder.write_weights

    def write_then_train(*arguments):
        write(*arguments)
        save(make_model("llama2", seed=1), tmp_path / "source")
    patch(monkeypatch, hub_folder, "write_weights", write_then_train)
    assert "was changed or removed" in refused(capfd, tmp_path / "source", "-o", tmp_path / "made")
    assert names(tmp_path) == ["source"]
