"""The fields of each route's body."""

from __future__ import annotations

import math
from functools import partial

from chatlm.common.config import LIMITS
from chatlm.common.jsontext import is_text, whole_unicode
from chatlm.common.messages.requests import SAMPLING_FLAGS, SAMPLING_NAMES
from chatlm.front.api import idle
from chatlm.front.api.fields import (
    A_TEXT, A_TOKEN, TEXT_OR_NULL, Field, FieldType, as_count, as_list, as_prompts, list_schema,
    object_schema, refused_field, without)
from chatlm.front.api.field_types import (
    A_BUDGET, CAP, CONSTRAINT_FIELDS, LLAMA_SERVERS, EFFORT, FLAT_CHOICE, FOUR_STOPS, FUNCTIONS,
    FUNCTION_CALL, INCLUDE, INPUTS, INTEGER, LIST, LOGIT_BIAS, LOGPROBS_OF_TEXT, MESSAGES_CHOICE, METADATA,
    MIXED, NATIVE_MESSAGES, NUMBER, OBJECT, OLLAMA_FORMAT, OPENAI_MESSAGES, PRIORITY, PROMPTS, SEED, STOP,
    STOP_TOKENS, SWITCH, SYSTEM, TEXT, THINKING, TOKENS, TOOLS, TOOL_CHOICE, TOP_K, TOP_LEVEL_THINKING,
    nested_grammar, object_of, ollama_grammar, other_grammar, response_grammar, structured_outputs, thinking,
    thinking_of_member)


SOME_TOOLS = Field(
    "tools", FieldType("a list of objects", list_schema(object_schema([], type=TEXT_OR_NULL)), tuple),
    "functions the model may call; tools of other types are ignored, and named in the header "
    "X-Ignored-Tools")
MODEL = Field("model", TEXT, "one of the served models; absent, empty or `default`: the default one")
PARALLEL = Field("parallel_tool_calls", SWITCH,
                 "false: at most one call; true: several, even where tool_choice requires calls")
RESPONSE_FORMAT = Field(
    "response_format", object_of("type", "json_schema", "schema", "value")._replace(
        convert=response_grammar),
    "format of the answer, in which it ends within max_tokens: text, json_object, json_schema or regex")

EFFORT_OR_NULL = {"anyOf": [*EFFORT.schema["anyOf"], {"type": "null"}]}

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
COMMON_FIELDS = (  # for every route that generates
    STOPS,
    Field("skip_special_tokens", SWITCH,
          "false: the answer's text has the names of special tokens; in the assistant's messages the names "
          "of nanochat's calculator tokens are read as these tokens", fills="params"),
    IGNORE_EOS,
    REPETITION,
    LOW,
    TRUNCATE,
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
PROMPT_LOGPROBS = Field(
    "prompt_logprobs", INTEGER, "log-probabilities of the prompt's tokens, each with its rank and this many "
                                "alternatives, by token id as in vLLM; not in a stream", 0, 20)
LOGPROB_IDS = Field(
    "logprob_token_ids", FieldType(f"a list of at most {LIMITS.logprob_ids} token ids",
                                   list_schema(A_TOKEN, maxItems=LIMITS.logprob_ids), tuple),
    "with `logprobs`: token ids to list beside each token too, however unlikely")
STARTS = FieldType(
    "a number from 0, or a list of these with one for each prompt",
    {"anyOf": [A_TOKEN, list_schema(A_TOKEN, minItems=1, maxItems=LIMITS.choices)]},
    lambda value: tuple(value) if isinstance(value, list) else (value,))
TOKEN_IDS = Field("return_token_ids", SWITCH, "`token_ids` beside each choice: those behind its text")

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

NATIVE_FIELDS = (
    Field("messages", NATIVE_MESSAGES, "the conversation", required=True),
    Field("max_tokens", INTEGER, "most tokens of the answer", *LIMITS.max_tokens, clamp=True),
    *(field._replace(low=-math.inf, high=math.inf) if name == "seed" else
      field._replace(**dict(zip(("low", "high"), getattr(LIMITS, name, ()))), clamp=True)
      for name, field in SAMPLED.items() if name in SAMPLING_FLAGS),
    *TEMPLATE_OPTIONS, PREFIX, *COMMON_FIELDS,
)

SHARED_FIELDS = (  # for Completions and Chat Completions
    *OPENAI_SAMPLING_FIELDS,
    Field("stream_options", object_of("include_usage"), "include_usage: end with a chunk that has the usage",
          idle={"": idle.without_stream}),
    Field("n", INTEGER, "number of choices", 1, LIMITS.choices, fills="request"),
    PREFIX, TOKEN_IDS,
)

TOKEN_CAPS = (
    Field("max_tokens", CAP, "most tokens of the answer; -1 = up to the context"),
    Field("max_completion_tokens", CAP, "the same; it overrides max_tokens", means="max_tokens"),
)
OPENAI_FIELDS = (
    Field("messages", OPENAI_MESSAGES, "the conversation", required=True),
    *SHARED_FIELDS,
    *TOKEN_CAPS,
    Field("modalities", FieldType('["text"], the only modality of this server',
                                  list_schema({"enum": ["text"]})), "the kinds of output"),
    Field("logprobs", SWITCH, "log-probabilities of the answer"),
    Field("top_logprobs", INTEGER, "alternatives listed for each token", 0, 20,
          idle={"": idle.without_logprobs}),
    PROMPT_LOGPROBS, LOGPROB_IDS,
    Field("tools", TOOLS, "functions the model may call"),
    Field("tool_choice", TOOL_CHOICE, "auto, none, required, or one of the tools"),
    PARALLEL,
    Field("functions", FUNCTIONS, "like `tools`, for older clients; a call comes as `function_call`",
          means="tools"),
    Field("function_call", FUNCTION_CALL, "like `tool_choice`, for older clients", means="tool_choice"),
    RESPONSE_FORMAT, *TEMPLATE_OPTIONS, *CONSTRAINT_FIELDS,
)

COMPLETION_FIELDS = (
    Field("prompt", PROMPTS, "text, token ids, or a list of these; absent: a new document"),
    *without(SHARED_FIELDS, TRUNCATE),  # a text has no turns
    Field("max_tokens", INTEGER, "most tokens of the answer; -1 = up to the context, 0 = echo only",
          -1, math.inf),
    Field("logprobs", INTEGER, "log-probabilities, with this many alternatives", 0, 20),
    PROMPT_LOGPROBS,
    Field("prompt_logprobs_start", STARTS, "the first token that prompt_logprobs is computed for; tokens "
          "before it may come from the prefix cache, and have null"),
    LOGPROB_IDS,
    Field("echo", SWITCH, "put the prompt before the answer, in the log-probabilities too"),
    Field("best_of", INTEGER, "must equal n", 1, LIMITS.choices),
    Field("suffix", TEXT, "the text after the answer, which then fills the gap between prompt and suffix"),
    RESPONSE_FORMAT, *CONSTRAINT_FIELDS,
)

OTHER_FILES = FieldType(
    'a list of objects, each with a string "text" and maybe a string "filename"',
    list_schema(object_schema(["text"], text=A_TEXT, filename=TEXT_OR_NULL)),
    lambda value: tuple((whole_unicode(chunk.get("filename") or "tmp"), whole_unicode(chunk["text"]))
                        for chunk in value))
RESPONSE_FIELDS = FieldType("a list of at most 100 strings", list_schema(A_TEXT, maxItems=100), tuple)
INFILL_FIELDS = (  # as llama-server has them
    Field("input_prefix", MIXED, "what is before the gap: text, or a list of texts and token ids",
          required=True),
    Field("input_suffix", MIXED, "what is after it", required=True),
    Field("input_extra", OTHER_FILES, "other files, the most important last"),
    Field("prompt", TEXT, "more text before the gap"),
    *without(SAMPLING_FIELDS, TRUNCATE),
    SAMPLED["repetition_penalty"]._replace(name="repeat_penalty", means="repetition_penalty"),
    Field("n_predict", INTEGER._replace(convert=lambda value: max(-1, as_count(value))),
          "most tokens of the answer; -1 and -2 = up to the context, 0 = none: only compute the prompt",
          -2, math.inf, means="max_tokens"),
    Field("n_probs", INTEGER, "log-probabilities, with this many alternatives; 0 = none", 0, 20,
          means="logprobs"),
    Field("return_tokens", SWITCH, "`tokens`: the ids behind the text", means="return_token_ids"),
    Field("response_fields", RESPONSE_FIELDS, "what the answer has, such as `content` or `timings/prompt_n`"),
    *(field for field in CONSTRAINT_FIELDS if field.group == LLAMA_SERVERS),
)

CONTINUES = "what a response continues"  # the name of a group
RESPONSES_FIELDS = (
    Field("input", FieldType("a text or a list of items", {"anyOf": [A_TEXT, {"type": "array"}]}),
          "a text, or a list of messages, calls, their outputs and reasoning"),
    Field("instructions", TEXT, "a system message before the input", repeated=None),
    *OPENAI_SAMPLING_FIELDS,
    Field("max_output_tokens", CAP, "most tokens of the answer; -1 = up to the context", means="max_tokens",
          repeated=None),
    SOME_TOOLS._replace(repeated=[]),
    Field("tool_choice", FLAT_CHOICE, "auto, none, required, or which of the functions", repeated="auto"),
    Field("reasoning", FieldType(OBJECT.allowed, OBJECT.schema,
                                 lambda value: thinking_of_member("reasoning.effort", value.get("effort")),
                                 object_schema([], effort=EFFORT_OR_NULL, max_tokens=A_BUDGET)),
          "`effort`: how much the model thinks, if its template supports that; `max_tokens`, or a number as "
          "effort: most tokens that it thinks", means="template_options",
          idle={"effort": idle.without_thinking, "max_tokens": idle.without_thoughts},
          repeated={"effort": None, "summary": None}),
    PARALLEL._replace(repeated=True),
    Field("max_tool_calls", INTEGER, "most calls of tools of type `mcp`, which the server runs; then the "
          "model answers without them", 1, 2**31 - 1, idle={"": idle.without_tool_rounds}, repeated=None),
    Field("text", object_of("format")._replace(convert=partial(nested_grammar, param="text")),
          "`format`: text, json_object or json_schema", means="response_format",
          repeated={"format": {"type": "text"}}),
    Field("truncation", FieldType('"auto" or "disabled"', {"enum": ["auto", "disabled"]}, "auto".__eq__),
          "`auto` means `truncate: oldest`", means="truncate", repeated="disabled"),
    Field("include", INCLUDE, f"`{LOGPROBS_OF_TEXT}`: log-probabilities of the text's tokens",
          means="logprobs"),
    Field("top_logprobs", INTEGER, "with these: alternatives listed for each token", 0, 20,
          idle={"": idle.without_logprobs}),
    Field("metadata", METADATA, "comes back in the answer", repeated={}),
    Field("user", FieldType("a string of at most 512 characters", {"type": "string", "maxLength": 512}),
          "comes back in the answer", repeated=None),
    Field("store", SWITCH, "false: do not keep the answer; the default with --database is true",
          idle={"": idle.without_a_database}),
    Field("previous_response_id", TEXT, "with --database: the kept response that this one continues",
          group=CONTINUES),
    Field("conversation", FieldType("an id, or an object with one", {"anyOf": [
        A_TEXT, object_schema(["id"], id=A_TEXT)]}, lambda value: value if is_text(value) else value["id"]),
          "with --database: the conversation that this response continues, and is added to",
          group=CONTINUES),
    Field("prompt", refused_field("the server keeps no prompts"), "refused"),
    Field("background", SWITCH, "true, with --database: return at once; GET /v1/responses/{id} shows the "
          "answer, also before it has ended"),
)

OUTPUT_CONFIG = Field("output_config", object_of("effort"), "`effort`: how much the model thinks",
                      idle={"effort": idle.without_thinking})
COUNTED_FIELDS = (
    Field("messages", LIST._replace(details=list_schema(object_schema(["role", "content"]), minItems=1)),
          "the conversation", required=True),
    Field("system", SYSTEM, "the system message, as a text or text blocks"),
    MODEL, SOME_TOOLS,
    Field("tool_choice", MESSAGES_CHOICE, "auto, any, none, or one of the tools"),
    Field("mcp_servers", FieldType("a list of objects", list_schema(object_schema([]))),
          "tool servers of --mcp-config, by `name`, whose tools the server runs",
          idle={"": idle.without_tool_rounds}),
    Field("thinking", THINKING, "whether the model thinks, if its template supports that; `budget_tokens`: "
          "most tokens that it thinks", means="template_options", idle=IDLE_THINKING),
    OUTPUT_CONFIG,
)
MESSAGES_FIELDS = (
    *without(COUNTED_FIELDS, OUTPUT_CONFIG),
    *without(SAMPLING_FIELDS, MODEL),
    Field("max_tokens", CAP, "most tokens of the answer; absent or -1 = up to the context"),
    Field("stop_sequences", STOP, "strings that end the answer", means="stop",
          idle={"": idle.in_required_calls}),
    OUTPUT_CONFIG._replace(
        type=object_of("format", "effort")._replace(convert=partial(nested_grammar, param="output_config")),
        doc="`format`: json_schema; `effort`: how much the model thinks", means="response_format"),
    Field("output_format", object_of("type", "schema")._replace(
        convert=partial(response_grammar, param="output_format")),
        "the older name of `output_config.format`"),
)

OLLAMA_NAMES = {"repetition_penalty": "repeat_penalty"}
OLLAMA_OPTIONS = (
    *(field._replace(name=OLLAMA_NAMES[name], means=name) if name in OLLAMA_NAMES else field
      for name, field in SAMPLED.items()),
    STOPS, REPETITION,
    Field("num_predict", INTEGER._replace(convert=lambda value: int(value) if value > 0 else -1),
          "most tokens of the answer; -1 and -2 = up to the context", -2, math.inf, means="max_tokens"),
)
OLLAMA_FIELDS = (  # for both of Ollama's routes
    MODEL,
    Field("stream", SWITCH, "one JSON object per line (the default); false: one object"),
    Field("format", OLLAMA_FORMAT, '"json" or a JSON schema', means="response_format"),
    Field("think", FieldType(f"true, false, {EFFORT.allowed}",
                             {"anyOf": [{"enum": [True, False]}, *EFFORT.schema["anyOf"]]},
                             lambda value: thinking(value)),
          "whether, or how much, the model thinks, if its template supports that; a number: most tokens that "
          "it thinks", means="template_options", idle={"": idle.ollama_without_thinking}),
    Field("logprobs", SWITCH, "log-probabilities of the answer's tokens"),
    Field("top_logprobs", INTEGER, "with `logprobs`: alternatives listed for each token", 0, 20,
          idle={"": idle.without_logprobs}),
    Field("options", OBJECT._replace(details={"properties": {
        field.name: field.described for field in OLLAMA_OPTIONS}}), "how to draw tokens, and when to stop"),
)
OLLAMA_CHAT_FIELDS = (
    Field("messages", OPENAI_MESSAGES._replace(details={}), "the conversation; without any, an empty answer"),
    Field("tools", TOOLS, "functions the model may call"),
    Field("truncate", SWITCH, "drop the oldest turns if not all fit (default); false: refused"),
    *OLLAMA_FIELDS)
OLLAMA_GENERATE_FIELDS = (
    Field("prompt", TEXT, "a question; without any, an empty answer"),
    Field("system", TEXT, "the system message", idle={"": idle.in_a_continued_text}),
    Field("raw", SWITCH, "the prompt is a text to continue"),
    Field("suffix", TEXT, "the text after the answer, which then fills the gap between prompt and suffix"),
    Field("images", LIST, "picture files in base64, which come before the prompt"),
    *OLLAMA_FIELDS)
DIMENSIONS = Field("dimensions", INTEGER, "numbers of each vector, where the model was trained for fewer", 1,
                   math.inf)
PROMPT_NAME = Field("prompt_name", TEXT, "which prompt of the model goes before each text (see /v1/models)")
INPUT_TYPE = Field("input_type", TEXT, "query, document or a prompt's name: which prompt goes before each "
                                       "text, if the model has it", idle={"": idle.without_a_prompt})
POOLING = Field("pooling", FieldType('"mean" or "last"', {"enum": ["mean", "last"]}),
                "for a chat model: the mean over an input's tokens (the default), or its last token")
CUT = Field("truncate", SWITCH, "an input longer than the context is cut at its end (default); false: it is "
                                "refused", means="cut")
EMBEDDING_FIELDS = (
    Field("input", INPUTS, "text, token ids, or a list of these", required=True),
    MODEL,
    Field("encoding_format", FieldType('"float" or "base64"', {"enum": ["float", "base64"]}),
          "numbers (the default), or float32, little-endian, in base64"),
    POOLING, LOW, DIMENSIONS, PROMPT_NAME, INPUT_TYPE,
    Field("embd_normalize", FieldType("2 or -1", {"enum": [2, -1]}, lambda value: value == 2),
          "2: vectors have the length 1 (the default); -1: they are not scaled", means="normalize"),
    Field("truncate_prompt_tokens", FieldType("a number of tokens, at least 1, or -1",
                                              {"anyOf": [{"enum": [-1]}, {"type": "integer", "minimum": 1}]}),
          "an input with more tokens is cut at its end; -1: at the context's. Absent: it is refused if it "
          "does not fit"),
)
OLLAMA_EMBED_FIELDS = (
    Field("input", INPUTS._replace(schema={"anyOf": [
        *INPUTS.schema["anyOf"], {"type": "array", "maxItems": 0}]}),
          "text, or a list of texts; an empty list gives no vectors", required=True),
    MODEL, POOLING, LOW, DIMENSIONS, CUT)
OLLAMA_EMBEDDINGS_FIELDS = (  # of the older route
    Field("prompt", TEXT._replace(convert=as_prompts), "a text; one longer than the context is cut at its "
          "end", required=True, means="input"),
    MODEL, POOLING)
TEI_EMBED_FIELDS = (  # Text Embeddings Inference
    Field("inputs", INPUTS, "text, token ids, or a list of these", required=True, means="input"),
    MODEL, DIMENSIONS, PROMPT_NAME,
    Field("normalize", SWITCH, "vectors have the length 1 (the default)"),
    CUT)

SOME_TEXTS = {"minItems": 1, "maxItems": LIMITS.embeddings}
TEXTS = FieldType(f"a list of 1 to {LIMITS.embeddings:,} strings", list_schema(A_TEXT, **SOME_TEXTS),
                  lambda value: tuple(as_list(value)))
DOCUMENTS = FieldType(
    f'a list of 1 to {LIMITS.embeddings:,} strings or objects with a string "text"',
    list_schema({"anyOf": [A_TEXT, object_schema(["text"], text=A_TEXT)]}, **SOME_TEXTS),
    lambda value: tuple(as_list([each if is_text(each) else each["text"] for each in value])))
TEXT_OR_TEXTS = FieldType(f"a string or {TEXTS.allowed}", {"anyOf": [A_TEXT, TEXTS.schema]}, TEXTS.convert)
INSTRUCTION = Field("instruction", TEXT, "what makes a document right for its query, if a model reads it",
                    idle={"": idle.for_cosines})
RAW = Field("use_activation", SWITCH, "false: raw scores, instead of those from 0 to 1")
RERANK_FIELDS = (
    Field("query", TEXT, "what the documents are compared with", required=True),
    Field("documents", DOCUMENTS, "texts, or objects with a `text`"),
    Field("texts", TEXTS, "as TEI calls them; the answer then has TEI's form"),
    MODEL,
    Field("top_n", INTEGER, "return only this many of the best", 1, math.inf),
    Field("return_documents", SWITCH, "put each document beside its score", idle={"": idle.with_tei}),
    Field("max_tokens_per_doc", INTEGER, "read only the start of each document", 1, math.inf),
    RAW, INSTRUCTION, LOW,
    Field("raw_scores", SWITCH, "with `texts`: scores that may be below 0 and above 1",
          idle={"": idle.without_tei}),
    Field("return_text", SWITCH, "with `texts`: put each text beside its score", idle={"": idle.without_tei}),
    Field("truncate", SWITCH, "with `texts`: one that is too long is cut at its end (default); false: it is "
          "refused", idle={"": idle.without_tei}),
)
SCORE_FIELDS = (
    Field("text_1", TEXT_OR_TEXTS, "a text, or as many as text_2 has"),
    Field("text_2", TEXT_OR_TEXTS, "a text, or several: each makes a pair with text_1"),
    Field("queries", TEXT_OR_TEXTS, "the same as text_1", means="text_1"),
    Field("documents", TEXT_OR_TEXTS, "the same as text_2", means="text_2"),
    MODEL, RAW, INSTRUCTION, LOW,
)
OLLAMA_SHOW_FIELDS = (Field("model", TEXT, "one of the served model's names"),
                      Field("name", TEXT, "the same, for older clients", means="model"))

DETOKENIZE_FIELDS = (Field("tokens", TOKENS, "token ids", required=True), MODEL)
WITH_PIECES = Field("with_pieces", SWITCH, "return each token's id and text too")
TEMPLATE_FIELDS = (Field("messages", OPENAI_MESSAGES, "the conversation", required=True),
                   Field("tools", TOOLS, "functions"), MODEL, WITH_PIECES, *TEMPLATE_OPTIONS)
TOKENIZE_FIELDS = (  # llama-server's, with `content`; vLLM's, with `prompt` or `messages`
    MODEL,
    Field("content", MIXED, "text, or a list of texts and token ids"),
    Field("add_special", SWITCH, "begin `content` with bos if the model expects it"),
    Field("parse_special", SWITCH, "read the names of special tokens in `content` as these tokens (default)"),
    Field("with_pieces", SWITCH, "return the text of each token of `content` too"),
    Field("prompt", TEXT, "text, with the names of special tokens, as /v1/completions reads it"),
    TEMPLATE_FIELDS[0]._replace(required=False), *TEMPLATE_FIELDS[1:2], *TEMPLATE_OPTIONS,
    Field("add_special_tokens", SWITCH, "begin with bos if the model expects it: the default for `prompt`, "
                                        "not for `messages`, whose template writes it"),
    Field("return_token_strs", SWITCH, "`token_strs`: the text of each token of `prompt` or `messages`"),
)
MANAGED_FIELDS = (MODEL,)

WHO = "who answers"       # a group: the fields of a variant that choose its model
SOME = "several answers"  # a group: the fields that name several answers; one of them must be there
STEP = Field("step", FieldType('a number of a step, or "latest"',
                               {"anyOf": [{"type": "integer", "minimum": 0}, {"enum": ["latest"]}]}),
             "one of the checkpoints of the run of `model`", group=WHO)
DRAWING_FIELDS = (  # how tokens are drawn, and what ends an answer
    *(field for field in SAMPLING_FIELDS
      if field in (*SAMPLED.values(), STOPS, STOP_IDS, MIN_TOKENS, IGNORE_EOS)),
    *TOKEN_CAPS)
VARIANT_FIELDS = (
    Field("model", TEXT, "one of the served models; absent: the default one", group=WHO),
    Field("adapter", TEXT, "one of the model's adapters", group=WHO),
    STEP, *DRAWING_FIELDS,
)
SOME_ANSWERS = {"minItems": 2, "maxItems": LIMITS.compared}
COMPARE_FIELDS = (
    OPENAI_FIELDS[0]._replace(required=False, doc="the conversation; one of it and prompt"),
    Field("prompt", TEXT, "a text that the models continue, instead of messages"), MODEL,
    Field("models", FieldType(f"a list of 2 to {LIMITS.compared} names of models",
                              list_schema(A_TEXT, **SOME_ANSWERS)), "the models that answer",
          group=SOME),
    Field("steps", FieldType(
        f'a list of 2 to {LIMITS.compared} numbers of steps, or "latest"',
        list_schema(STEP.schema, **SOME_ANSWERS)),
        "the checkpoints that answer, of the run of `model`", group=SOME),
    Field("variants", FieldType(
        f"a list of 2 to {LIMITS.compared} objects", list_schema({"type": "object"}, **SOME_ANSWERS),
        details=list_schema({"type": "object", "properties": {
            field.name: field.described for field in VARIANT_FIELDS}})),
        "what differs from answer to answer; each may have a model of its own", group=SOME),
    *DRAWING_FIELDS, LOW, TRUNCATE,
    *TEMPLATE_OPTIONS,
)

BODY_FIELDS: dict[str, tuple[Field, ...]] = {  # route -> the fields of its body
    "/chat/completions": NATIVE_FIELDS, "/v1/chat/completions": OPENAI_FIELDS,
    "/v1/completions": COMPLETION_FIELDS, "/infill": INFILL_FIELDS, "/v1/embeddings": EMBEDDING_FIELDS,
    "/v1/responses": RESPONSES_FIELDS, "/v1/messages": MESSAGES_FIELDS,
    "/v1/messages/count_tokens": COUNTED_FIELDS, "/api/chat": OLLAMA_CHAT_FIELDS,
    "/api/generate": OLLAMA_GENERATE_FIELDS, "/api/embed": OLLAMA_EMBED_FIELDS,
    "/api/embeddings": OLLAMA_EMBEDDINGS_FIELDS, "/embed": TEI_EMBED_FIELDS,
    **dict.fromkeys(("/v1/rerank", "/rerank", "/v2/rerank", "/reranking", "/v1/reranking"), RERANK_FIELDS),
    **dict.fromkeys(("/v1/score", "/score"), SCORE_FIELDS),
    "/api/show": OLLAMA_SHOW_FIELDS, "/tokenize": TOKENIZE_FIELDS, "/detokenize": DETOKENIZE_FIELDS,
    "/apply-template": TEMPLATE_FIELDS, "/models/load": MANAGED_FIELDS, "/models/unload": MANAGED_FIELDS,
    "/v1/compare": COMPARE_FIELDS,
    # whoever finds LM Studio's list of models asks where LM Studio answers
    "/api/v0/chat/completions": OPENAI_FIELDS, "/api/v0/completions": COMPLETION_FIELDS,
    "/api/v0/embeddings": EMBEDDING_FIELDS,
}
HUB_NAME = Field("model", TEXT, "a short name, owner/name, or owner/name:FILE", required=True)
EITHER_NAME = (Field("model", TEXT, "a short name, owner/name, or owner/name:FILE"),
               Field("name", TEXT, "the same, for older clients"))
HUB_FIELDS: dict[str, tuple[Field, ...]] = {  # likewise for routes about models that may not be served
    "/models/download": (HUB_NAME, Field("stream", SWITCH, "server-sent events until the download has ended; "
                                         "otherwise the state after it was begun")),
    "/models/cancel": (HUB_NAME,), "/models/delete": (HUB_NAME,),
    "/models/export": (Field("model", TEXT, "a served model", required=True),
                       Field("name", TEXT, "of the new folder in that of --export-folder", required=True)),
    "/v1/tools/call": (
        Field("name", TEXT, "of a tool, as in GET /v1/tools", required=True),
        Field("arguments", OBJECT, "an object, as the tool's parameters say", required=True),
        Field("digest", TEXT, "of the tool, as it was when a person approved of it: with another one, 409"),
        Field("stream", SWITCH, "server-sent events: the progress, and at the end the result")),
    "/api/pull": (*EITHER_NAME, Field("stream", SWITCH, "one JSON object per line (the default); false: one "
                                      "object, once it has ended"),
                  Field("insecure", SWITCH, "has no effect: HF_ENDPOINT names the hub")),
    "/api/delete": EITHER_NAME,
}


def meanings(fills: str) -> tuple[str, ...]:
    """The names under which an object of a request, "params" or "request", has the values of fields."""
    names = {field.means or field.name: None for fields in BODY_FIELDS.values() for field in fields
             if field.fills == fills}
    return tuple(names)


# fields that have no effect where a grammar decides
LOOSE_ENDS = tuple(field.name for field in SAMPLING_FIELDS if field.idle.get("") is idle.under_a_grammar)
PARAMS_NAMES = meanings("params")
REQUEST_NAMES = meanings("request")

MAKE_GRAMMARS = response_grammar, nested_grammar, other_grammar, structured_outputs, ollama_grammar


def makes_grammar(field: Field) -> bool:
    convert = field.type.convert
    return getattr(convert, "func", convert) in MAKE_GRAMMARS


def constraining_fields() -> frozenset[str]:
    """The names of fields for which grammars are made. Whoever sends none of them never needs what makes
    grammars."""
    names = {"tools", "functions"}
    for fields in BODY_FIELDS.values():
        names.update(field.name for field in fields if makes_grammar(field))
    return frozenset(names)


CONSTRAINING = constraining_fields()
