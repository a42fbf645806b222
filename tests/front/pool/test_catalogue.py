"""The catalogue: what it says of one model is what it says of a list of one."""

import aiohttp
import pytest

from chatlm.common.config import ApiKey, Settings
from chatlm.common.errors import EngineFailure
from chatlm.front.pool.catalogue import Catalogue
from fake_pool import FakePool, serving
from pools import one_and_two, played_pool, started     # noqa: F401  fixtures


def only_model(**settings):
    pool = played_pool(**settings)
    return Catalogue(pool.settings, pool), pool


@pytest.mark.parametrize("state", ["ready", "loading", "crashing", "draining"])
async def test_the_health_of_an_only_model_is_its_server_s(state):
    catalogue, pool = only_model()
    if state == "loading":
        pool.supervisor.became_ready.clear()
        pool.supervisor.revision.opened.clear()
        pool.supervisor.loading = ("weights", 0.25)
    if state == "crashing":
        pool.workers[0].crashes_in_row = 2
    if state == "draining":
        await catalogue.drain(0.0)
    assert catalogue.health() == pool.health()
    assert catalogue.health()[1]["status"] == {
        "ready": "ok", "loading": "loading", "crashing": "degraded", "draining": "draining"}[state]
    await catalogue.close()
    assert catalogue.health()[1]["status"] == "draining"


async def test_the_counts_of_an_only_model_are_its_server_s():
    catalogue, pool = only_model()
    assert catalogue.stats(catalogue.registry.served_models()) == pool.stats()
    await catalogue.close()


async def test_a_key_for_other_models_sees_no_counts_of_this_one():
    settings = Settings(keys=(ApiKey.hashed("k" * 32, "ann", models=("other",)),))
    async with serving(FakePool(), settings) as url, aiohttp.ClientSession() as client:
        async with client.get(url + "/stats", headers={"Authorization": "Bearer " + "k" * 32}) as response:
            stats = await response.json()
    assert response.status == 200 and stats["models"] == stats["workers"] == []
    assert (stats["model"], stats["total_workers"]) == ("", 0)


async def test_a_server_that_ends_while_a_model_is_removed_closes_all(one_and_two):
    """Whoever would have closed its pool was ended with the server's tasks."""
    shared = one_and_two.source.opener.shared
    [model, _] = one_and_two.registry.models
    one_and_two.source.fail(model, EngineFailure("its worker cannot start"))
    assert model.pool is None and len(shared.users) == 3
    await one_and_two.close()
    assert not shared.users and all(sandbox.closed for sandbox in shared.admission.sandboxes.values())
