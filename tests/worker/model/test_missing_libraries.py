"""What computes a model where something is missing: decode_core, torch or both."""

import sys

import pytest

from chatlm.common import core
from chatlm.common.errors import ConfigError
from chatlm.worker.kernels.choosing import choose_backend
from flat_models import ModelSpec, model_of
from patching import patch


@pytest.mark.parametrize("why, core_there, words", [
    ("no core", False, r"decode_core is not installed, and there is no torch to compute instead \(\S+ -m pip install torch\); .*`\S+ -m pip install \.`"),
    ("a model that it cannot compute", True, r"This model has heads of this size, which decode_core cannot compute; it needs the Python package torch "
     r".*(pip install torch|\S+ has what is missing: run it)")])
def test_what_needs_torch_says_how_to_install_it(monkeypatch, why, core_there, words):
    patch(monkeypatch, core, "torch_installed", lambda: False)
    monkeypatch.setitem(sys.modules, "torch", None)
    if not core_there:
        patch(monkeypatch, core, "decode_core", lambda: None)
        patch(monkeypatch, core, "installed_core", lambda: None)
    spec = ModelSpec(vocab_size=64, layers=1, width=64, heads=2, kv_heads=1, head_size=528, ffn_size=64, max_positions=64)
    with pytest.raises(ConfigError, match=words):
        choose_backend("cpu", model_of(spec))
