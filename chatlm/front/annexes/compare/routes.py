"""The route that compares models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.front.api.encode import frame
from chatlm.front.comparison import Comparison, ComparedModel, Identified, compared_models_of, with_ids
from chatlm.front.server.bodies import note_ignored
from chatlm.front.server.responses import REQUEST_LOG
from chatlm.front.server.streams import EventStream

if TYPE_CHECKING:
    from aiohttp import web
    from chatlm.front.front import Front
    from chatlm.front.intake.budget import Holding
    from chatlm.front.server.answering import Answers
    from chatlm.front.server.bodies import Bodies
    from chatlm.front.server.ledger import Ledger


async def read_compared_models(bodies: Bodies, http: web.Request, holding: Holding) -> list[ComparedModel]:
    """The answers that a client wants compared."""
    with bodies.holding() as reading:
        async with bodies.opened(http, reading, times=LIMITS.compared) as opened_body:
            compared, ignored = await compared_models_of(bodies.intake, opened_body, holding)
        note_ignored(ignored)
        return compared


class CompareRoutes:
    """The handler of /v1/compare."""

    def __init__(self, bodies: Bodies, answers: Answers, ledger: Ledger, identified: Identified):
        self.bodies = bodies
        self.answers = answers
        self.ledger = ledger
        self.identified = identified

    @classmethod
    def of(cls, front: Front) -> CompareRoutes:
        return cls(front.bodies, front.answers, front.ledger, front.identified)

    async def handle_compare(self, http: web.Request) -> web.StreamResponse:
        """POST /v1/compare: several models answer the same question, in one stream."""
        with self.bodies.holding() as holding:
            compared = await read_compared_models(self.bodies, http, holding)
            compared = with_ids(compared, self.identified)
            request_id = REQUEST_LOG.get().id
            with (self.answers.grouped(request_id, [one.request.id for one in compared]),
                  self.ledger.pledged([one.work for one in compared])):
                async with (Comparison(compared, self.answers.begin) as comparison,
                            EventStream(http, request_id) as stream):
                    async for event in comparison.events():
                        await stream.send(frame(event))
        return stream.response
