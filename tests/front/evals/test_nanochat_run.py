"""bench/nanochat_run.py: what it calls equal, what it refuses, and, where a checkout of nanochat is, a whole run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "bench" / "nanochat_run.py"
sys.path.insert(0, str(ROOT / "bench"))

import nanochat_run  # noqa: E402
from nanochat_run import (  # noqa: E402
    CannotRun, compared_answers, compared_forced, compared_items, compared_lists, compared_numbers, table)


def answer(tokens, leads=None, forced=()):
    return {"tokens": tokens, "leads": leads or [1.0] * len(tokens), "forced": [place in forced for place in range(len(tokens))]}


def kept(digits, margin=1.0):
    return {number: {"correct": digit == "1", "margin": margin} for number, digit in enumerate(digits)}


def test_numbers_are_equal_up_to_a_limit():
    assert compared_numbers("bpb", 2.5, 2.50001, 2e-5) == ("bpb", "2.500000", "2.500010", "1.0e-05 apart", True)
    assert not compared_numbers("bpb", 2.5, 2.50003, 2e-5).fine and not compared_numbers("bpb", 2.5, float("nan"), 2e-5).fine


def test_items_are_equal_but_for_near_ties():
    """They may differ where our margin is a near tie."""
    assert compared_items("task", "0110", kept("0110")) == ("task", "2 right", "2 right", "4 of 4 equal", True)
    assert compared_items("task", "0110", kept("0111")).result == "3 of 4 equal"
    assert not compared_items("task", "0110", kept("0111")).fine
    near = compared_items("task", "0110", kept("0111", margin=1e-4))
    assert near.fine and near.result == "3 of 4 equal, 1 near ties"
    assert not compared_items("task", "0110", kept("0111", margin=None)).fine
    for upstream, ours in (("0110", "011"), ("011", "0110"), ("", ""), ("0", "")):     # as many items, and some
        assert not compared_items("task", upstream, kept(ours, margin=0.0)).fine
    assert not compared_items("task", "010", {0: kept("0")[0], 2: kept("0")[0]}).fine       # an item that we never judged


def test_answers_are_equal_up_to_a_near_tie():
    """They are equal to the first token that other arithmetic may change."""
    assert compared_answers("tokens", [answer([1, 2, 3])], [[1, 2, 3]]) == ("tokens", "3 tokens", "3 tokens", "3 of 3 equal", True)
    assert not compared_answers("tokens", [answer([1, 2, 3])], [[1, 2, 4]]).fine
    tie = compared_answers("tokens", [answer([1, 2, 3], [1.0, 1e-4, 1.0]), answer([5])], [[1, 9], [5]])
    assert tie.fine and tie.result == "2 of 4 equal, 1 answers to a near tie"
    assert not compared_answers("tokens", [answer([1, 2, 3], [1.0, 1e-4, 1.0], forced=[1])], [[1, 9]]).fine
    for ours in ([1, 2], [1, 2, 3, 4], []):                                             # another length is no tie
        assert not compared_answers("tokens", [answer([1, 2, 3], [1e-4] * 3)], [ours]).fine


def test_forced_tokens_must_be_equal():
    """They must be there, and all before them is equal too."""
    called = answer([7, 8, 9, 3], forced=[1, 2])
    assert compared_forced("forced", [called], [[7, 8, 9, 3]]) == ("forced", "2 tokens", "2 tokens", "2 of 2 equal", True)
    assert compared_forced("forced", [called], [[7, 8, 1, 3]]).result == "1 of 2 equal"
    assert not compared_forced("forced", [called], [[6, 8, 9, 3]]).fine and not compared_forced("forced", [called], [[7]]).fine
    assert not compared_forced("forced", [answer([1])], [[1]]).fine
    tied = answer([5, 6, 7, 8], [1.0, 1e-4, 1.0, 1.0], forced=[0, 3])       # what follows a near tie is not compared
    assert compared_forced("forced", [tied], [[5, 9]]) == ("forced", "1 tokens", "1 tokens", "1 of 1 equal", True)


def test_the_table_names_what_differs():
    same, other = compared_lists("results", {"1+1": "2"}, {"1+1": "2"}), compared_lists("results", {"1+1": "2", "x\n": None}, {"1+1": "3"})
    assert same.fine and not other.fine
    assert table([same, other])[2:] == ["| results | 1 | 1 | equal |", "| results | 2 | 1 | **DIFFERENT** '1+1': '2', '3'; 'x\\n': None, None |"]


def checkout_at(folder, experiments=False):
    """What looks like a checkout; its scripts do nothing."""
    for name in ("nanochat/gpt.py", "scripts/base_train.py", "scripts/chat_sft.py", "scripts/chat_rl.py", *["nanochat/experiment.py"] * experiments):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    return folder


def test_a_checkout_says_its_folder_layout(tmp_path):
    assert nanochat_run.layout_of(checkout_at(tmp_path / "a")) == "checkpoints"
    assert nanochat_run.layout_of(checkout_at(tmp_path / "b", experiments=True)) == "experiments"
    with pytest.raises(CannotRun, match="nanochat/gpt.py is missing"):
        nanochat_run.layout_of(tmp_path)


def test_what_cannot_run_is_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nanochat_run.signal, "signal", lambda *which: None)
    checkout, none = checkout_at(tmp_path / "checkout"), tmp_path / "none"
    old = tmp_path / "old"
    old.mkdir()
    for words, wanted in (
            ([none], f"{none} is not a checkout of karpathy/nanochat: nanochat/gpt.py is missing; `git clone https://github.com/karpathy/nanochat` makes one"),
            ([checkout, "--python", none], f"--python {none}: No such file or directory"),
            ([checkout, "--python", sys.executable, "--steps", "41"], "--steps must be an even number of 40 or more"),
            ([checkout, "--width", "130"], "--width must be a multiple of --depth and of --head-dim"),
            ([checkout, "--base-only"], "--base-only needs --out")):
        assert nanochat_run.main([*map(str, words)]) == 2
        assert (error := capsys.readouterr().err).startswith(f"nanochat_run: {wanted}") and error.count("\n") == 1
    monkeypatch.setattr(nanochat_run, "PACKAGES", ("json", "no_such_package"))
    assert nanochat_run.main([str(checkout)]) == 2 and "lacks no_such_package; the docstring" in capsys.readouterr().err
    monkeypatch.setattr(nanochat_run, "PACKAGES", ())
    assert nanochat_run.main([str(checkout), "--out", str(old)]) == 2 and f"--out {old}: File exists; it must be a new folder" in capsys.readouterr().err
    assert nanochat_run.main([str(checkout), "--text", str(old)]) == 2 and "--text: only 0 texts of 200 characters or more" in capsys.readouterr().err


def test_a_failing_script_is_named(tmp_path, monkeypatch, capsys):
    """It fails or takes too long, and nothing is left."""
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(nanochat_run.signal, "signal", lambda *which: None)
    monkeypatch.setattr(nanochat_run, "PACKAGES", ())
    checkout, marker = checkout_at(tmp_path / "checkout"), f"left by {tmp_path.name}"
    words = [str(checkout)]
    (checkout / "scripts/tok_train.py").write_text("print('so far')\nraise ValueError('no vocabulary')\n")
    assert nanochat_run.main(words) == 2
    assert capsys.readouterr().err == "nanochat_run: nanochat's scripts.tok_train ended with 1: ValueError: no vocabulary\n"
    (checkout / "scripts/tok_train.py").write_text(
        f"import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', {marker!r}])\n")
    assert nanochat_run.main([*words, "--minutes", "0.05"]) == 2
    assert capsys.readouterr().err == "nanochat_run: scripts.tok_train still ran after --minutes 0.05\n"
    assert not [process for process in psutil.process_iter(["cmdline"]) if marker in (process.info["cmdline"] or ())]


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif("NANOCHAT_CHECKOUT" not in os.environ, reason="NANOCHAT_CHECKOUT names no checkout of nanochat")
def test_a_run_of_nanochat_is_served_as_it_says(tmp_path):
    """A run of nanochats own code is served as nanochat says."""
    python = os.environ.get("NANOCHAT_PYTHON", sys.executable)
    command = [sys.executable, SCRIPT, os.environ["NANOCHAT_CHECKOUT"], "--python", python, "--out", tmp_path / "base"]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, timeout=1400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "| bits per byte, base 200 |" in ended.stdout and "| GSM8K, sft 150 |" in ended.stdout and "DIFFERENT" not in ended.stdout
    answers = json.loads((tmp_path / "base/logs/rl 9 answers.json").read_text())
    assert any(any(one["forced"]) for one in answers["answers"])
