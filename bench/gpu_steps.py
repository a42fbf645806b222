"""The steps of bench/gpu_day.py that are more than a command; each is a process of its own.

    python bench/gpu_steps.py machine|models|server|ranks|memory|load|prefill|vllm --device cuda --out FOLDER

It prints lines for the report: `FIGURE {json}`, `NOTE text` and `LEFT OUT reason`. A step that fails raises.
--device cpu is for a dry run: the CPU's kernels and processes stand in for a GPU's.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support"), str(ROOT / "bench")]

from servers import our_server, started     # noqa: E402

VLLM_START_LIMIT_S = 900.0      # it compiles, too
QUESTIONS = ("What is the capital of France?", "Write a short story about a boat.", "Count from one to twenty.")
KILLED_AFTER = 2        # events of an answer, then its worker is killed
LONG = "Explain in detail how a ship crosses an ocean."


def figure(name, value, unit="", goal="", met=None):
    print("FIGURE " + json.dumps({"name": name, "value": value, "unit": unit, "goal": goal, "met": met}), flush=True)


def note(text):
    print(f"NOTE {text}", flush=True)


def leave_out(reason):
    print(f"LEFT OUT {reason}", flush=True)
    sys.exit(0)


def said_by(*command, seconds=60):
    """What a command prints; "" if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


# ---- the machine ---------------------------------------------------------------------------------------------------


def machine(arguments):
    import torch
    gpus = said_by("nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader")
    for line in gpus.splitlines():
        note(f"GPU: {line.strip()}")
    topology = said_by("nvidia-smi", "topo", "-m")
    print(topology)
    if gpus:
        note("NVLink between GPUs" if " NV" in topology else "no NVLink")
    compiler = said_by("nvcc", "--version").splitlines()
    note(f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, {compiler[-2].split(',')[1].strip() if compiler else 'no'} nvcc")
    note(f"{os.cpu_count()} CPUs")
    if arguments.device == "cuda":
        from cuda_decode import copy_bandwidth
        figure("copy bandwidth", copy_bandwidth(torch.device("cuda", 0)) / 1e12, "TB/s")


# ---- correctness --------------------------------------------------------------------------------------------------


def built(path, device, **more):
    """The engine that a worker would build on a device, and what is wrong with its kernels."""
    import torch
    from chatlm.common.config import Settings
    from chatlm.common.hub.find import resolve_model
    from chatlm.worker.build import build_engine
    settings = Settings(model=str(path), kv_cache_memory=256 << 20, **more)
    _, engine = build_engine(resolve_model(settings), settings, torch.device(device, 0) if device == "cuda" else torch.device("cpu"))
    return engine


def greedy_works(engine, count):
    from engines import chat_work
    return [chat_work(engine, f"q{i}", question, count) for i, question in enumerate(QUESTIONS)]


def logits_of(engine, ids):
    """Logits (V,) after a prompt, a float32 tensor, from an engine that does nothing else; its pages are free again afterwards."""
    from chatlm.common.config import PAGE_SIZE
    from engines import forward_logits, make_batch
    tables = list(range(len(engine.transformer.groups.windows) * -(-len(ids) // PAGE_SIZE)))
    logits = forward_logits(engine.transformer, make_batch((list(ids), 0, len(ids), tables)))[0].float()
    engine.pool.forget_cached()
    return logits


def compare(name, path, device, count):
    """The GPU's logits and greedy answers against the CPU's in float32; where an answer first differs, the logits must nearly tie."""
    import engines
    exact = engines.make_engine(path)
    works = greedy_works(exact, count)
    expected = engines.run(exact, works)
    engine = built(path, device)
    wanted, got = (logits_of(each, works[1].prompt_ids) for each in (exact, engine))
    figure(f"{name}: largest difference of logits, in their standard deviations", ((got - wanted).abs().max() / wanted.std()).item())
    tokens = engines.tokens_of(engine, works)
    ties, worst = 0, 0.0
    for work in works:
        traced, got = expected.traced(work.id), tokens[work.id]
        at = next((i for i, (a, b) in enumerate(zip(traced.tokens, got)) if a != b), None)
        if at is not None:
            ties, worst = ties + 1, max(worst, traced.gaps[at])
    backend = engine.kernels.backend
    faults = dict(getattr(backend, "faults", None) or {})
    # where rounding to bfloat16 moves a router to another expert the logits jump, on a CPU as on a GPU (measured: 1.37)
    limit = 2.0 if engine.transformer.model.experts else 0.5
    figure(f"{name}: answers of {len(works)} that leave the CPU's, by the gap of the draw there", f"{ties}, {worst:.3f}",
           goal=f"a gap below {limit} (bfloat16, packed)", met=worst < limit)
    note(f"{name}: {getattr(backend, 'name', 'torch/reference')}, kernel_faults {faults or 'none'}")
    return [] if worst < limit and not faults else [f"{name}: gap {worst:.3f}, faults {faults}"]


def tiny_families(folder):
    """Models with random weights in each family's structure, made here; {} without transformers."""
    try:
        import families
        import transformers  # noqa: F401
    except ImportError:
        note("transformers is not installed: no tiny families")
        return {}
    return {name: families.save(families.make_model(name), folder / name) for name in families.MODELS}


def models(arguments):
    import torch
    from chatlm.common.hub.default_model import fetch_default_model
    dry, scratch = arguments.device == "cpu", arguments.out / "scratch" / "models"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    paths = {"default": fetch_default_model()} | {name: ROOT / "tests" / "fixtures" / "nanochat" / name for name in ("gen1", "gen2", "gen3", "gen4", "gen5", "gen6")}
    if dry:
        paths = {name: paths[name] for name in ("default", "gen1")}
    else:
        paths |= tiny_families(scratch)
    wrong = []
    for name, path in paths.items():
        with torch.inference_mode():
            try:
                wrong += compare(name, path, arguments.device, 8 if dry else 64)
            except Exception as error:      # the next model is tried anyway
                wrong.append(f"{name}: {type(error).__name__}: {error}")
                print(wrong[-1])
    shutil.rmtree(scratch, ignore_errors=True)
    if wrong:
        raise SystemExit("Error: " + "; ".join(wrong))


# ---- the server ---------------------------------------------------------------------------------------------------


def flags_of(arguments):
    return ["--device-type", arguments.device] + (["--kv-cache-memory", "64M"] if arguments.device == "cpu" else [])


def asked(url, text, count, **more):
    from real_server import ask, post
    return post(url + "/chat/completions", ask(text, max_tokens=count, ignore_eos=True, **more))


def text_of(events):
    return "".join(event.get("token") or "" for event in events)


def read_events(response, when=lambda count: None):
    events = []
    for line in response:
        if line.startswith(b"data: "):
            events.append(json.loads(line[6:]))
            when(len(events))
    return events


def server(arguments):
    import real_server
    count = 200 if arguments.device == "cpu" else 400
    replicas = ("--num-workers", "2") if arguments.device == "cpu" else ("--num-gpus", "auto")
    # each step's piece by itself, so that the kill meets the middle of an answer
    with our_server(*replicas, "--stream-interval", "0", *flags_of(arguments)) as ours:
        url, process = ours.url, ours.process
        workers = ours.get("/stats")["workers"]
        note(f"{len(workers)} replicas")
        expected = text_of(read_events(asked(url, LONG, count)))
        children = ours.processes()[1:]
        killed = []

        def kill_the_busy_one(events):
            if events >= KILLED_AFTER and not killed:
                busy = [worker for worker in ours.get("/stats")["workers"] if worker["running"]]
                killed.extend(worker["pid"] for worker in busy[:1])
                for pid in killed:
                    os.kill(pid, signal.SIGKILL)

        got = text_of(read_events(asked(url, LONG, count), kill_the_busy_one))
        assert killed, "no worker was busy"
        same = os.path.commonprefix([expected, got])
        figure("a worker killed in mid-answer: letters that are those of an undisturbed answer", f"{len(same)} of {len(expected)}",
               goal="all, or on a GPU up to a near tie: the new worker computes the answer so far as a prompt")
        assert got == expected or arguments.device == "cuda" and len(same) > KILLED_AFTER and len(got) > count, (
            f"after a killed worker the text differs:\n{expected[:200]!r}\n{got[:200]!r}")
        stream = asked(url, LONG, count)
        stream.readline()
        process.send_signal(signal.SIGTERM)
        assert text_of(read_events(stream)), "nothing came after SIGTERM"
        status = process.wait(60)
        assert status == 0, f"the drained server ended with status {status}"
        assert real_server.gone(children), "processes were left"
        note("drained: the answer was finished, status 0, no process left")


def ranks(arguments):
    """Two ranks of one replica: on two GPUs, or both on one if NCCL allows it, which is reported."""
    import torch
    dry = arguments.device == "cpu"
    count, layout = (40 if dry else 200), (["--tp", str(arguments.tp)] if arguments.tp > 1 else ["--pp", str(arguments.pp)])
    if not dry and torch.cuda.device_count() < 2:
        leave_out("one GPU: NCCL does not put two ranks on one GPU, and chat_server gives each rank its own")
    with our_server(*flags_of(arguments)) as ours:
        expected = text_of(read_events(asked(ours.url, LONG, count)))
    if arguments.torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", ROOT / "chat_server.py", "--distributed", *layout,
                   *flags_of(arguments)]
        running = started(command, "torchrun")
    else:
        running = our_server(*layout, *flags_of(arguments))
    with running as ours:
        got = measured_answer(ours.url, count)
    same = os.path.commonprefix([expected, got])
    figure(f"{' '.join(layout)}: letters that are those of one rank", f"{len(same)} of {len(expected)}", goal="all, or up to a near tie")
    assert len(got) > count and len(same) > 20, f"other text than one rank's:\n{expected[:200]!r}\n{got[:200]!r}"


def measured_answer(url, count):
    begin = time.perf_counter()
    text = text_of(read_events(asked(url, LONG, count)))
    figure("one stream", count / (time.perf_counter() - begin), "tok/s")
    return text


def memory(arguments):
    for share in ("0.85", "0.80"):
        more = [] if arguments.device == "cpu" else ["--gpu-memory-utilization", share]
        with our_server(*more, *flags_of(arguments)) as ours:
            worker = ours.get("/stats")["workers"][0]
            assert text_of(read_events(asked(ours.url, QUESTIONS[0], 8)))
            note(f"utilization {share}: {json.dumps({name: worker[name] for name in worker if 'memory' in name or 'page' in name})}")
    cache = "4000G" if arguments.device == "cuda" else "1K"     # the CPU's memory is only allocated when it is used
    done = subprocess.run([sys.executable, ROOT / "chat_server.py", "generate", "--prompt", "x", "--device-type", arguments.device, "--kv-cache-memory", cache],
                          capture_output=True, text=True, timeout=120)
    said = done.stderr.strip().splitlines()
    assert done.returncode and said and "Traceback" not in done.stderr, f"a cache of {cache}: status {done.returncode}\n{done.stderr[-1500:]}"
    note(f"a cache of {cache}: {said[-1][:200]}")


# ---- speed --------------------------------------------------------------------------------------------------------


def model_for_speed(arguments):
    """A folder of random bfloat16 weights in Llama 8B's shape (some of its layers), made here; on a CPU the default model."""
    if arguments.device == "cpu":
        return []
    import load_time
    folder = arguments.out / "scratch" / "llama-8b"
    if not (folder / "config.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        load_time.make(folder, 16e9 if shutil.disk_usage(arguments.out).free > 30e9 else 4e9)
    return ["serve", str(folder)]


def load(arguments):
    sizes = ["--questions", "2", "--input-tokens", "32", "--output-tokens", "8"] if arguments.device == "cpu" else ["--output-tokens", "256"]
    path = arguments.out / "load.json"
    with our_server(*model_for_speed(arguments), *flags_of(arguments)) as ours:
        subprocess.run([sys.executable, ROOT / "bench" / "load.py", f"ours={ours.url}", "--only", "interactive,batch", "--json", path, *sizes], check=True)
    for row in json.loads(path.read_text()):
        guide = f"{'875' if row['load'].startswith('batch') else '37'} in the guide's table (its machine)"
        figure(f"{row['load']}: tok/s", row["figures"]["tok/s total"], "tok/s", guide)
        figure(f"{row['load']}: TTFT p50", row["figures"]["TTFT p50, ms"], "ms")


def first_token_ms(url, tokens, seed):
    import load as loads
    begin = time.perf_counter()
    response = asked(url, loads.prompt(tokens, seed), 2)
    first = None
    for line in response:
        if first is None and line.startswith(b"data: ") and json.loads(line[6:]).get("token"):
            first = time.perf_counter()
    return (first - begin) * 1e3


def prefill(arguments):
    long = 200 if arguments.device == "cpu" else 2000
    with our_server(*model_for_speed(arguments), *flags_of(arguments)) as ours:
        first_token_ms(ours.url, 40, 0)
        for tokens in (40, long):
            taken = statistics.median(first_token_ms(ours.url, tokens, seed) for seed in range(1, 6))
            figure(f"first token of a prompt of {tokens} tokens", taken, "ms")
            if tokens == long:
                figure("prefill", tokens / taken * 1e3, "tok/s")


def vllm(arguments):
    """vLLM and this server on the same folder, in turns, by bench/load.py. If vLLM is not on the PATH, pip installs it into the folder."""
    if arguments.device == "cpu":
        leave_out("needs a GPU")
    program = shutil.which("vllm") or installed_vllm(arguments.out / "scratch" / "vllm")
    model, path = model_for_speed(arguments)[1], arguments.out / "vllm.json"
    for turn in range(2):
        for name in ("ours", "vllm"):
            if name == "ours":
                running = our_server("serve", model, *flags_of(arguments))
            else:
                running = started([program, "serve", model, "--max-model-len", "4096"], name, limit_s=VLLM_START_LIMIT_S)
            with running as serving:
                ask_load(name, serving.url, path)
            for row in json.loads(path.read_text()):
                figure(f"{name}, turn {turn + 1}, {row['load']}", row["figures"]["tok/s total"], "tok/s")


def ask_load(name, url, path):
    subprocess.run([sys.executable, ROOT / "bench" / "load.py", f"{name}={url}", "--only", "interactive,batch", "--output-tokens", "128", "--json", path], check=True)


def installed_vllm(folder):
    """vLLM's program in a virtual environment of its own."""
    commands = [sys.executable, "-m", "venv", folder], [folder / "bin" / "pip", "install", "-q", "vllm"]
    try:
        for command in commands:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=240)
    except (OSError, subprocess.SubprocessError) as error:
        leave_out("pip cannot install vllm here: " + (str(getattr(error, "stderr", "") or error).strip().splitlines() or ["no reason"])[-1][:200])
    return str(folder / "bin" / "vllm")


STEPS = {step.__name__: step for step in (machine, models, server, ranks, memory, load, prefill, vllm)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    for name in ("tp", "pp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--torchrun", action="store_true")
    arguments = parser.parse_args()
    STEPS[arguments.step](arguments)


if __name__ == "__main__":
    main()
