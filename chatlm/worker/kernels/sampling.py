"""sample: one token for each row of logits. Only this module turns a row's parameters into what the kernels
read.

`sample_reference` is the definition. On equal logits the tokens are equal.
"""

import math

import numpy

from chatlm.worker.kernels.arrays import look_at, vector
from chatlm.worker.kernels.library import _core

ROW = numpy.dtype([  # struct SampleRow of csrc/contract.h
    ("seed", "u8"), ("position", "i8"), ("top_p", "u8"), ("inverse_temperature", "f4"), ("min_z", "f4"),
    ("top_k", "i4"), ("choice", "u4"), ("repetition", "f4"), ("inverse_repetition", "f4"),
    ("frequency", "f4"), ("presence", "f4"), ("count_begin", "i4"), ("count_end", "i4"), ("bias_begin", "i4"),
    ("bias_end", "i4")
])
EXP_CUTOFF = -27.7
FLOAT_MAX = 3.4028234663852886e38
MAX_VOCABULARY = 2**27      # sums of weights stay below 2^63 and offsets within 32 bits


def _require(holds, name: str, value, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name}: must be {wanted}, not {value!r}")


def _record(params, where: str, vocab_size: int) -> tuple:
    """A row's fields of ROW, except its position and lists, which come later."""
    def field(name, holds, wanted):
        value = getattr(params, name)
        _require(holds(value), f"{where}.params.{name}", value, wanted)
        return value

    temperature = field("temperature", lambda t: not math.isnan(t), "a number")
    top_p = field("top_p", lambda p: not math.isnan(p), "a number")
    min_p = field("min_p", lambda p: not math.isnan(p), "a number")
    repetition = field("repetition_penalty", lambda r: 0 < r < math.inf, "a positive number")
    frequency = field("frequency_penalty", math.isfinite, "a finite number")
    presence = field("presence_penalty", math.isfinite, "a finite number")
    seed = field("seed", lambda s: 0 <= s < 2**64, "in [0, 2^64)")
    choice = field("choice", lambda c: 0 <= c < 2**32, "in [0, 2^32)")
    top_p_of_32_bits = 1 << 32 if top_p >= 1 else round(max(top_p, 0.0) * 2**32)
    inverse_temperature = min(1 / temperature, FLOAT_MAX) if temperature > 0 else -1.0
    min_z = max(math.log(min(min_p, 1.0)), EXP_CUTOFF) if min_p > 0 else EXP_CUTOFF
    top_k = min(max(params.top_k, 0), vocab_size)
    return (seed, 0, top_p_of_32_bits, inverse_temperature, min_z, top_k, choice,
            repetition, 1 / repetition, frequency, presence, 0, 0, 0, 0)


def _address(array) -> int:
    return array.__array_interface__["data"][0]


class SampleBatch:
    """The rows of a batch as the kernels read them. It serves step after step while the same requests are
    decoded.

    rows    each like SampleRow:
            params          temperature, top_k, top_p, min_p, presence_penalty, frequency_penalty,
                            repetition_penalty, logit_bias ((id, value), ...), seed and choice; they do not
                            change afterwards
            position        absolute index of the token; below 0 the row draws none
            tokens          prompt and answer, a list
            prompt_tokens   how many of them are the prompt's
    records, count_ids, counts, bias_ids, bias_values    numpy arrays, described in csrc/contract.h and
    csrc/ops.h
    """

    def __init__(self, rows, vocab_size: int):
        _require(0 < vocab_size <= MAX_VOCABULARY, "vocab_size", vocab_size, f"in 1..{MAX_VOCABULARY}")
        self.vocab_size = vocab_size
        self.params = [row.params for row in rows]
        with numpy.errstate(over="ignore"):             # 1 / a tiny repetition penalty is infinite
            self.records = numpy.array(
                [_record(p, f"rows[{i}]", vocab_size) for i, p in enumerate(self.params)], ROW)
        self.positions = self.records["position"]
        # stable: equal ids keep their order
        biases = [sorted(p.logit_bias, key=lambda pair: pair[0]) for p in self.params]
        for i, pairs in enumerate(biases):
            _require(not pairs or 0 <= pairs[0][0] and pairs[-1][0] < vocab_size,
                     f"rows[{i}].params.logit_bias", pairs, f"of ids in [0, {vocab_size})")
        flat = [pair for pairs in biases for pair in pairs]
        self.bias_ids = numpy.array([token for token, _ in flat], numpy.int32)
        with numpy.errstate(over="ignore"):
            self.bias_values = numpy.array([value for _, value in flat], numpy.float32)
        ends = numpy.cumsum([len(pairs) for pairs in biases], dtype=numpy.int64)
        self.records["bias_end"] = ends
        self.records["bias_begin"][1:] = ends[:-1]
        self.penalized = [
            p.repetition_penalty != 1 or bool(p.frequency_penalty or p.presence_penalty) for p in self.params
        ]
        self.any_penalized = any(self.penalized)
        self.count_ids = self.counts = numpy.zeros(0, numpy.int32)
        self.tokens = numpy.zeros(len(self.params), numpy.int32)
        self._count_begins = self.records["count_begin"]
        self._count_ends = self.records["count_end"]
        self._addresses = tuple(
            map(_address,
                (self.records, self.count_ids, self.counts, self.bias_ids, self.bias_values, self.tokens)))
        self.update(rows)

    def update(self, rows) -> None:
        """Take from the same rows what their next step needs: positions, and what the penalties count."""
        try:
            self.positions[:] = [row.position for row in rows]
        except (OverflowError, TypeError, ValueError):
            raise ValueError(
                f"rows: must be {len(self.params)} rows with positions in [-2^63, 2^63)") from None
        if self.any_penalized:
            lists = [(row.tokens if penalized else [], row.prompt_tokens)
                     for row, penalized in zip(rows, self.penalized)]
            ends, ids, counts = _core.count_tokens(lists, self.vocab_size)
            self._count_ends[:] = ends
            self._count_begins[1:] = ends[:-1]
            self.count_ids = numpy.frombuffer(ids, numpy.int32)
            self.counts = numpy.frombuffer(counts, numpy.int32)
            records, _, _, *others = self._addresses
            self._addresses = records, _address(self.count_ids), _address(self.counts), *others

    def is_of(self, rows) -> bool:
        """Do these rows have the parameters of this batch, in the same order?"""
        return len(rows) == len(self.params) and all(row.params is params
                                                     for row, params in zip(rows, self.params))


def batch_of(rows, vocab_size: int, last: SampleBatch | None) -> SampleBatch | None:
    """The SampleBatch of these rows, or None without rows. If `last` has the same requests, it is updated and
    returned."""
    if not rows:
        return None
    if last is None or last.vocab_size != vocab_size or not last.is_of(rows):
        return SampleBatch(rows, vocab_size)
    last.update(rows)
    return last


def sample(logits, batch: SampleBatch, tokens=None):
    """logits (B, V) float32, rows may be apart -> tokens (B,) int32. Without `tokens`, the batch's own array
    gets them."""
    address, _, (rows, columns), stride = look_at("logits", logits, ("float32",), len(batch.params),
                                                  batch.vocab_size, rows_apart=True)
    records, count_ids, counts, bias_ids, bias_values, batch_tokens = batch._addresses
    if tokens is None:
        tokens = batch.tokens
        tokens_at = batch_tokens
    else:
        tokens_at = vector("tokens", tokens, "int32", rows, writable=True)
    _core.sample(address, rows, columns, stride, records, count_ids, counts, bias_ids, bias_values, tokens_at)
    return tokens


class Sampler:
    """`sample` kernel: (logits (B, V), rows) -> list of tokens. It keeps its batch while the
    same requests are decoded."""

    def __init__(self):
        self.batch = None

    def __call__(self, logits, rows) -> list[int]:
        self.batch = batch_of(rows, int(logits.shape[1]), self.batch)
        return sample(logits, self.batch).tolist() if self.batch else []
