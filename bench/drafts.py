"""What drafts from text bring: acceptance and speed, on fixed transcripts.

    python bench/drafts.py [MODEL.gguf] [--kinds agents edits ...] [--ways none last lookup] [--rounds 3] [--clients 1]
    python bench/drafts.py [MODEL.gguf] --structured             answers that must fit a JSON schema with many keys, drawn by the model
    python bench/drafts.py MODEL.gguf --llama-server PATH        the model's own greedy answers to the prompts, beside llama-server's
                                                                 --spec-type ngram-*, each compared with its own program without drafts
    python bench/drafts.py [MODEL.gguf] --acceptance             no steps are computed: what the ways would accept if a row more took
                                                                 --slope of a step of one row, and what a token costs in Python

bench/transcripts.json has what was asked and answered: code edits, an agent's tool calls, retries, JSON, prose; and `unseen`, on which
nothing was tuned: an agent that fixes tests with SEARCH/REPLACE blocks, and one that operates a cluster by JSON. Each step really
computes; then the transcript's token takes the place of the drawn one, so that every way and every model says the same. In a kind that
`continues` each prompt is added to the conversation so far; else each turn is a conversation of its own, by the same owner. `last` is
what the server did until 2026-11: what followed the last three tokens when they last occurred, 7 tokens, in at most 8 rows.
Speeds are of the tokens after an answer's first one, ways in turns; the median of the rounds.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quality import build_engine        # noqa: E402
from servers import started     # noqa: E402

from chatlm.common.messages.requests import AnswerParams, Piece, SamplingParams, Usage      # noqa: E402
from chatlm.common.text.grammar import json_grammar     # noqa: E402
from chatlm.worker.engine.drafts import NO_DRAFT, Draft, Drafting               # noqa: E402
from chatlm.worker.engine.lookup import Lookup      # noqa: E402
from chatlm.worker.engine.sequence import Assignment        # noqa: E402

TRANSCRIPTS = Path(__file__).with_name("transcripts.json")


class LastPlace:
    """A source: what followed the last three tokens when they last occurred; pauses if often wrong (Saxena, 2023)."""

    name, RUN, LONGEST, PATIENCE = "lookup", 3, 7, 64
    rests = False

    def __init__(self):
        self.state = {}

    def begin(self, sequence):
        self.state[sequence] = [{}, self.RUN, 0.5, 0]       # ends, seen, share of right ones, silent until

    def propose(self, sequences):
        drafts = []
        for sequence in sequences:
            tokens, (ends, seen, _, silent) = sequence.tokens, self.state[sequence]
            for end in range(seen, len(tokens)):
                ends[tuple(tokens[end - self.RUN:end])] = end
            self.state[sequence][1] = max(seen, len(tokens))
            last = ends.get(tuple(tokens[-self.RUN:]))
            draft = tuple(tokens[last:last + self.LONGEST]) if last and len(tokens) >= silent else ()
            drafts.append(Draft(self.name, draft, (1.0,) * len(draft), len(tokens)) if draft else NO_DRAFT)
        return drafts

    def judge(self, sequence, draft, verified, accepted):
        state = self.state[sequence]
        state[2] += 0.2 * ((accepted > 0) - state[2])
        if state[2] < 0.25:
            state[2:] = 0.4, len(sequence.tokens) + self.PATIENCE

    def end(self, sequence):
        self.state.pop(sequence, None)

    def forget(self):
        self.state.clear()


class WithoutPolicy(Drafting):
    """Each draft as long as it is, where it fits in 8 rows."""

    def propose(self, sequences, rows, *load):
        for sequence, draft in zip(sequences, self.sources["lookup"].propose(sequences)):
            sequence.draft = draft if 2 * rows <= 8 else NO_DRAFT


WAYS = {"none": None, "last": lambda: WithoutPolicy([LastPlace()]), "lookup": lambda: Drafting([Lookup()])}


def transcripts(tokenizer, kinds):
    """{kind: sessions, each a list of (prompt ids, answer ids)}."""
    found = {}
    for kind, about in json.loads(TRANSCRIPTS.read_text()).items():
        sessions = found[kind] = []
        for session in about["sessions"]:
            said, turns = [], []
            for turn in session:
                said = (said if about["continues"] else []) + tokenizer.encode(turn["prompt"])
                answer = tokenizer.encode(turn["answer"])
                turns.append((tuple(said), tuple(answer)))
                said = said + answer
            sessions.append(turns)
    return {kind: found[kind] for kind in kinds or found}


def play(engine, way, sessions, clients):
    """Play sessions, `clients` at a time -> (tokens per second, drafted, accepted, tokens, steps)."""
    engine.drafts = way != "none"
    if engine.drafts:
        engine.drafting = WAYS[way]()
        engine.queue.on_end[:] = [engine.drafting.end]
        engine.drafting.times = engine.times       # as a server that has run for a while
    engine.pool.forget_cached()
    expected, begun_s, spent_s, tokens, steps, names = {}, {}, 0.0, 0, 0, {}
    start = type(engine)._start

    def scripted(plan):
        rows = [(expected[chunk.sequence.work.id], len(chunk.sequence.tokens) + i) for chunk in plan for i in range(chunk.draws)]
        finish = start(engine, plan)

        def finished():
            drawn = finish()
            return [answer[at] if at < len(answer) else token for token, (answer, at) in zip(drawn, rows)]
        return finished

    engine._start = scripted
    waiting = [(number, list(turns)) for number, turns in enumerate(sessions)]
    playing = {}

    def begin(number, turns):
        (prompt, answer), rest = turns[0], turns[1:]
        name = f"{number}/{len(rest)}"
        expected[name], names[name] = (*prompt, *answer), (number, rest, len(answer))
        params = AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True, client="bench")
        engine.add(Assignment(name, prompt, params, len(answer)))
        playing[name] = number

    while waiting or playing:
        while waiting and len(playing) < clients:
            begin(*waiting.pop(0))
        events, now = engine.step(), time.perf_counter()
        steps += 1
        for name, event in events:
            begun_s.setdefault(name, now)
            if type(event).__name__ in ("Ended", "Failed"):
                number, rest, length = names[name]
                spent_s += now - begun_s[name]
                tokens += length - 1
                del playing[name]
                if rest:
                    if engine.drafts and way == "lookup":
                        engine.drafting.sources["lookup"].stores.settle()
                    begin(number, rest)
    del engine._start
    counts = (engine.drafting.drafted.total, engine.drafting.accepted.total) if engine.drafts else (0, 0)
    return tokens * clients / spent_s, *counts, tokens, steps


class Played:
    """Enough of a sequence for the sources, without a model."""

    def __init__(self, prompt, cached):
        self.tokens, self.draft, self.drafts, self.adapter_digest = list(prompt), NO_DRAFT, False, ""
        self.work = SimpleNamespace(prompt_ids=prompt, params=SimpleNamespace(owner="", client="bench", logprobs=None, temporary=False))
        self.output = SimpleNamespace(usage=Usage(cached_tokens=cached), grammar=None)


def accepted(way, sessions, slope):
    """Sessions without a model -> (tokens per step of one row's time, drafted, accepted, tokens, steps, us of Python per token)."""
    drafting, spent, tokens, steps, python_s = WAYS[way](), 0.0, 0, 0, 0.0
    for rows in (1, 2, 4, 8, 16, 32, 64):
        drafting.times.rows.note(rows, 1 + slope * (rows - 1))
    for turns in sessions:
        cached = 0
        for prompt, answer in turns:
            sequence = Played(prompt, min(cached, len(prompt)))
            drafting.begin(sequence)
            sequence.tokens.append(answer[0])
            at = 1
            while at < len(answer):
                began_s = time.thread_time()
                drafting.propose([sequence], 1, 64)
                draft = sequence.draft.tokens[:len(answer) - at - 1]
                right = next((i for i, (one, other) in enumerate(zip(draft, answer[at:])) if one != other), len(draft))
                sequence.tokens += answer[at:at + right + 1]
                drafting.judge(sequence, len(draft), right, answer[at:at + right + 1])
                python_s += time.thread_time() - began_s
                sequence.draft = NO_DRAFT
                spent, steps, at = spent + 1 + slope * len(draft), steps + 1, at + right + 1
            tokens += len(answer) - 1
            cached = len(sequence.tokens) if len(turns) > 1 else 0
            drafting.end(sequence)
            if way == "lookup":
                drafting.sources["lookup"].stores.settle()
    return tokens / spent, drafting.drafted.total, drafting.accepted.total, tokens, steps, python_s / tokens * 1e6


def without_steps(arguments):
    kinds = transcripts(build_engine(arguments.model, ["--max-batch", "8"]).tokenizer, arguments.kinds)
    print(f"{'kind':8} {'way':7} {'of none':>7} {'of last':>7} {'drafted':>8} {'accepted':>8} {'tokens':>7} {'steps':>6} {'us/token':>8}")
    for kind, sessions in kinds.items():
        found = {way: accepted(way, sessions[:arguments.sessions], arguments.slope) for way in WAYS if way != "none"}
        for way, (rate, *counts, cost_us) in found.items():
            print(f"{kind:8} {way:7} {rate:7.2f} {rate / found['last'][0]:7.2f} {counts[0]:8} {counts[1]:8} {counts[2]:7} {counts[3]:6} {cost_us:8.1f}")


TEXT = {"type": "string", "maxLength": 12}
CUSTOMER = {"type": "object", "additionalProperties": False, "properties": {
    "customer_identifier": {"type": "integer", "maximum": 999}, "first_name": TEXT, "last_name": TEXT, "is_active_customer": {"type": "boolean"},
    "preferred_contact_method": {"enum": ["email", "telephone", "letter"]}, "billing_address": {
        "type": "object", "additionalProperties": False, "properties": {"street_name": TEXT, "house_number": {"type": "integer", "maximum": 99}, "city": TEXT},
        "required": ["street_name", "house_number", "city"]},
    "has_outstanding_invoices": {"type": "boolean"}}}
CUSTOMER["required"] = list(CUSTOMER["properties"])


def structured(arguments):
    """The same drawn answers in a grammar, without drafts and with; the first round of the latter fills the owner's store."""
    engine = build_engine(arguments.model, ["--max-batch", "8"])
    ids = tuple(engine.tokenizer.encode_prompt("A customer as JSON:\n"))
    works = [Assignment(str(seed), ids, AnswerParams(sampling=SamplingParams(temperature=0.7, seed=seed), grammar=json_grammar(CUSTOMER, "")), 200)
             for seed in range(6)]
    speeds, texts = {False: [], True: []}, {}
    for number in range(arguments.rounds + 1):
        for engine.drafts in (False, True):
            engine.drafting.forget()                    # forced tokens and what these answers have in common, no retries
            tokens, spent_s = 0, 0.0
            for work in works:
                engine.add(work)
                first_s, said = None, []
                while engine.busy:
                    for _, event in engine.step():
                        if isinstance(event, Piece):
                            said += event.tokens
                            first_s, before = first_s or time.perf_counter(), len(said) if first_s is None else before
                spent_s += time.perf_counter() - first_s
                tokens += len(said) - before
                assert texts.setdefault(work.id, said) == said, "drafts have changed a token"
            if number:
                speeds[engine.drafts].append(tokens / spent_s)
    counts = engine.drafting
    print(f"structured: {statistics.median(speeds[False]):.1f} tok/s without drafts, {statistics.median(speeds[True]):.1f} with, "
          f"{statistics.median(a / b for a, b in zip(speeds[True], speeds[False])):.2f} times; drafted {counts.drafted}, accepted {counts.accepted}")


SPECS = "none", "ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache"


def theirs(arguments, prompts, spec):
    """llama-server's tokens per second by kind."""
    command = [arguments.llama_server, "-m", arguments.model, "-c", "16384", "-np", "1", "-t", "2", "--spec-type", spec]
    with started(command, "llama-server") as server:
        return {kind: speed([server.post("/completion", {
            "prompt": list(ids), "n_predict": arguments.tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": True})["timings"] for ids in several])
                for kind, several in prompts.items()}


def speed(timings):
    return sum(one["predicted_n"] for one in timings) / sum(one["predicted_ms"] for one in timings) * 1e3


def beside_llama(arguments):
    engine = build_engine(arguments.model, ["--max-batch", "8"])
    prompts = {kind: [turns[0][0][-6000:] for turns in sessions[:arguments.sessions or 2]]
               for kind, sessions in transcripts(engine.tokenizer, arguments.kinds).items()}
    found = {}
    for way in ("none", "lookup"):
        engine.drafts, found[f"ours, {way}"] = way != "none", {}
        for kind, several in prompts.items():
            tokens = spent_s = 0
            for number, ids in enumerate(several):
                params = AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True, client=f"{kind} {number}")
                engine.add(Assignment("a", ids, params, arguments.tokens))
                first_s = None
                while engine.busy:
                    if any(isinstance(event, Piece) for _, event in engine.step()):
                        first_s = first_s or time.perf_counter()
                tokens, spent_s = tokens + arguments.tokens - 1, spent_s + time.perf_counter() - first_s
            found[f"ours, {way}"][kind] = tokens / spent_s
    for spec in SPECS:
        found[f"llama-server, {spec}"] = theirs(arguments, prompts, spec)
    for name, speeds in found.items():
        base = found[f"{name.partition(',')[0]}, none"]
        print(f"{name:30} " + "  ".join(f"{kind} {value:.1f} tok/s ({value / base[kind]:.2f})" for kind, value in speeds.items()), flush=True)


def ours(arguments):
    engine = build_engine(arguments.model, ["--max-batch", "64"])
    kinds = transcripts(engine.tokenizer, arguments.kinds)
    print(f"{'kind':8} {'way':7} {'tok/s':>7} {'of none':>7} {'of last':>7} {'drafted':>8} {'accepted':>8} {'tokens':>7} {'steps':>6}")
    for kind, sessions in kinds.items():
        sessions = sessions[:arguments.sessions]
        found = {way: [] for way in arguments.ways}
        for way in arguments.ways:      # warm
            play(engine, way, sessions[:1], arguments.clients)
        for _ in range(arguments.rounds):
            for way in arguments.ways:
                found[way].append(play(engine, way, sessions, arguments.clients))
        speeds = {way: statistics.median(one[0] for one in runs) for way, runs in found.items()}
        for way, runs in found.items():
            ratios = [f"{statistics.median(a[0] / b[0] for a, b in zip(runs, found[other])):7.2f}" if other in found else " " * 7
                      for other in ("none", "last")]
            print(f"{kind:8} {way:7} {speeds[way]:7.1f} {' '.join(ratios)} {runs[-1][1]:8} {runs[-1][2]:8} {runs[-1][3]:7} {runs[-1][4]:6}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--kinds", nargs="+", choices=sorted(json.loads(TRANSCRIPTS.read_text())))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--sessions", type=int, help="play only the first ones of each kind")
    parser.add_argument("--acceptance", action="store_true")
    parser.add_argument("--slope", type=float, default=0.06)
    parser.add_argument("--structured", action="store_true")
    parser.add_argument("--llama-server")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer that is compared with llama-server's")
    arguments = parser.parse_args()
    if arguments.llama_server and not arguments.model:
        parser.error("--llama-server needs MODEL.gguf")
    (without_steps if arguments.acceptance else structured if arguments.structured else beside_llama if arguments.llama_server else ours)(arguments)


if __name__ == "__main__":
    main()
