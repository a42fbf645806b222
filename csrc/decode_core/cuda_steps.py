"""Steps on CUDA: decode steps are graphs, replayed once each; tokens are drawn on the device.

    start   fill pinned memory > copy it to the device > replay (with prompts: the ops) > draw > tokens come back
    finish  wait for that
    forward the same without the draw, for a step whose logits the host wants

One stream runs it all in order, so one piece of device memory serves every step's inputs, and one its tokens.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy
import torch

from .cuda import MAX_PRODUCT_ROWS
from .cuda_adapters import StepAdapters
from .sampling import batch_of

log = logging.getLogger("chat_server.decode_core")
LISTS = ("count_ids", "counts", "bias_ids", "bias_values")      # of a SampleBatch: what changes logits
LIST_CAPACITY = 1 << 14         # penalised tokens, and biases, of one step; a graph has room for this many

STEP_FIELDS = (                 # a step's inputs as they lie in memory, in order: name, type, shape by letter
    ("token_ids", "int64", "T"), ("previous_token_ids", "int64", "T"), ("positions", "int64", "T"),
    ("slots", "int64", "GT"), ("logit_rows", "int64", "R"), ("records", "int64", "R9"),
    ("state_reads", "int64", "N"), ("state_writes", "int64", "N"), ("adapter_tables", "int64", "T"),
    ("lengths", "int32", "N"), ("table", "int32", "GNW"), ("count_ids", "int32", "C"),
    ("counts", "int32", "C"), ("bias_ids", "int32", "B"), ("bias_values", "float32", "B"))


class CudaPlan(NamedTuple):
    """Where a step's keys lie, on the device: the same tensors in every step where the step is a graph."""

    decode: int             # the first sequences, with one token each: decode_core's rows
    table: Any              # (N, W) int32 page ids of each sequence
    lengths: Any            # (N,) int32 keys of each, its new ones included; 0 = padding
    prompts: Mapping[int, Sequence[Any]]            # {window: the other sequences}
    states: Any             # decode_core's workspace, shared by all layers
    tickets: Any


class StepShape(NamedTuple):
    """The sizes that STEP_FIELDS speaks of."""

    T: int                      # tokens
    N: int                      # sequences
    R: int                      # rows that sample
    W: int                      # pages of the longest sequence, in each group of layers
    C: int = 0                  # entries of the penalties' lists
    B: int = 0                  # entries of the bias' lists
    G: int = 1                  # groups of layers, each with pages of its own

    def layout(self) -> Iterator[tuple[str, str, list[int], int, int]]:
        """Name, type, shape, first and last byte of each field."""
        sizes = self._asdict() | {"9": 9}
        end = 0
        for name, kind, letters in STEP_FIELDS:
            shape = [sizes[letter] for letter in letters]
            begin = end
            end = end + math.prod(shape) * (8 if kind == "int64" else 4)
            yield name, kind, shape, begin, end

    def bytes(self, lists: bool = True) -> int:
        """Of all fields, or of those before the lists."""
        return next(end for name, *_, end in self.layout() if name == ("bias_values" if lists else "table"))

    def views(self, memory) -> SimpleNamespace:
        """The fields as tensors in `memory` (bytes), on the host or on the device."""
        return SimpleNamespace(**{name: memory[begin:end].view(getattr(torch, kind)).view(shape)
                                  for name, kind, shape, begin, end in self.layout()})


def of_groups(batch: Any, count: int) -> list[Any]:
    """The batch with the pages of each group of layers alone; its tables have a page of each in turn."""
    if count == 1:
        return [batch]
    return [batch._replace(tables=[pages[group::count] for pages in batch.tables]) for group in range(count)]


def fill_step(fields: SimpleNamespace, batches: Sequence[Any], locations: Sequence[Sequence[Sequence[int]]],
              sampling: Any, adapters: Sequence[int] = ()) -> None:
    """Write a batch (as from `of_groups`), its tokens' positions and slots in each group, and the SampleBatch
    of its rows (or None) into numpy `fields`; `adapters`: for each token the address of its adapter's table, or 0.

    What is left over is padding: a row with slot -1, so that nothing is stored, length 0, so that it attends
    to nothing, no states, and no position to draw at. The slots of states are those of decode rows: where
    sequences have several, the batch itself says more.
    """
    batch, (positions, _) = batches[0], locations[0]
    writes = dict(zip(batch.write_rows, batch.write_slots))
    reads = [slot if length > 1 else -1 for slot, length in zip(batch.state_reads, batch.lengths)]
    for column, values, padding in (
            (fields.token_ids, batch.token_ids, 0), (fields.previous_token_ids, batch.previous_token_ids, -1),
            (fields.positions, positions, 0), (fields.adapter_tables, adapters, 0),
            *((column, slots, -1) for column, (_, slots) in zip(fields.slots, locations)),
            (fields.state_reads, reads, -1),
            (fields.state_writes, [writes.get(row, -1) for row in range(len(reads))], -1),
            (fields.logit_rows, batch.logit_rows, 0), (fields.lengths, batch.lengths, 0)):
        column[:len(values)] = values
        column[len(values):] = padding
    for table, own in zip(fields.table, batches):
        for row, pages in zip(table, own.tables):
            row[:len(pages)] = pages
    fields.records[len(batch.logit_rows):, 1] = -1
    if sampling:
        fields.records[:len(batch.logit_rows)] = record_words(sampling)
        for name in LISTS:
            values = getattr(sampling, name)
            getattr(fields, name)[:len(values)] = values


# a batch of padding
NO_TOKENS = SimpleNamespace(**dict.fromkeys(
    ("token_ids", "previous_token_ids", "logit_rows", "lengths", "tables", "state_reads", "write_rows", "write_slots"), ()))


def with_parts(fields: SimpleNamespace, plans: Sequence[CudaPlan]) -> None:
    """Make a step's `fields` on the device Inputs: with the plans of its groups, slots and plan of group 0
    first."""
    fields.parts = [SimpleNamespace(token_ids=fields.token_ids, positions=fields.positions, turns=fields.positions, slots=slots,
                                    attention=plan)
                    for slots, plan in zip(fields.slots, plans)]
    fields.slots = fields.parts[0].slots
    fields.attention = plans[0]
    fields.adapters = None
    fields.turns = fields.positions


class CudaQueue:
    """What only CUDA has: a stream whose work runs in order, concurrently with the caller, and graphs of such work."""

    def __init__(self, device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()      # graphs never run side by side, so they share memory

    def pinned(self, size: int, dtype):
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def submit(self, work: Callable[[], None]) -> Any:
        """Queue `work` and return what `wait` takes. It runs after what the caller's own stream holds by now,
        and before what comes there later: `Transformer.forward` uses the same buffers."""
        own = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(own)
        with torch.cuda.stream(self.stream):
            work()
            done = torch.cuda.Event()
            done.record()
        own.wait_event(done)
        return done

    def wait(self, done: Any) -> None:
        done.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """`work` as one launch. It runs once before: kernels are loaded then, and libraries choose theirs."""
        self.wait(self.submit(work))
        graph = torch.cuda.CUDAGraph()
        # a capture that fails may leave its stream the current one
        with torch.cuda.stream(torch.cuda.current_stream(self.device)), \
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        return graph.replay


class Graph(NamedTuple):
    """A decode step of fixed shape, in two graphs: a step whose logits are looked at replays the first alone."""

    shape: StepShape
    compute: Callable[[], None]
    draw: Callable[[], None]


class Staging:
    """Pinned memory of one step: its inputs on their way to the device, and its tokens on their way back."""

    def __init__(self, queue: Any, size: int, max_rows: int):
        self.inputs, self.tokens = queue.pinned(size, torch.uint8), queue.pinned(max_rows, torch.int32)
        self.fields: dict[StepShape, SimpleNamespace] = {}      # numpy views, kept for the graphs' shapes
        self.done: Any = None                                   # of the step that used it last
        self.adapters: Any = None                               # those of that step, which may have been dropped

    def send(self, inputs: Any, size: int) -> None:
        inputs[:size].copy_(self.inputs[:size], non_blocking=True)


class Ticket(NamedTuple):
    """A step that was started."""

    staging: Staging
    rows: int
    done: Any


class GraphSteps:
    """Runs steps on CUDA; a second one may be started before the first is finished.

    start(batch, rows) -> ticket; finish(ticket) -> one token for each row. Where batch.token_ids holds ~i,
    that is the token that row i of the step before draws: it never leaves the device for that. `start` waits
    for nothing. A step of decode rows alone is a graph, of the next larger number of rows and of pages that
    `prepare` has captured; one with adapters has a graph that is captured when it is needed first. Steps with prompts, and those
    whose penalties do not fit LIST_CAPACITY, run op by op on the same stream. Penalties count row.tokens, so a row with penalties can be started only when all
    its tokens are known.
    """

    ahead = True

    def __init__(self, transformer: Any, backend: Any, *, max_batch: int, context_length: int,
                 queue: Any = None):
        self.transformer = transformer
        self.spec = transformer.spec
        self.backend = backend
        self.script = backend.script
        self.queue = queue or CudaQueue(transformer.device)
        self.windows = transformer.windows
        self.count = len(transformer.groups.windows)
        most = len(transformer.buffers["x"])
        max_pages = -(-context_length // self.script.PAGE_SIZE)
        drafted = MAX_PRODUCT_ROWS if backend.few_rows_invariant else 0
        self.max_rows = max(max_batch, min(drafted, len(transformer.buffers["logits"])))
        # a graph's grid covers the longest table: 64 pages are 1,024 tokens. Texts beyond the context are only scored, op by op
        decoded = -(-min(context_length, self.spec.context_length) // self.script.PAGE_SIZE)
        self.buckets = list(itertools.product(doubling(1, self.max_rows, 2), doubling(64, decoded, 4)))
        largest = StepShape(most, self.max_rows, self.max_rows, max_pages, LIST_CAPACITY, LIST_CAPACITY, self.count)
        with torch.inference_mode():
            self.inputs = torch.empty(largest.bytes(), dtype=torch.uint8, device=transformer.device)
            # the newest step's
            self.tokens = torch.zeros(self.max_rows, dtype=torch.int32, device=transformer.device)
            self.workspace = self.backend.workspace(self.max_rows, max_pages, transformer.device)
        self.staging = [Staging(self.queue, largest.bytes(), self.max_rows) for _ in range(2)]
        self.graphs: dict[tuple[int, int], Graph] = {}
        self.adapted: dict[tuple[int, int], Graph | None] = {}      # the same of steps with adapters; None: cannot be captured
        self.sampling: Any = None           # the SampleBatch of the step before

    def prepare(self, progress: Callable[[float], None]) -> None:
        """Capture the graph of every bucket, the largest first; no step may be under way.

        Steps that only a graph which cannot be captured would hold run op by op.
        """
        failures = []
        for done, bucket in enumerate(reversed(self.buckets)):
            progress(done / len(self.buckets))
            try:
                self._capture(*bucket)
            except Exception as error:
                self.queue.wait(self.queue.submit(lambda: None))        # raises where the device cannot go on
                failures.append(f"{type(error).__name__}: {error}")
        if failures:
            fault = f"{len(failures)} of {len(self.buckets)} cannot be captured ({failures[0]})"
            self.backend.faults["graphs"] = fault
            log.warning("CUDA graphs: %s; their steps run op by op", fault)

    def _padding(self, rows: int, pages: int) -> tuple[StepShape, SimpleNamespace]:
        """The shape of a graph's steps and their fields on the device, which hold nothing but padding."""
        shape = StepShape(rows, rows, rows, pages, LIST_CAPACITY, LIST_CAPACITY, self.count)
        staging = self.staging[0]
        with torch.inference_mode():
            fields = shape.views(self.inputs)
            no_prompts = dict.fromkeys(self.windows, ())
            with_parts(fields, [CudaPlan(rows, table, fields.lengths, no_prompts, *self.workspace)
                                for table in fields.table])
            fields.sequences = self.script.OneEach(fields.state_reads, fields.state_writes)
            fill_step(self._host_fields(staging, shape), [NO_TOKENS] * self.count, [((), ())] * self.count, None)
            self.queue.wait(self.queue.submit(lambda: staging.send(self.inputs, shape.bytes())))
        return shape, fields

    def _capture(self, rows: int, pages: int) -> None:
        with torch.inference_mode():
            shape, fields = self._padding(rows, pages)
            self.graphs[rows, pages] = Graph(shape, self.queue.capture(lambda: self._compute(fields)),
                                             self.queue.capture(lambda: self._draw(fields)))

    def _adapted_graph(self, bucket: tuple[int, int]) -> Graph | None:
        """The graph of steps with adapters, captured now if it is not there. It draws as the other does."""
        if bucket not in self.adapted:
            self.adapted[bucket] = None
            self.queue.wait(self.queue.submit(lambda: None))            # of a step under way, whose memory is used here
            try:
                with torch.inference_mode():
                    _, fields = self._padding(*bucket)
                    self.adapted[bucket] = self.graphs[bucket]._replace(
                        compute=self.queue.capture(lambda: self._compute(fields, on_device=True)))
            except Exception as error:
                self.queue.wait(self.queue.submit(lambda: None))        # raises where the device cannot go on
                log.warning("the CUDA graph of %d rows with adapters cannot be captured (%s: %s); its steps run op by op",
                            bucket[0], type(error).__name__, error)
        return self.adapted[bucket]

    def _adapter_tables(self, batch: Any) -> list[int] | None:
        """For each token the address of its adapter's table, 0 without one; None if torch must add the adapters' products."""
        adapters = self.transformer.adapters
        mine = {slot: adapters[slot] for slot in {*batch.adapters} if slot in adapters}
        if {"linear", "adapters"} & self.backend.faults.keys() or any(its.table is None for its in mine.values()):
            return None
        addresses = {slot: its.table.data_ptr() for slot, its in mine.items()}
        return [addresses.get(slot, 0) for slot, (begin, end) in zip(batch.adapters, itertools.pairwise(batch.starts))
                for _ in range(begin, end)]

    def start(self, batch: Any, rows: Sequence[Any]) -> Ticket:
        """Queue a step; `rows` say how to draw at batch.logit_rows. At most two steps may be under way."""
        self.sampling, batch = batch_of(rows, self.spec.vocab_size, self.sampling), self._apart(batch)
        return self._queue(batch, self._graph(batch, self.sampling), self.sampling)

    def forward(self, batch: Any) -> torch.Tensor:
        """The logits of a step alone; no other may be under way."""
        batch = self._apart(batch)
        if (graph := self._graph(batch, None)) is None:
            return self.transformer.forward(batch)
        self.queue.wait(self._queue(batch, graph, None, draws=False).done)
        return self.transformer.buffers["logits"][:len(batch.logit_rows)]

    def _queue(self, batch: Any, graph: Graph | None, sampling: Any, draws: bool = True) -> Ticket:
        self.staging.reverse()
        staging = self.staging[0]
        count = len(batch.logit_rows)
        if staging.done:            # long since, unless that step was given up
            self.queue.wait(staging.done)
        lists = (len(sampling.count_ids), len(sampling.bias_ids)) if sampling else (0, 0)
        batches = of_groups(batch, self.count)
        shape = graph.shape if graph else StepShape(
            len(batch.token_ids), len(batch.lengths), count,
            max(map(len, batch.tables)) // self.count, *lists, self.count)
        with torch.inference_mode():
            inputs = self.inputs
            if shape.bytes() > len(inputs):         # very long lists: memory for this step alone
                staging.inputs = self.queue.pinned(shape.bytes(), torch.uint8)
                inputs = inputs.new_empty(shape.bytes())
                staging.fields.clear()
            host = self._host_fields(staging, shape, keep=graph is not None)
            adapted = any(batch.adapters)
            adapters = None
            tables = self._adapter_tables(batch) if adapted else None
            fill_step(host, batches, [self.script.token_places(own) for own in batches], sampling, tables or ())
            if adapted and tables is None:
                adapters = self.script.RowAdapters.of(batch, self.transformer.adapters)
            staging.adapters = dict(self.transformer.adapters) if adapted else None

            def step() -> None:
                staging.send(inputs, shape.bytes(lists=any(lists)))
                if graph:
                    graph.compute()
                else:
                    self._run_ops(batches, shape.views(inputs), adapters, on_device=tables is not None)
                if graph and draws:
                    graph.draw()
                if draws:
                    staging.tokens[:count].copy_(self.tokens[:count], non_blocking=True)

            try:
                staging.done = self.queue.submit(step)
            except BaseException:           # what the step had queued by then still uses this memory
                staging.done = self.queue.submit(lambda: None)
                raise
        return Ticket(staging, count, staging.done)

    def finish(self, ticket: Ticket) -> list[int]:
        assert ticket.staging.done is ticket.done, "more than two steps were under way"
        self.queue.wait(ticket.done)
        return ticket.staging.tokens[:ticket.rows].tolist()

    def _apart(self, batch: Any) -> Any:
        """Where few tokens all draw, drafts among them: each as a decode row of its own, with its sequence's pages.
        Not where layers keep states, of which each token needs the one before."""
        count = len(batch.token_ids)
        if self.spec.mixers or not len(batch.lengths) < count == len(batch.logit_rows) <= min(self.max_rows, MAX_PRODUCT_ROWS):
            return batch
        sizes = [end - start for start, end in itertools.pairwise(batch.starts)]
        lengths = [length - left for size, length in zip(sizes, batch.lengths) for left in reversed(range(size))]
        tables = [pages for size, pages in zip(sizes, batch.tables) for _ in range(size)]
        adapters = [slot for size, slot in zip(sizes, batch.adapters) for _ in range(size)]
        return batch._replace(starts=[*range(count + 1)], lengths=lengths, tables=tables, adapters=adapters)

    def _graph(self, batch: Any, sampling: Any) -> Graph | None:
        """The smallest graph that holds a step of decode rows; None for any other step."""
        rows = len(batch.lengths)
        pages = max(map(len, batch.tables)) // self.count
        if not len(batch.token_ids) == len(batch.logit_rows) == rows:
            return None
        if sampling and max(len(sampling.count_ids), len(sampling.bias_ids)) > LIST_CAPACITY:
            return None
        fitting = [bucket for bucket in self.graphs if bucket[0] >= rows and bucket[1] >= pages]
        if not fitting or not any(batch.adapters):
            return self.graphs[min(fitting)] if fitting else None
        return None if self._adapter_tables(batch) is None else self._adapted_graph(min(fitting))

    def _run_ops(self, batches: Sequence[Any], fields: SimpleNamespace, adapters: Any, on_device: bool) -> None:
        plans = [self.backend.plan(batch, self.windows, table, fields.lengths, self.workspace)
                 for batch, table in zip(batches, fields.table)]
        with_parts(fields, plans)
        fields.adapters = adapters
        fields.sequences = self.script.Sequences.of(batches[0])
        self._compute(fields, on_device)
        if len(fields.logit_rows):
            self._draw(fields)

    def _host_fields(self, staging: Staging, shape: StepShape, keep: bool = True) -> SimpleNamespace:
        """A step's inputs in pinned memory as numpy arrays, to be written."""
        if (fields := staging.fields.get(shape)) is None:
            views = vars(shape.views(staging.inputs))
            fields = SimpleNamespace(**{name: view.numpy() for name, view in views.items()})
            if keep:
                staging.fields[shape] = fields
        return fields

    def _compute(self, fields: SimpleNamespace, on_device: bool = False) -> None:
        """The model: everything here is captured, so it reads tensors on the device and shapes only.

        `fields` are what StepShape names, and `attention` and `sequences`, which make them Inputs. on_device: the step has
        adapters, of which adapter_tables speak.
        """
        if on_device:
            fields.adapters = StepAdapters(self.backend.adapters.numbers, fields.adapter_tables, fields.logit_rows)
        drawn = torch.index_select(self.tokens, 0, (~fields.token_ids).clamp(min=0))
        fields.token_ids.copy_(torch.where(fields.token_ids < 0, drawn, fields.token_ids))
        self.backend.mixture.slots = fields.slots
        try:
            self.transformer.compute(fields, self.transformer.cut(len(fields.token_ids), len(fields.logit_rows)))
        finally:
            self.backend.mixture.slots = None

    def _draw(self, fields: SimpleNamespace) -> None:
        """A token for each row of the logits; captured too."""
        R = len(fields.logit_rows)
        lists = [getattr(fields, name) for name in LISTS]
        self.backend.draw(self.transformer.buffers["logits"][:R], fields.records, lists, self.tokens[:R])


def doubling(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... below last, and last."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(sizes[-1] * factor)
    return [*sizes[:-1], last]


def record_words(batch: Any) -> numpy.ndarray:
    """The records of a SampleBatch as (R, 9) int64; word 1 is the position, negative = no token."""
    return batch.records.view(numpy.int64).reshape(len(batch.records), -1)
