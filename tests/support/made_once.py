"""Files that one process of a run of tests makes, and all of its processes use."""

import os
from pathlib import Path

from filelock import FileLock


def made_once(tmp_path_factory, name, make):
    """The path of a file. make: called with the path where there is no such file yet."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    with FileLock(folder / f"{Path(name).stem}.lock"):
        if not file.exists():
            make(file)
    return file
