"""A completion without a prompt is a new document, as with OpenAI, whose default prompt is <|endoftext|>."""

import json

import pytest

from chatlm.common.config import Settings
from chatlm.common.messages.protocol import Known
from chatlm.common.messages.requests import InfillTokens, TextSpec
from chatlm.common.text.tokenizer import Tokenizer
from chatlm.front.api.reading import read_answer
from fake_pool import Letters
from openai_routes import COMPLETIONS, call, need_exact


@pytest.fixture(scope="module")
def url(default_url):
    return default_url


def written(url, **body):
    status, _, answer = call(url, COMPLETIONS, {"temperature": 0, "max_tokens": 8, "seed": 1} | body)
    assert status == 200, answer
    return [choice["text"] for choice in answer["choices"]], answer["usage"]["prompt_tokens"]


def test_an_absent_prompt_begins_a_new_document(url):
    """It continues the token between documents."""
    need_exact(url)
    wanted = written(url, prompt="<|endoftext|>")
    assert (written(url) == written(url, prompt=None) == written(url, padding="x" * 100_000) == wanted
            and wanted[1] == 1)
    texts, _ = written(url, n=3, temperature=1)
    assert texts == written(url, n=3, temperature=1, prompt="<|endoftext|>")[0] and len(set(texts)) > 1
    assert written(url, echo=True)[0] == wanted[0]      # what was not given is not repeated
    status, _, scored = call(url, COMPLETIONS,
                             {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1})
    assert status == 200 and scored["choices"][0]["logprobs"]["token_logprobs"][0] is None


def test_an_empty_prompt_is_refused_as_empty(url):
    for prompt in ("", [], [""], [[]], [[], "x"]):
        status, _, answer = call(url, COMPLETIONS, {"prompt": prompt, "max_tokens": 4})
        assert status == 400 and "prompt" in answer["error"]["message"], answer


def test_a_nanochat_checkpoint_begins_with_bos(tiny_url):
    need_exact(tiny_url)
    tokens = call(tiny_url, "/tokenize", {"content": "<|bos|>"})[2]["tokens"]
    assert (written(tiny_url, max_tokens=5) == written(tiny_url, max_tokens=5, prompt=tokens)
            and len(tokens) == 1)


class Marked(Letters):
    def __init__(self, specials=(), **spec):
        super().__init__()
        self.spec = TextSpec("letters", b"", **spec)
        self.specials = dict(specials)


@pytest.mark.parametrize("tokenizer, start", [
    (Marked({"<|endoftext|>": 5}, bos_token=1, eos_token=2), (5,)),
    (Marked({"<|endoftext|>": 5}, bos_token=1, eos_token=2, add_bos=True), (1,)),
    (Marked(bos_token=1, eos_token=2), (1,)), (Marked(eos_token=2), (2,)), (Marked(eos_token=0), (0,)),
    (Marked(), ())])
def test_without_that_token_another_begins_a_text(tokenizer, start):
    assert tokenizer.document_start == start and isinstance(tokenizer, Tokenizer)


def test_an_absent_prompt_before_a_suffix_is_empty():
    known = Known(Settings(), None, infill=InfillTokens(1, 2, 3))
    same = [read_answer(COMPLETIONS, {"suffix": "x"} | more, known) for more in ({}, {"prompt": ""})]
    assert same[0].request.prompts == same[1].request.prompts
    assert json.dumps(read_answer(COMPLETIONS, {}, known).request.prompts) == "[[]]"
