"""Commands that the process of a test runs itself, without the time that another Python takes."""

import chat_server


def run_here(captured, *words):
    """(exit status, stdout, stderr) of a command. captured: the fixture capfd or capsys."""
    status = chat_server.main([*map(str, words)])
    said = captured.readouterr()
    assert "Traceback" not in said.err
    return status, said.out, said.err
