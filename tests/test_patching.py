"""support/patching.py: what a test replaces is replaced wherever it was imported, and put back everywhere."""

import sys
import types

import pytest

from patching import patch, replace_everywhere


@pytest.fixture
def modules(monkeypatch):
    """One that defines LIMIT, one that has imported it, one that has another LIMIT, and one that is imported during the test."""
    limit = [1]
    found = {name: types.ModuleType(f"chatlm.{name}") for name in ("defines", "imports", "other", "late")}
    found["defines"].LIMIT = found["imports"].LIMIT = limit
    found["other"].LIMIT = [1]
    for module in found.values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return types.SimpleNamespace(**found)


def test_a_patch_reaches_every_importer(modules):
    """Each gets the other object until the end."""
    limit, others = modules.defines.LIMIT, modules.other.LIMIT
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch, modules.defines, "LIMIT", [2])
        assert modules.defines.LIMIT == modules.imports.LIMIT == [2] and modules.other.LIMIT is others
        modules.late.LIMIT = modules.defines.LIMIT          # from chatlm.defines import LIMIT
        patch(monkeypatch, modules.defines, "LIMIT", [3])
        assert modules.defines.LIMIT == modules.imports.LIMIT == modules.late.LIMIT == [3]
    assert modules.defines.LIMIT is modules.imports.LIMIT is modules.late.LIMIT is limit and modules.other.LIMIT is others


def test_a_patch_that_replaces_nothing_fails(modules, monkeypatch):
    with pytest.raises(AssertionError, match="chatlm.defines has no LIMITS"):
        patch(monkeypatch, modules.defines, "LIMITS", [2])
    with pytest.raises(AssertionError, match="is no module of the program"):
        replace_everywhere(types.ModuleType("elsewhere"), "__name__", "x")
    assert replace_everywhere(modules.defines, "LIMIT", [4]) == [1] and modules.imports.LIMIT == [4]
