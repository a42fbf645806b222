"""An output is none of the files that its command reads, whatever name it has: they stay as they were."""

import json
import os
import shutil

import numpy as np
import pytest

from imatrix_record import write_mixture
from retrieval import embedder_folder, make_qwen
from run_here import run_here

BATCH_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}}


@pytest.fixture
def read(tmp_path, nanochat_fixtures, monkeypatch):
    """A folder with all that commands read, which is the working directory."""
    shutil.copytree(nanochat_fixtures / "gen5", tmp_path / "gen5")
    write_mixture(tmp_path / "model.gguf")
    (tmp_path / "book.txt").write_text("A wombat digs at night. " * 40)
    (tmp_path / "measured.gguf").write_bytes(b"GGUF of importance")
    (tmp_path / "texts.jsonl").write_text('"one"\n')
    (tmp_path / "asked.jsonl").write_text(json.dumps(BATCH_LINE) + "\n")
    np.save(tmp_path / "vectors.npy", np.zeros((1, 64), "float32"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capfd, folder, *words):
    """The last line of a command that is refused, and which leaves all files as they were."""
    before = contents(folder)
    status, out, said = run_here(capfd, *words)
    assert contents(folder) == before
    assert status == 2 and out == "", said
    return said.splitlines()[-1]


CHECKPOINT = "gen5/chatsft_checkpoints/d4/model_000650.pt"


@pytest.mark.parametrize("words, inputs", [
    (("imatrix", "model.gguf", "-f", "book.txt", "-o"), ["model.gguf", "book.txt"]),
    (("imatrix", "gen5", "-f", "book.txt", "-o"), [CHECKPOINT, "gen5/chatsft_checkpoints/d4/meta_000650.json", "gen5/tokenizer/tokenizer.pkl", "book.txt"]),
    (("quantize", "model.gguf", "--type", "q4_0", "--imatrix", "measured.gguf", "-o"), ["model.gguf", "measured.gguf"]),
    (("quantize", "gen5", "--type", "q8_0", "-o"), [CHECKPOINT, "gen5/tokenizer/tokenizer.pkl"]),
    (("export", "gen5", "--type", "q8_0", "--format", "gguf", "-o"), [CHECKPOINT]),
], ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_what_is_read_is_not_written(words, inputs, read, capfd):
    for number, name in enumerate(inputs):
        link, second = read / f"link{number}", read / f"second{number}"
        link.symlink_to(read / name)
        os.link(read / name, second)
        (read / f"folder{number}").symlink_to((read / name).parent)
        for output in (name, read / name, link, second, read / f"folder{number}" / os.path.basename(name)):
            message = refused(capfd, read, *words, output)
            assert message.startswith("chat_server: -o ") and f"{os.path.basename(name)}); name another file" in message, message


def test_another_case_is_the_same_file_where_it_is(read, capfd, monkeypatch):
    """As on a Mac: there both names are one file's."""
    import chatlm.common.new_files as new_files
    as_here = os.path.samefile
    monkeypatch.setattr(new_files.os.path, "samefile", lambda one, other: as_here(*(str(path).lower() for path in (one, other))))
    assert "is what is read" in refused(capfd, read, "imatrix", "model.gguf", "-f", "book.txt", "-o", "MODEL.gguf")


def test_a_file_that_a_command_may_replace_is_replaced(read, capfd):
    """What another run has made is no input."""
    (read / "made.gguf").write_bytes(b"old")
    status, out, said = run_here(capfd, "imatrix", "model.gguf", "-f", "book.txt", "-o", "made.gguf", "--chunks", "1")
    assert status == 0 and "matrices" in out, said
    assert (read / "made.gguf").read_bytes().startswith(b"GGUF")


@pytest.mark.parametrize("output", ["asked.jsonl", "model.gguf", CHECKPOINT, "book.txt"])
def test_a_batch_does_not_write_over_files(output, read, capfd):
    assert output in refused(capfd, read, "batch", "gen5", "asked.jsonl", "-o", output)


def test_vectors_do_not_replace_their_embedder(read, capfd):
    folder = embedder_folder(read / "embedder", make_qwen())
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        message = refused(capfd, read, "embed", "embedder", "texts.jsonl", "-o", folder / name, "--nice", "0")
        assert "is what is read" in message, message
    (read / "link.npy").symlink_to(folder / "config.json")
    assert "is what is read" in refused(capfd, read, "embed", "embedder", "texts.jsonl", "-o", "link.npy", "--nice", "0")
    assert "is the input" in refused(capfd, read, "embed", "embedder", "texts.jsonl", "-o", "texts.jsonl", "--nice", "0")


@pytest.mark.parametrize("output", [CHECKPOINT, "model.gguf", "book.txt", "vectors.npy"])
def test_a_bundle_replaces_nothing_but_bundles(output, read, capfd):
    """A checkpoint of torch is a zip file, as a bundle is."""
    assert "it exists and is not a bundle" in refused(capfd, read, "bundle", output)


@pytest.mark.parametrize("output", ["gen5", CHECKPOINT, "book.txt"])
def test_an_exported_folder_replaces_nothing(output, read, capfd):
    assert "exists" in refused(capfd, read, "export", "gen5", "--format", "hf", "-o", output)
