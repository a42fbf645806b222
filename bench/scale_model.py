"""How much 1 to 64 GPUs would deliver, reckoned from what was measured on one: throughput by tp, pp and replicas.

    python bench/scale_model.py measure > box.json                        step times on this machine's CPUs
    python bench/scale_model.py predict box.json --clients 256            a table for 1 to 64 GPUs
    python bench/scale_model.py check box.json --clients 1,16             one replica, two, and one of --tp 2, of the real
                                                                          server, beside what the model says of them

The JSON file says what was measured; for a box of GPUs, write it from bench/cuda_decode.py and the links' figures:

    layers, hidden, vocabulary       of the model
    step_ms       rows -> ms of a decode step on one rank (one GPU; here one thread)
    serial_ms     rows -> the part of it that no second rank shortens: scheduling, text, launches, draws
    together      by how much a step is longer when the machine's other ranks are busy too (GPUs: 1)
    links         "node" within a machine, "net" between machines: latency_us of one exchange, GB_per_s
    ranks_per_node
    front_us      of the front's one core for one token; it bounds the sum of all replicas

The model. A replica has tp x pp ranks and serves its share of the clients in pp batches, one in each stage. A stage takes

    serial + (step - serial) x together / (tp x pp) + tensor / pp + hop

where tensor = 2 all_reduces (hidden, float32) a layer and a gather of the logits, each latency + bytes x 2 (tp - 1) / tp / bandwidth,
and hop = latency + the rows of hidden states in 16 bits / bandwidth. Every stage's time yields one token for each row of a batch. Times
between measured rows are interpolated, beyond them extrapolated by the last slope. It leaves out prefill, which delays steps by as
much as prompts are long, and uneven arrivals: it is a bound for answers that are long beside their prompts.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# 1. the model ----------------------------------------------------------------------------------------------------


def at(rows, points):
    """The line through measured (rows -> value), straight between them and beyond the last; constant before the first."""
    known = sorted((int(each), value) for each, value in points.items())
    if rows <= known[0][0] or len(known) == 1:
        return known[0][1]
    (low, below), (high, above) = next((pair for pair in pairwise(known) if rows <= pair[1][0]), known[-2:])
    return below + (above - below) * (rows - low) / (high - low)


def exchange_ms(link, count, share):
    """One exchange of `count` bytes, of which each rank sends `share`."""
    return link["latency_us"] / 1e3 + count * share / link["GB_per_s"] / 1e6


def stage_ms(box, rows, tp, pp):
    """What one batch of `rows` takes in one stage of a replica."""
    links = box["links"]
    within = links["node" if tp <= box["ranks_per_node"] else "net"]
    between = links["node" if tp * pp <= box["ranks_per_node"] else "net"]
    step, serial = at(rows, box["step_ms"]), at(rows, box["serial_ms"])
    together = box["together"] if tp * pp > 1 else 1
    tensor = hop = 0.0
    if tp > 1:
        ring = 2 * (tp - 1) / tp
        tensor = (2 * box["layers"] * exchange_ms(within, 4 * rows * box["hidden"], ring)
                  + exchange_ms(within, 4 * rows * box["vocabulary"], (tp - 1) / tp))
    if pp > 1:
        hop = exchange_ms(between, 2 * rows * box["hidden"], 1)
    return serial + max(step - serial, 0) * together / (tp * pp) + tensor / pp + hop


def predicted(box, gpus, tp, pp, clients):
    """(tokens a second in all, tokens a second of one client, ms between two tokens) of gpus / (tp pp) replicas."""
    replicas = gpus // (tp * pp)
    shares = [clients // replicas + (replica < clients % replicas) for replica in range(replicas)]
    total = slowest = 0.0
    for share in filter(None, shares):
        batch = -(-share // pp)
        stage = stage_ms(box, batch, tp, pp)
        if tp * pp == 1 and min(sum(map(bool, shares)), box["ranks_per_node"]) > 1:     # one without clients delays nobody
            stage += max(at(batch, box["step_ms"]) - at(batch, box["serial_ms"]), 0) * (box["together"] - 1)
        total += share / (pp * stage) * 1e3
        slowest = max(slowest, pp * stage)
    total = min(total, 1e6 / box["front_us"])
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
    """rows -> median ms of Engine.step: scheduling, computing, drawing, text."""
    import chat_server
    import torch
    torch.set_num_threads(threads)
    settings = chat_server.Settings(model=model or str(chat_server.fetch_default_model()), kv_cache_memory=512 << 20, drafts=False)
    model, engine = chat_server.build_engine(chat_server.resolve_model(settings), settings, torch.device("cpu"))
    engine.warm_up(lambda fraction: None)
    found = {}
    for count in rows:
        params = chat_server.AnswerParams(sampling=chat_server.SamplingParams(temperature=0.0), ignore_eos=True)
        for row in range(count):
            engine.add(chat_server.Assignment(f"{count}-{row}", tuple((row * 31 + i * 7) % 900 + 100 for i in range(context)), params, steps + 8))
        while engine.scheduler.waiting or any(each.prefilling for each in engine.scheduler.running):
            engine.step()
        times = []
        for _ in range(steps):
            began = time.perf_counter()
            engine.step()
            times.append(1e3 * (time.perf_counter() - began))
        while engine.busy:
            engine.step()
        found[count] = round(statistics.median(times[2:]), 3)
    return {"step_ms": found, "layers": model.spec.layers, "hidden": model.spec.width, "vocabulary": model.spec.vocab_size}


def in_processes(count, threads, arguments):
    """The same in `count` processes at once; of each figure the mean."""
    command = [sys.executable, __file__, "steps", "--threads", str(threads), "--rows", ",".join(map(str, arguments.rows)),
               "--context", str(arguments.context), "--steps", str(arguments.steps), "--model", arguments.model]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "2000"}
    started = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    results = [json.loads(process.communicate()[0]) for process in started]
    return results[0] | {"step_ms": {rows: statistics.fmean(each["step_ms"][rows] for each in results) for rows in results[0]["step_ms"]}}


def measure(arguments):
    """What the model needs, of this machine: one thread is one rank. The exchanges are those of bench/ranks.py."""
    found = [[in_processes(*how, arguments) for how in ((1, 1), (1, 2), (2, 1))] for _ in range(arguments.rounds)]
    one, two, both = (runs[0] | {"step_ms": {rows: min(each["step_ms"][rows] for each in runs) for rows in runs[0]["step_ms"]}}
                      for runs in zip(*found))        # the best: the host may put both CPUs on one core for minutes
    serial = {rows: max(2 * two["step_ms"][rows] - ms, 0.0) for rows, ms in one["step_ms"].items()}  # Amdahl's law
    ratios = [both["step_ms"][rows] / ms for rows, ms in one["step_ms"].items()]
    printed = subprocess.run([sys.executable, Path(__file__).with_name("ranks.py"), "--bytes", "4096,1048576"],
                             capture_output=True, text=True, check=True).stdout
    small, large = (float(line.split("best")[1].split(",")[0]) for line in printed.splitlines())
    link = {"latency_us": small, "GB_per_s": round((1048576 - 4096) / (large - small) / 1e3, 2)}
    return one | {"model": arguments.model, "serial_ms": serial, "two_threads_ms": two["step_ms"], "together": round(statistics.median(ratios), 3),
                  "links": {"node": link, "net": link}, "ranks_per_node": 2, "front_us": 34.0}  # load_front.py: 55 % of a core at 16,000 events a second


# 3. the check ----------------------------------------------------------------------------------------------------


async def delivered(model, replicas, tp, clients, tokens, rounds):
    """Tokens a second of the real server, with one thread for each rank, through HTTP, for each number of clients: the best of rounds."""
    import aiohttp
    import load
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import real_server
    command = ("serve", *filter(None, [model]), "--num-workers", replicas, "--tp", tp, "--no-drafts", "--max-batch", max(clients),
               "--device-type", "cpu", "--kv-cache-memory", "512M")
    cpus, found = os.sched_getaffinity(0), {}
    os.sched_setaffinity(0, sorted(cpus)[:replicas * tp])      # a thread for each, as in step_ms
    with real_server.server(*command, env=os.environ | {"CHAT_SERVER_CONFIG": ""}) as (process, url):
        os.sched_setaffinity(0, cpus)
        arguments = load.parse_command_line([url, "--output-tokens", str(tokens), "--input-tokens", "32"])
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True)) as session:
            server, seeds = await load.open_server(url, session, arguments), iter(range(1, 1 << 30))
            for count in clients:
                found[count] = []
                for _ in range(rounds):
                    answers = await load.Load("check", tuple(load.prompt(32, next(seeds)) for _ in range(count)), count).run(server)
                    first, last = max(each.pieces[0] for each in answers), min(each.pieces[-1] for each in answers)
                    span = [sum(first < at_s <= last for at_s in each.pieces) * each.tokens / len(each.pieces) for each in answers]
                    found[count].append(sum(span) / (last - first))
    return {count: max(each) for count, each in found.items()}


def check(box, clients, tokens, rounds):
    """Prints predicted and delivered throughput of decoding, while all clients' answers run."""
    for replicas, tp in ((1, 1), (2, 1), (1, 2)):
        for count, got in asyncio.run(delivered(box.get("model"), replicas, tp, clients, tokens, rounds)).items():
            said = predicted(box, replicas * tp, tp, 1, count)[0]
            print(f"replicas {replicas}, tp {tp}, {count} clients: predicted {said:,.1f} tok/s, delivered {got:,.1f}, ratio {got / said:.2f}", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("measure", "predict", "check", "steps"))
    parser.add_argument("box", nargs="?", type=Path, help="the JSON file")
    for name, default in (("gpus", 64), ("tokens", 96), ("rounds", 3), ("threads", 1), ("context", 128), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("rows", ROWS), ("clients", [64])):
        parser.add_argument(f"--{name}", type=lambda text: [int(each) for each in text.split(",")], default=default)
    parser.add_argument("--model", default="", help="to measure (default: the default model)")
    arguments = parser.parse_args(argv)
    if arguments.action in ("predict", "check") and not arguments.box:
        parser.error(f"{arguments.action} needs the JSON file that `measure` prints")
    box = json.loads(arguments.box.read_text()) if arguments.box else None
    if arguments.action == "steps":
        print(json.dumps(measured_steps(arguments.model, arguments.threads, arguments.rows, arguments.context, arguments.steps)))
    elif arguments.action == "measure":
        print(json.dumps(measure(arguments), indent=1))
    elif arguments.action == "predict":
        print(table(box, arguments.gpus, arguments.clients[0]))
    else:
        check(box, arguments.clients, arguments.tokens, arguments.rounds)


if __name__ == "__main__":
    main()
