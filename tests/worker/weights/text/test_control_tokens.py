"""GGUF files that give the tokens around turns the type of ordinary ones: prompts are those of a file that gives them the right type."""

import json
from dataclasses import replace

import pytest

from chatlm.common.messages.requests import Message
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.weights.formats.gguf.description import gguf_text
from chatlm.worker.weights.formats.gguf.file import read_gguf
from nightly import by_day
from openai_routes import TEMPLATE_SYSTEM
from real_server import ask, post, server
from sick_models import diagnose, metadata_of, rewritten
from sick_weights import default_copy
from tiny_gguf import sentencepiece_metadata, small_gguf_metadata, write_gguf

GEMMA = ("{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
         "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}")
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
TALK_OF_ONE = [{"role": "user", "content": "Say hello."}]
TALK = [Message("user", "hello world <end_of_turn>"), Message("assistant", "hello"), Message("user", "world")]


def with_marks(metadata, marks, template, kind):
    """A vocabulary with these tokens of this type at its end."""
    key = "tokenizer.ggml."
    scores = {f"{key}scores": metadata[f"{key}scores"] + [-1000.0] * len(marks)} if f"{key}scores" in metadata else {}
    return metadata | scores | {f"{key}tokens": metadata[f"{key}tokens"] + marks, f"{key}token_type": metadata[f"{key}token_type"] + [kind] * len(marks),
                                "tokenizer.chat_template": template}


def text_of(folder, metadata):
    path = write_gguf(folder / "vocabulary.gguf", {}, {}, metadata)
    return gguf_text(path, read_gguf(path)[0])


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED])
@pytest.mark.parametrize("vocabulary, marks, template", [
    (sentencepiece_metadata(), ["<start_of_turn>", "<end_of_turn>", "<start_of_image>"], GEMMA),
    (small_gguf_metadata("qwen2"), ["<|im_start|>", "<|im_end|>"], CHATML),
    (small_gguf_metadata("gpt-2"), ["<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"], "{% for m in messages %}<\uff5cUser\uff5c>{{ m.content }}<\uff5cend\u2581of\u2581sentence\uff5c>{% endfor %}"),
    (small_gguf_metadata("gpt-2"), ["[INST]", "[/INST]", "</s>"], "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}")])
def test_wrong_types_do_not_lengthen_a_prompt(vocabulary, marks, template, kind, tmp_path, caplog):
    """A prompt is as short as with the right types."""
    right, wrong = (text_of(tmp_path, with_marks(vocabulary, marks, template, each)) for each in (CONTROL, kind))
    ours = open_tokenizer(wrong)
    expected, found = open_tokenizer(right).render(TALK), ours.render(TALK)
    if kind == NORMAL:
        assert found == expected and wrong.stop_tokens == right.stop_tokens
        assert "count as such" in caplog.text and json.dumps(marks[0]) in caplog.text
    assert len(found) == len(expected)      # a user-defined token is one too, whoever writes it


def test_who_writes_the_end_of_a_turn_does_not_end_it(tmp_path):
    """Whichever type the file gives it: in a message it stays text."""
    for kind in (NORMAL, USER_DEFINED, CONTROL):
        text = text_of(tmp_path, with_marks(sentencepiece_metadata(), ["<start_of_turn>", "<end_of_turn>"], GEMMA, kind))
        ours = open_tokenizer(text)
        end = ours.specials["<end_of_turn>"]
        assert text.stop_tokens >= {end} and ours.render(TALK).count(end) == 3 and end not in ours.encode("hello <end_of_turn>") and ours.token_bytes(end) == b""


def test_words_that_a_template_writes_stay_words(tmp_path, caplog):
    """Only what looks like a mark of turns becomes one: not words, tags of HTML, thoughts or unused tokens."""
    marks = ["hello", "<table>", "<think>", "Assistant:"]
    template = "{% for m in messages %}<table>hello Assistant:{{ m.content }}<think><unused1><|im_end|>{% endfor %}"
    metadata = with_marks(small_gguf_metadata("gpt-2"), marks, template, NORMAL)
    metadata["tokenizer.ggml.tokens"] += ["<unused1>"]
    metadata["tokenizer.ggml.token_type"] += [UNUSED]
    ours = open_tokenizer(text_of(tmp_path, metadata))
    assert set(ours.specials) == {"<|end|>"} and "count as such" not in caplog.text


def test_an_end_token_that_is_ordinary_text_stays_so(tmp_path):
    """Its id is probably another token's: `check` says so, and nothing is cut out of texts."""
    metadata = small_gguf_metadata("gpt-2") | {"tokenizer.ggml.eos_token_id": 256}
    assert "he" in metadata["tokenizer.ggml.tokens"][256]
    assert "he" not in open_tokenizer(text_of(tmp_path, metadata)).specials


def test_tokens_that_fill_gaps_are_found(tmp_path):
    """Tokens that fill gaps are found, whatever their type."""
    marks = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]
    for kind in (NORMAL, USER_DEFINED, CONTROL):
        ours = open_tokenizer(text_of(tmp_path, with_marks(small_gguf_metadata("qwen2"), marks, "", kind)))
        assert list(ours.infill_tokens[:3]) == [ours.named_tokens[mark] for mark in marks]


def of_normal_type(*names):
    def changes(metadata):
        types = list(metadata["tokenizer.ggml.token_type"])
        for name in names:
            types[list(metadata["tokenizer.ggml.tokens"]).index(name)] = NORMAL
        return {"tokenizer.ggml.token_type": types}
    return changes


@pytest.mark.parametrize("served", by_day([False, True], False))
def test_the_default_model_bears_wrong_types(served, tmp_path, default_model_path):
    """The default model answers the same with wrong types, by day it has the same prompts; and `check` says it."""
    path = rewritten(default_copy(tmp_path), of_normal_type("<|im_start|>", "<|im_end|>", "<|endoftext|>")(metadata_of(default_model_path)))
    [said] = [finding for finding in diagnose(path, only=("ends",)).findings if "count as control tokens here" in finding.what]
    assert "<|im_end|>" in said.what and "<|im_start|>" in said.what and said.severity == "warning"
    texts = [gguf_text(model, read_gguf(model)[0]) for model in (default_model_path, path)]
    right, wrong = (open_tokenizer(replace(text, system=None)) for text in texts)       # only the first is known by its name
    assert wrong.render(TALK) == right.render(TALK)
    answers = []
    for model in (default_model_path, path) if served else ():
        with server(model) as (_, url):
            answer = json.load(post(url + "/v1/chat/completions", ask("Say hello.", messages=[TEMPLATE_SYSTEM, *TALK_OF_ONE], max_tokens=24)))
            answers.append((answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]))
    assert not served or answers[0] == answers[1]
