"""Installs chatlm, its page and decode_core._core, the compiled kernels, which `pip install .` builds with gcc or clang alone, without torch.

    interface  a number of the library's functions, ops and types (the stub and csrc/*.def) is compiled in. It must be the one that this chatlm needs
               (chatlm/common/interface.py), and chatlm uses no library with another
    sources    csrc/*.cpp, csrc/cpu/**/*.cpp; the suffix of a name gives its instruction set (ISA_FLAGS); never -march=native
    sets       on x86-64 those that the CPU at hand chooses, and portable, which runs on any other: a third of the compiler's time less.
               DECODE_CORE_SETS=all: every one, for wheels, images and bundles that go to other machines; or names by commas
               (avx2, avxvnni, avx512, vnni, amx). release.py, cross builds, sanitizers and the sets of tests have all
    CUDA       csrc/cuda/*.cu and csrc/cuda/bindings*.cpp where there is an NVIDIA GPU and nvcc, which takes one or two minutes;
               DECODE_CORE_CUDA=0 leaves it out, =1 requires it, with or without a GPU
    emulation  csrc/cuda/emulation*.cpp as a second module, decode_core._emulation, when DECODE_CORE_EMULATION=1 (for tests)
    checks     DECODE_CORE_WERROR=1: warnings are errors; DECODE_CORE_SANITIZE=1: address and undefined-behaviour sanitizers,
               DECODE_CORE_SANITIZE=thread: the thread sanitizer
    test sets  DECODE_CORE_TEST_SETS=1: the instruction sets that exist for tests alone, AMX emulated and AVX-VNNI by AVX-512's registers,
               an eighth of the compiler's time; with sanitizers always
    machine    DECODE_CORE_MACHINE=aarch64: what a cross compiler in $CXX compiles for
    release    `python setup.py release` makes the source archive, wheels and a bundle for publication; release.py says how
    beside pip pip asks for the metadata before it downloads libraries: from then on a process beside it compiles. DECODE_CORE_BESIDE=0: none
    by day     DECODE_CORE_QUICK=1, for CI without a GPU: CUDA for one type of GPU and hardly optimized (5 s instead of 87 for
               the largest source), and without the sanitizers' pointer checks, which double the compile time;
               address checks are calls, which halves it again; -O1 for all sources but those of this CPU's widest instructions

macOS needs clang, from `xcode-select --install`. With a Python for two processors (python.org's), say ARCHFLAGS="-arch arm64".
On ARM g++ must be 10 or newer, clang 11, to know i8mm. Without a compiler the installation succeeds only where torch is installed: `import decode_core._core` raises ImportError,
and chat_server runs its reference ops. In a private folder:   python setup.py build --build-base build-x --build-lib
build-x/lib;  PYTHONPATH=build-x/lib python ...
"""

import fcntl
import io
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tokenize
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info

CSRC = Path("csrc")
HEADERS = sorted(str(path) for pattern in ("*.h", "*.cuh", "*.def") for path in CSRC.rglob(pattern))
QUICK = os.environ.get("DECODE_CORE_QUICK") == "1"
MACHINE = (os.environ.get("DECODE_CORE_MACHINE") or platform.machine()).lower()
X86 = MACHINE in ("x86_64", "amd64") and os.name == "posix"
ARM64 = MACHINE in ("aarch64", "arm64") and os.name == "posix"

COMPILERS = "clang (xcode-select --install)" if sys.platform == "darwin" else "g++ or clang"

BESIDE = int(os.environ.get("DECODE_CORE_BESIDE") or 0)         # the pip that this process compiles beside
SANITIZE = {"1": "address,undefined", "thread": "thread"}.get(os.environ.get("DECODE_CORE_SANITIZE", ""))
COMMON_FLAGS = ["-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread", "-Wall", "-Wextra"]
COMMON_FLAGS += ["-O1", "-g1"] if SANITIZE else ["-O1" if QUICK else "-O3", "-g0"]
COMMON_FLAGS += ["-Werror"] if os.environ.get("DECODE_CORE_WERROR") == "1" else []
LINK_FLAGS = ["-pthread"] + ([f"-fsanitize={SANITIZE}"] if SANITIZE else ["-Wl,-s"] if sys.platform == "linux" else [])
# not together with pybind11's flags
SANITIZE_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer",
                  # by day address checks are calls, which halves the compile time of tiles_*.cpp
                  *(["-fno-sanitize=null,alignment,object-size,pointer-overflow,vptr",
                     "--param=asan-instrumentation-with-call-threshold=0"] if QUICK else [])]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512",
                "-Wno-maybe-uninitialized"]             # caused by GCC 12's intrinsics headers
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
# suffix of a source's stem -> instructions it may use; dispatch.cpp checks that the CPU has them
X86_FLAGS = {
    "_avx2": AVX2_FLAGS,
    "_avxvnni": AVX2_FLAGS,                             # dispatch.cpp checks for AVX-VNNI; its instruction needs no flag
    "_evex": [*AVX2_FLAGS, "-O1"],                      # the same with AVX-512's, for tests alone
    "_avx512": AVX512_FLAGS,
    "_vnni": [*AVX512_FLAGS, "-mavx512vnni"],           # tiles.cpp checks for VNNI
    "_amx": [*AVX512_FLAGS, "-mavx512vnni"],            # dispatch.cpp checks for AMX; its instructions need no flag
}
ARM64_FLAGS = {
    "_neon": ["-DDC_NEON=1"],                           # which every aarch64 has: the flag only tells these sources from portable ones
    "_dotprod": ["-DDC_NEON=1", "-march=armv8.2-a+dotprod"],
    "_i8mm": ["-DDC_NEON=1", "-march=armv8.2-a+dotprod+i8mm"],
}
ISA_FLAGS = {**X86_FLAGS, **ARM64_FLAGS}
# The lanes of portable kernels are loops: -O3 unrolls them before they can be vectorized, and takes four times as long to compile
PORTABLE_FLAGS = ["-O2", "-ftree-vectorize", "-fvect-cost-model=unlimited"] if X86 and not SANITIZE and not QUICK else []
SELDOM_FLAGS = ["-O1"]          # of portable kernels beside those that this CPU chooses: less than half the time of the compiler
ROOM = "--param=ggc-min-expand=1000", "--param=ggc-min-heapsize=2000000"     # kB: GCC collects no garbage before, which takes it 4 s
BINDINGS_FLAGS = ["-O1", *ROOM]         # they only pass arguments on; -O3 takes the compiler half as long again
FOR_TESTS = "_evex", "_emulated_portable", "_emulated_vnni"    # the ends of sources that are empty without TEST_SETS
TEST_SETS = bool(SANITIZE) or os.environ.get("DECODE_CORE_TEST_SETS") == "1"
GCC_ALONE = "-fvect-cost-model=unlimited", "-Wno-maybe-uninitialized", *ROOM   # clang vectorizes such loops; zig's refuses unknown flags
CPU_NAMES = {"_avx2": "avx2", "_avx512": "avx512f", "_vnni": "avx512_vnni", "_avxvnni": "avx_vnni",
             "_neon": "asimd", "_dotprod": "asimddp", "_i8mm": "i8mm"}      # in /proc/cpuinfo
AVX512_NAMES = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}              # there too: all that AVX512_FLAGS mean
AVX2_NAMES = {"avx2", "fma", "f16c"}
SETS = tuple(ending.removeprefix("_") for ending in X86_FLAGS if ending not in FOR_TESTS)

NVCC_FLAGS = [*(["-Ofc=max", "-gencode=arch=compute_90,code=sm_90"] if QUICK else
                ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]), "-std=c++17", "-O3",
              "--cudart=static", "-fmad=false", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall",
              "-DDECODE_CORE_CUDA=1"]


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or any(map(os.path.exists, ("/dev/nvidia0", "/dev/dxg")))       # dxg: in WSL


def find_nvcc() -> str | None:
    wanted = os.environ.get("DECODE_CORE_CUDA", "")
    places = [shutil.which("nvcc"), *(os.path.join(os.environ.get(name, ""), "bin", "nvcc") for name in ("CUDA_HOME", "CUDA_PATH")),
              "/usr/local/cuda/bin/nvcc"]
    nvcc = next((place for place in places if place and os.access(place, os.X_OK)), None)
    if wanted == "1" and not nvcc:
        raise SystemExit("DECODE_CORE_CUDA=1, but nvcc was not found on the PATH, in CUDA_HOME or in /usr/local/cuda")
    if wanted == "0" or SANITIZE or not list(CSRC.glob("cuda/*.cu")):
        return None
    if wanted != "1" and not has_nvidia_gpu():
        return None
    if not nvcc:
        print("\n*** There is a GPU here, but no nvcc: decode_core gets no CUDA kernels. Install the CUDA toolkit, and run "
              "DECODE_CORE_CUDA=1 pip install . again.\n", file=sys.stderr)
    return nvcc


def cudart_folder(nvcc: str) -> str:
    """The folder of libcudart_static.a. nvcc may be a link or a script, so ask it."""
    said = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = next((line.split("=", 1)[1].strip() for line in said.splitlines() if line.startswith("#$ TOP=")), None)
    top = Path(top) if top else Path(os.path.realpath(nvcc)).parent.parent
    folders = [top / "lib64", *top.glob("targets/*/lib"), top / "lib"]
    return str(next((folder for folder in folders if (folder / "libcudart_static.a").exists()), folders[0]))


class BuildCore(build_ext):
    """build_ext with flags for each source and two compilers; keeps objects until something they include
    changes."""

    def build_extension(self, extension):
        check_interface()
        nvcc = find_nvcc() if extension.name == "decode_core._core" else None
        if BESIDE:
            self.compile_all(extension, nvcc)
            return
        insist = os.environ.get("DECODE_CORE_WERROR") == "1" or SANITIZE or os.environ.get("DECODE_CORE_CUDA") == "1"
        # if nvcc fails, only the CUDA half is lost
        for compiler in dict.fromkeys((nvcc, None)):
            try:
                return self.build_core(extension, compiler)
            except Exception as failure:
                if insist:
                    raise
                half = "decode_core's CUDA half" if compiler else "decode_core"
                if not compiler and not torch_installed():
                    raise SystemExit(f"decode_core was not compiled ({failure}), and there is no torch to compute without it: "
                                     f"install {COMPILERS}, or torch, then run pip again") from None
                print(f"\n*** {half} was not compiled ({failure}).\n*** chat_server still works, with slower kernels; "
                      f"{'repair nvcc' if compiler else f'install {COMPILERS}'} and run pip again for the fast ones.\n", file=sys.stderr)

    def build_core(self, extension, nvcc):
        objects = self.compile_all(extension, nvcc)
        target = self.get_ext_fullpath(extension.name)
        cuda = [f"-L{cudart_folder(nvcc)}", "-lcudart_static", "-ldl", "-lrt"] if nvcc else []
        self.compiler.link_shared_object(objects, target, extra_postargs=LINK_FLAGS + cuda, target_lang="c++")

    def compile_all(self, extension: Extension, nvcc: str | None) -> list[str]:
        """The objects to link, in order."""
        macros = [f"-DDECODE_CORE_INTERFACE={interface()}u", *(["-DDECODE_CORE_CUDA=1"] if nvcc else [])]
        sources = [Path(source) for source in extension.sources] + (sorted(CSRC.glob("cuda/bindings*.cpp")) if nvcc else [])
        without = [f"-DDC_LEFT_OUT_{ending[1:].upper()}=1" for ending in left_out()]
        macros_of = {"bindings": macros, "left_out": without}
        macros_of |= {source.stem: ["-DDC_TEST_SETS=1"] for source in sources if TEST_SETS and source.stem.endswith(FOR_TESTS)}
        jobs = [(self.compile_cpp, source, macros_of.get(source.stem, [])) for source in sources]
        jobs += [(self.compile_cuda, source, nvcc) for source in sorted(CSRC.glob("cuda/*.cu"))] if nvcc else []
        with the_only_one(Path(self.build_temp)), ThreadPoolExecutor(processors()) as pool:
            started = {job[1]: pool.submit(*job) for job in sorted(jobs, key=lambda job: longest_first(job[1]))}
            return [started[job[1]].result() for job in jobs]

    def object_of(self, source: Path, macros: Sequence[str] = ()) -> tuple[Path, bool]:
        """The object of a source compiled with these macros, and whether it is up to date. Bindings are compiled for each Python."""
        python = f"-{sys.implementation.cache_tag}" if source.stem.startswith("bindings") else ""
        level = "-quick" if QUICK else "-seldom" if self.is_seldom(source) else ""
        target = Path(self.build_temp) / source.with_suffix(f"{source.suffix}{''.join(macros)}{python}{level}.o")
        target.parent.mkdir(parents=True, exist_ok=True)
        newest = max(os.path.getmtime(path) for path in (source, __file__, *HEADERS))
        return target, target.exists() and target.stat().st_mtime > newest

    @staticmethod
    def is_seldom(source: Path) -> bool:
        """Whether its kernels are portable ones that this CPU does not choose, in a build for this CPU."""
        return source.stem.endswith("_portable") and 0 < len(left_out()) < len(SETS)

    def compile_cpp(self, source: Path, macros: Sequence[str]) -> str:
        target, fresh = self.object_of(source, macros)
        if not fresh:
            import pybind11
            ending = next((ending for ending in ISA_FLAGS if source.stem.endswith(ending)), "")
            portable = SELDOM_FLAGS if self.is_seldom(source) else PORTABLE_FLAGS
            plain = portable if source.stem.endswith("_portable") else BINDINGS_FLAGS if source.stem.startswith("bindings") else []
            isa = ISA_FLAGS.get(ending, plain)
            checked = SANITIZE and not source.stem.startswith("bindings") and ending in ("", *widest_here())
            isa = isa + (SANITIZE_FLAGS if checked else ["-O3"] if QUICK and X86 and not SANITIZE and ending in widest_here() else [])
            command = [part for part in self.compiler.compiler_so if not part.startswith(("-O", "-g", "-W", "-march", "-mtune"))]
            compiler = self.compiler_cxx() or command
            isa = [flag for flag in isa if flag not in GCC_ALONE or not is_clang(tuple(compiler))]
            if "ziglang" in compiler:                   # it takes the value of -march for a CPU's name
                isa = [flag.replace("-march=armv8.2-a", "-mcpu=generic+v8_2a") for flag in isa]
            command = [*compiler, "-fPIC", *COMMON_FLAGS, *isa, f"-I{CSRC}", f"-isystem{pybind11.get_include()}"]
            command += [f"-isystem{folder}" for folder in self.compiler.include_dirs]
            self.call([*command, *macros, "-c", str(source), "-o", str(target)])
        return str(target)

    def compile_cuda(self, source: Path, nvcc: str) -> str:
        target, fresh = self.object_of(source)
        if not fresh:
            self.call([nvcc, *NVCC_FLAGS, f"-I{CSRC}", "-c", str(source), "-o", str(target)])
        return str(target)

    def compiler_cxx(self) -> list[str]:
        """The C++ compiler: $CXX, or g++ or clang++; Python's own choice may be a C compiler."""
        named = os.environ.get("CXX")
        return named.split() if named else next(([path] for name in ("g++", "clang++", "c++") if (path := shutil.which(name))), [])

    def call(self, command: list[str]) -> None:
        """Run a compiler whose last words are SOURCE -o OBJECT. The object gets its name when it is whole."""
        print(" ".join(command), flush=True)
        if BESIDE and not is_running(BESIDE):
            raise SystemExit("pip has ended")
        target = Path(command[-1])
        part = target.with_name(f"{target.name}.part")
        process = subprocess.Popen([*command[:-1], str(part)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        said = ""
        while True:
            try:
                said = "".join(process.communicate(timeout=1 if BESIDE else None))
                break
            except subprocess.TimeoutExpired:
                if not is_running(BESIDE):
                    process.kill()
        sys.stderr.write(said)
        if process.returncode:
            raise RuntimeError(f"{command[0]} failed on {command[-3]}: {said.strip()[:2000]}")
        part.replace(target)


class Metadata(dist_info):
    """The program's metadata. pip asks for them before it downloads what is listed there, and for the wheel afterwards: the
    compiler begins here, in a process of its own, which ends with pip. What it has compiled, BuildCore finds."""

    def run(self):
        super().run()
        if os.environ.get("DECODE_CORE_BESIDE") != "0" and not SANITIZE:
            subprocess.Popen([sys.executable, "setup.py", "-q", "build_ext"], env=os.environ | {"DECODE_CORE_BESIDE": str(os.getppid())},
                             start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def is_running(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


@contextmanager
def the_only_one(folder: Path):
    """Keeps others from compiling into a folder meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "compiling", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def longest_first(source: Path) -> int:
    """A key: nvcc takes longest, then products of tiles, then bindings."""
    names = [source.suffix == ".cu", source.stem.startswith("tiles_"), source.stem.startswith(("bindings", "paged_"))]
    return names.index(True) if True in names else len(names)


@cache
def is_clang(compiler: tuple[str, ...]) -> bool:
    return "clang" in subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout


def interface() -> int:
    """A number of what chatlm may use of the library: its functions as the stub names them, which a test compares with them, and its
    ops, weights and activations. Comments and layout do not count."""
    stub = (CSRC / "decode_core/_core.pyi").read_text(encoding="utf-8")
    left_out = tokenize.COMMENT, tokenize.NL, tokenize.STRING
    words = [token.string for token in tokenize.generate_tokens(io.StringIO(stub).readline) if token.type not in left_out]
    for path in sorted(CSRC.glob("*.def")):
        words += re.sub("//.*", "", path.read_text(encoding="utf-8")).split()
    return zlib.crc32(" ".join(words).encode())


def check_interface() -> None:
    """SystemExit if chatlm needs the library of another interface than the one that these sources have."""
    place = "chatlm/common/interface.py"
    if interface() != runpy.run_path(place)["INTERFACE"]:
        raise SystemExit(f"csrc/decode_core/_core.pyi or csrc/*.def has changed: write INTERFACE = {interface()} in {place}")


def torch_installed() -> bool:
    """Has the Python that chat_server is installed for torch? pip builds in an environment of its own, which -I leaves."""
    asked = [sys.executable, "-I", "-c", "import importlib.util as util; raise SystemExit(util.find_spec('torch') is None)"]
    return subprocess.run(asked).returncode == 0


@cache
def cpu_flags() -> frozenset[str]:
    """What the CPU at hand has, in the words of /proc/cpuinfo; empty where there is no such file."""
    cpuinfo = Path("/proc/cpuinfo")
    return frozenset(cpuinfo.read_text().split() if cpuinfo.exists() else ())


def widest_here() -> list[str]:
    """The suffixes of the sources with the widest instructions that this CPU has. Sanitizers check these and the plain ones:
    compiling a narrower set as well takes a minute. By night they check AVX-VNNI's beside AVX-512's."""
    flags = cpu_flags() or {*CPU_NAMES.values()}
    narrower = {"_avx2", *(["_avxvnni"] if QUICK else [])} if "avx512f" in flags else set()
    return [ending for ending, flag in CPU_NAMES.items() if flag in flags and ending not in narrower]


def sets_chosen_by(flags: frozenset[str]) -> set[str]:
    """The instruction sets that decode_core chooses on a CPU of x86-64, as dispatch.cpp does, with those that they need: AVX-512
    without VNNI multiplies by AVX2's kernels. flags: of /proc/cpuinfo; without them all."""
    if not flags:
        return {*SETS}
    if AVX512_NAMES | AVX2_NAMES <= flags:
        return {"avx512", "vnni", *(["amx"] if "amx_int8" in flags else [])} if "avx512_vnni" in flags else {"avx512", "avx2"}
    return {"avx2", *(["avxvnni"] if "avx_vnni" in flags else [])} if AVX2_NAMES <= flags else set()


@cache
def left_out() -> tuple[str, ...]:
    """The suffixes of this machine's sources that are not compiled."""
    wanted = os.environ.get("DECODE_CORE_SETS", "")
    if not X86 or wanted == "all" or TEST_SETS or (not wanted and os.environ.get("DECODE_CORE_MACHINE")):
        return ()
    names = {*wanted.split(",")} - {"portable"} if wanted else sets_chosen_by(cpu_flags())
    if unknown := names - {*SETS}:
        raise SystemExit(f"DECODE_CORE_SETS: all, or some of {', '.join(SETS)} and portable, not {', '.join(sorted(unknown))}")
    return tuple(f"_{name}" for name in SETS if name not in names)


def sources() -> list[str]:
    found = sorted(str(path) for pattern in ("*.cpp", "cpu/**/*.cpp") for path in CSRC.glob(pattern))
    elsewhere = tuple(ending for flags, here in ((X86_FLAGS, X86), (ARM64_FLAGS, ARM64)) if not here for ending in flags)
    return [path for path in found if not Path(path).stem.endswith(elsewhere)
            and (Path(path).stem.endswith(FOR_TESTS) or not Path(path).stem.endswith(left_out()))]


def extensions() -> list[Extension]:
    cuda = sorted(str(path) for pattern in ("cuda/*.cu", "cuda/*.cpp") for path in CSRC.glob(pattern))
    built = [Extension("decode_core._core", sources(), depends=HEADERS + cuda, language="c++")]
    emulation = [path for path in cuda if Path(path).name.startswith("emulation") and path.endswith(".cpp")]
    if os.environ.get("DECODE_CORE_EMULATION") == "1" and emulation:
        built.append(Extension("decode_core._emulation", emulation, depends=HEADERS, language="c++"))
    return built


class Release(Command):
    """Runs release.py with the flags that follow."""

    description = "make what is published: the source archive, wheels and a bundle"
    user_options = [("pythons=", None, "the Pythons to make wheels for, as 3.11,3.13"), ("out=", None, "where the files go"),
                    ("work=", None, "where objects are kept"), ("machine=", None, "x86_64 or aarch64"), ("no-bundle", None, "leave out the bundle")]

    def initialize_options(self):
        self.pythons = self.out = self.work = self.machine = self.no_bundle = None

    def finalize_options(self):
        pass

    def run(self):
        words = [f"--{name}={value}" for name in ("pythons", "out", "work", "machine") if (value := getattr(self, name))]
        raise SystemExit(runpy.run_path("release.py")["main"](words + ["--no-bundle"] * bool(self.no_bundle)))


if __name__ == "__main__":
    setup(packages=[*find_packages(include=["chatlm", "chatlm.*"]), "chatlm.export.hub_code", "chatlm.static", "chatlm.static.vendor", "decode_core"],
          ext_modules=extensions(), cmdclass={"build_ext": BuildCore, "dist_info": Metadata, "release": Release})
