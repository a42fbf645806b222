"""The runs of --watch: lineages, their stages and the steps of each."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from chatlm.common.errors import ConfigError, RequestError, invalid, shown, without_folders
from chatlm.common.jsontext import dump
from chatlm.front.evals.flips import flips
from chatlm.front.pool.run_names import RunName
from chatlm.front.server.responses import REQUEST_LOG, json_response

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence as Seq
    from chatlm.front.evals.flips import Verdicts
    from chatlm.front.front import Front
    from chatlm.front.pool.catalogue import Catalogue
    from chatlm.front.pool.models import ModelOrAdapter


def steps_of_runs(seen: Seq[ModelOrAdapter], removed: Seq[dict] = ()) -> dict[RunName, list[ModelOrAdapter]]:
    """The served checkpoints of each run. Runs and checkpoints are in the order of training.

    removed: steps whose files are gone (`Source.removed_steps`). A run may have no other steps."""
    steps: dict[RunName, list[ModelOrAdapter]] = {}
    for served in seen:
        if served.model.run and not served.adapter:
            steps.setdefault(served.model.run, []).append(served)
    names = {run.run for run in steps}
    for gone in removed:
        if gone["run"] not in names:
            steps.setdefault(RunName(gone["run"], gone["lineage"], gone["stage"], ()), [])
    return {run: sorted(steps[run], key=lambda served: served.model.step)
            for run in sorted(steps, key=lambda run: run.order)}


def runs_named(name: str, seen: Seq[ModelOrAdapter],
               removed: Seq[dict] = ()) -> dict[RunName, list[ModelOrAdapter]]:
    """The steps of a run, or of all runs of a lineage. Raises RequestError 404 if there is no such run."""
    steps = steps_of_runs(seen, removed)
    found = [run for run in steps if name == run.run]
    if not found:
        found = [run for run in steps if name == run.lineage]
    if not found:
        found = [run for run in steps if name in run.older]
    if not found:
        known: dict[str, None] = {}  # in order, each once
        for run in steps:
            known |= {run.lineage: None, run.run: None}
        names = ", ".join([*known][:20])
        raise RequestError(f"there is no run {shown(name)} here; {names or 'none is watched'}",
                           status=404, code="not_found", param="tag")
    return {run: steps[run] for run in found}


def run_parts(name: str, steps: Mapping[RunName, Seq[ModelOrAdapter]]) -> dict:
    return {"object": "run", "id": name, "runs": [
        {"id": run.run, "stage": run.stage, "steps": len(of_run),
         "latest": of_run[-1].name if of_run else ""}
        for run, of_run in steps.items()]}


def list_of_runs(seen: Seq[ModelOrAdapter], removed: Seq[dict] = ()) -> dict:
    """The response of /v1/runs: each lineage with its runs."""
    lineages: dict[str, dict[RunName, list[ModelOrAdapter]]] = {}
    for run, steps in steps_of_runs(seen, removed).items():
        lineages.setdefault(run.lineage, {})[run] = steps
    return {"object": "list", "data": [run_parts(name, runs) for name, runs in lineages.items()]}


def run_body(name: str, seen: Seq[ModelOrAdapter], removed: Seq[dict] = ()) -> dict:
    """The response of /v1/runs/{tag}: the checkpoints of a run or a lineage, and their metrics. Raises
    RequestError 404 if there is no such run."""
    found = runs_named(name, seen, removed)
    gone: dict[str, list[dict]] = {}
    for step in removed:
        gone.setdefault(step["run"], []).append(step)
    steps = []
    for run, of_run in found.items():
        there = [step_body(run, served) for served in of_run]
        steps += sorted(there + gone.get(run.run, []), key=lambda step: step["step"])
    return {**run_parts(name, found), "steps": steps}


def step_body(run: RunName, served: ModelOrAdapter) -> dict:
    return {"model": served.name, "run": run.run, "lineage": run.lineage, "stage": run.stage,
            "step": served.model.step, "state": served.state,
            "weights_digest": "" if served.failed else served.pool.supervisor.card.facts.digest,
            "metrics": served.model.metrics, **served.model.remarks,
            "judged": served.model.verdicts is not None, "samples": served.model.samples}


def run_text(body: Mapping) -> bytes:
    """The response as JSON. Each step is written by itself, because other threads get no turn within a single
    call of C."""
    steps = [dump(step) for step in body["steps"]]
    whole = dump({name: value for name, value in body.items() if name != "steps"})
    return b'%s, "steps": [%s]}' % (whole[:-1], b", ".join(steps))


def verdicts_among(seen: Seq[ModelOrAdapter], removed: Seq[dict], tag: str, name: str,
                   step: str | None) -> Verdicts:
    """The verdicts on a run's step. `step` is its number or, in a lineage, the model's name. Raises
    RequestError if the step has none."""
    judged: dict[str, Verdicts] = {}
    for steps in runs_named(tag, seen, removed).values():
        for served in steps:
            if served.model.verdicts:
                judged[served.name] = served.model.verdicts
                judged[str(served.model.step)] = served.model.verdicts
    found = judged.get(step or "")
    if found is None:
        steps = [each for each in judged if each.isdigit()]
        raise invalid(name, f"{name} is {shown(step)}; --watch-suite has judged the steps "
                            f"{', '.join(sorted(steps, key=int)[-20:]) or 'none'}")
    return found


class RunRoutes:
    """The handlers of /v1/runs."""

    def __init__(self, catalogue: Catalogue):
        self.catalogue = catalogue

    @classmethod
    def of(cls, front: Front) -> RunRoutes:
        return cls(front.catalogue)

    async def _steps(self) -> tuple[list[ModelOrAdapter], list[dict]]:
        """The models that the client's key may see, and steps whose files are gone."""
        bound = REQUEST_LOG.get().bound
        removed = await self.catalogue.source.removed_steps(bound)
        return self.catalogue.registry.served_models(bound), removed

    async def handle_list(self, http: web.Request) -> web.Response:
        return json_response(list_of_runs(*await self._steps()))

    async def handle_run(self, http: web.Request) -> web.Response:
        """GET /v1/runs/{tag}. With ?before and ?after, two steps that --watch-suite has judged, the response
        also lists the items on which they differ."""
        tag = http.match_info["tag"]
        seen, removed = await self._steps()
        body = run_body(tag, seen, removed)
        if "before" in http.query or "after" in http.query:
            before = verdicts_among(seen, removed, tag, "before", http.query.get("before"))
            after = verdicts_among(seen, removed, tag, "after", http.query.get("after"))
            try:
                body["flips"] = await asyncio.to_thread(flips, before, after)
            except ConfigError as error:
                raise RequestError(f"the files of --watch-suite have changed: {without_folders(str(error))}",
                                   status=409) from None
        text = await asyncio.to_thread(run_text, body)
        return web.Response(body=text, content_type="application/json")
