"""The encoder of Anthropic's Messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from chatlm.common.messages.requests import Delta, Piece, Usage
from chatlm.front.api.encode import BlockEncoder, calculator_member, frame, parsed_arguments
from chatlm.front.api.errors import anthropic_error

if TYPE_CHECKING:
    from chatlm.common.errors import ChatServerError
    from chatlm.common.messages.requests import Accepted, Event
    from chatlm.front.api.encode import AnswerBlock


class MessagesEncoder(BlockEncoder):
    """`/v1/messages`, Anthropic's API."""

    ping = b'event: ping\ndata: {"type": "ping"}\n\n'
    # kind of block -> its type, the member that grows, the type of its deltas, and their member
    BLOCKS = {"text": ("text", "text", "text_delta", "text"),
              "reasoning": ("thinking", "thinking", "thinking_delta", "thinking"),
              "call": ("tool_use", "input", "input_json_delta", "partial_json"),
              "mcp": ("mcp_tool_use", "input", "input_json_delta", "partial_json"),
              "result": ("mcp_tool_result", "content", "", "")}
    REASONS = {"max_tokens": "max_tokens", "context_length": "model_context_window_exceeded"}

    def encode(self, event: Event) -> bytes:
        """Leave out the thoughts, unless the request asks for thinking. Clients that do not ask for it take
        the first block of an answer as its text."""
        if isinstance(event, Piece) and not self.parsed.details.get("thinking"):
            event = event._replace(deltas=tuple(delta for delta in event.deltas if delta.kind != "reasoning"))
        return super().encode(event)

    def message(self, content: list[dict], usage: dict, stop: Mapping) -> dict:
        return {"id": "msg_" + self.request.id, "type": "message", "role": "assistant", "model": self.model,
                "content": content, "stop_reason": None, "stop_sequence": None, **stop, "usage": usage,
                "seed": self.request.params.sampling.seed}

    @staticmethod
    def usage_body(usage: Usage) -> dict:
        return {"input_tokens": usage.prompt_tokens - usage.cached_tokens, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": usage.cached_tokens, "output_tokens": usage.completion_tokens}

    def start(self, accepted: Accepted) -> bytes:
        usage = self.usage_body(Usage(accepted.prompt_tokens))
        return self.event("message_start", message=self.message([], usage, {}))

    def content(self, block: AnswerBlock, grown) -> dict:
        kind, member, _, _ = self.BLOCKS[block.kind]
        call = {"id": "toolu_" + block.id, "name": block.name} if block.kind == "call" else {}
        if block.tool and block.kind == "mcp":
            call = {"id": "mcptoolu_" + block.id, "name": block.tool.tool, "server_name": block.tool.label}
        if block.result and block.kind == "result":
            text = {"type": "text", "text": block.result.text}
            return {"type": kind, "tool_use_id": "mcptoolu_" + block.id, "is_error": block.result.is_error,
                    member: [text]}
        # nobody checks the signature, but clients send back no thinking without one
        signature = {"signature": block.id} if block.kind == "reasoning" else {}
        return {"type": kind, **call, member: grown, **signature, **calculator_member(block.calculator)}

    def open_block(self, block: AnswerBlock) -> bytes:
        empty = self.content(block, {} if block.kind in ("call", "mcp") else "")
        return self.event("content_block_start", index=block.index, content_block=empty)

    def grow_block(self, block: AnswerBlock, text: str, call: dict | None = None) -> bytes:
        _, _, kind, member = self.BLOCKS[block.kind]
        return self.event("content_block_delta", index=block.index, delta={
            "type": kind, member: text, **calculator_member([call] if call else [])})

    def close_block(self, block: AnswerBlock) -> bytes:
        return self.event("content_block_stop", index=block.index)

    def end_call(self, block: AnswerBlock) -> bytes:
        """The block of a call's result, whole. It has no id of its own: `id` is that of the call's block."""
        result = self.choices[0].block(Delta("result", "", block.name))
        result.id = block.id
        result.result = block.result
        result.is_closed = True
        return self.open_block(result) + self.close_block(result)

    def stop(self) -> dict:
        done = self.choices[0].done
        if done.reason == "pause":
            return {"stop_reason": "pause_turn", "stop_sequence": None}
        if done.stop_reason in self.request.params.stop:
            return {"stop_reason": "stop_sequence", "stop_sequence": done.stop_reason}
        if done.reason == "length":
            reason = self.REASONS.get(done.stop_reason or "", "max_tokens")
        else:
            calls = [block.kind == "call" for block in self.blocks]
            # where the server runs tools, their results may follow a call of the client's own function
            reason = "tool_use" if calls[-1] or self.tools and any(calls) else "end_turn"
        return {"stop_reason": reason, "stop_sequence": None}

    def body(self) -> dict:
        blocks = [self.content(
            block, parsed_arguments(block.text) if block.kind in ("call", "mcp") else block.text)
            for block in self.blocks]
        return self.message(blocks, self.usage_body(self.usage()), self.stop())

    def end(self) -> bytes:
        usage = self.usage_body(self.usage())
        return self.event("message_delta", delta=self.stop(), usage=usage) + self.event("message_stop")

    @staticmethod
    def lone_failure(error: ChatServerError) -> bytes:
        return b"event: error\n" + frame(anthropic_error(error))
