"""Every field that a body may have works, is refused, or is named in the header X-Ignored-Fields."""

import asyncio
import json
from dataclasses import replace

import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import RequestError
from chatlm.common.messages.protocol import Known
from chatlm.common.messages.requests import Embedder, InfillTokens
from chatlm.common.text.tokenizer import Tokenizer
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.dialects.ollama import OLLAMA_OPTIONS
from chatlm.front.api.dialects.own import DRAWING_FIELDS, read_variants
from chatlm.front.api.reading import read_answer, read_text
from chatlm.front.api.kept_fields import STORE_FIELDS
from chatlm.front.api.tables import HUB_FIELDS
from chatlm.front.front import ROUTES
from fake_pool import FakePool, Letters, serving
from spoken_paths import ANSWERS, BODY_FIELDS

KNOWN = Known(Settings(seed=7), "tagged", template="{{ reasoning_effort }} {{ city }} </think>",
              never_written=frozenset({256}),
              infill=InfillTokens(1, 2, 3))
EMBEDS, RANKS = (replace(KNOWN, embedder=embedder) for embedder in (
    Embedder("mean", 8, 64, least=2, prompts=(("query", "q: "), ("document", ""))),
    Embedder("rank", 1, 64, form="{instruction} {query} {document}", instruction="Find it")))
RERANKS = "/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking"
SCORES = "/v1/score", "/score"
WHICH = dict.fromkeys(("/v1/embeddings", "/api/v0/embeddings", "/embed", "/api/embed", "/api/embeddings"),
                      EMBEDS) | dict.fromkeys((*RERANKS, *SCORES), RANKS)
HI = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
FORM = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}
BASE = {        # the least that each route reads, from which a field may then be changed
    "/chat/completions": {"messages": HI}, "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "Hi"},
    "/infill": {"input_prefix": "Hi", "input_suffix": "you"},
    "/v1/embeddings": {"input": "Hi"}, "/v1/responses": {"input": "Hi"},
    "/v1/responses/input_tokens": {"input": "Hi"},
    "/v1/messages": {"messages": HI, "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": HI}, "/api/chat": {"messages": HI},
    "/api/generate": {"prompt": "Hi"},
    "/api/embed": {"input": "Hi"}, "/api/embeddings": {"prompt": "Hi"}, "/api/show": {},
    "/tokenize": {"content": "Hi<|end|>"}, "/detokenize": {"tokens": [72]},
    "/apply-template": {"messages": HI},
    "/embed": {"inputs": "Hi"},
    **{route: {"query": "Hi", "documents": ["Ho", {"text": "Hu"}]} for route in RERANKS},
    **{route: {"text_1": "Hi", "text_2": ["Ho"]} for route in SCORES},
    "/models/load": {}, "/models/unload": {},
    "/v1/compare": {"messages": HI, "models": ["a", "b"], "seed": 7}}
LM_STUDIO = {route.replace("/v1", "/api/v0"): route
             for route in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")}
BASE |= {route: BASE[same] for route, same in LM_STUDIO.items()}
FLAT_TOOL = {"type": "function", "name": "add", "parameters": SCHEMA}
BESIDE = {      # what a field needs beside it to mean something
    "top_logprobs": {"logprobs": True, "include": ["message.output_text.logprobs"]},
    "tool_choice": {"tools": [TOOL]}, "parallel_tool_calls": {"tools": [TOOL]},
    "function_call": {"functions": [TOOL["function"]]}, "stream_options": {"stream": True},
    "resumable": {"stream": True},
    "progress": {"stream": True}, "best_of": {"n": 2}, "prompt_logprobs_start": {"prompt_logprobs": 1},
    **dict.fromkeys(("raw_scores", "return_text"), {"documents": None, "texts": ["a", "b"]}),
    "continue_final_message": {"messages": [*HI, {"role": "assistant", "content": "Well"}]}}
VALUES = {      # a value of each field that differs from what holds without it
    "messages": [{"role": "user", "content": "Other"}], "prompt": "Other", "input": "Other",
    "content": "Other", "tokens": [73],
    "model": "strange", "name": "strange", "stream": True, "temperature": 0.5, "max_tokens": 7, "top_k": 3,
    "top_p": 0.5, "min_p": 0.5, "seed": 8,
    "continue_final_message": True, "add_generation_prompt": False, "reasoning_effort": "low",
    "chat_template_kwargs": {"city": "Rome"}, "thinking_budget": 5,
    "stop": "x", "ignore_eos": True, "stop_on_repetition": True, "skip_special_tokens": False,
    "priority": "low", "prompt_cache_retention": "in_memory", "truncate": "oldest", "resumable": True, "progress": True, "stop_token_ids": [5],
    "min_tokens": 3, "presence_penalty": 1, "frequency_penalty": 1, "repetition_penalty": 1.5,
    "logit_bias": {"5": 3}, "top_n_sigma": 1, "typical_p": 0.9,
    "xtc_probability": 0.5, "xtc_threshold": 0.2, "dry_multiplier": 0.8, "dry_base": 2,
    "dry_allowed_length": 3,
    "dry_penalty_last_n": 9, "dry_sequence_breakers": ["x"],
    "stream_options": {"include_usage": True}, "n": 2, "max_completion_tokens": 7, "modalities": ["audio"],
    "logprobs": True, "top_logprobs": 2,
    "tools": [TOOL], "tool_choice": "none", "parallel_tool_calls": False, "functions": [TOOL["function"]],
    "function_call": "none",
    "response_format": FORM, "guided_json": SCHEMA, "guided_regex": "a+", "guided_choice": ["a"],
    "guided_grammar": 'start: "a"',
    "grammar": 'root ::= "a"', "json_schema": SCHEMA, "structured_outputs": {"regex": "a+"},
    "guided_whitespace_pattern": " ",
    "structural_tag": {}, "regex": "a", "ebnf": "a", "echo": True, "best_of": 1, "suffix": "x",
    "encoding_format": "base64", "pooling": "last",
    "dimensions": 4, "instructions": "Be brief.", "max_output_tokens": 7, "reasoning": {"effort": "low"},
    "text": {"format": {"type": "json_object"}},
    "truncation": "auto", "include": ["message.output_text.logprobs"], "metadata": {"a": "b"}, "user": "me",
    "safety_identifier": "me", "prompt_cache_key": "x", "prompt_cache_options": {"prewarm": True},
    "previous_response_id": "x", "conversation": "x", "background": True,
    "system": "Be brief.", "stop_sequences": ["x"], "thinking": {"type": "enabled"}, "enable_thinking": False,
    "output_config": {"format": FORM | {"schema": SCHEMA}},
    "output_format": {"type": "json_schema", "schema": SCHEMA}, "format": "json", "think": True,
    "options": {"temperature": 0.5}, "raw": True, "images": ["x"], "add_special": True,
    "parse_special": False,
    "with_pieces": True, "prefix_token_ids": [72], "return_token_ids": True, "input_prefix": "Other",
    "input_suffix": ["a", 5], "input_extra": [{"text": "x"}],
    "query": "Other", "documents": ["Other"], "texts": ["Other"], "inputs": "Other", "text_1": "Other",
    "text_2": ["Other", "b"], "queries": "Other",
    "top_n": 1, "return_documents": True, "max_tokens_per_doc": 3, "use_activation": False,
    "instruction": "Other", "raw_scores": True, "return_text": True,
    "prompt_name": "query", "input_type": "search_query", "embd_normalize": -1, "normalize": False,
    "truncate_prompt_tokens": 5,
    "prompt_logprobs": 2, "prompt_logprobs_start": 1, "logprob_token_ids": [5], "add_special_tokens": True,
    "return_token_strs": True, "repeat_penalty": 1.5, "n_predict": 7, "n_probs": 2, "n_indent": 4,
    "t_max_predict_ms": 500,
    "return_tokens": True, "response_fields": ["content"], "models": ["a", "c"], "steps": [1, 2],
    "variants": [{}, {"seed": 1}]}
OTHERS = {      # where a field has another type in one of the routes
    ("/v1/responses", "tools"): [FLAT_TOOL], ("/v1/responses/input_tokens", "tools"): [FLAT_TOOL],
    ("/v1/messages", "tools"): [{"name": "add", "input_schema": SCHEMA}],
    ("/v1/messages/count_tokens", "tools"): [{"name": "add", "input_schema": SCHEMA}],
    ("/v1/messages/count_tokens", "output_config"): {"effort": "low"},
    ("/v1/messages", "tool_choice"): {"type": "none"},
    ("/v1/messages/count_tokens", "tool_choice"): {"type": "none"},
    ("/embed", "truncate"): False, ("/api/chat", "truncate"): False,
    **{(route, "truncate"): False for route in RERANKS},
    ("/v1/completions", "logprobs"): 2, ("/api/v0/completions", "logprobs"): 2,
    ("/api/embed", "truncate"): False, ("/api/chat", "stream"): False, ("/api/generate", "stream"): False}
OPTIONS = {"repeat_penalty": 1.5, "num_predict": 7}


def sent(route, name):
    """(A body without the field, the same body with it)."""
    body = ({} if (route, name) == ("/tokenize", "continue_final_message") else BASE[route]) | BESIDE.get(
        # it has no content there
        name, BESIDE["raw_scores"] if (name, route in RERANKS) == ("truncate", True) else {})
    if "tools" in body:
        body["tools"] = OTHERS.get((route, "tools"), [TOOL])
    return body, body | {name: OTHERS.get((route, name), VALUES[name])}


class Teller(Letters):
    """A tokenizer for the routes that show what it does: its prompt says all that it is told."""

    tool_format = "tagged"
    encode_with_specials = Tokenizer.encode_with_specials

    def __init__(self):
        super().__init__()
        self.spec = replace(self.spec, add_bos=True, bos_token=256)

    def render(self, messages, tools=(), options=None):
        return self.encode(f"{messages} {tools} {options}")


def parsed(route, body):
    """What becomes of a body, without what it says of fields that have no effect; and those fields."""
    if route in ANSWERS:
        answer = read_answer(route, body, WHICH.get(route, KNOWN))
        return replace(answer, ignored_fields=()), answer.ignored_fields
    ignored, _, text = asyncio.run(read_text(route, body, KNOWN, PromptMaker(Teller(), 4096))).partition(
        b"\n")
    if route == "/v1/compare":          # what its models are asked, they read themselves
        wanted = json.loads(text)
        text = wanted, read_variants(body, range(len(wanted["variants"])), wanted["seed"], KNOWN)
    return text, tuple(filter(None, ignored.decode().split(", ")))


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
