"""`chat_server.py check`: the report, its exit status, and that an op which is wrong is found."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

import chat_server as cs
from chatlm import __version__
from chatlm.common import core
from chatlm.common.interface import INTERFACE

from flat_models import ModelSpec
from command_line import parse_command_line
from real_server import copy_program

SCRIPT = Path(cs.__file__).resolve()
needs_core = pytest.mark.skipif(core.decode_core() is None, reason="the compiled core is not installed")
CPU_OPS = {"embed", "gather_rows", "rms_norm", "layer_norm", "copy", "mix", "smear", "backout", "softcap", "rope_append",
           "paged_attention", "paged_attention q8_0", "sample"}


def check(*arguments, script=SCRIPT, **environment):
    return subprocess.run([sys.executable, script, "check", *arguments], capture_output=True, text=True, timeout=300,
                          env=os.environ | environment)


def rows_of(report):
    """Op -> the lines of the report's tables about it."""
    rows = {}
    for line in report.splitlines():
        rows.setdefault(line[:20].strip(), []).append(line)
    return rows


@pytest.mark.slow
@needs_core
def test_the_report_proves_and_measures_every_cpu_op():
    from chatlm.worker.kernels import compiled, tiles
    run = check()
    assert (run.returncode, run.stderr) == (0, "")
    for words in (f"chat_server {__version__} (interface {INTERFACE}), decode_core (interface {INTERFACE})",
                  f"torch {torch.__version__}", f"Python {sys.version.split()[0]}", "CUDA of torch: ", "driver: ", compiled.info()["isa"],
                  "threads read", "no op is wrong"):
        assert words in run.stdout
    rows = rows_of(run.stdout)
    assert rows.keys() >= CPU_OPS | {f"linear {kind}" for kind in tiles.COLUMNS}
    for op in CPU_OPS | {f"linear {kind}" for kind in tiles.COLUMNS}:
        for line in rows[op]:
            assert line.endswith("as its reference")
            assert op == "gather_rows" or "%" in line
        assert len(rows[op]) == (1 if op == "gather_rows" else 2)       # the default model's shapes, and large ones


WRONG = """
import sys
sys.path.insert(0, {folder!r})
import torch
from chatlm.common.processes.child import run_role
from chatlm.worker.kernels import program, report
report.time_cpu = lambda: ()
def {op}(self, x, *rest, out=None, original=program.Program.{op}, **more):
    {body}
program.Program.{op} = {op}
sys.exit(run_role("check"))
"""


@needs_core
@pytest.mark.parametrize("op, body, found", [
    pytest.param("rms_norm", "return original(self, x, None, rest[1], out)", {"rms_norm"}, marks=pytest.mark.slow),
    pytest.param("softcap", "return original(self, x, 14.0, out)", {"softcap"}, marks=pytest.mark.slow),
    pytest.param("linear", "return original(self, x, rest[0], out, **more | {'norm': None})", None, marks=pytest.mark.slow),
    pytest.param("paged_attention", "return original(self, x, *rest[:2], 0, out, **more)", {"paged_attention", "paged_attention q8_0"}, marks=pytest.mark.slow)])
def test_a_wrong_op_is_named_and_the_status_is_1(op, body, found):
    run = subprocess.run([sys.executable, "-c", WRONG.format(folder=str(SCRIPT.parent), op=op, body=body)],
                         capture_output=True, text=True, timeout=300)
    wrong = {name for name, lines in rows_of(run.stdout).items() if "WRONG: the output differs by" in lines[0]}
    assert (run.returncode, run.stderr) == (1, "")
    assert wrong == found if found else wrong and all(name.startswith("linear ") for name in wrong)
    assert f"{len(wrong)} ops are wrong" in run.stdout


@pytest.mark.parametrize("words", [["model.gguf"], ["--port", "80"], ["--quick"]])
def test_an_unknown_word_of_check_is_one_line(words):
    """A word that `check` does not know is one line and status 2."""
    run = check(*words)
    assert (run.returncode, run.stdout) == (2, "") and run.stderr.count("\n") == 1
    assert words[0] in run.stderr and "Traceback" not in run.stderr


def test_a_copied_program_has_only_references(tmp_path):
    """A copied program says that there are only references."""
    script = copy_program(tmp_path)
    (tmp_path / "decode_core.py").write_text("raise ImportError('not here')")
    run = check(script=script)
    assert (run.returncode, run.stderr) == (0, "")
    assert "decode_core (interface none); decode_core is not installed" in run.stdout and "no compiled kernels here" in run.stdout
    assert f"torch {torch.__version__}" in run.stdout


def test_flags_of_the_environment_leave_check_alone(monkeypatch):
    settings = parse_command_line(["check"], {"CHAT_SERVER_PORT": "x", "CHAT_SERVER_CONFIG": "/nowhere"})
    assert settings.command == "check"


@needs_core
def test_a_type_without_gguf_is_no_failure(monkeypatch):
    """A type without the gguf package is not proved."""
    from chatlm.worker.kernels import cpu_proof, product_proof, report
    monkeypatch.setitem(sys.modules, "gguf", None)
    faults = cpu_proof.prove_cpu()
    unproved = {op for op, fault in faults.items() if isinstance(fault, product_proof.Unproved)}
    assert unproved >= {"linear q4_k", "linear mxfp4"}
    assert faults["rope_append q8_0"] == faults["paged_attention q8_0"] == ""
    assert faults["linear q8_0"] == faults["linear q4_0"] == faults["sample"] == ""
    lines = []
    done = report.Report(1, lines.append)
    done.table(faults, (), 1.0)
    assert done.wrong == 0 and any("linear q6_k" in line and "not proved: the gguf package" in line for line in lines)


@needs_core
def test_without_torch_numpy_proves_the_products(monkeypatch):
    """Without torch, numpy proves the products, and all is measured."""
    from chatlm.worker.kernels import report, tiles
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(report, "time_cpu", lambda: [report.Timed("sample", "1 row", 1e-6, 4000)])
    lines = []
    assert report.Report(2, lines.append).run()
    rows = rows_of("\n".join(lines))
    assert all(rows[f"linear {kind}"][0].endswith("as its reference") for kind in tiles.COLUMNS)
    assert rows["sample"][0].endswith("not proved: torch is missing") and "pip install torch" in lines[-1]


@needs_core
def test_without_torch_a_wrong_product_is_found(monkeypatch):
    from chatlm.worker.kernels import product_proof
    multiply = product_proof.multiply
    monkeypatch.setattr(product_proof, "multiply", lambda x, matrix, out: multiply(x, matrix, out=out, bias=numpy.ones(80, "float32")))
    monkeypatch.setitem(sys.modules, "gguf", None)
    faults = product_proof.prove_products()
    assert "the output differs by" in faults["linear f32"] and "the output differs by" in faults["linear q4_1"]
    assert faults["linear q4_k"] is product_proof.NO_GGUF


# --- GPUs, in the emulation --------------------------------------------------------------------------------------


class Place:
    """A report on an emulated GPU of a small model."""

    def __init__(self, library, monkeypatch, ops=None, queue=None):
        backends = pytest.importorskip("cuda_backends", exc_type=ImportError)
        from chatlm.worker.kernels import cuda, cuda_timing, report
        monkeypatch.setattr(cuda, "SAMPLE_THREADS", 32)
        monkeypatch.setattr(cuda_timing, "CONTEXT", 64)
        spec = ModelSpec(vocab_size=300, layers=1, width=64, heads=4, kv_heads=2, head_size=16, ffn_size=128, max_positions=64, experts=4, experts_per_token=2, sinks=True)
        queue = queue or backends.HostQueue()
        queue.device = torch.device("cpu")
        emulated = backends.Emulated(library, ops or backends.EmulatedOps)
        self.lines = []
        self.report = report.Report(1, self.lines.append)
        self.report.with_cuda(emulated.backend(spec), lambda: queue, "cuda:0: a GPU", cold=1 << 14, calls=2, batches=(1, 2))
        self.rows = rows_of("\n".join(self.lines))


@pytest.mark.slow
@needs_core
def test_every_gpu_kernel_is_proved_and_measured(emulation_library, monkeypatch):
    place = Place(emulation_library, monkeypatch)
    assert place.report.wrong == 0 and "cuda:0: a GPU copies" in place.lines[0]
    from chatlm.worker.kernels import cuda
    for op, lines in (("linear", 2 * len(("bfloat16", *cuda.BLOCKS))), ("experts", 3), ("rope_append", 2), ("paged_attention", 2), ("prompt_attention", 1), ("sample", 2)):
        assert len(place.rows[op]) == lines and all(line.endswith("as its reference") and "%" in line for line in place.rows[op])


@needs_core
def test_latent_attention_is_proved_and_measured(emulation_library, monkeypatch):
    backends = pytest.importorskip("cuda_backends", exc_type=ImportError)
    from chatlm.worker.kernels import cuda_timing, report
    monkeypatch.setattr(cuda_timing, "CONTEXT", 64)
    spec = cuda_timing.latent_model(heads=3, kept=32, turned=16, plain=24, head_values=16, query_width=8)
    queue, lines = backends.HostQueue(), []
    queue.device = torch.device("cpu")
    made = report.Report(1, lines.append)
    made.with_cuda(backends.Emulated(emulation_library).backend(spec), lambda: queue, "cuda:0: a GPU", report.LATENT_OPS, cold=1 << 14, calls=2, batches=(1, 2))
    rows = rows_of("\n".join(lines))
    assert made.wrong == 0 and rows.keys() >= {*report.LATENT_OPS}
    assert all(len(rows[op]) == 2 and all("%" in line for line in rows[op]) for op in ("append_latents", "absorb", "by_head", "paged_attention"))
    assert all(line.endswith("as its reference") for op in report.LATENT_OPS for line in rows[op])


@needs_core
@pytest.mark.slow
def test_a_wrong_kernel_of_a_gpu_is_not_measured(emulation_library, monkeypatch):
    from cuda_backends import wrong_ops
    place = Place(emulation_library, monkeypatch, wrong_ops(paged_attention=lambda out: out.add_(1)))
    assert place.report.wrong == 1 and "%" in place.rows["sample"][0]
    [line] = place.rows["paged_attention"]
    assert "WRONG: the output differs" in line and "%" not in line


@needs_core
def test_a_graph_that_is_not_captured_is_a_failure(emulation_library, monkeypatch):
    """A graph that cannot be captured is a failure of the GPU."""
    from cuda_backends import HostQueue

    class NoGraphs(HostQueue):
        def capture(self, work):
            raise RuntimeError("operation not permitted when stream is capturing")

    place = Place(emulation_library, monkeypatch, queue=NoGraphs())
    assert place.report.wrong == 1 and "cuda:0: a GPU: WRONG: RuntimeError: operation not permitted" in place.lines[-1]
