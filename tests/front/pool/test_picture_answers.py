"""Answers about pictures through the pool: workers that die at any moment, second questions, and what a text model says."""

import asyncio
import functools

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import EngineFailure, RequestError
from chatlm.common.messages.requests import Message, SamplingParams
from chatlm.front.pool.pool import make_pool
from answers import asked
from forked import DYING
from image_conversations import picture_of_size
from nightly import by_day
from pools import all_ready, collect, idle
from sight_families import FAMILIES, save_family
from sight_qwen import make_qwen, save_qwen, write_qwen
from tiny_sight import make_smolvlm, save_sight

pytestmark = pytest.mark.timeout(120)
PHOTO = picture_of_size(90, 60)


@pytest.fixture(scope="module")
def seeing_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    save_sight(folder, "smolvlm", make_smolvlm())
    return folder


@pytest.fixture
async def seeing_pool(started, seeing_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("STRUCK", str(tmp_path))

    async def start(**changes):
        settings = Settings(**{"model": str(seeing_folder), "dtype": "float32", "kv_cache_memory": 8 << 20, "prefill_chunk": 16, "stream_interval": 0.0, "draft_memory": 0} | changes)
        pool = await started(make_pool(settings, worker_command=DYING))
        await all_ready(pool)
        return pool

    return start


def about(name, *pictures, text="What is this, and why is it here?", **more):
    parts = (*(part for number in range(len(pictures)) for part in ("Look: ", number)), text)
    message = Message("user", "".join(part for part in parts if isinstance(part, str)), None, pictures, parts)
    more = {"sampling": SamplingParams(temperature=0.0), "max_tokens": 20, "ignore_eos": True} | more
    return asked(name, messages=(message,), **more)


@pytest.mark.parametrize("moment", by_day(["queued", "prefill", "decode", "unsent"], "prefill"))
async def test_a_death_with_a_picture_changes_no_token(seeing_pool, moment, tmp_path):
    pool = await seeing_pool(num_workers=2)
    text, tokens, whole = await collect(pool, about("calm", PHOTO))
    assert (await collect(pool, about(f"kill-{moment}-1", PHOTO, picture_of_size(40, 40))))[1] == (await collect(pool, about("calm too", PHOTO, picture_of_size(40, 40))))[1]
    assert (tmp_path / f"kill-{moment}-1").exists()
    again, others = await asyncio.gather(collect(pool, about("again", PHOTO)), collect(pool, about("other", picture_of_size(30, 80, seed=2))))
    assert again[1] == tokens and others[1] != tokens
    await all_ready(pool)


async def test_a_death_with_own_positions_changes_no_token(seeing_pool, tmp_path, tmp_path_factory):
    """Positions are not those of tokens there."""
    folder = tmp_path_factory.mktemp("qwen")
    save_qwen(folder, make_qwen("qwen3_5"))
    pool = await seeing_pool(model=str(folder), num_workers=2)
    calm = (await collect(pool, about("calm", PHOTO, picture_of_size(40, 40))))[1]
    assert (await collect(pool, about("kill-decode-1", PHOTO, picture_of_size(40, 40))))[1] == calm and (tmp_path / "kill-decode-1").exists()
    await all_ready(pool)


@pytest.mark.parametrize("kind", by_day(["lfm2_vl", "gemma3", "gemma4-small"], "gemma3"))
async def test_other_families_answer_the_same_again(seeing_pool, kind, tmp_path, tmp_path_factory):
    """They answer so after a death and from the cache."""
    folder = tmp_path_factory.mktemp(kind)
    save_family(folder, kind, FAMILIES[kind][0]())
    pool = await seeing_pool(model=str(folder), num_workers=2)
    _, tokens, whole = await collect(pool, about("calm", PHOTO))
    assert (await collect(pool, about("kill-prefill-1", PHOTO)))[1] == tokens and (tmp_path / "kill-prefill-1").exists()
    again = await collect(pool, about("again", PHOTO))
    assert again[1] == tokens
    await all_ready(pool)
    cached = await collect(pool, about("cached", PHOTO))
    assert cached[1] == tokens and cached[2].usage.cached_tokens > 0 and cached[2].usage.prompt_tokens > 16


async def test_usage_counts_the_rows_of_pictures(seeing_pool):
    """A second question finds them cached."""
    pool = await seeing_pool(num_workers=1)
    first = (await collect(pool, about("first", PHOTO)))[2].usage
    plain = (await collect(pool, about("plain")))[2].usage
    assert first.prompt_tokens > plain.prompt_tokens + 40
    second = (await collect(pool, about("second", PHOTO, text="What is this? Another question.")))[2].usage
    assert second.cached_tokens >= first.prompt_tokens - 64
    await idle(pool)


async def test_too_many_pictures_are_refused_unqueued(seeing_pool):
    """They are more than are allowed or fit."""
    pool = await seeing_pool(num_workers=1, context_length=512)
    with pytest.raises(RequestError, match="17 images; 16 are the most"):
        await collect(pool, about("many", *[PHOTO] * 17))
    with pytest.raises(RequestError, match="context length is 512 tokens"):
        await collect(pool, about("long", *[PHOTO] * 12))
    with pytest.raises(RequestError, match="images"):
        await collect(pool, about("scored", PHOTO, prompt_logprobs=1))
    await idle(pool)


async def test_a_text_model_says_that_it_cannot_see(start_pool):
    pool = await start_pool()
    with pytest.raises(RequestError, match="this model cannot see images"):
        await collect(pool, about("blind", PHOTO))
    await idle(pool)


async def test_dropped_turns_take_their_pictures_along(seeing_pool):
    pool = await seeing_pool(num_workers=1, context_length=208)
    turn = about("x", PHOTO).messages[0]
    request = asked("cut", messages=(turn, Message("assistant", "It is a cat."), Message("user", "And then? " * 8)), sampling=SamplingParams(temperature=0.0), max_tokens=4, truncate=True)
    assert (await collect(pool, request))[2].dropped_messages == 2
    await idle(pool)


async def test_a_stored_picture_needs_no_tower(seeing_pool, tmp_path):
    """The pages of its rows are found by its digest; of another picture none are, and its answer is that of no store."""
    store = {"num_workers": 1, "prefix_store": str(tmp_path / "store"), "prefix_memory": 0}
    pool = await seeing_pool(**store)
    tokens, cached = (await collect(pool, about("first", PHOTO)))[1], 0
    for _ in range(5):      # a prompt does not wait for what a busy machine reads late
        if cached < 40:
            await pool.close()
            pool = await seeing_pool(**store)
            _, again, done = await collect(pool, about("again", PHOTO))
            cached = done.usage.cached_tokens
            assert again == tokens
    assert cached >= 40
    other = await collect(pool, about("other", picture_of_size(90, 60, seed=5)))
    assert other[1] != tokens and other[2].usage.cached_tokens < 40


async def test_a_picture_s_answer_keeps_its_mmproj(seeing_pool, tmp_path):
    """It belongs to the model's files, named or not. What comes then is of the new one, as in a new server."""
    model = write_qwen(tmp_path, make_qwen("qwen3_vl"))
    (tmp_path / "other").mkdir()
    write_qwen(tmp_path / "other", make_qwen("qwen3_vl", seed=1))
    [mmproj] = tmp_path.glob("mmproj*")
    warm = functools.partial(about, sampling=SamplingParams(temperature=3.0, top_k=0, seed=1))      # greedy ones are alike
    pool = await seeing_pool(model=str(model), mmproj=str(mmproj))
    before = (await collect(pool, warm("before", PHOTO)))[1]
    (tmp_path / "other" / mmproj.name).rename(mmproj)
    assert (await collect(pool, warm("old", PHOTO)))[1] == before
    with pytest.raises(EngineFailure, match="the model's files have changed since this answer began"):
        await collect(pool, warm("kill-decode-1", PHOTO))
    await pool.revision.current()
    await all_ready(pool)
    after = (await collect(pool, warm("after", PHOTO)))[1]
    again = await seeing_pool(model=str(model))
    assert after != before and after == (await collect(again, warm("again", PHOTO)))[1]
