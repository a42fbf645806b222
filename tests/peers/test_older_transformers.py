"""Exported folders in transformers 4.57 and 5: both compute the same, or the card says that they do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

from chatlm.export.families import CLASSES
from exported import export, loaded
from families import GGUF_MODELS, MODELS, as_gguf, make_model, save
from peer_packages import made_venv

pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
IDS = torch.randint(0, 250, (60,), generator=torch.Generator().manual_seed(3)).tolist()
NAMES = [name for name, (kind, _) in MODELS.items() if kind in CLASSES]
NOT_AS_FILES = ("phi3-long", "ministral3")  # no config.json states the rotary scaling of their GGUF files


@pytest.fixture(scope="module")
def python():
    """The Python of a venv that has transformers 4 and sees this environment's torch."""
    python = made_venv("transformers4", "transformers4.txt")
    [packages] = (python.parent.parent / "lib").glob("python*/site-packages")
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return python


def in_version_4(python, folders):
    """For each folder (-> kind of attention) its logits (T, V), or what the library says of it."""
    home = Path(next(iter(folders))).parent / "hf"  # it keeps code of folders there
    done = subprocess.run(
        [python, HERE / "transformers4_peer.py"], input=json.dumps({"ids": IDS, "folders": folders}),
        env=os.environ | {"HF_HOME": str(home)}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    version, *lines = done.stdout.splitlines()
    assert version.startswith("4.57.")
    found = map(json.loads, lines)
    return {folder: numpy.load(each) if isinstance(each, str) else each[0]
            for folder, each in zip(folders, found)}


def in_version_5(folder, attention):
    import transformers
    assert transformers.__version__.startswith("5.")
    model = loaded(folder)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def exported(name, form, place):
    """A tiny model of a family as `export` writes it, from a folder or a GGUF file."""
    if form == "folder":
        source = save(make_model(name), place / "source")
    else:
        source = as_gguf(place / "tiny.gguf", make_model(name, **GGUF_MODELS[name]))
    export(source, "-o", place / "made", "--dtype", "float32")
    return place / "made"


def test_both_versions_compute_the_same_or_the_card_says_so(python, tmp_path):
    """Without rope_theta beside rope_parameters, version 4 took 10,000 for each base."""
    made = {}
    for name in NAMES:
        for form in ("folder", "gguf"):
            if form == "folder" or name in GGUF_MODELS and name not in NOT_AS_FILES:
                place = tmp_path / f"{name}-{form}"
                place.mkdir()
                made[name, form] = str(exported(name, form, place))
    assert len(made) > 40
    cards = {key: Path(folder, "README.md").read_text() for key, folder in made.items()}
    kinds = {key: "eager" if 'attn_implementation="eager"' in card else "sdpa" for key, card in cards.items()}
    theirs = in_version_4(python, {made[key]: kinds[key] for key in made})
    warned = set()
    for key, folder in made.items():
        logits = theirs[folder]
        if "It needs transformers 5" in cards[key]:
            warned.add(key)
            continue
        assert not isinstance(logits, str), (key, logits)
        assert numpy.abs(logits - in_version_5(folder, kinds[key])).max() <= 1e-4, key
    assert warned == {("ministral3", "folder"), ("qwen2moe", "folder")}
    assert "does not recognize this architecture" in theirs[made["ministral3", "folder"]]
    assert {name for (name, _), kind in kinds.items() if kind == "eager"} == {
        name for name in NAMES if MODELS[name][0] == "gemma2"}


def test_nanochat_s_models_need_version_5(python, nanochat_fixtures, tmp_path):
    """Neither kind of folder is misread in silence."""
    export(nanochat_fixtures / "gen5", "-o", tmp_path / "own")
    assert "It needs transformers 5" in (tmp_path / "own/README.md").read_text()
    assert isinstance(in_version_4(python, {str(tmp_path / "own"): "sdpa"})[str(tmp_path / "own")], str)
    export(nanochat_fixtures / "gen1", "-o", tmp_path / "made", "--format", "transformers")
    assert "It needs transformers 5" in (tmp_path / "made/README.md").read_text()
    said = in_version_4(python, {str(tmp_path / "made"): "sdpa"})[str(tmp_path / "made")]
    assert "does not recognize this architecture" in said
