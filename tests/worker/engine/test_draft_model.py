"""A second model that drafts: the tokens stay those of the model alone, however they are computed, and drafts are as often right as they can be."""

import itertools
from dataclasses import replace

import numpy
import pytest
import torch

from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import Message, Piece, SamplingParams
from chatlm.common.text.grammar import json_grammar
from chatlm.worker.build import build_engine
from chatlm.worker.memory_plan import prefill_chunk
from chatlm.worker.drafting import plan_draft_model
from chatlm.worker.engine.integrity import check_integrity, follower_faults
from chatlm.worker.engine.states import StatePool
from chatlm.worker.weights.load import open_model
from engines import make_batch, pieces
from families import make_model, save
from lora import SMOLLM2, random_adapter
from models_that_draft import draft_always, works_of
from nightly import by_day
from ranked import group
from requantized import requantized
from works import assignment

CPU = torch.device("cpu")
compiled = pytest.mark.skipif(decode_core() is None, reason="only decode_core's rows are invariant")


def drafting_engine(model, draft, **changes):
    settings = Settings(**{"model": str(model), "draft_model": draft and str(draft), "drafts": "model", "kv_cache_memory": 32 << 20,
                           "max_batch": 4} | changes)
    source = resolve_model(settings)
    return build_engine(source, settings, CPU)[1]


def answers(engine, works):
    """Compute works together -> {id: (its tokens, its usage)}."""
    found = pieces(engine, works)
    return {work.id: ([*work.resumed_ids, *found[work.id].tokens], found[work.id].end.usage) for work in works}


def tokens_of(engine, works):
    return {name: tokens for name, (tokens, _) in answers(engine, works).items()}


@pytest.fixture
def four_at_a_time(monkeypatch):
    draft_always(monkeypatch, 4)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def of(name, seed=0):
        if (name, seed) not in made:
            made[name, seed] = save(make_model(name, seed=seed), tmp_path_factory.mktemp("model"))
        return made[name, seed]
    return of


# (the model, what drafts for it, the seed of its weights): all right; all wrong; of a hybrid, of windows, of experts, of latents
PAIRS = {"itself": ("llama3.1", "llama3.1", 0), "another": ("llama3.1", "llama2", 3), "for a hybrid": ("qwen3.5", "llama3.1", 0),
         "with windows": ("gemma2", "gemma2", 0), "with experts": ("qwen3moe", "llama2", 0),
         "with latents": ("kimi2", "kimi2", 0), "with latents of another": ("glm-flash", "youtu", 0)}


@compiled
@pytest.mark.parametrize("pair", by_day(PAIRS, "itself", "for a hybrid", "with windows", "with experts", "with latents of another"))
def test_answers_are_those_without_drafts(pair, folder_of, four_at_a_time, one_thread, monkeypatch):
    monkeypatch.setattr(StatePool, "INTERVAL", 32)
    model, draft, seed = PAIRS[pair]
    engine = drafting_engine(folder_of(model), folder_of(draft, seed), dtype="float32")
    works = works_of()
    engine.drafts = False
    alone = {name: tokens for work in works for name, tokens in tokens_of(engine, [work]).items()}
    engine.drafts = True

    def check(found, way, of=works):
        assert found == {work.id: alone[work.id] for work in of}, way

    engine.pool.forget_cached()
    check(tokens_of(engine, works), "in a batch")
    check(tokens_of(engine, works[::-1]), "from the prefix cache of both")
    for work in works:
        check(tokens_of(engine, [work]), "one alone", [work])
    engine.pool.forget_cached()
    check(tokens_of(engine, works), "from the prefix cache of the draft model alone")
    engine.draft_models[0].drafter.followers.forget()
    check(tokens_of(engine, works), "from the prefix cache of the model alone")
    engine.pool.forget_cached()
    engine.draft_models[0].drafter.prefill_chunk = 20
    engine.draft_models[0].drafter.followers.forget()
    check(tokens_of(engine, works), "with prompts in pieces")
    for known in (1, 20):       # as after a death of a worker
        check(tokens_of(engine, [replace(work, resumed_ids=tuple(alone[work.id][:known])) for work in works]), f"resumed after {known} tokens")
    counts = engine.drafting.drafted, engine.drafting.accepted
    assert counts[0].model > 100 and (counts[1].model > 0.9 * counts[0].model) == (model == draft)


@compiled
def test_a_preempted_answer_is_the_same(folder_of, four_at_a_time, one_thread):
    engine = drafting_engine(folder_of("llama3.1"), folder_of("llama3.1"), dtype="float32")
    works = works_of(new=90)
    engine.drafts = False
    expected = tokens_of(engine, works)
    engine.drafts, engine.limits.prefill_chunk = True, PAGE_SIZE
    engine.pool.forget_cached()
    held = engine.pool.allocate(engine.pool.available - 12)
    found = {}
    for work in works:
        engine.add(work)
    while engine.busy:
        for name, event in engine.step():
            if isinstance(event, Piece):
                found[name] = found.get(name, []) + list(event.tokens)
        assert not follower_faults(engine.draft_models[0].drafter.followers)
    engine.pool.release(held)
    assert found == expected and engine.queue.preemptions and engine.drafting.accepted.model


@compiled
def test_a_draft_model_short_of_pages_drafts_for_some(folder_of, four_at_a_time, one_thread):
    engine = drafting_engine(folder_of("llama3.1"), folder_of("llama3.1"), dtype="float32")
    works = works_of(new=60)
    engine.drafts = False
    expected = tokens_of(engine, works)
    engine.drafts = True
    pool = engine.draft_models[0].drafter.followers.pool
    held = pool.allocate(pool.available - 8)
    for work in works:
        engine.add(work)
    found = {work.id: [] for work in works}
    while engine.busy:
        for name, event in engine.step():
            if isinstance(event, Piece):
                found[name] += event.tokens
    pool.release(held)
    check_integrity(engine)
    assert found == expected and engine.drafting.accepted.model and pool.available == pool.num_pages


@compiled
def test_a_failed_step_leaves_no_draft_behind(folder_of, four_at_a_time, one_thread, monkeypatch):
    engine = drafting_engine(folder_of("llama3.1"), folder_of("llama3.1"), dtype="float32")
    works = works_of()
    engine.drafts = False
    expected = tokens_of(engine, works)
    engine.drafts = True
    drafter, found = engine.draft_models[0].drafter, {work.id: [] for work in works}
    start, steps = drafter.runner.start, itertools.count()

    def failing(batch, rows):
        if next(steps) == 9:
            raise RuntimeError("a step of the draft model failed")
        return start(batch, rows)

    monkeypatch.setattr(drafter.runner, "start", failing)
    for work in works:
        engine.add(work)
    failed = 0
    while engine.busy:
        try:
            events = engine.step()
        except RuntimeError:
            failed, events = failed + 1, []
            assert not engine.give_up()     # several were computed, so no one is blamed
        for name, event in [*events]:
            if isinstance(event, Piece):
                found[name] += event.tokens
    check_integrity(engine)
    assert failed == 1 and found == expected


@compiled
def test_two_ranks_draft_the_same(folder_of, four_at_a_time, one_thread, monkeypatch):
    with group(monkeypatch, 2) as ranks:
        engine = ranks.engine(folder_of("llama3.1"), draft_model=str(folder_of("llama3.1")), drafts="model", dtype="float32")
        works = works_of()
        engine.drafts = False
        expected = tokens_of(engine, works)
        engine.drafts = True
        assert tokens_of(engine, works) == expected
        ranks.settle()
        assert engine.drafting.accepted.model > 30


@compiled
def test_a_bias_and_a_stop_token_change_nothing(folder_of, four_at_a_time, one_thread):
    engine = drafting_engine(folder_of("llama3.1"), folder_of("llama3.1"), dtype="float32")
    biased = works_of(logit_bias=((5, 20.0), (7, 20.0), (9, 20.0)), top_k=20, top_p=0.9, min_p=0.01)
    stopping = [replace(work, id=f"{work.id} stops", params=replace(work.params, ignore_eos=False, min_tokens=3, stop_token_ids=(7,))) for work in biased]
    for works in (biased, stopping):
        engine.drafts = False
        expected = tokens_of(engine, works)
        engine.drafts = True
        found = answers(engine, works)
        assert {name: tokens for name, (tokens, _) in found.items()} == expected
        assert all(usage.accepted.model for _, usage in found.values())


@compiled
def test_drafting_changes_no_adapter_or_grammar_answer(default_model_path, tmp_path, four_at_a_time, one_thread):
    """The draft model has no adapter: it drafts as well as it can."""
    engine = drafting_engine(default_model_path, default_model_path, kv_cache_memory=128 << 20,
                             adapter=("one",))
    engine.adapters.load("one", random_adapter(tmp_path / "one", 30, SMOLLM2, 1, 16, 0.03))
    prompt = tuple(engine.tokenizer.render([Message("user", "Tell me of rivers.")]))
    works = [assignment(f"w{n}", prompt, SamplingParams(temperature=temperature, seed=n), 16, **more) for n, (temperature, more) in enumerate(
        [(0.0, dict(adapter="one")), (1.0, dict(adapter="one")), (0.7, dict(grammar=json_grammar({"type": "array", "items": {"type": "integer"}}, ""))), (0.7, {})])]
    engine.drafts = False
    expected = tokens_of(engine, works)
    engine.drafts = True
    found = answers(engine, works)
    assert {name: tokens for name, (tokens, _) in found.items()} == expected
    assert all(found[name][1].drafted.model for name in ("w0", "w1", "w3")) and expected["w0"] != expected["w3"]


def distances(engine, drafter, tokens, temperature, first):
    """Of each token from `first` on, by the whole text before it: TV of the two models' distributions at this temperature, and how often two draws
    with different noise would be equal."""
    chances = []
    for each in (engine, drafter):
        transformer = each.transformer
        pages = [*range(-(-len(tokens) // PAGE_SIZE))]
        batch = make_batch((tokens, 0, len(tokens), pages))._replace(logit_rows=[*range(first - 1, len(tokens) - 1)])
        logits = numpy.array(transformer.forward(batch)).astype(numpy.float64) / temperature
        weights = numpy.exp(logits - logits.max(axis=1, keepdims=True))
        chances.append(weights / weights.sum(axis=1, keepdims=True))
    return numpy.stack([numpy.abs(chances[0] - chances[1]).sum(axis=1) / 2, (chances[0] * chances[1]).sum(axis=1)])


@pytest.fixture(scope="module")
def two_sizes(default_model_path, tmp_path_factory):
    """The default model, whose matrices are Q4_1, and the same in Q4_0."""
    return default_model_path, requantized(default_model_path, tmp_path_factory.mktemp("two sizes") / "Q4_0.gguf", "Q4_0")


@compiled
@pytest.mark.slow           # by day a model agrees with itself: with other noise it would not
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_drafts_are_as_often_right_as_models_agree(temperature, two_sizes, monkeypatch):
    """With the noise of the seed: at least (1 - TV) / (1 + TV) of first tokens, and more than with other noise.

    The bound holds for the mean; of the 150 or more draws, which the seeds fix, the share may be two standard deviations below, and must be two above that."""
    draft_always(monkeypatch, 1)
    engine = drafting_engine(*two_sizes, drafts="model", kv_cache_memory=128 << 20, max_batch=96)
    prompts = ["Write a short story about a lighthouse.", "Explain how rain forms.", "What is a good plan for a day in Rome?", "Why is the sea salty?"]
    works = [assignment(f"w{n}", tuple(engine.tokenizer.render([Message("user", prompt)])), SamplingParams(temperature=temperature, top_k=0, seed=n), 80, ignore_eos=True)
             for n, prompt in enumerate(prompts)]
    engine.drafts = False
    expected = tokens_of(engine, works)
    engine.drafts = True
    assert tokens_of(engine, works) == expected
    drafted, accepted = engine.drafting.drafted.model, engine.drafting.accepted.model
    engine.pool.forget_cached()
    engine.draft_models[0].drafter.followers.forget()
    apart, chance = numpy.concatenate([distances(
        engine, engine.draft_models[0].drafter, [*work.prompt_ids, *expected[work.id]], temperature, len(work.prompt_ids) + 1) for work in works], axis=1)
    bound, share, two = ((1 - apart) / (1 + apart)).mean(), accepted / drafted, drafted**-0.5       # two deviations at most
    print(f"TV {apart.mean():.3f}, bound {bound:.3f}, with other noise {chance.mean():.3f}, accepted {accepted} of {drafted}: {share:.3f}")
    assert drafted > 140 and 0.03 < apart.mean() < 0.5 and share >= bound - two
    assert share > chance.mean() + two or temperature < 1


@pytest.mark.parametrize("draft, reason", [
    ("qwen3.5", "keeps states, which cannot go back to before a wrong draft"), (None, "--drafts model needs --draft-model MODEL")])
def test_what_cannot_draft_is_refused(draft, reason, folder_of):
    with pytest.raises(ConfigError, match=reason):
        drafting_engine(folder_of("llama3.1"), draft and folder_of(draft))


def test_another_tokenizer_is_named_by_a_difference(folder_of, tmp_path, default_model_path):
    """The error names the first difference."""
    import json
    folder = save(make_model("llama2"), tmp_path / "other")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    one, other = (next(text for text, token in vocab.items() if token == wanted) for wanted in (40, 41))
    vocab[one], vocab[other] = 41, 40
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="its tokenizer is another: token 40 is \".*\" to it, and \".*\" to the model$"):
        drafting_engine(folder_of("llama3.1"), folder)
    with pytest.raises(ConfigError, match="it has 49,152 tokens, the model 2"):
        drafting_engine(folder_of("llama3.1"), default_model_path)
    with pytest.raises(ConfigError, match=r"--pp\) cannot have one"):
        drafting_engine(folder_of("llama3.1"), folder_of("llama2"), pipeline_parallel_size=2)


def test_its_memory_is_in_the_plan(folder_of):
    """Its weights and buffers beside the model's, and a page of its own for each of the model's."""
    model = folder_of("llama3.1")
    settings = Settings(model=str(model), draft_model=str(folder_of("llama2")), drafts="auto", kv_cache_memory=8 << 20)
    target = open_model(resolve_model(settings), settings, CPU)
    planned = plan_draft_model(target, settings, CPU, prefill_chunk(settings, CPU))
    with_draft, without = (drafting_engine(model, draft, drafts="auto", kv_cache_memory=8 << 20, max_batch=64) for draft in (settings.draft_model, None))
    page_bytes, own = with_draft.transformer.layout.page_bytes, with_draft.draft_models[0].drafter.transformer
    assert planned.page_bytes == own.layout.page_bytes
    assert with_draft.pool.num_pages == (8 << 20) // (page_bytes + planned.page_bytes) < without.pool.num_pages
    held = own.weights_bytes + sum(buffer.nbytes for buffer in own.buffers.values())
    assert 0.9 * held <= planned.nbytes <= 1.3 * held
    assert own.cache.nbytes == with_draft.pool.num_pages * planned.page_bytes
