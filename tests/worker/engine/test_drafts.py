"""Drafts from text that was seen before, and the policy that cuts them: the same text, in fewer steps, never another owner's."""

import importlib
import json
import random
from pathlib import Path

import pytest
import torch

from chatlm.common.core import decode_core
from chatlm.common.errors import ConfigError
from chatlm.common.files import read_text_of
from chatlm.common.messages.requests import AnswerParams, Message, SamplingParams
from chatlm.common.text.grammar import json_grammar
from chatlm.worker.engine.drafts import NO_DRAFT, Acceptance, Draft, Drafting
from chatlm.worker.engine.limits import StepLimits
from chatlm.worker.engine.lookup import BETWEEN, LONGEST, PLACES, RUN, Matches, Lookup, TextStore, TextStores, Text, common_length, match_length
from chatlm.worker.engine.grammar import Grammar
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.sequence import Assignment, Sequence
from chatlm.worker.engine.times import StepTimes
from engines import chat_work, draft_eagerly, make_engine, pieces
from lora import SMOLLM2, random_adapter
from works import assignment


def sequence(name, prompt, generated=(), **params):
    made = Sequence(Assignment(name, tuple(prompt), AnswerParams(**params), 100), [*prompt, *generated], 10_000)
    made.computed = len(made.tokens) - 1
    return made


def last_places(tokens, end, most):
    """The places before `end` after the run that ends there, by a plain search, latest first."""
    return [at for at in range(end - 1, RUN - 1, -1) if tokens[at - RUN:at] == tokens[end - RUN:end]][:most]


def run_of(tokens, end):
    return tokens[end - 2] << 32 ^ tokens[end - 1]


@pytest.mark.parametrize("seed", range(8))
def test_an_index_finds_what_a_plain_search_finds(seed):
    """However the text has grown: token by token, or many at once."""
    dice = random.Random(seed)
    tokens = [dice.randrange(1 + seed) for _ in range(900)]
    text = Text(tokens)
    end = 0
    while end < len(tokens):
        end = min(len(tokens), end + dice.choice([1, 1, 2, 5, 100, 300]))
        text.index(end)
        if end > RUN:
            assert text.places(run_of(tokens, end), 8) == [at for at in last_places(tokens, end, 9) if at < end][:8]
    assert len(text.before) == len(tokens)


def test_matches_reach_back_to_the_text_s_beginning():
    tokens = [1, 2, 3, 4, 5, 6, 7]
    assert match_length(tokens, 6, [1, 2, 3, 4, 5, 6]) == 6
    assert match_length(tokens, 6, [9, 2, 3, 4, 5, 6]) == 4
    assert match_length(tokens, 2, [1, 2]) == RUN
    assert [common_length([1, 2, 3], other) for other in ([1, 2, 3], [1, 2, 4], [2], [])] == [3, 2, 0, 0]


def proposals(tokens, answer, others=()):
    """What is proposed before each token of an answer."""
    live = list(tokens)
    follower, found = Matches(live, others), []
    for token in answer:
        found.append(follower.propose())
        live.append(token)
    return found


def test_continuations_are_proposed_with_falling_odds():
    text = list(range(100, 200))
    [*_, (tokens, chances)] = proposals([*text, 1, 2, 3], [*text[:30], 0])
    assert tokens == tuple(text[30:30 + LONGEST]) and sorted(chances, reverse=True) == list(chances) and 0.8 < chances[0] < 1


def test_changed_texts_are_still_followed():
    """After a changed, an added and a dropped token, the text is still followed."""
    text = list(range(100, 160))
    for change, rest in (([*text[:20], 7], text[21:]), ([*text[:20], 7], text[20:]), ([*text[:20], text[21]], text[22:])):
        [*_, (tokens, _)] = proposals([*text, 1, 2, 3], [*change, rest[0], 0])
        assert tokens[:5] == tuple(rest[1:6])


def test_the_longer_match_is_proposed_first():
    """Of two continuations the one of the longer match is proposed, and its chance is shared."""
    text = [1, 2, 3, 4, 5, 6, 7, 8, 50, 51, 52, 9, 9, 7, 8, 60, 61, 62, 9, 9]
    [(tokens, chances)] = proposals([*text, 1, 2, 3, 4, 5, 6, 7, 8], [0])
    [(alone, certain)] = proposals([*text[:11], 9, 9, 1, 2, 3, 4, 5, 6, 7, 8], [0])
    assert tokens[:3] == alone[:3] == (50, 51, 52) and chances[0] < certain[0]


def test_texts_in_a_store_end_where_they_end():
    store = TextStore()
    store.add([1, 2, 3, 4], 1000)
    store.add([5, 6, 7, 8], 1000)
    [(tokens, _)] = proposals([9, 1, 2, 3], [0], store.parts)
    assert tokens == (4,) and store.parts[0].tokens[RUN + 4] == BETWEEN
    [(tokens, _)] = proposals([9, 3, 4], [0], store.parts)
    assert tokens == ()


def test_memory_forgets_the_least_used_text_first():
    """The memory is bounded, and what was added to least recently goes first."""
    stores = TextStores(1000)
    for i in range(100):
        stores.add((f"owner {i % 5}",), list(range(i * 100, i * 100 + 60)))
        stores.settle()
        assert sum(store.num_tokens for store in stores.by_owner.values()) <= 1000
    assert list(stores.by_owner)[-1] == ("owner 4",) and stores.of(("owner 4",))[:-1]
    stores.add(("large",), list(range(5000)))
    stores.settle()
    assert list(stores.by_owner) == [] or sum(store.num_tokens for store in stores.by_owner.values()) <= 1000
    stores.add_common("x" * 5000, lambda text: list(range(len(text))))
    assert stores.common.num_tokens <= 500 + 2 * RUN + 1
    assert TextStores(0).add(("a",), [1, 2, 3, 4]) is None


def ended(lookup, one):
    lookup.begin(one)
    lookup.propose([one])
    lookup.end(one)
    lookup.stores.settle()


@pytest.mark.parametrize("other, shared", [
    ({}, True), ({"client": "bob"}, False), ({"owner": "other key"}, False)])
def test_drafts_come_from_the_owner_s_answers_alone(other, shared):
    """Answers are drafted from those of the same owner alone."""
    lookup, text = Lookup(), list(range(100, 140))
    ended(lookup, sequence("a", [1, 2, 3], text, client="alice", owner="a key"))
    again = sequence("b", [5, 6, *text[:4]], **({"client": "alice", "owner": "a key"} | other))
    lookup.begin(again)
    [draft] = lookup.propose([again])
    assert (draft.tokens[:5] == tuple(text[4:9])) is shared and bool(draft.tokens) is shared


def test_scored_answers_draft_from_themselves_alone():
    """An answer with log probabilities is drafted from its own text alone."""
    lookup, text = Lookup(), list(range(100, 140))
    ended(lookup, sequence("a", [1, 2, 3], text))
    again, repeating = sequence("b", [5, 6, *text[:4]], logprobs=0), sequence("c", [*text, 5, 6, *text[:4]], logprobs=0)
    for each in (again, repeating):
        lookup.begin(each)
    drafts = lookup.propose([again, repeating])
    assert drafts[0] == NO_DRAFT and drafts[1].tokens[:3] == tuple(text[4:7])


def test_adapters_do_not_draft_from_each_other():
    lookup, text = Lookup(), list(range(100, 140))
    ended(lookup, sequence("a", [1, 2, 3], text))
    again = sequence("b", [5, 6, *text[:4]])
    again.adapter, again.adapter_digest = 1, "other weights"
    lookup.begin(again)
    assert lookup.propose([again]) == [NO_DRAFT]


def test_everybody_drafts_from_the_operator_s_texts():
    lookup = Lookup()
    lookup.read(["some text"], lambda text: list(range(200, 260)))
    lookup.stores.settle()
    one = sequence("a", [5, 6, 210, 211], client="anyone")
    lookup.begin(one)
    assert lookup.propose([one])[0].tokens[:3] == (212, 213, 214)


def test_texts_are_forgotten_when_a_model_needs_memory():
    """What was said is forgotten when memory is wanted for another model."""
    lookup = Lookup()
    ended(lookup, sequence("a", [1, 2, 3], range(100, 140)))
    assert lookup.stores.by_owner
    Drafting([lookup]).forget()
    assert not lookup.stores.by_owner


def test_a_token_still_being_drawn_is_not_kept():
    lookup = Lookup()
    ended(lookup, sequence("a", [1, 2, 3], [4, 5, 6, ~0]))
    [part] = lookup.stores.by_owner["", "", ""].parts
    assert list(part.tokens) == [BETWEEN] * RUN + [1, 2, 3, 4, 5, 6, BETWEEN]


def test_looking_up_costs_little_for_hostile_text():
    """Text of one token, or of few in random order: only the latest of many places are looked at."""
    for vocabulary in (1, 2, 5):
        dice = random.Random(vocabulary)
        live = [dice.randrange(vocabulary) for _ in range(20_000)]
        follower = Matches(live, [])
        follower.propose()
        for _ in range(200):
            assert len(follower.move_on()) <= PLACES
            live.append(dice.randrange(vocabulary))


# the policy ----------------------------------------------------------------------------------------------------------


class Fixed:
    """A source that proposes what it was given."""

    name = "lookup"
    rests = True

    def __init__(self, tokens, chances):
        self.tokens, self.chances, self.judged = tuple(tokens), tuple(chances), []

    def begin(self, sequence):
        pass

    def end(self, sequence):
        pass

    def forget(self):
        pass

    def propose(self, sequences):
        return [Draft(self.name, self.tokens, self.chances, len(each.tokens)) for each in sequences]

    def judge(self, sequence, draft, verified, accepted):
        self.judged.append((verified, accepted))


def drafting(source, slope):
    made = Drafting([source])
    for rows in (1, 8, 64):
        made.times.rows.note(rows, 1 + slope * (rows - 1))
    return made


def lengths(made, sequences, rows, most=64):
    made.propose(sequences, rows, most)
    return [len(each.draft.tokens) for each in sequences]


def test_a_draft_is_as_long_as_it_pays():
    """A token with this chance is worth a row if the row takes a smaller part of a step than it adds to the tokens."""
    one = sequence("a", [1, 2, 3])
    for slope, chances, length in ((0.05, [0.9, 0.8, 0.7, 0.6], 4), (0.5, [0.9, 0.8, 0.7, 0.2], 3), (1.0, [0.9, 0.8], 0), (0.2, [0.1], 0),
                                   (0.05, [0.1], 1)):
        made = drafting(Fixed(range(4)[:len(chances)], chances), slope)
        made.begin(one)
        assert lengths(made, [one], 1) == [length], (slope, chances)
        made.end(one)


@pytest.mark.parametrize("chance, length", [(0.1, 0), (0.9, 1)])
@pytest.mark.parametrize("beside", [False, True])
def test_a_draft_beside_a_prompt_pays_by_itself(beside, chance, length):
    """A step that takes long anyway, because of a prompt, does not verify what is hardly ever right."""
    made = drafting(Fixed([5], [chance]), 0.2)
    made.times.prompts.note(64, 60.0, row_s=1.0)
    one, long = sequence("a", [1, 2, 3]), sequence("b", range(900))
    long.computed = 0
    made.begin(one)
    made.draft([one], [one, long][:1 + beside], StepLimits(8, 256, max_rows=64))
    assert len(one.draft.tokens) == length


def test_when_rows_fill_up_drafts_shrink_first():
    source = Fixed(range(8), [0.8 ** (i + 1) for i in range(8)])
    made, all_ = drafting(source, 0.1), [sequence(str(i), [1, 2, 3]) for i in range(32)]
    for each in all_:
        made.begin(each)
    totals = [sum(lengths(made, all_[:rows], rows)) / rows for rows in (1, 2, 8, 32)]
    assert totals == sorted(totals, reverse=True) and totals[0] > 2 * totals[-1]
    assert sum(lengths(made, all_[:8], 8, most=10)) == 2 and sum(lengths(made, all_, 32, most=20)) == 0


def judged(made, one, right, tokens=8):
    """A step: propose, verify as many as were chosen, of which at most `right` are right."""
    made.propose([one], 1, 64)
    verified, at = len(one.draft.tokens), len(one.tokens)
    accepted = min(right, verified)
    came = [*made.records[one].proposed.tokens[:accepted], 999]
    one.tokens += came
    made.judge(one, verified, accepted, one.tokens[at:])
    return verified


def test_wrong_drafts_pause_until_they_would_be_right():
    """Drafts that are always wrong stop, and begin again once they would have been right."""
    source = Fixed(range(8), [0.9 ** (i + 1) for i in range(8)])
    made, one = drafting(source, 0.1), sequence("a", [1, 2, 3])
    made.begin(one)
    verified = [judged(made, one, 0) for _ in range(60)]
    assert verified[0] == 8 and verified[-20:] == [0] * 20 and made.drafted.lookup == sum(verified) and made.accepted.lookup == 0
    for _ in range(100):        # not verified, yet what came would have been right
        made.propose([one], 1, 64)
        at = len(one.tokens)
        one.tokens += [0]
        made.judge(one, len(one.draft.tokens), min(1, len(one.draft.tokens)), one.tokens[at:])
    assert judged(made, one, 8) > 0


class Counting(Fixed):
    """A source that notes for which lengths of a sequence it was asked."""

    def __init__(self, tokens, chances):
        super().__init__(tokens, chances)
        self.asked = []

    def propose(self, sequences):
        self.asked += [len(each.tokens) for each in sequences]
        return super().propose(sequences)


def asked_for(made, one, source, rows, count):
    """For how many of the next `count` tokens the source is asked, in steps of so many rows."""
    source.asked.clear()
    for _ in range(count):
        made.propose([one], rows, 64)
        one.tokens.append(7)
    return len(source.asked)


def test_drafts_that_do_not_pay_are_asked_for_less_often_beside_others():
    """Alone a sequence loses nothing by asking; among sixteen, each that asks in vain lengthens the step of all."""
    source = Counting([1], [0.1])
    made, one = drafting(source, 0.2), sequence("a", [1, 2, 3])
    made.begin(one)
    assert asked_for(made, one, source, rows=1, count=50) == 50
    assert asked_for(made, one, source, rows=16, count=200) < 15
    assert asked_for(made, one, source, rows=1, count=100) >= 68, "alone again, it soon is asked for each token"


def test_a_draft_that_pays_ends_the_pause():
    source = Counting([1], [0.1])
    made, one = drafting(source, 0.05), sequence("a", [1, 2, 3])
    made.begin(one)
    asked_for(made, one, source, rows=32, count=200)
    source.tokens, source.chances = (1, 2), (0.99, 0.98)
    while not one.draft.tokens:
        made.propose([one], 16, 64)
        one.tokens.append(7)
    assert asked_for(made, one, source, rows=16, count=50) == 50


def test_what_a_grammar_forces_is_never_left_out():
    source = Counting([1], [0.1])
    source.rests = False
    made, one = drafting(source, 0.2), sequence("a", [1, 2, 3])
    made.begin(one)
    assert asked_for(made, one, source, rows=16, count=100) == 100


def test_usage_counts_by_source():
    made, one = drafting(Fixed(range(4), [0.9, 0.8, 0.7, 0.6]), 0.05), sequence("a", [1, 2, 3])
    made.begin(one)
    assert judged(made, one, 2) == 4
    usage = one.output.usage
    assert (usage.drafted.lookup, usage.accepted.lookup, usage.drafted_tokens, usage.accepted_tokens, usage.drafted.forced) == (4, 2, 4, 2, 0)


def test_step_times_are_estimated_from_neighbours():
    """Step times are estimated between and beyond what was measured."""
    times = StepTimes()
    assert times.expected(1, 3) == pytest.approx([1, 1.05, 1.1])
    times.note(1, 2.0)
    times.note(9, 4.0)
    assert times.expected(1, 11) == pytest.approx([2 + 0.25 * i for i in range(11)])
    times.note(5, 1.0)      # more rows take no less time: both are uncertain
    assert times.expected(3, 3) == pytest.approx([1.5])
    for _ in range(100):
        times.note(9, 8.0)
    assert times.expected(9, 9)[0] > 7
    before = times.measured[9][0]
    times.note(9, 1000.0)   # the machine slept
    assert times.measured[9][0] < 1.06 * before


def test_one_slow_step_spoils_no_wider_estimate():
    """One slow step does not make steps of more rows look slow."""
    times = StepTimes()
    for _ in range(20):
        for rows in (1, 8, 16):
            times.note(rows, 1 + 0.1 * rows)
    times.note(4, 9.0)
    assert times.expected(16, 16)[0] == pytest.approx(2.6) and times.expected(8, 8)[0] < 2.6


def test_measured_chances_follow_what_was_right():
    acceptance = Acceptance()
    draft = Draft("lookup", tuple(range(4)), (0.8, 0.64, 0.51, 0.41), 3)
    for _ in range(200):
        _, counts = acceptance.measured(draft)
        acceptance.note(counts, 1, 2)       # the first is right, the second wrong
    chances, _ = acceptance.measured(draft)
    assert chances[0] > 0.95 and (len(chances) == 1 or chances[1] < 0.1)


# in an engine --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(default_model_path, tmp_path_factory):
    """The default model with an adapter, in the weights' own types."""
    made = make_engine(default_model_path, as_stored=True, num_pages=400, max_batch=16)
    made.adapters.load("other", random_adapter(tmp_path_factory.mktemp("adapter") / "other", 30, SMOLLM2, 1, 4, 0.03, torch.bfloat16))
    return made


@pytest.fixture
def eager(monkeypatch):
    draft_eagerly(monkeypatch)


ADDRESS = {"type": "object", "properties": {
    "first_name": {"type": "string", "maxLength": 10}, "is_active_customer": {"type": "boolean"}, "employment": {
        "type": "object", "properties": {"company_name": {"type": "string", "maxLength": 10}, "annual_salary": {"type": "integer", "maximum": 9}},
        "required": ["company_name", "annual_salary"], "additionalProperties": False}},
    "required": ["first_name", "is_active_customer", "employment"], "additionalProperties": False}


def in_grammar(engine, name, temperature, **more):
    ids = tuple(engine.tokenizer.render([Message("user", "Make up a customer.")]))
    return assignment(name, ids, SamplingParams(temperature, seed=5), 100, grammar=json_grammar(ADDRESS, ""), **more)


def told(engine, works, drafts=True):
    """{id: (tokens, log-probabilities, reason)}, and how many drafted tokens were right, by source."""
    engine.drafts, before = drafts, engine.drafting.accepted
    found = pieces(engine, works)
    engine.drafting.sources["lookup"].stores.settle()
    check_integrity(engine)
    engine.drafts, after = True, engine.drafting.accepted
    made = {name: (sum((piece.tokens for piece in each), ()), [one._replace(drafted=False) for piece in each for one in piece.logprobs], each.end.reason)
            for name, each in found.items()}
    return made, {source: getattr(after, source) - getattr(before, source) for source in ("lookup", "forced")}, found


@pytest.mark.skipif(decode_core() is None, reason="rows are invariant with decode_core alone")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_forced_tokens_of_a_grammar_save_steps(engine, eager, temperature):
    """Answers in a grammar are the same with drafts, and forced tokens take fewer steps."""
    plain = {"logprobs": 2}
    works = [in_grammar(engine, "a", temperature), in_grammar(engine, "b", temperature, **plain), chat_work(engine, "c", "List five towns.", temperature=temperature)]
    without, right, _ = told(engine, works, drafts=False)
    assert right == {"lookup": 0, "forced": 0} and json.loads(engine.tokenizer.decode(without["a"][0]))
    for _ in range(2):
        with_drafts, right, found = told(engine, works)
        assert with_drafts == without
    assert right["forced"] > 4 and right["lookup"] > 10
    usage = found["b"].end.usage
    assert usage.accepted.forced > 0 and usage.drafted_tokens >= usage.accepted_tokens
    marked = sum(one.drafted for piece in found["b"] for one in piece.logprobs)
    assert marked == usage.accepted_tokens and len(without["b"][1]) == len(without["b"][0])
    assert len(found["a"]) < len(without["a"][0]) / 2           # a piece a step


@pytest.mark.skipif(decode_core() is None, reason="rows are invariant with decode_core alone")
def test_an_adapter_s_answers_are_alike_with_drafts(engine, eager):
    works = [chat_work(engine, f"{adapter} {temperature}", "Name five rivers.", temperature=temperature, seed=3) for adapter in ("", "other") for temperature in (0.0, 1.0)]
    works = [Assignment(work.id, work.prompt_ids, AnswerParams(sampling=work.params.sampling, adapter=work.id.split()[0] if work.id[0] != " " else ""), 40)
             for work in works]
    without, _, _ = told(engine, works, drafts=False)
    for _ in range(2):
        with_drafts, right, _ = told(engine, works)
        assert with_drafts == without
    assert right["lookup"] > 40 and without["other 0.0"] != without[" 0.0"]


def test_a_cancelled_answer_is_kept_for_its_owner(engine):
    lookup = engine.drafting.sources["lookup"]
    work = chat_work(engine, "left", "Tell me about the sea.", temperature=0.9, seed=11)
    work = Assignment("left", work.prompt_ids, AnswerParams(sampling=work.params.sampling, client="carol"), 40)
    engine.drafts = True
    engine.add(work)
    said = []
    while len(said) < 12:
        said += [token for name, event in engine.step() if type(event).__name__ == "Piece" for token in event.tokens]
    engine.cancel("left")
    lookup.stores.settle()
    while engine.busy:
        engine.step()
    [part] = lookup.stores.by_owner["", "carol", ""].parts
    assert list(part.tokens)[-len(said) - 1:-1] == said


def test_a_draft_has_a_mask_after_each_token(engine):
    """The masks of a draft are those after each of its tokens."""
    made = Grammar(engine.tokenizer, json_grammar(ADDRESS, ""))
    text = engine.tokenizer.encode('{"first_name": "Ada", "is_active_customer": true')
    masks = made.compute_masks(text)
    assert len(masks) == len(text) + 1 and made.compute_masks() == masks[:1]        # it is where it was before
    for token, mask in zip(text, masks):
        assert made.matcher.compute_bitmask() == mask
        if forced := made.forced():
            made.masks.set_result([mask]) if not made.masks.done() else None
            assert sum(map(int.bit_count, mask)) == 1 and forced[0] == token
        assert made.feed(token)
    wrong = made.compute_masks([*engine.tokenizer.encode(', "'), *engine.tokenizer.encode("nothing")])
    assert 1 <= len(wrong) <= 3 and made.fitting(engine.tokenizer.encode("nothing")) == 0


@pytest.mark.parametrize("content, message", [(None, "No such file"), (b"", "the file is empty"), (b"\xff\xfe\x00", "not UTF-8 text")])
def test_an_unreadable_draft_text_is_named(tmp_path, content, message):
    """A text to draft from that cannot be read is an error that names it."""
    path = tmp_path / "manual.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"--draft-text .*manual.txt: {message}"):
        read_text_of(str(path), "--draft-text")


@pytest.mark.parametrize("kind, times", [("agents", 1.5), ("edits", 2.3), ("retries", 2.5), ("json", 1.5), ("prose", 1.0), ("unseen", 1.15)])
def test_transcripts_draft_better_than_by_last_place(engine, kind, times, monkeypatch):
    """bench/drafts.py, without steps: rows cost 6 % of a step of one row, which is counted and not measured."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[3] / "bench")
    bench = importlib.import_module("drafts")
    found = {way: bench.accepted(way, bench.transcripts(engine.tokenizer, [kind])[kind], 0.06) for way in ("last", "lookup")}
    assert found["lookup"][0] > times * found["last"][0] and found["lookup"][0] > 1
