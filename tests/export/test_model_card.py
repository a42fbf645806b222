"""The model card says what the source says, and nothing else."""

import json
import re
import shutil

import pytest
import yaml

from exported import export, refused
from families import make_model, save


@pytest.fixture
def base(nanochat_fixtures, tmp_path):
    """A base checkpoint of step 650 with all that training writes."""
    source = nanochat_fixtures / "gen5"
    shutil.copytree(source / "tokenizer", tmp_path / "base" / "tokenizer")
    shutil.copytree(source / "chatsft_checkpoints", tmp_path / "base" / "base_checkpoints")
    path = tmp_path / "base/base_checkpoints/d4/meta_000650.json"
    settings = {"depth": 4, "run": "dummy", "model_tag": "a|b", "input_path": "/home/me/secret", "empty": None, "nested": {"a": 1}}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"val_bpb": 0.8125, "total_batch_size": 524_288, "user_config": settings}))
    (tmp_path / "base" / "base_eval").mkdir()
    (tmp_path / "base" / "base_eval" / "base_model_000650.csv").write_text("Task, Accuracy, Centered\narc, 0.5, 0.25\nCORE, , 0.211500\n")
    return tmp_path / "base"


def card_of(folder):
    text = (folder / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body


def test_it_has_the_facts_of_training(base, tmp_path):
    export(base, "-o", tmp_path / "made", "--license", "mit", "--name", "my/d4")
    front, body = card_of(tmp_path / "made")
    assert front == {"license": "mit", "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["nanochat"]}
    for row in ("| step | 650 |", "| stage | base |", "| bits per byte of validation data | 0.8125 |", "| tokens of training | 340,787,200 |",
                "| CORE | 0.2115 |", "| `depth` | `4` |"):
        assert row in body
    assert "secret" not in body and "a|b" not in body and "# my/d4" in body and "trust_remote_code=True" in body


def test_core_of_another_step_is_not_this_one_s(base, tmp_path):
    (base / "base_eval" / "base_model_000650.csv").rename(base / "base_eval" / "base_model_000600.csv")
    export(base, "-o", tmp_path / "made")
    front, body = card_of(tmp_path / "made")
    assert "CORE" not in body and "license" not in front


@pytest.mark.parametrize("words", [["--license", "mit\nevil: 1"], ["--license", "a b"], ["--license", ""], ["--name", "x`y"], ["--name", "a\nb"], ["--shard-size", "0"],
                                   ["--dtype", "int8"], ["--format", "onnx"]])
def test_words_that_cannot_be_are_refused(words, nanochat_fixtures, tmp_path, capfd):
    assert words[0] in refused(capfd, nanochat_fixtures / "gen1", "-o", tmp_path / "made", *words)
    assert [*tmp_path.iterdir()] == []


def test_a_gguf_file_is_no_folder(nanochat_fixtures, tmp_path, capfd):
    """`export -o FILE.gguf` is `quantize` (tests/terminal/test_quantize.py), unless a format says otherwise."""
    for words in (["-o", tmp_path / "a.gguf", "--format", "hf"], ["-o", tmp_path / "a.gguf", "--format", "transformers"]):
        assert "-o FILE.gguf writes a GGUF file, with the flags of quantize" in refused(capfd, nanochat_fixtures / "gen5", *words)
    assert [*tmp_path.iterdir()] == []


def example_of(folder):
    """The code of the card's example, for the folder itself."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert f"name = {folder.name!r}\n" in code
    return code.replace(f"name = {folder.name!r}\n", f"name = {str(folder)!r}\n")


@pytest.mark.parametrize("kind", ["nanochat", "transformers", "family that chats", "family"])
def test_the_example_runs(kind, nanochat_fixtures, tmp_path, capsys, monkeypatch):
    """It was a SyntaxError in each card."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    source, words = nanochat_fixtures / "gen1", []
    if kind == "transformers":
        words = ["--format", "transformers"]
    elif kind != "nanochat":
        source = save(make_model("llama2"), tmp_path / "source")
        (source / "chat_template.jinja").unlink(missing_ok=True)
        if kind == "family that chats":
            (source / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    export(source, "-o", tmp_path / "made", *words)
    code = example_of(tmp_path / "made").replace("max_new_tokens=200", "max_new_tokens=3")
    assert ("apply_chat_template" in code) == (kind != "family")
    capsys.readouterr()
    exec(code.replace("max_new_tokens=50", "max_new_tokens=3"), {})
    assert capsys.readouterr().out.endswith("\n")
