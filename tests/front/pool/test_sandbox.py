"""Work that clients could make slow runs in processes with limits: templates, schemas, large bodies."""

import asyncio
import gc
import json
import os
import signal
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import psutil
import pytest

from chatlm.common import config
from chatlm.common.config import Settings
from chatlm.common.errors import EngineFailure, Overloaded, RequestError
from chatlm.common.messages import wire
from chatlm.common.messages.protocol import (
    SANDBOX_PIPE,
    Known,
    ModelCard,
    NewAnswer,
    NewPrompt,
    ParsedBody,
    SandboxResult,
    SandboxConfig,
    SandboxTask,
)
from chatlm.common.messages.requests import HistoryForm, Message, Piece, Request
from chatlm.common.messages.wire import HEADER
from chatlm.common.processes import start as processes_start
from chatlm.common.processes.start import PROCESS_COMMAND
from chatlm.common.text.grammar import json_grammar
from chatlm.common.text.history_forms import TEXT_ALONE
from chatlm.common.text.tokenizer import compile_chat_template
from chatlm.front.admission.admission import Admission, SharedAdmission
from chatlm.front.admission.sandbox import Sandbox, Sandboxes, next_message
from chatlm.front.api.spoken import rows_by_path
from chatlm.front.front import Front
from chatlm.front.intake import sandboxed
from chatlm.front.intake import budget as budgets
from chatlm.front.intake.crossing import packed_body, unpacked_body
from chatlm.front.pool.pool import make_pool
from chatlm.worker.weights.formats.gguf.description import gguf_text
from chatlm.worker.weights.formats.gguf.file import read_gguf
import answers
from answers import asked, ending
from fake_pool import conversation, serving
from nightly import WHOLE, by_day
from patching import patch
from pools import PlayedWorker
from tiny_gguf import small_gguf_metadata

pytestmark = pytest.mark.timeout(120)
SLOW_TEMPLATE = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}done"


def many_patterns(count):
    """A schema of 1 KB whose validation takes 4 times as long for each two more; 18: 7 s and 500 MB, 26: the
    memory of a machine."""
    return {
        "type": "string",
        "allOf": [{"pattern": f".*{chr(97 + i % 26)}.*{chr(98 + i % 25)}.*"} for i in range(count)],
    }


@pytest.fixture(scope="session")
def default_text(default_model_path):
    metadata, _ = read_gguf(default_model_path)
    return gguf_text(default_model_path, metadata)


@pytest.fixture(scope="session")
def chat_text(default_text):
    """The default model's template and a tokenizer of bytes, which opens in a moment."""
    metadata = small_gguf_metadata("gpt-2", **{"tokenizer.chat_template": default_text.chat_template})
    metadata["tokenizer.ggml.tokens"] += ["<|im_start|>", "<|im_end|>"]
    metadata["tokenizer.ggml.token_type"] += [3, 3]
    return gguf_text(Path("tiny"), metadata)


class EchoWorker(PlayedWorker):
    """Answers at once, in this process, with the number of the prompt's tokens."""

    def __init__(self, pool):
        super().__init__(pool)
        self.prompts = []

    def send(self, message):
        if isinstance(message, NewPrompt):
            self.prompts.append(message.ids)
        if isinstance(message, NewAnswer):
            piece = answers.said(str(len(self.prompts[-1])), tokens=(5,))
            asyncio.get_running_loop().call_soon(
                self.pool.dispatcher.deliver, self, ending(message.id, piece)
            )


@pytest.fixture
async def open_pool(chat_text):
    """A function that makes a pool with a tokenizer and no model; its processes must end with it."""
    pools = []

    async def start(settings=Settings(), context_length=4096, text=chat_text, **changes):
        pool = make_pool(settings)
        limits = pool.admission
        limits.BODY_S = limits.TEMPLATE_S = limits.SCHEMA_S = 0.5
        pool.workers[:] = [EchoWorker(pool)]
        pool.supervisor.revision.note_card(
            ModelCard(replace(text, **changes), "fake", context_length, (), {}, False)
        )
        pools.append(pool)
        await pool.supervisor._prepare()
        return pool

    yield start
    for pool in pools:
        processes = [sandbox.process.pid for sandbox in pool.admission.sandboxes.values() if sandbox.process]
        await pool.close()
        assert not any(psutil.pid_exists(pid) for pid in processes)


async def said(pool, request):
    return "".join([event.text async for event in pool.answer(request) if isinstance(event, Piece)])


def reading(route):
    """The task of a text route."""
    return "read", route, None, (), [], "", "text", [route]


def ask(name, text="hello", **more):
    return asked(name, (Message("user", text),), max_tokens=5, **more)


@pytest.mark.parametrize("how", by_day(["response_format", "tools", "large"], "tools"))
async def test_a_greedy_schema_is_a_400(open_pool, how):
    """It would take the machine; others go on."""
    pool = await open_pool()
    pool.tokenizer.tool_format = "tagged"
    schema = many_patterns(24)
    body = conversation() | {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    if how == "tools":
        function = {
            "name": "f",
            "parameters": {"type": "object", "properties": {"a": schema}, "required": ["a"]},
        }
        body = conversation() | {
            "tools": [{"type": "function", "function": function}],
            "tool_choice": "required",
        }
    if how == "large":
        body["ignored"] = "x" * 100_000
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        hostile = asyncio.ensure_future(client.post(url + "/v1/chat/completions", json=body))
        while not pool.admission.preparing:
            await asyncio.sleep(0)
        assert (
            await client.post(url + "/v1/chat/completions", json=conversation())
        ).status == 200 and not hostile.done()
        error = (await (await hostile).json())["error"]
        assert (
            (await hostile).status == 400
            and error["code"] == "too_complex"
            and "too complex" in error["message"]
        )
        body["messages"], body["response_format"] = conversation()["messages"], {"type": "json_object"}
        body.pop("tools", None), body.pop("tool_choice", None)
        assert (await client.post(url + "/v1/chat/completions", json=body)).status == 200
    assert not pool.admission.preparing and not pool.dispatcher.jobs


async def test_schemas_are_checked_after_the_limits(open_pool):
    """They are those of queue and key."""
    pool = await open_pool(Settings(max_concurrent_per_key=1, max_queue=0, max_batch=1))
    hostile = ask("a", client="me", grammar=json_grammar(many_patterns(24), ""))
    first = asyncio.ensure_future(said(pool, hostile))
    while not pool.admission.preparing:
        await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="already waiting"):
        await said(pool, replace(hostile, id="b"))
    pool.dispatcher.settings = Settings(max_concurrent_per_key=1)
    with pytest.raises(Overloaded, match="at most 1 of your requests"):
        await said(pool, replace(hostile, id="b"))
    with pytest.raises(RequestError, match="409|running"):
        await said(pool, replace(hostile, params=replace(hostile.params, client="other")))
    with pytest.raises(RequestError, match="too complex"):
        await first


async def test_a_grammar_is_checked_once_for_each_owner(open_pool, monkeypatch):
    pool, checked = await open_pool(), []
    perform = pool.admission.sandboxes["schemas"].perform
    monkeypatch.setattr(
        pool.admission.sandboxes["schemas"],
        "perform",
        lambda config, client, *task, **bodies: (
            checked.append(client) or perform(config, client, *task, **bodies)
        ),
    )
    grammar = json_grammar({"type": "boolean"}, "")
    for number, owner in enumerate("aabba"):
        await said(pool, ask(str(number), client=owner, owner=owner, grammar=grammar))
    assert checked == ["a", "b"]


async def test_requests_being_read_do_not_count_as_waiting(open_pool):
    """This holds while rows are free."""
    pool = await open_pool(Settings(max_queue=0, max_batch=8))
    assert len(await asyncio.gather(*(said(pool, ask(str(number))) for number in range(8)))) == 8


async def test_clients_may_share_an_id(open_pool, monkeypatch):
    """Their large bodies come under the same one."""
    pool, bodies = (
        await open_pool(),
        [json.dumps({"messages": [{"role": "user", "content": text}]}).encode() for text in "abc"],
    )
    patch(monkeypatch, config, "LIMITS", replace(config.LIMITS, inline_bytes=10))
    async with serving(pool) as url, aiohttp.ClientSession(headers={"X-Request-Id": "order-1"}) as session:
        responses = await asyncio.gather(
            *(session.post(url + "/chat/completions", data=body) for body in bodies)
        )
        assert [response.status for response in responses] == [200] * 3
        for response in responses:
            response.close()


@pytest.mark.parametrize(
    "template",
    by_day(
        [
            SLOW_TEMPLATE,
            "{{ 'a' * 10000000000 }}",
            "{% for i in range(9999) %}{{ 'a' * 100000 }}{% endfor %}",
            "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
            "{{ '%10000000000d' % 1 }}",
        ],
        SLOW_TEMPLATE,
        "{{ 'a' * 10000000000 }}",
    ),
)
async def test_a_greedy_template_is_refused(open_pool, template, caplog):
    """It takes too much, and the server starts."""
    pool = await open_pool(chat_template=template)
    assert pool.ready and "chats may be refused" in caplog.text
    with pytest.raises(RequestError, match="too complex|template refused|too long|tokens and the context"):
        await said(pool, ask("a"))
    assert await said(pool, asked("b", prompts=("x y z",), max_tokens=5)) == str(
        len(pool.tokenizer.encode("x y z"))
    )


@pytest.mark.slow
async def test_compiling_a_template_counts_for_nobody(open_pool):
    """jinja computes constants when it compiles: here for more than the half second that a request gets."""
    slow, took_s = "{{ ('abcdefgh' * 10000000) | upper | lower | length }}", 0.0
    while took_s < 1:
        slow, began_s = slow + slow, time.process_time()
        compile_chat_template(slow)
        took_s = time.process_time() - began_s
    pool = await open_pool(
        chat_template=(
            f"{{% if messages[0].content == 'x' %}}{slow}{{% endif %}}"
            f"{{% if messages[0].content == 'trap' %}}{SLOW_TEMPLATE}{{% endif %}}hi"
        )
    )
    with pytest.raises(RequestError, match="too complex"):
        await said(pool, ask("a", "trap"))
    assert await said(pool, ask("b")) == str(len(pool.tokenizer.encode("hi")))


async def test_too_long_a_prompt_does_not_cross_the_pipe(open_pool, monkeypatch):
    """A template makes it."""
    pool = await open_pool(chat_template="{{ 'ab ' * 2000000 }}", context_length=10**7)
    with pytest.raises(RequestError, match="6000000 characters.*4194304") as refused:
        await said(pool, ask("a"))
    assert refused.value.code == "context_length_exceeded"


async def test_a_template_renders_as_it_would_here(open_pool, default_text):
    """A template is filled in as it would be here."""
    pool = await open_pool(text=default_text)
    messages = [
        Message("system", "Be <|im_start|> brief \U0001f600\ud800"),
        Message("user", "x\u2028\ty"),
        Message("assistant", ""),
        Message("user", "z"),
    ]
    assert await pool.admission.prompts.render(messages, (), "me") == tuple(pool.tokenizer.render(messages))


ALIKE = [
    ("/chat/completions", conversation("hi") | {"seed": 5, "truncate": "oldest"}),
    (
        "/v1/chat/completions",
        conversation("hi") | {"seed": 5, "stream": True, "stream_options": {"include_usage": True}, "n": 2},
    ),
    ("/v1/chat/completions", conversation("hi") | {"model": "nobody"}),
    ("/v1/chat/completions", conversation("hi") | {"temperature": 3}),
    ("/v1/completions", {"prompt": ["a b", [1, 2, 3]], "seed": 5, "echo": True, "max_tokens": 2}),
    ("/v1/completions", {"prompt": [[1, 2, 10**6]]}),
    ("/v1/completions", {"prompt": "a " * 5000}),
    ("/v1/completions", {"seed": 5, "max_tokens": 2}),
    ("/tokenize", {"content": ["a b", 5, "<|im_end|>"], "with_pieces": True}),
    ("/tokenize", {"content": [10**6]}),
    ("/detokenize", {"tokens": [5, 6, 7]}),
    ("/apply-template", conversation("hi")),
    ("/apply-template", {"messages": []}),
]


async def test_a_body_is_answered_alike_wherever_it_is_read(open_pool, monkeypatch):
    pool = await open_pool(Settings(log_conversations=True))
    async with serving(pool, pool.settings) as url, aiohttp.ClientSession() as client:
        for route, body in ALIKE:
            answers = []
            for inline in (1 << 16, 0):
                patch(monkeypatch, config, "LIMITS", replace(config.LIMITS, inline_bytes=inline))
                async with client.post(url + route, json=body, headers={"X-Request-Id": "same"}) as response:
                    text = (await response.text()).replace("created", "")
                    answers.append(
                        (
                            response.status,
                            *[
                                line
                                for line in text.split(", ")
                                if "_ms" not in line
                                and "per_second" not in line
                                and not line.startswith('"": 1')
                            ],
                        )
                    )
            assert answers[0] == answers[1] and answers[0][0] in (200, 400, 404), (route, body)
    assert pool.admission.sandboxes["bodies"].process


CALLED = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "a", "function": {"name": "weather", "arguments": '{"city": "Ro'}}],
    },
    {"role": "tool", "tool_call_id": "a", "content": "Rain"},
]
TOLD = (
    "{% if tools %}{{ tools | tojson }}<tool_call>{% endif %}{% for m in messages %}{% if m.role != 'tool'"
    " %}{{ '<|im_start|>' + m.role + ': ' + (m.content or '') }}{% for c in m.tool_calls or [] %}{% for name,"
    " value in c.function.arguments | items %}{{ name + '=' + value }}{% endfor %}{% endfor %}{% endif %}{%"
    " endfor %}"
)


async def test_lost_results_are_in_the_prompt_anyhow(open_pool, monkeypatch, caplog):
    """The template loses them wherever a body is read, and the log says so."""
    pool = await open_pool(chat_template=TOLD)
    assert (
        caplog.text.count(
            "the model's chat template: it loses results of calls, which are shown as messages of the user"
        )
        == 1
    )
    async with serving(pool, pool.settings) as url, aiohttp.ClientSession() as client:
        for inline in (1 << 16, 0):
            patch(monkeypatch, config, "LIMITS", replace(config.LIMITS, inline_bytes=inline))
            async with client.post(url + "/apply-template", json={"messages": CALLED}) as response:
                assert (await response.json())["prompt"].endswith(
                    'assistant: arguments={"city": "Ro<|im_start|>user:'
                    ' <tool_response>\nRain\n</tool_response>'
                )
            async with client.post(url + "/v1/chat/completions", json={"messages": CALLED}) as response:
                assert response.status == 200
    one, other = pool.workers[0].prompts
    assert one == other and "Rain" in pool.tokenizer.decode(one)
    assert caplog.text.count("loses results") == 1


@pytest.mark.parametrize(
    "forever",
    by_day([SLOW_TEMPLATE, "{{ 'ab ' * 2000000 }}", "{{ 'a' * 10000000000 }}"], "{{ 'ab ' * 2000000 }}"),
)
async def test_an_endless_template_sees_calls_as_text(open_pool, forever):
    """It never ends with calls."""
    pool = await open_pool(
        chat_template=TOLD.replace(
            "{% if m.role", f"{{% if m.tool_calls %}}{forever}{{% endif %}}{{% if m.role"
        )
    )
    assert pool.ready and pool.tokenizer.forms == (TEXT_ALONE, TEXT_ALONE)
    async with serving(pool, pool.settings) as url, aiohttp.ClientSession() as client:
        async with client.post(url + "/v1/chat/completions", json={"messages": CALLED}) as response:
            assert response.status == 200 and "Rain" in pool.tokenizer.decode(pool.workers[0].prompts[-1])


@pytest.mark.parametrize("forever", by_day([SLOW_TEMPLATE, "{{ 'ab ' * 2000000 }}"], "{{ 'ab ' * 2000000 }}"))
async def test_calls_that_no_form_ends_are_refused(open_pool, forever):
    """Others than their conversation go on."""
    pool = await open_pool(chat_template=f"{{% if messages | length > 1 %}}{forever}{{% endif %}}" + TOLD)
    assert pool.ready and pool.tokenizer.forms == (HistoryForm(), HistoryForm())
    async with serving(pool, pool.settings) as url, aiohttp.ClientSession() as client:
        for messages, status in ((CALLED, 400), (CALLED[:1], 200)):
            async with client.post(url + "/v1/chat/completions", json={"messages": messages}) as response:
                assert response.status == status, await response.text()


async def test_a_text_route_refuses_millions_of_items(open_pool):
    pool = await open_pool()
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        for route, body in (
            ("/tokenize", {"content": [1] * 2_000_000}),
            *(
                (
                    ("/detokenize", {"tokens": [1] * 2_000_000}),
                    ("/v1/completions", {"prompt": ["a"] * 2_000_000}),
                )
                if WHOLE
                else ()
            ),
        ):
            async with client.post(url + route, json=body) as response:
                text = await response.text()  # a slow processor is over its time before all items are counted
                assert response.status == 400 and ("at most" in text or "too complex" in text)


def junk(**more):
    """A body whose tools, template options and unknown members are lists."""
    many = [[12345.5, "secret"]] * 9
    return (
        conversation("secret question")
        | {
            "tools": [
                {
                    "type": "function",
                    "other": many,
                    "function": {"name": "f", "other": many, "parameters": {"x": many}},
                }
            ],
            "chat_template_kwargs": {"x": many},
            "metadata": {"x": many},
            "stream": True,
        }
        | more
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "route, inline",
    [
        ("/v1/chat/completions", 0),
        *[
            pytest.param(route, inline, marks=pytest.mark.slow)
            for route, inline in (
                ("/v1/responses", 0),
                ("/v1/responses", 1 << 20),
                ("/v1/chat/completions", 1 << 20),
                ("/v1/messages", 0),
                ("/api/chat", 1 << 20),
            )
        ],
    ],
)
async def test_the_makings_of_a_prompt_are_freed_early(open_pool, route, inline, monkeypatch):
    """What made it does not stay until the answer ends."""
    patch(monkeypatch, config, "LIMITS", replace(config.LIMITS, inline_bytes=inline))
    pool = await open_pool()
    pool.tokenizer.tool_format = "tagged"
    worker = pool.workers[0]
    worker.send = lambda message: None  # no answer comes
    tools = junk()["tools"]
    body = junk(max_tokens=4321)
    if route == "/v1/responses":
        body = {
            "input": "secret question",
            "stream": True,
            "max_output_tokens": 4321,
            "reasoning": {"x": tools},
            "tools": [{"type": "function", "name": "f", "parameters": {"x": tools}, "other": tools}],
        }
    elif route == "/v1/messages":
        body = body | {
            "tools": [{"name": "f", "input_schema": {"x": tools}, "other": tools}],
            "metadata": {"x": tools},
        }
    elif route == "/api/chat":
        body = body | {"options": {"num_predict": 4321, "x": tools}}
    body = json.dumps(body).encode()
    del tools
    async with (
        serving(pool) as url,
        aiohttp.ClientSession() as client,
        client.post(url + route, data=body) as response,
    ):
        assert response.status == 200, await response.text()
        gc.collect()
        requests = [
            each for each in gc.get_objects() if isinstance(each, Request) and each.max_tokens == 4321
        ]
        assert requests and not any(each.tools or each.messages or each.template_options for each in requests)
        assert not [
            each
            for each in gc.get_objects()
            if type(each) is list and each and type(each[0]) is float and each[0] == 12345.5
        ]


async def test_large_bodies_count_until_their_answers_end(open_pool, default_text, monkeypatch):
    """What stays of them is in the budget."""
    budget, followed = budgets.Budget(4 * 650_000), asyncio.Event()
    patch(monkeypatch, budgets, "Budget", lambda total, share=4: budget)
    pool = await open_pool(context_length=50_000, text=default_text)
    worker, unanswered = pool.workers[0], []
    answer, worker.send = worker.send, lambda message: unanswered.append(message)
    follow = Front.follow

    async def following(*given):
        try:
            return await follow(*given)
        finally:
            followed.set()

    monkeypatch.setattr(Front, "follow", following)
    body = {"input": "Hi", "instructions": "a " * 34_000, "stream": True}  # twice this finds no room
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        url += "/v1/responses"
        for more, leaves in (({}, False), ({}, True), ({"resumable": True}, True)):
            async with client.post(url, json=body | more) as response:
                assert response.status == 200 and 4 * 68_000 + 8 * 30_000 < budget.used < 580_000
                async with client.post(url, json=body) as refused:
                    assert refused.status == 503 and int(refused.headers["Retry-After"]) > 0
                    assert "large bodies" in (await refused.json())["error"]["message"]
                if leaves:
                    response.close()
                if more:  # its answer goes on, and so does what it holds
                    await followed.wait()
                    assert budget.used > 500_000
                if more or not leaves:
                    for message in unanswered:
                        answer(message)
                if not leaves:
                    assert b"response.completed" in await response.read()
            unanswered.clear()
            while budget.used:
                await asyncio.sleep(0.01)
    assert not budget.used_by


@pytest.mark.parametrize(
    "parsed",
    [
        ParsedBody(asked(prompts=("a", (1, 2), ()), prompt_ids=((3,), (1, 2), ())), echo=True),
        ParsedBody(
            asked(messages=(), prompt_ids=(tuple(range(300)) * 300,)),
            repeated=b"\xff{}",
            ignored_tools=("x",),
        ),
        ParsedBody(
            asked(prompts=("",), prompt_ids=((2**16,) * 70_000,)), kind="completion", details={"a": [1]}
        ),
    ],
)
async def test_a_parsed_body_comes_back_as_it_was(parsed):
    """It comes from its sandbox, and ids are shared."""
    result = SandboxResult(packed_body(parsed, parsed.request.prompt_ids))
    values = wire.unpacked(SandboxResult, SANDBOX_PIPE.packed(result)[HEADER.size :]).value
    came = unpacked_body(values, 2**16 + 1)
    assert came == parsed
    ids = [each for prompt in came.request.prompt_ids for each in prompt]
    assert len(set(map(id, ids))) == len(set(ids))
    assert all(
        prompt is own
        for prompt, own in zip(came.request.prompts, came.request.prompt_ids)
        if not isinstance(prompt, str)
    )


async def test_a_large_message_is_decoded_in_a_thread(monkeypatch):
    """A small one is not."""
    decoded, unpacked = [], wire.unpacked
    patch(
        monkeypatch,
        wire,
        "unpacked",
        lambda *given: decoded.append(threading.current_thread()) or unpacked(*given),
    )
    for size, here in ((10, True), (300_000, False)):
        reader = asyncio.StreamReader()
        reader.feed_data(SANDBOX_PIPE.packed(SandboxResult("x" * size)))
        assert (await next_message(reader, SANDBOX_PIPE)).value == "x" * size
        assert (decoded.pop() is threading.current_thread()) is here


async def test_a_refused_body_is_freed_without_collection(open_pool):
    """A collection that frees many bodies of 16 MiB at once blocked the event loop for 0.2 s."""
    pool = await open_pool()
    gc.disable()
    try:
        try:
            await pool.admission.perform("bodies", "a", *reading("/detokenize"), bodies=[b"no JSON"])
        except RequestError as error:
            refusal = weakref.ref(error)
        await asyncio.sleep(0)  # the loop lets go of the task that ended
        assert refusal() is None
    finally:
        gc.enable()


async def test_a_client_that_leaves_mixes_up_no_replies(open_pool):
    """It costs no process."""
    pool = await open_pool()
    sandbox = pool.admission.sandboxes["bodies"]
    large = json.dumps({"content": "x " * 100_000}).encode()
    leaving = [
        asyncio.ensure_future(pool.admission.perform("bodies", "a", *reading("/tokenize"), bodies=[large]))
        for _ in range(4)
    ]
    while not sandbox.process:
        await asyncio.sleep(0)
    for task in leaving:
        task.cancel()
    pid = sandbox.process.pid
    assert b'"tokens"' in await pool.admission.perform(
        "bodies", "b", *reading("/tokenize"), bodies=[b'{"content": "x"}']
    )
    assert sandbox.process.pid == pid


@pytest.fixture
def started(monkeypatch):
    """The processes that sandboxes start from now on."""
    processes, start_child = [], processes_start.start_child

    def start(*arguments):
        process, ours = start_child(*arguments)
        processes.append(process)
        return process, ours

    patch(monkeypatch, processes_start, "start_child", start)
    return processes


def answered(body):
    return json.loads(body)["content"]


@pytest.fixture
async def admission():
    shared = SharedAdmission()
    one = Admission(lambda *client: None, shared)
    one.AHEAD_S = 0.0
    yield one
    await shared.close()


async def test_a_sandbox_yields_once_it_is_prepared(open_pool):
    """Somebody waits for its first task, so what that imports is as urgent as the front; then what a client
    could make slow yields."""
    pool = await open_pool()
    schemas, own = pool.admission.sandboxes["schemas"], os.getpriority(os.PRIO_PROCESS, 0)
    for source in (json_grammar({"type": "string"}, "x"), json_grammar({"type": "integer"}, "x")):
        await pool.admission.perform("schemas", "a", "check_grammar", source, "x")
        assert os.getpriority(os.PRIO_PROCESS, schemas.process.pid) == own + 10


def test_a_sandbox_imports_before_it_yields(monkeypatch):
    """The order of what `perform` does with a first schema."""
    order = []
    monkeypatch.setattr(sandboxed.os, "nice", lambda niceness: order.append(("nice", niceness)))
    monkeypatch.setattr(sandboxed.signal, "setitimer", lambda *timer: None)
    tasks = SimpleNamespace(
        prepare=lambda name, arguments: order.append(("prepare", name, *arguments)),
        task=lambda name: lambda *given: order.append((name, *given)) or SandboxResult(None),
    )
    task, channel = SandboxTask("check_grammar", ["source", "x"]), SimpleNamespace(send=lambda message: None)
    sandboxed.perform(task, tasks, channel, 1.0, 10)
    assert order == [
        ("prepare", "check_grammar", "source", "x"),
        ("nice", 10),
        ("check_grammar", "source", "x"),
    ]


async def test_the_sandbox_of_templates_starts_ahead(admission, chat_text):
    """Before the model's text is known; the process that has started fills in the model's template."""
    sandbox = admission.sandboxes["templates"]
    await admission.start_ahead()
    process = sandbox.process
    assert process.poll() is None
    await admission.expect(chat_text, Settings())
    assert sandbox.process is process and sandbox.configs == [admission.configs["templates"]]
    text = await admission.perform(
        "templates",
        "",
        "fill_template",
        {"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True},
    )
    assert "<|im_start|>user\nHi<|im_end|>" in text


async def test_a_model_without_a_template_keeps_no_sandbox(admission, chat_text):
    ahead = asyncio.ensure_future(admission.start_ahead())
    while not admission.sandboxes["templates"].process:
        await asyncio.sleep(0)
    await admission.expect(
        replace(chat_text, chat_template=None), Settings()
    )  # while the empty template is filled in
    await ahead
    assert admission.sandboxes["templates"].process is None
    await admission.start_ahead()  # too late: there is a text
    assert admission.sandboxes["templates"].process is None


async def test_a_sandbox_that_fails_ahead_stops_no_start(admission, chat_text):
    sandbox = admission.sandboxes["templates"]
    command = sandbox.command
    sandbox.command = [sys.executable, "-c", "raise SystemExit(1)"]
    await admission.start_ahead()
    sandbox.command = command
    await admission.expect(chat_text, Settings())
    assert sandbox.process.poll() is None


async def test_a_killed_sandbox_is_replaced(open_pool):
    """Something outside kills it, and the task is done."""
    pool = await open_pool()
    sandbox = pool.admission.sandboxes["templates"]
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGPROF, signal.SIGABRT):
        sandbox.process.send_signal(number)
        assert await said(pool, ask("a")) == await said(
            pool, ask("b")
        )  # it ignores SIGTERM: the front decides


async def test_all_sandboxes_may_be_killed_while_idle(open_pool, monkeypatch):
    """They are between two requests."""
    pool = await open_pool()
    patch(monkeypatch, config, "LIMITS", replace(config.LIMITS, inline_bytes=100))
    small, large = (
        conversation("hi"),
        conversation("x " * 100) | {
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}}
        },
    )
    async with serving(pool) as url, aiohttp.ClientSession() as client:
        for _ in range(3):
            for body in (small, large, large):
                async with client.post(url + "/v1/chat/completions", json=body) as response:
                    assert response.status == 200, await response.text()
            pool.admission.valid_grammars.clear()  # else the schema would be checked only once
            killed = [
                sandbox.process
                for name, sandbox in pool.admission.sandboxes.items()
                if name != "pictures"
            ]  # that has none now
            for process in killed:
                process.kill()


async def test_a_sandbox_that_dies_early_is_replaced(open_pool, started):
    """It dies while it is told its task, which is done."""
    pool = await open_pool()
    sandbox = pool.admission.sandboxes["bodies"]
    small, large = (json.dumps({"tokens": [5] * count}).encode() for count in (1, 100_000))
    expected = [
        answered(await pool.admission.perform("bodies", "a", *reading("/detokenize"), bodies=[body]))
        for body in (small, large)
    ]
    for body, text in zip((small, large), expected):
        sandbox.process.send_signal(signal.SIGSTOP)
        task = asyncio.ensure_future(
            pool.admission.perform("bodies", "a", *reading("/detokenize"), bodies=[body])
        )
        for _ in range(20):  # until it has sent what the pipe holds; the rest waits
            await asyncio.sleep(0)
        assert not sandbox.turns.free and (body is small or sandbox.writer.transport.get_write_buffer_size())
        sandbox.process.send_signal(signal.SIGKILL)
        assert answered(await task) == text
    assert len(started) == 4  # two that opening the pool has started


class Impatient(Sandbox):
    """It waits only a moment for the first process, and long enough for the others."""

    PATIENCE_S = property(lambda self: next(self.waits, 60.0))


@pytest.mark.parametrize("count", [1, 200_000])
async def test_a_sandbox_that_hangs_early_is_replaced(chat_text, count):
    """It hangs before it has read its task, which is done."""
    sandbox, config = (
        Impatient(PROCESS_COMMAND),
        SandboxConfig(Known(Settings(), None), chat_text, 64, 5.0, 1 << 30),
    )
    sandbox.waits, body = iter(()), json.dumps({"tokens": [5] * count}).encode()
    expected = await sandbox.perform(config, "a", *reading("/detokenize"), bodies=[body])
    hangs = sandbox.process
    hangs.send_signal(signal.SIGSTOP)
    sandbox.waits = iter([0.1])
    assert (
        await sandbox.perform(config, "a", *reading("/detokenize"), bodies=[body]) == expected
        and hangs.returncode == -signal.SIGKILL
    )
    await sandbox.close()


async def test_a_task_that_ends_its_sandbox_is_refused(open_pool, started):
    """The refusal comes at once."""
    pool = await open_pool(
        chat_template="{% if messages[0].content == 'trap' %}" + SLOW_TEMPLATE + "{% endif %}hi"
    )
    before = len(started)
    with pytest.raises(RequestError, match="too complex"):
        await said(pool, ask("a", "trap"))
    assert len(started) == before
    assert await said(pool, ask("b")) and len(started) == before + 1


async def test_a_sandbox_killed_at_work_is_not_asked_again(open_pool, started):
    """The kernel kills it like this when the task has taken the machine's memory."""
    pool = await open_pool()
    await pool.shared.admission.close()
    config = replace(
        pool.admission.configs["templates"],
        cpu_s=60.0,
        text=replace(pool.supervisor.card.text, payload=b"", chat_template=SLOW_TEMPLATE),
    )
    sandbox = Sandbox(PROCESS_COMMAND)
    before, task = len(started), asyncio.ensure_future(sandbox.perform(config, "a", "fill_template", {}))
    while not sandbox.begun:
        await asyncio.sleep(0)
    sandbox.process.kill()
    with pytest.raises(RequestError, match="too complex"):
        await task
    assert len(started) == before + 1


async def test_a_task_too_large_to_read_is_refused(chat_text, started):
    """The refusal comes at once; its sandbox cannot read it."""
    known = Known(Settings(), None)
    sandbox, config = (
        Sandbox(PROCESS_COMMAND),
        SandboxConfig(known, replace(chat_text, payload=b""), 64, 5.0, 32 << 20),
    )
    for task in (["check_grammar", "x" * (40 << 20), "a"], ["check_grammar", "\ud800" * (6 << 20), "a"]):
        with pytest.raises(RequestError, match="too complex"):
            await sandbox.perform(config, "a", *task)
    assert len(started) == 2
    await sandbox.close()


async def test_a_sandbox_that_never_begins_is_given_up(chat_text, started):
    known = Known(Settings(), None)
    sandbox = Sandbox((sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"))
    with pytest.raises(EngineFailure, match="before it began, as 2 before it .*-9"):
        await sandbox.perform(
            SandboxConfig(known, chat_text, 64, 1.0, 1 << 30), "a", "check_grammar", "x", "a"
        )
    assert len(started) == 3 and sandbox.turns.free
    await sandbox.close()


async def test_a_task_that_is_broken_is_an_honest_500(open_pool):
    pool = await open_pool()
    with pytest.raises(EngineFailure, match="exit status 1"):
        await pool.admission.perform("bodies", "a", "no_such_task")


async def test_who_starts_a_sandbox_meanwhile_gets_a_whole_one(chat_text, started, monkeypatch):
    """A task comes while the process is started ahead, and has no pipe yet."""
    connect = asyncio.open_connection

    async def connect_late(**options):
        for _ in range(100):
            await asyncio.sleep(0)
        return await connect(**options)

    monkeypatch.setattr(asyncio, "open_connection", connect_late)
    sandbox, config = (
        Sandbox(PROCESS_COMMAND),
        SandboxConfig(Known(Settings(), None), chat_text, 64, 1.0, 1 << 30),
    )
    task = sandbox.perform(config, "a", *reading("/detokenize"), bodies=[b'{"tokens": [1]}'])
    *_, read = await asyncio.gather(sandbox.start(), sandbox.start(), task)
    assert json.loads(read) and len(started) == 1
    await sandbox.close()


async def test_a_sandbox_that_is_closed_while_it_starts_has_no_process(started):
    sandbox = Sandbox(PROCESS_COMMAND)
    starting = asyncio.ensure_future(sandbox.start())
    await asyncio.sleep(0)
    await sandbox.close()
    with pytest.raises(Overloaded, match="shutting down"):
        await starting
    assert not started


async def test_a_long_document_keeps_no_other_client_waiting(chat_text):
    """Nor has a client two at once, as long as it holds its place, also after it has gone."""
    sandboxes, config = Sandboxes(PROCESS_COMMAND, 2), SandboxConfig(Known(Settings(), None), chat_text, 64, 60.0, 1 << 30)

    async def extract(client, data):
        return (await sandboxes.perform(config, client, "extract", "a.html", "", bodies=[data]))[0]

    long = b"<html>" + b"<b><i>" * 200_000
    first, second = (asyncio.ensure_future(extract("a", long)) for _ in "ab")
    while not any(sandbox.begun for sandbox in sandboxes.all):
        await asyncio.sleep(0)
    first.cancel()
    for _ in range(2):
        assert await extract("b", b"<html>words") == "words"
    assert not second.done() and len(sandboxes.idle) == 1
    await sandboxes.close()
    with pytest.raises(Overloaded, match="shutting down"):
        await second
    assert len(sandboxes.idle) == 2 and not sandboxes.turns.held_by


async def test_a_sandbox_ends_with_its_front(chat_text):
    known = Known(Settings(), None)
    sandbox, config = Sandbox(PROCESS_COMMAND), SandboxConfig(known, chat_text, 64, 1.0, 1 << 30)
    assert json.loads(
        await sandbox.perform(config, "a", *reading("/detokenize"), bodies=[b'{"tokens": [1]}'])
    )
    process = psutil.Process(sandbox.process.pid)
    sandbox.writer.close()
    await asyncio.to_thread(process.wait, 20)
    await sandbox.close()
