"""The CUDA kernels: compiled by nvcc if there is one, and compared with their oracles in the host
emulation."""

import ctypes
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.kernels import cuda as wrappers
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ops.sampling import EXP_CUTOFF, FLOAT_MAX, sample_reference
from emulated_core import EmulatedCore
from nightly import WHOLE
from random_rows import random_logits, random_rows

SHARE = float(os.environ.get("DECODE_CORE_TEST_SHARE", "1"))

CSRC = Path(__file__).resolve().parents[2] / "csrc"
ASCENDING, DESCENDING, RANDOM = 0, 1, 2



class Tensor:
    """A numpy array that looks like a torch CUDA tensor to the wrappers; bfloat16 is stored in uint16."""

    is_cuda, requires_grad = True, False
    device = SimpleNamespace(type="cuda", index=0)

    def __init__(self, array, dtype=None):
        self.array, self.shape, self.dtype = array, array.shape, dtype or f"torch.{array.dtype}"

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def data_ptr(self):
        return self.array.__array_interface__["data"][0]

    def read(self):
        return self.array


class Emulation(EmulatedCore):
    """The CUDA sources compiled by g++; csrc/cuda/emulation.cpp runs them on the host's memory."""

    def __init__(self, library):
        super().__init__(library)
        self.ops, self.tensor, self.stream = wrappers.CudaOps(self), Tensor, 0

    def order(self, order, seed=0):
        """Set the order in which blocks and threads run."""
        self.library.dc_emulation_order(ctypes.c_int64(order), ctypes.c_int64(seed))


class GpuTensor:
    """A numpy array copied to the GPU with its strides and gaps."""

    def __init__(self, array, dtype=None, device="cuda"):
        import torch
        base = array
        while isinstance(base.base, np.ndarray) and base.base.dtype == array.dtype:
            base = base.base
        flat = torch.from_numpy(base.reshape(-1).view(np.uint8).copy()).to(device)
        offset = (array.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // array.itemsize
        steps = [step // array.itemsize for step in array.strides]
        dtype = dtype or f"torch.{array.dtype}"
        self.tensor = flat.view(getattr(torch, dtype.removeprefix("torch."))).as_strided(array.shape, steps, offset)
        self.kind, self.shape, self.dtype = array.dtype, self.tensor.shape, dtype

    def __getattr__(self, name):        # is_cuda, device, stride, data_ptr, requires_grad
        return getattr(self.tensor, name)

    def read(self):
        whole = self.tensor.cpu().contiguous()
        return whole.view(__import__("torch").uint8).numpy().view(self.kind).reshape(self.shape)


class Gpu:
    """The compiled kernels on the first GPU."""

    def __init__(self, core):
        import torch
        self.torch, self.ops, self.tensor = torch, wrappers.CudaOps(core), GpuTensor

    @property
    def stream(self):
        return self.torch.cuda.current_stream().cuda_stream

    def order(self, order, seed=0):
        """The hardware chooses its order."""


@pytest.fixture(scope="module")
def emulation(emulation_library):
    return Emulation(emulation_library)


@pytest.fixture(scope="module")
def gpu():
    try:
        from chatlm.worker.kernels.library import _core
    except ImportError as failure:
        pytest.skip(f"no compiled decode_core: {failure}")
    if not _core.cuda_compiled:
        pytest.skip("decode_core was compiled without CUDA")
    if not _core.cuda_devices():
        pytest.skip("no GPU here")
    return Gpu(_core)


@pytest.fixture(params=["emulation", "gpu"])
def backend(request):
    return request.getfixturevalue(request.param)


# --- the emulation itself ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault, complaint", [
    (0, None), (1, "another sum"), (2, "threads wait for ever"), (3, "lanes of a warp met at different operations"),
    (4, "another sum")])
def test_the_emulation_shows_a_lost_barrier(emulation, fault, complaint):
    """The emulation shows a forgotten or divided barrier."""
    seen = set()
    for order, seeds in ((ASCENDING, 1), (DESCENDING, 1), (RANDOM, 20)):
        for seed in range(seeds):
            emulation.order(order, seed)
            total = np.zeros(1, np.int32)
            message = emulation.emulation_faulty(fault, total.ctypes.data)
            seen.add(message.split(": ")[1] if message else None if total[0] == 8 * 2016 else "another sum")
    assert complaint in seen and (fault != 0 or seen == {None})


# --- sample ------------------------------------------------------------------------------------------------------

ROW = np.dtype([
    ("seed", "u8"), ("position", "i8"), ("top_p", "u8"), ("inverse_temperature", "f4"), ("min_z", "f4"), ("top_k", "i4"),
    ("choice", "u4"), ("repetition", "f4"), ("inverse_repetition", "f4"), ("frequency", "f4"), ("presence", "f4"),
    ("count_begin", "i4"), ("count_end", "i4"), ("bias_begin", "i4"), ("bias_end", "i4")])


def pack_rows(rows):
    """SampleRows packed as dc::SampleRow[] with their lists."""
    packed, count_ids, counts, bias_ids, biases = np.zeros(len(rows), ROW), [], [], [], []
    for i, (p, position, tokens, prompt_tokens, _) in enumerate(rows):
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
                     min(1 / p.temperature, FLOAT_MAX) if p.temperature > 0 else -1,
                     max(np.log(np.float64(min(p.min_p, 1))) if p.min_p > 0 else -np.inf, EXP_CUTOFF), p.top_k, p.choice,
                     p.repetition_penalty, 1 / p.repetition_penalty, p.frequency_penalty, p.presence_penalty,
                     begin[0], len(count_ids), begin[1], len(bias_ids))
    as_array = [np.array(values or [0], kind) for values, kind in zip((count_ids, counts, bias_ids, biases), "iiif")]
    return packed, as_array, bool(count_ids or bias_ids)


def drawn_tokens(backend, logits, rows, dtype=None, gap=0):
    """sample_reference by the CUDA kernel, which must not change `logits`. There are `gap` elements between
    rows."""
    wide = np.full((len(logits), logits.shape[1] + gap), 99, logits.dtype)
    x = wide[:, gap // 2:][:, :logits.shape[1]]
    x[:] = logits
    packed, lists, changes = pack_rows(rows)
    tokens = backend.tensor(np.full(len(rows), -7, np.int32))
    names = ("count_ids", "counts", "bias_ids", "bias_values")
    backend.ops.sample(backend.tensor(x, dtype), backend.tensor(packed.view(np.uint8)), tokens,
                       stream=backend.stream, **(dict(zip(names, map(backend.tensor, lists))) if changes else {}))
    return tokens.read()


@pytest.mark.parametrize("vocabulary, count, threads", [
    (1, 40, 32), (2, 60, 32), (31, 400, 32), (257, 1200, 64), (1000, 1200, 128), (1024, 150, 1024), (3001, 600, 256),
    (5000, 150, 1024), (20011, 60, 1024), (49152, 24, 1024), (262144, 4, 1024)])
def test_the_sampling_kernel_draws_as_the_reference(backend, monkeypatch, vocabulary, count, threads):
    monkeypatch.setattr(wrappers, "SAMPLE_THREADS", threads)
    rng, count = np.random.default_rng(vocabulary), math.ceil(count * (SHARE if WHOLE else SHARE / 2))
    logits, rows = random_logits(rng, count, vocabulary), random_rows(rng, count, vocabulary)
    expected = sample_reference(logits, rows)
    for order in (ASCENDING, DESCENDING, RANDOM):
        backend.order(order, vocabulary)
        assert drawn_tokens(backend, logits, rows).tolist() == expected.tolist()


def test_tokens_ignore_their_row_and_batch(backend):
    """Tokens ignore the row index, the batch and how far rows lie apart."""
    rng = np.random.default_rng(3)
    logits, rows = random_logits(rng, 12, 1001), random_rows(rng, 12, 1001)
    expected = sample_reference(logits, rows).tolist()
    for order, gap in (([11, 3, 7], 3), ([5], 2), (list(range(12)), 203)):
        got = drawn_tokens(backend, logits[order], [rows[i] for i in order], gap=gap)
        assert got.tolist() == [expected[i] for i in order]


def test_a_row_without_a_position_gets_no_token(backend):
    """A row without a position gets no token and disturbs no other."""
    rng = np.random.default_rng(4)
    logits, rows = random_logits(rng, 3, 500), random_rows(rng, 3, 500)
    expected = sample_reference(logits, rows).tolist()
    idle = rows[1]._replace(position=-1)
    assert drawn_tokens(backend, logits, [rows[0], idle, rows[2]]).tolist() == [expected[0], -1, expected[2]]


def test_bfloat16_logits_draw_as_if_widened(backend):
    """bfloat16 logits draw what their exact widening draws."""
    rng = np.random.default_rng(5)
    bits = random_logits(rng, 20, 3000).view(np.uint32) >> 16
    wide = (bits << 16).astype(np.uint32).view(np.float32)
    rows = [row._replace(params=replace(row.params, repetition_penalty=1.0, frequency_penalty=0.0, presence_penalty=0.0,
                                        logit_bias=())) for row in random_rows(rng, 20, 3000)]
    assert (drawn_tokens(backend, bits.astype(np.uint16), rows, dtype="torch.bfloat16").tolist()
            == sample_reference(wide, rows).tolist())


def test_biases_of_one_id_add_up_in_order(backend):
    """Biases of one id add up in order, and overflowing penalties are cleaned."""
    logits = np.zeros((3, 40), np.float32)
    logits[1, 5] = np.inf
    logits[2, 7] = 3e38
    rows = [SampleRow(SamplingParams(temperature=0, logit_bias=((3, 1e8), (3, 1.0), (3, -1e8), (4, 0.5))), 0),
            SampleRow(SamplingParams(temperature=0, logit_bias=((5, -3e38), (6, 3e37))), 0),
            SampleRow(SamplingParams(temperature=0, repetition_penalty=0.1, logit_bias=((7, -1e38), (8, 3.4e38))), 0, (3, 7, 9))]
    assert sample_reference(logits, rows).tolist() == [4, 5, 7]
    for order in (ASCENDING, DESCENDING, RANDOM):
        backend.order(order, 5)
        assert drawn_tokens(backend, logits, rows).tolist() == [4, 5, 7]


# --- rope_append -------------------------------------------------------------------------------------------------

STORED = {"torch.float32": np.float32, "torch.float16": np.float16, "torch.bfloat16": np.uint16}
# for a value just above 1
STEP = {"torch.float32": 2.0**-23, "torch.float16": 2.0**-10, "torch.bfloat16": 2.0**-7}


def narrow(x, dtype):
    """Floats rounded to an array of `dtype` (bfloat16 in uint16, ties to even)."""
    if dtype != "torch.bfloat16":
        return x.astype(STORED[dtype])
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def widen(array, dtype):
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "torch.bfloat16" else array.astype(np.float32)


def cache_arrays(num_pages, kv_heads, size, dtype, slot_major):
    """K and V pages (P, Hkv, 16, D) full of NaN: two arrays, or two views of a slot-major one."""
    filler = 0x7FC1 if dtype == "torch.bfloat16" else np.nan
    if slot_major:
        whole = np.full((num_pages, 16, 2, kv_heads, size), filler, STORED[dtype])
        return [whole[:, :, i].transpose(0, 2, 1, 3) for i in (0, 1)]
    return [np.full((num_pages, kv_heads, 16, size), filler, STORED[dtype]) for _ in range(2)]


def rope_oracle(x, cos, sin, norm, weight, eps):
    """One head (D,) in float64."""
    def normalized(y):
        return y / np.sqrt((y * y).mean() + eps) * (1 if weight is None else weight)

    x = normalized(x) if norm == "before_rope" else x.copy()
    half = len(cos)
    a, b = x[:half].copy(), x[half:2 * half].copy()
    x[:half], x[half:2 * half] = a * cos - b * sin, b * cos + a * sin
    return normalized(x) if norm == "after_rope" else x


@pytest.mark.parametrize("heads, kv_heads, size, rot, qkv_type, cache_type, norm, weighted, embed, slot_major", [
    (9, 3, 64, 64, "torch.float32", "torch.float16", "none", False, False, False),
    (4, 2, 128, 128, "torch.bfloat16", "torch.bfloat16", "before_rope", True, False, True),
    (6, 6, 128, 128, "torch.bfloat16", "torch.bfloat16", "after_rope", False, True, False),
    (5, 1, 80, 20, "torch.float32", "torch.float32", "after_rope", True, True, True),
    (2, 1, 256, 128, "torch.bfloat16", "torch.float16", "before_rope", False, False, False),
    (1, 1, 16, 2, "torch.float32", "torch.bfloat16", "none", False, True, False)])
def test_rope_append_is_near_float64(backend, heads, kv_heads, size, rot, qkv_type, cache_type, norm, weighted,
                                     embed, slot_major):
    """rope_append is within rounding of float64."""
    rng, tensor = np.random.default_rng(size), backend.tensor
    rows, num_pages, max_positions, eps = 7, 5, 4096, 1e-5
    # with a gap between rows
    qkv = narrow(rng.normal(0, 2, (rows, (heads + 2 * kv_heads) * size + 24)), qkv_type)[:, :-24]
    angles = np.outer(np.arange(max_positions), 1 / 10000.0 ** (np.arange(0, rot, 2) / rot))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    # the last one has no angles and does not change
    positions = np.array([0, 1, 17, 4095, 99, 5, 4096])
    slots = np.array([3, 79, 16, 0, -1, 80, 20])                        # padding, and one outside the cache
    weights = [rng.normal(1, 0.3, size).astype(np.float32) if weighted else None for _ in range(2)]
    values = narrow(rng.normal(0, 1, (rows, kv_heads * size)), qkv_type) if embed else None
    gates = narrow(rng.normal(0, 3, (rows, kv_heads)), qkv_type) if embed else None
    results = []
    for order in (ASCENDING, DESCENDING, RANDOM):
        backend.order(order, size)
        pages = [tensor(array, cache_type) for array in cache_arrays(num_pages, kv_heads, size, cache_type, slot_major)]
        q = tensor(np.full((rows, heads, size), 77, np.float32))
        options = {"q_norm": tensor(weights[0]), "k_norm": tensor(weights[1])} if weighted else {}
        if embed:
            options |= {"value_embed": tensor(values, qkv_type), "gate": tensor(gates, qkv_type), "gate_scale": 2.0}
        backend.ops.rope_append(tensor(qkv, qkv_type), *map(tensor, (cos, sin, positions, slots)), *pages, q, norm=norm, eps=eps,
                                post_scale=1.2, stream=backend.stream, **options)
        results.append((q.read(), *(page.read() for page in pages)))
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
            y = 1.2 * rope_oracle(x[r, h], *angle, norm, weight, eps)
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
    """q, pages and tables: each row owns random pages of its own; slots that no row uses hold NaN."""
    rng = np.random.default_rng(seed)
    width = max(1, -(-max(lengths) // 16))
    needed = [-(-max(length, 0) // 16) for length in lengths]
    ids = rng.permutation(sum(needed) + 3).astype(np.int32)
    table = np.full((rows, width), -5, np.int32)
    k, v = cache_arrays(len(ids), kv_heads, size, dtype, slot_major)
    for r, length in enumerate(lengths):
        table[r, :needed[r]], ids = ids[:needed[r]], ids[needed[r]:]
        for position in range(length):
            for pages, spread in ((k, 1.0), (v, 3.0)):
                pages[table[r, position // 16], :, position % 16] = narrow(rng.normal(0, spread, (kv_heads, size)), dtype)
    q = rng.normal(0, 1.5, (rows, heads, size)).astype(np.float32) * np.float32(size**-0.5)
    return q, k, v, dtype, table, np.array(lengths, np.int32)


def attend(backend, q, k, v, dtype, table, lengths, window, out_type="torch.float32", softcap=0.0, sinks=None):
    rows, heads, size = q.shape
    tensor = backend.tensor
    floats, integers = wrappers.attention_workspace(rows, heads, k.shape[1], size, table.shape[1])
    states, tickets = tensor(np.full(floats, np.nan, np.float32)), tensor(np.zeros(integers, np.int32))
    out = tensor(np.full((rows, heads * size), 55, STORED[out_type]), out_type)
    backend.ops.paged_attention(tensor(q), tensor(k, dtype), tensor(v, dtype), tensor(table), tensor(lengths), states, tickets,
                                out, window=window, softcap=softcap, sinks=None if sinks is None else tensor(sinks), stream=backend.stream)
    assert not tickets.read().any()     # reset for the next launch
    return out.read()


def attention_oracle(q, k, v, dtype, table, length, window, softcap=0.0, sinks=None):
    """One row in float64 -> (H, D)."""
    heads, size = q.shape
    keys, values = (widen(pages[table], dtype).astype(np.float64) for pages in (k, v))                  # (W, Hkv, 16, D)
    keys, values = (x.transpose(1, 0, 2, 3).reshape(k.shape[1], -1, size)[:, :length] for x in (keys, values))
    if window:
        keys, values = keys[:, max(0, length - window):], values[:, max(0, length - window):]
    group = heads // k.shape[1]
    scores = np.einsum("hgd,hsd->hgs", q.reshape(-1, group, size).astype(np.float64), keys)
    scores = softcap * np.tanh(scores / softcap) if softcap else scores
    sinks = np.full(heads, -np.inf) if sinks is None else sinks.astype(np.float64)
    scores = np.concatenate((scores, sinks.reshape(-1, group, 1)), -1)      # of values 0
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hgs,hsd->hgd", (weights / weights.sum(-1, keepdims=True))[..., :-1], values).reshape(heads, size)


@pytest.mark.parametrize("heads, kv_heads, size, dtype, out_type, slot_major", [
    (9, 3, 64, "torch.float16", "torch.float32", False), (4, 1, 128, "torch.bfloat16", "torch.bfloat16", True),
    (2, 2, 128, "torch.float32", "torch.float32", False), (16, 2, 128, "torch.bfloat16", "torch.float32", False),
    (4, 2, 80, "torch.float16", "torch.float32", True), (3, 1, 256, "torch.bfloat16", "torch.float32", False),
    (11, 1, 16, "torch.float32", "torch.bfloat16", True), (5, 1, 256, "torch.float32", "torch.float32", False),
    (2, 1, 256, "torch.float16", "torch.float32", False), (1, 1, 48, "torch.bfloat16", "torch.float32", False)])
def test_attention_is_near_float64(backend, heads, kv_heads, size, dtype, out_type,
                                   slot_major):
    """Attention is within rounding of float64 for ragged rows and windows."""
    lengths = [1, 16, 17, 256, 0, 257, 513, 770, -1]
    case = attention_case(size, len(lengths), heads, kv_heads, size, dtype, lengths, slot_major)
    q, k, v, _, table, _ = case
    for window in (0, 1, 2, 100, 256, 257, 258, 700) if WHOLE else ((0, 1, 257, 700), (2, 100, 256, 258))[size // 16 % 2]:
        backend.order(window % 3, window)
        got = attend(backend, *case, window, out_type)
        for r, length in enumerate(lengths):
            if length <= 0:
                assert (got[r] == 55).all()
                continue
            expected = attention_oracle(q[r], k, v, dtype, table[r], length, window)
            tolerance = 1e-5 * np.abs(expected).max() + (STEP[out_type] * np.abs(expected) if "b" in out_type else 0)
            assert (np.abs(widen(got[r], out_type).reshape(heads, size) - expected) <= tolerance).all()


@pytest.mark.parametrize("heads, softcap", [(2, 0.5), (8, 30.0)])
def test_capped_scores_are_near_float64(backend, heads, softcap):
    """Capped scores are within rounding of float64."""
    lengths = [1, 40, 300]
    q, *case = attention_case(3, len(lengths), heads, 2, 32, "torch.float32", lengths)
    for window in (0, 100):
        got = attend(backend, 4 * q, *case, window, softcap=softcap)
        for r, length in enumerate(lengths):
            expected = attention_oracle(4 * q[r], *case[:3], case[3][r], length, window, softcap)
            np.testing.assert_allclose(got[r].reshape(heads, 32), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("heads, dtype, softcap", [(2, "torch.float32", 0.0), (14, "torch.bfloat16", 0.0), (8, "torch.float16", 5.0)])
def test_sinks_join_the_softmax(backend, heads, dtype, softcap):
    """Of sizes that take from nothing to nearly all of it, and one that takes all in float32."""
    lengths = [1, 40, 0, 300, 700]
    q, k, v, _, table, sizes = attention_case(heads, len(lengths), heads, 2, 64, dtype, lengths)
    sinks = np.random.default_rng(heads).normal(0, 3, heads).astype(np.float32)
    sinks[:2] = 300, -300
    for window in (0, 1, 100, 290):
        backend.order(window % 3, window)
        got = attend(backend, q, k, v, dtype, table, sizes, window, softcap=softcap, sinks=sinks)
        assert (got[2] == 55).all() and (got[[0, 1, 3, 4], :64] == 0).all()
        for r, length in enumerate(lengths):
            if length:
                expected = attention_oracle(q[r], k, v, dtype, table[r], length, window, softcap, sinks)
                np.testing.assert_allclose(got[r].reshape(heads, 64), expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_a_row_s_attention_has_the_same_bits_anywhere(backend):
    """A row's attention has the same bits in any batch, table and order of threads and blocks."""
    lengths = [700, 40, 1030, 256, 999]
    q, k, v, dtype, table, sizes = attention_case(1, 5, 6, 2, 64, "torch.float16", lengths)
    for window in (0, 300):
        backend.order(ASCENDING)
        expected = attend(backend, q, k, v, dtype, table, sizes, window)
        for some in ([2], [4, 2, 0], [3, 3, 1]):
            wide = np.pad(table[some], ((0, 0), (0, 40)), constant_values=-1)          # a longer bucket
            got = attend(backend, q[some], k, v, dtype, wide, sizes[some], window)
            assert got.tobytes() == expected[some].tobytes()
        for order, seeds in ((DESCENDING, 1), (RANDOM, 5 if WHOLE else 2)):
            for seed in range(seeds):
                backend.order(order, seed)
                assert attend(backend, q, k, v, dtype, table, sizes, window).tobytes() == expected.tobytes()


@pytest.mark.parametrize("most_spans", [1, 3, 20])
def test_long_rows_are_spans_merged_in_groups(backend, monkeypatch, most_spans):
    """With 20 spans and 1,200 keys, two groups of spans of one chunk; with 1, nothing is merged."""
    monkeypatch.setattr(wrappers, "MOST_SPANS", most_spans)
    lengths = [40, 64, 65, 0, 700, 1200, 1300, 2600]
    q, k, v, dtype, table, sizes = attention_case(5, len(lengths), 3, 1, 16, "torch.float32", lengths)
    for window in (0, 1000):
        backend.order(RANDOM, window)
        got = attend(backend, q, k, v, dtype, table, sizes, window)
        for r, length in enumerate(lengths):
            if length:
                expected = attention_oracle(q[r], k, v, dtype, table[r], length, window)
                np.testing.assert_allclose(got[r].reshape(3, 16), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        for some in ([6], [5, 2]):
            assert attend(backend, q[some], k, v, dtype, table[some], sizes[some], window).tobytes() == got[some].tobytes()


def test_page_ids_out_of_range_are_never_followed(backend):
    """Page ids out of range are masked and never followed."""
    q, k, v, dtype, table, sizes = attention_case(2, 2, 2, 1, 32, "torch.float32", [40, 600])
    good = attend(backend, q, k, v, dtype, table, sizes, 0)
    table[0], table[1, 3] = 1 << 30, -1
    got = attend(backend, q, k, v, dtype, table, sizes, 0)
    assert (got[0] == 0).all() and np.isfinite(got[1]).all() and (got[1] != good[1]).any()
    sizes[0] = 1 << 30                                                  # longer than the table
    attend(backend, q, k, v, dtype, table, sizes, 0)


# --- captured in a CUDA graph --------------------------------------------------------------------------------------


def test_a_captured_step_replays_on_new_inputs(gpu):
    """A captured step replays what eager calls compute on new inputs."""
    torch, ops, tensor = gpu.torch, gpu.ops, gpu.tensor
    rng = np.random.default_rng(9)
    q, k, v, dtype, table, lengths = attention_case(9, 4, 8, 2, 128, "torch.bfloat16", [1000, 3, 400, 257])
    floats, integers = wrappers.attention_workspace(4, 8, 2, 128, table.shape[1])
    held = {name: tensor(array, kind) for name, (array, kind) in {
        "qkv": (narrow(rng.normal(0, 1, (4, 12 * 128)), dtype), dtype), "k": (k, dtype), "v": (v, dtype), "q": (q, None), "table": (table, None),
        "lengths": (lengths, None), "positions": (lengths.astype(np.int64) - 1, None),
        "slots": (table[range(4), (lengths - 1) // 16].astype(np.int64) * 16 + (lengths - 1) % 16, None),
        "cos": (np.ones((1024, 64), np.float32), None), "sin": (np.zeros((1024, 64), np.float32), None),
        "states": (np.zeros(floats, np.float32), None), "tickets": (np.zeros(integers, np.int32), None),
        "out": (np.zeros((4, 1024), np.float32), None), "logits": (random_logits(rng, 4, 32768), None),
        "params": (pack_rows(random_rows(rng, 4, 32768))[0].view(np.uint8), None), "tokens": (np.zeros(4, np.int32), None)}.items()}
    t = SimpleNamespace(**held)

    def step():
        ops.rope_append(t.qkv, t.cos, t.sin, t.positions, t.slots, t.k, t.v, t.q, stream=gpu.stream)
        ops.paged_attention(t.q, t.k, t.v, t.table, t.lengths, t.states, t.tickets, t.out, stream=gpu.stream)
        ops.sample(t.logits, t.params, t.tokens, stream=gpu.stream)

    step()                                                              # kernels are loaded before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        t.qkv.tensor.copy_(torch.randn(4, 12 * 128, device="cuda"))
        t.logits.tensor.copy_(torch.randn(4, 32768, device="cuda") * 3)
        graph.replay()
        replayed = t.out.read().copy(), t.tokens.read().copy()
        step()
        assert replayed[0].tobytes() == t.out.read().tobytes() and replayed[1].tolist() == t.tokens.read().tolist()


# --- nvcc --------------------------------------------------------------------------------------------------------


@pytest.mark.slow       # setup.py compiles them with the same warnings
@pytest.mark.parametrize("source", sorted(path.name for path in (CSRC / "cuda").glob("*.cu")))
def test_nvcc_compiles_without_warnings(source, tmp_path):
    """nvcc compiles without warnings for sm_80 and sm_90."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    subprocess.run([nvcc, "-std=c++17", "-O3", "-c", "-gencode=arch=compute_80,code=sm_80",
                    "-gencode=arch=compute_90,code=[sm_90,compute_90]", "-Werror=all-warnings",
                    "-Xcompiler=-Wall,-Wextra,-Werror", f"-I{CSRC}", str(CSRC / "cuda" / source), "-o", str(tmp_path / "object.o")],
                   check=True, timeout=170)


# --- what the wrappers refuse ------------------------------------------------------------------------------------


def sample_arguments():
    return {"logits": np.zeros((2, 8), np.float32), "params": np.zeros(144, np.uint8), "tokens": np.zeros(2, np.int32)}


def rope_arguments():
    k, v = cache_arrays(3, 2, 32, "torch.float32", False)
    return {"qkv": np.zeros((2, 8 * 32), np.float32), "cos": np.zeros((9, 16), np.float32), "sin": np.zeros((9, 16), np.float32),
                "positions": np.zeros(2, np.int64), "slots": np.zeros(2, np.int64), "k_pages": k, "v_pages": v,
                "q_out": np.zeros((2, 4, 32), np.float32)}


def attention_arguments():
    q, k, v, _, table, lengths = attention_case(0, 2, 4, 2, 32, "torch.float32", [20, 300])
    floats, integers = wrappers.attention_workspace(2, 4, 2, 32, table.shape[1])
    return {"q": q, "k_pages": k, "v_pages": v, "block_table": table, "lengths": lengths, "states": np.zeros(floats, np.float32),
                "tickets": np.zeros(integers, np.int32), "out": np.zeros((2, 128), np.float32)}


ARGUMENTS = {"sample": sample_arguments, "rope_append": rope_arguments, "paged_attention": attention_arguments}


def call(op, core=None, **changes):
    arguments = {name: Tensor(value) if isinstance(value, np.ndarray) else value
                 for name, value in (ARGUMENTS[op]() | changes).items()}
    core = core or SimpleNamespace(cuda_current_device=lambda: 0, **{f"cuda_{op}": lambda *_: None})
    getattr(wrappers.CudaOps(core), op)(**arguments, stream=0)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_wrong_tensor_is_a_named_value_error(op):
    call(op)                                                            # as it should be
    for name, array in ARGUMENTS[op]().items():
        elsewhere, trained, other = Tensor(array), Tensor(array), Tensor(array)
        elsewhere.is_cuda, trained.requires_grad, other.device = False, True, SimpleNamespace(index=1)
        for wrong in (array.tolist(), None, elsewhere, trained, other, array.astype(np.complex64), array[None],
                      np.repeat(array, 2, axis=-1)[..., ::2]):
            with pytest.raises(ValueError, match=name):
                call(op, **{name: wrong})


@pytest.mark.parametrize("op, name, wrong", [
    ("sample", "logits", np.zeros((2, (1 << 18) + 1), np.float32)), ("sample", "params", np.zeros(145, np.uint8)[1:]),
    ("sample", "counts", np.zeros(3, np.int32)),
    ("sample", "logits", np.zeros((3, 8), np.float32)[[0, 0]][:, :0]), ("rope_append", "norm", "sometimes"),
    ("rope_append", "k_norm", np.zeros(32, np.float32)),
    ("rope_append", "gate", np.zeros((2, 2), np.float32)), ("rope_append", "cos", np.zeros((9, 17), np.float32)),
    ("rope_append", "v_pages", np.zeros((3, 2, 16, 64), np.float32)),
    ("rope_append", "k_pages", np.zeros((3, 2, 8, 32), np.float32)),
    ("rope_append", "k_pages", np.zeros((3, 2, 16, 40), np.float32)), ("rope_append", "q_out", np.zeros((2, 0, 32), np.float32)),
    ("paged_attention", "k_pages", np.zeros(3 * 2 * 16 * 33, np.float32)[1:][:3 * 2 * 16 * 32].reshape(3, 2, 16, 32)),
    ("paged_attention", "q", np.zeros((2, 5, 32), np.float32)), ("paged_attention", "window", -1), ("paged_attention", "sinks", np.zeros(3, np.float32)),
    ("paged_attention", "sinks", np.zeros(4, np.float16)), ("paged_attention", "softcap", -1.0),
    ("paged_attention", "states", np.zeros(9, np.float32)), ("paged_attention", "tickets", np.zeros(3, np.int32)),
    ("paged_attention", "block_table", np.zeros((2, 0), np.int32))])
def test_a_wrong_size_is_a_named_value_error(op, name, wrong):
    """A wrong size or option is a value error that names it."""
    with pytest.raises(ValueError, match=name):
        call(op, **{name: wrong})


def test_bfloat16_logits_take_no_penalties():
    """bfloat16 logits with penalties are refused."""
    ones = Tensor(np.ones(1, np.int32))
    with pytest.raises(ValueError, match="float32 logits"):
        call("sample", logits=Tensor(np.zeros((2, 8), np.uint16), "torch.bfloat16"), count_ids=ones, counts=ones)


def test_what_the_launch_says_is_raised():
    with pytest.raises(RuntimeError, match="out of luck"):
        call("sample", SimpleNamespace(cuda_current_device=lambda: 0, cuda_sample=lambda *_: "out of luck"))
