"""A fixture of decode_core's tests. No conftest: the sanitizers run these tests without one."""

import pytest


@pytest.fixture
def usual_settings():
    """Afterwards decode_core's settings are those of before, and nothing is forced."""
    import decode_core
    isa, threads = decode_core.info()["isa"], decode_core.get_threads()
    yield
    decode_core.set_isa(isa)
    decode_core.set_threads(threads)
    decode_core._core.force_schedule(0, False)
    decode_core._core.refuse_memory(0)
