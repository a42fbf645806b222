"""Exports over HTTP: requests give names, never paths, and only operators may give them."""

import json
import os
import subprocess
import urllib.error
import urllib.request
from contextlib import suppress

import pytest

from chatlm.common.processes.start import PROCESS_COMMAND, PROGRAM
import real_server
from exported import loaded

SMALL = "--kv-cache-memory", "4M", "--max-batch", "2", "--nice", "0"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("exporting")


@pytest.fixture(scope="module")
def url(nanochat_fixtures, place):
    with real_server.server("--watch", nanochat_fixtures / "gen5", "--export-folder", place / "out", *SMALL) as (_, url):
        yield url


def export(url, model="d4-sft@650", name="made", key=None, timeout_s=120, **headers):
    """(status, body) of an export."""
    headers |= {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url + "/models/export", json.dumps({"model": model, "name": name}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]


def test_a_step_becomes_a_folder_of_that_name(url, place):
    assert export(url, "d4-sft@latest", "my-d4") == (200, {"object": "export", "model": "d4-sft@650", "name": "my-d4"})
    assert {"object": "export", "name": "my-d4"} in real_server.get(url + "/models/exports")["data"]
    pytest.importorskip("transformers")
    assert loaded(place / "out" / "my-d4", trust=True).config.generation == 5


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x", "../x", ".hidden", "a\0b", "a\nb", "x" * 101, "-o", "C:\\x"])
def test_a_name_is_never_a_path(url, place, name):
    status, error = export(url, name=name)
    assert status == 400 and "1 to 100 letters" in error["message"] and error["param"] == "name"
    assert [path.name for path in place.iterdir()] in ([], ["out"])


def test_a_name_that_is_taken_stays_and_tells_no_path(url, place):
    export(url, name="twice")
    before = (place / "out" / "twice" / "config.json").stat().st_mtime_ns
    status, error = export(url, name="twice")
    assert status == 400 and "twice exists" in error["message"] and str(place) not in error["message"]
    assert (place / "out" / "twice" / "config.json").stat().st_mtime_ns == before


def test_a_model_that_is_not_served_is_not_found(url):
    for model in ("/etc/passwd", "d4@651", "nothing", "qwen3:0.6b"):
        assert export(url, model)[0] == 404


def test_only_operators_export(nanochat_fixtures, place):
    keys = place / "keys.txt"
    keys.write_text("boss: key-of-the-boss role=admin\nuser: key-of-a-user\n")
    with real_server.server("--watch", nanochat_fixtures / "gen5", "--export-folder", place / "out", "--api-key-file", keys, *SMALL) as (_, url):
        assert export(url, key="key-of-a-user", name="by-a-user")[0] == 403
        assert export(url, name="by-nobody")[0] == 401
        assert export(url, key="key-of-the-boss", name="by-the-boss")[0] == 200
    assert not {"by-a-user", "by-nobody"} & {path.name for path in (place / "out").iterdir()}


def test_another_site_s_page_cannot_export(url, place):
    assert export(url, name="stolen", Origin="https://evil.example")[0] == 403
    assert not (place / "out" / "stolen").exists()


def test_a_client_that_leaves_ends_its_export(place, nanochat_fixtures):
    """And what was written disappears, and the next one works."""
    with real_server.server("--watch", nanochat_fixtures / "gen5", "--export-folder", place / "left", *SMALL) as (_, url):
        with pytest.raises(TimeoutError):
            export(url, name="left", timeout_s=0.02)
        assert export(url, name="after")[0] in (200, 409)
        while export(url, name="after")[0] != 400:      # until it exists: exports go on working
            pass
    assert ".left.unfinished" not in {path.name for path in (place / "left").iterdir()}


def test_a_server_that_ends_waits_until_an_export_has_removed_its_files(nanochat_fixtures, place):
    """Its client has left just before: at its start, or when it has written much."""
    for patience_s in 0.1, 0.4, 0.8, 1.2:
        with real_server.server("--watch", nanochat_fixtures / "gen5", "--export-folder", place / "ends", *SMALL) as (process, url):
            with suppress(TimeoutError):
                export(url, name=f"after-{patience_s}", timeout_s=patience_s)
            process.terminate()
            assert process.wait(60) == 0
        assert not [path.name for path in (place / "ends").glob(".*")]


def test_an_export_that_is_told_to_end_again_and_again_removes_its_files(nanochat_fixtures, place):
    (place / "told").mkdir()
    command = [*PROCESS_COMMAND, "export", str(os.getpid()), str(nanochat_fixtures / "gen5"), "-o", str(place / "told" / "never")]
    with subprocess.Popen(command, pass_fds=PROGRAM, stderr=subprocess.DEVNULL) as process:
        while not (place / "told" / ".never.unfinished" / ".chat_server").exists():
            assert process.poll() is None
        while process.poll() is None:
            process.terminate()
    assert process.returncode == 1 and not list((place / "told").iterdir())


def test_without_the_flag_nothing_is_exported(tiny_url):
    status, error = export(tiny_url)
    assert status == 403 and "--export-folder" in error["message"]


def test_a_server_of_one_model_exports_it(nanochat_fixtures, place):
    with real_server.server(nanochat_fixtures / "gen6", "--export-folder", place / "one", *SMALL) as (_, url):
        model = real_server.get(url + "/v1/models")["data"][0]["id"]
        assert export(url, model, "gen6") == (200, {"object": "export", "model": model, "name": "gen6"})
    assert (place / "one" / "gen6" / "model.safetensors").exists()
