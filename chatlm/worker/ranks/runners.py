"""How several ranks compute a step together, in shards and in stages."""

from __future__ import annotations

import datetime
import functools
import importlib
import math
import os
import socket
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from chatlm.common.messages.wire import receive_into
from chatlm.common.processes.torchrun import RankStore
from chatlm.worker.ranks.messages import RankAdapter, RankLogits, RankStep, RankTokens
from chatlm.worker.weights.adapters.serving import reading_thread

if TYPE_CHECKING:
    from chatlm.common.messages.wire import Channel
    from chatlm.worker.kernels.kernels import StepRunner
    from chatlm.worker.model.batch import Batch
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ops.rows import SampleRow
    from chatlm.worker.ranks.alone import RankAlone
    from chatlm.worker.ranks.ranks import RankZero


RANK_PATIENCE_S = 20.0  # how long a rank waits for another; the front gives up on a worker only later
COMPARED_STEPS = 64     # the ranks compare what they drew every this many steps
ROWS_SENT = 16          # rows of logits in a message: 16 MB where the vocabulary has 262,144 tokens


def rank_device(device: str, rank: int) -> str:
    """The device of a rank if rank 0 has `device`: the GPUs of a replica are numbered consecutively."""
    device_type, _, index = device.partition(":")
    return f"{device_type}:{int(index or 0) + rank}" if device_type == "cuda" else device


def join_ranks(backend, address: str, rank: int, count: int, device: str) -> dict[str, Callable]:
    """The ops all_reduce and all_gather of a rank; see `Kernels`."""
    if count == 1:
        return {}
    if backend.join:
        return backend.join(address, rank, RANK_PATIENCE_S)
    torch, distributed = map(importlib.import_module, ("torch", "torch.distributed"))
    on_disk = address.startswith("/")
    if on_disk or os.environ["MASTER_ADDR"].startswith("127."):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    store = (distributed.FileStore(address, count) if on_disk else
             distributed.PrefixStore(address, RankStore().store))
    distributed.init_process_group(
        "nccl" if device.startswith("cuda") else "gloo", store=store, rank=rank,
        world_size=count, timeout=datetime.timedelta(seconds=RANK_PATIENCE_S))

    def all_reduce(x, out, residual=None):
        distributed.all_reduce(x)
        if residual is None:
            out.copy_(x)
        else:
            torch.add(residual, x, out=out)

    def all_gather(x, out):
        parts = [torch.empty_like(x) for _ in range(count)]
        distributed.all_gather(parts, x)
        out.copy_(torch.cat(parts, 1)[:, :out.shape[1]])

    return {"all_reduce": all_reduce, "all_gather": all_gather}


class DrawnTokens:
    """A checksum of what a rank's steps drew; `note` receives it every COMPARED_STEPS steps."""

    def __init__(self, note: Callable[[int], None]):
        self.note = note
        self.checksum = 0
        self.steps = 0

    def add(self, tokens: list[int]) -> list[int]:
        """Count the tokens of a step; returns them."""
        self.checksum = zlib.crc32(repr(tokens).encode(), self.checksum)
        self.steps += 1
        if self.steps % COMPARED_STEPS == 0:
            self.note(self.checksum)
        return tokens


def rank_step(batch: Batch, rows: Seq[SampleRow]) -> RankStep:
    """A step to send, without the tokens that its draws do not depend on."""
    sent = [row if row.params.counts_tokens else row._replace(tokens=()) for row in rows]
    return RankStep(batch, sent)


class RankRunner:
    """Runs the steps of a rank. `broadcast` passes each on to the other ranks."""

    def __init__(self, runner: StepRunner, transformer: Transformer, broadcast: Callable[[RankStep], None],
                 note: Callable[[int], None]):
        self.runner = runner
        self.transformer = transformer
        self.broadcast = broadcast
        self.ahead = runner.ahead
        self.prepare = runner.prepare
        self.drawn = DrawnTokens(note)

    def start(self, batch: Batch, rows: Seq[SampleRow]):
        self.broadcast(rank_step(batch, rows))
        return self.runner.start(batch, rows)

    def finish(self, ticket) -> list[int]:
        return self.drawn.add(self.runner.finish(ticket))

    def forward(self, batch: Batch):
        """Compute a batch whose logits rank 0 uses."""
        self.broadcast(RankStep(batch, None))
        return self.runner.forward(batch)


class Stage:
    """A rank's part of a step if the layers are divided into stages. It receives what the previous stage has
    computed, and passes its own result on; the last stage draws."""

    def __init__(self, runner: StepRunner, transformer: Transformer, ranks: RankAlone):
        self.runner = runner
        self.transformer = transformer
        self.ranks = ranks

    def compute(self, batch: Batch, rows: Seq[SampleRow] | None):
        """The drawn tokens; without `rows` the logits; None before the last stage."""
        try:
            with self.transformer.arrays.computing():  # of each thread
                return self._compute(batch, rows)
        except BaseException:
            for link in filter(None, (self.ranks.before, self.ranks.after)):
                with suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)  # so that those stages end too
            raise

    def _compute(self, batch: Batch, rows: Seq[SampleRow] | None):
        transformer = self.transformer
        T = len(batch.token_ids)
        for name in () if transformer.model.opens else transformer.passed_on(0):
            buffer = transformer.buffers[name][:T]
            received = numpy.empty(tuple(buffer.shape), numpy.float32)
            receive_into(self.ranks.before, received)  # pyright: ignore[reportArgumentType]  it is there
            transformer.arrays.put(received, buffer)
        if not transformer.model.closes:
            transformer.forward(batch._replace(logit_rows=[], states=True))
            for name in transformer.passed_on(len(transformer.model.layers)):
                self.ranks.after.sendall(  # pyright: ignore[reportOptionalMemberAccess]  so is this
                    transformer.arrays.numpy(transformer.buffers[name][:T]).tobytes())
            return None
        if rows is None:
            return self.runner.forward(batch)
        return self.runner.finish(self.runner.start(batch, rows))


class StagedRunner:
    """Runs rank 0's steps where layers are divided into stages: a thread computes the first stage of each."""

    ahead = True

    def __init__(self, stage: Stage, ranks: RankZero, note: Callable[[int], None]):
        self.stage = stage
        self.ranks = ranks
        self.drawn = DrawnTokens(note)
        self.thread = ThreadPoolExecutor(1, "stage")
        self.prepare = lambda progress: None

    def start(self, batch: Batch, rows: Seq[SampleRow]) -> Future:
        self.ranks.broadcast(rank_step(batch, rows))
        return self.thread.submit(self.stage.compute, batch, rows)

    def finish(self, ticket: Future) -> list[int]:
        ticket.result()
        return self.drawn.add(self.ranks.from_last_stage(RankTokens).tokens)

    def forward(self, batch: Batch):
        self.ranks.broadcast(RankStep(batch, None))
        self.thread.submit(self.stage.compute, batch, None).result()
        buffers = self.stage.transformer.buffers
        arrays = self.stage.transformer.arrays
        data = bytearray()
        logits = buffers["logits"][:len(batch.logit_rows)]
        states = buffers["x"][:len(batch.token_ids) if batch.states else 0]
        count, more = (math.prod(rows.shape) for rows in (logits, states))
        while len(data) < 4 * (count + more):
            data += self.ranks.from_last_stage(RankLogits).data
        values = numpy.frombuffer(data, numpy.float32)
        arrays.put(values[count:].reshape(tuple(states.shape)), states)
        arrays.put(values[:count].reshape(tuple(logits.shape)), logits)
        return logits


def received_steps(channel: Channel, transformer: Transformer) -> Iterator[RankStep]:
    """The steps that rank 0 sends, until it has gone. A thread reads adapters meanwhile; the first step that
    uses one waits for it."""
    same = functools.lru_cache(1024)(lambda params: params)  # decode_core compares them by identity
    thread = reading_thread()
    reading = dict[int, Future]()
    with suppress(EOFError, ConnectionError, TimeoutError):
        while True:
            [step] = channel.receive(wait=True, most=1)
            if isinstance(step, RankAdapter) and step.folder:
                reading[step.slot] = thread.submit(transformer.load_adapter, step.slot,
                                                   Path(step.folder), step.stamp)
                continue
            if isinstance(step, RankAdapter):
                future = reading.pop(step.slot, None)
                if future:
                    future.exception()  # rank 0 reports it
                transformer.adapters.pop(step.slot, None)
                continue
            for slot in reading.keys() & {*step.batch.adapters}:
                reading.pop(slot).result()
            rows = step.rows and [row._replace(params=same(row.params)) for row in step.rows]
            yield replace(step, rows=rows)


def follow(channel: Channel, runner: RankRunner):
    """Compute the steps that rank 0 sends, starting one ahead as it does."""
    finish = None  # finishes the step under way
    for step in received_steps(channel, runner.transformer):
        following = None
        if step.rows is not None:
            following = functools.partial(runner.finish, runner.start(step.batch, step.rows))
        if finish:
            finish()
        finish = following
        if step.rows is None:
            runner.forward(step.batch)


def follow_stage(channel: Channel, stage: Stage, drawn: DrawnTokens):
    """Compute this stage of the steps that rank 0 sends. The first rank of the last stage replies."""
    is_last = stage.transformer.model.closes
    replies = stage.ranks.rank % stage.ranks.tp == 0
    for step in received_steps(channel, stage.transformer):
        computed: Any = stage.compute(step.batch, step.rows)
        if not is_last:
            continue
        if step.rows is None:
            if replies:
                send_logits(channel, stage.transformer, step.batch, computed)
        elif replies:
            channel.send(RankTokens(computed))
        else:
            drawn.add(computed)


def send_logits(channel: Channel, transformer: Transformer, batch: Batch, logits: Any):
    """Send a step's logits to rank 0, then its hidden states if they are needed."""
    states = transformer.buffers["x"][:len(batch.token_ids) if batch.states else 0]
    for rows in map(transformer.arrays.numpy, (logits, states)):
        for begin in range(0, len(rows), ROWS_SENT):
            channel.send(RankLogits(rows[begin:begin + ROWS_SENT].tobytes()))
