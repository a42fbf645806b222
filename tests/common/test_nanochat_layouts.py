"""Where nanochat's checkpoints lie: every layout, given at every level, and which of several is meant."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import patching
import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub import default_model
from chatlm.common.hub.find import resolve_model
from chatlm.common.hub.folder import find_models, named_models
from chatlm.common.hub.nanochat_checkpoints import checkpoint_at, nanochat_tokenizers
from chatlm.common.hub.run_checkpoints import find_steps
from chatlm.front.evals.bpb import validation_shard
from chatlm.worker.weights.load import open_model
from real_server import get, post, server

sys.path.append(str(Path(__file__).resolve().parents[1] / "fixtures"))
import generation_6  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[2]
VARIABLES = "NANOCHAT_BASE_DIR", "NANOCHAT_EXPERIMENT", "NANOCHAT_EXPERIMENTS_DIR", "NANOCHAT_DATASET"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def write(folder, *steps, user_config=None):
    """Checkpoints without weights: only their places matter here."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        (folder / f"model_{step:06}.pt").touch()
        (folder / f"meta_{step:06}.json").write_text(json.dumps({"step": step, "user_config": user_config or {}}))
    return folder


def as_laid_out(fixtures, layout, folder, generation="gen5"):
    """A real checkpoint in one of the layouts, step 650. Returns what may be given as MODEL, from the whole to one file."""
    source = next((fixtures / generation).rglob("model_*.pt"))
    tokenizer = next((fixtures / generation).rglob("tokenizer.pkl"))
    base = folder / "base"
    homes, place = {
        "checkpoints": ([base / "tokenizer"], base / "chatsft_checkpoints" / "d4"),
        "experiments": ([base / "experiments" / "mine" / "tokenizer"], base / "experiments" / "mine" / "d4" / "sft"),
        "datasets": ([base / "datasets" / "climbmix" / "tokenizer"], base / "experiments" / "default" / "d4" / "chat"),
        "flat": ([base], base), "flat, tokenizer below": ([base / "tokenizer"], base)}[layout]
    for home in (*homes, place):
        home.mkdir(parents=True, exist_ok=True)
    shutil.copy(tokenizer, homes[0] / "tokenizer.pkl")
    model = place / "model_000650.pt"
    shutil.copy(source, model)
    shutil.copy(source.with_name(source.name.replace("model_", "meta_").replace(".pt", ".json")), place / "meta_000650.json")
    return [base, *[parent for parent in list(model.parents)[::-1] if base in parent.parents], model]


LAYOUTS = "checkpoints", "experiments", "datasets", "flat", "flat, tokenizer below"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_opens_at_each_level(nanochat_fixtures, tmp_path, layout):
    for given in as_laid_out(nanochat_fixtures, layout, tmp_path):
        settings = Settings(model=str(given), dtype="float32")
        source = resolve_model(settings)
        assert source.path.name == "model_000650.pt" and source.kind == "nanochat"
        assert open_model(source, settings).description.startswith("nanochat generation 5")
        assert len(source.stamp) == 3       # weights, meta and tokenizer: any of them may change


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_and_watch_find_each_layout(nanochat_fixtures, tmp_path, layout):
    as_laid_out(nanochat_fixtures, layout, tmp_path)
    [files] = find_models(tmp_path / "base")
    [step] = find_steps(tmp_path / "base")
    assert files.path == step.path and files.stamp == step.stamp and step.step == 650 and not step.missing
    [choice] = named_models(tmp_path / "base", [files])
    assert choice.name == {"checkpoints": "nanochat-d4-sft", "experiments": "nanochat-mine-d4-sft", "datasets": "nanochat-d4-chat",
                           "flat": "base", "flat, tokenizer below": "base"}[layout]
    assert resolve_model(Settings(model=str(tmp_path / "base"))).name == choice.name


@pytest.mark.parametrize("layout", ["experiments", "datasets", "flat"])
def test_a_relative_path_and_links_are_followed(nanochat_fixtures, tmp_path, monkeypatch, layout):
    *_, folder, model = as_laid_out(nanochat_fixtures, layout, tmp_path)
    monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to(folder)
    expected = resolve_model(Settings(model=str(model)))
    for given in (".", "model_000650.pt", str(tmp_path / "link"), str(tmp_path / "link" / "model_000650.pt")):
        found = resolve_model(Settings(model=given))
        assert found.path.samefile(model) and (found.name == expected.name or layout == "flat"), given
    above = resolve_model(Settings(model=".." if layout != "flat" else "../base"))
    assert above.path.samefile(model)


def test_a_tag_that_is_a_link_keeps_its_run(nanochat_fixtures, tmp_path):
    """Runs are often kept on another disk."""
    *_, folder, _ = as_laid_out(nanochat_fixtures, "checkpoints", tmp_path)
    shutil.move(folder, tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    for given in (tmp_path / "base", folder, folder / "model_000650.pt"):
        assert resolve_model(Settings(model=str(given))).name == "nanochat-d4-sft"


@pytest.fixture
def experiments(tmp_path, monkeypatch):
    """Two experiments, and what an earlier version of nanochat has left beside them."""
    root = tmp_path / "experiments"
    write(root / "default" / "d4" / "base", 100, 200)
    write(root / "default" / "d4" / "sft", 30)
    write(root / "default" / "d12" / "base", 700)
    write(root / "wide" / "d20" / "base", 900)
    write(root / "wide" / "d20" / "chat", 90)
    write(root / "wide" / "d20" / "rl", 9)
    write(tmp_path / "base_checkpoints" / "d26", 5)
    for path in tmp_path.rglob("model_*.pt"):
        changed = {"default": 3000, "wide": 4000}.get(path.parts[-4], 1000)
        os.utime(path, (changed, changed))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("flags", "expected"), [
    ({}, "sft/default/d4/30"), ({"model_tag": "d12"}, "base/default/d12/700"), ({"source": "base"}, "base/default/d12/700"),
    ({"source": "base", "model_tag": "d4", "step": 100}, "base/default/d4/100"), ({"model_tag": "d20"}, "chat/wide/d20/90"),
    ({"model_tag": "wide/d20", "source": "base"}, "base/wide/d20/900"), ({"source": "chat"}, "chat/wide/d20/90"),
    ({"source": "sft", "model_tag": "d20"}, "chat/wide/d20/90"), ({"source": "rl"}, "rl/wide/d20/9"),
    ({"model_tag": "d26"}, "base/d26/5")])
def test_the_unnamed_experiment_comes_first(experiments, flags, expected):
    """The experiment without a name comes first, and flags reach all."""
    for model in (None, str(experiments)):
        source = resolve_model(Settings(model=model, **flags))
        assert f"checkpoint {expected} " in source.chosen.replace(" (", "  (")
        assert "base/wide/d20/900" in source.alternatives or expected == "base/wide/d20/900"


@pytest.mark.parametrize("flags", [{"source": "mid"}, {"source": "rl", "model_tag": "d4"}, {"source": "chat", "model_tag": "d4"},
                                   {"source": "sft", "model_tag": "d12"}, {"model_tag": "wide/d4"}])
def test_an_explicit_stage_never_becomes_another(experiments, flags):
    with pytest.raises(ConfigError, match="available: sft/default/d4/30, chat/wide/d20/90, .*base/d26/5"):
        resolve_model(Settings(**flags))


def test_a_variable_names_the_experiment(experiments, monkeypatch):
    monkeypatch.setenv("NANOCHAT_EXPERIMENT", "wide")
    assert "chat/wide/d20/90" in resolve_model(Settings()).chosen
    inside = experiments / "experiments" / "default"
    assert "sft/default/d4/30" in resolve_model(Settings(model=str(inside))).chosen     # a path says more than a variable
    assert "base/d26/5" in resolve_model(Settings(model=str(experiments / "base_checkpoints"))).chosen
    monkeypatch.setenv("NANOCHAT_EXPERIMENT", "narrow")
    with pytest.raises(ConfigError, match="NANOCHAT_EXPERIMENT=narrow in .*available: sft/default/d4/30"):
        resolve_model(Settings())


def test_a_variable_names_the_experiments_folder(experiments, tmp_path_factory, monkeypatch):
    other = tmp_path_factory.mktemp("runs")
    write(other / "huge" / "d32" / "chat", 77)
    monkeypatch.setenv("NANOCHAT_EXPERIMENTS_DIR", str(other))
    assert "chat/huge/d32/77" in resolve_model(Settings()).chosen
    monkeypatch.setenv("NANOCHAT_EXPERIMENTS_DIR", str(other / "none"))
    with pytest.raises(ConfigError, match="NANOCHAT_EXPERIMENTS_DIR is .*none, which is not a folder"):
        resolve_model(Settings())


def test_else_the_newest_experiment_is_taken(experiments):
    """Without an unnamed experiment, the one that changed last is taken."""
    shutil.rmtree(experiments / "experiments" / "default")
    shutil.rmtree(experiments / "base_checkpoints")
    write(experiments / "experiments" / "newest" / "d4" / "base", 1)
    assert "base/newest/d4/1" in resolve_model(Settings()).chosen


def test_the_tokenizer_is_that_of_the_data_set(tmp_path, monkeypatch):
    """The tokenizer is that of the experiment's data set."""
    model = write(tmp_path / "experiments" / "mine" / "d4" / "base", 1) / "model_000001.pt"
    store, experiment = tmp_path / "datasets", tmp_path / "experiments" / "mine"
    monkeypatch.setenv("NANOCHAT_DATASET", "of the variable")
    order = [experiment / "tokenizer", store / "of meta" / "tokenizer", store / "of the variable" / "tokenizer",
             store / "climbmix" / "tokenizer"]
    (experiment / "meta.json").write_text(json.dumps({"dataset": "of meta"}))
    for folder in order[::-1]:
        folder.mkdir(parents=True)
        (folder / "tokenizer.pkl").touch()
        assert next(path for path in nanochat_tokenizers(model) if path.exists()) == folder / "tokenizer.pkl"
    shutil.rmtree(store), shutil.rmtree(experiment / "tokenizer")
    (store / "of another name" / "tokenizer").mkdir(parents=True)
    (store / "of another name" / "tokenizer" / "tokenizer.pkl").touch()
    assert nanochat_tokenizers(model)[-1].exists()      # the only one that there is


@pytest.mark.parametrize("text", ["", "[]", '{"dataset": 5}', '{"dataset": "../.."}', "{" * 10_000, '{"dataset": ".."}'])
def test_an_odd_experiment_description_leads_nowhere(tmp_path, text):
    model = write(tmp_path / "experiments" / "mine" / "d4" / "base", 1) / "model_000001.pt"
    (tmp_path / "experiments" / "mine" / "meta.json").write_text(text)
    assert all(tmp_path in Path(os.path.abspath(path)).parents for path in nanochat_tokenizers(model))
    assert nanochat_tokenizers(model)[-1] == tmp_path / "datasets" / "climbmix" / "tokenizer" / "tokenizer.pkl"


def test_published_weights_have_their_trained_stage(tmp_path):
    """The stage of published weights is what their training was told."""
    base = write(tmp_path / "d34", 10, user_config={"depth": 34})
    chat = write(tmp_path / "talks", 10, user_config={"run": "dummy"})
    assert checkpoint_at(base / "model_000010.pt").place.stage == "base"
    assert checkpoint_at(chat / "model_000010.pt").place.stage == "chat"
    (base / "meta_000010.json").write_text("nonsense")
    assert checkpoint_at(base / "model_000010.pt").place.stage == "chat" and checkpoint_at(tmp_path / "x.gguf") is None


@pytest.mark.parametrize("command", ["generate", "chat", "eval", "score", "compare"])
def test_a_named_place_without_checkpoint_is_told(tmp_path, monkeypatch, command):
    patching.patch(monkeypatch, default_model, "fetch_default_model", lambda progress: pytest.fail("fetched the default model"))
    for variable in ("NANOCHAT_BASE_DIR", "NANOCHAT_EXPERIMENTS_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
        with pytest.raises(ConfigError, match=f"{variable} is set, and there is no nanochat checkpoint in {tmp_path}"):
            resolve_model(Settings(command=command))


def test_generate_says_so_and_answers_nothing(tmp_path):
    done = subprocess.run([sys.executable, REPOSITORY / "chat_server.py", "generate", "-p", "Hello"], capture_output=True, text=True,
                          env=os.environ | {"NANOCHAT_BASE_DIR": str(tmp_path)}, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert "NANOCHAT_BASE_DIR is set, and there is no nanochat checkpoint" in done.stderr.splitlines()[-1]


def test_a_missing_tokenizer_says_where_it_was_sought(nanochat_fixtures, tmp_path):
    """A flat folder without a tokenizer says where it was looked for."""
    [base, model] = as_laid_out(nanochat_fixtures, "flat", tmp_path)
    (base / "tokenizer.pkl").unlink()
    settings = Settings(model=str(model))
    with pytest.raises(ConfigError, match="the tokenizer of .* is missing; looked for .*tokenizer.pkl"):
        open_model(resolve_model(settings), settings)


def test_what_lies_in_no_layout_is_no_checkpoint(tmp_path):
    write(tmp_path / "x", 5)
    (tmp_path / "x" / "meta_000005.json").unlink()
    assert find_models(tmp_path) == [] and find_steps(tmp_path) == []
    write(tmp_path / "deep" / "er" / "experiments" / "a" / "d4" / "sft", 1)
    assert [step.step for step in find_steps(tmp_path / "deep" / "er")] == [1]


def test_odd_experiment_names_become_model_names(tmp_path):
    write(tmp_path / "experiments" / "a\u202eb" / "d4" / "sft", 1)
    write(tmp_path / "experiments" / "c d" / "d4" / "sft", 1)
    found = find_models(tmp_path)
    assert [choice.name for choice in named_models(tmp_path, found)] == ["nanochat-a\ufffdb-d4-sft", "nanochat-c d-d4-sft"]


def test_steps_of_both_layouts_are_in_training_order(tmp_path):
    write(tmp_path / "experiments" / "default" / "d4" / "rl", 9)
    write(tmp_path / "experiments" / "default" / "d4" / "base", 400)
    write(tmp_path / "chatsft_checkpoints" / "d4", 30)
    write(tmp_path / "base_checkpoints" / "d4", 200, 100)
    assert [(step.place.stage, step.step) for step in find_steps(tmp_path)] == [("base", 100), ("base", 200), ("base", 400), ("sft", 30), ("rl", 9)]


def test_generation_6_is_served_from_its_own_layout(nanochat_fixtures):
    """By --watch, by --models and alone: the same answer."""
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 12}
    said = set()
    for flags in (("--watch",), ("--models",), ()):
        with server(*flags, nanochat_fixtures / "gen6", "--dtype", "float32", "--kv-cache-memory", "4M", "--nice", "0") as (_, url):
            [model, *_] = get(url + "/v1/models")["data"]
            said.add(json.load(post(url + "/v1/chat/completions", body))["choices"][0]["message"]["content"])
            assert model["id"] in ("d4-chat@700", "nanochat-d4-chat")
    assert len(said) == 1 and said != {""}


def test_generation_6_computes_its_description(nanochat_fixtures):
    """The fixture of generation 6 is what its description computes."""
    state = generation_6.random_state()
    saved = torch.load(next((nanochat_fixtures / "gen6").rglob("model_*.pt")))
    assert state.keys() == saved.keys() and all(torch.equal(state[name], saved[name]) for name in state)
    noted = json.loads((nanochat_fixtures / "gen6" / "oracle.json").read_text())["cases"]
    for case, again in zip(noted, generation_6.answers(state)["cases"], strict=True):
        assert case["greedy"] == again["greedy"] and case["prompt_ids"] == again["prompt_ids"]
        assert case["next_logits"] == pytest.approx(again["next_logits"], abs=1e-4)


def test_the_window_of_the_meta_file_is_used(nanochat_fixtures, tmp_path):
    *_, model = as_laid_out(nanochat_fixtures, "datasets", tmp_path, "gen6")
    meta = model.with_name("meta_000650.json")
    stated = json.loads(meta.read_text())
    for length in (96, 17, 512):
        stated["model_config"]["short_seq_len"] = length
        meta.write_text(json.dumps(stated))
        settings = Settings(model=str(model))
        windows = [each.window for each in open_model(resolve_model(settings), settings).architecture.attentions]
        assert windows == [length + 1] * 3 + [513]
    for wrong in (0, -1, "512", 1.5, True):
        stated["model_config"]["short_seq_len"] = wrong
        meta.write_text(json.dumps(stated))
        with pytest.raises(ConfigError, match="model_config.short_seq_len"):
            open_model(resolve_model(Settings(model=str(model))), Settings(model=str(model)))


def test_an_absent_base_folder_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    patching.patch(monkeypatch, default_model, "fetch_default_model", lambda *_: tmp_path / "default.gguf")
    assert "no nanochat checkpoint in" in resolve_model(Settings(command="generate")).chosen


def test_the_validation_shard_is_the_data_set_s(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    folders = [tmp_path / name for name in ("datasets/mine", "datasets/climbmix", "base_data_climbmix", "base_data")]
    with pytest.raises(ConfigError, match=f"no shard is in {folders[1]}, {folders[2]}, {folders[3]}; .* NANOCHAT_BASE_DIR names another"):
        validation_shard()
    monkeypatch.setenv("NANOCHAT_EXPERIMENT", "wide")
    (tmp_path / "experiments" / "wide").mkdir(parents=True)
    (tmp_path / "experiments" / "wide" / "meta.json").write_text(json.dumps({"dataset": "mine"}))
    for folder in folders[::-1]:
        folder.mkdir(parents=True)
        for number in (1, 2):
            (folder / f"shard_{number:05}.parquet").touch()
        assert validation_shard() == folder / "shard_00002.parquet"
    base = tmp_path / "away" / "theirs"      # a checkpoint is evaluated on the texts beside it, as `check` does
    (base / "base_checkpoints" / "d4").mkdir(parents=True)
    (base / "base_data").mkdir()
    (base / "tokenizer").mkdir()
    model, shard = base / "base_checkpoints" / "d4" / "model_000001.pt", base / "base_data" / "shard_00007.parquet"
    model.touch()
    model.with_name("meta_000001.json").write_text("{}")
    shard.touch()
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "none"))
    assert validation_shard(model) == shard
