"""Layers that keep a state instead of keys: answers stay transformers', however they are cut, cached, preempted or resumed."""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch

from chatlm.common.config import PAGE_SIZE, Settings
from chatlm.common.core import decode_core
from chatlm.common.hub.find import resolve_model
from chatlm.common.messages.requests import SamplingParams
from chatlm.worker.build import build_engine
from chatlm.worker.engine.drafts import NO_DRAFT, Draft
from chatlm.worker.engine.integrity import check_integrity, queue_faults
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.engine.limits import FREE_ROWS, StepLimits
from chatlm.worker.engine.scheduler import Scheduler
from chatlm.worker.engine.sequence import Sequence
from chatlm.worker.engine.states import StatePool
from chatlm.worker.model.batch import Sequences
from chatlm.worker.model.blocks.mixers import DeltaRule, Mamba2
from chatlm.worker.ops.mixers import OneEach, delta_rule_reference, mamba2_reference
from chatlm.worker.gauges import Gauges
from engines import make_engine, propose_partly_right, run, step_pieces, tokens_of
from families import clear_cases, make_model, save
from nightly import by_day
from works import assignment


@pytest.fixture(scope="module", params=by_day(["lfm2", "qwen3.5", "qwen3.5moe", "lfm2moe", "granite4h", "granite4h-dense", "qwen3next"], "lfm2"))
def made(tmp_path_factory, request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = make_model(request.param)
    yield save(model, tmp_path_factory.mktemp(request.param)), clear_cases(model, lengths=(200, 90, 30), count=64, tried=4)
    torch.set_num_threads(threads)


def works_of(cases):
    return [assignment(f"case {i}", tuple(case.prompt), SamplingParams(temperature=0), 64, ignore_eos=True) for i, case in enumerate(cases)]


def check(engine, cases, works=None, **options):
    result = run(engine, works or works_of(cases), **options)
    for i, case in enumerate(cases):
        assert result.tokens[f"case {i}"] == case.tokens, i
    return {name: end.usage.cached_tokens for name, end in result.end.items()}


BACKENDS = ["reference", pytest.param("decode_core", marks=pytest.mark.skipif(decode_core() is None, reason="not built"))]
BY_DAY = [pytest.param("reference", marks=pytest.mark.slow), BACKENDS[1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_give_transformers_answers(made, backend, monkeypatch):
    """Answers are those of transformers in chunks, together, cached and ahead."""
    folder, cases = made
    monkeypatch.setattr(StatePool, "INTERVAL", 64)
    engine = make_engine(folder, num_pages=100, prefill_chunk=48, max_batch=4, reference=backend == "reference")
    assert check(engine, cases) == {"case 0": 0, "case 1": 0, "case 2": 0}
    states = engine.pool.states
    # 64, 128, 192 = the end of the first prompt, 256 of its answer; 64 and the end of the second, 128; 16, 64 of its answer;
    # and the last page of each answer
    assert len(states.free) == states.num_slots - states.snapshots and [len(states.ends), len(states.passed)] == [3, 9]
    assert check(engine, cases, ahead=True) == {"case 0": 192, "case 1": 80, "case 2": 16}


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_survive_an_emptied_cache(made, backend):
    """Answers are the same after the cache was emptied."""
    folder, cases = made
    engine = make_engine(folder, num_pages=100, prefill_chunk=48, max_batch=4, reference=backend == "reference")
    check(engine, cases)
    states = [state for layer in engine.transformer.states for state in layer]
    assert engine.empty_cache() and not engine.transformer.cache.any() and not any(state.any() for state in states)
    assert engine.pool.states.snapshots == 0 and check(engine, cases) == {"case 0": 0, "case 1": 0, "case 2": 0}


@pytest.mark.parametrize("backend", BY_DAY)
def test_preempted_answers_go_on_from_a_snapshot(made, backend):
    """Preempted answers go on from a snapshot or from their beginning."""
    folder, cases = made
    engine = make_engine(folder, num_pages=25, prefill_chunk=32, max_batch=4, context_length=264, reference=backend == "reference")
    check(engine, cases)
    assert engine.queue.preemptions > 0


@pytest.mark.parametrize("backend", BY_DAY)
def test_a_state_s_answer_is_the_same_elsewhere(made, backend):
    """An answer that is resumed elsewhere stays the same."""
    folder, cases = made
    engine = make_engine(folder, num_pages=100, prefill_chunk=32, max_batch=4, reference=backend == "reference")
    for known in (1, 23):
        works = [replace(work, resumed_ids=tuple(case.tokens[:known])) for work, case in zip(works_of(cases), cases)]
        result = run(engine, works)
        assert all(result.tokens[f"case {i}"] == case.tokens[known:] for i, case in enumerate(cases))


def undisturbed(folder, works):
    """The tokens of each work by its id, computed alone, without snapshots and drafts."""
    plain = make_engine(folder, num_pages=100, prefill_chunk=64, max_batch=4, num_snapshots=0)
    if not plain.kernels.row_invariant:
        pytest.skip("torch computes this model")
    plain.drafts = False
    return {work.id: tokens_of(plain, [work])[work.id] for work in works}


@pytest.mark.skipif(decode_core() is None, reason="the promise is decode_core's")
@pytest.mark.parametrize("seed", by_day([4, 5, 6], 5))
def test_random_cuts_and_deaths_change_no_token(made, seed, monkeypatch):
    """All at once. An engine that dies leaves the tokens that it told of, from which another one, of other sizes, goes on."""
    folder, cases = made
    works = [assignment(f"w{i}", tuple(case.prompt), SamplingParams(temperature=t, seed=i), 40, ignore_eos=True)
             for i, (case, t) in enumerate(zip(cases, (0.0, 0.6, 1.0)))]
    works += [replace(work, id=f"{work.id} other", prompt_ids=work.prompt_ids[:-3] + (1, 2, 3)) for work in works]
    expected, dice = undisturbed(folder, works), random.Random(seed)
    propose_partly_right(monkeypatch, works, expected)
    tokens, deaths, preemptions, accepted = {work.id: [] for work in works}, 0, 0, 0
    while left := [replace(work, resumed_ids=tuple(tokens[work.id])) for work in works if len(tokens[work.id]) < 40]:
        monkeypatch.setattr(StatePool, "INTERVAL", dice.choice([16, 32, 48]))
        engine = make_engine(folder, num_pages=dice.choice([18, 24, 100]), prefill_chunk=dice.choice([17, 64]), context_length=264,
                             max_batch=dice.choice([1, 3, 6]), num_snapshots=dice.choice([0, 2, 9]))
        dice.shuffle(left)
        steps = dice.choice([8, 30, 300]) if deaths else 30
        while engine.busy or left:
            if left and (dice.random() < 0.3 or not engine.busy):
                engine.add(left.pop())
            for name, piece in step_pieces(engine):
                tokens[name] += piece.tokens
            check_integrity(engine)
            steps -= 1
            if not steps:
                deaths += 1
                break
        preemptions, accepted = preemptions + engine.queue.preemptions, accepted + engine.drafting.accepted.total
    assert tokens == expected and deaths and preemptions and accepted > 10


def test_random_cuts_and_evictions_change_no_token(made, monkeypatch):
    """With few slots too: then answers wait for one, and snapshots go."""
    folder, cases = made
    dice = random.Random(5)
    for _ in range(2):
        monkeypatch.setattr(StatePool, "INTERVAL", dice.choice([16, 32, 48]))
        engine = make_engine(folder, num_pages=dice.choice([30, 60]), prefill_chunk=dice.choice([5, 17, 64]), context_length=264,
                             max_batch=dice.choice([1, 2, 3]), num_snapshots=dice.choice([0, 1, 3]))
        check(engine, cases, ahead=dice.random() < 0.5)
        check(engine, cases[::-1], works_of(cases[::-1]), ahead=dice.random() < 0.5)


def test_ten_turns_compute_little_again(made):
    """What each turn computes: its new tokens, the answer before, and what a page does not hold."""
    folder, _ = made
    engine = make_engine(folder, num_pages=100, prefill_chunk=64, max_batch=2, num_snapshots=3)
    text, dice = [256], random.Random(3)
    for turn in range(10):
        added = [dice.randrange(256) for _ in range(15)]
        text += added
        result = run(engine, [assignment("turn", tuple(text), SamplingParams(temperature=0), 9, ignore_eos=True),
                              assignment("other", tuple(dice.choices(range(256), k=40)), SamplingParams(temperature=0), 2, ignore_eos=True)])
        again = len(text) - result.end["turn"].usage.cached_tokens
        assert again <= len(added) + 9 + PAGE_SIZE or turn == 0, turn
        text += result.tokens["turn"]
    assert engine.pool.states.snapshots == 3


def test_a_turn_goes_on_from_the_last_page(made, monkeypatch):
    """Or, where a template says otherwise of the answer before, from the last snapshot before that."""
    folder, _ = made
    monkeypatch.setattr(StatePool, "INTERVAL", 32)
    engine = make_engine(folder, num_pages=100, prefill_chunk=64, max_batch=2, num_snapshots=40)
    text, dice = [256], random.Random(8)
    for turn in range(5):
        added = [dice.randrange(256) for _ in range(7)]
        text += added
        result = run(engine, [assignment("turn", tuple(text), SamplingParams(temperature=0), 75, ignore_eos=True)])
        again = len(text) - result.end["turn"].usage.cached_tokens
        assert again <= len(added) + PAGE_SIZE or turn == 0, turn
        before, answer = len(text), result.tokens["turn"]
        text += answer
    cut = text[:before] + answer[:50] + [1, 2, 3]
    result = run(engine, [assignment("turn", tuple(cut), SamplingParams(temperature=0), 2, ignore_eos=True)])
    assert 3 < len(cut) - result.end["turn"].usage.cached_tokens <= 3 + 32
    shortened = text[:before] + answer[40:]
    result = run(engine, [assignment("turn", tuple(shortened), SamplingParams(temperature=0), 2, ignore_eos=True)])
    assert len(shortened) - result.end["turn"].usage.cached_tokens <= len(answer[40:]) + PAGE_SIZE     # the end of the prompt before is kept


def test_owners_who_share_no_pages_share_no_states(made):
    folder, cases = made
    engine = make_engine(folder, num_pages=100, prefill_chunk=64, max_batch=2)
    [work] = works_of(cases[:1])
    for owner, cached in (("alice", 0), ("bob", 0), ("alice", 192)):
        own = replace(work, params=replace(work.params, owner=owner))
        assert check(engine, cases[:1], [own]) == {"case 0": cached}


@pytest.mark.parametrize("kib, pages, running, snapshots", [(1024, 96, 64, 96), (100, 9, 12, 9), (48, 4, 8, 5)])
def test_states_take_their_parts_of_the_kv_cache(made, kib, pages, running, snapshots):
    """States and snapshots take their parts of the KV cache."""
    if "lfm2" not in made[0].name or "moe" in made[0].name:
        pytest.skip("the numbers are LFM2's")
    settings = Settings(model=str(made[0]), dtype="float32", kv_cache_memory=kib << 10)
    _, engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))
    states = engine.pool.states
    assert (engine.pool.num_pages, engine.limits.max_batch, states.most_snapshots) == (pages, running, min(snapshots, pages))
    assert states.num_slots == running + FREE_ROWS + states.most_snapshots
    allocated = sum(tensor.nbytes for layer in engine.transformer.states for tensor in layer)
    assert allocated == states.num_slots * engine.transformer.model.state_bytes
    found = Gauges(engine).read()
    assert (found["states_total"], found["states_used"], found["state_bytes"]) == (states.num_slots, 0, 2048)


@pytest.mark.skipif(decode_core() is None, reason="only decode_core quantizes")
def test_quantize_packs_layers_with_states(made):
    """`--quantize` packs the matrices of layers that keep states, and leaves their taps."""
    settings = Settings(model=str(made[0]), quantize="q8_0", kv_cache_memory=1 << 20)
    _, engine = build_engine(resolve_model(settings), settings, torch.device("cpu"))
    weights = engine.transformer.weights
    names = {f"0.{name}" for name in ("mix_in", "mix_out", "gate_up", "expert_gate_up")} & {*weights}
    assert len(names) == 3 and {weights[name].kind for name in names} == {"q8_0"} and weights["0.taps"].dtype == "float32"
    works = [assignment(name, tuple(range(50)), SamplingParams(temperature=0), 30, ignore_eos=True) for name in ("first", "from a snapshot")]
    first, again = (tokens_of(engine, [work])[work.id] for work in works)
    assert first == again and len(first) == 30


# --- the ops -----------------------------------------------------------------------------------------------------


def test_a_delta_rule_is_its_formula_however_cut():
    """A delta rule computes its formula, however its tokens are cut."""
    dice = torch.Generator().manual_seed(2)
    mixer, T = DeltaRule(4, 2, 4, 8, 6), 23
    normal = lambda *shape: torch.randn(*shape, generator=dice)       # noqa: E731
    weights = {"taps": normal(mixer.parts[0] * 4), "decay": -normal(4).exp(), "dt_bias": normal(4), "mix_norm": normal(6)}
    x, whole = normal(T, sum(mixer.parts)), torch.empty(T, mixer.parts[1])
    states = [normal(3, *shape) for shape in mixer.states(0)]         # what is in a slot before the first token counts for nothing
    delta_rule_reference(x, weights, mixer, 1e-6, states, Sequences([0, T], [0], [2], [(9, 1), (T - 1, 2)]), whole)
    check_cuts(delta_rule_reference, x, weights, mixer, states, whole)
    S, o = torch.zeros(4, 8, 6), []                                   # and the values of its formula
    p, z, b, a = x.double().split(mixer.parts, 1)
    taps = weights["taps"].double().view(4, -1)
    for t in range(T):
        u = torch.nn.functional.silu(sum(taps[j] * p[t - 3 + j] for j in range(4) if t - 3 + j >= 0))
        q, k, v = u[:16].view(2, 8), u[16:32].view(2, 8), u[32:].view(4, 6)
        q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
        for h in range(4):
            gate = (weights["decay"][h].double() * torch.nn.functional.softplus(a[t, h] + weights["dt_bias"][h])).exp()
            decayed = gate * S[h].double()
            S[h] = decayed + torch.outer(k[h // 2], torch.sigmoid(b[t, h]) * (v[h] - decayed.T @ k[h // 2]))
        o.append(torch.stack([S[h].double().T @ q[h // 2] / 8**0.5 for h in range(4)]))
    o = torch.stack(o)
    expected = weights["mix_norm"] * o / (o.square().mean(-1, keepdim=True) + 1e-6).sqrt() * torch.nn.functional.silu(z.view(T, 4, 6))
    torch.testing.assert_close(whole, expected.flatten(1).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mixer, op", [(DeltaRule(4, 2, 4, 8, 6), delta_rule_reference), (Mamba2(3, 4, 5, 6, groups=2), mamba2_reference)])
def test_many_sequences_give_what_each_alone_gives(mixer, op):
    """Rows of as many sequences give what each alone gives, and padding writes nothing."""
    dice = torch.Generator().manual_seed(6)
    normal = lambda *shape: torch.randn(*shape, generator=dice)       # noqa: E731
    weights = {name: normal(*tensor.shape) for name, tensor in mixer.tensors(8).items()}
    x, slots = normal(5, mixer.widths(8)[0]), torch.tensor([[3, 3], [-1, 0], [1, 5], [-1, -1], [2, 2]])
    states = [normal(6, *shape) for shape in mixer.states(8)]
    alone, expected = [state.clone() for state in states], torch.empty(5, mixer.widths(8)[1])
    for row, (read, write) in enumerate(slots.tolist()):
        op(x[row:row + 1], weights, mixer, 1e-6, alone, Sequences([0, 1], [int(read >= 0)], [max(read, 0)], [(0, write)] if write >= 0 else []),
           expected[row:row + 1])
    out = torch.empty_like(expected)
    op(x, weights, mixer, 1e-6, states, OneEach(*slots.T), out)
    for one, other in ((out, expected), *zip(states, alone)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    before = [state.clone() for state in states]
    op(x, weights, mixer, 1e-6, states, OneEach(slots[:, 0], torch.full((5,), -1)), out)        # a step that is padding
    assert all(torch.equal(one, other) for one, other in zip(states, before))


def check_cuts(op, x, weights, mixer, states, whole):
    """That pieces of a sequence give what it gave at once, with its states after 10 tokens and all in the slots 1 and 2."""
    T, pieces, now = len(x), torch.empty_like(whole), [torch.full_like(state, 3.0) for state in states]
    for begin, end, slots in ((0, 4, (0, 0)), (4, 5, (0, 1)), (5, 10, (1, 1)), (10, T, (1, 2))):
        op(x[begin:end], weights, mixer, 1e-6, now, Sequences([0, end - begin], [begin], [slots[0]], [(end - begin - 1, slots[1])]), pieces[begin:end])
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    for one, other in ((pieces, whole), (states[0][1:], now[0][1:]), (states[1][1:], now[1][1:])):
        close(one, other)


@pytest.mark.parametrize("taps_bias", [True, False])
def test_a_mamba_layer_is_its_formula_however_cut(taps_bias):
    """A Mamba layer computes its formula, however its tokens are cut."""
    dice = torch.Generator().manual_seed(4)
    mixer, T = Mamba2(3, 4, 5, 6, groups=2, taps_bias=taps_bias), 23
    normal = lambda *shape: torch.randn(*shape, generator=dice)       # noqa: E731
    inner, channels, H = mixer.parts
    weights = {"taps": normal(channels * 3), "decay": -normal(H).exp(), "dt_bias": normal(H), "skip": normal(H), "mix_norm": normal(inner)}
    weights |= {"taps_bias": normal(channels)} if taps_bias else {}
    x, whole = normal(T, sum(mixer.parts)), torch.empty(T, inner)
    states = [normal(3, *shape) for shape in mixer.states(0)]
    mamba2_reference(x, weights, mixer, 1e-6, states, Sequences([0, T], [0], [2], [(9, 1), (T - 1, 2)]), whole)
    check_cuts(mamba2_reference, x, weights, mixer, states, whole)
    S, (z, p, dt), taps = torch.zeros(H, 5, 6).double(), x.double().split(mixer.parts, 1), weights["taps"].double().view(3, -1)
    for t in range(T):
        u = sum(taps[j] * p[t - 2 + j] for j in range(3) if t - 2 + j >= 0) + (weights["taps_bias"] if taps_bias else 0)
        v, B, C = torch.nn.functional.silu(u).split((inner, 12, 12))
        step, y = torch.nn.functional.softplus(dt[t] + weights["dt_bias"]), []
        for h in range(H):
            own, group = v[5 * h:5 * h + 5], slice(6 * (h // 2), 6 * (h // 2) + 6)
            S[h] = (step[h] * weights["decay"][h]).exp() * S[h] + torch.outer(step[h] * own, B[group])
            y.append(S[h] @ C[group] + weights["skip"][h] * own)
        gated = (torch.cat(y) * torch.nn.functional.silu(z[t])).view(2, -1)
        expected = weights["mix_norm"] * (gated / (gated.square().mean(-1, keepdim=True) + 1e-6).sqrt()).flatten()
        torch.testing.assert_close(whole[t], expected.float(), rtol=1e-4, atol=1e-5)


# --- the pool ----------------------------------------------------------------------------------------------------


def test_the_end_of_a_prompt_is_evicted_last():
    """The end of a conversation's prompt is evicted last."""
    pool = StatePool(8, 3)
    for serial, before in ((1, None), (2, ""), (3, None)):
        pool.keep(serial, slot := pool.allocate(), before)
        pool.release(slot)
    pool.keep(4, slot := pool.allocate(), 2)        # the conversation of 2 goes on: now 2 is as any other
    assert [*pool.passed] == [3, 2] and [*pool.ends] == [4] and 1 not in pool
    pool.release(pool.share(3))
    pool.keep(5, slot, "")
    pool.keep(6, slot, "")
    assert [*pool.passed] == [] and [*pool.ends] == [4, 5, 6]
    pool.keep(7, slot, None)
    assert [*pool.ends] == [5, 6] and [*pool.passed] == [7]
    pool.keep(7, slot, "")                          # what was passed may be the end of another prompt
    assert [*pool.ends] == [5, 6, 7]


def test_a_needed_slot_is_an_unread_snapshot_s():
    """A slot that is needed is a snapshot's, unless a sequence reads it."""
    pool = StatePool(2, 2)
    for serial in (1, 2):
        pool.keep(serial, slot := pool.allocate(), None)
        pool.release(slot)
    shared = pool.share(2)
    assert pool.allocate(evict=False) is None
    assert pool.allocate() is not None and pool.allocate() is None and pool.snapshots == 0
    pool.release(shared)
    assert pool.allocate() == shared


def sequence(name, tokens, limit=700):
    return Sequence(assignment(name, tuple(tokens), SamplingParams(), 1000), list(tokens), limit)


def test_drafts_take_slots_of_which_one_is_kept():
    states = StatePool(6, 0)
    scheduler = Scheduler(PagePool(20, states=states), StepLimits(2, 64, max_rows=2))
    one = sequence("one", range(30))
    scheduler.queue.add(one)

    def step(*accepted):
        [chunk] = scheduler.schedule()
        scheduler.queue.advance(chunk)
        for _ in accepted:
            one.tokens.append(1)
            scheduler.queue.advance(chunk._replace(count=1))
        one.tokens.append(1)
        assert queue_faults(scheduler.queue) == []
        return chunk

    assert step().writes == ((29, one.states.slots[30]),)
    one.draft = Draft("lookup", (1, 2, 3, 4, 5, 6, 7))
    chunk = step(1, 2)                              # six slots: its own and five for drafts
    assert len(chunk.draft) == 5 and chunk.draws == 6 and len(chunk.writes) == 6
    one.draft = NO_DRAFT
    following = step()
    assert following.reads == chunk.writes[2][1] and len(states.free) == 5
