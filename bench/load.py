"""How fast an OpenAI-compatible server answers, as its users experience it: latency, throughput and goodput under four loads.

    python bench/load.py http://127.0.0.1:8000 [--svg load.svg] [--json load.json]
    python bench/load.py ours=http://127.0.0.1:8000 llama=http://127.0.0.1:8080 --only interactive,batch
    python bench/load.py URL --only open --rates 0.5,1,2,4 --seconds 60 --goal-ttft-ms 500 --goal-tpot-ms 50

The loads:

    interactive   one person, who asks again once the answer has arrived
    batch         ten questions at once
    high          --clients people, who each ask again once their answer has arrived, three questions each
    open          questions arrive at random (Poisson) at each of --rates per second, however slow the answers are

Several servers take turns, load by load. All get the same questions at the same times; each question is new, so
no cache helps. --prompts writes them as JSON lines, as guidellm and aiperf read them.

What the figures mean:

    TTFT          from the moment at which a question was due to its first text; open: waiting to be sent counts
    ITL           between two pieces of text of one answer; over all such gaps of all answers
    TPOT          of one answer: from its first text to its last, divided by its tokens minus one
    per user      tokens per second of one answer after its first text: 1 / TPOT; the median
    total         all tokens, divided by the seconds from the first question to the end of the last answer
    goodput       answers per second whose TTFT and TPOT both meet the goal, and their share of all answers

Tokens are the server's own usage figures. A piece may carry several tokens, so ITL may exceed TPOT. What arrives is
only timestamped; it is parsed after the load, so that parsing takes no time from a server on the same cores.
"""

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import aiohttp

ROOT = Path(__file__).resolve().parent.parent
WORDS = "the river carried small boats past gardens and markets where people talked about weather bread and music".split()
TEMPLATE_TOKENS = 12        # about what the chat template adds around the words


def prompt(tokens, seed):
    """A question of about `tokens` tokens. It begins with its seed, so no two share a page of a prefix cache."""
    words = random.Random(seed).choices(WORDS, k=max(tokens - TEMPLATE_TOKENS, 1))
    return f"{seed} {' '.join(words)}"


# 1. one answer ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """The answer to one question. Times are seconds since the load began; `pieces` has those of its pieces of text."""

    due_s: float
    end_s: float
    pieces: tuple[float, ...] = ()
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self):
        return self.pieces[0] - self.due_s

    @property
    def tpot_s(self):
        return (self.pieces[-1] - self.pieces[0]) / (self.tokens - 1)

    @property
    def gaps_s(self):
        return [after - before for before, after in zip(self.pieces, self.pieces[1:])]

    def meets(self, goal):
        return not self.error and self.ttft_s <= goal.ttft_s and self.tpot_s <= goal.tpot_s


@dataclass(frozen=True)
class Goal:
    ttft_s: float
    tpot_s: float


@dataclass(frozen=True)
class Server:
    name: str
    url: str
    model: str
    session: aiohttp.ClientSession
    tokens: int
    extra: dict     # members of the body that OpenAI does not know, such as ignore_eos

    async def ask(self, text, due_s, clock):
        """Stream one answer; an Answer that only has an error if the server refused or broke off."""
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "max_tokens": self.tokens,
                "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **self.extra}
        stamped = []
        try:
            async with self.session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    return Answer(due_s, clock(), error=f"{response.status} {(await response.text())[:200]}")
                async for data in response.content.iter_any():
                    stamped.append((clock(), data))
        except (aiohttp.ClientError, asyncio.TimeoutError) as error:
            return Answer(due_s, clock(), error=f"{type(error).__name__} {error}")
        return due_s, clock(), stamped


def read_answer(got):
    """An Answer from the received bytes and their times."""
    if isinstance(got, Answer):
        return got
    due_s, end_s, stamped = got
    pieces, usage, rest = [], None, b""
    for at_s, data in stamped:
        *lines, rest = (rest + data).split(b"\n")
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        for event in events:
            usage = event.get("usage") or usage
            if "error" in event:
                return Answer(due_s, end_s, error=json.dumps(event["error"])[:200])
        said = any(delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
                   for event in events for choice in event.get("choices", ()) for delta in [choice.get("delta", {})])
        pieces += [at_s] * said     # texts that arrive together are one piece
    if not pieces or not usage or usage["completion_tokens"] < 2:
        return Answer(due_s, end_s, error=f"no text, no usage or a single token: {stamped[-1:]}")
    return Answer(due_s, end_s, tuple(pieces), usage["prompt_tokens"], usage["completion_tokens"])


# 2. loads --------------------------------------------------------------------------------------------------------


async def in_turn(clock, ask, texts, clients):
    """`clients` people, who share the questions; each asks again once their answer has arrived."""
    left = iter(texts)

    async def client():
        return [await ask(text, clock(), clock) for text in left]
    return sum(await asyncio.gather(*(client() for _ in range(clients))), [])


async def at_random(clock, ask, texts, arrivals):
    async def one(text, due_s):
        await asyncio.sleep(due_s - clock())
        return await ask(text, due_s, clock)
    return await asyncio.gather(*map(one, texts, arrivals))


def poisson_arrivals(rate, seconds, seed):
    """Times of a Poisson process, at least one; the same for each server."""
    draw, times = random.Random(seed), []
    while not times or times[-1] < seconds:
        times.append((times[-1] if times else 0.0) + draw.expovariate(rate))
    return times[:-1] or times


@dataclass(frozen=True)
class Load:
    name: str
    texts: tuple[str, ...]
    clients: int = 0                    # 0: open
    arrivals: tuple[float, ...] = ()

    async def run(self, server):
        began_s = time.perf_counter()

        def clock():
            return time.perf_counter() - began_s
        got = await (in_turn(clock, server.ask, self.texts, self.clients) if self.clients else
                     at_random(clock, server.ask, self.texts, self.arrivals))
        return [read_answer(each) for each in got]


def planned_loads(arguments):
    """The requested loads, with all their questions."""
    seeds = iter(range(arguments.seed, 1 << 40))

    def texts(count):
        return tuple(prompt(arguments.input_tokens, next(seeds)) for _ in range(count))
    loads = []
    if "interactive" in arguments.only:
        loads.append(Load("interactive", texts(arguments.questions), 1))
    if "batch" in arguments.only:
        loads.append(Load("batch of 10", texts(10), 10))
    if "high" in arguments.only:
        loads.append(Load(f"{arguments.clients} clients", texts(3 * arguments.clients), arguments.clients))
    for rate in arguments.rates if "open" in arguments.only else ():
        arrivals = poisson_arrivals(rate, arguments.seconds, f"{arguments.seed} {rate}")
        loads.append(Load(f"open, {rate:g}/s", texts(len(arrivals)), arrivals=tuple(arrivals)))
    return loads


# 3. figures ------------------------------------------------------------------------------------------------------


def percentile(values, share):
    """Interpolated between the two nearest values; None if there are none."""
    if not values:
        return None
    values, at = sorted(values), share * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (values[min(low + 1, len(values) - 1)] - values[low]) * (at - low)


def figures(answers, goal):
    """Name -> value of one load at one server. Times are in ms if the name says so; None if nothing was measured."""
    good, seconds = [each for each in answers if not each.error], max(each.end_s for each in answers)
    tokens = sum(each.tokens for each in good)
    met = sum(each.meets(goal) for each in answers)
    times = {"TTFT": [each.ttft_s for each in good], "ITL": [gap for each in good for gap in each.gaps_s],
             "TPOT": [each.tpot_s for each in good]}
    tpot = percentile(times["TPOT"], 0.5)
    return {"answers": len(good), "failed": len(answers) - len(good), "seconds": seconds, "tokens": tokens,
            "seconds a message": percentile([each.end_s - each.due_s for each in good], 0.5),
            "prompt tokens a message": statistics.fmean(each.prompt_tokens for each in good) if good else None,
            "tokens a message": tokens / len(good) if good else None,
            **{f"{name} p{share}, ms": value and 1e3 * value for name, values in times.items() for share in (50, 99)
               for value in [percentile(values, share / 100)]},
            "tok/s per user": 1 / tpot if tpot else None, "tok/s total": tokens / seconds,
            "goodput, answers/s": met / seconds, "goodput, share": met / len(answers)}


def cell(value):
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}" if value < 10 else \
        f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def table(results):
    """Markdown: a column for each load at each server."""
    several = len({server for _, server in results}) > 1
    heads = [f"{load} ({server})" if several else load for load, server in results]
    rows = [["", *heads], ["---"] * (len(heads) + 1)]
    rows += [[name, *(cell(each["figures"][name]) for each in results.values())] for name in next(iter(results.values()))["figures"]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("| " + " | ".join(text.ljust(width) if text != "---" else "-" * width
                                       for text, width in zip(row, widths)) + " |" for row in rows)


# 4. the plot -----------------------------------------------------------------------------------------------------

COLOURS = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4b94", "#b8860b", "#444444", "#d1699b", "#2a9d8f")
DASHES = ("", "6 3", "2 2", "8 3 2 3")      # one for each server
PANEL, GAP, MARGIN = 340, 60, 50


def ticks(low, high):
    """1, 2 and 5 times the powers of ten within the range."""
    steps = [base * 10.0 ** power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1) for base in (1, 2, 5)]
    return [step for step in steps if low <= step <= high]


def panel(title, lines, left, goal_ms):
    """SVG: the share of values (y) below a number of ms (x, logarithmic). `lines`: (values, colour, dash)."""
    values = [value for line, *_ in lines for value in line if value > 0] + [goal_ms]
    low, high = min(values) * 0.9, max(values) * 1.1

    def x(value):
        return left + PANEL * math.log(max(value, low) / low) / math.log(high / low)

    def y(share):
        return MARGIN + PANEL * 0.7 * (1 - share)
    parts = [f'<text x="{left}" y="{MARGIN - 12}" font-weight="bold">{escape(title)}</text>']
    for share in (0, 0.5, 0.99):
        parts += [f'<path d="M{left} {y(share):.1f}h{PANEL}" stroke="#ddd"/>',
                  f'<text x="{left - 6}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>']
    for step in ticks(low, high):
        parts.append(f'<text x="{x(step):.1f}" y="{y(0) + 16:.1f}" text-anchor="middle">{step:g}</text>')
    parts.append(f'<path d="M{x(goal_ms):.1f} {y(1)}V{y(0)}" stroke="#999" stroke-dasharray="1 3"/>')
    for line, colour, dash in lines:
        line = sorted(line)
        path = "".join(f"L{x(value):.1f} {y((index + 1) / len(line)):.1f}" for index, value in enumerate(line))
        parts.append(f'<path d="M{x(line[0]):.1f} {y(0):.1f}{path}" fill="none" stroke="{colour}" stroke-width="1.6" '
                     f'stroke-dasharray="{dash}"/>' if line else "")
    return "\n".join(parts)


def plot(results, goal):
    """SVG: distributions of TTFT, ITL and TPOT; one colour per load, one dash pattern per server."""
    loads, servers = (list(dict.fromkeys(names)) for names in zip(*results))
    styles = {key: (COLOURS[loads.index(key[0]) % len(COLOURS)], DASHES[servers.index(key[1]) % len(DASHES)]) for key in results}
    measures = (("TTFT, ms", lambda each: [each.ttft_s], goal.ttft_s), ("ITL, ms", lambda each: each.gaps_s, goal.tpot_s),
                ("TPOT, ms", lambda each: [each.tpot_s], goal.tpot_s))
    parts = []
    for index, (title, take, limit_s) in enumerate(measures):
        lines = [([1e3 * value for each in result["answers"] if not each.error for value in take(each)], *styles[key])
                 for key, result in results.items()]
        parts.append(panel(title, lines, MARGIN + index * (PANEL + GAP), 1e3 * limit_s))
    below = MARGIN + PANEL * 0.7 + 44
    for index, (key, (colour, dash)) in enumerate(styles.items()):
        left, top = MARGIN + 280 * (index % 4), below + 18 * (index // 4)
        said = results[key]["figures"]
        parts += [f'<path d="M{left} {top - 4}h24" stroke="{colour}" stroke-width="2" stroke-dasharray="{dash}"/>',
                  f'<text x="{left + 30}" y="{top}">{escape(" ".join(key))}: {said["tok/s total"]:.0f} tok/s, '
                  f'{said["goodput, share"]:.0%} good</text>']
    top = below + 18 * math.ceil(len(styles) / 4) + 6
    parts.append(f'<text x="{MARGIN}" y="{top}" fill="#555">Up: the share of answers (ITL: of gaps between two pieces) that took at most '
                 f'the time below; dotted: the goal. good: the share of answers that met both goals.</text>')
    width, height = MARGIN + 3 * (PANEL + GAP), top + 14
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" font-family="sans-serif" font-size="11">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n")


# 5. command line -------------------------------------------------------------------------------------------------

LOADS = ("interactive", "batch", "high", "open")


def parse_command_line(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("servers", nargs="+", metavar="[NAME=]URL", help="of OpenAI-compatible servers, without /v1")
    parser.add_argument("--model", default="", help="its name in requests (default: the first of /v1/models)")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", ""), help="(default: $OPENAI_API_KEY)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=LOADS, help=f"of {','.join(LOADS)}")
    for name, default, what in (("input-tokens", 128, "of a question, about"), ("output-tokens", 64, "of an answer"),
                                ("questions", 10, "of the interactive load"), ("clients", 32, "of the high load"), ("seed", 1, "of questions and times")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default: {default})")
    parser.add_argument("--rates", type=lambda text: [float(each) for each in text.split(",")], default=[1.0], help="of the open load, answers a second")
    parser.add_argument("--seconds", type=float, default=30.0, help="of arrivals in the open load (default: 30)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one answer (default: 300)")
    parser.add_argument("--goal-ttft-ms", type=float, default=1000.0, help="(default: 1000)")
    parser.add_argument("--goal-tpot-ms", type=float, default=100.0, help="(default: 100; ten tokens a second, faster than people read)")
    parser.add_argument("--keep-eos", action="store_true", help="send no ignore_eos: answers may be shorter")
    for name in ("svg", "json", "prompts"):
        parser.add_argument(f"--{name}", type=Path, help=f"write the {name} to this file")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.only) - set(LOADS):
        parser.error(f"--only knows {','.join(LOADS)}, not {','.join(sorted(unknown))}")
    if arguments.output_tokens < 2:
        parser.error("--output-tokens must be at least 2: TPOT is the time between tokens")
    return arguments


async def open_server(address, session, arguments):
    """The server at an address, with one request answered."""
    name, has_name, url = address.partition("=")
    name, url = (name, url) if has_name and "/" not in name else (address.split("://")[-1], address)
    url, model = url.rstrip("/"), arguments.model
    if not model:
        async with session.get(f"{url}/v1/models") as response:
            response.raise_for_status()
            model = (await response.json())["data"][0]["id"]
    server = Server(name, url, model, session, arguments.output_tokens, {} if arguments.keep_eos else {"ignore_eos": True})
    first = read_answer(await server.ask(prompt(arguments.input_tokens, 0), 0.0, time.perf_counter))
    if first.error:
        sys.exit(f"{name} does not answer: {first.error}")
    return server


async def main(arguments):
    loads, goal, results = planned_loads(arguments), Goal(arguments.goal_ttft_ms / 1e3, arguments.goal_tpot_ms / 1e3), {}
    headers = {"Authorization": f"Bearer {arguments.api_key}"} if arguments.api_key else {}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0, force_close=True),
                                     timeout=aiohttp.ClientTimeout(total=arguments.timeout)) as session:
        servers = [await open_server(address, session, arguments) for address in arguments.servers]
        for load in loads:
            for server in servers:
                answers = await load.run(server)
                results[load.name, server.name] = {"answers": answers, "figures": figures(answers, goal)}
                print(f"{load.name}, {server.name}: {len(answers)} answers, the last after {max(each.end_s for each in answers):.1f} s",
                      file=sys.stderr, flush=True)
                for error in dict.fromkeys(each.error for each in answers if each.error):
                    print(f"{load.name}, {server.name}: {error}", file=sys.stderr)
    print(f"Goal: TTFT within {arguments.goal_ttft_ms:g} ms and TPOT within {arguments.goal_tpot_ms:g} ms\n\n{table(results)}")
    if arguments.prompts:
        arguments.prompts.write_text("".join(json.dumps({"text": text}) + "\n" for load in loads for text in load.texts))
    if arguments.svg:
        arguments.svg.write_text(plot(results, goal))
    if arguments.json:
        rows = [{"load": load, "server": server, "figures": result["figures"], "answers": [asdict(each) for each in result["answers"]]}
                for (load, server), result in results.items()]
        arguments.json.write_text(json.dumps(rows) + "\n")


if __name__ == "__main__":
    asyncio.run(main(parse_command_line()))
