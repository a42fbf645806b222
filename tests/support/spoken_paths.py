"""What the dialects of the program have: the paths of their bodies, fields, and encoders."""

from chatlm.front.api.dialect import Form
from chatlm.front.api.dialects.messages import MessagesEncoder
from chatlm.front.api.dialects.native import NativeEncoder
from chatlm.front.api.dialects.ollama import OllamaEncoder
from chatlm.front.api.dialects.openai import (
    ChatEncoder, CompletionEncoder, FunctionEncoder, InfillEncoder)
from chatlm.front.api.dialects.responses import ResponsesEncoder
from chatlm.front.api.dialects.retrieval import EmbeddingsEncoder, ScoresEncoder
from chatlm.front.api.spoken import all_paths, fields_of, form_of

BODY_FIELDS = {path: fields_of(path) for path in all_paths()}
ANSWERS = [path for path in all_paths() if isinstance(form_of(path), Form)]
TEXTS = [path for path in all_paths() if path not in ANSWERS]
ENCODERS = {  # by ParsedBody.kind
    "native": NativeEncoder, "chat": ChatEncoder, "functions": FunctionEncoder,
    "completion": CompletionEncoder, "infill": InfillEncoder, "responses": ResponsesEncoder,
    "messages": MessagesEncoder, **dict.fromkeys(("ollama chat", "ollama generate"), OllamaEncoder),
    **dict.fromkeys(("embeddings", "ollama embed", "ollama embeddings", "tei embed"), EmbeddingsEncoder),
    **dict.fromkeys(("rerank", "llama rerank", "tei rerank", "score", "cosines"), ScoresEncoder)}
