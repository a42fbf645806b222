"""setup.py with compilers that only say what they were asked for."""

import fcntl
import importlib.util
import os
import platform
import select
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
    assert any("/bindings.cpp" in part and "-cpython" in part for part in objects) and "cudart" not in linked
    made = {line.split()[-1].removesuffix(".part"): line for line in (tmp_path / "log").read_text().splitlines()}
    assert not [part for part in objects if "DECODE_CORE_CUDA" in made[part] or "/cuda/" in part]


def test_without_a_compiler_torch_gets_the_program(tmp_path):
    """Without a compiler only a Python with torch gets the program."""
    done = build(tmp_path, COMPILER, CXX="false", DECODE_CORE_CUDA="0")
    if torch_installed():
        assert done.returncode == 0 and "chat_server still works, with slower kernels; install g++ or clang" in done.stderr, done.stderr
    else:       # CI runs this in such an environment too
        assert done.returncode and done.stderr.splitlines()[-1].endswith("install g++ or clang, or torch, then run pip again"), done.stderr


def setup_py():
    """setup.py as a module, which then does nothing."""
    spec = importlib.util.spec_from_file_location("setup_of_decode_core", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def setup(monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in list(os.environ):
        if name.startswith("DECODE_CORE_"):
            monkeypatch.delenv(name)
    return setup_py()


AVX2 = "sse4_2 avx avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"


@pytest.mark.parametrize("flags, sets", [
    ("", "avx2 avxvnni avx512 vnni amx"),                       # no /proc/cpuinfo
    ("sse4_2 avx", ""), (AVX2, "avx2"), ("avx avx2 f16c", ""), (f"{AVX2} avx_vnni", "avx2 avxvnni"),
    (AVX512, "avx512 avx2"),                                    # whose products are AVX2's
    (f"{AVX2} avx512f avx512cd avx512er", "avx2"),              # Xeon Phi
    (f"{AVX512} avx512_vnni", "avx512 vnni"), (f"{AVX512} avx512_vnni avx_vnni amx_tile", "avx512 vnni"),
    (f"{AVX512} avx512_vnni avx_vnni amx_tile amx_int8", "avx512 vnni amx")])
def test_a_cpu_gets_the_sets_that_it_chooses(setup, flags, sets):
    assert setup.sets_chosen_by(frozenset(flags.split())) == {*sets.split()}


on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="only x86-64 has sets to leave out")


def compiled_sources(log):
    return {Path(part).stem for line in log.read_text().splitlines() for part in line.split() if part.endswith(".cpp")}


@on_x86
@pytest.mark.parametrize("variables, endings", [
    ({"DECODE_CORE_SETS": "all"}, "_avx2 _avxvnni _avx512 _vnni _amx"),
    ({"DECODE_CORE_TEST_SETS": "1"}, "_avx2 _avxvnni _avx512 _vnni _amx"),
    ({"DECODE_CORE_MACHINE": "x86_64"}, "_avx2 _avxvnni _avx512 _vnni _amx"),      # of a cross compiler
    ({"DECODE_CORE_SETS": "avx2,avxvnni"}, "_avx2 _avxvnni"), ({"DECODE_CORE_SETS": "portable"}, "")])
def test_sets_are_compiled_that_were_asked_for(tmp_path, variables, endings):
    assert build(tmp_path, "", gpu=False, DECODE_CORE_CUDA="0", **variables).returncode == 0
    sources = compiled_sources(tmp_path / "log") - {"tiles_emulated_vnni"}
    found = {ending for ending in ("_avx2", "_avxvnni", "_avx512", "_vnni", "_amx") for source in sources if source.endswith(ending)}
    assert found == {*endings.split()} and {"tiles_portable", "rows_portable"} <= sources


@on_x86
def test_a_build_in_a_checkout_is_for_this_cpu(tmp_path, setup):
    assert build(tmp_path, "", gpu=False, DECODE_CORE_CUDA="0").returncode == 0
    sources = compiled_sources(tmp_path / "log") - {"tiles_emulated_vnni"}
    wanted = setup.sets_chosen_by(setup.cpu_flags())
    assert all(any(source.endswith(f"_{name}") for source in sources) == (name in wanted) for name in setup.SETS)
    portable = [line for line in (tmp_path / "log").read_text().splitlines() if "rows_portable.cpp " in line]
    assert ("-O1 " in portable[0]) == bool({*setup.SETS} > wanted > set())       # which this CPU does not choose


@on_x86
def test_an_unknown_set_is_named(tmp_path):
    done = build(tmp_path, "", gpu=False, DECODE_CORE_SETS="avx2,sse5")
    assert done.returncode and done.stderr.endswith(
        "DECODE_CORE_SETS: all, or some of avx2, avxvnni, avx512, vnni, amx and portable, not sse5\n")


@pytest.fixture
def checkout(tmp_path):
    """(a copy of what setup.py reads, variables for it)"""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("csrc", "chatlm", "static"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "chat_server.py"):
        shutil.copy(ROOT / name, folder)
    compiler = str(tmp_path / "g++")
    variables = {name: value for name, value in os.environ.items() if not name.startswith("DECODE_CORE_")}
    return folder, variables | {"CXX": compiler, "LDSHARED": compiler, "LDCXXSHARED": compiler, "LOG": str(tmp_path / "log"),
                                "DECODE_CORE_CUDA": "0"}


def asked_by_pip(checkout, *commands, **more):
    """A process that runs setup.py with each of these commands, as pip does."""
    code = "import subprocess, sys\nfor command in sys.argv[1:]:\n    " \
           "subprocess.run([sys.executable, 'setup.py', '-q', *command.split()], check=True)\nsys.stdin.read()"
    folder, variables = checkout
    return subprocess.Popen([sys.executable, "-c", code, *commands], cwd=folder, env=variables | more, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_compilers(folder):
    """Until no process compiles into the checkout."""
    with open(next((folder / "build").glob("temp.*")) / "compiling", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def test_the_compiler_begins_with_the_metadata_and_ends_with_pip(checkout, tmp_path):
    script(tmp_path / "g++", '#!/bin/sh\n[ "$1" != --version ] || exit 0\nexec 3>"$ALIVE"\necho started >&3\nread line <"$NEVER"\n')
    alive = tmp_path / "alive"
    os.mkfifo(alive)
    os.mkfifo(tmp_path / "never")
    reading = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with asked_by_pip(checkout, f"dist_info --output-dir {tmp_path}", ALIVE=str(alive), NEVER=str(tmp_path / "never")) as pip:
            select.select([reading], [], [])
            os.set_blocking(reading, True)
            assert os.read(reading, 8) == b"started\n"
            pip.communicate()
        assert pip.returncode == 0
        while os.read(reading, 100):        # ends when the last compiler has
            pass
        wait_for_compilers(checkout[0])
    finally:
        os.close(reading)


def test_what_was_compiled_meanwhile_is_linked(checkout, tmp_path):
    script(tmp_path / "g++", COMPILER)
    with asked_by_pip(checkout, f"dist_info --output-dir {tmp_path}", f"build_ext --build-lib {tmp_path / 'lib'}") as pip:
        said = pip.communicate()
    assert pip.returncode == 0, said
    wait_for_compilers(checkout[0])
    *calls, linked = [line for line in (tmp_path / "log").read_text().splitlines() if " -o " in line]
    assert len({line.split()[-1] for line in calls}) == len(calls) == len([part for part in linked.split() if part.endswith(".o")])


def test_no_compiler_beside_pip_if_it_is_not_wanted(checkout, tmp_path):
    script(tmp_path / "g++", COMPILER)
    with asked_by_pip(checkout, f"dist_info --output-dir {tmp_path}", DECODE_CORE_BESIDE="0") as pip:
        pip.communicate()
    assert pip.returncode == 0 and not (checkout[0] / "build").exists()


def test_a_trial_on_aarch64_without_apt_ends_well(tmp_path):
    """Where there is no apt, the trial on aarch64 says so and ends well."""
    for name in ("bash", "dirname", "uname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    done = subprocess.run([tmp_path / "bash", "csrc/aarch64.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          env={"PATH": str(tmp_path), "DECODE_CORE_AARCH64_BUILD": str(tmp_path / "built")})
    assert (done.returncode, done.stderr) == (0, "") and done.stdout in (
        f"decode_core was not tried on aarch64: {why}\n" for why in ("there is no apt here", "this machine is one, so all tests run there"))
