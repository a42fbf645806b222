"""decode_core's sample equals the reference bit for bit: edge rows, every instruction set, any batch; its
checks; the pool.

Needs numpy and the compiled core only (no torch), so that the sanitizer build can run it (csrc/sanitize.sh).
"""

import math
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ops.sampling import FLOAT_MAX, sample_reference, survivors
from nightly import WHOLE, by_day
from record import agree, exact

core = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
import instruction_sets  # noqa: E402

ISAS = [name for name in core.info()["offered_isas"] if name in instruction_sets.ISAS]
SOME_ISAS = instruction_sets.some(ISAS)
# of the random rows; the sanitizer build uses fewer
SHARE = float(os.environ.get("DECODE_CORE_TEST_SHARE", "1"))
NEG_INF = np.float32(-np.inf)


@pytest.fixture(autouse=True)
def default_settings():
    yield
    core.set_isa(ISAS[0])
    core.set_threads(1)


def sampled(logits, rows, **options):
    return core.sample(logits, core.SampleBatch(rows, logits.shape[1]), **options).tolist()


# --- equality ------------------------------------------------------------------------------------------------------


def edge_rows(rng, V):
    """Rows with ties, infinities, NaN, denormals and extreme sizes at every boundary."""
    one, spoiled = np.full(V, NEG_INF), rng.standard_normal(V)
    one[V // 2] = -3
    spoiled[rng.integers(0, V, 3)], spoiled[rng.integers(0, V, 2)] = np.nan, np.inf
    rows = [np.zeros(V), np.full(V, NEG_INF), np.full(V, np.nan), one, spoiled, rng.integers(-2, 3, V),
            np.where(rng.random(V) < 0.5, 0.0, -0.0), rng.choice([1e30, -1e30, 0, 3e38, -3e38], V),
            rng.choice([0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39], V), np.full(V, FLOAT_MAX), np.full(V, -FLOAT_MAX),
            np.sort(rng.standard_normal(V)) * 5, np.round(rng.standard_normal(V) * 4) / 2]
    rows += [rng.standard_normal(V) * scale for scale in (0.01, 1, 3, 3, 10, 1e4, 1e30)]
    with np.errstate(over="ignore"):
        return np.array(rows).astype(np.float32)


def any_params(rng, V):
    def choose(*values):
        return values[rng.integers(len(values))]

    bias = choose((), (), ((int(rng.integers(V)), 5.0), (int(rng.integers(V)), -math.inf)),
                  ((V - 1, math.inf), (0, -100.0), (0, 100.0)), tuple((token, -math.inf) for token in range(V - 1)))
    return SamplingParams(
        temperature=choose(0, 1e-30, 1e-6, 0.3, 0.8, 1.0, 1.5, 1e10, math.inf),
        top_k=int(choose(0, 0, 1, 2, 7, 40, 50, 700, V - 1, V, V + 1, 2**40)),
        top_p=choose(1.0, 1.0, 0.0, 1e-12, 0.1, 0.5, 0.9, 0.95, 0.999999, 1 - 1e-12), min_p=choose(0.0, 0.0, 0.02, 0.1, 1.0, 1e-20),
        repetition_penalty=choose(1.0, 1.0, 1.3, 0.7), frequency_penalty=choose(0.0, 0.0, 0.5, -1.0),
        presence_penalty=choose(0.0, 0.0, 0.25), logit_bias=bias, seed=int(rng.integers(2**64, dtype=np.uint64)),
        choice=int(choose(0, 1, 5, 2**32 - 1)))


def any_batch(rng, V):
    logits = edge_rows(rng, V)
    return logits, [SampleRow(any_params(rng, V), int(rng.integers(2 ** rng.integers(1, 63))),
                              rng.integers(0, V, rng.integers(0, 30)).tolist(), 8) for _ in logits]


@pytest.mark.parametrize("V, rows", by_day([(1, 4000), (2, 8000), (5, 12000), (16, 12000), (63, 12000), (255, 12000), (256, 12000),
                                            (257, 12000), (1000, 12000), (5003, 3500), (20011, 900), (49152, 400), (151936, 80)],
                                           (1, 4000), (5, 12000), (257, 12000), (5003, 3500), (49152, 400)))
def test_tokens_equal_the_references_everywhere(V, rows):
    """Tokens equal the reference's on every instruction set."""
    rng = np.random.default_rng(V)
    for _ in range(math.ceil(rows * SHARE / (20 if WHOLE else 60))):           # 100,880 rows in all
        logits, batch = any_batch(rng, V)
        with np.errstate(all="ignore"):
            expected = sample_reference(logits, batch).tolist()
        for isa in ISAS:
            core.set_isa(isa)
            tokens = sampled(logits, batch)
            wrong = [i for i in range(len(batch)) if tokens[i] != expected[i]]
            assert not wrong, (isa, wrong[0], tokens[wrong[0]], expected[wrong[0]], batch[wrong[0]])


@pytest.mark.parametrize("isa", SOME_ISAS)
def test_model_like_rows_equal_the_references(isa):
    """Rows like a model's equal the reference's at usual settings."""
    core.set_isa(isa)
    rng, V = np.random.default_rng(4), 49152
    settings = [dict(), dict(top_k=0), dict(top_k=0, top_p=0.95), dict(top_k=40, top_p=0.95), dict(top_k=0, min_p=0.05),
                dict(temperature=0.0), dict(top_k=5000), dict(top_k=0, temperature=1.5), dict(repetition_penalty=1.1)]
    for scale in (1, 2.5, 5):
        logits = (rng.standard_normal((len(settings), V)) * scale).astype(np.float32)
        for position in range(math.ceil(4 * SHARE)):
            rows = [SampleRow(SamplingParams(**(dict(seed=position) | chosen)), position, [1, 2, 2], 1) for chosen in settings]
            assert sampled(logits, rows) == sample_reference(logits, rows).tolist()


@pytest.mark.parametrize("isa", SOME_ISAS)
def test_tokens_have_the_bits_of_record(isa):
    core.set_isa(isa)
    generator, made = exact(8), []
    for V in (1, 63, 257, 5003):
        logits = np.concatenate((generator.standard_normal((30, V), np.float32) * np.float32(3), generator.integers(-3, 4, (10, V)).astype(np.float32)))
        params = [SamplingParams(seed=i, temperature=(0, 0.8, 1.0, 1.5)[i % 4], top_k=(0, 5, 40)[i % 3], top_p=(1.0, 0.9, 0.5)[i // 3 % 3], min_p=(0.0, 0.05)[i // 9 % 2],
                                 repetition_penalty=(1.0, 1.25)[i % 2]) for i in range(len(logits))]
        made.append(sampled(logits, [SampleRow(own, 2**40 + i, [0, V - 1, V // 2], 1) for i, own in enumerate(params)]))
    agree("tokens", *made)


@pytest.mark.parametrize("isa", SOME_ISAS)
def test_top_p_counts_all_that_top_k_kept(isa):
    """top_p is of all that top_k kept, whatever min_p will drop."""
    core.set_isa(isa)
    line = np.random.default_rng(5).standard_normal(5000).astype(np.float32)
    falling = np.sort(line.astype(np.float64))[::-1]
    params = SamplingParams(temperature=1.0, top_k=700, top_p=0.5, min_p=math.exp(falling[500] - falling[0]))
    assert len(survivors(line, params)[0]) < 300         # 500 of the 700 pass min-p; top-p over all 5000 would keep more
    logits, rows = np.repeat(line[None], 300, axis=0), [SampleRow(params, position) for position in range(300)]
    assert sampled(logits, rows) == sample_reference(logits, rows).tolist()


def test_the_generator_gives_random123_s_answers():
    assert core._core.philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert core._core.philox([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert core._core.philox([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0]) == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_a_row_draws_the_same_token_anywhere():
    """A row draws the same token alone, in any order and at any stride."""
    rng = np.random.default_rng(7)
    logits, rows = any_batch(rng, 5000)
    together = sampled(logits, rows)
    assert together == [sampled(logits[i:i + 1], rows[i:i + 1])[0] for i in range(len(rows))]
    order = rng.permutation(len(rows))
    assert [together[i] for i in order] == sampled(logits[order], [rows[i] for i in order])
    wide = np.full((len(rows), 5007), np.float32(1e9))
    wide[:, 3:5003] = logits
    assert sampled(wide[:, 3:5003], rows) == together
    assert sampled(logits[::2], rows[::2]) == together[::2]


def test_logits_stay_as_they_were():
    logits, rows = any_batch(np.random.default_rng(8), 700)
    before = logits.copy()
    logits.flags.writeable = False
    sampled(logits, rows)
    assert logits.tobytes() == before.tobytes()


def test_a_row_with_a_negative_position_is_left_out():
    logits = np.zeros((3, 10), np.float32)
    rows = [SampleRow(SamplingParams(temperature=0), position) for position in (4, -1, 0)]
    assert sampled(logits, rows) == [0, -1, 0]


def test_a_sampler_follows_growing_answers():
    """A sampler keeps up with answers that grow and batches that change."""
    rng, V = np.random.default_rng(10), 900
    sampler = core.Sampler()
    params = [any_params(rng, V) for _ in range(6)]
    contexts = [rng.integers(0, V, 12).tolist() for _ in params]
    for step in range(40):
        some = sorted(rng.choice(6, rng.integers(1, 7), replace=False)) if step % 5 == 0 else some
        logits = (rng.standard_normal((len(some), V)) * 3).astype(np.float32)
        rows = [SampleRow(params[i], len(contexts[i]), contexts[i], 12) for i in some]
        with np.errstate(all="ignore"):
            expected = sample_reference(logits, rows).tolist()
        assert sampler(logits, rows) == expected
        for i, token in zip(some, expected):
            contexts[i].append(token)


# --- wrong calls ----------------------------------------------------------------------------------------------------


def small_batch(count=2, V=8, **params):
    return core.SampleBatch([SampleRow(SamplingParams(**params), 1)] * count, V)


GOOD = np.zeros((2, 8), np.float32)
WRONG_CALLS = {
    "logits: must be float32": lambda: core.sample(GOOD.astype(np.float64), small_batch()),
    r"logits: .*shape \(2, 8\), not \(8,\)": lambda: core.sample(GOOD[0], small_batch()),
    r"logits: .*shape \(2, 8\), not \(2, 7\)": lambda: core.sample(GOOD[:, :7], small_batch()),
    r"logits: .*shape \(2, 8\), not \(1, 8\)": lambda: core.sample(GOOD[:1], small_batch()),
    "logits: .*contiguous within": lambda: core.sample(np.zeros((8, 2), np.float32).T, small_batch()),
    "logits: .*contiguous within each row": lambda: core.sample(np.zeros((2, 16), np.float32)[:, ::2], small_batch()),
    "logits: .*rows apart": lambda: core.sample(np.broadcast_to(GOOD[0], (2, 8)), small_batch()),
    "logits: .*not aligned": lambda: core.sample(np.zeros(65, np.uint8)[1:].view(np.float32).reshape(2, 8), small_batch()),
    "logits: .*numpy array or a torch tensor": lambda: core.sample([[0.0] * 8] * 2, small_batch()),
    "tokens: .*int32": lambda: core.sample(GOOD, small_batch(), np.zeros(2, np.int64)),
    "tokens: .*shape": lambda: core.sample(GOOD, small_batch(), np.zeros(3, np.int32)),
    "tokens: .*contiguous": lambda: core.sample(GOOD, small_batch(), np.zeros(4, np.int32)[::2]),
    "tokens: .*read-only": lambda: core.sample(GOOD, small_batch(), np.frombuffer(bytes(8), np.int32)),
    "vocab_size": lambda: small_batch(V=0),
    r"rows\[0\].params.temperature": lambda: small_batch(temperature=math.nan),
    r"rows\[0\].params.top_p": lambda: small_batch(top_p=math.nan),
    r"rows\[0\].params.min_p": lambda: small_batch(min_p=math.nan),
    r"rows\[0\].params.repetition_penalty": lambda: small_batch(repetition_penalty=0.0),
    r"rows\[0\].params.frequency_penalty": lambda: small_batch(frequency_penalty=math.inf),
    r"rows\[0\].params.presence_penalty": lambda: small_batch(presence_penalty=math.nan),
    r"rows\[0\].params.seed": lambda: small_batch(seed=-1),
    r"rows\[0\].params.choice": lambda: small_batch(choice=2**32),
    r"rows\[0\].params.logit_bias": lambda: small_batch(logit_bias=((8, 1.0),)),
    r"rows\[0\].params.logit_bias: ": lambda: small_batch(logit_bias=((-1, 1.0),)),
    "rows: .*positions": lambda: core.SampleBatch([SampleRow(SamplingParams(), 2**63)], 8),
    "rows: .*rows with positions": lambda: small_batch(2).update([SampleRow(SamplingParams(), 1)] * 3),
    "rows: .*tokens": lambda: core.SampleBatch([SampleRow(SamplingParams(repetition_penalty=2.0), 1, [8])], 8),
    "rows: .*tokens ": lambda: core.SampleBatch([SampleRow(SamplingParams(repetition_penalty=2.0), 1, [-1])], 8),
    "rows: each of a row's tokens": lambda: core.SampleBatch([SampleRow(SamplingParams(repetition_penalty=2.0), 1, ["a"])], 8),
    "threads": lambda: core.set_threads(0),
    "isa": lambda: core.set_isa("avx1024"),
}


@pytest.mark.parametrize("complaint", WRONG_CALLS)
def test_a_wrong_sampling_call_names_the_argument(complaint):
    """A wrong call is a value error that names the argument."""
    with pytest.raises(ValueError, match=complaint):
        WRONG_CALLS[complaint]()


def test_a_tensor_on_another_device_is_refused():
    tensor = type("Tensor", (), dict(shape=(2, 8), dtype="torch.float32", device=type("device", (), {"type": "cuda"}),
                                     data_ptr=lambda self: 64, stride=lambda self: (8, 1)))()
    with pytest.raises(ValueError, match="logits: must be on the CPU"):
        core.sample(tensor, small_batch())


# --- runtime ---------------------------------------------------------------------------------------------------------


def run_python(code: str, **environment) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment})


@pytest.mark.parametrize("isa", SOME_ISAS)
def test_the_environment_forces_an_instruction_set(isa):
    said = run_python("from chatlm.worker.kernels import compiled; print(compiled.info()['isa'])", DECODE_CORE_ISA=isa)
    assert said.stdout.strip() == isa, said.stderr


def test_an_unknown_instruction_set_fails_the_import():
    """An unknown instruction set in the environment is an import error."""
    said = run_python("from chatlm.worker.kernels import compiled", DECODE_CORE_ISA="avx1024")
    assert said.returncode and "ImportError" in said.stderr and "avx1024" in said.stderr


def test_a_missing_library_fails_the_import(tmp_path):
    """A package that was installed without a compiler is an import error that says so."""
    package = tmp_path / "decode_core"
    package.mkdir()
    (package / "__init__.py").touch()
    said = run_python(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from chatlm.worker.kernels import compiled")
    assert "ImportError: decode_core is not installed" in said.stderr


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_the_number_of_threads_changes_no_token(threads):
    rng = np.random.default_rng(threads)
    for _ in range(math.ceil(30 * SHARE)):
        logits, rows = any_batch(rng, 2000)
        core.set_threads(1)
        alone = sampled(logits, rows)
        core.set_threads(threads)
        assert [sampled(logits, rows) for _ in range(20)] == [alone] * 20


def test_idle_helpers_sleep_and_wake_up_again():
    logits, rows = any_batch(np.random.default_rng(1), 300)
    core.set_threads(4)
    for _ in range(3):
        expected = sampled(logits, rows)
        deadline = time.monotonic() + 30
        while core._core.sleeping_threads() < 3:
            assert time.monotonic() < deadline, "helpers still spin"
            time.sleep(0.001)
        assert sampled(logits, rows) == expected


def test_several_python_threads_may_sample_at_once():
    rng = np.random.default_rng(2)
    core.set_threads(3)
    batches = [any_batch(rng, 1500) for _ in range(4)]
    expected, got = [sampled(*batch) for batch in batches], [[] for _ in batches]

    def work(i):
        got[i] = [sampled(*batches[i]) for _ in range(30)]

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert got == [[tokens] * 30 for tokens in expected]


def test_python_goes_on_while_tokens_are_drawn():
    """With a huge switch interval the main thread runs during the call only if the call releases the GIL."""
    logits = np.zeros((48, 151936), np.float32)
    batch = core.SampleBatch([SampleRow(SamplingParams(top_k=0, top_p=0.9), 1)] * len(logits), logits.shape[1])
    before, started, ended = sys.getswitchinterval(), threading.Event(), []

    def work():
        started.set()
        core.sample(logits, batch)
        ended.append(True)

    sys.setswitchinterval(100)
    try:
        worker = threading.Thread(target=work)
        worker.start()
        started.wait()
        assert not ended
    finally:
        sys.setswitchinterval(before)
    worker.join()


def test_a_forked_child_makes_its_own_pool():
    said = run_python("""
import os, numpy as np
from chatlm.worker.kernels import compiled as core
from types import SimpleNamespace as Row
params = Row(temperature=1, top_k=0, top_p=1, min_p=0, presence_penalty=0, frequency_penalty=0, repetition_penalty=1,
             logit_bias=(), seed=1, choice=0)
batch = core.SampleBatch([Row(params=params, position=i) for i in range(64)], 1000)
logits = np.zeros((64, 1000), np.float32)
core.set_threads(3)
expected = core.sample(logits, batch).tolist()
child = os.fork()
if child == 0:
    os._exit(0 if all(core.sample(logits, batch).tolist() == expected for _ in range(50)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert core.sample(logits, batch).tolist() == expected
print("good")
""")
    assert said.stdout.strip() == "good", said.stderr
