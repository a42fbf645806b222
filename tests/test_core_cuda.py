"""The CUDA kernels: compiled by nvcc where there is one, and run against their oracles in the host emulation."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import chat_server as cs
from chat_server import SampleRow, SamplingParams

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
ASCENDING, DESCENDING, RANDOM = 0, 1, 2
ELEMENT = {"float32": 0, "float16": 1, "bfloat16": 2}
NO_LOGIT = np.float32(-np.inf)


class Emulation:
    """The entry points of csrc/cuda/launch.h as functions of integers and floats; a message raises."""

    def __init__(self, library):
        self.library = ctypes.CDLL(str(library))

    def __getattr__(self, name):
        function = self.library[f"dc_{name}"]
        function.restype = ctypes.c_char_p

        def call(*values):
            kinds = (ctypes.c_double(v) if isinstance(v, float) else ctypes.c_int64(v) for v in values)
            if message := function(*kinds):
                raise RuntimeError(message.decode())
        return call

    def order(self, order, seed=0):
        """In which order blocks and threads run from now on."""
        self.library.dc_emulation_order(ctypes.c_int64(order), ctypes.c_int64(seed))


@pytest.fixture(scope="module")
def emulation(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    library = tmp_path_factory.mktemp("emulation") / "emulation.so"
    subprocess.run(["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall",
                    "-Wextra", "-Werror", str(SOURCES / "emulation.cpp"), "-o", str(library)], check=True, timeout=170)
    return Emulation(library)


# --- sample ------------------------------------------------------------------------------------------------------

ROW = np.dtype([
    ("seed", "u8"), ("position", "i8"), ("top_p", "u8"), ("inverse_temperature", "f4"), ("min_z", "f4"), ("top_k", "i4"),
    ("choice", "u4"), ("repetition", "f4"), ("inverse_repetition", "f4"), ("frequency", "f4"), ("presence", "f4"),
    ("count_begin", "i4"), ("count_end", "i4"), ("bias_begin", "i4"), ("bias_end", "i4")])


def address(array):
    return 0 if array is None else array.__array_interface__["data"][0]


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


def emulated_tokens(emulation, logits, rows, threads=1024, logprobs=None):
    """sample_reference by the CUDA kernel's text; leaves `logits` as they are."""
    logits = logits.copy()
    packed, lists, changes = pack_rows(rows)
    tokens = np.full(len(rows), -7, np.int32)
    kind = "float32" if logits.dtype == np.float32 else "bfloat16"
    emulation.cuda_sample(address(logits), ELEMENT[kind], logits.strides[0] // logits.itemsize, *logits.shape,
                          address(packed), *(address(a) if changes else 0 for a in lists), address(tokens),
                          address(logprobs), threads, 0)
    return tokens


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
