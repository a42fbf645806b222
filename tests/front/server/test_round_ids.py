"""Ids that clients choose, beside those of rounds and comparisons, over a real model: nobody gets another's
answer."""

import asyncio
import json
import sys

import aiohttp
import pytest

import fake_tools
import tiny_gguf
from chatlm.common.config import ApiKey
from fake_pool import serving

TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant: "
KEYS = tuple(ApiKey.hashed(name, name)._replace(tools=("*",)) for name in ("one", "two"))


@pytest.fixture
async def place(start_pool, tmp_path):
    """(url, HTTP client, pool) of a server with two keys."""
    config = tmp_path / "mcp.json"
    program = {
        "command": sys.executable,
        "args": [fake_tools.__file__, "log", str(tmp_path / "calls")],
        "alwaysAllow": ["*"],
    }
    config.write_text(json.dumps({"mcpServers": {"fake": program}}))
    numbers = tiny_gguf.LLAMA_NUMBERS | {"llama.context_length": 4096}
    metadata = tiny_gguf.small_gguf_metadata("gpt-2", **{"tokenizer.chat_template": TEMPLATE})
    model = tiny_gguf.write_gguf(
        tmp_path / "random.gguf", tiny_gguf.random_llama(numbers=numbers), numbers, metadata
    )
    pool = await start_pool(
        model=str(model), mcp_config=str(config), keys=KEYS, kv_cache_memory=16 << 20, stream_interval=0.0
    )
    async with serving(pool, pool.settings) as url, aiohttp.ClientSession() as http:
        yield url, http, pool


async def post(http, url, name, key, body, path="/v1/responses"):
    headers = {"X-Request-Id": name, "Authorization": f"Bearer {key}"}
    async with http.post(url + path, json=body, headers=headers) as response:
        return response.status, await response.read()


def in_rounds(seed):
    tool = {
        "type": "mcp",
        "server_label": "fake",
        "require_approval": "never",
        "allowed_tools": ["pick", "add"],
    }
    return {
        "input": "Pick some.",
        "tools": [tool],
        "tool_choice": "required",
        "seed": seed,
        "max_output_tokens": 200,
        "ignore_eos": True,
        "max_tool_calls": 3,
    }


def plain(seed):
    return {"input": "Say something.", "seed": seed, "max_output_tokens": 60, "ignore_eos": True}


def output_of(answer):
    status, body = answer
    assert status == 200, body
    return [
        {name: value for name, value in item.items() if name != "id"} for item in json.loads(body)["output"]
    ]


@pytest.mark.parametrize("form", ["{}-{}", "{}~{}", "{}#{}", "{}%7e{}", "{}##{}", "{}_{}"])
async def test_answers_of_two_keys_stay_apart(place, form):
    """Each is what it is alone, and the worker that computes both lives."""
    url, http, pool = place
    [worker] = pool.workers
    process = worker.process.pid
    wanted = output_of(await post(http, url, "alone", "one", in_rounds(8)))
    others = [output_of(await post(http, url, f"other{number}", "two", plain(number))) for number in range(3)]
    for turn in range(4):
        evil = f"evil{turn}"
        names = [form.format(evil, number) for number in range(3)]
        first = [post(http, url, name, "two", plain(number)) for number, name in enumerate(names)]
        second = [post(http, url, evil, "one", in_rounds(8))]
        answers = await asyncio.wait_for(
            asyncio.gather(*(first + second if turn % 2 else second + first)), 120
        )
        if turn % 2:
            *got, loop = answers
        else:
            loop, *got = answers
        assert [output_of(answer) for answer in got] == others and output_of(loop) == wanted
    assert worker.process.pid == process and worker.restarts == 0
    assert (
        not pool.dispatcher.jobs
        and not pool.dispatcher.requests
        and not worker.jobs
        and not worker.sent_prompts
    )


@pytest.mark.parametrize("form", ["{}-{}", "{}~{}", "{}#{}"])
async def test_compared_answers_have_ids_of_their_own(place, form):
    """So have those of one request with several answers."""
    url, http, pool = place
    model = pool.model_name
    body = {
        "messages": [{"role": "user", "content": "Hi"}],
        "models": [model, model],
        "seed": 3,
        "max_tokens": 40,
        "ignore_eos": True,
    }
    several = {
        "messages": [{"role": "user", "content": "Hi"}],
        "n": 3,
        "seed": 3,
        "max_tokens": 40,
        "ignore_eos": True,
    }
    for path, body in (("/v1/compare", body), ("/v1/chat/completions", several)):
        work = [post(http, url, "evil", "one", body, path)]
        work += [post(http, url, form.format("evil", number), "two", plain(number)) for number in range(3)]
        for status, text in await asyncio.wait_for(asyncio.gather(*work), 120):
            assert status == 200 and b'"error": {' not in text
    assert pool.workers[0].restarts == 0 and not pool.dispatcher.jobs and not pool.dispatcher.requests
