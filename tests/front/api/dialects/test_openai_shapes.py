"""Behaviours that break clients of other servers, tried on the default model in a real server: those that
depend on its text, its tokens or its numbers. What the front alone decides is in test_http.py, over a pool
without a model."""

import concurrent.futures
import json
import re
import urllib.error
import urllib.request

import pytest

from chatlm.front.api.logprobs import token_text
from chatlm.front.api.dialects.tokenization import piece_body
from fake_pool import Letters
from openai_routes import CHAT, COMPLETIONS, HI, TEMPLATE_SYSTEM, ask, call, need_exact, refused



@pytest.fixture
def url(short_url):
    return short_url


@pytest.fixture
def exact(url):
    need_exact(url)


def stream(url, path=CHAT, **changes):
    """The chunks of a stream; checks its lines and its end."""
    text = ask(url, path, stream=True, **changes)
    lines = [line for line in text.split("\n") if line]
    assert all(line.startswith(("data: ", ": ")) for line in lines) and text.endswith("data: [DONE]\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]
    assert len([line for line in lines if line == "data: [DONE]"]) == 1
    return chunks


def content(body, index=0):
    return body["choices"][index]["message"]["content"]


def joined(chunks, index=0):
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
                   if choice["index"] == index)


# one body


def test_a_completion_has_all_that_clients_read(url):
    """A completion has every member that clients read."""
    body = ask(url)
    assert (body["object"] == "chat.completion"
            and body["model"] == call(url, "/v1/models")[2]["data"][0]["id"])
    assert (re.fullmatch(r"chatcmpl-\w{32}", body["id"]) and type(body["created"]) is int
            and body["system_fingerprint"])
    (choice,) = body["choices"]
    assert choice["index"] == 0 and choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert choice["message"] == {"role": "assistant", "content": "The capital of Japan is Tokyo.",
                                 "refusal": None}
    usage = body["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens"] == 8 and usage["prompt_tokens_details"]["cached_tokens"] >= 0


def test_finish_reason_tells_length_from_stop(url):
    """Stop_reason names the cause."""
    cut, ended = ask(url, max_tokens=3)["choices"][0], ask(url)["choices"][0]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("length", "max_tokens")
    assert (ended["finish_reason"], ended["stop_reason"]) == ("stop", "eos")
    by_text = ask(url, stop=" Japan")["choices"][0]
    assert (by_text["finish_reason"], by_text["stop_reason"], by_text["message"]["content"]) == ("stop",
        " Japan", "The capital of")


def test_a_full_context_is_length_too(url):
    body = ask(url, max_tokens=None, ignore_eos=True, messages=[{"role": "user", "content": "tell " * 460}])
    assert (body["choices"][0]["finish_reason"], body["choices"][0]["stop_reason"]) == (
        "length", "context_length")
    assert body["usage"]["total_tokens"] == 512


def test_special_tokens_never_show(url):
    body = ask(url, ignore_eos=True, max_tokens=20)
    assert body["usage"]["completion_tokens"] == 20 and "<|" not in content(body)


def test_seeds_repeat_and_are_reported(url, exact):
    """Those that were drawn are too."""
    first = ask(url, temperature=1, seed=None)
    assert content(ask(url, temperature=1, seed=first["seed"])) == content(first)
    assert len({content(ask(url, temperature=1.5, top_k=0, seed=seed)) for seed in range(4)}) > 1
    assert ask(url, seed=-5)["seed"] == 2**64 - 5


def test_a_seed_gives_one_text_beside_anybody(url, exact):
    """The text does not depend on who else is there."""
    drawn = dict(temperature=1, min_p=0, max_tokens=16)
    wanted = dict(drawn, seed=7)
    alone = content(ask(url, **wanted))
    with concurrent.futures.ThreadPoolExecutor(6) as threads:
        others = [threads.submit(ask, url, seed=seed, **drawn) for seed in range(5)]
        assert content(threads.submit(ask, url, **wanted).result()) == alone
        assert len({content(other.result()) for other in others}) > 1


# streams


def test_a_stream_brings_what_the_whole_answer_has(url):
    chunks = stream(url, stream_options={"include_usage": True})
    whole, usage = ask(url), chunks[-1]["usage"]
    assert (joined(chunks) == content(whole)
            and usage["completion_tokens"] == whole["usage"]["completion_tokens"] == 8)
    assert [choice["finish_reason"] for chunk in chunks
            for choice in chunk["choices"]][-1] == whole["choices"][0]["finish_reason"]


# parameters


@pytest.mark.parametrize("given, tokens",
                         [({"max_completion_tokens": 2, "max_tokens": 9}, 2), ({"max_tokens": 3}, 3),
                          ({"max_tokens": -1}, 8)])
def test_both_names_of_the_length_and_minus_one(url, given, tokens):
    assert ask(url, **given)["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize("parts",
                         [[{"type": "text", "text": "What is the capital"},
                           {"type": "text", "text": "of Japan?"}],
                                   [{"type": "text", "text": "What is the capital of Japan?"}]])
def test_content_may_be_parts(url, parts):
    assert "Tokyo" in content(ask(url, messages=[{"role": "user", "content": parts}]))


def test_developer_is_system(url):
    """Empty and null contents are accepted."""
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": ""},
                {"role": "assistant", "content": None},
                {"role": "assistant", "content": ""}, *HI]
    system = [{"role": "system", "content": "Be brief."}, *messages[1:]]
    assert content(ask(url, messages=messages)) == content(ask(url, messages=system))


@pytest.mark.parametrize("stop, text",
                         [("Tokyo", "The capital of Japan is "), (["x!", " is"], "The capital of Japan"),
                          ([], None), ("", None),
                                        (["The"], ""), ([" capital of", "capital"], "The ")])
def test_stop_strings_end_the_answer(url, stop, text):
    """They are not in it."""
    whole = "The capital of Japan is Tokyo."
    assert content(ask(url, stop=stop)) == (whole if text is None else text)
    assert joined(stream(url, stop=stop)) == (whole if text is None else text)


def test_penalties_and_bias_change_the_answer(url):
    long = dict(max_tokens=40, ignore_eos=True)
    plain = content(ask(url, **long))
    assert content(ask(url, frequency_penalty=2, **long)) != plain != content(
        ask(url, repetition_penalty=1.5, **long))
    (token,) = call(url, "/tokenize", {"content": " Tokyo"})[2]["tokens"]
    assert " Tokyo" not in content(ask(url, logit_bias={str(token): -100}))
    assert content(ask(url, logit_bias={str(token): 100}, max_tokens=3)) == " Tokyo Tokyo Tokyo"


def test_a_bias_for_an_unknown_token_is_400(url):
    status, error = refused(url, logit_bias={"999999": 1})
    assert (status, error["param"]) == (400, "logit_bias")


def test_a_context_overflow_names_both_numbers(url):
    """It is an error: nothing is cut silently."""
    status, error = refused(url, messages=[{"role": "user", "content": "word " * 600}])
    assert (status, error["code"]) == (400,
                                       "context_length_exceeded") and "512" in error["message"] and re.search(
                                           r"6\d\d", error["message"])


def test_the_model_answers_to_all_of_its_names(url):
    """They are its own and those under which it is served."""
    (model,) = call(url, "/v1/models")[2]["data"]
    assert model["context_length"] == 512
    assert model["defaults"] == {"temperature": 0.3, "top_k": 50, "top_p": 1.0, "min_p": 0.1,
                                 "repetition_penalty": 1.0,
                                 "frequency_penalty": 0.2, "presence_penalty": 0.2, "max_tokens": None}
    assert model["capabilities"] == {"chat": True, "completion": True, "completions": True, "infill": False,
                                     "embedding": True, "rerank": False, "logprobs": True, "tools": True,
                                     "json_schema": True,
                                     "continue_final_message": True, "token_ids": True, "compare": True,
                                     "vision": False, "reasoning": False, "reasoning_history": False,
                                     "reasoning_budget": False}
    operation = call(url, "/openapi.json")[2]["paths"]["/v1/models"]["get"]
    described = operation["responses"]["200"]["content"]["application/json"]["schema"]["anyOf"][0]
    capabilities = described["properties"]["data"]["items"]["properties"]["capabilities"]
    assert capabilities["properties"].keys() == model["capabilities"].keys()
    for name in ("gpt-4o", model["id"], "default", "", None):
        ask(url, model=name, max_tokens=1)


# log-probabilities and several choices


def test_chat_logprobs_have_token_bytes_and_others(url):
    """Each entry has alternatives."""
    choice = ask(url, logprobs=True, top_logprobs=2)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == choice["message"]["content"]
    assert ("".join(entry["token"] for entry in entries) == choice["message"]["content"]
            and choice["logprobs"]["refusal"] is None)
    for entry in entries:       # greedy: the token is the likeliest
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0] == {name: entry[name] for name in ("id", "token", "logprob", "bytes")}


def test_streamed_logprobs_are_those_of_the_whole(url):
    wanted = dict(logprobs=True, top_logprobs=1, stop=[" Tokyo"])
    whole, chunks = ask(url, **wanted)["choices"][0]["logprobs"]["content"], stream(url, **wanted)
    streamed = [entry for chunk in chunks
                for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in whole] == ["The",
        " capital", " of", " Japan", " is"]
    assert ask(url, logprobs=True, max_tokens=1)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


def test_logprobs_keep_bytes_of_cut_characters(url):
    tokens = call(url, "/tokenize", {"content": "😀"})[2]["tokens"]
    bias = {str(token): 100 for token in tokens}
    choice = ask(url, logprobs=True, logit_bias=bias, max_tokens=6)["choices"][0]
    data = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert data.decode("utf-8", "replace") == choice["message"]["content"]
    assert all("\ufffd" not in entry["token"] for entry in choice["logprobs"]["content"])


def test_an_answer_goes_on_from_chosen_tokens(url, exact):
    """Its client has chosen them."""
    drawn = dict(messages=[TEMPLATE_SYSTEM,
                           *HI], temperature=1, min_p=0, presence_penalty=0, frequency_penalty=0, seed=5,
                           max_tokens=12)
    wanted = dict(drawn, return_token_ids=True)
    whole = ask(url, logprobs=True, top_logprobs=2, **wanted)["choices"][0]
    ids, entries = whole["token_ids"], whole["logprobs"]["content"]
    assert [entry["id"] for entry in entries] == ids[:-1]       # the last one ended it
    same = ask(url, prefix_token_ids=ids[:5], **wanted)
    assert (content(same) == whole["message"]["content"] and same["choices"][0]["token_ids"] == ids[5:]
            and same["usage"]["completion_tokens"] == len(ids))
    other = next(entry["id"] for entry in entries[3]["top_logprobs"] if entry["id"] != ids[3])
    branch, text = ask(url, prefix_token_ids=[*ids[:3], other], **wanted), call(url, "/detokenize",
        {"tokens": [*ids[:3], other]})[2]["content"]
    assert content(branch).startswith(text) and content(branch) != content(same)
    chunks = stream(url, prefix_token_ids=[*ids[:3], other], **wanted)
    assert joined(chunks) == content(branch)
    assert [token for chunk in chunks for choice in chunk["choices"]
            for token in choice.get("token_ids", ())] == branch["choices"][0]["token_ids"]
    raw = dict(wanted, logprobs=1)
    text = ask(url, COMPLETIONS, **raw)["choices"][0]
    assert [entry["id"]
            for entry in text["logprobs"]["content"]] == text["token_ids"][:len(text["logprobs"]["tokens"])]
    assert ask(url, COMPLETIONS, prefix_token_ids=text["token_ids"][:4],
               **raw)["choices"][0]["text"] == text["text"]
    native = call(url, "/chat/completions", {"messages": HI, "prefix_token_ids": ids[:5], **drawn})[2]
    assert "".join(json.loads(line[6:]).get("token", "") for line in native.split("\n")
                   if line) == content(same)


@pytest.mark.parametrize("changes, words", [
    ({"prefix_token_ids": [10**6]}, "prefix_token_ids has the token id 1000000"),
    ({"prefix_token_ids": "a"}, "prefix_token_ids"),
    ({"prefix_token_ids": [2]}, "has the token id 2, which ends the answer"),
    ({"prefix_token_ids": [5, 6, 7, 8]}, "has 4 tokens, but the answer may have 4"),
    ({"prefix_token_ids": [504], "guided_choice": ["yes", "no"]},
     "prefix_token_ids do not follow guided_choice")])
def test_impossible_first_tokens_are_refused(url, changes, words):
    """No answer can begin with them."""
    status, error = refused(url, **changes)
    assert status == 400 and words in error["message"]


def test_n_choices_differ_and_the_first_is_n_1_s(url, exact):
    wanted = dict(temperature=1, seed=11, max_tokens=16, messages=[
        {"role": "user", "content": "Write a line of a poem. " * 4}])
    one, three = ask(url, **wanted), ask(url, n=3, **wanted)
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2]
    assert content(three) == content(one) and len({content(three, index) for index in range(3)}) > 1
    assert three["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert three["usage"]["completion_tokens"] > one["usage"]["completion_tokens"]
    chunks = stream(url, n=3, **wanted)
    assert [joined(chunks, index) for index in range(3)] == [content(three, index) for index in range(3)]
    opened = [choice["index"] for chunk in chunks for choice in chunk["choices"] if "role" in choice["delta"]]
    ended = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(opened) == sorted(ended) == [0, 1, 2]


# shapes of answers


@pytest.mark.parametrize("route", [CHAT, "/chat/completions", "prefix"])
def test_a_cut_answer_goes_on_where_it_stopped(url, exact, route):
    """What was cut and what continues it are together the answer that was not cut: same seed, same noise at
    each place."""
    path = CHAT if route == "prefix" else route
    question = [{"role": "user", "content": "Count from one to ten, in words."}]

    def answer(messages, **more):
        body = call(url, path, {"messages": messages, "seed": 11, "temperature": 0.7, **more})[2]
        if path == CHAT:
            return content(body)
        events = [json.loads(line[6:]) for line in body.split("\n") if line.startswith("data: ")]
        return "".join(event.get("token", "") for event in events)

    whole = answer(question, max_tokens=24)
    for count in (1, 9):
        cut = answer(question, max_tokens=count)
        last = {"role": "assistant", "content": cut}
        how = {"continue_final_message": True, "add_generation_prompt": False}
        rest = answer([*question, last | {"prefix": True}] if route == "prefix" else [*question, last],
                      max_tokens=24 - count, **({} if route == "prefix" else how))
        assert whole.startswith(cut) and rest and not rest.startswith(cut)
        if exact:
            assert cut + rest == whole


@pytest.mark.parametrize("more, messages, words", [
    ({"continue_final_message": True, "add_generation_prompt": True}, [("user", {}), ("assistant", {})],
     "add_generation_prompt"),
    ({"continue_final_message": True}, [("user", {})], "must be the assistant's, not of role user"),
    ({}, [("user", {"prefix": True})], "messages[0].prefix: the last message must be the assistant's"),
    ({}, [("user", {}), ("assistant", {"prefix": True}), ("user", {})],
     "messages[1].prefix: only the last message"),
    ({}, [("user", {}), ("assistant", {"prefix": 3})], "messages[1].prefix must be true or false"),
    ({"continue_final_message": "yes"}, [("user", {})], "continue_final_message must be true or false")])
@pytest.mark.parametrize("path", [CHAT, "/chat/completions", "/apply-template"])
def test_what_cannot_be_continued_is_400(url, path, more, messages, words):
    status, _, body = call(url, path,
                           {"messages": [{"role": role, "content": "x", **extra} for role, extra in messages],
                            **more})
    assert status == 400 and words in (body.get("detail") or body["error"]["message"])


def test_json_mode_gives_json(url):
    body = ask(url, response_format={"type": "json_object"}, temperature=1, seed=2, max_tokens=200)
    assert body["choices"][0]["finish_reason"] == "stop" and type(json.loads(content(body))) is dict


def test_a_json_schema_is_kept(url):
    """It is streamed or not, and none of it comes twice."""
    schema = {"type": "object",
              "properties": {"city": {"enum": ["Tokyo", "Kyoto"]}, "big": {"type": "boolean"}},
              "required": ["city", "big"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "city", "strict": True, "schema": schema}}
    body, chunks = ask(url, response_format=form, max_tokens=40), stream(
        url, response_format=form, max_tokens=40)
    answer = json.loads(content(body))
    assert (set(answer) == {"city", "big"} and answer["city"] in ("Tokyo", "Kyoto")
            and body["choices"][0]["finish_reason"] == "stop")
    assert joined(chunks) == content(body) == json.dumps(answer)
    cut = ask(url, response_format=form, max_tokens=40, stop=[","])["choices"][0]
    assert (cut["finish_reason"], cut["message"]["content"]) == ("stop", content(body).partition(",")[0])
    cut = ask(url, response_format=form, max_tokens=2)["choices"][0]
    assert cut["finish_reason"] == "length"


# completions


def test_a_text_completion_has_its_shape(url):
    body = ask(url, COMPLETIONS, max_tokens=1)
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert {name: body["choices"][0][name] for name in ("index", "text", "logprobs", "finish_reason")} == {
        "index": 0, "text": " Tokyo", "logprobs": None, "finish_reason": "length"}
    assert body["usage"]["prompt_tokens"] == 5


def test_a_streamed_text_completion_ends_once(url):
    chunks = stream(url, COMPLETIONS, max_tokens=4, stream_options={"include_usage": True})
    *texts, last = chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in texts) == ask(
        url, COMPLETIONS, max_tokens=4)["choices"][0]["text"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in texts] == [None] * (len(texts) - 1) + ["length"]
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 4


def test_prompts_are_texts_or_ids_one_or_many(url):
    ids = call(url, "/tokenize", {"content": "The capital of Japan is"})[2]["tokens"]
    text = ask(url, COMPLETIONS, max_tokens=3)["choices"][0]["text"]
    for prompt, count in ((ids, 1), (["The capital of Japan is"], 1), ([ids, ids], 2),
                          (["The capital of Japan is", ids], 2)):
        choices = ask(url, COMPLETIONS, prompt=prompt, max_tokens=3)["choices"]
        assert ([choice["index"] for choice in choices] == list(range(count))
                and {choice["text"] for choice in choices} == {text})
    choices = ask(url, COMPLETIONS, prompt=["One", "Two"], n=2, max_tokens=2, temperature=1,
                  seed=1)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    assert choices[2]["text"] == ask(url, COMPLETIONS, prompt="Two", max_tokens=2, temperature=1,
                                     seed=1)["choices"][0]["text"]


def test_echo_with_logprobs_scores_the_prompt(url):
    """What loglikelihood evaluations read: a null first, one number for each token, offsets into the text."""
    choice = ask(url, COMPLETIONS, echo=True, logprobs=1, max_tokens=1)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == "The capital of Japan is Tokyo" == "".join(found["tokens"])
    assert (found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
            and all(n <= 0 for n in found["token_logprobs"][1:]))
    assert [choice["text"][at:at + len(token)] for at,
            token in zip(found["text_offset"], found["tokens"])] == found["tokens"]
    assert all(token in top for token, top in zip(found["tokens"][1:], found["top_logprobs"][1:]))
    only = ask(url, COMPLETIONS, echo=True, logprobs=1, max_tokens=0)
    assert only["choices"][0]["text"] == "The capital of Japan is" and only["usage"]["completion_tokens"] == 0
    for ours, theirs in zip(only["choices"][0]["logprobs"]["token_logprobs"][1:],
                            found["token_logprobs"][1:-1], strict=True):
        assert abs(ours - theirs) < 0.05


@pytest.mark.parametrize("ending",
                         [{"stop_token_ids": [0]}, {"stop": " To"}, {"stop": "kyo"}, {"stop": "."},
                          {"logit_bias": {"2": 100}}, {}])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_echo_has_an_entry_for_every_token(url, ending, streamed):
    """Also for one that ended the answer and is not in its text, as vLLM has it: lm-eval drops the last entry
    of each choice, and without it would drop a token of the continuation that it scores."""
    ids = call(url, "/tokenize", {"content": "The capital of Japan is"})[2]["tokens"]
    drawn = ask(url, COMPLETIONS, prompt=ids, max_tokens=1, return_token_ids=True)["choices"][0]["token_ids"]
    ending = {name: drawn if name == "stop_token_ids" else value for name, value in ending.items()}
    for most in (1, 3):
        wanted = dict(prompt=[ids, ids], n=2, echo=True, logprobs=1, max_tokens=most, **ending)
        if streamed:
            choices, ends = {}, []
            for chunk in stream(url, COMPLETIONS, **wanted):
                for choice in chunk["choices"]:
                    lists = choices.setdefault(choice["index"], {})
                    for name, values in (choice["logprobs"] or {}).items():
                        lists.setdefault(name, []).extend(values)
                    ends += [choice["finish_reason"]] if choice["finish_reason"] else []
            found, count = list(choices.values()), most if set(ends) == {"length"} else None
        else:
            answer = ask(url, COMPLETIONS, **wanted)
            found = [choice["logprobs"] for choice in answer["choices"]]
            count = answer["usage"]["completion_tokens"] / 4
        assert len(found) == 4
        for lists in found:
            sizes = {len(values) for values in lists.values()}
            assert sizes == {len(found[0]["tokens"])} and min(sizes) > len(ids)
            assert count is None or sizes == {len(ids) + count}
            assert lists["text_offset"] == sorted(lists["text_offset"]) and lists["token_logprobs"][-1] <= 0


def test_offsets_count_special_tokens_in_prompts(url):
    """They count where the prompt spells them."""
    choice = ask(url, COMPLETIONS, prompt="<|im_start|>user\nOne é<|im_end|>\ntwo", echo=True, logprobs=0,
                 max_tokens=2)["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert ("<|im_end|>" in tokens
            and [choice["text"][a:b] for a, b in zip(offsets, [*offsets[1:], None])] == tokens)


def test_a_likelier_text_scores_higher(url):
    """Batches score as singles do."""
    prompts = ["The capital of Japan is Tokyo.", "The capital of Japan is Banana."]
    wanted = dict(echo=True, logprobs=1, max_tokens=1)
    scores = [sum(choice["logprobs"]["token_logprobs"][1:-1])
              for choice in ask(url, COMPLETIONS, prompt=prompts, **wanted)["choices"]]
    singles = [sum(ask(url, COMPLETIONS, prompt=prompt,
                       **wanted)["choices"][0]["logprobs"]["token_logprobs"][1:-1]) for prompt in prompts]
    assert scores[0] > scores[1] + 5 and all(abs(a - b) < 0.2 for a, b in zip(scores, singles))


@pytest.mark.parametrize("change, code", [
    ({"suffix": "end"}, "infill_not_supported"), ({"best_of": 3}, "unsupported_best_of"),
    ({"prompt": [[]]}, "invalid_value"),
    ({"prompt": [1, "a"]}, "invalid_value"), ({"prompt": [10**8]}, "invalid_value"),
    ({"prompt": []}, "invalid_value"), ({"prompt": 5}, "invalid_value"),
    ({"prompt": ["x"] * 129}, "invalid_value"), ({"prompt": ["x"] * 65, "n": 2}, "limit_exceeded"),
    ({"logprobs": 21}, "invalid_value"), ({"max_tokens": -2}, "invalid_value")])
def test_completions_that_cannot_be_are_400(url, change, code):
    status, error = refused(url, COMPLETIONS, **change)
    assert (status, error["code"]) == (400, code)
    assert refused(url, COMPLETIONS, **change, stream=True)[0] == 400


@pytest.mark.parametrize("prompts, change", [(1, {"best_of": 1}), (1, {"best_of": 2, "n": 2}), (128, {})])
def test_as_many_completions_as_may_be_are_given(url, prompts, change):
    """best_of is n, which is 1 if it is not given; 128 prompts are as many as may be."""
    choices = ask(url, COMPLETIONS, prompt=["x"] * prompts, max_tokens=1, **change)["choices"]
    assert len(choices) == prompts * change.get("n", 1)


# tokenize, detokenize, apply-template


@pytest.mark.parametrize("text", ["Hello world", "日本語 😀", "<|im_end|> and \x00", ""])
def test_tokens_and_text_go_both_ways(url, text):
    tokens = call(url, "/tokenize", {"content": text})[2]["tokens"]
    assert call(url, "/detokenize", {"tokens": tokens})[2] == {"content": text, "prompt": text}
    pieces = call(url, "/tokenize", {"content": text, "with_pieces": True})[2]["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    data = b"".join(piece["piece"].encode() if isinstance(piece["piece"], str) else bytes(piece["piece"])
                    for piece in pieces)
    assert data.decode() == text


def test_special_tokens_in_a_text_may_be_text(url):
    parsed, plain = (call(url, "/tokenize", {"content": "a<|im_end|>", "parse_special": special})[2]["tokens"]
                     for special in (True, False))
    assert len(parsed) == 2 < len(plain)
    assert call(url, "/tokenize", {"content": ["a", parsed[1]]})[2]["tokens"] == parsed


def test_a_chat_is_computed_from_its_template_s_text(url):
    prompt = call(url, "/apply-template", {"messages": HI})[2]["prompt"]
    assert prompt.endswith(
        "<|im_start|>user\nWhat is the capital of Japan?<|im_end|>\n<|im_start|>assistant\n")
    body = ask(url, COMPLETIONS, prompt=prompt)
    assert (body["choices"][0]["text"] == "The capital of Japan is Tokyo."
            and body["usage"]["prompt_tokens"] == ask(url)["usage"]["prompt_tokens"])


@pytest.mark.parametrize("path, body",
                         [("/tokenize", {}), ("/tokenize", {"content": 5}), ("/tokenize", {"content": [-1]}),
                          ("/detokenize", {}),
                                        ("/detokenize", {"tokens": [10**8]}),
                                        ("/detokenize", {"tokens": "x"}),
                                        ("/apply-template", {"messages": "x"})])
def test_nonsense_to_the_tokenizer_is_400(url, path, body):
    status, _, answer = call(url, path, body)
    assert status == 400 and answer["error"]["param"]


def test_a_token_has_the_same_characters_everywhere():
    """It has them as a log probability and as a piece."""
    tokenizer = Letters()
    for token, text in ((97, "a"), (0xc3, None), (256, "<|end|>")):
        spelled = tokenizer.shown_bytes(token)
        assert (tokenizer.whole_text(token) == text
                and piece_body(tokenizer, token) == (list(spelled) if text is None else text))
        assert token_text(tokenizer, token) == (
            text or "bytes:\\xc3", None if token == 256 else list(spelled))
