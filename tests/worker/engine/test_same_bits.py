"""Answers have the same bits alone, in a batch, in chunks, cached, drafted, preempted and resumed, in one process and on two ranks: every family.

Of tiny random models, by decode_core on a CPU. What is compared are the tokens, drawn as in a server, and all logits that they are drawn from."""

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest
import torch

from chatlm.common.config import PAGE_SIZE
from chatlm.common.core import decode_core
from chatlm.common.messages.requests import Ended, Piece, SamplingParams
from chatlm.worker.engine.integrity import check_integrity
from chatlm.worker.engine.states import StatePool
from chatlm.worker.kernels.limits import not_compiled
from chatlm.worker.model.pages import KvType
from chatlm.worker.weights.families.table import FAMILIES
from encoders import MODELS as ENCODERS
from engines import draft_eagerly, make_engine, propose_partly_right
from families import GGUF_MODELS, GROWING, MODELS, as_gguf, make_model, save
from generations import GENERATIONS
from nightly import WHOLE, by_day
from packers import packed_model
from ranked import Group
from tiny_nanogpt import ARGS, random_state, write, write_meta
from works import assignment

NEW = 33            # tokens of an answer: more than two pages
FEW = 18            # where by day a family is computed in ordinary ways alone: more than one page


class Row(NamedTuple):
    model: str          # of MODELS, a generation, or nanogpt
    changes: dict = {}  # of its config
    file: bool = False  # a GGUF file, or a folder of `packing`, whose matrices stay packed
    kv: str = "auto"
    context: int | None = None      # --context-length
    fine: bool = False  # --arithmetic fine
    packing: str = ""   # of tests/support/packers.py


ROWS = {**{name: Row(name) for name in (*MODELS, *GENERATIONS, "nanogpt")},
        "ministral3 whose queries grow": Row("ministral3", {"rope_parameters": GROWING}, context=512),
        **{f"{name} as a packed file": Row(name, changes, file=True) for name, changes in GGUF_MODELS.items()},
        "llama of odd sizes": Row("llama3.1", {"head_dim": 20, "hidden_size": 72, "intermediate_size": 100}),
        "cohere2 of odd sizes": Row("cohere2", {"head_dim": 20, "hidden_size": 72}),
        "llama of odd sizes as a packed file": Row("llama2", {"head_dim": 24, "hidden_size": 96}, file=True),
        **{f"{name} as a packed file, finely": Row(name, GGUF_MODELS[name], file=True, fine=True) for name in ("llama2", "qwen3moe")},
        "llama as an AWQ folder": Row("llama3.1", {"hidden_size": 128, "intermediate_size": 256}, file=True, packing="awq-128"),
        "qwen3moe as an AWQ folder, finely": Row("qwen3moe", file=True, fine=True, packing="awq"),
        # windows and capped scores, sinks, some heads of 16, which stay floats, layers with states, latents
        **{f"{name} with keys of 8 bits": Row(name, kv="q8_0") for name in ("gemma2", "gpt-oss", "gemma4", "qwen3", "qwen3.5", "cohere2", "kimi2")}}


def test_every_family_has_a_row():
    """One that is new gets a tiny model in MODELS, of encoders in tests/support/encoders.py, and so its rows in the tests of families."""
    # gte's older name; tests/support/nomic_experts.py; Granite and GLM-4.5 by other names
    others = {"new", "nomic_bert_moe", "minicpm", "bailing_moe_v2"}
    assert {kind for kind, _ in (*MODELS.values(), *ENCODERS.values())} | others == {*FAMILIES}


class Watched:
    """An engine's steps, one after the other; `logits` has the bytes from which each token was drawn, by its answer's seed and its position."""

    ahead = False

    def __init__(self, engine):
        self.transformer, self.runner, self.logits = engine.transformer, engine.runner, {}

    def start(self, batch, rows):
        self.rows = rows
        return self.runner.start(batch, rows)

    def finish(self, ticket):
        tokens = self.runner.finish(ticket)
        for line, row in zip(self.transformer.buffers["logits"], self.rows):
            self.logits[row.params.seed, row.position] = line.tobytes()     # of a wrong draft: until the right one is drawn there
        return tokens


class Found(NamedTuple):
    """What an engine has made of some works, computed together."""

    tokens: dict    # of each work by its id
    logits: dict    # of Watched
    cached: list    # how many tokens of each prompt came from the cache


def answers(engine, works, ahead=False):
    """With steps begun ahead, as in a server, nobody sees the logits."""
    steps, tokens, cached = engine.runner, {work.id: list(work.resumed_ids) for work in works}, []
    engine.runner = steps if ahead else Watched(engine)
    for work in works:
        engine.add(work)
    while engine.busy:
        for name, event in engine.step():
            if isinstance(event, Piece):
                tokens[name] += event.tokens
            elif isinstance(event, Ended):
                cached.append(event.usage.cached_tokens)
    logits, engine.runner = {} if ahead else engine.runner.logits, steps
    return Found(tokens, logits, cached)


def works_of(vocab_size, count):
    """Three answers that are compared, and three that are beside them."""
    prompts = [tuple((31 * i * i + 7 * i + 5 * n) % min(vocab_size, 250) for i in range(length)) for n, length in enumerate((140, 75, 30, 66, 1, 19))]
    works = [assignment(f"w{n}", prompt, SamplingParams(temperature=t, seed=n), count, ignore_eos=True)
             for n, (prompt, t) in enumerate(zip(prompts, (0.0, 0.6, 1.0) * 2))]
    return works[:3], works[3:]


class Ways:
    """An engine, and what its answers are: each computed alone, from an empty cache, without drafts, each prompt in one step."""

    def __init__(self, engine, count):
        self.engine, self.scheduler, self.pool, self.count = engine, engine.scheduler, engine.pool, count
        self.works, self.others = works_of(engine.tokenizer.vocab_size, count)
        engine.drafts = False
        alone = [self.fresh([work]) for work in self.works]
        self.tokens = {name: tokens for found in alone for name, tokens in found.tokens.items()}
        self.logits = {key: logits for found in alone for key, logits in found.logits.items()}
        assert len(self.logits) == sum(map(len, self.tokens.values())) == count * len(self.works)

    def fresh(self, works, **options):
        self.pool.forget_cached()
        return answers(self.engine, works, **options)

    def check(self, found, way):
        wrong = [work.id for work in self.works if found.tokens.get(work.id, self.tokens[work.id]) != self.tokens[work.id]]
        assert not wrong, f"{way}: other tokens in {wrong}"
        wrong = sorted(key for key in self.logits.keys() & found.logits.keys() if found.logits[key] != self.logits[key])
        assert not wrong, f"{way}: the tokens are the same, other bits in {wrong}"
        check_integrity(self.engine)

    def check_batched_and_chunked(self, chunks):
        both, whole = [*self.works, *self.others], self.scheduler.limits.prefill_chunk
        self.check(self.fresh(both), "in a batch")
        self.check(self.fresh(both, ahead=True), "in a batch, in steps begun ahead")
        for chunk in chunks:
            self.scheduler.limits.prefill_chunk = chunk
            self.check(self.fresh(both[::-1]), f"in a batch, in chunks of {chunk}")
        self.scheduler.limits.prefill_chunk = whole

    def check_cached(self):
        self.fresh(self.works)
        for works in (self.works[::-1], self.works[:1]):
            found = answers(self.engine, works)
            self.check(found, "from the prefix cache")
            assert found.cached == [(len(work.prompt_ids) - 1) // PAGE_SIZE * PAGE_SIZE for work in works]

    def check_drafted(self, monkeypatch):
        """Drafts are right up to some token."""
        engine = self.engine
        propose_partly_right(monkeypatch, self.works, self.tokens)
        engine.drafts, before = True, (engine.drafting.drafted.total, engine.drafting.accepted.total)
        for works in (self.works, *([work] for work in self.works)):
            self.check(self.fresh(works), "with drafts")
        self.check(answers(engine, self.works, ahead=True), "with drafts, from the cache")
        engine.drafts, drafted, accepted = False, engine.drafting.drafted.total - before[0], engine.drafting.accepted.total - before[1]
        assert drafted > accepted > self.count

    def check_looked_up(self, monkeypatch):
        """Asked again, answers are drafted from what was said before, in drafts as long as the step has rows."""
        engine = self.engine
        lookup, engine.drafts = engine.drafting.sources["lookup"], True
        before = engine.drafting.accepted.lookup
        self.check(self.fresh(self.works), "looking up")
        lookup.stores.settle()
        with monkeypatch.context() as patches:
            draft_eagerly(patches)
            for works in (self.works, self.works[:1], self.works + self.others):
                self.check(self.fresh(works), "looking up what was said")
            self.check(answers(engine, self.works, ahead=True), "looking up, from the cache")
            self.check_preempted()
            self.check_resumed()
        engine.drafts = False
        assert engine.drafting.accepted.lookup - before > 3 * self.count

    def check_preempted(self):
        """With pages for two prompts, and one more of each group."""
        before, whole, self.scheduler.limits.prefill_chunk = self.scheduler.queue.preemptions, self.scheduler.limits.prefill_chunk, PAGE_SIZE
        needed = sum(self.pool.pages_for(len(work.prompt_ids), PAGE_SIZE) for work in self.works[:2]) + self.pool.groups
        self.pool.forget_cached()
        held = self.pool.allocate(self.pool.available - needed)
        found = [answers(self.engine, works) for works in (self.works, self.works[::-1])]
        self.pool.release(held)
        self.scheduler.limits.prefill_chunk = whole
        for each in found:
            self.check(each, "preempted")
        assert self.scheduler.queue.preemptions > before or all(self.pool.windows)        # where each layer has one, sequences do not grow

    def check_beside(self, monkeypatch):
        """In the background and before it, with room for three tokens in each step."""
        behind = [replace(work, background=True) for work in self.works], [replace(work, background=True) for work in self.others]
        with monkeypatch.context() as patches:
            patches.setattr(self.scheduler.lane, "room_beside", lambda times, tokens, most: min(3, most))
            self.scheduler.lane.room = 3
            for works in ([*behind[0], *self.others], [*self.works, *behind[1]]):
                self.check(self.fresh(works), "in the background")
                self.check(answers(self.engine, works, ahead=True), "in the background, in steps begun ahead")

    def check_resumed(self):
        for known in (1, 20):
            resumed = [replace(work, resumed_ids=tuple(self.tokens[work.id][:known])) for work in self.works]
            self.check(self.fresh(resumed), f"resumed after {known} tokens")


@pytest.fixture(scope="module")
def path_of(tmp_path_factory, nanochat_fixtures):
    """A function from a row to its model."""
    @cache
    def made(name):
        row = ROWS[name]
        if row.model in GENERATIONS:
            return nanochat_fixtures / row.model
        folder = tmp_path_factory.mktemp("model")
        if row.model == "nanogpt":
            write_meta(write(folder, random_state(ARGS), ARGS) / "meta.pkl")
            return folder
        model = make_model(row.model, **row.changes)
        if row.packing:
            return packed_model(model, folder, row.packing)[0]
        return as_gguf(folder / "tiny.gguf", model, quantized=True) if row.file else save(model, folder)
    return made


@pytest.fixture(scope="module")
def ranks_that_live():
    with pytest.MonkeyPatch.context() as monkeypatch:
        group = Group(monkeypatch, 2)
        yield group
        group.close()


@pytest.fixture
def two_ranks(ranks_that_live, request):
    """Ranks for one model; the next one gets others if this one fails."""
    failures = request.session.testsfailed
    yield ranks_that_live
    if request.session.testsfailed > failures:
        ranks_that_live.close()
    elif ranks_that_live.ranks:
        ranks_that_live.settle()


def engine_of(row, path, ranks, request):
    if ranks == 2:
        dtype = None if row.file else "float32"
        return request.getfixturevalue("two_ranks").engine(path, max_batch=8, kv_cache_dtype=row.kv, context_length=row.context, dtype=dtype,
                                                            arithmetic="fine" if row.fine else "fast")
    return make_engine(path, num_pages=400, max_batch=8, apart=True, as_stored=row.file, opened_for=row.context, fine=row.fine,
                       kv=KvType("float32", packed=True) if row.kv == "q8_0" else None)


def check_is_of(row, transformer):
    """That the engine is what the row is there for."""
    assert row.file == bool({"q8_0", "mxfp4", "u4_g32", "u4_g128"} & {*transformer.matrix_types})
    assert (row.kv == "q8_0") == ("q8_0" in transformer.layout.types)
    assert bool(row.context) == any(attn.scores.growth for attn in transformer.model.attentions)
    assert row.fine == transformer.kernels.backend.program.fine


FIRST = {kind: name for name, (kind, _) in reversed(MODELS.items())}     # of each family
# Each block of these has its row by day: they differ in names, sizes and factors, which test_families compares
ALIKE = {"mistral", "qwen2", "smollm3", "phi3", "granite", "granite-moe", "granite-moe-shared", "mixtral", "qwen2moe", "qwen3vlmoe", "olmo2", "olmoe", "glm4", "ernie4.5", "seed-oss",
         "ministral3", "starcoder2", "glm4moe", "minimax-m2", "deepseek2-grouped", "glm-flash", "youtu", "mistral4", "ernie-moe", "hunyuan-moe", "qwen3.5moe", "qwen3next",
         # these have blocks of their own, whose recorded bits test_forward_record compares by day
         "olmo", "olmo3", "exaone4", "cohere", "cohere2moe", "hunyuan", "phimoe", "lfm2moe", "gemma4-unified", "muse-glimmer"}
# By day test_weights has the first, and the other odd sizes are llama's
AT_NIGHT = {"gen1", "gen2", "gen3", "gen4", "cohere2 of odd sizes"}
BY_DAY = [*(name for name in FIRST.values() if name not in ALIKE),
          *[name for name in ROWS if name not in MODELS and name not in AT_NIGHT and "file" not in name and "keys" not in name], "llama-gelu", "gemma4moe", "granite4h",
          "gpt-oss as a packed file", "qwen3moe as a packed file", "qwen3moe as a packed file, finely", "gemma2 with keys of 8 bits", "gpt-oss with keys of 8 bits",
          "kimi2 with keys of 8 bits"]
# A second rank is slow where the tests share two cores; on one these are also preempted without drafts. The first has experts and windows, the second states
ON_TWO_BY_DAY = "gpt-oss", "qwen3.5"
# Of each kind of memory one, in every way: the steps that the engine plans differ by what a layer keeps, not by its arithmetic
IN_EVERY_WAY = {*ON_TWO_BY_DAY, "llama3.1", "gemma4", "granite4h", "kimi2", "gemma2 with keys of 8 bits"}


@pytest.mark.skipif(decode_core() is None, reason="the promise is decode_core's")
@pytest.mark.parametrize("name, ranks", by_day([(name, ranks) for ranks in (1, 2) for name in ROWS],
                                               *((name, 1) for name in BY_DAY), *((name, 2) for name in ON_TWO_BY_DAY)))
def test_answers_have_the_same_bits_however_computed(name, ranks, path_of, request, monkeypatch, one_thread):
    monkeypatch.setattr(StatePool, "INTERVAL", 32)
    with torch.inference_mode():
        engine = engine_of(ROWS[name], path_of(name), ranks, request)
        if not engine.kernels.row_invariant:
            pytest.skip(f"torch computes this model: {not_compiled(engine.transformer.model)}")
        check_is_of(ROWS[name], engine.transformer)
        all_ways = WHOLE or ranks == 1 and name in IN_EVERY_WAY
        ways = Ways(engine, NEW if all_ways else FEW)
        ways.check_batched_and_chunked((7, 32) if all_ways else (7,))
        ways.check_cached()
        if all_ways:
            ways.check_looked_up(monkeypatch)
        ways.check_drafted(monkeypatch)
        if all_ways:
            ways.check_beside(monkeypatch)
        if WHOLE or ranks == 1 and name in ON_TWO_BY_DAY:      # check_looked_up has done both with drafts
            ways.check_preempted()
            ways.check_resumed()
