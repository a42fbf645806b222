"""The CUDA kernels: compiled by nvcc where there is one, and run against their oracles in the host emulation."""

import ctypes
import importlib.util
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import chat_server as cs
from chat_server import SampleRow, SamplingParams

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ASCENDING, DESCENDING, RANDOM = 0, 1, 2
NO_LOGIT = np.float32(-np.inf)

specification = importlib.util.spec_from_file_location("decode_core_cuda", CSRC / "decode_core" / "cuda.py")
wrappers = importlib.util.module_from_spec(specification)       # without the compiled half, which may not be here
specification.loader.exec_module(wrappers)


class Emulation:
    """The entry points of csrc/cuda/launch.h as functions of integers and floats; a message raises."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))
        self.threads = 1024             # of a sampling block: any number must give the same tokens

    def __getattr__(self, name):
        function = self.library[f"dc_{name}"]
        if name in ("cuda_devices", "cuda_current_device"):
            return lambda: int(function())
        function.restype = ctypes.c_char_p

        def call(*values):
            if name == "cuda_sample":
                values = (*values[:-2], self.threads, values[-1])
            kinds = (ctypes.c_double(v) if isinstance(v, float) else ctypes.c_int64(v) for v in values)
            return (message := function(*kinds)) and message.decode()
        return call

    def order(self, order, seed=0):
        """In which order blocks and threads run from now on."""
        self.library.dc_emulation_order(ctypes.c_int64(order), ctypes.c_int64(seed))


class Tensor:
    """A numpy array as the wrappers see a torch CUDA tensor; bfloat16 lies in uint16."""

    is_cuda, requires_grad = True, False
    device = SimpleNamespace(type="cuda", index=0)

    def __init__(self, array, dtype=None):
        self.array, self.shape, self.dtype = array, array.shape, dtype or f"torch.{array.dtype}"

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def data_ptr(self):
        return self.array.__array_interface__["data"][0]


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    subprocess.run(["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall",
                    "-Wextra", "-Werror", str(CSRC / "cuda" / "emulation.cpp"), "-o", str(library)], check=True, timeout=170)
    return Emulation(library)


# --- sample ------------------------------------------------------------------------------------------------------

ROW = np.dtype([
    ("seed", "u8"), ("position", "i8"), ("top_p", "u8"), ("inverse_temperature", "f4"), ("min_z", "f4"), ("top_k", "i4"),
    ("choice", "u4"), ("repetition", "f4"), ("inverse_repetition", "f4"), ("frequency", "f4"), ("presence", "f4"),
    ("count_begin", "i4"), ("count_end", "i4"), ("bias_begin", "i4"), ("bias_end", "i4")])


def pack_rows(rows):
    """SampleRows as dc::SampleRow[] and its lists."""
    packed, count_ids, counts, bias_ids, biases = np.zeros(len(rows), ROW), [], [], [], []
    for i, (p, position, tokens, prompt_tokens) in enumerate(rows):
        begin = len(count_ids), len(bias_ids)
        if p.repetition_penalty != 1 or p.frequency_penalty or p.presence_penalty:
            answer = list(tokens[prompt_tokens:])
            distinct = sorted(set(tokens) if p.repetition_penalty != 1 else set(answer))
            count_ids += distinct
            counts += [answer.count(token) for token in distinct]
        for token, bias in sorted(p.logit_bias):
            bias_ids.append(token)
            biases.append(bias)
        packed[i] = (p.seed, position, round(p.top_p * 2**32),
                     min(1 / p.temperature, cs.FLOAT_MAX) if p.temperature > 0 else -1,
                     max(np.log(np.float64(min(p.min_p, 1))) if p.min_p > 0 else -np.inf, cs.EXP_CUTOFF), p.top_k, p.choice,
                     p.repetition_penalty, 1 / p.repetition_penalty, p.frequency_penalty, p.presence_penalty,
                     begin[0], len(count_ids), begin[1], len(bias_ids))
    as_array = [np.array(values or [0], kind) for values, kind in zip((count_ids, counts, bias_ids, biases), "iiif")]
    return packed, as_array, bool(count_ids or bias_ids)


def emulated_tokens(emulation, logits, rows, threads=1024, logprobs=None, dtype=None, gap=0):
    """sample_reference by the CUDA kernel's text; leaves `logits` as they are. Rows lie `gap` elements apart."""
    wide = np.full((len(logits), logits.shape[1] + gap), 99, logits.dtype)
    wide[:, gap // 2:][:, :logits.shape[1]] = logits
    packed, lists, changes = pack_rows(rows)
    tokens = Tensor(np.full(len(rows), -7, np.int32))
    names = ("count_ids", "counts", "bias_ids", "bias_values")
    emulation.threads = threads
    wrappers.CudaOps(emulation).sample(
        Tensor(wide[:, gap // 2:][:, :logits.shape[1]], dtype), Tensor(packed.view(np.uint8)), tokens, logprobs=logprobs, stream=0,
        **(dict(zip(names, map(Tensor, lists))) if changes else {}))
    return tokens.array


def random_rows(rng, count, vocabulary):
    """Rows over every mix of switches, most near an edge."""
    choose = lambda *options: options[rng.integers(len(options))]
    rows = []
    for _ in range(count):
        tokens = tuple(rng.integers(0, vocabulary, rng.integers(1, 30)).tolist())
        penalized = rng.random() < 0.3
        rows.append(SampleRow(SamplingParams(
            temperature=choose(0.0, 1e-6, 0.3, 0.8, 1.0, 1.7, 100.0), seed=int(rng.integers(2**63)) * 2 + 1,
            top_k=int(choose(0, 0, 1, 2, 50, 1024, 1500, vocabulary - 1, vocabulary, vocabulary + 1)),
            top_p=float(choose(1.0, 1.0, 0.0, 0.1, 0.5, 0.9, 0.95, 1 - 2**-32)),
            min_p=float(choose(0.0, 0.0, 0.0, 0.02, 0.5, 1.0)), choice=int(rng.integers(4)),
            repetition_penalty=choose(1.0, 1.3, 0.7) if penalized else 1.0,
            frequency_penalty=choose(0.0, 0.4, -0.4) if penalized else 0.0,
            presence_penalty=choose(0.0, 0.6, -2.0) if penalized else 0.0,
            logit_bias=choose((), ((tokens[0], 3.5), (0, -100.0))) if penalized else (),
        ), int(choose(0, 1, 77, 2**31, 2**32 + 5, rng.integers(2**40))), tokens, int(rng.integers(len(tokens)))))
    return rows


def random_logits(rng, count, vocabulary):
    """Rows of every kind: spread, coarse (many ties), equal, sparse, extreme, with NaN and infinities."""
    logits = rng.normal(0, rng.choice([0.01, 1, 3, 30], (count, 1)), (count, vocabulary)).astype(np.float32)
    for row, kind in zip(logits, rng.integers(12, size=count)):
        if kind == 0:
            row[:] = np.round(row)
        elif kind == 1:
            row[:] = rng.choice([0.0, -0.0, 1.5])
        elif kind == 2:
            row[:] = NO_LOGIT
            row[rng.integers(vocabulary)] = 1.0 if rng.random() < 0.8 else NO_LOGIT
        elif kind == 3:
            row *= np.float32(1e30)
        elif kind == 4:
            row[rng.integers(vocabulary, size=5)] = rng.choice([np.nan, np.inf, -np.inf, 1e30, -1e30], 5)
        elif kind == 5:
            row[:] = rng.permutation(vocabulary) % 7
        elif kind == 6:
            row[rng.random(vocabulary) < 0.9] = NO_LOGIT
    return logits


@pytest.mark.parametrize("vocabulary, count, threads", [
    (1, 40, 32), (2, 60, 32), (31, 400, 32), (257, 1200, 64), (1000, 1200, 128), (1024, 300, 1024), (3001, 600, 256),
    (5000, 300, 1024), (20011, 60, 1024), (49152, 24, 1024), (262144, 4, 1024)])
def test_the_sampling_kernel_draws_the_references_tokens(emulation, vocabulary, count, threads):
    rng = np.random.default_rng(vocabulary)
    logits, rows = random_logits(rng, count, vocabulary), random_rows(rng, count, vocabulary)
    expected = cs.sample_reference(logits, rows)
    for order in (ASCENDING, DESCENDING, RANDOM):
        emulation.order(order, vocabulary)
        assert emulated_tokens(emulation, logits, rows, threads).tolist() == expected.tolist()


def test_tokens_ignore_the_row_index_the_batch_and_how_far_rows_lie_apart(emulation):
    rng = np.random.default_rng(3)
    logits, rows = random_logits(rng, 12, 1001), random_rows(rng, 12, 1001)
    expected = cs.sample_reference(logits, rows).tolist()
    for order, gap in (([11, 3, 7], 3), ([5], 2), (list(range(12)), 203)):
        got = emulated_tokens(emulation, logits[order], [rows[i] for i in order], gap=gap)
        assert got.tolist() == [expected[i] for i in order]


def test_a_row_without_a_position_gets_no_token_and_disturbs_nobody(emulation):
    rng = np.random.default_rng(4)
    logits, rows = random_logits(rng, 3, 500), random_rows(rng, 3, 500)
    expected = cs.sample_reference(logits, rows).tolist()
    idle = rows[1]._replace(position=-1)
    assert emulated_tokens(emulation, logits, [rows[0], idle, rows[2]]).tolist() == [expected[0], -1, expected[2]]


def test_bfloat16_logits_draw_what_their_exact_widening_draws(emulation):
    rng = np.random.default_rng(5)
    bits = random_logits(rng, 60, 3000).view(np.uint32) >> 16
    wide = (bits << 16).astype(np.uint32).view(np.float32)
    rows = [row._replace(params=replace(row.params, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0,
                                        logit_bias=())) for row in random_rows(rng, 60, 3000)]
    assert (emulated_tokens(emulation, bits.astype(np.uint16), rows, dtype="torch.bfloat16").tolist()
            == cs.sample_reference(wide, rows).tolist())


def test_biases_of_one_id_add_up_in_order_and_overflowing_penalties_are_cleaned(emulation):
    logits = np.zeros((3, 40), np.float32)
    logits[1, 5] = np.inf
    logits[2, 7] = 3e38
    rows = [SampleRow(SamplingParams(temperature=0, logit_bias=((3, 1e8), (3, 1.0), (3, -1e8), (4, 0.5))), 0),
            SampleRow(SamplingParams(temperature=0, logit_bias=((5, -3e38), (6, 3e37))), 0),
            SampleRow(SamplingParams(temperature=0, repetition_penalty=0.1, logit_bias=((7, -1e38), (8, 3.4e38))), 0, (7, 9))]
    assert emulated_tokens(emulation, logits, rows).tolist() == cs.sample_reference(logits, rows).tolist() == [4, 5, 7]


def test_logprobs_are_the_log_softmax_of_the_token(emulation):
    rng = np.random.default_rng(6)
    logits = rng.normal(0, 3, (20, 2000)).astype(np.float32)
    logits[3] = NO_LOGIT
    rows = random_rows(rng, 20, 2000)
    got = Tensor(np.empty(20, np.float32))
    tokens = emulated_tokens(emulation, logits, rows, logprobs=got)
    for i, (row, token) in enumerate(zip(rows, tokens)):
        x = cs.penalize(logits[i], row).astype(np.float64)
        expected = x[token] - x.max() - np.log(np.exp(x - x.max()).sum()) if x.max() > NO_LOGIT else NO_LOGIT
        assert got.array[i] == pytest.approx(expected, abs=2e-5)


# --- rope_append -------------------------------------------------------------------------------------------------

STORED = {"torch.float32": np.float32, "torch.float16": np.float16, "torch.bfloat16": np.uint16}
STEP = {"torch.float32": 2.0**-23, "torch.float16": 2.0**-10, "torch.bfloat16": 2.0**-7}     # of a value just above 1


def narrow(x, dtype):
    """float -> the nearest value of `dtype` as its array (bfloat16 in uint16, ties to even)."""
    if dtype != "torch.bfloat16":
        return x.astype(STORED[dtype])
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(array, dtype):
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "torch.bfloat16" else array.astype(np.float32)


def cache_views(num_pages, kv_heads, size, dtype, slot_major):
    """K and V pages (P, Hkv, 16, D) filled with NaN: two tensors, or two views of a slot-major one."""
    filler = 0x7FC1 if dtype == "torch.bfloat16" else np.nan
    if slot_major:
        whole = np.full((num_pages, 16, 2, kv_heads, size), filler, STORED[dtype])
        return [Tensor(whole[:, :, i].transpose(0, 2, 1, 3), dtype) for i in (0, 1)]
    return [Tensor(np.full((num_pages, kv_heads, 16, size), filler, STORED[dtype]), dtype) for _ in range(2)]


def rope_oracle(x, cos, sin, norm, weight, eps, interleaved, direction):
    """One head (D,) in float64."""
    def normalized(y):
        return y / np.sqrt((y * y).mean() + eps) * (1 if weight is None else weight)

    x = normalized(x) if norm == "before_rope" else x.copy()
    half = len(cos)
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    a, b = x[first].copy(), x[second].copy()
    x[first], x[second] = a * cos - b * sin * direction, b * cos + a * sin * direction
    return normalized(x) if norm == "after_rope" else x


@pytest.mark.parametrize("heads, kv_heads, size, rot, qkv_type, cache_type, norm, weighted, interleaved, direction, embed, slot_major", [
    (9, 3, 64, 64, "torch.float32", "torch.float16", "none", False, True, 1, False, False),
    (4, 2, 128, 128, "torch.bfloat16", "torch.bfloat16", "before_rope", True, False, 1, False, True),
    (6, 6, 128, 128, "torch.bfloat16", "torch.bfloat16", "after_rope", False, False, -1, True, False),
    (5, 1, 80, 20, "torch.float32", "torch.float32", "after_rope", True, False, 1, True, True),
    (2, 1, 256, 128, "torch.bfloat16", "torch.float16", "before_rope", False, True, -1, False, False),
    (1, 1, 16, 2, "torch.float32", "torch.bfloat16", "none", False, False, 1, True, False)])
def test_rope_append_is_within_rounding_of_float64(emulation, heads, kv_heads, size, rot, qkv_type, cache_type, norm, weighted,
                                                   interleaved, direction, embed, slot_major):
    rng = np.random.default_rng(size)
    rows, num_pages, max_positions, eps = 7, 5, 4096, 1e-5
    qkv = narrow(rng.normal(0, 2, (rows, (heads + 2 * kv_heads) * size + 24)), qkv_type)[:, :-24]     # rows lie apart
    angles = np.outer(np.arange(max_positions), 1 / 10000.0 ** (np.arange(0, rot, 2) / rot))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    positions = np.array([0, 1, 17, 4095, 99, 5, 4096])                 # the last one has no angles: left alone
    slots = np.array([3, 79, 16, 0, -1, 80, 20])                        # padding, and one outside of the cache
    weights = [rng.normal(1, 0.3, size).astype(np.float32) if weighted else None for _ in range(2)]
    values = narrow(rng.normal(0, 1, (rows, kv_heads * size)), qkv_type) if embed else None
    gates = narrow(rng.normal(0, 3, (rows, kv_heads)), qkv_type) if embed else None
    results = []
    for order in (ASCENDING, DESCENDING, RANDOM):
        emulation.order(order, size)
        pages = cache_views(num_pages, kv_heads, size, cache_type, slot_major)
        q = Tensor(np.full((rows, heads, size), 77, np.float32))
        wrappers.CudaOps(emulation).rope_append(
            Tensor(qkv, qkv_type), Tensor(cos), Tensor(sin), Tensor(positions), Tensor(slots), *pages, q, norm=norm, eps=eps,
            q_norm=weighted and Tensor(weights[0]) or None, k_norm=weighted and Tensor(weights[1]) or None, post_scale=1.2,
            interleaved=interleaved, direction=direction, value_embed=embed and Tensor(values, qkv_type) or None,
            gate=embed and Tensor(gates, qkv_type) or None, gate_scale=2.0, stream=0)
        results.append((q.array, *(page.array for page in pages)))
    for other in results[1:]:
        assert all(a.tobytes() == b.tobytes() for a, b in zip(results[0], other))

    q, k_pages, v_pages = results[0][0], *(widen(page, cache_type) for page in results[0][1:])
    x = widen(qkv, qkv_type).astype(np.float64).reshape(rows, -1, size)
    written = np.zeros(num_pages * 16, bool)
    for r, (position, slot) in enumerate(zip(positions, slots)):
        if not 0 <= slot < num_pages * 16 or position >= max_positions:
            assert (q[r] == 77).all()
            continue
        written[slot] = True
        angle = cos[position].astype(np.float64), sin[position].astype(np.float64)
        for h in range(heads + kv_heads):
            weight = weights[h >= heads]
            y = 1.2 * rope_oracle(x[r, h], *angle, norm, weight, eps, interleaved, direction)
            if h < heads:
                np.testing.assert_allclose(q[r, h], y * size**-0.5, rtol=0, atol=2e-6 * np.abs(y * size**-0.5).max())
            else:
                got = k_pages[slot // 16, h - heads, slot % 16]
                np.testing.assert_allclose(got, y, rtol=STEP[cache_type], atol=2e-6 * np.abs(y).max())
        for h in range(kv_heads):
            y = x[r, heads + kv_heads + h]
            if embed:
                gate = widen(gates, qkv_type)[r, h].astype(np.float64)
                y = y + 2 / (1 + np.exp(-gate)) * widen(values, qkv_type)[r].reshape(-1, size)[h]
            np.testing.assert_allclose(v_pages[slot // 16, h, slot % 16], y, rtol=STEP[cache_type], atol=2e-6 * np.abs(y).max())
    for pages in (k_pages, v_pages):            # nothing else was touched
        assert np.isnan(pages.transpose(0, 2, 1, 3).reshape(num_pages * 16, -1)[~written]).all()


# --- paged_attention ---------------------------------------------------------------------------------------------


def attention_case(seed, rows, heads, kv_heads, size, dtype, lengths, slot_major=False):
    """q, pages and tables: each row owns random distinct pages; slots outside of every row hold NaN."""
    rng = np.random.default_rng(seed)
    width = max(1, -(-max(lengths) // 16))
    needed = [-(-max(length, 0) // 16) for length in lengths]
    ids = rng.permutation(sum(needed) + 3).astype(np.int32)
    table = np.full((rows, width), -5, np.int32)
    k, v = cache_views(len(ids), kv_heads, size, dtype, slot_major)
    for r, length in enumerate(lengths):
        table[r, :needed[r]], ids = ids[:needed[r]], ids[needed[r]:]
        for position in range(length):
            for pages, spread in ((k, 1.0), (v, 3.0)):
                pages.array[table[r, position // 16], :, position % 16] = narrow(rng.normal(0, spread, (kv_heads, size)), dtype)
    return rng.normal(0, 1.5, (rows, heads, size)).astype(np.float32) * size**-0.5, k, v, table, np.array(lengths, np.int32)


def emulated_attention(emulation, q, k, v, table, lengths, window, out_type="torch.float32", spare=0):
    rows, heads, size = q.shape
    floats, integers = wrappers.attention_workspace(rows, heads, k.shape[1], size, table.shape[1])
    states, tickets = np.full(floats + spare, np.nan, np.float32), np.zeros(integers, np.int32)
    out = Tensor(np.full((rows, heads * size), 55, STORED[out_type]), out_type)
    wrappers.CudaOps(emulation).paged_attention(Tensor(q), k, v, Tensor(table), Tensor(lengths), Tensor(states), Tensor(tickets),
                                                out, window=window, stream=0)
    assert not tickets.any()            # ready for the next launch
    return out.array


def attention_oracle(q, k, v, table, length, window):
    """One row in float64 -> (H, D)."""
    heads, size = q.shape
    keys, values = (widen(pages.array[table], pages.dtype).astype(np.float64) for pages in (k, v))      # (W, Hkv, 16, D)
    keys, values = (x.transpose(1, 0, 2, 3).reshape(k.shape[1], -1, size)[:, :length] for x in (keys, values))
    if window:
        keys, values = keys[:, max(0, length - window):], values[:, max(0, length - window):]
    group = heads // k.shape[1]
    scores = np.einsum("hgd,hsd->hgs", q.reshape(-1, group, size).astype(np.float64), keys)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hgs,hsd->hgd", weights / weights.sum(-1, keepdims=True), values).reshape(heads, size)


@pytest.mark.parametrize("heads, kv_heads, size, dtype, out_type, slot_major", [
    (9, 3, 64, "torch.float16", "torch.float32", False), (4, 1, 128, "torch.bfloat16", "torch.bfloat16", True),
    (2, 2, 128, "torch.float32", "torch.float32", False), (16, 2, 128, "torch.bfloat16", "torch.float32", False),
    (4, 2, 80, "torch.float16", "torch.float32", True), (3, 1, 256, "torch.bfloat16", "torch.float32", False),
    (11, 1, 16, "torch.float32", "torch.bfloat16", True), (5, 1, 256, "torch.float32", "torch.float32", False),
    (2, 1, 256, "torch.float16", "torch.float32", False), (1, 1, 48, "torch.bfloat16", "torch.float32", False)])
def test_attention_is_within_rounding_of_float64_for_ragged_rows_and_windows(emulation, heads, kv_heads, size, dtype, out_type,
                                                                             slot_major):
    lengths = [1, 16, 17, 256, 0, 257, 513, 770, -1]
    case = attention_case(size, len(lengths), heads, kv_heads, size, dtype, lengths, slot_major)
    q, k, v, table, _ = case
    for window in (0, 1, 2, 100, 256, 257, 258, 700):
        emulation.order(window % 3, window)
        got = emulated_attention(emulation, *case, window, out_type)
        for r, length in enumerate(lengths):
            if length <= 0:
                assert (got[r] == 55).all()
                continue
            expected = attention_oracle(q[r], k, v, table[r], length, window)
            tolerance = 1e-5 * np.abs(expected).max() + (STEP[out_type] * np.abs(expected) if "b" in out_type else 0)
            assert (np.abs(widen(got[r], out_type).reshape(heads, size) - expected) <= tolerance).all()


def test_a_rows_attention_has_the_same_bits_in_any_batch_table_and_order_of_threads_and_blocks(emulation):
    lengths = [700, 40, 1030, 256, 999]
    q, k, v, table, sizes = attention_case(1, 5, 6, 2, 64, "torch.float16", lengths)
    for window in (0, 300):
        emulation.order(ASCENDING)
        expected = emulated_attention(emulation, q, k, v, table, sizes, window)
        for order in (DESCENDING, RANDOM):
            emulation.order(order, 8)
            assert emulated_attention(emulation, q, k, v, table, sizes, window).tobytes() == expected.tobytes()
            for some in ([2], [4, 2, 0], [3, 3, 1]):
                wide = np.pad(table[some], ((0, 0), (0, 40)), constant_values=-1)      # a longer bucket
                got = emulated_attention(emulation, q[some], k, v, wide, sizes[some], window)
                assert got.tobytes() == expected[some].tobytes()


def test_page_ids_out_of_range_are_masked_and_never_followed(emulation):
    q, k, v, table, sizes = attention_case(2, 2, 2, 1, 32, "torch.float32", [40, 600])
    good = emulated_attention(emulation, q, k, v, table, sizes, 0)
    table[0], table[1, 3] = 1 << 30, -1
    got = emulated_attention(emulation, q, k, v, table, sizes, 0)
    assert (got[0] == 0).all() and np.isfinite(got[1]).all() and (got[1] != good[1]).any()
    sizes[0] = 1 << 30                                                  # longer than the table
    emulated_attention(emulation, q, k, v, table, sizes, 0)
