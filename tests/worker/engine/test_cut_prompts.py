"""A request that is cancelled while its prompt is computed leaves what was computed to the next one."""

import pytest
import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.engine.integrity import check_integrity
from engines import make_engine, run
from families import make_model, save
from works import assignment

CHUNK = 64
PROMPT = tuple(40 + i * 7 % 150 for i in range(400))
WORK = dict(prompt_ids=PROMPT, sampling=SamplingParams(temperature=0), max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module", params=["llama2", "gemma3", "lfm2", "qwen3.5"])
def made(tmp_path_factory, request):
    """A folder with a model: of plain attention, of windows, or with states."""
    return save(make_model(request.param), tmp_path_factory.mktemp(request.param))


def engine_of(made, **options):
    return make_engine(made, num_pages=120, prefill_chunk=CHUNK, max_batch=4, context_length=512, apart=True, **options)


@torch.inference_mode()
def cut_after(engine, steps, name="cut", **changes):
    """Cancel an answer after some steps of its prompt; the number of tokens that were computed."""
    engine.add(assignment(name, **WORK | changes))
    while not any(sequence.output.ready for sequence in engine.queue.waiting):
        engine.step()
    counted = []
    schedule = engine.scheduler.schedule

    def watched():
        plan = schedule()
        counted.extend(chunk.count for chunk in plan if chunk.sequence.work.id == name)
        return plan

    engine.scheduler.schedule = watched
    while len(counted) < steps:
        engine.step()
    engine.scheduler.schedule = schedule
    assert engine.cancel(name)
    while engine.busy:
        engine.step()
    check_integrity(engine)
    assert engine.pool.available == engine.pool.num_pages
    return sum(counted)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_the_retry_computes_only_what_the_cut_prompt_had_left(made, steps):
    expected = run(engine_of(made), [assignment("alone", **WORK)]).tokens["alone"]
    engine = engine_of(made)
    computed = cut_after(engine, steps)
    assert computed == steps * CHUNK
    for name in ("retry", "again"):
        result = run(engine, [assignment(name, **WORK)])
        assert result.tokens[name] == expected
        if name == "retry":
            assert result.end[name].usage.cached_tokens == computed
    assert result.end["again"].usage.cached_tokens == (len(PROMPT) - 1) // PAGE_SIZE * PAGE_SIZE


def test_a_retry_that_is_cut_too_adds_to_what_is_there(made):
    engine = engine_of(made)
    assert [cut_after(engine, 2, name) for name in ("first", "second", "third")] == [2 * CHUNK] * 3
    result = run(engine, [assignment("retry", **WORK)])
    assert result.end["retry"].usage.cached_tokens == 6 * CHUNK


def test_a_cut_prompt_evicts_no_end_of_a_conversation(made):
    """The snapshots of a model with states are few."""
    engine = engine_of(made, num_snapshots=1)
    other = assignment("other", **WORK | {"prompt_ids": PROMPT[::-1]})
    run(engine, [other])
    cut_after(engine, 2)
    result = run(engine, [assignment("next", **WORK | {"prompt_ids": PROMPT[::-1]})])
    assert result.end["next"].usage.cached_tokens == (len(PROMPT) - 1) // PAGE_SIZE * PAGE_SIZE
