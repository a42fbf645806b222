"""Descriptions of the server for its clients: models, routes, fields."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import time
from collections.abc import Callable, Iterable, Sequence as Seq
from typing import TYPE_CHECKING

from chatlm import __version__
from chatlm.common.errors import Overloaded
from chatlm.common.hub.better import better_model, only_demonstrates
from chatlm.common.log import utc
from chatlm.common.text.tokenizer import tools_of
from chatlm.front.api.errors import ANTHROPIC, OLLAMA, OPENAI
from chatlm.front.api.field_types import TEXT
from chatlm.front.api.fields import A_TEXT, Field
from chatlm.front.api.model_schema import A_MODEL, MODELS
from chatlm.front.api.tables import OLLAMA_NAMES
from chatlm.front.intake.intake import loaded_tokenizer
from chatlm.front.pool.names import default_among
from chatlm.front.pool.pool import free_memory, default_sampling
from chatlm.front.pool.preferred import kind_of
from chatlm.front.server.anthropic_models import (
    A_PAGE, PAGE_QUERY, anthropic_model, anthropic_page, asks_as_anthropic)
from chatlm.front.server.responses import REQUEST_LOG, json_response, shows
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.common.config import Settings
    from chatlm.common.messages.requests import Embedder
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.pool.models import ModelOrAdapter, ServedModel
    from chatlm.front.server.bodies import Bodies


def bare_id(shown_id: str) -> str:
    """The request id, from the id in its response's header or chunks."""
    return re.sub("^((chat)?cmpl-|resp_|msg_)", "", shown_id)


def alive_body() -> dict:
    """The response of /livez. A page of another origin cannot read it either, but can see that a server runs,
    and then tell its user that --cors-origin is missing."""
    REQUEST_LOG.get().headers["Cross-Origin-Resource-Policy"] = "cross-origin"
    return {"alive": True}


MODELS_OF_BOTH = {"anyOf": [MODELS, A_PAGE]}


def listed_body(seen: Seq[ModelOrAdapter]) -> dict:
    """The response of /v1/models."""
    default = default_among(seen)
    return {"object": "list", "data": [model_body(served, served == default) for served in seen]}


def abilities(tokenizer: Tokenizer) -> dict[str, bool]:
    """What the model can do. A model that embeds or ranks texts can do nothing else."""
    embedder = tokenizer.spec.embedder
    chats = tokenizer.has_chat_template
    answers = embedder is None
    ranks = embedder is not None and embedder.pooling == "rank"
    able = {"chat": chats, "completion": True, "completions": True,
            "infill": not tokenizer.infill_tokens.missing, "logprobs": True,
            "tools": tokenizer.tool_format is not None,
            "reasoning": tokenizer.thoughts is not None,
            "reasoning_history": "reasoning_content" in (tokenizer.spec.chat_template or ""),
            "reasoning_budget": tokenizer.thoughts is not None,
            "continue_final_message": chats, "token_ids": True, "compare": True,
            "vision": tokenizer.spec.vision is not None,
            "json_schema": importlib.util.find_spec("llguidance") is not None}
    return {name: can and answers for name, can in able.items()} | {"embedding": not ranks, "rerank": ranks}


def embedder_body(embedder: Embedder, context_length: int) -> dict:
    """How a model embeds or ranks texts, as /v1/models describes it."""
    body = {"max_tokens": min(embedder.longest, context_length)}
    if embedder.pooling == "rank":
        return body
    return body | {
        "pooling": embedder.pooling,
        "dimensions": embedder.dimensions or embedder.size,
        "least_dimensions": embedder.least or embedder.size,
        "similarity": embedder.similarity,
        "prompts": dict(embedder.prompts),
        "default_prompt": embedder.default_prompt or None,
    }


def model_body(served: ModelOrAdapter, is_default: bool = True) -> dict:
    """A served model as /v1/models describes it. Raises Overloaded while the only model loads."""
    if served.failed:
        return {"id": served.name, "object": "model", "created": int(time.time()), "owned_by": "chat_server",
                "state": served.state, "reason": served.public_reason, "aliases": served.aliases}
    model = served.model
    pool = served.pool
    adapter = served.adapter
    tokenizer = served.pool.tokenizer
    if tokenizer is None or not pool.memory.is_listed:
        raise Overloaded("the model is not ready")
    facts = pool.supervisor.card.facts
    embedder = tokenizer.spec.embedder
    sampling = {name: value for name, (value, _) in default_sampling(pool, model.settings).items()}
    body = {
        "id": served.name,
        "object": "model",
        "created": pool.created,
        "state": served.state,
        "bytes": served.bytes,
        "weights_bytes": served.bytes if adapter else facts.weights_bytes,
        "aliases": served.aliases,
        "type": kind_of(tokenizer),
        "family": facts.family,
        "format": facts.format,
        "default": is_default,
        "pinned": model.entry.pin,
        "weights_digest": f"{facts.digest}+{adapter.digest}" if adapter else facts.digest,
        "arithmetic": facts.arithmetic,
        **pool.checkpoint,
        **model.run_fields,
        "owned_by": "chat_server",
        "root": pool.model_name,
        "parent": pool.model_name if adapter else None,
        "tools": tools_of(tokenizer),
        "context_length": pool.context_length,
        "max_model_len": pool.context_length,
        "scored_length": pool.supervisor.card.longest,
        "capabilities": abilities(tokenizer),
        "defaults": {"max_tokens": model.settings.max_tokens, **sampling},
        "system_prompt": tokenizer.spec.system,
        "meta": {"n_vocab": tokenizer.vocab_size, "n_ctx": pool.context_length},
    }
    if served.state == "loading":
        body["loading"] = pool.supervisor.load_fraction()
    if only_demonstrates(served.name):
        better = better_model(free_memory(pool))
        body["better"] = better.name
        body["better_tokens_per_second"] = better.tokens_per_second
    if embedder:
        body["embedder"] = embedder_body(embedder, pool.context_length)
    return body


A_NAME = Field("model", TEXT, "one of the served models; absent: the default one")
TOKENIZER_CLASSES = {"hf": "PreTrainedTokenizerFast", "nanochat": "RustBPETokenizer",
                     "characters": "CharacterTokenizer"}


def tokenizer_body(tokenizer: Tokenizer) -> dict:
    """The response of /tokenizer_info, in the form of a tokenizer_config.json. Programs that evaluate models
    ask which tokens begin and end a text."""
    spec = tokenizer.spec

    def name_of(token: int | None) -> str | None:
        return None if token is None else tokenizer.show([token])
    return {"tokenizer_class": TOKENIZER_CLASSES[spec.kind], "bos_token": name_of(spec.bos_token),
            "eos_token": name_of(spec.eos_token), "pad_token": None, "add_bos_token": spec.add_bos,
            "chat_template": spec.chat_template, "added_tokens_decoder": {
                str(token): {"content": name, "special": True}
                for token, name in sorted(tokenizer.special_names.items())}}


def ollama_model(served: ModelOrAdapter) -> dict:
    """A model as Ollama's routes describe one. Its clients expect a tag in the name."""
    pool = served.pool
    card = model_body(served)
    name = served.name
    facts = pool.supervisor.card.facts
    if ":" not in name:
        name += ":latest"
    count = facts.parameters
    size = f"{count / 1e9:.1f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"
    return {"name": name, "model": name, "modified_at": utc(card["created"]), "size": facts.weights_bytes,
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": {"parent_model": pool.model_name if served.adapter else "", "format": facts.format,
                        "family": facts.family,
                        "families": [facts.family], "parameter_size": size,
                        "quantization_level": facts.level}}


# What /api/version says: the first version of Ollama with everything that this server has of it. Clients
# refuse older servers: VS Code those before 0.6.4, Codex those before 0.13.4.
OLLAMA_VERSION = "0.14.0"
CENTURY_S = 3e9


def ollama_version() -> dict:
    """The response of /api/version."""
    return {"version": OLLAMA_VERSION, "chat_server": __version__}


def ollama_models(seen: Iterable[ModelOrAdapter]) -> dict:
    """The response of /api/tags. Ollama has no state for a failed model."""
    return {"models": [ollama_model(served) | {"state": served.state}
                       for served in seen if not served.failed]}


def ollama_running(seen: Iterable[ModelOrAdapter]) -> dict:
    """The response of /api/ps."""
    models = [ollama_loaded(served) for served in seen if not served.failed]
    return {"models": [model for model in models if model]}


def ollama_loaded(served: ModelOrAdapter) -> dict | None:
    """A model as Ollama's /api/ps describes it; None if it is not in memory."""
    pool = served.pool
    settings = served.model.settings
    workers = [worker for worker in pool.stats()["workers"] if worker["state"] == "ready"]
    if not workers:
        return None
    on_gpus = sum(worker["memory_used"] for worker in workers if not worker["device"].startswith("cpu"))
    return ollama_model(served) | {
        "size": sum(worker["memory_used"] for worker in workers), "size_vram": on_gpus,
        "expires_at": utc(time.time() + (settings.idle_unload or CENTURY_S)),  # if no request comes
        "context_length": pool.context_length}


def stats_body(catalogue: Catalogue, seen: Seq[ModelOrAdapter]) -> dict:
    """The response of /stats, limited to the models that the client's key may see."""
    default = default_among(seen)
    return {**catalogue.stats(seen), "exports": catalogue.settings.export_folder is not None,
            "models": [model_stats(served, served == default) for served in seen]}


def model_stats(served: ModelOrAdapter, is_default: bool) -> dict:
    body = {"id": served.name, "state": served.state, "bytes": served.bytes, **served.model.run_fields,
            "default": is_default, "pinned": served.model.entry.pin}
    if served.failed:
        return body | {"reason": served.public_reason}
    stats = served.pool.stats()
    return body | {"context_length": served.pool.context_length,
                   "running": sum(worker["running"] for worker in stats["workers"]),
                   "queue_depth": stats["queue_depth"]}


MANAGE = "load and unload models"


class ModelRoutes:
    """The handlers of routes about models."""

    def __init__(self, catalogue: Catalogue, bodies: Bodies):
        self.catalogue = catalogue
        self.bodies = bodies

    def visible(self, bound: Seq[str]) -> list[ModelOrAdapter]:
        """The models that a client may see whose key is limited to `bound`."""
        return self.catalogue.registry.served_models(bound)

    async def handle_list(self, http: web.Request) -> web.Response:
        body = listed_body(self.visible(REQUEST_LOG.get().bound))
        if asks_as_anthropic(http):
            body = anthropic_page(http, body["data"])
        return json_response(body)

    async def handle_model(self, http: web.Request) -> web.Response:
        bound = REQUEST_LOG.get().bound
        served = self.catalogue.find(http.match_info["name"], bound)
        default = default_among(self.visible(bound))
        body = model_body(served, served == default)
        return json_response(anthropic_model(body) if asks_as_anthropic(http) else body)

    def named_model(self, http: web.Request) -> ModelOrAdapter:
        """The model that the query names; the default one if it names none."""
        return self.catalogue.find(A_NAME.read(http.query.get("model", "")), REQUEST_LOG.get().bound)

    async def handle_tokenizer(self, http: web.Request) -> web.Response:
        """GET /tokenizer_info, as vLLM has it."""
        return json_response(tokenizer_body(loaded_tokenizer(self.named_model(http).pool)))

    async def handle_load(self, http: web.Request) -> web.Response:
        """POST /models/load, as llama-server's router does: loading begins, and /v1/models shows progress."""
        return await self._managed(http, lambda model: model.load())

    async def handle_unload(self, http: web.Request) -> web.Response:
        """POST /models/unload: the model is unloaded once its running answers have ended."""
        return await self._managed(http, lambda model: model.unload())

    async def _managed(self, http: web.Request, manage: Callable[[ServedModel], None]) -> web.Response:
        with self.bodies.holding() as holding:
            served, _ = await self.bodies.text(http, holding)
        manage(served.model)
        return json_response({"success": True, "model": served.name, "state": served.state})

    async def handle_ollama_show(self, http: web.Request) -> web.Response:
        with self.bodies.holding() as holding:
            served, _ = await self.bodies.text(http, holding)
        pool = served.pool
        tokenizer = loaded_tokenizer(pool)
        model = ollama_model(served)
        able = model_body(served)["capabilities"]
        facts = pool.supervisor.card.facts
        capabilities = {"completion": able["completion"], "tools": able["tools"], "insert": able["infill"],
                        "thinking": able["reasoning"], "vision": able["vision"],
                        "embedding": able["embedding"] and not able["completion"]}
        sampling = default_sampling(pool, served.model.settings)
        return json_response({name: model[name] for name in ("modified_at", "details")} | {
            "template": tokenizer.spec.chat_template or "", "modelfile": "", "license": "",
            "parameters": "\n".join(f"{OLLAMA_NAMES.get(name, name):30} {value:g}"
                                    for name, (value, _) in sampling.items()),
            "model_info": {"general.architecture": facts.family,
                           "general.basename": served.name,  # what VS Code shows its users
                           "general.parameter_count": facts.parameters,
                           f"{facts.family}.context_length": pool.context_length,
                           f"{facts.family}.embedding_length": facts.width,
                           f"{facts.family}.block_count": facts.layers},
            "capabilities": [name for name, can in capabilities.items() if can]})


MODEL_ROUTES: tuple[Route[ModelRoutes], ...] = (
    Route("GET", "/v1/models", OPENAI, ModelRoutes.handle_list,
          "the served models, what each can do and its state; as in Anthropic's API for its clients",
          query=PAGE_QUERY, returns=MODELS_OF_BOTH, also=(ANTHROPIC,)),
    Route("GET", "/models", OPENAI, shows(lambda models, bound: listed_body(models.visible(bound))),
          "the same, as in OpenAI's API",
          returns=MODELS),
    Route("GET", "/v1/models/{name:.+}", OPENAI, ModelRoutes.handle_model,
          "a served model, by one of its names", returns=A_MODEL, also=(ANTHROPIC,)),
    Route("POST", "/models/load", OPENAI, ModelRoutes.handle_load, "load a model",
          operator_act=MANAGE),
    Route("POST", "/models/unload", OPENAI, ModelRoutes.handle_unload,
          "unload a model once its answers have ended; the next request loads it again",
          operator_act=MANAGE),
    Route("GET", "/tokenizer_info", OPENAI, ModelRoutes.handle_tokenizer, "its tokens", query=(A_NAME,)),
    Route("GET", "/api/tags", OLLAMA, shows(lambda models, bound: ollama_models(models.visible(bound))),
          "the served models in Ollama's format"),
    Route("GET", "/api/ps", OLLAMA, shows(lambda models, bound: ollama_running(models.visible(bound))),
          "the models in memory, and how much they take"),
    Route("POST", "/api/show", OLLAMA, ModelRoutes.handle_ollama_show, "more of it"),
)


def openapi_operation(route: Route) -> dict:
    error = {"description": "what is wrong", "content": {"application/json": {"schema": {"type": "object"}}}}
    parameters = [{"name": name, "in": "path", "required": True, "schema": A_TEXT}
                  for name in re.findall(r"{(\w+)", route.path)]
    parameters += [{"name": field.name, "in": "query", "description": field.doc, "schema": field.schema}
                   for field in route.query]
    operation = {"summary": route.doc, "parameters": parameters,
                 "responses": {"200": {"description": route.doc}, "default": error}}
    if route.fields:
        required = [field.name for field in route.fields if field.required]
        schema = {"type": "object", "required": required,
                  "properties": {field.name: field.described for field in route.fields}}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        operation["responses"]["200"]["headers"] = {
            "X-Ignored-Fields": {"schema": A_TEXT, "description": "fields of the body without effect"}}
    if route.returns:
        operation["responses"]["200"]["content"] = {"application/json": {"schema": route.returns}}
    if route.open:
        operation["security"] = []
    return operation


def openapi_document(routes: Iterable[Route], settings: Settings) -> dict:
    """Every route and every body field, from the same tables that the server uses."""
    paths: dict[str, dict] = {}
    for route in routes:
        paths.setdefault(route.pattern, {})[route.method.lower()] = openapi_operation(route)
    schemes = {"bearer": {"type": "http", "scheme": "bearer"},
               "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"}}
    return {"openapi": "3.1.0", "info": {"title": "chat_server", "version": __version__},
            "servers": [{"url": settings.prefix or "/"}],
            "security": [{name: []} for name in schemes] if settings.keys else [],
            "paths": paths, "components": {"securitySchemes": schemes}}
