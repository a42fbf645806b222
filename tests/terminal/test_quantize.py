"""The commands `quantize` and `imatrix`, run as a user runs them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatlm.worker.weights.formats.gguf.file import read_gguf
from nightly import by_day
from run_here import run_forked, run_here

REPOSITORY = Path(__file__).parents[2]
FIXTURES = REPOSITORY / "tests" / "fixtures" / "nanochat"
PROGRAM = [sys.executable, str(REPOSITORY / "chat_server.py")]


def run(*words):
    done = run_forked(*words)
    assert "Traceback" not in done.stderr, done.stderr[-2000:]
    return done


def refused(capsys, *words):
    """The one line of an error, of a command that this process runs."""
    status, out, said = run_here(capsys, *words)
    lines = [line for line in said.splitlines() if line.startswith("chat_server:")]
    assert status == 2 and len(lines) == 1 and out == ""
    return lines[0]


def greedy(model):
    done = run("generate", model, "-p", "hello", "-m", "6", "-t", "0", "--kv-cache-memory", "64M")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_export_to_a_file_is_quantize(tmp_path):
    for name, words in {"one": ["quantize", FIXTURES / "gen5", "-o", tmp_path / "one.gguf"],
                        "two": ["export", "-o", tmp_path / "two.gguf", FIXTURES / "gen5"],
                        "three": ["export", FIXTURES / "gen5", "--format", "gguf", "-o", tmp_path / "three"]}.items():
        done = run(*words, "--type", "q8_0")
        assert done.returncode == 0 and "Q8_0" in done.stdout, name
    files = [(tmp_path / name).read_bytes() for name in ("one.gguf", "two.gguf", "three")]
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize("words, message", [
    (["-o", "made.gguf", "--format", "hf"], "--format hf: -o made.gguf does not fit it"), (["-o", "made.gguf", "--license", "mit"], "--license"),
    (["--format", "gguf"], "quantize needs -o FILE"), (["-o"], "expected one argument")])
def test_words_of_export_that_do_not_go_together_are_named(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, "export", FIXTURES / "gen5", *words)
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_becomes_a_file_that_says_the_same(tmp_path):
    done = run("quantize", FIXTURES / "gen5", "-o", tmp_path / "gen5.gguf", "--type", "bf16")
    assert done.returncode == 0 and "BF16" in done.stdout
    assert greedy(tmp_path / "gen5.gguf") == greedy(FIXTURES / "gen5")
    assert os.listdir(tmp_path) == ["gen5.gguf"]


@pytest.mark.parametrize("name, matrices, kind, answer", by_day([("default", 210, "Q4_1", "Paris"), ("gen5", 26, "Q4_0", "")], ("gen5", 26, "Q4_0", "")))
def test_importance_is_measured_and_used(name, matrices, kind, answer, request, tmp_path):
    """To quantize the default model takes 15 CPU seconds."""
    model = request.getfixturevalue("default_model_path") if name == "default" else FIXTURES / name
    (tmp_path / "book.txt").write_text("It was the best of times, it was the worst of times. " * 10)
    imatrix = tmp_path / "imatrix.gguf"
    done = run("imatrix", model, "-f", tmp_path / "book.txt", "-o", imatrix, "--chunks", "1")
    assert done.returncode == 0 and f"{matrices} matrices" in done.stdout, done.stderr
    done = run("quantize", model, "--imatrix", imatrix, "-o", tmp_path / "q4.gguf", "--type", "q4_0")
    assert done.returncode == 0, done.stderr
    metadata, stored = read_gguf(tmp_path / "q4.gguf")
    assert metadata["quantize.imatrix.entries_count"] == matrices
    assert metadata["quantize.imatrix.dataset"] == "book.txt"
    assert stored["blk.0.ffn_down.weight"].tensor_type.name == kind
    done = run("generate", tmp_path / "q4.gguf", "-p", "What is the capital of France?", "-m", "20", "-t", "0", "--kv-cache-memory", "64M")
    assert done.returncode == 0 and done.stdout.strip() and answer in done.stdout


@pytest.mark.parametrize("words, said", (
    (("quantize", "-o", "x.gguf"), "quantize needs MODEL"),
    (("quantize", FIXTURES / "gen5"), "quantize needs -o FILE"),
    (("quantize", FIXTURES / "gen5", "-o", "/"), "is a folder"),
    (("quantize", FIXTURES / "gen5", "-o", "/nowhere/x.gguf"), "No such file or directory"),
    (("quantize", FIXTURES / "gen5", "-o", "x.gguf", "--type", "q4_k_x"), "did you mean"),
    (("quantize", FIXTURES / "gen5", "-o", "x.gguf", "--type", "iq2_xxs"), "needs --imatrix"),
    (("quantize", FIXTURES / "gen5", "-o", "x.gguf", "--imatrix", "/nowhere.gguf"), "nowhere.gguf"),
    (("quantize", FIXTURES / "gen5", "-o", "x.gguf", "--imatrix", REPOSITORY / "README.md"), "no file of importance"),
    (("quantize", REPOSITORY / "README.md", "-o", "x.gguf"), "README.md"),
    (("quantize", FIXTURES / "gen5", "-o", "x.gguf", "--lora", "y"), "--lora is a flag of"),
    (("imatrix", FIXTURES / "gen5", "-o", "x.gguf"), "imatrix needs -f FILE"),
    (("imatrix", FIXTURES / "gen5", "-o", "x.gguf", "-f", "/nowhere.txt"), "-f /nowhere.txt"),
    (("imatrix", FIXTURES / "gen5", "-o", "x.gguf", "-f", os.devnull), "empty"),
    (("imatrix", FIXTURES / "gen5", "-o", "x.gguf", "-f", "x", "--chunks", "0"), "--chunks")))
def test_what_is_wrong_is_said_in_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert said in refused(capsys, *words)
    assert os.listdir(tmp_path) == []


def children_of(process):
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in found]


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def until(condition, limit_s=60):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks into /proc")
@pytest.mark.parametrize("stop", (signal.SIGINT, signal.SIGKILL))
def test_a_stopped_command_leaves_no_process_and_goes_on_later(stop, default_model_path, tmp_path):
    output = tmp_path / "out.gguf"
    words = [*PROGRAM, "quantize", str(default_model_path), "-o", str(output), "--type", "q5_k_m"]
    with subprocess.Popen(words, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        until(lambda: (tmp_path / "out.gguf.part").exists() and (tmp_path / "out.gguf.part").stat().st_size > 1 << 20)
        [child] = children_of(process)
        process.send_signal(stop)
        assert process.wait(60) in (130, -stop)
    until(lambda: not is_running(child))
    assert not output.exists()
    assert run(*words[2:]).returncode == 0
    assert run("quantize", default_model_path, "-o", tmp_path / "whole.gguf", "--type", "q5_k_m").returncode == 0
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert {*os.listdir(tmp_path)} == {"out.gguf", "whole.gguf"}
