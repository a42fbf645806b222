"""Links in a model's folder: they stay inside, or lead into the hub's cache."""

import os
import shutil

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.export.push import files_to_push
from chatlm.worker.weights.load import open_model
from exported import refused
from families import make_model, save

SECRET = "the password is swordfish"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save(make_model("llama2"), tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good, tmp_path):
    (tmp_path / "secret.txt").write_text(SECRET)
    return shutil.copytree(good, tmp_path / "model")


def template_of(folder):
    settings = Settings(model=str(folder))
    return open_model(resolve_model(settings), settings).text.chat_template


PLACES = {"chat_template.jinja": "file", "additional_chat_templates/tool_use.jinja": "file",
          "additional_chat_templates": "folder", "tokenizer_config.json": "file", "vocab.txt": "file"}


def lead_out(folder, name):
    """Put a link to a private file, or to its folder, in place of a file."""
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    secret = folder.parent / "secret.txt"
    if PLACES[name] == "folder":
        secret.rename(secret.with_suffix(".jinja"))
    path.symlink_to(secret if PLACES[name] == "file" else folder.parent)


@pytest.mark.parametrize("name", PLACES)
def test_a_text_outside_of_the_folder_is_not_served_exported_or_pushed(name, folder, tmp_path, capfd):
    lead_out(folder, name)
    for line in (pytest.raises(ConfigError, template_of, folder).value,
                 refused(capfd, folder, "-o", tmp_path / "made")):
        assert "outside of the model's folder" in str(line) and "swordfish" not in str(line)
    assert not (tmp_path / "made").exists()
    if PLACES[name] == "file":
        with pytest.raises(ConfigError, match="outside of the model's folder"):
            files_to_push(folder)
    else:       # whose files are not looked for below a link
        assert not [file for file in files_to_push(folder) if "secret" in file]


def test_weights_of_another_disk_are_served_and_not_pushed(folder, tmp_path):
    """As weights nothing but weights is read."""
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    template_of(folder)
    with pytest.raises(ConfigError, match="outside of the model's folder"):
        files_to_push(folder)


def test_links_inside_are_followed(folder, tmp_path):
    """From a folder that is a link itself, too."""
    (folder / "real").mkdir()
    (folder / "real" / "one.jinja").write_text("{{ messages }}")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.jinja").symlink_to("real/one.jinja")
    (tmp_path / "alias").symlink_to(folder)
    assert template_of(tmp_path / "alias") == "{{ messages }}"
    assert "chat_template.jinja" in files_to_push(tmp_path / "alias")


@pytest.mark.parametrize("configured", [True, False])
def test_the_hub_s_cache_keeps_its_files_by_links(configured, good, tmp_path, monkeypatch):
    """A copy of the cache elsewhere does so as well."""
    repository = tmp_path / "hub" / "models--org--name"
    if configured:
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = repository / "snapshots" / "0f"
    shutil.copytree(good, snapshot)
    (repository / "blobs").mkdir()
    for file in snapshot.iterdir():
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    template_of(snapshot)
    assert len(files_to_push(snapshot)) == len(os.listdir(snapshot))
