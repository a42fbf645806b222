"""Every field that a body may have works, is refused, or is named in the header X-Ignored-Fields."""

from dataclasses import replace

import pytest

from chatlm.common.errors import RequestError
from chatlm.front.api.dialects.ollama import OLLAMA_OPTIONS
from chatlm.front.api.dialects.own import DRAWING_FIELDS, read_variants
from chatlm.front.api.reading import read_answer
from chatlm.front.front import ROUTES
from annex_bodies import HUB_FIELDS, STORE_FIELDS
from fake_pool import FakePool, serving
from sent_bodies import BASE, FLAT_TOOL, FORM, HI, KNOWN, OPTIONS, SCHEMA, TOOL, VALUES, parsed, sent
from spoken_paths import BODY_FIELDS


COMES_BACK = "metadata", "user", "safety_identifier", "prompt_cache_key"


@pytest.mark.parametrize("route, name", [
    # which `Bodies.resolve`, `Keeper` and `Rounds` read
    (route, field.name) for route, fields in BODY_FIELDS.items() for field in fields
    if field.name not in ("model", "store", "max_tool_calls", "mcp_servers")
    and (route, field.name) != ("/v1/responses/input_tokens", "truncation")])  # if it does not fit
def test_a_known_field_has_an_effect_or_is_refused(route, name):
    """A field of the tables changes the request or is refused."""
    without, body = sent(route, name)
    before, _ = parsed(route, without)
    try:
        after, ignored = parsed(route, body)
    except RequestError as error:
        assert name in str(error), error
        return
    # to come back in the response is not all that the others do
    if route == "/v1/responses" and name not in COMES_BACK:
        before, after = replace(before, repeated=b""), replace(after, repeated=b"")
    assert before != after, "it is accepted and changes nothing"
    assert name not in ignored


@pytest.mark.parametrize("name", [field.name for field in OLLAMA_OPTIONS])
def test_ollama_s_options_change_the_request(name):
    (before, _), body = parsed("/api/chat", BASE["/api/chat"]), {"options": {name: (VALUES | OPTIONS)[name]}}
    after, ignored = parsed("/api/chat", BASE["/api/chat"] | body)
    assert before != after and ignored == ()


@pytest.mark.parametrize("name", [field.name for field in DRAWING_FIELDS])
def test_a_variant_s_field_changes_its_own_request(name):
    """It changes no other."""
    body = {"messages": HI, "seed": 7, "variants": [{}, {name: VALUES[name]}, {}]}
    (first, second, third), of_all = (read_variants(asked, range(3), 7, KNOWN)
                                      for asked in (body, body | {"variants": [{}] * 3, name: VALUES[name]}))
    assert first == third != second == of_all[1]
    assert read_variants(body, [1], 7, KNOWN) == [second]


def test_each_route_with_a_body_is_in_the_tables():
    assert ({route.pattern for route in ROUTES if route.fields} == {*BODY_FIELDS, *HUB_FIELDS, *STORE_FIELDS}
            and set(BODY_FIELDS) == set(BASE))


# What the clients of the five APIs, and those of vLLM and llama-server, may send and this server does not
# read.
SAMPLERS = {"mirostat": 2, "mirostat_tau": 5, "mirostat_eta": 0.1, "tfs_z": 0.5,
            "dynatemp_range": 0.5, "top_a": 0.1, "repeat_last_n": 64, "samplers": ["top_k"],
            "smoothing_factor": 0.2}
VLLM = {"use_beam_search": True, "length_penalty": 1.2, "include_stop_str_in_output": True,
        "spaces_between_special_tokens": False, "truncate_prompt_tokens": 5, "allowed_token_ids": [1],
        "bad_words": ["x"],
        "add_special_tokens": True, "documents": [], "chat_template": "{{ x }}", "mm_processor_kwargs": {},
        "request_id": "x", "cache_salt": "x",
        "return_tokens_as_token_ids": True, "kv_transfer_params": {}, "vllm_xargs": {}}
LLAMA = {"n_predict": 5, "cache_prompt": False, "n_probs": 2, "id_slot": 0, "n_keep": 1,
         "t_max_prompt_ms": 9, "timings_per_token": True,
         "return_progress": True, "reasoning_format": "none", "parse_tool_calls": False,
         "post_sampling_probs": True, "lora": []}
OPENAI = {"user": "me", "store": True, "metadata": {"a": "b"}, "service_tier": "flex",
          "safety_identifier": "x", "prompt_cache_key": "x",
          "verbosity": "low",
          "prediction": {"type": "content", "content": "x"}, "web_search_options": {},
          "audio": {"voice": "x"}, "moderation": {}}
UNREAD = {
    "/chat/completions": {"stream": False, "n": 2, "tools": [TOOL], "response_format": FORM,
                          "presence_penalty": 1, **SAMPLERS},
    "/v1/chat/completions": {**OPENAI, **VLLM, **LLAMA, **SAMPLERS},
    "/v1/completions": {"user": "me", "truncate": "oldest", "reasoning_effort": "low", "tools": [TOOL],
                        **VLLM, **LLAMA, **SAMPLERS},
    "/v1/embeddings": {"user": "me", "allowed_token_ids": [1], "temperature": 1},
    "/v1/responses": {
        "n": 2, "service_tier": "flex", "stream_options": {}, "context_management": [],
        "reasoning_effort": "low", **SAMPLERS},
    "/v1/responses/input_tokens": {
        "temperature": 1, "text": {"format": {"type": "text"}}, "parallel_tool_calls": True,
        "personality": "friendly"},
    "/v1/messages": {"metadata": {"user_id": "x"}, "service_tier": "auto", "container": "x",
                     "context_management": {},
                     "inference_geo": "x", "cache_control": {"type": "ephemeral"}, "speed": "fast", "n": 2,
                     **SAMPLERS},
    "/v1/messages/count_tokens": {"max_tokens": 5, "temperature": 1, "output_format": FORM},
    "/api/chat": {"keep_alive": "5m", "shift": True, "temperature": 0.5},
    "/api/generate": {"keep_alive": "5m", "template": "{{ .Prompt }}", "context": [1, 2], "truncate": True,
                      "width": 5},
    "/api/embed": {"keep_alive": "5m", "options": {}, "encoding_format": "float"},
    "/api/embeddings": {"keep_alive": "5m", "options": {}, "input": "x", "truncate": True},
    "/embed": {"encoding_format": "float", "pooling": "mean"},
    "/v1/rerank": {"max_chunks_per_doc": 2, "rank_fields": ["text"], "user": "me"},
    "/v1/score": {"mm_processor_kwargs": {}, "truncate_prompt_tokens": 5},
    "/api/show": {"verbose": True}, "/tokenize": {"add_bos": True},
    "/detokenize": {"skip_special_tokens": True},
    "/apply-template": {"max_tokens": 5}}
MEMBERS = [     # (route, what is added to the body, the members that are named)
    ("/v1/chat/completions",
     {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
     ["stream_options.continuous_usage_stats"]),
    ("/v1/chat/completions", {"chat_template_kwargs": {"city": "Rome", "river": "Tiber"}},
     ["chat_template_kwargs.river"]),
    ("/v1/chat/completions", {"chat_template_kwargs": {"messages": [], "city": "Rome", "add_generation_prompt": False}},
     ["chat_template_kwargs.messages", "chat_template_kwargs.add_generation_prompt"]),
    ("/v1/responses", {"reasoning": {"effort": "low", "summary": "auto"}}, ["reasoning.summary"]),
    ("/v1/responses", {"text": {"verbosity": "low"}}, ["text.verbosity"]),
    ("/v1/messages", {"output_config": {"effort": "low", "style": "x"}}, ["output_config.style"]),
    ("/api/chat", {"options": {"num_ctx": 9, "temperature": 1, "mirostat": 2, "stop": None}},
     ["options.num_ctx", "options.mirostat"])]
BESIDE_OTHERS = [       # (route, body, the fields that have no effect in it)
    ("/v1/chat/completions", {"response_format": FORM, "ignore_eos": True, "min_tokens": 5, "stop": ["x"]},
     ["ignore_eos", "min_tokens"]),
    ("/v1/chat/completions", {"tools": [TOOL], "tool_choice": "required", "min_tokens": 5, "stop": ["x"]},
     ["min_tokens", "stop"]),
    ("/v1/messages",
     {"tools": [{"name": "add", "input_schema": SCHEMA}], "tool_choice": {"type": "any"},
      "stop_sequences": ["x"]}, ["stop_sequences"]),
    ("/v1/responses", {"tools": [FLAT_TOOL], "tool_choice": "required", "stop": "x", "stop_token_ids": [256]},
     ["stop", "stop_token_ids"]),
    # it may call no function
    ("/v1/chat/completions", {"tools": [TOOL], "stop": ["x"], "stop_token_ids": [256]}, []),
    ("/v1/chat/completions", {"response_format": FORM, "stop_token_ids": [256]}, ["stop_token_ids"]),
    # a letter may be drawn, and ends it
    ("/v1/chat/completions", {"guided_regex": "a+", "stop_token_ids": [256, 97]}, []),
    ("/v1/completions", {"guided_choice": ["a"], "stop_token_ids": [256], "stop": "x"}, ["stop_token_ids"]),
    ("/v1/completions", {"stop_token_ids": [256]}, []),
    ("/v1/chat/completions",
     {"resumable": True, "progress": "true", "stream_options": {"include_usage": True}},
     ["resumable", "progress", "stream_options"]),
    ("/v1/chat/completions",
     {"resumable": False, "progress": "false", "ignore_eos": False, "reasoning_effort": "none"}, []),
    ("/v1/chat/completions", {"max_tokens": 5, "max_completion_tokens": 6}, ["max_tokens"]),
    ("/v1/chat/completions", {"tools": [TOOL], "functions": [TOOL["function"]]}, ["tools"]),
    ("/v1/responses", {"truncate": "oldest", "truncation": "disabled"}, ["truncate"]),
    ("/v1/messages", {"stop": "x", "stop_sequences": ["y"]}, ["stop"]),
    ("/v1/responses", {"include": ["reasoning.encrypted_content", "x y"], "top_logprobs": 2},
     ["top_logprobs", "include.reasoning.encrypted_content", "include.xy"]),
    ("/v1/responses", {"prompt_cache_key": "x", "safety_identifier": "y",
                       "prompt_cache_options": {"mode": "explicit", "ttl": "12h", "prewarm": False}},
     ["prompt_cache_options.mode", "prompt_cache_options.ttl"]),
    # without --database
    ("/v1/responses", {"store": True}, ["store"]), ("/v1/responses", {"store": False}, []),
    # a body of Chat Completions
    ("/chat/completions", {"model": "fake-model", "n": 2, "mirostat": 1}, ["mirostat"]),
    ("/v1/rerank", {"raw_scores": True, "return_text": True, "truncate": True},
     ["raw_scores", "return_text", "truncate"]),
    ("/rerank", {"documents": None, "texts": ["a"], "return_documents": True}, ["return_documents"]),
    ("/v1/embeddings", {"input_type": "document"}, ["input_type"]),
    ("/v1/embeddings", {"input_type": "query"}, []),
    ("/api/chat", {"top_logprobs": 3}, ["top_logprobs"]),
    ("/api/generate", {"top_logprobs": 3, "logprobs": False}, ["top_logprobs"]),
    ("/api/generate", {"raw": True, "system": "Be brief.", "think": True}, ["system", "think"])]
THINKING = [
    ("/v1/chat/completions", {"reasoning_effort": "low"}, "reasoning_effort"),
    ("/v1/responses", {"reasoning": {"effort": "low"}}, "reasoning.effort"),
    ("/v1/messages", {"thinking": {"type": "adaptive"}}, "thinking.type"),
    ("/v1/chat/completions", {"enable_thinking": True}, "enable_thinking"),
    ("/chat/completions", {"thinking": {"type": "enabled"}}, "thinking.type"),
    ("/v1/messages", {"output_config": {"effort": "low"}}, "output_config.effort"),
    ("/api/chat", {"think": "high"}, "think"),
    ("/chat/completions", {"thinking_budget": 5}, "thinking_budget"),
    ("/v1/chat/completions", {"reasoning_effort": 5}, "reasoning_effort"),
    ("/v1/chat/completions", {"chat_template_kwargs": {"thinking_budget": 5}},
     "chat_template_kwargs.thinking_budget"),
    ("/v1/responses", {"reasoning": {"max_tokens": 5}}, "reasoning.max_tokens"),
    ("/api/chat", {"think": 5}, "think")]


@pytest.mark.parametrize("route", UNREAD)
def test_a_field_that_nothing_reads_is_named(route):
    assert not set(UNREAD[route]) & {field.name for field in BODY_FIELDS[route]}, "one of them is read"
    assert parsed(route, BASE[route] | UNREAD[route])[1] == tuple(UNREAD[route])
    assert parsed(route, BASE[route] | dict.fromkeys(UNREAD[route]))[1] == ()       # null is absent


@pytest.mark.parametrize("route, more, names", MEMBERS + BESIDE_OTHERS)
def test_what_other_fields_make_useless_is_named(route, more, names):
    """It has no effect beside them."""
    assert parsed(route, BASE[route] | more)[1] == tuple(names)


@pytest.mark.parametrize("route, more, name", THINKING)
def test_an_effort_that_no_template_knows_is_named(route, more, name):
    body = BASE[route] | more
    assert read_answer(route, body, KNOWN).ignored_fields == ()
    assert read_answer(route, body, replace(KNOWN, template="{{ messages }}")).ignored_fields == (name,)


async def test_the_header_names_ignored_fields_everywhere(client):
    """Streams, whole answers and large bodies have it."""
    async with serving(FakePool()) as url:
        async def header(path, **more):
            async with client.post(url + path, json=BASE[path] | more) as response:
                assert response.status == 200, await response.text()
                return response.headers.get("X-Ignored-Fields")
        large = {"large": "x" * 70_000}         # is read in a sandbox
        assert await header("/v1/responses", n=2, top_logprobs=3) == "n, top_logprobs"
        assert await header("/v1/chat/completions", stream=True,
                            **{"mirostat": 2, "odd\r\nX-Evil: 1": 1}) == "mirostat, oddX-Evil1"
        assert await header("/v1/chat/completions", **large) == "large" == await header("/tokenize", **large)
        assert await header("/tokenize") is None and await header("/v1/chat/completions") is None
        many = await header("/v1/chat/completions", **{f"field{number}": 1 for number in range(10_000)})
        assert many.startswith("field0, field1, ") and len(many) <= 1000
        async with client.post(url + "/v1/messages/count_tokens",
                               json={"messages": HI, "model": "strange"}) as response:
            assert response.status == 404 and "strange" in (await response.json())["error"]["message"]
