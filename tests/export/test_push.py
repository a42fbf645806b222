"""`push` against a hub on loopback."""

import os
import shutil
import subprocess
import sys

import pytest
from exported import export
from fake_hub import fake_hub
from forked import run_command
from real_server import SCRIPT

pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def folder(nanochat_fixtures, tmp_path_factory):
    made = tmp_path_factory.mktemp("pushed") / "made"
    export(nanochat_fixtures / "gen5", "-o", made, "--shard-size", "400k", "--license", "mit")
    return made


def push(hub, tmp_path, *words, token="hf_mine", status=0, **more):
    """What the command prints; of one that fails, its line."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "CHAT_SERVER_"))}
    env |= {"HF_ENDPOINT": hub if isinstance(hub, str) else hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", **more}
    if token:
        env["HF_TOKEN"] = token
    done = run_command(SCRIPT, ["push", *map(str, words)], env)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip() if not status else done.stderr.strip().splitlines()[-1]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def hub():
    with fake_hub() as made:
        made.token = "hf_mine"
        yield made


def test_a_folder_becomes_a_private_repository(hub, folder, tmp_path):
    before = contents(folder)
    assert push(hub, tmp_path, folder, "me/d4") == f"{hub.url}/me/d4"
    assert hub.repositories["me/d4"] == contents(folder) == before
    assert hub.private == {"me/d4"} and hub.commits == [("me/d4", "Upload a model")]     # one: nobody sees half of it


def test_a_public_repository_is_one_only_if_that_is_said(hub, folder, tmp_path):
    push(hub, tmp_path, folder, "me/d4", "--public", "--message", "First")
    assert hub.public == {"me/d4"} and hub.commits == [("me/d4", "First")]
    line = push(hub, tmp_path, folder, "me/d4", status=2)
    assert "me/d4 is public already; --public" in line and len(hub.commits) == 1


def test_a_gguf_file_is_pushed_alone(hub, tmp_path):
    (tmp_path / "m-Q8_0.gguf").write_bytes(b"GGUF" + bytes(200_000))
    push(hub, tmp_path, tmp_path / "m-Q8_0.gguf", "me/m-GGUF")
    assert [*hub.repositories["me/m-GGUF"]] == ["m-Q8_0.gguf"]


def test_what_no_model_needs_is_left_and_named(hub, folder, tmp_path):
    """The state of a training may be large, and its logs private."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    for name in ("optimizer.pt", "trainer_state.json", ".env", "train.py", "runs/events.out", "notes.txt"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    for name in ("LICENSE", "vocab.json", "additional_chat_templates/tool_use.jinja"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("theirs")
    left, url = push(hub, tmp_path, copy, "me/d4").splitlines()
    assert url == f"{hub.url}/me/d4"
    assert left == ("not uploaded, as no model needs it: .env, notes.txt, optimizer.pt, runs/events.out, "
                    "train.py, trainer_state.json")
    needed = {"LICENSE", "vocab.json", "additional_chat_templates/tool_use.jinja"}
    assert {*hub.repositories["me/d4"]} == {*contents(folder)} | needed


def test_an_interrupted_push_goes_on(hub, folder, tmp_path):
    """The files that have arrived are not sent again, and until the end nothing is visible."""
    sent = []

    def fail_the_second(digest):
        sent.append(digest)
        return 400 if len(sent) == 2 else None
    hub.on_upload = fail_the_second
    line = push(hub, tmp_path, folder, "me/d4", status=2)
    assert "cannot be pushed" in line and "the same command goes on" in line
    assert hub.repositories["me/d4"] == {} and hub.commits == [] and len(hub.objects) == 1
    push(hub, tmp_path, folder, "me/d4")
    assert hub.repositories["me/d4"] == contents(folder)
    assert len(sent) == 2 + len(hub.objects) - 1 and sent[0] not in sent[1:]


def test_weights_of_an_earlier_push_go_with_the_new_ones(hub, folder, nanochat_fixtures, tmp_path):
    """transformers would read the index of the old ones."""
    push(hub, tmp_path, folder, "me/d4")
    hub.repositories["me/d4"]["notes.txt"] = b"mine"
    export(nanochat_fixtures / "gen5", "-o", tmp_path / "whole")
    push(hub, tmp_path, tmp_path / "whole", "me/d4")
    assert hub.repositories["me/d4"] == contents(tmp_path / "whole") | {"notes.txt": b"mine"}


@pytest.mark.parametrize("token", ["", "hf_other"])
def test_a_token_is_needed(hub, folder, tmp_path, token):
    line = push(hub, tmp_path, folder, "me/d4", token=token, status=2)
    assert "auth login`, or set HF_TOKEN" in line and hub.repositories == {} and hub.objects == {}


def test_a_hub_that_cannot_be_reached_is_one_line(folder, tmp_path):
    assert "me/d4 cannot be pushed" in push("http://localhost:9", tmp_path, folder, "me/d4", status=2)
    assert "HF_HUB_OFFLINE is set" in push("http://localhost:9", tmp_path, folder, "me/d4", status=2, HF_HUB_OFFLINE="1")


@pytest.mark.parametrize(("words", "says"), [
    (["nowhere", "me/d4"], "neither a folder that `export` has written"), (["{folder}", "d4"], "not the name of a repository"),
    (["{folder}", "a/b:c"], "not the name of a repository"), (["{folder}", "qwen3:0.6b"], "not the name of a repository"),
    (["{folder}", "me/d4", "--message", " "], "--message: it is empty"), (["{empty}", "me/d4"], "is no model"),
    (["{empty}/.made.unfinished", "me/d4"], "not complete"), (["{folder}"], "required")])
def test_what_cannot_be_pushed_is_refused_before_anything_is_sent(words, says, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    words = [word.format(folder=folder, empty=tmp_path / "empty") for word in words]
    assert says in push("http://localhost:9", tmp_path, *words, status=2)


@pytest.mark.slow
def test_what_was_pushed_can_be_loaded_from_the_hub(hub, nanochat_fixtures, tmp_path):
    """transformers fetches the code and the weights."""
    pytest.importorskip("transformers")
    export(nanochat_fixtures / "gen5", "-o", tmp_path / "whole")
    push(hub, tmp_path, tmp_path / "whole", "me/d4", "--public")
    code = ("from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; n = 'me/d4'; t = T.from_pretrained(n); "
            "m = M.from_pretrained(n, trust_remote_code=True); print(type(m).__name__, m.config.generation, t.bos_token)")
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf2"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split()[-3:] == ["NanochatGenerationsForCausalLM", "5", "<|bos|>"], done.stderr[-2000:]
