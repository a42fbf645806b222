"""Steps on CUDA. A decode step replays a graph, and tokens are drawn on the device.

    start   fill pinned memory > copy it to the device > replay the graph (with prompts: run the ops) > draw >
            copy the tokens back
    finish  wait until the tokens have come
    forward the same as start without the draw, for a step whose logits the host wants

One stream runs everything in order. So all steps share one piece of device memory for their inputs, and one
for their tokens.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy
import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.worker.kernels.cuda import MAX_PRODUCT_ROWS
from chatlm.worker.kernels.cuda_adapters import StepAdapters
from chatlm.worker.kernels.sampling import batch_of
from chatlm.worker.model.batch import Batch, RowAdapters, Sequences, token_places
from chatlm.worker.ops.mixers import OneEach

if TYPE_CHECKING:
    from chatlm.worker.kernels.cuda_backend import CudaBackend
    from chatlm.worker.kernels.sampling import SampleBatch
    from chatlm.worker.model.transformer import Transformer
    from chatlm.worker.ops.rows import SampleRow

log = logging.getLogger("chat_server.decode_core")
# of a SampleBatch: penalties and biases change logits
LISTS = ("count_ids", "counts", "bias_ids", "bias_values")
# a graph has room for this many penalised tokens, and as many biases, of one step
LIST_CAPACITY = 1 << 14

# a step's inputs in the order in which they lie in memory: name, type, shape in letters of StepShape
STEP_FIELDS = (
    ("token_ids", "int64", "T"), ("previous_token_ids", "int64", "T"), ("positions", "int64", "T"),
    ("slots", "int64", "GT"), ("logit_rows", "int64", "R"), ("records", "int64", "R9"),
    ("state_reads", "int64", "N"), ("state_writes", "int64", "N"), ("adapter_tables", "int64", "T"),
    ("lengths", "int32", "N"), ("table", "int32", "GNW"), ("count_ids", "int32", "C"),
    ("counts", "int32", "C"), ("bias_ids", "int32", "B"), ("bias_values", "float32", "B"))


class CudaPlan(NamedTuple):
    """Where the keys of a step lie on the device. All steps of a graph have the same tensors."""

    # so many first sequences have one token each: decode_core's kernels attend for them
    decode: int
    table: Any              # (N, W) int32 page ids of each sequence
    lengths: Any            # (N,) int32 how many keys each has, new ones included; 0: padding
    prompts: Mapping[int, Sequence[Any]]            # window -> the other sequences
    states: Any             # the workspace of decode_core's attention, shared by all layers
    tickets: Any


class StepShape(NamedTuple):
    """The sizes of a step, by the letters of STEP_FIELDS."""

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
        """How many bytes all fields take, or those before the lists."""
        last = "bias_values" if lists else "table"
        return next(end for name, *_, end in self.layout() if name == last)

    def views(self, memory) -> SimpleNamespace:
        """The fields as tensors in `memory` (bytes), on the host or on the device."""
        return SimpleNamespace(**{name: memory[begin:end].view(getattr(torch, kind)).view(shape)
                                  for name, kind, shape, begin, end in self.layout()})


def of_groups(batch: Batch, count: int) -> list[Batch]:
    """The batch once for each group of layers, with the pages of that group alone.

    The batch's own tables have a page of each group in turn."""
    if count == 1:
        return [batch]
    return [batch._replace(tables=[pages[group::count] for pages in batch.tables]) for group in range(count)]


def fill_step(fields: SimpleNamespace, batches: Sequence[Batch], locations: Sequence[Sequence[Sequence[int]]],
              sampling: SampleBatch | None, adapters: Sequence[int] = ()) -> None:
    """Write a step into numpy `fields`.

    batches     the batch for each group of layers, as `of_groups` gives it
    locations   (positions, slots) of the tokens in each group
    sampling    the SampleBatch of the rows that draw, or None
    adapters    for each token the address of its adapter's table, or 0

    What is left over becomes padding: slot -1, so that nothing is stored; length 0, so that the row attends
    to nothing; no states; and no position to draw at. The slots of states are right for decode rows. For
    sequences of several rows the batch itself says more.
    """
    batch = batches[0]
    positions, _ = locations[0]
    writes = dict(zip(batch.write_rows, batch.write_slots))
    reads = [slot if length > 1 else -1 for slot, length in zip(batch.state_reads, batch.lengths)]
    state_writes = [writes.get(row, -1) for row in range(len(reads))]

    fill(fields.token_ids, batch.token_ids, 0)
    fill(fields.previous_token_ids, batch.previous_token_ids, -1)
    fill(fields.positions, positions, 0)
    fill(fields.adapter_tables, adapters, 0)
    for column, (_, slots) in zip(fields.slots, locations):
        fill(column, slots, -1)
    fill(fields.state_reads, reads, -1)
    fill(fields.state_writes, state_writes, -1)
    fill(fields.logit_rows, batch.logit_rows, 0)
    fill(fields.lengths, batch.lengths, 0)
    for table, own in zip(fields.table, batches):
        for row, pages in zip(table, own.tables):
            row[:len(pages)] = pages
    fields.records[len(batch.logit_rows):, 1] = -1
    if sampling:
        fields.records[:len(batch.logit_rows)] = record_words(sampling)
        for name in LISTS:
            values = getattr(sampling, name)
            getattr(fields, name)[:len(values)] = values


def fill(column: numpy.ndarray, values: Sequence[int], padding: int) -> None:
    """Write the values, and padding after them."""
    column[:len(values)] = values
    column[len(values):] = padding


# the batch of a step that is padding alone
NO_TOKENS = Batch([], [], [], [], [], [])


def with_parts(fields: SimpleNamespace, plans: Sequence[CudaPlan]) -> None:
    """Add to a step's fields on the device what makes them Inputs: the plans of the groups of layers.

    `slots` and `attention` are then those of group 0."""
    fields.parts = [
        SimpleNamespace(token_ids=fields.token_ids, positions=fields.positions, turns=fields.positions,
                        slots=slots, attention=plan) for slots, plan in zip(fields.slots, plans)
    ]
    fields.slots = fields.parts[0].slots
    fields.attention = plans[0]
    fields.adapters = None
    fields.turns = fields.positions


class CudaQueue:
    """A CUDA stream, whose work runs in order and beside the caller's, and graphs of such work.

    Tests without a GPU put another class in its place."""

    def __init__(self, device):
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()      # no two graphs run at once, so all share memory

    def pinned(self, size: int, dtype):
        return torch.empty(size, dtype=dtype, pin_memory=True)

    def submit(self, work: Callable[[], None]) -> Any:
        """Queue `work` and return what `wait` takes.

        It runs after all that the caller's own stream holds now, and before what comes there later, because
        `Transformer.forward` uses the same buffers there."""
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
        """A function that runs `work` as one launch. `work` runs once before, so that kernels are loaded and
        libraries have chosen theirs."""
        self.wait(self.submit(work))
        graph = torch.cuda.CUDAGraph()
        # the outer `with` restores the current stream, which a failed capture would leave changed
        with torch.cuda.stream(torch.cuda.current_stream(self.device)), \
                torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        return graph.replay


class Graph(NamedTuple):
    """A decode step of a fixed shape, in two graphs. A step whose logits the host wants replays only
    `compute`."""

    shape: StepShape
    compute: Callable[[], None]
    draw: Callable[[], None]


class Staging:
    """Pinned memory of one step: its inputs on their way to the device, and its tokens on their way back."""

    def __init__(self, queue: CudaQueue, size: int, max_rows: int):
        self.inputs = queue.pinned(size, torch.uint8)
        self.tokens = queue.pinned(max_rows, torch.int32)
        self.fields: dict[StepShape, SimpleNamespace] = {}      # numpy views for the shapes of graphs
        # what to wait for: the step that used this memory last
        self.done: Any = None
        # that step's, kept alive in case they are dropped meanwhile
        self.adapters: Any = None

    def send(self, inputs: Any, size: int) -> None:
        inputs[:size].copy_(self.inputs[:size], non_blocking=True)


class Ticket(NamedTuple):
    """A step that was started."""

    staging: Staging
    rows: int
    done: Any


class GraphRunner:
    """Runs steps on CUDA. A second step may start before the first is finished.

    start(batch, rows) -> ticket; finish(ticket) -> a token for each row. `start` waits for nothing. ~i in
    batch.token_ids is the token that row i of the step before draws; for that it never leaves the device.
    Penalties count row.tokens, so a row with penalties can start only when all its tokens are known.

    A step of decode rows alone replays a graph: the smallest of those that `prepare` captured which has room
    for its rows and pages. With adapters it needs another graph, which is captured when the first such step
    comes. Steps with prompts, and steps whose penalties do not fit LIST_CAPACITY, run op by op on the same
    stream.
    """

    ahead = True

    def __init__(self, transformer: Transformer, backend: CudaBackend, *, max_batch: int, context_length: int,
                 queue: CudaQueue | None = None):
        self.transformer = transformer
        self.model = transformer.model
        self.backend = backend
        self.queue = queue or CudaQueue(transformer.device)
        self.windows = transformer.windows
        self.count = len(transformer.groups.windows)
        most = len(transformer.buffers["x"])
        max_pages = -(-context_length // PAGE_SIZE)
        drafted = MAX_PRODUCT_ROWS if backend.few_rows_invariant else 0
        self.max_rows = max(max_batch, min(drafted, len(transformer.buffers["logits"])))
        # A graph's grid covers its longest table, at least 64 pages, which are 1,024 tokens. Texts longer
        # than the context are only
        # scored, which runs op by op
        decoded = -(-min(context_length, self.model.context_length) // PAGE_SIZE)
        self.buckets = list(itertools.product(doubling(1, self.max_rows, 2), doubling(64, decoded, 4)))
        largest = StepShape(most, self.max_rows, self.max_rows, max_pages, LIST_CAPACITY, LIST_CAPACITY,
                            self.count)
        with torch.inference_mode():
            self.inputs = torch.empty(largest.bytes(), dtype=torch.uint8, device=transformer.device)
            # what the newest step draws
            self.tokens = torch.zeros(self.max_rows, dtype=torch.int32, device=transformer.device)
            self.workspace = self.backend.workspace(self.max_rows, max_pages, transformer.device)
        self.staging = [Staging(self.queue, largest.bytes(), self.max_rows) for _ in range(2)]
        self.graphs: dict[tuple[int, int], Graph] = {}
        # graphs with adapters; None: one could not be captured
        self.adapted: dict[tuple[int, int], Graph | None] = {}
        self.sampling: SampleBatch | None = None           # the SampleBatch of the step before

    def prepare(self, progress: Callable[[float], None]) -> None:
        """Capture a graph for every bucket, the largest first. No step may be under way.

        Where a graph cannot be captured, steps that need it run op by op.
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
        """The shape of a graph's steps, and their fields on the device, filled with padding."""
        shape = StepShape(rows, rows, rows, pages, LIST_CAPACITY, LIST_CAPACITY, self.count)
        staging = self.staging[0]
        with torch.inference_mode():
            fields = shape.views(self.inputs)
            no_prompts = dict.fromkeys(self.windows, ())
            with_parts(fields, [CudaPlan(rows, table, fields.lengths, no_prompts, *self.workspace)
                                for table in fields.table])
            fields.sequences = OneEach(fields.state_reads, fields.state_writes)
            fill_step(self._host_fields(staging, shape), [NO_TOKENS] * self.count, [((), ())] * self.count,
                      None)
            self.queue.wait(self.queue.submit(lambda: staging.send(self.inputs, shape.bytes())))
        return shape, fields

    def _capture(self, rows: int, pages: int) -> None:
        with torch.inference_mode():
            shape, fields = self._padding(rows, pages)
            self.graphs[rows, pages] = Graph(shape, self.queue.capture(lambda: self._compute(fields)),
                                             self.queue.capture(lambda: self._draw(fields)))

    def _adapted_graph(self, bucket: tuple[int, int]) -> Graph | None:
        """The graph of steps with adapters, captured now unless it was before. Its draw is that of the graph
        without."""
        if bucket not in self.adapted:
            self.adapted[bucket] = None
            # a step under way still uses the memory that this needs
            self.queue.wait(self.queue.submit(lambda: None))
            try:
                with torch.inference_mode():
                    _, fields = self._padding(*bucket)
                    self.adapted[bucket] = self.graphs[bucket]._replace(
                        compute=self.queue.capture(lambda: self._compute(fields, on_device=True)))
            except Exception as error:
                self.queue.wait(self.queue.submit(lambda: None))        # raises where the device cannot go on
                log.warning("the CUDA graph of %d rows with adapters cannot be captured (%s: %s); its steps "
                            "run op by op", bucket[0], type(error).__name__, error)
        return self.adapted[bucket]

    def _adapter_tables(self, batch: Batch) -> list[int] | None:
        """For each token the address of its adapter's table, 0 without one. None: torch must add the
        adapters' products."""
        adapters = self.transformer.adapters
        used = {slot: adapters[slot] for slot in {*batch.adapters} if slot in adapters}
        if {"linear", "adapters"} & self.backend.faults.keys():
            return None
        if any(adapter.table is None for adapter in used.values()):
            return None
        addresses = {slot: adapter.table.data_ptr() for slot, adapter in used.items()}
        tables = []
        for slot, (begin, end) in zip(batch.adapters, itertools.pairwise(batch.starts)):
            tables += [addresses.get(slot, 0)] * (end - begin)
        return tables

    def start(self, batch: Batch, rows: Sequence[SampleRow]) -> Ticket:
        """Queue a step. `rows` say how to draw at batch.logit_rows. At most two steps may be under way."""
        self.sampling = batch_of(rows, self.model.vocab_size, self.sampling)
        batch = self._apart(batch)
        return self._queue(batch, self._graph(batch, self.sampling), self.sampling)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The logits of a step. No other step may be under way."""
        batch = self._apart(batch)
        graph = self._graph(batch, None)
        if graph is None:
            return self.transformer.forward(batch)
        self.queue.wait(self._queue(batch, graph, None, draws=False).done)
        return self.transformer.buffers["logits"][:len(batch.logit_rows)]

    def _queue(self, batch: Batch, graph: Graph | None, sampling: SampleBatch | None,
               draws: bool = True) -> Ticket:
        self.staging.reverse()
        staging = self.staging[0]
        count = len(batch.logit_rows)
        if staging.done:            # it is over for long, unless nobody finished that step
            self.queue.wait(staging.done)
        lists = (len(sampling.count_ids), len(sampling.bias_ids)) if sampling else (0, 0)
        batches = of_groups(batch, self.count)
        if graph:
            shape = graph.shape
        else:
            pages = max(map(len, batch.tables)) // self.count
            shape = StepShape(len(batch.token_ids), len(batch.lengths), count, pages, *lists, self.count)
        with torch.inference_mode():
            inputs = self.inputs
            # its lists are very long: this step gets memory of its own
            if shape.bytes() > len(inputs):
                staging.inputs = self.queue.pinned(shape.bytes(), torch.uint8)
                inputs = inputs.new_empty(shape.bytes())
                staging.fields.clear()
            host = self._host_fields(staging, shape, keep=graph is not None)
            adapted = any(batch.adapters)
            adapters = None
            tables = self._adapter_tables(batch) if adapted else None
            fill_step(host, batches, [token_places(own) for own in batches], sampling,
                      tables or ())
            if adapted and tables is None:
                adapters = RowAdapters.of(batch, self.transformer.adapters)
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
            except BaseException:           # what was queued before the failure still uses this memory
                staging.done = self.queue.submit(lambda: None)
                raise
        return Ticket(staging, count, staging.done)

    def finish(self, ticket: Ticket) -> list[int]:
        assert ticket.staging.done is ticket.done, "more than two steps were under way"
        self.queue.wait(ticket.done)
        return ticket.staging.tokens[:ticket.rows].tolist()

    def _apart(self, batch: Batch) -> Any:
        """A batch of few tokens that all draw, such as drafts, with a sequence for each token; any other
        batch as it is.

        Each token becomes a decode row with the pages of its sequence. Layers that keep states forbid it,
        because each token needs the state after the one before."""
        count = len(batch.token_ids)
        all_draw = count == len(batch.logit_rows)
        if self.model.keeps_states or not all_draw or not len(batch.lengths) < count <= min(
                self.max_rows, MAX_PRODUCT_ROWS):
            return batch
        sizes = [end - start for start, end in itertools.pairwise(batch.starts)]
        lengths = []
        tables = []
        for size, length, pages in zip(sizes, batch.lengths, batch.tables):
            lengths += range(length - size + 1, length + 1)
            tables += [pages] * size
        adapters = []
        for size, slot in zip(sizes, batch.adapters):           # no adapters at all if no sequence has one
            adapters += [slot] * size
        return batch._replace(starts=[*range(count + 1)], lengths=lengths, tables=tables, adapters=adapters)

    def _graph(self, batch: Batch, sampling: SampleBatch | None) -> Graph | None:
        """The smallest graph that holds a step of decode rows; None for any other step."""
        rows = len(batch.lengths)
        pages = max(map(len, batch.tables)) // self.count
        if not len(batch.token_ids) == len(batch.logit_rows) == rows:
            return None
        if sampling and max(len(sampling.count_ids), len(sampling.bias_ids)) > LIST_CAPACITY:
            return None
        fitting = [bucket for bucket in self.graphs if bucket[0] >= rows and bucket[1] >= pages]
        if not fitting:
            return None
        if not any(batch.adapters):
            return self.graphs[min(fitting)]
        return None if self._adapter_tables(batch) is None else self._adapted_graph(min(fitting))

    def _run_ops(self, batches: Sequence[Batch], fields: SimpleNamespace, adapters: Any,
                 on_device: bool) -> None:
        plans = [self.backend.plan(batch, self.windows, table, fields.lengths, self.workspace)
                 for batch, table in zip(batches, fields.table)]
        with_parts(fields, plans)
        fields.adapters = adapters
        fields.sequences = Sequences.of(batches[0])
        self._compute(fields, on_device)
        if len(fields.logit_rows):
            self._draw(fields)

    def _host_fields(self, staging: Staging, shape: StepShape, keep: bool = True) -> SimpleNamespace:
        """numpy views of a step's inputs in pinned memory, to be written."""
        if shape in staging.fields:
            return staging.fields[shape]
        views = vars(shape.views(staging.inputs))
        fields = SimpleNamespace(**{name: view.numpy() for name, view in views.items()})
        if keep:
            staging.fields[shape] = fields
        return fields

    def _compute(self, fields: SimpleNamespace, on_device: bool = False) -> None:
        """Compute the model. Everything here is captured, so it reads only shapes and tensors on the device.

        fields      those of STEP_FIELDS, and `attention` and `sequences`, which make them Inputs
        on_device   the step has adapters, and adapter_tables says which
        """
        if on_device:
            fields.adapters = StepAdapters(self.backend.adapters.numbers, fields.adapter_tables,
                                           fields.logit_rows)
        drawn = torch.index_select(self.tokens, 0, (~fields.token_ids).clamp(min=0))
        fields.token_ids.copy_(torch.where(fields.token_ids < 0, drawn, fields.token_ids))
        self.backend.mixture.slots = fields.slots
        try:
            inputs: Any = fields        # on the device, with the attributes of Inputs
            self.transformer.compute(inputs,
                                     self.transformer.cut(len(fields.token_ids), len(fields.logit_rows)))
        finally:
            self.backend.mixture.slots = None

    def _draw(self, fields: SimpleNamespace) -> None:
        """Draw a token for each row of the logits. This is captured too."""
        R = len(fields.logit_rows)
        lists = [getattr(fields, name) for name in LISTS]
        self.backend.draw(self.transformer.buffers["logits"][:R], fields.records, lists, self.tokens[:R])


def doubling(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... below last, and last."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(sizes[-1] * factor)
    return [*sizes[:-1], last]


def record_words(batch: SampleBatch) -> numpy.ndarray:
    """The records of a SampleBatch as (R, 9) int64. Word 1 is the position; a row whose position is negative
    draws nothing."""
    return batch.records.view(numpy.int64).reshape(len(batch.records), -1)
