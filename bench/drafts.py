"""What drafts from text bring: acceptance and speed, on fixed transcripts.

    python bench/drafts.py [MODEL.gguf] [--kinds agents edits ...] [--ways none last lookup] [--rounds 3] [--clients 1]
    python bench/drafts.py [MODEL.gguf] --llama-server PATH      the model's own greedy answers, ours beside llama-server's

bench/transcripts.json has what was asked and answered: code edits, an agent's tool calls, retries, JSON, prose. Each step really
computes; then the transcript's token takes the place of the drawn one, so that every way and every model says the same. In a kind that
`continues` each prompt is added to the conversation so far; else each turn is a conversation of its own, by the same owner. `last` is
what the server did until 2026-11: what followed the last three tokens when they last occurred, 7 tokens, in at most 8 rows.
Speeds are of the tokens after an answer's first one, ways in turns; the median of the rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from quality import build_engine        # noqa: E402

from chatlm.common.messages.requests import AnswerParams, SamplingParams       # noqa: E402
from chatlm.worker.engine.drafts import NO_DRAFT, Draft, Drafting               # noqa: E402
from chatlm.worker.engine.lookup import Lookup      # noqa: E402
from chatlm.worker.engine.sequence import Assignment        # noqa: E402

TRANSCRIPTS = Path(__file__).with_name("transcripts.json")


class LastPlace:
    """A source: what followed the last three tokens when they last occurred; pauses if often wrong (Saxena, 2023)."""

    name, RUN, LONGEST, PATIENCE = "lookup", 3, 7, 64

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
        times = engine.drafting.times
        engine.drafting = engine.scheduler.drafting = WAYS[way]()
        engine.drafting.times = times       # as a server that has run for a while
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
    return tokens * clients / spent_s if clients == 1 else tokens / spent_s * clients, *counts, tokens, steps


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
    parser.add_argument("--llama-server")
    arguments = parser.parse_args()
    ours(arguments)


if __name__ == "__main__":
    main()
