"""A worker that is killed or stopped at an exact moment, once for each request: `python
tests/support/dying_worker.py worker FD PARENT`.

A request's id says what happens to its worker, and when: `kill-call-1` kills the process while its answer has
a tool call open, `hang-decode-1` stops it. $STRUCK is a folder with a file for each request that has struck,
so that each strikes once; `poison` always kills. Of many answers to one request only the first two strike,
because the third death without a token in between rightly fails a request. A step with more than three
requests `crowd-...` runs out of memory. If $STRUCK has a file `next-1-kill-arguments`, the next request that
comes to this moment strikes, and the file goes; of several such files the first counts. If it has a file
`hang-load`, a process that loads stops; if it has `kill-draft`, one is killed when it opens the model
`tiny-draft`. After every step the whole KV cache is checked; a wrong page table fails the step. However busy the machine is, kept
pages are always looked and waited for, and with a file `draft-always` in $STRUCK models always draft.
"""

import os
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, os.environ.get("CHAT_SERVER_DIR") or str(Path(__file__).resolve().parents[2]))

from chatlm.common.processes.child import run_role    # noqa: E402
from chatlm.worker.engine.answer import Answer    # noqa: E402
from chatlm.worker.engine.engine import Engine    # noqa: E402
from chatlm.worker.engine.integrity import check_integrity    # noqa: E402
from chatlm.worker.engine.keeper import Pace    # noqa: E402
from chatlm.worker.engine.kept_pages import KeptPages    # noqa: E402
from chatlm.worker.weights import load    # noqa: E402
from models_that_draft import draft_always    # noqa: E402
from patching import replace_everywhere    # noqa: E402

OUTPUT_END = 283
SIGNALS = {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}
MOMENTS = {     # checked when the results of earlier steps have left through the pipe
    "queued": lambda s: not s.computed,
    "prefill": lambda s: s.computed > 40 and s.pending > 1,
    "decode": lambda s: s.generated >= 7,
    "character": lambda s: s.generated >= 7 and s.output.answer.text.decoder.utf8.getstate()[0],
    "stop": lambda s: s.generated >= 7 and len(s.output.answer.text.stops.held) > 1,
    "call": lambda s: s.generated >= 7 and s.output.answer.tool.expression,
    "arguments": lambda s: s.generated >= 7 and s.output.answer and s.output.answer.text.reader.deltas.kinds[-1:] == ["call"],
    # answer is None while a grammar compiles
    "words": lambda s: s.generated >= 3 and s.output.answer and s.output.answer.text.reader.deltas.kinds[-1:] == ["text"],
    "reasoning": lambda s: s.generated >= 7 and s.output.answer and s.output.answer.text.reader.thinking,
    # somebody ended its reasoning, and the token after which it ends is drawn
    "hurried": lambda s: s.output.answer and s.output.answer.thinking_ends,
    # the last may be a placeholder for the one being drawn
    "result": lambda s: s.generated >= 7 and OUTPUT_END in s.tokens[-2:],
    "aside": lambda s: s.generated >= 7 and not s.pages,
}


def next_order():
    with suppress(FileNotFoundError):
        folder = os.environ.get("STRUCK", "/none")
        names = [name for name in os.listdir(folder) if name.startswith("next-")]
        return Path(folder, min(names)) if names else None


def strike(engine, moments):
    order = next_order()
    for sequence in (*engine.queue.running, *engine.queue.waiting):
        if order:
            _, _, what, moment = order.name.split("-")
            if moment in moments and moments[moment](sequence):
                order.unlink()
                os.kill(os.getpid(), SIGNALS[what])
        what, moment, *_ = re.split("[-~]", sequence.work.id + "--")
        if what == "poison" and sequence.computed:
            os.kill(os.getpid(), signal.SIGKILL)
        elif re.search("[^#]#[2-9]", sequence.work.id):
            continue
        elif what in SIGNALS and moment in moments and moments[moment](sequence):
            try:
                (Path(os.environ["STRUCK"]) / sequence.work.id).touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), SIGNALS[what])


def step(engine, report=lambda: None, original=Engine.step):
    def report_and_strike():
        report()
        strike(engine, MOMENTS)

    # before it is admitted and gets pages from the prefix cache
    strike(engine, {"queued": MOMENTS["queued"]})
    pieces = original(engine, report_and_strike)
    # the pieces of this step are lost
    strike(engine, {"unsent": MOMENTS["decode"], "lost": MOMENTS["result"]})
    check_integrity(engine)
    return pieces


def start(engine, plan, original=Engine._start):
    if sum(chunk.sequence.work.id.startswith("crowd-") for chunk in plan) > 3:
        raise MemoryError
    return original(engine, plan)


def push(answer, *arguments, original=Answer.push):
    if answer.work.id == "untranslatable" and arguments[1] == 5:
        raise RuntimeError("no text for this token")
    return original(answer, *arguments)


def open_model(*arguments, original=load.open_model):
    if arguments[0].path.name == "tiny-draft" and (Path(os.environ.get("STRUCK", "/none")) / "kill-draft").exists():
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        (Path(os.environ.get("STRUCK", "/none")) / "hang-load").unlink()
    except FileNotFoundError:
        return original(*arguments)
    os.kill(os.getpid(), signal.SIGSTOP)
    raise SystemExit("it was woken up")


if __name__ == "__main__":
    Engine.step, Engine._start, Answer.push = step, start, push
    Pace.GRACE_S, Pace.pays, KeptPages.LOOK_S = 60.0, lambda pace, pages, size, on_disk: True, 0.0
    replace_everywhere(load, "open_model", open_model)
    if (Path(os.environ.get("STRUCK", "/none")) / "draft-always").exists():
        draft_always(SimpleNamespace(setattr=setattr), 4)
    sys.exit(run_role(*sys.argv[1:]))
