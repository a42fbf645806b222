"""What it costs to encode a streamed answer of 500 tokens, in the format of each API."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import chat_server      # noqa: E402
from chat_server import Accepted, Call, Finished, Piece, Request      # noqa: E402

PIECES = [Piece("x", (5,), " word") for _ in range(500)]
END = Finished("stop", "eos", 7, len(PIECES), 3, 0.25, 8.125, 212.34, 0)


@pytest.mark.parametrize("api", chat_server.ENCODERS)
def test_a_streamed_answer_is_encoded(benchmark, api):
    def encode():
        encoder = chat_server.ENCODERS[api](Call(Request("x", messages=()), api=api), "model")
        return [encoder.start(Accepted(7, 1)), *map(encoder.encode, PIECES), encoder.encode(END)]

    assert b"".join(benchmark(encode)).count(b" word") >= len(PIECES)
