"""Drafts inside of grammars, over vocabularies whose markers are of every type: control, user-defined, or spelled out."""

import random

import pytest

from chatlm.common.messages.requests import Ended, SamplingParams
from chatlm.common.text.formats import CALL_FORMATS, with_markers
from chatlm.common.text.grammar import json_grammar
from chatlm.common.text.load import open_tokenizer
from chatlm.front.api.call_grammars import tool_grammar
from chatlm.worker.engine.grammar import Grammar
from chatlm.worker.weights.formats.gguf.description import gguf_text
from engines import draft_eagerly, make_engine, pieces
from nightly import by_day
from sick_models import NUMBERS
from tiny_gguf import gguf_bytes, random_llama, small_gguf_metadata
from works import assignment

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
TOOLS = [{"type": "function", "function": {"name": name, "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}}
    for name in ("weather", "week")]
TEXT_TOKENS = ["  ", "    ", "\n\n\n", "<b>", "</div>"]     # as Gemma's vocabulary has them: user-defined, and text
FORMATS = ["tagged", "gemma", "lfm2", "deepseek", "kimi", "qwen tags", "glm tags", "mistral name"]


def metadata_with(call_format, marker_type, rows=0):
    """The GGUF metadata of a model of this format: its markers are tokens of this type; None: they are no tokens.
    rows: the least size of its vocabulary, filled with ordinary tokens before the markers."""
    row = CALL_FORMATS[call_format]
    template = "{% if tools %}" + "".join(row.template_has) + "{% endif %}{{ messages }}"
    metadata = small_gguf_metadata("qwen2", **{"tokenizer.chat_template": template})
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    more = [f"w{number}" for number in range(rows - len(tokens))] + TEXT_TOKENS
    tokens += more
    types += [NORMAL] * (len(more) - len(TEXT_TOKENS)) + [USER_DEFINED] * len(TEXT_TOKENS)
    if marker_type is not None:
        tokens += row.markers
        types += [marker_type] * len(row.markers)
    return metadata


def tokenizer_with(*arguments, **more):
    return open_tokenizer(gguf_text("x.gguf", metadata_with(*arguments, **more)))


def calls_of(tokenizer, call_format):
    return with_markers(tool_grammar(TOOLS, call_format, parallel=True), tokenizer.markers)


def allowed_tokens(mask):
    return [place * 8 + bit for place, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


def walk(tokenizer, source, seed, most=120):
    """Walk through the grammar, with a random draft at each step; every mask must be that of a matcher that
    never saw a draft. Returns the tokens."""
    dice = random.Random(seed)
    pristine = Grammar(tokenizer, source)
    grammar = Grammar(tokenizer, source)
    written = []

    def fresh_mask(tokens):
        matcher = pristine.matcher.deep_copy()
        assert matcher.consume_tokens(tokens)
        return matcher.compute_bitmask()

    def likely(choices):
        """Prefer what ends strings and objects, so that a walk meets markers often."""
        short = [token for token in choices if tokenizer.token_bytes(token)[:1] in (b'"', b"}", b",", b"<", b"")]
        return dice.choice(short if short and dice.random() < 0.6 else choices)

    while len(written) < most:
        draft = list(grammar.forced()) if dice.random() < 0.5 else []
        ahead = [*written, *draft]
        for _ in range(dice.randrange(6)):
            choices = [token for token in allowed_tokens(fresh_mask(ahead)) if token not in tokenizer.stop_tokens]
            if not choices:
                break
            draft.append(likely(choices))
            ahead.append(draft[-1])
        if dice.random() < 0.3:
            draft.append(dice.randrange(tokenizer.vocab_size))
        masks = grammar.compute_masks(draft)
        assert not grammar.matcher.is_error(), grammar.matcher.get_error()
        for place, mask in enumerate(masks):
            assert mask == fresh_mask([*written, *draft[:place]]), (written, draft, place)
        choices = allowed_tokens(masks[0])
        token = draft[0] if draft and draft[0] in choices and dice.random() < 0.7 else likely(choices)
        if token in tokenizer.stop_tokens:
            break
        assert grammar.feed(token)
        written.append(token)
        if grammar.complete:
            break
    return written


@pytest.mark.parametrize("marker_type", [CONTROL, USER_DEFINED, NORMAL, None])
@pytest.mark.parametrize("call_format", by_day(FORMATS, "tagged", "gemma", "kimi"))
def test_drafts_change_no_mask_of_calls(call_format, marker_type):
    tokenizer = tokenizer_with(call_format, marker_type)
    source = calls_of(tokenizer, call_format)
    markers = set(tokenizer.markers.values())
    met = set()
    for seed in range(3):
        met |= markers & set(walk(tokenizer, source, seed))
    assert bool(met) == bool(markers), "no walk wrote a marker"


def test_drafts_change_no_mask_where_a_marker_has_six_digits():
    """As in Qwen's vocabulary: 151,936 rows, and markers with the numbers 151,657 and 151,658."""
    tokenizer = tokenizer_with("tagged", USER_DEFINED, rows=151_652)
    assert sorted(tokenizer.markers.values()) == [151_657, 151_658]
    assert walk(tokenizer, calls_of(tokenizer, "tagged"), seed=1, most=12)[0] == 151_657


def test_spaces_and_tags_of_the_vocabulary_stay_text_in_a_grammar():
    """User-defined tokens that are no markers may stand inside of a JSON string; markers may not."""
    tokenizer = tokenizer_with("tagged", USER_DEFINED)
    grammar = Grammar(tokenizer, json_grammar({"type": "string"}, "response_format"))
    assert grammar.feed(tokenizer.byte_tokens[ord('"')])
    allowed = {tokenizer.token_bytes(token) for token in allowed_tokens(grammar.compute_masks()[0])}
    assert {text.encode() for text in TEXT_TOKENS if "\n" not in text} <= allowed
    assert not {b"<tool_call>", b"</tool_call>"} & allowed


def test_markers_of_other_formats_are_text():
    """A vocabulary may have tokens that mark calls in another family's format."""
    tokenizer = tokenizer_with("tagged", USER_DEFINED)
    tokenizer.added[tokenizer.byte_tokens[ord("~")]] = b"<|python_tag|>"
    assert tokenizer.markers.keys() == {"<tool_call>", "</tool_call>"}


def test_a_random_model_of_that_vocabulary_makes_required_calls_with_drafts(tmp_path, monkeypatch):
    """Every answer is a call, whatever was drafted."""
    metadata = metadata_with("tagged", USER_DEFINED, rows=151_652)
    tensors = random_llama(vocab=len(metadata["tokenizer.ggml.tokens"]), numbers=NUMBERS)
    path = tmp_path / "random.gguf"
    path.write_bytes(gguf_bytes({**metadata, **NUMBERS}, tensors))
    engine = make_engine(path, num_pages=200, max_batch=4)
    draft_eagerly(monkeypatch)
    colour = {"type": "object", "properties": {"colour": {"enum": ["red", "green", "blue"]}}, "required": ["colour"]}
    source = tool_grammar([{"function": {"name": "paint", "parameters": colour}}], "tagged", parallel=False)
    works = [assignment(f"a{seed}", (5, 6, 7), SamplingParams(0.0 if seed == 0 else 1.0, seed=seed), 300, chat=True,
                        grammar=source, grammar_param="tools", tool_names=("paint",))
             for seed in range(3)]
    for _ in range(2):      # the second time, lookups know the answers
        found = pieces(engine, works)
        for each in works:
            assert isinstance(found[each.id].end, Ended) and found[each.id].end.stop_reason == "grammar"
            assert found[each.id][0].tokens[0] == 151_657
    assert any(len(piece.tokens) > 1 for piece in found["a0"])
