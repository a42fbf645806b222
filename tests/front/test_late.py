"""What a request imports that no other had needed before."""

import json
import sys
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import pytest

from chatlm.common import program
from chatlm.common.errors import Overloaded
from chatlm.common.late import importer
from chatlm.common.program import imported_later
from fake_pool import conversation
from patching import patch
from real_server import copy_program, post, server


@pytest.mark.parametrize("error", [None, ImportError("no x"), SyntaxError("half a file"), KeyError("x")])
def test_what_may_not_fit_is_refused(error, monkeypatch):
    program.stamp_at_start()

    def load():
        if error:
            raise error
        return "new"

    with monkeypatch.context() as meanwhile:
        patch(meanwhile, program, "program_stamp", lambda: (0, 0))
        with pytest.raises(Overloaded, match="the program has changed since this server started"):
            imported_later(load)
    if error:
        with pytest.raises(type(error)):
            imported_later(load)
    else:
        assert imported_later(load) == "new"


def test_eight_threads_import_one_module_once(tmp_path, monkeypatch):
    (tmp_path / "slowly.py").write_text("import time\ntime.sleep(0.05)\nMADE = object()\n")
    monkeypatch.syspath_prepend(tmp_path)
    with ThreadPoolExecutor(8) as threads:
        made = [*threads.map(lambda load: load(), 8 * [importer("slowly:MADE")])]
    monkeypatch.delitem(sys.modules, "slowly")
    assert len({id(each) for each in made}) == 1


def status_of(url, body, large):
    """(status, text) for a body that the front reads, or that a sandbox does."""
    try:
        return 200, post(url, conversation() | body | ({"zz": "z" * (1 << 20)} if large else {})).read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_sandbox_does_not_read_with_what_is_newer(nanochat_fixtures, tmp_path):
    """It imports the readers for the first large body. The front had them before their file was replaced."""
    script = copy_program(tmp_path)
    with server(nanochat_fixtures / "gen5", script=script) as (_, url):
        assert status_of(url + "/v1/messages", {"max_tokens": 2}, large=False)[0] == 200
        with open(script.parent / "chatlm/front/api/dialects/messages.py", "a") as file:
            file.write("\nNEWER = True\n")
        for _ in range(2):
            status, text = status_of(url + "/v1/messages", {"max_tokens": 2}, large=True)
            assert status == 503
            assert "the program has changed" in json.loads(text)["error"]["message"]
        for path in ("/v1/messages", "/v1/chat/completions"):  # these need no sandbox
            assert status_of(url + path, {"max_tokens": 2}, large=False)[0] == 200
