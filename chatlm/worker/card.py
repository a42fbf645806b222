"""What a worker says of its model and of itself once it has loaded: the card, and its lines for the log."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from chatlm.common.config import PAGE_SIZE
from chatlm.common.core import as_expected, kernels_line
from chatlm.common.errors import require_library
from chatlm.common.messages.protocol import ModelCard
from chatlm.common.messages.requests import ModelFacts
from chatlm.common.processes.launch import ranks_here
from chatlm.common.processes.nodes import advice
from chatlm.worker.engine.facts import CacheFacts, EngineFacts
from chatlm.worker.weights.loaded.digest import sampled_digest

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import SurveyConfig, WorkerConfig
    from chatlm.worker.engine.engine import Engine
    from chatlm.worker.engine.facts import StateFacts
    from chatlm.worker.weights.loaded.model import LoadedModel


def facts_of(engine: Engine) -> EngineFacts:
    """What an engine is made of, in figures."""
    transformer = engine.transformer
    ranks = engine.ranks
    states = engine.pool.states
    return EngineFacts(
        device=engine.device,
        stages=ranks.stages if ranks else 1,
        tp=ranks.tp if ranks else 1,
        context_length=engine.context_length,
        scored_length=engine.scored_length,
        max_batch=engine.limits.max_batch,
        prefill_chunk=engine.limits.prefill_chunk,
        of_texts=engine.of_texts,
        kernel_names=dict(engine.kernels.names),
        row_invariant=engine.kernels.row_invariant,
        weight_types=transformer.weight_types,
        matrix_type=transformer.matrix_types[0],
        weights_bytes=transformer.weights_bytes,
        cache=cache_facts(engine),
        states=states.facts(engine.state_bytes) if states else None)


def cache_facts(engine: Engine) -> CacheFacts:
    transformer = engine.transformer
    return CacheFacts(
        pages=engine.pool.num_pages,
        page_bytes=transformer.layout.page_bytes,
        has_holes=transformer.groups.holes,
        depth=transformer.groups.depth,
        pages_of_longest=engine.pool.pages_for(engine.context_length, engine.limits.prefill_chunk),
        types=tuple(dict.fromkeys(filter(None, transformer.layout.types))),
        token_bytes=engine.token_bytes,
        lasting_token_bytes=transformer.token_bytes(lasting=True))


def make_card(model: LoadedModel, engine: EngineFacts, config: WorkerConfig, bound: str) -> ModelCard:
    """The card of a worker that has loaded this model. bound: what `bind_to_node` has said."""
    hardware = hardware_line(engine, config.threads)
    cache = texts_line(engine) if engine.of_texts else cache_line(engine)
    if engine.states:
        cache += states_line(engine.states, engine.max_batch)
    core = kernels_line()
    lines = [f"Model {model.name}: {model.description}"]
    if config.settings.verbose or not as_expected(core):
        lines.append(core)
    lines += [running_line(engine, hardware, config), cache]
    if node_line := bound or node_advice(engine, config):
        lines.append(node_line)
    lines += model.notes
    facts = model_facts(model, config, engine.matrix_type, engine.weights_bytes)
    text = replace(model.text, payload=b"")  # the front has it
    return ModelCard(text, model.name, engine.context_length, tuple(lines), engine.kernel_names,
                     engine.row_invariant, core, dict(model.sampling), model.sampling_origin,
                     f"{hardware}; {cache}", config.source, facts, engine.scored_length)


def hardware_line(engine: EngineFacts, threads: int) -> str:
    device = engine.device
    line = f"{device} with {threads} thread(s)" if device.type == "cpu" else str(device)
    if engine.ranks > 1:
        line = f"{engine.ranks} ranks (--pp {engine.stages} --tp {engine.tp}), each on {line}"
    if device.type == "cuda":
        torch = require_library("torch", "--device-type cuda")
        total = torch.cuda.mem_get_info(device)[1]
        own = torch.cuda.memory_allocated(device) - engine.cache.nbytes
        line += (f" ({torch.cuda.get_device_name(device)}, {total / 1e9:,.1f} GB; "
                 f"weights and buffers {own / 1e9:,.2f} GB)")
    return line


def running_line(engine: EngineFacts, hardware: str, config: WorkerConfig) -> str:
    kernels = ", ".join(sorted(set(engine.kernel_names.values())))
    where = " in rank 0" if engine.ranks > 1 else ""
    fine = ", fine arithmetic" if config.settings.arithmetic == "fine" else ""
    return f"Running on {hardware}, weights in {engine.weight_types}{where}; kernels: {kernels}{fine}"


def cache_line(engine: EngineFacts) -> str:
    """How many tokens the KV cache holds."""
    cache = engine.cache
    holds = f"of {PAGE_SIZE} tokens = {cache.pages * PAGE_SIZE:,} tokens"
    if cache.has_holes:
        holds = (f"of {PAGE_SIZE} tokens in {cache.depth} layers, of which a sequence holds at most "
                 f"{cache.pages_of_longest:,}")
    return (f"KV cache: {cache.pages:,} pages {holds} ({cache.nbytes / 2**20:,.0f} MiB); "
            f"{token_line(engine)}; context {engine.context_length:,} tokens")


def token_line(engine: EngineFacts) -> str:
    """The bytes that this rank's layers cache per token, and how many outlast the windows."""
    cache = engine.cache
    line = f"{' and '.join(cache.types)}, {cache.token_bytes:,} bytes a token"
    if cache.lasting_token_bytes < cache.token_bytes:
        line += f", {cache.lasting_token_bytes:,} once out of all windows"
    return line


def texts_line(engine: EngineFacts) -> str:
    """What a step takes of a model that embeds whole texts."""
    return (f"texts of at most {engine.context_length:,} tokens, of which a step takes about "
            f"{engine.prefill_chunk:,} together; their keys and values take up to "
            f"{engine.cache.nbytes / 2**20:,.0f} MiB")


def states_line(states: StateFacts, max_batch: int) -> str:
    return (f"; {states.slots:,} states of {states.bytes_each / 1024:,.0f} KiB, of which "
            f"{states.most_snapshots:,} are for snapshots; at most {max_batch} sequences run at once")


def node_advice(engine: EngineFacts, config: WorkerConfig) -> str:
    """What would help on a machine of several NUMA nodes, for a worker that is not bound to one."""
    if engine.device.type != "cpu" or engine.of_texts:
        return ""
    return advice(ranks_here(config.settings) * config.place[1])


def model_facts(model: LoadedModel, config: WorkerConfig | SurveyConfig, matrix_type: str,
                weights_bytes: int) -> ModelFacts:
    """matrix_type: the commonest type of its matrices in memory."""
    architecture = model.architecture
    shapes = architecture.shapes()
    if architecture.tied:  # the head is the embedding
        shapes.pop("head", None)
    parameters = sum(map(math.prod, shapes.values()))
    source = config.source
    files = ""
    digest = ""
    if source:
        files = {"hf": "safetensors"}.get(source.kind, source.kind)
        digest = sampled_digest(source.path, config.settings.lora)
    return ModelFacts(model.family, files, parameters, matrix_type, weights_bytes, architecture.width,
                      len(architecture.layers), digest, config.settings.arithmetic,
                      "" if config.settings.quantize or config.settings.dtype else model.quantization)
