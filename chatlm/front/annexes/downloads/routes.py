"""The routes with which an operator gets models from the Hugging Face hub and removes them."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
from typing import TYPE_CHECKING

from aiohttp import web

from chatlm.common.errors import ConfigError, RequestError, shown, without_folders
from chatlm.common.hub.better import MEMORY_RATE
from chatlm.common.hub.offers import (
    best_offers, cached_models, hub_cache, joined_name, named_model, short_offers)
from chatlm.common.jsontext import dump
from chatlm.common.memory import available_memory
from chatlm.front.api.dialects.ollama import OllamaEncoder
from chatlm.front.api.encode import Encoder, frame
from chatlm.front.pool.downloads import Download, Downloads
from chatlm.front.server.responses import REQUEST_LOG, json_response
from chatlm.front.server.streams import EventStream

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from chatlm.front.front import Front

    from chatlm.common.messages.protocol import Offer
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.server.bodies import Bodies

BESIDE_BYTES = 200 << 20  # what a model's process takes in addition to its weights, see Opener.PROCESS_BYTES


class DownloadRoutes:
    """The handlers. Only an operator may call any of them: they say what is on this machine's disk."""

    def __init__(self, catalogue: Catalogue, bodies: Bodies):
        self.catalogue = catalogue
        self.bodies = bodies
        self.downloads = Downloads(catalogue.settings, catalogue)

    @classmethod
    def of(cls, front: Front) -> DownloadRoutes:
        return cls(front.catalogue, front.bodies)

    async def close(self):
        await self.downloads.close()

    async def _read(self, http: web.Request) -> dict:
        """The checked fields of a body."""
        self.downloads.check_allowed()
        values = await self.bodies.small(http)
        values.setdefault("model", values.get("name", ""))
        return values

    async def handle_list(self, http: web.Request) -> web.Response:
        """GET /models/hub: what can be had. With ?search=TEXT also what the hub finds."""
        self.downloads.check_allowed()
        text = http.query.get("search", "").strip()
        if len(text) > 200 or not text.isprintable():
            raise RequestError("search must be a text of at most 200 characters", param="search")
        room, memory = await asyncio.to_thread(self._room)
        await self._measure()
        cached = await asyncio.to_thread(cached_models)
        found = await refusals(self.downloads.ask("search", text)) if text else ()
        return json_response({
            **room, "best": [self._offer(offer, memory) for offer in best_offers(memory)],
            "short_names": [self._offer(offer, memory) for offer in short_offers()],
            "cached": [self._offer(offer, memory) for offer in cached],
            "downloads": [public(each.body) for each in self.downloads.known.values()],
            "found": [self._offer(offer, memory) for offer in found]})

    async def handle_look(self, http: web.Request) -> web.Response:
        """GET /models/hub/NAME: the forms of a model that the hub has. A download of NAME would fetch the
        first of `models`; its `problem` says why this program cannot run it."""
        self.downloads.check_allowed()
        name = http.match_info["name"]
        room, memory = await asyncio.to_thread(self._room)
        await self._measure()
        offers = await refusals(self.downloads.ask("look", name))
        return json_response({"model": joined_name(*named_model(name)), **room,
                              "models": [self._offer(offer, memory) for offer in offers]})

    async def _measure(self):
        """See to it that offers have speeds, where models run on a CPU."""
        if all(worker["device"].startswith("cpu") for worker in self._workers()):
            await asyncio.to_thread(MEMORY_RATE.measure)

    def _room(self) -> tuple[dict, int]:
        """What /models/hub says about free bytes, and the most that a model may take in memory."""
        cache = hub_cache()
        memory = self._memory()
        there = next(path for path in (cache, *cache.parents) if path.exists())
        return {"memory": memory, "disk": shutil.disk_usage(there).free,
                "models_disk": self.downloads.settings.models_disk}, memory

    def _memory(self) -> int:
        """The bytes that a model may take: --models-memory, else a GPU's memory, else what is free plus what
        the served models take."""
        if self.catalogue.source.budget:
            return self.catalogue.source.budget
        on_gpus = [worker["memory_total"] for worker in self._workers()
                   if not worker["device"].startswith("cpu")]
        used = sum(model.bytes for model in self.catalogue.registry.models)
        return max(on_gpus, default=0) or available_memory() + used

    def _workers(self) -> list[dict]:
        workers = []
        for pool in self.catalogue.pools:
            workers += pool.stats()["workers"]
        return workers

    def _offer(self, offer: Offer, memory: int) -> dict:
        repository, file = named_model(offer.name)
        served = self.catalogue.served_of_hub(repository, file)
        return {"model": offer.name, "repository": repository, "bytes": offer.bytes, "here": offer.here,
                "complete": offer.complete, "kind": offer.kind, "problem": without_folders(offer.problem),
                "gated": offer.gated, "downloads": offer.downloads, "served": served,
                "tokens_per_second": MEMORY_RATE.expected_speed(offer.name, offer.bytes),
                "fits": offer.bytes + BESIDE_BYTES <= memory if offer.bytes else None}

    async def handle_download(self, http: web.Request) -> web.StreamResponse:
        """POST /models/download: the download goes on whether or not this client stays."""
        values = await self._read(http)
        download = self.downloads.start(values["model"])
        download.stays = True
        if not values.get("stream"):
            return json_response(public(download.body), 202 if download.running else 200)
        return await stream_of(http, download.states(), state_frame)

    async def handle_downloads(self, http: web.Request) -> web.StreamResponse:
        """GET /models/downloads: the state of each, and each change, as server-sent events, until none is
        running."""
        self.downloads.check_allowed()
        return await stream_of(http, self.downloads.states(), state_frame)

    async def handle_cancel(self, http: web.Request) -> web.Response:
        values = await self._read(http)
        if not await refusals(self.downloads.cancel(values["model"])):
            raise RequestError(f"no download of {shown(values['model'])} is running", status=404,
                               code="not_running", param="model")
        return json_response({"model": values["model"], "state": "cancelled"})

    async def handle_delete(self, http: web.Request) -> web.Response:
        values = await self._read(http)
        freed = await refusals(self.downloads.delete(values["model"]), status=404)
        return json_response({"model": values["model"], "deleted": True, "bytes": freed})

    # Ollama's

    async def handle_pull(self, http: web.Request) -> web.StreamResponse:
        """POST /api/pull. As at Ollama, it is cancelled when all who follow it have left."""
        values = await self._read(http)
        download = self.downloads.start(ollama_name(values["model"]))
        async with self.downloads.following(download) as states:
            if values.get("stream", True):
                return await stream_of(http, states, ollama_lines(download), OllamaEncoder)
            async for _ in states:
                pass
        if problem := problem_of(download):
            raise RequestError(problem, status=500, code="not_downloaded")
        return json_response({"status": "success"})

    async def handle_ollama_delete(self, http: web.Request) -> web.Response:
        values = await self._read(http)
        await refusals(self.downloads.delete(ollama_name(values["model"])), status=404)
        return web.Response()


async def stream_of(http: web.Request, states: AsyncIterator[dict], encode: Callable[[dict], bytes],
                    form: type[Encoder] = Encoder) -> web.StreamResponse:
    async with EventStream(http, REQUEST_LOG.get().id, form) as stream:
        async for state in states:
            await stream.send(encode(state))
    return stream.response


async def refusals(work, status: int = 400):
    """What is awaited; a ConfigError, which says what cannot be had, is the client's."""
    try:
        return await work
    except ConfigError as error:
        raise RequestError(without_folders(str(error)), status=status, code="no_such_model"
                           if status == 404 else "not_available", param="model") from None


def state_frame(state: dict) -> bytes:
    return frame(public(state))


def public(state: dict) -> dict:
    return {name: without_folders(value) if name in ("error", "note") else value
            for name, value in state.items()}


def ollama_name(name: str) -> str:
    """A name of Ollama's as ours: hf.co/owner/name:Q4_K_M, llama3.2:1b, llama3.2:latest."""
    return re.sub(r"^(https://)?(hf\.co|huggingface\.co)/|:latest$", "", name, flags=re.IGNORECASE)


def problem_of(download: Download) -> str:
    """Why a download that has ended is of no use to who asks for it as at Ollama; "" if it is."""
    body = public(download.body)
    if download.state == "done":
        return "" if download.usable else body["note"]
    return body.get("error") or "the download was cancelled"


def ollama_lines(download: Download) -> Callable[[dict], bytes]:
    """An encoder of its states as Ollama's stream: a line for each stage and each progress."""
    last = ""

    def lines(state: dict) -> bytes:
        nonlocal last
        model = state["model"]
        word = state["state"]
        stages = {"waiting": "pulling manifest", "looking": "pulling manifest",
                  "downloading": f"pulling {model}", "checking": "verifying sha256 digest",
                  "opening": "writing manifest", "done": "success"}
        if word not in Download.RUNNING and (problem := problem_of(download)):
            return dump({"error": problem}) + b"\n"
        status = stages[word]
        line: dict = {"status": status}
        if word == "downloading":
            digest = hashlib.sha256(model.encode()).hexdigest()  # clients show a part of it
            line |= {"digest": f"sha256:{digest}", "total": state["bytes"], "completed": state["done"]}
        elif status == last:
            return b""
        last = status
        return dump(line) + b"\n"
    return lines
