"""Models of others that cannot be read: each is refused with its reason and keeps no other from being served."""

import asyncio
import base64
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.protocol import SurveyConfig
from chatlm.common.processes.start import PROCESS_COMMAND, patient
from chatlm.front.pool.many import FolderWatch, many_models
from chatlm.front.pool.folder_scanner import FolderScanner
from chatlm.front.pool.survey import Survey
from fake_pool import serving
from families import make_model, save
from forked import DYING
from tiny_gguf import LLAMA_NUMBERS, random_llama, write_gguf

TINY = {"dtype": "float32", "kv_cache_memory": 4 << 20, "max_batch": 8}


@pytest.fixture
async def survey():
    made = Survey(PROCESS_COMMAND)
    yield made
    await made.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save(make_model("llama2"), tmp_path_factory.mktemp("llama"))


def config_of(path):
    settings = Settings(model=str(path), kv_cache_memory=1 << 20)
    return SurveyConfig(settings, resolve_model(settings), "cpu", 1 << 30)


def greedy_for_memory(llama, folder):
    """A folder in which 31 MB of brackets become 700 MB of lists."""
    shutil.copytree(llama, folder)
    (folder / "tokenizer_config.json").write_text('{"a": [' + "[]," * (10 << 20) + "[]]}")
    return folder


async def test_a_survey_has_a_limit_of_memory(survey, llama, tmp_path, monkeypatch):
    """The next model is read by another process."""
    folder = greedy_for_memory(llama, tmp_path / "greedy")
    monkeypatch.setattr(survey, "MOST_BYTES", 400 << 20)
    monkeypatch.setattr(survey, "LEAST_BYTES", 400 << 20)
    assert (await survey.of(config_of(llama))).card.name == llama.name
    first = survey.process
    with pytest.raises(ConfigError, match=f"{folder}: reading its headers takes more than 400 MiB of memory"):
        await survey.of(config_of(folder))
    assert first.poll() is not None
    assert (await survey.of(config_of(llama))).card.name == llama.name


async def test_a_survey_has_a_limit_of_time(survey, llama, monkeypatch):
    patience = survey.PATIENCE_S
    monkeypatch.setattr(survey, "PATIENCE_S", 0.0)
    with pytest.raises(ConfigError, match="reading its headers takes too long"):
        await survey.of(config_of(llama))
    monkeypatch.setattr(survey, "PATIENCE_S", patience)
    assert (await survey.of(config_of(llama))).card.name == llama.name


async def test_time_that_was_lost_is_taken_from_later_models(survey, llama, monkeypatch):
    """Twenty models that take too long hold up a start for three minutes, not for twenty."""
    limits = []

    async def wait_for(asking, limit_s):
        asking.close()
        limits.append(limit_s)
        raise asyncio.TimeoutError

    monkeypatch.setattr("chatlm.front.pool.survey.asyncio.wait_for", wait_for)
    for _ in range(20):
        with pytest.raises(ConfigError, match="takes too long: more than"):
            await survey.of(config_of(llama))
    monkeypatch.undo()
    assert limits[0] == patient(60) and limits[1:] == [patient(5)] * 19
    assert (await survey.of(config_of(llama))).card.name == llama.name
    await survey.close()
    assert survey.patience_s == 60


async def test_a_survey_that_nobody_awaits_any_more_answers_no_other(survey, llama, tmp_path):
    """Its answer would be taken for the next model's."""
    other = shutil.copytree(llama, tmp_path / "other")
    asking = asyncio.ensure_future(survey.of(config_of(other)))
    while survey.process is None:
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert (await survey.of(config_of(llama))).card.name == llama.name


async def test_a_scan_that_fails_is_told_once_and_tried_again(caplog):
    """Whatever it fails of: a watch that ended would see no model any more."""
    scans = []

    def find():
        scans.append(None)
        if len(scans) < 4:
            raise RuntimeError("boom")
        return []

    async def pause(_):
        if len(scans) == 5:
            raise asyncio.CancelledError

    async def update(_):
        pass

    watched = FolderScanner(find, list, 0.0)
    with pytest.raises(asyncio.CancelledError):
        await watched.run(update, pause)
    said = [line for line in caplog.messages if "boom" in line]
    assert len(scans) == 5 and len(said) == 1 and "test_foreign_models.py" in said[0]


def hostile_models(folder, llama):
    """Models that ended the start of a server, or all later scans."""
    huge = folder / "huge-token"
    shutil.copytree(llama, huge)
    (huge / "tokenizer.json").unlink()
    vocabulary = [{"rank": rank, "token_bytes": base64.b64encode(bytes([rank])).decode()}
                  for rank in range(255)]
    vocabulary.append({"rank": 255, "token_bytes": base64.b64encode(b"a" * 600_000).decode()})
    config = {"pattern": ".", "default_vocab_size": 276, "default_num_special_tokens": 20}
    (huge / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocabulary}))
    many = shutil.copytree(huge, folder / "many-specials")
    config |= {"default_num_special_tokens": 10**9, "default_vocab_size": 10**9 + 256}
    (many / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocabulary}))
    charsmap = base64.b64encode(b"\xff\xff\xff\xff" + bytes(60)).decode()
    mapped = shutil.copytree(llama, folder / "charsmap")
    made = json.loads((mapped / "tokenizer.json").read_text())
    made["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    (mapped / "tokenizer.json").write_text(json.dumps(made))
    for name, method in (("zlib", zipfile.ZIP_DEFLATED), ("lzma", zipfile.ZIP_LZMA)):
        (folder / name).mkdir()
        with zipfile.ZipFile(folder / name / "model.pt", "w", method) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02model" * 100)
        data = bytearray((folder / name / "model.pt").read_bytes())
        data[46:60] = bytes(14)
        (folder / name / "model.pt").write_bytes(data)
    for name, what in (("pipe", None), ("zero", "/dev/zero")):
        adapter = folder / name
        adapter.mkdir()
        (adapter / "adapter_model.safetensors").write_bytes(b"1234")
        if what:
            (adapter / "adapter_config.json").symlink_to(what)
        else:
            os.mkfifo(adapter / "adapter_config.json")
    long = folder / "long-base"
    long.mkdir()
    (long / "adapter_model.safetensors").write_bytes(b"1234")
    base = "models--a--" * 4000
    (long / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))


async def test_hostile_models_keep_none_from_being_served(started, client, llama, tmp_path, monkeypatch,
                                                          caplog):
    """Neither at the start nor while the server runs; each is named with its reason, once."""
    monkeypatch.setattr(FolderWatch, "WATCH_S", 0.1)
    folder = tmp_path / "models"
    folder.mkdir()
    hostile_models(folder, llama)
    write_gguf(folder / "tiny.gguf", random_llama(), LLAMA_NUMBERS)
    models = await started(many_models(Settings(models=str(folder), **TINY), DYING))
    body = {"prompt": "hello", "max_tokens": 2}
    async with serving(models, models.settings) as url:
        async with client.post(url + "/v1/completions", json=body | {"model": "tiny"}) as response:
            assert response.status == 200
        (folder / "later").mkdir()
        hostile_models(folder / "later", llama)
        write_gguf(folder / "late.gguf", random_llama(), LLAMA_NUMBERS)
        async with asyncio.timeout(60):
            while not any(model.name == "late" and model.pool for model in models.registry.models):
                await asyncio.sleep(0.01)
        async with client.post(url + "/v1/completions", json=body | {"model": "late"}) as response:
            assert response.status == 200
    reasons = {Path(model.entry.path).name: model.reason for model in models.registry.models if model.reason}
    for name, words in (("huge-token", "its tokens are too long"), ("charsmap", "precompiled_charsmap"),
                        ("many-specials", "default_num_special_tokens")):
        assert words in reasons[name], reasons
    assert not [line for line in caplog.messages if "a scan failed" in line]
