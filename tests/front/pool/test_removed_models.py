"""An answer whose tools run while its model goes: it ends, with its words or with the reason, and
never waits for ever."""

import asyncio
import json
import sys

import pytest

import fake_tools
import tiny_training
from chatlm.common.errors import EngineFailure, Overloaded
from chatlm.common.request_ids import id_of_part
from chatlm.front.store.store import open_store
from answers import asked
from fake_pool import serving
from pools import played_pool
from tool_rounds import asked_request
from watched import remove, run_folder, until, watching  # noqa: F401


def round_of(name, number):
    return asked(
        id_of_part(name, number), prompts=((1,),), prompt_ids=((1,),), max_tokens=8, round=number + 1
    )


@pytest.mark.parametrize("end", ["close", "fail"])
async def test_no_round_begins_at_a_pool_that_is_gone(end):
    """It is refused where it enters, be it rendered already or not, and what waits is ended."""
    pool = played_pool(max_batch=1)
    with pool.place_for(round_of("a", -1)):
        waiting = [pool.answer(round_of("a", number)) for number in range(2)]
        for stream in waiting:
            await anext(stream)
        if end == "close":
            await pool.close()
        else:
            pool.dispatcher.end(EngineFailure("the model cannot be served"))
        for request in (
            round_of("a", 5),
            asked("b", prompts=((1,),), prompt_ids=((1,),)),
            asked("c", prompts=("x",), round=2),
        ):
            with pytest.raises(Overloaded if end == "close" else EngineFailure):
                await asyncio.wait_for(anext(pool.answer(request)), 5)
        for stream in waiting:
            with pytest.raises(Overloaded if end == "close" else EngineFailure):
                await asyncio.wait_for(anext(stream), 5)
        with pytest.raises((Overloaded, EngineFailure)), pool.place_for(round_of("d", -1)):
            pass
    assert not pool.dispatcher.is_needed


@pytest.mark.parametrize("state", ["in memory", "not in memory", "failed"])
async def test_a_checkpoint_is_removed_while_a_tool_runs(
    run_folder, watching, client, tmp_path, monkeypatch, state
):  # noqa: F811
    gate = tmp_path / "gate"
    log = tmp_path / "calls"
    config = tmp_path / "mcp.json"
    config.write_text(
        json.dumps(
            {
                "mcpServers": {
                    "fake": {"command": sys.executable, "args": [fake_tools.__file__, "log", str(log)]}
                }
            }
        )
    )
    monkeypatch.setitem(tiny_training.CONFIG, "sequence_len", 1024)
    list(tiny_training.train(run_folder, 4, 2, ids=tiny_training.TEXT.encode() * 2))
    models = await watching(run_folder, mcp_config=str(config), database=str(tmp_path / "kept.db"))
    async with serving(models, models.settings, await open_store(models.settings)) as url:
        await until(lambda: len(models.registry.models) == 2)
        model = models.find("d2-base@2").model
        pool = model.pool
        async with client.get(url + "/v1/tools") as response:
            [digest] = [tool["digest"] for tool in (await response.json())["data"] if tool["tool"] == "slow"]
        request = asked_request(tmp_path / "kept.db", "slow", digest, {"path": str(gate)})
        yes = {"type": "mcp_approval_response", "approval_request_id": request["id"], "approve": True}
        body = {
            "model": "d2-base@2",
            "input": [request, yes],
            "tools": [{"type": "mcp", "server_label": "fake", "allowed_tools": ["slow"]}],
            "tool_choice": "none",
            "max_output_tokens": 4,
        }
        if state == "in memory":
            model.load()
            await until(lambda: pool.supervisor.ready_workers)
        answering = asyncio.ensure_future(post(client, url, body))
        await until(lambda: log.exists() or answering.done())
        assert not answering.done(), answering.result()
        remove(run_folder, 2)
        await until(lambda: model not in models.registry.models)
        if state == "failed":
            models.source.fail(model, EngineFailure("its worker cannot start"))
        if state == "in memory":
            assert pool in models.leaving and pool.dispatcher.is_needed
        else:
            await until(lambda: pool.dispatcher.gone)
        gate.touch()
        status, answer = await asyncio.wait_for(answering, 60)
        if state == "in memory":
            assert status == 200 and answer["output"][1]["output"] == "it is there"
        else:
            assert (
                status == (500 if state == "failed" else 503) and "d2-base@2" in answer["error"]["message"]
            ), answer
        await until(lambda: pool not in models.leaving)
        assert len(log.read_text().splitlines()) == 1


async def post(client, url, body):
    async with client.post(url + "/v1/responses", json=body) as response:
        return response.status, await response.json()
