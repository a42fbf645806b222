"""The parts of the front, each built without the others."""

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from chatlm.common.config import LIMITS, ApiKey, Settings
from chatlm.common.errors import EngineFailure, Overloaded, RequestError
from chatlm.front.api.errors import ANTHROPIC, NANOCHAT, OLLAMA, OPENAI
from chatlm.front.front import ROUTES
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.server.access import Access, AccessLog, Owners
from chatlm.front.intake.budget import Holding
from chatlm.front.intake.intake import Intake
from chatlm.front.server.bodies import Bodies
from chatlm.front.server.describe import ModelRoutes
from chatlm.front.server.metrics import Metrics
from chatlm.front.server.responses import REQUEST_LOG, RequestLog, error_shape
from chatlm.front.server.routes import Route, RouteTable, answer_nothing
from fake_pool import FakePool, conversation
from multidict import CIMultiDict

KEYS = (ApiKey.hashed("key", "alice"),)
TABLE = RouteTable(ROUTES, "/chat")
ROW = {route.path: route for route in ROUTES}


class Arriving(dict):
    """A request with a body that arrives in one piece, for the route whose pattern is `resource`."""

    method, remote, content_length = "POST", "192.0.2.7", None

    def __init__(self, path="/", resource=None, body=b"", **headers):
        super().__init__()
        self.path, self.headers, self.parts = path, CIMultiDict(headers), [body, b""]
        self.rel_url, self.content = SimpleNamespace(raw_path=path), self
        self.match_info = SimpleNamespace(
            route=SimpleNamespace(resource=resource and SimpleNamespace(canonical=resource)))

    async def readany(self):
        return self.parts.pop(0)


def logged(path, client="alice"):
    """What is noted of a request for a route."""
    REQUEST_LOG.set(record := RequestLog("id", client, ROW[path], ROW[path].api))
    return record


@pytest.mark.parametrize("path, resource, pattern, api", [
    ("/chat/", "/chat/", "/", NANOCHAT), ("/chat", "/chat", "/", NANOCHAT),
    ("/chat/v1/messages/", "/chat/v1/messages/", "/v1/messages", ANTHROPIC),
    ("/chat/v1/cancel/x", "/chat/v1/cancel/{id}", "/v1/cancel/{id}", OPENAI),
    ("/chat/nothing", None, "", NANOCHAT), ("/v1/models", None, "", OPENAI),         # without the prefix
    ("/chat/v1/nothing", None, "", OPENAI), ("/chat/v1/messages/x", None, "", ANTHROPIC),
    ("/chat/api/nothing", None, "", OLLAMA), ("/chat/chat/completions", None, "", NANOCHAT),
    ("/chat/tokenize/x", None, "", OPENAI), ("", None, "", NANOCHAT)])
def test_a_request_has_its_row_or_the_nearest_api(path, resource, pattern, api):
    """A request has the row that answers it else the API of the path most like its own."""
    row = TABLE.row_of(Arriving(path, resource))
    assert (row.pattern, row.api) == (pattern, api) and (not row.open or row is ROW[pattern])


def test_only_health_and_metrics_are_polled():
    polled = {route.path for route in ROUTES if TABLE.is_polled("/chat" + route.path)}
    assert polled == {"/health", "/livez", "/readyz", "/stats", "/metrics"}
    assert TABLE.is_polled("/chat/health/") and not TABLE.is_polled("/chat/nothing")


@pytest.mark.parametrize("path, names", [
    ("/stats", {"detail"}), ("/v1/completions", {"error"}), ("/v1/messages", {"type", "error", "request_id"}),
    ("/api/tags", {"error"})])
def test_an_error_has_the_shape_of_its_api(path, names):
    logged(path)
    assert set(error_shape(RequestError("no"))) == names
    assert set(error_shape(EngineFailure("no"))) == names | ({"error"} if path == "/stats" else set())
    assert isinstance(error_shape(RequestError("no"))["error"], str) if path == "/api/tags" else True


def test_an_answer_and_its_pages_have_an_owner():
    number, alone, together = "0" * 32, Settings(keys=KEYS), Settings(keys=KEYS, share_prefixes=True)
    assert [Owners(Settings()).of_answer(name, "192.0.2.7") for name in (number, "mine")] == ["", "192.0.2.7"]
    assert [Owners(alone).of_answer(name, "alice") for name in (number, "mine")] == ["key alice"] * 2
    assert [Owners(settings).of_pages("alice") for settings in (Settings(), together)] == ["", ""]
    names = [Owners(replace(alone, keys=keys)).of_pages(name) for keys, name in (
        (KEYS, "alice"), (KEYS, "bob"), ((ApiKey.hashed("another", "alice"),), "alice"),
        ((KEYS[0]._replace(name="carol"),), "carol"))]
    # another key of the same name is another owner, the same key of another name is not
    assert names[0] == names[3] and len({*names, ""}) == 4


def test_only_open_routes_need_no_key():
    access = Access(Settings(keys=KEYS))
    logged("/stats")
    assert access.client_of(Arriving(Authorization="Bearer key")) == "alice"
    with pytest.raises(RequestError, match="needs an API key"):
        access.client_of(Arriving())
    logged("/livez")
    assert access.client_of(Arriving()) == "192.0.2.7"


@pytest.mark.parametrize("taken", [(), ("mine",)])
async def test_the_log_notes_row_and_id_of_a_request(caplog, taken):
    """An id of another is not used again."""
    async def handler(http):
        assert (REQUEST_LOG.get().route, REQUEST_LOG.get().api) == (ROW["/api/tags"], OLLAMA)
        return response

    caplog.set_level("INFO")
    response = SimpleNamespace(status=200, prepared=False, headers={})
    metrics = Metrics(None, None, None)
    access_log = AccessLog(RouteTable(ROUTES), taken.__contains__, metrics)
    await access_log.log(Arriving("/api/tags", "/api/tags", **{"X-Request-Id": "mine"}), handler)
    assert (response.headers["X-Request-Id"] == "mine") is (not taken) and "/api/tags 200" in caplog.text
    assert metrics.responses == {("/api/tags", 200): 1}


@pytest.mark.parametrize("body, api", [
    (conversation() | {"model": "fake-model"}, OPENAI), (conversation(), NANOCHAT),
    (conversation('"model": 1'), NANOCHAT)])
async def test_a_body_is_read_by_its_route_s_reader(body, api):
    """On nanochat's route it may be one of OpenAI."""
    bodies, record = Bodies(Intake(Catalogue(Settings(), FakePool())),
                            Owners(Settings())), logged("/chat/completions")
    with bodies.holding() as holding:
        _, parsed = await bodies.answer(Arriving(body=json.dumps(body).encode()), holding)
    assert (record.api is api and parsed.kind == {OPENAI: "chat", NANOCHAT: "native"}[api]
            and parsed.request.messages)


async def test_a_large_body_is_read_in_a_sandbox():
    """The sandbox works for the body's owner."""
    pool, checked = FakePool(), []

    async def check_grammar(params, client, owner):
        checked.append((client, owner))
        raise RequestError("read elsewhere")

    pool.check_grammar = check_grammar
    settings = Settings(keys=KEYS)
    bodies, _ = Bodies(Intake(Catalogue(settings, pool)), Owners(settings)), logged("/v1/messages")
    body = json.dumps(
        conversation() | {"max_tokens": 1, "metadata": {"user_id": "x" * LIMITS.inline_bytes}}).encode()
    with Holding(bodies.intake.budget, "alice") as holding:
        with pytest.raises(RequestError, match="elsewhere"):
            await bodies.answer(Arriving(body=body), holding)
    assert [task[:3] for task in pool.sandboxes["bodies"].tasks] == [
        ("alice", name, "/v1/messages") for name in ("open", "read")]
    assert checked == [("alice", Owners(settings).of_pages("alice"))] and not bodies.intake.budget.used


async def test_a_model_is_described_by_any_of_its_names():
    pool = FakePool()
    only = Catalogue(Settings(), pool)
    models = ModelRoutes(only, Bodies(Intake(only), Owners(Settings())))
    logged("/api/show")
    shown = json.loads((await models.handle_ollama_show(Arriving(body=b'{"model": "fake-model"}'))).body)
    facts = shown["model_info"]
    assert (shown["capabilities"] == ["completion", "insert"]
            and facts[f"{facts['general.architecture']}.context_length"] == 4096)
    with pytest.raises(RequestError, match="does not exist"):
        await models.handle_ollama_show(Arriving(body=b'{"model": "another"}'))
    pool.tokenizer = None
    with pytest.raises(Overloaded, match="loading"):
        await asyncio.wait_for(models.handle_ollama_show(Arriving(body=b"{}")), 9)


def test_a_row_says_all_of_a_route():
    row = Route("POST", "/v1/files/{name:.+}", OPENAI, answer_nothing, "keeps a file")
    assert row.pattern == "/v1/files/{name}" and not (row.open or row.polled or row.fields)
