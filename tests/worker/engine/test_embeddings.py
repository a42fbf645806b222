"""Embeddings: the mean of a prompt's final hidden states, or the last one, whatever else the steps compute."""

import base64
import json

import numpy as np
import pytest
import torch

from chatlm.common.messages.requests import Ended, Failed, SamplingParams
from chatlm.worker.engine import answer_maker
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.planners import TextPlanner
from engines import Pieces, load, make_engine, pieces, tensors_of
import families
from works import assignment

TOLERANCE = 1e-5        # of a vector of length 1


def embedding(name, ids, pooling="mean", **more):
    return assignment(name, tuple(ids), SamplingParams(), 0, pooling=pooling, **more)


def vector(found):
    """The vector of a sequence, which draws nothing."""
    assert not found and found.end.reason == "stop"
    [embedding] = found.others
    return np.frombuffer(base64.b64decode(embedding.vector), "<f4")


def vectors(engine, *works, ahead=False):
    found = pieces(engine, works, ahead)
    assert engine.pool.available == engine.pool.num_pages
    return [vector(found[work.id]) for work in works if work.params.pooling]


def alone(engine, work):
    engine.pool.forget_cached()
    return vectors(engine, work)[0]


@torch.no_grad()
def pooled_by_transformers(model, ids, pooling):
    states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0].double()      # after the final norm
    state = states.mean(0) if pooling == "mean" else states[-1]
    return (state / state.norm()).numpy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{family: (transformers' model, its folder)}."""
    made = {}
    for name in ("llama2", "gemma2"):
        model = families.make_model(name)
        made[name] = model, families.save(model, tmp_path_factory.mktemp(name))
    for name in ("llama2", "cohere2"):         # whose rows end with zeros in decode_core
        model = families.make_model(name, head_dim=20, hidden_size=72)
        made[f"odd {name}"] = model, families.save(model, tmp_path_factory.mktemp(name))
    return made


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize("name", ["llama2", "gemma2", "odd llama2", "odd cohere2"])
def test_embeddings_are_transformers_hidden_states(saved, name, reference):
    """Prompts of one token, of a part of a chunk and of several chunks, side by side."""
    model, folder = saved[name]
    engine = make_engine(folder, num_pages=200, max_batch=4, prefill_chunk=64, reference=reference)
    prompts = [np.random.default_rng(length).integers(0, 256, length).tolist() for length in (1, 17, 200, 64, 65)]
    works = [embedding(f"{pooling} {i}", prompt, pooling) for i, prompt in enumerate(prompts) for pooling in ("mean", "last")]
    found = iter(vectors(engine, *works))
    for prompt in prompts:
        for pooling in ("mean", "last"):
            assert np.abs(next(found) - pooled_by_transformers(model, prompt, pooling)).max() < TOLERANCE


@pytest.mark.parametrize("name", ["gen1", "gen5"])
def test_upstream_s_logits_follow_from_the_last_state(name, nanochat_fixtures):
    """Its final norm has no weights, so a state has the length sqrt(C), whatever the embedding's."""
    path = nanochat_fixtures / name
    engine, spec, head = make_engine(path, num_pages=200, max_batch=8), load(path).architecture, tensors_of(load(path))["head"].double().numpy()
    for case in json.loads((path / "oracle.json").read_text())["cases"]:
        state = alone(engine, embedding("last", case["prompt_ids"], "last")) * spec.width ** 0.5
        softcap = spec.head.softcap
        logits = softcap * np.tanh(head @ state / softcap)
        assert np.abs(logits[:len(case["next_logits"])] - case["next_logits"]).max() < 2e-3


PROMPTS = [np.random.default_rng(i).integers(0, 250, length).tolist() for i, length in enumerate((90, 33, 150, 1, 64))]


@pytest.mark.parametrize("name", ["gen3", "gen5"])
@pytest.mark.parametrize("ahead", [False, True])
def test_embeddings_are_the_same_however_computed(nanochat_fixtures, name, ahead):
    """Alone, in a batch, in other chunks and from the cache they are the same."""
    path = nanochat_fixtures / name
    engine = make_engine(path, num_pages=200, max_batch=8, prefill_chunk=64)
    whole = make_engine(path, num_pages=200, max_batch=8, prefill_chunk=256)
    works = [embedding(f"{pooling} {i}", prompt, pooling) for i, prompt in enumerate(PROMPTS) for pooling in ("mean", "last")]
    answer = assignment("answer", tuple(PROMPTS[0]), SamplingParams(0.9, seed=3), 40, ignore_eos=True)
    expected = [alone(whole, work) for work in works]
    drawn = pieces(engine, [answer])["answer"].tokens
    least = 0 if engine.kernels.row_invariant else TOLERANCE
    for _ in range(2):          # the second time, their prompts are in the prefix cache
        for found, wanted in zip(vectors(engine, answer, *works, ahead=ahead), expected, strict=True):
            assert np.abs(found - wanted).max() <= least
    assert pieces(engine, [answer])["answer"].tokens == drawn      # from the pages they left behind


def test_no_answer_is_made_for_a_vector(nanochat_fixtures, monkeypatch):
    made, make = [], answer_maker.Answer
    monkeypatch.setattr(answer_maker, "Answer", lambda work, *more: made.append(work.id) or make(work, *more))
    engine = make_engine(nanochat_fixtures / "gen5", num_pages=200, max_batch=8)
    answer = assignment("answer", tuple(PROMPTS[0]), SamplingParams(), 5)
    assert len(vectors(engine, answer, embedding("mean", PROMPTS[0]), embedding("last", PROMPTS[1], "last"))) == 2 and made == ["answer"]
    engine.add(embedding("ending", PROMPTS[0]))
    engine.end_thinking("ending")       # it has none
    assert engine.cancel("ending")


def test_a_last_state_is_cached_and_a_mean_is_not(nanochat_fixtures):
    """The last state is found in the prefix cache, and the mean is computed whole."""
    engine = make_engine(nanochat_fixtures / "gen5", num_pages=200, max_batch=8, prefill_chunk=64)
    for pooling, cached in (("mean", 0), ("last", 144), ("mean", 0)):
        assert pieces(engine, [embedding("a", PROMPTS[2], pooling)])["a"].end.usage.cached_tokens == cached


def test_embedding_restarts_after_a_failed_step(nanochat_fixtures, monkeypatch):
    """It starts over when its pages are taken or a step failed."""
    monkeypatch.setattr(TextPlanner, "EVERY_S", 0.0)
    engine = make_engine(nanochat_fixtures / "gen5", num_pages=200, max_batch=8, prefill_chunk=16)
    wanted = alone(engine, embedding("a", PROMPTS[0]))
    engine.pool.forget_cached()
    works = [embedding("a", PROMPTS[0]), assignment("b", (1, 2, 3), SamplingParams(), 30, ignore_eos=True)]
    with torch.inference_mode():
        for work in works:
            engine.add(work)
        engine.step()
        [first] = [sequence for sequence in engine.queue.running if sequence.work.id == "a"]
        assert first.computed
        engine.queue.preempt(first)
        engine.step(), engine.step()
        pool = engine.given.texts.pool
        monkeypatch.setattr(engine.given.texts, "pool", lambda *chunk: pool(*chunk) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.step()
        monkeypatch.undo()
        assert first.computed and engine.give_up() == []        # not known yet which of the two it was
        found = Pieces()
        while engine.busy:
            for name, event in engine.step():
                if name == "a":
                    found.add(event)
            check_integrity(engine)
    assert np.abs(vector(found) - wanted).max() <= (0 if engine.kernels.row_invariant else TOLERANCE)


def test_a_whole_context_can_be_embedded(nanochat_fixtures):
    """A whole context fits, and a cancelled one frees its pages."""
    engine = make_engine(nanochat_fixtures / "gen5", num_pages=40, max_batch=2, prefill_chunk=64, context_length=256)
    full = [i % 250 for i in range(engine.context_length)]
    [found] = vectors(engine, embedding("full", full))
    assert abs(np.linalg.norm(found) - 1) < 1e-6
    with torch.inference_mode():
        engine.add(embedding("left", full))
        engine.step()
        assert engine.cancel("left") and not engine.busy and engine.pool.available == engine.pool.num_pages


def test_states_that_are_no_numbers_fail_it_alone(nanochat_fixtures, monkeypatch):
    engine = make_engine(nanochat_fixtures / "gen5", num_pages=200, max_batch=8)
    states = engine.transformer.hidden_states
    monkeypatch.setattr(engine.transformer, "hidden_states", lambda first, last: states(first, last) * (np.nan if last - first == 33 else 1))
    found = pieces(engine, [embedding("good", PROMPTS[0]), embedding("bad", PROMPTS[1])])
    assert found["bad"].end == Failed("the model's hidden states are not finite") and np.isfinite(vector(found["good"])).all()


def test_low_precision_gives_nearly_the_same_vectors(nanochat_fixtures):
    """As a server runs the model: in the types of its file."""
    path = nanochat_fixtures / "gen5"
    exact, stored = (alone(make_engine(path, num_pages=200, as_stored=each), embedding("a", PROMPTS[0])) for each in (False, True))
    assert exact @ stored > 0.999


def test_an_urgent_text_never_waits_for_answers(nanochat_fixtures, monkeypatch):
    """The next step is its own, although texts were just embedded and an answer is being written."""
    monkeypatch.setattr(TextPlanner, "EVERY_S", 1e9)
    engine = make_engine(nanochat_fixtures / "gen5", num_pages=200, max_batch=8)
    wanted = alone(engine, embedding("question", PROMPTS[1]))
    answer = assignment("answer", (1, 2, 3), SamplingParams(), 30, ignore_eos=True)
    ended = []
    with torch.inference_mode():
        for work in answer, embedding("later", PROMPTS[3]), embedding("question", PROMPTS[1], urgent=True):
            engine.add(work)
        found = Pieces()
        while engine.busy:
            for name, event in engine.step():
                if name == "question":
                    found.add(event)
                if isinstance(event, Ended):
                    ended.append(name)
            check_integrity(engine)
    assert ended == ["question", "answer", "later"]
    assert np.abs(vector(found) - wanted).max() <= (0 if engine.kernels.row_invariant else TOLERANCE)
