"""rope_append and paged_attention of decode_core against float64, and their bits against themselves (numpy only)."""

import numpy
import pytest

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from chatlm.worker.kernels.library import _core  # noqa: E402
from instruction_sets import ISAS, some  # noqa: E402
from nightly import by_day  # noqa: E402
from record import agree, exact  # noqa: E402

PAGE = 16
NAN = float("nan")


# ---- bfloat16, which numpy lacks: the wrappers take anything that has data_ptr, as torch's tensors do

class Bfloat16:
    """A bfloat16 CPU array with the attributes of a torch tensor that the wrappers read; `bits` are
    uint16."""

    def __init__(self, bits):
        self.bits, self.shape, self.dtype = bits, bits.shape, "bfloat16"
        self.device = type("Device", (), {"type": "cpu"})

    def data_ptr(self):
        return self.bits.__array_interface__["data"][0]

    def stride(self):
        return tuple(stride // 2 for stride in self.bits.strides)

    def is_contiguous(self):
        return self.bits.flags.c_contiguous


def round_bfloat16(x):
    """float32 -> the bits of the nearest bfloat16, ties to even."""
    u = numpy.asarray(x, numpy.float32).view(numpy.uint32).astype(numpy.uint64)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(numpy.uint16)


def widen_bfloat16(bits):
    return (bits.astype(numpy.uint32) << 16).view(numpy.float32)


def make(kind, values):
    """float32 values as an array of `kind`, and the values of that array in float64."""
    if kind == "bfloat16":
        bits = round_bfloat16(values)
        return Bfloat16(bits), widen_bfloat16(bits).astype(numpy.float64)
    array = values.astype(kind)
    return array, array.astype(numpy.float64)


# ---- a cache, filled slot by slot

class Cache:
    """Pages of one layer; slots that were not written hold NaN."""

    def __init__(self, pages, kv_heads, size, kind="float32", apart=0):
        self.kind, self.size = kind, size
        self.store = numpy.full((pages, kv_heads + apart, 2, PAGE * size), 0x7FC0 if kind == "bfloat16" else NAN,
                                numpy.uint16 if kind == "bfloat16" else kind)[:, :kv_heads]
        self.array = Bfloat16(self.store) if kind == "bfloat16" else self.store

    def keys_values(self):
        """Views: k (P, Hkv, D, 16), v (P, Hkv, 16, D)."""
        P, Hkv = self.store.shape[:2]
        return (self.store[:, :, 0].reshape(P, Hkv, self.size, PAGE), self.store[:, :, 1].reshape(P, Hkv, PAGE, self.size))

    def put(self, pages, k, v):
        """k, v (S, Hkv, D) float32 -> positions 0 .. S - 1 of a sequence with these pages."""
        keys, values = self.keys_values()
        pages, offset = numpy.asarray(pages)[numpy.arange(len(k)) // PAGE], numpy.arange(len(k)) % PAGE
        narrow = round_bfloat16 if self.kind == "bfloat16" else lambda x: x.astype(self.kind)
        keys[pages, :, :, offset], values[pages, :, offset] = narrow(k), narrow(v)

    def get(self, pages, size):
        """-> k, v (size, Hkv, D) float64 as stored."""
        keys, values = self.keys_values()
        pages, offset = numpy.asarray(pages)[numpy.arange(size) // PAGE], numpy.arange(size) % PAGE
        widen = widen_bfloat16 if self.kind == "bfloat16" else lambda x: x
        return (widen(keys[pages, :, :, offset]).astype(numpy.float64), widen(values[pages, :, offset]).astype(numpy.float64))


def attend(q, cache, tables, lengths, starts, *, window=0, softcap=0.0, sinks=None, heads=None, out=None):
    out = numpy.full((len(q), q.shape[1] * q.shape[2]), NAN, numpy.float32) if out is None else out
    plan = compiled.plan_attention(tables, lengths, starts, q.shape[1], cache.store.shape[1], len(cache.store))
    compiled.paged_attention(q, cache.array, plan, out, window=window, softcap=softcap, sinks=sinks)
    return out


def attend_float64(q, k, v, first_position, window, softcap=0.0, sinks=None):
    """q (T, H, D) at positions first_position ..., k and v (S, Hkv, D) -> (T, H * D)."""
    T, H, D = q.shape
    group, out = H // k.shape[1], numpy.empty(q.shape)
    for t in range(T):
        position = first_position + t
        seen = slice(max(0, position + 1 - window) if window > 0 else 0, position + 1)
        for h in range(H):
            score = k[seen, h // group] @ q[t, h].astype(numpy.float64)
            score = softcap * numpy.tanh(score / softcap) if softcap else score
            sink = -numpy.inf if sinks is None else sinks[h].astype(numpy.float64)
            top = max(score.max(), sink)
            weight = numpy.exp(score - top)
            out[t, h] = weight @ v[seen, h // group] / (weight.sum() + numpy.exp(sink - top))
    return out.reshape(T, H * D)


def sequence(rng, cache, length, rows, heads, free):
    """Write a random sequence into pages taken from `free`; returns (pages, q (rows, H, D))."""
    kv_heads, size = cache.store.shape[1], cache.size
    pages = [free.pop() for _ in range(-(-length // PAGE))]
    k, v = rng.standard_normal((2, length, kv_heads, size), numpy.float32)
    cache.put(pages, k, v)
    return pages, rng.standard_normal((rows, heads, size), numpy.float32) * numpy.float32(size**-0.5)


OFFERED = [name for name in _core.offered_isas() if name in ISAS]


@pytest.fixture(params=some(OFFERED))
def isa(request):
    before = _core.isa()
    compiled.set_isa(request.param)
    yield request.param
    compiled.set_isa(before)


@pytest.fixture
def threads():
    before = compiled.get_threads()
    yield compiled.set_threads
    compiled.set_threads(before)


def on_every_isa(run):
    """The results of `run` on each instruction set, in the order of offered_isas."""
    before, results = _core.isa(), []
    for name in OFFERED:
        compiled.set_isa(name)
        results.append(run())
    compiled.set_isa(before)
    return results


def attend_everywhere(*arguments, **options):
    """What attend gives on every instruction set: the same bits."""
    first, *others = on_every_isa(lambda: attend(*arguments, **options))
    for other in others:
        numpy.testing.assert_array_equal(other, first)
    return first


SHAPES = [(9, 3, 64), (32, 8, 128), (16, 1, 80), (7, 1, 256), (4, 4, 16), (5, 1, 48), (1, 1, 64), (12, 1, 96), (6, 3, 112),
          (8, 2, 512), (3, 1, 272)]


# ---- paged_attention: values

KIND_OF_SHAPE = [(kind, *shape) for shape in SHAPES for kind in ("float32", "float16", "bfloat16")]
ONE_KIND_EACH, OTHER_KIND_EACH = ([KIND_OF_SHAPE[3 * number + (number + other) % 3] for number in range(len(SHAPES))] for other in (0, 1))     # by day


@pytest.mark.parametrize("kind, H, Hkv, D", by_day(KIND_OF_SHAPE, *ONE_KIND_EACH))
def test_attention_matches_float64_on_its_cache(kind, H, Hkv, D):
    """Attention is that of float64 on the stored cache."""
    rng = numpy.random.default_rng(D + H)
    for length, rows in ((1, 1), (16, 1), (17, 3), (255, 1), (256, 1), (257, 2), (530, 5)):
        cache = Cache(-(-length // PAGE) + 2, Hkv, D, kind)
        free = rng.permutation(len(cache.store)).tolist()
        pages, q = sequence(rng, cache, length, rows, H, free)
        k, v = cache.get(pages, length)
        out = attend_everywhere(q, cache, [pages], [length], [0, rows])
        numpy.testing.assert_allclose(out, attend_float64(q, k, v, length - rows, 0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("softcap", [0.5, 3.0, 50.0])
def test_capped_scores_match_float64(softcap):
    """Capped scores are those of float64 for decode rows, chunks and windows."""
    rng = numpy.random.default_rng(7)
    cache = Cache(40, 2, 32)
    for window, rows in ((0, 1), (0, 40), (100, 3), (300, 1)):
        pages, q = sequence(rng, cache, 600, rows, 6, rng.permutation(40).tolist())
        q, (k, v) = 4 * q, cache.get(pages, 600)
        out = attend_everywhere(q, cache, [pages], [600], [0, rows], window=window, softcap=softcap)
        numpy.testing.assert_allclose(out, attend_float64(q, k, v, 600 - rows, window, softcap), rtol=0, atol=2e-5)


@pytest.mark.parametrize("scale", [1.0, 30.0])           # 30: a sink takes nearly all, or nothing
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_sinks_take_their_share(softcap, scale):
    """Sinks take their share of decode rows, chunks and windows."""
    rng = numpy.random.default_rng(4)
    cache = Cache(48, 2, 32)
    pages, q = sequence(rng, cache, 600, 40, 6, list(range(48)))
    k, v = cache.get(pages, 600)
    sinks = (rng.standard_normal(6) * scale).astype(numpy.float32)
    for rows, window in ((1, 0), (1, 128), (40, 0), (40, 20)):
        out = attend_everywhere(q[:rows], cache, [pages], [600], [0, rows], window=window, softcap=softcap, sinks=sinks)
        expected = attend_float64(q[:rows], k, v, 600 - rows, window, softcap, sinks)
        numpy.testing.assert_allclose(out, expected, rtol=0, atol=2e-5)
    assert not attend_everywhere(q[:1], cache, [[]], [0], [0, 1], sinks=sinks).any()         # padding


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 255, 256, 257, 300, 599, 600, 601])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_window_counts_the_keys_that_a_row_sees(window, rows):
    rng = numpy.random.default_rng(window)
    cache = Cache(40, 2, 32)
    pages, q = sequence(rng, cache, 600, rows, 6, rng.permutation(40).tolist())
    k, v = cache.get(pages, 600)
    out = attend_everywhere(q, cache, [pages], [600], [0, rows], window=window)
    numpy.testing.assert_allclose(out, attend_float64(q, k, v, 600 - rows, window), rtol=0, atol=1e-5)


def test_no_window_may_be_said_in_two_ways():
    rng = numpy.random.default_rng(0)
    cache = Cache(4, 1, 16)
    pages, q = sequence(rng, cache, 50, 1, 2, [0, 1, 2, 3])
    assert (attend(q, cache, [pages], [50], [0, 1], window=0) == attend(q, cache, [pages], [50], [0, 1], window=-1)).all()


def test_pages_before_the_window_are_not_even_read():
    """Their entries in the table stay, but others may own the pages by now: here they hold NaN."""
    rng = numpy.random.default_rng(0)
    cache = Cache(40, 1, 32)
    pages, q = sequence(rng, cache, 600, 1, 3, list(range(40)))
    before = attend(q, cache, [pages], [600], [0, 1], window=20)
    for page in pages[:(600 - 20) // PAGE]:
        cache.store[page] = NAN
    assert (attend(q, cache, [pages], [600], [0, 1], window=20) == before).all()


def test_large_scores_do_not_overflow():
    rng = numpy.random.default_rng(1)
    cache = Cache(40, 1, 32)
    pages, q = sequence(rng, cache, 600, 2, 3, list(range(40)))
    q *= 1e4
    k, v = cache.get(pages, 600)
    numpy.testing.assert_allclose(attend_everywhere(q, cache, [pages], [600], [0, 2]), attend_float64(q, k, v, 598, 0), atol=2e-3)


# ---- paged_attention: bits

def bits(array):
    return array.view(numpy.uint32)


def a_batch(rng, kind="float16", H=9, Hkv=3, D=64, decode=32, chunks=(40, 7, 260)):
    """32 decode rows and three prompt chunks of different lengths: (cache, tables, lengths, starts, q)."""
    return batch_over(Cache(1200, Hkv, D, kind), sequence, rng, H, decode, chunks, 900)


def batch_over(cache, sequence, rng, H, decode, chunks, longest):
    free = rng.permutation(len(cache.store)).tolist()
    tables, lengths, starts, queries = [], [], [0], []
    for rows in [1] * decode + list(chunks):
        length = int(rng.integers(rows, longest))
        pages, q = sequence(rng, cache, length, rows, H, free)
        tables.append(pages), lengths.append(length), starts.append(starts[-1] + rows), queries.append(q)
    return cache, tables, lengths, starts, numpy.concatenate(queries)


@pytest.mark.parametrize("window", by_day([0, 100], 100))
@pytest.mark.parametrize("kind, H, Hkv, D", by_day([("float16", 9, 3, 64), ("float32", 4, 4, 48), ("bfloat16", 14, 2, 64)], ("float16", 9, 3, 64)))
def test_a_row_s_bits_do_not_depend_on_the_batch(isa, threads, window, kind, H, Hkv, D):
    """The same bits alone, in a batch, in a chunk of a prompt or one by one, on one thread or two."""
    cache, tables, lengths, starts, q = a_batch(numpy.random.default_rng(3), kind, H, Hkv, D)
    together = attend(q, cache, tables, lengths, starts, window=window)
    assert numpy.isfinite(together).all()
    threads(2)
    assert (bits(attend(q, cache, tables, lengths, starts, window=window)) == bits(together)).all()
    for i, table in enumerate(tables):
        for row in range(starts[i], starts[i + 1]):
            length = lengths[i] - (starts[i + 1] - row) + 1
            alone = attend(q[row:row + 1], cache, [table[:-(-length // PAGE)]], [length], [0, 1], window=window)
            assert (bits(alone[0]) == bits(together[row])).all(), (i, row)


def test_chunks_of_a_prompt_may_be_cut_anywhere(isa):
    rng = numpy.random.default_rng(4)
    cache = Cache(40, 1, 64, "float16")
    pages, q = sequence(rng, cache, 600, 600, 3, list(range(40)))
    whole = attend(q, cache, [pages], [600], [0, 600])
    for cuts in ((0, 1, 5, 260, 600), (0, 256, 512, 600), (0, 255, 257, 300, 600)):
        parts = [attend(q[a:b], cache, [pages], [b], [0, b - a]) for a, b in zip(cuts, cuts[1:])]
        assert (bits(numpy.concatenate(parts)) == bits(whole)).all()


@pytest.mark.parametrize("window", by_day([0, 1100], 1100))
def test_rows_beyond_a_cache_have_their_bits_alone(isa, window):
    """Rows that take turns at more keys than a cache holds have the bits of each alone."""
    rng = numpy.random.default_rng(8)
    cache = Cache(90, 1, 512, "float16")
    pages, q = sequence(rng, cache, 1300, 23, 8, [*range(90)])
    together = attend(q, cache, [pages], [1300], [0, 23], window=window)
    assert numpy.isfinite(together).all()
    for row in (0, 4, 5, 11, 22):
        length = 1300 - 22 + row
        alone = attend(q[row:row + 1], cache, [pages[:-(-length // PAGE)]], [length], [0, 1], window=window)
        assert (bits(alone[0]) == bits(together[row])).all(), row


@pytest.mark.parametrize("kind, H, Hkv, D", by_day(KIND_OF_SHAPE, *OTHER_KIND_EACH))
def test_every_instruction_set_gives_the_same_bits(kind, H, Hkv, D):
    rng = numpy.random.default_rng(5)
    cache, tables, lengths, starts, q = a_batch(rng, kind, H, Hkv, D, decode=3, chunks=(20, 3))
    first, *others = on_every_isa(lambda: attend(q, cache, tables, lengths, starts, window=200))
    for other in others:
        assert (bits(first) == bits(other)).all()


def test_pages_in_any_order_give_the_same_bits():
    rng = numpy.random.default_rng(6)
    k, v = rng.standard_normal((2, 300, 2, 32), numpy.float32)
    q = rng.standard_normal((1, 4, 32), numpy.float32)
    outputs = []
    for order in (range(19), rng.permutation(30)[:19]):
        cache = Cache(30, 2, 32)
        cache.put(list(order), k, v)
        outputs.append(attend(q, cache, [[int(page) for page in order]], [300], [0, 1]))
    assert (bits(outputs[0]) == bits(outputs[1])).all()


def test_what_lies_in_unused_slots_does_not_matter(isa):
    """Above, unused slots held NaN. Here they hold infinities and huge numbers, compared with zeros."""
    rng = numpy.random.default_rng(7)
    cache = Cache(60, 3, 64, "float32")
    free = rng.permutation(60).tolist()
    pages, q = sequence(rng, cache, 407, 9, 9, free)
    unused = numpy.isnan(cache.store)
    outputs = []
    for garbage in (NAN, numpy.inf, -numpy.inf, 3e38, 0.0):
        cache.store[unused] = garbage
        outputs.append(bits(attend(q, cache, [pages], [407], [0, 9], window=111)))
    assert all((output == outputs[0]).all() for output in outputs)


def test_a_padding_sequence_gets_zeros():
    rng = numpy.random.default_rng(8)
    cache = Cache(8, 1, 32)
    pages, q = sequence(rng, cache, 40, 1, 2, list(range(8)))
    q = numpy.concatenate([q, q * NAN, q])
    out = attend(q, cache, [pages, [], pages], [40, 0, 40], [0, 1, 2, 3])
    assert (out[1] == 0).all() and (out[0] == out[2]).all() and numpy.isfinite(out).all()


def test_a_step_may_end_in_padding_or_be_only_that(isa):
    cache, rng = Cache(20, 1, 32), numpy.random.default_rng(8)
    pages, q = sequence(rng, cache, 300, 1, 2, list(range(20)))
    for length in (300, 40):                # what is not a number stays where a padding row's sums would be
        attend(numpy.concatenate([q] * 3) * NAN, cache, [pages] * 3, [length] * 3, [0, 1, 2, 3])
    out = attend(numpy.concatenate([q] * 3), cache, [pages, [], []], [300, 0, 0], [0, 1, 2, 3])
    assert (out[1:] == 0).all() and numpy.isfinite(out[0]).all()
    assert (attend(q, cache, [[]], [0], [0, 1]) == 0).all()
    assert attend(q[:0], cache, [], [], [0]).shape == (0, 64)


def test_a_row_with_a_nan_keeps_it_to_itself(isa):
    rng = numpy.random.default_rng(9)
    cache = Cache(40, 3, 64)
    pages, q = sequence(rng, cache, 400, 12, 9, list(range(40)))
    clean = attend(q, cache, [pages], [400], [0, 12])
    # visible to the rows from 395 on
    cache.keys_values()[1][pages[395 // PAGE], :, 395 % PAGE] = NAN
    dirty = attend(q, cache, [pages], [400], [0, 12])
    assert (bits(dirty[:7]) == bits(clean[:7])).all() and numpy.isnan(dirty[7:]).all()


# ---- rope_append

def rope_float64(qkv, cos, sin, positions, H, Hkv, D, norm="none", q_norm=None, k_norm=None, eps=1e-5, post_scale=1.0,
                 value_embed=None, gate=None, gate_scale=1.0):
    """-> q (T, H, D) without its own scale, k, v (T, Hkv, D), all float64."""
    x = qkv.reshape(len(qkv), H + 2 * Hkv, D).astype(numpy.float64).copy()
    qk, v = x[:, :H + Hkv], x[:, H + Hkv:]

    def normalize(qk):
        qk = qk / numpy.sqrt((qk**2).mean(-1, keepdims=True) + eps)
        if q_norm is not None:
            qk[:, :H] *= q_norm
            qk[:, H:] *= k_norm
        return qk

    if norm == "before_rope":
        qk = normalize(qk)
    half = cos.shape[1]
    c, s = cos[positions].astype(numpy.float64)[:, None], sin[positions].astype(numpy.float64)[:, None]
    first, second = slice(0, half), slice(half, 2 * half)
    a, b = qk[..., first].copy(), qk[..., second].copy()
    qk[..., first], qk[..., second] = a * c - b * s, b * c + a * s
    if norm == "after_rope":
        qk = normalize(qk)
    qk = qk * post_scale
    if value_embed is not None:
        v = v + gate_scale / (1 + numpy.exp(-gate))[..., None] * value_embed.reshape(v.shape)
    return qk[:, :H], qk[:, H:], v


ROPES = {
    "llama": {},
    "partial": {"rot": 0.5},
    "a quarter": {"rot": 0.25},
    "qwen3": {"norm": "before_rope", "weights": True, "eps": 1e-6},
    "nanochat": {"norm": "after_rope", "post_scale": 1.2, "values": True, "gate_scale": 3.0},
    "after_rope with weights": {"norm": "after_rope", "weights": True},
    "before_rope without weights": {"norm": "before_rope", "values": True, "gate_scale": 2.0},
}


def rope_case(name, H, Hkv, D, T=21, cache_kind="float32", seed=0):
    """-> (arguments of the call, arguments of the oracle, cache, slots)"""
    options = dict(ROPES[name])
    rng = numpy.random.default_rng(seed)
    rot, weights, values = options.pop("rot", 1), options.pop("weights", False), options.pop("values", False)
    half = max(1, int(D * rot) // 2)
    angles = numpy.outer(numpy.arange(100), 0.7 ** numpy.arange(half))
    cos, sin = numpy.cos(angles).astype(numpy.float32), numpy.sin(angles).astype(numpy.float32)
    cache = Cache(12, Hkv, D, cache_kind)
    slots, positions = rng.permutation(12 * PAGE)[:T].astype(numpy.int64), rng.integers(0, 100, T)
    call, oracle = dict(options, cos=cos, sin=sin, positions=positions), dict(options, cos=cos, sin=sin, positions=positions)
    call["qkv"], oracle["qkv"] = make("float32", rng.standard_normal((T, (H + 2 * Hkv) * D), numpy.float32))
    if weights:
        for which in ("q_norm", "k_norm"):
            call[which] = oracle[which] = rng.uniform(0.5, 2, D).astype(numpy.float32)
    if values:
        call["value_embed"], oracle["value_embed"] = make("float32", rng.standard_normal((T, Hkv * D), numpy.float32))
        call["gate"], oracle["gate"] = make("float32", (rng.standard_normal((T, Hkv), numpy.float32) * 30))
    return call, oracle, cache, slots


def run_rope(call, cache, slots, H, q=None):
    T = len(slots)
    q = numpy.full((T, H, cache.size), NAN, numpy.float32) if q is None else q
    compiled.rope_append(**call, slots=slots, cache=cache.array, q_out=q)
    return q


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("H, Hkv, D", [(9, 3, 64), (4, 2, 16), (7, 1, 80), (3, 1, 128), (2, 2, 256), (2, 1, 512)])
def test_rope_append_is_float64s(isa, name, H, Hkv, D):
    call, oracle, cache, slots = rope_case(name, H, Hkv, D)
    q = run_rope(call, cache, slots, H)
    q64, k64, v64 = rope_float64(**oracle, H=H, Hkv=Hkv, D=D)
    keys, values = cache.keys_values()
    k, v = keys[slots // PAGE, :, :, slots % PAGE], values[slots // PAGE, :, slots % PAGE]
    for ours, exact in ((q, q64 * D**-0.5), (k, k64), (v, v64)):
        numpy.testing.assert_allclose(ours, exact, rtol=0, atol=2e-6 * numpy.abs(exact).max())
    untouched = numpy.ones((12, PAGE), bool)
    untouched[slots // PAGE, slots % PAGE] = False
    assert numpy.isnan(keys.transpose(0, 3, 1, 2)[untouched]).all() and numpy.isnan(values.transpose(0, 2, 1, 3)[untouched]).all()


@pytest.mark.parametrize("D", [64, 128, 512])
def test_values_may_be_made_of_normalized_keys(isa, D):
    """Values may be made of keys, and normalized; without both the pages stay."""
    call, oracle, cache, slots = rope_case("qwen3", 6, 2, D)
    T, (q, k, _) = len(slots), numpy.split(call["qkv"], [6 * D, 8 * D], axis=1)
    whole = run_rope(call | {"qkv": numpy.concatenate([q, k, k], axis=1)}, cache, slots, 6)
    made = Cache(12, 2, D)
    assert (bits(run_rope(call | {"qkv": numpy.concatenate([q, k], axis=1)}, made, slots, 6)) == bits(whole)).all()
    assert made.store.tobytes() == cache.store.tobytes()

    run_rope(call | {"qkv": numpy.concatenate([q, k], axis=1), "value_norm": True}, made, slots, 6)
    wide = k.reshape(T, 2, D).astype(numpy.float64)
    exact = wide / numpy.sqrt((wide**2).mean(-1, keepdims=True) + 1e-6)
    numpy.testing.assert_allclose(made.keys_values()[1][slots // PAGE, :, slots % PAGE], exact, rtol=0, atol=1e-5)
    assert made.keys_values()[0].tobytes() == cache.keys_values()[0].tobytes()

    before = made.store.tobytes()
    alone = {name: value for name, value in call.items() if name != "k_norm"}
    assert (bits(run_rope(alone | {"qkv": q.copy()}, made, slots, 6)) == bits(whole)).all() and made.store.tobytes() == before


def test_pages_lying_apart_give_the_same_bits(isa):
    """Pages that lie apart hold and give the same bits."""
    found = []
    for apart in (0, 3):
        call, _, _, _ = rope_case("llama", 4, 2, 32, T=30)
        cache, slots = Cache(12, 2, 32, apart=apart), numpy.arange(30) + PAGE
        q = run_rope(call | {"positions": numpy.arange(30)}, cache, slots, 4)
        found.append(cache.store.tobytes() + attend(q, cache, [[1, 2]], [30], [0, 30]).tobytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("cache_kind", ["float16", "bfloat16"])
def test_narrow_caches_round_float32_once(isa, cache_kind):
    stored = {}
    for kind in ("float32", cache_kind):
        call, _, cache, slots = rope_case("nanochat", 9, 3, 64, cache_kind=kind)
        run_rope(call, cache, slots, 9)
        stored[kind] = [x[slots // PAGE, :, :, slots % PAGE] if i == 0 else x[slots // PAGE, :, slots % PAGE]
                        for i, x in enumerate(cache.keys_values())]
    for wide, narrow in zip(stored["float32"], stored[cache_kind]):
        expected = round_bfloat16(wide) if cache_kind == "bfloat16" else wide.astype(numpy.float16)
        assert (narrow == expected).all()


def test_every_float16_is_rounded_as_by_numpy(isa):
    """All halves through attention's V (one key: out = v), and floats around every half through rope_append's V."""
    halves = numpy.arange(0x7C01, dtype=numpy.uint16)                           # 0 .. infinity
    halves = numpy.concatenate([halves, halves | 0x8000]).view(numpy.float16)
    finite = halves[numpy.isfinite(halves)]
    padded = numpy.zeros(-(-len(finite) // 256) * 256, numpy.float16)
    padded[:len(finite)] = finite
    rows = padded.reshape(-1, 1, 256)
    cache = Cache(len(rows), 1, 256, "float16")
    for page, row in enumerate(rows):
        cache.put([page], row.reshape(1, 1, 256) * 0, row.reshape(1, 1, 256))
    q = numpy.zeros((len(rows), 1, 256), numpy.float32)
    out = attend(q, cache, [[page] for page in range(len(rows))], [1] * len(rows), list(range(len(rows) + 1)))
    assert (out == rows[:, 0].astype(numpy.float32)).all()

    exact = finite.astype(numpy.float32)
    with numpy.errstate(over="ignore"):
        middle = (exact + numpy.nextafter(finite, numpy.float16(numpy.inf)).astype(numpy.float32)) / 2
        middle = numpy.concatenate([middle, numpy.nextafter(middle, numpy.float32(0)), numpy.nextafter(middle, numpy.float32(1e9))])
        values = numpy.concatenate([exact, middle[numpy.isfinite(middle)], [65519.9, 65520, 1e6, -1e6, 1e-8, 3e-8, 1e-40]])
        values = numpy.resize(values.astype(numpy.float32), (-(-len(values) // 256), 256))
        expected = values.astype(numpy.float16)
    T = len(values)
    cache = Cache(-(-T // PAGE), 1, 256, "float16")
    qkv = numpy.concatenate([values * 0, values * 0, values], axis=1)
    cos, sin = numpy.ones((1, 8), numpy.float32), numpy.zeros((1, 8), numpy.float32)
    compiled.rope_append(qkv, cos, sin, numpy.zeros(T, numpy.int64), numpy.arange(T), cache.array,
                            numpy.empty((T, 1, 256), numpy.float32))
    stored = cache.keys_values()[1].reshape(-1, 256)[:T]
    assert (stored.view(numpy.uint16) == expected.view(numpy.uint16)).all()


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("cache_kind", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("D", [64, 80])
def test_rope_append_has_the_same_bits_everywhere(name, cache_kind, D):
    """rope_append has the same bits on every instruction set."""
    def run():
        call, _, cache, slots = rope_case(name, 6, 2, D, cache_kind=cache_kind)
        return run_rope(call, cache, slots, 6).tobytes() + cache.store.tobytes()
    first, *others = on_every_isa(run)
    assert all(other == first for other in others)


def test_a_fused_multiply_add_rounds_once():
    """q = fma(a, cos, -(b * sin)) where one product lies halfway between two floats and the other decides;
    subnormals too."""
    rng, T = numpy.random.default_rng(10), 4000

    def few_bits(shape, low, high, width):
        return (rng.integers(2**(width - 1), 2**width, shape) | 1) * 2.0**rng.integers(low, high, shape) * rng.choice([-1, 1], shape)

    a, b = few_bits((T, 32), -20, 0, 13), few_bits((T, 32), -90, -30, 13)
    a[::4] *= 2.0**-110                                                         # products around 2**-126
    cos, sin = few_bits((T, 32), -20, 0, 12), few_bits((T, 32), -20, 0, 12)
    qkv = numpy.concatenate([a, b, a, b, a, b], axis=1).astype(numpy.float32)

    def run():
        q = numpy.empty((T, 1, 64), numpy.float32)
        compiled.rope_append(qkv, cos.astype(numpy.float32), sin.astype(numpy.float32), numpy.arange(T), numpy.arange(T) % 16,
                                numpy.zeros((1, 1, 2, PAGE * 64), numpy.float32), q, q_scale=8.0)
        return bits(q)
    results = on_every_isa(run)
    assert all((result == results[0]).all() for result in results)
    naive = (a * cos - b * sin).astype(numpy.float32)                           # rounds twice
    assert (results[0][:, 0, :32] != bits(naive)).sum() > 1000


def test_rope_append_s_rows_are_independent(isa, threads):
    """The rows of rope_append do not depend on each other or on threads."""
    call, _, cache, slots = rope_case("nanochat", 9, 3, 64, T=150, cache_kind="float16")
    q = run_rope(call, cache, slots, 9)
    alone = Cache(12, 3, 64, "float16")
    by_row = [run_rope(dict(call, **{name: call[name][i:i + 1] for name in ("qkv", "positions", "value_embed", "gate")}),
                       alone, slots[i:i + 1], 9) for i in range(150)]
    assert (bits(numpy.concatenate(by_row)) == bits(q)).all() and alone.store.tobytes() == cache.store.tobytes()
    threads(2)
    shared = Cache(12, 3, 64, "float16")
    assert (bits(run_rope(call, shared, slots, 9)) == bits(q)).all() and shared.store.tobytes() == cache.store.tobytes()


def test_a_padding_row_is_left_alone():
    """A padding row is left alone and writes nothing."""
    call, _, cache, slots = rope_case("llama", 4, 2, 32, T=3)
    slots[1], call["positions"][1] = -1, 10**9
    q = run_rope(call, cache, slots, 4)
    assert numpy.isnan(q[1]).all() and numpy.isfinite(q[[0, 2]]).all()
    assert numpy.isfinite(cache.store).sum() == 2 * 2 * 2 * 32


def test_rows_of_qkv_may_lie_apart():
    call, _, cache, slots = rope_case("nanochat", 4, 2, 32)
    q = run_rope(call, cache, slots, 4)
    for name in ("qkv", "value_embed", "gate"):
        wide = numpy.full((len(slots), call[name].shape[1] + 5), NAN, numpy.float32)
        wide[:, :-5] = call[name]
        call[name] = wide[:, :-5]
    again = Cache(12, 2, 32)
    assert (bits(run_rope(call, again, slots, 4)) == bits(q)).all() and again.store.tobytes() == cache.store.tobytes()


def test_what_was_appended_is_what_attention_reads():
    """30 tokens through both ops, one by one and all at once."""
    outputs = []
    for step in (1, 7, 30):
        call, _, cache, _ = rope_case("llama", 4, 2, 32, T=30)
        slots, out = numpy.arange(30) + PAGE, []
        call["positions"] = numpy.arange(30)
        for a in range(0, 30, step):
            b = min(30, a + step)
            part = dict(call, qkv=call["qkv"][a:b], positions=call["positions"][a:b])
            out.append(attend(run_rope(part, cache, slots[a:b], 4), cache, [[1, 2]], [b], [0, b - a]))
        outputs.append(bits(numpy.concatenate(out)))
    assert (outputs[0] == outputs[1]).all() and (outputs[0] == outputs[2]).all()


# ---- wrong calls raise a ValueError that names the argument

def good_rope():
    call, _, cache, slots = rope_case("nanochat", 4, 2, 32, T=5)
    return dict(call, slots=slots, cache=cache.array, q_out=numpy.zeros((5, 4, 32), numpy.float32))


@pytest.mark.parametrize("name, wrong", [
    ("qkv", lambda x: x.astype(numpy.float64)), ("qkv", lambda x: x[:4]), ("qkv", lambda x: x[:, :-1]),
    ("qkv", lambda x: numpy.asfortranarray(x)), ("qkv", lambda x: x.tolist()), ("qkv", lambda x: None),
    ("cos", lambda x: x[:, ::2]), ("cos", lambda x: x[0]), ("cos", lambda x: numpy.zeros((9, 17), numpy.float32)),
    ("sin", lambda x: x[:-1].copy()), ("positions", lambda x: x + 100), ("positions", lambda x: x - 100),
    ("positions", lambda x: x.astype(numpy.int32)), ("positions", lambda x: x[:-1]), ("slots", lambda x: x * 0 - 2),
    ("slots", lambda x: x * 0 + 12 * PAGE), ("slots", lambda x: x[:, None]), ("cache", lambda x: x[:, :, 0]),
    ("cache", lambda x: x[..., ::2]), ("cache", lambda x: x.astype(numpy.float64)), ("cache", lambda x: x[..., :-16].copy()),
    ("q_out", lambda x: x[:, :, :16].copy()), ("q_out", lambda x: x.astype(numpy.float16)), ("q_out", lambda x: x[0]),
    ("norm", lambda x: "sometimes"), ("value_embed", lambda x: x[:, :-1].copy()),
    ("gate", lambda x: x.astype(numpy.float16)), ("gate", lambda x: None), ("k_norm", lambda x: numpy.ones(32, numpy.float32)),
    ("q_norm", lambda x: numpy.ones(31, numpy.float32)),
])
def test_a_wrong_rope_append_names_the_argument(name, wrong):
    call = good_rope()
    compiled.rope_append(**call)
    before = call["cache"].tobytes()
    call[name] = wrong(call.get(name))
    if name == "q_norm":
        call["k_norm"] = numpy.ones(32, numpy.float32)
    with pytest.raises(ValueError, match=f"^{name}: "):
        compiled.rope_append(**call)
    if name not in ("cache",):
        assert call["cache"].tobytes() == before


def test_a_read_only_or_misaligned_array_is_refused():
    call = good_rope()
    call["q_out"].flags.writeable = False
    with pytest.raises(ValueError, match="^q_out: "):
        compiled.rope_append(**call)
    call = good_rope()
    call["cos"] = numpy.frombuffer(b"x" * (call["cos"].nbytes + 1), numpy.uint8)[1:].view(numpy.float32).reshape(call["cos"].shape)
    with pytest.raises(ValueError, match="^cos: "):
        compiled.rope_append(**call)


def test_an_array_on_a_gpu_is_refused():
    call = good_rope()
    call["qkv"] = Bfloat16(round_bfloat16(call["qkv"]))
    call["qkv"].device = type("Device", (), {"type": "cuda"})
    with pytest.raises(ValueError, match="^qkv: must be on the CPU"):
        compiled.rope_append(**call)


@pytest.mark.parametrize("name, changed", [
    ("tables", dict(tables=[[0, 1, 8]])), ("tables", dict(tables=[[0, -1, 2]])), ("tables", dict(tables=[[0, 1]])),
    ("tables", dict(tables=[[0, 1, 2], [3]])), ("tables", dict(tables=[["a", 1, 2]])), ("tables", dict(tables=[[0, 1, 2**40]])),
    ("tables", dict(tables=((0, 1, 2),))), ("tables", dict(tables=[0, 1, 2])), ("tables", dict(tables=[[0, 1.5, 2]])),
    ("lengths", dict(lengths=[2], starts=[0, 3])), ("lengths", dict(lengths=["x"])), ("lengths", dict(lengths=None)),
    ("starts", dict(starts=[0])), ("starts", dict(starts=[1, 2])), ("starts", dict(starts=[0, -1])),
    ("heads", dict(heads=5)), ("heads", dict(heads=34)), ("heads", dict(heads=0)),
])
def test_a_wrong_plan_names_the_argument(name, changed):
    good = dict(tables=[[0, 1, 2]], lengths=[40], starts=[0, 1], heads=4, kv_heads=2, num_pages=8)
    compiled.plan_attention(**good)
    with pytest.raises(ValueError, match=f"^{name}: "):
        compiled.plan_attention(**(good | changed))


@pytest.mark.parametrize("name, wrong", [
    ("q", lambda x: x.astype(numpy.float16)), ("q", lambda x: x[:, :2].copy()), ("q", lambda x: x[..., :16].copy()),
    ("q", lambda x: numpy.concatenate([x, x])), ("q", lambda x: x[:, ::-1]), ("cache", lambda x: x[:-1].copy()),
    ("cache", lambda x: x[:, :1].copy()), ("plan", lambda x: None), ("out", lambda x: x.astype(numpy.float16)),
    ("out", lambda x: x[:, :-1]), ("window", lambda x: -2), ("softcap", lambda x: -1.0),
    ("sinks", lambda x: numpy.zeros(3, numpy.float32)),
])
def test_a_wrong_paged_attention_names_the_argument(name, wrong):
    call = dict(q=numpy.zeros((1, 4, 32), numpy.float32), cache=numpy.zeros((8, 2, 2, 16 * 32), numpy.float32),
                plan=compiled.plan_attention([[0, 1, 2]], [40], [0, 1], 4, 2, 8), out=numpy.zeros((1, 128), numpy.float32),
                window=0, softcap=0.0, sinks=None)
    compiled.paged_attention(**call)
    with pytest.raises(ValueError, match=f"^{name}: "):
        compiled.paged_attention(**(call | {name: wrong(call[name])}))


# ---- pages of the type q8_0: keys and values turned, of 8 bits with a scale for each 32

BLOCK = 32
PACKED_SHAPES = [(9, 3, 64), (32, 8, 128), (7, 1, 256), (4, 2, 32), (16, 1, 64), (2, 1, 512)]


def turned(heads):
    """Heads (.., D) times the normalized Hadamard matrix, float64, by the definition: (-1) to the bits in common."""
    D = heads.shape[-1]
    places = numpy.arange(D)
    common = (places[:, None] & places)[..., None] >> numpy.arange(10) & 1
    return heads.astype(numpy.float64) @ (-1.0) ** common.sum(-1) / D**0.5


def rounded(heads):
    """Codes (.., D), and scales (.., D / 32), of turned heads."""
    blocks = heads.reshape(*heads.shape[:-1], -1, BLOCK)
    scales = (numpy.abs(blocks).max(-1) / 127).astype(numpy.float16).astype(numpy.float64)
    with numpy.errstate(divide="ignore", invalid="ignore"):
        codes = numpy.where(scales[..., None] > 0, numpy.rint(blocks / scales[..., None]), 0).clip(-127, 127)
    return codes.reshape(heads.shape), scales


def rounded_queries(q):
    """q (.., D) float32 as attention reads it, in its arithmetic: another would round one near a tie the other way."""
    blocks = q.reshape(*q.shape[:-1], -1, BLOCK)
    largest = numpy.abs(blocks).max(-1, keepdims=True)
    codes = numpy.rint(blocks * (numpy.float32(127) / largest))
    return (codes.astype(numpy.float64) * (largest / numpy.float32(127))).reshape(q.shape)


def values_of(codes, scales):
    return codes * numpy.repeat(scales, BLOCK, axis=-1)


class PackedCache:
    """Pages of one layer; the scales of slots that were not written are no numbers, their codes anything."""

    def __init__(self, pages, kv_heads, size):
        self.size = size
        self.store = self.array = numpy.random.default_rng(0).integers(0, 256, (pages, kv_heads, 2, 17 * size), numpy.uint8)
        for part in (0, 1):
            self.scales(part)[:] = NAN

    def scales(self, part):
        """(P, Hkv, D / 32, 16) float16, a view."""
        P, Hkv = self.store.shape[:2]
        return self.store[:, :, part, PAGE * self.size:].view(numpy.float16).reshape(P, Hkv, -1, PAGE)

    def codes(self, part):
        """Those of k (P, Hkv, D / 4, 16, 4), + 128, or of v (P, Hkv, 16, D) as bytes, a view."""
        P, Hkv = self.store.shape[:2]
        shape = (P, Hkv, PAGE, self.size) if part else (P, Hkv, self.size // 4, PAGE, 4)
        return self.store[:, :, part, :PAGE * self.size].reshape(shape)

    def put(self, pages, k, v):
        """Turned k, v (S, Hkv, D) -> positions 0 .. S - 1 of a sequence with these pages."""
        pages, offset = numpy.asarray(pages)[numpy.arange(len(k)) // PAGE], numpy.arange(len(k)) % PAGE
        for part, heads in enumerate((k, v)):
            codes, scales = rounded(heads)
            self.scales(part)[pages, :, :, offset] = scales
            if part:
                self.codes(1)[pages, :, offset] = codes.astype(numpy.int8).view(numpy.uint8)
            else:
                self.codes(0)[pages, :, :, offset] = (codes + 128).astype(numpy.uint8).reshape(*codes.shape[:2], -1, 4)

    def get(self, slots):
        """Turned k, v (S, Hkv, D) float64 as kept in these slots."""
        pages, offset = slots // PAGE, slots % PAGE
        k = self.codes(0)[pages, :, :, offset].astype(numpy.float64).reshape(len(slots), -1, self.size) - 128
        v = self.codes(1)[pages, :, offset].view(numpy.int8).astype(numpy.float64)
        return (values_of(codes, self.scales(part)[pages, :, :, offset].astype(numpy.float64)) for part, codes in enumerate((k, v)))


def packed_sequence(rng, cache, length, rows, heads, free):
    """Write a random sequence into pages taken from `free`; returns (pages, turned q (rows, H, D))."""
    kv_heads, size = cache.store.shape[1], cache.size
    pages = [free.pop() for _ in range(-(-length // PAGE))]
    k, v = rng.standard_normal((2, length, kv_heads, size), numpy.float32)
    cache.put(pages, turned(k), turned(v))
    return pages, rng.standard_normal((rows, heads, size), numpy.float32) * numpy.float32(size**-0.5)


def expected_packed(q, cache, pages, length, window=0, softcap=0.0, sinks=None):
    """By the definition, on what is kept and on queries that are rounded by 32 as well."""
    k, v = cache.get(numpy.concatenate([page * PAGE + numpy.arange(PAGE) for page in pages])[:length])
    out = attend_float64(rounded_queries(q), k, v, length - len(q), window, softcap, sinks)
    return turned(out.reshape(q.shape)).reshape(out.shape)


@pytest.mark.parametrize("H, Hkv, D", PACKED_SHAPES)
def test_packed_attention_matches_float64(H, Hkv, D):
    """Packed attention is that of float64 on what is kept."""
    rng = numpy.random.default_rng(D + H)
    sinks = rng.standard_normal(H).astype(numpy.float32)
    for length, rows, options in ((1, 1, {}), (16, 1, {}), (17, 3, {}), (257, 2, {}), (530, 5, {"window": 100}), (530, 5, {"window": 7}),
                                  (300, 40, {"softcap": 3.0}), (300, 1, {"sinks": sinks, "window": 128})):
        cache = PackedCache(-(-length // PAGE) + 2, Hkv, D)
        pages, q = packed_sequence(rng, cache, length, rows, H, rng.permutation(len(cache.store)).tolist())
        out = attend_everywhere(q, cache, [pages], [length], [0, rows], **options)
        numpy.testing.assert_allclose(out, expected_packed(q, cache, pages, length, **options), rtol=0, atol=1e-5)


def packed_batch(rng, H=9, Hkv=3, D=64, decode=20, chunks=(40, 7, 260)):
    return batch_over(PackedCache(900, Hkv, D), packed_sequence, rng, H, decode, chunks, 600)


@pytest.mark.parametrize("window", by_day([0, 100], 0))
def test_packed_pages_keep_a_row_s_bits(isa, threads, window):
    """A row's bits depend on nothing else in the batch."""
    cache, tables, lengths, starts, q = packed_batch(numpy.random.default_rng(3))
    together = attend(q, cache, tables, lengths, starts, window=window)
    assert numpy.isfinite(together).all()
    threads(2)
    assert (bits(attend(q, cache, tables, lengths, starts, window=window)) == bits(together)).all()
    for i, table in enumerate(tables):
        for row in range(starts[i], starts[i + 1]):
            length = lengths[i] - (starts[i + 1] - row) + 1
            alone = attend(q[row:row + 1], cache, [table[:-(-length // PAGE)]], [length], [0, 1], window=window)
            assert (bits(alone[0]) == bits(together[row])).all(), (i, row)


@pytest.mark.parametrize("H, Hkv, D", PACKED_SHAPES)
def test_packed_pages_give_the_same_bits_everywhere(H, Hkv, D):
    """Every instruction set gives the same bits over packed pages."""
    cache, tables, lengths, starts, q = packed_batch(numpy.random.default_rng(5), H, Hkv, D, decode=3, chunks=(20, 3))
    first, *others = on_every_isa(lambda: attend(q, cache, tables, lengths, starts, window=200))
    assert numpy.isfinite(first).all() and all((bits(first) == bits(other)).all() for other in others)


def test_unused_packed_slots_do_not_matter(isa):
    """What lies in unused packed slots does not matter, and a NaN stays in the rows that see it."""
    rng = numpy.random.default_rng(7)
    cache = PackedCache(60, 3, 64)
    pages, q = packed_sequence(rng, cache, 407, 9, 9, rng.permutation(60).tolist())
    unused = [numpy.isnan(cache.scales(part)) for part in (0, 1)]
    outputs = []
    for garbage in (NAN, numpy.inf, 6e4, 0.0):
        for part in (0, 1):
            cache.scales(part)[unused[part]] = garbage
        outputs.append(attend(q, cache, [pages], [407], [0, 9], window=111))
    assert all((bits(output) == bits(outputs[0])).all() for output in outputs)
    cache.scales(1)[pages[400 // PAGE], :, :, 400 % PAGE] = NAN           # visible to the last seven rows
    dirty = attend(q, cache, [pages], [407], [0, 9], window=111)
    assert (bits(dirty[:2]) == bits(outputs[0][:2])).all() and numpy.isnan(dirty[2:]).all()


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("H, Hkv, D", [(9, 3, 64), (3, 1, 128), (2, 2, 32)])
def test_rope_append_keeps_heads_to_half_a_step(isa, name, H, Hkv, D):
    """rope_append keeps turned heads to half a step of their scale."""
    call, oracle, _, slots = rope_case(name, H, Hkv, D)
    call["qkv"][0] = oracle["qkv"][0] = 0                                # a head of zeros has a scale of 0
    cache = PackedCache(12, Hkv, D)
    before = cache.store.copy()
    q = run_rope(call, cache, slots, H)
    q64, k64, v64 = rope_float64(**oracle, H=H, Hkv=Hkv, D=D)
    numpy.testing.assert_allclose(q, turned(q64) * D**-0.5, rtol=0, atol=2e-6 * numpy.abs(q64).max())
    for kept, exact in zip(cache.get(slots), (turned(k64), turned(v64))):
        scales = numpy.repeat(rounded(exact)[1], BLOCK, axis=-1)
        assert (numpy.abs(kept - exact) <= 0.57 * scales + 1e-6).all()      # a float16 scale is up to 2^-11 too small: 127 / 2048 steps
    others = numpy.setdiff1d(numpy.arange(12 * PAGE), slots)
    for part in (0, 1):
        untouched = PackedCache(12, Hkv, D)
        untouched.store[:] = before
        index = (others // PAGE, slice(None), slice(None), others % PAGE)
        assert (cache.scales(part).view(numpy.uint16)[index] == untouched.scales(part).view(numpy.uint16)[index]).all()
    assert (cache.codes(1)[others // PAGE, :, others % PAGE] == untouched.codes(1)[others // PAGE, :, others % PAGE]).all()
    assert (cache.codes(0)[others // PAGE, :, :, others % PAGE] == untouched.codes(0)[others // PAGE, :, :, others % PAGE]).all()


@pytest.mark.parametrize("name", ROPES)
def test_every_instruction_set_keeps_the_same_bytes(name):
    def run():
        call, _, _, slots = rope_case(name, 9, 3, 64)
        cache = PackedCache(12, 3, 64)
        return run_rope(call, cache, slots, 9), cache.store

    (q, store), *others = on_every_isa(run)
    assert all((bits(q) == bits(other)).all() and (store == its).all() for other, its in others)


@pytest.mark.parametrize("size", [16, 48, 80, 1024])
def test_a_head_that_cannot_be_turned_is_an_error(size):
    cache = numpy.zeros((4, 1, 2, 17 * size), numpy.uint8)
    with pytest.raises(ValueError, match="a power of two from 32 to 512"):
        compiled.paged_attention(numpy.zeros((1, 1, size), numpy.float32), cache, compiled.plan_attention([[0]], [1], [0, 1], 1, 1, 4),
                                    numpy.zeros((1, size), numpy.float32))


# ---- on every machine

ON_RECORD = [(kind, *shape) for kind in ("float32", "float16", "bfloat16", "q8_0") for shape in ((9, 3, 64), (4, 2, 128), (7, 1, 32))]


@pytest.mark.parametrize("kind, H, Hkv, D", by_day(ON_RECORD, *ON_RECORD[::4], ON_RECORD[-1]))        # each kind and each shape
def test_attention_has_the_bits_of_record(isa, kind, H, Hkv, D):
    """Attention and its cache have the bits of record."""
    generator, T, pages = exact(H), 300, list(range(19))[::-1]
    normal = lambda *shape: generator.standard_normal(shape, numpy.float32)
    cache = PackedCache(20, Hkv, D) if kind == "q8_0" else Cache(20, Hkv, D, kind)
    cache.store[:] = 0
    positions, q = numpy.arange(T), numpy.full((T, H, D), NAN, numpy.float32)
    compiled.rope_append(normal(T, (H + 2 * Hkv) * D), normal(T, D // 2), normal(T, D // 2), positions, slots=numpy.take(pages, positions // PAGE) * PAGE + positions % PAGE,
                            cache=cache.array, q_out=q, norm="before_rope", q_norm=normal(D), k_norm=normal(D))
    made = [attend(q[-rows:], cache, [pages], [T], [0, rows], **options)
            for rows, options in ((1, {}), (2, {"window": 70}), (7, {"softcap": 2.0}), (40, {"sinks": normal(H)}))]
    agree(f"attention {kind} {H} {Hkv} {D}", q, cache.store, *made)
