"""Steps on CUDA: graphs of decode steps, prompts between them, tokens that stay on the device; and the ops of cuda_backend.

On a GPU if there is one, and everywhere in the emulation (tests/support/cuda_backends.py). The results must
be those of the reference engine on the CPU.
"""

import base64
import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from chatlm.common.errors import ConfigError
from chatlm.common.messages.requests import SamplingParams
from chatlm.common.text.grammar import json_grammar
from chatlm.common.text.load import open_tokenizer
from chatlm.worker.arrays.kinds import AdapterMatrix
from chatlm.worker.arrays.rotary import Rope
from chatlm.worker.engine.drafts import Draft
from chatlm.worker.engine.kvcache import PagePool
from chatlm.worker.engine.limits import FREE_ROWS, StepLimits
from chatlm.worker.engine.scheduler import Scheduler
from chatlm.worker.engine.sequence import Sequence
from chatlm.worker.engine.warm_up import WarmUp
from chatlm.worker.model.batch import Batch
from chatlm.worker.model.blocks.attention import Attention
from chatlm.worker.model.blocks.experts import Experts, Router
from chatlm.worker.model.blocks.feed_forward import FeedForward
from chatlm.worker.model.blocks.layer import Layer
from chatlm.worker.model.blocks.mixers import DeltaRule, Mamba2, ShortConv
from chatlm.worker.model.blocks.norms import RmsNorm
from chatlm.worker.kernels.choosing import load_kernels
from chatlm.worker.model.pages import KvType
from chatlm.worker.model.transformer import Transformer
from chatlm.worker.ops.attention import attend_prompt
from chatlm.worker.ops.rows import SampleRow
from chatlm.worker.ops.sampling import sample_reference
from flat_models import ModelSpec
from engines import draft_eagerly, load, make_batch, pieces, run, tensors_of
from generations import GENERATIONS
from nightly import WHOLE, by_day
from random_rows import random_logits, random_rows
from works import assignment, changed

backends = pytest.importorskip("cuda_backends", exc_type=ImportError, reason="the compiled core is not installed")
compiled = backends.compiled
from chatlm.worker.kernels import compiled, cuda_backend, cuda_prompts, cuda_runner, devices, proof  # noqa: E402
from chatlm.worker.kernels.proof import prove_prompts  # noqa: E402
from attention_kinds import blocks_of
from cuda_engines import MARGIN, answers, cuda_engine, decode_batch, engine_on, logits_of, same_answers, some_works  # noqa: E402


@pytest.fixture(params=["emulation", "gpu"])
def backend(request, monkeypatch):
    if request.param == "gpu":
        if not backends.has_gpu():
            pytest.skip("no GPU here, or decode_core was compiled without CUDA")
        return backends.Gpu()
    # the same token, and the emulation is faster
    monkeypatch.setattr(compiled.cuda, "SAMPLE_THREADS", 32)
    return backends.Emulated(request.getfixturevalue("emulation_library"))


@functools.cache
def llama_like(head_size=16):
    """A small random model with every feature of llama files, and the tokenizer of a nanochat fixture."""
    spec = ModelSpec(vocab_size=284, layers=2, width=48, heads=6, kv_heads=2, head_size=head_size, ffn_size=64, max_positions=512,
                     qkv_bias=True, tied_head=True, rope_size=8, qk_norm="before_rope", qk_norm_weights=True)
    random = torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=random) * (0.15 if len(shape) > 1 else 1.0)
               for name, shape in blocks_of(spec).shapes().items()}
    return spec, tensors


NORM = RmsNorm(1e-5)
EXPERTS = Experts(6, 32, Router(2, "sigmoid", sum_to_one=False, correction_bias=True, groups=(3, 2), scale=2.5), "relu2", latent=16,
                  shared=FeedForward(64, "relu2", prefix="shared_"))
HYBRIDS = {
    "short convolutions": dict(mixers=(ShortConv(3), None, ShortConv(4, bias=True)), experts=6, experts_per_token=2, ffn_size=32, dense_layers=(0,),
                               dense_size=64, sigmoid_router=True, correction_bias=True, qk_norm="before_rope", qk_norm_weights=True),
    "delta rules": dict(mixers=(DeltaRule(4, 2, 4, 16, 24, alternating=True), None, DeltaRule(3, 2, 4, 16, 24, gates_by_key=True, heads_by_key=True)),
                        output_gate=True, experts=6, experts_per_token=2, ffn_size=32, shared_size=64, shared_gate=True, rope_size=8),
    "one part each": dict(own_layers=(
        Layer(Mamba2(4, 6, 10, 8), None, attention_norm=NORM), Layer(None, EXPERTS, ffn_norm=NORM),
        Layer(Attention(6, 2, 16, 16, Rope(0)), FeedForward(64, "relu2"), attention_norm=NORM, ffn_norm=NORM))),
    "mamba": dict(mixers=(Mamba2(4, 6, 10, 8), Mamba2(3, 4, 16, 8, groups=2, taps_bias=False), None), rope_size=0)}


@functools.cache
def hybrid(name):
    """A small random model most of whose layers keep states, of widths that decode_core's CPU ops do not take."""
    spec = ModelSpec(**dict(vocab_size=284, layers=3, width=48, heads=6, kv_heads=2, head_size=16, ffn_size=64, max_positions=512) | HYBRIDS[name])
    random = torch.Generator().manual_seed(4)
    tensors = {key: torch.randn(shape, generator=random) * (0.15 if len(shape) > 1 else 1.0) for key, shape in blocks_of(spec).shapes().items()}
    return spec, {key: -tensor.exp() if key.endswith("decay") else tensor for key, tensor in tensors.items()}


def some_model(name, fixtures):
    """(spec, tensors, tokenizer) of a nanochat fixture, of the llama-like model or of a hybrid."""
    made = llama_like() if name == "llama" else hybrid(name) if name in HYBRIDS else None
    fixture = load(fixtures / ("gen5" if made else name))
    spec, tensors = made or (fixture.architecture, tensors_of(fixture))
    return spec, dict(tensors), open_tokenizer(fixture.text)


# --- whole answers -----------------------------------------------------------------------------------------------


def adapted(engine, spec):
    """Two adapters of the llama-like model in an engine: of rank 3 on all of both layers, and of rank 1 on the second's `down`."""
    random = torch.Generator().manual_seed(8)
    shapes = {name: shape for name, shape in blocks_of(spec).shapes().items() if name.rpartition(".")[2] in ("qkv", "output", "gate_up", "down")}
    for slot, (rank, names) in enumerate([(3, shapes), (1, ["1.down"])], 1):
        matrices = {name: AdapterMatrix(*(0.2 * torch.randn(size, generator=random) for size in ((rank, shapes[name][1]), (shapes[name][0], rank))),
                                        torch.full((rank,), 1.5)) for name in names}
        engine.adapters.slots[f"a{slot}"], engine.adapters.digests[slot], engine.adapters.sizes[slot], engine.adapters.last = slot, "", 1, slot
        engine.transformer.adapters[slot] = engine.kernels.backend.pack_adapter(matrices, engine.transformer.device)
    return engine


def test_adapters_answer_as_on_the_reference_engine(backend, nanochat_fixtures, monkeypatch):
    """In the same steps, drafted too; steps without adapters are graphs as before."""
    model = some_model("llama", nanochat_fixtures)
    plain_works = some_works(model[0].vocab_size, 5, 8)
    works = [changed(work, adapter=("a1", "", "a2")[index % 3]) for index, work in enumerate(plain_works)]
    expected = run(adapted(engine_on(load_kernels("cpu"), model), model[0]), works)
    plain = run(engine_on(load_kernels("cpu"), model), plain_works)
    alike = {name for name in plain.tokens if expected.tokens[name] == plain.tokens[name]}
    assert {work.id for work in works if not work.params.adapter} <= alike < {*plain.tokens}
    engine = adapted(cuda_engine(backend, model, monkeypatch), model[0])
    same_answers(expected, answers(engine, works, [0, 2, 2, 5, 9]))
    same_answers(expected, answers(engine, works[1:2]))
    assert engine.runner.queue.replays > 20 and any(engine.runner.adapted.values())


@torch.inference_mode()
def test_graphs_with_adapters_have_each_row_s_bits(nanochat_fixtures, emulation_library, monkeypatch):
    """Adapters may come and go: the graphs stay. Where the kernels cannot, torch adds the same."""
    model = some_model("llama", nanochat_fixtures)
    engine = adapted(cuda_engine(backends.Emulated(emulation_library, products=True), model, monkeypatch, max_batch=2, max_rows=2, context_length=64), model[0])
    steps, adapters, by_op = engine.runner, engine.transformer.adapters, []
    with monkeypatch.context() as patch:
        patch.setattr(steps, "_run_ops", lambda *rest, **more: by_op.append(1))
        together, plain = logits_of(steps, [0, 1], adapters=[1, 0]), logits_of(steps, [1])
        assert torch.equal(together, torch.cat([logits_of(steps, [0], adapters=[1]), plain]))
        adapters[3] = adapters.pop(1)
        graphs = dict(steps.adapted)
        assert torch.equal(logits_of(steps, [0, 1], adapters=[3, 1]), together) and steps.adapted == graphs     # slot 1 has gone
        assert torch.equal(logits_of(steps, [1], adapters=[1]), plain) and (logits_of(steps, [1], adapters=[3]) - plain).abs().max() > 0.1
        assert not by_op
    adapters[3].table = None                            # of too many ranks
    by_torch = logits_of(steps, [0, 1], adapters=[3, 0])
    assert 0 < (by_torch - together).abs().max() < 1e-4 * together.abs().max()
    adapters[1] = adapters.pop(3)                       # where the engine counts it


@torch.inference_mode()
def test_an_adapter_graph_is_captured_once_or_never(
        nanochat_fixtures, emulation_library, monkeypatch, caplog):
    """A graph that cannot be captured is tried once, and its steps run op by op."""
    model, tries = some_model("llama", nanochat_fixtures), []
    engine = adapted(cuda_engine(backends.Emulated(emulation_library), model, monkeypatch, max_batch=3), model[0])
    monkeypatch.setattr(engine.runner.queue, "capture", lambda work: tries.append(1) or 1 / 0)
    drawn = [engine.runner.finish(engine.runner.start(decode_batch([-1] * 3, [5, 6, 7], [1] * 3, [[3], [9], [7]])._replace(adapters=[1, 0, 2]),
                                                    sampled_rows([1] * 3))) for _ in range(2)]
    assert tries == [1] and drawn[0] == drawn[1]
    assert "the CUDA graph of 3 rows with adapters cannot be captured (ZeroDivisionError: division by zero); its steps run op by op" in caplog.text


@torch.inference_mode()
def test_graphs_over_packed_pages_have_a_row_s_bits(nanochat_fixtures, emulation_library, monkeypatch):
    """Rows over packed pages are graphs with the bits that each has alone."""
    spec, tensors = llama_like(32)
    model = spec, dict(tensors), some_model("llama", nanochat_fixtures)[2]
    options = dict(max_batch=2, max_rows=2, context_length=64, kv=KvType("float32", packed=True))
    steps = cuda_engine(backends.Emulated(emulation_library, products=True), model, monkeypatch, **options).runner
    reference = engine_on(load_kernels("cpu"), (spec, dict(tensors), model[2]), **options).runner
    for length in (1, 2):
        together, want = logits_of(steps, [0, 1], length), logits_of(reference, [0, 1], length)
        assert (together - want).norm() < 5e-3 * want.norm()
    assert torch.equal(logits_of(steps, [1], length), together[1:]) and steps.queue.replays == 3


@pytest.mark.parametrize("name", by_day(["gen1", "gen3", "gen5", "llama"], "llama"))
def test_coming_and_going_answers_match_references(backend, name, nanochat_fixtures, monkeypatch):
    """Seven sequences for six rows; prompts of several chunks arrive between decode steps that are started
    ahead."""
    model = some_model(name, nanochat_fixtures)
    works = some_works(model[0].vocab_size, tokens=24 if WHOLE else 10)
    expected = run(engine_on(load_kernels("cpu"), model), works)
    engine = cuda_engine(backend, model, monkeypatch)
    same_answers(expected, answers(engine, works, [0, 2, 2, 5, 9, 9, 14]))
    assert engine.runner.queue.replays > 30


@pytest.mark.parametrize("name", by_day(HYBRIDS, "mamba"))
def test_layers_with_states_answer_as_the_reference(backend, name, nanochat_fixtures, monkeypatch):
    """Decode steps are graphs, whose padding changes no state; the second time answers begin from snapshots."""
    model = some_model(name, nanochat_fixtures)
    works = some_works(model[0].vocab_size, 4, 9)
    expected, engine = run(engine_on(load_kernels("cpu"), model), works), cuda_engine(backend, model, monkeypatch, max_batch=3)
    same_answers(expected, answers(engine, works, [0, 2, 2, 5]))
    assert engine.runner.queue.replays > 20 and engine.pool.states.snapshots and not engine.drafts
    same_answers(expected, answers(engine, works))


@torch.inference_mode()
def test_padding_changes_no_state(backend, nanochat_fixtures, monkeypatch):
    """Padding changes no state, and a first token finds none."""
    steps = steps_on(backend, some_model("mamba", nanochat_fixtures), monkeypatch, max_rows=6)
    states = [state for layer in steps.transformer.states for state in layer]
    drawn = []
    for garbage in (0.0, 7.0):
        for state in states:
            state.fill_(garbage)
        batch = decode_batch([-1] * 3, [5, 6, 7], [1] * 3, [[3], [9], [7]])
        batch = batch._replace(state_reads=[1, 0, 4], write_rows=[0, 1, 2], write_slots=[1, 6, 4])
        drawn.append(steps.finish(steps.start(batch, sampled_rows([1] * 3))))
        assert all((state != garbage).flatten(1).any(1).nonzero().flatten().tolist() == [1, 4, 6] for state in states)
    assert drawn[0] == drawn[1]


@pytest.mark.slow
def test_nanochat_s_greedy_answers_are_upstream_s(backend, nanochat_fixtures, monkeypatch):
    """The greedy answers of every nanochat generation are upstream's."""
    for generation in GENERATIONS:
        folder = nanochat_fixtures / generation
        cases = json.loads((folder / "oracle.json").read_text())["cases"][:2]
        engine = cuda_engine(backend, some_model(generation, nanochat_fixtures), monkeypatch, max_batch=2)
        works = [assignment(f"c{i}", tuple(case["prompt_ids"]), SamplingParams(temperature=0.0), 24, ignore_eos=True)
                 for i, case in enumerate(cases)]
        assert list(answers(engine, works).values()) == [case["greedy"][:24] for case in cases]


@pytest.mark.slow
def test_graphs_give_what_single_ops_give(backend, nanochat_fixtures, monkeypatch):
    model = some_model("gen5", nanochat_fixtures)
    works = some_works(model[0].vocab_size, 5, 12)
    op_by_op = cuda_engine(backend, model, monkeypatch, prepare=False)
    graphs = cuda_engine(backend, model, monkeypatch)
    expected = answers(op_by_op, works)
    assert op_by_op.runner.queue.replays == 0
    # cuBLAS may choose its kernel by the number of rows, which padding changes
    if backend.name == "emulation":
        assert answers(graphs, works) == expected
    assert graphs.runner.queue.replays > 0 or backend.name == "gpu"


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("gen1", marks=pytest.mark.slow), pytest.param("gen4", marks=pytest.mark.slow), "llama"])
def test_drafts_change_no_token(backend, name, nanochat_fixtures, monkeypatch, request):
    """Prompts that repeat themselves; steps of up to 8 rows are graphs, drafts among them, and none runs together with a prompt."""
    draft_eagerly(monkeypatch)
    if backend.name == "emulation":
        backend = backends.Emulated(request.getfixturevalue("emulation_library"), products=True)
    model, tokens, rng = some_model(name, nanochat_fixtures), {}, np.random.default_rng(2)
    works = [assignment(f"w{i}", tuple(rng.integers(0, 200, 9).tolist() * (4 + i)), SamplingParams(seed=i, **params), 28, ignore_eos=True)
             for i, params in enumerate((dict(temperature=0.0), dict(temperature=0.3), dict(temperature=0.7, repetition_penalty=1.1)))]
    for drafts in (False, True):
        engine = cuda_engine(backend, model, monkeypatch, max_batch=8)
        assert engine.drafts and not engine.kernels.row_invariant
        engine.drafts, start, by_op = drafts, engine.runner._run_ops, []
        engine.runner._run_ops = lambda batches, *rest, **more: by_op.append(len(batches[0].token_ids)) or start(batches, *rest, **more)
        tokens[drafts] = answers(engine, works, [0, 0, 12])
        assert min(by_op) > 8 and (engine.drafting.drafted.total > 5) is drafts
    assert tokens[True] == tokens[False] and engine.drafting.accepted.total > 0


def test_drafts_wait_for_prompts_if_few_rows_are_alike(nanochat_fixtures, monkeypatch):
    """And there are none where a row's bits may depend on the others."""
    assert FREE_ROWS <= compiled.cuda.MAX_PRODUCT_ROWS
    drafted = {}
    for mixes in (True, False):
        scheduler = Scheduler(PagePool(40), StepLimits(4, 16, max_rows=4, exact_rows=mixes))
        for i, length in enumerate((4, 40)):
            scheduler.queue.add(Sequence(assignment(str(i), tuple(range(length)), SamplingParams(), 30), [*range(length)], 70))
        scheduler.schedule()
        scheduler.queue.running[0].computed, scheduler.queue.running[0].draft = 3, Draft("lookup", (1, 2))
        drafted[mixes] = [chunk.draft for chunk in scheduler.schedule()]
    assert drafted == {True: [(1, 2), ()], False: [(), ()]}
    gen5 = load(nanochat_fixtures / "gen5").architecture                # torch multiplies the smear's gate
    llama, gen1 = llama_like()[0], load(nanochat_fixtures / "gen1").architecture
    for spec, able, older in ((llama, True, True), (gen5, False, False), (replace(llama, experts=4, experts_per_token=2), False, False),
                              (gen1, True, False), (replace(llama, post_norms=True), True, False)):
        backend = backends.CudaBackend(blocks_of(spec), None, device="cpu")
        for norms, expected in ((False, older), (True, able)):          # an RMS norm alone is torch's; see NORMS_ROW_BY_ROW
            monkeypatch.setattr(cuda_backend, "NORMS_ROW_BY_ROW", norms)
            assert backend.few_rows_invariant is expected
        for op in ("linear", "rope_append", "paged_attention", "sample"):
            backend.faults = {op: "differs"}
            assert not backend.few_rows_invariant


@pytest.mark.slow
def test_penalties_and_biases_apply_on_the_device(backend, nanochat_fixtures, monkeypatch):
    """Penalties count all tokens, so the engine waits for each. Their lists are tensors of the graph, or too
    large for it."""
    model = some_model("gen3", nanochat_fixtures)
    given = [dict(presence_penalty=1.0, frequency_penalty=0.5, repetition_penalty=1.2, logit_bias=((7, 5.0), (9, -100.0))),
             dict(temperature=0.0, repetition_penalty=1.5), dict(temperature=1.0), dict(logit_bias=((3, 2.0), (3, 1.0)))]
    works = [assignment(f"w{i}", tuple(range(30 + i, 60)), SamplingParams(**(dict(seed=i) | params)), 20, ignore_eos=True)
             for i, params in enumerate(given)]
    expected = run(engine_on(load_kernels("cpu"), model), works)
    engine = cuda_engine(backend, model, monkeypatch)
    same_answers(expected, answers(engine, works))
    replays = engine.runner.queue.replays
    assert replays >= 19
    # and larger than the memory reserved for a step
    monkeypatch.setattr(cuda_runner, "LIST_CAPACITY", 20)
    tight = cuda_engine(backend, model, monkeypatch, prefill_chunk=4, context_length=64, max_batch=4)
    same_answers(expected, answers(tight, works))
    assert tight.runner.queue.replays == 0


def test_steps_for_logits_replay_drawless_graphs(backend, nanochat_fixtures, monkeypatch):
    """Log-probabilities, with penalties too, and a grammar next to an answer that needs none of these: only prompts run op by op."""
    model = some_model("gen5", nanochat_fixtures)
    schema = json_grammar({"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}, "response_format")
    works = [assignment("looked at", tuple(range(20, 60)), SamplingParams(0.9, seed=1, repetition_penalty=1.3), 14, ignore_eos=True, logprobs=3),
             assignment("plain", tuple(range(5, 30)), SamplingParams(0.8, seed=2), 20, ignore_eos=True),
             assignment("bound", tuple(range(7, 19)), SamplingParams(1.0, seed=3), 12, grammar=schema)]
    reference, engine = engine_on(load_kernels("cpu"), model), cuda_engine(backend, model, monkeypatch, max_batch=3, max_rows=4)
    by_op, forward = [], engine.transformer.forward
    engine.transformer.forward = lambda batch: by_op.append(len(batch.token_ids) > len(batch.logit_rows)) or forward(batch)
    got, want = pieces(engine, works), pieces(reference, works)
    found, expected = ({name: [token for piece in its for token in piece.tokens] for name, its in answer.items()} for answer in (got, want))
    # "plain" draws its first two tokens in steps with prompts; the other 18 steps replay
    assert found == expected and by_op and all(by_op) and engine.runner.queue.replays >= 18
    for ours, theirs in zip(got["looked at"], want["looked at"], strict=True):
        for one, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert one.token == other.token and one.logprob == pytest.approx(other.logprob, abs=MARGIN)


@pytest.mark.slow
def test_embeddings_beside_answers_match_references(backend, nanochat_fixtures, monkeypatch):
    """Embeddings among answers are those of the reference engine."""
    for name in ("gen5", "llama"):
        model = some_model(name, nanochat_fixtures)
        works = [*some_works(model[0].vocab_size, 3, 8), *(
            assignment(pooling, tuple(range(1, 150)), SamplingParams(), 0, pooling=pooling) for pooling in ("mean", "last"))]
        expected, engine = engine_on(load_kernels("cpu"), model), cuda_engine(backend, model, monkeypatch)
        found = [pieces(each, works) for each in (expected, engine)]
        for pooling in ("mean", "last"):
            ours, theirs = (np.frombuffer(base64.b64decode(each[pooling].others[0].vector), "<f4") for each in found)
            assert np.abs(ours - theirs).max() < 1e-4 and np.linalg.norm(ours) == pytest.approx(1)


def test_ended_answers_leave_nothing_behind(backend, nanochat_fixtures, monkeypatch):
    """Forced tokens and answers that end while the next step runs leave nothing behind."""
    model = some_model("gen5", nanochat_fixtures)
    works = [changed(work, ignore_eos=False, max_tokens=n, stop_token_ids=(100, 101, 102, 103, 104))
             for work, n in zip(some_works(model[0].vocab_size), (1, 2, 16, 1, 16, 3, 16))]
    expected = run(engine_on(load_kernels("cpu"), model), works)
    engine = cuda_engine(backend, model, monkeypatch)
    same_answers(expected, answers(engine, works, [0, 0, 1, 1, 2, 8, 8]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gen5", "delta rules"])
def test_preempted_sequences_are_computed_again(backend, name, nanochat_fixtures, monkeypatch):
    model = some_model(name, nanochat_fixtures)
    works = [assignment(f"w{i}", tuple(range(40 * i % 200 + 1, 40 * i % 200 + 21)), SamplingParams(temperature=0.9, seed=i), 40,
                  ignore_eos=True) for i in range(5)]
    expected = run(engine_on(load_kernels("cpu"), model), works)
    engine = cuda_engine(backend, model, monkeypatch, num_pages=12, context_length=192)
    same_answers(expected, answers(engine, works))
    assert engine.queue.preemptions > 0


def test_a_given_up_step_does_not_stop_the_next(backend, nanochat_fixtures, monkeypatch):
    model = some_model("gen5", nanochat_fixtures)
    engine = cuda_engine(backend, model, monkeypatch, max_batch=2, max_rows=2)
    works = some_works(model[0].vocab_size, 3, 8)
    with torch.inference_mode():
        for _ in range(3):
            engine.add(works[0])
            for _ in range(4):
                engine.step()
            assert engine.give_up() == [works[0].id]
    expected = run(engine_on(load_kernels("cpu"), model), works)
    same_answers(expected, answers(engine, works))


def test_only_steps_of_few_tokens_become_decode_rows(emulation_library, nanochat_fixtures, monkeypatch):
    """A prompt whose every token's logits are asked for is a prompt, also where a batch may have as many rows."""
    backend = backends.Emulated(emulation_library, products=True)
    steps = steps_on(backend, some_model("llama", nanochat_fixtures), monkeypatch, max_batch=16, prepare=False)
    for count, rows in ((2, 2), (8, 8), (9, 1), (16, 1)):
        asked = Batch([*range(count)], [-1] * count, [0, count], [count], [[3]], [*range(count)])
        assert len(steps._apart(asked).lengths) == rows


# --- start and finish --------------------------------------------------------------------------------------------


def sampled_rows(lengths):
    return [SampleRow(SamplingParams(temperature=0.9, seed=i), length) for i, length in enumerate(lengths)]


def steps_on(backend, model, monkeypatch, **sizes):
    engine = cuda_engine(backend, model, monkeypatch, **sizes)
    return engine.runner


def test_start_leaves_all_work_to_the_device(backend, nanochat_fixtures, monkeypatch):
    """Start leaves all work to the device, and two steps may wait there."""
    model = some_model("gen5", nanochat_fixtures)
    steps = steps_on(backend, model, monkeypatch, max_batch=3, max_rows=3)
    tables = [[3, 4], [9], [7]]
    drawn = []
    for ahead in (False, True):
        tickets, ids, previous, tokens = [], [5, 6, 7], [-1, -1, -1], []
        for position in range(6):
            tickets.append(steps.start(decode_batch(previous, ids, [position + 1] * 3, tables), sampled_rows([position + 1] * 3)))
            if ahead and backend.name == "emulation":
                assert len(steps.queue.waiting) == min(position + 1, 2)     # nothing has run
            if ahead and position:
                tokens.append(steps.finish(tickets.pop(0)))
            if ahead:
                previous, ids = (tokens[-1] if tokens else [5, 6, 7]), [~0, ~1, ~2]
            else:
                previous, ids = ids, steps.finish(tickets.pop(0))
                tokens.append(ids)
        tokens += [steps.finish(ticket) for ticket in tickets]
        drawn.append(tokens)
    assert drawn[0] == drawn[1] and len(drawn[0]) == 6


def test_rows_may_move_between_steps_begun_ahead(backend, nanochat_fixtures, monkeypatch):
    """Row 2 of a step becomes row 0 of the next, in another graph, and runs together with a prompt in the one after
    that."""
    model = some_model("gen5", nanochat_fixtures)
    results, steps = [], steps_on(backend, model, monkeypatch, max_batch=3, max_rows=3)
    for ahead in (False, True):
        first = steps.start(decode_batch([-1, -1, -1], [5, 6, 7], [1, 1, 1], [[3], [9], [7]]), sampled_rows([1, 1, 1]))
        a = None if ahead else steps.finish(first)
        second = steps.start(decode_batch([7, 5], [~2, ~0] if ahead else [a[2], a[0]], [2, 2], [[7], [3]]), sampled_rows([2, 2]))
        a = steps.finish(first) if ahead else a
        b = None if ahead else steps.finish(second)
        prompt = list(range(20, 40))
        mixed = Batch([~1 if ahead else b[1], *prompt], [a[0], -1, *prompt[:-1]], [0, 1, 21], [3, 20], [[3], [1, 2]], [0, 20])
        third = steps.start(mixed, sampled_rows([3, 20]))
        b = steps.finish(second) if ahead else b
        results.append((a, b, steps.finish(third)))
    assert results[0] == results[1]


class Halfway(backends.HostQueue):
    """A submit that fails after it has queued work, as where the device has no memory left for a step's last ops."""

    fails = False

    def submit(self, work):
        done = super().submit(work)
        if self.fails:
            self.fails = False
            raise RuntimeError("out of memory")
        return done


def test_a_step_failing_halfway_keeps_its_memory(emulation_library, nanochat_fixtures, monkeypatch):
    """A step that fails halfway keeps its memory until its work is done."""
    backend = backends.Emulated(emulation_library)
    backend.queue = Halfway
    steps = steps_on(backend, some_model("gen1", nanochat_fixtures), monkeypatch, max_batch=2)

    def start(page):
        return steps.start(decode_batch([-1], [5], [1], [[page]]), sampled_rows([1]))

    steps.finish(start(3))
    steps.queue.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        start(5)
    behind = start(7)
    assert len(steps.queue.waiting) == 3            # the failed step, what marks its end, and the next
    last = start(9)
    assert len(steps.queue.waiting) == 2            # the failed step's inputs were read before others took their place
    assert steps.finish(behind) == steps.finish(last)
    assert steps.transformer.cache[:, :, 5].any() and not steps.transformer.cache[:, :, 6].any()


def test_padding_draws_nothing_and_stores_nothing(backend, nanochat_fixtures, monkeypatch):
    steps = steps_on(backend, some_model("gen5", nanochat_fixtures), monkeypatch)
    before = steps.transformer.cache.clone()
    ticket = steps.start(decode_batch([-1] * 3, [5, 6, 7], [1] * 3, [[3], [9], [7]]), sampled_rows([1] * 3))
    assert len(steps.finish(ticket)) == 3 and steps.queue.replays == 2       # the model and the draw
    assert steps.tokens.tolist()[:4][3] == -1
    changed = (steps.transformer.cache != before).any(-1).any(3).any(0).any(0)      # (P, PAGE_SIZE)
    assert changed.nonzero().tolist() == [[3, 0], [7, 0], [9, 0]]


def test_the_smallest_fitting_graph_is_replayed(backend, nanochat_fixtures, monkeypatch):
    steps = steps_on(backend, some_model("gen1", nanochat_fixtures), monkeypatch, max_batch=6, num_pages=80)
    most = steps.max_rows               # 6, or 8 where drafts are rows of a step
    assert most in (6, 8) and sorted(steps.graphs) == [(1, 32), (2, 32), (4, 32), (most, 32)]
    assert (cuda_runner.doubling(1, 64, 2), cuda_runner.doubling(64, 600, 4), cuda_runner.doubling(64, 20, 4)) == ([1, 2, 4, 8, 16, 32, 64], [64, 256, 600], [20])
    sampling = SimpleNamespace(count_ids=[], bias_ids=[])
    for rows, expected in ((1, 1), (2, 2), (3, 4), (4, 4), (5, most), (6, most)):
        batch = decode_batch([0] * rows, [0] * rows, [1] * rows, [[0]] * rows)
        assert steps._graph(batch, sampling) is steps.graphs[expected, 32]
    prompt = Batch([1, 2], [-1, 1], [0, 2], [2], [[0]], [1])
    assert steps._graph(prompt, sampling) is None


def test_warming_up_captures_every_graph(backend, nanochat_fixtures, monkeypatch):
    """Warming an engine up captures every graph before any step."""
    engine = cuda_engine(backend, some_model("gen1", nanochat_fixtures), monkeypatch, prepare=False, max_batch=3)
    shares = []
    with torch.inference_mode():
        WarmUp(engine).complete(shares.append)
    assert set(engine.runner.graphs) == {(rows, 32) for rows in cuda_runner.doubling(1, engine.runner.max_rows, 2)}
    assert shares == sorted(shares) and engine.pool.available == engine.pool.num_pages


# --- ops ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", by_day(["gen1", "gen3", "gen5", "llama"], "gen3", "gen5"))
def test_logits_of_all_kinds_match_references(backend, name, nanochat_fixtures):
    """Logits of prompts, chunks and decode rows are those of the references."""
    spec, tensors, _ = some_model(name, nanochat_fixtures)
    rng = np.random.default_rng(1)
    a, b, c = (rng.integers(0, spec.vocab_size, n).tolist() for n in (290, 45, 8))
    pages = rng.permutation(60).tolist()
    pa, pb, pc = pages[:20], pages[20:30], pages[30:31]
    logits = {}
    for kernels, device in ((load_kernels("cpu"), "cpu"), (backend.kernels(spec), backend.device)):
        model = Transformer(blocks_of(spec), {n: t.to(device) for n, t in tensors.items()}, kernels, num_pages=60, max_tokens=400,
                            dtype="float32", device=device)
        steps = [[(a, 0, 100, pa), (b, 0, 44, pb)], [(b, 44, 1, pb), (a, 100, 189, pa), (c, 0, 7, pc)],
                 [(a, 289, 1, pa), (c, 7, 1, pc)]]
        logits[str(device), kernels.backend.name] = [model.forward(make_batch(*step)).cpu().clone() for step in steps]
    reference, fast = logits.values()
    for expected, got in zip(reference, fast):
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_sinks_and_caps_score_little_at_once(backend, monkeypatch):
    """So that a long context needs no memory for all scores of a chunk; beyond a window, and the rows that are left over."""
    spec, tensors = llama_like()
    spec = backends.with_windows(replace(spec, sinks=True, attention_softcap=4.0), (24, 0))
    tensors = tensors | {f"{l}.sinks": torch.linspace(-2, 3, 6) for l in range(2)}
    tokens, logits, most = np.random.default_rng(4).integers(0, spec.vocab_size, 100).tolist(), [], 6 * 100 * 30
    monkeypatch.setattr(cuda_prompts, "SCRATCH", most)
    for kernels, device in ((load_kernels("cpu"), "cpu"), (backend.kernels(spec), backend.device)):
        model = Transformer(blocks_of(spec), {name: t.to(device) for name, t in tensors.items()}, kernels, num_pages=8, max_tokens=100,
                            dtype="float32", device=device)
        if logits:
            attend = cuda_prompts.attend_prompt
            monkeypatch.setattr(cuda_prompts, "attend_prompt",
                                lambda q, k, *rest: sizes.append(len(q) * 6 * k.shape[1]) or attend(q, k, *rest))
        sizes = []
        logits.append([model.forward(make_batch((tokens, first, count, [3, 1, 4, 2, 5, 6, 7]))).cpu().clone() for first, count in ((0, 99), (99, 1))])
    assert max(sizes) <= most and len(sizes) > 4
    for expected, got in zip(*logits):
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


class Memory(TorchDispatchMode):
    """The most bytes that any result of torch's operations holds."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.most = max(self.most, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("softcap, sinks", by_day([(4.0, False), (0.0, True), (4.0, True)], (4.0, True)))
def test_query_heads_share_their_keys_without_a_copy(softcap, sinks):
    """Keys and values for each query head would take gigabytes of a long context, and be written again for each slice."""
    (Hkv, G, t, S, D), random = (2, 8, 3, 1000, 32), torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(shape, generator=random) for shape in ((t, Hkv, G, D), (Hkv, S, D), (Hkv, S, D)))
    mask = torch.zeros(1, 1, t, S).masked_fill_(torch.rand(t, S, generator=random) < 0.3, -torch.inf)
    extra = torch.linspace(-1, 4, Hkv * G).view(Hkv, G) if sinks else None
    with Memory() as memory:
        got = attend_prompt(q, k, v, mask, D**-0.5, softcap, extra)
    assert 4 * Hkv * G * t * S <= memory.most < 4 * Hkv * G * S * D
    scores = torch.einsum("thgd,hsd->hgts", q.double(), k.double()) * D**-0.5
    scores = (softcap * torch.tanh(scores / softcap) if softcap else scores) + mask
    if sinks:
        scores = torch.cat([scores, extra.double()[:, :, None, None].expand(-1, -1, t, 1)], -1)
    expected = torch.einsum("hgts,hsd->thgd", torch.softmax(scores, -1)[..., :S], v.double())
    assert (got - expected).abs().max() < 1e-5


def flash_attention(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """torch's varlen_attn by its documentation, row by row: its kernel needs a GPU. Queries are the last of the keys, and a
    window (n, 0) is the n keys before a query's own, and that."""
    assert (cu_seq_q.tolist(), cu_seq_k.tolist()) == ([0, max_q], [0, max_k]) == ([0, len(q)], [0, len(k)])
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa == (q.shape[1] != k.shape[1]) and window_size[1] == 0
    k, v = (x.float().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    rows = []
    for i, query in enumerate(q.float()):
        last = len(k) - len(q) + i
        first = max(0, last - window_size[0]) if window_size[0] >= 0 else 0
        weights = torch.softmax(scale * (query * k[first:last + 1]).sum(-1), 0)                     # (keys, H)
        rows.append((weights[..., None] * v[first:last + 1]).sum(0))
    return torch.stack(rows).to(q.dtype)


def test_varlen_attn_attends_prompts_if_present(emulation_library, monkeypatch):
    """With the window that flash means; caps and sinks, and what fails its proof, do without."""
    monkeypatch.setattr(proof, "CUDA_PROOFS", {"prompt_attention": prove_prompts})
    spec, calls = backends.with_windows(llama_like()[0], (24, 0)), []
    emulated = backends.Emulated(emulation_library)

    def proved(varlen, **changes):
        backend = emulated.backend(replace(spec, **changes))
        assert backend.prompts.varlen is None           # the device is a CPU
        backend.prompts.varlen = varlen and (lambda *arguments, **more: calls.append(more["window_size"]) or varlen(*arguments, **more))
        backend.ops(0, 0, None)
        return backend

    assert proved(flash_attention).faults == {} and {*calls} == {(23, 0), (-1, 0)}
    calls.clear()
    assert proved(flash_attention, attention_softcap=5.0).faults == proved(None).faults == {} and not calls

    def off_by_one_window(*arguments, window_size, **more):
        return flash_attention(*arguments, window_size=(window_size[0] + (window_size[0] >= 0), 0), **more)

    off_by_one = proved(off_by_one_window)
    assert [*off_by_one.faults] == ["prompt_attention"] and "(bfloat16, window 24)" in off_by_one.faults["prompt_attention"]
    # torch's other fused way is right, and stays
    assert off_by_one.prompts.varlen is None and off_by_one.prompts.fused and prove_prompts(off_by_one, torch.device("cpu")) == ""
    monkeypatch.setattr(cuda_prompts, "causal", lambda rows, keys: None)            # sees the future
    none_right = proved(off_by_one_window)
    assert [*none_right.faults] == ["prompt_attention"] and not (none_right.prompts.varlen or none_right.prompts.fused)
    assert prove_prompts(none_right, torch.device("cpu")) == ""


def test_large_windows_are_proved_too(emulation_library, monkeypatch):
    """Larger than what a proof has keys: an attention that knows no window is found."""
    monkeypatch.setattr(compiled.cuda, "SAMPLE_THREADS", 32)
    spec = backends.with_windows(llama_like()[0], (4096, 0))

    class NoWindow(backends.EmulatedOps):
        def paged_attention(self, *arguments, window, **more):
            super().paged_attention(*arguments, window=0, **more)

    backend = backends.Emulated(emulation_library, NoWindow).backend(spec)
    backend.prompts.varlen = lambda *arguments, window_size, **more: flash_attention(*arguments, window_size=(-1, 0), **more)
    backend.ops(0, 0, None)
    assert {*backend.faults} == {"paged_attention", "prompt_attention"}


def test_flash_is_taken_only_with_all_its_options(monkeypatch):
    """Flash is taken only with all that is asked of it."""
    module = SimpleNamespace(varlen_attn=lambda q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False: None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)       # torch 2.13's
    assert callable(cuda_prompts.flash())
    module = SimpleNamespace(varlen_attn=lambda query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False: None)
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)       # torch 2.9's
    assert cuda_prompts.flash() is None
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)         # older ones have none
    assert cuda_prompts.flash() is None


def test_a_long_prompts_masks_are_bounded(emulation_library, monkeypatch):
    """131,072 keys: a mask of 2,048 rows of them would be 268 million elements."""
    prompt = cuda_prompts.Prompt(slice(0, 2048), None, 0, 129024, 131072)
    backend, made = backends.Emulated(emulation_library).backend(llama_like()[0]), []
    backend.prompts.mask = lambda prompt, some, window, like: made.append(some) or None
    monkeypatch.setattr(cuda_prompts, "attend_prompt", lambda q, k, v, mask, *rest: q)
    q, kv = torch.empty(2048, 6, 16), torch.empty(1).expand(2, 2, 131072, 16)
    backend.prompts.attend(q, kv, prompt, torch.empty(2048, 96), 0, 4.0)
    assert made[0].start == 0 and made[-1].stop == 2048 and all(a.stop == b.start for a, b in zip(made, made[1:]))
    assert max(some.stop - some.start for some in made) * 131072 * 6 <= cuda_prompts.SCRATCH


def test_bfloat16_follows_float32(backend, nanochat_fixtures):
    spec, tensors, _ = some_model("llama", nanochat_fixtures)
    tokens = np.random.default_rng(2).integers(0, spec.vocab_size, 60).tolist()
    rounded = {name: tensor.bfloat16() if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    results = []
    for dtype in ("float32", "bfloat16"):
        model = Transformer(blocks_of(spec), {name: t.to(backend.device, getattr(torch, dtype)) if t.ndim > 1 else t.to(backend.device)
                                   for name, t in rounded.items()},
                            backend.kernels(spec), num_pages=8, max_tokens=64, dtype=dtype, device=backend.device)
        prompt = model.forward(make_batch((tokens, 0, 59, [3, 1, 4, 2])))[0].clone()
        results.append((prompt, model.forward(make_batch((tokens, 59, 1, [3, 1, 4, 2])))[0].clone()))
    for exact, fast in zip(*results):
        assert fast.dtype == torch.float32 and (exact - fast).norm() < 0.03 * exact.norm()


def test_the_device_draws_the_reference_s_tokens(backend):
    """Sampling on the device draws the reference's tokens, and leaves logits alone."""
    rng = np.random.default_rng(8)
    spec = llama_like()[0]
    kernels = backend.kernels(spec)
    for vocabulary, count in ((284, 400), (5003, 60)):
        logits, rows = random_logits(rng, count, vocabulary), random_rows(rng, count, vocabulary)
        tensor = torch.from_numpy(logits.copy()).to(backend.device)
        assert kernels.sample(tensor, rows) == sample_reference(logits, rows).tolist()
        assert tensor.cpu().numpy().tobytes() == logits.tobytes()


# --- the choice --------------------------------------------------------------------------------------------------


def test_load_kernels_takes_cuda_where_models_fit(monkeypatch):
    """load_kernels takes decode_core on CUDA where the model fits."""
    spec = llama_like()[0]
    monkeypatch.setattr(devices, "cuda_ops", lambda _: SimpleNamespace())      # as where there is a GPU
    monkeypatch.setattr(cuda_backend, "prove_cuda", lambda backend, device: {})
    kernels = load_kernels("cuda", blocks_of(spec))
    names = kernels.names
    assert {name for name, by in names.items() if by == "decode_core/cuda"} >= {"linear", "rope_append", "paged_attention", "sample"}
    assert names["rms_norm"] == "torch/reference" and not kernels.row_invariant
    for unfit in (replace(spec, head_size=24), replace(spec, head_size=272), replace(spec, vocab_size=(1 << 18) + 1),
                  replace(spec, experts=1025, experts_per_token=2), replace(spec, experts=8, experts_per_token=2, ffn_size=60)):
        assert set(load_kernels("cuda", blocks_of(unfit)).names.values()) == {"torch/reference", "numpy/reference"}
    with pytest.raises(ConfigError, match="--quantize needs decode_core and a CPU"):
        load_kernels("cuda", blocks_of(spec), quantize="q8_0")
    monkeypatch.setattr(devices, "cuda_ops", lambda _: None)       # no driver, or no device
    assert load_kernels("cuda", blocks_of(spec)).names["sample"] == "numpy/reference"


def test_the_core_says_whether_cuda_can_be_used():
    core = compiled._core
    able = core.cuda_compiled and core.cuda_devices() and core.cuda_capability(0) >= 80
    assert (devices.cuda_ops() is not None) == bool(able)


@pytest.mark.parametrize("capability, able", [(75, False), (80, True), (86, True), (90, True), (120, True)])
def test_an_old_gpu_gets_torch_and_one_line(monkeypatch, caplog, capability, able):
    """A GPU older than the kernels gets torch and one line."""
    core = SimpleNamespace(cuda_compiled=True, cuda_devices=lambda: 2, cuda_capability=lambda device: [90, capability][device])
    monkeypatch.setattr(devices, "_core", core)
    devices.say_once.cache_clear()
    spec = ModelSpec(vocab_size=64, layers=1, width=32, heads=2, kv_heads=1, head_size=16, ffn_size=32, max_positions=64)
    for _ in range(2):
        assert type(devices.backend_for(blocks_of(spec), "cuda:1")).__name__ == ("CudaBackend" if able else "NoneType")
    assert devices.cuda_ops(0) is not None and devices.cuda_ops(2) is None
    lines = [record.getMessage() for record in caplog.records if "8.0" in record.getMessage()]
    assert lines == [] if able else lines == ["decode_core's CUDA kernels need 8.0, the GPU has 7.5: torch computes instead"]


# --- the bench ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_decode_bench_runs(backend):
    from importlib.util import module_from_spec, spec_from_file_location
    place = spec_from_file_location("cuda_decode", Path(__file__).parents[2] / "bench" / "cuda_decode.py")
    bench = module_from_spec(place)
    place.loader.exec_module(bench)
    for shape in bench.SHAPES.values():
        attention = replace(shape.attentions[0], heads=4, kv_heads=2, head_size=16, value_size=16, rope=replace(shape.attentions[0].rope, size=16))
        layer = replace(shape.layers[0], mixer=attention, feed=replace(shape.feed, width=96))
        spec = replace(shape, layers=(layer,), width=64, vocab_size=200, max_positions=400)
        steps = bench.make_steps(spec, backend.kernels(spec), backend.device, "bfloat16", 3, 200, backend.queue())
        assert bench.seconds_per_step(bench.Decoding(steps, 3, 100, 60), 40) > 0
        assert steps.queue.replays == 2 * 40 and bench.seconds_per_replay(steps, 3, 2) > 0
        weights = 64 * (4 + 4) * 16 + 64 * 64 + 64 * 96 * (2 if spec.feed.activation == "relu2" else 3) + 200 * 64
        norms = 3 * 64 * 4 if spec.norm.weights else 0
        assert bench.bytes_of_a_step(steps.transformer, 3, 100) == 2 * weights + norms + 3 * 100 * 2 * 2 * 16 * 2
