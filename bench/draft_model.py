"""From which acceptance on does a second model that drafts pay? By the measured times of both models' steps.

    python bench/draft_model.py TARGET[,DRAFT]... [--context 256] [--rounds 9]

For each pair the target's step of one row, its steps of 1 + k rows, and the draft model's step of one row are measured in turns, in
this process, without a front; the medians make the table. Acceptance is assumed, not measured: with each drafted token right with
probability a, one round of k drafts gives 1 + a + a^2 + ... + a^k tokens in t(1 + k) + k t(draft). So models of random weights will do.
"Pays from" is the least a at which the best k is faster than no drafts.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch    # noqa: E402

from chatlm.common.config import PAGE_SIZE, Settings    # noqa: E402
from chatlm.common.hub.find import resolve_model    # noqa: E402
from chatlm.common.messages.requests import SamplingParams    # noqa: E402
from chatlm.worker.build import build_engine    # noqa: E402
from chatlm.worker.engine.model_drafts import ModelDrafts    # noqa: E402
from chatlm.worker.model.batch import Batch    # noqa: E402
from chatlm.worker.ops.rows import SampleRow    # noqa: E402

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="+", metavar="TARGET,DRAFT")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print("| model | drafts | bytes | ms, one row | ms, draft | ratio | t(5) / t(1) | pays from a = | "
          + " | ".join(f"a = {share}" for share in SHARES) + " |\n|" + "---|" * (8 + len(SHARES)))
    with torch.inference_mode():
        for pair in arguments.pairs:
            print(row(*pair.split(","), arguments.context, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
