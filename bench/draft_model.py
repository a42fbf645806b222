"""From which acceptance on does a second model that drafts pay? By the measured times of both models' steps.

    python bench/draft_model.py TARGET[,DRAFT]... [--context 256] [--rounds 9]
    python bench/draft_model.py TARGET,DRAFT... --answers 160 [--llama-server PATH] [--rounds 3] [--kinds code prose edits agents]

For each pair the target's step of one row, its steps of 1 + k rows, and the draft model's step of one row are measured in turns, in
this process, without a front; the medians make the table. Acceptance is assumed, not measured: with each drafted token right with
probability a, one round of k drafts gives 1 + a + a^2 + ... + a^k tokens in t(1 + k) + k t(draft). So models of random weights will do.
"Pays from" is the least a at which the best k is faster than no drafts.

--answers: nothing is assumed. Both models are real ones, and the greedy answers of so many tokens to questions of each kind are
computed without drafts, with those of lookup alone, and with both sources, in turns, in this process; then by llama-server without
drafts and with --model-draft. The tokens after an answer's first one count, a draft model's work on the prompt included. Each answer
is the first of its client, so that lookup knows only the request. The code is asked for here, the rest is bench/transcripts.json's.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch    # noqa: E402

from chatlm.common.config import PAGE_SIZE, Settings    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.messages.requests import AnswerParams, Message, Piece, SamplingParams    # noqa: E402
from chatlm.worker.build import build_engine    # noqa: E402
from chatlm.worker.engine.model_drafts import ModelDrafts    # noqa: E402
from chatlm.worker.engine.sequence import Assignment    # noqa: E402
from chatlm.worker.model.batch import Batch    # noqa: E402
from chatlm.worker.ops.rows import SampleRow    # noqa: E402
from servers import started    # noqa: E402

MOST = ModelDrafts.LONGEST
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)


def step_s(engine, rows, context):
    """Seconds of a step of so many rows of one sequence."""
    pages, ids = [*range(-(-(context + rows) // PAGE_SIZE))], [(7 * row + 11) % 1000 for row in range(rows)]
    batch = Batch(ids, [5, *ids[:-1]], [0, rows], [context + rows], [pages], [*range(rows)])
    params = SamplingParams(seed=1)
    draws = [SampleRow(params, context + row, (), context) for row in range(rows)]
    begun_s = time.perf_counter()
    engine.runner.finish(engine.runner.start(batch, draws))
    return time.perf_counter() - begun_s


def gains(times, draft_s, share):
    """How many times as fast as without drafts, for each k from 1 on."""
    found, tokens = [], 1.0
    for k in range(1, MOST + 1):
        tokens += share**k
        found.append(tokens * times[1] / (times[1 + k] + k * draft_s))
    return found


def measured(target, draft, context, rounds):
    engines = {}
    for path in (target, draft):
        settings = Settings(model=path, drafts="none", context_length=max(1024, context + 64), max_batch=8)
        engines[path] = engines.get(path) or build_engine(resolve_model(settings), settings, torch.device("cpu"))[1]
    times, drafts = {rows: [] for rows in range(1, MOST + 2)}, []
    for _ in range(rounds + 2):
        for rows, found in times.items():
            found.append(step_s(engines[target], rows, context))
            drafts.append(step_s(engines[draft], 1, context))
    held = [engines[path].transformer.weights_bytes for path in (target, draft)]
    return {rows: statistics.median(found[2:]) for rows, found in times.items()}, statistics.median(drafts[2:]), held


def row(target, draft, context, rounds):
    times, draft_s, (bytes_, own_bytes) = measured(target, draft, context, rounds)
    cells = []
    for share in SHARES:
        each = gains(times, draft_s, share)
        best = max(range(MOST), key=each.__getitem__)
        cells.append(f"{each[best]:.2f} (k {best + 1})" if each[best] > 1 else f"{each[best]:.2f}")
    pays = next((share / 100 for share in range(1, 101) if max(gains(times, draft_s, share / 100)) > 1), None)
    names = [Path(path).stem for path in (target, draft)]
    return (f"| {names[0]} | {names[1]} | {own_bytes / bytes_:.2f} | {1e3 * times[1]:.2f} | {1e3 * draft_s:.2f} | {draft_s / times[1]:.2f} | "
            f"{times[1 + 4] / times[1]:.2f} | {f'{pays:.2f}' if pays else 'never'} | {' | '.join(cells)} |")


CODE = ["Write a Python class `LRUCache` with get, put, a size limit, type hints and docstrings.",
        "Write a C function that parses an ISO 8601 date into a struct, with its checks, and a main that tests it.",
        "Write a React component in TypeScript that shows a sortable table of users with paging."]
OUR_WAYS = {"no drafts": (), "lookup": ("forced", "lookup"), "lookup and model": ("forced", "lookup", "model")}


def questions(kinds):
    """{kind: texts of users}."""
    told = json.loads(Path(__file__).with_name("transcripts.json").read_text())
    return {kind: CODE if kind == "code" else [session[0]["prompt"] for session in told[kind]["sessions"][:3]] for kind in kinds}


class Pair:
    """An engine with a draft model whose sources of drafts can be taken away."""

    def __init__(self, target, draft):
        settings = Settings(model=target, draft_model=draft, context_length=8192, max_batch=8)
        self.engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))[1]
        self.sources, self.made = dict(self.engine.drafting.sources), self.engine.made
        self.asked = 0

    def use(self, way):
        names, engine = OUR_WAYS[way], self.engine
        engine.drafts = bool(names)
        engine.drafting.sources = {name: self.sources[name] for name in names}
        engine.made = tuple(part for part in self.made if "model" in names or part not in engine.draft_models)

    def decode_s(self, ids, tokens):
        """Seconds after an answer's first token; nothing is in a cache."""
        engine = self.engine
        engine.pool.forget_cached()
        for model in engine.draft_models:
            model.forget()
        self.asked += 1
        params = AnswerParams(sampling=SamplingParams(temperature=0.0), ignore_eos=True, client=f"{self.asked}")
        engine.add(Assignment("a", ids, params, tokens))
        first_s = None
        while engine.busy:
            if any(isinstance(event, Piece) for _, event in engine.step()):
                first_s = first_s or time.perf_counter()
        return time.perf_counter() - first_s


def our_answers(pair, ids, tokens, rounds):
    """{(kind, way): tokens per second}; prints how often drafts were right."""
    spent = {}
    for number in range(rounds):
        for kind, prompts in ids.items():
            for way in OUR_WAYS:
                pair.use(way)
                drafted, accepted = pair.engine.drafting.drafted, pair.engine.drafting.accepted
                spent.setdefault((kind, way), []).append(sum(pair.decode_s(prompt, tokens) for prompt in prompts))
                counts = [f"{source} {getattr(pair.engine.drafting.accepted, source) - getattr(accepted, source)} of "
                          f"{getattr(pair.engine.drafting.drafted, source) - getattr(drafted, source)}" for source in OUR_WAYS[way][1:]]
                print(f"{kind}, {way}: {spent[kind, way][-1]:.1f} s, right: {', '.join(counts)}", file=sys.stderr, flush=True)
    return {key: len(ids[key[0]]) * (tokens - 1) / statistics.median(seconds) for key, seconds in spent.items()}


def their_answers(server, target, flags, ids, tokens):
    """{kind: tokens per second} of llama-server."""
    with started([server, "-m", target, "-c", "8192", "-np", "1", "-t", "2", *flags], "llama-server") as running:
        found = {}
        for kind, prompts in ids.items():
            timings = [running.post("/completion", {"prompt": list(prompt), "n_predict": tokens, "temperature": 0, "ignore_eos": True,
                                                    "cache_prompt": False})["timings"] for prompt in prompts]
            found[kind] = sum(one["predicted_n"] for one in timings) / sum(one["predicted_ms"] for one in timings) * 1e3
        return found


def answers(arguments, target, draft):
    pair = Pair(target, draft)
    render = pair.engine.tokenizer.render
    ids = {kind: [tuple(render([Message("user", text)])) for text in texts] for kind, texts in questions(arguments.kinds).items()}
    ways = our_answers(pair, ids, arguments.answers, arguments.rounds)
    drafting = pair.engine.draft_models[0]
    draft_s, step_s = drafting.times_of(1, MOST)
    print(f"steps of 1 to {1 + MOST} rows: {', '.join(f'{each / step_s[0]:.2f}' for each in step_s)} (of {1e3 * step_s[0]:.1f} ms); "
          f"of the draft model {draft_s / step_s[0]:.2f}; right about {drafting.rate.share:.0%}")
    names = list(OUR_WAYS)
    if arguments.llama_server:
        del pair
        for name, flags in (("llama-server", []), ("llama-server, its draft model", ["--spec-type", "draft-simple", "--model-draft", draft])):
            ways |= {(kind, name): speed for kind, speed in their_answers(arguments.llama_server, target, flags, ids, arguments.answers).items()}
            names.append(name)
    print(f"| {Path(target).stem}, {Path(draft).stem} | " + " | ".join(names) + " | to lookup |\n|" + "---|" * (len(names) + 2))
    for kind in ids:
        cells = [f"{ways[kind, name]:.1f}" for name in names]
        print(f"| {kind} | " + " | ".join(cells) + f" | {ways[kind, 'lookup and model'] / ways[kind, 'lookup']:.2f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="TARGET,DRAFT")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--answers", type=int, metavar="TOKENS")
    parser.add_argument("--kinds", nargs="+", default=["code", "prose", "edits", "agents"])
    parser.add_argument("--llama-server")
    arguments = parser.parse_args()
    if arguments.answers:
        with torch.inference_mode():
            for pair in arguments.pairs:
                answers(arguments, *pair.split(","))
        return
    print("| model | drafts | bytes | ms, one row | ms, draft | ratio | t(5) / t(1) | pays from a = | "
          + " | ".join(f"a = {share}" for share in SHARES) + " |\n|" + "---|" * (8 + len(SHARES)))
    with torch.inference_mode():
        for pair in arguments.pairs:
            print(row(*pair.split(","), arguments.context, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
