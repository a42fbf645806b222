"""The table of encoders: which one writes the answers of each API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chatlm.front.api.encode import NativeEncoder
from chatlm.front.api.encode_infill import InfillEncoder
from chatlm.front.api.encode_messages import MessagesEncoder
from chatlm.front.api.encode_ollama import OllamaEncoder
from chatlm.front.api.encode_openai import ChatEncoder, CompletionEncoder, FunctionEncoder
from chatlm.front.api.encode_responses import ResponsesEncoder
from chatlm.front.api.encode_retrieval import RETRIEVAL_ENCODERS

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.api.encode import Encoder


def answer_encoder(parsed: ParsedBody, model: str, tokenizer: Tokenizer | None) -> Encoder:
    """Make the encoder of an answer. It keeps no more of the request than it needs."""
    return ENCODERS[parsed.api](parsed.lasting(), model, tokenizer)


ENCODERS = {"native": NativeEncoder, "chat": ChatEncoder, "functions": FunctionEncoder,
            "completion": CompletionEncoder, "infill": InfillEncoder,
            "responses": ResponsesEncoder, "messages": MessagesEncoder,
            "ollama chat": OllamaEncoder, "ollama generate": OllamaEncoder,
            **RETRIEVAL_ENCODERS}
