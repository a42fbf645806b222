"""From the bytes of a body to a request: where it is read, and who reads it, changes nothing."""

import asyncio
import copy
import json
import os
import random
import signal

import aiohttp
import pytest

from chatlm.common.config import LIMITS, Settings
from chatlm.common.errors import ChatServerError, EngineFailure, RequestError
from chatlm.common.messages.protocol import SANDBOX_PIPE, Body, Known, SandboxConfig, SandboxTask
from chatlm.common.messages.requests import InfillTokens
from chatlm.common.messages.wire import Pipe
from chatlm.common.vision.pictures import picture
from chatlm.front.api.batch_lines import line_id
from chatlm.front.api.dialect import model_names
from chatlm.front.api.reading import read_answer
from chatlm.front.intake import intake as intake_module
from chatlm.front.intake.opened_body import Caller
from chatlm.front.intake.budget import Holding
from chatlm.front.intake.body_tasks import BodyTasks
from chatlm.front.intake.envelope import make_envelope, unpacked_envelope
from chatlm.front.intake.intake import Intake
from chatlm.front.intake.sandboxed import OpenBodyCache
from chatlm.front.intake.tasks import NumberedLine
from chatlm.front.pool.catalogue import Catalogue
from chatlm.terminal.batch_command import Local
from fake_pool import FakePool, conversation, serving
from nightly import WHOLE
from patching import patch
from pools import one_and_two as models     # noqa: F401  a fixture
from spoken_paths import BODY_FIELDS

pytestmark = pytest.mark.timeout(120)
LARGE = "x" * (LIMITS.inline_bytes + 1)
CHAT = "/v1/chat/completions"


@pytest.fixture
def crossings(monkeypatch):
    """[task, bodies that were sent with it] of what the front sends to sandboxes."""
    found, packed = [], Pipe.packed

    def noted(pipe, message):
        if pipe is SANDBOX_PIPE and isinstance(message, SandboxTask):
            found.append([message.name, 0])
        elif pipe is SANDBOX_PIPE and isinstance(message, Body):
            found[-1][1] += 1
        return packed(pipe, message)

    monkeypatch.setattr(Pipe, "packed", noted)
    return found


@pytest.fixture
def intake(models):
    intake = Intake(models)
    yield intake
    assert (intake.budget.used, intake.pixels.used) == (0, 0)


def caller_of(route, client="a"):
    return Caller(route, client, "")


def holding_of(intake, client="a"):
    return Holding(intake.budget, client)


async def post(url, body, status=200):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with aiohttp.ClientSession() as client, client.post(url, data=data) as response:
        text = await response.read()
        assert response.status == status, text[:1000]
        return text


async def tokens_of(intake, text, model="one", client="a"):
    """What /tokenize says of a text."""
    body = json.dumps({"model": model, "content": text}).encode()
    with holding_of(intake, client) as holding:
        async with intake.opened(caller_of("/tokenize", client), body) as opened_body:
            return (await intake.text(opened_body, holding))[2]


# where a body is read

SHORT = {"max_tokens": 1, "padding": LARGE}
QUESTION = conversation() | SHORT


ASKED = [
    (CHAT, QUESTION | {"model": "two"}),
    ("/chat/completions", QUESTION),
    ("/v1/completions", {"prompt": "a", **SHORT}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 1, "padding": LARGE}),
    ("/v1/messages", QUESTION),
    ("/api/chat", QUESTION | {"stream": False, "options": {"num_predict": 1}}),
    ("/api/generate", {"prompt": "a", "stream": False, "options": {"num_predict": 1}, "padding": LARGE}),
    ("/v1/embeddings", {"input": "a", "padding": LARGE}),
    ("/v1/messages/count_tokens", conversation() | {"padding": LARGE}),
    ("/tokenize", {"model": "two", "content": "image", "padding": LARGE}),
    ("/detokenize", {"tokens": [1], "padding": LARGE}),
    ("/apply-template", conversation() | {"padding": LARGE}),
    ("/api/show", {"model": "two", "padding": LARGE}),
    ("/models/load", {"model": "two", "padding": LARGE})]


async def test_only_a_large_body_crosses_once(models, crossings):
    """A small one never does."""
    async with serving(models, models.settings) as url:
        for route, body in ASKED:
            small = {name: value for name, value in body.items() if name != "padding"}
            crossings.clear()
            await post(url + route, body)
            assert [task for task in crossings if task[0] in ("open", "read")] == [
                ["open", 1], ["read", 0]], route
            crossings.clear()
            await post(url + route, small)
            assert [task for task in crossings if task[1]] == [], route


async def test_a_comparison_s_body_crosses_once(models, crossings):
    """It does, however many models read it."""
    async with serving(models, models.settings) as url:
        await post(url + "/v1/compare", QUESTION | {"models": ["one", "two", "one"]})
    assert [task for task in crossings if task[0] in ("open", "read")] == [
        ["open", 1], ["read", 0], ["read", 0], ["read", 0]]


def test_a_body_names_its_model_in_the_words_of_its_dialect():
    assert model_names(BODY_FIELDS["/api/show"]) == ("model", "name")
    assert model_names(BODY_FIELDS[CHAT]) == ("model",)
    assert make_envelope({"name": "a"}, "/api/show").model == "a"
    assert make_envelope({"name": "a"}, CHAT).model == ""


async def test_bodies_that_come_at_once_are_not_mixed_up(intake):
    texts = [(f"{number} {LARGE}", ("one", "two")[number % 2], f"client {number % 3}") for number in range(6)]
    found = await asyncio.gather(*(tokens_of(intake, *each) for each in texts))
    again = [await tokens_of(intake, *each) for each in texts]
    assert found == again and len(set(found)) == 6


async def test_two_open_bodies_stay_their_clients_own(intake, crossings):
    texts = [f"{word} {LARGE}" for word in ("first", "second")]
    alone = [await tokens_of(intake, text) for text in texts]
    bodies = [json.dumps({"content": text}).encode() for text in texts]
    for order, sent in (((0, 1), [["read", 1], ["read", 1]]), ((1, 0), [["read", 0], ["read", 1]])):
        crossings.clear()
        with holding_of(intake) as holding:
            async with (intake.opened(caller_of("/tokenize", "a"), bodies[0]) as one,
                        intake.opened(caller_of("/tokenize", "b"), bodies[1]) as two):
                found = [(await intake.text((one, two)[place], holding))[2] for place in order]
        assert found == [alone[place] for place in order] and alone[0] != alone[1]
        assert crossings[:4] == [["open", 1], ["open", 1], *sent]


async def test_a_wrong_front_gets_no_other_client_s_body(models, intake, caplog):
    """The guard: the process looks at the ticket itself. Here the front thinks that it has the first body,
    though the second came after it."""
    first, second = (json.dumps({"content": f"{word} {LARGE}"}).encode() for word in ("first", "second"))
    sandbox = models.find("").pool.admission.sandboxes["bodies"]
    with holding_of(intake) as holding:
        async with (intake.opened(caller_of("/tokenize", "a"), first) as one,
                    intake.opened(caller_of("/tokenize", "b"), second)):
            sandbox.ticket = one.ticket
            with pytest.raises(EngineFailure):
                await intake.text(one, holding)
            assert (await intake.text(one, holding))[2] == await tokens_of(intake, f"first {LARGE}")


@pytest.mark.parametrize("model, fails", [("one", False), ("nobody", True)])
async def test_a_body_is_forgotten_once_read(models, intake, crossings, model, fails):
    """One whose model is not there is forgotten too."""
    sandbox = models.find("").pool.admission.sandboxes["bodies"]
    if fails:
        with pytest.raises(RequestError):
            await tokens_of(intake, LARGE, model)
    else:
        await tokens_of(intake, LARGE, model)
    await asyncio.gather(*intake.forgetting)
    assert crossings[-1] == ["forget", 0] and sandbox.ticket == 0 and not intake.forgetting


def test_a_sandbox_drops_bodies_of_other_tickets():
    """It drops those without one too, and opens what it is sent."""
    cache = OpenBodyCache()
    tasks = BodyTasks(SandboxConfig(Known(Settings(), None), None, 0, 5.0, 0), cache)
    for ticket, model in ((1, "a"), (1, "b"), (2, "c")):
        cache.keep_only(ticket)
        assert unpacked_envelope(
            tasks.open("/tokenize", None, 9, (), json.dumps({"model": model}).encode()).data).model == model
        cache.keep_only(ticket)
        assert cache.body.model == model
    for ticket in (3, 0, 0):
        cache.keep_only(ticket)
        assert cache.body is None
        with pytest.raises(AssertionError, match="the front thinks"):
            tasks.open("/tokenize", None, 9, ())
        tasks.open("/tokenize", None, 9, (), b"{}")


async def test_a_replaced_body_is_not_forgotten_again(models, intake, crossings):
    """A body that another has replaced is not forgotten again."""
    async with intake.opened(caller_of("/tokenize"), json.dumps({"content": LARGE}).encode()):
        await tokens_of(intake, LARGE + "y")
        await asyncio.gather(*intake.forgetting)
        crossings.clear()
    await asyncio.gather(*intake.forgetting)
    assert crossings == []


async def test_a_process_dying_after_open_costs_nothing(models, intake, crossings):
    """It dies between open and read."""
    sandbox = models.find("").pool.admission.sandboxes["bodies"]
    with holding_of(intake) as holding:
        async with intake.opened(caller_of("/tokenize"), json.dumps({"content": LARGE}).encode()) as opened_body:
            pid = sandbox.process.pid
            os.kill(pid, signal.SIGKILL)
            _, _, text = await intake.text(opened_body, holding)
    assert [task for task in crossings if task[0] in ("open", "read")][-1] == ["read", 1]
    assert text == await tokens_of(intake, LARGE) and sandbox.process.pid != pid


async def test_a_client_lost_while_read_leaves_nothing(models, intake):
    """It vanishes while its body is read."""
    for task in [asyncio.ensure_future(tokens_of(intake, f"{number} {LARGE}")) for number in range(4)]:
        await asyncio.sleep(0)
        task.cancel()
    assert b'"tokens"' in await tokens_of(intake, LARGE, client="b")
    assert models.find("").pool.admission.preparing == {}


async def test_a_model_that_is_not_there_leaves_nothing(models, intake):
    with pytest.raises(RequestError) as refused:
        await tokens_of(intake, LARGE, "nobody")
    assert refused.value.status == 404 and b'"tokens"' in await tokens_of(intake, LARGE)
    assert models.find("").pool.admission.preparing == {}


async def test_a_large_body_needs_only_its_own_model(models, intake, monkeypatch):
    """The usual one has failed."""
    usual, pool = models.find("").model, models.find("").pool
    monkeypatch.setattr(usual, "pool", None)
    assert b'"tokens"' in await tokens_of(intake, LARGE, "two")
    monkeypatch.setattr(usual, "pool", pool)


SENT = {  # bodies that are parsed in a sandbox, and what becomes of them
    "bytes": (lambda draw: draw.randbytes(1 << 20), 400),
    "quotes": (lambda draw: b'"' * (16 << 20), 400),
    "text": (lambda draw: b'{"messages": "' + b"x" * (16 << 20), 413),
    "brackets": (lambda draw: b'{"messages": ' + b"[" * (15 << 20), 400),
    "digits": (lambda draw: b'{"messages": ' + b"9" * (15 << 20) + b"}", 400),
    "a text of 15 MB": (lambda draw: json.dumps(conversation("x " * (15 << 19))).encode(), 400),
    "images that are none": (lambda draw: json.dumps({"messages": [{"role": "user", "content": [
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * (9 << 20)}}]}]}).encode(),
        400),
    "half a character": (lambda draw: b'{"messages": "' + b"\xf0\x9f" * 100_000 + b'"}', 400)}


async def test_no_bytes_end_the_server_or_stay_in_memory(models):
    async with serving(models, models.settings) as url:
        for number, (make, status) in enumerate(SENT.values()):
            for route in (CHAT, "/tokenize") if WHOLE else (CHAT, "/tokenize")[number % 2:][:1]:
                text = await post(url + route, make(random.Random(5)), status)
                assert json.loads(text)["error"]["message"]
            assert b'"tokens"' in await post(url + "/tokenize", {"content": LARGE})
            assert b'"tokens"' in await post(url + "/tokenize", {"content": "x"})
            assert models.find("").pool.admission.preparing == {}


# each way reads one body alike

BODIES = [
    conversation(), conversation() | {"seed": 5, "temperature": 0.5, "stop": ["a", "b"], "logprobs": True},
    conversation() | {"temperature": 9}, conversation() | {"stop": ["a"] * 9}, {"messages": []}, {},
    conversation() | {"max_tokens": 0},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "%%%"}}]}]},
    {"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b.png"}}]}]},
    {"messages": [{"role": "nobody", "content": "x"}]}, conversation() | {"thinking_budget": -1}]


async def read_by_route(intake, body):
    with holding_of(intake) as reading, holding_of(intake) as holding:
        opened_body = await intake.open(caller_of(CHAT), json.dumps(body).encode())
        return (await intake.answer(opened_body, reading, holding))[1].request


async def read_by_line(intake, body, number=1):
    text = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": body}).encode()
    with holding_of(intake) as holding:
        served = await intake.resolve("", (), holding)
        opened_body = await intake.open(caller_of(CHAT), text, number=number, opener=served.pool.admission)
        return await intake.line(opened_body, served, holding), text


async def read_by_comparison(intake, body):
    with holding_of(intake) as holding:
        opened_body = await intake.open(caller_of("/v1/compare"),
                                        json.dumps(body | {"models": ["one", "two"]}).encode(),
                                        times=LIMITS.compared)
        served, _, _ = await intake.text(opened_body, holding, sees=False)
        return (await intake.variants(opened_body, holding, served, [0], 5))[0].request


async def checked_by(intake, first, lines):
    """What an upload finds of lines with numbers from `first`."""
    return await intake.check_lines(caller_of("/v1/files"),
                                    [NumberedLine(number, text) for number, text in enumerate(lines, first)])


async def outcome(work):
    """What was read, or the error's text."""
    try:
        return await work
    except ChatServerError as error:
        return str(error)


def essence(request):
    """Of a request, what does not depend on the way."""
    if isinstance(request, str):
        return request
    params = request.params
    asked = request.prompt_ids or request.messages
    return request.max_tokens, params.stop, params.sampling.temperature, asked


@pytest.mark.parametrize("padding", [{}, {"padding": LARGE}], ids=["small", "large"])
async def test_all_readers_read_one_body_alike(models, intake, padding):
    """They are a route, a line, an upload and the command."""
    for body in BODIES:
        await check_readers(models, intake, body | padding)


async def check_readers(models, intake, body):
    by_route = await outcome(read_by_route(intake, body))
    by_line = await outcome(read_by_line(intake, body))
    text = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": body}).encode()
    parsed = by_line if isinstance(by_line, str) else by_line[0].request
    assert essence(by_route) == essence(parsed)
    refused = by_route if isinstance(by_route, str) else ""
    [checked] = await checked_by(intake, 1, [text])
    assert (checked.custom_id, checked.url, checked.model, checked.problem) == ("a", CHAT, "", refused)
    line, status, answered = await Local(models.find("").pool, models.settings).answer(1, text)
    assert line.id == line_id(1, text)
    assert (answered["error"]["message"] if status != 200 else "") == refused
    # its table of fields differs in these
    if "logprobs" not in body and body.get("messages") and len(body.get("stop", ())) < 5:
        assert essence(await outcome(read_by_comparison(intake, body))) == essence(by_route)


async def test_a_line_s_seed_follows_from_what_was_sent(intake):
    for body in (conversation(), conversation() | {"padding": LARGE}):
        parsed, text = await read_by_line(intake, body, 7)
        assert parsed.request.params.sampling.seed == int(line_id(7, text)[:12], 16)
        assert parsed.request.id == line_id(7, text)


# the lines of an upload

def request_line(**body):
    return json.dumps(
        {"custom_id": "a", "method": "POST", "url": CHAT, "body": conversation() | body}).encode()


async def test_lines_are_checked_for_the_model_they_name(intake, monkeypatch):
    """They are not checked on the event loop."""
    def refuse(*arguments):
        raise AssertionError("lines were read on the event loop")
    patch(monkeypatch, intake_module, "checked_lines", refuse)
    lines = [request_line(), request_line(model="two"), request_line(model="nobody"), b"{",
             request_line(model="two", temperature=9),
             request_line(model="two", padding=LARGE, temperature=9)]
    found = await checked_by(intake, 3, lines)
    assert [each.model for each in found] == ["", "two", "nobody", None, "two", "two"]
    problems = [each.problem for each in found]
    assert (problems[:2] == ["", ""] and "nobody" in problems[2]
            and problems[3] == "line 6: is not JSON in UTF-8")
    assert "temperature must be" in problems[4] and problems[5] == problems[4]


async def test_the_named_model_s_complaint_counts(models, intake, monkeypatch):
    """What another model finds wrong counts and not what the usual one does."""
    two = models.find("two").pool
    monkeypatch.setattr(intake, "why_blind", lambda pool: "this model cannot see images" if pool is two
                        else "")
    shown = {"messages": [
        {"role": "user",
         "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}]}]}
    found = await checked_by(intake, 1,
                             [request_line(**shown), request_line(**shown, model="two"),
                              request_line(model="two")])
    assert [each.problem.partition(": ")[2] for each in found] == ["", "this model cannot see images", ""]


async def test_what_stays_of_a_large_line_is_budgeted(intake):
    text = request_line(padding=LARGE, max_tokens=1)
    with holding_of(intake) as holding:
        served = await intake.resolve("", (), holding)
        parsed = await intake.line(await intake.open(caller_of(CHAT), text, number=1), served, holding)
        assert intake.budget.used == holding.size == parsed.size > 0


async def test_a_comparison_s_pictures_are_decoded_once(intake, monkeypatch):
    decoded = []

    async def decode(data, client):
        decoded.append(data)
        return picture(2, 1, b"catcat")

    monkeypatch.setattr(intake, "why_blind", lambda pool: "")
    body = {"models": ["one", "two"], "messages": [{"role": "user", "content": [
        {"type": "text", "text": "x"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}]}]}
    with holding_of(intake) as holding:
        opened_body = await intake.open(caller_of("/v1/compare"), json.dumps(body).encode(),
                                        times=LIMITS.compared)
        for name in body["models"]:
            served = await intake.resolve(name, (), holding)
            monkeypatch.setattr(served.pool.admission, "decode_picture", decode)
            [parsed] = await intake.variants(opened_body, holding, served, [0], 5)
            assert parsed.request.messages[0].pictures == opened_body.pictures and intake.pixels.used == 6
    assert len(decoded) == 1


async def test_lines_too_complex_together_go_one_by_one(intake, monkeypatch):
    """Lines that are too complex together are checked one by one."""
    checked, together = [], intake._check_in_sandbox

    async def at_most_one(caller, served, lines, refusal):
        checked.append(len(lines))
        if len(lines) > 1:
            raise RequestError("too complex: this takes more than 5 s", code="too_complex")
        return await together(caller, served, lines, refusal)

    monkeypatch.setattr(intake, "_check_in_sandbox", at_most_one)
    found = await checked_by(intake, 1, [request_line(), request_line(padding=LARGE, temperature=9), b"{"])
    assert checked == [3, 1]        # the small ones are checked here
    problems = [each.problem.partition(" not ")[0] for each in found]
    assert problems == ["", "temperature must be a finite number from 0 to 2,", "line 3: is"]


# nothing that a body was read with changes it

TOOL = {"name": "f", "description": "d",
        "parameters": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": json.dumps({"a": "b"})}}
TURNS = [{"role": "system", "content": "s"},
         {"role": "user",
          "content": [{"type": "text", "text": "x"},
                      {"type": "image_url", "image_url": {"url": "data:image/png;base64,aaaa"}}]},
         {"role": "assistant", "content": None, "tool_calls": [CALL]},
         {"role": "tool", "content": "y", "tool_call_id": "a"}]
RICH = {
    "/chat/completions": conversation() | {"truncate": "oldest"},
    CHAT: {"messages": TURNS, "tools": [{"type": "function", "function": TOOL}], "tool_choice": "required",
           "logit_bias": {"5": 1}, "stop": ["a"]},
    "/v1/completions": {"prompt": ["a", "b"],
                        "response_format": {"type": "json_schema",
                                            "json_schema": {"schema": TOOL["parameters"]}}, "stop": "x"},
    "/infill": {"input_prefix": "a", "input_suffix": "b", "input_extra": [{"filename": "x", "text": "y"}]},
    "/v1/responses": {
        "input": [{"role": "user", "content": "x"},
                  {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}],
                      "tools": [{"type": "function", **TOOL}], "instructions": "i"},
    "/v1/messages": conversation() | {"max_tokens": 5, "system": "s",
                                      "tools": [{"name": "f", "input_schema": TOOL["parameters"]}]},
    "/api/chat": {"messages": [{"role": "user", "content": "x", "images": ["aaaa"]}],
                  "options": {"stop": ["a"], "num_predict": 3}},
    "/api/generate": {"prompt": "x", "system": "s", "format": "json"},
    "/v1/embeddings": {"input": ["a", "b"]}, "/v1/rerank": {"query": "q", "documents": ["a", {"text": "b"}]},
    "/v1/score": {"text_1": "a", "text_2": ["b"]}}


@pytest.mark.parametrize("route", RICH)
def test_reading_a_body_leaves_it_as_it_was(route):
    """A body may be read by several models."""
    known = Known(Settings(), "tagged", infill=InfillTokens(1, 2, 3) if route == "/infill" else None)
    envelope = make_envelope(copy.deepcopy(RICH[route]), route)
    envelope.show([picture(2, 1, b"catcat")] * len(envelope.lift.files))
    before = copy.deepcopy(envelope.fields)
    first = read_answer(route, envelope.fields, known)
    assert envelope.fields == before
    again = read_answer(route, envelope.fields, known)
    assert (first.kind, first.stream, first.request.messages, first.request.prompts) == (
        again.kind, again.stream, again.request.messages, again.request.prompts)


async def test_a_body_is_given_back_before_its_rest_counts():
    """The bytes of a body are given back before what stays of it is taken."""
    intake = Intake(Catalogue(Settings(), FakePool()))
    body = json.dumps({"prompt": "x" * 2000, "padding": LARGE}).encode()
    intake.budget.per_client = len(body) + 1000          # not enough for both
    with holding_of(intake) as holding:
        with holding_of(intake) as reading:
            await reading.wait_for(len(body))
            opened_body = await intake.open(caller_of("/v1/completions"), body)
            _, parsed = await intake.answer(opened_body, reading, holding)
        assert intake.budget.used == holding.size == parsed.size
    assert intake.budget.used == 0
