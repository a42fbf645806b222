"""Tokens that a folder's other files name and its tokenizer.json lacks: ids, ends and prompts as transformers has them."""

import dataclasses
import json

import pytest
import transformers

from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import Message
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.doctor.examined_model import ExaminedModel
from chatlm.worker.weights.formats.folder.description import hf_text
from families import CHAT, clear_cases, make_model, write_tokenizer
from real_server import ask, get, post, server

ROWS = 288          # of the embedding: 260 tokens are in tokenizer.json as it is saved
TALK = [Message("user", "hello<|end|> world"), Message("assistant", "yes"), Message("user", "<|user|>?")]
CHATS = [{"role": message.role, "content": message.content} for message in TALK]


def flags(content, **more):
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True} | more


def folder_of(folder, lacks=("<s>", "<|end|>", "<|user|>", "<|assistant|>"), inside=(), **files):
    """A folder whose tokenizer.json lacks these tokens; those of `inside` are ordinary ones of its vocabulary."""
    write_tokenizer(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in lacks]
    content["post_processor"] = None
    content["model"]["vocab"] |= {text: 256 + i for i, text in enumerate(inside)}
    path.write_text(json.dumps(content))
    for name, value in ({"tokenizer_config": {}} | files).items():
        value = value | ({"tokenizer_class": "PreTrainedTokenizerFast"} if name == "tokenizer_config" else {})
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


IDS = {"256": flags("<s>"), "257": flags("<|end|>"), "258": flags("<|user|>"), "259": flags("<|assistant|>")}
NAMED = {"bos_token": "<s>", "eos_token": "<|end|>", "additional_special_tokens": ["<|user|>", "<|assistant|>"]}
FILES = {
    "the decoder alone": dict(tokenizer_config={"added_tokens_decoder": IDS, "bos_token": "<s>", "eos_token": "<|end|>"}),
    "lists alone": dict(tokenizer_config=NAMED),
    "the later name of the list": dict(tokenizer_config={"bos_token": "<s>", "eos_token": "<|end|>", "extra_special_tokens": ["<|user|>", "<|assistant|>"]}),
    "objects": dict(tokenizer_config={"bos_token": flags("<s>", __type="AddedToken"), "eos_token": flags("<|end|>", special=False, __type="AddedToken"),
                                      "additional_special_tokens": [flags("<|user|>", __type="AddedToken"), "<|assistant|>"]}),
    "the map alone": dict(special_tokens_map=NAMED),
    "the map, as objects": dict(special_tokens_map={"bos_token": flags("<s>"), "eos_token": {"content": "<|end|>"}, "additional_special_tokens": ["<|user|>", "<|assistant|>"]}),
    "the map beside another": dict(tokenizer_config=NAMED | {"eos_token": "<s>"}, special_tokens_map={"eos_token": "<|end|>"}),
    "an older file": dict(added_tokens={"<|user|>": 258, "<s>": 256, "<|end|>": 257, "<|assistant|>": 259}, special_tokens_map=NAMED)}


@pytest.mark.parametrize("lacks, inside", [(("<s>", "<|end|>", "<|user|>", "<|assistant|>"), ()), (("<|assistant|>",), ()),
                                           (("<s>", "<|end|>", "<|user|>", "<|assistant|>"), ("<s>", "<|end|>", "<|user|>", "<|assistant|>"))],
                         ids=["all lack", "one lacks", "in the vocabulary"])
@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_tokens_in_other_files_match_transformers(files, lacks, inside, tmp_path):
    folder = folder_of(tmp_path, lacks, inside, **files)
    theirs, text = transformers.AutoTokenizer.from_pretrained(folder), hf_text(folder, ROWS)
    ours = open_tokenizer(text)
    assert ours.specials == {token.content: i for i, token in theirs.added_tokens_decoder.items()}
    # 5.23 forgets of an older file which tokens the map lists as special; 4 did not
    assert "added_tokens" in files or all(token.special for token in theirs.added_tokens_decoder.values())
    assert (text.bos_token, text.eos_token, text.stop_tokens) == (256, 257, {257})
    typed = ours.render([dataclasses.replace(message, content="hi") for message in TALK])
    assert typed == theirs.apply_chat_template([chat | {"content": "hi"} for chat in CHATS], chat_template=CHAT, tokenize=True, return_dict=False)
    assert ours.render(TALK).count(257) == 3      # who writes a token's name in a message writes text
    assert 257 not in ours.encode("<|end|>")


def test_decoder_flags_win_over_tokenizer_json_s(tmp_path):
    """Flags of the decoder count before those of tokenizer.json."""
    folder = folder_of(tmp_path, (), tokenizer_config={"bos_token": "<s>", "eos_token": "<|end|>", "added_tokens_decoder": IDS | {
        "258": flags("<|user|>", special=False), "259": flags("<|assistant|>", rstrip=True), "260": flags("<think>", special=False)}})
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), open_tokenizer(hf_text(folder, ROWS))
    assert ours.specials == {token.content: i for i, token in theirs.added_tokens_decoder.items() if token.special} == {"<s>": 256, "<|end|>": 257, "<|assistant|>": 259}
    assert ours.added == {258: b"<|user|>", 260: b"<think>"} and ours.swallows == {"<|assistant|>": (False, True)}
    assert ours.encode("a<think>b") == theirs.encode("a<think>b", add_special_tokens=False)


def test_the_map_wins_unless_there_is_a_decoder(tmp_path):
    """A name that both files have differently is the map's, unless there is a decoder."""
    for config, expected in ((NAMED, 256), (NAMED | {"added_tokens_decoder": IDS}, 257)):
        folder = folder_of(tmp_path, (), tokenizer_config=config, special_tokens_map={"eos_token": "<s>"})
        assert hf_text(folder, ROWS).eos_token == transformers.AutoTokenizer.from_pretrained(folder).eos_token_id == expected


def test_tokens_without_a_row_or_id_are_left_out(tmp_path, caplog):
    """As tokens of a vocabulary that was never resized: transformers would look up rows that do not exist."""
    folder = folder_of(tmp_path, (), tokenizer_config=NAMED | {"pad_token": "<pad>", "added_tokens_decoder": IDS | {"300": flags("<far>"), "5": flags("<|end|>")}})
    for rows, specials in ((260, 4), (261, 5)):     # with one row more there is room for one
        ours = open_tokenizer(hf_text(folder, rows))
        assert len(ours.specials) == specials and ours.specials["<|end|>"] == 257 and "<far>" not in ours.specials
    assert 'give these tokens other ids, which do not count: "<|end|>", "<far>"' in caplog.text


def test_a_folder_that_names_no_more_keeps_its_bytes(tmp_path):
    write_tokenizer(tmp_path)
    assert hf_text(tmp_path, ROWS).payload == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name, value, words", [
    ("tokenizer_config", {"added_tokens_decoder": [1]}, "added_tokens_decoder is a list of 1; it must be an object"),
    ("tokenizer_config", {"added_tokens_decoder": {"x": {"content": "a"}}}, '"x" has an object of 1; there must be ids of tokens'),
    ("tokenizer_config", {"added_tokens_decoder": {"256": "<s>"}}, '"256" has "<s>"; there must be ids of tokens'),
    ("tokenizer_config", {"added_tokens_decoder": {"256": {"content": 7}}}, "256 has an object of 1; a token must be a text"),
    ("tokenizer_config", {"added_tokens_decoder": {"256": {"content": "<s>", "special": "yes"}}}, "256 has an object of 2; a token must be"),
    ("tokenizer_config", {"additional_special_tokens": "<s>"}, 'additional_special_tokens is "<s>"; it must be a list of tokens'),
    ("tokenizer_config", {"additional_special_tokens": [3]}, "additional_special_tokens has 3; a token must be a text"),
    ("special_tokens_map", {"extra_special_tokens": 5}, "extra_special_tokens is 5; it must be a list of tokens"),
    ("added_tokens", {"<s>": "a"}, '"a" has an object of 1; there must be ids of tokens'), ("added_tokens", {"<s>": [1]}, "a list of 1 has an object of 1; there must be ids"),
    ("added_tokens", {"<s>": True}, "true has an object of 1"), ("added_tokens", [], "must hold an object"), ("special_tokens_map", 3, "holds 3; it must hold an object")])
def test_what_is_no_token_is_named(name, value, words, tmp_path):
    folder = folder_of(tmp_path)
    (folder / f"{name}.json").write_text(json.dumps(value))
    with pytest.raises(ConfigError, match=words) as caught:
        hf_text(folder, ROWS)
    assert str(caught.value).startswith(f"{folder}/") and "\n" not in str(caught.value)


def test_many_tokens_are_added_in_no_time(tmp_path):
    """Many tokens are added in no time, and no more than there are rows."""
    decoder = {str(256 + i): flags(f"<t{i}>") for i in range(40_000)}
    folder = folder_of(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    ours = open_tokenizer(hf_text(folder, 20_000))
    assert ours.vocab_size == 20_000 and ours.specials["<t19743>"] == 19_999


def test_a_server_ends_answers_where_the_map_says(tmp_path):
    from chatlm.common.config import Settings
    from chatlm.common.hub.find import resolve_model
    model = make_model("llama2")
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    model.save_pretrained(tmp_path)
    folder = folder_of(tmp_path, special_tokens_map=NAMED)
    (folder / "generation_config.json").unlink(missing_ok=True)
    settings = Settings(model=str(folder), dtype="float32")
    examined = ExaminedModel(resolve_model(settings), settings)
    assert examined.tokenizer.stop_tokens == {257}
    with server(folder, "--dtype", "float32") as (_, url):
        body = ask("hi", max_tokens=2, logit_bias={"257": 100})
        answer = json.load(post(url + "/v1/chat/completions", body))
        assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["prompt_tokens"] == len(examined.tokenizer.render([Message("user", "hi")]))
        assert get(url + "/v1/models")["data"][0]["capabilities"]["chat"]
