"""setup.py with compilers that only say what they were asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from chatlm.common.core import torch_installed

ROOT = Path(__file__).resolve().parents[2]
COMPILER = """#!/bin/sh
out=; for each; do [ "$before" = -o ] && out=$each; before=$each; done
echo "$0 $*" >> "$LOG"; touch "$out"
"""


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def build(tmp_path, nvcc, gpu=True, **variables):
    """What came of setup.py's build_ext with these variables, a compiler that writes down its calls, and `nvcc`, a shell script; "" for none.
    gpu: there is a driver of NVIDIA's."""
    compiler = script(tmp_path / "g++", COMPILER)
    (tmp_path / "bin").mkdir()
    if nvcc:
        script(tmp_path / "bin" / "nvcc", nvcc)
    if gpu:
        script(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DECODE_CORE_")}
    environment |= {"CXX": compiler, "LDSHARED": compiler, "LDCXXSHARED": compiler, "LOG": str(tmp_path / "log"),
                    "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables}
    return subprocess.run([sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path / "objects"), "--build-lib", str(tmp_path / "lib")],
                          cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize("quick", (False, True))
def test_only_a_quick_check_compiles_for_one_gpu(tmp_path, quick):
    """Only where a quick check is asked for, CUDA is compiled for one GPU and hardly optimized."""
    assert build(tmp_path, COMPILER, **({"DECODE_CORE_QUICK": "1"} if quick else {})).returncode == 0
    calls = [line for line in (tmp_path / "log").read_text().splitlines() if "/nvcc " in line and ".cu " in line]
    assert calls and all(("-Ofc=max" in call) == quick and ("sm_80" in call) != quick and "sm_90" in call for call in calls)


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU here")
@pytest.mark.parametrize("wanted, gpu, compiled", [("", False, False), ("", True, True), ("1", False, True), ("0", True, False)])
def test_cuda_is_compiled_where_there_is_a_gpu_or_it_is_wanted(tmp_path, wanted, gpu, compiled):
    done = build(tmp_path, COMPILER, gpu, DECODE_CORE_QUICK="1", **({"DECODE_CORE_CUDA": wanted} if wanted else {}))
    assert done.returncode == 0, done.stderr
    assert ("/nvcc " in (tmp_path / "log").read_text()) == compiled


def test_a_gpu_without_nvcc_is_told_what_to_install(tmp_path):
    if os.path.exists("/usr/local/cuda/bin/nvcc"):
        pytest.skip("there is an nvcc here, which setup.py finds")
    done = build(tmp_path, "", PATH=f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert "There is a GPU here, but no nvcc" in done.stderr and "DECODE_CORE_CUDA=1" in done.stderr


def test_a_failing_nvcc_costs_the_cuda_half_alone(tmp_path):
    done = build(tmp_path, "#!/bin/sh\necho unsupported GNU version >&2\nexit 1\n")
    assert done.returncode == 0 and "decode_core's CUDA half was not compiled" in done.stderr, done.stderr
    *_, linked = (tmp_path / "log").read_text().splitlines()
    objects = [part for part in linked.split() if part.endswith(".o")]
    assert any("/bindings_tiles.cpp-cpython" in part for part in objects) and "cudart" not in linked
    made = {line.split()[-1]: line for line in (tmp_path / "log").read_text().splitlines()}
    assert not [part for part in objects if "DECODE_CORE_CUDA" in made[part] or "/cuda/" in part]


def test_without_a_compiler_torch_gets_the_program(tmp_path):
    """Without a compiler only a Python with torch gets the program."""
    done = build(tmp_path, COMPILER, CXX="false", DECODE_CORE_CUDA="0")
    if torch_installed():
        assert done.returncode == 0 and "chat_server still works, with slower kernels; install g++ or clang" in done.stderr, done.stderr
    else:       # CI runs this in such an environment too
        assert done.returncode and done.stderr.splitlines()[-1].endswith("install g++ or clang, or torch, then run pip again"), done.stderr


def test_a_trial_on_aarch64_without_apt_ends_well(tmp_path):
    """Where there is no apt, the trial on aarch64 says so and ends well."""
    for name in ("bash", "dirname", "uname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run([tmp_path / "bash", "csrc/aarch64.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={"PATH": str(tmp_path), "DECODE_CORE_AARCH64_BUILD": str(tmp_path / "built")})
    assert (done.returncode, done.stderr) == (0, "") and done.stdout in (
        f"decode_core was not tried on aarch64: {why}\n" for why in ("there is no apt here", "this machine is one, so all tests run there"))
