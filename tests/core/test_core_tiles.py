"""decode_core's tiles: float64 oracles, equal bits on every instruction set, batch and split, GGUF's packing,
argument checks."""

import gc
import math
import subprocess
import sys

import numpy as np
import pytest

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from instruction_sets import SOME_ISAS, each_isa  # noqa: E402
from nightly import WHOLE, by_day  # noqa: E402
from record import agree, exact  # noqa: E402
import row_ops  # noqa: E402

# GGUF's blocks; those whose scales are no float16 have them in `s`. The seeds of a type's digests are its place here: new types come last
LAYOUT = {
    "q8_0": [("d", "<f2"), ("q", "i1", 32)], "q4_0": [("d", "<f2"), ("q", "u1", 16)],
    "q4_1": [("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)], "q5_0": [("d", "<f2"), ("q", "u1", 20)],
    "q5_1": [("d", "<f2"), ("m", "<f2"), ("q", "u1", 20)],
    "q4_k": [("d", "<f2"), ("m", "<f2"), ("s", "u1", 12), ("q", "u1", 128)],
    "q5_k": [("d", "<f2"), ("m", "<f2"), ("s", "u1", 12), ("q", "u1", 160)],
    "q6_k": [("q", "u1", 192), ("s", "i1", 16), ("d", "<f2")], "iq4_nl": [("d", "<f2"), ("q", "u1", 16)],
    "iq4_xs": [("d", "<f2"), ("s", "u1", 6), ("q", "u1", 128)], "mxfp4": [("s", "u1"), ("q", "u1", 16)],
    "u4_g32": [("d", "<f2"), ("z", "u1"), ("q", "u1", 16)], "u4_g128": [("d", "<f2"), ("z", "u1"), ("q", "u1", 64)],    # of packed safetensors
    "q2_k": [("s", "u1", 16), ("q", "u1", 64), ("d", "<f2"), ("m", "<f2")], "q3_k": [("q", "u1", 96), ("s", "u1", 12), ("d", "<f2")],
    "iq3_s": [("d", "<f2"), ("q", "u1", 108)], "iq3_xxs": [("d", "<f2"), ("q", "u1", 96)], "iq2_s": [("d", "<f2"), ("q", "u1", 80)],
    "iq2_xs": [("d", "<f2"), ("q", "u1", 72)], "iq2_xxs": [("d", "<f2"), ("q", "u1", 64)], "iq1_s": [("d", "<f2"), ("q", "u1", 48)],
    "iq1_m": [("q", "u1", 48), ("s", "u1", 8)], "tq1_0": [("q", "u1", 52), ("d", "<f2")], "tq2_0": [("q", "u1", 64), ("d", "<f2")],
    "nvfp4": [("s", "u1", 4), ("q", "u1", 32)], "q1_0": [("d", "<f2"), ("q", "u1", 16)], "q2_0": [("d", "<f2"), ("q", "u1", 16)],
    "q2_0_g128": [("d", "<f2"), ("q", "u1", 32)], "i8_row": [("d", "<f4"), ("q", "i1", 256)]}
OF_ONE_BYTE = ["i8_row"]         # types whose x has one byte and one step in a whole row
FLOATS, QUANTIZED, FROM_FILES = ["f32", "f16", "bf16"], list(LAYOUT), compiled.tiles.FROM_FILES
KINDS, PACKED = FLOATS + QUANTIZED, [kind for kind in LAYOUT if kind not in FROM_FILES]


def block_columns(kind):
    return compiled.tiles.COLUMNS[kind]


def fitting(kind, K):
    """K, or the next number of columns that the type can have."""
    return -(-K // block_columns(kind)) * block_columns(kind) if kind in QUANTIZED else K


@pytest.fixture(params=SOME_ISAS)
def isa(request):
    before = compiled.info()["isa"]
    compiled.set_isa(request.param)
    yield request.param
    compiled.set_isa(before)


@pytest.fixture
def settings():
    """For tests that set the instruction set and the threads themselves."""
    before = compiled.info()["isa"], compiled.get_threads()
    yield
    compiled.set_isa(before[0])
    compiled.set_threads(before[1])


def random(*shape, seed=0, scale=1.0):
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def make_matrix(kind, weights):
    """The weights in tiles of the kind; of kinds that nothing here quantizes to, blocks whose bytes depend on the weights."""
    matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, *weights.shape)
    if kind in FROM_FILES:
        matrix.fill(blocks_from(kind, weights), kind)
    else:
        matrix.fill(weights, "f32")
    return matrix


def blocks_from(kind, weights):
    rows, columns = weights.shape
    mixed = weights.view(np.uint32) * np.uint32(2654435761) >> np.uint32(24)
    blocks = np.zeros((rows, columns // block_columns(kind)), np.dtype(LAYOUT[kind]))
    if kind == "i8_row":                   # more bytes than weights
        blocks["q"] = mixed.astype(np.uint8).view(np.int8).reshape(*blocks.shape, 256)
    else:
        blocks.view(np.uint8)[:] = mixed[:, :blocks.shape[1] * blocks.dtype.itemsize]
    if kind == "iq1_m":                     # d lies in the upper nibbles of its scales: 2^-7 and more
        blocks["s"][..., 7] = blocks["s"][..., 7] & 15 | 0x20
    elif kind == "nvfp4":
        blocks["s"] &= 63
    else:
        blocks["d"] = (1 + blocks["q"][..., 0] / 256) / 128
    if kind in OF_ONE_BYTE:
        blocks["d"] = blocks["d"][:, :1]
    blocks[~weights.any(1)] = 0
    return blocks.view(np.uint8)


def product(x, matrix, columns=None, **options):
    out = np.full((len(x), columns or matrix.rows), np.nan, np.float32)
    compiled.multiply(x, matrix, out=out, **options)
    return out


def products(x, matrix, **options):
    """What every instruction set computes: the same bits."""
    first, *others = [product(x, matrix, **options) for _ in each_isa()]
    for other in others:
        np.testing.assert_array_equal(other, first)
    return first


def as_multiplied(x, kind, fine=False):
    """x in float64 as the products use it: int8 per 32 columns for q types, 16 bits in fine blocks or, if `fine`, in all; for those whose
    scales are whole numbers the same in steps that 256 columns share; unchanged for floats."""
    if kind in FLOATS:
        return x.astype(np.float64)
    if kind in IN_STEPS:
        return in_one_step(x) if kind in OF_ONE_BYTE and not fine else in_steps(x, fine | is_fine(x))
    blocks = x.reshape(len(x), -1, 32)
    amax = np.abs(blocks).max(-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        exact = np.where(amax < 1e-24, np.float32(0), blocks * (np.float32(127) / amax))
    values, scale = np.rint(exact), np.where(amax < 1e-24, np.float32(0), amax / np.float32(127))
    rest = np.clip(np.rint((exact - values) * 256), -127, 127) * (fine | is_fine(x))[..., None]
    return ((values.astype(np.float64) + rest / 256) * scale).reshape(x.shape)


IN_STEPS = ("q2_k", "q3_k", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_s", "iq1_m", *OF_ONE_BYTE)


def in_steps(x, two):
    """x as whole steps, of one byte, or of two in the blocks that `two` says."""
    blocks, two = x.reshape(len(x), -1, 8, 32), two.reshape(len(x), -1, 8, 1)
    size = np.abs(blocks).max(-1, keepdims=True)
    size[size < 1e-24] = 0
    above = np.where(two, size, 0).max(2, keepdims=True) / np.float32(256)
    size = np.maximum(np.where(two, 0, size).max(2, keepdims=True), np.where(above > 0, np.maximum(above, np.float32(1e-24)), 0))
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.where(size > 0, np.rint(blocks * (np.float32(127) / size)), 0).astype(np.float64)
    high = np.rint(whole / 256) * two
    low = np.where(two, np.clip(whole - 256 * high, -127, 127), whole)
    return ((low + 256 * high) * (size / np.float32(127))).reshape(x.shape)


def in_one_step(x):
    """x as whole numbers of one byte, times a step for each row."""
    size = np.abs(x).max(-1, keepdims=True)
    size[size < 1e-24] = 0
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.where(size > 0, np.rint(x * (np.float32(127) / size)), 0).astype(np.float64)
    return whole * (size / np.float32(127))


def is_fine(x):
    """Which blocks (T, K / 32) of x are much larger than the rest of their row."""
    amax = np.abs(x.reshape(len(x), -1, 32)).max(-1).astype(np.float64)
    scale = np.where(amax < 1e-24, 0, amax)
    return scale > 1.5 * scale.mean(-1, keepdims=True)


def with_outliers(x, channels=(40, 41), scale=40):
    """Some channels are large in most rows, one in a single row; some rows have no large channel."""
    x = x.copy()
    x[:, [c for c in channels if c < x.shape[1]]] *= scale
    x[2::5] /= np.maximum(1, np.abs(x[2::5]))
    x[len(x) // 2, -1] = scale
    return x


def assert_product(out, x, matrix, fine=False):
    seen, w = as_multiplied(x, matrix.kind, fine), matrix.dequantize().astype(np.float64)
    assert (np.abs(out - seen @ w.T) <= 1e-5 * (np.abs(seen) @ np.abs(w).T) + 1e-30).all()


def raw_blocks(kind, rows, columns, seed=0, **fields):
    """Random blocks as GGUF stores them, (rows, bytes) uint8; `fields` fix d, m or q."""
    generator = np.random.default_rng(seed)
    blocks = np.zeros((rows, columns // block_columns(kind)), np.dtype(LAYOUT[kind]))
    blocks.view(np.uint8)[:] = generator.integers(0, 256, (rows, blocks.shape[1] * blocks.dtype.itemsize), np.uint8)
    for name in {"d", "m"} & set(blocks.dtype.names):
        blocks[name] = generator.standard_normal(blocks.shape)
    if kind in OF_ONE_BYTE:
        blocks["d"] = blocks["d"][:, :1]
    if kind == "mxfp4":
        blocks["s"] = generator.integers(110, 140, blocks.shape)
    if kind == "iq1_m":
        blocks["s"][..., 7] &= 0xbf         # d is less than 2
    for name, value in fields.items():
        blocks[name] = value
    return blocks.view(np.uint8)


# ---- products

SIZES = [(16, 32), (48, 64), (49, 576), (960, 96), (33, 1536)]


@pytest.mark.parametrize("kind, N, K", by_day([(kind, *size) for size in SIZES for kind in KINDS],
                                              *((kind, *SIZES[number % 5]) for number, kind in enumerate(KINDS))))      # of each type one size by day
def test_a_product_is_that_of_dequantized_weights(settings, kind, N, K):
    K = fitting(kind, K)
    matrix, x = make_matrix(kind, random(N, K, seed=N)), random(11, K, seed=K, scale=3)
    for seen in (x, with_outliers(x)):
        out = products(seen, matrix)
        assert_product(out, seen, matrix)
        exact = seen.astype(np.float64) @ matrix.dequantize().astype(np.float64).T
        most = 2e-2 if kind in OF_ONE_BYTE and seen is not x else 1e-4
        assert ((out - exact) ** 2).mean() < most * (exact**2).mean()


@pytest.mark.parametrize("kind", [kind for kind in QUANTIZED if kind not in OF_ONE_BYTE])
def test_outlying_blocks_have_16_bits(settings, kind):
    """Blocks that stand out of their row have 16 bits."""
    K = fitting(kind, 576)
    matrix, x = make_matrix(kind, random(48, K, seed=1)), random(12, K, seed=2)
    x[:, [100, 300]] = np.float32(57.3)
    assert (is_fine(x).sum(1) == 2).all()
    w, fine = matrix.dequantize().astype(np.float64), np.repeat(is_fine(x), 32, 1)
    error = products(x, matrix) - x.astype(np.float64) @ w.T
    # only the int8 of the rest may be wrong
    quiet = np.where(fine, 0, x).astype(np.float64) @ w.T
    assert (error**2).mean() < 1e-4 * (quiet**2).mean()
    alone = np.where(fine, x, 0)
    error = products(alone, matrix) - alone.astype(np.float64) @ w.T
    assert (np.abs(error) < 57.3 / 127 / 500 * (fine @ np.abs(w).T)).all()


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_row_keeps_its_bits_beside_fine_rows(settings, kind):
    """A row keeps its bits next to rows whose blocks are fine."""
    K = fitting(kind, 576)
    matrix, plain = make_matrix(kind, random(48, K, seed=1)), random(16, K, seed=2)
    # nearly underflowing, nearly overflowing
    plain[5] *= np.float32(1e-23) / np.abs(plain[5]).max()
    plain[6] *= np.float32(9e34) / np.abs(plain[6]).max()
    plain = np.clip(plain, -2 * np.abs(plain).reshape(16, -1, 32).mean((1, 2))[:, None], None)
    loud = plain.copy()
    loud[0::4, [5, 100, 101, 570]] = 50
    assert is_fine(loud)[0::4].any(1).all()
    for _ in each_isa():
        with np.errstate(over="ignore", invalid="ignore"):
            expected = np.concatenate([product(row[None], matrix) for row in loud])
            np.testing.assert_array_equal(product(loud, matrix), expected)
            np.testing.assert_array_equal(np.delete(product(plain, matrix), np.s_[0::4], 0), np.delete(expected, np.s_[0::4], 0))


@pytest.mark.parametrize("kind", KINDS)
def test_fine_products_have_16_bits_everywhere(settings, kind):
    """Fine products have 16 bits in all blocks and the same bits everywhere."""
    K = fitting(kind, 576)
    matrix, x = make_matrix(kind, random(48, K, seed=1)), with_outliers(random(19, K, seed=2))
    x[3, 64:128] = 0
    expected = None
    for _ in each_isa():
        out = product(x, matrix, fine=True)
        assert_product(out, x, matrix, fine=True)
        expected = out if expected is None else expected
        np.testing.assert_array_equal(out, expected)
        for begin, end in ((0, 1), (1, 4), (3, 10), (10, 19)):      # however many rows go together
            np.testing.assert_array_equal(product(x[begin:end], matrix, fine=True), expected[begin:end])
    quiet = random(12, K, seed=3)
    plain, fine = product(quiet, matrix), product(quiet, matrix, fine=True)
    if kind in FLOATS:
        np.testing.assert_array_equal(plain, fine)
    else:
        exact = quiet.astype(np.float64) @ matrix.dequantize().astype(np.float64).T
        assert ((fine - exact)**2).mean() < 1e-8 * (exact**2).mean() < 1e-3 * ((plain - exact)**2).mean()


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("K", [1, 15, 17, 50, 300])
def test_float_tiles_take_any_number_of_columns(settings, kind, K):
    matrix, x, weight = make_matrix(kind, random(20, K)), random(19, K, seed=1), random(K, seed=2)
    assert_product(products(x, matrix), x, matrix)
    wide = x.astype(np.float64)
    normed = (wide / np.sqrt((wide**2).mean(1, keepdims=True) + 1e-5) * weight).astype(np.float32)
    np.testing.assert_allclose(products(x, matrix, norm=(weight, 1e-5)), products(normed, matrix), rtol=1e-4, atol=1e-5)


def test_a_large_vocabulary_is_multiplied():
    head = compiled.Matrix(compiled.Arena(32 << 20), "q8_0", 49152, 576)
    part = random(4096, 576)
    for first in range(0, 3072, 256):
        head.fill(part * np.float32(1 + first), "f32", first_tile=first)
    x = random(3, 576, seed=1)
    out = product(x, head)
    few = compiled.Matrix(compiled.Arena(1 << 20), "q8_0", 4096, 576)
    few.fill(part * np.float32(1 + 2816), "f32")
    np.testing.assert_array_equal(out[:, -4096:], product(x, few))
    assert_product(out[:, -4096:], x, few)


@pytest.mark.parametrize("kind", KINDS)
def test_products_have_the_bits_of_record(isa, kind):
    """Products have the bits of record, whatever rows go together."""
    generator, K = exact(KINDS.index(kind)), fitting(kind, 320)
    matrix, x = make_matrix(kind, generator.standard_normal((49, K), np.float32)), with_outliers(generator.standard_normal((21, K), np.float32))
    assert is_fine(x).any(1).sum() in range(5, 21)
    weight, bias, residual = (generator.standard_normal(shape, np.float32) for shape in (K, 49, (21, 49)))
    starts, made = np.cumsum([0, 1, 2, 3, 4, 11]), []
    for begin, end in zip(starts, starts[1:]):
        made.append(product(x[begin:end], matrix, norm=(weight, 1e-5), bias=bias, activation="relu2", residual=residual[begin:end]))
    agree(f"products {kind}", np.concatenate(made))
    if kind in QUANTIZED:
        agree(f"fine products {kind}", product(x, matrix, norm=(weight, 1e-5), fine=True))


def test_activations_have_the_bits_of_record(isa):
    generator = exact(3)
    matrix = make_matrix("f32", generator.standard_normal((96, 40), np.float32))
    x = generator.standard_normal((9, 40), np.float32) * np.float32(2)
    for activation in compiled.tiles.ACTIVATIONS.keys() - {None}:
        agree(f"activation {activation}", product(x, matrix, 48 if activation in compiled.tiles.GATES else 96, activation=activation))


@pytest.mark.parametrize("kind", KINDS)
def test_bits_depend_on_the_row_alone(settings, kind):
    K = fitting(kind, 96)
    matrix, x, weight = make_matrix(kind, random(49, K)), with_outliers(random(33, K, seed=1)), random(K, seed=2)
    residual, bias = random(33, 49, seed=3), random(49, seed=4)

    def run(rows, **split):
        return product(x[rows], matrix, norm=(weight, 1e-5), bias=bias, activation="relu2", residual=residual[rows], **split)
    compiled.set_threads(2)
    expected = run(slice(33))
    for _ in each_isa():
        for threads in (1, 2):
            compiled.set_threads(threads)
            for tiles, groups in [(0, 0), (1, 1), (3, 2), (4, 5)]:
                np.testing.assert_array_equal(run(slice(33), _tiles_at_once=tiles, _groups_at_once=groups), expected)
        for count in range(1, 33) if WHOLE else (1, 2, 3, 5, 8, 15, 16, 17, 31):
            np.testing.assert_array_equal(run(slice(count)), expected[:count])
        np.testing.assert_array_equal(run(slice(20, 21)), expected[20:21])


@pytest.mark.parametrize("kind", QUANTIZED)
def test_random_blocks_have_the_same_bits_everywhere(settings, kind):
    """Every instruction set gives the same bits for random blocks."""
    K = fitting(kind, 576)
    matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, 64, K)
    matrix.fill(raw_blocks(kind, 64, K), kind)
    x = random(19, K, seed=5) * np.exp(random(19, K, seed=6, scale=4))
    results = set()
    for _ in each_isa():
        results.add(product(x, matrix).tobytes())
    assert len(results) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_product_s_norm_has_the_bits_of_rms_norm(settings, kind, weighted):
    K = fitting(kind, 576)
    matrix, x, weight = make_matrix(kind, random(32, K)), random(9, K, seed=1), random(K, seed=2) if weighted else None
    for _ in each_isa():
        np.testing.assert_array_equal(product(x, matrix, norm=(weight, 1e-5)), product(row_ops.rms_norm(x, weight, 1e-5), matrix))


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_1"])
def test_bias_activation_and_residual_keep_this_order(settings, kind):
    matrix, x = make_matrix(kind, random(41, 64)), random(10, 64, seed=1)
    bias, residual, plain = random(41, seed=2), random(10, 41, seed=3), products(x, matrix)
    np.testing.assert_array_equal(products(x, matrix, bias=bias), plain + bias)
    np.testing.assert_array_equal(products(x, matrix, bias=bias, activation="relu2", residual=residual),
                                  residual + np.maximum(plain + bias, 0) ** 2)
    for _ in each_isa():
        out = residual.copy()
        compiled.multiply(x, matrix, residual=out, out=out)
        np.testing.assert_array_equal(out, residual + plain)


@pytest.mark.parametrize("kind", ["f16", "q4_0", "q4_1"])
@pytest.mark.parametrize("F", [16, 40, 96])
@pytest.mark.parametrize("activation", compiled.tiles.GATES)
def test_a_gate_and_its_up_come_from_alternate_tiles(settings, kind, F, activation):
    gate_of = {"swiglu": lambda gate, up: row_ops.silu(gate) * up, "geglu": lambda gate, up: row_ops.gelu_tanh(gate) * up,
               "clamped_swiglu": row_ops.clamped_swiglu, "gelu": lambda gate, up: row_ops.gelu_erf(gate) * up,
               "reglu2": lambda gate, up: row_ops.relu2(gate) * up, "quick_geglu": lambda gate, up: row_ops.gelu_quick(gate) * up}[activation]
    gate, up, x, residual = random(F, 64, seed=1), random(F, 64, seed=2), random(9, 64, seed=3), random(9, F, seed=4)
    matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, 2 * -(-F // 16) * 16, 64)
    matrix.fill(gate, "f32", first_tile=0, tile_step=2)
    matrix.fill(up, "f32", first_tile=1, tile_step=2)
    halves = make_matrix(kind, gate), make_matrix(kind, up)
    for _ in each_isa():
        gated, upped = (product(x, half) for half in halves)
        expected = gate_of(gated, upped)
        np.testing.assert_array_equal(product(x, matrix, F, activation=activation), expected)
        np.testing.assert_array_equal(product(x, matrix, F, activation=activation, residual=residual), residual + expected)
    bias = random(matrix.rows, seed=5)
    biased = [half + bias.reshape(-1, 2, 16)[:, i].reshape(-1)[:F] for i, half in enumerate((gated, upped))]
    g = biased[0].astype(np.float64)
    wide = {"swiglu": g / (1 + np.exp(-g)) * biased[1], "geglu": g / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (g + 0.044715 * g**3))) * biased[1],
            "clamped_swiglu": np.minimum(g, 7) / (1 + np.exp(-1.702 * np.minimum(g, 7))) * (np.clip(biased[1], -7, 7) + 1),
            "gelu": g / 2 * (1 + np.vectorize(math.erf)(g / 2**0.5)) * biased[1], "reglu2": np.maximum(g, 0) ** 2 * biased[1],
            "quick_geglu": g / (1 + np.exp(-1.702 * g)) * biased[1]}[activation]
    assert g.max() > 7 < abs(biased[1]).max()           # both limits are passed
    np.testing.assert_allclose(products(x, matrix, columns=F, activation=activation, bias=bias), wide, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", sorted({*compiled.tiles.ACTIVATIONS} - {None, *compiled.tiles.GATES}))
def test_an_activation_without_gates_is_its_formula(settings, activation):
    x, matrix = np.concatenate([random(30, 16, seed=7), random(3, 16, seed=8) * 20]), np.eye(16, dtype=np.float32)
    of = {"relu2": row_ops.relu2, "gelu_tanh": row_ops.gelu_tanh, "gelu_erf": row_ops.gelu_erf, "gelu_quick": row_ops.gelu_quick}[activation]
    found, y = products(x, make_matrix("f32", matrix), activation=activation), x.astype(np.float64)
    for _ in each_isa():
        np.testing.assert_array_equal(found, of(x))
    wide = {"relu2": np.maximum(y, 0) ** 2, "gelu_tanh": y / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (y + 0.044715 * y**3))),
            "gelu_erf": y / 2 * (1 + np.vectorize(math.erf)(y / 2**0.5)), "gelu_quick": y / (1 + np.exp(-1.702 * y))}[activation]
    np.testing.assert_allclose(found, wide, rtol=1e-6, atol=2e-7 * max(1, abs(y).max()))


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_1"])
@pytest.mark.parametrize("columns", [1, 16, 31, 49])
def test_nothing_is_written_beyond_out_s_columns(settings, kind, columns):
    matrix, x = make_matrix(kind, random(49, 64)), random(9, 64, seed=1)
    residual = np.full((9, columns), 0.5, np.float32)
    for _ in each_isa():
        paper = np.full((9, 80), -7, np.float32)
        compiled.multiply(x, matrix, out=paper[:, :columns], residual=residual)
        assert (paper[:, columns:] == -7).all()
        np.testing.assert_array_equal(paper[:, :columns], product(x, matrix)[:, :columns] + np.float32(0.5))


# ---- extremes

@pytest.mark.parametrize("kind", QUANTIZED)
def test_integer_sums_are_exact_at_their_extremes(settings, kind):
    # bytes of q: codes all zeros or all ones
    least, most = (-128, 127) if kind in ("q8_0", "i8_row") else (0, 255)
    generator, K = np.random.default_rng(0), fitting(kind, 96)
    scales = {"d": 1, "m": 0, "z": 3, "s": {"mxfp4": 128, "q6_k": 1}.get(kind, 0x41)}       # with which most products here are exact
    fields = {name: value for name, value in scales.items() if name in np.dtype(LAYOUT[kind]).names}
    for low, high in [(least, least), (most, most), (least, most)]:
        q = generator.choice([low, high], (32, K // block_columns(kind), *np.dtype(LAYOUT[kind])["q"].shape))
        matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, 32, K)
        matrix.fill(raw_blocks(kind, 32, K, q=q, **fields), kind)
        x = np.concatenate([np.full((1, K), 127), np.full((1, K), -127), generator.choice([-127, 127], (7, K))]).astype(np.float32)
        if kind in FROM_FILES:              # whose codes are all that they have
            assert_product(products(x, matrix), x, matrix)
            continue
        np.testing.assert_array_equal(products(x, matrix), x.astype(np.float64) @ matrix.dequantize().astype(np.float64).T)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_tiny_values_count_as_zero(settings, kind):
    """Blocks of zeros and tiny values count as zero."""
    K = fitting(kind, 96)
    weights, x = random(17, K), random(9, K, seed=1)
    weights[3], weights[5, 32:64], x[2], x[4, :32] = 0, 0, 0, 0
    matrix = make_matrix(kind, weights)
    out = products(x, matrix)
    assert_product(out, x, matrix)
    assert (out[2] == 0).all() and (out[:, 3] == 0).all()
    x[6, 32:64] = 1e-35
    assert np.isfinite(products(x, matrix)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_spoils_only_itself(settings, kind, bad):
    K = fitting(kind, 64)
    matrix, x = make_matrix(kind, np.abs(random(16, K)) + 1), random(9, K, seed=1)
    expected = products(x, matrix)
    x[3, 40] = bad
    for _ in each_isa():
        out = product(x, matrix)
        assert not np.isfinite(out[3]).any()
        np.testing.assert_array_equal(np.delete(out, 3, 0), np.delete(expected, 3, 0))


# ---- packing

@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("N, K", [(16, 32), (49, 96), (160, 576)])
def test_a_files_blocks_are_kept_unchanged(kind, N, K):
    few_bits = pytest.importorskip("few_bits")
    K = fitting(kind, K)
    matrix, raw = compiled.Matrix(compiled.Arena(1 << 20), kind, N, K), raw_blocks(kind, N, K, seed=K)
    matrix.fill(raw, kind)
    if kind == "i8_row":
        blocks = raw.view(np.dtype(LAYOUT[kind]))
        values = (blocks["q"] * blocks["d"][..., None]).reshape(N, K)
    else:
        values = with_zero_points(kind, raw) if kind.startswith("u4") else few_bits.values_of(kind, raw)
    np.testing.assert_array_equal(matrix.dequantize(), values)
    assert matrix.nbytes <= {"nvfp4": 1.12, "tq1_0": 1.34}.get(kind, 1.1) * raw.nbytes * (-(-N // 16) * 16 / N) * (-(-K // 128) * 128 / K)      # whole tiles, whole groups


def with_zero_points(kind, raw):
    """d * (q - z) of blocks, whose first nibbles are the low ones of each 16 bytes."""
    blocks = raw.view(np.dtype(LAYOUT[kind]))
    q = blocks["q"].reshape(*blocks.shape, -1, 16)
    codes = np.concatenate((q & 15, q >> 4), -1).reshape(*blocks.shape, -1).astype(np.float32)
    return ((codes - blocks["z"][..., None]) * blocks["d"].astype(np.float32)[..., None]).reshape(len(raw), -1)


@pytest.mark.parametrize("kind", ["u4_g32", "u4_g128"])
def test_packing_with_zero_points_is_like_q4_1(kind):
    """Packing with zero points is about as good as Q4_1."""
    weights = random(64, 2048)
    plain = ((make_matrix("q4_1", weights).dequantize() - weights) ** 2).mean()
    for scale in (1, 1e-2):
        packed = make_matrix(kind, weights * np.float32(scale)).dequantize() / np.float32(scale)
        assert ((packed - weights) ** 2).mean() < (1.3 if kind == "u4_g32" else 2) * plain
    for weights in weights_to_pack(32, 256):        # what is 0 stays 0
        assert not make_matrix(kind, weights).dequantize()[weights == 0].any()


def weights_to_pack(N, K):
    steps = np.round(random(N, K, seed=1, scale=40)) / 2                     # many halves and ties
    for weights in (random(N, K), steps.astype(np.float32), random(N, K, scale=1e-6), np.zeros((N, K), np.float32)):
        weights[0, :32] = np.abs(weights[0, :32])
        yield weights


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "mxfp4"])
@pytest.mark.parametrize("N, K", [(16, 32), (49, 96), (160, 576)])
def test_packing_agrees_with_gguf(kind, N, K):
    quants = pytest.importorskip("gguf.quants")
    kind_there = __import__("gguf").GGMLQuantizationType[kind.upper()]
    matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, N, K)
    for weights in weights_to_pack(N, K):
        matrix.fill(weights, "f32")
        np.testing.assert_array_equal(matrix.dequantize(), quants.dequantize(quants.quantize(weights, kind_there), kind_there))


# The error that ggml's own quantizer leaves, as a share of the weights' mean square: of normal ones, of normal ones times exp(normal).
@pytest.mark.parametrize("kind, normal, heavy", [("q4_k", 0.00512, 0.00980), ("q5_k", 0.00132, 0.00268), ("q6_k", 0.00032, 0.00083),
                                                 ("iq4_nl", 0.00581, 0.01131), ("iq4_xs", 0.00590, 0.01159),
                                                 ("q3_k", 0.02278, 0.03052), ("q2_k", 0.08819, 0.13095)])
def test_packing_by_search_is_like_ggml_s(kind, normal, heavy):
    """Packing by search is about as good as ggml's."""
    plain = random(64, 2048)
    for weights, error in [(plain, normal), (plain * np.exp(random(64, 2048, seed=1)), heavy), (plain / 100, normal)]:
        packed = make_matrix(kind, weights).dequantize()
        assert ((packed - weights) ** 2).mean() < 1.05 * error * (weights**2).mean()
    assert not make_matrix(kind, np.zeros((16, 256), np.float32)).dequantize().any()
    nothing = make_matrix(kind, np.full((16, 256), np.nan, np.float32)).dequantize()
    assert nothing.shape == (16, 256)                                       # whatever it is


@pytest.mark.parametrize("kind", PACKED)
def test_repacking_keeps_values_or_comes_close(kind):
    """What was packed already is packed to the same values or close by."""
    once = make_matrix(kind, random(32, 512, seed=3)).dequantize()
    twice = make_matrix(kind, once).dequantize()
    assert ((twice - once) ** 2).mean() < 2e-3 * (once**2).mean()


@pytest.mark.parametrize("kind", FLOATS + PACKED)
def test_16_bit_rows_are_widened_first(kind):
    """float16 and bfloat16 rows are widened first."""
    K = fitting(kind, 64)
    half = random(33, K).astype(np.float16)
    brain = (random(33, K, seed=1).view(np.uint32) >> 16).astype(np.uint16)
    for source, source_kind, wide in [(half, "f16", half.astype(np.float32)),
                                      (half.view(np.uint8), "f16", half.astype(np.float32)),
                                      (brain, "bf16", (brain.astype(np.uint32) << 16).view(np.float32)),
                                      (brain.view(np.uint8), "bf16", (brain.astype(np.uint32) << 16).view(np.float32))]:
        matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, 33, K)
        matrix.fill(source, source_kind)
        np.testing.assert_array_equal(matrix.dequantize(), make_matrix(kind, wide).dequantize())
        if kind in ("f32", source_kind):
            np.testing.assert_array_equal(matrix.dequantize(), wide)


def test_float_kinds_round_to_nearest():
    weights = np.concatenate([random(32, 50), random(1, 50, scale=1e-7), random(1, 50, scale=1e5)])
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(make_matrix("f16", weights).dequantize(), weights.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(make_matrix("f32", weights).dequantize(), weights)
    bits = weights.view(np.uint32)
    rounded = ((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000).view(np.float32)
    np.testing.assert_array_equal(make_matrix("bf16", weights).dequantize(), rounded)


@pytest.mark.parametrize("kind", FLOATS + PACKED)
def test_parts_land_on_the_tiles_they_are_sent_to(settings, kind):
    K = fitting(kind, 64)
    parts = [random(rows, K, seed=rows) for rows in (48, 16, 20)]
    matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, 96, K)
    compiled.set_threads(2)
    matrix.fill(parts[0], "f32", first_tile=0, tile_step=2)
    matrix.fill(parts[1], "f32", first_tile=1)
    # with gaps between rows
    matrix.fill(np.concatenate([parts[2], parts[2]], 1)[:, :K], "f32", first_tile=3, tile_step=2)
    tiles = matrix.dequantize().reshape(6, 16, K)
    np.testing.assert_array_equal(tiles[[0, 2, 4]].reshape(48, K), make_matrix(kind, parts[0]).dequantize())
    np.testing.assert_array_equal(tiles[1], make_matrix(kind, parts[1]).dequantize())
    np.testing.assert_array_equal(tiles[[3, 5]].reshape(32, K)[:20], make_matrix(kind, parts[2]).dequantize())
    # rows missing from a part are zero
    assert (tiles[5, 4:] == 0).all()


def infinite(source_kind, sign=0):
    """(NaN, the smallest NaN, infinity, the largest number) as bits of a type."""
    bits = {"f32": (0x7fc00000, 0x7f800001, 0x7f800000, 0x7f7fffff), "f16": (0x7e00, 0x7c01, 0x7c00, 0x7bff),
            "bf16": (0x7fc0, 0x7f81, 0x7f80, 0x7f7f)}[source_kind]
    unsigned = np.dtype("u4" if source_kind == "f32" else "u2")
    return [unsigned.type(each | sign << 8 * unsigned.itemsize - 1) for each in bits]


@pytest.mark.parametrize("kind", FLOATS + PACKED)
@pytest.mark.parametrize("source_kind", by_day(FLOATS, "bf16"))
def test_filling_tells_of_nan_or_infinite_floats(kind, source_kind):
    N, K = 33, fitting(kind, 72)
    unsigned, generator = infinite(source_kind)[0].dtype, np.random.default_rng(0)
    places = [*enumerate([(0, 0), (15, K - 1), (16, 63), (N - 1, 64), (N - 1, K - 1)])]
    for place, (row, column) in places if WHOLE else places[len(kind) % 2::2]:
        for sign in (0, 1) if WHOLE else [place // 2 % 2]:
            nan, quiet, infinity, largest = infinite(source_kind, sign)
            source = generator.integers(0, 1 << 13 if unsigned.itemsize == 2 else 1 << 29, (N, K)).astype(unsigned)     # small numbers
            for value, expected in [(nan, False), (quiet, False), (infinity, False), (source[row, column], True)]:
                matrix, spoilt = compiled.Matrix(compiled.Arena(1 << 20), kind, 48, K), source.copy()
                spoilt[row, column] = value
                matrix.fill(source[:16].view(np.uint8), source_kind)
                assert matrix.finite
                matrix.fill(spoilt.view(np.uint8), source_kind)
                assert matrix.finite is expected
                matrix.fill(source[:16].view(np.uint8), source_kind)        # what was seen is kept in mind
                assert matrix.finite is expected
            spoilt[row, column] = largest
            matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, 48, K)
            matrix.fill(spoilt.view(np.uint8), source_kind)
            assert matrix.finite is bool(np.isfinite(matrix.dequantize()).all())
            assert matrix.finite or kind not in (source_kind, "f32")


@pytest.mark.parametrize("kind", QUANTIZED)
def test_filling_tells_of_a_file_s_infinite_scales(kind):
    """Filling tells of a file's scales that are NaN or infinite."""
    N, K = 20, fitting(kind, 160)
    fields = {name: 3 for name in {"d", "m"} & set(np.dtype(LAYOUT[kind]).names)} | ({"s": 100} if kind == "mxfp4" else {})
    raw = raw_blocks(kind, N, K, **fields)
    for name in fields:
        bad, good = ((253, 254, 255), (0, 252)) if name == "s" else ((np.inf, -np.inf, np.nan), (0, 65504, -65504))
        for value in (*bad, *good):
            for row, block in ((0, 0), (N - 1, -1), (7, -1)):
                blocks = raw.view(np.dtype(LAYOUT[kind])).copy()
                blocks[name][row, block] = value
                matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, N, K)
                matrix.fill(blocks.view(np.uint8), kind)
                assert matrix.finite is (value in good), (name, value, row)


@pytest.mark.parametrize("kind", KINDS)
def test_embed_reads_rows_as_dequantize_does(kind):
    K = fitting(kind, 96)
    matrix = make_matrix(kind, random(49, K))
    ids, paper = np.array([48, 0, 17, 17] * 20), np.full((80, K + 4), -7, np.float32)
    compiled.embed(matrix, ids, paper[:, :K])
    np.testing.assert_array_equal(paper[:, :K], matrix.dequantize()[ids])
    assert (paper[:, K:] == -7).all()


# ---- tiles of several types

MIXES = [("q4_k", "q6_k"), ("q5_0", "q8_0"), ("q4_k", "q5_k", "q6_k", "iq4_xs", "q8_0", "mxfp4", "q4_0", "q4_1", "iq4_nl", "q5_1"),
         ("q4_k", "iq2_xxs", "q2_k", "iq3_s", "q3_k", "iq1_m")]


@pytest.mark.parametrize("mix", MIXES, ids="+".join)
def test_a_mixed_matrix_has_the_bits_of_its_parts(settings, mix):
    """A matrix of several types has the bits of its parts."""
    K, x = 512, with_outliers(random(37, 512, seed=9))      # three panels
    parts = [random(32, K, seed=i) for i in range(len(mix))]
    matrix = compiled.Matrix(compiled.Arena(1 << 20), [kind for kind in mix for _ in range(2)], 32 * len(mix), K)
    for i, (kind, part) in enumerate(zip(mix, parts)):
        source = raw_blocks(kind, 32, K, seed=i) if i % 2 else part
        matrix.fill(source, kind if i % 2 else "f32", first_tile=2 * i)
        parts[i] = compiled.Matrix(compiled.Arena(1 << 20), kind, 32, K)
        parts[i].fill(source, kind if i % 2 else "f32")
    assert matrix.nbytes == sum(part.nbytes for part in parts)
    np.testing.assert_array_equal(matrix.dequantize(), np.concatenate([part.dequantize() for part in parts]))
    for _ in each_isa():
        expected = np.concatenate([product(x, part) for part in parts], 1)
        np.testing.assert_array_equal(product(x, matrix), expected)
        np.testing.assert_array_equal(product(x[3:4], matrix), expected[3:4])


@pytest.mark.parametrize("kinds", [("q4_k", "q6_k"), ("q2_k", "q2_k"), ("iq2_xs", "q3_k"), ("q3_k", "q4_k")], ids="+".join)
def test_gate_and_up_may_be_of_different_types(settings, kinds):
    x, parts = random(41, 256, seed=3), []
    matrix = compiled.Matrix(compiled.Arena(1 << 20), list(kinds) * 3, 96, 256)
    for i, kind in enumerate(kinds):
        weights = random(48, 256, seed=i)
        parts.append(make_matrix(kind, weights))
        source = (blocks_from(kind, weights), kind) if kind in FROM_FILES else (weights, "f32")
        matrix.fill(*source, first_tile=i, tile_step=2)
    for _ in each_isa():
        expected = row_ops.silu(product(x, parts[0])) * product(x, parts[1])
        for rows in (9, 41):
            np.testing.assert_array_equal(product(x[:rows], matrix, 48, activation="swiglu"), expected[:rows])


def test_an_arena_grows_and_outlives_its_name():
    arena = compiled.Arena(1)
    matrices = [compiled.Matrix(arena, "f32", 1024, 512 * i) for i in (1, 2, 3)]
    assert arena.used_bytes == sum(matrix.nbytes for matrix in matrices) <= arena.reserved_bytes
    assert all(matrix.tiles.address % 64 == 0 for matrix in matrices)
    tiles = matrices[2].tiles
    matrices[2].fill(random(1024, 1536), "f32")
    expected = matrices[2].dequantize()
    del arena, matrices
    gc.collect()
    out = np.empty((1024, 1536), np.float32)
    tiles.embed(np.arange(1024).ctypes.data, 0, out.ctypes.data, 1536)      # a null address: no rows
    ids = np.arange(1024)
    tiles.embed(ids.ctypes.data, 1024, out.ctypes.data, 1536)
    np.testing.assert_array_equal(out, expected)


# ---- wrong calls

def test_a_wrong_tile_argument_is_named():
    """A wrong argument is a value error that names it."""
    arena = compiled.Arena(1 << 20)
    q4, wide = compiled.Matrix(arena, "q4_1", 48, 64), compiled.Matrix(arena, "f32", 49, 33)
    x, out, rows = random(4, 64), np.empty((4, 48), np.float32), random(48, 64)
    multiply, embed, Matrix = compiled.multiply, compiled.embed, compiled.Matrix
    mixed = Matrix(arena, ["q4_k", "q6_k"], 32, 256)
    read_only = out.copy()
    read_only.flags.writeable = False
    for call, name in [
        (lambda: compiled.Arena(0), "size"),
        (lambda: compiled.Arena(1.5), "size"),
        (lambda: Matrix(None, "f32", 16, 32), "arena"),
        (lambda: Matrix(arena, "q5_9", 16, 32), "kind"),
        (lambda: Matrix(arena, ["q4_k", "f16"], 32, 256), "kind"),
        (lambda: Matrix(arena, ["q4_k", "q6_k"], 16, 256), "kind"),
        (lambda: Matrix(arena, ["q4_k", "q6_k"], 32, 128), "columns"),
        (lambda: Matrix(arena, "iq4_xs", 16, 288), "columns"),
        (lambda: Matrix(arena, "f32", 0, 32), "rows"),
        (lambda: Matrix(arena, "f32", 16, -1), "columns"),
        (lambda: Matrix(arena, "q8_0", 16, 48), "columns"),
        (lambda: q4.fill(rows, "f64"), "source_kind"),
        (lambda: q4.fill(raw_blocks("q8_0", 48, 64), "q8_0"), "source_kind"),
        (lambda: wide.fill(raw_blocks("q8_0", 48, 64), "q8_0"), "source_kind"),
        (lambda: mixed.fill(raw_blocks("q4_k", 32, 256), "q4_k"), "source_kind"),
        (lambda: mixed.fill(raw_blocks("q4_k", 16, 256), "q4_k", first_tile=1), "source_kind"),
        (lambda: Matrix(arena, "iq2_xs", 32, 256).fill(random(32, 256), "f32"), "source_kind"),
        (lambda: q4.fill(rows.astype(np.float64), "f32"), "source"),
        (lambda: Matrix(arena, "i8_row", 16, 512).fill(raw_blocks("i8_row", 16, 512, d=np.float32([1, 2])), "i8_row"), "source"),
        (lambda: q4.fill(rows, "f16"), "source"),
        (lambda: q4.fill(rows[:, :32], "f32"), "source"),
        (lambda: q4.fill(rows[0], "f32"), "source"),
        (lambda: q4.fill(rows.T, "f32"), "source"),
        (lambda: q4.fill(raw_blocks("q4_1", 48, 32), "q4_1"), "source"),
        (lambda: q4.fill(rows[:33], "f32", first_tile=1), "source"),
        (lambda: q4.fill(rows[:33], "f32", tile_step=2), "source"),
        (lambda: q4.fill(rows[:16], "f32", first_tile=3), "first_tile"),
        (lambda: q4.fill(rows[:16], "f32", first_tile=-1), "first_tile"),
        (lambda: q4.fill(rows[:16], "f32", tile_step=0), "tile_step"),
        (lambda: embed(q4, np.array([0, 48]), x[:2].copy()), "ids"),
        (lambda: embed(q4, np.array([-1, 0]), x[:2].copy()), "ids"),
        (lambda: embed(q4, np.array([0]), x[:2].copy()), "ids"),
        (lambda: embed(q4, np.array([0, 1], np.int32), x[:2].copy()), "ids"),
        (lambda: embed(q4, np.array([0, 1]), out[:2]), "out"),
        (lambda: embed(x, np.array([0, 1]), x[:2].copy()), "matrix"),
        (lambda: multiply(x, rows, out=out), "matrix"),
        (lambda: multiply(x[:, :32], q4, out=out), "x"),
        (lambda: multiply(x.astype(np.float16), q4, out=out), "x"),
        (lambda: multiply(x[:, ::-1], q4, out=out), "x"),
        (lambda: multiply(x, q4, out=out[:3]), "out"),
        (lambda: multiply(x, q4, out=np.empty((4, 49), np.float32)), "out"),
        (lambda: multiply(x, q4, out=np.empty((4, 0), np.float32)), "out"),
        (lambda: multiply(x, q4, out=read_only), "out"),
        (lambda: multiply(x, q4, activation="tanh", out=out), "activation"),
        (lambda: multiply(x, q4, activation="swiglu", out=out), "matrix"),
        (lambda: multiply(x, q4, norm=1e-5, out=out), "norm"),
        (lambda: multiply(x, q4, norm=(random(63), 1e-5), out=out), "norm"),
        (lambda: multiply(x, q4, bias=random(47), out=out), "bias"),
        (lambda: multiply(x, q4, residual=out[:, :47], out=out), "residual"),
        (lambda: multiply(x, q4, _tiles_at_once=-1, out=out), "_tiles_at_once"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}:"):
            call()


def test_no_rows_are_no_work():
    matrix = make_matrix("q4_1", random(32, 64))
    compiled.multiply(np.empty((0, 64), np.float32), matrix, out=np.empty((0, 32), np.float32))
    compiled.embed(matrix, np.empty(0, np.int64), np.empty((0, 64), np.float32))
    matrix.fill(np.empty((0, 64), np.float32), "f32")


def test_cuda_numbers_types_as_the_weights_list_does():
    """CUDA numbers the types of blocks as the list of weights does."""
    from chatlm.worker.kernels import cuda
    from chatlm.worker.kernels.library import _core
    packed = [(kind, (columns, _core.row_bytes(code, columns))) for code, (kind, columns) in enumerate(_core.weight_types()) if columns > 1]
    assert [*cuda.BLOCKS.items()] == packed[:len(cuda.BLOCKS)] and [kind for kind, _ in packed[len(cuda.BLOCKS):]] == _core.file_types()


def test_every_weight_type_has_its_blocks_in_chatlm():
    """Every type of the list of weights has its blocks in chatlm."""
    from chatlm.worker.arrays import gguf_types, packed
    from chatlm.worker.kernels.library import _core
    blocks = {kind: (columns, _core.row_bytes(code, columns)) for code, (kind, columns) in enumerate(_core.weight_types()) if columns > 1}
    assert {kind: (gguf_types.block_of(kind.upper())[0], block.bytes) for kind, block in packed.BLOCKS.items()} == blocks
    assert {kind: gguf_types.block_of(kind.upper()) for kind in blocks} == blocks


GROWS = """
import resource, sys, numpy
from chatlm.worker.kernels import compiled

def resident():
    with open("/proc/self/smaps_rollup") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Rss:"))

rows, columns, count, room = map(int, sys.argv[1:])
source = numpy.full((rows, columns), 0.5, numpy.float32)
arena = compiled.Arena(1)
first = compiled.Matrix(arena, "q8_0", rows, columns)
first.fill(source, "f32")
before, used = resident(), arena.used_bytes
if room:
    pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (pages + room, pages + room))
matrices = [compiled.Matrix(arena, "q8_0", rows, columns) for _ in range(count)]
for matrix in matrices:
    matrix.fill(source, "f32")
print(resident() - before, arena.used_bytes - used)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")
@pytest.mark.parametrize("rows, columns, count, room, excess", [(2048, 608, 60, 0, 4 << 20), (4096, 1024, 30, 0, 4 << 20), (2048, 608, 4, 40 << 20, 16 << 20)],
                         ids=["half a huge page each", "two and a bit", "no address space for a whole segment"])
def test_matrices_take_little_more_memory_than_their_weights(rows, columns, count, room, excess):
    """Whatever their size: what a huge page has left goes to the next matrix."""
    found = subprocess.run([sys.executable, "-c", GROWS, *map(str, (rows, columns, count, room))], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    grown, used = map(int, found.stdout.split())
    assert used > count * rows * columns and grown <= used + excess, f"{grown / 1e6:.1f} MB for {used / 1e6:.1f} MB of weights"
