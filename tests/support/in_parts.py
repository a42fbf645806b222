"""Work in parts (chatlm/front/store/store.py), done at once."""

from collections.abc import Generator


def done(work):
    """The result of work; of work in parts, all of it without a pause."""
    if not isinstance(work, Generator):
        return work
    try:
        while True:
            next(work)
    except StopIteration as end:
        return end.value
