"""Engines in this process, for tests that look inside: the same parts as a worker's, on real checkpoints."""

import functools

import torch

import chat_server
from chat_server import Engine, SamplingParams, Settings, Transformer, Work
from near_tie import Traced, draw_gap


@functools.cache
def load(path):
    settings = Settings(model=str(path))
    source = chat_server.resolve_model(settings)
    return chat_server.open_model(source, settings, torch.float32, torch.device("cpu"))


def make_engine(path, *, num_pages=600, max_batch=32, prefill_chunk=256, context_length=None, reference=False):
    """A float32 engine over the model at `path` (the weights are read once per test session).

    It runs the ops that a server would choose: decode_core's where it is built, unless `reference`.
    """
    model = load(path)
    device, kernels = torch.device("cpu"), chat_server.load_kernels("cpu", None if reference else model.spec)
    transformer = Transformer(model.spec, dict(model.tensors), kernels, num_pages=num_pages, device=device,
                              dtype=torch.float32, max_tokens=prefill_chunk + max_batch)
    return Engine(transformer, chat_server.open_tokenizer(model.text), kernels, num_pages=num_pages, max_batch=max_batch,
                  context_length=context_length or model.context_length, prefill_chunk=prefill_chunk)


class Run:
    """What an engine made of some works: tokens, text and end of each, and how close each draw was."""

    def __init__(self):
        self.tokens, self.text, self.end, self.gaps = {}, {}, {}, {}

    def traced(self, name):
        return Traced(self.tokens[name], self.gaps[name])


@torch.inference_mode()
def run(engine, works, *, check=True, on_step=lambda plan: None):
    """Add `works`, step until all are done, and return the Run; the cache is walked after every step."""
    result = Run()
    for work in works:
        engine.add(work)
        result.tokens[work.id], result.text[work.id], result.gaps[work.id] = [], "", []
    names = []

    def sample(logits, rows):
        for name, line, row in zip(names, logits.float().cpu().numpy(), rows):
            result.gaps[name].append(draw_gap(line, row))
        return chat_server.sample_on_host(logits, rows)

    kernels, schedule = engine.kernels, engine.scheduler.schedule

    def watched_schedule():
        plan = schedule()
        names[:] = [chunk.sequence.work.id for chunk in plan if chunk.samples]
        on_step(plan)
        return plan

    engine.kernels = chat_server.replace(kernels, sample=sample)
    engine.scheduler.schedule = watched_schedule
    try:
        while engine.busy:
            for update in engine.step():
                result.tokens[update.id] += update.tokens
                result.text[update.id] += update.text
                if update.reason:
                    result.end[update.id] = update
            if check:
                engine.check_integrity()
    finally:
        engine.kernels, engine.scheduler.schedule = kernels, schedule
    assert engine.pool.available == engine.pool.num_pages
    return result


def chat_work(engine, name, text, max_tokens=48, **sampling):
    ids = tuple(engine.tokenizer.render([chat_server.Message("user", text)]))
    return Work(name, ids, SamplingParams(**({"temperature": 0.0} | sampling)), max_tokens)
