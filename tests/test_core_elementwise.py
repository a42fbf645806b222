"""decode_core's norm, residual and activation: float64 oracles, equal bits on every instruction set, checked arguments."""

import numpy as np
import pytest

decode_core = pytest.importorskip("decode_core", exc_type=ImportError, reason="decode_core is not installed")

ISAS = decode_core.info()["offered_isas"]


@pytest.fixture(params=ISAS)
def isa(request):
    before = decode_core.info()["isa"]
    decode_core.set_isa(request.param)
    yield request.param
    decode_core.set_isa(before)


def random(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def silu(g):
    return g / (1 + np.exp(-g))


@pytest.mark.parametrize("rows, columns", [(1, 16), (3, 64), (5, 576), (100, 1536)])
@pytest.mark.parametrize("weighted", [False, True])
def test_rms_norm_is_the_root_mean_square_norm(isa, rows, columns, weighted):
    x, weight = random(rows, columns, seed=1, scale=3), random(columns, seed=2) if weighted else None
    out = np.full_like(x, np.nan)
    decode_core.rms_norm(x, weight, 1e-5, out)
    wide = x.astype(np.float64)
    expected = wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * (1 if weight is None else weight)
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("rows, columns", [(1, 16), (7, 1536), (64, 1536)])
def test_swiglu_relu2_and_add_are_what_their_names_say(isa, rows, columns):
    x, y = random(rows, 2 * columns, seed=3, scale=5), random(rows, columns, seed=4)
    x[0, :6] = [0, -0.0, 80, -80, 200, -200]
    out = np.full((rows, columns), np.nan, np.float32)
    decode_core.swiglu(x, out)
    with np.errstate(over="ignore"):
        expected = silu(x[:, :columns].astype(np.float64)) * x[:, columns:]
    np.testing.assert_allclose(out, expected, rtol=2e-6, atol=1e-30)
    decode_core.relu2(x[:, :columns], out)
    np.testing.assert_array_equal(out, np.maximum(x[:, :columns], 0) ** 2)
    decode_core.add(out, y, out)
    np.testing.assert_array_equal(out, np.maximum(x[:, :columns], 0) ** 2 + y)


def test_every_instruction_set_batch_and_thread_count_gives_the_same_bits():
    x, weight, gate_up = random(70, 576, seed=5), random(576, seed=6), random(70, 3072, seed=7, scale=4)
    results = {}
    before = decode_core.info()["isa"], decode_core.get_threads()
    try:
        for isa in ISAS:
            for threads in (1, 2):
                decode_core.set_isa(isa)
                decode_core.set_threads(threads)
                normed, hidden = np.empty_like(x), np.empty((70, 1536), np.float32)
                decode_core.rms_norm(x, weight, 1e-5, normed)
                decode_core.swiglu(gate_up, hidden)
                results[isa, threads] = normed.tobytes() + hidden.tobytes()
                row = np.empty((1, 576), np.float32)
                decode_core.rms_norm(x[33:34], weight, 1e-5, row)
                assert row.tobytes() == normed[33].tobytes()
    finally:
        decode_core.set_isa(before[0])
        decode_core.set_threads(before[1])
    assert len(set(results.values())) == 1


def test_a_wrong_argument_is_a_value_error_that_names_it():
    x, out = random(4, 64), np.empty((4, 64), np.float32)
    for call, name in [
        (lambda: decode_core.rms_norm(x.astype(np.float64), None, 1e-5, out), "x"),
        (lambda: decode_core.rms_norm(x[:, :60], None, 1e-5, out), "x"),
        (lambda: decode_core.rms_norm(x.T, None, 1e-5, out), "x"),
        (lambda: decode_core.rms_norm(x, random(63), 1e-5, out), "weight"),
        (lambda: decode_core.rms_norm(x, None, 1e-5, out[:3]), "out"),
        (lambda: decode_core.add(x, random(4, 48), out), "y"),
        (lambda: decode_core.add(x, [1.0], out), "y"),
        (lambda: decode_core.swiglu(x, out), "gate_up"),
        (lambda: decode_core.relu2(x, np.empty((4, 32), np.float32)), "out"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()
    out.flags.writeable = False
    with pytest.raises(ValueError, match="^out:"):
        decode_core.relu2(x, out)


def test_bfloat16_is_widened_exactly_and_rounded_once():
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(random(9, 128, seed=8)).bfloat16()
    wide, narrow = torch.empty(9, 64), torch.empty(9, 64, dtype=torch.bfloat16)
    decode_core.swiglu(x.float(), wide)
    decode_core.swiglu(x, narrow)
    assert torch.equal(narrow, wide.bfloat16())
    total = torch.empty(9, 128)
    decode_core.add(x.float(), x, total)
    assert torch.equal(total, x.float() * 2)
    normed = torch.empty(9, 128, dtype=torch.bfloat16)
    plain = torch.empty(9, 128)
    decode_core.rms_norm(x.float(), None, 1e-5, normed)
    decode_core.rms_norm(x.float(), None, 1e-5, plain)
    assert torch.equal(normed, plain.bfloat16())
