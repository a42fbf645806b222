"""A temporary answer leaves nothing in its worker: no pages, no states, no texts to draft from, none on disk."""

import random
from types import SimpleNamespace

import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.build import build_engine
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.states import StatePool
from engines import make_engine, pieces, run
from families import make_model, save
from kept_prefixes import Memory, keep, make
from models_that_draft import draft_always
from nightly import by_day
from works import assignment, changed

KINDS = by_day(["qwen3", "gemma3", "lfm2", "qwen3.5"], "gemma3", "lfm2")


@pytest.fixture(scope="module", params=KINDS)
def folder(tmp_path_factory, request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield save(make_model(request.param), tmp_path_factory.mktemp(request.param))
    torch.set_num_threads(threads)


def works(count=3, **more):
    """Prompts that begin alike, as the turns of a chat do."""
    dice = random.Random(5)
    ids = [dice.randrange(3, 90) for _ in range(200)]
    return [assignment(f"{number}", tuple(ids[:80 + 60 * number]), SamplingParams(temperature=0), 40, ignore_eos=True,
                       **more) for number in range(count)]


def left_in(engine):
    """What there is of answers that have ended."""
    pool = engine.pool
    lookup = engine.drafting.sources.get("lookup")
    if lookup:
        lookup.stores.settle()
    return SimpleNamespace(
        contents=len(pool.index), pages=pool.num_pages - len(pool.free), snapshots=pool.states.snapshots if pool.states else 0,
        texts=[*lookup.stores.by_owner] if lookup else [], edits=[*lookup.edits] if lookup else [])


NOTHING = SimpleNamespace(contents=0, pages=0, snapshots=0, texts=[], edits=[])


def test_nothing_of_a_temporary_answer_is_left(folder, monkeypatch):
    """However its prompt is cut, and whatever else is computed beside it, tokens stay the same."""
    monkeypatch.setattr(StatePool, "INTERVAL", 64)
    usual = run(make_engine(folder, num_pages=100, prefill_chunk=48, max_batch=4), works()).tokens
    engine = make_engine(folder, num_pages=100, prefill_chunk=48, max_batch=4)
    result = run(engine, works(temporary=True))
    assert result.tokens == usual
    assert left_in(engine) == NOTHING
    again = run(engine, works(temporary=True), ahead=True)
    assert again.tokens == usual and {end.usage.cached_tokens for end in again.end.values()} == {0}
    ordinary = run(engine, works())
    assert ordinary.tokens == usual and ordinary.end["0"].usage.cached_tokens == 0
    before = left_in(engine)
    assert before.contents and before.texts
    read = run(engine, works(temporary=True))      # it may begin with what an ordinary chat has left
    assert read.tokens == usual and read.end["2"].usage.cached_tokens
    assert left_in(engine) == before


def test_a_temporary_prompt_that_is_cut_leaves_nothing(folder, monkeypatch):
    monkeypatch.setattr(StatePool, "INTERVAL", 64)
    engine = make_engine(folder, num_pages=100, prefill_chunk=32, max_batch=4)
    [work] = works(1, temporary=True)
    with torch.inference_mode():
        engine.add(changed(work, id="cut"))
        engine.step()
        engine.step()
        engine.cancel("cut")
        engine.step()
    assert left_in(engine) == NOTHING
    check_integrity(engine)


def test_a_temporary_answer_that_is_preempted_goes_on(folder):
    usual = run(make_engine(folder, num_pages=100, prefill_chunk=48, max_batch=4), works()).tokens
    small = make_engine(folder, num_pages=30, prefill_chunk=48, max_batch=4)
    assert run(small, works(temporary=True)).tokens == usual
    assert small.queue.preemptions
    assert left_in(small) == NOTHING


def test_no_page_of_a_temporary_answer_outlives_the_process(nanochat_fixtures):
    memory = Memory()
    try:
        engine = keep(make(nanochat_fixtures / "gen5", "decode_core"), memory)
        run(engine, works(temporary=True))
        engine.keeper.settle()
        assert engine.keeper.counts["kept_pages"] == 0 and not engine.keeper.kept.memory.index
        run(engine, works())
        engine.keeper.settle()
        assert engine.keeper.counts["kept_pages"] > 0
    finally:
        memory.close()


def test_a_second_model_that_drafts_keeps_none_either(tmp_path, monkeypatch):
    draft_always(monkeypatch, 4)
    folder = save(make_model("qwen3"), tmp_path)
    settings = Settings(model=str(folder), draft_model=str(folder), drafts="model", kv_cache_memory=32 << 20, max_batch=4)
    engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))[1]
    made = pieces(engine, works(temporary=True))
    assert all(made[work.id].end.usage.accepted.model for work in works())
    drafts = engine.drafting.sources["model"]
    pool = drafts.drafter.followers.pool
    assert not pool.index and len(pool.free) == pool.num_pages
