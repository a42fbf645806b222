"""One model in several processes computes what one process does: every family and nanochat generation, and the default model."""

import asyncio
import contextlib
import functools
import os
import secrets
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

import chat_server as cs
from chatlm.common.config import Settings
from chatlm.common.core import decode_core, installed_core
from chatlm.common.errors import RanksFailed
from chatlm.common.messages.requests import Embedding, Message, Piece, SamplingParams
from chatlm.common.processes import start
from chatlm.common.text.grammar import json_grammar
from chatlm.front.pool.pool import make_pool
from chatlm.worker.ranks.links import ProcessLinks
from chatlm.worker.ranks.ranks import RankZero
from answers import asked
from engines import forward_logits, make_batch, step_pieces
from families import MODELS, load, make_model, save
from generations import GENERATIONS
from nightly import by_day
from patching import patch
from ranked import Group, group
from real_server import ask, events, gone, post, server
from works import assignment

TEXT, OTHER = [(7 * i * i + 3 * i) % 250 for i in range(64)], [(5 * i * i + i) % 250 for i in range(64)]
NEW = 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory, nanochat_fixtures):
    """The folder of each model, made once."""
    made = {name: nanochat_fixtures / name for name in GENERATIONS}

    def folder(name):
        if name not in made:
            made[name] = save(make_model(name), tmp_path_factory.mktemp(name))
        return made[name]
    return folder


def forward(engine, *sequences):
    return forward_logits((engine.runner if engine.ranks else engine.transformer), make_batch(*sequences))


def logits_of(engine):
    """Logits (1 + 3, V) of the last prompt token of a text and those after it."""
    pages = list(range(3, 3 + 4 * engine.pool.groups))
    return torch.cat([forward(engine, (TEXT, done, new, pages))[-1:] for done, new in ((0, 40), (40, 1), (41, 1), (42, 1))])


def tokens_of(engine):
    found = {"a": [], "b": []}
    for name, prompt in (("a", TEXT[:40]), ("b", OTHER[:23])):
        engine.add(assignment(name, tuple(prompt), SamplingParams(temperature=0.0), NEW, ignore_eos=True))
    while engine.busy:
        for name, piece in step_pieces(engine):
            found[name] += piece.tokens
    return found


@functools.cache
def alone(folder, kind="auto"):
    """What one process computes with this type of keys and values."""
    engine = Group(pytest.MonkeyPatch(), 1).engine(folder, dtype="float32", kv_cache_dtype=kind)
    return logits_of(engine), tokens_of(engine)


LAYOUTS = {"tp2": (2, 1, ""), "pp2": (1, 2, ""), "tp4": (4, 1, ""), "tp2-pp2": (2, 2, ""), "pp3": (1, 3, ""),
           "tp2-gloo": (2, 1, "reference"), "tp2-pp2-gloo": (2, 2, "reference")}
EACH_TIME = ("llama3.1", "gemma3", "qwen3moe", "gpt-oss", "olmo3", "lfm2", "gen1", "gen5")      # more than two processes are slow on two CPUs
STATES = ("lfm2", "qwen3.5", "granite4h", "granite4h-dense", "qwen3next", "lfm2moe-plain")      # whose layers keep them: also stages that have no other ones
PACKED = ("gpt-oss", "gemma4", "qwen3.5", "kimi2")     # whose keys and values are also kept in 8 bits
SHARED = ("gemma4", "gemma4moe", "gemma4-even")     # some of whose layers read others' keys, or embeddings of each layer


@pytest.fixture
def kernels(monkeypatch):
    """A function that chooses the kernels of this process and of those it starts."""
    def choose(name):
        monkeypatch.setenv("CHAT_SERVER_KERNELS", name)
        installed_core.cache_clear()
    yield choose
    monkeypatch.undo()
    installed_core.cache_clear()


BY_DAY = ("tp2", "some"), ("pp2", "two")
CASES = [pytest.param(layout, names, id=f"{layout}-{kind}", marks=[] if (layout, kind) in BY_DAY else [pytest.mark.slow])
         for layout in LAYOUTS for kind, names in (("two", ("gpt-oss", "gen5")), ("some", EACH_TIME), ("states", STATES), ("shared", SHARED), ("all", (*MODELS, *GENERATIONS)))
         if kind in ("all", "shared") or (layout, kind) in (*BY_DAY, ("tp2-pp2", "two"), ("tp2-pp2", "states"), ("pp3", "states"))]


@pytest.mark.parametrize("layout, names", CASES)
def test_ranks_match_one_process_in_every_family(layout, names, folders, monkeypatch, kernels):
    """Every family and generation gives the logits and tokens of one process."""
    tp, pp, name = LAYOUTS[layout]
    kernels(name)
    with group(monkeypatch, tp, pp) as ranks:
        for name, kind in [*((name, "auto") for name in names), *((name, "q8_0") for name in names if name in PACKED)]:
            whole = load(folders(name)).architecture
            if tp == 4 and name.startswith(("qwen3.5", "qwen3next")):
                continue        # they have two heads of keys in their linear attention
            attn = whole.attentions[0]
            if len(whole.layers) < pp or attn.norms and attn.norms.whole and attn.kv_heads < tp:
                continue        # refused: too few layers, or heads that are normalized together
            engine = ranks.engine(folders(name), dtype="float32", kv_cache_dtype=kind)
            expected, tokens = alone(folders(name), kind)
            attends = any(engine.transformer.model.by_layer)        # in this stage
            assert ("q8_0" in engine.transformer.layout.types) == (kind == "q8_0" and attends)
            weights, model = engine.transformer.weights, engine.transformer.model
            table = weights["embed"]
            assert (len(table) if hasattr(table, "dtype") else table.rows) == -(-model.vocab_size // tp), name    # its rows alone
            assert (weights["embed"] is weights.get("head")) == bool(model.head and model.head.tied), name
            tolerance = 2e-2 if kind == "q8_0" else 1e-4        # sums in another order may round to another of 255 steps
            assert (logits_of(engine) - expected).abs().max() < tolerance * max(1.0, expected.abs().max().item()), name
            assert tokens_of(engine) == tokens, name
            engine.ranks.check()


needs_core = pytest.mark.skipif(decode_core() is None, reason="decode_core is not installed")


@pytest.mark.slow
@needs_core
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)])
def test_a_text_has_the_same_bits_in_ranks(tp, pp, default_model_path, monkeypatch):
    """The bits of a text alone, chunked and batched are the same."""
    with group(monkeypatch, tp, pp) as ranks:
        engine, found = ranks.engine(default_model_path), {}
        for way, (chunks, beside) in enumerate({"alone": ([40], 0), "chunked": ([7, 30, 3], 0), "batched": ([40], 9)}.values()):
            pages, done, rows = [list(range(20 * way, 20 * way + 8)), list(range(20 * way + 8, 20 * way + 16))], 0, []
            for new in [*chunks, 1, 1]:
                more = [(OTHER, 9 * (done > 0) + max(done - 40, 0), 1 if done else beside, pages[1])] if beside else []
                logits = forward(engine, *more, (TEXT, done, new, pages[0]))
                done += new
                if done >= 40:
                    rows.append(logits[-1])
            found[way] = torch.stack(rows)
        assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
        expected = logits_of(Group(monkeypatch, 1).engine(default_model_path))[:3]
        assert (found[0] - expected).abs().max() < 0.02 * expected.abs().max()      # activations are rounded to 8 bits
        assert torch.equal(found[0], expected) == (tp == 1)     # shards are added in another order


# ---- a server's pool of such replicas

def children(pid):
    return psutil.Process(pid).children(recursive=True)


async def text_of(pool, on_piece=lambda count: None, **changes):
    request = asked(messages=(Message("user", changes.pop("question", "Count to twenty in words.")),), id=secrets.token_hex(4),
                      **{"max_tokens": 80, "ignore_eos": True} | changes)
    text, count = "", 0
    async for event in pool.answer(request):
        if isinstance(event, Piece):
            text, count = text + event.text, count + 1
            on_piece(count)
    return text


REQUESTS = {
    "drawn": dict(sampling=SamplingParams(seed=7)),
    "repeated": dict(question="Repeat: " + 12 * "one two three ", sampling=SamplingParams(temperature=0.0)),
    "counted": dict(sampling=SamplingParams(seed=3, repetition_penalty=1.3, presence_penalty=0.4)),
    "drawn on the host": dict(sampling=SamplingParams(seed=3, dry_multiplier=1.0, xtc_probability=0.5, typical_p=0.9, top_n_sigma=2.0)),
    "grammar": dict(sampling=SamplingParams(seed=5), grammar=json_grammar({"type": "array", "items": {"enum": ["ab", "c"]}}, "")),
    "long": dict(question="Summarize. " + "The fox jumps over the dog. " * 60, sampling=SamplingParams(seed=9))}


@contextlib.asynccontextmanager
async def started_pool(model, tp, pp, kind="auto"):
    """A pool with one replica of tp * pp ranks."""
    pool = make_pool(Settings(model=str(model), tensor_parallel_size=tp, pipeline_parallel_size=pp, kv_cache_memory=64 << 20, kv_cache_dtype=kind,
                            stream_interval=0))     # each step's piece by itself: tests act in mid-answer
    try:
        await pool.start()
        await pool.wait_ready()
        yield pool
    finally:
        await pool.close()


async def embedding_of(pool):
    request = asked(prompts=(tuple(range(100, 400)),), id=secrets.token_hex(4), max_tokens=1, pooling="mean")
    return [event.vector async for event in pool.answer(request) if isinstance(event, Embedding)]


@pytest.mark.slow
@needs_core
@pytest.mark.parametrize("tp, pp, kind", [(2, 1, "auto"), (1, 2, "auto"), (2, 1, "q8_0")])
async def test_two_ranks_keep_a_text_even_after_a_death(tp, pp, kind, default_model_path):
    """The text of two ranks is the same alone, batched, cached and after a rank was killed."""
    async with started_pool(default_model_path, tp, pp, kind) as pool:
        worker = pool.workers[0]
        [other] = children(worker.process.pid)
        alone = {name: await text_of(pool, **request) for name, request in REQUESTS.items()}
        assert len(set(alone.values())) == len(alone) and pool.stats()["row_invariant"]
        assert (pool.stats()["tensor_parallel_size"], pool.stats()["pipeline_parallel_size"]) == (tp, pp)
        [embedding] = await embedding_of(pool)
        again = await asyncio.gather(*(text_of(pool, **request) for request in REQUESTS.values()))
        assert dict(zip(REQUESTS, again)) == alone
        assert await asyncio.gather(embedding_of(pool), embedding_of(pool)) == [[embedding]] * 2

        def kill(count):
            if count == 2:
                other.kill()
        assert await text_of(pool, kill, **REQUESTS["drawn"]) == alone["drawn"]
        assert worker.restarts == 1 and gone([other])

        def stop(count):                                        # rank 0, this time
            if count == 2:
                worker.process.kill()
        others = children(worker.process.pid)
        assert await text_of(pool, stop, **REQUESTS["counted"]) == alone["counted"]
        assert psutil.wait_procs(others, 10)[1] == []
        last = children(worker.process.pid)
    assert psutil.wait_procs(last, 10)[1] == []


@pytest.mark.slow
@needs_core
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", ["lfm2", "lfm2moe", "qwen3.5", "granite4h", "granite4h-dense", *SHARED[:2]])   # granite4h-dense's heads are one group
async def test_ranks_with_states_keep_a_text(name, tp, pp, folders):
    """States and shared keys in several ranks give the same text alone, batched, cached, drafted and after a
    death."""
    requests = {"drawn": dict(sampling=SamplingParams(seed=7)), "repeated": dict(question=8 * "one two three ", sampling=SamplingParams(temperature=0.0)),
                "counted": dict(sampling=SamplingParams(seed=3, repetition_penalty=1.3)), "long": dict(question=12 * "The fox jumps over it. ", sampling=SamplingParams(seed=9))}
    async with started_pool(folders(name), tp, pp) as pool:
        worker = pool.workers[0]
        alone = {name: await text_of(pool, **request) for name, request in requests.items()}
        assert pool.stats()["row_invariant"] and (worker.gauges["state_snapshots"] > 0 or name in SHARED)
        assert worker.gauges["state_bytes"] == load(folders(name)).architecture.state_bytes      # of both
        for _ in range(2):
            again = await asyncio.gather(*(text_of(pool, **request) for request in requests.values()))
            assert dict(zip(requests, again)) == alone
        for name, victim in zip(("drawn", "long"), (children(worker.process.pid)[-1], None)):
            assert await text_of(pool, lambda count: count == 2 and (victim or worker.process).kill(), **requests[name]) == alone[name]
        assert worker.restarts == 2


@pytest.mark.slow
@pytest.mark.parametrize("kernels_name", ["", "reference"])
def test_no_rank_outlives_a_killed_front(kernels_name, nanochat_fixtures):
    with server(nanochat_fixtures / "gen5", "--tp", "2", "--pp", "2", "--kv-cache-memory", "8M",
                env=os.environ | {"CHAT_SERVER_KERNELS": kernels_name}, forked="front") as (front, url):
        ranks = children(front.pid)
        assert sum("rank" in process.cmdline() for process in ranks) == 3
        assert len(events(post(f"{url}/chat/completions", ask("hello", max_tokens=5)))) > 1
        front.kill()
        assert psutil.wait_procs(ranks, 20)[1] == []


@pytest.mark.slow
@pytest.mark.timeout(400)       # a rank counts as hung after 30 s, or 20 of the slowest steps
@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="POSIX")
@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2)])
async def test_a_hanging_rank_is_replaced(tp, pp, default_model_path):
    """A rank that hangs is replaced with its replica, and the text is the same."""
    async with started_pool(default_model_path, tp, pp) as pool:
        worker, expected = pool.workers[0], await text_of(pool, **REQUESTS["drawn"])
        [other] = children(worker.process.pid)
        assert await text_of(pool, lambda count: count == 2 and other.suspend(), **REQUESTS["drawn"]) == expected
        assert worker.restarts == 1 and gone([other])


def test_processes_are_linked_stage_to_stage(monkeypatch):
    """Processes are linked from stage to stage, and how one ended is said."""
    code = "import socket, sys; socket.socket(fileno=int(sys.argv[2])).recv(1); sys.exit(7)"
    patch(monkeypatch, start, "PROCESS_COMMAND", (sys.executable, "-c", code))
    links = ProcessLinks(SimpleNamespace(settings=Settings(pipeline_parallel_size=3), threads=1))
    try:
        assert [(at.rank, at.before is None, at.after is None) for at in links.arrivals] == [(1, False, False), (2, False, True)]
        assert links.after and links.pids == ("self", *(process.pid for process in links.processes))
        links.channels[1].connection.sendall(b"x")
        assert links.processes[1].wait(30) == 7
        assert links.has_ended(2) and not links.has_ended(1) and str(links.failure(2)) == "rank 2 has ended (exit status 7)"
    finally:
        for process in links.processes:
            process.kill()
            process.wait()


@needs_core
async def test_a_replica_ends_when_a_rank_draws_otherwise(monkeypatch):
    settings = Settings(tensor_parallel_size=3)
    ranks = RankZero(SimpleNamespace(settings=settings), SimpleNamespace(channels=[], after=None))
    for rank, checksum in ((1, 5), (0, 5), (1, 8), (2, 5), (2, 9)):
        ranks.note(rank, checksum)
    with pytest.raises(RanksFailed, match="the ranks drew different tokens"):
        ranks.note(0, 8)


@pytest.mark.slow
def test_more_ranks_than_heads_are_refused(default_model_path):
    """More ranks than the model has heads are refused in one line."""
    run = subprocess.run([sys.executable, cs.__file__, "generate", str(default_model_path), "--tp", "10", "--prompt", "x"],
                         capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "cannot be divided among 10 ranks: it has 9 query heads" in run.stderr.splitlines()[-1]
