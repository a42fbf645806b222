"""Models with experts in an engine: packed weights, and the same answers however their rows are computed."""

import pytest

from chatlm.common.core import decode_core
from chatlm.common.messages.requests import SamplingParams
from engines import make_engine, run
from families import as_gguf, make_model
from works import assignment, changed

pytestmark = pytest.mark.skipif(decode_core() is None, reason="equal bits are decode_core's promise")


@pytest.fixture(scope="module", params=["gpt-oss", "qwen3moe"])
def path(request, tmp_path_factory):
    changes = {"norm_topk_prob": True} if request.param == "qwen3moe" else {}
    return as_gguf(tmp_path_factory.mktemp(request.param) / "tiny.gguf", make_model(request.param, **changes), quantized=True)


def engine_of(path, **limits):
    engine = make_engine(path, as_stored=True, **limits)
    assert engine.kernels.row_invariant and engine.transformer.weights["0.expert_down"].kind in ("mxfp4", "q8_0")
    return engine


def answers(engine, works):
    engine.pool.forget_cached()
    result = run(engine, works)
    return result, {work.id: (result.tokens[work.id], result.text[work.id]) for work in works}


WORKS = [assignment(f"w{i}", tuple(20 * i + j * j % 97 for j in range(3 + 29 * i)), SamplingParams(temperature=(i % 3) / 2, seed=i),
                    30, ignore_eos=True) for i in range(6)]


def test_answers_are_the_same_alone_together_in_chunks_and_preempted(path):
    engine = engine_of(path)
    _, expected = answers(engine, WORKS)
    assert [answers(engine, [work])[1][work.id] for work in WORKS] == list(expected.values())
    for prefill_chunk in (16, 50):
        assert answers(engine_of(path, prefill_chunk=prefill_chunk), WORKS)[1] == expected
    tight = engine_of(path, num_pages=20)
    assert answers(tight, WORKS)[1] == expected and tight.scheduler.preemptions > 0


def test_an_answer_goes_on_elsewhere_from_its_ids_as_it_would_have_here(path):
    here, there = engine_of(path), engine_of(path, prefill_chunk=40)
    tokens = answers(here, WORKS)[0].tokens
    resumed = [changed(work, resumed_ids=tuple(tokens[work.id][:7 * i % 29])) for i, work in enumerate(WORKS)]
    rest = answers(there, resumed)[0].tokens
    for work in resumed:
        assert list(work.resumed_ids) + rest[work.id] == tokens[work.id]


def test_drafts_change_no_answer(path):
    engine = engine_of(path)
    works = [assignment(f"d{i}", (5, 6, 7, 8, 9, 10 + i) * 6, SamplingParams(temperature=0.0), 80, ignore_eos=True) for i in range(4)]
    engine.drafts = False
    _, expected = answers(engine, works)
    engine.drafts = True
    result, drafted = answers(engine, works)
    assert drafted == expected and sum(result.end[work.id].usage.accepted_tokens for work in works) > 0
