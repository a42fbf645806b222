"""The most KV pages that one sequence holds if layers have a sliding window, compared with never releasing any.

    python bench/windows.py

runs only the scheduler, without tensors, over a prompt 100 tokens shorter than the context and then those 100 tokens. Sizes are those
of the published configs; keys and values have 16 bits.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from chatlm.common.config import PAGE_SIZE    # noqa: E402
from chatlm.common.messages.requests import AnswerParams    # noqa: E402
from chatlm.worker.engine.integrity import queue_faults    # noqa: E402
from chatlm.worker.engine.kvcache import PagePool    # noqa: E402
from chatlm.worker.engine.limits import StepLimits    # noqa: E402
from chatlm.worker.engine.scheduler import Scheduler    # noqa: E402
from chatlm.worker.engine.sequence import Assignment, Sequence    # noqa: E402
from chatlm.worker.arrays.rotary import Rope  # noqa: E402
from chatlm.worker.model.blocks.attention import Attention, Scores  # noqa: E402
from chatlm.worker.model.pages import group_layers  # noqa: E402

MODELS = {              # layers, kv heads, head size, window, every n-th layer has no window, context
    "Gemma 3 1B": (26, 1, 256, 512, 6, 32768), "Gemma 3 4B": (34, 4, 256, 1024, 6, 32768), "Gemma 3 12B": (48, 8, 256, 1024, 6, 32768),
    "Gemma 3 27B": (62, 16, 128, 1024, 6, 32768), "Gemma 2 9B": (42, 8, 256, 4096, 2, 8192)}


def most_held(windows, context, chunk=256):
    scheduler = Scheduler(PagePool(100_000, windows), StepLimits(1, chunk, max_rows=1))
    sequence = Sequence(Assignment("long", tuple(range(context - 100)), AnswerParams(), 100), list(range(context - 100)), context)
    scheduler.queue.add(sequence)
    most = 0
    while len(sequence.tokens) < context:
        for planned in scheduler.schedule():
            most = max(most, scheduler.queue.tables.held(sequence))
            scheduler.queue.advance(planned)
            sequence.tokens += [0] * planned.draws
    assert queue_faults(scheduler.queue) == []
    assert most <= scheduler.pool.pages_for(context, chunk)
    return most


def main():
    print(f"{'model':12} {'context':>7} {'groups':>6} {'layers of a page':>16} {'pages':>6} {'MiB':>8} {'all kept, MiB':>13}")
    for name, (layers, kv_heads, head_size, window, every, context) in MODELS.items():
        windows = [window * ((layer + 1) % every > 0) for layer in range(layers)]
        groups = group_layers([Attention(kv_heads, kv_heads, head_size, head_size, Rope(head_size), Scores(window=own)) for own in windows],
                              context)
        slot, most = 2 * kv_heads * head_size * 2, most_held(groups.windows, context)
        print(f"{name:12} {context:7,} {len(groups.windows):6} {groups.depth:16} {most:6,} "
              f"{most * groups.depth * PAGE_SIZE * slot / 2**20:8,.1f} {layers * context * slot / 2**20:13,.1f}")


if __name__ == "__main__":
    main()
