"""Answers bound by a grammar: JSON that fits a schema, whatever the model would prefer to say."""

import asyncio
import gc
import json
import sys
import threading
import time

import pytest
import torch

from chatlm.common.config import Settings
from chatlm.common.errors import RequestError
from chatlm.common.memory import heap_bytes
from chatlm.common.messages.requests import Failed, Message, SamplingParams
from chatlm.common.text import grammar as grammar_module
from chatlm.common.text.grammar import GRAMMAR_LIMITS, check_grammar, json_grammar
from chatlm.front.api.dialects.openai import OPENAI_FIELDS
from chatlm.front.api.fields import parse_fields
from chatlm.front.api.readers import parse_openai_request
from chatlm.front.pool.worker import Job
from chatlm.worker.engine.answer_maker import AnswerMaker
from chatlm.worker.engine.fair_thread import FairThread
from chatlm.worker.engine.grammar import Grammar
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.sequence import Sequence
from engines import make_engine, pieces, step_pieces
from nightly import by_day
from pools import work_of
from works import assignment, changed

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def grammar(schema):
    source = json_grammar(schema, "response_format")
    check_grammar(source, "response_format")
    return source


@pytest.fixture(scope="module", params=["nanochat", "gguf"])
def engine(request, nanochat_fixtures, default_model_path):
    """A tiktoken tokenizer with random weights, and a byte-level BPE with the real model of a GGUF file."""
    path = nanochat_fixtures / "gen5" if request.param == "nanochat" else default_model_path
    return make_engine(path, num_pages=200, max_batch=8, as_stored=request.param == "gguf")


def work(engine, name, schema, seed=0, **more):
    prompt = tuple(engine.tokenizer.render([Message("user", "Describe a person as JSON.")]))
    return assignment(name, prompt, SamplingParams(1.0, seed=seed), 120, grammar=grammar(schema), **more)


def forget_grammars(engine):
    """Wait for those that earlier tests have in the queue, which would be compiled beside the next ones, and
    forget all."""
    engine.answers.compiling.thread.submit(int).result()
    engine.given.grammars.kept.clear()


def text_of(found):
    return "".join(piece.text for piece in found)


def test_answers_follow_the_schema_at_any_seed(engine):
    """Answers are of the schema, whatever the seed, and beside free ones."""
    works = [work(engine, f"g{seed}", PERSON, seed) for seed in range(4)]
    free = [
        assignment(f"f{seed}", works[0].prompt_ids, SamplingParams(1.0, seed=seed), 15, ignore_eos=True)
        for seed in range(2)
    ]
    found = pieces(engine, works + free)
    for each in works:
        last, text = found[each.id].end, text_of(found[each.id])
        if last.reason == "length":
            continue
        person = json.loads(text)
        assert (last.reason, last.stop_reason) == ("stop", "grammar")
        assert (
            list(person) == ["name", "age", "tags"]
            and 0 <= person["age"] <= 130
            and set(person["tags"]) <= {"a", "b"}
        )
        # a fixed style without free whitespace
        assert text == json.dumps(person, ensure_ascii=False) or "\\" in text
    assert any(found[each.id].end.reason == "stop" for each in works)
    alone = pieces(engine, free[:1])
    assert [piece.tokens for piece in alone["f0"]] and sum(
        (piece.tokens for piece in alone["f0"]), ()
    ) == sum((piece.tokens for piece in found["f0"]), ())


def test_greedy_answers_follow_the_schema_too(engine):
    """Greedy answers are held too, and log probabilities are the model's own."""
    one = work(engine, "a", {"enum": ["yes", "no"]}, logprobs=2)
    found = pieces(engine, [changed(one, sampling=SamplingParams(0.0))])["a"]
    assert json.loads(text_of(found)) in ("yes", "no")
    entries = [entry for piece in found for entry in piece.logprobs]
    assert len(entries) == sum(len(piece.tokens) for piece in found)
    assert entries[0].logprob < 0 and entries[0].top[0][1] >= entries[0].logprob


def test_a_resumed_answer_goes_on_in_its_grammar(engine):
    engine.drafts, before = False, engine.drafts  # each piece is a token
    whole = pieces(engine, [work(engine, "a", PERSON, 3)])["a"]
    engine.drafts = before
    tokens = [token for piece in whole for token in piece.tokens]
    for cut in (1, 5, len(tokens) - 1):
        rest = pieces(engine, [work(engine, "b", PERSON, 3, resumed_ids=tuple(tokens[:cut]))])["b"]
        assert [token for piece in rest for token in piece.tokens] == tokens[cut:]
        assert text_of(whole[:cut]) + text_of(rest) == text_of(whole)


ANYTHING = {"type": "object"}
LISTS = {
    "type": "object",
    "properties": {
        "lists": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
        "day": {"type": "string", "format": "date"},
        "last": {"type": ["integer", "null"]},
    },
    "required": ["lists", "day", "last"],
}


def drawn(found):
    return [token for piece in found for token in piece.tokens]


@pytest.mark.parametrize(
    "schema, most",
    [
        (ANYTHING, 9),
        (PERSON, 40),
        *(
            pytest.param(schema, most, marks=pytest.mark.slow)
            for schema, most in (
                (ANYTHING, 40),
                (LISTS, 48),
                ({"type": "array", "items": PERSON, "minItems": 1}, 90),
            )
        ),
    ],
)
def test_an_answer_out_of_tokens_ends_in_its_format(engine, schema, most):
    """Alone, beside others and by a worker that takes over; up to there it is the answer that has more
    tokens."""
    works = [changed(work(engine, f"g{seed}", schema, seed), max_tokens=most) for seed in range(3)]
    found = pieces(engine, works)
    for each in works:
        end, tokens = found[each.id].end, drawn(found[each.id])
        assert isinstance(json.loads(text_of(found[each.id])), (dict, list)) and len(tokens) <= most
        assert (end.reason, end.stop_reason) in (("stop", "max_tokens"), ("stop", "grammar"))
    each = next((each for each in works if found[each.id].end.stop_reason == "max_tokens"), works[0])
    tokens = drawn(found[each.id])
    assert drawn(pieces(engine, [each])[each.id]) == tokens
    steps = [len(piece.tokens) for piece in found[each.id]]
    before = sum(steps[:-1])  # without those that end it, which come at once
    assert drawn(pieces(engine, [changed(each, max_tokens=4 * most)])[each.id])[:before] == tokens[:before]
    for cut in {before // 2, before - 1, before} - {0, -1}:
        rest = drawn(pieces(engine, [changed(each, resumed_ids=tuple(tokens[:cut]))])[each.id])
        assert tokens[:cut] + rest == tokens


def test_what_has_no_tokens_for_its_end_stays_cut(engine):
    """Where no tokens are left for an end, or a call is cut, it stays cut."""
    short, call = (
        changed(work(engine, "a", PERSON), max_tokens=3),
        changed(work(engine, "b", ANYTHING, 1), max_tokens=12, grammar_param="tools"),
    )
    found = pieces(engine, [short, call])
    assert found["a"].end.reason == "length" and len(drawn(found["a"])) == 3
    assert found["b"].end.reason == "length" or found["b"].end.stop_reason == "grammar"


@pytest.mark.parametrize(
    "schema, begun, ended",
    [
        (ANYTHING, "", "{}"),
        (ANYTHING, '{\n  "a', '": null}'),
        (ANYTHING, '{"a": [1, {"b": "x}', '"}]}'),
        (ANYTHING, '{"a": "\\u0', '000"}'),
        (ANYTHING, '{"a": "\\', 'n"}'),
        (ANYTHING, '{"a": tr', "ue}"),
        (ANYTHING, '{"a": -', "0}"),
        (ANYTHING, '{"a": 1.5e', "0}"),
        (ANYTHING, '{"a": [1,\n', "null]}"),
        (ANYTHING, '{"a": 1,', '"": null}'),
        (PERSON, "", '{"name": "", "age": 0, "tags": []}'),
        (PERSON, '{"name": "B', '", "age": 0, "tags": []}'),
        (LISTS, '{"lists": [["', '"]], "day": "0000-01-01", "last": null}'),
        ({"type": "integer"}, "12", ""),
        ({"type": "integer", "minimum": 10}, "", "10"),
        ({"enum": ["red", "grün"]}, '"g', 'rün"'),
        ({"type": "string", "minLength": 3}, '"a', '  "'),
        ({"type": "string", "format": "email"}, '"a', '@0"'),
        ({"type": "string", "format": "uri"}, '"a', ':"'),
        ({"type": "string", "pattern": "^[A-Z]{2}-[0-9]$"}, '"A', 'A-0"'),
        ({"type": "array", "items": PERSON, "maxItems": 2}, "[", "]"),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, "[true", ", false]"),
    ],
)
def test_the_way_to_the_end_of_a_value_is_short(engine, schema, begun, ended):
    guide = Grammar(engine.tokenizer, grammar(schema))
    assert guide.feed_text(begun) if begun else True
    way = guide.way_to_end(60)
    assert engine.tokenizer.decode(way) == ended and (not way or guide.way_to_end(len(way) - 1) is None)


def test_a_begun_character_is_finished_on_the_way(engine):
    guide, one = Grammar(engine.tokenizer, grammar(ANYTHING)), engine.tokenizer.byte_tokens
    written = [one[byte] for byte in '{"a": "ü'.encode()[:-1]]
    assert all(map(guide.feed, written))
    assert json.loads(engine.tokenizer.decode(written + guide.way_to_end(60)))["a"]


@pytest.mark.parametrize(
    "shape", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"schema": PERSON}}]
)
def test_json_ends_where_complete_or_at_a_stop_string(engine, shape):
    body = {
        "messages": [{"role": "user", "content": "Describe a person as JSON."}],
        "response_format": shape,
        "temperature": 1,
        "stop": [": "],
        "min_tokens": 50,
        "ignore_eos": True,
    }
    values = parse_fields(body, OPENAI_FIELDS)
    request = parse_openai_request(values, Settings())
    prompt = tuple(engine.tokenizer.render(request.messages))
    works = [
        changed(
            work_of(Job(request, prompt, 120, asyncio.Queue(), 0.0, choice=seed)),
            id=str(seed),
            sampling=SamplingParams(1.0, seed=seed),
        )
        for seed in range(4)
    ]
    found = pieces(engine, works)
    for each in works:
        text, end = text_of(found[each.id]), found[each.id].end
        assert (
            ": " not in text
            and (end.reason, end.stop_reason) == ("stop", ": ")
            or end.reason == "length"
            or text == "{}"
        )
    assert any(found[each.id].end.stop_reason == ": " for each in works)


def test_the_model_ends_a_top_level_number(engine):
    end = max(engine.tokenizer.stop_tokens)
    one = work(engine, "a", {"type": "integer"})
    one = changed(one, sampling=SamplingParams(1.0, seed=1, logit_bias=((end, 50.0),)))
    found = pieces(engine, [one])["a"]
    assert (
        found.end.reason == "stop"
        and found.end.stop_reason == "eos"
        and isinstance(json.loads(text_of(found)), int)
    )


def test_an_impossible_grammar_fails_its_request_only(engine, monkeypatch):
    monkeypatch.setattr(Grammar, "feed", lambda self, token: False)
    free = assignment("f", (5, 6, 7), SamplingParams(0.0), 5, ignore_eos=True)
    found = pieces(engine, [work(engine, "a", PERSON), free])
    assert found["a"].end.refused and text_of(found["a"]) == ""
    assert found["f"].end.reason == "length"


def test_a_matcher_that_breaks_is_our_fault(engine, monkeypatch):
    """A client that sent a good grammar is not told that nothing can follow it; others go on."""

    def broken(self, token):
        self.renewed = True
        self.matcher.rollback(1000)
        return False

    monkeypatch.setattr(Grammar, "feed", broken)
    free = assignment("f", (5, 6, 7), SamplingParams(0.0), 5, ignore_eos=True)
    found = pieces(engine, [work(engine, "a", PERSON), free])
    assert not found["a"].end.refused and "the model failed" in found["a"].end.message
    assert found["f"].end.reason == "length"


def test_a_grammar_that_is_too_large_is_the_client_s_fault(engine, monkeypatch):
    large = changed(work(engine, "a", {}), grammar="start: /[01]*1[01]{12}[01]*/")
    monkeypatch.setitem(GRAMMAR_LIMITS, "max_lexer_states", 15)
    forget_grammars(engine)
    assert pieces(engine, [large])["a"].end.refused
    forget_grammars(engine)


@pytest.fixture
def gate(monkeypatch):
    """An event before which no grammar is compiled."""
    event, original = threading.Event(), Grammar.__init__

    def opened(*arguments):
        event.wait()
        original(*arguments)

    monkeypatch.setattr(Grammar, "__init__", opened)
    yield event
    event.set()


@torch.inference_mode()
def test_others_go_on_while_a_grammar_is_made(engine, gate):
    """Others go on while a grammar is made, and cancelling does not wait for it."""
    forget_grammars(engine)
    free = assignment("f", (5, 6, 7), SamplingParams(0.0), 60, ignore_eos=True)
    for each in (free, work(engine, "a", PERSON, 3), work(engine, "b", PERSON, 4)):
        engine.add(each)
    found = [event for _ in range(10) for event in engine.step()]
    assert {name for name, _ in found} == {"f"} and len(found) >= 9
    assert engine.cancel("b") and engine.cancel("f") and engine.busy
    assert engine.step() == engine.step() == []
    check_integrity(engine)
    gate.set()
    found = []
    while engine.busy:
        found += step_pieces(engine)
    assert {name for name, _ in found} == {"a"} and text_of([piece for _, piece in found]) == text_of(
        pieces(engine, [work(engine, "a", PERSON, 3)])["a"]
    )


def test_a_grammar_is_compiled_once_per_owner(engine, monkeypatch):
    """A grammar is compiled once for all answers of a request and of the same owner."""
    made, original = [], Grammar.__init__

    def counted(*arguments):
        made.append(arguments[-1])
        original(*arguments)

    monkeypatch.setattr(Grammar, "__init__", counted)
    forget_grammars(engine)
    alike = [
        work(engine, f"a#{choice}", PERSON, choice, client="alice", owner="alice") for choice in range(6)
    ]
    found = pieces(engine, alike)
    assert made == [alike[0].params.grammar] and all(
        found[each.id].end.reason in ("stop", "length") for each in alike
    )
    pieces(engine, [work(engine, "b", PERSON, client="bob", owner="bob")])
    # otherwise the delay would tell bob what alice asked
    assert len(made) == 2 and len(engine.answers.grammars.kept) == 2


@torch.inference_mode()
def test_clients_grammars_are_compiled_in_turn(engine, gate, monkeypatch):
    """Grammars of clients are compiled in turn, and those of who left not at all."""
    order, original = [], AnswerMaker._prepare

    def noted(self, sequence):
        original(self, sequence)
        order.append(sequence.work.id)

    monkeypatch.setattr(AnswerMaker, "_prepare", noted)
    forget_grammars(engine)
    for name in ("a1", "a2", "a3", "b1"):
        engine.add(work(engine, name, {"type": "string", "const": name}, client=name[0]))
    assert engine.cancel("a2")
    gate.set()
    while engine.busy:
        engine.step()
    assert order == ["a1", "b1", "a3"]


def test_only_grammar_answers_are_made_in_a_thread(engine):
    """A plain answer is made at once, and one with a grammar in a thread."""
    maker, held, plain = (
        AnswerMaker(engine.tokenizer, engine.given),
        work(engine, "a", PERSON),
        assignment("b", (5, 6), SamplingParams(), 9),
    )
    held, plain = (Sequence(each, [*each.prompt_ids], 200) for each in (held, plain))
    maker.make(plain)
    assert plain.output.preparing is None and plain.output.grammar is None and maker.masked(plain, 0.0)
    maker.make(held)
    held.output.preparing.result(30)
    assert [source for _, source in maker.grammars.kept][-1] == held.work.params.grammar and maker.masked(
        held, time.monotonic() + 30
    )


@torch.inference_mode()
def test_others_go_on_while_a_mask_is_computed(engine, monkeypatch):
    """Others go on while a mask is computed, and the answer is the same."""
    undisturbed = pieces(engine, [work(engine, "a", PERSON, 3)])["a"]
    slow, original = threading.Event(), FairThread.submit

    def submit(thread, client, compute, *arguments):
        late = thread.thread._thread_name_prefix == "masks" and client == "slow"
        return original(thread, client, lambda *these: (late and slow.wait(), compute(*these))[1], *arguments)

    monkeypatch.setattr(FairThread, "submit", submit)
    engine.add(work(engine, "a", PERSON, 3, client="slow"))
    found = []
    while not found:
        found += step_pieces(engine)
    engine.add(assignment("f", (5, 6, 7), SamplingParams(0.0), 30, ignore_eos=True))
    while sum(len(piece.tokens) for name, piece in found if name == "f") < 30:
        found += step_pieces(engine)
    assert 1 <= [name for name, _ in found].count("a") < 3  # it waits for its second mask
    check_integrity(engine)
    slow.set()
    while engine.busy:
        found += step_pieces(engine)
    assert text_of([piece for name, piece in found if name == "a"]) == text_of(undisturbed)


def test_an_answer_that_cannot_be_prepared_fails_alone(engine, monkeypatch, caplog):
    def broken(*arguments):
        raise MemoryError("no room for a grammar")

    monkeypatch.setattr(Grammar, "__init__", broken)
    forget_grammars(engine)
    free = assignment("f", (5, 6, 7), SamplingParams(0.0), 20, ignore_eos=True)
    found = pieces(engine, [work(engine, "a", PERSON), free])
    assert (
        isinstance(found["a"].end, Failed)
        and not found["a"].end.refused
        and found["f"].end.reason == "length"
        and "no room for a grammar" in caplog.text
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nope"},
        {"$ref": "#/nope"},
        {"not": {}},
        {"type": "string", "pattern": "(?=x)"},
        {"enum": []},
        {"type": "object", "properties": {"\ud800": {}}},
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(schema):
    with pytest.raises(RequestError) as refused:
        grammar(schema)
    assert refused.value.code == "invalid_json_schema" and refused.value.status == 400


def test_a_schema_nested_too_deeply_is_refused():
    schema = {}
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nested too deeply"):
        grammar(schema)
    with pytest.raises(RequestError, match="at most 65536"):
        grammar({"enum": ["x" * 70_000]})


def test_an_unfulfillable_schema_is_an_error(engine):
    """A schema that nothing fulfils is an error and not an answer."""
    nothing = {"type": "string", "pattern": "^a$", "allOf": [{"pattern": "^b$"}]}
    with pytest.raises(RequestError, match="Unsatisfiable schema"):
        grammar(nothing)
    one = changed(work(engine, "a", {}), grammar=json_grammar(nothing, ""))
    found = pieces(engine, [one])["a"]
    assert found.end.refused and text_of(found) == ""


def test_without_the_library_it_is_a_clear_400(monkeypatch):
    monkeypatch.setattr(grammar_module, "has_llguidance", lambda: False)
    with pytest.raises(RequestError, match="llguidance is not installed") as refused:
        parse_fields({"messages": [1], "response_format": {"type": "json_object"}}, OPENAI_FIELDS)
    assert refused.value.code == "unsupported_response_format"


@torch.inference_mode()
def test_the_mask_is_exactly_what_the_grammar_takes(engine):
    """Token by token: the matcher consumes what the mask allows, and refuses what it forbids."""
    rules = grammar(PERSON)
    guide = Grammar(engine.tokenizer, rules)
    for token in engine.tokenizer.encode('{"name": "Bo"'):
        assert guide.feed(token)
    guide.masks.set_result(guide.compute_masks())
    flags = guide.allowed(engine.tokenizer.vocab_size)
    assert 0 < flags.sum() < 20
    for token in [*flags.nonzero()[0].tolist(), 5, 65, 200]:
        probe = Grammar(engine.tokenizer, rules)
        for before in engine.tokenizer.encode('{"name": "Bo"'):
            probe.feed(before)
        assert probe.feed(token) == bool(flags[token])


def numbers(count, name=""):
    """A small schema that takes much memory: an automaton for the multiples of each number."""
    properties = {f"p{name}{i}": {"type": "integer", "multipleOf": 997 + i} for i in range(count)}
    return {"type": "object", "properties": properties, "required": list(properties)}


@pytest.mark.skipif(not heap_bytes(), reason="the heap of this system does not tell its size")
@pytest.mark.parametrize(
    "schema",
    [
        numbers(100),
        {"type": "object", "properties": {"x": {"type": "integer", "multipleOf": 99_991}}, "required": ["x"]},
    ],
)
def test_a_schema_that_costs_much_memory_is_refused(schema):
    """A schema that takes too much memory to follow is refused."""
    gc.collect()  # what other tests have left must not be freed meanwhile: the growth of the heap is measured
    with pytest.raises(RequestError, match="too complex: following it takes more than 16 MiB") as caught:
        grammar(schema)
    assert (caught.value.code, caught.value.param) == ("invalid_json_schema", "response_format")
    grammar(numbers(30))


@pytest.mark.skipif(not heap_bytes(), reason="the heap of this system does not tell its size")
@pytest.mark.parametrize("engine", by_day(["nanochat", "gguf"], "nanochat"), indirect=True)
def test_compiled_schemas_stay_while_memory_lasts(engine):
    """Compiled schemas are kept only as far as memory goes."""
    forget_grammars(engine)
    compiled = []
    for number in range(10):
        one = work(engine, f"a{number}", numbers(40, f"{number}"))
        compiled.append(engine.answers.compiled("", one.params.grammar).size)
        assert (
            engine.answers.compiled("", one.params.grammar).lexer
            is engine.answers.compiled("", one.params.grammar).lexer
        )  # the newest is kept
    assert all(8 << 20 < size < 16 << 20 for size in compiled)
    kept = [
        size for size in (each.size for each in engine.answers.grammars.kept.values()) if size in compiled
    ]  # another test's may have come late
    assert 2 <= len(kept) <= (64 << 20) // min(compiled)
    forget_grammars(engine)


@pytest.mark.slow
def test_earlier_answers_break_no_later_grammar(default_model_path, monkeypatch):
    """Copies of a grammar share its lexer's states, whose number is limited."""
    engine = make_engine(default_model_path, num_pages=100, max_batch=8, as_stored=True)
    prompt = tuple(engine.tokenizer.render([Message("user", "Toss a coin.")]))
    works = [
        assignment(
            "a", prompt, SamplingParams(2.0, seed=seed, top_k=0), 20, grammar="start: /[01]*1[01]{12}[01]*/"
        )
        for seed in range(6)
    ]
    roomy = [pieces(engine, [each])["a"] for each in works]
    forget_grammars(engine)
    monkeypatch.setitem(GRAMMAR_LIMITS, "max_lexer_states", 150)  # one answer adds some 70
    made, original = [], Grammar.__init__
    monkeypatch.setattr(Grammar, "__init__", lambda self, *given: made.append(self) or original(self, *given))
    tight = [pieces(engine, [each])["a"] for each in works]
    assert len(made) > 1 and [text_of(each) for each in tight] == [text_of(each) for each in roomy]
    assert all(each.end.reason == "length" for each in tight)
