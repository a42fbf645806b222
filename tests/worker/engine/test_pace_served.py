"""A real server: chunks of a long prompt beside an answer and alone, and the bits of both answers."""

import json
import threading

from real_server import ask, post, server

WHOLE = 2048  # no processor computes so many tokens in the time of a step beside answers
LONG = "The river carried small boats past gardens and markets. " * 240


def stream(url, begun=lambda: None, **body):
    """(tokens that each step of its prompt but the last computed, [(text, log-probability) of each token])."""
    body = {"temperature": 0, "ignore_eos": True, "stream": True, "logprobs": True} | body
    known, tokens = [0], []
    with post(url + "/v1/chat/completions", body) as response:
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "progress" in event:
                known.append(event["progress"]["prompt_tokens_done"])
            for choice in event.get("choices", ()):
                tokens += [(each["token"], each["logprob"]) for each in (choice.get("logprobs") or {}).get("content", ())]
            if tokens:
                begun()
    return [after - before for before, after in zip(known, known[1:]) if after > before], tokens


def test_chunks_are_small_beside_an_answer_and_the_bits_the_same(default_model_path):
    """Alone, a long prompt comes in whole chunks; beside an answer in small ones. Both answers stay the same."""
    short = ask("Count to a hundred.", max_tokens=150)
    long = ask(LONG, max_tokens=8, progress=True)
    flags = default_model_path, "--prefill-chunk", WHOLE, "--context-length", 8192
    with server(*flags) as (_, url):
        _, short_alone = stream(url, **short)
        whole, long_alone = stream(url, **long)
    assert whole == [WHOLE]

    with server(*flags) as (_, url):  # its cache is empty
        beside, begun = {}, threading.Event()
        thread = threading.Thread(target=lambda: beside.update(short=stream(url, begun.set, **short)))
        thread.start()
        assert begun.wait(60)
        small, long_beside = stream(url, **long)
        thread.join(60)
    assert max(small[:4]) < WHOLE and len(small) > len(whole)
    assert beside["short"][1] == short_alone
    assert long_beside == long_alone
