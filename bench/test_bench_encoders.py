"""The cost of encoding a streamed answer of 500 tokens in the format of each API, and 100 embeddings."""

import base64
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/support")]
from answers import collected, encoded    # noqa: E402
from chatlm.common.messages.protocol import ParsedBody    # noqa: E402
from chatlm.common.messages.requests import (    # noqa: E402
    Accepted, AnswerParams, Delta, Embedding, Finished, Piece, Request, Usage)
from chatlm.front.api.dialects.retrieval import EmbeddingsEncoder, ScoresEncoder    # noqa: E402
from spoken_paths import ENCODERS    # noqa: E402

PIECES = [Piece((5,), (Delta("text", " word"),)) for _ in range(500)]
END = Finished("stop", "eos", Usage(7, len(PIECES), 3), 0.25, 8.125, 212.34, 0)
DETAILS = {"infill": {"response_fields": ()}}      # what the reader of a body always notes
STREAMED = [api for api, kind in ENCODERS.items() if kind not in (EmbeddingsEncoder, ScoresEncoder)]


@pytest.mark.parametrize("api", STREAMED)
def test_a_streamed_answer_is_encoded(benchmark, api):
    def encode():
        encoder = ENCODERS[api](ParsedBody(Request("x", messages=()), kind=api, details=DETAILS.get(api, {})),
                                "model")
        return [encoder.start(Accepted(7)), *[encoded(encoder, event) for event in (*PIECES, END)]]

    assert b"".join(benchmark(encode)).count(b" word") >= len(PIECES)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings_are_encoded(benchmark, encoding):
    """100 vectors of 576 numbers, the width of the default model."""
    vector = base64.b64encode(
        struct.pack("<576f", *(0.0123456789 * (i % 7 - 3) for i in range(576)))).decode()
    request = Request("x", prompts=("a",) * 100, params=AnswerParams(pooling="mean"))

    def encode():
        encoder = EmbeddingsEncoder(ParsedBody(request, kind="embeddings", details={"encoding": encoding}),
                                    "model")
        for choice in range(100):
            collected(encoder, Embedding(vector, choice))
            collected(encoder, replace(END, choice=choice))
        return list(encoder.completion())

    assert b"".join(benchmark(encode)).count(b'"embedding": ') == 100
