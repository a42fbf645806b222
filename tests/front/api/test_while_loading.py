"""While a model loads, nobody knows what it can do: whatever is asked of it is 503 with
Retry-After, never refused."""

import asyncio
import json
import sys

import aiohttp
import pytest

import fake_tools
from chatlm.common.config import LIMITS, ModelEntry, Settings
from chatlm.front.intake.opened_body import Caller
from chatlm.front.intake.intake import Intake
from chatlm.front.intake.tasks import NumberedLine
from chatlm.front.pool.catalogue import Catalogue
from chatlm.front.pool.many import many_models
from chatlm.front.pool.pool import make_pool
from fake_pool import serving

SAID = [{"role": "user", "content": "Hi"}]
SCHEMA = {"type": "object", "properties": {"x": {"type": "string"}}}
FUNCTION = {"name": "f", "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
PIXEL = "data:image/png;base64," + fake_tools.PIXEL
PICTURE = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": PIXEL}}],
    }
]
LARGE = [{"role": "user", "content": "x" * (LIMITS.inline_bytes + 1)}]
BODIES = {
    "/v1/chat/completions": [
        {"messages": SAID},
        {"messages": SAID, "tools": [TOOL]},
        {"messages": SAID, "tools": [TOOL], "tool_choice": "required"},
        {"messages": SAID, "functions": [FUNCTION]},
        {"messages": PICTURE},
        {"messages": LARGE, "tools": [TOOL]},
        {"messages": SAID, "stream": True},
        {
            "messages": [
                *SAID,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                    ],
                },
                {"role": "tool", "tool_call_id": "a", "content": "5"},
            ]
        },
        {
            "messages": SAID,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
        },
        {"messages": SAID, "reasoning_effort": "low"},
        {"messages": SAID, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": SAID, "logprobs": True, "top_logprobs": 3},
        {"messages": SAID, "logit_bias": {"99999999": 1}},
        {"messages": SAID, "max_tokens": 10**6},
    ],
    "/chat/completions": [{"messages": SAID}, {"messages": SAID, "model": "x", "tools": [TOOL]}],
    "/v1/completions": [
        {"prompt": "x"},
        {"prompt": [1, 2, 99999999]},
        {"prompt": "x", "suffix": "y"},
        {"prompt": "x", "echo": True, "logprobs": 1},
    ],
    "/infill": [{"input_prefix": "a", "input_suffix": "b"}],
    "/v1/responses": [
        {"input": "Hi"},
        {"input": "Hi", "tools": [{"type": "function", **FUNCTION}]},
        {"input": "Hi", "tools": [{"type": "mcp", "server_label": "fake"}]},
        {"input": "Hi", "tools": [{"type": "custom", "name": "c"}]},
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PIXEL}]}]},
    ],
    "/v1/messages": [
        {"messages": SAID, "max_tokens": 5},
        {"messages": SAID, "max_tokens": 5, "tools": [{"name": "f", "input_schema": SCHEMA}]},
        {"messages": SAID, "max_tokens": 5, "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {
            "messages": SAID,
            "max_tokens": 5,
            "mcp_servers": [{"type": "url", "name": "fake", "url": ""}],
            "tools": [{"type": "mcp_toolset", "mcp_server_name": "fake"}],
        },
    ],
    "/v1/responses/input_tokens": [{"input": "?"}, {"input": "?", "tools": [{"type": "function", **FUNCTION}]}],
    "/v1/messages/count_tokens": [
        {"messages": SAID},
        {"messages": SAID, "tools": [{"name": "f", "input_schema": SCHEMA}]},
    ],
    "/api/chat": [
        {"model": "x", "messages": SAID},
        {"model": "x", "messages": SAID, "tools": [TOOL]},
        {"model": "x", "messages": SAID, "think": True},
        {"model": "x", "messages": [{"role": "user", "content": "?", "images": [fake_tools.PIXEL]}]},
        {"model": "x", "messages": []},
    ],
    "/api/generate": [
        {"model": "x", "prompt": "Hi"},
        {"model": "x", "prompt": "Hi", "suffix": "x"},
        {"model": "x", "prompt": "Hi", "raw": True},
        {"model": "x"},
    ],
    "/api/embed": [{"model": "x", "input": "Hi"}, {"model": "x", "input": "Hi", "dimensions": 10**6}],
    "/v1/embeddings": [{"input": "Hi"}, {"input": "Hi", "dimensions": 10**6}],
    "/v1/rerank": [{"query": "a", "documents": ["b"]}],
    "/v1/score": [{"text_1": "a", "text_2": "b"}],
    "/tokenize": [{"content": "x"}, {"messages": SAID, "tools": [TOOL]}],
    "/detokenize": [{"tokens": [99999999]}],
    "/apply-template": [{"messages": SAID, "tools": [TOOL]}],
    "/v1/compare": [
        {"messages": SAID, "variants": [{}, {"seed": 1}]},
        {"messages": SAID, "tools": [TOOL], "variants": [{}, {"seed": 1}]},
    ],
}


@pytest.fixture
async def loading(tmp_path):
    """The URL of a server whose model has not begun to load."""
    config = tmp_path / "mcp.json"
    config.write_text(
        json.dumps(
            {
                "mcpServers": {
                    "fake": {"command": sys.executable, "args": [fake_tools.__file__], "alwaysAllow": ["*"]}
                }
            }
        )
    )
    settings = Settings(mcp_config=str(config))
    pool = make_pool(settings)
    async with serving(pool, settings) as url:
        yield url
    await pool.close()


@pytest.mark.parametrize("path", BODIES)
async def test_whatever_depends_on_the_model_comes_back_later(loading, path):
    async with aiohttp.ClientSession() as http:
        for body in BODIES[path]:
            async with http.post(loading + path, json=body) as response:
                answer = await response.text()
                assert response.status == 503 and int(response.headers["Retry-After"]) > 0, (
                    body,
                    response.status,
                    answer,
                )
                assert "loading" in answer


async def test_a_body_with_pictures_may_be_large(loading):
    """As large as models that see may have it: who loads may be one."""
    body = json.dumps(
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "image_url",
                            "image_url": {"url": "data:image/png;base64," + "A" * LIMITS.body_bytes},
                        }
                    ],
                }
            ]
        }
    )
    async with (
        aiohttp.ClientSession() as http,
        http.post(loading + "/v1/chat/completions", data=body) as response,
    ):
        assert response.status == 503, await response.text()


async def test_lines_of_batches_are_not_refused_meanwhile():
    """What is wrong with a line's form is; what only its model knows shows when it is run."""
    pool = make_pool(Settings())
    intake = Intake(Catalogue(Settings(), pool))
    line = {
        "custom_id": "a",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": SAID, "tools": [TOOL]},
    }
    for count in 1, 5:
        lines = [NumberedLine(number, json.dumps(line).encode()) for number in range(count)] + [
            NumberedLine(count, b'{"custom_id": "b"}')
        ]
        *checked, bad = await intake.check_lines(Caller("/v1/files", "me", ""), lines)
        assert [(each.problem, each.custom_id) for each in checked] == [
            ("", "a")
        ] * count and "url must be" in bad.problem
    await pool.close()


async def test_a_model_that_is_not_found_yet_may_be_there(nanochat_fixtures):
    """Several models are found one after the other."""
    settings = Settings(several=(ModelEntry(str(nanochat_fixtures / "gen5"), "one"),))
    models = many_models(settings)
    body = {"messages": SAID, "tools": [TOOL]}
    async with serving(models, settings) as url, aiohttp.ClientSession() as http:
        for name in "one", "two", "", "default", None:
            async with http.post(url + "/v1/chat/completions", json=body | {"model": name}) as response:
                assert response.status == 503 and response.headers["Retry-After"], await response.text()
        models.source.became_ready.set()
        async with http.post(url + "/v1/chat/completions", json=body | {"model": "two"}) as response:
            assert response.status == 404
    await asyncio.wait_for(models.close(), 20)
