"""The encoder of OpenAI's Responses."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from chatlm.common.config import LIMITS
from chatlm.common.jsontext import dump
from chatlm.common.messages.requests import Piece
from chatlm.front.api.approval_ids import approval_id
from chatlm.front.api.encode import BlockEncoder, calculator_member, frame, timings_body
from chatlm.front.api.errors import response_error
from chatlm.front.api.logprobs import TokensOfText, entries
from chatlm.front.api.mcp_tools import id_of_approved_call
from chatlm.front.tools.rules import arguments_of

if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.requests import Accepted, Event
    from chatlm.common.messages.tool_rounds import PlannedTool
    from chatlm.front.api.encode import AnswerBlock


class ResponsesEncoder(BlockEncoder):
    """`/v1/responses`. Every block is an item. The only part of an item is the block's text, and a call has
    no part.

    Log-probabilities are kept as JSON. Where they belong, an item has a placeholder (`place_of_logprobs`)
    until `with_logprobs` replaces it."""

    # kind of block -> the item's type, the prefix of its id, the part's type, and the prefix of its events
    ITEMS = {"text": ("message", "msg_", "output_text", "response.output_text"),
             "reasoning": ("reasoning", "rs_", "reasoning_text", "response.reasoning_text"),
             "call": ("function_call", "fc_", "", "response.function_call_arguments"),
             "mcp": ("mcp_call", "mcp_", "", "response.mcp_call_arguments"),
             "approval": ("mcp_approval_request", "mcpr_", "", "response.mcp_call_arguments"),
             "list": ("mcp_list_tools", "mcpl_", "", "response.mcp_list_tools")}

    def __init__(self, *arguments):
        super().__init__(*arguments)
        sampling = self.request.params.sampling
        kept = self.parsed.details
        self.numbers = itertools.count()  # of events
        self.scored = self.request.params.logprobs is not None
        self.tokens = TokensOfText(self.tokenizer, self.request.params.skip_special_tokens)
        self.logprobs: dict[str, list[bytes]] = {}  # id of a block -> its log-probabilities, each in JSON
        self.logprob_bytes = 0                      # of all so far
        self.head = {"id": "resp_" + self.request.id, "object": "response", "created_at": int(time.time()),
                     "model": self.model, "error": None, "incomplete_details": None,
                     "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
                     "top_logprobs": self.request.params.logprobs or 0,
                     "background": self.parsed.in_background,
                     "previous_response_id": kept.get("previous_response_id"),
                     "store": kept.get("store", False), "usage": None}
        if "conversation" in kept:
            self.head["conversation"] = {"id": kept["conversation"]}

    def event(self, event_type: str, **fields) -> bytes:
        return self.with_logprobs(super().event(event_type, sequence_number=next(self.numbers), **fields))

    def with_logprobs(self, data: bytes) -> bytes:
        """JSON with log-probabilities in place of each `place_of_logprobs`. No text of an answer can look
        like one: its quotes are escaped."""
        for name, encoded in self.logprobs.items():
            data = data.replace(b'"logprobs": ["%s"]' % name.encode(),
                                b'"logprobs": [%s]' % b", ".join(encoded))
        return data

    def place_of_logprobs(self, block: AnswerBlock) -> list[str]:
        return [block.id] if block.id in self.logprobs else []

    def scores(self, block: AnswerBlock, text: str) -> bytes:
        """The log-probabilities of the tokens behind the next text of a block, in JSON.

        They are also kept for a whole answer, and for the last events of a stream. Four of those repeat all
        of them before the client has read any. So if there are many, the last events leave them out."""
        tokens = self.tokens.take(text) if self.scored else ()
        if not tokens or block.kind != "text":
            return b""
        encoded = [*map(dump, entries(tokens, self.request.params, self.tokenizer))]
        self.logprob_bytes += sum(map(len, encoded))
        if self.parsed.stream and self.logprob_bytes > LIMITS.repeated_bytes:
            self.logprobs.clear()
        else:
            self.logprobs.setdefault(block.id, []).extend(encoded)
        return b", ".join(encoded)

    def encode(self, event: Event) -> bytes:
        if self.scored and isinstance(event, Piece):
            self.tokens.add(event.logprobs)
        return super().encode(event)

    def collect(self, event: Event) -> int:
        before = self.logprob_bytes
        return super().collect(event) + self.logprob_bytes - before

    def response(self, status: str, **fields) -> bytes:
        body = self.head | {"status": status, "output": [self.item(block) for block in self.blocks]} | fields
        return b"%s, %s}" % (self.with_logprobs(dump(body))[:-1], self.parsed.repeated)

    def response_event(self, moment: str, response: bytes) -> bytes:
        event = dump({"type": f"response.{moment}", "sequence_number": next(self.numbers)})[:-1]
        return b'event: response.%s\ndata: %s, "response": %s}\n\n' % (moment.encode(), event, response)

    def start(self, accepted: Accepted) -> bytes:
        return b"".join(self.response_event(moment, self.response("in_progress"))
                        for moment in ("created", "in_progress"))

    def item(self, block: AnswerBlock, begins: bool = False) -> dict:
        kind, prefix, _, _ = self.ITEMS[block.kind]
        if block.kind == "list":
            return self.item_of_list(block, begins)
        if block.tool:
            return self.item_of_tool(block, block.tool, begins)
        done = self.choices[0].done
        status = "completed"
        if begins:
            status = "in_progress"
        elif block is self.blocks[-1] and done and done.reason == "length":
            status = "incomplete"
        item = {"id": prefix + block.id, "type": kind, "status": status}
        if block.kind == "call":
            return item | {"call_id": "call_" + block.id, "name": block.name, "arguments": block.text}
        more = {"role": "assistant"} if block.kind == "text" else {"summary": []}
        return item | more | {"content": [] if begins else [self.part(block, block.text)]}

    def id_of(self, block: AnswerBlock) -> str:
        """The id of a block's item. The server knows that of an approval request again; that of an approved
        call is made from it."""
        if block.approval_id:
            return id_of_approved_call(block.approval_id)
        if block.kind == "approval" and block.tool and self.parsed.plan:
            return approval_id(self.parsed.plan.mark, block.id, block.tool.digest)
        return self.ITEMS[block.kind][1] + block.id

    def item_of_list(self, block: AnswerBlock, begins: bool) -> dict:
        assert block.listed
        error = {"error": block.listed.error} if block.listed.error else {}
        return {"id": self.id_of(block), "type": "mcp_list_tools", "server_label": block.listed.label,
                "tools": [] if begins else block.listed.tools, **error}

    def item_of_tool(self, block: AnswerBlock, tool: PlannedTool, begins: bool) -> dict:
        item = {"id": self.id_of(block), "type": self.ITEMS[block.kind][0], "server_label": tool.label,
                "name": tool.tool, "arguments": "" if begins else block.text}
        if block.kind == "approval":
            return item
        result = block.result
        output = error = None
        status = "in_progress" if begins else "incomplete"
        if result and result.is_error:
            error = {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": result.text}]}
            status = "failed"
        elif result:
            output = result.text
            status = "completed"
        return item | {"status": status, "approval_request_id": block.approval_id or None, "output": output,
                       "error": error}

    def part(self, block: AnswerBlock, text: str) -> dict:
        more = ({"annotations": [], "logprobs": self.place_of_logprobs(block),
                 **calculator_member(block.calculator)} if block.kind == "text" else {})
        return {"type": self.ITEMS[block.kind][2], "text": text, **more}

    def place(self, block: AnswerBlock) -> dict:
        part = {"content_index": 0} if self.ITEMS[block.kind][2] else {}
        return {"item_id": self.id_of(block), "output_index": block.index, **part}

    def item_event(self, moment: str, block: AnswerBlock, begins: bool = False) -> bytes:
        return self.event(f"response.output_item.{moment}", output_index=block.index,
                          item=self.item(block, begins))

    def open_block(self, block: AnswerBlock) -> bytes:
        if block.kind == "approval":  # comes whole: `close_block`
            return b""
        item = self.item_event("added", block, begins=True)
        if block.kind == "mcp":
            return item + self.event("response.mcp_call.in_progress", **self.place(block))
        if block.kind == "call":
            return item
        part = self.part(block, "")
        return item + self.event("response.content_part.added", **self.place(block), part=part)

    def grow_block(self, block: AnswerBlock, text: str, call: dict | None = None) -> bytes:
        if block.kind == "approval":
            self.scores(block, text)
            return b""
        if not block.frame:  # to dump a whole event takes 13 us, and 3 us to dump the text alone
            event = self.ITEMS[block.kind][3] + ".delta"
            fields = dump({"type": event, **self.place(block)})[:-1]
            block.frame = b"event: %s\ndata: %s, " % (event.encode(), fields)
        scores = self.scores(block, text) if text else b""
        logprobs = b'"logprobs": [%s], ' % scores if block.kind == "text" else b""
        more = b', "calculator": %s' % dump([call]) if call else b""
        return b'%s"sequence_number": %d, %s"delta": %s%s}\n\n' % (
            block.frame, next(self.numbers), logprobs, dump(text), more)

    def close_block(self, block: AnswerBlock) -> bytes:
        if block.kind == "approval":
            if arguments_of(block.text) is None:  # nobody is asked about a call that can't be made
                block.kind = "mcp"
                return self.open_block(block) + self.close_block(block)
            return self.item_event("added", block) + self.item_event("done", block)
        event = self.ITEMS[block.kind][3] + ".done"
        place = self.place(block)
        text = block.text
        if block.kind == "mcp":  # its item is done once it has its result
            return self.event(event, **place, arguments=text)
        if block.kind == "call":
            done = self.event(event, **place, name=block.name, arguments=text)
        else:
            logprobs = {"logprobs": self.place_of_logprobs(block)} if block.kind == "text" else {}
            done = self.event(event, **place, text=text, **logprobs) + self.event(
                "response.content_part.done", **place, part=self.part(block, text))
        return done + self.item_event("done", block)

    def end_call(self, block: AnswerBlock) -> bytes:
        moment = "failed" if block.result and block.result.is_error else "completed"
        return self.event(f"response.mcp_call.{moment}", **self.place(block)) + self.item_event("done", block)

    def list_tools(self, block: AnswerBlock) -> bytes:
        assert block.listed
        end = "failed" if block.listed.error else "completed"
        frames = self.item_event("added", block, begins=True)
        for moment in ("in_progress", end):
            frames += self.event(f"response.mcp_list_tools.{moment}", **self.place(block))
        return frames + self.item_event("done", block)

    def whole(self) -> tuple[str, bytes]:
        """The response's status, and the whole response."""
        count = self.usage()
        usage = {"input_tokens": count.prompt_tokens,
                 "input_tokens_details": {"cached_tokens": count.cached_tokens, "cache_write_tokens": 0},
                 "output_tokens": count.completion_tokens,
                 "output_tokens_details": {"reasoning_tokens": count.reasoning_tokens},
                 "total_tokens": count.prompt_tokens + count.completion_tokens}
        done = self.choices[0].done
        cut = {"incomplete_details": {"reason": "max_output_tokens"}} if done.reason == "length" else {}
        status = "incomplete" if cut else "completed"
        return status, self.response(status, usage=usage, timings=timings_body(done), **cut)

    def end(self) -> bytes:
        return self.response_event(*self.whole())

    def completion(self) -> Iterator[bytes]:
        yield self.whole()[1]

    def failed(self, error: ChatServerError) -> bytes:
        return self.response_event("failed", self.response("failed", error=response_error(error)))

    @staticmethod
    def lone_failure(error: ChatServerError) -> bytes:
        return b"event: error\n" + frame({"type": "error", **response_error(error), "param": error.param})
