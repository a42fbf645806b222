"""Answers whose draws only the host has: equal alone, in a batch with others, with drafts and without."""

import pytest

from chatlm.common.messages.requests import SamplingParams
from engines import make_engine, run, tokens_of
from works import assignment

ON_HOST = {"dry": dict(dry_multiplier=2.0, dry_penalty_last_n=-1),
           "xtc": dict(xtc_probability=0.5), "typical": dict(typical_p=0.5), "sigma": dict(top_n_sigma=1.0)}


@pytest.fixture
def gen5(nanochat_fixtures):
    return make_engine(nanochat_fixtures / "gen5", num_pages=300)


def works(**changes):
    """An answer with each of them, between answers of compiled samplers, all from a text that repeats itself."""
    settings = ON_HOST | {"plain": {}, "greedy": dict(temperature=0.0), "counted": dict(repetition_penalty=1.2)}
    return [assignment(name, (9, *range(30, 40)) * 4, SamplingParams(**(dict(seed=i, temperature=0.9) | params | changes)), 40, ignore_eos=True)
            for i, (name, params) in enumerate(settings.items())]


def test_host_draws_are_the_same_in_any_batch(gen5):
    """Answers are the same alone, in a batch, with drafts and by the reference."""
    if not gen5.kernels.row_invariant:
        pytest.skip("the reference ops are not row-invariant")
    asked = works()
    together = tokens_of(gen5, asked)
    assert len({tuple(tokens) for tokens in together.values()}) == len(asked), "one of them has no effect"
    for drafts in (False, True):
        gen5.drafts = drafts
        for work in asked:
            gen5.pool.forget_cached()
            assert tokens_of(gen5, [work])[work.id] == together[work.id], (work.id, drafts)
    gen5.pool.forget_cached()
    assert run(gen5, asked).tokens == together


def test_a_step_without_such_a_row_is_compiled(gen5):
    forward, seen = gen5.runner.forward, []
    gen5.runner.forward = lambda batch: seen.append(batch) or forward(batch)
    tokens_of(gen5, [work for work in works() if work.id not in ON_HOST])
    assert not seen
    tokens_of(gen5, works())
    assert seen
