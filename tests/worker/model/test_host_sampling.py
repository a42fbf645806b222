"""The steps of a draw that only the reference has, against their definitions in plain numpy, in the order of llama.cpp."""

import math

import numpy as np
import pytest

from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ops.sampling import Repetition, drawn_on_host, penalize, sample_reference, survivors
from nightly import WHOLE

NEG_INF = np.float32(-np.inf)


def softmax(logits):
    weights = np.exp(np.asarray(logits, np.float64) - max(logits))
    return weights / weights.sum()


def sigma(ids, logits, p):
    """Of the logits that are not -inf: those at most n standard deviations below the largest."""
    possible = np.float64([logits[i] for i in ids if logits[i] > NEG_INF])
    return [i for i in ids if logits[i] >= possible.max() - p.top_n_sigma * possible.std()]


def typical(ids, logits, p):
    """By |-log p - H|, until more than typical_p of the probability is there."""
    probability = softmax([logits[i] for i in ids])
    surprise = [-math.log(each) if each else math.inf for each in probability]
    entropy = sum(each * s for each, s in zip(probability, surprise) if each)
    total, chosen = 0.0, []
    for place in sorted(range(len(ids)), key=lambda place: abs(surprise[place] - entropy)):
        chosen.append(ids[place])
        total += probability[place]
        if total > p.typical_p:
            break
    return chosen


def without_top_choices(ids, logits, p):
    """All but the least likely of those that are at least xtc_threshold likely."""
    likely = [i for i, each in zip(ids, softmax([logits[i] for i in ids])) if each >= p.xtc_threshold]
    return [i for i in ids if i not in sorted(likely, key=lambda i: (-logits[i], i))[:-1]]


def kept(logits, p, acts=True):
    """The ids that llama.cpp's chain would leave, at temperature 1. `acts`: does XTC?"""
    ids = list(range(len(logits)))
    if p.top_n_sigma > 0:
        ids = sigma(ids, logits, p)
    ids = sorted(ids, key=lambda i: (-logits[i], i))[:p.top_k or None]
    if p.typical_p < 1:
        ids = typical(ids, logits, p)
    best = max(logits[i] for i in ids)
    ids = [i for i in ids if logits[i] - best >= np.float32(-27.7)]      # what weighs less is nothing
    if p.min_p:
        ids = [i for i in ids if logits[i] >= best + math.log(p.min_p)]
    if acts and p.xtc_probability and p.xtc_threshold <= 0.5:
        ids = without_top_choices(ids, logits, p)
    return sorted(ids)


def lines(seed, V, count=12):
    rng = np.random.default_rng(seed)
    for scale in rng.choice([0.3, 1, 3, 6], count):
        line = (rng.standard_normal(V) * scale).astype(np.float32)
        line[rng.random(V) < rng.choice([0, 0, 0.4])] = NEG_INF
        line[0] = rng.standard_normal()
        yield line


class Words:
    """A tokenizer of these words, which always takes the longest."""

    def __init__(self, words):
        self.words, self.vocab_size = [word.encode() for word in words], len(words)
        self.byte_tokens = {word[0]: token for token, word in enumerate(self.words) if len(word) == 1}

    def shown_bytes(self, token):
        return self.words[token]

    def encode(self, text, begins=True):
        rest, tokens = text.encode(), []
        while rest:
            tokens.append(max((token for token, word in enumerate(self.words) if word and rest.startswith(word)), key=lambda token: len(self.words[token])))
            rest = rest[len(self.words[tokens[-1]]):]
        return tokens


WORDS = Words(["a", "b", "c", "d", "ab", "", "aab", "\n", "a\n", "cd", "bcd", ":", "é", "dd", "<|end|>"])
BREAKERS = [(), ("\n", ":"), ("bc",), ("abc", "\n"), ("aaaa",), ("é", "d"), ("<|end|>b", "cdc")]


def dry_penalties(tokens, p):
    """{token: penalty}, by comparing everything with everything."""
    window = tokens[-p.dry_penalty_last_n:] if p.dry_penalty_last_n > 0 else tokens
    sequences = set()
    for breaker in map(str.encode, p.dry_sequence_breakers):
        for token, word in enumerate(WORDS.words):
            if breaker in word:
                sequences.add((token,))
            else:
                sequences |= {(token, *WORDS.encode(breaker[i:].decode())) for i in range(1, len(breaker))
                              if word.endswith(breaker[:i]) and breaker != "é".encode()}
    limit, n = len(window), len(window)
    for start in range(n - 1, -1, -1):
        if found := [len(each) for each in sequences if tuple(window[start:start + len(each)]) == each]:
            limit = n - start - max(found)
            break
    if n <= p.dry_allowed_length:
        return {}
    longest = {}
    for i in range(n - 1):
        length = 0
        while length <= i and window[i - length] == window[n - 1 - length]:
            length += 1
        if min(length, limit) >= p.dry_allowed_length and (window[i + 1],) not in sequences:
            longest[window[i + 1]] = max(longest.get(window[i + 1], 0), min(length, limit))
    return {token: p.dry_multiplier * p.dry_base ** (length - p.dry_allowed_length) for token, length in longest.items()}


@pytest.mark.parametrize("breakers", BREAKERS)
def test_dry_subtracts_what_a_naive_search_finds(breakers):
    """DRY subtracts what a naive search finds, token by token and from scratch."""
    rng = np.random.default_rng(len(breakers))
    for case in range(40 if WHOLE else 4):
        p = SamplingParams(dry_multiplier=0.8, dry_base=float(rng.choice([1.0, 1.75, 2])), dry_allowed_length=int(rng.choice([0, 1, 2, 4])),
                           dry_penalty_last_n=int(rng.choice([-1, 5, 16, 64])), dry_sequence_breakers=breakers)
        few = rng.choice(WORDS.vocab_size, rng.integers(1, 6)).tolist()
        tokens = rng.choice(few, 90).tolist()
        begin = int(rng.integers(0, 30))
        kept = Repetition(p, WORDS, tokens[:begin])
        for count in range(begin, len(tokens) + 1):
            expected = np.zeros(WORDS.vocab_size, np.float32)
            for token, penalty in dry_penalties(tokens[:count], p).items():
                expected[token] -= np.float32(penalty)
            row = SampleRow(p, count, tokens[:count], begin)
            found = penalize(np.zeros(WORDS.vocab_size, np.float32), row._replace(kept=kept))
            assert np.allclose(found, expected, rtol=1e-6), (case, count)
            scratch = penalize(np.zeros(WORDS.vocab_size, np.float32), row._replace(kept=Repetition(p, WORDS, row.tokens)))
            assert (scratch == found).all(), (case, count)


def test_dry_knows_ids_without_a_token():
    """DRY knows ids without a token and text that changed."""
    p = SamplingParams(dry_multiplier=1.0, dry_penalty_last_n=-1, dry_sequence_breakers=("a",))
    kept, far = Repetition(p, WORDS), WORDS.vocab_size + 30
    for tokens in ([3, far, 3, 3, far, 3, 3, far, 3], [3, far, 3, far, far, far], [1] * 600, [1] * 601, [2, 1], []):
        row = SampleRow(p, 5, tokens, 0, kept)
        fresh = penalize(np.zeros(99, np.float32), row._replace(kept=Repetition(p, WORDS, tokens)))
        assert (penalize(np.zeros(99, np.float32), row) == fresh).all()


def test_a_long_repetition_s_penalty_is_finite():
    p = SamplingParams(dry_multiplier=100.0, dry_base=100.0, dry_penalty_last_n=-1)
    penalized = penalize(np.zeros(5, np.float32), SampleRow(p, 5, [1] * 5000))
    assert np.isfinite(penalized).all() and penalized[1] < -1e38 and not penalized[[0, 2, 3, 4]].any()


SETTINGS = [dict(xtc_probability=1.0), dict(xtc_probability=1.0, xtc_threshold=0.01), dict(xtc_probability=1.0, xtc_threshold=0.0, min_p=0.05),
            dict(xtc_probability=1.0, xtc_threshold=0.5, top_k=5), dict(xtc_probability=1.0, xtc_threshold=0.05, typical_p=0.9, top_n_sigma=2.0),
            dict(typical_p=0.9), dict(typical_p=0.2), dict(typical_p=0.0), dict(typical_p=0.5, top_k=10), dict(typical_p=0.7, top_n_sigma=1.5),
            dict(top_n_sigma=1.0), dict(top_n_sigma=0.3), dict(top_n_sigma=2.5, top_k=20)]


@pytest.mark.parametrize("V", [2, 5, 64, 3000])
def test_the_survivors_are_those_of_the_definitions(V):
    for chosen in SETTINGS:
        params = SamplingParams(**(dict(temperature=1.0, top_k=0) | chosen))
        assert drawn_on_host(params)
        for line in lines(V, V, 12 if WHOLE else 6 if V < 1000 else 3):
            assert survivors(line, params)[0].tolist() == kept(line, params), chosen


def test_compiled_samplers_draw_what_needs_no_host():
    """What is off leaves the draw to compiled samplers."""
    for off in (dict(), dict(top_n_sigma=0.0), dict(top_n_sigma=-1.0), dict(typical_p=1.0), dict(dry_base=2.0), dict(dry_multiplier=1.0, dry_penalty_last_n=0), dict(xtc_probability=0.0), dict(xtc_probability=1.0, xtc_threshold=0.51)):
        assert not drawn_on_host(SamplingParams(**off)), off


def test_temperature_zero_takes_the_likeliest_left():
    for chosen in SETTINGS:
        params = SamplingParams(**(dict(top_k=0) | chosen | dict(temperature=0.0)))
        for line in lines(3, 200):
            best = max(kept(line, params), key=lambda i: line[i])
            assert sample_reference(line[None], [SampleRow(params, 3)])[0] == best, chosen


def test_xtc_acts_as_often_as_it_should():
    """XTC acts as often as it should, and apart from the draw."""
    line, often, draws = np.float32([3, 2.5, 0, -1]), 0.3, 20_000 if WHOLE else 2_000
    acted = [0 not in survivors(line, SamplingParams(temperature=1.0, xtc_probability=often, seed=5), position)[0] for position in range(draws)]
    assert abs(sum(acted) / draws - often) < 5 * math.sqrt(often * (1 - often) / draws)      # a false alarm in 1.7 million
    drawn = [sample_reference(line[None], [SampleRow(SamplingParams(temperature=1.0, seed=5), position)])[0] for position in range(draws)]
    first = [token == 0 for token in drawn]
    together, apart = np.mean([a and b for a, b in zip(acted, first)]), np.mean(acted) * np.mean(first)
    assert abs(together - apart) < 5 * math.sqrt(apart / draws)
    choices = [[0 in survivors(line, SamplingParams(xtc_probability=0.5, seed=5, choice=choice), position)[0] for position in range(64)] for choice in (0, 1)]
    assert choices[0] != choices[1]


HOPELESS = [[-np.inf] * 5, [np.nan] * 5, [-np.inf, -np.inf, -7, np.nan, -np.inf], [1.0, np.inf, 3e38, 5, -3e38], [0] * 5, [3]]


@pytest.mark.parametrize("temperature", [0, 0.8, 1e-30])
def test_hopeless_rows_give_defined_tokens(temperature):
    for chosen in SETTINGS:
        for line, token in zip(HOPELESS, (0, 0, 2, None, None, 0)):
            params = SamplingParams(**chosen | dict(temperature=temperature))
            (drawn,) = sample_reference(np.float32([line]), [SampleRow(params, 7, [0, 1, 0], 1)])
            assert token in (None, drawn) and 0 <= drawn < len(line)


def test_the_host_draws_the_same_token_in_any_batch():
    """A row draws the same token alone and in any batch."""
    rng = np.random.default_rng(7)
    logits = (rng.standard_normal((40, 800)) * 3).astype(np.float32)
    rows = [SampleRow(SamplingParams(**(SETTINGS[i % len(SETTINGS)] | dict(seed=i, temperature=float(rng.choice([0, 0.5, 1, 1.4]))))),
                      int(rng.integers(5000)), rng.integers(0, 30, 99).tolist(), 4) for i in range(40)]
    together = sample_reference(logits, rows).tolist()
    assert together == [int(sample_reference(logits[i:i + 1], rows[i:i + 1])[0]) for i in range(40)]
