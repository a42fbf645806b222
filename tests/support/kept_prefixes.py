"""What tests of pages that outlive the process share: memory and a store as a front has them, engines that keep, ways to spoil a file."""

import hashlib
import os
import random
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.messages.requests import SamplingParams
from chatlm.common.segments import Segment, open_file
from chatlm.front.pool.prefixes import StoreWriter
from chatlm.worker.engine.keeper import PageKeeper
from chatlm.worker.engine.kept_pages import KeptPages
from engines import make_engine, pieces, tokens_of
from works import assignment


class Memory:
    """Segments in memory, as the front holds them. They are closed with it, also where a test only drops it."""

    def __init__(self, count=64, size=32 << 20):
        self.descriptors, self.size = [os.memfd_create("test") for _ in range(count)], size
        self.paths = [f"/proc/self/fd/{number}" for number in self.descriptors]

    def close(self):
        while self.descriptors:
            os.close(self.descriptors.pop())

    __del__ = close


@pytest.fixture
def memory():
    memory = Memory()
    yield memory
    memory.close()


def keep(engine, memory, store=None, profile=b"p" * 16, token_s=1.0):
    """Have an engine's pages outlive it; computing is slow, so that reading is worth it."""
    kept = KeptPages(memory.paths, memory.size, store, "the model")
    keeper = PageKeeper(engine.pool, engine.transformer, kept, engine.times)
    keeper.of_test = memory         # open as long as the engine is there
    engine.keep(keeper)
    keeper.begin(lambda: profile, 60)
    engine.times.token_s, keeper.pace.GRACE_S, engine.times.timed_tokens = token_s, 60.0, 1 << 30
    return engine


@contextmanager
def writing(store, memory, limit=1 << 30, busy=lambda: False):
    writer = StoreWriter(store, limit)
    writer.LOOK_S = 0.01
    writer.start([Segment(path, path, open_file(path, writable=True)) for path in memory.paths], memory.size, busy)
    try:
        yield writer
    finally:
        writer.close(60)
        assert not writer.thread.is_alive()


def bits_of(engine):
    """The digest of each page in the prefix index by its address, but for those that their layers do not fill, and of each snapshot."""
    pool, keeper, transformer = engine.pool, engine.keeper, engine.transformer
    full = [sum(transformer.kv.slot_size(transformer.model.by_layer[l]) for l in members) == transformer.layout.size for members in transformer.groups.members]
    pages = {(pool.addresses[content.serial], group): hashlib.sha256(keeper.memory.rows[:, page].tobytes()).hexdigest()
             for content in pool.index.values() for group, page in enumerate(content.pages) if page != pool.hole and full[group]}
    states = pool.states or SimpleNamespace(passed={}, ends={})
    snapshots = {pool.addresses[serial]: hashlib.sha256(b"".join(state[slot].tobytes() for state in keeper.memory.states)).hexdigest()
                 for known in (states.passed, states.ends) for serial, slot in known.items()}
    return pages, snapshots


def conversations(seed, count=4, vocabulary=200, most=300):
    """Prompts that share beginnings, as turns of conversations do."""
    dice, works = random.Random(seed), []
    for number in range(count):
        ids = [*works[dice.randrange(len(works))].prompt_ids] if works and dice.random() < 0.6 else []
        ids += [dice.randrange(vocabulary) for _ in range(dice.randrange(20, most - len(ids) if most - len(ids) > 21 else 22))]
        works.append(assignment(f"w{seed}-{number}", tuple(ids), SamplingParams(temperature=dice.choice([0.0, 0.7]), seed=number), 24, ignore_eos=True))
    return works


def cached(engine, work):
    return pieces(engine, [work])[work.id].end.usage.cached_tokens


def make(folder, backend="decode_core", **options):
    return make_engine(folder, reference=backend == "reference", **({"num_pages": 200, "max_batch": 4, "prefill_chunk": 64} | options))


@pytest.fixture
def stored(nanochat_fixtures, tmp_path, memory):
    """A store with one conversation, and what it answers."""
    [work] = conversations(3, 1, most=600)
    first = keep(make(nanochat_fixtures / "gen5"), memory)
    with torch.inference_mode(), writing(tmp_path, memory):
        tokens = tokens_of(first, [work])
    return SimpleNamespace(folder=tmp_path, work=work, tokens=tokens, pages=(len(work.prompt_ids) - 1) // PAGE_SIZE)


def cut(data, dice):
    return data[:dice.randrange(len(data))]


def flip(data, dice):
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    return data


def zeroes(data, dice):
    place = dice.randrange(len(data) - 512)
    return data[:place] + bytes(512) + data[place + 512:]


def exchanged_sectors(data, dice):
    one, two = sorted(dice.sample(range(1, len(data) // 512), 2))
    one, two = one * 512, two * 512
    return data[:one] + data[two:two + 512] + data[one + 512:two] + data[one:one + 512] + data[two + 512:]


def noise(data, dice):
    return bytearray(dice.randbytes(len(data)))


CHANGES = [cut, flip, zeroes, exchanged_sectors, noise]
