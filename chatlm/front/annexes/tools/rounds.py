"""The server's own loop of tools: the model answers, its calls are run, and it answers again.

To whoever reads the answer it is one answer: `Rounds.begin` is like `Answers.begin`, and its events are those
of all rounds, with one Finished at the end. A round is an answer of the pool, entered in the ledger. Calls
run only after their round has finished: a worker's death repeats tokens, and never a call."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence as Seq
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TYPE_CHECKING

from chatlm.common.errors import RequestError
from chatlm.common.jsontext import as_json
from chatlm.common.messages.requests import (
    Accepted, CallApproved, CallEnded, Finished, Message, RoundEnded, ToolsListed, Usage)
from chatlm.common.request_ids import id_of_part
from chatlm.front.admission.questions import before_question, questions_in
from chatlm.front.aio import end_tasks
from chatlm.front.annexes.tools.approvals import Approvals
from chatlm.front.annexes.tools.row import TOOLS
from chatlm.front.api.additions import ToolCall
from chatlm.front.api.answer_state import AnswerState, ChoiceState
from chatlm.front.api.found_tools import without_tools
from chatlm.front.api.message_readers import earlier_arguments
from chatlm.front.server.responses import REQUEST_LOG
from chatlm.front.server.watching import watched
from chatlm.front.tools.results import ToolResult
from chatlm.front.tools.rules import (
    CHANGED, CUT_OFF, PICTURES_OF_RESULTS, QUESTION, SEEN_PICTURES, TOO_MANY, UNSEEN_PICTURES, arguments_of,
    model_name, why_not_run)

if TYPE_CHECKING:
    from chatlm.common.config import Settings
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.messages.requests import AnswerParams, Event, Picture, Request
    from chatlm.common.messages.tool_rounds import ApprovedCall, PlannedTool, ToolPlan
    from chatlm.front.front import Front
    from chatlm.front.pool.pool import WorkerPool
    from chatlm.front.server.answering import Answering, Answers, Ask, Begin
    from chatlm.front.tools.toolbox import OfferedTool, Toolbox

RunTool = Callable[[ToolCall], Awaitable[ToolResult]]
NO_TOOLS: Mapping[str, RunTool] = MappingProxyType({})
AT_ONCE = 4  # calls of an answer
NO_ROOM = Finished("length", "context_length", Usage(), queue_ms=0.0, ttft_ms=0.0, tokens_per_second=None,
                   gpu=0)


class Rounds:
    """The answers for which the server calls tools."""

    def __init__(self, answers: Answers, toolbox: Toolbox, approvals: Approvals, settings: Settings,
                 own: Mapping[str, RunTool] = NO_TOOLS):
        """own: the tools that the server itself runs, by their names for a model."""
        self.answers = answers
        self.toolbox = toolbox
        self.own = own
        self.approvals = approvals
        self.settings = settings

    @classmethod
    def of(cls, front: Front) -> Rounds:
        own = {model_name(annex.name, tool.type): partial(tool.call, front.room(annex))
               for annex in front.wanted for tool in annex.tools}
        approvals = Approvals(front.store, front.owners, front.settings)
        return cls(front.answers, front.room(TOOLS).toolbox, approvals, front.settings, own)

    def marked(self, parsed: ParsedBody) -> ParsedBody:
        """A body whose answer asks for approvals that this server will know again."""
        assert parsed.plan
        return replace(parsed, plan=replace(
            parsed.plan, mark=self.approvals.mark_for(parsed.request.client)))

    def around(self, begin: Begin, ask: Ask) -> Answering:
        """Have an answer made in rounds, within all else that is around it."""
        return begin(ask._replace(made_by=self.begin))

    @asynccontextmanager
    async def begin(self, ask: Ask) -> AsyncIterator[tuple[Accepted, AsyncGenerator[Event, None]]]:
        """What Answers.begin does, over all rounds."""
        parsed = ask.parsed
        assert parsed.plan
        request_id = parsed.request.id
        client = parsed.request.client
        loop = Loop(self, ask.pool, parsed.request, parsed.plan, ask.model, not parsed.stream)
        loop.response = parsed.response_id
        approved = [call.id for call in parsed.plan.approved]
        place = ask.pool.place_for(parsed.request)
        state = ask.state
        del ask, parsed
        entered = self.answers.entered(request_id, client, lambda: loop.round_id, loop.cancel)
        with entered, self.approvals.in_use(client, approved), place:
            await self.approvals.check_unused(client, approved)
            async with loop.rounds, aclosing(watched(loop.events(), state)) as events:
                accepted: Any = await anext(events)
                yield accepted, events


@dataclass
class Call:
    """A call that the model has made."""

    name: str
    arguments: str
    number: int | None = None  # among the calls of tools that the server calls; None: it is the client's
    result: ToolResult | None = None
    seen: list[Picture] = field(default_factory=list)  # the pictures of the result, if the model sees

    @property
    def id(self) -> str:
        return f"call_{self.number}"


class Turn:
    """What the model has said in a round."""

    def __init__(self, choice: ChoiceState):
        self.choice = choice
        self.calls = [Call(part.name, part.text) for part in choice.calls]

    @property
    def message(self) -> Message:
        more: dict[str, Any] = {}
        if thoughts := self.choice.text("reasoning"):
            more["reasoning_content"] = thoughts
        more["tool_calls"] = [
            {"id": call.id, "type": "function",
             "function": {"name": call.name, "arguments": earlier_arguments(call.arguments)}}
            for call in self.calls]
        return Message("assistant", self.choice.text(), more)


class Loop:
    """One answer over all its rounds."""

    def __init__(self, rounds: Rounds, pool: WorkerPool, request: Request, plan: ToolPlan, model: str,
                 whole: bool):
        self.answers = rounds.answers
        self.toolbox = rounds.toolbox
        self.own = rounds.own
        self.approvals = rounds.approvals
        self.most_rounds = rounds.settings.tool_rounds
        self.pool = pool
        self.request = request
        self.plan = plan
        self.tools = {tool.name: tool for tool in plan.tools}
        self.model = model
        self.whole = whole
        self.response = ""              # its name, if it will be kept
        self.rounds = AsyncExitStack()  # has the running round, the last one until the answer was sent
        self.round_id = request.id
        self.stop = asyncio.Event()     # somebody cancels it
        self.calls: list[Call] = []     # all of these tools, in the order of their numbers
        self.turns: list[Turn] = []     # those whose calls have results
        self.ended: list[Finished] = []  # the ends of the rounds
        self.approved: list[Call] = []
        self.first: list[Call] = []     # that were run before the model was asked
        self.round = AnswerState(request)        # what the model says in the running one
        self.turn = Turn(self.round.choices[0])  # the one whose calls run
        self.rounds_of = Counter[str]() # in which each tool was called
        self.own_turn = asyncio.Lock()  # the server's own tools know the results of the calls before theirs

    def cancel(self) -> bool:
        """Stop the answer, its calls too. Its reader gets RequestError 'cancelled'."""
        self.stop.set()
        return True

    async def events(self) -> AsyncGenerator[Event, None]:
        """The first is Accepted, the last is Finished."""
        begun = bool(self.plan.approved or self._first_names())
        if begun:
            yield await self._accepted()
            for event in self._lists():
                yield event
            async with aclosing(self._run_before()) as results:
                async for event in results:
                    yield event
        for number in itertools.count():
            may_call = self._may_call(number)
            try:
                accepted, answer = await self._begin_round(number, may_call)
            except RequestError as error:
                if not self.calls or error.code != "context_length_exceeded":
                    raise
                self.ended.append(NO_ROOM)  # for the results. What the calls did is not hidden by an error
                break
            if number == 0 and not begun:
                yield accepted
                for event in self._lists():
                    yield event
            async for event in answer:
                self._check_stop()
                if isinstance(event, Finished):
                    self.ended.append(event)
                    continue
                yield event
            turn = self.turn = Turn(self.round.choices[0])
            ours = self._numbered(turn.calls)
            asked = [call for call in ours if self._is_asked(call)]
            end = self.ended[-1]
            if not ours:
                break
            goes_on = not asked and len(ours) == len(turn.calls)
            yield RoundEnded()
            if end.reason == "length" or self._tokens_left() == 0:
                for call in ours:
                    if call not in asked:
                        yield CallEnded(self._number(call), CUT_OFF, is_error=True)
                if end.reason != "length":
                    self.ended[-1] = replace(end, reason="length", stop_reason="max_tokens")
                break
            if goes_on:  # its work is entered in the ledger before that of tools begins
                await self.rounds.pop_all().aclose()
            async with aclosing(self._run([call for call in ours if call not in asked])) as results:
                async for event in results:
                    yield event
            if not goes_on:
                break
            self.turns.append(turn)
            if self.plan.pauses and number + 1 >= self.most_rounds:
                self.ended[-1] = replace(end, reason="pause", stop_reason="pause")
                break
        yield self._end()

    # rounds

    def _may_call(self, number: int) -> bool:
        """Whether the model may call tools in a round."""
        most = self.plan.most_calls
        is_used_up = all(self._is_used_up(tool) for tool in self.plan.tools)
        only_these = all(name in self.tools for name in self.request.params.tool_names)
        return (number < self.most_rounds and (most is None or len(self.calls) < most)
                and not (is_used_up and only_these))

    def _is_used_up(self, tool: PlannedTool) -> bool:
        """Was a tool called in as many rounds as it may be?"""
        return bool(tool.rounds) and self.rounds_of[tool.name] >= tool.rounds

    async def _begin_round(self, number: int,
                           may_call: bool) -> tuple[Accepted, AsyncGenerator[Event, None]]:
        self._check_stop()
        request = self._request(number, may_call)
        self.round_id = request.id
        self.round = AnswerState(request)
        begun = await self.rounds.enter_async_context(
            self.answers.begin(self.pool, request, self.model, self.whole, state=self.round))
        self._check_stop()
        return begun

    def _request(self, number: int, may_call: bool) -> Request:
        """What the pool is asked in a round. The first is the request itself, unless calls were approved."""
        request = replace(self.request, id=id_of_part(self.request.id, number), round=number + 1)
        if number == 0 and not self.approved and not self.first:
            return request if request.prompt_ids is None else request.lasting()
        params = request.params if number == 0 else self.plan.later or request.params
        params = replace(params, sampling=replace(
            params.sampling, seed=seed_of_round(params.sampling.seed, number)))
        options = {name: value for name, value in request.template_options.items()
                   if name not in ("continue_final_message", "add_generation_prompt")}
        request = replace(request, params=params, prompt_ids=None, pictures=(), prefix_token_ids=(),
                          messages=self._messages() if may_call else without_tools(self._last_messages()),
                          template_options=options,
                          max_tokens=self._tokens_left())
        return request if may_call else replace(request, params=without_calls(params), tools=())

    def _last_messages(self) -> tuple[Message, ...]:
        """The conversation of a round without calls. If each call so far could have been made before the
        model was asked, what they have found stands before the question: small models answer that, where
        they would go on to write calls."""
        calls = [call for turn in self.turns for call in turn.calls]
        if not all(call.name in self.tools and self.tools[call.name].first for call in calls):
            return self._messages()
        texts = [call.result.text for call in calls if call.result and call.result.cited]
        if texts and questions_in(self.request.messages or ()):
            found = "\n\n".join((*texts, "" if self.first else QUESTION))
            return before_question(self._asked_messages(), found)
        # what was found first stands there already
        return tuple(self._asked_messages()) if self.first else self._messages()

    def _tokens_left(self) -> int | None:
        """The most tokens that the next round may have; None: up to the context."""
        if self.request.max_tokens is None:
            return None
        used = sum(end.usage.completion_tokens for end in self.ended)
        return max(self.request.max_tokens - used, 0)

    def _messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        messages = [*self._asked_messages()]
        shown = self._shown_pictures()
        for turn in self.turns:
            messages += [turn.message, *result_messages(turn.calls, shown, blank_results(turn.calls))]
        return tuple(messages)

    def _asked_messages(self) -> Seq[Message]:
        """The conversation that the request has, with the results of the calls before the first round."""
        shown = self._shown_pictures()
        results = {approved.id: call for approved, call in zip(self.plan.approved, self.approved)}
        messages: list[Message] = []
        for message in self.request.messages or ():
            call = results.get((message.more or {}).get("tool_call_id", ""))
            if call is None or message.role != "tool":
                messages.append(message)
            else:
                messages += result_messages([call], shown, [message])
        texts = [call.result.text for call in self.first if call.result]
        return before_question(messages, "\n\n".join((*texts, QUESTION))) if texts else messages

    def _messages_of_call(self) -> tuple[Message, ...]:
        """The conversation as one of the server's own tools sees it: with the turn whose calls run, and the
        results of its own tools so far."""
        done = [call for call in self.turn.calls if call.name in self.own and call.result]
        turn = [self.turn.message] if self.turn.calls else []
        return (*self._messages(), *turn, *result_messages(done, set(), blank_results(done)))

    def _shown_pictures(self) -> set[int]:
        """The numbers of the calls whose pictures the model is shown: the newest that fit."""
        left = PICTURES_OF_RESULTS
        shown = set()
        for call in reversed(self.calls):
            left -= len(call.seen)
            if call.seen and left >= 0:
                shown.add(call.number)
        return shown

    def _end(self) -> Finished:
        """The end of the answer, with the work of all rounds."""
        last = self.ended[-1]
        usage = sum((end.usage for end in self.ended), Usage())
        timed = [end for end in self.ended if end.tokens_per_second]
        seconds = sum(end.usage.completion_tokens / end.tokens_per_second for end in timed
                      if end.tokens_per_second)
        tokens = sum(end.usage.completion_tokens for end in timed)
        dropped = max(end.dropped_messages for end in self.ended)
        return replace(last, usage=usage, dropped_messages=dropped, ttft_ms=self.ended[0].ttft_ms,
                       queue_ms=sum(end.queue_ms for end in self.ended),
                       tokens_per_second=tokens / seconds if seconds else None)

    def _check_stop(self):
        if self.stop.is_set():
            raise RequestError("the request was cancelled", status=499, code="cancelled")

    # calls

    async def _accepted(self) -> Accepted:
        """Check that the model will have the conversation, before a call runs that was approved."""
        request = replace(self.request, round=1)
        if request.prompt_ids is None:
            request = await self.pool.admission.admit(request)
        return Accepted(sum(map(len, request.prompt_ids or ())))

    def _lists(self) -> Seq[ToolsListed]:
        offered = self.toolbox.offered()
        found = []
        for label in self.plan.listed:
            server = self.toolbox.server(label)
            assert server
            own = [offered[tool.name].tool for tool in self.plan.tools
                   if tool.label == label and tool.name in offered]
            tools = tuple({"name": tool.name, "description": tool.description,
                           "input_schema": tool.parameters, "annotations": tool.annotations} for tool in own)
            found.append(ToolsListed(label, tools, server.why_unready))
        return found

    def _numbered(self, calls: Seq[Call]) -> list[Call]:
        """Those calls that the server runs or asks about, which get their numbers."""
        ours = [call for call in calls if call.name in self.tools]
        self.rounds_of.update({call.name for call in ours})
        for call in ours:
            call.number = len(self.calls)
            self.calls.append(call)
        return ours

    @staticmethod
    def _number(call: Call) -> int:
        assert call.number is not None
        return call.number

    def _is_asked(self, call: Call) -> bool:
        """Whether the client is asked about a call. It is not if the call can't be made."""
        return self.tools[call.name].asks and arguments_of(call.arguments) is not None

    def _first_names(self) -> Seq[str]:
        """The tools that are called before the model is asked: none if nobody asks anything."""
        return self.plan.first if questions_in(self.request.messages or ()) else ()

    async def _run_before(self) -> AsyncGenerator[Event, None]:
        """Run the calls that come before the first round: those that the client has approved, and those that
        the server makes."""
        calls = []
        for approved in self.plan.approved:
            call = Call(approved.name, approved.arguments)
            calls += self._numbered([call])
            yield CallApproved(approved.name, approved.arguments, approved.id)
        for name in self._first_names():
            arguments = {self.tools[name].first: questions_in(self.request.messages or ())}
            call = Call(name, as_json(arguments))
            calls += self._numbered([call])
            yield CallApproved(name, call.arguments, "")
        async with aclosing(self._run(calls, self.plan.approved)) as results:
            async for event in results:
                yield event
        approved = len(self.plan.approved)
        self.approved, self.first = calls[:approved], calls[approved:]

    async def _run(self, calls: Seq[Call],
                   approvals: Seq[ApprovedCall] = ()) -> AsyncGenerator[CallEnded, None]:
        """Run calls, AT_ONCE at a time, and yield their results in the order of the calls.

        approvals: those of the calls, if the client was asked."""
        # OpenAI's and Anthropic's clients send a request again after an error: this one would act twice
        REQUEST_LOG.get().headers["X-Should-Retry"] = "false"
        places = asyncio.Semaphore(AT_ONCE)
        tasks = [asyncio.ensure_future(self._result(call, approved, places))
                 for call, approved in itertools.zip_longest(calls, approvals)]
        stopped = asyncio.ensure_future(self.stop.wait())
        try:
            for call, task in zip(calls, tasks):
                await asyncio.wait((task, stopped), return_when=asyncio.FIRST_COMPLETED)
                self._check_stop()
                call.result = task.result()
                yield CallEnded(self._number(call), call.result.text, call.result.is_error, call.result.shown,
                                call.result.cited)
        finally:
            await end_tasks([*tasks, stopped])

    async def _result(self, call: Call, approved: ApprovedCall | None,
                      places: asyncio.Semaphore) -> ToolResult:
        """The result of a call; what goes wrong is one too. approved: the client's approval, if it was
        asked."""
        earlier = [(one.name, one.arguments) for one in self.calls[:self._number(call)]]
        refusal = why_not_run(call.name, call.arguments, earlier)
        if self.plan.most_calls is not None and self._number(call) >= self.plan.most_calls:
            refusal = TOO_MANY
        tool = self.tools[call.name]
        if tool.rounds and self.rounds_of[call.name] > tool.rounds:
            refusal = TOO_MANY
        if refusal:
            return ToolResult(refusal, is_error=True)
        async with places:
            if call.name in self.own:
                async with self.own_turn:
                    call.result = await self._called_here(call)
                return call.result
            meant = approved.digest if approved else self.tools[call.name].digest
            offered = self.toolbox.offered().get(call.name)
            if offered is None or offered.digest != meant:
                return ToolResult(CHANGED, is_error=True)
            result = await self._called(call, offered, approved)
            if not self.pool.sees:
                return result

            async def decode(data: bytes):
                call.seen.append(await self.pool.admission.decode_picture(data, self.request.client))
            return await result.with_readable_pictures(decode)

    async def _called_here(self, call: Call) -> ToolResult:
        """Call a tool that the server itself runs."""
        params = self.request.params
        tool = self.tools[call.name]
        before = tuple(one.result for one in self.calls if one.name == call.name and one.result)
        asked = ToolCall(arguments_of(call.arguments) or {}, self.plan.options.get(tool.tool, {}),
                         params.client, params.owner, self.pool,
                         replace(self.request, messages=self._messages_of_call()), before)
        return await self.toolbox.call_own(tool.label, tool.tool, params.client,
                                           lambda: self.own[call.name](asked))

    async def _called(self, call: Call, offered: OfferedTool, approved: ApprovedCall | None) -> ToolResult:
        """Call a tool. The use of an approval is noted before the call begins, and so is its result."""
        client = self.request.client
        arguments = arguments_of(call.arguments) or {}
        if approved is None:
            return await self.toolbox.call(offered, arguments, client)
        use = await self.approvals.begin(client, approved.id, self.response)
        result = await self.toolbox.call(offered, arguments, client)
        await self.approvals.end(client, approved.id, use, result)
        return result


def blank_results(calls: Seq[Call]) -> list[Message]:
    """The messages for the results of calls, without these."""
    return [Message("tool", "", {"tool_call_id": call.id, "name": call.name}) for call in calls]


def seed_of_round(seed: int, number: int) -> int:
    """The seed of a round: that of the request in the first one."""
    if number == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:6], "big")


def without_calls(params: AnswerParams) -> AnswerParams:
    """The parameters of a round in which the model may call nothing."""
    is_of_tools = params.grammar_param == "tools"
    return replace(params, tool_names=(), tool_types=(), tool_schemas=(), call_grammars=(),
                   grammar="" if is_of_tools else params.grammar,
                   grammar_param="" if is_of_tools else params.grammar_param)


def result_messages(calls: Seq[Call], shown: set[int], blank: Seq[Message]) -> list[Message]:
    """The results of calls. Pictures follow in a message of the user: no other place is known to every chat
    template. shown: the calls whose pictures the model is shown. blank: a message for each call."""
    messages = []
    pictures: list[Picture] = []
    for call, message in zip(calls, blank):
        assert call.result
        text = call.result.text
        if call.number in shown:
            pictures += call.seen
        elif call.result.pictures:
            text += f"\n{UNSEEN_PICTURES}"
        messages.append(replace(message, content=text))
    if pictures:
        parts = (SEEN_PICTURES, *range(len(pictures)))
        messages.append(Message("user", SEEN_PICTURES, None, tuple(pictures), parts))
    return messages
