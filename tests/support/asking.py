"""A served pool, and short questions to it over HTTP, for tests that change what a model is served with."""

from contextlib import asynccontextmanager

from fake_pool import serving


@asynccontextmanager
async def served(pool):
    async with serving(pool, pool.settings) as url:
        yield url


async def ask(client, url, name="", struck="", **changes):
    """(status, JSON) of an answer; struck: an id that tells a dying worker what to do."""
    body = {"model": name, "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 40, "ignore_eos": True, **changes}
    async with client.post(url + "/v1/chat/completions", json=body, headers={"X-Request-Id": struck} if struck else {}) as response:
        return response.status, await response.json()


async def text_of(*asked, **changes):
    status, body = await ask(*asked, **changes)
    assert status == 200, body
    return body["choices"][0]["message"]["content"]
