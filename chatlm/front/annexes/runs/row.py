"""Training runs that --watch serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.late import importer
from chatlm.front.annex import Annex
from chatlm.front.api.errors import OPENAI
from chatlm.front.api.fields import A_TEXT
from chatlm.front.api.model_schema import A_MODEL
from chatlm.front.server.routes import Route

if TYPE_CHECKING:
    from chatlm.front.annexes.runs.routes import RunRoutes


A_FLIP = {"type": "object", "properties": {
    "task": A_TEXT, "item": {"type": "integer"}, "correct": {"type": "boolean", "description": "in `after`"},
    "chat": {"type": "boolean"}, "texts": {"type": "array", "items": A_TEXT}}}
A_STAGE = {"type": "object", "properties": {
    "id": A_TEXT, "stage": A_TEXT, "steps": {"type": "integer"}, "latest": A_TEXT}}
RUN_PARTS = {"object": A_TEXT, "id": A_TEXT, "runs": {
    "type": "array", "items": A_STAGE, "description": "its stages as they were trained, each a run"}}
A_LIST_OF_RUNS = {"type": "object", "properties": {
    "object": A_TEXT, "data": {"type": "array", "items": {"type": "object", "properties": RUN_PARTS}}}}
A_RUN = {"type": "object", "properties": {**RUN_PARTS, "flips": {
    "type": "object", "description": "with ?before=STEP&after=STEP: items that only one of them got right",
    "properties": {"gained": {"type": "integer"}, "lost": {"type": "integer"},
                   "items": {"type": "array", "items": A_FLIP}}}, "steps": {"type": "array", "items": {
    "type": "object", "properties": {
        "model": A_TEXT, "run": A_TEXT, "stage": A_TEXT, "step": {"type": "integer"},
        "state": {"enum": ["unloaded", "loading", "ready", "failed", "removed"],
                  "description": "removed: its files are gone"},
        "weights_digest": A_TEXT, "judged": {"type": "boolean"},
        "metrics": {"type": "object", "additionalProperties": {"type": "number"},
                    "description": "what is known of the step so far"},
        "stale": A_MODEL["properties"]["stale"], "warning": A_MODEL["properties"]["warning"],
        "samples": {"type": "array", "items": {"type": "object", "properties": {
            "prompt": A_TEXT, "text": A_TEXT}}}}}}}}
RUN_ROUTES: tuple[Route[RunRoutes], ...] = (
    Route("GET", "/v1/runs", OPENAI, lambda runs, http: runs.handle_list(http),
          "the runs of --watch, by lineage",
          returns=A_LIST_OF_RUNS),
    Route("GET", "/v1/runs/{tag:.+}", OPENAI, lambda runs, http: runs.handle_run(http),
          "the steps of a run or a lineage",
          returns=A_RUN),
)
RUNS: Annex[RunRoutes] = Annex("runs", importer("chatlm.front.annexes.runs.routes:RunRoutes.of"), RUN_ROUTES)
