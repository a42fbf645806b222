"""A kept response is complete before its client has the end, and stays so."""

import openai
from aiohttp import web

from chatlm.common.config import Settings
from chatlm.front.store.store import open_store
from fake_pool import serving
from scripted_pool import ScriptedPool


async def test_a_client_that_leaves_at_the_end_finds_the_whole_response(tmp_path, monkeypatch, caplog):
    write, names = web.StreamResponse.write, []

    async def write_until_the_end(self, data):
        if b"response.completed" in data:
            raise ConnectionResetError("it has left")
        names.extend(line for line in data.split(b'"') if line.startswith(b"resp_"))
        await write(self, data)

    monkeypatch.setattr(web.StreamResponse, "write", write_until_the_end)
    settings = Settings(database=str(tmp_path / "kept.db"))
    async with serving(ScriptedPool("It is red."), settings, await open_store(settings)) as url:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.responses.create(model="default", input="Which?", stream=True)
            try:
                async for _ in stream:
                    pass
            except Exception:  # the connection broke
                pass
            kept = await client.responses.retrieve(names[0].decode())
    assert (kept.status, kept.output_text) == ("completed", "It is red.")
    assert "is not kept" not in caplog.text
