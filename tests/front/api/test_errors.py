"""One conversion of errors, sent as a response, as a frame or as a line of a batch, in its API's shape."""

import json

import pytest

from chatlm.common.client_words import too_long
from chatlm.common.errors import EngineFailure, Overloaded, RequestError
from chatlm.front.api.errors import (
    anthropic_error, failed_answer, native_error, ollama_error, openai_error, public_error)
from fake_pool import FakePool, conversation, frames, serving
from spoken_paths import ENCODERS

FAULTS = {
    "a key": (KeyError("the secret"), "Its log has the details"),
    "memory": (MemoryError("the secret"), "It has too little memory; its log has the details"),
    "a mapping": (OSError(12, "Cannot allocate memory", "/home/the secret"),
                  "It has too little memory; its log has the details")}
WHOLE = {"stream": False}
ROUTES = {  # body, and what its clients read of an error: of a response, and at the end of a stream
    "/chat/completions": (conversation(), None, lambda text: frames(text)[-1]["error"]["message"]),
    "/v1/chat/completions": (conversation(), lambda body: body["error"]["message"],
                             lambda text: frames(text)[-1]["error"]["message"]),
    "/v1/completions": ({"prompt": "x"}, lambda body: body["error"]["message"],
                        lambda text: frames(text)[-1]["error"]["message"]),
    "/v1/responses": ({"input": "x"}, lambda body: body["error"]["message"],
                      lambda text: last_event(text)["response"]["error"]["message"]),
    "/v1/messages": (conversation() | {"max_tokens": 5}, lambda body: body["error"]["message"],
                     lambda text: last_event(text)["error"]["message"]),
    "/api/chat": (conversation(), lambda body: body["error"],
                  lambda text: json.loads(text.splitlines()[-1])["error"]),
    "/v1/embeddings": ({"input": "x"}, lambda body: body["error"]["message"], None)}


def last_event(text):
    return json.loads(
        [line for line in text.decode().splitlines() if line.startswith("data: ")][-1].removeprefix("data: "))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("route", ROUTES)
async def test_no_sink_tells_clients_of_the_inside(client, route, fault):
    error, said = FAULTS[fault]
    body, of_response, of_frame = ROUTES[route]
    async with serving(FakePool(["a ", error])) as url:
        for find, more in ((of_response, WHOLE), (of_frame, {"stream": True})):
            if find is None:
                continue
            async with client.post(url + route,
                                   json=body | (more if route != "/v1/embeddings" else {})) as response:
                text = await response.read()
            assert response.status == (500 if find is of_response else 200)
            assert b"secret" not in text and b"MemoryError" not in text and b"KeyError" not in text
            found = find(json.loads(text) if find is of_response else text)
            assert found == f"The server had an error processing your request. {said}"


@pytest.mark.parametrize("fault", FAULTS)
async def test_comparison_and_recording_hide_the_inside(client, fault):
    error, said = FAULTS[fault]
    async with serving(FakePool(["a ", error])) as url:
        async with client.post(url + "/v1/compare",
                               json=conversation() | {"variants": [{}, {"seed": 1}]}) as response:
            compared = await response.read()
        ends = frames(compared)[-1]["answers"]
        words = f"The server had an error processing your request. {said}"
        assert {end["error"]["message"] for end in ends} == {words}
        for route in ("/v1/chat/completions", "/v1/messages"):
            body = ROUTES[route][0] | {"stream": True, "resumable": True}
            async with client.post(url + route, json=body) as response:
                recorded = await response.read()
            assert b"secret" not in recorded and said.encode() in recorded


@pytest.mark.parametrize("error",
                         [RequestError("no", status=404, code="a", param="b"), Overloaded("later"),
                          EngineFailure("broken"), too_long(9, 5, "messages", "m")])
def test_our_own_errors_stay_in_every_shape(error):
    """Their words stay as they are."""
    assert public_error(error) is error
    assert (failed_answer(error) == (error.status, openai_error(error))
            and native_error(error) == {"detail": str(error), **openai_error(error)})
    shapes = {"chat": openai_error(error), "messages": anthropic_error(error),
              "ollama chat": ollama_error(error), "embeddings": openai_error(error)}
    for api, shape in shapes.items():
        frame = ENCODERS[api].lone_failure(error).decode().strip().rpartition("data: ")[2]
        assert json.loads(frame) == shape
    assert json.loads(ENCODERS["native"].lone_failure(error)[6:]) == openai_error(error)


def test_a_failed_line_s_result_is_openai_s():
    words = "The server had an error processing your request. Its log has the details"
    assert failed_answer(ValueError("secret")) == (500, openai_error(EngineFailure(words)))
    assert failed_answer(RequestError("no"))[0] == 400
