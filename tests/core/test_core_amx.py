"""AMX as an instruction set: when it may be used, who says so, from how many rows on, and what it leaves to VNNI. That its
bits are those of every other is in test_core_tiles.py and test_core_program.py, whose tests run on emulated tiles too."""

import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

compiled = pytest.importorskip("chatlm.worker.kernels.compiled", exc_type=ImportError)
from chatlm.worker.kernels.library import _core  # noqa: E402
from chatlm.worker.kernels.tiles import KINDS  # noqa: E402

EMULATED = [name for name in _core.isas_for_tests() if name.startswith("amx")]
TEST_SETS = "amx-emulated-portable" in EMULATED       # were those compiled that exist for tests alone (setup.py)?
HAS_AMX, KEPT = 3 << 24, 3 << 17            # in cpuid 7's EDX; in XCR0


@pytest.fixture(autouse=True)
def usual_instructions():
    before = _core.isa()
    yield
    _core.set_isa(before)


def product(matrix, x):
    out = np.full((len(x), matrix.rows), np.nan, np.float32)
    compiled.multiply(x, matrix, out=out)
    return out


@pytest.mark.parametrize("edx, xcr0, error, reason", [
    (0, KEPT, 0, "this CPU does not offer amx"),
    (1 << 24, KEPT, 0, "this CPU does not offer amx"),          # tiles without products of int8
    (HAS_AMX, 1 << 17, 0, "the operating system does not keep AMX's registers, so it cannot be used"),
    (HAS_AMX, KEPT, errno.EPERM, "the operating system refuses AMX (Operation not permitted)"),
    (HAS_AMX, KEPT, errno.EINVAL, "the operating system refuses AMX (Invalid argument)"),       # Linux before 5.16
    (HAS_AMX, KEPT, 0, "")])
def test_amx_needs_cpu_system_and_permission(edx, xcr0, error, reason):
    """It needs the CPU, the operating system and its permission."""
    assert _core.amx_refusal_of(edx, xcr0, error) == reason


def test_amx_is_offered_where_nothing_refuses_it():
    info = compiled.info()
    assert ("amx_int8" in info["features"]) == (_core.amx_refusal() == "")
    assert ("amx" in info["offered_isas"]) == ("amx_int8" in info["features"] and "amx" not in info["left_out_isas"])
    assert info["offered_isas"][-1] == "portable"
    if _core.amx_refusal():
        with pytest.raises(ValueError, match="^isa: "):
            _core.set_isa("amx")
    assert info["amx_refused"] == ("" if _core.amx_refusal().startswith("this CPU") else _core.amx_refusal())


def test_sets_for_tests_are_there_or_say_how():
    vnni = "avx512_vnni" in compiled.info()["features"]
    for name, able in (("amx-emulated-portable", True), ("amx-emulated", vnni), ("avxvnni-evex", vnni)):
        assert (name in _core.isas_for_tests()) == (able and TEST_SETS)
        if able and not TEST_SETS:
            with pytest.raises(ValueError, match=f"^isa: {name} is compiled with DECODE_CORE_TEST_SETS=1 alone$"):
                _core.set_isa(name)


def run_python(code, **environment):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment})


def test_avx_vnni_is_offered_where_the_cpu_has_it():
    info = compiled.info()
    assert ("avxvnni" in info["offered_isas"]) == ("avx_vnni" in info["features"] and "avxvnni" not in info["left_out_isas"])
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        assert ("avx_vnni" in info["features"]) == ({"avx_vnni", "avx2", "fma", "f16c"} <= set(cpuinfo.read_text().split()))


def test_neon_s_byte_products_need_their_cpu():
    """NEON's products of bytes are offered exactly where the CPU has them."""
    info, arm = compiled.info(), platform.machine() in ("aarch64", "arm64")
    assert [name for name in info["offered_isas"] if name in ("i8mm", "dotprod", "neon")] == (
        [name for name, feature in (("i8mm", "i8mm"), ("dotprod", "asimddp")) if feature in info["features"]] + ["neon"] * arm)
    for name in {"i8mm", "dotprod", "neon"} - {*info["offered_isas"]}:
        with pytest.raises(ValueError, match=f"^isa: this CPU does not offer {name}$"):
            _core.set_isa(name)


def test_what_was_left_out_is_refused_and_said():
    """A set of this CPU is offered or left out, never both; that of most use is missed where it was left out."""
    info = compiled.info()
    assert not {*info["left_out_isas"]} & {*info["offered_isas"]} and info["offered_isas"][-1] == "portable"
    assert info["missed_isa"] in ("", *info["left_out_isas"])
    for name in info["left_out_isas"]:
        with pytest.raises(ValueError, match="^isa: "):
            _core.set_isa(name)


def test_every_set_of_x86_is_tested():
    if left_out := compiled.info()["left_out_isas"]:
        pytest.skip(f"decode_core was compiled without {', '.join(left_out)}, whose tests are left out: DECODE_CORE_SETS=all "
                    "pip install . compiles them")


def test_the_first_offered_instruction_set_is_taken():
    best = compiled.info()["offered_isas"]
    said = run_python("from chatlm.worker.kernels import compiled; print(compiled.info()['isa'])", DECODE_CORE_ISA="amx,avx512,avxvnni,avx2,i8mm,dotprod,neon,portable")
    assert said.stdout.split() == best[:1], said.stderr
    said = run_python("from chatlm.worker.kernels import compiled", DECODE_CORE_ISA="sse,portable")
    assert "DECODE_CORE_ISA=sse,portable: amx, avx512, avxvnni, avx2, i8mm, dotprod, neon or portable, not sse" in said.stderr


WITH_TILES = ["q8_0", "q4_0", "q4_1", "q4_k", "q5_k", "mxfp4", "u4_g32", "u4_g128", "q2_k", "q3_k", "iq3_xxs", "iq1_m", "i8_row"]


@pytest.mark.parametrize("kind", [*WITH_TILES, "q6_k", "f32"])
@pytest.mark.parametrize("isa", EMULATED)
def test_the_measurement_gives_rows_or_never(isa, kind):
    """The measurement gives a number of rows or never."""
    _core.set_isa(isa)
    assert _core.amx_rows(KINDS[kind], 576) == 1          # tests want tiles for every row
    least = _core.measure_amx_rows(KINDS[kind], 256)      # -1: the bits differ
    assert least == 0 if kind in ("q6_k", "f32") and least == 0 else 0 <= least <= 48
    _core.set_isa("portable")
    assert _core.amx_rows(KINDS[kind], 576) == 0
    with pytest.raises(ValueError, match="^isa: "):
        _core.measure_amx_rows(KINDS[kind], 256)


@pytest.mark.parametrize("kind, columns", [("q8_0", 32 * 1025), ("q2_k", 256 * 129)])
def test_many_columns_go_by_tiles_or_elsewhere(kind, columns):
    """Many columns go by tiles or are left to other kernels."""
    matrix = compiled.Matrix(compiled.Arena(1 << 20), kind, 32, columns)
    generator = np.random.default_rng(0)
    matrix.fill(generator.standard_normal((32, columns)).astype(np.float32), "f32")
    x = generator.standard_normal((17, columns)).astype(np.float32)
    expected = product(matrix, x)
    for isa in EMULATED:
        _core.set_isa(isa)
        np.testing.assert_array_equal(product(matrix, x), expected)
