"""Fixtures of the tests of commands."""

import os
import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """(a folder that is a small disk, what changes its size)."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size):
        options = "size=" + size + (",remount" if os.path.ismount(folder) else "")
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")

    sized("64k")
    yield folder, sized
    subprocess.run(["umount", str(folder)], check=True)
