"""A test's time limit that also ends a test with tasks: pytest-timeout raises once, and where that is in another task of the test's loop, the test goes on."""

import signal

import pytest

AGAIN_S = 1


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_timeout_set_timer(settings):
    """It is raised again, until the test ends."""
    done = yield
    if signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.setitimer(signal.ITIMER_REAL, settings.timeout, AGAIN_S)
    return done
