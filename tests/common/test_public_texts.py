"""What clients are told of exceptions: our own texts, never those of libraries."""

import sqlite3

import pytest

from chatlm.common.errors import ConfigError, RequestError, public_text, without_folders


@pytest.mark.parametrize("error, text", [
    (RequestError("n must be 1"), "n must be 1"), (ConfigError("--x: no"), "--x: no"),
    (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
    (FileNotFoundError(2, "No such file", "/home/ann/secret"), "No such file or directory"),
    (sqlite3.OperationalError("no such column: ann"), "OperationalError; the server's log has the details"),
    (ValueError("https://h/?token=t0ken"), "ValueError; the server's log has the details"),
    (OSError("https://h/?token=t0ken"), "OSError; the server's log has the details"),
    (KeyError("t0ken"), "KeyError; the server's log has the details")])
def test_only_our_own_errors_speak_for_themselves(error, text):
    assert public_text(error) == text


@pytest.mark.parametrize("text, shown", [
    ("https://ann:pw@hub.example/a cannot be reached", "https://hub.example/a cannot be reached"),
    ("GET https://cdn.example/m.gguf?X-Sig=t0ken&Expires=1: 403", "GET https://cdn.example/m.gguf 403"),
    ("(host='cdn.example', port=443): Max retries exceeded with url: /a/b?sig=t0ken (Caused by x)",
     "(host='cdn.example', port=443): Max retries exceeded with url: b (Caused by x)"),
    ("http://u@h/", "http://h/"), ("is it there? a=b", "is it there? a=b"),
    ("/home/ann/m.gguf: see https://hub.example/settings/tokens",
     "m.gguf: see https://hub.example/settings/tokens")])
def test_urls_lose_what_may_be_a_token(text, shown):
    """Reasons for the operator are shown to clients, too: why a model or a download has failed."""
    assert without_folders(text) == shown
