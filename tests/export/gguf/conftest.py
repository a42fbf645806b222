"""Which kernels a test of GGUF files measures with."""

import pytest

from chatlm.common.core import installed_core


@pytest.fixture
def choose_kernels(monkeypatch):
    """A function of "" (decode_core) or "reference": what computes models from then on."""
    def choose(kind):
        monkeypatch.setenv("CHAT_SERVER_KERNELS", kind)
        installed_core.cache_clear()
    yield choose
    monkeypatch.undo()
    installed_core.cache_clear()
