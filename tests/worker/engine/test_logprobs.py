"""Log-probabilities of answers and prompts are those of the model's own distribution, whatever else the step
computes."""

import math

import numpy
import pytest
import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.messages.requests import Piece, PromptScores, SamplingParams, TokenLogprob
from chatlm.front.api.logprobs import logprob_number
from chatlm.worker.engine.host import logprob_of
from chatlm.worker.model.batch import Batch
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ops.sampling import penalize
from engines import forward_logits, make_engine, pieces
from works import assignment, changed

PROMPT = tuple((7 * i + i * i) % 250 for i in range(75))


@pytest.fixture
def engine(nanochat_fixtures):
    return make_engine(nanochat_fixtures / "gen5", num_pages=200, max_batch=8, prefill_chunk=64)


@torch.inference_mode()
def logits_of(engine, tokens):
    """Logits after each of the tokens, (len(tokens), V), computed row by row in pages of their own."""
    pages = engine.pool.allocate(-(-len(tokens) // PAGE_SIZE))
    lines = [forward_logits(engine.transformer, Batch([token], [tokens[i - 1] if i else -1], [0, 1], [i + 1], [pages], [0]))[0].clone()
             for i, token in enumerate(tokens)]
    engine.pool.release(pages)
    return torch.stack(lines)


def check(entries, logits, tokens, top):
    expected = torch.log_softmax(logits.double(), -1)
    for entry, line, token in zip(entries, expected, tokens, strict=True):
        assert entry.token == token
        assert math.isclose(entry.logprob, float(line[token]), abs_tol=2e-3)
        assert len(entry.top) == top and [pair[1] for pair in entry.top] == sorted([pair[1] for pair in entry.top], reverse=True)
        for (_, logprob), value in zip(entry.top, line.topk(top).values if top else []):
            assert math.isclose(logprob, float(value), abs_tol=2e-3)


@pytest.mark.parametrize("ahead", [False, True])
def test_each_token_comes_with_its_likelihood(engine, ahead):
    """Beside an answer without log-probabilities, and at any temperature."""
    works = [assignment("a", PROMPT, SamplingParams(1.3, seed=1), 12, ignore_eos=True, logprobs=5),
             assignment("b", PROMPT[:20], SamplingParams(0.7, seed=2), 20, ignore_eos=True),
             assignment("c", PROMPT[:33], SamplingParams(0.0), 9, ignore_eos=True, logprobs=0)]
    found = pieces(engine, works, ahead)
    assert all(piece.logprobs == () for piece in found["b"])
    for name, prompt, top in (("a", PROMPT, 5), ("c", PROMPT[:33], 0)):
        tokens = [token for piece in found[name] for token in piece.tokens]
        entries = [entry for piece in found[name] for entry in piece.logprobs]
        logits = logits_of(engine, [*prompt, *tokens])[len(prompt) - 1:-1]
        check(entries, logits, tokens, top)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_a_token_that_ends_an_answer_is_scored(engine, ahead, scored):
    """Evaluations take the last entry of an echoed prompt for the drawn token's."""
    plain = assignment("a", PROMPT, SamplingParams(0.0), 4, ignore_eos=True)
    drawn = [token for piece in pieces(engine, [plain])["a"] for token in piece.tokens]
    stops = [assignment(f"s{at}", PROMPT, SamplingParams(0.0), 4, ignore_eos=True, logprobs=1, stop_token_ids=(drawn[at],),
                        prompt_logprobs=1 if scored else None) for at in (0, 3)]
    found = pieces(engine, stops, ahead)
    for work in stops:
        tokens, end = [token for piece in found[work.id] for token in piece.tokens], found[work.id].end
        entries = [entry.token for piece in found[work.id] for entry in piece.logprobs]
        assert end.reason == "stop" and tokens == drawn[:len(tokens)] and tokens[-1] == work.params.stop_token_ids[0]
        assert entries == (tokens if scored else tokens[:-1])


def test_looking_at_logits_changes_no_answer(engine):
    work = assignment("a", PROMPT, SamplingParams(1.0, seed=5, top_k=0), 24, ignore_eos=True)
    plain = [token for piece in pieces(engine, [work])["a"] for token in piece.tokens]
    engine.pool.forget_cached()
    looked = pieces(engine, [changed(work, logprobs=2, prompt_logprobs=2)])["a"]
    assert [token for piece in looked for token in piece.tokens] == plain


def test_logprobs_count_bias_and_not_temperature(engine):
    """Penalties and bias count, and temperature does not."""
    params = dict(logit_bias=((11, 30.0),), frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.3)
    work = assignment("a", PROMPT, SamplingParams(0.2, seed=5, **params), 6, ignore_eos=True, logprobs=3)
    found = pieces(engine, [work])["a"]
    tokens = [token for piece in found for token in piece.tokens]
    logits = logits_of(engine, [*PROMPT, *tokens])[len(PROMPT) - 1:-1].numpy()
    rows = [SampleRow(work.sampling, len(PROMPT) + i, [*PROMPT, *tokens[:i]], len(PROMPT)) for i in range(len(tokens))]
    logits = torch.from_numpy(numpy.stack([penalize(*pair) for pair in zip(logits, rows)]))
    check([entry for piece in found for entry in piece.logprobs], logits, tokens, 3)


def scores_and_rest(found):
    """The scores of a prompt, sent as they are computed, and the pieces."""
    return [entry for scores in found.others for entry in scores.logprobs], found


@pytest.mark.parametrize("ahead", [False, True])
def test_prompts_are_scored_whole_though_cached(engine, ahead):
    """75 tokens in steps of at most 8 rows of logits, some of which other answers take."""
    others = [assignment(f"o{i}", PROMPT[:30 + i], SamplingParams(1.0, seed=i), 40, ignore_eos=True) for i in range(4)]
    scored = [assignment(f"s{i}", PROMPT[i:], SamplingParams(0.0), 2, ignore_eos=True, logprobs=2, prompt_logprobs=2) for i in range(2)]
    pieces(engine, [assignment("warm", PROMPT, SamplingParams(0.0), 1)])
    rows = []
    forward = engine.transformer.forward
    engine.transformer.forward = lambda batch: (rows.append(len(batch.logit_rows)), forward(batch))[1]
    found = pieces(engine, others + scored, ahead)
    engine.transformer.forward = forward
    assert max(rows) <= engine.limits.max_rows == 8
    for i, work in enumerate(scored):
        scores, rest = scores_and_rest(found[work.id])
        assert scores[0] == TokenLogprob(PROMPT[i], None)
        check(scores[1:], logits_of(engine, work.prompt_ids)[:-1], work.prompt_ids[1:], 2)
        assert len(rest[0].tokens) == 1 and rest.end.usage.cached_tokens == 0


def test_a_preempted_scored_prompt_is_scored_once(engine):
    """A scored prompt that is preempted is scored again, and once."""
    works = [assignment("old", PROMPT, SamplingParams(0.0), 30, ignore_eos=True),
             assignment("s", PROMPT[:60], SamplingParams(0.0), 3, ignore_eos=True, prompt_logprobs=1)]
    events = []
    with torch.inference_mode():
        for work in works:
            engine.add(work)
        while not (sequence := next((s for s in engine.queue.running if s.work.id == "s"), None)) or sequence.computed < 20:
            events += engine.step()
        engine._finish_until(0)
        assert any(isinstance(event, PromptScores) for _, event in events)
        engine.queue.preempt(sequence)
        events += [event for _ in range(200) if engine.busy for event in engine.step()]
    its = [event for name, event in events if name == "s"]
    scores = [entry for event in its if isinstance(event, PromptScores) for entry in event.logprobs]
    assert not any(isinstance(event, PromptScores) for event in its[[type(event) for event in its].index(Piece):])
    check(scores[1:], logits_of(engine, PROMPT[:60])[:-1], PROMPT[1:60], 1)


def test_a_half_scored_prompt_is_scored_on_from_there(engine):
    """A prompt whose scores were sent in part is scored on from there."""
    whole, _ = scores_and_rest(pieces(engine, [assignment("a", PROMPT, SamplingParams(0.0), 2, ignore_eos=True, prompt_logprobs=1)])["a"])
    for scored in (1, 30, len(PROMPT)):
        work = assignment("b", PROMPT, SamplingParams(0.0), 2, ignore_eos=True, prompt_logprobs=1, scored=scored)
        assert scores_and_rest(pieces(engine, [work])["b"])[0] == whole[scored:]


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("first", [0, 1, 2, 16, 17, 40, 65, 74, 75, 90])
def test_scores_from_a_token_on_use_the_cache(engine, ahead, first):
    """Scores from a token on take what is before it from the cache, and compute only their own logits."""
    whole, _ = scores_and_rest(pieces(engine, [assignment("a", PROMPT, SamplingParams(0.0), 1, ignore_eos=True, prompt_logprobs=1)])["a"])
    for cached in (False, True):
        if not cached:
            engine.pool.forget_cached()
        rows = []
        forward = engine.transformer.forward
        engine.transformer.forward = lambda batch: (rows.append(len(batch.logit_rows)), forward(batch))[1]
        work = assignment("b", PROMPT, SamplingParams(0.0), 1, ignore_eos=True, prompt_logprobs=1, scored=first)
        scores, rest = scores_and_rest(pieces(engine, [work], ahead)["b"])
        engine.transformer.forward = forward
        assert [entry.token for entry in scores] == [*PROMPT[first:]] and len(rest[0].tokens) == 1
        for entry, other in zip(scores, whole[first:], strict=True):
            assert entry == other if engine.kernels.row_invariant else entry.logprob is None or math.isclose(entry.logprob, other.logprob, abs_tol=1e-4)
        assert sum(rows) == max(len(PROMPT) - max(first - 1, 0), 1)        # the last token's logits draw one
        most = min(first, len(PROMPT)) - 1
        assert rest.end.usage.cached_tokens == (max(most, 0) // PAGE_SIZE * PAGE_SIZE if cached else 0)


def test_options_scored_together_share_their_pages(engine):
    """Some rows are other answers'; some options end early, some within a page."""
    options = [PROMPT[:60] + tuple(range(i, i + 3 * i + 1)) for i in range(4)]
    alone = []
    for option in options:
        engine.pool.forget_cached()
        alone.append(scores_and_rest(pieces(engine, [assignment("a", option, SamplingParams(0.0), 1, prompt_logprobs=1, scored=60)])["a"])[0])
    engine.pool.forget_cached()
    pieces(engine, [assignment("first", options[0], SamplingParams(0.0), 1, prompt_logprobs=1, scored=60)])
    others = [assignment(f"o{i}", PROMPT[:30 + i], SamplingParams(1.0, seed=i), 30, ignore_eos=True) for i in range(3)]
    works = [assignment(str(i), option, SamplingParams(0.0), 1, prompt_logprobs=1, scored=60) for i, option in enumerate(options)]
    found = pieces(engine, others + works)
    for i, own in enumerate(alone):
        scores, rest = scores_and_rest(found[str(i)])
        assert [entry.token for entry in scores] == [*options[i][60:]] and rest.end.usage.cached_tokens == 48
        assert all(math.isclose(entry.logprob, other.logprob, abs_tol=0 if engine.kernels.row_invariant else 1e-4) for entry, other in zip(scores, own))


def test_named_tokens_are_listed_however_unlikely(engine):
    named = (200, 3, 77)
    plain = pieces(engine, [assignment("a", PROMPT, SamplingParams(0.0), 1, ignore_eos=True, logprobs=250)])["a"][0].logprobs[0]
    found = pieces(engine, [assignment("a", PROMPT, SamplingParams(0.0), 1, ignore_eos=True, logprobs=2, logprob_ids=named)])["a"][0].logprobs[0]
    likely = [id_ for id_, _ in plain.top[:2]]
    assert [id_ for id_, _ in found.top] == [*likely, *(id_ for id_ in named if id_ not in likely)]
    assert dict(found.top).items() <= dict(plain.top).items()


def test_the_token_that_ends_an_answer_has_no_logprob(engine):
    end = min(engine.tokenizer.stop_tokens)
    work = assignment("a", PROMPT, SamplingParams(0.0, logit_bias=((end, 100.0),)), 8, logprobs=1)
    found = pieces(engine, [work])["a"]
    assert (found[0].tokens, found.end.reason, found[0].logprobs, len(found)) == ((end,), "stop", (), 1)


def test_extreme_logprobs_stay_numbers():
    """The largest and smallest numbers stay numbers."""
    line = numpy.array([-numpy.inf, 3.4e38, 0.0, -3.4e38], dtype=numpy.float32)
    found = logprob_of(line, 2, 4)
    assert found.top[0] == (1, 0.0) and logprob_number(found.logprob) == -9999.0
    assert all(logprob_number(logprob) >= -9999.0 for _, logprob in found.top)
