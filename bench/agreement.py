"""Do three load generators agree about one server? bench/load.py, guidellm, aiperf, and the server's own /metrics.

    python -m venv G && G/bin/pip install guidellm          # the two cannot share one environment
    python -m venv A && A/bin/pip install aiperf
    python bench/agreement.py --guidellm G --aiperf A [--streams 1,4,10] [--rounds 3] [--questions 3]

It starts our server with the default model, without drafts, on the first half of the CPUs (--same-cpus: on all), and the tools on
the others: guidellm and aiperf take more CPU time than the server of a small model. The tools take turns, in a different order in
each round. Each asks the same number of new questions (--questions times the streams, at least 8), with the same length, streams,
tokens and sampling. A turn in which other programs took more than a tenth of a CPU is reported and repeated, at most --retries times.

The rows, with each tool's name for them:

    TTFT             time_to_first_token_ms (guidellm), time_to_first_token (aiperf); /metrics: time_to_first_token_seconds
    TPOT             inter_token_latency_ms, inter_token_latency: of an answer, from first text to last, divided by tokens - 1.
                     guidellm's time_per_output_token_ms is something else: it includes TTFT. /metrics: inter_token_latency_seconds
    chunk gap        load.py's ITL, aiperf's inter_chunk_latency; guidellm has none
    seconds          of a message, from sending it to the end of its answer
    tok/s            output tokens of all answers, divided by the seconds of the run
    tool's CPU s     of the tool itself, including its startup
    by /metrics'     relative to what the server's histograms gained meanwhile: this isolates the tool from the machine

Their definitions differ: load.py and aiperf count from the start of the request, which includes opening the connection (load.py
opens one for each question); guidellm counts from when the connection is open and the request's head is sent. All three count
reasoning as text; an event without text (the role, the usage) does not count as a first token.
"""

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from itertools import count
from pathlib import Path

import aiohttp
import load
import psutil
from servers import our_server

sys.path.insert(0, str(load.ROOT))

ROWS = ("TTFT mean, ms", "TTFT p50, ms", "TPOT mean, ms", "TPOT p50, ms", "chunk gap mean, ms", "chunk gap p50, ms", "seconds mean", "tok/s", "tool's CPU s",
        "TTFT mean over /metrics', ms", "TPOT mean by /metrics'", "seconds by /metrics'")


def write_tokenizer(model, folder):
    """The model's tokenizer as a Hugging Face folder: both tools require one, though they use the server's counts."""
    from chatlm.common.config import Settings
    from chatlm.common.hub.default_model import fetch_default_model
    from chatlm.common.hub.find import resolve_model
    from chatlm.worker.weights.load import open_model
    settings = Settings(model=model or str(fetch_default_model()))
    text = open_model(resolve_model(settings), settings).text
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(text.payload)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": text.chat_template}))


def children_cpu_s():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_tool(command, folder):
    """Run a command to its end; returns the CPU time that it took."""
    before = children_cpu_s()
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, timeout=300,
                          env={name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"})     # aiperf then refuses a folder
    if done.returncode:
        sys.exit(f"{command[0]} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return children_cpu_s() - before


def by_load(url, texts, streams, tokens, folder):
    async def run():
        arguments = load.parse_command_line([url, "--output-tokens", str(tokens)])
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
            server = await load.open_server(url, session, arguments)
            before, began_s = server_times(url), sum(os.times()[:2])
            answers = await load.Load("agreement", tuple(texts), streams).run(server)
            return answers, before, sum(os.times()[:2]) - began_s
    answers, before, cpu_s = asyncio.run(run())
    if errors := {each.error for each in answers if each.error}:
        sys.exit(f"load.py: {errors}")
    gaps = [1e3 * gap for each in answers for gap in each.gaps_s]
    ttft, tpot = ([1e3 * value for value in values] for values in zip(*((each.ttft_s, each.tpot_s) for each in answers)))
    return before, (statistics.fmean(ttft), statistics.median(ttft), statistics.fmean(tpot), statistics.median(tpot), statistics.fmean(gaps),
                    statistics.median(gaps), statistics.fmean(each.end_s - each.due_s for each in answers),
                    sum(each.tokens for each in answers) / max(each.end_s for each in answers), cpu_s)


def by_guidellm(venv, url, model, texts, streams, tokens, folder):
    write_questions(folder, texts)
    (folder / "scenario.json").write_text(json.dumps({"spec": {
        "backend": {"kind": "openai_http", "target": url, "model": model, "request_format": "/v1/chat/completions", "max_tokens": tokens,
                    "extras": {"body": {"ignore_eos": True, "temperature": 0}}},
        "profile": {"kind": "concurrent", "streams": [streams]}, "data": [{"kind": "json_file", "path": str(folder / "questions.jsonl")}],
        "constraints": [{"kind": "max_requests", "count": len(texts)}], "outputs": [{"kind": "json", "path": str(folder / "guidellm.json")}],
        "tokenizer": {"kind": "hf_auto", "model": str(folder.parent / "tokenizer")}}}))
    before = server_times(url)
    cpu_s = run_tool([venv / "bin/guidellm", "run", "-c", folder / "scenario.json", "--disable-console"], folder)
    benchmark, = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    requests = benchmark["requests"]["successful"]
    check_answers("guidellm", [each["output_tokens"] for each in requests], texts, tokens)
    found = [benchmark["metrics"][name]["successful"] for name in ("time_to_first_token_ms", "inter_token_latency_ms", "request_latency")]
    return before, (*(each[name] for each in found[:2] for name in ("mean", "median")), None, None, found[2]["mean"],
                    benchmark["metrics"]["output_tokens_per_second"]["successful"]["mean"], cpu_s)


def by_aiperf(venv, url, model, texts, streams, tokens, folder):
    write_questions(folder, texts)
    before = server_times(url)
    cpu_s = run_tool([venv / "bin/aiperf", "profile", "-m", model, "--url", url, "--endpoint-type", "chat", "--streaming",
                      "--tokenizer", folder.parent / "tokenizer", "--input-file", folder / "questions.jsonl", "--custom-dataset-type", "single_turn",
                      "--concurrency", streams, "--request-count", len(texts), "--extra-inputs", "ignore_eos:true",
                      "--extra-inputs", f"max_tokens:{tokens}", "--extra-inputs", "temperature:0", "--use-server-token-count",
                      "--ui", "none", "--no-server-metrics", "--no-gpu-telemetry", "--artifact-dir", folder / "aiperf"], folder)
    found = json.loads((folder / "aiperf/profile_export_aiperf.json").read_text())
    rows = [json.loads(line)["metrics"] for line in (folder / "aiperf/profile_export.jsonl").read_text().splitlines()]
    check_answers("aiperf", [each["output_sequence_length"]["value"] for each in rows], texts, tokens)
    times = [found[name][share] for name in ("time_to_first_token", "inter_token_latency", "inter_chunk_latency") for share in ("avg", "p50")]
    return before, (*times, found["request_latency"]["avg"] / 1e3, found["output_token_throughput"]["avg"], cpu_s)


def write_questions(folder, texts):
    (folder / "questions.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def check_answers(name, lengths, texts, tokens):
    if lengths != [tokens] * len(texts):
        sys.exit(f"{name}: {len(lengths)} answers of {set(lengths)} tokens, not {len(texts)} of {tokens}: it had another load")


def server_times(url):
    """(sum, count) of the server's histograms of TTFT, of the time between tokens and of whole answers."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        lines = [line.rsplit(" ", 1) for line in response.read().decode().splitlines() if not line.startswith("#")]
    return [[sum(float(value) for name, value in lines if name.startswith(f"chat_server_{stem}_seconds_{part}")) for part in ("sum", "count")]
            for stem in ("time_to_first_token", "inter_token_latency", "request_duration")]


def busy_s(*servers):
    """(CPU time of everything, CPU time of the servers and us)"""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, *_ = map(int, file.readline().split()[1:])
    own = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ours = [each.cpu_times() for server in servers for each in (server, *server.children(recursive=True))]
    return ((user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"),
            sum(each.ru_utime + each.ru_stime for each in own) + sum(each.user + each.system for each in ours))


def wait_for_quiet(patience_s=60):
    """Until the machine has been idle for a second."""
    deadline_s = time.monotonic() + patience_s
    while psutil.cpu_percent(1.0) * psutil.cpu_count() > 10 and time.monotonic() < deadline_s:
        pass


def undisturbed(turn, server, retries, name):
    """What `turn` returns on the first try in which other programs took under a tenth of a CPU, or on the last."""
    for left in reversed(range(retries + 1)):
        wait_for_quiet()
        before, began_s = busy_s(server), time.monotonic()
        values = turn()
        everything, ours = (now - then for then, now in zip(before, busy_s(server)))
        share = (everything - ours) / (time.monotonic() - began_s)
        if share < 0.1:
            return values
        print(f"{name}: other programs took {share:.2f} CPUs{', again' * bool(left)}", file=sys.stderr, flush=True)
    return values


def beside_server(values, before, after):
    """The means relative to what the server measured meanwhile: TTFT minus its TTFT in ms, TPOT and seconds divided by its own."""
    ttft_s, between_s, whole_s = ((now - then) / (later - earlier) for (then, earlier), (now, later) in zip(before, after))
    return values[0] - 1e3 * ttft_s, values[2] / 1e3 / between_s, values[6] / whole_s


def shown(values):
    if None in values:
        return ""
    return f"{load.cell(float(statistics.median(values)))} ({load.cell(float(min(values)))} to {load.cell(float(max(values)))})"


def table(found, streams):
    """Markdown: medians of the rounds, with least and most."""
    lines = [f"| {streams} streams | " + " | ".join(found) + " |", "|---" * (len(found) + 1) + "|"]
    return "\n".join(lines + [f"| {row} | " + " | ".join(shown([each[index] for each in rounds]) for rounds in found.values()) + " |"
                              for index, row in enumerate(ROWS)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("guidellm", "aiperf"):
        parser.add_argument(f"--{name}", type=Path, help="its virtual environment (default: without it)")
    parser.add_argument("--streams", type=lambda text: [int(each) for each in text.split(",")], default=[1, 4, 10])
    for name, default in (("rounds", 3), ("retries", 2), ("questions", 3), ("input-tokens", 128), ("output-tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--model", default="", help="(default: the default model)")
    parser.add_argument("--same-cpus", action="store_true", help="server and tools share all CPUs")
    arguments = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    half, tokens, seeds = max(len(cpus) // 2, 1), arguments.output_tokens, count(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_tokenizer(arguments.model, folder / "tokenizer")
        os.sched_setaffinity(0, cpus if arguments.same_cpus else cpus[:half])
        command = ("serve", *filter(None, [arguments.model]), "--device-type", "cpu", "--no-drafts")
        with our_server(*command, env=os.environ | {"CHAT_SERVER_CONFIG": ""}) as server:
            os.sched_setaffinity(0, cpus if arguments.same_cpus else cpus[half:] or cpus)
            model = server.get("/v1/models")["data"][0]["id"]
            tools = {"load.py": by_load}
            for name, run in (("guidellm", by_guidellm), ("aiperf", by_aiperf)):
                if venv := getattr(arguments, name):
                    tools[name] = lambda url, *rest, run=run, venv=venv.absolute(): run(venv, url, model, *rest)
            for streams in arguments.streams:
                found = {name: [] for name in tools}
                for index in range(arguments.rounds):
                    order = [*tools][index % len(tools):] + [*tools][:index % len(tools)]
                    for name in order:
                        def turn(name=name, streams=streams):
                            scratch = Path(tempfile.mkdtemp(dir=folder))
                            texts = [load.prompt(arguments.input_tokens, next(seeds)) for _ in range(max(8, arguments.questions * streams))]
                            before, values = tools[name](server.url, texts, streams, tokens, scratch)
                            return values + beside_server(values, before, server_times(server.url))
                        values = undisturbed(turn, server.front, arguments.retries, name)
                        found[name].append(values)
                        print(f"{streams} streams, {name}:", *(f"{row} {load.cell(value)};" for row, value in zip(ROWS, values)), file=sys.stderr, flush=True)
                print(f"\n{table(found, streams)}", flush=True)


if __name__ == "__main__":
    main()
