"""Compares answers where a row's logits depend on the batch in their last bits."""

from dataclasses import dataclass, field

import numpy

from chatlm.worker.ops.sampling import clean_logits, gumbel, penalize, sample_reference, survivors, uniform_noise


@dataclass
class Traced:
    """An answer and how close the draw of each token was, in units of logit / T + noise."""

    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def append(self, logits, row) -> int:
        """Draw a token from logits (V,) as the engine would, and record the gap."""
        token = int(sample_reference(logits[None], [row])[0])
        self.tokens.append(token)
        self.gaps.append(draw_gap(logits, row))
        return token


def draw_gap(logits, row) -> float:
    """The smallest change of z + noise that would draw another token: the least of the lead over the
    runner-up, the winner's distance from being filtered out, and the distance by which filtered ids that
    would have won missed."""
    params = row.params
    logits = penalize(clean_logits(logits), row)
    if params.temperature <= 0:
        second, first = numpy.partition(logits, -2)[-2:]
        return float(first - second)
    ids, z = survivors(logits, params)
    everything = numpy.arange(len(logits))
    all_z = (logits - logits.max()) / params.temperature
    noise = gumbel(uniform_noise(everything, params.seed, row.position, params.choice))
    scores = z + noise[ids]
    order = numpy.argsort(scores)
    winner = order[-1]
    dropped = numpy.delete(everything, ids)
    gaps = [float(scores[winner] - scores[order[-2]])] if len(ids) > 1 else []
    if len(dropped):
        gaps.append(float(z[winner] - all_z[dropped].max()))
        rivals = dropped[(all_z + noise)[dropped] > scores[winner]]
        gaps.append(float(z.min() - all_z[rivals].max()) if len(rivals) else numpy.inf)
    return min(gaps, default=numpy.inf)


def assert_same_tokens_or_near_tie(a, b, margin: float) -> None:
    """Assert that `a` and `b` (anything with `tokens` and `gaps`) agree, or first differ where the draw was a
    near tie.

    With margin 0 the tokens must be equal.
    """
    first = next((i for i, (x, y) in enumerate(zip(a.tokens, b.tokens)) if x != y), None)
    if first is None:
        assert len(a.tokens) == len(b.tokens), f"one answer ends after {min(len(a.tokens), len(b.tokens))} tokens"
        return
    gap = min(a.gaps[first], b.gaps[first])
    assert gap < margin, (f"token {first} differs ({a.tokens[first]} and {b.tokens[first]}) with a gap of {gap:.4f}, "
                          f"not below the margin of {margin}")
