"""bench/gpu_day.py without a GPU: what it does with steps that hold, fail, hang or leave processes, and its dry run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))
import gpu_day  # noqa: E402
from nightly import by_day  # noqa: E402


def python(text):
    return lambda day: ["-c", text]


def run(tmp_path, monkeypatch, *steps, **more):
    """main() with these steps -> (exit status, report.json, report.md)"""
    monkeypatch.setattr(gpu_day, "STEPS", steps)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in more.items()]
    status = gpu_day.main(["--dry-run", "--out", str(tmp_path / "out"), *flags])
    return status, json.loads((tmp_path / "out" / "report.json").read_text()), (tmp_path / "out" / "report.md").read_text()


def test_a_failed_step_does_not_stop_the_next(tmp_path, monkeypatch):
    """A step that fails does not stop the next, and its error is in the report."""
    figure = {"name": "speed | of it", "value": 1234.5678, "unit": "tok/s", "goal": "at least 1,000", "met": True}
    status, told, text = run(
        tmp_path, monkeypatch,
        gpu_day.Step("bad", "A bad one", 60, python("for i in range(50): print('before', i)\nraise ValueError('boom')")),
        gpu_day.Step("good", "A good one", 60, python(f"print('NOTE seen'); print('FIGURE ' + {json.dumps(json.dumps(figure))})")),
        gpu_day.Step("skipped", "One that skips", 60, python("print('LEFT OUT one GPU only')")),
        gpu_day.Step("needy", "One that needs more", 60, lambda day: "needs 2 GPUs"))
    assert status == 1 and told["dry_run"]
    bad, good, skipped, needy = told["steps"]
    assert (bad["status"], good["status"], skipped["status"], needy["status"]) == ("failed", "held", "left out", "left out")
    assert bad["error"][0].startswith("Traceback") and bad["error"][-1] == "ValueError: boom" and not good["error"]
    assert good["figures"] == [figure] and good["note"] == "seen" and skipped["note"] == "one GPU only" and needy["note"] == "needs 2 GPUs"
    assert "there was no GPU" in text and "ValueError: boom" in text
    assert "| good | speed \\| of it | 1,235 tok/s | at least 1,000 (met) |" in text


def test_a_hanging_step_ends_with_all_it_started(tmp_path, monkeypatch):
    child = "import subprocess, sys, time; print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True).pid, flush=True)"
    status, told, _ = run(tmp_path, monkeypatch, gpu_day.Step("hangs", "Hangs", 2, python(child + "; time.sleep(600)")),
                          gpu_day.Step("leaves", "Leaves a process", 60, python(child)))
    hangs, leaves = told["steps"]
    assert status == 1 and hangs["status"] == "ran out of time" and leaves["status"] == "failed"
    assert "had to be ended: 1" in leaves["note"]
    for name in ("hangs", "leaves"):
        pid = int((tmp_path / "out" / f"{name}.log").read_text().split()[0])
        assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_steps_without_time_are_left_out(tmp_path, monkeypatch):
    """Steps for which no time is left are left out, and the report is whole after each."""
    reports = []

    def look(day):
        reports.append(json.loads((tmp_path / "out" / "report.json").read_text())["steps"])
        day.ends_s = time.monotonic()
        return ["-c", ""]

    status, told, _ = run(tmp_path, monkeypatch, gpu_day.Step("first", "First", 60, python("")), gpu_day.Step("look", "Look", 60, look),
                          gpu_day.Step("last", "Last", 60, python("")))
    assert status == 0 and [step["name"] for step in reports[0]] == ["first"]
    assert [step["status"] for step in told["steps"]] == ["held", "left out", "left out"] and told["steps"][-1]["note"] == "no time was left"


@pytest.mark.slow
def test_tests_that_all_skip_have_not_held(tmp_path, monkeypatch):
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_gpu():\n    pytest.skip('no GPU here')\n")
    command = gpu_day.tests(str(tmp_path / "test_it.py"), dry="gpu")
    _, told, _ = run(tmp_path, monkeypatch, gpu_day.Step("tests", "Tests", 60, lambda day: [*command(day), "-c", os.devnull]))
    assert told["steps"][0]["status"] == "failed" and told["steps"][0]["note"] == "1 skipped"


def test_bench_figures_stand_next_to_their_goal():
    log = "NVIDIA H200: copies 3.90 TB/s\nd32 batch 1 context 1024: step 1.100 ms, graph 0.990 ms, floor 0.900 ms: 1.22 and 1.10 times the floor; the draw's graph 9.5 us\n" \
          "llama-8b batch 8 context 1024: step 6.100 ms, graph 6.000 ms, floor 4.500 ms: 1.36 and 1.33 times the floor; the draw's graph 12.0 us\n"
    assert [(each["value"], each["met"]) for each in gpu_day.decode_figures(log)] == [
        (9.5, None), (1.1, None), (1.22, True), (1.1, True), (12.0, None), (6.1, None), (1.36, False), (1.33, False)]


@pytest.mark.parametrize("arguments, words", by_day([
    (["--only", "chek"], "--only knows machine,check"), (["--minutes", "0"], "--minutes must be more than 0"),
    ([], "torch sees no CUDA GPU here; --dry-run"), (["--dry-run", "--out", "/dev/null/x"], "--out /dev/null/x: Not a directory")],
    ([], "torch sees no CUDA GPU here; --dry-run")))
def test_wrong_arguments_are_one_line(arguments, words):
    done = subprocess.run([sys.executable, gpu_day.__file__, *arguments], capture_output=True, text=True, timeout=100,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def dry_run(tmp_path, library, *flags):
    before = {path: path.stat().st_mtime_ns for path in tracked_and_not()}
    done = subprocess.run([sys.executable, gpu_day.__file__, "--dry-run", "--out", tmp_path / "day", *flags], capture_output=True, text=True,
                          timeout=900, env=os.environ | {"DECODE_CORE_EMULATION_LIBRARY": str(library)})
    told = json.loads((tmp_path / "day" / "report.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in tracked_and_not()} == before        # no file outside its folder
    return done, told["steps"]


def tracked_and_not():
    """The files of the checkout that other tests do not touch."""
    return {path for path in ROOT.rglob("*") if path.is_file() and path.parts[len(ROOT.parts)] in ("bench", "tests", "chatlm", "csrc", "docs", "static")
            and "__pycache__" not in path.parts}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_dry_run_holds(tmp_path, emulation_library):
    done, steps = dry_run(tmp_path, emulation_library, "--only", "machine,decode")
    assert done.returncode == 0, done.stdout + (tmp_path / "day" / "report.md").read_text()
    machine, decode = steps
    assert "torch " in machine["note"] and decode["status"] == "left out"


@pytest.mark.slow
@pytest.mark.timeout(960)
def test_every_step_of_a_dry_run_holds(tmp_path, emulation_library):
    done, steps = dry_run(tmp_path, emulation_library)
    assert done.returncode == 0, done.stdout + (tmp_path / "day" / "report.md").read_text()
    assert [step["name"] for step in steps] == [step.name for step in gpu_day.STEPS]
    assert {step["name"] for step in steps if step["status"] == "left out"} == {"decode", "ops", "vllm"}


@pytest.mark.parametrize("dry", [False, True])
@pytest.mark.parametrize("gpus", [1, 8])
def test_each_step_s_files_are_there(tmp_path, dry, gpus):
    day = gpu_day.Day(tmp_path, dry, gpus, time.monotonic() + 60)
    for step in gpu_day.STEPS:
        command = step.command(day)
        for word in command if isinstance(command, list) else ():
            if word.endswith(".py"):
                assert (ROOT / word).is_file(), (step.name, word)
