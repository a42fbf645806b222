"""Names of files, and whatever else others may have written, reach a terminal or a log with nothing in them that acts on it."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chatlm.common import log as logs
from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError, printable, visible
from chatlm.common.log import JsonLines, ProgressDisplay, TextLines, start_logging, tell

ROOT = Path(__file__).resolve().parents[2]
ACTING = ["\x1b[2J", "\x9b2J", "\u202etxt.exe", "\u2066", "\u200f", "\u061c", "\u2028", "\x7f", "\x08", "\r", "\x00", "\ufeff", "\udcff"]
KEPT = ["日本.gguf", "é\u0301", "שלום", "👩\u200d💻", "a\u3000b", "\xa0", "x\ty"]
ACTS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def record(text):
    return logging.LogRecord("chat_server", logging.WARNING, "", 0, "the model %s has changed or gone", (text,), None)


@pytest.mark.parametrize("text", ACTING)
def test_terminal_codes_are_shown_as_escapes(text, capsys):
    """What acts on a terminal is shown as an escape."""
    name = f"before{text}after"
    assert not ACTS.search(visible(name)) and visible(name) != name and visible(visible(name)) == visible(name)
    assert not ACTS.search(printable(name)) and not ACTS.search(str(ConfigError(name)))
    assert not ACTS.search(TextLines().format(record(name)))
    line = JsonLines().format(record(name))
    assert not ACTS.search(line) and (json.loads(line)["message"] == record(name).getMessage() or text == "\udcff")    # it loses nothing
    tell(f"cannot read {name}")
    progress = ProgressDisplay()
    for progress.bar in (False, True):
        progress(f"reading {name}", 0.5)
    shown = capsys.readouterr().err.replace(logs.CLEAR, "")
    assert "before" in shown and not ACTS.search(shown)
    logs.CalmLog.over_bar = False


@pytest.mark.parametrize("text", KEPT)
def test_other_names_stay_as_they_are(text):
    assert visible(text) == text and text in TextLines().format(record(text))


def test_a_line_end_in_a_name_begins_no_log_record():
    lines = TextLines().format(record("x\n2026-11-23 08:00:00,000 all is well")).split("\n")
    assert len(lines) == 2 and lines[1].startswith("    2026")
    assert "\n" not in JsonLines().format(record("x\ny"))


def test_every_log_handler_shows_foreign_text(monkeypatch):
    for form in ("text", "json"):
        monkeypatch.setattr(logging.root, "handlers", [])
        start_logging(Settings(log_format=form))
        [handler] = logging.root.handlers
        handler.setStream(stream := io.StringIO())
        logging.getLogger("another.library").warning("a \x1b[31m%s", "\u202e")
        try:
            raise ValueError("\x1b]0;title\x07")
        except ValueError:
            logging.getLogger("chat_server").exception("failed")
        assert "title" in stream.getvalue() and not ACTS.search(stream.getvalue())


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_server_of_odd_file_names_writes_no_codes(tmp_path, form):
    """A server of files with such names writes nothing that acts on a terminal."""
    for name in ("a\x1b[2J\u202egpj", "b\rc\u2066", "d\udcff"):
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF" + bytes(40))
    words = ["serve", "--models", str(tmp_path), "--port", "0", "--host", "127.0.0.1", "--log-format", form, "--device-type", "cpu"]
    ended = subprocess.run([sys.executable, ROOT / "chat_server.py", *words], capture_output=True, timeout=120,
                           env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    for data in (ended.stdout, ended.stderr):
        text = data.decode("utf-8")
        assert not ACTS.search(text), text
    assert ended.returncode == 2 and "gpj" in ended.stderr.decode(), ended.stderr
