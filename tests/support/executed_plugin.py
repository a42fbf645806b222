"""Tells `executed` in whose name the program is called: pytest -p executed_plugin. At the end the fixtures of the session that each module
asks for, and its seconds, stand in NAME.modules, a row for each."""

import os
import time
from collections import defaultdict

import pytest

import executed

fixtures, seconds = defaultdict(set), defaultdict(float)


def pytest_configure(config):
    if not getattr(config.option, "numprocesses", None):        # not in the process that only directs others
        os.environ[executed.NAME] = os.environ.get("PYTEST_XDIST_WORKER", "alone")
        executed.start()


def module_of(item):
    return item.nodeid.partition("::")[0]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    executed.recorder.enter(module_of(item))
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
    before = executed.recorder.entered
    executed.recorder.enter(f"fixture {fixturedef.argname}")
    try:
        return (yield)
    finally:
        executed.recorder.enter(before)


def pytest_sessionfinish():
    if not executed.recorder:
        return
    with open(f"{os.environ[executed.FOLDER]}/{os.environ[executed.NAME]}.modules", "w") as file:
        for module, duration in seconds.items():
            file.write(f"{module}\t{duration:.2f}\t{' '.join(sorted(fixtures[module]))}\n")
