"""Tells `call_recorder` in whose name the program is called: pytest -p call_recorder_plugin. At the end the fixtures of the session that each module
asks for, and its seconds, stand in NAME.modules, a row for each."""

import os
import time
from collections import defaultdict

import pytest

import call_recorder

fixtures, seconds = defaultdict(set), defaultdict(float)


def pytest_configure(config):
    if not getattr(config.option, "numprocesses", None):        # not in the process that only directs others
        os.environ[call_recorder.NAME] = os.environ.get("PYTEST_XDIST_WORKER", "alone")
        call_recorder.start()


def module_of(item):
    return item.nodeid.partition("::")[0]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    call_recorder.recorder.enter(module_of(item))
    started = time.monotonic()
    try:
        return (yield)
    finally:
        seconds[module_of(item)] += time.monotonic() - started
        fixtures[module_of(item)].update(item.fixturenames)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    if fixturedef.scope != "session":
        return (yield)
    before = call_recorder.recorder.entered
    call_recorder.recorder.enter(f"fixture {fixturedef.argname}")
    try:
        return (yield)
    finally:
        call_recorder.recorder.enter(before)


def pytest_sessionfinish():
    if not call_recorder.recorder:
        return
    with open(f"{os.environ[call_recorder.FOLDER]}/{os.environ[call_recorder.NAME]}.modules", "w") as file:
        for module, duration in seconds.items():
            file.write(f"{module}\t{duration:.2f}\t{' '.join(sorted(fixtures[module]))}\n")
