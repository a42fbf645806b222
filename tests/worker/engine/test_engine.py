"""Schedule, run, postprocess, on the real default model and the nanochat fixtures, in float32.

With torch's ops a row's logits depend on the batch in their last bits. So answers that must be equal are
compared by near_tie.py: they may differ only where the best two candidates of a draw were closer than
rounding errors.
"""

import json
import random
import re
from pathlib import Path

import pytest
import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.messages.requests import Ended, Message, SamplingParams
from chatlm.worker.engine.integrity import check_integrity
from engines import TracedRunner, chat_work, draft_eagerly, load, make_engine, run, step_pieces
from generations import GENERATIONS
from near_tie import assert_same_tokens_or_near_tie
from families import make_model, save
from nightly import WHOLE, by_day
from works import assignment, changed

# far above float32 rounding errors of a logit here (1e-4), far below a typical gap (0.1 .. 5)
MARGIN = 2e-3

QUESTIONS = ["What is the capital of Japan?", "Name three colours.", "Write a haiku about rain.", "Why is the sky blue?",
             "Count from one to ten.", "What is 12 plus 30?", "Tell me about cats.", "Who wrote Hamlet?"]


@pytest.fixture(scope="module")
def smollm(default_model_path):
    return make_engine(default_model_path, as_stored=True)


@pytest.fixture(params=by_day([False, True], False), ids=["chosen ops", "reference ops"])
def reference(request):
    return request.param


@pytest.fixture
def gen5(nanochat_fixtures):
    return make_engine(nanochat_fixtures / "gen5", num_pages=200)


def same(engine, one, other, name, other_name=None):
    """Assert that answers are equal: with decode_core throughout, elsewhere up to the first near tie."""
    margin = 0.0 if engine.kernels.row_invariant else MARGIN
    assert_same_tokens_or_near_tie(one.traced(name), other.traced(other_name or name), margin)


@torch.inference_mode()
def answers(engine, works):
    """The tokens of each work as a worker gets them: by the engine's own steps, without a trace."""
    tokens = {work.id: [] for work in works}
    for work in works:
        engine.add(work)
    while engine.busy:
        for name, piece in step_pieces(engine):
            tokens[name] += piece.tokens
        check_integrity(engine)
    return tokens


def test_the_default_model_knows_japan_s_capital(default_model_path, reference):
    """The default model knows the capital of Japan and stops."""
    smollm = make_engine(default_model_path, num_pages=20, reference=reference, as_stored=True)
    result = run(smollm, [chat_work(smollm, "a", "What is the capital of Japan?")])
    assert result.text["a"] == "The capital of Japan is Tokyo."
    assert result.end["a"].reason == "stop" and result.end["a"].stop_reason == "eos"


@pytest.mark.parametrize("temperature", [0.0, pytest.param(0.8, marks=pytest.mark.slow)])
def test_an_answer_alone_equals_one_in_a_batch_of_32(smollm, temperature):
    works = [chat_work(smollm, f"w{i}", QUESTIONS[i % len(QUESTIONS)] + f" ({i})", 10 if WHOLE else 5, temperature=temperature, seed=i, top_k=0)
             for i in range(32)]
    together = run(smollm, works)
    smollm.pool.forget_cached()
    for i in (0, 5, 31):
        same(smollm, run(smollm, [works[i]]), together, f"w{i}")


@pytest.mark.parametrize("chunk", by_day([16, 17, 100], 17))
def test_the_prefill_chunk_changes_nothing(smollm, chunk):
    work = chat_work(smollm, "a", "Summarize: " + " ".join(QUESTIONS * 4), 24)
    smollm.pool.forget_cached()
    whole = run(smollm, [work])
    smollm.pool.forget_cached()
    smollm.limits.prefill_chunk, before = chunk, smollm.limits.prefill_chunk
    try:
        same(smollm, run(smollm, [work]), whole, "a")
    finally:
        smollm.limits.prefill_chunk = before


def test_conversations_a_b_a_reuse_their_prefix(smollm):
    """Conversations A, B, A reuse their prefix, and answer as if alone."""
    first = {name: chat_work(smollm, name, f"My name is {name}. " + QUESTIONS[i] * 3, 20)
             for i, name in enumerate(("Alice", "Bob"))}
    smollm.pool.forget_cached()
    cold = {name: run(smollm, [work]) for name, work in first.items() if not smollm.pool.forget_cached()}
    assert cold["Alice"].end["Alice"].usage.cached_tokens == 0

    def second_turn(name):
        turns = [Message("user", f"My name is {name}. " + QUESTIONS[("Alice", "Bob").index(name)] * 3),
                 Message("assistant", cold[name].text[name]), Message("user", "And what is my name?")]
        return assignment(name, tuple(smollm.tokenizer.render(turns)), SamplingParams(temperature=0.0), 20)

    smollm.pool.forget_cached()
    alone = {}
    for name in first:
        alone[name] = run(smollm, [second_turn(name)])
        smollm.pool.forget_cached()
    for name in ("Alice", "Bob"):
        run(smollm, [first[name]])
    for name in ("Alice", "Bob", "Alice"):
        warm = run(smollm, [second_turn(name)])
        assert warm.end[name].usage.cached_tokens >= len(first[name].prompt_ids) // PAGE_SIZE * PAGE_SIZE
        same(smollm, warm, alone[name], name)


@pytest.mark.slow
def test_a_long_prompt_holds_up_no_streaming_answer(smollm):
    """A 7000 token prompt never holds up 8 streaming answers."""
    smollm.pool.forget_cached()
    words = smollm.tokenizer.encode(" ".join(QUESTIONS) * 200)[:7000]
    streams = [chat_work(smollm, f"s{i}", QUESTIONS[i], 400) for i in range(8)]
    streams = [changed(work, ignore_eos=True, max_tokens=60) for work in streams]
    prefilling = []

    def watch(plan):
        counts = {chunk.sequence.work.id: chunk.count for chunk in plan}
        if counts.get("long", 1) > 1:
            running = [s.work.id for s in smollm.queue.running if s.work.id != "long" and s.pending == 1]
            assert all(counts[name] == 1 for name in running)       # nobody waits longer than one chunk
            assert counts["long"] <= smollm.limits.prefill_chunk
            prefilling.append(len(running))

    run(smollm, [*streams, assignment("long", tuple(words), SamplingParams(temperature=0.0), 2)], on_step=watch, check=False)
    assert len(prefilling) >= 7000 // smollm.limits.prefill_chunk
    assert prefilling.count(8) > 20


def test_preempted_answers_stay_the_same(nanochat_fixtures, reference):
    """Out of pages, answers are preempted and still the same."""
    roomy = make_engine(nanochat_fixtures / "gen5", num_pages=200, reference=reference)
    tight = make_engine(nanochat_fixtures / "gen5", num_pages=14, reference=reference)
    works = [assignment(f"w{i}", tuple(range(40 * i % 200 + 1, 40 * i % 200 + 21)), SamplingParams(temperature=0.9, seed=i), 60,
                  ignore_eos=True) for i in range(5)]
    expected, got = run(roomy, works), run(tight, works)
    assert tight.queue.preemptions > 0 and roomy.queue.preemptions == 0
    for work in works:
        same(roomy, got, expected, work.id)
        assert len(got.tokens[work.id]) == 60


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_nanochat_generation_matches_upstream(nanochat_fixtures, generation, reference):
    """Every nanochat generation answers as upstream does, alone and together."""
    engine = make_engine(nanochat_fixtures / generation, num_pages=200, reference=reference)
    cases = json.loads((nanochat_fixtures / generation / "oracle.json").read_text())["cases"]
    works = [assignment(f"c{i}", tuple(case["prompt_ids"]), SamplingParams(temperature=0.0), len(case["greedy"]), ignore_eos=True)
             for i, case in enumerate(cases)]
    together = run(engine, works)
    for i, case in enumerate(cases):
        assert engine.tokenizer.render([Message(**message) for message in case["messages"]]) == case["prompt_ids"]
        assert together.tokens[f"c{i}"][:len(case["greedy"])] == case["greedy"]
        engine.pool.forget_cached()
        assert run(engine, [works[i]]).tokens[f"c{i}"] == together.tokens[f"c{i}"]


def test_steps_started_ahead_give_the_same_answers(smollm, gen5, nanochat_fixtures):
    """Answers that end by eos, by a stop string and by length, in batches that change whenever one ends."""
    works = [chat_work(smollm, f"w{i}", question, 4 + 2 * i, temperature=0.7, seed=i) for i, question in enumerate(QUESTIONS if WHOLE else QUESTIONS[:4])]
    works.append(changed(chat_work(smollm, "s", "What is the capital of Japan?"), stop=("pan is To",)))
    works.append(chat_work(smollm, "p", QUESTIONS[2], 12, presence_penalty=0.5))
    smollm.pool.forget_cached()
    expected = run(smollm, works)
    smollm.pool.forget_cached()
    got = run(smollm, works, ahead=True)
    smollm.pool.forget_cached()
    if smollm.runner.ahead:
        drawn_by_the_program = answers(smollm, works)
        assert drawn_by_the_program == expected.tokens
    for work in works:
        same(smollm, got, expected, work.id)
        if got.tokens[work.id] == expected.tokens[work.id]:
            assert got.text[work.id] == expected.text[work.id] and got.end[work.id].reason == expected.end[work.id].reason
    tight = make_engine(nanochat_fixtures / "gen5", num_pages=14)
    works = [assignment(f"w{i}", tuple(range(40 * i % 200 + 1, 40 * i % 200 + 21)), SamplingParams(temperature=0.9, seed=i), 60,
                  ignore_eos=True) for i in range(5)]
    expected, got = run(gen5, works), run(tight, works, ahead=True)
    assert tight.queue.preemptions > 0
    for work in works:
        same(gen5, got, expected, work.id)
        assert len(got.tokens[work.id]) == 60


@pytest.mark.parametrize("ahead", by_day([False, True], True))
def test_drafts_change_only_the_number_of_steps(smollm, ahead, monkeypatch):
    draft_eagerly(monkeypatch)
    text = "Say it again, word for word: the quick brown fox jumps over the lazy dog and the cat sleeps by the fire."
    works = [chat_work(smollm, "greedy", text, 40), chat_work(smollm, "drawn", text, 40, temperature=0.3, seed=3),
             changed(chat_work(smollm, "stop", text, 40), stop=("azy do",)),
             chat_work(smollm, "other", QUESTIONS[2], 30, temperature=0.9, seed=1)]
    steps = []
    for drafts in (False, True):
        smollm.drafts, before = drafts, smollm.drafts
        smollm.pool.forget_cached()
        try:
            steps.append([])
            result = run(smollm, works, on_step=steps[-1].append, ahead=ahead)
        finally:
            smollm.drafts = before
        if not drafts:
            plain = result
    assert plain.end["greedy"].usage.drafted_tokens == 0 < result.end["greedy"].usage.accepted_tokens <= result.end["greedy"].usage.drafted_tokens
    without, with_drafts = (sum(chunk.sequence.work.id == "greedy" for plan in plans for chunk in plan) for plans in steps)
    assert with_drafts < without
    for work in works:
        same(smollm, result, plain, work.id)
        if result.tokens[work.id] == plain.tokens[work.id]:
            assert result.text[work.id] == plain.text[work.id]
            assert result.end[work.id].stop_reason == plain.end[work.id].stop_reason


def test_a_resumed_answer_goes_on_as_before(gen5):
    """A resumed answer goes on as if nothing had happened."""
    work = assignment("a", tuple(range(30, 60)), SamplingParams(temperature=0.9, seed=5), 50, ignore_eos=True)
    whole = run(gen5, [work])
    for cut in (1, 7, 49):
        before = run(gen5, [changed(work, max_tokens=cut)])
        resumed = changed(work, resumed_ids=tuple(before.tokens["a"]))
        after = run(gen5, [resumed])
        assert before.tokens["a"] + after.tokens["a"] == whole.tokens["a"]
        assert before.text["a"] + after.text["a"] == whole.text["a"]


def test_sampled_answers_depend_on_the_seed_alone(smollm):
    """Sampled answers depend on the seed and on nothing else."""
    works = [chat_work(smollm, name, "Tell me a story.", 15, temperature=1.0, seed=seed) for name, seed in
             (("one", 1), ("again", 1), ("two", 2))]
    result = run(smollm, works)
    same(smollm, result, result, "one", "again")
    assert result.tokens["one"] != result.tokens["two"]


def own_bytes():
    """Of this process's memory, what no file has."""
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[0])


def test_an_emptied_cache_takes_no_memory(smollm):
    """An emptied cache takes no memory, and the answers after it are the same."""
    engine = smollm
    engine.empty_cache()
    works = [chat_work(engine, name, "Tell me of the sea. " * 40, 24) for name in "ab"]
    first = run(engine, works[:1])
    held, used = own_bytes(), len(engine.pool.evictable) * engine.transformer.cache.nbytes // engine.pool.num_pages
    assert engine.empty_cache() and engine.pool.available == len(engine.pool.free) == engine.pool.num_pages
    assert used > 5 << 20 and held - own_bytes() >= used     # the other pages were never written
    again = run(engine, works[1:])
    assert again.tokens["b"] == first.tokens["a"] and again.end["b"].usage.cached_tokens == 0


def test_a_stop_string_over_tokens_ends_before_it(smollm):
    """A stop string split over tokens ends the answer before it."""
    plain = run(smollm, [chat_work(smollm, "a", "What is the capital of Japan?")])
    work = changed(chat_work(smollm, "b", "What is the capital of Japan?"), stop=("pan is To",))
    stopped = run(smollm, [work])
    assert plain.text["a"].startswith("The capital of Japan is To")
    assert stopped.text["b"] == "The capital of Ja"
    assert (stopped.end["b"].reason, stopped.end["b"].stop_reason) == ("stop", "pan is To")


def test_every_limit_ends_answers_as_it_says(smollm, gen5):
    """max_tokens, the context, min_tokens and stop ids end answers as they say."""
    work = chat_work(smollm, "a", "What is the capital of Japan?")
    answer = run(smollm, [work])
    cut = run(smollm, [changed(work, max_tokens=3)])
    assert cut.tokens["a"] == answer.tokens["a"][:3]
    assert (cut.end["a"].reason, cut.end["a"].stop_reason) == ("length", "max_tokens")
    longer = run(smollm, [changed(work, min_tokens=20)])
    assert len(longer.tokens["a"]) >= 20 and not set(longer.tokens["a"][:19]) & smollm.tokenizer.stop_tokens
    by_id = run(smollm, [changed(work, stop_token_ids=(answer.tokens["a"][4],))])
    assert by_id.tokens["a"] == answer.tokens["a"][:5] and by_id.end["a"].reason == "stop"
    gen5.context_length = 40
    full = run(gen5, [assignment("a", tuple(range(30, 60)), SamplingParams(temperature=0.0), 400, ignore_eos=True)])
    assert len(full.tokens["a"]) == 10 and full.end["a"].stop_reason == "context_length"


class ScriptedRunner(TracedRunner):
    """Dictates the token of every position, so that a test can drive tool use exactly."""

    def draw(self, logits, rows):
        return [self.script[row.position] for row in rows]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("expression, answer", [
    ("12*(3+4)", "84"), ("'strawberry'.count('r')", "3"), ("2**9999", None), ("()", "()"), ("'file'.count('f')", None), ("1e5", None)])
def test_nanochat_s_calculator_is_forced_into_answers(gen5, expression, answer, ahead):
    ids = gen5.tokenizer.tool_tokens
    script = [ids.python_start, *gen5.tokenizer.encode(expression), ids.python_end, *gen5.tokenizer.encode("ok")]
    forced = [ids.output_start, *gen5.tokenizer.encode(answer), ids.output_end] if answer else []
    after_call = script.index(ids.python_end) + 1
    expected = script[:after_call] + forced + script[after_call:]
    gen5.runner = ScriptedRunner(gen5.transformer, ahead)
    gen5.runner.script = [1, 2, 3, *expected, 0, 0]
    gen5.add(assignment("a", (1, 2, 3), SamplingParams(), len(script) + len(forced), ignore_eos=True))
    tokens, text, calls = [], "", []
    with torch.inference_mode():
        while gen5.busy:
            for _, piece in step_pieces(gen5):
                tokens += piece.tokens
                text += piece.text
                calls += [json.loads(delta.text) for delta in piece.deltas if delta.kind == "calculator"]
    assert tokens == expected
    assert (text, calls) == ("ok", [{"expression": expression, "result": answer}])
    check_integrity(gen5)


@pytest.mark.parametrize("ahead", [False, True])
def test_random_requests_leave_nothing_behind(gen5, ahead):
    """Requests that come and go at random moments leave nothing behind."""
    generator = random.Random(11)
    gen5.runner = TracedRunner(gen5.transformer, ahead)
    alive = set()
    with torch.inference_mode():
        for number in range(200 if WHOLE else 100):
            name = f"r{number}"
            prompt = tuple(generator.choices(range(250), k=generator.randrange(1, 90)))
            gen5.add(assignment(name, prompt, SamplingParams(seed=number), generator.randrange(1, 40)))
            alive.add(name)
            for _ in range(generator.randrange(4)):
                alive -= {name for name, event in gen5.step() if isinstance(event, Ended)}
            if alive and generator.random() < 0.6:
                gone = generator.choice(sorted(alive))
                assert gen5.cancel(gone)
                alive.discard(gone)
            check_integrity(gen5)
        for name in alive:
            gen5.cancel(name)
    gen5.step()         # what is under way
    assert not gen5.busy
    assert gen5.pool.available == gen5.pool.num_pages


def test_weights_are_held_once(smollm, tmp_path):
    """As stored in a file, and as floats of a folder."""
    for engine in (smollm, make_engine(save(make_model("llama3.2"), tmp_path), num_pages=8)):
        assert engine.transformer.weights["head"] is engine.transformer.weights["embed"]


def test_the_chosen_sampler_draws_as_the_reference(gen5):
    params = [dict(temperature=0.0), dict(temperature=0.9, top_k=0), dict(temperature=1.5, top_p=0.8, min_p=0.02),
              dict(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2, logit_bias=((7, 5.0), (9, -100.0)))]
    works = [assignment(f"w{i}", tuple(range(30 + i, 60)), SamplingParams(seed=i, **given), 40, ignore_eos=True)
             for i, given in enumerate(params)]
    traced = run(gen5, works)           # drawn by the reference
    gen5.pool.forget_cached()
    assert answers(gen5, works) == traced.tokens


@torch.inference_mode()
def test_a_step_reports_once_the_next_has_started(gen5):
    """A step lets its caller report when the next one has started, and never twice."""
    happened, start = [], gen5.runner.start
    gen5.runner.start = lambda batch, rows: happened.append("start") or start(batch, rows)
    gen5.add(assignment("plain", (5, 6, 7), SamplingParams(seed=1), 4))
    steps = 0
    while gen5.busy:
        gen5.step(lambda: happened.append("report"))
        steps += 1
    assert happened.count("report") == steps and happened.count("start") >= 4
    # only the last step is still to be finished
    first_idle = happened.index("start") + 2 * happened.count("start")
    assert happened[:first_idle] == ["start", "report"] * happened.count("start")
