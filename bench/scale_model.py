"""How much 1 to 64 GPUs would deliver, estimated from measurements of one: throughput by tp, pp and replicas.

    python bench/scale_model.py measure > box.json                        step times on this machine's CPUs
    python bench/scale_model.py predict box.json --clients 256            a table for 1 to 64 GPUs
    python bench/scale_model.py check --clients 1,16                      one replica, two, and one of --tp 2, of the real server,
                                                                          compared with the model's figures; each round measures again

The JSON file has what was measured; for a box of GPUs, write it from the figures of bench/cuda_decode.py and of the links:

    layers, hidden, vocabulary       of the model
    step_ms       rows -> ms of a decode step on one rank (one GPU; here one thread)
    serial_ms     rows -> the part of it that more ranks do not shorten: scheduling, text, launches, draws
    broadcast_ms  rows -> ms in which rank 0 sends the step to the others
    together      factor by which a step is longer when the machine's other ranks are busy too (GPUs: 1)
    uneven        tp -> factor by which the rank with most weights exceeds its share (KV heads are not divided); optional
    links         "node" within a machine, "net" between machines: latency_us of one exchange, GB_per_s
    ranks_per_node
    front_ms      rows -> ms of the front's one core for one step of a replica; it limits the sum of all replicas
    overhead_ms   rows -> ms of CPU that front and clients take for such a step if the ranks occupy all CPUs; optional

The model. A replica has tp x pp ranks and serves its share of the clients in pp batches, one in each stage. A stage takes

    serial + (step - serial) x uneven x together / (tp x pp) + broadcast + tensor / pp + hop + overhead

where tensor = 2 all_reduces (hidden, float32) per layer and a gather of the logits, each latency + bytes x 2 (tp - 1) / tp / bandwidth,
and hop = latency + the rows of hidden states in 16 bits / bandwidth. Every stage's time yields one token for each row of a batch. Times
between measured rows are interpolated; beyond them they are extrapolated with the last slope. The model ignores prefill, which delays
steps in proportion to the prompts, and uneven arrivals: it is a bound for answers that are long compared with their prompts.
"""

import argparse
import asyncio
import bisect
import contextlib
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import agreement
import aiohttp
import load
import psutil
from servers import our_server

sys.path.insert(0, str(load.ROOT))

# 1. the model ----------------------------------------------------------------------------------------------------


def at(rows, points):
    """Measured (rows -> value), interpolated linearly, extrapolated beyond the last, constant before the first."""
    known = sorted((int(each), value) for each, value in points.items())
    if rows <= known[0][0] or len(known) == 1:
        return known[0][1]
    (low, below), (high, above) = next((pair for pair in pairwise(known) if rows <= pair[1][0]), known[-2:])
    return below + (above - below) * (rows - low) / (high - low)


def exchange_ms(link, count, share):
    """The time of one exchange of `count` bytes, of which each rank sends `share`."""
    return link["latency_us"] / 1e3 + count * share / link["GB_per_s"] / 1e6


def stage_ms(box, rows, tp, pp):
    """The time that one batch of `rows` takes in one stage of a replica."""
    links = box["links"]
    within = links["node" if tp <= box["ranks_per_node"] else "net"]
    between = links["node" if tp * pp <= box["ranks_per_node"] else "net"]
    step, serial = at(rows, box["step_ms"]), at(rows, box["serial_ms"])
    together = box["together"] if tp * pp > 1 else 1
    broadcast = at(rows, box["broadcast_ms"]) if tp * pp > 1 else 0.0
    tensor = hop = 0.0
    if tp > 1:
        ring = 2 * (tp - 1) / tp
        tensor = (2 * box["layers"] * exchange_ms(within, 4 * rows * box["hidden"], ring)
                  + exchange_ms(within, 4 * rows * box["vocabulary"], (tp - 1) / tp))
    if pp > 1:
        hop = exchange_ms(between, 2 * rows * box["hidden"], 1)
    shared = max(step - serial, 0) * box.get("uneven", {}).get(str(tp), 1) / (tp * pp)
    return serial + shared * together + broadcast + tensor / pp + hop


def predicted(box, gpus, tp, pp, clients):
    """(total tokens per second, tokens per second of one client, ms between two tokens) of gpus / (tp pp) replicas."""
    replicas = gpus // (tp * pp)
    shares = [clients // replicas + (replica < clients % replicas) for replica in range(replicas)]
    busy = sum(map(bool, shares))       # a replica without clients delays nobody
    total = slowest = front = 0.0
    for share in filter(None, shares):
        batch = -(-share // pp)
        stage = stage_ms(box, batch, tp, pp)
        if tp * pp == 1 and min(busy, box["ranks_per_node"]) > 1:
            stage += max(at(batch, box["step_ms"]) - at(batch, box["serial_ms"]), 0) * (box["together"] - 1)
        if busy * tp * pp >= box["ranks_per_node"]:     # no CPU is left for others
            stage += at(batch, box.get("overhead_ms", {1: 0.0}))
        total += share / (pp * stage) * 1e3
        slowest = max(slowest, pp * stage)
        front += at(batch, box["front_ms"]) / (pp * stage) * pp
    total /= max(front, 1.0)
    return total, total / clients, slowest


def table(box, most, clients):
    """Markdown: a row for each way to use each number of GPUs."""
    lines = ["| GPUs | replicas | tp | pp | tok/s | tok/s per client | ms between tokens | of linear |", "|---" * 8 + "|"]
    one, *_ = predicted(box, 1, 1, 1, clients)
    powers = [1 << power for power in range(most.bit_length()) if 1 << power <= most]
    for gpus in powers:
        for tp in powers:
            for pp in powers:
                if tp <= box["ranks_per_node"] and pp <= min(8, box["layers"]) and tp * pp <= gpus:
                    total, each, between = predicted(box, gpus, tp, pp, clients)
                    lines.append(f"| {gpus} | {gpus // (tp * pp)} | {tp} | {pp} | {total:,.0f} | {each:,.1f} | {between:,.1f} | "
                                 f"{total / one / gpus:.2f} |")
    return "\n".join(lines)


# 2. measuring here -----------------------------------------------------------------------------------------------

ROWS = (1, 2, 4, 8, 16, 32)


def measured_steps(model, threads, rows, context, steps):
    """rows -> median ms of Engine.step: scheduling, computing, drawing, text; and of sending such a step to another rank."""
    from chatlm.common.config import Settings
    from chatlm.common.hub.default_model import fetch_default_model
    from chatlm.common.hub.find import resolve_model
    from chatlm.common.messages.requests import AnswerParams, SamplingParams
    from chatlm.worker.build import build_engine
    from chatlm.worker.engine.sequence import Assignment
    from chatlm.worker.engine.warm_up import WarmUp
    from chatlm.worker.ranks.messages import RANK_PIPE
    from chatlm.worker.ranks.runners import rank_step
    import torch
    torch.set_num_threads(threads)
    settings = Settings(model=model or str(fetch_default_model()), kv_cache_memory=512 << 20, drafts="none")
    model, engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))
    WarmUp(engine).complete(lambda fraction: None)
    start, orders = engine.runner.start, {}

    def noted(batch, each):
        orders[len(each)] = RANK_PIPE.packed(rank_step(batch, each)), batch, each
        return start(batch, each)
    found, broadcast = {}, {}
    for count in rows:
        params = AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True)
        for row in range(count):
            engine.add(Assignment(f"{count}-{row}", tuple((row * 31 + i * 7) % 900 + 100 for i in range(context)), params, steps + 8))
        while engine.queue.waiting or any(each.prefilling for each in engine.queue.running):
            engine.step()
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            engine.step()
            times.append(1e3 * (time.perf_counter() - began))
        engine.runner.start = noted
        engine.step()
        engine.runner.start = start
        while engine.busy:
            engine.step()
        found[count], broadcast[count] = round(statistics.median(times[2:]), 3), round(telling_ms(*orders[count][1:]), 3)
    return {"step_ms": found, "broadcast_ms": broadcast, "layers": len(model.architecture.layers), "hidden": model.architecture.width, "vocabulary": model.architecture.vocab_size,
            "uneven": {str(tp): round(unevenness(model.architecture, tp), 3) for tp in (2, 4, 8)}}


def telling_ms(batch, rows):
    """Median ms from when rank 0 packs a step until another rank has read it, without the time to wake that process."""
    from chatlm.common.messages.wire import Channel
    from chatlm.worker.ranks.messages import RANK_PIPE
    from chatlm.worker.ranks.runners import rank_step
    times, (ours, theirs) = [], socket.socketpair()
    with ours, theirs:
        channel = Channel(theirs, RANK_PIPE)
        for _ in range(30):
            began = time.perf_counter()
            ours.sendall(RANK_PIPE.packed(rank_step(batch, rows)))
            channel.receive(wait=True)
            times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def unevenness(model, tp):
    """The weights of the rank with the most KV heads, divided by an even share."""
    layers, attn = len(model.layers), model.attention
    attention = 2 * model.width * attn.head_size * (attn.heads + attn.kv_heads) * layers
    even = 3 * model.width * model.feed_width * layers + model.width * model.vocab_size
    return (attention * max(-(-attn.kv_heads // tp), 1) / attn.kv_heads * tp + even) / (attention + even)


def in_processes(count, threads, arguments):
    """The same in `count` processes at once; the mean of each figure."""
    command = [sys.executable, __file__, "steps", "--threads", str(threads), "--rows", ",".join(map(str, arguments.rows)),
               "--context", str(arguments.context), "--steps", str(arguments.steps), "--model", arguments.model]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "2000"}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    results = [json.loads(process.communicate()[0]) for process in started]
    return results[0] | {"step_ms": {rows: statistics.fmean(each["step_ms"][rows] for each in results) for rows in results[0]["step_ms"]}}


WAYS = ((1, 1), (2, 1), (1, 2))     # processes, threads of each


def measured_link():
    """Medians of the exchanges between two ranks, measured by bench/ranks.py as in a recorded step."""
    printed = subprocess.run([sys.executable, Path(__file__).with_name("ranks.py"), "--bytes", "4096,1048576"],
                             capture_output=True, text=True, check=True).stdout
    small, large = (float(line.split("median")[1].split(" us")[0]) for line in printed.splitlines() if "copied" in line and "written" not in line)
    return {"latency_us": small, "GB_per_s": round((1048576 - 4096) / max(large - small, 1e-3) / 1e3, 2)}


def box_of(one, both, two, link):
    """The model's inputs on this machine, with one thread as one rank: steps alone, next to another's, with two threads."""
    serial = {rows: max(2 * two["step_ms"][rows] - ms, 0.0) for rows, ms in one["step_ms"].items()}  # Amdahl's law
    ratios = [both["step_ms"][rows] / ms for rows, ms in one["step_ms"].items()]
    return one | {"serial_ms": serial, "two_threads_ms": two["step_ms"], "together": round(statistics.median(ratios), 3),
                  "links": {"node": link, "net": link}, "ranks_per_node": 2,
                  "front_ms": {1: 0.034, 2: 0.068}}     # load_front.py: 55 % of a core at 16,000 events a second


def measure(arguments):
    found = [[in_processes(*how, arguments) for how in WAYS] for _ in range(arguments.rounds)]
    best = (runs[0] | {"step_ms": {rows: min(each["step_ms"][rows] for each in runs) for rows in runs[0]["step_ms"]}}
            for runs in zip(*found))        # the best: the host may put both CPUs on one core for minutes
    return box_of(*best, measured_link()) | {"model": arguments.model}


# 3. the check ----------------------------------------------------------------------------------------------------


LAYOUTS = ((1, 1), (2, 1), (1, 2))      # replicas, tp


def thread_ms(process):
    """CPU time of a process's main thread, where the front runs its event loop."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e6


async def delivered(server, front, texts):
    """(tokens per second of decoding while all clients' answers run, ms of CPU per step: of the front, of front and clients)."""
    used = []

    async def watch(clock):
        while True:
            used.append((clock(), thread_ms(front), 1e3 * time.process_time()))
            await asyncio.sleep(0.02)
    began_s = time.perf_counter()
    watching = asyncio.ensure_future(watch(lambda: time.perf_counter() - began_s))
    answers = await load.Load("check", tuple(texts), len(texts)).run(server)
    watching.cancel()
    if errors := {each.error for each in answers if each.error}:
        sys.exit(f"the server answers {errors}")
    first, last = max(each.pieces[0] for each in answers), min(each.pieces[-1] for each in answers)
    tokens = sum(sum(first < at_s <= last for at_s in each.pieces) * each.tokens / len(each.pieces) for each in answers)
    times, *spent = zip(*used)
    taken = [at_time(last, times, each) - at_time(first, times, each) for each in spent]
    steps = tokens / len(texts)
    return tokens / (last - first), taken[0] / steps, sum(taken) / steps


def at_time(at_s, times, values):
    """Interpolated between the samples."""
    index = min(max(bisect.bisect(times, at_s), 1), len(times) - 1)
    (before, after), (low, high) = times[index - 1:index + 1], values[index - 1:index + 1]
    return low + (high - low) * (at_s - before) / (after - before)


@contextlib.contextmanager
def layout_server(model, replicas, tp, most):
    """(url, process id) of a real server with one thread for each rank. Its front may use every CPU, so it gets one if a rank leaves one free."""
    command = ("serve", *filter(None, [model]), "--num-workers", replicas, "--tp", tp, "--no-drafts", "--max-batch", most,
               "--device-type", "cpu", "--kv-cache-memory", "512M")
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[:replicas * tp])
    with our_server(*command, env=os.environ | {"CHAT_SERVER_CONFIG": ""}) as server:
        os.sched_setaffinity(0, cpus)
        os.sched_setaffinity(server.process.pid, cpus[replicas * tp:] or cpus)
        yield server.url, server.process.pid


async def check(arguments):
    """Prints predicted and delivered throughput. Each round measures steps and links anew, alternating with the servers' throughput;
    rounds in which other programs took a tenth of a CPU do not count, unless all are like that."""
    seeds, ratios = itertools.count(1), {}
    with contextlib.ExitStack() as stack:
        servers = {layout: stack.enter_context(layout_server(arguments.model, *layout, max(arguments.clients))) for layout in LAYOUTS}
        options = load.parse_command_line(["-", "--output-tokens", str(arguments.tokens), "--input-tokens", "32"])
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
            processes = [psutil.Process(front) for _, front in servers.values()]
            opened = {layout: (await load.open_server(url, session, options), front) for layout, (url, front) in servers.items()}
            for turn in range(arguments.rounds):
                agreement.wait_for_quiet()
                steps, got, before, began_s = [], {}, agreement.busy_s(*processes), time.monotonic()
                for way, layout in zip(WAYS, LAYOUTS):
                    steps.append(await asyncio.to_thread(in_processes, *way, arguments))
                    for count in arguments.clients:
                        got[*layout, count] = await delivered(*opened[layout], [load.prompt(32, next(seeds)) for _ in range(count)])
                box = box_of(*steps, await asyncio.to_thread(measured_link))
                box |= {name: {count: got[1, 1, count][column] for count in arguments.clients} for name, column in (("front_ms", 1), ("overhead_ms", 2))}
                everything, ours = (now - then for then, now in zip(before, agreement.busy_s(*processes)))
                others = (everything - ours) / (time.monotonic() - began_s)
                if arguments.box:
                    arguments.box.write_text(json.dumps(box, indent=1) + "\n")
                for (replicas, tp, count), (rate, *_) in got.items():
                    said = predicted(box, replicas * tp, tp, 1, count)[0]
                    ratios.setdefault((replicas, tp, count), []).append((others, said, rate))
                    print(f"round {turn}: replicas {replicas}, tp {tp}, {count} clients: predicted {said:,.1f} tok/s, delivered {rate:,.1f}, "
                          f"ratio {rate / said:.2f}", flush=True)
                print(f"  other programs took {others:.2f} CPUs; together {box['together']}, exchange {box['links']['node']}, broadcast {box['broadcast_ms']}, overhead {box['overhead_ms']}, "
                      f"step {box['step_ms']}, two threads {box['two_threads_ms']}", flush=True)
    for (replicas, tp, count), rounds in ratios.items():
        pairs = [pair for others, *pair in rounds if others < 0.1] or [pair for _, *pair in rounds]
        each = sorted(rate / said for said, rate in pairs)
        said, rate = map(statistics.median, zip(*pairs))
        print(f"| {replicas} | {tp} | {count} | {said:,.0f} | {rate:,.0f} | {statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f}) |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("measure", "predict", "check", "steps"))
    parser.add_argument("box", nargs="?", type=Path, help="the JSON file; check writes there what its last round measured")
    for name, default in (("gpus", 64), ("tokens", 96), ("rounds", 3), ("threads", 1), ("context", 128), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("rows", ROWS), ("clients", [64])):
        parser.add_argument(f"--{name}", type=lambda text: [int(each) for each in text.split(",")], default=default)
    parser.add_argument("--model", default="", help="to measure (default: the default model)")
    arguments = parser.parse_args(argv)
    if arguments.action == "predict" and not arguments.box:
        parser.error("predict needs the JSON file that `measure` prints")
    if arguments.action == "steps":
        print(json.dumps(measured_steps(arguments.model, arguments.threads, arguments.rows, arguments.context, arguments.steps)))
    elif arguments.action == "measure":
        print(json.dumps(measure(arguments), indent=1))
    elif arguments.action == "predict":
        print(table(json.loads(arguments.box.read_text()), arguments.gpus, arguments.clients[0]))
    else:
        asyncio.run(check(arguments))


if __name__ == "__main__":
    main()
