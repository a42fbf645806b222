"""What timing decides is in no output of a batch: a line that is answered again has the same result."""

import json
import random
from dataclasses import replace

import pytest

from answers import collected
from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Known
from chatlm.common.messages.requests import (
    Delta,
    DraftCounts,
    Embedder,
    Embedding,
    Finished,
    Piece,
    TokenLogprob,
    Usage,
)
from chatlm.front.api.batch_lines import lasting_body, read_line
from chatlm.front.api.spoken import answer_encoder
from chatlm.front.api.spoken import paths_of_batches
from fake_pool import Letters

SAID = [{"role": "user", "content": "Hi"}]
EMBEDDER = Embedder("mean", 4, 64)
FUNCTION = {
    "name": "f",
    "parameters": {
        "type": "object",
        "properties": {"drafted": {"type": "boolean"}, "logprob": {"type": "number"}},
    },
}
BODIES = {
    "/v1/chat/completions": [
        {"messages": SAID},
        {"messages": SAID, "logprobs": True, "top_logprobs": 2, "n": 2},
        {"messages": SAID, "logprobs": True, "return_token_ids": True},
        {"messages": SAID, "tools": [{"type": "function", "function": FUNCTION}], "logprobs": True},
    ],
    "/v1/completions": [
        {"prompt": ["a", "b"], "logprobs": 2, "n": 2},
        {"prompt": "a", "echo": True, "logprobs": 1},
    ],
    "/v1/responses": [
        {"input": "Hi"},
        {"input": "Hi", "top_logprobs": 2, "include": ["message.output_text.logprobs"]},
        {
            "input": "Hi",
            "include": ["message.output_text.logprobs"],
            "tools": [{"type": "function", **FUNCTION}],
            "metadata": {"drafted": "true"},
        },
    ],
    "/v1/embeddings": [{"input": ["a", "b"]}],
}
TEXT = [
    ("reasoning", "Let me see."),
    ("text", "Hello, world!"),
    ("call", '{"drafted": true}'),
    ("text", "Bye."),
]


def events(count, rng):
    """The answer, as far as timing decides it at random: steps, drafts, caches, times, workers."""
    total = 0
    for choice in range(count):
        gpu = rng.randrange(8)
        drafts = DraftCounts(*(rng.randrange(9) for _ in range(4)))
        usage = Usage(7, 30, rng.randrange(7), 4, drafts, replace(drafts, lookup=0), rng.random())
        for kind, text in TEXT:
            name = "f" if kind == "call" else ""
            while text:
                size = rng.choice((1, 2, 5, 50))
                part, text = text[:size], text[size:]
                tokens = tuple(part.encode())
                scored = tuple(
                    TokenLogprob(token, -0.5, ((token, -0.5), (65, -2.0)), drafted=rng.random() < 0.5)
                    for token in tokens
                )
                yield Piece(tokens, (Delta(kind, part, name),), scored, choice, gpu, rng.random())
                name = ""
                total += len(tokens)
        yield Finished("stop", "eos", usage, rng.random(), rng.random(), rng.choice((None, 5.0)), gpu, choice)


def result(line, seed):
    rng = random.Random(seed)
    parsed = line.read_body(
        Known(Settings(), "tagged", embedder=EMBEDDER if line.url == "/v1/embeddings" else None)
    )
    if line.url == "/v1/embeddings":
        made = []
        for choice in rng.sample(range(2), 2):
            made += [
                Embedding("AACAPwAAAAA=", choice),
                Finished(
                    "stop",
                    "eos",
                    Usage(3, 0, rng.randrange(3)),
                    rng.random(),
                    0.0,
                    None,
                    rng.randrange(3),
                    choice,
                ),
            ]
    else:
        made = [*events((len(parsed.request.prompts) or 1) * parsed.request.n, rng)]
    encoder = answer_encoder(parsed, "a-model", Letters())
    for event in made:
        collected(encoder, event)
    return line.result(200, lasting_body(json.loads(b"".join(encoder.completion())), 1_700_000_000))


@pytest.mark.parametrize("url", paths_of_batches())
def test_a_line_that_is_answered_again_has_the_same_result(url):
    for number, body in enumerate(BODIES[url], 1):
        line = read_line(
            number, json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body}).encode()
        )
        results = {result(line, seed) for seed in range(20)}
        assert len(results) == 1, results
        [only] = results
        assert '"drafted": true' not in only and "drafted_tokens" not in only and "queue_ms" not in only
        if "metadata" in body:
            assert '"metadata": {"drafted": "true"}' in only
