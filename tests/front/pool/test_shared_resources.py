"""What all models of a server have in common, and who closes it."""

from chatlm.front.admission.admission import Admission, SharedAdmission
from chatlm.front.pool.shared_resources import SharedResources
from pools import one_and_two, played_pool, started     # noqa: F401  fixtures

READ = "read", "/detokenize", None, (), [], "", "text", ["/detokenize"]


async def test_what_models_share_is_closed_with_the_last_of_them():
    shared = SharedResources()
    one = played_pool(shared=shared)
    two = played_pool(shared=shared)
    await one.close()
    await one.close()
    sandboxes = shared.admission.sandboxes.values()
    assert not any(sandbox.closed for sandbox in sandboxes) and shared.dispatchers == [two.dispatcher]
    await two.close()
    assert all(sandbox.closed for sandbox in sandboxes) and not shared.dispatchers


async def test_templates_have_a_process_as_long_as_a_model_has_one():
    shared = SharedAdmission()
    templates = shared.sandboxes["templates"]
    plain, chats, other = (Admission(lambda *client: None, shared) for _ in range(3))
    await shared.keep_templates(chats.number, True)
    process = templates.process
    await shared.keep_templates(plain.number, False)
    assert templates.process is process and process.poll() is None
    chats.close()
    await shared.keep_templates(other.number, False)
    assert templates.process is None
    await shared.close()


async def test_each_model_has_its_own_configuration_in_the_sandbox_that_they_share(one_and_two):
    pools = one_and_two.pools
    one, two = (pool.admission for pool in pools)
    assert one.sandboxes is two.sandboxes and one.configs["bodies"].number != two.configs["bodies"].number
    for admission in (one, two):
        assert await admission.perform("bodies", "a", *READ, bodies=[b'{"tokens": [65]}'])
    assert len(one.sandboxes["bodies"].configs) == 2
