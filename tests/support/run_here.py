"""Commands without the time that another Python takes: the process of a test runs them itself, or a fork of a process that has imported them."""

import os

import chat_server
from forked import run_command
from real_server import SCRIPT


def run_here(captured, *words):
    """(exit status, stdout, stderr) of a command. captured: the fixture capfd or capsys."""
    status = chat_server.main([*map(str, words)])
    said = captured.readouterr()
    assert "Traceback" not in said.err
    return status, said.out, said.err


def run_forked(*words, given="", folder=None, **environment):
    """What subprocess.run captures of a command, as text. given: its input. folder: where it runs."""
    return run_command(SCRIPT, [*map(str, words)], os.environ | environment, given, folder)
