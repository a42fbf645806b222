"""One command that tests whether chat_server works on a machine's GPUs, and how fast.

    python bench/gpu_day.py [--minutes 40] [--out gpu-day] [--only check,models]
    python bench/gpu_day.py --dry-run           without a GPU: the emulation and the CPU stand in, and the report says so

Run it from a fresh clone after the README's first command. Each step is a process of its own with a time limit; its result is
written at once to report.md and report.json in the folder --out, which bench/figures/gpu.json gets its figures from, and its output to
NAME.log there. A step that fails does not stop the next. A step is skipped if too little of --minutes remains for it.

Nothing is written outside the folder except what the README's first command also writes (the default model). No process is left
running, and no setting of a GPU is changed. The exit status is 0 if every step that ran held, else 1.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MARK = "CHAT_SERVER_GPU_DAY"        # in the environment of every process that a step starts
HELD, FAILED, LATE, LEFT_OUT = "held", "failed", "ran out of time", "left out"
ERROR_LINES = 20


@dataclass
class Day:
    """What all steps share."""

    out: Path
    dry: bool
    gpus: int
    ends_s: float                   # of time.monotonic()

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


@dataclass(frozen=True)
class Step:
    """A process and what its success means; `command` returns its arguments after `python`, or a text: why it is skipped."""

    name: str
    title: str
    seconds: int
    command: Callable[[Day], list[str] | str]
    figures: Callable[[Day, str], list[dict]] = lambda day, log: printed_figures(log)


@dataclass
class Result:
    name: str
    title: str
    status: str
    seconds: float = 0.0
    note: str = ""
    error: list[str] = field(default_factory=list)
    figures: list[dict] = field(default_factory=list)      # name, value, unit, goal (text), met (or None)


# ---- the steps, in order ------------------------------------------------------------------------------------------


def tests(*paths: str, on_gpu: str = "not emulation and not nvcc", dry: str = "emulation", more: tuple[str, ...] = ()) -> Callable[[Day], list[str]]:
    """pytest on `paths`: the GPU's cases, or those of the emulation that `dry` selects."""
    def command(day: Day) -> list[str]:
        return ["-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", "--durations=5",
                "-m", "", *more, *paths, "-k", dry if day.dry else on_gpu]
    return command


def own(name: str, *arguments: str, least_gpus: int = 1) -> Callable[[Day], list[str] | str]:
    """A step of bench/gpu_steps.py."""
    def command(day: Day) -> list[str] | str:
        if not day.dry and day.gpus < least_gpus:
            return f"needs {least_gpus} GPUs, {day.gpus} here"
        return ["bench/gpu_steps.py", name, *arguments, "--device", day.device, "--out", str(day.out)]
    return command


def gpu_only(*command: str) -> Callable[[Day], list[str] | str]:
    return lambda day: "needs a GPU: its speed has no stand-in" if day.dry else [*command]


STEPS = (
    Step("machine", "What is there: driver, GPUs, links, torch, nvcc", 60, own("machine")),
    Step("check", "`chat_server.py check`: every compiled op against its reference", 300, lambda day: ["chat_server.py", "check"]),
    Step("kernels", "Tests of the CUDA kernels", 420, tests(
        "tests/core/test_core_cuda.py", "tests/core/test_cuda_packed.py", "tests/core/test_cuda_experts.py",
        "tests/core/test_cuda_adapters.py", "tests/core/test_cuda_packed_kv.py", "tests/core/test_cuda_latents.py",
        dry="emulation and (draws_as_the_reference or no_rows_are_no_work)")),
    Step("graphs", "Tests of CUDA graphs, prompts and proofs", 300, tests(
        "tests/core/test_cuda_steps.py", "tests/core/test_cuda_proof.py", dry="emulation and the_decode_bench_runs")),
    Step("models", "The default model, nanochat's generations and tiny families against the CPU", 420, own("models")),
    Step("server", "`-n auto`: answers, a worker killed in mid-answer, drain", 180, own("server")),
    Step("tp2", "`--tp 2`: two ranks over NCCL", 150, own("ranks", "--tp", "2")),
    Step("pp2", "`--pp 2`: two stages over NCCL", 150, own("ranks", "--pp", "2")),
    Step("torchrun", "`--distributed` under torchrun, two ranks", 200, own("ranks", "--tp", "2", "--torchrun")),
    Step("memory", "`--gpu-memory-utilization` 0.85 and 0.80, and what is said when memory runs out", 240, own("memory")),
    Step("decode", "Decode steps against the bytes that they must read", 400, gpu_only("bench/cuda_decode.py"),
         lambda day, log: decode_figures(log)),
    Step("ops", "Each op against the copy bandwidth", 300,
         lambda day: gpu_only("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "bench/test_bench_core_cuda.py", "--benchmark-enable",
                              "--benchmark-disable-gc", f"--benchmark-json={day.out / 'ops.json'}")(day), lambda day, log: op_figures(day.out / "ops.json")),
    Step("load", "The guide's load: ten questions together and one alone", 240, own("load")),
    Step("prefill", "A prompt of 2,000 tokens, the first token of a short one", 200, own("prefill")),
    Step("vllm", "vLLM on the same model in turns", 600, own("vllm")),
)


# ---- figures ------------------------------------------------------------------------------------------------------


def printed_figures(log: str) -> list[dict]:
    """The output of gpu_steps.py: lines FIGURE {"name": .., "value": .., "unit": .., "goal": .., "met": ..}."""
    return [json.loads(line.removeprefix("FIGURE ")) for line in log.splitlines() if line.startswith("FIGURE ")]


def decode_figures(log: str) -> list[dict]:
    """bench/cuda_decode.py's lines. A step within 1.25 times of bytes / bandwidth is the goal."""
    found = re.findall(r"^(\S+ batch \d+) context.*: step ([\d.]+) ms.*: ([\d.]+) and ([\d.]+) times the floor; the draw's graph ([\d.]+) us$",
                       log, re.MULTILINE)
    rows = []
    for shape, milliseconds, step, graph, draw in found:
        rows.append({"name": f"{shape}: launch and run of the second graph, the draw's", "value": float(draw), "unit": "us", "goal": "", "met": None})
        rows.append({"name": f"{shape}: step", "value": float(milliseconds), "unit": "ms", "goal": "", "met": None})
        rows.append({"name": f"{shape}: step / floor", "value": float(step), "unit": "", "goal": "at most 1.25", "met": float(step) <= 1.25})
        rows.append({"name": f"{shape}: graph / floor", "value": float(graph), "unit": "", "goal": "at most 1.25", "met": float(graph) <= 1.25})
    return rows


def op_figures(path: Path) -> list[dict]:
    """pytest-benchmark's file: each op's share of the copy bandwidth, or its time."""
    rows = []
    for bench in json.loads(path.read_text())["benchmarks"] if path.exists() else ():
        said = bench["extra_info"]
        name, unit = ("copy_share", "of copy bandwidth") if "copy_share" in said else ("us_per_call", "us")
        if name in said:
            rows.append({"name": bench["name"], "value": said[name], "unit": unit, "goal": "", "met": None})
    return rows


# ---- running a step -----------------------------------------------------------------------------------------------


def environment(day: Day) -> dict[str, str]:
    """The environment of a step's process: every cache and temporary file goes to the folder."""
    scratch = day.out / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    folders = {name: str(scratch) for name in ("TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "VLLM_CACHE_ROOT",
                                               "PIP_CACHE_DIR", "HYPOTHESIS_STORAGE_DIRECTORY")}
    return os.environ | folders | {MARK: uuid.uuid4().hex, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def processes_of(mark: str) -> list[int]:
    """The processes whose environment has a step's mark."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        try:
            if entry.name.isdigit() and int(entry.name) != os.getpid() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:             # it has ended, or is another user's
            continue
    return found


def end_all(mark: str) -> int:
    """End the step's processes; returns how many there were."""
    left = processes_of(mark)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes_of(mark):
            try:
                os.kill(pid, number)
            except OSError:
                pass
        until = time.monotonic() + 10
        while processes_of(mark) and time.monotonic() < until:
            time.sleep(0.1)
    return len(left)


def first_of_error(log: str) -> list[str]:
    """The first error lines of a step's output, or its last lines."""
    lines = log.splitlines()
    begin = next((i for i, line in enumerate(lines) if re.match(r"Traceback|=+ (FAILURES|ERRORS)|FAILED|\S*(Error|Exception):|E   ", line)), None)
    return lines[begin:begin + ERROR_LINES] if begin is not None else lines[-ERROR_LINES:]


def run_step(day: Day, step: Step) -> Result:
    """Run a step, limited by its own seconds and by what is left of the day."""
    result = Result(step.name, step.title, LEFT_OUT)
    command, seconds = step.command(day), min(step.seconds, day.ends_s - time.monotonic())
    if isinstance(command, str):
        result.note = command
    elif seconds < min(step.seconds, 20):
        result.note = "no time was left"
    if result.note:
        return result
    env, path, begin = environment(day), day.out / f"{step.name}.log", time.monotonic()
    with path.open("wb") as log:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
    late = end_all(env[MARK])
    process.wait()
    result.seconds, text = time.monotonic() - begin, path.read_text(errors="replace")
    result.figures = step.figures(day, text)
    notes = [line.removeprefix("NOTE ") for line in text.splitlines() if line.startswith("NOTE ")]
    passed = re.search(r"^(?:=+ )?((?:\d+ \w+, )*\d+ \w+)(?:, \d+ warnings?)? in [\d.]+s", text, re.MULTILINE)
    if passed:
        notes.append(passed[1])
        if not re.search(r"\bpassed\b", passed[1]):
            code = code or 1
    if left_out := re.search(r"^LEFT OUT (.*)$", text, re.MULTILINE):
        result.note = left_out[1]
        return result
    result.status = LATE if code is None else HELD if code == 0 else FAILED
    if code == 0 and late:
        result.status, notes = FAILED, [*notes, f"processes that were left and had to be ended: {late}"]
    result.note = "; ".join(notes)
    result.error = [] if result.status == HELD else first_of_error(text)
    return result


# ---- the report ---------------------------------------------------------------------------------------------------


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "no git"


def cell(text: object) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def report(day: Day, results: list[Result], started: str) -> str:
    lines = [f"## A day on GPUs: {started}, commit {commit()}", ""]
    if day.dry:
        lines += ["**A dry run: there was no GPU.** The emulation of the CUDA kernels and the CPU stood in, so nothing here tells how it is on hardware.", ""]
    lines += ["| Step | Result | Seconds | |", "| --- | --- | --- | --- |"]
    lines += [f"| {cell(each.title)} | {each.status} | {each.seconds:.0f} | {cell(each.note)} |" for each in results]
    for each in results:
        if each.error:
            lines += ["", f"### {each.title}: {each.status}", "", "```", *(line[:300] for line in each.error), "```"]
    figures = [(each, figure) for each in results for figure in each.figures]
    if figures:
        lines += ["", "| Step | Figure | Measured | Goal |", "| --- | --- | --- | --- |"]
        for each, figure in figures:
            met = {True: " (met)", False: " (**missed**)"}.get(figure["met"], "")
            value = f"{figure['value']:,.4g}" if isinstance(figure["value"], (int, float)) else figure["value"]
            lines.append(f"| {each.name} | {cell(figure['name'])} | {cell(value)} {figure['unit']} | {cell(figure['goal'])}{met} |")
    return "\n".join(lines) + "\n"


def write(day: Day, results: list[Result], started: str) -> None:
    """Write both files; each is complete at any time."""
    described = {"started": started, "commit": commit(), "dry_run": day.dry, "steps": [asdict(each) for each in results]}
    for name, text in (("report.json", json.dumps(described, indent=1) + "\n"), ("report.md", report(day, results, started))):
        new = day.out / f"{name}.new"
        new.write_text(text)
        new.replace(day.out / name)


def gpu_count() -> int:
    """How many CUDA devices torch sees, asked in a separate process: this one never touches a GPU."""
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    return int(done.stdout.split()[-1]) if done.returncode == 0 and done.stdout.strip() else 0


def parse_command_line(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=40.0, help="for all steps together (default: 40)")
    parser.add_argument("--out", type=Path, default=Path("gpu-day"), help="folder of the report and the logs (default: gpu-day)")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"of {','.join(step.name for step in STEPS)}")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: the emulation and the CPU stand in")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.only or ()) - {step.name for step in STEPS}:
        parser.error(f"--only knows {','.join(step.name for step in STEPS)}, not {','.join(sorted(unknown))}")
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be more than 0, not {arguments.minutes:g}")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_command_line(argv)
    gpus = 0 if arguments.dry_run else gpu_count()
    if not gpus and not arguments.dry_run:
        print("gpu_day.py: torch sees no CUDA GPU here; --dry-run runs what needs none", file=sys.stderr)
        return 2
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"gpu_day.py: --out {arguments.out}: {error.strerror}", file=sys.stderr)
        return 2
    day = Day(arguments.out.resolve(), arguments.dry_run, gpus, time.monotonic() + 60 * arguments.minutes)
    started, results = time.strftime("%Y-%m-%d %H:%M"), []
    for step in STEPS:
        if arguments.only and step.name not in arguments.only:
            continue
        print(f"{step.title} ...", flush=True)
        results.append(run_step(day, step))
        write(day, results, started)
        print(f"    {results[-1].status} after {results[-1].seconds:.0f} s{results[-1].note and ': ' + results[-1].note}", flush=True)
    shutil.rmtree(day.out / "scratch", ignore_errors=True)
    print(f"{day.out / 'report.md'} has figures for bench/figures/gpu.json")
    return int(any(each.status in (FAILED, LATE) for each in results))


if __name__ == "__main__":
    sys.exit(main())
