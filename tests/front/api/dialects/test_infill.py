"""Filling in the middle of a text: the prompts that ask for it, and the routes over a real model."""

import json
import random
import urllib.error
import urllib.request

import openai
import pytest

from chatlm.common.config import Settings
from chatlm.common.errors import Overloaded, RequestError
from chatlm.common.messages.protocol import Known
from chatlm.common.messages.requests import AnswerParams, Infill, InfillTokens, Request, TextSpec
from chatlm.common.text.load import HuggingFaceTokenizer, open_tokenizer
from chatlm.front.admission.infill_prompts import InfillMaker
from chatlm.front.admission.prompts import PromptMaker
from chatlm.front.api.reading import read_answer
from chatlm.worker.weights.formats.gguf.description import gguf_text
from families import make_model, save, write_tokenizer
from real_server import server
from tiny_gguf import LLAMA_NUMBERS, random_llama, small_gguf_metadata, write_gguf

QWEN = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
        "<|file_sep|>"]
STARCODER = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<repo_name>",
             "<file_sep>"]
GRANITE = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>", "<reponame>",
           "<filename>"]
END, PREFIX, MIDDLE, SUFFIX, PAD, REPOSITORY, FILE = range(260, 267)


def add_tokens(folder, names, special):
    """Add tokens to a tokenizer.json. Those of Qwen2.5-Coder are not special there."""
    import tokenizers
    pipeline = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    pipeline.add_tokens([tokenizers.AddedToken(name, special=special, normalized=False) for name in names])
    pipeline.save(str(folder / "tokenizer.json"))


def tokenizer_with(folder, names, special, **changes):
    write_tokenizer(folder)
    add_tokens(folder, names, special)
    return open_tokenizer(
        TextSpec("hf", (folder / "tokenizer.json").read_bytes(), stop_tokens=frozenset({257}), **changes))


@pytest.fixture(params=["qwen", "starcoder", "granite"])
def tokenizer(request, tmp_path):
    names = {"qwen": QWEN, "starcoder": STARCODER, "granite": GRANITE}[request.param]
    return tokenizer_with(tmp_path, names, special=request.param != "qwen")


def made(tokenizer, *, prompt="", context=10_000, max_tokens=None, **infill):
    """(The ids of a prompt, whether it was cut.)"""
    infill = Infill(**{"suffix": ("",), "cut": True} | infill)
    request = Request(prompts=(prompt,), infill=infill, max_tokens=max_tokens)
    prompts, cut = InfillMaker(tokenizer, context).prompts(request, infill)
    return list(prompts[0]), cut


# which tokens


def test_each_family_s_tokens_are_found_by_name(tokenizer):
    tokens, names = tokenizer.infill_tokens, tokenizer.named_tokens
    assert tokens[:4] == (PREFIX, SUFFIX, MIDDLE, PAD) and tokens.missing == []
    assert (tokens.repository == (None if "<repo_name>" in names else REPOSITORY)
            and tokens.file == (FILE if "<|file_sep|>" in names else None))
    assert tokens.ends == (END, PAD, REPOSITORY, FILE)


def test_a_tokenizer_without_them_lacks_them(tmp_path):
    assert tokenizer_with(tmp_path, [], special=True).infill_tokens == InfillTokens()
    assert InfillTokens().missing == ["prefix", "suffix", "middle"] and InfillTokens(1, 2, 3).missing == []


def gguf_tokens(**ids):
    """A vocabulary whose last eight tokens are <a> to <h>, control tokens, with metadata."""
    metadata = small_gguf_metadata("gpt-2")
    names = [f"<{letter}>" for letter in "abcdefgh"]
    first = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] += names
    metadata["tokenizer.ggml.token_type"] += [3] * len(names)
    return metadata | {f"tokenizer.ggml.{name}_token_id": first + index for name, index in ids.items()}, first


@pytest.mark.parametrize("names", ["fim_pre fim_suf fim_mid", "prefix suffix middle"])
def test_a_gguf_tells_of_them_by_id(tmp_path, names):
    metadata, first = gguf_tokens(**{name: index for index, name in enumerate(names.split())}, fim_pad=3,
                                  fim_rep=4, fim_sep=5)
    tokens = open_tokenizer(gguf_text(tmp_path, metadata)).infill_tokens
    assert tokens[:6] == tuple(range(first, first + 6)) and tokens.ends == tuple(range(first + 3, first + 6))


@pytest.mark.parametrize("wrong", [10**6, -1, "5", True, 1.5, [5]])
def test_ids_not_in_a_gguf_s_vocabulary_are_ignored(tmp_path, wrong):
    metadata, first = gguf_tokens(fim_pre=0, fim_suf=1)
    spec = gguf_text(tmp_path,
                     metadata | {"tokenizer.ggml.fim_mid_token_id": wrong,
                                 "tokenizer.ggml.middle_token_id": first + 2})
    assert spec.infill == InfillTokens(first, first + 1, first + 2)     # the older name has a usable one


def test_a_gguf_s_newer_name_counts(tmp_path):
    """Both names count before the token's own name."""
    metadata, first = gguf_tokens(fim_pre=0, fim_suf=1, fim_mid=2, middle=5)
    metadata["tokenizer.ggml.tokens"][first + 6] = "<|fim_middle|>"
    assert open_tokenizer(gguf_text(tmp_path, metadata)).infill_tokens.middle == first + 2


# prompts


def test_a_prompt_has_prefix_suffix_then_middle(tokenizer):
    ids, cut = made(tokenizer, prefix=("def f(",), prompt="x", suffix=("return", 33, " 1"))
    assert (ids == [PREFIX, *tokenizer.encode("def f(x"), SUFFIX, *tokenizer.encode("return"), 33,
                    *tokenizer.encode(" 1"), MIDDLE] and not cut)


def test_a_repository_comes_first(tokenizer):
    ids, cut = made(tokenizer, prefix=("a",), suffix=("b",), files=(("one.py", "1"), ("two.py", "22")))
    tokens, expected = tokenizer.infill_tokens, []
    if tokens.repository is not None:
        expected += [REPOSITORY, *tokenizer.encode("myproject\n")]
    for name, text in (("one.py", "1"), ("two.py", "22")):
        if tokens.file is None:
            expected += tokenizer.encode(f"\n\n--- snippet ---\n\n{text}")
        else:
            expected += [FILE, *tokenizer.encode(f"{name}\n{text}")]
    if tokens.file is not None:
        expected += [FILE, *tokenizer.encode("filename\n")]
    assert ids == [*expected, *made(tokenizer, prefix=("a",), suffix=("b",))[0]] and not cut


def test_a_prompt_begins_with_bos_if_others_do(tmp_path):
    tokenizer = tokenizer_with(tmp_path, QWEN, special=False, bos_token=256, add_bos=True)
    ids, _ = made(tokenizer, prefix=("a",), files=(("x", "y"),))
    assert ids[0] == 256 and ids.count(256) == 1 and ids[1] == REPOSITORY


def test_names_of_tokens_are_text_everywhere(tokenizer):
    names = [name for name in tokenizer.named_tokens
             if name in {*QWEN, *STARCODER, *GRANITE, "<|end|>", "<s>"}]
    text = "".join(names * 2) + "<" + names[0] + names[1][:-1]
    ids, _ = made(tokenizer, prefix=(text,), prompt=text, suffix=(text, text),
                  files=((text, text), (text, text)))
    special = [token for token in ids if token >= 256]
    files = [REPOSITORY] * (tokenizer.infill_tokens.repository is not None)
    if tokenizer.infill_tokens.file is not None:
        files = [REPOSITORY, *[FILE] * 3]
    assert special == [*files, PREFIX, SUFFIX, MIDDLE]
    assert tokenizer.decode(ids).count(text) == (8 if tokenizer.infill_tokens.file is not None else 6)


def test_a_name_that_begins_within_another_is_text(tmp_path):
    tokenizer = tokenizer_with(tmp_path, ["<PRE>", "<SUF>", "<MID>", *GRANITE[4:5]], special=False)
    text = "<<PRE><PRE<SUF>>" * 3
    ids, _ = made(tokenizer, prefix=(text,))
    assert [token for token in ids if token >= 256] == [260, 261, 262] and tokenizer.decode(ids[1:-2]) == text


def test_only_what_does_not_fit_is_cut(tokenizer):
    """What is cut is far from the gap."""
    dice = random.Random(4)
    for _ in range(200):
        before, after, context = dice.randrange(200), dice.randrange(200), dice.randrange(16, 300)
        most = dice.choice([None, 1, 50])
        files = tuple(("n", "t" * dice.randrange(60)) for _ in range(dice.randrange(3)))
        left, right = ("".join(dice.choice("abc") for _ in range(count)) for count in (before, after))
        ids, cut = made(tokenizer, prefix=(left,), suffix=(right,), context=context, max_tokens=most,
                        files=files)
        room = context - min(context // 4, most or context)
        assert len(ids) <= room
        at, then = ids.index(PREFIX), ids.index(SUFFIX)
        kept_left, kept_right = tokenizer.decode(ids[at + 1:then]), tokenizer.decode(ids[then + 1:-1])
        assert left.endswith(kept_left) and right.startswith(kept_right)
        whole, _ = made(tokenizer, prefix=(left,), suffix=(right,), files=files)
        assert cut == (len(whole) > room)
        if cut:
            assert len(ids) == room and whole[len(whole) - len(ids):][-1] == ids[-1] == MIDDLE
        if before + after + 3 > room:
            assert at == 0      # nothing is left for files
            assert (len(kept_left) >= min(before, (room - 3) * 3 // 4)
                    and len(kept_right) >= min(after, (room - 3) // 4))
        else:
            assert (kept_left, kept_right) == (left, right) and whole[-len(ids):] == ids


@pytest.mark.parametrize("kind", ["text", "ids", "file"])
def test_a_long_text_is_cut_as_if_encoded_whole(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(InfillMaker, "SLICE_CHARACTERS", 50)
    tokenizer, encoded = tokenizer_with(tmp_path, QWEN, special=False), []
    encode = HuggingFaceTokenizer.encode

    def counting(self, text, begins=True):
        encoded.append(len(text))
        return encode(self, text, begins)

    monkeypatch.setattr(HuggingFaceTokenizer, "encode", counting)
    text = "".join(random.Random(2).choices("ab c\né", k=20_000))
    parts = {"text": ((text,), (text,), ()), "ids": ((*text, 97), (98, *text), ()),
             "file": ((), (), (("x", text),))}[kind]
    ids, cut = made(tokenizer, prefix=parts[0], suffix=parts[1], files=parts[2], context=400)
    assert cut and len(ids) == 300 and sum(encoded) < 3_000
    at, then = ids.index(PREFIX), ids.index(SUFFIX)
    left, right = (
        encode(tokenizer, "".join(piece if isinstance(piece, str) else chr(piece) for piece in part))
        for part in parts[:2])
    if kind == "ids":
        left, right = [*encode(tokenizer, text), 97], [98, *encode(tokenizer, text)]
    assert (ids[at + 1:then] == left[len(left) - (then - at - 1):]
            and ids[then + 1:-1] == right[:len(ids) - then - 2])
    assert kind != "file" or encode(tokenizer, text)[-100:] == ids[at - 110:at - 10]       # [file] filename\n


@pytest.mark.parametrize("prompt, suffix",
                         [("x" * 600, ""), ("", "y" * 600), ("x" * 300, "y" * 300), ("x" * 200_000, "")])
async def test_where_nothing_may_be_cut_excess_is_refused(tokenizer, prompt, suffix):
    request = Request(prompts=(prompt,), infill=Infill((suffix,)))
    with pytest.raises(RequestError, match="context length is 512 tokens") as refused:
        await PromptMaker(tokenizer, 512).admit(request)
    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(RequestError, match="no room for an answer"):
        await PromptMaker(tokenizer, 512).admit(Request(prompts=("x" * 509,), infill=Infill(("",))))
    admitted = await PromptMaker(tokenizer, 512).admit(Request(prompts=("x" * 508,), infill=Infill(("",))))
    assert len(admitted.prompt_ids[0]) == 511 and admitted.dropped_messages == 0


async def test_a_context_without_room_for_a_gap_is_an_error(tokenizer):
    """It is one of the request."""
    with pytest.raises(RequestError, match="context length is 3 tokens"):
        await PromptMaker(tokenizer, 3).admit(Request(prompts=("x",), infill=Infill(("y",), cut=True)))


@pytest.mark.parametrize("infill, name", [
    (Infill((5, 267), cut=True), "input_suffix"), (Infill((), (10**6, "a"), cut=True), "input_prefix"),
    (Infill(("x",)), "prompt")])
async def test_ids_beyond_the_vocabulary_are_refused(tokenizer, infill, name):
    """The error names the field."""
    with pytest.raises(RequestError,
                       match=f"{name} has the token id .*; this model's ids are 0 to 266") as refused:
        await PromptMaker(tokenizer,
                          512).admit(Request(
                              prompts=((5, 300),) if name == "prompt" else ("",), infill=infill))
    assert refused.value.param == name


async def test_a_prefix_of_the_answer_may_not_end_it(tokenizer):
    request = Request(prompts=("x",), infill=Infill(("",)),
                      params=AnswerParams(stop_token_ids=tokenizer.infill_tokens.ends),
                      prefix_token_ids=(PAD,))
    with pytest.raises(RequestError, match=f"prefix_token_ids has the token id {PAD}, which ends the answer"):
        await PromptMaker(tokenizer, 512).admit(request)


# bodies

TOKENS = InfillTokens(PREFIX, SUFFIX, MIDDLE, ends=(END, FILE))
GAP = {"input_prefix": "a", "input_suffix": "b"}


def read(path, body, tokens=TOKENS):
    return read_answer(path, body, Known(Settings(seed=7), None, infill=tokens))


def test_an_answer_ends_where_the_gap_is_full():
    for path, body in (("/infill", GAP), ("/v1/completions", {"prompt": "a", "suffix": "b"}),
                       ("/api/generate", {"prompt": "a", "suffix": "b"})):
        assert read(path, body).request.params.stop_token_ids == (END, FILE)
        if path != "/api/generate":
            assert read(path, body | {"stop_token_ids": [5]}).request.params.stop_token_ids == (5, END, FILE)
            assert read(path,
                        body | {"stop_token_ids": [5], "ignore_eos": True}).request.params.stop_token_ids == (
                            5,)


def test_an_empty_suffix_is_none():
    for path in ("/v1/completions", "/api/generate"):
        for suffix in ({}, {"suffix": None}, {"suffix": ""}):
            request = read(path, {"prompt": "a"} | suffix, InfillTokens()).request
            assert request.infill is None and request.params.stop_token_ids == ()


@pytest.mark.parametrize("path, body, param", [
    ("/infill", GAP, None), ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
    ("/api/generate", {"prompt": "a", "suffix": "b"}, "suffix")])
@pytest.mark.parametrize("tokens, lacks", [
    (InfillTokens(), "prefix, suffix and middle tokens"), (InfillTokens(1, None, 3), "suffix token"),
    (InfillTokens(1), "suffix and middle tokens")])
def test_without_the_tokens_infill_says_why_not(path, body, param, tokens, lacks):
    """The model lacks them."""
    with pytest.raises(RequestError) as refused:
        read(path, body, tokens)
    assert str(refused.value) == f"this model cannot fill in the middle: its tokenizer has no {lacks}"
    assert (refused.value.status, refused.value.code, refused.value.param) == (
        400, "infill_not_supported", param)
    with pytest.raises(Overloaded, match="still loading"):
        read(path, body, None)


WRONG = [  # a field of /infill, a value that it may not have, and what the error says is allowed
    ("input_prefix", 5, "must be a string, or a list of at most"),
    ("input_prefix", {"a": 1}, "must be a string"), ("input_prefix", [1.5], "strings and token ids"),
    ("input_prefix", None, "input_prefix is missing"), ("input_suffix", True, "must be a string"),
    ("input_suffix", [-1], "token ids"),
    ("input_suffix", None, "input_suffix is missing"),
    ("input_extra", "x", 'a list of objects, each with a string "text"'),
    ("input_extra", {"text": "x"}, "a list of objects"),
    ("input_extra", [{"filename": "x"}], 'a string "text"'),
    ("input_extra", [{"text": 5}], 'a string "text"'),
    ("input_extra", [{"text": "x", "filename": 5}], 'a string "filename"'),
    ("input_extra", ["x"], "a list of objects"),
    ("prompt", ["x"], "must be a string"), ("prompt", 5, "must be a string"),
    ("n_predict", "5", "an integer of at least -2"), ("n_predict", -3, "at least -2"),
    ("n_predict", 1.5, "an integer"), ("n_probs", 21, "from 0 to 20"), ("n_probs", True, "an integer"),
    ("return_tokens", "maybe", "true or false"),
    ("response_fields", "content", "a list of at most 100 strings"), ("response_fields", [5], "strings"),
    ("response_fields", ["x"] * 101, "at most 100"),
    ("stop", 5, "a string or a list"), ("repeat_penalty", 0, "from 0.01 to 10"),
    ("temperature", "hot", "a finite number"), ("stream", 1, "true or false"),
    ("grammar", 5, "a grammar in GBNF"), ("json_schema", "x", "a JSON schema")]


@pytest.mark.parametrize("name, value, allowed", WRONG)
def test_a_wrong_field_names_what_is_allowed(name, value, allowed):
    with pytest.raises(RequestError) as refused:
        read("/infill", GAP | {name: value})
    assert (refused.value.param == name and name in str(refused.value)
            and allowed in str(refused.value)), str(refused.value)


@pytest.mark.parametrize("name, value",
                         [("suffix", 5), ("suffix", ["b"]), ("suffix", {"a": 1}), ("suffix", True)])
@pytest.mark.parametrize("path", ["/v1/completions", "/api/generate"])
def test_a_suffix_is_a_string(path, name, value):
    with pytest.raises(RequestError, match="suffix must be a string") as refused:
        read(path, {"prompt": "a", name: value})
    assert refused.value.param == "suffix"


def test_echoed_logprobs_exclude_a_suffix():
    with pytest.raises(RequestError, match="echo and logprobs exclude each other") as refused:
        read("/v1/completions", {"prompt": "a", "suffix": "b", "echo": True, "logprobs": 1})
    assert refused.value.param == "echo"


# a real model


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "coder"
    folder.mkdir()
    save(make_model("qwen2", max_position_embeddings=1024), folder)
    add_tokens(folder, QWEN, special=False)
    with server(folder) as (_, url):
        yield url


def post(url, path, body):
    """(status, headers, text) of one request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        response = urllib.request.urlopen(
            urllib.request.Request(url + path, data, {"Content-Type": "application/json"}), timeout=120)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        return response.status, response.headers, response.read().decode()


def infilled(url, **changes):
    status, _, text = post(url, "/infill",
                           {"input_prefix": "def f(", "input_suffix": "return 1", "temperature": 0,
                            "n_predict": 8} | changes)
    assert status == 200, text
    return json.loads(text)


def completed(url, **changes):
    status, _, text = post(url, "/v1/completions",
                           {"prompt": "def f(", "suffix": "return 1", "temperature": 0,
                            "max_tokens": 8} | changes)
    assert status == 200, text
    return json.loads(text)


def test_the_answer_has_llama_server_s_members(url):
    answer = infilled(url, return_tokens=True, n_probs=2)
    assert {"index", "content", "tokens", "id_slot", "stop", "model", "tokens_predicted", "tokens_evaluated",
            "generation_settings", "has_new_line",
            "truncated", "stop_type", "stopping_word", "tokens_cached", "timings",
            "completion_probabilities"} == answer.keys()
    assert (answer["stop"], answer["stop_type"], answer["truncated"], answer["model"]) == (
        True, "limit", False, "coder")
    assert (answer["tokens_predicted"] == len(answer["tokens"]) == 8
            and answer["tokens_evaluated"] == 1 + 11 + 10 + 3 + 6 + 8)
    assert (answer["tokens_evaluated"] == answer["timings"]["cache_n"] + answer["timings"]["prompt_n"]
            and answer["timings"]["predicted_n"] == 8)
    assert answer["tokens_cached"] == answer["tokens_evaluated"] + 8 - 1    # the last is not computed
    assert [entry["id"] for entry in answer["completion_probabilities"]] == answer["tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in answer["completion_probabilities"])
    assert (answer["generation_settings"]["n_predict"] == 8
            and answer["generation_settings"]["temperature"] == 0)


def test_the_model_reads_the_prompt_that_was_made(url):
    """The same ids as a raw prompt give the same answer."""
    ids = [256, REPOSITORY, *b"myproject\n", FILE, *b"a.py\nabc", FILE, *b"filename\n", PREFIX, *b"def f(x",
           SUFFIX, *b"return 1", MIDDLE]
    letters = post(url, "/tokenize", {"content": "".join(map(chr, range(128)))})[2]
    number = dict(zip(range(128), json.loads(letters)["tokens"]))
    raw = json.loads(
        post(url, "/v1/completions",
             {"prompt": [number.get(token, token) for token in ids], "max_tokens": 8, "temperature": 0,
                                                   "return_token_ids": True,
                                                   "stop_token_ids": [END, PAD, REPOSITORY, FILE]})[2])
    answer = infilled(url, prompt="x", input_extra=[{"filename": "a.py", "text": "abc"}], return_tokens=True)
    assert (answer["tokens"] == raw["choices"][0]["token_ids"]
            and answer["tokens_evaluated"] == raw["usage"]["prompt_tokens"] == len(ids))


def test_a_stream_is_the_whole_answer_in_pieces(url):
    whole = infilled(url, return_tokens=True, n_probs=1, seed=3, temperature=1)
    status, headers, text = post(url, "/infill",
                                 {"input_prefix": "def f(", "input_suffix": "return 1", "temperature": 1,
                                  "n_predict": 8, "seed": 3,
                                                  "return_tokens": True, "n_probs": 1, "stream": True})
    assert status == 200 and headers["Content-Type"].startswith("text/event-stream") and "[DONE]" not in text
    *pieces, last = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
    assert ([piece["stop"] for piece in pieces] == [False] * len(pieces) and last["stop"]
            and last["content"] == "" and len(pieces) > 1)
    assert ("".join(piece["content"] for piece in pieces) == whole["content"]
            and sum([piece["tokens"] for piece in pieces], []) == whole["tokens"])
    assert sum([piece.get("completion_probabilities", [])
                for piece in pieces], []) == whole["completion_probabilities"]
    assert [piece["tokens_predicted"]
            for piece in pieces] == sorted(piece["tokens_predicted"] for piece in pieces)
    assert {piece["tokens_evaluated"]
            for piece in pieces} == {last["tokens_evaluated"]} == {whole["tokens_evaluated"]}
    same = "stop_type stopping_word tokens_predicted truncated has_new_line model generation_settings".split()
    assert [last[name] for name in same] == [whole[name] for name in same]


@pytest.mark.parametrize("token", [257, END, PAD, REPOSITORY, FILE])
def test_any_end_token_fills_the_gap(url, token):
    """The token ends a text, a file or a repository, or is padding."""
    bias = {str(token): 100}
    answer = infilled(url, logit_bias=bias, return_tokens=True)
    assert (answer["content"], answer["tokens"], answer["stop_type"], answer["stopping_word"]) == ("",
        [token], "eos", "")
    choice = completed(url, logit_bias=bias)["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", "eos"
        if token == 257 else str(token))
    assert infilled(url, logit_bias=bias, ignore_eos=True)["tokens_predicted"] == 8


def test_the_prefix_token_does_not_end_it(url):
    assert infilled(url, logit_bias={str(PREFIX): 100})["stop_type"] == "limit"


def test_a_stop_string_ends_it_and_is_named(url):
    text = infilled(url, n_predict=40)["content"]
    stop = next(letter for letter in text[2:] if letter.isascii() and letter.isprintable())
    answer = infilled(url, n_predict=40, stop=[stop])
    assert (answer["stop_type"], answer["stopping_word"], answer["content"]) == (
        "word", stop, text[:text.index(stop)])
    choice = completed(url, max_tokens=40)["choices"][0]["text"]
    stop = next(letter for letter in choice[2:] if letter.isascii() and letter.isprintable())
    ended = completed(url, max_tokens=40, stop=stop)["choices"][0]
    assert (ended["text"], ended["stop_reason"]) == (choice[:choice.index(stop)], stop)


def lines(number, count=40, **changes):
    """An answer to `count` tokens of which number[letter] says how likely each letter is."""
    bias = {str(number[letter]): weight for letter, weight in changes.pop("letters").items()}
    return infilled(url=changes.pop("url"), n_predict=count, logit_bias=bias, temperature=1, **changes)


@pytest.fixture(scope="module")
def number(url):
    """The token of each ASCII character."""
    letters = post(url, "/tokenize", {"content": "".join(map(chr, range(128)))})[2]
    return dict(zip(map(chr, range(128)), json.loads(letters)["tokens"]))


LETTERS = {"\n": 99, " ": 100, "\t": 98, "x": 100}


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_that_is_indented_too_little_ends_it(url, number, stream):
    """llama-server's n_indent: the first line does not count, and the rest of the text is as without."""
    for seed in range(8):
        whole = lines(number, url=url, letters=LETTERS, seed=seed)["content"]
        short = lines(number, url=url, letters=LETTERS, seed=seed, n_indent=2)
        first, *others = whole.split("\n")
        kept = [first]
        for row, line in enumerate(others, 1):
            indent = len(line) - len(line.lstrip(" \t"))
            cut = indent < 2 and (indent < len(line) or row < len(others))
            kept.append(line[:indent] if cut else line)
            if cut:
                break
        assert (short["content"], short["stop_type"], short["stopping_word"]) == ("\n".join(kept), "limit", "")
        assert short["tokens_predicted"] == min(40, len(short["content"]) + 1)
        assert lines(number, url=url, letters=LETTERS, seed=seed, n_indent=0)["content"] == whole
        if stream:
            body = {"input_prefix": "def f(", "input_suffix": "return 1", "temperature": 1, "n_predict": 40,
                    "seed": seed, "n_indent": 2, "stream": True,
                    "logit_bias": {str(number[letter]): weight for letter, weight in LETTERS.items()}}
            _, _, text = post(url, "/infill", body)
            pieces = [json.loads(line[6:]) for line in text.split("\n") if line.startswith("data: ")]
            assert "".join(piece["content"] for piece in pieces) == short["content"]


def test_a_new_line_after_the_time_ends_it(url, number):
    """llama-server's t_max_predict_ms. Without a new line the answer goes on."""
    changes = {"url": url, "count": 400, "seed": 1}
    ended = lines(number, letters={"\n": 100, "x": 100}, t_max_predict_ms=1, **changes)
    assert ended["stop_type"] == "limit" and ended["tokens_predicted"] < 400
    assert ended["content"].endswith("\n")
    assert lines(number, letters={"x": 100}, t_max_predict_ms=1, **changes)["content"] == "x" * 400
    for never in (0, -1, 10**9):
        assert lines(number, letters={"\n": 100}, t_max_predict_ms=never, **changes)["content"] == "\n" * 400


@pytest.mark.parametrize("name, value", [("n_indent", -1), ("n_indent", "x"), ("t_max_predict_ms", -2),
                                         ("t_max_predict_ms", [])])
def test_a_wrong_limit_of_lines_is_refused_by_name(url, name, value):
    status, _, text = post(url, "/infill", {"input_prefix": "", "input_suffix": "", name: value})
    assert status == 400 and json.loads(text)["error"]["param"] == name


def test_no_wanted_tokens_compute_the_prompt_alone(url):
    text = "".join(random.Random(8).choices("abcdef", k=200))
    answer = infilled(url, input_prefix=text, n_predict=0)
    assert (answer["content"], answer["stop_type"]) == ("", "limit") and answer["timings"]["cache_n"] < 100
    again = infilled(url, input_prefix=text, input_suffix="other")
    assert again["timings"]["cache_n"] >= 200 // 16 * 16


def test_only_the_members_that_are_wanted_come(url):
    wanted = ["content", "timings/prompt_n", "generation_settings/n_predict", "no", "timings/no",
              "content/no", ""]
    answer = infilled(url, response_fields=wanted)
    assert (answer.keys() == {"content", "timings/prompt_n", "generation_settings/n_predict"}
            and answer["generation_settings/n_predict"] == 8)


def test_unused_fields_of_llama_server_are_named(url):
    """They have no effect."""
    body = {"input_prefix": "a", "input_suffix": "b", "n_predict": 1, "samplers": ["infill"],
            "cache_prompt": True, "t_max_prompt_ms": 5,
            "input_extra": [{"text": "x", "filename": "y", "time": 5}]}
    status, headers, _ = post(url, "/infill", body)
    assert status == 200 and headers["X-Ignored-Fields"] == "samplers, cache_prompt, t_max_prompt_ms"


def test_a_grammar_decides_what_fills_the_gap(url):
    answer = infilled(url, grammar='root ::= "yes" | "no"', n_predict=20)
    assert answer["content"] in ("yes", "no") and answer["stop_type"] == "eos"
    assert json.loads(infilled(url, json_schema={"type": "boolean"}, n_predict=20)["content"]) in (
        True, False)


def test_a_body_of_16_mb_is_cut_around_the_gap(url):
    """What is next to the gap stays."""
    parts = {"input_prefix": "left " * 1_200_000 + "def f(", "input_suffix": "return 1" + " right" * 900_000,
             "input_extra": [{"filename": "a", "text": "other " * 700_000}], "n_predict": 4, "temperature": 0,
             "seed": 1}
    data = json.dumps(parts).encode()
    assert 15_000_000 < len(data) < 16 << 20
    status, _, text = post(url, "/infill", data)
    large = json.loads(text)
    assert status == 200 and large["truncated"] and large["tokens_evaluated"] == 1024 - 4, text[:500]
    near = parts | {"input_prefix": parts["input_prefix"][-2000:],
                    "input_suffix": parts["input_suffix"][:2000], "input_extra": []}
    small = json.loads(post(url, "/infill", near)[2])
    assert small["content"] == large["content"] and small["truncated"] and small["tokens_evaluated"] == 1020
    status, _, text = post(url, "/v1/completions",
                           json.dumps({"prompt": "a" * 8_000_000, "suffix": "b" * 8_000_000}).encode())
    assert status == 400 and json.loads(text)["error"]["code"] == "context_length_exceeded"
    status, _, text = post(url, "/infill",
                           json.dumps({"input_prefix": "a" * (17 << 20), "input_suffix": ""}).encode())
    assert status == 413


def test_many_token_names_and_files_are_no_burden(url):
    names = infilled(url, input_prefix="<|fim_middle|>" * 500_000, input_suffix=["<|fim_pad|>"] * 200_000,
                     n_predict=1)
    assert names["truncated"] and names["tokens_evaluated"] == 1023
    files = infilled(url, input_extra=[{"text": ""}] * 300_000, n_predict=1)
    assert files["truncated"] and files["tokens_evaluated"] == 1023


def test_a_body_is_answered_alike_wherever_it_is_read(url):
    """A large one is read in a sandbox."""
    wanted = dict(return_tokens=True, input_extra=[
        {"text": "é" * 20, "filename": "<|file_sep|>"}], prompt="x", n_probs=1)
    small, large = infilled(url, **wanted), infilled(url, **wanted, padding="x" * 100_000)
    for answer in (small, large):
        del answer["timings"], answer["tokens_cached"], answer["generation_settings"]["seed"]
    assert small == large


def test_a_suffix_works_with_n_and_logprobs(url):
    """It works with lists and echo too."""
    answer = completed(url, prompt=["def f(", "x ="], n=2, temperature=1, seed=5, logprobs=2,
                       return_token_ids=True, ignore_eos=True)
    assert ([choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
            and answer["usage"]["prompt_tokens"] == 4 * 2 + 2 * 8 + 6 + 3)
    assert answer["choices"][0]["text"] != answer["choices"][1]["text"]
    for choice in answer["choices"]:
        assert len(choice["logprobs"]["tokens"]) == len(choice["token_ids"]) == 8
    alone = completed(url, prompt="x =", n=2, temperature=1, seed=5, ignore_eos=True)
    assert [choice["text"] for choice in alone["choices"]] == [
        choice["text"] for choice in answer["choices"][2:]]
    plain = completed(url)["choices"][0]["text"]
    assert completed(url, echo=True)["choices"][0]["text"] == "def f(" + plain
    tokens = json.loads(post(url, "/tokenize", {"content": "def f("})[2])["tokens"]
    for padding in ("", "x" * 100_000):     # the second is read in a sandbox
        assert completed(url, prompt=tokens, echo=True,
                         padding=padding)["choices"][0]["text"] == "def f(" + plain
        assert completed(url, prompt=[tokens, "def f("], echo=True,
                         padding=padding)["choices"][1]["text"] == "def f(" + plain


def test_token_names_are_tokens_without_a_suffix(url):
    """In a prompt with one they are text."""
    assert completed(url, prompt="<s>", suffix="<|fim_middle|>")["usage"]["prompt_tokens"] == 4 + 3 + 14
    assert completed(url, prompt="<s>", suffix=None)["usage"]["prompt_tokens"] == 1


def test_the_openai_package_fills_a_gap(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        wanted = dict(model="coder", prompt="def f(", suffix="return 1", max_tokens=8, temperature=0)
        whole = client.completions.create(**wanted)
        pieces = list(client.completions.create(**wanted, stream=True))
        assert ("".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
                and whole.usage.prompt_tokens == 18)
        with pytest.raises(openai.BadRequestError, match="echo and logprobs"):
            client.completions.create(**wanted, echo=True, logprobs=1)


def test_ollama_s_route_fills_a_gap(url):
    body = {"prompt": "def f(", "suffix": "return 1", "stream": False,
            "options": {"num_predict": 8, "temperature": 0}}
    status, headers, text = post(url, "/api/generate", body | {"system": "Be brief."})
    assert (status == 200 and json.loads(text)["response"] == completed(url)["choices"][0]["text"]
            and headers["X-Ignored-Fields"] == "system")
    assert "insert" in json.loads(post(url, "/api/show", {})[2])["capabilities"]


def test_the_model_says_that_it_can(url):
    with urllib.request.urlopen(url + "/v1/models") as response:
        assert json.load(response)["data"][0]["capabilities"]["infill"] is True


def test_a_gguf_with_ids_fills_a_gap(tmp_path):
    """They are in its metadata."""
    metadata, first = gguf_tokens(fim_pre=0, fim_suf=1, fim_mid=2, fim_sep=5)
    size = len(metadata["tokenizer.ggml.tokens"])
    path = write_gguf(tmp_path / "coder.gguf", random_llama(vocab=size), LLAMA_NUMBERS, metadata)
    with server(path) as (_, url):
        answer = infilled(url, input_prefix="<a>", return_tokens=True, logit_bias={str(first + 5): 100})
        assert (answer["tokens"], answer["stop_type"]) == ([first + 5], "eos")
        assert answer["tokens_evaluated"] == 3 + 3 + 7 + 1 + len("filename\n")     # " 1" is a token
        assert completed(url)["usage"]["prompt_tokens"] == 3 + 6 + 7


def test_without_the_tokens_http_says_so(tiny_url):
    """A model without the tokens says so over HTTP."""
    for path, body in (("/infill", GAP), ("/v1/completions", {"prompt": "a", "suffix": "b"}),
                       ("/api/generate", {"prompt": "a", "suffix": "b"})):
        for padding in ("", "x" * 100_000):
            status, _, text = post(tiny_url, path, body | {"padding": padding})
            assert status == 400 and "its tokenizer has no prefix, suffix and middle tokens" in text
    assert json.loads(post(tiny_url, "/infill", GAP)[2])["error"]["code"] == "infill_not_supported"
    assert "insert" not in json.loads(post(tiny_url, "/api/show", {})[2])["capabilities"]


def test_a_base_model_continues_a_large_question(tmp_path):
    """It continues it like a small one."""
    save(make_model("qwen2", max_position_embeddings=1024), tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with server(tmp_path) as (_, url):
        body = {"prompt": "def f(", "stream": False, "options": {"num_predict": 8, "temperature": 0}}
        small, large = (post(url, "/api/generate", body | {"padding": padding})
                        for padding in ("", "x" * 100_000))
        assert (small[0] == large[0] == 200
                and json.loads(small[2])["response"] == json.loads(large[2])["response"])
