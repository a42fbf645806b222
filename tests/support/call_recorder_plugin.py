"""Tells `call_recorder` in whose name the program is called: pytest -p call_recorder_plugin. At the end the fixtures of the session that each module
asks for, and its seconds, stand in NAME.modules, a row for each; how long a case of each function takes, in NAME.cases."""

import os
import time
from collections import defaultdict

import pytest

import call_recorder

fixtures, seconds = defaultdict(set), defaultdict(float)
cases = defaultdict(list)       # the seconds of each, by module and function
shared_s = 0.0                  # of the test under way, what fixtures of several tests took


def pytest_configure(config):
    if not getattr(config.option, "numprocesses", None):        # not in the process that only directs others
        os.environ[call_recorder.NAME] = os.environ.get("PYTEST_XDIST_WORKER", "alone")
        call_recorder.start()


def module_of(item):
    return item.nodeid.partition("::")[0]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item, nextitem):
    global shared_s
    call_recorder.recorder.enter(module_of(item))
    started, shared_s = time.monotonic(), 0.0
    try:
        return (yield)
    finally:
        took_s = time.monotonic() - started
        seconds[module_of(item)] += took_s
        cases[tuple(item.nodeid.partition("[")[0].split("::", 1))].append(took_s - shared_s)
        fixtures[module_of(item)].update(item.fixturenames)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef, request):
    global shared_s
    if fixturedef.scope == "function":
        return (yield)
    before, before_s, started = call_recorder.recorder.entered, shared_s, time.monotonic()
    if fixturedef.scope == "session":
        call_recorder.recorder.enter(f"fixture {fixturedef.argname}")
    try:
        return (yield)
    finally:
        shared_s = before_s + time.monotonic() - started        # a fixture may ask for others
        call_recorder.recorder.enter(before)


def pytest_sessionfinish():
    if not call_recorder.recorder:
        return
    with open(f"{os.environ[call_recorder.FOLDER]}/{os.environ[call_recorder.NAME]}.modules", "w") as file:
        for module, duration in seconds.items():
            file.write(f"{module}\t{duration:.2f}\t{' '.join(sorted(fixtures[module]))}\n")
    with open(f"{os.environ[call_recorder.FOLDER]}/{os.environ[call_recorder.NAME]}.cases", "w") as file:
        for (module, function), each_s in cases.items():
            file.write(f"{module}\t{function}\t{sum(each_s) / len(each_s):.2f}\n")
