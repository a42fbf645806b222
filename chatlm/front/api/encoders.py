"""The table of encoders: which one writes the answers of each API. Those of most APIs are imported late."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from chatlm.front.api.encode import NativeEncoder
from chatlm.front.api.encode_openai import ChatEncoder, CompletionEncoder, FunctionEncoder
from chatlm.front.late import Late

if TYPE_CHECKING:
    from chatlm.common.messages.protocol import ParsedBody
    from chatlm.common.text.tokenizer import Tokenizer
    from chatlm.front.api.encode import Encoder


def load_infill() -> type[Encoder]:
    from chatlm.front.api.encode_infill import InfillEncoder
    return InfillEncoder


def load_responses() -> type[Encoder]:
    from chatlm.front.api.encode_responses import ResponsesEncoder
    return ResponsesEncoder


def load_messages() -> type[Encoder]:
    from chatlm.front.api.encode_messages import MessagesEncoder
    return MessagesEncoder


def load_ollama() -> type[Encoder]:
    from chatlm.front.api.encode_ollama import OllamaEncoder
    return OllamaEncoder


def load_embeddings() -> type[Encoder]:
    from chatlm.front.api.encode_retrieval import EmbeddingsEncoder
    return EmbeddingsEncoder


def load_scores() -> type[Encoder]:
    from chatlm.front.api.encode_retrieval import ScoresEncoder
    return ScoresEncoder


ENCODERS: Mapping[str, Late[type[Encoder]]] = {
    "native": Late.here(NativeEncoder), "chat": Late.here(ChatEncoder),
    "functions": Late.here(FunctionEncoder), "completion": Late.here(CompletionEncoder),
    "infill": Late(load_infill), "responses": Late(load_responses), "messages": Late(load_messages),
    "ollama chat": Late(load_ollama), "ollama generate": Late(load_ollama),
    **dict.fromkeys(("embeddings", "ollama embed", "ollama embeddings", "tei embed"), Late(load_embeddings)),
    **dict.fromkeys(("rerank", "llama rerank", "tei rerank", "score", "cosines"), Late(load_scores))}


def answer_encoder(parsed: ParsedBody, model: str, tokenizer: Tokenizer | None) -> Encoder:
    """Make the encoder of an answer. It keeps no more of the request than it needs. The event loop awaits
    `ENCODERS[parsed.api].get()` before, so that nothing is imported here."""
    return ENCODERS[parsed.api].now()(parsed.lasting(), model, tokenizer)
