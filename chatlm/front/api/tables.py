"""The fields that bodies of several dialects have, and those of routes that are of no dialect."""

from __future__ import annotations

import math

from chatlm.common.config import LIMITS
from chatlm.common.messages.requests import SAMPLING_NAMES
from chatlm.front.api import idle
from chatlm.front.api.field_types import (
    CAP, EFFORT, FOUR_STOPS, INTEGER, LOGIT_BIAS, NUMBER, OBJECT, OPENAI_MESSAGES, PRIORITY, SEED, STOP,
    STOP_TOKENS, SWITCH, TEXT, TOKENS, TOP_K, TOP_LEVEL_THINKING)
from chatlm.front.api.fields import (
    A_TEXT, SOME_OBJECTS, Field, FieldType, as_list, list_schema)


SOME_TOOLS = Field(
    "tools", FieldType("a list of objects", SOME_OBJECTS, tuple),
    "functions the model may call; with `defer_loading: true` from where a message refers to them; tools of "
    "other types are ignored, and named in the header X-Ignored-Tools")
MODEL = Field("model", TEXT, "one of the served models; absent, empty or `default`: the default one")
PARALLEL = Field("parallel_tool_calls", SWITCH,
                 "false: at most one call; true: several, even where tool_choice requires calls")
STOPS = Field("stop", STOP, "strings that end the answer; searched for in its content, not in calls",
              fills="params", idle={"": idle.in_required_calls})
IGNORE_EOS = Field(
    "ignore_eos", SWITCH, "do not let the model end the answer before max_tokens; ignored if a format or a "
    "required call decides where it ends", fills="params", idle={"": idle.under_a_grammar})
REPETITION = Field(
    "stop_on_repetition", SWITCH,
    "end the answer where it only repeats itself; its stop_reason then is `repetition`",
    fills="params", idle={"": idle.under_a_grammar})
LOW = Field("priority", PRIORITY, "`low`: wait as long as any other request waits")
TRUNCATE = Field(
    "truncate", FieldType('"oldest" or "none"', {"enum": ["oldest", "none"]}, "oldest".__eq__),
    "`oldest`: drop the oldest turns if not all fit; the timings say how many messages were dropped",
    fills="request")
RETENTION = FieldType('"in_memory" or "24h"', {"enum": ["in_memory", "in-memory", "24h"]},
                      lambda value: value != "24h")
TEMPORARY = Field(
    "prompt_cache_retention", RETENTION, "`in_memory`: nothing of this prompt and its answer stays here when "
    "it has ended, neither in --prefix-store nor among what drafts come from nor in the log; `24h`: as usual",
    means="temporary", fills="params")
COMMON_FIELDS = (  # for every route that generates
    STOPS,
    Field("skip_special_tokens", SWITCH,
          "false: the answer's text has the names of special tokens; in the assistant's messages the names "
          "of nanochat's calculator tokens are read as these tokens", fills="params"),
    IGNORE_EOS,
    REPETITION,
    LOW,
    TRUNCATE,
    TEMPORARY,
    Field("resumable", SWITCH, "number the events of a stream; GET /v1/streams/{id} continues one that broke "
                               "off", fills="request", idle={"": idle.without_stream}),
    Field("progress", SWITCH, "begin a stream with events that tell the place in the queue, the tokens of "
                              "the prompt, and how many of these are computed", fills="params",
          idle={"": idle.without_stream}),
)

IDLE_THINKING = {"budget_tokens": idle.without_thoughts, "type": idle.without_thinking}
SWITCHES = (  # other names of `chat_template_kwargs.enable_thinking`
    Field("enable_thinking", SWITCH, "whether the model thinks, if its template supports that",
          idle={"": idle.without_thinking}),
    Field("thinking", TOP_LEVEL_THINKING, "the same; `budget_tokens` means thinking_budget",
          idle=IDLE_THINKING),
)
TEMPLATE_OPTIONS = (  # how a conversation becomes a prompt
    Field("continue_final_message", SWITCH, "true: continue the last message, an assistant's, instead of "
          "answering; `prefix: true` in that message means the same"),
    Field("add_generation_prompt", SWITCH, "false: do not begin an answer after the last message"),
    Field("reasoning_effort", EFFORT,
          "how much the model thinks, if its template supports that; a number means thinking_budget",
          idle={"": idle.without_thinking}),
    Field("chat_template_kwargs", OBJECT, "further variables for the template, such as `enable_thinking`; "
                                          "`thinking_budget` in it means the field",
          idle={"thinking_budget": idle.without_thoughts}),
    Field("thinking_budget", INTEGER, "most tokens that the model thinks, at most max_tokens; 0: it does not",
          0, math.inf, idle={"": idle.without_thoughts}),
    *SWITCHES,
)

PREFIX = Field("prefix_token_ids", TOKENS, "token ids with which the answer begins, as if they had been "
                                           "drawn; their text comes first, and max_tokens counts them",
               fills="request")
BREAKERS = FieldType("a list of at most 64 strings, none above 40 characters",
                     list_schema(A_TEXT | {"maxLength": 40}, maxItems=64),
                     lambda value: tuple(as_list(value)))
STOP_IDS = Field("stop_token_ids", STOP_TOKENS, "tokens that end the answer", fills="params",
                 idle={"": idle.never_written})
MIN_TOKENS = Field(
    "min_tokens", INTEGER, "do not end the answer before it has this many tokens; ignored where ignore_eos "
    "is", 0, math.inf, fills="params", idle={"": idle.under_a_grammar})
DRAWN = "for drawn answers"  # a group: a model's own defaults for these do not change greedy answers
SAMPLING_FIELDS = (  # for all routes except nanochat's, which has only those that are flags
    MODEL,
    Field("stream", SWITCH, "server-sent events"),
    Field("temperature", NUMBER, "how random the answer is; 0 = greedy", 0, 2),
    Field("top_k", TOP_K, "keep this many of the likeliest tokens; 0 or -1 = all", -1, 2**31 - 1),
    Field("top_p", NUMBER, "keep the likeliest tokens up to this total probability; 1 = off", 0, 1),
    Field("min_p", NUMBER, "drop tokens below this share of the likeliest one's probability; 0 = off", 0, 1),
    Field("seed", SEED, "same seed, same answer; random when absent", -2**63, 2**64 - 1),
    STOP_IDS,
    MIN_TOKENS,
    Field("presence_penalty", NUMBER, "lowers the logits of tokens of the answer; 0 = off", -2, 2,
          group=DRAWN),
    Field("frequency_penalty", NUMBER, "the same, for each time it occurs", -2, 2, group=DRAWN),
    Field("repetition_penalty", NUMBER, "makes tokens less likely that already occurred; 1 = off", 0.01, 10),
    Field("logit_bias", LOGIT_BIAS, "token id -> bias"),
    Field("typical_p", NUMBER, "keep the most typical tokens up to this total probability; 1 = off", 0, 1),
    Field("xtc_probability", NUMBER, "how often XTC leaves out top choices; 0 = off", 0, 1),
    Field("xtc_threshold", NUMBER,
          "of the tokens at least this likely, XTC keeps only the least likely; above 0.5 = off", 0, 1),
    Field("dry_multiplier", NUMBER, "DRY's penalty for tokens that continue a repetition; 0 = off", 0, 100),
    Field("dry_base", NUMBER, "by what factor DRY's penalty grows with each token of the repetition", 1, 100),
    Field("dry_allowed_length", INTEGER, "tokens that DRY lets repeat without a penalty", 0, 2**31 - 1),
    Field("dry_penalty_last_n", INTEGER, "tokens in which DRY looks for repetitions; 0 = off, -1 = all",
          -1, 2**31 - 1),
    Field("dry_sequence_breakers", BREAKERS, "texts that end a repetition"),
    Field("top_n_sigma", NUMBER,
          "keep tokens within this many standard deviations of the largest logit; 0 or -1 = off", -1, 1000),
    *COMMON_FIELDS,
)
SAMPLED = {field.name: field for field in SAMPLING_FIELDS if field.name in SAMPLING_NAMES}
OPENAI_SAMPLING_FIELDS = tuple(  # as OpenAI's API limits them
    field._replace(type=FOUR_STOPS) if field.name == "stop" else field for field in SAMPLING_FIELDS)

CONVERSATION = Field("messages", OPENAI_MESSAGES, "the conversation", required=True)
CHOICES = Field("n", INTEGER, "number of choices", 1, LIMITS.choices, fills="request")
TOKEN_CAPS = (
    Field("max_tokens", CAP, "most tokens of the answer; -1 = up to the context"),
    Field("max_completion_tokens", CAP, "the same; it overrides max_tokens", means="max_tokens"),
)
OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}


def meanings(fills: str) -> tuple[str, ...]:
    """The names under which an object of a request, "params" or "request", has the values of fields."""
    names = {field.means or field.name: None for field in (*SAMPLING_FIELDS, PREFIX, CHOICES)
             if field.fills == fills}
    return tuple(names)


# fields that have no effect where a grammar decides
LOOSE_ENDS = tuple(field.name for field in SAMPLING_FIELDS if field.idle.get("") is idle.under_a_grammar)
PARAMS_NAMES = meanings("params")
REQUEST_NAMES = meanings("request")
