"""Engines in this process, for tests that look inside: built like a worker's, on real checkpoints."""

import functools
import random

import numpy
import torch

from chatlm.common import core
from chatlm.common.config import Settings
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import Ended, Failed, Message, Piece, SamplingParams
from chatlm.common.text import load as text_load
from chatlm.worker.engine.drafts import Draft, Drafting
from chatlm.worker.engine.engine import Engine
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.limits import FREE_ROWS
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.kernels.kernels import EagerRunner
from chatlm.worker.model.batch import Batch
from chatlm.worker.model.pages import group_layers
from chatlm.worker.model.tensors import MappedRows
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.ops.sampling import sample_reference
from chatlm.worker.ops.tensors import tensor_of
from chatlm.worker.weights.adapters.serving import adapter_reader
from chatlm.worker.weights.load import open_model
from engine_parts import parts_of
from near_tie import Traced, draw_gap
from works import assignment


@functools.cache
def load(path, as_stored=False, opened_for=None):
    settings = Settings(model=str(path), dtype=None if as_stored else "float32", context_length=opened_for)
    return open_model(resolve_model(settings), settings)


def tensors_of(model):
    """Every tensor of a LoadedModel, read from its file."""
    read = {name: given.values(given.table) if isinstance(given, MappedRows) else given.read() for name, given in model.tensors.items()}
    return {name: torch.cat([*map(tensor_of, given)]) if isinstance(given, tuple) else
            tensor_of(given) if isinstance(given, numpy.ndarray) else given for name, given in read.items()}


def make_engine(path, *, num_pages=600, max_batch=32, prefill_chunk=256, context_length=None, reference=False, as_stored=False,
                apart=False, num_snapshots=20, kv=None, opened_for=None, fine=False, **parts):
    """A float32 engine over the model at `path` (the weights are read once per test session).

    It runs the ops that a server would choose: decode_core's if it is built, unless `reference`. With
    `as_stored` they run on the quantized weights; `apart`, layers with a window give pages back, as in a server. A context of
    `opened_for` tokens may change what the model computes. parts: as `parts_of` takes them.
    """
    model = load(path, as_stored and core.decode_core() is not None and not reference, opened_for)
    rows = max(max_batch, FREE_ROWS)
    limits = {"max_tokens": prefill_chunk + rows, "max_rows": rows}
    kernels = load_kernels("cpu", None if reference else model.architecture, **limits, fine=fine)
    kv = kv or kernels.kv_type("auto", model.dtype)
    groups = group_layers(model.architecture.by_layer, context_length or model.context_length, apart, kv)
    transformer = Transformer(model.architecture, dict(model.tensors), kernels, num_pages=num_pages, dtype=model.dtype, groups=groups, kv=kv,
                              num_slots=max_batch + FREE_ROWS + num_snapshots, read_adapter=adapter_reader(model), **limits)
    tokenizer = text_load.open_tokenizer(model.text)
    return Engine(transformer, tokenizer, kernels, num_pages=num_pages, max_batch=max_batch,
                  context_length=context_length or model.context_length, prefill_chunk=prefill_chunk,
                  parts=parts_of(transformer, tokenizer, model, **parts))


class Run:
    """The results of some works: tokens, text and last update of each, and how close each draw was."""

    def __init__(self):
        self.tokens, self.text, self.end, self.gaps = {}, {}, {}, {}

    def traced(self, name):
        return Traced(self.tokens[name], self.gaps[name])


class TracedRunner(EagerRunner):
    """Draws on the host and shows the logits to `on_draw`; with `ahead` the engine starts steps as early as
    it can."""

    def __init__(self, transformer, ahead=False, on_draw=lambda row, logits, params: None):
        super().__init__(transformer)
        self.ahead, self.on_draw = ahead, on_draw

    def start(self, batch, rows):
        batch.token_ids[:] = [self.drawn[~token] if token < 0 else token for token in batch.token_ids]
        logits = self.transformer.arrays.numpy(self.transformer.forward(batch))
        for i, (line, row) in enumerate(zip(logits, rows)):
            self.on_draw(i, line, row)
        self.drawn = self.draw(logits, rows)
        return self.drawn

    def draw(self, logits, rows):
        return sample_reference(logits, rows).tolist() if rows else []


@torch.inference_mode()
def run(engine, works, *, check=True, on_step=lambda plan: None, ahead=False):
    """Add `works`, step until all are done, and return the Run; the KV cache is checked after every step."""
    result = Run()
    for work in works:
        engine.add(work)
        result.tokens[work.id], result.text[work.id], result.gaps[work.id] = [], "", []
    names = []

    def on_draw(i, logits, row):
        drawn = row.position - lengths[names[i]]        # with forced tokens the answer has at least this many
        result.gaps[names[i]][drawn:] = [draw_gap(logits, row)]

    lengths = {work.id: len(work.prompt_ids) + len(work.resumed_ids) for work in works}
    runner, schedule = engine.runner, engine.scheduler.schedule

    def watched_schedule():
        plan = schedule()
        names[:] = [chunk.sequence.work.id for chunk in plan for _ in range(chunk.draws)]
        on_step(plan)
        return plan

    engine.runner = TracedRunner(engine.transformer, ahead, on_draw)
    engine.scheduler.schedule = watched_schedule
    try:
        while engine.busy:
            for name, event in engine.step():
                if isinstance(event, Piece):
                    result.tokens[name] += event.tokens
                    result.text[name] += event.text
                elif isinstance(event, (Ended, Failed)):
                    result.end[name] = event
            if check:
                check_integrity(engine)
    finally:
        engine.runner, engine.scheduler.schedule = runner, schedule
    assert engine.pool.available == engine.pool.num_pages
    return result


def chat_work(engine, name, text, max_tokens=48, **sampling):
    ids = tuple(engine.tokenizer.render([Message("user", text)]))
    return assignment(name, ids, SamplingParams(**({"temperature": 0.0} | sampling)), max_tokens)


def forward_logits(computes, batch):
    """A copy of what a Transformer or its steps make of a batch, as a tensor on the CPU."""
    made = computes.forward(batch)
    return torch.tensor(made) if isinstance(made, numpy.ndarray) else made.cpu().clone()


def make_batch(*chunks):
    """chunks: (all tokens, already computed, new, pages) of each sequence; logits for the last token of each.

    Where a model keeps states, a sequence has the slot with the number of its first page."""
    ids, previous, starts, lengths = [], [], [0], []
    for tokens, computed, new, pages in chunks:
        span = range(computed, computed + new)
        ids += [tokens[p] for p in span]
        previous += [tokens[p - 1] if p else -1 for p in span]
        starts.append(starts[-1] + new)
        lengths.append(computed + new)
    rows, slots = [start - 1 for start in starts[1:]], [chunk[3][0] for chunk in chunks]
    return Batch(ids, previous, starts, lengths, [chunk[3] for chunk in chunks], rows, False, slots, rows, slots)


def propose_partly_right(monkeypatch, works, expected, seed=4):
    """Have drafts be right up to some token, as these works' tokens are expected: answers of random models seldom
    repeat themselves, so nothing else drafts much."""
    dice = random.Random(seed)

    def propose(drafting, sequences, *load):
        for sequence in sequences:
            known = tuple(sequence.tokens)
            [rest] = [expected[work.id][len(known) - len(work.prompt_ids):] for work in works
                      if known[:len(work.prompt_ids)] == work.prompt_ids]
            right = dice.randrange(6)
            tokens = (*rest[:right], *((token + 1) % 256 for token in rest[right:right + 1]))
            sequence.draft = Draft("lookup", tokens, (1.0,) * len(tokens), len(known))

    monkeypatch.setattr(Drafting, "propose", propose)


def draft_eagerly(monkeypatch):
    """Have drafts be verified as long as they are, whatever they cost here: what pays depends on how busy the machine is."""
    monkeypatch.setattr(Drafting, "_counts", lambda drafting, drafts, times, rows, most: [len(draft.tokens) for draft in drafts])


class Pieces(list):
    """The pieces of an answer, its other events, and how it ended: Ended or Failed."""

    def __init__(self):
        super().__init__()
        self.end, self.others = None, []

    def add(self, event):
        if isinstance(event, Piece):
            self.append(event)
        elif isinstance(event, (Ended, Failed)):
            self.end = event
        else:
            self.others.append(event)

    @property
    def tokens(self):
        return [token for piece in self for token in piece.tokens]


def step_pieces(engine):
    """Run a step -> [(id, Piece)]."""
    return [(name, event) for name, event in engine.step() if isinstance(event, Piece)]


@torch.inference_mode()
def pieces(engine, works, ahead=False, checked=True):
    """Run `works` -> {id: Pieces}. checked: the integrity after each step."""
    if ahead:
        engine.runner = TracedRunner(engine.transformer, ahead=True)
    found = {work.id: Pieces() for work in works}
    for work in works:
        engine.add(work)
    while engine.busy:
        for name, event in engine.step():
            found[name].add(event)
        if checked:
            check_integrity(engine)
    return found


def tokens_of(engine, works):
    """Run `works` -> {id: its tokens}."""
    return {name: found.tokens for name, found in pieces(engine, works).items()}
