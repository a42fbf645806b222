"""decode_core's pool: who does a chunk again and when, and chunks that throw (csrc/cpu/pool/pool.h)."""

import pytest

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from core_settings import usual_settings  # noqa: E402, F401
from chatlm.worker.kernels.library import _core  # noqa: E402

pytestmark = pytest.mark.usefixtures("usual_settings")


def try_phase(threads, chunks, **options):
    compiled.set_threads(threads)
    return _core.try_phase(threads, chunks, **options)


@pytest.mark.parametrize("threads", [3, 16])
def test_a_late_chunk_is_redone_by_one_thread_only(threads):
    """A chunk that is long in coming is done again by one thread only."""
    _core.force_schedule(threads, False, 0)             # at once, and 16 threads on the CPUs there are
    runs, puts, _ = try_phase(threads, threads, held_us=30_000)     # each run of chunk 0 waits for a third one
    assert runs[0] == 2 and max(runs) <= 2
    assert puts == [1] * threads


def test_threads_wait_for_twice_the_longest_chunk():
    """Threads wait for twice the longest chunk of the phase."""
    _, puts, patience_us = try_phase(16, 32, chunk_us=300)
    assert puts == [1] * 32
    assert patience_us >= 600


def test_short_chunks_are_waited_for():
    """Short chunks are waited for as long as it takes to notice."""
    _, puts, patience_us = try_phase(2, 64)
    assert puts == [1] * 64 and patience_us >= _core.REDO_US


@pytest.mark.parametrize("schedule", [(16, False), (16, True), (16, False, 0), (16, True, 0)])
def test_sixteen_threads_do_every_chunk_once(schedule):
    """Sixteen threads with a slow one do every chunk once."""
    _core.force_schedule(*schedule)
    for chunks in (2, 16, 100):
        runs, puts, _ = try_phase(16, chunks, chunk_us=20, slowdown=50)
        assert puts == [1] * chunks and set(runs) <= {1, 2}


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_what_a_chunk_throws_reaches_the_caller(threads):
    """What a chunk throws reaches the caller and the pool goes on."""
    for chunk in (0, 7, 31):
        with pytest.raises(RuntimeError, match="a chunk throws"):
            try_phase(threads, 32, throws=chunk)
        assert try_phase(threads, 32)[1] == [1] * 32
