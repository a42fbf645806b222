"""Checkpoints of other trainers: each is named, with what to do, however its path is given; build-nanogpt's open."""

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import find_model, resolve_model
from chatlm.common.hub.folder import find_models
from chatlm.common.hub.repository import hub_files
from chatlm.common.hub.stamps import files_of, refuse_changed
from chatlm.common.hub.run_checkpoints import find_steps
from chatlm.common.hub.trainers import llama2c_bytes, names_in
from real_server import get, post, server
from tiny_nanogpt import ARGS, random_state, save_build, write, write_meta
from tiny_training import CONFIG, Model, save as save_nanochat

def write_checkpoint(base, step):
    save_nanochat(Model(CONFIG), base / "base_checkpoints" / "d2", step)


ROOT = Path(__file__).parents[2]
TENSORS = {"embed.weight": torch.zeros(2, 3)}


def save(path, content, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


def save_bytes(path, *numbers, begin=b"", size=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((begin + struct.pack(f"<{len(numbers)}i", *numbers)).ljust(size, b"\0"))
    return path


STORIES = 288, 768, 6, 6, 6, 32_000, 256      # of stories15M.bin
CODE = "import torch\nval_loss = 'model_args'\n" * 3000
FILES = {       # name -> (the file below the run's folder, who writes it, words of what to do)
    "modded": (lambda run: save(run / "logs/1b2c-4d/state_step005100.pt", dict(step=5100, code=CODE, model={"_orig_mod.embed.weight": torch.zeros(2)}, optimizers=[{"state": {}}])),
               "modded-nanogpt", 'the file holds its text under the key "code"'),
    "llama2.c": (lambda run: save(run / "out/ckpt.pt", {"model": TENSORS, "model_args": dict(dim=288, n_layers=6, n_heads=6, multiple_of=32), "iter_num": 5}),
                 "llama2.c", "python export.py FOLDER --version -1 --checkpoint"),
    "llama2.c's first form": (lambda run: save_bytes(run / "out/model.bin", *STORIES, size=llama2c_bytes(*STORIES)), "llama2.c", "--checkpoint out/ckpt.pt"),
    "llama2.c's second form": (lambda run: save_bytes(run / "out/model.bin", 1, 288, 768, 6, 6, 6, 32_000, begin=b"24ka", size=300), "llama2.c", "and add a tokenizer.json"),
    "llm.c": (lambda run: save_bytes(run / "log124M/model_00019560.bin", 20240326, 5, 1024, 50257, 12, 12, 768, 50304, size=2048), "llm.c", "dev/eval/export_hf.py"),
    "llm.c's optimizer": (lambda run: save_bytes(run / "log124M/state_00019560_00000.bin", 20240527, 1, 0, 0, 0, 0, 0, size=2048), "llm.c", "the model is model_*.bin beside it"),
    "nanoGPT by another name": (lambda run: write(run / "out", {}, ARGS).joinpath("ckpt.pt").rename(run / "out/ckpt_7.pt"), "nanoGPT", "name it ckpt.pt"),
    "litgpt without its config": (lambda run: save(run / "final/lit_model.pth", {"model": {"transformer.h.0.attn.qkv.weight": torch.zeros(2)}}), "litgpt", "which must also have model_config.yaml"),
    "litgpt before LoRA is merged": (lambda run: save(run / "final/lit_model.pth.lora", {"model": TENSORS}), "litgpt", "litgpt merge_lora FOLDER"),
    "litgpt's adapter": (lambda run: save(run / "final/lit_model.pth.adapter_v2", {"model": TENSORS}), "litgpt", "litgpt finetune_lora"),
    "torchtune": (lambda run: save(run / "epoch_0/hf_model_0001_0.pt", TENSORS), "torchtune", "safe_serialization: True"),
    "Lightning": (lambda run: save(run / "version_0/epoch=3-step=800.ckpt", {"epoch": 3, "pytorch-lightning_version": "2.6.1", "state_dict": TENSORS}), "Lightning", "save_pretrained"),
    "DeepSpeed": (lambda run: save(run / "global_step500/mp_rank_00_model_states.pt", {"module": TENSORS}), "DeepSpeed", "zero_to_fp32.py"),
    "Megatron": (lambda run: save(run / "iter_0005000/mp_rank_00/model_optim_rng.pt", {"args": 1, "checkpoint_version": 3.0, "model": TENSORS}), "Megatron", "AutoBridge.export_ckpt"),
    "Meta": (lambda run: save(run / "Llama3.2-1B/consolidated.00.pth", {"tok_embeddings.weight": torch.zeros(2)}), "Meta's Llama", "convert_llama_weights_to_hf.py"),
    "transformers": (lambda run: save(run / "model/weights.bin", {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2)}), "transformers", "save_pretrained writes safetensors"),
    "before 2020": (lambda run: save(run / "old/model.pt", TENSORS, _use_new_zipfile_serialization=False), "PyTorch, in the form from before 2020", "save it again")}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_trainer_is_named(name, tmp_path):
    """A file of another trainer is named, however its path is given."""
    make, trainer, advice = FILES[name]
    path = make(tmp_path / "run")
    for model in (path, path.parent, tmp_path / "run", tmp_path):
        for changes in ({}, {"step": 5000}):
            with pytest.raises(ConfigError) as caught:
                resolve_model(Settings(model=str(model), **changes))
            text = str(caught.value)
            assert f"{path} is a checkpoint of {trainer}" in text and advice in text and text.isprintable(), text


@pytest.mark.parametrize("name", FILES)
def test_a_watched_folder_tells_of_foreign_files(name, tmp_path):
    """Folders that are watched or served tell of a file of another trainer and go on."""
    make, trainer, advice = FILES[name]
    path = make(tmp_path / "run")
    write_meta(write(tmp_path / "own", random_state(ARGS), ARGS) / "meta.pkl")
    write_checkpoint(tmp_path, 3)
    for found in (find_models(tmp_path), find_steps(tmp_path)):
        [told] = [each.trouble for each in found if each.path == path]
        assert f"{path} is a checkpoint of {trainer}" in told and advice in told
        assert [each.path for each in found if each.stamp and not each.trouble]


@pytest.mark.parametrize("files, trainer, advice", [
    ([".metadata", "__0_0.distcp"], "torch.distributed.checkpoint", "accelerate merge-weights"), (["latest_checkpointed_iteration.txt"], "Megatron", "AutoBridge"),
    (["common.pt", "metadata.json", "__0_0.distcp"], "Megatron", "AutoBridge"), (["zero_to_fp32.py", "latest"], "DeepSpeed", "--safe_serialization")])
def test_a_folder_of_parts_is_named(files, trainer, advice, tmp_path):
    folder = tmp_path / "run" / "step-1000"
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_bytes(b"x")
    for model in (folder, tmp_path / "run", tmp_path):
        with pytest.raises(ConfigError) as caught:
            resolve_model(Settings(model=str(model), step=1000))
        assert f"{folder} is a checkpoint of {trainer}" in str(caught.value) and advice in str(caught.value)
    assert any(trainer in each.trouble for each in find_models(tmp_path)) and any(trainer in each.trouble for each in find_steps(tmp_path))


def test_litgpt_s_weights_in_parts_do_not_open(tmp_path):
    folder = tmp_path / "step-00001000"
    (folder / "lit_model.pth").mkdir(parents=True)
    (folder / "lit_model.pth" / "__0_0.distcp").write_bytes(b"x")
    (folder / "model_config.yaml").write_text("n_layer: 2\n")
    for model in (folder / "lit_model.pth", folder, tmp_path):
        with pytest.raises(ConfigError, match="lit_model.pth is a checkpoint of litgpt: it is in parts.*consolidate_checkpoint"):
            resolve_model(Settings(model=str(model)))
    assert any("consolidate_checkpoint" in each.trouble for each in find_models(tmp_path))


def test_a_config_beside_parts_says_so_too(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "pytorch_model_fsdp_0" / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(ConfigError, match=r"has a config.json, but no \*.safetensors; .*pytorch_model_fsdp_0 is a checkpoint of torch.distributed.*merge-weights"):
        resolve_model(Settings(model=str(tmp_path)))


def test_an_unknown_torch_file_is_told_by_its_keys(tmp_path):
    """An unknown file of torch.save is told by what is in it."""
    path = save(tmp_path / "weights.pt", {"generator": TENSORS, "discriminator": {}})
    with pytest.raises(ConfigError, match='is a file of torch.save by no trainer that this server knows .in it: "generator", "embed.weight", .*Hugging Face folder'):
        resolve_model(Settings(model=str(path)))
    assert find_models(tmp_path) == [] and find_steps(tmp_path) == []       # a folder may have any such files


class Evil:
    def __reduce__(self):
        return print, ("run",)


def zipped(path, pickled, name="archive/data.pkl"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, pickled)
    return path


def test_a_hostile_pickle_is_named_without_loading(tmp_path, capfd):
    """A hostile pickle is not loaded to be told."""
    path = save(tmp_path / "state_step000100.pt", {"step": 1, "code": "", "model": Evil(), "optimizers": []})
    with pytest.raises(ConfigError, match="modded-nanogpt"):
        resolve_model(Settings(model=str(path)))
    for number, pickled in enumerate((b"", b"\x80", b"\x8e" + b"\xff" * 8, b"X\xff\xff\xff\xff", b"(" * 2_000_000, b"cos\nsystem\n(S'x'\ntR.", b"\x8c\xffa")):
        assert names_in(zipped(tmp_path / f"{number}.pt", pickled)) is not None
        with pytest.raises(ConfigError) as caught:
            resolve_model(Settings(model=str(tmp_path / f"{number}.pt")))
        assert str(caught.value).isprintable()
    compressed = io.BytesIO()
    with zipfile.ZipFile(compressed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + b"0" * (200 << 20))       # 200 MB in 1 MB: a part of it is read
    (tmp_path / "bomb.pt").write_bytes(compressed.getvalue())
    assert names_in(tmp_path / "bomb.pt") == ({}, set()) and capfd.readouterr().out == ""


def test_files_beside_a_served_model_do_no_harm(tmp_path):
    folder = tmp_path / "checkpoint-500"
    save(folder / "optimizer.pt", {"state": {}}), save(folder / "training_args.bin", {"output_dir": "x"}), save(folder / "global_step500/mp_rank_00_model_states.pt", {})
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"x")
    assert [each.trouble for each in find_models(tmp_path)] == [""] and [each.trouble for each in find_steps(tmp_path)] == [""]


def test_build_nanogpt_files_and_folders_open(tmp_path, monkeypatch):
    """build-nanogpt's file, its folder and a step open."""
    log = tmp_path / "build-nanogpt" / "log"
    files = {step: save_build(log / f"model_{step:05d}.pt", monkeypatch, step=step) for step in (5000, 15000, 19072)}
    write_meta(log / "meta.pkl")
    for model, changes, step, others in ((files[5000], {}, 5000, ""), (files[5000], {"step": 5000}, 5000, ""), (log, {}, 19072, "also available (-s): 5000, 15000"),
                                         (log, {"step": 15000}, 15000, "also available (-s): 5000, 19072")):
        source = resolve_model(Settings(model=str(model), **changes))
        assert (source.kind, source.path, source.name, source.alternatives) == ("nanogpt", files[step], "log", others)
        assert source.chosen == f"build-nanogpt checkpoint {files[step]}" and source.stamp
        refuse_changed(source, Settings(model=str(model)))
    assert files_of(files[5000]) == [files[5000], log / "meta.pkl"]
    for model, changes, words in ((log, {"step": 7}, f"no build-nanogpt checkpoint for -s 7 in {log}; available: 5000, 15000, 19072"),
                                  (files[5000], {"step": 7}, f"for -s 7 in {files[5000]}; available: 5000"),
                                  (log, {"step": 0}, "for -s 0"), (log, {"source": "sft"}, f"-i sft: only for nanochat checkpoints, and {log} is build-nanogpt's"),
                                  (tmp_path, {}, f"{files[19072]} is a checkpoint of build-nanogpt: give it, or its folder")):
        with pytest.raises(ConfigError) as caught:
            resolve_model(Settings(model=str(model), **changes))
        assert words in str(caught.value)
    assert [(each.name, each.step, bool(each.stamp)) for each in find_models(tmp_path)] == [("log", step, True) for step in files]
    assert [(each.run, each.step, each.missing) for each in find_steps(tmp_path)] == [(log, step, "") for step in files]


def test_step_0_is_a_step(tmp_path, monkeypatch):
    path = save_build(tmp_path / "model_00000.pt", monkeypatch, step=0)
    assert resolve_model(Settings(model=str(tmp_path), step=0)).path == path == resolve_model(Settings(model=str(tmp_path))).path
    assert [step.step for step in find_steps(tmp_path)] == [0] == [each.step for each in find_models(tmp_path)]


def test_another_pickle_protocol_opens_too(tmp_path, monkeypatch):
    path = save_build(tmp_path / "model_00100.pt", monkeypatch, step=100)
    state = torch.load(path, weights_only=False)
    torch.save(state, path, pickle_protocol=4)
    assert resolve_model(Settings(model=str(path))).kind == "nanogpt"


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_unreadable_folders_are_passed_over():
    code = ("import os, sys; sys.path.insert(0, sys.argv[1])\nfrom chatlm.common.hub.trainers import foreign_in, foreign\nfrom pathlib import Path\n"
            "os.setgid(65534); os.setuid(65534); print(foreign_in(Path(sys.argv[2])), '|', foreign(Path(sys.argv[2]) / 'shut' / 'x.pt'))")
    with tempfile.TemporaryDirectory() as base:     # pytest's folders are closed to others
        os.chmod(base, 0o755)
        path = FILES["modded"][0](Path(base) / "run")
        for name, mode in (("shut", 0o000), ("listed", 0o444)):
            save(Path(base) / name / "x.pt", TENSORS)
            (Path(base) / name / "a file").touch()
            (Path(base) / name).chmod(mode)
        run = subprocess.run([sys.executable, "-c", code, str(ROOT), base], capture_output=True, text=True)
    assert run.stdout.startswith(f"{path} is a checkpoint of modded-nanogpt") and run.stdout.endswith("| \n"), run.stderr


def test_links_to_nowhere_and_pipes_are_passed_over(tmp_path):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "lit_model.pth").symlink_to(tmp_path / "log" / "lit_model.pth")
    (tmp_path / "log" / "model_00100.pt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "log" / "state_step000100.pt")
    with pytest.raises(ConfigError, match="no nanochat checkpoints in"):
        resolve_model(Settings(model=str(tmp_path / "log")))
    assert find_steps(tmp_path) == [] == find_models(tmp_path)


def test_a_nanochat_file_of_that_name_stays_nanochat_s(tmp_path):
    write_checkpoint(tmp_path, 700)
    [step] = find_steps(tmp_path)
    whole = step.path.read_bytes()
    step.path.write_bytes(whole[:-100])     # a worker says that it is cut
    assert find_model(str(step.path), Settings()).kind == "nanochat"
    step.path.write_bytes(whole)
    assert find_model(str(step.path), Settings()).kind == "nanochat" == find_model(str(step.path.parent), Settings()).kind


def test_a_file_that_is_being_written_is_no_model_yet(tmp_path, monkeypatch):
    path = save_build(tmp_path / "log/model_00100.pt", monkeypatch, step=100)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert find_steps(tmp_path) == [] == find_models(tmp_path)
    with pytest.raises(ConfigError, match="model_00100.pt is a file of torch.save without its end: it is being written, or copy it again"):
        resolve_model(Settings(model=str(path)))
    path.write_bytes(whole)
    assert [step.step for step in find_steps(tmp_path)] == [100]


def test_a_folder_s_server_serves_what_opens(tmp_path, monkeypatch):
    """A server of a folder serves what opens, and logs the rest once."""
    bad = FILES["modded"][0](tmp_path / "models" / "run")
    save_build(tmp_path / "models/run/log/model_00250.pt", monkeypatch, step=250)
    write_meta(tmp_path / "models/run/log/meta.pkl")
    lines = []
    with server("--models", tmp_path / "models", "--dtype", "float32", log=lines) as (_, url):
        assert [each["id"] for each in get(url + "/v1/models")["data"]] == ["log"]
        answer = json.loads(post(url + "/v1/completions", {"model": "log@250", "prompt": "To be", "max_tokens": 5, "temperature": 0}).read())
        assert answer["usage"]["completion_tokens"] == 5
    assert "".join(lines).count(f"not served: {bad} is a checkpoint of modded-nanogpt: its architecture") == 1


def test_a_litgpt_repository_says_how_to_get_it():
    with pytest.raises(ConfigError, match="org/tuned has no model.safetensors; it has no GGUF file; its files are litgpt's: download them into a folder"):
        hub_files("org/tuned", "", ["config.json", "lit_model.pth", "model_config.yaml", "tokenizer.json"])
