"""Every tokenizer that the families of models use: ids, and the way back.

Each family's pipeline is written here a second time, as its tokenizer.json has it, and trained on a few texts. Its
vocabulary goes into a GGUF file, which knows the pipeline only by name.
"""

import functools
import itertools
import json
import re
import unicodedata

import families
import pytest
import tokenizers
from chatlm.common.errors import ConfigError, RequestError
from chatlm.common.messages.requests import TextSpec
from chatlm.common.text.load import open_tokenizer
from chatlm.common.text.reader import StreamDecoder
from chatlm.common.text.tokenizer import fill_template
from chatlm.front.api.message_readers import openai_messages
from chatlm.worker.engine.pieces import PieceTokenizer, open_for_answers
from chatlm.worker.weights.formats.folder.description import hf_text
from chatlm.worker.weights.formats.gguf.description import gguf_text
from chatlm.worker.weights.formats.gguf.file import read_gguf
from nightly import by_day
from tiny_gguf import small_gguf_metadata, write_gguf
from tokenizer_texts import CORPUS, TEXTS, split
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
          r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
O200K = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?"
         r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
WORDS, GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), pre_tokenizers.ByteLevel(add_prefix_space=False)
BYTE_LEVEL = {      # tokenizer.ggml.pre -> the steps of the family's tokenizer.json
    "gpt-2": [GPT2], "smollm": [pre_tokenizers.Digits(individual_digits=True), GPT2], "llama-bpe": [split(LLAMA3), WORDS],
    "dbrx": [split(LLAMA3), WORDS], "qwen2": [split(LLAMA3.replace("{1,3}", "")), WORDS], "tekken": [split(TEKKEN), WORDS],
    "gpt-4o": [split(O200K), WORDS], "llama4": [split(O200K), WORDS], "deepseek-r1-qwen": [split(LLAMA3.replace("{1,3}", "")), WORDS],
    "deepseek-coder": [split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
                       pre_tokenizers.Digits(individual_digits=True), WORDS],
    "default": [split(r"[\p{P}\$\+<=>\^~\|]+"), split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
                pre_tokenizers.Digits(individual_digits=False), split("[0-9][0-9][0-9]"), WORDS]}


def trained(pre):
    """A tokenizer of the family that llama.cpp calls `pre`, of the test's own."""
    return tokenizers.Tokenizer.from_str(trained_json(pre))


@functools.cache
def trained_json(pre):
    family = tokenizers.Tokenizer(models.BPE(ignore_merges=pre in ("llama-bpe", "tekken", "gpt-4o", "llama4")))
    if "qwen" in pre:
        family.normalizer = normalizers.NFC()
    family.pre_tokenizer, family.decoder = pre_tokenizers.Sequence(BYTE_LEVEL[pre]), decoders.ByteLevel()
    family.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False))
    family.add_tokens([AddedToken("<think>", normalized=False)])
    return family.to_str()


def gguf_of(family, tmp_path, **more):
    """Write a byte-level tokenizer as the converters of llama.cpp do; the TextSpec of what was written."""
    model = json.loads(family.to_str())["model"]
    added = family.get_added_tokens_decoder()
    tokens = [family.id_to_token(i) for i in range(family.get_vocab_size())]
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
                "tokenizer.ggml.token_type": [(3 if added[i].special else 4) if i in added else 1 for i in range(len(tokens))],
                "tokenizer.ggml.eos_token_id": 1, **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}
    path = write_gguf(tmp_path / "vocabulary.gguf", {}, {}, metadata)
    return gguf_text(path, read_gguf(path)[0])


def check_way_back(ours, text, tokens, expected):
    assert ours.decode(tokens) == expected
    decoder = StreamDecoder(ours)
    streamed = "".join(map(decoder.push, tokens))
    assert streamed in (expected, " " * ours.drops_space + expected), text


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_a_gguf_s_byte_tokenizer_gives_the_family_s_ids(pre, tmp_path):
    """A byte level tokenizer of a GGUF file gives the ids of the family's own."""
    family = trained(pre)
    ours = open_tokenizer(gguf_of(family, tmp_path, pre=pre))
    family.encode_special_tokens = True
    for text in [*TEXTS, "a<think>\n\nb</think>"]:
        tokens = ours.encode(text)
        assert tokens == family.encode(text, add_special_tokens=False).ids, text
        check_way_back(ours, text, tokens, unicodedata.normalize("NFC", text) if "qwen" in pre else text)


@pytest.mark.parametrize("left, right", list(itertools.combinations(
    ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o", "deepseek-coder", "default"], 2)))
def test_the_corpus_tells_every_two_families_apart(left, right):
    pieces = [[pre_tokenizers.Sequence(BYTE_LEVEL[pre]).pre_tokenize_str(text) for text in TEXTS] for pre in (left, right)]
    assert pieces[0] != pieces[1]


def test_an_unnamed_pre_tokenizer_cuts_as_llama_cpp(tmp_path):
    """A file that names no pre tokenizer is cut as llama.cpp cuts it."""
    family = trained("default")
    ours = open_tokenizer(gguf_of(family, tmp_path))
    assert all(ours.encode(text) == family.encode(text).ids for text in TEXTS if "<|im_" not in text)


@pytest.mark.parametrize("pre, begins", [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("gpt-4o", False), ("smollm", False)])
def test_bos_begins_raw_prompts_of_its_families(pre, begins):
    tokenizer = open_tokenizer(gguf_text("x.gguf", small_gguf_metadata(pre) | {"tokenizer.ggml.bos_token_id": 3}))
    assert (tokenizer.encode_prompt("hello")[0] == 3) == begins


@pytest.mark.parametrize("pre", ["vikings", "Qwen2", ""])
def test_an_unknown_pre_tokenizer_names_the_known(pre):
    with pytest.raises(ConfigError, match=f'tokenizer.ggml.pre is "{pre}"; it must be one of default, .*llama-bpe.*tekken.*gpt-4o'):
        gguf_text("x.gguf", small_gguf_metadata(pre))


# --- sentencepiece -------------------------------------------------------------------------------------------


PREFIXED, PLAIN = {}, {"add_space_prefix": False}
CONTROL = ["<unk>", "<s>", "</s>", "<|user|>", "<|end|>", "<|endoftext|>"]


@functools.cache
def sentencepiece_vocabulary():
    """Pieces with scores, as BPE training by sentencepiece leaves them: merges in their order, then letters."""
    family = tokenizers.Tokenizer(models.BPE())
    family.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    family.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=900, limit_alphabet=120, show_progress=False))
    tokens = [token for token in sorted(family.get_vocab(), key=family.token_to_id) if token not in CONTROL]
    tokens = [token for token in tokens if len(token) > 1] + [token for token in tokens if len(token) == 1]
    return {token: -float(i) for i, token in enumerate(tokens)}


def sentencepiece_gguf(tmp_path, users=(), architecture="llama", **more):
    pieces = sentencepiece_vocabulary()
    tokens = [*CONTROL, *users, *(f"<0x{byte:02X}>" for byte in range(256))]
    scores = [-1000.0] * len(tokens) + list(pieces.values())
    types = [2, 3, 3, 3, 3, 3] + [4] * len(users) + [6] * 256 + [1] * len(pieces)
    metadata = {"general.architecture": architecture, "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default",
                "tokenizer.ggml.tokens": tokens + list(pieces), "tokenizer.ggml.scores": scores, "tokenizer.ggml.token_type": types,
                "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
                **{f"tokenizer.ggml.{key}": value for key, value in more.items()}}
    path = write_gguf(tmp_path / "vocabulary.gguf", {}, {}, metadata)
    return open_tokenizer(gguf_text(path, read_gguf(path)[0])), tokens, pieces


def sentencepiece_ids(text, tokens, pieces, users, prefix):
    """Sentencepiece's own rule: the best neighbours merge, the leftmost first; what is no piece becomes bytes."""
    ids = {token: i for i, token in enumerate([*tokens, *pieces])}
    found = []
    for part in filter(None, re.split("(" + "|".join(map(re.escape, sorted(users, key=len, reverse=True))) + ")" if users else "(?!)", text)):
        if part in users:
            found.append(ids[part])
            continue
        symbols = list(("▁" * prefix + part).replace(" ", "▁"))
        while True:
            scores = [pieces.get(a + b, -1e9) for a, b in itertools.pairwise(symbols)]
            if not scores or max(scores) == -1e9:
                break
            best = scores.index(max(scores))
            symbols[best:best + 2] = [symbols[best] + symbols[best + 1]]
        for symbol in symbols:
            found += [ids[symbol]] if symbol in pieces else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return found


SPACES, GEMMA_USERS = [" " * n for n in range(2, 32)], ["<table>", "</table>", *("\n" * n for n in range(1, 32))]


@pytest.mark.parametrize("family, users", [(PREFIXED, ()), (PLAIN, ()), (PLAIN, (*SPACES, *GEMMA_USERS))],
                         ids=["llama 2, mistral", "without a space before", "gemma"])
def test_a_gguf_s_sentencepiece_gives_the_right_ids(family, users, tmp_path):
    """A SentencePiece tokenizer of a GGUF file gives SentencePiece's ids."""
    ours, tokens, pieces = sentencepiece_gguf(tmp_path, users, **family)
    for text in [*TEXTS, "x<table>\n\n\n  y</table>"]:
        found = ours.encode(text)
        assert found == sentencepiece_ids(text, tokens, pieces, users, family is PREFIXED), text
        check_way_back(ours, text, found, text.replace("▁", " "))


def test_phi_3_s_special_tokens_eat_white_space(tmp_path):
    ours, *_ = sentencepiece_gguf(tmp_path, architecture="phi3")
    ids = ours.specials
    assert ours.encode_with_specials("<s> <|user|>\n \u3000Hi<|end|>\n<|endoftext|>\nx") == [
        ids["<s>"], *ours.encode(" "), ids["<|user|>"], *ours.encode("Hi"), ids["<|end|>"], ids["<|endoftext|>"], *ours.encode("\nx")]
    other, *_ = sentencepiece_gguf(tmp_path)
    assert other.encode_with_specials("<|user|>\nHi") == [ids["<|user|>"], *other.encode("\nHi")]


# --- tokenizer.json as it is ---------------------------------------------------------------------------------


def llama_json(**metaspace):
    """A tokenizer.json of Llama's kind, whose pipeline puts a space before the text by Metaspace."""
    family = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    family.pre_tokenizer = pre_tokenizers.Metaspace(split=False, **metaspace)
    family.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    family.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=900, limit_alphabet=120, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False))
    state = json.loads(family.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return with_tokens(tokenizers.Tokenizer.from_str(json.dumps(state)))


def with_tokens(family):
    family.add_special_tokens([AddedToken("[INST]"), AddedToken("<|left|>", lstrip=True, normalized=False),
                               AddedToken("<|right|>", rstrip=True, normalized=False), AddedToken("<|both|>", lstrip=True, rstrip=True)])
    family.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<wide>", normalized=False, rstrip=True)])
    return family


@pytest.mark.parametrize("family", [
    lambda: llama_json(prepend_scheme="first"), lambda: llama_json(prepend_scheme="always"), lambda: llama_json(prepend_scheme="never"),
    lambda: with_tokens(trained("qwen2")), lambda: with_tokens(trained("gpt-4o"))], ids=["first", "always", "never", "qwen2", "o200k"])
def test_a_tokenizer_json_gives_the_library_s_ids(family):
    """A tokenizer.json gives the ids of the tokenizers library with its special tokens."""
    family = family()
    ours = open_tokenizer(TextSpec("hf", family.to_str().encode()))
    written = [f"{a}{b}{c}" for a, b, c in itertools.product(
        ["", " ", "Hi", "  Hi ", "<think>", "▁"], ["[INST]", "<|left|>", "<|right|>", "<|both|>", "<think>", "<wide>", "<s>[INST] ", "\u3000<|both|>\x1c"],
        ["", " ", "\n there", "there", "[INST]", "<|left|>x", "<think> y"])]
    for text in [*TEXTS, *written]:
        assert ours.encode_with_specials(text) == family.encode(text, add_special_tokens=False).ids, text
        if not any(name in text for name in ours.specials):
            assert ours.decode(ours.encode(text)) == family.decode(family.encode(text, add_special_tokens=False).ids)


# --- a table of pieces instead of the library ---------------------------------------------------------------------


def of_words(kind):
    """A tokenizer of an encoder: WordPiece, or a unigram model."""
    if kind == "words":
        made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "[CLS]": 1, "a": 2, "##b": 3, "é": 4}, unk_token="[UNK]"))
        made.decoder = decoders.WordPiece()
    else:
        made = tokenizers.Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0), ("▁", -3.0), ("<0x0A>", -3.0)], 0, byte_fallback=True))
        made.decoder = decoders.Metaspace(prepend_scheme="always")
    made.add_special_tokens([AddedToken("[CLS]"), AddedToken("<mask>", lstrip=True)])
    return made


def check_pieces(spec):
    """A table knows what the library knows, and has not asked it."""
    table, library = open_for_answers(spec), open_tokenizer(spec)
    assert type(table) is PieceTokenizer
    for name in ("vocab_size", "specials", "added", "swallows", "byte_level", "drops_space", "stop_tokens", "markers", "call_format", "thoughts",
                 "byte_tokens", "never_written", "has_chat_template"):
        assert getattr(table, name) == getattr(library, name), name
    beyond = range(-2, library.vocab_size + 3)
    assert list(map(table.piece, beyond)) == list(map(library.piece, beyond))
    assert list(map(table.whole_text, beyond)) == list(map(library.whole_text, beyond))
    assert "whole" not in vars(table)
    for text in TEXTS[:40]:
        assert table.encode_with_specials(text) == library.encode_with_specials(text)


@pytest.mark.parametrize("family", [
    lambda: llama_json(prepend_scheme="first"), lambda: llama_json(prepend_scheme="always"), lambda: llama_json(prepend_scheme="never"),
    lambda: with_tokens(trained("qwen2")), lambda: with_tokens(trained("gpt-4o")), lambda: of_words("words"), lambda: of_words("unigram")],
    ids=["first", "always", "never", "qwen2", "o200k", "words", "unigram"])
def test_a_table_of_pieces_says_what_the_library_says(family):
    check_pieces(TextSpec("hf", family().to_str().encode(), "{{ messages }}<think>", frozenset({3})))


def test_so_does_that_of_a_gguf_file(tmp_path, default_model_path):
    check_pieces(gguf_text(default_model_path, read_gguf(default_model_path)[0]))
    check_pieces(sentencepiece_gguf(tmp_path, ("<user>",))[0].spec)


@pytest.mark.parametrize("damage", [
    lambda state: state["added_tokens"][0].update(id=7), lambda state: state["added_tokens"].append(state["added_tokens"][0]),
    lambda state: state["model"]["vocab"].update(zzz=5), lambda state: state["model"]["vocab"].update(zzz=99_999),
    lambda state: state["added_tokens"][0].update(content=""), lambda state: state.update(decoder={"type": "Metaspace", "replacement": "▁"}),
    lambda state: state.pop("added_tokens"), lambda state: state["added_tokens"].append({"id": 40_000, "content": "<far>", "special": True})])
def test_where_the_library_may_differ_it_is_asked(damage):
    state = json.loads(trained("qwen2").to_str())
    damage(state)
    spec = TextSpec("hf", json.dumps(state).encode())
    try:
        library = open_tokenizer(spec)
    except ConfigError:
        with pytest.raises(ConfigError, match="tokenizer is broken"):
            open_for_answers(spec)
    else:
        assert type(opened := open_for_answers(spec)) is type(library) and opened.specials == library.specials


# --- chat templates as transformers renders them ------------------------------------------------------------------


TEMPLATE = """{%- macro shown(value, depth=0) %}
    {%- if value is mapping %}{% for key, each in value | items %}{{ key }}={{ shown(each, depth + 1) }};{% endfor %}
    {%- elif value is iterable and value is not string %}[{% for each in value %}{{ shown(each, depth + 1) }}{% endfor %}]
    {%- else %}{{ value | string | upper }}{% endif %}
{%- endmacro %}
{{- bos_token }}{% set ns = namespace(count=0, system='') %}
{%- if strftime_now is defined %}Today: {{ strftime_now("%d %b %Y, week %V") }}
{% endif %}
{% if tools is not none %}
    {% for tool in tools %}
{{ tool | tojson(indent=2) }} {{ shown(tool.function.parameters) }}
    {% endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role == 'system' %}{% set ns.system = message.content %}{% continue %}{% endif %}
    {% set ns.count = ns.count + 1 %}
[{{ message['role'] }} {{ loop.index0 }}] {% set kept = 'outside' %}{% generation %}{% set kept = 'inside' %}{{ message.content | trim }}{% endgeneration %} {{ kept }}
    {% for call in message.tool_calls or [] %}
{{ call.function | tojson }}{{ call.id is defined }}{{ call.function.arguments.city }}
    {% endfor %}
    {% if message.tool_call_id is defined %}{{ message.tool_call_id }}{% endif %}
    {% if ns.count > 8 %}{% break %}{% endif %}
{% endfor %}
{{ ns.system }}{{ documents is none }}{{ custom is defined }}
{% if add_generation_prompt %}<assistant>{{ eos_token }}{% endif %}
"""
WEATHER = {"type": "function", "function": {"name": "weather", "description": "<é> \"now\"", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Zürich", "Bonn"]}, "when": {"type": "string"}}, "required": ["city"]}}}
CHATS = {
    "a question": [{"role": "user", "content": "  Hi\n\nthere {{ x }} "}],
    "turns": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "é"}, {"role": "assistant", "content": "日本"},
              {"role": "user", "content": "<b>"}],
    "calls": [{"role": "user", "content": "Weather?"},
              {"role": "assistant", "content": "", "tool_calls": [
                  {"id": "a1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}},
                  {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn", "when": "now"}}}]},
              {"role": "tool", "name": "weather", "tool_call_id": "a1", "content": "{\"t\": 20}"}]}


@pytest.mark.parametrize("tools", [[], [WEATHER]], ids=["without tools", "with tools"])
@pytest.mark.parametrize("chat", CHATS)
def test_a_chat_renders_as_apply_chat_template_does(chat, tools):
    from transformers import PreTrainedTokenizerFast
    family = trained("qwen2")
    theirs = PreTrainedTokenizerFast(tokenizer_object=family, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=TEMPLATE)
    ours = open_tokenizer(TextSpec("hf", family.to_str().encode(), TEMPLATE, bos_token=0, eos_token=1))
    sent = json.loads(json.dumps(CHATS[chat]))
    for message in sent:        # clients of the API send arguments as text
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    messages = openai_messages(sent, True)
    for _ in range(2):          # the second time if the day changes in between
        expected = theirs.apply_chat_template(CHATS[chat], tools or None, add_generation_prompt=True, tokenize=False)
        rendered = fill_template(ours.template, ours.template_arguments(messages, tools))
        if rendered == expected:
            break
    assert rendered == expected
    assert ours.render(messages, tools) == theirs.apply_chat_template(
        CHATS[chat], tools or None, add_generation_prompt=True, return_dict=False)


TURNS = CHATS["turns"][:2]
TEMPLATES = {       # how families write a chat: ChatML, Llama 3, Mistral, Gemma, and Qwen 3's way with thoughts
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama": "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
             "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}",
    "mistral": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
               "{{ m.content + eos_token }}{% endif %}{% endfor %}",
    "gemma": "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}"
             "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
             "{{ (first if loop.first else '') + '<turn>' + m.role.replace('assistant', 'model') + '\n' + m.content | trim }}"
             "<turn|>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}",
    "thoughts": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if '</think>' in m.content %}"
                "{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
                "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"}


@pytest.mark.parametrize("name, answer", by_day(
    [*itertools.product(TEMPLATES, ("The sky", "The sky\n\n", "", " 日本", "no <|im_end|> here", "<think>so</think>\n\nYes", "é"))],
    ("chatml", "The sky"), ("chatml", "no <|im_end|> here"), ("llama", "The sky\n\n"), ("llama", ""), ("mistral", " 日本"), ("mistral", "The sky\n\n"),
    ("gemma", ""), ("gemma", "é"), ("thoughts", "The sky"), ("thoughts", "<think>so</think>\n\nYes")))
def test_last_messages_continue_as_in_transformers(name, answer):
    """White space at its end stays, also where the template trims and transformers drops it: the answer ended there.
    Where the template drops thoughts, which transformers refuses, the rest is continued."""
    from transformers import PreTrainedTokenizerFast
    family = trained("qwen2")
    theirs = PreTrainedTokenizerFast(tokenizer_object=family, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=TEMPLATES[name])
    ours = open_tokenizer(TextSpec("hf", family.to_str().encode(), TEMPLATES[name], bos_token=0, eos_token=1))
    chat = [*TURNS, {"role": "assistant", "content": answer.split("</think>\n\n")[-1] if name == "thoughts" else answer}]
    expected = theirs.apply_chat_template(chat, continue_final_message=True, tokenize=False)
    if name in ("llama", "gemma"):      # of an empty answer transformers even drops the end of its header
        expected = expected + answer[len(answer.rstrip()):] if answer.strip() else \
            theirs.apply_chat_template(chat[:-1], add_generation_prompt=True, tokenize=False)
    options = {"continue_final_message": True, "add_generation_prompt": False}
    tokens = ours.render(openai_messages([*TURNS, {"role": "assistant", "content": answer}]), options=options)
    assert ours.show(tokens) == expected and expected.endswith(answer.split("</think>\n\n")[-1].lstrip())
    if "<|im_end|>" not in answer:                  # which is text to us, in a message
        assert tokens == ours.encode_with_specials(expected)
    closed = theirs.apply_chat_template(chat, add_generation_prompt=False, tokenize=False)
    assert ours.show(ours.render(openai_messages(chat), options={"add_generation_prompt": False})) == closed


@pytest.mark.parametrize("thought", ["Let me", "a\n", "<think>"])
def test_an_answer_cut_in_thought_continues_there(thought):
    from transformers import PreTrainedTokenizerFast
    template = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>\n{{ m.reasoning_content.lstrip('\n') }}"
                "\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}")
    family = trained("qwen2")
    theirs = PreTrainedTokenizerFast(tokenizer_object=family, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=template)
    ours = open_tokenizer(TextSpec("hf", family.to_str().encode(), template, bos_token=0, eos_token=1))
    chat = [*TURNS, {"role": "assistant", "content": "", "reasoning_content": thought}]
    expected = theirs.apply_chat_template(chat, continue_final_message="reasoning_content", tokenize=False)
    assert expected.endswith("<think>\n" + thought)
    assert ours.show(ours.render(openai_messages(chat), options={"continue_final_message": True})) == expected


def test_a_template_must_show_what_it_continues():
    """A template that leaves out the last message cannot continue it."""
    ours = open_tokenizer(TextSpec("hf", trained("qwen2").to_str().encode(), "{{ messages[0].content }}", bos_token=0, eos_token=1))
    with pytest.raises(RequestError, match="leaves out the last message"):
        ours.render(openai_messages([*TURNS, {"role": "assistant", "content": "x"}]), options={"continue_final_message": True})


PLAIN_TEMPLATE = "\n{% for m in messages %}\n  {{ m.role }}: {{ m.content }}\n{% endfor %}\n"
TOOL_TEMPLATE = "\n   {% if tools %}\n{{ tools | tojson }}{% endif %}\n{% macro one(m) %}{{ m.role | upper }}{% endmacro %}{{ one(messages[0]) }}\n  "


@pytest.mark.parametrize("tools", [[], [WEATHER]], ids=["without tools", "with tools"])
@pytest.mark.parametrize("template", [
    "{{ bos_token }}" + PLAIN_TEMPLATE, PLAIN_TEMPLATE,
    [{"name": "default", "template": PLAIN_TEMPLATE}, {"name": "tool_use", "template": TOOL_TEMPLATE}],
    [{"name": "tool_use", "template": "{{ bos_token }}" + TOOL_TEMPLATE}, {"name": "default", "template": TOOL_TEMPLATE}]])
def test_a_folder_s_chat_has_transformers_tokens(tmp_path, template, tools):
    """A folder's chat has the tokens of apply_chat_template, with a template for tools and bos only from it."""
    from transformers import AutoTokenizer
    families.write_tokenizer(tmp_path, template=None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<s>", "eos_token": "<|end|>", "add_bos_token": True, "chat_template": template,
        "tokenizer_class": "PreTrainedTokenizerFast"}))
    ours, theirs = open_tokenizer(hf_text(tmp_path, 260)), AutoTokenizer.from_pretrained(tmp_path)
    chat = CHATS["turns"]
    if tools and isinstance(template, str):         # it knows no tools: a system prompt of ours tells of them
        assert "weather" in ours.decode(ours.render(openai_messages(chat, True), tools))
        return
    assert ours.render(openai_messages(chat, True), tools) == theirs.apply_chat_template(
        chat, tools or None, add_generation_prompt=True, return_dict=False)
    assert ours.encode_prompt("hello")[0] == 256        # a raw prompt begins with bos


def test_a_gguf_s_second_template_is_for_tools():
    metadata = small_gguf_metadata("gpt-2") | {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "with {{ tools | length }}"}
    ours = open_tokenizer(gguf_text("x.gguf", metadata))
    assert ours.tool_format == "json"
    for tools, text in (([], "plain"), ([WEATHER], "with 1")):
        assert ours.decode(ours.render(openai_messages(CHATS["a question"]), tools)) == text
