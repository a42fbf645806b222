"""What attackers send, of the kinds that advisories tell of: numbers, ids, grammars, pictures, names."""

import base64
import functools
import json
import os
import pickle
import struct
import zlib

from attacked import CHAT, COMPLETIONS, HI, MESSAGES, RESPONSES

HUGE = 10**30
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}"
FUNCTION = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
LONG_NAME = {"type": "object", "properties": {"a" * 60_000: {}}}
MANY = {f"p{number}": {"type": "integer"} for number in range(5000)}


def parts_of(name):
    """Other spellings of an id: its parts, patterns that match it, and what some databases take for equal."""
    kind, _, rest = name.rpartition("_" if "_" in name else "-")
    spelled = [
        name[:-1], name[1:], name[:len(name) // 2], name[:8], name[:1], kind, rest, name.upper(), name + "0",
        name + "\0", name + " ", " " + name, name + "\n", name + "/x", name + "' OR '1'='1", "%", "*",
        *(name[:-1] + pattern for pattern in "_?%*")]
    return [each for each in dict.fromkeys(spelled) if each not in (name, "")]


def required(parameters):
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


# What an answer shall be held to, and cannot be, or only at great cost
EVIL = [{field: value} for field, values in {
    "guided_regex": [
        "(a{1000}){1000}", "a{99999999}", "[", "(a+)+$", "\\p{L}{5000}", "(?=a)b", "(a|b)*a(a|b){18}",
        "\ud800", "a" * 300_000, "$^"],
    "guided_grammar": [
        'start: start start | "a"', "start: " + "(" * 3000 + '"a"' + ")" * 3000, "start: b", "",
        'start: "a" | a\na: a', "%import common.NUMBER\nstart: NUMBER", "start: <[99999999]>",
        'start: %json {"$ref": "http://127.0.0.1/x"}'],
    "grammar": ["root ::= root root", 'root ::= "\\x'],
    "guided_json": [
        {"$ref": "#"},
        {"type": "array", "items": {"$ref": "#"}, "minItems": 10**6},
        {"enum": []},
        {"allOf": [{"type": "string"}, {"type": "integer"}]},
        {"type": "string", "pattern": "(x+x+)+y"},
        {"properties": MANY, "required": [*MANY]},
        {"type": "number", "multipleOf": 1e-300},
        {"type": "integer", "minimum": 10**300, "maximum": 10**301},
        {"$ref": "file:///etc/passwd"},
        {"type": "string", "minLength": 2**62},
        {"const": {"a": [1] * 20_000}},
        {"anyOf": [{"$ref": "#"}] * 200}],
    "guided_choice": [["x" * 5000] * 500, [""], ["\0", "\ud800"]],
}.items() for value in values] + [required(FUNCTION), required(LONG_NAME)]

REFUSED = [(path, common | body) for path, common, bodies in (
    (COMPLETIONS, {"prompt": "hi", "max_tokens": 3}, [
        {"n": 10**6}, {"n": HUGE}, {"n": -1}, {"n": 0}, {"n": 1.5}, {"best_of": 10**6},
        {"logprobs": 10**6}, {"logprobs": -1}, {"prompt_logprobs": 10**9},
        {"prompt_logprobs": 1, "prompt_logprobs_start": HUGE}, {"logprob_token_ids": [1] * 10**4},
        {"top_k": HUGE}, {"top_k": -2**40}, {"seed": HUGE}, {"seed": -2**64}, {"min_tokens": -1},
        {"max_tokens": "9"}, {"stop": ["x"] * 10**5}, {"stop": "x" * 10**5},
        {"stop_token_ids": [1] * 10**5}, {"logit_bias": {str(token): 1 for token in range(5000)}},
        {"logit_bias": {"1": 1e308}}, {"dry_sequence_breakers": ["x"] * 10**4, "dry_multiplier": 1},
        {"dry_penalty_last_n": HUGE, "dry_multiplier": 1},
        {"prompt": ["hi"] * 10**4}, {"prompt": []}, {"prompt": [[]]}, {"prompt": {"a": 1}}]),
    (CHAT, {"messages": HI, "max_tokens": 3}, [
        {"thinking_budget": HUGE}, {"thinking_budget": -5}, {"thinking_budget": 1.5},
        {"top_logprobs": 10**6, "logprobs": True}, {"temperature": 1e308}, {"temperature": -1},
        {"top_p": -1}, {"min_p": 5}, {"repetition_penalty": 0}, {"repetition_penalty": 1e-300},
        {"frequency_penalty": 1e300}, {"reasoning_effort": -3}, {"messages": []}, {"messages": "hi"},
        {"messages": [{}]}, {"messages": [{"role": "user", "content": [[]]}]},
        {"messages": [{"role": "root", "content": "x"}]}, {"tools": [{"type": "function"}]},
        {"tool_choice": "f"}, {"tools": "x"}]),
    (MESSAGES, {"messages": HI, "max_tokens": 3}, [
        {"thinking": {"type": "enabled", "budget_tokens": -1}}, {"stop_sequences": ["x"] * 10**5},
        {"temperature": 5}]),
    (RESPONSES, {"input": "hi", "max_output_tokens": 3}, [
        {"top_logprobs": 10**6}, {"input": 5}, {"input": [{"type": "message"}]},
        {"previous_response_id": 5}]),
    ("/api/chat", {"messages": HI, "stream": False}, [
        {"options": {"top_k": -9}}, {"options": {"temperature": -1}}, {"options": 5}]),
    ("/v1/compare", {"messages": HI, "seed": 1}, [
        {"models": ["red"] * 1000}, {"models": [], "variants": [{}] * 1000}]),
) for body in bodies]

REFUSED += [(COMPLETIONS, text.encode()) for text in (
    '{"prompt": "hi", "temperature": NaN}', '{"prompt": "hi", "top_p": -Infinity}',
    '{"prompt": "hi", "max_tokens": 1e400}', '{"prompt": "hi", "max_tokens": %s}' % ("9" * 5000),
    '{"prompt": "hi", "x": %s%s}' % ("[" * 60_000, "]" * 60_000), "[" * 10**5, "{", "", '"hi"', "null", "[]",
    "\xff")]

BOUNDED = [  # taken, and the answer is no longer than the context
    (COMPLETIONS, {"prompt": "hi", "max_tokens": HUGE}),
    (COMPLETIONS, {"prompt": "hi", "max_tokens": -1}),
    (COMPLETIONS, {"prompt": "hi", "max_tokens": 3, "min_tokens": HUGE}),
    (CHAT, {"messages": HI, "max_completion_tokens": HUGE}),
    (CHAT, {"messages": HI, "max_tokens": 2**63})]

# Of the tiny llama, whose ids are 0 to 259
WRONG_IDS = [
    -1, 260, 512, 2**31 - 1, 2**31, 2**32, 2**32 + 1, 2**63, 2**64, 2**64 + 1, HUGE, -HUGE, 1.0, 1.5, True,
    None, [0]]
WRONG_KEYS = [
    "-1", "260", "2147483648", "4294967296", "18446744073709551617", "1.0", "1e0", " 1", "1_0", "\u0661",
    "-0", "true", "null", ""]
NO_SUCH_ID = [(path, body) for wrong in WRONG_IDS for path, body in (
    (COMPLETIONS, {"prompt": [1, wrong]}),
    (COMPLETIONS, {"prompt": [[1], [2, wrong]]}),
    (COMPLETIONS, {"prompt": "hi", "stop_token_ids": [wrong]}),
    (COMPLETIONS, {"prompt": "hi", "logprobs": 1, "logprob_token_ids": [wrong]}),
    ("/v1/embeddings", {"input": [1, wrong]}),
    ("/api/embed", {"input": [[1], [wrong]]}),
    ("/detokenize", {"tokens": [wrong]}),
    ("/infill", {"input_prefix": [wrong], "input_suffix": "x"}))]
NO_SUCH_ID += [(COMPLETIONS, {"prompt": "hi", "logit_bias": {key: 5}}) for key in WRONG_KEYS]


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(*chunks, width=8, height=8, pixels=None):
    rows = zlib.compress(bytes((1 + 3 * width) * height)) if pixels is None else pixels
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def gif(frames, width, height):
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame * frames + b";"


def webp(width, height):
    size = struct.pack("<I", width - 1 | height - 1 << 14)
    return b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8L" + struct.pack("<I", 10) + b"\x2f" + size + bytes(5)


@functools.cache
def bomb():
    """200 MB, deflated."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(200)) + packer.flush()


PICTURES = {
    "a gif of 200,000 frames": lambda: gif(200_000, 4, 4),
    "a gif of 65,535 by 65,535": lambda: gif(1, 65_535, 65_535),
    "a webp of 16,383 by 16,383": lambda: webp(16_383, 16_383),
    "2^31 by 1 pixels": lambda: png(width=2**31 - 1, height=1, pixels=b""),
    "a profile that inflates to 200 MB": lambda: png(chunk(b"iCCP", b"x\0\0" + bomb())),
    "a text that does": lambda: png(chunk(b"zTXt", b"x\0\0" + bomb())),
    "a text of all languages that does": lambda: png(chunk(b"iTXt", b"x\0\1\0\0\0" + bomb())),
    "more pixels than it says": lambda: png(pixels=bomb()),
    "no pixels": lambda: png(pixels=b""),
    "100,000 empty chunks": lambda: png(*[chunk(b"IDAT", b"")] * 100_000),
    "a chunk of 4 GB": lambda: b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**32 - 1) + b"IHDR" + bytes(100)}


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def payloads(folder):
    """What would make `folder` if a server unpickled, imported or called it."""
    pickled = pickle.dumps(Planted(folder))
    (plugin := folder.with_suffix(".py")).write_text(f"import os\nos.mkdir({str(folder)!r})\n")
    call = {"qualname": "os.mkdir", "args": [str(folder)]}
    named = dict.fromkeys(("type", "class", "callable"), "os.mkdir")
    return [
        str(plugin), f"file://{plugin}", f"__import__('os').mkdir({str(folder)!r})", "os.mkdir", call, [call],
        base64.b64encode(pickled).decode(), json.dumps({"callable": pickled.hex()}),
        named | {"name": str(folder), "path": str(plugin), "backend": str(plugin)}]


NAMES = (  # of what runs code in other servers, or looks as if it did
    "logits_processors", "logits_processor", "custom_logit_processor", "custom_params", "tool_parser",
    "tool_call_parser", "tool_parser_plugin", "reasoning_parser", "reasoning_parser_plugin",
    "reasoning_format", "guided_decoding_backend", "guided_decoding_disable_fallback", "lora_request",
    "lora_path", "lora_name", "tokenizer", "tokenizer_mode", "processor", "mm_processor_kwargs",
    "media_io_kwargs", "model_path", "model_kwargs", "extra_body", "extra_args", "vllm_xargs",
    "trust_remote_code", "kv_transfer_params", "bootstrap_host", "speculative_config", "draft_model",
    "backend", "plugins", "prompt_embeds", "return_hidden_states", "load_format", "config_format",
    "hf_overrides", "quantization", "sampling_backend", "structured_output_backend",
    "chat_template_content_format", "handler", "callback", "entrypoint")
