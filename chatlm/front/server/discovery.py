"""What clients of LM Studio and of llama-server ask a server first: its models, and its limits."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

from chatlm import __version__
from chatlm.front.api.errors import OPENAI
from chatlm.front.intake.intake import loaded_tokenizer
from chatlm.front.pool.pool import default_sampling
from chatlm.front.server.describe import A_NAME, ModelRoutes, model_body, tokenizer_body
from chatlm.front.server.responses import REQUEST_LOG, json_response, shows
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.front.pool.models import ModelOrAdapter


def lm_studio_model(served: ModelOrAdapter) -> dict:
    """A model as LM Studio's /api/v0/models describes one."""
    body = {"id": served.name, "object": "model", "state": "not-loaded"}
    if served.failed:
        return body
    model = model_body(served)
    facts = served.pool.supervisor.card.facts
    kind = "vlm" if model["capabilities"]["vision"] else "llm"
    if model["capabilities"]["embedding"] and not model["capabilities"]["completion"]:
        kind = "embeddings"
    body |= {"type": kind, "publisher": publisher_of(served), "arch": facts.family,
             "compatibility_type": facts.format, "quantization": facts.level,
             "max_context_length": served.pool.context_length}
    if served.state == "ready":
        body |= {"state": "loaded", "loaded_context_length": served.pool.context_length}
    return body


def publisher_of(served: ModelOrAdapter) -> str:
    """The organization in a hub's name of the model; "" for other models."""
    return served.name.rpartition("/")[0]


def lm_studio_models(seen: Seq[ModelOrAdapter]) -> dict:
    """The response of LM Studio's /api/v0/models."""
    return {"object": "list", "data": [lm_studio_model(served) for served in seen]}


def props_body(served: ModelOrAdapter) -> dict:
    """The response of llama-server's GET /props. It has no path of this machine."""
    pool = served.pool
    settings = served.model.settings
    tokens = tokenizer_body(loaded_tokenizer(pool))
    sampling = {name: value for name, (value, _) in default_sampling(pool, settings).items()}
    sees = model_body(served)["capabilities"]["vision"]
    return {
        "default_generation_settings": {"n_ctx": pool.context_length, "params": {
            **sampling, "n_predict": -1 if settings.max_tokens is None else settings.max_tokens}},
        "total_slots": slots_of(served),
        "model_alias": served.name,
        "model_path": served.name,
        "modalities": {"vision": sees, "audio": False},
        "chat_template": tokens["chat_template"] or "",
        "bos_token": tokens["bos_token"] or "",
        "eos_token": tokens["eos_token"] or "",
        "build_info": f"chat_server {__version__}",
    }


def slots_of(served: ModelOrAdapter) -> int:
    """How many answers of the model are computed at once."""
    return served.model.settings.max_batch * len(served.pool.workers)


def slots_body(served: ModelOrAdapter, client: str) -> list[dict]:
    """The response of llama-server's GET /slots. Only the client's own answers are shown: which rows others
    use is nobody's business."""
    jobs = served.pool.dispatcher.jobs.values()
    running = sum(job.request.client == client and job.dispatched_s is not None for job in jobs)
    drafts = served.model.settings.drafts != "none"
    return [{"id": number, "id_task": -1, "n_ctx": served.pool.context_length, "speculative": drafts,
             "is_processing": number < running} for number in range(slots_of(served))]


async def handle_lm_studio_model(models: ModelRoutes, http: web.Request) -> web.Response:
    served = models.catalogue.find(http.match_info["name"], REQUEST_LOG.get().bound)
    return json_response(lm_studio_model(served))


async def handle_props(models: ModelRoutes, http: web.Request) -> web.Response:
    return json_response(props_body(models.named_model(http)))


async def handle_slots(models: ModelRoutes, http: web.Request) -> web.Response:
    return json_response(slots_body(models.named_model(http), REQUEST_LOG.get().client))


DISCOVERY_ROUTES: tuple[Route[ModelRoutes], ...] = (
    Route("GET", "/api/v0/models", OPENAI,
          shows(lambda models, bound: lm_studio_models(models.visible(bound))),
          "the served models as LM Studio lists them"),
    Route("GET", "/api/v0/models/{name:.+}", OPENAI, handle_lm_studio_model, "one of them"),
    Route("GET", "/props", OPENAI, handle_props, "a model's limits and defaults as llama-server has them",
          query=(A_NAME,)),
    Route("GET", "/slots", OPENAI, handle_slots,
          "the rows in which answers are computed as llama-server has them; busy are only the client's own",
          query=(A_NAME,)),
)
