"""The sampling contract: known answers, brute force, edge rows, and the distribution by statistics (fixed
seeds)."""

import math
from fractions import Fraction

import numpy as np
import pytest

from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.ops import sampling
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ops.sampling import (EXP_CUTOFF, FLOAT_MAX, clean_logits, exp_weights, gumbel, log_contract, penalize, philox, sample_reference,
                                        survivors, uniform_noise)
from near_tie import Traced, assert_same_tokens_or_near_tie
from nightly import by_day

NEG_INF = np.float32(-np.inf)


def draw(logits, position=0, **params):
    row = SampleRow(SamplingParams(**params), position)
    return int(sample_reference(np.asarray(logits, np.float32)[None], [row])[0])


def many_draws(logits, count, position=0, step=1, **params):
    """Tokens drawn from the same logits at `count` positions."""
    logits = np.asarray(logits, np.float32)
    tokens = []
    for start in range(0, count, 5000):
        end = min(count, start + 5000)
        rows = [SampleRow(SamplingParams(**params), position + step * i) for i in range(start, end)]
        ids, z = survivors(logits, rows[0].params)
        tokens.append(sampling.draw([(ids, z)] * len(rows), rows))
    return np.concatenate(tokens)


# --- noise -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counter, key, words", [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0),
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_philox_gives_random123_s_known_answers(counter, key, words):
    columns = [np.array(values, np.uint64)[:, None].repeat(3, axis=1) for values in (counter, key)]
    assert philox(*columns).tolist() == [[word] * 3 for word in words]


def test_an_id_s_noise_is_its_lane_of_the_counter():
    """The noise of an id is its lane of the counter made of group, position and choice."""
    seed, position, choice = 0xA409382212345678, 0x9876543210, 5
    ids = np.array([2, 3, 7, 49151])
    seeds = np.array([1, seed, seed, seed, seed], np.uint64)
    u = uniform_noise(np.concatenate(([2], ids)), seeds, position, choice)[1:]
    for token, value in zip(ids.tolist(), u):
        counter = np.array([[token // 4], [position & 0xFFFFFFFF], [position >> 32], [choice]], np.uint64)
        key = np.array([[seed & 0xFFFFFFFF], [seed >> 32]], np.uint64)
        assert value == (int(philox(counter, key)[token % 4, 0]) + 0.5) / 2**32


def test_the_contract_s_logarithm_is_accurate():
    """The contract's logarithm is accurate near one and far from it."""
    rng = np.random.default_rng(1)
    x = np.concatenate([1 - (rng.integers(0, 2**32, 10000) + 0.5) / 2**32, 10.0 ** rng.uniform(-11, 2, 10000),
                        [1 - 2.0**-33, 2.0**-33, 0.7071067811865476, 0.70710678, 1.4142135]])
    assert np.max(np.abs(log_contract(x) / np.log(x) - 1)) < 1e-14


def test_exponential_weights_are_exact_at_the_ends():
    """Exponential weights are exact at the ends, and close between."""
    z = np.linspace(-30, 0, 100001, dtype=np.float32)
    weights = exp_weights(z)
    assert weights[-1] == 2**40 and exp_weights(np.float32([-np.inf, -27.71, -27.7])).tolist() == [0, 0, 1]
    exact = np.exp(z.astype(np.float64)) * 2.0**40
    kept = z >= np.float32(EXP_CUTOFF)
    assert not weights[~kept].any() and (np.diff(weights.astype(np.int64)) >= 0).all()
    assert np.max(np.abs(weights[kept] - exact[kept]) / (1 + 4e-7 * exact[kept])) <= 1


def test_uniform_noise_passes_a_chi_square():
    """Uniform noise passes a chi square and reaches both ends."""
    u = uniform_noise(np.arange(1_000_000), 9, 77, 0)
    counts = np.bincount((u * 1000).astype(int), minlength=1000)
    assert chi_square_p(counts, np.full(1000, 1e-3)) > 1e-4
    assert 0 < u.min() < 1e-5 and 1 - 1e-5 < u.max() < 1


# --- survivors against brute force -------------------------------------------------------------------------------


def brute_survivors(logits, top_k=0, top_p=1.0, min_p=0.0, temperature=1.0):
    """Sort everything, then apply the definitions in turn with exact integers."""
    top = logits.max()
    if top == -math.inf:
        return [0]
    with np.errstate(over="ignore"):
        z = (logits - top) * np.float32(min(1 / temperature, FLOAT_MAX))
    weight = exp_weights(z).tolist()
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:top_k or None]
    if top_p < 1:
        target = max(1, int(Fraction(sum(weight[i] for i in kept)) * round(top_p * 2**32) / 2**32))
        cumulative, prefix = 0, []
        for i in kept:
            if cumulative >= target:
                break
            cumulative += weight[i]
            prefix.append(i)
        kept = prefix
    threshold = np.float32(math.log(min_p)) if min_p > 0 else NEG_INF
    return sorted(i for i in kept if weight[i] > 0 and z[i] >= threshold)


def edge_rows(rng, V):
    yield np.zeros(V, np.float32)                                               # all equal
    yield np.full(V, NEG_INF)
    one = np.full(V, NEG_INF)
    one[V // 2] = -3
    yield one
    yield rng.integers(-2, 3, V).astype(np.float32)                             # ties across every border
    yield np.where(rng.random(V) < 0.5, np.float32(0.0), np.float32(-0.0)).astype(np.float32)
    yield rng.choice(np.float32([1e30, -1e30, 0, 3e38, -3e38]), V)
    row = rng.standard_normal(V).astype(np.float32)
    row[rng.integers(0, V, 3)] = np.nan
    row[rng.integers(0, V, 2)] = np.inf
    yield row
    yield (rng.standard_normal(V) * 4).astype(np.float32)


@pytest.mark.parametrize("V", [1, 2, 5, 64, 300, 5000])
def test_survivors_are_those_of_a_brute_force_sort(V):
    rng = np.random.default_rng(V)
    settings = [dict(), dict(top_k=1), dict(top_k=min(7, V)), dict(top_k=V), dict(top_k=V + 1),
                dict(top_p=0.0), dict(top_p=0.5), dict(top_p=0.999999), dict(min_p=1.0), dict(min_p=0.05),
                dict(temperature=1e-6), dict(temperature=2.0, top_p=0.3),
                dict(top_k=40, top_p=0.95), dict(top_k=40, top_p=0.95, min_p=0.1), dict(top_p=0.9, min_p=0.2)]
    rows = [clean_logits(row) for _ in range(1 if V == 5000 else 4) for row in edge_rows(rng, V)]
    for logits in rows:
        for chosen in settings:
            ids, z = survivors(logits, SamplingParams(**(dict(temperature=1.0, top_k=0) | chosen)))
            assert ids.tolist() == brute_survivors(logits, **chosen), chosen
            assert (z <= 0).all()


def test_exactly_k_survive_and_lower_ids_win_ties():
    logits = np.float32([1, 2, 2, 2, 2, 0])
    assert survivors(logits, SamplingParams(top_k=3))[0].tolist() == [1, 2, 3]
    wide = np.zeros(49152, np.float32)
    assert survivors(wide, SamplingParams(top_k=50))[0].tolist() == list(range(50))


def test_top_p_keeps_the_lowest_ids_among_ties():
    ids, _ = survivors(np.zeros(8, np.float32), SamplingParams(temperature=1.0, top_k=0, top_p=0.5))
    assert ids.tolist() == [0, 1, 2, 3]


# --- edge rows and parameters ------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_largest_logit():
    """Temperature zero takes the largest logit and the lowest id."""
    assert draw([0, 5, 5, 1], temperature=0) == 1
    assert draw([np.nan, -1, -0.0, 0.0], temperature=0) == 2


@pytest.mark.parametrize("temperature", [0, 0.8, 1e-30])
def test_hopeless_rows_give_defined_tokens(temperature):
    assert draw([-np.inf] * 5, temperature=temperature) == 0
    assert draw([np.nan] * 5, temperature=temperature) == 0
    assert draw([-np.inf, -np.inf, -7, np.nan], temperature=temperature) == 2
    assert draw([1.0, np.inf, 3e38, 5], temperature=temperature) == 1


def test_tiny_temperature_and_top_k_one_are_greedy():
    logits = np.random.default_rng(2).standard_normal(500)
    assert draw(logits, temperature=1e-6, seed=4) == draw(logits, top_k=1, seed=5) == draw(logits, temperature=0)


def test_penalties_and_bias_apply_in_their_order():
    """The order is the documented one."""
    row = SampleRow(SamplingParams(repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25,
                                   logit_bias=((1, 10.0), (4, -np.inf))), 5, [0, 3, 1, 1, 2], 2)
    penalized = penalize(np.float32([4, 4, -4, -4, 4]), row)
    # 0 and 3 are prompt only: repetition alone; 1 twice and 2 once in the answer; 4 nowhere, but banned
    assert penalized.tolist() == [2, 2 - 1.0 - 0.25 + 10, -8 - 0.5 - 0.25, -8, -np.inf]


def test_penalties_leave_the_caller_s_logits_alone():
    logits = np.ones((1, 8), np.float32)
    sample_reference(logits, [SampleRow(SamplingParams(logit_bias=((3, 5.0),)), 0)])
    assert (logits == 1).all()


# --- exactness ---------------------------------------------------------------------------------------------------


def mixed_rows(rng, count, V):
    rows = []
    for i in range(count):
        params = SamplingParams(temperature=float(rng.choice([0, 0.3, 0.8, 1.5])),
                                top_k=int(rng.choice([0, 1, 40, 50, 700])),
                                top_p=float(rng.choice([1, 0.9])), min_p=float(rng.choice([0, 0.02])),
                                repetition_penalty=float(rng.choice([1, 1.2])), seed=int(rng.integers(2**63)))
        rows.append(SampleRow(params, int(rng.integers(5000)), rng.integers(0, V, 9).tolist(), 4))
    return (rng.standard_normal((count, V)) * 3).astype(np.float32), rows


def test_sampling_draws_the_same_token_in_any_batch():
    """A row draws the same token alone and in any batch."""
    rng = np.random.default_rng(7)
    logits, rows = mixed_rows(rng, 32, 5000)
    together = sample_reference(logits, rows).tolist()
    assert together == [int(sample_reference(logits[i:i + 1], rows[i:i + 1])[0]) for i in range(32)]
    order = rng.permutation(32)
    assert [together[i] for i in order] == sample_reference(logits[order], [rows[i] for i in order]).tolist()


def test_a_draw_is_the_argmax_of_exact_scores():
    """A draw is the argmax of exact scores over all survivors."""
    rng = np.random.default_rng(8)
    logits, rows = mixed_rows(rng, 64, 3000)
    for line, row, token in zip(logits, rows, sample_reference(logits, rows).tolist()):
        if row.params.temperature > 0:
            ids, z = survivors(penalize(line, row), row.params)
            noise = gumbel(uniform_noise(ids, row.params.seed, row.position, row.params.choice))
            assert token == ids[np.argmax(z.astype(np.float64) + noise)]


def test_choices_seeds_and_positions_change_the_noise():
    base = dict(temperature=1.0, top_k=0, seed=3)
    others = ({}, {"seed": 4}, {"choice": 1}, {"seed": 3 + 2**40})
    drawn = [many_draws(np.zeros(1000), 64, **(base | other)).tolist() for other in others]
    drawn.append(many_draws(np.zeros(1000), 64, position=2**32, **base).tolist())
    assert len({tuple(tokens) for tokens in drawn}) == len(drawn)


# --- distribution ----------------------------------------------------------------------------------------------


def chi_square_p(counts, probabilities):
    """p-value of Pearson's test, bins of expectation below 5 pooled (Wilson-Hilferty approximation of the tail)."""
    expected = probabilities * counts.sum()
    small = expected < 5
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    degrees = len(observed) - 1
    statistic = ((observed - expected) ** 2 / expected).sum() / degrees
    normal = (statistic ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(normal / math.sqrt(2))


@pytest.mark.parametrize("params", by_day([dict(temperature=1.0, top_k=0), dict(temperature=0.7, top_k=40),
                                           dict(temperature=1.3, top_k=0, top_p=0.8)], dict(temperature=0.7, top_k=40)))
def test_tokens_follow_the_softmax_of_the_survivors(params):
    """False alarms: 1e-4 for the chi-square; the total variation bound is 1.3 times its expectation at K bins."""
    logits = (np.random.default_rng(11).standard_normal(200) * 1.5).astype(np.float32)
    draws = 60_000
    tokens = many_draws(logits, draws, seed=21, **params)
    ids, z = survivors(logits, SamplingParams(**params))
    law = np.zeros(200)
    law[ids] = np.exp(z.astype(np.float64)) / np.exp(z.astype(np.float64)).sum()
    counts = np.bincount(tokens, minlength=200)
    assert counts[law == 0].sum() == 0
    assert chi_square_p(counts, law) > 1e-4
    assert 0.5 * np.abs(counts / draws - law).sum() <= 1.3 * 0.5 * math.sqrt(2 * len(ids) / (math.pi * draws))


@pytest.mark.parametrize("other", [dict(position=1), dict(seed=22), dict(choice=1)])
def test_neighbouring_draws_are_independent(other):
    """Neighbouring positions, seeds and choices are independent."""
    logits = (np.random.default_rng(12).standard_normal(12)).astype(np.float32)
    base = dict(temperature=1.0, top_k=0, seed=21, position=0, step=2)
    first, second = many_draws(logits, 60_000, **base), many_draws(logits, 60_000, **(base | other))
    law = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    pairs = np.bincount(first * 12 + second, minlength=144)
    assert chi_square_p(pairs, np.outer(law, law).ravel()) > 1e-4


# --- the near-tie helper itself ----------------------------------------------------------------------------------


def test_the_near_tie_helper_accepts_only_close_draws():
    close, far = Traced([1, 2, 3], [0.5, 0.001, 0.5]), Traced([1, 7, 9], [0.5, 0.5, 0.5])
    assert_same_tokens_or_near_tie(close, far, margin=0.01)
    for a, b in ((Traced([1, 2], [9, 9]), Traced([1, 3], [9, 9])), (Traced([1], [9]), Traced([1, 3], [9, 9]))):
        with pytest.raises(AssertionError):
            assert_same_tokens_or_near_tie(a, b, margin=0.01)
    with pytest.raises(AssertionError):
        assert_same_tokens_or_near_tie(Traced([1], [0.0]), Traced([2], [0.0]), margin=0)


def test_small_changes_of_logits_matter_only_near_ties():
    """Small changes of logits change tokens only at near ties."""
    rng = np.random.default_rng(13)
    for case in range(60):
        params = SamplingParams(temperature=0.8, top_k=int(rng.choice([0, 20])), top_p=float(rng.choice([1.0, 0.9])),
                                seed=case)
        exact, moved = Traced(), Traced()
        for position in range(20):
            logits = (rng.standard_normal(400) * 2).astype(np.float32)
            row = SampleRow(params, position)
            exact.append(logits, row)
            moved.append((logits + rng.uniform(-0.002, 0.002, 400)).astype(np.float32), row)
        assert_same_tokens_or_near_tie(exact, moved, margin=0.01)
