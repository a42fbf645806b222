"""The compiled library: what uses it, and one of another version or that does not load."""

import inspect
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

import chat_server as cs
import patching
from chatlm.common import core
from chatlm.common.errors import ConfigError
from chatlm.common.interface import INTERFACE
from chatlm.common.invocation import pip_command
from chatlm.worker.kernels.choosing import choose_backend, load_kernels
from chatlm.worker.kernels.kernels import Backend, EagerRunner, StepRunner
from flat_models import ModelSpec, model_of
from chatlm.worker.ops.references import REFERENCES
from real_server import ask, events, get, post, server

SCRIPT = Path(cs.__file__)
needs_core = pytest.mark.skipif(core.decode_core() is None, reason="the compiled core is not installed")
SPEC = ModelSpec(vocab_size=64, layers=1, width=32, heads=2, kv_heads=1, head_size=16, ffn_size=32,
                 max_positions=64)


@needs_core
def test_importing_the_compiled_kernels_needs_no_torch():
    code = "from chatlm.worker.kernels import compiled, cpu_backend; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=SCRIPT.parent)
    loaded = {*run.stdout.split()}
    assert "chatlm.worker.kernels.program" in loaded and not {"torch", "chat_server", "gguf"} & loaded
    proofs = {f"chatlm.worker.kernels.{name}" for name in ("cpu_proof", "product_proof", "proof", "random_blocks", "report", "timing")}
    assert not proofs & loaded


@needs_core
def test_every_backend_has_what_the_references_have():
    """A backend has what the references' backend has."""
    from chatlm.worker.kernels.cpu_backend import CpuBackend, ProgramRunner
    from chatlm.worker.kernels.cuda_backend import CudaBackend
    from chatlm.worker.kernels.cuda_runner import GraphRunner
    names = {name for name in vars(Backend("cpu")) | vars(Backend) if not name.startswith("__")}
    sizes = model_of(SPEC)
    for backend, runner in ((CpuBackend(sizes), ProgramRunner), (CudaBackend(sizes, None), GraphRunner)):
        assert [name for name in names if not hasattr(backend, name)] == []
        steps = {name for name in vars(EagerRunner) if not name.startswith("__")}
        assert [name for name in steps if not hasattr(runner, name)] == []
        assert backend.converted({}, {}) == "" if backend.as_stored else True


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "mps", "cuda:1", torch.device("meta")])
def test_shapes_without_kernels_get_the_references(device):
    """A device or shape without kernels gets the references."""
    odd = replace(SPEC, head_size=528)
    backend = choose_backend(device, model_of(odd))
    assert type(backend) is Backend and backend.as_stored is None
    assert set(load_kernels("cpu", model_of(odd)).names.values()) == {"torch/reference", "numpy/reference"}
    with pytest.raises(ConfigError, match="--quantize needs decode_core and a CPU"):
        load_kernels("cpu", model_of(odd), quantize="q8_0")


@needs_core
@pytest.mark.parametrize("isa", ["portable", "dotprod"])
@pytest.mark.parametrize("seconds, ours", [((1.0, 2.0), True), ((3.0, 2.0), False)])
def test_portable_kernels_must_not_be_slower_than_torch(monkeypatch, caplog, seconds, ours, isa):
    """Kernels that may be slow compute where they are no slower than torch."""
    from chatlm.worker.kernels import cpu_backend, devices
    monkeypatch.delenv("DECODE_CORE_ISA", raising=False)
    monkeypatch.setattr(cpu_backend._core, "isa", lambda: isa)
    monkeypatch.setattr(cpu_backend, "answer_seconds", lambda width: seconds)
    cpu_backend.slower_than_torch.cache_clear()
    devices.say_once.cache_clear()
    try:
        for _ in range(2):
            assert (type(choose_backend("cpu", model_of(SPEC))) is not Backend) is ours
        assert [r.getMessage() for r in caplog.records] == ([] if ours else [
            f"decode_core's {isa} kernels take 1.5 times as long here: torch computes instead"])
        monkeypatch.setenv("DECODE_CORE_ISA", isa)       # but who names it gets it
        cpu_backend.slower_than_torch.cache_clear()
        assert choose_backend("cpu", model_of(SPEC)).name == f"decode_core/{isa}"
    finally:
        cpu_backend.slower_than_torch.cache_clear()


@needs_core
def test_the_measurement_of_portable_kernels_runs():
    from chatlm.worker.kernels import cpu_backend
    assert min(cpu_backend.answer_seconds(48, rows=32)) > 0


def setup_py():
    return runpy.run_path(str(SCRIPT.parent / "setup.py"), run_name="setup_of_decode_core")


def test_the_program_needs_the_interface_of_the_checkout(monkeypatch):
    monkeypatch.chdir(SCRIPT.parent)
    assert setup_py()["interface"]() == INTERFACE


STUB, OPS = "csrc/decode_core/_core.pyi", "csrc/ops.def"


@pytest.mark.parametrize("name, before, after, same", [
    (STUB, "def isa() -> str", "def isas() -> str", False), (STUB, "def set_isa(isa: str)", "def set_isa(name: str)", False),
    (STUB, "CPU_FEATURES: list[str]", "CPU_FEATURES: list[str]\nMORE: int", False), (OPS, "OP(copy, ROW, CPU,", "OP(copied, ROW, CPU,", False),
    (OPS, "FIELD(float, cap)", "FIELD(double, cap)", False), (STUB, "# --- sample ---", "# --- draws ---", True),
    (STUB, "def isa() -> str: ...", "def isa(\n) -> str: ...", True), (OPS, "// Together a layer's experts", "// The experts of a layer", True)])
def test_what_changes_the_interface(monkeypatch, tmp_path, name, before, after, same):
    """Functions, their parameters and ops do; comments and layout do not. The compiler is not asked for another interface."""
    for each in (STUB, OPS, "csrc/weights.def", "csrc/activations.def", "setup.py", "chatlm/common/interface.py"):
        (tmp_path / each).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / each).write_text((SCRIPT.parent / each).read_text(encoding="utf-8"))
    text = (tmp_path / name).read_text()
    assert before in text
    (tmp_path / name).write_text(text.replace(before, after))
    monkeypatch.chdir(tmp_path)
    setup = setup_py()
    assert (setup["interface"]() == INTERFACE) == same
    if not same:
        with pytest.raises(SystemExit, match=f"has changed: write INTERFACE = {setup['interface']()} in chatlm/common/interface.py"):
            setup["check_interface"]()


@needs_core
def test_ops_are_recorded_with_reference_parameters():
    """Ops are recorded with the parameters of their references."""
    from chatlm.worker.kernels.compiled import Program
    other_names = {"weight": "matrix", "plan": "attention"}
    for name, reference in REFERENCES.items():
        if not hasattr(Program, name) or name == "sample":              # which is no op of a batch, but a step's last
            continue
        _, *ours = inspect.signature(getattr(Program, name)).parameters
        theirs = [*inspect.signature(reference).parameters]
        if name in ("linear", "paged_attention", "text_attention"):
            theirs = [other_names.get(each, each) for each in theirs]
        if ours[-1:] == ["options"]:                                       # passed on to rope_job
            theirs = [each for each in theirs if each in ours] + ["options"]
        assert ours == theirs, name


def foreign_core(folder, text):
    """An environment in which `import decode_core` finds a package of this text."""
    (folder / "decode_core").mkdir(parents=True)
    (folder / "decode_core" / "__init__.py").write_text(text)
    return os.environ | {"PYTHONPATH": str(folder)}


# What a package of before November 2026 does: its library is imported with it, and has no interface
OLD = """
import sys, types
from . import __name__ as package
_core = sys.modules[f"{package}._core"] = types.ModuleType("_core")
_core.SEAM = 999
"""


@pytest.mark.parametrize("text, said", [
    (OLD, f"decode_core has another version (interface unknown instead of {INTERFACE}), so slower"),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        (OLD.replace("SEAM = 999", "INTERFACE = 3"), f"decode_core has another version (interface 3 instead of {INTERFACE})"),
        ("raise ImportError('no compiled half')", "decode_core is not installed, so slower")))])
def test_a_core_of_another_version_is_left_alone(text, said, tmp_path):
    """A core of another version is named and left alone."""
    env = foreign_core(tmp_path, text)
    run = subprocess.run([sys.executable, SCRIPT, "--version"], capture_output=True, text=True, env=env,
                         timeout=60)
    assert (run.returncode, run.stderr) == (0, "") and said in run.stdout
    refused = subprocess.run([sys.executable, SCRIPT, "generate", "--prompt", "hi", "--quantize", "q8_0",
                              str(Path(__file__).parents[1] / "fixtures" / "nanochat" / "gen5")],
                             capture_output=True, text=True, timeout=120, env=env)
    assert refused.returncode == 2 and f"--quantize needs decode_core and a CPU; {said}" in refused.stderr
    assert "Traceback" not in refused.stderr


ALL_SETS = {"isa": "amx", "left_out_isas": [], "missed_isa": "", "amx_refused": "", "cuda_compiled": False}
SAID = "decode_core runs with"


@pytest.mark.parametrize("changes, gpus, line, usual", [
    ({}, 0, f"{SAID} amx instructions", True),
    ({"left_out_isas": ["avxvnni", "avx2"]}, 0, f"{SAID} amx instructions (compiled without avxvnni, avx2)", True),
    ({"isa": "portable", "left_out_isas": ["amx", "avx512"], "missed_isa": "amx"}, 0,
     f"{SAID} portable instructions; this CPU has amx, which it was compiled without: "
     "`DECODE_CORE_SETS=all {pip}` in the checkout brings it", False),
    ({"cuda_compiled": True}, 1, f"{SAID} amx instructions, compiled with CUDA too", True),
    ({"cuda_compiled": True, "left_out_isas": ["avx2"]}, 1,
     f"{SAID} amx instructions (compiled without avx2), compiled with CUDA too", True),
    ({}, 2, f"{SAID} amx instructions; it has no CUDA kernels, so torch computes on the GPU: "
     "`DECODE_CORE_CUDA=1 {pip}` in the checkout, where nvcc is, compiles them", False)])
def test_the_start_says_what_the_core_lacks(monkeypatch, changes, gpus, line, usual):
    """What this machine misses is a line of the log, what only others would miss is not."""
    monkeypatch.delenv("CHAT_SERVER_KERNELS", raising=False)
    info = ALL_SETS | changes
    patching.patch(monkeypatch, core, "decode_core", lambda: SimpleNamespace(left_out_isas=lambda: info["left_out_isas"]))
    patching.patch(monkeypatch, core, "core_info", lambda _: info)
    patching.patch(monkeypatch, core, "find_core", lambda: (None, ""))
    patching.patch(monkeypatch, core, "device_files", lambda: gpus)
    patching.patch(monkeypatch, core, "torch_installed", lambda: True)
    assert core.kernels_line() == line.replace("{pip}", pip_command("."))
    assert core.as_expected(core.kernels_line()) == usual


@pytest.fixture(scope="module")
def portable_library():
    """The folder of a decode_core as another CPU's build would be here: one without this CPU's sets. What it was compiled
    of stays in the checkout."""
    root, folder = SCRIPT.parent, SCRIPT.parent / "build-portable"
    variables = {"DECODE_CORE_SETS": "portable", "DECODE_CORE_QUICK": "1", "DECODE_CORE_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "-q", "build", "--build-base", folder, "--build-lib", folder / "lib"],
                   cwd=root, env=os.environ | variables, check=True, capture_output=True, timeout=900)
    return folder / "lib"


@pytest.mark.slow
@pytest.mark.timeout(1000)
@pytest.mark.skipif(not Path("/proc/cpuinfo").exists() or " avx2 " not in Path("/proc/cpuinfo").read_text(),
                    reason="only a CPU with AVX2 misses what is left out here")
def test_a_library_without_this_cpu_s_set_runs_portable(portable_library, nanochat_fixtures, tmp_path):
    """It says so at the start, answers as the others do, refuses a set that it lacks, and a bundle of it says what it lacks."""
    alone = os.environ | {"PYTHONPATH": str(portable_library)}
    alone.pop("DECODE_CORE_ISA", None)

    def run(*words, **more):
        return subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=120, env=alone | more)

    log = []
    with server(nanochat_fixtures / "gen5", env=alone, log=log):        # torch may be faster, and is then taken
        pass
    (line,) = [line for line in log if SAID in line]
    assert "runs with portable instructions; this CPU has " in line and "DECODE_CORE_SETS=all" in line
    words = ["generate", nanochat_fixtures / "gen5", "--prompt", "Once", "-m", "20", "--temperature", "0"]
    usual = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, timeout=120)
    assert run(*words, DECODE_CORE_ISA="portable").stdout == usual.stdout != ""
    refused = run(*words, DECODE_CORE_ISA="avx2")
    assert refused.returncode == 2 and "DECODE_CORE_ISA=avx2: decode_core was compiled without avx2; DECODE_CORE_SETS=all" in refused.stderr
    bundled = run("bundle", tmp_path / "a.pyz")
    assert "decode_core was compiled without amx, avx512, avxvnni, avx2, so it is slow on CPUs" in bundled.stdout


BROKEN = "decode_core/_core.cpython-311-x86_64-linux-gnu.so: undefined symbol: _ZN2dc4avx2E"


@pytest.mark.parametrize("text, half, said", [
    ("import decode_core._core", "_core.abi3.so", "ImportError"),
    *(pytest.param(*each, marks=pytest.mark.slow) for each in (
        (f"raise ImportError({BROKEN!r})", "_core.cpython-399-sparc.so", BROKEN),
        ("raise OSError('built for another numpy')", "", "OSError: built for another numpy")))])
def test_a_core_that_does_not_load_is_logged(text, half, said, tmp_path,
                                             nanochat_fixtures):
    """A core that is there and does not load is an error in the log."""
    env = foreign_core(tmp_path, text)
    if half:
        (tmp_path / "decode_core" / half).write_bytes(b"no library")
    log = []
    with server(nanochat_fixtures / "gen3", "--log-format", "json", env=env, log=log) as (_, url):
        stats = get(url + "/stats")
    (error,) = [json.loads(line)["message"] for line in log if '"level":"error"' in line.replace(" ", "")]
    assert "the installed decode_core cannot be loaded (" in error and said in error
    assert stats["decode_core"] == error
    checked = subprocess.run([sys.executable, SCRIPT, "check"], capture_output=True, text=True, env=env, timeout=120)
    assert checked.returncode == 1 and error in checked.stdout, checked


def test_chosen_references_are_no_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("CHAT_SERVER_KERNELS", "reference")
    load_kernels("cpu", model_of(SPEC))
    assert not caplog.records


@needs_core
def test_missing_instructions_end_the_start_in_a_line(nanochat_fixtures):
    line = "DECODE_CORE_ISA=sse2: amx, avx512, avxvnni, avx2, i8mm, dotprod, neon or portable, not sse2"
    code = "from chatlm.common.core import kernels_line; print(kernels_line())"
    command = [sys.executable, SCRIPT, nanochat_fixtures / "gen3", "--port", "0", "--host", "127.0.0.1"]
    said, ended = (
        subprocess.run(arguments, capture_output=True, text=True, timeout=60, cwd=SCRIPT.parent,
                       env=os.environ | {"DECODE_CORE_ISA": "sse2", "PYTHONPATH": os.pathsep.join(sys.path)})
        for arguments in ([sys.executable, "-c", code], command))
    assert said.stdout == line + "\n"
    assert ended.returncode == 2 and ended.stderr.endswith(f"chat_server: {line}\n") and "Traceback" not in ended.stderr


@pytest.mark.parametrize("model", ["gen3", pytest.param("default", marks=pytest.mark.slow)])
def test_a_server_with_another_core_runs_references(model, tmp_path, nanochat_fixtures,
                                                    default_model_path):
    """A server with another version of decode_core says so and runs references."""
    log = []
    path = default_model_path if model == "default" else nanochat_fixtures / model
    with server(path, env=foreign_core(tmp_path, OLD), log=log) as (_, url):
        answer = events(post(url + "/chat/completions", ask("What is the capital of Japan?", max_tokens=8)))
        assert answer[-1]["done"]
        stats = get(url + "/stats")
    assert "decode_core has another version (interface unknown instead of" in "".join(log)
    assert "decode_core has another version (interface unknown instead of" in stats["decode_core"]
    assert set(stats["kernels"].values()) == {"torch/reference", "numpy/reference"}
    assert not stats["row_invariant"]


@needs_core
def test_file_matrices_are_kept_unchanged():
    """Quantized matrices of a file are kept as they are."""
    gguf = pytest.importorskip("gguf")
    from chatlm.worker.kernels.weights import QuantizedMatrix
    dice = numpy.random.default_rng(4)
    kind = gguf.GGMLQuantizationType.Q4_1
    rows = gguf.quantize(dice.normal(0, 1, (48, 64)).astype(numpy.float32), kind)
    shape = numpy.array([64, 48])
    tensor = gguf.gguf_reader.ReaderTensor("w", kind, shape, rows.size, rows.nbytes, 0, rows, None)
    kept = choose_backend("cpu", model_of(SPEC)).as_stored((48, 64), [(tensor, 0)])
    assert isinstance(kept, QuantizedMatrix) and kept.kind == "q4_1" and kept.shape == (48, 64)
    assert numpy.array_equal(kept.parts[0][1], rows)


@needs_core
def test_every_runner_has_what_the_engine_calls():
    from chatlm.worker.kernels.cpu_backend import ProgramRunner
    from chatlm.worker.kernels.cuda_runner import GraphRunner
    wanted = {*StepRunner.__annotations__, "prepare", "start", "finish"}
    for steps in (EagerRunner, ProgramRunner, GraphRunner):
        assert wanted <= set(dir(steps)), steps
