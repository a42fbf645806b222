"""What other evaluators ask of a server: vLLM's prompt_logprobs, its fields of /tokenize, /tokenizer_info."""

import json

import pytest

from answers import collected
from chatlm.common.messages.protocol import ParsedBody
from chatlm.common.messages.requests import AnswerParams, Piece, PromptScores, Request, TokenLogprob
from chatlm.front.api.encode import dump
from fake_pool import Letters, finished
from openai_routes import COMPLETIONS, ask, call, need_exact, refused
from spoken_paths import ENCODERS

TEXT = "The capital of Japan is"


@pytest.fixture
def url(float_url):
    return float_url


def scores_of(url, prompt, top, **more):
    return ask(url, COMPLETIONS, prompt=prompt, prompt_logprobs=top, max_tokens=1,
               **more)["choices"][0]["prompt_logprobs"]


def test_prompt_logprobs_are_those_of_an_echo(url):
    """They stand by token id."""
    need_exact(url)
    ids = call(url, "/tokenize", {"prompt": TEXT})[2]["tokens"]
    echoed = ask(url, COMPLETIONS, prompt=TEXT, echo=True, logprobs=3, return_token_ids=True,
                 max_tokens=1)["choices"][0]["logprobs"]["content"]
    found = scores_of(url, TEXT, 3)
    assert found[0] is None and len(found) == len(ids) and scores_of(url, ids, 3) == found
    for token, entry, other in zip(ids[1:], found[1:], echoed[1:]):
        # inspect_ai takes the first for the prompt's
        assert next(iter(entry)) == str(token) == str(other["id"])
        assert entry[str(token)] == {"logprob": other["logprob"], "rank": entry[str(token)]["rank"],
                                     "decoded_token": other["token"]}
        likeliest = [(str(each["id"]), each["logprob"]) for each in other["top_logprobs"]]
        listed = [(id_, each["logprob"]) for id_, each in entry.items() if id_ in dict(likeliest)]
        assert sorted(listed) == sorted(likeliest)
        assert {entry[id_]["rank"] for id_, _ in likeliest} == {1, 2, 3}
        assert len(entry) == (3 if entry[str(token)]["rank"] <= 3 else 4)


def test_prompt_logprobs_and_echo_count_apart(url):
    """Each list as many as they ask for."""
    need_exact(url)
    alone = scores_of(url, TEXT, 1)
    answer = ask(url, COMPLETIONS, prompt=TEXT, prompt_logprobs=1, echo=True, logprobs=4,
                 max_tokens=1)["choices"][0]
    assert answer["prompt_logprobs"] == alone
    tokens, tops = (answer["logprobs"][name][1:] for name in ("tokens", "top_logprobs"))
    assert {len(top) - (token not in [*top][:4]) for token, top in zip(tokens, tops)} == {4}
    other = ask(url, COMPLETIONS, prompt=TEXT, prompt_logprobs=4, echo=True, logprobs=1,
                max_tokens=1)["choices"][0]
    assert ({len(top) for top in other["logprobs"]["top_logprobs"][1:]} <= {1, 2}
            and other["prompt_logprobs"] == scores_of(url, TEXT, 4))
    drawn = ask(url, COMPLETIONS, prompt=TEXT, prompt_logprobs=1, logprobs=1, max_tokens=1)["choices"][0]
    assert len(drawn["logprobs"]["tokens"]) == 1 and drawn["prompt_logprobs"] == alone


def test_each_choice_has_its_prompt_s_logprobs(url):
    """A chat has them beside the choices."""
    need_exact(url)
    choices = ask(url, COMPLETIONS, prompt=[TEXT, "Water"], n=2, prompt_logprobs=0, max_tokens=1)["choices"]
    assert [choice["prompt_logprobs"]
            for choice in choices] == [scores_of(url, TEXT, 0)] * 2 + [scores_of(url, "Water", 0)] * 2
    body = ask(url, prompt_logprobs=0, max_tokens=1)
    assert ("prompt_logprobs" not in body["choices"][0]
            and len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"])
    assert "prompt_logprobs" not in ask(url, max_tokens=1)


def test_a_stream_has_no_prompt_logprobs(url):
    for path in ("/v1/chat/completions", COMPLETIONS):
        status, error = refused(url, path, prompt_logprobs=1, stream=True)
        assert status == 400 and error["param"] == "prompt_logprobs" and "stream" in error["message"]
        assert refused(url, path, prompt_logprobs=21)[1]["param"] == "prompt_logprobs"
    assert refused(url, COMPLETIONS, prompt_logprobs=1, suffix="x")[0] == 400


def test_prompt_logprobs_may_begin_at_a_token(url):
    """They are then those of the whole."""
    need_exact(url)
    words = [TEXT, "The capital of France is a town", "Water"]
    whole = [scores_of(url, word, 1) for word in words]
    answer = ask(url, COMPLETIONS, prompt=words, prompt_logprobs=1, prompt_logprobs_start=[19, 17, 0],
                 max_tokens=0)
    assert [choice["prompt_logprobs"] for choice in answer["choices"]] == [
        [None] * first + one[first:] for first, one in zip((19, 17, 0), whole)]
    again = ask(url, COMPLETIONS, prompt=words[0], n=2, prompt_logprobs=1, prompt_logprobs_start=17,
                max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 16
    assert [choice["prompt_logprobs"] for choice in again["choices"]] == [[None] * 17 + whole[0][17:]] * 2
    for wrong in ({"prompt_logprobs_start": 1},
                  {"prompt_logprobs_start": 1, "prompt_logprobs": 1, "echo": True, "logprobs": 1},
                  {"prompt_logprobs_start": [1, 1], "prompt_logprobs": 1},
                  {"prompt_logprobs_start": -1, "prompt_logprobs": 1},
                  {"prompt_logprobs_start": 3, "prompt_logprobs": 1},
                  {"prompt_logprobs_start": [], "prompt_logprobs": 1}):
        status, error = refused(url, COMPLETIONS, prompt="Hi", **wrong)
        assert status == 400 and error["param"] == "prompt_logprobs_start", wrong


def test_named_tokens_are_among_the_logprobs(url):
    """They are there however unlikely they are."""
    letters = [call(url, "/tokenize", {"content": letter})[2]["tokens"][0] for letter in "ABCD"]
    for path, more in ((COMPLETIONS, {"logprobs": 1}),
                       ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 1})):
        found = ask(url, path, logprob_token_ids=letters, max_tokens=1, return_token_ids=True,
                    **more)["choices"][0]["logprobs"]["content"][0]
        plain = ask(url, path, max_tokens=1, return_token_ids=True,
                    **more)["choices"][0]["logprobs"]["content"][0]
        assert (found["top_logprobs"][:1] == plain["top_logprobs"]
                and {*letters} <= {one["id"] for one in found["top_logprobs"]})
        assert len(found["top_logprobs"]) <= 5 and found["logprob"] == plain["logprob"]
        assert refused(url, path, logprob_token_ids=letters)[1]["param"] == "logprob_token_ids"
        assert refused(url, path, logprob_token_ids=[10**6], **more)[1]["param"] == "logprob_token_ids"
        assert refused(url, path, logprob_token_ids=[1] * 129, **more)[0] == 400


class Doubled(Letters):
    """98 and 99 are also an "a"."""

    def piece(self, token):
        return b"a" if token in (98, 99) else super().piece(token)


@pytest.mark.parametrize("token, keys",
                         [(97, ["a", "token_id:98", "x"]), (98, ["token_id:97", "a", "x"]),
                          (99, ["token_id:97", "token_id:98", "x", "a"]),
                                         (120, ["a", "token_id:98", "x"])])
def test_ids_with_one_text_have_keys_of_their_own(token, keys):
    """lm-eval calls a token greedy if its log-probability is the largest among the values."""
    request = Request("x", prompts=((97, token),), params=AnswerParams(logprobs=3, prompt_logprobs=3))
    encoder = ENCODERS["completion"](ParsedBody(request, stream=False, echo=True, kind="completion"), "m",
                                     Doubled())
    top = ((97, -1.0), (98, -2.0), (120, -3.0))
    values = dict(top) | {token: dict(top).get(token, -9.0)}
    for event in (PromptScores((TokenLogprob(97, None), TokenLogprob(token, values[token], top, 1))), Piece(),
                  finished([])):
        collected(encoder, event)
    found = json.loads(b"".join(encoder.completion()))["choices"][0]["logprobs"]
    assert found["top_logprobs"] == [None, dict(zip(keys, values.values(), strict=True))]
    assert found["top_logprobs"][1][found["tokens"][1]] == found["token_logprobs"][1] == values[token]


def test_the_tokenizer_reads_vllm_s_fields(url):
    ids = call(url, "/tokenize", {"content": TEXT})[2]["tokens"]
    bos, = call(url, "/tokenize", {"content": "<|bos|>"})[2]["tokens"]
    length = call(url, "/v1/models")[2]["data"][0]["max_model_len"]
    plain = call(url, "/tokenize", {"prompt": TEXT, "add_special_tokens": False, "model": "tiny"})[2]
    assert plain == {"count": len(ids), "max_model_len": length, "tokens": ids}
    with_bos = call(url, "/tokenize", {"prompt": TEXT, "return_token_strs": True})[2]
    assert (with_bos["tokens"] == [bos, *ids] and with_bos["token_strs"][0] == "<|bos|>"
            and "".join(with_bos["token_strs"][1:]) == TEXT)
    assert (call(url, "/tokenize", {"prompt": ""})[2]["tokens"] == [bos]
            and call(url, "/tokenize", {"prompt": "", "add_special_tokens": False})[2]["count"] == 0)
    hello = [{"role": "user", "content": "Hello"}]
    chat = call(url, "/tokenize", {"messages": hello})[2]["tokens"]
    assert call(url, "/detokenize", {"tokens": chat})[2]["prompt"] == call(
        url, "/apply-template", {"messages": hello})[2]["prompt"]
    assert len(call(url, "/tokenize",
                    {"messages": hello, "add_generation_prompt": False})[2]["tokens"]) == len(chat) - 1
    for body in ({}, {"prompt": "a", "content": "b"}, {"prompt": ["a"]}, {"messages": "x"},
                 {"prompt": "x" * 600_000}, {"prompt": "a", "messages": hello}):
        status, _, answer = call(url, "/tokenize", body)
        assert status == 400 and answer["error"]["param"] in ("content", "prompt", "messages")
    for body, name in (({"content": "a", "add_special_tokens": True}, "add_special_tokens"),
                       ({"prompt": "a", "with_pieces": True}, "with_pieces"),
                       ({"prompt": "a", "tools": []}, "tools"),
                       ({"messages": hello, "add_special": True}, "add_special")):
        assert call(url, "/tokenize", body)[2]["error"]["param"] == name


def test_tokenizer_info_names_tokens_around_a_text(url):
    info = call(url, "/tokenizer_info")[2]
    ends = info["bos_token"], info["eos_token"], info["pad_token"]
    assert ends == ("<|bos|>", "<|assistant_end|>", None) and info["tokenizer_class"]
    for name in (info["bos_token"], info["eos_token"]):
        token, = call(url, "/tokenize", {"prompt": name, "add_special_tokens": False})[2]["tokens"]
        assert info["added_tokens_decoder"][str(token)]["content"] == name
    assert (call(url, "/tokenizer_info?model=tiny")[2] == info
            and call(url, "/tokenizer_info?model=other")[0] == 404)
