"""What bitsandbytes and compressed-tensors pack means here what it means to them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from chatlm.worker.weights.files.safetensors_file import read_safetensors_file
from chatlm.worker.weights.packed.quantization import join_packed
from engines import forward_logits, make_batch
from families import kernels_of, load, make_model, transformer
from packers import packed_model
from peer_packages import made_venv

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def peer():
    """Runs packers_peer.py in a venv that has the libraries and sees this environment's torch and transformers."""
    python = made_venv("packers", "packers.txt")
    [packages] = (python.parent.parent / "lib").glob("python*/site-packages")
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))

    def run(*arguments):
        done = subprocess.run([python, HERE / "packers_peer.py", *arguments], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return run


def test_transformers_computes_the_same(peer, tmp_path):
    """It has the same files."""
    # in float32; what else it runs on a CPU rounds activations, or computes in half precision
    names, model = ["ct-3", "ct-4", "ct-4-channel", "ct-8"], {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    folders = [packed_model(make_model("llama3.1", **model), tmp_path / name, name)[0] for name in names]
    peer("--logits", *folders)
    for folder in folders:
        want = load_file(folder / "logits.safetensors")["logits"]
        (folder / "logits.safetensors").unlink()
        ours = load(folder)
        made = transformer(ours, kernels_of("reference", ours.architecture))
        logits = forward_logits(made, make_batch((list(range(40)), 0, 40, list(range(4)))))[0]
        assert (logits - want[-1]).abs().max() < 1e-4


def test_packed_weights_mean_what_libraries_say(peer, tmp_path):
    peer(tmp_path)
    folders = sorted(tmp_path.iterdir())
    assert len(folders) == 21
    for folder in folders:
        ours = join_packed(folder, read_safetensors_file(folder / "model.safetensors"))["m.weight"].values("float32")
        want = load_file(folder / "values.safetensors")["values"]
        error = (torch.from_numpy(ours) - want).abs().max() / want.abs().max()
        # compressed-tensors rounds what it makes of e2m1 to bfloat16; the others are equal but for the order of two products
        assert error < (2.0 ** -8 if folder.name == "nvfp4" else 1e-6), (folder.name, error)
