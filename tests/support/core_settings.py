"""A fixture of decode_core's tests. No conftest: the sanitizers run these tests without one."""

import pytest


@pytest.fixture
def usual_settings():
    """Afterwards decode_core's settings are those of before, and nothing is forced."""
    from chatlm.worker.kernels import compiled
    isa, threads = compiled.info()["isa"], compiled.get_threads()
    yield
    compiled.set_isa(isa)
    compiled.set_threads(threads)
    compiled._core.force_schedule(0, False)
    compiled._core.refuse_memory(0)
