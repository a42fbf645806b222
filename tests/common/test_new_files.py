"""Files are written where others may have put something: nothing of theirs is emptied or followed."""

import os
import stat

import pytest

from chatlm.common.errors import ConfigError
from chatlm.common.new_files import beside, create, replace_with, take_up


def odd_things(folder, path):
    """What may have a name: for each kind a function that puts it there."""
    theirs = folder / "theirs"
    theirs.write_bytes(b"GGUF of somebody else")
    return {"link": lambda: path.symlink_to(theirs), "broken link": lambda: path.symlink_to(folder / "new"),
            "hard link": lambda: os.link(theirs, path), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir,
            "device": lambda: path.symlink_to("/dev/null")}


KINDS = "link", "broken link", "hard link", "pipe", "folder", "device"


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_odd_is_created_over_or_taken_up(kind, tmp_path):
    path = tmp_path / "file"
    odd_things(tmp_path, path)[kind]()
    with pytest.raises(FileExistsError):
        create(path)
    with pytest.raises((ConfigError, IsADirectoryError)):
        take_up(path)
    assert (tmp_path / "theirs").read_bytes() == b"GGUF of somebody else" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["link", "broken link", "hard link", "device", "pipe"])
def test_a_small_file_replaces_a_link_itself(kind, tmp_path):
    path = tmp_path / "file"
    odd_things(tmp_path, path)[kind]()
    replace_with(path, b"ours")
    assert path.read_bytes() == b"ours" and stat.S_ISREG(path.lstat().st_mode)
    assert (tmp_path / "theirs").read_bytes() == b"GGUF of somebody else"
    assert {*os.listdir(tmp_path)} == {"file", "theirs"}


def test_a_name_beside_is_of_nobody_else(tmp_path):
    names = {beside(tmp_path / ("n" * 200), "part").name for _ in range(100)}
    assert len(names) == 100 and max(map(len, names)) < 150


def test_what_a_run_has_left_is_taken_up(tmp_path):
    with create(tmp_path / "file") as file:
        file.write(b"ours")
    number = take_up(tmp_path / "file")
    assert os.read(number, 10) == b"ours"
    os.close(number)
    with pytest.raises(FileNotFoundError):
        take_up(tmp_path / "none")
