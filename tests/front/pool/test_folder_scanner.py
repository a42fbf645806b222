"""What a look at a folder offers to its callers: each version of some files once, as soon as it stands still; and nothing is taken for gone that is only unread."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError
from chatlm.common.hub.adapter_folders import adapters_below, adapters_in
from chatlm.common.hub.folder import find_models
from chatlm.common.hub.stamps import FoundFiles
from chatlm.common.hub.run_checkpoints import find_steps
from chatlm.front.pool.pool_adapters import AdapterWatch
from chatlm.front.pool.pool import make_pool
from chatlm.front.pool.folder_scanner import FolderScanner
from families import make_model, save
from fake_pool import serving
from forked import DYING
from lora import random_adapter, shapes_of
from powerless import powerless

NAMES = "abc"
# Of each file: version 0 is empty or unreadable, None is gone
STATES = strategies.lists(strategies.fixed_dictionaries({name: strategies.one_of(strategies.none(), strategies.integers(0, 3)) for name in NAMES}), max_size=12)


def version(name, number):
    return ((f"/f/{name}", number, number),) if number else ()


def found_files(name, number):
    return FoundFiles(Path("/f") / name, version(name, number), "" if number else f"{name} cannot be read")


def scanner(taken=(), find=list):
    watched = FolderScanner(find, lambda: taken, 0.0)
    watched.compare([])
    return watched


@settings(max_examples=300, deadline=None, derandomize=True)
@given(STATES, strategies.sets(strategies.tuples(strategies.sampled_from(NAMES), strategies.integers(1, 3))))
def test_each_still_version_is_offered_once(looks, bad):
    """A model of the rule: nothing else is kept than the last known version of each file, and which ones the caller has."""
    taken, known, refused = {}, {}, set()
    watched = FolderScanner(list, lambda: taken.values(), 0.0)
    watched.compare([])
    for look in looks:
        offered = watched.compare(found_files(name, number) for name, number in look.items() if number is not None)
        expected = {name for name, number in look.items() if number and known.get(name) == number
                    and taken.get(name) != version(name, number) and (name, number) not in refused}
        assert {each.path.name for each in offered} == expected and len(offered) == len(expected)
        known = {name: number or known[name] for name, number in look.items() if number or number == 0 and name in known}
        refused = {(name, number) for name, number in refused if known.get(name) == number}
        assert {path.name: each.stamp for path, each in watched.there.items()} == {name: version(name, number) for name, number in known.items()}
        for name in {*taken} - {*known}:        # it has gone
            del taken[name]
        for each in offered:
            if (each.path.name, each.stamp[0][1]) in bad:
                assert watched.refuse(each.stamp), "told twice"
                refused.add((each.path.name, each.stamp[0][1]))
            else:
                taken[each.path.name] = each.stamp


def test_old_files_stand_still_at_the_first_look(tmp_path):
    """They were changed long ago."""
    for name, age_s in (("old", 60), ("new", 0)):
        (tmp_path / f"{name}.gguf").write_bytes(b"1")
        os.utime(tmp_path / f"{name}.gguf", (tmp_path.stat().st_mtime - age_s,) * 2)
    watched = FolderScanner(lambda: find_models(tmp_path), list, 0.0)
    assert [each.name for each in watched.compare(watched.find())] == ["old"]
    assert [each.name for each in watched.compare(watched.find())] == ["new", "old"]


def test_a_version_without_room_is_offered_again():
    """It is told once."""
    watched = scanner()
    watched.compare([found_files("a", 1)])
    news = []
    for _ in range(3):
        [offered] = watched.compare([found_files("a", 1)])
        news.append(watched.refuse(offered.stamp, for_good=False))
    assert news == [True, False, False]
    assert watched.refuse(offered.stamp) and not watched.compare([found_files("a", 1)])       # that it is broken too is news


def test_trouble_is_told_once(caplog):
    """It is told again when it changes or comes back."""
    watched = scanner()
    for trouble in ("one", "one", "two", "two", "", "two"):
        watched.compare([FoundFiles(Path("/f/a"), trouble=trouble)])
    watched.note("the folder", {"": "two"})     # about something else
    assert caplog.messages == ["one", "two", "two", "two"]


async def test_an_unreadable_folder_is_told_once(caplog):
    """What was there stays."""
    seen = []
    outcomes = [None, None, ConfigError("no such folder"), OSError("stale handle"), OSError("stale handle"), None, OSError("stale handle")]

    def find():
        if outcome := outcomes.pop(0):
            raise outcome
        return [found_files("a", 1), found_files("b", 0)]

    async def update(offered):
        seen.append([each.path.name for each in offered])

    async def pause(seconds):
        if not outcomes:
            raise asyncio.CancelledError

    watched = FolderScanner(find, list, 0.0)
    with pytest.raises(asyncio.CancelledError):
        await watched.run(update, pause)
    assert seen == [["a"]] * 3 and [path.name for path in watched.there] == ["a"]
    assert caplog.messages == ["b cannot be read", "no such folder", "stale handle", "stale handle"]


def adapter_in(folder):
    folder.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")


def model_in(folder):
    folder.mkdir(parents=True)
    (folder / "x.gguf").write_text("1")


def checkpoint_in(folder):
    (folder / "checkpoint-5").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (folder / "checkpoint-5" / name).write_text("{}")


KINDS = [(find_models, model_in, "x.gguf"), (find_steps, checkpoint_in, "checkpoint-5"), (adapters_in, adapter_in, "one"), (adapters_below, adapter_in, "one")]


@pytest.mark.parametrize("find, make, name", KINDS, ids=lambda each: getattr(each, "__name__", ""))
def test_what_an_unreadable_folder_holds_stays(find, make, name, tmp_path, caplog):
    """Its mode forbids it for a while; what goes meanwhile elsewhere has gone."""
    for folder in ("one", "two"):
        make(tmp_path / "watched" / folder)
    watched = FolderScanner(lambda: find(tmp_path / "watched"), list, 0.0)
    watched.compare(watched.find())
    before = {**watched.there}
    assert len(before) == 2
    hidden = tmp_path / "watched" / "one"
    hidden.chmod(0)
    shutil.rmtree(tmp_path / "watched" / "two")
    with powerless():
        for _ in range(3):
            assert watched.compare(watched.find()) == []
    assert {*watched.there} == {path for path in before if path.is_relative_to(hidden)} and len(watched.there) == 1
    assert caplog.messages == [f"{hidden} cannot be read: Permission denied"]
    hidden.chmod(0o700)
    assert len(watched.compare(watched.find())) == 1 and watched.there.items() <= before.items()
    shutil.rmtree(hidden)
    watched.compare(watched.find())
    assert not watched.there


@pytest.mark.parametrize("find, make, name", KINDS[:3], ids=lambda each: getattr(each, "__name__", ""))
async def test_nothing_goes_with_the_watched_folder(find, make, name, tmp_path, caplog):
    """It goes away, or is a link to nothing."""
    make(tmp_path / "watched" / "one")
    looks, counts = [], []
    watched = FolderScanner(lambda: find(tmp_path / "watched"), list, 0.0)

    async def pause(seconds):
        looks.append(len(looks))
        if len(looks) == 3:
            (tmp_path / "watched").rename(tmp_path / "away")
        elif len(looks) == 5:
            (tmp_path / "watched").symlink_to(tmp_path / "nothing")
        elif len(looks) == 7:
            (tmp_path / "watched").unlink()
            (tmp_path / "away").rename(tmp_path / "watched")
        elif len(looks) == 9:
            raise asyncio.CancelledError

    async def update(offered):
        counts.append((len(watched.there), len(offered)))

    with pytest.raises(asyncio.CancelledError):
        await watched.run(update, pause)
    assert counts == [(1, 0), (1, 1), (1, 1), (1, 1)] and len(watched.there) == 1
    assert len(caplog.messages) == 1 and "there is no such folder" in caplog.messages[0]


@pytest.mark.parametrize("empty", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_with_an_empty_file_is_there(empty, tmp_path):
    """One with a link to nothing is too; neither is offered."""
    adapter_in(tmp_path / "one")
    watched = FolderScanner(lambda: adapters_in(tmp_path), list, 0.0)
    watched.compare(watched.find())
    [known] = watched.compare(watched.find())
    (tmp_path / "one" / empty).write_text("")
    assert not watched.compare(watched.find()) and not watched.compare(watched.find()) and [*watched.there.values()] == [known]
    (tmp_path / "one" / empty).unlink()
    (tmp_path / "one" / empty).symlink_to(tmp_path / "nothing")
    assert not watched.compare(watched.find()) and [*watched.there.values()] == [known]
    (tmp_path / "one" / empty).unlink()
    assert not watched.compare(watched.find()) and not watched.there


async def test_adapters_outlast_their_folder_s_absence(started, client, tmp_path, monkeypatch, caplog):
    """They were all taken for gone."""
    monkeypatch.setattr(AdapterWatch, "WATCH_S", 0.02)
    base = save(make_model("llama3.1"), tmp_path / "tiny-llama")
    layers, shapes = shapes_of(base)
    random_adapter(tmp_path / "all" / "one", layers, shapes)
    pool = await started(make_pool(Settings(model=str(base), adapter=(str(tmp_path / "all"),), dtype="float32", kv_cache_memory=8 << 20), DYING))
    said = lambda: [line for line in caplog.messages if "there is no such folder" in line]

    async def status(url):
        async with client.post(url + "/v1/completions", json={"model": "one", "prompt": "hello", "max_tokens": 2}) as response:
            return response.status

    async with serving(pool, pool.settings) as url:
        assert await status(url) == 200
        (tmp_path / "all").rename(tmp_path / "away")
        async with asyncio.timeout(60):
            while not said():
                await asyncio.sleep(0.02)
        served = pool.adapters.serving["one"]
        assert await status(url) == 200
        (tmp_path / "away").rename(tmp_path / "all")
        random_adapter(tmp_path / "all" / "two", layers, shapes, 2)
        async with asyncio.timeout(60):
            while "two" not in pool.adapters.serving:
                await asyncio.sleep(0.02)
        assert await status(url) == 200 and pool.adapters.serving["one"] is served
    assert len(said()) == 1
