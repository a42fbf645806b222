"""The process that searches vectors: it comes back however it ends, and ends when nobody needs it."""

import asyncio
import signal
import struct
import sys

import pytest

import knowledge_rows as rows
from chatlm.common.errors import Overloaded
from chatlm.front.annexes.knowledge.scan import VectorScanner
from chatlm.front.annexes.knowledge.vectors.messages import Scan


def asked(vector, **more):
    return Scan((1,), 1, struct.pack(f"<{len(vector)}f", *vector), 5, **more)


@pytest.fixture
async def place(tmp_path):
    """(a scanner, the numbers of the passages of its store)"""
    path = tmp_path / "kept.db"
    rows.make_database(path)
    embedder = rows.add_embedder(path, "a")
    store = rows.add_store(path, embedder)
    _, passages = rows.add_file(path, store, [("x", [[1, 0, 0, 0]]), ("y", [[0, 1, 0, 0]])], embedder)
    scanner = VectorScanner(path)
    yield scanner, passages
    await scanner.close()
    assert scanner.process is None


async def nearest(scanner, vector=(0, 1, 0, 0)):
    return [near.passage for near in (await scanner.nearest(asked(vector))).nearest]


async def test_it_starts_with_the_first_scan_and_scans_take_turns(place):
    scanner, [a, b] = place
    assert scanner.process is None
    answers = await asyncio.gather(*(nearest(scanner, (i % 2, 1 - i % 2, 0, 0)) for i in range(20)))
    assert answers == [[b, a], [a, b]] * 10


async def test_killed_between_scans_it_comes_back(place):
    scanner, [a, b] = place
    for _ in range(3):
        assert await nearest(scanner) == [b, a]
        scanner.process.send_signal(signal.SIGKILL)


async def test_killed_during_a_scan_another_one_does_it(place):
    scanner, [a, b] = place
    await nearest(scanner)
    first = scanner.process
    first.send_signal(signal.SIGSTOP)
    waiting = [asyncio.ensure_future(nearest(scanner)) for _ in range(3)]
    await asyncio.wait(waiting[:1], timeout=0.2)
    assert not any(each.done() for each in waiting)
    first.kill()
    assert await asyncio.gather(*waiting) == [[b, a]] * 3 and scanner.process is not first


async def test_a_process_that_always_ends_is_said_and_not_tried_for_ever(place, tmp_path):
    scanner, _ = place
    scanner.command = (sys.executable, "-c", "import sys; sys.exit(3)")
    for _ in range(2):
        with pytest.raises(Overloaded, match="the process that searches vectors has ended"):
            await nearest(scanner)
    scanner.command = VectorScanner(tmp_path / "x").command
    assert len(await nearest(scanner)) == 2


async def test_one_that_hangs_is_given_up(place):
    scanner, passages = place
    await nearest(scanner)
    scanner.process.send_signal(signal.SIGSTOP)
    scanner.PATIENCE_S = 0.05
    with pytest.raises(Overloaded, match="takes too long"):
        await nearest(scanner)
    scanner.PATIENCE_S = VectorScanner.PATIENCE_S
    assert len(await nearest(scanner)) == 2


async def test_a_client_that_leaves_does_not_mix_up_answers(place):
    scanner, [a, b] = place
    await nearest(scanner)
    scanner.process.send_signal(signal.SIGSTOP)
    leaving = asyncio.ensure_future(nearest(scanner, (1, 0, 0, 0)))
    await asyncio.wait([leaving], timeout=0.05)
    leaving.cancel()
    staying = asyncio.ensure_future(nearest(scanner))
    await asyncio.wait([staying], timeout=0.05)
    scanner.process.send_signal(signal.SIGCONT)
    assert await staying == [b, a]


async def test_it_ends_when_nobody_asks(place):
    scanner, _ = place
    scanner.IDLE_S = 0.01
    await nearest(scanner)
    process = scanner.process
    while scanner.ending is None:
        await asyncio.sleep(0.01)
    await scanner.ending
    assert process.poll() is not None and scanner.process is None
    assert len(await nearest(scanner)) == 2


async def test_at_the_end_of_the_server_a_scan_is_told_so(place):
    scanner, _ = place
    await nearest(scanner)
    process = scanner.process
    process.send_signal(signal.SIGSTOP)
    waiting = [asyncio.ensure_future(nearest(scanner)) for _ in range(2)]
    await asyncio.wait(waiting[:1], timeout=0.05)
    await scanner.close()
    for each in waiting:
        with pytest.raises(Overloaded, match="shutting down"):
            await each
    assert process.poll() is not None and scanner.process is None


async def test_what_the_database_lacks_is_said(place):
    scanner, _ = place
    with pytest.raises(Overloaded, match="the vectors cannot be searched now"):
        await nearest(scanner, (1, 0, 0))
    moved = scanner.database.rename(scanner.database.with_suffix(".moved"))
    with pytest.raises(Overloaded, match="the vectors cannot be searched now"):
        await nearest(scanner)
    moved.rename(scanner.database)
    assert len(await nearest(scanner)) == 2
