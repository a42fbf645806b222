"""SECURITY.md says what is: its limits are the program's, and what it names exists."""

import dataclasses
import importlib
import pkgutil
import re
import sys
from functools import reduce
from pathlib import Path

import pytest

import chatlm
from chatlm.common.config import FLAGS, Limits, Settings
from chatlm.front.front import ROUTES

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
LIMITS = re.findall(r"^\| ([^|]+) \| ([\d,.]+)( [A-Za-z/]+)? \| `([A-Za-z_.]+)` \|$", TEXT, re.MULTILINE)
UNITS = {"": 1, "s": 1, "KiB/s": 1 << 10, "MiB": 1 << 20}


def defined(name):
    """A name of a module, or with the last names of its module before it."""
    place, _, name = name.rpartition(".")
    for module in pkgutil.walk_packages(chatlm.__path__, "chatlm."):
        if module.name.endswith(place) and hasattr(importlib.import_module(module.name), name):
            return getattr(sys.modules[module.name], name)
    raise LookupError(name)


@pytest.mark.parametrize("what, number, unit, name", LIMITS)
def test_limits_in_security_md_are_the_program_s(what, number, unit, name):
    first, *rest = name.split(".") if name[0].isupper() else [name]
    found = Settings() if first == "Settings" else defined(first)      # without any flag
    assert float(number.replace(",", "")) * UNITS[unit.strip()] == reduce(getattr, rest, found), what


def test_security_md_has_every_limit():
    rows = re.findall(r"^\| .*\|$", TEXT.split("## Limits")[1], re.MULTILINE)
    assert len(LIMITS) == len(rows) - 1 > 30            # all but the heading
    clamped = {"temperature", "top_k", "max_tokens"}        # moved to the edge, not refused
    inner = {"truncated_messages", "stop_tokens", "inline_bytes", "inline_characters"}
    named = {name.removeprefix("LIMITS.") for *_, name in LIMITS if name.startswith("LIMITS.")}
    assert named == {field.name for field in dataclasses.fields(Limits)} - clamped - inner


def test_what_security_md_names_exists():
    """It names flags, routes and files."""
    flags = {f"--{name}" for flag in FLAGS for name in flag.names} | {"--version"}
    flags |= {f"--no-{flag.field}" for flag in FLAGS if flag.default is True or flag.off}
    assert set(re.findall(r"`(--[a-z-]+)", TEXT)) <= flags
    variables = {f"CHAT_SERVER_{flag.field.upper()}" for flag in FLAGS}
    assert set(re.findall(r"`(CHAT_SERVER_[A-Z_]+)`", TEXT)) <= variables
    assert set(re.findall(r"`(/[a-z-]+)`", TEXT)) <= {route.pattern for route in ROUTES}
    for name in re.findall(r"`([a-z_/]+\.py)`", TEXT):
        assert (ROOT / name).exists(), name
    open_ = {route.pattern for route in ROUTES if route.open} - {"/", "/static/{name}"}
    (row,) = re.findall(r"^\| anyone who reaches the port, keys set \| ([^|]+) \|", TEXT, re.MULTILINE)
    assert set(re.findall(r"`([^`]+)`", row)) == open_
