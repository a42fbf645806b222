"""Layers with a sliding window give back the pages they have passed, and answers stay transformers'."""

import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.core import decode_core
from chatlm.common.messages.requests import SamplingParams
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.engine.engine import Engine
from chatlm.worker.engine.integrity import queue_faults
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.engine.limits import StepLimits
from chatlm.worker.engine.lookup import LONGEST
from chatlm.worker.engine.scheduler import Scheduler
from chatlm.worker.engine.sequence import Sequence
from chatlm.worker.model.pages import group_layers
from chatlm.worker.model.transformer import Transformer
from engine_parts import parts_of
from engines import make_engine, pieces, run
from families import load
from nightly import by_day
from works import assignment

WINDOWED = ["gemma3", "gemma2", "mistral", "qwen2", "cohere2"]     # 5 of 6 layers, half of them in turn, all, the last ones, 4 of 5

SHARED = ["gemma4", "gemma4moe"]        # whose layers differ in more, and some of which read others' keys


def works_of(cases):
    return [assignment(f"case {i}", tuple(case.prompt), SamplingParams(temperature=0), 64, ignore_eos=True) for i, case in enumerate(cases)]


def check(engine, cases, works=None, **options):
    """Run the cases together: their tokens are transformers', and no sequence holds more pages than it should."""
    seen = SimpleNamespace(most=0)

    def on_step(plan):
        queue = engine.queue
        for sequence in queue.running:
            length = len(sequence.tokens) + (LONGEST + PAGE_SIZE) * sequence.drafts      # room for a draft
            assert queue.tables.held_pages(sequence) <= engine.pool.pages_for(length, queue.limits.prefill_chunk)
        seen.most = max(seen.most, engine.pool.num_pages - engine.pool.available)
    result = run(engine, works or works_of(cases), on_step=on_step, **options)
    for i, case in enumerate(cases):
        assert result.tokens[f"case {i}"] == case.tokens, i
    return result, seen.most


NEEDS_CORE = pytest.mark.skipif(decode_core() is None, reason="not built")
BACKENDS = ["reference", pytest.param("decode_core", marks=NEEDS_CORE)]


# by day a sequence that grows and one that does not
FEW_PAGES = [pytest.param(name, backend, marks=[*([NEEDS_CORE] if backend == "decode_core" else []),
                                                *([] if (name, backend) in (("gemma2", "decode_core"), ("mistral", "reference")) else [pytest.mark.slow])])
             for name in (*WINDOWED, *SHARED) for backend in ("reference", "decode_core")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", by_day(WINDOWED, "gemma3"))
def test_windows_give_pages_back_and_keep_answers(made_model, name, backend):
    """Pages are given back, and answers stay those of transformers."""
    folder, cases = made_model(name)
    engine = make_engine(folder, num_pages=400, prefill_chunk=32, max_batch=4, reference=backend == "reference", apart=True)
    groups = engine.transformer.groups
    assert groups.holes and engine.kernels.row_invariant == (backend == "decode_core")
    _, most = check(engine, cases)
    whole = sum(-(-(len(case.prompt) + 64) // PAGE_SIZE) for case in cases) * len(groups.windows)
    assert most < {"gemma3": 0.6, "gemma2": 0.75, "mistral": 0.5, "qwen2": 0.75, "cohere2": 0.6}[name] * whole
    again, _ = check(engine, cases)         # from the prefix cache
    assert all(end.usage.cached_tokens > 0 for end in again.end.values())
    check(engine, cases, ahead=True)


@pytest.mark.parametrize("name, backend", FEW_PAGES)
def test_few_pages_preempt_and_keep_answers(made_model, name, backend):
    """Preempted answers stay the same when pages are few."""
    folder, cases = made_model(name)
    windows = make_engine(folder, num_pages=400, prefill_chunk=32, apart=True).transformer.groups.windows
    prompts = sum(PagePool(0, windows).pages_for(len(case.prompt), 32) for case in cases[:2])      # the first two are admitted
    engine = make_engine(folder, num_pages=prompts + len(windows), prefill_chunk=32, max_batch=4, context_length=264,
                         reference=backend == "reference", apart=True)
    assert engine.context_length == 264
    engine.drafts = False       # whether they pay is measured, and what is drafted takes pages
    check(engine, cases)
    assert engine.queue.preemptions > 0 or name == "mistral"       # whose sequences do not grow


def test_a_longer_context_fits_into_the_same_pages(made_model):
    folder, _ = made_model("gemma3")
    few = make_engine(folder, num_pages=40, prefill_chunk=16, apart=True)
    windows = few.transformer.groups.windows
    assert len(windows) == 6 and few.pool.windows == windows
    assert few.context_length == (40 - 5 * (-(-(24 + 16) // PAGE_SIZE) + 1)) * PAGE_SIZE > 40 * PAGE_SIZE // 6
    assert few.pool.pages_for(few.context_length, 16) <= 40 < few.pool.pages_for(few.context_length + 1, 16)
    mistral = make_engine(made_model("mistral")[0], num_pages=6, prefill_chunk=16, apart=True)
    assert mistral.context_length == 512            # all that the model has: six pages last for ever


def sequence(name, tokens, limit=700):
    return Sequence(assignment(name, tuple(tokens), SamplingParams(), 1000), list(tokens), limit)


@pytest.mark.parametrize("windows", [(0, 40), (40,), (0, 0, 24, 100)])
def test_random_traffic_with_few_pages_leaks_nothing(windows):
    """Sequences come, share prefixes, are preempted, cancelled and end; each page is owned as the tables say."""
    generator = random.Random(3)
    pool = PagePool(PagePool(0, windows).pages_for(700, 64) + 10, windows)
    s = Scheduler(pool, StepLimits(6, 64, max_rows=6))
    alive, ended = {}, 0
    for turn in range(600):
        if len(alive) < 10 and generator.random() < 0.5:
            start = [generator.randrange(2)] * (PAGE_SIZE * generator.randrange(12))
            alive[turn] = sequence(str(turn), start + [generator.randrange(50) for _ in range(generator.randrange(1, 150))])
            s.queue.add(alive[turn])
        for chunk in s.schedule():
            rows = len(chunk.sequence.pages) // pool.groups
            assert chunk.sequence.computed + chunk.count <= rows * PAGE_SIZE
            for group, window in enumerate(windows):        # all that this chunk sees is there
                first, last = pool.first_seen(chunk.sequence.computed, window), (chunk.sequence.computed + chunk.count - 1) // PAGE_SIZE
                assert pool.hole not in chunk.sequence.pages[first * pool.groups + group:(last + 1) * pool.groups:pool.groups]
            s.queue.advance(chunk)
            if chunk.draws:
                chunk.sequence.tokens.append(generator.randrange(50))
        assert queue_faults(s.queue) == []
        for key, each in list(alive.items()):
            if len(each.tokens) > len(each.work.prompt_ids) + 300 or generator.random() < 0.01:
                s.queue.remove(each)
                del alive[key]
                ended += 1
                assert queue_faults(s.queue) == []
    assert ended > 20 and (s.queue.preemptions > 0 or 0 not in windows)      # without such layers sequences soon stop growing


@pytest.mark.parametrize("name", by_day(["gemma2", "mistral"], "mistral"))
def test_cuda_steps_give_pages_back_too(made_model, name, request, monkeypatch):
    """The kernels in their emulation, op by op and as graphs."""
    backends = pytest.importorskip("cuda_backends", exc_type=ImportError, reason="the compiled core is not installed")
    from chatlm.worker.kernels import cuda_runner
    emulated = backends.Emulated(request.getfixturevalue("emulation_library"))
    monkeypatch.setattr(cuda_runner, "CudaQueue", lambda device: backends.HostQueue())
    folder, cases = made_model(name)
    model = load(folder)
    groups = group_layers(model.architecture.by_layer, 512)
    kernels = emulated.kernels(model.architecture)
    transformer = Transformer(model.architecture, dict(model.tensors), kernels, num_pages=60, max_tokens=68, max_rows=8, dtype="float32",
                              device=emulated.device, groups=groups)
    engine = Engine(transformer, open_tokenizer(model.text), kernels, num_pages=60, max_batch=4, context_length=512, prefill_chunk=64,
                    parts=parts_of(transformer, open_tokenizer(model.text), model))
    works = [replace(work, max_tokens=12) for work in works_of(cases)[1:]]
    with torch.inference_mode():
        engine.runner.prepare(lambda fraction: None)
    found = pieces(engine, works)
    for work, case in zip(works, cases[1:]):
        assert [token for piece in found[work.id] for token in piece.tokens] == case.tokens[:12]
    assert engine.runner.queue.replays > 3 and engine.pool.available == engine.pool.num_pages


def test_the_oldest_unseen_contents_go_first():
    """They are restored without a page, so that no page's eviction ends them."""
    pool, serial = PagePool(4, (16,)), PagePool.ROOT
    pool.MOST_BARE = 3
    keys = [(serial, (0,) * 16)]
    for number in range(1, 6):
        serial = pool.register(*keys[-1], [pool.hole])
        keys.append((serial, (number,) * 16))
    assert [*pool.index] == keys[2:5]
    [page] = pool.allocate(1)
    pool.register(*keys[3], [page])       # one of them gets a page after all
    pool.release([page])
    for number in range(6, 9):
        pool.register(serial, (number,) * 16, [pool.hole])
    assert keys[3] in pool.index and len(pool.index) == 4
    pool.forget_cached()
    assert not pool.index and not pool.bare
