"""Downloads of a server, each in a real process, from a hub on loopback: what breaks, what is shared, what has no room, what is not allowed."""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import psutil
import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import ConfigError, Overloaded, RequestError
from chatlm.common.hub.huggingface import cache_bytes
from chatlm.common.hub.offers import (cached_models, delete_model, hub_cache, is_of_hub, named_model, parameters_of, short_offers)
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.front.pool.downloads import Downloads
from fake_hub import fake_hub
from limits import files_of_at_most
from tiny_gguf import LLAMA_NUMBERS, gguf_bytes, random_llama, small_gguf_metadata

MIB = 1 << 20
TEXT = small_gguf_metadata("gpt-2")
WIDE = LLAMA_NUMBERS | {"llama.feed_forward_length": 8192}
SMALL = gguf_bytes({**LLAMA_NUMBERS, **TEXT}, random_llama())
LARGE = gguf_bytes({**WIDE, **TEXT}, random_llama(numbers=WIDE)) + bytes(16 * MIB)       # 41 MB; the library reads 10 MB at a time
ODD = gguf_bytes({**WIDE, **TEXT, "general.architecture": "rwkv7"}, random_llama(numbers=WIDE))


class Shelf:
    """A catalogue that only notes what it is given."""

    def __init__(self):
        self.taken, self.left, self.source = [], [], self

    async def take_in(self, name, path, aliases=()):
        self.taken.append((name, path, tuple(aliases)))
        return ""

    def leave_out(self, repository, file):
        self.left.append((repository, file))


@contextmanager
def hub_of(monkeypatch, tmp_path, **repositories):
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    with fake_hub(**repositories) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        yield hub
        hub.released.set()


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_of(monkeypatch, tmp_path, org__large={"large.gguf": LARGE}, org__small={"small.gguf": SMALL, "README.md": b"#"}, org__odd={"odd.gguf": ODD}) as hub:
        yield hub


# not forked (tests/support/forked.py): with this process's limits, and its child in the system
ORDINARY = sys.executable, "-B", *PROCESS_COMMAND[1:]


@asynccontextmanager
async def downloading(command=PROCESS_COMMAND, **settings):
    downloads = Downloads(Settings(**settings), Shelf(), command)
    try:
        yield downloads
    finally:
        await downloads.close()


async def ended(download):
    async for state in download.states():
        pass
    return state


async def under_way(download, count=11 * MIB):
    """Wait until some bytes of it are here: the library reports 10 MB just before it writes them."""
    async for state in download.states():
        if state["done"] >= count:
            return state
    raise AssertionError(state)


def part_of(name="org--large"):
    (part,) = (hub_cache() / f"models--{name}").glob(".chat_server.*")
    return part


def ranges(hub):
    """The ranges that were asked for, each once: the hub redirects to where its large files are."""
    return list(dict.fromkeys(sent for method, _, sent, _ in hub.requests if method == "GET" and sent))


def child_of():
    (child,) = [each for each in psutil.Process().children() if "hub" in each.cmdline()]
    return child


async def killed(downloads, hub):
    """How a download ends whose process is killed when some of it is here."""
    hub.held = {"large.gguf": 22 * MIB}
    download = downloads.start("org/large")
    await under_way(download)
    child_of().kill()
    return await ended(download)


async def test_a_model_arrives_whole_by_its_name(hub):
    """The name is the one that was asked for."""
    async with downloading() as downloads:
        state = await ended(downloads.start("org/large"))
        assert state == {"model": "org/large", "state": "done", "done": len(LARGE), "bytes": len(LARGE), "served": True}
        ((name, path, aliases),) = downloads.catalogue.taken
        assert name == "org/large" and aliases == () and path.read_bytes() == LARGE and path.is_relative_to(hub_cache())
        hub.requests.clear()
        assert (await ended(downloads.start("org/large")))["state"] == "done" and not hub.fetched()     # it is here
    (offer,) = cached_models()
    assert (offer.name, offer.bytes, offer.complete) == ("org/large:large.gguf", len(LARGE), True)


async def test_a_broken_connection_costs_only_the_rest(hub):
    """It breaks at each quarter."""
    quarters = [len(LARGE) * share // 4 for share in (1, 2, 3)]
    hub.breaks = {"large.gguf": [*quarters]}
    async with downloading() as downloads:
        assert (await ended(downloads.start("org/large")))["state"] == "done"
        assert downloads.catalogue.taken[0][1].read_bytes() == LARGE
    starts = [int(sent.removeprefix("bytes=").partition("-")[0]) for sent in ranges(hub)]
    assert hub.breaks["large.gguf"] == [] and len(set(starts)) == 3 and starts == sorted(starts) and 0 < starts[0] <= quarters[0]


async def test_a_killed_download_is_continued(hub):
    """It fails, and the next one continues it."""
    async with downloading(ORDINARY) as downloads:
        state = await killed(downloads, hub)
        assert state["state"] == "failed" and "SIGKILL" in state["error"]
        kept = part_of().stat().st_size
        assert 0 < kept <= 22 * MIB and not downloads.catalogue.taken
        hub.requests.clear()
        hub.released.set()
        assert (await ended(downloads.start("org/large")))["state"] == "done"
        assert ranges(hub) == [f"bytes={kept}-"] and downloads.catalogue.taken[0][1].read_bytes() == LARGE


async def test_a_killed_download_that_had_all_is_only_checked(hub):
    async with downloading(ORDINARY) as downloads:
        await killed(downloads, hub)
        part_of().write_bytes(LARGE)
        hub.requests.clear()
        hub.released.set()
        assert (await ended(downloads.start("org/large")))["state"] == "done"
        assert "large.gguf" not in hub.fetched() and downloads.catalogue.taken[0][1].read_bytes() == LARGE


@pytest.mark.parametrize("here, complete", [((1, 2), True), ((1,), False)])
def test_a_folder_in_shards_is_offered_when_all_are_here(hub, here, complete):
    repository = hub_cache() / "models--org--shards"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(zip("ab", shards))}))
    for name in ("config.json", "tokenizer.json", *(shards[number - 1] for number in here)):
        (snapshot / name).write_text("{}")
    (offer,) = cached_models()
    assert (offer.name, offer.complete) == ("org/shards", complete)


async def test_a_cancelled_download_can_be_resumed(hub):
    """Its process has ended."""
    hub.held = {"large.gguf": 22 * MIB}
    async with downloading(ORDINARY) as downloads:
        download = downloads.start("org/large")
        await under_way(download)
        child = child_of()
        assert await downloads.cancel("org/large") and download.body["state"] == "cancelled"
        assert not child.is_running() and not await downloads.cancel("org/large")
        kept = part_of().stat().st_size
        (offer,) = cached_models()
        assert (offer.name, offer.here, offer.complete) == ("org/large", kept, False)
        hub.requests.clear()
        hub.released.set()
        assert (await ended(downloads.start("org/large")))["state"] == "done" and ranges(hub) == [f"bytes={kept}-"]


async def test_two_clients_share_one_download(hub):
    """It ends with the last one that follows it."""
    hub.held = {"large.gguf": 22 * MIB}
    async with downloading() as downloads:
        download = downloads.start("org/large")
        assert downloads.start("org/large") is download and downloads.start("ORG/large") is not download
        await downloads.cancel("ORG/large")
        async with downloads.following(download), downloads.following(download) as states:
            async for state in states:
                if state["done"]:
                    break
        assert download.body["state"] == "cancelled"
        again = downloads.start("org/large")
        again.stays = True
        async with downloads.following(again):
            await under_way(again)
        assert again.running
        hub.released.set()
        assert (await ended(again))["state"] == "done"
        assert len([name for name in hub.fetched() if name == "files/org/large/large.gguf"]) == 2


@pytest.mark.slow
async def test_two_servers_share_a_download(hub):
    hub.held = {"large.gguf": 22 * MIB}
    async with downloading() as one, downloading() as other:
        first = one.start("org/large")
        await under_way(first)
        second = other.start("org/large")
        async for state in second.states():
            if state["state"] == "waiting" and state["bytes"]:
                break       # for the other's lock
        hub.released.set()
        states = await ended(first), await ended(second)
        assert [state["state"] for state in states] == ["done", "done"], states
        assert hub.fetched().count("files/org/large/large.gguf") == 1
        assert not [*hub_cache().rglob(".chat_server.*")]


async def test_a_changed_file_is_not_put_together(hub):
    """It changes between two parts."""
    other = LARGE[:-1] + b"\1"
    hub.breaks = {"large.gguf": [len(LARGE) // 2]}

    def change(file, start):
        if start:
            hub.repositories["org/large"]["large.gguf"] = other

    hub.on_bytes = change
    async with downloading() as downloads:
        state = await ended(downloads.start("org/large"))
        assert state["state"] == "failed" and "parts that do not fit together" in state["error"]
        assert not [*hub_cache().rglob(".chat_server.*")] and not [path for path in hub_cache().rglob("*.gguf")]
        assert (await ended(downloads.start("org/large")))["state"] == "done"
        assert downloads.catalogue.taken[0][1].read_bytes() == other


@pytest.mark.slow
async def test_an_unfinished_version_leaves_the_old_one(hub, monkeypatch):
    """The old one is there for starts without a connection."""
    async with downloading() as downloads:
        await ended(downloads.start("org/large"))
        main = hub_cache() / "models--org--large" / "refs" / "main"
        before = main.read_text()
        hub.repositories["org/large"]["large.gguf"] = LARGE[:-1] + b"\1"
        hub.held = {"large.gguf": 22 * MIB}
        download = downloads.start("org/large")
        await under_way(download)
        await downloads.cancel("org/large")
        assert main.read_text() == before
        hub.released.set()
        await ended(downloads.start("org/large"))
        assert main.read_text() == hub.revision("org/large") != before


async def test_models_disk_is_checked_before_a_download(hub):
    async with downloading(models_disk=len(LARGE) - 1) as downloads:
        state = await ended(downloads.start("org/large"))
        assert state["state"] == "failed" and f"--models-disk allows {len(LARGE) - 1:,} bytes" in state["error"] and not hub.fetched()
        assert (await ended(downloads.start("org/small")))["state"] == "done"
    async with downloading(models_disk=len(LARGE) + len(SMALL) // 2) as downloads:
        state = await ended(downloads.start("org/large"))
        assert f"models in the cache have {cache_bytes(hub_cache()):,}" in state["error"]
        await downloads.delete("org/small")
        assert (await ended(downloads.start("org/large")))["state"] == "done"


@pytest.mark.slow
async def test_models_disk_counts_other_downloads_needs(hub):
    """Models disk counts what other downloads still need."""
    hub.held = {"large.gguf": 12 * MIB}
    async with downloading(models_disk=len(LARGE) + len(SMALL) // 2) as downloads:
        download = downloads.start("org/large")
        await under_way(download, 1)
        state = await ended(downloads.start("org/small"))
        assert state["state"] == "failed" and "other downloads need" in state["error"] and "small.gguf" not in hub.fetched()
        hub.released.set()
        assert (await ended(download))["state"] == "done"


async def test_an_unknown_size_does_not_pass_models_disk(hub):
    """The hub says too little about it."""
    hub.sizes = {"large.gguf": 1000}
    async with downloading(models_disk=len(LARGE) - 1) as downloads:
        state = await ended(downloads.start("org/large"))
        assert state["state"] == "failed" and f"{len(LARGE):,} more must be downloaded" in state["error"] and "files/org/large/large.gguf" not in hub.fetched()
    async with downloading(models_disk=len(LARGE) + 1000) as downloads:
        state = await ended(downloads.start("org/large"))
        assert state["state"] == "done" and state["bytes"] == len(LARGE)


@pytest.mark.slow
async def test_models_disk_is_checked_during_a_download(hub):
    def grow(file, start):
        (hub_cache() / "models--org--other" / "blobs").mkdir(parents=True, exist_ok=True)
        with open(hub_cache() / "models--org--other" / "blobs" / "x", "wb") as blob:
            blob.truncate(MIB)

    hub.on_bytes = grow
    async with downloading(models_disk=len(LARGE) + MIB // 2) as downloads:
        state = await ended(downloads.start("org/large"))
        assert state["state"] == "failed" and "--models-disk" in state["error"]
        assert 0 < state["done"] < len(LARGE) and part_of().stat().st_size < len(LARGE)
        delete_model("org/other", "")
        hub.on_bytes = lambda file, start: None
        assert (await ended(downloads.start("org/large")))["state"] == "done" and ranges(hub)


async def test_a_full_disk_is_one_line(hub):
    """What is here stays."""
    async with downloading(ORDINARY) as downloads:
        with files_of_at_most(25 * MIB):
            state = await ended(downloads.start("org/large"))
        assert state["state"] == "failed" and "no room for org/large" in state["error"], state
        assert part_of().stat().st_size > 9 * MIB
        assert (await ended(downloads.start("org/large")))["state"] == "done"
        assert downloads.catalogue.taken[0][1].read_bytes() == LARGE


@pytest.mark.parametrize("prepare, words", [
    (lambda hub: hub.gated.add("org/small"), "it is gated: accept its licence at "),
    (lambda hub: hub.repositories.pop("org/small"), "has no such model"),
    (lambda hub: setattr(hub, "status", 429), "HTTP status 429"),
    # by day test_hub.py has the first two, and the test below the third
    pytest.param(lambda hub: hub.repositories["org/small"].pop("small.gguf"), "has no model.safetensors; it has no GGUF file", marks=pytest.mark.slow),
    pytest.param(lambda hub: setattr(hub, "status", 500), "cannot be reached", marks=pytest.mark.slow),
    pytest.param(lambda hub: hub.repositories["org/small"].update({"small.gguf": ODD}), "this server cannot run rwkv7 yet", marks=pytest.mark.slow)])
async def test_what_cannot_be_had_is_one_line(hub, prepare, words):
    prepare(hub)
    async with downloading() as downloads:
        state = await ended(downloads.start("org/small"))
        assert state["state"] == "failed" and words in state["error"] and "\n" not in state["error"], state
        assert not [*hub_cache().rglob("*.gguf")] and not [*hub_cache().rglob(".chat_server.*")] and not downloads.catalogue.taken


async def test_an_unusable_file_is_known_by_its_beginning(hub):
    """No server can run it; the beginning alone is requested."""
    hub.repositories["org/odd"]["odd.gguf"] = ODD + bytes(32 * MIB)
    async with downloading() as downloads:
        (offer,) = await downloads.ask("look", "org/odd")
        assert "this server cannot run rwkv7 yet" in offer.problem and offer.bytes == len(ODD) + 32 * MIB
        assert ranges(hub) and all(int(sent.partition("-")[2]) < 8 * MIB for sent in ranges(hub))
        (fine,) = await downloads.ask("look", "org/small")
        assert (fine.name, fine.problem, fine.bytes, fine.here) == ("org/small:small.gguf", "", len(SMALL), 0)
        assert not hub_cache().exists()


@pytest.mark.slow
async def test_a_hub_folder_is_read_by_its_config(hub):
    """Each quantization has a row."""
    config = {"model_type": "mamba2"}
    hub.repositories["org/both"] = {"config.json": json.dumps(config).encode(), "tokenizer.json": b"{}", "model.safetensors": b"x" * MIB,
                                    "b-Q4_K_M-00001-of-00002.gguf": SMALL, "b-Q4_K_M-00002-of-00002.gguf": SMALL, "b-Q8_0.gguf": SMALL, "mmproj.gguf": SMALL}
    async with downloading() as downloads:
        offers = await downloads.ask("look", "org/both")
        assert [(offer.name, offer.kind) for offer in offers] == [("org/both", "safetensors"), ("org/both:b-Q4_K_M.gguf", "gguf"), ("org/both:b-Q8_0.gguf", "gguf")]
        assert "cannot run mamba2" in offers[0].problem and offers[1].bytes == 2 * len(SMALL)
        (found,) = await downloads.ask("search", "both")
        assert (found.name, found.downloads, found.kind, found.problem) == ("org/both", 7, "gguf", "")
        hub.tags = ["pytorch"]
        assert "neither" in (await downloads.ask("search", "both"))[0].problem and not await downloads.ask("search", "nothing")


async def test_a_model_can_be_deleted_while_it_downloads(hub):
    hub.held = {"large.gguf": 22 * MIB}
    async with downloading() as downloads:
        download = downloads.start("org/large")
        await under_way(download)
        assert await downloads.delete("org/large") > 0
        assert download.body["state"] == "cancelled" and not cached_models() and not [*hub_cache().glob("models--*")]
        assert ("org/large", "") in downloads.catalogue.left and "org/large" not in downloads.known
        with pytest.raises(ConfigError, match="is not in the cache"):
            await downloads.delete("org/large")


@pytest.mark.slow
async def test_another_program_s_download_is_not_deleted(hub):
    hub.held = {"large.gguf": 22 * MIB}
    async with downloading() as one, downloading() as other:
        await under_way(one.start("org/large"))
        with pytest.raises(ConfigError, match="is being downloaded by another process"):
            await other.delete("org/large")
        assert part_of().exists()


@pytest.mark.slow
async def test_one_file_of_several_is_deleted_alone(hub):
    hub.repositories["org/two"] = {"a-Q4_0.gguf": SMALL, "a-Q8_0.gguf": SMALL[:-1] + b"\1"}
    async with downloading() as downloads:
        for name in ("org/two:q4_0", "org/two:q8_0"):
            assert (await ended(downloads.start(name)))["state"] == "done"
        assert await downloads.delete("org/two:Q4_0") == len(SMALL)
        assert [offer.name for offer in cached_models()] == ["org/two:a-Q8_0.gguf"] and len([*hub_cache().glob("models--org--two/blobs/*")]) == 1
        await downloads.delete("org/two:a-Q8_0.gguf")
        assert not [*hub_cache().glob("models--*")]


async def test_a_hub_cannot_lead_out_of_the_cache(hub, tmp_path):
    before = {*tmp_path.rglob("*")}
    large = hub.large

    async def failed(name):
        state = await ended(downloads.start(name))
        assert state["state"] == "failed" and not downloads.catalogue.taken
        strange = {path for path in {*tmp_path.rglob("*")} - before if not path.is_relative_to(hub_cache().parent)}
        assert not strange and not [path for path in hub_cache().rglob("*") if path.is_file() and path.suffix in (".gguf", ".evil")]
        return state["error"]

    async with downloading() as downloads:
        hub.repositories["org/evil"] = {"../../../x.gguf": SMALL, "/etc/y.gguf": SMALL, "a//z.gguf": SMALL}
        assert "no GGUF file" in await failed("org/evil")
        hub.revision = lambda repository: "../../../../evil"
        assert "the hub calls a version of it" in await failed("org/small")
        del hub.revision
        hub.etag = "../../../x.evil"
        assert "the hub calls a version of it" in await failed("org/large")
        assert large(LARGE)["lfs"]["sha256"] == hashlib.sha256(LARGE).hexdigest()


@pytest.mark.parametrize("name", ["", "model", "llama99", "../x/y", "a/../b", "/etc/passwd", "./a/b", "a/b/c", "http://h/a/b", "https://hf.co/a/b", "a/b:../../x", "a/b:/etc/x", "a/b:./x",
                                  "a/b:c\x1b[2J", "a/b:c\nd", "a\x00b/c", "a/b:c:d", "a/b\\c", "~/x", "org/" + "n" * 400, "a..b/c", "a/b:x//y", "a/b.gguf", "ａ/b"])
def test_a_request_names_no_path(name):
    with pytest.raises(RequestError, match="model must be the name of a model of the Hugging Face hub"):
        named_model(name)
    with pytest.raises(RequestError):
        Downloads(Settings(), Shelf()).start(name)


@pytest.mark.parametrize("name, found", [("llama3.2:1b", ("meta-llama/Llama-3.2-1B-Instruct", "")), ("org/n:sub/a.gguf", ("org/n", "sub/a.gguf")), ("org/n:Q4_K_M", ("org/n", "Q4_K_M"))])
def test_a_request_names_a_model(name, found):
    assert named_model(name) == found


def test_no_downloads_allows_none():
    downloads = Downloads(Settings(downloads=False), Shelf())
    with pytest.raises(RequestError, match="downloads no models") as error:
        downloads.start("org/large")
    assert error.value.status == 403


@pytest.mark.slow
async def test_only_so_many_downloads_run_and_wait(hub, monkeypatch):
    monkeypatch.setattr(Downloads, "MOST_WAITING", 3)
    hub.repositories |= {f"org/more{index}": {"large.gguf": LARGE} for index in range(3)}
    hub.held = {"large.gguf": 12 * MIB}
    async with downloading() as downloads:
        first, second, third = (downloads.start(f"org/more{index}") for index in range(3))
        await under_way(first, 1), await under_way(second, 1)
        assert third.state == "waiting"
        with pytest.raises(Overloaded):
            downloads.start("org/large")
        hub.released.set()
        assert [(await ended(each))["state"] for each in (first, second, third)] == ["done"] * 3


def test_short_names_say_about_how_large_they_are():
    offers = {offer.name: offer.bytes for offer in short_offers()}
    assert offers["llama3.1"] == 16e9 and offers["qwen3-0.6b"] == 1.2e9 and offers["smollm2-135m"] == 270e6 and offers["mixtral"] == 2 * 56e9 and offers["gpt2"] == 248e6
    assert "llama3.1-8b" not in offers and parameters_of("LFM2-8B-A1B") == 8e9


@pytest.mark.parametrize("environment", [{}, {"HF_HOME": "/x"}, {"HF_HUB_CACHE": "/y/$USER/z"}, {"XDG_CACHE_HOME": "/c"}, {"HUGGINGFACE_HUB_CACHE": "~/h", "HF_HOME": "/x"}])
def test_the_cache_is_where_the_library_has_it(environment, monkeypatch):
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = "import huggingface_hub.constants as c; print(c.HF_HUB_CACHE)"
    assert str(hub_cache()) == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("path, repository, file, found", [
    ("/c/models--org--a/snapshots/1/a-Q8_0.gguf", "org/a", "", True), ("/c/models--org--a/snapshots/1/a-Q8_0.gguf", "org/a", "q8_0", True),
    ("/c/models--org--a/snapshots/1/a-Q8_0.gguf", "org/a", "Q4_0", False), ("/c/models--org--a/snapshots/1", "org/a", "", True), ("/c/models--org--a/snapshots/1", "org/a", "Q8_0", False),
    ("/c/models--org--ab/snapshots/1/x.gguf", "org/a", "", False), ("/c/models--org--a/snapshots/1/s/a-Q8_0-00001-of-00002.gguf", "org/a", "s/a-Q8_0.gguf", True)])
def test_a_path_tells_its_hub_repository(path, repository, file, found):
    assert is_of_hub(Path(path), repository, file) is found
