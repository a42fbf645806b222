"""The reference of sampling, which compiled samplers match bit for bit.

Order: repetition, frequency and presence penalties, bias -> temperature -> top-k -> top-p over what top-k
kept -> min-p -> one draw. Between these come steps that no compiled sampler has (`ON_HOST`). Rows that need
one of them are drawn here.

Precision: logits, penalties and z = (l - max) * (1/T) are float32. Weights e^z are fixed-point integers, 2^40
at the maximum. They are summed in uint64, so the order of the sum does not matter. Noise and z + noise are
float64. Each multiplication and addition is rounded separately (no fma), and no exp or log of a library is
used."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence as Seq
from typing import Any, NamedTuple, TYPE_CHECKING

import numpy

if TYPE_CHECKING:
    from chatlm.common.messages.requests import SamplingParams
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.worker.ops.rows import SampleRow


EXP_CUTOFF = -27.7            # below this z the weight is 0 and the id is dropped
LOG2_E = 1.44269504088896341  # as float32
LN2_HIGH = 0.693359375        # as float32; n * LN2_HIGH is exact for n up to 40
LN2_LOW = -2.12194440e-4      # as float32
EXP_TERMS = tuple(1 / math.factorial(k) for k in range(7, -1, -1))  # as float32, highest power first
LN2 = 0.6931471805599453      # float64, as are the constants below
SQRT_HALF = 0.7071067811865476
LOG_TERMS = (  # (log(1 + t) / t - 1) / t on [sqrt(1/2) - 1, sqrt(2) - 1], highest power first
    0.03081756372437806, -0.06618773009678613, 0.07000691047584312, -0.0630658816887405, 0.06495252735766224,
    -0.07112464720648483, 0.0770509701696896, -0.08336500776029371, 0.09090397053862845, -0.09999843911504927,
    0.111111220155228, -0.12500003956286007, 0.14285714172623884, -0.16666666618490816, 0.20000000000466495,
    -0.2500000000022147, 0.3333333333333285, -0.49999999999999833)
# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
FLOAT_MAX = 3.4028234663852886e38
LOG_FLOAT_MAX = 88.7228391
XTC_LANE = 2**34 - 4  # the noise of this id decides whether XTC acts; no token has the id


def philox(counters: Iterable[numpy.ndarray], keys: Iterable[numpy.ndarray]) -> numpy.ndarray:
    """Philox4x32-10: four counters, two keys -> (4, *shape) random words. All are 32-bit words in uint64."""
    low = numpy.uint64(0xFFFFFFFF)
    shift = numpy.uint64(32)
    m0, m1 = (numpy.uint64(m) for m in PHILOX_MULTIPLIERS)
    c0, c1, c2, c3 = counters
    k0, k1 = keys
    for _ in range(10):
        product0 = c0 * m0
        product1 = c2 * m1
        c0 = (product1 >> shift) ^ c1 ^ k0
        c1 = product1 & low
        c2 = (product0 >> shift) ^ c3 ^ k1
        c3 = product0 & low
        k0 = (k0 + numpy.uint64(PHILOX_KEY_STEPS[0])) & low
        k1 = (k1 + numpy.uint64(PHILOX_KEY_STEPS[1])) & low
    return numpy.stack((c0, c1, c2, c3))


def uniform_noise(ids, seed, position, choice) -> numpy.ndarray:
    """u = (x + 1/2) / 2^32 in (0, 1), float64, for each id.

    seed, position and choice are numbers, or arrays that broadcast with ids. x is word id % 4 of Philox, with
    the seed as key and (id / 4, position, choice) as counter. So there is random access and no state."""
    low = numpy.uint64(0xFFFFFFFF)
    shift = numpy.uint64(32)
    seed, position, choice = (numpy.asarray(value, dtype=numpy.uint64) for value in (seed, position, choice))
    groups = (ids // 4).astype(numpy.uint64)
    lanes = ids % 4
    words = philox((groups, position & low, position >> shift, choice), (seed & low, seed >> shift))
    x = numpy.take_along_axis(words, lanes[None], axis=0)[0]
    return (x.astype(numpy.float64) + 0.5) * 2.0**-32


def log_contract(x: numpy.ndarray) -> numpy.ndarray:
    """Natural logarithm of positive float64, using only * and + (relative error below 1e-15)."""
    mantissa, exponent = numpy.frexp(x)  # [1/2, 1)
    small = mantissa < SQRT_HALF
    t = numpy.where(small, mantissa + mantissa, mantissa) - 1.0
    series = numpy.full_like(t, LOG_TERMS[0])
    for term in LOG_TERMS[1:]:
        series = series * t + term
    return (exponent - small) * LN2 + (t + (t * t) * series)


def gumbel(u: numpy.ndarray) -> numpy.ndarray:
    """-log(-log(1 - u)). With 1 - u, the steps of u are finest where the noise is large (up to 22.9)."""
    return -log_contract(-log_contract(1.0 - u))


def exp_weights(z: numpy.ndarray) -> numpy.ndarray:
    """e^z of float32 z <= 0 as uint64, in fixed point with 1 = 2^40. Below EXP_CUTOFF it is 0."""
    f32 = numpy.float32
    alive = z >= f32(EXP_CUTOFF)
    z = numpy.where(alive, z, f32(0))
    n = numpy.floor(z * f32(LOG2_E) + f32(0.5))  # z = n ln 2 + r
    r = (z - n * f32(LN2_HIGH)) - n * f32(LN2_LOW)
    series = numpy.full_like(r, f32(EXP_TERMS[0]))
    for term in EXP_TERMS[1:]:
        series = series * r + f32(term)
    mantissa = (series * f32(2**24)).astype(numpy.uint64)  # exact: series >= 1/2 has steps of 2^-24
    shift = n.astype(numpy.int64) + 16  # -24 .. 16
    weight = ((mantissa << numpy.maximum(shift, 0).astype(numpy.uint64))
              >> numpy.maximum(-shift, 0).astype(numpy.uint64))
    return numpy.where(alive, weight, numpy.uint64(0))


def clean_logits(row: numpy.ndarray) -> numpy.ndarray:
    """NaN -> -inf, +inf -> the largest float. A row with neither is returned itself."""
    top = row.max()
    if math.isfinite(top) or top == -math.inf:
        return row
    return numpy.minimum(numpy.where(numpy.isnan(row), numpy.float32(-math.inf), row),
                         numpy.float32(FLOAT_MAX))


def penalize(logits: numpy.ndarray, row: SampleRow) -> numpy.ndarray:
    """Apply penalties and bias in float32, each rounded. The logits are copied if anything changes.

    Repetition applies to tokens of prompt and answer: positive logits * (1/r), others * r. Then frequency *
    count and presence are subtracted for tokens of the answer. Then the bias is added."""
    p = row.params
    f32 = numpy.float32
    steps = host_steps(p, PENALTY)
    if not (p.logit_bias or p.frequency_penalty or p.presence_penalty or p.repetition_penalty != 1 or steps):
        return logits
    logits = logits.copy()
    with numpy.errstate(over="ignore", invalid="ignore"):  # clean_logits repairs overflow at the end
        if p.repetition_penalty != 1.0:
            ids = numpy.unique(numpy.asarray(row.tokens, dtype=numpy.int64))
            old = logits[ids]
            logits[ids] = numpy.where(old > 0, old * f32(1 / p.repetition_penalty),
                                      old * f32(p.repetition_penalty))
        if p.frequency_penalty or p.presence_penalty:
            answer = numpy.asarray(row.tokens[row.prompt_tokens:], dtype=numpy.int64)
            ids, counts = numpy.unique(answer, return_counts=True)
            logits[ids] -= f32(p.frequency_penalty) * counts.astype(f32)
            logits[ids] -= f32(p.presence_penalty)
        for token, bias in p.logit_bias:  # one by one, because ids may repeat
            logits[token] += f32(bias)
        for step in steps:
            step(logits, row)
    return clean_logits(logits)


# The part of the draw after which a step of ON_HOST comes
PENALTY = "penalty"
VOCABULARY = "vocabulary"
TOP_K = "top-k"
MIN_P = "min-p"


class HostStep(NamedTuple):
    """A part of the draw that compiled samplers lack.

    After PENALTY, a function (logits (V,), row) changes the logits of a row in place. Others say which tokens
    stay: (logits (N,), params, position) -> (N,) bool, at least one of them. Of equal logits the lower id
    comes first. The probability of a token means that at temperature 1 among the N, as in llama.cpp."""

    after: str
    acts: Callable[[SamplingParams], object]
    function: Callable[..., Any]
    # (params, tokenizer, tokens so far) -> SampleRow.kept; it runs in a thread, because it may take 0.1 s
    prepare: Callable[..., Any] | None = None


def host_steps(params: SamplingParams, after: str) -> list[Callable]:
    return [step.function for step in ON_HOST if step.after == after and step.acts(params)]


def drawn_on_host(params: SamplingParams) -> bool:
    """Does the draw need a step that compiled samplers lack?"""
    return any(step.acts(params) for step in ON_HOST)


def preparation(params: SamplingParams) -> Callable[..., Any] | None:
    """The function that makes SampleRow.kept; None if the draws do not need it."""
    return next((step.prepare for step in ON_HOST if step.prepare and step.acts(params)), None)


def in_order(values: numpy.ndarray) -> float:
    """The sum, added one number after the other. Unlike numpy's `sum` it has the same bits everywhere."""
    return float(numpy.cumsum(values)[-1])


def probability_weights(logits: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray, int]:
    """z (float32) and weights (uint64) at temperature 1, and the sum of the weights, which stands for 1."""
    with numpy.errstate(over="ignore"):
        z = logits - logits.max()
    weights = exp_weights(z)
    return z, weights, int(weights.sum())


def keep_typical(logits: numpy.ndarray, params: SamplingParams, position: int) -> numpy.ndarray:
    """Locally typical sampling (Meister et al., 2022): keep the tokens whose surprise is nearest to the
    entropy, until their probabilities add up to more than typical_p.

    |-log p - H| is |z - E[z]|, because both terms have the same log of the sum. Of a tie the likelier token
    comes first, then the lower id."""
    z, weights, total = probability_weights(logits)
    alive = numpy.flatnonzero(weights)
    alive = alive[numpy.argsort(-logits[alive], kind="stable")]
    z = z[alive].astype(numpy.float64)
    weights = weights[alive]
    mean = in_order(z * weights.astype(numpy.float64)) / total
    order = numpy.argsort(numpy.abs(z - mean), kind="stable")
    most = numpy.uint64(total * round(params.typical_p * 2**32) >> 32)  # exact, as in keep_top_p
    count = int(numpy.searchsorted(numpy.cumsum(weights[order]), most, side="right")) + 1
    keep = numpy.zeros(len(logits), dtype=bool)
    keep[alive[order[:count]]] = True
    return keep


def keep_top_n_sigma(logits: numpy.ndarray, params: SamplingParams, position: int) -> numpy.ndarray:
    """Keep logits that are at most n standard deviations below the largest (Tang et al., "Top-nsigma: not all
    logits are you need", 2024). The deviation is that of the logits that are not -inf."""
    possible = logits[logits > -math.inf].astype(numpy.float64)
    mean = in_order(possible) / len(possible)
    deviation = math.sqrt(in_order((possible - mean) ** 2) / len(possible))
    return logits >= possible.max() - params.top_n_sigma * deviation


def keep_xtc(logits: numpy.ndarray, params: SamplingParams, position: int) -> numpy.ndarray:
    """Exclude top choices (by p-e-w, 2024).

    With xtc_probability, the tokens of at least xtc_threshold are left out, except the least likely of
    them."""
    keep = numpy.ones(len(logits), dtype=bool)
    (chance,) = uniform_noise(numpy.array([XTC_LANE]), params.seed, position, params.choice)
    if chance > params.xtc_probability:
        return keep
    _, weights, total = probability_weights(logits)
    least = -(-total * round(params.xtc_threshold * 2**32) >> 32)  # rounded up; exact
    top = numpy.flatnonzero(weights >= numpy.uint64(least))
    keep[top[numpy.argsort(-logits[top], kind="stable")][:-1]] = False
    return keep


class Breakers:
    """The tokens past which no repetition goes in DRY.

    They are tokens whose text contains a breaker, and heads that are followed by their tail: a head ends with
    the beginning of a breaker, and the tail is the tokens of the rest. As in llama.cpp a tail is cut to 20
    tokens, and the names of special tokens are text too.

    With 49,152 tokens, llama.cpp's four breakers take 17 ms. 64 of the longest take 0.7 s and 1 MB."""

    MOST_TAIL = 20

    def __init__(self, tokenizer: Tokenizer | None, breakers: Seq[str]):
        self.alone = numpy.zeros(1 + (tokenizer.vocab_size if tokenizer else 0), dtype=bool)
        self.heads: dict[tuple[int, ...], numpy.ndarray] = {}  # tail -> ids, ascending
        if tokenizer:
            self._add(tokenizer, breakers)
        self.tails = 0, *sorted({len(tail) for tail in self.heads})  # their lengths

    def _add(self, tokenizer: Tokenizer, breakers: Seq[str]):
        words = [tokenizer.shown_bytes(token) for token in range(tokenizer.vocab_size)]
        ends = numpy.cumsum([len(word) for word in words])
        text = numpy.frombuffer(b"".join(words), numpy.uint8)
        for breaker in filter(None, map(str.encode, breakers)):
            found = numpy.flatnonzero(text[:max(0, len(text) - len(breaker) + 1)] == breaker[0])
            for i, byte in enumerate(breaker[1:], 1):
                found = found[text[found + i] == byte]
            owners = numpy.searchsorted(ends, found, side="right")
            whole = owners[found + len(breaker) <= ends[owners]]
            self.alone[whole] = True
            for i in range(1, len(breaker)):
                heads = numpy.setdiff1d(self._ending_with(breaker[:i], ends, text), whole)
                if len(heads) and (tail := self._tail(breaker[i:], tokenizer)):
                    heads = numpy.union1d(self.heads.get(tail, heads), heads)
                    self.heads[tail] = heads.astype(numpy.int32)

    def _ending_with(self, part: bytes, ends: numpy.ndarray, text: numpy.ndarray) -> numpy.ndarray:
        found = numpy.flatnonzero(numpy.diff(ends, prepend=0) >= len(part))
        for i, byte in enumerate(reversed(part), 1):
            found = found[text[ends[found] - i] == byte]
        return found

    def _tail(self, rest: bytes, tokenizer: Tokenizer) -> tuple[int, ...]:
        try:
            tokens = tokenizer.encode(rest.decode(), False)
        except UnicodeDecodeError:  # the rest begins inside a character
            tokens = [tokenizer.byte_tokens.get(byte, -1) for byte in rest]
        return tuple(tokens[:self.MOST_TAIL])

    def are_alone(self, ids: numpy.ndarray) -> numpy.ndarray:
        """Is each of these tokens a breaker by itself?"""
        return self.alone[numpy.minimum(ids, len(self.alone) - 1)]  # the last one is for ids without a token

    def include(self, ids: numpy.ndarray) -> bool:
        """Are these tokens, a head and its tail, a breaker?"""
        if len(ids) == 1:
            return bool(self.are_alone(ids)[0])
        head, *tail = ids.tolist()
        heads = self.heads.get(tuple(tail), ids[:0])
        return head in heads[numpy.searchsorted(heads, head):][:1]


breakers_of = functools.lru_cache(maxsize=16)(Breakers)


def suffix_matches(tokens: Seq[int]) -> list[int]:
    """For each index, how many tokens up to it equal the last ones of all (Z-algorithm, linear)."""
    back = tokens[::-1]
    count = len(tokens)
    lengths = [0] * count
    left = 0
    right = 0
    for k in range(1, count):
        length = min(right - k, lengths[k - left]) if k < right else 0
        if k + length >= right:
            while k + length < count and back[length] == back[k + length]:
                length += 1
            left = k
            right = k + length
        lengths[k] = length
    return lengths[::-1]


class Repetition:
    """Where the end of a text occurs earlier in the text. It is updated token by token.

    However the text repeats itself, a token costs one pass of numpy over the window: at most 1.4 ms for
    100,000 tokens. To read such a text for the first time takes 30 ms."""

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None = None, tokens: Seq[int] = ()):
        self.window = params.dry_penalty_last_n if params.dry_penalty_last_n >= 0 else 2**31
        self.breakers = breakers_of(tokenizer, params.dry_sequence_breakers)
        self._read(tokens)

    def _read(self, tokens: Seq[int]):
        self.count = len(tokens)
        first = max(0, self.count - self.window)
        self.ids, self.matches = numpy.zeros((2, self.count + 256), dtype=numpy.int32)
        self.ids[:self.count] = tokens
        self.matches[first:self.count] = suffix_matches(tokens[first:])
        self.broken = None  # of the last breaker: (index of its head, length of its tail)
        for index in range(self.count - 1, first - 1, -1):
            self._look_for_breakers(index, self.count - index)
            if self.broken:
                break

    def _look_for_breakers(self, head: int, count: int):
        """Note a breaker whose head is this index and that fits in so many tokens."""
        for tail in self.breakers.tails:
            if tail < count and self.breakers.include(self.ids[head:head + tail + 1]):
                self.broken = max(self.broken or (head, tail), (head, tail))

    def update(self, tokens: Seq[int]):
        """Take these tokens, which mostly begin with those of the last call."""
        last = self.count - 1
        if not 0 <= last < len(tokens) or self.ids[last] != tokens[last] or len(tokens) - last > 256:
            return self._read(tokens)
        for token in tokens[self.count:]:
            n = self.count
            first = max(1, self.count + 1 - self.window)
            if n == len(self.ids):
                self.ids = numpy.concatenate((self.ids, self.ids))  # room for as many again
                self.matches = numpy.concatenate((self.matches, self.matches))
            longer = self.matches[first - 1:n - 1] + 1
            self.matches[first:n] = longer * (self.ids[first:n] == token)
            self.matches[0] = self.ids[0] == token
            self.ids[n] = token
            self.count = n + 1
            for tail in self.breakers.tails:
                if tail <= n and self.breakers.include(self.ids[n - tail:n + 1]):
                    self.broken = max(self.broken or (0, 0), (n - tail, tail))

    def continuations(self, allowed: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(ids that would continue a repetition of at least `allowed` tokens, the longest length of each).

        Tokens that are breakers continue none."""
        size = min(self.count, self.window)
        ids = self.ids[:self.count]
        first = self.count - size
        longest = size
        if self.broken and self.broken[0] >= first:
            longest = self.count - 1 - sum(self.broken)
        if size <= allowed or longest < allowed:
            return ids[:0], ids[:0]
        lengths = numpy.minimum(self.matches[first:self.count - 1], numpy.arange(1, size, dtype=numpy.int32))
        repeats = numpy.flatnonzero(lengths >= allowed)
        following = ids[first + 1:][repeats]
        lengths = numpy.minimum(lengths[repeats], longest)
        best = numpy.full(following.max(initial=0) + 1, -1, dtype=numpy.int32)
        numpy.maximum.at(best, following, lengths)
        found = numpy.flatnonzero(best >= 0)
        found = found[~self.breakers.are_alone(found)]
        return found, best[found]


def penalize_repetition(logits: numpy.ndarray, row: SampleRow):
    """DRY, "don't repeat yourself" (by p-e-w, 2024): a token that would continue a repetition of n tokens
    loses dry_multiplier * dry_base ** (n - dry_allowed_length)."""
    p = row.params
    repetition = row.kept or Repetition(row.params, None, row.tokens)
    repetition.update(row.tokens)
    ids, lengths = repetition.continuations(p.dry_allowed_length)
    exponents = lengths.astype(numpy.int64) - p.dry_allowed_length
    if p.dry_base > 1.000001:  # as in llama.cpp
        exponents = numpy.minimum(exponents, int(LOG_FLOAT_MAX / math.log(p.dry_base)))
    powers = numpy.ones(len(ids))
    square = p.dry_base
    while exponents.any():  # by squaring: a library's pow differs from machine to machine
        powers = numpy.where(exponents & 1, powers * square, powers)
        square = min(square * square, FLOAT_MAX)
        exponents = exponents >> 1
    logits[ids] -= numpy.minimum(p.dry_multiplier * powers, FLOAT_MAX).astype(numpy.float32)


ON_HOST = (
    HostStep(PENALTY, lambda p: p.dry_multiplier > 0 and p.dry_penalty_last_n, penalize_repetition,
             Repetition),
    HostStep(VOCABULARY, lambda p: p.top_n_sigma > 0, keep_top_n_sigma),
    HostStep(TOP_K, lambda p: p.typical_p < 1, keep_typical),
    HostStep(MIN_P, lambda p: p.xtc_probability > 0 and p.xtc_threshold <= 0.5, keep_xtc),
)


def top_ids(logits: numpy.ndarray, k: int) -> numpy.ndarray:
    """The ids of the k largest logits, largest first. The lower id wins a tie, so exactly k remain."""
    bound = numpy.partition(logits, len(logits) - k)[len(logits) - k] if k < len(logits) else -math.inf
    ids = numpy.flatnonzero(logits >= bound)
    return ids[numpy.argsort(-logits[ids], kind="stable")[:k]]


def survivors(logits: numpy.ndarray, params: SamplingParams, position: int = 0) -> tuple[
        numpy.ndarray, numpy.ndarray]:
    """The ids that top-k, top-p, min-p and the steps of ON_HOST keep, ascending, and their z (float32).

    `logits` are cleaned and penalized already. Position and seed decide for a step that acts only
    sometimes."""
    f32 = numpy.float32
    top = logits.max()
    if top == -math.inf:
        return numpy.zeros(1, dtype=numpy.int64), numpy.zeros(1, dtype=f32)
    inverse_temperature = f32(1)
    if params.temperature > 0:
        inverse_temperature = f32(min(1 / params.temperature, FLOAT_MAX))
    for step in host_steps(params, VOCABULARY):
        logits = numpy.where(step(logits, params, position), logits, f32(-math.inf))
    limited = 0 < params.top_k < len(logits)
    ids = top_ids(logits, params.top_k) if limited else numpy.arange(len(logits))
    for step in host_steps(params, TOP_K):
        ids = ids[step(logits[ids], params, position)]
        top = logits[ids].max()
    with numpy.errstate(over="ignore"):  # z may be -inf far below the maximum
        z = (logits[ids] - top) * inverse_temperature
    weights = exp_weights(z)
    if params.top_p < 1.0:
        ids, z, weights = keep_top_p(ids, z, weights, params.top_p, logits)
    keep = weights > 0
    if params.min_p > 0:
        keep &= z >= f32(math.log(min(params.min_p, 1.0)))
    ids = ids[keep]
    z = z[keep]
    for step in host_steps(params, MIN_P):
        keep = step(logits[ids], params, position)
        ids = ids[keep]
        z = z[keep]
    order = numpy.argsort(ids)
    return ids[order], z[order]


def keep_top_p(ids, z, weights, top_p, logits):
    """The shortest prefix, in the order of logits and then ids, whose weights reach top_p of the sum."""
    total = int(weights.sum())
    target = max(1, total * round(top_p * 2**32) >> 32)  # exact; the product may need 128 bits
    # together, all lighter ids weigh less than what may be dropped
    heavy = weights >= max(1, -(-(total - target) // len(ids)))
    ids = ids[heavy]
    z = z[heavy]
    weights = weights[heavy]
    order = numpy.lexsort((ids, -logits[ids]))
    count = int(numpy.searchsorted(numpy.cumsum(weights[order]), numpy.uint64(target))) + 1
    order = order[:count]
    return ids[order], z[order], weights[order]


def draw(kept: Seq[tuple], rows: Seq[SampleRow]) -> numpy.ndarray:
    """The argmax of z + Gumbel noise over each row's survivors (ids, z). Ids ascend: lower ones win ties."""
    longest = max(len(ids) for ids, _ in kept)
    ids = numpy.zeros((len(rows), longest), dtype=numpy.int64)
    z = numpy.full((len(rows), longest), -math.inf)
    for i, (row_ids, row_z) in enumerate(kept):
        ids[i, :len(row_ids)] = row_ids
        z[i, :len(row_ids)] = row_z
    streams = numpy.array([(row.params.seed, row.position, row.params.choice) for row in rows],
                          dtype=numpy.uint64)
    scores = z + gumbel(uniform_noise(ids, *streams.T[:, :, None]))  # (R, longest)
    return ids[numpy.arange(len(rows)), scores.argmax(axis=1)]


def sample_reference(logits: numpy.ndarray, rows: Seq[SampleRow]) -> numpy.ndarray:
    """A token for each row of logits (B, V) float32 -> (B,) int32. Each token depends on its row alone."""
    tokens = numpy.zeros(len(rows), dtype=numpy.int32)
    few = {}  # rows with few survivors are drawn together, because calls of numpy cost more than arithmetic
    for i, row in enumerate(rows):
        line = penalize(clean_logits(logits[i]), row)
        greedy = row.params.temperature <= 0
        if greedy and not drawn_on_host(row.params):
            tokens[i] = line.argmax()
            continue
        kept = survivors(line, row.params, row.position)
        ids, _ = kept
        if greedy:
            tokens[i] = ids[line[ids].argmax()]  # the lower id wins a tie
        elif len(ids) > 1000:
            tokens[i] = draw([kept], [row])[0]
        else:
            few[i] = kept
    if few:
        tokens[list(few)] = draw(list(few.values()), [rows[i] for i in few])
    return tokens


def sample_on_host(logits, rows: Seq[SampleRow]) -> list[int]:
    """`sample_reference` for logits (R, V): an array, or a tensor on any device."""
    lines = logits if isinstance(logits, numpy.ndarray) else logits.float().cpu().numpy()
    return sample_reference(lines, rows).tolist()


def sample_each(sample: Callable, logits, rows: Seq[SampleRow]) -> list[int]:
    """The tokens of rows of logits (R, V). `sample` draws them, except rows that it cannot draw."""
    apart = [i for i, row in enumerate(rows) if drawn_on_host(row.params)]
    if not apart:
        return sample(logits, rows)
    others = [i for i in range(len(rows)) if i not in apart]
    tokens = dict(zip(apart, sample_on_host(logits[apart], [rows[i] for i in apart])))
    if others:
        tokens |= zip(others, sample(logits[others], [rows[i] for i in others]))
    return [tokens[i] for i in range(len(rows))]
