"""The bodies of the answering routes: the least of each, a value of each field, and what is read of a body."""

import asyncio
import copy
import json
from dataclasses import replace

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Known
from chatlm.common.messages.requests import Embedder, InfillTokens
from chatlm.common.text.tokenizer import Tokenizer
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.dialects.own import read_variants
from chatlm.front.api.reading import read_answer, read_text
from fake_pool import Letters
from spoken_paths import ANSWERS

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


# of null and of what is empty
# what is in these is a client's own: a schema, what a template reads, what a call has
THEIRS = {"parameters", "schema", "input_schema", "guided_json", "json_schema", "metadata", "chat_template_kwargs",
          "arguments", "logit_bias", "structural_tag", "input", "attributes"}
STRANGE = [None, "", [], {}, 0, -1, False, True, 1.5, 1e308, "x", [None], [[]], [{}], {"": None}, {"type": None},
           [""], [0], {"a": {"b": None}}]


def members_of(value, above=()):
    """The paths of the members of objects in a value, but for what is a client's own."""
    if isinstance(value, dict):
        for name, member in value.items():
            yield (*above, name)
            if name not in THEIRS:
                yield from members_of(member, (*above, name))
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from members_of(each, (*above, index))


def changed(body, path, change):
    """A copy, of which the object that has the member is changed: `change` gets it, and the member's name."""
    body = copy.deepcopy(body)
    within = body
    for step in path[:-1]:
        within = within[step]
    change(within, path[-1])
    return body


def nulled(body, path):
    return changed(body, path, lambda within, last: within.update({last: None}))


def lacking(body, path):
    return changed(body, path, lambda within, last: within.pop(last))


def replaced(body, path, value):
    return changed(body, path, lambda within, last: within.update({last: value}))
