"""Limits of this process while a test runs."""

import contextlib
import resource


@contextlib.contextmanager
def files_of_at_most(count):
    """This process writes no more bytes into a file, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
