"""The API's description comes from the API's own tables, and no request to any route is answered with a
5xx."""

import asyncio
import contextlib
import http.client
import importlib
import json
import threading

import pytest
from hypothesis import HealthCheck, given, settings as hypothesis_settings, strategies as st

from chatlm.common.config import ApiKey, Settings
from chatlm.common.errors import RequestError
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.protocol import WORKER_PIPE, ModelCard, NewAnswer, NewPrompt
from chatlm.front.api.field_types import CONSTRAINT_FIELDS
from chatlm.front.api.fields import A_TOKEN, list_schema, matches
from chatlm.front.front import ROUTES
from chatlm.front.pool.pool import make_pool
from chatlm.front.server.describe import openapi_document
from chatlm.worker.weights.formats.nanochat.checkpoint import read_nanochat_tokenizer
from answers import ending, said
from fake_pool import FakePool, serving
from nightly import WHOLE
from pools import PlayedWorker

METHODS = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "BREW"]
GRAMMARS = {"response_format", "output_format", *(field.name for field in CONSTRAINT_FIELDS)}      # more is checked than a schema says
METHOD_OF = {route.path: route.method for route in ROUTES if route.fields}
BODY_ROUTES = {route.path: route.fields for route in ROUTES if route.fields}


def document():
    return openapi_document(ROUTES, Settings(prefix="/prefix"))


def test_every_route_and_field_is_described():
    paths = document()["paths"]
    assert {(method.upper(), path) for path, item in paths.items() for method in item} == {
        (route.method, route.pattern) for route in ROUTES}
    for path, fields in BODY_ROUTES.items():
        operation = paths[path][METHOD_OF[path].lower()]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert list(schema["properties"]) == [field.name for field in fields]
        assert operation["responses"]["200"]["headers"].keys() == {"X-Ignored-Fields"}
        assert all(value["description"] and value["anyOf"][0] for value in schema["properties"].values())
    assert paths["/v1/models/{name}"]["get"]["parameters"][0]["name"] == "name"
    assert [(each["name"], each["in"]) for each in paths["/v1/cancel/{id}"]["post"]["parameters"]] == [("id", "path"), ("reasoning", "query")]
    assert paths["/livez"]["get"]["security"] == [] and "security" not in paths["/stats"]["get"]
    assert document()["servers"] == [{"url": "/prefix"}] and document()["security"] == []
    locked = openapi_document(ROUTES, Settings(keys=(ApiKey.hashed("key", "alice"),)))
    assert [list(each) for each in locked["security"]] == [["bearer"], ["header"]]


async def test_the_server_offers_its_openapi_document():
    async with serving(FakePool()) as url, importlib.import_module("aiohttp").ClientSession() as client:
        async with client.get(url + "/openapi.json") as response:
            assert await response.json() == openapi_document(ROUTES, Settings())


class EchoWorker(PlayedWorker):
    """Answers at once, in this process: whatever the front accepts becomes one token."""

    def send(self, message):
        WORKER_PIPE.packed(message)
        if isinstance(message, NewPrompt):
            assert all(0 <= token < 300 for token in message.ids)
        if isinstance(message, NewAnswer):
            assert message.max_tokens >= (0 if self.jobs[message.id].request.params.pooling else 1)
            asyncio.get_running_loop().call_soon(self.pool.dispatcher.deliver, self, ending(message.id, said("x", tokens=(5,))))


@pytest.fixture(scope="module")
def port(nanochat_fixtures):
    """The real front and the real pool with a real tokenizer, without a model."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found = []

    async def serve():
        source = resolve_model(Settings(model=str(nanochat_fixtures / "gen5")))
        text = read_nanochat_tokenizer(source.path, 284)
        pool = make_pool(Settings())
        pool.workers[:] = [EchoWorker(pool)]
        pool.supervisor.revision.note_card(ModelCard(text, "fake", 64, (), {}, False))
        await pool.supervisor._prepare()
        pool.supervisor.unload = lambda: None       # there is no process to start again
        async with serving(pool, Settings(downloads=False)) as url:         # no request may ask a hub
            found.append(int(url.rsplit(":", 1)[1]))
            ready.set()
            await stop.wait()
        assert not pool.dispatcher.jobs and not len(pool.dispatcher.pending) and not pool.admission.preparing
        await pool.close()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    yield found[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()


def exchange(port, method, target, body, headers):
    """(status, body), or None if the server closed the connection because the request was not HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    with contextlib.closing(connection):
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in {"Host": "x", "Content-Length": str(len(body)), **headers}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        return response.status, response.read()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["role", "content", "type", "text", "1", "99999", "include_usage", "x"]), inner, max_size=3), max_leaves=6)
messages = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "developer", "tool"]),
                                           "content": st.text(max_size=30) | json_values}), max_size=4)


def value_of(schema):
    """Values, most of which the field's schema allows."""
    kinds = []
    for option in schema["anyOf"]:
        low, high = option.get("minimum", -10), option.get("maximum", 10)
        match option.get("type"):
            case "integer":
                kinds.append(st.integers(int(low), int(high)))
            case "number":
                kinds.append(st.floats(low, high))
            case "array":
                kinds.append(st.lists(json_values, max_size=3))
            case "object":
                kinds.append(st.dictionaries(st.text(max_size=5) | st.just("7"), json_values, max_size=3))
            case _:
                kinds.append(st.sampled_from(option["enum"]) if "enum" in option else json_values)
    return st.one_of(*kinds)


def bodies(path):
    properties = document()["paths"][path][METHOD_OF[path].lower()]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    optional = {name: value_of(schema) | json_values for name, schema in properties.items() if name not in ("messages", "model")}
    optional |= {"tool_choice": json_values, "model": st.just("fake") | json_values, "unknown": json_values}
    valid = st.fixed_dictionaries({"messages": messages}, optional={name: each for name, each in optional.items()})
    right = {"unknown": json_values} | {name: value_of(schema) for name, schema in properties.items() if name not in ("messages", "model")}
    few = st.lists(st.sampled_from(sorted(right)), max_size=2).flatmap(lambda names: st.fixed_dictionaries(
        {"messages": st.just([{"role": "user", "content": "hi"}]), **{name: right[name] for name in names}}))
    return st.one_of(few, few, valid, json_values).map(lambda value: json.dumps(value).encode()) | st.binary(max_size=40)


@pytest.mark.parametrize("schema, fit, unfit", [
    ({"type": "integer"}, [0, -5, 2.0, 10**400], [True, 0.5, float("nan"), float("inf"), "1", None, [1]]),
    ({"type": "number", "minimum": 0, "maximum": 2}, [0, 2, 1.5], [-1, 2.1, False, float("nan"), "1"]),
    ({"enum": [True, "low"]}, [True, "low"], [1, 1.0, False, "LOW", None]),
    ({"type": ["string", "null"]}, ["", "x", None], [0, [], False]),
    ({"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "string"}}]},
     ["", ["a"], ["a", "b"]], [[], ["a", "b", "c"], [1], {}, None]),
    (list_schema(A_TOKEN), [[], [0, 2**31 - 1]], [[-1], [2**31], [True], ["1"], [None], 5]),
    ({"type": "object", "required": ["a"], "properties": {"a": {"type": "string"}}}, [{"a": ""}, {"a": "", "b": 5}], [{}, {"a": 1}, [], "a"]),
    ({"type": "object", "propertyNames": {"pattern": "^[0-9]+$"}, "additionalProperties": {"type": "number"}}, [{}, {"1": 0.5}],
     [{"x": 1}, {"1": "x"}, {"-1": 1}])])
def test_matches_tells_what_fits_a_schema(schema, fit, unfit):
    assert [value for value in fit if not matches(schema, value)] == []
    assert [value for value in unfit if matches(schema, value)] == []


FUNCTION = st.dictionaries(st.sampled_from(["name", "parameters"]), st.none() | st.just({}) | st.text(max_size=2))
plain_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 130) | st.integers() | st.floats() | st.sampled_from([-1.0, 0.0, 1.0, 2.0, 2**31, 2**53, 2.0**70]) |
    st.sampled_from(["", "x", "true", "false", "oldest", "none", "low", "normal", "auto", "required"]),
    # a token id is never written 5.0
    lambda inner: st.lists(inner.filter(lambda value: type(value) is not float), max_size=5)
    | st.dictionaries(st.sampled_from(["1", "99999", "x", "9" * 10]), inner, max_size=2)
    | st.fixed_dictionaries({"function": FUNCTION}), max_leaves=8)


@hypothesis_settings(max_examples=400 if WHOLE else 100, deadline=None)
@given(value=plain_values)
def test_a_field_is_read_or_refused_by_its_name(value):
    """A value that the schema allows never breaks the parser, and the bounds in /openapi.json are the
    server's."""
    for field in (field for fields in BODY_ROUTES.values() for field in fields):
        try:
            field.read(value)
        except RequestError as error:
            assert error.status == 400 and error.param == field.name and field.name in str(error)
            makes_grammar = field.means == "response_format" or field.name in GRAMMARS
            assert not matches(field.schema, value) or makes_grammar


requests = st.sampled_from(sorted(BODY_ROUTES)).flatmap(lambda path: st.tuples(st.just(METHOD_OF[path]), st.just(path), bodies(path)))
odd_targets = st.sampled_from(sorted(document()["paths"])) | st.text(
    st.characters(min_codepoint=33, max_codepoint=126), max_size=20).map(lambda text: "/" + text) | st.sampled_from(
    ["/static/", "/static/%00", "/static/..%2f..", "/v1/models/%ff", "/v1/models//", "/v1/cancel/%0a", "/%", "//", "*", "/?" + "x" * 9000,
     "http://other/", "/v1/models/\xe9", "/static/" + "a" * 5000, "/static/chat.js%00", "/v1/cancel/chatcmpl-"])
odd_headers = st.dictionaries(
    st.sampled_from(["Origin", "X-Request-Id", "Authorization", "Content-Type", "Content-Encoding", "Range", "If-None-Match", "Expect",
                     "If-Modified-Since", "Accept-Encoding", "Access-Control-Request-Method", "Sec-Fetch-Site", "Upgrade", "Cookie",
                     "Connection", "If-Range", "Host"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=12).map(str.strip) | st.sampled_from(
        ["bytes=0-", "bytes=9-1,-5", "gzip", "100-continue", "W/\"x\"", "close", "cross-site", "null", "multipart/form-data"]), max_size=3)
relaxed = hypothesis_settings(max_examples=150 if WHOLE else 50, deadline=None, suppress_health_check=list(HealthCheck))


def check(status, answer):
    assert status < 500, (status, answer)
    if status >= 400 and answer and status != 400:
        error = json.loads(answer)
        assert error.get("detail") or (error["error"] if isinstance(error["error"], str) else error["error"]["message"])


@relaxed
@given(request=requests)
def test_no_body_is_answered_with_5xx(port, request):
    method, path, body = request
    status, answer = exchange(port, method, path, body, {})
    check(status, answer)
    if status == 200 and "completions" in path:
        assert b"x" in answer       # the answer came through


@relaxed
@given(method=st.sampled_from(METHODS), target=odd_targets, headers=odd_headers, body=st.binary(max_size=20))
def test_no_odd_target_method_or_header_gives_5xx(port, method, target, headers, body):
    with contextlib.suppress(http.client.InvalidURL, UnicodeEncodeError):
        status, _ = exchange(port, method, target, body, headers)
        assert status < 500, (method, target, headers, status)


@relaxed
@given(junk=st.binary(min_size=1, max_size=200) | st.lists(st.sampled_from(
    [b"POST ", b"/chat/completions ", b"HTTP/1.1", b"\r\n", b"Host: x", b"Content-Length: 5", b"Transfer-Encoding: chunked", b"0\r\n\r\n",
     b"5\r\nhello\r\n", b"GET ", b"Content-Length: -1", b"Content-Length: 99999999999999", b"{}", b"Connection: close"]), max_size=12).map(b"".join))
def test_no_bytes_are_answered_with_5xx(port, junk):
    import socket
    with socket.create_connection(("127.0.0.1", port), timeout=0.03) as connection:
        # the stream is not ended, which would end the answer too: the server may wait for more bytes
        connection.sendall(junk)
        answer = b""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while part := connection.recv(1 << 16):
                answer += part
    assert b" 5" not in answer[8:11], (junk, answer)
